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

STALL_SECONDS = 15.0  # without a byte from the server, after which a request has failed
KEEPALIVE_SECONDS = 12.0  # below STALL_SECONDS: a retry after a stall opens a new connection
SLOWEST_TRANSFER = 100_000  # bytes a second; slower uploads and downloads are retried
NUM_THREADS = 32  # for requests that wait for the network or the disk, not for the processor
FILES_PER_TASK = 64  # one task a file would take 2 GB for a million files
UNKNOWN = -1
MISSING = (404, 410)
NO_HARD_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK)
S3 = ("s3://", "s3a://")
WEB = ("http://", "https://")
OBJECT_STORES = frozenset(("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oci", "oss", "memory"))


def is_remote(location: str) -> bool:
    """Whether `location` is a URL and not a local path."""
    return "://" in location


def join(folder: str, *names: str) -> str:
    """`folder/name/...` for paths and URLs; the names are percent-encoded in http URLs."""
    if folder.startswith(WEB):
        names = tuple(quote(name, errors="surrogatepass") for name in names)
    start = folder if folder.endswith("://") else folder.rstrip("/") + "/"
    return start + "/".join(names)


def exists(location: str) -> bool:
    """Whether there is a file or folder at `location`; on the web, whether the server does not answer 404 or 410.

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
    """A file's size; UNKNOWN if the server does not report it. Raises OSError (FileNotFoundError among them)."""
    if not is_remote(location):
        return Path(location).stat().st_size
    filesystem, path = _filesystem(location)
    if location.startswith(WEB):
        return retry(lambda: _run(filesystem, _web_size, path), location, patience_seconds)
    size = retry(lambda: filesystem.info(path), location, patience_seconds)["size"]
    return UNKNOWN if size is None else size


