"""Decodes files in worker processes: an image that crashes or hangs its decoder costs itself alone.

A worker gets a batch of files and a buffer in shared memory for their views. See `captioner.workers` for what happens
when it dies.

Shapes: B decoded images of a batch, P side of a view in pixels.
"""

import ctypes
import hashlib
import signal
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from multiprocessing.context import ForkServerContext
from typing import Any

import numpy as np

from captioner.images import decoder_output, silence_pillow
from captioner.images.loading import ImageError
from captioner.images.views import ViewSpec, read_eval_view
from captioner.workers import WorkerPool, start_server
from infer.listing import ImageFile
from infer.metadata.described import find_sidecar, is_described

MAX_FILE_BYTES = 1 << 28
MAX_SECONDS = 120.0  # for one image; storage gives up on a stalled server earlier
MAX_DEATHS = 30  # of a batch's workers, besides those at images that are left out

_Task = tuple[list[ImageFile], int]  # files, and the buffer for their views


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """A file's original (width, height), upright, and the hex sha256 of its bytes; or the error.

    `complaint` is what the decoder said about an image that is damaged but usable. One that `is_described` has a
    description already, and is not decoded.
    """

    file: ImageFile
    size: tuple[int, int] = (0, 0)
    sha256: str = ""
    complaint: str = ""
    error: ImageError | None = None
    is_described: bool = False


@dataclass(frozen=True, slots=True)
class Batch:
    """The images of some files, and the views (B, P, P, 3), uint8, of those without an error, in the same order.

    The views are in a shared buffer that is overwritten after `Reader.release`.
    """

    images: list[DecodedImage]
    views_BPP3: np.ndarray
    buffer: int


def prepare(*, with_torch: bool = True, may_fork: bool = False) -> ForkServerContext:
    """Start the server process of the workers, unless it runs: see `start_server`."""
    return start_server("infer.reading", with_torch=with_torch, may_fork=may_fork)


class Reader(Iterator[Batch]):
    """Iterates over the batches as they are decoded, in no fixed order. Close it with a `with` statement.

    The consumer may hold `num_held` batches before it releases one. `num_damaged` counts the usable images about which
    their decoder complained. Without torch Pillow resizes. With `missing_in`, suffixes of sidecars, images are left out
    that have a description in one of these or in their own metadata; `num_described` counts them. Raises UserError when
    workers die and no image is to blame.
    """

    def __init__(
        self,
        files: Iterator[ImageFile],
        view: ViewSpec,
        *,
        batch_size: int,
        num_workers: int,
        num_held: int,
        with_torch: bool = True,
        missing_in: tuple[str, ...] | None = None,
    ) -> None:
        context = prepare(with_torch=with_torch)
        num_buffers = num_held + 2 * num_workers  # for each worker one in work and one that waits for the consumer
        shape = (num_buffers, batch_size, view.crop, view.crop, 3)
        memory = context.RawArray(ctypes.c_uint8, int(np.prod(shape)))
        self._buffers = _as_array(memory, shape)
        self._free = deque(range(num_buffers))
        self.num_damaged = self.num_described = 0
        self._pool = WorkerPool(
            context,
            partial(_decode, with_torch=with_torch, missing_in=missing_in),
            memory,
            shape,
            view,
            size=num_workers,
            max_deaths=MAX_DEATHS,
            max_seconds=MAX_SECONDS,
        )
        self._results = self._pool.run(self._tasks(files, batch_size))

    def __enter__(self) -> "Reader":
        self._pool.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.__exit__(*error)

    def __next__(self) -> Batch:
        buffer, images = next(self._results)
        self.num_described += sum(image.is_described for image in images)
        images = [image for image in images if not image.is_described]
        self.num_damaged += sum(bool(image.complaint) for image in images)
        num_views = sum(image.error is None for image in images)
        return Batch(images, self._buffers[buffer, :num_views], buffer)

    def release(self, batch: Batch) -> None:
        """Let the batch's buffer be overwritten."""
        self._free.append(batch.buffer)

    def _tasks(self, files: Iterator[ImageFile], batch_size: int) -> Iterator[tuple[str, _Task]]:
        while batch := list(islice(files, batch_size)):
            yield f"the {len(batch)} files from {batch[0].location} on", (batch, self._free.popleft())


def _as_array(memory: Any, shape: tuple[int, ...]) -> np.ndarray:
    return np.frombuffer(memory, dtype=np.uint8).reshape(shape)


# ---- in the workers ---------------------------------------------------------------------------------------


def _decode(
    task: _Task,
    memory: Any,
    shape: tuple[int, ...],
    view: ViewSpec,
    *,
    with_torch: bool,
    missing_in: tuple[str, ...] | None,
    excluded: dict[int, int | None],
    set_index: Callable[[int], None],
    report: object,
) -> tuple[int, list[DecodedImage]]:
    """The task's buffer, with the views of its usable images in its first rows, and all its images."""
    silence_pillow()
    files, buffer = task
    views_BPP3 = _as_array(memory, shape)[buffer]
    images: list[DecodedImage] = []
    row = 0
    for index, file in enumerate(files):
        if index in excluded:
            image = DecodedImage(file, error=blame(excluded[index], max_seconds=MAX_SECONDS))
        else:
            set_index(index)
            image = decode_image(file, view, out_PP3=views_BPP3[row], with_torch=with_torch, missing_in=missing_in)
        row += image.error is None and not image.is_described
        images.append(image)
    return buffer, images


def decode_image(
    file: ImageFile,
    view: ViewSpec,
    *,
    out_PP3: np.ndarray,
    with_torch: bool = True,
    missing_in: tuple[str, ...] | None = None,
) -> DecodedImage:
    """Write a file's view to `out_PP3`, unless the result has an error, or the image has a description already."""
    try:
        if missing_in is not None and find_sidecar(file, suffixes=missing_in):
            return DecodedImage(file, is_described=True)
        data = file.read(max_bytes=MAX_FILE_BYTES)
        if missing_in is not None and is_described(data):
            return DecodedImage(file, is_described=True)
        with decoder_output.collect() as complaints:
            out_PP3[:], size = read_eval_view(data, view, with_torch=with_torch)
    except ImageError as error:
        return DecodedImage(file, error=error)
    return DecodedImage(file, size, hashlib.sha256(data).hexdigest(), complaint="; ".join(complaints))


def blame(exit_code: int | None, *, max_seconds: float) -> ImageError:
    """The error of an image whose workers ended with this exit code (None: after `max_seconds`)."""
    if exit_code is None:
        return ImageError("timed out", f"not decoded within {max_seconds:.0f} s")
    how = f"signal {signal.Signals(-exit_code).name}" if exit_code < 0 else f"exit code {exit_code}"
    return ImageError("crashed the decoder", f"its process ended with {how}")
