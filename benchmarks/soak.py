"""Stream for an hour from a web server that restarts every few minutes: is each epoch complete, does memory grow?

    python benchmarks/soak.py                            # an hour: 2 processes with 2 workers each
    python benchmarks/soak.py --minutes 1 --quick        # to see that it runs

Two processes stream epoch after epoch as training does, at a steady rate, without a model. Their shard cache holds half
of the shards, so they request shards all the time. nginx stops every one to three minutes, in the middle of its
answers, and stays down for up to twenty seconds. After each epoch the keys of both processes are compared with those in
the shards' indexes. Memory and open files of all six processes are sampled every few seconds.

Exit codes: 0 measured, whether or not the bars hold; 2 an error that you can fix, in one line. Needs nginx, and the
environment of make check.
"""

import json
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from captioner import cli
from captioner.errors import UserError
from captioner.flags import Count, File, Positive
from measuring.commands import import_servers
from measuring.figures import at_least, at_most, describe_run, finish, print_rows
from measuring.photos import draw_photo, write_data

BATCH, PROCESSES, WORKERS = 64, 2, 2
SHUFFLE_SHARDS = 16
CACHE_BYTES = 40_000_000  # at least: open shards must fit
SIZE, CROP = 96, 80
UP_SECONDS, DOWN_SECONDS = (60.0, 180.0), (1.0, 20.0)
NOTE_SECONDS = 5.0
SAME_MEMORY, SAME_FILES = 1.02, 1.0  # bars on end / start
WARM_SHARE = 0.1  # of the time: caches fill, libraries load


@dataclass(frozen=True, kw_only=True)
class SoakSettings:
    """How long, how fast, and how much is streamed."""

    minutes: Positive = 60.0
    """How long to stream; the current epoch is finished."""
    images_per_second: Positive = 400.0
    """Rate of both processes together, as a GPU would set it; a slower stream runs at full speed."""
    pictures: Count = 24_000
    """Samples of an epoch."""
    quick: bool = False
    """A tenth of the samples, and a server that restarts every few seconds."""
    json: File | None = None
    """Write run, rows and bars to this file, and a plot of the bars beside it (.svg)."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the ranks need to know."""

    url: str
    folder: Path
    until: float
    images_per_second: float
    cache_bytes: int
    port: int


@dataclass(frozen=True, kw_only=True)
class Note:
    """A sample of all processes: private memory in MB and open files, in total and of the training processes alone.

    Private memory is backed by no file (heap, stacks, shared buffers); memory that processes share is divided.
    """

    megabytes: float
    rank_megabytes: float
    files: int
    rank_files: int


# ---- the ranks --------------------------------------------------------------------------------------------


