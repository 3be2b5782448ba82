"""One optimizer step: the loss over the target tokens of all ranks, its gradients, the learning rate."""

import hashlib
import math
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from captioner.views import ViewSpec, normalise
from train.stream import Batch

MAX_GRADIENT_NORM = 5.0
WARMUP_SHARE = 0.05


@dataclass(frozen=True, slots=True)
class StepLoss:
    """A global step's summed cross-entropy (natural log) and number of target tokens, over all ranks."""

    loss_sum: float
    num_targets: int

    @property
    def per_token(self) -> float:
        """Mean cross-entropy of a target token."""
        return self.loss_sum / max(1, self.num_targets)

    @property
    def perplexity(self) -> float:
        """exp of the mean cross-entropy; infinite where that is beyond a float."""
        return math.exp(self.per_token) if self.per_token < 700 else math.inf

    @classmethod
    def of(cls, totals: Tensor) -> "StepLoss":
        """From the pair (loss sum, target tokens) on a device."""
        loss_sum, num_targets = totals.tolist()
        return cls(loss_sum, int(num_targets))

    def __str__(self) -> str:
        return f"loss {self.per_token:.3f}, perplexity {self.perplexity:.2f}"


def batch_loss(model: nn.Module, batch: Batch, *, view: ViewSpec, accelerator: Accelerator) -> tuple[Tensor, Tensor]:
    """This rank's summed cross-entropy, and (sum, target tokens) over all ranks; a filler counts for nothing."""
    weight = float(batch.num_samples > 0)
    with accelerator.autocast():
        logits_MV = model(normalise(batch.views_BPP3, view), batch.captions)
    loss_sum = cross_entropy(logits_MV.float(), batch.captions.targets_M, reduction="sum") * weight
    num_targets = torch.tensor(len(logits_MV) * weight, device=loss_sum.device)
    return loss_sum, accelerator.reduce(torch.stack((loss_sum.detach(), num_targets)), reduction="sum")


def train_step(
    model: nn.Module,
    batch: Batch,
    *,
    view: ViewSpec,
    optimizer: Optimizer,
    schedule: LambdaLR,
    accelerator: Accelerator,
) -> Tensor:
    """Forward, backward, update. Returns (loss sum, target tokens) of the global batch, on the device.

    Gradients are those of the mean over the target tokens of *all* ranks: each rank divides its own sum by the
    global count, and by 1/W, since data-parallel training averages gradients over the W ranks.
    """
    loss_sum, totals = batch_loss(model, batch, view=view, accelerator=accelerator)
    accelerator.backward(loss_sum * accelerator.num_processes / totals[1])
    accelerator.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    return totals


def make_optimizer(model: nn.Module, *, learning_rate: float) -> Optimizer:
    """Adam over the parameters that are to be trained."""
    return torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=learning_rate, fused=True)


def make_schedule(optimizer: Optimizer, *, total_steps: int) -> LambdaLR:
    """A linear rise over the first 5 % of the steps, then a cosine down to zero."""
    warmup_steps = max(1, round(WARMUP_SHARE * total_steps))

    def share_of_peak(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))))

    return LambdaLR(optimizer, share_of_peak)


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


def average_buffers(model: nn.Module, accelerator: Accelerator) -> None:
    """Give every rank the mean of all ranks' batch-norm statistics, so that all hold the same model."""
    if accelerator.num_processes > 1:
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.copy_(accelerator.reduce(buffer, reduction="mean"))
