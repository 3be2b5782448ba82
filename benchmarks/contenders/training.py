"""The contenders of benchmarks/training.py: the book's training loop, ours, and the parts of our step alone."""

import gc
import gzip
import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
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

from captioner.errors import UserError
from captioner.images.views import ViewSpec, normalise
from captioner.model.encoders import Encoder
from captioner.model.network import DecoderKind, ModelConfig, build_model
from captioner.streaming import StreamingLoader
from captioner.streaming.dataset import read_split
from captioner.vocabulary import END, PAD, SPECIAL_WORDS, START, Vocabulary, count_words, tokenize
from captioner.workers import count_processors
from contenders import CAPTION_STEPS, NUM_WORDS
from contenders.loader import loader_options
from contenders.pictures import CAPTIONS, CROP, MEAN, SHARDS, STD, find_vocabulary
from measuring.commands import pack_samples, shard_megabytes, stored_photos
from measuring.figures import Contender, Cost
from measuring.photos import SIZE, make_captions
from train.data.batches import PINNED_FOR, CaptionBatch, caption_loader
from train.data.features import FeatureFiles
from train.run.encode import prepare_features
from train.settings import NEW_MODEL, TrainSettings
from train.step.schedule import make_optimizer, make_schedule
from train.step.self_critical import NUM_SAMPLES, SelfCriticalStep, make_reward
from train.step.step import ENCODE_BATCH_SIZE, MAX_GRADIENT_NORM, CaptionLoss, TrainStep, distribute

CAPTIONS_A_PICTURE = 5
WARM_UP_SAMPLES = 2
DEFAULTS = TrainSettings()
WIDTHS = TrainSettings(**NEW_MODEL).model_config(0)
Precision = Literal["no", "bf16"]  # Accelerate's names


# ---- the samples ------------------------------------------------------------------------------------------