def run_rank(job: Job, rank: int) -> None:
    """Stream epoch after epoch; rank 0 writes each epoch's counts."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": PROCESSES, "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {name: str(value) for name, value in names.items()} | {"MASTER_PORT": str(job.port)}
    os.environ |= {"ACCELERATE_USE_CPU": "true"}
    import torch
    from accelerate import Accelerator
    from accelerate.utils import broadcast_object_list, gather_object

    from captioner.streaming import Ledger
    from captioner.streaming.dataset import read_split
    from train.data.batches import caption_loader
    from train.data.folders import read_merged_vocabulary

    torch.set_num_threads(1)
    accelerator = Accelerator()
    split = read_split([job.url], "train", remedy="see the log of nginx")
    loader = caption_loader(
        split, batch_size=BATCH, training=True, shuffle_shards=SHUFFLE_SHARDS, crop=CROP, max_tokens=20,
        vocabulary=read_merged_vocabulary([job.url]), num_workers=WORKERS,
        rank=accelerator.process_index, world_size=accelerator.num_processes, cache=job.folder / "cache",
        cache_gigabytes=job.cache_bytes / 1e9,
    )  # fmt: skip
    continues = [True]
    while continues[0]:
        started, epoch, keys = time.monotonic(), loader.epoch, []
        for number, (batch,) in enumerate(loader, start=1):
            keys += batch.keys
            time.sleep(max(0.0, started + number * BATCH / job.images_per_second - time.monotonic()))
        ledger = Ledger.of_all(gather_object([loader.ledger]), planned=split.num_samples)
        counts = Counter(gather_object(keys))
        if accelerator.is_main_process:
            row = {"epoch": epoch, "seconds": time.monotonic() - started, "planned": ledger.planned,
                   "decoded": ledger.decoded, "keys": len(counts), "most_often": max(counts.values()),
                   "strange": len(counts.keys() - known_keys(job.folder))}  # fmt: skip
            with (job.folder / "epochs.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
        continues[0] = time.time() < job.until
        broadcast_object_list(continues)
    accelerator.end_training()


def known_keys(folder: Path) -> set[str]:
    """The keys in the indexes on disk."""
    from captioner.shards.format import ShardIndex

    indexes = [ShardIndex.from_bytes(path.read_bytes(), origin=str(path)) for path in folder.glob("shards/*.index")]
    return {index.key(sample) for index in indexes for sample in range(len(index))}


# ---- the server -------------------------------------------------------------------------------------------


class Restarting:
    """nginx over a folder, stopped and restarted until the end; `restarts` counts that."""

    def __init__(self, folder: Path, *, pace: float) -> None:
        self.restarts = 0
        self.down_seconds = 0.0
        self._servers = import_servers()
        self._port = self._servers.free_port()
        self.url = f"http://127.0.0.1:{self._port}/shards"
        self._folder, self._pace = folder, pace
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Restarting":
        self._thread.start()
        self._servers.wait_for_port(self._port)
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        rng = Random(0)
        while not self._stopping.is_set():
            home = self._folder / f"nginx-{self.restarts}"
            with self._servers.run_nginx(self._folder, home, port=self._port):
                self._stopping.wait(self._pace * rng.uniform(*UP_SECONDS))
            if self._stopping.is_set():
                return
            down = self._pace * rng.uniform(*DOWN_SECONDS)
            self._stopping.wait(down)
            self.down_seconds += down
            self.restarts += 1


# ---- the samples ------------------------------------------------------------------------------------------


def note(ranks: list[int]) -> Note | None:
    """Sample all processes; None while some are starting or ending."""
    megabytes: dict[int, float] = {}
    files: dict[int, int] = {}
    with suppress(OSError):
        for pid in [*ranks, *(worker for rank in ranks for worker in loaders_of(rank))]:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            megabytes[pid] = sum(int(rollup.split(f"\nPss_{kind}:")[1].split()[0]) for kind in ("Anon", "Shmem")) / 1000
            files[pid] = sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
        if len(files) == len(ranks) * (1 + WORKERS):
            return Note(
                megabytes=sum(megabytes.values()),
                rank_megabytes=sum(megabytes[rank] for rank in ranks),
                files=sum(files.values()),
                rank_files=sum(files[rank] for rank in ranks),
            )
    return None


def loaders_of(rank: int) -> list[int]:
    """The process ids of a rank's loader workers. Raises OSError."""
    return [int(pid) for task in Path(f"/proc/{rank}/task").iterdir()
            for pid in (task / "children").read_text().split()]  # fmt: skip


@contextmanager
def running(job: Job) -> Iterator[list[Any]]:
    """Run the ranks, and kill them at the end."""
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=run_rank, args=(job, rank)) for rank in range(PROCESSES)]
    for rank in ranks:
        rank.start()
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()


def watch(ranks: list[Any], *, total_seconds: float) -> list[Note]:
    """Samples until the ranks end. Raises UserError if one of them fails."""
    started, notes = time.monotonic(), []
    with cli.progress_bar("streaming", total=round(total_seconds), unit="s") as bar:
        while any(rank.is_alive() for rank in ranks):
            if any(rank.exitcode for rank in ranks):
                raise UserError("a process ended with an error: see above")
            if found := note([rank.pid for rank in ranks]):
                notes.append(found)
            time.sleep(NOTE_SECONDS)
            last = f"{notes[-1].megabytes:,.0f} MB, {notes[-1].files} files" if notes else ""
            bar.set(min(round(time.monotonic() - started), round(total_seconds)), note=last)
    return notes


