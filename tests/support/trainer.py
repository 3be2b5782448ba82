"""Real runs of train/main.py and infer/main.py, in processes of a server that has loaded torch: they start at once."""

import itertools
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from consumer import context
from servers import free_port


@dataclass(frozen=True)
class Done:
    """How a run ended: rank 0's exit code, and what all ranks printed."""

    code: int
    output: str


@dataclass(frozen=True)
class Running:
    """The ranks of a run, and the file that they print into."""

    ranks: list[Any]
    log: Path

    def wait(self, *, seconds: float = 120.0) -> Done:
        """Wait for rank 0, and for the others as long as it takes to kill them."""
        self.ranks[0].join(seconds)
        code = self.ranks[0].exitcode
        for rank in self.ranks[1:]:
            rank.join(10)
        self.kill()
        assert code is not None, f"still running after {seconds} s:\n{self.log.read_text()}"
        return Done(code, self.log.read_text())

    def kill(self) -> None:
        """kill -9 all ranks, and the processes that they started."""
        for rank in self.ranks:
            with suppress(ProcessLookupError):
                os.killpg(rank.pid, signal.SIGKILL)
            rank.kill()
            rank.join()


def start(
    script: str,
    flags: Sequence[object],
    *,
    log: Path,
    world_size: int = 1,
    rank_flags: Sequence[Sequence[object]] = (),
    peer_seconds: float = 60.0,
    slow: Sequence[str] = (),
    stop: "StopAtRow | None" = None,
    environment: Mapping[str, str] | None = None,
) -> Running:
    """A stage's command (`train/main.py`) with these flags, on so many gloo ranks; each may have flags of its own.

    `slow` names functions (`module:name:rank`) that take that rank longer than `peer_seconds` when it calls them first.
    `stop` says where each rank of infer/main.py stops.
    """
    shared = {"ACCELERATE_USE_CPU": "true", "CAPTIONER_PEER_TIMEOUT_SECONDS": str(peer_seconds)}
    shared |= environment or {}
    if world_size > 1:
        shared |= {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = []
    for rank, own_flags in enumerate(rank_flags or [()] * world_size):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world_size > 1 else {}
        arguments = [script, *map(str, [*flags, *own_flags])]
        ranks.append(context.Process(target=_rank, args=(arguments, log, shared | own, [*slow], stop)))
    for rank in ranks:
        rank.start()
    return Running(ranks, log)


@dataclass(frozen=True)
class StopAtRow:
    """A rank of infer/main.py that has written `num_rows` dies as by kill -9, or waits for the file `gate`.

    Until the file is there it takes no other rank for lost, however long that takes to start.
    """

    num_rows: int
    gate: Path | None = None

    def install(self) -> None:
        """Change this process so."""
        from infer.peers import Peers
        from infer.results import RowWriter

        write, check, num_written = RowWriter.write, Peers.check, 0

        def write_and_stop(writer: RowWriter, rows: list[Any]) -> Any:
            nonlocal num_written
            offsets = write(writer, rows)
            num_written += len(rows)
            if num_written >= self.num_rows and self.gate is None:
                os.kill(os.getpid(), signal.SIGKILL)
            while num_written >= self.num_rows and not self.is_open():
                time.sleep(0.01)
            return offsets

        def check_when_open(peers: Peers) -> None:
            if self.is_open():
                check(peers)

        RowWriter.write = write_and_stop  # type: ignore[method-assign, assignment]
        Peers.check = check_when_open  # type: ignore[method-assign]

    def is_open(self) -> bool:
        return self.gate is not None and self.gate.exists()


def start_training(flags: Sequence[object], *, log: Path, world_size: int = 1, **more: Any) -> Running:
    """`train/main.py` with these flags."""
    return start("train/main.py", flags, log=log, world_size=world_size, **more)


def run_training(flags: Sequence[object], *, log: Path, world_size: int = 1) -> Done:
    """`start_training`, to its end."""
    return start_training(flags, log=log, world_size=world_size).wait()


def _slow_down(names: Sequence[str], *, seconds: float) -> None:
    """Have this rank sleep before the first call of its functions among these."""
    for name in names:
        module, function, rank = name.split(":")
        if rank == os.environ["RANK"]:
            owner: Any = import_module(module)
            *classes, function = function.split(".")
            for each in classes:
                owner = getattr(owner, each)
            setattr(owner, function, _slowed(getattr(owner, function), name, seconds=seconds))


def _slowed(function: Callable[..., Any], name: str, *, seconds: float) -> Callable[..., Any]:
    calls = itertools.count()

    def slow(*arguments: Any, **options: Any) -> Any:
        if next(calls) == 0:
            time.sleep(seconds)
            print(f"{name} was slow")
        return function(*arguments, **options)

    return slow


def _rank(
    arguments: list[str], log: Path, environment: dict[str, str], slow: Sequence[str], stop: StopAtRow | None
) -> None:
    os.setsid()
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]
    os.environ |= environment
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = arguments
    import torch

    from infer import captioning, reading
    from sharding.packing import engine
    from train.run import agreement

    torch.set_num_threads(1)
    torch.set_num_threads = lambda _threads: None  # type: ignore[assignment]  # tests share the machine
    for module in (reading, engine):  # workers are forked from this process, which has loaded torch
        module.start_server = lambda _module, **_: multiprocessing.get_context("fork")  # type: ignore[assignment]
    captioning.DESCRIBED_AT_ONCE = 4  # type: ignore[assignment]  # rows come now and then, of few pictures too
    agreement.VISIBLE_SECONDS = 1.0  # type: ignore[assignment]  # one disk needs none
    sys.stdout = os.fdopen(1, "w", buffering=1)
    if stop:
        stop.install()
    _slow_down(slow, seconds=float(environment["CAPTIONER_PEER_TIMEOUT_SECONDS"]) * 1.5)
    import_module(arguments[0].removesuffix(".py").replace("/", ".")).run()
