"""Memory for batches that workers fill and the training process reads without a copy, and what is in a batch.

A worker takes a buffer, fills it and returns tensors in it. They arrive as the buffer's number; the training process
makes tensors of the same memory, and the worker may fill the buffer again once the last of them is gone. Who keeps all
batches loses nothing: a worker that finds no free buffer takes fresh memory.
"""

import copy
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

PLAIN = frozenset((str, bytes, int, float, bool, type(None)))  # no container, no tensor


def batch_buffer(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor for a batch, to be filled in `transform` or `collate` and returned in the batch.

    In a loader's worker it is memory that reaches the training process without a copy, and that is used again when that
    process has dropped the batch; tensors of it must not be kept in the worker. Elsewhere it is a plain tensor.
    """
    return torch.empty(tuple(shape), dtype=dtype) if _own is None else _own.take(shape, dtype)


_own: "WorkerBuffers | None" = None  # of the loader that this worker process belongs to


def use_buffers(buffers: "WorkerBuffers") -> None:
    """Let `batch_buffer` take from these, in this worker process."""
    global _own  # noqa: PLW0603
    _own = buffers


@dataclass(frozen=True, slots=True)
class Slot:
    """A tensor in a buffer. `memory` is the buffer, where the training process has not seen it yet."""

    number: int
    memory: Tensor | None
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class WorkerBuffers:
    """A worker's side: at most `count` buffers, whose state is `taken[first:first + count]` in shared memory.

    Only the worker sets a flag, only the training process clears it.
    """

    def __init__(self, taken: Tensor, *, first: int, count: int) -> None:
        self._taken = taken.numpy()
        self._numbers = range(first, first + count)
        self._memory: dict[int, Tensor] = {}
        self._unseen: set[int] = set()
        self._in_hand: dict[int, int] = {}  # address -> number

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A free buffer as a tensor; fresh memory where there is none."""
        num_bytes = math.prod(shape) * dtype.itemsize
        for number in self._numbers:
            if not self._taken[number]:
                memory = self._memory.get(number)
                if memory is None or len(memory) < num_bytes:
                    memory = self._memory[number] = torch.empty(max(1, num_bytes), dtype=torch.uint8).share_memory_()
                    self._unseen.add(number)
                self._taken[number] = 1
                self._in_hand[memory.data_ptr()] = number
                return memory[:num_bytes].view(dtype).view(tuple(shape))
        return torch.empty(tuple(shape), dtype=dtype)

    def give(self, batch: Any) -> tuple[Any, bool]:
        """The batch with Slots for tensors in buffers, and whether there are any; other buffers are free again."""
        if not self._in_hand:
            return batch, False
        given: set[int] = set()

        def replace(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            number = self._in_hand.get(value.untyped_storage().data_ptr())
            if number is None:
                return value
            given.add(number)
            memory = self._memory[number] if number in self._unseen else None
            self._unseen.discard(number)
            return Slot(number, memory, value.dtype, tuple(value.shape), value.stride(), value.storage_offset())

        found = map_leaves(batch, replace)
        self.drop(keep=given)
        return found, bool(given)

    def drop(self, *, keep: set[int] = frozenset()) -> None:  # type: ignore[assignment]
        """Free the buffers in hand that went into no batch."""
        for number in self._in_hand.values():
            if number not in keep:
                self._taken[number] = 0
        self._in_hand.clear()


class Buffers:
    """The training process's side, of all workers."""

    def __init__(self, *, num_workers: int, count: int) -> None:
        self.taken = torch.zeros(max(1, num_workers * count), dtype=torch.uint8).share_memory_()
        self._flags = self.taken.numpy()
        self._memory: dict[int, Tensor] = {}

    def open(self, batch: Any) -> Any:
        """The batch with tensors for Slots; several in one buffer keep it taken until the last is gone."""
        owners: dict[int, Tensor] = {}
        return map_leaves(batch, lambda value: self._tensor(value, owners) if isinstance(value, Slot) else value)

    def _tensor(self, slot: Slot, owners: dict[int, Tensor]) -> Tensor:
        if slot.memory is not None:
            self._memory[slot.number] = slot.memory
        if slot.number not in owners:
            owner = np.frombuffer(self._memory[slot.number].numpy(), dtype=np.uint8)  # lives as long as its tensors
            weakref.finalize(owner, self._flags.__setitem__, slot.number, 0)
            owners[slot.number] = torch.from_numpy(owner)
        whole = owners[slot.number]
        elements = whole[: len(whole) // slot.dtype.itemsize * slot.dtype.itemsize].view(slot.dtype)
        return elements.as_strided(slot.shape, slot.stride, slot.offset)


def map_leaves(batch: Any, change: Callable[[Any], Any], *, until: str = "") -> Any:
    """The batch with each value changed that is no container, or that has an attribute `until`.

    Containers in which nothing changes stay themselves.
    """
    if type(batch) in PLAIN:
        return batch
    if until and hasattr(batch, until):
        return change(batch)
    if isinstance(batch, Mapping):
        found = {key: map_leaves(value, change, until=until) for key, value in batch.items()}
        if all(found[key] is batch[key] for key in found):
            return batch
        return found if type(batch) is dict else _filled(batch, found)
    if isinstance(batch, tuple | list):
        items = [map_leaves(value, change, until=until) for value in batch]
        if all(new is old for new, old in zip(items, batch, strict=True)):
            return batch
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    if is_dataclass(batch) and not isinstance(batch, type):
        names = [field.name for field in fields(batch)]
        found = {name: map_leaves(getattr(batch, name), change, until=until) for name in names}
        if all(found[name] is getattr(batch, name) for name in names):
            return change(batch)
        new = copy.copy(batch)
        for name, value in found.items():
            object.__setattr__(new, name, value)
        return new
    return change(batch)


def _filled(batch: Any, items: dict[Any, Any]) -> Any:
    new = copy.copy(batch)
    new.update(items)
    return new


def pinned(batch: Any) -> Any:
    """The batch with its tensors, and objects that have a `pin_memory()`, in page-locked memory."""
    name = "pin_memory"
    return map_leaves(batch, lambda value: value.pin_memory() if hasattr(value, name) else value, until=name)
