"""Files on disk or behind a URL, through one set of functions.

A location is a string: a local path, or a URL that fsspec knows (`s3://bucket/coco`, `http://host/shards`).
"""

import json
import os
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs

from captioner.cli import UserError


def is_remote(location: str) -> bool:
    """Whether `location` is a URL and not a local path."""
    return "://" in location


def join(folder: str, *names: str) -> str:
    """`folder/name/...` for paths and URLs alike."""
    return "/".join((folder.rstrip("/") or "/", *names))


def exists(location: str) -> bool:
    """Whether there is a file or folder at `location`."""
    if not is_remote(location):
        return Path(location).exists()
    filesystem, path = url_to_fs(location)
    return filesystem.exists(path)


def size_bytes(location: str) -> int:
    """A file's size. Raises OSError (FileNotFoundError among them)."""
    if not is_remote(location):
        return Path(location).stat().st_size
    filesystem, path = url_to_fs(location)
    return filesystem.info(path)["size"]


def read_bytes(location: str) -> bytes:
    """The whole content of a file. Raises OSError (FileNotFoundError among them)."""
    if not is_remote(location):
        return Path(location).read_bytes()
    filesystem, path = url_to_fs(location)
    return filesystem.cat_file(path)


def read_json(location: str, *, remedy: str) -> Any:
    """The JSON content of a file. Raises UserError, ending with `remedy`, when it is absent or no JSON."""
    try:
        return json.loads(read_bytes(location))
    except FileNotFoundError as error:
        raise UserError(f"there is no {location}: {remedy}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {location} ({error}): {remedy}") from error


def write_atomic(location: str, content: bytes | str) -> None:
    """Write a file so that its name holds either the whole content or what it held before."""
    data = content.encode() if isinstance(content, str) else content
    if is_remote(location):
        filesystem, path = url_to_fs(location)
        filesystem.pipe_file(path, data)
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
