"""Processes that watch each other's files: who is gone, who never came, who is only slow."""

import time
from contextlib import suppress
from pathlib import Path
from threading import Thread

import pytest

from captioner.errors import UserError
from infer.peers import Peers, find_peers
from infer.results import find_process_files, process_path


@pytest.fixture(autouse=True)
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPTIONER_PEER_TIMEOUT_SECONDS", "0.6")
    monkeypatch.setattr("signal.signal", lambda *_: None)  # only the main thread may


def finish(peers: Peers, num_rows: int, found: dict[int, int | None]) -> None:
    """What a process does, and in `found` what came of it: its exit code, or None."""
    try:
        with peers:
            peers.finish(num_rows)
            if peers.is_main:
                peers.dismiss()
        found[peers.rank] = None
    except SystemExit as end:
        found[peers.rank] = end.code  # type: ignore[assignment]


def finish_all(jobs: list[Peers], *, pauses: dict[int, float] | None = None) -> dict[int, int | None]:
    found: dict[int, int | None] = {}
    threads = [Thread(target=finish, args=(peers, 10**peers.rank, found)) for peers in jobs]
    for peers, thread in zip(jobs, threads, strict=True):
        time.sleep((pauses or {}).get(peers.rank, 0))
        thread.start()
    for thread in threads:
        thread.join(20)
    return found


def make_job(output: Path, world_size: int) -> list[Peers]:
    return [Peers(output, rank=rank, world_size=world_size) for rank in range(world_size)]


def test_one_process_alone_waits_for_nobody_and_leaves_no_file(tmp_path: Path) -> None:
    with Peers(tmp_path / "c.jsonl") as peers:
        peers.check()
        assert peers.finish(3) == [3]
        assert list(tmp_path.iterdir()) == []
        peers.dismiss()


@pytest.mark.parametrize("order", [1, -1])
def test_all_end_together_whoever_is_first_and_leave_no_file(tmp_path: Path, order: int) -> None:
    (tmp_path / "c.jsonl.process-7").write_text("of a job that was killed")
    jobs = make_job(tmp_path / "c.jsonl", 4)
    assert finish_all(jobs[::order], pauses={2: 0.3}) == dict.fromkeys(range(4))
    assert list(tmp_path.iterdir()) == []


def test_rank_0_knows_the_number_of_all_rows(tmp_path: Path) -> None:
    main, *others = make_job(tmp_path / "c.jsonl", 3)
    found: dict[int, int | None] = {}
    threads = [Thread(target=finish, args=(peers, 10**peers.rank, found)) for peers in others]
    with main:
        for thread in threads:
            thread.start()
        assert main.finish(1) == [111]
        main.dismiss()
    for thread in threads:
        thread.join()
    assert found == {1: None, 2: None}


def test_a_process_that_never_comes_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As where the machines do not see the same folder."""
    started = time.monotonic()
    assert finish_all(make_job(tmp_path / "c.jsonl", 3)[:2])[0] == 75
    assert time.monotonic() - started < 10
    assert f"process 2 of this job has not begun within 1 s (all must see {tmp_path})" in capsys.readouterr().err


@pytest.mark.parametrize("state", ["working", "finished", "failed"])
@pytest.mark.parametrize("rank", [0, 1])
def test_files_of_a_killed_job_speak_for_nobody(tmp_path: Path, state: str, rank: int) -> None:
    output = tmp_path / "c.jsonl"
    for peers in make_job(output, 2):
        peers.__enter__()
        peers._write(state=state)
        peers._left.set()
    time.sleep(0.05)
    alone = Peers(output, rank=rank, world_size=2)
    assert finish_all([alone]) == {rank: 75}
    assert len(find_process_files(output)) == 2
    assert finish_all(make_job(output, 2), pauses={1: 0.3}) == {0: None, 1: None}


def test_one_that_works_for_long_is_waited_for_and_may_look(tmp_path: Path) -> None:
    main, other = make_job(tmp_path / "c.jsonl", 2)
    found: dict[int, int | None] = {}
    with main:
        thread = Thread(target=finish, args=(other, 1, found))
        thread.start()
        for _ in range(15):
            time.sleep(0.1)
            main.check()
        assert found == {}
        main.finish(1)
        main.dismiss()
    thread.join(10)
    assert found == {1: None}


def test_a_failure_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPTIONER_PEER_TIMEOUT_SECONDS", "30")
    main, other = make_job(tmp_path / "c.jsonl", 2)
    found: dict[int, int | None] = {}
    thread = Thread(target=finish, args=(other, 1, found))
    thread.start()
    with suppress(UserError), main:
        time.sleep(0.3)
        raise UserError("no room")
    thread.join(10)
    assert found == {1: 75}


def test_a_process_that_was_stopped_itself_takes_nobody_for_lost(tmp_path: Path) -> None:
    """As on a laptop that was closed: it looks first, and later, before it judges."""
    main, other = make_job(tmp_path / "c.jsonl", 2)
    with other, main:
        time.sleep(0.1)
        main._left.set()
        other._left.set()
        time.sleep(1.0)
        main._look()
        main.check()


@pytest.mark.parametrize("text", ["", "ten", "nan", "inf", "0", "-1"])
def test_a_patience_that_is_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("CAPTIONER_PEER_TIMEOUT_SECONDS", text)
    with pytest.raises(UserError, match=r"CAPTIONER_PEER_TIMEOUT_SECONDS is .*: give a number of seconds"):
        Peers(tmp_path / "c.jsonl")


def test_the_environment_says_who_this_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (find_peers(tmp_path / "c").rank, find_peers(tmp_path / "c").world_size) == (0, 1)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="RANK does not say"):
        find_peers(tmp_path / "c")
    monkeypatch.setenv("RANK", "2")
    assert (find_peers(tmp_path / "c").rank, find_peers(tmp_path / "c").world_size) == (2, 3)
    assert process_path(tmp_path / "c", 2).name == "c.process-2"
