"""Laws of the epoch plan."""

from hypothesis import given, settings
from hypothesis import strategies as st

from train.plan import EpochPlan, num_steps, rank_positions

shard_sizes = st.lists(st.integers(0, 40), min_size=1, max_size=30)


@given(sizes=shard_sizes, seed=st.integers(0, 99), epoch=st.integers(0, 9), lanes=st.integers(1, 70))
@settings(deadline=None, max_examples=100)
def test_every_sample_comes_exactly_once_an_epoch(sizes: list[int], seed: int, epoch: int, lanes: int) -> None:
    plan = EpochPlan(shard_sizes=sizes, seed=seed, epoch=epoch, num_lanes=lanes)
    found = sorted((ref.shard, ref.place) for ref in plan.refs(range(sum(sizes))))
    assert found == [(shard, place) for shard, size in enumerate(sizes) for place in range(size)]


@given(
    num_samples=st.integers(0, 300),
    per_rank=st.integers(1, 9),
    world_size=st.integers(1, 16),
)
@settings(deadline=None, max_examples=100)
def test_ranks_partition_every_global_batch_and_step_alike(num_samples: int, per_rank: int, world_size: int) -> None:
    global_batch = per_rank * world_size
    for step in range(num_steps(num_samples, global_batch=global_batch)):
        shares = [
            rank_positions(step, num_samples=num_samples, global_batch=global_batch, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        start = step * global_batch
        assert sorted(p for share in shares for p in share) == list(
            range(start, min(start + global_batch, num_samples))
        )
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_seek_gives_what_reading_on_would_have_given() -> None:
    sizes = [37, 5, 80, 0, 61, 17] * 4
    read_on = EpochPlan(shard_sizes=sizes, seed=3, epoch=2).refs(range(sum(sizes)))
    for position in (0, 1, 63, 64, 500, sum(sizes) - 1):
        assert EpochPlan(shard_sizes=sizes, seed=3, epoch=2).ref(position) == read_on[position]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    def order(seed: int, epoch: int) -> list[tuple[int, int]]:
        return [(r.shard, r.place) for r in EpochPlan(shard_sizes=[50] * 6, seed=seed, epoch=epoch).refs(range(300))]

    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(seed, epoch)) for seed in (1, 2) for epoch in (0, 1, 2)}) == 6


def test_evaluation_reads_in_the_order_of_the_manifest() -> None:
    refs = EpochPlan(shard_sizes=[3, 0, 2], shuffled=False).refs(range(5))
    assert [(ref.shard, ref.place) for ref in refs] == [(0, 0), (0, 1), (0, 2), (2, 0), (2, 1)]


def test_few_lanes_open_few_shards_a_rank() -> None:
    """With 64 shards in 64 lanes each of 4 ranks needs about a quarter of the shards, not all."""
    plan = EpochPlan(shard_sizes=[100] * 64, seed=1, epoch=1)
    opened = {plan.ref(p).shard for step in range(10) for p in rank_positions(
        step, num_samples=6400, global_batch=64, rank=1, world_size=4)}  # fmt: skip
    assert len(opened) <= 32
