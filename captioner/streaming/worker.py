"""A loader's worker: reads the samples of a batch, decodes and transforms each, and collates them.

A batch is a function of its epoch and step. So a worker has no state, lives as long as its loader, and can make any
batch next.
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
from captioner.shards.splitmix import random_bits
from captioner.streaming.buffers import WorkerBuffers
from captioner.streaming.cache import Prefetcher, ShardCache
from captioner.streaming.dataset import Split
from captioner.streaming.ledger import Skip
from captioner.streaming.mixture import MixtureOrder
from captioner.streaming.order import SAMPLE_RNG, SampleRef, ShardOrder, rank_positions
from captioner.streaming.reader import SampleError, ShardReader

MAX_OPEN_FILES = 400  # of a process; systems allow 1,024
BATCHES_FOUND = 8  # whose samples are looked up with one call
FETCHED_SHARDS = 8  # that a process downloads ahead
FOLLOW_SECONDS = 0.2  # within which a worker ends after the training process
MAX_SEED = (1 << 63) - 1  # of torch
PICKLES = (".pkl", ".pickle", ".pyd", ".pth")

Order = ShardOrder | MixtureOrder
Sample = dict[str, Any]
Decode = Callable[[Sample], Sample]
Transform = Callable[[Any, np.random.Generator], Any]
Collate = Callable[[list[Any]], Any]


class Item(NamedTuple):
    """A batch to make: the rank's slice of the global batch of this epoch and step."""

    epoch: int
    step: int


@dataclass(frozen=True, slots=True)
class Made:
    """A batch from a worker, with the positions of its samples, and those that were skipped."""

    batch: Any
    positions: list[int]
    skipped: list[Skip]
    in_buffers: bool


