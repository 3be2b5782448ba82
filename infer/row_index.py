"""Finds the rows of this run and earlier ones, and merges all parts into one sorted file; memory stays flat.

Rows are found through a private SQLite database of places, checksums and offsets, which spills to disk by itself.
"""

import json
import os
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

from captioner.errors import UserError
from captioner.files import storage
from captioner.files.storage import is_remote
from infer.listing import real_root
from infer.results import FORMAT_VERSION, Row, duplicate_row, find_parts, merging_path, open_part, to_line, writing

Entry = tuple[bytes, bytes, bytes, bytes | None]  # file, root, path, sha256 (None: a failure)


class _Files:
    """Tells which rows are of one file, whatever names a run gave its folder: photos, photos/ or /home/me/photos.

    Relative roots start from the folder `base`.
    """

    def __init__(self, base: str) -> None:
        self._base = base
        self._real = lru_cache(maxsize=1024)(self._find_root)

    def _find_root(self, root: str) -> str:
        return root if is_remote(root) else real_root(os.path.join(self._base, root))  # noqa: PTH118 - bytes as they are

    def key(self, root: str, path: str) -> bytes:
        """The same 16 bytes for all names of a file."""
        location = storage.join(self._real(root), path)
        return blake2b(location.encode("utf-8", "surrogatepass"), digest_size=16).digest()

    def entry(self, row: Row) -> Entry:
        """What a row is found by; bytes compare as Python's strings do."""
        root, path = (row[key].encode("utf-8", "surrogatepass") for key in ("root", "path"))
        return self.key(row["root"], row["path"]), root, path, None if "error" in row else bytes.fromhex(row["sha256"])

    def parse(self, line: bytes) -> Entry | None:
        """The entry of a line; None for one that is no row."""
        try:
            row = json.loads(line)
            return self.entry(row) if row["format_version"] == FORMAT_VERSION else None
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return None


def _read_entries(paths: Sequence[Path], files: _Files, *, whole: Path) -> Iterator[tuple[Any, ...]]:
    """Each row's entry, the number of its file of rows and its offset there. Only `whole` cannot end in a torn row."""
    for number, path in enumerate(paths):
        offset = 0
        with path.open("rb") as file:
            for line_number, line in enumerate(file, start=1):
                if path != whole and not line.endswith(b"\n"):
                    break  # torn by a kill: that file is captioned again
                entry = files.parse(line)
                if entry is None:
                    raise UserError(
                        f"line {line_number} of {path} is no row of this version: give another --output, or delete it"
                    )
                yield *entry, number, offset
                offset += len(line)


