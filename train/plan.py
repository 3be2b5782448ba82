"""The epoch plan: which sample stands at which position of an epoch. Imports no torch.

A pure function of (shard sizes, seed, epoch). The shards are permuted and their sequence of samples is cut into L
equal stretches, the lanes; each lane is shuffled inside its own windows of `WINDOW_SHARDS` shards. Position p of the
global order comes from lane p mod L. Global batch t is positions [tG, (t+1)G) whatever the number of processes;
rank r of W takes those with p mod W = r, so it opens about 1/W of the shards when W divides L.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

WINDOW_SHARDS = 8
LANE_ORDER = 1  # keeps the lanes' random streams apart from the shards' one


@dataclass(frozen=True, slots=True)
class SampleRef:
    """A sample's place: global position in the epoch, shard number in the manifest, place in the shard."""

    position: int
    shard: int
    place: int


@dataclass(kw_only=True, slots=True)
class EpochPlan:
    """The global order of one epoch over S samples; `shuffled=False` keeps the manifest's order (for evaluation)."""

    shard_sizes: Sequence[int]
    seed: int = 0
    epoch: int = 0
    num_lanes: int = 64
    shuffled: bool = True
    num_samples: int = field(init=False)
    _order: np.ndarray = field(init=False)
    _ends: np.ndarray = field(init=False)
    _windows: dict[int, tuple[int, int, np.ndarray]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        sizes = np.asarray(self.shard_sizes, dtype=np.int64)
        self.num_samples = int(sizes.sum())
        rng = np.random.default_rng([self.seed, self.epoch])
        self._order = rng.permutation(len(sizes)) if self.shuffled else np.arange(len(sizes))
        self._ends = np.cumsum(sizes[self._order])
        if not self.shuffled:
            self.num_lanes = 1

    def ref(self, position: int) -> SampleRef:
        """The sample at a global position."""
        lane, place_in_lane = position % self.num_lanes, position // self.num_lanes
        spot = self._lane_start(lane) + place_in_lane
        if self.shuffled:
            start, _, permutation = self._window(lane, spot)
            spot = start + int(permutation[spot - start])
        return self._locate(spot, position=position)

    def refs(self, positions: Iterator[int] | range) -> list[SampleRef]:
        """The samples at the given global positions, in their order."""
        return [self.ref(position) for position in positions]

    def _lane_start(self, lane: int) -> int:
        """Where a lane starts in the sequence of all samples; the first S mod L lanes hold one more."""
        base, longer = divmod(self.num_samples, self.num_lanes)
        return lane * base + min(lane, longer)

    def _window(self, lane: int, spot: int) -> tuple[int, int, np.ndarray]:
        """The part of a lane, WINDOW_SHARDS shards long, around `spot`: its start, end and permutation."""
        cached = self._windows.get(lane)
        if cached is not None and cached[0] <= spot < cached[1]:
            return cached
        lane_start, lane_end = self._lane_start(lane), self._lane_start(lane + 1)
        first_shard = int(np.searchsorted(self._ends, lane_start, side="right"))
        number = (int(np.searchsorted(self._ends, spot, side="right")) - first_shard) // WINDOW_SHARDS
        first, last = first_shard + number * WINDOW_SHARDS, first_shard + (number + 1) * WINDOW_SHARDS
        start = max(lane_start, int(self._ends[first - 1]) if first else 0)
        end = min(lane_end, int(self._ends[min(last, len(self._ends)) - 1]))
        rng = np.random.default_rng([self.seed, self.epoch, LANE_ORDER, lane, number])
        self._windows[lane] = (start, end, rng.permutation(end - start))
        return self._windows[lane]

    def _locate(self, spot: int, *, position: int) -> SampleRef:
        """The shard and place that hold a spot of the sequence of all samples."""
        index = int(np.searchsorted(self._ends, spot, side="right"))
        start = int(self._ends[index - 1]) if index else 0
        return SampleRef(position, int(self._order[index]), spot - start)


def num_steps(num_samples: int, *, global_batch: int) -> int:
    """Optimizer steps of an epoch; the last partial batch counts."""
    return -(-num_samples // global_batch)


def rank_positions(step: int, *, num_samples: int, global_batch: int, rank: int, world_size: int) -> range:
    """The global positions of step `step` that belong to `rank`; empty when the last batch is too short for it.

    `world_size` divides `global_batch`.
    """
    start = step * global_batch
    return range(start + rank, min(start + global_batch, num_samples), world_size)
