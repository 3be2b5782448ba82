"""Pictures to descriptions: caption, alt text, scores, confidence.

Shapes: B images, P sides of a view in pixels, F pooled features, E embedding width.
"""

import errno
import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from captioner.alt_text import alt_text
from captioner.errors import NotCalibratedError, UserError
from captioner.files import storage
from captioner.images.loading import ImageError
from captioner.images.views import normalise, read_eval_view
from captioner.model.bundle import Bundle
from captioner.model.decoding import GeneratedCaption, diverse

Precision = Literal["float32", "bfloat16"]
Picture = str | os.PathLike[str] | bytes | Image.Image | np.ndarray
LOW_CONFIDENCE, UNLIKE = "low confidence", "unlike training data"
MAX_LENGTH_PENALTY = 10.0
CPU_IMAGES = 4  # encoded at once: what is computed of more does not stay in a core's cache
IMAGES_AT_ONCE = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class Description:
    """What is said of a picture.

    `captions` has the best one, `caption`, first. `alt` is clean alt text, empty where the model abstains. `score` is
    the mean of `token_scores`, the log-probabilities (natural) of the caption's tokens and its end. `confidence` is the
    chance that the caption is as good as a person's, None without calibration; `review` says why a person should look.
    """

    caption: str
    captions: tuple[str, ...]
    alt: str
    score: float
    token_scores: tuple[float, ...]
    confidence: float | None
    review: str | None


@dataclass(frozen=True, slots=True)
class Encoded:
    """What the model sees in B pictures: embeddings (B, E), and whether each is unlike the training data."""

    image_BE: Tensor
    unlike: list[bool]


