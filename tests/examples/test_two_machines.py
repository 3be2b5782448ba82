"""What several machines need: the loss of one ends the others soon, resumably; all share one run; the rehearsal."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import warm
from tiny import write_shards
from torch.distributed import DistBackendError, DistNetworkError
from trainer import Running, start_training

from train.run.launch import is_lost_peer

pytestmark = [pytest.mark.slow, pytest.mark.external]

REPOSITORY = Path(__file__).resolve().parents[2]
MODEL = ("--encoder", "small_cnn", "--weights", "none", "--finetune-encoder-from-step", 0, "--crop", 28)
SMALL = ("--batch-size", 4, "--embedding-size", 8, "--hidden-size", 8, "--epochs", 100, "--checkpoint-steps", 3)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shards(tmp_path_factory.mktemp("machines") / "shards", (9, 8))


def start_two(shards: str, output: Path, *, workers: int = 0, peer_seconds: float = 60.0) -> Running:
    """Two ranks after their first checkpoint."""
    flags = ["--shards", shards, "--output", output, *MODEL, *SMALL, "--workers", workers]
    running = start_training(flags, log=output.with_suffix(".log"), world_size=2, peer_seconds=peer_seconds)
    while not list(output.glob("checkpoints/*/complete.json")):
        assert running.ranks[0].exitcode is None, running.log.read_text()
        time.sleep(0.02)
    return running


@pytest.mark.parametrize(
    ("blow", "workers", "peer_seconds"),
    [(signal.SIGKILL, 0, 60.0), (signal.SIGSTOP, 1, 5.0)],
    ids=["killed", "silent"],
)
def test_a_rank_ends_resumably_when_another_is_lost(
    shards: str, tmp_path: Path, blow: signal.Signals, workers: int, peer_seconds: float
) -> None:
    """At once where the other's end is known, after the timeout where nothing comes; its loader processes end too."""
    running = start_two(shards, tmp_path / "run", workers=workers, peer_seconds=peer_seconds)
    first, second = running.ranks
    os.kill(second.pid, blow)
    first.join(20)
    with pytest.raises(ProcessLookupError):
        os.killpg(first.pid, 0)
    second.kill()
    done = running.wait()
    assert done.code == 75, done.output
    assert "lost contact with another process of this job" in done.output
    assert bool(re.search("Timed out|timeout", done.output)) == (blow == signal.SIGSTOP)
    assert "Traceback" not in done.output


def test_sigterm_to_one_rank_stops_both(shards: str, tmp_path: Path) -> None:
    running = start_two(shards, tmp_path / "run")
    os.kill(running.ranks[1].pid, signal.SIGTERM)
    done = running.wait()
    assert [rank.exitcode for rank in running.ranks] == [75, 75], done.output
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    ("rank_flags", "message"),
    [
        (
            [("--output", "one"), ("--output", "two")],
            "--output must be a folder on a file system that all machines share",
        ),
        (
            [("--output", "run"), ("--output", "run", "--schedule", "constant")],
            "give all machines the same shards and the same flags",
        ),
    ],
    ids=["folders", "flags"],
)
def test_ranks_that_do_not_share_a_run_are_refused(
    shards: str, tmp_path: Path, rank_flags: list[tuple[str, ...]], message: str
) -> None:
    """On all ranks: none waits for one that is gone."""
    own = [[tmp_path / word if word in ("one", "two", "run") else word for word in words] for words in rank_flags]
    running = start_training(["--shards", shards, *MODEL, *SMALL], log=tmp_path / "log", world_size=2, rank_flags=own)
    done = running.wait()
    assert [rank.exitcode for rank in running.ranks] == [2, 2], done.output
    assert done.output.count(message) == 2


def test_a_folder_that_rank_0_cannot_write_is_told_on_all(shards: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    flags = ["--shards", shards, "--output", tmp_path / "file" / "run", *MODEL, *SMALL]
    running = start_training(flags, log=tmp_path / "log", world_size=2)
    done = running.wait()
    assert [rank.exitcode for rank in running.ranks] == [2, 2], done.output
    assert done.output.count(": give another --output") == 2


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[/src/gloo/transport/tcp/pair.cc:561] Connection closed by peer [10.0.0.2]:4040."), True),
        (RuntimeError("[/src/gloo/transport/tcp/device.cc:120] Unable to find address for: nope"), False),
        (RuntimeError("Application timeout caused pair closure"), True),
        (DistNetworkError("failed to recv, got 0 bytes"), True),
        (DistNetworkError("The server socket has failed to listen on any local network address."), False),
        (DistBackendError("NCCL error, ncclInvalidUsage: Duplicate GPU detected"), False),
        (RuntimeError("the ranks hold different weights"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_errors_of_connections_are_told_from_others(error: RuntimeError, lost: bool) -> None:
    assert is_lost_peer(error) == lost


@pytest.mark.timeout(900)
@pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0 or not all(map(shutil.which, ("ip", "unshare", "nginx"))),
    reason="needs root, ip, unshare and nginx",
)
def test_the_rehearsal_on_two_machines_ends_well(tmp_path: Path) -> None:
    """It ends with 0 only where the run that lost a machine became what the undisturbed one did; nothing is left."""
    command = [sys.executable, "examples/two_machines.py", "--output", str(tmp_path / "out")]
    process = warm.Popen(
        [*command, "--pictures", "240", "--epochs", "2"],
        cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert str(process.pid) not in subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
