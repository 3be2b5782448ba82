"""Where the loader's time goes on your own shards, which stage limits it, and how many workers it wants:

    python train/doctor.py --shards data/shards --images-per-second 2000 --workers 4

A part of the shards is read with the code that training reads with: stage by stage, then as whole streams, without
workers and with real ones. Start it where you will train while nothing else runs; it leaves nothing behind.
"""

import json
import math
import os
import tempfile
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from captioner import cli
from captioner.decoder_output import own_stderr
from captioner.errors import UserError
from captioner.files import storage
from captioner.flags import Count, File, Location, Pixels, Positive, Workers
from captioner.shards.format import ShardEntry
from captioner.shards.splitmix import random_bits, random_order
from captioner.streaming.cache import CacheFolderError, ShardCache
from captioner.streaming.dataset import Split, check_filled, read_split
from captioner.streaming.order import SAMPLE_CHANCE, EpochOrder, SampleRef
from captioner.streaming.reader import OpenShard, SampleError, ShardReader
from captioner.workers import count_processors
from train.diagnosis import STAGES, Measured, verdict
from train.plan import PACK_FIRST
from train.settings import TrainSettings
from train.split import read_merged_vocabulary
from train.stream import (
    BATCHES_AHEAD,
    BatchStream,
    MakeBatches,
    Share,
    ViewRules,
    decode_picture,
    fill_view,
    read_sample,
)

NUM_SHARDS, NUM_BYTES = 8, 300_000_000  # that are read at most; one shard always
NUM_FILES = 300  # samples that are written as loose files, and read cold at least
WALL, CPU = time.perf_counter, time.thread_time
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class DoctorSettings:
    """What would be trained on, and how fast it should come."""

    shards: tuple[Location, ...] = ("data/shards",)
    """Dataset folders (or URLs), as for train/main.py."""
    split: str = "train"
    """Which split."""
    batch_size: Count = 128
    """Images of a batch of one training process."""
    crop: Pixels = 224
    """Sides in pixels of the square that is cut from a stored picture."""
    images_per_second: Positive = 1000.0
    """What one training process should get."""
    workers: Workers = 2
    """Loader processes to measure with."""
    seconds: Positive = 10.0
    """For the stream with workers; all other measurements together take about as long again."""
    json: File | None = None
    """Write the numbers and the verdict there too."""


# ---- measuring ----------------------------------------------------------------------------------------------


class TimedReader(ShardReader):
    """Times the reading of samples and, within it, the opening of shards; `time` does so with any stage."""

    def __init__(self, split: Split, cache: ShardCache) -> None:
        super().__init__(split.shards, max_open=len(split.shards), cache=cache)
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.runs: Counter[str] = Counter()

    def time(self, stage: str, clock: Callable[[], float], work: Callable[..., Result], *arguments: Any) -> Result:
        """What `work` gives."""
        started = clock()
        try:
            return work(*arguments)
        finally:
            self.seconds[stage] += clock() - started
            self.runs[stage] += 1

    def read(self, shard: int, place: int) -> tuple[str, dict[str, bytes]]:
        return self.time("read", WALL, self.time, "read's work", CPU, super().read, shard, place)

    def _open_shard(self, number: int) -> OpenShard:
        return self.time("open", WALL, super()._open_shard, number)

    def read_us(self, *, opens: float) -> float:
        """To read an image, with `opens` of shards for each."""
        read = (self.seconds["read"] - self.seconds["open"]) / self.runs["read"]
        return 1e6 * (read + opens * self.seconds["open"] / self.runs["open"])


