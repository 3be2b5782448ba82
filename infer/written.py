"""What this program last wrote into files that people change too: text sidecars and tables.

The file `captions.jsonl.written` beside the output has one JSON line for each of them. A file that still has the noted
content is ours and may be replaced; a changed file is a person's.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from captioner.errors import UserError
from captioner.files import storage
from infer.results import RowWriter, written_path
from infer.row_index import database_errors, hash_location, open_database

KEYS = ("text", "image", "model", "before")
MAX_STALE_LINES = 1000  # with more, and more of them than others, the file is written again without them


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """The last text in a file, or a table's checksum; the name of the image beside it, and the model of the text.

    An entry is set before its file is written: if a kill came between, the file still has the text `before`.
    """

    text: str
    image: str = ""
    model: str = ""
    before: str = ""


class Written:
    """The entries of an output, by file; close it to save them. Without an output they are not kept.

    Files are known by their paths relative to the output's folder, so that all may be moved together. Raises UserError
    if the entries cannot be read.
    """

    def __init__(self, output: Path | None = None) -> None:
        self._prefix = "/" if output is None else os.path.join(output.absolute().parent, "")  # noqa: PTH118
        self._path = None if output is None else written_path(output)
        self._writer: RowWriter | None = None
        self._database = open_database("CREATE TABLE entries (hash BLOB PRIMARY KEY, line BLOB) WITHOUT ROWID")
        self._num_lines = 0
        if self._path is not None and self._path.exists():
            self._read(self._path)

    def get(self, file: Path) -> Entry | None:
        """What was written into a file last; None if nothing was."""
        query = "SELECT line FROM entries WHERE hash = ?"
        found = self._database.execute(query, (hash_location(self._relative(file)),)).fetchone()
        if found is None:
            return None
        line = json.loads(found[0])
        return Entry(**{key: line[key] for key in KEYS})

    def set(self, file: Path, entry: Entry) -> None:
        """Note what was written into a file. Raises UserError, such as if the disk is full."""
        if self.get(file) == entry:
            return
        line: Any = {"path": self._relative(file), **asdict(entry)}
        self._insert(line["path"], json.dumps(line).encode())
        if self._path is not None:
            self._writer = self._writer or RowWriter(self._path)
            self._writer.write([line])
            self._num_lines += 1

    def close(self) -> None:
        """Save the entries; if most lines of the file are stale, without these."""
        if self._writer is not None:
            (num_entries,) = self._database.execute("SELECT count(*) FROM entries").fetchone()
            if self._num_lines > 2 * num_entries + MAX_STALE_LINES:
                with storage.replacing(self._writer.path) as file:  # which this process has locked
                    file.writelines(line + b"\n" for (line,) in self._database.execute("SELECT line FROM entries"))
            self._writer.close()
        self._database.close()

    def _relative(self, file: Path) -> str:
        path = str(file)
        return path.removeprefix(self._prefix) if path.startswith(self._prefix) else os.path.relpath(path, self._prefix)

    def _read(self, path: Path) -> None:
        """Read the file. Raises UserError."""
        with path.open("rb") as file:
            for content in file:
                if not content.endswith(b"\n"):  # a kill cut it
                    break
                self._num_lines += 1
                try:
                    line = json.loads(content)
                    if not all(isinstance(line[key], str) for key in ("path", *KEYS)):
                        raise TypeError("not text")
                except (ValueError, LookupError, TypeError, RecursionError) as error:
                    raise UserError(
                        f"line {self._num_lines} of {path} is damaged: delete that line; its file then counts as a "
                        "person's"
                    ) from error
                self._insert(line["path"], content.rstrip())

    def _insert(self, path: str, line: bytes) -> None:
        with database_errors():
            self._database.execute("INSERT OR REPLACE INTO entries VALUES (?, ?)", (hash_location(path), line))
