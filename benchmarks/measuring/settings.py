"""The flags of benchmarks that measure on images."""

from dataclasses import dataclass

from captioner.flags import File


@dataclass(frozen=True, kw_only=True)
class ImageBenchmarkSettings:
    """Which images, how much, and where the figures go."""

    images: File | None = None
    """Folder of photos such as COCO's; without it, images in COCO's sizes are drawn that compress like photos."""
    quick: bool = False
    """Everything small, only to see that it runs."""
    json: File | None = None
    """Write run, rows and bars to this file, and a plot of the bars beside it (.svg)."""
