"""Samples of tar shards for any training loop: each exactly once an epoch, in one order, resumed by a seek."""
