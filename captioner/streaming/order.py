"""The order of an epoch: which sample stands at which position.

A pure function of (shard sizes, seed, epoch, global batch). The shards are permuted and their sequence of samples is
cut into L equal stretches, the lanes; each lane is shuffled inside its own windows of shards. Global batch t is
positions [tG, (t+1)G) of the order, whatever the number of processes: G/L samples of the first lane, then as many of
the second, and so on. Rank r of W takes the r-th of W equal parts of each batch. When W divides L, that comes from the
r-th of W equal parts of the sequence: the rank opens its part of the shards and at most one more.

Imports no torch. Random numbers are hashes (`captioner/shards/splitmix.py`): no library's new version changes an order.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from captioner.shards.splitmix import random_order

SHUFFLE_SHARDS = 256
UNSHUFFLED_SHARDS = 4  # that are read from at once in the shards' own order: each worker is in another batch
SHARD_ORDER, WINDOW_ORDER, SAMPLE_CHANCE, SAMPLE_RNG, SOURCE_SEED = range(5)  # the streams of random numbers


class SampleRef(NamedTuple):
    """A sample's place: global position in the epoch, shard number, place in the shard."""

    position: int
    shard: int
    place: int


@dataclass(kw_only=True, slots=True)
class EpochOrder:
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
    _lane_firsts: np.ndarray = field(init=False)
    _lane_lasts: np.ndarray = field(init=False)
    _lane_shifts: np.ndarray = field(init=False)
    _windows: dict[int, dict[int, tuple[int, np.ndarray]]] = field(init=False, default_factory=dict)

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
        bounds = (self._lane_starts[:-1], np.maximum(self._lane_starts[:-1], self._lane_starts[1:] - 1))
        self._lane_firsts, self._lane_lasts = (np.searchsorted(self._ends, each, side="right") for each in bounds)
        are_long = self._lane_lasts + 1 - self._lane_firsts > 2 * self.window_shards
        self._lane_shifts = np.where(are_long, np.arange(self.num_lanes) % self.window_shards, 0)

    def refs(self, positions: Iterable[int]) -> list[SampleRef]:
        """The samples at the given global positions, in their order."""
        positions = list(positions)
        shards, places = self.locate(np.asarray(positions, dtype=np.int64))
        return list(map(SampleRef, positions, shards.tolist(), places.tolist()))

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The shards, and the places in them, of the samples at the given positions."""
        spots = positions * self.every
        if self.shuffled:
            spots = self._shuffle(*self._deal(spots))
        indices = np.searchsorted(self._ends, spots, side="right")
        return self._order[indices], spots - self._starts[indices]

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

    def better_window(self, *, world_size: int) -> int | None:
        """The most `shuffle_shards` with which each rank has lanes of its own; None where it has."""
        if self.num_lanes % world_size == 0:
            return None
        better = range(world_size, max(SHUFFLE_SHARDS, world_size) + 1, world_size)
        return max(lanes for lanes in better if self.global_batch % lanes == 0)

    def _shuffle(self, lanes: np.ndarray, spots: np.ndarray) -> np.ndarray:
        """The spots of the sequence that the windows' shuffles put at `spots`."""
        indices = np.searchsorted(self._ends, spots, side="right")
        windows = self._number(lanes, indices) * self.num_lanes + lanes
        by_window = np.argsort(windows, kind="stable")
        sorted_windows = windows[by_window]
        bounds = [*np.flatnonzero(np.diff(sorted_windows, prepend=-1)).tolist(), len(spots)]
        found = np.empty_like(spots)
        for first, end in pairwise(bounds):
            own = by_window[first:end]
            number, lane = divmod(int(sorted_windows[first]), self.num_lanes)
            start, order = self._window(lane, number)
            found[own] = start + order[spots[own] - start]
        return found

    def _window(self, lane: int, number: int) -> tuple[int, np.ndarray]:
        """Where a window starts, and its order; a lane's last two are kept."""
        kept = self._windows.setdefault(lane, {})
        window = kept.get(number)
        if window is None:
            if len(kept) > 1:
                del kept[next(iter(kept))]
            window = kept[number] = self._open_window(lane, number)
        return window

    def _open_window(self, lane: int, number: int) -> tuple[int, np.ndarray]:
        """Window `number` of a lane: its start, and its order."""
        start, stop = (int(each) for each in self._bounds(lane, number))
        return start, random_order(stop - start, self.seed, self.epoch, WINDOW_ORDER, lane, number).astype(np.int32)

    def _bounds(self, lanes: Any, numbers: Any) -> tuple[Any, Any]:
        """Where windows of lanes begin and end, `window_shards` shards long.

        In long lanes the first window is shorter by a number that differs from lane to lane, so that they do not all
        want new shards at once.
        """
        firsts, lasts = self._lane_firsts[lanes], self._lane_lasts[lanes]
        starts = firsts - self._lane_shifts[lanes] + numbers * self.window_shards
        window_firsts, window_lasts = np.maximum(firsts, starts), np.minimum(lasts, starts + self.window_shards - 1)
        return (
            np.maximum(self._lane_starts[lanes], self._starts[window_firsts]),
            np.minimum(self._lane_starts[lanes + 1], self._ends[window_lasts]),
        )

    def _number(self, lanes: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """The number of the window of each lane that holds a shard of the permuted ones."""
        return (indices - self._lane_firsts[lanes] + self._lane_shifts[lanes]) // self.window_shards

    def windows_of(self, shards: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, ...]:
        """The windows that samples are shuffled in: lane, start and end inside the lane, and the lane's length."""
        indices = np.argsort(self._order)[shards]
        lanes = np.searchsorted(self._lane_starts, self._starts[indices] + places, side="right") - 1
        starts, stops = self._bounds(lanes, self._number(lanes, indices))
        lane_starts = self._lane_starts[lanes]
        return lanes, starts - lane_starts, stops - lane_starts, self._lane_starts[lanes + 1] - lane_starts

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
    """The order of all epochs over the samples of shards, in global batches of `batch_size`.

    Without `shuffle` the shards' own, in every epoch, of `every` so many neighbours the first.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int],
        *,
        seed: int,
        batch_size: int,
        shuffle_shards: int = SHUFFLE_SHARDS,
        shuffle: bool = True,
        every: int = 1,
    ) -> None:
        if shuffle:
            self._first = EpochOrder(
                shard_sizes=shard_sizes, seed=seed, global_batch=batch_size, shuffle_shards=shuffle_shards
            )
        else:
            self._first = EpochOrder(
                shard_sizes=shard_sizes, shuffle_shards=UNSHUFFLED_SHARDS, shuffled=False, every=every
            )
        self._shuffle = shuffle
        self._current = self._first

    @property
    def num_samples(self) -> int:
        """Samples of an epoch."""
        return self._first.num_samples

    def of_epoch(self, epoch: int) -> EpochOrder:
        """The order of one epoch."""
        if self._shuffle and self._current.epoch != epoch:
            self._current = replace(self._first, epoch=epoch)
        return self._current

    def refs(self, epoch: int, positions: Sequence[int]) -> list[SampleRef]:
        """The samples at positions of an epoch."""
        return self.of_epoch(epoch).refs(positions)

    def open_shards(self, world_size: int) -> int:
        """Shards that one rank reads from at the same time, at most."""
        return self._first.lanes_of_rank(world_size=world_size) * (self._first.window_shards + 1)
