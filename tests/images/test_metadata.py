"""Damaged metadata costs no picture and no pixel; damaged pixels are errors as ever."""

import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from odd_pictures import HEIGHT, READS_AVIF, READS_HEIC, READS_WEBP, WIDTH, chunk, file_of, picture, whole_files
from PIL import ExifTags, Image, features

from captioner.images import loading
from captioner.images.loading import ImageError
from captioner.images.metadata import without_metadata

CASE = Path(__file__).resolve().parents[3] / "shared/data/cases/png_bad_text_crc.png"
PNG = file_of(picture(), "PNG")
JPEG = file_of(picture(), "JPEG", quality=95)
WHOLE = whole_files()
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="1"/></x:xmpmeta>'


def rich_exif() -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "a maker of cameras"
    exif[ExifTags.Base.XResolution] = 72.0
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"a comment"
    exif.get_ifd(ExifTags.IFD.GPSInfo)[1] = "N"
    return exif


def pixels(data: bytes) -> np.ndarray:
    found, size = loading.decode_rgb(data)
    assert size == (WIDTH, HEIGHT)
    return np.asarray(found)


def check_shows_picture(data: bytes, plain: bytes = PNG) -> None:
    assert (pixels(data) == pixels(plain)).all()
    for resize in ("none", "squash"):
        (found,) = loading.to_stored_jpegs([data], size=32, resize=resize, quality=95)
        assert isinstance(found, loading.StoredJpeg)
        assert Image.open(io.BytesIO(found.data)).convert("RGB").size  # what is stored, all readers open
        assert found.original_size == (WIDTH, HEIGHT)


# ---- PNG --------------------------------------------------------------------------------------------------


def bad_checksum(data: bytes) -> bytes:
    return data[:-4] + bytes([data[-4] ^ 1]) + data[-3:]


DAMAGED_CHUNKS = {
    **{f"checksum of {kind.decode()}": bad_checksum(chunk(kind, content)) for kind, content in {
        b"tEXt": b"Comment\0hello", b"zTXt": b"Comment\0\0" + zlib.compress(b"hello"), b"iTXt": b"Title\0\0\0\0\0hello",
        b"tIME": bytes(7), b"pHYs": bytes(9), b"gAMA": bytes(4), b"cHRM": bytes(32), b"sRGB": b"\0", b"bKGD": bytes(6),
        b"eXIf": b"MM\0*\0\0\0\x08\0\0", b"iCCP": b"name\0\0" + zlib.compress(b"profile"), b"sBIT": b"\x08\x08\x08",
        b"acTL": bytes(8), b"fcTL": bytes(26), b"prVt": b"private",
    }.items()},
    "short gAMA": chunk(b"gAMA", b"\0"),
    "short cHRM": chunk(b"cHRM", bytes(31)),
    "short pHYs": chunk(b"pHYs", b""),
    "empty sRGB": chunk(b"sRGB", b""),
    "short acTL": chunk(b"acTL", b"\0"),
    "frames out of order": chunk(b"acTL", b"\0\0\0\2\0\0\0\0") + chunk(b"fcTL", b"\0\0\0\7" + bytes(22)),
    "broken profile": chunk(b"iCCP", b"name\0\0no zlib"),
    "profile in an unknown compression": chunk(b"iCCP", b"name\0\x09no zlib"),
    "huge profile": chunk(b"iCCP", b"name\0\0" + zlib.compress(bytes(1 << 22))),
    "text in an unknown compression": chunk(b"zTXt", b"Comment\0\x09abc"),
    "huge text": chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(1 << 22))),
    "huge EXIF as text": chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(bytes(1 << 22))),
    "broken EXIF as text": chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n  9\nxyz")),
    "broken EXIF": chunk(b"eXIf", b"MM\0*\xff\xff\xff\xff"),
    "EXIF that is none": chunk(b"eXIf", b"rubbish"),
    "broken XMP": chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0\xff\xfe\xfd tiff:Orientation"),
    "huge XMP": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(bytes(1 << 22))),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED_CHUNKS)
def test_a_damaged_chunk_beside_the_pixels_costs_no_png(name: str) -> None:
    start, end = PNG.index(b"IDAT") - 4, PNG.index(b"IEND") - 4
    for place in (33, start, end):
        check_shows_picture(PNG[:place] + DAMAGED_CHUNKS[name] + PNG[place:])


