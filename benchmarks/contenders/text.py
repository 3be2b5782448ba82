"""Loaders of short text samples as lists of raw bytes, which measures little but the loader; and a seek."""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from contenders.loader import Contender, loader_options, read_members

OURS, READER, TRANSFORM, MIXTURE = "ours", "ours, reading alone", "ours, a transform", "ours, four sources"
SAMPLE_BYTES, SHARD_SAMPLES, NUM_SHARDS = 200, 10_000, 10
NUM_SAMPLES = NUM_SHARDS * SHARD_SAMPLES
SHUFFLE_BUFFER = 1000  # samples in webdataset's shuffle buffer
BATCHES_FOUND = 8  # looked up together, as in the loader
SHARDS, SEEK_SHARDS = "text", "seek"
SOURCES = (4, 3, 2, 1)  # shards of each source of the mixture, and its weights
LETTERS = b"etaoinshrdlu     "


# ---- samples ----------------------------------------------------------------------------------------------


def write_shards(folder: Path) -> None:
    """Write `text/` with NUM_SHARDS shards, and `text-0/` to `text-3/` with links to some of them."""
    shards = folder / SHARDS
    shards.mkdir()
    entries = [write_shard(shards, number) for number in range(NUM_SHARDS)]
    write_manifest(shards, entries)
    for source, count in zip(source_folders(folder), SOURCES, strict=True):
        source.mkdir()
        taken, entries = entries[:count], entries[count:]
        for entry in taken:
            link(shards, entry.name, source, entry.name)
        write_manifest(source, taken)


def write_shard(folder: Path, number: int) -> Any:
    """Write a shard of SHARD_SAMPLES samples with one member `txt`; returns its entry for the manifest."""
    from captioner.shards.format import ShardEntry, ShardIndex, TarBuilder, shard_name

    tar, samples = TarBuilder(), []
    letters = bytes(Random(number).choices(LETTERS, k=SHARD_SAMPLES + SAMPLE_BYTES))
    for sample in range(SHARD_SAMPLES):
        key = f"{number * SHARD_SAMPLES + sample:09d}"
        samples.append((key, {"txt": tar.add(f"{key}.txt", letters[sample : sample + SAMPLE_BYTES])}))
    content, name = tar.to_bytes(), shard_name("train", number)
    sha256 = hashlib.sha256(content).hexdigest()
    (folder / f"{name}.tar").write_bytes(content)
    (folder / f"{name}.index").write_bytes(ShardIndex.of(samples, {"sha256": sha256, "fingerprint": sha256}).to_bytes())
    return ShardEntry(
        name=name, samples=len(samples), failures=0, bytes=len(content), sha256=sha256, fingerprint=sha256
    )


def write_manifest(folder: Path, entries: Iterable[Any]) -> None:
    """Write the manifest of a folder's shards."""
    from captioner.shards.format import Manifest, manifest_location

    manifest = Manifest(
        split="train", shards=tuple(entries), settings={}, source={}, failures={}, fingerprint=folder.name
    )
    Path(manifest_location(str(folder), "train")).write_text(manifest.to_json())


def link(folder: Path, name: str, target: Path, new_name: str) -> None:
    """Link a shard into another folder under another name."""
    for suffix in (".tar", ".index"):
        os.link(folder / f"{name}{suffix}", target / f"{new_name}{suffix}")


def source_folders(folder: Path) -> list[Path]:
    """The mixture's sources."""
    return [folder / f"{SHARDS}-{number}" for number in range(len(SOURCES))]


# ---- contenders -------------------------------------------------------------------------------------------


def ours(folder: Path, *, batch: int, workers: int, epoch: int) -> Iterator[list[Any]]:
    """Our loader."""
    return _stream([folder / SHARDS], batch=batch, num_workers=workers, epoch=epoch)


def ours_with_a_transform(folder: Path, *, batch: int, workers: int, epoch: int) -> Iterator[list[Any]]:
    """Our loader with a transform that does nothing, for which random numbers are seeded."""
    return _stream([folder / SHARDS], batch=batch, num_workers=workers, epoch=epoch, transform=_same)


def our_mixture(folder: Path, *, batch: int, workers: int, epoch: int) -> Iterator[list[Any]]:
    """Our loader on four sources; each sample comes once an epoch."""
    return _stream(source_folders(folder), batch=batch, num_workers=workers, epoch=epoch, weights=SOURCES)


def _stream(sources: list[Path], *, epoch: int, batch: int, **options: Any) -> Iterator[list[Any]]:
    from captioner.streaming import StreamingLoader

    loader = StreamingLoader(sources, split="train", batch_size=batch, collate=list, **options)
    loader.set_epoch(epoch)
    return (found for found in loader)  # a generator, which can be closed


def _same(sample: Any, _rng: Any) -> Any:
    return sample


def our_reader(folder: Path, *, batch: int, workers: int, epoch: int) -> Iterator[list[Any]]:
    """The parts below our loader: the order, and reading with checksums."""
    from captioner.streaming.dataset import read_split
    from captioner.streaming.order import ShardOrder
    from captioner.streaming.reader import ShardReader

    split = read_split([str(folder / SHARDS)], "train")
    order = ShardOrder([entry.samples for _, entry in split.shards], seed=0, batch_size=batch)
    reader = ShardReader(split.shards, max_open=len(split.shards))
    size = batch * BATCHES_FOUND
    for start in range(0, order.num_samples, size):
        refs = order.refs(epoch, range(start, min(start + size, order.num_samples)))
        for first in range(0, len(refs), batch):
            yield [reader.read(ref.shard, ref.index_in_shard) for ref in refs[first : first + batch]]


