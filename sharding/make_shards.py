"""Pack pictures and captions into tar shards, with a vocabulary and a manifest.

    python sharding/make_shards.py                                   # COCO in data/coco, into data/shards
    python sharding/make_shards.py --images photos --captions photos/captions_train.json --output shards

Pictures are turned upright, made RGB, squashed to --size and stored as JPEG with all their captions, one sample a
picture. Running it again completes what is missing and reuses what is there. What cannot be packed is counted by
reason and listed in SPLIT.failures.jsonl. Next: accelerate launch train/main.py
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from captioner import cli, images, storage
from captioner.cli import UserError
from captioner.shards import Manifest, manifest_location, read_manifest
from captioner.vocabulary import Vocabulary, count_words
from sharding.engine import run_local
from sharding.pack import PackedShard, read_tokens
from sharding.plan import PixelSettings, ShardPlan, plan_shards
from sharding.settings import ShardSettings
from sharding.sources import Failure, Source, find_sources, read_records


def main(settings: ShardSettings) -> None:
    """Pack every wanted split, training first, since the others need its vocabulary."""
    check_settings(settings)
    given_vocabulary = read_vocabulary(settings.vocabulary) if settings.vocabulary else None
    pixels = PixelSettings(size=settings.size, quality=settings.quality)
    sources = find_sources(images=settings.images, captions=settings.captions, split=settings.split)
    rows = []
    for source in sources:
        started = time.monotonic()
        needs_vocabulary(source.split, settings)
        records, failures = read_records(source)
        plans = plan_shards(source.split, records, pixels=pixels, shard_megabytes=settings.shard_megabytes)
        draft = draft_manifest(source, plans, settings=settings)
        refuse_mixing(draft, settings.output)
        shards = pack_split(plans, settings.output, split=source.split, workers=settings.workers)
        failures += [failure for shard in shards for failure in shard.failures]
        if source.split == "train" or settings.vocabulary:
            write_vocabulary(given_vocabulary, shards, settings)
        manifest = finish(draft, shards, failures, settings.output)
        rows.append(summary_row(manifest, shards, seconds=time.monotonic() - started))
    header = ("split", "samples", "captions", "shards", "MB", "reused", "failures", "seconds", "images/s")
    cli.print_table(f"{settings.output} ({images.BACKEND}, {settings.workers} workers)", header, rows)


def check_settings(settings: ShardSettings) -> None:
    """Raise UserError for numbers that make no sense."""
    if not 1 <= settings.quality <= 100:
        raise UserError(f"--quality {settings.quality} is not a JPEG quality: give 1 to 100")
    for name in ("size", "shard_megabytes", "threshold", "workers"):
        if getattr(settings, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(settings, name)} is too small: give at least 1")


def needs_vocabulary(split: str, settings: ShardSettings) -> None:
    """Raise UserError when a held-out split would be packed before the training captions gave their words."""
    location = storage.join(settings.output, "vocabulary.json")
    if split != "train" and settings.vocabulary is None and not storage.exists(location):
        raise UserError(
            f"split {split} needs the training vocabulary, and there is no {location}: "
            "pack --split train first, or give --vocabulary FILE"
        )


# ---- manifest ---------------------------------------------------------------------------------------------


def draft_manifest(source: Source, plans: Sequence[ShardPlan], *, settings: ShardSettings) -> Manifest:
    """The manifest as far as it is known before packing."""
    made_with = {
        "size": settings.size,
        "resize": "squash",
        "quality": settings.quality,
        "shard_megabytes": settings.shard_megabytes,
    }
    fingerprints = [plan.fingerprint for plan in plans]
    return Manifest(
        split=source.split,
        shards=(),
        settings=made_with,
        source={**asdict(source), "records": sum(len(plan.records) for plan in plans)},
        failures={},
        fingerprint=hashlib.sha256(json.dumps(fingerprints).encode()).hexdigest(),
    )


def refuse_mixing(draft: Manifest, folder: str) -> None:
    """Raise UserError when `folder` holds this split complete, but made from other settings or captions."""
    if not storage.exists(manifest_location(folder, draft.split)):
        return
    old = read_manifest(folder, draft.split, remedy=f"give another --output than {folder}")
    if old.fingerprint == draft.fingerprint:
        return
    differing = _differences(old.settings | old.source, draft.settings | draft.source)
    raise UserError(
        f"{folder} already holds split {draft.split} made differently ({differing or 'captions or names changed'}): "
        f"give another --output, or delete {storage.join(folder, draft.split)}* to pack it anew"
    )


def _differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    return ", ".join(f"{name} was {old.get(name)}, is {new[name]}" for name in new if old.get(name) != new[name])


def finish(draft: Manifest, shards: Sequence[PackedShard], failures: Sequence[Failure], folder: str) -> Manifest:
    """Write the failures' list and, last of all, the manifest."""
    lines = "".join(json.dumps(asdict(failure)) + "\n" for failure in failures)
    storage.write_atomic(storage.join(folder, f"{draft.split}.failures.jsonl"), lines)
    manifest = Manifest(
        split=draft.split,
        shards=tuple(shard.entry for shard in shards),
        settings=draft.settings | {"backend": images.BACKEND},
        source=draft.source,
        failures=dict(sorted(Counter(failure.reason for failure in failures).items())),
        fingerprint=draft.fingerprint,
    )
    storage.write_atomic(manifest_location(folder, draft.split), manifest.to_json())
    return manifest


