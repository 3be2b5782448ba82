"""The epoch plan: which sample stands at which position of an epoch. Printed before any GPU is taken:

    python train/plan.py --shards data/shards --batch-size 256 --processes 8

A pure function of (shard sizes, seed, epoch). The shards are permuted and their sequence of samples is cut into L
equal stretches, the lanes; each lane is shuffled inside its own windows of `window_shards` shards. Position p of the
global order comes from the lane of slot p mod L. Global batch t is positions [tG, (t+1)G) whatever the number of
processes; rank r of W takes those with p mod W = r. Lanes are dealt to slots in bit-reversed order, so that the slots
of a rank are neighbours in the sequence when W divides L: it opens its W-th part of the shards and at most one more.

Imports no torch. Random numbers are hashes written out here, so that no library's new version changes an order.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from captioner import cli
from captioner.cli import UserError

WINDOW_SHARDS = 4
SHARD_ORDER, WINDOW_ORDER, SAMPLE_CHANCE = range(3)  # the streams of random numbers
PACK_FIRST = (
    "python sharding/make_shards.py packs it (after python sharding/download_coco.py for COCO); tars that are there "
    "already want python sharding/check_shards.py index"
)


class SampleRef(NamedTuple):
    """A sample's place: global position in the epoch, shard number, place in the shard."""

    position: int
    shard: int
    place: int


