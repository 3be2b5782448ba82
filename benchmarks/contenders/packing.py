"""The contenders of benchmarks/packing.py: the book's loop, webdataset's writer, img2dataset, ours, and ceilings."""

import io
import json
import math
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from captioner.errors import UserError
from captioner.images import loading
from measuring.commands import REPOSITORY, packing_command, run_timed, shard_megabytes
from measuring.figures import Contender, Cost, time_here
from measuring.photos import QUALITY, SIZE, make_captions, write_captions
from sharding.packing.engine import run_local
from sharding.packing.pack import ShardProgress, pack_shard
from sharding.packing.pack_split import make_recipe
from sharding.packing.planning import ShardPlan, plan_split
from sharding.packing.sources import find_sources
from sharding.settings import ShardSettings

BOOK = "the book's loop"
PILLOW = "pillow-simd" if loading.HAS_SIMD else "Pillow"
SHARD_WRITER = f"{PILLOW} + webdataset.ShardWriter"
OURS = "ours, one worker"
JOB = "ours: sharding/make_shards.py"
IMG2DATASET, IMG2DATASET_LEAN = "img2dataset", "img2dataset without hash and EXIF"
Photos = Sequence[Path]


def use_one_thread() -> None:
    """Give torch one thread, as in our workers: CPU time is compared."""
    if loading.backend() == "native":
        import torch

        torch.set_num_threads(1)


def slices(paths: Photos, rounds: int) -> list[Photos]:
    """The pictures in equal parts, one for each round."""
    length = len(paths) // rounds
    return [paths[first : first + length] for first in range(0, length * rounds, length)]


def make_plans(paths: Photos, scratch: Path, *, shards: int) -> list[ShardPlan]:
    """The packing command's own plan for these images, in about `shards` shards."""
    captions = str(write_captions(paths, scratch / "slice.jsonl"))
    folder = str(paths[0].parent)
    (source,) = find_sources(images=folder, captions=captions, split="train")
    settings = ShardSettings(
        images=folder, captions=captions, split="train", shard_megabytes=shard_megabytes(len(paths), shards=shards)
    )
    return plan_split(source, make_recipe(settings))[0]


# ---- contenders in one process ----------------------------------------------------------------------------


def like_the_book(parts: Sequence[Photos], scratch: Path, python: Path) -> Contender:
    """The book's loop in its own process; if pillow-simd is installed, the peers' Python runs it."""

    def turn(number: int) -> Cost:
        paths = parts[number]
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            command = [python, Path(__file__).with_name("book_packing.py"), folder]
            done = subprocess.run(
                command, input="\n".join(map(str, paths)), capture_output=True, text=True, check=False
            )
        if done.returncode:
            raise UserError(f"{python} book_packing.py failed ({done.stderr[-300:]}): make bench-peers installs Pillow")
        return Cost(items=len(paths), **json.loads(done.stdout))

    return turn


def pack_with_shard_writer(part: Photos, folder: Path) -> None:
    """The usual way: images from Pillow and JSON into webdataset's writer."""
    from webdataset import ShardWriter

    with ShardWriter(str(folder / "%06d.tar"), maxsize=64e6, verbose=0) as writer:
        for number, path in enumerate(part):
            buffer = io.BytesIO()
            with path.open("rb") as file, Image.open(file) as image:
                small = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
                small.save(buffer, "JPEG", quality=QUALITY, subsampling=loading.SUBSAMPLING)
            content = {"file_name": path.name, "captions": make_captions(number)}
            writer.write({"__key__": f"{number:09d}", "jpg": buffer.getvalue(), "json": content})


def in_this_process(action: Callable[[Photos, Path], None], parts: Sequence[Photos], scratch: Path) -> Contender:
    """A contender that packs its round's slice into an empty folder."""

    def turn(number: int) -> Cost:
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            return time_here(len(parts[number]), partial(action, parts[number], Path(folder)))

    return turn


def ours_in_this_process(parts: Sequence[Photos], scratch: Path) -> Contender:
    """Pack and write real plans; planning is not timed."""

    def turn(number: int) -> Cost:
        plans = make_plans(parts[number], scratch, shards=1)
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            return time_here(len(parts[number]), lambda: [pack_shard(plan, folder) for plan in plans])

    return turn


# ---- the ceiling: bytes in memory to bytes in memory ------------------------------------------------------


def convert_with_pillow(data: bytes) -> bytes:
    """Decode, resize and encode with Pillow or pillow-simd."""
    return loading.encode_jpeg(
        open_drafted(data).convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS), quality=QUALITY
    )


def convert_natively(data: bytes) -> bytes:
    """simplejpeg's decoder and torch's resize; Pillow's encoder."""
    import torch

    small_3PP = resize_natively(torch.from_numpy(decode_reduced(data)).permute(2, 0, 1))
    return loading.encode_jpeg(to_picture(small_3PP), quality=QUALITY)


def convert_with_simplejpeg(data: bytes) -> bytes:
    """simplejpeg's decoder and encoder; resize with torch, or with Pillow if torch cannot."""
    pixels_HW3 = decode_reduced(data)
    if loading.backend() == "native":
        import torch

        small = resize_natively(torch.from_numpy(pixels_HW3).permute(2, 0, 1)).permute(1, 2, 0).contiguous().numpy()
    else:
        small = np.asarray(Image.fromarray(pixels_HW3).resize((SIZE, SIZE), Image.Resampling.LANCZOS))
    return simplejpeg.encode_jpeg(small, quality=QUALITY, colorspace="RGB", colorsubsampling="420")


