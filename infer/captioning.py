"""One process's work: pictures come in from the reader, are captioned batch by batch, and leave as rows.

Files with the same bytes are captioned once. Nothing is held but the batches under way.
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
DESCRIBED_AT_ONCE = 256  # pictures; the decoder reads all its weights for each word, be there few captions or many
MAX_SECONDS_UNTIL_DESCRIBED = 10.0  # so long a kill may cost, and a person looks at a bar that stands

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class _Encoding:
    """A batch, its pictures with bytes that are new, and what the model will have seen in these."""

    batch: Batch
    new: list[DecodedImage]
    encoded: Future[Encoded]


@dataclass(frozen=True, slots=True)
class _Describing:
    """Pictures of several batches, and what will be said of them."""

    new: list[DecodedImage]
    descriptions: Future[list[Description]]


class Captioning:
    """Makes rows of what a reader reads, and writes them."""

    def __init__(self, captioner: Captioner, index: RowIndex, writer: RowWriter) -> None:
        self._captioner = captioner
        self._index = index
        self._writer = writer
        self._duplicates: dict[str, list[DecodedImage]] = {}  # those with the same bytes as one that is being captioned
        self._seen: list[tuple[list[DecodedImage], Encoded]] = []  # to be described
        self._num_waiting = 0  # files that have come since pictures were last given to be described
        self._described = time.monotonic()

    def rows(self, reader: Reader, *, num_threads: int) -> Iterator[list[Row]]:
        """Caption all batches, on so many threads; yields rows when they are written.

        The reader must let num_threads + 1 batches be held. Raises UserError where the device has too little memory.
        """
        encoding: deque[_Encoding] = deque()
        describing: deque[_Describing] = deque()
        with ThreadPoolExecutor(num_threads) as threads:
            for batch in reader:
                rows, places = self._sort(batch)
                yield self._write(rows)
                if places:
                    encoding.append(self._encode(batch, places, threads))
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
            share = -(-len(self._seen) // num_threads) or 1
            parts = [self._seen[first : first + share] for first in range(0, len(self._seen), share)]
            describing += [self._describe(part, threads) for part in parts]
            for job in describing:
                yield self._finish(job)

    def _is_time(self) -> bool:
        """Whether so many files wait for the decoder, or so long, that it should not wait for more."""
        return (
            self._num_waiting >= DESCRIBED_AT_ONCE or time.monotonic() - self._described > MAX_SECONDS_UNTIL_DESCRIBED
        )

    def _sort(self, batch: Batch) -> tuple[list[Row], list[int]]:
        """The rows of a batch that need no model, and the places, among the views, of the pictures that do."""
        self._num_waiting += len(batch.images)
        rows = [failure_row(picture, model=self._captioner.bundle.name) for picture in batch.images if picture.error]
        places = []
        for place, picture in enumerate(_usable(batch)):
            if picture.sha256 in self._duplicates:
                self._duplicates[picture.sha256].append(picture)
            elif known := self._index.find_caption(picture.sha256):
                rows.append(duplicate_row(known, root=picture.file.root, path=picture.file.path))
            else:
                self._duplicates[picture.sha256] = []
                places.append(place)
        return rows, places

    def _encode(self, batch: Batch, places: Sequence[int], threads: ThreadPoolExecutor) -> _Encoding:
        usable = _usable(batch)
        views_BPP3 = batch.views_BPP3 if len(places) == len(usable) else batch.views_BPP3[places]
        return _Encoding(batch, [usable[place] for place in places], threads.submit(self._captioner.encode, views_BPP3))

    def _gather(self, job: _Encoding, reader: Reader) -> None:
        self._seen.append((job.new, _result(job.encoded)))
        reader.release(job.batch)

    def _describe(self, seen: Sequence[tuple[list[DecodedImage], Encoded]], threads: ThreadPoolExecutor) -> _Describing:
        new = [picture for pictures, _ in seen for picture in pictures]
        return _Describing(new, threads.submit(self._captioner.describe, [encoded for _, encoded in seen]))

    def _finish(self, job: _Describing) -> list[Row]:
        """Write the rows of pictures that were described, and of the files that have the same bytes."""
        rows = []
        for picture, description in zip(job.new, _result(job.descriptions), strict=True):
            row = success_row(picture, description, model=self._captioner.bundle.name)
            rows.append(row)
            for duplicate in self._duplicates.pop(picture.sha256):
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
    return [picture for picture in batch.images if picture.error is None]


def success_row(picture: DecodedImage, description: Description, *, model: str) -> Row:
    """The row of a captioned picture."""
    row: Row = {
        "root": picture.file.root,
        "path": picture.file.path,
        "format_version": FORMAT_VERSION,
        "model": model,
        "caption": description.caption,
        "alt": description.alt,
        "score": round(description.score, DECIMALS),
        "token_scores": [round(score, DECIMALS) for score in description.token_scores],
        "confidence": None if description.confidence is None else round(description.confidence, DECIMALS),
        "review": description.review,
        "duplicate_of": None,
        "width": picture.size[0],
        "height": picture.size[1],
        "sha256": picture.sha256,
    }
    if len(description.captions) > 1:
        row["captions"] = list(description.captions)
    return row


def failure_row(picture: DecodedImage, *, model: str) -> Row:
    """The row of a file that has no caption, and why."""
    assert picture.error is not None
    return {
        "root": picture.file.root,
        "path": picture.file.path,
        "format_version": FORMAT_VERSION,
        "model": model,
        "error": picture.error.reason,
        "message": picture.error.message,
    }
