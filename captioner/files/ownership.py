"""One owner at a time, across all machines that share a folder: of a run folder, or of a split that is being packed.

The owner writes a small file (an object, if it is behind a URL) that names its process and machine, and rewrites it
every 15 seconds: the heartbeat. On disk it also holds a lock on that file, which the system releases however the
process ends. Another process that wants to be the owner

1. becomes the owner if there is no file; of several at the same moment one does (on servers by a conditional request);
2. on disk and on the owner's machine, is refused while the lock is held, and otherwise becomes the owner at once;
3. in all other cases watches the file: it is refused if the file changes, and takes over if it has not changed for a
   minute. It compares contents, never clocks.

If an owner was silent for a minute and finds another owner's file at its next heartbeat, its process exits.
"""

import io
import json
import logging
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from captioner.errors import EXIT_PREEMPTED, UserError
from captioner.files import locks, storage

BEAT_SECONDS = 15.0
SILENT_SECONDS = 60.0
LOCK_TRIES = 100
RETRY_SECONDS = 0.05
RECORD_BYTES = 512  # fixed size, so that one write replaces a record

log = logging.getLogger(__name__)

Record = dict[str, Any]


class AlreadyOwnedError(UserError):
    """Process `pid` on `host` owns `location`; `doing` says what it is doing."""

    def __init__(self, location: str, doing: str, pid: int | str, host: str) -> None:
        super().__init__(location, doing, pid, host)
        self.location, self.doing, self.pid, self.host = location, doing, pid, host

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} {self.doing} ({self.location})"


class NotWritableError(UserError):
    """The file or object that names the owner cannot be written; `reason` is the system's message."""

    def __init__(self, location: str, reason: str) -> None:
        super().__init__(location, reason)
        self.location, self.reason = location, reason

    def __str__(self) -> str:
        return f"cannot write to {self.location} ({self.reason})"


@contextmanager
def owned(location: str, *, doing: str) -> Iterator[None]:
    """Own what the file or object at `location` guards, until the block ends.

    `doing` says what the owner is doing, for the error in other processes. A process that lost its ownership because it
    was silent for a minute exits with code 75: two processes must not write the same files. Raises AlreadyOwnedError if
    another process is the owner, and NotWritableError.
    """
    if location.startswith(storage.WEB):  # else the request would be retried for minutes
        raise NotWritableError(location, "web servers are only read: write to the folder or bucket that they serve")
    claim = _Claim(location, doing)
    with ExitStack() as stack:
        try:
            write = _own_object(claim) if storage.is_remote(location) else _own_file(claim, stack)
        except OSError as error:
            where = location if storage.is_remote(location) else str(Path(location).parent)
            raise NotWritableError(where, error.strerror or str(error)) from error
        stack.enter_context(claim.heartbeats(write))
        yield


@dataclass(frozen=True, slots=True)
class _Claim:
    """One process's attempt to own a location."""

    location: str
    doing: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def record(self, beat: int = 0) -> str:
        """The file's content if this process is the owner; it differs for each heartbeat."""
        host = socket.gethostname()
        record = {"id": self.id, "host": host, "machine": _machine(), "pid": os.getpid(), "beat": beat}
        return json.dumps(record).ljust(RECORD_BYTES - 1) + "\n"

    def read(self) -> Record:
        """The record in the file; empty if there is no file or it is not valid JSON. Raises OSError."""
        with suppress(FileNotFoundError, ValueError):
            content = json.loads(storage.read_bytes(self.location))
            if isinstance(content, dict):
                return content
        return {}

    def refusal(self, owner: Record) -> AlreadyOwnedError:
        """The error that names the owner."""
        return AlreadyOwnedError(self.location, self.doing, owner.get("pid", "?"), owner.get("host", "?"))

    def watch(self, owner: Record, *, seconds: float) -> bool:
        """Whether `owner` stays silent for `seconds`; False if its record is removed.

        Raises AlreadyOwnedError if the record changes.
        """
        log.warning(
            "%s is owned by %s: waiting up to %.0f s to see if it is alive", self.location, _name(owner), seconds
        )
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            time.sleep(BEAT_SECONDS / 5)
            record = self.read()
            if not record:
                return False
            if record != owner:
                raise self.refusal(record)
        return True

    @contextmanager
    def heartbeats(self, write: Callable[[str], None]) -> Iterator[None]:
        """Write heartbeats during the block, and remove the record at its end."""
        done = threading.Event()

        def beat() -> None:
            number = 0
            while not done.wait(BEAT_SECONDS):
                number += 1
                with suppress(OSError):
                    owner = self.read()
                    if owner.get("id") != self.id:
                        _end_process(self, owner)
                        return
                    write(self.record(number))

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            with suppress(OSError):
                if self.read().get("id") == self.id:
                    storage.delete(self.location)