def decode_reduced(data: bytes) -> np.ndarray:
    """The pixels (H, W, 3), decoded at the reduced scale that ours allows."""
    side = math.ceil(loading.DRAFT_SCALE * SIZE)
    return simplejpeg.decode_jpeg(data, "RGB", min_width=side, min_height=side)


def open_drafted(data: bytes) -> Image.Image:
    """The image, to be decoded at the reduced scale that ours allows."""
    image = Image.open(io.BytesIO(data))
    side = math.ceil(loading.DRAFT_SCALE * SIZE)
    image.draft("RGB", (side, side))
    return image


def resize_natively(pixels_3HW: Any) -> Any:
    """(3, H, W) bytes to (3, SIZE, SIZE)."""
    from torch.nn.functional import interpolate

    return interpolate(pixels_3HW[None], size=(SIZE, SIZE), mode="lanczos", antialias=True)[0]


def to_picture(pixels_3HW: Any) -> Image.Image:
    """A Pillow image of (3, H, W) bytes; band by band is faster."""
    bands = pixels_3HW.contiguous().numpy()
    return Image.merge("RGB", [Image.frombuffer("L", (SIZE, SIZE), band, "raw", "L", 0, 1) for band in bands])


def ceilings() -> dict[str, Callable[[bytes], bytes]]:
    """The installed converters, by name."""
    found: dict[str, Callable[[bytes], bytes]] = {
        f"ceiling: {PILLOW}": convert_with_pillow,
        "ceiling: simplejpeg": convert_with_simplejpeg,
    }
    if loading._has_native_lanczos():
        found["ceiling: native (simplejpeg, torch)"] = convert_natively
    return found


def in_memory(convert: Callable[[bytes], bytes], parts: Sequence[Photos]) -> Contender:
    """A contender that reads its images before the clock starts, and writes nothing."""

    def turn(number: int) -> Cost:
        contents = [path.read_bytes() for path in parts[number]]
        return time_here(len(contents), lambda: [convert(data) for data in contents])

    return turn


# ---- the engine -------------------------------------------------------------------------------------------


def through_the_engine(paths: Photos, scratch: Path, *, workers: int) -> Contender:
    """Pack all images in each round with `workers` workers; only the time in which all are busy counts."""

    def turn(number: int) -> Cost | None:
        plans = make_plans(paths, scratch, shards=8)
        seen: list[tuple[float, ShardProgress]] = []
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            for _ in run_local(
                plans, folder, workers=workers, report=lambda now: seen.append((time.perf_counter(), now))
            ):
                pass
        return steady_cost(seen, {plan.name: len(plan.records) for plan in plans}, workers=workers)

    return turn


def steady_cost(seen: Sequence[tuple[float, ShardProgress]], lengths: dict[str, int], *, workers: int) -> Cost | None:
    """The cost while all workers are busy: from the first progress of every worker until one finds no further shard.

    Start-up (processes, importing torch) and the last shards are not counted. None if there were too few images.
    """
    done: dict[str, int] = {}
    start: tuple[float, int] | None = None
    for seconds, progress in seen:
        done[progress.shard] = progress.images
        pictures = sum(done.values())
        if start is None and len(done) >= workers:
            start = seconds, pictures
        num_finished = sum(done.get(name) == length for name, length in lengths.items())
        if start and num_finished > len(lengths) - workers:
            packed = pictures - start[1]
            return Cost(items=packed, wall_seconds=seconds - start[0]) if packed else None
    return None


# ---- whole jobs -------------------------------------------------------------------------------------------


def our_job(paths: Photos, scratch: Path, *, workers: int, code: Path = REPOSITORY) -> Contender:
    """`python sharding/make_shards.py` of the checkout `code` with a caption file."""
    captions = write_captions(paths, scratch / "job.jsonl")

    def turn(number: int) -> Cost:
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            command = packing_command(
                paths[0].parent,
                captions,
                folder,
                code=code,
                workers=workers,
                quality=QUALITY,
                shard_megabytes=shard_megabytes(len(paths), shards=2 * workers),
            )
            cost = run_timed(command, scratch, len(paths), code=code)
            num_packed = json.loads((Path(folder) / "train.manifest.json").read_text())["totals"]["samples"]
            return check_complete(cost, num_packed)

    return turn


def without_start_up(few: Contender, many: Contender) -> Contender:
    """The cost of a job's images beyond those of a smaller job."""

    def turn(number: int) -> Cost | None:
        small, large = few(number), many(number)
        if not (small and large and small.cpu_seconds and large.cpu_seconds):
            return None
        return Cost(
            items=large.items - small.items,
            wall_seconds=large.wall_seconds - small.wall_seconds,
            cpu_seconds=large.cpu_seconds - small.cpu_seconds,
        )

    return turn


def encode_as_today(earlier: Path) -> None:
    """Let the code of commit EARLIER subsample chroma as packing does now; it took the quality as a flag."""
    file = earlier / "captioner/images.py"
    text = file.read_text()
    assert text.count("subsampling=0") == 1
    file.write_text(text.replace("subsampling=0", f'subsampling="{loading.SUBSAMPLING}"'))


def peers_job(paths: Photos, scratch: Path, peers: Path, *, workers: int, **changed: bool | None) -> Contender:
    """img2dataset with its defaults and one caption an image, except for flags that make its work the same as ours.

    It cannot ignore the aspect ratio: `center_crop` also gives 256 x 256 pixels. Images are file:// addresses.
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


def check_complete(cost: Cost, num_packed: int) -> Cost:
    """The cost of a job that packed every image. Raises UserError."""
    if num_packed != cost.items:
        raise UserError(
            f"only {num_packed:,} of {cost.items:,} images were packed: its time means nothing, see the errors above"
        )
    return cost
