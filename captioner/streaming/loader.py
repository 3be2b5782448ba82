"""The loader: this rank's batches of the global order, and a state for exact resume."""

import atexit
import os
import pickle
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler, default_collate

from captioner.errors import StreamingError, TooManyBadSamplesError, TransformError
from captioner.files import storage
from captioner.streaming.buffers import Buffers, pinned
from captioner.streaming.cache import ShardCache
from captioner.streaming.dataset import Split, check_filled, read_split
from captioner.streaming.ledger import Ledger
from captioner.streaming.mixture import MixtureOrder, Since, make_order
from captioner.streaming.order import SHUFFLE_SHARDS, ShardOrder
from captioner.streaming.quality import first_shards, measure_mixing
from captioner.streaming.worker import (
    BatchMaker,
    Collate,
    Decode,
    Failed,
    Item,
    Made,
    RankSteps,
    Transform,
    end_with_training,
    field_decoder,
)

CACHE = "~/.cache/captioner/shards"
CACHE_GIGABYTES = 50.0
STATE_VERSION = 1
LAST_BATCHES = ("keep", "drop", "pad")
# Waited before workers are forked. After a collective a thread of gloo takes one of Python's locks to free its tensors;
# a worker that is forked at that moment waits for the lock forever (seen with Python 3.11).
WAIT_BEFORE_FORK_SECONDS = 0.1


