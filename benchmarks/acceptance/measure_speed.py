"""Training's step loop against encoder and decoder on a batch on the device, alternating in one process.

    python -m acceptance.measure_speed pack FOLDER NUM_SAMPLES ENCODER
    python -m acceptance.measure_speed measure FOLDER '{"encoder": "resnet152", "batch": 128, ...}'

`pack` writes shards of 256-pixel images that compress like photos, with five captions each and a vocabulary of COCO's
size, and a file of random weights. `measure` prints one line of JSON. The loop is train/run/steps.py's own, with
workers, curves and log intervals of ten steps, each of which ends when the device has finished; the first and the last
interval do not count.
"""

import gc
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torchvision.models import get_model

from contenders import training
from contenders.training import CAPTIONS_A_PICTURE, Job, Trainer, num_captions_of, time_all
from measuring.figures import Cost, take_turns
from measuring.photos import draw_photos
from train.data.batches import CaptionBatch
from train.run.launch import Preemption
from train.run.steps import LOG_STEPS, run_epoch
from train.run.tracking import HISTORY, Tracker, read_rows

WEIGHTS = "weights.pth"
NUM_PHOTOS = 24
SETTLED_READINGS = slice(1, -1)
WARM_UP_STEPS = 5


def pack(folder: Path, num_samples: int, encoder: str) -> None:
    """Write shards to `folder`/shards, and the random weights of an encoder."""
    photos = draw_photos(folder / "photos", count=min(NUM_PHOTOS, num_samples))
    training.pack(photos, None, folder, num_samples=num_samples)
    torch.manual_seed(0)
    torch.save(get_model(encoder, weights=None).state_dict(), folder / WEIGHTS)


def measure(folder: Path, options: Mapping[str, Any]) -> dict[str, float]:
    """Images/s of the loop and of its parts, medians over the rounds, and the median of their ratios."""
    torch.set_float32_matmul_precision("high")  # as in the training command
    job = Job(
        folder=folder, encoder=options["encoder"], batch=options["batch"], workers=options["workers"],
        precision=options["precision"], on_cpu=options["device"] == "cpu",
    )  # fmt: skip
    trainer = Trainer(job)
    batch = trainer.batch_of(job.batch, None)
    features = with_features(trainer, batch)
    for _ in range(WARM_UP_STEPS if torch.cuda.is_available() else 1):
        trainer.step(batch)
        trainer.step(features)
    readings: list[list[dict[str, Any]]] = []
    pinned_blocks: list[int] = []  # after each epoch
    times = options["times"]
    contenders = {
        "encoder": lambda _number: time_all(lambda: repeat(trainer.encode, batch, times=times)),
        "decoder": lambda _number: time_all(lambda: repeat(trainer.step, features, times=times)),
        "loop": lambda number: run_loop(trainer, number, readings, pinned_blocks),
    }
    costs = take_turns(contenders, rounds=options["rounds"])
    wall_ms = {name: [cost.wall_ms for cost in turns if cost] for name, turns in costs.items()}
    parts_ms = [encoder + decoder for encoder, decoder in zip(wall_ms["encoder"], wall_ms["decoder"], strict=True)]
    ratios = [parts / loop for parts, loop in zip(parts_ms, wall_ms["loop"], strict=True)]
    rows = [row for own in readings for row in own]
    return {
        "images_a_second": 1000 / statistics.median(wall_ms["loop"]) / CAPTIONS_A_PICTURE,
        "captions_a_second": 1000 / statistics.median(wall_ms["loop"]),
        "parts_images_a_second": 1000 / statistics.median(parts_ms) / CAPTIONS_A_PICTURE,
        "ratio": statistics.median(ratios),
        "waiting_share": statistics.fmean(row["train/waiting_share"] for row in rows),
        "peak_gigabytes": max(row.get("train/gpu_gigabytes", 0.0) for row in rows),
        "new_pinned_blocks": pinned_blocks[-1] - pinned_blocks[0],
    }


def with_features(trainer: Trainer, batch: CaptionBatch) -> CaptionBatch:
    """The batch with the encoder's features instead of images, which leaves only the decoder's work."""
    from dataclasses import replace

    with torch.no_grad(), trainer.accelerator.autocast():
        features_BF = trainer.loss_model.features(batch.inputs)
    return replace(batch, inputs=features_BF.float())


def repeat(action: Any, batch: CaptionBatch, *, times: int) -> int:
    """Run it this number of times; returns the number of captions."""
    for _ in range(times):
        action(batch)
    return times * num_captions_of(batch)


def run_loop(trainer: Trainer, number: int, readings: list[list[dict[str, Any]]], pinned_blocks: list[int]) -> Cost:
    """Run an epoch of the training command's loop and return the cost of its steady log intervals.

    Appends these to `readings`, and to `pinned_blocks` the blocks of pinned memory that torch has made so far.
    """
    gc.collect()
    with tempfile.TemporaryDirectory() as folder, closing(trainer.epoch(number, None)) as loader:
        tracker = Tracker(Path(folder), first_step=0, settings={})
        run_epoch(
            loader, trainer.take_step, stop=Preemption(), tracker=tracker, save=lambda: None, num_epochs=number + 1,
            checkpoint_steps=sys.maxsize,
        )  # fmt: skip
        tracker.close()
        rows = settled(read_rows(Path(folder) / HISTORY))
    readings.append(rows)
    pinned_blocks.append(torch.cuda.host_memory_stats().get("num_host_alloc", 0))  # none without CUDA
    seconds = [LOG_STEPS * trainer.batch / row["train/images_per_second"] for row in rows]
    return Cost(items=LOG_STEPS * trainer.batch * CAPTIONS_A_PICTURE * len(rows), wall_seconds=sum(seconds))


def settled(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The log intervals without the first and the last; all if there are few."""
    return list(rows[SETTLED_READINGS] or rows)


if __name__ == "__main__":
    command, folder, *more = sys.argv[1:]
    if command == "pack":
        pack(Path(folder), int(more[0]), more[1])
    else:
        print(json.dumps(measure(Path(folder), json.loads(more[0]))))
