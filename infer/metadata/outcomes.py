"""Counts of what happened to the images' descriptions, and who keeps the attributes of a file that is replaced."""

import errno
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

from captioner.files import storage
from infer.results import PARTIAL_SUFFIX, Row

UNREMARKABLE = frozenset(("written", "kept", "abstained", "not local"))
UNREADABLE_XMP = "left alone, since their XMP cannot be read"
SHOWN_NAMES = 5  # of each other outcome

Text = Callable[[Row], str]  # what is written for a row


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
            shown = f": {', '.join(map(repr, names))}{', ...' if count > len(names) else ''}" if names else ""
            yield f"{self.what}: {count:,} {outcome}{shown}"


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
