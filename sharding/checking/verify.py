"""Whether a dataset folder holds what its manifests say: every byte, and everything that one file says of another.

Shards are read one after the other (a few at once, in threads).
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, get_args

from captioner.cli import Bar
from captioner.errors import UserError
from captioner.files import storage
from captioner.images import loading
from captioner.shards.format import NOT_KEPT, SPLITS, Manifest, manifest_location, read_manifest, shard_name
from captioner.shards.indexing import BACKEND as FOREIGN
from captioner.shards.indexing import is_foreign, list_names
from captioner.shards.writing import manifest_fingerprint
from captioner.vocabulary import Vocabulary, read_vocabulary
from captioner.workers import count_processors
from sharding.checking.verify_shard import (
    INDEX_FIRST,
    INDEX_SAME,
    PACK_ANEW,
    PACK_SAME,
    REPAIR,
    Part,
    Problem,
    ShardCheck,
    check_shard,
)

MAX_THREADS = 8
NO_FOLDER = "there is no dataset folder {}: sharding/make_shards.py makes one"


@dataclass(kw_only=True, slots=True)
class SplitCheck:
    """What was found of one split; `problems` has those of the split's own files, `shards` the others."""

    split: str
    manifest: Manifest | None = None
    problems: list[Problem] = field(default_factory=list)
    shards: list[ShardCheck] = field(default_factory=list)

    @property
    def all_problems(self) -> list[Problem]:
        """The split's problems, then its shards'."""
        return [*self.problems, *(problem for shard in self.shards for problem in shard.problems)]


# ---- which splits -----------------------------------------------------------------------------------------


def find_splits(folder: str, split: str | None) -> tuple[list[str], list[str]]:
    """The splits that the folder holds something of, and the names of its files. Raises UserError for none."""
    if folder.startswith(storage.WEB):  # a web server lists nothing that could be relied on
        names = [f"{s}.manifest.json" for s in SPLITS if storage.exists(manifest_location(folder, s))]
    else:
        names = list_names(folder, "*", missing=NO_FOLDER)
    found = [s for s in SPLITS if any(re.match(rf"{s}(\.manifest\.json|-\d+\.(tar|index))$", name) for name in names)]
    wanted = [s for s in found if split in (None, s)]
    if not wanted:
        what = f"of split {split} " if split else ""
        raise UserError(f"{folder} holds no shards {what}(splits there: {', '.join(found) or 'none'})")
    return wanted, names


def open_manifest(folder: str, split: str, names: Sequence[str]) -> SplitCheck:
    """The split's manifest, checked in itself, and files that it does not know."""
    check = SplitCheck(split=split)
    location, own = manifest_location(folder, split), f"{split}.manifest.json"
    shards = [name for name in names if re.match(rf"{split}-\d+\.(tar|index)$", name)]
    if own not in names:
        num_packed = sum(name.endswith(".index") for name in shards)
        what, remedy = f"{num_packed:,} shards, but no manifest: the packing is unfinished", PACK_SAME
        if not num_packed:
            what, remedy = f"{len(shards):,} tars without indexes and manifest", INDEX_FIRST
        check.problems.append(Problem(part="unfinished", file=f"{split}-*", what=what, remedy=remedy))
        return check
    try:
        check.manifest = manifest = read_manifest(folder, split, remedy="")
        problems = list(_check_manifest(manifest, split=split, raw=storage.read_bytes(location)))
    except (UserError, OSError, TypeError, ValueError) as error:
        check.manifest, problems = None, [f"cannot be used: {str(error).rstrip(': ')}"]
    else:
        if not _names_are_right(manifest, split):  # then nothing of it can be believed, least of all what is stray
            what = "cannot be used: its shards are of another split, not numbered in order, or listed twice"
            check.manifest, manifest, problems = None, replace(manifest, shards=()), [what]
            shards = []
        listed = {f"{entry.name}.{ending}" for entry in manifest.shards for ending in ("tar", "index")}
        strays = [name for name in shards if name not in listed and not (is_foreign(manifest) and name.endswith("tar"))]
        for name in strays:
            what = "is not in the manifest: it is left of another packing"
            check.problems.append(Problem(part="stray", file=name, what=what, remedy="delete it"))
    remedy = INDEX_SAME if check.manifest and is_foreign(check.manifest) else PACK_SAME
    check.problems += [Problem(part="manifest", file=own, what=what, remedy=remedy) for what in problems]
    return check


