"""Shared memory for batches, which workers fill and the training process reads without a copy.

A worker takes a buffer, fills it and returns tensors of it. These are sent as the number of the buffer; the training
process makes tensors of the same memory, and the worker may fill the buffer again once the last of them is freed. A
consumer may keep all batches: a worker that finds no free buffer allocates new memory.
"""

import copy
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

PLAIN = frozenset((str, bytes, int, float, bool, type(None)))  # neither containers nor tensors


def batch_buffer(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor for a batch, to be filled in `transform` or `collate` and returned in the batch.

    It is passed to the training process without a copy, and reused when that process has freed the batch: keep no
    reference to it elsewhere. Outside of these functions it is an ordinary tensor.
    """
    return torch.empty(tuple(shape), dtype=dtype) if _own is None else _own.take(shape, dtype)


_own: "WorkerBuffers | None" = None  # those of the loader that makes a batch in this process now


class Slot:
    """A tensor in a buffer. `memory` is the buffer itself, the first time that it is sent, or None."""

    def __init__(self, number: int, memory: Tensor | None, tensor: Tensor) -> None:
        self.number, self.memory, self.dtype = number, memory, tensor.dtype
        self.shape, self.stride, self.offset = tuple(tensor.shape), tensor.stride(), tensor.storage_offset()


class WorkerBuffers:
    """The buffers of one worker: at most `count`, whose flags are `taken[first:first + count]` in shared memory.

    Only the worker sets a flag, and only the training process clears it.
    """

    def __init__(self, taken: Tensor, *, first: int, count: int) -> None:
        self._taken = taken.numpy()
        self._numbers = range(first, first + count)
        self._memory: dict[int, Tensor] = {}
        self._unseen: set[int] = set()
        self._in_hand: dict[int, int] = {}  # address -> number

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """While entered, `batch_buffer` takes these buffers. At the end those that are in no batch are freed."""
        global _own  # noqa: PLW0603
        before, _own = _own, self
        try:
            yield
        finally:
            _own = before
            self._drop(self._in_hand.values())
            self._in_hand.clear()

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A free buffer as a tensor; new memory if there is none."""
        num_bytes = math.prod(shape) * dtype.itemsize
        for number in self._numbers:
            if not self._taken[number]:
                memory = self._memory.get(number)
                if memory is None or len(memory) < num_bytes:
                    memory = self._memory[number] = torch.empty(max(1, num_bytes), dtype=torch.uint8)
                    if get_worker_info() is not None:
                        memory.share_memory_()
                    self._unseen.add(number)
                self._taken[number] = 1
                self._in_hand[memory.data_ptr()] = number
                return memory[:num_bytes].view(dtype).view(tuple(shape))
        return torch.empty(tuple(shape), dtype=dtype)

    def give(self, batch: Any) -> tuple[Any, bool]:
        """The batch with Slots instead of tensors in buffers, and whether there are any."""
        if not self._in_hand:
            return batch, False
        given: set[int] = set()

        def replace(value: Any) -> Any:
            number = self._in_hand.get(value.untyped_storage().data_ptr()) if isinstance(value, Tensor) else None
            if number is None:
                return value
            given.add(number)
            memory = self._memory[number] if number in self._unseen else None
            self._unseen.discard(number)
            return Slot(number, memory, value)

        found = map_leaves(batch, replace)
        self._drop(set(self._in_hand.values()) - given)
        self._in_hand.clear()
        return found, bool(given)

    def _drop(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            self._taken[number] = 0


class Buffers:
    """The buffers of all workers, in the training process."""

    def __init__(self, *, num_workers: int, count: int) -> None:
        self.taken = torch.zeros(max(1, num_workers) * count, dtype=torch.uint8)
        if num_workers:
            self.taken.share_memory_()
        self._flags = self.taken.numpy()
        self._memory: dict[int, Tensor] = {}

    def open(self, batch: Any) -> Any:
        """The batch with tensors instead of Slots; a buffer is taken until the last tensor in it is freed."""
        owners: dict[int, Tensor] = {}
        return map_leaves(batch, lambda value: self._tensor(value, owners) if isinstance(value, Slot) else value)

    def _tensor(self, slot: Slot, owners: dict[int, Tensor]) -> Tensor:
        if slot.memory is not None:
            self._memory[slot.number] = slot.memory
        if slot.number not in owners:
            owner = np.frombuffer(self._memory[slot.number].numpy(), dtype=np.uint8)  # it lives as long as its tensors
            weakref.finalize(owner, self._flags.__setitem__, slot.number, 0)
            owners[slot.number] = torch.from_numpy(owner)
        whole = owners[slot.number]
        elements = whole[: len(whole) // slot.dtype.itemsize * slot.dtype.itemsize].view(slot.dtype)
        return elements.as_strided(slot.shape, slot.stride, slot.offset)


def map_leaves(batch: Any, change: Callable[[Any], Any], *, until: str = "") -> Any:
    """The batch with `change` applied to each value that is not a container, or that has an attribute `until`.

    Containers are dictionaries, lists, tuples and dataclasses; one in which nothing changes is returned itself.
    """
    if type(batch) in PLAIN:
        return batch
    if until and hasattr(batch, until):
        return change(batch)
    names: list[Any] = []
    if isinstance(batch, Mapping):
        names = list(batch)
        values = [batch[name] for name in names]
    elif isinstance(batch, tuple | list):
        if PLAIN.issuperset(map(type, batch)):
            return batch
        values = list(batch)
    elif is_dataclass(batch) and not isinstance(batch, type):
        names = [field.name for field in fields(batch)]
        values = [getattr(batch, name) for name in names]
    else:
        return change(batch)
    changed = [map_leaves(value, change, until=until) for value in values]
    if all(new is old for new, old in zip(changed, values, strict=True)):
        return batch
    return _rebuilt(batch, names, changed)


def _rebuilt(batch: Any, names: list[Any], values: list[Any]) -> Any:
    """A container of the same type with new values."""
    if isinstance(batch, tuple | list):
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    if type(batch) is dict:
        return dict(zip(names, values, strict=True))
    found = copy.copy(batch)
    for name, value in zip(names, values, strict=True):
        if isinstance(batch, Mapping):
            found[name] = value
        else:
            object.__setattr__(found, name, value)  # a dataclass may be frozen
    return found


def pinned(batch: Any) -> Any:
    """The batch with its tensors, and its objects that have a method `pin_memory`, in page-locked memory."""
    name = "pin_memory"
    return map_leaves(batch, lambda value: value.pin_memory() if hasattr(value, name) else value, until=name)
