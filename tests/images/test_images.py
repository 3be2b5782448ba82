"""Any file's bytes become an upright RGB picture, or an error that says why not."""

import contextlib
import io
import os
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from odd_pictures import (
    EPS,
    READS_AVIF,
    READS_WEBP,
    broken_files,
    file_of,
    iptc_around,
    picture,
    png_of,
    whole_files,
    write_odd_pictures,
)
from PIL import EpsImagePlugin, ExifTags, Image

from captioner.images import decoder_output, loading, views
from captioner.images.loading import ImageError

WIDTH, HEIGHT = 48, 32


def drawn() -> np.ndarray:
    """A picture that differs from each of its turned and mirrored versions: four corners, four colours."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[:16, :24] = (250, 20, 20)
    pixels[:16, 24:] = (20, 250, 20)
    pixels[16:, :24] = (20, 20, 250)
    pixels[16:, 24:] = (250, 250, 20)
    return pixels


needs_webp = pytest.mark.skipif(not READS_WEBP, reason="this Pillow has no WebP")
needs_avif = pytest.mark.skipif(not READS_AVIF, reason="this Pillow has no AVIF")

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


def with_orientation(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


def decoded(data: bytes, *, at_least: int | None = None) -> np.ndarray:
    picture, size = loading.decode_rgb(data, at_least=at_least)
    assert picture.mode == "RGB"
    if at_least is None:
        assert picture.size == size
    return np.asarray(picture).astype(int)


def claiming(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header, with a right checksum, promises any number of pixels."""
    return png_of((width, height), b"")


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
    return float(10 * np.log10(255**2 / max(1e-6, np.mean(difference**2))))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("JPEG", {"quality": 100, "subsampling": 0}),
        pytest.param("WEBP", {"lossless": True}, marks=needs_webp),
        ("TIFF", {}),
        pytest.param("AVIF", {"quality": 100, "subsampling": "4:4:4"}, marks=needs_avif),
    ],
)
def test_a_turned_photo_stands_upright(kind: str, options: dict[str, Any], orientation: int) -> None:
    stored = Image.fromarray(np.ascontiguousarray(STORED_BY_ORIENTATION[orientation]))
    data = file_of(stored, kind, exif=with_orientation(orientation), **options)
    picture, size = loading.decode_rgb(data)
    assert size == picture.size == (WIDTH, HEIGHT)
    assert np.abs(np.asarray(picture).astype(int) - drawn()).max() <= (3 if kind in ("JPEG", "AVIF") else 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_heic_photo_stands_upright_and_is_not_turned_twice(orientation: int) -> None:
    """libheif follows the turn in the container, which stands beside the same one in the EXIF block."""
    stored = Image.fromarray(np.ascontiguousarray(STORED_BY_ORIENTATION[orientation]))
    data = heic_of(stored, exif=with_orientation(orientation).tobytes(), quality=-1, chroma=444)
    assert b"irot" in data or b"imir" in data or orientation == 1
    picture, size = loading.decode_rgb(data)
    assert size == picture.size == (WIDTH, HEIGHT)
    assert np.abs(np.asarray(picture).astype(int) - drawn()).max() <= 6


def heic_of(image: Image.Image, **options: Any) -> bytes:
    pillow_heif = pytest.importorskip("pillow_heif")
    buffer = io.BytesIO()
    pillow_heif.from_pillow(image).save(buffer, **options)
    return buffer.getvalue()


def test_a_heic_photo_is_decoded_and_not_the_small_copy_inside_it() -> None:
    data = heic_of(photo_like(256, 192), thumbnails=[64])
    assert loading.decode_rgb(data, at_least=32)[0].size == (256, 192)


def test_a_heic_photo_without_its_reader_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ImageError, match=r"undecodable: .*HEIC.*pip install .*heic") as caught:
        loading.decode_rgb(b"\0\0\0\x1cftypmif1\0\0\0\0mif1heicmiaf" + bytes(99))
    assert caught.value.reason == "undecodable"


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"<html>404</html>", "text"),
        (b"\xef\xbb\xbf\n<!doctype html><title>t</title>", "text"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        (b'<?xml version="1.0"?>\n<svg/>', "SVG"),
    ],
)
def test_a_page_and_a_drawing_of_a_website_are_said_to_be_these(data: bytes, kind: str) -> None:
    with pytest.raises(ImageError, match=f"undecodable: it is .*{kind}.*, not pixels"):
        loading.decode_rgb(data)


