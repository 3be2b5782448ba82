"""The streaming library's loader: its order, state, errors and workers."""

import json
import os
import random
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from streaming_data import global_batches, make_loader, run_epochs, text_of, texts, write_split, write_tar

from captioner.errors import StreamingError, TooManyBadSamplesError, TransformError, UserError
from captioner.streaming import SampleError, StreamingLoader, batch_buffer, index_shards
from captioner.streaming.buffers import Buffers, WorkerBuffers
from captioner.streaming.loader import pinned_ahead
from captioner.streaming.worker import Made

SIZES = (7, 5, 11, 1, 9, 8)
NUM_SAMPLES = sum(SIZES)  # 41


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A split of 41 text samples in 6 shards."""
    return write_split(tmp_path_factory.mktemp("streaming") / "shards", SIZES)


# ---- order ------------------------------------------------------------------------------------------------


@given(
    world_size=st.sampled_from([1, 2, 3, 4, 6, 12]),
    per_rank=st.integers(1, 4),
    last_batch=st.sampled_from(["keep", "drop", "pad"]),
    seed=st.integers(0, 9),
    window=st.integers(1, 8),
)
@settings(max_examples=40, deadline=None)
def test_each_sample_comes_once_an_epoch_in_the_same_global_batches_on_any_ranks(
    folder: Path, *, world_size: int, per_rank: int, last_batch: str, seed: int, window: int
) -> None:
    options: dict[str, Any] = {"seed": seed, "shuffle_shards": window, "last_batch": last_batch}
    options["batch_size"] = size = 12 * per_rank
    if last_batch == "drop" and size > NUM_SAMPLES:
        return
    alone = global_batches(folder, 1, 2, **options)
    assert global_batches(folder, world_size, 2, **options) == alone
    steps = len(alone) // 2
    for epoch in (alone[:steps], alone[steps:]):
        counts = Counter(text for batch in epoch for text in batch)
        if last_batch == "keep":
            assert len(counts) == NUM_SAMPLES
            assert set(counts.values()) == {1}
        elif last_batch == "drop":
            assert len(counts) == NUM_SAMPLES // size * size
            assert set(counts.values()) == {1}
        else:
            whole = [text for batch in epoch for text in batch]
            assert len(set(whole[:NUM_SAMPLES])) == NUM_SAMPLES
            assert whole[NUM_SAMPLES:] == (whole[:NUM_SAMPLES] * size)[: len(whole) - NUM_SAMPLES]
    assert alone[:steps] != alone[steps:] or steps == 0


@pytest.mark.parametrize(
    ("workers", "start_method"),
    [(1, "fork"), (2, "fork"), pytest.param(3, "spawn", marks=pytest.mark.slow), (2, "forkserver")],
)
def test_workers_change_nothing(folder: Path, workers: int, start_method: str) -> None:
    alone = run_epochs(make_loader(folder), 2)
    loader = make_loader(folder, num_workers=workers, start_method=start_method)
    assert run_epochs(loader, 2) == alone
    loader.close()


def worker_process(sample: dict[str, Any], _rng: np.random.Generator) -> tuple[int, str]:
    return os.getpid(), text_of(sample)


def test_workers_live_as_long_as_the_loader(folder: Path) -> None:
    loader = make_loader(folder, num_workers=2, transform=worker_process)
    pids = [{pid for batch in loader for pid, _ in batch} for _ in range(3)]
    loader.set_epoch(7)
    pids.append({pid for batch in loader for pid, _ in batch})
    assert len(pids[0]) == 2
    assert os.getpid() not in pids[0]
    assert all(found == pids[0] for found in pids)
    loader.close()
    again = {pid for batch in loader for pid, _ in batch}
    assert not again & pids[0]
    loader.close()


def test_loaders_in_one_process_do_not_touch_each_other(folder: Path) -> None:
    alone = run_epochs(make_loader(folder, seed=1), 1), run_epochs(make_loader(folder, seed=2), 1)
    first, second = make_loader(folder, seed=1, num_workers=1), make_loader(folder, seed=2)
    pairs = list(zip(first, second, strict=True))
    assert ([texts(batch) for batch, _ in pairs], [texts(batch) for _, batch in pairs]) == alone
    first.close()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_a_dropped_loader_leaves_no_file_open(folder: Path) -> None:
    def num_open() -> int:  # of this folder only: files that other tests dropped may be closed meanwhile
        targets = [path.readlink() for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
        return sum(target.is_relative_to(folder) for target in targets)

    loader = make_loader(folder)
    next(iter(loader))
    assert num_open() > 0
    del loader
    assert num_open() == 0


# ---- page-locked copies -----------------------------------------------------------------------------------


def made(*texts: str) -> Iterator[Made]:
    return (Made(batch=text, positions=[], skipped=[], in_buffers=False) for text in texts)


def test_batches_are_copied_in_order_one_ahead_in_another_thread() -> None:
    copied: list[str] = []

    def pin(each: Made) -> Made:
        assert threading.current_thread() is not threading.main_thread()
        copied.append(each.batch)
        return replace(each, batch=each.batch.upper())

    batches = pinned_ahead(made(*"abcd"), pin)
    assert next(batches).batch == "A"
    assert [each.batch for each in batches] == ["B", "C", "D"]
    assert copied == [*"abcd"]


def test_an_error_comes_after_the_batches_before_it() -> None:
    def failing() -> Iterator[Made]:
        yield from made("a", "b")
        raise UserError("no more")

    batches = pinned_ahead(failing(), lambda each: each)
    assert [next(batches).batch, next(batches).batch] == ["a", "b"]
    with pytest.raises(UserError, match="no more"):
        next(batches)


def test_the_copying_thread_ends_with_an_iterator_that_is_dropped() -> None:
    threads = threading.active_count()
    batches = pinned_ahead(made(*"abcd"), lambda each: each)
    next(batches)
    assert threading.active_count() == threads + 1
    del batches
    assert threading.active_count() == threads


def test_a_buffer_is_free_once_it_is_copied() -> None:
    buffers = Buffers(num_workers=0, count=1)
    own = WorkerBuffers(buffers.taken, first=0, count=1)

    def filled() -> Iterator[Made]:
        for number in range(4):
            with own.in_use():
                batch = batch_buffer((2,), torch.int64)
                batch.fill_(number)
                slots, in_buffers = own.give(batch)
            yield Made(buffers.open(slots), [], [], in_buffers)

    def pin(each: Made) -> Made:
        return replace(each, batch=each.batch.clone())

    assert [each.batch.tolist() for each in pinned_ahead(filled(), pin)] == [[number] * 2 for number in range(4)]
    assert not buffers.taken.any()


# ---- state ------------------------------------------------------------------------------------------------


@given(
    taken=st.integers(0, 14),
    before=st.sampled_from([1, 2, 4]),
    after=st.sampled_from([1, 2, 4]),
    last_batch=st.sampled_from(["keep", "pad", "drop"]),
)
@settings(max_examples=30, deadline=None)
def test_a_resume_goes_on_where_the_state_stands_on_any_ranks(
    folder: Path, taken: int, before: int, after: int, last_batch: str
) -> None:
    whole = global_batches(folder, 1, 3, last_batch=last_batch)
    states = []
    for rank in range(before):
        loader = make_loader(folder, rank=rank, world_size=before, last_batch=last_batch)
        batches = (batch for _ in range(3) for batch in loader)
        for _ in range(taken):
            next(batches)
        states.append(json.loads(json.dumps(loader.state_dict())))
    assert all(state == states[0] for state in states)
    found = []
    for rank in range(after):
        loader = make_loader(folder, rank=rank, world_size=after, last_batch=last_batch)
        loader.load_state_dict(states[0])
        found.append([texts(batch) for _ in range(3 - loader.epoch) for batch in loader])
    assert [[text for part in parts for text in part] for parts in zip(*found, strict=True)] == whole[taken:]


def test_the_state_moves_when_a_batch_is_taken_not_when_it_is_made(folder: Path) -> None:
    loader = make_loader(folder, num_workers=2)
    batches = iter(loader)
    assert loader.state_dict()["position"] == 0
    for step in range(1, 4):
        next(batches)
        assert loader.state_dict()["position"] == 8 * step
        assert loader.steps_done == step
    assert loader.state_dict(steps=1)["position"] == 8
    loader.close()


def test_one_who_reads_ahead_gives_the_steps_that_were_used(folder: Path) -> None:
    whole = run_epochs(make_loader(folder), 3)
    loader = make_loader(folder)
    ahead = (batch for _ in range(3) for batch in loader)
    next(ahead)
    for used in range(1, 15):
        next(ahead)  # the batch after the one that is used now; at an epoch's end it is the next epoch's first
        state = loader.state_dict(steps=(used - 1) % 6 + 1)
        other = make_loader(folder)
        other.load_state_dict(state)
        assert (other.epoch, other.steps_done) == divmod(used, 6)
        assert texts(next(iter(other))) == whole[used]
    for steps in (-1, 7):
        with pytest.raises(StreamingError, match="were taken"):
            loader.state_dict(steps=steps)
    with pytest.raises(StreamingError, match="steps is 3, and 0 of epoch 0 were taken"):
        make_loader(folder).state_dict(steps=3)


def test_an_epoch_ends_with_the_iteration_and_the_state_at_its_last_batch_is_the_next_ones_start(folder: Path) -> None:
    loader, last = make_loader(folder), {}
    for _ in loader:
        assert loader.epoch == 0
        last = loader.state_dict()
    assert (loader.epoch, loader.steps_done) == (1, 0)
    assert len(loader) == 6
    other = make_loader(folder)
    other.load_state_dict(last)
    assert (other.epoch, other.steps_done, len(other)) == (1, 0, 6)
    assert run_epochs(other, 1) == run_epochs(loader, 1)


def test_an_epoch_whose_end_nobody_asks_for_is_over_too(folder: Path) -> None:
    loader = make_loader(folder)
    whole = run_epochs(make_loader(folder), 2)
    taken = [texts(batch) for batch, _ in zip(loader, range(6), strict=False)]
    assert taken == whole[:6]
    assert run_epochs(loader, 1) == whole[6:]


def test_after_a_break_the_next_iteration_goes_on(folder: Path) -> None:
    whole = run_epochs(make_loader(folder), 1)
    for workers in (0, 2):
        loader = make_loader(folder, num_workers=workers)
        found = []
        for batch in loader:
            found.append(texts(batch))
            if len(found) == 2:
                break
        assert len(loader) == 6
        found += [texts(batch) for batch in loader]
        assert found == whole
        loader.close()


def test_a_new_iterator_ends_older_ones(folder: Path) -> None:
    loader = make_loader(folder)
    old = iter(loader)
    next(old)
    new = iter(loader)
    next(new)
    with pytest.raises(RuntimeError, match="newer iterator"):
        next(old)


def test_validation_starts_at_the_beginning_each_time_unless_a_state_was_loaded(folder: Path) -> None:
    loader = make_loader(folder, shuffle=False)
    first, second = run_epochs(loader, 1), run_epochs(loader, 1)
    assert first == second
    stored = [f"{shard}-{number}" for shard, size in enumerate(SIZES) for number in range(size)]
    assert [text for batch in first for text in batch] == stored
    assert texts(next(iter(loader))) == first[0]
    state = loader.state_dict(steps=2)
    loader.load_state_dict(state)
    assert texts(next(iter(loader))) == first[2]
    assert texts(next(iter(loader))) == first[0]
    thin = make_loader(folder, shuffle=False, every=10)
    assert len([text for batch in run_epochs(thin, 1) for text in batch]) == 5


def test_set_epoch_goes_to_an_epoch_or_does_nothing(folder: Path) -> None:
    whole = run_epochs(make_loader(folder), 3)
    loader = make_loader(folder, num_workers=1)
    next(iter(loader))
    loader.set_epoch(0)
    assert loader.steps_done == 1
    loader.set_epoch(2)
    assert run_epochs(loader, 1) == whole[12:]
    loader.set_epoch(0)
    assert run_epochs(loader, 1) == whole[:6]
    loader.close()


@pytest.mark.parametrize(
    ("changed", "name"),
    [({"batch_size": 4}, "batch_size was 8, is 4"), ({"seed": 5}, "seed was 0, is 5"),
     ({"shuffle_shards": 2}, "shuffle_shards was 256, is 2")],
)  # fmt: skip
def test_another_order_may_begin_with_an_epoch_only(folder: Path, changed: dict[str, Any], name: str) -> None:
    loader = make_loader(folder)
    at_start = loader.state_dict()
    next(iter(loader))
    with pytest.raises(StreamingError, match=name):
        make_loader(folder, **changed).load_state_dict(loader.state_dict())
    make_loader(folder, **changed).load_state_dict(at_start)


def test_a_state_of_other_data_or_of_something_else_is_refused(folder: Path, tmp_path: Path) -> None:
    other = write_split(tmp_path / "other", (4, 4))
    for state in (make_loader(other).state_dict(), make_loader(folder, shuffle=False).state_dict()):
        with pytest.raises(StreamingError, match="other data or of another order"):
            make_loader(folder).load_state_dict(state)
    for state in ({}, {"epoch": "x"}, make_loader(folder).state_dict() | {"epoch": None}):
        with pytest.raises(StreamingError, match="not the state"):
            make_loader(folder).load_state_dict(state)


# ---- the last batch ---------------------------------------------------------------------------------------


def test_a_rank_without_samples_collates_an_empty_list(folder: Path) -> None:
    ranks = [[len(batch) for batch in make_loader(folder, rank=rank, world_size=4)] for rank in range(4)]
    assert [sizes[:-1] for sizes in ranks] == [[2] * 5] * 4
    assert sorted(sizes[-1] for sizes in ranks) == [0, 0, 0, 1]


def test_default_collate_is_refused_at_the_start_where_a_rank_would_get_nothing(folder: Path) -> None:
    loader = make_loader(folder, rank=0, world_size=4, collate=None)
    with pytest.raises(StreamingError, match="too short"):
        iter(loader)
    for last_batch in ("pad", "drop"):
        assert list(make_loader(folder, rank=0, world_size=4, collate=None, last_batch=last_batch))


def test_padding_and_dropping_are_counted(folder: Path) -> None:
    padded = []
    for rank in range(4):
        loader = make_loader(folder, rank=rank, world_size=4, last_batch="pad")
        for _ in loader:
            pass
        padded.append((loader.num_padded, loader.ledger.repeated, loader.ledger.planned))
    assert padded == [(1, 1, 11), (2, 2, 10), (2, 2, 10), (2, 2, 10)]
    dropping = [make_loader(folder, rank=rank, world_size=4, last_batch="drop") for rank in range(4)]
    for loader in dropping:
        assert [len(batch) for batch, _ in zip(loader, range(5), strict=False)] == [2] * 5  # nobody asks for the end
    total = type(dropping[0].ledger).of_all([loader.ledger for loader in dropping], planned=NUM_SAMPLES)
    assert (total.planned, total.dropped) == (40, 1)


# ---- ranks ------------------------------------------------------------------------------------------------


def test_the_rank_is_as_given_or_of_the_launcher_or_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (make_loader(folder).rank, make_loader(folder).world_size) == (0, 1)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert (make_loader(folder).rank, make_loader(folder).world_size) == (1, 2)
    assert (make_loader(folder, rank=3, world_size=4).rank) == 3
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    with pytest.raises(StreamingError, match="rank 0 of 4, RANK and WORLD_SIZE say 1 of 2"):
        len(make_loader(folder))
    monkeypatch.setenv("RANK", "one")
    with pytest.raises(StreamingError, match="RANK and WORLD_SIZE are 'one' and"):
        len(make_loader(folder))
    monkeypatch.delenv("RANK")
    loader = make_loader(folder)
    assert loader.world_size == 4
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(StreamingError, match="was rank 0 of 4 and is rank 0 of 2"):
        iter(loader)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rank": 1}, "both or neither"), ({"rank": 2, "world_size": 2}, "rank 2 is not between 0 and 1"),
     ({"rank": 0, "world_size": 3}, "multiple of 3"), ({"batch_size": 0}, "batch_size is 0"),
     ({"last_batch": "maybe"}, "keep, drop, pad"), ({"batch_size": 64, "last_batch": "drop"}, "make no batch"),
     ({"epoch_samples": 3}, "give weights"), ({"every": 2}, "shuffle=False"),
     ({"decode": "jpeg"}, "no decoder 'jpeg'"),
     ({"num_workers": -1}, "num_workers is -1")],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_refused(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(StreamingError, match=message):
        iter(make_loader(folder, **options))


def test_a_missing_split_says_what_makes_one(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"there is no .*manifest\.json \(splits there: none\): index its tars with index_shards"
    ):
        make_loader(tmp_path)
    with pytest.raises(UserError, match=r"there is no folder .*nowhere: check the path, or index"):
        make_loader(tmp_path / "nowhere")
    (tmp_path / "a.tar").touch()
    with pytest.raises(UserError, match=r"a\.tar is a file: give the folder that it is in"):
        make_loader(tmp_path / "a.tar")


def test_accelerate_returns_the_loader_as_it_is_and_stores_its_state(folder: Path, tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    loader = make_loader(folder)
    assert accelerator.prepare(loader) is loader
    accelerator.register_for_checkpointing(loader)
    next(iter(loader))
    accelerator.save_state(str(tmp_path / "state"))
    stored = loader.state_dict()
    next(iter(loader))
    accelerator.load_state(str(tmp_path / "state"))
    assert loader.state_dict() == stored


# ---- random numbers ---------------------------------------------------------------------------------------


def draw(sample: dict[str, Any], rng: np.random.Generator) -> tuple[str, list[float]]:
    numbers = [rng.random(), np.random.rand(), float(torch.rand(())), random.random(), rng.normal()]
    return text_of(sample), numbers


@pytest.mark.slow
def test_random_numbers_are_functions_of_seed_epoch_and_position_alone(folder: Path) -> None:
    def drawn(epochs: int, **options: Any) -> dict[tuple[int, str], list[float]]:
        loader = make_loader(folder, transform=draw, **options)
        found = {(epoch, text): numbers for epoch in range(epochs) for batch in loader for text, numbers in batch}
        loader.close()
        return found

    alone = drawn(2)
    assert drawn(2, num_workers=2) == alone
    assert drawn(2, num_workers=1, start_method="spawn") == alone
    halves = drawn(2, rank=0, world_size=2) | drawn(2, rank=1, world_size=2)
    assert halves == alone
    assert len({tuple(numbers) for numbers in alone.values()}) == 2 * NUM_SAMPLES
    assert drawn(1, seed=1) != {key: alone[key] for key in alone if key[0] == 0}


def test_the_process_own_random_numbers_are_left_as_they_were(folder: Path) -> None:
    def draws() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    def seed() -> None:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)

    seed()
    expected = [draws() for _ in range(6)]
    for workers in (0, 1):
        loader = make_loader(folder, transform=draw, num_workers=workers)
        seed()
        assert [draws() for _ in loader] == expected
        loader.close()


# ---- errors -----------------------------------------------------------------------------------------------


def fail_at(sample: dict[str, Any], _rng: np.random.Generator, *, text: str, error: type[Exception]) -> str:
    if text_of(sample) == text:
        raise error("it broke")
    return text_of(sample)


class StubbornError(Exception):
    """An exception that does not survive pickling."""

    def __init__(self, message: str, *, other: int = 0) -> None:
        super().__init__(message)
        self.function = lambda: other


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("error", [ValueError, StubbornError, OSError])
def test_an_exception_in_transform_is_raised_with_the_sample(
    folder: Path, workers: int, error: type[Exception]
) -> None:
    transform = partial(fail_at, text="2-3", error=error)
    loader = make_loader(folder, transform=transform, num_workers=workers, tolerate_bad_samples=9)
    message = (
        rf"transform failed at key .*00003, url .*train-000002.tar, .*position \d+: {error.__name__}: it broke; "
        "if the sample cannot be used, raise SampleError instead"
    )
    with pytest.raises(TransformError, match=message):
        list(loader)
    loader.close()


def refuse(samples: list[Any]) -> list[Any]:
    if len(samples) < 8:
        raise ValueError("too few")
    return samples


@pytest.mark.parametrize("workers", [0, 1])
def test_an_exception_in_collate_is_raised(folder: Path, workers: int) -> None:
    loader = make_loader(folder, collate=refuse, num_workers=workers)
    with pytest.raises(TransformError, match=r"collate failed at epoch 0, positions .*too few"):
        list(loader)
    loader.close()


def doubt(sample: dict[str, Any], _rng: np.random.Generator) -> str:
    if text_of(sample) in ("0-1", "4-4"):
        raise SampleError("doubtful", f"{text_of(sample)} is doubtful")
    return text_of(sample)


def undecodable(sample: dict[str, Any]) -> dict[str, Any]:
    if text_of(sample) in ("0-1", "4-4"):
        raise ValueError("no such thing")
    return sample


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("function", "reason"), [({"transform": doubt}, "doubtful"), ({"decode": undecodable}, "undecodable")]
)
def test_samples_that_cannot_be_used_are_left_out_and_counted(
    folder: Path, workers: int, function: dict[str, Any], reason: str
) -> None:
    loader = make_loader(folder, **function, num_workers=workers, tolerate_bad_samples=2)
    sizes = [len(batch) for batch in loader]
    assert sum(sizes) == NUM_SAMPLES - 2
    assert len(sizes) == len(loader)
    assert [skip.reason for skip in loader.ledger.skipped] == [reason] * 2
    assert f"skipped 2 (2 {reason})" in str(loader.ledger)
    loader.close()
    for tolerated, error, said in (
        (1, TooManyBadSamplesError, "and 1 are"),
        (0, SampleError, "tolerate_bad_samples=N"),
    ):
        loader = make_loader(folder, **function, num_workers=workers, tolerate_bad_samples=tolerated)
        with pytest.raises(error, match=said):
            list(loader)
        loader.close()


def test_a_transform_that_cannot_be_pickled_fails_at_the_start(folder: Path) -> None:
    loader = make_loader(folder, transform=lambda sample, rng: sample, num_workers=1, start_method="spawn")
    with pytest.raises(StreamingError, match="cannot be pickled"):
        next(iter(loader))
    loader.close()


def unsendable(samples: list[Any]) -> Any:
    return lambda: samples


def test_a_batch_that_cannot_be_sent_is_an_error_not_a_hang(folder: Path) -> None:
    loader = make_loader(folder, collate=unsendable, num_workers=1)
    with pytest.raises(Exception, match=r"pickle|local object"):
        next(iter(loader))
    loader.close()


# ---- decoding ---------------------------------------------------------------------------------------------


def test_fields_are_decoded_by_webdataset_and_pickles_are_not(tmp_path: Path) -> None:
    array = tmp_path / "array.npy"
    np.save(array, np.arange(3))
    members = {
        "json": b'{"a": 1}', "cls": b"7", "npy": array.read_bytes(), "pkl": b"cos\nsystem\n", "pth": b"x",
        "txt": "é".encode(),
    }  # fmt: skip
    write_tar(tmp_path / "train-0.tar", [("k", members)])
    index_shards(str(tmp_path), split="train")
    (batch,) = make_loader(tmp_path, decode="torchrgb8")
    (sample,) = batch
    assert sample["json"] == {"a": 1}
    assert sample["cls"] == 7
    assert sample["npy"].tolist() == [0, 1, 2]
    assert sample["txt"] == "é"
    assert (sample["pkl"], sample["pth"]) == (members["pkl"], members["pth"])
    (batch,) = make_loader(tmp_path)
    assert {name: batch[0][name] for name in members} == members
    (batch,) = make_loader(tmp_path, fields=("cls", "txt"))
    assert {name for name in batch[0] if not name.startswith("__")} == {"cls", "txt"}


# ---- buffers ----------------------------------------------------------------------------------------------


def number(sample: dict[str, Any], _rng: np.random.Generator) -> int:
    return sample["__position__"]


def in_buffer(numbers: list[int]) -> dict[str, Any]:
    rows = batch_buffer((len(numbers), 2), torch.int64)
    rows[:, 0] = torch.tensor(numbers)
    rows[:, 1] = rows.data_ptr()
    halves = batch_buffer((len(numbers),), torch.bfloat16)
    halves[:] = 0.5
    batch_buffer((3,), torch.uint8)  # taken, and not in the batch
    return {"rows": rows, "first": [rows[:1]], "halves": (halves, "text")}


@pytest.mark.parametrize(
    ("workers", "start_method"), [(0, None), (1, "fork"), pytest.param(1, "spawn", marks=pytest.mark.slow)]
)
def test_buffers_are_used_again_but_never_while_a_batch_is_held(
    folder: Path, workers: int, start_method: str | None
) -> None:
    loader = make_loader(folder, transform=number, collate=in_buffer, num_workers=workers, start_method=start_method)
    held = [batch for _ in range(4) for batch in loader]
    for step, batch in enumerate(held):
        first = step % 6 * 8
        assert batch["rows"][:, 0].tolist() == list(range(first, min(first + 8, NUM_SAMPLES)))
        assert batch["first"][0].tolist() == batch["rows"][:1].tolist()
        assert batch["halves"][0].unique().tolist() == [0.5]
    del held, batch
    addresses: list[int] = []
    for _ in range(6):
        addresses += [int(batch["rows"][0, 1]) for batch in loader]
    assert len(set(addresses)) < len(addresses) / 2
    loader.close()


# ---- mixtures ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three splits whose texts tell them apart."""
    root = tmp_path_factory.mktemp("mixture")
    folders = []
    for name, sizes in (("a", (6, 7)), ("b", (5, 4, 8)), ("c", (30,))):
        folders.append(root / name)
        folders[-1].mkdir()
        for shard, size in enumerate(sizes):
            samples = [(f"{n:03d}", {"txt": f"{name}{shard}-{n}".encode()}) for n in range(size)]
            write_tar(folders[-1] / f"train-{shard}.tar", samples)
        index_shards(str(folders[-1]), split="train")
    return folders


