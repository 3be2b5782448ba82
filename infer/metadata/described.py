"""Finds the description that an image has already: in a sidecar, or in its own metadata. Decodes no pixel.

Embedded metadata is read from the image's header by Pillow, and from the chunks of a PNG, whose texts may be at its
end. So exiftool is not needed to read it.
"""

import hashlib
import io
import os
import re
import stat
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from PIL import ExifTags, Image, ImageFile, IptcImagePlugin

from captioner.files import storage
from captioner.images.loading import HEIC_START
from infer.listing import ImageFile as File
from infer.metadata import xmp

READ_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "AVIF")
PNG_START = b"\x89PNG\r\n\x1a\n"
PNG_XMP, PNG_DESCRIPTION = b"XML:com.adobe.xmp", b"Description"
IPTC_CAPTION = (2, 120)
CAMERA_TEXT = re.compile(r"(\w+ )*DIGITAL CAMERA|SONY DSC|DCIM\\.*|Exif_JPEG_PICTURE|default", re.IGNORECASE)
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
    """The text file of an image: `a.txt` of `a.jpg`."""
    return image.with_suffix(suffix)


def xmp_sidecars(image: Path) -> tuple[Path, Path]:
    """The names that the XMP sidecar of an image may have: `a.jpg.xmp`, or `a.xmp`."""
    return image.with_name(image.name + XMP), image.with_suffix(XMP)


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
        if image is None or file.path.endswith(suffix):  # the file is a sidecar itself
            continue
        if suffix == XMP:
            if any(has_text(read_regular(path, max_bytes=xmp.MAX_BYTES + 1)) for path in xmp_sidecars(image)):
                return XMP
        elif (read_regular(text_sidecar(image, suffix), max_bytes=4096) or b"").strip():
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
                file.seek(0)
                packet, description = _read_png(file)
            else:
                packet, description = image.info.get("xmp"), _first(_descriptions(image))
            packet = packet.encode() if isinstance(packet, str) else packet
            return Metadata(format=kind, size=image.size, packet=packet or None, description=description)
    except Exception:  # Pillow's plugins raise almost any type; captioning says what is wrong with the image
        return None


def is_same_image(file: BinaryIO, sha256: str) -> bool:
    """Whether an open file has this checksum, or had it before this program embedded a text. Raises OSError."""
    found = read_metadata(file)
    with suppress(xmp.XmpError):
        if found is not None and found.packet is not None and xmp.read_source(found.packet) == sha256:
            return True
    file.seek(0)
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest() == sha256


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
    """What reads the caption in IPTC, and the description in EXIF."""
    yield lambda: (IptcImagePlugin.getiptcinfo(image) or {}).get(IPTC_CAPTION)
    yield lambda: image.getexif().get(ExifTags.Base.ImageDescription)


def _to_text(value: Any) -> str:
    """A field's text, without what cameras write into each photo."""
    if isinstance(value, list | tuple):
        value = value[0]
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            value = value.decode("latin-1")
    text = str(value or "").strip("\0 \t\r\n")
    return "" if CAMERA_TEXT.fullmatch(text) else text


# ---- PNG --------------------------------------------------------------------------------------------------


def _read_png(file: BinaryIO) -> tuple[bytes | None, str]:
    """The XMP packet and the description in a PNG's texts. Raises struct.error if the file is cut off."""
    texts: dict[bytes, bytes] = {}
    file.seek(len(PNG_START))
    while True:
        length, kind = struct.unpack(">I4s", file.read(8))
        if kind == b"IEND":
            break
        if kind in (b"iTXt", b"tEXt") and length <= xmp.MAX_BYTES:
            keyword, _, content = file.read(length).partition(b"\0")
            if keyword in (PNG_XMP, PNG_DESCRIPTION):
                texts.setdefault(keyword, _text_of(kind, content))
            length = 0
        file.seek(length + 4, os.SEEK_CUR)
    return texts.get(PNG_XMP), _to_text(texts.get(PNG_DESCRIPTION))


def _text_of(kind: bytes, content: bytes) -> bytes:
    """The text of a chunk behind its keyword, decompressed; at most `xmp.MAX_BYTES`."""
    if kind == b"tEXt":
        return content
    text = content[2:].split(b"\0", 2)[2]  # behind the language and the translated keyword
    return zlib.decompressobj().decompress(text, xmp.MAX_BYTES + 1) if content[0] else text
