"""Whether one shard is what was written: its tar walked without its index, and the index built again from that.

The two indexes must say the same; what vouches for the tar is the sha256 in manifest and index.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from zlib import crc32

import numpy as np

from captioner.errors import UserError
from captioner.files import storage
from captioner.samples import words_of
from captioner.shards.format import Manifest, ShardEntry, ShardIndex
from captioner.shards.indexing import is_chosen, is_foreign
from captioner.shards.tar_walk import open_tar
from captioner.shards.writing import manifest_fingerprint
from sharding.checking.rebuild import index_from_tar

PACK_SAME = "run sharding/make_shards.py again with the same flags: whole shards are kept"
INDEX_FIRST = "pack again, or, if another program made them, run sharding/check_shards.py index"
INDEX_SAME = "run sharding/check_shards.py index again"
CHOOSE_SAME = "run captioner.streaming.index_shards again with the same `keep`"
REPAIR = "run sharding/check_shards.py repair"
RESTORE = "bring the file back from where it came"
PACK_ANEW = "delete the split's shards and pack it anew"

Part = Literal["tar", "index", "content", "manifest", "failures", "vocabulary", "unfinished", "stray"]
Add = Callable[[Part, str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """Something that is not as it should be: in which part, in which file, what, and what to do."""

    part: Part
    file: str
    what: str
    remedy: str


@dataclass(kw_only=True, slots=True)
class ShardCheck:
    """What was found of one shard. `facts` and `words` are its index's, None where the index cannot be used.

    `keys` are its first and its last.
    """

    entry: ShardEntry
    problems: list[Problem] = field(default_factory=list)
    facts: dict[str, Any] | None = None
    words: Counter[str] | None = None
    keys: list[bytes] = field(default_factory=list)

    def has(self, *parts: Part) -> bool:
        """Whether one of these parts has a problem."""
        return any(problem.part in parts for problem in self.problems)


def check_shard(folder: str, entry: ShardEntry, manifest: Manifest) -> ShardCheck:
    """Read one shard and its index whole."""
    check = ShardCheck(entry=entry)
    index = _open_index(folder, check, manifest)

    def add(part: Part, what: str) -> None:
        check.problems.append(_shard_problem(part, what, entry=entry, manifest=manifest))

    found = None
    try:
        with open_tar(storage.join(folder, f"{entry.name}.tar")) as data:
            digest = hashlib.sha256(data).hexdigest()
            if _vouch(data, digest, entry, index, add):
                facts = {} if index is None else index.facts
                found = index_from_tar(data, facts, sha256=digest, entry=entry, manifest=manifest, before=index)
    except FileNotFoundError:
        add("tar", "is missing")
    except OSError as error:
        add("tar", f"cannot be read: {error.strerror or error}")
    for what in found.problems if found else ():
        add("content", what)
    if found is not None and index is not None:
        for what in index_differences(index, found.index):
            add("index", what)
        if not check.has("index"):
            _take_over(check, index, manifest, add)
    return check


def _vouch(data: Any, digest: str, entry: ShardEntry, index: ShardIndex | None, add: Add) -> bool:
    """Whether the tar is the shard that was written: its manifest says so, or else the index that belongs to it."""
    if digest == entry.sha256:
        return True
    its_own = index is not None and index.facts["fingerprint"] == entry.fingerprint
    if index is not None and its_own and index.facts["sha256"] == digest:
        add("manifest", f"does not fit {entry.name}: its sha256 differs from its tar's and index's")
        return True
    add("tar", _what_is_damaged(data, entry, index))
    if index is not None and not its_own and index.facts["sha256"] != entry.sha256:
        add("index", "is of another shard (sha256 and fingerprint differ from the manifest's)")
    return False


def _take_over(check: ShardCheck, index: ShardIndex, manifest: Manifest, add: Add) -> None:
    """What an index that fits its tar says of the shard, compared with the manifest's entry."""
    entry, keys = check.entry, index.keys_S.tolist()
    check.keys = [*keys[:1], *keys[-1:]]
    check.words = words_of(index)
    found = ShardEntry.of(entry.name, index)
    if found != replace(entry, sha256=found.sha256, fingerprint=found.fingerprint):
        add("manifest", f"does not fit {entry.name}: samples, captions, failures or bytes are others")
    if index.facts["fingerprint"] != entry.fingerprint:
        fits = manifest.fingerprint == manifest_fingerprint(manifest.shards)
        add("index" if fits else "manifest", f"the fingerprints of {entry.name} in index and manifest differ")


