"""One optimizer step: the loss over the target tokens of all ranks and parts, its gradients, the update.

Shapes: B images, M target tokens, H hidden width, V vocabulary.
"""

import hashlib
import math
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from captioner.errors import UserError
from captioner.images.views import ViewSpec, normalise
from captioner.model.network import CaptionModel, PackedCaptions
from train.data.batches import PINNED_FOR, Batch
from train.step.batch_norm import counting_rows, synchronise_batch_norm
from train.step.loss import linear_cross_entropy
from train.step.schedule import is_frozen, let_encoder_learn

MAX_GRADIENT_NORM = 5.0


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
        """exp of the mean cross-entropy, at most the greatest number a float holds, so that JSON can hold it too."""
        return math.exp(self.per_token) if self.per_token < 700 else sys.float_info.max

    def __str__(self) -> str:
        perplexity = f"{self.perplexity:.2f}" if self.perplexity < 1e6 else f"{self.perplexity:.1e}"
        return f"loss {self.per_token:.3f}, perplexity {perplexity}"


class CaptionLoss(nn.Module):
    """The model with its loss: what data-parallel training wraps, so that the logits need never be held whole.

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
        self.guessed_share = 0.0
        self._learns = not is_frozen(model.encoder)

    def enter_step(self, step: int) -> None:
        """Before step `step` (from 1): an encoder to be trained learns from `thaw_step` on, guesses grow more."""
        self.guessed_share = self.scheduled_sampling * step / self.total_steps
        if self._learns:
            let_encoder_learn(self.model, learning=step > self.thaw_step)

    def features(self, inputs: Tensor) -> Tensor:
        """The encoder's features (B, F) of uint8 views; cached features are passed on."""
        return inputs if inputs.dim() == 2 else self.model.encoder(normalise(inputs, self.view))

    def forward(self, inputs: Tensor, captions: PackedCaptions) -> tuple[Tensor, Tensor]:
        """(what is minimised, plain cross-entropy), each summed over the tokens, of uint8 views or cached features.

        In training labels are smoothed, and some input words replaced by the model's own guesses.
        """
        model = self.model
        image_BE = model.encode(self.features(inputs))
        if self.training and self.guessed_share:
            captions = with_guesses(model, image_BE, captions, share=self.guessed_share)
        hidden_MH = model.hidden(image_BE, captions)
        smoothing = self.label_smoothing if self.training else 0.0
        weight_VH, bias_V = model.predict.weight, model.predict.bias
        return linear_cross_entropy(hidden_MH, weight_VH, bias_V, captions.targets_M, label_smoothing=smoothing)


@torch.no_grad()
def with_guesses(model: CaptionModel, image_BE: Tensor, captions: PackedCaptions, *, share: float) -> PackedCaptions:
    """The captions with a share of their input words drawn from what the model, reading the true ones, predicts.

    Scheduled sampling (Bengio et al., NeurIPS 2015) in two passes over all words at once, as Mihaylova and Martins (ACL
    2019) and Duckworth et al. (2019) run it in parallel.
    """
    sizes_T = captions.batch_sizes_T
    first, num_inputs = int(sizes_T[0]), len(captions.inputs_M)
    # Rows are time-major, so the word before row m is that of row m - (captions alive one step earlier).
    before_M = torch.arange(first, num_inputs) - sizes_T[:-1].repeat_interleave(sizes_T[1:])
    replaced = (torch.rand(num_inputs - first) < share).nonzero()[:, 0]
    if not len(replaced):
        return captions
    before, after = (_to_device(rows, image_BE.device) for rows in (before_M[replaced], replaced + first))
    logits_RV = model.predict(model.hidden(image_BE, captions)[before]).float()
    # The greatest of logits with Gumbel noise is a draw from their softmax; `multinomial` would wait, and refuse NaN.
    guesses_R = (logits_RV - torch.empty_like(logits_RV).exponential_().log_()).argmax(dim=1)
    inputs_M = captions.inputs_M.clone()
    inputs_M[after] = guesses_R
    return replace(captions, inputs_M=inputs_M)


def _to_device(rows: Tensor, device: torch.device) -> Tensor:
    """Rows' numbers on `device`, on a GPU without waiting for what it was given before."""
    return rows.pin_memory().to(device, non_blocking=True) if device.type in PINNED_FOR else rows.to(device)


def distribute(loss_model: CaptionLoss, optimizer: Optimizer, accelerator: Accelerator) -> tuple[nn.Module, Optimizer]:
    """What `train_step` wants of both: all ranks start with rank 0's weights, and average their gradients.

    Buffers are copied to the other ranks once and not, as by default, in each forward: batch norm keeps them equal.
    """
    wrapped, optimizer = accelerator.prepare(loss_model, optimizer)
    wrapped.broadcast_buffers = False
    return wrapped, optimizer


def train_step(
    loss_model: nn.Module,
    parts: Sequence[Batch],
    step: int = 1,
    *,
    optimizer: Optimizer,
    schedule: LRScheduler,
    accelerator: Accelerator,
) -> Tensor:
    """Forward and backward of this rank's parts of a global batch, then the update; the run's `step`-th, from 1.

    Gradients are those of the mean over the target tokens of *all* parts of *all* ranks: each divides its own sum by
    the global count, and multiplies by W, since data-parallel training averages gradients over the W ranks. Returns,
    on the device, this rank's (cross-entropy sum, target tokens) and the norm of the whole gradient.
    """
    cast(CaptionLoss, getattr(loss_model, "module", loss_model)).enter_step(step)
    count = float(sum(part.num_targets for part in parts))
    num_own = torch.full((), count, device=accelerator.device)  # torch.tensor would wait for the device
    num_targets = accelerator.reduce(num_own.clone(), reduction="sum")
    total = torch.zeros_like(num_own)
    for place, part in enumerate(parts, start=1):
        sync = nullcontext() if place == len(parts) else accelerator.no_sync(loss_model)
        with sync, counting_rows(loss_model, part.num_samples):
            batch = part.to(accelerator.device)
            objective, cross_entropy = loss_model(batch.inputs, batch.captions)
            counts = float(part.num_samples > 0)
            accelerator.backward(objective * (counts * accelerator.num_processes) / num_targets.clamp(min=1))
            total += cross_entropy.detach() * counts
    norm = accelerator.clip_grad_norm_(loss_model.parameters(), MAX_GRADIENT_NORM)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    return torch.stack((total, num_own, cast(Tensor, norm)))


def check_finite(records_S3: Tensor, *, last_step: int, scaled: bool) -> None:
    """Raise UserError naming the first step whose loss, or gradient unless it is `scaled` (fp16), is not a number.

    `records_S3` are `train_step`'s results of the S steps up to `last_step`, on the CPU.
    """
    what = {0: "loss", 2: "gradient"} if not scaled else {0: "loss"}
    for step, record in enumerate(records_S3.tolist(), start=last_step - len(records_S3) + 1):
        for column, name in what.items():
            if not math.isfinite(record[column]):
                raise UserError(
                    f"the {name} of step {step:,} is {record[column]}: lower --learning-rate and give another --output "
                    "(the checkpoints before it are whole), or look at the samples of that step"
                )


def check_same_weights(model: nn.Module, accelerator: Accelerator) -> None:
    """Raise RuntimeError unless every rank holds bit-identical parameters and buffers. All ranks must call it."""
    if accelerator.num_processes == 1:
        return
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    digests = gather_object([digest.hexdigest()])
    if len(set(digests)) > 1:
        raise RuntimeError(f"the ranks hold different weights: {digests}")
