"""Captions and images to shards."""
