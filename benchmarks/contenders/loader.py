"""What the contenders of streaming.py have in common. Imports nothing of ours: an earlier commit's code runs too."""

import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BATCHES_AHEAD = 3  # that each worker makes before they are asked for
TAR_BLOCK = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class Contender:
    """`open_epoch(folder, batch=, workers=, epoch=)` yields batches: tensors of pictures, lists of samples.

    A loop that keeps nothing yields None. `folder` holds the shards, and what `write(folder)` made of them where a
    contender has a format of its own.
    """

    package: str
    modules: tuple[str, ...]
    open_epoch: Callable[..., Iterator[Any]]
    write: Callable[[Path], None] | None = None


def loader_options(workers: int) -> dict[str, Any]:
    """Processes, and batches that each makes ahead: the same for every DataLoader."""
    return {"num_workers": workers, "prefetch_factor": BATCHES_AHEAD if workers else None}


def read_members(folder: Path) -> Iterator[bytes]:
    """The content of each member of our own tars, by their headers: plain USTAR. Checks nothing."""
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
