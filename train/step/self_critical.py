"""Self-critical training: captions drawn from the model are made likelier the better they score (CIDEr-D).

Rennie et al. (CVPR 2017), with the baseline of "a better variant of self-critical sequence training" (Luo, 2020): the
mean score of the image's other samples. `<end>` is a token that is scored, so that captions are not cut short of their
last word. Dropout is off, in sampling and in the gradient; batch norm keeps its statistics.

Shapes: B images, S samples of an image, T tokens of the longest sample.
"""

from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from captioner.metrics import CiderReward, Ngram, document_frequency
from captioner.model.captions import PackedCaptions
from captioner.model.decoding import sample
from captioner.samples import CaptionedFields
from captioner.shards.splitmix import random_bits
from captioner.streaming import StreamingLoader
from captioner.streaming.dataset import Split
from captioner.vocabulary import END, SPECIAL_WORDS, Vocabulary, tokenize
from train.data.batches import CaptionBatch, CaptionPipeline
from train.step.step import CaptionLoss, TrainStep

NUM_SAMPLES = 5
TEMPERATURE = 0.5  # near what beam search finds: captions improve with smaller changes of the model than at 1
COUNTED_AT_ONCE = 256  # images of a rank
SAMPLED_CAPTIONS = 16  # its own stream of random numbers
END_WORD = SPECIAL_WORDS[END]


def make_reward(split: Split, accelerator: Accelerator, **options: Any) -> CiderReward:
    """The score of captions, its document frequencies counted by all ranks together in the split's captions.

    `options` are those of StreamingLoader. All ranks must call it.
    """
    with closing(
        StreamingLoader(
            split,
            split=split.name,
            batch_size=COUNTED_AT_ONCE * accelerator.num_processes,
            shuffle=False,
            fields=CaptionedFields(images=False, captions=True),
            decode=CaptionPipeline.parse,
            transform=_references,
            collate=list,
            **options,
        )
    ) as loader:
        own = document_frequency(chain.from_iterable(loader))
    frequency: Counter[Ngram] = Counter()
    for part in gather_object([own]):
        frequency.update(part)
    return CiderReward(frequency, split.num_samples)


def _references(sample: dict[str, Any], _rng: object = None) -> list[list[str]]:
    return [with_end(caption) for caption in sample["__content__"]["captions"]]


def with_end(caption: str) -> list[str]:
    """The tokens of a reference, and its end."""
    return [*tokenize(caption), END_WORD]


@dataclass(frozen=True, kw_only=True)
class SelfCriticalStep(TrainStep):
    """An optimizer step on captions drawn from the model; its record is (sum of scores, samples, gradient norm).

    The samples depend on (`seed`, epoch, position) and the weights: the same ones on any number of ranks, up to
    rounding. Epochs have `epoch_steps` steps; the first step of this kind is the run's `first_step`-th.
    """

    quantity: ClassVar[str] = "reward"

    reward: CiderReward
    vocabulary: Vocabulary
    max_tokens: int
    seed: int
    epoch_steps: int
    first_step: int = 1

    def __call__(self, micro_batches: Sequence[CaptionBatch], step: int = 1) -> Tensor:
        """As `TrainStep`. The first step forgets Adam's moments: those of cross-entropy belong to other gradients."""
        if step == self.first_step:
            self.optimizer.state.clear()
        return super().__call__(micro_batches, step)

    def count(self, batch: CaptionBatch) -> int:
        """Samples drawn for the batch's images."""
        return NUM_SAMPLES * batch.num_samples

    def objective(self, batch: CaptionBatch, step: int) -> tuple[Tensor, Tensor]:
        """The samples' negative log-probabilities times their advantages, and their scores, each summed."""
        loss_model = self.loss_model
        _turn_noise_off(loss_model)
        on_device = batch.to(self.accelerator.device)
        with torch.no_grad(), self.accelerator.autocast():
            features = loss_model.features(on_device.inputs)
        with torch.no_grad():
            images = loss_model.model.encode(features.float())
        uniform_BST = self._uniform(batch, len(images), epoch=(step - 1) // self.epoch_steps)
        samples = sample(loss_model.model, images, torch.from_numpy(uniform_BST).to(images), temperature=TEMPERATURE)
        rewards_BS = self._rewards(batch, samples)
        advantages_BS = (rewards_BS - rewards_BS.mean(axis=1, keepdims=True)) * (NUM_SAMPLES / (NUM_SAMPLES - 1))
        captions = pack_samples(samples, advantages_BS, max_tokens=self.max_tokens)
        captions = captions.map(lambda tensor: tensor.to(images.device))
        encoder_learns = loss_model.model.encoder.trainable
        objective, _ = self.model(on_device.inputs if encoder_learns else features, captions)
        return objective, torch.tensor(rewards_BS.sum(), dtype=torch.float32, device=images.device)

    def _uniform(self, batch: CaptionBatch, num_rows: int, *, epoch: int) -> np.ndarray:
        """Numbers in [0, 1) for the tokens of the samples (B, S, T), functions of the images' positions."""
        shape = (NUM_SAMPLES, self.max_tokens)
        positions = np.array(batch.positions or [0] * num_rows, dtype=np.int64)[:, None]  # a filler has no position
        counters = positions * (shape[0] * shape[1]) + np.arange(shape[0] * shape[1])
        bits = random_bits(counters, self.seed, epoch, SAMPLED_CAPTIONS)
        # 24 bits are what float32 holds: with more, a number could be rounded to 1.
        return ((bits >> np.uint64(40)) / 2.0**24).astype(np.float32).reshape(-1, *shape)

    def _rewards(self, batch: CaptionBatch, samples: list[list[int]]) -> np.ndarray:
        """The scores (B, S) of the samples; zeros for a filler."""
        words = self.vocabulary.words
        rewards_BS = np.zeros((len(samples) // NUM_SAMPLES, NUM_SAMPLES))
        for row, references in enumerate(batch.references):
            own = samples[row * NUM_SAMPLES : (row + 1) * NUM_SAMPLES]
            candidates = [[words[token] for token in tokens] for tokens in own]
            rewards_BS[row] = self.reward(candidates, [with_end(caption) for caption in references])
        return rewards_BS


def pack_samples(samples: list[list[int]], advantages_BS: np.ndarray, *, max_tokens: int) -> PackedCaptions:
    """The samples packed, each token with its sample's advantage as its weight."""
    num_images, num_samples = advantages_BS.shape
    # A sample without `<end>` has `max_tokens` tokens; with one more, packing cuts it where sampling did.
    captions = [tokens[:-1] if tokens[-1] == END else [*tokens, END] for tokens in samples]
    return PackedCaptions.pack(
        list(chain.from_iterable(captions)),
        list(map(len, captions)),
        [num_samples] * num_images,
        max_tokens=max_tokens,
        weights=advantages_BS.astype(np.float32).flatten(),
    )


def _turn_noise_off(loss_model: CaptionLoss) -> None:
    """Eval mode, except for the LSTM, which cuDNN differentiates in training mode only."""
    lstm = loss_model.model.lstm
    if loss_model.training or not lstm.training:
        loss_model.eval()
        lstm.train()
