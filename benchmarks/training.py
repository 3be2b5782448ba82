"""Training, end to end: the book's loop against ours, what cached features and packing bring, and a GPU's ceiling.

    python benchmarks/training.py --images ../shared/data/coco/images --captions captions.json   # about 8 minutes
    python benchmarks/training.py --quick                                                        # rough figures
    python benchmarks/training.py --parts gpu --images photos --captions captions.json --json training.json

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

import gzip
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
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

from captioner import images
from captioner.cli import UserError
from captioner.encoders import Encoder
from captioner.model import CaptionModel, ModelConfig
from captioner.views import ViewSpec, normalise
from captioner.vocabulary import END, PAD, START, Vocabulary, count_words, read_vocabulary, tokenize
from loaders import CAPTIONS, CROP, MEAN, SHARDS, STD, loader_options
from measure import (
    Bar,
    Contender,
    Cost,
    describe_run,
    print_bars,
    print_rows,
    write_json,
)
from packing import QUALITY, REPOSITORY, SIZE, shard_megabytes
from photos import draw_photos, find_photos, make_captions, repeat_photos
from train.cache import ShardCache
from train.encode import prepare_features
from train.features import FeatureFiles
from train.schedule import make_optimizer, make_schedule
from train.settings import TrainSettings
from train.split import read_split
from train.step import MAX_GRADIENT_NORM, CaptionLoss, train_step
from train.stream import Batch, BatchStream, Share, ViewRules

PACKAGES = ("torch", "torchvision", "accelerate", "webdataset", "pillow", "pillow-simd", "nltk", "numpy")
NUM_WORDS = 9956  # COCO's, in the book
LIGHT, HEAVY, LARGE = "squeezenet1_1", "resnet50", "resnet152"
BATCH, GPU_BATCHES = 128, (128, 512)
CAPTIONS_A_PICTURE = 5
WARM_UP_SAMPLES = 8
DEFAULTS = TrainSettings()
BOOK, OURS, CACHED = "the book's loop", "ours", "ours, cached features"
ENCODER, DECODER, PADDED = "encoder alone", "decoder alone, packed", "decoder alone, padded"
NO_BF16 = "not measured: this CPU has no bf16"
Precision = Literal["no", "bf16"]  # as Accelerate names them
NAMES: Mapping[Precision, str] = {"no": "fp32", "bf16": "bf16"}
Costs = Mapping[str, Sequence[Cost | None]]


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """What is measured, on what, and how long."""

    images: Path | None = None
    """Folder of photos such as COCO's; without it pictures in COCO's sizes are drawn, which compress like photos."""
    captions: Path | None = None
    """Real captions in COCO's JSON (or .json.gz), given to the pictures in turn; without it words are drawn."""
    parts: Literal["all", "cpu", "gpu"] = "all"
    """The CPU's figures, the GPU's, or both; the GPU's are left out where there is none."""
    rounds: int | None = None
    """Turns of each contender: 3, with --quick 1."""
    steps: int | None = None
    """Batches of a CPU turn: 2, with --quick 1."""
    workers: int = 0
    """Loader processes of both contenders in the CPU's figures."""
    gpu_workers: int | None = None
    """Loader processes in the GPU's figures: all processors, unless told otherwise."""
    threads: int = 1
    """Threads of torch in the training process."""
    quick: bool = False
    """Everything small, to see that it runs: the figures are rough."""
    json: Path | None = None
    """Write run, rows and bars to this file."""


def main(settings: TrainingSettings) -> None:
    """Make the samples, measure, and tell."""
    check_settings(settings)
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
            torch=f"{settings.threads} threads; {'bf16' if has_bf16() else 'no bf16'} on the CPU",
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


def check_settings(settings: TrainingSettings) -> None:
    """Raise UserError for numbers that make no sense, before minutes are spent."""
    for name, least in (("rounds", 1), ("steps", 1), ("threads", 1), ("workers", 0), ("gpu_workers", 0)):
        value = getattr(settings, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value} is too small: give at least {least}")
    if settings.json and not settings.json.absolute().parent.is_dir():
        raise UserError(f"there is no folder for --json {settings.json}: make it, or name another file")
    if settings.parts == "gpu" and not torch.cuda.is_available():
        raise UserError("--parts gpu, and torch sees no GPU here: leave it out, or go to a machine with one")


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
        (small / f"{number:06d}.jpg").write_bytes(images.encode_jpeg(picture, quality=QUALITY))
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
        "workers": 1 if num_samples < 1000 else os.cpu_count(),
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
        self.linear = nn.Linear(self.encoder.num_features, DEFAULTS.embedding_size)
        self.norm = nn.BatchNorm1d(DEFAULTS.embedding_size, momentum=0.01)
        self.embed = nn.Embedding(num_words, DEFAULTS.embedding_size)
        self.lstm = nn.LSTM(DEFAULTS.embedding_size, DEFAULTS.hidden_size, batch_first=True)
        self.predict = nn.Linear(DEFAULTS.hidden_size, num_words)

    def forward(self, images_B3PP: Tensor, tokens_BT: Tensor, lengths: list[int]) -> Tensor:
        """Logits (M, V) of all tokens, `<start>` included."""
        image_BE = self.norm(self.linear(self.encoder(images_B3PP)))
        inputs_BTE = torch.cat((image_BE[:, None], self.embed(tokens_BT)), dim=1)
        hidden, _ = self.lstm(pack_padded_sequence(inputs_BTE, lengths, batch_first=True))
        return self.predict(hidden.data)


