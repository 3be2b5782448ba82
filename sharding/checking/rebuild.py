"""A tar to the index that belongs to it, by reading the tar alone; what is wrong with its samples is told."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from captioner.images import loading
from captioner.samples import SAMPLE_FIELDS, build_index
from captioner.shards.format import Manifest, Member, ShardEntry, ShardIndex
from captioner.shards.indexing import checked, is_foreign
from captioner.shards.tar_walk import Buffer, DamagedTarError, TarMember, walk
from sharding.checking.foreign import indexer
from sharding.packing.planning import Recipe

SHOWN_PROBLEMS = 3
RECIPE_FIELDS = tuple(Recipe.__slots__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rebuilt:
    """An index made from a tar, and what is wrong with the tar's samples."""

    index: ShardIndex
    problems: list[str] = field(default_factory=list)


def index_from_tar(
    data: Buffer,
    facts: Mapping[str, Any],
    *,
    sha256: str,
    entry: ShardEntry,
    manifest: Manifest,
    before: ShardIndex | None = None,
) -> Rebuilt:
    """The index of a tar (with this `sha256`) of ours or of others, with these facts where the tar does not tell.

    `before` is the index that is there.
    """
    if is_foreign(manifest):
        make_index = indexer(facts.get("recipe", foreign_settings(manifest)), before=before)
        return Rebuilt(index=make_index(data, name=entry.name, sha256=sha256))
    problems: list[str] = []
    recipe = facts.get("recipe", manifest.settings)
    agreed = all(manifest.settings.get(name) == value for name, value in recipe.items())
    scan = _scan_packed(data, problems, split=manifest.split, recipe=recipe if agreed else {})
    index = build_index(scan.keys, scan.members, scan.tokens, {**facts, "bytes": len(data), "sha256": sha256})
    more = len(problems) - SHOWN_PROBLEMS
    shown = [*problems[:SHOWN_PROBLEMS], *([f"and {more:,} more problems like these"] if more > 0 else [])]
    return Rebuilt(index=index, problems=shown)


# ---- our own tars -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Scan:
    """A tar's samples in order: keys, members by field, and the tokens of their captions."""

    keys: list[str] = field(default_factory=list)
    members: list[dict[str, Member]] = field(default_factory=list)
    tokens: list[list[list[str]]] = field(default_factory=list)


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
        scan.members.append({"jpg": checked(data, picture), "json": checked(data, text)})
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
        picture, _ = loading.decode_rgb(data)
    except loading.ImageError as error:
        return str(error)
    if not data.startswith(b"\xff\xd8"):
        return "it is no JPEG"
    size, resize = recipe.get("size"), recipe.get("resize")
    wrong = picture.size != (size, size) if resize in ("squash", "center-crop") else False
    wrong = wrong or (resize == "keep-ratio" and min(picture.size) != size)
    return f"it has {picture.width}x{picture.height} pixels, which is not {resize} to {size}" if wrong else None


# ---- without an index -------------------------------------------------------------------------------------


def facts_of(entry: ShardEntry, manifest: Manifest, *, listed: list[Any]) -> dict[str, Any] | None:
    """The facts of a packed shard whose index is lost, from the manifest and the `listed` failures of the split.

    The failures of the shards stand at the list's end, in the shards' order. None where list and manifest do not tell
    which are this one's, or which of several backends made it.
    """
    counts = [shard.failures for shard in manifest.shards]
    backend, settings = manifest.settings["backend"], manifest.settings
    if sum(counts) > len(listed) or backend not in get_args(loading.Backend):
        return None
    place = [shard.name for shard in manifest.shards].index(entry.name)
    first = len(listed) - sum(counts[place:])
    return {
        "bytes": entry.bytes,
        "sha256": entry.sha256,
        "fingerprint": entry.fingerprint,
        "recipe": {name: settings[name] for name in RECIPE_FIELDS},
        "backend": backend,
        "failures": listed[first : first + entry.failures],
    }


def foreign_settings(manifest: Manifest) -> dict[str, Any]:
    """The recipe of a split that was only indexed."""
    return {name: value for name, value in manifest.settings.items() if name != "backend"}
