"""Descriptions are found wherever photo programs and people put them, without decoding a pixel."""

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from odd_pictures import READS_AVIF, READS_HEIC, READS_WEBP, broken_files, chunk, file_of, picture, whole_files
from PIL import ExifTags, Image, ImageFile

from infer.dry_run import look_at
from infer.listing import ImageFile as File
from infer.metadata import xmp
from infer.metadata.described import find_sidecar, is_described, read_metadata

PACKET = xmp.extend(None, "A cat.", model="m", date="2026-11-28") or b""
KINDS = ["JPEG", "PNG", "TIFF", *(["WEBP"] if READS_WEBP else []), *(["AVIF"] if READS_AVIF else [])]


def exif_of(text: str) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = text
    return exif


def heic(**options: Any) -> bytes:
    import pillow_heif

    buffer = io.BytesIO()
    pillow_heif.from_pillow(picture()).save(buffer, **options)
    return buffer.getvalue()


def with_xmp(kind: str, packet: bytes) -> bytes:
    """An image of this kind with a packet."""
    if kind == "HEIF":
        return heic(xmp=packet)
    if kind == "PNG":
        return png_with(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + packet)
    if kind == "TIFF":
        return file_of(picture(), kind, tiffinfo={700: packet})
    return file_of(picture(), kind, xmp=packet)


def png_with(kind: bytes, content: bytes, *, at_end: bool = True) -> bytes:
    """A PNG with this chunk behind its pixels, or before them."""
    data = file_of(picture(), "PNG")
    place = len(data) - 12 if at_end else 33
    return data[:place] + chunk(kind, content) + data[place:]


def iptc_jpeg(text: bytes) -> bytes:
    field = struct.pack(">BBBH", 0x1C, 2, 120, len(text)) + text
    resource = b"8BIM\x04\x04\0\0" + struct.pack(">I", len(field)) + field + b"\0" * (len(field) % 2)
    segment = b"Photoshop 3.0\0" + resource
    data = file_of(picture(), "JPEG")
    return data[:2] + b"\xff\xed" + struct.pack(">H", len(segment) + 2) + segment + data[2:]


@pytest.fixture
def no_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a pixel was decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", refuse)


@pytest.mark.parametrize("kind", [*KINDS, *(["HEIF"] if READS_HEIC else [])])
def test_an_xmp_description_is_found_in_all_formats(kind: str, no_pixels: None) -> None:
    data = with_xmp(kind, PACKET)
    found = read_metadata(data)
    assert found is not None
    assert (found.format, found.packet, found.description) == (kind, PACKET, "")
    assert is_described(data)
    for packet in (xmp.EMPTY, b"no packet"):
        assert not is_described(with_xmp(kind, packet))


DESCRIBED = {
    "EXIF of a JPEG": lambda: file_of(picture(), "JPEG", exif=exif_of("Mine")),
    "EXIF of a TIFF": lambda: file_of(picture(), "TIFF", exif=exif_of("Mine")),
    "EXIF of a HEIC": lambda: heic(exif=exif_of("Mine").tobytes()),
    "EXIF of a WebP": lambda: file_of(picture(), "WEBP", exif=exif_of("Mine")),
    "IPTC": lambda: iptc_jpeg(b"Mine"),
    "a PNG's text": lambda: png_with(b"tEXt", b"Description\0Mine"),
    "a PNG's compressed text": lambda: png_with(b"iTXt", b"Description\0\1\0en\0\0" + zlib.compress(b"Mine")),
    "a PNG's text before its pixels": lambda: png_with(b"tEXt", b"Description\0Mine", at_end=False),
}


@pytest.mark.parametrize("name", DESCRIBED)
def test_other_descriptions_are_found(name: str, no_pixels: None) -> None:
    if ("HEIC" in name and not READS_HEIC) or ("WebP" in name and not READS_WEBP):
        pytest.skip("this Pillow does not read the format")
    found = read_metadata(DESCRIBED[name]())
    assert found is not None
    assert found.description == "Mine"


@pytest.mark.parametrize(
    "text", ["OLYMPUS DIGITAL CAMERA         ", "SONY DSC", "  ", "\0\0", r"DCIM\100MEDIA\DJI_1.JPG"]
)
def test_what_cameras_write_is_no_description(text: str) -> None:
    assert not is_described(file_of(picture(), "JPEG", exif=exif_of(text)))


def test_a_hostile_text_of_a_png_is_cut() -> None:
    bomb = zlib.compress(bytes(200_000_000), 9)
    assert not is_described(png_with(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + bomb))


def test_no_odd_file_is_an_error_or_described() -> None:
    for data in (*whole_files().values(), *(data for data, _ in broken_files().values())):
        assert not is_described(data)


# ---- sidecars, and what a dry run finds -------------------------------------------------------------------

SUFFIXES = (".txt", ".xmp")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", b"mine", ".txt"),
        ("a.txt", b" \n", ""),
        ("a.jpg.txt", b"mine", ""),
        ("a.xmp", PACKET, ".xmp"),
        ("a.jpg.xmp", PACKET, ".xmp"),
        ("a.jpg.xmp", xmp.EMPTY, ""),
        ("a.jpg.xmp", b"broken", ""),
        ("b.jpg.xmp", PACKET, ""),
    ],
)
def test_a_sidecar_with_a_text_is_a_description(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert find_sidecar(File(str(tmp_path), "a.jpg"), suffixes=SUFFIXES) == expected


def test_a_sidecar_that_never_ends_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.txt")
    (tmp_path / "a.xmp").symlink_to("/dev/zero")
    (tmp_path / "a.jpg.xmp").symlink_to("a.jpg.xmp")
    assert find_sidecar(File(str(tmp_path), "a.jpg"), suffixes=SUFFIXES) == ""
    assert find_sidecar(File("s3://bucket", "a.jpg"), suffixes=SUFFIXES) == ""


def test_a_dry_run_finds_the_broken_files_that_captioning_finds(tmp_path: Path) -> None:
    for name, data in whole_files().items():
        (tmp_path / name).write_bytes(data)
        assert look_at(File(str(tmp_path), name), suffixes=SUFFIXES) == ("", "")
    for name, (data, reason) in broken_files().items():
        (tmp_path / name).write_bytes(data)
        if name != "cut.heic" and "tiff" not in name:  # only decoding shows it
            assert look_at(File(str(tmp_path), name), suffixes=SUFFIXES) == ("", reason), name


def test_a_dry_run_decodes_no_file_that_looks_whole(tmp_path: Path, no_pixels: None) -> None:
    for kind in KINDS:
        (tmp_path / kind).write_bytes(with_xmp(kind, PACKET))
        assert look_at(File(str(tmp_path), kind), suffixes=SUFFIXES) == ("in the image", "")
