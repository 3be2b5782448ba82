"""One split from its captions to a complete dataset folder: plan, packed shards, vocabulary, manifest."""

import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import repeat

from captioner import cli
from captioner.errors import UserError
from captioner.files import storage
from captioner.shards.format import Manifest, TarBuilder, manifest_location, read_manifest
from captioner.shards.indexing import is_foreign
from captioner.shards.writing import claim
from captioner.vocabulary import Vocabulary
from captioner.workers import count_processors
from sharding.packing.engine import run_local
from sharding.packing.finish import write_manifest, write_vocabulary
from sharding.packing.pack import PackedShard, Report, ShardProgress, find_packed, how_to_pack_again, write_shard
from sharding.packing.planning import Recipe, ShardPlan, plan_split
from sharding.packing.sources import Source, describe_failures
from sharding.settings import ShardSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedSplit:
    """A complete split: its manifest, its shards, and how long packing took."""

    manifest: Manifest
    shards: Sequence[PackedShard]
    seconds: float


def make_recipe(settings: ShardSettings) -> Recipe:
    """The settings that decide the shards' bytes."""
    return Recipe(**{name: getattr(settings, name) for name in Recipe.__slots__})


def pack_split(source: Source, settings: ShardSettings, *, vocabulary: Vocabulary | None) -> PackedSplit:
    """Pack what is missing of a split, and write its vocabulary, its failures and, last of all, its manifest.

    `vocabulary` is written where one is given. Raises UserError.
    """
    folder, split, recipe = settings.output, source.split, make_recipe(settings)
    location = storage.join(folder, "vocabulary.json")
    if split != "train" and vocabulary is None and not storage.exists(location):
        raise UserError(
            f"split {split} needs the training vocabulary, and there is no {location}: "
            "pack --split train first, or give --vocabulary FILE"
        )
    with claim(folder, split):
        started = time.monotonic()
        _refuse_foreign(split, folder)
        plans, failures = plan_split(source, recipe)
        shards = _pack_shards(plans, split=split, settings=settings)
        _refuse_empty(shards, source)
        for shard in shards:
            if shard.unwritten is not None:
                write_shard(folder, shard.entry.name, TarBuilder().to_bytes(), shard.unwritten, keep_manifest=False)
        if split == "train" or vocabulary:
            write_vocabulary(folder, shards, threshold=settings.threshold, given=vocabulary)
        manifest = write_manifest(
            folder,
            split,
            shards,
            refused=failures,
            recipe=asdict(recipe),
            source=asdict(source) | {"captions": _without_query(source.captions)},
        )
    return PackedSplit(manifest=manifest, shards=shards, seconds=time.monotonic() - started)


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
                    f"{how_to_pack_again(folder, split)}"
                )
    return [shard for shard in found if shard is not None]


def _pack_shards(plans: Sequence[ShardPlan], *, split: str, settings: ShardSettings) -> list[PackedShard]:
    """All shards of a split, in the plan's order, packed under one progress bar."""
    done = {shard.entry.name: shard for shard in find_ready(plans, split, settings.output)}
    left = [plan for plan in plans if plan.name not in done]
    total = sum(len(plan.records) for plan in plans)
    reused = total - sum(len(plan.records) for plan in left)
    with cli.progress_bar(f"packing {split}", total=total, unit="images", done=reused) as bar:
        progress: dict[str, ShardProgress] = {}
        started = time.monotonic()

        def report(now: ShardProgress) -> None:
            progress[now.shard] = now
            images, num_failures, num_bytes = (
                sum(getattr(shard, name) for shard in progress.values()) for name in ("images", "failures", "bytes")
            )
            megabytes_a_second = num_bytes / 1e6 / (time.monotonic() - started)
            bar.set(reused + images, note=f"{megabytes_a_second:,.1f} MB/s, {num_failures:,} failed")

        for shard in _run_engine(left, settings, report):
            done[shard.entry.name] = shard
    return [done[plan.name] for plan in plans]


def _run_engine(plans: Sequence[ShardPlan], settings: ShardSettings, report: Report) -> Iterator[PackedShard]:
    """Pack the shards with the wanted engine; yields each as it is finished."""
    if not plans:
        return iter(())
    if settings.engine == "ray":
        from sharding.packing.cluster import run_ray

        return run_ray(plans, settings.output, workers=settings.workers, report=report)
    return run_local(plans, settings.output, workers=settings.workers or count_processors(), report=report)


def _refuse_foreign(split: str, folder: str) -> None:
    """Raise UserError when the split's shards were made by another program, and only indexed here."""
    location = manifest_location(folder, split)
    if not storage.exists(location):
        return
    try:
        manifest = read_manifest(folder, split, remedy="")
    except UserError as error:
        raise UserError(
            f"{folder} holds a manifest that this version cannot read ({error}): {how_to_pack_again(folder, split)}"
        ) from error
    if is_foreign(manifest):
        raise UserError(
            f"{folder} holds tars of another program, indexed as split {split}: give another --output, or delete "
            f"{location} and their .index files"
        )


def _refuse_empty(shards: Sequence[PackedShard], source: Source) -> None:
    """Raise UserError when the shards hold no sample at all."""
    if any(shard.entry.samples for shard in shards):
        return
    failures = [failure for shard in shards for failure in shard.failures]
    why = describe_failures(failures)
    raise UserError(f"no image of split {source.split} in {source.images} could be packed{why}")


def _without_query(location: str) -> str:
    """A web address without its query, which may hold a password."""
    return location.partition("?")[0] if location.startswith(storage.WEB) else location
