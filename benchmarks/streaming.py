"""StreamingLoader against an earlier commit's loader, its peers and its own bars, in one run.

    make bench-peers                                                                    # once, for litdata and mosaicml
    python benchmarks/streaming.py --images ../shared/data/coco/images                  # about 15 minutes
    python benchmarks/streaming.py --quick                                              # a minute, drawn images
    python benchmarks/streaming.py --parts text seek --json streaming.json

Contenders take turns: in each round all make the same number of batches, and each round starts with the next one.
Figures are medians over the rounds, ratios are medians of the rounds' ratios. All data is in the page cache. Only
steady iteration is timed.

pictures  training data: JPEGs of 256 x 256 pixels with five captions each, shuffled, cropped at random, in batches of
          128. Each contender reads its own format if it has one. Code and format of commit 1b46dbb come from this
          repository's history, and its images have the quality that it packed, 95 with 4:4:4; without the history
          that contender is left out. Peers decode with torchvision, as their users do; litdata also has a turn with
          our decoder. All but the book's loader yield uint8 images with all their captions; the book's yields floats
          and one caption a sample. One byte of each page of a batch is read, so that its memory is really written.
text      samples of 200 bytes, shuffled, raw bytes in lists of 256, one process: little but the loader's own work.
seek      from reading the manifest to the first batch, inside an epoch of 10^8 samples: 10,000 links to one shard.

CPU time is that of all processes. Other programs disturb it little, but measure on an idle machine.

Exit codes: 0 measured, whether or not the bars hold; 2 an error that you can fix, in one line.
"""

import json
import math
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from captioner import cli
from captioner.errors import UserError
from captioner.flags import Count, File
from contenders import pictures, text
from measuring.commands import (
    REPOSITORY,
    SAMPLE_BYTES,
    check_out,
    code_environment,
    find_peers,
    pack_samples,
    plain_pillow,
    shard_megabytes,
    stored_photos,
)
from measuring.figures import (
    Bar,
    Contender,
    Cost,
    at_least,
    at_most,
    describe_run,
    finish,
    median_of,
    print_rows,
    print_run,
    take_turns,
    times_as_fast,
)
from measuring.photos import SIZE, draw_photos, find_photos, write_captions
from measuring.settings import ImageBenchmarkSettings

PACKAGES = ("torch", "torchvision", "webdataset", "simplejpeg", "pillow", "pillow-simd", "nltk", "numpy")
PICTURE_BATCH, TEXT_BATCH = 128, 256
WORKERS = (0, 2)  # of image loaders; text loaders have none
PICTURE_SHARDS = 16  # divides evenly among webdataset's workers
LEFT_OVER = 24  # batches of an epoch that stay unread, so that shuffle buffers and queues are full to the end
SEEK_SHARDS = 10_000
SEEKS = (0.123, 0.5, 0.987)  # fractions of an epoch
PEERS = ("litdata", pictures.WITH_OUR_DECODER, "mosaicml-streaming")
Part = Literal["pictures", "text", "seek"]
PARTS: tuple[Part, ...] = ("pictures", "text", "seek")


@dataclass(frozen=True, kw_only=True)
class StreamingSettings(ImageBenchmarkSettings):
    """What is measured, on which images, and how often."""

    parts: tuple[Part, ...] = PARTS
    """What to measure."""
    rounds: Count | None = None
    """Turns of each contender: 5, with --quick 1."""
    batches: Count | None = None
    """Timed batches of images in a turn: 24, with --quick 4."""
    old_bytes: bool = False
    """Store everybody's images as commit 1b46dbb did, at quality 95 with 4:4:4, instead of as packing does now."""
    peers: File | None = None
    """The Python that has litdata and mosaicml-streaming: .venv-peers/bin/python, as make bench-peers makes it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Turns:
    """The parameters of every contender's turn in a part."""

    part: Part
    folder: Path
    batch: int
    warm_up: int
    batches: int


