"""Images to descriptions: caption, alt text, scores, confidence. Imports no torch.

Shapes: B images, P sides of a view in pixels.
"""

import errno
import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from captioner.alt_text import alt_text
from captioner.attention import Attention
from captioner.errors import NoAttentionError, NotCalibratedError, UserError
from captioner.files import storage
from captioner.images.loading import ImageError
from captioner.images.views import read_eval_view
from captioner.model.generated import GeneratedCaption

if TYPE_CHECKING:
    from captioner.model.bundle import Bundle
    from captioner.model.onnx import OnnxBundle

Precision = Literal["float32", "bfloat16"]
ImageSource = str | os.PathLike[str] | bytes | Image.Image | np.ndarray
LOW_CONFIDENCE, OUT_OF_DISTRIBUTION = "low confidence", "unlike training data"
BATCH_SIZE = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class Description:
    """The captions of an image with their scores.

    `captions` has the best one, `caption`, first. `alt` is empty if the model abstains. `score` is the mean of
    `token_scores`, the log-probabilities (natural) of the caption's tokens and its end. `confidence` is the probability
    that the caption is as good as a person's, None without calibration; `review` says why a person should look.
    `attention` is where the words of `caption` looked, None unless it was asked for.
    """

    caption: str
    captions: tuple[str, ...]
    alt: str
    score: float
    token_scores: tuple[float, ...]
    confidence: float | None
    review: str | None
    attention: Attention | None = None


@dataclass(frozen=True, slots=True)
class Encoded:
    """B encoded images, as the bundle's `encode` returns them, and whether each is out of distribution."""

    images: Any
    out_of_distribution: list[bool]


class Captioner:
    """Describes images with the model of a model folder or an ONNX folder. May be called by several threads at once.

    `beam_size` and `length_penalty` default to the model folder's. A caption of lower confidence than `abstain_below`
    has no `alt`. Raises UserError for invalid numbers, NotCalibratedError for `abstain_below` without confidence, and
    NoAttentionError for `with_attention` of a model without attention.
    """

    def __init__(
        self,
        bundle: "Bundle | OnnxBundle",
        *,
        beam_size: int | None = None,
        length_penalty: float | None = None,
        captions_per_image: int = 1,
        abstain_below: float | None = None,
        precision: Precision = "float32",
        with_attention: bool = False,
    ) -> None:
        if captions_per_image < 1:
            raise UserError(f"{captions_per_image} captions an image: give at least 1")
        if abstain_below is not None and not 0 <= abstain_below <= 1:
            raise UserError(f"confidence is never below {abstain_below}: give a probability between 0 and 1")
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
        self._grid = bundle.grid if with_attention else None
        if with_attention and self._grid is None:
            raise NoAttentionError

    def __call__(self, images: Iterable[ImageSource]) -> list[Description]:
        """Describe images: paths, URLs, files' bytes, Pillow images, or arrays (H, W, 3) of uint8.

        The EXIF orientation is applied; arrays are upright. Raises ImageError for an image that cannot be used,
        TypeError for another type, and OSError if a server or a disk fails.
        """
        if isinstance(images, str | bytes | os.PathLike | Image.Image):
            raise TypeError("give a list of images, even of one")
        bundle = self.bundle
        views = (read_eval_view(_read(image), bundle.view, with_torch=bundle.uses_torch)[0] for image in images)
        found: list[Description] = []
        while group := list(islice(views, BATCH_SIZE)):
            found += self.describe_views(np.stack(group))
        return found

    def describe_views(self, views_BPP3: np.ndarray) -> list[Description]:
        """Describe evaluation views (B, P, P, 3), uint8."""
        return self.describe([self.encode(views_BPP3)])

    def encode(self, views_BPP3: np.ndarray) -> Encoded:
        """Encode at least one evaluation view (B, P, P, 3), uint8."""
        images, features_BF = self.bundle.encode(views_BPP3, precision=self.precision)
        calibration = self.bundle.calibration
        flags = calibration.is_out_of_distribution(features_BF) if calibration else None
        return Encoded(images, flags or [False] * len(views_BPP3))

    def describe(self, encoded: Sequence[Encoded]) -> list[Description]:
        """Describe encoded images, in order."""
        calibration = self.bundle.calibration if self.has_confidence else None
        captions_of_images = self.bundle.search(
            [part.images for part in encoded],
            num_captions=self.captions_per_image,
            with_attention=self._grid is not None,
            **asdict(self.decoding),
        )
        scores = [captions[0].score for captions in captions_of_images]
        confidences = (calibration.confidence(scores) if calibration else None) or [None] * len(scores)
        flags = chain.from_iterable(part.out_of_distribution for part in encoded)
        return list(map(self._describe, captions_of_images, confidences, flags))

    def _describe(
        self, captions: Sequence[GeneratedCaption], confidence: float | None, out_of_distribution: bool
    ) -> Description:
        texts = tuple(self.bundle.vocabulary.decode(caption.tokens) for caption in captions)
        unsure = confidence is not None and self.abstain_below is not None and confidence < self.abstain_below
        reasons = [LOW_CONFIDENCE] * unsure + [OUT_OF_DISTRIBUTION] * out_of_distribution
        return Description(
            caption=texts[0],
            captions=texts,
            alt="" if unsure else alt_text(texts[0]),
            score=captions[0].score,
            token_scores=tuple(captions[0].token_scores),
            confidence=confidence,
            review=", ".join(reasons) or None,
            attention=self._grid and Attention.of(captions[0], vocabulary=self.bundle.vocabulary, grid=self._grid),
        )


def _read(source: ImageSource) -> bytes | Image.Image:
    if isinstance(source, bytes | Image.Image):
        return source
    if isinstance(source, np.ndarray):
        return _to_image(source)
    if isinstance(source, str | os.PathLike):
        return _read_file(os.fsdecode(source))
    raise TypeError(
        f"{type(source).__name__} is no image: give a path, a URL, a file's bytes, a Pillow image or a NumPy array"
    )


def _to_image(pixels_HW3: np.ndarray) -> Image.Image:
    if pixels_HW3.dtype != np.uint8 or pixels_HW3.ndim != 3 or pixels_HW3.shape[2] != 3:
        found = f"{pixels_HW3.dtype} of shape {pixels_HW3.shape}"
        raise TypeError(f"an array of {found} is no image: give uint8 of shape (height, width, 3)")
    return Image.fromarray(np.ascontiguousarray(pixels_HW3))


def _read_file(location: str) -> bytes:
    try:
        if not storage.is_remote(location) and not stat.S_ISREG(Path(location).stat().st_mode):
            raise ImageError("special file", f"{location} is no regular file: give the images in a folder one by one")
        return storage.read_bytes(location)
    except (FileNotFoundError, ValueError) as error:  # ValueError: a name that no file can have
        raise ImageError("missing", f"there is no file {location!r}") from error
    except OSError as error:
        if error.errno not in (errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM):
            raise
        raise ImageError("unreadable", f"{error.strerror}: {location}") from error
