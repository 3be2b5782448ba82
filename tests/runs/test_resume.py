"""Real ranks consume the stream: killed and resumed with others they see exactly the rest; none hangs, none repeats."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
from consumer import CHECKPOINT_STEPS, GLOBAL_BATCH, Job, Seen, context, finish, seen, start, wait, wait_in_workers
from servers import Bucket, free_port, run_nginx
from tiny import write_shards

from captioner.errors import UserError
from captioner.streaming.dataset import read_split
from captioner.streaming.order import ShardOrder
from train.data.batches import caption_loader
from train.data.folders import read_merged_vocabulary, read_validation
from train.run.agreement import ENCODER_WEIGHTS, check_same_start

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]
SIZES = (5, 11, 1, 9, 14, 0, 8, 3, 12)
EPOCHS = 3
STEPS = -(-sum(SIZES) // GLOBAL_BATCH)

Order = dict[tuple[int, int], list[tuple[int, str]]]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shards(tmp_path_factory.mktemp("resume") / "shards", SIZES)


def order(rows: list[Seen]) -> Order:
    """By epoch and step the global batch's samples in order, from the rows of all its ranks, of which none may miss."""
    found: dict[tuple[int, int], dict[int, Seen]] = {}
    for row in rows:
        found.setdefault((row.epoch, row.step), {})[row.rank] = row
    together = {}
    for place, ranks in found.items():
        assert sorted(ranks) == list(range(ranks[0].world_size))
        together[place] = sorted(pair for row in ranks.values() for pair in zip(row.positions, row.keys, strict=True))
    return together


@pytest.fixture(scope="module")
def undisturbed(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Order:
    run = tmp_path_factory.mktemp("undisturbed")
    finish(Job(shards=(shards,), run=run, epochs=EPOCHS))
    found = order(seen(run))
    for epoch in range(EPOCHS):
        consumed = [pair for step in range(STEPS) for pair in found[epoch, step]]
        assert [position for position, _ in consumed] == list(range(sum(SIZES)))
        assert len({key for _, key in consumed}) == sum(SIZES)
    assert len(found) == STEPS * EPOCHS
    return found


# ---- killed and resumed -------------------------------------------------------------------------------------


def test_killed_and_resumed_with_other_ranks_and_workers(shards: str, undisturbed: Order, tmp_path: Path) -> None:
    """Each process sees the plan's samples from its checkpoint on, and all together see the whole, over epochs."""
    run = tmp_path / "run"
    views: dict[str, set[str]] = {}
    for world_size, workers, dies_at in ((1, 0, (0, 4)), (2, 2, (0, 13)), (1, 1, (1, 5)), (2, 0, (2, 1))):
        kill(Job(shards=(shards,), run=run, epochs=EPOCHS, workers=workers, dies_at=dies_at), world_size=world_size)
    finish(Job(shards=(shards,), run=run, epochs=EPOCHS))
    rows = seen(run)
    found: Order = {}
    for row in rows:
        wanted = undisturbed[row.epoch, row.step]
        first, end = (len(wanted) * rank // row.world_size for rank in (row.rank, row.rank + 1))
        assert list(zip(row.positions, row.keys, strict=True)) == wanted[first:end]
        found.setdefault((row.epoch, row.step), [])
        views.setdefault(f"{row.epoch} {row.positions}", set()).add(row.views)
    assert found.keys() == undisturbed.keys()
    assert all(len(digests) == 1 for digests in views.values())  # crops and flips too
    assert {row.world_size for row in rows} == {1, 2}


def kill(job: Job, *, world_size: int) -> None:
    """Run the job until it dies."""
    ranks = start(job, world_size=world_size)
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [-signal.SIGKILL] * world_size


def test_after_a_kill_training_goes_on_at_the_checkpoint(shards: str, tmp_path: Path) -> None:
    job = Job(shards=(shards,), run=tmp_path / "run", dies_at=(0, 2 * CHECKPOINT_STEPS + 1))
    kill(job, world_size=1)
    before = len(seen(job.run))
    finish(Job(shards=(shards,), run=job.run))
    steps = [row.step for row in seen(job.run)]
    assert steps[before] == before // CHECKPOINT_STEPS * CHECKPOINT_STEPS
    assert steps[before:] == list(range(steps[before], STEPS))


# ---- loader workers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ending", "forked"),
    [(ending, True) for ending in ("exit", "held", "traceback", "signalled", "killed")] + [("held", False)],
)
def test_workers_that_wait_for_a_server_end_with_training_and_not_before(
    shards: str, tmp_path: Path, ending: str, forked: bool
) -> None:
    """However it ends, and though a launcher has sent SIGTERM to all processes."""
    pids = tmp_path / "pids"
    if forked:
        process = context.Process(target=wait_in_workers, args=(shards, ending, pids))
        process.start()
    else:
        arguments = f"({shards!r}, {ending!r}, Path({str(pids)!r}))"
        code = f"from pathlib import Path; import consumer; consumer.wait_in_workers{arguments}"
        path = os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "tests/support")))
        process = Interpreter([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path})
    while not pids.exists():
        assert process.is_alive()
        time.sleep(0.02)
    if ending == "killed":
        process.kill()
    started = time.monotonic()
    process.join(30)
    assert not process.is_alive()
    while alive := [pid for pid in json.loads(pids.read_text()) if is_running(pid)]:
        assert time.monotonic() - started < 4, alive
        time.sleep(0.02)


class Interpreter(subprocess.Popen):
    """A process that ends as an interpreter does, with the methods of one from the server."""

    def is_alive(self) -> bool:
        return self.poll() is None

    def join(self, seconds: float) -> None:
        self.wait(seconds)