def some_shards(split: Split, cache: ShardCache, *, seconds: float) -> tuple[Split, float | None]:
    """A part of the split, with what could be downloaded in the time, one shard at least, and the MB/s of that."""
    filled = [pair for pair in split.shards if pair[1].samples]
    spread = filled[:: -(-len(filled) // NUM_SHARDS)][: max(1, NUM_BYTES * len(filled) // split.bytes)]
    chosen, num_bytes, started = set(), 0, WALL()
    for folder, entry in spread:
        if storage.is_remote(folder):
            if num_bytes and WALL() - started > seconds:
                continue
            cache.fetch(folder, entry)
            num_bytes += entry.bytes
        chosen.add(entry)
    mbs = num_bytes / 1e6 / (WALL() - started)
    return change_shards(split, lambda shards: tuple(entry for entry in shards if entry in chosen)), mbs or None


def change_shards(split: Split, change: Callable[[tuple[ShardEntry, ...]], tuple[ShardEntry, ...]]) -> Split:
    """The split with other shards in its manifests."""
    manifests = tuple(replace(manifest, shards=change(manifest.shards)) for manifest in split.manifests)
    return replace(split, manifests=manifests)


def read_cold(paths: Iterable[Path], reads: Iterable[bytes], *, seconds: float) -> tuple[list[bytes], float, bool]:
    """The first things that `reads` gives after the system forgot files, the µs of each, whether the disk was read."""
    for path in paths:
        with suppress(OSError, AttributeError), path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before, started, kept, num_read, num_bytes = disk_bytes(), WALL(), [], 0, 0
    for data in reads:
        num_read, num_bytes = num_read + 1, num_bytes + len(data)
        if num_read <= NUM_FILES:
            kept.append(data)
        elif WALL() - started > seconds:
            break
    return kept, 1e6 * (WALL() - started) / num_read, disk_bytes() - before > num_bytes / 2


def read_shards(
    split: Split, cache: ShardCache, refs: Iterable[SampleRef], *, forget: Iterable[Path], opens: float, seconds: float
) -> tuple[list[bytes], float, bool, int]:
    """As `read_cold` with samples, and how many were read; an image's µs hold `opens` of shards."""
    with closing(TimedReader(split, cache)) as reader:
        reads = (b"".join(reader.read(ref.shard, ref.place)[1].values()) for ref in refs)
        contents, _, from_disk = read_cold(forget, reads, seconds=seconds)
    return contents, reader.read_us(opens=opens), from_disk, reader.runs["read"]


def disk_bytes() -> int:
    """What this process had the disk read so far; 0 where the system does not tell."""
    with suppress(OSError, IndexError):
        return int(Path("/proc/self/io").read_text().split("\nread_bytes: ")[1].split()[0])
    return 0


def run_stages(make: MakeBatches, reader: TimedReader, batches: Iterator[list[SampleRef]], *, seconds: float) -> None:
    """A worker's stages on batches, one by one, in the order in which `make`, a MakeBatches, has them."""
    (_, buffer_BPP3), started = make.ring.take(), WALL()

    while not reader.runs["collate"] or WALL() - started < seconds:
        samples = [reader.time("sample", CPU, read_sample, reader, ref) for ref in next(batches)]
        chances = random_bits(np.arange(len(samples)), reader.runs["collate"], SAMPLE_CHANCE).tolist()
        for row, sample in enumerate(samples):
            decode = partial(decode_picture, squash_to=make.split.stored_sizes[sample.ref.shard])
            pixels_HW3 = reader.time("decode", CPU, decode, sample)
            fill = partial(fill_view, rules=make.rules, chance=chances[row])
            reader.time("transform", CPU, fill, buffer_BPP3[row], pixels_HW3, sample)
        reader.time("collate", CPU, make.collate, samples, buffer_BPP3, None, [])


def run_stream(batches: BatchStream, *, skip: int, seconds: float) -> tuple[float, float]:
    """A stream's images/s and this thread's own microseconds an image, after `skip` batches in which it starts."""
    items: Any = iter(batches)
    with closing(items):
        deque(islice(items, skip), maxlen=0)
        started, own, num_images = WALL(), CPU(), 0
        for batch in items:
            num_images += batch.num_samples
            if WALL() - started > seconds:
                break
        return max(1, num_images) / (WALL() - started), 1e6 * (CPU() - own) / max(1, num_images)


def read_loose(contents: Sequence[bytes], folders: Sequence[str]) -> dict[str, Any]:
    """Write files into the first folder that takes them and read them in another order: fields of `Measured`."""
    for folder in folders:
        with suppress(OSError), tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder) as place:
            paths = [Path(place, str(number)) for number in range(len(contents))]
            for path, data in zip(paths, contents, strict=True):
                with path.open("wb", buffering=0) as file:
                    file.write(data)
                    os.fsync(file.fileno())
            order = [str(paths[number]) for number in random_order(len(paths), 0)]
            _, cold_us, from_disk = read_cold(paths, map(storage.read_bytes, order), seconds=math.inf)
            _, warm_us, _ = read_cold((), map(storage.read_bytes, order), seconds=math.inf)
            return {"loose_us": warm_us, "loose_cold_us": cold_us if from_disk else None, "loose_folder": folder}
    return {}


def measure(settings: DoctorSettings, split: Split, cache: ShardCache, bar: cli.Bar) -> Measured:
    """All of it, in the order in which a sample goes."""
    vocabulary = read_merged_vocabulary(split.folders, remedy=PACK_FIRST)
    rules = ViewRules(crop=settings.crop, max_tokens=TrainSettings.max_tokens, training=True)
    part, download_mbs = some_shards(split, cache, seconds=settings.seconds / 2)

    def plan_epoch(shards: Split) -> EpochOrder:
        return shards.plan(seed=0, epoch=0, global_batch=settings.batch_size)

    def open_stream(shards: Split, *, workers: int) -> BatchStream:
        fixed = {"rules": rules, "vocabulary": vocabulary, "cache": cache, "share": Share(settings.batch_size)}
        return BatchStream(shards, plan=plan_epoch(shards), workers=workers, **fixed)

    bar.advance(note="cold reading")
    refs = plan_epoch(part).refs(range(part.num_samples))
    opens = settings.workers * len(part.shards) / part.num_samples  # each worker opens them all
    kept = [cache.folder / e.sha256 if storage.is_remote(f) else Path(f, e.name) for f, e in part.shards]
    paths = [Path(f"{stem}.{ending}") for stem in kept for ending in ("tar", "index")]
    read = partial(read_shards, part, cache, opens=opens, seconds=settings.seconds / 4)
    contents, cold_us, from_disk, num_read = read(refs, forget=paths)
    _, warm_us, _, _ = read(refs[:num_read], forget=())
    for path in paths:
        with suppress(OSError), path.open("rb") as file:
            deque(iter(partial(file.read, 1 << 24), b""), maxlen=0)

    bar.advance(note="stage by stage")
    make, reader = open_stream(part, workers=0).stage, TimedReader(part, cache)
    again = cycle(refs[:num_read])
    batches = iter(lambda: list(islice(again, settings.batch_size)), [])
    with own_stderr():  # as the loader's workers do: else another decoder would be measured
        run_stages(make, reader, batches, seconds=settings.seconds / 4)
    reader.close()
    seconds = reader.seconds | {"parse": reader.seconds["sample"] - reader.seconds["read's work"]}
    stage_us = {stage: 1e6 * seconds[stage] / reader.runs["transform"] for stage in STAGES}
    stage_us["read"] = reader.read_us(opens=opens)

    bar.advance(note="whole streams")
    skip = settings.workers * BATCHES_AHEAD
    num_images = settings.batch_size * (2 + 2 * skip)
    num_images += 2e6 / sum(stage_us.values()) * settings.seconds * settings.workers  # twice what is expected
    longer = change_shards(part, lambda shards: shards * math.ceil(num_images / part.num_samples))
    alone_rate, alone_cpu_us = run_stream(open_stream(longer, workers=0), skip=1, seconds=settings.seconds / 2)
    streaming = open_stream(longer, workers=settings.workers)
    workers_rate, handoff_us = run_stream(streaming, skip=skip, seconds=settings.seconds)

    bar.advance(note="loose files")
    places = [folder for folder in split.folders if not storage.is_remote(folder)][:1]
    return Measured(
        stage_us=stage_us,
        handoff_us=handoff_us,
        alone_rate=alone_rate,
        alone_cpu_us=alone_cpu_us,
        workers=settings.workers,
        workers_rate=workers_rate,
        cores=count_processors(),
        image_bytes=sum(map(len, contents)) / len(contents),
        split_bytes=split.bytes,
        memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        warm_us=warm_us,
        cold_us=cold_us if from_disk else None,
        download_mbs=download_mbs,
        **read_loose(contents, [*places, tempfile.gettempdir()]),
    )


def stage_rows(m: Measured) -> list[tuple[object, ...]]:
    """For each stage its µs an image, its share in per cent, and what a core makes that does nothing else."""
    all_us = m.stage_us | {"hand-off": m.handoff_us}
    return [(stage, us, 100 * us / sum(all_us.values()), round(1e6 / us)) for stage, us in all_us.items()]


def main(settings: DoctorSettings) -> None:
    """Measure and tell."""
    split = read_split(settings.shards, settings.split, remedy=PACK_FIRST)
    check_filled(split)
    if settings.json is not None and settings.json.is_dir():
        raise UserError(f"--json {settings.json} is a folder: give the name of a file")
    torch.set_num_threads(1)
    with cli.progress_bar("measuring", total=4, unit="parts") as bar, tempfile.TemporaryDirectory() as place:
        try:
            measured = measure(settings, split, ShardCache(place, max_bytes=1 << 60), bar)
        except SampleError as error:
            raise UserError(error.message) from error
    rows, lines = stage_rows(measured), verdict(measured, wanted=settings.images_per_second)
    title = f"{split.name} of {', '.join(split.folders)}"
    cli.print_table(title, ("stage", "µs an image", "share %", "images/s a core"), rows)
    for line in lines:
        cli.console.print(line, markup=False)
    if settings.json:
        text = json.dumps(
            {**asdict(measured), "wanted": settings.images_per_second, "verdict": lines}, indent=1, allow_nan=False
        )
        try:
            storage.write_atomic(str(settings.json), text)
        except OSError as error:
            raise UserError(f"cannot write {settings.json} ({error.strerror}): give another --json") from error


def run() -> None:
    """The console entry."""
    remedies: cli.Remedies = {CacheFolderError: "set TMPDIR to a folder with room on a disk of this machine"}
    cli.run(main, DoctorSettings, description=__doc__ or "", remedies=remedies)


if __name__ == "__main__":
    run()
