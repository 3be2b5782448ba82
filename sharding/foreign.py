"""Tars that somebody else wrote, in webdataset's convention: which samples they hold, and an index of them.

Members of one sample are adjacent; its key is their path up to the first dot of the file name. Nothing is unpacked
or changed, and what cannot be used is counted by reason.
"""

import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from captioner import images
from captioner.samples import CAPTION_ENDINGS, build_index, read_content
from captioner.shards.format import Manifest, Member, ShardIndex
from captioner.shards.tar_walk import Buffer, DamagedTarError, TarMember, walk
from sharding.pack import MAX_FILE_BYTES
from sharding.sources import Failure

BACKEND = "foreign"
IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "ppm", "pgm", "pbm", "pnm", "gif", "bmp", "tif", "tiff", "avif", "jp2")
MAX_CAPTION_BYTES = 1 << 24

_KEY_AND_ENDING = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)  # webdataset's `base_plus_ext`
_META = re.compile(r"__[^/]*__($|/)")  # what webdataset skips


class _UnusableError(Exception):
    """Why a sample cannot be used: the reason to count by, and what was found."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)
        self.reason = reason
        self.message = message


@dataclass(frozen=True, kw_only=True, slots=True)
class Scan:
    """A tar's usable samples in order (the members are picture and captions), and what is of no use, and why."""

    keys: list[str] = field(default_factory=list)
    members: list[dict[str, Member]] = field(default_factory=list)
    tokens: list[list[list[str]]] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)


Group = tuple[str, list[tuple[str, TarMember]]]


def scan_tar(data: Buffer, *, name: str) -> Scan:
    """All samples of the tar `name` (without ending), each with its picture decoded and its captions read once.

    Keys are `name/KEY`: many programs number the samples of each tar from 0.
    """
    scan = Scan()
    seen: set[str] = set()
    for key, members in _groups(data, scan.failures, name=name):
        try:
            if key in seen:
                raise _UnusableError("duplicate key", f"{name}.tar holds it twice")
            pair, tokens = _read_sample(data, key, members)
        except _UnusableError as error:
            scan.failures.append(Failure(image=key, reason=error.reason, message=error.message))
        else:
            seen.add(key)
            scan.keys.append(f"{name}/{key}")
            scan.members.append(pair)
            scan.tokens.append(tokens)
    return scan


def index_scan(scan: Scan, *, num_bytes: int, sha256: str, recipe: dict[str, Any]) -> ShardIndex:
    """The index of a scanned tar."""
    facts = {
        "bytes": num_bytes,
        "sha256": sha256,
        "fingerprint": sha256,
        "recipe": recipe,
        "backend": BACKEND,
        "failures": [asdict(failure) for failure in scan.failures],
    }
    return build_index(scan.keys, scan.members, scan.tokens, facts)


def foreign_recipe(size: int) -> dict[str, Any]:
    """What stands where make_shards.py writes its recipe: nothing was resized, encoded or cut into shards."""
    return {"size": size, "resize": "none", "quality": 0, "shard_megabytes": 0}


def is_foreign(manifest: Manifest) -> bool:
    """Whether the split's tars were only indexed, not made, by this program."""
    return manifest.settings.get("backend") == BACKEND or "pattern" in manifest.source


# ---- samples ----------------------------------------------------------------------------------------------


def _groups(data: Buffer, failures: list[Failure], *, name: str) -> Iterator[Group]:
    """Adjacent members with the same key; what belongs to no sample goes to `failures`."""
    group: Group | None = None
    try:
        for member in walk(data):
            match = _KEY_AND_ENDING.fullmatch(member.name)
            if member.kind == "folder" or _META.match(member.name):
                continue
            if member.kind != "file":
                failures.append(Failure(image=member.name, reason="not a file", message=member.kind))
            elif match is None:
                failures.append(Failure(image=member.name, reason="no key", message="the name has no ending"))
            else:
                key, ending = match[1], match[2].lower()
                if group is None or group[0] != key:
                    if group is not None:
                        yield group
                    group = (key, [])
                group[1].append((ending, member))
    except DamagedTarError as error:
        failures.append(Failure(image=f"{name}.tar", reason="damaged tar", message=str(error)))
    if group is not None:
        yield group


def _read_sample(
    data: Buffer, key: str, members: Sequence[tuple[str, TarMember]]
) -> tuple[dict[str, Member], list[list[str]]]:
    """Where a sample's picture and captions lie, and its captions' tokens. Raises _UnusableError."""
    endings = [ending for ending, _ in members]
    if twice := sorted({ending for ending in endings if endings.count(ending) > 1}):
        raise _UnusableError("duplicate member", f"two members .{twice[0]}")
    pictures = _choose(members, IMAGE_ENDINGS, what="picture")
    captions, tokens = _read_captions(data, key, _choose(members, CAPTION_ENDINGS, what="caption"))
    field, member = pictures[0]
    picture, content = _read(data, member, limit=MAX_FILE_BYTES)
    try:
        images.decode_rgb(content)
    except images.ImageError as error:
        raise _UnusableError(error.reason, error.message) from error
    pair = sorted([(field, picture), captions], key=lambda pair: pair[1].offset)
    return dict(pair), tokens


def _choose(
    members: Sequence[tuple[str, TarMember]], wanted: Sequence[str], *, what: str
) -> list[tuple[str, TarMember]]:
    """The members with a wanted ending, best first; a longer one such as `.large.jpg` serves where it is the only one.

    Raises _UnusableError where there is none, or it is not clear which is meant.
    """
    exact = [(found, member) for ending in wanted for found, member in members if found == ending]
    if exact:
        return exact
    longer = [(found, member) for found, member in members if found.rpartition(".")[2] in wanted]
    if len(longer) > 1:
        raise _UnusableError(f"several {what}s", ", ".join(member.name for _, member in longer))
    if not longer:
        found = ", ".join(f".{ending}" for ending, _ in members)
        raise _UnusableError(f"no {what}", f"none of .{', .'.join(wanted)} among its members {found}")
    return longer


def _read_captions(
    data: Buffer, key: str, candidates: Sequence[tuple[str, TarMember]]
) -> tuple[tuple[str, Member], list[list[str]]]:
    """The first of the members that holds captions, and their tokens. Raises _UnusableError."""
    problems = []
    for name, candidate in candidates:
        member, content = _read(data, candidate, limit=MAX_CAPTION_BYTES)
        try:
            if candidate.name.lower().endswith(".json"):
                _check_object(content)
            return (name, member), read_content(content, key=key)["tokens"]
        except ValueError as error:
            reason = "bad encoding" if isinstance(error, UnicodeError) else "no caption"
            problems.append((reason, f"{candidate.name}: {error}"))
    reason, message = problems[0]
    raise _UnusableError(reason, message)


def _check_object(content: bytes) -> None:
    """Raise ValueError unless `content` is a JSON object: other text would be taken for a caption."""
    try:
        if not isinstance(json.loads(content.decode("utf-8-sig")), dict):
            raise ValueError("no JSON object")
    except RecursionError as error:
        raise ValueError("JSON that is nested too deeply") from error


def _read(data: Buffer, member: TarMember, *, limit: int) -> tuple[Member, bytes]:
    if member.size > limit:
        raise _UnusableError("too large", f"{member.name} has {member.size:,} bytes, more than {limit:,}")
    content = data[member.offset : member.offset + member.size]
    return Member(member.offset, member.size, zlib.crc32(content)), content
