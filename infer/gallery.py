"""The gallery: HTML pages on which a person looks over the captions of a folder, least certain first.

folder/index.html, folder/page-002.html ...    what to open: no server, no network
folder/thumbnails/HASH.jpg                     small upright copies of the pictures
"""

import hashlib
import io
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from captioner.cli import UserError, progress_bar
from captioner.images import ImageError, decode_rgb
from captioner.pages import load_template
from infer.results import Row

INDEX = "index.html"
THUMBNAILS = "thumbnails"
THUMBNAIL_SIDE_PIXELS = 320
THUMBNAIL_QUALITY = 82
MAX_THREADS = 8
NEIGHBOURS_IN_NAVIGATION = 2

_PAGE_NAME = re.compile(r"page-\d{3,}\.html(\.tmp)?")
_THUMBNAIL_NAME = re.compile(r"[0-9a-f]{32}\.jpg(\.tmp)?")
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Thumbnail:
    """A small copy that lies in the thumbnail folder."""

    name: str
    width: int
    height: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What the page shows of one captioned picture; no `link`: it is gone; no `thumbnail`: unreadable."""

    caption: str
    path: str
    link: str | None
    thumbnail: Thumbnail | None
    confidence: float | None
    lowest_confidence: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """What the page shows of one file that got no caption."""

    path: str
    link: str | None
    error: str
    message: str


def write_gallery(rows: Sequence[Row], folder: Path, *, title: str, model: str, page_size: int = 200) -> Path:
    """Write the pages and thumbnails of `rows` (one for every file) into `folder`; return its index.html.

    Pictures are in the order in which to review them, lowest score first, over all pages. index.html is
    written last; only then are the pages and thumbnails of an earlier, larger gallery removed. Relative roots
    are taken from the current folder. Raises `UserError` where `folder` cannot be written.
    """
    captioned = sorted((row for row in rows if "error" not in row), key=_review_order)
    failed = sorted((row for row in rows if "error" in row), key=lambda row: (row["root"], row["path"]))
    roots = sorted({row["root"] for row in rows})
    thumbnails = _make_thumbnails({_picture(row) for row in captioned}, folder / THUMBNAILS)

    chunks = [captioned[start : start + page_size] for start in range(0, len(captioned), page_size)] or [[]]
    template = load_template(Path(__file__).with_name("gallery.html.j2"))
    names = [_page_name(number) for number in range(1, len(chunks) + 1)]
    shared = {
        "title": title,
        "model": model,
        "roots": roots,
        "now": datetime.now().astimezone(),
        "num_captioned": len(captioned),
        "failures": [_failure(row, folder, roots) for row in failed],
        "num_failures_by_error": Counter(row["error"] for row in failed).most_common(),
        "page_names": names,
    }
    for number in range(len(chunks), 0, -1):
        page = template.render(
            **shared,
            number=number,
            first_shown=(number - 1) * page_size + 1,
            page_links=_page_links(number, len(chunks)),
            cards=[_card(row, folder, roots, thumbnails) for row in chunks[number - 1]],
        )
        _write(folder / names[number - 1], _SURROGATE.sub("\N{REPLACEMENT CHARACTER}", page).encode())

    _remove_stale(folder, _PAGE_NAME, keep=set(names))
    _remove_stale(folder / THUMBNAILS, _THUMBNAIL_NAME, keep={t.name for t in thumbnails.values() if t})
    return folder / INDEX


def _review_order(row: Row) -> tuple[float, str, str]:
    score = row.get("score")
    return (math.inf if score is None else score, row["root"], row["path"])


def _picture(row: Row) -> Path:
    return Path(row["root"], row["path"]).absolute()


# ---------------------------------------------------------------------------------------------- what is shown


def _card(row: Row, folder: Path, roots: list[str], thumbnails: Mapping[Path, Thumbnail | None]) -> Card:
    score, token_scores = row.get("score"), row.get("token_scores")
    return Card(
        caption=row["caption"],
        path=_shown_path(row, roots),
        link=_link(_picture(row), folder),
        thumbnail=thumbnails[_picture(row)],
        confidence=None if score is None else math.exp(score),
        lowest_confidence=math.exp(min(token_scores)) if token_scores else None,
    )


def _failure(row: Row, folder: Path, roots: list[str]) -> Failure:
    return Failure(
        path=_shown_path(row, roots),
        link=_link(_picture(row), folder),
        error=row["error"],
        message=row["message"],
    )


def _shown_path(row: Row, roots: list[str]) -> str:
    """The path below the root, which the summary names; with several roots, the root as well."""
    return row["path"] if len(roots) == 1 else str(Path(row["root"], row["path"]))


def _link(picture: Path, folder: Path) -> str | None:
    """The URL of `picture` relative to the pages, so that both can move together; None if unreadable."""
    if not os.access(picture, os.R_OK):
        return None
    return quote(os.fsencode(os.path.relpath(picture, folder)))


def _page_name(number: int) -> str:
    return INDEX if number == 1 else f"page-{number:03d}.html"


def _page_links(current: int, num_pages: int) -> list[int | None]:
    """Page numbers for the navigation: the ends and the neighbours of `current`; None stands for a gap."""
    near = range(current - NEIGHBOURS_IN_NAVIGATION, current + NEIGHBOURS_IN_NAVIGATION + 1)
    numbers = sorted({1, num_pages} | {number for number in near if 1 <= number <= num_pages})
    links: list[int | None] = []
    for number in numbers:
        if links and number - 1 not in links:
            links.append(None)
        links.append(number)
    return links


# ------------------------------------------------------------------------------------------------- thumbnails


def _make_thumbnails(pictures: Iterable[Path], folder: Path) -> dict[Path, Thumbnail | None]:
    """Make or reuse the thumbnail of each picture; None for a picture of which none can be made."""
    ordered = sorted(pictures)
    thumbnails: dict[Path, Thumbnail | None] = {}
    num_threads = min(MAX_THREADS, os.cpu_count() or 1)
    with (
        ThreadPoolExecutor(num_threads) as pool,
        progress_bar("gallery", total=len(ordered), unit="pictures") as bar,
    ):
        made = pool.map(lambda picture: _up_to_date_thumbnail(picture, folder), ordered)
        for picture, thumbnail in zip(ordered, made, strict=True):
            thumbnails[picture] = thumbnail
            bar.advance()
    return thumbnails


def _up_to_date_thumbnail(picture: Path, folder: Path) -> Thumbnail | None:
    target = folder / f"{hashlib.sha256(os.fsencode(picture)).hexdigest()[:32]}.jpg"
    if not _is_newer(target, picture):
        data = _thumbnail(picture)
        if data is None:
            return None
        _write(target, data)
    with Image.open(target) as image:
        return Thumbnail(name=target.name, width=image.width, height=image.height)


def _is_newer(thumbnail: Path, picture: Path) -> bool:
    """Whether `thumbnail` was made after `picture` last changed or (ctime) was moved to its place."""
    try:
        made, source = thumbnail.stat(), picture.stat()
    except OSError:
        return False
    return made.st_mtime_ns > max(source.st_mtime_ns, source.st_ctime_ns)


def _thumbnail(picture: Path) -> bytes | None:
    """A small upright JPEG of `picture`; None if it is gone or cannot be decoded (the page shows a placeholder).

    A large photo is decoded at a reduced scale, which makes it several times cheaper.
    """
    side = THUMBNAIL_SIDE_PIXELS
    try:
        small, _ = decode_rgb(picture.read_bytes(), at_least=2 * side)
    except (OSError, ImageError):
        return None
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=THUMBNAIL_QUALITY, optimize=True)
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------------ files


def _write(path: Path, data: bytes) -> None:
    """Write under a temporary name and rename, so that a page or thumbnail is whole or absent."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        raise UserError(
            f"cannot write the gallery file {path}: {error.strerror}; choose a folder that can be written"
        ) from error


def _remove_stale(folder: Path, pattern: re.Pattern[str], *, keep: set[str]) -> None:
    """Remove the files in `folder` that are named as ours and belong to an earlier gallery."""
    if not folder.is_dir():
        return
    for file in folder.iterdir():
        if pattern.fullmatch(file.name) and file.name not in keep:
            file.unlink(missing_ok=True)
