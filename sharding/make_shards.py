"""Pack pictures and captions into tar shards, with a vocabulary and a manifest.

    python sharding/make_shards.py                                   # COCO in data/coco, into data/shards
    python sharding/make_shards.py --images photos --captions captions.csv --split train --output shards
    python sharding/make_shards.py --dry-run                         # what it would do
    python sharding/make_shards.py --images s3://bucket/photos --captions captions.jsonl --split train \\
        --output s3://bucket/shards --engine ray                     # on a Ray cluster

Pictures are turned upright, made RGB, brought to --size and stored as JPEG with all their captions, one sample a
picture. The shards' bytes depend on input and settings alone, not on workers, engine or luck. Running it again
completes what is missing and reuses what is there; what was made differently is refused, never mixed. What cannot be
packed is counted by reason and listed in SPLIT.failures.jsonl. sharding/check_shards.py verifies and repairs the
result. Next: accelerate launch train/main.py

Exit codes: 0 done; 2 something to mend, told in one line; 3 packed, but with more failures than --max-failures.
"""

import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from itertools import repeat

from captioner import cli
from captioner.errors import UserError
from captioner.files import storage
from captioner.files.ownership import AlreadyOwnedError, NotWritableError
from captioner.shards.format import Failure, Manifest, manifest_location, read_manifest
from captioner.shards.indexing import is_foreign
from captioner.shards.writing import claim
from captioner.vocabulary import read_vocabulary
from captioner.workers import count_processors
from sharding.packing.engine import prepare, run_local
from sharding.packing.finish import failure_text, write_manifest, write_vocabulary
from sharding.packing.pack import PackedShard, Progress, Report, find_packed, pack_anew
from sharding.packing.planning import Recipe, ShardPlan, plan_shards
from sharding.packing.sources import Source, find_sources, read_records
from sharding.settings import ShardSettings

EXIT_TOO_MANY_FAILURES = 3
SHOWN_NAMES = 5
GIVE_VOCABULARY = "give --vocabulary a vocabulary.json that the packing of a training split made"
REMEDIES: cli.Remedies = {
    AlreadyOwnedError: "wait for it, stop it, or give another --output",
    NotWritableError: "give another --output",
}


def main(settings: ShardSettings) -> None:
    """Pack every wanted split, training first, since the others need its vocabulary."""
    vocabulary = read_vocabulary(settings.vocabulary, remedy=GIVE_VOCABULARY) if settings.vocabulary else None
    sources = find_sources(images=settings.images, captions=settings.captions, split=settings.split)
    if settings.dry_run:
        show_plan([(source.split, *plan_split(source, settings)) for source in sources], settings)
        return
    if settings.engine == "local" and settings.workers != 1:
        prepare()
    manifests = []
    rows = []
    num_damaged = 0
    for source in sources:
        needs_vocabulary(source.split, settings)
        with claim(settings.output, source.split):
            started = time.monotonic()
            refuse_foreign(source.split, settings.output)
            plans, failures = plan_split(source, settings)
            shards = pack_split(plans, split=source.split, settings=settings)
            refuse_empty(shards, source, settings.output)
            if source.split == "train" or vocabulary:
                write_vocabulary(settings.output, shards, threshold=settings.threshold, given=vocabulary)
            manifest = write_manifest(
                settings.output,
                source.split,
                shards,
                refused=failures,
                recipe=asdict(recipe(settings)),
                source=asdict(source) | {"captions": without_query(source.captions)},
            )
        manifests.append(manifest)
        rows.append(summary_row(manifest, shards, seconds=time.monotonic() - started))
        num_damaged += sum(shard.num_damaged for shard in shards)
    cli.print_damaged(num_damaged)
    show_summary(rows, manifests, settings)


def needs_vocabulary(split: str, settings: ShardSettings) -> None:
    """Raise UserError when a held-out split would be packed before the training captions gave their words."""
    location = storage.join(settings.output, "vocabulary.json")
    if split != "train" and settings.vocabulary is None and not storage.exists(location):
        raise UserError(
            f"split {split} needs the training vocabulary, and there is no {location}: "
            "pack --split train first, or give --vocabulary FILE"
        )


