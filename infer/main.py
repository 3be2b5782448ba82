"""Caption every image in folders, one JSONL row for every file.

    python infer/main.py --model runs/coco/model --images photos --output captions.jsonl --gallery gallery
    accelerate launch --config_file accelerate_config.yaml infer/main.py --images photos     # on all GPUs

A file that is no usable image gets a row with the error. A stopped job resumes when it is started again with the same
--output, on any number of processes. Exit code 0: every file has a caption; 3: some have none, or a caption could not
be written into a sidecar or an image, counted by reason in what is printed (accelerate launch turns 3 into 1); 2: there
was no file to caption, or another error to fix, printed in one line; 75: stopped by SIGTERM, or because another process
of the job was lost: start it again.
"""

import time
from contextlib import ExitStack, closing
from dataclasses import replace
from itertools import chain

from captioner import cli
from captioner.errors import NoAttentionError, NotCalibratedError
from infer.gallery import write_gallery
from infer.listing import Listing
from infer.metadata.exiftool import embed_all, remove_leftovers
from infer.peers import find_peers
from infer.reading import prepare
from infer.results import (
    WORKING_FOLDER,
    RowWriter,
    check_settings,
    part_path,
    read_rows,
    resolve_output,
    write_settings,
)
from infer.row_index import RowIndex, Summary, merge
from infer.settings import CaptionSettings, check_files, check_flags, open_listing
from infer.sidecars import write_sidecars

EXIT_SOME_FAILED = 3
REMEDIES: cli.Remedies = {
    NotCalibratedError: "leave out --abstain-below, decode as it was trained to, or measure confidence with "
    "train/evaluate.py --calibrate",
    NoAttentionError: "leave out --attention, or train a model with train/main.py --decoder attention",
}


def main(settings: CaptionSettings) -> None:
    """Caption the files without a row, merge the rows, and write sidecars and gallery."""
    check_flags(settings)
    settings = replace(settings, output=resolve_output(settings.output))
    peers = find_peers(settings.output)
    if settings.dry_run:
        from infer.dry_run import dry_run

        if peers.is_main:
            dry_run(settings, num_processes=peers.world_size)
        return
    prepare()  # while this process loads torch and the model
    from infer.captioning import caption_files, load_captioner, row_settings

    captioner = load_captioner(settings)
    listing = open_listing(settings, peers)
    files = check_files(listing, settings)
    choices = row_settings(captioner, settings)
    with ExitStack() as job:
        with closing(RowWriter(part_path(settings.output, peers.rank))) as writer:  # locks the part
            choices = check_settings(settings.output, choices)
            base = choices[WORKING_FOLDER] or ""
            with closing(RowIndex(settings.output, base=base, retry_errors=settings.retry_errors)) as index:
                job.enter_context(peers)  # after the last refusal
                if peers.is_main:
                    remove_leftovers(settings.output)
                write_settings(settings.output, choices)
                started = time.monotonic()
                counts = caption_files(files, index, writer, captioner, settings=settings, peers=peers)
                seconds = time.monotonic() - started
        num_new, num_damaged, num_described = peers.finish(*counts)
        if peers.is_main:
            summary = merge(settings.output, base=base)
            peers.dismiss()
            cli.print_damaged(num_damaged)
            report(summary, listing, rate=num_new / seconds, num_described=num_described, settings=settings)
            if summary.failures.total() + write_extras(settings):
                raise SystemExit(EXIT_SOME_FAILED)


def report(summary: Summary, listing: Listing, *, rate: float, num_described: int, settings: CaptionSettings) -> None:
    """Print the numbers of rows and failures, the rate, and what was left out on purpose."""
    failures = ", ".join(f"{count:,} {reason}" for reason, count in sorted(summary.failures.items())) or "none"
    header = ("rows", "duplicates", "to review", "files/s now", "failures")
    row = (summary.num_rows, summary.num_duplicates, summary.num_review, rate, failures)
    cli.print_table(str(settings.output), header, [row])
    for line in listing.lines_of_left_out():
        cli.console.print(line, markup=False)
    if num_described:
        cli.console.print(f"{num_described:,} have a description already, so they have no row")


def write_extras(settings: CaptionSettings) -> int:
    """Write sidecars, metadata and the gallery, if wanted. Returns the number of captions that could not be written."""
    written = []
    if settings.sidecar is not None:
        rows = read_rows(settings.output)
        written.append(write_sidecars(rows, suffix=settings.sidecar, existing=settings.existing))
    if settings.embed:
        written.append(embed_all(read_rows(settings.output), settings.output, existing=settings.existing))
    for line in chain.from_iterable(outcomes.lines() for outcomes in written):
        cli.console.print(line, markup=False)
    if settings.gallery is not None:
        page = write_gallery(read_rows(settings.output), settings.gallery, title="Captions", model=settings.model)
        cli.console.print(f"look at {page}", markup=False)
    return sum(outcomes.num_failed for outcomes in written)


def run() -> None:
    """The console entry."""
    cli.run(main, CaptionSettings, description=__doc__ or "", remedies=REMEDIES)


if __name__ == "__main__":
    run()
