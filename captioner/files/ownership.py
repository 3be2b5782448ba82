"""One owner at a time, on all machines that see a folder: of a run folder, or of a split that is packed.

The owner keeps a small file, or behind a URL an object, that says which process on which machine it is, and rewrites
it every 15 seconds. On disk it also locks that file; the system releases the lock however the process ends. Another
process that wants to be the owner

1. becomes it if there is no file;
2. is refused if the owner is on the same machine and alive, and takes over at once if that owner is dead, even if its
   process number has been reused or the machine was rebooted;
3. watches the file if the owner is on another machine: it is refused if the file changes, and takes over if the file
   does not change for a minute. Only the file's contents are compared, never clocks.

An owner that was silent for a minute and then finds another owner's file has lost ownership.
"""

import errno
import fcntl
import io
import json
import logging
import os
import socket
import sys
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from captioner.errors import EXIT_PREEMPTED, UserError
from captioner.files import storage

BEAT_SECONDS = 15.0
SILENT_SECONDS = 60.0
SETTLE_SECONDS = 2.0  # by then, a process that found it free at the same moment has written its own record
LOCK_TRIES = 100
RETRY_SECONDS = 0.05
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
RECORD_BYTES = 512  # fixed size, so that one write replaces a record
INITIAL_PIDS = "pid:[4026531836]"  # Linux's process numbers outside of containers

log = logging.getLogger(__name__)

Record = dict[str, Any]


class AlreadyOwnedError(UserError):
    """Process `pid` on `host` owns `location`; `doing` says what it does."""

    def __init__(self, location: str, doing: str, pid: int | str, host: str) -> None:
        super().__init__(location, doing, pid, host)
        self.location, self.doing, self.pid, self.host = location, doing, pid, host

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} {self.doing} ({self.location})"


class NotWritableError(UserError):
    """A folder or object where ownership would be recorded cannot be written, for a `reason` that the system gave."""

    def __init__(self, location: str, reason: str) -> None:
        super().__init__(location, reason)
        self.location, self.reason = location, reason

    def __str__(self) -> str:
        return f"cannot write to {self.location} ({self.reason})"


@contextmanager
def owned(location: str, *, doing: str) -> Iterator[None]:
    """Own what the file or object at `location` stands for. Raises AlreadyOwnedError while another process does, and
    NotWritableError.

    `doing` says what the owner does, for the error that other processes get. A process that loses it to another, after
    a minute of silence, ends with code 75: two must not write the same files.
    """
    claim = _Claim(location, doing)
    with _hold_object(claim) if storage.is_remote(location) else _hold_file(claim):
        yield


@dataclass(frozen=True, slots=True)
class _Claim:
    """One process's attempt to own a location."""

    location: str
    doing: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def record(self, beat: int = 0) -> str:
        """The file's content for this process; different for each heartbeat."""
        pid = os.getpid()
        found = {"id": self.id, "host": socket.gethostname(), "machine": _machine(), "boot": _boot(), "pid": pid,
                 "started": _started(pid), "beat": beat}  # fmt: skip
        return json.dumps(found).ljust(RECORD_BYTES - 1) + "\n"

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

    def watch(self, owner: Record, *, seconds: float) -> None:
        """Return once an owner on another machine was silent for `seconds` or left. Raises UserError if it is alive."""
        found = (self.location, _name(owner), seconds)
        log.warning("%s is owned by %s: waiting up to %.0f s to see if it is alive", *found)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            time.sleep(BEAT_SECONDS / 5)
            found = self.read()
            if not found:
                return
            if found != owner:
                raise self.refusal(found)


def _name(owner: Record) -> str:
    return f"process {owner.get('pid', '?')} on {owner.get('host', '?')}"


# ---- machines and processes -------------------------------------------------------------------------------


def _machine() -> str:
    """Identifies the machine (across reboots) or container (until a reboot) in which process numbers are valid."""
    own = f"{socket.gethostname()} {_read_line('/etc/machine-id')}"
    space = ""
    with suppress(OSError):
        space = os.readlink("/proc/self/ns/pid")  # noqa: PTH115 - no path
    return own if space in ("", INITIAL_PIDS) else f"{own} {_boot()} {space}"


def _boot() -> str:
    """Identifies the current boot of the machine."""
    return _read_line("/proc/sys/kernel/random/boot_id")


def _read_line(path: str) -> str:
    with suppress(OSError):
        return Path(path).read_text().strip()
    return ""


