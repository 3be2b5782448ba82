"""Captions the images of a reader, batch by batch, and writes their rows.

Files with the same bytes are captioned once. Only the batches in progress are held in memory.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch

from captioner.describe import Captioner, Description, Encoded
from captioner.errors import UserError
from infer.reading import Batch, DecodedImage, Reader
from infer.results import FORMAT_VERSION, Row, RowWriter, duplicate_row
from infer.row_index import RowIndex

DECIMALS = 4  # of scores
DESCRIBED_AT_ONCE = 256  # images; the decoder reads all its weights for each word, whatever the number of captions
MAX_SECONDS_UNTIL_DESCRIBED = 10.0  # what a kill may cost; the progress bar stands still meanwhile

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class _Encoding:
    """A batch, its images with new bytes, and the encoder's output for these."""

    batch: Batch
    new: list[DecodedImage]
    encoded: Future[Encoded]


@dataclass(frozen=True, slots=True)
class _Describing:
    """Images of several batches, and their descriptions."""

    new: list[DecodedImage]
    descriptions: Future[list[Description]]


class Captioning:
    """Captions a reader's batches, and writes their rows."""

    def __init__(self, captioner: Captioner, index: RowIndex, writer: RowWriter) -> None:
        self._captioner = captioner
        self._index = index
        self._writer = writer
        self._duplicates: dict[str, list[DecodedImage]] = {}  # by sha256: copies of images in progress
        self._seen: list[tuple[list[DecodedImage], Encoded]] = []  # to be described
        self._num_waiting = 0  # files since the last call of the decoder
        self._described = time.monotonic()

    def rows(self, reader: Reader, *, num_threads: int) -> Iterator[list[Row]]:
        """Caption all batches, on `num_threads` threads; yields rows when they are written.

        The reader must let num_threads + 1 batches be held. Raises UserError when the device has too little memory.
        """
        encoding: deque[_Encoding] = deque()
        describing: deque[_Describing] = deque()
        with ThreadPoolExecutor(num_threads) as threads:
            for batch in reader:
                rows, indices = self._sort(batch)
                yield self._write(rows)
                if indices:
                    encoding.append(self._encode(batch, indices, threads))
                else:
                    reader.release(batch)
                while encoding and (len(encoding) > num_threads or encoding[0].encoded.done()):
                    self._gather(encoding.popleft(), reader)
                if self._seen and self._is_time():
                    describing.append(self._describe(self._seen, threads))
                    self._seen, self._num_waiting, self._described = [], 0, time.monotonic()
                while describing and (len(describing) > num_threads or describing[0].descriptions.done()):
                    yield self._finish(describing.popleft())
            for job in encoding:
                self._gather(job, reader)
            num_batches = -(-len(self._seen) // num_threads) or 1
            parts = [self._seen[first : first + num_batches] for first in range(0, len(self._seen), num_batches)]
            describing += [self._describe(part, threads) for part in parts]
            for job in describing:
                yield self._finish(job)

    def _is_time(self) -> bool:
        """Whether enough files wait for the decoder, or have waited long enough."""
        return (
            self._num_waiting >= DESCRIBED_AT_ONCE or time.monotonic() - self._described > MAX_SECONDS_UNTIL_DESCRIBED
        )

    def _sort(self, batch: Batch) -> tuple[list[Row], list[int]]:
        """The rows of a batch that need no model, and the indices of the views that do."""
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

    def _encode(self, batch: Batch, indices: Sequence[int], threads: ThreadPoolExecutor) -> _Encoding:
        usable = _usable(batch)
        views_BPP3 = batch.views_BPP3 if len(indices) == len(usable) else batch.views_BPP3[indices]
        return _Encoding(
            batch, [usable[index] for index in indices], threads.submit(self._captioner.encode, views_BPP3)
        )

    def _gather(self, job: _Encoding, reader: Reader) -> None:
        self._seen.append((job.new, _result(job.encoded)))
        reader.release(job.batch)

    def _describe(self, seen: Sequence[tuple[list[DecodedImage], Encoded]], threads: ThreadPoolExecutor) -> _Describing:
        new = [image for images, _ in seen for image in images]
        return _Describing(new, threads.submit(self._captioner.describe, [encoded for _, encoded in seen]))

    def _finish(self, job: _Describing) -> list[Row]:
        """Write the rows of described images, and of the files with the same bytes."""
        rows = []
        for image, description in zip(job.new, _result(job.descriptions), strict=True):
            row = success_row(image, description, model=self._captioner.bundle.name)
            rows.append(row)
            for duplicate in self._duplicates.pop(image.sha256):
                rows.append(duplicate_row(row, root=duplicate.file.root, path=duplicate.file.path))
        return self._write(rows)

    def _write(self, rows: list[Row]) -> list[Row]:
        for row, offset in zip(rows, self._writer.write(rows), strict=True):
            if row.get("duplicate_of", "") is None:  # the first with these bytes; failures have no such key
                self._index.add(row, self._writer.path, offset)
        return rows


def _result(future: Future[Result]) -> Result:
    try:
        return future.result()
    except torch.OutOfMemoryError as error:
        raise UserError(
            "the device has too little memory: give a smaller --batch-size, --captions-per-image or --beam-size"
        ) from error


def _usable(batch: Batch) -> list[DecodedImage]:
    return [image for image in batch.images if image.error is None]


def success_row(image: DecodedImage, description: Description, *, model: str) -> Row:
    """The row of a captioned image."""
    row: Row = {
        "root": image.file.root,
        "path": image.file.path,
        "format_version": FORMAT_VERSION,
        "model": model,
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
    return row


def failure_row(image: DecodedImage, *, model: str) -> Row:
    """The row of a file that has no caption, and why."""
    assert image.error is not None
    return {
        "root": image.file.root,
        "path": image.file.path,
        "format_version": FORMAT_VERSION,
        "model": model,
        "error": image.error.reason,
        "message": image.error.message,
    }
