"""Verifies a dataset folder: every byte against the manifests, and whether all its files agree with each other.

Shards are read in order, a few at a time, in threads.
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
from captioner.shards.format import (
    NOT_KEPT,
    PACK_FIRST,
    SPLITS,
    Manifest,
    ShardEntry,
    manifest_location,
    read_manifest,
    shard_name,
)
from captioner.shards.indexing import is_any, is_foreign, list_names
from captioner.shards.writing import manifest_fingerprint
from captioner.vocabulary import Vocabulary, read_vocabulary
from captioner.workers import count_processors
from sharding.checking.rebuild import recipe_of
from sharding.checking.verify_shard import (
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
    """The result of checking one split: problems of its own files, its shards, and what they say about each other."""

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
    checks = [check_manifest(folder, name, names) for name in wanted]
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
    """The splits of which the folder has files, and the names of all its files. Raises UserError if none."""
    if folder.startswith(storage.WEB):  # a web server's listing cannot be relied on
        names = [f"{s}.manifest.json" for s in SPLITS if storage.exists(manifest_location(folder, s))]
    else:
        names = list_names(folder, "*", missing=NO_FOLDER)
    found = [s for s in SPLITS if any(re.match(rf"{s}(\.manifest\.json|-\d+\.(tar|index))$", name) for name in names)]
    wanted = [s for s in found if split in (None, s)]
    if not wanted:
        what = f"of split {split} " if split else ""
        raise UserError(f"{folder} holds no shards {what}(splits there: {', '.join(found) or 'none'})")
    return wanted, names


def check_manifest(folder: str, split: str, names: Sequence[str]) -> SplitCheck:
    """Check a split's manifest on its own, and that it lists all shards among `names`; no shard is opened."""
    check = SplitCheck(split=split)
    name = f"{split}.manifest.json"

    def add(part: Part, file: str, what: str, remedy: str) -> None:
        check.own_problems.append(Problem(part=part, file=file, what=what, remedy=remedy))

    if name not in names:
        add("unfinished", f"{split}-*", "has no manifest: it is unfinished", PACK_FIRST)
        return check
    try:
        manifest = read_manifest(folder, split, remedy="")
        is_consistent = _is_consistent(manifest, split=split, raw=storage.read_bytes(manifest_location(folder, split)))
    except (UserError, OSError, TypeError, ValueError) as error:
        add("manifest", name, f"cannot be used: {str(error).rstrip(': ')}", PACK_SAME)
        return check
    check.manifest = manifest
    if not is_consistent:
        what = "contradicts itself (split, records, fingerprint or totals), or lists no sample"
        check.own_problems.append(Problem.of(manifest, "manifest", what))
    suffixes = ("index",) if is_foreign(manifest) else ("tar", "index")
    listed = {f"{entry.name}.{suffix}" for entry in manifest.shards for suffix in suffixes}
    for name in names:
        if re.match(rf"{split}-\d+\.({'|'.join(suffixes)})$", name) and name not in listed:
            add("stray", name, "is not in the manifest: an earlier packing left it", "delete it")
    return check


def _is_consistent(manifest: Manifest, *, split: str, raw: bytes) -> bool:
    """Whether a manifest does not contradict itself. Raises ValueError for wrong names of shards."""
    names, foreign, source = [entry.name for entry in manifest.shards], is_foreign(manifest), manifest.source
    wanted = names if foreign else [shard_name(split, number) for number in range(len(names))]
    if manifest.split != split or names != wanted or len(set(names)) < len(names):
        raise ValueError("its shards are of another split, not numbered in order, or listed twice")
    num_samples = manifest.num_samples
    return (
        num_samples > 0
        and source.keys() >= {"split", "records", *(("pattern",) if foreign else ("captions", "images"))}
        and source["split"] == split
        and source["records"] == num_samples + sum(entry.failures for entry in manifest.shards)
        and manifest.fingerprint == manifest_fingerprint(manifest.shards)
        and json.loads(manifest.to_json()) == json.loads(raw)  # its totals
    )


# ---- all shards together ----------------------------------------------------------------------------------


