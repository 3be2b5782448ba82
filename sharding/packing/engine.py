"""Runs the plan's shards on worker processes of this machine; a shard whose worker died is given to another.

A picture at which two workers died is taken for one that crashes the decoder, and left out as a failure. (A lone worker
is this process itself, which nothing protects.)

Workers come from a server process that has loaded the packing code once: importing torch costs seconds.
"""

import signal
import traceback
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

from captioner.errors import UserError
from captioner.workers import hire, receive, start_server, use_one_thread
from sharding.packing.pack import BETWEEN, PackedShard, Progress, Report, pack_shard
from sharding.packing.planning import ShardPlan

DEATHS_AT_ONE_PICTURE = 2
MAX_DEATHS = 3  # of a shard's workers, beside those at pictures that are left out


def run_local(plans: Sequence[ShardPlan], folder: str, *, workers: int, report: Report) -> Iterator[PackedShard]:
    """Pack all shards with `workers` processes; yields each as it is finished, in no fixed order.

    Raises UserError when a shard cannot be packed; the finished ones stay.
    """
    if workers == 1:
        use_one_thread()
        yield from (pack_shard(plan, folder, report=report) for plan in plans)
        return
    with _Crew(folder, size=min(workers, len(plans))) as crew:
        yield from crew.run(plans, report=report)


def prepare() -> ForkServerContext:
    """Let the server that workers come from start to load the packing code, in the background, if it has not yet."""
    return start_server("sharding.packing.engine")


@dataclass
class _Worker:
    """A process, this side of its pipe, the place in the shard where it is (in shared memory), and the shard."""

    process: ForkServerProcess
    pipe: Connection
    place: Any
    plan: ShardPlan | None = None


class _Crew:
    """The worker processes, as long as they are needed."""

    def __init__(self, folder: str, *, size: int) -> None:
        self._context = prepare()
        self._folder = folder
        self._deaths: Counter[tuple[str, int]] = Counter()  # by shard and place in it
        self._refused: dict[str, set[int]] = defaultdict(set)  # places of pictures to leave out, by shard
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
        place = self._context.RawValue("q", BETWEEN)
        return _Worker(*hire(self._context, _work, place, self._folder), place)

    def _give(self, worker: _Worker, plan: ShardPlan) -> None:
        worker.plan = plan
        with suppress(OSError):  # a worker that died is met when its message is awaited
            worker.pipe.send((plan, frozenset(self._refused[plan.name])))

    def run(self, plans: Sequence[ShardPlan], *, report: Report) -> Iterator[PackedShard]:
        """Give out the shards, one at a time to each worker."""
        waiting = deque(plans)
        while waiting or any(worker.plan for worker in self._workers):
            for worker in self._workers:
                if worker.plan is None and waiting:
                    self._give(worker, waiting.popleft())
            busy = {worker.pipe: worker for worker in self._workers if worker.plan}
            for pipe in wait(list(busy)):
                worker = busy[pipe]  # type: ignore[index]
                message = receive(worker.pipe)
                if isinstance(message, Progress):
                    report(message)
                elif isinstance(message, PackedShard):
                    worker.plan = None
                    yield message
                elif isinstance(message, Exception):
                    raise message
                else:
                    self._replace(worker)

    def _replace(self, worker: _Worker) -> None:
        """Let a new worker begin the shard of a dead one anew."""
        plan, place = worker.plan, worker.place.value
        assert plan is not None
        worker.process.join()
        self._deaths[plan.name, place] += 1
        if place != BETWEEN and self._deaths[plan.name, place] == DEATHS_AT_ONE_PICTURE:
            self._refused[plan.name].add(place)
        deaths = sum(count for (name, _), count in self._deaths.items() if name == plan.name)
        if deaths - DEATHS_AT_ONE_PICTURE * len(self._refused[plan.name]) >= MAX_DEATHS:
            raise UserError(
                f"the process that packs {plan.name} died {deaths} times (exit code {worker.process.exitcode}), each "
                "time elsewhere: is there too little memory for so many --workers?"
            )
        worker.pipe.close()
        new = self._hire()
        worker.process, worker.pipe, worker.place = new.process, new.pipe, new.place
        self._give(worker, plan)


def _work(pipe: Connection, place: Any, folder: str) -> None:
    """A worker's life: shards come in, progress and packed shards go out, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends its workers
    use_one_thread()
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            plan, refused = pipe.recv()
            try:
                mark = partial(setattr, place, "value")
                pipe.send(pack_shard(plan, folder, report=pipe.send, mark=mark, refused=refused))
            except (UserError, BrokenPipeError, ConnectionResetError) as error:
                pipe.send(error)
            except Exception:
                pipe.send(RuntimeError(f"while packing {plan.name}:\n{traceback.format_exc()}"))
