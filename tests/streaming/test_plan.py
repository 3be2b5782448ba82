"""Laws of the epoch plan, and the command that prints it."""

import hashlib
import json
import pickle
import random
import re
import subprocess
import sys
from dataclasses import replace
from itertools import chain, count, islice
from pathlib import Path

import numpy as np
import pytest
from clock import cpu_seconds
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny import write_coco, write_shards

from captioner.errors import StreamingError, UserError
from captioner.shards import splitmix
from captioner.shards.format import Manifest, ShardEntry
from captioner.shards.splitmix import random_bits, random_order
from captioner.streaming.order import EpochOrder, num_steps, rank_positions
from sharding import make_shards
from sharding.settings import ShardSettings
from train import plan as plan_module
from train.plan import PlanSettings, window_advice

manifests = st.lists(st.integers(0, 40), min_size=1, max_size=30)
seeds, epochs, mixed = st.integers(0, 2**64), st.integers(0, 1000), st.integers(1, 70)


def places(plan: EpochOrder) -> list[tuple[int, int]]:
    """The whole order of an epoch."""
    return [(ref.shard, ref.index_in_shard) for ref in plan.refs(range(plan.num_samples))]


def all_places(sizes: list[int]) -> list[tuple[int, int]]:
    return [(shard, place) for shard, size in enumerate(sizes) for place in range(size)]


# ---- laws ---------------------------------------------------------------------------------------------------


@given(sizes=manifests, seed=seeds, epoch=epochs, batch=st.integers(1, 70), shuffle_shards=mixed)
@settings(deadline=None, max_examples=200)
def test_every_sample_comes_exactly_once_an_epoch(
    sizes: list[int], seed: int, epoch: int, batch: int, shuffle_shards: int
) -> None:
    plan = EpochOrder(shard_sizes=sizes, seed=seed, epoch=epoch, global_batch=batch, shuffle_shards=shuffle_shards)
    assert sorted(places(plan)) == all_places(sizes)
    assert [ref.position for ref in plan.refs(range(sum(sizes)))] == list(range(sum(sizes)))


@given(sizes=manifests, seed=seeds, per_rank=st.integers(1, 9), world_size=st.integers(1, 16), data=st.data())
@settings(deadline=None, max_examples=100)
def test_global_batches_are_the_same_for_any_number_of_ranks_and_workers(
    sizes: list[int], seed: int, per_rank: int, world_size: int, data: st.DataObject
) -> None:
    """Ranks and workers as the stream deals them out: a rank its part of each batch, worker k every K-th step."""
    global_batch, total = per_rank * world_size, sum(sizes)
    workers = data.draw(st.integers(0, 8))
    order = places(EpochOrder(shard_sizes=sizes, seed=seed, global_batch=global_batch))
    steps = num_steps(total, global_batch=global_batch)
    found: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for rank in range(world_size):
        for worker in range(max(1, workers)):
            plan = EpochOrder(shard_sizes=sizes, seed=seed, global_batch=global_batch)  # a process of its own
            for step in range(worker, steps, max(1, workers)):
                positions = rank_positions(
                    step, num_samples=total, global_batch=global_batch, rank=rank, world_size=world_size
                )
                found[step, rank] = [(ref.shard, ref.index_in_shard) for ref in plan.refs(positions)]
    assert len(found) == steps * world_size  # every rank has every step
    for step in range(steps):
        shares = [found[step, rank] for rank in range(world_size)]
        assert list(chain.from_iterable(shares)) == order[step * global_batch : (step + 1) * global_batch]
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(sizes=manifests, seed=seeds, epoch=epochs)
@settings(deadline=None, max_examples=100)
def test_every_epoch_and_seed_has_an_order_of_its_own(sizes: list[int], seed: int, epoch: int) -> None:
    assume(sum(sizes) >= 30 and max(sizes) < sum(sizes))

    def order(seed: int, epoch: int) -> list[tuple[int, int]]:
        return places(EpochOrder(shard_sizes=sizes, seed=seed, epoch=epoch, global_batch=4))

    first = order(seed, epoch)
    assert first == order(seed, epoch)
    assert first != order(seed, epoch + 1)
    assert first != order(seed + 1, epoch)


