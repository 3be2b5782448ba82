"""The step's gradient is that of the mean over target tokens, in one micro-batch and several; fillers weigh nothing."""

import math
import sys
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from accelerate import Accelerator
from tiny_model import logits, pack
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR

from captioner.errors import UserError
from captioner.images.views import ViewSpec, normalise
from captioner.model.network import CaptionModel, ModelConfig, build_model
from captioner.vocabulary import START
from train.data.batches import CaptionBatch
from train.settings import Schedule
from train.step.schedule import make_optimizer, make_schedule
from train.step.step import MAX_GRADIENT_NORM, CaptionLoss, StepLoss, TrainStep, check_finite, sample_inputs

VIEW = ViewSpec(size=32, crop=32)
CAPTIONS = [[[4, 5, 6], [7]], [[9, 8, 7, 6, 5, 4]], [[5, 5], [8, 4, 9, 6, 7], [6]]]


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def make_model(*, trainable: bool = False) -> CaptionModel:
    torch.manual_seed(0)
    config = ModelConfig(encoder="small_cnn", vocabulary_size=10, embedding_size=6, hidden_size=7)
    return build_model(config, encoder_trainable=trainable).train()


def make_batch(captions: Sequence[list[list[int]]], *, first_image: int = 0) -> CaptionBatch:
    """A batch of random views, image i always the same."""
    views = [
        torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(first_image + i))
        for i in range(len(captions))
    ]
    names = [str(first_image + i) for i in range(len(captions))]
    packed = pack(captions, max_tokens=20)
    positions = list(range(first_image, first_image + len(names)))
    return CaptionBatch(torch.stack(views), packed, positions, names, list(names), [["words"]] * len(names), 0)


def make_filler() -> CaptionBatch:
    views_BPP3 = torch.zeros((1, 32, 32, 3), dtype=torch.uint8)
    return CaptionBatch(views_BPP3, pack([[[]]], max_tokens=20), [], [], [], [], 0)


