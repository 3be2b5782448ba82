"""Large zips over HTTP: downloads that continue after a lost connection or a kill, and their members unpacked."""

import errno
import http.client
import shutil
import ssl
import stat
import struct
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from fnmatch import fnmatchcase
from pathlib import Path

from captioner.cli import console, progress_bar
from captioner.errors import UserError

MEGABYTE = 1_000_000
CHUNK_BYTES = 1 << 20
LONGEST_PAUSE_SECONDS = 60.0
BUSY_STATUSES = (408, 425, 429)
DAMAGE = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, ValueError)


class DroppedError(Exception):
    """A request failed in a way that a retry may fix."""


def download(
    url: str, path: Path, *, timeout_seconds: float = 60.0, num_tries: int = 8, backoff_seconds: float = 1.0
) -> None:
    """Download `url` to `path`, which appears by rename when all bytes that the server announced are there.

    Nothing is done where `path` exists. `NAME.part` is continued by HTTP Range where it ended. A lost, silent
    (`timeout_seconds`) or refused connection (5xx, 408, 425, 429) is retried after a doubling pause, at most
    `num_tries` times without a new byte. Raises UserError for what no retry fixes.
    """
    if path.exists():
        return
    part = path.with_name(f"{path.name}.part")
    largest, num_failures = _size(part), 0
    while True:
        try:
            _continue(url, part, timeout_seconds)
            break
        except DroppedError as error:
            num_failures = 0 if _size(part) > largest else num_failures + 1
            largest = max(largest, _size(part))
            if num_failures >= num_tries:
                remedy = "run the same command again to continue"
                raise UserError(f"{url}: {error}, {num_tries} times in a row: {remedy}") from error
            pause_seconds = min(backoff_seconds * 2 ** max(num_failures - 1, 0), LONGEST_PAUSE_SECONDS)
            say(f"{path.name}: {error} at {_megabytes(_size(part))}; retrying in {pause_seconds:.0f} s")
            time.sleep(pause_seconds)
    part.replace(path)
    say(f"{path.name}: {_megabytes(_size(path))} downloaded")


def _continue(url: str, part: Path, timeout_seconds: float) -> None:
    """Append what `part` lacks, over one connection. Raises DroppedError when some of it is still missing."""
    start = _size(part)
    try:
        headers = {"User-Agent": "captioner"} | ({"Range": f"bytes={start}-"} if start else {})
        request = urllib.request.Request(url, headers=headers)
        # urlopen() would keep the proxy variables of its first call
        with urllib.request.build_opener().open(request, timeout=timeout_seconds) as response:
            _append(url, response, part, start=start)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and start:  # there is no byte `start`: the part is whole, or of another file
            if error.headers["Content-Range"] == f"bytes */{start}":
                return
            part.unlink()
            raise DroppedError("the server's file is shorter than what is here, starting over") from error
        answer = f"the server answered {error.code} {error.reason}"
        if error.code in BUSY_STATUSES or error.code >= 500:
            raise DroppedError(answer) from error
        raise UserError(f"{url}: {answer}: check the address") from error
    except (urllib.error.URLError, ConnectionError, TimeoutError, http.client.HTTPException, ssl.SSLError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLCertVerificationError) or isinstance(error, http.client.InvalidURL):
            raise UserError(f"{url}: {reason}: check the address") from error
        raise DroppedError(f"the connection was lost ({reason})") from error
    except ValueError as error:  # a host name that no name server could be asked for
        raise UserError(f"{url}: {error}: check the address") from error


def _append(url: str, response: http.client.HTTPResponse, part: Path, *, start: int) -> None:
    if response.headers.get_content_type() == "text/html" or response.length is None:
        raise UserError(f"{url}: the answer is a web page, or does not say how long the file is: try another network")
    if response.status != 206:  # the server sends the whole file
        part.unlink(missing_ok=True)
        start = 0
    size = start + response.length
    with part.open("ab") as file, progress_bar(part.stem, total=size // MEGABYTE, unit="MB") as bar:
        bar.skip(start // MEGABYTE)
        while start < size:
            chunk = response.read1(min(CHUNK_BYTES, size - start))  # read() would lose what came before a timeout
            if not chunk:
                raise DroppedError("the connection was closed early")
            file.write(chunk)
            start += len(chunk)
            bar.set(start // MEGABYTE)


def unzip(archive: Path, output: Path, *, pattern: str) -> int:
    """Unpack the members that match `pattern` (as `train2014/*.jpg`) under `output`; returns their number.

    A file appears by rename with its CRC checked; one that is there with the right size is kept. Raises UserError; an
    archive that is damaged, or holds a link under such a name, is deleted, so that it is downloaded again.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            members = [
                member
                for member in opened.infolist()  # names that match are neither absolute nor lead out by `..`
                if fnmatchcase(member.filename, pattern) and member.filename.count("/") == pattern.count("/")
            ]
            if not members:
                raise zipfile.BadZipFile(f"it holds no {pattern}")
            with progress_bar(f"unpack {archive.name}", total=len(members), unit="files") as bar:
                for member in members:
                    _extract(opened, member, output / member.filename)
                    bar.advance()
    except (*DAMAGE, OSError) as error:
        # A damaged list of members can seek before the start of the file; other OSErrors are the disk's.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        archive.unlink()
        remedy = "the zip was deleted: run the same command again to download it"
        raise UserError(f"{archive} is damaged ({str(error) or type(error).__name__}): {remedy}") from error
    say(f"{archive.name}: {len(members):,} files unpacked")
    return len(members)


def _extract(opened: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> None:
    if stat.S_ISLNK(member.external_attr >> 16):
        raise zipfile.BadZipFile(f"member {member.filename} is a link")
    if path.exists() and _size(path) == member.file_size:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        with opened.open(member) as packed, part.open("wb") as file:
            shutil.copyfileobj(packed, file, CHUNK_BYTES)  # zipfile checks the CRC at the end
    except DAMAGE as error:
        raise zipfile.BadZipFile(f"member {member.filename}: {error}") from error
    part.replace(path)


def _megabytes(num_bytes: int) -> str:
    """`num_bytes` for people, in units of 10^6 bytes rounded up."""
    return f"{-(-num_bytes // MEGABYTE):,} MB"


def say(line: str) -> None:
    """Print one line on stdout."""
    console.print(line, markup=False)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
