"""The rows of captions.jsonl: their keys, appending them safely, what is done already, and the merge of all parts.

While a job runs, each process appends to a part of its own beside the output. At the end the main process merges the
parts and the rows of earlier runs into one sorted file. What decides a row's content is kept beside the output too.
"""

import errno
import fcntl
import glob
import io
import json
import os
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, NotRequired, TypedDict

from captioner import storage
from captioner.cli import UserError

FORMAT_VERSION = 2
TAIL_BYTES = 1 << 16  # read at once to find where a part's last whole row ends
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class Row(TypedDict):
    """One file's row. A failure has only the place, the model, `error` and `message`; a captioned picture all the rest.

    `root` is the folder or URL as given, `path` is relative to it with `/`; bytes that are no UTF-8 stand as `\\udcXX`.
    `caption` is the model's, `alt` the same as a sentence, or "" when the tool abstains. `captions`, the best first, is
    there only when several were asked for. `score` is the mean of `token_scores`, the log-probabilities (natural) of
    the caption's tokens and its end; `confidence` is a chance, None where the model has no calibration.
    `review` says why a person should look ("low confidence", "unlike training data", or both). `duplicate_of` is the
    location of the first file, in this order, with the same bytes, whose caption this one shares.
    `width` and `height` are the original's in pixels, upright; `sha256` is the file's; `model` names the weights.
    `error` is the kind of failure (captioner.images.Reason), `message` what was found.
    """

    root: str
    path: str
    format_version: int
    model: str
    caption: NotRequired[str]
    captions: NotRequired[list[str]]
    alt: NotRequired[str]
    score: NotRequired[float]
    token_scores: NotRequired[list[float]]
    confidence: NotRequired[float | None]
    review: NotRequired[str | None]
    duplicate_of: NotRequired[str | None]
    width: NotRequired[int]
    height: NotRequired[int]
    sha256: NotRequired[str]
    error: NotRequired[str]
    message: NotRequired[str]


def to_line(row: Row) -> str:
    """A row as a line of pure ASCII, so that undecodable file names survive."""
    return json.dumps(row) + "\n"


def duplicate_row(first: Row, *, root: str, path: str) -> Row:
    """The row of a file with the same bytes as that of the captioned row `first`."""
    return {**first, "root": root, "path": path, "duplicate_of": storage.join(first["root"], first["path"])}


# ---- files ------------------------------------------------------------------------------------------------


def part_path(output: Path, rank: int) -> Path:
    """The file that process `rank` appends to while the job runs."""
    return output.with_name(f"{output.name}.part-{rank}")


def find_parts(output: Path) -> list[Path]:
    """The part files that processes of an unfinished run left beside `output`."""
    return sorted(output.parent.glob(f"{glob.escape(output.name)}.part-*"))


def settings_path(output: Path) -> Path:
    """The file that tells with which settings the rows were made."""
    return output.with_name(f"{output.name}.settings.json")


def merging_path(output: Path) -> Path:
    """The file that becomes the output when it is whole."""
    return output.with_name(f"{output.name}.partial")


def own_files(output: Path, *, num_processes: int) -> list[Path]:
    """All that a run of `num_processes` keeps on disk, there or not, and the parts of an earlier run."""
    parts = {*find_parts(output), *(part_path(output, rank) for rank in range(num_processes))}
    return [output, settings_path(output), merging_path(output), *sorted(parts)]


def check_settings(output: Path, settings: Mapping[str, Any]) -> None:
    """Raise UserError when rows are there that were made with other settings."""
    if not any(path.exists() and path.stat().st_size for path in (output, *find_parts(output))):
        return
    remedy = f"give another --output, or delete {output} and its parts"
    found = storage.read_json(
        str(settings_path(output)), remedy=f"only it tells how the rows in {output} were made; {remedy}"
    )
    earlier = found if isinstance(found, dict) else {}
    now = json.loads(json.dumps(settings))  # as it would be read
    changes = [
        f"{key} was {_shown(earlier, key)} and is {_shown(now, key)}"
        for key in sorted(earlier.keys() | now.keys())
        if _shown(earlier, key) != _shown(now, key)
    ]
    if changes:
        raise UserError(f"the rows in {output} were made with other settings ({'; '.join(changes)}): {remedy}")


