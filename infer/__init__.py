"""Stage 3: a model folder and folders of photos to captions."""
