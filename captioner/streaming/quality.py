"""How well an order mixes, against a full shuffle, and what it opens before the first step. Imports no torch.

A window is shuffled fully, so what is expected of an order follows from where its windows begin and end: no window is
shuffled here, and it takes as long for 10^8 samples as for 10^5.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from captioner.shards.splitmix import random_bits
from captioner.streaming.mixture import MixtureOrder
from captioner.streaming.order import EpochOrder, ShardOrder

LOOKED_AT = 1 << 14  # samples

Order = ShardOrder | MixtureOrder


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixing:
    """How well an epoch is mixed.

    `displacement` is the mean distance between where a sample is stored and where it comes, 1 for a full shuffle.
    `near` is the part of the neighbours in storage that come within a batch's length of each other, and `near_shuffled`
    that part in a full shuffle.
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
    """What is expected of a shuffled order; of a mixture the mean of its sources, each in the pass it begins with."""
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
    """The mixing of an epoch, with neighbours that come at most `distance` apart."""
    size, ends = order.num_samples, np.cumsum(order.shard_sizes)
    if size < 2:
        return Mixing(displacement=1.0, near=0.0, near_shuffled=0.0)
    stored = np.arange(min(size - 1, LOOKED_AT))
    if size > LOOKED_AT:
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
    """For permutations of so many samples the part of neighbours that come at most `distance` apart."""
    distances = np.minimum(distance, sizes - 1)
    return (2 * sizes - distances - 1) * distances / np.maximum(1, sizes * (sizes - 1))


def first_shards(order: Order, positions: Sequence[int], *, epoch: int = 0) -> list[int]:
    """The shards that samples at these positions are in, those of a first batch say; they are opened before a step."""
    return sorted({shard for _, shard, _ in order.refs(epoch, positions)})
