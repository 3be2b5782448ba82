"""Finds the description that an image has already: in a sidecar, or in its own metadata. Decodes no pixel.

Embedded metadata is read from the image's header by Pillow, and from the chunks of a PNG, whose texts may be at its
end. So exiftool is not needed to read it. A title is no description, but what Windows keeps as one in EXIF is.
"""

import io
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from PIL import ExifTags, Image, ImageFile, IptcImagePlugin

from captioner.files import storage
from captioner.images.loading import HEIC_START
from infer.listing import ImageFile as File
from infer.metadata import png, xmp
from infer.metadata.automatic import is_automatic

READ_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "AVIF")
IPTC_CAPTION = (2, 120)
IPTC_CAPTION_BYTES = re.compile(rb"\x1c\x02\x78([\0-\x7f].)", re.DOTALL)
BINARY = re.compile(r"[\0-\x08\x0e-\x1f]")
WINDOWS_TEXTS = (ExifTags.Base.XPComment, ExifTags.Base.XPSubject, ExifTags.Base.XPTitle)
XMP = ".xmp"

OpenImage = bytes | BinaryIO


@dataclass(frozen=True, kw_only=True, slots=True)
class Metadata:
    """What an image says about itself: its format, its XMP packet, and its description in IPTC, EXIF or PNG texts."""

    format: str
    size: tuple[int, int]
    packet: bytes | None
    description: str

    @property
    def has_description(self) -> bool:
        """Whether there is a description in any of them."""
        return bool(self.description) or has_text(self.packet)


# ---- sidecars ---------------------------------------------------------------------------------------------


def text_sidecar(image: Path, suffix: str) -> Path:
    """The text file of an image: `a.txt` of `a.jpg`, or `a.TXT` if only that is there."""
    return _existing(image.with_suffix(suffix), suffix)


def xmp_sidecars(image: Path) -> tuple[Path, Path]:
    """The names of an image's XMP sidecar: `a.jpg.xmp`, and `a.xmp`; with `.XMP` if only that is there."""
    return _existing(image.with_name(image.name + XMP), XMP), _existing(image.with_suffix(XMP), XMP)


def _existing(path: Path, suffix: str) -> Path:
    """The path, or the one with its suffix in capitals if only that exists."""
    capital = _in_capitals(path, suffix)
    return capital if not os.path.lexists(path) and os.path.lexists(capital) else path


def _in_capitals(path: Path, suffix: str) -> Path:
    return path.with_name(path.name.removesuffix(suffix) + suffix.upper())


def local_path(root: str, path: str) -> Path | None:
    """The absolute path of an image, or None for a URL. Links are not followed: a link is a name of its own."""
    return None if storage.is_remote(root) else Path(os.path.abspath(os.path.join(root, path)))  # noqa: PTH100, PTH118


def read_regular(path: Path, *, max_bytes: int) -> bytes | None:
    """The first bytes of a regular file; None if there is none, or it cannot be read. Pipes are never opened."""
    with suppress(OSError, ValueError):
        if stat.S_ISREG(path.stat().st_mode):
            return storage.read_bytes(str(path), end=max_bytes)
    return None


def find_sidecar(file: File, *, suffixes: Iterable[str]) -> str:
    """The suffix of the sidecar in which a local image has a description; "" without one."""
    image = local_path(file.root, file.path) if file.size is None else None
    for suffix in suffixes:
        if image is None or file.path.endswith((suffix, suffix.upper())):  # the file is a sidecar itself
            continue
        names = [image.with_suffix(suffix), *([image.with_name(image.name + XMP)] if suffix == XMP else [])]
        paths = (path for name in names for path in (name, _in_capitals(name, suffix)))
        has_words = has_text if suffix == XMP else bytes.strip
        max_bytes = xmp.MAX_BYTES + 1 if suffix == XMP else 4096
        if any(has_words(read_regular(path, max_bytes=max_bytes) or b"") for path in paths):
            return suffix
    return ""


def has_text(packet: bytes | None) -> bool:
    """Whether an XMP packet has a description; an unreadable one has none."""
    with suppress(xmp.XmpError):
        return bool(packet and xmp.read_texts(packet))
    return False


# ---- embedded ---------------------------------------------------------------------------------------------


def is_described(source: OpenImage) -> bool:
    """Whether an image, the bytes of its file or the open file, has a description in its own metadata."""
    found = read_metadata(source)
    return found is not None and found.has_description


