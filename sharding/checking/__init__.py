"""Shards that are there: verify, show, repair, index."""
