"""The text for an image: a template whose fields come from its row, its name and its metadata.

A template such as "{alt} {folder}, {date}" is literal text and fields; {{ and }} are braces. Beside an empty field,
punctuation and symbols are left out: without a date it gives "A dog. beach".
"""

import os
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import PurePosixPath
from string import Formatter
from urllib.parse import unquote

import regex

from captioner.errors import UserError
from captioner.files import storage
from infer.empty_fields import join
from infer.listing import ImageFile, locate
from infer.photo_metadata import PhotoMetadata, read_metadata
from infer.results import NOT_UTF8, Row, as_utf8

_UNPRINTABLE = re.compile(r"[\s\x00-\x1f\x7f-\x9f\u2028\u2029]+")


def clean(text: str) -> str:
    """The text as one line that any file and terminal can hold.

    White space and control characters become a space, bytes that are not UTF-8 the replacement character.
    """
    return _UNPRINTABLE.sub(" ", as_utf8(text)).strip()


ROW_FIELDS = ("alt", "caption", "confidence", "review", "model", "width", "height", "root", "path")
FILE_FIELDS = ("name", "stem", "folder")
METADATA_FIELDS = ("date", "time", "camera", "place")
FIELDS = (*ROW_FIELDS, *FILE_FIELDS, *METADATA_FIELDS)


class _Image:
    """The values of a template's fields for one row; the image's file is opened when a field needs it."""

    def __init__(self, row: Row) -> None:
        self._row: Mapping[str, object] = row
        self._root, self._path = row["root"], row["path"]

    def value(self, field: str) -> str:
        """The field's value as text of one line; "" if there is none."""
        if field in ROW_FIELDS:
            found = self._row[field]
        elif field in METADATA_FIELDS:
            found = getattr(self._metadata, field)
        else:
            found = self._file.parent.name if field == "folder" else getattr(self._file, field)
        return "" if found is None else clean(f"{found:.2f}" if isinstance(found, float) else str(found))

    @cached_property
    def _metadata(self) -> PhotoMetadata:
        return read_metadata(locate(self._root, self._path))

    @cached_property
    def _file(self) -> PurePosixPath:
        """The absolute path; of a URL host and path, not percent-encoded."""
        location = ImageFile(self._root, self._path).location
        if storage.is_remote(self._root):
            address = location.partition("://")[2]
            return PurePosixPath(unquote(address) if self._root.startswith(storage.WEB) else address)
        return PurePosixPath(os.path.abspath(location))  # noqa: PTH100 - keeps links


class Template:
    """Makes the text for a row.

    `prefix` and `suffix` are added as they are to each text. With `max_length` the text has at most that many
    characters: the template's part is cut behind its last whole word, or, if its first word is longer, inside that,
    but never inside a character that a reader sees as one. Raises UserError for a template that cannot be used.
    """

    def __init__(self, template: str, *, prefix: str = "", suffix: str = "", max_length: int | None = None) -> None:
        for flag, value in (("--template", template), ("--prefix", prefix), ("--suffix", suffix)):
            if NOT_UTF8.search(value) or "\0" in value:
                raise UserError(f"{flag} {value!r} is not valid UTF-8: write it in UTF-8")
        self._parts = _parse(template)
        self._prefix, self._suffix = prefix, suffix
        self._room = None if max_length is None else max_length - len(prefix) - len(suffix)
        if self._room is not None and self._room < 1:
            raise UserError(f"--max-length {max_length} leaves no room between --prefix and --suffix: give more")

    def text(self, row: Row) -> str:
        """The text; "" for a failure, where the model abstained (`alt` is empty), and if all fields are empty."""
        if not row.get("alt"):
            return ""
        image = _Image(row)
        text = join([(is_literal, part if is_literal else image.value(part)) for is_literal, part in self._parts])
        if self._room is not None:
            text = shorten(text, room=self._room)
        return f"{self._prefix}{text}{self._suffix}" if text else ""


def _parse(template: str) -> list[tuple[bool, str]]:
    """The literals (True) and names of fields (False) of a template, in order. Raises UserError."""
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"--template {template!r} cannot be read ({error}): write {{{{ for a brace") from error
    found = []
    for literal, name, form, conversion in parts:
        found += [(True, literal)] if literal else []
        if name is None:
            continue
        if name not in FIELDS:
            raise UserError(f"--template has no field {{{name}}}: use {', '.join(FIELDS)}")
        if form or conversion:
            raise UserError(f"--template has {{{name}}} with a format: write {{{name}}} alone")
        found.append((False, name))
    if all(is_literal for is_literal, _ in found):
        raise UserError(f"--template {template!r} has no field: use some of {', '.join(FIELDS)}, such as {{alt}}")
    return found


def shorten(text: str, *, room: int) -> str:
    """The words that fit into `room` characters, without separators at their end; of a longer first word its start."""
    if len(text) <= room:
        return text
    head = text[: room + 1].rpartition(" ")[0].rstrip(" ,;:/|·•–—-([")
    if head:
        return head
    fitting = ""
    for character in regex.findall(r"\X", text):  # letters with their accents, emoji of several code points
        if len(fitting) + len(character) > room:
            break
        fitting += character
    return fitting
