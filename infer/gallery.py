"""The gallery: a page on which a person looks over the captions of a folder, least certain first, and corrects them.

folder/index.html                  what to open: no server, no network
folder/gallery.css, gallery.js     its looks, and what it does
folder/data.js                     what it shows of each row
folder/thumbnails/HASH.jpg         small upright copies of the images
folder/corrections.jsonl           what persons wrote, once they did: see infer/corrections.py
"""

import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from itertools import chain, repeat
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

from PIL import Image

from captioner.attention import Attention
from captioner.cli import console, progress_bar
from captioner.errors import UserError
from captioner.files import storage
from captioner.files.storage import WEB, is_remote
from captioner.files.tables import DELIMITERS
from captioner.images.loading import ImageError, decode_rgb
from captioner.pages import load_template
from captioner.workers import count_processors
from infer import tables
from infer.corrections import (
    LOCK_SUFFIX,
    Correction,
    CorrectionFile,
    Corrections,
    find_correction,
    name_roots,
    read_lines,
)
from infer.listing import ImageFile, locate
from infer.metadata.described import had_checksum
from infer.reading import MAX_FILE_BYTES
from infer.results import Row, as_utf8

INDEX = "index.html"
DATA = "data.js"
STATIC = ("gallery.css", "gallery.js")
THUMBNAILS = "thumbnails"
CORRECTIONS = "corrections.jsonl"
KEPT = (CORRECTIONS, CORRECTIONS + LOCK_SUFFIX)  # in a folder whose page was deleted
THUMBNAIL_SIDE_PIXELS = 320
THUMBNAIL_QUALITY = 82
MAX_THREADS = 2  # of this process, in which large images take much memory
SHOWN_KEYS = frozenset(
    (
        "path", "caption", "captions", "alt", "score", "confidence", "review", "duplicate_of", "sha256", "error",
        "message",
    )
)  # fmt: skip

_THUMBNAIL_NAME = re.compile(r"[0-9a-f]{32}\.jpg(\.[0-9a-f]{32}\.partial)?")


def check_folder(folder: Path, *, images: Sequence[str]) -> None:
    """Raise UserError for a gallery folder that is no folder, or holds images to caption or files of others."""
    if any(not is_remote(root) and Path(root).resolve().is_relative_to(folder.resolve()) for root in images):
        raise UserError(f"--gallery {folder} holds the images themselves: give a folder of its own")
    above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise UserError(f"--gallery {folder} cannot be written, as {above} is no folder that can: give another folder")
    if folder.is_dir() and not is_gallery(folder) and any(path.name not in KEPT for path in folder.iterdir()):
        raise UserError(f"--gallery {folder} holds files that are no gallery: give a new or an empty folder")


class Source(NamedTuple):
    """A file of corrections, JSONL or a table of `write_csv`, its SHA-256, and whether a gallery has them already."""

    file: Path
    checksum: str = ""
    is_known: bool = False


def check_corrections(file: Path) -> None:
    """Raise UserError if there is no such file of corrections, or one of another kind."""
    if not file.is_file():
        raise UserError(
            f"there is no file {file}: give --corrections a table of --csv, or what a gallery's button downloaded"
        )
    if file.suffix.lower() not in (*DELIMITERS, ".jsonl", ".json"):
        raise UserError(
            f"--corrections {file} is neither a table nor JSONL: save it as CSV UTF-8, with the suffix .csv"
        )


def read_corrections(folder: Path | None, sources: Iterable[Source] = ()) -> Corrections:
    """The corrections in a gallery's folder and in other files. Later ones win.

    First those that tables were written with, and those in files that are known; then the gallery's; then the others.
    Raises UserError for a line that is none, and OSError.
    """
    earlier: list[Correction] = []
    later: list[Correction] = []
    for file, _, is_known in sources:
        written: Iterable[Correction] = ()
        if file.suffix.lower() in DELIMITERS:
            written, made = tables.read_edited(file)
        else:
            made = list(read_lines(file))
        earlier += written
        (earlier if is_known else later).extend(made)
    return Corrections(chain(earlier, read_lines(folder / CORRECTIONS) if folder else (), later))


