"""Loops of others, killed with -9 and resumed on other ranks and workers, consume what one whole run does."""

import importlib.util
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from streaming_data import write_split
from streaming_jobs import BATCH, EPOCHS, open_loader

SIZES = (7, 5, 11, 1, 9, 8)
NUM_STEPS = 4  # of an epoch of 41 samples
SECONDS = 120
JOBS = Path(__file__).with_name("streaming_jobs.py")

Consumed = dict[tuple[int, int], list[str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A split of 41 text samples."""
    return write_split(tmp_path_factory.mktemp("resume") / "shards", SIZES)


@pytest.mark.parametrize("loop", ["plain", "accelerate", "lightning"])
def test_a_killed_loop_goes_on_with_what_the_whole_run_would_have_consumed(
    folder: Path, tmp_path: Path, loop: str
) -> None:
    if loop == "lightning" and importlib.util.find_spec("lightning") is None:
        pytest.skip("Lightning is not installed")
    chance = random.Random(f"{loop} 5")
    first, second = chance.randint(1, 3), chance.randint(5, 9)  # the second run goes over an epoch's end
    consumed: Consumed = {}
    stands = (0, 0)
    start_method = "spawn" if loop == "plain" else "fork"
    for ranks, workers, until in ((1, 0, first), (3, 2, second), (2, 1, None)):
        for log in tmp_path.glob("rank-*.jsonl"):
            log.unlink()
        run(loop, folder, tmp_path, ranks=ranks, workers=workers, start_method=start_method, until=until)
        found = read(tmp_path)
        assert min(found) == stands, "it began elsewhere than the state stands"
        epoch, step = read_state(loop, tmp_path) if until is not None else (EPOCHS, 0)
        stands = (epoch, step) if step < NUM_STEPS else (epoch + 1, 0)
        consumed |= {place: texts for place, texts in found.items() if place < stands}
    assert consumed == whole_run(folder)


def whole_run(folder: Path) -> Consumed:
    """What a run of one process that nobody disturbs consumes."""
    loader = open_loader(str(folder), 0, "fork")
    found: Consumed = {}
    for epoch in range(EPOCHS):
        for step, (texts, _) in enumerate(loader):
            found[epoch, step] = texts
        assert len({text for (e, _), texts in found.items() if e == epoch for text in texts}) == sum(SIZES)
    return found


def run(
    loop: str, folder: Path, output: Path, *, ranks: int, workers: int, start_method: str, until: int | None
) -> None:
    """Start all ranks; kill them with -9 when one has consumed the run's `until`-th step, or wait for the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(JOBS), loop, str(folder), str(output), str(workers), start_method]
    processes = []
    for rank in range(ranks):
        launched = {
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "GROUP_RANK": 0,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test",
            "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": 1,
        }  # fmt: skip
        environment = os.environ | {name: str(value) for name, value in launched.items()}
        with (output / f"output-{rank}.txt").open("w") as file:
            processes.append(subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT))
    try:
        deadline = time.monotonic() + SECONDS
        while any(process.poll() is None for process in processes):
            assert time.monotonic() < deadline, outputs(output)
            failed = [process for process in processes if process.poll() not in (None, 0)]
            assert not failed, outputs(output)
            if until is not None and max(read(output, whole=False), default=(0, -1)) >= divmod(until, NUM_STEPS):
                break
            time.sleep(0.005)
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.wait()
    if until is None:
        assert [process.returncode for process in processes] == [0] * ranks, outputs(output)


def outputs(output: Path) -> str:
    """What the ranks printed."""
    return "\n".join(path.read_text()[-2000:] for path in sorted(output.glob("output-*.txt")))


def read(output: Path, *, whole: bool = True) -> Consumed:
    """What the ranks consumed in each (epoch, step); those that all had, if `whole`."""
    found: dict[tuple[int, int], list[list[str]]] = {}
    logs = sorted(output.glob("rank-*.jsonl"))
    for log in logs:
        for line in log.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                row = json.loads(line)
                found.setdefault((row["epoch"], row["step"]), []).append(row["texts"])
    return {
        place: [text for part in parts for text in part]
        for place, parts in found.items()
        if not whole or len(parts) == len(logs)
    }


def read_state(loop: str, output: Path) -> tuple[int, int]:
    """The epoch and step of the newest state."""
    if loop == "lightning":
        from streaming_jobs import is_whole

        newest = max(filter(is_whole, (output / "lightning").glob("*.ckpt")), key=lambda path: path.stat().st_mtime_ns)
        loops = torch.load(newest, weights_only=False)["loops"]
        (state,) = loops["fit_loop"]["state_dict"]["combined_loader"]
    else:
        state = json.loads((output / "state.json").read_text())
    return state["epoch"], -(-state["position"] // BATCH)
