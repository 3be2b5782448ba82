"""A split of one or several dataset folders as one sequence of shards. Imports no torch."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from captioner.errors import StreamingError, UserError
from captioner.files import storage
from captioner.shards.format import NOT_A_FOLDER, Manifest, ShardEntry, read_manifest

NOT_THERE = "index its tars with index_shards"


@dataclass(frozen=True)
class Split:
    """The shards of one or several manifests, one manifest after the other."""

    name: str
    folders: tuple[str, ...]
    manifests: tuple[Manifest, ...]

    @cached_property
    def shards(self) -> list[tuple[str, ShardEntry]]:
        """Each shard's folder and manifest entry."""
        pairs = zip(self.folders, self.manifests, strict=True)
        return [(folder, entry) for folder, manifest in pairs for entry in manifest.shards]

    def only(self, numbers: Sequence[int]) -> "Split":
        """A split of the shards with these numbers, in this order."""
        pairs = [self.shards[number] for number in numbers]
        manifest_of = dict(zip(self.folders, self.manifests, strict=True))
        manifests = tuple(replace(manifest_of[folder], shards=(entry,)) for folder, entry in pairs)
        return Split(self.name, tuple(folder for folder, _ in pairs), manifests)

    @property
    def num_samples(self) -> int:
        """How many samples all shards have."""
        return sum(manifest.num_samples for manifest in self.manifests)

    @property
    def bytes(self) -> int:
        """How many bytes all shards have."""
        return sum(entry.bytes for _, entry in self.shards)

    @cached_property
    def fingerprint(self) -> str:
        """Hex sha256 of all that decides which sample has which number."""
        content = [[entry.sha256, entry.samples, entry.fingerprint] for _, entry in self.shards]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @cached_property
    def sizes(self) -> list[int]:
        """How many samples each shard has."""
        return [entry.samples for _, entry in self.shards]


def read_split(folders: Sequence[str], name: str, *, remedy: str = NOT_THERE) -> Split:
    """The split of all `folders`.

    Raises UserError, with `remedy`, if a folder has no such split, and StreamingError if two have the same shard.
    """
    if not folders:
        raise StreamingError("there is no dataset folder: give at least one")
    for folder in folders:
        if not storage.is_remote(folder) and Path(folder).is_file():
            raise UserError(NOT_A_FOLDER.format(folder))
        if not storage.is_remote(folder) and not Path(folder).exists():
            raise UserError(f"there is no folder {folder}: check the path, or {remedy}")
    split = Split(name, tuple(folders), tuple(read_manifest(folder, name, remedy=remedy) for folder in folders))
    counts = Counter(entry.sha256 for _, entry in split.shards if entry.samples)
    twice = [f"{folder}/{entry.name}" for folder, entry in split.shards if counts[entry.sha256] > 1]
    if twice:
        raise StreamingError(f"the same shards are given twice ({', '.join(twice[:4])}): give each folder once")
    return split


def check_filled(split: Split) -> None:
    """Raise StreamingError for a split without samples."""
    if not split.num_samples:
        raise StreamingError(
            f"the {split.name} split in {split.folders[0]} holds no samples: see its {split.name}.failures.jsonl, or "
            "give another split"
        )
