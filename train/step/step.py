"""One optimizer step: the loss over the target tokens of all ranks and micro-batches, its gradients, the update.

Shapes: B images, M target tokens, H hidden width, V vocabulary.
"""

import hashlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from captioner.errors import UserError
from captioner.images.views import ViewSpec, normalise
from captioner.model.captions import PackedCaptions
from captioner.model.network import CaptionModel
from captioner.streaming import StreamingLoader
from captioner.streaming.dataset import Split
from train.data.batches import PINNED_FOR, CaptionBatch
from train.step.batch_norm import counting_rows, synchronise_batch_norm
from train.step.loss import linear_cross_entropy
from train.step.schedule import set_encoder_trainable

MAX_GRADIENT_NORM = 5.0
ENCODE_BATCH_SIZE = 64  # images of a rank


@dataclass(frozen=True, slots=True)
class StepLoss:
    """Summed cross-entropy (natural log) and number of target tokens, over all ranks."""

    loss_sum: float
    num_targets: int

    @property
    def per_token(self) -> float:
        """Mean cross-entropy of a target token."""
        return self.loss_sum / max(1, self.num_targets)

    @property
    def perplexity(self) -> float:
        """exp of the mean cross-entropy, at most the largest float, so that JSON can hold it."""
        return math.exp(self.per_token) if self.per_token < 700 else sys.float_info.max

    def __str__(self) -> str:
        perplexity = f"{self.perplexity:.2f}" if self.perplexity < 1e6 else f"{self.perplexity:.1e}"
        return f"loss {self.per_token:.3f}, perplexity {perplexity}"


class CaptionLoss(nn.Module):
    """The model with its loss, as data-parallel training wraps it: the logits are never held whole.

    The model's batch norm becomes that of the global batch.
    """

    def __init__(
        self,
        model: CaptionModel,
        *,
        view: ViewSpec,
        label_smoothing: float = 0.0,
        scheduled_sampling: float = 0.0,
        total_steps: int = 1,
        thaw_step: int = 0,
    ) -> None:
        super().__init__()
        synchronise_batch_norm(model)
        self.model = model
        self.view = view
        self.label_smoothing = label_smoothing
        self.scheduled_sampling = scheduled_sampling
        self.total_steps = total_steps
        self.thaw_step = thaw_step
        self.sampled_fraction = 0.0
        self._trains_encoder = any(parameter.requires_grad for parameter in model.encoder.parameters())

    def enter_step(self, step: int) -> None:
        """Prepare for step `step` (from 1): train the encoder after `thaw_step`, sample more input words."""
        self.sampled_fraction = self.scheduled_sampling * step / max(1, self.total_steps)
        if self._trains_encoder:
            set_encoder_trainable(self.model, step > self.thaw_step)

    def features(self, inputs: Tensor) -> Tensor:
        """The encoder's features of uint8 views; cached features are returned as they are."""
        return self.model.encoder(normalise(inputs, self.view)) if inputs.dim() == 4 else inputs.float()

    def forward(self, inputs: Tensor, captions: PackedCaptions) -> tuple[Tensor, Tensor]:
        """(objective, plain cross-entropy), each summed over the tokens, of uint8 views or cached features.

        The objective counts each token with its weight. In training labels are smoothed, and some input words replaced
        by the model's own predictions.
        """
        model = self.model
        images = model.encode(self.features(inputs))
        if self.training and self.sampled_fraction:
            captions = sample_inputs(model, images, captions, fraction=self.sampled_fraction)
        hidden_MH = model.hidden(images, captions)
        smoothing = self.label_smoothing if self.training else 0.0
        weight_VH, bias_V = model.predict.weight, model.predict.bias
        return linear_cross_entropy(
            hidden_MH,
            weight_VH,
            bias_V,
            captions.targets_M,
            label_smoothing=smoothing,
            token_weights_M=captions.weights_M,
        )


def encode_split(
    split: Split,
    *,
    loss_model: CaptionLoss,
    open_loader: Callable[..., StreamingLoader],
    accelerator: Accelerator,
    world_size: int,
    mirrored: bool = False,
    **options: Any,
) -> Iterator[tuple[int, np.ndarray]]:
    """The encoder's features of a split's images (or their mirror images), float32, each after the image's position.

    `open_loader` opens a loader of a split on `world_size` ranks, with these options.
    """
    batch_size = ENCODE_BATCH_SIZE * world_size
    with closing(
        open_loader(split, batch_size=batch_size, accumulation_steps=1, world_size=world_size, **options)
    ) as loader:
        for (batch,) in loader:
            with torch.no_grad(), accelerator.autocast():
                inputs = batch.to(accelerator.device).inputs
                features = loss_model.features(inputs.flip(2) if mirrored else inputs)
            yield from zip(batch.positions, features.float().cpu().numpy(), strict=False)  # without a filler's row


