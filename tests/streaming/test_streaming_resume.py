"""Loops of others, killed with -9 and resumed on other ranks and workers, consume what one whole run does."""

import importlib.util
import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import streaming_jobs
import torch
import warm
from streaming_data import write_split
from streaming_jobs import BATCH, EPOCHS, open_loader

pytestmark = pytest.mark.slow

SIZES = (7, 5, 11, 1, 9, 8)
NUM_STEPS = 4  # of an epoch of 41 samples
SECONDS = 120
NEEDS = {"lightning": "lightning", "trainer": "transformers"}
JOBS = Path(streaming_jobs.__file__)

Consumed = dict[tuple[int, int], list[str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A split of 41 text samples."""
    return write_split(tmp_path_factory.mktemp("resume") / "shards", SIZES)


@pytest.mark.parametrize("loop", ["plain", "accelerate", "lightning", "trainer"])
def test_a_killed_loop_goes_on_with_what_the_whole_run_would_have_consumed(
    folder: Path, tmp_path: Path, loop: str
) -> None:
    if loop in NEEDS and importlib.util.find_spec(NEEDS[loop]) is None:
        pytest.skip(f"{NEEDS[loop]} is not installed")
    chance = random.Random(f"{loop} 5")
    first, second = chance.randint(1, 3), chance.randint(5, 9)  # the second run goes over an epoch's end
    consumed: Consumed = {}
    stands = (0, 0)
    runs = ((1, 0, "fork", first), (3, 2, "fork", second), (2, 1, "spawn", None))
    with launcher(loop, folder, tmp_path) as process:
        for ranks, workers, start_method, until in runs:
            for log in tmp_path.glob("rank-*.jsonl"):
                log.unlink()
            run(process, tmp_path, ranks=ranks, workers=workers, start_method=start_method, until=until)
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


@contextmanager
def launcher(loop: str, folder: Path, output: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that starts ranks of a loop."""
    command = [sys.executable, str(JOBS), loop, str(folder), str(output)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    with warm.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True, bufsize=1) as process:
        yield process


def run(
    launcher: subprocess.Popen[str], output: Path, *, ranks: int, workers: int, start_method: str, until: int | None
) -> None:
    """Start all ranks; kill them with -9 when one has consumed the run's `until`-th step, or wait for the end."""
    assert launcher.stdin is not None
    assert launcher.stdout is not None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher.stdin.write(f"{ranks} {workers} {start_method} {port}\n")
    processes = [int(number) for number in launcher.stdout.readline().split()]
    deadline = time.monotonic() + SECONDS
    killed = False
    while not select.select([launcher.stdout], [], [], 0.005)[0]:  # until all have ended
        late = time.monotonic() > deadline
        if late or (until is not None and max(read(output, whole=False), default=(0, -1)) >= divmod(until, NUM_STEPS)):
            for process in processes:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            killed = not late
    codes = [int(code) for code in launcher.stdout.readline().split()]
    assert killed if until is not None else codes == [0] * ranks, (codes, outputs(output))


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


@pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="Lightning is not installed")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("every_steps", [None, 3])
def test_a_checkpoint_of_lightning_is_resumed_inside_an_epoch_and_at_its_end(
    folder: Path, tmp_path: Path, every_steps: int | None
) -> None:
    """At an epoch's end, where it saves by default, Lightning stores the loader's state but does not load it."""
    whole = fit(folder, tmp_path, every_steps, None)
    checkpoints = sorted(tmp_path.glob("*.ckpt"))
    steps = [int(checkpoint.stem) for checkpoint in checkpoints]
    assert steps == list(range(every_steps or NUM_STEPS, EPOCHS * NUM_STEPS + 1, every_steps or NUM_STEPS))
    for step, checkpoint in zip(steps, checkpoints, strict=True):
        assert fit(folder, tmp_path, every_steps, checkpoint) == whole[step:]


def fit(
    folder: Path, output: Path, every_steps: int | None, checkpoint: Path | None
) -> list[tuple[int, int, list[str]]]:
    """What Lightning's Trainer consumes after a checkpoint: epoch of the loader, steps done, texts."""
    from lightning import LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    loader = open_loader(str(folder), 0, "fork")
    consumed = []

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def training_step(self, batch: Any, _number: int) -> torch.Tensor:
            texts, numbers = batch
            consumed.append((loader.epoch, loader.steps_done, texts))
            return self.layer(numbers).sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    kept = ModelCheckpoint(
        output, filename="{step:02d}", auto_insert_metric_name=False, save_top_k=-1, every_n_train_steps=every_steps
    )
    trainer = Trainer(
        accelerator="cpu", devices=1, max_epochs=EPOCHS, callbacks=[kept], logger=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Module(), loader, ckpt_path=str(checkpoint) if checkpoint else None, weights_only=False)
    return consumed
