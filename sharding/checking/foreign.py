"""Captioned pictures in tars that another program wrote: which member is the picture, and which the captions."""

import json
from collections.abc import Sequence
from functools import partial
from typing import Any

from captioner.images import loading
from captioner.samples import CAPTION_EXTENSIONS, build_index, read_content
from captioner.shards.format import Failure, Member, ShardIndex
from captioner.shards.indexing import ANY, MakeIndex, checked, find_samples, foreign_facts, index_any
from captioner.shards.tar_walk import Buffer, TarMember
from sharding.packing.pack import MAX_FILE_BYTES

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "ppm", "pgm", "pbm", "pnm", "gif", "bmp", "tif", "tiff", "avif", "jp2")
MAX_CAPTION_BYTES = 1 << 24

Field = tuple[str, TarMember]


class _UnusableError(Exception):
    """Why a sample cannot be used: the reason to count by, and what was found."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)
        self.reason = reason
        self.message = message


def index_captioned(data: Buffer, *, name: str, sha256: str, recipe: dict[str, Any]) -> ShardIndex:
    """The index of the tar `name` (without ending), each picture decoded and its captions read once.

    Keys are `name/KEY`: many programs number the samples of each tar from 0.
    """
    failures: list[Failure] = []
    found: dict[str, tuple[dict[str, Member], list[list[str]]]] = {}
    for key, members in find_samples(data, failures, name=name):
        try:
            if f"{name}/{key}" in found:
                raise _UnusableError("duplicate key", f"{name}.tar holds it twice")
            found[f"{name}/{key}"] = _read_sample(data, key, list(members.items()))
        except _UnusableError as error:
            failures.append(Failure(name=key, reason=error.reason, message=error.message))
    pairs, tokens = zip(*found.values(), strict=True) if found else ((), ())
    facts = foreign_facts(data, sha256=sha256, recipe=recipe, failures=failures)
    return build_index(list(found), pairs, tokens, facts)


def foreign_recipe(size: int) -> dict[str, Any]:
    """What stands where make_shards.py writes its recipe: nothing was resized, encoded or cut into shards."""
    return {"size": size, "resize": "none", "quality": 0, "shard_megabytes": 0}


def indexer(recipe: dict[str, Any], *, before: ShardIndex | None = None) -> MakeIndex:
    """What makes a tar's index again that was made by `recipe`; `before` is that index, if it is there."""
    if "samples" not in recipe:
        return partial(index_captioned, recipe=recipe)
    if recipe["samples"] == ANY or before is None:
        return partial(index_any, recipe=recipe)
    starts = set(before.offsets_M[before.first_member[:-1]].tolist())
    return partial(index_any, recipe=recipe, choose=lambda _, sample: next(iter(sample[1].values())).offset in starts)


# ---- one sample -------------------------------------------------------------------------------------------


def _read_sample(data: Buffer, key: str, members: Sequence[Field]) -> tuple[dict[str, Member], list[list[str]]]:
    """A sample's picture and captions by field, in the tar's order, and its captions' tokens. Raises _UnusableError."""
    pictures = _choose(members, IMAGE_ENDINGS, what="picture")
    captions, tokens = _read_captions(data, key, _choose(members, CAPTION_EXTENSIONS, what="caption"))
    try:
        loading.decode_rgb(_read(data, pictures[0][1], limit=MAX_FILE_BYTES))
    except loading.ImageError as error:
        raise _UnusableError(error.reason, error.message) from error
    pair = sorted([pictures[0], captions], key=lambda field: field[1].offset)
    return {field: checked(data, member) for field, member in pair}, tokens


def _choose(members: Sequence[Field], wanted: Sequence[str], *, what: str) -> list[Field]:
    """The members with a wanted ending, best first; a longer one such as `.large.jpg` serves where it is the only one.

    Raises _UnusableError where there is none, or it is not clear which is meant.
    """
    exact = [(field, member) for ending in wanted for field, member in members if field == ending]
    if exact:
        return exact
    longer = [(field, member) for field, member in members if field.rpartition(".")[2] in wanted]
    if len(longer) > 1:
        raise _UnusableError(f"several {what}s", ", ".join(member.name for _, member in longer))
    if not longer:
        found = ", ".join(f".{field}" for field, _ in members)
        raise _UnusableError(f"no {what}", f"none of .{', .'.join(wanted)} among its members {found}")
    return longer


def _read_captions(data: Buffer, key: str, candidates: Sequence[Field]) -> tuple[Field, list[list[str]]]:
    """The first of the members that holds captions, and their tokens. Raises _UnusableError."""
    problems = []
    for field, member in candidates:
        content = _read(data, member, limit=MAX_CAPTION_BYTES)
        try:
            if field.endswith("json"):
                _check_object(content)
            return (field, member), read_content(content, key=key)["tokens"]
        except ValueError as error:
            reason = "bad encoding" if isinstance(error, UnicodeError) else "no caption"
            problems.append((reason, f"{member.name}: {error}"))
    reason, message = problems[0]
    raise _UnusableError(reason, message)


def _check_object(content: bytes) -> None:
    """Raise ValueError unless `content` is a JSON object: other text would be taken for a caption."""
    try:
        if not isinstance(json.loads(content.decode("utf-8-sig")), dict):
            raise ValueError("no JSON object")
    except RecursionError as error:
        raise ValueError("JSON that is nested too deeply") from error


def _read(data: Buffer, member: TarMember, *, limit: int) -> bytes:
    if member.size > limit:
        raise _UnusableError("too large", f"{member.name} has {member.size:,} bytes, more than {limit:,}")
    return data[member.offset : member.offset + member.size]
