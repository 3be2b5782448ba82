"""Confidence of captions, and detection of out-of-distribution images: fitted on a validation split.

The model folder holds it as `calibration.json` and `calibration.safetensors`. Only fitting it, and reading it for a
device, imports torch.

Confidence is the probability that a caption is good, as a function of its score: isotonic regression. An image is out
of distribution if its features are improbable under a Gaussian that was fitted to validation images: probabilistic PCA
(Tipping and Bishop, 1999) of their square roots, scaled to length 1. Without scaling, charts and text would look like
photos: their features are small, and so near the mean.

Shapes: N captions, B images, F features of an image, K principal directions.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from captioner.errors import UserError
from captioner.files import storage
from captioner.shards.content import content_sha256

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FORMAT_VERSION = 1
CALIBRATION, CALIBRATION_ARRAYS = "calibration.json", "calibration.safetensors"
MIN_IMAGES = 100
NUM_FOLDS = 5
NUM_BINS = 10
MAX_DIRECTIONS = 64
IMAGES_PER_DIRECTION = 16  # with fewer images a direction overfits
THRESHOLD_QUANTILE = 0.99  # of validation images' distances
MIN_VARIANCE = 1e-9  # of a direction of vectors of length 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Reliability:
    """Calibration metrics of confidences, on captions that they were not fitted to.

    `bins` are groups of equal size, of captions with similar confidence: the mean `confidence`, the fraction of `good`
    captions, and `num_captions`. `calibration_error` is the mean absolute difference of the first two, over captions.
    """

    num_captions: int
    calibration_error: float
    brier_score: float
    auroc: float
    bins: list[dict[str, float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class ConfidenceCurve:
    """The probability that a caption is good, as a function of its score.

    It is linear between the points (`scores`, `chances`), and constant beyond the first and the last one.
    """

    scores: tuple[float, ...]
    chances: tuple[float, ...]

    def __call__(self, scores_N: Sequence[float] | np.ndarray) -> np.ndarray:
        """The probabilities (N) at these scores."""
        return np.asarray(np.interp(scores_N, self.scores, self.chances))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FeatureSpace:
    """A Gaussian of validation images' features: K directions with a variance each, one variance for all others.

    Images at more than the `threshold`, a squared distance, are out of distribution. All five are tensors on one
    device, or all are NumPy arrays.
    """

    mean_F: Any
    directions_KF: Any
    variances_K: Any
    rest_variance: Any
    threshold: Any

    def distances(self, features_BF: Any) -> Any:
        """Squared Mahalanobis distances (B) of features from the mean; the features are what the space's fields are."""
        from_mean_BF = _unit(features_BF) - self.mean_F
        along_BK = from_mean_BF @ self.directions_KF.T
        outside_B = ((from_mean_BF**2).sum(axis=1) - (along_BK**2).sum(axis=1)).clip(min=0)
        return (along_BK**2 / self.variances_K).sum(axis=1) + outside_B / self.rest_variance


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """The fits for captions decoded in float32 with the settings `decoding`, the fields of `DecodingDefaults`.

    `curve` and `reliability` are both None if there were too few captions, or all or none of them good; `space` is None
    if there were too few images.
    """

    decoding: dict[str, Any]
    curve: ConfidenceCurve | None = None
    reliability: Reliability | None = None
    space: FeatureSpace | None = None

    def __str__(self) -> str:
        images = "images unlike the val split's will be flagged"
        if self.space is None:
            images = f"images unlike the val split's will not be flagged: it has fewer than {MIN_IMAGES}"
        if self.reliability is None:
            few = f"fewer than {MIN_IMAGES} captions with two references, or none good, or none bad"
            return f"no confidence ({few}), {images}"
        metrics = self.reliability
        return (
            f"confidence with calibration error {metrics.calibration_error:.3f} and AUROC {metrics.auroc:.3f} on "
            f"{metrics.num_captions:,} captions, {images}"
        )

    @property
    def fingerprint(self) -> str:
        """A hash of the content."""
        return content_sha256(json.dumps(_content(self)), _arrays(self))[:12]

    def confidence(self, scores: Sequence[float]) -> list[float] | None:
        """The probability, 0 to 1, that each caption with these scores is good; None without a curve."""
        return None if self.curve is None else self.curve(scores).tolist()

    def is_out_of_distribution(self, features_BF: Any) -> list[bool] | None:
        """Whether each of B images, given by its float32 features, is; None if there is no space.

        Features are on the space's device, or a NumPy array if the calibration was read for no device.
        """
        if self.space is None:
            return None
        return (self.space.distances(features_BF) > self.space.threshold).tolist()


