"""Folded batch norms: the same features, and never those of other weights."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from captioner.model.encoders import Encoder
from captioner.model.encoders.folding import fold_batch_norms

CROP = 32


def count_norms(network: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())


def randomise(network: nn.Module, *, seed: int = 0) -> nn.Module:
    """The network in eval mode with weights and statistics that a wrong fold would show."""
    torch.manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)  # type: ignore[bad-argument-type]
            nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[bad-argument-type]
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return network.eval().requires_grad_(False)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=4),
    st.integers(0, 99),
)
def test_a_folded_network_computes_the_same(layers: list[tuple[bool, bool, bool, bool]], seed: int) -> None:
    """For convolutions with and without bias or groups, norms with and without weights, and pairs torn by a ReLU."""
    modules: list[nn.Module] = [nn.Conv2d(3, 4, 1)]
    for has_bias, is_depthwise, is_affine, is_torn in layers:
        modules.append(nn.Conv2d(4, 4, 3, padding=1, bias=has_bias, groups=4 if is_depthwise else 1))
        modules += [nn.ReLU()] * is_torn + [nn.BatchNorm2d(4, affine=is_affine)]
    network = randomise(nn.Sequential(*modules), seed=seed)
    images = torch.randn(2, 3, CROP, CROP)
    folded = fold_batch_norms(network, crop=CROP)
    assert count_norms(folded) == sum(is_torn for *_, is_torn in layers)
    torch.testing.assert_close(folded(images), network(images), rtol=1e-4, atol=1e-4)


class ReadTwice(nn.Module):
    """A network whose convolution is read by a norm, and by nothing that a module's hook could see."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, images: Tensor) -> Tensor:
        found = self.convolution(images)
        return self.norm(found) + found


class Repeated(nn.Module):
    """A network whose one convolution runs twice, with a norm after each."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norms = nn.Conv2d(3, 3, 1), nn.ModuleList([nn.BatchNorm2d(3), nn.BatchNorm2d(3)])

    def forward(self, images: Tensor) -> Tensor:
        for norm in self.norms:
            images = norm(self.convolution(images))
        return images


@pytest.mark.parametrize("kind", [ReadTwice, Repeated])
def test_a_convolution_that_is_used_twice_is_not_folded(kind: type[nn.Module]) -> None:
    network = randomise(kind())
    images = torch.randn(2, 3, CROP, CROP)
    folded = fold_batch_norms(network, crop=CROP)
    assert count_norms(folded) == count_norms(network)
    torch.testing.assert_close(folded(images), network(images))


@pytest.mark.parametrize("name", ["small_cnn", "timm/tf_efficientnet_lite0", "shufflenet_v2_x0_5", "squeezenet1_1"])
def test_a_frozen_encoder_runs_folded_and_keeps_its_weights(name: str) -> None:
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    encoder = Encoder(name, trainable=False)
    randomise(encoder.backbone)
    names, images = list(encoder.state_dict()), torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(encoder(images), encoder._features(encoder.backbone(images)), rtol=1e-3, atol=1e-3)
        assert not count_norms(encoder._folded[0])
    assert list(encoder.state_dict()) == names
    encoder(images)  # what was folded in inference mode serves outside it


def test_other_weights_are_folded_again() -> None:
    """After load_state_dict of the encoder or of a model that holds it, and after a move."""
    images = torch.randn(2, 3, CROP, CROP)
    for change in (
        lambda holder, state: holder[0].load_state_dict(state),
        lambda holder, state: holder.load_state_dict({f"0.{name}": tensor for name, tensor in state.items()}),
        lambda holder, state: (holder.half(), holder[0].load_state_dict(state), holder.float()),
    ):
        encoder, other = (Encoder("small_cnn", trainable=False) for _ in range(2))
        randomise(encoder.backbone, seed=1)
        randomise(other.backbone, seed=2)
        encoder(images)
        change(nn.Sequential(encoder), other.state_dict())
        torch.testing.assert_close(encoder(images), other(images), rtol=1e-2, atol=1e-2)
        assert not torch.allclose(encoder(images), randomised_features(images, seed=1), atol=1e-2)


def randomised_features(images: Tensor, *, seed: int) -> Tensor:
    encoder = Encoder("small_cnn", trainable=False)
    randomise(encoder.backbone, seed=seed)
    return encoder(images)


def test_a_trainable_encoder_keeps_its_norms() -> None:
    encoder = Encoder("small_cnn", trainable=True)
    encoder.train()
    encoder(torch.randn(2, 3, CROP, CROP)).sum().backward()
    encoder.eval()
    encoder(torch.randn(2, 3, CROP, CROP))
    assert not encoder._folded
    encoder.trainable = False  # as before --finetune-encoder-from-step
    encoder(torch.randn(2, 3, CROP, CROP))
    assert not encoder._folded


def test_copies_and_pickles_compute_the_same() -> None:
    encoder, images = Encoder("small_cnn", trainable=False), torch.randn(1, 3, CROP, CROP)
    wanted = encoder(images)
    for copied in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        torch.testing.assert_close(copied(images), wanted)
