"""The searches against slow references written from their definitions: no batch, no state kept, no tensor tricks.

A caption is words, then `<end>`, at most `max_tokens` steps in all, and has no trigram twice; the search keeps beams
by their total log-probability and ranks ended ones by it over a power of their steps. A beam that is wide enough
prunes nothing, so it finds what trying every caption finds.
"""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import FORMS, Form, attend, form_options, logits, pack, set_statistics
from torch import Tensor

from captioner.model.decoding import COPY_PENALTY, DIVERSITY, GeneratedCaption, beam_search, decode, diverse, greedy
from captioner.model.network import AttentionModel, CaptionModel, ModelConfig, VectorModel, build_model
from captioner.vocabulary import END, PAD, START, UNK

WIDTH = 8
Beam = tuple[list[int], list[float]]
"""Tokens and their scores."""


def make_model(form: Form, *, seed: int, num_words: int = 3) -> CaptionModel:
    """A random model with large weights, so that its next-token distributions are far from even."""
    torch.manual_seed(seed)
    config = ModelConfig(
        encoder="small_cnn",
        vocabulary_size=4 + num_words,
        embedding_size=WIDTH,
        hidden_size=12,
        **form_options(form),
    )
    model = build_model(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if not name.startswith(("encoder", "project", "norm")):
            parameter.mul_(3)
    model.predict.bias[END] += 1  # captions of several lengths
    return model


def make_images(form: Form, num_images: int, *, seed: int = 0) -> Tensor:
    """Encoded images: (B, E), or 5 positions of each (B, R, H) with attention."""
    shape = (num_images, 5, 12) if form == "attention" else (num_images, WIDTH)
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def next_scores(model: CaptionModel, image: Tensor, words: list[int]) -> list[float]:
    """Log-probability of each token after `words`: the whole sequence through the LSTMs at once, from its start."""
    words_TE = model.embed(torch.tensor([START, *words]))
    if isinstance(model, AttentionModel):
        first_TH, _ = model.lstm(torch.cat((model.summarise(image.mean(dim=0))[None], words_TE)))
        hidden_TH = model.combine(torch.cat((first_TH[-1], attend(model, first_TH[-1], image))))[None].tanh()
    else:
        assert isinstance(model, VectorModel)
        first = torch.cat((image[None], words_TE))
        every_step = torch.cat((words_TE, image.expand(len(words_TE), -1)), dim=1)
        hidden_TH, _ = model.lstm(first if model.config.image_input == "first" else every_step)
    return model.predict(hidden_TH[-1]).log_softmax(dim=0).tolist()


def trigrams(words: list[int]) -> list[tuple[int, ...]]:
    return list(zip(words, words[1:], words[2:], strict=False))


def repeats(words: list[int]) -> bool:
    return len(set(trigrams(words))) < len(trigrams(words))


def allowed(words: list[int], vocabulary_size: int, *, no_repeat_trigram: bool = True) -> list[int]:
    """Tokens that may follow: the end except at once, and any word, except one that makes a trigram come again."""
    said = [token for token in range(UNK + 1, vocabulary_size) if not (no_repeat_trigram and repeats([*words, token]))]
    return [*([END] if words else []), *said]


def naive_cost(words: list[int], token: int, earlier: list[GeneratedCaption], *, max_tokens: int) -> float:
    """What `token` costs after `words`, since earlier captions have it as their step, too."""
    cost = 0.0
    for caption in earlier:
        steps = [*caption.tokens, END][:max_tokens]
        copied = steps[: len(words)] == words
        if steps[len(words) : len(words) + 1] == [token]:
            is_whole_copy = copied and len(words) + 1 == len(steps)
            cost += COPY_PENALTY if is_whole_copy else DIVERSITY * (1 + copied * len(words))
    return cost


def naive_greedy(
    model: CaptionModel,
    image_E: Tensor,
    *,
    max_tokens: int,
    no_repeat_trigram: bool = True,
    earlier: list[GeneratedCaption] | None = None,
) -> GeneratedCaption:
    words: list[int] = []
    scores: list[float] = []
    while len(scores) < max_tokens:
        following = next_scores(model, image_E, words)
        costs = [naive_cost(words, token, earlier or [], max_tokens=max_tokens) for token in range(len(following))]
        may_follow = allowed(words, len(following), no_repeat_trigram=no_repeat_trigram)
        token = max(may_follow, key=lambda token: following[token] - costs[token])
        scores.append(following[token])
        if token == END:
            break
        words.append(token)
    return GeneratedCaption(tokens=words, token_scores=scores)


def naive_beam_search(
    model: CaptionModel,
    image_E: Tensor,
    *,
    beam_size: int,
    max_tokens: int,
    length_penalty: float = 1.0,
    no_repeat_trigram: bool = True,
) -> GeneratedCaption:
    options = {"beam_size": beam_size, "max_tokens": max_tokens, "no_repeat_trigram": no_repeat_trigram}
    return best_beam(naive_beams(model, image_E, **options), length_penalty)


def naive_beams(
    model: CaptionModel, image_E: Tensor, *, beam_size: int, max_tokens: int, no_repeat_trigram: bool = True
) -> list[Beam]:
    """The beams that are left at the end; no length penalty decides which."""
    beams: list[Beam] = [([], [])]
    for _ in range(max_tokens):
        longer = []
        for tokens, scores in beams:
            if END in tokens:
                longer.append((tokens, scores))
                continue
            following = next_scores(model, image_E, tokens)
            longer += [
                ([*tokens, t], [*scores, following[t]])
                for t in allowed(tokens, len(following), no_repeat_trigram=no_repeat_trigram)
                if following[t] > -math.inf
            ]
        beams = sorted(longer, key=lambda beam: -sum(beam[1]))[:beam_size]
    return beams


def best_beam(beams: list[Beam], length_penalty: float) -> GeneratedCaption:
    ended = [beam for beam in beams if END in beam[0]] or beams
    tokens, scores = max(ended, key=lambda beam: sum(beam[1]) / len(beam[1]) ** length_penalty)
    return GeneratedCaption(tokens=[t for t in tokens if t != END], token_scores=scores)


def best_of_all(model: CaptionModel, image_E: Tensor, *, max_tokens: int) -> GeneratedCaption:
    """The ended caption with the greatest mean log-probability a step, by trying every one."""
    words = range(UNK + 1, model.config.vocabulary_size)
    best: GeneratedCaption | None = None
    for length in range(1, max_tokens):
        for tokens in itertools.product(words, repeat=length):
            steps = [*tokens, END]
            scores = [next_scores(model, image_E, steps[:i])[token] for i, token in enumerate(steps)]
            caption = GeneratedCaption(tokens=list(tokens), token_scores=scores)
            best = caption if best is None or caption.score > best.score else best
    assert best is not None
    return best


def assert_same(found: GeneratedCaption, wanted: GeneratedCaption) -> None:
    assert found.tokens == wanted.tokens
    assert found.token_scores == pytest.approx(wanted.token_scores, abs=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_greedy_takes_the_likeliest_token_step_by_step(form: Form) -> None:
    lengths = set()
    for seed in range(6):
        model, image_BE = make_model(form, seed=seed, num_words=6), make_images(form, 6, seed=seed)
        found = greedy(model, image_BE, max_tokens=7)
        for caption, image_E in zip(found, image_BE, strict=True):
            assert_same(caption, naive_greedy(model, image_E, max_tokens=7))
        lengths |= {len(caption.token_scores) for caption in found}
    assert len(lengths) > 2  # captions that ended at several steps, or were cut: rows left the batch one by one


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("beam_size", [2, 3, 5])
def test_beam_search_keeps_the_likeliest_beams(form: Form, beam_size: int) -> None:
    differs_from_greedy = 0
    for seed in range(4):
        model, image_BE = make_model(form, seed=seed, num_words=5), make_images(form, 4, seed=seed)
        found = beam_search(model, image_BE, beam_size=beam_size, max_tokens=5)
        for caption, image_E in zip(found, image_BE, strict=True):
            assert_same(caption, naive_beam_search(model, image_E, beam_size=beam_size, max_tokens=5))
        differs_from_greedy += found != greedy(model, image_BE, max_tokens=5)
    assert differs_from_greedy


@pytest.mark.parametrize("form", FORMS)
def test_a_smaller_length_penalty_favours_shorter_captions(form: Form) -> None:
    lengths = dict.fromkeys((0.0, 1.0, 3.0), 0)
    options = {"beam_size": 4, "max_tokens": 6}
    for seed in range(4):
        model, image_BE = make_model(form, seed=seed, num_words=5), make_images(form, 4, seed=seed)
        beams = [naive_beams(model, image_E, **options) for image_E in image_BE]
        for length_penalty in lengths:
            found = decode(model, image_BE, length_penalty=length_penalty, **options)
            for caption, beams_of_image in zip(found, beams, strict=True):
                assert_same(caption, best_beam(beams_of_image, length_penalty))
            lengths[length_penalty] += sum(len(caption.token_scores) for caption in found)
    assert lengths[0.0] < lengths[1.0] < lengths[3.0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(4))
def test_a_wide_beam_finds_the_best_of_all_captions(form: Form, seed: int) -> None:
    model, image_BE = make_model(form, seed=seed), make_images(form, 3, seed=seed)
    for caption, image_E in zip(beam_search(model, image_BE, beam_size=64, max_tokens=3), image_BE, strict=True):
        assert_same(caption, best_of_all(model, image_E, max_tokens=3))


def naive_decode(model: CaptionModel, image_E: Tensor, *, beam_size: int, **options) -> GeneratedCaption:
    if beam_size == 1:
        return naive_greedy(model, image_E, **options)
    return naive_beam_search(model, image_E, beam_size=beam_size, **options)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("beam_size", [1, 3])
@pytest.mark.parametrize("num_words", [30, 60, 123])
def test_words_are_found_all_over_a_larger_vocabulary(form: Form, beam_size: int, num_words: int) -> None:
    said = set()
    for seed in range(6):
        model, image_BE = make_model(form, seed=seed, num_words=num_words), make_images(form, 3, seed=seed)
        found = decode(model, image_BE, beam_size=beam_size, max_tokens=5)
        for caption, image_E in zip(found, image_BE, strict=True):
            assert_same(caption, naive_decode(model, image_E, beam_size=beam_size, max_tokens=5))
            said |= set(caption.tokens)
    assert min(said) < 4 + num_words // 4
    assert max(said) >= 4 + num_words - num_words // 8


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("beam_size", [1, 3])
def test_no_trigram_comes_twice_unless_that_is_wanted(form: Form, beam_size: int) -> None:
    num_repeats = {True: 0, False: 0}
    for seed, no_repeat_trigram in itertools.product(range(5), num_repeats):
        model, image_BE = make_model(form, seed=seed), make_images(form, 3, seed=seed)
        model.predict.bias[END] -= 3
        options = {"beam_size": beam_size, "max_tokens": 12, "no_repeat_trigram": no_repeat_trigram}
        for caption, image_E in zip(decode(model, image_BE, **options), image_BE, strict=True):
            assert_same(caption, naive_decode(model, image_E, **options))
            num_repeats[no_repeat_trigram] += repeats(caption.tokens)
    assert num_repeats[True] == 0
    assert num_repeats[False] > 5


def test_a_caption_ends_where_every_word_would_repeat_a_trigram() -> None:
    model = make_model("first", seed=0, num_words=1)
    model.predict.bias[END] -= 50
    for beam_size in (1, 3):
        (caption,) = decode(model, make_images("first", 1), beam_size=beam_size, max_tokens=9)
        assert caption.tokens == [UNK + 1] * 3
        assert caption.token_scores[-1] < -30


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("beam_size", [1, 3])
@pytest.mark.parametrize("num_words", [5, 130])
def test_each_further_caption_pays_for_what_earlier_ones_say(form: Form, beam_size: int, num_words: int) -> None:
    options = {"beam_size": beam_size, "max_tokens": 6}
    for seed in range(3):
        model, image_BE = make_model(form, seed=seed, num_words=num_words), make_images(form, 3, seed=seed)
        found = diverse(model, image_BE, num_captions=4, **options)
        assert [captions[0] for captions in found] == decode(model, image_BE, **options)
        for captions, image_E in zip(found, image_BE, strict=True):
            for number, caption in enumerate(captions[1:], start=1):
                assert_same(caption, naive_greedy(model, image_E, max_tokens=6, earlier=captions[:number]))


@settings(deadline=None, max_examples=40)
@given(
    form=st.sampled_from(FORMS),
    seed=st.integers(0, 10**6),
    num_captions=st.integers(1, 8),
    beam_size=st.integers(1, 3),
    max_tokens=st.integers(1, 8),
    end_bias=st.sampled_from([-20.0, 0.0, 20.0]),
    data=st.data(),
)
def test_diverse_captions_all_differ(
    *,
    form: Form,
    seed: int,
    num_captions: int,
    beam_size: int,
    max_tokens: int,
    end_bias: float,
    data: st.DataObject,
) -> None:
    """Also where the model insists on ending at once, or never ends: the drive to copy is far above `DIVERSITY`."""
    num_words = num_captions + max_tokens + data.draw(st.integers(0, 40), label="words to spare")
    model = make_model(form, seed=seed, num_words=num_words)
    model.predict.bias[END] += end_bias
    options = {"num_captions": num_captions, "beam_size": beam_size, "max_tokens": max_tokens}
    for captions in diverse(model, make_images(form, 2, seed=seed), **options):
        assert len({tuple(caption.tokens) for caption in captions}) == len(captions) == num_captions
        assert all(min(caption.tokens) > UNK and not repeats(caption.tokens) for caption in captions)


def test_too_small_a_vocabulary_still_gives_every_caption_asked_for() -> None:
    """One word makes but two captions of at most two words."""
    (captions,) = diverse(
        make_model("first", seed=0, num_words=1), make_images("first", 1), num_captions=4, beam_size=1, max_tokens=2
    )
    assert len(captions) == 4
    assert {tuple(caption.tokens) for caption in captions} == {(UNK + 1,), (UNK + 1, UNK + 1)}


@settings(deadline=None, max_examples=20)
@given(
    form=st.sampled_from(FORMS),
    seed=st.integers(0, 10**6),
    num_words=st.integers(8, 80),
    num_images=st.integers(2, 6),
    num_captions=st.integers(1, 4),
    beam_size=st.integers(1, 4),
)
def test_an_image_gets_the_same_captions_alone_and_in_a_batch(
    *, form: Form, seed: int, num_words: int, num_images: int, num_captions: int, beam_size: int
) -> None:
    model, image_BE = make_model(form, seed=seed, num_words=num_words), make_images(form, num_images, seed=seed)
    options = {"num_captions": num_captions, "beam_size": beam_size, "max_tokens": 8}
    together = diverse(model, image_BE, **options)
    for number, captions in enumerate(together):
        (alone,) = diverse(model, image_BE[number : number + 1], **options)
        for caption, single in zip(captions, alone, strict=True):
            assert_same(caption, single)
            assert caption.score == pytest.approx(single.score, abs=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("beam_size", [1, 4])
def test_special_words_and_empty_captions_are_never_said(form: Form, beam_size: int) -> None:
    """The model is bent towards exactly what must not be said; its own first choice would be `<end>`."""
    for seed in range(3):
        model = make_model(form, seed=seed)
        model.predict.bias[[PAD, START, UNK]] += 20
        model.predict.bias[END] += 25
        for caption in decode(model, make_images(form, 5), beam_size=beam_size, max_tokens=6):
            assert caption.tokens
            assert min(caption.tokens) > UNK
            assert all(score > -100 for score in caption.token_scores)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("beam_size", [1, 3, 40])
def test_where_nothing_ends_captions_are_cut_at_the_greatest_length(form: Form, beam_size: int) -> None:
    model = make_model(form, seed=2)
    model.predict.bias[END] = -torch.inf
    image_BE = make_images(form, 3)
    for caption, image_E in zip(decode(model, image_BE, beam_size=beam_size, max_tokens=3), image_BE, strict=True):
        assert len(caption.tokens) == len(caption.token_scores) == 3
        assert_same(caption, naive_beam_search(model, image_E, beam_size=beam_size, max_tokens=3))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("beam_size", [1, 3])
def test_all_captions_may_end_at_once(form: Form, beam_size: int) -> None:
    model, image_BE = make_model(form, seed=3, num_words=5), make_images(form, 4)
    model.predict.bias[END] += 50
    for caption, image_E in zip(decode(model, image_BE, beam_size=beam_size, max_tokens=9), image_BE, strict=True):
        likeliest = max(allowed([], 9), key=lambda token: next_scores(model, image_E, [])[token])
        assert caption.tokens == [likeliest]
        assert len(caption.token_scores) == 2


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("max_tokens", [1, 2, 4])
@pytest.mark.parametrize("num_words", [1, 3])
def test_more_beams_than_words_are_harmless(form: Form, max_tokens: int, num_words: int) -> None:
    """At first there are fewer possible beams than places; those that fill them must never become the caption."""
    for seed in range(3):
        model, image_BE = make_model(form, seed=seed, num_words=num_words), make_images(form, 3, seed=seed)
        found = beam_search(model, image_BE, beam_size=30, max_tokens=max_tokens)
        for caption, image_E in zip(found, image_BE, strict=True):
            assert_same(caption, naive_beam_search(model, image_E, beam_size=30, max_tokens=max_tokens))


@settings(deadline=None, max_examples=25)
@given(
    num_words=st.integers(1, 5),
    beam_size=st.integers(1, 60),
    num_captions=st.integers(1, 8),
    max_tokens=st.integers(1, 12),
    no_repeat_trigram=st.booleans(),
)
def test_no_search_fails_or_scores_without_end_for_a_small_vocabulary(
    num_words: int, beam_size: int, num_captions: int, max_tokens: int, no_repeat_trigram: bool
) -> None:
    found = diverse(
        make_model("first", seed=1, num_words=num_words),
        make_images("first", 2),
        num_captions=num_captions,
        beam_size=beam_size,
        max_tokens=max_tokens,
        no_repeat_trigram=no_repeat_trigram,
    )
    for caption in itertools.chain.from_iterable(found):
        assert caption.tokens
        assert min(caption.tokens) > UNK
        assert all(map(math.isfinite, caption.token_scores))


@pytest.mark.parametrize("beam_size", [1, 3])
def test_a_vocabulary_without_words_is_refused(beam_size: int) -> None:
    with pytest.raises(ValueError, match="no word"):
        decode(make_model("first", seed=0, num_words=0), make_images("first", 1), beam_size=beam_size, max_tokens=5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("beam_size", [1, 3])
def test_scores_are_those_of_the_training_forward_pass(form: Form, beam_size: int) -> None:
    model = make_model(form, seed=5, num_words=8)
    pictures = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    model.norm.weight.mul_(4)
    set_statistics(model, pictures)
    model.eval()
    found = decode(model, model.encode(pictures), beam_size=beam_size, max_tokens=6)
    assert len({round(caption.score, 4) for caption in found}) == len(pictures)
    for caption, picture in zip(found, pictures, strict=True):
        packed = pack([[caption.tokens]], max_tokens=6)
        scores_T = logits(model, picture[None], packed).log_softmax(dim=1).gather(1, packed.targets_M[:, None])[:, 0]
        said = scores_T[: len(caption.token_scores)]
        assert sum(caption.token_scores) == pytest.approx(said.sum().item(), abs=1e-4)
        assert caption.score == pytest.approx(said.mean().item(), abs=1e-4)


@pytest.mark.parametrize("beam_size", [1, 3])
def test_no_images_give_no_captions(beam_size: int) -> None:
    model = make_model("first", seed=0)
    assert decode(model, make_images("first", 0), beam_size=beam_size, max_tokens=5) == []
    assert diverse(model, make_images("first", 0), num_captions=2, beam_size=beam_size, max_tokens=5) == []
    assert len(decode(model, make_images("first", 2), beam_size=beam_size, max_tokens=5)) == 2
