"""The epoch plan to batches: a webdataset pipeline that reads planned samples, views them and packs their captions.

Each worker process makes whole batches of its rank: worker k of K makes every K-th, so that batches reach the
training loop in the plan's order. Batches leave a worker as uint8 views and packed token ids. What arrives is compared
with the plan: a sample that is lost, repeated or another is an error.
"""

import atexit
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import chain
from threading import Thread
from typing import Any

import numpy as np
import torch
import webdataset as wds
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from captioner import images, views
from captioner.decoder_output import own_stderr
from captioner.errors import UserError
from captioner.files import storage
from captioner.model import PackedCaptions
from captioner.samples import CaptionFields, read_content, split_pair
from captioner.shards.splitmix import random_bits
from captioner.streaming.cache import RESTORE, Prefetcher, ShardCache
from captioner.streaming.dataset import Split
from captioner.streaming.order import SAMPLE_CHANCE, EpochOrder, SampleRef, rank_positions
from captioner.streaming.reader import SampleError, ShardReader
from captioner.vocabulary import Vocabulary
from train.features import ROW_DTYPE, FeatureFiles, FeatureReader
from train.ring import Ring, Slot

BATCHES_AHEAD = 3  # that each worker makes before they are asked for
SHOWN = 5
# Before workers are forked. A gloo thread takes one of Python's locks to free the tensors of the last collective, and
# a worker forked at that moment waits for the lock forever (seen with Python 3.11).
QUIET_SECONDS = 0.1
FOLLOW_SECONDS = 0.2  # how soon a worker ends after training does
MAX_OPEN_FILES = 800  # of a process, half of them features; systems allow 1,024
FETCHED_SHARDS = 8  # that a process lets wait in the cache before they are needed
PINNED_FOR = ("cuda", "xpu")  # device types that copy from page-locked memory asynchronously


@dataclass(frozen=True, slots=True)
class Skip:
    """A sample, by its global position, that could not be used, and why."""

    position: int
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Batch:
    """A rank's share of a global batch: B uint8 views (B, P, P, 3), or cached features (B, F), with all their captions.

    A rank that the last, partial batch does not reach gets a filler: one row of zeros and an empty caption, with
    `num_samples` 0, so that it can join the step with zero loss. `positions` are the samples' places in the epoch,
    `references` their raw captions, and `skipped` tells what should have been in the batch too.
    """

    inputs: Tensor
    captions: PackedCaptions
    positions: list[int]
    keys: list[str]
    image_ids: list[int | str]
    references: list[list[str]]
    num_cut: int
    skipped: list[Skip]

    @property
    def num_samples(self) -> int:
        """Samples in the batch, none in a filler."""
        return len(self.positions)

    @property
    def num_targets(self) -> int:
        """Tokens to be predicted, none in a filler."""
        return len(self.captions.targets_M) if self.positions else 0

    def to(self, device: torch.device) -> "Batch":
        """The batch with its tensors on `device`; from page-locked memory it returns before they are there.

        Other memory might be reused before it is copied, so that copy is waited for.
        """
        may_pin = device.type in PINNED_FOR  # `is_pinned` would load CUDA for a run on the CPU
        return self._map(lambda tensor: tensor.to(device, non_blocking=may_pin and tensor.is_pinned()))

    def pin_memory(self) -> "Batch":
        """The batch with its tensors in page-locked memory."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Any) -> "Batch":
        return replace(self, inputs=change(self.inputs), captions=self.captions.map(change))


@dataclass(frozen=True, slots=True)
class Share:
    """Which share of every global batch, of `global_batch` images, is this process's, and in how many parts it comes.

    Parts are numbered on through the epoch. Part m of A of a batch has the offsets i in it with i mod A = m, of all
    processes together: the same images whatever the number of processes.
    """

    global_batch: int
    rank: int = 0
    world_size: int = 1
    accumulation_steps: int = 1

    @classmethod
    def of(cls, accelerator: Accelerator, batch_size: int, *, accumulation_steps: int = 1) -> "Share":
        """This process's. Raises UserError where there are no equal parts."""
        world_size = accelerator.num_processes
        if batch_size % (world_size * accumulation_steps):
            raise UserError(
                f"--batch-size {batch_size} is the global batch and must be a multiple of the {world_size} processes "
                f"times --accumulation-steps {accumulation_steps}"
            )
        return cls(batch_size, accelerator.process_index, world_size, accumulation_steps)

    @property
    def rows(self) -> int:
        """Images of a part, at most."""
        return self.global_batch // self.world_size // self.accumulation_steps

    def num_parts(self, num_samples: int) -> int:
        """Parts of an epoch's first samples."""
        full, rest = divmod(num_samples, self.global_batch)
        return full * self.accumulation_steps + min(rest, self.accumulation_steps)

    def positions(self, part: int, *, num_samples: int) -> range:
        """The global positions of a part that are this process's; empty when the last batch is too short for it."""
        step, number = divmod(part, self.accumulation_steps)
        own = rank_positions(
            step,
            num_samples=num_samples,
            global_batch=self.global_batch,
            rank=self.rank,
            world_size=self.world_size,
        )
        start = step * self.global_batch
        stride = min(self.accumulation_steps, num_samples - start)
        return range(own.start + (number - (own.start - start)) % stride, own.stop, stride)


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewRules:
    """How samples become model input: `training` views are cropped at random and sometimes mirrored."""

    crop: int
    max_tokens: int
    training: bool


