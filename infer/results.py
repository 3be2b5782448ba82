"""The rows of captions.jsonl: their keys, appending them safely to parts, and the settings that decided them.

While a job runs, each process appends to a part of its own beside the output. What decides a row's content is kept
beside the output too. `row_index` finds rows again, and merges the parts.
"""

import glob
import io
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import accumulate
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from captioner.errors import UserError
from captioner.files import locks, storage

FORMAT_VERSION = 2
TAIL_BYTES = 1 << 16  # read at once to find where a part's last whole row ends
WORKING_FOLDER = "working_folder"  # where relative roots start


class Row(TypedDict):
    """One file's row. A failure has only the place, the model, `error` and `message`; a captioned picture all the rest.

    `root` is the folder or URL as given, `path` is relative to it with `/`; bytes that are no UTF-8 stand as `\\udcXX`.
    `caption` is the model's, `alt` the same as a sentence, or "" when the tool abstains. `captions`, the best first, is
    there only when several were asked for. `score` is the mean of `token_scores`, the log-probabilities (natural) of
    the caption's tokens and its end; `confidence` is a chance, None where the model has no calibration.
    `review` says why a person should look ("low confidence", "unlike training data", or both). `duplicate_of` is the
    location of the first file, in this order, with the same bytes, whose caption this one shares.
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
    """The file of rows that --output names, existing or not. Links are followed, so all other files are beside it.

    Raises UserError if it is not a regular file, and so cannot be replaced by the merged rows.
    """
    if ":/" in str(output):
        raise UserError(f"--output {output} is a URL: give a file on this machine")
    try:
        found = output.stat()
    except FileNotFoundError:
        return _follow(output)
    except OSError as error:
        raise UserError(f"cannot use --output {output} ({error.strerror}): give the name of a JSONL file") from error
    if stat.S_ISDIR(found.st_mode):
        raise UserError(f"--output {output} is a folder: give the name of a JSONL file")
    if not stat.S_ISREG(found.st_mode) or any(os.path.samestat(found, stream) for stream in _standard_streams()):
        raise UserError(
            f"--output {output} is a device, a pipe, or this command's own input or output: rows are merged in a file, "
            "give the name of one"
        )
    return _follow(output)


def _follow(path: Path) -> Path:
    return path.resolve() if path.is_symlink() else path


def _standard_streams() -> Iterator[os.stat_result]:
    for descriptor in range(3):
        with suppress(OSError):  # it is closed
            yield os.fstat(descriptor)


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


def process_path(output: Path, rank: int) -> Path:
    """The heartbeat file of process `rank`, in a job of several processes."""
    return output.with_name(f"{output.name}.process-{rank}")


def find_process_files(output: Path) -> list[Path]:
    """The files of all processes, also of those that were killed; rank 0's is the last."""
    return sorted(output.parent.glob(f"{glob.escape(output.name)}.process-*"), reverse=True)


def own_files(output: Path, *, num_processes: int) -> list[Path]:
    """All that a run of `num_processes` keeps on disk, there or not, and what an earlier run left."""
    parts = {*find_parts(output), *(part_path(output, rank) for rank in range(num_processes))}
    processes = {*find_process_files(output), *(process_path(output, rank) for rank in range(num_processes))}
    return [output, settings_path(output), merging_path(output), *sorted(parts), *sorted(processes)]


def check_settings(output: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings to keep beside the output. Raises UserError when rows are there that were made with others.

    A working folder is None where all names are absolute, which fits any; an earlier one is kept.
    """
    if not any(path.exists() and path.stat().st_size for path in (output, *find_parts(output))):
        return dict(settings)
    remedy = f"give another --output, or delete {output} and its parts"
    found = storage.read_json(
        str(settings_path(output)), remedy=f"only it tells how the rows in {output} were made; {remedy}"
    )
    earlier = found if isinstance(found, dict) else {}
    now = json.loads(json.dumps(settings))  # as it would be read
    for one, other in ((now, earlier), (earlier, now)):
        if one.get(WORKING_FOLDER, "") is None and WORKING_FOLDER in other:
            one[WORKING_FOLDER] = other[WORKING_FOLDER]
    changes = [
        f"{key} was {_shown(earlier, key)} and is {_shown(now, key)}"
        for key in sorted(earlier.keys() | now.keys())
        if _shown(earlier, key) != _shown(now, key)
    ]
    if changes:
        raise UserError(f"the rows in {output} were made with other settings ({'; '.join(changes)}): {remedy}")
    return now


def write_settings(output: Path, settings: Mapping[str, Any]) -> None:
    """Keep the settings beside the output; call it before the first part is opened."""
    storage.write_atomic(str(settings_path(output)), json.dumps(settings, indent=1, allow_nan=False) + "\n")


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
        self._file = open_part(path)
        self._end = _cut_torn_row(self._file)

    def write(self, rows: Iterable[Row]) -> list[int]:
        """Append the rows, hand them to the operating system at once, and tell the offset of each in bytes."""
        lines = [to_line(row).encode("ascii") for row in rows]
        *offsets, self._end = accumulate(map(len, lines), initial=self._end)
        left = memoryview(b"".join(lines))
        with writing(self.path):
            while left:  # a nearly full disk may write only some of it before it fails
                left = left[self._file.write(left) :]
        return offsets

    def close(self) -> None:
        """Flush to disk, close and unlock; a part without rows is removed."""
        with writing(self.path):
            os.fsync(self._file.fileno())
        if not self._end:
            self.path.unlink(missing_ok=True)
        self._file.close()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """While entered, an OSError in writing the open file of rows becomes a UserError that names the file."""
    try:
        yield
    except OSError as error:
        if error.filename:  # another file's
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
    return file.seek(end)


# ---- reading ----------------------------------------------------------------------------------------------


def read_rows(output: Path) -> Iterator[Row]:
    """The rows of a merged file, one by one, in its order."""
    with output.open("rb") as file:
        yield from map(json.loads, file)
