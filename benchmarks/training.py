"""Training, end to end: the book's loop against ours, what cached features and packing bring, and a GPU's ceiling.

    python benchmarks/training.py --images PHOTOS --captions captions.json       # about 8 minutes, COCO's JSON (or .gz)
    python benchmarks/training.py --quick                                        # rough figures, drawn pictures
    python benchmarks/training.py --images PHOTOS --captions captions.json --parts gpu --json training.json

Contenders take turns on the same pictures, with a projection to 9,956 words; figures are medians over the rounds, and
ratios medians of the rounds' ratios. A turn is a short epoch: reading, decoding, encoding, learning, and the start and
end of loader processes. The model is new in each turn, and one small batch warms it up. Weights are random, captions
are cut at the training command's length, and torch has one thread unless told otherwise. Without workers CPU time is
compared, which other programs disturb little; with workers time on the clock: measure on a machine that does nothing
else.

The book's loop has float32, one caption a sample, loose files, Pillow (or pillow-simd, where that is in its place) and
NLTK; its frozen encoder may be in eval mode and without gradients, which the book does not give it. On a GPU ours is
compared with its own encoder and decoder on a batch that lies there already, in steady state.

Exit codes: 0 measured, whether or not the bars hold; 2 something to mend, told in one line.
"""

import gc
import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from nltk.tokenize import word_tokenize
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.optim import Adam
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms

from captioner import cli
from captioner.errors import UserError
from captioner.flags import Count, File, Workers, WorkersOrZero
from captioner.images import loading
from captioner.images.views import ViewSpec, normalise
from captioner.model.encoders import Encoder
from captioner.model.network import CaptionModel, ModelConfig
from captioner.streaming import StreamingLoader
from captioner.streaming.dataset import read_split
from captioner.vocabulary import END, PAD, START, Vocabulary, count_words, read_vocabulary, tokenize
from captioner.workers import count_processors
from loaders import loader_options
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
    times_as_fast,
    write_json,
)
from packing import QUALITY, REPOSITORY, SIZE, shard_megabytes
from photos import draw_photos, find_photos, make_captions, repeat_photos
from picture_loaders import CAPTIONS, CROP, MEAN, SHARDS, STD, write_loose
from train.data.batches import PINNED_FOR, CaptionBatch, caption_loader
from train.data.features import FeatureFiles
from train.run.encode import prepare_features
from train.settings import NEW_MODEL, TrainSettings
from train.step.schedule import make_optimizer, make_schedule
from train.step.step import MAX_GRADIENT_NORM, CaptionLoss, distribute, train_step

PACKAGES = ("torch", "torchvision", "accelerate", "webdataset", "pillow", "pillow-simd", "nltk", "numpy")
NUM_WORDS = 9956  # COCO's, in the book
LIGHT, HEAVY, LARGE = "squeezenet1_1", "resnet50", "resnet152"
BATCH, GPU_BATCHES = 128, (128, 512)
CAPTIONS_A_PICTURE = 5
WARM_UP_SAMPLES = 2
DEFAULTS = TrainSettings()
WIDTHS = TrainSettings(**NEW_MODEL).model_config(0)
BOOK, OURS, CACHED = "the book's loop", "ours", "ours, cached features"
ENCODER, DECODER, PADDED = "encoder alone", "decoder alone, packed", "decoder alone, padded"
NO_BF16 = "not measured: this CPU has no bf16"
Precision = Literal["no", "bf16"]  # as Accelerate names them
NAMES: Mapping[Precision, str] = {"no": "fp32", "bf16": "bf16"}
Costs = Mapping[str, Sequence[Cost | None]]


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """What is measured, on what, and how long."""

    images: File | None = None
    """Folder of photos such as COCO's; without it pictures in COCO's sizes are drawn, which compress like photos."""
    captions: File | None = None
    """Real captions in COCO's JSON (or .json.gz), given to the pictures in turn; without it words are drawn."""
    parts: Literal["all", "cpu", "gpu"] = "all"
    """The CPU's figures, the GPU's, or both; the GPU's are left out where there is none."""
    rounds: Count | None = None
    """Turns of each contender: 3, with --quick 1."""
    steps: Count | None = None
    """Batches of a CPU turn: 2, with --quick 1."""
    workers: WorkersOrZero = 0
    """Loader processes of both contenders in the CPU's figures."""
    gpu_workers: WorkersOrZero | None = None
    """Loader processes in the GPU's figures: all processors, unless told otherwise."""
    threads: Workers = 1
    """Threads of torch in the training process."""
    quick: bool = False
    """Everything small, to see that it runs: the figures are rough."""
    json: File | None = None
    """Write run, rows and bars to this file."""


