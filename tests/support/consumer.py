"""A training loop without a model, on real ranks: it consumes the loader, writes down each step's samples, checkpoints.

Processes come from a server that has loaded torch once.
"""

import json
import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from servers import free_port

GLOBAL_BATCH = 4
CHECKPOINT_STEPS = 3

context: Any = multiprocessing.get_context("forkserver")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to consume, into which run folder; with a pause after each step, in seconds.

    All ranks die as by kill -9 after the (epoch, step) `dies_at`.
    """

    shards: tuple[str, ...]
    run: Path
    epochs: int = 1
    workers: int = 0
    pause: float = 0.0
    dies_at: tuple[int, int] | None = None
    cache: Path | None = None


@dataclass(frozen=True)
class Seen:
    """A rank's step: its samples' positions, keys and a digest of their views."""

    epoch: int
    step: int
    rank: int
    world_size: int
    positions: list[int]
    keys: list[str]
    views: str


def start(job: Job, *, world_size: int) -> list[Any]:
    """The running ranks."""
    port = free_port()
    keys = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}  # that the server knows not
    ranks = [context.Process(target=_rank, args=(job, rank, world_size, port, keys)) for rank in range(world_size)]
    for rank in ranks:
        rank.start()
    return ranks


def finish(job: Job, *, world_size: int = 1, seconds: float = 240.0) -> None:
    """Run all ranks to their end."""
    wait(start(job, world_size=world_size), seconds=seconds)


def wait(ranks: Sequence[Any], *, seconds: float = 240.0) -> None:
    """Wait for the ranks, which must end well and in time."""
    deadline = time.monotonic() + seconds
    for rank in ranks:
        rank.join(max(0.1, deadline - time.monotonic()))
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
    assert codes == [0] * len(ranks), codes


def seen(run: Path) -> list[Seen]:
    """What all processes of a run wrote down, in the order of time."""
    lines = [line for path in run.glob("seen-*") for line in path.read_text().splitlines(keepends=True)]
    rows = sorted(json.loads(line) for line in lines if line.endswith("\n"))
    return [Seen(*row[1:]) for row in rows]


def _rank(job: Job, rank: int, world_size: int, port: int, keys: dict[str, str]) -> None:
    os.environ |= keys
    _join(rank, world_size, port)
    consume(job)


def wait_in_workers(shards: str, ending: str, pids: Path) -> None:
    """A training process whose two loader workers wait for ever after the first batches, as for a server; it ends so.

    Its workers' numbers are in `pids` when it has had its first batch.
    """
    from captioner.streaming.dataset import read_split
    from captioner.streaming.reader import ShardReader
    from train.data.batches import caption_loader
    from train.data.folders import read_merged_vocabulary

    plain, num_read = ShardReader.read, 0

    def read(self: ShardReader, shard: int, place: int) -> Any:
        nonlocal num_read
        num_read += 1
        if num_read > GLOBAL_BATCH:
            time.sleep(600)
        return plain(self, shard, place)

    ShardReader.read = read  # type: ignore[method-assign]
    loader = caption_loader(
        read_split([shards], "train", remedy=""), batch_size=GLOBAL_BATCH, training=True, crop=28, max_tokens=9,
        vocabulary=read_merged_vocabulary([shards]), num_workers=2,
    )  # fmt: skip
    iterator = iter(loader)
    next(iterator)
    workers = multiprocessing.active_children()
    for worker in workers if ending == "signalled" else ():
        subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)  # as a launcher: not from this process
    if ending == "signalled":
        next(iterator)  # of the other worker
    pids.with_suffix(".new").write_text(json.dumps([worker.pid for worker in workers]))
    pids.with_suffix(".new").rename(pids)
    if ending == "killed":
        time.sleep(600)
    if ending == "held":
        multiprocessing.held = iterator  # type: ignore[attr-defined]
    if ending == "traceback":
        raise RuntimeError("as it may happen")
    raise SystemExit(75)


def start_side_by_side(world_size: int, *, peer_seconds: float, actions: Sequence[str]) -> list[Any]:
    """Ranks that do unequal things side by side: `sleep SECONDS`, `fail`, `kill`, `stop` or `leave`; they exit so.

    With 0 where all came through, with 2 where one of them failed, else as a command does.
    """
    port = free_port()
    ranks = [
        context.Process(target=_side_by_side, args=(rank, world_size, port, peer_seconds, action))
        for rank, action in enumerate(actions)
    ]
    for rank in ranks:
        rank.start()
    return ranks


def _side_by_side(rank: int, world_size: int, port: int, peer_seconds: float, action: str) -> None:
    from captioner.errors import UserError
    from train.barriers import raising_on_all_ranks
    from train.run.launch import Preemption, ending_without_peers, start_accelerator

    _join(rank, world_size, port)
    os.environ["CAPTIONER_PEER_TIMEOUT_SECONDS"] = str(peer_seconds)
    start_accelerator(seed=0)
    Preemption()

    def act() -> None:
        word, *numbers = action.split()
        if word == "sleep":
            time.sleep(float(numbers[0]))
        elif word == "fail":
            raise FileNotFoundError(2, "No such file", "it")
        else:
            time.sleep(0.5)
            signals = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "leave": signal.SIGTERM}
            os.kill(os.getpid(), signals[word])

    try:
        with ending_without_peers(remedy="start again"), raising_on_all_ranks():
            act()
    except (UserError, FileNotFoundError) as error:
        raise SystemExit(2 if "No such file" in str(error) else 3) from error


def _join(rank: int, world_size: int, port: int) -> None:
    os.environ["ACCELERATE_USE_CPU"] = "true"
    if world_size > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1"}
        os.environ |= {name: str(value) for name, value in names.items()} | {"MASTER_PORT": str(port)}


def consume(job: Job) -> None:
    """The loop of one rank."""
    from accelerate import Accelerator
    from accelerate.utils import gather_object

    from captioner.streaming import Ledger
    from captioner.streaming.dataset import read_split
    from train.data.batches import caption_loader
    from train.data.folders import read_merged_vocabulary
    from train.run.checkpoints import Checkpoints, Progress

    accelerator = Accelerator()
    split = read_split(job.shards, "train", remedy="")
    cache: dict[str, Any] = {"cache": job.cache, "cache_gigabytes": 1 / 60} if job.cache else {}
    loader = caption_loader(
        split, batch_size=GLOBAL_BATCH, training=True, seed=1, shuffle_shards=8, crop=28, max_tokens=20,
        vocabulary=read_merged_vocabulary(job.shards), rank=accelerator.process_index,
        world_size=accelerator.num_processes, num_workers=job.workers, **cache,
    )  # fmt: skip
    accelerator.register_for_checkpointing(loader)
    checkpoints = Checkpoints(job.run, loader, Progress(), accelerator)
    checkpoints.resume()
    job.run.mkdir(exist_ok=True)
    with (job.run / f"seen-{os.getpid()}").open("w") as log:
        while loader.epoch < job.epochs:
            epoch, first = loader.epoch, loader.steps_done
            for step, (batch,) in enumerate(loader, start=first):
                digest = sha256(batch.inputs[: batch.num_samples].numpy().tobytes()).hexdigest()
                row = [epoch, step, loader.rank, loader.world_size, batch.positions, batch.keys, digest]
                log.write(json.dumps([time.time(), *row]) + "\n")
                log.flush()
                if (epoch, step) == job.dies_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(job.pause)
                if (step + 1) % CHECKPOINT_STEPS == 0 and step + 1 < len(loader):
                    checkpoints.save()
            planned = split.num_samples - first * GLOBAL_BATCH
            Ledger.of_all(gather_object([loader.ledger]), planned=planned)
            checkpoints.save()
    accelerator.end_training()
