"""Packs one planned shard: its tar and its index."""

import hashlib
import json
import re
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import get_args

from captioner.errors import UserError
from captioner.files import storage
from captioner.images import loading, silence_pillow
from captioner.samples import CaptionContent, build_index, words_of
from captioner.shards.format import Failure, FormatError, Member, ShardEntry, ShardIndex, TarBuilder, manifest_location
from captioner.shards.writing import write, writing
from captioner.vocabulary import tokenize
from captioner.workers import NO_ITEM
from sharding.packing.planning import ShardPlan
from sharding.packing.sources import Record

MAX_FILE_BYTES = 1 << 30
GROUP_IMAGES, GROUP_BYTES = 8, 2 << 20  # limits of a group of images that are packed together
READ_AHEAD = 16  # images that a worker requests at once from a server
REPORT_SECONDS = 0.25


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedShard:
    """A finished shard: its manifest entry, failures, counts of words, and whether an earlier run packed it (`reused`).

    `num_damaged` counts the images packed in this run although their decoder reported damage. `unwritten` is the index
    of a shard without samples: it is written only if another shard of the split has samples.
    """

    entry: ShardEntry
    failures: tuple[Failure, ...]
    words: Counter[str]
    backend: str
    reused: bool
    num_damaged: int = 0
    unwritten: ShardIndex | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardProgress:
    """How much of a shard is packed: images done, how many of them failed, and bytes read."""

    shard: str
    images: int
    failures: int
    bytes: int


Report = Callable[[ShardProgress], None]


def pack_shard(
    plan: ShardPlan,
    folder: str,
    *,
    report: Report = lambda progress: None,
    set_index: Callable[[int], None] = lambda position: None,
    excluded: Collection[int] = (),
) -> PackedShard:
    """Pack a shard: write `NAME.tar` and `NAME.index` into `folder`, and return what the manifest needs.

    A shard without samples is written only if the plan has a sha256. `report` is called with the progress several times
    a second, `set_index` with each image's position before it is decoded, and with NO_ITEM afterwards. Images at
    `excluded` positions are counted as failures and not decoded. Raises UserError when the output cannot be written,
    when the tar's sha256 is not the plan's (then nothing is written), or when images vanish or change while they are
    packed.
    """
    silence_pillow()
    stored: list[tuple[int, loading.StoredJpeg]] = []
    failures: list[Failure] = []
    damaged: list[int] = []
    bytes_read = 0
    reported = time.monotonic()
    for first, contents in _read_groups(plan, excluded=excluded):
        results = loading.to_stored_jpegs(
            contents,
            size=plan.recipe.size,
            resize=plan.recipe.resize,
            quality=plan.recipe.quality,
            set_index=lambda number, first=first: set_index(first + number),
            note_damage=damaged.append,
        )
        for position, result in enumerate(results, start=first):
            if isinstance(result, loading.StoredJpeg):
                stored.append((position, result))
            else:
                failures.append(_failure(plan.records[position], result))
        set_index(NO_ITEM)
        bytes_read += sum(len(content) for content in contents if isinstance(content, bytes))
        if time.monotonic() - reported > REPORT_SECONDS:
            reported = time.monotonic()
            done = first + len(contents)
            report(ShardProgress(shard=plan.name, images=done, failures=len(failures), bytes=bytes_read))
    tar, index = _build_shard(plan, stored, failures)
    if plan.sha256 not in (None, index.facts["sha256"]):
        raise UserError(
            f"{plan.name} no longer packs to the same bytes (a library has another version, or an image changed): "
            "it was left unchanged; delete the split's shards and pack it again"
        )
    is_written = bool(stored) or plan.sha256 is not None
    if is_written:
        write_shard(folder, plan.name, tar, index, keep_manifest=plan.sha256 is not None)
    report(ShardProgress(shard=plan.name, images=len(plan.records), failures=len(failures), bytes=bytes_read))
    shard = packed_shard(plan.name, index, reused=False)
    return replace(shard, num_damaged=len(damaged), unwritten=None if is_written else index)


