"""The same functions for files on disk and behind URLs.

A location is a string: a local path, or a URL that fsspec supports (`s3://bucket/coco`, `http://host/shards`). Requests
to servers are retried (`captioner/files/retries.py`), for `patience_seconds` if a function has that argument. Every
failure is an OSError: FileNotFoundError for a missing file, StorageError for a server that fails or refuses.
"""

import errno
import hashlib
import json
import os
import socket
import stat
from collections.abc import Iterator, Sequence
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

STALL_SECONDS = 15.0  # without a byte from the server, after which a request fails
KEEPALIVE_SECONDS = 12.0  # less than STALL_SECONDS, so that a retry after a stall opens a new connection
SLOWEST_TRANSFER = 100_000  # bytes a second; slower uploads and downloads time out and are retried
NUM_THREADS = 32  # more than processors: they wait for the network or the disk
FILES_PER_TASK = 64  # a task for each of a million files would take 2 GB
UNKNOWN = -1  # the size of a file whose server does not report it
MISSING = (404, 410)  # HTTP status codes
NO_HARD_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK)  # errors of file systems without them
S3 = ("s3://", "s3a://")
WEB = ("http://", "https://")
OBJECT_STORES = frozenset(("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oci", "oss", "memory"))


def is_remote(location: str) -> bool:
    """Whether `location` is a URL and not a local path."""
    return "://" in location


def join(folder: str, *names: str) -> str:
    """`folder/name/...`, a path or URL like `folder`; in http URLs the names are percent-encoded."""
    if folder.startswith(WEB):
        names = tuple(quote(name, errors="surrogatepass") for name in names)
    start = folder if folder.endswith("://") else folder.rstrip("/") + "/"
    return start + "/".join(names)


def exists(location: str) -> bool:
    """Whether there is a file or folder at `location`; for http, whether the server does not answer 404 or 410.

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
    """A file's size; UNKNOWN if the server does not report it. Raises OSError (FileNotFoundError if it is missing)."""
    if not is_remote(location):
        return Path(location).stat().st_size
    filesystem, path = _filesystem(location)
    if location.startswith(WEB):
        run: Any = sync  # fsspec annotates it as returning None
        return retry(lambda: run(filesystem.loop, _web_size, filesystem, path), location, patience_seconds)
    size = retry(lambda: filesystem.info(path), location, patience_seconds)["size"]
    return UNKNOWN if size is None else size


async def _web_size(filesystem: Any, url: str) -> int:
    """The size of a file behind an http URL. fsspec's own function reports any failure as a missing file."""
    session = await filesystem.set_session()
    headers = {"Accept-Encoding": "identity"}
    async with session.head(filesystem.encode_url(url), allow_redirects=True, headers=headers) as answer:
        if answer.status in MISSING:
            raise FileNotFoundError(url)
        if is_refused(answer.status) or answer.status == 501:  # perhaps of HEAD only; reading will show
            return UNKNOWN
        answer.raise_for_status()
        is_compressed = answer.headers.get("Content-Encoding", "identity") != "identity"
        return UNKNOWN if is_compressed else int(answer.headers.get("Content-Length", UNKNOWN))


