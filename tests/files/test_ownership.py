"""One owner of a folder: a dead one blocks nobody for longer than stated, and its children keep nothing."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from captioner.errors import UserError
from captioner.files import ownership
from captioner.files.ownership import owned

ROOT = Path(__file__).resolve().parents[2]
OWNER = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from captioner.files.ownership import owned

with owned(sys.argv[1], doing="holds this"):
    if sys.argv[2:] == ["child"] and os.fork():
        time.sleep(60)  # the child says that it is there
    print("holds", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "BEAT_SECONDS", 0.2)
    monkeypatch.setattr(ownership, "SILENT_SECONDS", 0.8)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "owner.json"


def put(path: Path, **changed: object) -> None:
    """The record of this process, changed, as another left it."""
    record = json.loads(ownership._Claim("", "", id="other").record())
    path.write_text(json.dumps(record | changed))


def seconds_to_own(path: Path) -> float:
    started = time.monotonic()
    with owned(str(path), doing="holds this"):
        assert json.loads(path.read_text())["pid"] == os.getpid()
        return time.monotonic() - started


def assert_refused(path: Path, message: str) -> None:
    with pytest.raises(UserError, match=message), owned(str(path), doing="holds this"):
        pytest.fail("two own it")


def test_a_killed_owners_child_does_not_keep_the_lock(path: Path) -> None:
    """Loader workers are forked from the owner, and may outlive it."""
    command = [sys.executable, "-c", OWNER, str(path), "child"]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "holds\n"
        assert_refused(path, f"process {owner.pid} on .* holds this")
        owner.kill()
        owner.wait()
        assert seconds_to_own(path) < ownership.SILENT_SECONDS
        os.killpg(owner.pid, 0)  # the child is there
    finally:
        os.killpg(owner.pid, signal.SIGKILL)


def test_a_dead_owner_of_this_machine_blocks_nobody(path: Path) -> None:
    put(path, pid=2**22 + 1)
    assert seconds_to_own(path) < ownership.SILENT_SECONDS
    assert not path.exists()


def test_a_dead_owner_of_another_machine_blocks_for_the_stated_time(path: Path) -> None:
    put(path, machine="elsewhere")
    assert ownership.SILENT_SECONDS <= seconds_to_own(path) < ownership.SILENT_SECONDS + 2


def test_a_lock_that_a_file_server_keeps_for_a_dead_machine_blocks_little_longer(path: Path) -> None:
    put(path, machine="elsewhere")
    with path.open() as kept:
        fcntl.flock(kept, fcntl.LOCK_EX)
        assert seconds_to_own(path) < ownership.SILENT_SECONDS + ownership.BEAT_SECONDS + 1


@pytest.fixture
def elsewhere(path: Path) -> Iterator[None]:
    """An owner on another machine, whose locks are not seen here and whose clock does not matter."""
    put(path, machine="elsewhere", host="elsewhere", pid=7)
    ended = threading.Event()

    def beat() -> None:
        number = 0
        while not ended.wait(0.2):
            number += 1
            put(path, machine="elsewhere", host="elsewhere", pid=7, beat=number)

    thread = threading.Thread(target=beat)
    thread.start()
    yield
    ended.set()
    thread.join()


@pytest.mark.usefixtures("elsewhere")
def test_an_owner_on_another_machine_that_is_alive_is_named(path: Path) -> None:
    assert_refused(path, "process 7 on elsewhere holds this")
    assert json.loads(path.read_text())["machine"] == "elsewhere"


def test_of_many_that_find_another_machines_dead_owner_one_takes_over(path: Path) -> None:
    """Threads: a lock belongs to the open file, so they are like processes."""
    put(path, machine="elsewhere")
    outcomes: list[str] = []

    def take() -> None:
        try:
            with owned(str(path), doing="holds this"):
                outcomes.append("owns")
                time.sleep(1)
        except UserError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count("owns") == 1, outcomes
    assert sum(f"process {os.getpid()} on" in outcome for outcome in outcomes) == 3, outcomes
    assert not path.exists()


@pytest.mark.parametrize("found", ["another", "none"])
def test_an_owner_that_lost_its_file_ends_and_leaves_the_others(
    path: Path, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost: list[str] = []
    monkeypatch.setattr(ownership, "_end_process", lambda _claim, owner: lost.append(ownership._name(owner)))
    with owned(str(path), doing="holds this"):
        path.unlink()
        if found == "another":
            put(path, host="elsewhere", pid=7)
        deadline = time.monotonic() + 10
        while not lost and time.monotonic() < deadline:
            time.sleep(0.02)
    assert lost == ["process 7 on elsewhere" if found == "another" else "process ? on ?"]
    assert path.exists() == (found == "another")


def test_a_refused_start_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError), owned(str(tmp_path / "a" / "b" / "owner.json"), doing="holds this"):
        raise UserError("other settings")
    assert list(tmp_path.iterdir()) == []


def test_each_beat_changes_what_the_file_says(path: Path) -> None:
    with owned(str(path), doing="holds this"):
        found = set()
        deadline = time.monotonic() + 10
        while len(found) < 3 and time.monotonic() < deadline:
            found.add(path.read_text())
            time.sleep(0.05)
    assert len({json.loads(text)["id"] for text in found}) == 1
    assert len(found) == 3


def test_a_web_server_is_refused_without_a_request() -> None:
    refused = pytest.raises(UserError, match=r"^cannot write to http://127\.0\.0\.1:1/x \(web servers")
    with refused, owned("http://127.0.0.1:1/x", doing="is training"):
        pass