def _started(pid: int) -> str | None:
    """When a process of this machine started; None for one that is gone, and "" where the system does not say."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:  # another user's
        pass
    state, *fields = _read_line(f"/proc/{pid}/stat").rpartition(")")[2].split() or [""]
    if state and state in "ZX":  # a zombie: it has ended, and its parent has not waited for it
        return None
    return fields[18] if fields else ""


def _is_of_this_machine(owner: Record) -> bool:
    return owner.get("machine") == _machine() and isinstance(owner.get("pid"), int)


def _is_over(owner: Record) -> bool:
    """Whether there is no owner, or the owner is known to be dead."""
    if not _is_of_this_machine(owner):
        return not owner
    started = _started(owner["pid"])
    return owner.get("boot") != _boot() or started is None or (started != "" and started != owner.get("started"))


# ---- a locked file ----------------------------------------------------------------------------------------


@contextmanager
def _hold_file(claim: _Claim) -> Iterator[None]:
    path = Path(claim.location)
    with ExitStack() as stack:
        try:
            stack.enter_context(_folder(path.parent))
            file = _lock(path, claim)
        except OSError as error:
            if error.errno in NO_LOCKS:
                with _hold_object(claim):
                    yield
                return
            raise NotWritableError(str(path.parent), error.strerror or str(error)) from error
        stack.callback(file.close)
        stack.callback(_remove, claim)
        # A child that outlives this process must not keep the lock, which belongs to the open file.
        os.register_at_fork(after_in_child=partial(_close, weakref.ref(file)))
        stack.enter_context(_beating(claim, partial(_rewrite, file)))
        yield


@contextmanager
def _folder(path: Path) -> Iterator[None]:
    """Create a folder if it is missing; at the end remove what was created, if empty."""
    made = [each for each in (path, *path.parents) if not each.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for each in made:
            with suppress(OSError):
                each.rmdir()


def _lock(path: Path, claim: _Claim) -> io.FileIO:
    """The open, locked file that says who owns it. Raises UserError when it is another, and OSError."""
    for _ in range(LOCK_TRIES):
        try:
            file, is_new = io.FileIO(path, "x+"), True
        except FileExistsError:
            try:
                file, is_new = io.FileIO(path, "r+"), False
            except FileNotFoundError:  # its owner has ended
                continue
        try:
            if _take_file(path, file, claim, is_new=is_new):
                return file
        except BaseException:
            file.close()
            raise
        file.close()
    raise claim.refusal(claim.read())


def _take_file(path: Path, file: io.FileIO, claim: _Claim, *, is_new: bool) -> bool:
    """Try to lock the open file and write the record; False if the caller should try again. Raises UserError."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _wait_for_lock(path, claim)
        return False
    if not _is_at(path, file):  # its owner has removed it after it was opened here
        return False
    owner = claim.read()
    certain = is_new or _is_of_this_machine(owner)  # a machine's own locks are seen by all its processes
    if owner and not certain:
        claim.watch(owner, seconds=SILENT_SECONDS)
    elif not certain:
        time.sleep(SETTLE_SECONDS)  # another machine may have made it, and be about to write
    if not certain and claim.read() != owner:
        return False
    _rewrite(file, claim.record())
    if not certain:
        time.sleep(SETTLE_SECONDS)
        if claim.read().get("id") != claim.id:
            raise claim.refusal(claim.read())
    return True


def _wait_for_lock(path: Path, claim: _Claim) -> None:
    """Return when another's lock may be gone. Raises UserError when its owner is alive."""
    owner = claim.read()
    if _is_over(owner):  # the process that holds the lock has not yet written its record
        time.sleep(RETRY_SECONDS)
    elif _is_of_this_machine(owner):
        raise claim.refusal(owner)
    else:  # a file server may keep the lock of a dead machine
        claim.watch(owner, seconds=SILENT_SECONDS + 2 * SETTLE_SECONDS)
        if claim.read() == owner:
            path.unlink(missing_ok=True)


def _is_at(path: Path, file: io.FileIO) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    return False


def _rewrite(file: io.FileIO, record: str) -> None:
    """Replace what the file says, in one write, and for other machines too."""
    os.pwrite(file.fileno(), record.encode(), 0)
    os.ftruncate(file.fileno(), len(record))
    os.fsync(file.fileno())


def _close(reference: "weakref.ref[io.FileIO]") -> None:
    file = reference()
    if file is not None:
        file.close()


# ---- an object, or a file on a disk without locks -----------------------------------------------------------


@contextmanager
def _hold_object(claim: _Claim) -> Iterator[None]:
    try:
        _take_object(claim)
    except OSError as error:
        raise NotWritableError(claim.location, str(error)) from error
    with ExitStack() as stack:
        stack.callback(_remove, claim)
        write = partial(storage.write_atomic, claim.location)
        stack.enter_context(_beating(claim, write, trusting=True))
        yield


def _take_object(claim: _Claim) -> None:
    """Write the claim and check that it remains. Raises UserError if another process owns the location, and OSError."""
    watched = None
    claim.read()  # the first question opens the connection, which takes time
    while True:
        started = time.monotonic()
        owner = claim.read()
        if _is_over(owner) or owner == watched:
            break
        if _is_of_this_machine(owner):
            raise claim.refusal(owner)
        claim.watch(owner, seconds=SILENT_SECONDS)
        watched = owner
    storage.write_atomic(claim.location, claim.record())
    # A slow write may have overwritten a claim already checked by its owner, whose next heartbeat restores it.
    was_slow = time.monotonic() - started > SETTLE_SECONDS
    time.sleep(SETTLE_SECONDS + (BEAT_SECONDS if was_slow else 0))
    owner = claim.read()
    if owner.get("id") != claim.id:
        raise claim.refusal(owner)


def _end_process(claim: _Claim, owner: Record) -> None:
    print(
        f"{_name(owner)} {claim.doing} now ({claim.location}), since this process was silent for a minute or that file "
        "was removed: this process ends at once",
        file=sys.stderr,
        flush=True,
    )
    os._exit(EXIT_PREEMPTED)


# ---- while it is owned --------------------------------------------------------------------------------------


def _remove(claim: _Claim) -> None:
    with suppress(OSError):
        if claim.read().get("id") == claim.id:
            storage.delete(claim.location)


@contextmanager
def _beating(claim: _Claim, write: Callable[[str], None], *, trusting: bool = False) -> Iterator[None]:
    """Write heartbeats while entered. A `trusting` owner checks for another's claim only after it was silent."""
    done = threading.Event()

    def beat() -> None:
        number, renewed = 0, time.time()
        while not done.wait(BEAT_SECONDS):
            number += 1
            with suppress(OSError):
                if not trusting or time.time() - renewed > SILENT_SECONDS:
                    owner = claim.read()
                    if owner.get("id") != claim.id:
                        _end_process(claim, owner)
                        return
                write(claim.record(number))
                renewed = time.time()

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
