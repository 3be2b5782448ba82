"""A cache of remote shards on a local disk: each is downloaded once and verified; their total size is limited.

The folder holds `SHA256.tar` and `SHA256.index` of each shard, named after the checksum of the tar, and during a
download `SHA256.partial`. A partial file has the size of the whole tar from the start, so the sum of file sizes is what
is reserved. Processes use file locks (flock), which the system releases however a process ends:

- `lock`, exclusive, briefly: to reserve bytes, to evict files, to rename a partial file to a tar. The file contains the
  number of reserved bytes, so the folder is scanned only when it may be full.
- a partial file, exclusive, during its download. One without a lock was left by a process that was killed.
- a tar, shared, by each process that has it open: a locked tar is not evicted.

Imports no torch.
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
from functools import partial
from itertools import count
from pathlib import Path
from typing import TypeVar

from captioner.errors import UserError
from captioner.files import storage
from captioner.shards.format import PACK_AGAIN, RESTORE, FormatError, ShardEntry, ShardIndex

CHUNK_BYTES = 8 << 20  # of one request
NUM_DOWNLOADS = 3  # of a file that differs from its manifest: transfer errors are rare, but they happen
PATIENCE_SECONDS = 300.0  # for which a failing request is retried: a server restarts in less
POLL_SECONDS = 0.1  # between the attempts of a waiting reader
MINUTE_POLLS = 600  # a minute: a reader waits this long for space, and logs this often that it waits for a download
RETRY_SECONDS = 1.0  # between a prefetcher's attempts
NUM_THREADS = 3  # of a prefetcher
SLACK = 0.05  # fraction of the limit that is evicted beyond what is needed, so that the folder is scanned less often
NAME = re.compile(r"[0-9a-f]{64}\.(?:tar|index|partial)")

log = logging.getLogger(__name__)

Result = TypeVar("Result")


class MissingShardError(UserError):
    """A shard or its index does not exist on the server."""


class DamagedShardError(UserError):
    """A shard or its index differs from its manifest, even after repeated downloads."""


class CacheTooSmallError(UserError):
    """A cache of `max_bytes` has no space for the shard `location` of `num_bytes` beside the open ones."""

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


class _FullError(Exception):
    """There is no space now; there may be later if other processes are `downloading`."""

    def __init__(self, *, downloading: bool) -> None:
        super().__init__()
        self.downloading = downloading


class ShardCache:
    """Remote shards in a local folder of at most `max_bytes`, including indexes and unfinished downloads.

    Any number of processes and threads may use the same folder. The least recently used shards that no process has open
    are evicted; files with other names are neither counted nor deleted. The object has no open file, so it may be
    pickled, and used after a fork.
    """

    def __init__(self, folder: str, *, max_bytes: int) -> None:
        self.folder = Path(folder).expanduser().absolute()
        self.max_bytes = max_bytes

    def open(self, folder: str, entry: ShardEntry) -> tuple[ShardIndex, int]:
        """A shard's index, and a file descriptor of its tar, open for reading.

        The shard stays in the cache until the descriptor is closed (os.close), also in processes forked meanwhile.
        Waits while another process downloads the shard, and for space. Raises MissingShardError, DamagedShardError,
        CacheTooSmallError, CacheFolderError, and UserError if the server fails.
        """
        with self._folder_errors(), ExitStack() as stack:
            file = self._wait_for(folder, entry)
            stack.callback(_unlock, file)
            index = self._index(folder, entry)
            stack.pop_all()
        return index, file

    def fetch(
        self, folder: str, entry: ShardEntry, *, keep: Collection[str] = (), stop: threading.Event | None = None
    ) -> bool:
        """Download a shard unless it is in the cache or another process downloads it; False if there is no space.

        Shards with the checksums `keep` are not evicted for it. Returns early when `stop` is set. Raises what `open`
        raises.
        """
        with self._folder_errors():
            try:
                file = self._pin_or_download(folder, entry, keep=keep, stop=stop)
            except _FullError:
                return False
        if file is not None:
            _unlock(file)
        return True

    def _wait_for(self, folder: str, entry: ShardEntry) -> int:
        """A pinned shard's descriptor. Waits for downloads of others and for space; raises CacheTooSmallError."""
        location, full_polls = tar_location(folder, entry), 0
        for poll in count(1):
            try:
                file = self._pin_or_download(folder, entry)
                if file is not None:
                    return file
                full_polls = 0
            except _FullError as error:
                full_polls = 0 if error.downloading else full_polls + 1
                if full_polls > MINUTE_POLLS or entry.bytes > self.max_bytes:
                    raise CacheTooSmallError(str(self.folder), self.max_bytes, location, entry.bytes) from None
            if poll % MINUTE_POLLS == 0:
                log.warning("process %d waits for other processes to download %s", os.getpid(), location)
            time.sleep(POLL_SECONDS * random.uniform(0.5, 1.5))
        raise AssertionError("the last attempt returns or raises")

    def _path(self, entry: ShardEntry, suffix: str) -> Path:
        """Where a shard's file is, or would be, in the cache."""
        if not re.fullmatch("[0-9a-f]{64}", entry.sha256):
            raise UserError(f"the manifest has no sha256 for shard {entry.name}: {PACK_AGAIN}")
        return self.folder / f"{entry.sha256}.{suffix}"

    def _pin(self, entry: ShardEntry) -> int | None:
        """A descriptor of a shard's tar, whose lock keeps it in the cache; None if the cache does not have it.

        Deletes a tar of a wrong size.
        """
        path = self._path(entry, "tar")
        with ExitStack() as stack, suppress(FileNotFoundError):
            file = os.open(path, os.O_RDONLY)
            stack.callback(_unlock, file)
            fcntl.flock(file, fcntl.LOCK_SH)
            if not os.path.samestat(os.fstat(file), path.stat()):  # it was evicted before it was locked
                return None
            if os.fstat(file).st_size != entry.bytes:
                path.unlink()
                return None
            now = time.time_ns()
            os.utime(file, ns=(now, now))
            stack.pop_all()
            return file
        return None

    def _index(self, folder: str, entry: ShardEntry) -> ShardIndex:
        """A shard's index, from the cache or from the server; it is cached if there is space."""
        path = self._path(entry, "index")
        with suppress(FileNotFoundError, DamagedShardError, FormatError):
            index = _parse_index(path.read_bytes(), entry, origin=str(path))
            os.utime(path)
            return index
        data, index = _fetch_index(folder, entry)
        with suppress(_FullError), self._locked() as lock:
            path.unlink(missing_ok=True)
            self._make_room(len(data), lock, keep=[entry.sha256])
            path.write_bytes(data)
        return index

    # ---- downloads ----------------------------------------------------------------------------------------

    def _pin_or_download(
        self, folder: str, entry: ShardEntry, *, keep: Collection[str] = (), stop: threading.Event | None = None
    ) -> int | None:
        """As `_pin`, but downloads a shard that is not in the cache, with its index.

        None if another process downloads it, or `stop` is set. Raises _FullError.
        """
        file = self._pin(entry)
        if file is not None:
            return file
        with ExitStack() as stack:
            path = self._path(entry, "partial")
            with self._locked():
                if self._path(entry, "tar").exists():  # downloaded by another process in the meantime
                    return None
                file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
                if not _try_lock(file):
                    os.close(file)
                    return None
                stack.callback(self._discard, path, file)
            with self._locked() as lock:
                self._make_room(entry.bytes - os.fstat(file).st_size, lock, keep=[*keep, entry.sha256])
                os.ftruncate(file, entry.bytes)
            self._index(folder, entry)
            if not _fetch_tar(tar_location(folder, entry), entry, file, stop):
                return None
            os.fsync(file)
            with self._locked():
                path.replace(self._path(entry, "tar"))
                fcntl.flock(file, fcntl.LOCK_SH)
            stack.pop_all()
        return file

    def _discard(self, partial_path: Path, file: int) -> None:
        with self._locked():
            partial_path.unlink(missing_ok=True)
            _unlock(file)

    # ---- space --------------------------------------------------------------------------------------------

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """Hold the cache's lock; yields the descriptor of the lock file."""
        path = self.folder / "lock"
        self.folder.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file
        finally:
            _unlock(file)

    def _make_room(self, num_bytes: int, lock: int, *, keep: Collection[str]) -> None:
        """Reserve bytes while the lock is held; evicts files if the cache may be full. Raises _FullError."""
        text = os.pread(lock, 32, 0)
        reserved = int(text) if text.isdigit() else self.max_bytes
        if reserved + num_bytes > self.max_bytes:
            reserved = self._evict(num_bytes, keep)
        os.ftruncate(lock, 0)
        os.pwrite(lock, b"%d" % (reserved + num_bytes), 0)

    def _evict(self, num_bytes: int, keep: Collection[str]) -> int:
        """Evict the least recently used files until there is space for `num_bytes` plus up to 5 % slack.

        Returns the bytes of the remaining files. Raises _FullError, and evicts nothing, if that would not be enough.
        """
        files = self._scan()
        kept_bytes, target = sum(size for _, size, _ in files), self.max_bytes - num_bytes
        evicted, downloading = [], False
        with ExitStack() as locks:
            for _, size, path in files:
                if kept_bytes <= target and kept_bytes - size < target - SLACK * self.max_bytes:
                    break
                if path.stem in keep:
                    continue
                if _lock_unused(path, locks):
                    evicted.append(path)
                    kept_bytes -= size
                elif path.suffix == ".partial":
                    downloading = True
            if kept_bytes > target:
                raise _FullError(downloading=downloading)
            for path in evicted:
                path.unlink(missing_ok=True)
        return kept_bytes

    def _scan(self) -> list[tuple[int, int, Path]]:
        """The cache's files, the least recently used first, each as (time of use in ns, bytes, path)."""
        files = []
        with os.scandir(self.folder) as items:
            for item in items:
                if NAME.fullmatch(item.name):
                    with suppress(FileNotFoundError):
                        files.append((item.stat().st_mtime_ns, item.stat().st_size, Path(item.path)))
        return sorted(files)

    @contextmanager
    def _folder_errors(self) -> Iterator[None]:
        """Raise CacheFolderError for errors of the folder and its disk."""
        try:
            yield
        except UserError:
            raise
        except OSError as error:
            raise CacheFolderError(str(self.folder), error.strerror or str(error)) from error