@given(sizes=manifests, seed=seeds, data=st.data())
@settings(deadline=None, max_examples=100)
def test_a_seek_gives_what_reading_on_would_have_given(sizes: list[int], seed: int, data: st.DataObject) -> None:
    assume(sum(sizes))
    position = data.draw(st.integers(0, sum(sizes) - 1))
    order = {"shard_sizes": sizes, "seed": seed, "epoch": 2, "global_batch": data.draw(st.integers(1, 9))}
    read_on = EpochOrder(**order).refs(range(sum(sizes)))
    assert EpochOrder(**order).refs([position]) == [read_on[position]]


def test_evaluation_reads_in_the_order_of_the_manifest() -> None:
    refs = EpochOrder(shard_sizes=[3, 0, 2], shuffled=False).refs(range(5))
    assert [(ref.shard, ref.index_in_shard) for ref in refs] == [(0, 0), (0, 1), (0, 2), (2, 0), (2, 1)]


@given(sizes=manifests, every=st.integers(1, 50))
def test_some_of_a_split_stand_at_equal_distances(sizes: list[int], every: int) -> None:
    plan = EpochOrder(shard_sizes=sizes, shuffled=False, every=every)
    assert places(plan) == all_places(sizes)[::every]


@pytest.mark.parametrize(
    ("arguments", "digest"),
    [
        ({"shard_sizes": [40] * 30, "seed": 1, "global_batch": 64}, "f7d7e814e7e284f0"),
        ({"shard_sizes": [7, 0, 13, 1, 40, 22, 5] * 9, "seed": 2**63 + 5, "epoch": 17, "global_batch": 48,
          "shuffle_shards": 20}, "6297544e482b9665"),
        ({"shard_sizes": [100] * 60, "seed": 3, "epoch": 2, "global_batch": 6, "shuffle_shards": 24},
         "4a4a35eb3f2f785c"),
        ({"shard_sizes": [31, 5, 9] * 40, "epoch": 1, "global_batch": 1, "shuffle_shards": 7}, "5322e738b09a8bae"),
        ({"shard_sizes": [31, 5, 9] * 4, "shuffled": False, "every": 3}, "a607c302022f0b04"),
        ({"shard_sizes": [17, 40, 3] * 300, "seed": 9, "epoch": 4, "global_batch": 256}, "92a610722ed189db"),
        ({"shard_sizes": [3, 1, 0, 2] * 100, "seed": 5, "global_batch": 4, "shuffle_shards": 4}, "a60caf5a8966133e"),
    ],
)  # fmt: skip
def test_an_order_is_what_it_was_at_commit_1b46dbb(arguments: dict, digest: str) -> None:
    """Digests of the orders of commit 1b46dbb: runs that began then go on with the same samples."""
    order = EpochOrder(**arguments)
    refs = order.refs(range(order.num_samples))
    assert hashlib.sha256(json.dumps(refs).encode()).hexdigest().startswith(digest)
    positions = random.Random(1).choices(range(order.num_samples), k=200)
    assert pickle.loads(pickle.dumps(order)).refs(positions) == [refs[position] for position in positions]


def test_the_example_of_the_docstring() -> None:
    order = EpochOrder(shard_sizes=[10, 6, 7], seed=3, global_batch=6, shuffle_shards=3)
    assert order._permuted.tolist() == [0, 1, 2]
    lanes, indices = order._lanes_and_indices(np.arange(23))
    rows = re.findall(r"batch \d +([\d |]+)", EpochOrder.__doc__ or "")
    assert indices.tolist() == [int(index) for row in rows for index in row.replace("|", " ").split()]
    assert lanes.tolist() == [lane for row in rows for lane, part in enumerate(row.split("|")) for _ in part.split()]
    starts, stops = order._window_bounds(1, np.arange(2))
    assert (starts.tolist(), stops.tolist()) == ([7, 10], [10, 15])


