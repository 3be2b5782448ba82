"""Writes descriptions into the images themselves, through exiftool: one process of it for all images of a job.

exiftool writes a new file beside the image, which then replaces it. So at any moment the image is whole, the old one or
the new one. exiftool sees no name of an image and no text: it gets a folder with two links, `source` to the image and
`partial` to the new file, and the XMP packet as a file. So neither can be taken for an option. After a kill the link
`partial` says which file is to be removed.
"""

import os
import secrets
import select
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import date
from pathlib import Path

from captioner.errors import UserError
from infer.metadata import xmp
from infer.metadata.described import Metadata, local_path, read_metadata
from infer.metadata.outcomes import UNREADABLE_XMP, Outcomes, Text, check_writable, keep_owner, partial_beside
from infer.results import PARTIAL_SUFFIX, Row, embedding_folder, open_part
from infer.row_index import LocationSet

WRITTEN_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "HEIF", "AVIF")
MAX_SECONDS = 120.0  # for one image
EXTENDED_XMP = b"HasExtendedXMP"
TOO_MUCH_XMP = "left alone, since their XMP is split into several parts"

# At the end of its input, as when this process is killed, exiftool would wait for more: `cat` ends, and it is stopped.
COMMAND = "{ cat; printf '%s\\n' -stay_open False; } | exec exiftool -stay_open True -@ - 2>&1"
REQUEST = "-XMP<=packet\n-o\npartial\nsource\n-execute{}\n"


class ExifToolError(Exception):
    """exiftool did not write an image; the message is what it said."""


def check_exiftool() -> None:
    """Raise UserError if exiftool is not installed."""
    if shutil.which("exiftool") is None:
        raise UserError(
            "--embed needs exiftool, which is not installed: apt-get install libimage-exiftool-perl, or exiftool.org"
        )


def embed_all(rows: Iterable[Row], output: Path, *, existing: xmp.Existing, text: Text | None = None) -> Outcomes:
    """Write the description of each row's image into its XMP; returns the counts by outcome.

    `output` is the file of the rows, beside which the working folder is. Raises UserError if another run has that.
    """
    outcomes, seen = Outcomes(what="embedded"), LocationSet()
    with _working_folder(output) as folder, ExifTool(folder) as tool:
        for row in rows:
            if "error" in row:
                continue
            image = local_path(row["root"], row["path"])
            try:
                wanted = row["alt"] and (text(row) if text else row["alt"])
                if not wanted:
                    outcome = "abstained"
                elif image is None:
                    outcome = "not local"
                elif not seen.add(os.path.realpath(image)):  # by another root or link
                    outcome = "kept"
                else:
                    outcome = _embed(Path(os.path.realpath(image)), wanted, row["model"], tool, existing=existing)
            except NotADirectoryError:  # the tar that holds the image
                outcome = "not local"
            except xmp.XmpError:
                outcome = UNREADABLE_XMP
            except ExifToolError as error:
                outcomes.add_failure(error, row)
                continue
            except OSError as error:
                outcomes.add_failure(error.strerror or error, row)
                continue
            outcomes.add(outcome, row)
    return outcomes


def remove_leftovers(output: Path) -> None:
    """Remove what a killed job left: the image that it was writing, and its working folder."""
    if embedding_folder(output).exists():
        with suppress(UserError), _working_folder(output):  # the error: it is still running
            pass


@contextmanager
def _working_folder(output: Path) -> Iterator[Path]:
    """The folder of this job, locked, without what a killed job left. Raises UserError if another run has it."""
    folder = embedding_folder(output)
    folder.mkdir(parents=True, exist_ok=True)
    with open_part(folder / "lock"):
        partial = Path(os.path.realpath(folder / "partial"))
        if partial.name.endswith(PARTIAL_SUFFIX):
            partial.unlink(missing_ok=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder)


