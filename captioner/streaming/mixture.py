"""The order of a weighted mixture of sources. Imports no torch.

A table of one period says from which source the sample at each position is. It is Tijdeman's solution of the chairman
assignment problem (1980): in every prefix the count of each source differs from its weight times the length by less
than one. A source's samples come in its own order, one pass after the other, also across the mixture's epochs.
"""

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache, partial
from math import gcd, isclose, isfinite, lcm
from typing import NamedTuple

import numpy as np

from captioner.errors import StreamingError
from captioner.shards.splitmix import random_bits
from captioner.streaming.dataset import Split
from captioner.streaming.order import SHUFFLE_SHARDS, SOURCE_SEED, SampleRef, ShardOrder

PERIOD = 1 << 14  # the longest period: weights are rounded to fractions of it


class Since(NamedTuple):
    """The position of the run from which the weights hold, and how many samples of each source came before it."""

    position: int
    counts: tuple[int, ...]


class MixtureOrder:
    """The order of a mixture in epochs of `epoch_samples`, by default as many as all sources have.

    `sources` are the shard sizes of each source; shard numbers continue from one source to the next. `weights` are
    rounded to parts of a period and hold from `since` on. The order inside a source does not depend on the weights.
    Raises StreamingError for weights that are not positive numbers and for sources without samples.
    """

    def __init__(
        self,
        sources: Sequence[Sequence[int]],
        *,
        weights: Sequence[float],
        seed: int,
        batch_size: int,
        epoch_samples: int | None = None,
        shuffle_shards: int = SHUFFLE_SHARDS,
        shuffle: bool = True,
        since: Since | None = None,
    ) -> None:
        if len(weights) != len(sources):
            raise StreamingError(f"there are {len(sources)} sources and {len(weights)} weights: give one for each")
        self.sizes = [sum(sizes) for sizes in sources]
        if not all(self.sizes):
            raise StreamingError(f"source {self.sizes.index(0) + 1} of the mixture holds no samples: leave it out")
        self.num_samples = sum(self.sizes) if epoch_samples is None else epoch_samples
        if not isinstance(self.num_samples, int) or self.num_samples < 1:
            raise StreamingError(f"epoch_samples is {epoch_samples}: give a whole number of 1 or more")
        self.parts = round_weights(weights)
        self.since = since or Since(0, (0,) * len(sources))
        if len(self.since.counts) != len(sources) or sum(self.since.counts) != self.since.position:
            raise StreamingError(f"{self.since} is not the history of a mixture of {len(sources)} sources")
        self._table, self._before = fill_period(self.parts)
        window = max(1, shuffle_shards // len(sources))
        seeds = random_bits(np.arange(len(sources)), seed, SOURCE_SEED).tolist()
        self.orders = [  # in one lane: a batch has few samples of a source, and they come from anywhere in its window
            ShardOrder(sizes, seed=own, batch_size=1, shuffle_shards=window, shuffle=shuffle)
            for sizes, own in zip(sources, seeds, strict=True)
        ]
        self._first_shards = np.cumsum([0, *map(len, sources)]).tolist()

    def refs(self, epoch: int, positions: Sequence[int]) -> list[SampleRef]:
        """The samples at positions of an epoch."""
        shards, indices = self.locate(epoch * self.num_samples + np.asarray(positions, dtype=np.int64))
        return list(map(SampleRef, positions, shards.tolist(), indices.tolist()))

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The shard of the sample at each position of the run, and the sample's index in it."""
        shards, indices = np.empty_like(positions), np.empty_like(positions)
        sources, numbers = self.assign(positions)
        for source, order in enumerate(self.orders):
            own = np.flatnonzero(sources == source)
            passes, inside = np.divmod(numbers[own], self.sizes[source])
            for each in np.unique(passes).tolist():
                of_pass = passes == each
                found = order.of_epoch(each).locate(inside[of_pass])
                shards[own[of_pass]], indices[own[of_pass]] = found[0] + self._first_shards[source], found[1]
        return shards, indices

    def assign(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source at each position of the run, and how many samples of that source came before it."""
        if len(positions) and positions.min() < self.since.position:
            raise StreamingError(
                f"position {positions.min():,} of the run is before position {self.since.position:,}, from which these "
                "weights hold: load a state from before the change"
            )
        periods, inside = np.divmod(positions - self.since.position, len(self._table))
        sources = self._table[inside]
        parts, counts = np.array(self.parts), np.array(self.since.counts)
        return sources, counts[sources] + periods * parts[sources] + self._before[inside]

    def counts(self, position: int) -> tuple[int, ...]:
        """How many of the first `position` samples of the run are from each source; from `since` on."""
        periods, inside = divmod(position - self.since.position, len(self._table))
        begun = np.bincount(self._table[:inside], minlength=len(self.parts)).tolist()
        return tuple(
            count + periods * part + more
            for count, part, more in zip(self.since.counts, self.parts, begun, strict=True)
        )

    def passes(self) -> list[float]:
        """How many passes an epoch makes over each source."""
        whole = sum(self.parts)
        return [part / whole * self.num_samples / size for part, size in zip(self.parts, self.sizes, strict=True)]

    def __str__(self) -> str:
        """Each source's weight, and how much of it an epoch reads."""
        whole, facts = sum(self.parts), zip(self.parts, self.sizes, self.passes(), strict=True)
        return "; ".join(
            f"{part / whole:.2%} from source {number} ({size:,} samples, {passes:.2f} passes an epoch)"
            for number, (part, size, passes) in enumerate(facts, start=1)
        )

    def open_shards(self, world_size: int) -> int:
        """How many shards one rank reads from at the same time, at most: each rank reads from all sources' shards."""
        return sum(order.open_shards(1) for order in self.orders)


def round_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """Weights as whole numbers of at least 1 without a common divisor.

    Their sum is the length of the period. If the shares are fractions with a common denominator of at most PERIOD, the
    numbers are exact: 70 and 30, or 0.7 and 0.3, are 7 and 3. Others are rounded by largest remainders. Raises
    StreamingError for weights that are not positive numbers, and for one that is too small compared with the others.
    """
    if not all(isfinite(weight) and weight > 0 for weight in weights):
        raise StreamingError(f"the weights are {list(weights)}: give numbers above 0")
    whole = sum(weights)
    shares = [weight / whole for weight in weights]
    fractions = [Fraction(share).limit_denominator(PERIOD) for share in shares]
    period = lcm(*(fraction.denominator for fraction in fractions))
    if period > PERIOD or not all(map(partial(isclose, rel_tol=1e-12), fractions, shares)):
        period = PERIOD
    exact = [share * period for share in shares]
    parts = [max(1, int(part)) for part in exact]
    left = round(sum(exact)) - sum(parts)
    if left < 0:
        raise StreamingError(f"the weights {list(weights)} differ by more than {PERIOD} times: leave out the smallest")
    by_remainder = sorted(range(len(parts)), key=lambda source: parts[source] - exact[source])
    for source in by_remainder[:left]:
        parts[source] += 1
    divisor = gcd(*parts)
    return tuple(part // divisor for part in parts)


@lru_cache(maxsize=16)
def fill_period(parts: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The source at each position of a period, and how often that source came before in the period.

    At each position the source with the earliest deadline is chosen, of those whose turn may have come (Tijdeman 1980).
    There always is one, because what is due to all sources adds up to `length`.
    """
    length, num_sources = sum(parts), len(parts)
    table, before = np.zeros(length, dtype=np.int64), np.zeros(length, dtype=np.int64)
    counts = [0] * num_sources
    slack = 2 * max(1, num_sources - 1)  # in halves of 1 / (K - 1), so that all numbers are whole
    for position in range(length):
        due = [(position + 1) * part - count * length for part, count in zip(parts, counts, strict=True)]
        ready = [source for source in range(num_sources) if due[source] * slack >= length]
        chosen = min(ready, key=lambda source: ((slack - 1) * length - due[source] * slack) / parts[source])
        table[position], before[position] = chosen, counts[chosen]
        counts[chosen] += 1
    return table, before


def make_order(
    split: Split,
    *,
    weights: Sequence[float] | None,
    seed: int,
    batch_size: int,
    shuffle_shards: int = SHUFFLE_SHARDS,
    shuffle: bool = True,
    every: int = 1,
    epoch_samples: int | None = None,
    since: Since | None = None,
) -> ShardOrder | MixtureOrder:
    """The order of a split: its folders read as one, or mixed by weights. Raises StreamingError."""
    if not weights:
        return ShardOrder(
            split.sizes, seed=seed, batch_size=batch_size, shuffle_shards=shuffle_shards, shuffle=shuffle, every=every
        )
    return MixtureOrder(
        [[entry.samples for entry in manifest.shards] for manifest in split.manifests],
        weights=weights,
        seed=seed,
        batch_size=batch_size,
        epoch_samples=epoch_samples,
        shuffle_shards=shuffle_shards,
        shuffle=shuffle,
        since=since,
    )
