"""Captions files as they arrive in watched folders, until it is stopped.

The folders are listed again and again. A new file, or one that was replaced, is captioned once its size and time of
modification have not changed for STILL_SECONDS: until then it may be growing. The model, the index of rows and the
table of seen files stay open between the listings.
"""

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from types import FrameType, TracebackType

from captioner import cli
from captioner.describe import Captioner
from captioner.errors import EXIT_PREEMPTED, UserError
from captioner.files import storage
from infer.captioning import Captioning, start_reader
from infer.listing import ImageFile, Listing
from infer.peers import Peers
from infer.results import RowWriter, part_path
from infer.row_index import RowIndex, StampTable, merge
from infer.settings import CaptionSettings, open_listing

STILL_SECONDS = 5.0
RECENT_SECONDS = 60.0  # the first pass leaves younger files to the watch, as they may be growing
MIN_POLL_SECONDS = 2.0
LEISURE = 20  # listing, and merging, each take at most this fraction (1/20) of the time
MAX_ARRIVALS = 256  # captioned between two listings, which bounds memory
SLEEP_SECONDS = 0.2
UNFINISHED_SUFFIXES = (".part", ".partial", ".crdownload", ".download", ".filepart", ".tmp")

Stamp = tuple[int, int]  # size in bytes, time of modification in ns


class Stop:
    """Turns the first SIGTERM or Ctrl-C, while entered, into a request to stop; a second one ends the process."""

    def __init__(self) -> None:
        self.is_requested = False

    def __enter__(self) -> "Stop":
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        if self.is_requested:
            raise SystemExit(EXIT_PREEMPTED)
        self.is_requested = True

    def sleep(self, seconds: float) -> None:
        """Sleep, until a stop is requested."""
        until = time.monotonic() + seconds
        while not self.is_requested and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, SLEEP_SECONDS))


# ---- which files ------------------------------------------------------------------------------------------


