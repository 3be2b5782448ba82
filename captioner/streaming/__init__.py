"""Samples of tar shards for any training loop: each exactly once an epoch, in one order, with exact resume.

from captioner.streaming import StreamingLoader
loader = StreamingLoader("data/shards", split="train", batch_size=256)
"""

from typing import TYPE_CHECKING, Any

from captioner.errors import StreamingError, TransformError
from captioner.shards.indexing import index_shards

if TYPE_CHECKING:
    from captioner.streaming.buffers import batch_buffer
    from captioner.streaming.ledger import Ledger
    from captioner.streaming.loader import StreamingLoader
    from captioner.streaming.reader import SampleError

__all__ = [
    "Ledger",
    "SampleError",
    "StreamingError",
    "StreamingLoader",
    "TransformError",
    "batch_buffer",
    "index_shards",
]

_MODULES = {"StreamingLoader": "loader", "SampleError": "reader", "Ledger": "ledger", "batch_buffer": "buffers"}


def __getattr__(name: str) -> Any:  # so that the order and the cache can be imported without torch
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