def _shard_problem(part: Part, what: str, *, entry: ShardEntry, manifest: Manifest) -> Problem:
    """A problem with the remedy for it."""
    foreign = is_foreign(manifest)
    remedies = {"tar": RESTORE if foreign else REPAIR, "index": _index_remedy(manifest), "content": PACK_ANEW}
    remedy = remedies.get(part, INDEX_SAME if foreign else PACK_SAME)
    file = f"{entry.name}.{'index' if part == 'index' else 'tar'}"
    file = f"{manifest.split}.manifest.json" if part == "manifest" else file
    return Problem(part=part, file=file, what=what, remedy=remedy)


def _index_remedy(manifest: Manifest) -> str:
    return CHOOSE_SAME if is_chosen(manifest) else REPAIR


def _open_index(folder: str, check: ShardCheck, manifest: Manifest) -> ShardIndex | None:
    """The shard's index; a problem where it is missing or not readable."""
    name = f"{check.entry.name}.index"
    location = storage.join(folder, name)
    try:
        index = ShardIndex.from_bytes(storage.read_bytes(location), origin=name)
        if missing := {"bytes", "sha256", "fingerprint", "recipe", "backend", "failures"} - index.facts.keys():
            raise UserError(f"lacks {', '.join(sorted(missing))}")
        if not isinstance(index.facts["recipe"], dict) or not isinstance(index.facts["failures"], list):
            raise UserError("its recipe or its failures are nothing of the kind")
        check.facts = index.facts
        return index
    except FileNotFoundError:
        what = "is missing"
    except OSError as error:
        what = f"cannot be read: {error.strerror or error}"
    except UserError as error:
        what = str(error)
    check.problems.append(Problem(part="index", file=name, what=what, remedy=_index_remedy(manifest)))
    return None


def _what_is_damaged(data: Any, entry: ShardEntry, index: ShardIndex | None) -> str:
    """In which way a tar differs from what was packed, down to its samples where the index tells."""
    if len(data) != entry.bytes:
        what = f"has {len(data):,} bytes instead of {entry.bytes:,}"
    else:
        what = "is damaged (sha256 differs)"
    if index is None or index.facts["sha256"] != entry.sha256:
        return what
    hurt = [
        index.key(place)
        for place in range(len(index))
        if any(crc32(data[m.offset : m.offset + m.size]) != m.crc32 for m in index.members(place).values())
    ]
    if hurt:
        return f"{what}: {len(hurt):,} of {len(index):,} samples, the first {hurt[0]}"
    return f"{what}: no sample, only headers between them"


def index_differences(index: ShardIndex, found: ShardIndex) -> Iterator[str]:
    """How an index differs from the one built from its tar with the same facts."""
    if (index.facts["sha256"], index.facts["bytes"]) != (found.facts["sha256"], found.facts["bytes"]):
        yield "is of another tar (bytes or sha256 differ)"
        return
    names = {
        "keys_S": "keys",
        "first_member": "numbers of members",
        "member_fields_M": "fields",
        "fields": "names of fields",
        "offsets_M": "offsets",
        "sizes_M": "sizes",
        "crc32s_M": "checksums",
        "facts": "facts",
    }
    differ = [text for name, text in names.items() if _differs(getattr(index, name), getattr(found, name))]
    optional = {
        "first_caption": "numbers of captions",
        "caption_lengths": "token counts of captions",
        "words": "counts of words",
    }
    differ += [text for name, text in optional.items() if _differs(index.optional.get(name), found.optional.get(name))]
    if differ:
        yield f"{', '.join(differ)} differ from what its tar holds"


def _differs(first: Any, second: Any) -> bool:
    if isinstance(first, np.ndarray) and isinstance(second, np.ndarray):
        return first.dtype != second.dtype or first.shape != second.shape or bool((first != second).any())
    return first != second
