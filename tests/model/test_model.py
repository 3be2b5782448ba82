"""The model against a plain reference, and what freezing promises."""

from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
from tiny_model import FORMS, Form, attend, form_options, logits, pack
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from captioner.model.network import AttentionModel, CaptionModel, ModelConfig, VectorModel, build_model
from captioner.vocabulary import END, START
from train.step.batch_norm import synchronise_batch_norm

CAPTIONS = [[[4, 5, 6], [7], [9, 8, 7, 6, 5, 4]], [[5, 5]], [[6, 4, 9, 8], [8, 4, 9, 6, 7]]]
"""Of three images; with at most 4 tokens two are cut, and one is exactly as long as allowed."""
MAX_TOKENS = 4


def make_model(form: Form = "first", *, trainable: bool = False, seed: int = 0) -> CaptionModel:
    torch.manual_seed(seed)
    config = ModelConfig(encoder="small_cnn", vocabulary_size=10, embedding_size=6, hidden_size=8, **form_options(form))
    return build_model(config, encoder_trainable=trainable)


def make_images(num_images: int, *, seed: int = 0, sides: int = 32) -> Tensor:
    return torch.randn(num_images, 3, sides, sides, generator=torch.Generator().manual_seed(seed))


# ---- loss and gradients -------------------------------------------------------------------------------------


class Cell:
    """One step of an LSTM, written out."""

    def __init__(self, lstm: nn.LSTM) -> None:
        self.weights = {name: cast(Tensor, parameter) for name, parameter in lstm.named_parameters()}
        self.hidden_H = self.cell_H = self.weights["bias_ih_l0"].new_zeros(lstm.hidden_size)

    def __call__(self, input_E: Tensor) -> Tensor:
        gates = self.weights["weight_ih_l0"] @ input_E + self.weights["bias_ih_l0"]
        gates = gates + self.weights["weight_hh_l0"] @ self.hidden_H + self.weights["bias_hh_l0"]
        entry, forget, candidate, out = gates.chunk(4)
        self.cell_H = forget.sigmoid() * self.cell_H + entry.sigmoid() * candidate.tanh()
        self.hidden_H = out.sigmoid() * self.cell_H.tanh()
        return self.hidden_H


def vector_states(model: VectorModel, features_BF: Tensor) -> Iterator[Callable[[], Callable[[Tensor], Tensor]]]:
    """For each image a function that makes, for a caption, functions of a word's embedding to the last hidden state."""
    projected_BE = features_BF @ model.project.weight.T + model.project.bias
    mean_E, variance_E = projected_BE.mean(dim=0), projected_BE.var(dim=0, unbiased=False)
    normal_BE = (projected_BE - mean_E) / (variance_E + model.norm.eps).sqrt()
    for image_E in normal_BE * model.norm.weight + model.norm.bias:

        def start(image_E: Tensor = image_E) -> Callable[[Tensor], Tensor]:
            cell = Cell(model.lstm)
            if model.config.image_input == "every-step":
                return lambda word_E: cell(torch.cat((word_E, image_E)))
            cell(image_E)
            return cell

        yield start


def attention_states(model: AttentionModel, features_BRF: Tensor) -> Iterator[Callable[[], Callable[[Tensor], Tensor]]]:
    """The same with attention."""
    for features_RF in features_BRF:
        image_RH = model.norm(model.norm_features(features_RF) @ model.project.weight.T + model.project.bias)

        def start(image_RH: Tensor = image_RH) -> Callable[[Tensor], Tensor]:
            cell = Cell(model.lstm)
            cell(model.summarise(image_RH.mean(dim=0)))

            def step(word_E: Tensor) -> Tensor:
                hidden_H = cell(word_E)
                seen_H = attend(model, hidden_H, image_RH)
                return (model.combine.weight @ torch.cat((hidden_H, seen_H)) + model.combine.bias).tanh()

            return step

        yield start


