"""A tiny COCO layout made on the spot: small random pictures with captions, for tests of any stage."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from captioner.files import storage
from captioner.shards.format import sample_key, shard_name
from sharding.packing.finish import write_manifest, write_vocabulary
from sharding.packing.pack import pack_shard
from sharding.packing.planning import Recipe, ShardPlan
from sharding.packing.sources import Record

SUBJECTS = ("a cat", "two dogs", "the man", "a woman's bicycle", "an old red bus")
SCENES = ("on a table.", "in the grass", "near the sea, at night", "doesn't move", "(seen from above)")


def picture(seed: int, *, width: int = 48, height: int = 36) -> Image.Image:
    """A random picture with large smooth patches, another one for each seed."""
    patches = np.random.default_rng(seed).integers(0, 256, size=(3, 4, 3), dtype=np.uint8)
    return Image.fromarray(patches).resize((width, height), Image.Resampling.BICUBIC)


def captions_of(seed: int) -> list[str]:
    """Two to five captions, the same for the same seed."""
    rng = Random(seed)
    return [f"{rng.choice(SUBJECTS).capitalize()} {rng.choice(SCENES)}" for _ in range(rng.randint(2, 5))]


def write_coco(folder: Path, *, num_train: int = 6, num_val: int = 3) -> Path:
    """Write `train2014/`, `val2014/` and `annotations/captions_*2014.json` as COCO has them; returns `folder`."""
    for split, first_id, num_pictures in (("train", 1, num_train), ("val", 1001, num_val)):
        if num_pictures:
            write_split(folder, split, range(first_id, first_id + num_pictures))
    return folder


def write_split(folder: Path, split: str, image_ids: range) -> None:
    """One split's pictures and caption file; each picture has sides of its own, the id is the random seed."""
    name = f"{split}2014"
    (folder / name).mkdir(parents=True)
    (folder / "annotations").mkdir(exist_ok=True)
    images, annotations = [], []
    for image_id in image_ids:
        file_name = f"COCO_{name}_{image_id:012d}.jpg"
        width, height = 40 + image_id % 17, 32 + image_id % 5
        picture(image_id, width=width, height=height).save(folder / name / file_name, quality=95)
        images.append({"id": image_id, "file_name": file_name, "width": width, "height": height})
        annotations += [
            {"id": image_id * 10 + number, "image_id": image_id, "caption": caption}
            for number, caption in enumerate(captions_of(image_id))
        ]
    write_captions(folder / "annotations" / f"captions_{name}.json", images=images, annotations=annotations)


def write_captions(path: Path, *, images: list[dict], annotations: list[dict]) -> None:
    """A caption file in COCO's form."""
    path.write_text(json.dumps({"info": {}, "images": images, "annotations": annotations}))


def write_shards(folder: Path, sizes: Sequence[int], *, split: str = "train", size: int = 32, first: int = 0) -> str:
    """A complete split of shards with exactly these numbers of samples, in `folder`, which is returned.

    Pictures and captions are those of the seeds from `first` on.
    """
    pictures = folder / f"{split}-pictures"
    pictures.mkdir(parents=True)
    numbers = iter(range(first, first + sum(sizes)))
    recipe = Recipe(size=size, resize="squash", quality=95, shard_megabytes=64)
    shards = []
    for shard, num_samples in enumerate(sizes):
        own = list(islice(numbers, num_samples))
        for number in own:
            picture(number).save(pictures / f"{number}.png")
        plan = ShardPlan(
            name=shard_name(split, shard),
            keys=tuple(sample_key(split, number) for number in own),
            records=tuple(
                Record(
                    image_id=number,
                    file_name=f"{number}.png",
                    captions=tuple(captions_of(number)),
                    annotation_ids=(None,) * len(captions_of(number)),
                )
                for number in own
            ),
            images=str(pictures),
            file_bytes=(storage.UNKNOWN,) * num_samples,
            recipe=recipe,
            estimated_bytes=0,
        )
        shards.append(pack_shard(plan, str(folder)))
    if split == "train" and any(sizes):
        write_vocabulary(str(folder), shards, threshold=1)
    write_manifest(str(folder), split, shards, recipe=asdict(recipe), source={})
    return str(folder)
