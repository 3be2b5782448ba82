"""Caption every picture in folders, one JSONL row for every file.

    python infer/main.py --model runs/coco/model --images photos --output captions.jsonl --gallery gallery
    accelerate launch --config_file accelerate_config.yaml infer/main.py --images photos     # on all GPUs

Files that are no usable picture get a row that says why. A job that was stopped goes on where it stood when it is
started again with the same --output, with as many processes as you like. Exit code 0: every file has a caption; 3: some
have none, or a sidecar could not be written, and what is printed counts why (accelerate launch makes 1 of it); 2: there
was no file to caption, or another error to fix, printed in one line; 75: stopped by SIGTERM, or because another process
of the job was lost: start it again.
"""

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from captioner import cli
from captioner.cli import Bar
from captioner.errors import NotCalibratedError, UserError
from captioner.files.storage import is_remote
from captioner.workers import count_processors
from infer.ahead import Ahead
from infer.gallery import check_folder, write_gallery
from infer.listing import ImageFile, Listing
from infer.peers import Peers, find_peers
from infer.reading import Reader, prepare
from infer.results import (
    WORKING_FOLDER,
    RowWriter,
    check_settings,
    find_output,
    own_files,
    part_path,
    read_rows,
    write_settings,
)
from infer.row_index import RowIndex, Summary, merge
from infer.settings import CaptionSettings
from infer.sidecars import check_ending, write_sidecars

if TYPE_CHECKING:
    import torch

    from captioner.describe import Captioner

EXIT_SOME_FAILED = 3
BATCH_ON_CPU, BATCH_ON_GPU = 8, 128
REMEDIES: cli.Remedies = {
    NotCalibratedError: "leave out --abstain-below, decode as it was trained to, or measure confidence with "
    "train/evaluate.py --calibrate"
}


def main(settings: CaptionSettings) -> None:
    """List, caption what has no row yet, merge, and draw the gallery."""
    check_flags(settings)
    settings = replace(settings, output=find_output(settings.output))
    peers = find_peers(settings.output)
    prepare()  # while this process loads torch and the model
    captioner = load(settings)
    listing = open_listing(settings, peers)
    files = check_files(listing, settings)
    choices = row_settings(captioner, settings)
    with ExitStack() as job:
        with closing(RowWriter(part_path(settings.output, peers.rank))) as writer:  # which locks the part
            choices = check_settings(settings.output, choices)
            base = choices[WORKING_FOLDER] or ""
            with closing(RowIndex(settings.output, base=base, retry_errors=settings.retry_errors)) as index:
                job.enter_context(peers)  # when nothing is refused any more
                write_settings(settings.output, choices)
                started = time.monotonic()
                counts = caption_files(files, index, writer, captioner, settings=settings, peers=peers)
                seconds = time.monotonic() - started
        num_new, num_damaged = peers.finish(*counts)
        if peers.is_main:
            summary = merge(settings.output, base=base)
            peers.dismiss()
            cli.print_damaged(num_damaged)
            report(summary, listing, rate=num_new / seconds, settings=settings)
            num_failed = summary.failures.total() + write_extras(settings)  # a caption, or a sidecar that was wanted
            if num_failed:
                raise SystemExit(EXIT_SOME_FAILED)


# ---- before -----------------------------------------------------------------------------------------------


def check_flags(settings: CaptionSettings) -> None:
    """Raise UserError where nothing or something impossible is asked for."""
    if not (settings.images or settings.list or settings.shards):
        raise UserError("nothing to caption: give --images with a folder, a file, a glob or a URL")
    if settings.sidecar is not None:
        check_ending(settings.sidecar)
    if settings.gallery is not None:
        check_folder(settings.gallery, images=settings.images)


def load(settings: CaptionSettings) -> "Captioner":
    """Torch, and the model on this process's device."""
    import torch

    from captioner.describe import Captioner
    from captioner.model.bundle import load_bundle

    device = find_device()
    torch.set_num_threads(1)  # whole batches are captioned side by side instead
    bfloat16 = settings.precision == "bfloat16" or (
        settings.precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()
    )
    return Captioner(
        load_bundle(settings.model, device=device),
        beam_size=settings.beam_size,
        length_penalty=settings.length_penalty,
        captions_per_image=settings.captions_per_image,
        abstain_below=settings.abstain_below,
        precision="bfloat16" if bfloat16 else "float32",
    )


def find_device() -> "torch.device":
    """The accelerator that is this process's of the machine, or the CPU."""
    import torch

    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is None or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true":
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", "0")) % torch.accelerator.device_count()
    torch.accelerator.set_device_index(index)
    return torch.device(kind.type, index)


def open_listing(settings: CaptionSettings, peers: Peers) -> Listing:
    """This process's share of the files, without what this program wrote itself."""
    excluded = own_files(settings.output, num_processes=peers.world_size)
    return Listing(
        settings.images,
        lists=settings.list,
        shards=settings.shards,
        excluded=[*excluded, settings.gallery] if settings.gallery else excluded,
        skip_suffixes=[settings.sidecar] if settings.sidecar else [],
        rank=peers.rank,
        world_size=peers.world_size,
    )