@pytest.mark.skipif(not CASE.exists(), reason=f"there is no {CASE}")
def test_the_reported_png() -> None:
    assert loading.load_resized(CASE.read_bytes(), size=32, resize="squash")[1] == (120, 80)


def test_damage_in_what_decides_pixels_is_an_error() -> None:
    palette = file_of(picture().quantize(16), "PNG", transparency=bytes(range(0, 256, 16)))
    for data, kind in ((PNG, b"IHDR"), (palette, b"PLTE"), (palette, b"tRNS")):
        place = data.index(kind)
        end = place + 4 + int.from_bytes(data[place - 4 : place])
        with pytest.raises(ImageError):
            loading.decode_rgb(data[:end] + bytes([data[end] ^ 1]) + data[end + 1 :])


def test_a_damaged_chunk_inside_an_icon_costs_no_icon() -> None:
    png = PNG[:33] + DAMAGED_CHUNKS["checksum of tEXt"] + PNG[33:]
    directory = struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", WIDTH, HEIGHT, 0, 0, 1, 32, len(png), 22)
    assert (pixels(directory + png) == pixels(PNG)).all()


# ---- JPEG -------------------------------------------------------------------------------------------------


def segment(marker: int, content: bytes) -> bytes:
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(content) + 2) + content


SEGMENTS = [b"JFIF\0", b"JFXX\0", b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0", b"ICC_PROFILE\0", b"MPF\0", b"FPXR\0"]
SEGMENTS += [b"Photoshop 3.0\0", b"Photoshop 3.0\x008BIM\4\4", b"Photoshop 3.0\x008BIM\4\4\0", b"Adobe", b""]


@pytest.mark.parametrize("start", SEGMENTS, ids=repr)
def test_a_damaged_segment_costs_no_jpeg(start: bytes) -> None:
    for marker in (*range(0xE0, 0xF0), 0xFE):
        for rest in (b"", b"x", b"\xff" * 7, b"II*\0\xf0\xff\xff\x7f" + bytes(99)):
            check_shows_picture(JPEG[:2] + segment(marker, start + rest) + JPEG[2:], JPEG)


def test_a_jpeg_with_damaged_metadata_is_turned_by_its_exif_all_the_same() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    data = file_of(picture(), "JPEG", exif=exif)
    for damage in (segment(0xE2, b"ICC_PROFILE\0"), segment(0xEE, b"Adobe")):
        assert loading.decode_rgb(data[:2] + damage + data[2:])[1] == (HEIGHT, WIDTH)


def test_colours_do_not_change_with_damaged_metadata() -> None:
    """The Adobe segment tells how CMYK is stored, and stays when another one is damaged."""
    cmyk = file_of(picture().convert("CMYK"), "JPEG", quality=95)
    check_shows_picture(cmyk[:2] + segment(0xE2, b"ICC_PROFILE\0") + cmyk[2:], cmyk)


def test_damaged_pixels_stay_errors_beside_damaged_metadata() -> None:
    damaged = JPEG[:2] + segment(0xE2, b"ICC_PROFILE\0") + JPEG[2:]
    for end in (len(damaged) // 2, -60):
        with pytest.raises(ImageError) as caught:
            loading.decode_rgb(damaged[:end])
        assert caught.value.reason == "truncated"


# ---- TIFF -------------------------------------------------------------------------------------------------


def tiff_with(data: bytes, tag: int, kind: int, count: int, value: int) -> bytes:
    """The TIFF with this entry in its directory, which moves to the end."""
    (directory,) = struct.unpack_from("<I", data, 4)
    (length,) = struct.unpack_from("<H", data, directory)
    entries = [data[directory + 2 + 12 * number :][:12] for number in range(length)]
    entries = [entry for entry in entries if struct.unpack_from("<H", entry)[0] != tag]
    entries = sorted([*entries, struct.pack("<HHII", tag, kind, count, value)], key=lambda entry: entry[1::-1])
    body = data + bytes(len(data) % 2)
    tail = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    return body[:4] + struct.pack("<I", len(body)) + body[8:] + tail


@pytest.mark.parametrize("tag", [270, 271, 282, 296, 305, 306, 330, 700, 33723, 34377, 34665, 34675, 34853, 50838])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_damaged_tag_costs_no_tiff(tag: int) -> None:
    compressions = (None, "tiff_lzw") if features.check("libtiff") else (None,)
    for data in (file_of(picture(), "TIFF", compression=compression) for compression in compressions):
        for kind in (*range(17), 999):
            for count, value in ((0, 0), (1, 0), (1, 7), (4, 0xFFFF_FFFF), (0xFFFF_FFF0, 8), (99, 8)):
                damaged = tiff_with(data, tag, kind, count, value)
                assert (pixels(damaged) == pixels(data)).all(), (kind, count, value)


@pytest.mark.parametrize("big_tiff", [False, True])
def test_a_bare_tiff_has_the_same_pixels(big_tiff: bool) -> None:
    for image in (picture(), picture().quantize(16), picture().convert("1"), picture().convert("CMYK")):
        data = file_of(image, "TIFF", big_tiff=big_tiff, exif=rich_exif(), icc_profile=b"profile" * 99)
        bare = without_metadata(data)
        assert len(bare) == len(data)
        assert Image.open(io.BytesIO(bare)).tobytes() == image.tobytes()


# ---- the other formats ------------------------------------------------------------------------------------


def damageable() -> Iterator[tuple[str, bytes, bytes]]:
    """Files, and a stretch of metadata in each that may be written over."""
    exif = rich_exif().tobytes()
    inside = exif.removeprefix(b"Exif\0\0")
    yield "JPEG", file_of(picture(), "JPEG", exif=exif), inside
    yield "PNG", file_of(picture(), "PNG", exif=exif), inside
    if READS_WEBP:
        yield "WebP", file_of(picture(), "WEBP", exif=exif), inside
        yield "WebP XMP", file_of(picture(), "WEBP", xmp=XMP), XMP
    if READS_AVIF:
        yield "AVIF", file_of(picture(), "AVIF", exif=exif), inside
        yield "AVIF XMP", file_of(picture(), "AVIF", xmp=XMP), XMP
    if READS_HEIC:
        import pillow_heif

        buffer = io.BytesIO()
        pillow_heif.from_pillow(picture()).save(buffer, exif=exif, xmp=XMP)
        yield "HEIC", buffer.getvalue(), inside
        yield "HEIC XMP", buffer.getvalue(), XMP


DAMAGEABLE = list(damageable())


@given(which=st.sampled_from(DAMAGEABLE), damage=st.binary(min_size=1, max_size=40), place=st.integers(0, 10_000))
@settings(deadline=None, max_examples=120)
def test_metadata_that_is_written_over_costs_no_picture(
    which: tuple[str, bytes, bytes], damage: bytes, place: int
) -> None:
    name, data, metadata = which
    start, damage = data.index(metadata), damage[: len(metadata)]
    start += place % (len(metadata) - len(damage) + 1)
    picture_found, size = loading.decode_rgb(data[:start] + damage + data[start + len(damage) :])
    assert sorted(size) == sorted((WIDTH, HEIGHT)), name  # the orientation may be what was written over
    assert picture_found.size == size


@pytest.mark.skipif(not READS_AVIF, reason="this Pillow has no AVIF")
def test_exif_that_is_none_costs_no_avif() -> None:
    data = file_of(picture(), "AVIF", exif=rich_exif().tobytes())
    start = data.index(rich_exif().tobytes().removeprefix(b"Exif\0\0"))
    damaged = data[: start - 10] + b"\xff" * 20 + data[start + 10 :]
    assert (pixels(damaged) == pixels(data)).all()


@pytest.mark.parametrize("name", sorted(WHOLE.keys() - {"huge_text.png"}))
def test_a_bare_file_has_its_length_and_shows_the_same(name: str) -> None:
    data = WHOLE[name]
    bare = without_metadata(data)
    assert len(bare) == len(data)
    if not name.endswith("heic"):
        first, second = (Image.open(io.BytesIO(content)).convert("RGBA") for content in (data, bare))
        assert first.tobytes() == second.tobytes()


@given(data=st.binary(max_size=200), start=st.sampled_from([b"", PNG[:8], PNG[:33], b"\xff\xd8", b"II*\0", b"MM\0+"]))
@settings(deadline=None, max_examples=200)
def test_whatever_the_bytes_are_their_number_stays(data: bytes, start: bytes) -> None:
    assert len(without_metadata(start + data)) == len(start + data)