def read_captions(file: Path) -> list[list[str]]:
    """The captions of each image of a COCO file. Raises UserError."""
    of_picture: dict[Any, list[str]] = {}
    try:
        data = file.read_bytes()
        content = json.loads(gzip.decompress(data) if file.suffix == ".gz" else data)
        for row in content["annotations"]:
            of_picture.setdefault(row["image_id"], []).append(row["caption"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read --captions {file} ({error!r}): give captions in COCO's JSON format") from error
    whole = [captions for captions in of_picture.values() if len(captions) >= CAPTIONS_A_PICTURE]
    if not whole:
        raise UserError(f"--captions {file} has no image with {CAPTIONS_A_PICTURE} captions: give COCO's")
    return [captions[:CAPTIONS_A_PICTURE] for captions in whole]


def pack(
    originals: Sequence[Path], captions: Sequence[Sequence[str]] | None, folder: Path, *, num_samples: int
) -> None:
    """Pack `num_samples` samples and their vocabulary with the packing command. Raises UserError."""
    paths = stored_photos(originals, folder, count=num_samples)
    chosen = [captions[n % len(captions)] if captions else make_captions(n) for n in range(num_samples)]
    file, words = folder / "captions.jsonl", folder / "words.json"
    rows = [{"path": path.name, "captions": texts} for path, texts in zip(paths, chosen, strict=True)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words.write_text(make_vocabulary(chosen).to_json())
    pack_samples(
        paths[0].parent,
        file,
        folder / SHARDS,
        vocabulary=words,
        workers=1 if num_samples < 1000 else count_processors(),
        shard_megabytes=shard_megabytes(num_samples, shards=16),
    )


def make_vocabulary(captions: Sequence[Sequence[str]]) -> Vocabulary:
    """The captions' words, most frequent first, filled up to NUM_WORDS with made-up ones."""
    found = Vocabulary.from_counts(count_words(tokenize(text) for texts in captions for text in texts), threshold=1)
    fillers = tuple(f"<filler-{number}>" for number in range(NUM_WORDS))
    words, counts = (found.words + fillers)[:NUM_WORDS], (found.counts + (0,) * NUM_WORDS)[:NUM_WORDS]
    return replace(found, words=words, counts=counts)


# ---- the book's loop --------------------------------------------------------------------------------------


class BookCaptions(Dataset[tuple[Tensor, list[int]]]):
    """One caption a sample: its image, decoded from a loose file each time, and its token ids."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "loose"
        captions_of: dict[str, list[str]] = json.loads((self.folder / CAPTIONS).read_text())
        self.samples = [(name, caption) for name, captions in captions_of.items() for caption in captions]
        self.vocabulary = find_vocabulary(folder / SHARDS)
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
        last = [END] if len(ids) <= DEFAULTS.max_tokens else []
        return image_3PP, [START, *ids[: DEFAULTS.max_tokens], *last]


def collate_captions(samples: list[tuple[Tensor, list[int]]]) -> tuple[Tensor, Tensor, list[int]]:
    """Images (B, 3, P, P), padded token ids (B, T), longest first, and their lengths."""
    samples.sort(key=lambda sample: len(sample[1]), reverse=True)
    lengths = [len(ids) for _, ids in samples]
    tokens_BT = torch.full((len(samples), lengths[0]), PAD)
    for row_T, (_, ids) in zip(tokens_BT, samples, strict=True):
        row_T[: len(ids)] = torch.tensor(ids)
    return torch.stack([image for image, _ in samples]), tokens_BT, lengths


class BookModel(nn.Module):
    """The book's encoder and decoder for B images with a caption each, with torchvision's memory layout."""

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
    """`steps` steps of the book's loop on randomly drawn samples."""
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
    decoder: DecoderKind = "vector"


class Trainer:
    """The parts of train/main.py, with a new model whose random weights are the same in each turn."""

    def __init__(self, job: Job) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)  # otherwise a process has only one precision
        self.accelerator = Accelerator(cpu=job.on_cpu, mixed_precision=job.precision)
        self.split = read_split([str(job.folder / SHARDS)], "train", remedy="pack again")
        self.batch = job.batch
        self.vocabulary = find_vocabulary(job.folder / SHARDS)
        config = ModelConfig(
            encoder=job.encoder,
            vocabulary_size=len(self.vocabulary),
            decoder=job.decoder,
            dropout=DEFAULTS.dropout,
        )
        torch.manual_seed(0)
        self.model = build_model(config)
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
            vocabulary=self.vocabulary,
            crop=CROP,
            max_tokens=DEFAULTS.max_tokens,
            num_workers=job.workers,
            cache=self.cache,
            pin_memory=self.accelerator.device.type in PINNED_FOR,
        )

    def features(self) -> FeatureFiles:
        """The cached features, computed if they do not exist yet."""
        found = prepare_features(
            [self.split],
            loss_model=self.loss_model,
            open_loader=self.open_loader,
            cache=self.cache,
            accelerator=self.accelerator,
        )
        return found[self.split.name]

    def epoch(self, number: int, features: FeatureFiles | None, *, steps: int | None = None) -> StreamingLoader:
        """A loader of random crops, or of cached features, at the beginning of an epoch or at its last `steps`."""
        loader = self.open_loader(self.split, training=True, features=features)
        first = 0 if steps is None else max(0, len(loader) - steps)
        loader.set_epoch(number)
        loader.load_state_dict(loader.state_dict() | {"position": first * loader.batch_size})
        return loader

    def batch_of(
        self, num_samples: int, features: FeatureFiles | None = None, *, encoded: bool = False
    ) -> CaptionBatch:
        """A batch on the device: of images, of cached features, or of images that are encoded now."""
        loader = self.open_loader(self.split, batch_size=num_samples, num_workers=0, features=features)
        (batch,) = next(iter(loader))
        batch = batch.to(self.accelerator.device)
        if not encoded:
            return batch
        with torch.no_grad(), self.accelerator.autocast():
            parts = [self.loss_model.features(images) for images in batch.inputs.split(ENCODE_BATCH_SIZE)]
        return replace(batch, inputs=torch.cat(parts).float())

    @property
    def take_step(self) -> TrainStep:
        """The training command's step, with the optimizer and schedule of now."""
        return TrainStep(self.wrapped, self.optimizer, self.schedule, self.accelerator)

    def step(self, batch: CaptionBatch) -> None:
        """A training step on images or features."""
        self.take_step([batch])

    @cached_property
    def self_critical(self) -> SelfCriticalStep:
        """The training command's self-critical step; samples stop at the mean length, as random weights do not end
        them.
        """
        step = self.take_step
        return SelfCriticalStep(
            step.model,
            step.optimizer,
            step.schedule,
            step.accelerator,
            reward=make_reward(self.split, self.accelerator, cache=self.cache),
            vocabulary=self.vocabulary,
            max_tokens=CAPTION_STEPS,
            seed=0,
            epoch_steps=1,
            first_step=0,
        )

    def self_critical_step(self, batch: CaptionBatch) -> None:
        """A self-critical step on images or features."""
        self.self_critical([batch])

    def reward(self, batch: CaptionBatch) -> None:
        """The rewards of a self-critical step, of random samples."""
        shape = (NUM_SAMPLES * batch.num_samples, CAPTION_STEPS)
        samples = np.random.default_rng(0).integers(len(SPECIAL_WORDS), len(self.vocabulary), shape)
        self.self_critical._rewards(batch, samples.tolist())

    def encode(self, batch: CaptionBatch) -> None:
        """The encoder's part of a step."""
        with torch.no_grad(), self.accelerator.autocast():
            self.model.encoder(normalise(batch.inputs, self.loss_model.view))

    def padded_step(self, batch: CaptionBatch) -> None:
        """A step on features with padding: LSTM and logits cover all positions up to the longest caption."""
        captions, model = batch.captions, self.model
        inputs_TN, targets_TN = (
            pad_packed_sequence(PackedSequence(tokens_M, captions.batch_sizes_T), padding_value=PAD)[0]
            for tokens_M in (captions.inputs_M, captions.targets_M)
        )
        state = model.start(model.encode(batch.inputs), captions.image_of_caption_N, 1)
        lstm = tuple(tensor_NH[None] for tensor_NH in state.lstm)
        hidden_TNH, _ = model.lstm(model.drop(model.embed(inputs_TN)), lstm)
        logits_MV = model.predict(model.drop(hidden_TNH)).flatten(0, 1)
        self.accelerator.backward(cross_entropy(logits_MV, targets_TN.flatten(), ignore_index=PAD))
        self.accelerator.clip_grad_norm_(self.loss_model.parameters(), MAX_GRADIENT_NORM)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()


def train_epoch(job: Job, *, steps: int, cached: bool = False) -> Contender:
    """Train on the last `steps` steps of an epoch."""

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
    job: Job, action: Callable[[Trainer, CaptionBatch], None], *, times: int = 1, encoded: bool
) -> Contender:
    """Repeat a part of a step `times` times on one batch of images, or of their features, on the device."""
    first = Trainer(job)  # all have the same encoder
    small, batch = (first.batch_of(size, encoded=encoded) for size in (WARM_UP_SAMPLES, job.batch))

    def turn(_number: int) -> Cost:
        trainer = Trainer(job)
        action(trainer, small)

        def repeat() -> int:
            for _ in range(times):
                action(trainer, batch)
            return times * num_captions_of(batch)

        return time_all(repeat)

    return turn


def num_captions_of(batch: CaptionBatch) -> int:
    """The number of captions of all its images."""
    return len(batch.captions.image_of_caption_N)


def time_all(action: Callable[[], int]) -> Cost:
    """The cost of `action`, which returns its number of items, in this process and in children that it started and
    ended.
    """
    gc.collect()
    wait_for_gpu()
    wall, cpu = time.perf_counter(), cpu_seconds()
    items = action()
    wait_for_gpu()
    return Cost(items=items, cpu_seconds=cpu_seconds() - cpu, wall_seconds=time.perf_counter() - wall)


def cpu_seconds() -> float:
    """The CPU time of this process, and of its children that have ended, which is known to 10 ms."""
    return time.process_time() + sum(os.times()[2:4])


def wait_for_gpu() -> None:
    """Wait until the GPU has finished, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
