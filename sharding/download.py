"""Large files over HTTP that outlive drops, kills and restarts, and zips unpacked without trusting them.

While `NAME` comes it is `NAME.part`, continued by HTTP Range. Beside it `NAME.source.json` keeps what the
server said of the file when its first byte came (size, ETag, date), so that a file changed in between is
started over, never spliced from two versions.
"""

import errno
import http.client
import json
import re
import shutil
import ssl
import stat
import struct
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from captioner.cli import console, progress_bar
from captioner.errors import UserError
from captioner.files.storage import write_atomic

FORMAT_VERSION = 1
MEGABYTE = 1_000_000
CHUNK_BYTES = 1 << 20
LONGEST_WAIT_SECONDS = 60.0
BUSY_STATUSES = (408, 425, 429)
ROOM_FACTOR = 2  # a zip of photos and, beside it, the photos: JPEG does not compress further
MAX_GROWTH = 100  # captions shrink about tenfold in a zip; what shrank more than a hundredfold is a bomb
GROWTH_SLACK_BYTES = 100 * MEGABYTE
COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
DAMAGE = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, ValueError)


class DroppedError(Exception):
    """A request failed in a way that another try may mend."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """What a server said of a file: its size in bytes, and the marks by which a changed file is told."""

    size: int
    etag: str | None
    last_modified: str | None

    @property
    def validator(self) -> str | None:
        """The value for `If-Range`: a strong ETag (RFC 9110, 13.1.5: never a weak one), else the date."""
        return self.etag if self.etag and not self.etag.startswith("W/") else self.last_modified

    def is_same_file(self, other: "Source") -> bool:
        """Whether both describe one version; a mark that either side lacks says nothing."""
        if self.size != other.size:
            return False
        if self.etag and other.etag:
            return self.etag == other.etag
        return not (self.last_modified and other.last_modified) or self.last_modified == other.last_modified


def download(
    url: str,
    path: Path,
    *,
    timeout_seconds: float = 60.0,
    num_tries: int = 8,
    backoff_seconds: float = 1.0,
) -> Source:
    """Fetch `url` into `path`, which appears by rename once it has every byte that the server announced.

    A `path` that is there is left alone, without a request. Otherwise `path.part` is continued where it
    ended. A lost, silent (`timeout_seconds`) or refused connection (5xx, 408, 425, 429) is tried again after
    a doubling wait; the file has to grow at least once in `num_tries` tries. Raises `UserError` for what no
    retry mends and when the disk has no room for the file and its unpacked content.
    """
    part = path.with_name(f"{path.name}.part")
    if path.exists():
        return _source_of_complete(path)
    furthest, num_failures = _size(part), 0
    while True:
        try:
            source = _continue(url, path, part, timeout_seconds)
            break
        except DroppedError as error:
            grew = _size(part) > furthest
            furthest, num_failures = max(furthest, _size(part)), 0 if grew else num_failures + 1
            if num_failures >= num_tries:
                remedy = "run the same command again to continue"
                raise UserError(f"{url}: {error}, {num_tries} times in a row: {remedy}") from error
            wait_seconds = min(backoff_seconds * 2 ** max(num_failures - 1, 0), LONGEST_WAIT_SECONDS)
            say(f"{path.name}: {error} at {megabytes(_size(part))}; trying again in {wait_seconds:.0f} s")
            time.sleep(wait_seconds)
    part.replace(path)
    say(f"{path.name}: {megabytes(source.size)} downloaded")
    return source


def _continue(url: str, path: Path, part: Path, timeout_seconds: float) -> Source:
    """One connection: append what `part` lacks; raises `DroppedError` when some is still missing."""
    source = read_source(path)
    start = _size(part)
    if source and start and start == source.size:
        return source
    with _get(url, part, start=start, source=source, timeout_seconds=timeout_seconds) as response:
        if source and start and response.status == 206:
            _check_same_version(response, part, start=start, source=source)
        else:
            start, source = 0, _first_answer(url, response)
            part.unlink(missing_ok=True)  # first: the new marks must never stand beside old bytes
            write_json(source_path(path), asdict(source))
        check_room(part.parent, ROOM_FACTOR * source.size - start, f"downloading and unpacking {path.name}")
        _append(response, part, source.size)
    return source


def _get(
    url: str, part: Path, *, start: int, source: Source | None, timeout_seconds: float
) -> http.client.HTTPResponse:
    headers = {"User-Agent": "captioner"}
    if source and start:
        headers["Range"] = f"bytes={start}-"
        if source.validator:
            headers["If-Range"] = source.validator
    try:
        # A fresh opener reads the proxy variables of now; urlopen() would keep those of its first call.
        request = urllib.request.Request(url, headers=headers)
        return urllib.request.build_opener().open(request, timeout=timeout_seconds)
    except urllib.error.HTTPError as error:
        error.close()
        answer = f"the server answered {error.code} {error.reason}"
        if error.code == 416 and start:
            part.unlink()
            raise DroppedError("the file at the server is shorter than ours, starting over") from error
        if error.code in BUSY_STATUSES or error.code >= 500:
            raise DroppedError(answer) from error
        raise UserError(f"{url}: {answer}: check the address") from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLCertVerificationError) or isinstance(error, http.client.InvalidURL):
            raise UserError(f"{url}: {reason}: check the address") from error
        raise DroppedError(f"no connection ({reason})") from error
    except ValueError as error:  # a host name that no name server could be asked for
        raise UserError(f"{url}: {error}: check the address") from error


def _first_answer(url: str, response: http.client.HTTPResponse) -> Source:
    """What a whole-file answer says; raises `UserError` before any byte we have is given up for it."""
    kind = response.headers.get_content_type()
    if response.status != 200 or kind == "text/html":
        raise UserError(f"{url}: the answer is {response.status} {kind}, no file: is a login page between?")
    if response.length is None:
        raise UserError(f"{url}: the server does not say how long the file is: use another mirror")
    return _source(response.length, response)


def _check_same_version(response: http.client.HTTPResponse, part: Path, *, start: int, source: Source) -> None:
    """Raise `DroppedError`, with `part` gone, unless the answer continues `source` at byte `start`.

    If-Range should have seen to it; some servers and proxies ignore that header.
    """
    said = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers["Content-Range"] or "")
    if said and int(said[1]) == start and source.is_same_file(_source(int(said[2]), response)):
        return
    part.unlink()
    raise DroppedError("the file changed at the server, starting over")


def _source(size: int, response: http.client.HTTPResponse) -> Source:
    return Source(size=size, etag=response.headers["ETag"], last_modified=response.headers["Last-Modified"])


def _append(response: http.client.HTTPResponse, part: Path, size: int) -> None:
    start = have = _size(part)
    total = (size - start) // MEGABYTE
    with part.open("ab") as file, progress_bar(part.stem, total=total, unit="MB") as bar:
        while have < size:
            chunk = _read(response, min(CHUNK_BYTES, size - have))
            file.write(chunk)
            shown, have = (have - start) // MEGABYTE, have + len(chunk)
            bar.advance((have - start) // MEGABYTE - shown)


def _read(response: http.client.HTTPResponse, num_bytes: int) -> bytes:
    """The next bytes as they come: read() waits for all of them and loses some when the line goes silent."""
    try:
        chunk = response.read1(num_bytes)
    except (OSError, http.client.HTTPException) as error:
        raise DroppedError(f"the connection was lost ({error})") from error
    if not chunk:
        raise DroppedError("the connection was closed early")
    return chunk


def source_path(path: Path) -> Path:
    """Where the marks of the server's version of `path` are kept."""
    return path.with_name(f"{path.name}.source.json")