def main(settings: TrainingSettings) -> None:
    """Make the samples, measure, and tell."""
    torch.set_num_threads(settings.threads)
    torch.set_float32_matmul_precision("high")  # as the training command has it
    rows: list[dict[str, Any]] = []
    bars: list[Bar] = []
    with tempfile.TemporaryDirectory(prefix="training-") as temporary:
        scratch = Path(temporary)
        originals = find_photos(settings.images) if settings.images else draw_photos(scratch / "drawn", count=24)
        captions = read_captions(settings.captions) if settings.captions else None
        run = describe_run(
            PACKAGES,
            pictures=f"{len(originals)} {f'from {settings.images}' if settings.images else 'DRAWN'}, repeated",
            captions=settings.captions or "DRAWN for want of --captions",
            bf16_on_the_cpu="yes" if has_bf16() else "no",
            gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
            mode="quick: rough figures" if settings.quick else "full",
        )
        print_rows("training", [{"": name, "of this run": text} for name, text in run.items()])
        for part in (measure_on_cpu, measure_on_gpu):
            found = part(settings, originals, captions, scratch)
            rows, bars = rows + found[0], bars + found[1]
    print_bars(bars)
    if settings.json:
        write_json(settings.json, run=run, rows=rows, bars=bars)


def has_bf16() -> bool:
    """Whether this processor has instructions for bfloat16 products."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


# ---- the samples ------------------------------------------------------------------------------------------


def read_captions(file: Path) -> list[list[str]]:
    """The captions of each picture of a COCO file. Raises UserError."""
    of_picture: dict[Any, list[str]] = {}
    try:
        data = file.read_bytes()
        content = json.loads(gzip.decompress(data) if file.suffix == ".gz" else data)
        for row in content["annotations"]:
            of_picture.setdefault(row["image_id"], []).append(row["caption"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read --captions {file} ({error!r}): give captions in COCO's JSON") from error
    whole = [captions for captions in of_picture.values() if len(captions) >= CAPTIONS_A_PICTURE]
    if not whole:
        raise UserError(f"--captions {file} has no picture with {CAPTIONS_A_PICTURE} captions: give COCO's")
    return [captions[:CAPTIONS_A_PICTURE] for captions in whole]


def pack(
    originals: Sequence[Path], captions: Sequence[Sequence[str]] | None, folder: Path, *, num_samples: int
) -> None:
    """Shards of so many samples and their vocabulary, by the packing command. Raises UserError."""
    small = folder / "small"
    small.mkdir(parents=True)
    for number, path in enumerate(originals[:num_samples]):
        picture = Image.open(path).convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
        (small / f"{number:06d}.jpg").write_bytes(loading.encode_jpeg(picture, quality=QUALITY))
    paths = repeat_photos(folder / "repeated", sorted(small.iterdir()), count=num_samples)
    chosen = [captions[n % len(captions)] if captions else make_captions(n) for n in range(num_samples)]
    file, words = folder / "captions.jsonl", folder / "words.json"
    rows = [{"path": path.name, "captions": told} for path, told in zip(paths, chosen, strict=True)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words.write_text(make_vocabulary(chosen).to_json())
    flags = {
        "images": paths[0].parent,
        "captions": file,
        "split": "train",
        "output": folder / SHARDS,
        "vocabulary": words,
        "workers": 1 if num_samples < 1000 else count_processors(),
        "shard-megabytes": shard_megabytes(num_samples, shards=16),
    }
    given = [text for flag, value in flags.items() for text in (f"--{flag}", str(value))]
    command = [sys.executable, REPOSITORY / "sharding/make_shards.py", *given]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"packing the samples failed ({done.returncode}): {done.stderr[-600:]}")


def make_vocabulary(captions: Sequence[Sequence[str]]) -> Vocabulary:
    """The captions' words, the most frequent first, and made-up ones that fill up to NUM_WORDS."""
    found = Vocabulary.from_counts(count_words(tokenize(text) for told in captions for text in told), threshold=1)
    fillers = tuple(f"<filler-{number}>" for number in range(NUM_WORDS))
    words, counts = (found.words + fillers)[:NUM_WORDS], (found.counts + (0,) * NUM_WORDS)[:NUM_WORDS]
    return replace(found, words=words, counts=counts)


