"""Tiny tars of any samples, indexed, and loaders of them."""

import io
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from captioner.streaming import StreamingLoader, index_shards

Members = Mapping[str, bytes]


def write_tar(path: Path, samples: Iterable[tuple[str, Members]]) -> None:
    """A tar of samples: (key, content by extension)."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, members in samples:
            for ending, content in members.items():
                info = tarfile.TarInfo(f"{key}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def text_samples(shard: int, count: int) -> list[tuple[str, Members]]:
    """Samples of one text member, `shard`-`number`."""
    return [(f"{number:05d}", {"txt": f"{shard}-{number}".encode()}) for number in range(count)]


def write_split(folder: Path, sizes: Sequence[int], *, split: str = "train") -> Path:
    """An indexed split of text samples with shards of these sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard, size in enumerate(sizes):
        write_tar(folder / f"{split}-{shard:06d}.tar", text_samples(shard, size))
    index_shards(str(folder), split=split)
    return folder


def text_of(sample: Mapping[str, Any]) -> str:
    """What stands in a text sample."""
    return bytes(sample["txt"]).decode()


def texts(batch: Iterable[Mapping[str, Any]]) -> list[str]:
    """The texts of a list batch."""
    return [text_of(sample) for sample in batch]


def make_loader(folder: str | Path | Sequence[str | Path], **options: Any) -> StreamingLoader:
    """A loader of list batches of 8, unless the options say otherwise."""
    chosen: dict[str, Any] = {"batch_size": 8, "collate": list} | options
    return StreamingLoader(folder, split="train", **chosen)


def run_epochs(loader: StreamingLoader, epochs: int) -> list[list[str]]:
    """The texts of each batch of so many epochs."""
    return [texts(batch) for _ in range(epochs) for batch in loader]


def global_batches(
    folder: str | Path | Sequence[str | Path], world_size: int, epochs: int = 1, **options: Any
) -> list[list[str]]:
    """The texts of each global batch: those of all ranks, one after the other."""
    loaders = [make_loader(folder, rank=rank, world_size=world_size, **options) for rank in range(world_size)]
    ranks = [run_epochs(loader, epochs) for loader in loaders]
    assert len({len(rank) for rank in ranks}) == 1  # all make the same number of steps
    return [[text for part in parts for text in part] for parts in zip(*ranks, strict=True)]
