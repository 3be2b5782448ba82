"""Files on disk or behind a URL, through one set of functions.

A location is a string: a local path, or a URL that fsspec knows (`s3://bucket/coco`, `http://host/shards`). Requests to
servers are retried (`captioner/files/retries.py`), for `patience_seconds` where a function has that argument. Every
failure is an OSError: FileNotFoundError for a missing file, StorageError for a server that fails or refuses.
"""

import errno
import json
import os
import socket
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from html import unescape
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, unquote
from uuid import uuid4

import fsspec
from fsspec.asyn import sync
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from captioner.errors import UserError
from captioner.files.retries import RefusedError, StorageError, is_refused, retry

STALL_SECONDS = 15.0  # without a byte from the server a try has failed
KEPT_SECONDS = 12.0  # that an idle connection is used again; after a stall, none is that may be as dead
SLOWEST_UPLOAD = 100_000  # bytes a second; a server that takes fewer has stopped to listen
SLOWEST_DOWNLOAD = 100_000  # bytes a second; a part that comes slower is asked for again
NUM_THREADS = 32  # of questions asked at once: they wait for the network or the disk, not for the processor
NUM_QUESTIONS = 64  # that a thread takes at once: a task of its own for each of a million files takes 2 GB
UNKNOWN = -1
NO_HARD_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK)
S3 = ("s3://", "s3a://")
WEB = ("http://", "https://")
OBJECT_STORES = frozenset(("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oci", "oss", "memory"))


def is_remote(location: str) -> bool:
    """Whether `location` is a URL and not a local path."""
    return "://" in location


def join(folder: str, *names: str) -> str:
    """`folder/name/...` for paths and URLs alike; in a web address the names are quoted."""
    if folder.startswith(WEB):
        names = tuple(quote(name, errors="surrogatepass") for name in names)
    start = folder if folder.endswith("://") else folder.rstrip("/") + "/"
    return start + "/".join(names)


def exists(location: str) -> bool:
    """Whether there is a file or folder at `location`; of a web address, whether the server does not deny it.

    Raises OSError.
    """
    if not is_remote(location):
        return Path(location).exists()
    try:
        size_bytes(location)
    except FileNotFoundError:
        return False
    return True


def size_bytes(location: str, *, patience_seconds: float | None = None) -> int:
    """A file's size, UNKNOWN where a server does not say. Raises OSError (FileNotFoundError among them)."""
    if not is_remote(location):
        return Path(location).stat().st_size
    filesystem, path = _filesystem(location)
    if location.startswith(WEB):
        ask: Any = sync  # its types say that it gives nothing
        return retry(lambda: ask(filesystem.loop, _ask_web, filesystem, path), location, patience_seconds)
    size = retry(lambda: filesystem.info(path), location, patience_seconds)["size"]
    return UNKNOWN if size is None else size


async def _ask_web(filesystem: Any, url: str) -> int:
    """A web file's size. fsspec's own question takes any failure, of the network too, for a missing file."""
    session = await filesystem.set_session()
    plain = {"Accept-Encoding": "identity"}
    async with session.head(filesystem.encode_url(url), allow_redirects=True, headers=plain) as answer:
        if answer.status in (404, 410):
            raise FileNotFoundError(url)
        if is_refused(answer.status) or answer.status == 501:  # of the question perhaps; reading will show
            return UNKNOWN
        answer.raise_for_status()
        packed = answer.headers.get("Content-Encoding", "identity") != "identity"
        return UNKNOWN if packed else int(answer.headers.get("Content-Length", UNKNOWN))


def sizes_bytes(folder: str, names: Sequence[str]) -> list[int | None]:
    """Sizes of the files `names` in `folder`, in order: None where there is no regular file, or UNKNOWN.

    Object stores are asked with one listing, web servers and disks with a question a file, many at once. Raises
    OSError where a server fails.
    """
    if not is_remote(folder):
        return _ask_all(_local_size, [join(folder, name) for name in names])
    if folder.startswith(WEB):
        return _ask_all(_web_size, [join(folder, name) for name in names])
    sizes = _find_all(folder)
    return [sizes.get(name) for name in names]