# ---- confidence -----------------------------------------------------------------------------------------------


def isotonic(values_N: np.ndarray, weights_N: np.ndarray) -> np.ndarray:
    """The non-decreasing sequence (N) with the least weighted squared error, by pooling adjacent violators."""
    blocks: list[tuple[float, float, int]] = []  # value, weight, length
    for own_value, own_weight in zip(values_N.tolist(), weights_N.tolist(), strict=True):
        value, weight, length = own_value, own_weight, 1
        while blocks and blocks[-1][0] >= value:
            last_value, last_weight, last_length = blocks.pop()
            value = (last_value * last_weight + value * weight) / (last_weight + weight)
            weight, length = weight + last_weight, length + last_length
        blocks.append((value, weight, length))
    return np.repeat([value for value, _, _ in blocks], [length for _, _, length in blocks])


def fit_curve(scores_N: np.ndarray, good_N: np.ndarray) -> ConfidenceCurve:
    """Isotonic regression of good (0 or 1) on score; each constant piece is a point of the curve, at its mean score.

    One good and one bad caption are added at each end, so that a few captions there do not give probability 0 or 1.
    """
    ends = [scores_N.min(), scores_N.min(), scores_N.max(), scores_N.max()]
    scores, inverse, counts = np.unique(np.append(scores_N, ends), return_inverse=True, return_counts=True)
    fractions = np.bincount(inverse, weights=np.append(good_N, [0, 1, 0, 1])) / counts
    chances, piece = np.unique(isotonic(fractions, counts), return_inverse=True)
    middles = np.bincount(piece, weights=scores * counts) / np.bincount(piece, weights=counts)
    return ConfidenceCurve(scores=tuple(middles.tolist()), chances=tuple(chances.tolist()))


def fit_confidence(scores: Sequence[float], good: Sequence[bool]) -> tuple[ConfidenceCurve, Reliability] | None:
    """The curve fitted to all captions, and its cross-validated reliability.

    None for fewer than MIN_IMAGES captions, if all or none of them are good, or if a score is not finite.
    """
    scores_N, good_N = np.array(scores, dtype=float), np.array(good, dtype=float)
    if len(scores) < MIN_IMAGES or len(np.unique(good_N)) < 2 or not np.isfinite(scores_N).all():
        return None
    fold_N, confidences_N = np.arange(len(scores_N)) % NUM_FOLDS, np.empty_like(scores_N)
    for fold in range(NUM_FOLDS):
        is_held_out_N = fold_N == fold
        curve = fit_curve(scores_N[~is_held_out_N], good_N[~is_held_out_N])
        confidences_N[is_held_out_N] = curve(scores_N[is_held_out_N])
    return fit_curve(scores_N, good_N), measure_reliability(confidences_N, good_N)


def measure_reliability(confidences_N: np.ndarray, good_N: np.ndarray) -> Reliability:
    """The reliability of the confidences of captions that are good (1) or bad (0), with at least one of each."""
    groups = np.array_split(np.argsort(confidences_N, kind="stable"), NUM_BINS)
    bins = [
        {
            "confidence": float(confidences_N[group].mean()),
            "good": float(good_N[group].mean()),
            "num_captions": len(group),
        }
        for group in groups
    ]
    error = sum(each["num_captions"] * abs(each["confidence"] - each["good"]) for each in bins) / len(good_N)
    bad, good = np.sort(confidences_N[good_N == 0]), confidences_N[good_N == 1]
    below = (
        np.searchsorted(bad, good, side="left") + np.searchsorted(bad, good, side="right")
    ) / 2  # a tie counts half
    return Reliability(
        num_captions=len(good_N),
        calibration_error=error,
        brier_score=float(np.square(confidences_N - good_N).mean()),
        auroc=float(below.mean() / len(bad)),
        bins=bins,
    )


# ---- out-of-distribution images -----------------------------------------------------------------------------


