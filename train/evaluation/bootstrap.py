"""How sure a corpus score is: bootstrap intervals over images (Efron, 1979). Imports no torch.

A resample draws as many images as there are, with replacement; a 95 % interval is the range of a score over 1,000
resamples without the 25 lowest and the 25 highest. The resamples of N images are always the same, so a figure is, too,
and two models' scores on the same images can be compared resample by resample (Koehn, EMNLP 2004).

CIDEr keeps the document frequencies of all images, so that it stays a mean over images. An interval says how a score
varies with the images; it says nothing about another training seed. With few images, below about 100, it is too narrow.

Shapes: N images, K columns, R resamples.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from captioner.metrics import BleuCounts, ImageScores, bleu_scores

RESAMPLES = 1000
LEFT_OUT = RESAMPLES // 40  # at each end: 2.5 %
SEED = 0
LOW, HIGH = "_low", "_high"  # suffixes of the bounds' names among metrics


class Interval(NamedTuple):
    """A 95 % interval, bounds included."""

    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether both bounds are on the same side of 0."""
        return self.low > 0 or self.high < 0


def interval_of(values_R: np.ndarray) -> Interval:
    """The interval of a score with these values in the R resamples."""
    ordered_R = np.sort(values_R)
    return Interval(float(ordered_R[LEFT_OUT]), float(ordered_R[-1 - LEFT_OUT]))


def resamples(num_images: int) -> Iterator[np.ndarray]:
    """How often each image is drawn (N,) in each of the R resamples."""
    generator = np.random.default_rng(SEED)
    for _ in range(RESAMPLES):
        yield np.bincount(generator.integers(num_images, size=num_images), minlength=num_images)


def weighted_scores(images: Collection[ImageScores], weights: Iterable[np.ndarray]) -> dict[str, np.ndarray]:
    """`bleu4`, `rouge_l` and `cider`, (R,) each, of the images with each of R weights (N,), which sum to N."""
    table_NK = np.array([(*counts[:2], *counts.guess, *counts.correct, *scores) for counts, *scores in images])
    sums_RK = np.stack([weights_N @ table_NK for weights_N in weights])
    sums_of_counts = (BleuCounts(row[0], row[1], row[2:6], row[6:10]) for row in sums_RK.tolist())
    return {
        "bleu4": np.array([bleu_scores(counts)["bleu4"] for counts in sums_of_counts]),
        "rouge_l": sums_RK[:, 10] / len(images),
        "cider": sums_RK[:, 11] / len(images),
    }


def intervals(images: Collection[ImageScores]) -> dict[str, Interval]:
    """The intervals of `bleu4`, `rouge_l` and `cider`."""
    return {name: interval_of(values_R) for name, values_R in weighted_scores(images, resamples(len(images))).items()}


def paired_intervals(images: Collection[ImageScores], others: Collection[ImageScores]) -> dict[str, Interval]:
    """The intervals of the differences of these scores, first less second, of the same images in the same order."""
    firsts, seconds = (weighted_scores(each, resamples(len(each))) for each in (images, others))
    return {name: interval_of(firsts[name] - seconds[name]) for name in firsts}


# ---- among metrics --------------------------------------------------------------------------------------------


def bounds(found: Mapping[str, Interval]) -> dict[str, float]:
    """The bounds as metrics: `cider_low`, `cider_high` and so on."""
    return {name + suffix: bound for name, own in found.items() for suffix, bound in zip((LOW, HIGH), own, strict=True)}


def with_intervals(metrics: Mapping[str, float]) -> dict[str, tuple[float, Interval | None]]:
    """Each metric's value and, where `metrics` has its bounds, its interval; bounds are no metrics of their own."""
    found = {
        name: Interval(metrics[name + LOW], metrics[name + HIGH])
        for name in metrics
        if {name + LOW, name + HIGH} <= metrics.keys()
    }
    return {name: (value, found.get(name)) for name, value in metrics.items() if name not in bounds(found)}
