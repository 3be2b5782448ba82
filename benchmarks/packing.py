"""Packing against its peers and its ceiling, in one run.

    python benchmarks/packing.py --images ../shared/data/coco/images                    # about 20 minutes
    python benchmarks/packing.py --quick                                                # a minute, drawn pictures
    python benchmarks/packing.py --images photos --memory --quality-table --json packing.json

Contenders take turns: in each round every one packs the same slice of the pictures, and another one begins. Figures
are medians over the rounds, ratios are medians of the rounds' ratios. All make 256 x 256 JPEGs of quality 95 with
colour at full resolution, except img2dataset, whose encoder halves the colour's. Measure on a machine that does
nothing else. Peers live in an environment of their own: make bench-peers.

Exit codes: 0 measured, whether or not the bars hold; 2 something to mend, told in one line.
"""

import io
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from PIL import Image, features

import jpeg_table
from captioner import cli
from captioner.errors import UserError
from captioner.flags import Count, File, Workers
from captioner.images import loading
from measure import (
    Bar,
    Contender,
    Cost,
    at_least,
    at_most,
    describe_run,
    median_of,
    print_bars,
    print_rows,
    take_turns,
    time_here,
    times_as_fast,
    write_json,
)
from photos import draw_photos, find_photos, make_captions, repeat_photos, tile_photos, write_captions
from sharding.packing.engine import run_local
from sharding.packing.pack import Progress, pack_shard
from sharding.packing.pack_split import make_recipe
from sharding.packing.planning import ShardPlan, plan_split
from sharding.packing.sources import find_sources
from sharding.settings import ShardSettings

PACKAGES = ("pillow", "pillow-simd", "torch", "torchvision", "webdataset", "simplejpeg", "numpy")
REPOSITORY = Path(__file__).resolve().parent.parent
SIZE, QUALITY = 256, 95
SAMPLE_BYTES = 42_600  # of a stored picture and its captions, to cut the pictures into a wanted number of shards
BOOK = "the book's loop"
PILLOW = "pillow-simd" if loading.HAS_SIMD else "Pillow"
SHARD_WRITER = f"{PILLOW} + webdataset.ShardWriter"
OURS = "ours, one worker"
ONE_WORKER, TWO_WORKERS = "ours through the engine, 1 worker", "ours through the engine, 2 workers"
IMG2DATASET, IMG2DATASET_LEAN = "img2dataset", "img2dataset without hash and EXIF"
JOB = "ours: sharding/make_shards.py"


@dataclass(frozen=True, kw_only=True)
class PackingSettings:
    """What is measured, on which pictures, and how long."""

    images: File | None = None
    """Folder of photos such as COCO's; without it pictures in COCO's sizes are drawn, which compress like photos."""
    rounds: Count | None = None
    """Turns of each contender: 5, with --quick 2; of the whole jobs 3, with --quick 1, and never more than this."""
    pictures: Count | None = None
    """Pictures to pack in all rounds together: 3,000, with --quick 160. The whole jobs take twice as many."""
    workers: Workers = 2
    """Processes of the whole jobs, ours and img2dataset's."""
    peers: File | None = None
    """The Python that has img2dataset: .venv-peers/bin/python, as make bench-peers makes it."""
    quick: bool = False
    """Everything small, to see that it runs: the figures are rough."""
    memory: bool = False
    """Also watch a worker's memory over 20,000 pictures (minutes)."""
    quality_table: bool = False
    """Also tell what each JPEG quality costs in bytes, time and truth to the picture."""
    json: File | None = None
    """Write run, rows and bars to this file."""


