"""Captioning folders, end to end: the book's way against ours, our own ceiling, and what a beam costs.

    python benchmarks/captioning.py --images PHOTOS           # about 15 minutes
    python benchmarks/captioning.py --quick                   # rough figures, drawn pictures

Contenders take turns on the same pictures, with a vocabulary of 9,956 words; figures are medians over the rounds, and
ratios medians of the rounds' ratios, by the clock: measure on a machine that does nothing else. A turn of ours is the
captioning command on a folder, from the listing to the merged file, its reading processes started and ended; only the
start of Python and the loading of the model are left out. No two files have the same bytes. Weights are random, so
captions do not end by themselves: ours are cut at 12 steps, the mean length of COCO's captions with their end, while
the book takes its 20.

The book captions one picture after the other: Pillow's LANCZOS to 224 x 224, float32, greedy.

The ceiling adds up what a picture costs alone, in this process with one thread and everything warm: decoding with
resizing, the encoder, the decoder, each in the quickest of several forms and batch sizes. On a CPU it is the number of
cores over that sum; on a GPU the slower of decoding with resizing on all cores, and the encoder.

Exit codes: 0 measured, whether or not the bars hold; 2 something to mend, told in one line.
"""

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torchvision import transforms

from captioner import cli
from captioner.bundle import Bundle, DecodingDefaults
from captioner.cli import UserError
from captioner.decoding import decode
from captioner.describe import Captioner
from captioner.encoders import Encoder
from captioner.model import CaptionModel, ModelConfig
from captioner.views import ViewSpec, normalise, read_eval_view
from captioner.vocabulary import SPECIAL_WORDS, Vocabulary
from infer import main as command
from infer.results import RowIndex, merge
from infer.settings import CaptionSettings
from measure import (
    Bar,
    Contender,
    Cost,
    at_least,
    at_most,
    describe_run,
    median_of,
    print_bars,
    print_rows,
    take_turns,
    time_here,
    times_as_fast,
    write_json,
)
from photos import draw_photos, find_photos, tile_photos
from training import BookModel

PACKAGES = ("torch", "torchvision", "accelerate", "pillow", "pillow-simd", "numpy")
NUM_WORDS = 9956  # COCO's, in the book
CAPTION_STEPS, BOOK_STEPS = 12, 20
LIGHT, HEAVY, LARGE = "squeezenet1_1", "resnet50", "resnet152"
ENCODER_BATCHES, DECODER_BATCHES = (1, 4, 8, 16), (16, 64)
GPU_BATCHES = (64, 256)
BOOK = "the book's way"
READ, CAPTION = "alone: decode and resize", "alone: greedy"
Costs = Mapping[str, Sequence[Cost | None]]


@dataclass(frozen=True, kw_only=True)
class CaptioningSettings:
    """What is measured, on what, and how long."""

    images: Path | None = None
    """Folder of photos such as COCO's; without it pictures in COCO's sizes are drawn, which compress like photos."""
    encoders: tuple[str, ...] = (LIGHT, HEAVY)
    """Encoders on the CPU; on a GPU resnet152 is measured as well."""
    pictures: int | None = None
    """Files of a turn of ours with the light encoder, a fourth of it with others: 1,000, with --quick 48."""
    large_pictures: int | None = None
    """12-megapixel files of a turn: 160, with --quick 8."""
    rounds: int | None = None
    """Turns of each contender: 3, with --quick 1."""
    quick: bool = False
    """Everything small, to see that it runs: the figures are rough."""
    json: Path | None = None
    """Write run, rows and bars to this file."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One set of pictures and one encoder: what all contenders share."""

    files: list[Path]
    num_alone: int
    encoder: str
    captioner: Captioner
    state: PartialState
    scratch: Path

    @property
    def device(self) -> torch.device:
        return self.captioner.bundle.device


