"""Exclusive locks on files, which end with the process that holds them."""

import errno
import io
import os
import time
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from filelock import lock_descriptor

POLL_SECONDS = 0.005
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # errors of file systems without locks


def open_locked(path: Path) -> io.FileIO:
    """The file at `path`, created if missing, opened for reading and writing and locked until it is closed.

    Forked children close it, or they would keep the lock of a parent that was killed. Raises BlockingIOError while
    another process holds the lock, and OSError (with an errno of UNSUPPORTED on file systems without locks).
    """
    file = io.FileIO(path, "r+", opener=lambda name, flags: os.open(name, flags | os.O_CREAT, 0o666))
    try:
        is_locked = lock_descriptor(file.fileno(), blocking=False)
        if not is_locked or not os.fstat(file.fileno()).st_nlink:  # or its last owner has removed it meanwhile
            raise BlockingIOError(errno.EWOULDBLOCK, "is locked by another process", str(path))
    except BaseException:
        file.close()
        raise
    os.register_at_fork(after_in_child=partial(_close, weakref.ref(file)))
    return file


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """A block in which one thread of one process is at a time; others wait. The file at `path` exists meanwhile.

    It does not exclude others on a file system without locks. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(open_locked(path))
                break
            except BlockingIOError:
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
