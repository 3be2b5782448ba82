"""Stage 1: photos and captions to tar shards."""