def main(settings: PackingSettings) -> None:
    """Make the pictures, measure, and tell."""
    peers = find_peers(settings.peers)
    plain_pillow(peers)
    use_one_thread()
    with tempfile.TemporaryDirectory(prefix="packing-") as temporary:
        scratch = Path(temporary)
        rounds = settings.rounds or (2 if settings.quick else 5)
        num_pictures = settings.pictures or (160 if settings.quick else 3000)
        originals = find_photos(settings.images) if settings.images else draw_photos(scratch / "drawn", count=24)
        small = repeat_photos(scratch / "small", originals, count=max(num_pictures, rounds))
        large = tile_photos(scratch / "large", originals, count=4 if settings.quick else 36)
        run = describe_run(
            PACKAGES,
            backend=loading.backend(),
            libjpeg_turbo_of_pillow=features.version("libjpeg_turbo"),
            img2dataset=peer_version(peers) if peers else "not there (make bench-peers): no peer in the whole job",
            **describe_pictures(settings.images, originals, small, large),
            temporary_files=f"in {scratch.parent} (TMPDIR names another place)",
            mode="quick: rough figures" if settings.quick else "full",
        )
        print_rows("packing", [{"": name, "of this run": text} for name, text in run.items()])

        rows, bars = measure_steady_state("COCO", slices(small, rounds), scratch, peers=peers, scaling=small)
        more_rows, more_bars = measure_steady_state("12 MP", [Slice(paths=tuple(large))] * rounds, scratch, peers=peers)
        rows, bars = rows + more_rows, bars + more_bars
        for part in (
            measure_whole_jobs(small, peers, scratch, settings),
            measure_memory(small, scratch, settings),
            measure_quality(originals, settings),
        ):
            rows, bars = rows + part[0], bars + part[1]
    print_bars(bars)
    if settings.json:
        write_json(settings.json, run=run, rows=rows, bars=bars)


def use_one_thread() -> None:
    """One thread of torch, as in our workers: CPU time is compared, a core at a time."""
    if loading.backend() == "native":
        import torch

        torch.set_num_threads(1)


def describe_pictures(
    folder: Path | None, originals: Sequence[Path], small: Sequence[Path], large: Sequence[Path]
) -> dict[str, str]:
    """Where the pictures come from, how many they are, and how large."""
    source = f"from {folder}" if folder else "DRAWN for want of --images: not comparable with photos"
    return {
        "COCO": f"{len(originals)} pictures {source}, repeated to {len(small):,}; {mean_kilobytes(small):.0f} kB each",
        "12 MP": f"{len(large)} JPEGs tiled from them, 4:2:0 quality 92; {mean_kilobytes(large):,.0f} kB each",
    }


def mean_kilobytes(paths: Sequence[Path]) -> float:
    """Mean file size."""
    return sum(path.stat().st_size for path in paths) / len(paths) / 1000


# ---- what is packed ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Slice:
    """The pictures of one turn."""

    paths: tuple[Path, ...]


def slices(paths: Sequence[Path], rounds: int) -> list[Slice]:
    """The pictures cut into equal parts, one a round."""
    length = len(paths) // rounds
    return [Slice(paths=tuple(paths[first : first + length])) for first in range(0, length * rounds, length)]


def make_plans(paths: Sequence[Path], scratch: Path, *, shards: int) -> list[ShardPlan]:
    """The packing command's own plan for these pictures, in about so many shards."""
    captions = str(write_captions(paths, scratch / "slice.jsonl"))
    folder = str(paths[0].parent)
    (source,) = find_sources(images=folder, captions=captions, split="train")
    settings = ShardSettings(
        images=folder, captions=captions, split="train", shard_megabytes=shard_megabytes(len(paths), shards=shards)
    )
    return plan_split(source, make_recipe(settings))[0]


def shard_megabytes(num_pictures: int, *, shards: int) -> int:
    """The --shard-megabytes that cuts the pictures into about so many shards; 64, the default, for 6,000 into 4."""
    return math.ceil(num_pictures * SAMPLE_BYTES / shards / 1e6)


# ---- contenders in one process ----------------------------------------------------------------------------


