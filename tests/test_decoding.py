"""Both searches against slow references written from their definitions: no batch, no state kept, no tensor tricks.

A caption is words, then `<end>`, at most `max_tokens` steps in all; the search keeps beams by their total
log-probability and ranks ended ones by it over a power of their steps. A beam that is wide enough prunes nothing, so
it finds what trying every caption finds.
"""

import itertools
import math

import pytest
import torch
from torch import Tensor

from captioner.decoding import Caption, beam_search, decode, greedy
from captioner.model import CaptionModel, ImageInput, ModelConfig, PackedCaptions
from captioner.vocabulary import END, PAD, START, UNK

FORMS: tuple[ImageInput, ...] = ("first", "every-step")
WIDTH = 8


def make_model(image_input: ImageInput, *, seed: int, num_words: int = 3) -> CaptionModel:
    """A random model with large weights, so that its next-token distributions are far from even."""
    torch.manual_seed(seed)
    config = ModelConfig(
        encoder="small_cnn",
        vocabulary_size=4 + num_words,
        embedding_size=WIDTH,
        hidden_size=12,
        image_input=image_input,
    )
    model = CaptionModel(config).eval().requires_grad_(False)
    for layer in (model.embed, model.lstm, model.predict):
        for parameter in layer.parameters():
            parameter.mul_(3)
    model.predict.bias[END] += 1  # captions of several lengths
    return model


def make_images(num_images: int, *, seed: int = 0) -> Tensor:
    """Image embeddings (B, E)."""
    return 2 * torch.randn(num_images, WIDTH, generator=torch.Generator().manual_seed(seed))


def next_scores(model: CaptionModel, image_E: Tensor, words: list[int]) -> list[float]:
    """Log-probability of each token after `words`: the whole sequence through the LSTM at once, from its start."""
    words_TE = model.embed(torch.tensor([START, *words]))
    if model.config.image_input == "first":
        inputs = torch.cat((image_E[None], words_TE))
    else:
        inputs = torch.cat((words_TE, image_E.expand(len(words_TE), -1)), dim=1)
    hidden_TH, _ = model.lstm(inputs)
    return model.predict(hidden_TH[-1]).log_softmax(dim=0).tolist()


def allowed(words: list[int], vocabulary_size: int) -> list[int]:
    """Tokens that may follow: any word, and the end except at once."""
    return [*([END] if words else []), *range(UNK + 1, vocabulary_size)]


def naive_greedy(model: CaptionModel, image_E: Tensor, *, max_tokens: int) -> Caption:
    words: list[int] = []
    scores: list[float] = []
    while len(scores) < max_tokens:
        following = next_scores(model, image_E, words)
        token = max(allowed(words, len(following)), key=lambda token: following[token])
        scores.append(following[token])
        if token == END:
            break
        words.append(token)
    return Caption(tokens=words, token_scores=scores)


def naive_beam_search(
    model: CaptionModel, image_E: Tensor, *, beam_size: int, max_tokens: int, length_penalty: float = 1.0
) -> Caption:
    beams: list[tuple[list[int], list[float]]] = [([], [])]
    for _ in range(max_tokens):
        longer = []
        for tokens, scores in beams:
            if END in tokens:
                longer.append((tokens, scores))
                continue
            following = next_scores(model, image_E, tokens)
            longer += [
                ([*tokens, t], [*scores, following[t]])
                for t in allowed(tokens, len(following))
                if following[t] > -math.inf
            ]
        beams = sorted(longer, key=lambda beam: -sum(beam[1]))[:beam_size]
    ended = [beam for beam in beams if END in beam[0]] or beams
    tokens, scores = max(ended, key=lambda beam: sum(beam[1]) / len(beam[1]) ** length_penalty)
    return Caption(tokens=[t for t in tokens if t != END], token_scores=scores)


def best_of_all(model: CaptionModel, image_E: Tensor, *, max_tokens: int) -> Caption:
    """The ended caption with the greatest mean log-probability a step, by trying every one."""
    words = range(UNK + 1, model.config.vocabulary_size)
    best: Caption | None = None
    for length in range(1, max_tokens):
        for tokens in itertools.product(words, repeat=length):
            steps = [*tokens, END]
            scores = [next_scores(model, image_E, steps[:i])[token] for i, token in enumerate(steps)]
            caption = Caption(tokens=list(tokens), token_scores=scores)
            best = caption if best is None or caption.score > best.score else best
    assert best is not None
    return best