def _run(filesystem: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of an async function in the event loop of the filesystem."""
    run: Any = sync  # fsspec's annotation says that it returns None
    return run(filesystem.loop, function, filesystem, *arguments)


async def _web_size(filesystem: Any, url: str) -> int:
    """A web file's size. fsspec's own function reports any failure, of the network too, as a missing file."""
    session = await filesystem.set_session()
    headers = {"Accept-Encoding": "identity"}
    async with session.head(filesystem.encode_url(url), allow_redirects=True, headers=headers) as answer:
        if answer.status in MISSING:
            raise FileNotFoundError(url)
        if is_refused(answer.status) or answer.status == 501:  # perhaps HEAD only: reading will show
            return UNKNOWN
        answer.raise_for_status()
        is_compressed = answer.headers.get("Content-Encoding", "identity") != "identity"
        return UNKNOWN if is_compressed else int(answer.headers.get("Content-Length", UNKNOWN))


def sizes_bytes(folder: str, names: Sequence[str]) -> list[int | None]:
    """Sizes of the files `names` in `folder`, in order: None for a missing or special file, or UNKNOWN.

    Object stores get one listing; web servers and disks one request a file, in parallel. Raises OSError.
    """
    if is_remote(folder) and not folder.startswith(WEB):
        sizes = _find_all(folder)
        return [sizes.get(name) for name in names]
    locations = [join(folder, name) for name in names]
    tasks = [locations[first : first + FILES_PER_TASK] for first in range(0, len(locations), FILES_PER_TASK)]
    threads = ThreadPoolExecutor(NUM_THREADS)
    try:
        return list(chain.from_iterable(threads.map(lambda task: [_size_or_none(each) for each in task], tasks)))
    finally:
        threads.shutdown(cancel_futures=True)


def _size_or_none(location: str) -> int | None:
    try:
        if is_remote(location):
            return size_bytes(location)
        found = os.stat(location)  # noqa: PTH116 - a Path for each of a million images costs seconds
    except PermissionError:
        return UNKNOWN  # reading will show
    except StorageError:
        raise
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a name that no file can have
        return None
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            return None
        raise StorageError(f"cannot look at {location} ({error.strerror}): fix this and run again") from error
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def list_files(folder: str) -> list[str]:
    """The names of the files in a folder, sorted; on the web, of the files that its page links to. Raises OSError."""
    if not is_remote(folder):
        return sorted(path.name for path in Path(folder).iterdir() if path.is_file())
    names = [name for name, is_folder in scan_folder(folder) if not is_folder]
    return sorted(map(unquote, names) if folder.startswith(WEB) else names)


def find_files(folder: str, pattern: str) -> list[str]:
    """The paths of the files below a folder that match a glob pattern such as `*/*.tar`, sorted. Raises OSError."""
    if not is_remote(folder):
        root = Path(folder)
        if not root.is_dir():
            raise FileNotFoundError(errno.ENOENT, "there is no such folder", folder)
        return sorted(path.relative_to(root).as_posix() for path in root.glob(pattern) if path.is_file())
    names = _find_all(folder)
    return sorted(name for name in names if fnmatch(name, pattern) and name.count("/") == pattern.count("/"))


def _find_all(folder: str) -> dict[str, int]:
    """The sizes of all files below a remote folder (UNKNOWN if not reported), by their paths in it."""
    filesystem, root = _filesystem(folder)
    if folder.startswith(S3):
        prefix = _s3_prefix(filesystem, folder)["Prefix"]
        entries = (entry for page in _s3_pages(filesystem, folder) for entry in page.get("Contents", []))
        sizes = {entry["Key"].removeprefix(prefix): entry["Size"] for entry in entries}
        return {name: size for name, size in sizes.items() if name[-1:] not in ("", "/")}  # not folder markers
    found = retry(lambda: filesystem.find(root, detail=True), folder)
    sizes = {path: UNKNOWN if info["size"] is None else info["size"] for path, info in found.items()}
    return {path.removeprefix(root).lstrip("/"): size for path, size in sizes.items()}


def is_folder(location: str) -> bool:
    """Whether `location` is a folder; on the web, whether its page links to files. Raises OSError."""
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
    """Each name in a remote folder, and whether it is a folder, in the server's order.

    On S3 page by page, elsewhere after the whole listing. Web names stay percent-encoded. Raises OSError.
    """
    filesystem, path = _filesystem(f"{folder.rstrip('/')}/" if folder.startswith(WEB) else folder)
    if folder.startswith(S3) and path:
        yield from _scan_s3(filesystem, folder)
        return
    for entry in retry(lambda: filesystem.ls(path, detail=True), folder):
        name = entry["name"].rstrip("/")
        if name == path.rstrip("/"):  # a folder marker
            continue
        if folder.startswith(WEB):  # a page may also link to its other sort orders, and to the folder above
            name = unescape(name).removeprefix(path).removeprefix("./")
            if not name.strip(".") or any(mark in name for mark in "/?#"):
                continue
        yield name.rpartition("/")[2], entry["type"] == "directory"


def _scan_s3(filesystem: Any, folder: str) -> Iterator[tuple[str, bool]]:
    """The same page by page; fsspec would hold all of a folder's objects before it returns the first."""
    prefix = _s3_prefix(filesystem, folder)["Prefix"]
    for page in _s3_pages(filesystem, folder, Delimiter="/"):
        for entry in page.get("CommonPrefixes", []):
            yield entry["Prefix"].removeprefix(prefix).removesuffix("/"), True
        for entry in page.get("Contents", []):
            if entry["Key"] != prefix:  # a folder marker
                yield entry["Key"].removeprefix(prefix), False


def _s3_pages(filesystem: Any, folder: str, **options: str) -> Iterator[dict[str, Any]]:
    """A listing page by page, each retried by itself: a million objects are a thousand requests."""
    request = {**_s3_prefix(filesystem, folder), **options, **getattr(filesystem, "req_kw", {})}
    while True:
        page = retry(lambda: filesystem.call_s3("list_objects_v2", **request), folder)
        yield page
        if not page.get("IsTruncated"):
            return
        request["ContinuationToken"] = page["NextContinuationToken"]


def _s3_prefix(filesystem: Any, folder: str) -> dict[str, str]:
    """A folder's bucket, and the prefix of the keys of all its objects."""
    bucket = filesystem.split_path(folder)[0]  # which may contain a slash: an access point's
    prefix = folder.partition("://")[2].removeprefix(bucket).removeprefix("/")
    return {"Bucket": bucket, "Prefix": prefix if not prefix or prefix.endswith("/") else f"{prefix}/"}


def read_bytes(location: str, *, end: int | None = None, patience_seconds: float | None = None) -> bytes:
    """The content of a file, whole or up to `end`. Raises OSError (FileNotFoundError among them)."""
    if not is_remote(location):
        with open(location, "rb") as file:  # noqa: PTH123 - a Path takes twice as long
            return file.read() if end is None else file.read(end)
    filesystem, path = _filesystem(location)
    if end is not None and location.startswith(WEB):
        return retry(lambda: _read_web(filesystem, path, end), location, patience_seconds)
    return retry(lambda: _cat(filesystem, path, end), location, patience_seconds)


def _read_web(filesystem: Any, url: str, end: int) -> bytes:
    """A web file up to `end`, as a stream: a server that ignores Range would send the whole file to `cat_file`."""
    data, headers = bytearray(), {**filesystem.kwargs.get("headers", {}), "Accept-Encoding": "identity"}
    with filesystem.open(url, block_size=0, size=UNKNOWN, headers=headers) as stream:
        while len(data) < end and (chunk := stream.read(end - len(data))):
            data += chunk
    return bytes(data)


def _cat(filesystem: Any, path: str, end: int | None) -> bytes:
    try:
        return filesystem.cat_file(path, end=end)
    except Exception as error:
        if end is None or getattr(error, "errno", None) != errno.EINVAL:
            raise
        return filesystem.cat_file(path)  # S3 refuses a range of an empty object


def read_range(location: str, *, start: int, end: int, patience_seconds: float | None = None) -> bytes:
    """Bytes [start, end) of a file; more if the server ignores Range.

    Raises OSError when the file is shorter (FileNotFoundError when it is missing).
    """
    if not is_remote(location):
        with open(location, "rb") as file:  # noqa: PTH123 - as in read_bytes
            file.seek(start)
            return _check_range(file.read(end - start), start, end)
    filesystem, path = _filesystem(location)
    options: dict[str, Any] = {"headers": {"Accept-Encoding": "identity"}} if location.startswith(WEB) else {}
    if filesystem.async_impl:
        options["timeout"] = 4 * STALL_SECONDS + (end - start) / SLOWEST_TRANSFER

    def request() -> bytes:
        return _check_range(filesystem.cat_file(path, start=start, end=end, **options), start, end)

    return retry(request, location, patience_seconds)


def _check_range(data: bytes, start: int, end: int) -> bytes:
    if len(data) == end - start:
        return data
    if len(data) >= end:
        return data[start:]
    raise OSError(f"received {len(data):,} of the {end - start:,} bytes from {start:,} on")


def read_required(location: str, *, remedy: str) -> bytes:
    """The content of a file. Raises UserError, with `remedy`, when the file is missing or cannot be read."""
    try:
        return read_bytes(location)
    except FileNotFoundError as error:
        raise UserError(f"there is no {location}: {remedy}") from error
    except OSError as error:
        raise UserError(f"cannot read {location} ({error}): {remedy}") from error


def read_json(location: str, *, remedy: str) -> Any:
    """The parsed JSON of a file. Raises UserError, with `remedy`, when the file is missing or not JSON."""
    content = read_required(location, remedy=remedy)
    try:
        return json.loads(content)
    except ValueError as error:
        raise UserError(f"cannot read {location} ({error}): {remedy}") from error


def write_atomic(location: str, content: bytes | str, *, durable: bool = True) -> None:
    """Write a file whose name always holds either the whole content or what it held before. Raises OSError.

    On disk, content and name are on the disk (fsync) when this returns, unless they need not be `durable`. Symbolic
    links are followed; pipes and character devices, which cannot be replaced, are written to.
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
    with replacing(path, durable=durable) as file:
        file.write(data)


@contextmanager
def replacing(path: Path, *, partial: Path | None = None, durable: bool = True) -> Iterator[BinaryIO]:
    """A temporary file, named `partial` if given, that atomically replaces `path` when the block ends without an error.

    Content and name are on the disk (fsync) then, unless they need not be `durable`. Raises OSError.
    """
    partial = partial or path.with_name(f"{path.name}.{uuid4().hex}.partial")  # two machines may write the same file
    try:
        with partial.open("wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    if durable:
        _sync_folder(path.parent)


def write_new(location: str, content: bytes | str, *, etag: str | None = None) -> None:
    """Write a file that does not exist, whole or not at all; with `etag`, replace an S3 object that still has it.

    Raises FileExistsError when the file exists or the object has changed, and OSError. Of several writers one succeeds
    on disk, and on servers with conditional requests (S3, Google Cloud Storage).
    """
    data = content.encode() if isinstance(content, str) else content
    if not is_remote(location):
        _create(Path(location), data)
        return
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


def _create(path: Path, data: bytes) -> None:
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    partial = path.with_name(f".{uuid4().hex}.partial")
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
    """`path` opened for writing if it cannot be replaced: a pipe, a character device, this process's own output.

    None if it is a file, a folder or missing. Raises OSError for block devices and sockets.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    for descriptor in (1, 2):  # /dev/stdout may be a file, and later output would go to the replaced one
        with suppress(OSError):
            if os.path.samestat(found, os.fstat(descriptor)):
                return os.fdopen(os.dup(descriptor), "wb")
    if stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode):
        return None
    if stat.S_ISFIFO(found.st_mode) or stat.S_ISCHR(found.st_mode):
        return path.open("wb")
    raise OSError(errno.ENXIO, "is neither a file nor a pipe", str(path))


