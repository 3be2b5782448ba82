"""What packing and indexing print: the plan, and what the finished splits hold."""

from collections import Counter
from collections.abc import Sequence

from captioner import cli
from captioner.files import storage
from captioner.shards.format import Failure
from sharding.packing.pack_split import PackedSplit, find_ready
from sharding.packing.planning import ShardPlan
from sharding.packing.sources import failure_text

SHOWN_NAMES = 5


def show_plan(planned: Sequence[tuple[str, list[ShardPlan], list[Failure]]], folder: str) -> None:
    """Print what would be packed into `folder`, for each split, and write nothing."""
    rows = []
    missing = []
    for split, plans, failures in planned:
        sizes = [size for plan in plans for size in plan.file_bytes]
        names = [record.file_name for plan in plans for record in plan.records]
        missing += [name for name, size in zip(names, sizes, strict=True) if size is None]
        reasons = Counter(failure.reason for failure in failures) + Counter(missing=sizes.count(None))
        rows.append(
            (
                split,
                len(sizes),
                len(plans),
                sum(plan.estimated_bytes for plan in plans) / 1e6,
                sum(size for size in sizes if size is not None and size != storage.UNKNOWN) / 1e6,
                len(find_ready(plans, split, folder)),
                failure_text(reasons),
            )
        )
    header = ("split", "images", "shards", "about MB", "MB to read", "shards to reuse", "cannot be packed")
    cli.print_table(f"{folder}: the plan, nothing is written", header, rows)
    if missing:
        cli.console.print(f"missing: {', '.join(missing[:SHOWN_NAMES])}{', ...' if missing[SHOWN_NAMES:] else ''}")


def show_packed(packed: Sequence[PackedSplit], folder: str) -> None:
    """Print what the splits hold, and how fast they were packed or indexed."""
    header = ("split", "samples", "captions", "shards", "MB", "reused", "failures", "backend", "seconds", "images/s")
    cli.print_damaged(sum(shard.num_damaged for split in packed for shard in split.shards))
    cli.print_table(folder, header, [_row(split) for split in packed])
    if files := failure_files(packed, folder):
        cli.console.print(f"what could not be used is listed in {files}")


def failure_files(packed: Sequence[PackedSplit], folder: str) -> str:
    """The paths of the splits' non-empty failure lists, separated by commas."""
    failed = [split.manifest.split for split in packed if split.manifest.failures]
    return ", ".join(storage.join(folder, f"{split}.failures.jsonl") for split in failed)


def _row(packed: PackedSplit) -> tuple[object, ...]:
    manifest = packed.manifest
    num_images = sum(shard.entry.samples for shard in packed.shards if not shard.reused)
    return (
        manifest.split,
        manifest.num_samples,
        sum(shard.captions for shard in manifest.shards),
        len(manifest.shards),
        sum(shard.bytes for shard in manifest.shards) / 1e6,
        sum(shard.reused for shard in packed.shards),
        failure_text(manifest.failures),
        manifest.settings["backend"],
        packed.seconds,
        num_images / packed.seconds,
    )