def main(settings: StreamingSettings) -> None:
    """Make the samples in every format, measure, and print."""
    originals = find_photos(settings.images) if settings.images else []
    peers = find_peers(settings.peers)
    rounds = settings.rounds or (1 if settings.quick else 5)
    with tempfile.TemporaryDirectory(prefix="streaming-") as temporary, ExitStack() as stack:
        scratch = Path(temporary)
        earlier = check_out(pictures.EARLIER, scratch / "earlier") if "pictures" in settings.parts else None
        servers = start_servers(scratch, settings.parts, peers=peers, earlier=earlier)
        for server in servers:
            stack.callback(server.close)
        turns, samples = write_samples(settings, originals, scratch, earlier=earlier)
        found = assign(servers)
        run = describe_run(
            PACKAGES,
            **samples,
            contenders=", ".join(f"{name}: {server.there[name]}" for name, server in found.items()),
            left_out=", ".join(name for name in names_of(settings.parts) if name not in found) or "none",
            mode="quick: rough figures" if settings.quick else f"{rounds} rounds",
        )
        print_run("streaming", run)
        contenders = {name: turn for each in turns for name, turn in make_contenders(found, each).items()}
        costs = take_turns(contenders, rounds=rounds) if contenders else {}
        seeks = measure_seeks(found[key("text", text.OURS)], scratch) if "seek" in settings.parts else []
    rows = make_rows(costs)
    print_rows(f"medians of {rounds} rounds; ratios: ours as many times as fast", rows)
    print_rows("to the first batch after a seek", seeks)
    bars = [] if settings.old_bytes else [bar for part in settings.parts for bar in BARS[part](costs, seeks)]
    finish(bars, json=settings.json, run=run, rows=[*rows, *seeks])


# ---- the samples ------------------------------------------------------------------------------------------


def write_samples(
    settings: StreamingSettings, originals: Sequence[Path], scratch: Path, *, earlier: Path | None
) -> tuple[list[Turns], dict[str, str]]:
    """Write the samples of the parts; returns the turns of their contenders, and descriptions."""
    turns, words = [], {}
    if "pictures" in settings.parts:
        batches = settings.batches or (4 if settings.quick else 24)
        warm_up, left_over = (2, 8) if settings.quick else (16, LEFT_OVER)
        turns.append(Turns(part="pictures", folder=scratch, batch=PICTURE_BATCH, warm_up=warm_up, batches=batches))
        num_samples = PICTURE_BATCH * (warm_up + batches + left_over)
        originals = originals or draw_photos(scratch / "drawn", count=24)
        pack_pictures(originals, scratch, num_samples=num_samples, earlier=earlier, old_bytes=settings.old_bytes)
        words["pictures"] = describe_pictures(settings.images, originals, scratch, num_samples)
    if "text" in settings.parts or "seek" in settings.parts:
        text.write_shards(scratch)
    if "text" in settings.parts:
        warm_up, batches = (4, 40) if settings.quick else (40, 300)
        turns.append(Turns(part="text", folder=scratch, batch=TEXT_BATCH, warm_up=warm_up, batches=batches))
        words["text"] = f"{text.NUM_SAMPLES:,} samples of {text.SAMPLE_BYTES} bytes in {text.NUM_SHARDS} shards"
    for each in turns:
        words[f"{each.part}, a turn"] = f"{each.batches} batches of {each.batch} after {each.warm_up} to warm up"
    return turns, words


def pack_pictures(
    originals: Sequence[Path], scratch: Path, *, num_samples: int, earlier: Path | None, old_bytes: bool
) -> None:
    """Pack `num_samples` images with each version of the code, in its default quality unless `old_bytes`."""
    for code, shards, quality, sample_bytes in (
        (REPOSITORY, pictures.SHARDS, pictures.EARLIER_QUALITY if old_bytes else {}, SAMPLE_BYTES),
        (earlier, pictures.EARLIER_SHARDS, pictures.EARLIER_QUALITY, pictures.EARLIER_SAMPLE_BYTES),
    ):
        if code:
            megabytes = shard_megabytes(num_samples, shards=PICTURE_SHARDS, sample_bytes=sample_bytes)
            folder = scratch / f"photos-of-{shards}"
            folder.mkdir()
            paths = stored_photos(originals, folder, count=num_samples, **quality)
            captions = write_captions(paths, folder / "captions.jsonl")
            pack_samples(paths[0].parent, captions, scratch / shards, code=code, workers=1, shard_megabytes=megabytes)


def describe_pictures(folder: Path | None, originals: Sequence[Path], scratch: Path, num_samples: int) -> str:
    """Source, number and size of the samples."""
    source = f"from {folder}" if folder else "DRAWN, without --images: not comparable with photos"
    shards = list((scratch / pictures.SHARDS).glob("*.tar"))
    kilobytes = sum(shard.stat().st_size for shard in shards) / num_samples / 1000
    return (
        f"{len(originals)} pictures {source}, stored as JPEG {SIZE} x {SIZE}, repeated to "
        f"{num_samples:,}; {kilobytes:.0f} kB each with five captions; {len(shards)} shards"
    )