def mean_gradients(model: CaptionModel, batch: CaptionBatch, *, smoothing: float = 0.0) -> dict[str, Tensor]:
    """Gradients of the mean cross-entropy of all target tokens, by PyTorch alone."""
    logits_MV = logits(model, normalise(batch.inputs, VIEW), batch.captions)
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    loss = cross_entropy(logits_MV, batch.captions.targets_M, label_smoothing=smoothing)
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def take_step(
    model: CaptionModel, micro_batches: Sequence[CaptionBatch], accelerator: Accelerator, *, smoothing: float = 0.0
) -> tuple[dict[str, Tensor], Tensor]:
    """Each parameter's change in a step of plain SGD at rate 1, with its sign turned: its gradient; and the record."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1.0)
    schedule = LambdaLR(optimizer, lambda _step: 1.0)
    loss_model = CaptionLoss(model, view=VIEW, label_smoothing=smoothing).train()
    record = TrainStep(loss_model, optimizer, schedule, accelerator)(micro_batches)
    changes = {name: before[name] - p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return changes, record


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("trainable", [False, True])
def test_a_step_follows_the_gradient_of_the_mean_over_tokens(
    accelerator: Accelerator, trainable: bool, smoothing: float
) -> None:
    batch = make_batch(CAPTIONS)
    wanted = mean_gradients(make_model(trainable=trainable), batch, smoothing=smoothing)
    norm = torch.stack([gradient.norm() for gradient in wanted.values()]).norm()
    assert 0.01 < norm < MAX_GRADIENT_NORM  # nothing is clipped here
    found, record = take_step(make_model(trainable=trainable), [batch], accelerator, smoothing=smoothing)
    assert_equal(found, wanted)
    assert record[1] == sum(len(caption) + 1 for captions in CAPTIONS for caption in captions)
    assert record[2].item() == pytest.approx(norm.item(), rel=1e-4)


def test_the_record_is_the_plain_loss_before_the_step(accelerator: Accelerator) -> None:
    batch, model = make_batch(CAPTIONS), make_model()
    logits_MV = logits(model, normalise(batch.inputs, VIEW), batch.captions)
    wanted = cross_entropy(logits_MV, batch.captions.targets_M, reduction="sum").item()
    for smoothing in (0.0, 0.2):
        _, record = take_step(make_model(), [batch], accelerator, smoothing=smoothing)
        assert record[0].item() == pytest.approx(wanted, rel=1e-5)


def test_a_large_gradient_is_clipped_and_its_norm_before_is_returned(accelerator: Accelerator) -> None:
    model = make_model()
    with torch.no_grad():
        model.predict.weight *= 300
    found, record = take_step(model, [make_batch(CAPTIONS)], accelerator)
    norm = torch.stack([gradient.norm() for gradient in found.values()]).norm().item()
    assert norm == pytest.approx(MAX_GRADIENT_NORM, rel=1e-3)
    assert record[2] > 2 * MAX_GRADIENT_NORM


def test_a_second_step_starts_from_zero_gradients(accelerator: Accelerator) -> None:
    model = make_model()
    take_step(model, [make_batch(CAPTIONS)], accelerator)
    other = make_batch([[[4]], [[5, 6]]], first_image=9)
    wanted = mean_gradients(model, other)
    found, _ = take_step(model, [other], accelerator)
    assert_equal(found, wanted)


@pytest.mark.parametrize("cuts", [(0, 1), (0, 2), (0, 1, 2)])
def test_micro_batches_of_unequal_length_add_up_to_the_whole_batch(
    accelerator: Accelerator, cuts: tuple[int, ...]
) -> None:
    """Batch norm is in eval mode: its batches are the micro-batches."""
    whole = make_batch(CAPTIONS)
    wanted = mean_gradients(eval_norm(make_model()), whole)
    ends = (*cuts[1:], len(CAPTIONS))
    micro_batches = [make_batch(CAPTIONS[cut:end], first_image=cut) for cut, end in zip(cuts, ends, strict=True)]
    micro_batches.append(make_filler())
    model = eval_norm(make_model())
    model.train = lambda _mode=True: model  # type: ignore[method-assign]
    found, record = take_step(model, micro_batches, accelerator)
    assert_equal(found, wanted)
    assert record[1] == len(whole.captions.targets_M)


def eval_norm(model: CaptionModel) -> CaptionModel:
    model.norm.eval()
    return model


@pytest.mark.parametrize("trainable", [False, True])
def test_a_filler_gives_zero_gradients_and_leaves_statistics_alone(accelerator: Accelerator, trainable: bool) -> None:
    model = make_model(trainable=trainable)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    found, record = take_step(model, [make_filler()], accelerator)
    assert record.tolist() == [0.0, 0.0, 0.0]
    assert not any(gradient.any() for gradient in found.values())
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    _, record = take_step(model, [make_batch(CAPTIONS)], accelerator)
    assert record[0] > 0


@pytest.mark.parametrize(
    ("column", "scaled", "named"), [(0, False, "loss"), (0, True, "loss"), (2, False, "gradient"), (2, True, "")]
)
def test_what_is_not_a_number_ends_the_run_at_its_step(column: int, scaled: bool, named: str) -> None:
    records_S3 = torch.ones((4, 3))
    check_finite(records_S3, last_step=20, scaled=scaled)
    records_S3[2, column] = math.nan if column == 0 else math.inf
    if not named:  # a scaled gradient that overflows is left out, by the scaler
        check_finite(records_S3, last_step=20, scaled=scaled)
        return
    with pytest.raises(UserError, match=f"the {named} of step 19 is"):
        check_finite(records_S3, last_step=20, scaled=scaled)


# ---- scheduled sampling -------------------------------------------------------------------------------------


def test_sampled_words_replace_inputs_but_no_start_and_no_target() -> None:
    """A model that is sure of word 3 everywhere."""
    model, captions = make_model(), make_batch(CAPTIONS).captions
    with torch.no_grad():
        model.predict.bias[3] = 100
    image_BE = torch.zeros((3, 6))
    found = sample_inputs(model, image_BE, captions, fraction=1.0)
    first = int(captions.batch_sizes_T[0])
    assert (found.inputs_M[:first] == START).all()
    assert (found.inputs_M[first:] == 3).all()
    assert found.targets_M is captions.targets_M
    assert torch.equal(sample_inputs(model, image_BE, captions, fraction=0.0).inputs_M, captions.inputs_M)


def test_a_sampled_word_replaces_the_word_that_it_predicts() -> None:
    """A model that is sure of the true next word gives back the captions themselves."""
    model, captions = make_model(), pack([[[4, 5, 6], [7, 8]], [[9, 8, 4, 6, 5]]], max_tokens=20)
    torch.manual_seed(1)
    hidden_MH = 10 * torch.nn.functional.one_hot(captions.targets_M, 10).float()
    model.hidden = lambda _image_BE, _captions: hidden_MH  # type: ignore[method-assign]
    model.predict = torch.nn.Linear(10, 10)
    with torch.no_grad():
        model.predict.weight.copy_(10 * torch.eye(10))
    found = sample_inputs(model, torch.zeros((2, 6)), captions, fraction=1.0)
    assert torch.equal(found.inputs_M, captions.inputs_M)


def test_about_the_given_fraction_is_replaced() -> None:
    captions = pack([[[4] * 18] * 50] * 4, max_tokens=20)
    model = make_model()
    with torch.no_grad():
        model.predict.bias[3] = 100
    torch.manual_seed(0)
    found = sample_inputs(model, torch.zeros((4, 6)), captions, fraction=0.25)
    fraction = (found.inputs_M == 3).float().mean() * 19 / 18  # the first of 19 inputs is never replaced
    assert 0.23 < fraction < 0.27


# ---- learning rate and losses -------------------------------------------------------------------------------


def rates(total_steps: int, *, kind: Schedule = "cosine", encoder_from_step: int | None = None) -> list[list[float]]:
    """Each group's learning rate at each step."""
    model = make_model(trainable=encoder_from_step is not None)
    optimizer = make_optimizer(model, 0.5, encoder_learning_rate=0.25)
    schedule = make_schedule(optimizer, kind, total_steps=total_steps, encoder_from_step=encoder_from_step or 0)
    found = []
    for _ in range(total_steps):
        found.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return [list(column) for column in zip(*found, strict=True)]


