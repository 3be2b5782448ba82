"""Whether one shard is what was written: its tar is read without its index, and the index made again from that.

Both indexes must be equal; the sha256 in manifest and index vouches for the tar.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal
from zlib import crc32

import numpy as np

from captioner.errors import UserError
from captioner.files import storage
from captioner.samples import words_of
from captioner.shards.format import Manifest, ShardEntry, ShardIndex
from captioner.shards.indexing import is_chosen, is_foreign
from captioner.shards.tar_walk import Buffer, open_tar
from sharding.checking.rebuild import index_from_tar, restore_facts

PACK_SAME = "run sharding/make_shards.py again with the same flags: whole shards are kept"
INDEX_FIRST = "pack again, or, if another program made them, run sharding/check_shards.py index"
INDEX_SAME = "run sharding/check_shards.py index again"
CHOOSE_SAME = "run captioner.streaming.index_shards again with the same `keep`"
REPAIR = "run sharding/check_shards.py repair"
RESTORE = "restore the file from where it came"
PACK_AGAIN = "delete the split's shards and pack it again"

Part = Literal["tar", "index", "content", "manifest", "failures", "vocabulary", "unfinished", "stray"]
Add = Callable[[Part, str], None]


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
            "tar": RESTORE if foreign else REPAIR,
            "index": CHOOSE_SAME if is_chosen(manifest) else REPAIR,
            "content": PACK_AGAIN,
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
    problems: list[Problem] = field(default_factory=list)
    facts: dict[str, Any] | None = None
    words: Counter[str] | None = None
    rebuilt: ShardIndex | None = None

    def has(self, *parts: Part) -> bool:
        """Whether one of these parts has a problem."""
        return any(problem.part in parts for problem in self.problems)


def check_shard(
    folder: str, entry: ShardEntry, manifest: Manifest, first: int | None, listed: Sequence[Any] | None
) -> ShardCheck:
    """Read one shard and its index whole.

    `first` is the position of its first sample in the split, None where the manifest is damaged and does not say it;
    `listed` are the failures of the split, None where they are lost.
    """
    check = ShardCheck(entry=entry)

    def add(part: Part, what: str) -> None:
        check.problems.append(Problem.of(manifest, part, what, shard=entry.name))

    index = _open_index(folder, entry, add)
    check.facts = None if index is None else index.facts
    try:
        with open_tar(storage.join(folder, f"{entry.name}.tar")) as data:
            sha256 = hashlib.sha256(data).hexdigest()
            if _is_as_written(data, sha256, entry, index, add):
                found, problems = index_from_tar(
                    data, sha256=sha256, entry=entry, manifest=manifest, first=first, before=index
                )
                for what in problems:
                    add("content", what)
                if not problems and index is not None:
                    _compare_index(check, index, found, add, part="manifest" if first is None else "index")
                if not problems and check.has("index"):
                    facts = restore_facts(found, entry, manifest, listed=listed)
                    check.rebuilt = None if facts is None else replace(found, facts=facts)
    except OSError as error:
        add("tar", why_unread(error))
    return check


def why_unread(error: Exception) -> str:
    """What is wrong with a file that reading it raised this error."""
    return "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"


def _open_index(folder: str, entry: ShardEntry, add: Add) -> ShardIndex | None:
    """The shard's index; a problem where it is missing or cannot be used."""
    name = f"{entry.name}.index"
    try:
        return ShardIndex.from_bytes(storage.read_bytes(storage.join(folder, name)), origin=name)
    except (OSError, UserError) as error:
        add("index", why_unread(error))
    return None


def _is_as_written(data: Buffer, sha256: str, entry: ShardEntry, index: ShardIndex | None, add: Add) -> bool:
    """Whether the tar is the shard that was written: its manifest says so, or else the index that belongs to it."""
    if sha256 == entry.sha256:
        return True
    is_own = index is not None and index.facts["fingerprint"] == entry.fingerprint
    if index is not None and is_own and index.facts["sha256"] == sha256:
        add("manifest", f"does not fit {entry.name}: its sha256 differs from its tar's and index's")
        return True
    add("tar", _describe_damage(data, entry, index))
    if index is not None and not is_own and index.facts["sha256"] != entry.sha256:
        add("index", "is of another shard (sha256 and fingerprint differ from the manifest's)")
    return False


def _describe_damage(data: Buffer, entry: ShardEntry, index: ShardIndex | None) -> str:
    """How a tar differs from what was packed, and in which samples, where its index has their checksums."""
    if len(data) != entry.bytes:
        return f"has {len(data):,} bytes instead of {entry.bytes:,}"
    if index is None or index.facts["sha256"] != entry.sha256:
        return "is damaged (sha256 differs)"
    damaged = [
        index.key(position)
        for position in range(len(index))
        if any(crc32(data[m.offset : m.offset + m.size]) != m.crc32 for m in index.members(position).values())
    ]
    where = f", the first {damaged[0]}" if damaged else ", only headers between them"
    return f"is damaged (sha256 differs): {len(damaged):,} of {len(index):,} samples{where}"


def _compare_index(check: ShardCheck, index: ShardIndex, found: ShardIndex, add: Add, *, part: Part) -> None:
    """Compare the index with the one made from its tar, and with the manifest's entry, where `part` is at fault."""
    entry = ShardEntry.of(check.entry.name, index)
    if (entry.sha256, entry.bytes) != (found.facts["sha256"], found.facts["bytes"]):
        add("index", "is of another tar (bytes or sha256 differ)")
    elif names := _differing(index, found):
        add("index", f"{', '.join(names)} differ from what its tar holds")
    else:
        check.words = words_of(index)
        if entry != replace(check.entry, sha256=entry.sha256):
            what = "samples, captions, failures, bytes or fingerprint"
            add(part, f"index and manifest do not agree on the {what} of {entry.name}")


def _differing(first: ShardIndex, second: ShardIndex) -> list[str]:
    """The names of what differs between two indexes."""
    one, other = _by_name(first), _by_name(second)
    return [name for name in one | other if not np.array_equal(one.get(name, ()), other.get(name, ()))]


def _by_name(index: ShardIndex) -> dict[str, Any]:
    return {f.name: getattr(index, f.name) for f in fields(index) if f.name != "optional"} | index.optional
