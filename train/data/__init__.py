"""Samples to batches of captions, or of cached features."""
