"""A split of one or several dataset folders as one sequence of shards. Imports no torch."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from captioner import storage
from captioner.cli import UserError
from captioner.shards import Manifest, ShardEntry, manifest_location, read_manifest
from captioner.views import ViewSpec
from captioner.vocabulary import Vocabulary, read_vocabulary
from train.plan import SHUFFLE_SHARDS, EpochPlan

PLAIN_SHARDS = 4  # that are read from at once in the shards' own order: each worker is in another batch


@dataclass(frozen=True)
class Split:
    """The shards of the folders' manifests, one manifest after the other."""

    name: str
    folders: tuple[str, ...]
    manifests: tuple[Manifest, ...]

    @cached_property
    def shards(self) -> list[tuple[str, ShardEntry]]:
        """Each shard's folder and manifest entry."""
        pairs = zip(self.folders, self.manifests, strict=True)
        return [(folder, entry) for folder, manifest in pairs for entry in manifest.shards]

    @cached_property
    def stored_sizes(self) -> list[int | None]:
        """For each shard the size to squash its pictures to on reading; None where packing has done so."""
        return [
            manifest.settings["size"] if manifest.settings.get("resize") == "none" else None
            for manifest in self.manifests
            for _ in manifest.shards
        ]

    def only(self, numbers: Sequence[int]) -> "Split":
        """The split of some of the shards, given by their numbers, in the order of these."""
        pairs = [self.shards[number] for number in numbers]
        manifest_of = dict(zip(self.folders, self.manifests, strict=True))
        manifests = tuple(replace(manifest_of[folder], shards=(entry,)) for folder, entry in pairs)
        return Split(self.name, tuple(folder for folder, _ in pairs), manifests)

    @property
    def num_samples(self) -> int:
        """Samples of all shards."""
        return sum(manifest.num_samples for manifest in self.manifests)

    @property
    def bytes(self) -> int:
        """Bytes of all shards."""
        return sum(entry.bytes for _, entry in self.shards)

    @cached_property
    def fingerprint(self) -> str:
        """Hex sha256 of what decides which sample stands where."""
        content = [[entry.sha256, entry.samples] for _, entry in self.shards]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def plan(self, *, seed: int, epoch: int, global_batch: int, shuffle_shards: int = SHUFFLE_SHARDS) -> EpochPlan:
        """An epoch's order."""
        sizes = [entry.samples for _, entry in self.shards]
        return EpochPlan(
            shard_sizes=sizes, seed=seed, epoch=epoch, global_batch=global_batch, shuffle_shards=shuffle_shards
        )

    def plain_plan(self, *, every: int = 1) -> EpochPlan:
        """The shards' own order, for evaluation; of `every` so many neighbours the first."""
        sizes = [entry.samples for _, entry in self.shards]
        return EpochPlan(shard_sizes=sizes, shuffle_shards=PLAIN_SHARDS, shuffled=False, every=every)


def read_split(folders: Sequence[str], name: str, *, remedy: str) -> Split:
    """The split of all `folders`.

    Raises UserError, with `remedy`, where one of them does not hold it, and where two hold the same shard.
    """
    if not folders:
        raise UserError("--shards names no folder: give at least one")
    split = Split(name, tuple(folders), tuple(read_manifest(folder, name, remedy=remedy) for folder in folders))
    counts = Counter(entry.sha256 for _, entry in split.shards if entry.samples)
    twice = [f"{folder}/{entry.name}" for folder, entry in split.shards if counts[entry.sha256] > 1]
    if twice:
        raise UserError(f"--shards names the same shards twice ({', '.join(twice[:4])}): name each folder once")
    return split


def check_filled(split: Split) -> None:
    """Raise UserError for a split without samples: nothing could be done with it."""
    if not split.num_samples:
        raise UserError(
            f"the {split.name} split in {split.folders[0]} holds no samples: see its {split.name}.failures.jsonl, or "
            "give another --split"
        )


def read_data(folders: Sequence[str], *, remedy: str) -> tuple[Split, Split | None, Vocabulary]:
    """The train and val splits of all folders, and their vocabulary. Raises UserError."""
    train, val = read_split(folders, "train", remedy=remedy), read_validation(folders, remedy=remedy)
    return train, val, read_merged_vocabulary(folders, remedy=remedy)


def read_validation(folders: Sequence[str], *, remedy: str) -> Split | None:
    """The val split of those folders that hold one; None where none does, or where it is empty."""
    found = [folder for folder in folders if storage.exists(manifest_location(folder, "val"))]
    split = read_split(found, "val", remedy=remedy) if found else None
    return split if split and split.num_samples else None


def read_merged_vocabulary(folders: Sequence[str], *, remedy: str) -> Vocabulary:
    """The folders' vocabulary; of several, the words of all, their counts added up."""
    found = [read_vocabulary(storage.join(folder, "vocabulary.json"), remedy=remedy) for folder in folders]
    if all(vocabulary.fingerprint == found[0].fingerprint for vocabulary in found):
        return found[0]
    counts: Counter[str] = Counter()
    for vocabulary in found:
        counts.update(dict(zip(vocabulary.words, vocabulary.counts, strict=True)))
    return Vocabulary.from_counts(counts, threshold=min(vocabulary.threshold for vocabulary in found))


def read_view(splits: Sequence[Split], *, crop: int) -> ViewSpec:
    """How the pictures came to their size, and a crop; those stored as they are are squashed on reading.

    Raises UserError where pictures came to their size in different ways.
    """
    first = None
    for split in splits:
        for folder, manifest in zip(split.folders, split.manifests, strict=True):
            size, resize = manifest.settings["size"], manifest.settings["resize"]
            view = ViewSpec(size=size, resize="squash" if resize == "none" else resize, crop=crop)
            first = first or (view, folder, split.name)
            if view != first[0]:
                raise UserError(
                    f"the {first[2]} pictures in {first[1]} have size {first[0].size} ({first[0].resize}), the "
                    f"{split.name} pictures in {folder} {size} ({view.resize}): pack all with the same --size and "
                    "--resize"
                )
    assert first is not None
    return first[0]


def check_fits(model_view: ViewSpec, shards_view: ViewSpec) -> None:
    """Raise UserError where the shards' pictures were not resized as a trained model is used to."""
    if (shards_view.size, shards_view.resize) != (model_view.size, model_view.resize):
        raise UserError(
            f"the shards hold pictures of size {shards_view.size} ({shards_view.resize}), and the trained model sees "
            f"size {model_view.size} ({model_view.resize}): pack them with sharding/make_shards.py --size "
            f"{model_view.size} --resize {model_view.resize}"
        )
