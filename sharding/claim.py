"""One packer at a time for a split of a dataset folder.

On disk a file lock, which the system gives back however its holder ends. Behind a URL a small object that its holder
writes anew every few seconds: a holder that was silent for a minute, or whose process is gone, has lost its claim.
"""

import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from captioner import storage
from captioner.cli import UserError

BEAT_SECONDS = 15.0
SILENT_SECONDS = 60.0


@contextmanager
def claim(folder: str, split: str) -> Iterator[None]:
    """Hold the right to pack `split` into `folder`. Raises UserError while another process holds it."""
    location = storage.join(folder, f"{split}.packing")
    with _claim_object(location) if storage.is_remote(folder) else _claim_file(Path(location), split):
        yield


def _me() -> str:
    return json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()})


def _refuse(location: str | Path, holder: dict[str, Any]) -> UserError:
    who = f"process {holder.get('pid', '?')} on {holder.get('host', '?')}"
    return UserError(
        f"{who} is packing this split into this folder ({location}): wait for it, stop it, or give another --output"
    )


def _parse(text: str | bytes) -> dict[str, Any]:
    with suppress(ValueError):
        content = json.loads(text)
        if isinstance(content, dict):
            return content
    return {}


# ---- on disk ----------------------------------------------------------------------------------------------


@contextmanager
def _claim_file(path: Path, split: str) -> Iterator[None]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _lock(path)
    except BlockingIOError as error:
        raise _refuse(path, _parse(path.read_text())) from error
    except OSError as error:
        raise UserError(f"cannot write to {path.parent} ({error.strerror or error}): give another --output") from error
    try:
        file.write(_me())
        file.flush()
        _sweep(path.parent, split)
        yield
    finally:
        _sweep(path.parent, split)
        with suppress(OSError):
            path.unlink(missing_ok=True)
        file.close()


def _lock(path: Path) -> IO[str]:
    """The open, locked file; one that its former holder removed in between is no lock."""
    while True:
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                file.truncate(0)
                return file
        except FileNotFoundError:
            pass
        except OSError:
            file.close()
            raise
        file.close()


def _sweep(folder: Path, split: str) -> None:
    """Remove what a killed packer of this split left half written; the vocabulary is the training packer's."""
    for pattern in (f"{split}[-.]*.partial", *(["vocabulary.json.*.partial"] if split == "train" else [])):
        for path in folder.glob(pattern):
            with suppress(OSError):
                path.unlink()


# ---- behind a URL -----------------------------------------------------------------------------------------


@contextmanager
def _claim_object(location: str) -> Iterator[None]:
    try:
        with suppress(FileNotFoundError):
            holder = _parse(storage.read_bytes(location))
            if _is_alive(holder):
                raise _refuse(location, holder)
        storage.write_atomic(location, _me())
    except OSError as error:
        raise UserError(f"cannot write {location} ({error}): give another --output") from error
    done = threading.Event()
    beat = threading.Thread(target=_beat, args=(location, done), daemon=True)
    beat.start()
    try:
        yield
    finally:
        done.set()
        beat.join()
        with suppress(OSError):
            storage.delete(location)


def _is_alive(holder: dict[str, Any]) -> bool:
    if holder.get("host") == socket.gethostname() and isinstance(pid := holder.get("pid"), int):
        return pid != os.getpid() and _runs(pid)
    written = holder.get("time")
    return isinstance(written, int | float) and abs(time.time() - written) < SILENT_SECONDS


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _beat(location: str, done: threading.Event) -> None:
    while not done.wait(BEAT_SECONDS):
        with suppress(OSError):
            storage.write_atomic(location, _me())
