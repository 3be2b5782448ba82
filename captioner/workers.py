"""Worker processes that come from a server which has loaded their code once: importing torch costs seconds."""

import math
import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path, PurePosixPath
from typing import Any

from captioner.images import loading


def start_server(module: str) -> ForkServerContext:
    """Let the server that workers come from start to load `module`, in the background, if it has not yet."""
    context = multiprocessing.get_context("forkserver")
    native = [] if loading.HAS_SIMD else ["torch"]
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


def count_processors(*, membership: Path = Path("/proc/self/cgroup"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """How many processors this process may use: those in its affinity mask, or fewer under a cgroup CPU quota.

    A quota of 1.5 counts as 2. `membership` names this process's control groups, which lie below `cgroups`.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    lines = membership.read_text().splitlines() if membership.exists() else []
    quotas = [quota for line in lines for quota in _quotas(*line.split(":", 2)[1:], cgroups=cgroups)]
    return max(1, min([allowed, *map(math.ceil, quotas)]))


def _quotas(controllers: str, path: str, *, cgroups: Path) -> Iterator[float]:
    """The processors that a control group and those it lies in may use, of cgroup version 2 or 1.

    A container may see its own group as the root, under whatever path the line says.
    """
    if controllers and "cpu" not in controllers.split(","):
        return
    root, names = cgroups, ["cpu.max"]
    if controllers:
        root, names = cgroups / "cpu", ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
    own = PurePosixPath(path.lstrip("/"))
    for folder in (root / own, *(root / parent for parent in own.parents)):
        with suppress(OSError, ValueError):  # there is no such file where there is no quota, and "max" is none
            quota, period = map(int, " ".join((folder / name).read_text() for name in names).split())
            if quota > 0:
                yield quota / period


def use_one_thread() -> None:
    """Workers share the processors among themselves; torch's own threads would only get in their way."""
    if loading.backend() == "native":
        import torch

        torch.set_num_threads(1)
