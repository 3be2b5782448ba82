"""Indexes tars that any program wrote by webdataset's convention.

Adjacent members with the same key are a sample. The key is the path up to the first dot of the file name; the rest of
the name, in lower case, is the field. The tars are not changed, and members that cannot be used are counted by reason.
"""

import hashlib
import logging
import multiprocessing
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from zlib_ng.zlib_ng import crc32

from captioner.errors import UserError
from captioner.files import storage
from captioner.shards.content import content_sha256
from captioner.shards.format import (
    NOT_A_FOLDER,
    SPLITS,
    Failure,
    FormatError,
    Manifest,
    Member,
    ShardEntry,
    ShardIndex,
    TooManyFieldsError,
    manifest_location,
    read_manifest,
)
from captioner.shards.tar_walk import Buffer, DamagedTarError, TarMember, open_tar, walk
from captioner.shards.writing import claim, count_reasons, write, write_manifest, writing

log = logging.getLogger(__name__)

BACKEND = "foreign"
ANY, CHOSEN = "any", "chosen"  # `samples` in the manifest's settings: all, or those for which `keep` was true
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
NO_SAMPLE = "a sample is adjacent files KEY.FIELD, without a dot in the key"
UNPACK = "samples are read from the middle of a tar, so unpack it to a plain tar first (gunzip, unxz, unzstd)"

_KEY_AND_FIELD = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)  # webdataset's `base_plus_ext`
_META = re.compile(r"__[^/]*__($|/)")  # members that webdataset skips
_RESERVED = re.compile(r"__\w+__")  # fields that readers add to a sample

TarSample = tuple[str, dict[str, TarMember]]
MakeIndex = Callable[..., ShardIndex]  # (data, *, name, sha256) of a tar; the name has no extension


def index_shards(
    source: str | os.PathLike[str],
    *,
    split: str,
    pattern: str | None = None,
    num_workers: int = 1,
    keep: Callable[[str, dict[str, bytes]], bool] | None = None,
) -> Manifest:
    """Index the tars of a folder or URL that match `pattern`, so that they can be streamed as `split`.

    Writes an index next to each tar and at the end `SPLIT.manifest.json`; returns the manifest. The default pattern is
    `SPLIT*.tar` if there are such files, else `*.tar`. `keep(key, content by field)` says which samples to keep; the
    others are counted in the manifest. What cannot be used is counted too, listed in `SPLIT.failures.jsonl` and logged
    as a warning. With more than one worker, processes index the tars: `keep` must then be a function at the top of a
    module, and a script must call this under `if __name__ == "__main__"`. Raises UserError.
    """
    if split not in SPLITS:
        raise UserError(f"there is no split {split!r}: give one of {', '.join(SPLITS)}")
    folder = os.fspath(source)
    names, pattern = find_tars(folder, split, pattern, remedy="give a pattern such as 'cc3m-train-*.tar'")
    recipe = {"samples": ANY if keep is None else CHOSEN}
    failures: list[Failure] = []
    entries: list[ShardEntry] = []
    num_not_kept = 0
    with claim(folder, split):
        refuse_others(folder, split, names)
        make_index = partial(index_any, recipe=recipe, choose=partial(_keep, keep) if keep else None)
        workers, spawn = min(num_workers, len(names)), multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, spawn) if workers > 1 else ThreadPoolExecutor(1) as executor:
            for name, index in index_tars(folder, split, names, make_index, executor=executor):
                entries.append(ShardEntry.of(name, index))
                failures += index.failures
                num_not_kept += index.num_not_kept
        manifest = write_manifest(
            folder,
            split,
            entries,
            failures=failures,
            num_not_kept=num_not_kept,
            settings=recipe | {"backend": BACKEND},
            source={"split": split, "pattern": pattern},
        )
    if failures:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in count_reasons(failures, num_not_kept=0).items())
        log.warning("not used: %s; %s lists them", reasons, storage.join(folder, f"{split}.failures.jsonl"))
    return manifest


def _keep(keep: Callable[[str, dict[str, bytes]], bool], data: Buffer, sample: TarSample) -> bool:
    key, members = sample
    return keep(key, {field: data[m.offset : m.offset + m.size] for field, m in members.items()})


