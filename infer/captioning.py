"""Captions one process's files: batches of images from the reader become rows of its part file.

Files with the same bytes are captioned once. Only unfinished batches are held in memory.
"""

import math
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from captioner import cli
from captioner.describe import Captioner, Description, Encoded, Precision
from captioner.errors import UserError
from captioner.files.storage import is_remote
from captioner.images.views import ViewSpec, seen_area
from captioner.model.onnx import is_onnx_folder, load_onnx
from captioner.workers import count_processors
from infer.listing import Ahead, ImageFile
from infer.peers import Peers
from infer.reading import Batch, DecodedImage, Reader
from infer.results import FORMAT_VERSION, STARTED, WORKING_FOLDER, Row, RowWriter, duplicate_row
from infer.row_index import RowIndex
from infer.settings import CaptionSettings, sidecar_suffixes

if TYPE_CHECKING:
    import torch

    from captioner.model.bundle import Bundle

CPU_BATCH_SIZE, GPU_BATCH_SIZE = 8, 128
DECIMALS = 4  # of scores
CLOCK_SECONDS = 600.0  # by which the starts of processes, and the clocks of file servers, may differ
DESCRIBED_AT_ONCE = 256  # images: for each word the decoder reads all its weights, however many captions there are
MAX_SECONDS_UNTIL_DESCRIBED = 10.0  # limits how long the progress bar stands still, and what a kill costs

Encoding = tuple[Batch, list[DecodedImage], Encoded]  # a batch, its images whose bytes are new, and their embeddings
Described = list[tuple[DecodedImage, Description]]


def load_captioner(settings: CaptionSettings) -> Captioner:
    """The model on this process's device, or on the CPU through onnxruntime, without torch. Raises UserError."""
    precision: Precision = "float32"
    if not is_onnx_folder(settings.model):
        bundle = _load_torch_model(settings.model)
        precision = _best_precision(bundle.device) if settings.precision == "auto" else settings.precision
    elif settings.precision == "bfloat16":
        raise UserError("an ONNX folder has float32 only: leave out --precision, or give a model folder")
    else:
        bundle = load_onnx(settings.model)
    return Captioner(
        bundle,
        beam_size=settings.beam_size,
        length_penalty=settings.length_penalty,
        captions_per_image=settings.captions_per_image,
        abstain_below=settings.abstain_below,
        precision=precision,
        with_attention=settings.attention,
    )


def _load_torch_model(folder: str) -> "Bundle":
    import torch

    from captioner.model.bundle import load_bundle

    torch.set_num_threads(1)  # whole batches are captioned in parallel instead
    return load_bundle(folder, device=find_device())


def _best_precision(device: "torch.device") -> Precision:
    """bfloat16 on GPUs that have it."""
    import torch

    return "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"


def find_device() -> "torch.device":
    """The accelerator with the index LOCAL_RANK, made current, or the CPU."""
    import torch

    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is None or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true":
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", "0")) % torch.accelerator.device_count()
    torch.accelerator.set_device_index(index)
    return torch.device(kind.type, index)


def row_settings(captioner: Captioner, settings: CaptionSettings) -> dict[str, Any]:
    """The settings that determine a row's content, and the folder from which relative names start."""
    calibration = captioner.bundle.calibration
    local = [location for location in (*settings.images, *settings.shards) if not is_remote(location)]
    is_relative = bool(settings.list) or not all(map(os.path.isabs, local))
    return {
        "model": captioner.bundle.name,
        "calibration": None if calibration is None else calibration.fingerprint,
        **asdict(captioner.decoding),
        "captions_per_image": captioner.captions_per_image,
        "abstain_below": captioner.abstain_below,
        "precision": captioner.precision,
        **({"attention": True} if settings.attention else {}),
        WORKING_FOLDER: os.getcwd() if is_relative else None,  # noqa: PTH109
        STARTED: time.time() - CLOCK_SECONDS,
    }