def _sync_folder(folder: Path) -> None:
    """Write the names in a folder to the disk, where the system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _put(filesystem: Any, path: str, data: bytes, **condition: str) -> None:
    """Write a remote file atomically: object stores show complete objects only, other servers rename."""
    protocols = filesystem.protocol if isinstance(filesystem.protocol, tuple) else (filesystem.protocol,)
    if OBJECT_STORES.intersection(protocols):
        limit = {"timeout": 4 * STALL_SECONDS + len(data) / SLOWEST_TRANSFER} if filesystem.async_impl else {}
        if "s3" in protocols:
            from botocore.handlers import add_expect_header

            # "Expect: 100-continue" has no timeout of its own: a dead connection would block for the whole request's
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
    """Remove a file if it exists. Raises OSError."""
    if not is_remote(location):
        Path(location).unlink(missing_ok=True)
        return
    filesystem, path = _filesystem(location)
    with suppress(FileNotFoundError):
        retry(lambda: filesystem.rm_file(path), location)


# ---- servers ----------------------------------------------------------------------------------------------


def _filesystem(location: str) -> tuple[Any, str]:
    """fsspec's filesystem and the path in it. Raises StorageError for a URL that fsspec cannot open."""
    try:
        filesystem, path = url_to_fs(location, **_options(location))
    except ImportError as error:
        raise StorageError(
            f"cannot open {location} ({error}): s3:// and http:// need pip install -e '.[s3]'"
        ) from error
    except Exception as error:  # some connect here, and raise their libraries' own errors
        raise StorageError(f"cannot open {location} ({error}): give a local path, or another URL") from error
    if isinstance(filesystem, LocalFileSystem):
        raise StorageError(f"{location} is on this machine: give its path alone, {path}")
    if location.startswith(S3):
        filesystem.retries = 1  # `retry` does that
    filesystem.invalidate_cache()  # of listings, which other processes change
    return filesystem, path


