"""Training, end to end: ours against the book's loop, the gain from cached features and packing, a GPU's ceiling.

    python benchmarks/training.py --images PHOTOS --captions captions.json       # about 8 minutes, COCO's JSON (or .gz)
    python benchmarks/training.py --quick                                        # rough figures, drawn images
    python benchmarks/training.py --images PHOTOS --captions captions.json --parts gpu --json training.json

Contenders take turns on the same images, with a projection to 9,956 words. Figures are medians over the rounds, ratios
are medians of the rounds' ratios. A turn is a short epoch: reading, decoding, encoding, training, and the start and end
of loader processes. Each turn has a new model, which a small batch warms up. Weights are random, captions are cut at
the training command's length, and torch has one thread unless --threads says otherwise. Without workers CPU time is
compared, which other programs disturb little; with workers wall time: measure on an idle machine.

The book's loop uses float32, one caption a sample, loose files, Pillow (or pillow-simd if installed) and NLTK. Its
frozen encoder is in eval mode and without gradients, which is faster than in the book. On a GPU, ours is compared with
its own encoder and decoder on a batch that is already on the device, in steady state.

The decoder with attention, self-critical steps and their rewards are measured on features of the light encoder.
Self-critical samples have 12 tokens, the mean length of COCO's captions, because random weights do not end them.

Exit codes: 0 measured, whether or not the bars hold; 2 an error that you can fix, in one line.
"""

import gc
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import torch

from captioner import cli
from captioner.flags import Count, File, Workers, WorkersOrZero
from captioner.workers import count_processors
from contenders import HEAVY, LARGE, LIGHT
from contenders.pictures import write_loose
from contenders.training import (
    CAPTIONS_A_PICTURE,
    Job,
    Precision,
    Trainer,
    like_the_book,
    num_captions_of,
    pack,
    read_captions,
    repeat_alone,
    train_epoch,
    wait_for_gpu,
)
from measuring.figures import (
    Bar,
    Contender,
    Cost,
    at_least,
    at_most,
    describe_run,
    finish,
    median_of,
    print_rows,
    print_run,
    take_turns,
    times_as_fast,
)
from measuring.photos import find_or_draw
from measuring.settings import ImageBenchmarkSettings

PACKAGES = ("torch", "torchvision", "accelerate", "webdataset", "pillow", "pillow-simd", "nltk", "numpy")
BATCH, GPU_BATCHES = 128, (128, 512)
BOOK, OURS, CACHED = "the book's loop", "ours", "ours, cached features"
ENCODER, DECODER, PADDED = "encoder alone", "decoder alone, packed", "decoder alone, padded"
ATTENTION, SELF_CRITICAL, REWARDS = "attention decoder alone", "attention, self-critical", "its rewards alone"
NO_BF16 = "not measured: this CPU has no bf16"
NAMES: Mapping[Precision, str] = {"no": "fp32", "bf16": "bf16"}
Costs = Mapping[str, Sequence[Cost | None]]


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(ImageBenchmarkSettings):
    """What is measured, on which samples, and how often."""

    captions: File | None = None
    """Real captions in COCO's JSON (or .json.gz), assigned to the images in turn; without it, random words."""
    parts: Literal["all", "cpu", "gpu"] = "all"
    """CPU figures, GPU figures (left out without a GPU), or both."""
    rounds: Count | None = None
    """Turns of each contender: 3, with --quick 1."""
    steps: Count | None = None
    """Batches of a CPU turn: 2, with --quick 1."""
    workers: WorkersOrZero = 0
    """Loader workers of both contenders for the CPU figures."""
    gpu_workers: WorkersOrZero | None = None
    """Loader workers for the GPU figures: one a processor, unless given."""
    threads: Workers = 1
    """Threads of torch in the training process."""


def main(settings: TrainingSettings) -> None:
    """Prepare the samples, measure, and report."""
    torch.set_num_threads(settings.threads)
    torch.set_float32_matmul_precision("high")  # as in the training command
    rows: list[dict[str, Any]] = []
    bars: list[Bar] = []
    with tempfile.TemporaryDirectory(prefix="training-") as temporary:
        scratch = Path(temporary)
        originals = find_or_draw(settings.images, scratch)
        captions = read_captions(settings.captions) if settings.captions else None
        run = describe_run(
            PACKAGES,
            pictures=f"{len(originals)} {f'from {settings.images}' if settings.images else 'DRAWN'}, repeated",
            captions=settings.captions or "DRAWN, without --captions",
            bf16_on_the_cpu="yes" if has_bf16() else "no",
            gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
            mode="quick: rough figures" if settings.quick else "full",
        )
        print_run("training", run)
        for part in (measure_on_cpu, measure_on_gpu):
            found = part(settings, originals, captions, scratch)
            rows, bars = rows + found[0], bars + found[1]
    finish(bars, json=settings.json, run=run, rows=rows)


