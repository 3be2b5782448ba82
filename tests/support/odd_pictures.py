"""A folder of pictures as the world has them: rare kinds, damaged and hostile ones, special files, odd names."""

import io
import os
import stat
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import ExifTags, Image, ImageCms, ImageColor, ImageOps, features

WIDTH, HEIGHT = 60, 40
PNG_START = b"\x89PNG\r\n\x1a\n"
READS_HEIC = find_spec("pillow_heif") is not None
READS_AVIF = features.check("avif")
READS_WEBP = features.check("webp")
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n0 0 9 9 rectfill\nshowpage\n%%EOF\n"


def write_odd_pictures(folder: Path) -> dict[str, str | None]:
    """Fill `folder`, which must not be there; what each path in it must get: an error's reason, or None for a caption.

    `whole/` and `broken/` hold plain files. What this machine or user cannot make is left out: devices where they are
    not allowed, unreadable files where root reads all, names that the file system refuses. Contents differ from file
    to file. `special/loop` is a link to a folder that it lies in, and no picture.
    """
    expected: dict[str, str | None] = {}
    for name, data in whole_files().items():
        _write(folder / "whole" / name, data)
        expected[f"whole/{name}"] = None
    for name, (data, reason) in broken_files().items():
        _write(folder / "broken" / name, data)
        expected[f"broken/{name}"] = reason
    return expected | _write_odd_names(folder / "names") | _write_special_files(folder / "special")


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def picture(number: int = 0) -> Image.Image:
    """Red, green, blue and yellow corners with a grey shade that tells the numbers apart, RGB, WIDTH x HEIGHT."""
    pixels = np.full((HEIGHT, WIDTH, 3), 90 + number, np.uint8)
    for (top, left), colour in zip(np.ndindex(2, 2), ("red", "lime", "blue", "yellow"), strict=True):
        pixels[top * 24 : top * 24 + 16, left * 36 : left * 36 + 24] = ImageColor.getrgb(colour)
    return Image.fromarray(pixels)


def file_of(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


# ---- pictures that must be captioned -----------------------------------------------------------------------


def whole_files() -> dict[str, bytes]:
    """Files that show `picture`, or something near it, by name."""
    rgb, grey, palette = picture(), picture().convert("L"), picture().quantize(16)
    cmyk, alpha = rgb.convert("CMYK"), rgb.convert("RGBA")
    alpha.putalpha(grey)
    grey_16 = np.asarray(grey).astype("<u2") * 257
    turned, broken_exif = Image.Exif(), b"Exif\0\0II*\0\xf0\xff\xff\x7f"
    turned[ExifTags.Base.Orientation] = 6
    jpeg, png = file_of(rgb, "JPEG", quality=90), file_of(rgb, "PNG")
    frames = {"save_all": True, "append_images": [picture(1), picture(2)]}
    files = {
        "cmyk.jpg": file_of(cmyk, "JPEG"),
        "cmyk_not_inverted.jpg": _without_adobe_segment(file_of(cmyk, "JPEG", quality=91)),
        "progressive.jpg": file_of(rgb, "JPEG", progressive=True),
        "grey.jpg": file_of(grey, "JPEG"),
        "turned.jpg": file_of(rgb, "JPEG", exif=turned),
        "broken_exif.jpg": file_of(rgb, "JPEG", exif=broken_exif),
        "broken_profile.jpg": file_of(rgb, "JPEG", icc_profile=b"no profile"),
        "bytes_behind_it.jpg": jpeg + b"garbage\xff\xd8\xff" * 99,
        "several.mpo": file_of(rgb, "MPO", **frames),
        "grey_16.png": file_of(Image.fromarray(grey_16), "PNG"),
        "grey_16.tif": file_of(Image.fromarray(grey_16), "TIFF"),
        "grey_16_big_endian.tif": file_of(Image.frombytes("I;16B", grey.size, grey_16.astype(">u2").tobytes()), "TIFF"),
        "float.tif": file_of(Image.fromarray(np.asarray(grey, np.float32) / 255), "TIFF"),
        "cmyk.tif": file_of(cmyk, "TIFF"),
        "giant_tag.tif": _tiff_with_giant_tag(),
        "palette_index.png": file_of(palette, "PNG", transparency=0),
        "palette_bytes.png": file_of(palette, "PNG", transparency=bytes(range(0, 256, 16))),
        "grey_alpha.png": file_of(alpha.convert("LA"), "PNG"),
        "alpha.png": file_of(alpha, "PNG"),
        "one_bit.png": file_of(rgb.convert("1"), "PNG"),
        "interlaced.png": _interlaced_png(),
        "huge_text.png": png[:33] + chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(20_000_000))) + png[33:],
        "one_pixel.png": file_of(Image.new("RGB", (1, 1), "red"), "PNG"),
        "thread.png": file_of(Image.new("RGB", (1, 20_000), "red"), "PNG"),
        "animated.gif": file_of(rgb, "GIF", **frames),
        "animated.png": file_of(rgb, "PNG", **frames),
        "larger_than_its_canvas.gif": _with(file_of(rgb, "GIF"), struct.pack("<HH", 9, 9), at=6),
        "icon.ico": file_of(rgb, "ICO"),
        "icon.icns": file_of(rgb.resize((128, 128)), "ICNS"),
        "texture.dds": file_of(alpha, "DDS"),
        "layers.psd": _psd(),
        "no_magic.tga": file_of(rgb, "TGA"),
        "upside_down.bmp": _with(file_of(ImageOps.flip(rgb), "BMP"), struct.pack("<i", -HEIGHT), at=22),
        "plain.ppm": file_of(rgb, "PPM"),
        "bits.xbm": file_of(rgb.convert("1"), "XBM"),
        "ok.qoi": _qoi(),
        "a_png_named.jpg": png,
        "no_ending": jpeg,
    }
    if features.check("littlecms2"):
        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        lab = ImageCms.profileToProfile(rgb, *profiles, outputMode="LAB")
        assert lab is not None
        files["lab.tif"] = file_of(lab, "TIFF")
    if int(PIL.__version__.partition(".")[0]) >= 13:  # older ones read none that is not compressed
        files["ycbcr.tif"] = file_of(rgb.convert("YCbCr"), "TIFF")
    if READS_WEBP:
        files["animated.webp"] = file_of(rgb, "WEBP", **frames)
    if features.check("jpg_2000"):
        files["jpeg_2000.jp2"] = file_of(rgb, "JPEG2000")
    if READS_HEIC:
        files["phone.heic"] = _heic()
    if READS_AVIF:
        files["modern.avif"] = file_of(rgb, "AVIF")
    return files


