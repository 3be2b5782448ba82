"""Files to pictures in worker processes, which a picture that crashes or hangs its decoder takes with it alone.

A worker is given a batch of files and a buffer in shared memory. It tells of one file after the other, so that a dead
or silent worker's picture is known. What a worker died at a second one tries; where that dies too, or a worker fell
silent, the picture is an error, and the batch goes on behind it.

Shapes: B pictures of a batch that can be used, P sides of a view, in pixels.
"""

import ctypes
import hashlib
import signal
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np

from captioner import workers
from captioner.errors import UserError
from captioner.images import decoder_output
from captioner.images.loading import ImageError
from captioner.images.views import ViewSpec, read_eval_view
from captioner.workers import hire, receive, use_one_thread
from infer.listing import ImageFile, Refused

MAX_FILE_BYTES = 1 << 28
MAX_SECONDS = 120.0  # for one picture; a server that stalls is given up before
MAX_DEATHS = 30  # before the first picture was read
MAX_SECONDS_TO_DIE = 5.0  # one that waits for a disk that is gone dies later
LOOK_SECONDS = 1.0  # between two looks at who is silent
MAX_SECONDS_BETWEEN_LOOKS = 10.0  # after more nobody's silence counts


@dataclass(frozen=True, slots=True)
class Picture:
    """What became of a file: the original (width, height), upright, and the bytes' hex sha256; or why it has none.

    `complaint` is what the decoder said of a picture that can be used nevertheless.
    """

    file: ImageFile
    size: tuple[int, int] = (0, 0)
    sha256: str = ""
    complaint: str = ""
    error: ImageError | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """Some files' pictures, and the views (B, P, P, 3), uint8, of those without an error, in the same order.

    The views lie in a buffer that is written again after `Reader.release`; None where no file had to be read.
    """

    pictures: list[Picture]
    views_BPP3: np.ndarray
    buffer: int | None


def prepare() -> ForkServerContext:
    """Let the server that workers come from start to load what reads pictures, in the background."""
    return workers.start_server("infer.reading")


@dataclass
class _Task:
    """A batch under way: its files, what is known of the first of them, and deaths at the one that is next."""

    files: list[ImageFile]
    buffer: int
    pictures: list[Picture] = field(default_factory=list)
    num_deaths: int = 0

    @property
    def num_views(self) -> int:
        return sum(picture.error is None for picture in self.pictures)


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    task: _Task | None = None
    heard: float = 0.0  # when it spoke last, in monotonic seconds


