"""How sure a caption is, and whether a picture is like those the model knows: measured once, kept in the model folder.

`calibration.json` · `calibration.safetensors`

Confidence is the chance that a caption is good, as a function of its score: isotonic regression. A picture is unlike
the training data where its features are improbable under a Gaussian that was fitted to validation pictures:
probabilistic PCA (Tipping and Bishop, 1999) of their square roots scaled to length 1. Unscaled, charts and text would
pass for photos: their features are small, and so near the mean.

Shapes: N captions, B pictures, F features of a picture, K principal directions.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors.numpy import save as save_arrays
from safetensors.torch import load as load_tensors
from torch import Tensor
from torch.nn.functional import normalize

from captioner.shards.content import content_sha256

FORMAT_VERSION = 1
FEWEST_PICTURES = 100  # fewer tell too little
NUM_FOLDS = 5
NUM_BINS = 10
MOST_DIRECTIONS = 64
PICTURES_A_DIRECTION = 16  # directions fitted to fewer suit these pictures only
FAMILIAR_SHARE = 0.99  # of validation pictures
SMALLEST_VARIANCE = 1e-9  # of a direction, where vectors have length 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Bin:
    """Captions of like confidence: the mean of it, the share that was good, and how many they are."""

    confidence: float
    good: float
    num_captions: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Reliability:
    """How far confidences can be trusted, found on captions that they were not fitted to.

    `calibration_error` is the mean distance of confidence and share of good ones over bins of equally many captions.
    """

    num_captions: int
    calibration_error: float
    brier_score: float
    auroc: float
    bins: tuple[Bin, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """The chance that a caption is good by its score: straight between these points, level beyond them."""

    scores: tuple[float, ...]
    chances: tuple[float, ...]

    def __post_init__(self) -> None:
        if not (
            all(map(math.isfinite, self.scores))
            and list(self.scores) == sorted(set(self.scores))
            and list(self.chances) == sorted(self.chances)
            and 0 <= self.chances[0] <= self.chances[-1] <= 1
            and len(self.scores) == len(self.chances)
        ):
            raise ValueError("the confidence does not rise with the score from 0 to 1")

    def __call__(self, scores_N: Sequence[float] | np.ndarray) -> np.ndarray:
        """The chances (N) at these scores."""
        return np.asarray(np.interp(scores_N, self.scores, self.chances))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FeatureSpace:
    """Where features of known pictures lie: a Gaussian with K directions of their own variance, the others alike."""

    mean_F: Tensor
    directions_KF: Tensor
    variances_K: Tensor
    rest_variance: Tensor
    threshold: Tensor

    def distances(self, features_BF: Tensor) -> Tensor:
        """Squared Mahalanobis distances (B) from the known pictures, on the space's device."""
        from_mean_BF = _direction(features_BF) - self.mean_F
        along_BK = from_mean_BF @ self.directions_KF.T
        outside_B = (from_mean_BF.square().sum(dim=1) - along_BK.square().sum(dim=1)).clamp_min(0)
        return (along_BK.square() / self.variances_K).sum(dim=1) + outside_B / self.rest_variance

    def to(self, device: torch.device | str) -> "FeatureSpace":
        """The same space on `device`."""
        return FeatureSpace(**{name: getattr(self, name).to(device) for name in FeatureSpace.__slots__})


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """What was measured for captions decoded in float32 as `decoding` says, the fields of `DecodingDefaults`.

    `curve` and `reliability` are None together, where there were too few captions, or all alike; `space` where there
    were too few pictures.
    """

    decoding: dict[str, Any]
    curve: Curve | None = None
    reliability: Reliability | None = None
    space: FeatureSpace | None = None

    def __str__(self) -> str:
        pictures = "pictures unlike the val split's will be noticed"
        if self.space is None:
            pictures = f"fewer than {FEWEST_PICTURES} pictures, so others unlike them will not be noticed"
        if self.reliability is None:
            few = f"fewer than {FEWEST_PICTURES} captions with two references, or none good, or none bad"
            return f"no confidence ({few}), {pictures}"
        found = self.reliability
        return (
            f"confidence with calibration error {found.calibration_error:.3f} and AUROC {found.auroc:.3f} on "
            f"{found.num_captions:,} captions, {pictures}"
        )

    @property
    def fingerprint(self) -> str:
        """Tells it from other calibrations."""
        return content_sha256(json.dumps(_content(self)), _arrays(self))[:12]

    def confidence(self, scores: Sequence[float]) -> list[float] | None:
        """For each caption's score the chance, 0 to 1, that it is good; None where that is not known."""
        return None if self.curve is None else self.curve(scores).tolist()

    def is_unlike(self, features_BF: Tensor) -> list[bool] | None:
        """For each picture's encoder features whether it is unlike the training data; None where that is not known.

        The features are on the calibration's device.
        """
        if self.space is None:
            return None
        return (self.space.distances(features_BF) > self.space.threshold).tolist()

    def to(self, device: torch.device | str) -> "Calibration":
        """The same calibration, for features on `device`."""
        return replace(self, space=self.space and self.space.to(device))


