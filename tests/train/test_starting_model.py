"""Starting from a trained model: what it knew it still says, and it learns the new words."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import FORMS, Form, caption_views, form_options, logits, pack, set_statistics
from torch.nn.functional import cross_entropy

from captioner.errors import UserError
from captioner.images.views import ViewSpec, normalise
from captioner.model.bundle import Bundle, DecodingDefaults, load_bundle, save_bundle
from captioner.model.network import ModelConfig, build_model
from captioner.streaming.dataset import read_split
from captioner.vocabulary import SPECIAL_WORDS, Vocabulary
from train.data.folders import check_fits
from train.settings import TrainSettings, check_settings, count_steps
from train.step.starting_model import choose_view, start_from

VIEW = ViewSpec(size=40, crop=32)
WORDS = ["a", "sits", "red", "table", *(f"known-{number}" for number in range(100))]
KNOWN = Vocabulary.from_counts(dict.fromkeys(WORDS, 9), threshold=1)
NEW = {0: {}, 1: {"zebra": 2}, 500: {f"new-{number}": 2 for number in range(500)}}
WORD_ROWS = ("embed.weight", "predict.weight", "predict.bias")


def make_bundle(form: Form = "first", *, seed: int = 0, sharpness: float = 20.0) -> Bundle:
    """A random model whose captions depend on the picture: large weights, statistics of pictures like these."""
    torch.manual_seed(seed)
    config = ModelConfig(
        encoder="small_cnn", vocabulary_size=len(KNOWN), embedding_size=8, hidden_size=9, **form_options(form)
    )
    model = build_model(config)
    with torch.no_grad():
        model.norm.weight.mul_(8)
        model.predict.weight.mul_(sharpness)
    set_statistics(model, make_images(8))
    decoding = DecodingDefaults(beam_size=3, max_tokens=7)
    return Bundle(model=model.eval(), view=VIEW, vocabulary=KNOWN, decoding=decoding, name="random")


def make_views(num_views: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (num_views, 32, 32, 3), dtype=np.uint8)


def make_images(num_images: int) -> torch.Tensor:
    return normalise(torch.from_numpy(make_views(num_images)), VIEW)


def extend(bundle: Bundle, num_new: int, *, trainable: bool = False) -> Bundle:
    """The bundle with a model that was started from it, before any training."""
    vocabulary = KNOWN.extended(Vocabulary.from_counts(NEW[num_new], threshold=1))
    config = replace(bundle.model.config, vocabulary_size=len(vocabulary))
    model = start_from(bundle, config, encoder_trainable=trainable)
    return replace(bundle, model=model.eval(), vocabulary=vocabulary)


@pytest.mark.parametrize("num_new", [0, 1, 500])
@pytest.mark.parametrize("form", FORMS)
def test_everything_known_is_kept(form: Form, num_new: int) -> None:
    bundle = make_bundle(form)
    extended = extend(bundle, num_new, trainable=True)
    assert extended.model.config == replace(bundle.model.config, vocabulary_size=len(KNOWN) + num_new)
    before, after = bundle.model.state_dict(), extended.model.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        kept = tensor[: len(KNOWN)] if name in WORD_ROWS else tensor
        assert torch.equal(kept, before[name]), name
    packed = pack([[[4, 5, 6], [7]], [[8, 9]]], max_tokens=9)
    logits_MV = logits(extended.model, make_images(2), packed)
    wanted_MV = logits(bundle.model, make_images(2), packed)  # of a frozen encoder, with folded batch norms
    torch.testing.assert_close(logits_MV[:, : len(KNOWN)], wanted_MV, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("trainable", [False, True])
def test_the_encoder_is_trainable_when_it_is_to_be(trainable: bool) -> None:
    model = extend(make_bundle(), 1, trainable=trainable).model
    assert all(parameter.requires_grad == trainable for parameter in model.encoder.parameters())


@pytest.mark.parametrize("num_new", [1, 500])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("beam_size", [1, 3])
def test_captions_are_the_same_before_training(form: Form, num_new: int, beam_size: int) -> None:
    bundle = make_bundle(form)
    wanted = caption_views(bundle, make_views(8), beam_size=beam_size)
    found = caption_views(extend(bundle, num_new), make_views(8), beam_size=beam_size)
    assert len({tuple(caption.tokens) for caption in wanted}) > 3
    assert [caption.tokens for caption in found] == [caption.tokens for caption in wanted]


@given(seed=st.integers(0, 999), sharpness=st.sampled_from([0.0, 0.1, 1.0, 30.0]), num_new=st.sampled_from([1, 500]))
@settings(deadline=None, max_examples=25)
def test_new_words_are_together_no_likelier_than_an_average_known_one(
    seed: int, sharpness: float, num_new: int
) -> None:
    model = extend(make_bundle(seed=seed, sharpness=sharpness), num_new).model
    hidden_NH = torch.rand(20, 9, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    chances_NV = model.predict(hidden_NH).double().softmax(dim=1)
    known_NK = chances_NV[:, len(SPECIAL_WORDS) : len(KNOWN)]
    assert (chances_NV[:, len(KNOWN) :].sum(dim=1) <= known_NK.mean(dim=1) * (1 + 1e-5)).all()


def test_new_embeddings_differ_and_lie_among_the_known_ones() -> None:
    bundle = make_bundle()
    with torch.no_grad():
        bundle.model.embed.weight.mul_(0.1).add_(5)
    new_WE = extend(bundle, 500).model.embed.weight[len(KNOWN) :]
    known_KE = bundle.model.embed.weight[len(SPECIAL_WORDS) :]
    torch.testing.assert_close(new_WE.mean(dim=0), known_KE.mean(dim=0), atol=0.03, rtol=0)
    torch.testing.assert_close(new_WE.std(dim=0), known_KE.std(dim=0, correction=0), atol=0, rtol=0.2)
    assert len(new_WE.unique(dim=0)) == 500


def test_a_new_word_is_learned() -> None:
    bundle = extend(make_bundle(), 1)
    tokens = bundle.vocabulary.encode(["a", "zebra", "sits"])
    packed = pack([[tokens], [tokens]], max_tokens=9)
    optimizer = torch.optim.Adam((p for p in bundle.model.parameters() if p.requires_grad), lr=0.03)
    for _ in range(60):
        optimizer.zero_grad()
        cross_entropy(logits(bundle.model, make_images(2), packed), packed.targets_M).backward()
        optimizer.step()
    assert {bundle.vocabulary.decode(caption.tokens) for caption in caption_views(bundle, make_views(2))} == {
        "a zebra sits"
    }


def test_a_started_model_is_saved_and_loaded_like_any_other(tmp_path: Path) -> None:
    bundle = extend(make_bundle(), 500)
    folder = tmp_path / "model"
    save_bundle(
        folder, model=bundle.model, view=VIEW, vocabulary=bundle.vocabulary, decoding=bundle.decoding, metrics={}
    )
    loaded = load_bundle(folder)
    assert loaded.vocabulary == bundle.vocabulary
    assert caption_views(loaded, make_views(3)) == caption_views(bundle, make_views(3))


def test_shards_of_other_pictures_are_refused_with_the_flags_to_pack_with() -> None:
    check_fits(VIEW, replace(VIEW, crop=20))
    for other in (replace(VIEW, size=64), replace(VIEW, resize="keep-ratio")):
        with pytest.raises(UserError, match="--size 40 --resize squash") as error:
            check_fits(VIEW, other)
        assert f"size {other.size} ({other.resize})" in str(error.value)
        assert "\n" not in str(error.value)


# ---- what a run begins with ---------------------------------------------------------------------------------


def test_pictures_come_as_the_encoders_weights_want_them(tmp_path: Path) -> None:
    split = read_split([tiny.write_shards(tmp_path, [2], size=480)], "train", remedy="")
    view = choose_view([split], encoder="efficientnet_v2_l", crop=None, initial=None)
    assert (view.size, view.crop, view.mean, view.std) == (480, 480, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert choose_view([split], encoder="resnet18", crop=None, initial=None).crop == 224
    assert choose_view([split], encoder="resnet18", crop=400, initial=None).crop == 400
    with pytest.raises(UserError, match="crops of 500"):
        choose_view([split], encoder="resnet18", crop=500, initial=None)


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(UserError, match="leave out one of them"):
        check_settings(TrainSettings(cache_features=True, finetune_encoder_from_step=0))


def test_a_run_without_steps_or_with_settings_that_would_do_nothing_is_refused() -> None:
    assert count_steps(TrainSettings(epochs=3), 160, has_val=False) == 15
    assert (
        count_steps(TrainSettings(epochs=3, finetune_encoder_from_step=14, patience_epochs=1), 160, has_val=True) == 15
    )
    with pytest.raises(UserError, match="holds no samples"):
        count_steps(TrainSettings(), 0, has_val=True)
    with pytest.raises(UserError, match="beyond the run's 15 steps"):
        count_steps(TrainSettings(epochs=3, finetune_encoder_from_step=15), 160, has_val=True)
    with pytest.raises(UserError, match="there is none"):
        count_steps(TrainSettings(patience_epochs=2), 160, has_val=False)
