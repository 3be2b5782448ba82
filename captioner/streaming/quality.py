"""How well an order mixes compared with a full shuffle, and what it opens before the first step. Imports no torch.

Inside a window the shuffle is uniform, so the expected figures follow from the bounds of the windows. No window is
shuffled here: it takes as long for 10^8 samples as for 10^5.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from captioner.shards.splitmix import random_bits
from captioner.streaming.mixture import MixtureOrder
from captioner.streaming.order import EpochOrder, ShardOrder

NUM_MEASURED = 1 << 14  # samples

Order = ShardOrder | MixtureOrder


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixing:
    """How well an epoch is mixed.

    `displacement` is the mean distance between a sample's index in storage and its position, 1 for a full shuffle.
    `near` is the fraction of neighbours in storage whose positions are at most a batch apart, and `near_shuffled` is
    that fraction in a full shuffle.
    """

    displacement: float
    near: float
    near_shuffled: float

    def __str__(self) -> str:
        return (
            f"samples move {self.displacement:.2f} times as far as in a full shuffle; {100 * self.near:.2g} % of "
            f"stored neighbours come within a batch's length of each other, in a full shuffle "
            f"{100 * self.near_shuffled:.2g} %"
        )


def measure_mixing(order: Order, *, batch_size: int, epoch: int = 0) -> Mixing:
    """The expected mixing of a shuffled order; for a mixture the mean over its sources, each in its first pass."""
    if isinstance(order, ShardOrder):
        return _measure(order.of_epoch(epoch), distance=batch_size)
    parts = np.array(order.parts) / sum(order.parts)
    given = order.counts(max(order.since.position, epoch * order.num_samples))
    found = [
        _measure(source.of_epoch(count // size), distance=max(1, round(part * batch_size)))
        for source, count, size, part in zip(order.orders, given, order.sizes, parts.tolist(), strict=True)
    ]
    return Mixing(
        displacement=float(parts @ [each.displacement for each in found]),
        near=float(parts @ [each.near for each in found]),
        near_shuffled=float(parts @ [each.near_shuffled for each in found]),
    )


def _measure(order: EpochOrder, *, distance: int) -> Mixing:
    """The mixing of an epoch; samples at most `distance` positions apart are near."""
    size, ends = order.num_samples, np.cumsum(order.shard_sizes)
    if size < 2:
        return Mixing(displacement=1.0, near=0.0, near_shuffled=0.0)
    stored = np.arange(min(size - 1, NUM_MEASURED))
    if size > NUM_MEASURED:
        stored = (random_bits(stored) % np.uint64(size - 1)).astype(np.int64)
    (lanes, starts, stops, lengths), (next_lanes, next_starts, *_) = (
        order.windows_of(shards, each - (ends - order.shard_sizes)[shards])
        for each in (stored, stored + 1)
        for shards in (np.searchsorted(ends, each, side="right"),)
    )
    here, first, last = (stored + 0.5) / size, starts / lengths, stops / lengths
    inside = (np.square(here - first) + np.square(last - here)) / (2 * (last - first))
    moved = np.where((first < here) & (here < last), inside, np.abs(here - (first + last) / 2))
    are_together = (lanes == next_lanes) & (starts == next_starts)
    near = near_in_full_shuffle(stops - starts, -(-distance // order.num_lanes))
    return Mixing(
        displacement=float(moved.mean() / ((np.square(here) + np.square(1 - here)) / 2).mean()),
        near=float((near * are_together).mean()),
        near_shuffled=float(near_in_full_shuffle(np.array([size]), distance)[0]),
    )


def near_in_full_shuffle(sizes: np.ndarray, distance: int) -> np.ndarray:
    """The fraction of neighbours that are at most `distance` apart in permutations of these sizes."""
    distances = np.minimum(distance, sizes - 1)
    return (2 * sizes - distances - 1) * distances / np.maximum(1, sizes * (sizes - 1))


def first_shards(order: Order, positions: Sequence[int], *, epoch: int = 0) -> list[int]:
    """The shards of the samples at these positions: those of a first batch are opened before the first step."""
    return sorted({shard for _, shard, _ in order.refs(epoch, positions)})
