"""Remote shards on a disk of this machine: fetched once, whole and checked, within a limit of bytes.

The folder holds `SHA256.tar` with `SHA256.index`, named after the tar's content, and of downloads under way
`SHA256.BYTES.partial`, which counts with all of its bytes from the beginning. Processes agree by file locks, which the
system gives back however their holder ends: `lock` is held for a moment to make room and reserve; a partial file by the
process that downloads it; a tar, shared, by those that read it. `lock` holds how many bytes are kept at most, so that
the folder is looked through only when it may be full. Imports no torch.
"""

import fcntl
import hashlib
import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TypeVar

from captioner.errors import UserError
from captioner.files import storage
from captioner.shards.format import PACK_AGAIN, RESTORE, FormatError, ShardEntry, ShardIndex

CHUNK_BYTES = 8 << 20  # of one request; so much is lost at most when a connection or a process ends
NUM_DOWNLOADS = 3  # of a shard that differs from its manifest; transfer errors are rare, but they happen
PATIENCE_SECONDS = 300.0  # without progress; a server restarts in less
GRACE_SECONDS = 60.0  # that others wait longer than the process that downloads
ROOM_SECONDS = 60.0  # that a reader waits for others to close shards
POLL_SECONDS = 0.1
RETRY_SECONDS = 1.0  # between looks for room, and after a failure, of a prefetcher
NUM_THREADS = 3
SPARE_SHARE = 0.05  # of the limit, that is freed at once where it is full: looking through the folder takes long
NAME = re.compile(r"(?P<sha256>[0-9a-f]{64})\.(?:tar|index|(?P<bytes>\d+)\.partial)")

log = logging.getLogger(__name__)

Result = TypeVar("Result")


class MissingShardError(UserError):
    """A shard or its index is not where its manifest says."""


class DamagedShardError(UserError):
    """A shard or its index is not what its manifest says, even after it was fetched anew."""


class CacheTooSmallError(UserError):
    """A cache of `max_bytes` has no room for the shard `location` of `num_bytes` beside those that are being read."""

    def __init__(self, folder: str, max_bytes: int, location: str, num_bytes: int) -> None:
        super().__init__(folder, max_bytes, location, num_bytes)
        self.folder, self.max_bytes, self.location, self.num_bytes = folder, max_bytes, location, num_bytes

    def __str__(self) -> str:
        return (
            f"the shard cache {self.folder} of {self.max_bytes / 1e9:.3g} GB is too small for the shards that are read "
            f"at once (no room for {self.location} of {self.num_bytes / 1e9:.3g} GB)"
        )


class CacheFolderError(UserError):
    """The cache's folder or its disk cannot be used, for a `reason` that the system gave."""

    def __init__(self, folder: str, reason: str) -> None:
        super().__init__(folder, reason)
        self.folder, self.reason = folder, reason

    def __str__(self) -> str:
        return f"cannot keep shards in {self.folder} ({self.reason})"


class _Obstacle(Enum):
    """Why a shard was not brought."""

    HERE = "it is in the cache"
    COMING = "another process or thread brings it"
    CROWDED = "there is no room while other downloads go on"
    FULL = "there is no room: all else is being read, or wanted earlier"
    STOPPED = "the prefetcher was closed"


@dataclass(slots=True)
class _Kept:
    """What the folder holds of one shard, and the `bytes` that it is counted with."""

    paths: list[Path] = field(default_factory=list)
    bytes: int = 0
    used_ns: int = 0


