"""Descriptions are found wherever photo programs and people put them, without decoding a pixel."""

import io
import os
import shutil
import struct
import subprocess
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


def exif_with(tag: int, value: Any, *, ifd: int | None = None) -> Image.Exif:
    exif = Image.Exif()
    (exif if ifd is None else exif.get_ifd(ifd))[tag] = value
    return exif


def comment_of(content: bytes) -> Image.Exif:
    return exif_with(ExifTags.Base.UserComment, content, ifd=ExifTags.IFD.Exif)


def profile_of(name: str, content: bytes) -> bytes:
    """The text of a profile as ImageMagick writes it, behind its keyword."""
    digits = content.hex()
    lines = (digits[start : start + 72] for start in range(0, len(digits), 72))
    return f"\n{name}\n{len(content):8}\n{chr(10).join(lines)}\n".encode()


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


def iptc_field(text: bytes) -> bytes:
    return struct.pack(">BBBH", 0x1C, 2, 120, len(text)) + text


def iptc_resource(text: bytes) -> bytes:
    field = iptc_field(text)
    return b"8BIM\x04\x04\0\0" + struct.pack(">I", len(field)) + field + b"\0" * (len(field) % 2)


def iptc_jpeg(text: bytes) -> bytes:
    segment = b"Photoshop 3.0\0" + iptc_resource(text)
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
    "EXIF of an AVIF": lambda: file_of(picture(), "AVIF", exif=exif_of("Mine")),
    "EXIF of a PNG": lambda: file_of(picture(), "PNG", exif=exif_of("Mine")),
    "EXIF behind a PNG's pixels": lambda: png_with(b"eXIf", exif_of("Mine").tobytes()[6:]),
    "EXIF of a PNG with its old start": lambda: png_with(b"eXIf", exif_of("Mine").tobytes()),
    "IPTC of a TIFF": lambda: file_of(picture(), "TIFF", tiffinfo={33723: iptc_field(b"Mine")}),
    "Windows' comment": lambda: file_of(picture(), "JPEG", exif=exif_with(0x9C9C, "Mine\0".encode("utf-16-le"))),
    "Windows' subject": lambda: file_of(picture(), "JPEG", exif=exif_with(0x9C9F, "Mine\0".encode("utf-16-le"))),
    "Windows' title": lambda: file_of(picture(), "PNG", exif=exif_with(0x9C9B, "Mine".encode("utf-16-le"))),
    "a comment in ASCII": lambda: file_of(picture(), "JPEG", exif=comment_of(b"ASCII\0\0\0Mine   ")),
    "a comment in little-endian Unicode": lambda: file_of(
        picture(), "JPEG", exif=comment_of(b"UNICODE\0" + "Mine".encode("utf-16-le"))
    ),
    "a comment in big-endian Unicode": lambda: file_of(
        picture(), "JPEG", exif=comment_of(b"UNICODE\0" + "Mine".encode("utf-16-be"))
    ),
    "a comment in JIS": lambda: file_of(picture(), "JPEG", exif=comment_of(b"JIS\0\0\0\0\0Mine")),
    "a comment of no known encoding": lambda: file_of(picture(), "JPEG", exif=comment_of(bytes(8) + b"Mine")),
    "a comment that names no encoding": lambda: file_of(picture(), "JPEG", exif=comment_of(b"Mine")),
    "a PNG's zTXt": lambda: png_with(b"zTXt", b"Description\0\0" + zlib.compress(b"Mine")),
    "a PNG's text in small letters": lambda: png_with(b"tEXt", b"description\0Mine"),
    "a PNG's comment": lambda: png_with(b"zTXt", b"Comment\0\0" + zlib.compress(b"Mine")),
    "a PNG's caption": lambda: png_with(b"iTXt", b"caption\0\0\0\0\0Mine"),
    "a PNG's old EXIF": lambda: png_with(
        b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(profile_of("exif", exif_of("Mine").tobytes()))
    ),
    "a PNG's old EXIF as text": lambda: png_with(
        b"tEXt", b"Raw profile type APP1\0" + profile_of("generic", exif_of("Mine").tobytes())
    ),
    "a PNG's old EXIF as international text": lambda: png_with(
        b"iTXt", b"Raw profile type exif\0\0\0\0\0" + profile_of("exif", exif_of("Mine").tobytes())
    ),
    "a PNG's old XMP": lambda: png_with(
        b"zTXt",
        b"Raw profile type APP1\0\0"
        + zlib.compress(profile_of("app1", b"http://ns.adobe.com/xap/1.0/\0" + PACKET.replace(b"A cat.", b"Mine"))),
    ),
    "a PNG's IPTC": lambda: png_with(
        b"zTXt", b"Raw profile type iptc\0\0" + zlib.compress(profile_of("iptc", iptc_resource(b"Mine")))
    ),
    "a PNG's text before its pixels": lambda: png_with(b"tEXt", b"Description\0Mine", at_end=False),
}