def check_watch(settings: CaptionSettings, *, is_kept: bool = True) -> None:
    """Raise UserError for sources that cannot be watched, rows that are not kept in a file, and several processes."""
    if not is_kept:
        raise UserError("--watch keeps its rows in a file: give --output the name of a JSONL file")
    if settings.list or settings.shards or any(map(storage.is_remote, settings.images)):
        raise UserError("--watch looks at folders and globs of this machine: give --images only, and no URL")
    if settings.embed or settings.dry_run:
        raise UserError(
            "--watch neither embeds nor tries: run the same command with --embed or --dry-run, without --watch"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("--watch works in one process: start it without accelerate launch")


def is_unfinished(path: str) -> bool:
    """Whether a file's name is one that programs give to files that they are still writing."""
    name = path.rpartition("/")[2]
    return name.startswith(".") or name.lower().endswith(UNFINISHED_SUFFIXES)


def not_growing(files: Iterable[ImageFile]) -> Iterator[ImageFile]:
    """The files that cannot be growing: modified more than RECENT_SECONDS ago. Others are left to the watch."""
    for file in files:
        stamp = _stamp(file)
        is_recent = stamp is not None and time.time() - stamp[1] / 1e9 < RECENT_SECONDS
        if not (is_recent or is_unfinished(file.path)):
            yield file


def _stamp(file: ImageFile) -> Stamp | None:
    try:
        status = os.stat(file.location)  # noqa: PTH116 - a Path takes longer, and changes names
    except (OSError, ValueError):  # it is gone, or unreadable
        return None
    return status.st_size, status.st_mtime_ns


class Arrivals:
    """Finds the files that are new or replaced, and no longer growing.

    `open_listing` lists all files. Files with a row in `index` are known when they are first seen.
    """

    def __init__(
        self,
        open_listing: Callable[[], Iterable[ImageFile]],
        index: RowIndex,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._open_listing = open_listing
        self._index = index
        self._clock = clock
        self._seen = StampTable()
        self._growing: dict[str, tuple[Stamp, float]] = {}  # by location: since when it has had this stamp
        self.error = ""  # why the last listing failed

    def poll(self) -> list[ImageFile]:
        """List the files, and return at most MAX_ARRIVALS arrived ones; each is returned once, until it is replaced."""
        growing: dict[str, tuple[Stamp, float]] = {}
        found: list[ImageFile] = []
        try:
            for file in self._open_listing():
                stamp = None if file.error or is_unfinished(file.path) else _stamp(file)
                if stamp is None or not self._is_new(file, stamp):
                    continue
                before, since = self._growing.get(file.location, (None, 0.0))
                since = since if stamp == before else self._clock()
                if self._clock() - since < STILL_SECONDS or len(found) == MAX_ARRIVALS:
                    growing[file.location] = stamp, since
                else:
                    found.append(file)
                    self._seen.set(file.location, stamp)
            self.error = ""
        except (OSError, UserError) as error:  # such as a disk that is not there now: it may come back
            self.error = str(error)
            growing = self._growing | growing
        self._growing = growing
        return found

    def _is_new(self, file: ImageFile, stamp: Stamp) -> bool:
        """Whether a file has not been captioned in this state. Its row of an earlier run is taken for that of now."""
        known = self._seen.get(file.location)
        if known is None and self._index.is_done(file.root, file.path):
            self._seen.set(file.location, stamp)
            return False
        return known != stamp


# ---- captioning -------------------------------------------------------------------------------------------


def watch(
    captioner: Captioner, settings: CaptionSettings, stop: Stop, *, base: str, on_merge: Callable[[], object]
) -> None:
    """Caption what arrives until a stop is requested, then merge the last rows. `on_merge` is called after each merge.

    Raises UserError if rows cannot be written.
    """
    cli.console.print("watching for more files: Ctrl-C or SIGTERM ends it")
    watching = Watch(captioner, settings, base=base, on_merge=on_merge)
    watching.run(stop)
    watching.close()


class Watch:
    """Captions arrivals and merges their rows; close it to merge the last ones."""

    def __init__(
        self, captioner: Captioner, settings: CaptionSettings, *, base: str, on_merge: Callable[[], object]
    ) -> None:
        self._captioner, self._settings, self._base, self._on_merge = captioner, settings, base, on_merge
        self._index = RowIndex(settings.output, base=base)
        self._arrivals = Arrivals(self._list, self._index)
        self._writer = RowWriter(part_path(settings.output, 0))  # locks the part
        self._num_unmerged = 0
        self._merged_at, self._merge_seconds = 0.0, 0.0

    def run(self, stop: Stop) -> None:
        """Watch until a stop is requested. Raises UserError if rows cannot be written."""
        error = ""
        while not stop.is_requested:
            started = time.monotonic()
            files = self._arrivals.poll()
            seconds = time.monotonic() - started
            if self._arrivals.error and self._arrivals.error != error:
                cli.console.print(f"waiting: {self._arrivals.error}", markup=False)
            error = self._arrivals.error
            if files:
                self._caption(files, stop)
            if time.monotonic() - self._merged_at >= LEISURE * self._merge_seconds:
                self._merge()
            if len(files) < MAX_ARRIVALS:
                stop.sleep(max(MIN_POLL_SECONDS, LEISURE * seconds))

    def close(self) -> None:
        """Merge all rows."""
        self._merge()
        self._writer.close()
        self._index.close()

    def _list(self) -> Listing:
        return open_listing(self._settings, Peers(self._settings.output))

    def _caption(self, files: Sequence[ImageFile], stop: Stop) -> None:
        """Caption the files until a stop is requested."""
        reader, num_threads = start_reader(iter(files), self._captioner, self._settings, max_workers=len(files))
        captioning = Captioning(self._captioner, self._index, self._writer)
        with reader, closing(captioning.rows(reader, num_threads=num_threads)) as found:
            for rows in found:
                self._num_unmerged += len(rows)
                if stop.is_requested:
                    break

    def _merge(self) -> None:
        if not self._num_unmerged:
            return
        started = time.monotonic()
        self._writer.close()  # and unlock, for merging
        summary = merge(self._settings.output, base=self._base)
        cli.console.print(
            f"{time.strftime('%H:%M:%S')}: {self._num_unmerged:,} captioned, {summary.num_rows:,} rows in all"
        )
        self._on_merge()
        self._num_unmerged = 0
        self._writer = RowWriter(self._writer.path)
        self._merged_at = time.monotonic()
        self._merge_seconds = self._merged_at - started
