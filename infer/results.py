"""The rows of captions.jsonl: their keys, the part files that processes append to, and the settings behind the rows.

While a job runs, each process appends to its own part file beside the output. The settings that determine a row's
content are in a file beside the output too. `row_index` finds existing rows and merges the parts.
"""

import glob
import io
import json
import mmap
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from captioner.errors import UserError
from captioner.files import locks, storage

FORMAT_VERSION = 2
WORKING_FOLDER = "working_folder"  # the base of relative roots


class Row(TypedDict):
    """One file's row. A failure has root, path, model, `error` and `message`; a captioned image all other keys.

    `root` is the folder or URL as given, `path` is relative to it with `/`; bytes that are not UTF-8 are `\\udcXX`.
    `caption` is the model's, `alt` the same as a sentence, or "" when the tool abstains. `captions`, the best first, is
    there only when several were asked for. `score` is the mean of `token_scores`, the log-probabilities (natural) of
    the caption's tokens and its end; `confidence` is a probability, None if the model is not calibrated.
    `review` says why a person should look ("low confidence", "unlike training data", or both). `duplicate_of` is the
    location of the first file, in this order, with the same bytes, whose caption this one has.
    `width` and `height` are the original's in pixels, upright; `sha256` is the file's; `model` names the weights.
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
    width: NotRequired[int]
    height: NotRequired[int]
    sha256: NotRequired[str]
    error: NotRequired[str]
    message: NotRequired[str]


def to_line(row: Row) -> str:
    """A row as a line of pure ASCII, so that undecodable file names survive."""
    return json.dumps(row, allow_nan=False) + "\n"


def duplicate_row(first: Row, *, root: str, path: str) -> Row:
    """The row of a file with the same bytes as that of the captioned row `first`."""
    return {**first, "root": root, "path": path, "duplicate_of": storage.join(first["root"], first["path"])}


# ---- files ------------------------------------------------------------------------------------------------


def find_output(output: Path) -> Path:
    """The path of --output with symbolic links resolved, so that all other files are beside it.

    Raises UserError if it is not a regular file, and so cannot be replaced by the merged rows, and OSError.
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
    """The part files that processes of an unfinished run left beside `output`."""
    return sorted(output.parent.glob(f"{glob.escape(output.name)}.part-*"))


def settings_path(output: Path) -> Path:
    """The file with the settings that the rows were made with."""
    return output.with_name(f"{output.name}.settings.json")


def merging_path(output: Path) -> Path:
    """The temporary name of the merged rows."""
    return output.with_name(f"{output.name}.partial")


def process_path(output: Path, rank: int) -> Path:
    """The heartbeat file of process `rank`, in a job of several processes."""
    return output.with_name(f"{output.name}.process-{rank}")


def find_process_files(output: Path) -> list[Path]:
    """The heartbeat files of all processes, killed ones included; rank 0's is last."""
    return sorted(output.parent.glob(f"{glob.escape(output.name)}.process-*"), reverse=True)


def own_files(output: Path, *, num_processes: int) -> list[Path]:
    """All files that a run of `num_processes` writes, existing or not, and those that an earlier run left."""
    new = [path(output, rank) for path in (part_path, process_path) for rank in range(num_processes)]
    return [output, settings_path(output), merging_path(output), *find_parts(output), *find_process_files(output), *new]


def check_settings(output: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings to write beside the output. Raises UserError if existing rows were made with other settings.

    A working folder is None where all names are absolute, which fits any; an earlier one is kept.
    """
    if not any(path.exists() and path.stat().st_size for path in (output, *find_parts(output))):
        return dict(settings)
    remedy = f"give another --output, or delete {output} and its parts"
    earlier = storage.read_json(
        str(settings_path(output)), remedy=f"it has the settings of the rows in {output}; {remedy}"
    )
    now = json.loads(json.dumps(settings))  # as it would be read
    for one, other in ((now, earlier), (earlier, now)):
        one[WORKING_FOLDER] = one.get(WORKING_FOLDER) or other.get(WORKING_FOLDER)
    changes = [
        f"{key} was {json.dumps(earlier.get(key))} and is {json.dumps(now.get(key))}"
        for key in sorted(earlier.keys() | now.keys())
        if earlier.get(key) != now.get(key)
    ]
    if changes:
        raise UserError(f"the rows in {output} were made with other settings ({'; '.join(changes)}): {remedy}")
    return now


def write_settings(output: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings beside the output; call it before the first row is written."""
    storage.write_atomic(str(settings_path(output)), json.dumps(settings, indent=1, allow_nan=False) + "\n")


# ---- appending --------------------------------------------------------------------------------------------


class RowWriter:
    """Appends rows to a process's part file; rows survive a kill once `write` has returned.

    It locks the part, where the file system has locks. Raises UserError while another run has locked it.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = open_part(path)
        _cut_torn_row(self._file)

    def write(self, rows: Iterable[Row]) -> None:
        """Append the rows without buffering."""
        left = memoryview("".join(map(to_line, rows)).encode())
        with writing(self.path):
            while left:  # a nearly full disk may write a part before it fails
                left = left[self._file.write(left) :]

    def close(self) -> None:
        """Flush to disk, close and unlock; a part without rows is removed."""
        with writing(self.path):
            os.fsync(self._file.fileno())
        if not self._file.tell():
            self.path.unlink(missing_ok=True)
        self._file.close()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError in writing the open file of rows into a UserError that names the file."""
    try:
        yield
    except OSError as error:
        if error.filename:  # of another file
            raise
        raise UserError(
            f"cannot write {path} ({error.strerror or error}): make room for it; the same command resumes from there"
        ) from error


def open_part(path: Path) -> io.FileIO:
    """A part file, locked where the file system has locks. Raises UserError while another process has it locked."""
    try:
        return locks.open_locked(path)
    except BlockingIOError as error:
        raise UserError(f"another run is writing to {path}: wait for it, stop it, or give another --output") from error
    except OSError as error:
        if error.errno not in locks.UNSUPPORTED:
            raise
        return io.FileIO(path, "r+")


def _cut_torn_row(file: io.FileIO) -> None:
    """Remove an incomplete last line, left by a killed process, and seek to the end."""
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