# ---- servers of contenders -------------------------------------------------------------------------------


class Server:
    """A `contenders/server.py` in the given Python: knows which contenders are installed, and runs one at a time."""

    def __init__(
        self, python: Path, contenders: Sequence[str], *, log: Path, code: Path = REPOSITORY, paths: Sequence[Path] = ()
    ) -> None:
        self._log = log
        server = Path(__file__).with_name("contenders") / "server.py"
        command = [python, "-P", server, os.pathsep.join(map(str, paths)), *contenders]
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=code_environment(code),
            )
        self._there: dict[str, str] | None = None

    @property
    def there(self) -> dict[str, str]:
        """The contenders that can run, with package and version. Raises UserError."""
        if self._there is None:
            self._there = self._read()
        return self._there

    def ask(self, name: str, action: str, **request: Any) -> dict[str, Any]:
        """The answer to a request. Raises UserError."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps({"name": name, "action": action, **request}) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        content = json.loads(line) if line else {"error": "it exited"}
        if "error" in content:
            raise UserError(f"contenders/server.py failed ({content['error']}): {self._log.read_text()[-600:]}")
        return content


def key(part: str, name: str) -> str:
    """A contender's name among those of all parts."""
    return f"{part}/{name}"


def names_of(parts: Sequence[Part]) -> list[str]:
    """The contenders of the parts. Seeks use our text loader."""
    loaders = {"pictures": pictures.PICTURE_LOADERS, "text": text.TEXT_LOADERS, "seek": ()}
    return [key(part, name) for part in parts for name in loaders[part]]


def start_servers(scratch: Path, parts: Sequence[Part], *, peers: Path | None, earlier: Path | None) -> list[Server]:
    """Servers of ours, of the earlier commit if it is available, and of the peers if they are installed.

    The peers find torch among our packages, after those installed for them. If pillow-simd is installed here, the
    book's loader runs with the peers too. Raises UserError.
    """
    names = names_of(parts)
    book, of_earlier = key("pictures", pictures.BOOK), key("pictures", pictures.EARLIER)
    of_peers = {key(part, name) for part in parts for name in PEERS}
    if plain_pillow(peers) != Path(sys.executable):
        of_peers.add(book)
    here = [name for name in names if name not in of_peers and name != of_earlier]
    if "seek" in parts and "text" not in parts:
        here.append(key("text", text.OURS))
    servers = [Server(Path(sys.executable), here, log=scratch / "ours.log")]
    if earlier:
        servers.append(Server(Path(sys.executable), [of_earlier], code=earlier, log=scratch / "earlier.log"))
    if peers and of_peers & set(names):
        root = peers.parent.parent
        if not (root / f"lib/python{sysconfig.get_python_version()}").is_dir():
            raise UserError(f"{peers} is not Python {sysconfig.get_python_version()}: make bench-peers with that")
        paths = [root / "streaming", Path(sysconfig.get_path("purelib"))]
        there = [name for name in names if name in of_peers]
        servers.append(Server(peers, there, paths=paths, log=scratch / "peers.log"))
    return servers


def assign(servers: Sequence[Server]) -> dict[str, Server]:
    """The server of each available contender; contenders that a bar compares follow each other."""
    found = {name: server for server in servers for name in server.there}
    return {name: found[name] for name in sorted(found, key=names_of(PARTS).index)}


def make_contenders(found: Mapping[str, Server], turns: Turns) -> dict[str, Contender]:
    """The contenders of a part for each number of workers. Writes the peers' formats."""
    servers = {name: server for name, server in found.items() if name.startswith(f"{turns.part}/")}
    for name, server in servers.items():
        server.ask(name, "write", folder=str(turns.folder))
    return {
        label(name, workers): make_contender(name, server, turns, workers=workers)
        for workers in (WORKERS if turns.part == "pictures" else WORKERS[:1])
        for name, server in servers.items()
        if not workers or name != key("pictures", pictures.DECODE)
    }


def make_contender(name: str, server: Server, turns: Turns, *, workers: int) -> Contender:
    """A turn in the contender's process."""

    def turn(number: int) -> Cost:
        found = server.ask(
            name,
            "turn",
            folder=str(turns.folder),
            batch=turns.batch,
            workers=workers,
            epoch=number,
            warm_up=turns.warm_up,
            batches=turns.batches,
        )
        cpu = found["cpu_seconds"]
        return Cost(
            items=found["items"], wall_seconds=found["wall_seconds"], cpu_seconds=None if math.isnan(cpu) else cpu
        )

    return turn