@dataclass(kw_only=True, slots=True)
class EpochPlan:
    """The global order of one epoch over S samples; `shuffled=False` keeps the shards' order (for evaluation)."""

    shard_sizes: Sequence[int]
    seed: int = 0
    epoch: int = 0
    num_lanes: int = 64
    window_shards: int = WINDOW_SHARDS
    shuffled: bool = True
    num_samples: int = field(init=False)
    _order: np.ndarray = field(init=False)
    _ends: np.ndarray = field(init=False)
    _starts: np.ndarray = field(init=False)
    _lane_of_slot: np.ndarray = field(init=False)
    _lane_starts: np.ndarray = field(init=False)
    _windows: dict[int, tuple[int, int, np.ndarray]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        sizes = np.asarray(self.shard_sizes, dtype=np.int64)
        self.num_samples = int(sizes.sum())
        if not self.shuffled:
            self.num_lanes = 1
        self._order = np.arange(len(sizes))
        if self.shuffled:
            self._order = random_order(len(sizes), self.seed, self.epoch, SHARD_ORDER)
        self._ends = np.cumsum(sizes[self._order])
        self._starts = self._ends - sizes[self._order]
        base, longer = divmod(self.num_samples, self.num_lanes)
        self._lane_of_slot = reversed_digits(self.num_lanes)
        lane_sizes = np.empty(self.num_lanes, dtype=np.int64)
        lane_sizes[self._lane_of_slot] = base + (np.arange(self.num_lanes) < longer)
        self._lane_starts = np.concatenate(([0], np.cumsum(lane_sizes)))

    def refs(self, positions: Iterable[int]) -> list[SampleRef]:
        """The samples at the given global positions, in their order."""
        positions = list(positions)
        spots = np.asarray(positions, dtype=np.int64)
        if self.shuffled:
            lanes = self._lane_of_slot[spots % self.num_lanes]
            spots = self._lane_starts[lanes] + spots // self.num_lanes
            spots = np.array(list(map(self._shuffle, lanes.tolist(), spots.tolist())), dtype=np.int64)
        indices = np.searchsorted(self._ends, spots, side="right")
        shards, places = self._order[indices].tolist(), (spots - self._starts[indices]).tolist()
        return list(map(SampleRef, positions, shards, places))

    def shards_of_rank(self, rank: int, *, world_size: int) -> list[int]:
        """The shards that a rank opens in this epoch, in the order of the sequence."""
        lanes = range(self.num_lanes)
        if self.shuffled and self.num_lanes % world_size == 0:
            lanes = self._lane_of_slot[rank::world_size].tolist()
        found: set[int] = set()
        for lane in lanes:
            start, end = self._lane_starts[lane : lane + 2].tolist()
            if start < end:
                found.update(range(*self._indices(start, end)))
        return [int(self._order[index]) for index in sorted(found) if self._ends[index] > self._starts[index]]

    def _shuffle(self, lane: int, spot: int) -> int:
        """The spot of the sequence that the window's shuffle puts at `spot`."""
        window = self._windows.get(lane)
        if window is None or not window[0] <= spot < window[1]:
            window = self._windows[lane] = self._open_window(lane, spot)
        start, _, order = window
        return start + int(order[spot - start])

    def _open_window(self, lane: int, spot: int) -> tuple[int, int, np.ndarray]:
        """The part of a lane, `window_shards` shards long, around `spot`: its start, end and order.

        In long lanes the first window is shorter by a number that differs from lane to lane, so that they do not all
        want new shards at once.
        """
        lane_start, lane_end = self._lane_starts[lane : lane + 2].tolist()
        first, end = self._indices(lane_start, lane_end)
        shift = lane % self.window_shards if end - first > 2 * self.window_shards else 0
        number = (int(np.searchsorted(self._ends, spot, side="right")) - first + shift) // self.window_shards
        window_first = max(first, first - shift + number * self.window_shards)
        window_last = min(end, first - shift + (number + 1) * self.window_shards) - 1
        start, stop = max(lane_start, int(self._starts[window_first])), min(lane_end, int(self._ends[window_last]))
        return start, stop, random_order(stop - start, self.seed, self.epoch, WINDOW_ORDER, lane, number)

    def _indices(self, start: int, end: int) -> tuple[int, int]:
        """The stretch of the permuted shards that holds spots [start, end)."""
        first, last = np.searchsorted(self._ends, (start, end - 1), side="right").tolist()
        return first, last + 1


def num_steps(num_samples: int, *, global_batch: int) -> int:
    """Optimizer steps of an epoch; the last partial batch counts."""
    return -(-num_samples // global_batch)


def rank_positions(step: int, *, num_samples: int, global_batch: int, rank: int, world_size: int) -> range:
    """The global positions of step `step` that belong to `rank`; empty when the last batch is too short for it.

    `world_size` divides `global_batch`.
    """
    start = step * global_batch
    return range(start + rank, min(start + global_batch, num_samples), world_size)


def reversed_digits(length: int) -> np.ndarray:
    """The numbers below `length` with their digits reversed, the bits for a power of two.

    Every W-th of them is a run of neighbours, for each W that is a product of the first of `length`'s prime factors.
    """
    numbers, radix, rest = [0], 2, length
    while rest > 1:
        if rest % radix:
            radix += 1
            continue
        rest //= radix
        numbers = [number + rest * digit for digit in range(radix) for number in numbers]
    return np.array(numbers)


# ---- chance -----------------------------------------------------------------------------------------------

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def random_bits(counters: np.ndarray, *key: int) -> np.ndarray:
    """64 random bits (uint64) for each counter, a function of key and counter alone: SplitMix64's output function."""
    state = np.zeros(1, dtype=np.uint64)
    for part in key:
        state = _mix(state + np.uint64((part * GOLDEN + GOLDEN) & MASK))
    return _mix(state + counters.astype(np.uint64) * np.uint64(GOLDEN))


def _mix(bits: np.ndarray) -> np.ndarray:
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def random_order(length: int, *key: int) -> np.ndarray:
    """A permutation of `length` numbers, a function of the key alone."""
    return np.argsort(random_bits(np.arange(length), *key), kind="stable")


# ---- printed ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """What would be trained on, and by how many processes."""

    shards: tuple[str, ...] = ("data/shards",)
    """Dataset folders (or URLs), as for train/main.py."""
    split: str = "train"
    """Which split."""
    batch_size: int = 128
    """Images of a *global* batch, over all processes."""
    processes: int = 1
    """Training processes (GPUs) in all."""
    window_shards: int = WINDOW_SHARDS
    """Shards of a lane that are shuffled together."""
    seed: int = 0
    """The run's seed."""
    epoch: int = 0
    """Which epoch, from 0; each has an order of its own."""


def main(settings: PlanSettings) -> None:
    """Print what an epoch would read, and what each process of it."""
    from train.split import read_split

    for name in ("batch_size", "processes", "window_shards"):
        if getattr(settings, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(settings, name)} is too small: give at least 1")
    if settings.batch_size % settings.processes:
        raise UserError(
            f"--batch-size {settings.batch_size} is the global batch and must be a multiple of the "
            f"{settings.processes} processes"
        )
    split = read_split(settings.shards, settings.split, remedy=PACK_FIRST)
    plan = split.plan(seed=settings.seed, epoch=settings.epoch, window_shards=settings.window_shards)
    steps = num_steps(plan.num_samples, global_batch=settings.batch_size)
    last = plan.num_samples - max(0, steps - 1) * settings.batch_size
    facts = [
        ("samples", f"{plan.num_samples:,}"),
        ("shards", f"{len(split.shards):,}, {split.bytes / 1e9:,.2f} GB"),
        ("window", window_text(plan, split.bytes)),
        ("global batch", f"{settings.batch_size:,} images, {settings.batch_size // settings.processes:,} a process"),
        ("steps", f"{steps:,}"),
        ("last batch", last_batch_text(last, settings)),
        ("repeated, dropped", "0, 0"),
    ]
    cli.print_table(f"epoch {settings.epoch} of {', '.join(settings.shards)}", ("", settings.split), facts)
    shard_bytes = [entry.bytes for _, entry in split.shards]
    rows = rank_rows(plan, shard_bytes, world_size=settings.processes, global_batch=settings.batch_size)
    cli.print_table("each process", ("rank", "samples", "reads MB", "opens shards", "of MB", "share"), rows)


def window_text(plan: EpochPlan, num_bytes: int) -> str:
    """The window, and how many bytes are read from at the same time."""
    at_once = min(len(plan.shard_sizes), plan.num_lanes * plan.window_shards)
    size = num_bytes * at_once / max(1, len(plan.shard_sizes))
    return (
        f"{plan.window_shards:,} shards in each of {plan.num_lanes} lanes: {at_once:,} shards, {size / 1e9:,.2f} GB, "
        "are read from at once"
    )


def last_batch_text(num_samples: int, settings: PlanSettings) -> str:
    """How the last batch is split over the ranks."""
    more, fewer = -(-num_samples // settings.processes), num_samples // settings.processes
    longer = num_samples % settings.processes
    text = f"{num_samples:,} images: "
    if not longer:
        return text + f"{fewer:,} for each process"
    return text + f"{more:,} for the first {longer:,} processes, {fewer:,} for the others"


def rank_rows(
    plan: EpochPlan, shard_bytes: Sequence[int], *, world_size: int, global_batch: int
) -> list[tuple[object, ...]]:
    """For each rank: samples, bytes of these, shards opened, bytes of those, their share of all. A row in short."""
    total = sum(shard_bytes)
    rows: list[tuple[object, ...]] = []
    for rank in range(world_size):
        full, rest = divmod(plan.num_samples, global_batch)
        samples = full * (global_batch // world_size) + len(range(rank, rest, world_size))
        opened = plan.shards_of_rank(rank, world_size=world_size)
        opened_bytes = sum(shard_bytes[shard] for shard in opened)
        read = total * samples / max(1, plan.num_samples)
        rows.append((rank, samples, read / 1e6, len(opened), opened_bytes / 1e6, opened_bytes / max(1, total)))
    return rows


def run() -> None:
    """The console entry."""
    cli.run(main, PlanSettings, description=__doc__ or "")


if __name__ == "__main__":
    run()