def read_source(path: Path) -> Source | None:
    """The marks kept for `path`, or None when there are none in this format version."""
    record = read_json(source_path(path))
    return Source(**record) if record else None


def _source_of_complete(path: Path) -> Source:
    source = read_source(path)
    if source and source.size == _size(path):
        return source
    return Source(size=_size(path), etag=None, last_modified=None)


def unzip(archive: Path, output: Path, *, pattern: str) -> int:
    """Unpack the members that match `pattern` (as `train2014/*.jpg`) under `output`; returns their number.

    All members are looked at first: a name that leaves `output` (which has to be there), a link, or sizes out
    of proportion refuse the archive before anything is written. A file appears by rename with its CRC
    verified; one that is there with the right size and CRC is kept. Raises `UserError`; a damaged or refused
    archive is deleted, so that it is downloaded again.
    """
    try:
        with _open(archive) as opened:
            members = opened.infolist()
            _check_members(members, archive.stat().st_size)
            wanted = [member for member in members if _matches(member.filename, pattern)]
            if not wanted:
                raise zipfile.BadZipFile(f"it holds no {pattern}")
            _extract_all(opened, wanted, output)
    except zipfile.BadZipFile as error:
        archive.unlink()
        remedy = "the zip was deleted: run the same command again to download it afresh"
        raise UserError(f"{archive}: {error}; {remedy}") from error
    say(f"{archive.name}: {len(wanted):,} of {len(members):,} members unpacked")
    return len(wanted)


