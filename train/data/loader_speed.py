"""How fast a loader's stages are, and how many workers a training process needs."""

import math
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice, repeat
from pkgutil import resolve_name
from typing import Any

import torch
from torch.utils.data import default_collate

from captioner import cli
from captioner.errors import UserError
from captioner.files import storage
from captioner.shards.format import ShardEntry
from captioner.streaming import StreamingLoader
from captioner.streaming.buffers import map_leaves, pinned
from captioner.streaming.cache import ShardCache
from captioner.streaming.dataset import Split
from captioner.workers import count_processors
from train.data.batches import CaptionPipeline
from train.data.folders import read_merged_vocabulary

PINNED_COPIES = 9
MAX_SHARDS, MAX_BYTES = 8, 300_000_000  # that are read; one shard always
WALL, CPU = time.perf_counter, time.thread_time


@dataclass(frozen=True, kw_only=True, slots=True)
class LoaderSpeed:
    """`_us` are microseconds a sample, rates are samples/s.

    `stage_us` are a worker's stages, `handoff_us` the training process's own time, `pinning_us` the time of the thread
    that copies batches to pinned memory; `alone_rate` is that of a loader without workers.
    """

    stage_us: dict[str, float]
    handoff_us: float
    pinning_us: float
    alone_rate: float
    workers: int
    workers_rate: float
    cores: int

    @property
    def limit(self) -> str:
        """Hand-off where the measured workers make more than the training process takes; else their longest stage."""
        if 1e6 / self.handoff_us < self.alone_rate * min(self.workers, self.cores):
            return "hand-off"
        return max(self.stage_us, key=lambda stage: self.stage_us[stage])

    def rows(self) -> list[tuple[object, ...]]:
        """For each stage its µs a sample, its per cent of the sum, and the samples/s of a core that does only that."""
        all_us = self.stage_us | {"hand-off": self.handoff_us, "pinning, for a GPU": self.pinning_us}
        return [(stage, us, 100 * us / sum(all_us.values()), round(1e6 / us)) for stage, us in all_us.items()]

    def verdict(self, *, wanted: float) -> str:
        """One line: what limits the loader, and how many workers give `wanted` samples/s."""
        is_linear = self.workers <= self.cores and self.limit != "hand-off"
        each = self.workers_rate / self.workers if is_linear else self.alone_rate
        num_workers, num_processes = math.ceil(wanted / each), math.ceil(wanted * self.handoff_us / 1e6)
        processes = "" if num_processes < 2 else f" for {num_processes} training processes"
        return (
            f"{self.limit.capitalize()} limits: {self.workers} workers make {self.workers_rate:,.0f} samples/s; "
            f"{wanted:,.0f} samples/s need {num_workers:,} workers of {each:,.0f} each{processes}, and there are "
            f"{self.cores} cores."
        )


def caption_functions(split: Split, *, crop: int, max_tokens: int, batch_size: int) -> dict[str, Any]:
    """The loader's functions and fields of training."""
    pipeline = CaptionPipeline(
        split=split,
        vocabulary=read_merged_vocabulary(split.folders),
        crop=crop,
        max_tokens=max_tokens,
        batch_size=batch_size,
        seed=0,
    )
    return pipeline.stages(references=False)


def user_functions(transform: str, collate: str | None) -> dict[str, Any]:
    """The loader's functions by their names, MODULE:FUNCTION; `collate` is torch's without one. Raises UserError."""
    if "" not in sys.path:  # modules in the current folder
        sys.path.insert(0, "")
    try:
        return {
            "transform": resolve_name(transform),
            "collate": resolve_name(collate) if collate else default_collate,
        }
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"there is no such function ({error}): give MODULE:FUNCTION") from error


