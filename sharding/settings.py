"""The flags of make_shards.py and check_shards.py."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from captioner.flags import Count, Location, NotNegative, Pixels, Quality, Workers
from captioner.images.loading import Resize

Split = Literal["train", "val", "test"]
Samples = Literal["captioned-images", "any"]
Folder = Annotated[tyro.conf.Positional[Location], tyro.conf.arg(metavar="DIR")]


@dataclass(frozen=True, kw_only=True)
class ShardSettings:
    """Which images and captions to pack, how, and where to."""

    images: Location = "data/coco"
    """Folder (or URL) of the images; `captions_train2014.json` finds its own in `train2014/` below it."""
    captions: Location = "data/coco/annotations"
    """COCO captions or Karpathy's JSON, CSV or TSV with columns image and caption, or JSONL with path (or image) and
    caption (or captions); or a folder of `captions_SPLIT*` files, all of whose splits are packed."""
    output: Location = "data/shards"
    """Dataset folder (or URL) that receives shards, vocabulary and manifests."""
    split: Split | None = None
    """Pack only this split; without it all that are found, training first."""
    size: Pixels = 256
    """Sides of a stored image in pixels."""
    resize: Resize = "squash"
    """How an image is resized to that size: squash (ignores the aspect ratio), center-crop (the middle square),
    keep-ratio (the shorter side becomes --size), none (stored as it is; training squashes when reading)."""
    quality: Quality = 90
    """JPEG quality of stored images; a JPEG that has the wanted size already is stored untouched."""
    shard_megabytes: Count = 64
    """Approximate size of a shard."""
    threshold: Count | None = None
    """A word enters the vocabulary when the training captions hold it at least this often. Without it 4, or
    on small data the highest lower value at which the vocabulary covers 90 % of all words in the captions."""
    vocabulary: Location | None = None
    """Use this vocabulary.json instead of making one from the training captions."""
    workers: Workers | None = None
    """Processes that pack. Without it one for each processor that this command may use, or that the cluster has."""
    engine: Literal["local", "ray"] = "local"
    """Where these run: on this machine, or on the Ray cluster that RAY_ADDRESS names (pip install -e '.[ray]')."""
    max_failures: NotNegative | None = None
    """Leave with exit code 3 when more than this could not be packed: a count, or a fraction below 1 such as 0.01."""
    dry_run: bool = False
    """Only show the plan: shards, bytes, what is missing, what would be reused."""


@dataclass(frozen=True, kw_only=True)
class VerifySettings:
    """Read every byte of the shards and compare all that their files say of each other."""

    folder: Folder
    """Dataset folder (or URL)."""
    split: Split | None = None
    """Look at this split only."""


@dataclass(frozen=True, kw_only=True)
class RepairSettings:
    """Find what is broken and make only that again, to the same bytes: indexes from tars, tars from their images."""

    folder: Folder
    """Dataset folder (or URL)."""
    split: Split | None = None
    """Look at this split only."""
    images: Location | None = None
    """Where the images are now, if not where they were when they were packed."""
    captions: Location | None = None
    """Where the captions are now: a file, or a folder as make_shards.py takes it."""


@dataclass(frozen=True, kw_only=True)
class ShowSettings:
    """Print what the shards hold, how they were made, and one sample."""

    folder: Folder
    """Dataset folder (or URL)."""
    split: Split | None = None
    """Look at this split only."""
    key: str | None = None
    """The sample to show; without it the first."""


@dataclass(frozen=True, kw_only=True)
class IndexSettings:
    """Make webdataset tars of another program trainable: an index beside each, a manifest and, of captions, a
    vocabulary."""

    folder: Folder
    """Folder (or URL) that holds the tars and receives the other files."""
    split: Split
    """What the tars are for."""
    samples: Samples = "captioned-images"
    """What they hold: images with captions, as train/main.py reads them, or any fields, for captioner.streaming."""
    pattern: str | None = None
    """Which files, such as "cc3m-train-*.tar"; without it SPLIT*.tar where there are any, else *.tar."""
    threshold: Count | None = None
    """A word enters the vocabulary when the captions hold it at least this often (train, or where there is none).
    Without it 4, or on small data the highest lower value at which the vocabulary covers 90 % of all words in them."""
    size: Pixels = 256
    """Sides in pixels that images are squashed to when training reads them."""