def is_gallery(folder: Path) -> bool:
    """Whether `write_gallery` wrote, or began to write, this folder."""
    return (folder / STATIC[0]).is_file()


def is_thumbnail(name: str) -> bool:
    """Whether a file of this name in the thumbnails' folder is one."""
    return _THUMBNAIL_NAME.fullmatch(name) is not None


def write_gallery(rows: Iterable[Row], folder: Path, *, title: str, model: str, sources: Sequence[Source] = ()) -> Path:
    """Write the page and thumbnails of `rows` (one for every file) into `folder`; return its index.html.

    Corrections of these images, from the folder's corrections.jsonl and the `sources`, are shown as a person's, and
    kept in the folder's file.

    Images with the same bytes share a thumbnail. index.html is written last; only then are the thumbnails removed
    that an earlier gallery left. Relative roots are taken from the current folder. Raises OSError, and UserError for a
    line that is no correction.
    """
    roots: dict[str, int] = {}
    images: dict[str, ImageFile] = {}
    entries = []
    for row in rows:
        file = locate(row["root"], row["path"])
        entries.append(_entry(row, file, folder=folder, root=roots.setdefault(file.root, len(roots))))
        if "sha256" in row:
            images.setdefault(row["sha256"], file)
    for name in STATIC:  # first, since they tell later runs whose folder it is
        _write(folder / name, Path(__file__).with_name(name).read_bytes())
    thumbnails = _make_thumbnails(images, folder / THUMBNAILS)
    named_roots = name_roots(list(roots))
    with CorrectionFile(folder / CORRECTIONS).changing(lambda: read_corrections(folder, sources)) as written:
        _add_corrections(entries, written, roots=named_roots)
    if written:
        num_here = sum("correction" in entry for entry in entries)
        num_others = len(written) - num_here
        others = f"; corrections of other files: {num_others:,}" if num_others else ""
        console.print(f"gallery: captions corrected by hand: {num_here:,}{others}", markup=False)
        if written.num_by_name:
            console.print(
                f"gallery: {written.num_by_name:,} of them by name alone, as the files have changed: look at them",
                markup=False,
            )
    _write(folder / DATA, _data(entries, roots=named_roots, thumbnails=thumbnails))
    page = _page(entries, roots=list(roots), title=title, model=model)
    _write(folder / INDEX, as_utf8(page))
    _remove_stale(folder / THUMBNAILS, keep=set(thumbnails.values()))
    return folder / INDEX


# ---- what is shown --------------------------------------------------------------------------------------------


def _entry(row: Row, file: ImageFile, *, folder: Path, root: int) -> dict[str, Any]:
    """What the page shows of a row; its image goes by its checksum until the thumbnails are made."""
    entry = {key: value for key, value in row.items() if key in SHOWN_KEYS and value is not None}
    entry |= {"root": root, "link": _link(file, folder), "thumbnail": row.get("sha256")}
    if "attention" in row:
        entry["attention"] = row["attention"] | {"texts": Attention.from_json(row["attention"]).texts()}
    if file.size is not None:
        entry["in_shard"] = True
    if file.root.startswith(WEB):
        entry["name"] = unquote(file.path)  # make_shards.py quotes it again
    return entry


def _link(file: ImageFile, folder: Path) -> str | None:
    """The URL of an image relative to the page, so that both can move together; None if no file can be read there."""
    if is_remote(file.root) or not os.access(file.location, os.R_OK):
        return None
    return quote(os.fsencode(os.path.relpath(file.location, folder)))


