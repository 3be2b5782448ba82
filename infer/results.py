"""The rows of captions.jsonl: their keys, the part files that processes append to, and the file with their settings.

While a job runs, each process appends to its own part file beside the output. The settings that determine a row's
content are in another file beside it. `row_index` finds existing rows and merges the parts.
"""

import glob
import io
import json
import mmap
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from captioner.errors import UserError
from captioner.files import locks, storage

FORMAT_VERSION = 2
WORKING_FOLDER = "working_folder"  # the base of relative roots
STARTED = "started"  # a time before the first run, in seconds since 1970: all rows are younger
NOT_UTF8 = re.compile("[\ud800-\udfff]")  # how Python writes such bytes of names
PARTIAL_SUFFIX = ".captioner-partial"  # of images and sidecars that are being written


class Row(TypedDict):
    """One file's row. All have the first four keys; a failure also has `error` and `message`, a caption the others.

    `root` is the folder or URL as given, `path` is relative to it with `/`; bytes that are not UTF-8 are `\\udcXX`.
    `caption` is the model's, `alt` the same as a sentence, or "" if its confidence is too low. `captions`, best first,
    exists only if several were requested. `score` is the mean of `token_scores`, the log-probabilities (natural) of
    the caption's tokens and its end; `confidence` is a probability, None if the model is not calibrated.
    `review` says why a person should look ("low confidence", "unlike training data", or both). `duplicate_of` is the
    location of the first file, in this order, with the same bytes, from which the caption is copied.
    `attention`, only with --attention, is where the words of `caption` looked: the `grid` of the model's view (rows,
    columns), the `area` of the original that the view shows (left, top, right, bottom, as fractions of its sides), the
    `words`, which joined are the caption, and for each word `weights`: see `Attention.to_json`.
    `width` and `height` are the upright original's in pixels; `sha256` is the file's; `model` identifies the weights.
    `error` is the kind of failure (captioner.images.loading.Reason), `message` what was found.
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
    attention: NotRequired[dict[str, Any]]
    width: NotRequired[int]
    height: NotRequired[int]
    sha256: NotRequired[str]
    error: NotRequired[str]
    message: NotRequired[str]


def as_utf8(text: str) -> str:
    """The text with the replacement character for each byte of a name that is not UTF-8."""
    return NOT_UTF8.sub("\N{REPLACEMENT CHARACTER}", text)


def to_line(row: Row) -> str:
    """A row as a line of JSON. It is ASCII, so that file names that are not valid UTF-8 survive."""
    return json.dumps(row, allow_nan=False) + "\n"


def duplicate_row(first: Row, *, root: str, path: str) -> Row:
    """The row of a file with the same bytes as the file of row `first`, which has a caption."""
    return {**first, "root": root, "path": path, "duplicate_of": storage.join(first["root"], first["path"])}


# ---- files ------------------------------------------------------------------------------------------------


def resolve_output(output: Path) -> Path:
    """The path of --output without symbolic links, so that the files of the run are beside the real file.

    Raises UserError if it exists and is not a regular file, which merging could not replace, and OSError.
    """
    resolved = Path(os.path.realpath(output))
    try:
        is_file = stat.S_ISREG(resolved.stat().st_mode) and output.parent != Path("/dev")  # /dev/stdout may be a file
    except FileNotFoundError:
        return resolved
    if not is_file:
        raise UserError(f"--output {output} is a folder, a device or a pipe: give the name of a JSONL file")
    return resolved


def part_path(output: Path, rank: int) -> Path:
    """The file that process `rank` appends to while the job runs."""
    return output.with_name(f"{output.name}.part-{rank}")


def find_parts(output: Path) -> list[Path]:
    """The existing part files, which the processes of an unfinished run write or left."""
    return sorted(output.parent.glob(f"{glob.escape(output.name)}.part-*"))


def settings_path(output: Path) -> Path:
    """The file with the settings that the rows were made with."""
    return output.with_name(f"{output.name}.settings.json")


def merging_path(output: Path) -> Path:
    """The temporary name of the merged rows."""
    return output.with_name(f"{output.name}.partial")


def written_path(output: Path) -> Path:
    """The file that says what was written into text sidecars and tables."""
    return output.with_name(f"{output.name}.written")


def embedding_folder(output: Path) -> Path:
    """The folder from which descriptions are written into images."""
    return output.with_name(f"{output.name}.embedding")


def process_path(output: Path, rank: int) -> Path:
    """The heartbeat file of process `rank`, in a job of several processes."""
    return output.with_name(f"{output.name}.process-{rank}")


def find_process_files(output: Path) -> list[Path]:
    """The existing heartbeat files, including those of killed processes; rank 0's is last."""
    return sorted(output.parent.glob(f"{glob.escape(output.name)}.process-*"), reverse=True)


