"""Reads the metadata in a PNG's chunks, which may be behind its pixels: EXIF, XMP and texts."""

import os
import struct
import zlib
from contextlib import suppress
from typing import BinaryIO

from infer.metadata import xmp

START = b"\x89PNG\r\n\x1a\n"
EXIF, XMP = b"eXIf", b"XML:com.adobe.xmp"
TEXTS = (b"description", b"caption", b"comment")  # in any case
PROFILE = b"raw profile type "  # metadata in hexadecimal digits: of ImageMagick and of earlier exiftools
PROFILES = (b"iptc", b"8bim", b"exif", b"app1", b"xmp")
KEYWORDS = frozenset((XMP, *TEXTS, *(PROFILE + name for name in PROFILES)))


def read_chunks(file: BinaryIO) -> dict[bytes, bytes]:
    """The chunks of a PNG that may have a description: EXIF, XMP and texts, by keyword in small letters.

    An XMP packet that cannot be decompressed is there as it is, so that no other replaces it. Raises struct.error if
    the file is cut off.
    """
    texts: dict[bytes, bytes] = {}
    file.seek(len(START))
    while True:
        length, kind = struct.unpack(">I4s", file.read(8))
        if kind == b"IEND":
            return texts
        if kind == EXIF and length <= xmp.MAX_BYTES:
            texts.setdefault(kind, file.read(length))
            length = 0
        elif kind in (b"iTXt", b"tEXt", b"zTXt") and length <= xmp.MAX_BYTES:
            name, _, content = file.read(length).partition(b"\0")
            keyword = name if name == XMP else name.lower()
            if keyword in KEYWORDS and keyword not in texts:
                text = _text_of(kind, content)
                if text is not None or keyword == XMP:
                    texts[keyword] = content if text is None else text
            length = 0
        file.seek(length + 4, os.SEEK_CUR)


def _text_of(kind: bytes, content: bytes) -> bytes | None:
    """The text of a chunk behind its keyword; None if it is damaged, or has more than `xmp.MAX_BYTES`."""
    if kind == b"tEXt":
        return content
    if kind == b"iTXt":
        _, found, text = content[2:].partition(b"\0")[2].partition(b"\0")  # behind the language and the translation
        if not (found and content[0]):
            return text if found else None
    else:
        text = content[1:]
    inflate = zlib.decompressobj()
    with suppress(zlib.error):
        text = inflate.decompress(text, xmp.MAX_BYTES + 1)
        return text if inflate.eof and len(text) <= xmp.MAX_BYTES else None
    return None


def read_profile(texts: dict[bytes, bytes], name: bytes) -> bytes:
    """The content of a profile: digits behind an empty line, the name and the size."""
    return bytes.fromhex(texts[PROFILE + name].decode("latin-1").split("\n", 3)[3])
