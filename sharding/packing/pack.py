"""One shard of the plan to one tar and its index."""

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
from captioner.images import loading
from captioner.images.decoder_output import own_stderr
from captioner.samples import CaptionContent, build_index, words_of
from captioner.shards.format import Failure, FormatError, Member, ShardEntry, ShardIndex, TarBuilder
from captioner.shards.writing import write, writing
from captioner.vocabulary import tokenize
from sharding.packing.planning import ShardPlan
from sharding.packing.sources import Record

MAX_FILE_BYTES = 1 << 30
GROUP_PICTURES, GROUP_BYTES = 8, 2 << 20  # that are packed together
READ_AHEAD = 16  # pictures a worker fetches at once where each costs a round trip over the network
REPORT_SECONDS = 0.25
BETWEEN = -1  # the place of a worker that is at no picture


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedShard:
    """A finished shard: its manifest entry, what could not be packed, its words, and whether it was there already.

    `num_damaged` counts the pictures packed now that could be used although their decoder complained.
    """

    entry: ShardEntry
    failures: tuple[Failure, ...]
    words: Counter[str]
    backend: str
    reused: bool
    num_damaged: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a shard is: pictures done, those of them that failed, and bytes read."""

    shard: str
    pictures: int
    failures: int
    bytes: int


Report = Callable[[Progress], None]


@own_stderr()
def pack_shard(
    plan: ShardPlan,
    folder: str,
    *,
    report: Report = lambda progress: None,
    mark: Callable[[int], None] = lambda place: None,
    refused: Collection[int] = (),
) -> PackedShard:
    """Write `NAME.tar` and then `NAME.index` into `folder`; `report` hears several times a second how far it is.

    `mark` hears of each picture's place before it is worked on, and of BETWEEN after that; pictures at `refused` places
    are failures, undecoded. No other thread of the process may decode meanwhile, nor print to stderr but by Python.
    Raises UserError when the output cannot be written, or when pictures vanish or change while they are packed.
    """
    stored: list[tuple[int, loading.StoredJpeg]] = []
    failures: list[Failure] = []
    damaged: list[int] = []
    bytes_read = 0
    reported = time.monotonic()
    for first, contents in _read_groups(plan, refused=refused):
        for place, result in enumerate(
            _to_stored_jpegs(plan, first, contents, mark=mark, note_damage=damaged.append), start=first
        ):
            if isinstance(result, loading.StoredJpeg):
                stored.append((place, result))
            else:
                failures.append(_failure(plan.records[place], result))
        mark(BETWEEN)
        bytes_read += sum(len(content) for content in contents if isinstance(content, bytes))
        if time.monotonic() - reported > REPORT_SECONDS:
            reported = time.monotonic()
            done = first + len(contents)
            report(Progress(shard=plan.name, pictures=done, failures=len(failures), bytes=bytes_read))
    # Text in a loop of its own: each picture empties the processor's cache of the code for it, 0.2 ms a picture.
    tar = TarBuilder()
    keys: list[str] = []
    members: list[dict[str, Member]] = []
    tokens: list[list[list[str]]] = []
    for place, jpeg in stored:
        key, sample = plan.keys[place], _make_sample(plan.records[place], jpeg.original_size)
        keys.append(key)
        members.append({"jpg": tar.add(f"{key}.jpg", jpeg.data), "json": tar.add(f"{key}.json", sample.to_json())})
        tokens.append(sample.tokens)
    data = tar.to_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    if plan.sha256 not in (None, sha256):
        raise UserError(
            f"{plan.name} comes out with other bytes than before (another version of a library, or an image changed): "
            "it was left as it is; delete the split's shards and pack it again"
        )
    facts = {
        "bytes": len(data),
        "sha256": sha256,
        "fingerprint": plan.fingerprint,
        "recipe": asdict(plan.recipe),
        "backend": loading.backend(),
        "failures": [asdict(failure) for failure in failures],
    }
    index = build_index(keys, members, tokens, facts)
    with writing(storage.join(folder, f"{plan.name}.index")) as old:
        storage.delete(old)  # it must not stand beside a new tar
    write(storage.join(folder, f"{plan.name}.tar"), data)
    write(storage.join(folder, f"{plan.name}.index"), index.to_bytes())
    report(Progress(shard=plan.name, pictures=len(plan.records), failures=len(failures), bytes=bytes_read))
    return replace(packed_shard(plan.name, index, reused=False), num_damaged=len(damaged))


def _to_stored_jpegs(
    plan: ShardPlan,
    first: int,
    contents: Sequence[bytes | loading.ImageError],
    *,
    mark: Callable[[int], None],
    note_damage: Callable[[int], None],
) -> list[loading.StoredJpeg | loading.ImageError]:
    """The pictures from place `first` on as JPEGs, or why not."""
    recipe = plan.recipe
    return loading.to_stored_jpegs(
        contents,
        size=recipe.size,
        resize=recipe.resize,
        quality=recipe.quality,
        mark=lambda number: mark(first + number),
        note_damage=note_damage,
    )


def _failure(record: Record, error: loading.ImageError) -> Failure:
    """What the manifest says of a picture that could not be packed. Raises UserError where memory was short."""
    if isinstance(error.__cause__, MemoryError):  # the shard's bytes shall not depend on how much there is
        raise UserError(
            f"there is too little memory to decode {record.file_name}: give fewer --workers and run again"
        ) from error
    return Failure(name=record.file_name, reason=error.reason, message=error.message)


def _make_sample(record: Record, original_size: tuple[int, int]) -> CaptionContent:
    """A record's JSON content."""
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