def like_the_book(parts: Sequence[Slice], scratch: Path, python: Path) -> Contender:
    """The book's loop, in a process of its own: where pillow-simd is in Pillow's place, the peers' Python runs it."""

    def turn(number: int) -> Cost:
        paths = parts[number].paths
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            command = [python, Path(__file__).with_name("book.py"), folder]
            done = subprocess.run(
                command, input="\n".join(map(str, paths)), capture_output=True, text=True, check=False
            )
        if done.returncode:
            raise UserError(f"{python} book.py failed ({done.stderr[-300:]}): make bench-peers brings it Pillow")
        return Cost(items=len(paths), **json.loads(done.stdout))

    return turn


def plain_pillow(peers: Path | None) -> Path:
    """The Python with the book's own Pillow. Raises UserError where only pillow-simd is there."""
    if not loading.HAS_SIMD:
        return Path(sys.executable)
    if peers is None:
        raise UserError("the book's loop needs plain Pillow, and here is pillow-simd: make bench-peers brings Pillow")
    return peers


def pack_with_shard_writer(part: Slice, folder: Path) -> None:
    """What most would write today: Pillow's pictures and JSON into webdataset's writer."""
    from webdataset import ShardWriter

    with ShardWriter(str(folder / "%06d.tar"), maxsize=64e6, verbose=0) as writer:
        for number, path in enumerate(part.paths):
            buffer = io.BytesIO()
            with path.open("rb") as file, Image.open(file) as image:
                small = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
                small.save(buffer, "JPEG", quality=QUALITY, subsampling=0)
            content = {"file_name": path.name, "captions": make_captions(number)}
            writer.write({"__key__": f"{number:09d}", "jpg": buffer.getvalue(), "json": content})


def in_this_process(action: Callable[[Slice, Path], None], parts: Sequence[Slice], scratch: Path) -> Contender:
    """A contender that packs its round's slice into an empty folder."""

    def turn(number: int) -> Cost:
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            return time_here(len(parts[number].paths), partial(action, parts[number], Path(folder)))

    return turn


def ours_in_this_process(parts: Sequence[Slice], scratch: Path) -> Contender:
    """Real plans, really written; the plan itself is made before the clock starts."""

    def turn(number: int) -> Cost:
        plans = make_plans(parts[number].paths, scratch, shards=1)
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            return time_here(len(parts[number].paths), lambda: [pack_shard(plan, folder) for plan in plans])

    return turn


# ---- the ceiling: bytes in memory to bytes in memory ------------------------------------------------------


def convert_with_pillow(data: bytes) -> bytes:
    """Pillow, or pillow-simd in its place."""
    return loading.encode_jpeg(
        open_drafted(data).convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS), quality=QUALITY
    )


def convert_natively(data: bytes) -> bytes:
    """torchvision's decoder (Pillow's where a reduced scale will do) and torch's resize; Pillow's encoder."""
    import numpy as np
    import torch
    from torchvision.io import ImageReadMode

    image = Image.open(io.BytesIO(data))
    full_size = image.size
    draft(image)
    if image.size == full_size:
        content = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        pixels_3HW = torch.ops.image.decode_jpeg(content, ImageReadMode.RGB.value, False)
    else:
        pixels_3HW = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    return loading.encode_jpeg(to_picture(resize_natively(pixels_3HW)), quality=QUALITY)


def convert_with_simplejpeg(data: bytes) -> bytes:
    """libjpeg-turbo's own interface both ways, and torch's resize between, or Pillow's where torch has none."""
    import numpy as np
    import simplejpeg  # type: ignore

    side = math.ceil(loading.DRAFT_SCALE * SIZE)
    pixels_HW3 = simplejpeg.decode_jpeg(data, "RGB", min_width=side, min_height=side, min_factor=1)
    if loading.backend() == "native":
        import torch

        small = resize_natively(torch.from_numpy(pixels_HW3).permute(2, 0, 1)).permute(1, 2, 0).contiguous().numpy()
    else:
        small = np.asarray(Image.fromarray(pixels_HW3).resize((SIZE, SIZE), Image.Resampling.LANCZOS))
    return simplejpeg.encode_jpeg(small, quality=QUALITY, colorspace="RGB", colorsubsampling="444")


