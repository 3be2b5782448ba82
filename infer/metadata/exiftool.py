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
import stat
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import date
from functools import partial
from operator import itemgetter
from pathlib import Path
from subprocess import PIPE, STDOUT
from typing import Any

from captioner.errors import UserError
from infer.metadata import xmp
from infer.metadata.described import Metadata, read_metadata
from infer.metadata.outcomes import (
    Correct,
    Outcomes,
    Text,
    Words,
    check_unchanged,
    check_writable,
    keep_owner,
    partial_beside,
    write_texts,
)
from infer.results import PARTIAL_SUFFIX, Row, embedding_folder, open_part

WRITTEN_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "HEIF", "AVIF")
MAX_SECONDS = 120.0  # for one image
EXTENDED_XMP = b"HasExtendedXMP"
TOO_MUCH_XMP = "left alone, since their XMP is split into several parts"

COMMAND = ("exiftool", "-stay_open", "True", "-@", "-")
FEED = "cat; printf '%s\\n' -stay_open False"  # or, if this process was killed, exiftool would wait for more forever
WRITTEN = "1 image files created"
REQUEST = "-XMP<=packet\n-o\npartial\nsource\n-execute{}\n"


class ExifToolError(OSError):
    """exiftool did not write an image; the message is what it said."""


def check_exiftool() -> None:
    """Raise UserError if exiftool is not installed."""
    if shutil.which("exiftool") is None:
        raise UserError(
            "--embed needs exiftool, which is not installed: apt-get install libimage-exiftool-perl, or exiftool.org"
        )


def embed_all(
    rows: Iterable[Row],
    output: Path,
    *,
    existing: xmp.Existing,
    text: Text | None = None,
    correct: Correct | None = None,
    since: float | None = None,
) -> Outcomes:
    """Write the description of each row's image into its XMP; returns the counts by outcome.

    `output` is the file of the rows, beside which the working folder is; `since` is a time before all rows. Raises
    UserError if another run has that folder.
    """
    with _working_folder(output) as folder, ExifTool(folder) as tool:
        write = partial(_embed, tool=tool, existing=existing)
        options: dict[str, Any] = {"text": text or itemgetter("alt"), "correct": correct, "since": since}
        return write_texts(rows, write, what="embedded", follow_links=True, **options)


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
        leftover = Path(os.path.realpath(folder / "partial"))
        if leftover.name.endswith(PARTIAL_SUFFIX):
            leftover.unlink(missing_ok=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder)


def _embed(image: Path, words: Words, *, tool: "ExifTool", existing: xmp.Existing) -> str:
    """Write the text into an image; returns the outcome. Raises OSError, XmpError, ChangedError and ExifToolError."""
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
    options = {"model": words.model, "date": today, "sha256": words.sha256, "elsewhere": found.description}
    packet = xmp.extend(found.packet, words.text, existing=existing, **options)
    if packet is None:
        return "kept"
    check_unchanged(image, words)
    check_writable(image)
    new = partial_beside(image)
    try:
        tool.write(image, packet, new)
        _check(new, packet, found)
        _replace(image, new, status)
    finally:
        new.unlink(missing_ok=True)
    return "written"


def _check(new: Path, packet: bytes, before: Metadata) -> None:
    """Raise ExifToolError if the new file is no image of the same kind and size with this packet's texts."""
    with new.open("rb") as file:
        after = read_metadata(file)
    with suppress(xmp.XmpError):
        if (
            after is not None
            and (after.format, after.size) == (before.format, before.size)
            and xmp.read_texts(after.packet or b"") == xmp.read_texts(packet)
        ):
            return
    raise ExifToolError("exiftool wrote another image")


def _replace(image: Path, new: Path, before: os.stat_result) -> None:
    """Replace the image by the new file, with the same owner, permissions and dates. Raises OSError.

    Raises ExifToolError if the image is not the one that it was `before`.
    """
    with new.open("rb+") as file:
        os.fsync(file.fileno())
    status = image.stat()
    if (status.st_ino, status.st_size, status.st_mtime_ns) != (before.st_ino, before.st_size, before.st_mtime_ns):
        raise ExifToolError("another program has changed the image")
    keep_owner(new, status)
    shutil.copystat(image, new)  # last: it also copies the modification time
    new.replace(image)


class ExifTool:
    """One exiftool process, started when it is first needed and after a failure. Use it in a `with` statement."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []  # what passes requests on, and exiftool

    def __enter__(self) -> "ExifTool":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def write(self, image: Path, packet: bytes, new: Path) -> None:
        """Write a copy of `image` with this XMP packet to `new`. Raises ExifToolError and OSError."""
        for name, target in (("source", image), ("partial", new)):
            link = self._folder / name
            link.unlink(missing_ok=True)
            link.symlink_to(target)
        (self._folder / "packet").write_bytes(packet)
        said = self._ask()
        if WRITTEN not in said:
            raise ExifToolError(_first_line(said))

    def _ask(self) -> str:
        """Send the request; returns what exiftool says. Raises ExifToolError if it ends, or takes too long."""
        self._processes = self._processes or self._start()
        requests, answers = self._processes[0].stdin, self._processes[1].stdout
        assert requests is not None
        assert answers is not None
        number = secrets.randbelow(1 << 31)
        ready = f"{{ready{number}}}\n".encode()
        said, limit = b"", time.monotonic() + MAX_SECONDS
        try:
            requests.write(REQUEST.format(number).encode())
            requests.flush()
            while not said.endswith(ready):
                if not select.select([answers], [], [], max(0.0, limit - time.monotonic()))[0]:
                    raise ExifToolError(f"exiftool took more than {MAX_SECONDS:.0f} s")
                chunk = os.read(answers.fileno(), 1 << 16)
                if not chunk:
                    raise ExifToolError("exiftool ended")
                said += chunk
        except (BrokenPipeError, ExifToolError) as error:
            self._stop()
            raise ExifToolError(str(error)) from error
        return said.removesuffix(ready).decode(errors="replace")

    def _start(self) -> list[subprocess.Popen[bytes]]:
        start = partial(subprocess.Popen, stdout=PIPE, start_new_session=True)  # Ctrl-C is for this process alone
        feed = start(["/bin/sh", "-c", FEED], stdin=PIPE)
        tool = start(COMMAND, stdin=feed.stdout, stderr=STDOUT, cwd=self._folder)
        assert feed.stdout is not None
        feed.stdout.close()
        return [feed, tool]

    def _stop(self) -> None:
        """Kill the processes: what they still write is not used."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            for stream in (process.stdin, process.stdout):
                with suppress(BrokenPipeError):
                    if stream is not None:
                        stream.close()
            process.wait()
        self._processes = []


def _first_line(said: str) -> str:
    """The first error in what exiftool said, without the name of the link."""
    lines = [line.removeprefix("Error: ").removesuffix(" - source").strip() for line in said.splitlines()]
    return next((line for line in lines if line), "exiftool wrote nothing")
