"""Collect what decoders written in C say about a damaged image, separately for each image.

libtiff hands each line to a function of ours, whatever thread it runs in; simplejpeg raises its message.
"""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from PIL import Image

MAX_LINES = 3  # kept per image: some decoders print one for every row of pixels
MAX_LINE_BYTES = 200

_thread = threading.local()


@contextmanager
def collect() -> Iterator[list[str]]:
    """Collect up to MAX_LINES lines that decoders say in this thread; other threads are not affected."""
    outer = getattr(_thread, "lines", None)
    _thread.lines = [] if outer is None else outer
    try:
        yield _thread.lines
    finally:
        _thread.lines = outer


def keep(text: str) -> None:
    """Add the lines of a decoder's message to those that this thread collects, if it does; each line once."""
    lines: list[str] | None = getattr(_thread, "lines", None)
    for line in text.splitlines():
        if lines is not None and len(lines) < MAX_LINES and line not in lines:
            lines.append(line)


# ---- libtiff ----------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def watch_libtiff() -> Any:
    """Take over the error handler of Pillow's libtiff, which prints to stderr. Pillow itself has turned warnings off.

    Errors outside of `collect` still go to the earlier handler. Returns what must stay alive; None without libtiff.
    """
    handler_type = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p)
    set_handler = getattr(ctypes.CDLL(Image.core.__file__), "TIFFSetErrorHandler", None)  # of the library in Pillow
    if set_handler is None:
        return None
    set_handler.argtypes, set_handler.restype = [handler_type], handler_type
    format_line = ctypes.CDLL(None).vsnprintf
    format_line.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_void_p]

    def handle(module: bytes | None, template: bytes, arguments: int) -> None:
        if getattr(_thread, "lines", None) is None:
            if earlier:
                earlier(module, template, arguments)
            return
        line = ctypes.create_string_buffer(MAX_LINE_BYTES)
        format_line(line, MAX_LINE_BYTES, template, arguments)
        keep(((module + b": " if module else b"") + line.value).decode(errors="replace"))

    handler = handler_type(handle)
    earlier = set_handler(handler)
    return handler
