"""A pool of worker processes that survives their deaths: if an item kills its worker, only that item is lost.

Workers are forked from a server process that has already imported their code, because importing torch takes seconds and
300 MB.
"""

import atexit
import gc
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from importlib import import_module
from multiprocessing import forkserver, resource_tracker, util
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from pathlib import Path, PurePosixPath
from typing import Any, cast

from captioner.errors import UserError
from captioner.images import loading

NO_ITEM = -1  # instead of an item's index: the worker is between items
MAX_DEATHS_AT_ONE_ITEM = 2
POLL_SECONDS = 1.0
MAX_SECONDS_TO_EXIT = 5.0  # a killed process that waits for a lost disk exits even later


def start_server(module: str, *, with_torch: bool = True, may_fork: bool = False) -> ForkServerContext:
    """The context of the server process from which workers are forked; starts it if necessary.

    It imports `module` in the background, and torch if its workers resize with it. A process that uses torch itself
    says `may_fork` before it starts threads: the server is then forked from it, which keeps one copy of torch in memory
    instead of two (Linux only).
    """
    context = multiprocessing.get_context("forkserver")
    modules = [module, "torch"] if with_torch and not loading.HAS_SIMD else [module]
    context.set_forkserver_preload(modules)
    resource_tracker.ensure_running()  # as the server would, which unblocks SIGINT after it
    may_fork = may_fork and sys.platform == "linux" and threading.active_count() == 1
    for name in modules if may_fork else ():
        import_module(name)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # inherited: Ctrl-C is for this process alone
    try:
        with _forking() if may_fork else nullcontext():
            forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


@contextmanager
def _forking() -> Iterator[None]:
    """Within it, multiprocessing forks its server instead of starting a new interpreter."""
    spawn = util.spawnv_passfds

    def fork(path: Any, arguments: Any, inherited: Any) -> Any:
        code = arguments.index("-c") + 1
        if "forkserver" not in arguments[code]:  # the resource tracker, if it has died
            return spawn(path, arguments, inherited)
        sys.stdout.flush()
        sys.stderr.flush()
        gc.freeze()  # else each collection would write to the pages of all objects, which unshares them
        if pid := os.fork():
            atexit.register(_end, pid)
            return pid
        try:
            for file in set(map(int, os.listdir("/proc/self/fd"))) - {0, 1, 2, *inherited}:  # noqa: PTH208
                with suppress(OSError):  # the list's own
                    os.close(file)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            sys.argv = ["-c", *arguments[code + 1 :]]
            exec(arguments[code], {})  # "from multiprocessing.forkserver import main; ..."
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(0)

    util.spawnv_passfds = cast(Any, fork)
    try:
        yield
    finally:
        util.spawnv_passfds = spawn


def _end(server: int) -> None:
    """End a forked server and the workers, unless it is gone.

    An interpreter writes to all its pages as it ends; they would be copied for the server.
    """
    workers = multiprocessing.active_children()  # once the server is gone, they seem to be gone too
    with suppress(ChildProcessError):
        if os.waitpid(server, os.WNOHANG) == (0, 0):
            for worker in workers:
                worker.kill()
            os.kill(server, signal.SIGKILL)
            os.waitpid(server, 0)
    gc.unfreeze()  # some libraries report frozen objects as leaks


class WorkerPool:
    """Worker processes that each do one task at a time. A dead worker is replaced, and its task is started again.

    A worker calls `work(task, *arguments, excluded=..., set_index=..., report=...)`, which calls `set_index(i)` before
    item i of the task, may call `report(message)` to send a message early, and returns the last message. `excluded` are
    the items to leave out when a task is started again: those at which two workers died, or one spent more than
    `max_seconds`, as a dict from the item's index to the exit code (None: timed out). After `max_deaths` other deaths
    at one task `run` raises UserError.
    """

    def __init__(
        self,
        context: ForkServerContext,
        work: Callable[..., Any],
        *arguments: Any,
        size: int,
        max_deaths: int,
        max_seconds: float = math.inf,
    ) -> None:
        self._max_deaths = max_deaths
        self._max_seconds = max_seconds
        self._last_poll = time.monotonic()
        self._workers = [_Worker(context, (work, *arguments)) for _ in range(size)]

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.pipe.close()
            worker.process.kill()
        for worker in self._workers:
            worker.process.join(MAX_SECONDS_TO_EXIT)

    def run(self, tasks: Iterator[tuple[str, Any]]) -> Iterator[Any]:
        """Yield the workers' messages, in no fixed order.

        `tasks` yields (name for error messages, task); the next one is taken when a worker is idle.
        """
        messages: deque[Any] = deque()
        while True:
            for worker in self._workers:
                if worker.is_idle and (task := next(tasks, None)):
                    worker.start(*task)
            if messages:
                yield messages.popleft()
            elif all(worker.is_idle for worker in self._workers):
                return
            else:
                messages.extend(self._receive())

    def _receive(self) -> Iterator[Any]:
        """Wait up to POLL_SECONDS; yields at most one message of each worker, and restarts dead and hanging ones."""
        ready = wait([worker.pipe for worker in self._workers if not worker.is_idle], POLL_SECONDS)
        now = time.monotonic()
        seconds = min(now - self._last_poll, POLL_SECONDS)  # does not count the time when all processes are suspended
        self._last_poll = now
        for worker in self._workers:
            if worker.pipe in ready:
                try:
                    worker.is_idle, message = worker.pipe.recv()
                except (EOFError, OSError):
                    worker.restart(timed_out=False, max_deaths=self._max_deaths)
                else:
                    yield message
            elif worker.add_seconds(seconds) > self._max_seconds:
                worker.process.kill()
                worker.restart(timed_out=True, max_deaths=self._max_deaths)