def _ask_all(question: Callable[[str], int | None], locations: Sequence[str]) -> list[int | None]:
    parts = [locations[first : first + NUM_QUESTIONS] for first in range(0, len(locations), NUM_QUESTIONS)]
    threads = ThreadPoolExecutor(NUM_THREADS)
    try:
        return list(chain.from_iterable(threads.map(lambda part: [question(location) for location in part], parts)))
    finally:
        threads.shutdown(cancel_futures=True)


def _local_size(path: str) -> int | None:
    try:
        found = os.stat(path)  # noqa: PTH116 - a Path for each of a million pictures costs seconds
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a name that no file can have
        return None
    except PermissionError:
        return UNKNOWN  # reading will tell
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            return None
        raise StorageError(f"cannot look at {path} ({error.strerror}): mend that and run again") from error
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def _web_size(location: str) -> int | None:
    try:
        return size_bytes(location)
    except FileNotFoundError:
        return None


def list_files(folder: str) -> list[str]:
    """The names of the files in a folder, sorted; of a web server, those its page for the folder links to.

    Raises OSError.
    """
    if not is_remote(folder):
        return sorted(path.name for path in Path(folder).iterdir() if path.is_file())
    filesystem, path = _filesystem(folder)
    entries = retry(lambda: filesystem.ls(path, detail=True), folder)
    names = {entry["name"].rpartition("/")[2] for entry in entries if entry["type"] == "file"}
    return sorted(map(unquote, names) if folder.startswith(WEB) else names)


def find_files(folder: str, pattern: str) -> list[str]:
    """The names of the files below a folder that fit `pattern`, sorted; its `/` reach into folders. Raises OSError."""
    if not is_remote(folder):
        root = Path(folder)
        if not root.is_dir():
            raise FileNotFoundError(errno.ENOENT, "there is no such folder", folder)
        return sorted(path.relative_to(root).as_posix() for path in root.glob(pattern) if path.is_file())
    names = _find_all(folder)
    return sorted(name for name in names if fnmatch(name, pattern) and name.count("/") == pattern.count("/"))


def _find_all(folder: str) -> dict[str, int]:
    """The sizes of all files below a remote folder, UNKNOWN where a server does not say, by the rest of their names."""
    filesystem, root = _filesystem(folder)
    if folder.startswith(S3):
        prefix = _s3_place(filesystem, folder)["Prefix"]
        entries = (entry for page in _s3_pages(filesystem, folder) for entry in page.get("Contents", []))
        sizes = {entry["Key"].removeprefix(prefix): entry["Size"] for entry in entries}
        return {name: size for name, size in sizes.items() if name[-1:] not in ("", "/")}  # those are marks of folders
    found = retry(lambda: filesystem.find(root, detail=True), folder)
    sizes = {path: UNKNOWN if info["size"] is None else info["size"] for path, info in found.items()}
    return {path.removeprefix(root).lstrip("/"): size for path, size in sizes.items()}


def is_folder(location: str) -> bool:
    """Whether `location` is a folder; on the web, whether its server lists something there. Raises OSError."""
    if not is_remote(location):
        return Path(location).is_dir()
    try:
        if location.startswith(WEB):
            return any(True for _ in scan_folder(location))
        filesystem, path = _filesystem(location)
        return retry(lambda: filesystem.info(path), location)["type"] == "directory"
    except (FileNotFoundError, RefusedError):
        return False


def scan_folder(folder: str) -> Iterator[tuple[str, bool]]:
    """The names in a remote folder, each with whether it is a folder, as the server gives them.

    Of S3 page by page, of others once the whole folder is known. Web names stay quoted. Raises OSError.
    """
    filesystem, path = _filesystem(f"{folder.rstrip('/')}/" if folder.startswith(WEB) else folder)
    if folder.startswith(S3) and path:
        yield from _scan_s3(filesystem, folder)
        return
    for entry in retry(lambda: filesystem.ls(path, detail=True), folder):
        name = entry["name"].rstrip("/")
        if name == path.rstrip("/"):  # the folder itself, as consoles make one, is no file
            continue
        if folder.startswith(WEB):  # a page may link to anything: to other orders of itself, to the folder above
            name = unescape(name).removeprefix(path).removeprefix("./")
            if not name.strip(".") or any(mark in name for mark in "/?#"):
                continue
        yield name.rpartition("/")[2], entry["type"] == "directory"


