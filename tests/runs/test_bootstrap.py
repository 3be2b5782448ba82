"""Bootstrap intervals: that they cover, that they are the metrics' own scores, and that a figure is always the same."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from captioner.metrics import BleuCounts, ImageScores, References, corpus_scores
from train.evaluation.bootstrap import (
    RESAMPLES,
    Interval,
    bounds,
    interval_of,
    intervals,
    paired_intervals,
    resamples,
    weighted_scores,
    with_intervals,
)

WORDS = st.sampled_from(["a", "man", "rides", "the", "red", "wave"])
CAPTIONS = st.lists(WORDS, max_size=9).map(" ".join)
CORPORA = st.lists(st.tuples(CAPTIONS, CAPTIONS, st.lists(CAPTIONS, max_size=3)), min_size=1, max_size=5)


def scored(captions: list[str], references: list[list[str]]) -> list[ImageScores]:
    return list(References(dict(enumerate(references))).image_scores(dict(enumerate(captions))).values())


def test_intervals_of_a_mean_cover_it_in_95_of_100_cases() -> None:
    """400 samples of 200 skewed scores, whose true mean is 1."""
    scores_NK = np.random.default_rng(5).exponential(size=(200, 400))
    means_RK = np.stack([counts_N @ scores_NK for counts_N in resamples(200)]) / 200
    found = list(map(interval_of, means_RK.T))
    assert 0.92 < np.mean([low <= 1 <= high for low, high in found]) < 0.97
    widths = [high - low for low, high in found]
    assert np.mean(widths) == pytest.approx(2 * 1.96 / 200**0.5, rel=0.05)


def test_the_resamples_draw_as_many_images_as_there_are_and_are_always_the_same() -> None:
    drawn_RN = np.stack(list(resamples(50)))
    assert drawn_RN.shape == (RESAMPLES, 50)
    assert (drawn_RN.sum(axis=1) == 50).all()
    assert len({tuple(row) for row in drawn_RN.tolist()}) == RESAMPLES
    assert (drawn_RN == np.stack(list(resamples(50)))).all()


def test_a_score_that_all_images_have_is_certain() -> None:
    counts = BleuCounts(candidate_tokens=9, reference_tokens=10, guess=[9, 8, 7, 6], correct=[6, 4, 2, 1])
    images = [ImageScores(counts, rouge_l=0.3, cider=1.7)] * 30
    for name, (low, high) in intervals(images).items():
        assert (low, high) == pytest.approx((corpus_scores(images)[name],) * 2, rel=1e-12)


@settings(deadline=None)
@given(CORPORA)
def test_equal_weights_give_the_scores_of_the_corpus(corpus: list[tuple[str, str, list[str]]]) -> None:
    images = scored([caption for caption, _, _ in corpus], [references for _, _, references in corpus])
    expected = corpus_scores(images)
    found = {name: float(values_R[0]) for name, values_R in weighted_scores(images, [np.ones(len(images))]).items()}
    assert found["bleu4"] == expected["bleu4"]
    assert found == pytest.approx({name: expected[name] for name in found}, rel=1e-12, abs=1e-12)


@settings(deadline=None)
@given(CORPORA, st.data())
def test_a_resample_has_the_scores_of_its_images(corpus: list[tuple[str, str, list[str]]], data: st.DataObject) -> None:
    """An image that is drawn twice counts like two images."""
    images = scored([caption for caption, _, _ in corpus], [references for _, _, references in corpus])
    drawn = data.draw(st.lists(st.integers(0, len(images) - 1), min_size=len(images), max_size=len(images)))
    expected = corpus_scores([images[number] for number in drawn])
    for name, values_R in weighted_scores(images, [np.bincount(drawn, minlength=len(images))]).items():
        assert values_R[0] == pytest.approx(expected[name], rel=1e-12, abs=1e-12)


@settings(deadline=None, max_examples=5)
@given(CORPORA)
def test_paired_differences_change_their_sign_with_the_order(corpus: list[tuple[str, str, list[str]]]) -> None:
    firsts, seconds, references = map(list, zip(*corpus, strict=True))
    images, others = scored(firsts, references), scored(seconds, references)
    assert set(paired_intervals(images, images).values()) == {Interval(0, 0)}
    opposite = paired_intervals(others, images)
    for name, (low, high) in paired_intervals(images, others).items():
        assert opposite[name] == (-high, -low)


def test_a_pair_is_compared_on_the_same_resamples() -> None:
    """Each caption scores 0.01 more than the other's; how the images differ does not matter."""
    counts = BleuCounts(1, 1, [1, 0, 0, 0], [1, 0, 0, 0])
    scores = np.random.default_rng(1).random(200)
    others = [ImageScores(counts, rouge_l=0.5, cider=float(score)) for score in scores]
    images = [ImageScores(counts, rouge_l=0.5, cider=float(score) + 0.01) for score in scores]
    assert paired_intervals(images, others)["cider"] == pytest.approx((0.01, 0.01))
    low, high = intervals(images)["cider"]
    assert high - low > 0.05


@pytest.mark.parametrize(
    ("interval", "excludes"), [((0.1, 0.2), True), ((-0.2, -0.1), True), ((-0.1, 0.1), False), ((0, 0.1), False)]
)
def test_an_interval_excludes_zero_if_both_bounds_are_on_one_side(
    interval: tuple[float, float], excludes: bool
) -> None:
    assert Interval(*interval).excludes_zero == excludes


def test_bounds_among_metrics_are_read_back() -> None:
    found = {"cider": Interval(0.4, 0.5)}
    metrics = {"loss": 2.0, "cider": 0.45, **bounds(found), "ebb_low": 1.0}
    assert with_intervals(metrics) == {"loss": (2.0, None), "cider": (0.45, found["cider"]), "ebb_low": (1.0, None)}