def find_vocabulary(folder: Path) -> Vocabulary:
    """The words of the samples in `folder`."""
    return read_vocabulary(str(folder / SHARDS / "vocabulary.json"), remedy="pack again")


# ---- the book's loop --------------------------------------------------------------------------------------


class BookCaptions(Dataset[tuple[Tensor, list[int]]]):
    """One caption a sample: its picture from a loose file, decoded each time, and its token ids."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "loose"
        captions_of: dict[str, list[str]] = json.loads((self.folder / CAPTIONS).read_text())
        self.samples = [(name, caption) for name, captions in captions_of.items() for caption in captions]
        self.vocabulary = find_vocabulary(folder)
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(CROP),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, list[int]]:
        name, caption = self.samples[index]
        image_3PP: Any = self.transform(Image.open(self.folder / name).convert("RGB"))
        ids = self.vocabulary.encode(word_tokenize(caption.lower(), preserve_line=True))
        ending = [END] if len(ids) <= DEFAULTS.max_tokens else []
        return image_3PP, [START, *ids[: DEFAULTS.max_tokens], *ending]


def collate_captions(samples: list[tuple[Tensor, list[int]]]) -> tuple[Tensor, Tensor, list[int]]:
    """Images (B, 3, P, P), padded token ids (B, T), the longest first, and their lengths."""
    samples.sort(key=lambda sample: len(sample[1]), reverse=True)
    lengths = [len(ids) for _, ids in samples]
    tokens_BT = torch.full((len(samples), lengths[0]), PAD)
    for row_T, (_, ids) in zip(tokens_BT, samples, strict=True):
        row_T[: len(ids)] = torch.tensor(ids)
    return torch.stack([image for image, _ in samples]), tokens_BT, lengths


class BookModel(nn.Module):
    """The book's encoder and decoder: B images with a caption each; its weights lie as torchvision makes them."""

    def __init__(self, encoder: str, *, num_words: int) -> None:
        super().__init__()
        self.encoder = Encoder(encoder, trainable=False).to(memory_format=torch.contiguous_format)
        self.linear = nn.Linear(self.encoder.num_features, WIDTHS.embedding_size)
        self.norm = nn.BatchNorm1d(WIDTHS.embedding_size, momentum=0.01)
        self.embed = nn.Embedding(num_words, WIDTHS.embedding_size)
        self.lstm = nn.LSTM(WIDTHS.embedding_size, WIDTHS.hidden_size, batch_first=True)
        self.predict = nn.Linear(WIDTHS.hidden_size, num_words)

    def forward(self, images_B3PP: Tensor, tokens_BT: Tensor, lengths: list[int]) -> Tensor:
        """Logits (M, V) of all tokens, `<start>` included."""
        image_BE = self.norm(self.linear(self.encoder(images_B3PP)))
        inputs_BTE = torch.cat((image_BE[:, None], self.embed(tokens_BT)), dim=1)
        hidden, _ = self.lstm(pack_padded_sequence(inputs_BTE, lengths, batch_first=True))
        return self.predict(hidden.data)


def like_the_book(job: "Job", *, steps: int) -> Contender:
    """So many steps of the book's loop on samples drawn at random."""
    dataset = BookCaptions(job.folder)

    def turn(number: int) -> Cost:
        torch.manual_seed(number)
        model = BookModel(job.encoder, num_words=len(dataset.vocabulary))
        optimizer = Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)

        def learn(num_captions: int, num_workers: int) -> int:
            sampler = RandomSampler(dataset, num_samples=num_captions)
            options = loader_options(num_workers) | {"sampler": sampler, "collate_fn": collate_captions}
            for images_B3PP, tokens_BT, lengths in DataLoader(dataset, batch_size=job.batch, **options):
                targets_M = pack_padded_sequence(tokens_BT, lengths, batch_first=True).data
                loss = cross_entropy(model(images_B3PP, tokens_BT, lengths), targets_M)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            return num_captions

        learn(WARM_UP_SAMPLES, 0)
        return time_all(lambda: learn(steps * job.batch, job.workers))

    return turn