@torch.no_grad()
def sample_inputs(model: CaptionModel, images: Tensor, captions: PackedCaptions, *, fraction: float) -> PackedCaptions:
    """The captions with a fraction of their input words sampled from the model's predictions after the true ones.

    Scheduled sampling (Bengio et al., NeurIPS 2015) in two passes over all words at once, as Mihaylova and Martins (ACL
    2019) and Duckworth et al. (2019) run it in parallel.
    """
    sizes_T = captions.batch_sizes_T
    first, num_inputs = int(sizes_T[0]), len(captions.inputs_M)
    # Rows are time-major, so the word before row m is that of row m - (captions alive one step earlier).
    before_M = torch.arange(first, num_inputs) - sizes_T[:-1].repeat_interleave(sizes_T[1:])
    replaced = (torch.rand(num_inputs - first) < fraction).nonzero()[:, 0]
    if not len(replaced):
        return captions
    before, after = (_to_device(rows, images.device) for rows in (before_M[replaced], replaced + first))
    logits_RV = model.predict(model.hidden(images, captions)[before]).float()
    # The argmax of logits with Gumbel noise is a sample of their softmax; `multinomial` would wait, and refuse NaN.
    sampled_R = (logits_RV - torch.empty_like(logits_RV).exponential_().log_()).argmax(dim=1)
    inputs_M = captions.inputs_M.clone()
    inputs_M[after] = sampled_R
    return replace(captions, inputs_M=inputs_M)


def _to_device(rows: Tensor, device: torch.device) -> Tensor:
    """Row indices on `device`; on a GPU the copy is asynchronous."""
    return rows.pin_memory().to(device, non_blocking=True) if device.type in PINNED_FOR else rows.to(device)


def distribute(loss_model: CaptionLoss, optimizer: Optimizer, accelerator: Accelerator) -> tuple[nn.Module, Optimizer]:
    """Model and optimizer for a `TrainStep`: all ranks start with rank 0's weights, and average their gradients.

    Buffers are broadcast once and not, as by default, in each forward: batch norm keeps them equal.
    """
    wrapped, optimizer = accelerator.prepare(loss_model, optimizer)
    wrapped.broadcast_buffers = False
    return wrapped, optimizer


@dataclass(frozen=True)
class TrainStep:
    """An optimizer step; `model` and `optimizer` are those that `distribute` returned.

    The gradient is that of the mean of `objective` over what `count` counts in *all* micro-batches of *all* ranks: each
    divides its own sum by the global count, and multiplies by W, since data-parallel training averages gradients over
    the W ranks.
    """

    quantity: ClassVar[str] = "loss"  # what is recorded

    model: nn.Module
    optimizer: Optimizer
    schedule: LRScheduler
    accelerator: Accelerator

    @property
    def loss_model(self) -> CaptionLoss:
        """The model inside of data-parallel training's wrapper."""
        return cast(CaptionLoss, getattr(self.model, "module", self.model))

    def count(self, batch: CaptionBatch) -> int:
        """Target tokens of a micro-batch."""
        return batch.num_targets

    def objective(self, batch: CaptionBatch, step: int) -> tuple[Tensor, Tensor]:
        """(objective, cross-entropy), each summed over the micro-batch's target tokens, on the device."""
        on_device = batch.to(self.accelerator.device)
        return self.model(on_device.inputs, on_device.captions)

    def __call__(self, micro_batches: Sequence[CaptionBatch], step: int = 1) -> Tensor:
        """Forward and backward of this rank's micro-batches, then the update: the run's `step`-th, from 1.

        Returns, on the device, this rank's sum of what is recorded, its count, and the norm of the whole gradient.
        """
        model, accelerator = self.model, self.accelerator
        self.loss_model.enter_step(step)
        count = float(sum(map(self.count, micro_batches)))
        own_count = torch.full((), count, device=accelerator.device)  # torch.tensor would wait for the device
        global_count = accelerator.reduce(own_count.clone(), reduction="sum")
        total = torch.zeros_like(own_count)
        for number, batch in enumerate(micro_batches, start=1):
            sync = nullcontext() if number == len(micro_batches) else accelerator.no_sync(model)
            with sync, counting_rows(model, batch.num_samples):
                objective, recorded = self.objective(batch, step)
                weight = float(batch.num_samples > 0)  # 0 of a filler
                accelerator.backward(objective * (weight * accelerator.num_processes) / global_count.clamp(min=1))
                total += recorded.detach() * weight
        norm = accelerator.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return torch.stack((total, own_count, cast(Tensor, norm)))


def check_finite(records_S3: Tensor, *, last_step: int, scaled: bool) -> None:
    """Raise UserError naming the first step whose loss, or gradient unless it is `scaled` (fp16), is not finite.

    `records_S3` are `TrainStep`'s results of the S steps up to `last_step`, on the CPU.
    """
    columns = {0: "loss"} if scaled else {0: "loss", 2: "gradient"}
    for step, record in enumerate(records_S3.tolist(), start=last_step - len(records_S3) + 1):
        for column, name in columns.items():
            if not math.isfinite(record[column]):
                raise UserError(
                    f"the {name} of step {step:,} is {record[column]}: lower --learning-rate and give another --output "
                    "(the checkpoints before it are whole), or look at the samples of that step"
                )


def hash_weights(model: nn.Module, start: bytes = b"") -> str:
    """Hex sha256 of `start`, then of the name and content of each parameter and buffer."""
    digest = hashlib.sha256(start)
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def check_same_weights(model: nn.Module, accelerator: Accelerator) -> None:
    """Raise RuntimeError unless every rank holds bit-identical parameters and buffers. All ranks must call it."""
    if accelerator.num_processes == 1:
        return
    digests = gather_object([hash_weights(model)])
    if len(set(digests)) > 1:
        raise RuntimeError(f"the ranks hold different weights: {digests}")
