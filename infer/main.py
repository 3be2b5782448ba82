"""Caption every image in folders, one JSONL row for every file.

    python infer/main.py --model runs/coco/model --images dog.jpg                            # the answer is printed
    python infer/main.py --model runs/coco/model --images photos --output captions.jsonl --gallery gallery
    python infer/main.py --model runs/coco/model --images photos --output - | jq .alt        # rows in a pipe
    accelerate launch --config_file accelerate_config.yaml infer/main.py --images photos     # on all GPUs
    python infer/main.py --model runs/coco/model --images photos --watch                     # and go on as files arrive

A file that is no usable image gets a row with the error. A stopped job resumes when it is started again with the same
--output, on any number of processes. Exit code 0: every file has a caption; 3: some have none, or a caption could not
be written into a sidecar or an image, counted by reason in what is printed (accelerate launch turns 3 into 1); 2: there
was no file to caption, or another error to fix, printed in one line; 75: stopped by SIGTERM, or because another process
of the job was lost: start it again. With --watch SIGTERM and Ctrl-C are its end, with exit code 0; all rows are merged.
"""

import os
import signal
import time
from contextlib import ExitStack, chdir, closing
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from captioner import cli
from captioner.errors import DeviceMemoryError, NoAttentionError, NotCalibratedError, UserError
from captioner.model.onnx import is_onnx_folder
from infer.answers import (
    MAX_ANSWERS,
    Outputs,
    leave_without_rows,
    noting,
    open_outputs,
    open_page,
    open_writer,
    print_answers,
)
from infer.captioning import caption_files, load_captioner, row_settings
from infer.corrections import correct_row, roots_of
from infer.gallery import read_corrections, write_gallery
from infer.listing import ImageFile, Listing
from infer.metadata.exiftool import embed_all, remove_leftovers
from infer.metadata.outcomes import SHOWN_NAMES, Correct, Text, first_names
from infer.peers import find_peers
from infer.reading import prepare
from infer.results import (
    STARTED,
    WORKING_FOLDER,
    check_settings,
    part_path,
    read_rows,
    resolve_output,
    write_settings,
)
from infer.row_index import RowIndex, Summary, merge
from infer.settings import CaptionSettings, absolute, check_files, check_flags, find_sources, find_text, open_listing
from infer.sidecars import write_sidecars
from infer.tables import TableChangedError, checksum, edited_path, is_changed, write_coco_results, write_csv
from infer.watching import Stop, check_watch, not_growing, watch
from infer.written import Entry, Written

EXIT_SOME_FAILED = 3
REMEDIES: cli.Remedies = {
    DeviceMemoryError: "give a smaller --batch-size, --captions-per-image or --beam-size",
    NotCalibratedError: "leave out --abstain-below, decode as it was trained to, or measure confidence with "
    "train/evaluate.py --calibrate",
    NoAttentionError: "leave out --attention, or train a model with train/main.py --decoder attention",
}


def main(settings: CaptionSettings) -> None:
    """Caption the files, with the rows in a file, on the standard output or only in the answers."""
    with open_outputs(settings) as outputs:
        check_flags(outputs.settings)
        if outputs.settings.watch:
            check_watch(outputs.settings, is_kept=outputs.is_kept)
        (look if settings.dry_run else caption)(outputs)


def look(outputs: Outputs) -> None:
    """Print what captioning would do."""
    from infer.dry_run import dry_run

    peers = find_peers(outputs.settings.output)
    if peers.is_main:
        dry_run(outputs.settings, num_processes=peers.world_size)


