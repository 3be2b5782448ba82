"""A loader's worker: reads the samples of a batch, decodes and transforms each, and collates them.

A batch is a function of its epoch and step. So a worker has no state: it lives as long as its loader, and can make any
batch at any time.
"""

import copy
import multiprocessing
import os
import pickle
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from multiprocessing.reduction import ForkingPickler
from threading import Thread
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info
from webdataset.autodecode import Decoder, DecodingError, gzfilter, imagehandler, imagespecs

from captioner.errors import StreamingError, TransformError, UserError
from captioner.files import storage
from captioner.shards.format import INDEX
from captioner.shards.splitmix import random_bits
from captioner.streaming.buffers import WorkerBuffers
from captioner.streaming.cache import Prefetcher, ShardCache
from captioner.streaming.dataset import Split
from captioner.streaming.ledger import Skip
from captioner.streaming.mixture import MixtureOrder
from captioner.streaming.order import SAMPLE_RNG, SampleRef, ShardOrder, rank_positions
from captioner.streaming.reader import SampleError, ShardReader

MAX_OPEN_FILES = 400  # of a process; the usual limit of a system is 1,024
BATCHES_LOOKED_UP = 8  # at once
PREFETCHED_SHARDS = 8  # per process
POLL_SECONDS = 0.2  # between a worker's looks at the training process
MAX_SEED = (1 << 63) - 1  # of torch
PICKLES = (".pkl", ".pickle", ".pyd", ".pth")

Order = ShardOrder | MixtureOrder
Sample = dict[str, Any]
Decode = Callable[[Sample], Sample]
Transform = Callable[[Any, np.random.Generator], Any]
Collate = Callable[[list[Any]], Any]


class Item(NamedTuple):
    """Which batch to make: the rank's slice of the global batch of this epoch and step."""

    epoch: int
    step: int


@dataclass(frozen=True, slots=True)
class Made:
    """A batch from a worker, the positions of its samples, and the skipped samples.

    `in_buffers` says that some of its tensors are Slots of shared memory (`captioner/streaming/buffers.py`).
    """

    batch: Any
    positions: list[int]
    skipped: list[Skip]
    in_buffers: bool


@dataclass(frozen=True, slots=True)
class Failed:
    """An error that a worker returns instead of a batch, and its traceback."""

    error: Exception
    trace: str


@dataclass(frozen=True, kw_only=True)
class RankSteps:
    """The steps of an epoch, and the positions of a rank's samples in each."""

    num_samples: int
    batch_size: int
    rank: int
    world_size: int
    last_batch: str

    @property
    def num_steps(self) -> int:
        """The number of steps in an epoch, the same on every rank."""
        full, rest = divmod(self.num_samples, self.batch_size)
        return full + (rest > 0 and self.last_batch != "drop")

    @property
    def num_dropped(self) -> int:
        """The number of samples that are in no step."""
        return max(0, self.num_samples - self.num_steps * self.batch_size)

    def positions(self, step: int) -> range:
        """This rank's positions of a step; those from `num_samples` on repeat the first samples of the epoch."""
        num_samples = self.num_samples
        if self.last_batch == "pad":
            num_samples = self.num_steps * self.batch_size
        return rank_positions(
            step, num_samples=num_samples, global_batch=self.batch_size, rank=self.rank, world_size=self.world_size
        )


