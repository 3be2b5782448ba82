"""Runs the plan's shards on worker processes of this machine; a shard whose worker died is given to another.

Workers come from a server process that has loaded the packing code once: importing torch costs seconds.
"""

import multiprocessing
import signal
import traceback
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from typing import Any

from captioner import images
from captioner.cli import UserError
from sharding.pack import PackedShard, Progress, Report, pack_shard
from sharding.plan import ShardPlan

MAX_ATTEMPTS = 3


def run_local(plans: Sequence[ShardPlan], folder: str, *, workers: int, report: Report) -> Iterator[PackedShard]:
    """Pack all shards with `workers` processes; yields each as it is finished, in no fixed order.

    Raises UserError when a shard cannot be packed; the finished ones stay.
    """
    if workers == 1 or len(plans) <= 1:
        use_one_thread()
        yield from (pack_shard(plan, folder, report=report) for plan in plans)
        return
    with _Crew(folder, size=min(workers, len(plans))) as crew:
        yield from crew.run(plans, report=report)


@dataclass
class _Worker:
    """A process, this side of its pipe, and the shard it works on."""

    process: ForkServerProcess
    pipe: Connection
    plan: ShardPlan | None = None


class _Crew:
    """The worker processes, as long as they are needed."""

    def __init__(self, folder: str, *, size: int) -> None:
        self._context = multiprocessing.get_context("forkserver")
        native = [] if images.HAS_SIMD else ["torch"]
        self._context.set_forkserver_preload(["sharding.engine", *native])
        self._folder = folder
        self._workers = [self._hire() for _ in range(size)]

    def __enter__(self) -> "_Crew":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.pipe.close()
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join()

    def _hire(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(theirs, self._folder), daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours)

    def run(self, plans: Sequence[ShardPlan], *, report: Report) -> Iterator[PackedShard]:
        """Give out the shards, one at a time to each worker."""
        waiting = deque(plans)
        attempts: Counter[str] = Counter()
        while waiting or any(worker.plan for worker in self._workers):
            for worker in self._workers:
                if worker.plan is None and waiting:
                    worker.plan = waiting.popleft()
                    with suppress(OSError):  # a worker that died is met below
                        worker.pipe.send(worker.plan)
            busy = {worker.pipe: worker for worker in self._workers if worker.plan}
            for pipe in wait(list(busy)):
                worker = busy[pipe]  # type: ignore[index]
                message = _receive(worker.pipe)
                if isinstance(message, Progress):
                    report(message)
                elif isinstance(message, PackedShard):
                    worker.plan = None
                    yield message
                elif isinstance(message, Exception):
                    raise message
                else:
                    self._replace(worker, attempts)

    def _replace(self, worker: _Worker, attempts: Counter[str]) -> None:
        """Let a new worker begin the shard of a dead one anew."""
        plan = worker.plan
        assert plan is not None
        worker.process.join()
        attempts[plan.name] += 1
        if attempts[plan.name] == MAX_ATTEMPTS:
            raise UserError(
                f"the process that packs {plan.name} died {MAX_ATTEMPTS} times (exit code {worker.process.exitcode}): "
                "is there too little memory for so many --workers, or does one of its pictures crash the decoder?"
            )
        worker.pipe.close()
        new = self._hire()
        worker.process, worker.pipe = new.process, new.pipe
        with suppress(OSError):
            worker.pipe.send(plan)


def _receive(pipe: Connection) -> Any:
    """A worker's message, or None when it is dead."""
    try:
        return pipe.recv()
    except (EOFError, OSError):
        return None


def _work(pipe: Connection, folder: str) -> None:
    """A worker's life: shards come in, progress and packed shards go out, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends its workers
    use_one_thread()
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            plan = pipe.recv()
            try:
                pipe.send(pack_shard(plan, folder, report=pipe.send))
            except (UserError, BrokenPipeError, ConnectionResetError) as error:
                pipe.send(error)
            except Exception:
                pipe.send(RuntimeError(f"while packing {plan.name}:\n{traceback.format_exc()}"))


def use_one_thread() -> None:
    """Workers share the processors among themselves; torch's own threads would only get in their way."""
    if images.backend() == "native":
        import torch

        torch.set_num_threads(1)