def open_drafted(data: bytes) -> Image.Image:
    """The picture, to be decoded at the reduced scale that ours allows."""
    image = Image.open(io.BytesIO(data))
    draft(image)
    return image


def draft(image: Image.Image) -> None:
    """Let a JPEG be decoded at a reduced scale while that is large enough for the wanted quality."""
    side = math.ceil(loading.DRAFT_SCALE * SIZE)
    image.draft("RGB", (side, side))


def resize_natively(pixels_3HW: Any) -> Any:
    """(3, H, W) bytes to (3, SIZE, SIZE)."""
    from torch.nn.functional import interpolate

    return interpolate(pixels_3HW[None], size=(SIZE, SIZE), mode="lanczos", antialias=True)[0]


def to_picture(pixels_3HW: Any) -> Image.Image:
    """A Pillow picture of (3, H, W) bytes, the quicker way: by bands."""
    bands = pixels_3HW.contiguous().numpy()
    return Image.merge("RGB", [Image.frombuffer("L", (SIZE, SIZE), band, "raw", "L", 0, 1) for band in bands])


def ceilings() -> dict[str, Callable[[bytes], bytes]]:
    """What is installed here, by name."""
    found: dict[str, Callable[[bytes], bytes]] = {f"ceiling: {PILLOW}": convert_with_pillow}
    if loading._has_native_lanczos():
        found["ceiling: native (torchvision, torch)"] = convert_natively
    if find_spec("simplejpeg"):
        found["ceiling: simplejpeg"] = convert_with_simplejpeg
    return found


def in_memory(convert: Callable[[bytes], bytes], parts: Sequence[Slice]) -> Contender:
    """A contender whose pictures were read before the clock starts, and that writes nothing."""

    def turn(number: int) -> Cost:
        contents = [path.read_bytes() for path in parts[number].paths]
        return time_here(len(contents), lambda: [convert(data) for data in contents])

    return turn


# ---- the engine -------------------------------------------------------------------------------------------


def through_the_engine(paths: Sequence[Path], scratch: Path, *, workers: int) -> Contender:
    """All pictures in each round, by so many workers; only the time in which all of them were busy counts."""

    def turn(number: int) -> Cost | None:
        plans = make_plans(paths, scratch, shards=8)
        heard: list[tuple[float, Progress]] = []
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            for _ in run_local(
                plans, folder, workers=workers, report=lambda now: heard.append((time.perf_counter(), now))
            ):
                pass
        return steady_cost(heard, {plan.name: len(plan.records) for plan in plans}, workers=workers)

    return turn


def steady_cost(heard: Sequence[tuple[float, Progress]], lengths: dict[str, int], *, workers: int) -> Cost | None:
    """The time a picture, from the moment at which every worker had told of its progress to that at which the first
    one found no further shard. Start-up (processes, importing torch) and the last stragglers lie outside.

    None where the pictures were too few for such a time.
    """
    done: dict[str, int] = {}
    start: tuple[float, int] | None = None
    for seconds, progress in heard:
        done[progress.shard] = progress.images
        pictures = sum(done.values())
        if start is None and len(done) >= workers:
            start = seconds, pictures
        num_finished = sum(done.get(name) == length for name, length in lengths.items())
        if start and num_finished > len(lengths) - workers:
            packed = pictures - start[1]
            return Cost(items=packed, wall_seconds=seconds - start[0]) if packed else None
    return None


# ---- steady state -----------------------------------------------------------------------------------------