def write_settings(output: Path, settings: Mapping[str, Any]) -> None:
    """Keep the settings beside the output; call it before the first part is opened."""
    storage.write_atomic(str(settings_path(output)), json.dumps(settings, indent=1) + "\n")


def _shown(settings: Mapping[str, Any], key: str) -> str:
    return json.dumps(settings[key]) if key in settings else "not set"


# ---- appending --------------------------------------------------------------------------------------------


class RowWriter:
    """Appends rows to a process's part; after `write` returns, its rows survive a kill.

    It holds the part's lock, where the file system has locks. Raises UserError when another run does.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = _open_part(path)
        self._end = _cut_torn_row(self._file)

    def write(self, rows: Iterable[Row]) -> list[int]:
        """Append the rows, hand them to the operating system at once, and tell the offset of each in bytes."""
        lines = [to_line(row).encode("ascii") for row in rows]
        *offsets, self._end = accumulate(map(len, lines), initial=self._end)
        left = memoryview(b"".join(lines))
        while left:  # a nearly full disk takes a part first, and then says so
            left = left[self._file.write(left) :]
        return offsets

    def close(self) -> None:
        """Flush to disk, give the lock back and close; a part without rows is removed."""
        os.fsync(self._file.fileno())
        if not self._end:
            self.path.unlink(missing_ok=True)
        with suppress(OSError):
            fcntl.flock(self._file, fcntl.LOCK_UN)  # workers forked meanwhile hold it as well, and may outlive us
        self._file.close()


def _open_part(path: Path) -> io.FileIO:
    file = io.FileIO(path, "a+")
    if not _take_lock(file):
        file.close()
        raise UserError(f"another run is writing to {path}: wait for it, stop it, or give another --output")
    return file


def _take_lock(file: io.FileIO) -> bool:
    """Whether the file is ours now: no other holds it, nor has merged and removed it since it was opened here."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return os.fstat(file.fileno()).st_nlink > 0


def _cut_torn_row(file: io.FileIO) -> int:
    """Cut a last line that a killed process left without its end; the size then, in bytes."""
    size = end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - TAIL_BYTES)
        length = os.pread(file.fileno(), end - start, start).rfind(b"\n") + 1
        end = start + length
        if length:
            break
    if end < size:
        file.truncate(end)
    return end


# ---- reading ----------------------------------------------------------------------------------------------


def read_rows(output: Path) -> Iterator[Row]:
    """The rows of a merged file, one by one, in its order."""
    with output.open("rb") as file:
        yield from map(json.loads, file)


Entry = tuple[bytes, bytes, bytes | None]  # root, path, sha256 (None: a failure)


def _entry(row: Row) -> Entry:
    """What a row is found by; bytes compare as Python's strings do."""
    root, path = (row[key].encode("utf-8", "surrogatepass") for key in ("root", "path"))
    return root, path, None if "error" in row else bytes.fromhex(row["sha256"])


def _parse(line: bytes) -> Entry | None:
    try:
        row = json.loads(line)
        return _entry(row) if row["format_version"] == FORMAT_VERSION else None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def _read_entries(files: Sequence[Path], *, whole: Path) -> Iterator[tuple[bytes, bytes, bytes | None, int, int]]:
    """Each row's entry, its file's number and its offset in bytes. Only `whole` cannot end in a torn row."""
    for number, path in enumerate(files):
        offset = 0
        with path.open("rb") as file:
            for line_number, line in enumerate(file, start=1):
                if path != whole and not line.endswith(b"\n"):
                    break  # torn by a kill: that file is captioned again
                entry = _parse(line)
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

INSERT = "INSERT INTO rows VALUES (?, ?, ?, ?, ?)"


