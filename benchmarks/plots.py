"""Draw the plots that the documents show: docs/images/NAME.svg from docs/images/data/NAME.json.

    python benchmarks/plots.py

A data file holds the arguments of `captioner.plots.bars`: a title, the values by name, and a note with command, machine
and date. The figures are those of docs/performance.md: change both.
"""

import json
from pathlib import Path

from captioner.files.storage import write_atomic
from captioner.plots import bars

IMAGES = Path(__file__).resolve().parents[1] / "docs/images"


def draw_all() -> dict[str, str]:
    """The SVG of each data file, by the name of its plot."""
    return {path.stem: bars(**json.loads(path.read_text())).svg for path in sorted(IMAGES.glob("data/*.json"))}


if __name__ == "__main__":
    for name, svg in draw_all().items():
        write_atomic(str(IMAGES / f"{name}.svg"), svg)
        print(IMAGES / f"{name}.svg")
