"""The epoch plan to batches: a webdataset pipeline that reads planned samples, views them and packs their captions.

Each worker process makes whole batches of its rank: worker k of K makes every K-th, so that batches reach the
training loop in the plan's order. Batches leave a worker as uint8 views and packed token ids.
"""

import mmap
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from captioner import images, storage, views
from captioner.cli import UserError
from captioner.model import PackedCaptions
from captioner.shards import PACK_AGAIN, Manifest, ShardIndex, read_content
from captioner.vocabulary import Vocabulary
from train.plan import EpochPlan, SampleRef, num_steps, rank_positions

DAMAGED = f"restore the file or {PACK_AGAIN}"


@dataclass(frozen=True, slots=True)
class Batch:
    """A rank's share of a global batch: B uint8 views (B, P, P, 3) with all their captions.

    A rank that the last, partial batch does not reach gets a filler: one black view and an empty caption, with
    `num_samples` 0, so that it can join the step with zero loss. `references` are the raw captions.
    """

    views_BPP3: Tensor
    captions: PackedCaptions
    keys: list[str]
    image_ids: list[int | str]
    references: list[list[str]]
    num_samples: int
    num_cut: int

    def to(self, device: torch.device) -> "Batch":
        """The batch with its tensors on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The batch with its tensors in page-locked memory (the loader calls this when there is a GPU)."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Any) -> "Batch":
        return Batch(
            change(self.views_BPP3),
            self.captions.map(change),
            self.keys,
            self.image_ids,
            self.references,
            self.num_samples,
            self.num_cut,
        )


@dataclass(frozen=True, slots=True)
class Share:
    """Which part of every global batch, of `global_batch` images, is this process's."""

    global_batch: int
    rank: int
    world_size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewRules:
    """How samples become model input: `training` views are cropped at random and sometimes mirrored."""

    crop: int
    max_tokens: int
    training: bool


# ---- the pipeline's stages ----------------------------------------------------------------------------------


class PlannedBatches(IterableDataset[list[SampleRef]]):
    """The pipeline's source: this worker's batches of sample places, in order; an empty one where there is no share."""

    def __init__(self, plan: EpochPlan, share: Share, *, first_step: int) -> None:
        self.plan = plan
        self.share = share
        self.first_step = first_step

    def __iter__(self) -> Iterator[list[SampleRef]]:
        worker = get_worker_info()
        offset, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        total = num_steps(self.plan.num_samples, global_batch=self.share.global_batch)
        for step in range(self.first_step + offset, total, stride):
            positions = rank_positions(
                step,
                num_samples=self.plan.num_samples,
                global_batch=self.share.global_batch,
                rank=self.share.rank,
                world_size=self.share.world_size,
            )
            yield self.plan.refs(positions)


class ShardReader:
    """Reads single samples out of a split's shards, each member checked against the index's checksum."""

    def __init__(self, folder: str, manifest: Manifest) -> None:
        self.folder = folder
        self.names = [shard.name for shard in manifest.shards]
        self.sizes = [shard.bytes for shard in manifest.shards]
        self.num_samples = [shard.samples for shard in manifest.shards]
        self.squash_to = manifest.settings["size"] if manifest.settings.get("resize") == "none" else None
        self._open: dict[int, tuple[ShardIndex, mmap.mmap | bytes]] = {}

    def read(self, ref: SampleRef) -> dict[str, Any]:
        """A sample in webdataset's form: `__key__`, `__url__`, `jpg`, `json`, and its `position` in the epoch.

        Raises UserError for a missing or damaged shard.
        """
        index, data = self._open.get(ref.shard) or self._open_shard(ref.shard)
        key = index.key(ref.place)
        members = []
        for column in (0, 1):
            offset, size = int(index.offsets_S2[ref.place, column]), int(index.sizes_S2[ref.place, column])
            content = data[offset : offset + size]
            if zlib.crc32(content) != index.crc32s_S2[ref.place, column]:
                raise UserError(f"{self._location(ref.shard)} is damaged at sample {key} (checksum differs): {DAMAGED}")
            members.append(content)
        url = self._location(ref.shard)
        return {
            "__key__": key,
            "__url__": url,
            "jpg": members[0],
            "json": members[1],
            "position": ref.position,
        }

    def _location(self, shard: int) -> str:
        return storage.join(self.folder, f"{self.names[shard]}.tar")

    def _open_shard(self, shard: int) -> tuple[ShardIndex, mmap.mmap | bytes]:
        location = self._location(shard)
        origin = storage.join(self.folder, f"{self.names[shard]}.index")
        try:
            index = ShardIndex.from_bytes(storage.read_bytes(origin), origin=origin)
            data = storage.read_bytes(location) if storage.is_remote(location) else _map_file(Path(location))
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read shard {location} ({error}): {DAMAGED}") from error
        if len(data) != self.sizes[shard]:
            raise UserError(f"{location} has {len(data):,} bytes, its manifest says {self.sizes[shard]:,}: {DAMAGED}")
        if len(index) != self.num_samples[shard]:
            raise UserError(f"{origin} lists {len(index)} samples, the manifest {self.num_samples[shard]}: {DAMAGED}")
        self._open[shard] = (index, data)
        return index, data


