"""The rows of speed: ResNet-152, a vocabulary of COCO's size and 256-pixel JPEGs, in the loop and in the command."""

import json
import shutil
import statistics
import subprocess
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from threading import Event, Thread
from typing import Any

from acceptance.commands import PYTHON, TRAIN, check_trained_on, launch, new_run
from acceptance.jobs import CheckError, Job, Outcome
from captioner.workers import count_processors

SCRIPT = ("-m", "acceptance.measure_speed")
LEAST_RATIO, MOST_WAITING = 0.9, 0.03
COMMAND_BATCH = 128
SECONDS_BETWEEN_LOOKS = 0.25


def encoder(job: Job) -> str:
    """The encoder; a light one for a CPU."""
    return "squeezenet1_1" if job.small else "resnet152"


def batch_size(job: Job, batch: int) -> int:
    """The batch size; a small one for a CPU."""
    return batch // 64 if job.small else batch


def num_workers(job: Job) -> int:
    """The number of loader workers: all processors but two."""
    available = count_processors()
    return 1 if job.small else max(2, available - 2)


def packed(job: Job) -> Path:
    """A folder with shards and weights."""
    folder = job.bench.new_folder("speed")
    job.run([*PYTHON, *SCRIPT, "pack", folder, 8 if job.small else 16_384, encoder(job)], device="cpu")
    return folder


def measured(job: Job, *, batch: int, precision: str) -> dict[str, float]:
    """The figures of the measuring process."""
    return job.shared(f"speed, {precision}, {batch}", partial(_measure, batch=batch, precision=precision))


def _measure(job: Job, *, batch: int, precision: str) -> dict[str, float]:
    options = {
        "encoder": encoder(job),
        "batch": batch_size(job, batch),
        "precision": precision,
        "workers": num_workers(job),
        "device": job.device,
        "rounds": 1 if job.small else 3,
        "times": 1 if job.small else 40,
    }
    folder = job.shared("data for speed", packed)
    return json.loads(job.run([*PYTHON, *SCRIPT, "measure", folder, json.dumps(options)]).splitlines()[-1])


def loop_speed(job: Job, *, batch: int, precision: str) -> Outcome:
    """The loop's speed relative to encoder and decoder alone."""
    found = measured(job, batch=batch, precision=precision)
    note = (
        f"{found['images_a_second']:,.0f} images/s, {found['captions_a_second']:,.0f} captions/s; parts alone "
        f"{found['parts_images_a_second']:,.0f} images/s; peak {found['peak_gigabytes']:.1f} GB; {num_workers(job)} "
        "workers"
    )
    return Outcome(figure=found["ratio"], bar=0.0 if job.small else LEAST_RATIO, note=note)


def waiting(job: Job, *, batch: int, precision: str) -> Outcome:
    """The share of the loop's time spent waiting for a batch."""
    found = measured(job, batch=batch, precision=precision)
    note = f"{found['new_pinned_blocks']} blocks of pinned memory made after the first epoch"
    return Outcome(figure=found["waiting_share"], bar=1.0 if job.small else MOST_WAITING, at_most=True, note=note)


def whole_command(job: Job) -> Outcome:
    """The speed of the training command, from its own history, relative to encoder and decoder alone."""
    parts = measured(job, batch=COMMAND_BATCH, precision="bf16")["parts_images_a_second"]
    folder, run = job.shared("data for speed", packed), new_run(job, "command")
    flags = (
        "--shards", folder / "shards", "--output", run.folder, "--encoder", encoder(job), "--weights",
        folder / "weights.pth", "--batch-size", batch_size(job, COMMAND_BATCH), "--epochs", 1, "--workers",
        num_workers(job),
    )  # fmt: skip
    with Utilisation() as utilisation:
        check_trained_on(job.device, job.run([*launch(precision="bf16"), TRAIN, *flags]))
    rows = run.rows()[1:-1] or run.rows()
    if not rows:
        raise CheckError("there are no readings in its history")
    speed = statistics.harmonic_mean([row["train/images_per_second"] for row in rows])
    waited = statistics.fmean(row["train/waiting_share"] for row in rows)
    memory = max(row.get("train/gpu_gigabytes", 0.0) for row in rows)
    note = f"{speed:,.0f} images/s; {waited:.1%} waiting; peak {memory:.1f} GB{utilisation}"
    return Outcome(figure=speed / parts, bar=0.0 if job.small else LEAST_RATIO, note=note)


class Utilisation:
    """A context that polls nvidia-smi; as text, the highest utilisation and memory, if there was any."""

    def __init__(self) -> None:
        self._program = shutil.which("nvidia-smi")
        self._end = Event()
        self._seen: list[tuple[float, float]] = []
        self._thread = Thread(target=self._look, daemon=True)

    def __enter__(self) -> "Utilisation":
        if self._program:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._program:
            self._thread.join()

    def __str__(self) -> str:
        if not self._seen:
            return ""
        busiest = sorted(utilisation for utilisation, _ in self._seen)[-max(1, len(self._seen) // 4) :]
        most = max(memory for _, memory in self._seen)
        return f"; busiest quarter {statistics.fmean(busiest):.0f} % utilised; nvidia-smi {most / 1000:.1f} GB"

    def _look(self) -> None:
        command = [str(self._program), "--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader,nounits"]
        while not self._end.wait(SECONDS_BETWEEN_LOOKS):
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
            first = done.stdout.partition("\n")[0].split(",")
            if done.returncode == 0 and all(text.strip().isdigit() for text in first):
                self._seen.append((float(first[0]), float(first[1])))


def _checks(batch: int, precision: str) -> dict[str, Callable[[Job], Outcome]]:
    words = f"{'fp32' if precision == 'no' else precision}, batch {batch}"
    options: dict[str, Any] = {"batch": batch, "precision": precision}
    return {f"speed, {words}": partial(loop_speed, **options), f"waiting, {words}": partial(waiting, **options)}


CHECKS: dict[str, Callable[[Job], Outcome]] = dict(
    chain(
        _checks(128, "bf16").items(),
        _checks(256, "bf16").items(),
        {"speed of the command, bf16": whole_command}.items(),
        _checks(128, "no").items(),
        _checks(256, "no").items(),
    )
)