class ShardCache:
    """Remote shards in a local folder of at most `max_bytes`, those of downloads under way and of indexes included.

    Any number of processes and threads may share the folder. Shards that nobody has open make room for others, the
    least recently used first; files of other names are left alone and not counted. Holds no open files: it may be
    pickled, and used after a fork.
    """

    def __init__(self, folder: str, *, max_bytes: int) -> None:
        self.folder = Path(folder).expanduser().absolute()
        self.max_bytes = max_bytes

    def open(self, folder: str, entry: ShardEntry) -> tuple[ShardIndex, int]:
        """A shard's index, and a file descriptor of its tar, open for reading.

        The shard stays in the cache until the descriptor is closed (os.close), also in processes forked meanwhile.
        Waits while another process brings the shard. Raises MissingShardError, DamagedShardError, and UserError where
        the server or the disk fails or the cache is too small.
        """
        location = tar_location(folder, entry)
        if entry.bytes > self.max_bytes:
            raise self._too_small(location, entry.bytes)
        seen, since = None, time.monotonic()
        with self._telling():
            while (pinned := self._pin(entry)) is None:
                brought = self._bring(folder, entry)
                if not isinstance(brought, _Obstacle):
                    with _closing(brought):
                        pinned = self._pin(entry)
                    if pinned is not None:
                        break
                    brought = _Obstacle.HERE
                state = self._state()
                if state != seen:
                    seen, since = state, time.monotonic()
                self._check_wait(brought, time.monotonic() - since, location, entry)
                time.sleep(POLL_SECONDS * random.uniform(0.5, 1.5))
        return pinned

    def fetch(self, folder: str, entry: ShardEntry) -> bool:
        """Bring a shard into the cache unless it is there, another process is bringing it, or there is no room.

        Returns whether it is there now. Raises what `open` does.
        """
        brought = self._bring(folder, entry)
        if not isinstance(brought, _Obstacle):
            _unlock(brought)
        return brought is _Obstacle.HERE or not isinstance(brought, _Obstacle)

    # ---- reading ------------------------------------------------------------------------------------------

    def _path(self, entry: ShardEntry, ending: str) -> Path:
        return self.folder / f"{entry.sha256}.{ending}"

    def _pin(self, entry: ShardEntry) -> tuple[ShardIndex, int] | None:
        """What `open` gives, or None where the shard is not in the cache. A damaged one is removed."""
        path = self._path(entry, "tar")
        try:
            file = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        with ExitStack() as stack:
            stack.callback(_unlock, file)
            fcntl.flock(file, fcntl.LOCK_SH)
            found = os.fstat(file)
            try:
                if not os.path.samestat(found, path.stat()):
                    return None  # it was evicted before it was locked
            except FileNotFoundError:
                return None
            if found.st_size == entry.bytes:
                with suppress(FileNotFoundError, DamagedShardError, FormatError):
                    index = self._read_index(entry)
                    now = time.time_ns()
                    os.utime(file, ns=(now, now))
                    os.utime(self._path(entry, "index"), ns=(now, now))  # cleaners of old files take neither
                    stack.pop_all()
                    return index, file
        self._discard(entry)
        return None

    def _read_index(self, entry: ShardEntry) -> ShardIndex:
        path = self._path(entry, "index")
        return _parse_index(path.read_bytes(), entry, origin=str(path))

    def _check_wait(self, obstacle: _Obstacle, waited_seconds: float, location: str, entry: ShardEntry) -> None:
        """Raise UserError when a reader has waited too long while nothing in the folder changed."""
        if obstacle is _Obstacle.FULL and waited_seconds > ROOM_SECONDS:
            raise self._too_small(location, entry.bytes)
        if obstacle is _Obstacle.HERE and waited_seconds > ROOM_SECONDS:
            path = self._path(entry, "tar")
            raise DamagedShardError(f"{path} or its index is damaged while others read it: end them and delete it")
        if waited_seconds > PATIENCE_SECONDS + GRACE_SECONDS:
            raise UserError(
                f"no byte came into {self.folder} for {waited_seconds:.0f} s, though another process fetches "
                f"{location}: end that process and run again"
            )

    def _too_small(self, location: str, num_bytes: int) -> CacheTooSmallError:
        return CacheTooSmallError(str(self.folder), self.max_bytes, location, num_bytes)

    # ---- bringing -----------------------------------------------------------------------------------------

    def reserve(self, folder: str, entry: ShardEntry, *, before: Collection[str] = ()) -> int | _Obstacle:
        """Reserve room for a shard and begin its download; the descriptor is for `complete` alone.

        `before` are the checksums of shards that this process needs before this one, the soonest first: they do not
        make room for it, and count as just used, so that for other processes' shards they do so late.
        """
        if not re.fullmatch("[0-9a-f]{64}", entry.sha256):
            raise UserError(f"the manifest in {folder} has no sha256 for shard {entry.name}: {PACK_AGAIN}")
        with self._telling():
            self._touch([*before, entry.sha256])
            return self._reserve(entry, frozenset((*before, entry.sha256)))

    def complete(
        self,
        folder: str,
        entry: ShardEntry,
        file: int,
        *,
        before: Collection[str] = (),
        stop: threading.Event | None = None,
    ) -> int | _Obstacle:
        """Download a shard with its index. Gives a descriptor of the tar that keeps it in the cache, to be unlocked.

        Ends after a part of the shard when `stop` is set.
        """
        partial = self._partial(entry)
        with self._telling(), ExitStack() as stack:
            stack.callback(self._release, file, partial)
            try:
                obstacle = self._bring_index(folder, entry, frozenset((*before, entry.sha256)))
                if obstacle is None:
                    obstacle = self._download(folder, entry, file, stop)
                if obstacle is not None:
                    return obstacle
                os.fsync(file)
            except OSError:  # of this disk, that may be full; those of the server are told as UserError
                os.ftruncate(file, 0)
                raise
            with self._guard():
                partial.replace(self._path(entry, "tar"))
                fcntl.flock(file, fcntl.LOCK_SH)
                self._touch([*before, entry.sha256])
            stack.pop_all()
        return file

    def _bring(self, folder: str, entry: ShardEntry) -> int | _Obstacle:
        """Download a shard unless there is an obstacle; gives what `complete` does."""
        file = self.reserve(folder, entry)
        return file if isinstance(file, _Obstacle) else self.complete(folder, entry, file)

    def _partial(self, entry: ShardEntry) -> Path:
        return self._path(entry, f"{entry.bytes}.partial")

    def _reserve(self, entry: ShardEntry, keep: frozenset[str]) -> int | _Obstacle:
        """The locked partial file, new or left by a process that ended, its room reserved."""
        partial = self._partial(entry)
        with self._guard() as lock:
            if self._path(entry, "tar").exists():
                return _Obstacle.HERE
            if not partial.exists():
                obstacle = self._make_room(entry.bytes, keep, lock)
                if obstacle is not None:
                    return obstacle
            file = os.open(partial, os.O_RDWR | os.O_CREAT, 0o644)
            if _try_lock(file):
                return file
            os.close(file)
            return _Obstacle.COMING

    def _release(self, file: int, partial: Path) -> None:
        """Give a partial file free: for the next one to go on with, or gone where it is empty."""
        with _closing(file), self._guard():
            if os.fstat(file).st_size == 0:
                partial.unlink(missing_ok=True)

    def _bring_index(self, folder: str, entry: ShardEntry, keep: frozenset[str]) -> _Obstacle | None:
        """Put the index into the cache, on disk to stay."""
        path = self._path(entry, "index")
        with suppress(FileNotFoundError, DamagedShardError, FormatError):
            self._read_index(entry)
            return None
        data = _fetch_index(folder, entry)
        if entry.bytes + len(data) > self.max_bytes:
            raise self._too_small(tar_location(folder, entry), entry.bytes + len(data))
        with self._guard() as lock:
            path.unlink(missing_ok=True)
            obstacle = self._make_room(len(data), keep, lock)
            if obstacle is not None:
                return obstacle
            try:
                path.write_bytes(data)
            except OSError:
                path.unlink(missing_ok=True)
                raise
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        return None

    def _download(self, folder: str, entry: ShardEntry, file: int, stop: threading.Event | None) -> _Obstacle | None:
        """Complete a partial file and check it, anew from the start where it is wrong."""
        location = tar_location(folder, entry)
        size = _ask(lambda: storage.size_bytes(location, patience_seconds=PATIENCE_SECONDS), location)
        if size not in (storage.UNKNOWN, entry.bytes):
            raise DamagedShardError(f"{location} has {size:,} bytes, its manifest says {entry.bytes:,}: {RESTORE}")
        os.ftruncate(file, min(os.fstat(file).st_size, entry.bytes))
        for attempt in range(1, NUM_DOWNLOADS + 1):
            checksum = hashlib.sha256()
            start = 0
            while data := os.pread(file, min(CHUNK_BYTES, entry.bytes - start), start):
                checksum.update(data)
                start += len(data)
            while start < entry.bytes:
                if stop is not None and stop.is_set():
                    return _Obstacle.STOPPED
                data = _fetch_part(location, start, entry.bytes)
                checksum.update(data)
                _write(file, data, start)
                start += len(data)
            if checksum.hexdigest() == entry.sha256:
                return None
            log.warning("%s has another sha256 than its manifest, in try %d of %d", location, attempt, NUM_DOWNLOADS)
            os.ftruncate(file, 0)
        raise DamagedShardError(f"{location} differs from its manifest (its sha256 is another): {RESTORE}")

    # ---- room ---------------------------------------------------------------------------------------------

    @contextmanager
    def _guard(self) -> Iterator[int]:
        """Hold the lock under which files are counted, reserved, renamed to tars, and removed; its descriptor."""
        path = self.folder / "lock"
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        with _closing(file):
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file

    def _state(self) -> dict[str, int]:
        """What changes when anything is brought: the names of files, and the sizes of partial ones that have any."""
        state = {}
        with os.scandir(self.folder) as items:
            for item in items:
                if not item.name.endswith(".partial"):
                    state[item.name] = 0
                    continue
                with suppress(FileNotFoundError):
                    if size := item.stat().st_size:  # readers that find no room make empty ones again and again
                        state[item.name] = size
        return state

    def _scan(self) -> dict[str, _Kept]:
        """What the folder holds, by checksum."""
        found: dict[str, _Kept] = {}
        with os.scandir(self.folder) as items:
            for item in items:
                match = NAME.fullmatch(item.name)
                if match is None:
                    continue
                with suppress(FileNotFoundError):
                    state = item.stat()
                    kept = found.setdefault(match["sha256"], _Kept())
                    kept.paths.append(Path(item.path))
                    kept.bytes += max(state.st_size, int(match["bytes"] or 0))
                    kept.used_ns = max(kept.used_ns, state.st_mtime_ns)
        return found

    def _make_room(self, num_bytes: int, keep: frozenset[str], lock: int) -> _Obstacle | None:
        """Reserve so many bytes, under the guard. Where they may not be there, the least recently used shards go, with
        some more for the next ones; where that does not help, none go.
        """
        kept_bytes = _read_number(lock)
        if kept_bytes is not None and kept_bytes + num_bytes <= self.max_bytes:
            _write_number(lock, kept_bytes + num_bytes)
            return None
        found = self._scan()
        missing = sum(kept.bytes for kept in found.values()) + num_bytes - self.max_bytes
        spare = int(SPARE_SHARE * self.max_bytes)
        obstacle, victims = _Obstacle.FULL, []
        with ExitStack() as locks:
            for sha256, kept in sorted(found.items(), key=lambda item: item[1].used_ns):
                if missing <= 0 and kept.bytes > missing + spare:
                    break
                if sha256 in keep:
                    continue
                if _lock_all(kept, locks):
                    victims.append(kept)
                    missing -= kept.bytes
                elif any(path.suffix == ".partial" for path in kept.paths):
                    obstacle = _Obstacle.CROWDED
            if missing > 0:
                return obstacle
            for kept in victims:
                _remove(kept)
        _write_number(lock, missing + self.max_bytes)
        return None

    def _discard(self, entry: ShardEntry) -> None:
        """Remove a damaged shard, unless others have it open."""
        with self._guard(), ExitStack() as locks:
            kept = self._scan().get(entry.sha256, _Kept())
            if _lock_all(kept, locks):
                _remove(kept)

    def _touch(self, checksums: list[str]) -> None:
        """Make these the most recently used, the first of them the most."""
        for sha256 in reversed(checksums):
            now = time.time_ns()
            with suppress(FileNotFoundError):
                os.utime(self.folder / f"{sha256}.tar", ns=(now, now))

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Raise CacheFolderError for errors of the folder and its disk."""
        try:
            yield
        except UserError:
            raise
        except OSError as error:
            raise CacheFolderError(str(self.folder), error.strerror or str(error)) from error


def _try_lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _unlock(file: int) -> None:
    """Give the lock back and close; closing alone would leave it with processes that were forked meanwhile."""
    fcntl.flock(file, fcntl.LOCK_UN)
    os.close(file)


@contextmanager
def _closing(file: int) -> Iterator[None]:
    try:
        yield
    finally:
        _unlock(file)


def _lock_all(kept: _Kept, locks: ExitStack) -> bool:
    """Whether nobody reads or downloads a shard; then nobody can before `locks` are given back."""
    for path in kept.paths:
        if path.suffix != ".index":
            try:
                file = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                continue
            locks.callback(_unlock, file)
            if not _try_lock(file):
                return False
    return True


def _remove(kept: _Kept) -> None:
    for path in sorted(kept.paths, reverse=True):  # the tar before its index
        path.unlink(missing_ok=True)


def _read_number(file: int) -> int | None:
    """What `_write_number` left in a file; None where there is nothing of the kind."""
    text = os.pread(file, 32, 0)
    return int(text) if text.isdigit() else None


def _write_number(file: int, number: int) -> None:
    os.ftruncate(file, 0)
    os.pwrite(file, b"%d" % number, 0)


def _write(file: int, data: bytes, start: int) -> None:
    left = memoryview(data)
    while left:
        num_bytes = os.pwrite(file, left, start)
        left, start = left[num_bytes:], start + num_bytes


# ---- from the store ---------------------------------------------------------------------------------------


def tar_location(folder: str, entry: ShardEntry) -> str:
    """Where a shard's tar lies."""
    return storage.join(folder, f"{entry.name}.tar")


