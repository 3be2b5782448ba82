"""Buffers for views that worker processes fill and the training process reads: no copy, no fresh pages."""

import mmap
import weakref
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info


@dataclass(frozen=True, slots=True)
class Slot:
    """The first `rows` views of a buffer."""

    number: int
    rows: int


class Ring:
    """Buffers of B views (P, P, 3) uint8 for each worker, in memory that processes forked from this one share.

    A worker (the training process itself, where there are none) takes a free buffer, fills it and sends its Slot; the
    training process makes a tensor of it, and the buffer is free again as soon as nothing refers to that tensor's
    memory any more. Whoever keeps all batches loses nothing: a worker that finds no free buffer makes a fresh one. In
    processes that were not forked there are none.
    """

    def __init__(self, num_views: int, crop: int, *, workers: int, slots: int) -> None:
        self._slots = slots
        self._views: np.ndarray | None = _shared((max(1, workers) * slots, num_views, crop, crop, 3))
        self._taken = _shared((max(1, workers) * slots,))
        self._shape = (num_views, crop, crop, 3)

    def __getstate__(self) -> dict[str, object]:
        return {"_slots": 0, "_views": None, "_taken": None, "_shape": self._shape}

    def take(self) -> tuple[int | None, np.ndarray]:
        """A free buffer's number, None for a fresh one, and the buffer (B, P, P, 3). Of this worker process."""
        if self._views is not None:
            info = get_worker_info()
            worker = info.id if info else 0
            for number in range(worker * self._slots, (worker + 1) * self._slots):
                if not self._taken[number]:  # only this worker sets it, only the training process clears it
                    self._taken[number] = 1
                    return number, self._views[number]
        return None, np.empty(self._shape, dtype=np.uint8)

    def tensor(self, slot: Slot) -> Tensor:
        """A worker's views (rows, P, P, 3)."""
        assert self._views is not None
        views = self._views[slot.number]
        owner = np.frombuffer(views, dtype=np.uint8).reshape(self._shape)  # an object that lives as long as its tensor
        weakref.finalize(owner, self._taken.__setitem__, slot.number, 0)
        return torch.from_numpy(owner)[: slot.rows]


def _shared(shape: tuple[int, ...]) -> np.ndarray:
    memory = mmap.mmap(-1, max(1, int(np.prod(shape))))
    return np.frombuffer(memory, dtype=np.uint8)[: int(np.prod(shape))].reshape(shape)
