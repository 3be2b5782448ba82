"""How costs grow: manifest, plan, bytes, start-up and packing from small to large; more GPUs on paper.

    python benchmarks/scaling.py --images PHOTOS --json scaling.json
    python benchmarks/scaling.py --quick --parts plan           # to see that it runs

`plan`: read synthetic manifests of 10^3 to 10^9 samples, plan an epoch, and seek. `bytes`: what nginx sends to each of
W ranks in an epoch, each with its own cache, and what the plan says for more ranks. `cache`: reserving space for one
more shard in a full cache, by the number of shards kept. `start`: from opening a split to the first batch. `packing`:
its serial part, and the whole command with 1 and 2 workers. `doctor`: train/doctor.py on 256 x 256 images, and what
hundreds of GPUs would need by its figures: see docs/scaling.md.

Memory is measured in fresh processes. Seconds are CPU time, the minimum of the rounds, unless they say wall: other
programs disturb that little. `bytes`, `start` and `doctor` need nginx and the environment of make check.

Exit codes: 0 measured, whether or not the bars hold; 2 an error that you can fix, in one line.
"""

import json
import math
import multiprocessing
import os
import pickle
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from captioner import cli
from captioner.errors import UserError
from captioner.flags import Count, File
from captioner.shards.format import Manifest, ShardEntry, read_manifest
from measuring.commands import REPOSITORY, import_servers, packing_command, run_timed, shard_megabytes
from measuring.figures import (
    Bar,
    at_most,
    describe_run,
    finish,
    median_of,
    print_rows,
    take_turns,
    time_here,
)
from measuring.photos import draw_photo, find_or_draw, find_photos, repeat_photos, write_captions, write_data

Part = Literal["plan", "bytes", "cache", "start", "packing", "doctor"]
Row = dict[str, Any]
SHARD_SAMPLES, SHARD_BYTES = 2_560, 64_000_000
SEEK_POSITIONS = 1_024
TINY_BATCH = 32
SHARD_WORDS = 6_000  # different words in a shard's captions
PARTS: tuple[Part, ...] = ("plan", "bytes", "cache", "start", "packing", "doctor")


@dataclass(frozen=True, kw_only=True)
class ScalingSettings:
    """What is measured, and how often."""

    images: File | None = None
    """Folder of photos such as COCO's, for packing and doctor; without it, similar images are drawn."""
    parts: tuple[Part, ...] = PARTS
    """What to measure."""
    rounds: Count | None = None
    """Rounds of each measurement: 3, with --quick 1."""
    quick: bool = False
    """Everything small, only to see that it runs."""
    json: File | None = None
    """Write run, rows and bars to this file, and a plot of the bars beside it (.svg)."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """A part's folder, and how much it measures."""

    folder: Path
    rounds: int
    quick: bool
    images: Path | None


def fresh(work: Callable[..., Row], *arguments: Any, method: str = "spawn", rounds: int = 1) -> Row:
    """The minimum of each figure that `work` returns in fresh processes."""
    found = []
    for _ in range(rounds):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(method)) as pool:
            found.append(pool.submit(work, *arguments).result())
    return {name: min(row[name] for row in found) for name in found[0]}


