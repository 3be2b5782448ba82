"""The packing command's flags."""

import os
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "val", "test"]


@dataclass(frozen=True, kw_only=True)
class ShardSettings:
    """Which pictures and captions to pack, how, and where to."""

    images: str = "data/coco"
    """Folder of the pictures; a caption file `captions_train2014.json` finds its own in `train2014/` below it."""
    captions: str = "data/coco/annotations"
    """COCO captions or Karpathy's JSON; or a folder of `captions_SPLIT*.json`, all of whose splits are packed."""
    output: str = "data/shards"
    """Dataset folder (or URL) that receives shards, vocabulary and manifests."""
    split: Split | None = None
    """Pack only this split; without it all that are found, training first."""
    size: int = 256
    """Sides of a stored picture in pixels; its sides' ratio is not kept, as in the book."""
    quality: int = 95
    """JPEG quality of stored pictures."""
    shard_megabytes: int = 64
    """About how large a shard becomes."""
    threshold: int = 4
    """A word enters the vocabulary when the training captions hold it at least this often."""
    vocabulary: str | None = None
    """Use this vocabulary.json instead of making one from the training captions."""
    workers: int = os.cpu_count() or 1
    """Processes that pack; the shards' bytes do not depend on it."""
