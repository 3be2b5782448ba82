"""The contenders of benchmarks/captioning.py: the book's loop, the captioning command's work, and its parts alone."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms

from captioner.describe import Captioner
from captioner.images.views import ViewSpec, normalise, read_eval_view
from captioner.model.bundle import Bundle, DecodingDefaults
from captioner.model.decoding import decode
from captioner.model.network import DecoderKind, ModelConfig, build_model
from captioner.vocabulary import SPECIAL_WORDS, Vocabulary
from captioner.workers import count_processors
from contenders import CAPTION_STEPS, LIGHT, NUM_WORDS
from contenders.training import BookModel
from infer.captioning import caption_files, find_device
from infer.peers import Peers
from infer.results import RowWriter, part_path
from infer.row_index import RowIndex, merge
from infer.settings import CaptionSettings, open_listing
from measuring.figures import (
    Bar,
    Contender,
    Cost,
    at_least,
    at_most,
    median,
    median_of,
    take_turns,
    time_here,
    times_as_fast,
)
from measuring.photos import COCO

BOOK_STEPS = 20
CPU_BATCHES, GPU_BATCHES = (4, 8), (64, 256)
DECODER_BATCH = 256
BEAM_SIZES = {1: 1.3, 3: 1.5}  # with the most times the vector's time that attention may take
NUM_CORES = count_processors()
BOOK = "the book's way"
READ, ENCODER, CAPTION = "decode and resize", "encoder", "greedy"
ALONE, BUSY = "alone", "all cores busy"
Costs = Mapping[str, Sequence[Cost | None]]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One set of images and one encoder, which all contenders share."""

    files: list[Path]
    num_alone: int
    encoder: str
    captioner: Captioner
    scratch: Path

    @property
    def bundle(self) -> Bundle:
        assert isinstance(self.captioner.bundle, Bundle)
        return self.captioner.bundle

    @property
    def device(self) -> torch.device:
        return self.bundle.device


def start() -> torch.device:
    """Give torch one thread, as the command does, and return the command's device."""
    torch.set_num_threads(1)
    return find_device()


def make_job(files: list[Path], encoder: str, device: torch.device, scratch: Path, *, quick: bool) -> Job:
    """A captioner, and the number of images for parts measured alone."""
    captioner = make_captioner(encoder, device)
    return Job(files=files, num_alone=16 if quick else 128, encoder=encoder, captioner=captioner, scratch=scratch)


def make_captioner(encoder: str, device: torch.device, decoder: DecoderKind = "vector") -> Captioner:
    """A captioner with random weights."""
    words = tuple(f"word-{number}" for number in range(NUM_WORDS - len(SPECIAL_WORDS)))
    vocabulary = Vocabulary(words=(*SPECIAL_WORDS, *words), counts=(1,) * NUM_WORDS, threshold=1)
    torch.manual_seed(0)
    config = ModelConfig(encoder=encoder, vocabulary_size=NUM_WORDS, decoder=decoder)
    model = build_model(config).eval().to(device)
    bundle = Bundle(
        model=model,
        view=ViewSpec(),
        vocabulary=vocabulary,
        decoding=DecodingDefaults(beam_size=1, max_tokens=CAPTION_STEPS),
        name="random",
        calibration=None,
    )
    return Captioner(bundle, precision="bfloat16" if torch.cuda.is_available() else "float32")


# ---- contenders -------------------------------------------------------------------------------------------


def ours(job: Job, *, workers: int, beam_size: int = 1) -> Contender:
    """The captioning command's work on the folder, with `workers` reading processes."""

    def turn(_round: int) -> Cost:
        decoding = replace(job.bundle.decoding, beam_size=beam_size)
        captioner = Captioner(replace(job.bundle, decoding=decoding), precision=job.captioner.precision)
        with tempfile.TemporaryDirectory(dir=job.scratch) as folder:
            settings = CaptionSettings(
                images=(str(job.files[0].parent),), output=Path(folder, "captions.jsonl"), workers=workers
            )
            cost = time_here(len(job.files), partial(caption_folder, job, captioner, settings))
            return replace(cost, cpu_seconds=None)  # would leave out the reading processes

    return turn