@dataclass(frozen=True, slots=True)
class Failed:
    """The error because of which there is no batch, and its traceback."""

    error: Exception
    trace: str


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The positions of a rank's steps in an epoch."""

    num_samples: int
    batch_size: int
    rank: int
    world_size: int
    last_batch: str

    @property
    def num_steps(self) -> int:
        """How many steps an epoch has, the same on every rank."""
        full, rest = divmod(self.num_samples, self.batch_size)
        return full + (rest > 0 and self.last_batch != "drop")

    @property
    def num_dropped(self) -> int:
        """How many samples are in no step."""
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
    """Makes the batch of an `Item`, in a worker, or in the training process if there are no workers."""

    def __init__(
        self,
        split: Split,
        order: Order,
        parts: Parts,
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
        buffers: int,
    ) -> None:
        self.split, self.order, self.parts, self.seed = split, order, parts, seed
        self.fields, self.parse, self.decode = fields, parse, decode
        self.transform, self.collate = transform, collate
        self.cache, self.tolerant = cache, tolerant
        self.taken, self.buffers = taken, buffers
        self.is_random = is_random
        self._sent = False
        self._found: dict[Item, list[SampleRef]] = {}
        self._expected: Item | None = None
        self._reader: ShardReader | None = None
        self._prefetcher: Prefetcher | None = None

    def __getitem__(self, item: Item) -> Made | Failed:  # type: ignore[override]
        if get_worker_info() is None:
            return self._make(item)
        try:
            made = self._make(item)
            if not self._sent:  # else torch would only print the error, and its loader wait forever
                ForkingPickler.dumps(made)
                self._sent = True
            return made
        except Exception as error:
            return Failed(as_sent(error), traceback.format_exc())

    def close(self) -> None:
        """Close the shards and stop prefetching; the next batch opens them again."""
        for opened in (self._prefetcher, self._reader):
            if opened is not None:
                opened.close()
        self._reader = self._prefetcher = None

    @cached_property
    def own_buffers(self) -> WorkerBuffers:
        """The buffers of this process."""
        worker = get_worker_info()
        return WorkerBuffers(self.taken, first=worker.id * self.buffers if worker else 0, count=self.buffers)

    @cached_property
    def randomness(self) -> "Randomness":
        """The random numbers of this process's samples."""
        return Randomness()

    # ---- one batch ----------------------------------------------------------------------------------------

    def _make(self, item: Item) -> Made:
        positions = self.parts.positions(item.step)
        skipped: list[Skip] = []
        # All samples are read and parsed before the first is transformed: decoding images empties the CPU's caches.
        samples, values = self._read(item, positions, skipped)
        found = [sample["__position__"] for sample in samples]
        seeded = positions if self.transform is not None else positions[:1]
        seeding = self.randomness.batch(self.seed, item.epoch, seeded) if self.is_random else nullcontext()
        with self.own_buffers.in_use(), seeding:
            if self.decode is not None or self.transform is not None:
                values, found = self._transform_all(samples, values, skipped)
            batch, in_buffers = self.own_buffers.give(self._collated(values, item, positions))
        return Made(batch, found, skipped, in_buffers)

    def _read(self, item: Item, positions: range, skipped: list[Skip]) -> tuple[list[Sample], list[Any]]:
        """The samples of a batch as they are stored, and as `parse` returns them."""
        reader, epoch = self._follow(item), item.epoch
        samples: list[Sample] = []
        parsed: list[Any] = []
        for position, (_, shard, index) in zip(positions, self._find(item), strict=True):
            try:
                key, content = reader.read(shard, index)
                sample = {
                    "__key__": key, "__url__": reader.location(shard), "__epoch__": epoch, "__position__": position,
                    "__shard__": shard, "__index_in_shard__": index, **content,
                }  # fmt: skip
                parsed.append(sample if self.parse is None else decoded_by(self.parse, sample))
            except SampleError as error:
                skipped.append(self._skip(position, error))
            else:
                samples.append(sample)
        return samples, parsed

    def _find(self, item: Item) -> list[SampleRef]:
        """The samples of a batch; those of this process's next batches are looked up with the same call, for speed."""
        if item not in self._found:
            stride = worker.num_workers if (worker := get_worker_info()) else 1
            steps = range(item.step, self.parts.num_steps, stride)[:BATCHES_FOUND]
            own = [self.parts.positions(step) for step in steps]
            positions = np.concatenate([np.arange(each.start, each.stop) for each in own]) % self.order.num_samples
            refs = iter(self.order.refs(item.epoch, positions.tolist()))
            self._found = {
                Item(item.epoch, step): list(islice(refs, len(each))) for step, each in zip(steps, own, strict=True)
            }
        return self._found.pop(item)

    def _transform_all(
        self, samples: list[Sample], parsed: list[Any], skipped: list[Skip]
    ) -> tuple[list[Any], list[int]]:
        values: list[Any] = []
        found: list[int] = []
        for sample, each in zip(samples, parsed, strict=True):
            try:
                values.append(self._transformed(sample, each))
            except SampleError as error:
                skipped.append(self._skip(sample["__position__"], error))
            else:
                found.append(sample["__position__"])
        return values, found

    def _transformed(self, sample: Sample, parsed: Any) -> Any:
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
            raise TransformError("transform", describe(error), where) from error

    def _collated(self, samples: list[Any], item: Item, positions: range) -> Any:
        try:
            if self.is_random and positions:
                self.randomness.start(positions.start, stream=1)
            return self.collate(samples)
        except UserError:
            raise
        except Exception as error:
            where = {"epoch": item.epoch, "positions": positions}
            raise TransformError("collate", describe(error), where) from error

    def _skip(self, position: int, error: SampleError) -> Skip:
        if not self.tolerant:
            raise error
        return Skip(position, error.reason, error.message)

    # ---- its shards ---------------------------------------------------------------------------------------

    def _follow(self, item: Item) -> ShardReader:
        """The reader for a batch. At the start of an epoch and after a seek, prefetching starts from its shards."""
        worker = get_worker_info()
        stride = worker.num_workers if worker else 1
        is_next, self._expected = item == self._expected, Item(item.epoch, item.step + stride)
        if self._reader is None or (self.cache is not None and not is_next):
            self.close()
            max_open = min(MAX_OPEN_FILES, self.order.open_shards(self.parts.world_size))
            if self.cache is not None:
                order = copy.deepcopy(self.order)  # for other threads
                shards = (self.split.shards[shard] for shard in self._shards_from(order, item, stride))
                remote = (shard for shard in shards if storage.is_remote(shard[0]))
                self._prefetcher = Prefetcher(self.cache, remote, ahead=FETCHED_SHARDS)
            self._reader = ShardReader(
                self.split.shards, max_open=max_open, cache=self.cache, prefetcher=self._prefetcher, fields=self.fields
            )
        return self._reader

    def _shards_from(self, order: Order, item: Item, stride: int) -> Iterator[int]:
        """This process's shards, from a batch to the end of the epoch, in the order of first use."""
        known: set[int] = set()
        for step in range(item.step, self.parts.num_steps, stride):
            positions = [position % order.num_samples for position in self.parts.positions(step)]
            for ref in order.refs(item.epoch, positions):
                if ref.shard not in known:
                    known.add(ref.shard)
                    yield ref.shard