def _with(data: bytes, replacement: bytes, *, at: int) -> bytes:
    return data[:at] + replacement + data[at + len(replacement) :]


def _without_adobe_segment(jpeg: bytes) -> bytes:
    """By which a reader knows that Adobe's programs store CMYK inverted."""
    start = jpeg.index(b"\xff\xee")
    return jpeg[:start] + jpeg[start + 2 + int.from_bytes(jpeg[start + 2 : start + 4]) :]


def _heic() -> bytes:
    import pillow_heif

    buffer = io.BytesIO()
    pillow_heif.from_pillow(picture()).save(buffer, quality=90)
    return buffer.getvalue()


def _psd() -> bytes:
    header = struct.pack(">4sH6xHIIHH", b"8BPS", 1, 3, HEIGHT, WIDTH, 8, 3)
    return header + bytes(12) + b"\0\0" + b"".join(band.tobytes() for band in picture().split())


def _qoi() -> bytes:
    pixels = b"".join(b"\xfe" + bytes(pixel) for pixel in np.asarray(picture()).reshape(-1, 3))
    return struct.pack(">4sIIBB", b"qoif", WIDTH, HEIGHT, 3, 0) + pixels + bytes(7) + b"\1"


def _tiff_with_giant_tag() -> bytes:
    """A grey TIFF of 8 x 8 with a tag that says it has 4 billion bytes."""
    short, long, undefined = 3, 4, 7
    tags = [(256, short, 1, 8), (257, short, 1, 8), (258, short, 1, 8), (259, short, 1, 1), (262, short, 1, 1)]
    tags += [(273, long, 1, 200), (277, short, 1, 1), (278, short, 1, 8), (279, long, 1, 64)]
    tags += [(34675, undefined, 0xFFFF_FFF0, 8)]
    directory = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return (b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + directory).ljust(200, b"\0") + b"\x80" * 64


# ---- PNG by hand -------------------------------------------------------------------------------------------


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of(size: tuple[int, int], rows: bytes, *, before: bytes = b"", interlaced: bool = False) -> bytes:
    """An RGB PNG with these filtered rows, and any chunks before them."""
    header = struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, interlaced)
    pixels = chunk(b"IDAT", zlib.compress(rows))
    return PNG_START + chunk(b"IHDR", header) + before + pixels + chunk(b"IEND", b"")


def _interlaced_png() -> bytes:
    pixels = np.asarray(picture())
    starts_and_steps = [
        (0, 0, 8, 8),
        (0, 4, 8, 8),
        (4, 0, 8, 4),
        (0, 2, 4, 4),
        (2, 0, 4, 2),
        (0, 1, 2, 2),
        (1, 0, 2, 1),
    ]
    passes = [pixels[top::down, left::right] for top, left, down, right in starts_and_steps]
    return png_of((WIDTH, HEIGHT), b"".join(b"\0" + row.tobytes() for rows in passes for row in rows), interlaced=True)


