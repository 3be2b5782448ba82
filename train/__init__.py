"""Stage 2: tar shards to a model folder."""
