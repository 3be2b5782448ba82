"""What persons wrote of images: the lines of corrections.jsonl, which the gallery makes and make_shards.py reads.

`{"path": "a.jpg", "captions": ["a red tram"], "images": "photos", "sha256": "..."}` is a caption, and
`{"path": "b.jpg", "decorative": true, ...}` an image that needs none: its alt text is empty, and it is not trained on.
`path` is the image's name in the folder `images`, as for make_shards.py; `sha256` is that of the file's bytes.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from captioner.errors import UserError
from captioner.files import locks, storage
from captioner.files.storage import WEB, is_remote
from infer.results import NOT_UTF8, Row, read_rows

DECORATIVE = ""  # instead of a caption
LOCK_SUFFIX = ".lock"


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """A person's caption of an image, or DECORATIVE. None takes back what the file had of it."""

    path: str
    caption: str | None
    images: str | None = None
    sha256: str | None = None

    @property
    def key(self) -> tuple[str | None, str]:
        """The image's folder, None if it is not known, and its name in that folder."""
        if self.images is None or storage.is_remote(self.images):
            return self.images, self.path
        return os.path.abspath(self.images), self.path  # noqa: PTH100 (`..` must go)


def parse_line(line: object) -> Correction:
    """The correction in a parsed line. Raises ValueError."""
    if not isinstance(line, dict):
        raise ValueError("it is no object")
    if "model" in line:
        raise ValueError("it is a row of captions.jsonl, which a model wrote")
    path, images, sha256 = line.get("path"), line.get("images"), line.get("sha256")
    captions, decorative = line.get("captions", line.get("caption")), line.get("decorative")
    caption = captions[0] if isinstance(captions, list) and captions else captions
    if not isinstance(path, str) or not all(isinstance(value, str | None) for value in (images, sha256, caption)):
        raise ValueError("it needs a path, and captions or decorative")
    if caption is not None and NOT_UTF8.search(caption):
        raise ValueError("its caption is not valid Unicode")
    if decorative is True and not caption:
        caption = DECORATIVE
    elif caption is not None and not caption.strip():
        raise ValueError("its caption is empty: an image without need of one is decorative")
    return Correction(path=path, caption=caption, images=images, sha256=sha256)


def to_line(correction: Correction) -> dict[str, Any]:
    """What `parse_line` parses."""
    said = {"decorative": True} if correction.caption == DECORATIVE else {"captions": [correction.caption]}
    known = {"images": correction.images, "sha256": correction.sha256}
    return {"path": correction.path, **said, **{name: value for name, value in known.items() if value is not None}}


def read_lines(file: Path) -> Iterator[Correction]:
    """The corrections in a file, none if there is no file. Raises UserError for a line that is none, and OSError."""
    for number, text in enumerate(file.read_bytes().splitlines() if file.exists() else (), start=1):
        try:
            if text.strip():
                correction = parse_line(json.loads(text))
                if correction.caption is None:
                    raise ValueError("it has neither captions nor decorative")
                yield correction
        except (ValueError, RecursionError) as error:
            raise UserError(f"line {number} of {file} is no correction ({error}): repair or remove it") from error


class Corrections:
    """Corrections, of which a later one replaces an earlier one of the same image."""

    def __init__(self, corrections: Iterable[Correction] = ()) -> None:
        self._by_key: dict[tuple[str | None, str], tuple[int, Correction]] = {}  # with their numbers
        self._num_added = 0
        self._found: set[tuple[str | None, str]] = set()
        self.num_by_name = 0  # found by name, while the bytes are others
        self._by_sha256: dict[str, Correction] = {}
        for correction in corrections:
            self.add(correction)

    def __len__(self) -> int:
        return len(self._by_key)

    def add(self, correction: Correction) -> None:
        """Add a correction, or take one back."""
        self._by_key.pop(correction.key, None)
        if correction.caption is not None:
            self._num_added += 1
            self._by_key[correction.key] = self._num_added, correction
            if correction.sha256 is not None:
                self._by_sha256[correction.sha256] = correction

    def find(self, *, images: str, path: str, sha256: str) -> str | None:
        """What a person wrote of an image: by name if its bytes are the same or unknown, by bytes, or by name alone.

        A correction of this name in an unknown folder counts if it is later than that in `images`; for a URL only if
        the bytes are the same. This changes the corrections: the one found gets this name and these bytes.
        """
        now = Correction(path=path, caption=None, images=images, sha256=sha256)
        all_named = [self._by_key[key] for key in {now.key, (None, path)} if key in self._by_key]
        if is_remote(images):
            all_named = [each for each in all_named if each[1].images or each[1].sha256 in (None, sha256)]
        same = [each for each in all_named if each[1].sha256 in (None, sha256)]
        named = max(same or all_named, default=(0, None), key=itemgetter(0))[1]
        found = named if same else self._by_sha256.get(sha256, named)
        if found is None:
            return None
        self.num_by_name += found is named and not same
        self._found.add(now.key)
        for _, other in all_named:
            self._by_key.pop(other.key)
        self.add(replace(now, caption=found.caption))
        return found.caption

    def not_found(self) -> list[Correction]:
        """The corrections that `find` has not found yet, such as of images without a row."""
        return [correction for key, (_, correction) in self._by_key.items() if key not in self._found]

    def to_jsonl(self) -> str:
        """The content of their file."""
        return "".join(f"{json.dumps(line)}\n" for line in self.lines())

    def lines(self) -> list[dict[str, Any]]:
        """The lines of their file."""
        return [to_line(correction) for _, correction in self._by_key.values()]