def _embed(image: Path, text: str, model: str, tool: "ExifTool", *, existing: xmp.Existing) -> str:
    """Write the text into an image; returns the outcome. Raises OSError, XmpError and ExifToolError."""
    status = image.stat()
    found = None
    if stat.S_ISREG(status.st_mode):
        with image.open("rb") as file:
            found = read_metadata(file)
    if found is None:
        return "left alone, since their format is not one of " + ", ".join(WRITTEN_FORMATS)
    if found.packet and EXTENDED_XMP in found.packet:
        return TOO_MUCH_XMP
    today = date.today().isoformat()
    packet = xmp.extend(found.packet, text, model=model, date=today, existing=existing, elsewhere=found.description)
    if packet is None:
        return "kept"
    check_writable(image)
    partial = partial_beside(image)
    try:
        tool.write(image, packet, partial)
        _check(partial, packet, found)
        _replace(image, partial, status)
    finally:
        partial.unlink(missing_ok=True)
    return "written"


def _check(partial: Path, packet: bytes, before: Metadata) -> None:
    """Raise ExifToolError if the new file is no image of the same kind and size with this packet's texts."""
    with partial.open("rb") as file:
        after = read_metadata(file)
    if (
        after is None
        or (after.format, after.size) != (before.format, before.size)
        or xmp.read_texts(after.packet or b"") != xmp.read_texts(packet)
    ):
        raise ExifToolError("exiftool wrote another image")


def _replace(image: Path, partial: Path, before: os.stat_result) -> None:
    """Replace the image by the new file, with the same owner, permissions and dates. Raises OSError.

    Raises ExifToolError if the image is not the one that it was `before`.
    """
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    status = image.stat()
    if (status.st_ino, status.st_size, status.st_mtime_ns) != (before.st_ino, before.st_size, before.st_mtime_ns):
        raise ExifToolError("another program has changed the image")
    keep_owner(partial, status)
    shutil.copystat(image, partial)  # last: it also copies the modification time
    partial.replace(image)


class ExifTool:
    """One exiftool process, started when it is first needed and after a failure. Use it in a `with` statement."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "ExifTool":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def write(self, image: Path, packet: bytes, partial: Path) -> None:
        """Write a copy of `image` with this XMP packet to `partial`. Raises ExifToolError and OSError."""
        for name, target in (("source", image), ("partial", partial)):
            link = self._folder / name
            link.unlink(missing_ok=True)
            link.symlink_to(target)
        (self._folder / "packet").write_bytes(packet)
        said = self._ask()
        if not partial.exists():
            raise ExifToolError(_first_line(said))

    def _ask(self) -> str:
        """Send the request; returns what exiftool says. Raises ExifToolError if it ends, or takes too long."""
        process = self._process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        number = secrets.randbelow(1 << 31)
        ready = f"{{ready{number}}}\n".encode()
        said, limit = b"", time.monotonic() + MAX_SECONDS
        try:
            process.stdin.write(REQUEST.format(number).encode())
            process.stdin.flush()
            while not said.endswith(ready):
                if not select.select([process.stdout], [], [], max(0.0, limit - time.monotonic()))[0]:
                    raise ExifToolError(f"exiftool took more than {MAX_SECONDS:.0f} s")
                chunk = os.read(process.stdout.fileno(), 1 << 16)
                if not chunk:
                    raise ExifToolError("exiftool ended")
                said += chunk
        except (BrokenPipeError, ExifToolError) as error:
            self._stop()
            raise ExifToolError(str(error)) from error
        return said.removesuffix(ready).decode(errors="replace")

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            ["/bin/sh", "-c", COMMAND],
            cwd=self._folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # so that Ctrl-C does not reach it, and that it can be killed with its shell
        )

    def _stop(self) -> None:
        """Kill the process, which writes nothing now that matters."""
        process, self._process = self._process, None
        if process is not None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def _first_line(said: str) -> str:
    """The first error in what exiftool said, without the name of the link."""
    lines = [line.removeprefix("Error: ").removesuffix(" - source").strip() for line in said.splitlines()]
    return next((line for line in lines if line), "exiftool wrote nothing")