def assert_same(found: Caption, wanted: Caption) -> None:
    assert found.tokens == wanted.tokens
    assert found.token_scores == pytest.approx(wanted.token_scores, abs=1e-4)


@pytest.mark.parametrize("image_input", FORMS)
def test_greedy_takes_the_likeliest_token_step_by_step(image_input: ImageInput) -> None:
    lengths = set()
    for seed in range(6):
        model, image_BE = make_model(image_input, seed=seed, num_words=6), make_images(6, seed=seed)
        found = greedy(model, image_BE, max_tokens=7)
        for caption, image_E in zip(found, image_BE, strict=True):
            assert_same(caption, naive_greedy(model, image_E, max_tokens=7))
        lengths |= {len(caption.token_scores) for caption in found}
    assert len(lengths) > 2  # captions that ended at several steps, or were cut: rows left the batch one by one


@pytest.mark.parametrize("image_input", FORMS)
@pytest.mark.parametrize("beam_size", [2, 3, 5])
def test_beam_search_keeps_the_likeliest_beams(image_input: ImageInput, beam_size: int) -> None:
    differs_from_greedy = 0
    for seed in range(4):
        model, image_BE = make_model(image_input, seed=seed, num_words=5), make_images(4, seed=seed)
        found = beam_search(model, image_BE, beam_size=beam_size, max_tokens=5)
        for caption, image_E in zip(found, image_BE, strict=True):
            assert_same(caption, naive_beam_search(model, image_E, beam_size=beam_size, max_tokens=5))
        differs_from_greedy += found != greedy(model, image_BE, max_tokens=5)
    assert differs_from_greedy


@pytest.mark.parametrize("image_input", FORMS)
def test_a_smaller_length_penalty_favours_shorter_captions(image_input: ImageInput) -> None:
    lengths: dict[float, int] = {}
    for length_penalty in (0.0, 1.0, 3.0):
        found = []
        for seed in range(6):
            model, image_BE = make_model(image_input, seed=seed, num_words=5), make_images(4, seed=seed)
            options = {"beam_size": 4, "max_tokens": 6, "length_penalty": length_penalty}
            found += decode(model, image_BE, **options)
            for caption, image_E in zip(found[-4:], image_BE, strict=True):
                assert_same(caption, naive_beam_search(model, image_E, **options))
        lengths[length_penalty] = sum(len(caption.token_scores) for caption in found)
    assert lengths[0.0] < lengths[1.0] < lengths[3.0]


@pytest.mark.parametrize("image_input", FORMS)
@pytest.mark.parametrize("seed", range(4))
def test_a_wide_beam_finds_the_best_of_all_captions(image_input: ImageInput, seed: int) -> None:
    model, image_BE = make_model(image_input, seed=seed), make_images(3, seed=seed)
    for caption, image_E in zip(beam_search(model, image_BE, beam_size=64, max_tokens=3), image_BE, strict=True):
        assert_same(caption, best_of_all(model, image_E, max_tokens=3))


@pytest.mark.parametrize("image_input", FORMS)
@pytest.mark.parametrize("beam_size", [1, 3])
def test_an_image_gets_the_same_caption_alone_and_in_a_batch(image_input: ImageInput, beam_size: int) -> None:
    model, image_BE = make_model(image_input, seed=1, num_words=20), make_images(9)
    together = decode(model, image_BE, beam_size=beam_size, max_tokens=8)
    for number, caption in enumerate(together):
        (alone,) = decode(model, image_BE[number : number + 1], beam_size=beam_size, max_tokens=8)
        assert_same(caption, alone)
    assert len({tuple(caption.tokens) for caption in together}) > 2


@pytest.mark.parametrize("image_input", FORMS)
@pytest.mark.parametrize("beam_size", [1, 4])
def test_special_words_and_empty_captions_are_never_said(image_input: ImageInput, beam_size: int) -> None:
    """The model is bent towards exactly what must not be said; its own first choice would be `<end>`."""
    for seed in range(3):
        model = make_model(image_input, seed=seed)
        model.predict.bias[[PAD, START, UNK]] += 20
        model.predict.bias[END] += 25
        for caption in decode(model, make_images(5), beam_size=beam_size, max_tokens=6):
            assert caption.tokens
            assert min(caption.tokens) > UNK
            assert all(score > -100 for score in caption.token_scores)


