"""The format of a dataset folder: tar members, indexes, manifests."""