def is_running(pid: int) -> bool:
    """Whether a process is there, and not only waits for its parent to look."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


# ---- odd datasets on two ranks ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "workers"),
    [((9, 2), 1), ((7,), 2), ((1,), 3), ((3, 3, 3), 0), ((0, 5), 0)],
    ids=["unequal", "one shard, two workers", "one sample", "a rank without share at the end", "an empty shard"],
)
def test_two_ranks_neither_hang_nor_share_a_sample(tmp_path: Path, sizes: tuple[int, ...], workers: int) -> None:
    folder = write_shards(tmp_path / "shards", sizes)
    finish(Job(shards=(folder,), run=tmp_path / "run", epochs=2, workers=workers), world_size=2)
    rows = seen(tmp_path / "run")
    found = order(rows)
    for epoch in (0, 1):
        keys = [key for (e, _), pairs in found.items() if e == epoch for _, key in pairs]
        assert len(keys) == len(set(keys)) == sum(sizes)
        steps = [sorted(r.step for r in rows if (r.epoch, r.rank) == (epoch, rank)) for rank in (0, 1)]
        assert steps[0] == steps[1] == list(range(-(-sum(sizes) // GLOBAL_BATCH)))


def test_folders_are_mixed_into_one_epoch(tmp_path: Path) -> None:
    """Two folders whose samples even have the same keys."""
    folders = (write_shards(tmp_path / "a", (5, 4)), write_shards(tmp_path / "b", (7,), first=3))
    finish(Job(shards=folders, run=tmp_path / "run"), world_size=2)
    found = order(seen(tmp_path / "run"))
    keys = [key for pairs in found.values() for _, key in pairs]
    split = read_split(folders, "train", remedy="")
    assert sorted(keys) == sorted([f"train-{n:09d}" for n in range(9)] + [f"train-{n:09d}" for n in range(3, 10)])
    plan = ShardOrder(split.sizes, seed=1, batch_size=GLOBAL_BATCH, shuffle_shards=8)
    origins = [ref.shard == 2 for ref in plan.refs(0, range(16))]
    assert True in origins[:8]
    assert True in origins[8:]


def test_a_val_split_that_is_empty_or_absent_is_none(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", (2,))
    assert read_validation([folder]) is None
    write_shards(tmp_path / "shards", (0,), split="val")
    assert read_validation([folder]) is None
    other = write_shards(tmp_path / "other", (3,), split="val")
    split = read_validation([folder, other])
    assert split is not None
    assert split.num_samples == 3


# ---- behind URLs --------------------------------------------------------------------------------------------


def test_two_ranks_stream_from_s3_through_one_cache(
    shards: str, undisturbed: Order, bucket: Bucket, tmp_path: Path
) -> None:
    bucket.put_folder(Path(shards), "shards")
    job = Job(shards=(f"s3://{bucket.name}/shards",), run=tmp_path / "run", workers=1, cache=tmp_path / "cache")
    finish(job, world_size=2)
    assert order(seen(job.run)) == {place: pairs for place, pairs in undisturbed.items() if place[0] == 0}
    assert len(list((tmp_path / "cache").glob("*.tar"))) == len([size for size in SIZES if size])


@pytest.mark.external
def test_a_web_server_that_restarts_in_the_middle_of_an_epoch_loses_nothing(
    shards: str, undisturbed: Order, tmp_path: Path
) -> None:
    port = free_port()
    url, cache = f"http://127.0.0.1:{port}", tmp_path / "cache"
    job = Job(shards=(url,), run=tmp_path / "run", epochs=2, pause=0.05, cache=cache)
    with run_nginx(Path(shards), tmp_path / "first", port=port):
        ranks = start(job, world_size=2)
        while len(seen(job.run)) < 4 and all(rank.is_alive() for rank in ranks):
            time.sleep(0.01)
    shutil.rmtree(cache, ignore_errors=True)  # what was fetched must come once more
    time.sleep(1)
    with run_nginx(Path(shards), tmp_path / "second", port=port):
        wait(ranks)
    assert order(seen(job.run)) == {place: pairs for place, pairs in undisturbed.items() if place[0] < 2}


def test_evaluation_needs_room_for_few_shards(shards: str, nginx: tuple[str, Path], tmp_path: Path) -> None:
    """It reads one after the other, however many there are."""
    address, root = nginx
    folder = Path(write_shards(root / "many", (3,) * 20, split="val"))
    split = read_split([f"{address}/many"], "val", remedy="")
    num_bytes = sum(path.stat().st_size for path in folder.glob("val-*"))
    loader = caption_loader(
        split, batch_size=GLOBAL_BATCH, crop=28, max_tokens=9, vocabulary=read_merged_vocabulary([shards]),
        cache=tmp_path / "cache", cache_gigabytes=num_bytes / 2e9,
    )  # fmt: skip
    assert [position for (batch,) in loader for position in batch.positions] == list(range(60))


# ---- mistakes -----------------------------------------------------------------------------------------------


def test_ranks_with_other_data_or_settings_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weights file and a cache folder need not be the same on each machine."""
    own = {"train shards": "a", "val shards": None, ENCODER_WEIGHTS: "w", "epochs": 3, "cache": "here"}
    for changes, said in (
        ({ENCODER_WEIGHTS: None, "cache": "there"}, None),
        ({"val shards": "b"}, "rank 1 on other has val shards b, rank 0 on .* has None: give all machines"),
        ({"epochs": 4}, "rank 1 on other has epochs 4, rank 0 on .* has 3: give all machines"),
    ):
        monkeypatch.setattr("train.run.agreement.gather_object", lambda found, c=changes: [*found, ("other", own | c)])
        with pytest.raises(UserError, match=said) if said else nullcontext():
            check_same_start(own)