def test_the_learning_rate_rises_to_its_peak_and_falls_to_zero() -> None:
    (found,) = rates(200)
    peak = found.index(max(found))
    assert peak in (9, 10)  # 5 % of the steps
    assert max(found) == pytest.approx(0.5)
    assert all(0 < before < after for before, after in pairwise(found[: peak + 1]))
    assert all(before > after for before, after in pairwise(found[peak + 1 :]))
    assert 0 < found[-1] < 0.001


def test_self_critical_rates_fall_to_zero_from_their_own_peak() -> None:
    optimizer = make_optimizer(make_model(trainable=True), 0.5, encoder_learning_rate=0.25)
    schedule = make_schedule(optimizer, "cosine", total_steps=20, factor_after=0.1, steps_after=10)
    found = []
    for _ in range(31):
        found.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    assert found[19][0] < 0.01
    for step in range(11):
        assert found[20 + step] == pytest.approx([0.05 * (1 - step / 10), 0.025 * (1 - step / 10)])


def test_a_constant_rate_stays_after_its_rise() -> None:
    (found,) = rates(100, kind="constant")
    assert found[:5] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert set(found[5:]) == {0.5}


def test_the_encoder_starts_later_with_a_rise_of_its_own() -> None:
    decoder, encoder = rates(200, encoder_from_step=100)
    assert decoder == rates(200)[0]
    assert encoder[:100] == [0.0] * 100
    assert encoder[100:] == [rate / 2 for rate in rates(100)[0]]


@pytest.mark.parametrize("total_steps", [1, 2, 3, 21])
def test_short_runs_learn_at_every_step(total_steps: int) -> None:
    (found,) = rates(total_steps)
    assert found[0] == pytest.approx(0.5)
    assert min(found) > 0


def test_only_what_is_to_be_trained_is_optimized() -> None:
    for trainable in (False, True):
        model = make_model(trainable=trainable)
        groups = make_optimizer(model, 0.25, encoder_learning_rate=0.125).param_groups
        held = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
        assert held.keys() == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
        assert held[id(model.embed.weight)] == 0.25
        assert held.get(id(next(model.encoder.parameters()))) == (0.125 if trainable else None)


def test_an_encoder_that_learns_later_is_a_frozen_one_until_then(accelerator: Accelerator) -> None:
    model = make_model(trainable=True)
    before = {name: tensor.clone() for name, tensor in model.encoder.state_dict().items()}
    optimizer = make_optimizer(model, 0.1, encoder_learning_rate=0.1)
    schedule = LambdaLR(optimizer, lambda _step: 1.0)
    take_step = TrainStep(CaptionLoss(model, view=VIEW, thaw_step=2).train(), optimizer, schedule, accelerator)

    def changes(step: int) -> bool:
        """Whether a step changes any of the encoder's parameters and statistics."""
        take_step([make_batch(CAPTIONS)], step)
        return any(not torch.equal(tensor, before[name]) for name, tensor in model.encoder.state_dict().items())

    assert [changes(step) for step in (1, 2, 3)] == [False, False, True]


def test_losses_are_means_over_tokens() -> None:
    loss = StepLoss(6.0, 4)
    assert loss.per_token == 1.5
    assert loss.perplexity == pytest.approx(math.exp(1.5))
    assert str(loss) == "loss 1.500, perplexity 4.48"


def test_extreme_losses_stay_finite_numbers() -> None:
    assert StepLoss(1e6, 1).perplexity == sys.float_info.max
    assert str(StepLoss(1e6, 1)) == "loss 1000000.000, perplexity 1.8e+308"
    assert StepLoss(0.0, 0).per_token == 0.0
    assert math.isfinite(StepLoss(699.0, 1).perplexity)
