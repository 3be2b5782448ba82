"""Whether a dataset folder holds what its manifests say: every byte, and everything that one file says of another.

Shards are read one after the other (a few at once, in threads).
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from captioner.cli import progress_bar
from captioner.errors import UserError
from captioner.files import storage
from captioner.shards.format import NOT_KEPT, SPLITS, Manifest, ShardEntry, manifest_location, read_manifest, shard_name
from captioner.shards.indexing import is_any, is_foreign, list_names
from captioner.shards.writing import manifest_fingerprint
from captioner.vocabulary import Vocabulary, read_vocabulary
from captioner.workers import count_processors
from sharding.checking.rebuild import recipe_of
from sharding.checking.verify_shard import (
    INDEX_FIRST,
    INDEX_SAME,
    PACK_SAME,
    Part,
    Problem,
    ShardCheck,
    check_shard,
)

MAX_THREADS = 8
NO_FOLDER = "there is no dataset folder {}: sharding/make_shards.py makes one"


@dataclass(kw_only=True, slots=True)
class SplitCheck:
    """What was found of one split: problems of its files alone, its shards, and problems of all of them together."""

    split: str
    manifest: Manifest | None = None
    own_problems: list[Problem] = field(default_factory=list)
    shards: list[ShardCheck] = field(default_factory=list)
    cross_problems: list[Problem] = field(default_factory=list)

    @property
    def problems(self) -> list[Problem]:
        """The split's problems, then its shards'."""
        of_shards = [problem for shard in self.shards for problem in shard.problems]
        return [*self.own_problems, *self.cross_problems, *of_shards]


def check_folder(folder: str, split: str | None, *, doing: str) -> list[SplitCheck]:
    """Check the splits, or this one, under one progress bar. Raises UserError where there are no shards."""
    wanted, names = find_splits(folder, split)
    checks = [open_manifest(folder, name, names) for name in wanted]
    total = sum(check.manifest.num_samples for check in checks if check.manifest)
    with progress_bar(f"{doing} {folder}", total=total, unit="images") as bar:
        for check in checks:
            check_split(folder, check, report=bar.advance)
    return checks


def find_problems(folder: str, checks: Sequence[SplitCheck]) -> list[Problem]:
    """The problems of the splits and of the vocabulary that they have in common."""
    problems = [problem for check in checks for problem in check.problems]
    captioned = [check for check in checks if check.manifest is None or not is_any(check.manifest)]
    if captioned:
        problems += _check_vocabulary(folder, next((check for check in captioned if check.split == "train"), None))
    return problems


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
    """The split's manifest, checked in itself, and the shards among `names` that it does not list."""
    check = SplitCheck(split=split)
    name = f"{split}.manifest.json"

    def add(part: Part, file: str, what: str, remedy: str) -> None:
        check.own_problems.append(Problem(part=part, file=file, what=what, remedy=remedy))

    shards = [name for name in names if re.match(rf"{split}-\d+\.(tar|index)$", name)]
    num_indexes = sum(name.endswith(".index") for name in shards)
    if name not in names and num_indexes:
        add(
            "unfinished", f"{split}-*", f"{num_indexes:,} shards, but no manifest: the packing is unfinished", PACK_SAME
        )
    elif name not in names:
        add("unfinished", f"{split}-*", f"{len(shards):,} tars without indexes and manifest", INDEX_FIRST)
    else:
        try:
            manifest = read_manifest(folder, split, remedy="")
            problems = list(
                _check_manifest(manifest, split=split, raw=storage.read_bytes(manifest_location(folder, split)))
            )
        except (UserError, OSError, TypeError, ValueError) as error:
            add("manifest", name, f"cannot be used: {str(error).rstrip(': ')}", PACK_SAME)
            return check
        if not _names_are_right(manifest, split):  # then nothing of it can be believed, least of all what is stray
            what = "cannot be used: its shards are of another split, not numbered in order, or listed twice"
            add("manifest", name, what, PACK_SAME)
            return check
        check.manifest = manifest
        check.own_problems += [Problem.of(manifest, "manifest", what) for what in problems]
        suffixes = ("index",) if is_foreign(manifest) else ("tar", "index")
        listed = {f"{entry.name}.{suffix}" for entry in manifest.shards for suffix in suffixes}
        for stray in shards:
            if stray not in listed and stray.endswith(suffixes):
                add("stray", stray, "is not in the manifest: it is left of another packing", "delete it")
    return check


def _names_are_right(manifest: Manifest, split: str) -> bool:
    names = [entry.name for entry in manifest.shards]
    if manifest.split != split:
        return False
    if is_foreign(manifest):
        return len(set(names)) == len(names)
    return names == [shard_name(split, number) for number in range(len(names))]


def _check_manifest(manifest: Manifest, *, split: str, raw: bytes) -> Iterator[str]:
    source = manifest.source
    if source.get("split") != split:
        yield f"says that its source is of split {source.get('split')}"
    wanted = {"split", "records", "pattern"} if is_foreign(manifest) else {"split", "records", "captions", "images"}
    if missing := wanted - source.keys():
        yield f"its source lacks {', '.join(sorted(missing))}"
    if not manifest.num_samples:
        yield "lists no sample"
    if source.get("records") != manifest.num_samples + sum(entry.failures for entry in manifest.shards):
        yield f"{source.get('records')} records are not its samples and what was left out"
    if manifest.fingerprint != manifest_fingerprint(manifest.shards):
        yield "its fingerprint is not that of its shards"
    if json.loads(manifest.to_json()) != json.loads(raw):
        yield "its totals are not those of its shards: it was edited or is damaged"


