"""How well an order mixes, against a full shuffle, and what it opens before the first step. Imports no torch.

Both measures look at a bounded number of positions: they take as long for 10^8 samples as for 10^5.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from captioner.streaming.mixture import MixtureOrder
from captioner.streaming.order import ShardOrder

LOOKED_AT = 1 << 13  # positions

Order = ShardOrder | MixtureOrder


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixing:
    """How well an epoch is mixed.

    `displacement` is the mean distance between where a sample is stored and where it comes, 1 for a full shuffle.
    `near` is the part of the samples whose next neighbour in storage comes within a batch's length of them, and
    `near_shuffled` that part in a full shuffle.
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


def measure_mixing(order: Order, shard_sizes: Sequence[int], *, batch_size: int, epoch: int = 0) -> Mixing:
    """How well an epoch is mixed; `shard_sizes` are those of all shards, in order."""
    num_samples = order.num_samples
    starts = np.cumsum([0, *shard_sizes])
    length = min(batch_size, num_samples)
    displacements: list[np.ndarray] = []
    near = looked_at = 0
    for first in _stretches(num_samples, length):
        before, after = max(0, first - length), min(num_samples, first + 2 * length)
        refs = order.refs(epoch, range(before, after))
        stored = np.array([starts[shard] + place for _, shard, place in refs])
        own = slice(first - before, first - before + min(length, num_samples - first))
        here = np.arange(before, after)[own]
        displacements.append(np.abs(stored[own] / starts[-1] - here / num_samples))
        place_of = dict(zip(stored.tolist(), range(before, after), strict=True))
        found = [place_of.get(place + 1) for place in stored[own].tolist()]
        near += sum(
            other is not None and abs(other - place) <= length
            for other, place in zip(found, here.tolist(), strict=True)
        )
        looked_at += len(here)
    return Mixing(
        displacement=3 * float(np.concatenate(displacements).mean()),
        near=near / looked_at,
        near_shuffled=near_in_full_shuffle(num_samples, length),
    )


def _stretches(num_samples: int, length: int) -> list[int]:
    """Where the stretches begin that are looked at: all of them, or some at equal distances."""
    all_of_them = range(0, num_samples, length)
    count = min(len(all_of_them), max(8, LOOKED_AT // length))
    return [all_of_them[(2 * number + 1) * len(all_of_them) // (2 * count)] for number in range(count)]


def near_in_full_shuffle(num_samples: int, distance: int) -> float:
    """The part of a permutation's samples whose next neighbour comes at most `distance` before or after them."""
    distance = min(distance, num_samples - 1)
    return (2 * num_samples - distance - 1) * distance / num_samples**2


def first_shards(order: Order, positions: Sequence[int], *, epoch: int = 0) -> list[int]:
    """The shards that samples at these positions are in, those of a first batch say; they are opened before a step."""
    return sorted({shard for _, shard, _ in order.refs(epoch, positions)})
