"""Packing against its peers and its ceiling, in one run.

    python benchmarks/packing.py --images ../shared/data/coco/images                    # about 20 minutes
    python benchmarks/packing.py --quick                                                # a minute, drawn images
    python benchmarks/packing.py --images photos --memory --quality-table --json packing.json

Contenders take turns: in each round all pack the same slice of the images, and each round starts with the next one.
Figures are medians over the rounds, ratios are medians of the rounds' ratios. All make 256 x 256 JPEGs of quality 90
with 4:2:0 chroma subsampling. Measure on an idle machine. Peers have their own environment: make bench-peers.

Exit codes: 0 measured, whether or not the bars hold; 2 an error that you can fix, in one line.
"""

import math
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from PIL import features

from captioner import cli
from captioner.errors import UserError
from captioner.flags import Count, File, Workers
from captioner.images import loading
from contenders.packing import (
    BOOK,
    IMG2DATASET,
    IMG2DATASET_LEAN,
    JOB,
    OURS,
    SHARD_WRITER,
    Photos,
    ceilings,
    encode_as_today,
    in_memory,
    in_this_process,
    like_the_book,
    make_plans,
    our_job,
    ours_in_this_process,
    pack_with_shard_writer,
    peers_job,
    slices,
    through_the_engine,
    use_one_thread,
    without_start_up,
)
from contenders.pictures import EARLIER
from contenders.text import resident_megabytes
from measuring import jpeg_table
from measuring.commands import REPOSITORY, check_out, find_peers, plain_pillow
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
from measuring.photos import SIZE, find_or_draw, repeat_photos, tile_photos
from measuring.settings import ImageBenchmarkSettings
from sharding.packing.pack import ShardProgress, pack_shard
from sharding.packing.planning import ShardPlan

PACKAGES = ("pillow", "pillow-simd", "torch", "torchvision", "webdataset", "simplejpeg", "numpy")
NOW = "now"
EARLIER_PARTS = 5  # start-up is measured with a fifth of the images
ONE_WORKER, TWO_WORKERS = "ours through the engine, 1 worker", "ours through the engine, 2 workers"


@dataclass(frozen=True, kw_only=True)
class PackingSettings(ImageBenchmarkSettings):
    """What is measured, on which images, and how often."""

    rounds: Count | None = None
    """Turns of each contender: 5, with --quick 2. Whole jobs have at most 3, with --quick 1."""
    pictures: Count | None = None
    """Images packed in all rounds together: 3,000, with --quick 160. Whole jobs pack twice as many."""
    workers: Workers = 2
    """Processes of the whole jobs, ours and img2dataset's."""
    peers: File | None = None
    """The Python that has img2dataset: .venv-peers/bin/python, as make bench-peers makes it."""
    memory: bool = False
    """Also measure a worker's memory over 20,000 images (minutes)."""
    quality_table: bool = False
    """Also measure bytes, time and accuracy of each JPEG quality."""


def main(settings: PackingSettings) -> None:
    """Prepare the images, measure, and report."""
    peers = find_peers(settings.peers)
    plain_pillow(peers)
    use_one_thread()
    with tempfile.TemporaryDirectory(prefix="packing-") as temporary:
        scratch = Path(temporary)
        rounds = settings.rounds or (2 if settings.quick else 5)
        num_pictures = settings.pictures or (160 if settings.quick else 3000)
        originals = find_or_draw(settings.images, scratch)
        small = repeat_photos(scratch / "small", originals, count=max(num_pictures, rounds))
        large = tile_photos(scratch / "large", originals, count=4 if settings.quick else 36)
        run = describe_run(
            PACKAGES,
            backend=loading.backend(),
            libjpeg_turbo_of_pillow=features.version("libjpeg_turbo"),
            img2dataset=peer_version(peers) if peers else "not installed (make bench-peers): the whole job has no peer",
            **describe_pictures(settings.images, originals, small, large),
            temporary_files=f"in {scratch.parent} (set TMPDIR to change)",
            mode="quick: rough figures" if settings.quick else "full",
        )
        print_run("packing", run)

        rows, bars = measure_steady_state("COCO", slices(small, rounds), scratch, peers=peers, scaling=small)
        more_rows, more_bars = measure_steady_state("12 MP", [large] * rounds, scratch, peers=peers)
        rows, bars = rows + more_rows, bars + more_bars
        for part in (
            measure_earlier(small, scratch, rounds=rounds),
            measure_whole_jobs(small, peers, scratch, settings),
            measure_memory(small, scratch, settings),
            measure_quality(originals, settings),
        ):
            rows, bars = rows + part[0], bars + part[1]
    finish(bars, json=settings.json, run=run, rows=rows)


def describe_pictures(folder: Path | None, originals: Photos, small: Photos, large: Photos) -> dict[str, str]:
    """Source, number and size of the images."""
    source = f"from {folder}" if folder else "DRAWN, without --images: not comparable with photos"
    return {
        "COCO": f"{len(originals)} pictures {source}, repeated to {len(small):,}; {mean_kilobytes(small):.0f} kB each",
        "12 MP": f"{len(large)} JPEGs tiled from them, 4:2:0 quality 92; {mean_kilobytes(large):,.0f} kB each",
    }


def mean_kilobytes(paths: Photos) -> float:
    """Mean file size."""
    return sum(path.stat().st_size for path in paths) / len(paths) / 1000


# ---- steady state -----------------------------------------------------------------------------------------


