"""What limits the loader on your own shards, and how many workers it wants:

    python train/doctor.py --shards data/shards --samples-per-second 2000 --workers 4
    python train/doctor.py --shards audio --transform my_project.data:prepare --collate my_project.data:pad

A part of the shards is read by the loader that training reads with, in this process and with real workers. Start it
where you will train while nothing else runs; it leaves nothing behind.
"""

import json
import math
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import import_module
from itertools import chain, islice, repeat
from typing import Any

import torch
from torch.utils.data import default_collate

from captioner import cli
from captioner.errors import UserError
from captioner.files import storage
from captioner.flags import Count, File, Location, Pixels, Positive, Workers
from captioner.images.decoder_output import own_stderr
from captioner.shards.format import PACK_FIRST, ShardEntry
from captioner.streaming import StreamingLoader
from captioner.streaming.cache import CacheFolderError, ShardCache
from captioner.streaming.dataset import Split, check_filled, read_split
from captioner.workers import count_processors
from train.data.batches import CaptionBatches
from train.data.split import read_merged_vocabulary
from train.settings import TrainSettings

NUM_SHARDS, NUM_BYTES = 8, 300_000_000  # that are read at most; one shard always
WALL, CPU = time.perf_counter, time.thread_time


@dataclass(frozen=True, kw_only=True)
class DoctorSettings:
    """What would be trained on, and how fast it should come."""

    shards: tuple[Location, ...] = ("data/shards",)
    """Dataset folders (or URLs) of any samples, as for train/main.py."""
    split: str = "train"
    """Which split."""
    batch_size: Count = 128
    """Samples of a batch of one training process."""
    crop: Pixels = 224
    """Sides in pixels of the square that is cut from a captioned picture, where no --transform is given."""
    transform: str | None = None
    """Your transform of a sample, MODULE:FUNCTION. Without it what train/main.py does with captioned pictures."""
    collate: str | None = None
    """Your collate function, MODULE:FUNCTION, with --transform; without it torch's."""
    samples_per_second: Positive = 1000.0
    """What one training process should get."""
    workers: Workers = 2
    """Loader processes to measure with."""
    seconds: Positive = 10.0
    """For the loader with workers; all other measurements together take about as long again."""
    json: File | None = None
    """Write the numbers and the verdict there too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """`_us` are microseconds a sample, rates are samples/s.

    `stage_us` are a worker's stages, `handoff_us` the training process's own time, `alone_rate` is of a loader without
    workers. `download_mbs` is of one connection; None for local shards.
    """

    stage_us: dict[str, float]
    handoff_us: float
    alone_rate: float
    workers: int
    workers_rate: float
    cores: int
    download_mbs: float | None = None

    @property
    def limit(self) -> str:
        """Hand-off where the measured workers make more than the training process takes; else their longest stage."""
        if 1e6 / self.handoff_us < self.alone_rate * min(self.workers, self.cores):
            return "hand-off"
        return max(self.stage_us, key=lambda stage: self.stage_us[stage])


# ---- measuring ----------------------------------------------------------------------------------------------


def find_functions(settings: DoctorSettings, split: Split) -> dict[str, Any]:
    """The loader's `transform` and `collate`. Raises UserError."""
    if settings.transform is None:
        if settings.collate:
            raise UserError("--collate takes what your --transform makes: give both, or neither")
        batches = CaptionBatches(
            split=split, vocabulary=read_merged_vocabulary(split.folders, remedy=PACK_FIRST), crop=settings.crop,
            max_tokens=TrainSettings.max_tokens, batch_size=settings.batch_size, seed=0,
        )  # fmt: skip
        return {"decode": batches.parse, "transform": batches.transform, "collate": batches.collate}
    collate = find_function(settings.collate) if settings.collate else default_collate
    return {"transform": find_function(settings.transform), "collate": collate}


def find_function(text: str) -> Callable[..., Any]:
    """The function that MODULE:FUNCTION names; modules in the current folder are found too. Raises UserError."""
    module, _, name = text.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"there is no function {text} ({error}): give MODULE:FUNCTION") from error


class Stage:
    """A function of a worker whose time is counted."""

    def __init__(self, work: Callable[..., Any]) -> None:
        self.work = work
        self.seconds = 0.0
        self.is_random = getattr(work, "is_random", True)  # as the loader asks

    def __call__(self, *arguments: Any) -> Any:
        """What the function returns."""
        started = WALL()
        found = self.work(*arguments)
        self.seconds += WALL() - started
        return found


