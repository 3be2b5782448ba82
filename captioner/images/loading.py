"""Bytes to upright RGB images, their resizing, and JPEG. Imports no torch until the first image is resized.

simplejpeg (libjpeg-turbo) decodes JPEGs and releases the GIL. Pillow decodes everything else: other formats, CMYK,
unusual chroma subsampling, and damaged JPEGs, so Pillow alone decides which files are errors.
"""

import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import PIL
import simplejpeg
from PIL import ExifTags, Image, UnidentifiedImageError

from captioner.images import decoder_output
from captioner.images.metadata import TIFF_STARTS, without_metadata

if TYPE_CHECKING:
    from torch import Tensor

MAX_PIXELS = 178_956_970  # Pillow's own limit, which it also applies inside ICO and ICNS
Backend = Literal["pillow-simd", "native", "pillow"]
Resize = Literal["squash", "center-crop", "keep-ratio", "none"]
Reason = Literal[
    "missing",
    "unreadable",
    "empty",
    "undecodable",
    "truncated",
    "too large",
    "special file",
    "crashed the decoder",
    "timed out",
]

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
HAS_SIMD = ".post" in PIL.__version__  # how pillow-simd numbers its versions
JPEG_START = b"\xff\xd8\xff"
HEIC_START = re.compile(rb".{4}ftyp(?:.{4}){0,12}?(?:hei[cmsx]|hev[cmsx])", re.DOTALL)  # a HEIC brand in the header
NEVER_DECODED = ("EPS", "WMF", "IPTC")  # drawn by Ghostscript, drawn by Windows, and a wrapper around any other format
LARGE_PIXELS = 1 << 20
HUGE_PIXELS = 1 << 26  # above this Pillow decodes and resizes: torch needs three more copies of the pixels
SUBSAMPLING = "4:2:0"  # of stored JPEGs
DRAFT_SCALE = 2.75  # how much larger a JPEG of reduced scale is than the wanted size: 45 dB PSNR on 110 photos


class StoredJpeg(NamedTuple):
    """A JPEG as it is stored in a shard, and the (width, height) of the upright image that it was made from."""

    data: bytes
    original_size: tuple[int, int]


class Opened(NamedTuple):
    """An image of which only the header has been read, and the file's bytes without damaged metadata."""

    image: Image.Image
    data: bytes


class Resized(NamedTuple):
    """An upright RGB image, and the upright (width, height) of its original."""

    image: Image.Image
    original_size: tuple[int, int]