def measure_steady_state(
    name: str, parts: Sequence[Slice], scratch: Path, *, peers: Path | None, scaling: Sequence[Path] = ()
) -> tuple[list[dict[str, Any]], list[Bar]]:
    """All contenders of one process on one kind of pictures, and the engine where there are pictures for `scaling`."""
    contenders = make_contenders(parts, scratch, peers)
    for warm_up in make_contenders([Slice(paths=parts[0].paths[:2])], scratch, peers).values():
        warm_up(0)
    if scaling:
        contenders[ONE_WORKER] = through_the_engine(scaling, scratch, workers=1)
        contenders[TWO_WORKERS] = through_the_engine(scaling, scratch, workers=2)
    cli.console.print(f"{name}: {len(parts[0].paths)} pictures a turn", style="dim")
    costs = take_turns(contenders, rounds=len(parts))
    best = min(ceilings(), key=lambda ceiling: median_of(costs[ceiling], figure="cpu_ms") or math.inf)
    rows = []
    for contender, turns in costs.items():
        cpu_ms, wall_ms = (median_of(turns, figure=clock) for clock in ("cpu_ms", "wall_ms"))
        rows.append(
            {
                "pictures": name,
                "contender": contender + (" (the best)" if contender == best else ""),
                "cpu_ms_a_picture": cpu_ms,
                "wall_ms_a_picture": wall_ms,
                "pictures_a_cpu_second": 1000 / cpu_ms if cpu_ms else None,
                "times_the_book": times_as_fast(turns, costs[BOOK], clock="cpu_ms"),
                "of_the_ceiling": times_as_fast(turns, costs[best], clock="cpu_ms"),
            }
        )
    print_rows(f"{name}, steady state: medians of {len(parts)} rounds, ratios by CPU time", rows)
    return [{"table": "steady state", **row} for row in rows], steady_bars(name, costs, best, scaling=bool(scaling))


def make_contenders(parts: Sequence[Slice], scratch: Path, peers: Path | None) -> dict[str, Contender]:
    """All contenders of one process, by name."""
    return {
        BOOK: like_the_book(parts, scratch, plain_pillow(peers)),
        SHARD_WRITER: in_this_process(pack_with_shard_writer, parts, scratch),
        OURS: ours_in_this_process(parts, scratch),
        **{name: in_memory(convert, parts) for name, convert in ceilings().items()},
    }


def steady_bars(name: str, costs: dict[str, list[Cost | None]], best: str, *, scaling: bool) -> list[Bar]:
    """What one worker, and a second one, must reach."""
    times_the_book = times_as_fast(costs[OURS], costs[BOOK], clock="cpu_ms")
    bars = [
        at_least(f"{name}, ours / the ceiling (CPU)", times_as_fast(costs[OURS], costs[best], clock="cpu_ms"), 0.90),
        at_least(f"{name}, ours / {BOOK} (CPU)", times_the_book, 1.8 if name == "COCO" else 2.8),
    ]
    if scaling:
        speed_up = times_as_fast(costs[TWO_WORKERS], costs[ONE_WORKER], clock="wall_ms")
        bars.append(at_least(f"{name}, 2 workers / 1 worker (wall)", speed_up, 1.85))
    return bars


# ---- the whole job, start-up included ---------------------------------------------------------------------


def find_peers(wanted: Path | None) -> Path | None:
    """The peers' Python, or None where `make bench-peers` has not been run. Raises UserError for a wrong --peers."""
    python = wanted or REPOSITORY / ".venv-peers/bin/python"
    if python.with_name("img2dataset").is_file():
        return python.absolute()
    if wanted:
        raise UserError(f"--peers {wanted} has no img2dataset beside it: make bench-peers, and name its bin/python")
    return None


def peer_version(peers: Path) -> str:
    """img2dataset's version."""
    code = "from importlib.metadata import version; print(version('img2dataset'))"
    return subprocess.check_output([peers, "-c", code], text=True).strip()


