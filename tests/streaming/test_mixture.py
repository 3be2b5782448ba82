"""The laws of weighted mixtures, and how well orders mix."""

import hashlib
import json
from collections import Counter
from fractions import Fraction
from itertools import count

import numpy as np
import pytest
from clock import cpu_seconds
from hypothesis import given, settings
from hypothesis import strategies as st

from captioner.errors import StreamingError
from captioner.streaming.mixture import PERIOD, MixtureOrder, Since, fill_period, round_weights
from captioner.streaming.order import ShardOrder, rank_positions
from captioner.streaming.quality import first_shards, measure_mixing, near_in_full_shuffle

WEIGHTS = st.lists(st.floats(0.01, 100), min_size=1, max_size=6)
SIZES = st.lists(st.integers(1, 30), min_size=1, max_size=4)


def mixture(sources: list[list[int]], weights: list[float], **options: object) -> MixtureOrder:
    """A mixture of global batches of 48."""
    return MixtureOrder(sources, **{"weights": weights, "seed": 3, "batch_size": 48} | options)  # type: ignore[arg-type]


# ---- the period -------------------------------------------------------------------------------------------


@pytest.mark.slow
@given(weights=WEIGHTS)
@settings(max_examples=60, deadline=None)
def test_in_every_prefix_and_window_each_source_has_its_part(weights: list[float]) -> None:
    parts = round_weights(weights)
    table, before = fill_period(parts)
    length = sum(parts)
    assert PERIOD % length == 0 or length <= PERIOD
    twice = np.concatenate((table, table))
    for source, part in enumerate(parts):
        is_source = twice == source
        counts = np.concatenate(([0], np.cumsum(is_source)))
        ahead = counts - np.arange(2 * length + 1) * part / length
        assert np.abs(ahead).max() < 1  # so no window is off by 2 or more
        assert counts[length] == part
        assert (before[table == source] == np.arange(part)).all()


@pytest.mark.parametrize(
    "parts",
    [(1, 1), (1, 1, 1, 1, 1, 1), (1, 16383), (5461, 5461, 5462), (1, 2, 3, 5, 8, 13), (7, 1, 1, 1, 1, 1), (3, 3, 2)],
)
def test_the_bound_is_tijdemans_in_exact_numbers(parts: tuple[int, ...]) -> None:
    table, _ = fill_period(parts)
    length, counts = sum(parts), [0] * len(parts)
    worst = Fraction(0)
    for position, chosen in enumerate(table.tolist(), start=1):
        counts[chosen] += 1
        worst = max(
            worst, *(abs(count - Fraction(position * part, length)) for count, part in zip(counts, parts, strict=True))
        )
    assert worst <= 1 - Fraction(1, 2 * len(parts) - 2)


def test_weights_are_rounded_to_parts_and_simple_shares_are_kept() -> None:
    assert round_weights([1, 3]) == (1, 3)
    assert round_weights([2, 6]) == (1, 3)
    assert round_weights([0.25, 0.75]) == (1, 3)
    assert round_weights([0.7, 0.3]) == round_weights([70, 30]) == (7, 3)
    assert round_weights([1 / 3, 2 / 3]) == (1, 2)
    assert round_weights([5]) == (1,)
    parts = round_weights([1 / 3, 1 / 3, 1 / 3 + 1e-9])
    assert max(parts) - min(parts) <= 1
    assert min(round_weights([1e-9, 1])) == 1
    for weight in (0, -1, float("nan"), float("inf")):
        with pytest.raises(StreamingError, match="above 0"):
            round_weights([weight, 1])


def test_a_period_of_six_sources_is_filled_at_once() -> None:
    parts = round_weights([0.1234, 0.2345, 0.3456, 0.0567, 0.0678, 0.1720])
    assert cpu_seconds(lambda: (fill_period.cache_clear(), fill_period(parts))) < 0.2


# ---- the arithmetic ---------------------------------------------------------------------------------------


@given(sizes=st.lists(st.integers(1, 10**8), min_size=1, max_size=6), data=st.data(), start=st.integers(0, 10**12))
@settings(max_examples=60, deadline=None)
def test_a_seek_finds_the_same_numbers_as_counting(sizes: list[int], data: st.DataObject, start: int) -> None:
    weights = data.draw(st.lists(st.floats(0.05, 20), min_size=len(sizes), max_size=len(sizes)))
    order = mixture([[size] for size in sizes], weights)
    counts = list(order.counts(start))
    sources, numbers = order.assign(np.arange(start, start + 200))
    for source, number in zip(sources.tolist(), numbers.tolist(), strict=True):
        assert number == counts[source]
        counts[source] += 1
    assert tuple(counts) == order.counts(start + 200)
    whole = sum(order.parts)
    assert all(
        abs(count - (start + 200) * part / whole) < 1.001 for count, part in zip(counts, order.parts, strict=True)
    )


