"""Streaming against its peers and its ceilings, in one run.

    python benchmarks/streaming.py --images ../shared/data/coco/images                  # about 10 minutes
    python benchmarks/streaming.py --quick                                              # a minute, drawn pictures
    python benchmarks/streaming.py --images photos --json streaming.json

Contenders take turns: in each round every one makes as many batches of 128 samples as the others, and another one
begins. All read the same JPEGs of 256 x 256 pixels with five captions each, from a warm cache, in a format of their
own where they have one, shuffled, and crop at random. All but the book's loader decode natively and give uint8
pictures with all captions of each; the book's gives floats and one caption a sample. A byte of each page of a batch is
read, so that it is really there. Only steady iteration is timed. Without workers CPU time is compared, which other
programs disturb little; with 2 workers time on the clock: measure on a machine that does nothing else. Peers live in
an environment of their own: make bench-peers. FFCV has no turns: its package wants OpenCV's C++ headers to install, so
its bars are listed as not measured.

Exit codes: 0 measured, whether or not the bars hold; 2 something to mend, told in one line.
"""

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from captioner import cli, images
from captioner.errors import UserError
from captioner.flags import Count, File
from measure import (
    Bar,
    Contender,
    Cost,
    at_least,
    describe_run,
    median_of,
    print_bars,
    print_rows,
    take_turns,
    times_as_fast,
    write_json,
)
from packing import QUALITY, REPOSITORY, SIZE, find_peers, plain_pillow, shard_megabytes
from photos import draw_photos, find_photos, repeat_photos, write_captions

PACKAGES = ("torch", "torchvision", "webdataset", "pillow", "pillow-simd", "nltk", "numpy")
BATCH = 128
WORKERS = (0, 2)
NUM_SHARDS = 16  # the same number for each of webdataset's workers
LEFT_OVER = 24  # batches of an epoch that nobody is asked for: shuffle buffers and queues are full to the end
OURS, BOOK, FFCV = "ours", "the book's loader", "ffcv"
PEERS = ("webdataset", "litdata", "mosaicml-streaming")
DECODE, SIMPLEJPEG, WALK = "decode as ours", "decode by simplejpeg", "walk the tars"
LOADERS = (OURS, *PEERS, BOOK)
CEILINGS = (DECODE, SIMPLEJPEG, WALK)


@dataclass(frozen=True, kw_only=True)
class StreamingSettings:
    """What is measured, on which pictures, and how long."""

    images: File | None = None
    """Folder of photos such as COCO's; without it pictures in COCO's sizes are drawn, which compress like photos."""
    rounds: Count | None = None
    """Turns of each contender: 5, with --quick 1."""
    batches: Count | None = None
    """Batches that are timed in a turn: 24, with --quick 4."""
    peers: File | None = None
    """The Python that has litdata and mosaicml-streaming: .venv-peers/bin/python, as make bench-peers makes it."""
    quick: bool = False
    """Everything small, to see that it runs: the figures are rough."""
    json: File | None = None
    """Write run, rows and bars to this file."""