# ---- packing ----------------------------------------------------------------------------------------------


def pack_split(plans: Sequence[ShardPlan], folder: str, *, split: str, workers: int) -> list[PackedShard]:
    """All shards of a split, in the plan's order, packed under one progress bar."""
    done: dict[str, PackedShard] = {}
    total = sum(len(plan.records) for plan in plans)
    num_failures = 0
    with cli.progress_bar(f"packing {split}", total=total, unit="images") as bar:
        for shard in run_local(plans, folder, workers=workers):
            done[shard.entry.name] = shard
            num_failures += len(shard.failures)
            bar.advance(shard.entry.samples + len(shard.failures), note=f"{num_failures} failed")
    return [done[plan.name] for plan in plans]


def read_vocabulary(location: str) -> Vocabulary:
    """The vocabulary that the user gives, read before anything is packed. Raises UserError."""
    try:
        text = storage.read_bytes(location).decode()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read --vocabulary {location} ({error}): give a packed vocabulary.json") from error
    return Vocabulary.from_json(text, origin=location)


def write_vocabulary(given: Vocabulary | None, shards: Sequence[PackedShard], settings: ShardSettings) -> None:
    """Write vocabulary.json: the given one, or that of the packed training captions."""
    location = storage.join(settings.output, "vocabulary.json")
    vocabulary = given
    if vocabulary is None:
        tokens = (tokens for shard in shards for tokens in read_tokens(settings.output, shard.entry.name))
        vocabulary = Vocabulary.from_counts(count_words(tokens), threshold=settings.threshold)
    storage.write_atomic(location, vocabulary.to_json())
    cli.console.print(f"vocabulary: {len(vocabulary):,} words, 4 of them special")


def summary_row(manifest: Manifest, shards: Sequence[PackedShard], *, seconds: float) -> tuple[object, ...]:
    """A row of the closing table."""
    num_images = sum(shard.entry.samples for shard in shards if not shard.reused)
    failures = ", ".join(f"{count} {reason}" for reason, count in manifest.failures.items())
    return (
        manifest.split,
        manifest.num_samples,
        sum(shard.captions for shard in manifest.shards),
        len(manifest.shards),
        sum(shard.bytes for shard in manifest.shards) / 1e6,
        sum(shard.reused for shard in shards),
        failures or "none",
        seconds,
        num_images / seconds,
    )


def run() -> None:
    """The console entry."""
    cli.run(main, ShardSettings, description=__doc__ or "")


if __name__ == "__main__":
    run()