def has_bf16() -> bool:
    """Whether this processor has instructions for bfloat16 products."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


# ---- on the CPU -------------------------------------------------------------------------------------------


def clock_of(workers: int) -> str:
    """The clock to compare by: CPU time if all of it is known."""
    return "wall_ms" if workers else "cpu_ms"


def measure_on_cpu(
    settings: TrainingSettings, originals: Sequence[Path], captions: Sequence[Sequence[str]] | None, scratch: Path
) -> tuple[list[dict[str, Any]], list[Bar]]:
    """Measure the book's loop, ours in each precision, and the gain from cached features and packing."""
    clock = clock_of(settings.workers)
    if settings.parts == "gpu":
        return [], cpu_bars({}, clock=clock)
    steps = settings.steps or (1 if settings.quick else 2)
    batch = 4 if settings.quick else BATCH
    folder = scratch / "cpu"
    pack(originals, captions, folder, num_samples=steps * batch)
    write_loose(folder)
    job = Job(folder=folder, encoder=HEAVY, batch=batch, workers=settings.workers, precision="no", on_cpu=True)
    rounds = settings.rounds or (1 if settings.quick else 3)
    Trainer(job).features()
    costs = take_turns(cpu_contenders(job, steps=steps), rounds=rounds)
    rows = cpu_rows(costs)
    words = f"batch {batch}, workers: {settings.workers}, torch's threads: {settings.threads}"
    print_rows(f"training on the CPU, {words}: medians of {rounds} rounds", rows)
    gains = [{"encoder": HEAVY, **features_figures(costs, clock=clock)}]
    print_rows("cached features, end to end: images are decoded without them", gains)
    return [{"table": "CPU", **row} for row in rows] + [{"table": "cached features", **row} for row in gains], cpu_bars(
        costs, clock=clock
    )


def cpu_contenders(job: Job, *, steps: int) -> dict[str, Contender]:
    """All contenders that can run here; those that encode images with the heavy encoder have one step."""
    light = replace(job, encoder=LIGHT)
    attention = replace(light, decoder="attention")
    found = {
        label(LIGHT, "no", BOOK): like_the_book(light, steps=steps),
        label(LIGHT, "no", OURS): train_epoch(light, steps=steps),
        label(HEAVY, "no", OURS): train_epoch(job, steps=1),
        label(HEAVY, "no", CACHED): train_epoch(job, steps=steps, cached=True),
        label(HEAVY, "no", ENCODER): repeat_alone(job, Trainer.encode, encoded=False),
        label(HEAVY, "no", DECODER): repeat_alone(job, Trainer.step, encoded=True),
        label(HEAVY, "no", PADDED): repeat_alone(job, Trainer.padded_step, encoded=True),
        label(LIGHT, "no", DECODER): repeat_alone(light, Trainer.step, encoded=True),
        label(LIGHT, "no", ATTENTION): repeat_alone(attention, Trainer.step, encoded=True),
        label(LIGHT, "no", SELF_CRITICAL): repeat_alone(attention, Trainer.self_critical_step, encoded=True),
        label(LIGHT, "no", REWARDS): repeat_alone(attention, Trainer.reward, encoded=True),
    }
    if has_bf16():
        found[label(LIGHT, "bf16", OURS)] = train_epoch(replace(light, precision="bf16"), steps=steps)
        found[label(HEAVY, "bf16", OURS)] = train_epoch(replace(job, precision="bf16"), steps=steps)
        found[label(HEAVY, "no", BOOK)] = like_the_book(job, steps=1)
    return found


def label(encoder: str, precision: Precision, name: str) -> str:
    """A contender's full name."""
    return f"{encoder}, {NAMES[precision]}: {name}"