# ---- ours -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What is trained, on which samples, and how."""

    folder: Path
    encoder: str
    batch: int
    workers: int
    precision: Precision
    on_cpu: bool


class Trainer:
    """What train/main.py puts together, with a new model of random weights, the same ones in each turn."""

    def __init__(self, job: Job) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)  # a process has one precision otherwise
        self.accelerator = Accelerator(cpu=job.on_cpu, mixed_precision=job.precision)
        self.split = read_split([str(job.folder / SHARDS)], "train", remedy="pack again")
        self.batch = job.batch
        vocabulary = find_vocabulary(job.folder)
        config = ModelConfig(encoder=job.encoder, vocabulary_size=len(vocabulary), dropout=DEFAULTS.dropout)
        torch.manual_seed(0)
        self.model = CaptionModel(config)
        self.loss_model = CaptionLoss(self.model, view=ViewSpec(size=SIZE, crop=CROP))
        optimizer = make_optimizer(
            self.model, DEFAULTS.learning_rate, encoder_learning_rate=DEFAULTS.encoder_learning_rate
        )
        self.schedule = make_schedule(optimizer, DEFAULTS.schedule, total_steps=10_000)
        self.wrapped, self.optimizer = distribute(self.loss_model, optimizer, self.accelerator)
        self.wrapped.train()
        self.cache = str(job.folder / "cache")
        self.open_loader = partial(
            caption_loader,
            batch_size=job.batch,
            vocabulary=vocabulary,
            crop=CROP,
            max_tokens=DEFAULTS.max_tokens,
            num_workers=job.workers,
            cache=self.cache,
            pin_memory=self.accelerator.device.type in PINNED_FOR,
        )

    def features(self) -> FeatureFiles:
        """The cached features, made where they are not there yet."""
        found = prepare_features(
            [self.split],
            loss_model=self.loss_model,
            open_loader=self.open_loader,
            cache=self.cache,
            accelerator=self.accelerator,
        )
        return found[self.split.name]

    def epoch(self, number: int, features: FeatureFiles | None, *, steps: int | None = None) -> StreamingLoader:
        """A loader of crops at random, or of cached features, at the beginning of an epoch, or at its last `steps`."""
        loader = self.open_loader(self.split, training=True, features=features)
        first = 0 if steps is None else max(0, len(loader) - steps)
        loader.set_epoch(number)
        loader.load_state_dict(loader.state_dict(steps=first))
        return loader

    def batch_of(self, num_samples: int, features: FeatureFiles | None) -> CaptionBatch:
        """A batch that lies on the device."""
        loader = self.open_loader(self.split, batch_size=num_samples, num_workers=0, features=features)
        (batch,) = next(iter(loader))
        return batch.to(self.accelerator.device)

    def step(self, batch: CaptionBatch) -> None:
        """A step, whatever is in the batch."""
        train_step(
            self.wrapped, [batch], optimizer=self.optimizer, schedule=self.schedule, accelerator=self.accelerator
        )

    def encode(self, batch: CaptionBatch) -> None:
        """The encoder's part of a step."""
        with torch.no_grad(), self.accelerator.autocast():
            self.model.encoder(normalise(batch.inputs, self.loss_model.view))

    def padded_step(self, batch: CaptionBatch) -> None:
        """A step on features, with padding: the LSTM and the logits go over all places up to the longest caption."""
        captions, model = batch.captions, self.model
        inputs_TN, targets_TN = (
            pad_packed_sequence(PackedSequence(tokens_M, captions.batch_sizes_T), padding_value=PAD)[0]
            for tokens_M in (captions.inputs_M, captions.targets_M)
        )
        state = model.start(model.encode(batch.inputs), rows_N=captions.image_of_caption_N)
        hidden_TNH, _ = model.lstm(model.drop(model.embed(inputs_TN)), state)
        logits_MV = model.predict(model.drop(hidden_TNH)).flatten(0, 1)
        self.accelerator.backward(cross_entropy(logits_MV, targets_TN.flatten(), ignore_index=PAD))
        self.accelerator.clip_grad_norm_(self.loss_model.parameters(), MAX_GRADIENT_NORM)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()