def _names_are_right(manifest: Manifest, split: str) -> bool:
    names = [entry.name for entry in manifest.shards]
    if manifest.split != split:
        return False
    if is_foreign(manifest):
        return len(set(names)) == len(names)
    return names == [shard_name(split, number) for number in range(len(names))]


def _check_manifest(manifest: Manifest, *, split: str, raw: bytes) -> Iterator[str]:
    if manifest.source.get("split") != split:
        yield f"says that its source is of split {manifest.source.get('split')}"
    wanted = {"split", "records", "pattern"} if is_foreign(manifest) else {"split", "records", "captions", "images"}
    if missing := wanted - manifest.source.keys():
        yield f"its source lacks {', '.join(sorted(missing))}"
    if not manifest.num_samples:
        yield "lists no sample"
    if manifest.fingerprint != manifest_fingerprint(manifest.shards):
        yield "its fingerprint is not that of its shards"
    if json.loads(manifest.to_json()) != json.loads(raw):
        yield "its totals are not those of its shards: it was edited or is damaged"


# ---- all shards together ----------------------------------------------------------------------------------


def check_split(folder: str, check: SplitCheck, bar: Bar) -> None:
    """Check all shards of a split that has a manifest, and what they say together; fills `check`."""
    manifest = check.manifest
    if manifest is None:
        return
    entries = manifest.shards
    threads = ThreadPoolExecutor(min(MAX_THREADS, count_processors()))
    try:
        for shard in threads.map(lambda entry: check_shard(folder, entry, manifest), entries):
            check.shards.append(shard)
            bar.advance(shard.entry.samples)
    finally:
        threads.shutdown(cancel_futures=True)
    _check_together(folder, check, manifest)


def read_failures(folder: str, split: str) -> list[Any]:
    """The lines of `SPLIT.failures.jsonl`. Raises OSError or ValueError."""
    text = storage.read_bytes(storage.join(folder, f"{split}.failures.jsonl")).decode()
    lines = text.split("\n")
    if lines.pop():
        raise ValueError("its last line is cut")
    return [json.loads(line) for line in lines]


def _check_together(folder: str, check: SplitCheck, manifest: Manifest) -> None:
    own = f"{check.split}.manifest.json"
    remedy = INDEX_SAME if is_foreign(manifest) else PACK_SAME

    def add(what: str, *, file: str = own, part: Part = "manifest", remedy: str = remedy) -> None:
        check.problems.append(Problem(part=part, file=file, what=what, remedy=remedy))

    readable = [shard for shard in check.shards if shard.facts is not None]
    _check_settings(check, readable, manifest, add)
    if not is_foreign(manifest):  # their keys begin with their tar's name
        _check_keys(check)
    name = f"{check.split}.failures.jsonl"
    try:
        listed = read_failures(folder, check.split)
        reasons = Counter(failure["reason"] for failure in listed)
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
        add(what, file=name, part="failures")
        return
    whole = len(readable) == len(check.shards) and not any(shard.has("index") for shard in check.shards)
    packed = [failure for shard in readable if shard.facts for failure in shard.facts["failures"]]
    if whole and listed[len(listed) - len(packed) :] != packed:
        add(
            "does not list the failures of the shards, whose indexes have their own checksums",
            file=name,
            part="failures",
        )
    elif dict(reasons) != {reason: n for reason, n in manifest.failures.items() if reason != NOT_KEPT}:
        add(f"its failures by reason are not those that {name} lists")
    not_kept = sum(shard.facts.get("not_kept", 0) for shard in readable if shard.facts)
    if whole and manifest.failures.get(NOT_KEPT, 0) != not_kept:
        add("its number of samples that were not kept is not that of its shards")
    if whole and manifest.source.get("records") != manifest.num_samples + len(packed) + not_kept:
        add(f"{manifest.source.get('records')} records are not its samples and what was left out")


