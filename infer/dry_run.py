"""What captioning would do: how many files have a description, would get one, or are broken, and in what time.

Worker processes look at each file's sidecars and header; a file that looks damaged is decoded. A random sample is
really captioned, in memory, to measure the time. Nothing is written.
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from itertools import islice
from random import Random
from typing import BinaryIO

from captioner import cli
from captioner.files import storage
from captioner.images import silence_pillow
from captioner.images.loading import MAX_PIXELS, ImageError, decode_rgb
from captioner.model.onnx import is_onnx_folder
from captioner.workers import WorkerPool, count_processors
from infer.captioning import caption_files, load_captioner, row_settings, without_rows
from infer.listing import Ahead, ImageFile, Listing
from infer.metadata.described import Metadata, find_sidecar, is_described, read_metadata
from infer.metadata.outcomes import SHOWN_NAMES, first_names
from infer.peers import Peers
from infer.reading import MAX_DEATHS, MAX_FILE_BYTES, MAX_SECONDS, blame, prepare
from infer.results import WORKING_FOLDER, Row, RowWriter, check_settings, to_line
from infer.row_index import RowIndex
from infer.settings import CaptionSettings, check_files, open_listing, sidecar_suffixes

NUM_SAMPLED = 128
FILES_PER_TASK = 64
EMBEDDED = "in the image"
JPEG_END = b"\xff\xd9"

Finding = tuple[str, str]  # where a file has a description, and why it is broken; "" if it has none, or is not


class Findings:
    """Counts of files by what was found, and a random sample of those that would be captioned."""

    def __init__(self, *, missing_only: bool) -> None:
        self._missing_only = missing_only
        self._random = Random(0)
        self.num_files = self.num_wanted = 0
        self.described: Counter[str] = Counter()  # by where
        self.broken: Counter[str] = Counter()  # by reason
        self.broken_names: list[str] = []  # of the first
        self.sample: list[ImageFile] = []

    def add(self, file: ImageFile, finding: Finding) -> None:
        """Count a file. Each that would be captioned is in the sample with the same probability."""
        where, reason = finding
        self.num_files += 1
        if where:
            self.described[where] += 1
        if reason:
            self.broken[reason] += 1
            self.broken_names += [file.location][: SHOWN_NAMES - len(self.broken_names)]
        if reason or (where and self._missing_only):
            return
        self.num_wanted += 1
        if len(self.sample) < NUM_SAMPLED:
            self.sample.append(file)
        elif (number := self._random.randrange(self.num_wanted)) < NUM_SAMPLED:
            self.sample[number] = file


def dry_run(settings: CaptionSettings, *, num_processes: int) -> None:
    """Look at all files, caption a sample, and print what was found. Raises UserError as captioning would."""
    prepare(with_torch=not is_onnx_folder(settings.model), may_fork=True)
    captioner = load_captioner(settings)
    peers = Peers(settings.output)  # this process alone looks at the files of all
    listing = open_listing(settings, peers)
    files = check_files(listing, settings)
    base = check_settings(settings.output, row_settings(captioner, settings))[WORKING_FOLDER] or ""
    findings = Findings(missing_only=settings.missing_only)
    with closing(RowIndex(settings.output, base=base, retry_errors=settings.retry_errors)) as index:
        unwritten = count_unwritten((row for row, _ in index.merged()), settings)
        with cli.progress_bar("looking", total=None, unit="files") as bar:
            new = without_rows(Ahead(files, on_end=bar.set_total), index, bar)
            found = look(
                new,
                suffixes=sidecar_suffixes(settings),
                num_workers=settings.workers,
                with_torch=captioner.bundle.uses_torch,
            )
            for file, finding in found:
                findings.add(file, finding)
                bar.advance()
        writer = NoWriter()
        started = time.monotonic()
        if findings.sample:
            caption_files(iter(findings.sample), index, writer, captioner, settings=settings, peers=peers)
        seconds = (time.monotonic() - started) / max(1, len(findings.sample)) * findings.num_wanted / num_processes
    report(findings, listing, writer.failures, seconds=seconds)
    if unwritten:
        cli.console.print(f"of the files that have a row, {shown(unwritten)}: the job would write them", markup=False)


def count_unwritten(rows: Iterable[Row], settings: CaptionSettings) -> Counter[str]:
    """How many captioned images have no sidecar, and how many no embedded description, as far as these are wanted."""
    counts: Counter[str] = Counter()
    if not (settings.sidecar or settings.embed):
        return counts
    for row in rows:
        file = ImageFile(row["root"], row["path"])
        if not row.get("alt") or storage.is_remote(file.root) or not os.path.isfile(file.location):  # noqa: PTH113
            continue
        if settings.sidecar and not find_sidecar(file, suffixes=[settings.sidecar]):
            counts[f"have no {settings.sidecar} sidecar"] += 1
        if settings.embed:
            with suppress(ImageError), file.open(max_bytes=MAX_FILE_BYTES) as opened:
                counts["have no embedded description"] += not is_described(opened)
    return +counts


class NoWriter(RowWriter):
    """Keeps no row; `failures` counts their errors by reason."""

    def __init__(self) -> None:
        self.failures: Counter[str] = Counter()

    def write(self, rows: Iterable[Row]) -> list[bytes]:
        """The lines of the rows."""
        rows = list(rows)
        self.failures.update(row["error"] for row in rows if "error" in row)
        return [to_line(row).encode() for row in rows]


def report(findings: Findings, listing: Listing, failures: Counter[str], *, seconds: float) -> None:
    """Print the counts, the time, what was left out, and what the sample says about the other files."""
    header = ("files", "have a row", "have a description", "are broken", "would be captioned", "in about")
    num_rows = listing.num_found - findings.num_files
    counts = (num_rows, findings.described.total(), findings.broken.total(), findings.num_wanted)
    cli.print_table("dry run: nothing was written", header, [(listing.num_found, *counts, duration(seconds))])
    if findings.described:
        cli.console.print(f"have a description: {shown(findings.described)}", markup=False)
    if findings.broken:
        names = first_names(findings.broken_names, total=findings.broken.total())
        cli.console.print(f"are broken: {shown(findings.broken)}: {names}", markup=False)
    for line in listing.lines_of_left_out():
        cli.console.print(line, markup=False)
    if failures:
        cli.console.print(
            f"of {len(findings.sample):,} files that were captioned to measure the time, {failures.total():,} are "
            f"broken ({shown(failures)}): so more of the others may be",
            markup=False,
        )


def shown(counter: Counter[str]) -> str:
    """The counts in words, the largest first."""
    return ", ".join(f"{count:,} {name}" for name, count in counter.most_common())


def duration(seconds: float) -> str:
    """A time in the unit that fits it."""
    for unit, size in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{seconds:,.0f} seconds"


# ---- in the workers ---------------------------------------------------------------------------------------


def look(
    files: Iterator[ImageFile], *, suffixes: tuple[str, ...], num_workers: int | None, with_torch: bool = True
) -> Iterator[tuple[ImageFile, Finding]]:
    """Yield each file with what was found, in no fixed order."""
    tasks = iter(lambda: list(islice(files, FILES_PER_TASK)), [])
    size = num_workers or count_processors()
    pool = WorkerPool(
        prepare(with_torch=with_torch), _look, suffixes, size=size, max_deaths=MAX_DEATHS, max_seconds=MAX_SECONDS
    )
    with pool:
        for found in pool.run((f"the {len(task)} files from {task[0].location} on", task) for task in tasks):
            yield from found


def _look(
    task: list[ImageFile],
    suffixes: tuple[str, ...],
    *,
    excluded: dict[int, int | None],
    set_index: Callable[[int], None],
    report: object,
) -> list[tuple[ImageFile, Finding]]:
    silence_pillow()
    found: list[tuple[ImageFile, Finding]] = []
    for index, file in enumerate(task):
        if index in excluded:
            found.append((file, ("", blame(excluded[index], max_seconds=MAX_SECONDS).reason)))
        else:
            set_index(index)
            found.append((file, look_at(file, suffixes=suffixes)))
    return found


def look_at(file: ImageFile, *, suffixes: tuple[str, ...]) -> Finding:
    """Where the file has a description, and why it is broken. A file that looks damaged is decoded."""
    suffix = find_sidecar(file, suffixes=suffixes)
    try:
        with file.open(max_bytes=MAX_FILE_BYTES) as opened:
            found = read_metadata(opened)
            looks_whole = found is not None and _looks_whole(found, opened)
        if not looks_whole:
            decode_rgb(file.read(max_bytes=MAX_FILE_BYTES))
    except ImageError as error:
        return f"in a {suffix} sidecar" if suffix else "", error.reason
    if suffix:
        return f"in a {suffix} sidecar", ""
    return EMBEDDED if found is not None and found.has_description else "", ""


def _looks_whole(found: Metadata, file: BinaryIO) -> bool:
    """Whether the size is allowed, and the end is there: of JPEG and WebP; `read_metadata` reads PNGs to their end."""
    if not 0 < found.size[0] * found.size[1] <= MAX_PIXELS:
        return False
    size = file.seek(0, os.SEEK_END)
    if found.format == "JPEG":
        file.seek(-len(JPEG_END), os.SEEK_END)
        return file.read() == JPEG_END
    if found.format == "WEBP":
        file.seek(4)
        return size >= 8 + int.from_bytes(file.read(4), "little")
    return True