def thirds(notes: list[Note], figure: str) -> tuple[float, float]:
    """The medians of a figure in the first and the last third of the samples after the start."""
    warm = [getattr(each, figure) for each in notes[int(len(notes) * WARM_SHARE) :]]
    size = max(1, len(warm) // 3)
    return statistics.median(warm[:size]), statistics.median(warm[-size:])


# ---- the command -----------------------------------------------------------------------------------------


def pack(folder: Path, *, num_pictures: int) -> int:
    """Pack `num_pictures` images into `folder/shards`; returns the bytes."""
    from sharding import make_shards
    from sharding.settings import ShardSettings

    (folder / "drawn").mkdir()
    drawn = [folder / "drawn" / f"{seed}.jpg" for seed in range(64)]
    for seed, path in enumerate(drawn):
        draw_photo(seed, (128, 96)).save(path, quality=90)
    write_data(drawn, folder, count=num_pictures)
    make_shards.main(
        ShardSettings(
            images=str(folder / "photos"),
            captions=str(folder / "captions.jsonl"),
            split="train",
            output=str(folder / "shards"),
            size=SIZE,
            shard_megabytes=1,
            workers=1,
        )
    )
    return sum(path.stat().st_size for path in folder.glob("shards/*.tar"))


def main(settings: SoakSettings) -> None:
    """Pack, stream, and report."""
    servers = import_servers()
    num_pictures = settings.pictures // 10 if settings.quick else settings.pictures
    run = describe_run(("torch", "accelerate", "webdataset", "aiohttp", "fsspec"), minutes=settings.minutes)
    with tempfile.TemporaryDirectory(prefix="soak-", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        num_bytes = pack(folder, num_pictures=num_pictures)
        with Restarting(folder, pace=0.05 if settings.quick else 1.0) as server:
            job = Job(
                url=server.url, folder=folder, until=time.time() + 60 * settings.minutes, port=servers.free_port(),
                images_per_second=settings.images_per_second, cache_bytes=max(CACHE_BYTES, num_bytes // 2),
            )  # fmt: skip
            with running(job) as ranks:
                notes = watch(ranks, total_seconds=60 * settings.minutes)
        if any(rank.exitcode for rank in ranks) or len(notes) < 3:
            raise UserError("the streams ended early: see the errors above, or give more --minutes")
        epochs = [json.loads(line) for line in (folder / "epochs.jsonl").read_text().splitlines()]
    whole = [e for e in epochs if e["planned"] == e["decoded"] == e["keys"] == num_pictures
             and e["most_often"] == 1 and not e["strange"]]  # fmt: skip
    rows: list[dict[str, Any]] = []
    bars = [at_least("epochs in which every sample came exactly once / epochs", len(whole) / len(epochs), 1.0)]
    for figure in ("megabytes", "rank_megabytes", "files", "rank_files"):
        first, last = thirds(notes, figure)
        most = max(getattr(each, figure) for each in notes)
        rows.append({"figure": figure, "first_third": first, "last_third": last, "most": most})
        bars.append(
            at_most(
                f"{figure}, median of the last third / of the first",
                last / first,
                SAME_FILES if "files" in figure else SAME_MEMORY,
            )
        )
    facts = {
        "epochs": len(epochs), "samples": sum(e["decoded"] for e in epochs), "restarts": server.restarts,
        "seconds away": round(server.down_seconds), "shards' MB": round(num_bytes / 1e6), "notes": len(notes),
        "images/s": round(sum(e["decoded"] for e in epochs) / sum(e["seconds"] for e in epochs)),
    }  # fmt: skip
    print_rows("memory and open files of all processes, and of the two ranks", rows)
    print_rows("the stream", [facts])
    finish(bars, json=settings.json, run=run | {key: str(value) for key, value in facts.items()}, rows=rows)


if __name__ == "__main__":
    cli.run(main, SoakSettings, description=__doc__ or "")
