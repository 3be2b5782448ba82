"""Writes what is wanted beside the rows, with corrections: gallery, sidecars, metadata of the images, tables."""

import os
from collections.abc import Sequence
from contextlib import chdir, closing
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from captioner import cli
from captioner.errors import UserError
from infer.answers import open_page
from infer.corrections import Corrections, correct_row, roots_of
from infer.gallery import Source, read_corrections, write_gallery
from infer.metadata.exiftool import embed_all
from infer.metadata.outcomes import SHOWN_NAMES, Correct, Text, first_names
from infer.results import read_rows
from infer.settings import CaptionSettings, absolute, find_sources, find_text
from infer.sidecars import write_sidecars
from infer.tables import TableChangedError, edited_path, is_changed, write_coco_results, write_csv
from infer.written import Entry, Written


def write_extras(settings: CaptionSettings, *, base: str = "", since: float | None = None) -> int:
    """Write gallery, sidecars, metadata and tables, if wanted. Returns the number of files that could not be written.

    Relative roots start from the folder `base`; `since` is a time before all rows.
    """
    if base and base != os.getcwd():  # noqa: PTH109
        settings = absolute(settings)
        with chdir(base):
            return write_extras(settings, since=since)
    text = find_text(settings)
    needs_written = settings.sidecar or settings.csv or settings.coco_results or settings.corrections
    outcomes, page = [], None
    with closing(Written(settings.output if needs_written else None)) as written:
        sources, taken = find_sources(settings, written)
        said = read_corrections(settings.gallery, sources)
        correct = partial(correct_row, written=said, roots=roots_of(settings.output)) if said else None
        texts: dict[str, Any] = {"existing": settings.existing, "since": since, "text": text, "correct": correct}
        if settings.gallery is not None:  # before images change: thumbnails are made of the bytes that were captioned
            page = _write_gallery(settings, settings.gallery, sources, written)
        if settings.sidecar is not None:
            rows = read_rows(settings.output)
            outcomes.append(write_sidecars(rows, suffix=settings.sidecar, written=written, **texts))
        if settings.embed:
            outcomes.append(embed_all(read_rows(settings.output), settings.output, **texts))
        for line in chain.from_iterable(each.lines() for each in outcomes):
            cli.console.print(line, markup=False)
        num_failed = sum(each.num_failed for each in outcomes)
        num_failed += write_tables(settings, written, text=text, correct=correct, taken=taken)
        if settings.csv is not None and settings.gallery is None:
            _print_left_out(settings.csv, said)
    if page is not None:
        cli.console.print(f"look at {page}", markup=False)
        if settings.open:
            open_page(page)
    return num_failed


def _write_gallery(settings: CaptionSettings, folder: Path, sources: Sequence[Source], written: Written) -> Path:
    """Write the gallery, and note the files of corrections that it has now; returns the page."""
    rows = read_rows(settings.output)
    page = write_gallery(rows, folder, title="Captions", model=settings.model, sources=sources)
    for source in sources:
        if source.file != settings.csv:
            written.set(Path(os.path.realpath(source.file)), Entry(text=source.checksum))
    return page


def _print_left_out(table: Path, said: Corrections) -> None:
    """Print which texts are not in a table: no gallery keeps them either."""
    left_out = said.not_found()
    if left_out:
        names = first_names([correction.path for correction in left_out[:SHOWN_NAMES]], total=len(left_out))
        line = f"texts that were left out, since their images have no caption here: {len(left_out):,}: {names}"
        cli.console.print(f"{table}: {line}", markup=False)


def write_again(settings: CaptionSettings, *, base: str = "", since: float) -> None:
    """Write what `write_extras` writes, or print why not: the next time may be better, such as for a full disk."""
    try:
        write_extras(settings, base=base, since=since)
    except (OSError, UserError) as error:
        cli.console.print(f"not written: {error}", markup=False)


def write_tables(
    settings: CaptionSettings, written: Written, *, text: Text | None, correct: Correct | None, taken: str
) -> int:
    """Write the CSV and the COCO results, if wanted, and print what they do not hold.

    Returns the number of tables that were left alone, because somebody has changed them; the reason is printed.
    """

    def csv_lines(table: Path) -> list[str]:
        options: dict[str, Any] = {"text": text, "correct": correct, "written": written, "taken": taken}
        was_changed = is_changed(table, written)
        num_shown = write_csv(settings.output, table, excel=settings.csv_excel, **options)
        lines = [f"{num_shown:,} names are not UTF-8: some characters are replaced"] if num_shown else []
        if was_changed:
            lines.append(f"the corrections are taken; {edited_path(table)} is the table as it was changed")
        return lines

    def coco_lines(table: Path) -> list[str]:
        left_out = write_coco_results(settings.output, table, written=written)
        return [f"without {count:,} {reason}" for reason, count in left_out.items()]

    num_changed = 0
    for table, write in ((settings.csv, csv_lines), (settings.coco_results, coco_lines)):
        if table is not None:
            try:
                lines = [f"{table}: {line}" for line in write(table)]
            except TableChangedError as error:
                lines = [f"not written: {error}"]
                num_changed += 1
            for line in lines:
                cli.console.print(line, markup=False)
    return num_changed