def train_epoch(job: Job, *, steps: int, cached: bool = False) -> Contender:
    """The last steps of an epoch."""

    def turn(number: int) -> Cost:
        trainer = Trainer(job)
        features = trainer.features() if cached else None
        trainer.step(trainer.batch_of(WARM_UP_SAMPLES, features))

        def learn() -> int:
            num_captions = 0
            with closing(trainer.epoch(number, features, steps=steps)) as loader:
                for (batch,) in loader:
                    trainer.step(batch)
                    num_captions += num_captions_of(batch)
            return num_captions

        return time_all(learn)

    return turn


def repeat_alone(
    job: Job, action: Callable[[Trainer, CaptionBatch], None], *, times: int = 1, cached: bool
) -> Contender:
    """A part of a step, so many times on one batch that lies on the device."""

    def turn(_number: int) -> Cost:
        trainer = Trainer(job)
        features = trainer.features() if cached else None
        action(trainer, trainer.batch_of(WARM_UP_SAMPLES, features))
        batch = trainer.batch_of(job.batch, features)

        def repeat() -> int:
            for _ in range(times):
                action(trainer, batch)
            return times * num_captions_of(batch)

        return time_all(repeat)

    return turn


def clock_of(workers: int) -> str:
    """CPU time where all of it is known."""
    return "wall_ms" if workers else "cpu_ms"


def num_captions_of(batch: CaptionBatch) -> int:
    """All captions of all its pictures."""
    return len(batch.captions.image_of_caption_N)


def time_all(action: Callable[[], int]) -> Cost:
    """What `action`, which tells how many items it did, costs in this process and those that it started and ended."""
    gc.collect()
    wait_for_gpu()
    wall, cpu = time.perf_counter(), sum(os.times()[:4])
    items = action()
    wait_for_gpu()
    return Cost(items=items, cpu_seconds=sum(os.times()[:4]) - cpu, wall_seconds=time.perf_counter() - wall)


def wait_for_gpu() -> None:
    """Until it has done all that it was told, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# ---- on the CPU -------------------------------------------------------------------------------------------


def measure_on_cpu(
    settings: TrainingSettings, originals: Sequence[Path], captions: Sequence[Sequence[str]] | None, scratch: Path
) -> tuple[list[dict[str, Any]], list[Bar]]:
    """The book's loop, ours in each precision, and what features and packing bring."""
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
    told = [{"encoder": HEAVY, **features_figures(costs, clock=clock)}]
    print_rows("cached features, end to end: pictures are decoded without them", told)
    return [{"table": "CPU", **row} for row in rows] + [{"table": "cached features", **row} for row in told], cpu_bars(
        costs, clock=clock
    )


def cpu_contenders(job: Job, *, steps: int) -> dict[str, Contender]:
    """All that can be measured here; the heavy encoder has one step where it sees pictures."""
    light = replace(job, encoder=LIGHT)
    found = {
        label(LIGHT, "no", BOOK): like_the_book(light, steps=steps),
        label(LIGHT, "no", OURS): train_epoch(light, steps=steps),
        label(HEAVY, "no", OURS): train_epoch(job, steps=1),
        label(HEAVY, "no", CACHED): train_epoch(job, steps=steps, cached=True),
        label(HEAVY, "no", ENCODER): repeat_alone(job, Trainer.encode, cached=False),
        label(HEAVY, "no", DECODER): repeat_alone(job, Trainer.step, cached=True),
        label(HEAVY, "no", PADDED): repeat_alone(job, Trainer.padded_step, cached=True),
    }
    if has_bf16():
        found[label(LIGHT, "bf16", OURS)] = train_epoch(replace(light, precision="bf16"), steps=steps)
        found[label(HEAVY, "bf16", OURS)] = train_epoch(replace(job, precision="bf16"), steps=steps)
        found[label(HEAVY, "no", BOOK)] = like_the_book(job, steps=1)
    return found