def _options(location: str) -> dict[str, Any]:
    """Arguments for fsspec's filesystem, with the user's configuration: timeouts for servers that stall."""
    protocol = location.partition("://")[0]
    if location.startswith(WEB):
        from aiohttp import ClientTimeout

        timeout = ClientTimeout(total=None, sock_connect=STALL_SECONDS, sock_read=STALL_SECONDS)
        return {"client_kwargs": {"timeout": timeout, **_configured(protocol, "client_kwargs")}}
    if protocol in ("s3", "s3a"):
        limits = {"connect_timeout": STALL_SECONDS, "read_timeout": STALL_SECONDS}
        retries = {"retries": {"total_max_attempts": 1}}  # `retry` does that, and logs them
        from aiobotocore import config

        connections: dict[str, Any] = {"keepalive_timeout": KEEPALIVE_SECONDS}
        if hasattr(config, "SocketFactoryType"):  # else only the request's timeout ends an upload to a dead server
            connections["socket_factory"] = _open_socket
        settings = {**limits, **retries, "connector_args": connections}
        return {
            "config_kwargs": {**settings, **_configured(protocol, "config_kwargs")},
            "max_concurrency": 1,  # more makes s3fs request the size before each read, and fill gaps with zeros
        }
    return {}


def _open_socket(address: tuple[Any, ...]) -> socket.socket:
    """A socket for aiohttp that fails when sent data stays unacknowledged; aiohttp has no timeout for sending."""
    opened = socket.socket(*address[:3])
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * STALL_SECONDS))
    return opened


def _configured(protocol: str, name: str) -> dict[str, Any]:
    """The user's fsspec configuration for all protocol names of one filesystem."""
    names = ("http", "https") if protocol.startswith("http") else ("s3", "s3a")
    found = [fsspec.config.conf.get(each, {}).get(name, {}) for each in names]
    return {**found[0], **found[1]}
