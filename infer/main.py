"""Caption every picture in folders, one JSONL row for every file.

    python infer/main.py --model runs/coco/model --images photos --output captions.jsonl --gallery gallery
    accelerate launch --config_file accelerate_config.yaml infer/main.py --images photos     # on all GPUs

Files that are no usable picture get a row that says why. A job that was stopped goes on where it stood when it is
started again with the same --output.
"""

import hashlib
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import PartialState
from torch.utils.data import DataLoader, Dataset

from captioner import cli, storage, views
from captioner.bundle import Bundle, load_bundle
from captioner.cli import UserError
from captioner.decoding import Caption
from captioner.images import ImageError
from captioner.views import ViewSpec
from infer.folders import ImageFile, list_files
from infer.gallery import write_gallery
from infer.results import FORMAT_VERSION, Row, RowWriter, find_parts, merge, part_path, read_rows
from infer.settings import CaptionSettings


def main(settings: CaptionSettings) -> None:
    """List, caption what has no row yet, merge, and draw the gallery."""
    check_settings(settings)
    state = PartialState()
    device = torch.device(state.device or "cpu")
    bundle = load_bundle(settings.model, device=device)
    ours = (settings.output, *find_parts(settings.output), settings.gallery)
    files = list_files(settings.images, excluded=[path for path in ours if path])
    earlier = read_rows(settings.output)
    refuse_other_model(earlier, bundle=bundle, settings=settings)
    done = {(row["root"], row["path"]) for row in earlier}
    left = [file for file in files if (file.root, file.path) not in done]
    state.wait_for_everyone()  # all have read the earlier rows before anyone appends
    started = time.monotonic()
    caption_files(left[state.process_index :: state.num_processes], bundle=bundle, settings=settings, state=state)
    state.wait_for_everyone()
    if state.is_main_process:
        seconds = time.monotonic() - started
        rows = merge(settings.output)
        if settings.gallery is not None:
            write_gallery(rows, settings.gallery, title="Captions", model=str(settings.model))
        report(rows, num_new=len(left), seconds=seconds, settings=settings)
    state.wait_for_everyone()
    state.destroy_process_group()


def check_settings(settings: CaptionSettings) -> None:
    """Raise UserError for numbers that make no sense, or folders that are none."""
    if settings.batch_size < 1 or settings.workers < 0 or (settings.beam_size or 1) < 1:
        raise UserError("--batch-size and --beam-size must be at least 1, --workers at least 0")
    if settings.output.is_dir():
        raise UserError(f"--output {settings.output} is a folder: give the name of a JSONL file")


def refuse_other_model(rows: Sequence[Row], *, bundle: Bundle, settings: CaptionSettings) -> None:
    """Raise UserError when earlier rows in the output come from other weights."""
    others = sorted({row["model"] for row in rows} - {bundle.name})
    if others:
        raise UserError(
            f"{settings.output} holds captions of another model ({others[0]}, this is {bundle.name}): "
            "give another --output, or delete it"
        )


# ---- reading --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Picture:
    """A file that was read: its view (P, P, 3) uint8, original (width, height) and sha256; or why it has none."""

    file: ImageFile
    view_PP3: np.ndarray | None
    size: tuple[int, int]
    sha256: str
    failure: ImageError | None = None


class Pictures(Dataset[Picture]):
    """The files' pictures; a file that cannot be used is an item that says why."""

    def __init__(self, files: Sequence[ImageFile], view: ViewSpec) -> None:
        self.files = files
        self.view = view

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Picture:
        file = self.files[index]
        try:
            data = read_file(file)
            view_PP3, size = views.read_eval_view(data, self.view)
            return Picture(file, view_PP3, size, hashlib.sha256(data).hexdigest())
        except ImageError as error:
            return Picture(file, None, (0, 0), "", error)