def caption_folder(job: Job, captioner: Captioner, settings: CaptionSettings) -> None:
    """Caption the job's files as infer/main.py does once it has loaded the model."""
    names = {path.name for path in job.files}
    alone = Peers(settings.output)
    listing = open_listing(settings, alone)
    own = (entry for entry in listing if getattr(entry, "path", None) in names)
    with closing(RowIndex(settings.output)) as index, closing(RowWriter(part_path(settings.output, 0))) as writer:
        num_rows, *_ = caption_files(own, index, writer, captioner, settings=settings, peers=alone)  # type: ignore[arg-type]
    summary = merge(settings.output)
    assert num_rows == summary.num_rows == len(job.files), "files were lost"
    assert not summary.failures
    assert not summary.num_duplicates


def like_the_book(job: Job) -> Contender:
    """Caption one image at a time, as a notebook does."""
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
        torch.set_num_threads(NUM_CORES)  # torch's default
        try:
            paths = job.files[: job.num_alone]
            return time_here(len(paths), lambda: [caption(path) for path in paths])
        finally:
            torch.set_num_threads(1)

    return turn


def alone(job: Job, *, cores: int) -> dict[str, Contender]:
    """Each part of captioning by itself, in several forms, on `cores` cores at once."""
    contents = [path.read_bytes() for path in job.files[: job.num_alone]]
    view = job.captioner.bundle.view
    views_BPP3 = torch.from_numpy(np.stack([read_eval_view(data, view)[0] for data in contents]))
    images_B3PP = normalise(views_BPP3.to(job.device), view)
    found: dict[str, Contender] = {}

    def add(part: str, action: Callable[[], object], *, items: int) -> None:
        found[f"{part}, {BUSY if cores > 1 else ALONE}"] = on_cores(action, items=items, cores=cores)

    add(READ, lambda: [read_eval_view(data, view) for data in contents], items=len(contents))
    for name, encode, count in encoders(job, images_B3PP):
        add(f"{ENCODER} {name}", encode, items=count)
    model, options = job.bundle.model, asdict(job.captioner.decoding)
    with torch.inference_mode():
        like = model.encode(model.encoder(images_B3PP[:1]))
    images = torch.randn((DECODER_BATCH, *like.shape[1:]), device=job.device)
    add(CAPTION, lambda: decode(model, images, **options), items=DECODER_BATCH)
    return found


def on_cores(action: Callable[[], object], *, items: int, cores: int) -> Contender:
    """Run `action` in `cores` threads; the cost is that of one item on one core."""
    threads = ThreadPoolExecutor(cores)

    def act() -> None:
        for future in [threads.submit(action) for _ in range(cores)]:
            future.result()

    act()
    return lambda _round: time_here(items, act)


def encoders(job: Job, images_B3PP: Tensor) -> list[tuple[str, Callable[[], object], int]]:
    """Encoders in several forms and batch sizes: name, action, and number of images."""
    encoder, bfloat16 = job.bundle.model.encoder, job.captioner.precision == "bfloat16"
    sizes = GPU_BATCHES if job.device.type == "cuda" else CPU_BATCHES
    forms = [("folded", encoder, size) for size in sizes] + [("plain", encoder.backbone, size) for size in sizes]
    return [
        (f"{name}, batch {size}", partial(encode, form, parts, bfloat16=bfloat16), sum(map(len, parts)))
        for name, form, size in forms
        for parts in [whole_batches(images_B3PP, size)]
    ]


