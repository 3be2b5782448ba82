"""Files on disk or behind a URL, through one set of functions.

A location is a string: a local path, or a URL that fsspec knows (`s3://bucket/coco`, `http://host/shards`). Remote
operations are tried several times, with growing pauses, before they fail; every failure is an OSError.
"""

import json
import os
import random
import stat
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from fsspec.core import url_to_fs

from captioner.cli import UserError

NUM_TRIES = 5
FIRST_PAUSE_SECONDS = 0.2
NUM_THREADS = 32  # of questions asked at once: they wait for the network or the disk, not for the processor
UNKNOWN = -1
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
OBJECT_STORES = frozenset(("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oci", "oss", "memory"))

Result = TypeVar("Result")


def is_remote(location: str) -> bool:
    """Whether `location` is a URL and not a local path."""
    return "://" in location


def join(folder: str, *names: str) -> str:
    """`folder/name/...` for paths and URLs alike; in a web address the names are quoted."""
    if folder.startswith(("http://", "https://")):
        names = tuple(quote(name, errors="surrogateescape") for name in names)
    return "/".join((folder.rstrip("/") or "/", *names))


def exists(location: str) -> bool:
    """Whether there is a file or folder at `location`."""
    if not is_remote(location):
        return Path(location).exists()
    filesystem, path = _filesystem(location)
    return _patiently(lambda: filesystem.exists(path), location)


def size_bytes(location: str) -> int:
    """A file's size, UNKNOWN where a server does not say. Raises OSError (FileNotFoundError among them)."""
    if not is_remote(location):
        return Path(location).stat().st_size
    filesystem, path = _filesystem(location)
    size = _patiently(lambda: filesystem.info(path), location)["size"]
    return UNKNOWN if size is None else size


def sizes_bytes(folder: str, names: Sequence[str]) -> list[int | None]:
    """Sizes of the files `names` in `folder`, in order: None where there is no regular file, or UNKNOWN.

    Object stores are asked with one listing, web servers and disks with a question a file, many at once.
    """
    if not is_remote(folder):
        return _ask_all(_local_size, [join(folder, name) for name in names])
    filesystem, root = _filesystem(folder)
    if folder.startswith(("http://", "https://")):
        return _ask_all(_remote_size, [join(folder, name) for name in names])
    listing = _patiently(lambda: filesystem.find(root, detail=True), folder)
    sizes = {path: UNKNOWN if info["size"] is None else info["size"] for path, info in listing.items()}
    return [sizes.get(join(root, name)) for name in names]


def _ask_all(question: Callable[[str], int | None], locations: Sequence[str]) -> list[int | None]:
    with ThreadPoolExecutor(NUM_THREADS) as threads:
        return list(threads.map(question, locations))


def _local_size(path: str) -> int | None:
    try:
        found = os.stat(path)  # noqa: PTH116 - a Path for each of a million pictures costs seconds
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def _remote_size(location: str) -> int | None:
    try:
        return size_bytes(location)
    except FileNotFoundError:
        return None


def read_bytes(location: str) -> bytes:
    """The whole content of a file. Raises OSError (FileNotFoundError among them)."""
    if not is_remote(location):
        return Path(location).read_bytes()
    filesystem, path = _filesystem(location)
    return _patiently(lambda: filesystem.cat_file(path), location)


def read_json(location: str, *, remedy: str) -> Any:
    """The JSON content of a file. Raises UserError, ending with `remedy`, when it is absent or no JSON."""
    try:
        return json.loads(read_bytes(location))
    except FileNotFoundError as error:
        raise UserError(f"there is no {location}: {remedy}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {location} ({error}): {remedy}") from error


def write_atomic(location: str, content: bytes | str) -> None:
    """Write a file so that its name holds either the whole content or what it held before. Raises OSError.

    On disk the content and the new name are there to stay (fsync) when this returns.
    """
    data = content.encode() if isinstance(content, str) else content
    if is_remote(location):
        filesystem, path = _filesystem(location)
        _patiently(lambda: _put(filesystem, path, data), location)
        return
    path = Path(location)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make a rename in the folder outlive a power cut, where the system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _put(filesystem: Any, path: str, data: bytes) -> None:
    """Object stores show an object only when it is whole; elsewhere a rename does that."""
    protocols = filesystem.protocol if isinstance(filesystem.protocol, tuple) else (filesystem.protocol,)
    if OBJECT_STORES.intersection(protocols):
        filesystem.pipe_file(path, data)
        return
    filesystem.makedirs(filesystem._parent(path), exist_ok=True)
    filesystem.pipe_file(f"{path}.partial", data)
    filesystem.mv(f"{path}.partial", path)


def delete(location: str) -> None:
    """Remove a file if it is there. Raises OSError."""
    if not is_remote(location):
        Path(location).unlink(missing_ok=True)
        return
    filesystem, path = _filesystem(location)
    with suppress(FileNotFoundError):
        _patiently(lambda: filesystem.rm_file(path), location)


def _filesystem(location: str) -> tuple[Any, str]:
    """fsspec's filesystem and the path in it. Raises UserError where the package for such URLs is not installed."""
    try:
        return url_to_fs(location)
    except (ImportError, ValueError) as error:
        raise UserError(f"cannot open {location} ({error}): pip install 'captioner[s3]' for s3:// addresses") from error


def _patiently(action: Callable[[], Result], location: str) -> Result:
    """What `action` gives, tried again after failures that may pass. Raises OSError."""
    for attempt in range(1, NUM_TRIES + 1):
        try:
            return action()
        except FINAL:
            raise
        except Exception as error:  # each filesystem has its own errors: aiohttp's, botocore's, TimeoutError
            if attempt == NUM_TRIES or _is_refusal(error):
                raise OSError(f"{location}: {type(error).__name__}: {error}") from error
        time.sleep(FIRST_PAUSE_SECONDS * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))
    raise AssertionError("the last attempt returns or raises")


def _is_refusal(error: Exception) -> bool:
    """Whether a server answered that the question is wrong, and will answer so again."""
    status = getattr(error, "status", None)
    return isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429)
