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
RESTORE = "bring the file back from where it came"
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

    `keys` are its first and its last. `rebuilt` is the index to write where only the index is broken.
    """

    entry: ShardEntry
    problems: list[Problem] = field(default_factory=list)
    facts: dict[str, Any] | None = None
    words: Counter[str] | None = None
    keys: list[bytes] = field(default_factory=list)
    rebuilt: ShardIndex | None = None

    def has(self, *parts: Part) -> bool:
        """Whether one of these parts has a problem."""
        return any(problem.part in parts for problem in self.problems)


def check_shard(
    folder: str, entry: ShardEntry, manifest: Manifest, *, trusted: bool, listed: Sequence[Any] | None
) -> ShardCheck:
    """Read one shard and its index whole.

    `trusted` says that the manifest is whole in itself; `listed` are the failures of the split, None if they are lost.
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
                found, problems = index_from_tar(data, sha256=sha256, entry=entry, manifest=manifest, before=index)
                for what in problems:
                    add("content", what)
                if not problems:
                    _compare_index(check, index, found, add, trusted=trusted)
                if not problems and check.has("index"):
                    facts = restore_facts(found, entry, manifest, listed=listed)
                    check.rebuilt = None if facts is None else replace(found, facts=facts)
    except FileNotFoundError:
        add("tar", "is missing")
    except OSError as error:
        add("tar", f"cannot be read: {error.strerror or error}")
    return check


def _open_index(folder: str, entry: ShardEntry, add: Add) -> ShardIndex | None:
    """The shard's index; a problem where it is missing or cannot be used."""
    name = f"{entry.name}.index"
    try:
        index = ShardIndex.from_bytes(storage.read_bytes(storage.join(folder, name)), origin=name)
        if missing := {"bytes", "sha256", "fingerprint", "recipe", "backend", "failures"} - index.facts.keys():
            raise UserError(f"lacks {', '.join(sorted(missing))}")
        return index
    except FileNotFoundError:
        add("index", "is missing")
    except OSError as error:
        add("index", f"cannot be read: {error.strerror or error}")
    except UserError as error:
        add("index", str(error))
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
        what = f"has {len(data):,} bytes instead of {entry.bytes:,}"
    else:
        what = "is damaged (sha256 differs)"
    if index is None or index.facts["sha256"] != entry.sha256:
        return what
    damaged = [
        index.key(position)
        for position in range(len(index))
        if any(crc32(data[m.offset : m.offset + m.size]) != m.crc32 for m in index.members(position).values())
    ]
    if damaged:
        return f"{what}: {len(damaged):,} of {len(index):,} samples, the first {damaged[0]}"
    return f"{what}: no sample, only headers between them"


def _compare_index(check: ShardCheck, index: ShardIndex | None, found: ShardIndex, add: Add, *, trusted: bool) -> None:
    """Compare the index with the one made from its tar, and with the manifest's entry."""
    if index is None:
        return
    if (index.facts["sha256"], index.facts["bytes"]) != (found.facts["sha256"], found.facts["bytes"]):
        add("index", "is of another tar (bytes or sha256 differ)")
        return
    if names := differing(index, found):
        add("index", f"{', '.join(names)} differ from what its tar holds")
        return
    check.words, keys = words_of(index), index.keys_S.tolist()
    check.keys = [*keys[:1], *keys[-1:]]
    entry = ShardEntry.of(check.entry.name, index)
    if entry != replace(check.entry, sha256=entry.sha256):
        text = f"{entry.name}: samples, captions, failures, bytes or fingerprint differ"
        add("index" if trusted else "manifest", f"index and manifest do not agree on {text}")


def differing(first: ShardIndex, second: ShardIndex) -> list[str]:
    """The names of what differs between two indexes."""
    names = [f.name for f in fields(ShardIndex) if f.name != "optional"]
    pairs = {name: (getattr(first, name), getattr(second, name)) for name in names}
    for name in first.optional | second.optional:
        pairs[name] = first.optional.get(name), second.optional.get(name)
    return [name for name, (one, other) in pairs.items() if not _is_equal(one, other)]


def _is_equal(first: Any, second: Any) -> bool:
    if isinstance(first, np.ndarray) and isinstance(second, np.ndarray):
        return first.dtype == second.dtype and np.array_equal(first, second)
    return type(first) is type(second) and first == second
