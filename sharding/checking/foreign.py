"""Captioned images in the tars of any program: which members of a sample they are, and the index of such a tar."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from PIL import Image

from captioner.images import loading
from captioner.samples import CAPTION_EXTENSIONS, build_index, read_content
from captioner.shards.format import Failure, Member, ShardIndex
from captioner.shards.indexing import ANY, MakeIndex, checked, find_samples, foreign_facts, index_any
from captioner.shards.tar_walk import Buffer, TarMember
from sharding.packing.pack import MAX_FILE_BYTES

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "ppm", "pgm", "pbm", "pnm", "gif", "bmp", "tif", "tiff", "avif", "jp2")
MAX_CAPTION_BYTES = 1 << 24

Field = tuple[str, TarMember]


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionedImage:
    """A sample of a tar: its key, its image and caption members by field in the tar's order, and what they hold."""

    key: str
    members: dict[str, TarMember]
    image: Image.Image
    content: dict[str, Any]

    def checked_members(self, data: Buffer) -> dict[str, Member]:
        """The members with their checksums, as an index has them."""
        return {field: checked(data, member) for field, member in self.members.items()}


class _UnusableError(Exception):
    """Why a sample cannot be used: the reason to count by, and what was found."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)
        self.reason = reason
        self.message = message


def read_samples(data: Buffer, failures: list[Failure], *, name: str) -> Iterator[CaptionedImage]:
    """The usable samples of the tar `name` (without suffix); the others are appended to `failures`."""
    found = set[str]()
    for key, members in find_samples(data, failures, name=name):
        try:
            if key in found:
                raise _UnusableError("duplicate key", f"{name}.tar holds it twice")
            sample = _read_sample(data, key, list(members.items()))
        except (_UnusableError, loading.ImageError) as error:
            failures.append(Failure(name=key, reason=error.reason, message=error.message))
        else:
            found.add(key)
            yield sample


def index_captioned(data: Buffer, *, name: str, sha256: str, recipe: dict[str, Any]) -> ShardIndex:
    """The index of another program's tar `name` (without suffix).

    Keys are `name/KEY`: many programs number the samples of each tar from 0.
    """
    failures: list[Failure] = []
    keys, members, tokens = [], [], []
    for sample in read_samples(data, failures, name=name):
        keys.append(f"{name}/{sample.key}")
        members.append(sample.checked_members(data))
        tokens.append(sample.content["tokens"])
    return build_index(keys, members, tokens, foreign_facts(data, sha256=sha256, recipe=recipe, failures=failures))


def foreign_recipe(size: int) -> dict[str, Any]:
    """What stands where make_shards.py writes its recipe: nothing was resized, encoded or cut into shards."""
    return {"size": size, "resize": "none", "quality": 0, "shard_megabytes": 0}


def indexer(recipe: dict[str, Any], *, before: ShardIndex | None = None) -> MakeIndex:
    """The function that made a tar's index by `recipe`; `before` is the index that names the chosen samples."""
    if "samples" not in recipe:
        return partial(index_captioned, recipe=recipe)
    if recipe["samples"] == ANY or before is None:
        return partial(index_any, recipe=recipe)
    starts = set(before.offsets_M[before.first_member[:-1]].tolist())
    return partial(index_any, recipe=recipe, choose=lambda _, sample: next(iter(sample[1].values())).offset in starts)


# ---- one sample -------------------------------------------------------------------------------------------


def _read_sample(data: Buffer, key: str, members: Sequence[Field]) -> CaptionedImage:
    image_member = _choose(members, IMAGE_SUFFIXES, what="image")[0]
    captions_member, content = _read_captions(data, key, _choose(members, CAPTION_EXTENSIONS, what="caption"))
    image, _ = loading.decode_rgb(_read(data, image_member[1], limit=MAX_FILE_BYTES))
    pair = sorted([image_member, captions_member], key=lambda field: field[1].offset)
    return CaptionedImage(key=key, members=dict(pair), image=image, content=content)


def _choose(members: Sequence[Field], wanted: Sequence[str], *, what: str) -> list[Field]:
    """The members with a wanted suffix, best first; a longer one such as `.large.jpg` only where it is the only one.

    Raises _UnusableError where there is none, or it is not clear which is meant.
    """
    exact = [(field, member) for suffix in wanted for field, member in members if field == suffix]
    if exact:
        return exact
    longer = [(field, member) for field, member in members if field.rpartition(".")[2] in wanted]
    if len(longer) > 1:
        raise _UnusableError(f"several {what}s", ", ".join(member.name for _, member in longer))
    if not longer:
        found = ", ".join(f".{field}" for field, _ in members)
        raise _UnusableError(f"no {what}", f"none of .{', .'.join(wanted)} among its members {found}")
    return longer


def _read_captions(data: Buffer, key: str, candidates: Sequence[Field]) -> tuple[Field, dict[str, Any]]:
    """The first of the members that holds captions, and its content. Raises _UnusableError."""
    problems = []
    for field, member in candidates:
        data_of_member = _read(data, member, limit=MAX_CAPTION_BYTES)
        try:
            # of what ends in .json, other text must not be taken for a caption
            if field.endswith("json") and not isinstance(json.loads(data_of_member.decode("utf-8-sig")), dict):
                raise ValueError("no JSON object")
            content = read_content(data_of_member, key=key)
            if not all(isinstance(word, str) for words in content["tokens"] for word in words):
                raise ValueError("tokens that are no text")
            return (field, member), content
        except (ValueError, TypeError, RecursionError) as error:
            reason = "bad encoding" if isinstance(error, UnicodeError) else "no caption"
            what = "JSON that is nested too deeply" if isinstance(error, RecursionError) else error
            problems.append((reason, f"{member.name}: {what}"))
    raise _UnusableError(*problems[0])


def _read(data: Buffer, member: TarMember, *, limit: int) -> bytes:
    if member.size > limit:
        raise _UnusableError("too large", f"{member.name} has {member.size:,} bytes, more than {limit:,}")
    return data[member.offset : member.offset + member.size]