def check_split(folder: str, check: SplitCheck, *, report: Callable[[int], None]) -> None:
    """Check a split's shards, and whether their indexes agree with the manifest; sets `shards` and `cross_problems`.

    Shards without problems in an earlier check are not read again. `report` is called with each shard's number of
    samples. Does nothing without a manifest.
    """
    manifest = check.manifest
    if manifest is None:
        return
    listed = _read_failures(folder, manifest)
    intact = {shard.entry.name: shard for shard in check.shards if not shard.problems}
    trusted = not any(problem.part == "manifest" for problem in check.own_problems)

    def check_or_keep(entry: ShardEntry) -> ShardCheck:
        return intact.get(entry.name) or check_shard(folder, entry, manifest, listed, trusted=trusted)

    check.shards = []
    threads = ThreadPoolExecutor(min(MAX_THREADS, count_processors()))
    try:
        for shard in threads.map(check_or_keep, manifest.shards):
            check.shards.append(shard)
            report(shard.entry.samples)
    finally:
        threads.shutdown(cancel_futures=True)
    check.cross_problems = list(_check_indexes(check.shards, manifest, listed))


def _read_failures(folder: str, manifest: Manifest) -> list[Any] | None:
    """The lines of `SPLIT.failures.jsonl`, or None where it is missing or damaged."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        *lines, rest = storage.read_bytes(storage.join(folder, f"{manifest.split}.failures.jsonl")).split(b"\n")
        listed = [json.loads(line) for line in lines]
        Counter(failure["reason"] for failure in listed)
        return None if rest else listed
    return None


def _check_indexes(shards: Sequence[ShardCheck], manifest: Manifest, listed: Sequence[Any] | None) -> Iterator[Problem]:
    """Problems where the manifest or the list of failures contradicts the shards' indexes."""
    facts = [shard.facts for shard in shards if shard.facts is not None and not shard.has("index")]
    is_complete = len(facts) == len(shards)
    backend = " and ".join(sorted({fact["backend"] for fact in facts}))
    other_backend = is_complete and backend != manifest.settings.get("backend")
    if other_backend or any(fact["recipe"] != recipe_of(manifest) for fact in facts):
        yield Problem.of(manifest, "manifest", "its settings are not those of its shards")
    if listed is None:
        yield Problem.of(manifest, "failures", "is missing or damaged")
    if listed is None or not is_complete:
        return
    failures = [failure for fact in facts for failure in fact["failures"]]
    reasons = Counter(failure["reason"] for failure in listed)
    reasons[NOT_KEPT] = sum(fact.get("not_kept", 0) for fact in facts)
    if listed[len(listed) - len(failures) :] != failures:
        yield Problem.of(manifest, "failures", "does not end with the failures that the shards' indexes list")
    elif reasons != Counter(manifest.failures):
        yield Problem.of(manifest, "manifest", "its failures by reason are not those of its shards and before packing")


# ---- vocabulary -------------------------------------------------------------------------------------------


def _check_vocabulary(folder: str, train: SplitCheck | None) -> list[Problem]:
    """Problems of vocabulary.json: it cannot be read, or was neither made from the training captions nor given."""
    name = "vocabulary.json"
    manifest = None if train is None else train.manifest
    problem = None
    try:
        vocabulary = read_vocabulary(storage.join(folder, name), remedy="")
        is_same = json.loads(vocabulary.to_json()) == json.loads(storage.read_bytes(storage.join(folder, name)))
        words = None if manifest is None or train is None else [shard.words for shard in train.shards]
        if not is_same or (words is not None and not _fits_words(vocabulary, words)):
            problem = "it was edited or is damaged: its words, counts or threshold are not those of the captions"
    except (UserError, TypeError, ValueError, KeyError, AttributeError) as error:
        problem = str(error).rstrip(": ")
    remedy = INDEX_SAME if manifest is not None and is_foreign(manifest) else PACK_SAME
    return [Problem(part="vocabulary", file=name, what=problem, remedy=remedy)] if problem else []


def _fits_words(vocabulary: Vocabulary, words: Sequence[Counter[str] | None]) -> bool:
    """Whether a vocabulary was made from the words of all shards, or from other captions.

    True if a shard's words are unknown (None), because then nothing can be said.
    """
    counts: Counter[str] = Counter()
    for shard in words:
        if shard is None:
            return True
        counts.update(shard)
    made = Vocabulary.from_counts(counts, threshold=vocabulary.threshold)
    if (made.words, made.counts) == (vocabulary.words, vocabulary.counts):
        return True
    known = dict(zip(vocabulary.words[4:], vocabulary.counts[4:], strict=False))
    is_of_train = made.words == vocabulary.words or all(counts[word] == count for word, count in known.items())
    return not is_of_train and min(known.values()) >= vocabulary.threshold