def _add_corrections(
    entries: Sequence[dict[str, Any]], written: Corrections, *, roots: Sequence[dict[str, str]]
) -> None:
    """Add what a person wrote to the entries of images that can be corrected."""
    for entry in entries:
        if "error" not in entry and "in_shard" not in entry:
            caption = find_correction(entry, written, root=roots[entry["root"]])
            if caption is not None:
                entry["correction"] = caption


def _data(
    entries: Sequence[dict[str, Any]], *, roots: Sequence[dict[str, str]], thumbnails: Mapping[str, str | None]
) -> str:
    """The script that holds the entries, one a line, in pure ASCII: no name ends it, or a string in it."""
    lines = (
        json.dumps({**entry, "thumbnail": thumbnails.get(entry["thumbnail"])}, allow_nan=False) for entry in entries
    )
    return "const ROWS = [\n" + ",\n".join(lines) + "\n];\nconst ROOTS = " + json.dumps(roots) + ";\n"


def _page(entries: Sequence[dict[str, Any]], *, roots: Sequence[str], title: str, model: str) -> str:
    errors = Counter(entry["error"] for entry in entries if "error" in entry)
    return load_template(Path(__file__).with_name("gallery.html.j2")).render(
        title=title,
        model=model,
        roots=roots,
        now=datetime.now().astimezone(),
        num_captioned=len(entries) - errors.total(),
        num_failed=errors.total(),
        num_failed_by_error=errors.most_common(),
        has_confidence=any("confidence" in entry for entry in entries),
        has_attention=any("attention" in entry for entry in entries),
    )


# ---- thumbnails -----------------------------------------------------------------------------------------------


def _make_thumbnails(images: Mapping[str, ImageFile], folder: Path) -> dict[str, str | None]:
    """The name of each image's thumbnail, made or reused; None where none can be made. Keys are checksums."""
    names: dict[str, str | None] = {}
    failures: dict[str, list[str]] = {}
    num_threads = min(MAX_THREADS, count_processors())
    with ThreadPoolExecutor(num_threads) as pool, progress_bar("gallery", total=len(images), unit="images") as bar:
        failed = pool.map(_make_thumbnail, images, images.values(), repeat(folder))
        for (sha256, file), failure in zip(images.items(), failed, strict=True):
            names[sha256] = None if failure else _thumbnail_name(sha256)
            if failure:
                failures.setdefault(failure, []).append(file.location)
            bar.advance()
    for failure, locations in sorted(failures.items()):
        console.print(f"gallery: {len(locations):,} without a thumbnail, {failure}: {locations[0]!r}", markup=False)
    return names


def _thumbnail_name(sha256: str) -> str:
    """The image's checksum, so that an existing thumbnail is of the very bytes that were captioned."""
    return f"{sha256[:32]}.jpg"


def _make_thumbnail(sha256: str, file: ImageFile, folder: Path) -> str | None:
    """Write a small upright JPEG of an image, unless it exists; returns why that failed (the page has a placeholder).

    A large photo is decoded at a reduced scale, which makes it several times cheaper.
    """
    path = folder / _thumbnail_name(sha256)
    if path.exists():
        return None
    side = THUMBNAIL_SIDE_PIXELS
    try:
        data = file.read(max_bytes=MAX_FILE_BYTES)
        if hashlib.sha256(data).hexdigest() != sha256 and not had_checksum(data, sha256):
            return "changed since it was captioned"
        small, _ = decode_rgb(data, at_least=2 * side)
    except ImageError as error:
        return error.reason
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=THUMBNAIL_QUALITY, optimize=True)
    _write(path, buffer.getvalue())
    return None


def _write(path: Path, content: bytes | str) -> None:
    storage.write_atomic(str(path), content, durable=False)


def _remove_stale(folder: Path, *, keep: Set[str | None]) -> None:
    """Remove the thumbnails that belong to an earlier gallery, known by their names."""
    for file in folder.glob("*"):
        if _THUMBNAIL_NAME.fullmatch(file.name) and file.name not in keep:
            file.unlink(missing_ok=True)
