"""Broken shards made whole again, to the bytes that their manifest asks for; whole ones are not touched.

A lost index comes from its tar, a lost tar from the pictures and captions that it was packed from.
"""

import hashlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from captioner.errors import UserError
from captioner.files import storage
from captioner.images import loading as pictures
from captioner.shards.format import Manifest, ShardEntry, ShardIndex
from captioner.shards.indexing import is_chosen, is_foreign
from captioner.shards.tar_walk import open_tar
from captioner.shards.writing import claim, write
from captioner.workers import count_processors
from sharding.checking.foreign import indexer
from sharding.checking.rebuild import facts_of, foreign_settings, index_from_tar
from sharding.checking.verify import SplitCheck, read_failures
from sharding.checking.verify_shard import Problem, ShardCheck, check_shard, index_differences
from sharding.make_shards import plan_split
from sharding.packing.engine import run_local
from sharding.packing.planning import ShardPlan
from sharding.packing.sources import Source, find_sources
from sharding.settings import ShardSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFlags:
    """Where the split's pictures and captions are now, if not where the manifest says."""

    images: str | None
    captions: str | None


@dataclass(kw_only=True, slots=True)
class Repairs:
    """What was made anew, as (file, how), and the problems that stay."""

    done: list[tuple[str, str]] = field(default_factory=list)
    left: list[Problem] = field(default_factory=list)


Report = Callable[[int], None]


def repair_split(folder: str, check: SplitCheck, source: SourceFlags, *, report: Report) -> Repairs:
    """Rebuild the split's broken tars and indexes; `report` hears how many samples are done.

    Raises UserError where the source is needed and is not there, or is not what it was.
    """
    repairs = Repairs(left=list(check.problems))
    manifest = check.manifest
    broken = [shard for shard in check.shards if shard.problems]
    doubtful = any(problem.part == "manifest" for problem in check.all_problems)  # then it says nothing to repair by
    if manifest is None or doubtful or not any(shard.has("tar", "index") for shard in broken):
        repairs.left += [problem for shard in broken for problem in shard.problems]
        return repairs
    with claim(folder, check.split):
        if is_foreign(manifest):
            _reindex(folder, check, manifest, repairs)
        else:
            needs_source = _index_anew(folder, check, manifest, repairs)
            _pack_anew(folder, needs_source, manifest, source, repairs, report=report)
    for shard in broken:
        # a tar that was broken said nothing of its index, so all is looked at again
        repairs.left += check_shard(folder, shard.entry, manifest).problems
        repairs.left += [problem for problem in shard.problems if problem.part not in ("tar", "index", "content")]
    repairs.left = list(dict.fromkeys(repairs.left))
    return repairs


# ---- indexes ----------------------------------------------------------------------------------------------


def _index_anew(folder: str, check: SplitCheck, manifest: Manifest, repairs: Repairs) -> list[ShardCheck]:
    """Rebuild indexes from whole tars; returns the shards for which that is not enough."""
    try:
        listed = read_failures(folder, check.split)
    except (OSError, ValueError):
        listed = []
    left = []
    for shard in check.shards:
        if shard.has("tar"):
            left.append(shard)
        elif shard.has("index"):
            entry = shard.entry
            facts = facts_of(entry, manifest, listed=listed)
            if facts is None:
                left.append(shard)
                continue
            with open_tar(storage.join(folder, f"{entry.name}.tar")) as data:
                rebuilt = index_from_tar(data, facts, sha256=entry.sha256, entry=entry, manifest=manifest)
            _write_index(folder, entry, rebuilt.index, repairs)
    return left


def _reindex(folder: str, check: SplitCheck, manifest: Manifest, repairs: Repairs) -> None:
    """Rebuild the indexes of whole foreign tars, unless the tars do not tell what was chosen from them."""
    make_index = indexer(foreign_settings(manifest))
    for shard in check.shards if not is_chosen(manifest) else ():
        name = shard.entry.name
        if shard.has("index") and not shard.has("tar"):
            with open_tar(storage.join(folder, f"{name}.tar")) as data:
                index = make_index(data, name=name, sha256=shard.entry.sha256)
            _write_index(folder, shard.entry, index, repairs)