def ratio(costs: Costs, one: str, other: str, *, clock: str) -> float | None:
    """How many times as fast one contender is as another; None if one is missing."""
    return times_as_fast(costs[one], costs[other], clock=clock) if one in costs and other in costs else None


def cpu_rows(costs: Costs) -> list[dict[str, Any]]:
    """A row for each contender, including those that this processor cannot run."""
    rows = []
    for encoder in (LIGHT, HEAVY):
        for precision, name in (("no", BOOK), ("no", OURS), ("bf16", OURS), ("no", CACHED), ("no", ENCODER),
                                ("no", DECODER), ("no", PADDED), ("no", ATTENTION), ("no", SELF_CRITICAL),
                                ("no", REWARDS)):  # fmt: skip
            own, book = label(encoder, precision, name), label(encoder, "no", BOOK)
            if own not in costs and precision == "no":
                continue
            wall_ms = median_of(costs.get(own, ()), figure="wall_ms")
            rows.append(
                {
                    "encoder": encoder,
                    "precision": NAMES[precision],
                    "contender": name,
                    "cpu_ms_a_caption": median_of(costs.get(own, ()), figure="cpu_ms"),
                    "wall_ms_a_caption": wall_ms,
                    "captions_a_second": 1000 / wall_ms if wall_ms else None,
                    "times_the_book_by_cpu": ratio(costs, own, book, clock="cpu_ms"),
                    "times_the_book_by_the_clock": ratio(costs, own, book, clock="wall_ms"),
                    "note": "" if own in costs else NO_BF16,
                }
            )
    return rows


def features_figures(costs: Costs, *, clock: str) -> dict[str, float | None]:
    """The speed-up of an epoch by cached features, and its upper bound."""
    encoder_ms, decoder_ms = (
        median_of(costs.get(label(HEAVY, "no", name), ()), figure=clock) for name in (ENCODER, DECODER)
    )
    bound = (encoder_ms + decoder_ms) / decoder_ms if encoder_ms and decoder_ms else None
    found = ratio(costs, label(HEAVY, "no", CACHED), label(HEAVY, "no", OURS), clock=clock)
    return {
        "cached_times_as_fast": found,
        "encoder_and_decoder_over_decoder": bound,
        "share_of_it": found / bound if found and bound else None,
    }


def cpu_bars(costs: Costs, *, clock: str) -> list[Bar]:
    """The bars of ours."""
    by = "CPU" if clock == "cpu_ms" else "wall"
    bars: list[Bar] = []
    for encoder, precision, bar in ((LIGHT, "no", 2.5), (LIGHT, "bf16", 4.5), (HEAVY, "bf16", 8.0)):
        found = ratio(costs, label(encoder, precision, OURS), label(encoder, "no", BOOK), clock=clock)
        bars.append(at_least(f"{encoder}, ours in {NAMES[precision]} / {BOOK} ({by})", found, bar))
    share = features_figures(costs, clock=clock)["share_of_it"]
    packed = ratio(costs, label(HEAVY, "no", DECODER), label(HEAVY, "no", PADDED), clock=clock)
    steps = [
        at_most(
            f"{LIGHT}, {name} / {other}, time ({by})",
            ratio(costs, label(LIGHT, "no", other), label(LIGHT, "no", name), clock=clock),
            bar,
        )
        for name, other, bar in (
            (ATTENTION, DECODER, 2.5),
            (SELF_CRITICAL, ATTENTION, 4.0),
            (REWARDS, SELF_CRITICAL, 0.1),
        )
    ]
    return [
        *bars,
        at_least(f"{HEAVY}, cached / uncached, of (encoder + decoder) / decoder ({by})", share, 0.85),
        at_least(f"decoder, packed / padded captions ({by})", packed, 1.3),
        *steps,
    ]


# ---- on a GPU ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuCost(Cost):
    """The cost of part of an epoch in steady state, in captions."""

    waiting_seconds: float
    peak_gigabytes: float

    @property
    def waiting_share(self) -> float:
        """The share of the time in which the training process waited for a batch."""
        return self.waiting_seconds / self.wall_seconds