@pytest.mark.parametrize("name", DESCRIBED)
def test_other_descriptions_are_found(name: str, no_pixels: None) -> None:
    readable = {"HEIC": READS_HEIC, "WebP": READS_WEBP, "AVIF": READS_AVIF}
    if not all(is_read for kind, is_read in readable.items() if kind in name):
        pytest.skip("this Pillow does not read the format")
    found = read_metadata(DESCRIBED[name]())
    assert found is not None
    assert found.description == "Mine"


@pytest.mark.parametrize("text", ["Grüße aus Málaga", "Grandma's 80th", "猫"])
def test_a_description_in_exif_keeps_its_letters(text: str) -> None:
    """UTF-8 as most programs write it, and Latin-1."""
    encodings = ["utf-8", *(["latin-1"] if text.isascii() or "ü" in text else [])]
    for encoding in encodings:
        exif = exif_of("x" * len(text.encode(encoding))).tobytes()
        data = exif.replace(b"x" * len(text.encode(encoding)), text.encode(encoding))
        found = read_metadata(file_of(picture(), "JPEG", exif=data))
        assert found is not None
        assert found.description == text


AUTOMATIC = [
    "OLYMPUS DIGITAL CAMERA         ",
    "KONICA MINOLTA DIGITAL CAMERA",
    "MINOLTA DIGITAL CAMERA",
    "DIGITAL CAMERA",
    "SONY DSC",
    "SAMSUNG",
    "SAMSUNG CAMERA PICTURES",
    "<Digimax S500 / Kenox S500 / Digimax Cyber 530>",
    "KODAK Digital Still Camera",
    "Digital Still Camera",
    "Digital StillCamera",
    "Camera 1.1",
    "Exif_JPEG_PICTURE",
    "Exif_JPEG_T420",
    "default",
    "oznor",
    "Created by dji camera",
    "Processed with VSCO with c1 preset",
    "Created with GIMP",
    "Screenshot",
    "oplus_1048608",
    '{"sensor_type":"rear","mirror":false}',
    "filter: 0; fileterIntensity: 0.0; filterMask: 0;",
    "a cat, masterpiece\nSteps: 20, Sampler: Euler a, Seed: 1",
    "  ",
    "\0\0",
    r"DCIM\100MEDIA\DJI_1.JPG",
    "DCIM/100GOPRO/GOPR0001.JPG",
]
PERSONAL = [
    "My first digital camera",
    "MY FIRST DIGITAL CAMERA",
    "OLYMPUS DIGITAL CAMERA on the table",
    "Grandpa with his Olympus Digital Camera",
    "An old SONY DSC",
    "Samsung",
    "the default",
    "Default",
    "DCIM is where the photos are",
    r"DCIM\100MEDIA is the folder",
    "Sony dsc",
    "Camera",
    "Hdr",
    "Created with GIMP by Anna",
    "A screenshot",
    "Steps: 20 of them lead to the church",
]


@pytest.mark.parametrize("text", AUTOMATIC)
def test_what_cameras_and_programs_write_is_no_description(text: str) -> None:
    assert not is_described(file_of(picture(), "JPEG", exif=exif_of(text)))
    assert not is_described(file_of(picture(), "JPEG", exif=comment_of(b"ASCII\0\0\0" + text.encode())))
    assert not is_described(png_with(b"tEXt", b"Comment\0" + text.encode()))


@pytest.mark.parametrize("text", PERSONAL)
def test_what_a_person_writes_is_a_description(text: str) -> None:
    found = read_metadata(file_of(picture(), "JPEG", exif=exif_of(text)))
    assert found is not None
    assert found.description == text


@pytest.mark.parametrize(
    "content", [b"ASCII\0\0\0", bytes(264), bytes(8) + b"\1\2\xff\0\3", b"UNICODE\0" + bytes(9), b""]
)
def test_an_empty_or_binary_comment_is_no_description(content: bytes) -> None:
    assert not is_described(file_of(picture(), "JPEG", exif=comment_of(content)))