def measure_whole_jobs(
    small: Sequence[Path], peers: Path | None, scratch: Path, settings: PackingSettings
) -> tuple[list[dict[str, Any]], list[Bar]]:
    """The packing command against img2dataset's, from the shell's point of view."""
    name = f"whole job, ours / {IMG2DATASET} with as many processes (wall)"
    if peers is None and settings.quick:
        cli.console.print("whole job: left out, there is no peer and --quick is given")
        return [], [at_least(name, None, 1.7)]
    paths = repeat_photos(scratch / "job", small, count=2 * len(small))
    contenders: dict[str, Contender] = {JOB: our_job(paths, scratch, workers=settings.workers)}
    if peers:
        contenders[IMG2DATASET] = peers_job(paths, scratch, peers, workers=settings.workers)
    if peers and not settings.quick:
        lean = {"compute_hash": None, "extract_exif": False}
        contenders[IMG2DATASET_LEAN] = peers_job(paths, scratch, peers, workers=settings.workers, **lean)
    rounds = min(settings.rounds or 3, 1 if settings.quick else 3)
    cli.console.print(f"whole job: {len(paths):,} pictures a turn, {settings.workers} processes", style="dim")
    costs = take_turns(contenders, rounds=rounds)
    rows = [
        {
            "contender": contender,
            "pictures": len(paths),
            "processes": settings.workers,
            "wall_seconds": median_of(turns, figure="wall_seconds"),
            "cpu_seconds": median_of(turns, figure="cpu_seconds"),
            "ours_times_as_fast": times_as_fast(costs[JOB], turns, clock="wall_ms"),
            "ours_times_as_fast_by_cpu": times_as_fast(costs[JOB], turns, clock="cpu_ms"),
        }
        for contender, turns in costs.items()
    ]
    print_rows(f"whole job, start-up included: medians of {rounds} rounds", rows)
    ratio = times_as_fast(costs[JOB], costs[IMG2DATASET], clock="wall_ms") if peers else None
    return [{"table": "whole job", **row} for row in rows], [at_least(name, ratio, 1.7)]


def our_job(paths: Sequence[Path], scratch: Path, *, workers: int) -> Contender:
    """`python sharding/make_shards.py` with a caption file."""
    captions = write_captions(paths, scratch / "job.jsonl")

    def turn(number: int) -> Cost:
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            flags = {
                "images": paths[0].parent,
                "captions": captions,
                "split": "train",
                "output": folder,
                "workers": workers,
                "shard-megabytes": shard_megabytes(len(paths), shards=2 * workers),
            }
            given = [text for flag, value in flags.items() for text in (f"--{flag}", str(value))]
            cost = run_timed([sys.executable, REPOSITORY / "sharding/make_shards.py", *given], scratch, len(paths))
            num_packed = json.loads((Path(folder) / "train.manifest.json").read_text())["totals"]["samples"]
            return check_complete(cost, num_packed)

    return turn


def peers_job(paths: Sequence[Path], scratch: Path, peers: Path, *, workers: int, **changed: bool | None) -> Contender:
    """img2dataset with one caption a picture and its defaults, save what makes the work the same as ours.

    It has no squash: `center_crop` also ends at 256 x 256 pixels. The pictures are file:// addresses.
    """
    rows = [{"url": path.as_uri(), "caption": make_captions(number)[0]} for number, path in enumerate(paths)]
    listing = scratch / "peers.jsonl"
    listing.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def turn(number: int) -> Cost:
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            flags = {
                "url_list": listing,
                "input_format": "jsonl",
                "url_col": "url",
                "caption_col": "caption",
                "output_format": "webdataset",
                "output_folder": f"{folder}/shards",
                "processes_count": workers,
                "number_sample_per_shard": math.ceil(len(paths) / (2 * workers)),
                "image_size": SIZE,
                "resize_mode": "center_crop",
                "encode_quality": QUALITY,
                **changed,
            }
            given = [f"--{flag}={value}" for flag, value in flags.items()]
            cost = run_timed([peers.with_name("img2dataset"), *given], scratch, len(paths))
            stats = [json.loads(file.read_text()) for file in Path(folder, "shards").glob("*_stats.json")]
            return check_complete(cost, sum(stat["successes"] for stat in stats))

    return turn


