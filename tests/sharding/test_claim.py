"""One packer at a time: real processes that claim the same split, and die with it."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import warm
from servers import Bucket

from captioner.errors import UserError
from captioner.files import ownership, storage
from captioner.files.ownership import AlreadyOwnedError, NotWritableError
from captioner.shards.writing import claim

ROOT = Path(__file__).resolve().parents[2]
PACKER = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from captioner.errors import UserError
from captioner.files import ownership
from captioner.shards.writing import claim

folder, split = sys.argv[1:3]
seconds, ownership.BEAT_SECONDS, ownership.SILENT_SECONDS = map(float, sys.argv[3:])
print("ready", flush=True)
time.sleep(max(0.0, float(input()) - time.time()))
try:
    with claim(folder, split):
        print("holds", flush=True)
        time.sleep(seconds)
    print("done", flush=True)
except UserError as error:
    print("refused", error, flush=True)
"""


def packers(folder: str, *, number: int, hold: float, beat: float = 0.3, silent: float = 3.0) -> list[Any]:
    """Processes that claim the training split at the same moment, and hold it for some seconds."""
    line = [sys.executable, "-c", PACKER, folder, "train", *map(str, (hold, beat, silent))]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes: list[Any] = [warm.Popen(line, **pipes) for _ in range(number)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    start = time.time() + 0.1
    for process in processes:
        process.stdin.write(f"{start}\n")
        process.stdin.flush()
    return processes


@contextmanager
def holding(folder: str, *, hold: float = 60.0) -> Iterator[Any]:
    """One such process, when it has the claim."""
    (process,) = packers(folder, number=1, hold=hold)
    try:
        assert process.stdout.readline() == "holds\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def race(folder: str, *, number: int) -> list[str]:
    """The last words of packers that start at once; the winner's are first."""
    processes = packers(folder, number=number, hold=4.0)
    return sorted(process.communicate(timeout=90)[0].splitlines()[-1] for process in processes)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "BEAT_SECONDS", 0.3)
    monkeypatch.setattr(ownership, "SILENT_SECONDS", 1.5)


# ---- on disk ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_second_packer_is_refused_with_the_first_ones_name_and_the_file_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "shards"
    with holding(str(folder), hold=2.0) as first:
        with (
            pytest.raises(
                AlreadyOwnedError, match=f"process {first.pid} on {socket.gethostname()} is packing"
            ) as caught,
            claim(str(folder), "train"),
        ):
            pytest.fail("two hold it")
        assert "\n" not in str(caught.value)
        with claim(str(folder), "val"):
            pass
        assert first.communicate(timeout=20)[0] == "done\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_killed_packers_claim_is_free_at_once_and_its_partial_files_are_removed(tmp_path: Path) -> None:
    with holding(str(tmp_path)) as first:
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
    assert (tmp_path / "train.packing").exists()
    half = [f"{name}.123.partial" for name in ("train-000000.tar", "train.manifest.json", "vocabulary.json")]
    other = ["val-000000.tar.123.partial", "trained.tar.123.partial", "train-000000.tar", "my.partial"]
    for name in half + other:
        (tmp_path / name).touch()
    started = time.monotonic()
    with claim(str(tmp_path), "train"):
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*other, "train.packing"])
    assert time.monotonic() - started < 1
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(other)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("failure", [UserError("x"), KeyboardInterrupt(), OSError("x")])
def test_a_failed_packer_releases_its_claim(tmp_path: Path, failure: BaseException) -> None:
    for folder in (str(tmp_path), "memory://claim/failing"):
        with pytest.raises(type(failure)), claim(folder, "train"):
            raise failure
        assert not storage.exists(storage.join(folder, "train.packing"))


@pytest.mark.slow
def test_of_many_packers_that_start_at_once_one_wins(tmp_path: Path) -> None:
    words = race(str(tmp_path), number=4)
    assert words[0] == "done"
    assert all(word.startswith("refused process ") for word in words[1:])
    assert list(tmp_path.iterdir()) == []


def test_the_claim_passes_on_between_packers_that_come_and_go(tmp_path: Path) -> None:
    """Threads that retry; a file lock belongs to the open file, so they are like processes.

    Each holds the claim until another one was refused.
    """
    inside, most, turns = [0], [0], [0]
    said: set[str] = set()
    lock, refused = threading.Lock(), threading.Event()

    def packs() -> None:
        while turns[0] < 10:
            try:
                with claim(str(tmp_path), "train"):
                    with lock:
                        inside[0] += 1
                        most[0] = max(most[0], inside[0])
                    if turns[0] < 10:
                        refused.clear()
                        refused.wait(60)
                    with lock:
                        inside[0] -= 1
                        turns[0] += 1
            except UserError as error:
                said.add(str(error))
                refused.set()

    threads = [threading.Thread(target=packs) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] == 1
    assert turns[0] >= 10
    assert said
    assert all(f"process {os.getpid()} on" in refusal for refusal in said)


def test_a_holder_that_ends_while_it_is_asked_who_it_is_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "train.packing"
    holder = path.open("a+")
    fcntl.flock(holder, fcntl.LOCK_EX)

    def end() -> None:
        path.unlink()
        holder.close()

    threading.Timer(0.2, end).start()
    with claim(str(tmp_path), "train"):
        assert json.loads(path.read_text())["pid"] == os.getpid()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("content", ["", "\0\0", "[]", '{"pid": "x"}', "{"])