# ---- all shards together ----------------------------------------------------------------------------------


def check_split(folder: str, check: SplitCheck, *, report: Callable[[int], None]) -> None:
    """Check the shards of a split that has a manifest, except those found whole before, and what they say together.

    `report` is called with the number of samples of each checked shard.
    """
    manifest = check.manifest
    if manifest is None:
        return
    listed, problem = _read_failures(folder, manifest)
    whole = {shard.entry.name: shard for shard in check.shards if not shard.problems}
    trusted = not any(problem.part == "manifest" for problem in check.own_problems)

    def check_or_keep(entry: ShardEntry) -> ShardCheck:
        return whole.get(entry.name) or check_shard(folder, entry, manifest, trusted=trusted, listed=listed)

    check.shards = []
    threads = ThreadPoolExecutor(min(MAX_THREADS, count_processors()))
    try:
        for shard in threads.map(check_or_keep, manifest.shards):
            check.shards.append(shard)
            report(shard.entry.samples)
    finally:
        threads.shutdown(cancel_futures=True)
    check.cross_problems = [problem] if problem else []
    found = [*_check_settings(check.shards, manifest), *_check_keys(check.shards, manifest)]
    found += _check_failures(check.shards, manifest, listed) if listed is not None else []
    check.cross_problems += found


def _read_failures(folder: str, manifest: Manifest) -> tuple[list[Any] | None, Problem | None]:
    """The lines of `SPLIT.failures.jsonl`, or None and what is wrong with it."""
    try:
        text = storage.read_bytes(storage.join(folder, f"{manifest.split}.failures.jsonl")).decode()
        *lines, rest = text.split("\n")
        if rest:
            raise ValueError("its last line is cut")
        listed = [json.loads(line) for line in lines]
        Counter(failure["reason"] for failure in listed)
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
        return None, Problem.of(manifest, "failures", what)
    return listed, None


def _check_failures(shards: Sequence[ShardCheck], manifest: Manifest, listed: Sequence[Any]) -> Iterator[Problem]:
    """Whether the list of failures ends with those of the shards, and the manifest counts what it lists."""
    facts = [shard.facts for shard in shards if shard.facts is not None and not shard.has("index")]
    failures = [failure for fact in facts for failure in fact["failures"]]
    counted = {reason: count for reason, count in manifest.failures.items() if reason != NOT_KEPT}
    is_complete = len(facts) == len(shards)
    if is_complete and list(listed[len(listed) - len(failures) :]) != failures:
        yield Problem.of(manifest, "failures", "does not end with the failures that the shards' indexes list")
    elif dict(Counter(failure["reason"] for failure in listed)) != counted:
        yield Problem.of(manifest, "manifest", "its failures by reason are not those that are listed beside it")
    if is_complete and manifest.failures.get(NOT_KEPT, 0) != sum(fact.get("not_kept", 0) for fact in facts):
        yield Problem.of(manifest, "manifest", "its number of samples that were not kept is not that of its shards")


def _check_settings(shards: Sequence[ShardCheck], manifest: Manifest) -> Iterator[Problem]:
    """Whether the manifest says the recipe and the backends that the indexes say."""
    facts = [shard.facts for shard in shards if shard.facts is not None]
    backend = " and ".join(sorted({fact["backend"] for fact in facts}))
    other_backend = len(facts) == len(shards) and backend != manifest.settings.get("backend")
    if other_backend or any(fact["recipe"] != recipe_of(manifest) for fact in facts):
        yield Problem.of(manifest, "manifest", "its settings are not those of its shards")


def _check_keys(shards: Sequence[ShardCheck], manifest: Manifest) -> Iterator[Problem]:
    """Whether keys ascend from shard to shard; those of other programs' tars begin with the tar's name."""
    last = b""
    for shard in shards if not is_foreign(manifest) else ():
        before, last = last, (shard.keys or [last])[-1]
        if shard.keys and shard.keys[0] <= before:
            what = f"its first key {shard.keys[0].decode(errors='backslashreplace')} does not follow the last shard's"
            yield Problem.of(manifest, "content", what, shard=shard.entry.name)


# ---- vocabulary -------------------------------------------------------------------------------------------


def _check_vocabulary(folder: str, train: SplitCheck | None) -> list[Problem]:
    """Whether vocabulary.json can be used, and is what the training captions give, unless it was given to packing."""
    name = "vocabulary.json"
    location = storage.join(folder, name)
    manifest = None if train is None else train.manifest
    problem = None
    try:
        vocabulary = read_vocabulary(location, remedy="")
        if json.loads(vocabulary.to_json()) != json.loads(storage.read_bytes(location)):
            problem = "it holds more than what was written: it was edited or is damaged"
        elif train is not None and manifest is not None and all(shard.words is not None for shard in train.shards):
            counts: Counter[str] = Counter()
            for shard in train.shards:
                counts.update(shard.words or {})
            problem = _compare_words(vocabulary, counts)
    except (UserError, TypeError, ValueError, KeyError, AttributeError) as error:
        problem = str(error).rstrip(": ")
    remedy = INDEX_SAME if manifest is not None and is_foreign(manifest) else PACK_SAME
    return [Problem(part="vocabulary", file=name, what=problem, remedy=remedy)] if problem else []


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
