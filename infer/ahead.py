"""A listing that runs ahead of captioning, so that the number of files is known long before its end.

The files are queued in a temporary file: memory stays flat, and nothing is listed twice.
"""

import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import mkstemp
from threading import Condition, Thread

from captioner.errors import UserError
from infer.listing import ImageFile


class Ahead(Iterator[ImageFile]):
    """Iterates over the files in order; a thread lists them without waiting, and then calls `on_end` with their number.

    An exception of the listing is raised after the last file. Raises UserError if the temporary file cannot grow.
    """

    def __init__(self, files: Iterator[ImageFile], *, on_end: Callable[[int], None]) -> None:
        handle, name = mkstemp()
        self._writer = io.FileIO(handle, "w")
        self._reader = open(name, "rb")  # noqa: PTH123, SIM115 - closed after the last file
        Path(name).unlink()  # or a kill would leave it there
        self._changed = Condition()
        self._num_waiting = 0  # files in the queue
        self._num_ready = 0  # moved here from `_num_waiting`, and taken without the lock
        self._is_over = False
        self._error: BaseException | None = None
        Thread(target=self._list, args=(files, on_end), daemon=True).start()

    def __next__(self) -> ImageFile:
        if not self._num_ready:
            with self._changed:
                self._changed.wait_for(lambda: self._num_waiting or self._is_over)
                self._num_ready, self._num_waiting = self._num_waiting, 0
            if not self._num_ready:
                self._reader.close()
                raise self._error or StopIteration
        self._num_ready -= 1
        return pickle.load(self._reader)

    def _list(self, files: Iterator[ImageFile], on_end: Callable[[int], None]) -> None:
        num_listed = 0
        try:
            with self._writer:
                for num_listed, file in enumerate(files, start=1):  # noqa: B007
                    self._append(pickle.dumps(file))
            on_end(num_listed)
        except BaseException as error:
            self._error = error
        finally:
            with self._changed:
                self._is_over = True
                self._changed.notify()

    def _append(self, data: bytes) -> None:
        try:
            while data:  # a nearly full disk may write only some of it
                data = data[self._writer.write(data) :]
        except OSError as error:
            raise UserError(
                f"the temporary file of the listing cannot grow ({error.strerror}): set TMPDIR to a folder with room"
            ) from error
        with self._changed:
            self._num_waiting += 1
            self._changed.notify()
