"""A tar to the index that belongs to it, by reading the tar alone, and what is wrong with its samples."""

from collections.abc import Sequence
from typing import Any, get_args

from captioner.images import loading
from captioner.samples import SAMPLE_FIELDS, build_index
from captioner.shards.format import Failure, Manifest, ShardEntry, ShardIndex
from captioner.shards.indexing import is_chosen, is_foreign
from captioner.shards.tar_walk import Buffer
from sharding.checking.foreign import indexer, read_samples

SHOWN_PROBLEMS = 3


def index_from_tar(
    data: Buffer, *, sha256: str, entry: ShardEntry, manifest: Manifest, before: ShardIndex | None
) -> tuple[ShardIndex, list[str]]:
    """The index of a tar with this `sha256`, and the first problems of the samples of one that we packed.

    `before` is the index beside the tar, if it can be read: its facts are used where the tar does not say them.
    """
    facts = {} if before is None else before.facts
    if is_foreign(manifest):
        make_index = indexer(facts.get("recipe", recipe_of(manifest)), before=before)
        return make_index(data, name=entry.name, sha256=sha256), []
    failures: list[Failure] = []
    problems: list[str] = []
    keys, members, tokens = [], [], []
    for sample in read_samples(data, failures, name=entry.name):
        if sample.content.keys() != SAMPLE_FIELDS:
            problems.append(f"{sample.key}.json has not the fields of a sample")
        keys.append(sample.key)
        members.append(sample.checked_members(data))
        tokens.append(sample.content["tokens"])
    problems += [f"{failure.name}: {failure.reason}, {failure.message}" for failure in failures]
    index = build_index(keys, members, tokens, {**facts, "bytes": len(data), "sha256": sha256})
    return index, problems[:SHOWN_PROBLEMS]


def recipe_of(manifest: Manifest) -> dict[str, Any]:
    """The recipe of the split's shards."""
    return {name: value for name, value in manifest.settings.items() if name != "backend"}


def restore_facts(
    index: ShardIndex, entry: ShardEntry, manifest: Manifest, *, listed: Sequence[dict[str, Any]] | None
) -> dict[str, Any] | None:
    """The facts of a shard whose index is lost, from `index` (made from its tar), the manifest and the failures.

    `listed` are the split's failures, those of the shards at the list's end in the shards' order. None where
    they do not say which are this shard's, which of several backends made it, or which samples were chosen.
    """
    if is_foreign(manifest):
        return None if is_chosen(manifest) else index.facts | {"recipe": recipe_of(manifest)}
    entries, backend = manifest.shards, manifest.settings["backend"]
    num_listed = 0 if listed is None else len(listed)
    if sum(shard.failures for shard in entries) > num_listed or backend not in get_args(loading.Backend):
        return None
    first = num_listed - sum(shard.failures for shard in entries[entries.index(entry) :])
    return {
        "bytes": entry.bytes,
        "sha256": entry.sha256,
        "fingerprint": entry.fingerprint,
        "recipe": recipe_of(manifest),
        "backend": backend,
        "failures": list(listed or ())[first : first + entry.failures],
    }