class BatchMaker(Dataset[Made | Failed]):
    """A dataset whose items are batches, made in a worker, or in the training process if there are no workers.

    `parse` is called for all samples of a batch before `decode` and `transform` are called for the first. `taken` are
    the flags of all workers' shared buffers, of which each worker has `num_buffers`.
    """

    def __init__(
        self,
        split: Split,
        order: Order,
        steps: RankSteps,
        *,
        seed: int,
        fields: Container[str] | None,
        parse: Decode | None,
        decode: Decode | None,
        transform: Transform | None,
        collate: Collate,
        is_random: bool,
        cache: ShardCache | None,
        tolerant: bool,
        taken: Tensor,
        num_buffers: int,
    ) -> None:
        self.split, self.order, self.steps, self.seed = split, order, steps, seed
        self.fields, self.parse, self.decode = fields, parse, decode
        self.transform, self.collate = transform, collate
        self.cache, self.tolerant = cache, tolerant
        self.taken, self.num_buffers = taken, num_buffers
        self.is_random = is_random
        self._was_pickled = False
        self._refs: dict[Item, list[SampleRef]] = {}
        self._next_item: Item | None = None
        self._reader: ShardReader | None = None
        self._prefetcher: Prefetcher | None = None

    def __getitem__(self, item: Item) -> Made | Failed:  # type: ignore[override]
        if get_worker_info() is None:
            return self._make(item)
        try:
            made = self._make(item)
            if not self._was_pickled:  # if torch cannot pickle a batch, it prints the error and waits forever
                ForkingPickler.dumps(made)
                self._was_pickled = True
            return made
        except Exception as error:
            return Failed(picklable(error), traceback.format_exc())

    def close(self) -> None:
        """Close the shards and stop prefetching; the next batch opens them again."""
        for resource in (self._prefetcher, self._reader):
            if resource is not None:
                resource.close()
        self._reader = self._prefetcher = None

    @cached_property
    def own_buffers(self) -> WorkerBuffers:
        """The buffers of this process."""
        worker = get_worker_info()
        return WorkerBuffers(self.taken, first=worker.id * self.num_buffers if worker else 0, count=self.num_buffers)

    @cached_property
    def randomness(self) -> "Randomness":
        """The random numbers of this process's samples."""
        return Randomness()

    # ---- one batch ----------------------------------------------------------------------------------------

    def _make(self, item: Item) -> Made:
        positions = self.steps.positions(item.step)
        skipped: list[Skip] = []
        # Reads and parses all samples before it transforms the first, because decoding an image evicts the code of both
        # from the processor's caches.
        samples, values = self._read(item, positions, skipped)
        used = [sample["__position__"] for sample in samples]
        seeded = positions if self.transform is not None else positions[:1]
        seeding = self.randomness.batch(self.seed, item.epoch, seeded) if self.is_random else nullcontext()
        with self.own_buffers.in_use(), seeding:
            if self.decode is not None or self.transform is not None:
                values, used = self._transform_all(samples, values, skipped)
            batch, in_buffers = self.own_buffers.give(self._collate_all(values, item, positions))
        return Made(batch, used, skipped, in_buffers)

    def _read(self, item: Item, positions: range, skipped: list[Skip]) -> tuple[list[Sample], list[Any]]:
        """The samples of a batch as they are stored, and as `parse` returns them; bad ones are added to `skipped`."""
        reader, epoch = self._reader_for(item), item.epoch
        with_index = self.fields is not None and INDEX in self.fields
        samples: list[Sample] = []
        parsed: list[Any] = []
        for position, (_, shard, index) in zip(positions, self._look_up(item), strict=True):
            try:
                key, content = reader.read(shard, index)
                sample: Sample = {
                    "__key__": key, "__url__": reader.location(shard), "__epoch__": epoch, "__position__": position,
                    "__shard__": shard, "__index_in_shard__": index, **content,
                }  # fmt: skip
                if with_index:
                    sample[INDEX] = reader.index_of(shard)
                parsed.append(sample if self.parse is None else decoded_by(self.parse, sample))
            except SampleError as error:
                skipped.append(self._skip(position, error))
            else:
                samples.append(sample)
        return samples, parsed

    def _look_up(self, item: Item) -> list[SampleRef]:
        """The references of a batch's samples, looked up together with those of this process's next batches."""
        if item not in self._refs:
            stride = worker.num_workers if (worker := get_worker_info()) else 1
            steps = range(item.step, self.steps.num_steps, stride)[:BATCHES_LOOKED_UP]
            ranges = [self.steps.positions(step) for step in steps]
            positions = np.concatenate([np.arange(each.start, each.stop) for each in ranges]) % self.order.num_samples
            refs = iter(self.order.refs(item.epoch, positions.tolist()))
            self._refs = {
                Item(item.epoch, step): list(islice(refs, len(each))) for step, each in zip(steps, ranges, strict=True)
            }
        return self._refs.pop(item)

    def _transform_all(
        self, samples: list[Sample], parsed: list[Any], skipped: list[Skip]
    ) -> tuple[list[Any], list[int]]:
        """The transformed samples and their positions; bad ones are added to `skipped`."""
        values: list[Any] = []
        used: list[int] = []
        for sample, each in zip(samples, parsed, strict=True):
            try:
                values.append(self._transform_one(sample, each))
            except SampleError as error:
                skipped.append(self._skip(sample["__position__"], error))
            else:
                used.append(sample["__position__"])
        return values, used

    def _transform_one(self, sample: Sample, parsed: Any) -> Any:
        """What `decode` and `transform` return for a parsed sample. Raises SampleError and TransformError."""
        decoded = parsed if self.decode is None else decoded_by(self.decode, parsed)
        if self.transform is None:
            return decoded
        try:
            randomness = self.randomness
            rng = randomness.start(sample["__position__"]) if self.is_random else randomness.generator
            return self.transform(decoded, rng)
        except UserError:
            raise
        except Exception as error:
            where = {name: sample[f"__{name}__"] for name in ("key", "url", "epoch", "position")}
            remedy = "; if the sample cannot be used, raise SampleError instead" if self.tolerant else ""
            raise TransformError("transform", error_line(error) + remedy, where) from error

    def _collate_all(self, samples: list[Any], item: Item, positions: range) -> Any:
        """What `collate` returns. Raises TransformError."""
        try:
            if self.is_random and positions:
                self.randomness.start(positions.start, stream=1)
            return self.collate(samples)
        except UserError:
            raise
        except Exception as error:
            where = {"epoch": item.epoch, "positions": positions}
            raise TransformError("collate", error_line(error), where) from error

    def _skip(self, position: int, error: SampleError) -> Skip:
        """The record of a bad sample; raises SampleError if none is tolerated."""
        if not self.tolerant:
            remedy = "or skip up to N such samples with tolerate_bad_samples=N"
            raise SampleError(error.reason, f"{error.message}; {remedy}") from error
        return Skip(position, error.reason, error.message)

    # ---- its shards ---------------------------------------------------------------------------------------

    def _reader_for(self, item: Item) -> ShardReader:
        """The open reader. If the batch does not follow the previous one, prefetching restarts from its shards."""
        worker = get_worker_info()
        stride = worker.num_workers if worker else 1
        is_next, self._next_item = item == self._next_item, Item(item.epoch, item.step + stride)
        if self._reader is None or (self.cache is not None and not is_next):
            self.close()
            max_open = min(MAX_OPEN_FILES, self.order.open_shards(self.steps.world_size))
            if self.cache is not None:
                order = copy.deepcopy(self.order)  # it is used by the prefetcher's threads
                shards = (self.split.shards[shard] for shard in self._shards_from(order, item, stride))
                remote = (shard for shard in shards if storage.is_remote(shard[0]))
                self._prefetcher = Prefetcher(self.cache, remote, ahead=PREFETCHED_SHARDS)
            self._reader = ShardReader(
                self.split.shards, max_open=max_open, cache=self.cache, prefetcher=self._prefetcher, fields=self.fields
            )
        return self._reader

    def _shards_from(self, order: Order, item: Item, stride: int) -> Iterator[int]:
        """This process's shards from a batch to the end of the epoch, each once, in the order of first use."""
        known: set[int] = set()
        for step in range(item.step, self.steps.num_steps, stride):
            positions = [position % order.num_samples for position in self.steps.positions(step)]
            for ref in order.refs(item.epoch, positions):
                if ref.shard not in known:
                    known.add(ref.shard)
                    yield ref.shard


