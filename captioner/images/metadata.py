"""Remove metadata that does not affect pixels, so that an image with damaged metadata can still be decoded.

Every function returns a file of the same length with the same pixels at the same offsets. Orientation metadata is kept
unless it is damaged itself.
"""

import re
import struct
import zlib
from collections.abc import Iterator
from typing import Literal

PNG_START = b"\x89PNG\r\n\x1a\n"
MAY_HOLD_PNG = (PNG_START, b"\0\0\1\0", b"\0\0\2\0", b"icns")  # icons and cursors as well
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
MAX_TEXT_BYTES = 1 << 20  # of a compressed text in a PNG; Pillow refuses an image with a longer one

_AVIF_EXIF = re.compile(rb"(infe(?:\x02.{7}|\x03.{9}))Exif", re.DOTALL)  # an entry of the list of what the file holds
_NOTHING = b"skIp"  # an ancillary, private chunk that no reader knows
_ORIENTATION_TEXTS = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")
_COMMENT = 0xFE
_SHORTEST_JPEG_SEGMENTS = {0xE0: 14, 0xEE: 12}  # JFIF and Adobe, which decide colours; libjpeg ignores shorter ones
_ORIENTATION, _XMP = 274, 700
# fmt: off
_PIXEL_TAGS = frozenset((
    256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325, 332, 334, 338, 339,
    347, 512, 513, 514, 515, 517, 518, 519, 520, 521, 529, 530, 531, 532, 32997, 32998, 50674,
))
# fmt: on
"""Baseline, extension and JPEG tags that say what the bytes of the pixels mean."""


def without_metadata(data: bytes) -> bytes:
    """The file without metadata; `data` unchanged if the format is not handled here."""
    if data.startswith(MAY_HOLD_PNG):
        return _bare_png(data)
    if data.startswith(TIFF_STARTS):
        return _bare_tiff(data)
    if data.startswith(b"\xff\xd8"):
        return _bare_jpeg(data)
    return _AVIF_EXIF.sub(rb"\1" + _NOTHING, data) if data[4:8] == b"ftyp" else data


# ---- PNG --------------------------------------------------------------------------------------------------


def _bare_png(data: bytes) -> bytes:
    bare = bytearray()  # stays empty, without a copy of the file, if there is nothing to remove
    for start in re.finditer(re.escape(PNG_START), data):
        for offset, kind, content in _png_chunks(data, start.end()):
            is_ancillary = bool(kind[0] & 0x20)
            if not is_ancillary or kind == b"tRNS" or (_may_orient(kind, content) and _is_whole(data, offset, content)):
                continue
            bare = bare or bytearray(data)
            bare[offset + 4 : offset + 8] = _NOTHING
            end = offset + 8 + len(content)
            bare[end : end + 4] = struct.pack(">I", zlib.crc32(_NOTHING + content))
    return bytes(bare) or data


def _png_chunks(data: bytes, offset: int) -> Iterator[tuple[int, bytes, bytes]]:
    """The offset, type and content of each complete chunk, up to IEND."""
    kind = b""
    while kind != b"IEND" and offset + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, offset)
        if offset + 12 + length > len(data) or not kind.isalpha():
            return
        yield offset, kind, b"" if kind == b"IDAT" else data[offset + 8 : offset + 8 + length]
        offset += 12 + length


def _may_orient(kind: bytes, content: bytes) -> bool:
    """Whether Pillow may read the orientation from this chunk, and the chunk is not too long for Pillow."""
    if kind not in (b"iTXt", b"tEXt", b"zTXt"):
        return kind == b"eXIf"
    keyword = next((text for text in _ORIENTATION_TEXTS if content.startswith(text)), None)
    if keyword is None:
        return False
    inflate = zlib.decompressobj()
    try:
        inflate.decompress(content[len(keyword) :].lstrip(b"\0\1"), MAX_TEXT_BYTES)
    except zlib.error:  # it is not compressed
        return len(content) <= MAX_TEXT_BYTES
    return not inflate.unconsumed_tail


def _is_whole(data: bytes, offset: int, content: bytes) -> bool:
    end = offset + 8 + len(content)
    return zlib.crc32(data[offset + 4 : end]) == int.from_bytes(data[end : end + 4])


# ---- JPEG -------------------------------------------------------------------------------------------------


def _bare_jpeg(data: bytes) -> bytes:
    """Turn application segments into comments, except EXIF, XMP, and segments that affect colours."""
    bare = bytearray(data)
    offset = 2
    while offset + 4 <= len(data) and data[offset] == 0xFF and data[offset + 1] != 0xDA:
        kind, length = data[offset + 1], int.from_bytes(data[offset + 2 : offset + 4])
        if kind == 0xFF:  # a fill byte
            offset += 1
            continue
        if 0xE0 <= kind <= 0xEF and kind != 0xE1 and length - 2 < _SHORTEST_JPEG_SEGMENTS.get(kind, 1 << 16):
            bare[offset + 1] = _COMMENT
        offset += 2 + length
    return bytes(bare)


# ---- TIFF -------------------------------------------------------------------------------------------------


def _bare_tiff(data: bytes) -> bytes:
    """Keep only the first directory, which is all that is read, and its tags that affect pixels or orientation."""
    order: Literal["little", "big"] = "little" if data.startswith(b"I") else "big"
    is_big = data[2:4] in (b"+\0", b"\0+")
    count_bytes, entry_bytes, offset_bytes = (8, 20, 8) if is_big else (2, 12, 4)

    def read(offset: int, num_bytes: int) -> int:
        return int.from_bytes(data[offset : offset + num_bytes], order)

    def decides_pixels(offset: int) -> bool:
        tag, kind, count = read(offset, 2), read(offset + 2, 2), read(offset + 4, offset_bytes)
        if tag == _ORIENTATION:
            return (kind, count) == (3, 1)
        if tag == _XMP:
            start = read(offset + 4 + offset_bytes, offset_bytes)
            return kind in (1, 7) and count > offset_bytes and start + count <= len(data)
        return tag in _PIXEL_TAGS

    directory = read(offset_bytes, offset_bytes)
    first = directory + count_bytes
    end = first + read(directory, count_bytes) * entry_bytes
    if end > len(data):
        return data
    kept = [data[offset : offset + entry_bytes] for offset in range(first, end, entry_bytes) if decides_pixels(offset)]
    entries = b"".join(kept) + bytes(offset_bytes)  # and no next directory
    bare = data[:directory] + len(kept).to_bytes(count_bytes, order) + entries
    return (bare + data[len(bare) :])[: len(data)]
