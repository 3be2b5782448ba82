"""Records to shards: the order of a split's samples, and which shard holds which. No picture is opened."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from captioner.files.storage import UNKNOWN
from captioner.images.loading import Resize
from captioner.shards.format import FORMAT_VERSION, sample_key, shard_name
from captioner.shards.splitmix import random_order
from sharding.packing.sources import Record

ORDER_SEED = 0
CAPTION_BYTES = 2_000  # a sample's JSON and the headers of its two members
TYPICAL_FILE_BYTES = 200_000  # of a picture whose server does not tell its size
KEEP_RATIO_AREA = 4 / 3  # photographs' usual sides


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What decides the shards beside their input: sides in pixels, how a picture is brought to them, JPEG quality."""

    size: int
    resize: Resize
    quality: int
    shard_megabytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardPlan:
    """One shard to make: its name, and the records in order with their keys and the sizes of their files.

    `file_bytes` has None for a picture that is not there, and UNKNOWN where a server does not tell.
    """

    name: str
    images: str
    keys: tuple[str, ...]
    records: tuple[Record, ...]
    file_bytes: tuple[int | None, ...]
    recipe: Recipe
    estimated_bytes: int

    @property
    def split(self) -> str:
        """The split that the shard belongs to."""
        return self.name.rpartition("-")[0]

    @property
    def fingerprint(self) -> str:
        """Hex sha256 of what decides the shard's bytes: settings, captions, names and sizes of the pictures.

        Where the pictures lie does not count, so that a moved folder is the same input. A picture that was changed
        to another of exactly as many bytes is not noticed.
        """
        # as asdict gives them, which would copy every caption
        records = [{name: getattr(record, name) for name in Record.__slots__} for record in self.records]
        content = [FORMAT_VERSION, asdict(self.recipe), self.keys, records, self.file_bytes]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def estimate_sample_bytes(recipe: Recipe, file_bytes: Sequence[int | None]) -> int:
    """About a sample's bytes in a shard; measured on COCO: 0.62 bytes a pixel at quality 95."""
    if recipe.resize == "none":
        known = [TYPICAL_FILE_BYTES if size == UNKNOWN else size for size in file_bytes if size is not None]
        return sum(known) // max(1, len(known)) + CAPTION_BYTES
    bytes_per_pixel = 0.25 + 0.37 * max(0.0, (recipe.quality - 75) / 20) ** 2
    area = recipe.size**2 * (KEEP_RATIO_AREA if recipe.resize == "keep-ratio" else 1)
    return round(area * bytes_per_pixel) + CAPTION_BYTES


def plan_shards(
    split: str,
    records: Sequence[Record],
    *,
    images: str,
    file_bytes: Sequence[int | None],
    recipe: Recipe,
) -> list[ShardPlan]:
    """Cut the records into shards of equal length (the last is shorter); training records are shuffled first.

    A function of its arguments alone: the same records give the same shards on any machine.
    """
    ordered = list(zip(records, file_bytes, strict=True))
    if split == "train":
        ordered = [ordered[place] for place in random_order(len(ordered), ORDER_SEED).tolist()]
    sample_bytes = estimate_sample_bytes(recipe, file_bytes)
    per_shard = max(1, recipe.shard_megabytes * 1_000_000 // sample_bytes)
    plans = []
    for number, first in enumerate(range(0, len(ordered), per_shard)):
        part = ordered[first : first + per_shard]
        plans.append(
            ShardPlan(
                name=shard_name(split, number),
                images=images,
                keys=tuple(sample_key(split, first + place) for place in range(len(part))),
                records=tuple(record for record, _ in part),
                file_bytes=tuple(size for _, size in part),
                recipe=recipe,
                estimated_bytes=sample_bytes * len(part),
            )
        )
    return plans
