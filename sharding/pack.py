"""One shard of the plan to one tar and its index."""

import hashlib
import json
import time
from dataclasses import asdict, dataclass

from captioner import images, storage
from captioner.cli import UserError
from captioner.shards import Member, Sample, ShardEntry, ShardIndex, TarBuilder, build_index
from captioner.vocabulary import tokenize
from sharding.plan import ShardPlan
from sharding.sources import Failure, Record


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedShard:
    """A finished shard: its manifest entry, what could not be packed, and whether it was there already."""

    entry: ShardEntry
    failures: tuple[Failure, ...]
    seconds: float
    reused: bool


def pack_shard(plan: ShardPlan, folder: str) -> PackedShard:
    """Write `NAME.tar` and then `NAME.index` into `folder`, unless both are there and made from this very plan."""
    started = time.monotonic()
    ready = _find_packed(plan, folder)
    if ready is not None:
        return ready
    tar = TarBuilder()
    keys: list[str] = []
    members: list[tuple[Member, Member]] = []
    lengths: list[list[int]] = []
    failures: list[Failure] = []
    for key, record in zip(plan.keys, plan.records, strict=True):
        try:
            jpeg, sample = make_sample(record, plan=plan)
        except images.ImageError as error:
            failures.append(Failure(image=record.file_name, reason=error.reason, message=error.message))
            continue
        keys.append(key)
        members.append((tar.add(f"{key}.jpg", jpeg), tar.add(f"{key}.json", sample.to_json())))
        lengths.append([len(tokens) for tokens in sample.tokens])
    data = tar.to_bytes()
    facts = {
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "fingerprint": plan.fingerprint,
        "failures": [asdict(failure) for failure in failures],
    }
    index = build_index(keys, members, lengths, facts)
    storage.write_atomic(storage.join(folder, f"{plan.name}.tar"), data)
    storage.write_atomic(storage.join(folder, f"{plan.name}.index"), index.to_bytes())
    return _packed(plan.name, index, seconds=time.monotonic() - started, reused=False)


def make_sample(record: Record, *, plan: ShardPlan) -> tuple[bytes, Sample]:
    """A record's stored JPEG and its JSON content. Raises ImageError."""
    try:
        data = storage.read_bytes(record.location)
    except FileNotFoundError as error:
        raise images.ImageError("missing", f"there is no file {record.location}") from error
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise images.ImageError("unreadable", f"{record.location!r}: {error}") from error
    picture, (width, height) = images.load_squashed(data, size=plan.pixels.size)
    sample = Sample(
        image_id=record.image_id,
        file_name=record.file_name,
        width=width,
        height=height,
        captions=list(record.captions),
        tokens=[tokenize(caption) for caption in record.captions],
        annotation_ids=list(record.annotation_ids),
    )
    return images.encode_jpeg(picture, quality=plan.pixels.quality), sample


def _find_packed(plan: ShardPlan, folder: str) -> PackedShard | None:
    """The shard as an earlier run left it: its index is written last, so an index means a whole shard."""
    location = storage.join(folder, f"{plan.name}.index")
    try:
        index = ShardIndex.from_bytes(storage.read_bytes(location), origin=location)
        tar_bytes = storage.size_bytes(storage.join(folder, f"{plan.name}.tar"))
    except (FileNotFoundError, UserError):
        return None
    if index.facts["fingerprint"] != plan.fingerprint or index.facts["bytes"] != tar_bytes:
        return None
    return _packed(plan.name, index, seconds=0.0, reused=True)


def _packed(name: str, index: ShardIndex, *, seconds: float, reused: bool) -> PackedShard:
    entry = ShardEntry(
        name=name,
        samples=len(index),
        captions=len(index.caption_lengths),
        bytes=index.facts["bytes"],
        sha256=index.facts["sha256"],
    )
    failures = tuple(Failure(**failure) for failure in index.facts["failures"])
    return PackedShard(entry=entry, failures=failures, seconds=seconds, reused=reused)


def read_tokens(folder: str, name: str) -> list[list[str]]:
    """The token strings of all captions of a shard, read back from its tar."""
    location = storage.join(folder, f"{name}.index")
    index = ShardIndex.from_bytes(storage.read_bytes(location), origin=location)
    data = storage.read_bytes(storage.join(folder, f"{name}.tar"))
    places = zip(index.offsets_S2[:, 1].tolist(), index.sizes_S2[:, 1].tolist(), strict=True)
    return [tokens for offset, size in places for tokens in json.loads(data[offset : offset + size])["tokens"]]
