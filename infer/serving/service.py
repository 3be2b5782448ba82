"""Captions uploaded images: worker processes decode them as batch captioning does, a thread captions all that wait.

An image that crashes or hangs its decoder costs itself alone. See `captioner.workers`.
"""

import queue
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from threading import Thread
from typing import BinaryIO

import numpy as np

from captioner.describe import Captioner
from captioner.workers import WorkerPool
from infer.captioning import failure_row, success_row
from infer.reading import MAX_DEATHS, DecodedImage, prepare
from infer.results import Row
from infer.serving.decoding import Upload, decode_upload

MAX_SECONDS = 20.0  # of decoding one image


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    name: str
    file: BinaryIO
    row: Future[Row]


_Decoded = tuple[_Job, DecodedImage, np.ndarray]  # with the view (P, P, 3), uint8


class Service:
    """Captions images from any thread until it is closed, as a `with` statement does.

    Each of `num_workers` processes decodes one image at a time. A thread captions all decoded images that wait, up to
    `batch_size`; how many processors it uses is torch's setting.
    """

    def __init__(self, captioner: Captioner, *, batch_size: int, num_workers: int, max_pixels: int) -> None:
        self.captioner = captioner
        self._batch_size = batch_size
        self._max_pixels = max_pixels
        self._uploads: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._decoded: queue.SimpleQueue[_Decoded | None] = queue.SimpleQueue()
        self._decoders = [Thread(target=self._decode_uploads, daemon=True) for _ in range(num_workers)]
        self._captioning = Thread(target=self._caption_decoded, daemon=True)
        for thread in (*self._decoders, self._captioning):
            thread.start()

    def __enter__(self) -> "Service":
        return self

    def __exit__(self, *error: object) -> None:
        for _ in self._decoders:
            self._uploads.put(None)
        for thread in self._decoders:
            thread.join()
        self._decoded.put(None)
        self._captioning.join()

    def submit(self, name: str, file: BinaryIO) -> Future[Row]:
        """The row of an uploaded file, with a caption or an error. The file must stay open until the row is there."""
        row: Future[Row] = Future()
        self._uploads.put(_Job(name, file, row))
        return row

    def _decode_uploads(self) -> None:
        """Decode uploads until a None, in a process that is replaced when it dies."""
        bundle = self.captioner.bundle
        while True:
            pool = WorkerPool(
                prepare(with_torch=bundle.uses_torch),
                decode_upload,
                bundle.view,
                bundle.uses_torch,
                MAX_SECONDS,
                size=1,
                max_deaths=MAX_DEATHS,
                max_seconds=MAX_SECONDS,
            )
            with pool:
                for job in iter(self._uploads.get, None):
                    if job.row.set_running_or_notify_cancel() and not self._decode(job, pool):
                        break
                else:
                    return

    def _decode(self, job: _Job, pool: WorkerPool) -> bool:
        """Decode an upload; False if the pool failed, and the row with it."""
        try:
            upload = Upload("", job.name, data=job.file.read(), max_pixels=self._max_pixels)
            ((image, view_PP3),) = pool.run(iter([(f"upload {job.name!r}", upload)]))
        except Exception as error:
            job.row.set_exception(error)
            return False
        if image.error is None:
            self._decoded.put((job, image, view_PP3))
        else:
            job.row.set_result(failure_row(image, model=self.captioner.bundle.name))
        return True

    def _caption_decoded(self) -> None:
        """Caption decoded images until a None, which comes after the last one."""
        while first := self._decoded.get():
            batch = [first]
            with suppress(queue.Empty):
                while len(batch) < self._batch_size and (following := self._decoded.get_nowait()):
                    batch.append(following)
                if len(batch) < self._batch_size:  # it was the None
                    self._decoded.put(None)
            self._caption(batch)

    def _caption(self, batch: list[_Decoded]) -> None:
        bundle = self.captioner.bundle
        try:
            descriptions = self.captioner.describe_views(np.stack([view_PP3 for *_, view_PP3 in batch]))
        except Exception as error:
            for job, *_ in batch:
                job.row.set_exception(error)
            return
        for (job, image, _), description in zip(batch, descriptions, strict=True):
            job.row.set_result(success_row(image, description, model=bundle.name, view=bundle.view))
