"""The validation split: its loss, generated captions, and how they score; exact on any number of processes."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import chain

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from captioner.attention import Attention
from captioner.errors import UserError
from captioner.metrics import References
from captioner.model.bundle import DecodingDefaults
from captioner.model.decoding import decode
from captioner.streaming import Ledger, StreamingLoader
from captioner.streaming.dataset import Split
from captioner.vocabulary import Vocabulary
from train.barriers import on_main_rank
from train.data.batches import CaptionBatch
from train.evaluation.bootstrap import with_intervals
from train.evaluation.predictions import ValidationCaption
from train.evaluation.scoring import caption_metrics
from train.step.step import CaptionLoss, StepLoss

NUM_SAMPLES = 8  # images whose captions are shown as they change


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """The result of an evaluation; `metrics` are the loss and those of `caption_metrics`, by name."""

    captions: list[ValidationCaption]
    metrics: dict[str, float]
    ledger: Ledger
    seconds: float

    def curves(self) -> dict[str, float]:
        """The metrics by the names of the curves; intervals have none."""
        values = with_intervals(self.metrics)
        return {f"validation/{name.removeprefix('validation_')}": value for name, (value, _) in values.items()}

    def __str__(self) -> str:
        scores = ", ".join(f"{name} {self.metrics[name]:.4f}" for name in ("cider", "bleu4"))
        return f"loss {self.metrics['validation_loss']:.3f}, {scores}, {self.seconds:.1f} s"


@dataclass(kw_only=True)
class Evaluator:
    """Evaluates a model on one split, any number of times; its references are tokenized once.

    `open_loader` opens a loader of the split, with centre crops or cached features. All ranks must call each method,
    except for `sample_captions`.
    """

    split: Split
    loss_model: CaptionLoss
    open_loader: Callable[..., StreamingLoader]
    decoding: DecodingDefaults
    vocabulary: Vocabulary
    accelerator: Accelerator
    _references: References | None = field(init=False, default=None)
    _positions: list[int] = field(init=False, default_factory=list)

    @cached_property
    def _loader(self) -> StreamingLoader:
        """Its workers are started once: a fork in the middle of a run is a risk."""
        return self.open_loader(self.split)

    @torch.no_grad()
    def caption_split(self) -> tuple[dict[str, float], list[ValidationCaption], Ledger]:
        """Loss and perplexity, and the captions in the split's order, the same on every rank; and this rank's ledger.

        Each image is decoded and encoded once for both. Captions are generated in float32 as outside of training,
        whatever the precision of training: confidence is calibrated on their scores. Raises UserError for a loss that
        is not finite, and where no sample can be used.
        """
        loss_model, was_training = self.loss_model, self.loss_model.training
        loss_model.eval()
        loss_sum, num_targets = 0.0, 0
        rows: list[ValidationCaption] = []
        for batch in chain.from_iterable(self._loader):
            if not batch.num_samples:
                continue
            on_device = batch.to(self.accelerator.device)
            with self.accelerator.autocast():
                features = loss_model.features(on_device.inputs)
                _, cross_entropy = loss_model(features, on_device.captions)
            loss_sum, num_targets = loss_sum + float(cross_entropy), num_targets + batch.num_targets
            rows += self._caption(batch, features.float())
        loss_model.train(was_training)
        loss_sums, nums_targets = zip(*gather_object([(loss_sum, num_targets)]), strict=True)
        loss = StepLoss(sum(loss_sums), sum(nums_targets))
        if not math.isfinite(loss.loss_sum):
            raise UserError(
                f"the loss of the evaluated split is {loss.loss_sum}: this model is of no use, train again with a "
                "smaller learning rate"
            )
        rows = sorted(gather_object(rows), key=lambda row: row.position)
        ledger = self._loader.ledger
        if not rows:
            raise UserError(f"none of the {self.split.num_samples:,} {self.split.name} samples can be used: {ledger}")
        return {"validation_loss": loss.per_token, "validation_perplexity": loss.perplexity}, rows, ledger

    def _caption(self, batch: CaptionBatch, features: Tensor) -> list[ValidationCaption]:
        model = self.loss_model.model
        is_shown = min(batch.positions) < NUM_SAMPLES
        captions = decode(model, model.encode(features), with_attention=is_shown, **asdict(self.decoding))
        columns = zip(batch.positions, batch.image_ids, batch.references, captions, strict=True)
        return [
            ValidationCaption(
                position=position,
                image_id=image_id,
                caption=self.vocabulary.decode(caption.tokens),
                score=caption.score,
                references=references,
                attention=Attention.of(caption, vocabulary=self.vocabulary, grid=self._grid) if is_shown else None,
            )
            for position, image_id, references, caption in columns
        ]

    @cached_property
    def _grid(self) -> tuple[int, int]:
        return self.loss_model.model.encoder.grid_shape(self.loss_model.view.crop)

    def evaluate(self) -> Evaluation:
        """Loss, captions and scores of the whole split, the same on every rank. Raises UserError."""
        started = time.monotonic()
        losses, rows, ledger = self.caption_split()
        metrics = {**losses, **on_main_rank(lambda: self._score(rows))}
        return Evaluation(captions=rows, metrics=metrics, ledger=ledger, seconds=time.monotonic() - started)

    def _score(self, rows: list[ValidationCaption]) -> dict[str, float]:
        """The metrics of the captions, by name."""
        positions = [row.position for row in rows]
        if self._references is None or positions != self._positions:  # other bad samples were skipped before
            self._references = References({row.position: row.references for row in rows})
            self._positions = positions
        captions = {row.position: row.caption for row in rows}
        return caption_metrics(self._references.image_scores(captions), captions)

    def sample_captions(self, found: Evaluation) -> tuple[list[np.ndarray], list[str], list[Attention | None]]:
        """The split's first images, uint8 (P, P, 3), their captions and attention. In this process alone."""
        rows = [row for row in found.captions if row.position in self._sample_images]
        images = [self._sample_images[row.position] for row in rows]
        return images, [row.caption for row in rows], [row.attention for row in rows]

    @cached_property
    def _sample_images(self) -> dict[int, np.ndarray]:
        loader = self.open_loader(
            self.split,
            batch_size=min(NUM_SAMPLES, self.split.num_samples),
            rank=0,
            world_size=1,
            accumulation_steps=1,
            num_workers=0,
            features=None,
        )
        (batch,) = next(iter(loader))
        return dict(zip(batch.positions, batch.inputs.numpy().copy(), strict=False))