def _name(owner: Record) -> str:
    return f"process {owner.get('pid', '?')} on {owner.get('host', '?')}"


def _machine() -> str:
    """An identifier of the running kernel, whose processes see each other's locks; it changes at a reboot."""
    boot = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{socket.gethostname()} {boot}"


def _end_process(claim: _Claim, owner: Record) -> None:
    print(
        f"{_name(owner)} {claim.doing} now ({claim.location}), because this process was silent for a minute or that "
        "file was removed: this process exits",
        file=sys.stderr,
        flush=True,
    )
    os._exit(EXIT_PREEMPTED)


# ---- a locked file ----------------------------------------------------------------------------------------


def _own_file(claim: _Claim, stack: ExitStack) -> Callable[[str], None]:
    """Lock a file until the stack is closed and write the record; returns the function that rewrites it."""
    path = Path(claim.location)
    stack.enter_context(_folder(path.parent))
    try:
        return partial(_rewrite, stack.enter_context(_lock(path, claim)))
    except OSError as error:
        if error.errno not in locks.UNSUPPORTED:
            raise
    return _own_object(claim)


@contextmanager
def _folder(path: Path) -> Iterator[None]:
    """Create a folder if it is missing; at the end of the block remove the created folders that are empty."""
    made = [each for each in (path, *path.parents) if not each.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for each in made:
            with suppress(OSError):
                each.rmdir()


def _lock(path: Path, claim: _Claim) -> io.FileIO:
    """The open, locked file, with this process's record. Raises AlreadyOwnedError and OSError."""
    for _ in range(LOCK_TRIES):
        try:
            file = locks.open_locked(path)
        except BlockingIOError:
            _wait_for_lock(path, claim)
            continue
        try:
            owner = claim.read()
            # Some file systems' locks work within one machine only: an owner on another machine may be alive.
            if not owner or owner.get("machine") == _machine() or claim.watch(owner, seconds=SILENT_SECONDS):
                _rewrite(file, claim.record())
                return file
        except BaseException:
            file.close()
            raise
        file.close()
    raise claim.refusal(claim.read())


def _wait_for_lock(path: Path, claim: _Claim) -> None:
    """Wait until the lock may be free. Raises AlreadyOwnedError if the process that holds it is alive."""
    owner = claim.read()
    if not owner:  # its record is not written yet, or was just removed
        time.sleep(RETRY_SECONDS)
    elif owner.get("machine") == _machine():
        raise claim.refusal(owner)
    elif claim.watch(owner, seconds=SILENT_SECONDS + BEAT_SECONDS):  # file servers keep the locks of dead machines
        path.unlink(missing_ok=True)


def _rewrite(file: io.FileIO, record: str) -> None:
    """Replace the record with one write, and flush it so that other machines see it."""
    os.pwrite(file.fileno(), record.encode(), 0)
    os.ftruncate(file.fileno(), len(record))
    os.fsync(file.fileno())


# ---- an object, or a file on a disk without locks -----------------------------------------------------------


def _own_object(claim: _Claim) -> Callable[[str], None]:
    """Write this process's record if there is none, or its owner is silent; returns the function that rewrites it.

    Raises AlreadyOwnedError and OSError.
    """
    rewrite = partial(storage.write_atomic, claim.location)
    while True:
        etag = storage.etag(claim.location)  # read before the record, so that it is not a later record's
        owner = claim.read()
        if owner.get("id") == claim.id:  # an earlier attempt succeeded, but the response was lost
            return rewrite
        if owner and not claim.watch(owner, seconds=SILENT_SECONDS):
            continue
        if owner and etag is None:
            storage.delete(claim.location)
        try:
            storage.write_new(claim.location, claim.record(), etag=etag)
            return rewrite
        except FileExistsError:  # another process was first, or the file is not a record
            if not owner and not claim.read():
                storage.delete(claim.location)