def _try_lock(file: int) -> bool:
    """Lock a file exclusively; False if another process or thread has locked it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _unlock(file: int) -> None:
    """Unlock, then close: closing alone leaves the lock to processes forked meanwhile, which share the descriptor."""
    fcntl.flock(file, fcntl.LOCK_UN)
    os.close(file)


def _lock_unused(path: Path, locks: ExitStack) -> bool:
    """Lock a file that no process has open or downloads, until `locks` are released; False if one does."""
    if path.suffix == ".index":  # read whole, never kept open
        return True
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    locks.callback(_unlock, file)
    return _try_lock(file)


# ---- from the server --------------------------------------------------------------------------------------


def tar_location(folder: str, entry: ShardEntry) -> str:
    """The path or URL of a shard's tar."""
    return storage.join(folder, f"{entry.name}.tar")


def _request(request: Callable[[], Result], location: str) -> Result:
    """The result of `request`. Raises MissingShardError and UserError instead of its OSErrors."""
    try:
        return request()
    except FileNotFoundError as error:
        raise MissingShardError(f"there is no {location}: {RESTORE}") from error
    except OSError as error:
        problem = str(error).removeprefix("cannot open ")
        raise UserError(f"cannot download {problem}: fix this and run again") from error


def _fetch_index(folder: str, entry: ShardEntry) -> tuple[bytes, ShardIndex]:
    """A shard's index from the server, as bytes and parsed. Raises what `_request` raises, and DamagedShardError."""
    origin = storage.join(folder, f"{entry.name}.index")
    for attempt in count(1):
        data = _request(lambda: storage.read_bytes(origin, patience_seconds=PATIENCE_SECONDS), origin)
        try:
            return data, _parse_index(data, entry, origin=origin)
        except DamagedShardError:
            if attempt == NUM_DOWNLOADS:
                raise
    raise AssertionError("the last attempt returns or raises")