def refuse_empty(shards: Sequence[PackedShard], source: Source, folder: str) -> None:
    """Raise UserError, and leave none of the shards behind, when they hold no sample at all."""
    if any(shard.entry.samples for shard in shards):
        return
    for shard in shards:
        for ending in ("index", "tar"):
            storage.delete(storage.join(folder, f"{shard.entry.name}.{ending}"))
    failures = [failure for shard in shards for failure in shard.failures]
    raise UserError(f"no picture of split {source.split} in {source.images} could be packed{why_none(failures)}")


def why_none(failures: Sequence[Failure]) -> str:
    """The failures by reason, and the first of the commonest reason, as the end of an error."""
    if not failures:
        return ": name another file with --captions, or another --split"
    reasons = Counter(failure.reason for failure in failures)
    commonest = reasons.most_common(1)[0][0]
    first = next(failure for failure in failures if failure.reason == commonest)
    return f" ({failure_text(reasons)}), such as {first.name or 'a row'}: {commonest}, {first.message}"


def refuse_foreign(split: str, folder: str) -> None:
    """Raise UserError when the split's shards were made by another program, and only indexed here."""
    location = manifest_location(folder, split)
    if not storage.exists(location):
        return
    try:
        manifest = read_manifest(folder, split, remedy="")
    except UserError as error:
        raise UserError(
            f"{folder} holds a manifest that this version cannot read ({error}): {pack_anew(folder, split)}"
        ) from error
    if is_foreign(manifest):
        raise UserError(
            f"{folder} holds tars of another program, indexed as split {split}: give another --output, or delete "
            f"{location} and their .index files"
        )


# ---- planning ---------------------------------------------------------------------------------------------


def plan_split(source: Source, settings: ShardSettings) -> tuple[list[ShardPlan], list[Failure]]:
    """A split's shards to make, and what of its caption file cannot be packed. Raises UserError."""
    records, failures = read_records(source)
    if not records:
        raise UserError(f"{source.captions} holds no picture of split {source.split} to pack{why_none(failures)}")
    file_bytes = storage.sizes_bytes(source.images, [record.file_name for record in records])
    if records and not any(size is not None for size in file_bytes):
        raise UserError(
            f"none of the {len(records):,} pictures of split {source.split} is in {source.images} "
            f"(the first: {records[0].file_name!r}): give --images the folder that their names start from"
        )
    plans = plan_shards(
        source.split,
        records,
        images=source.images,
        file_bytes=file_bytes,
        recipe=recipe(settings),
    )
    return plans, failures


def recipe(settings: ShardSettings) -> Recipe:
    """The settings that decide the shards' bytes."""
    return Recipe(
        size=settings.size,
        resize=settings.resize,
        quality=settings.quality,
        shard_megabytes=settings.shard_megabytes,
    )


def find_ready(plans: Sequence[ShardPlan], split: str, folder: str) -> list[PackedShard]:
    """The shards that are there already. Raises UserError where one was made differently."""
    with ThreadPoolExecutor(storage.NUM_THREADS) as threads:
        found = list(threads.map(find_packed, plans, repeat(folder)))
    names = {f"{plan.name}.index" for plan in plans}
    with suppress(FileNotFoundError):
        for name in storage.list_files(folder):
            if re.fullmatch(rf"{split}-\d{{6,}}\.index", name) and name not in names:
                raise UserError(
                    f"{folder} holds {name}, which this input and these settings do not make: "
                    f"{pack_anew(folder, split)}"
                )
    return [shard for shard in found if shard is not None]


def show_plan(planned: Sequence[tuple[str, list[ShardPlan], list[Failure]]], settings: ShardSettings) -> None:
    """Print what would be packed, without writing anything."""
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
                len(find_ready(plans, split, settings.output)),
                failure_text(reasons),
            )
        )
    header = ("split", "pictures", "shards", "about MB", "MB to read", "shards to reuse", "cannot be packed")
    cli.print_table(f"{settings.output}: the plan, nothing is written", header, rows)
    if missing:
        cli.console.print(f"missing: {', '.join(missing[:SHOWN_NAMES])}{', ...' if missing[SHOWN_NAMES:] else ''}")


