"""The real commands (draw and pack, train, caption) on drawn data, and readers of run folders."""

import json
import math
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from acceptance.jobs import REPOSITORY, CheckError, Command, Device, Job

PYTHON, ACCELERATE = (sys.executable,), (sys.executable, "-m", "accelerate.commands.accelerate_cli")
TRAIN, CAPTION = REPOSITORY / "train/main.py", REPOSITORY / "infer/main.py"
STORED_PIXELS, CROP_PIXELS = 68, 60


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Numbers of samples to draw and to train on."""

    train: int
    val: int
    batch: int
    width: int
    epochs: int  # of the captioning model
    workers: int

    @property
    def steps(self) -> int:
        """Steps per epoch."""
        return self.train // self.batch


ON_GPU = Sizes(train=640, val=128, batch=32, width=192, epochs=20, workers=2)
SMALL = Sizes(train=64, val=12, batch=8, width=48, epochs=1, workers=1)


def sizes(job: Job) -> Sizes:
    """The sizes for the job's bench."""
    return SMALL if job.small else ON_GPU


# ---- data -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """Drawn scenes and their shards."""

    scenes: Path
    shards: Path

    def num_samples(self, split: str) -> int:
        """Samples of a split, from its manifest."""
        return json.loads((self.shards / f"{split}.manifest.json").read_text())["totals"]["samples"]


def data(job: Job) -> Data:
    """The data that all rows share."""
    return job.shared("data", _make_data)


def _make_data(job: Job) -> Data:
    folder, wanted = job.bench.new_folder("data"), sizes(job)
    scenes, shards = folder / "scenes", folder / "shards"
    flags = ["--output", scenes, "--train", wanted.train, "--val", wanted.val]
    job.run([*PYTHON, REPOSITORY / "examples/scenes.py", *flags])
    flags = ["--images", scenes, "--captions", scenes / "annotations", "--output", shards, "--size", STORED_PIXELS]
    job.run([*PYTHON, REPOSITORY / "sharding/make_shards.py", *flags, "--shard-megabytes", 1])
    return Data(scenes=scenes, shards=shards)


# ---- training ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A run folder."""

    folder: Path

    @property
    def model(self) -> Path:
        """Its model folder."""
        return self.folder / "model"

    def rows(self) -> list[dict[str, Any]]:
        """The complete rows of the training curves so far."""
        path = self.folder / "history.jsonl"
        text = path.read_text() if path.exists() else ""
        rows = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        return [row for row in rows if "train/loss" in row]

    def losses(self) -> list[float]:
        """The loss of each step. Raises CheckError if steps are missing or repeated, or a loss is not finite."""
        rows = self.rows()
        steps = [row["step"] for row in rows]
        if not steps or steps != list(range(1, len(steps) + 1)):
            raise CheckError(f"the history has the steps {steps}, not each once from 1 on")
        losses = [math.nan if row["train/loss"] is None else row["train/loss"] for row in rows]
        if not all(map(math.isfinite, losses)):
            raise CheckError(f"losses are not finite: {losses}")
        return losses

    def weights(self) -> dict[str, np.ndarray]:
        """The weights of its model."""
        return load_file(self.model / "model.safetensors")

    def metrics(self) -> dict[str, float]:
        """The metrics of its best epoch."""
        return json.loads((self.folder / "metrics.json").read_text())


def new_run(job: Job, name: str) -> Run:
    """A run folder that does not exist yet."""
    return Run(folder=job.bench.new_folder(name) / "run")


def launch(*, precision: str = "no") -> tuple[object, ...]:
    """`accelerate launch` for one process, independent of the user's own configuration."""
    return (*ACCELERATE, "launch", "--quiet", "--num_processes", 1, "--num_machines", 1, "--dynamo_backend", "no",
            "--mixed_precision", precision)  # fmt: skip


def train_flags(job: Job, run: Run, *more: object, shards: Path | None = None) -> tuple[object, ...]:
    """Flags that train a new small CNN for one epoch without dropout, with every step in the history."""
    wanted = sizes(job)
    return (
        "--shards", shards or data(job).shards, "--output", run.folder, "--encoder", "small_cnn", "--weights", "none",
        "--finetune-encoder-from-step", 0, "--crop", CROP_PIXELS, "--embedding-size", wanted.width,
        "--hidden-size", wanted.width, "--batch-size", wanted.batch, "--learning-rate", 2.5e-3,
        "--encoder-learning-rate", 2.5e-3, "--input-dropout", 0, "--dropout", 0, "--epochs", 1, "--checkpoint-steps", 1,
        "--workers", wanted.workers, *more,
    )  # fmt: skip