def run_timed(command: Sequence[str | Path], scratch: Path, items: int) -> Cost:
    """What a command and all its processes took. Raises UserError when it fails."""
    result, log = scratch / "timed.json", scratch / "timed.log"
    quiet = {"NO_ALBUMENTATIONS_UPDATE": "1"}  # img2dataset's library would ask the network for its newest version
    with log.open("w") as output:
        done = subprocess.run(
            [sys.executable, Path(__file__).with_name("timed.py"), result, *command],
            env=os.environ | quiet,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode:
        raise UserError(f"{Path(command[0]).name} {command[1]} failed ({done.returncode}): {log.read_text()[-600:]}")
    return Cost(items=items, **json.loads(result.read_text()))


def check_complete(cost: Cost, num_packed: int) -> Cost:
    """The cost, of a job that packed every picture. Raises UserError."""
    if num_packed != cost.items:
        raise UserError(f"only {num_packed:,} of {cost.items:,} pictures were packed: the job's time means nothing")
    return cost


# ---- memory -----------------------------------------------------------------------------------------------


def measure_memory(
    small: Sequence[Path], scratch: Path, settings: PackingSettings
) -> tuple[list[dict[str, Any]], list[Bar]]:
    """A worker's memory over many shards: the highest in each quarter of its pictures."""
    name = "memory, a worker's highest in its last quarter / in its first"
    if not settings.memory:
        return [], [at_most(name, None, 1.05)]
    if not Path("/proc/self/statm").exists():
        raise UserError("--memory reads /proc, which this system does not have: leave it out")
    num_pictures = 400 if settings.quick else 20_000
    paths = repeat_photos(scratch / "memory", small, count=num_pictures)
    plans = make_plans(paths, scratch, shards=16)
    with (
        tempfile.TemporaryDirectory(dir=scratch) as folder,
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool,
    ):
        quarters = pool.submit(watch_memory, plans, folder, num_pictures).result()
    row = {f"MB_up_to_{25 * number}_%": megabytes for number, megabytes in enumerate(quarters, start=1)}
    print_rows(f"memory: one worker, {num_pictures:,} pictures in {len(plans)} shards, highest RSS", [row])
    return [{"table": "memory", "pictures": num_pictures, **row}], [at_most(name, quarters[3] / quarters[0], 1.05)]


def watch_memory(plans: Sequence[ShardPlan], folder: str, num_pictures: int) -> list[float]:
    """Pack all shards in this process; the highest resident memory in each quarter of the pictures, in MB."""
    use_one_thread()
    quarters = [0.0] * 4
    packed = 0

    def note(now: Progress) -> None:
        quarter = min(3, 4 * (packed + now.images - 1) // num_pictures)
        quarters[quarter] = max(quarters[quarter], resident_megabytes())

    for plan in plans:
        pack_shard(plan, folder, report=note)
        packed += len(plan.records)
    return quarters


def resident_megabytes() -> float:
    """This process' memory that is not swapped out."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6


# ---- JPEG qualities ---------------------------------------------------------------------------------------


def measure_quality(originals: Sequence[Path], settings: PackingSettings) -> tuple[list[dict[str, Any]], list[Bar]]:
    """What the stored JPEG's quality costs."""
    if not settings.quality_table:
        return [], []
    rows = jpeg_table.measure(originals[: 8 if settings.quick else 500], rounds=1 if settings.quick else 5)
    print_rows(f"stored JPEGs of {min(len(originals), 500)} pictures, {SIZE} x {SIZE}", rows)
    return [{"table": "quality", **row} for row in rows], []


def run() -> None:
    """The entry."""
    cli.run(main, PackingSettings, description=__doc__ or "")


if __name__ == "__main__":
    run()