def root_cause(error: BaseException) -> BaseException:
    """The first exception of a chain."""
    return error if error.__cause__ is None else root_cause(error.__cause__)


def picklable(error: Exception) -> Exception:
    """The error, or a RuntimeError with its text if it cannot be pickled and unpickled."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:  # the class may be the user's
        return RuntimeError(error_line(error))


def error_line(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {error}".rstrip(": ")


# ---- decoding -----------------------------------------------------------------------------------------------


def decoded_by(decode: Decode, sample: Sample) -> Sample:
    """The decoded sample. Raises SampleError, whatever `decode` raises."""
    try:
        return decode(sample)
    except UserError:
        raise
    except Exception as error:
        field = f" (.{error.k})" if isinstance(error, DecodingError) else ""
        where, reason = f"sample {sample['__key__']} of {sample['__url__']}", error_line(root_cause(error))
        raise SampleError("undecodable", f"{where} cannot be decoded{field}: {reason}") from error


def field_decoder(name: str) -> Decode:
    """webdataset's decoder of a sample's fields; `name` is that of the image format ("pil", "torchrgb8", …).

    Pickles stay bytes, because loading one can run any code. Raises StreamingError.
    """
    if name not in imagespecs:
        raise StreamingError(f"there is no decoder {name!r}: choose one of {', '.join(sorted(imagespecs))}")
    return Decoder([imagehandler(name)], pre=[gzfilter, leave_pickles])


def leave_pickles(key: str, data: bytes) -> bytes | None:
    """A webdataset handler that returns pickles as bytes, and None for other fields: the next handler decodes those."""
    return data if key.lower().endswith(PICKLES) else None


# ---- random numbers ---------------------------------------------------------------------------------------


class Randomness:
    """Seeds the random numbers of each sample, as a function of (seed, epoch, position).

    One generator is used for all samples, also as NumPy's global generator; those of torch and Python are seeded too.
    Seeding takes a few microseconds, new generators would take far longer.
    """

    def __init__(self) -> None:
        self._philox = np.random.Philox(key=0)
        self._state = self._philox.state
        self.generator = np.random.Generator(self._philox)
        self._bits: dict[int, int] = {}

    @contextmanager
    def batch(self, seed: int, epoch: int, positions: range) -> Iterator[None]:
        """Compute the seeds of a batch. In the training process the global generators are restored at the end."""
        self._bits = dict(
            zip(positions, random_bits(np.asarray(positions), seed, epoch, SAMPLE_RNG).tolist(), strict=True)
        )
        if get_worker_info() is not None:
            np.random.set_bit_generator(self._philox)
            yield
            return
        numpys, torchs, pythons = np.random.get_bit_generator(), torch.get_rng_state(), random.getstate()
        np.random.set_bit_generator(self._philox)
        try:
            yield
        finally:
            np.random.set_bit_generator(numpys)
            torch.set_rng_state(torchs)
            random.setstate(pythons)

    def start(self, position: int, *, stream: int = 0) -> np.random.Generator:
        """Seed all generators for a sample of the batch, and return NumPy's.

        `collate` has its own `stream`, 1, at the position of the batch's first sample.
        """
        bits, state = self._bits[position], self._state
        state["state"]["key"][0], state["state"]["key"][1] = bits, stream
        self._philox.state = state
        random.seed(bits + stream)
        torch.default_generator.manual_seed((bits + stream) & MAX_SEED)
        return self.generator


# ---- end of a worker --------------------------------------------------------------------------------------


def end_with_training(training_pid: int, is_over: Any, _worker: int) -> None:
    """Start a thread that ends this worker when training no longer needs it, even if the worker is blocked.

    It ends when the training process does or sends SIGTERM, and when the flag `is_over[0]` is set. SIGTERM from others
    is ignored: launchers and schedulers send it to all processes, and training needs batches until it has saved.
    """
    if sys.platform == "linux":  # other systems do not report a signal's sender
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a library's thread may not block it
    Thread(target=_wait_and_exit, args=(training_pid, is_over), daemon=True).start()


def _wait_and_exit(training_pid: int, is_over: Any) -> None:
    parent = multiprocessing.parent_process()
    while parent is not None and parent.is_alive() and not is_over[0]:
        if sys.platform != "linux":
            time.sleep(POLL_SECONDS)
        elif (received := signal.sigtimedwait({signal.SIGTERM}, POLL_SECONDS)) and received.si_pid == training_pid:
            break
    os._exit(0)