def _parse_index(data: bytes, entry: ShardEntry, *, origin: str) -> ShardIndex:
    """The index in `data`. Raises DamagedShardError, also if it is another shard's, and FormatError."""
    try:
        index = ShardIndex.from_bytes(data, origin=origin)
    except FormatError:
        raise
    except UserError as error:
        raise DamagedShardError(str(error)) from error
    if (index.facts.get("sha256"), index.facts.get("fingerprint")) != (entry.sha256, entry.fingerprint):
        raise DamagedShardError(f"{origin} is of another shard than its manifest says: {RESTORE}")
    return index


def _fetch_tar(location: str, entry: ShardEntry, file: int, stop: threading.Event | None) -> bool:
    """Download a tar into an open file and check it; False when `stop` is set before the end."""
    size = _request(lambda: storage.size_bytes(location, patience_seconds=PATIENCE_SECONDS), location)
    if size not in (storage.UNKNOWN, entry.bytes):
        raise DamagedShardError(f"{location} has {size:,} bytes, its manifest says {entry.bytes:,}: {RESTORE}")
    for attempt in range(1, NUM_DOWNLOADS + 1):
        checksum = hashlib.sha256()
        with open(file, "r+b", closefd=False) as target:
            target.seek(0)
            while (start := target.tell()) < entry.bytes:
                if stop is not None and stop.is_set():
                    return False
                end = min(start + CHUNK_BYTES, entry.bytes)
                read = partial(storage.read_range, location, start=start, end=end, patience_seconds=PATIENCE_SECONDS)
                data = _request(read, location)[
                    : entry.bytes - start
                ]  # the rest of the file, if the server ignores Range
                checksum.update(data)
                target.write(data)
        if checksum.hexdigest() == entry.sha256:
            return True
        log.warning("%s has another sha256 than its manifest, in attempt %d of %d", location, attempt, NUM_DOWNLOADS)
    raise DamagedShardError(f"{location} has another sha256 than its manifest says: {RESTORE}")