def read_file(file: ImageFile) -> bytes:
    """A file's bytes. Raises ImageError."""
    try:
        return storage.read_bytes(str(file.location))
    except FileNotFoundError as error:
        raise ImageError("missing", "the file was there when the folder was listed, and is not any more") from error
    except OSError as error:
        raise ImageError("unreadable", f"{error.strerror or error}") from error


def read_pictures(files: Sequence[ImageFile], *, bundle: Bundle, settings: CaptionSettings) -> Iterator[list[Picture]]:
    """The files' pictures in batches, in order, read by worker processes."""
    loader = DataLoader(
        Pictures(files, bundle.view),
        batch_size=settings.batch_size,
        num_workers=min(settings.workers, -(-len(files) // settings.batch_size)),
        collate_fn=list,
    )
    return iter(loader)


# ---- captioning -----------------------------------------------------------------------------------------------


def caption_files(
    files: Sequence[ImageFile], *, bundle: Bundle, settings: CaptionSettings, state: PartialState
) -> None:
    """Append a row for each file to this process's part of the output, batch after batch."""
    if not files:
        return
    if bundle.device.type == "cpu":  # `accelerate launch` leaves a lone CPU process one thread
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // state.num_processes))
    writer = RowWriter(part_path(settings.output, state.process_index))
    num_failed = 0
    with cli.progress_bar("captioning", total=len(files), unit="images", quiet=not state.is_main_process) as bar:
        for pictures in read_pictures(files, bundle=bundle, settings=settings):
            rows = caption_batch(pictures, bundle=bundle, beam_size=settings.beam_size)
            writer.write(rows)
            num_failed += sum("error" in row for row in rows)
            bar.advance(len(rows), note=f"{num_failed} failed")
    writer.close()


@torch.inference_mode()
def caption_batch(pictures: Sequence[Picture], *, bundle: Bundle, beam_size: int | None) -> list[Row]:
    """A row for each picture, in order."""
    usable = [picture.view_PP3 for picture in pictures if picture.view_PP3 is not None]
    captions = iter(bundle.caption_views(np.stack(usable), beam_size=beam_size) if usable else [])
    return [
        failure_row(picture, model=bundle.name)
        if picture.failure
        else success_row(picture, next(captions), bundle=bundle)
        for picture in pictures
    ]


def success_row(picture: Picture, caption: Caption, *, bundle: Bundle) -> Row:
    """The row of a captioned picture."""
    return {
        "root": picture.file.root,
        "path": picture.file.path,
        "format_version": FORMAT_VERSION,
        "model": bundle.name,
        "caption": bundle.vocabulary.decode(caption.tokens),
        "score": round(caption.score, 4),
        "token_scores": [round(score, 4) for score in caption.token_scores],
        "width": picture.size[0],
        "height": picture.size[1],
        "sha256": picture.sha256,
    }


def failure_row(picture: Picture, *, model: str) -> Row:
    """The row of a file that has no caption, and why."""
    assert picture.failure is not None
    return {
        "root": picture.file.root,
        "path": picture.file.path,
        "format_version": FORMAT_VERSION,
        "model": model,
        "error": picture.failure.reason,
        "message": picture.failure.message,
    }


def report(rows: Sequence[Row], *, num_new: int, seconds: float, settings: CaptionSettings) -> None:
    """Print what was done and where it lies."""
    failures = Counter(row["error"] for row in rows if "error" in row)
    rate = num_new / seconds if num_new else 0.0
    failed = ", ".join(f"{count} {reason}" for reason, count in sorted(failures.items())) or "none"
    header = ("rows", "captioned now", "failures", "seconds", "files/s")
    cli.print_table(str(settings.output), header, [(len(rows), num_new, failed, seconds, rate)])
    if settings.gallery is not None:
        cli.console.print(f"look at {settings.gallery / 'index.html'}")


def run() -> None:
    """The console entry."""
    cli.run(main, CaptionSettings, description=__doc__ or "")


if __name__ == "__main__":
    run()