def test_a_title_of_a_png_is_no_description() -> None:
    """Programs write a file's name, or a window's."""
    for keyword in (b"Title", b"Software", b"Author", b"parameters"):
        assert not is_described(png_with(b"tEXt", keyword + b"\0Mine"))


def test_a_hostile_text_of_a_png_is_cut() -> None:
    bomb = zlib.compress(bytes(200_000_000), 9)
    assert not is_described(png_with(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + bomb))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0no stream",
        b"\0" + zlib.compress(b"Mine" * 99)[:-9],
        b"\0" + zlib.compress(bytes(200_000_000), 9),
    ],
    ids=["empty", "no stream", "cut off", "a bomb"],
)
@pytest.mark.parametrize("keyword", [b"Description", b"Raw profile type exif"])
def test_a_damaged_text_of_a_png_is_no_description(keyword: bytes, content: bytes) -> None:
    """The rest of the file is read."""
    for kind, start in ((b"zTXt", b""), (b"iTXt", b"\1\0\0")):
        found = read_metadata(png_with(kind, keyword + b"\0" + start + content))
        assert found is not None
        assert found.description == ""
        whole = chunk(b"tEXt", b"comment\0Mine") + chunk(b"IEND", b"")
        described = png_with(kind, keyword + b"\0" + start + content)[:-12] + whole
        assert is_described(described)


def test_a_damaged_packet_of_a_png_is_left_as_it_is() -> None:
    """Another one would replace a person's words in it."""
    found = read_metadata(png_with(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(PACKET)[:-9]))
    assert found is not None
    assert not found.has_description
    with pytest.raises(xmp.XmpError):
        xmp.extend(found.packet, "A dog.", model="m", date="2026-11-28")


EXIF_TAGS = ("-EXIF:ImageDescription", "-EXIF:UserComment", "-EXIF:XPComment")
EXIFTOOL_TAGS = {
    "JPEG": (*EXIF_TAGS, "-IPTC:Caption-Abstract"),
    "TIFF": (*EXIF_TAGS, "-IPTC:Caption-Abstract"),
    "PNG": (*EXIF_TAGS, "-IPTC:Caption-Abstract", "-PNG:Description", "-PNG:Comment"),
    **({"WEBP": EXIF_TAGS} if READS_WEBP else {}),
}


@pytest.mark.external
@pytest.mark.skipif(shutil.which("exiftool") is None, reason="needs exiftool")
@pytest.mark.parametrize(("kind", "tag"), [(kind, tag) for kind, tags in EXIFTOOL_TAGS.items() for tag in tags])
@pytest.mark.parametrize("options", [(), ("-z", "-api", "Compress=1")], ids=["plain", "compressed"])
def test_what_exiftool_writes_is_found(tmp_path: Path, kind: str, tag: str, options: tuple[str, ...]) -> None:
    file = tmp_path / f"a.{kind.lower()}"
    file.write_bytes(file_of(picture(), kind))
    subprocess.run(["exiftool", "-q", "-overwrite_original", *options, f"{tag}=Ünser Haus", file], check=True)
    found = read_metadata(file.read_bytes())
    assert found is not None
    assert found.description == "Ünser Haus"


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
        ("a.TXT", b"mine", ".txt"),
        ("a.XMP", PACKET, ".xmp"),
        ("a.jpg.XMP", PACKET, ".xmp"),
        ("a.XMP", xmp.EMPTY, ""),
        ("a.Xmp", PACKET, ""),
    ],
)
def test_a_sidecar_with_a_text_is_a_description(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert find_sidecar(File(str(tmp_path), "a.jpg"), suffixes=SUFFIXES) == expected


def test_a_text_counts_beside_an_empty_sidecar_in_the_other_letters(tmp_path: Path) -> None:
    for suffix, empty, content in ((".txt", b"\n", b"mine"), (".xmp", xmp.EMPTY, PACKET)):
        (tmp_path / f"a{suffix}").write_bytes(empty)
        (tmp_path / f"a{suffix.upper()}").write_bytes(content)
        assert find_sidecar(File(str(tmp_path), "a.jpg"), suffixes=[suffix]) == suffix
        assert find_sidecar(File(str(tmp_path), f"a{suffix.upper()}"), suffixes=[suffix]) == ""


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