def some_shards(split: Split, cache: ShardCache, *, seconds: float) -> tuple[Split, float | None]:
    """A part of the split, with what could be downloaded in the time, one shard at least, and the MB/s of that."""
    filled = [pair for pair in split.shards if pair[1].samples]
    spread = filled[:: -(-len(filled) // NUM_SHARDS)][: max(1, NUM_BYTES * len(filled) // split.bytes)]
    chosen: set[ShardEntry] = set()
    num_bytes, started = 0, WALL()
    for folder, entry in spread:
        if storage.is_remote(folder):
            if num_bytes and WALL() - started > seconds:
                continue
            cache.fetch(folder, entry)
            num_bytes += entry.bytes
        chosen.add(entry)
    mbs = num_bytes / 1e6 / (WALL() - started)
    manifests = tuple(
        replace(manifest, shards=tuple(entry for entry in manifest.shards if entry in chosen))
        for manifest in split.manifests
    )
    return replace(split, manifests=manifests), mbs or None


def run_loader(loader: StreamingLoader, *, skip: int, seconds: float) -> tuple[float, float, int]:
    """A loader's seconds, this thread's processor time in them, and samples, after the `skip` batches of its start."""
    with closing(loader):
        batches = chain.from_iterable(repeat(loader))  # epoch after epoch
        deque(islice(batches, skip), maxlen=0)
        started, own, num_samples = WALL(), CPU(), 0
        while WALL() - started < seconds:
            next(batches)
            num_samples += loader.batch_size
        return WALL() - started, CPU() - own, num_samples


def measure(settings: DoctorSettings, split: Split, cache_folder: str, bar: cli.Bar) -> Measured:
    """All of it."""
    part, download_mbs = some_shards(split, ShardCache(cache_folder, max_bytes=1 << 60), seconds=settings.seconds / 2)
    settings = replace(settings, batch_size=min(settings.batch_size, part.num_samples))
    functions = find_functions(settings, part)
    open_loader = partial(
        StreamingLoader, part, batch_size=settings.batch_size, last_batch="drop", cache=cache_folder,
        cache_gigabytes=1e9, rank=0, world_size=1,
    )  # fmt: skip

    bar.advance(note="stage by stage")
    stages: dict[str, Any] = {name: Stage(work) for name, work in functions.items()}
    with own_stderr():  # as in the loader's workers: else another decoder would be measured
        seconds, _, num_samples = run_loader(open_loader(**stages), skip=0, seconds=settings.seconds / 2)
    spent = {name: stage.seconds for name, stage in stages.items()}
    spent = {"read": seconds - sum(spent.values()), **spent}

    bar.advance(note="with workers")
    skip = 4 * settings.workers
    loader = open_loader(num_workers=settings.workers, **functions)
    with_workers, own, num_received = run_loader(loader, skip=skip, seconds=settings.seconds)
    return Measured(
        stage_us={name: 1e6 * spent[name] / num_samples for name in spent},
        handoff_us=1e6 * own / num_received,
        alone_rate=num_samples / seconds,
        workers=settings.workers,
        workers_rate=num_received / with_workers,
        cores=count_processors(),
        download_mbs=download_mbs,
    )


# ---- what it means ------------------------------------------------------------------------------------------


def stage_rows(m: Measured) -> list[tuple[object, ...]]:
    """For each stage its µs a sample, its share in per cent, and what a core makes that does nothing else."""
    all_us = m.stage_us | {"hand-off": m.handoff_us}
    return [(stage, us, 100 * us / sum(all_us.values()), round(1e6 / us)) for stage, us in all_us.items()]


def verdict(m: Measured, *, wanted: float) -> str:
    """What the numbers mean for `wanted` samples/s, in a line."""
    kept_up = m.workers <= m.cores and m.limit != "hand-off"
    each = m.workers_rate / m.workers if kept_up else m.alone_rate
    needed, processes = math.ceil(wanted / each), math.ceil(wanted * m.handoff_us / 1e6)
    wish = f"{wanted:,.0f} samples/s want {needed:,} worker{'s' if needed > 1 else ''} of {each:,.0f} each"
    if processes > 1:
        wish += f" and {processes} training processes (one takes {1e6 / m.handoff_us:,.0f})"
    room = f"that leaves {m.cores - needed} of the {m.cores} cores to training"
    if needed > m.cores:
        room = f"the {m.cores} cores make about {m.cores * each:,.0f}"
    return f"{m.limit.capitalize()} limits: {m.workers} workers make {m.workers_rate:,.0f} samples/s; {wish}; {room}."


def main(settings: DoctorSettings) -> None:
    """Measure and tell."""
    split = read_split(settings.shards, settings.split, remedy=PACK_FIRST)
    check_filled(split)
    if settings.json is not None and settings.json.is_dir():
        raise UserError(f"--json {settings.json} is a folder: give the name of a file")
    torch.set_num_threads(1)
    with cli.progress_bar("measuring", total=2, unit="parts") as bar, tempfile.TemporaryDirectory() as cache:
        measured = measure(settings, split, cache, bar)
    said = verdict(measured, wanted=settings.samples_per_second)
    title = f"{split.name} of {', '.join(split.folders)}"
    cli.print_table(title, ("stage", "µs a sample", "share %", "samples/s a core"), stage_rows(measured))
    cli.console.print(said, markup=False)
    if settings.json:
        content = {**asdict(measured), "wanted": settings.samples_per_second, "verdict": said}
        try:
            storage.write_atomic(str(settings.json), json.dumps(content, indent=1, allow_nan=False))
        except OSError as error:
            raise UserError(f"cannot write {settings.json} ({error.strerror}): give another --json") from error


def run() -> None:
    """The console entry."""
    remedies: cli.Remedies = {CacheFolderError: "set TMPDIR to a folder with room on a disk of this machine"}
    cli.run(main, DoctorSettings, description=__doc__ or "", remedies=remedies)


if __name__ == "__main__":
    run()