def _ask(question: Callable[[], Result], location: str) -> Result:
    """A store's answer. Raises MissingShardError and UserError."""
    try:
        return question()
    except FileNotFoundError as error:
        raise MissingShardError(f"there is no {location}: {RESTORE}") from error
    except OSError as error:
        problem = str(error).removeprefix("cannot open ")
        raise UserError(f"cannot fetch {problem}: mend that and run again") from error


def _fetch_index(folder: str, entry: ShardEntry) -> bytes:
    """The bytes of a shard's index, which can be read and are of this shard."""
    origin = storage.join(folder, f"{entry.name}.index")
    for attempt in range(1, NUM_DOWNLOADS + 1):
        data = _ask(lambda: storage.read_bytes(origin, patience_seconds=PATIENCE_SECONDS), origin)
        try:
            _parse_index(data, entry, origin=origin)
            break
        except DamagedShardError:
            if attempt == NUM_DOWNLOADS:
                raise
    return data


def _parse_index(data: bytes, entry: ShardEntry, *, origin: str) -> ShardIndex:
    try:
        index = ShardIndex.from_bytes(data, origin=origin)
    except FormatError:
        raise
    except UserError as error:
        raise DamagedShardError(str(error)) from error
    if (index.facts.get("sha256"), index.facts.get("fingerprint")) != (entry.sha256, entry.fingerprint):
        raise DamagedShardError(f"{origin} is of another shard than its manifest says: {RESTORE}")
    return index