def measure_steady_state(
    name: str, parts: Sequence[Photos], scratch: Path, *, peers: Path | None, scaling: Photos = ()
) -> tuple[list[dict[str, Any]], list[Bar]]:
    """Measure all in-process contenders on one kind of images, and the engine on `scaling` if given."""
    contenders = make_contenders(parts, scratch, peers)
    for warm_up in make_contenders([parts[0][:2]], scratch, peers).values():
        warm_up(0)
    if scaling:
        contenders[ONE_WORKER] = through_the_engine(scaling, scratch, workers=1)
        contenders[TWO_WORKERS] = through_the_engine(scaling, scratch, workers=2)
    cli.console.print(f"{name}: {len(parts[0])} pictures a turn", style="dim")
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


def make_contenders(parts: Sequence[Photos], scratch: Path, peers: Path | None) -> dict[str, Contender]:
    """All in-process contenders, by name."""
    return {
        BOOK: like_the_book(parts, scratch, plain_pillow(peers)),
        SHARD_WRITER: in_this_process(pack_with_shard_writer, parts, scratch),
        OURS: ours_in_this_process(parts, scratch),
        **{name: in_memory(convert, parts) for name, convert in ceilings().items()},
    }


def steady_bars(name: str, costs: dict[str, list[Cost | None]], best: str, *, scaling: bool) -> list[Bar]:
    """The bars of one worker, and of a second one."""
    times_the_book = times_as_fast(costs[OURS], costs[BOOK], clock="cpu_ms")
    bars = [
        at_least(f"{name}, ours / the ceiling (CPU)", times_as_fast(costs[OURS], costs[best], clock="cpu_ms"), 0.95),
        at_least(f"{name}, ours / {BOOK} (CPU)", times_the_book, 1.9 if name == "COCO" else 4),
    ]
    if scaling:
        speed_up = times_as_fast(costs[TWO_WORKERS], costs[ONE_WORKER], clock="wall_ms")
        bars.append(at_least(f"{name}, 2 workers / 1 worker (wall)", speed_up, 1.85))
    return bars


def measure_earlier(small: Photos, scratch: Path, *, rounds: int) -> tuple[list[dict[str, Any]], list[Bar]]:
    """Compare a worker with one of commit EARLIER, at the same quality and subsampling."""
    name = f"COCO, a worker of ours / of {EARLIER} (CPU)"
    code = check_out(EARLIER, scratch / "earlier")
    if code is None:
        return [], [at_least(name, None, 1.15)]
    encode_as_today(code)
    few, many = (
        repeat_photos(scratch / f"earlier-{part}", small, count=len(small) // part) for part in (EARLIER_PARTS, 1)
    )
    costs = take_turns(
        {
            words: without_start_up(*(our_job(paths, scratch, workers=1, code=each) for paths in (few, many)))
            for words, each in ((NOW, REPOSITORY), (EARLIER, code))
        },
        rounds=rounds,
    )
    rows = [
        {"contender": words, "cpu_ms_a_picture": median_of(turns, figure="cpu_ms")} for words, turns in costs.items()
    ]
    print_rows(f"one worker of make_shards.py, without start-up: medians of {rounds} rounds", rows)
    ratio = times_as_fast(costs[NOW], costs[EARLIER], clock="cpu_ms")
    return [{"table": "earlier", **row} for row in rows], [at_least(name, ratio, 1.15)]


# ---- the whole job, start-up included ---------------------------------------------------------------------


def peer_version(peers: Path) -> str:
    """img2dataset's version."""
    code = "from importlib.metadata import version; print(version('img2dataset'))"
    return subprocess.check_output([peers, "-c", code], text=True).strip()


def measure_whole_jobs(
    small: Photos, peers: Path | None, scratch: Path, settings: PackingSettings
) -> tuple[list[dict[str, Any]], list[Bar]]:
    """Compare the packing command with img2dataset's, start-up included."""
    name = f"whole job, ours / {IMG2DATASET} with as many processes (wall)"
    if peers is None and settings.quick:
        cli.console.print("whole job: left out, because there is no peer and --quick is given")
        return [], [at_least(name, None, 1.75)]
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
    return [{"table": "whole job", **row} for row in rows], [at_least(name, ratio, 1.75)]


# ---- memory -----------------------------------------------------------------------------------------------


def measure_memory(small: Photos, scratch: Path, settings: PackingSettings) -> tuple[list[dict[str, Any]], list[Bar]]:
    """A worker's memory over many shards: the maximum in each quarter of its images."""
    name = "memory, a worker's highest in its last quarter / in its first"
    if not settings.memory:
        return [], [at_most(name, None, 1.05)]
    if not Path("/proc/self/statm").exists():
        raise UserError("--memory reads /proc, which this system lacks: leave the flag out")
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
    """Pack all shards in this process; the maximum resident memory in each quarter of the images, in MB."""
    use_one_thread()
    quarters = [0.0] * 4
    packed = 0

    def note(now: ShardProgress) -> None:
        quarter = min(3, 4 * (packed + now.images - 1) // num_pictures)
        quarters[quarter] = max(quarters[quarter], resident_megabytes() or 0.0)

    for plan in plans:
        pack_shard(plan, folder, report=note)
        packed += len(plan.records)
    return quarters


# ---- JPEG qualities ---------------------------------------------------------------------------------------


def measure_quality(originals: Photos, settings: PackingSettings) -> tuple[list[dict[str, Any]], list[Bar]]:
    """Measure what the stored JPEG's quality costs."""
    if not settings.quality_table:
        return [], []
    rows = jpeg_table.measure(originals[: 8 if settings.quick else 500], rounds=1 if settings.quick else 5)
    print_rows(f"stored JPEGs of {min(len(originals), 500)} pictures, {SIZE} x {SIZE}", rows)
    return [{"table": "quality", **row} for row in rows], []


if __name__ == "__main__":
    cli.run(main, PackingSettings, description=__doc__ or "")