def train(
    job: Job,
    name: str,
    more: Sequence[object] = (),
    *,
    device: Device | None = None,
    precision: str = "no",
    variables: Mapping[str, str] | None = None,
    shards: Path | None = None,
) -> Run:
    """Run the whole training command with more flags than `train_flags`; the last value of a flag counts."""
    run = new_run(job, name)
    flags = last_flags(train_flags(job, run, *more, shards=shards))
    printed = job.run([*launch(precision=precision), TRAIN, *flags], device=device, variables=variables)
    check_trained_on(device or job.device, printed)
    return run


def check_trained_on(device: Device, printed: str, *, processes: int = 1) -> None:
    """Raise CheckError unless the training command printed this number of processes on the device."""
    if f" steps on {processes} x {device}" not in printed:
        raise CheckError(f"it did not train with {processes} process(es) on {device}", printed)


def last_flags(flags: Sequence[object]) -> list[object]:
    """The flags, each with its last value; a flag may have no value, and None removes a flag."""
    found: dict[str, list[object]] = {}
    name = ""
    for flag in flags:
        if isinstance(flag, str) and flag.startswith("--"):
            name = flag
            found[name] = []
        else:
            found[name].append(flag)
    return [word for flag, values in found.items() if values != [None] for word in (flag, *values)]


def fp32_run(job: Job) -> Run:
    """The reference run, on the bench's device."""
    return job.shared("fp32", partial(train, name="fp32"))


def cpu_run(job: Job) -> Run:
    """The same run on the CPU."""
    return job.shared("fp32 on the CPU", partial(train, name="cpu", device="cpu"))


def trained_run(job: Job) -> Run:
    """A run that is long enough to caption different images differently."""
    wanted = sizes(job)
    if wanted.epochs == 1:
        return fp32_run(job)
    more = ("--epochs", wanted.epochs, "--checkpoint-steps", 1000)
    return job.shared("a longer run", partial(train, name="longer", more=more))


def encoder_weights(job: Job) -> Path:
    """A file with the trained encoder of the fp32 run."""
    return job.shared("an encoder's weights", _write_encoder)


def _write_encoder(job: Job) -> Path:
    path = job.bench.new_folder("encoder") / "encoder.safetensors"
    save_file(encoder_of(fp32_run(job)), path)
    return path


def encoder_of(run: Run) -> dict[str, np.ndarray]:
    """The encoder's weights in a run's model, under the names that --weights expects."""
    prefix = "encoder.backbone."
    return {name.removeprefix(prefix): array for name, array in run.weights().items() if name.startswith(prefix)}


def start_ranks(
    job: Job, script: Sequence[object], flags: Sequence[object], *, variables: Sequence[Mapping[str, str]]
) -> list[Command]:
    """Start one process for each of these `variables`, joined to a job on this machine as torchrun would join them.

    On a GPU each rank assumes that it is alone on its machine, and so takes the first GPU.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": str(len(variables)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    commands = []
    for rank, own in enumerate(variables):
        local, local_world = (rank, len(variables)) if job.device == "cpu" else (0, 1)
        place = {"RANK": str(rank), "LOCAL_RANK": str(local), "LOCAL_WORLD_SIZE": str(local_world)}
        commands.append(job.start([*PYTHON, *script, *flags], variables=world | place | dict(own)))
    return commands


# ---- captioning -------------------------------------------------------------------------------------------


def captions(job: Job, *, device: Device | None = None, precision: str) -> dict[str, str]:
    """The trained model's caption of each val image, by path. Raises CheckError if an image has none."""
    model, folder = trained_run(job).model, data(job).scenes / "val2026"
    output = job.bench.new_folder("captions") / "captions.jsonl"
    flags = ["--model", model, "--images", folder, "--output", output, "--precision", precision]
    job.run([*PYTHON, CAPTION, *flags], device=device)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    found = {row["path"]: row["caption"] for row in rows if "caption" in row}
    if len(found) < sizes(job).val:
        raise CheckError(f"{len(found)} of {sizes(job).val} pictures have a caption", str(rows[:1]))
    return found
