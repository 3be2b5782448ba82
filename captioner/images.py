"""Bytes to upright RGB pictures, their resizing, and JPEG. Imports no torch."""

import io
from typing import Literal

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

BACKEND = "pillow"
MAX_PIXELS = 200_000_000
Reason = Literal["missing", "unreadable", "empty", "undecodable", "truncated", "too large"]

UPRIGHT_BY_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SWAPS_SIDES = frozenset(UPRIGHT_BY_ORIENTATION[orientation] for orientation in (5, 6, 7, 8))

Image.MAX_IMAGE_PIXELS = None  # this module refuses by MAX_PIXELS itself, from the header, with its own error


class ImageError(Exception):
    """A picture that cannot be used: `reason` is one word to count by, the message says what was found."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(reason, message)
        self.reason = reason
        self.message = message

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"


def decode_rgb(data: bytes, *, at_least: int | None = None) -> tuple[Image.Image, tuple[int, int]]:
    """The upright RGB picture in `data`, and the (width, height) that its header gives, turned upright as well.

    Any format Pillow reads; of an animation the first frame. EXIF orientation is applied, alpha is laid on white,
    16-bit greys keep their upper 8 bits. `at_least` lets a JPEG be decoded at a reduced scale whose sides are both
    still at least that many pixels. Raises ImageError.
    """
    if not data:
        raise ImageError("empty", "the file has no content")
    try:
        image = Image.open(io.BytesIO(data))
        size = image.size
        if size[0] * size[1] > MAX_PIXELS:
            raise ImageError("too large", f"{size[0]}x{size[1]} pixels, more than {MAX_PIXELS:,} in all")
        if at_least is not None:
            image.draft("RGB", (at_least, at_least))
        image.load()
        picture = _to_rgb(image)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError("undecodable", f"no known image format (starts with {data[:8]!r})") from error
    except Exception as error:  # Pillow's plugins raise nearly anything on damaged files
        raise ImageError(_reason(error), f"{type(error).__name__}: {error}") from error
    turn = UPRIGHT_BY_ORIENTATION.get(_orientation(image))
    if turn is None:
        return picture, size
    return picture.transpose(turn), size[::-1] if turn in SWAPS_SIDES else size


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) where there is none or the EXIF block is damaged."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a damaged EXIF block raises nearly anything, and does no harm to the pixels
        return 1


def _reason(error: Exception) -> Reason:
    """Whether Pillow's error speaks of missing bytes or of bad ones."""
    text = str(error).lower()
    short = any(word in text for word in ("truncated", "unexpected end", "broken data stream", "broken png"))
    return "truncated" if short or isinstance(error, EOFError) else "undecodable"


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float32)
        scale = 256.0 if image.mode.startswith("I;16") or values.max(initial=0) > 255 else 1.0
        image = Image.fromarray(np.clip(values / scale, 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, picture)
    return image.convert("RGB")


def squash(image: Image.Image, *, size: int) -> Image.Image:
    """The picture as `size` x `size` pixels, whatever its sides' ratio was, by antialiased LANCZOS."""
    if image.size == (size, size):
        return image
    return image.resize((size, size), Image.Resampling.LANCZOS)


def load_squashed(data: bytes, *, size: int) -> tuple[Image.Image, tuple[int, int]]:
    """The one way from a file's bytes to a `size` x `size` RGB picture, and its original upright (width, height).

    A JPEG is decoded at a reduced scale only while that is at least twice `size`. Raises ImageError.
    """
    image, original_size = decode_rgb(data, at_least=2 * size)
    return squash(image, size=size), original_size


def encode_jpeg(image: Image.Image, *, quality: int) -> bytes:
    """Baseline JPEG bytes of an RGB picture, colour at full resolution (half of it shows in the decoded pixels)."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()
