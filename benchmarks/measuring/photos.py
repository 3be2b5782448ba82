"""The images that benchmarks use: COCO's, or drawn ones like them, and 12-megapixel ones tiled from them."""

import json
import os
import shutil
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from captioner.errors import UserError
from captioner.images import loading

COCO, PHONE = "COCO", "12 megapixels"
SIZE, QUALITY = 256, 90  # of stored images
SUFFIXES = (".jpg", ".jpeg")
COCO_SIZES = ((640, 480), (640, 427), (480, 640), (640, 426), (500, 375), (427, 640), (640, 360), (612, 612))
PHONE_SIZE = (4032, 3024)
MAX_TILES = 200  # different tiles: all of them are in memory at once
WORDS = (
    "a",
    "the",
    "of",
    "man",
    "dog",
    "table",
    "street",
    "two",
    "white",
    "standing",
    "sitting next to",
    "in front of",
)


def find_or_draw(images: Path | None, folder: Path) -> list[Path]:
    """The photos in `images`, or drawn ones in `folder`/drawn-photos. Raises UserError if `images` has none."""
    return find_photos(images) if images else draw_photos(folder / "drawn-photos", count=24)


def find_photos(folder: Path) -> list[Path]:
    """The JPEG files directly in `folder`, by name. Raises UserError if there is none."""
    if not folder.is_dir():
        raise UserError(f"the folder --images {folder} does not exist: name one with JPEG photos, or leave it out")
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not found:
        raise UserError(f"--images {folder} has no {' or '.join(SUFFIXES)} files: name a folder of photos")
    return found


def draw_photos(folder: Path, *, count: int) -> list[Path]:
    """Write `count` drawn images in COCO's sizes, as JPEGs like COCO's (quality 96, 4:4:4)."""
    folder.mkdir()
    paths = [folder / f"{number:04d}.jpg" for number in range(count)]
    for number, path in enumerate(paths):
        draw_photo(number, COCO_SIZES[number % len(COCO_SIZES)]).save(path, quality=96, subsampling=0)
    return paths


def draw_photo(seed: int, size: tuple[int, int]) -> Image.Image:
    """An image of soft noise with less detail at finer scales, as in photos, so that its JPEG has a similar size."""
    generator = np.random.default_rng(seed)
    width, height = size
    pixels = np.full((height, width, 3), 128.0)
    for cells in (2, 4, 8, 16, 32, 64, 128, 256, 512):
        grey = generator.normal(size=(cells, cells, 1)) + 0.3 * generator.normal(size=(cells, cells, 3))
        bands = [Image.fromarray(grey[:, :, band].astype(np.float32)) for band in range(3)]
        layer = np.stack([np.asarray(band.resize(size, Image.Resampling.BICUBIC)) for band in bands], axis=2)
        pixels += 90 / cells**0.55 * layer
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def store_photos(
    originals: Sequence[Path], folder: Path, *, quality: int = QUALITY, subsampling: str = loading.SUBSAMPLING
) -> list[Path]:
    """Write the originals as JPEGs of SIZE x SIZE pixels, by default as packing stores them."""
    folder.mkdir(parents=True)
    paths = [folder / f"{number:06d}.jpg" for number in range(len(originals))]
    for original, path in zip(originals, paths, strict=True):
        picture = Image.open(original).convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
        picture.save(path, "JPEG", quality=quality, subsampling=subsampling)
    return paths


def repeat_photos(folder: Path, originals: Sequence[Path], *, count: int) -> list[Path]:
    """Write `count` files to `folder` that repeat the originals: a copy of each, then hard links to the copies."""
    folder.mkdir()
    copies: list[Path] = []
    for number, original in enumerate(islice(cycle(originals), count)):
        path = folder / f"{number:06d}.jpg"
        if number < len(originals):
            shutil.copyfile(original, path)
        else:
            os.link(copies[number % len(originals)], path)
        copies.append(path)
    return copies


def tile_photos(folder: Path, originals: Sequence[Path], *, count: int) -> list[Path]:
    """Write `count` different 12-megapixel JPEGs like a phone's: quality 92, 4:2:0, no tile enlarged."""
    folder.mkdir()
    tiles = [Image.open(path).convert("RGB") for path in originals[:MAX_TILES]]
    paths = [folder / f"{number:04d}.jpg" for number in range(count)]
    for number, path in enumerate(paths):
        _tile(tiles, Random(number)).save(path, quality=92, subsampling=2)
    return paths


def _tile(tiles: Sequence[Image.Image], rng: Random) -> Image.Image:
    """Rows of tiles; each row is as high as its lowest tile."""
    width, height = PHONE_SIZE
    canvas, top = Image.new("RGB", PHONE_SIZE), 0
    while top < height:
        row = [rng.choice(tiles)]
        while sum(tile.width for tile in row) < width:
            row.append(rng.choice(tiles))
        row_height, left = min(tile.height for tile in row), 0
        for tile in row:
            canvas.paste(tile.crop((0, 0, tile.width, row_height)), (left, top))
            left += tile.width
        top += row_height
    return canvas


def make_captions(number: int) -> list[str]:
    """Five captions of about COCO's length; the same number gives the same captions."""
    rng = Random(number)
    return [" ".join(rng.choices(WORDS, k=rng.randint(8, 13))).capitalize() + "." for _ in range(5)]


def write_captions(paths: Sequence[Path], file: Path) -> Path:
    """Write a caption file for the images, five captions each."""
    rows = [{"path": path.name, "captions": make_captions(number)} for number, path in enumerate(paths)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_data(originals: Sequence[Path], folder: Path, *, count: int) -> Path:
    """Write `photos/` with `count` images to `folder`, and `captions.jsonl`."""
    folder.mkdir(exist_ok=True)
    write_captions(repeat_photos(folder / "photos", originals, count=count), folder / "captions.jsonl")
    return folder
