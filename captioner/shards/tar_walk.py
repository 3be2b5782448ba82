"""The members of a tar file, read from the tar itself, without an index or a manifest."""

import io
import mmap
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from captioner.files import storage
from captioner.shards.format import BLOCK_BYTES

Buffer = mmap.mmap | bytes


class DamagedTarError(Exception):
    """The tar file is damaged; the message says how, and at which byte."""


@dataclass(frozen=True, slots=True)
class TarMember:
    """A member: `offset` and `size` of its content, and `kind` (`file`, `folder`, …)."""

    name: str
    kind: str
    offset: int
    size: int


@contextmanager
def open_tar(location: str) -> Iterator[Buffer]:
    """A file's content: a memory map of a file on disk, the downloaded bytes of one behind a URL. Raises OSError."""
    if storage.is_remote(location):
        yield storage.read_bytes(location)
        return
    with Path(location).open("rb") as file:
        if not file.seek(0, io.SEEK_END):
            yield b""
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield data


def walk(data: Buffer) -> Iterator[TarMember]:
    """All members in order, of any uncompressed tar that Python reads (USTAR, PAX, GNU).

    Raises DamagedTarError, after the intact members, if the file is cut, has a bad header, or has data after its end.
    An archive without tar's closing blocks is accepted.
    """
    if not len(data):
        raise DamagedTarError("it is empty")
    file = cast("IO[bytes]", io.BytesIO(data) if isinstance(data, bytes) else data)
    file.seek(0)
    end = 0
    try:
        with tarfile.open(fileobj=file, mode="r:", errors="surrogateescape") as tar:
            while (info := tar.next()) is not None:
                tar.members = []  # type: ignore[missing-attribute]  # or all are kept while the archive is open
                if info.offset < end or info.size < 0 or info.offset_data + info.size > len(data):
                    raise DamagedTarError(
                        f"{info.name} at byte {info.offset:,} ends after the end of the file, which is cut"
                    )
                end = info.offset_data + info.size
                yield TarMember(info.name, _kind(info), info.offset_data, info.size)
            stopped = tar.offset
    except DamagedTarError:
        raise
    except Exception as error:  # on hostile bytes tarfile raises nearly anything
        raise DamagedTarError(f"after byte {end:,}: {error or type(error).__name__}") from error
    if any(data[stopped : stopped + BLOCK_BYTES]):
        raise DamagedTarError(f"there is no tar header at byte {stopped:,}")
    if data[stopped:].strip(b"\0"):
        raise DamagedTarError(f"there is data after the end of the archive at byte {stopped:,} (several tars in one?)")


def _kind(info: tarfile.TarInfo) -> str:
    if info.isreg() and not info.issparse():
        return "file"
    if info.isdir():
        return "folder"
    return f"link to {info.linkname}" if info.linkname else f"member of type {info.type!r}"
