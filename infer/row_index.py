"""Finds the rows of this and earlier runs, and merges all parts into one sorted file, in constant memory.

Rows are in a private SQLite database, which moves from memory to a temporary file when it grows.
"""

import json
import os
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path

from captioner.errors import UserError
from captioner.files import storage
from infer.results import FORMAT_VERSION, Row, duplicate_row, find_parts, merging_path, open_part, to_line, writing

Entry = tuple[bytes, bytes, bytes, bytes | None, bytes]  # a row of the table `rows`


def real_root(root: str, base: str = "") -> str:
    """The one absolute path of a root, without links and dots; a relative root starts from the folder `base`."""
    return root if storage.is_remote(root) else os.path.realpath(os.path.join(base, root))  # noqa: PTH118


def hash_location(location: str) -> bytes:
    """A hash of 16 bytes, the same in all processes."""
    return blake2b(location.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def open_database(table: str) -> sqlite3.Connection:
    """A private database, in memory while it is small, then in an unnamed temporary file."""
    database = sqlite3.connect("", check_same_thread=False)  # another thread iterates over the listing
    database.execute("PRAGMA journal_mode = OFF")
    database.execute(table)
    return database


@contextmanager
def database_errors() -> Iterator[None]:
    """Raise UserError if the database's temporary file cannot grow."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise UserError(
            f"a temporary database cannot grow ({error}): set SQLITE_TMPDIR to a folder with more room"
        ) from error


class LocationSet:
    """A set of locations, stored as hashes."""

    def __init__(self) -> None:
        self._database = open_database("CREATE TABLE seen (hash BLOB PRIMARY KEY) WITHOUT ROWID")

    def add(self, location: str) -> bool:
        """Add a location; returns whether it is new. Raises UserError if the temporary file cannot grow."""
        with database_errors():
            insert = "INSERT OR IGNORE INTO seen VALUES (?)"
            return self._database.execute(insert, (hash_location(location),)).rowcount == 1


class StampTable:
    """For each location, stored as a hash, a file's size in bytes and time of modification in ns."""

    def __init__(self) -> None:
        self._database = open_database("CREATE TABLE stamps (hash BLOB PRIMARY KEY, size, time) WITHOUT ROWID")

    def get(self, location: str) -> tuple[int, int] | None:
        """The size and time of a location; None if none was set."""
        query = "SELECT size, time FROM stamps WHERE hash = ?"
        return self._database.execute(query, (hash_location(location),)).fetchone()

    def set(self, location: str, stamp: tuple[int, int]) -> None:
        """Set a location's size and time. Raises UserError if the temporary file cannot grow."""
        with database_errors():
            self._database.execute("INSERT OR REPLACE INTO stamps VALUES (?, ?, ?)", (hash_location(location), *stamp))


# ---- rows -------------------------------------------------------------------------------------------------

TABLE = "CREATE TABLE rows (name BLOB, root BLOB, path BLOB, sha256 BLOB, line BLOB)"
INSERT = "INSERT INTO rows VALUES (?, ?, ?, ?, ?)"

# Of a file's rows the latest one with a caption wins, else the latest: SQLite takes the other columns from the row of
# greatest rank.
KEEP_ONE_A_FILE = """
    CREATE TABLE kept AS
    SELECT rowid AS number, sha256, max(rowid + iif(sha256 IS NULL, 0, 1 << 60)) AS rank
    FROM rows GROUP BY name ORDER BY root, path"""
FIND_SHARED_CONTENTS = """
    CREATE TABLE shared AS
    SELECT sha256, number, min(rowid) AS first FROM kept WHERE sha256 IS NOT NULL GROUP BY sha256 HAVING count(*) > 1"""
IN_ORDER = """
    SELECT own.line, original.line FROM kept
    JOIN rows AS own ON own.rowid = kept.number
    LEFT JOIN shared ON shared.sha256 = kept.sha256 AND shared.first < kept.rowid
    LEFT JOIN rows AS original ON original.rowid = shared.number
    ORDER BY kept.rowid"""


class RowIndex:
    """Finds the rows of this and earlier runs by location and by content, in constant memory.

    A file is found under any name of its root: photos, photos/ or /home/me/photos. Relative roots start from the folder
    `base`. With `retry_errors` failures of earlier runs are ignored. Raises UserError for an output that is not a file
    of rows.
    """

    def __init__(self, output: Path, *, base: str = "", retry_errors: bool = False) -> None:
        self._base = base
        self._real_root = lru_cache(maxsize=1024)(real_root)
        self._database = open_database(TABLE)
        with database_errors():
            for path in (output, *find_parts(output)):
                entries = self._read(path, is_part=path != output) if path.exists() else ()
                wanted = (entry for entry in entries if entry[3] is not None or not retry_errors)
                self._database.executemany(INSERT, wanted)
            self._database.execute("CREATE INDEX by_name ON rows (name)")
            self._database.execute("CREATE INDEX by_content ON rows (sha256) WHERE sha256 IS NOT NULL")

    def is_done(self, root: str, path: str) -> bool:
        """Whether this file has a row, under any name of its root."""
        found = self._database.execute("SELECT 1 FROM rows WHERE name = ?", (self._name(root, path),))
        return found.fetchone() is not None

    def find_caption(self, sha256: str) -> Row | None:
        """The first row of a captioned file with these bytes, if there is one."""
        query = "SELECT line FROM rows WHERE sha256 = ? ORDER BY rowid LIMIT 1"
        found = self._database.execute(query, (bytes.fromhex(sha256),)).fetchone()
        return None if found is None else json.loads(found[0])

    def add(self, row: Row, line: bytes) -> None:
        """Index a new row, which was written as `line`."""
        with database_errors():
            self._database.execute(INSERT, self._entry(row, line))

    def merged(self) -> Iterator[tuple[Row, bytes]]:
        """Yield one row for each file, and its line, sorted by location; duplicates get the first file's caption.

        Lines of unchanged rows are reused, because making a line takes as long as everything else.
        """
        self._database.execute(KEEP_ONE_A_FILE)
        self._database.execute(FIND_SHARED_CONTENTS)
        self._database.execute("CREATE INDEX shared_by_content ON shared (sha256)")
        for line, first_line in self._database.execute(IN_ORDER):
            row: Row = json.loads(line)
            if first_line is not None:
                row = duplicate_row(json.loads(first_line), root=row["root"], path=row["path"])
            elif row.get("duplicate_of") is not None:
                row["duplicate_of"] = None
            else:
                yield row, line.rstrip(b"\n") + b"\n"  # an editor may have removed the last newline
                continue
            yield row, to_line(row).encode()

    def close(self) -> None:
        """Delete the database."""
        self._database.close()

    def _name(self, root: str, path: str) -> bytes:
        """A hash of the file's location, the same for all names of its root."""
        return hash_location(storage.join(self._real_root(root, self._base), path))

    def _entry(self, row: Row, line: bytes) -> Entry:
        """A row's entry in the table. Root and path are bytes, which SQLite sorts as Python sorts the strings."""
        root, path = (row[key].encode("utf-8", "surrogatepass") for key in ("root", "path"))
        sha256 = None if "error" in row else bytes.fromhex(row["sha256"])
        return self._name(row["root"], row["path"]), root, path, sha256, line

    def _read(self, path: Path, *, is_part: bool) -> Iterator[Entry]:
        """The entries of a file's rows, without a part's last line if a kill cut it: its image is captioned again."""
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if is_part and not line.endswith(b"\n"):
                    break
                try:
                    row = json.loads(line)
                    entry = self._entry(row, line) if row["format_version"] == FORMAT_VERSION else None
                except (ValueError, LookupError, TypeError):
                    entry = None
                if entry is None:
                    raise UserError(
                        f"line {number} of {path} is not a row of this version: give another --output or delete it"
                    )
                yield entry


# ---- merging ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Counts of a merged file: all rows, failures by reason, and captioned rows that are duplicates or need review."""

    num_rows: int
    failures: Counter[str]
    num_duplicates: int
    num_review: int


def merge(output: Path, *, base: str = "") -> Summary:
    """Write all rows to `output`, one for each file, sorted by location; then remove the parts. Returns their counts.

    Relative roots start from the folder `base`. The result does not depend on which process captioned which file.
    Raises UserError for an output that is not a file of rows, and if another run is writing a part.
    """
    parts = find_parts(output)
    failures: Counter[str] = Counter()
    num_rows = num_duplicates = num_review = 0
    with ExitStack() as stack:
        for part in parts:
            stack.enter_context(open_part(part))
        index = stack.enter_context(closing(RowIndex(output, base=base)))
        with (
            database_errors(),
            writing(merging_path(output)),
            storage.replacing(output, partial=merging_path(output)) as file,
        ):
            for row, line in index.merged():
                file.write(line)
                num_rows += 1
                num_duplicates += row.get("duplicate_of") is not None
                num_review += row.get("review") is not None
                failures.update([row["error"]] if "error" in row else [])
        for part in parts:
            part.unlink()
    return Summary(num_rows=num_rows, failures=failures, num_duplicates=num_duplicates, num_review=num_review)