class ImageError(Exception):
    """An image that cannot be used. `reason` is its kind, for counts; `message` says what was found."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(reason, message)
        self.reason = reason
        self.message = message

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"


@lru_cache(maxsize=1)
def backend() -> Backend:
    """The fastest installed library that resizes.

    `pillow-simd` if it is installed instead of Pillow (its pixels are Pillow's), `native` if torch can resize uint8 by
    LANCZOS (within 50 dB of Pillow's pixels), else `pillow`.
    """
    if HAS_SIMD:
        return "pillow-simd"
    return "native" if _has_native_lanczos() else "pillow"


def _has_native_lanczos() -> bool:
    try:
        import torch

        _resize_native(torch.zeros((3, 4, 4), dtype=torch.uint8), (2, 2), covered=(4, 4))
    except (ImportError, NotImplementedError, RuntimeError, ValueError):
        return False
    return True


# ---- decoding ---------------------------------------------------------------------------------------------


def read_size(data: bytes) -> tuple[int, int]:
    """The stored (width, height) of the image in `data`, from its header. Raises ImageError."""
    with _image_errors(data):
        return _open(data).image.size


def decode_rgb(data: bytes, *, at_least: int | None = None) -> Resized:
    """The upright RGB image in `data`, and the upright (width, height) of the original.

    Reads any format that Pillow reads, and the first frame of an animation. Applies the EXIF orientation, puts
    transparent pixels on white, and keeps the upper 8 bits of 16-bit greys. With `at_least` a JPEG may be decoded at a
    reduced scale, with both sides at least that many pixels. Raises ImageError.
    """
    with _image_errors(data):
        opened = _open(data)
        turn = _upright_turn(opened.image)
        original_size = opened.image.size
        if at_least is not None:
            opened.image.draft("RGB", (at_least, at_least))
        return _upright(_decode(opened, original_size), original_size, turn=turn)


def decode_stored(
    data: bytes | bytearray, *, channels: Literal["RGB", "BGR"] = "RGB", buffer: np.ndarray | None = None
) -> np.ndarray:
    """The pixels (height, width, 3), uint8, of an image from a shard, which is upright and RGB. Raises ImageError.

    They are contiguous, and lie in `buffer` if it is large enough for a JPEG's pixels; else they are new.
    """
    is_jpeg = data.startswith(JPEG_START)
    if is_jpeg and buffer is not None:
        try:
            return simplejpeg.decode_jpeg(data, channels, buffer=buffer)
        except (KeyError, MemoryError, ValueError):  # damaged, no plain JPEG, or too large for the buffer
            pass
    pixels_HW3 = _decode_jpeg(data) if is_jpeg else None
    if pixels_HW3 is None:
        pixels_HW3 = np.array(decode_rgb(bytes(data)).image)
    return pixels_HW3 if channels == "RGB" else swap_channels(pixels_HW3)


def swap_channels(pixels_HW3: np.ndarray) -> np.ndarray:
    """A contiguous copy of RGB pixels in BGR."""
    return np.ascontiguousarray(pixels_HW3[:, :, ::-1])


def _decode_jpeg(data: bytes | bytearray, *, reduced_to: tuple[int, int] = (0, 0)) -> np.ndarray | None:
    """RGB pixels (H, W, 3) of a JPEG; None if Pillow must decode it, or report its error.

    Decoded at the scale of 1/2, 1/4 or 1/8 that gives the (width, height) `reduced_to`, if any. The decoder's message
    about damage is collected.
    """
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except (KeyError, ValueError):  # unusual chroma subsampling, or a damaged header
        return None
    if colours in ("CMYK", "YCCK") or int(height) * int(width) > MAX_PIXELS:
        return None
    try:
        return simplejpeg.decode_jpeg(data, "RGB", min_width=reduced_to[0], min_height=reduced_to[1])
    except (MemoryError, ValueError) as error:
        decoder_output.keep(str(error))
        return None


def load_resized(source: bytes | Image.Image, *, size: int, resize: Resize, with_torch: bool = True) -> Resized:
    """The resized upright RGB image in a file's bytes, or of a Pillow image, which is not changed. Raises ImageError.

    `squash` gives `size` x `size` pixels whatever the aspect ratio; `keep-ratio` makes the shorter side `size`;
    `center-crop` then keeps the middle square; `none` keeps the size. Resizing is antialiased LANCZOS; a JPEG is
    decoded at a reduced scale only if that is still far larger than the wanted size (DRAFT_SCALE). Without torch Pillow
    resizes, whatever `backend` says.
    """
    with _image_errors(source if isinstance(source, bytes) else b""):
        if isinstance(source, bytes):
            return _load_resized(_open(source), size=size, resize=resize, with_torch=with_torch)
        source.load()  # or it could be decoded at a reduced scale, which would change the caller's image
        _check_size(source)
        return _load_resized(Opened(source, b""), size=size, resize=resize, with_torch=with_torch)


def to_stored_jpegs(
    contents: "Sequence[bytes | ImageError]",
    *,
    size: int,
    resize: Resize,
    quality: int,
    set_index: Callable[[int], None] = lambda index: None,
    note_damage: Callable[[int], None] = lambda index: None,
) -> "list[StoredJpeg | ImageError]":
    """The JPEG to store in a shard for each file, or the error why there is none.

    An error in `contents` is a file's that could not be read, and is returned. `set_index(i)` is called before
    file i is processed, `note_damage(i)` if it was decoded although its decoder reported damage. An upright RGB JPEG of
    the wanted size is kept byte for byte if it can be decoded.

    All files are opened, then all are resized, then all are encoded: decoding evicts the code of the other two from the
    processor's caches, which costs small images a twentieth of their time.
    """
    results: dict[int, StoredJpeg | ImageError] = {}
    opened: dict[int, Opened] = {}
    resized: dict[int, Resized] = {}

    @contextmanager
    def errors_of(index: int, data: bytes) -> Iterator[None]:
        set_index(index)
        try:
            with _image_errors(data) as complaints:
                yield
            if complaints:
                note_damage(index)
        except ImageError as error:
            results[index] = error

    files = {index: content for index, content in enumerate(contents) if isinstance(content, bytes)}
    for index, data in files.items():
        with errors_of(index, data):
            opened[index] = _open(data)
    for index in list(opened):
        with errors_of(index, files[index]):
            result = _resize_or_store(opened.pop(index), size=size, resize=resize, quality=quality)
            if isinstance(result, StoredJpeg):
                results[index] = result
            else:
                resized[index] = result
    for index, (image, original_size) in resized.items():
        with errors_of(index, files[index]):
            results[index] = StoredJpeg(encode_jpeg(image, quality=quality), original_size)
    return [content if isinstance(content, ImageError) else results[index] for index, content in enumerate(contents)]


def _resize_or_store(opened: Opened, *, size: int, resize: Resize, quality: int) -> Resized | StoredJpeg:
    """The resized image, or at once the JPEG: of an unchanged file, and of a large image, to save memory."""
    image = opened.image
    fits = (image.format, image.mode, image.size) == ("JPEG", "RGB", _final_size(image.size, size, resize))
    is_unchanged = fits and _upright_turn(image) is None
    resized = _load_resized(opened, size=size, resize=resize)
    if is_unchanged:
        return StoredJpeg(opened.data, resized.original_size)
    if resized.image.width * resized.image.height > LARGE_PIXELS:
        return StoredJpeg(encode_jpeg(resized.image, quality=quality), resized.original_size)
    return resized


def encode_jpeg(image: Image.Image, *, quality: int) -> bytes:
    """Baseline JPEG bytes of an RGB image, with 4:2:0 chroma subsampling."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling=SUBSAMPLING, comment=b"")  # else Pillow copies a comment
    return buffer.getvalue()


@contextmanager
def _image_errors(data: bytes) -> Iterator[list[str]]:
    """Turn any exception into an ImageError: Pillow's plugins raise almost any type on damaged files.

    Yields the list of messages that the decoder prints.
    """
    with decoder_output.collect() as complaints:
        try:
            yield complaints
        except ImageError:
            raise
        except Exception as error:
            raise _image_error(error, data, complaints) from error


def _image_error(error: Exception, data: bytes, complaints: Sequence[str]) -> ImageError:
    if isinstance(error, MemoryError):
        return ImageError("too large", "there is not enough memory to decode it")
    if isinstance(error, Image.DecompressionBombError):
        return ImageError("too large", str(error))
    if isinstance(error, UnidentifiedImageError):
        if data[:256].lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):  # HTML, SVG, XML
            kind = "an SVG drawing" if b"<svg" in data[:1024] else "text, such as a web page"
            return ImageError("undecodable", f"it is {kind}, not pixels")
        reason = (
            "its header is damaged, or its format unknown or left out when this Pillow was built (see `make no-simd`)"
        )
        return ImageError(
            "undecodable", f"Pillow {PIL.__version__} cannot read a file that starts with {data[:12]!r}: {reason}"
        )
    said = f" ({'; '.join(complaints)})" if complaints else ""
    return ImageError(_reason_for(error), " ".join(f"{type(error).__name__}: {error}{said}".split()))


def _open(data: bytes) -> Opened:
    """The image with its header read and its size checked; no pixel is decoded yet."""
    if not data:
        raise ImageError("empty", "the file has no content")
    opened = _read_header(data)
    image = opened.image
    if image.format in NEVER_DECODED:
        raise ImageError("undecodable", f"{image.format} files are refused: reading one can start other programs")
    _check_size(image)
    return opened


def _read_header(data: bytes) -> Opened:
    if data.startswith(JPEG_START):
        try:
            return Opened(Image.open(io.BytesIO(data)), data)
        except Exception:  # usually damaged metadata; anything else raises again below
            data = without_metadata(data)
    elif HEIC_START.match(data):
        return Opened(_open_heic(data), data)
    else:
        data = without_metadata(data)
        if data.startswith(TIFF_STARTS):
            decoder_output.watch_libtiff()
    return Opened(Image.open(io.BytesIO(data)), data)


def _check_size(image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise ImageError("too large", f"{image.width}x{image.height} pixels, more than {MAX_PIXELS:,} in all")
    if image.width * image.height == 0:
        raise ImageError("empty", f"{image.width}x{image.height} pixels")


def _open_heic(data: bytes) -> Image.Image:
    """The image from pillow_heif, upright; called through Pillow, its errors would be hidden."""
    try:
        import pillow_heif
    except ImportError as error:
        message = "a HEIC image: pip install -c constraints.txt -e '.[heic]' installs a reader"
        raise ImageError("undecodable", message) from error
    pillow_heif.options.THUMBNAILS = False  # type: ignore[bad-assignment]  # `draft` would take one as the image
    return pillow_heif.HeifImageFile(io.BytesIO(data))


def _upright_turn(image: Image.Image) -> Image.Transpose | None:
    """The transpose that turns the decoded image upright; None if it is upright already or its EXIF is damaged.

    Uses the EXIF orientation, or the one in XMP if there is no EXIF. The image's size is correct only after this call.
    """
    if image.format == "PNG":
        image.load()  # getexif does it too, but would hide the error of a damaged image
    if image.format == "TIFF":
        image.load()  # turns the image upright and deletes the orientation
    try:
        return UPRIGHT_BY_ORIENTATION.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF raises almost any type, and the pixels are intact
        return None


def _upright(image: Image.Image, original_size: tuple[int, int], *, turn: Image.Transpose | None) -> Resized:
    if turn is None:
        return Resized(image, original_size)
    return Resized(image.transpose(turn), original_size[::-1] if turn in SWAPS_SIDES else original_size)


def _reason_for(error: Exception) -> Reason:
    """The reason `truncated` if Pillow's error is about missing bytes, else `undecodable`."""
    text = str(error).lower()
    short = any(word in text for word in ("truncated", "unexpected end", "broken data stream", "broken png"))
    return "truncated" if short or isinstance(error, EOFError) else "undecodable"


def _decode(opened: Opened, full_size: tuple[int, int]) -> Image.Image:
    """The RGB image, at the scale that `draft` has set; `full_size` was its size before."""
    pixels_HW3 = _jpeg_pixels(opened, full_size)
    return _to_rgb(opened.image) if pixels_HW3 is None else Image.fromarray(pixels_HW3)


def _jpeg_pixels(opened: Opened, full_size: tuple[int, int]) -> np.ndarray | None:
    """The same as `_decode`, as an array (H, W, 3); None if Pillow must decode the image."""
    size = opened.image.size
    if not opened.data.startswith(JPEG_START) or size[0] * size[1] > HUGE_PIXELS:
        return None
    return _decode_jpeg(opened.data, reduced_to=(0, 0) if size == full_size else size)


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode in ("La", "RGBa"):  # premultiplied alpha
        image = image.convert(image.mode.upper())
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_grey_bytes(image))
    if image.has_transparency_data:
        transparent = image if image.mode == "RGBA" else image.convert("RGBA")
        image = Image.new("RGB", transparent.size, "white")
        image.paste(transparent, mask=transparent)
    return image if image.mode == "RGB" else image.convert("RGB")


def _grey_bytes(image: Image.Image) -> np.ndarray:
    """Greys of 16 or 32 bits as (height, width) uint8.

    In 32-bit images white is 1 (floats only), 255 or 65535, the least that no value exceeds, or else the largest value.
    """
    values_HW = np.asarray(image)
    if image.mode.startswith("I;16"):
        return (values_HW >> 8).astype(np.uint8)
    values_HW = np.nan_to_num(values_HW.astype(np.float32), posinf=0, neginf=0).clip(min=0)
    largest = float(values_HW.max(initial=0))
    scale = 1.0 if largest <= 255 else 256 / max(largest + 1, 65536)
    if image.mode == "F" and largest <= 1:
        scale = 255.0
    return np.clip(values_HW * scale, 0, 255).astype(np.uint8)


# ---- resizing ---------------------------------------------------------------------------------------------


def _scaled_size(original: tuple[int, int], size: int, resize: Resize) -> tuple[int, int]:
    """The (width, height) to which the whole image is scaled, before `center-crop` crops it."""
    if resize == "none":
        return original
    if resize == "squash":
        return size, size
    shorter = min(original)
    width, height = (max(size, round(side * size / shorter)) for side in original)
    return width, height


def _final_size(original: tuple[int, int], size: int, resize: Resize) -> tuple[int, int]:
    return (size, size) if resize == "center-crop" else _scaled_size(original, size, resize)


def _load_resized(opened: Opened, *, size: int, resize: Resize, with_torch: bool = True) -> Resized:
    turn = _upright_turn(opened.image)
    original_size = opened.image.size
    wanted = _scaled_size(original_size, size, resize)
    if wanted[0] * wanted[1] > MAX_PIXELS:
        raise ImageError("too large", f"{original_size[0]}x{original_size[1]} pixels become {wanted[0]}x{wanted[1]}")
    image, upright_size = _upright(_scale(opened, wanted, with_torch=with_torch), original_size, turn=turn)
    if resize == "center-crop":
        left, top = ((side - size) // 2 for side in image.size)
        image = image.crop((left, top, left + size, top + size))
    return Resized(image, upright_size)


def _scale(opened: Opened, wanted: tuple[int, int], *, with_torch: bool) -> Image.Image:
    """The RGB image scaled to `wanted` (width, height), in the orientation in which it is stored."""
    image = opened.image
    full_size = image.size
    draft = image.draft("RGB", (math.ceil(DRAFT_SCALE * wanted[0]), math.ceil(DRAFT_SCALE * wanted[1])))
    # At a reduced scale the image may end inside the last row and column of pixels: the box says where.
    box = draft[1] if draft else (0, 0, *full_size)
    with_pillow = image.width * image.height > HUGE_PIXELS or not with_torch or backend() != "native"
    if wanted == full_size or with_pillow:
        rgb = _decode(opened, full_size)
        return rgb if wanted == full_size else rgb.resize(wanted, Image.Resampling.LANCZOS, box=box)
    import torch

    pixels_HW3 = _jpeg_pixels(opened, full_size)
    if pixels_HW3 is None:
        pixels_HW3 = np.array(_to_rgb(image))
    bands = _resize_native(torch.from_numpy(pixels_HW3).permute(2, 0, 1), wanted, covered=box[2:]).numpy()
    return Image.merge("RGB", [Image.frombuffer("L", wanted, band, "raw", "L", 0, 1) for band in bands])


def _resize_native(pixels_3HW: "Tensor", wanted: tuple[int, int], *, covered: tuple[float, float]) -> "Tensor":
    """The upper left `covered` (width, height) pixels, resized to the `wanted` (width, height): (3, height, width)."""
    from torch.nn.functional import interpolate

    scales = [side * (1 + 1e-9) / end for side, end in zip(wanted, covered, strict=True)]
    resized = interpolate(
        pixels_3HW[None], scale_factor=scales[::-1], recompute_scale_factor=False, mode="lanczos", antialias=True
    )
    return resized[0].contiguous()