def main(settings: StreamingSettings) -> None:
    """Make the samples in every format, measure, and tell."""
    peers = find_peers(settings.peers)
    rounds = settings.rounds or (1 if settings.quick else 5)
    batches = settings.batches or (4 if settings.quick else 24)
    warm_up = 2 if settings.quick else 16
    num_samples = BATCH * (warm_up + batches + (LEFT_OVER // 3 if settings.quick else LEFT_OVER))
    with tempfile.TemporaryDirectory(prefix="streaming-") as temporary:
        scratch = Path(temporary)
        originals = find_photos(settings.images) if settings.images else draw_photos(scratch / "drawn", count=24)
        with start_servers(scratch, peers) as servers:
            pack(originals, scratch, num_samples=num_samples)
            found = assign(servers)
            run = describe_run(
                PACKAGES,
                samples=describe_samples(settings.images, originals, scratch, num_samples),
                turns=f"{batches} batches of {BATCH} after {warm_up} to warm up",
                contenders=", ".join(f"{name}: {server.there[name]}" for name, server in found.items()),
                left_out=", ".join(name for name in (*LOADERS, *CEILINGS) if name not in found) or "none",
                mode="quick: rough figures" if settings.quick else "full",
            )
            print_rows("streaming", [{"": name, "of this run": text} for name, text in run.items()])
            turns = Turns(folder=scratch, warm_up=warm_up, batches=batches)
            costs = take_turns(make_contenders(found, turns), rounds=rounds)
    rows = [row for workers in WORKERS for row in make_rows(costs, workers=workers)]
    for workers in WORKERS:
        title = f"{workers} workers: medians of {rounds} rounds, ratios by {'CPU time' if not workers else 'the clock'}"
        print_rows(title, [row for row in rows if row["workers"] == workers])
    bars = [bar for workers in WORKERS for bar in make_bars(costs, workers=workers)]
    print_bars(bars)
    if settings.json:
        write_json(settings.json, run=run, rows=rows, bars=bars)


# ---- the samples ------------------------------------------------------------------------------------------


def pack(originals: Sequence[Path], scratch: Path, *, num_samples: int) -> None:
    """Shards of so many samples, by the packing command, which keeps JPEGs of the wanted size as they are."""
    small = scratch / "small"
    small.mkdir()
    for number, path in enumerate(originals[:num_samples]):
        picture = Image.open(path).convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
        (small / f"{number:06d}.jpg").write_bytes(images.encode_jpeg(picture, quality=QUALITY))
    paths = repeat_photos(scratch / "repeated", sorted(small.iterdir()), count=num_samples)
    flags = {
        "images": paths[0].parent,
        "captions": write_captions(paths, scratch / "captions.jsonl"),
        "split": "train",
        "output": scratch / "shards",
        "workers": 1,
        "shard-megabytes": shard_megabytes(num_samples, shards=NUM_SHARDS),
    }
    given = [text for flag, value in flags.items() for text in (f"--{flag}", str(value))]
    command = [sys.executable, REPOSITORY / "sharding/make_shards.py", *given]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"packing the samples failed ({done.returncode}): {done.stderr[-600:]}")


def describe_samples(folder: Path | None, originals: Sequence[Path], scratch: Path, num_samples: int) -> str:
    """Where the samples come from, how many they are, and how large."""
    source = f"from {folder}" if folder else "DRAWN for want of --images: not comparable with photos"
    shards = list((scratch / "shards").glob("*.tar"))
    kilobytes = sum(shard.stat().st_size for shard in shards) / num_samples / 1000
    return (
        f"{len(originals)} pictures {source}, stored as JPEG {SIZE} x {SIZE} of quality {QUALITY}, repeated to "
        f"{num_samples:,}; {kilobytes:.0f} kB each with five captions; {len(shards)} shards"
    )


# ---- processes that make batches --------------------------------------------------------------------------


class Server:
    """A `loaders.py` in the given Python: knows which of the contenders are there, and has one at a time run."""

    def __init__(self, python: Path, contenders: Sequence[str], *, paths: Iterable[str], log: Path) -> None:
        self._log = log
        command = [python, "-P", Path(__file__).with_name("loaders.py"), os.pathsep.join(paths), *contenders]
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        self._there: dict[str, str] | None = None

    @property
    def there(self) -> dict[str, str]:
        """The contenders that can run, with package and version. Raises UserError."""
        if self._there is None:
            self._there = self._read()
        return self._there

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to a request. Raises UserError."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End it."""
        self._process.communicate()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        content = json.loads(line) if line else {"error": "it ended"}
        if "error" in content:
            raise UserError(f"loaders.py failed ({content['error']}): {self._log.read_text()[-600:]}")
        return content


@contextmanager
def start_servers(scratch: Path, peers: Path | None) -> Iterator[list[Server]]:
    """Ours, and the peers' where it is there: it finds torch among our packages, behind those made for it.

    Where pillow-simd is in Pillow's place, the book's loader runs there too. Raises UserError.
    """
    book_here = plain_pillow(peers) == Path(sys.executable)
    here = [OURS, "webdataset", *CEILINGS, *([BOOK] if book_here else [])]
    servers = [Server(Path(sys.executable), here, paths=[str(REPOSITORY)], log=scratch / "loaders.log")]
    if peers:
        library = f"lib/python{sysconfig.get_python_version()}"
        if not (peers.parent.parent / library).is_dir():
            raise UserError(f"{peers} is not Python {sysconfig.get_python_version()}: make bench-peers with that")
        paths = [str(REPOSITORY), str(peers.parent.parent / "streaming"), sysconfig.get_path("purelib")]
        there = ["litdata", "mosaicml-streaming", SIMPLEJPEG, *([] if book_here else [BOOK])]
        servers.append(Server(peers, there, paths=paths, log=scratch / "peers.log"))
    try:
        yield servers
    finally:
        for server in servers:
            server.close()


def assign(servers: Sequence[Server]) -> dict[str, Server]:
    """The server of each contender that is there."""
    found = {name: server for server in reversed(servers) for name in server.there}
    return {name: found[name] for name in (*LOADERS, *CEILINGS) if name in found}


@dataclass(frozen=True, kw_only=True, slots=True)
class Turns:
    """What every contender is asked in a turn."""

    folder: Path
    warm_up: int
    batches: int


def make_contenders(found: Mapping[str, Server], turns: Turns) -> dict[str, Contender]:
    """The loaders with each number of workers, and the ceilings, which are single loops. Writes the peers' formats."""
    contenders = {}
    for name, server in found.items():
        server.ask(name=name, folder=str(turns.folder))
        for workers in WORKERS if name in LOADERS else (0,):
            contenders[label(name, workers)] = make_contender(name, server, turns, workers=workers)
    return contenders


def make_contender(name: str, server: Server, turns: Turns, *, workers: int) -> Contender:
    """A turn in the contender's process; the processor time of its workers is not known."""

    def turn(number: int) -> Cost:
        told = server.ask(
            name=name,
            folder=str(turns.folder),
            workers=workers,
            epoch=number,
            warm_up=turns.warm_up,
            batches=turns.batches,
        )
        cpu_seconds = None if workers else told["cpu_seconds"]
        return Cost(items=told["items"], wall_seconds=told["wall_seconds"], cpu_seconds=cpu_seconds)

    return turn


def label(name: str, workers: int) -> str:
    """A contender's name among all."""
    return f"{name}, {workers} workers"


# ---- figures ----------------------------------------------------------------------------------------------

Costs = Mapping[str, Sequence[Cost | None]]


def clock_of(workers: int) -> str:
    """CPU time where all of it is known."""
    return "wall_ms" if workers else "cpu_ms"


def ours_against(costs: Costs, name: str, *, workers: int) -> float | None:
    """How many times as fast ours is; None where the other is not there."""
    others = costs.get(label(name, workers))
    return times_as_fast(costs[label(OURS, workers)], others, clock=clock_of(workers)) if others else None


def of_the_ceiling(costs: Costs, name: str, *, workers: int) -> float | None:
    """A contender's rate a core, as a share of what our decoder does in a single loop."""
    share = times_as_fast(costs[label(name, workers)], costs[label(DECODE, 0)], clock=clock_of(workers))
    return None if share is None else share / max(1, workers)


def make_rows(costs: Costs, *, workers: int) -> list[dict[str, Any]]:
    """A row for each contender with so many workers."""
    rows = []
    for name in (*LOADERS, *CEILINGS):
        turns = costs.get(label(name, workers))
        if turns is None:
            continue
        wall_ms = median_of(turns, figure="wall_ms")
        rows.append(
            {
                "workers": workers,
                "contender": f"ceiling: {name}" if name in CEILINGS else name,
                "cpu_ms_a_sample": median_of(turns, figure="cpu_ms"),
                "wall_ms_a_sample": wall_ms,
                "samples_a_second": 1000 / wall_ms if wall_ms else None,
                "ours_times_as_fast": ours_against(costs, name, workers=workers),
                "of_our_decoder_a_core": of_the_ceiling(costs, name, workers=workers),
            }
        )
    return rows


def make_bars(costs: Costs, *, workers: int) -> list[Bar]:
    """What ours must reach; a bar against several peers is measured only where all of them are."""
    clock = clock_of(workers)
    medians = {name: median_of(costs.get(label(name, workers), ()), figure=clock) for name in PEERS}
    best = min(PEERS, key=lambda name: medians[name] or 0.0) if all(medians.values()) else None
    against_best = ours_against(costs, best, workers=workers) if best else None
    words = f"{workers} workers, ours"
    ceiling = of_the_ceiling(costs, OURS, workers=workers)
    return [
        at_least(f"{words} / our decoder in a single loop, a core", ceiling, 0.75 if workers else 0.85),
        at_least(f"{words} / {BOOK}", ours_against(costs, BOOK, workers=workers), 4.5),
        at_least(f"{words} / the best of {', '.join(PEERS)}", against_best, 1.3),
        at_least(f"{words} / {FFCV}", ours_against(costs, FFCV, workers=workers), 1.0),
    ]


def run() -> None:
    """The entry."""
    cli.run(main, StreamingSettings, description=__doc__ or "")


if __name__ == "__main__":
    run()