# ---- confidence -----------------------------------------------------------------------------------------------


def isotonic(values_N: np.ndarray, weights_N: np.ndarray) -> np.ndarray:
    """The non-decreasing numbers (N) nearest to the values in weighted squares: pool adjacent violators."""
    blocks: list[tuple[float, float, int]] = []  # value, weight, length
    for own_value, own_weight in zip(values_N.tolist(), weights_N.tolist(), strict=True):
        value, weight, length = own_value, own_weight, 1
        while blocks and blocks[-1][0] >= value:
            before, more, longer = blocks.pop()
            value = (before * more + value * weight) / (more + weight)
            weight, length = weight + more, length + longer
        blocks.append((value, weight, length))
    return np.repeat([value for value, _, _ in blocks], [length for _, _, length in blocks])


def fit_curve(scores_N: np.ndarray, good_N: np.ndarray) -> Curve:
    """Isotonic regression of good (0 or 1) on score; each level piece is a point of the curve, at its mean score.

    One good and one bad caption are added at both ends, so that a few captions there make no chance 0 or 1.
    """
    ends = [scores_N.min(), scores_N.min(), scores_N.max(), scores_N.max()]
    scores, place, counts = np.unique(np.append(scores_N, ends), return_inverse=True, return_counts=True)
    shares = np.bincount(place, weights=np.append(good_N, [0, 1, 0, 1])) / counts
    chances, piece = np.unique(isotonic(shares, counts), return_inverse=True)
    middles = np.bincount(piece, weights=scores * counts) / np.bincount(piece, weights=counts)
    return Curve(scores=tuple(middles.tolist()), chances=tuple(chances.tolist()))


def fit_confidence(scores: Sequence[float], good: Sequence[bool]) -> tuple[Curve, Reliability] | None:
    """The confidence of captions with these scores, N each, and how far it can be trusted.

    None for fewer than FEWEST_PICTURES captions, where all are good or none is, or where a score is no number.
    """
    scores_N, good_N = np.array(scores, dtype=float), np.array(good, dtype=float)
    if len(scores) < FEWEST_PICTURES or len(np.unique(good_N)) < 2 or not np.isfinite(scores_N).all():
        return None
    fold_N, confidences_N = np.arange(len(scores_N)) % NUM_FOLDS, np.empty_like(scores_N)
    for fold in range(NUM_FOLDS):
        own_N = fold_N == fold
        confidences_N[own_N] = fit_curve(scores_N[~own_N], good_N[~own_N])(scores_N[own_N])
    return fit_curve(scores_N, good_N), measure_reliability(confidences_N, good_N)


def measure_reliability(confidences_N: np.ndarray, good_N: np.ndarray) -> Reliability:
    """Compare confidences with what was good (0 or 1); there are both."""
    parts = np.array_split(np.argsort(confidences_N, kind="stable"), NUM_BINS)
    bins = tuple(
        Bin(
            confidence=float(confidences_N[part].mean()),
            good=float(good_N[part].mean()),
            num_captions=len(part),
        )
        for part in parts
    )
    error = sum(part.num_captions * abs(part.confidence - part.good) for part in bins) / len(good_N)
    bad, right = np.sort(confidences_N[good_N == 0]), confidences_N[good_N == 1]
    below = (np.searchsorted(bad, right, side="left") + np.searchsorted(bad, right, side="right")) / 2  # a tie: half
    return Reliability(
        num_captions=len(good_N),
        calibration_error=error,
        brier_score=float(np.square(confidences_N - good_N).mean()),
        auroc=float(below.mean() / len(bad)),
        bins=bins,
    )