def label(name: str, workers: int) -> str:
    """A contender's name with its number of workers."""
    return f"{name}, {workers} workers"


def measure_seeks(server: Server, scratch: Path) -> list[dict[str, Any]]:
    """A row for each seek, in one source and in a mixture."""
    text.link_shards(scratch, num_shards=SEEK_SHARDS)
    rows = []
    for num_sources in (1, len(text.SOURCES)):
        for at in SEEKS:
            request = {"folder": str(scratch), "batch": TEXT_BATCH, "at": at, "num_sources": num_sources}
            rows.append(
                {"part": "seek", "sources": num_sources, "at": at}
                | server.ask(key("text", text.OURS), "seek", **request)
            )
    return rows


# ---- figures ----------------------------------------------------------------------------------------------

Costs = Mapping[str, Sequence[Cost | None]]
Rows = Sequence[Mapping[str, Any]]


def times(costs: Costs, name: str, other: str, *, workers: int = 0, clock: str = "cpu_ms") -> float | None:
    """How many times as fast one contender is as the other; None if one is missing."""
    found = [costs.get(label(each, workers)) for each in (name, other)]
    return times_as_fast(found[0], found[1], clock=clock) if found[0] and found[1] else None


def make_rows(costs: Costs) -> list[dict[str, Any]]:
    """A row for each contender and number of workers."""
    rows = []
    for name, turns in costs.items():
        contender, _, workers = name.removesuffix(" workers").rpartition(", ")
        part, _, short = contender.partition("/")
        cpu_ms, wall_ms = (median_of(turns, figure=figure) for figure in ("cpu_ms", "wall_ms"))
        ours = label(key(part, "ours"), int(workers))
        rows.append(
            {
                "part": part,
                "contender": short,
                "workers": int(workers),
                "cpu_us_a_sample": 1000 * cpu_ms if cpu_ms else None,
                "wall_us_a_sample": 1000 * wall_ms if wall_ms else None,
                "samples_a_second_a_core": 1000 / cpu_ms if cpu_ms else None,
                "by_cpu_time": times_as_fast(costs[ours], turns, clock="cpu_ms"),
                "by_the_clock": times_as_fast(costs[ours], turns, clock="wall_ms"),
            }
        )
    return rows


def picture_bars(costs: Costs, _seeks: Rows) -> list[Bar]:
    """Ours is faster than its peers, the book and the earlier commit, and not far from decoding alone."""

    def ratio(name: str, *, workers: int = 0, clock: str = "cpu_ms") -> float | None:
        return times(costs, key("pictures", pictures.OURS), key("pictures", name), workers=workers, clock=clock)

    bars = [at_least("pictures: ours / decoding alone", ratio(pictures.DECODE), 0.75)]
    for workers, clock, words in ((0, "cpu_ms", "CPU time"), (2, "wall_ms", "the clock")):
        peers = [found for name in pictures.PEERS if (found := ratio(name, workers=workers, clock=clock))]
        where = f"pictures, {workers} workers, {words}: ours /"
        bars += [
            at_least(f"{where} the best peer", min(peers, default=None), 1.4),
            at_least(f"{where} {pictures.EARLIER}", ratio(pictures.EARLIER, workers=workers, clock=clock), 1.8),
            at_least(f"{where} the book", ratio(pictures.BOOK, workers=workers, clock=clock), 5),
        ]
    return bars


def text_bars(costs: Costs, _seeks: Rows) -> list[Bar]:
    """The loader's overhead is small, and a mixture adds almost nothing."""
    ours, mixture = key("text", text.OURS), key("text", text.MIXTURE)
    return [
        at_least("text: ours / webdataset", times(costs, ours, key("text", "webdataset")), 5),
        at_least("text: ours / mosaicml-streaming", times(costs, ours, key("text", "mosaicml-streaming")), 1),
        at_least("text: a mixture of four sources / one source", times(costs, mixture, ours), 0.95),
    ]


def seek_bars(_costs: Costs, seeks: Rows) -> list[Bar]:
    """The time of a seek does not grow with the data."""
    names = {1: "one source", len(text.SOURCES): "a mixture of four"}
    slowest = {num: max(row["seconds"] for row in seeks if row["sources"] == num) for num in names}
    return [at_most(f"seconds to the first batch after a seek, {names[num]}", slowest[num], 2) for num in names]


BARS = {"pictures": picture_bars, "text": text_bars, "seek": seek_bars}


if __name__ == "__main__":
    cli.run(main, StreamingSettings, description=__doc__ or "")
