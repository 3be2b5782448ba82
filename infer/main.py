"""Caption every picture in folders, one JSONL row for every file.

    python infer/main.py --model runs/coco/model --images photos --output captions.jsonl --gallery gallery
    accelerate launch --config_file accelerate_config.yaml infer/main.py --images photos     # on all GPUs

Files that are no usable picture get a row that says why. A job that was stopped goes on where it stood when it is
started again with the same --output, with as many processes as you like. Exit code 0: every file has a caption; 3: some
have none, and the table counts why (accelerate launch makes 1 of it); 2: something to mend, told in one line.
"""

import os
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import asdict
from datetime import timedelta
from threading import Thread
from typing import TYPE_CHECKING, Any

from captioner import cli
from captioner.cli import Bar, UserError
from captioner.storage import is_remote
from captioner.workers import count_processors
from infer.gallery import check_folder, write_gallery
from infer.listing import ImageFile, Listing, Refused, list_files
from infer.reading import Reader, prepare
from infer.results import RowWriter, check_settings, own_files, part_path, read_rows, write_settings
from infer.row_index import RowIndex, Summary, merge
from infer.settings import CaptionSettings
from infer.sidecars import check_ending, write_sidecars

if TYPE_CHECKING:
    from accelerate import PartialState

    from captioner.describe import Captioner

EXIT_SOME_FAILED = 3
LONGEST_WAIT = timedelta(days=30)  # of the process that is through first, for the last one
BATCH_ON_CPU, BATCH_ON_GPU = 8, 128


def main(settings: CaptionSettings) -> None:
    """List, caption what has no row yet, merge, and draw the gallery."""
    check_flags(settings)
    prepare()  # while this process loads torch and the model
    state, captioner = load(settings)
    listing = open_listing(settings, state)
    choices = row_settings(captioner, settings)
    with closing(RowWriter(part_path(settings.output, state.process_index))) as writer:  # which locks the part
        check_settings(settings.output, choices)
        with closing(RowIndex(settings.output, retry_errors=settings.retry_errors)) as index:
            state.wait_for_everyone()  # all have read the earlier rows before anyone appends
            if state.is_main_process:
                write_settings(settings.output, choices)
            state.wait_for_everyone()
            started = time.monotonic()
            num_new, num_damaged = caption_files(listing, index, writer, captioner, settings=settings, state=state)
            seconds = time.monotonic() - started
    num_new = sum(gather_numbers(num_new))  # when the last process is through
    num_damaged = sum(gather_numbers(num_damaged))
    num_failed = 0
    if state.is_main_process:
        summary = merge(settings.output)
        num_failed = summary.failures.total()
        cli.print_damaged(num_damaged)
        report(summary, listing, rate=num_new / seconds, settings=settings)
        write_extras(settings)
    state.wait_for_everyone()
    state.destroy_process_group()
    if num_failed:
        raise SystemExit(EXIT_SOME_FAILED)


# ---- before -----------------------------------------------------------------------------------------------


def check_flags(settings: CaptionSettings) -> None:
    """Raise UserError for numbers that make no sense, and where nothing or something impossible is asked for."""
    if not (settings.images or settings.list or settings.shards):
        raise UserError("nothing to caption: give --images with a folder, a file, a glob or a URL")
    if any(number is not None and number < 1 for number in (settings.batch_size, settings.workers)):
        raise UserError("--batch-size and --workers must be at least 1")
    if ":/" in str(settings.output):
        raise UserError(f"--output {settings.output} is a URL: give a file on this machine")
    if settings.output.is_dir():
        raise UserError(f"--output {settings.output} is a folder: give the name of a JSONL file")
    if settings.sidecar is not None:
        check_ending(settings.sidecar)
    if settings.gallery is not None:
        check_folder(settings.gallery, images=settings.images)


def load(settings: CaptionSettings) -> "tuple[PartialState, Captioner]":
    """Torch, the processes as they were launched, and the model on this process's device."""
    import torch
    from accelerate import PartialState

    from captioner.bundle import load_bundle
    from captioner.describe import Captioner

    cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" or not torch.accelerator.is_available()
    state = PartialState(cpu=cpu, timeout=LONGEST_WAIT)
    announced = os.environ.get("WORLD_SIZE", "1")
    if announced != str(state.num_processes):
        raise UserError(f"WORLD_SIZE announces {announced} processes, Accelerate sees {state.num_processes}: unset it")
    device = torch.device(state.device or "cpu")
    torch.set_num_threads(1)  # whole batches are captioned side by side instead
    bfloat16 = settings.precision == "bfloat16" or (
        settings.precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()
    )
    captioner = Captioner(
        load_bundle(settings.model, device=device),
        beam_size=settings.beam_size,
        length_penalty=settings.length_penalty,
        captions_per_image=settings.captions_per_image,
        abstain_below=settings.abstain_below,
        precision="bfloat16" if bfloat16 else "float32",
    )
    return state, captioner


