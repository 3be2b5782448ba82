"""Self-critical training: what is drawn, how it is scored, and the gradient against a plain reference."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import FORMS, VIEW, VOCABULARY, Form, make_model, make_views, pack

from captioner.metrics import CiderReward, References, document_frequency, ptb_tokenize
from captioner.model.decoding import sample
from captioner.model.network import CaptionModel
from captioner.vocabulary import END, PAD, START, UNK
from train.data.batches import CaptionBatch
from train.step.schedule import make_optimizer, make_schedule
from train.step.self_critical import NUM_SAMPLES, TEMPERATURE, SelfCriticalStep, pack_samples, with_end
from train.step.step import CaptionLoss, TrainStep, distribute

MAX_TOKENS = 6
CAPTIONS = [
    ["a man rides a red bicycle", "a man on a bicycle", "a man near the sea"],
    ["a dog sits on a table", "a red dog on a table"],
    ["a cat near a dog", "a cat and a dog sit"],
]


def make_reward(captions_of_images: Sequence[Sequence[str]]) -> CiderReward:
    tokens = [[with_end(caption) for caption in captions] for captions in captions_of_images]
    return CiderReward(document_frequency(tokens), len(tokens))


def make_batch(rows: Sequence[int]) -> CaptionBatch:
    """Images of these numbers, at positions of the same numbers."""
    return CaptionBatch(
        inputs=torch.from_numpy(make_views(3)[list(rows)]),
        captions=pack([[[4, 5]]] * len(rows), max_tokens=MAX_TOKENS),
        positions=list(rows),
        keys=list(map(str, rows)),
        image_ids=list(rows),
        references=[CAPTIONS[row] for row in rows],
        num_cut=0,
    )


def make_step(form: Form = "attention", *, learning_rate: float = 1e-3, seed: int = 3) -> SelfCriticalStep:
    accelerator = Accelerator(cpu=True)
    loss_model = CaptionLoss(make_model(form), view=VIEW)
    optimizer = make_optimizer(loss_model.model, learning_rate, encoder_learning_rate=0)
    schedule = make_schedule(optimizer, "constant", total_steps=100)
    wrapped, optimizer = distribute(loss_model, optimizer, accelerator)
    return SelfCriticalStep(
        wrapped,
        optimizer,
        schedule,
        accelerator,
        reward=make_reward(CAPTIONS),
        vocabulary=VOCABULARY,
        max_tokens=MAX_TOKENS,
        seed=seed,
        epoch_steps=10,
    )


def encode(step: SelfCriticalStep, batch: CaptionBatch) -> torch.Tensor:
    with torch.no_grad():
        return step.loss_model.model.encode(step.loss_model.features(batch.inputs))


# ---- scores -------------------------------------------------------------------------------------------------


def test_rewards_are_the_metric_of_the_same_tokens() -> None:
    references = dict(enumerate(CAPTIONS))
    tokens = [[ptb_tokenize(caption) for caption in captions] for captions in CAPTIONS]
    reward = CiderReward(document_frequency(tokens), len(tokens))
    candidates = {0: "a man on a red table", 1: "a dog sits on a table", 2: "zebra"}
    wanted = References(references).cider(candidates)
    for number, caption in candidates.items():
        assert reward([ptb_tokenize(caption)], tokens[number]) == pytest.approx([wanted[number]])


def test_a_caption_that_stops_too_early_loses() -> None:
    reward = make_reward(CAPTIONS)
    whole, cut = ["a", "man", "on", "a", "bicycle", "<end>"], ["a", "man", "on", "a", "<end>"]
    better, worse = reward([whole, cut], [with_end(caption) for caption in CAPTIONS[0]])
    assert better > worse


# ---- samples ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1, 0.5])
@pytest.mark.parametrize("form", FORMS)
def test_first_words_are_as_frequent_as_they_are_likely(form: Form, temperature: float) -> None:
    step = make_step(form)
    model, images = step.loss_model.model.eval(), encode(step, make_batch([0]))
    uniform_BST = (torch.arange(2000) / 2000).view(1, -1, 1)
    counts = Counter(tokens[0] for tokens in sample(model, images, uniform_BST, temperature=temperature))
    state = model.start(images, torch.zeros(1, dtype=torch.long), 1)
    with torch.no_grad():
        logits_V = model.advance(torch.tensor([START]), state)[0][0]
    logits_V[[PAD, START, UNK, END]] = -math.inf
    for token, probability in enumerate((logits_V / temperature).softmax(dim=0).tolist()):
        assert counts[token] == pytest.approx(2000 * probability, abs=1.01), token


@settings(deadline=None, max_examples=20)
@given(form=st.sampled_from(FORMS), seed=st.integers(0, 1000))
def test_samples_are_the_same_alone_and_in_any_batch_and_never_special(form: Form, seed: int) -> None:
    step = make_step(form)
    model, images = step.loss_model.model.eval(), encode(step, make_batch([0, 1, 2]))
    uniform_BST = torch.rand((3, 4, MAX_TOKENS), generator=torch.Generator().manual_seed(seed))
    together = sample(model, images, uniform_BST)
    alone = [sample(model, images[row : row + 1], uniform_BST[row : row + 1]) for row in range(3)]
    assert together == [tokens for part in alone for tokens in part]
    for tokens in together:
        assert not {PAD, START, UNK} & set(tokens)
        assert END not in tokens[:-1]
        assert tokens[0] != END
        assert tokens[-1] == END or len(tokens) == MAX_TOKENS


def test_samples_depend_on_seed_epoch_and_position_alone() -> None:
    step, other = make_step(), make_step(seed=4)
    uniform = step._uniform(make_batch([0, 1, 2]), 3, epoch=1)
    assert np.array_equal(step._uniform(make_batch([2, 0]), 2, epoch=1), uniform[[2, 0]])
    for changed in (
        step._uniform(make_batch([0, 1, 2]), 3, epoch=2),
        other._uniform(make_batch([0, 1, 2]), 3, epoch=1),
    ):
        assert not np.isclose(changed, uniform).any()
    assert len(np.unique(uniform)) == uniform.size
    assert uniform.min() >= 0
    assert uniform.max() < 1


def test_packed_samples_have_exactly_the_drawn_tokens_as_targets() -> None:
    samples = [[5, END], [4, 6, 7], [8, 9, END], [4, END]]
    advantages = np.array([[1.0, -1.0], [2.0, -2.0]])
    packed = pack_samples(samples, advantages, max_tokens=3)
    assert packed.weights_M is not None
    found: dict[float, list[int]] = {}
    caption_of_token = packed.caption_of_token().tolist()
    by_caption: list[list[int]] = [[] for _ in samples]
    for caption, target in zip(caption_of_token, packed.targets_M.tolist(), strict=True):
        by_caption[caption].append(target)
    for caption, weight in zip(caption_of_token, packed.weights_M.tolist(), strict=True):
        found[weight] = by_caption[caption]
    assert found == {1.0: samples[0], -1.0: samples[1], 2.0: samples[2], -2.0: samples[3]}


# ---- the step -----------------------------------------------------------------------------------------------


def reference_gradients(step: SelfCriticalStep, batch: CaptionBatch) -> dict[str, torch.Tensor]:
    """Advantages times log-probabilities, one sample and one token after the other, in eval mode."""
    model = step.loss_model.model.eval()
    model.lstm.train()
    images = encode(step, batch)
    uniform = step._uniform(batch, len(images), epoch=0)
    samples = sample(model, images, torch.from_numpy(uniform), temperature=TEMPERATURE)
    loss = torch.zeros(())
    images = model.encode(step.loss_model.features(batch.inputs))
    for row, references in enumerate(batch.references):
        own = samples[row * NUM_SAMPLES : (row + 1) * NUM_SAMPLES]
        candidates = [[VOCABULARY.words[token] for token in tokens] for tokens in own]
        scores = step.reward(candidates, [with_end(caption) for caption in references])
        for number, (tokens, score) in enumerate(zip(own, scores, strict=True)):
            others = [other for index, other in enumerate(scores) if index != number]
            state, before = model.start(images[row : row + 1], torch.zeros(1, dtype=torch.long), 1), START
            for token in tokens:
                logits, state, _ = model.advance(torch.tensor([before]), state)
                loss = loss - (score - sum(others) / len(others)) * logits[0].log_softmax(dim=0)[token]
                before = token
    loss = loss / (NUM_SAMPLES * len(batch.references))
    parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_the_definition(form: Form) -> None:
    step, batch = make_step(form), make_batch([0, 1, 2])
    wanted = reference_gradients(step, batch)
    objective, rewards = step.objective(batch, 1)
    (objective / step.count(batch)).backward()
    found = {name: each.grad for name, each in step.loss_model.model.named_parameters() if each.requires_grad}
    assert rewards > 0
    assert max(gradient.abs().max() for gradient in wanted.values()) > 1e-3
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: name + text)


def test_micro_batches_and_fillers_change_nothing() -> None:
    whole, parts = make_step(), make_step()
    filler = replace(make_batch([0]), positions=[], keys=[], image_ids=[], references=[])
    records = [whole([make_batch([0, 1, 2])]), parts([make_batch([0, 1]), make_batch([2]), filler])]
    torch.testing.assert_close(*records, rtol=1e-5, atol=1e-5)
    for one, other in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [3, 4, 5])
def test_scores_of_samples_rise(seed: int) -> None:
    step = make_step(seed=seed, learning_rate=2e-4)
    records = [step([make_batch([0, 1, 2])], number).tolist() for number in range(1, 241)]
    scores = [total / count for total, count, _ in records]
    assert np.mean(scores[-20:]) > 1.5 * np.mean(scores[:20])


def test_dropout_is_off_and_batch_norm_keeps_its_statistics() -> None:
    step = make_step("first")
    step.model.train()
    statistics = step.loss_model.model.norm.state_dict()["running_mean"].clone()
    step([make_batch([0, 1, 2])])
    model: CaptionModel = step.loss_model.model
    assert not model.drop.training
    assert model.lstm.training
    assert torch.equal(step.loss_model.model.norm.state_dict()["running_mean"], statistics)


def test_the_first_step_forgets_the_moments_of_cross_entropy() -> None:
    """They are of other gradients: with them an update may be many times as large as the learning rate."""
    step, batch = replace(make_step(), first_step=4), make_batch(range(3))
    before = TrainStep(step.model, step.optimizer, step.schedule, step.accelerator)
    for number in (1, 2, 3):
        before([batch], number)
    for number in (4, 5):
        step([batch], number)
    assert {float(state["step"]) for state in step.optimizer.state.values()} == {2}