def _build_shard(
    plan: ShardPlan, stored: Sequence[tuple[int, loading.StoredJpeg]], failures: Sequence[Failure]
) -> tuple[bytes, ShardIndex]:
    """The shard's tar and index; `stored` are the packed images, each with its position in the plan.

    All samples are added here, after the last image: decoding an image evicts this code from the processor's caches,
    which would cost 0.2 ms an image.
    """
    tar = TarBuilder()
    keys: list[str] = []
    members: list[dict[str, Member]] = []
    tokens: list[list[list[str]]] = []
    for position, jpeg in stored:
        key, sample = plan.keys[position], _make_sample(plan.records[position], jpeg.original_size)
        keys.append(key)
        members.append({"jpg": tar.add(f"{key}.jpg", jpeg.data), "json": tar.add(f"{key}.json", sample.to_json())})
        tokens.append(sample.tokens)
    data = tar.to_bytes()
    facts = {
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "fingerprint": plan.fingerprint,
        "recipe": asdict(plan.recipe),
        "backend": loading.backend(),
        "failures": [asdict(failure) for failure in failures],
    }
    return data, build_index(keys, members, tokens, facts)


def write_shard(folder: str, name: str, tar: bytes, index: ShardIndex, *, keep_manifest: bool) -> None:
    """Write `NAME.tar` and then `NAME.index`; delete the old index and manifest first. Raises UserError.

    `keep_manifest` is for a repaired tar, whose sha256 is the one in the manifest.
    """
    location = storage.join(folder, f"{name}.index")
    with writing(location):
        if not keep_manifest:
            storage.delete(manifest_location(folder, name.rpartition("-")[0]))  # its presence means: complete
        storage.delete(location)  # an old index must never be beside a new tar
    write(storage.join(folder, f"{name}.tar"), tar)
    write(location, index.to_bytes())


def _failure(record: Record, error: loading.ImageError) -> Failure:
    """The failure of an image that could not be packed. Raises UserError if memory ran out."""
    if isinstance(error.__cause__, MemoryError):  # a shard's bytes must not depend on free memory
        raise UserError(
            f"there is too little memory to decode {record.file_name}: give fewer --workers and run again"
        ) from error
    return Failure(name=record.file_name, reason=error.reason, message=error.message)


def _make_sample(record: Record, original_size: tuple[int, int]) -> CaptionContent:
    """The content of a sample's JSON member."""
    width, height = original_size
    return CaptionContent(
        image_id=record.image_id,
        file_name=record.file_name,
        width=width,
        height=height,
        captions=list(record.captions),
        tokens=[tokenize(caption) for caption in record.captions],
        annotation_ids=list(record.annotation_ids),
    )


# ---- reading images ---------------------------------------------------------------------------------------


def _read_groups(
    plan: ShardPlan, *, excluded: Collection[int]
) -> Iterator[tuple[int, list[bytes | loading.ImageError]]]:
    """The plan's images in groups to be packed together, each as the position of its first image and all contents."""
    group: list[bytes | loading.ImageError] = []
    group_bytes = 0
    for position, content in enumerate(_read_images(plan)):
        if isinstance(content, loading.ImageError):
            group.append(content)
        elif position in excluded:
            group.append(loading.ImageError("undecodable", "it crashes the decoder"))
        else:
            group.append(content)
            group_bytes += len(content)
        if len(group) == GROUP_IMAGES or group_bytes > GROUP_BYTES or position + 1 == len(plan.records):
            yield position + 1 - len(group), group
            group, group_bytes = [], 0


def _read_images(plan: ShardPlan) -> Iterator[bytes | loading.ImageError]:
    """The contents of the plan's images, in order; an ImageError for one that cannot be read."""
    positions = range(len(plan.records))
    if not storage.is_remote(plan.images):
        yield from (_read_image(plan, position) for position in positions)
        return
    with ThreadPoolExecutor(READ_AHEAD) as threads:
        ahead = deque(threads.submit(_read_image, plan, position) for position in positions[:READ_AHEAD])
        try:
            for position in positions:
                content = ahead.popleft().result()
                if position + READ_AHEAD < len(positions):
                    ahead.append(threads.submit(_read_image, plan, position + READ_AHEAD))
                yield content
        finally:
            threads.shutdown(cancel_futures=True)


def _read_image(plan: ShardPlan, position: int) -> bytes | loading.ImageError:
    """One image's content, or why it cannot be read. Raises UserError if it has changed since the shard was planned."""
    planned = plan.file_bytes[position]
    location = storage.join(plan.images, plan.records[position].file_name)
    if planned is None:
        return loading.ImageError("missing", "there is no such file")
    if planned > MAX_FILE_BYTES:
        return loading.ImageError("too large", f"{planned:,} bytes, more than {MAX_FILE_BYTES:,}")
    try:
        data = storage.read_bytes(location)
    except FileNotFoundError as error:
        if planned == storage.UNKNOWN:
            return loading.ImageError("missing", "there is no such file")
        raise UserError(f"{location} vanished while it was packed: restore it and run again") from error
    except storage.RefusedError as error:
        return loading.ImageError("unreadable", str(error))
    except storage.StorageError:  # a failing server must not count as a bad image
        raise
    except PermissionError as error:
        return loading.ImageError("unreadable", f"{error.strerror or error}")
    except OSError as error:  # nor must a failing disk
        raise UserError(
            f"cannot read {location} ({error.strerror or error}): fix that, or remove the image, and run again; "
            "finished shards are kept"
        ) from error
    if planned not in (len(data), storage.UNKNOWN):
        raise UserError(
            f"{location} had {planned:,} bytes and has {len(data):,}: it changed while it was packed; run again when "
            "nothing writes to the images"
        )
    return data