def caption_files(
    files: Iterator[ImageFile],
    index: RowIndex,
    writer: RowWriter,
    captioner: Captioner,
    *,
    settings: CaptionSettings,
    peers: Peers,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[int, int, int]:
    """Write a row to this process's part for each file that has none, until it `should_stop`.

    Returns the number of rows, of images that were decoded although they are damaged, and of those that were left out
    because they have a description.
    """
    captioning = Captioning(captioner, index, writer)
    num_failed = num_rows = num_skipped = 0
    process = f" (process 1 of {peers.world_size})" if peers.world_size > 1 else ""
    with cli.progress_bar(f"captioning{process}", total=None, unit="images", quiet=not peers.is_main) as bar:
        missing = without_rows(Ahead(files, on_end=bar.set_total), index, bar)
        reader, num_threads = start_reader(missing, captioner, settings)
        with reader, closing(captioning.rows(reader, num_threads=num_threads)) as found:
            for rows in found:
                peers.check()
                num_rows += len(rows)
                num_failed += sum("error" in row for row in rows)
                bar.skip(reader.num_described - num_skipped)
                num_skipped = reader.num_described
                bar.advance(len(rows), note=f"{num_failed:,} failed")
                if should_stop():
                    break
    return num_rows, reader.num_damaged, reader.num_described


def start_reader(
    files: Iterator[ImageFile], captioner: Captioner, settings: CaptionSettings, *, max_workers: int | None = None
) -> tuple[Reader, int]:
    """A reader of the files' batches, and the number of threads that caption them."""
    on_cpu = captioner.bundle.is_on_cpu
    num_processors = max(1, count_processors() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    num_threads = num_processors if on_cpu else 1
    num_workers = settings.workers or num_processors
    reader = Reader(
        files,
        captioner.bundle.view,
        batch_size=settings.batch_size or (CPU_BATCH_SIZE if on_cpu else GPU_BATCH_SIZE),
        num_workers=min(num_workers, max_workers or num_workers),
        num_held=num_threads + 1,
        with_torch=captioner.bundle.uses_torch,
        missing_in=sidecar_suffixes(settings) if settings.missing_only else None,
    )
    return reader, num_threads


def without_rows(files: Iterable[ImageFile], index: RowIndex, bar: cli.Bar) -> Iterator[ImageFile]:
    """The files that have no row yet."""
    for file in files:
        if index.is_done(file.root, file.path):
            bar.skip()
        else:
            yield file


class Captioning:
    """Captions the batches of a reader, in threads, and writes the rows."""

    def __init__(self, captioner: Captioner, index: RowIndex, writer: RowWriter) -> None:
        self._captioner = captioner
        self._index = index
        self._writer = writer
        self._duplicates: dict[str, list[DecodedImage]] = {}  # by sha256, of the images that are being captioned
        self._encoded: list[tuple[list[DecodedImage], Encoded]] = []  # images that wait for the decoder
        self._num_waiting = 0  # files read since the decoder was last started, duplicates and failures included
        self._described_at = -math.inf  # the first batch does not wait for others

    def rows(self, reader: Reader, *, num_threads: int) -> Generator[list[Row], None, None]:
        """Caption all batches with `num_threads` threads; yields rows once they are written.

        The reader must allow `num_threads + 1` batches to be held. Raises UserError if the device runs out of memory.
        """
        encoding: deque[Future[Encoding]] = deque()
        describing: deque[Future[Described]] = deque()
        with ThreadPoolExecutor(num_threads) as threads:
            for batch in reader:
                rows, indices = self._split(batch)
                yield self._write(rows)
                if indices:
                    encoding.append(threads.submit(self._encode, batch, indices))
                else:
                    reader.release(batch)
                while encoding and (len(encoding) > num_threads or encoding[0].done()):
                    self._collect(encoding.popleft(), reader)
                if self._encoded and self._is_decoder_due():
                    describing.append(threads.submit(self._describe, self._encoded))
                    self._encoded, self._num_waiting, self._described_at = [], 0, time.monotonic()
                while describing and (len(describing) > num_threads or describing[0].done()):
                    yield self._finish(describing.popleft())
            while encoding:
                self._collect(encoding.popleft(), reader)
            size = -(-len(self._encoded) // num_threads) or 1  # each thread describes an equal number of batches
            for first in range(0, len(self._encoded), size):
                describing.append(threads.submit(self._describe, self._encoded[first : first + size]))
            while describing:
                yield self._finish(describing.popleft())

    def _is_decoder_due(self) -> bool:
        """Whether enough images wait for the decoder, or it was last started long enough ago."""
        seconds = time.monotonic() - self._described_at
        return self._num_waiting >= DESCRIBED_AT_ONCE or seconds > MAX_SECONDS_UNTIL_DESCRIBED

    def _split(self, batch: Batch) -> tuple[list[Row], list[int]]:
        """The rows of the images that need no model, and the indices, among the batch's views, of those that do."""
        self._num_waiting += len(batch.images)
        rows = [failure_row(image, model=self._captioner.bundle.name) for image in batch.images if image.error]
        indices = []
        for index, image in enumerate(_usable(batch)):
            if image.sha256 in self._duplicates:
                self._duplicates[image.sha256].append(image)
            elif known := self._index.find_caption(image.sha256):
                rows.append(duplicate_row(known, root=image.file.root, path=image.file.path))
            else:
                self._duplicates[image.sha256] = []
                indices.append(index)
        return rows, indices

    def _encode(self, batch: Batch, indices: list[int]) -> Encoding:
        """Encode the batch's views with these indices."""
        usable = _usable(batch)
        views_BPP3 = batch.views_BPP3 if len(indices) == len(usable) else batch.views_BPP3[indices]
        return batch, [usable[index] for index in indices], self._captioner.encode(views_BPP3)

    def _collect(self, encoding: Future[Encoding], reader: Reader) -> None:
        """Keep the encoded images for the decoder, and release their batch."""
        batch, new, encoded = encoding.result()
        self._encoded.append((new, encoded))
        reader.release(batch)

    def _describe(self, batches: list[tuple[list[DecodedImage], Encoded]]) -> Described:
        """The images of encoded batches, with their descriptions."""
        images = [image for new, _ in batches for image in new]
        return list(zip(images, self._captioner.describe([encoded for _, encoded in batches]), strict=True))

    def _finish(self, describing: Future[Described]) -> list[Row]:
        """Write and return the rows of described images and of their duplicates."""
        rows = []
        for image, description in describing.result():
            bundle = self._captioner.bundle
            row = success_row(image, description, model=bundle.name, view=bundle.view)
            rows.append(row)
            for duplicate in self._duplicates.pop(image.sha256):
                rows.append(duplicate_row(row, root=duplicate.file.root, path=duplicate.file.path))
        return self._write(rows)

    def _write(self, rows: list[Row]) -> list[Row]:
        """Write the rows, and index those of captioned images that are no duplicates; returns all."""
        for row, line in zip(rows, self._writer.write(rows), strict=True):
            if row.get("duplicate_of", "") is None:  # failures have no such key
                self._index.add(row, line)
        return rows


def _usable(batch: Batch) -> list[DecodedImage]:
    """The batch's images without an error, which are those that have views, in the same order."""
    return [image for image in batch.images if image.error is None]


def success_row(image: DecodedImage, description: Description, *, model: str, view: ViewSpec) -> Row:
    """The row of a captioned image."""
    row: Row = {
        **_identity(image, model),
        "caption": description.caption,
        "alt": description.alt,
        "score": round(description.score, DECIMALS),
        "token_scores": [round(score, DECIMALS) for score in description.token_scores],
        "confidence": None if description.confidence is None else round(description.confidence, DECIMALS),
        "review": description.review,
        "duplicate_of": None,
        "width": image.size[0],
        "height": image.size[1],
        "sha256": image.sha256,
    }
    if len(description.captions) > 1:
        row["captions"] = list(description.captions)
    if description.attention is not None:
        area = [round(edge, DECIMALS) for edge in seen_area(view, image.size)]
        row["attention"] = {"area": area, **description.attention.to_json()}
    return row


def failure_row(image: DecodedImage, *, model: str) -> Row:
    """The row of a file that has no caption, with the error."""
    assert image.error is not None
    return {**_identity(image, model), "error": image.error.reason, "message": image.error.message}


def _identity(image: DecodedImage, model: str) -> Row:
    return {"root": image.file.root, "path": image.file.path, "format_version": FORMAT_VERSION, "model": model}