def measure_on_gpu(
    settings: TrainingSettings, originals: Sequence[Path], captions: Sequence[Sequence[str]] | None, scratch: Path
) -> tuple[list[dict[str, Any]], list[Bar]]:
    """Measure ours, with and without cached features, against encoder and decoder on a batch on the device."""
    if settings.parts == "cpu" or not torch.cuda.is_available():
        return [], gpu_bars([])
    torch.set_num_threads(count_processors())  # the training command's setting with a GPU
    folder = scratch / "gpu"
    pack(originals, captions, folder, num_samples=5120 if settings.quick else 30_720)
    workers = (count_processors()) if settings.gpu_workers is None else settings.gpu_workers
    rounds = settings.rounds or (1 if settings.quick else 3)
    job = Job(folder=folder, encoder=LARGE, batch=BATCH, workers=workers, precision="bf16", on_cpu=False)
    Trainer(job).features()
    rows = []
    for batch in GPU_BATCHES:
        at_once = replace(job, batch=batch)
        times = 10 if settings.quick else 50
        costs = take_turns(
            {
                OURS: train_steadily(at_once, cached=False),
                CACHED: train_steadily(at_once, cached=True),
                ENCODER: repeat_alone(at_once, Trainer.encode, times=times, encoded=False),
                DECODER: repeat_alone(at_once, Trainer.step, times=times, encoded=True),
            },
            rounds=rounds,
        )
        rows += gpu_rows(costs, batch=batch)
    title = f"{LARGE} in bf16 on {torch.cuda.get_device_name()}, {workers} workers: medians of {rounds} rounds"
    print_rows(title, rows)
    return [{"table": "GPU", **row} for row in rows], gpu_bars(rows)


def train_steadily(job: Job, *, cached: bool) -> Contender:
    """Train for an epoch; its first and last tenth are not timed, so the device is warm and queues are full."""

    def turn(number: int) -> Cost:
        gc.collect()
        trainer = Trainer(job)
        features = trainer.features() if cached else None
        loader = trainer.epoch(number, features)
        edge = max(1, len(loader) // 10)
        num_captions, waiting_seconds = 0, 0.0
        with closing(loader):
            batches = chain.from_iterable(loader)
            for batch in islice(batches, edge):
                trainer.step(batch)
            wait_for_gpu()
            torch.cuda.reset_peak_memory_stats()
            started = time.perf_counter()
            for _ in range(len(loader) - 2 * edge):
                asked = time.perf_counter()
                batch = next(batches)
                waiting_seconds += time.perf_counter() - asked
                trainer.step(batch)
                num_captions += num_captions_of(batch)
            wait_for_gpu()
            wall_seconds = time.perf_counter() - started
        peak_gigabytes = torch.cuda.max_memory_allocated() / 1e9
        return GpuCost(
            items=num_captions,
            wall_seconds=wall_seconds,
            waiting_seconds=waiting_seconds,
            peak_gigabytes=peak_gigabytes,
        )

    return turn


def gpu_rows(costs: Costs, *, batch: int) -> list[dict[str, Any]]:
    """A row for each contender; ours are compared with their parts."""
    wall_ms = {name: median_of(turns, figure="wall_ms") or 0.0 for name, turns in costs.items()}
    parts = {OURS: wall_ms[ENCODER] + wall_ms[DECODER], CACHED: wall_ms[DECODER]}
    return [
        {
            "batch": batch,
            "contender": name,
            "images_a_second": 1000 / wall_ms[name] / CAPTIONS_A_PICTURE,
            "of_its_parts_on_the_device": parts[name] / wall_ms[name] if name in parts else None,
            "waiting_share": median_of(turns, figure="waiting_share") if name in parts else None,
            "peak_gigabytes": median_of(turns, figure="peak_gigabytes") if name in parts else None,
        }
        for name, turns in costs.items()
    ]


def gpu_bars(rows: Sequence[Mapping[str, Any]]) -> list[Bar]:
    """The bars of ours on a GPU, for each batch size."""
    found = {(row["batch"], row["contender"]): row for row in rows}
    bars = []
    for batch in GPU_BATCHES:
        for name in (OURS, CACHED):
            row, words = found.get((batch, name), {}), f"GPU, {LARGE}, batch {batch}, {name}"
            parts = "decoder" if name == CACHED else "encoder + decoder"
            bars.append(at_least(f"{words} / {parts} on the device", row.get("of_its_parts_on_the_device"), 0.9))
            bars.append(at_most(f"{words}, share of time waiting for data", row.get("waiting_share"), 0.03))
    return bars


if __name__ == "__main__":
    cli.run(main, TrainingSettings, description=__doc__ or "")