def peak_megabytes() -> float:
    """This process's peak resident memory so far."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1000  # type: ignore[index]


class Laps:
    """CPU seconds of this process since the last lap, and memory since the first."""

    def __init__(self) -> None:
        self._megabytes, self._then = peak_megabytes(), time.process_time()

    def lap(self) -> float:
        """CPU seconds since the last lap."""
        before, self._then = self._then, time.process_time()
        return self._then - before

    @property
    def megabytes(self) -> float:
        """Growth of the peak memory."""
        return peak_megabytes() - self._megabytes


# ---- manifest and plan ------------------------------------------------------------------------------------


def measure_plans(work: Work) -> tuple[list[Row], list[Bar]]:
    """Measure manifest and plan by the number of samples, for rank 0 of 1 and of 1,000."""
    rows = []
    for power in (3, 6) if work.quick else range(3, 10):
        folder = work.folder / str(power)
        folder.mkdir()
        written = fresh(write_synthetic, folder, 10**power)
        size = (folder / "train.manifest.json").stat().st_size
        for world_size in (1, 1_000):
            if world_size * SEEK_POSITIONS <= 10**power or world_size == 1:
                figures = fresh(plan_alone, folder, world_size, rounds=work.rounds)
                row = {"samples": 10**power, "ranks": world_size, "manifest_megabytes": size / 1e6}
                rows.append(row | written | figures)
    print_rows("manifest and plan: seconds and memory above that of imports", rows)
    first, last = next(row for row in rows if row["samples"] == 10**6), rows[-1]
    alone = next(row for row in rows if row["samples"] == last["samples"])
    times, words = last["samples"] / 10**6, f"{last['samples']:,} / 10^6 samples"
    size = last["manifest_megabytes"] / first["manifest_megabytes"] / times
    return rows, [
        at_most(f"manifest's bytes a sample, {words}", size, 1.1),
        at_most(f"a seek of the only rank, {words}", alone["seek_ms"] / first["seek_ms"], 2.0),
    ]


def write_synthetic(folder: Path, num_samples: int) -> Row:
    """Write a manifest of `num_samples` samples in shards of the usual size; returns the cost of writing."""
    laps = Laps()
    num_shards = -(-num_samples // SHARD_SAMPLES)
    sizes = np.random.default_rng(0).multinomial(num_samples, [1 / num_shards] * num_shards).tolist()
    entries = tuple(
        ShardEntry(
            name=f"train-{number:06d}", samples=size, captions=5 * size, failures=0, bytes=SHARD_BYTES,
            sha256=f"{number:064x}", fingerprint=f"{number:064x}",
        )
        for number, size in enumerate(sizes)
    )  # fmt: skip
    manifest = Manifest(split="train", shards=entries, settings={}, source={}, failures={}, fingerprint="")
    laps.lap()
    (folder / "train.manifest.json").write_text(manifest.to_json())
    return {"write_seconds": laps.lap(), "write_megabytes": laps.megabytes}


def plan_alone(folder: Path, world_size: int) -> Row:
    """Read a manifest, plan an epoch and seek to its middle, as rank 0."""
    from captioner.streaming.dataset import read_split
    from captioner.streaming.order import ShardOrder, rank_positions

    laps = Laps()
    split = read_split([str(folder)], "train", remedy="")
    row = {"read_seconds": laps.lap(), "read_megabytes": laps.megabytes}
    assert split.fingerprint
    row["fingerprint_seconds"] = laps.lap()
    batch = SEEK_POSITIONS * world_size
    plan = ShardOrder(split.sizes, seed=1, batch_size=batch, shuffle_shards=max(256, world_size)).of_epoch(3)
    row["plan_seconds"] = laps.lap()
    fixed = {"num_samples": plan.num_samples, "global_batch": batch, "rank": 0, "world_size": world_size}
    refs = plan.refs(rank_positions(plan.num_samples // batch // 2, **fixed))
    row["seek_ms"] = 1000 * laps.lap()
    return row | {"opens": len({ref.shard for ref in refs}), "all_megabytes": laps.megabytes}


# ---- bytes of a rank --------------------------------------------------------------------------------------


def pack_tiny(folder: Path, *, num_shards: int) -> Path:
    """Pack `num_shards` shards of small files stored unchanged: 23 images of 256 x 256 each, 11 in the last."""
    from sharding import make_shards
    from sharding.packing.planning import Recipe, estimate_sample_bytes
    from sharding.settings import ShardSettings

    (folder / "drawn").mkdir()
    drawn = [folder / "drawn" / f"{seed}.jpg" for seed in range(32)]
    for seed, path in enumerate(drawn):
        draw_photo(seed, (256, 256)).save(path, quality=25)
    sample_bytes = estimate_sample_bytes(
        Recipe(size=256, resize="squash", quality=ShardSettings.quality, shard_megabytes=1), ()
    )
    write_data(drawn, folder, count=num_shards * (1_000_000 // sample_bytes) - 12)
    make_shards.main(
        ShardSettings(
            images=str(folder / "photos"), captions=str(folder / "captions.jsonl"), split="train",
            output=str(folder / "shards"), shard_megabytes=1, workers=1,
        )
    )  # fmt: skip
    return folder / "shards"


def last_shards(packed: Path, folder: Path, *, num_shards: int) -> Path:
    """Write a dataset with the last shards of another."""
    folder.mkdir()
    manifest = read_manifest(str(packed), "train", remedy="")
    manifest = replace(manifest, shards=manifest.shards[-num_shards:])
    names = ["vocabulary.json", *(f"{e.name}.{suffix}" for e in manifest.shards for suffix in ("tar", "index"))]
    for name in names:
        os.link(packed / name, folder / name)
    (folder / "train.manifest.json").write_text(manifest.to_json())
    return folder


@contextmanager
def logging_nginx(root: Path, home: Path) -> Iterator[str]:
    """The address of nginx over a folder; `home/access.log` has path and bytes of each answer."""
    servers = import_servers()
    log = "log_format short '$uri $body_bytes_sent'; access_log {home}/access.log short"
    servers.NGINX_CONFIGURATION = servers.NGINX_CONFIGURATION.replace("access_log off", log)
    with servers.run_nginx(root, home) as address:
        yield address


def measure_bytes(work: Work) -> tuple[list[Row], list[Bar]]:
    """A rank's largest part of the bytes, as a multiple of 1/W: streamed from nginx, and by the plan."""
    most = 2 if work.quick else 8
    packed, root = pack_tiny(work.folder, num_shards=12 * most), work.folder / "web"
    root.mkdir()
    cases = [(12 * most, 2**power) for power in range(most.bit_length())] + [(n * most, most) for n in (1, 2, 5)]
    datasets = {n: last_shards(packed, work.folder / f"last-{n}", num_shards=n) for n in dict(cases)}
    names = {f"{n}-{world_size}-{rank}": (n, world_size, rank) for n, world_size in cases for rank in range(world_size)}
    with logging_nginx(root, work.folder / "nginx") as address:
        for name, (num_shards, world_size, rank) in names.items():
            (root / name).symlink_to(datasets[num_shards])
            stream_all(f"{address}/{name}", work.folder / f"cache-{name}", rank=rank, world_size=world_size)
    sent, asked, opened = count_answers(work.folder / "nginx/access.log")
    rows: list[Row] = []
    for n, world_size in cases:
        total = sum(path.stat().st_size for path in datasets[n].glob("train-*"))
        ranks = [f"{n}-{world_size}-{rank}" for rank in range(world_size)]
        rows.append(
            {"by": "nginx", "ranks": world_size, "shards": n, "shuffle_shards": 256, "shards_a_rank": n / world_size,
             "lanes": TINY_BATCH, "largest_share_times_ranks": max(sent[name] for name in ranks) / total * world_size,
             "all_times": sum(sent[name] for name in ranks) / total,
             "requests_a_shard": sum(asked[name] for name in ranks) / sum(opened[name] for name in ranks)}
        )  # fmt: skip
    rows += [
        planned_share(ranks, shards_a_rank, shuffle_shards)
        for ranks, shuffle_shards in ((8, 256), (24, 256), (64, 256), (192, 256), (192, 192), (256, 256), (1_000, 256),
                                      (1_000, 1_000))
        for shards_a_rank in (1, 2, 5, 10, 100)
    ]  # fmt: skip
    print_rows("bytes of an epoch", rows)
    apart = [row for row in rows if row["shards_a_rank"] >= 10 and row["lanes"] % row["ranks"] == 0]
    return rows, [
        at_most(f"largest part of a rank x ranks, 10 or more shards a rank, by {by}",
                max(row["largest_share_times_ranks"] for row in apart if row["by"] == by), 1.2)
        for by in ("nginx", "plan")
    ]  # fmt: skip