# ---- shards of earlier runs -------------------------------------------------------------------------------


def find_packed(plan: ShardPlan, folder: str) -> PackedShard | None:
    """The shard that an earlier run packed, or None if it is missing or incomplete.

    The index is written last, so its presence means that the tar is complete; the tar's size is checked as well. Raises
    UserError when the shard was packed from another plan.
    """
    location, tar = (storage.join(folder, f"{plan.name}.{suffix}") for suffix in ("index", "tar"))
    remedies = how_to_pack_again(folder, plan.split)
    try:
        index = ShardIndex.from_bytes(storage.read_bytes(location), origin=location)
        tar_bytes = storage.size_bytes(tar)
    except storage.StorageError:
        raise
    except FormatError as error:
        raise UserError(f"{folder} holds shards of another version of this program ({error}): {remedies}") from error
    except (FileNotFoundError, UserError):
        _refuse_other_tar(plan, tar)
        return None
    except OSError as error:
        raise UserError(f"cannot read {location} ({error.strerror or error}): fix that and run again") from error
    if index.facts["backend"] not in get_args(loading.Backend):
        raise UserError(f"{tar} was made by another program, and indexed here: give another --output")
    if index.facts["fingerprint"] != plan.fingerprint:
        differing = _what_differs(plan, index, folder)
        raise UserError(f"{folder} holds {plan.name} made differently ({differing}): {remedies}")
    return packed_shard(plan.name, index, reused=True) if index.facts["bytes"] == tar_bytes else None


def how_to_pack_again(folder: str, split: str) -> str:
    """The remedy if the folder's shards of the split are not those of the plan."""
    return f"give another --output, or delete {storage.join(folder, split)}* to pack the split again"


def _what_differs(plan: ShardPlan, index: ShardIndex, folder: str) -> str:
    """How the recipe or the input of an existing shard differs from the plan."""
    old, new = index.facts["recipe"], asdict(plan.recipe)
    changed = ", ".join(f"{name} was {old.get(name)}, is {new[name]}" for name in new if old.get(name) != new[name])
    if changed:
        return changed
    try:
        return _which_sample_differs(plan, index, storage.read_bytes(storage.join(folder, f"{plan.name}.tar")))
    except (OSError, ValueError, KeyError):  # the tar is damaged too
        return "its input has changed"


def _which_sample_differs(plan: ShardPlan, index: ShardIndex, tar: bytes) -> str:
    """The first sample that differs from the plan. Raises KeyError and ValueError for a damaged tar."""
    records = dict(zip(plan.keys, plan.records, strict=True))
    for position in range(len(index)):
        key, member = index.key(position), index.members(position)["json"]
        stored, record = json.loads(tar[member.offset : member.offset + member.size]), records.get(key)
        if record is None or stored["file_name"] != record.file_name or stored["image_id"] != record.image_id:
            return f"sample {key} was of {stored['file_name']}, is of {record and record.file_name}"
        if stored["captions"] != list(record.captions) or stored["annotation_ids"] != list(record.annotation_ids):
            return f"the captions of {record.file_name} have changed"
    return "images were added, removed, or changed in size"


def _refuse_other_tar(plan: ShardPlan, tar: str) -> None:
    """Raise UserError if a tar without an index was made by another program: its first member has another name."""
    try:
        name = storage.read_bytes(tar, end=100).rstrip(b"\0").decode(errors="replace")
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"cannot read {tar} ({error.strerror or error}): fix that and run again") from error
    if name and not re.fullmatch(rf"{plan.split}-\d{{9,}}\.jpg", name):
        raise UserError(f"{tar} was made by another program (it begins with {name!r}): give another --output")


def packed_shard(name: str, index: ShardIndex, *, reused: bool) -> PackedShard:
    """A shard as its index describes it."""
    return PackedShard(
        entry=ShardEntry.of(name, index),
        failures=tuple(index.failures),
        words=words_of(index),
        backend=index.facts["backend"],
        reused=reused,
    )