def open_listing(settings: CaptionSettings, state: "PartialState") -> Listing:
    """This process's share of the files, without what this program wrote itself."""
    excluded = own_files(settings.output, num_processes=state.num_processes)
    return list_files(
        settings.images,
        lists=settings.list,
        shards=settings.shards,
        excluded=[*excluded, settings.gallery] if settings.gallery else excluded,
        skip_endings=[settings.sidecar] if settings.sidecar else [],
        rank=state.process_index,
        world_size=state.num_processes,
    )


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
        "working_folder": os.getcwd() if is_relative else None,  # noqa: PTH109
    }


# ---- captioning -------------------------------------------------------------------------------------------


def caption_files(
    listing: Listing,
    index: RowIndex,
    writer: RowWriter,
    captioner: "Captioner",
    *,
    settings: CaptionSettings,
    state: "PartialState",
) -> tuple[int, int]:
    """Write a row for each file without one to this process's part; returns how many, and how many are damaged."""
    from infer.captioning import Captioning

    on_cpu = captioner.bundle.device.type == "cpu"
    num_processors = max(1, count_processors() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    num_threads = num_processors if on_cpu else 1
    captioning = Captioning(captioner, index, writer)
    num_failed = num_rows = 0
    share = f" (share 1 of {state.num_processes})" if state.num_processes > 1 else ""
    with cli.progress_bar(f"captioning{share}", total=None, unit="images", quiet=not state.is_main_process) as bar:
        if state.is_main_process and not settings.list:
            Thread(target=count_files, args=(open_listing(settings, state), bar), daemon=True).start()
        reader = Reader(
            left_to_do(listing, index, bar),
            captioner.bundle.view,
            batch_size=settings.batch_size or (BATCH_ON_CPU if on_cpu else BATCH_ON_GPU),
            num_workers=settings.workers or num_processors,
            num_held=num_threads + 1,
        )
        with reader:
            for rows in captioning.rows(reader, num_threads=num_threads):
                num_rows += len(rows)
                num_failed += sum("error" in row for row in rows)
                bar.advance(len(rows), note=f"{num_failed:,} failed")
    return num_rows, reader.num_damaged


def left_to_do(listing: Listing, index: RowIndex, bar: Bar) -> Iterator[ImageFile | Refused]:
    """The files that have no row yet."""
    for entry in listing:
        file = entry.file if isinstance(entry, Refused) else entry
        if index.is_done(file.root, file.path):
            bar.skip()
        else:
            yield entry


def count_files(listing: Listing, bar: Bar) -> None:
    """Tell the bar how many files there are, while they are already being captioned."""
    with suppress(UserError):
        bar.set_total(sum(1 for _ in listing))


def gather_numbers(number: int) -> list[int]:
    """Each process's number."""
    from accelerate.utils import gather_object

    return gather_object([number])


# ---- after ------------------------------------------------------------------------------------------------


def write_extras(settings: CaptionSettings) -> None:
    """Sidecars and gallery, where they are wanted."""
    if settings.sidecar is not None:
        counts = write_sidecars(read_rows(settings.output), ending=settings.sidecar)
        cli.console.print("sidecars: " + ", ".join(f"{count:,} {outcome}" for outcome, count in sorted(counts.items())))
    if settings.gallery is not None:
        page = write_gallery(read_rows(settings.output), settings.gallery, title="Captions", model=settings.model)
        cli.console.print(f"look at {page}", markup=False)


def report(summary: Summary, listing: Listing, *, rate: float, settings: CaptionSettings) -> None:
    """Print what the output holds, how fast it went, and what was left out on purpose."""
    failures = ", ".join(f"{count:,} {reason}" for reason, count in sorted(summary.failures.items())) or "none"
    header = ("rows", "duplicates", "to review", "files/s now", "failures")
    row = (summary.num_rows, summary.num_duplicates, summary.num_review, rate, failures)
    cli.print_table(str(settings.output), header, [row])
    left_out = {
        "links to folders were not followed: name these with --images": listing.num_linked_folders,
        f"{settings.sidecar} files are no pictures": listing.num_skipped,
        "files were named again": listing.num_repeated,
    }
    for what, count in left_out.items():
        if count:
            cli.console.print(f"{count:,} {what}", markup=False)


def run() -> None:
    """The console entry."""
    cli.run(main, CaptionSettings, description=__doc__ or "")


if __name__ == "__main__":
    run()
