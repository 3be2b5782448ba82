"""Worker processes that die or hang, as they do of memory that runs out or of a decoder's fault."""

import os
import time
from multiprocessing.connection import Connection
from typing import Any

from captioner.images import loading
from infer import reading
from sharding.packing import engine

DEADLY = b"this kills"
ENDLESS = b"this hangs"

pack, read = engine._work, reading._work


def always(pipe: Connection, *_: Any) -> None:
    """Die of the first task, before any picture."""
    pipe.recv()
    os._exit(9)


def packing_deadly_pictures(pipe: Connection, place: Any, folder: str) -> None:
    """Pack as always, with a decoder that dies of certain pictures."""
    _spoil_decoder()
    pack(pipe, place, folder)


def reading_deadly_pictures(*arguments: Any) -> None:
    """Read as always, with a decoder that dies or hangs of certain pictures."""
    _spoil_decoder()
    read(*arguments)


def _spoil_decoder() -> None:
    open_picture = loading._open

    def die_or_open(data: bytes) -> Any:
        if DEADLY in data:
            os._exit(9)
        if ENDLESS in data:
            time.sleep(3600)
        return open_picture(data)

    loading._open = die_or_open