class Reader:
    """Worker processes and their buffers, as long as they are needed.

    `num_held` is how many batches their receiver may hold before it releases one. `num_damaged` counts the pictures
    that can be used although their decoder complained.
    """

    def __init__(
        self, files: Iterator[ImageFile | Refused], view: ViewSpec, *, batch_size: int, num_workers: int, num_held: int
    ) -> None:
        self._files = files
        self._batch_size = batch_size
        self._context = prepare()
        num_buffers = num_held + 2 * num_workers  # each worker fills one while what it filled last is waiting
        shape = (num_buffers, batch_size, view.crop, view.crop, 3)
        self._memory = self._context.RawArray(ctypes.c_uint8, int(np.prod(shape)))
        self._buffers = _as_array(self._memory, shape)
        self._view = view
        self._free = deque(range(num_buffers))
        self._ready: deque[Batch] = deque()
        self.num_damaged = 0
        self._num_deaths = 0
        self._has_read = False
        self._looked = time.monotonic()
        self._workers = [self._hire() for _ in range(num_workers)]

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.pipe.close()
            worker.process.kill()
        for worker in self._workers:
            worker.process.join(MAX_SECONDS_TO_DIE)

    def next_batch(self) -> Batch | None:
        """The next batch that is ready, in no fixed order; None when all files were read."""
        self._hand_out()
        while not self._ready:
            if not any(worker.task for worker in self._workers):
                return None
            self._listen(LOOK_SECONDS)
            self._hand_out()
        return self._ready.popleft()

    def release(self, batch: Batch) -> None:
        """Let the batch's buffer be filled again."""
        if batch.buffer is not None:
            self._free.append(batch.buffer)

    # ---- giving ---------------------------------------------------------------------------------------------

    def _hand_out(self) -> None:
        """Give each idle worker a batch, while there are files and buffers."""
        for worker in self._workers:
            while worker.task is None and self._free:
                entries = list(islice(self._files, self._batch_size))
                if not entries:
                    return
                refused = [Picture(entry.file, error=entry.error) for entry in entries if isinstance(entry, Refused)]
                if refused:
                    self._ready.append(Batch(refused, self._buffers[0, :0], None))
                files = [entry for entry in entries if isinstance(entry, ImageFile)]
                if files:
                    self._give(worker, _Task(files, self._free.popleft()))

    def _give(self, worker: _Worker, task: _Task) -> None:
        worker.task, worker.heard = task, time.monotonic()
        with suppress(OSError):  # a worker that died is met when its message is awaited
            worker.pipe.send((task.files[len(task.pictures) :], task.buffer, task.num_views))

    def _hire(self) -> _Worker:
        return _Worker(*hire(self._context, _work, self._memory, self._buffers.shape, self._view))

    # ---- hearing --------------------------------------------------------------------------------------------

    def _listen(self, seconds: float) -> None:
        """Take what workers say within so many seconds, and look after those that say nothing."""
        busy = {worker.pipe: worker for worker in self._workers if worker.task}
        for pipe in wait(list(busy), seconds):
            worker = busy[pipe]  # type: ignore[index]
            picture = receive(worker.pipe)
            if picture is None:
                self._replace(worker, ImageError("crashed the decoder", _how_it_ended(worker.process)), num_tries=2)
            else:
                self._has_read = True
                self._note(worker, picture)
        now = time.monotonic()
        if now - self._looked > MAX_SECONDS_BETWEEN_LOOKS:  # this process was busy or stopped, perhaps its workers too
            for worker in self._workers:
                worker.heard = now
        self._looked = now
        for worker in self._workers:
            if worker.task and now - worker.heard > MAX_SECONDS and not worker.pipe.poll():
                worker.process.kill()
                self._replace(worker, ImageError("timed out", f"not decoded within {MAX_SECONDS:.0f} s"), num_tries=1)

    def _note(self, worker: _Worker, picture: Picture) -> None:
        """Keep what became of the task's next file."""
        task = worker.task
        assert task is not None
        task.pictures.append(picture)
        self.num_damaged += bool(picture.complaint)
        task.num_deaths, worker.heard = 0, time.monotonic()
        if len(task.pictures) == len(task.files):
            self._ready.append(Batch(task.pictures, self._buffers[task.buffer, : task.num_views], task.buffer))
            worker.task = None

    def _replace(self, worker: _Worker, error: ImageError, *, num_tries: int) -> None:
        """Let a new worker go on with the task of a dead one, behind the picture if so many have died at it."""
        task = worker.task
        assert task is not None
        worker.process.join(MAX_SECONDS_TO_DIE)
        worker.pipe.close()
        self._num_deaths += 1
        if self._num_deaths >= MAX_DEATHS and not self._has_read:
            raise UserError(
                f"{self._num_deaths} reading processes died and none has read a picture ({error.message}): is there "
                "too little memory for so many --workers?"
            )
        new = self._hire()
        worker.process, worker.pipe = new.process, new.pipe
        task.num_deaths += 1
        if task.num_deaths >= num_tries:
            self._note(worker, Picture(task.files[len(task.pictures)], error=error))
        if worker.task:
            self._give(worker, task)


def _how_it_ended(process: BaseProcess) -> str:
    process.join(MAX_SECONDS_TO_DIE)
    code = process.exitcode or 0
    ending = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return f"its process ended with {ending}"


# ---- in the workers ---------------------------------------------------------------------------------------


def _work(pipe: Connection, memory: Any, shape: tuple[int, ...], view: ViewSpec) -> None:
    """A worker's life: files come in, pictures go out, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends its workers
    use_one_thread()
    buffers = _as_array(memory, shape)
    with decoder_output.own_stderr(), suppress(EOFError, OSError):
        while True:
            files, buffer, row = pipe.recv()
            for file in files:
                picture = read_picture(file, view, out_PP3=buffers[buffer, row])
                row += picture.error is None
                pipe.send(picture)


def _as_array(memory: Any, shape: tuple[int, ...]) -> np.ndarray:
    return np.frombuffer(memory, dtype=np.uint8).reshape(shape)


def read_picture(file: ImageFile, view: ViewSpec, *, out_PP3: np.ndarray) -> Picture:
    """Read a file's view into `out_PP3`; one that cannot be used says why."""
    try:
        data = file.read(max_bytes=MAX_FILE_BYTES)
        with decoder_output.collect() as complaints:
            out_PP3[:], size = read_eval_view(data, view)
    except ImageError as error:
        return Picture(file, error=error)
    return Picture(file, size, hashlib.sha256(data).hexdigest(), complaint="; ".join(complaints))
