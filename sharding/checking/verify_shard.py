"""Whether one shard is what was written: its tar is read without its index, and the index made again from that.

Both indexes must be equal; the sha256 in manifest and index vouches for the tar.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import numpy as np

from captioner.errors import UserError
from captioner.files import storage
from captioner.samples import words_of
from captioner.shards.format import Manifest, ShardEntry, ShardIndex
from captioner.shards.indexing import is_chosen, is_foreign
from captioner.shards.tar_walk import Buffer, open_tar
from sharding.checking.rebuild import index_from_tar, restore_facts

PACK_SAME = "run sharding/make_shards.py again with the same flags: whole shards are kept"
INDEX_SAME = "run sharding/check_shards.py index again"
CHOOSE_SAME = "run captioner.streaming.index_shards again with the same `keep`"
REPAIR = "run sharding/check_shards.py repair"
RESTORE_COPY = "restore the file from where it came"
DELETE_AND_PACK = "delete the split's shards and pack it again"

Part = Literal["tar", "index", "content", "manifest", "failures", "vocabulary", "unfinished", "stray"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """A fault of a dataset folder: its part and file, what is wrong with it, and what to do."""

    part: Part
    file: str
    what: str
    remedy: str

    @classmethod
    def of(cls, manifest: Manifest, part: Part, what: str, *, shard: str = "") -> "Problem":
        """The problem of a part of a split, or of one of its shards, with the remedy for it."""
        foreign = is_foreign(manifest)
        remedies = {
            "tar": RESTORE_COPY if foreign else REPAIR,
            "index": CHOOSE_SAME if is_chosen(manifest) else REPAIR,
            "content": DELETE_AND_PACK,
        }
        files = {"tar": f"{shard}.tar", "content": f"{shard}.tar", "index": f"{shard}.index"}
        files |= {"manifest": f"{manifest.split}.manifest.json", "failures": f"{manifest.split}.failures.jsonl"}
        remedy = remedies.get(part, INDEX_SAME if foreign else PACK_SAME)
        return cls(part=part, file=files[part], what=what, remedy=remedy)


@dataclass(kw_only=True, slots=True)
class ShardCheck:
    """What was found of one shard. `facts` and `words` are its index's, None where the index cannot be used.

    `rebuilt` is the index to write where only the index is broken.
    """

    entry: ShardEntry
    manifest: Manifest
    problems: list[Problem] = field(default_factory=list)
    facts: dict[str, Any] | None = None
    words: Counter[str] | None = None
    rebuilt: ShardIndex | None = None

    def add(self, part: Part, what: str) -> None:
        """Add a problem."""
        self.problems.append(Problem.of(self.manifest, part, what, shard=self.entry.name))

    def has(self, *parts: Part) -> bool:
        """Whether one of these parts has a problem."""
        return any(problem.part in parts for problem in self.problems)


def check_shard(
    folder: str, entry: ShardEntry, manifest: Manifest, listed: Sequence[Any] | None, *, trusted: bool
) -> ShardCheck:
    """Read one shard and its index whole.

    `listed` are the failures of the split, None where they are lost. A manifest that is not `trusted` contradicts
    itself: it cannot say that an index is of another shard.
    """
    check, index = ShardCheck(entry=entry, manifest=manifest), None
    try:
        content = storage.read_bytes(storage.join(folder, f"{entry.name}.index"))
        index = ShardIndex.from_bytes(content, origin=f"{entry.name}.index")
        check.facts = index.facts
    except (OSError, UserError) as error:
        check.add("index", why_unread(error))
    try:
        with open_tar(storage.join(folder, f"{entry.name}.tar")) as data:
            _compare(check, data, index, trusted=trusted)
    except OSError as error:
        check.add("tar", why_unread(error))
    if check.rebuilt is not None:
        facts = restore_facts(check.rebuilt, entry, manifest, listed=listed)
        check.rebuilt = None if facts is None else replace(check.rebuilt, facts=facts)
    return check


def why_unread(error: Exception) -> str:
    """What is wrong with a file that reading it raised this error."""
    return "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"


def _compare(check: ShardCheck, data: Buffer, index: ShardIndex | None, *, trusted: bool) -> None:
    """Compare a tar with its index and with the manifest; sets `words`, or `rebuilt` where the index is broken."""
    entry, sha256 = check.entry, hashlib.sha256(data).hexdigest()
    by_index = None if index is None else ShardEntry.of(entry.name, index)
    is_own = by_index is not None and (not trusted or by_index.fingerprint == entry.fingerprint)
    if by_index is not None and not is_own:
        check.add("index", "is of another shard (its fingerprint is not the manifest's)")
    if sha256 != entry.sha256 and not (is_own and by_index is not None and sha256 == by_index.sha256):
        check.add(
            "tar", f"is damaged: {len(data):,} bytes of sha256 {sha256[:8]}, not {entry.bytes:,} of {entry.sha256[:8]}"
        )
        return
    found, problems = index_from_tar(data, sha256=sha256, entry=entry, manifest=check.manifest, before=index)
    for what in problems:
        check.add("content", what)
    if problems:
        return
    if index is not None and is_own:
        if names := _differing(index, found):
            check.add("index", f"{', '.join(names)} differ from what its tar holds")
        else:
            check.words = words_of(index)
            if by_index != entry:
                check.add("manifest", f"says something else of {entry.name} than its index and its tar")
    if check.has("index"):
        check.rebuilt = found


def _differing(first: ShardIndex, second: ShardIndex) -> list[str]:
    """The names of what differs between two indexes."""
    one, other = _by_name(first), _by_name(second)
    return [name for name in one | other if not np.array_equal(one.get(name, ()), other.get(name, ()))]


def _by_name(index: ShardIndex) -> dict[str, Any]:
    return {f.name: getattr(index, f.name) for f in fields(index) if f.name != "optional"} | index.optional