def _check_settings(check: SplitCheck, readable: Sequence[ShardCheck], manifest: Manifest, add: Any) -> None:
    """Whether indexes and manifest tell the same recipe and backend; the one that stands alone is to blame."""
    backends = {FOREIGN} if is_foreign(manifest) else set(get_args(loading.Backend))
    facts = [(shard, shard.facts) for shard in readable if shard.facts]
    odd = [shard for shard, fact in facts if any(manifest.settings.get(k) != v for k, v in fact["recipe"].items())]
    if odd and len(odd) == len(facts):
        add("its settings are not those of its shards")
        odd = []
    odd += [shard for shard, fact in facts if fact["backend"] not in backends and shard not in odd]
    for shard in odd:
        what = "its recipe or backend is another than the manifest's"
        shard.problems.append(Problem(part="index", file=f"{shard.entry.name}.index", what=what, remedy=REPAIR))
    if not odd and len(facts) == len(check.shards):
        joined = " and ".join(sorted({fact["backend"] for _, fact in facts}))
        if joined != manifest.settings.get("backend"):
            add(f"its backend is {manifest.settings.get('backend')}, its shards' {joined or 'none'}")


def _check_keys(check: SplitCheck) -> None:
    """Keys are unique: they ascend from shard to shard, and inside, as the scan saw."""
    last = b""
    for shard in check.shards:
        before, last = last, (shard.keys or [last])[-1]
        if shard.keys and shard.keys[0] <= before:
            what = f"its first key {shard.keys[0].decode(errors='backslashreplace')} does not follow the last shard's"
            shard.problems.append(Problem(part="content", file=f"{shard.entry.name}.tar", what=what, remedy=PACK_ANEW))


# ---- vocabulary -------------------------------------------------------------------------------------------


def check_vocabulary(folder: str, train: SplitCheck | None) -> Problem | None:
    """Whether vocabulary.json can be used, and is what the training captions give, unless it was given to packing."""
    name = "vocabulary.json"
    location = storage.join(folder, name)
    foreign = train is not None and train.manifest is not None and is_foreign(train.manifest)
    remedy = INDEX_SAME if foreign else PACK_SAME
    problem = None
    try:
        vocabulary = read_vocabulary(location, remedy="")
        if json.loads(vocabulary.to_json()) != json.loads(storage.read_bytes(location)):
            problem = "it holds more than what was written: it was edited or is damaged"
        elif train is not None and train.manifest is not None and all(s.words is not None for s in train.shards):
            counts: Counter[str] = Counter()
            for shard in train.shards:
                counts.update(shard.words or {})
            problem = _compare_words(vocabulary, counts)
    except (UserError, TypeError, ValueError, KeyError, AttributeError) as error:
        problem = str(error).rstrip(": ")
    return Problem(part="vocabulary", file=name, what=problem, remedy=remedy) if problem else None


def _compare_words(vocabulary: Vocabulary, counts: Counter[str]) -> str | None:
    """What is wrong with a vocabulary that was made from words with these counts; None for one made elsewhere."""
    own = Vocabulary.from_counts(counts, threshold=vocabulary.threshold)
    if (own.words, own.counts) == (vocabulary.words, vocabulary.counts):
        return None
    same_counts = all(counts[word] == n for word, n in zip(vocabulary.words[4:], vocabulary.counts[4:], strict=False))
    if own.words == vocabulary.words or (same_counts and len(vocabulary) > 4):
        return "its counts or its threshold are not those of the training captions"
    with suppress(ValueError):
        if len(vocabulary.counts) != len(vocabulary) or min(vocabulary.counts[4:]) < vocabulary.threshold:
            return "its counts do not fit its words and threshold"
    return None


def as_rows(problems: Sequence[Problem]) -> list[tuple[str, str, str]]:
    """Problems as rows of a table."""
    return [(problem.file, problem.what, problem.remedy) for problem in problems]