def whole_batches(images_B3PP: Tensor, size: int) -> list[Tensor]:
    """The images in batches of one size, repeated if there are too few."""
    enough = images_B3PP.repeat(-(-size // len(images_B3PP)), 1, 1, 1)
    parts = [part for part in enough.split(size) if len(part) == size]
    return [part.contiguous(memory_format=torch.channels_last) for part in parts]


@torch.inference_mode()
def encode(form: nn.Module, parts: Sequence[Tensor], *, bfloat16: bool) -> None:
    """Encode batches on the device."""
    device = parts[0].device.type
    with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
        for part in parts:
            form(part)
    if device == "cuda":
        torch.cuda.synchronize()


# ---- figures ----------------------------------------------------------------------------------------------


def measure(job: Job, *, kind: str, rounds: int) -> tuple[list[dict[str, Any]], list[Bar]]:
    """Measure all contenders on one set of images with one encoder."""
    contenders: dict[str, Contender] = {
        BOOK: like_the_book(job),
        our_name(2): ours(job, workers=2),
        our_name(2, beam_size=3): ours(job, workers=2, beam_size=3),
        **alone(job, cores=1 if job.device.type == "cuda" else NUM_CORES),
    }
    if has_attention(job, kind):
        looking = replace(job, captioner=make_captioner(job.encoder, job.device, "attention"))
        for beam_size in BEAM_SIZES:
            name = our_name(2, beam_size=beam_size, decoder="attention")
            contenders[name] = ours(looking, workers=2, beam_size=beam_size)
    if job.device.type == "cuda":
        contenders[our_name(NUM_CORES)] = ours(job, workers=NUM_CORES)
    ours(replace(job, files=job.files[:2]), workers=1)(0)  # starts the fork server of the reading processes
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


def has_attention(job: Job, kind: str) -> bool:
    """Whether the decoder with attention is measured too."""
    return kind == COCO and job.encoder == LIGHT


def our_name(workers: int, *, beam_size: int = 1, decoder: DecoderKind = "vector") -> str:
    """The name of one of our contenders."""
    search = "greedy" if beam_size == 1 else f"beam {beam_size}"
    return f"ours, {'attention, ' if decoder == 'attention' else ''}{search}, {workers} readers"


def make_bars(job: Job, costs: Costs, *, kind: str) -> list[Bar]:
    """The bars of these images and this encoder."""
    what = f"{job.encoder}, {kind}"
    on_gpu = job.device.type == "cuda"
    load = ALONE if on_gpu or NUM_CORES == 1 else BUSY
    name = our_name(NUM_CORES if on_gpu else 2)
    bars = [at_least(f"{what}: {name} / ceiling, {load}", share_of_ceiling(job, costs, name), 0.9)]
    if kind == COCO and job.encoder == LIGHT:
        best = times_as_fast(costs[our_name(2)], costs[BOOK], clock="wall_ms")
        beam = times_as_fast(costs[our_name(2)], costs[our_name(2, beam_size=3)], clock="wall_ms")
        bars += [
            at_least(f"{what}: ours / the book", best, 8.7),
            at_most(f"{what}: beam 3 / greedy, time", beam, 1.6),
        ]
    if has_attention(job, kind):
        for beam_size, limit in BEAM_SIZES.items():
            vector, attention = (
                our_name(2, beam_size=beam_size, decoder=decoder) for decoder in ("vector", "attention")
            )
            slower = times_as_fast(costs[vector], costs[attention], clock="wall_ms")
            bars.append(at_most(f"{what}: {attention} / vector, time", slower, limit))
    return bars


def share_of_ceiling(job: Job, costs: Costs, name: str) -> float | None:
    """Our speed relative to the ceiling: the median of the rounds' ratios."""
    best = [best_form(costs, part) for part in (READ, ENCODER, CAPTION)]
    shares = []
    for number, own in enumerate(costs[name]):
        parts = [turns[number].wall_ms for turns in best]  # type: ignore[union-attr]
        least = max(parts[0] / NUM_CORES, parts[1]) if job.device.type == "cuda" else sum(parts) / NUM_CORES
        shares.append(least / own.wall_ms if own else None)
    return median(shares)


def best_form(costs: Costs, part: str) -> Sequence[Cost | None]:
    """The turns of a part's fastest form."""
    forms = [turns for name, turns in costs.items() if name.startswith(part)]
    return min(forms, key=lambda turns: median_of(turns, figure="wall_ms") or 0.0)
