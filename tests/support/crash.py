"""Processes that die or hang: at a named point of their writing, out of memory, or by a decoder's fault."""

import os
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from captioner.images import loading
from infer import reading
from sharding import make_shards
from sharding.packing import engine
from sharding.settings import ShardSettings

DEADLY = b"this kills"
ENDLESS = b"this hangs"

pack, read = engine._work, reading._work


def pack_with_signal(settings: ShardSettings, file: str, moment: str, number: int) -> None:
    """Pack, and send this process a signal where `file` is written.

    `moment` is "half" (half of the partial file is written), "before" or "after" (its rename).
    """
    rename = Path.replace

    def rename_with_signal(partial: Path, target: Path) -> Path:
        if Path(target).name != file:
            return rename(partial, target)
        if moment == "half":
            os.truncate(partial, partial.stat().st_size // 2)
        if moment != "after":
            os.kill(os.getpid(), number)
        renamed = rename(partial, target)
        os.kill(os.getpid(), number)
        return renamed

    Path.replace = rename_with_signal  # type: ignore[method-assign, assignment]
    make_shards.main(settings)


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