def plain_webdataset(folder: Path, *, batch: int, workers: int, epoch: int) -> Iterator[list[Any]]:
    """webdataset's own reader on the same tars: shuffled tars, then a shuffle buffer."""
    import webdataset as wds

    tars = sorted(map(str, (folder / SHARDS).glob("*.tar")))
    dataset: Any = wds.WebDataset(tars, shardshuffle=len(tars), seed=epoch)
    return (found for found in dataset.shuffle(SHUFFLE_BUFFER).batched(batch, collation_fn=list, partial=False))


def litdata(folder: Path, *, batch: int, workers: int, epoch: int) -> Iterator[list[Any]]:
    """Chunks written by litdata's `optimize`; yields views of the chunks."""
    from litdata import StreamingDataLoader, StreamingDataset  # type: ignore

    dataset = StreamingDataset(str(folder / "text-litdata"), shuffle=True, drop_last=True, seed=epoch)
    yield from StreamingDataLoader(dataset, batch_size=batch, collate_fn=list, **loader_options(workers))


def write_litdata(folder: Path) -> None:
    """Write litdata's chunks."""
    from litdata import optimize  # type: ignore

    output = str(folder / "text-litdata")
    optimize(read_members, inputs=[folder / SHARDS], output_dir=output, chunk_bytes="64MB", num_workers=1)


def mosaicml(folder: Path, *, batch: int, workers: int, epoch: int) -> Iterator[list[Any]]:
    """Shards in MosaicML's format."""
    from streaming.base.util import clean_stale_shared_memory  # type: ignore
    from torch.utils.data import DataLoader

    from streaming import StreamingDataset  # type: ignore

    clean_stale_shared_memory()
    dataset: Any = StreamingDataset(local=str(folder / "text-mds"), shuffle=True, shuffle_seed=epoch, batch_size=batch)
    yield from DataLoader(dataset, batch_size=batch, collate_fn=list, **loader_options(workers))


def write_mosaicml(folder: Path) -> None:
    """Write MosaicML's shards."""
    from streaming import MDSWriter  # type: ignore

    with MDSWriter(out=str(folder / "text-mds"), columns={"txt": "bytes"}) as writer:
        for content in read_members(folder / SHARDS):
            writer.write({"txt": content})


TEXT_LOADERS = {
    OURS: Contender(package="torch", modules=("captioner.streaming.loader",), open_epoch=ours),
    TRANSFORM: Contender(package="torch", modules=("captioner.streaming.loader",), open_epoch=ours_with_a_transform),
    MIXTURE: Contender(package="torch", modules=("captioner.streaming.loader",), open_epoch=our_mixture),
    READER: Contender(package="numpy", modules=("captioner.streaming.reader",), open_epoch=our_reader),
    "webdataset": Contender(package="webdataset", modules=("webdataset",), open_epoch=plain_webdataset),
    "litdata": Contender(package="litdata", modules=("litdata",), open_epoch=litdata, write=write_litdata),
    "mosaicml-streaming": Contender(
        package="mosaicml-streaming", modules=("streaming",), open_epoch=mosaicml, write=write_mosaicml
    ),
}


# ---- a seek -----------------------------------------------------------------------------------------------


def link_shards(folder: Path, *, num_shards: int) -> None:
    """Write `seek/`, with `num_shards` links to the first shard of `text/`."""
    from captioner.shards.format import read_manifest, shard_name

    seek_folder = folder / SEEK_SHARDS
    seek_folder.mkdir()
    first = read_manifest(str(folder / SHARDS), "train", remedy="").shards[0]
    entries = [replace(first, name=shard_name("train", number)) for number in range(num_shards)]
    for entry in entries:
        link(folder / SHARDS, first.name, seek_folder, entry.name)
    write_manifest(seek_folder, entries)


def seek(*, folder: str, batch: int, at: float, num_sources: int) -> dict[str, float | None]:
    """Seconds from reading the manifest to the first batch after a seek, in a process without workers.

    The seek goes to the fraction `at` of the second epoch. Several sources have equal numbers of shards, and SOURCES as
    weights. `memory_mb` is the memory added by loading the state and making the batch: the indexes of the open shards,
    and the order of the samples that are shuffled together. It is None if the system does not report it.
    """
    from captioner.shards.format import read_manifest
    from captioner.streaming import StreamingLoader
    from captioner.streaming.dataset import Split

    location = str(Path(folder) / SEEK_SHARDS)
    started = time.perf_counter()
    whole = read_manifest(location, "train", remedy="")
    each = len(whole.shards) // num_sources
    manifests = [replace(whole, shards=whole.shards[n * each : (n + 1) * each]) for n in range(num_sources)]
    split = Split("train", (location,) * num_sources, tuple(manifests))
    weights = SOURCES if num_sources > 1 else None
    loader = StreamingLoader(split, batch_size=batch, weights=weights, collate=list)
    state = loader.state_dict() | {"epoch": 1, "position": int(at * len(loader)) * batch}
    before = resident_megabytes()
    loader.load_state_dict(json.loads(json.dumps(state)))
    seeking = time.perf_counter()
    found = next(islice(loader, 1))
    ended = time.perf_counter()
    assert len(found) == batch
    after = resident_megabytes()
    return {
        "num_samples": split.num_samples, "seconds": ended - started, "batch_seconds": ended - seeking,
        "memory_mb": None if before is None or after is None else after - before,
    }  # fmt: skip


def resident_megabytes() -> float | None:
    """The process's resident memory; None if the system does not report it."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6