@pytest.mark.parametrize("workers", [0, 2])
def test_a_mixture_gives_each_source_its_share_and_resumes(sources: list[Path], workers: int) -> None:
    options: dict[str, Any] = {"weights": [1, 2, 1], "batch_size": 8}
    whole = run_epochs(make_loader(sources, **options), 3)
    assert global_batches(sources, 4, 3, **options) == whole
    texts_of_all = [text for batch in whole for text in batch]
    assert len(texts_of_all) == 3 * 60
    counts = Counter(text[0] for text in texts_of_all)
    assert (counts["a"], counts["b"], counts["c"]) == (45, 90, 45)
    of_b = [text for text in texts_of_all if text[0] == "b"]
    assert all(len(set(of_b[start : start + 17])) == 17 for start in range(0, 85, 17))
    loader = make_loader(sources, num_workers=workers, **options)
    batches = (batch for _ in range(3) for batch in loader)
    found = [texts(next(batches)) for _ in range(10)]
    assert found == whole[:10]
    other = make_loader(sources, **options)
    other.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    assert [texts(batch) for _ in range(3 - other.epoch) for batch in other] == whole[10:]
    loader.close()


def test_new_weights_are_asked_for_by_name_and_change_only_what_comes_after(sources: list[Path]) -> None:
    loader = make_loader(sources, weights=[1, 2, 1])
    batches = iter(loader)
    before = [texts(next(batches)) for _ in range(4)]
    state = loader.state_dict()
    with pytest.raises(
        StreamingError, match=r"are \[1, 2, 1\], the loader's are \[1, 1, 2\]: give .* allow_new_weights=True"
    ):
        make_loader(sources, weights=[1, 1, 2]).load_state_dict(state)
    other = make_loader(sources, weights=[1, 1, 2], allow_new_weights=True)
    other.load_state_dict(state)
    after = [text for batch in other for text in texts(batch)]
    assert Counter(text[0] for text in after)["c"] == pytest.approx(len(after) / 2, abs=1)
    seen = [text for batch in before for text in batch if text[0] == "b"] + [text for text in after if text[0] == "b"]
    assert len(set(seen[:17])) == min(17, len(seen))
    back = make_loader(sources, weights=[1, 1, 2], allow_new_weights=True)
    back.load_state_dict(state)
    back.set_epoch(1)
    back.set_epoch(0)
    with pytest.raises(StreamingError, match="position 0 of the run is before position 32"):
        next(iter(back))
    broken = state | {"since": [32, 1, 2, 3]}
    with pytest.raises(StreamingError, match="not the history of a mixture of 3 sources"):
        make_loader(sources, weights=[1, 2, 1]).load_state_dict(broken)
    third = make_loader(sources, weights=[1, 1, 2])
    third.load_state_dict(other.state_dict())
    assert third.state_dict() == other.state_dict()
    assert texts(next(iter(third))) == texts(next(iter(other)))


def test_describe_tells_what_an_epoch_reads(folder: Path, sources: list[Path]) -> None:
    text = make_loader(folder).describe()
    for fact in ("41 samples in 6 shards", "6 steps of 8 samples", "8 lanes with windows of 32 shards"):
        assert fact in text
    text = make_loader(sources, weights=[1, 1, 1]).describe()
    for fact in ("33.33% from source 1", "windows of 85 shards", "reads from the shards of all sources, about 0.00 GB"):
        assert fact in text


def test_it_is_a_loader_of_the_public_package(folder: Path) -> None:
    assert isinstance(make_loader(folder), StreamingLoader)
