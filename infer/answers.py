"""Answers on the terminal: the captions of up to ten images, and rows on the standard output for pipes."""

import os
import sys
import webbrowser
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType

from captioner.cli import console
from captioner.errors import EXIT_PREEMPTED, UserError
from captioner.images.loading import ImageError, decode_rgb
from infer.listing import ImageFile, locate
from infer.peers import find_peers
from infer.reading import MAX_FILE_BYTES
from infer.results import Row, RowWriter, read_rows, write_all
from infer.row_index import real_root
from infer.settings import DEFAULT_OUTPUT, STANDARD_OUTPUT, CaptionSettings
from infer.templates import clean
from infer.terminal import Protocol, draw, find_protocol

MAX_ANSWERS = 10
DRAWN_SIDE_PIXELS = 320
OPENED_GALLERY = "~/.cache/captioner/gallery"


# ---- where rows go ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """The settings with a file for the rows and a gallery for --open, whether that file is kept, and --output -."""

    settings: CaptionSettings
    is_kept: bool
    printed: FileIO | None = None


@contextmanager
def open_outputs(settings: CaptionSettings) -> Iterator[Outputs]:
    """Yields where the rows go.

    With --output -, and without --output for up to ten files of this machine that --images names one by one, they are
    in a temporary file until the block ends. Raises UserError if several processes have --output -.
    """
    world_size = find_peers(settings.output).world_size
    is_printed = settings.output == STANDARD_OUTPUT
    if is_printed and world_size > 1:
        raise UserError(f"{world_size} processes cannot write rows to one standard output: give --output a file")
    is_kept = not (is_printed or (world_size == 1 and _is_question(settings)))
    gallery = settings.gallery
    if settings.open and gallery is None:
        gallery = settings.output.with_suffix(".gallery") if is_kept else Path(OPENED_GALLERY).expanduser()
    settings = replace(settings, gallery=gallery)
    if is_kept:
        yield Outputs(settings=settings, is_kept=True)
        return
    printed = _take_standard_output() if is_printed else None
    with TemporaryDirectory(prefix="captioner-") as folder:
        settings = replace(settings, output=Path(folder, DEFAULT_OUTPUT))
        yield Outputs(settings=settings, is_kept=False, printed=printed)


def _is_question(settings: CaptionSettings) -> bool:
    names_files = all(map(os.path.isfile, settings.images)) and not (settings.list or settings.shards)
    return settings.output is DEFAULT_OUTPUT and names_files and 0 < len(settings.images) <= MAX_ANSWERS


def _take_standard_output() -> FileIO:
    """The standard output; whatever else is printed from now on, by any library, goes to the standard error."""
    taken = FileIO(os.dup(1), "w")
    os.dup2(2, 1)
    return taken


def leave_without_rows(_number: int, _frame: FrameType | None) -> None:
    """Handle SIGTERM in a job whose rows are not kept."""
    print("stopped by SIGTERM: the rows were not kept, so the same command begins from the start", file=sys.stderr)
    raise SystemExit(EXIT_PREEMPTED)


class RowPrinter(RowWriter):
    """Also writes each row to the standard output. SystemExit with code 0 ends the job once nobody reads it."""

    def __init__(self, path: Path, output: FileIO) -> None:
        super().__init__(path)
        self._output = output

    def write(self, rows: Iterable[Row]) -> list[bytes]:
        """Write the rows; returns their lines."""
        lines = super().write(rows)
        try:
            write_all(self._output, b"".join(lines))
        except BrokenPipeError:
            raise SystemExit(0) from None
        return lines


def open_writer(part: Path, printed: FileIO | None) -> RowWriter:
    """Writes rows to the part file, and to the standard output if that is given."""
    return RowWriter(part) if printed is None else RowPrinter(part, printed)


# ---- answers ----------------------------------------------------------------------------------------------


def noting(files: Iterator[ImageFile], noted: list[ImageFile]) -> Iterator[ImageFile]:
    """The files; the first of them, one more than are answered, are also appended to `noted`."""
    for file in files:
        if len(noted) <= MAX_ANSWERS:
            noted.append(file)
        yield file


def print_answers(
    output: Path, files: Sequence[ImageFile], *, base: str, text: Callable[[Row], str] | None = None
) -> None:
    """Print what the merged `output` says of these files, in their order, with the `text` for each, if wanted.

    Relative roots of its rows start from the folder `base`.
    """
    wanted = {(real_root(file.root, base), file.path): index for index, file in enumerate(files)}
    rows: dict[int, Row] = {}
    for row in read_rows(output):
        index = wanted.get((real_root(row["root"], base), row["path"]))
        if index is not None:
            rows[index] = row
    protocol, encoding = find_protocol(os.environ), sys.stdout.encoding or "utf-8"
    for _, row in sorted(rows.items()):
        if protocol is not None and "error" not in row:
            _draw(row, protocol)
        for line in answer_lines(row, text=text):
            console.print(line.encode(encoding, "replace").decode(encoding), markup=False)


def answer_lines(row: Row, *, text: Callable[[Row], str] | None = None) -> Iterator[str]:
    """The lines of an answer: name, caption and confidence; the alt text if it says something else; the text."""
    yield clean(row["path"])
    if "error" in row:
        yield f"  no caption: {row['error']}: {clean(row['message'])}"
        return
    yield f"  {row['caption']}"
    if not row["alt"]:
        yield "  no alt text: the confidence is below --abstain-below"
    elif row["alt"].strip(".").lower() != row["caption"].strip(".").lower():
        yield f"  alt: {row['alt']}"
    if text is not None and (content := text(row)):
        yield f"  text: {content}"
    if row["confidence"] is not None:
        yield f"  confidence: {row['confidence']:.2f}"
    if row["review"]:
        yield f"  please look at it: {row['review']}"


def _draw(row: Row, protocol: Protocol) -> None:
    try:
        image = decode_rgb(
            locate(row["root"], row["path"]).read(max_bytes=MAX_FILE_BYTES), at_least=2 * DRAWN_SIDE_PIXELS
        ).image
    except ImageError:  # it has changed since it was captioned
        return
    image.thumbnail((DRAWN_SIDE_PIXELS, DRAWN_SIDE_PIXELS))
    sys.stdout.write(draw(image, protocol))


def open_page(page: Path) -> None:
    """Open a page in the browser, or print its address."""
    address = page.absolute().as_uri()
    if not webbrowser.open(address):
        console.print(f"no browser could be started: open {address}", markup=False)
