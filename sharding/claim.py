"""One packer at a time for a split of a dataset folder."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from captioner.files import storage
from captioner.files.ownership import owned


def claim_location(folder: str, split: str) -> str:
    """The file or object that exists while a split is packed."""
    return storage.join(folder, f"{split}.packing")


@contextmanager
def claim(folder: str, split: str) -> Iterator[None]:
    """Hold the right to pack `split` into `folder`. Raises UserError while another process holds it."""
    with owned(claim_location(folder, split), doing="is packing this split into this folder"):
        _sweep(folder, split)
        try:
            yield
        finally:
            _sweep(folder, split)


def _sweep(folder: str, split: str) -> None:
    """Remove what a killed packer of this split left half written; the vocabulary is the training packer's."""
    if storage.is_remote(folder):
        return
    for pattern in (f"{split}[-.]*.partial", *(["vocabulary.json.*.partial"] if split == "train" else [])):
        for path in Path(folder).glob(pattern):
            with suppress(OSError):
                path.unlink()
