"""A file beside each captioned image: its caption as text, which training tools read, or XMP, which photo programs do.

A person's words stay, unless `existing` says otherwise. A sidecar is whole or absent; links, pipes and folders that
have its name are kept.
"""

import os
import re
import stat
from collections.abc import Iterable
from dataclasses import replace
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
from infer.metadata.outcomes import (
    DECORATIVE,
    Correct,
    Outcomes,
    Text,
    Words,
    check_unchanged,
    replace_content,
    write_texts,
)
from infer.results import Row
from infer.row_index import LocationSet
from infer.written import Entry, Written

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
    written: Written | None = None,
    since: float | None = None,
) -> Outcomes:
    """Write `photo.txt`, or the XMP sidecar, of each captioned `photo.jpg`; failures have no sidecar.

    `text` gives what is written: by default the caption in text files, the sentence `alt` in XMP. Nothing is written
    where the model abstained. `correct` gives a row a person's words; they replace what the model's row had written. Of
    images with the same name but for its suffix, which would have the same text file, the first one gets it, and keeps
    it. `written` knows what earlier calls wrote into text files; `since` is a time before all rows.
    """
    written = written or Written()
    options: dict[str, Any] = {"used": LocationSet(), "written": written, "existing": existing}
    write = partial(_write_xmp, **options) if suffix == XMP else partial(_write_text, suffix=suffix, **options)
    text = text or itemgetter("alt" if suffix == XMP else "caption")
    return write_texts(rows, write, text=text, correct=correct, since=since)


def _is_of_other(entry: Entry | None, image: Path) -> bool:
    """Whether a sidecar is that of another image, which still exists."""
    if entry is None or entry.image in ("", image.name):
        return False
    return os.path.lexists(image.with_name(entry.image))


def _regular_status(path: Path) -> os.stat_result:
    """The status of an existing file. Raises FileExistsError for a link, a pipe or a folder, FileNotFoundError."""
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise FileExistsError
    return status


# ---- text -------------------------------------------------------------------------------------------------


def _write_text(
    image: Path, words: Words, *, suffix: str, used: LocationSet, written: Written, existing: xmp.Existing
) -> str:
    """Write a text file; returns the outcome. `used` has earlier rows' sidecars. Raises OSError and ChangedError."""
    words = replace(words, text=words.text.strip("\r\n"), replaced=words.replaced.strip("\r\n"))
    target = text_sidecar(image, suffix)
    earlier = written.get(target)
    if _is_of_other(earlier, image) or not used.add(str(target)):
        return SHARED
    entry = Entry(text=words.text, image=image.name, model=words.model, before=earlier.text if earlier else "")
    if os.path.lexists(target):
        after = _changed_text(target, words, earlier=earlier, existing=existing)
        if isinstance(after, str):
            return after
    elif not words.text:
        return DECORATIVE
    else:
        after = f"{words.text}\n".encode()
    check_unchanged(image, words)
    written.set(target, entry)
    if os.path.lexists(target):
        replace_content(target, after, _regular_status(target))
    else:
        storage.write_new(str(target), after)
    return "written"


def _changed_text(path: Path, words: Words, *, earlier: Entry | None, existing: xmp.Existing) -> bytes | str:
    """The new content of an existing text file, or why it stays. Raises OSError."""
    is_settled = earlier is None or (earlier.text == words.text and not earlier.before)
    if existing == "keep" and not words.replaced and is_settled:
        return "kept"
    _regular_status(path)
    content = path.read_bytes()
    try:
        before = content.decode("utf-8-sig").strip("\r\n")
    except UnicodeDecodeError:
        return NO_TEXT
    after = _combine(before, words, earlier, existing)
    if after == before:
        return "kept"
    mark = "\ufeff" if content.startswith(b"\xef\xbb\xbf") else ""
    return f"{mark}{after}\n".encode()


def _combine(before: str, words: Words, earlier: Entry | None, existing: xmp.Existing) -> str:
    """The new text of a file that has the text `before`: the same if it has the lines already.

    What was written of a person's words is a person's, as in XMP.
    """
    if existing != "overwrite" and xmp.has_lines(before, words.text):
        return before
    ours = words.replaced
    if earlier is not None:
        is_corrected = earlier.model == xmp.PERSON != words.model
        ours = earlier.text
        if earlier.before and xmp.has_lines(before, earlier.before) and not xmp.has_lines(before, earlier.text):
            ours = earlier.before  # a kill came before the newer text
        ours = "" if is_corrected else ours
    return xmp.combine(before, words.text, earlier=ours, existing=existing)


# ---- XMP --------------------------------------------------------------------------------------------------


def _write_xmp(image: Path, words: Words, *, used: LocationSet, written: Written, existing: xmp.Existing) -> str:
    """Write or extend an XMP sidecar; returns the outcome. Raises OSError, XmpError and ChangedError.

    `a.jpg.xmp` if it is there, else `a.xmp` if it is there and no other image has used it, else a new `a.jpg.xmp`.
    """
    target, shared = xmp_sidecars(image)
    is_alone = not os.path.lexists(target) and os.path.lexists(shared)
    if is_alone and not _is_of_other(written.get(shared), image) and used.add(str(shared)):
        target = shared
        written.set(shared, Entry(text="", image=image.name))
    options = {"model": words.model, "date": date.today().isoformat(), "sha256": words.sha256}
    extend = partial(xmp.extend, text=words.text, existing=existing, **options)
    try:
        status = _regular_status(target)
    except FileNotFoundError:
        if not words.text:
            return DECORATIVE
        check_unchanged(image, words)
        storage.write_new(str(target), extend(None) or b"")
        return "written"
    with target.open("rb") as file:
        content = extend(file.read(xmp.MAX_BYTES + 1))
    if content is None:
        return "kept"
    check_unchanged(image, words)
    replace_content(target, content, status)
    return "written"