def _fetch_part(location: str, start: int, size: int) -> bytes:
    """The bytes of a file of `size` from `start` on: a chunk, or all where the server knows no ranges."""
    end = min(start + CHUNK_BYTES, size)

    def read() -> bytes:
        return storage.read_range(location, start=start, end=end, patience_seconds=PATIENCE_SECONDS)

    return _ask(read, location)[: size - start]


# ---- ahead of the reader ----------------------------------------------------------------------------------


class Prefetcher:
    """Brings the next shards into a cache while a process reads these; make it in that process.

    `shards` are taken one by one in the order in which they are needed first; at most `ahead` of them are in the cache
    or under way before the reader says that it opened them. The threads end with the process. What goes wrong in them
    is left for the reader to meet.
    """

    def __init__(self, cache: ShardCache, shards: Iterable[tuple[str, ShardEntry]], *, ahead: int) -> None:
        self._cache = cache
        self._shards = iter(shards)
        self._ahead = ahead
        self._waiting: dict[str, None] = {}  # checksums, in the order in which they are needed
        self._opened: set[str] = set()
        self._turn = threading.Lock()
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Begin, unless that is done; `opened` does so too."""
        if not self._threads and not self._closing.is_set():
            num_threads = min(NUM_THREADS, self._ahead)
            self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(num_threads)]
            for thread in self._threads:
                thread.start()

    def opened(self, entry: ShardEntry) -> None:
        """Hear that the reader opened a shard, fetched or not."""
        with self._changed:
            self._opened.add(entry.sha256)
            self._waiting.pop(entry.sha256, None)
            self._changed.notify_all()
        self.start()

    def close(self) -> None:
        """Stop, without waiting for the parts that are under way."""
        self._closing.set()
        with self._changed:
            self._changed.notify_all()

    def _run(self) -> None:
        while (reserved := self._reserve_next()) is not None:
            folder, entry, file = reserved
            try:
                before = self._needed_before(entry) or ()
                brought = self._cache.complete(folder, entry, file, before=before, stop=self._closing)
                if not isinstance(brought, _Obstacle):
                    _unlock(brought)
            except Exception:  # the reader meets it when it opens the shard
                self._give_up(entry)

    def _reserve_next(self) -> tuple[str, ShardEntry, int] | None:
        """The next shard that is not there, with its partial file; None at the end. Room is given in order of need."""
        with self._turn:
            while (shard := self._next()) is not None:
                folder, entry = shard
                try:
                    while (before := self._needed_before(entry)) is not None:
                        file = self._cache.reserve(folder, entry, before=before)
                        if not isinstance(file, _Obstacle):
                            return folder, entry, file
                        if file in (_Obstacle.HERE, _Obstacle.COMING):
                            break
                        self._closing.wait(RETRY_SECONDS)
                except Exception:  # as above
                    self._give_up(entry)
        return None

    def _give_up(self, entry: ShardEntry) -> None:
        with self._changed:
            self._waiting.pop(entry.sha256, None)
        self._closing.wait(RETRY_SECONDS)

    def _next(self) -> tuple[str, ShardEntry] | None:
        """The next shard to bring, when there may be one more; None at the end."""
        with self._changed:
            while not self._closing.is_set():
                if len(self._waiting) >= self._ahead:
                    self._changed.wait()
                    continue
                folder, entry = next(self._shards, (None, None))
                if folder is None or entry is None:
                    break
                if entry.sha256 not in self._opened and entry.sha256 not in self._waiting:
                    self._waiting[entry.sha256] = None
                    return folder, entry
        return None

    def _needed_before(self, entry: ShardEntry) -> list[str] | None:
        """The checksums of waiting shards that come before one; None when that one is not waited for any longer."""
        with self._changed:
            waiting = list(self._waiting)
        if self._closing.is_set() or entry.sha256 not in waiting:
            return None
        return waiting[: waiting.index(entry.sha256)]
