"""One job for a run folder: real launchers that are killed, starts beside a running one, and two at the same moment."""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import warm
from tiny import write_shards
from trainer import Running, run_training, start_training

from train.run import launch
from train.run.steps import StopVote

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]
LAUNCHERS = {
    "torchrun": ("torchrun", "--nproc_per_node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"),
    "accelerate": ("accelerate", "launch", "--num_processes", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
}
END_SECONDS = 20.0  # a look each second, ten steps of these, a save, on a busy machine
MODEL = ("--encoder", "small_cnn", "--weights", "none", "--finetune-encoder-from-step", 0, "--crop", 28)
SMALL = ("--batch-size", 4, "--embedding-size", 8, "--hidden-size", 8)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shards(tmp_path_factory.mktemp("launched") / "shards", (9, 8))


def flags(shards: str, run: Path, *more: object, epochs: int = 1000) -> list[object]:
    return ["--shards", shards, "--output", run, *MODEL, *SMALL, "--epochs", epochs, "--workers", 1, *more]


def owner(run: Path) -> dict | None:
    try:
        return json.loads((run / "owner.json").read_text())
    except (FileNotFoundError, ValueError):
        return None


def is_refused(output: str, pid: int) -> bool:
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    return bool(
        re.match(rf"error: process {pid} on \S+ is training in this folder \(\S+owner.json\): wait for it", line)
    )


def steps_done(running: Running) -> int:
    """The step at which a resumed run starts; the run is then killed."""
    while not (found := re.search(r", (\d+) of them done", running.log.read_text() if running.log.exists() else "")):
        assert running.ranks[0].exitcode is None, running.log.read_text()
        time.sleep(0.02)
    running.kill()
    return int(found[1])


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_processes_of_a_killed_launcher_save_and_end(shards: str, tmp_path: Path, launcher: str) -> None:
    """Until then no other job trains there; afterwards --resume continues from their checkpoint."""
    run, log = tmp_path / "run", tmp_path / "log"
    program, *options = LAUNCHERS[launcher]
    command = [Path(sys.executable).parent / program, *options, "train/main.py", *flags(shards, run)]
    with log.open("w") as file:
        process = warm.Popen(
            [*map(str, command)], nested=True, cwd=REPOSITORY, stdout=file, stderr=file,
            env=os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(REPOSITORY)},
        )  # fmt: skip
    while not (run / "history.jsonl").exists():
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    first = owner(run)
    assert first is not None
    done = run_training(flags(shards, run, "--resume"), log=tmp_path / "refused")
    assert done.code == 2, done.output
    assert is_refused(done.output, first["pid"])

    process.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    process.wait()
    while owner(run) is not None:
        assert time.monotonic() - killed < END_SECONDS, log.read_text()
        time.sleep(0.02)
    assert f"the launcher (process {process.pid}) is gone" in log.read_text()
    newest = sorted(run.glob("checkpoints/*/complete.json"))[-1].parent.name
    epoch, step = (int(number) for number in newest.removeprefix("epoch-").split("-"))
    assert epoch * 5 + step > 0

    assert steps_done(start_training(flags(shards, run, "--resume"), log=tmp_path / "resumed")) == epoch * 5 + step


def test_of_starts_at_the_same_moment_one_wins(shards: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    starts = [start_training(flags(shards, run), log=tmp_path / f"log-{number}") for number in range(3)]
    while len(going := [each for each in starts if each.ranks[0].exitcode is None]) > 1 or not owner(run):
        time.sleep(0.02)
    (winner,) = going
    steps_done(winner)
    for each in starts:
        if each is not winner:
            assert each.wait().code == 2, each.log.read_text()
            assert is_refused(each.log.read_text(), winner.ranks[0].pid)


def test_a_killed_job_blocks_nobody(shards: str, tmp_path: Path) -> None:
    """Both ranks with their loader workers, at once."""
    run = tmp_path / "run"
    killed = start_training(flags(shards, run), log=tmp_path / "first", world_size=2)
    while not (run / "history.jsonl").exists():
        assert killed.ranks[0].exitcode is None, killed.log.read_text()
        time.sleep(0.02)
    for rank in killed.ranks:
        os.kill(rank.pid, signal.SIGKILL)  # not their workers
        rank.join()
    assert owner(run) is not None
    steps_done(start_training(flags(shards, run, "--resume"), log=tmp_path / "second", world_size=2))


@pytest.mark.parametrize(("step_seconds", "wanted"), [(0.1, [1, 11, 21]), (2.0, [1, 3, 5]), (60.0, [1, 2, 3])])
def test_ranks_ask_each_other_every_few_seconds_or_after_each_step(
    step_seconds: float, wanted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that SIGTERM is not left waiting for ten slow steps, while the launcher kills after 30 s."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    others: Any = SimpleNamespace(
        num_processes=2, device="cpu", reduce=lambda own, reduction: own + torch.tensor([1.0, float(own[1])])
    )
    vote, asked = StopVote(accelerator=others, started=0.0), []
    for step in range(1, 30):
        clock[0] += step_seconds
        if vote.wants_stop(False, now=False):
            asked.append(step)
    assert asked[:3] == wanted


@pytest.mark.parametrize("launched", [True, False])
def test_only_a_launchers_end_counts_as_sigterm(launched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that was started by hand may outlive its parent, as under nohup."""
    for name in launch.LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    if launched:
        monkeypatch.setenv(launch.LAUNCHERS[0], "1")
    parents, sent = iter([7, 7, 7]), []
    monkeypatch.setattr(launch, "LAUNCHER_POLL_SECONDS", 0.01)
    monkeypatch.setattr(os, "getppid", lambda: next(parents, 1))
    monkeypatch.setattr(os, "kill", lambda *arguments: sent.append(arguments))
    launch.end_with_launcher()
    time.sleep(0.3)
    assert sent == ([(os.getpid(), signal.SIGTERM)] if launched else [])