def sizes_bytes(folder: str, names: Sequence[str]) -> list[int | None]:
    """The sizes of the files `names` in `folder`, in order; None for a missing or special file, or UNKNOWN.

    Lists an object store once; asks web servers and disks for each file, in parallel. Raises OSError.
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
        status = os.stat(location)  # noqa: PTH116 - a Path for each of a million images costs seconds
    except PermissionError:
        return UNKNOWN  # reading will show
    except StorageError:
        raise
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a name that no file can have
        return None
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            return None
        raise StorageError(f"cannot read the size of {location} ({error.strerror}): fix this and run again") from error
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def list_files(folder: str) -> list[str]:
    """The sorted names of the files in a folder; for http, of the files that its page links to. Raises OSError."""
    if not is_remote(folder):
        return sorted(path.name for path in Path(folder).iterdir() if path.is_file())
    names = [name for name, is_folder in scan_folder(folder) if not is_folder]
    return sorted(map(unquote, names) if folder.startswith(WEB) else names)


def find_files(folder: str, pattern: str) -> list[str]:
    """The sorted relative paths of the files in a folder that match a glob such as `*/*.tar`. Raises OSError."""
    if not is_remote(folder):
        root = Path(folder)
        if not root.is_dir():
            raise FileNotFoundError(errno.ENOENT, "there is no such folder", folder)
        return sorted(path.relative_to(root).as_posix() for path in root.glob(pattern) if path.is_file())
    names = _find_all(folder)
    return sorted(name for name in names if fnmatch(name, pattern) and name.count("/") == pattern.count("/"))


def _find_all(folder: str) -> dict[str, int]:
    """The sizes (or UNKNOWN) of all files below a remote folder, by relative path."""
    filesystem, root = _filesystem(folder)
    if folder.startswith(S3):
        prefix = _s3_prefix(filesystem, folder)["Prefix"]
        entries = (entry for page in _s3_pages(filesystem, folder) for entry in page.get("Contents", []))
        sizes = {entry["Key"].removeprefix(prefix): entry["Size"] for entry in entries}
        return {name: size for name, size in sizes.items() if name[-1:] not in ("", "/")}  # without folder markers
    files = retry(lambda: filesystem.find(root, detail=True), folder)
    sizes = {path: UNKNOWN if info["size"] is None else info["size"] for path, info in files.items()}
    return {path.removeprefix(root).lstrip("/"): size for path, size in sizes.items()}


def is_folder(location: str) -> bool:
    """Whether `location` is a folder; for http, whether its page links to anything in it. Raises OSError."""
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
    """Yield each name in a remote folder, and whether it is a folder, in the server's order.

    On S3 it yields page by page, elsewhere after the whole listing. Names of http URLs stay percent-encoded. Raises
    OSError.
    """
    filesystem, path = _filesystem(f"{folder.rstrip('/')}/" if folder.startswith(WEB) else folder)
    if folder.startswith(S3) and path:
        yield from _scan_s3(filesystem, folder)
        return
    for entry in retry(lambda: filesystem.ls(path, detail=True), folder):
        name = entry["name"].rstrip("/")
        if name == path.rstrip("/"):  # a folder marker
            continue
        if folder.startswith(WEB):  # a page may also link to its parent, and to itself in other sort orders
            name = unescape(name).removeprefix(path).removeprefix("./")
            if not name.strip(".") or any(character in name for character in "/?#"):
                continue
        yield name.rpartition("/")[2], entry["type"] == "directory"


def _scan_s3(filesystem: Any, folder: str) -> Iterator[tuple[str, bool]]:
    """`scan_folder` on S3, page by page: fsspec would load the whole listing before it returns the first name."""
    prefix = _s3_prefix(filesystem, folder)["Prefix"]
    for page in _s3_pages(filesystem, folder, Delimiter="/"):
        for entry in page.get("CommonPrefixes", []):
            yield entry["Prefix"].removeprefix(prefix).removesuffix("/"), True
        for entry in page.get("Contents", []):
            if entry["Key"] != prefix:  # a folder marker
                yield entry["Key"].removeprefix(prefix), False


def _s3_pages(filesystem: Any, folder: str, **options: str) -> Iterator[dict[str, Any]]:
    """Yield the pages of a listing. Each is retried alone, because a million objects are a thousand pages."""
    request = {**_s3_prefix(filesystem, folder), **options, **getattr(filesystem, "req_kw", {})}
    while True:
        page = retry(lambda: filesystem.call_s3("list_objects_v2", **request), folder)
        yield page
        if not page.get("IsTruncated"):
            return
        request["ContinuationToken"] = page["NextContinuationToken"]


def _s3_prefix(filesystem: Any, folder: str) -> dict[str, str]:
    """A folder's bucket, and the prefix of its objects' keys, as arguments of a request."""
    bucket = filesystem.split_path(folder)[0]  # an access point's contains a slash
    prefix = folder.partition("://")[2].removeprefix(bucket).removeprefix("/")
    return {"Bucket": bucket, "Prefix": prefix if not prefix or prefix.endswith("/") else f"{prefix}/"}


def read_bytes(location: str, *, end: int | None = None, patience_seconds: float | None = None) -> bytes:
    """The content of a file, whole or its first `end` bytes. Raises OSError (FileNotFoundError if it is missing)."""
    if not is_remote(location):
        with open(location, "rb") as file:  # noqa: PTH123 - a Path takes twice as long
            return file.read() if end is None else file.read(end)
    filesystem, path = _filesystem(location)
    if end is not None and location.startswith(WEB):
        return retry(lambda: _read_web(filesystem, path, end), location, patience_seconds)
    return retry(lambda: _cat(filesystem, path, end), location, patience_seconds)


def _read_web(filesystem: Any, url: str, end: int) -> bytes:
    """The first `end` bytes behind an http URL, as a stream: with `cat_file` a server may send the whole file."""
    data, headers = bytearray(), {**filesystem.kwargs.get("headers", {}), "Accept-Encoding": "identity"}
    with filesystem.open(url, block_size=0, size=UNKNOWN, headers=headers) as stream:
        while len(data) < end and (chunk := stream.read(end - len(data))):
            data += chunk
    return bytes(data)


def _cat(filesystem: Any, path: str, end: int | None) -> bytes:
    """The content of a remote file, whole or its first `end` bytes."""
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
    """The response without what is before `start`, in case the server sent the whole file. Raises OSError if cut."""
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
    except StorageError:  # it says what to do
        raise
    except OSError as error:
        raise UserError(f"cannot read {location} ({error}): {remedy}") from error


def read_json(location: str, *, remedy: str) -> Any:
    """The parsed JSON of a file. Raises UserError, with `remedy`, when the file is missing or not JSON."""
    content = read_required(location, remedy=remedy)
    try:
        return json.loads(content)
    except ValueError as error:
        raise UserError(f"cannot read {location} ({error}): {remedy}") from error


def read_json_object(location: str, *, remedy: str) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError, with `remedy`, when the file is missing or holds no JSON object."""
    content = read_json(location, remedy=remedy)
    if not isinstance(content, dict):
        raise UserError(f"cannot read {location} (it is no JSON object): {remedy}")
    return content