def _scan_s3(filesystem: Any, folder: str) -> Iterator[tuple[str, bool]]:
    """fsspec would hold all of a folder's million objects before it tells of the first."""
    prefix = _s3_place(filesystem, folder)["Prefix"]
    for page in _s3_pages(filesystem, folder, Delimiter="/"):
        for entry in page.get("CommonPrefixes", []):
            yield entry["Prefix"].removeprefix(prefix).removesuffix("/"), True
        for entry in page.get("Contents", []):
            if entry["Key"] != prefix:  # the folder itself, as above
                yield entry["Key"].removeprefix(prefix), False


def _s3_pages(filesystem: Any, folder: str, **options: str) -> Iterator[dict[str, Any]]:
    """A listing, page by page, each with patience of its own: one of a million objects is a thousand requests."""
    place = {**_s3_place(filesystem, folder), **options, **getattr(filesystem, "req_kw", {})}
    while True:
        page = retry(lambda: filesystem.call_s3("list_objects_v2", **place), folder)
        yield page
        if not page.get("IsTruncated"):
            return
        place["ContinuationToken"] = page["NextContinuationToken"]


def _s3_place(filesystem: Any, folder: str) -> dict[str, str]:
    """A folder's bucket, and what the keys of all its objects begin with."""
    bucket = filesystem.split_path(folder)[0]  # it may have a slash in it: that of an access point
    prefix = folder.partition("://")[2].removeprefix(bucket).removeprefix("/")
    return {"Bucket": bucket, "Prefix": prefix if not prefix or prefix.endswith("/") else f"{prefix}/"}


def read_bytes(location: str, *, end: int | None = None, patience_seconds: float | None = None) -> bytes:
    """The content of a file, whole or up to `end`. Raises OSError (FileNotFoundError among them)."""
    if not is_remote(location):
        with open(location, "rb") as file:  # noqa: PTH123 - a Path takes as long again
            return file.read() if end is None else file.read(end)
    filesystem, path = _filesystem(location)
    if end is not None and location.startswith(WEB):
        ask: Any = sync  # as in size_bytes
        return retry(lambda: ask(filesystem.loop, _cat_web, filesystem, path, end), location, patience_seconds)
    return retry(lambda: _cat(filesystem, path, end), location, patience_seconds)


async def _cat_web(filesystem: Any, url: str, end: int) -> bytes:
    """A web file up to `end`. fsspec would hold all that comes, and some servers send no parts, or send them packed."""
    session = await filesystem.set_session()
    headers = {**filesystem.kwargs.get("headers", {}), "Accept-Encoding": "identity", "Range": f"bytes=0-{end - 1}"}
    async with session.get(filesystem.encode_url(url), **{**filesystem.kwargs, "headers": headers}) as answer:
        if answer.status == 416:  # an empty file has no first byte to ask for
            return b""
        if answer.status in (404, 410):
            raise FileNotFoundError(url)
        answer.raise_for_status()
        data = bytearray()
        async for chunk in answer.content.iter_any():
            data += chunk
            if len(data) >= end:
                break
        return bytes(data[:end])


def _cat(filesystem: Any, path: str, end: int | None) -> bytes:
    try:
        return filesystem.cat_file(path, end=end)
    except Exception as error:
        if end is None or getattr(error, "errno", None) != errno.EINVAL:
            raise
        return filesystem.cat_file(path)  # an empty file has no first byte to ask for


