"""A tar to the index that belongs to it, by reading the tar alone; what is wrong with its samples is told."""

import json
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from captioner import images
from captioner.shards import SAMPLE_FIELDS, Manifest, Member, ShardEntry, ShardIndex, build_index
from sharding.foreign import DUPLICATE, Scan, index_scan, is_foreign, scan_tar
from sharding.tar_walk import Buffer, DamagedTarError, TarMember, walk

SHOWN_PROBLEMS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Rebuilt:
    """An index made from a tar, and what is wrong with the tar's samples."""

    index: ShardIndex
    problems: list[str] = field(default_factory=list)


def index_from_tar(
    data: Buffer, facts: Mapping[str, Any], *, sha256: str, entry: ShardEntry, manifest: Manifest
) -> Rebuilt:
    """The index of a tar (with this `sha256`) of ours or of others, with these facts where the tar does not tell."""
    if is_foreign(manifest):
        return _foreign_index(data, facts, sha256=sha256, entry=entry)
    problems: list[str] = []
    recipe = facts.get("recipe", manifest.settings)
    agreed = all(manifest.settings.get(name) == value for name, value in recipe.items())
    scan = _scan_packed(data, problems, split=manifest.split, recipe=recipe if agreed else {})
    index = build_index(scan.keys, scan.members, scan.tokens, {**facts, "bytes": len(data), "sha256": sha256})
    more = len(problems) - SHOWN_PROBLEMS
    shown = [*problems[:SHOWN_PROBLEMS], *([f"and {more:,} more problems like these"] if more > 0 else [])]
    return Rebuilt(index=index, problems=shown)


def _foreign_index(data: Buffer, facts: Mapping[str, Any], *, sha256: str, entry: ShardEntry) -> Rebuilt:
    """Of keys in other shards a tar knows nothing: the index's own list of them is taken."""
    scan = scan_tar(data, name=f"{entry.name}.tar")
    others = facts.get("failures", [])[len(scan.failures) :]
    taken: dict[str, str] = {}
    for failure in others:
        if isinstance(failure, dict) and failure.get("reason") == DUPLICATE:
            taken[str(failure.get("image"))] = str(failure.get("message")).removesuffix(" has it already")
    recipe = facts.get("recipe", {})
    return Rebuilt(index=index_scan(scan, num_bytes=len(data), sha256=sha256, recipe=recipe, taken=taken))


# ---- our own tars -----------------------------------------------------------------------------------------


def _scan_packed(data: Buffer, problems: list[str], *, split: str, recipe: Mapping[str, Any]) -> Scan:
    """All samples of a tar that we packed; `problems` hears of every departure from the format.

    An empty `recipe` says nothing of the pictures' size.
    """
    scan = Scan()
    last = ""
    for picture, text in _pairs(data, problems):
        key = picture.name.removesuffix(".jpg")
        if not re.fullmatch(rf"{re.escape(split)}-\d{{9,}}", key) or key <= last:
            problems.append(f"key {key} does not follow {last or 'as the first one'}")
        last = key
        content = _read_json(data, text, problems)
        problem = _check_picture(data[picture.offset : picture.offset + picture.size], recipe)
        if problem:
            problems.append(f"{picture.name}: {problem}")
        scan.keys.append(key)
        scan.members.append((_member(data, picture), _member(data, text)))
        scan.tokens.append(content)
    return scan


