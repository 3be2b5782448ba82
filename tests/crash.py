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
    open_picture = images._open

    def die_or_open(data: bytes) -> Any:
        if DEADLY in data:
            os._exit(9)
        return open_picture(data)

    images._open = die_or_open
    work(pipe, place, folder)