def test_a_batch_of_256_lanes_is_planned_in_milliseconds() -> None:
    order = EpochOrder(shard_sizes=[1000] * 2000, global_batch=256)
    order.refs(range(256))  # opens the windows
    steps = count(1)
    assert cpu_seconds(lambda: [order.refs(range(256 * s, 256 * (s + 1))) for s in islice(steps, 20)]) < 20 * 0.002


# ---- what a rank opens --------------------------------------------------------------------------------------


@given(world_size=st.integers(1, 1000), shards_a_rank=st.integers(10, 20), seed=seeds, epoch=epochs, data=st.data())
@settings(deadline=None, max_examples=60)
def test_a_rank_opens_little_more_than_its_part(
    world_size: int, shards_a_rank: int, seed: int, epoch: int, data: st.DataObject
) -> None:
    """For any number of processes up to 1,000, as long as there are as many lanes."""
    sizes = [100] * (shards_a_rank * world_size)
    global_batch = world_size * data.draw(st.sampled_from((1, 2, 3, 8, 32)))
    shuffle_shards = global_batch if global_batch < 1000 else world_size
    plan = EpochOrder(
        shard_sizes=sizes, seed=seed, epoch=epoch, global_batch=global_batch, shuffle_shards=shuffle_shards
    )
    ranks = [plan.shards_of_rank(rank, world_size=world_size) for rank in range(world_size)]
    assert max(map(len, ranks)) <= shards_a_rank + 1 <= 1.2 * shards_a_rank
    assert set().union(*ranks) == set(range(len(sizes)))


@given(sizes=manifests, seed=seeds, world_size=st.integers(1, 16), per_rank=st.integers(1, 9), shuffle_shards=mixed)
@settings(deadline=None, max_examples=200)
def test_a_rank_opens_what_the_plan_says(
    sizes: list[int], seed: int, world_size: int, per_rank: int, shuffle_shards: int
) -> None:
    """Exactly that when its lanes are its own, no others anyhow; in the last batch too, however short."""
    batch, total = per_rank * world_size, sum(sizes)
    plan = EpochOrder(shard_sizes=sizes, seed=seed, global_batch=batch, shuffle_shards=shuffle_shards)
    for rank in range(world_size):
        own = {"num_samples": total, "global_batch": batch, "rank": rank, "world_size": world_size}
        positions = [p for step in range(num_steps(total, global_batch=batch)) for p in rank_positions(step, **own)]
        opened, said = (
            {ref.shard for ref in plan.refs(positions)},
            set(plan.shards_of_rank(rank, world_size=world_size)),
        )
        assert opened == said if plan.num_lanes % world_size == 0 else opened <= said
        lanes, _ = plan._lanes_and_indices(np.array(positions, dtype=np.int64))
        assert len(set(lanes.tolist())) <= plan.lanes_of_rank(world_size=world_size)


@given(batch=st.integers(1, 2000), shuffle_shards=st.integers(1, 1000))
def test_lanes_divide_the_batch_and_with_their_windows_hold_the_shards_that_are_mixed(
    batch: int, shuffle_shards: int
) -> None:
    plan = EpochOrder(shard_sizes=[1], global_batch=batch, shuffle_shards=shuffle_shards)
    assert batch % plan.num_lanes == 0
    assert plan.num_lanes * plan.window_shards <= shuffle_shards < plan.num_lanes * (plan.window_shards + 1)
    assert not any(batch % lanes == 0 for lanes in range(plan.num_lanes + 1, min(batch, shuffle_shards) + 1))