class _Worker:
    """A worker process, the pool's end of its pipe, and its task."""

    def __init__(self, context: ForkServerContext, arguments: tuple[Any, ...]) -> None:
        self._context = context
        self._arguments = arguments
        self.is_idle = True
        self._spawn()

    def _spawn(self) -> None:
        self._index: Any = self._context.RawValue("q", NO_ITEM)  # in shared memory: its current item
        self.pipe, remote = self._context.Pipe()
        self.process = self._context.Process(target=_serve, args=(remote, self._index, *self._arguments), daemon=True)
        self.process.start()
        remote.close()

    def start(self, name: str, task: Any) -> None:
        """Send an idle worker its next task."""
        self._name, self._task = name, task
        self._deaths: Counter[int] = Counter()  # by index of the item
        self._excluded: dict[int, int | None] = {}
        self._send()

    def _send(self) -> None:
        self.is_idle, self._last_index, self._seconds = False, NO_ITEM, 0.0
        with suppress(OSError):  # the process is dead: the pool will notice
            self.pipe.send((self._task, self._excluded))

    def add_seconds(self, seconds: float) -> float:
        """Count the seconds since the last call for the current item; returns the item's total."""
        is_waiting = self.is_idle or self._index.value == NO_ITEM or self._index.value != self._last_index
        self._last_index, self._seconds = self._index.value, 0.0 if is_waiting else self._seconds + seconds
        return self._seconds

    def restart(self, *, timed_out: bool, max_deaths: int) -> None:
        """Start a dead worker's task again in a new process. Raises UserError after too many deaths."""
        index = self._index.value
        self.process.join(MAX_SECONDS_TO_EXIT)
        self.pipe.close()
        exit_code = self.process.exitcode or 0
        self._deaths[index] += 1
        if index != NO_ITEM and (timed_out or self._deaths[index] == MAX_DEATHS_AT_ONE_ITEM):
            self._excluded[index] = None if timed_out else exit_code
            del self._deaths[index]
        if self._deaths.total() >= max_deaths:
            raise UserError(
                f"worker processes died {max_deaths} times at {self._name} (exit code {exit_code}): probably there is "
                "too little memory for this many workers, use fewer"
            )
        self._spawn()
        self._send()


def _serve(pipe: Connection, index: Any, work: Callable[..., Any], *arguments: Any) -> None:
    """Receive tasks from the pipe, do them, and send the results, until the pool closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C the main process ends its workers
    if "torch" in sys.modules:  # of the server
        use_one_thread()
    set_index = partial(setattr, index, "value")

    def send(message: Any, *, is_result: bool = False) -> None:
        pipe.send((is_result, message))

    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            task, excluded = pipe.recv()
            result = work(task, *arguments, excluded=excluded, set_index=set_index, report=send)
            set_index(NO_ITEM)
            send(result, is_result=True)


def count_processors(*, membership: Path = Path("/proc/self/cgroup"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """The number of processors that this process may use: those in its affinity mask, or fewer under a cgroup quota.

    A quota of 1.5 counts as 2. `membership` is the file that names this process's cgroups, below the folder `cgroups`.
    """
    counts = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1]
    for line in membership.read_text().splitlines() if membership.exists() else []:
        _, controllers, path = line.split(":", 2)
        root, names = cgroups, ["cpu.max"]  # cgroup version 2
        if "cpu" in controllers.split(","):
            root, names = cgroups / "cpu", ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        elif controllers:
            continue
        own = PurePosixPath(path.lstrip("/"))
        for group in (own, *own.parents):  # in a container its own group may be the root, whatever the line says
            with suppress(OSError, ValueError):  # without a quota there is no file, or it says "max"
                quota, period = map(int, " ".join((root / group / name).read_text() for name in names).split())
                counts.append(math.ceil(quota / period) if quota > 0 else counts[0])
    return max(1, min(counts))


def use_one_thread() -> None:
    """Make torch use one thread in this process: the workers already use all processors."""
    if loading.backend() == "native":
        import torch

        torch.set_num_threads(1)