class CorrectionFile:
    """A file of corrections that threads and processes change, such as a server, and captioning again."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def read(self) -> Corrections:
        """The corrections as they are now. Raises UserError for a line that is none, and OSError."""
        return Corrections(read_lines(self._file))

    def change(self, changes: Iterable[Correction]) -> None:
        """Write the file with more corrections, or without those that are taken back. Raises as `read` does."""
        with self.changing() as corrections:
            for correction in changes:
                corrections.add(correction)

    @contextmanager
    def changing(self, read: Callable[[], Corrections] | None = None) -> Iterator[Corrections]:
        """A block that changes the corrections, which are written at its end. Nobody else changes them meanwhile.

        `read` gives them, by default those of the file. Raises as `read` does.
        """
        with locks.locked(self._file.with_name(f"{self._file.name}{LOCK_SUFFIX}")):
            corrections = read() if read else self.read()
            yield corrections
            after = corrections.to_jsonl()
            if after != (self._file.read_text("utf-8") if self._file.exists() else ""):
                storage.write_atomic(str(self._file), after)


# ---- rows -------------------------------------------------------------------------------------------------


def name_roots(roots: Sequence[str]) -> list[dict[str, str]]:
    """For each root the --images for make_shards.py, and what stands before its paths in that folder.

    One file of corrections is for one folder: that which all local roots lie in. A URL is a folder of its own.
    """
    local = {root: os.path.abspath(root) for root in roots if not is_remote(root)}  # noqa: PTH100 (`..` must go)
    common = os.path.commonpath(local.values()) if len(local) > 1 else None
    named = []
    for root in roots:
        if common is None or root not in local:
            named.append({"root": root, "images": root, "prefix": ""})
        else:
            below = os.path.relpath(local[root], common)
            named.append({"root": root, "images": common, "prefix": "" if below == "." else f"{below}/"})
    return named


def roots_of(output: Path) -> dict[str, dict[str, str]]:
    """The named roots of the rows in a file, by root."""
    roots = dict.fromkeys(row["root"] for row in read_rows(output))
    return {root["root"]: root for root in name_roots(list(roots))}


def find_correction(row: Mapping[str, Any], written: Corrections, *, root: Mapping[str, str]) -> str | None:
    """What a person wrote of the image of a row that is no failure; `root` is its root, as `name_roots` names it."""
    return written.find(images=root["images"], path=name_in_images(row, root), sha256=row["sha256"])


def name_in_images(row: Mapping[str, Any], root: Mapping[str, str]) -> str:
    """The image's name in the folder `images` of its named root, as make_shards.py reads it."""
    return root["prefix"] + (unquote(row["path"]) if root["root"].startswith(WEB) else row["path"])


def correct_row(row: Row, written: Corrections, *, roots: Mapping[str, Mapping[str, str]]) -> Row:
    """The row with what a person wrote as `caption` and `alt`, which are "" for DECORATIVE; itself if nobody did.

    Nothing is said about the model's caption then, and `correction` is "text" or "decorative".
    """
    found = None if "error" in row else find_correction(row, written, root=roots[row["root"]])
    if found is None:
        return row
    said: Any = {"caption": found, "alt": found, "correction": "decorative" if found == DECORATIVE else "text"}
    return row | said | {"confidence": None, "score": None, "review": None}
