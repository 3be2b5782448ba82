"""The order of an epoch: which sample is at which position.

A pure function of (shard sizes, seed, epoch, global batch). The shards are permuted; their samples, one shard after the
other, form the sequence. It is cut into L lanes of equal length, and each lane is shuffled within windows of a few of
its shards. Global batch t is positions [tG, (t+1)G) of the order, whatever the number of processes: G/L samples of the
first lane, then G/L of the second, and so on. Rank r of W takes the r-th of W equal slices of each batch. If W divides
L, these samples come from the r-th of W equal slices of the sequence: the rank opens its own shards and at most one
more.

Imports no torch. Random numbers are hashes (`captioner/shards/splitmix.py`), so no version of a library changes an
order. Shape suffixes: P positions, L lanes, S shards in permuted order.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from captioner.shards.splitmix import random_order

SHUFFLE_SHARDS = 256
UNSHUFFLED_SHARDS = 4  # open at once without a shuffle, since workers are at different batches
SHARD_ORDER, WINDOW_ORDER, SAMPLE_CHANCE, SAMPLE_RNG, SOURCE_SEED = range(5)  # streams of random numbers


class SampleRef(NamedTuple):
    """A sample's position in the epoch, the number of its shard, and its index in that shard."""

    position: int
    shard: int
    index_in_shard: int