# ---- files that must get an error --------------------------------------------------------------------------


def broken_files() -> dict[str, tuple[bytes, str]]:
    """Files that are no usable pictures, by name, each with the reason that it must get."""
    bmp = file_of(picture(), "BMP")
    files = {
        "empty.jpg": (b"", "empty"),
        "huge_header.png": (png_of((100_000, 100_000), b""), "too large"),
        "huge_header.bmp": (_with(bmp, struct.pack("<ii", 1 << 30, -(1 << 30)), at=18), "too large"),
        "huge_header.ppm": (b"P6 2000000000 2000000000 255\n", "too large"),
        "program.eps": (EPS, "undecodable"),
        "program.jpg": (EPS + b"% named jpg\n", "undecodable"),
        "program_inside.iim": (iptc_around(EPS), "undecodable"),
        "metafile.wmf": (
            b"\xd7\xcd\xc6\x9a\0\0" + struct.pack("<4hH6x", 0, 0, 9, 9, 96) + b"\1\0\t\0" + bytes(60),
            "undecodable",
        ),
        "drawing.jpg": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>\n', "undecodable"),
        "page.jpg": (b"<!DOCTYPE html>\n<title>404 Not Found</title>\n", "undecodable"),
        "document.jpg": (b"%PDF-1.4\n1 0 obj\n<< >>\nendobj\n%%EOF\n", "undecodable"),
        "text.jpg": (b"This is no picture.\n", "undecodable"),
        "noise.png": (np.random.default_rng(6).bytes(5000), "undecodable"),
        "video.jpg": (b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + bytes(99), "undecodable"),
    }
    sharp = Image.fromarray(np.random.default_rng(6).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))
    for kind in ("JPEG", "PNG", "GIF", "TIFF", "BMP"):
        data = file_of(sharp, kind)
        for percent in (70, 95):
            files[f"cut_at_{percent}_percent.{kind.lower()}"] = (data[: len(data) * percent // 100], "truncated")
    if READS_HEIC:
        files["cut.heic"] = (_heic()[:-40], "truncated")
    return files


def iptc_around(data: bytes) -> bytes:
    """A newswire file that says it holds a compressed picture, which Pillow opens whatever its format is."""
    fields = ((3, 60, b"\1\0"), (3, 20, b"\0\x09"), (3, 30, b"\0\x09"), (3, 120, b"\5"), (8, 10, data))
    return b"".join(struct.pack(">BBBH", 0x1C, record, name, len(value)) + value for record, name, value in fields)


# ---- names and things that are no files --------------------------------------------------------------------


def _write_odd_names(folder: Path) -> dict[str, str | None]:
    names = [
        "-rf.jpg",
        " spaces  around .jpg ",
        "new\nline.jpg",
        "tab\tand\\backslash.jpg",
        '"quoted" & <b>bold<.jpg',
        "caf\u00e9.jpg",
        "cafe\u0301.jpg",
        os.fsdecode(b"latin-\xe9.jpg"),
        "图 größer \U0001f600.jpg",
        "100%25.jpg",
        "*[0-9]?.jpg",
        ".hidden.jpg",
        "l" * 251 + ".jpg",
        "folder.jpg/deep/er/~.jpg",
    ]
    made: dict[str, str | None] = {}
    for number, name in enumerate(names, start=1):
        with suppress(OSError):
            _write(folder / name, file_of(picture(number), "JPEG"))
            made[f"names/{name}"] = None
    return made


def _write_special_files(folder: Path) -> dict[str, str | None]:
    folder.mkdir(parents=True)
    made: dict[str, str | None] = {}
    for name, reason, make in _special_files():
        with suppress(OSError):
            make(folder / name)
            made[f"special/{name}"] = reason
    (folder / "loop").symlink_to("..")
    return made


def _special_files() -> Iterator[tuple[str, str | None, Callable[[Path], None]]]:
    """Names, reasons, and what makes them; all of these would block or never end if they were simply read."""
    yield "pipe.jpg", "special file", os.mkfifo
    yield "socket.jpg", "special file", lambda path: os.mknod(path, stat.S_IFSOCK | 0o600)
    yield "device.jpg", "special file", lambda path: os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))
    yield "link_to_zeros.jpg", "special file", lambda path: path.symlink_to("/dev/zero")
    yield "broken_link.jpg", "missing", lambda path: path.symlink_to("nowhere.jpg")
    yield "link_to_itself.jpg", "missing", lambda path: path.symlink_to(path.name)
    yield "link.jpg", None, lambda path: path.symlink_to("../whole/no_ending")
    if os.geteuid() != 0:
        yield "forbidden.jpg", "unreadable", _write_forbidden


def _write_forbidden(path: Path) -> None:
    path.write_bytes(file_of(picture(99), "JPEG"))
    path.chmod(0)
