"""The book's packing loop on plain Pillow, run as `python book_packing.py FOLDER < paths`, one path a line.

Loose files, no captions: open each image, resize, save. Prints the loop's cost as JSON, without start-up. Needs only
Pillow, so that an environment without pillow-simd can run it.
"""

import json
import sys
import time
from pathlib import Path

from PIL import Image

SIZE, QUALITY = 256, 90


def main(folder: str, *paths: str) -> None:
    """Pack the images."""
    Image.preinit()  # imports its formats
    wall, cpu = time.perf_counter(), time.process_time()
    for path in paths:
        with open(path, "rb") as file, Image.open(file) as image:  # noqa: PTH123 - as the book has it
            small = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
            small.save(Path(folder, Path(path).name), "JPEG", quality=QUALITY, subsampling="4:2:0")
    cost = {"cpu_seconds": time.process_time() - cpu, "wall_seconds": time.perf_counter() - wall}
    print(json.dumps(cost))


if __name__ == "__main__":
    main(sys.argv[1], *sys.stdin.read().splitlines())
