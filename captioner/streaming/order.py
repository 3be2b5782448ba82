"""The order of an epoch: which sample is at which position.

A pure function of (shard sizes, seed, epoch, global batch). The shards are permuted, and their samples, one shard
after the other, form the sequence. It is cut into L lanes of equal length, and each lane is shuffled inside windows of
its own shards. Global batch t is positions [tG, (t+1)G) of the order, whatever the number of processes: G/L samples of
the first lane, then G/L of the second, and so on. Rank r of W takes the r-th of W equal slices of each batch. When W
divides L, these samples come from the r-th of W equal slices of the sequence: the rank opens its own shards and at most
one more.

Imports no torch. Random numbers are hashes (`captioner/shards/splitmix.py`): no new version of a library changes an
order. Shape suffixes: P positions, L lanes.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from captioner.shards.splitmix import random_order

SHUFFLE_SHARDS = 256
UNSHUFFLED_SHARDS = 4  # open at once without a shuffle: each worker is in another batch
SHARD_ORDER, WINDOW_ORDER, SAMPLE_CHANCE, SAMPLE_RNG, SOURCE_SEED = range(5)  # streams of random numbers


class SampleRef(NamedTuple):
    """A sample: its position in the epoch, the number of its shard, and its index in that shard."""

    position: int
    shard: int
    index_in_shard: int


class EpochOrder:
    """The order of one epoch over S samples in global batches of G.

    `shuffle_shards` is the number of shards that all processes together read from at once. L is the largest divisor of
    G that is not above it, and a window is `shuffle_shards // L` shards.

    `shuffled=False` keeps the order of the shards, and takes every `every`-th sample.

    Example with S = 23, G = 6, L = 3: permuted shards of 10, 6 and 7 samples, and windows of one shard. The lanes are
    the indices [0, 7), [7, 15) and [15, 23) of the sequence. Before the windows are shuffled, the batches are

        batch 0    0  1 |  7  8 | 15 16
        batch 1    2  3 |  9 10 | 17 18
        batch 2    4  5 | 11 12 | 19 20
        batch 3       6 | 13 14 | 21 22    (the last one, of 5 samples)

    The second lane has samples of two shards and so two windows, [7, 10) and [10, 15). The samples at 7, 8 and 9 are
    permuted, and so are those at 10 to 14.
    """

    def __init__(
        self,
        *,
        shard_sizes: Sequence[int],
        seed: int = 0,
        epoch: int = 0,
        global_batch: int = 1,
        shuffle_shards: int = SHUFFLE_SHARDS,
        shuffled: bool = True,
        every: int = 1,
    ) -> None:
        assert every == 1 or not shuffled
        self.shard_sizes, self.seed, self.epoch, self.global_batch = shard_sizes, seed, epoch, global_batch
        self.shuffled, self.every = shuffled, every
        sizes = np.asarray(shard_sizes, dtype=np.int64)
        total = int(sizes.sum())
        self.num_samples = -(-total // every)
        most = min(global_batch, shuffle_shards)
        self.num_lanes = next(lanes for lanes in range(most, 0, -1) if global_batch % lanes == 0)
        self.window_shards = shuffle_shards // self.num_lanes
        self._permuted = random_order(len(sizes), seed, epoch, SHARD_ORDER) if shuffled else np.arange(len(sizes))
        self._ends = np.cumsum(sizes[self._permuted])  # of the permuted shards, as indices of the sequence
        self._starts = self._ends - sizes[self._permuted]
        self._lane_starts = np.arange(self.num_lanes + 1) * total // self.num_lanes
        last_indices_L = np.maximum(self._lane_starts[:-1], self._lane_starts[1:] - 1)
        self._lane_firsts = self._shards_at(self._lane_starts[:-1])
        self._lane_lasts = self._shards_at(last_indices_L)
        are_long_L = self._lane_lasts + 1 - self._lane_firsts > 2 * self.window_shards
        self._lane_shifts = np.where(are_long_L, np.arange(self.num_lanes) % self.window_shards, 0)
        self._opened_L = np.full(self.num_lanes, -1)  # the window of each lane whose permutation is stored
        self._opened_starts_L = np.zeros(self.num_lanes, dtype=np.int64)
        self._permutations = np.empty((self.num_lanes, 0), dtype=np.int32)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_permutations": self._permutations[:, :0]}  # large, and quickly computed again

    def refs(self, positions: Iterable[int]) -> list[SampleRef]:
        """The sample at each of the global positions."""
        positions = list(positions)
        shards_P, indices_P = self.locate(np.asarray(positions, dtype=np.int64))
        return list(map(SampleRef, positions, shards_P.tolist(), indices_P.tolist()))

    def locate(self, positions_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The shard of the sample at each position, and the sample's index in it."""
        indices_P = positions_P * self.every
        if self.shuffled:
            indices_P = self._shuffle_windows(*self._lanes_and_indices(positions_P))
        permuted_P = self._shards_at(indices_P)
        return self._permuted[permuted_P], indices_P - self._starts[permuted_P]

    def _shards_at(self, indices: np.ndarray) -> np.ndarray:
        """Which of the permuted shards holds each index of the sequence."""
        return np.searchsorted(self._ends, indices, side="right")

    def _lanes_and_indices(self, positions_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The lane of each position, and its index in the sequence before the windows are shuffled.

        Lanes are as equal in length as whole samples allow. So the last batch, of n samples, has one sample of each of
        n G-ths of the sequence, spread evenly over lanes and ranks.
        """
        each, (num_full, rest) = self.global_batch // self.num_lanes, divmod(self.num_samples, self.global_batch)
        batches_P, offsets_P = np.divmod(positions_P, self.global_batch)
        lanes_P, indices_P = offsets_P // each, offsets_P % each
        if len(batches_P) and batches_P.max() >= num_full:
            last = batches_P == num_full
            lanes_P[last] = (((offsets_P[last] + 1) * self.global_batch - 1) // rest) // each
            indices_P[last] = offsets_P[last] - lanes_P[last] * each * rest // self.global_batch
        return lanes_P, self._lane_starts[lanes_P] + batches_P * each + indices_P

    def _shuffle_windows(self, lanes_P: np.ndarray, indices_P: np.ndarray) -> np.ndarray:
        """The index of the sequence that the shuffle of its window moves to each of the given indices."""
        windows_P = self._windows_at(lanes_P, self._shards_at(indices_P))
        found_P = np.empty_like(indices_P)
        for window in np.unique(windows_P).tolist():  # mostly one or two
            are_in = windows_P == window
            lanes = lanes_P[are_in]
            self._open_windows(lanes, window)
            starts = self._opened_starts_L[lanes]
            found_P[are_in] = starts + self._permutations[lanes, indices_P[are_in] - starts]
        return found_P

    def _open_windows(self, lanes_P: np.ndarray, window: int) -> None:
        """Compute the permutations of a window of these lanes; only the latest of each lane is stored."""
        if not self._permutations.size:
            stops = self._ends[np.minimum(np.arange(len(self._ends)) + self.window_shards, len(self._ends)) - 1]
            longest = min((stops - self._starts).max(), np.diff(self._lane_starts).max())
            self._permutations = np.empty((self.num_lanes, longest), dtype=np.int32)
            self._opened_L[:] = -1
        for lane in np.unique(lanes_P[self._opened_L[lanes_P] != window]).tolist():
            start, stop = (int(bound) for bound in self._window_bounds(lane, window))
            order = random_order(stop - start, self.seed, self.epoch, WINDOW_ORDER, lane, window)
            self._permutations[lane, : stop - start] = order
            self._opened_L[lane], self._opened_starts_L[lane] = window, start

    def shards_of_rank(self, rank: int, *, world_size: int) -> list[int]:
        """The shards that a rank opens in this epoch, in the order of the sequence."""
        first, end = 0, self.num_lanes
        if self.shuffled:
            first, end = rank * self.num_lanes // world_size, -(-(rank + 1) * self.num_lanes // world_size)
        start, stop = int(self._lane_starts[first]), int(self._lane_starts[end])
        if start == stop:
            return []
        first, last = self._shards_at(np.array([start, stop - 1])).tolist()
        return [shard for shard in self._permuted[first : last + 1].tolist() if self.shard_sizes[shard]]

    def lanes_of_rank(self, *, world_size: int) -> int:
        """From how many lanes a rank reads at most: other ranks may read from the first and the last of them too."""
        shared = 2 if self.num_lanes % world_size else 0
        return min(self.num_lanes, self.num_lanes // world_size + shared)

    def better_window(self, *, world_size: int) -> int | None:
        """The largest `shuffle_shards` with which no two ranks read from one lane; None if that holds already."""
        if self.num_lanes % world_size == 0:
            return None
        better = range(world_size, max(SHUFFLE_SHARDS, world_size) + 1, world_size)
        return max(lanes for lanes in better if self.global_batch % lanes == 0)

    def _window_bounds(self, lanes: Any, windows: Any) -> tuple[Any, Any]:
        """The first index of the sequence in the given windows of lanes, and the index after the last one.

        Windows are `window_shards` shards long. In long lanes the first window is shorter, by a number that differs
        from lane to lane, so that the lanes do not all open new shards at the same time.
        """
        firsts, lasts = self._lane_firsts[lanes], self._lane_lasts[lanes]
        starts = firsts - self._lane_shifts[lanes] + windows * self.window_shards
        window_firsts, window_lasts = np.maximum(firsts, starts), np.minimum(lasts, starts + self.window_shards - 1)
        return (
            np.maximum(self._lane_starts[lanes], self._starts[window_firsts]),
            np.minimum(self._lane_starts[lanes + 1], self._ends[window_lasts]),
        )

    def _windows_at(self, lanes: np.ndarray, permuted: np.ndarray) -> np.ndarray:
        """The number of the window of each lane that holds a permuted shard."""
        return (permuted - self._lane_firsts[lanes] + self._lane_shifts[lanes]) // self.window_shards

    def windows_of(self, shards: np.ndarray, indices: np.ndarray) -> tuple[np.ndarray, ...]:
        """The windows in which samples are shuffled: lane, start and stop inside the lane, and the lane's length."""
        permuted = np.argsort(self._permuted)[shards]
        lanes = np.searchsorted(self._lane_starts, self._starts[permuted] + indices, side="right") - 1
        starts, stops = self._window_bounds(lanes, self._windows_at(lanes, permuted))
        lane_starts = self._lane_starts[lanes]
        return lanes, starts - lane_starts, stops - lane_starts, self._lane_starts[lanes + 1] - lane_starts


def num_steps(num_samples: int, *, global_batch: int) -> int:
    """Optimizer steps of an epoch, the last partial batch included."""
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

    Without `shuffle` each epoch has the order of the shards, of which it takes every `every`-th sample.
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
        settings = {"global_batch": batch_size, "shuffle_shards": shuffle_shards, "seed": seed}
        if not shuffle:
            settings = {"shuffle_shards": UNSHUFFLED_SHARDS, "every": every}
        self._make = partial(EpochOrder, shard_sizes=shard_sizes, shuffled=shuffle, **settings)
        self._shuffle = shuffle
        self._first = self._current = self._make()

    @property
    def num_samples(self) -> int:
        """Samples of an epoch."""
        return self._first.num_samples

    def of_epoch(self, epoch: int) -> EpochOrder:
        """The order of one epoch."""
        if self._shuffle and self._current.epoch != epoch:
            self._current = self._make(epoch=epoch)
        return self._current

    def refs(self, epoch: int, positions: Sequence[int]) -> list[SampleRef]:
        """The samples at positions of an epoch."""
        return self.of_epoch(epoch).refs(positions)

    def open_shards(self, world_size: int) -> int:
        """How many shards one rank reads from at the same time, at most."""
        return self._first.lanes_of_rank(world_size=world_size) * (self._first.window_shards + 1)