class Captioner:
    """Describes pictures with a model folder's model. May be called by several threads at once.

    `beam_size` and `length_penalty` None take the model folder's. With `abstain_below`, a caption of lower confidence
    leaves `alt` empty. Raises UserError for impossible numbers, and NotCalibratedError where that needs confidence.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        beam_size: int | None = None,
        length_penalty: float | None = None,
        captions_per_image: int = 1,
        abstain_below: float | None = None,
        precision: Precision = "float32",
    ) -> None:
        if min(1 if beam_size is None else beam_size, captions_per_image) < 1:
            raise UserError(
                f"a beam of {beam_size} and {captions_per_image} captions an image: give at least 1 of each"
            )
        if length_penalty is not None and not abs(length_penalty) <= MAX_LENGTH_PENALTY:
            raise UserError(f"a length penalty of {length_penalty}: give a number around 1")
        if abstain_below is not None and not 0 <= abstain_below <= 1:
            raise UserError(f"confidence is never below {abstain_below}: give a chance between 0 and 1")
        chosen: dict[str, Any] = {"beam_size": beam_size, "length_penalty": length_penalty}
        self.bundle = bundle
        self.decoding = replace(bundle.decoding, **{name: value for name, value in chosen.items() if value is not None})
        self.captions_per_image = captions_per_image
        self.abstain_below = abstain_below
        self.precision: Precision = precision
        calibration = bundle.calibration
        self.has_confidence = (
            calibration is not None and calibration.curve is not None and calibration.decoding == asdict(self.decoding)
        )
        if abstain_below is not None and not self.has_confidence:
            raise NotCalibratedError(self.decoding)

    def __call__(self, pictures: Iterable[Picture]) -> list[Description]:
        """What is said of each picture: a path, a URL, a file's bytes, a Pillow image, or an array (H, W, 3) of uint8.

        Images are turned as their EXIF block says, arrays are upright. Raises ImageError for a picture that cannot be
        used, TypeError for what is none, and OSError where a server or a disk fails.
        """
        if isinstance(pictures, str | bytes | os.PathLike | Image.Image):
            raise TypeError("give a list of pictures, be it of one")
        views = (read_eval_view(_read(picture), self.bundle.view)[0] for picture in pictures)
        found: list[Description] = []
        while group := list(islice(views, IMAGES_AT_ONCE)):
            found += self.describe_views(np.stack(group))
        return found

    def describe_views(self, views_BPP3: np.ndarray) -> list[Description]:
        """What is said of each evaluation view (B, P, P, 3), uint8."""
        return self.describe([self.encode(views_BPP3)])

    @torch.inference_mode()
    def encode(self, views_BPP3: np.ndarray) -> Encoded:
        """What the model sees in each evaluation view (B, P, P, 3), uint8; at least one."""
        bundle, calibration = self.bundle, self.bundle.calibration
        views = torch.from_numpy(views_BPP3)
        parts = views.split(CPU_IMAGES if bundle.device.type == "cpu" else len(views))
        with torch.autocast(bundle.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            features = [bundle.model.encoder(normalise(part.to(bundle.device), bundle.view)) for part in parts]
        features_BF = torch.cat(features).float()
        unlike = calibration.is_unlike(features_BF) if calibration else None
        return Encoded(bundle.model.encode(features_BF), unlike or [False] * len(views))

    @torch.inference_mode()
    def describe(self, encoded: Sequence[Encoded]) -> list[Description]:
        """What is said of each picture, in order."""
        calibration = self.bundle.calibration if self.has_confidence else None
        captions_of_images = diverse(
            self.bundle.model,
            torch.cat([part.image_BE for part in encoded]),
            num_captions=self.captions_per_image,
            **asdict(self.decoding),
        )
        scores = [captions[0].score for captions in captions_of_images]
        confidences = (calibration.confidence(scores) if calibration else None) or [None] * len(scores)
        unlike = chain.from_iterable(part.unlike for part in encoded)
        return list(map(self._describe, captions_of_images, confidences, unlike))

    def _describe(self, captions: Sequence[GeneratedCaption], confidence: float | None, unlike: bool) -> Description:
        texts = tuple(self.bundle.vocabulary.decode(caption.tokens) for caption in captions)
        unsure = confidence is not None and self.abstain_below is not None and confidence < self.abstain_below
        reasons = [reason for reason, holds in ((LOW_CONFIDENCE, unsure), (UNLIKE, unlike)) if holds]
        return Description(
            caption=texts[0],
            captions=texts,
            alt="" if unsure else alt_text(texts[0]),
            score=captions[0].score,
            token_scores=tuple(captions[0].token_scores),
            confidence=confidence,
            review=", ".join(reasons) or None,
        )


def _read(picture: Picture) -> bytes | Image.Image:
    """A file's bytes or an image, which go the same way from here on."""
    if isinstance(picture, bytes | Image.Image):
        return picture
    if isinstance(picture, np.ndarray):
        return _to_image(picture)
    if isinstance(picture, str | os.PathLike):
        return _read_file(os.fsdecode(picture))
    raise TypeError(
        f"{type(picture).__name__} is no picture: give a path, a URL, a file's bytes, a Pillow image or a NumPy array"
    )


def _to_image(pixels_HW3: np.ndarray) -> Image.Image:
    if pixels_HW3.dtype != np.uint8 or pixels_HW3.ndim != 3 or pixels_HW3.shape[2] != 3:
        found = f"{pixels_HW3.dtype} of shape {pixels_HW3.shape}"
        raise TypeError(f"an array of {found} is no picture: give uint8 of shape (height, width, 3)")
    if not pixels_HW3.size:
        raise ImageError("empty", f"an array of shape {pixels_HW3.shape} has no pixels")
    return Image.fromarray(np.ascontiguousarray(pixels_HW3))


def _read_file(location: str) -> bytes:
    try:
        if not storage.is_remote(location) and not stat.S_ISREG(Path(location).stat().st_mode):
            raise ImageError("special file", f"{location} is no regular file: give the pictures in a folder one by one")
        return storage.read_bytes(location)
    except FileNotFoundError as error:
        raise ImageError("missing", f"there is no file {location}") from error
    except ValueError as error:  # a name that no file can have
        raise ImageError("missing", f"there is no file {location!r}: {error}") from error
    except OSError as error:
        if error.errno not in (errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM):
            raise
        raise ImageError("unreadable", f"{error.strerror}: {location}") from error