def _open_database() -> sqlite3.Connection:
    """A private database that lives in memory while it is small, and else in a temporary file without a name."""
    database = sqlite3.connect("")
    database.execute("PRAGMA journal_mode = OFF")
    database.execute("CREATE TABLE rows (root BLOB, path BLOB, sha256 BLOB, file INTEGER, offset INTEGER)")
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

    Raises UserError for an output that is no file of rows. With `retry_errors` failures of earlier runs do not count.
    """

    def __init__(self, output: Path, *, retry_errors: bool = False) -> None:
        files = [path for path in (output, *find_parts(output)) if path.exists()]
        self._files = _RowFiles(files)
        self._database = _open_database()
        entries = _read_entries(files, whole=output)
        with _room_for_database():
            self._database.executemany(INSERT, (entry for entry in entries if entry[2] is not None or not retry_errors))
            self._database.execute("CREATE INDEX by_place ON rows (root, path)")
            self._database.execute("CREATE INDEX by_content ON rows (sha256) WHERE sha256 IS NOT NULL")

    def is_done(self, root: str, path: str) -> bool:
        """Whether this place has a row."""
        place = [name.encode("utf-8", "surrogatepass") for name in (root, path)]
        found = self._database.execute("SELECT 1 FROM rows WHERE root = ? AND path = ?", place)
        return found.fetchone() is not None

    def find_caption(self, sha256: str) -> Row | None:
        """The first known row of a captioned file with these bytes."""
        query = "SELECT file, offset FROM rows WHERE sha256 = ? ORDER BY rowid LIMIT 1"
        found = self._database.execute(query, (bytes.fromhex(sha256),)).fetchone()
        return None if found is None else json.loads(self._files.read(*found))

    def add(self, row: Row, path: Path, offset: int) -> None:
        """Take in a row that was written to the part `path` at `offset`."""
        with _room_for_database():
            self._database.execute(INSERT, (*_entry(row), self._files.number(path), offset))

    def close(self) -> None:
        """Close all files and drop the database."""
        self._files.close()
        self._database.close()


# ---- merging ----------------------------------------------------------------------------------------------

# Of a place's rows a success wins, then the latest: the other columns are those of the row with the greatest rank.
KEEP_ONE_A_PLACE = """
    CREATE TABLE kept AS
    SELECT sha256, file, offset, max(rowid + iif(sha256 IS NULL, 0, 1 << 60)) AS rank
    FROM rows GROUP BY root, path ORDER BY root, path"""
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


def merge(output: Path) -> Summary:
    """Write all rows, sorted by place and each place once, to `output`; then remove the parts.

    Files with the same bytes get the caption of the first of them, so the result does not tell who captioned which.
    Raises UserError for an output that is no file of rows, and while another run is writing a part.
    """
    parts = find_parts(output)
    with ExitStack() as stack:
        for part in parts:
            stack.enter_context(_open_part(part))
        with _room_for_database():
            summary = _write_merged(_merged_rows(output, parts), output)
        for part in parts:
            part.unlink()
    return summary


def _merged_rows(output: Path, parts: Sequence[Path]) -> Iterator[tuple[Row, bytes]]:
    """The rows and their lines. Most lines are taken as they are: making one takes as long as all the rest."""
    files = [path for path in (output, *parts) if path.exists()]
    with closing(_open_database()) as database, closing(_RowFiles(files)) as lines:
        database.executemany(INSERT, _read_entries(files, whole=output))
        database.execute(KEEP_ONE_A_PLACE)
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
    with merging_path(output).open("wb") as file:
        for row, line in rows:
            file.write(line)
            num_rows += 1
            num_duplicates += row.get("duplicate_of") is not None
            num_review += row.get("review") is not None
            if "error" in row:
                failures[row["error"]] += 1
        file.flush()
        os.fsync(file.fileno())
    merging_path(output).replace(output)
    _sync_folder(output.parent)
    return Summary(num_rows=num_rows, failures=failures, num_duplicates=num_duplicates, num_review=num_review)


def _sync_folder(folder: Path) -> None:
    """Make the rename outlive a power cut before the parts go, where the system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
