"""Worker processes that come from a server which has loaded their code once: importing torch costs seconds."""

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

from captioner import images


def start_server(module: str) -> ForkServerContext:
    """Let the server that workers come from start to load `module`, in the background, if it has not yet."""
    context = multiprocessing.get_context("forkserver")
    native = [] if images.HAS_SIMD else ["torch"]
    context.set_forkserver_preload([module, *native])
    forkserver.ensure_running()
    return context


def hire(
    context: ForkServerContext, work: Callable[..., None], *arguments: Any
) -> tuple[ForkServerProcess, Connection]:
    """A process that runs `work` with its end of a pipe and the arguments, and our end."""
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def receive(pipe: Connection) -> Any:
    """A worker's message, or None when it is dead."""
    try:
        return pipe.recv()
    except (EOFError, OSError):
        return None


def count_processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_one_thread() -> None:
    """Workers share the processors among themselves; torch's own threads would only get in their way."""
    if images.backend() == "native":
        import torch

        torch.set_num_threads(1)