# ---- packing ----------------------------------------------------------------------------------------------


def pack_split(plans: Sequence[ShardPlan], *, split: str, settings: ShardSettings) -> list[PackedShard]:
    """All shards of a split, in the plan's order, packed under one progress bar."""
    done = {shard.entry.name: shard for shard in find_ready(plans, split, settings.output)}
    left = [plan for plan in plans if plan.name not in done]
    if left:
        storage.delete(manifest_location(settings.output, split))  # where it is, the split is complete
    total = sum(len(plan.records) for plan in plans)
    reused = total - sum(len(plan.records) for plan in left)
    with cli.progress_bar(f"packing {split}", total=total, unit="images", done=reused) as bar:
        progress: dict[str, Progress] = {}
        started = time.monotonic()

        def report(now: Progress) -> None:
            progress[now.shard] = now
            pictures, num_failures, num_bytes = (
                sum(getattr(shard, name) for shard in progress.values()) for name in ("pictures", "failures", "bytes")
            )
            megabytes_a_second = num_bytes / 1e6 / (time.monotonic() - started)
            bar.set(reused + pictures, note=f"{megabytes_a_second:,.1f} MB/s, {num_failures:,} failed")

        for shard in run_engine(left, settings, report):
            done[shard.entry.name] = shard
    return [done[plan.name] for plan in plans]


def run_engine(plans: Sequence[ShardPlan], settings: ShardSettings, report: Report) -> Iterator[PackedShard]:
    """Pack the shards with the wanted engine; they come as they are finished."""
    if not plans:
        return iter(())
    if settings.engine == "ray":
        from sharding.packing.cluster import run_ray

        return run_ray(plans, settings.output, workers=settings.workers, report=report)
    return run_local(plans, settings.output, workers=settings.workers or count_processors(), report=report)


def without_query(location: str) -> str:
    """A web address without what may stand behind it to let a person in."""
    return location.partition("?")[0] if location.startswith(storage.WEB) else location


# ---- telling ----------------------------------------------------------------------------------------------


def summary_row(manifest: Manifest, shards: Sequence[PackedShard], *, seconds: float) -> tuple[object, ...]:
    """A row of the closing table."""
    num_images = sum(shard.entry.samples for shard in shards if not shard.reused)
    return (
        manifest.split,
        manifest.num_samples,
        sum(shard.captions for shard in manifest.shards),
        len(manifest.shards),
        sum(shard.bytes for shard in manifest.shards) / 1e6,
        sum(shard.reused for shard in shards),
        failure_text(manifest.failures),
        manifest.settings["backend"],
        seconds,
        num_images / seconds,
    )


def show_summary(rows: list[tuple[object, ...]], manifests: Sequence[Manifest], settings: ShardSettings) -> None:
    """Print the closing table; leave with an exit code when more failed than the user allows."""
    header = ("split", "samples", "captions", "shards", "MB", "reused", "failures", "backend", "seconds", "images/s")
    cli.print_table(settings.output, header, rows)
    num_failures = sum(sum(manifest.failures.values()) for manifest in manifests)
    total = num_failures + sum(manifest.num_samples for manifest in manifests)
    limit = settings.max_failures
    if limit is not None and num_failures > (limit * total if limit < 1 else limit):
        print(
            f"error: {num_failures:,} of {total:,} could not be packed, more than --max-failures {limit:g}: see "
            f"{storage.join(settings.output, 'SPLIT.failures.jsonl')}",
            file=sys.stderr,
        )
        sys.exit(EXIT_TOO_MANY_FAILURES)


def run() -> None:
    """The console entry."""
    cli.run(main, ShardSettings, description=__doc__ or "", remedies=REMEDIES)


if __name__ == "__main__":
    run()
