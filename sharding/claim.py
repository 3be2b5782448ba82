"""One packer at a time for a split of a dataset folder.

On disk a file lock, which the system gives back however its holder ends. Behind a URL, and on disks that know no
locks, a small object that its holder writes anew every few seconds: a holder that was silent for a minute, or whose
process is gone, has lost its claim. Of two that write it at once the later one has it: each looks again a little later.
"""

import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from captioner import storage
from captioner.cli import UserError, console

BEAT_SECONDS = 15.0
SILENT_SECONDS = 60.0
SETTLE_SECONDS = 2.0  # another that found the object free at the same moment has written it by then
WRITE_TRIES = 20
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def claim_location(folder: str, split: str) -> str:
    """The file or object that stands while a split is packed."""
    return storage.join(folder, f"{split}.packing")


@contextmanager
def claim(folder: str, split: str) -> Iterator[None]:
    """Hold the right to pack `split` into `folder`. Raises UserError while another process holds it."""
    location = claim_location(folder, split)
    with _claim_object(location) if storage.is_remote(folder) else _claim_file(Path(location), split):
        yield


def _record(claim_id: str) -> str:
    return json.dumps({"id": claim_id, "host": _host(), "pid": os.getpid(), "time": time.time()})


def _host() -> str:
    """This machine, and where it runs containers this one of them: process numbers count within."""
    space = ""
    with suppress(OSError):
        space = os.readlink("/proc/self/ns/pid")  # noqa: PTH115 - no path
    return f"{socket.gethostname()} {space}".rstrip()


def _parse(text: str | bytes) -> dict[str, Any]:
    with suppress(ValueError):
        content = json.loads(text)
        if isinstance(content, dict):
            return content
    return {}


def _refusal(location: str | Path, holder: dict[str, Any]) -> UserError:
    who = f"process {holder.get('pid', '?')} on {str(holder.get('host', '?')).partition(' ')[0]}"
    return UserError(
        f"{who} is packing this split into this folder ({location}): wait for it, stop it, or give another --output"
    )


# ---- on disk ----------------------------------------------------------------------------------------------


@contextmanager
def _claim_file(path: Path, split: str) -> Iterator[None]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _lock(path)
    except OSError as error:
        if error.errno in NO_LOCKS:
            with _claim_object(str(path)):
                _sweep(path.parent, split)
                yield
            return
        raise UserError(f"cannot write to {path.parent} ({error.strerror or error}): give another --output") from error
    try:
        _sweep(path.parent, split)
        yield
    finally:
        _sweep(path.parent, split)
        with suppress(OSError):
            path.unlink(missing_ok=True)
        file.close()


def _lock(path: Path) -> IO[str]:
    """The open, locked file that says who holds it. Raises UserError when it is another, and OSError.

    A file that its former holder removed after it was opened here is no lock: the next one is made.
    """
    for _ in range(WRITE_TRIES):
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                file.truncate(0)
                file.write(_record(""))
                file.flush()
                return file
        except FileNotFoundError:
            pass
        except BlockingIOError as error:
            file.seek(0)
            if holder := _parse(file.read()):
                file.close()
                raise _refusal(path, holder) from error
            time.sleep(0.05)  # it has the lock and is about to write who it is
        except OSError:
            file.close()
            raise
        file.close()
    raise _refusal(path, {})


def _sweep(folder: Path, split: str) -> None:
    """Remove what a killed packer of this split left half written; the vocabulary is the training packer's."""
    for pattern in (f"{split}[-.]*.partial", *(["vocabulary.json.*.partial"] if split == "train" else [])):
        for path in folder.glob(pattern):
            with suppress(OSError):
                path.unlink()


# ---- behind a URL -----------------------------------------------------------------------------------------


@contextmanager
def _claim_object(location: str) -> Iterator[None]:
    claim_id = uuid.uuid4().hex
    try:
        _take(location, claim_id)
    except OSError as error:
        raise UserError(f"cannot write {location} ({error}): give another --output") from error
    done = threading.Event()
    beat = threading.Thread(target=_beat, args=(location, claim_id, done), daemon=True)
    beat.start()
    try:
        yield
    finally:
        done.set()
        beat.join()
        with suppress(OSError):
            if _read(location).get("id") == claim_id:
                storage.delete(location)


def _take(location: str, claim_id: str) -> None:
    """Write the claim and look whether it stays. Raises UserError when another holds it, and OSError."""
    watched = None
    _read(location)  # the first question opens the connection, which takes time
    while True:
        started = time.monotonic()
        holder = _read(location)
        if _is_over(holder) or holder == watched:
            break
        if watched is not None or _is_fresh(holder):
            raise _refusal(location, holder)
        console.print(f"watching for {2 * BEAT_SECONDS:.0f} s whether {location} is of a packer that lives")
        time.sleep(2 * BEAT_SECONDS)
        watched = holder
    storage.write_atomic(location, _record(claim_id))
    # A slow write may have hit the claim of one that has looked already; that one's next beat shows.
    was_slow = time.monotonic() - started > SETTLE_SECONDS
    time.sleep(SETTLE_SECONDS + (BEAT_SECONDS if was_slow else 0))
    holder = _read(location)
    if holder.get("id") != claim_id:
        raise _refusal(location, holder)


def _read(location: str) -> dict[str, Any]:
    """Who holds the claim; empty for nobody."""
    try:
        return _parse(storage.read_bytes(location))
    except FileNotFoundError:
        return {}


def _is_over(holder: dict[str, Any]) -> bool:
    """Whether there is no claim, or its process is known to be gone."""
    pid = holder.get("pid")
    if not isinstance(pid, int) or holder.get("host") != _host():
        return not holder
    if pid == os.getpid():
        return True  # a process before this one had its number
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False


def _is_fresh(holder: dict[str, Any]) -> bool:
    """Whether a claim was written within the last minute, as far as the clocks of two machines agree."""
    written = holder.get("time")
    return isinstance(written, int | float) and abs(time.time() - written) < SILENT_SECONDS


def _beat(location: str, claim_id: str, done: threading.Event) -> None:
    """Renew the claim. One that was silent for long, as on a sleeping machine, and finds another's, has lost it."""
    renewed = time.time()
    while not done.wait(BEAT_SECONDS):
        with suppress(OSError):
            if time.time() - renewed > SILENT_SECONDS and _read(location).get("id") != claim_id:
                return
            storage.write_atomic(location, _record(claim_id))
            renewed = time.time()