class StreamingLoader:
    """Batches of samples from tar shards, for any training loop.

    Each sample comes once an epoch. The order is the same for any number of ranks and workers, and resume is exact.

        loader = StreamingLoader("data/shards", split="train", batch_size=256, transform=prepare, num_workers=8)
        while loader.epoch < 10:
            for batch in loader:
                ...

    `sources` is a dataset folder, a path or URL, or several. Without `weights` several are read as one. With `weights`,
    one for each, they are mixed: twice the weight gives twice as many samples, and a source that is exhausted starts
    over. An epoch of a mixture has `epoch_samples`, by default as many as all sources together.

    Order
        `batch_size` is the size of the global batch, that of one optimizer step of all ranks together; each of
        `world_size` ranks gets an equal slice of it. The order depends on `seed`, and `shuffle_shards` is the number of
        shards that all ranks together read from at once. With `shuffle=False`, for validation, samples come in the
        order of the shards, each iteration starts at the beginning, and only every `every`-th sample is read.
        `last_batch` says what to do with the last, shorter batch: "keep" it, although a rank may get no sample of it
        (`collate([])`); "drop" it; or "pad" it with the first samples of the epoch.
    Samples
        Each is a dictionary of bytes by extension (`jpg`, `json`, `seg.png`, …), with `__key__`, `__url__`,
        `__epoch__`, `__position__`, `__shard__` and `__index_in_shard__`. `fields` are the extensions to read, by
        default all. `decode` is webdataset's name for an image format ("pil", "torchrgb8", …), with which
        text, JSON, NumPy arrays and others are decoded too; or it is a function of a sample, which is called for the
        whole batch before the first `transform`: parse text in it, and decode images in `transform`.
        `transform(sample, rng)` returns anything; `rng` is a NumPy Generator, seeded like the global generators of
        torch, NumPy and Python by (seed, epoch, position). `collate(list)` returns a batch; by default it is torch's
        default_collate. Nothing is seeded if these functions have the attribute `is_random = False`, which saves some
        microseconds a sample.
    Processes
        `num_workers` processes make the batches, each `prefetch_batches` ahead. They start at the first iteration and
        live as long as the loader. `start_method` is "fork", "spawn" or "forkserver". With `pin_memory` batches are in
        page-locked memory. `rank` and `world_size` are by default those of torch.distributed, or else the launcher's
        RANK and WORLD_SIZE.
    Errors
        In each epoch, a rank skips up to `tolerate_bad_samples` samples that cannot be read or decoded, or for which
        `transform` raises SampleError, and counts them in `ledger`; one more raises. Any other exception in `transform`
        or `collate` is raised as TransformError. Arguments and states that do not fit raise StreamingError.
    Remote shards
        Shards behind URLs are downloaded to `cache`, a folder that all processes of a machine use, of at most
        `cache_gigabytes`.
    """

    def __init__(
        self,
        sources: str | Path | Sequence[str | Path] | Split,
        *,
        split: str = "train",
        batch_size: int,
        seed: int = 0,
        weights: Sequence[float] | None = None,
        epoch_samples: int | None = None,
        shuffle: bool = True,
        shuffle_shards: int = SHUFFLE_SHARDS,
        last_batch: str = "keep",
        every: int = 1,
        fields: Container[str] | None = None,
        decode: str | Decode | None = None,
        transform: Transform | None = None,
        collate: Collate | None = None,
        num_workers: int = 0,
        start_method: str | None = None,
        prefetch_batches: int = 2,
        pin_memory: bool = False,
        tolerate_bad_samples: int = 0,
        allow_new_weights: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
        cache: str | Path = CACHE,
        cache_gigabytes: float = CACHE_GIGABYTES,
    ) -> None:
        self.split = sources if isinstance(sources, Split) else read_sources(sources, split)
        check_filled(self.split)
        _check_at_least(1, batch_size=batch_size, every=every, shuffle_shards=shuffle_shards)
        _check_at_least(1, prefetch_batches=prefetch_batches)
        _check_at_least(0, num_workers=num_workers, tolerate_bad_samples=tolerate_bad_samples)
        if last_batch not in LAST_BATCHES:
            raise StreamingError(f"last_batch is {last_batch!r}: give one of {', '.join(LAST_BATCHES)}")
        if (rank is None) != (world_size is None):
            raise StreamingError("only one of rank and world_size is given: give both or neither")
        if epoch_samples is not None and weights is None:
            raise StreamingError(
                "epoch_samples is the length of a mixture's epoch: give weights too, [1] for one source"
            )
        if every > 1 and (shuffle or weights is not None):
            raise StreamingError("every is for shuffle=False without weights: a smaller validation split")
        self.batch_size, self.seed, self.shuffle, self.shuffle_shards = batch_size, seed, shuffle, shuffle_shards
        self.weights, self.epoch_samples, self.every = weights, epoch_samples, every
        self.last_batch, self.tolerate_bad_samples = last_batch, tolerate_bad_samples
        self.num_workers, self.pin_memory = num_workers, pin_memory
        self.ledger = Ledger()
        self._fields, self._transform, self._collate = fields, transform, collate
        # A function is called for the whole batch first, webdataset's decoders for each sample before its transform.
        self._parse = None if isinstance(decode, str) else decode
        self._decode = field_decoder(decode) if isinstance(decode, str) else None
        self._start_method, self._prefetch = start_method, prefetch_batches
        self._allow_new_weights, self._given_rank = allow_new_weights, (rank, world_size)
        self._cache = None
        if any(storage.is_remote(folder) for folder in self.split.folders):
            self._cache = ShardCache(str(cache), max_bytes=int(cache_gigabytes * 1e9))
        self._since: Since | None = None
        self._epoch = self._steps = 0
        self._loaded = False  # whether a state was loaded since the last iteration
        self._iteration = 0  # number of the only valid iterator
        self._begun = False  # whether that iterator has been asked for a batch
        self._padded = 0
        self._rank_steps: RankSteps | None = None
        self._workers: _Workers | None = None
        self.order = self._make_order(weights)

    def _make_order(self, weights: Sequence[float] | None) -> ShardOrder | MixtureOrder:
        return make_order(
            self.split, weights=weights, seed=self.seed, batch_size=self.batch_size, every=self.every,
            shuffle_shards=self.shuffle_shards, shuffle=self.shuffle, epoch_samples=self.epoch_samples,
            since=self._since,
        )  # fmt: skip

    # ---- ranks --------------------------------------------------------------------------------------------

    @property
    def rank(self) -> int:
        """This process's number among those that get a slice of each batch."""
        return self._resolve().rank

    @property
    def world_size(self) -> int:
        """How many processes get a slice of each batch."""
        return self._resolve().world_size

    def _resolve(self) -> RankSteps:
        """This rank's steps. Raises StreamingError if the arguments do not fit, or the rank has changed."""
        rank, world_size = resolve_rank(*self._given_rank)
        if self.batch_size % world_size:
            raise StreamingError(
                f"batch_size {self.batch_size} is that of all ranks together: give a multiple of {world_size}"
            )
        steps = replace(self._steps_of_one_rank(), rank=rank, world_size=world_size)
        if self._rank_steps is None:
            if not steps.num_steps:
                raise StreamingError(
                    f"{steps.num_samples:,} samples make no batch of {self.batch_size:,}: give a smaller batch_size or "
                    "another last_batch"
                )
            last_slices = [replace(steps, rank=each).positions(steps.num_steps - 1) for each in range(world_size)]
            if self._collate is None and not all(last_slices):
                raise StreamingError(
                    f"the last batch is too short for all of {world_size} ranks, and torch's default_collate takes no "
                    'empty list: give last_batch="pad" or "drop", or a collate that does'
                )
            self._rank_steps = steps
        if steps != self._rank_steps:
            before = self._rank_steps
            raise StreamingError(
                f"this process was rank {before.rank} of {before.world_size} and is rank {rank} of "
                f"{world_size}: start torch.distributed before the loader's first use, or give rank and world_size"
            )
        return steps

    def _steps_of_one_rank(self) -> RankSteps:
        """The steps of an epoch as a single rank would see them, for use before the world size is known."""
        return RankSteps(
            num_samples=self.order.num_samples, batch_size=self.batch_size, rank=0, world_size=1,
            last_batch=self.last_batch,
        )  # fmt: skip

    # ---- state --------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """The epoch of the next batch, from 0. It advances when an iteration ends."""
        return self._epoch

    @property
    def steps_done(self) -> int:
        """The number of batches of the epoch that were taken, including those before a resume."""
        return self._steps

    @property
    def num_padded(self) -> int:
        """The number of samples at the end of the latest batch that repeat the first ones of the epoch."""
        return self._padded

    def __len__(self) -> int:
        """The number of steps in a whole epoch, the same on every rank."""
        return self._resolve().num_steps

    @property
    def sampler(self) -> "StreamingLoader":
        """The loader itself: at the start of an epoch Lightning calls only the `set_epoch` of a sampler."""
        return self

    batch_sampler = None  # Lightning reads this attribute too

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch; does nothing if the loader is in that epoch."""
        if epoch != self._epoch:
            self._go_to(epoch, 0)

    def state_dict(self, steps: int | None = None) -> dict[str, Any]:
        """The state after the batches that were taken, or after `steps` steps of the epoch, as JSON values.

        It is the same on every rank. A loop that takes batches before it uses them must give `steps`; if more were used
        than were taken in this epoch, they are steps of the previous epoch. Raises StreamingError for steps that were
        not taken.
        """
        epoch, steps = self._epoch, self._steps if steps is None else steps
        if steps > self._steps:  # the loop took the epoch's last batch before it used it
            epoch -= 1
        if epoch < 0 or not 0 <= steps <= self._steps_of_one_rank().num_steps:
            raise StreamingError(f"steps is {steps}, and {self._steps} of epoch {self._epoch} were taken")
        position = min(steps * self.batch_size, self.order.num_samples)
        state = {**self._identity(), "epoch": epoch, "position": position}
        if isinstance(self.order, MixtureOrder):
            since = self._since
            state |= {"parts": list(self.order.parts), "since": [since.position, *since.counts] if since else None}
        return state

    def _identity(self) -> dict[str, Any]:
        """The part of a state that must be the loader's own when it is loaded."""
        return {
            "version": STATE_VERSION, "fingerprint": self.split.fingerprint, "num_samples": self.order.num_samples,
            "seed": self.seed, "batch_size": self.batch_size, "shuffle_shards": self.shuffle_shards,
            "shuffle": self.shuffle, "every": self.every,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state, on any number of ranks and workers; the end of an epoch is the start of the next one.

        Seed, batch size and shuffle_shards may be changed at the start of an epoch, for a mixture only at the start of
        the run. New weights need `allow_new_weights`. Raises StreamingError for a state of other data or another order.
        """
        try:
            epoch, position = int(state["epoch"]), int(state["position"])
            stored = {name: state[name] for name in self._identity()}
        except (KeyError, TypeError, ValueError) as error:
            raise StreamingError(f"this is not the state of a StreamingLoader ({error!r})") from error
        if position >= min(stored["num_samples"], self._steps_of_one_rank().num_steps * stored["batch_size"]):
            epoch, position = epoch + 1, 0
        at_start = position == 0 and (self.weights is None or epoch == 0)
        may_differ = {"seed", "batch_size", "shuffle_shards"} if at_start else set()
        differing = [
            f"{name} was {stored[name]}, is {value}"
            for name, value in self._identity().items()
            if stored[name] != value and name not in may_differ
        ]
        if differing:
            raise StreamingError(
                f"the state is of other data or of another order ({'; '.join(differing)}): give what it was made with"
            )
        if isinstance(self.order, MixtureOrder):
            self._load_weights(state, epoch * self.order.num_samples + position)
        elif "parts" in state:
            raise StreamingError("the state is of a mixture: give its weights")
        self._go_to(epoch, position // self.batch_size)
        self._loaded = True

    def _load_weights(self, state: dict[str, Any], position: int) -> None:
        """Load a mixture's history from a state; if its weights were different, the new ones apply from `position`."""
        assert isinstance(self.order, MixtureOrder)
        if "parts" not in state:
            raise StreamingError("the state is not of a mixture: leave out weights")
        parts, since, before = state["parts"], state["since"], self.order.since
        self._since = Since(since[0], tuple(since[1:])) if since else None
        if parts != list(self.order.parts):
            if not self._allow_new_weights:
                raise StreamingError(
                    f"the state's weights are {parts}, the loader's are {list(self.order.parts)}: give the former, or "
                    "allow_new_weights=True to use the latter from here on"
                )
            earlier = self._make_order(parts)
            assert isinstance(earlier, MixtureOrder)
            self._since = Since(position, earlier.counts(position))
        order = self._make_order(self.weights)
        assert isinstance(order, MixtureOrder)
        if order.since != before:
            self.order = order
            self.close()

    def _go_to(self, epoch: int, steps: int) -> None:
        """Move to a step. An iterator becomes invalid unless it is still at its beginning: that one starts there."""
        self._epoch, self._steps, self._iteration = epoch, steps, self._iteration + self._begun
        self._loaded = False

    # ---- batches ------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Any]:
        """This rank's batches from the current state to the end of the epoch.

        After a `break` the next iteration continues after the last batch that was taken. A new iterator invalidates the
        older ones.
        """
        steps = self._resolve()
        if not self.shuffle and not self._loaded:
            self._steps = 0
        if self._steps >= steps.num_steps:  # a loop stopped at the last batch, before the iteration ended
            self._epoch, self._steps = self._epoch + 1, 0
        self._loaded = self._begun = False
        self._iteration += 1
        self.ledger = Ledger()
        return self._iterate(steps, self._iteration)

    def _iterate(self, steps: RankSteps, iteration: int) -> Iterator[Any]:
        self._check_valid(iteration)
        self._begun, self._loaded = True, False
        epoch, first = self._epoch, self._steps
        if self._workers is None:
            self._workers = self._start_workers(steps)
        made = self._workers.batches(Item(epoch, step) for step in range(first, steps.num_steps))
        if self.pin_memory and torch.accelerator.is_available():
            made = pinned_ahead(made, partial(_pin, device_index=torch.accelerator.current_device_index()))
        for step, each in enumerate(made, start=first):
            self._check_valid(iteration)
            self._count(each, steps, step)
            yield each.batch
            self._check_valid(iteration)
        if self._steps < steps.num_steps:
            raise RuntimeError(f"the workers ended before step {self._steps} of the epoch")
        self._epoch, self._steps = epoch + 1, 0

    def _check_valid(self, iteration: int) -> None:
        if iteration != self._iteration:
            raise RuntimeError("a newer iterator or a loaded state has made this one invalid: use a new iterator")

    def _count(self, made: Made, steps: RankSteps, step: int) -> None:
        """Count a batch as taken. Raises TooManyBadSamplesError."""
        self.ledger.count(made.positions, made.skipped, planned=steps.positions(step), num_samples=steps.num_samples)
        if len(self.ledger.skipped) > self.tolerate_bad_samples:
            raise TooManyBadSamplesError(
                len(self.ledger.skipped), self.tolerate_bad_samples, self.ledger.skipped[-1].message
            )
        self._steps = step + 1
        if self._steps == steps.num_steps and steps.rank == 0:
            self.ledger.dropped += steps.num_dropped
        self._padded = 0
        if made.positions and made.positions[-1] >= steps.num_samples:
            self._padded = sum(position >= steps.num_samples for position in made.positions)

    def _start_workers(self, steps: RankSteps) -> "_Workers":
        buffers = Buffers(num_workers=self.num_workers, count=self._prefetch + 2)
        maker = BatchMaker(
            self.split, self.order, steps, seed=self.seed, fields=self._fields, parse=self._parse,
            decode=self._decode, transform=self._transform, collate=self._collate or default_collate,
            is_random=any(map(_is_random, (self._transform, self._collate))), cache=self._cache,
            tolerant=self.tolerate_bad_samples > 0, taken=buffers.taken, num_buffers=self._prefetch + 2,
        )  # fmt: skip
        return _Workers(maker, buffers, self.num_workers, start_method=self._start_method, prefetch=self._prefetch)

    def close(self) -> None:
        """End the workers; the next iteration starts new ones."""
        self._iteration += 1
        if self._workers is not None:
            self._workers.close()
            self._workers = None

    # ---- before anything is read --------------------------------------------------------------------------

    def describe(self) -> str:
        """A text of several lines: what an epoch reads, from which sources, and how well it is shuffled."""
        steps, order, shards = self._resolve(), self.order, self.split.shards
        shard_bytes = [entry.bytes for _, entry in shards]
        last = steps.num_samples - (steps.num_steps - 1) * self.batch_size
        last_batches = {
            "keep": f"the last of {min(last, self.batch_size):,}",
            "pad": f"the last padded with {self.batch_size - last:,} of the first samples",
            "drop": f"{steps.num_dropped:,} samples dropped",
        }
        lines = [
            f"{self.split.num_samples:,} samples in {len(shards):,} shards, {sum(shard_bytes) / 1e9:,.2f} GB",
            f"{steps.num_steps:,} steps of {self.batch_size:,} samples, {last_batches[self.last_batch]}; "
            f"{self.batch_size // steps.world_size:,} of each batch for each of {steps.world_size:,} ranks",
        ]
        if isinstance(order, MixtureOrder):
            source_bytes = [sum(entry.bytes for entry in manifest.shards) for manifest in self.split.manifests]
            read_bytes = sum(size * min(1, passes) for size, passes in zip(source_bytes, order.passes(), strict=True))
            first_source = order.orders[0].of_epoch(0)
            lines += [
                f"weights, as fractions of the samples: {order}",
                f"each source is one lane with windows of {first_source.window_shards:,} shards",
                f"rank {steps.rank} reads from the shards of all sources, about {read_bytes / 1e9:,.2f} GB an epoch",
            ]
        else:
            epoch_order = order.of_epoch(self._epoch)
            own = epoch_order.shards_of_rank(steps.rank, world_size=steps.world_size)
            own_bytes = sum(shard_bytes[shard] for shard in own)
            if self.shuffle:
                lines += [f"{epoch_order.num_lanes:,} lanes with windows of {epoch_order.window_shards:,} shards"]
            lines += [f"rank {steps.rank} reads from {len(own):,} shards, {own_bytes / 1e9:,.2f} GB"]
        first = first_shards(
            order, [position % order.num_samples for position in steps.positions(0)], epoch=self._epoch
        )
        first_bytes = sum(shard_bytes[shard] for shard in first)
        lines += [f"before the first step this rank opens {len(first):,} shards, {first_bytes / 1e9:,.2f} GB"]
        if self.shuffle:
            lines += [f"mixing: {measure_mixing(order, batch_size=self.batch_size, epoch=self._epoch)}"]
        return "\n".join(lines)


# ---- processes --------------------------------------------------------------------------------------------


def _is_random(function: Callable[..., Any] | None) -> bool:
    """Whether a function needs seeded random numbers: it is given and has no attribute `is_random = False`."""
    return function is not None and getattr(function, "is_random", True)


class _Workers:
    """The worker processes, or the training process itself if there are none. They end when this is closed or freed."""

    def __init__(
        self, maker: BatchMaker, buffers: Buffers, num_workers: int, *, start_method: str | None, prefetch: int
    ) -> None:
        self._maker, self._buffers = maker, buffers
        weakref.finalize(self, maker.close)
        self._items = _Items()
        self._loader: DataLoader[Any] | None = None
        self._end: Callable[[], None] | None = None
        if num_workers:
            is_over = torch.zeros(1, dtype=torch.uint8).share_memory_()
            self._end = partial(is_over.numpy().__setitem__, 0, 1)
            weakref.finalize(self, self._end)
            self._loader = DataLoader(
                self._maker, batch_size=None, sampler=self._items, num_workers=num_workers, prefetch_factor=prefetch,
                persistent_workers=True, worker_init_fn=partial(end_with_training, os.getpid(), is_over),
                multiprocessing_context=start_method or ("fork" if sys.platform == "linux" else None),
                generator=torch.Generator(),  # otherwise the DataLoader draws from the global one
            )  # fmt: skip
            self._started = False

    def batches(self, items: Iterable[Item]) -> Iterator[Made]:
        """The batches of the items, in their order. Raises a worker's error."""
        if self._loader is None:
            results: Iterable[Made | Failed] = map(self._maker.__getitem__, items)
        else:
            self._items.current = items
            results = self._start()
        for made in results:
            if isinstance(made, Failed):
                raise made.error from (RuntimeError(made.trace) if isinstance(made.error, TransformError) else None)
            yield replace(made, batch=self._buffers.open(made.batch)) if made.in_buffers else made

    def _start(self) -> Iterator[Made | Failed]:
        """The DataLoader's iterator; the first call starts its processes."""
        assert self._loader is not None
        assert self._end is not None
        if self._started:
            return iter(self._loader)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            time.sleep(WAIT_BEFORE_FORK_SECONDS)
        try:
            results = iter(self._loader)
        except (AttributeError, TypeError, pickle.PicklingError) as error:
            raise StreamingError(
                f"decode, transform or collate cannot be pickled for the workers ({error}): define them at the "
                "top of a module"
            ) from error
        atexit.register(self._end)  # runs before torch's own handler, which waits for each worker
        self._started = True
        return results

    def close(self) -> None:
        """End the worker processes."""
        self._maker.close()
        if self._end is not None:
            self._end()
            atexit.unregister(self._end)
        self._loader = None


class _Items(Sampler[Item]):
    """A sampler whose items are set before each iteration; workers get them in this order."""

    current: Iterable[Item] = ()

    def __iter__(self) -> Iterator[Item]:
        return iter(self.current)


def pinned_ahead(batches: Iterable[Made], pin: Callable[[Made], Made]) -> Iterator[Made]:
    """The copies that `pin` makes of the batches, in order; a thread copies each while the previous one is used.

    The buffer of a copied batch can be filled again. An exception of `batches` or `pin` is raised after the batches
    before it. The thread ends with the iterator.
    """
    copies: deque[Future[Made]] = deque()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="pin") as thread:
        for copy in _submit_each(batches, partial(thread.submit, pin)):
            copies.append(copy)
            if len(copies) > 1:
                yield copies.popleft().result()
        while copies:
            yield copies.popleft().result()


