"""Files on disk and behind URLs: read, written whole or not at all, listed, owned, retried."""