def read_range(location: str, *, start: int, end: int, patience_seconds: float | None = None) -> bytes:
    """The bytes [start, end) of a file that has so many; all from `start` on where a server sends whole files only.

    Raises OSError (FileNotFoundError among them).
    """
    if not is_remote(location):
        with open(location, "rb") as file:  # noqa: PTH123 - as in read_bytes
            file.seek(start)
            return _check_range(file.read(end - start), start, end)
    filesystem, path = _filesystem(location)
    options: dict[str, Any] = {"headers": {"Accept-Encoding": "identity"}} if location.startswith(WEB) else {}
    if filesystem.async_impl:
        options["timeout"] = 4 * STALL_SECONDS + (end - start) / SLOWEST_DOWNLOAD

    def ask() -> bytes:
        return _check_range(filesystem.cat_file(path, start=start, end=end, **options), start, end)

    return retry(ask, location, patience_seconds)


def _check_range(data: bytes, start: int, end: int) -> bytes:
    if len(data) == end - start:
        return data
    if len(data) >= end:
        return data[start:]
    raise OSError(f"{len(data):,} bytes came of the {end - start:,} from {start:,} on")


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

    On disk, content and name are durable (fsync) when this returns. Symbolic links are followed; pipes
    and character devices, which cannot be replaced, are written to.
    """
    data = content.encode() if isinstance(content, str) else content
    if is_remote(location):
        filesystem, path = _filesystem(location)
        retry(lambda: _put(filesystem, path, data), location)
        return
    path = Path(location)
    stream = _open_stream(path)
    if stream is not None:
        with stream:
            stream.write(data)
        return
    path = path.resolve()  # a symbolic link stays, and its target is written
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(data)


@contextmanager
def replacing(path: Path, *, partial: Path | None = None) -> Iterator[BinaryIO]:
    """A temporary file, named `partial` if given, that atomically replaces `path` when the block ends without an error.

    Content and name are durable (fsync) then. Raises OSError.
    """
    partial = partial or _partial_path(path)
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def _partial_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.{uuid4().hex}.partial")  # two machines may write the same file


def write_new(location: str, content: bytes | str, *, etag: str | None = None) -> None:
    """Write a file that does not exist, whole or not at all; with `etag`, replace an S3 object that still has it.

    Raises FileExistsError when the file exists or the object has changed, and OSError. Of several writers one succeeds
    on disk, and on servers with conditional requests (S3, Google Cloud Storage).
    """
    data = content.encode() if isinstance(content, str) else content
    if is_remote(location):
        filesystem, path = _filesystem(location)
        condition = {"IfMatch": etag} if etag else {"mode": "create"}

        def put() -> None:
            try:
                _put(filesystem, path, data, **condition)
            except OSError as error:
                if error.errno == errno.EINVAL:  # s3fs for status 412, a condition that does not hold
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), location) from error
                raise

        retry(put, location)
        return
    path = Path(location)
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), location)
    partial = _partial_path(path)
    try:
        partial.write_bytes(data)
        os.link(partial, path)
    except OSError as error:
        if error.errno not in NO_HARD_LINKS:
            raise
        with path.open("xb") as file:  # as on memory cards; a kill right here leaves a part of it
            file.write(data)
    finally:
        partial.unlink(missing_ok=True)


def etag(location: str) -> str | None:
    """The ETag of an S3 object, which changes with its content; None for other files. Raises OSError."""
    if not location.startswith(S3):
        return None
    filesystem, path = _filesystem(location)
    with suppress(FileNotFoundError):
        return retry(lambda: filesystem.info(path), location).get("ETag")
    return None


def _open_stream(path: Path) -> BinaryIO | None:
    """What is at `path` opened for writing, where it cannot be replaced: a pipe, a device, this process's output.

    None where there is nothing, or a file or folder. Raises OSError for disks and sockets.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    for descriptor in (1, 2):  # /dev/stdout may be a file, and a renamed one would take the rest of the output along
        with suppress(OSError):
            if os.path.samestat(found, os.fstat(descriptor)):
                return os.fdopen(os.dup(descriptor), "wb")
    if stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode):
        return None
    if stat.S_ISFIFO(found.st_mode) or stat.S_ISCHR(found.st_mode):
        return path.open("wb")
    raise OSError(errno.ENXIO, "is neither a file nor a pipe", str(path))


