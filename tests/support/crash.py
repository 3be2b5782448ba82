"""Work for worker processes that die or hang, as they do when memory runs out or a decoder crashes."""

import os
import time
from typing import Any

from captioner.images import loading
from infer import reading
from sharding.packing import engine

DEADLY = b"this kills"
ENDLESS = b"this hangs"

pack, decode, open_picture = engine._pack, reading._decode, loading._open


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


def die_or_open(data: bytes) -> Any:
    """Open a picture unless it is a deadly one."""
    if DEADLY in data:
        os._exit(9)
    if ENDLESS in data:
        time.sleep(3600)
    return open_picture(data)
