"""The order of an epoch: which sample stands at which position.

A pure function of (shard sizes, seed, epoch, global batch). The shards are permuted and their sequence of samples is
cut into L equal stretches, the lanes; each lane is shuffled inside its own windows of shards. Global batch t is
positions [tG, (t+1)G) of the order, whatever the number of processes: G/L samples of the first lane, then as many of
the second, and so on. Rank r of W takes the r-th of W equal parts of each batch. When W divides L, that comes from the
r-th of W equal parts of the sequence: the rank opens its part of the shards and at most one more.

Imports no torch. Random numbers are hashes (`captioner/shards/splitmix.py`): no library's new version changes an order.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from captioner.shards.splitmix import random_order

SHUFFLE_SHARDS = 256
SHARD_ORDER, WINDOW_ORDER, SAMPLE_CHANCE, SAMPLE_RNG = range(4)  # the streams of random numbers


class SampleRef(NamedTuple):
    """A sample's place: global position in the epoch, shard number, place in the shard."""

    position: int
    shard: int
    place: int


@dataclass(kw_only=True, slots=True)
class EpochPlan:
    """The global order of one epoch over S samples in batches of G.

    `shuffled=False` keeps the shards' order, and may take only the first of `every` so many neighbours.

    `shuffle_shards` are read from at the same time, by all processes together: L lanes, the largest divisor of G that
    is not above it, with windows of as many shards each as that leaves.
    """

    shard_sizes: Sequence[int]
    seed: int = 0
    epoch: int = 0
    global_batch: int = 1
    shuffle_shards: int = SHUFFLE_SHARDS
    shuffled: bool = True
    every: int = 1
    num_samples: int = field(init=False)
    num_lanes: int = field(init=False)
    window_shards: int = field(init=False)
    _order: np.ndarray = field(init=False)
    _ends: np.ndarray = field(init=False)
    _starts: np.ndarray = field(init=False)
    _lane_starts: np.ndarray = field(init=False)
    _windows: dict[int, tuple[int, int, np.ndarray]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        sizes = np.asarray(self.shard_sizes, dtype=np.int64)
        assert self.every == 1 or not self.shuffled
        total = int(sizes.sum())
        self.num_samples = -(-total // self.every)
        most = min(self.global_batch, self.shuffle_shards)
        self.num_lanes = next(lanes for lanes in range(most, 0, -1) if self.global_batch % lanes == 0)
        self.window_shards = self.shuffle_shards // self.num_lanes
        self._order = np.arange(len(sizes))
        if self.shuffled:
            self._order = random_order(len(sizes), self.seed, self.epoch, SHARD_ORDER)
        self._ends = np.cumsum(sizes[self._order])
        self._starts = self._ends - sizes[self._order]
        self._lane_starts = np.arange(self.num_lanes + 1) * total // self.num_lanes

    def refs(self, positions: Iterable[int]) -> list[SampleRef]:
        """The samples at the given global positions, in their order."""
        positions = list(positions)
        spots = np.asarray(positions, dtype=np.int64) * self.every
        if self.shuffled:
            lanes, spots = self._deal(spots)
            spots = np.array(list(map(self._shuffle, lanes.tolist(), spots.tolist())), dtype=np.int64)
        indices = np.searchsorted(self._ends, spots, side="right")
        shards, places = self._order[indices].tolist(), (spots - self._starts[indices]).tolist()
        return list(map(SampleRef, positions, shards, places))

    def _deal(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The lane of each position, and its spot in the sequence.

        Lanes cut the sequence as evenly as whole samples allow, so the last batch, of n samples, has one for each of n
        G-ths of the sequence that are spread evenly over it, and over the ranks.
        """
        each, (num_full, rest) = self.global_batch // self.num_lanes, divmod(self.num_samples, self.global_batch)
        batches, offsets = np.divmod(positions, self.global_batch)
        lanes, before = offsets // each, offsets % each
        last = batches == num_full
        lanes[last] = (((offsets[last] + 1) * self.global_batch - 1) // max(1, rest)) // each
        before[last] = offsets[last] - lanes[last] * each * rest // self.global_batch
        return lanes, self._lane_starts[lanes] + batches * each + before

    def shards_of_rank(self, rank: int, *, world_size: int) -> list[int]:
        """The shards that a rank opens in this epoch, in the order of the sequence."""
        first, end = 0, self.num_lanes
        if self.shuffled:
            first, end = rank * self.num_lanes // world_size, -(-(rank + 1) * self.num_lanes // world_size)
        start, stop = int(self._lane_starts[first]), int(self._lane_starts[end])
        found = range(*self._indices(start, stop)) if start < stop else ()
        return [int(self._order[index]) for index in found if self._ends[index] > self._starts[index]]

    def lanes_of_rank(self, *, world_size: int) -> int:
        """From how many lanes a rank reads, at most: it may share the first and the last with others."""
        shared = 2 if self.num_lanes % world_size else 0
        return min(self.num_lanes, self.num_lanes // world_size + shared)

    def advice(self, *, world_size: int) -> str:
        """A line that says what to change so that each rank has lanes of its own; empty where it has."""
        if self.num_lanes % world_size == 0:
            return ""
        better = range(world_size, max(SHUFFLE_SHARDS, world_size) + 1, world_size)
        return (
            f"\n{world_size:,} processes share {self.num_lanes:,} lanes and read some of each other's shards: "
            f"better give --shuffle-shards {max(lanes for lanes in better if self.global_batch % lanes == 0)}"
        )

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
    length = max(0, min(global_batch, num_samples - start))
    return range(start + rank * length // world_size, start + (rank + 1) * length // world_size)


class ShardOrder:
    def __init__(self, shard_sizes, *, seed, batch_size, shuffle_shards=SHUFFLE_SHARDS, shuffle=True, every=1):
        self.args = dict(
            shard_sizes=shard_sizes,
            seed=seed,
            global_batch=batch_size if shuffle else 1,
            shuffle_shards=shuffle_shards if shuffle else 4,
            shuffled=shuffle,
            every=every,
        )
        self._plans = {}
        self.num_samples = EpochPlan(**self.args).num_samples

    def copy(self):
        import copy

        c = copy.copy(self)
        c._plans = {}
        return c

    def refs(self, epoch, positions):
        if epoch not in self._plans:
            self._plans = {epoch: EpochPlan(epoch=epoch, **self.args)}
        return self._plans[epoch].refs(positions)

    def open_shards(self, world_size):
        p = EpochPlan(**self.args)
        return p.lanes_of_rank(world_size=world_size) * (p.window_shards + 1)