# ---- reading pictures -------------------------------------------------------------------------------------


def _read_groups(
    plan: ShardPlan, *, refused: Collection[int]
) -> Iterator[tuple[int, list[bytes | loading.ImageError]]]:
    """The content of the plan's pictures in groups to be packed together: the first one's place, and all."""
    group: list[bytes | loading.ImageError] = []
    group_bytes = 0
    for place, content in enumerate(_read_pictures(plan)):
        if isinstance(content, loading.ImageError):
            group.append(content)
        elif place in refused:
            group.append(loading.ImageError("undecodable", "it crashes the decoder"))
        else:
            group.append(content)
            group_bytes += len(content)
        if len(group) == GROUP_PICTURES or group_bytes > GROUP_BYTES or place + 1 == len(plan.records):
            yield place + 1 - len(group), group
            group, group_bytes = [], 0


def _read_pictures(plan: ShardPlan) -> Iterator[bytes | loading.ImageError]:
    """The content of the plan's pictures, in order, or why there is none."""
    places = range(len(plan.records))
    if not storage.is_remote(plan.images):
        yield from (_read_picture(plan, place) for place in places)
        return
    with ThreadPoolExecutor(READ_AHEAD) as threads:
        ahead = deque(threads.submit(_read_picture, plan, place) for place in places[:READ_AHEAD])
        try:
            for place in places:
                content = ahead.popleft().result()
                if place + READ_AHEAD < len(places):
                    ahead.append(threads.submit(_read_picture, plan, place + READ_AHEAD))
                yield content
        finally:
            threads.shutdown(cancel_futures=True)


def _read_picture(plan: ShardPlan, place: int) -> bytes | loading.ImageError:
    """One picture's content. Raises UserError when it is not what it was when the shard was planned."""
    planned = plan.file_bytes[place]
    location = storage.join(plan.images, plan.records[place].file_name)
    if planned is None:
        return loading.ImageError("missing", "there is no such file")
    if planned > MAX_FILE_BYTES:
        return loading.ImageError("too large", f"{planned:,} bytes, more than {MAX_FILE_BYTES:,}")
    try:
        data = storage.read_bytes(location)
    except FileNotFoundError as error:
        if planned == storage.UNKNOWN:
            return loading.ImageError("missing", "there is no such file")
        raise UserError(f"{location} vanished while it was packed: bring it back and run again") from error
    except storage.RefusedError as error:
        return loading.ImageError("unreadable", str(error))
    except storage.StorageError:  # of a server that fails no shard shall tell
        raise
    except PermissionError as error:
        return loading.ImageError("unreadable", f"{error.strerror or error}")
    except OSError as error:  # of a disk that fails no shard shall tell either
        raise UserError(
            f"cannot read {location} ({error.strerror or error}): mend that, or take the picture away, and run again; "
            "finished shards are kept"
        ) from error
    if planned not in (len(data), storage.UNKNOWN):
        raise UserError(
            f"{location} had {planned:,} bytes and has {len(data):,}: it changed while it was packed; run again when "
            "nothing writes to the pictures"
        )
    return data


