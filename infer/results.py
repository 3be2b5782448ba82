"""The rows of captions.jsonl: their keys, appending them safely, reading them back, merging processes' parts."""

import glob
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NotRequired, TextIO, TypedDict

from captioner.cli import UserError
from captioner.storage import write_atomic

FORMAT_VERSION = 1


class Row(TypedDict):
    """One file's row. A captioned picture has all keys but the last two; a failure has only those and the place.

    `root` is the folder as given, `path` is relative to it with `/`; bytes that are no UTF-8 stand as `\\udcXX`.
    `score` is the mean of `token_scores`, the log-probabilities (natural) of the caption's tokens and its end.
    `width` and `height` are the original's in pixels, upright; `sha256` is the file's; `model` names the weights.
    `error` is the kind of failure (missing, empty, undecodable, truncated, too large), `message` what was found.
    """

    root: str
    path: str
    format_version: int
    model: str
    caption: NotRequired[str]
    score: NotRequired[float]
    token_scores: NotRequired[list[float]]
    width: NotRequired[int]
    height: NotRequired[int]
    sha256: NotRequired[str]
    error: NotRequired[str]
    message: NotRequired[str]


def part_path(output: Path, rank: int) -> Path:
    """The file that process `rank` appends to while the job runs."""
    return output.with_name(f"{output.name}.part-{rank}")


def find_parts(output: Path) -> list[Path]:
    """The part files that processes of an unfinished run left beside `output`."""
    return sorted(output.parent.glob(f"{glob.escape(output.name)}.part-*"))


class RowWriter:
    """Appends rows to a process's part file; after `write` returns, its rows survive a kill."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _cut_torn_row(path)
        self._file: TextIO = path.open("a", encoding="ascii", newline="\n")

    def write(self, rows: Iterable[Row]) -> None:
        """Append the rows and hand them to the operating system."""
        self._file.write("".join(to_line(row) for row in rows))
        self._file.flush()

    def close(self) -> None:
        """Flush to disk and close."""
        os.fsync(self._file.fileno())
        self._file.close()


def to_line(row: Row) -> str:
    """A row as a line of pure ASCII, so that undecodable file names survive."""
    return json.dumps(row) + "\n"


def _cut_torn_row(path: Path) -> None:
    """Cut a last line that a killed process left without its end."""
    if path.exists():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with path.open("r+b") as file:
                file.truncate(whole)


def read_rows(output: Path) -> list[Row]:
    """All rows of an earlier run: those of the finished file and of the parts. Raises UserError for a foreign file."""
    files = [path for path in (output, *find_parts(output)) if path.exists()]
    return [row for path in files for row in _read_file(path, may_be_torn=path != output)]


def _read_file(path: Path, *, may_be_torn: bool) -> Iterator[Row]:
    for number, line in enumerate(
        path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True), start=1
    ):
        if may_be_torn and not line.endswith("\n"):
            return  # torn by a kill: that file is captioned again
        row = _parse(line)
        if row is None or row.get("format_version") != FORMAT_VERSION:
            raise UserError(f"line {number} of {path} is no row of this version: give another --output, or delete it")
        yield row


def _parse(line: str) -> Any:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and {"root", "path"} <= row.keys() else None


def merge(output: Path) -> list[Row]:
    """Write all rows, sorted by place and each place once, to `output`; then remove the parts."""
    by_place = {(row["root"], row["path"]): row for row in read_rows(output)}
    rows = [by_place[place] for place in sorted(by_place)]
    write_atomic(str(output), "".join(to_line(row) for row in rows))
    for part in find_parts(output):
        part.unlink()
    return rows
