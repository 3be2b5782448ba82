"""The packing command's flags."""

from dataclasses import dataclass
from typing import Literal

from captioner.flags import Count, Location, NotNegative, Pixels, Quality, Workers
from captioner.images.loading import Resize

Split = Literal["train", "val", "test"]


@dataclass(frozen=True, kw_only=True)
class ShardSettings:
    """Which pictures and captions to pack, how, and where to."""

    images: Location = "data/coco"
    """Folder (or URL) of the pictures; `captions_train2014.json` finds its own in `train2014/` below it."""
    captions: Location = "data/coco/annotations"
    """COCO captions or Karpathy's JSON, CSV or TSV with columns image and caption, or JSONL with path (or image) and
    caption (or captions); or a folder of `captions_SPLIT*` files, all of whose splits are packed."""
    output: Location = "data/shards"
    """Dataset folder (or URL) that receives shards, vocabulary and manifests."""
    split: Split | None = None
    """Pack only this split; without it all that are found, training first."""
    size: Pixels = 256
    """Sides of a stored picture in pixels."""
    resize: Resize = "squash"
    """How a picture comes to that size: squash (sides' ratio not kept, as in the book), center-crop (the middle
    square), keep-ratio (the shorter side becomes --size), none (stored as it is; training squashes when reading)."""
    quality: Quality = 95
    """JPEG quality of stored pictures; a JPEG that has the wanted size already is stored untouched."""
    shard_megabytes: Count = 64
    """About how large a shard becomes."""
    threshold: Count | None = None
    """A word enters the vocabulary when the training captions hold it at least this often. Without it 4, or
    on small data the highest lower value at which the vocabulary covers 90 % of all words in the captions."""
    vocabulary: Location | None = None
    """Use this vocabulary.json instead of making one from the training captions."""
    workers: Workers | None = None
    """Processes that pack. Without it one for each processor that this command may use, or that the cluster has."""
    engine: Literal["local", "ray"] = "local"
    """Where they run: on this machine, or on the Ray cluster that RAY_ADDRESS names (pip install -e '.[ray]')."""
    max_failures: NotNegative | None = None
    """Leave with exit code 3 when more than this could not be packed: a count, or a share below 1 such as 0.01."""
    dry_run: bool = False
    """Only show the plan: shards, bytes, what is missing, what would be reused."""
