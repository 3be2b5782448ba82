"""When, where and with which camera a photo was taken, from its EXIF, XMP and IPTC. No pixel is decoded."""

import io
import math
import re
import sys
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any, BinaryIO

from PIL import ExifTags, Image, IptcImagePlugin
from PIL.ImageFile import ImageFile as PillowFile

from captioner.files import storage
from captioner.images.loading import NEVER_DECODED
from infer.listing import ImageFile
from infer.metadata.described import open_header
from infer.metadata.xmp import XmpError, read_place

HEADER_BYTES = 1 << 18  # of a file on a server
PATIENCE_SECONDS = 10.0
CITY, COUNTRY = (2, 90), (2, 101)  # datasets of IPTC
_DATE_AND_TIME = re.compile(r"\d{4}:\d\d:\d\d \d\d:\d\d")


@dataclass(frozen=True, kw_only=True, slots=True)
class PhotoMetadata:
    """Each is "" if the file does not say it.

    `date` is 2024-05-17 and `time` 14:03, by the camera's clock. `camera` is maker and model. `place` is city and
    country if they are embedded, else the GPS position in degrees: "48.8584° N, 2.2945° E".
    """

    date: str = ""
    time: str = ""
    camera: str = ""
    place: str = ""


def read_metadata(file: ImageFile) -> PhotoMetadata:
    """The metadata of an image file; empty for a missing, unreadable or damaged one, and for images in shards."""
    if file.size is not None:  # packing keeps no metadata
        return PhotoMetadata()
    try:
        with closing(_open(file)) as stream, open_header(stream) as image:
            return PhotoMetadata() if image.format in NEVER_DECODED else _read(image)
    except Exception:  # damaged metadata raises almost any type
        return PhotoMetadata()


def _open(file: ImageFile) -> BinaryIO:
    """The file, or of a remote one its first bytes. Raises OSError and ImageError."""
    if storage.is_remote(file.root):
        return io.BytesIO(storage.read_bytes(file.location, end=HEADER_BYTES, patience_seconds=PATIENCE_SECONDS))
    return file.open(max_bytes=sys.maxsize)


def _read(image: PillowFile) -> PhotoMetadata:
    exif = Image.Image.getexif(image)  # a PNG's own method decodes its pixels
    shot = exif.get_ifd(ExifTags.IFD.Exif)
    taken = shot.get(ExifTags.Base.DateTimeOriginal) or shot.get(ExifTags.Base.DateTimeDigitized)
    date, time = _date_and_time(_text(taken))
    camera = _camera(_text(exif.get(ExifTags.Base.Make)), _text(exif.get(ExifTags.Base.Model)))
    place = _city(image) or _position(exif.get_ifd(ExifTags.IFD.GPSInfo))
    return PhotoMetadata(date=date, time=time, camera=camera, place=place)


def _text(value: Any) -> str:
    text = value.decode(errors="replace") if isinstance(value, bytes) else value
    return " ".join(text.replace("\0", " ").split()) if isinstance(text, str) else ""


def _date_and_time(text: str) -> tuple[str, str]:
    """The date and the time in EXIF's 2024:05:17 14:03:22; "" for what is no date, such as zeros."""
    found = _DATE_AND_TIME.match(text)
    try:
        moment = datetime.strptime(found[0], "%Y:%m:%d %H:%M") if found else None
    except ValueError:
        moment = None
    return (f"{moment:%Y-%m-%d}", f"{moment:%H:%M}") if moment else ("", "")


def _camera(maker: str, model: str) -> str:
    """Maker and model; many models begin with the maker's name (Canon, Canon EOS R5)."""
    is_named = not maker or model.lower().startswith(maker.split(maxsplit=1)[0].lower())
    return model if model and is_named else f"{maker} {model}".strip()


def _city(image: PillowFile) -> str:
    """City and country, from XMP or else from IPTC."""
    xmp = image.info.get("xmp") or b""
    names: list[str] = []
    with suppress(XmpError):
        names = read_place(xmp.encode() if isinstance(xmp, str) else xmp)
    if not names:
        iptc: Mapping[Any, Any] = IptcImagePlugin.getiptcinfo(image) or {}
        names = [_text(iptc.get(dataset)) for dataset in (CITY, COUNTRY)]
    return ", ".join(filter(None, map(_text, names)))


def _position(gps: Mapping[int, Any]) -> str:
    north = _degrees(gps.get(ExifTags.GPS.GPSLatitude), gps.get(ExifTags.GPS.GPSLatitudeRef), "NS", limit=90)
    east = _degrees(gps.get(ExifTags.GPS.GPSLongitude), gps.get(ExifTags.GPS.GPSLongitudeRef), "EW", limit=180)
    return f"{north}, {east}" if north and east else ""


def _degrees(parts: Any, reference: Any, references: str, *, limit: float) -> str:
    """Degrees, minutes and seconds as degrees, with four decimals (11 m); "" for what is no position."""
    letter = _text(reference).upper()[:1]
    degrees = sum(float(part) / 60**power for power, part in enumerate(parts or ()))
    is_position = parts and letter and letter in references and math.isfinite(degrees) and 0 <= degrees <= limit
    return f"{degrees:.4f}° {letter}" if is_position else ""