class EpochOrder:
    """The order of one epoch in global batches of G samples.

    `shuffle_shards` is the number of shards that all processes together read from at once. L is the largest divisor of
    G that is not above it, and a window is `shuffle_shards // L` shards.

    With `shuffled=False` the sequence is in the order of the shards, and the order is every `every`-th sample of it.

    Example: 23 samples, G = 6, L = 3, permuted shards of 10, 6 and 7 samples, and windows of one shard. The lanes are
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
        self._ends_S = np.cumsum(sizes[self._permuted])  # as indices of the sequence
        self._starts_S = self._ends_S - sizes[self._permuted]
        self._lane_starts = np.arange(self.num_lanes + 1) * total // self.num_lanes  # the last one is the end
        last_indices_L = np.maximum(self._lane_starts[:-1], self._lane_starts[1:] - 1)
        self._first_shards_L = self._shards_at(self._lane_starts[:-1])
        self._last_shards_L = self._shards_at(last_indices_L)
        is_long_L = self._last_shards_L + 1 - self._first_shards_L > 2 * self.window_shards
        self._lane_shifts_L = np.where(is_long_L, np.arange(self.num_lanes) % self.window_shards, 0)
        # One window of each lane is stored: its number, its first index in the sequence, and its permutation.
        self._stored_windows_L = np.full(self.num_lanes, -1)
        self._stored_starts_L = np.zeros(self.num_lanes, dtype=np.int64)
        self._stored_permutations = np.empty((self.num_lanes, 0), dtype=np.int32)

    def __getstate__(self) -> dict[str, Any]:
        # without the permutations, which are large and quickly computed again
        return self.__dict__ | {"_stored_permutations": self._stored_permutations[:, :0]}

    def refs(self, positions: Iterable[int]) -> list[SampleRef]:
        """The samples at these positions of the order."""
        positions = list(positions)
        shards_P, indices_P = self.locate(np.asarray(positions, dtype=np.int64))
        return list(map(SampleRef, positions, shards_P.tolist(), indices_P.tolist()))

    def locate(self, positions_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The number of each sample's shard, and the sample's index in that shard (both P)."""
        indices_P = positions_P * self.every
        if self.shuffled:
            indices_P = self._shuffle_windows(*self._lanes_and_indices(positions_P))
        permuted_P = self._shards_at(indices_P)
        return self._permuted[permuted_P], indices_P - self._starts_S[permuted_P]

    def _shards_at(self, indices: np.ndarray) -> np.ndarray:
        """Which of the permuted shards (an index of `_permuted`) contains each index of the sequence."""
        return np.searchsorted(self._ends_S, indices, side="right")

    def _lanes_and_indices(self, positions_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The lane of each position, and its index in the sequence before the windows are shuffled (both P).

        The lengths of two lanes differ by at most one sample. So the samples of a shorter last batch are spread evenly
        over the lanes, and so over the ranks.
        """
        lane_batch, (num_full, rest) = self.global_batch // self.num_lanes, divmod(self.num_samples, self.global_batch)
        batches_P, offsets_P = np.divmod(positions_P, self.global_batch)
        lanes_P, indices_P = offsets_P // lane_batch, offsets_P % lane_batch
        if len(batches_P) and batches_P.max() >= num_full:
            last = batches_P == num_full
            lanes_P[last] = (((offsets_P[last] + 1) * self.global_batch - 1) // rest) // lane_batch
            indices_P[last] = offsets_P[last] - lanes_P[last] * lane_batch * rest // self.global_batch
        return lanes_P, self._lane_starts[lanes_P] + batches_P * lane_batch + indices_P

    def _shuffle_windows(self, lanes_P: np.ndarray, indices_P: np.ndarray) -> np.ndarray:
        """The indices of the sequence (P) whose samples the shuffle of the windows moves to the given indices."""
        windows_P = self._windows_at(lanes_P, self._shards_at(indices_P))
        sources_P = np.empty_like(indices_P)
        for window in np.unique(windows_P).tolist():  # mostly one or two
            is_in_window_P = windows_P == window
            lanes = lanes_P[is_in_window_P]
            self._store_permutations(lanes, window)
            starts = self._stored_starts_L[lanes]
            offsets = indices_P[is_in_window_P] - starts
            sources_P[is_in_window_P] = starts + self._stored_permutations[lanes, offsets]
        return sources_P

    def _store_permutations(self, lanes: np.ndarray, window: int) -> None:
        """Compute the permutation of window number `window` of each of these lanes, unless it is stored."""
        if not self._stored_permutations.size:
            stops = self._ends_S[np.minimum(np.arange(len(self._ends_S)) + self.window_shards, len(self._ends_S)) - 1]
            longest = min((stops - self._starts_S).max(), np.diff(self._lane_starts).max())
            self._stored_permutations = np.empty((self.num_lanes, longest), dtype=np.int32)
            self._stored_windows_L[:] = -1
        for lane in np.unique(lanes[self._stored_windows_L[lanes] != window]).tolist():
            start, stop = (int(bound) for bound in self._window_bounds(lane, window))
            order = random_order(stop - start, self.seed, self.epoch, WINDOW_ORDER, lane, window)
            self._stored_permutations[lane, : stop - start] = order
            self._stored_windows_L[lane], self._stored_starts_L[lane] = window, start

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
        """The largest number of lanes that a rank reads from, including up to two that it shares with other ranks."""
        shared = 2 if self.num_lanes % world_size else 0
        return min(self.num_lanes, self.num_lanes // world_size + shared)

    def better_window(self, *, world_size: int) -> int | None:
        """The best `shuffle_shards` with which no two ranks read from the same lane; None if they do not now."""
        if self.num_lanes % world_size == 0:
            return None
        better = range(world_size, max(SHUFFLE_SHARDS, world_size) + 1, world_size)
        return max(lanes for lanes in better if self.global_batch % lanes == 0)

    def _window_bounds(self, lanes: Any, windows: Any) -> tuple[Any, Any]:
        """The first index of the sequence in the given windows of lanes, and the index after the last one.

        Windows are `window_shards` shards long. In long lanes the first window is shorter, by a number of shards that
        differs from lane to lane, so that not all lanes open new shards at the same time.
        """
        firsts, lasts = self._first_shards_L[lanes], self._last_shards_L[lanes]
        starts = firsts - self._lane_shifts_L[lanes] + windows * self.window_shards
        window_firsts, window_lasts = np.maximum(firsts, starts), np.minimum(lasts, starts + self.window_shards - 1)
        return (
            np.maximum(self._lane_starts[lanes], self._starts_S[window_firsts]),
            np.minimum(self._lane_starts[lanes + 1], self._ends_S[window_lasts]),
        )

    def _windows_at(self, lanes: np.ndarray, permuted: np.ndarray) -> np.ndarray:
        """The number, within its lane, of the window that contains each permuted shard."""
        return (permuted - self._first_shards_L[lanes] + self._lane_shifts_L[lanes]) // self.window_shards

    def windows_of(self, shards: np.ndarray, indices: np.ndarray) -> tuple[np.ndarray, ...]:
        """The windows in which samples are shuffled, as arrays: lane, start and stop in the lane, lane's length."""
        permuted = np.argsort(self._permuted)[shards]
        lanes = np.searchsorted(self._lane_starts, self._starts_S[permuted] + indices, side="right") - 1
        starts, stops = self._window_bounds(lanes, self._windows_at(lanes, permuted))
        lane_starts = self._lane_starts[lanes]
        return lanes, starts - lane_starts, stops - lane_starts, self._lane_starts[lanes + 1] - lane_starts


def num_steps(num_samples: int, *, global_batch: int) -> int:
    """The number of optimizer steps in an epoch, including the last, shorter batch."""
    return -(-num_samples // global_batch)


def rank_positions(step: int, *, num_samples: int, global_batch: int, rank: int, world_size: int) -> range:
    """A rank's positions in the global batch of `step`; none if the last batch is too short.

    `world_size` divides `global_batch`.
    """
    start = step * global_batch
    length = max(0, min(global_batch, num_samples - start))
    return range(start + rank * length // world_size, start + (rank + 1) * length // world_size)


class ShardOrder:
    """The orders of all epochs, in global batches of `batch_size` samples.

    Without `shuffle` each epoch is every `every`-th sample in the order of the shards.
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
        """The number of samples in an epoch."""
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
        """The largest number of shards that one rank reads from at the same time."""
        return self._first.lanes_of_rank(world_size=world_size) * (self._first.window_shards + 1)
