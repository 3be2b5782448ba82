"""Capture what decoders written in C print about a damaged image, separately for each image.

libtiff hands each line to a function of ours, whatever thread it runs in. libjpeg inside torchvision writes to file
descriptor 2, which is shared by all threads: only a process that `owns_stderr` lets that decoder run.
"""

import ctypes
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from io import FileIO
from typing import Any, TypeVar

from PIL import Image

from captioner.images import silence_pillow

MAX_LINES = 3  # kept per image: some decoders print one for every row of pixels
MAX_LINE_BYTES = 200

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class _Stderr:
    """A copy of the real file descriptor 2, and the file that replaces it while a decoder runs."""

    real: int
    file: FileIO


_thread = threading.local()
_stderr: _Stderr | None = None


@contextmanager
def collect() -> Iterator[list[str]]:
    """Collect up to MAX_LINES lines that decoders print in this thread; other threads are not affected."""
    outer = getattr(_thread, "lines", None)
    _thread.lines = [] if outer is None else outer
    try:
        yield _thread.lines
    finally:
        _thread.lines = outer


def _keep(text: bytes) -> None:
    lines: list[str] | None = getattr(_thread, "lines", None)
    for line in text.decode(errors="replace").splitlines():
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
        _keep((module + b": " if module else b"") + line.value)

    handler = handler_type(handle)
    earlier = set_handler(handler)
    return handler


# ---- file descriptor 2 ------------------------------------------------------------------------------------


@contextmanager
def own_stderr() -> Iterator[None]:
    """Declare that this process is ours and decodes in one thread, so file descriptor 2 may be redirected meanwhile.

    Python's own `sys.stderr` goes to the real one all the time, from any thread; Pillow's warnings are dropped.
    """
    global _stderr  # as there is one file descriptor 2 in a process
    silence_pillow()
    if _stderr is not None or sys.stderr is None:
        yield
        return
    earlier = sys.stderr
    with (
        os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace") as real,
        _open_unnamed() as file,
    ):
        _stderr, sys.stderr = _Stderr(real.fileno(), file), real
        try:
            yield
        finally:
            _stderr, sys.stderr = None, earlier


def _open_unnamed() -> FileIO:
    """A file that needs no folder, where the system has such files."""
    if hasattr(os, "memfd_create"):
        return FileIO(os.memfd_create("stderr"), "r+")
    return tempfile.TemporaryFile(buffering=0)


def owns_stderr() -> bool:
    """Whether decoders may run that print to file descriptor 2."""
    return _stderr is not None


def without_stderr(decode: Callable[..., Result], *arguments: Any) -> Result:
    """Call a decoder with file descriptor 2 redirected, and keep what it prints. Requires `own_stderr`."""
    assert _stderr is not None
    file = _stderr.file
    os.dup2(file.fileno(), 2)
    try:
        return decode(*arguments)
    finally:
        os.dup2(_stderr.real, 2)
        if file.tell():  # they share their position
            file.seek(0)
            _keep(file.read(MAX_LINES * MAX_LINE_BYTES))
            file.seek(0)
            file.truncate()
