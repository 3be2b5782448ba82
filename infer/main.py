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

import signal
import time
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial

from captioner import cli
from captioner.errors import DeviceMemoryError, NoAttentionError, NotCalibratedError
from captioner.model.onnx import is_onnx_folder
from infer.answers import (
    MAX_ANSWERS,
    Outputs,
    leave_without_rows,
    noting,
    open_outputs,
    open_writer,
    print_answers,
)
from infer.captioning import caption_files, load_captioner, row_settings
from infer.extras import write_again, write_extras
from infer.listing import ImageFile, Listing
from infer.metadata.exiftool import remove_leftovers
from infer.peers import find_peers
from infer.reading import prepare
from infer.results import (
    STARTED,
    WORKING_FOLDER,
    check_settings,
    part_path,
    resolve_output,
    write_settings,
)
from infer.row_index import RowIndex, Summary, merge
from infer.settings import CaptionSettings, check_files, check_flags, find_text, open_listing
from infer.watching import Stop, check_watch, not_growing, watch

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


def run() -> None:
    """The console entry."""
    cli.run(main, CaptionSettings, description=__doc__ or "", remedies=REMEDIES)


if __name__ == "__main__":
    run()