def own_files(output: Path, *, num_processes: int) -> list[Path]:
    """All files that a run of `num_processes` writes, and those that an earlier run left; not all exist."""
    own = [path(output, rank) for path in (part_path, process_path) for rank in range(num_processes)]
    names = (settings_path, merging_path, written_path, embedding_folder)
    return [output, *(name(output) for name in names), *find_parts(output), *find_process_files(output), *own]


def check_settings(output: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings to write beside the output. Raises UserError if existing rows were made with other settings.

    A working folder of None (all names are absolute) is compatible with any; if one run has a folder, it is kept. The
    time before the first run is kept too, 0 if it is not known.
    """
    if not any(path.exists() and path.stat().st_size for path in (output, *find_parts(output))):
        return dict(settings)
    remedy = f"give another --output, or delete {output} and its parts"
    earlier = storage.read_json_object(
        str(settings_path(output)), remedy=f"it has the settings of the rows in {output}: give another --output"
    )
    now = json.loads(json.dumps(settings))  # what reading it back would give
    for one, other in ((now, earlier), (earlier, now)):
        one[WORKING_FOLDER] = one.get(WORKING_FOLDER) or other.get(WORKING_FOLDER)
    if STARTED in now:
        now[STARTED] = earlier[STARTED] = earlier.get(STARTED, 0.0)
    changes = [
        f"{key} was {json.dumps(earlier.get(key))} and is {json.dumps(now.get(key))}"
        for key in sorted(earlier.keys() | now.keys())
        if earlier.get(key) != now.get(key)
    ]
    if changes:
        raise UserError(f"the rows in {output} were made with other settings ({'; '.join(changes)}): {remedy}")
    return now


def write_settings(output: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings beside the output; to be called before the first row is written."""
    storage.write_atomic(str(settings_path(output)), json.dumps(settings, indent=1, allow_nan=False) + "\n")


# ---- appending --------------------------------------------------------------------------------------------


class RowWriter:
    """Appends rows to a process's part file; once `write` has returned, they survive a kill of the process.

    Locks the part if the file system supports locks. Raises UserError if another run has locked it.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = open_part(path)
        _cut_torn_row(self._file)

    def write(self, rows: Iterable[Row]) -> list[bytes]:
        """Append the rows without buffering; returns their lines."""
        lines = [to_line(row).encode() for row in rows]
        with writing(self.path):
            write_all(self._file, b"".join(lines))
        return lines

    def close(self) -> None:
        """Flush the part to disk, close and unlock it; an empty part is removed."""
        with writing(self.path):
            os.fsync(self._file.fileno())
        if not self._file.tell():
            self.path.unlink(missing_ok=True)
        self._file.close()


def write_all(file: io.FileIO, data: bytes) -> None:
    """Write all of `data`. Raises OSError."""
    left = memoryview(data)
    while left:  # when the disk is nearly full, a write may be partial before the next one fails
        left = left[file.write(left) :]


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A block in which an OSError in writing `path`, an open file of rows, is raised as a UserError."""
    try:
        yield
    except OSError as error:
        if error.filename:  # not of a write to the open file
            raise
        raise UserError(
            f"cannot write {path} ({error.strerror or error}): make room for it; the same command resumes from there"
        ) from error


def open_part(path: Path) -> io.FileIO:
    """A part file, locked if the file system supports locks. Raises UserError if another process has locked it."""
    try:
        return locks.open_locked(path)
    except BlockingIOError as error:
        raise UserError(f"another run is writing to {path}: wait for it, stop it, or give another --output") from error
    except OSError as error:
        if error.errno not in locks.UNSUPPORTED:
            raise
        return io.FileIO(path, "r+")


def _cut_torn_row(file: io.FileIO) -> None:
    """Remove an incomplete last line, which a killed process left, and seek to the end."""
    if file.seek(0, os.SEEK_END):
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            end = content.rfind(b"\n") + 1
        file.truncate(end)
        file.seek(end)


# ---- reading ----------------------------------------------------------------------------------------------


def read_rows(output: Path) -> Iterator[Row]:
    """Yields the rows of a merged file, in its order."""
    with output.open("rb") as file:
        yield from map(json.loads, file)
