"""Broken shards made whole again: an index from its tar, a tar by packing it again from its images and captions."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from captioner.errors import UserError
from captioner.files import storage
from captioner.images import loading
from captioner.shards.format import Manifest, ShardEntry
from captioner.shards.indexing import is_foreign
from captioner.shards.writing import claim, write
from captioner.workers import count_processors
from sharding.checking.rebuild import recipe_of
from sharding.checking.verify import SplitCheck
from sharding.packing.engine import run_local
from sharding.packing.planning import Recipe, ShardPlan, plan_split
from sharding.packing.sources import find_sources


def repair_split(
    folder: str, check: SplitCheck, *, images: str | None, captions: str | None, report: Callable[[int], None]
) -> list[tuple[str, str]]:
    """Replace the split's broken tars and indexes; returns each file with how it was made.

    Nothing is written by a manifest that is damaged itself, and no tar of another program. A shard that would come out
    with other bytes than its manifest says is left as it is. `images` and `captions` are where they are now, if not
    where the manifest says; `report` is called with the number of samples of each packed shard. Raises UserError where
    the images or captions are needed and are not there, or have changed.
    """
    manifest = check.manifest
    broken = [shard for shard in check.shards if shard.has("tar", "index")]
    if manifest is None or not broken or any(problem.part == "manifest" for problem in check.problems):
        return []
    done = []
    with claim(folder, check.split):
        for shard in broken:
            if shard.rebuilt is not None:
                write(storage.join(folder, f"{shard.entry.name}.index"), shard.rebuilt.to_bytes())
                done.append((f"{shard.entry.name}.index", "from its tar"))
        entries = [shard.entry for shard in broken if shard.rebuilt is None and not shard.has("content")]
        if entries and not is_foreign(manifest):
            plans = _plan_again(manifest, entries, images=images, captions=captions)
            for packed in run_local(plans, folder, workers=min(len(plans), count_processors()), report=lambda _: None):
                done.append((f"{packed.entry.name}.tar and .index", "packed from its images and captions"))
                report(packed.entry.samples)
    return done


def _plan_again(
    manifest: Manifest, entries: Sequence[ShardEntry], *, images: str | None, captions: str | None
) -> list[ShardPlan]:
    """The plans of these shards as they were packed. Raises UserError where their source is gone or has changed."""
    split, made, here = manifest.split, manifest.settings["backend"], loading.backend()
    names = ", ".join(entry.name for entry in entries[:3]) + (", ..." if len(entries) > 3 else "")
    if here not in made.split(" and "):
        raise UserError(
            f"{names} cannot be packed as before: its images were resized by {made}, here is {here}; repair where the "
            "former is installed, or delete the split's shards and pack it again"
        )
    images, captions = images or str(manifest.source["images"]), captions or str(manifest.source["captions"])
    try:
        (source,) = find_sources(images=images, captions=captions, split=split)
        plans = {plan.name: plan for plan in plan_split(source, Recipe(**recipe_of(manifest)))[0]}
    except UserError as error:
        raise UserError(f"{names} cannot be packed again: {error}") from error
    changed = [e.name for e in entries if e.name not in plans or plans[e.name].fingerprint != e.fingerprint]
    if changed:
        raise UserError(
            f"{changed[0]} cannot be packed as before: {source.captions} or the images in {source.images} have changed "
            "since it was packed; give their former state with --captions and --images, or delete the split's shards "
            "and pack it again"
        )
    return [replace(plans[entry.name], sha256=entry.sha256) for entry in entries]