# ---- the pipeline's stages, in the workers ------------------------------------------------------------------


class PlannedBatches(IterableDataset[list[SampleRef]]):
    """The pipeline's source: this worker's batches of sample places, in order; an empty one where there is no share."""

    def __init__(self, plan: EpochOrder, share: Share, *, first_part: int) -> None:
        self.plan = plan
        self.share = share
        self.first_part = first_part

    def __iter__(self) -> Iterator[list[SampleRef]]:
        worker = get_worker_info()
        offset, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        for part in range(self.first_part + offset, self.share.num_parts(self.plan.num_samples), stride):
            yield self.plan.refs(self.share.positions(part, num_samples=self.plan.num_samples))

    def shards(self) -> Iterator[int]:
        """The numbers of this worker's shards, in the order of their first use."""
        known: set[int] = set()
        for refs in PlannedBatches(replace(self.plan), self.share, first_part=self.first_part):
            for ref in refs:
                if ref.shard not in known:
                    known.add(ref.shard)
                    yield ref.shard


@dataclass(frozen=True, slots=True)
class Sample:
    """A sample that was read and checked: its place, key and URL, its picture's bytes, and its parsed captions."""

    ref: SampleRef
    key: str
    url: str
    picture: bytes
    content: dict[str, Any]


class MakeBatches:
    """The pipeline's last stage: places of samples to batches, or to the UserError that ends them.

    All samples of a batch are read before the first is decoded: each picture that is decoded empties the processor's
    caches of the code and the data of everything else.
    """

    def __init__(
        self,
        source: PlannedBatches,
        split: Split,
        *,
        rules: ViewRules,
        vocabulary: Vocabulary,
        ring: Ring,
        cache: ShardCache | None,
        tolerant: bool,
        features: FeatureFiles | None,
    ) -> None:
        self.source = source
        self.split = split
        self.rules = rules
        self.vocabulary = vocabulary
        self.ring = ring
        self.cache = cache
        self.tolerant = tolerant
        self.features = features

    def __call__(self, batches: Iterable[list[SampleRef]]) -> Iterator[Batch | UserError]:
        with ExitStack() as stack:
            if get_worker_info() is not None:  # a process of its own, in which one thread decodes
                stack.enter_context(own_stderr())
            prefetcher = None
            if self.cache is not None:
                ahead = (self.split.shards[shard] for shard in self.source.shards())
                prefetcher = Prefetcher(self.cache, ahead, ahead=FETCHED_SHARDS)
                stack.callback(prefetcher.close)
            plan, world_size = self.source.plan, self.source.share.world_size
            max_open = min(MAX_OPEN_FILES // 2, plan.lanes_of_rank(world_size=world_size) * (plan.window_shards + 1))
            reader = ShardReader(
                self.split.shards,
                max_open=max_open,
                cache=self.cache,
                prefetcher=prefetcher,
                fields=None if self.features is None else CaptionFields(),
            )
            stack.callback(reader.close)
            fill: FillRow = self.fill_with_view
            if self.features is not None:
                features = FeatureReader(self.features, max_open=max_open)
                stack.callback(features.close)
                fill = partial(fill_with_features, features)
            try:
                for refs in batches:
                    yield self.make_batch(refs, reader, fill)
            except UserError as error:  # raised in a worker it would reach the user wrapped in a traceback
                yield error

    def make_batch(self, refs: Sequence[SampleRef], reader: ShardReader, fill: "FillRow") -> Batch:
        """The batch of these samples, without those that cannot be used. Raises UserError."""
        skipped: list[Skip] = []
        read: list[Sample] = []
        for ref in refs:
            try:
                read.append(read_sample(reader, ref))
            except SampleError as error:
                skipped.append(self._skip(ref, error))
        slot, rows = self.ring.take()
        plan, samples = self.source.plan, []
        chances = random_bits(np.array([s.ref.position for s in read]), plan.seed, plan.epoch, SAMPLE_CHANCE).tolist()
        for sample, chance in zip(read, chances, strict=True):
            try:
                fill(rows[len(samples)], sample, chance)
            except SampleError as error:
                skipped.append(self._skip(sample.ref, error))
                continue
            samples.append(sample)
        if not samples:
            rows[0] = 0
        return self.collate(samples, rows[: max(1, len(samples))], slot, skipped)

    def fill_with_view(self, view_PP3: np.ndarray, sample: Sample, chance: int) -> None:
        """Decode a sample's picture and write a view of it. Raises SampleError, and UserError where it is too small."""
        pixels_HW3 = decode_picture(sample, squash_to=self.split.stored_sizes[sample.ref.shard])
        fill_view(view_PP3, pixels_HW3, sample, self.rules, chance=chance)

    def _skip(self, ref: SampleRef, error: SampleError) -> Skip:
        if not self.tolerant:
            raise UserError(error.message) from error
        return Skip(ref.position, error.reason, error.message)

    def collate(self, samples: list[Sample], filled: np.ndarray, slot: int | None, skipped: list[Skip]) -> Batch:
        """Samples to a batch; none at all to a filler."""
        captions = [caption for sample in samples for caption in sample.content["tokens"]] or [[]]
        num_captions = [len(sample.content["tokens"]) for sample in samples] or [1]
        tokens, lengths = self.vocabulary.encode(chain.from_iterable(captions)), list(map(len, captions))
        max_tokens = self.rules.max_tokens
        rows: Any = torch.from_numpy(filled) if slot is None else Slot(slot, len(filled))
        return Batch(
            inputs=rows,
            captions=PackedCaptions.pack_flat(tokens, lengths, num_captions, max_tokens=max_tokens),
            positions=[sample.ref.position for sample in samples],
            keys=[sample.key for sample in samples],
            image_ids=[sample.content["image_id"] for sample in samples],
            references=[sample.content["captions"] for sample in samples],
            num_cut=sum(length > max_tokens for length in lengths),
            skipped=skipped,
        )


FillRow = Callable[[np.ndarray, Sample, int], None]


def fill_with_features(features: FeatureReader, row_F: np.ndarray, sample: Sample, _chance: int) -> None:
    """Write a sample's cached features. Raises SampleError."""
    features.read_into(row_F, sample.ref)


def read_sample(reader: ShardReader, ref: SampleRef) -> Sample:
    """The sample at a place. Raises SampleError, and UserError when a disk or server fails."""
    key, fields = reader.read(ref.shard, ref.place)
    url = reader.location(ref.shard)
    try:
        picture, text = split_pair({"": b"", **fields} if len(fields) == 1 else fields)
        return Sample(ref, key, url, picture, read_content(text, key=key))
    except ValueError as error:
        raise SampleError("no captions", f"sample {key} in {url} has no captions ({error}): {RESTORE}") from error


def decode_picture(sample: Sample, *, squash_to: int | None) -> np.ndarray:
    """A sample's pixels (height, width, 3), uint8. Raises SampleError.

    `squash_to` is the size of pictures that were stored as they are; others have theirs already.
    """
    try:
        if squash_to is None:
            return images.decode_stored(sample.picture)
        return np.array(images.load_resized(sample.picture, size=squash_to, resize="squash")[0])
    except images.ImageError as error:
        message = f"sample {sample.key} in {sample.url} is not a picture ({error}): {RESTORE}"
        raise SampleError("undecodable", message) from error


def fill_view(view_PP3: np.ndarray, pixels_HW3: np.ndarray, sample: Sample, rules: ViewRules, *, chance: int) -> None:
    """Write a view of a sample's pixels; 64 bits of `chance` decide where it is cut and whether it is mirrored.

    Raises UserError for a picture that is too small.
    """
    height, width, _ = pixels_HW3.shape
    if min(height, width) < rules.crop:
        raise UserError(f"the shards hold pictures of {width}x{height}: give a smaller --crop")
    if not rules.training:
        view_PP3[:] = views.eval_view(pixels_HW3, crop=rules.crop)
        return
    cut_PP3, mirrored = views.train_view(pixels_HW3, crop=rules.crop, chance=chance)
    if mirrored and not views.speaks_of_sides(sample.content["captions"]):  # NumPy would take many times as long
        torch.from_numpy(view_PP3).copy_(torch.from_numpy(cut_PP3).flip(1))
    else:
        view_PP3[:] = cut_PP3


# ---- in the training process --------------------------------------------------------------------------------


@dataclass(kw_only=True, slots=True)
class Ledger:
    """What became of the planned samples; skipped ones are counted by reason and kept."""

    planned: int = 0
    read: int = 0
    decoded: int = 0
    skipped: list[Skip] = field(default_factory=list)

    def count(self, batch: Batch, planned: Sequence[int], *, part: int) -> None:
        """Add a batch. Raises RuntimeError unless it holds, or says why not, exactly what was planned for it."""
        found = sorted([*batch.positions, *(skip.position for skip in batch.skipped)])
        if found != list(planned):
            missing, strange = sorted(set(planned) - set(found)), sorted(set(found) - set(planned))
            raise RuntimeError(
                f"part {part} of the epoch was to bring {len(planned)} samples and brought {len(found)}: missing are "
                f"positions {missing[:SHOWN]}, not planned were {strange[:SHOWN]}, the rest came more than once"
            )
        self.planned += len(planned)
        self.decoded += batch.num_samples
        self.read += batch.num_samples + sum(
            s.reason in ("undecodable", "no captions", "no features") for s in batch.skipped
        )
        self.skipped += batch.skipped

    @classmethod
    def of_all(cls, ledgers: Sequence["Ledger"], *, planned: int) -> "Ledger":
        """All ranks' ledgers as one. Raises RuntimeError when they do not add up to the epoch's samples."""
        total = cls()
        for ledger in ledgers:
            total.planned += ledger.planned
            total.read += ledger.read
            total.decoded += ledger.decoded
            total.skipped += ledger.skipped
        if not planned == total.planned == total.decoded + len(total.skipped):
            raise RuntimeError(f"{planned} samples were planned, but the processes saw others: {total}")
        return total

    def __str__(self) -> str:
        reasons = Counter(skip.reason for skip in self.skipped)
        details = ", ".join(f"{count:,} {reason}" for reason, count in sorted(reasons.items()))
        skipped = f"{len(self.skipped):,} ({details})" if details else "0"
        return f"planned {self.planned:,}, read {self.read:,}, decoded {self.decoded:,}, skipped {skipped}, repeated 0"


class BatchStream(DataLoader[Batch]):
    """This rank's batches of one epoch, one for every part of a global batch from `first_part` on.

    `ledger` counts them. Shards behind URLs are read through `cache`. With `features` the pictures stay unread. Up to
    `tolerate` samples that cannot be used are left out and counted; one more, the first for 0, is a UserError that
    names it. Batches for a `device` that is a GPU come in page-locked memory. It shares the samples out by itself:
    Accelerate must not.
    """

    def __init__(
        self,
        split: Split,
        *,
        plan: EpochOrder,
        share: Share,
        rules: ViewRules,
        vocabulary: Vocabulary,
        workers: int,
        first_part: int = 0,
        cache: ShardCache | None = None,
        tolerate: int = 0,
        features: FeatureFiles | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.ledger = Ledger()
        self._pinned = device is not None and device.type in PINNED_FOR
        self._plan, self._share, self._first_part, self._tolerate = plan, share, first_part, tolerate
        row: tuple[tuple[int, ...], np.dtype] = ((rules.crop, rules.crop, 3), np.dtype(np.uint8))
        if features is not None:
            row = (features.num_features,), ROW_DTYPE
        self._ring = Ring((share.rows, *row[0]), row[1], workers=workers, slots=BATCHES_AHEAD + 2)
        source = PlannedBatches(plan, share, first_part=first_part)
        remote = any(storage.is_remote(folder) for folder in split.folders)
        if remote and cache is None:
            raise ValueError("shards behind URLs are read through a cache")
        self.stage = MakeBatches(
            source,
            split,
            rules=rules,
            vocabulary=vocabulary,
            ring=self._ring,
            cache=cache if remote else None,
            tolerant=tolerate > 0,
            features=features,
        )
        pipeline: Any = wds.DataPipeline(source, self.stage)
        self._over: Any = multiprocessing.RawValue("b", False)
        super().__init__(
            pipeline,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=BATCHES_AHEAD if workers else None,
            generator=torch.Generator(),  # what it draws must not move the model's random numbers
            worker_init_fn=partial(follow_training, os.getpid(), self._over) if workers else None,
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,  # the ring's memory
        )

    @property
    def _is_accelerate_prepared(self) -> bool:
        """Accelerate asks this before it would deal out the batches once more."""
        raise UserError("accelerator.prepare must not be given a BatchStream, which is this rank's already: iterate it")

    def __len__(self) -> int:
        return max(0, self._share.num_parts(self._plan.num_samples) - self._first_part)

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        if not self._pinned:
            return self._batches()
        return pinned_ahead(self._batches(), partial(pin_batch, device_index=torch.accelerator.current_device_index()))

    def _batches(self) -> Iterator[Batch]:
        part, self._over.value = self._first_part, False
        end_workers = partial(setattr, self._over, "value", True)
        if self.num_workers and torch.distributed.is_initialized():
            time.sleep(QUIET_SECONDS)
        items = super().__iter__()
        atexit.register(end_workers)  # before the loader's own, which waits for each of them
        try:
            for item in items:
                if isinstance(item, UserError):
                    raise item
                yield self._received(item, part)
                part += 1
        finally:
            end_workers()
            atexit.unregister(end_workers)
        if part < self._first_part + len(self):
            raise RuntimeError(f"the loader ended before part {part} of the epoch")

    def _received(self, batch: Batch, part: int) -> Batch:
        """A batch as it left a worker, counted, with the tensor that its slot of the ring stands for."""
        self._count(batch, part)
        return replace(batch, inputs=self._ring.tensor(batch.inputs)) if isinstance(batch.inputs, Slot) else batch

    def _count(self, batch: Batch, part: int) -> None:
        self.ledger.count(batch, self._share.positions(part, num_samples=self._plan.num_samples), part=part)
        if len(self.ledger.skipped) > self._tolerate:
            raise UserError(
                f"{len(self.ledger.skipped)} samples cannot be used, more than --tolerate-bad-samples "
                f"{self._tolerate}; the last: {self.ledger.skipped[-1].message}"
            )


def pinned_ahead(batches: Iterable[Batch], pin: Callable[[Batch], Batch]) -> Iterator[Batch]:
    """The batches as `pin` copies them, in order, each copied by a thread during the step on the batch before it.

    A batch's buffer is free once copied. Exceptions of `batches` or `pin` are raised after the batches before them.
    The thread ends with the iterator.
    """
    copies: deque[Future[Batch]] = deque()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="pin") as thread:
        for copy in _submit_each(batches, partial(thread.submit, pin)):
            copies.append(copy)
            if len(copies) > 1:
                yield copies.popleft().result()
        while copies:
            yield copies.popleft().result()


def _submit_each(batches: Iterable[Batch], submit: Callable[[Batch], Future[Batch]]) -> Iterator[Future[Batch]]:
    try:
        yield from map(submit, batches)
    except Exception as error:  # it waits for the batches before it
        failed: Future[Batch] = Future()
        failed.set_exception(error)
        yield failed


def pin_batch(batch: Batch, *, device_index: int) -> Batch:
    """The batch in page-locked memory."""
    torch.accelerator.set_device_index(device_index)  # a thread starts on device 0
    return batch.pin_memory()


def follow_training(training: int, over: Any, _worker: int) -> None:
    """Keep a worker alive exactly as long as the training process needs its batches, even while it is blocked.

    SIGTERM, which launchers and schedulers send to all processes of a job, does not end it, since training needs
    batches until it has saved; SIGTERM of the training process does, and so do `over` and that process's own end.
    """
    if sys.platform == "linux":  # elsewhere the sender of a signal is unknown
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a thread of a library may not block it
    Thread(target=_end_after, args=(training, over), daemon=True).start()


def _end_after(training: int, over: Any) -> None:
    while os.getppid() == training and not over.value:
        if sys.platform != "linux":
            time.sleep(FOLLOW_SECONDS)
        elif (received := signal.sigtimedwait({signal.SIGTERM}, FOLLOW_SECONDS)) and received.si_pid == training:
            break
    os._exit(0)


# ---- where a stream stands, and whether all ranks agree -------------------------------------------------------


@dataclass(kw_only=True, slots=True)
class StreamState:
    """The whole state of a stream, the same on every rank: what the order is a function of, and a place in it.

    It holds neither processes nor workers: a run resumes with any number of them, by a seek. Accelerate stores it with
    each checkpoint.
    """

    fingerprint: str
    global_batch: int
    shuffle_shards: int
    seed: int
    epoch: int = 0
    position: int = 0

    @classmethod
    def start(cls, split: Split, *, seed: int, global_batch: int, shuffle_shards: int) -> "StreamState":
        """The beginning of the first epoch."""
        return cls(fingerprint=split.fingerprint, global_batch=global_batch, shuffle_shards=shuffle_shards, seed=seed)

    def plan(self, split: Split) -> EpochOrder:
        """The order of its epoch."""
        return split.plan(
            seed=self.seed, epoch=self.epoch, global_batch=self.global_batch, shuffle_shards=self.shuffle_shards
        )

    def state_dict(self) -> dict[str, Any]:
        """All of it, as plain numbers and text."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to the stored place. Raises UserError when that is in another order than this one."""
        own = asdict(self)
        fixed = [name for name in own if name not in ("epoch", "position")]
        differing = ", ".join(
            f"{name} was {state.get(name)}, is {own[name]}" for name in fixed if state.get(name) != own[name]
        )
        if differing:
            raise UserError(
                f"the checkpoint was made on other shards or another order of them ({differing}): train with what it "
                "was made on, or give another --output"
            )
        self.epoch, self.position = state["epoch"], state["position"]


def rank_facts(state: StreamState, share: Share, **others: Split | Vocabulary | None) -> dict[str, Any]:
    """What a rank believes: the order, the place in it, and which positions of a global batch are its own.

    `others` are what else all must see alike.
    """
    parts = range(share.num_parts(share.global_batch))
    own = sorted(position for part in parts for position in share.positions(part, num_samples=share.global_batch))
    fingerprints = {name: other.fingerprint if other else None for name, other in others.items()}
    return {**asdict(state), **fingerprints, "global_batch": share.global_batch, "positions": own}


def check_ranks(facts: Sequence[dict[str, Any]]) -> None:
    """Raise UserError unless all ranks see the same order and their positions make up a global batch exactly."""
    first = facts[0]
    for rank, other in enumerate(facts):
        differing = [name for name in first if name != "positions" and first[name] != other[name]]
        if differing:
            name = differing[0]
            raise UserError(
                f"rank {rank} sees other data than rank 0 ({name} {other[name]}, not {first[name]}): give all machines "
                "the same shards and the same flags"
            )
    positions = sorted(position for each in facts for position in each["positions"])
    if positions != list(range(first["global_batch"])):
        raise UserError(
            f"the {len(facts)} processes would read {len(positions)} of {first['global_batch']} samples of a batch, "
            f"{len(set(positions))} different ones: they disagree on their ranks; launch them with one launcher"
        )