def main(settings: CaptioningSettings) -> None:
    """Make the pictures, measure, and tell."""
    check_settings(settings)
    torch.set_num_threads(1)
    state = PartialState(cpu=not torch.cuda.is_available())
    rounds = settings.rounds or (1 if settings.quick else 3)
    rows: list[dict[str, Any]] = []
    bars: list[Bar] = []
    with tempfile.TemporaryDirectory(prefix="captioning-") as temporary:
        scratch = Path(temporary)
        originals = find_photos(settings.images) if settings.images else draw_photos(scratch / "drawn", count=24)
        run = describe_run(
            PACKAGES,
            pictures=f"{len(originals)} {f'from {settings.images}' if settings.images else 'DRAWN'}, repeated",
            device=torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        )
        for name, value in run.items():
            cli.console.print(f"{name}: {value}")
        sets = make_sets(originals, scratch, settings)
        on_gpu = torch.cuda.is_available()
        for encoder in (LARGE,) if on_gpu else settings.encoders:
            for kind, files in sets.items():
                if kind == "12 megapixels" and encoder != LIGHT and not on_gpu:
                    continue
                number = len(files) if encoder == LIGHT or on_gpu else max(len(files) // 4, 16)
                job = make_job(files[:number], encoder, state, scratch, quick=settings.quick)
                found_rows, found_bars = measure(job, kind=kind, rounds=rounds)
                rows += found_rows
                bars += found_bars
    print_rows("captioning", rows)
    print_bars(bars)
    if settings.json is not None:
        write_json(settings.json, run=run, rows=rows, bars=bars)


def check_settings(settings: CaptioningSettings) -> None:
    """Raise UserError for numbers that make no sense."""
    numbers = (settings.rounds, settings.pictures, settings.large_pictures)
    if any(number is not None and number < 1 for number in numbers):
        raise UserError("--rounds, --pictures and --large-pictures must be at least 1")


def make_sets(originals: Sequence[Path], scratch: Path, settings: CaptioningSettings) -> dict[str, list[Path]]:
    """The files to caption, by kind; no two have the same bytes."""
    count = settings.pictures or (48 if settings.quick else 1000)
    num_large = settings.large_pictures or (8 if settings.quick else 160)
    large = tile_photos(scratch / "large originals", originals, count=min(num_large, 20))
    return {
        "COCO": write_different(scratch / "coco", originals, count=count),
        "12 megapixels": write_different(scratch / "large", large, count=num_large),
    }


def write_different(folder: Path, originals: Sequence[Path], *, count: int) -> list[Path]:
    """The originals in turn, each copy with some other bytes behind the picture, which no decoder looks at."""
    folder.mkdir()
    contents = [path.read_bytes() for path in originals]
    paths = [folder / f"{number:06d}.jpg" for number in range(count)]
    for number, path in enumerate(paths):
        path.write_bytes(contents[number % len(contents)] + number.to_bytes(8, "little"))
    return paths


def make_job(files: list[Path], encoder: str, state: PartialState, scratch: Path, *, quick: bool) -> Job:
    """A captioner with random weights, and the number of pictures for what is measured alone."""
    words = tuple(f"word-{number}" for number in range(NUM_WORDS - len(SPECIAL_WORDS)))
    vocabulary = Vocabulary(words=(*SPECIAL_WORDS, *words), counts=(1,) * NUM_WORDS, threshold=1)
    torch.manual_seed(0)
    model = CaptionModel(ModelConfig(encoder=encoder, vocabulary_size=NUM_WORDS)).eval().to(state.device)
    bundle = Bundle(
        model=model,
        view=ViewSpec(),
        vocabulary=vocabulary,
        decoding=DecodingDefaults(beam_size=1, max_tokens=CAPTION_STEPS),
        name="random",
        calibration=None,
    )
    captioner = Captioner(bundle, precision="bfloat16" if torch.cuda.is_available() else "float32")
    return Job(
        files=files, num_alone=16 if quick else 64, encoder=encoder, captioner=captioner, state=state, scratch=scratch
    )


# ---- contenders -------------------------------------------------------------------------------------------


def ours(job: Job, *, workers: int, beam_size: int = 1) -> Contender:
    """The captioning command's work on the folder, with so many reading processes."""

    def turn(_round: int) -> Cost:
        bundle = job.captioner.bundle
        decoding = replace(bundle.decoding, beam_size=beam_size)
        captioner = Captioner(replace(bundle, decoding=decoding), precision=job.captioner.precision)
        with tempfile.TemporaryDirectory(dir=job.scratch) as folder:
            settings = CaptionSettings(
                images=(str(job.files[0].parent),), output=Path(folder, "captions.jsonl"), workers=workers
            )
            return time_here(len(job.files), partial(caption_folder, job, captioner, settings))

    return turn


def caption_folder(job: Job, captioner: Captioner, settings: CaptionSettings) -> None:
    """What infer/main.py does when it has loaded the model, on the job's files."""
    names = {path.name for path in job.files}
    listing = command.open_listing(settings, job.state)
    own = (entry for entry in listing if getattr(entry, "path", None) in names)
    index = RowIndex(settings.output)
    num_rows = command.caption_files(own, index, captioner, settings=settings, state=job.state)  # type: ignore[arg-type]
    summary = merge(settings.output)
    assert num_rows == summary.num_rows == len(job.files), "files were lost"
    assert not summary.failures
    assert not summary.num_duplicates


def like_the_book(job: Job) -> Contender:
    """One picture at a time, as a notebook does it."""
    model = BookModel(job.encoder, num_words=NUM_WORDS).eval().to(job.device)
    prepare = transforms.Compose(
        [
            transforms.ToTensor(),
            transforms.Normalize(job.captioner.bundle.view.mean, job.captioner.bundle.view.std),
        ]
    )

    @torch.no_grad()
    def caption(path: Path) -> list[int]:
        image = Image.open(path).convert("RGB").resize((224, 224), Image.Resampling.LANCZOS)
        inputs = model.norm(model.linear(model.encoder(prepare(image)[None].to(job.device))))[:, None]
        state, tokens = None, []
        for _ in range(BOOK_STEPS):
            hidden, state = model.lstm(inputs, state)
            token = model.predict(hidden[:, 0]).argmax(dim=1)
            tokens.append(token)
            inputs = model.embed(token)[:, None]
        return torch.stack(tokens, dim=1)[0].tolist()

    def turn(_round: int) -> Cost:
        torch.set_num_threads(os.cpu_count() or 1)  # as torch starts
        try:
            paths = job.files[: job.num_alone]
            return time_here(len(paths), lambda: [caption(path) for path in paths])
        finally:
            torch.set_num_threads(1)

    return turn


def alone(job: Job) -> dict[str, Contender]:
    """Each part of the way by itself, in several forms."""
    contents = [path.read_bytes() for path in job.files[: job.num_alone]]
    view = job.captioner.bundle.view
    views_BPP3 = torch.from_numpy(np.stack([read_eval_view(data, view)[0] for data in contents]))
    found: dict[str, Contender] = {
        READ: over(contents, lambda data: read_eval_view(data, view)),
        **{f"alone: encoder, {name}": turn for name, turn in encoders_alone(job, views_BPP3).items()},
        **{f"{CAPTION}, batch {batch}": captions_alone(job, batch=batch) for batch in DECODER_BATCHES},
    }
    return found


def over(items: Sequence[Any], action: Callable[[Any], object]) -> Contender:
    """`action` on each item."""
    return lambda _round: time_here(len(items), lambda: [action(item) for item in items])


def encoders_alone(job: Job, views_BPP3: Tensor) -> dict[str, Contender]:
    """The encoder as it is, and with batch norm folded into convolutions, with several batch sizes."""
    encoder = job.captioner.bundle.model.encoder
    images_B3PP = normalise(views_BPP3.to(job.device), job.captioner.bundle.view)
    bfloat16 = job.captioner.precision == "bfloat16"
    forms: dict[str, nn.Module] = {"plain": encoder, "folded": fold(encoder)}

    @torch.inference_mode()
    def encode(form: nn.Module, parts: Sequence[Tensor]) -> None:
        with torch.autocast(job.device.type, torch.bfloat16, enabled=bfloat16):
            for part in parts:
                form(part)
        if job.device.type == "cuda":
            torch.cuda.synchronize()

    batches = GPU_BATCHES if job.device.type == "cuda" else ENCODER_BATCHES
    turns: dict[str, Contender] = {}
    for name, form in forms.items():
        for batch in batches:
            parts = images_B3PP.repeat(-(-batch // len(images_B3PP)), 1, 1, 1).split(batch)
            parts = [part.contiguous(memory_format=torch.channels_last) for part in parts if len(part) == batch]
            action = partial(encode, form, parts[: max(1, len(images_B3PP) // batch)])
            action()
            count = batch * max(1, min(len(parts), len(images_B3PP) // batch))
            turns[f"{name}, batch {batch}"] = lambda _round, action=action, count=count: time_here(count, action)
    return turns


def fold(encoder: Encoder) -> nn.Module:
    """A copy of the encoder's backbone with batch norm folded into the convolutions before."""
    return fuse(encoder.backbone).to(memory_format=torch.channels_last)


def captions_alone(job: Job, *, batch: int) -> Contender:
    """Greedy decoding of random image embeddings."""
    model = job.captioner.bundle.model
    options = asdict(job.captioner.decoding)
    image_BE = torch.randn((batch, model.config.embedding_size), device=job.device)

    def repeat() -> None:
        for _ in range(max(1, job.num_alone // batch)):
            decode(model, image_BE, **options)

    repeat()
    return lambda _round: time_here(max(1, job.num_alone // batch) * batch, repeat)


# ---- figures ----------------------------------------------------------------------------------------------


def measure(job: Job, *, kind: str, rounds: int) -> tuple[list[dict[str, Any]], list[Bar]]:
    """All contenders on one set of pictures with one encoder."""
    contenders: dict[str, Contender] = {
        BOOK: like_the_book(job),
        our_name(1): ours(job, workers=1),
        our_name(2): ours(job, workers=2),
        our_name(2, beam_size=3): ours(job, workers=2, beam_size=3),
        **alone(job),
    }
    if job.device.type == "cuda":
        contenders[our_name(os.cpu_count() or 1)] = ours(job, workers=os.cpu_count() or 1)
    cli.console.print(f"\n{job.encoder} on {kind}: {len(job.files):,} files")
    costs = take_turns(contenders, rounds=rounds)
    rows = [
        {
            "pictures": kind,
            "encoder": job.encoder,
            "contender": name,
            "wall_ms_an_image": median_of(turns, figure="wall_ms"),
            "cpu_ms_an_image": median_of(turns, figure="cpu_ms"),
        }
        for name, turns in costs.items()
    ]
    return rows, make_bars(job, costs, kind=kind)


def our_name(workers: int, *, beam_size: int = 1) -> str:
    """How a contender of ours is called."""
    return f"ours, {'greedy' if beam_size == 1 else f'beam {beam_size}'}, {workers} readers"


def make_bars(job: Job, costs: Costs, *, kind: str) -> list[Bar]:
    """What issue and README promise of these pictures and this encoder."""
    what = f"{job.encoder}, {kind}"
    best = our_name(os.cpu_count() or 1) if job.device.type == "cuda" else our_name(2)
    rate = median([1000 / cost.wall_ms for cost in costs[best] if cost])
    bars = [
        at_least(f"{what}: ours / ceiling", rate / ceiling(job, costs), 0.9 if kind == "COCO" else 0.85),
    ]
    if kind == "COCO":
        if job.encoder == LIGHT:
            bars.append(
                at_least(f"{what}: ours / the book", times_as_fast(costs[best], costs[BOOK], clock="wall_ms"), 8)
            )
        limit = 1.6 if job.encoder == LIGHT else 1.15
        beam = times_as_fast(costs[our_name(2)], costs[our_name(2, beam_size=3)], clock="wall_ms")
        bars.append(at_most(f"{what}: beam 3 / greedy, time", beam, limit))
    return bars


def median(values: Sequence[float]) -> float:
    """The middle value."""
    return float(np.median(values))


def ceiling(job: Job, costs: Costs) -> float:
    """The greatest number of pictures a second, from what each part costs alone in its best form."""
    num_cores = os.cpu_count() or 1
    parts = {part: cheapest(costs, part) for part in (READ, "alone: encoder", CAPTION)}
    if job.device.type == "cuda":
        return min(num_cores * 1000 / parts[READ], 1000 / parts["alone: encoder"])
    return num_cores * 1000 / sum(parts.values())


def cheapest(costs: Costs, part: str) -> float:
    """Milliseconds a picture of a part's quickest form: the median of its rounds."""
    return min(
        median([cost.wall_ms for cost in turns if cost]) for name, turns in costs.items() if name.startswith(part)
    )


def run() -> None:
    """The command line."""
    cli.run(main, CaptioningSettings, description=__doc__ or "")


if __name__ == "__main__":
    run()
