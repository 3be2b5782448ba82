"""A training run: epochs, its folder, metrics, processes."""