@given(world_size=st.integers(1, 1000), per_rank=st.integers(1, 40), shuffle_shards=mixed)
def test_what_is_advised_gives_each_rank_lanes_of_its_own(world_size: int, per_rank: int, shuffle_shards: int) -> None:
    batch = world_size * per_rank
    plan = EpochOrder(shard_sizes=[1], global_batch=batch, shuffle_shards=shuffle_shards)
    advice = window_advice(plan, world_size=world_size)
    assert bool(advice) == (plan.num_lanes % world_size > 0)
    if advice:
        better = EpochOrder(shard_sizes=[1], global_batch=batch, shuffle_shards=int(advice.rpartition(" ")[2]))
        assert better.num_lanes % world_size == 0


# ---- random numbers -----------------------------------------------------------------------------------------


def test_random_numbers_are_the_published_ones_and_will_stay() -> None:
    """SplitMix64 from state 0, as its authors print it, begins so; orders of old runs depend on these bits."""
    golden = 0x9E3779B97F4A7C15
    state = np.array([golden, 2 * golden % 2**64, 3 * golden % 2**64], dtype=np.uint64)
    assert [hex(bits) for bits in splitmix._mix(state).tolist()] == [
        "0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4", "0x6c45d188009454f"]  # fmt: skip
    assert random_order(10, 1, 2, 3).tolist() == [5, 7, 3, 1, 2, 4, 6, 9, 8, 0]


def test_random_bits_are_spread_evenly_and_differ_by_key() -> None:
    bits = random_bits(np.arange(40_000), 5, 6)
    for shift in range(64):
        assert abs((bits >> np.uint64(shift) & np.uint64(1)).astype(float).mean() - 0.5) < 0.015
    assert not np.intersect1d(bits, random_bits(np.arange(40_000), 6, 5)).size


def displacement(order: np.ndarray) -> float:
    """Mean way from a sample's place in the source to its place in the order, in lengths of the window."""
    return float(np.abs(order - np.arange(len(order))).mean() / len(order))


def kept_neighbours(order: np.ndarray) -> float:
    """How many neighbours in the source are still at most 3 apart, against a permutation drawn fresh (then 1)."""
    place = np.argsort(order)
    expected = 6 / len(order)
    return float((np.abs(np.diff(place)) <= 3).mean() / expected)


def test_inside_a_window_the_shuffle_is_as_good_as_a_full_permutation(capsys: pytest.CaptureFixture[str]) -> None:
    """Both figures within 10 % of a uniform permutation's: 1/3 of the window, and as many neighbours."""
    size, window, rng = 500, 4, np.random.default_rng(1)
    ours, uniform = [], []
    for seed in range(40):
        plan = EpochOrder(shard_sizes=[size] * window, seed=seed, shuffle_shards=window)
        shards = [int(shard) for shard in plan._permuted]  # the window's source is the permuted shards
        ours.append(np.array([shards.index(shard) * size + place for shard, place in places(plan)]))
        uniform.append(rng.permutation(size * window))
    for name, measure in (("mean displacement", displacement), ("neighbours kept", kept_neighbours)):
        found, wanted = (float(np.mean([measure(order) for order in orders])) for orders in (ours, uniform))
        with capsys.disabled():
            print(f"\n{name}: {found:.4f}, of uniform permutations {wanted:.4f}")
        assert abs(found / wanted - 1) < 0.1


# ---- large, and printed -------------------------------------------------------------------------------------