def sync_folder(folder: Path) -> None:
    """Make a rename in the folder outlive a power cut, where the system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _put(filesystem: Any, path: str, data: bytes, **condition: str) -> None:
    """Object stores show an object only when it is whole; elsewhere a rename does that."""
    protocols = filesystem.protocol if isinstance(filesystem.protocol, tuple) else (filesystem.protocol,)
    if OBJECT_STORES.intersection(protocols):
        limit = {"timeout": 4 * STALL_SECONDS + len(data) / SLOWEST_UPLOAD} if filesystem.async_impl else {}
        if "s3" in protocols:
            from botocore.handlers import add_expect_header

            # it lets an upload wait, with no limit but that of the whole, until the server says that it would take it
            filesystem.connect().meta.events.unregister("before-call.s3", add_expect_header)
        filesystem.pipe_file(path, data, **limit, **condition)
        return
    filesystem.makedirs(filesystem._parent(path), exist_ok=True)
    if condition:
        filesystem.pipe_file(path, data, **condition)
        return
    filesystem.pipe_file(f"{path}.partial", data)
    filesystem.mv(f"{path}.partial", path)


def delete(location: str) -> None:
    """Remove a file if it is there. Raises OSError."""
    if not is_remote(location):
        Path(location).unlink(missing_ok=True)
        return
    filesystem, path = _filesystem(location)
    with suppress(FileNotFoundError):
        retry(lambda: filesystem.rm_file(path), location)


# ---- servers ----------------------------------------------------------------------------------------------


def _filesystem(location: str) -> tuple[Any, str]:
    """fsspec's filesystem and the path in it. Raises StorageError where there is none for such URLs."""
    try:
        filesystem, path = url_to_fs(location, **_options(location))
    except ImportError as error:
        raise StorageError(
            f"cannot open {location} ({error}): s3:// and http:// addresses want pip install -e '.[s3]'"
        ) from error
    except Exception as error:  # some connect at once, and raise their libraries' own errors
        raise StorageError(f"cannot open {location} ({error}): give a local path, or another address") from error
    if isinstance(filesystem, LocalFileSystem):
        raise StorageError(f"{location} is on this machine: give its path alone, {path}")
    if location.startswith(S3):
        filesystem.retries = 1  # the tries are counted here
    filesystem.invalidate_cache()  # of listings: other processes write there too
    return filesystem, path


def _options(location: str) -> dict[str, Any]:
    """What fsspec's filesystem is made with, beside the user's configuration: limits for servers that stall."""
    protocol = location.partition("://")[0]
    if location.startswith(WEB):
        from aiohttp import ClientTimeout

        timeout = ClientTimeout(total=None, sock_connect=STALL_SECONDS, sock_read=STALL_SECONDS)
        return {"client_kwargs": {"timeout": timeout, **_configured(protocol, "client_kwargs")}}
    if protocol in ("s3", "s3a"):
        limits = {"connect_timeout": STALL_SECONDS, "read_timeout": STALL_SECONDS}
        retries = {"retries": {"total_max_attempts": 1}}  # as above; botocore's own would not be told
        from aiobotocore import config

        connections: dict[str, Any] = {"keepalive_timeout": KEPT_SECONDS}
        if hasattr(config, "SocketFactoryType"):  # else only its time limit ends an upload that nobody takes
            connections["socket_factory"] = _open_socket
        settings = {**limits, **retries, "connector_args": connections}
        return {
            "config_kwargs": {**settings, **_configured(protocol, "config_kwargs")},
            "max_concurrency": 1,  # more costs a question for the size before each read, and fills gaps with zeros
        }
    return {}


def _open_socket(address: tuple[Any, ...]) -> socket.socket:
    """A socket for aiohttp, which itself has no limit for sending: it fails when nobody takes what it sends."""
    opened = socket.socket(*address[:3])
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * STALL_SECONDS))
    return opened


def _configured(protocol: str, name: str) -> dict[str, Any]:
    """The user's configuration, as fsspec joins it for the names of one filesystem."""
    names = ("http", "https") if protocol.startswith("http") else ("s3", "s3a")
    found = [fsspec.config.conf.get(each, {}).get(name, {}) for each in names]
    return {**found[0], **found[1]}
