"""Workers of the packing engine that die, as processes do of memory that runs out or of a decoder's fault."""

import os
from multiprocessing.connection import Connection
from typing import Any

from captioner import images
from sharding import engine

DEADLY = b"this kills"

work = engine._work


def always(pipe: Connection, place: Any, folder: str) -> None:
    """Die of the first shard, before any picture."""
    pipe.recv()
    os._exit(9)


def at_deadly_pictures(pipe: Connection, place: Any, folder: str) -> None:
    """Work as always, with a decoder that dies of certain pictures."""
    decode = images.to_stored_jpeg

    def die_or_decode(data: bytes, **settings: Any) -> Any:
        if DEADLY in data:
            os._exit(9)
        return decode(data, **settings)

    images.to_stored_jpeg = die_or_decode  # type: ignore[assignment]
    work(pipe, place, folder)