def fit_space(features_BF: "Tensor") -> FeatureSpace | None:
    """The Gaussian of validation images' features; None for fewer than MIN_IMAGES images.

    Its threshold is a quantile of the distances of each half of the images from a fit to the other half.
    """
    import torch

    if len(features_BF) < MIN_IMAGES:
        return None
    features_BF = features_BF.float()
    num_directions = min(MAX_DIRECTIONS, len(features_BF) // IMAGES_PER_DIRECTION, features_BF.shape[1] - 1)
    even, odd = features_BF[::2], features_BF[1::2]
    pairs = ((even, odd), (odd, even))
    distances = torch.cat([_fit(half, num_directions=num_directions).distances(other) for half, other in pairs])
    space = _fit(features_BF, num_directions=num_directions)
    space.threshold.copy_(torch.quantile(distances, THRESHOLD_QUANTILE))
    return space


def _fit(features_BF: "Tensor", *, num_directions: int) -> FeatureSpace:
    """Probabilistic PCA with `num_directions` directions, and the threshold 0."""
    import torch

    unit_BF = _unit(features_BF)
    mean_F = unit_BF.mean(dim=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # svd_lowrank starts from random directions
        _, spread_K, directions_FK = torch.svd_lowrank(unit_BF - mean_F, q=num_directions, niter=8)
    variances_K = spread_K.square() / (len(unit_BF) - 1)
    num_others = unit_BF.shape[1] - num_directions
    rest = (unit_BF.var(dim=0).sum() - variances_K.sum()) / num_others
    return FeatureSpace(
        mean_F=mean_F,
        directions_KF=directions_FK.T.contiguous(),
        variances_K=variances_K.clamp_min(MIN_VARIANCE),
        rest_variance=rest.clamp_min(MIN_VARIANCE),
        threshold=torch.zeros(()),
    )


def _unit(features_BF: Any) -> Any:
    """The square roots of the features, with their signs, scaled to length 1 (B, F)."""
    roots_BF = (2 * (features_BF > 0) - 1) * abs(features_BF) ** 0.5
    lengths_B1 = (roots_BF**2).sum(axis=1)[:, None] ** 0.5
    return roots_BF / lengths_B1.clip(min=1e-12)


# ---- files ----------------------------------------------------------------------------------------------------


def to_files(calibration: Calibration, *, model: str) -> tuple[bytes, bytes]:
    """The contents of `calibration.json` and `calibration.safetensors`; `model` is the name of the weights."""
    arrays = save_arrays(_arrays(calibration))
    content = _identity(arrays, model=model) | _content(calibration)
    return json.dumps(content, indent=1, allow_nan=False).encode(), arrays


def _identity(arrays: bytes, *, model: str) -> dict[str, Any]:
    return {"format_version": FORMAT_VERSION, "model": model, "arrays_sha256": hashlib.sha256(arrays).hexdigest()}


def _content(calibration: Calibration) -> dict[str, Any]:
    return {
        "decoding": calibration.decoding,
        "curve": calibration.curve and asdict(calibration.curve),
        "reliability": calibration.reliability and asdict(calibration.reliability),
    }


def _arrays(calibration: Calibration) -> dict[str, np.ndarray]:
    names = () if calibration.space is None else FeatureSpace.__slots__
    values = {name: getattr(calibration.space, name) for name in names}
    return {name: value if isinstance(value, np.ndarray) else value.cpu().numpy() for name, value in values.items()}


def read_calibration(
    folder: str, *, model: str, device: "torch.device | str | None", remedy: str
) -> Calibration | None:
    """The calibration in a model folder, a path or a URL, of the weights called `model`; None if there is none.

    For features on `device`, or in NumPy arrays if it is None. Raises UserError, ending with `remedy`, if it does not
    fit.
    """
    location = storage.join(folder, CALIBRATION)
    if not storage.exists(location):
        return None
    names = (CALIBRATION, CALIBRATION_ARRAYS)
    files = [storage.read_required(storage.join(folder, name), remedy=remedy) for name in names]
    try:
        return from_files(*files, model=model, device=device)
    except ValueError as error:
        raise UserError(f"{location} does not fit this model folder ({error}): {remedy}") from error


def from_files(text: bytes, arrays: bytes, *, model: str, device: "torch.device | str | None" = "cpu") -> Calibration:
    """The calibration in the contents of both files, for features on `device`, or in NumPy arrays if it is None.

    Raises ValueError if they are damaged, or belong to another model.
    """
    try:
        content = json.loads(text)
        for name, wanted in _identity(arrays, model=model).items():
            if content[name] != wanted:
                raise ValueError(f"its {name} is {content[name]}, not {wanted}")
        fields, curve, reliability = load_arrays(arrays), content["curve"], content["reliability"]
        return Calibration(
            decoding=dict(content["decoding"]),
            curve=curve and ConfidenceCurve(scores=tuple(curve["scores"]), chances=tuple(curve["chances"])),
            reliability=reliability and Reliability(**reliability),
            space=FeatureSpace(**(fields if device is None else _on_device(fields, device))) if fields else None,
        )
    except (KeyError, IndexError, TypeError, safetensors.SafetensorError) as error:
        raise ValueError(repr(error)) from error


def _on_device(arrays: dict[str, np.ndarray], device: "torch.device | str") -> "dict[str, Tensor]":
    import torch

    return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