# ---- known pictures -------------------------------------------------------------------------------------------


def fit_space(features_BF: Tensor) -> FeatureSpace | None:
    """Where the features of known pictures lie; None for fewer than FEWEST_PICTURES.

    The threshold is a quantile of the distance of each half from a fit to the other half.
    """
    if len(features_BF) < FEWEST_PICTURES:
        return None
    num_directions = min(MOST_DIRECTIONS, len(features_BF) // PICTURES_A_DIRECTION, features_BF.shape[1] - 1)
    even, odd = features_BF[::2], features_BF[1::2]
    pairs = ((even, odd), (odd, even))
    distances = torch.cat([_fit(half, num_directions=num_directions).distances(other) for half, other in pairs])
    space = _fit(features_BF, num_directions=num_directions)
    space.threshold.copy_(torch.quantile(distances, FAMILIAR_SHARE))
    return space


def _fit(features_BF: Tensor, *, num_directions: int) -> FeatureSpace:
    """Probabilistic PCA, its threshold not set yet."""
    unit_BF = _direction(features_BF)
    mean_F = unit_BF.mean(dim=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the search for the directions starts at random ones
        _, spread_K, directions_FK = torch.svd_lowrank(unit_BF - mean_F, q=num_directions, niter=8)
    variances_K = spread_K.square() / (len(unit_BF) - 1)
    num_others = unit_BF.shape[1] - num_directions
    rest = (unit_BF.var(dim=0).sum() - variances_K.sum()) / num_others
    return FeatureSpace(
        mean_F=mean_F,
        directions_KF=directions_FK.T.contiguous(),
        variances_K=variances_K.clamp_min(SMALLEST_VARIANCE),
        rest_variance=rest.clamp_min(SMALLEST_VARIANCE),
        threshold=torch.zeros(()),
    )


def _direction(features_BF: Tensor) -> Tensor:
    features_BF = features_BF.float()
    return normalize(features_BF.sign() * features_BF.abs().sqrt(), dim=1)


# ---- files ----------------------------------------------------------------------------------------------------


def to_files(calibration: Calibration, *, model: str) -> tuple[bytes, bytes]:
    """The contents of `calibration.json` and `calibration.safetensors`; `model` is the name of the weights."""
    arrays = save_arrays(_arrays(calibration))
    content = {
        "format_version": FORMAT_VERSION,
        "model": model,
        "arrays_sha256": hashlib.sha256(arrays).hexdigest(),
        **_content(calibration),
    }
    return json.dumps(content, indent=1, allow_nan=False).encode(), arrays


def _content(calibration: Calibration) -> dict[str, Any]:
    """All but the arrays."""
    return {
        "decoding": calibration.decoding,
        "curve": calibration.curve and asdict(calibration.curve),
        "reliability": calibration.reliability and asdict(calibration.reliability),
    }


def _arrays(calibration: Calibration) -> dict[str, np.ndarray]:
    names = () if calibration.space is None else FeatureSpace.__slots__
    return {name: getattr(calibration.space, name).cpu().numpy() for name in names}


def from_files(text: bytes, arrays: bytes, *, model: str) -> Calibration:
    """The calibration in the contents of both files. Raises ValueError where they are damaged, or of another model."""
    try:
        content = json.loads(text)
        wanted = {
            "format_version": FORMAT_VERSION,
            "model": model,
            "arrays_sha256": hashlib.sha256(arrays).hexdigest(),
        }
        differing = [name for name in wanted if content[name] != wanted[name]]
        if differing:
            raise ValueError(f"its {differing[0]} is {content[differing[0]]}, not {wanted[differing[0]]}")
        tensors, curve, reliability = load_tensors(arrays), content["curve"], content["reliability"]
        return Calibration(
            decoding=dict(content["decoding"]),
            curve=curve and Curve(scores=tuple(curve["scores"]), chances=tuple(curve["chances"])),
            reliability=reliability and _read_reliability(reliability),
            space=FeatureSpace(**tensors) if tensors else None,
        )
    except (KeyError, IndexError, TypeError, safetensors.SafetensorError) as error:
        raise ValueError(repr(error)) from error


def _read_reliability(content: dict[str, Any]) -> Reliability:
    return Reliability(**content | {"bins": tuple(Bin(**part) for part in content["bins"])})