def file_sha256(path: Path) -> str:
    """The SHA-256 of a local file, in hexadecimal. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(location: str, content: bytes | str, *, durable: bool = True) -> None:
    """Write a file atomically: it has either its old or its new content, never a part. Raises OSError.

    With `durable`, a local file survives a power cut once this returns (fsync). Symbolic links are followed; pipes and
    character devices, which cannot be replaced, are written to.
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
    path = path.resolve()  # replaces the target of a symbolic link, not the link
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, durable=durable) as file:
        file.write(data)


@contextmanager
def replacing(path: Path, *, partial: Path | None = None, durable: bool = True) -> Iterator[BinaryIO]:
    """Yield a temporary file that atomically replaces `path` when the block ends without an error. Raises OSError.

    It is named `partial` if that is given. With `durable` the file survives a power cut once the block ends (fsync).
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
    """Create a file atomically; with `etag`, replace an S3 object that still has this ETag.

    Raises FileExistsError if the file exists or the object has changed, and OSError. Of several writers exactly one
    succeeds, on disk and on servers with conditional requests (S3, Google Cloud Storage).
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
            if error.errno == errno.EINVAL:  # s3fs's error for status 412, Precondition Failed
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
        with path.open("xb") as file:  # such as memory cards; a kill during the write leaves a part of the file
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
        status = path.stat()
    except FileNotFoundError:
        return None
    for descriptor in (1, 2):  # /dev/stdout may be a file; if it were replaced, later output would go to the old one
        with suppress(OSError):
            if os.path.samestat(status, os.fstat(descriptor)):
                return os.fdopen(os.dup(descriptor), "wb")
    if stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode):
        return None
    if stat.S_ISFIFO(status.st_mode) or stat.S_ISCHR(status.st_mode):
        return path.open("wb")
    raise OSError(errno.ENXIO, "is neither a file nor a pipe", str(path))


def _sync_folder(folder: Path) -> None:
    """Flush the names in a folder to disk, if the system supports that."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _put(filesystem: Any, path: str, data: bytes, **condition: str) -> None:
    """Write a remote file atomically: object stores show only complete objects, on other servers it is renamed."""
    protocols = filesystem.protocol if isinstance(filesystem.protocol, tuple) else (filesystem.protocol,)
    if OBJECT_STORES.intersection(protocols):
        limit = {"timeout": 4 * STALL_SECONDS + len(data) / SLOWEST_TRANSFER} if filesystem.async_impl else {}
        if "s3" in protocols:
            from botocore.handlers import add_expect_header

            # Waiting for "100 Continue" has no timeout: a dead connection would block for the whole request's timeout
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
    """fsspec's filesystem and the path in it. Raises StorageError if fsspec cannot open the URL."""
    try:
        filesystem, path = url_to_fs(location, **_options(location))
    except ImportError as error:
        raise StorageError(
            f"cannot open {location} ({error}): s3:// and http:// need pip install -e '.[s3]'"
        ) from error
    except Exception as error:  # some filesystems connect here, and raise errors of their own libraries
        raise StorageError(f"cannot open {location} ({error}): give a local path, or another URL") from error
    if isinstance(filesystem, LocalFileSystem):
        raise StorageError(f"{location} is on this machine: give its path alone, {path}")
    if location.startswith(S3):
        filesystem.retries = 1  # `retry` retries
    filesystem.invalidate_cache()  # of listings, because other processes change the folders
    return filesystem, path


def _options(location: str) -> dict[str, Any]:
    """Arguments of fsspec's filesystem: timeouts for servers that stall, and the user's own configuration."""
    protocol = location.partition("://")[0]
    if location.startswith(WEB):
        from aiohttp import ClientTimeout

        timeout = ClientTimeout(total=None, sock_connect=STALL_SECONDS, sock_read=STALL_SECONDS)
        return {"client_kwargs": {"timeout": timeout, **_configured(protocol, "client_kwargs")}}
    if protocol in ("s3", "s3a"):
        limits = {"connect_timeout": STALL_SECONDS, "read_timeout": STALL_SECONDS}
        retries = {"retries": {"total_max_attempts": 1}}  # `retry` retries, and logs it
        from aiobotocore import config

        connections: dict[str, Any] = {"keepalive_timeout": KEEPALIVE_SECONDS}
        if hasattr(config, "SocketFactoryType"):  # else only the request's timeout ends an upload to a dead server
            connections["socket_factory"] = _open_socket
        settings = {**limits, **retries, "connector_args": connections}
        return {
            "config_kwargs": {**settings, **_configured(protocol, "config_kwargs")},
            "max_concurrency": 1,  # with more, s3fs requests the size before each read, and fills gaps with zeros
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
    first, second = (fsspec.config.conf.get(each, {}).get(name, {}) for each in names)
    return {**first, **second}
