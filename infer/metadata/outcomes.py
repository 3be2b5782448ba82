"""Writes each image's text, counts the outcomes, and replaces files so that they keep owner and permissions."""

import errno
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from uuid import uuid4

from captioner.files import storage
from infer.metadata.described import had_checksum, local_path
from infer.metadata.xmp import PERSON, XmpError
from infer.results import PARTIAL_SUFFIX, Row
from infer.row_index import LocationSet

DECORATIVE = "left out, since they are decorative"
EMPTY = "left out, since all fields of the template are empty"
GONE = "left out, since the image is gone"
CHANGED = (
    "left alone, since the image has been replaced or edited since it was captioned: delete its row to caption it again"
)
UNREADABLE_XMP = "left alone, since their XMP cannot be read"
UNREMARKABLE = frozenset(("written", "kept", "abstained", "not local", DECORATIVE, GONE))
SHOWN_NAMES = 5  # of what a user should look at

Text = Callable[[Row], str]  # what is written for a row
Correct = Callable[[Row], Row]  # the row with a person's words, or the same row


@dataclass(frozen=True, kw_only=True, slots=True)
class Words:
    """What is written of an image, "" if it is decorative, and by which model.

    `model` is PERSON for a person's words; `replaced` is then the model's text. `sha256` is that of the captioned file,
    and `since` a time (seconds since 1970) before it was captioned; None if changes of the file do not matter.
    """

    text: str
    model: str
    replaced: str = ""
    sha256: str = ""
    since: float | None = None


class ChangedError(Exception):
    """An image is not the one that was captioned."""


OUTCOMES: dict[type[Exception], str] = {
    FileExistsError: "kept",
    NotADirectoryError: "not local",  # the tar that holds the image
    ChangedError: CHANGED,
    XmpError: UNREADABLE_XMP,
}


@dataclass(kw_only=True)
class Outcomes:
    """Counts of sidecars, or of embedded descriptions, by outcome; `num_failed` could not be written.

    `names` has the first images of each outcome that the user should know about.
    """

    what: str = "sidecars"
    counts: Counter[str] = field(default_factory=Counter)
    names: dict[str, list[str]] = field(default_factory=dict)
    num_failed: int = 0

    def add(self, outcome: str, row: Row) -> None:
        """Count the outcome of a row's image."""
        self.counts[outcome] += 1
        if outcome not in UNREMARKABLE:
            names = self.names.setdefault(outcome, [])
            names += [storage.join(row["root"], row["path"])][: SHOWN_NAMES - len(names)]

    def add_failure(self, reason: object, row: Row) -> None:
        """Count an image whose description could not be written."""
        self.num_failed += 1
        self.add(f"could not be written ({reason})", row)

    def lines(self) -> Iterator[str]:
        """A line for each outcome."""
        for outcome, count in self.counts.most_common():
            names = self.names.get(outcome, [])
            shown = f": {first_names(names, total=count)}" if names else ""
            yield f"{self.what}: {count:,} {outcome}{shown}"


def first_names(names: Sequence[str], *, total: int) -> str:
    """The names, and three dots if there are more of them in all."""
    return f"{', '.join(map(repr, names))}{', ...' if total > len(names) else ''}"


def write_texts(
    rows: Iterable[Row],
    write: Callable[[Path, Words], str],
    *,
    text: Text,
    correct: Correct | None = None,
    since: float | None = None,
    what: str = "sidecars",
    follow_links: bool = False,
) -> Outcomes:
    """Call `write` with each captioned image of this machine and its words; returns counts by outcome.

    `write` returns the outcome, or raises OSError or one of OUTCOMES. `since` is a time before all rows. An image that
    several rows name, or with `follow_links` several links, gets the first one's text.
    """
    outcomes, seen = Outcomes(what=what), LocationSet()
    for row in rows:
        if "error" in row:
            continue
        try:
            image = local_path(row["root"], row["path"])
            words = _words(row, correct(row) if correct else row, text, since=since)
            if image is not None and follow_links:
                image = Path(os.path.realpath(image))
            if not words.text and not words.replaced:
                outcome = EMPTY if row["alt"] else "abstained"
            elif image is None:
                outcome = "not local"
            elif since is not None and _is_gone(image):
                outcome = GONE
            else:
                outcome = write(image, words) if seen.add(str(image)) else "kept"
        except tuple(OUTCOMES) as error:
            outcome = next(outcome for kind, outcome in OUTCOMES.items() if isinstance(error, kind))
        except OSError as error:
            outcomes.add_failure(error.strerror or error, row)
            continue
        outcomes.add(outcome, row)
    return outcomes


def _words(row: Row, said: Row, text: Text, *, since: float | None) -> Words:
    """The words of a row; `said` is the row with a person's words, or the same row."""
    model_text = row["alt"] and text(row)
    words = Words(text=model_text, model=row["model"], sha256=row["sha256"], since=since)
    if said is row:
        return words
    return replace(words, text=said["alt"] and text(said), model=PERSON, replaced=model_text)


def _is_gone(image: Path) -> bool:
    """Whether there is no image. Raises OSError, such as NotADirectoryError for one in a shard."""
    try:
        image.lstat()
    except FileNotFoundError:
        return True
    return False


def check_unchanged(image: Path, words: Words) -> None:
    """Raise ChangedError if an image is not the one that was captioned, and OSError.

    It is the same if only a text was embedded by this program since. Most images need no reading: their status has not
    changed since a time before they were captioned.
    """
    if words.since is None:
        return
    status = image.stat()
    if status.st_ctime < words.since:
        return
    if stat.S_ISREG(status.st_mode):
        with image.open("rb") as file:  # its header, before all of it
            is_same = had_checksum(file, words.sha256)
        if is_same or storage.file_sha256(image) == words.sha256:
            return
    raise ChangedError


def partial_beside(path: Path) -> Path:
    """A new temporary name in the folder of `path`, which listings of images leave out."""
    return path.with_name(f".{uuid4().hex}{PARTIAL_SUFFIX}")


def replace_content(path: Path, content: bytes, status: os.stat_result) -> None:
    """Replace a file atomically; the new one has the owner and the permissions in `status`. Raises OSError."""
    check_writable(path)
    partial = partial_beside(path)
    with storage.replacing(path, partial=partial) as file:
        file.write(content)
        keep_owner(partial, status)


def check_writable(path: Path) -> None:
    """Raise PermissionError for a file that this user may not change: a rename would replace it all the same."""
    if not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def keep_owner(path: Path, status: os.stat_result) -> None:
    """Give a file the owner, as far as this user may, and the permissions in `status`. Raises OSError."""
    with suppress(PermissionError):
        os.chown(path, status.st_uid, status.st_gid)
    path.chmod(stat.S_IMODE(status.st_mode))