def read_metadata(source: OpenImage) -> Metadata | None:
    """The metadata of an image; None if its header cannot be read, or its format is none of those that we read."""
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with open_header(file, formats=READ_FORMATS) as image:
            kind = "JPEG" if image.format == "MPO" else str(image.format)
            if kind == "PNG":
                texts = png.read_chunks(file)
                packet, description = texts.get(png.XMP), _first(_png_descriptions(texts))
            else:
                packet, description = image.info.get("xmp"), _first(_descriptions(image))
            packet = packet.encode() if isinstance(packet, str) else packet
            return Metadata(format=kind, size=image.size, packet=packet or None, description=description)
    except Exception:  # Pillow's plugins raise almost any type; captioning says what is wrong with the image
        return None


def had_checksum(source: OpenImage, sha256: str) -> bool:
    """Whether an image had this checksum when this program wrote the text that it has."""
    found = read_metadata(source)
    with suppress(xmp.XmpError):
        return found is not None and found.packet is not None and sha256 in xmp.read_sources(found.packet)
    return False


def open_header(file: BinaryIO, *, formats: tuple[str, ...] | None = None) -> ImageFile.ImageFile:
    """The image, of which only the header is read: HEIC, or one of Pillow's formats. Raises almost any exception."""
    start = file.read(64)
    file.seek(0)
    if HEIC_START.match(start):
        import pillow_heif

        return pillow_heif.HeifImageFile(file)
    return Image.open(file, formats=formats)


def _first(readers: Iterable[Callable[[], Any]]) -> str:
    """The first text that is not empty; damaged metadata has none."""
    for read in readers:
        with suppress(Exception):
            if text := _to_text(read()):
                return text
    return ""


def _descriptions(image: ImageFile.ImageFile) -> Iterator[Callable[[], Any]]:
    """What reads the caption in IPTC, and the descriptions in EXIF."""
    yield lambda: (IptcImagePlugin.getiptcinfo(image) or {}).get(IPTC_CAPTION)
    yield from _exif_descriptions(image.getexif)


def _exif_descriptions(read: Callable[[], Image.Exif]) -> Iterator[Callable[[], Any]]:
    """What reads the description, the user's comment, and the texts of Windows in EXIF."""
    yield lambda: _stored(read()[ExifTags.Base.ImageDescription])
    yield lambda: _user_comment(read())
    for tag in WINDOWS_TEXTS:
        yield lambda tag=tag: read()[tag].decode("utf-16-le")


def _stored(text: str | bytes) -> bytes:
    """The bytes of a text in EXIF, which Pillow takes for Latin-1; most programs write UTF-8."""
    return text.encode("latin-1") if isinstance(text, str) else text


def _user_comment(exif: Image.Exif) -> str:
    """The text behind the 8 bytes that name its encoding; "" for what is no text."""
    content = _stored(exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment])
    encoding, text = content[:8].rstrip(b"\0 ").upper(), content[8:]
    if encoding == b"UNICODE":
        surplus = text[1::2].count(0) - text[::2].count(0)  # Latin letters show the order, which some programs mix up
        is_little = surplus > 0 or (surplus == 0 and exif.endian == "<")
        comment = text.decode("utf-16-le" if is_little else "utf-16-be")
    elif encoding == b"JIS":
        comment = text.decode("euc_jp")
    else:
        comment = _to_text(text if encoding in (b"ASCII", b"") else content)
    return "" if BINARY.search(comment.strip("\0")) else comment


def _to_text(value: Any) -> str:
    """A field's text, without what cameras and programs write into each image."""
    if isinstance(value, list | tuple):
        value = value[0]
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            value = value.decode("latin-1")
    text = str(value or "").strip("\0 \t\r\n")
    return "" if is_automatic(text) else text


# ---- PNG --------------------------------------------------------------------------------------------------


def _png_descriptions(texts: dict[bytes, bytes]) -> Iterator[Callable[[], Any]]:
    """What reads the descriptions in the texts, the EXIF and the profiles of a PNG."""
    yield from (partial(texts.get, keyword) for keyword in png.TEXTS)
    yield from _exif_descriptions(lambda: _load_exif(texts[png.EXIF]))
    for name in png.PROFILES:
        read = partial(png.read_profile, texts, name)
        if name in (b"iptc", b"8bim"):
            yield lambda read=read: _iptc_caption(read())
        else:
            yield from _exif_descriptions(lambda read=read: _load_exif(read()))
            yield lambda read=read: xmp.read_texts(b"<" + read().partition(b"<")[2])[0]


def _load_exif(content: bytes) -> Image.Exif:
    exif = Image.Exif()
    exif.load(content)
    return exif


def _iptc_caption(content: bytes) -> bytes:
    found = IPTC_CAPTION_BYTES.search(content)
    return content[found.end() :][: int.from_bytes(found[1])] if found else b""