def cause(error: BaseException) -> BaseException:
    """The first exception of a chain."""
    return error if error.__cause__ is None else cause(error.__cause__)


def as_sent(error: Exception) -> Exception:
    """The error, or a RuntimeError with its text if it cannot be sent to another process."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:  # the class may be the user's
        return RuntimeError(describe(error))


def describe(error: BaseException) -> str:
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
        message = (
            f"sample {sample['__key__']} of {sample['__url__']} cannot be decoded{field}: {describe(cause(error))}"
        )
        raise SampleError("undecodable", message) from error


class FieldDecoder:
    """webdataset's decoders of a sample's fields, by the name of the image format ("pil", "torchrgb8", …).

    Pickles stay bytes, because loading one can run any code.
    """

    def __init__(self, name: str) -> None:
        if name not in imagespecs:
            raise StreamingError(f"there is no decoder {name!r}: choose one of {', '.join(sorted(imagespecs))}")
        self._decoder = Decoder([imagehandler(name)], pre=[gzfilter, leave_pickles])

    def __call__(self, sample: Sample) -> Sample:
        """The sample with decoded fields."""
        return self._decoder(sample)


def leave_pickles(key: str, data: bytes) -> bytes | None:
    """A webdataset handler: pickles stay bytes, other fields go to the next handler."""
    return data if key.lower().endswith(PICKLES) else None


# ---- random numbers ---------------------------------------------------------------------------------------


class Randomness:
    """Seeds the random numbers of each sample, as a function of (seed, epoch, position).

    One generator is used for all samples and is NumPy's global generator too; those of torch and Python are seeded
    with it. Seeding takes a few microseconds, new generators would take far longer.
    """

    def __init__(self) -> None:
        self._philox = np.random.Philox(key=0)
        self._state = self._philox.state
        self.generator = np.random.Generator(self._philox)
        self._bits: dict[int, int] = {}

    @contextmanager
    def batch(self, seed: int, epoch: int, positions: range) -> Iterator[None]:
        """Prepare the seeds of a batch. Outside of a worker the global generators are restored at the end."""
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
        """Seed all generators for a sample of the batch, or with stream 1 for the collation of the batch it begins."""
        bits, state = self._bits[position], self._state
        state["state"]["key"][0], state["state"]["key"][1] = bits, stream
        self._philox.state = state
        random.seed(bits + stream)
        torch.default_generator.manual_seed((bits + stream) & MAX_SEED)
        return self.generator


# ---- end of a worker --------------------------------------------------------------------------------------


def follow_training(training: int, over: Any, _worker: int) -> None:
    """End a worker when the training process no longer needs its batches, even if the worker is blocked.

    It ends with the training process, when that process sends SIGTERM, and when `over` is set. SIGTERM from others
    is ignored: launchers and schedulers send it to all processes, and training needs batches until it has saved.
    """
    if sys.platform == "linux":  # other systems do not say who sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a thread of a library may not block it
    Thread(target=_end_after, args=(training, over), daemon=True).start()


def _end_after(training: int, over: Any) -> None:
    parent = multiprocessing.parent_process()
    while parent is not None and parent.is_alive() and not over[0]:
        if sys.platform != "linux":
            time.sleep(FOLLOW_SECONDS)
        elif (received := signal.sigtimedwait({signal.SIGTERM}, FOLLOW_SECONDS)) and received.si_pid == training:
            break
    os._exit(0)