def _submit_each(batches: Iterable[Made], submit: Callable[[Made], Future[Made]]) -> Iterator[Future[Made]]:
    try:
        yield from map(submit, batches)
    except Exception as error:  # to be raised after the batches before it
        failed: Future[Made] = Future()
        failed.set_exception(error)
        yield failed


def _pin(made: Made, *, device_index: int) -> Made:
    torch.accelerator.set_device_index(device_index)  # a new thread is on device 0
    return replace(made, batch=pinned(made.batch))


# ---- arguments --------------------------------------------------------------------------------------------


def read_sources(sources: str | Path | Sequence[str | Path], split: str) -> Split:
    """The manifests of a split in one or several folders. Raises StreamingError and UserError."""
    folders = [sources] if isinstance(sources, str | Path) else list(sources)
    return read_split([str(folder) for folder in folders], split)


def resolve_rank(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Rank and world size: as given, else from torch.distributed, else from the launcher, else 0 and 1.

    Raises StreamingError if torch.distributed and the launcher disagree.
    """
    if rank is not None and world_size is not None:
        if not 0 <= rank < world_size:
            raise StreamingError(f"rank {rank} is not between 0 and {world_size - 1}")
        return rank, world_size
    launched = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    try:
        of_launcher = None if None in launched else (int(launched[0] or 0), int(launched[1] or 1))
    except ValueError as error:
        raise StreamingError(f"RANK and WORLD_SIZE are {launched[0]!r} and {launched[1]!r}: set numbers") from error
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        of_group = torch.distributed.get_rank(), torch.distributed.get_world_size()
        if of_launcher not in (None, of_group):
            raise StreamingError(
                f"torch.distributed says rank {of_group[0]} of {of_group[1]}, RANK and WORLD_SIZE say "
                f"{launched[0]} of {launched[1]}: give rank and world_size"
            )
        return of_group
    return of_launcher or (0, 1)


def _check_at_least(least: int, **given: int) -> None:
    for name, value in given.items():
        if value < least:
            raise StreamingError(f"{name} is {value}: give {least} or more")