def _write_index(folder: str, entry: ShardEntry, index: ShardIndex, repairs: Repairs) -> None:
    write(storage.join(folder, f"{entry.name}.index"), index.to_bytes())
    repairs.done.append((f"{entry.name}.index", "from its tar"))


# ---- tars -------------------------------------------------------------------------------------------------


def _pack_anew(
    folder: str,
    shards: Sequence[ShardCheck],
    manifest: Manifest,
    source: SourceFlags,
    repairs: Repairs,
    *,
    report: Report,
) -> None:
    """Pack the shards from their source into a temporary folder, and take over what has the manifest's sha256."""
    if not shards:
        return
    plans = replan(manifest, source, [shard.entry for shard in shards])
    by_name = {shard.entry.name: shard for shard in shards}
    workers = min(len(plans), count_processors())
    with tempfile.TemporaryDirectory(prefix="captioner-repair-") as scratch:
        for packed in run_local(plans, scratch, workers=workers, report=lambda _: None):
            shard = by_name[packed.entry.name]
            tar, index = (Path(scratch) / f"{packed.entry.name}.{ending}" for ending in ("tar", "index"))
            data = tar.read_bytes()
            if hashlib.sha256(data).hexdigest() != shard.entry.sha256:
                raise UserError(_other_bytes(packed.entry.name, manifest))
            if shard.has("tar"):
                write(storage.join(folder, tar.name), data)
                repairs.done.append((tar.name, "packed from its source"))
            if shard.has("index") or _differs(folder, index):
                write(storage.join(folder, index.name), index.read_bytes())
                repairs.done.append((index.name, "packed from its source"))
            tar.unlink()
            report(packed.entry.samples)


def _differs(folder: str, index: Path) -> bool:
    """Whether the index in the folder says other than what was packed; the tar's damage had hidden that."""
    old, new = (
        ShardIndex.from_bytes(data, origin=index.name)
        for data in (storage.read_bytes(storage.join(folder, index.name)), index.read_bytes())
    )
    return any(True for _ in index_differences(old, new))


def _other_bytes(name: str, manifest: Manifest) -> str:
    """Why a shard of the same plan has other bytes: another decoder, or pictures of the same size changed."""
    made, here = manifest.settings["backend"], pictures.backend()
    if here not in made.split(" and "):
        return (
            f"{name} cannot be made as it was: its pictures were resized by {made}, here is {here}; repair where the "
            "former is installed, or delete the split's shards and pack it anew"
        )
    return (
        f"{name} comes out with other bytes (another version of a library, or a picture changed): nothing was written; "
        "delete the split's shards and pack it anew"
    )


def replan(manifest: Manifest, source: SourceFlags, entries: Sequence[ShardEntry]) -> list[ShardPlan]:
    """The plans of these shards as they were packed. Raises UserError where the source is gone or has changed."""
    split, settings = manifest.split, manifest.settings
    images = source.images or str(manifest.source.get("images"))
    captions = source.captions or str(manifest.source.get("captions"))
    names = ", ".join(entry.name for entry in entries[:3]) + (", ..." if len(entries) > 3 else "")
    for what, flag, location in (("pictures", "--images", images), ("captions", "--captions", captions)):
        if not _is_there(location):
            raise UserError(
                f"to rebuild {names} the {what} of split {split} are needed, and there is no {location}: give {flag} "
                "the place where they are now"
            )
    found = Source(split=split, captions=captions, images=images)
    if source.images or source.captions:
        found = find_sources(images=images, captions=captions, split=split)[0]
    recipe = ShardSettings(
        images=images,
        captions=captions,
        split=split,  # type: ignore[arg-type]
        **{name: settings[name] for name in ("size", "resize", "quality", "shard_megabytes")},
    )
    plans = {plan.name: plan for plan in plan_split(found, recipe)[0]}
    changed = [e.name for e in entries if e.name not in plans or plans[e.name].fingerprint != e.fingerprint]
    if changed:
        raise UserError(
            f"{changed[0]} cannot be rebuilt: {found.captions} or the pictures in {found.images} have changed since it "
            "was packed; give their former state with --captions and --images, or delete the split's shards and pack "
            "it anew"
        )
    return [plans[entry.name] for entry in entries]


def _is_there(location: str) -> bool:
    try:
        return storage.exists(location)
    except OSError:
        return False