def _map_file(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def decode_sample(sample: dict[str, Any], *, squash_to: int | None = None) -> dict[str, Any]:
    """The same sample with `jpg` as (height, width, 3) uint8 pixels and `json` parsed.

    `squash_to` is the size of pictures that were stored as they are; others have theirs already.
    """
    key, data = sample["__key__"], sample["jpg"]
    try:
        if squash_to is None:
            image, _ = images.decode_rgb(data)
        else:
            image, _ = images.load_resized(data, size=squash_to, resize="squash")
    except images.ImageError as error:
        raise UserError(f"sample {key} in {sample['__url__']} is not a picture ({error}): {DAMAGED}") from error
    try:
        content = read_content(sample["json"], key=key)
    except ValueError as error:
        raise UserError(f"sample {key} in {sample['__url__']} has no captions ({error}): {DAMAGED}") from error
    return sample | {"jpg": np.asarray(image), "json": content}


def view_sample(sample: dict[str, Any], rules: ViewRules, *, seed: int, epoch: int) -> dict[str, Any]:
    """The same sample with `jpg` as a (P, P, 3) view; chance depends on (seed, epoch, position) alone."""
    pixels_SS3 = sample["jpg"]
    if min(pixels_SS3.shape[:2]) < rules.crop:
        raise UserError(
            f"the shards hold pictures of {pixels_SS3.shape[1]}x{pixels_SS3.shape[0]}: give a smaller --crop"
        )
    if not rules.training:
        return sample | {"jpg": views.eval_view(pixels_SS3, crop=rules.crop)}
    rng = np.random.default_rng([seed, epoch, sample["position"]])
    may_flip = not any(views.speaks_of_sides(tokens) for tokens in sample["json"]["tokens"])
    return sample | {"jpg": views.train_view(pixels_SS3, crop=rules.crop, rng=rng, may_flip=may_flip)}


def collate(samples: list[dict[str, Any]], rules: ViewRules, vocabulary: Vocabulary) -> Batch:
    """Samples to a batch; none at all to a filler."""
    contents = [sample["json"] for sample in samples]
    tokens = [[vocabulary.encode(caption) for caption in content["tokens"]] for content in contents]
    pixels = [sample["jpg"] for sample in samples] or [np.zeros((rules.crop, rules.crop, 3), dtype=np.uint8)]
    return Batch(
        views_BPP3=torch.from_numpy(np.stack(pixels)),
        captions=PackedCaptions.pack(tokens or [[[]]], max_tokens=rules.max_tokens),
        keys=[sample["__key__"] for sample in samples],
        image_ids=[content["image_id"] for content in contents],
        references=[content["captions"] for content in contents],
        num_samples=len(samples),
        num_cut=sum(len(caption) > rules.max_tokens for captions in tokens for caption in captions),
    )


class MakeBatches:
    """The pipeline's last stages: places to samples to views to a batch. A UserError travels as an item."""

    def __init__(self, reader: ShardReader, rules: ViewRules, vocabulary: Vocabulary, plan: EpochPlan) -> None:
        self.reader = reader
        self.rules = rules
        self.vocabulary = vocabulary
        self.seed, self.epoch = plan.seed, plan.epoch

    def __call__(self, batches: Iterable[list[SampleRef]]) -> Iterator[Batch | UserError]:
        try:
            for refs in batches:
                samples = (decode_sample(self.reader.read(ref), squash_to=self.reader.squash_to) for ref in refs)
                viewed = [view_sample(s, self.rules, seed=self.seed, epoch=self.epoch) for s in samples]
                yield collate(viewed, self.rules, self.vocabulary)
        except UserError as error:  # raised in a worker it would reach the user wrapped in a traceback
            yield error


def stream(
    folder: str,
    manifest: Manifest,
    *,
    plan: EpochPlan,
    share: Share,
    rules: ViewRules,
    vocabulary: Vocabulary,
    workers: int,
    first_step: int = 0,
) -> Iterator[Batch]:
    """This rank's batches of one epoch, one for every global step from `first_step` on.

    Raises UserError for a missing or damaged shard.
    """
    stages = MakeBatches(ShardReader(folder, manifest), rules, vocabulary, plan)
    pipeline: Any = wds.DataPipeline(PlannedBatches(plan, share, first_step=first_step), stages)
    loader = DataLoader(
        pipeline,
        batch_size=None,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if workers else None,
    )
    for item in loader:
        if isinstance(item, UserError):
            raise item
        yield item
