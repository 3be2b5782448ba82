"""The optimizer's parameter groups, and their learning rates step by step."""

import math
from collections.abc import Callable
from functools import partial

from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from captioner.model.network import CaptionModel
from train.settings import Schedule

WARMUP_FRACTION = 0.05


def make_optimizer(model: CaptionModel, learning_rate: float, *, encoder_learning_rate: float) -> Adam:
    """Adam over the trained parameters, in one or two groups: the decoder's, and the encoder's."""
    encoder = [p for p in model.encoder.parameters() if p.requires_grad]
    known = set(map(id, model.encoder.parameters()))
    groups = [{"params": [p for p in model.parameters() if id(p) not in known], "lr": learning_rate}]
    if encoder:
        groups.append({"params": encoder, "lr": encoder_learning_rate})
    return Adam(groups, fused=True)


def make_schedule(
    optimizer: Optimizer,
    kind: Schedule,
    *,
    total_steps: int,
    encoder_from_step: int = 0,
    factor_after: float = 0.0,
    steps_after: int = 0,
) -> LambdaLR:
    """A linear warm-up of each group over the first 5 % of its steps, then as `kind` says.

    The second group, the encoder's, starts `encoder_from_step` steps later; until then its rate is 0. After
    `total_steps` all rates start again at their peaks times `factor_after`, and fall to 0 in `steps_after` steps.
    """
    starts = (0, encoder_from_step)[: len(optimizer.param_groups)]

    def factor(step: int, *, first_step: int) -> float:
        if step < total_steps or not steps_after:
            return rate_factor(step, kind=kind, first_step=first_step, total_steps=total_steps)
        return factor_after * max(0.0, 1 - (step - total_steps) / steps_after)

    factors: list[Callable[[int], float]] = [partial(factor, first_step=first) for first in starts]
    return LambdaLR(optimizer, factors)


def rate_factor(step: int, *, kind: Schedule, first_step: int, total_steps: int) -> float:
    """The learning rate at `step` (from 0) divided by its peak, in 0..1; 0 before `first_step`."""
    done, steps = step - first_step, total_steps - first_step
    warmup_steps = max(1, round(WARMUP_FRACTION * steps))
    if done < 0:
        return 0.0
    if done < warmup_steps:
        return (done + 1) / warmup_steps
    if kind == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (done - warmup_steps) / max(1, steps - warmup_steps))))


def set_encoder_trainable(model: CaptionModel, trainable: bool) -> None:
    """Train the encoder from now on, or keep it frozen, its batch norm included."""
    if model.encoder.trainable != trainable:  # called at every step, and `train` walks through the encoder
        model.encoder.trainable = trainable
        model.encoder.train(model.training)