def test_a_leftover_of_any_content_blocks_nobody(tmp_path: Path, content: str) -> None:
    (tmp_path / "train.packing").write_text(content)
    with claim(str(tmp_path), "train"):
        pass


def test_a_folder_that_cannot_be_written_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "shards" / "train.packing").mkdir(parents=True)
    for folder in (tmp_path / "file", tmp_path / "file" / "deep", tmp_path / "shards", Path("/proc/shards")):
        with pytest.raises(NotWritableError, match=r"^cannot write to \S+ \(.+\)$"), claim(str(folder), "train"):
            pytest.fail("held")


@pytest.mark.usefixtures("quick")
def test_on_a_disk_without_locks_the_claim_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with claim(str(tmp_path), "train"):
        written = json.loads((tmp_path / "train.packing").read_text())
        assert written["pid"] == os.getpid()
        with pytest.raises(AlreadyOwnedError, match=f"process {os.getpid()} on"), claim(str(tmp_path), "train"):
            pytest.fail("held")
    (tmp_path / "train.packing").write_text(json.dumps(written))  # as a killed process leaves it
    with claim(str(tmp_path), "train"):
        pass
    assert list(tmp_path.iterdir()) == []


# ---- behind a URL -----------------------------------------------------------------------------------------


def put_claim(bucket: Bucket, **changed: Any) -> None:
    content = {"id": "other", "host": "elsewhere", "machine": "elsewhere", "pid": 1, "beat": 0} | changed
    bucket.put("shards/train.packing", json.dumps(content).encode())


@pytest.mark.usefixtures("quick")
def test_a_live_claim_behind_a_url_is_refused_and_kept_alive(bucket: Bucket) -> None:
    folder = f"s3://{bucket.name}/shards"
    with holding(folder, hold=5.0) as first:
        beats = set()
        for _ in range(2):
            with (
                pytest.raises(
                    AlreadyOwnedError, match=f"process {first.pid} on {socket.gethostname()} is packing"
                ) as caught,
                claim(folder, "train"),
            ):
                pytest.fail("two hold it")
            assert "\n" not in str(caught.value)
            beats.add(bucket.read_all("shards")["train.packing"])
            time.sleep(1.2)
        assert len(beats) == 2
        with claim(folder, "val"):
            pass
        assert first.communicate(timeout=30)[0] == "done\n"
    assert bucket.read_all("shards") == {}


@pytest.mark.usefixtures("quick")
def test_a_dead_process_of_this_machine_loses_its_claim(bucket: Bucket) -> None:
    folder = f"s3://{bucket.name}/shards"
    with holding(folder) as first:
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
    assert bucket.read_all("shards")
    with claim(folder, "train"):
        assert json.loads(bucket.read_all("shards")["train.packing"])["pid"] == os.getpid()
    assert bucket.read_all("shards") == {}


@pytest.mark.usefixtures("quick")
def test_another_machines_silent_claim_is_taken_over(bucket: Bucket) -> None:
    put_claim(bucket)
    with claim(f"s3://{bucket.name}/shards", "train"):
        assert json.loads(bucket.read_all("shards")["train.packing"])["pid"] == os.getpid()


@pytest.mark.usefixtures("quick")
def test_another_machine_that_is_alive_keeps_its_claim(bucket: Bucket) -> None:
    put_claim(bucket)
    ended = threading.Event()

    def beat() -> None:
        number = 0
        while not ended.wait(0.1):
            number += 1
            put_claim(bucket, beat=number)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(AlreadyOwnedError, match="process 1 on"), claim(f"s3://{bucket.name}/shards", "train"):
            pytest.fail("held")
    finally:
        ended.set()
        thread.join()


@pytest.mark.usefixtures("quick")
def test_a_silent_owner_that_lost_its_claim_leaves_it_to_the_other(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[str] = []
    monkeypatch.setattr(ownership, "_end_process", lambda _claim, owner: ended.append(owner["id"]))
    with claim(f"s3://{bucket.name}/shards", "train"):
        put_claim(bucket)
        deadline = time.monotonic() + 30
        while not ended and time.monotonic() < deadline:
            time.sleep(0.05)
    assert ended == ["other"]
    assert json.loads(bucket.read_all("shards")["train.packing"])["id"] == "other"


@pytest.mark.parametrize(("left", "number"), [(False, 3), (True, 2)])
def test_of_many_packers_that_start_at_once_behind_a_url_one_wins(bucket: Bucket, left: bool, number: int) -> None:
    """Whether there is no claim, or a dead packer's."""
    if left:
        put_claim(bucket)
    words = race(f"s3://{bucket.name}/shards", number=number)
    assert words[0] == "done"
    assert all(word.startswith("refused process ") for word in words[1:])
    assert bucket.read_all("shards") == {}


def test_a_bucket_that_is_not_there_is_refused_in_one_line(bucket: Bucket) -> None:
    with (
        pytest.raises(NotWritableError, match="cannot write to s3://") as caught,
        claim(f"s3://{bucket.name}-none/x", "train"),
    ):
        pytest.fail("held")
    assert "\n" not in str(caught.value)