# ---- what is there already --------------------------------------------------------------------------------


def find_packed(plan: ShardPlan, folder: str) -> PackedShard | None:
    """The shard as an earlier run left it, or None where there is none, or not a whole one.

    Its index is written last, so an index means a whole tar; the tar's size is checked as well. Raises UserError when
    the shard was made from another plan.
    """
    location, tar = (storage.join(folder, f"{plan.name}.{ending}") for ending in ("index", "tar"))
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
        raise UserError(f"cannot read {location} ({error.strerror or error}): mend that and run again") from error
    if index.facts["backend"] not in get_args(loading.Backend):
        raise UserError(f"{tar} was made by another program, and indexed here: give another --output")
    if index.facts["fingerprint"] != plan.fingerprint:
        differing = _what_differs(plan, index, folder)
        raise UserError(f"{folder} holds {plan.name} made differently ({differing}): {remedies}")
    return packed_shard(plan.name, index, reused=True) if index.facts["bytes"] == tar_bytes else None


def how_to_pack_again(folder: str, split: str) -> str:
    """What to do where the folder holds something else of the split than what is to be packed."""
    return f"give another --output, or delete {storage.join(folder, split)}* to pack the split again"


def _what_differs(plan: ShardPlan, index: ShardIndex, folder: str) -> str:
    """How the shard that is there was made, against the plan."""
    old, new = index.facts["recipe"], asdict(plan.recipe)
    changed = ", ".join(f"{name} was {old.get(name)}, is {new[name]}" for name in new if old.get(name) != new[name])
    if changed:
        return changed
    try:
        return _which_sample_differs(plan, index, storage.read_bytes(storage.join(folder, f"{plan.name}.tar")))
    except (OSError, ValueError, KeyError):  # the tar is damaged as well
        return "its input has changed"


def _which_sample_differs(plan: ShardPlan, index: ShardIndex, tar: bytes) -> str:
    records = dict(zip(plan.keys, plan.records, strict=True))
    for place in range(len(index)):
        key, text = index.key(place), index.members(place)["json"]
        stored, record = json.loads(tar[text.offset : text.offset + text.size]), records.get(key)
        if record is None or stored["file_name"] != record.file_name or stored["image_id"] != record.image_id:
            return f"sample {key} was of {stored['file_name']}, is of {record and record.file_name}"
        if stored["captions"] != list(record.captions) or stored["annotation_ids"] != list(record.annotation_ids):
            return f"the captions of {record.file_name} have changed"
    return "pictures were added, removed, or changed in size"


def _refuse_other_tar(plan: ShardPlan, tar: str) -> None:
    """Raise UserError for a tar that has no index because another program made it."""
    try:
        name = storage.read_bytes(tar, end=100).rstrip(b"\0").decode(errors="replace")
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"cannot read {tar} ({error.strerror or error}): mend that and run again") from error
    if name and not re.fullmatch(rf"{plan.split}-\d{{9,}}\.jpg", name):
        raise UserError(f"{tar} was made by another program (it begins with {name!r}): give another --output")


def packed_shard(name: str, index: ShardIndex, *, reused: bool) -> PackedShard:
    """What a shard's index says of it."""
    return PackedShard(
        entry=ShardEntry.of(name, index),
        failures=tuple(index.failures),
        words=words_of(index),
        backend=index.facts["backend"],
        reused=reused,
    )