def caption(outputs: Outputs) -> None:
    """Caption the files without a row, merge the rows, and write sidecars, tables and gallery."""
    settings = replace(outputs.settings, output=resolve_output(outputs.settings.output))
    peers = find_peers(settings.output)
    prepare(with_torch=not is_onnx_folder(settings.model), may_fork=True)
    captioner = load_captioner(settings)
    listing = open_listing(settings, peers)
    noted: list[ImageFile] = []
    files = not_growing(listing) if settings.watch else noting(check_files(listing, settings), noted)
    choices = row_settings(captioner, settings)
    stop = Stop()
    with ExitStack() as job:
        with closing(open_writer(part_path(settings.output, peers.rank), outputs.printed)) as writer:  # locks the part
            choices = check_settings(settings.output, choices)
            base = choices[WORKING_FOLDER] or ""
            with closing(RowIndex(settings.output, base=base, retry_errors=settings.retry_errors)) as index:
                job.enter_context(peers)  # after the last refusal
                if not outputs.is_kept:
                    signal.signal(signal.SIGTERM, leave_without_rows)
                if peers.is_main:
                    remove_leftovers(settings.output)
                write_settings(settings.output, choices)
                started = time.monotonic()
                if settings.watch:
                    job.enter_context(stop)
                counts = caption_files(
                    files,
                    index,
                    writer,
                    captioner,
                    settings=settings,
                    peers=peers,
                    should_stop=lambda: stop.is_requested,
                )
                seconds = time.monotonic() - started
        num_new, num_damaged, num_described = peers.finish(*counts)
        if peers.is_main:
            summary = merge(settings.output, base=base)
            peers.dismiss()
            cli.print_damaged(num_damaged)
            if outputs.printed is None and peers.world_size == 1 and len(noted) <= MAX_ANSWERS and not settings.watch:
                print_answers(settings.output, listing.sort(noted), base=base, text=find_text(settings))
            report(summary, listing, rate=num_new / seconds, num_described=num_described, outputs=outputs)
            num_failed = summary.failures.total() + write_extras(settings, base=base, since=choices[STARTED])
            if settings.watch:
                on_merge = partial(write_again, replace(settings, open=False), base=base, since=choices[STARTED])
                watch(captioner, settings, stop, base=base, on_merge=on_merge)
            elif num_failed:
                raise SystemExit(EXIT_SOME_FAILED)


def report(summary: Summary, listing: Listing, *, rate: float, num_described: int, outputs: Outputs) -> None:
    """Print the numbers of rows and failures and the rate, unless answers say all, and what was left out on purpose."""
    failures = ", ".join(f"{count:,} {reason}" for reason, count in sorted(summary.failures.items())) or "none"
    header = ("rows", "duplicates", "to review", "files/s now", "failures")
    row = (summary.num_rows, summary.num_duplicates, summary.num_review, rate, failures)
    if outputs.is_kept:
        cli.print_table(str(outputs.settings.output), header, [row])
    elif outputs.printed is not None:
        cli.print_table("standard output", header, [row])
    else:
        cli.console.print("the rows are not kept: --output captions.jsonl keeps them")
    for line in listing.lines_of_left_out():
        cli.console.print(line, markup=False)
    if num_described:
        cli.console.print(f"{num_described:,} have a description already, so they have no row")


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
            rows = read_rows(settings.output)
            page = write_gallery(rows, settings.gallery, title="Captions", model=settings.model, sources=sources)
            for file in (source.file for source in sources if source.file != settings.csv):
                written.set(Path(os.path.realpath(file)), Entry(text=checksum(file)))
        if settings.sidecar is not None:
            rows = read_rows(settings.output)
            outcomes.append(write_sidecars(rows, suffix=settings.sidecar, written=written, **texts))
        if settings.embed:
            outcomes.append(embed_all(read_rows(settings.output), settings.output, **texts))
        for line in chain.from_iterable(each.lines() for each in outcomes):
            cli.console.print(line, markup=False)
        num_failed = sum(each.num_failed for each in outcomes)
        num_failed += write_tables(settings, written, text=text, correct=correct, taken=taken)
        if said and settings.csv is not None and settings.gallery is None and (lost := said.not_found()):
            names = first_names([correction.path for correction in lost[:SHOWN_NAMES]], total=len(lost))
            line = f"texts that were left out, since their images have no caption here: {len(lost):,}: {names}"
            cli.console.print(f"{settings.csv}: {line}", markup=False)
    if page is not None:
        cli.console.print(f"look at {page}", markup=False)
        if settings.open:
            open_page(page)
    return num_failed


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


def run() -> None:
    """The console entry."""
    cli.run(main, CaptionSettings, description=__doc__ or "", remedies=REMEDIES)


if __name__ == "__main__":
    run()