@pytest.mark.parametrize("image_input", FORMS)
@pytest.mark.parametrize("beam_size", [1, 3, 40])
def test_where_nothing_ends_captions_are_cut_at_the_greatest_length(image_input: ImageInput, beam_size: int) -> None:
    model = make_model(image_input, seed=2)
    model.predict.bias[END] = -torch.inf
    image_BE = make_images(3)
    for caption, image_E in zip(decode(model, image_BE, beam_size=beam_size, max_tokens=3), image_BE, strict=True):
        assert len(caption.tokens) == len(caption.token_scores) == 3
        assert_same(caption, naive_beam_search(model, image_E, beam_size=beam_size, max_tokens=3))


@pytest.mark.parametrize("image_input", FORMS)
@pytest.mark.parametrize("beam_size", [1, 3])
def test_all_captions_may_end_at_once(image_input: ImageInput, beam_size: int) -> None:
    model, image_BE = make_model(image_input, seed=3, num_words=5), make_images(4)
    model.predict.bias[END] += 50
    for caption, image_E in zip(decode(model, image_BE, beam_size=beam_size, max_tokens=9), image_BE, strict=True):
        likeliest = max(allowed([], 9), key=lambda token: next_scores(model, image_E, [])[token])
        assert caption.tokens == [likeliest]
        assert len(caption.token_scores) == 2


@pytest.mark.parametrize("image_input", FORMS)
@pytest.mark.parametrize("max_tokens", [1, 2, 4])
@pytest.mark.parametrize("num_words", [1, 3])
def test_more_beams_than_words_are_harmless(image_input: ImageInput, max_tokens: int, num_words: int) -> None:
    """At first there are fewer possible beams than places; those that fill them must never become the caption."""
    for seed in range(3):
        model, image_BE = make_model(image_input, seed=seed, num_words=num_words), make_images(3, seed=seed)
        found = beam_search(model, image_BE, beam_size=30, max_tokens=max_tokens)
        for caption, image_E in zip(found, image_BE, strict=True):
            assert_same(caption, naive_beam_search(model, image_E, beam_size=30, max_tokens=max_tokens))


@pytest.mark.parametrize("image_input", FORMS)
@pytest.mark.parametrize("beam_size", [1, 3])
def test_scores_are_those_of_the_training_forward_pass(image_input: ImageInput, beam_size: int) -> None:
    model = make_model(image_input, seed=5, num_words=8)
    pictures = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    model.norm.momentum = 1.0  # one batch gives the statistics under which these pictures differ
    model.norm.weight.mul_(4)
    model.norm.train()
    model.encode(pictures)
    model.eval()
    found = decode(model, model.encode(pictures), beam_size=beam_size, max_tokens=6)
    assert len({round(caption.score, 3) for caption in found}) == len(pictures)
    for caption, picture in zip(found, pictures, strict=True):
        packed = PackedCaptions.pack([[caption.tokens]], max_tokens=6)
        scores_T = model(picture[None], packed).log_softmax(dim=1).gather(1, packed.targets_M[:, None])[:, 0]
        said = scores_T[: len(caption.token_scores)]
        assert sum(caption.token_scores) == pytest.approx(said.sum().item(), abs=1e-4)
        assert caption.score == pytest.approx(said.mean().item(), abs=1e-4)


@pytest.mark.parametrize("beam_size", [1, 3])
def test_no_images_give_no_captions(beam_size: int) -> None:
    model = make_model("first", seed=0)
    assert decode(model, make_images(0), beam_size=beam_size, max_tokens=5) == []
    assert len(decode(model, make_images(2), beam_size=beam_size, max_tokens=5)) == 2


@pytest.mark.parametrize(("beam_size", "max_tokens"), [(0, 5), (3, 0)])
def test_senseless_sizes_are_refused(beam_size: int, max_tokens: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        decode(make_model("first", seed=0), make_images(1), beam_size=beam_size, max_tokens=max_tokens)
