"""Captioning folders, end to end: ours against the book's loop and our own ceiling, the cost of a beam and attention.

    python benchmarks/captioning.py --images PHOTOS           # about 15 minutes
    python benchmarks/captioning.py --quick                   # rough figures, drawn images

Contenders take turns on the same images, with a vocabulary of 9,956 words. Figures are medians over the rounds, ratios
are medians of the rounds' ratios, both in wall time: measure on an idle machine. A turn of ours is the captioning
command on a folder, from listing to merged file, including its reading processes; only the start of Python and loading
the model are not timed. No two files have the same bytes. Weights are random, so captions do not end by themselves:
ours stop at 12 steps, the mean length of COCO's captions with `<end>`; the book's take 20.

The book captions one image at a time: Pillow's LANCZOS to 224 x 224, float32, greedy.

The ceiling adds up the parts of an image: decoding with resizing, the encoder in the fastest of several forms and
batch sizes, and the decoder. On a CPU each part is measured warm, in one thread for each core, all doing the same:
cores share caches and memory. The ceiling is the number of cores over the sum. On a GPU it is the slower of decoding
with resizing on all cores, and the encoder, each measured alone.

Exit codes: 0 measured, whether or not the bars hold; 2 an error that you can fix, in one line.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captioner import cli
from captioner.flags import Count
from contenders import LARGE, LIGHT, LITE
from measuring.figures import Bar, describe_run, finish, print_rows, print_run
from measuring.photos import COCO, PHONE, find_or_draw, tile_photos
from measuring.settings import ImageBenchmarkSettings

PACKAGES = ("torch", "torchvision", "accelerate", "simplejpeg", "pillow", "pillow-simd", "numpy")


@dataclass(frozen=True, kw_only=True)
class CaptioningSettings(ImageBenchmarkSettings):
    """What is measured, on which images, and how often."""

    encoders: tuple[str, ...] = (LIGHT, LITE)
    """Encoders on the CPU; on a GPU resnet152 is measured as well."""
    pictures: Count | None = None
    """Files of a turn of ours: 1,000, with --quick 48."""
    large_pictures: Count | None = None
    """12-megapixel files of a turn: 320, with --quick 8."""
    rounds: Count | None = None
    """Turns of each contender: 3, with --quick 1."""


def main(settings: CaptioningSettings) -> None:
    """Prepare the images, measure, and report."""
    import torch  # not above: reading processes import this file

    from contenders.captioning import make_job, measure, start

    device = start()
    on_gpu = torch.cuda.is_available()
    rounds = settings.rounds or (1 if settings.quick else 3)
    rows: list[dict[str, Any]] = []
    bars: list[Bar] = []
    with tempfile.TemporaryDirectory(prefix="captioning-") as temporary:
        scratch = Path(temporary)
        originals = find_or_draw(settings.images, scratch)
        run = describe_run(
            PACKAGES,
            pictures=f"{len(originals)} {f'from {settings.images}' if settings.images else 'DRAWN'}, repeated",
            device=torch.cuda.get_device_name() if on_gpu else "CPU",
        )
        print_run("captioning", run)
        sets = make_sets(originals, scratch, settings)
        for encoder in (LARGE,) if on_gpu else settings.encoders:
            for kind, files in sets.items():
                job = make_job(files, encoder, device, scratch, quick=settings.quick)
                cli.console.print(f"\n{encoder} on {kind}: {len(files):,} files")
                found_rows, found_bars = measure(job, kind=kind, rounds=rounds)
                rows += found_rows
                bars += found_bars
    print_rows("captioning", rows)
    finish(bars, json=settings.json, run=run, rows=rows)


def make_sets(originals: Sequence[Path], scratch: Path, settings: CaptioningSettings) -> dict[str, list[Path]]:
    """The files to caption, by kind; no two have the same bytes."""
    count = settings.pictures or (48 if settings.quick else 1000)
    num_large = settings.large_pictures or (8 if settings.quick else 320)
    large = tile_photos(scratch / "large originals", originals, count=min(num_large, 20))
    return {
        COCO: write_different(scratch / "coco", originals, count=count),
        PHONE: write_different(scratch / "large", large, count=num_large),
    }


def write_different(folder: Path, originals: Sequence[Path], *, count: int) -> list[Path]:
    """Copies of the originals in turn, each with different bytes after the image, which decoders ignore."""
    folder.mkdir()
    contents = [path.read_bytes() for path in originals]
    paths = [folder / f"{number:06d}.jpg" for number in range(count)]
    for number, path in enumerate(paths):
        path.write_bytes(contents[number % len(contents)] + number.to_bytes(8, "little"))
    return paths


if __name__ == "__main__":
    cli.run(main, CaptioningSettings, description=__doc__ or "")