class TimedStage:
    """A worker's function whose calls are timed."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.seconds = 0.0
        self.is_random = getattr(function, "is_random", True)  # the loader reads this

    def __call__(self, *arguments: Any) -> Any:
        """Call the function."""
        started = WALL()
        found = self.function(*arguments)
        self.seconds += WALL() - started
        return found


def measure_loader(
    split: Split,
    options: dict[str, Any],
    *,
    batch_size: int,
    workers: int,
    seconds: float,
    cache: str,
    bar: cli.Bar,
) -> LoaderSpeed:
    """Measure a loader with these functions and fields, stage by stage in this process, then with workers.

    That takes half of `seconds`, then `seconds`. Shards behind URLs are in `cache`, a folder.
    """
    open_loader = partial(
        StreamingLoader,
        split,
        batch_size=batch_size,
        last_batch="drop",
        cache=cache,
        cache_gigabytes=1e9,
        rank=0,
        world_size=1,
    )

    bar.advance(note="stage by stage")
    stages: dict[str, Any] = {name: TimedStage(function) for name, function in options.items() if callable(function)}
    alone_seconds, _, num_samples = run_loader(open_loader(**options | stages), skip=0, seconds=seconds / 2)
    spent = {name: stage.seconds for name, stage in stages.items()}
    spent = {"read": alone_seconds - sum(spent.values()), **spent}

    bar.advance(note="with workers")
    loader = open_loader(num_workers=workers, **options)
    workers_seconds, own_seconds, num_received = run_loader(loader, skip=4 * workers, seconds=seconds)
    batch = next(iter(open_loader(**options)))
    return LoaderSpeed(
        stage_us={name: 1e6 * spent[name] / num_samples for name in spent},
        handoff_us=1e6 * own_seconds / num_received,
        pinning_us=1e6 * time_pinning(batch) / batch_size,
        alone_rate=num_samples / alone_seconds,
        workers=workers,
        workers_rate=num_received / workers_seconds,
        cores=count_processors(),
    )


def time_pinning(batch: Any) -> float:
    """The seconds that a copy of the batch to pinned memory takes; without a GPU, a copy of its tensors."""
    can_pin, seconds = torch.accelerator.is_available(), []
    for _ in range(PINNED_COPIES):
        started = WALL()
        copied = pinned(batch) if can_pin else map_leaves(batch, _copy)
        seconds.append(WALL() - started)
        del copied
    return statistics.median(seconds)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def fetch_some_shards(split: Split, cache: str, *, seconds: float) -> tuple[Split, float | None]:
    """The split of some shards, those fetched in the time and one at least, and the download's MB/s (None: local)."""
    shard_cache = ShardCache(cache, max_bytes=1 << 60)
    filled = [pair for pair in split.shards if pair[1].samples]
    spread = filled[:: -(-len(filled) // MAX_SHARDS)][: max(1, MAX_BYTES * len(filled) // split.bytes)]
    chosen: set[ShardEntry] = set()
    num_bytes, started = 0, WALL()
    for folder, entry in spread:
        if storage.is_remote(folder):
            if num_bytes and WALL() - started > seconds:
                continue
            shard_cache.fetch(folder, entry)
            num_bytes += entry.bytes
        chosen.add(entry)
    mbs = num_bytes / 1e6 / (WALL() - started)
    manifests = tuple(
        replace(manifest, shards=tuple(entry for entry in manifest.shards if entry in chosen))
        for manifest in split.manifests
    )
    return replace(split, manifests=manifests), mbs or None


def run_loader(loader: StreamingLoader, *, skip: int, seconds: float) -> tuple[float, float, int]:
    """The seconds, this thread's CPU seconds, and the samples of a loader after its first `skip` batches."""
    with closing(loader):
        batches = chain.from_iterable(repeat(loader))  # epoch after epoch
        deque(islice(batches, skip), maxlen=0)
        started, own, num_samples = WALL(), CPU(), 0
        while WALL() - started < seconds:
            next(batches)
            num_samples += loader.batch_size
        return WALL() - started, CPU() - own, num_samples