# ---- ahead of the reader ----------------------------------------------------------------------------------


class Prefetcher:
    """Downloads the next shards into a cache while a process reads the current ones; create it in that process.

    `shards` are in the order of their first use. At most `ahead` of them are downloaded before the reader calls
    `opened`. Errors are raised when the reader opens the shard, not here. The threads end with the process.
    """

    def __init__(self, cache: ShardCache, shards: Iterable[tuple[str, ShardEntry]], *, ahead: int) -> None:
        self._cache, self._shards, self._ahead = cache, iter(shards), ahead
        self._waiting: set[str] = set()  # checksums of shards that were taken from `shards` and are not opened yet
        self._opened: set[str] = set()
        self._changed = threading.Condition()
        self._closed = threading.Event()
        self.threads = [threading.Thread(target=self._run, daemon=True) for _ in range(min(NUM_THREADS, ahead))]
        for thread in self.threads:
            thread.start()

    def opened(self, entry: ShardEntry) -> None:
        """Tell the prefetcher that the reader has opened a shard, whether or not it was prefetched."""
        with self._changed:
            self._opened.add(entry.sha256)
            self._waiting.discard(entry.sha256)
            self._changed.notify_all()

    def close(self) -> None:
        """Stop, without waiting for running requests."""
        self._closed.set()
        with self._changed:
            self._changed.notify_all()

    def _run(self) -> None:
        while (shard := self._next()) is not None:
            folder, entry = shard
            try:
                while self._is_needed(entry) and not self._cache.fetch(
                    folder, entry, keep=frozenset(self._waiting), stop=self._closed
                ):
                    self._closed.wait(RETRY_SECONDS)
            except Exception:  # the reader raises it when it opens the shard
                with self._changed:
                    self._waiting.discard(entry.sha256)
                self._closed.wait(RETRY_SECONDS)

    def _is_needed(self, entry: ShardEntry) -> bool:
        return entry.sha256 in self._waiting and not self._closed.is_set()

    def _next(self) -> tuple[str, ShardEntry] | None:
        """Wait until another shard may be downloaded, and return it; None at the end."""
        with self._changed:
            while not self._closed.is_set():
                if len(self._waiting) >= self._ahead:
                    self._changed.wait()
                    continue
                shard = next(self._shards, None)
                if shard is None:
                    break
                sha256 = shard[1].sha256
                if sha256 not in self._opened and sha256 not in self._waiting:
                    self._waiting.add(sha256)
                    return shard
        return None