def test_the_first_bytes_of_an_unknown_format_are_shown() -> None:
    with pytest.raises(ImageError, match=r"undecodable: Pillow .* starts with .*JXL "):
        loading.decode_rgb(b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(40))


def test_a_huge_heic_is_refused_before_a_pixel_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = heic_of(photo_like(64, 64))
    pillow_heif = pytest.importorskip("pillow_heif")
    monkeypatch.setattr(loading, "MAX_PIXELS", 64 * 64 - 1)
    monkeypatch.setattr(pillow_heif.HeifImageFile, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ImageError) as caught:
        loading.load_resized(data, size=8, resize="squash")
    assert caught.value.reason == "too large"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_decoded_at_a_reduced_scale_stands_upright_and_reports_its_full_size(orientation: int) -> None:
    stored = Image.fromarray(np.ascontiguousarray(STORED_BY_ORIENTATION[orientation]))
    large = stored.resize((stored.width * 8, stored.height * 8), Image.Resampling.NEAREST)
    picture, size = loading.decode_rgb(file_of(large, "JPEG", exif=with_orientation(orientation)), at_least=HEIGHT)
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
        picture, size = loading.decode_rgb(damaged)
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
        (
            "palette half clear",
            file_of(Image.new("RGB", (9, 9), (255, 0, 0)).quantize(), "PNG", transparency=b"\x80"),
            (255, 127, 127),
        ),
        ("palette", file_of(Image.new("RGB", (9, 9), (255, 0, 0)).quantize(), "PNG"), (255, 0, 0)),
        ("CMYK JPEG", file_of(Image.new("CMYK", (9, 9), (255, 0, 0, 0)), "JPEG", quality=95), (0, 255, 255)),
        ("16 bit", file_of(Image.fromarray(np.full((9, 9), 0x7F10, np.uint16)), "PNG"), (127, 127, 127)),
        ("dark 16 bit", file_of(Image.fromarray(np.full((9, 9), 200, np.uint16)), "PNG"), (0, 0, 0)),
        ("float to 1", file_of(Image.new("F", (9, 9), 0.5), "TIFF"), (127, 127, 127)),
        ("float to 255", file_of(Image.new("F", (9, 9), 90.0), "TIFF"), (90, 90, 90)),
        ("float to 65535", file_of(Image.new("F", (9, 9), 25856.0), "TIFF"), (101, 101, 101)),
        ("no numbers", file_of(Image.new("F", (9, 9), float("nan")), "TIFF"), (0, 0, 0)),
        ("32 bit", file_of(Image.new("I", (9, 9), 0x7F10), "TIFF"), (127, 127, 127)),
        ("32 bit, large", file_of(Image.new("I", (9, 9), 1 << 30), "TIFF"), (255, 255, 255)),
        ("BMP", file_of(Image.new("RGB", (9, 9), (10, 200, 30)), "BMP"), (10, 200, 30)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_mode_becomes_rgb_with_alpha_on_white(name: str, data: bytes, expected: tuple[int, int, int]) -> None:
    pixels = decoded(data)
    assert pixels.shape == (9, 9, 3), name
    assert np.abs(pixels - np.array(expected)).max() <= 2


@needs_webp
@pytest.mark.parametrize(("mode", "colour", "expected"), [("RGBA", (0, 0, 9, 0), 255), ("RGB", (9, 9, 9), 9)])
def test_webp_becomes_rgb_with_alpha_on_white(mode: str, colour: tuple[int, ...], expected: int) -> None:
    assert (decoded(file_of(Image.new(mode, (9, 9), colour), "WEBP", lossless=True)) == expected).all()


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
    for kind in ("GIF", "PNG", *(["WEBP"] if READS_WEBP else [])):
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
        loading.load_resized(data, size=8, resize="squash")
    assert caught.value.reason == reason
    assert caught.value.message
    assert str(caught.value).startswith(f"{reason}: ")


def test_size_is_refused_from_the_header_and_not_before() -> None:
    """A claim within the limit gets as far as the missing pixels."""
    with pytest.raises(ImageError) as caught:
        loading.decode_rgb(claiming(200, 100))
    assert caught.value.reason == "truncated"


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@given(cut=st.integers(0, 10_000), flip=st.integers(0, 10_000), value=st.integers(0, 255))
@settings(deadline=None, max_examples=150)
def test_damage_anywhere_gives_a_picture_or_an_image_error(cut: int, flip: int, value: int) -> None:
    data = bytearray(DAMAGEABLE[flip % len(DAMAGEABLE)])
    data[flip % len(data)] = value
    with contextlib.suppress(ImageError):
        picture, size = loading.load_resized(
            bytes(data[: len(data) - cut % (len(data) // 2)]), size=16, resize="squash"
        )
        assert (picture.size, picture.mode) == ((16, 16), "RGB")
        assert min(size) > 0


DAMAGEABLE = [
    file_of(photo_like(48, 32), "JPEG", exif=with_orientation(6)),
    file_of(photo_like(48, 32), "PNG"),
    file_of(photo_like(48, 32).quantize(), "GIF"),
    file_of(photo_like(48, 32), "TIFF"),
    *([file_of(photo_like(48, 32), "WEBP")] if READS_WEBP else []),
]


# ---- odd and hostile files ----------------------------------------------------------------------------------

IN_GREY = {"grey.jpg", "grey_16.png", "grey_16.tif", "grey_16_big_endian.tif", "float.tif"}
CLEAR_IN_PARTS = {"palette_index.png", "palette_bytes.png", "grey_alpha.png", "alpha.png", "texture.dds"}
WHOLE, BROKEN = whole_files(), broken_files()
NOT_THE_PICTURE = {"giant_tag.tif", "one_pixel.png", "thread.png", "turned.jpg", "one_bit.png", "bits.xbm"}


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("name", sorted(WHOLE))
def test_rare_kinds_of_files_show_their_picture(name: str) -> None:
    spec = views.ViewSpec(size=64, crop=64)
    view, size = views.read_eval_view(WHOLE[name], spec)
    assert view.shape == (64, 64, 3)
    assert size == loading.decode_rgb(WHOLE[name])[1]
    if name not in CLEAR_IN_PARTS | NOT_THE_PICTURE:
        shown = picture().convert("L") if name in IN_GREY else picture()
        expected, _ = views.read_eval_view(file_of(shown, "PNG"), spec)
        assert np.abs(view.astype(int) - expected).mean() <= 8


@pytest.mark.parametrize("name", sorted(BROKEN))
def test_broken_files_get_their_reason_soon_in_one_line(name: str) -> None:
    data, reason = BROKEN[name]
    start = time.thread_time()
    with pytest.raises(ImageError) as caught:
        loading.load_resized(data, size=64, resize="squash")
    assert (caught.value.reason, "\n" in caught.value.message) == (reason, False)
    assert time.thread_time() - start < 2


@pytest.mark.skipif(os.name != "posix", reason="the program that stands for Ghostscript is a shell script")
@pytest.mark.parametrize("data", [EPS, iptc_around(EPS)], ids=["EPS", "EPS inside IPTC"])
def test_no_picture_starts_a_program(data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow alone would: it hands EPS to Ghostscript, for which a script stands here that leaves a trace."""
    trace = tmp_path / "started"
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch '{trace}'\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    with pytest.raises(ImageError, match="start other programs"):
        loading.decode_rgb(data)
    assert not trace.exists()
    with contextlib.suppress(Exception):
        Image.open(io.BytesIO(data)).load()
    assert trace.exists()


def test_the_folder_of_odd_pictures_is_what_it_says(tmp_path: Path) -> None:
    expected = write_odd_pictures(tmp_path / "odd")
    assert {None, "special file", "missing", "empty", "truncated", "too large", "undecodable"} <= set(expected.values())
    assert len({path for path in expected if path.startswith("names/")}) >= 8
    for path, reason in expected.items():
        assert os.path.lexists(tmp_path / "odd" / path)
        assert (reason == "special file") == (
            (tmp_path / "odd" / path).exists() and not (tmp_path / "odd" / path).is_file()
        )


# ---- resizing ---------------------------------------------------------------------------------------------

COCO_PICTURES = sorted((Path(__file__).resolve().parents[3] / "shared/data/coco/images").glob("*.jpg"))
needs_photos = pytest.mark.skipif(not COCO_PICTURES, reason="the real pictures in ../shared/data/coco are not here")


@pytest.fixture(params=["native", "pillow"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each code that resizes; the first is skipped where torch cannot."""
    if request.param == "native" and loading.backend() != "native":
        pytest.skip("this torch has no LANCZOS for bytes")
    monkeypatch.setattr(loading, "backend", lambda: request.param)
    return request.param


def plain_lanczos(data: bytes, size: tuple[int, int]) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB").resize(size, Image.Resampling.LANCZOS)


@given(
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    size=st.integers(1, 40),
    orientation=st.sampled_from([1, 3, 6, 8]),
)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_each_way_of_resizing_gives_its_size_and_reports_the_original(
    backend: str, width: int, height: int, size: int, orientation: int
) -> None:
    data = file_of(Image.new("RGB", (width, height), (9, 99, 199)), "PNG", exif=with_orientation(orientation))
    original = (width, height) if orientation < 5 else (height, width)
    for resize in get_args(loading.Resize):
        picture, original_size = loading.load_resized(data, size=size, resize=resize)
        assert original_size == original
        assert (np.asarray(picture) == (9, 99, 199)).all()
        if resize in ("squash", "center-crop"):
            assert picture.size == (size, size)
        elif resize == "none":
            assert picture.size == original
        else:
            assert min(picture.size) == size
            exact = size * max(original) / min(original)
            assert abs(max(picture.size) - exact) <= 0.5


def test_what_each_way_of_resizing_keeps_of_a_wide_picture(backend: str) -> None:
    """`drawn` at 3:2 with one colour a corner: a squash keeps all, a centre crop cuts the same off left and right."""
    data = file_of(Image.fromarray(drawn()).resize((480, 320), Image.Resampling.NEAREST), "PNG")
    squashed = np.asarray(loading.load_resized(data, size=64, resize="squash")[0]).astype(int)
    cropped = np.asarray(loading.load_resized(data, size=64, resize="center-crop")[0]).astype(int)
    kept = np.asarray(loading.load_resized(data, size=64, resize="keep-ratio")[0]).astype(int)
    assert kept.shape == (64, 96, 3)
    assert np.abs(cropped - kept[:, 16:80]).max() == 0
    for pixels in (squashed, cropped):
        assert np.abs(pixels[8::48, 8::48] - drawn()[::31, ::47]).max() <= 2


@pytest.mark.parametrize("resize", get_args(loading.Resize))
@pytest.mark.parametrize("size", [(300, 300), (400, 200), (150, 310)])
def test_the_seen_area_is_what_the_view_shows(backend: str, resize: loading.Resize, size: tuple[int, int]) -> None:
    """Red and green tell how far right and how far down each pixel of the original is."""
    right, down = np.meshgrid(*(255 * (np.arange(side) + 0.5) / side for side in size))
    original = Image.fromarray(np.stack((right, down, 0 * down), axis=-1).round().astype(np.uint8))
    spec = views.ViewSpec(size=128, crop=112, resize=resize)
    pixels, _ = views.read_eval_view(file_of(original, "PNG"), spec)
    found = (pixels[:, 0, 0].mean(), pixels[0, :, 1].mean(), pixels[:, -1, 0].mean(), pixels[-1, :, 1].mean())
    assert np.array(found) / 255 == pytest.approx(views.seen_area(spec, size), abs=0.01)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_jpeg_stands_upright_after_resizing(backend: str, orientation: int) -> None:
    stored = Image.fromarray(np.ascontiguousarray(STORED_BY_ORIENTATION[orientation]))
    large = stored.resize((stored.width * 9, stored.height * 9), Image.Resampling.NEAREST)
    data = file_of(large, "JPEG", exif=with_orientation(orientation), quality=95, subsampling=0)
    for size in (HEIGHT, 9 * HEIGHT):  # decoded at a reduced scale, and in full
        picture, original_size = loading.load_resized(data, size=size, resize="keep-ratio")
        assert original_size == (WIDTH * 9, HEIGHT * 9)
        assert abs(picture.width - size * WIDTH / HEIGHT) <= 0.5
        corners = np.asarray(picture).astype(int)[size // 4 :: size // 2, picture.width // 4 :: picture.width // 2]
        assert np.abs(corners - drawn()[8::16, 12::24]).max() <= 6


@pytest.mark.parametrize("size", [(1200, 1024), (1333, 999), (1201, 1025)])
@pytest.mark.parametrize("subsampling", [0, 2])
def test_a_large_jpeg_decoded_at_a_reduced_scale_is_close_to_the_plain_way(
    backend: str, size: tuple[int, int], subsampling: int
) -> None:
    """Sides that the scale does not divide end in a part of a pixel: taken for a whole one they cost 20 dB."""
    data = file_of(photo_like(*size), "JPEG", quality=92, subsampling=subsampling)
    for wanted in (25, 64, 256):
        resized, original_size = loading.load_resized(data, size=wanted, resize="squash")
        assert original_size == size
        assert psnr(resized, plain_lanczos(data, (wanted, wanted))) >= 45


@pytest.mark.slow
@needs_photos
@pytest.mark.parametrize("size", [256, 64])
def test_real_photos_are_resized_like_plain_lanczos(backend: str, size: int) -> None:
    """At 256 most are decoded in full, at 64 nearly all at a reduced scale; found: 53.9 and 49.3 dB at worst."""
    for path in COCO_PICTURES:
        data = path.read_bytes()
        found = psnr(loading.load_resized(data, size=size, resize="squash")[0], plain_lanczos(data, (size, size)))
        assert found >= 45, path.name


def test_a_huge_picture_is_resized_by_pillow_which_needs_less_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    data = file_of(photo_like(400, 300), "PNG")
    monkeypatch.setattr(loading, "HUGE_PIXELS", 400 * 300 - 1)
    monkeypatch.setattr(loading, "_resize_native", lambda *_, **__: pytest.fail("went the other way"))
    monkeypatch.setattr(loading, "backend", lambda: "native")
    resized, _ = loading.load_resized(data, size=64, resize="squash")
    assert (np.asarray(resized) == np.asarray(plain_lanczos(data, (64, 64)))).all()


# ---- JPEGs: simplejpeg, and Pillow for what it refuses ---------------------------------------------------------


def by_pillow_alone(monkeypatch: pytest.MonkeyPatch, data: bytes, **options: Any) -> np.ndarray:
    with monkeypatch.context() as patch:
        patch.setattr(loading, "_decode_jpeg", lambda *_, **__: None)
        return decoded(data, **options)


@given(
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    at_least=st.sampled_from([None, 1, 3, 10, 30]),
    mode=st.sampled_from(["RGB", "L", "CMYK"]),
    options=st.fixed_dictionaries({"subsampling": st.sampled_from([0, 1, 2]), "progressive": st.booleans()}),
)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_pixels_are_those_of_pillow_at_every_scale(
    monkeypatch: pytest.MonkeyPatch,
    size: tuple[int, int],
    at_least: int | None,
    mode: str,
    options: dict[str, Any],
) -> None:
    assume(at_least is None or max(size) >= 8)  # below, several scales give the same size
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)).convert(mode)
    data = file_of(image, "JPEG", **options)
    found = decoded(data, at_least=at_least)
    assert (found == by_pillow_alone(monkeypatch, data, at_least=at_least)).all()
    if at_least is None:
        assert (loading.decode_stored(bytearray(data)) == found).all()


def test_pillow_decodes_no_plain_jpeg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_to_rgb", lambda _: pytest.fail("Pillow decoded it"))
    for image in (photo_like(96, 64), photo_like(96, 64).convert("L")):
        data = file_of(image, "JPEG", exif=with_orientation(6))
        loading.decode_stored(data)
        loading.decode_rgb(data, at_least=8)
        loading.load_resized(data, size=96, resize="keep-ratio")
        loading.load_resized(data, size=8, resize="squash")


def test_the_same_files_are_refused_whatever_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A JPEG cut anywhere, or with any bit flipped, gives the same pixels, or an error with the same reason."""
    good = file_of(photo_like(96, 64), "JPEG", quality=90)
    flipped = [bytearray(good) for _ in range(120)]
    for number, damaged in enumerate(flipped):
        damaged[len(good) * number // len(flipped)] ^= 1 << number % 8
    cut = [good[: len(good) * number // 60] for number in range(1, 60)] + [good[:-1], good[:-2], good[:-3]]
    files = [bytes(data) for data in (good, *cut, *flipped)]
    found = [_verdict(data) for data in files]
    monkeypatch.setattr(loading, "_decode_jpeg", lambda *_, **__: None)
    assert found == [_verdict(data) for data in files]
    assert {"truncated", "undecodable"} <= set(found)


def _verdict(data: bytes) -> str | bytes:
    try:
        return loading.decode_rgb(data).image.tobytes()
    except ImageError as error:
        return error.reason


def test_only_damage_is_a_complaint() -> None:
    """Chroma subsampling that simplejpeg refuses is no damage. 0x42: four samples of brightness in a row, two rows."""
    good = file_of(photo_like(96, 64), "JPEG", quality=90)
    factors = good.index(b"\xff\xc0") + 11
    with decoder_output.collect() as complaints:
        loading.decode_rgb(good)
        loading.decode_rgb(good[:factors] + b"\x42" + good[factors + 1 :])
        assert not complaints
        loading.decode_rgb(good[:-2] + bytes(range(1, 80)) + good[-2:])
        assert "extraneous bytes" in complaints[0]


@pytest.mark.parametrize("channels", ["RGB", "BGR"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_stored_image_is_decoded_into_the_buffer_if_it_is_a_jpeg_that_fits(
    kind: str, channels: Literal["RGB", "BGR"]
) -> None:
    data = file_of(photo_like(40, 30), kind)
    rows = np.zeros((3, 30, 40, 3), np.uint8)
    wanted = loading.decode_stored(data)[:, :, :: 1 if channels == "RGB" else -1]
    for buffer in (rows[1], np.zeros(40 * 31 * 3, np.uint8), np.zeros(40 * 30 * 3 - 1, np.uint8)):
        found = loading.decode_stored(data, channels=channels, buffer=buffer)
        assert found.flags.c_contiguous
        assert (found == wanted).all()
        assert np.shares_memory(found, buffer) == (kind == "JPEG" and buffer.size >= found.size)
    assert not rows[::2].any()


def test_a_damaged_stored_jpeg_is_the_same_with_a_buffer() -> None:
    good = file_of(photo_like(40, 30), "JPEG", quality=90)
    files = [good[: len(good) * number // 40] for number in range(1, 40)]
    files += [good[:place] + bytes([good[place] ^ 8]) + good[place + 1 :] for place in range(0, len(good), 29)]
    buffer = np.zeros(40 * 30 * 3, np.uint8)

    def verdict(data: bytes, **options: Any) -> str | bytes:
        try:
            return loading.decode_stored(data, **options).tobytes()
        except ImageError as error:
            return error.reason

    assert [verdict(data, buffer=buffer) for data in files] == [verdict(data) for data in files]


@pytest.mark.parametrize(
    ("height", "limit", "reason"), [(30, 40 * 30 - 1, "too large"), (0xFFFF, loading.MAX_PIXELS, "truncated")]
)
def test_a_stored_jpeg_gets_no_more_memory_than_any_other(
    monkeypatch: pytest.MonkeyPatch, height: int, limit: int, reason: str
) -> None:
    data = bytearray(file_of(photo_like(40, 30), "JPEG")[:-99])
    start = data.index(b"\xff\xc0") + 5
    data[start : start + 2] = height.to_bytes(2)
    monkeypatch.setattr(loading, "MAX_PIXELS", limit)
    with pytest.raises(ImageError) as caught:
        loading.decode_stored(data)
    assert caught.value.reason == reason


def test_no_damage_in_a_png_goes_unseen(backend: str) -> None:
    """Its pixels have a checksum; reading the orientation first must not swallow the error."""
    good = file_of(Image.fromarray(np.random.default_rng(3).integers(0, 256, (40, 40, 3), dtype=np.uint8)), "PNG")
    start, end = good.index(b"IDAT") + 4, good.index(b"IEND") - 8
    for place in range(start, end, 61):
        damaged = good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :]
        with pytest.raises(ImageError):
            to_stored_jpeg(damaged)


def test_a_bomb_inside_an_icon_is_refused_and_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = claiming(30_000, 30_000)
    directory = struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(bomb), 22)
    with pytest.raises(ImageError) as caught:
        loading.load_resized(directory + bomb, size=8, resize="squash")
    assert caught.value.reason == "too large"


def test_importing_the_library_leaves_pillow_as_it_is() -> None:
    code = """
import logging, warnings, numpy
from PIL import Image
def state(): return Image.MAX_IMAGE_PIXELS, list(warnings.filters), list(logging.getLogger("PIL").handlers)
before = state()
from captioner.images import decoder_output, loading, views
assert state() == before
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- what shards store --------------------------------------------------------------------------------------


def to_stored_jpeg(data: bytes, **changed: Any) -> loading.StoredJpeg:
    plain: dict[str, Any] = {"size": 64, "resize": "squash", "quality": 95}
    (found,) = loading.to_stored_jpegs([data], **(plain | changed))
    if isinstance(found, ImageError):
        raise found
    return found


def stored(data: bytes, **changed: Any) -> bytes:
    return to_stored_jpeg(data, **changed).data


def test_files_that_are_stored_together_are_as_alone_and_their_errors_stay_their_own() -> None:
    unread = ImageError("missing", "there is no such file")
    large = file_of(photo_like(1200, 900), "JPEG")
    files = [file_of(photo_like(64, 64), "JPEG"), unread, b"", large, file_of(photo_like(90, 50), "PNG"), large[:999]]
    marked: list[int] = []
    found = loading.to_stored_jpegs(files, size=64, resize="none", quality=95, set_index=marked.append)
    assert [isinstance(result, ImageError) for result in found] == [False, True, True, False, False, True]
    assert found[1] is unread
    for place in (0, 3, 4):
        assert found[place] == to_stored_jpeg(files[place], resize="none")  # type: ignore[arg-type]
    assert set(marked) == {0, 2, 3, 4, 5}


@pytest.mark.parametrize("resize", get_args(loading.Resize))
@pytest.mark.parametrize("options", [{"quality": 60}, {"quality": 97, "subsampling": 0, "progressive": True}])
def test_a_jpeg_of_the_wanted_size_is_stored_untouched(resize: loading.Resize, options: dict[str, Any]) -> None:
    data = file_of(photo_like(64, 64), "JPEG", **options)
    assert stored(data, resize=resize) == data


@pytest.mark.parametrize(
    "data",
    [
        file_of(photo_like(64, 64).convert("L"), "JPEG"),
        file_of(photo_like(64, 64).convert("CMYK"), "JPEG"),
        file_of(photo_like(64, 64), "JPEG", exif=with_orientation(3)),
        file_of(photo_like(64, 64), "PNG"),
        file_of(photo_like(64, 65), "JPEG"),
    ],
    ids=["grey", "CMYK", "turned", "PNG", "other size"],
)
def test_any_other_file_is_stored_as_an_upright_rgb_jpeg_of_the_wanted_size(data: bytes) -> None:
    found = Image.open(io.BytesIO(stored(data)))
    assert stored(data) != data
    assert (found.format, found.mode, found.size) == ("JPEG", "RGB", (64, 64))
    assert not found.getexif()


def test_a_damaged_jpeg_of_the_wanted_size_is_refused_and_not_passed_on() -> None:
    with pytest.raises(ImageError) as caught:
        stored(file_of(photo_like(64, 64), "JPEG")[:-200])
    assert caught.value.reason == "truncated"


def test_without_resizing_every_size_is_kept() -> None:
    data = file_of(photo_like(90, 50), "PNG")
    jpeg, size = to_stored_jpeg(data, resize="none")
    assert Image.open(io.BytesIO(jpeg)).size == size == (90, 50)


def test_encoding_twice_gives_equal_bytes_that_decode_close_to_the_picture() -> None:
    picture = photo_like(64, 64)
    data = loading.encode_jpeg(picture, quality=95)
    assert data == loading.encode_jpeg(picture, quality=95)
    assert psnr(loading.decode_rgb(data)[0], picture) >= 35
    assert len(loading.encode_jpeg(picture, quality=50)) < len(data)
