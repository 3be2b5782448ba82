"""The step's gradient is that of the mean over target tokens, on one rank and on several; fillers weigh nothing."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR

from captioner.model import CaptionModel, ModelConfig, PackedCaptions
from captioner.views import ViewSpec, normalise
from train.step import MAX_GRADIENT_NORM, StepLoss, batch_loss, make_optimizer, make_schedule, train_step
from train.stream import Batch

VIEW = ViewSpec(size=32, crop=32)
CAPTIONS = [[[4, 5, 6], [7]], [[9, 8, 7, 6, 5, 4]], [[5, 5], [8, 4, 9, 6, 7], [6]]]


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def make_model(*, trainable: bool = False) -> CaptionModel:
    torch.manual_seed(0)
    config = ModelConfig(encoder="small_cnn", vocabulary_size=10, embedding_size=6, hidden_size=7)
    return CaptionModel(config, encoder_trainable=trainable).train()


def make_batch(captions: Sequence[list[list[int]]], *, first_image: int = 0) -> Batch:
    """A batch of random views, image i always the same."""
    views = [
        torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(first_image + i))
        for i in range(len(captions))
    ]
    names = [str(first_image + i) for i in range(len(captions))]
    packed = PackedCaptions.pack(captions, max_tokens=20)
    positions = list(range(first_image, first_image + len(names)))
    return Batch(torch.stack(views), packed, positions, names, list(names), [["words"]] * len(names), 0, [])


def make_filler() -> Batch:
    views_BPP3 = torch.zeros((1, 32, 32, 3), dtype=torch.uint8)
    return Batch(views_BPP3, PackedCaptions.pack([[[]]], max_tokens=20), [], [], [], [], 0, [])


def mean_gradients(model: CaptionModel, batch: Batch) -> dict[str, Tensor]:
    """Gradients of the mean cross-entropy of all target tokens, by PyTorch alone."""
    logits_MV = model(normalise(batch.views_BPP3, VIEW), batch.captions)
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    loss = cross_entropy(logits_MV, batch.captions.targets_M)
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def take_step(model: CaptionModel, batch: Batch, accelerator: Accelerator) -> tuple[dict[str, Tensor], Tensor]:
    """Each parameter's change in a step of plain SGD at rate 1, with its sign turned: its gradient; and the totals."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1.0)
    schedule = LambdaLR(optimizer, lambda _step: 1.0)
    totals = train_step(model, batch, view=VIEW, optimizer=optimizer, schedule=schedule, accelerator=accelerator)
    changes = {name: before[name] - p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return changes, totals


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("trainable", [False, True])
def test_a_step_follows_the_gradient_of_the_mean_over_tokens(accelerator: Accelerator, trainable: bool) -> None:
    batch = make_batch(CAPTIONS)
    wanted = mean_gradients(make_model(trainable=trainable), batch)
    norm = torch.stack([gradient.norm() for gradient in wanted.values()]).norm()
    assert 0.01 < norm < MAX_GRADIENT_NORM  # nothing is clipped here
    found, totals = take_step(make_model(trainable=trainable), batch, accelerator)
    assert_equal(found, wanted)
    assert totals[1] == sum(len(caption) + 1 for captions in CAPTIONS for caption in captions)


def test_the_totals_are_the_loss_before_the_step(accelerator: Accelerator) -> None:
    batch, model = make_batch(CAPTIONS), make_model()
    logits_MV = model(normalise(batch.views_BPP3, VIEW), batch.captions)
    wanted = cross_entropy(logits_MV, batch.captions.targets_M, reduction="sum").item()
    _, totals = take_step(make_model(), batch, accelerator)
    assert totals[0].item() == pytest.approx(wanted, rel=1e-5)


def test_a_wild_gradient_is_clipped(accelerator: Accelerator) -> None:
    model = make_model()
    with torch.no_grad():
        model.predict.weight *= 300
    found, _ = take_step(model, make_batch(CAPTIONS), accelerator)
    norm = torch.stack([gradient.norm() for gradient in found.values()]).norm().item()
    assert norm == pytest.approx(MAX_GRADIENT_NORM, rel=1e-3)


def test_a_second_step_starts_from_zero_gradients(accelerator: Accelerator) -> None:
    model = make_model()
    take_step(model, make_batch(CAPTIONS), accelerator)
    other = make_batch([[[4]], [[5, 6]]], first_image=9)
    wanted = mean_gradients(model, other)
    found, _ = take_step(model, other, accelerator)
    assert_equal(found, wanted)


# ---- several ranks ------------------------------------------------------------------------------------------


class OneOfTwo:
    """An honest stand-in for Accelerate on one of two ranks: its `reduce` adds what the other rank would bring."""

    num_processes = 2

    def __init__(self, real: Accelerator, other_totals: Tensor) -> None:
        self.autocast = real.autocast
        self.backward = real.backward
        self.clip_grad_norm_ = real.clip_grad_norm_
        self.other_totals = other_totals

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        assert reduction == "sum"
        return tensor + self.other_totals


@pytest.mark.parametrize("num_first", [1, 2, 3])
def test_two_ranks_average_to_the_gradient_of_the_whole_batch(accelerator: Accelerator, num_first: int) -> None:
    """Shares of unequal size, the last of them a filler. Batch norm is in eval mode: its batches are the ranks' own."""
    whole = make_batch(CAPTIONS)
    wanted = mean_gradients(eval_norm(make_model()), whole)
    rest = make_batch(CAPTIONS[num_first:], first_image=num_first) if num_first < len(CAPTIONS) else make_filler()
    shares = [make_batch(CAPTIONS[:num_first]), rest]
    totals = [
        batch_loss(eval_norm(make_model()), share, view=VIEW, accelerator=accelerator)[1].detach() for share in shares
    ]
    found = []
    for rank, share in enumerate(shares):
        stand_in = cast(Accelerator, OneOfTwo(accelerator, totals[1 - rank]))
        gradients, summed = take_step(eval_norm(make_model()), share, stand_in)
        assert summed[1] == len(whole.captions.targets_M)
        found.append(gradients)
    assert_equal({name: (found[0][name] + found[1][name]) / 2 for name in wanted}, wanted)


def eval_norm(model: CaptionModel) -> CaptionModel:
    model.norm.eval()
    return model


@pytest.mark.parametrize("trainable", [False, True])
def test_a_filler_gives_zero_gradients_and_leaves_statistics_alone(accelerator: Accelerator, trainable: bool) -> None:
    model = make_model(trainable=trainable)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    loss, totals = batch_loss(model, make_filler(), view=VIEW, accelerator=accelerator)
    accelerator.backward(loss)
    assert totals.tolist() == [0.0, 0.0]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:  # each has a gradient, as data-parallel training waits for all of them
            assert parameter.grad is not None, name
            assert not parameter.grad.any(), name
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    loss, totals = batch_loss(model, make_batch(CAPTIONS), view=VIEW, accelerator=accelerator)
    assert loss > 0
    assert totals[1] > 0


# ---- learning rate and losses -------------------------------------------------------------------------------


def rates(total_steps: int) -> list[float]:
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule = make_schedule(optimizer, total_steps=total_steps)
    found = []
    for _ in range(total_steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_the_learning_rate_rises_to_its_peak_and_falls_to_zero() -> None:
    found = rates(200)
    peak = found.index(max(found))
    assert peak in (9, 10)  # 5 % of the steps
    assert max(found) == pytest.approx(0.5)
    assert all(0 < before < after for before, after in pairwise(found[: peak + 1]))
    assert all(before > after for before, after in pairwise(found[peak + 1 :]))
    assert 0 < found[-1] < 0.001


@pytest.mark.parametrize("total_steps", [1, 2, 3, 21])
def test_short_runs_learn_at_every_step(total_steps: int) -> None:
    found = rates(total_steps)
    assert found[0] == pytest.approx(0.5)
    assert min(found) > 0


def test_only_what_is_to_be_trained_is_optimized() -> None:
    for trainable in (False, True):
        model = make_model(trainable=trainable)
        optimizer = make_optimizer(model, learning_rate=0.25)
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        assert held == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
        assert (id(next(model.encoder.parameters())) in held) == trainable
        assert optimizer.param_groups[0]["lr"] == 0.25


def test_losses_are_told_a_token() -> None:
    loss = StepLoss.of(torch.tensor([6.0, 4.0]))
    assert loss == StepLoss(6.0, 4)
    assert loss.per_token == 1.5
    assert loss.perplexity == pytest.approx(math.exp(1.5))
    assert str(loss) == "loss 1.500, perplexity 4.48"


def test_extreme_losses_do_no_harm() -> None:
    assert StepLoss(1e6, 1).perplexity == math.inf
    assert StepLoss(0.0, 0).per_token == 0.0
    assert math.isfinite(StepLoss(699.0, 1).perplexity)