class _RowFiles:
    """Rows of several files, each by its file's number and its offset in bytes."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._numbers = {path: number for number, path in enumerate(paths)}
        self._open: dict[int, BinaryIO] = {}

    def number(self, path: Path) -> int:
        return self._numbers.setdefault(path, len(self._numbers))

    def read(self, number: int, offset: int) -> bytes:
        if number not in self._open:
            self._open[number] = list(self._numbers)[number].open("rb")
        self._open[number].seek(offset)
        return self._open[number].readline().rstrip(b"\n") + b"\n"  # an editor may have left the last without its end

    def close(self) -> None:
        for file in self._open.values():
            file.close()


# ---- what is done already ---------------------------------------------------------------------------------

INSERT = "INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?)"


def _open_database() -> sqlite3.Connection:
    """A private database that lives in memory while it is small, and else in a temporary file without a name."""
    database = sqlite3.connect("")
    database.execute("PRAGMA journal_mode = OFF")
    database.execute("CREATE TABLE rows (name BLOB, root BLOB, path BLOB, sha256 BLOB, file INTEGER, offset INTEGER)")
    return database


@contextmanager
def _room_for_database() -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        raise UserError(
            f"the temporary database of the rows cannot grow ({error}): set SQLITE_TMPDIR to a folder with more room"
        ) from error


class RowIndex:
    """Finds the rows of this run and earlier ones by place and by content; its memory does not grow with them.

    Relative roots start from the folder `base`. Raises UserError for an output that is no file of rows. With
    `retry_errors` failures of earlier runs do not count.
    """

    def __init__(self, output: Path, *, base: str = "", retry_errors: bool = False) -> None:
        self._names = _Files(base)
        files = [path for path in (output, *find_parts(output)) if path.exists()]
        self._files = _RowFiles(files)
        self._database = _open_database()
        entries = _read_entries(files, self._names, whole=output)
        with _room_for_database():
            self._database.executemany(INSERT, (entry for entry in entries if entry[3] is not None or not retry_errors))
            self._database.execute("CREATE INDEX by_name ON rows (name)")
            self._database.execute("CREATE INDEX by_content ON rows (sha256) WHERE sha256 IS NOT NULL")

    def is_done(self, root: str, path: str) -> bool:
        """Whether this file has a row, also under another name of its root."""
        found = self._database.execute("SELECT 1 FROM rows WHERE name = ?", (self._names.key(root, path),))
        return found.fetchone() is not None

    def find_caption(self, sha256: str) -> Row | None:
        """The first known row of a captioned file with these bytes."""
        query = "SELECT file, offset FROM rows WHERE sha256 = ? ORDER BY rowid LIMIT 1"
        found = self._database.execute(query, (bytes.fromhex(sha256),)).fetchone()
        return None if found is None else json.loads(self._files.read(*found))

    def add(self, row: Row, path: Path, offset: int) -> None:
        """Take in a row that was written to the part `path` at `offset`."""
        with _room_for_database():
            self._database.execute(INSERT, (*self._names.entry(row), self._files.number(path), offset))

    def close(self) -> None:
        """Close all files and drop the database."""
        self._files.close()
        self._database.close()


# ---- merging ----------------------------------------------------------------------------------------------

# Of a file's rows a success wins, then the latest: the other columns are those of the row with the greatest rank.
KEEP_ONE_A_FILE = """
    CREATE TABLE kept AS
    SELECT sha256, file, offset, max(rowid + iif(sha256 IS NULL, 0, 1 << 60)) AS rank
    FROM rows GROUP BY name ORDER BY root, path"""
FIND_SHARED_CONTENTS = """
    CREATE TABLE shared AS
    SELECT sha256, min(rowid) AS first FROM kept WHERE sha256 IS NOT NULL GROUP BY sha256 HAVING count(*) > 1"""
IN_ORDER = """
    SELECT kept.file, kept.offset, first.file, first.offset FROM kept
    LEFT JOIN shared ON shared.sha256 = kept.sha256 AND shared.first < kept.rowid
    LEFT JOIN kept AS first ON first.rowid = shared.first
    ORDER BY kept.rowid"""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a merged file holds: failures by reason; duplicates and rows to review are captioned ones."""

    num_rows: int
    failures: Counter[str]
    num_duplicates: int
    num_review: int


def merge(output: Path, *, base: str = "") -> Summary:
    """Write all rows, sorted by place and each file once, to `output`; then remove the parts.

    Relative roots start from the folder `base`. Files with the same bytes get the caption of the first of them, so the
    result does not tell who captioned which. Raises UserError for an output that is no file of rows, and while another
    run is writing a part.
    """
    parts = find_parts(output)
    with ExitStack() as stack:
        for part in parts:
            stack.enter_context(open_part(part))
        with _room_for_database(), writing(merging_path(output)):
            summary = _write_merged(_merged_rows(output, parts, _Files(base)), output)
        for part in parts:
            part.unlink()
    return summary


def _merged_rows(output: Path, parts: Sequence[Path], names: _Files) -> Iterator[tuple[Row, bytes]]:
    """The rows and their lines. Most lines are taken as they are: making one takes as long as all the rest."""
    files = [path for path in (output, *parts) if path.exists()]
    with closing(_open_database()) as database, closing(_RowFiles(files)) as lines:
        database.executemany(INSERT, _read_entries(files, names, whole=output))
        database.execute(KEEP_ONE_A_FILE)
        database.execute(FIND_SHARED_CONTENTS)
        database.execute("CREATE INDEX by_content ON shared (sha256)")
        for file, offset, *first in database.execute(IN_ORDER):
            line = lines.read(file, offset)
            row: Row = json.loads(line)
            if first[0] is not None:
                row = duplicate_row(json.loads(lines.read(*first)), root=row["root"], path=row["path"])
                line = to_line(row).encode("ascii")
            elif row.get("duplicate_of") is not None:
                row["duplicate_of"] = None
                line = to_line(row).encode("ascii")
            yield row, line


def _write_merged(rows: Iterable[tuple[Row, bytes]], output: Path) -> Summary:
    failures: Counter[str] = Counter()
    num_rows = num_duplicates = num_review = 0
    with storage.replacing(output, partial=merging_path(output)) as file:
        for row, line in rows:
            file.write(line)
            num_rows += 1
            num_duplicates += row.get("duplicate_of") is not None
            num_review += row.get("review") is not None
            if "error" in row:
                failures[row["error"]] += 1
    return Summary(num_rows=num_rows, failures=failures, num_duplicates=num_duplicates, num_review=num_review)