@given(sources=st.lists(SIZES, min_size=1, max_size=4), data=st.data())
@settings(max_examples=40, deadline=None)
def test_passes_are_complete_before_they_repeat_and_the_same_for_any_ranks(
    sources: list[list[int]], data: st.DataObject
) -> None:
    weights = data.draw(st.lists(st.floats(0.2, 5), min_size=len(sources), max_size=len(sources)))
    world_size = data.draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16]))
    order = mixture(sources, weights, shuffle_shards=data.draw(st.integers(1, 8)))
    firsts = np.cumsum([0, *map(len, sources)])
    run: list[tuple[int, int]] = []
    for epoch in range(4):
        for step in range(-(-order.num_samples // 48)):
            for rank in range(world_size):
                positions = rank_positions(
                    step, num_samples=order.num_samples, global_batch=48, rank=rank, world_size=world_size
                )
                run += [(shard, place) for _, shard, place in order.refs(epoch, positions)]
    assert run == [
        (shard, place) for epoch in range(4) for _, shard, place in order.refs(epoch, range(order.num_samples))
    ]
    for source, sizes in enumerate(sources):
        own = [(shard, place) for shard, place in run if firsts[source] <= shard < firsts[source + 1]]
        size = sum(sizes)
        for first in range(0, len(own), size):
            found = Counter(own[first : first + size])
            assert set(found.values()) <= {1}
            assert len(found) == min(size, len(own) - first)
            assert all(place < sizes[shard - firsts[source]] for shard, place in found)


@given(position=st.integers(0, 300), old=st.lists(st.floats(0.2, 5), min_size=3, max_size=3), data=st.data())
@settings(max_examples=40, deadline=None)
def test_new_weights_change_only_what_comes_after_and_break_no_pass(
    position: int, old: list[float], data: st.DataObject
) -> None:
    sources = [[11, 7], [20], [5, 5, 13]]
    before = mixture(sources, old)
    new = data.draw(st.lists(st.floats(0.2, 5), min_size=3, max_size=3))
    after = mixture(sources, new, since=Since(position, before.counts(position)))
    assert after.counts(position) == before.counts(position)
    first, last = before.assign(np.arange(position)), after.assign(np.arange(position, position + 400))
    for source in range(3):
        numbers = np.concatenate((first[1][first[0] == source], last[1][last[0] == source]))
        assert numbers.tolist() == list(range(len(numbers)))
    whole = sum(after.parts)
    for length in range(1, 400, 7):
        given = np.array(after.counts(position + length)) - np.array(after.counts(position))
        assert np.abs(given - length * np.array(after.parts) / whole).max() < 1
    assert [
        order.locate(np.arange(9))[0].shape for order in (after.orders[0].of_epoch(0), before.orders[0].of_epoch(0))
    ]
    assert after.orders[0].refs(1, range(18)) == before.orders[0].refs(1, range(18))


@given(old=WEIGHTS, position=st.integers(0, 10**9), data=st.data())
@settings(max_examples=30, deadline=None)
def test_a_window_over_new_weights_is_off_by_less_than_three(
    old: list[float], position: int, data: st.DataObject
) -> None:
    new = data.draw(st.lists(st.floats(0.01, 100), min_size=len(old), max_size=len(old)))
    sources = [[1000]] * len(old)
    before = mixture(sources, old)
    after = mixture(sources, new, since=Since(position, before.counts(position)))
    for _ in range(20):
        back, on = data.draw(st.integers(0, min(position, 10**5))), data.draw(st.integers(0, 10**5))
        given = np.array(after.counts(position + on)) - np.array(before.counts(position - back))
        due = back * np.array(before.parts) / sum(before.parts) + on * np.array(after.parts) / sum(after.parts)
        # the end of the old is off by less than 2, the new's beginning by less than 1
        assert np.abs(given - due).max() < 3
        assert (
            np.abs(
                np.array(after.counts(position + on))
                - after.since.counts
                - on * np.array(after.parts) / sum(after.parts)
            ).max()
            < 1
        )


@pytest.mark.parametrize("start", [0, 10**9, 10**15])
def test_a_seek_costs_the_same_anywhere(start: int) -> None:
    order = mixture([[100] * 10, [1000] * 5], [1, 2])
    order.refs(0, range(48))
    starts = count(start, 10**7)  # each try seeks elsewhere: nothing is computed yet

    def seek() -> None:
        first = next(starts)
        order.locate(np.arange(first, first + 48))
        order.counts(first)

    assert cpu_seconds(seek) < 0.1


@given(
    weights=st.lists(st.floats(0.2, 5), min_size=2, max_size=2),
    other=st.lists(st.floats(0.2, 5), min_size=2, max_size=2),
)
@settings(max_examples=20, deadline=None)
def test_the_order_of_a_source_does_not_depend_on_the_weights(weights: list[float], other: list[float]) -> None:
    sources = [[11, 7], [9, 9, 13]]
    runs = [mixture(sources, each).locate(np.arange(400))[:2] for each in (weights, other)]
    for first, end in ((0, 2), (2, 5)):
        of_one, of_other = (
            [pair for pair in zip(*map(np.ndarray.tolist, run), strict=True) if first <= pair[0] < end] for run in runs
        )
        length = min(len(of_one), len(of_other))
        assert length
        assert of_one[:length] == of_other[:length]


def test_equal_sources_do_not_move_in_lockstep() -> None:
    order = mixture([[50, 50], [50, 50]], [1, 1])
    refs = order.refs(0, range(200))
    first = [(shard, place) for _, shard, place in refs if shard < 2]
    second = [(shard - 2, place) for _, shard, place in refs if shard >= 2]
    assert len(first) == len(second) == 100
    assert sum(one == other for one, other in zip(first, second, strict=True)) < 10


def test_the_order_of_a_mixture_is_what_it_was_at_commit_5210727() -> None:
    order = MixtureOrder(
        [[40] * 9, [7, 0, 21] * 8],
        weights=[1, 3],
        seed=7,
        batch_size=32,
        epoch_samples=100,
        since=Since(150, (100, 50)),
    )
    refs = json.dumps([*order.refs(2, range(100)), *order.refs(5, range(100))])
    assert hashlib.sha256(refs.encode()).hexdigest().startswith("c2565ea72ea885e3")


def test_arguments_that_make_no_mixture_are_refused() -> None:
    with pytest.raises(StreamingError, match="2 sources and 1 weights"):
        mixture([[1], [2]], [1])
    with pytest.raises(StreamingError, match="source 2 of the mixture holds no samples"):
        mixture([[1], [0]], [1, 1])
    with pytest.raises(StreamingError, match="epoch_samples is 0"):
        mixture([[1]], [1], epoch_samples=0)


# ---- how well orders mix ----------------------------------------------------------------------------------


def by_brute_force(order: ShardOrder, sizes: list[int], length: int) -> tuple[float, float]:
    """Mean displacement against a full shuffle's, and the part of neighbours that come near; means of 8 epochs."""
    starts, found = np.cumsum([0, *sizes]), []
    for epoch in range(8):
        refs = order.refs(epoch, range(order.num_samples))
        stored = np.array([starts[shard] + place for _, shard, place in refs])
        displacement = 3 * np.abs(stored - np.arange(len(stored))).mean() / len(stored)
        found.append((displacement, (np.abs(np.diff(np.argsort(stored))) <= length).mean()))
    return tuple(np.mean(found, axis=0).tolist())


@pytest.mark.parametrize(
    ("sizes", "window", "batch_size"),
    [([100] * 100, 1, 1), ([100] * 100, 8, 12), ([100] * 100, 64, 64), ([100] * 100, 256, 1), ([1000] * 10, 4, 12),
     ([10_000], 1, 64)],
)  # fmt: skip
def test_the_mixing_of_an_order_is_measured_as_by_brute_force(sizes: list[int], window: int, batch_size: int) -> None:
    order = ShardOrder(sizes, seed=1, batch_size=batch_size, shuffle_shards=window)
    displacement, near = by_brute_force(order, sizes, batch_size)
    found = [measure_mixing(order, batch_size=batch_size, epoch=epoch) for epoch in range(8)]
    assert np.mean([each.displacement for each in found]) == pytest.approx(displacement, rel=0.04)
    assert np.mean([each.near for each in found]) == pytest.approx(near, rel=0.03, abs=4 * (near / 80_000) ** 0.5)


def test_a_window_of_everything_measures_as_a_full_shuffle() -> None:
    found = measure_mixing(ShardOrder([10_000], seed=0, batch_size=1), batch_size=64)
    assert found.displacement == pytest.approx(1)
    assert found.near == pytest.approx(found.near_shuffled)
    assert near_in_full_shuffle(np.array([10, 1]), 9).tolist() == [1, 0]


def test_a_mixture_is_as_well_mixed_as_its_sources() -> None:
    """Also where one source is passed over many times an epoch."""
    well = mixture([[50], [2000]], [1, 1], shuffle_shards=8)
    found = measure_mixing(well, batch_size=48)
    assert found.displacement == pytest.approx(1, rel=0.01)
    assert found.near == pytest.approx(found.near_shuffled)
    badly = mixture([[5] * 10, [20] * 100], [1, 3], shuffle_shards=2)
    assert measure_mixing(badly, batch_size=48).near > 2 * measure_mixing(badly, batch_size=48).near_shuffled


@pytest.mark.parametrize("batch_size", [1, 256, 4096])
def test_the_mixing_of_a_hundred_million_samples_is_measured_within_a_second(batch_size: int) -> None:
    sizes = [10_000] * 10_000
    orders = (
        ShardOrder(sizes, seed=0, batch_size=batch_size),
        MixtureOrder([sizes[:2500]] * 4, weights=[1, 2, 3, 4], seed=0, batch_size=batch_size),
    )
    for order in orders:
        epochs = count()
        assert cpu_seconds(lambda o=order, e=epochs: measure_mixing(o, batch_size=batch_size, epoch=next(e))) < 1


def test_the_shards_of_a_first_batch_are_known_before_it_is_read() -> None:
    order = ShardOrder([10] * 20, seed=0, batch_size=8, shuffle_shards=8)
    assert first_shards(order, range(8)) == sorted({shard for _, shard, _ in order.refs(0, range(8))})
