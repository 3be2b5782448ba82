"""Processes that die or hang: at a named point of their writing, out of memory, or by a decoder's fault."""

import os
import time
from pathlib import Path
from typing import Any

from captioner.images import loading
from infer import reading
from infer.serving import decoding
from sharding import make_shards
from sharding.packing import engine
from sharding.settings import ShardSettings

DEADLY = b"this kills"
ENDLESS = b"this hangs"

pack, decode, open_picture = engine._pack, reading._decode, loading._open
decode_upload = decoding.decode_upload


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


def always(*_: Any, **__: Any) -> None:
    """Die of the first task, before any picture."""
    os._exit(9)


def packing_deadly_pictures(*arguments: Any, **options: Any) -> Any:
    """Pack with a decoder that dies of certain pictures."""
    loading._open = die_or_open
    return pack(*arguments, **options)


def decoding_deadly_pictures(*arguments: Any, **options: Any) -> Any:
    """Decode with a decoder that dies or hangs of certain pictures."""
    loading._open = die_or_open
    return decode(*arguments, **options)


def decoding_deadly_uploads(*arguments: Any, **options: Any) -> Any:
    """Decode an upload with a decoder that dies or hangs of certain pictures."""
    loading._open = die_or_open
    return decode_upload(*arguments, **options)


def die_or_open(data: bytes) -> Any:
    """Open a picture unless it is a deadly one."""
    if DEADLY in data:
        os._exit(9)
    if ENDLESS in data:
        time.sleep(3600)
    return open_picture(data)
