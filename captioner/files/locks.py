"""Exclusive locks on files, which end with the process that holds them."""

import errno
import io
import os
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

from filelock import lock_descriptor

POLL_SECONDS = 0.005
MAX_SECONDS = 30.0
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # errors of file systems without locks

_threads = threading.Lock()


def open_locked(path: Path) -> io.FileIO:
    """The file at `path`, created if missing, opened for reading and writing and locked until it is closed.

    Forked children close it, or they would keep the lock of a parent that was killed. Raises BlockingIOError while
    another process holds the lock, and OSError (with an errno of UNSUPPORTED on file systems without locks).
    """
    file = _open_locked(path)
    os.register_at_fork(after_in_child=partial(_close, weakref.ref(file)))
    return file


def _open_locked(path: Path) -> io.FileIO:
    file = io.FileIO(path, "r+", opener=lambda name, flags: os.open(name, flags | os.O_CREAT, 0o666))
    try:
        is_locked = lock_descriptor(file.fileno(), blocking=False)
        if not is_locked or not _is_at(file, path):  # its last owner has removed it meanwhile
            raise BlockingIOError(errno.EWOULDBLOCK, "is locked by another process", str(path))
    except BaseException:
        file.close()
        raise
    return file


def _is_at(file: io.FileIO, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """A block in which one thread of one process is at a time; others wait. The file at `path` exists meanwhile.

    On a file system without locks it excludes the threads of this process only. Raises OSError, which is a
    BlockingIOError if another process holds the lock for MAX_SECONDS.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _threads, ExitStack() as stack:
        deadline = time.monotonic() + MAX_SECONDS
        while True:
            try:
                stack.enter_context(_open_locked(path))
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(POLL_SECONDS)
            except OSError as error:
                if error.errno not in UNSUPPORTED:
                    raise
                break
        stack.callback(path.unlink, missing_ok=True)  # while it is locked
        yield


def _close(reference: "weakref.ref[io.FileIO]") -> None:
    file = reference()
    if file is not None:
        file.close()