def is_foreign(manifest: Manifest) -> bool:
    """Whether another program wrote the split's tars, which were only indexed."""
    return manifest.settings.get("backend") == BACKEND or "pattern" in manifest.source


def is_any(manifest: Manifest) -> bool:
    """Whether the split was indexed as samples of any kind, not as images with captions."""
    return "samples" in manifest.settings


def is_chosen(manifest: Manifest) -> bool:
    """Whether `keep` chose the split's samples, so that the tars alone do not determine them."""
    return manifest.settings.get("samples") == CHOSEN


# ---- one tar ----------------------------------------------------------------------------------------------


def index_any(
    data: Buffer,
    *,
    name: str,
    sha256: str,
    recipe: dict[str, Any],
    choose: Callable[[Buffer, TarSample], bool] | None = None,
) -> ShardIndex:
    """The index of a tar's samples; with `choose`, of those for which it is true."""
    failures: list[Failure] = []
    samples = []
    num_not_kept = 0
    for sample in find_samples(data, failures, name=name):
        if choose is None or choose(data, sample):
            key, members = sample
            samples.append((key, {field: checked(data, member) for field, member in members.items()}))
        else:
            num_not_kept += 1
    index = ShardIndex.of(samples, foreign_facts(data, sha256=sha256, recipe=recipe, failures=failures))
    if num_not_kept:
        index.facts["not_kept"] = num_not_kept
    # Not the tar's sha256 alone: the same tar may be indexed elsewhere with other samples.
    index.facts["fingerprint"] = content_sha256(sha256, {"offsets": index.offsets_M})
    return index


def foreign_facts(data: Buffer, *, sha256: str, recipe: dict[str, Any], failures: Sequence[Failure]) -> dict[str, Any]:
    """The facts of an index of another program's tar."""
    return {
        "bytes": len(data),
        "sha256": sha256,
        "fingerprint": sha256,
        "recipe": recipe,
        "backend": BACKEND,
        "failures": [asdict(failure) for failure in failures],
    }


def find_samples(data: Buffer, failures: list[Failure], *, name: str) -> Iterator[TarSample]:
    """The tar's samples in order, each a key and its members by field; appends what cannot be used to `failures`.

    Members with the same key that are not adjacent belong to different samples.
    """
    for key, members in _groups(data, failures, name=name):
        counts = Counter(field for field, _ in members)
        if twice := sorted(field for field, count in counts.items() if count > 1):
            failures.append(Failure(name=key, reason="duplicate member", message=f"two members .{twice[0]}"))
        elif reserved := sorted(field for field in counts if _RESERVED.fullmatch(field)):
            failures.append(Failure(name=key, reason="reserved name", message=f"a member .{reserved[0]}"))
        else:
            yield key, dict(members)


def _groups(data: Buffer, failures: list[Failure], *, name: str) -> Iterator[tuple[str, list[tuple[str, TarMember]]]]:
    """Adjacent members with the same key, each with its field."""
    key, members = "", []
    try:
        for member in walk(data):
            match = _KEY_AND_FIELD.fullmatch(member.name)
            if member.kind == "folder" or _META.match(member.name):
                continue
            if member.kind != "file":
                failures.append(Failure(name=member.name, reason="not a file", message=member.kind))
            elif match is None:
                failures.append(Failure(name=member.name, reason="no key", message="the name has no extension"))
            else:
                if members and match[1] != key:
                    yield key, members
                    members = []
                key = match[1]
                members.append((match[2].lower(), member))
    except DamagedTarError as error:
        failures.append(Failure(name=f"{name}.tar", reason="damaged tar", message=str(error)))
    if members:
        yield key, members


def checked(data: Buffer, member: TarMember) -> Member:
    """A member of an index: offset, size and checksum."""
    return Member(member.offset, member.size, crc32(data[member.offset : member.offset + member.size]))


# ---- the tars of a split ----------------------------------------------------------------------------------


def find_tars(folder: str, split: str, pattern: str | None, *, remedy: str) -> tuple[list[str], str]:
    """Names, without extension, of the tars to index, and the pattern that they match.

    Raises UserError, with `remedy` if no file matches.
    """
    for tried in [pattern] if pattern else [f"{split}*.tar", "*.tar"]:
        names = list_names(folder, tried)
        if names:
            break
    else:
        raise UserError(f"no file in {folder} matches {tried}: {remedy}")
    for name in names:
        if not name.endswith(".tar"):
            raise UserError(f"{storage.join(folder, name)} matches {tried} but is not an uncompressed .tar: {remedy}")
    return [name.removesuffix(".tar") for name in names], tried