def label(encoder: str, precision: Precision, name: str) -> str:
    """A contender's name among all."""
    return f"{encoder}, {NAMES[precision]}: {name}"


def ratio(costs: Costs, one: str, other: str, *, clock: str) -> float | None:
    """How many times as fast one contender is as another; None where one of them is not there."""
    return times_as_fast(costs[one], costs[other], clock=clock) if one in costs and other in costs else None


def cpu_rows(costs: Costs) -> list[dict[str, Any]]:
    """A row for each contender, also for those that this processor is no place for."""
    rows = []
    for encoder in (LIGHT, HEAVY):
        for precision, name in (("no", BOOK), ("no", OURS), ("bf16", OURS), ("no", CACHED), ("no", ENCODER),
                                ("no", DECODER), ("no", PADDED)):  # fmt: skip
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
    """How many times as fast cached features make an epoch, and how many times they could."""
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
    """What ours must reach."""
    by = "CPU" if clock == "cpu_ms" else "wall"
    bars: list[Bar] = []
    for encoder, precision, bar in ((LIGHT, "no", 2.5), (LIGHT, "bf16", 4.5), (HEAVY, "bf16", 8.0)):
        found = ratio(costs, label(encoder, precision, OURS), label(encoder, "no", BOOK), clock=clock)
        bars.append(at_least(f"{encoder}, ours in {NAMES[precision]} / {BOOK} ({by})", found, bar))
    share = features_figures(costs, clock=clock)["share_of_it"]
    packed = ratio(costs, label(HEAVY, "no", DECODER), label(HEAVY, "no", PADDED), clock=clock)
    return [
        *bars,
        at_least(f"{HEAVY}, cached / uncached, of (encoder + decoder) / decoder ({by})", share, 0.85),
        at_least(f"decoder, packed / padded captions ({by})", packed, 1.3),
    ]


# ---- on a GPU ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuCost(Cost):
    """A stretch of an epoch in steady state, in captions."""

    waiting_seconds: float
    peak_gigabytes: float

    @property
    def waiting_share(self) -> float:
        """Of the time, the share in which the training process waited for a batch."""
        return self.waiting_seconds / self.wall_seconds


def measure_on_gpu(
    settings: TrainingSettings, originals: Sequence[Path], captions: Sequence[Sequence[str]] | None, scratch: Path
) -> tuple[list[dict[str, Any]], list[Bar]]:
    """Ours, with and without cached features, against encoder and decoder on a batch that is there already."""
    if settings.parts == "cpu" or not torch.cuda.is_available():
        return [], gpu_bars([])
    torch.set_num_threads(count_processors())  # which the training command leaves as it is beside a GPU
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
                ENCODER: repeat_alone(at_once, Trainer.encode, times=times, cached=False),
                DECODER: repeat_alone(at_once, Trainer.step, times=times, cached=True),
            },
            rounds=rounds,
        )
        rows += gpu_rows(costs, batch=batch)
    title = f"{LARGE} in bf16 on {torch.cuda.get_device_name()}, {workers} workers: medians of {rounds} rounds"
    print_rows(title, rows)
    return [{"table": "GPU", **row} for row in rows], gpu_bars(rows)


def train_steadily(job: Job, *, cached: bool) -> Contender:
    """An epoch without its first and last tenth: the device is warm, and workers fill their queues to the end."""

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
    """A row for each contender; ours are compared with the parts that they have to do."""
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
    """What ours must reach on a GPU, for each batch."""
    found = {(row["batch"], row["contender"]): row for row in rows}
    bars = []
    for batch in GPU_BATCHES:
        for name in (OURS, CACHED):
            row, words = found.get((batch, name), {}), f"GPU, {LARGE}, batch {batch}, {name}"
            parts = "decoder" if name == CACHED else "encoder + decoder"
            bars.append(at_least(f"{words} / {parts} on the device", row.get("of_its_parts_on_the_device"), 0.9))
            bars.append(at_most(f"{words}, share of time waiting for data", row.get("waiting_share"), 0.03))
    return bars


def run() -> None:
    """The entry."""
    cli.run(main, TrainingSettings, description=__doc__ or "")


if __name__ == "__main__":
    run()
