"""Writes a dataset folder, one process at a time: indexes, the list of failures and, last, the manifest."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from captioner.errors import UserError
from captioner.files import storage
from captioner.files.ownership import owned
from captioner.shards.format import NOT_KEPT, Failure, Manifest, ShardEntry, manifest_location


def claim_location(folder: str, split: str) -> str:
    """The file or object that exists while a split is packed."""
    return storage.join(folder, f"{split}.packing")


@contextmanager
def claim(folder: str, split: str) -> Iterator[None]:
    """Own `split` in `folder` while it is packed. Raises UserError if another process does."""
    with owned(claim_location(folder, split), doing="is packing this split into this folder"):
        _sweep(folder, split)
        try:
            yield
        finally:
            _sweep(folder, split)


def _sweep(folder: str, split: str) -> None:
    """Delete the partial files of a killed packer of this split; the vocabulary belongs to the train split."""
    if storage.is_remote(folder):
        return
    for pattern in (f"{split}[-.]*.partial", *(["vocabulary.json.*.partial"] if split == "train" else [])):
        for path in Path(folder).glob(pattern):
            with suppress(OSError):
                path.unlink()


def write(location: str, content: bytes | str) -> None:
    """Write a file of the dataset folder. Raises UserError."""
    with writing(location):
        storage.write_atomic(location, content)


@contextmanager
def writing(location: str) -> Iterator[str]:
    """Raise UserError for an OSError while a file of the dataset folder is written."""
    try:
        yield location
    except OSError as error:
        raise UserError(
            f"cannot write {location} ({error.strerror or error}): fix this (is the disk full or read-only?) and run "
            "the same command again; finished shards are kept"
        ) from error


def write_manifest(
    folder: str,
    split: str,
    entries: Sequence[ShardEntry],
    *,
    failures: Sequence[Failure],
    num_not_kept: int = 0,
    settings: dict[str, Any],
    source: dict[str, Any],
) -> Manifest:
    """Write the list of failures and then the manifest, which adds `records` to `source`. Raises UserError.

    `num_not_kept` samples were left out by `keep`; the manifest counts them, and the list does not name them.
    """
    manifest = Manifest(
        split=split,
        shards=tuple(entries),
        settings=settings,
        source=source | {"records": sum(entry.samples + entry.failures for entry in entries)},
        failures=count_reasons(failures, num_not_kept=num_not_kept),
        fingerprint=manifest_fingerprint(entries),
    )
    lines = "".join(json.dumps(asdict(failure)) + "\n" for failure in failures)
    write(storage.join(folder, f"{split}.failures.jsonl"), lines)
    write(manifest_location(folder, split), manifest.to_json())
    return manifest


def count_reasons(failures: Sequence[Failure], *, num_not_kept: int) -> dict[str, int]:
    """How many samples were left out, by reason."""
    reasons = Counter({NOT_KEPT: num_not_kept}) if num_not_kept else Counter()
    reasons.update(failure.reason for failure in failures)
    return dict(sorted(reasons.items()))


def manifest_fingerprint(shards: Sequence[ShardEntry]) -> str:
    """The fingerprint of a manifest with these shards."""
    return hashlib.sha256(json.dumps([shard.fingerprint for shard in shards]).encode()).hexdigest()