def list_names(folder: str, pattern: str, *, missing: str = "there is no folder {}: check the path") -> list[str]:
    """The sorted names of the files in a folder that match `pattern`, which may name folders below it (`*/*.tar`).

    Raises UserError, with the message `missing` if there is no folder.
    """
    try:
        return storage.find_files(folder, pattern)
    except FileNotFoundError as error:
        raise UserError((NOT_A_FOLDER if Path(folder).is_file() else missing).format(folder)) from error
    except (OSError, ValueError, NotImplementedError) as error:
        raise UserError(f"cannot list {folder} ({error}): give a folder or URL whose files can be listed") from error


def refuse_others(folder: str, split: str, names: Sequence[str]) -> None:
    """Raise UserError if some of these tars belong to another split, or were written by make_shards.py."""
    for other in SPLITS:
        if not storage.exists(manifest_location(folder, other)):
            continue
        try:
            manifest = read_manifest(folder, other, remedy="")
        except FormatError as error:
            raise UserError(
                f"split {other} in {folder} is of another version of this program: delete its manifest and .index "
                "files, and index it again"
            ) from error
        if other == split and not is_foreign(manifest):
            raise UserError(f"{folder} holds a {split} split of sharding/make_shards.py: it needs no indexing")
        both = {entry.name for entry in manifest.shards}.intersection(names)
        if other != split and both:
            raise UserError(
                f"{min(both)}.tar belongs to split {other} already: give a pattern that matches only those of {split}"
            )
    for name in names:
        location = storage.join(folder, f"{name}.index")
        backend = BACKEND
        with suppress(FileNotFoundError, UserError):
            backend = ShardIndex.from_bytes(storage.read_bytes(location), origin=location).facts.get("backend")
        if backend != BACKEND:
            raise UserError(f"{name}.tar was made by sharding/make_shards.py: run that again to complete the split")


def index_tars(
    folder: str,
    split: str,
    names: Sequence[str],
    make_index: MakeIndex,
    *,
    executor: Executor,
    remedy: str = NO_SAMPLE,
) -> Iterator[tuple[str, ShardIndex]]:
    """Write an index next to each tar and yield it, in the order of `names`.

    Deletes an earlier manifest first. If no sample can be used, it writes nothing and raises UserError, with `remedy`.
    """
    work = partial(_index_tar, folder, make_index)
    written = False
    waiting: list[tuple[str, ShardIndex]] = []
    try:
        for name_and_index in zip(names, executor.map(work, names), strict=True):
            waiting.append(name_and_index)
            if not written and any(len(index) for _, index in waiting):
                with writing(manifest_location(folder, split)) as complete:
                    storage.delete(complete)
                written = True
            while written and waiting:
                name, index = waiting.pop(0)
                write(storage.join(folder, f"{name}.index"), index.to_bytes())
                yield name, index
    finally:
        executor.shutdown(cancel_futures=True)
    if not written:
        failures = [failure for _, index in waiting for failure in index.failures]
        reasons = count_reasons(failures, num_not_kept=sum(index.num_not_kept for _, index in waiting))
        found = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items()) or "they are empty"
        raise UserError(f"no sample in {len(names):,} tars in {folder} can be used ({found}): {remedy}")


def _index_tar(folder: str, make_index: MakeIndex, name: str) -> ShardIndex:
    location = storage.join(folder, f"{name}.tar")
    try:
        with open_tar(location) as data:
            for magic, kind in COMPRESSED.items():
                if data[: len(magic)] == magic:
                    raise UserError(f"{location} is compressed ({kind}): {UNPACK}")
            return make_index(data, name=name, sha256=hashlib.sha256(data).hexdigest())
    except TooManyFieldsError as error:
        raise UserError(f"{location} has {error}: {NO_SAMPLE}") from error
    except OSError as error:
        raise UserError(f"cannot read {location} ({error.strerror or error}): fix this and run again") from error