def like_the_book(encoder: str, folder: Path, *, batch: int, steps: int, workers: int) -> Contender:
    """So many steps of the book's loop on samples drawn at random."""
    dataset = BookCaptions(folder)

    def turn(number: int) -> Cost:
        torch.manual_seed(number)
        model = BookModel(encoder, num_words=len(dataset.vocabulary))
        optimizer = Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)

        def learn(num_captions: int, num_workers: int) -> int:
            sampler = RandomSampler(dataset, num_samples=num_captions)
            options = loader_options(num_workers) | {"sampler": sampler, "collate_fn": collate_captions}
            for images_B3PP, tokens_BT, lengths in DataLoader(dataset, batch_size=batch, **options):
                targets_M = pack_padded_sequence(tokens_BT, lengths, batch_first=True).data
                loss = cross_entropy(model(images_B3PP, tokens_BT, lengths), targets_M)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            return num_captions

        learn(WARM_UP_SAMPLES, 0)
        return time_all(lambda: learn(steps * batch, workers))

    return turn


# ---- ours -------------------------------------------------------------------------------------------------


class Trainer:
    """What train/main.py puts together, with a new model of random weights, the same ones in each turn."""

    def __init__(self, encoder: str, folder: Path, *, batch: int, precision: Precision, on_cpu: bool) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)  # a process has one precision otherwise
        self.accelerator = Accelerator(cpu=on_cpu, mixed_precision=precision)
        self.split = read_split([str(folder / SHARDS)], "train", remedy="pack again")
        vocabulary = find_vocabulary(folder)
        config = ModelConfig(encoder=encoder, vocabulary_size=len(vocabulary), dropout=DEFAULTS.dropout)
        torch.manual_seed(0)
        self.model = CaptionModel(config)
        self.loss_model = CaptionLoss(self.model, view=ViewSpec(size=SIZE, crop=CROP))
        self.optimizer: Any = make_optimizer(
            self.model, DEFAULTS.learning_rate, encoder_learning_rate=DEFAULTS.encoder_learning_rate
        )
        self.schedule = make_schedule(self.optimizer, DEFAULTS.schedule, total_steps=10_000)
        self.wrapped, self.optimizer = self.accelerator.prepare(self.loss_model, self.optimizer)
        self.wrapped.train()
        self.rules = ViewRules(crop=CROP, max_tokens=DEFAULTS.max_tokens, training=False)
        self.open_stream = partial(
            BatchStream,
            share=Share(batch),
            vocabulary=vocabulary,
            rules=self.rules,
            workers=0,
            cache=ShardCache(str(folder / "cache"), max_bytes=10**9),
        )

    def features(self) -> FeatureFiles:
        """The cached features, made where they are not there yet."""
        return prepare_features(
            self.split, loss_model=self.loss_model, open_stream=self.open_stream, accelerator=self.accelerator
        )

    def epoch(self, number: int, *, workers: int, features: FeatureFiles | None) -> BatchStream:
        """An epoch's batches, of crops at random or of cached features."""
        rules = replace(self.rules, training=features is None)
        plan = self.split.plan(seed=0, epoch=number)
        return self.open_stream(self.split, plan=plan, rules=rules, workers=workers, features=features)

    def step(self, batch: Batch) -> int:
        """A step; returns the number of its captions."""
        train_step(
            self.wrapped, [batch], optimizer=self.optimizer, schedule=self.schedule, accelerator=self.accelerator
        )
        return num_captions_of(batch)

    def encode(self, batch: Batch) -> Batch:
        """The batch with features in place of its views."""
        with torch.no_grad(), self.accelerator.autocast():
            features_BF = self.model.encoder(normalise(batch.inputs, self.loss_model.view))
        return replace(batch, inputs=features_BF.float())

    def padded_step(self, batch: Batch) -> int:
        """A step on features as it would be with padding: the LSTM and the logits go over all T places."""
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
        return num_captions_of(batch)


def num_captions_of(batch: Batch) -> int:
    """All captions of all its pictures."""
    return len(batch.captions.image_of_caption_N)


Action = Callable[[Trainer, Batch], object]


def ours(make_trainer: Callable[[], Trainer], *, steps: int, workers: int, cached: bool = False) -> Contender:
    """The last `steps` steps of an epoch."""

    def turn(number: int) -> Cost:
        trainer = make_trainer()
        features = trainer.features() if cached else None
        stream = trainer.epoch(number, workers=workers, features=features)
        first = max(0, len(stream) - steps)
        warm_up(trainer, trainer.step, features)
        stream = trainer.epoch(number, workers=workers, features=features)
        return time_all(lambda: sum(map(trainer.step, islice(stream, steps))))

    return turn