LARGE = """
import re, sys, time
from pathlib import Path
from captioner.streaming.dataset import read_split
from captioner.streaming.order import ShardOrder, rank_positions
split = read_split([sys.argv[1]], "train", remedy="")
plan = ShardOrder(split.sizes, seed=1, batch_size=1024).of_epoch(3)
step = plan.num_samples // 1024 // 2
refs = plan.refs(rank_positions(step, num_samples=plan.num_samples, global_batch=1024, rank=0, world_size=1))
print(len(refs), plan.num_samples, len({ref.shard for ref in refs}), "torch" in sys.modules)
print(time.process_time(), int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1000)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="/proc tells the memory of a process")
def test_a_hundred_million_samples_are_planned_and_sought_in_two_seconds_and_200_megabytes(tmp_path: Path) -> None:
    """Of CPU time, start of Python and imports included; without torch."""
    numbers = np.random.default_rng(0).multinomial(100_000_000, [1 / 40_000] * 40_000).tolist()
    digests = [f"{number:064x}" for number in range(40_000)]
    shards = tuple(
        ShardEntry(name=f"train-{d[-6:]}", samples=n, captions=5 * n, failures=0, bytes=n, sha256=d, fingerprint=d)
        for n, d in zip(numbers, digests, strict=True)
    )
    manifest = Manifest(split="train", shards=shards, settings={}, source={}, failures={}, fingerprint="")
    (tmp_path / "train.manifest.json").write_text(manifest.to_json())
    done = subprocess.run([sys.executable, "-c", LARGE, tmp_path], capture_output=True, text=True, check=True)
    refs, samples, opened, torch_loaded, seconds, megabytes = done.stdout.split()
    assert (refs, samples, torch_loaded) == ("1024", "100000000", "False")
    assert int(opened) > 64
    assert float(megabytes) < 200
    assert float(seconds) < 2


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    coco = write_coco(folder / "coco", num_train=23, num_val=0)
    make_shards.main(
        ShardSettings(
            images=str(coco), captions=str(coco / "annotations"), output=str(folder / "shards"), size=32, workers=1
        )
    )
    return folder / "shards"


def test_the_plan_is_printed_before_any_gpu_is_taken(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    plan_module.main(PlanSettings(shards=(str(shards),), batch_size=8, processes=4))
    text = " ".join(capsys.readouterr().out.split())
    manifest = json.loads((shards / "train.manifest.json").read_text())
    for fact in (
        "samples │ 23 ",
        "global batch │ 8 samples, 2 a process",
        "steps │ 3 ",
        "7 samples: 2 for 3 of the processes, 1 for the others",
        "repeated, dropped │ 0, 0",
        f"shards │ {len(manifest['shards'])}",
    ):
        assert fact in text, text


def test_the_plan_of_a_mixture_says_what_each_source_gives(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_shards(tmp_path / "other", [4, 3])
    capsys.readouterr()
    plan_module.main(PlanSettings(shards=(str(shards), other), batch_size=10, weights=(1, 3)))
    text = "".join(character for character in capsys.readouterr().out if character.isascii())
    text = " ".join(text.split())
    for fact in (
        "25.00% from source 1",
        "75.00% from source 2",
        "3.21 passes an epoch",
        "reads from all shards",
        "mixing",
    ):
        assert fact in text, text
    with pytest.raises(StreamingError, match="2 sources and 1 weights"):
        plan_module.main(PlanSettings(shards=(str(shards), other), batch_size=10, weights=(1,)))


def test_a_plan_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the train split in .* holds no samples"):
        plan_module.main(PlanSettings(shards=(write_shards(tmp_path / "shards", [0]),)))


def test_the_plans_rows_add_up(shards: Path) -> None:
    sizes = [7, 9, 4, 3]
    rows = plan_module.rank_rows(EpochOrder(shard_sizes=sizes, global_batch=8), [100] * 4, world_size=4)
    assert sum(int(str(row[1])) for row in rows) == 23
    assert [row[1] for row in rows] == [5, 6, 6, 6]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"processes": 3}, "must be a multiple of the 3 processes"),
        ({"shards": ("/nowhere",)}, "make_shards.py"),
    ],
)
def test_a_plan_that_cannot_be_is_told_in_one_line(shards: Path, changed: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_module.main(replace(PlanSettings(shards=(str(shards),), batch_size=8), **changed))