def reference_loss(model: CaptionModel, images: Tensor, captions_of_images: list[list[list[int]]]) -> Tensor:
    """Summed cross-entropy, one caption and one token at a time, with all but layer norm written out."""
    states: Any = attention_states if isinstance(model, AttentionModel) else vector_states
    loss = torch.zeros((), dtype=images.dtype)
    for start, captions in zip(states(model, model.encoder(images)), captions_of_images, strict=True):
        for words in captions:
            targets = [*words, END][: max(MAX_TOKENS, len(words) + 1 if len(words) <= MAX_TOKENS else 0)]
            step = start()
            for token, target in zip([START, *words], targets, strict=False):
                logits_V = model.predict.weight @ step(model.embed.weight[token]) + model.predict.bias
                loss = loss - (logits_V[target] - logits_V.exp().sum().log())
    return loss


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("trainable", [False, True])
def test_loss_and_every_gradient_equal_the_unpacked_reference(form: Form, trainable: bool) -> None:
    model = make_model(form, trainable=trainable).double().train()
    images = make_images(3).double()
    packed = pack(CAPTIONS, max_tokens=MAX_TOKENS)
    loss = cross_entropy(logits(model, images, packed), packed.targets_M, reduction="sum")
    wanted_loss = reference_loss(model, images, CAPTIONS)
    assert loss.item() == pytest.approx(wanted_loss.item(), abs=1e-5)
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert any(name.startswith("encoder") for name, _ in named) == trainable
    parameters = [parameter for _, parameter in named]
    found = torch.autograd.grad(loss, parameters)
    wanted = torch.autograd.grad(wanted_loss, parameters)
    for (name, _), gradient, reference in zip(named, found, wanted, strict=True):
        torch.testing.assert_close(gradient, reference, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: name + text)
        # a bias before batch norm has no effect, all others have
        assert name == "project.bias" or gradient.abs().max() > 1e-6, name


# ---- packed captions ----------------------------------------------------------------------------------------


def test_packing_is_time_major_and_start_is_no_target() -> None:
    packed = pack([[[4]], [[5, 6, 7], [8, 9]]], max_tokens=10)
    assert packed.image_of_caption_N.tolist() == [1, 1, 0]
    assert packed.batch_sizes_T.tolist() == [3, 3, 2, 1]
    assert packed.inputs_M.tolist() == [START, START, START, 5, 8, 4, 6, 9, 7]
    assert packed.targets_M.tolist() == [5, 8, 4, 6, 9, END, 7, END, END]


@pytest.mark.parametrize(
    ("words", "targets"), [([4, 5], [4, 5, END]), ([4, 5, 6], [4, 5, 6, END]), ([4, 5, 6, 7], [4, 5, 6]), ([], [END])]
)
def test_a_longer_caption_is_cut_and_does_not_end(words: list[int], targets: list[int]) -> None:
    packed = pack([[words]], max_tokens=3)
    assert packed.targets_M.tolist() == targets
    assert packed.inputs_M.tolist() == [START, *words][: len(targets)]


# ---- the encoder --------------------------------------------------------------------------------------------


def train_two_steps(model: CaptionModel) -> None:
    model.train()
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    packed = pack(CAPTIONS, max_tokens=MAX_TOKENS)
    for seed in range(2):
        loss = cross_entropy(logits(model, make_images(3, seed=seed), packed), packed.targets_M)
        loss.backward()
        optimizer.step()


NEVER_MOVED = "project.bias"  # the batch norm behind it takes any constant away, so its gradient is rounding noise


def test_a_frozen_encoder_stays_bit_for_bit_while_the_rest_learns() -> None:
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train_two_steps(model)
    assert model.norm.training
    assert not any(module.training for module in model.encoder.backbone.modules())
    assert all(parameter.grad is None for parameter in model.encoder.parameters())
    for name, tensor in model.state_dict().items():
        if name != NEVER_MOVED:
            assert torch.equal(tensor, before[name]) == name.startswith("encoder."), name


def test_a_trainable_encoder_learns_and_its_statistics_move() -> None:
    model = make_model(trainable=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train_two_steps(model)
    for name, tensor in model.state_dict().items():
        assert name == NEVER_MOVED or not torch.equal(tensor, before[name]), name
    model.eval()
    assert not any(module.training for module in model.modules())


def test_each_image_is_encoded_once_however_many_captions_it_has() -> None:
    model = make_model()
    shapes: list[torch.Size] = []
    model.encoder.register_forward_hook(lambda _module, inputs, _output: shapes.append(inputs[0].shape))
    packed = pack([[[4, 5], [6], [7], [8], [9, 4]]] * 3, max_tokens=9)
    logits_MV = logits(model, make_images(3), packed)
    assert shapes == [(3, 3, 32, 32)]
    assert logits_MV.shape == (3 * 12, 10)


def test_one_image_alone_trains_and_leaves_statistics_alone() -> None:
    model = make_model()
    synchronise_batch_norm(model)
    train_two_steps(model)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.zero_grad()
    packed = pack([[[4, 5]]], max_tokens=9)
    logits_MV = logits(model, make_images(1), packed)
    cross_entropy(logits_MV, packed.targets_M).backward()
    assert cast(Tensor, model.project.weight.grad).abs().max() > 0
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    assert model.norm.training
    torch.testing.assert_close(logits_MV, logits(model.eval(), make_images(1), packed))
    model.train()
    logits(model, make_images(2), pack([[[4]], [[5]]], max_tokens=9))
    assert not torch.equal(cast(Tensor, model.norm.running_mean), buffers["norm.running_mean"])
