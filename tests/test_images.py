"""Any file's bytes become an upright RGB picture, or an error that says why not."""

import contextlib
import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from captioner import images
from captioner.images import ImageError

WIDTH, HEIGHT = 48, 32


def drawn() -> np.ndarray:
    """A picture that differs from each of its turned and mirrored versions: four corners, four colours."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[:16, :24] = (250, 20, 20)
    pixels[:16, 24:] = (20, 250, 20)
    pixels[16:, :24] = (20, 20, 250)
    pixels[16:, 24:] = (250, 250, 20)
    return pixels


STORED_BY_ORIENTATION = {
    1: drawn(),
    2: drawn()[:, ::-1],
    3: drawn()[::-1, ::-1],
    4: drawn()[::-1],
    5: drawn().transpose(1, 0, 2),
    6: np.rot90(drawn(), 1),
    7: drawn()[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90(drawn(), -1),
}
"""What a camera stores so that a viewer that follows the EXIF standard shows `drawn()`."""


def file_of(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def with_orientation(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


def decoded(data: bytes, *, at_least: int | None = None) -> np.ndarray:
    picture, size = images.decode_rgb(data, at_least=at_least)
    assert picture.mode == "RGB"
    if at_least is None:
        assert picture.size == size
    return np.asarray(picture).astype(int)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def claiming(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header, with a right checksum, promises any number of pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def photo_like(width: int, height: int) -> Image.Image:
    """Smooth shapes with finer and fainter detail on top, as photographs have it (amplitude falls as 1/f)."""
    rng = np.random.default_rng(7)
    pixels = np.full((height, width, 3), 128.0)
    for cells in (3, 6, 12, 24, 48, 96, 192):
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        pixels += (np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), float) - 128) * 2 / cells
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def psnr(first: Image.Image, second: Image.Image) -> float:
    difference = np.asarray(first, float) - np.asarray(second, float)
    return float(10 * np.log10(255**2 / np.mean(difference**2)))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("kind", "options"),
    [("PNG", {}), ("JPEG", {"quality": 100, "subsampling": 0}), ("WEBP", {"lossless": True}), ("TIFF", {})],
)
def test_a_turned_photo_stands_upright(kind: str, options: dict[str, Any], orientation: int) -> None:
    stored = Image.fromarray(np.ascontiguousarray(STORED_BY_ORIENTATION[orientation]))
    data = file_of(stored, kind, exif=with_orientation(orientation), **options)
    picture, size = images.decode_rgb(data)
    assert size == picture.size == (WIDTH, HEIGHT)
    assert np.abs(np.asarray(picture).astype(int) - drawn()).max() <= (3 if kind == "JPEG" else 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_decoded_at_a_reduced_scale_stands_upright_and_reports_its_full_size(orientation: int) -> None:
    stored = Image.fromarray(np.ascontiguousarray(STORED_BY_ORIENTATION[orientation]))
    large = stored.resize((stored.width * 8, stored.height * 8), Image.Resampling.NEAREST)
    picture, size = images.decode_rgb(file_of(large, "JPEG", exif=with_orientation(orientation)), at_least=HEIGHT)
    assert size == (WIDTH * 8, HEIGHT * 8)
    assert picture.size == (WIDTH, HEIGHT)
    shown = np.asarray(picture).astype(int)[8::16, 12::24]
    assert np.abs(shown - drawn()[8::16, 12::24]).max() <= 6


def test_orientations_beyond_the_standard_turn_nothing() -> None:
    for orientation in (0, 9, 65535):
        data = file_of(Image.fromarray(drawn()), "PNG", exif=with_orientation(orientation))
        assert (decoded(data) == drawn()).all()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_does_no_harm_to_the_pixels() -> None:
    good = file_of(Image.fromarray(drawn()), "JPEG", exif=with_orientation(6), quality=95)
    start = good.index(b"Exif\0\0") + 6
    for damaged in (
        good[:start] + b"\xff" * 8 + good[start + 8 :],
        good[:start] + b"II*\0\xf0\xff\xff\x7f" + good[start + 8 :],
        good[: start + 8] + b"\xff\xff" + good[start + 10 :],
    ):
        picture, size = images.decode_rgb(damaged)
        assert size in {(WIDTH, HEIGHT), (HEIGHT, WIDTH)}
        assert picture.size == size


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("grey JPEG", file_of(Image.new("L", (9, 9), 90), "JPEG"), (90, 90, 90)),
        ("grey PNG with alpha", file_of(Image.new("LA", (9, 9), (0, 128)), "PNG"), (127, 127, 127)),
        ("one bit", file_of(Image.new("1", (9, 9), 1), "PNG"), (255, 255, 255)),
        ("half clear red", file_of(Image.new("RGBA", (9, 9), (255, 0, 0, 128)), "PNG"), (255, 127, 127)),
        ("clear black", file_of(Image.new("RGBA", (9, 9), (0, 0, 0, 0)), "PNG"), (255, 255, 255)),
        ("clear WebP", file_of(Image.new("RGBA", (9, 9), (0, 0, 9, 0)), "WEBP", lossless=True), (255, 255, 255)),
        ("palette", file_of(Image.new("RGB", (9, 9), (255, 0, 0)).quantize(), "PNG"), (255, 0, 0)),
        ("CMYK JPEG", file_of(Image.new("CMYK", (9, 9), (255, 0, 0, 0)), "JPEG", quality=95), (0, 255, 255)),
        ("16 bit", file_of(Image.fromarray(np.full((9, 9), 0x7F10, np.uint16)), "PNG"), (127, 127, 127)),
        ("dark 16 bit", file_of(Image.fromarray(np.full((9, 9), 200, np.uint16)), "PNG"), (0, 0, 0)),
        ("WebP", file_of(Image.new("RGB", (9, 9), (10, 200, 30)), "WEBP", lossless=True), (10, 200, 30)),
        ("BMP", file_of(Image.new("RGB", (9, 9), (10, 200, 30)), "BMP"), (10, 200, 30)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_mode_becomes_rgb_with_alpha_on_white(name: str, data: bytes, expected: tuple[int, int, int]) -> None:
    pixels = decoded(data)
    assert pixels.shape == (9, 9, 3), name
    assert np.abs(pixels - np.array(expected)).max() <= 2


@pytest.mark.parametrize("mode", ["P", "RGB", "L"])
def test_a_transparent_colour_is_laid_on_white(mode: str) -> None:
    """PNG and GIF can name one colour as clear without an alpha channel."""
    clear_black = Image.new(mode, (8, 4), 0)
    clear_black.paste(1 if mode == "P" else (200, 0, 0) if mode == "RGB" else 200, (4, 0, 8, 4))
    if mode == "P":
        clear_black.putpalette([0, 0, 0, 200, 0, 0])
    pixels = decoded(file_of(clear_black, "PNG", transparency=(0, 0, 0) if mode == "RGB" else 0))
    assert (pixels[:, :4] == 255).all()
    assert (pixels[:, 4:, 0] == 200).all()


def test_a_16_bit_ramp_keeps_its_upper_8_bits() -> None:
    ramp = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    assert (decoded(file_of(Image.fromarray(ramp), "PNG"))[..., 0] == ramp >> 8).all()


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "blue", "white")]
    for kind in ("GIF", "WEBP", "PNG"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = file_of(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 3
        assert (decoded(data) == (255, 0, 0)).all()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"this is no picture\n", "undecodable"),
        (b"\xff\xd8\xff", "undecodable"),
        (file_of(Image.fromarray(drawn()), "JPEG")[:-60], "truncated"),
        (file_of(photo_like(64, 64), "PNG")[:-400], "truncated"),
        (claiming(100_000, 100_000), "too large"),
        (claiming(20_000, 10_001), "too large"),
    ],
    ids=["empty", "text", "start", "cut JPEG", "cut PNG", "huge", "just too large"],
)
def test_a_file_that_is_no_usable_picture_says_why(data: bytes, reason: str) -> None:
    with pytest.raises(ImageError) as caught:
        images.load_squashed(data, size=8)
    assert caught.value.reason == reason
    assert caught.value.message
    assert str(caught.value).startswith(f"{reason}: ")


def test_size_is_refused_from_the_header_and_not_before() -> None:
    """A claim within the limit gets as far as the missing pixels."""
    with pytest.raises(ImageError) as caught:
        images.decode_rgb(claiming(200, 100))
    assert caught.value.reason == "truncated"


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@given(cut=st.integers(0, 10_000), flip=st.integers(0, 10_000), value=st.integers(0, 255))
@settings(deadline=None, max_examples=150)
def test_damage_anywhere_gives_a_picture_or_an_image_error(cut: int, flip: int, value: int) -> None:
    data = bytearray(DAMAGEABLE[flip % len(DAMAGEABLE)])
    data[flip % len(data)] = value
    with contextlib.suppress(ImageError):
        picture, size = images.load_squashed(bytes(data[: len(data) - cut % (len(data) // 2)]), size=16)
        assert (picture.size, picture.mode) == ((16, 16), "RGB")
        assert min(size) > 0


DAMAGEABLE = [
    file_of(photo_like(48, 32), "JPEG", exif=with_orientation(6)),
    file_of(photo_like(48, 32), "PNG"),
    file_of(photo_like(48, 32).quantize(), "GIF"),
    file_of(photo_like(48, 32), "WEBP"),
    file_of(photo_like(48, 32), "TIFF"),
]


@given(width=st.integers(1, 90), height=st.integers(1, 90), size=st.integers(1, 40))
@settings(deadline=None, max_examples=50)
def test_load_squashed_gives_a_square_and_the_original_size(width: int, height: int, size: int) -> None:
    data = file_of(Image.new("RGB", (width, height), (9, 99, 199)), "PNG")
    picture, original_size = images.load_squashed(data, size=size)
    assert picture.size == (size, size)
    assert original_size == (width, height)
    assert (np.asarray(picture) == (9, 99, 199)).all()


def test_a_large_jpeg_decoded_at_a_reduced_scale_is_close_to_the_plain_decode() -> None:
    """Found: 57 dB here, and 49.5 at worst (median 53) on 60 COCO photos enlarged to 1600 x 1200."""
    data = file_of(photo_like(1200, 1024), "JPEG", quality=92)
    reduced, _ = images.decode_rgb(data, at_least=512)
    assert reduced.size == (600, 512)
    plain = Image.open(io.BytesIO(data)).convert("RGB").resize((256, 256), Image.Resampling.LANCZOS)
    squashed, original_size = images.load_squashed(data, size=256)
    assert original_size == (1200, 1024)
    assert psnr(squashed, plain) >= 45


def test_encoding_twice_gives_equal_bytes_that_decode_close_to_the_picture() -> None:
    picture = photo_like(64, 64)
    data = images.encode_jpeg(picture, quality=95)
    assert data == images.encode_jpeg(picture, quality=95)
    assert psnr(images.decode_rgb(data)[0], picture) >= 35
    assert len(images.encode_jpeg(picture, quality=50)) < len(data)