def _open(archive: Path) -> zipfile.ZipFile:
    with _blame("its list of members"):
        return zipfile.ZipFile(archive)


@contextmanager
def _blame(what: str) -> Iterator[None]:
    """Turn all that zipfile raises on damaged bytes into a `BadZipFile` that names `what`."""
    try:
        yield
    except (*DAMAGE, OSError) as error:
        # A damaged list can send zipfile to before the start of the file; other OSErrors are the disk's.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        raise zipfile.BadZipFile(f"{what} is damaged ({str(error) or type(error).__name__})") from error


def _check_members(members: Sequence[zipfile.ZipInfo], archive_bytes: int) -> None:
    names = set[str]()
    for member in members:
        if trick := _trick(member):
            raise zipfile.BadZipFile(f"member {member.orig_filename!r} {trick}, nothing was unpacked")
        if member.filename in names:
            raise zipfile.BadZipFile(f"member {member.filename!r} comes twice, nothing was unpacked")
        names.add(member.filename)
    unpacked_bytes = sum(member.file_size for member in members)
    if unpacked_bytes > MAX_GROWTH * archive_bytes + GROWTH_SLACK_BYTES:
        sizes = f"{megabytes(unpacked_bytes)} in {megabytes(archive_bytes)}"
        raise zipfile.BadZipFile(f"it claims to hold {sizes}, nothing was unpacked")


def _trick(member: zipfile.ZipInfo) -> str | None:
    """Why a member is not a plain file inside the folder it is unpacked to, or None."""
    name = member.orig_filename
    kind = stat.S_IFMT(member.external_attr >> 16)
    tricks = {
        "has an absolute name": name.startswith("/"),
        "has a drive in its name": bool(PureWindowsPath(name).drive),
        "has a backslash in its name": "\\" in name,
        "has a zero byte in its name": "\0" in name,
        "has '..' in its name": ".." in PurePosixPath(name).parts,
        "is a link or a device": kind not in (0, stat.S_IFREG, stat.S_IFDIR),
        "is encrypted": bool(member.flag_bits & 1),
        "is compressed in an unknown way": member.compress_type not in COMPRESSIONS,
    }
    return next((trick for trick, found in tricks.items() if found), None)


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) and name.count("/") == pattern.count("/")


def _extract_all(opened: zipfile.ZipFile, wanted: Sequence[zipfile.ZipInfo], output: Path) -> None:
    folders = {(output / member.filename).parent for member in wanted}
    for folder in folders:
        if not folder.resolve().is_relative_to(output.resolve()):
            raise UserError(f"{folder} is a link out of {output}: remove it, or unpack to where it leads")
    missing = [member for member in wanted if _size(output / member.filename) != member.file_size]
    check_room(output, sum(member.file_size for member in missing), f"unpacking {opened.filename}")
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    description = f"unpack {Path(str(opened.filename)).name}"
    with progress_bar(description, total=len(wanted), unit="files") as bar:
        for member in wanted:
            _extract(opened, member, output / member.filename)
            bar.advance()


def _extract(opened: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> None:
    if path.is_file() and _size(path) == member.file_size and _crc32(path) == member.CRC:
        return
    part = path.with_name(f"{path.name}.part")
    with _blame(f"member {member.filename!r}"), opened.open(member) as packed, part.open("wb") as file:
        shutil.copyfileobj(packed, file, CHUNK_BYTES)  # reads to the end, where zipfile verifies the CRC
    part.replace(path)


def _crc32(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            crc = zlib.crc32(chunk, crc)
    return crc


def check_room(folder: Path, num_bytes: int, purpose: str) -> None:
    """Raise `UserError`, saying how much is missing, unless the disk of `folder` has `num_bytes` free."""
    free_bytes = shutil.disk_usage(folder).free
    if num_bytes > free_bytes:
        missing = megabytes(num_bytes - free_bytes)
        raise UserError(f"{purpose} needs {megabytes(num_bytes)} in {folder}: {missing} more than are free")


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write `record` and the format version as JSON, by rename."""
    write_atomic(str(path), json.dumps({"format_version": FORMAT_VERSION, **record}, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """The record that `write_json` wrote, or None when there is none in this format version."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(record, dict) or record.pop("format_version", None) != FORMAT_VERSION:
        return None
    return record


def megabytes(num_bytes: int) -> str:
    """`num_bytes` for people, in units of 10^6 bytes rounded up."""
    return f"{-(-num_bytes // MEGABYTE):,} MB"


def say(line: str) -> None:
    """Print one line of news on stdout."""
    console.print(line, markup=False)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