def check_files(listing: Listing, settings: CaptionSettings) -> Iterator[ImageFile]:
    """The listing as it is. Raises UserError where no process has a file, before anything is written."""
    first = next(listing, None)
    if first is None and not listing.num_found:
        looked_at = ", ".join(map(str, (*settings.images, *settings.list, *settings.shards)))
        left_out = "".join(f"; {line}" for line in lines_of_left_out(listing, settings))
        raise UserError(
            f"nothing to caption: there is no file in {looked_at} but those that this command writes{left_out}: "
            "give --images a folder with pictures"
        )
    return chain(() if first is None else (first,), listing)


def row_settings(captioner: "Captioner", settings: CaptionSettings) -> dict[str, Any]:
    """What decides the content of a row, and where its relative names start."""
    calibration = captioner.bundle.calibration
    local = [place for place in (*settings.images, *settings.shards) if not is_remote(place)]
    is_relative = bool(settings.list) or not all(map(os.path.isabs, local))
    return {
        "model": captioner.bundle.name,
        "calibration": None if calibration is None else calibration.fingerprint,
        **asdict(captioner.decoding),
        "captions_per_image": captioner.captions_per_image,
        "abstain_below": captioner.abstain_below,
        "precision": captioner.precision,
        WORKING_FOLDER: os.getcwd() if is_relative else None,  # noqa: PTH109
    }


# ---- captioning -------------------------------------------------------------------------------------------


def caption_files(
    files: Iterator[ImageFile],
    index: RowIndex,
    writer: RowWriter,
    captioner: "Captioner",
    *,
    settings: CaptionSettings,
    peers: Peers,
) -> tuple[int, int]:
    """Write a row for each file without one to this process's part; returns how many, and how many are damaged."""
    from infer.captioning import Captioning

    on_cpu = captioner.bundle.device.type == "cpu"
    num_processors = max(1, count_processors() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    num_threads = num_processors if on_cpu else 1
    captioning = Captioning(captioner, index, writer)
    num_failed = num_rows = 0
    process = f" (process 1 of {peers.world_size})" if peers.world_size > 1 else ""
    with cli.progress_bar(f"captioning{process}", total=None, unit="images", quiet=not peers.is_main) as bar:
        reader = Reader(
            left_to_do(Ahead(files, on_end=bar.set_total), index, bar),
            captioner.bundle.view,
            batch_size=settings.batch_size or (BATCH_ON_CPU if on_cpu else BATCH_ON_GPU),
            num_workers=settings.workers or num_processors,
            num_held=num_threads + 1,
        )
        with reader:
            for rows in captioning.rows(reader, num_threads=num_threads):
                peers.check()
                num_rows += len(rows)
                num_failed += sum("error" in row for row in rows)
                bar.advance(len(rows), note=f"{num_failed:,} failed")
    return num_rows, reader.num_damaged


def left_to_do(files: Iterable[ImageFile], index: RowIndex, bar: Bar) -> Iterator[ImageFile]:
    """The files that have no row yet."""
    for file in files:
        if index.is_done(file.root, file.path):
            bar.skip()
        else:
            yield file


# ---- after ------------------------------------------------------------------------------------------------


def write_extras(settings: CaptionSettings) -> int:
    """Sidecars and gallery, where they are wanted; how many sidecars could not be written."""
    num_failed = 0
    if settings.sidecar is not None:
        sidecars = write_sidecars(read_rows(settings.output), ending=settings.sidecar)
        num_failed = sidecars.num_failed
        for line in sidecars.lines():
            cli.console.print(line, markup=False)
    if settings.gallery is not None:
        page = write_gallery(read_rows(settings.output), settings.gallery, title="Captions", model=settings.model)
        cli.console.print(f"look at {page}", markup=False)
    return num_failed


def report(summary: Summary, listing: Listing, *, rate: float, settings: CaptionSettings) -> None:
    """Print what the output holds, how fast it went, and what was left out on purpose."""
    failures = ", ".join(f"{count:,} {reason}" for reason, count in sorted(summary.failures.items())) or "none"
    header = ("rows", "duplicates", "to review", "files/s now", "failures")
    row = (summary.num_rows, summary.num_duplicates, summary.num_review, rate, failures)
    cli.print_table(str(settings.output), header, [row])
    for line in lines_of_left_out(listing, settings):
        cli.console.print(line, markup=False)


def lines_of_left_out(listing: Listing, settings: CaptionSettings) -> list[str]:
    """What was left out on purpose, counted by reason."""
    left_out = {
        "links to folders were not followed (name these with --images)": listing.num_linked_folders,
        f"{settings.sidecar} files are no pictures": listing.num_skipped,
        "files were named again": listing.num_repeated,
    }
    return [f"{count:,} {what}" for what, count in left_out.items() if count]


def run() -> None:
    """The console entry."""
    cli.run(main, CaptionSettings, description=__doc__ or "", remedies=REMEDIES)


if __name__ == "__main__":
    run()
