"""A file beside each captioned image: its caption as text, which training tools read, or XMP, which photo programs do.

A person's words stay, unless `existing` says otherwise. A sidecar is whole or absent; links, pipes and folders that
have its name are kept.
"""

import os
import re
import stat
from collections.abc import Iterable
from datetime import date
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

from PIL import Image

from captioner.errors import UserError
from captioner.files import storage
from infer.metadata import xmp
from infer.metadata.described import XMP, text_sidecar, xmp_sidecars
from infer.metadata.outcomes import DECORATIVE, Correct, Outcomes, Text, Words, replace_content, write_texts
from infer.results import Row
from infer.row_index import LocationSet

SHARED = "left out, since another image of the same name has it"
SUFFIX = re.compile(r"(\.[a-z0-9_-]+)+")
NO_TEXT = "left alone, since they are no UTF-8 text"


def check_suffix(suffix: str) -> None:
    """Raise UserError for a suffix that makes no file name beside the image's."""
    if not SUFFIX.fullmatch(suffix) or suffix in Image.registered_extensions():
        raise UserError(f"{suffix!r} is no suffix of sidecar files: give one such as .txt or .xmp, in small letters")


def write_sidecars(
    rows: Iterable[Row],
    *,
    suffix: str,
    existing: xmp.Existing = "keep",
    text: Text | None = None,
    correct: Correct | None = None,
) -> Outcomes:
    """Write `photo.txt`, or the XMP sidecar, of each captioned `photo.jpg`; failures have no sidecar.

    `text` gives what is written: by default the caption in text files, the sentence `alt` in XMP. Nothing is written
    where the model abstained. `correct` gives a row a person's words; they replace what the model's row had written. Of
    images with the same name but for its suffix, which would have the same text file, the first one gets it.
    """
    options: dict[str, Any] = {"used": LocationSet(), "existing": existing}
    write = partial(_write_xmp, **options) if suffix == XMP else partial(_write_text, suffix=suffix, **options)
    return write_texts(rows, write, text=text or itemgetter("alt" if suffix == XMP else "caption"), correct=correct)


def _regular_status(path: Path) -> os.stat_result:
    """The status of an existing file. Raises FileExistsError for a link, a pipe or a folder, FileNotFoundError."""
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise FileExistsError
    return status


# ---- text -------------------------------------------------------------------------------------------------


def _write_text(image: Path, words: Words, *, suffix: str, used: LocationSet, existing: xmp.Existing) -> str:
    """Write a text file; returns the outcome. `used` has earlier rows' sidecars. Raises OSError."""
    target = text_sidecar(image, suffix)
    if not used.add(str(target)):
        return SHARED
    if os.path.lexists(target):
        return "kept" if existing == "keep" and not words.replaced else _change_text(target, words, existing)
    if not words.text:
        return DECORATIVE
    storage.write_new(str(target), words.text + "\n")
    return "written"


def _change_text(path: Path, words: Words, existing: xmp.Existing) -> str:
    """Change an existing text file; returns the outcome. One that has the line already stays. Raises OSError."""
    status = _regular_status(path)
    content = path.read_bytes()
    try:
        before = content.decode("utf-8-sig").strip("\r\n")
    except UnicodeDecodeError:
        return NO_TEXT
    after = before
    if existing == "overwrite" or words.text not in before.splitlines():
        after = xmp.combine(before, words.text, earlier=words.replaced, existing=existing)
    if after == before:
        return "kept"
    mark = "\ufeff" if content.startswith(b"\xef\xbb\xbf") else ""
    replace_content(path, f"{mark}{after}\n".encode(), status)
    return "written"


# ---- XMP --------------------------------------------------------------------------------------------------


def _write_xmp(image: Path, words: Words, *, used: LocationSet, existing: xmp.Existing) -> str:
    """Write or extend an XMP sidecar; returns the outcome. Raises OSError and XmpError.

    `a.jpg.xmp` if it is there, else `a.xmp` if it is there and no earlier image has used it, else a new `a.jpg.xmp`.
    """
    target, shared = xmp_sidecars(image)
    if not os.path.lexists(target) and os.path.lexists(shared) and used.add(str(shared)):
        target = shared
    today = date.today().isoformat()
    extend = partial(xmp.extend, text=words.text, model=words.model, date=today, existing=existing)
    try:
        status = _regular_status(target)
    except FileNotFoundError:
        if not words.text:
            return DECORATIVE
        storage.write_new(str(target), extend(None) or b"")
        return "written"
    with target.open("rb") as file:
        content = extend(file.read(xmp.MAX_BYTES + 1))
    if content is None:
        return "kept"
    replace_content(target, content, status)
    return "written"
