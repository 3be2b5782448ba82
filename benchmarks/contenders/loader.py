"""What the loaders of streaming.py share. Imports none of our code, so that an earlier commit's code can run too."""

import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BATCHES_AHEAD = 3  # that each worker prefetches
TAR_BLOCK = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class Contender:
    """`open_epoch(folder, batch=, workers=, epoch=)` yields batches: tensors of images, lists of samples.

    A loop that only decodes yields None. `folder` holds the shards, and the output of `write(folder)` for contenders
    with their own format.
    """

    package: str
    modules: tuple[str, ...]
    open_epoch: Callable[..., Iterator[Any]]
    write: Callable[[Path], None] | None = None


def loader_options(workers: int) -> dict[str, Any]:
    """Number of workers and of batches that each prefetches: the same for every DataLoader."""
    return {"num_workers": workers, "prefetch_factor": BATCHES_AHEAD if workers else None}


def read_members(folder: Path) -> Iterator[bytes]:
    """The content of each member of our own plain USTAR tars, found by its header. Checks nothing."""
    for path in sorted(folder.glob("*.tar")):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as tar:
            yield from _walk(tar)


def _walk(tar: mmap.mmap) -> Iterator[bytes]:
    start = 0
    while tar[start]:
        size = int(tar[start + 124 : start + 135], 8)
        start += TAR_BLOCK
        yield tar[start : start + size]
        start += -(-size // TAR_BLOCK) * TAR_BLOCK
