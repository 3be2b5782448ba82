"""Buffers for batches that worker processes fill and the training process reads: no copy, no fresh pages."""

import mmap
import weakref
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info


@dataclass(frozen=True, slots=True)
class Slot:
    """The first `rows` rows of a buffer."""

    number: int
    rows: int


class Ring:
    """Buffers of `shape` (B views or features) for each worker, in memory shared with processes forked from here.

    A worker (the training process itself, where there are none) takes a free buffer, fills it and sends its Slot; the
    training process makes a tensor of it, and the buffer is free again as soon as nothing refers to that tensor's
    memory any more. Whoever keeps all batches loses nothing: a worker that finds no free buffer makes a fresh one. In
    processes that were not forked there are none.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, *, workers: int, slots: int) -> None:
        self._slots = slots
        self._shape = shape
        self._dtype = dtype
        self._rows: np.ndarray | None = _shared((max(1, workers) * slots, *shape), dtype)
        self._taken = _shared((max(1, workers) * slots,), np.dtype(np.uint8))

    def __getstate__(self) -> dict[str, object]:
        return {"_slots": 0, "_rows": None, "_taken": None, "_shape": self._shape, "_dtype": self._dtype}

    def take(self) -> tuple[int | None, np.ndarray]:
        """A free buffer's number, None for a fresh one, and the buffer. Of this worker process."""
        if self._rows is not None:
            info = get_worker_info()
            worker = info.id if info else 0
            for number in range(worker * self._slots, (worker + 1) * self._slots):
                if not self._taken[number]:  # only this worker sets it, only the training process clears it
                    self._taken[number] = 1
                    return number, self._rows[number]
        return None, np.empty(self._shape, dtype=self._dtype)

    def tensor(self, slot: Slot) -> Tensor:
        """What a worker filled."""
        assert self._rows is not None
        rows = self._rows[slot.number]
        owner = np.frombuffer(rows, dtype=self._dtype).reshape(
            self._shape
        )  # an object that lives as long as its tensor
        weakref.finalize(owner, self._taken.__setitem__, slot.number, 0)
        return torch.from_numpy(owner)[: slot.rows]


def _shared(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    count = int(np.prod(shape))
    memory = mmap.mmap(-1, max(1, count * dtype.itemsize))
    return np.frombuffer(memory, dtype=dtype, count=count).reshape(shape)
