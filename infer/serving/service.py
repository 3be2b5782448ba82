"""Captions uploaded images, as batch captioning does: worker processes decode, threads caption what waits together.

An image that crashes or hangs its decoder costs itself alone. See `captioner.workers`.
"""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
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

    Each of `num_workers` processes decodes one image at a time. Each of `num_threads` threads captions all images that
    wait, up to `batch_size`.
    """

    def __init__(
        self, captioner: Captioner, *, batch_size: int, num_workers: int, num_threads: int, max_pixels: int
    ) -> None:
        self.captioner = captioner
        self._batch_size = batch_size
        self._max_pixels = max_pixels
        self._uploads: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._decoded: queue.SimpleQueue[_Decoded | None] = queue.SimpleQueue()
        self._decoders = _start(self._decode_uploads, num_workers)
        self._describers = _start(self._caption_decoded, num_threads)

    def __enter__(self) -> "Service":
        return self

    def __exit__(self, *error: object) -> None:
        for waiting, threads in ((self._uploads, self._decoders), (self._decoded, self._describers)):
            for _ in threads:
                waiting.put(None)
            for thread in threads:
                thread.join()

    def submit(self, name: str, file: BinaryIO) -> Future[Row]:
        """The row of an uploaded file, with a caption or an error. The file stays open until the row is there."""
        row: Future[Row] = Future()
        self._uploads.put(_Job(name, file, row))
        return row

    def _decode_uploads(self) -> None:
        """Decode uploads until a None; the pool is replaced after an error of its own."""
        view = self.captioner.bundle.view
        while True:
            pool = WorkerPool(
                prepare(), decode_upload, view, MAX_SECONDS, size=1, max_deaths=MAX_DEATHS, max_seconds=MAX_SECONDS
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
        """Caption decoded images until a None, each time all that wait, up to the batch size."""
        while first := self._decoded.get():
            batch = [first]
            while len(batch) < self._batch_size:
                try:
                    following = self._decoded.get_nowait()
                except queue.Empty:
                    break
                if following is None:
                    self._decoded.put(None)
                    break
                batch.append(following)
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


def _start(work: Callable[[], None], count: int) -> list[threading.Thread]:
    threads = [threading.Thread(target=work, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads
