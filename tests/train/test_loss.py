"""The chunked loss is that of a linear layer and PyTorch's cross-entropy, and so are its gradients."""

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy, linear
from torch.utils._python_dispatch import TorchDispatchMode

import train.step.loss
from train.step.loss import _LinearCrossEntropy, linear_cross_entropy

CHUNK_TOKENS = 8


@pytest.fixture(autouse=True, scope="module")
def small_chunks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.step.loss, "CHUNK_TOKENS", CHUNK_TOKENS)
        yield


def draw(num_tokens: int, *, words: int = 7, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Hidden states, weight, bias (they want gradients) and targets."""
    generator = torch.Generator().manual_seed(num_tokens)
    shapes = ((num_tokens, 5), (words, 5), (words,))
    tensors = [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]
    return *tensors, torch.randint(words, (num_tokens,), generator=generator)


def plain_pair(inputs: tuple[Tensor, ...], *, label_smoothing: float) -> Tensor:
    *layer, targets_M = inputs
    return cross_entropy(linear(*layer), targets_M, reduction="sum", label_smoothing=label_smoothing)


@settings(deadline=None)
@given(
    num_tokens=st.integers(0, 4 * CHUNK_TOKENS),
    words=st.integers(1, 12),
    label_smoothing=st.sampled_from([0.0, 0.1]),
    factor=st.floats(-8, 8, width=32),
)
def test_values_and_gradients_are_those_of_the_plain_pair(
    num_tokens: int, words: int, label_smoothing: float, factor: float
) -> None:
    inputs = draw(num_tokens, words=words)
    expected = plain_pair(inputs, label_smoothing=label_smoothing)
    objective, entropy = linear_cross_entropy(*inputs, label_smoothing=label_smoothing)
    torch.testing.assert_close(objective, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, plain_pair(inputs, label_smoothing=0.0).detach(), rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(objective * factor, inputs[:3])
    torch.testing.assert_close(gradients, torch.autograd.grad(expected * factor, inputs[:3]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_gradients_are_those_of_finite_differences(label_smoothing: float) -> None:
    *layer, targets_M = draw(CHUNK_TOKENS + 3, dtype=torch.float64)

    def objective(hidden_MH: Tensor, weight_VH: Tensor, bias_V: Tensor) -> Tensor:
        return linear_cross_entropy(hidden_MH, weight_VH, bias_V, targets_M, label_smoothing=label_smoothing)[0]

    assert torch.autograd.gradcheck(objective, layer)


def test_the_plain_sum_has_no_gradient_and_the_first_has_none_where_none_is_wanted() -> None:
    inputs = draw(3)
    objective, entropy = linear_cross_entropy(*inputs)
    assert objective.requires_grad
    assert not entropy.requires_grad
    with torch.no_grad():
        without, _ = linear_cross_entropy(*inputs)
    assert not without.requires_grad
    assert torch.equal(without, objective)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_losses_and_gradients_stay_close_and_in_float32(dtype: torch.dtype) -> None:
    """As on a GPU under autocast; the relative rounding error of bfloat16 is 2^-9."""
    *layer, targets_M = draw(3 * CHUNK_TOKENS)
    objective, _ = _LinearCrossEntropy.apply(*layer, targets_M, None, 0.1, dtype, True)
    expected = plain_pair((*layer, targets_M), label_smoothing=0.1)
    torch.testing.assert_close(objective, expected, rtol=0.01, atol=0.0)
    pairs = zip(torch.autograd.grad(objective, layer), torch.autograd.grad(expected, layer), strict=True)
    for gradient, exact in pairs:
        assert gradient.dtype == torch.float32
        assert (gradient - exact).norm() < 0.02 * exact.norm()


def test_float16_keeps_small_gradients_and_bears_the_largest_sum() -> None:
    """One rare word of probability 1e-8; then a chunk whose every token is the same surely wrong word."""
    for logit in (math.log(1e-8), 100.0):
        bias_V = torch.tensor([0.0, logit], requires_grad=True)
        layer = (torch.ones(2048, 1, requires_grad=True), torch.zeros(2, 1, requires_grad=True), bias_V)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train.step.loss, "CHUNK_TOKENS", 2048)
            objective, _ = _LinearCrossEntropy.apply(
                *layer, torch.zeros(2048, dtype=torch.int64), None, 0, torch.float16, True
            )
        _, dweight_VH, dbias_V = torch.autograd.grad(objective, layer)
        wanted = 2048 * torch.sigmoid(torch.tensor(logit))
        torch.testing.assert_close(torch.stack((dweight_VH[1, 0], dbias_V[1])), wanted.expand(2), rtol=0.25, atol=0.0)


def test_autocast_on_the_cpu_changes_nothing() -> None:
    inputs = draw(5)
    with torch.autocast("cpu", torch.bfloat16):
        objective, _ = linear_cross_entropy(*inputs)
    assert torch.equal(objective, linear_cross_entropy(*inputs)[0])


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation within returns."""

    num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.num_elements = max(self.num_elements, result.numel())
        return result


def test_the_logits_of_all_tokens_are_never_there() -> None:
    inputs = draw(10 * CHUNK_TOKENS, words=50)
    with LargestTensor() as whole:
        plain_pair(inputs, label_smoothing=0.1).backward()
    with LargestTensor() as chunked:
        linear_cross_entropy(*inputs, label_smoothing=0.1)[0].backward()
    assert whole.num_elements == 10 * CHUNK_TOKENS * 50
    assert chunked.num_elements == CHUNK_TOKENS * 50