def _pairs(data: Buffer, problems: list[str]) -> Iterator[tuple[TarMember, TarMember]]:
    """Adjacent `KEY.jpg` and `KEY.json`."""
    waiting: TarMember | None = None
    end = 0
    try:
        for member in walk(data):
            if not member.is_plain or member.start != end:
                problems.append(f"{member.name} is no plain USTAR member ({member.kind})")
            end = member.offset + -(-member.size // 512) * 512
            if waiting is None and member.name.endswith(".jpg"):
                waiting = member
            elif waiting is not None and member.name == waiting.name.removesuffix("jpg") + "json":
                yield waiting, member
                waiting = None
            else:
                alone = waiting or member
                problems.append(f"{alone.name} stands alone, without the other member of its sample")
                waiting = member if waiting is not None and member.name.endswith(".jpg") else None
    except DamagedTarError as error:
        problems.append(str(error))
    if waiting is not None:
        problems.append(f"{waiting.name} stands alone, without the other member of its sample")


def _member(data: Buffer, member: TarMember) -> Member:
    return Member(member.offset, member.size, zlib.crc32(data[member.offset : member.offset + member.size]))


def _read_json(data: Buffer, member: TarMember, problems: list[str]) -> list[list[str]]:
    """A sample's tokens; none where its JSON is not as it should be."""
    try:
        content = json.loads(data[member.offset : member.offset + member.size])
        if problem := _check_sample(content):
            raise ValueError(problem)
        return content["tokens"]
    except (ValueError, RecursionError) as error:
        problems.append(f"{member.name}: {error}")
        return []


def _check_sample(content: Any) -> str | None:
    """What is wrong with the parsed content of `KEY.json`."""
    if not isinstance(content, dict) or content.keys() != SAMPLE_FIELDS:
        return "it has not the fields of a sample"
    kinds = {"image_id": int | str, "file_name": str, "width": int, "height": int}
    for name, kind in kinds.items():
        if not isinstance(content[name], kind) or isinstance(content[name], bool):
            return f"{name} is {content[name]!r}"
    captions, tokens = content["captions"], content["tokens"]
    if not isinstance(captions, list) or not captions or not all(isinstance(caption, str) for caption in captions):
        return "its captions are no texts"
    if not isinstance(tokens, list) or not all(_is_words(words) for words in tokens):
        return "its tokens are no texts"
    ids = content["annotation_ids"]
    if not isinstance(ids, list) or not len(captions) == len(tokens) == len(ids):
        return "captions, tokens and annotation_ids have different lengths"
    return None


def _is_words(words: object) -> bool:
    return isinstance(words, list) and all(isinstance(word, str) for word in words)


def _check_picture(data: bytes, recipe: Mapping[str, Any]) -> str | None:
    """What is wrong with a stored JPEG."""
    try:
        picture, _ = images.decode_rgb(data)
    except images.ImageError as error:
        return str(error)
    if not data.startswith(b"\xff\xd8"):
        return "it is no JPEG"
    size, resize = recipe.get("size"), recipe.get("resize")
    wrong = picture.size != (size, size) if resize in ("squash", "center-crop") else False
    wrong = wrong or (resize == "keep-ratio" and min(picture.size) != size)
    return f"it has {picture.width}x{picture.height} pixels, which is not {resize} to {size}" if wrong else None


# ---- without an index -------------------------------------------------------------------------------------


def facts_of(
    entry: ShardEntry, manifest: Manifest, *, num_records: Mapping[str, int], listed: list[Any]
) -> dict[str, Any] | None:
    """The facts of a packed shard whose index is lost, from the manifest and the failures' list.

    `num_records` holds, for the shards whose indexes are whole, how many pictures they were packed from. None where
    those files do not tell which failures are the shard's, or which of several backends made it.
    """
    backend, settings = manifest.settings["backend"], manifest.settings
    failures = _failures_of(entry, manifest, num_records=num_records, listed=listed)
    if failures is None or backend not in get_args(images.Backend):
        return None
    return {
        "bytes": entry.bytes,
        "sha256": entry.sha256,
        "fingerprint": entry.fingerprint,
        "recipe": {name: settings[name] for name in ("size", "resize", "quality", "shard_megabytes")},
        "backend": backend,
        "failures": failures,
    }


def _failures_of(
    entry: ShardEntry, manifest: Manifest, *, num_records: Mapping[str, int], listed: list[Any]
) -> list[Any] | None:
    """All shards of a split but the last are packed from equally many pictures, and failures are listed in order."""
    total = manifest.source["records"] - manifest.num_samples
    if total == 0:
        return []
    names = [shard.name for shard in manifest.shards]
    full = next((num_records[name] for name in names[:-1] if name in num_records), None)
    if len(names) == 1:
        full = manifest.source["records"]
    elif full is None and names[-1] in num_records:
        full = (manifest.source["records"] - num_records[names[-1]]) // (len(names) - 1)
    if full is None:
        return None
    records = [full] * (len(names) - 1) + [manifest.source["records"] - full * (len(names) - 1)]
    counts = [number - shard.samples for number, shard in zip(records, manifest.shards, strict=True)]
    if sum(counts) != total or min(counts) < 0 or total > len(listed):
        return None
    place = names.index(entry.name)
    first = len(listed) - total + sum(counts[:place])
    return listed[first : first + counts[place]]


def reindex_foreign(data: Buffer, entry: ShardEntry, manifest: Manifest, *, taken: dict[str, str]) -> ShardIndex:
    """A foreign tar's index anew; `taken` are the keys of all shards before it."""
    recipe = {name: manifest.settings[name] for name in ("size", "resize", "quality", "shard_megabytes")}
    scan = scan_tar(data, name=f"{entry.name}.tar")
    return index_scan(scan, num_bytes=entry.bytes, sha256=entry.sha256, recipe=recipe, taken=taken)