def count_answers(log: Path) -> tuple[Counter[str], Counter[str], Counter[str]]:
    """For each folder of shards: bytes sent, number of answers, and number of tars requested."""
    sent, asked, tars = Counter[str](), Counter[str](), set()
    for path, num_bytes in map(str.split, log.read_text().splitlines()):
        _, folder, file = path.split("/")
        if file.endswith((".tar", ".index")):
            sent[folder] += int(num_bytes)
            asked[folder] += 1
            tars.add((folder, Path(file).stem))
    return sent, asked, Counter(folder for folder, _ in tars)


def stream_all(url: str, cache: Path, *, rank: int, world_size: int) -> None:
    """Stream an epoch of one rank, as if on its own machine."""
    from captioner.streaming.dataset import read_split
    from train.data.batches import caption_loader
    from train.data.folders import read_merged_vocabulary

    loader = caption_loader(
        read_split([url], "train", remedy="see the log of nginx"), batch_size=TINY_BATCH, training=True, crop=32,
        max_tokens=20, vocabulary=read_merged_vocabulary([url]), rank=rank, world_size=world_size,
        cache=cache, cache_gigabytes=1000,
    )  # fmt: skip
    assert sum(batch.num_samples for (batch,) in loader) == loader.ledger.decoded


def planned_share(ranks: int, shards_a_rank: int, shuffle_shards: int) -> Row:
    """A rank's largest part of the bytes by the plan, for shard sizes that vary as packed ones do; 32 images a rank."""
    from captioner.streaming.order import EpochOrder
    from train.plan import rank_rows

    rng, num_shards = np.random.default_rng(1), ranks * shards_a_rank
    sizes = [SHARD_SAMPLES] * (num_shards - 1) + [SHARD_SAMPLES // 2]  # the last shard is shorter
    num_bytes = (np.array(sizes) * rng.normal(SHARD_BYTES / SHARD_SAMPLES, 150, num_shards)).astype(int).tolist()
    plan = EpochOrder(shard_sizes=sizes, global_batch=32 * ranks, shuffle_shards=shuffle_shards)
    shares = [float(str(row[-1])) for row in rank_rows(plan, num_bytes, world_size=ranks)]
    return {
        "by": "plan", "ranks": ranks, "shards": num_shards, "shuffle_shards": shuffle_shards,
        "shards_a_rank": shards_a_rank, "lanes": plan.num_lanes, "largest_share_times_ranks": max(shares) * ranks,
        "all_times": sum(shares), "requests_a_shard": None,
    }  # fmt: skip


def measure_cache(work: Work) -> tuple[list[Row], list[Bar]]:
    """Measure reserving space for one more shard in a full cache."""
    rows: list[Row] = []
    for size in (100, 1_000) if work.quick else (100, 1_000, 10_000):
        rows.append({"shards_kept": size, **fresh(reserve_some, work.folder, size, rounds=work.rounds)})
    print_rows("reserving space in a full shard cache", rows)
    growth = rows[-1]["reserve_ms"] / rows[0]["reserve_ms"]
    return rows, [at_most(f"reserving space, {rows[-1]['shards_kept']:,} / 100 shards kept", growth, 2.0)]


def reserve_some(parent: Path, num_kept: int) -> Row:
    """Reserve space for a fifth as many shards as are kept; the kept files are sparse."""
    from captioner.streaming.cache import ShardCache

    with tempfile.TemporaryDirectory(dir=parent) as folder:
        for number in range(num_kept):
            for suffix, num_bytes in (("tar", SHARD_BYTES), ("index", SHARD_BYTES // 1000)):
                with Path(folder, f"{number:064x}.{suffix}").open("wb") as file:
                    file.truncate(num_bytes)  # sparse
        cache, laps = ShardCache(folder, max_bytes=num_kept * (SHARD_BYTES + SHARD_BYTES // 1000)), Laps()
        for number in range(num_kept, num_kept + num_kept // 5):
            with cache._locked() as lock:
                cache._make_room(SHARD_BYTES, lock, keep=())
                with Path(folder, f"{number:064x}.partial").open("wb") as file:
                    file.truncate(SHARD_BYTES)
        return {"reserve_ms": 1000 * laps.lap() / (num_kept // 5)}


# ---- start-up ---------------------------------------------------------------------------------------------


def measure_start(work: Work) -> tuple[list[Row], list[Bar]]:
    """Measure the time to the first batch by number of shards, at the epoch's start and near its end, after imports."""
    sizes = (32, 64) if work.quick else (10, 100, 1_000)
    packed = pack_tiny(work.folder, num_shards=sizes[-1])
    for size in sizes:
        last_shards(packed, work.folder / f"last-{size}", num_shards=size)
    imports = fresh_imports(rounds=work.rounds)
    rows: list[Row] = [{"from": "imports", "shards": 0, "at": "start of Python", **imports}]
    multiprocessing.get_context("forkserver").set_forkserver_preload(["train.data.batches"])
    with logging_nginx(work.folder, work.folder / "nginx") as address:
        for origin, prefix in (("disk", str(work.folder)), ("nginx", address)):
            for size in sizes:
                for at in (0.0, 0.95):
                    figures = fresh(
                        first_batch, f"{prefix}/last-{size}", at, work.folder, method="forkserver", rounds=work.rounds
                    )
                    rows.append({"from": origin, "shards": size, "at": f"{at:.0%} of the epoch", **figures})
    print_rows("to the first batch, after imports", rows)
    return rows, [bar for at in ("0% of the epoch", "95% of the epoch") for bar in growth_bars(rows, at)]


def growth_bars(rows: Sequence[Row], at: str) -> list[Bar]:
    """Bars on the growth of the first batch from the second largest dataset to the largest.

    On disk, an added shard may take twice as long as part `plan` finds for a shard of a manifest; with few added shards
    this is not measured. From nginx the noise of downloads hides it, so there seconds per downloaded shard count.
    """
    disk, nginx = (
        [row for row in rows if (row["from"], row["at"]) == (origin, at)][-2:] for origin in ("disk", "nginx")
    )
    more_seconds, more_shards = (disk[1][name] - disk[0][name] for name in ("seconds", "shards"))
    more_us = 1e6 * more_seconds / more_shards if more_shards >= 500 else None
    smaller, larger = (row["seconds"] / row["shards_brought"] for row in nginx)
    return [
        at_most(f"first batch at {at}, disk: µs for each added shard", more_us, 25.0),
        at_most(f"first batch at {at}, nginx, a downloaded shard: largest / next dataset", larger / smaller, 1.25),
    ]


def fresh_imports(*, rounds: int) -> Row:
    """The time from the start of Python until training's loader is imported."""
    script = "import time, train.data.batches; print(time.process_time())"
    walls, seconds = [], []
    for _ in range(rounds):
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        walls.append(time.perf_counter() - started)
        seconds.append(float(done.stdout))
    return {"seconds": min(seconds), "wall_seconds": min(walls), "megabytes": None, "shards_opened": None,
            "shards_brought": None}  # fmt: skip


def first_batch(folder: str, at: float, parent: Path) -> Row:
    """Open a split and take one batch, with an empty cache."""
    import torch

    from captioner.streaming.dataset import read_split
    from train.data.batches import caption_loader
    from train.data.folders import read_merged_vocabulary

    torch.set_num_threads(1)
    cache, laps, wall = tempfile.mkdtemp(dir=parent), Laps(), time.perf_counter()
    split = read_split([folder], "train", remedy="")
    loader = caption_loader(
        split, batch_size=TINY_BATCH, training=True, crop=224, max_tokens=20,
        vocabulary=read_merged_vocabulary([folder]), cache=cache, cache_gigabytes=1000,
    )  # fmt: skip
    loader.load_state_dict(loader.state_dict() | {"position": int(at * len(loader)) * TINY_BATCH})
    (batch,) = next(iter(loader))
    opened = len({ref.shard for ref in loader.order.refs(0, batch.positions)})
    figures = {"seconds": laps.lap(), "wall_seconds": time.perf_counter() - wall, "megabytes": laps.megabytes}
    brought = sum(1 for _ in Path(cache).glob("*.tar"))
    return figures | {"shards_opened": opened, "shards_brought": brought}


# ---- packing ----------------------------------------------------------------------------------------------


def measure_packing(work: Work) -> tuple[list[Row], list[Bar]]:
    """Measure the serial part of packing by number of images, and the whole command with 1 and 2 workers in turn."""
    originals = find_or_draw(work.images, work.folder)
    rows: list[Row] = []
    for power in (3,) if work.quick else (3, 4, 5):
        pictures = repeat_photos(work.folder / f"pictures-{power}", originals, count=10**power)
        captions = write_captions(pictures, work.folder / f"captions-{power}.jsonl")
        figures = fresh(plan_packing, pictures[0].parent, captions, rounds=work.rounds)
        rows.append({"pictures": 10**power, **figures})
    print_rows("the serial part of packing", rows)
    count = 60 if work.quick else 2_000
    pictures = repeat_photos(work.folder / "pictures", originals, count=count)
    captions = write_captions(pictures, work.folder / "captions.jsonl")

    def turn(workers: int, number: int) -> Any:
        output = work.folder / f"packed-{workers}-{number}"
        megabytes = shard_megabytes(count, shards=10)
        command = packing_command(pictures[0].parent, captions, output, workers=workers, shard_megabytes=megabytes)
        return run_timed(command, work.folder, count)

    costs = take_turns({str(workers): partial(turn, workers) for workers in (1, 2)}, rounds=work.rounds)
    commands: list[Row] = []
    for workers, found in costs.items():
        figures = {figure: median_of(found, figure=figure) or 0.0 for figure in ("wall_ms", "cpu_ms")}
        best = min(cost.wall_seconds for cost in found if cost is not None)
        commands.append({"workers": int(workers), "pictures": count, "wall_seconds": figures["wall_ms"] * count / 1000,
                         "least_wall_seconds": best, "cpu_seconds": figures["cpu_ms"] * count / 1000})  # fmt: skip
    print_rows(f"the whole packing command: medians of {work.rounds} rounds", commands)
    return rows + commands, []


def plan_packing(images: Path, captions: Path) -> Row:
    """Plan a split's packing, and finish as if its shards had been packed."""
    from sharding.packing.finish import write_manifest, write_vocabulary
    from sharding.packing.pack import PackedShard
    from sharding.packing.pack_split import make_recipe
    from sharding.packing.planning import plan_split
    from sharding.packing.sources import find_sources
    from sharding.settings import ShardSettings

    laps = Laps()
    settings = ShardSettings(images=str(images), captions=str(captions), split="train")
    (source,) = find_sources(images=settings.images, captions=settings.captions, split="train")
    plans, _ = plan_split(source, make_recipe(settings))
    row = {"shards": len(plans), "plan_seconds": laps.lap(), "plan_megabytes": laps.megabytes}
    assert all(pickle.dumps(plan) for plan in plans)  # as when sent to a worker
    row["send_seconds"] = laps.lap()
    content = pickle.dumps(Counter({f"word-{number}": number for number in range(SHARD_WORDS)}))
    entry = ShardEntry(name="", samples=1, captions=5, failures=0, bytes=1, sha256="0" * 64, fingerprint="0" * 64)
    shards = [
        PackedShard(entry=entry, failures=(), words=pickle.loads(content), backend="native", reused=False)
        for _ in plans
    ]  # fmt: skip
    row["words_megabytes"] = sum(sizeof_words(shard.words) for shard in shards) / 1e6
    laps.lap()
    with tempfile.TemporaryDirectory() as folder:
        write_vocabulary(folder, shards, threshold=4)
        write_manifest(folder, "train", shards, recipe={}, source={})
    return row | {"finish_seconds": laps.lap()}


def sizeof_words(words: Counter[str]) -> int:
    """Bytes of a word count that shares no strings with others."""
    return sys.getsizeof(words) + sum(sys.getsizeof(word) + sys.getsizeof(count) for word, count in words.items())


# ---- the doctor, and paper --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Machine:
    """An assumed machine of eight GPUs; all machines use one `store`. MB/s are 10^6 bytes a second."""

    gpus: int = 8
    cores: int = 96
    disk_mbs: float = 5_000.0
    network_mbs: float = 3_000.0
    store_mbs: float = 20_000.0


@dataclass(frozen=True, kw_only=True)
class Figures:
    """The doctor's figures: µs a sample in a worker, for downloading, and in the training process; bytes an image."""

    worker_us: float
    download_us: float
    handoff_us: float
    image_bytes: float


def measure_doctor(work: Work) -> tuple[list[Row], list[Bar]]:
    """The doctor's figures from nginx, and what they mean for more GPUs."""
    from captioner.streaming.dataset import read_split
    from contenders.training import pack

    pack(find_or_draw(work.images, work.folder), None, work.folder, num_samples=600 if work.quick else 6_000)
    with logging_nginx(work.folder, work.folder / "nginx") as address:
        url, file = f"{address}/shards", work.folder / "doctor.json"
        flags = [
            "--shards",
            url,
            "--json",
            file,
            "--seconds",
            "1" if work.quick else "10",
            "--samples-per-second",
            2000,
        ]
        answer = min(
            (ask_doctor(flags, file) for _ in range(work.rounds)), key=lambda answer: sum(answer["stage_us"].values())
        )
        split = read_split([url], "train", remedy="")
        download_us = min(download(split, work.folder / f"cache-{number}") for number in range(work.rounds))
    found = Figures(
        worker_us=sum(answer["stage_us"].values()), download_us=download_us,
        handoff_us=answer["handoff_us"], image_bytes=split.bytes / split.num_samples,
    )  # fmt: skip
    print_rows("the doctor's numbers: µs and bytes an image", [answer["stage_us"] | asdict(found)])
    cli.console.print(answer["verdict"], markup=False)
    paper = [on_paper(found, Machine(), gpus=gpus, rate=rate)
             for rate in (500, 2_000, 5_000) for gpus in (1, 8, 64, 256, 1_000)]  # fmt: skip
    print_rows("on paper, by the doctor's numbers", paper)
    return [answer | asdict(found), *paper], []


def ask_doctor(flags: Sequence[str | Path | int], file: Path) -> Row:
    """Run the doctor and return the figures that it writes to `file`. Raises UserError if it fails."""
    command = [sys.executable, REPOSITORY / "train/doctor.py", *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"train/doctor.py failed ({done.returncode}): {done.stderr[-600:]}")
    return json.loads(file.read_text())


def download(split: Any, folder: Path) -> float:
    """CPU time, µs an image, to fetch all shards of a Split but the first, which loads libraries."""
    from captioner.streaming.cache import ShardCache

    cache, (first, *others) = ShardCache(str(folder), max_bytes=1 << 40), split.shards
    cache.fetch(*first)
    cost = time_here(sum(entry.samples for _, entry in others), lambda: [cache.fetch(*shard) for shard in others])
    return 1000 * (cost.cpu_ms or 0.0)


def on_paper(found: Figures, machine: Machine, *, gpus: int, rate: float) -> Row:
    """What this number of GPUs needs at `rate` images/s each, if all shards come from the store."""
    here, machines = min(gpus, machine.gpus), math.ceil(gpus / machine.gpus)
    mbs = here * rate * found.image_bytes / 1e6
    row = {
        "gpus": gpus, "images_a_second_a_gpu": rate, "machines": machines,
        "cores_a_machine": here * rate * (found.worker_us + found.download_us + found.handoff_us) / 1e6,
        "handoff_share": rate * found.handoff_us / 1e6, "mbs_a_machine": mbs, "store_mbs": mbs * gpus / here,
    }  # fmt: skip
    shares = {
        "decoding cores": row["cores_a_machine"] / machine.cores, "hand-off": row["handoff_share"],
        "cache disk": 2 * mbs / machine.disk_mbs, "network": mbs / machine.network_mbs,
        "store": row["store_mbs"] / machine.store_mbs,
    }  # fmt: skip
    tightest = max(shares, key=lambda name: shares[name])
    return row | {"tightest": tightest, "of_it": shares[tightest], "limit": tightest if shares[tightest] > 1 else "GPU"}


# ---- the command -----------------------------------------------------------------------------------------

MEASURES = {
    "plan": measure_plans,
    "bytes": measure_bytes,
    "cache": measure_cache,
    "start": measure_start,
    "packing": measure_packing,
    "doctor": measure_doctor,
}


def main(settings: ScalingSettings) -> None:
    """Measure the parts, and report."""
    if settings.images:
        find_photos(settings.images)
    rounds = settings.rounds or (1 if settings.quick else 3)
    run = describe_run(
        ("torch", "numpy", "webdataset", "aiohttp", "pillow", "pillow-simd"), rounds=rounds,
        pictures=settings.images or "drawn", mode="quick: rough figures" if settings.quick else "full",
    )  # fmt: skip
    rows, bars = [], []
    for part in settings.parts:
        with tempfile.TemporaryDirectory(prefix=f"scaling-{part}-", ignore_cleanup_errors=True) as folder:
            work = Work(folder=Path(folder), rounds=rounds, quick=settings.quick, images=settings.images)
            found, judged = MEASURES[part](work)
        rows += [{"part": part, **row} for row in found]
        bars += judged
    finish(bars, json=settings.json, run=run, rows=rows)


if __name__ == "__main__":
    cli.run(main, ScalingSettings, description=__doc__ or "")
