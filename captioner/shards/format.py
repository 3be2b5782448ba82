"""The format of a dataset folder: keys, samples, tar members, index and manifest. Imports no torch.

A sample is what webdataset makes of adjacent tar members with one key: `KEY.jpg` and `KEY.json` are the fields `jpg`
and `json`. The folder has an index for each shard (`train-000000.index` for `train-000000.tar`) and one manifest for
all shards of a split (`train.manifest.json`), which is written last.
"""

import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays
from zlib_ng.zlib_ng import crc32

from captioner.errors import UserError
from captioner.files import storage
from captioner.shards.content import content_sha256

FORMAT_VERSION = 5
BLOCK_BYTES = 512
TAR_NAME_BYTES = 100
INDEX = "__index__"  # of a sample that is read: the optional arrays of its shard's index
MAX_FIELDS = 1 << 16  # of a shard: they are numbered in uint16
TAR_HEADER = (  # without name and size; the checksum is computed with blanks in its own field
    bytes(100) + b"0000644\0" + 2 * b"0000000\0" + bytes(12) + b"00000000000\0" + 8 * b" " + b"0" + bytes(100)
    + b"ustar\x0000" + bytes(247)
)  # fmt: skip
SPLITS = ("train", "val", "test")
NOT_KEPT = "not kept"  # the reason under which a manifest counts samples that `keep` left out
PACK_FIRST = (
    "pack it with sharding/make_shards.py (for COCO after sharding/download_coco.py), or index another program's tars "
    "with sharding/check_shards.py index"
)
PACK_AGAIN = (
    "pack the split again with sharding/make_shards.py, or index another program's tars again with index_shards or "
    "sharding/check_shards.py index"
)
RESTORE = f"restore the file or {PACK_AGAIN}"
NOT_A_FOLDER = "{} is a file: give the folder that it is in"


def sample_key(split: str, position: int) -> str:
    """The key of a split's sample: `[0-9a-z_-]+`, zero-padded, unique in the dataset."""
    return f"{split}-{position:09d}"


def shard_name(split: str, number: int) -> str:
    """A shard's file name without its extension."""
    return f"{split}-{number:06d}"


# ---- tar --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Member:
    """Offset and size of a tar member's content in its file, and its checksum."""

    offset: int
    size: int
    crc32: int


def _tar_header(name: bytes, size: int) -> bytes:
    """The header that `tarfile` writes for a file of mode 644 and time 0, ten times as fast. Raises ValueError."""
    if len(name) > TAR_NAME_BYTES or size >= 8**11:
        raise ValueError(f"{name!r} with {size} bytes does not fit a USTAR header")
    header = bytearray(TAR_HEADER)
    header[: len(name)] = name
    header[124:135] = b"%011o" % size
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


class TarBuilder:
    """Builds a plain USTAR file whose bytes depend only on the names and contents of its members."""

    def __init__(self) -> None:
        self._chunks: list[bytes] = []
        self._size = 0

    def add(self, name: str, content: bytes) -> Member:
        """Append a member and return its offset, size and checksum."""
        padding = bytes(-len(content) % BLOCK_BYTES)
        self._chunks += (_tar_header(name.encode(), len(content)), content, padding)
        offset = self._size + BLOCK_BYTES
        self._size = offset + len(content) + len(padding)
        return Member(offset, len(content), crc32(content))

    def to_bytes(self) -> bytes:
        """The whole file: members, two empty blocks, and padding to tar's record size."""
        end = 2 * BLOCK_BYTES
        return b"".join((*self._chunks, bytes(end + -(self._size + end) % tarfile.RECORDSIZE)))


# ---- index ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """An input that could not be used, and why. Failures are counted by `reason`.

    `name` is that of a file, a sample or a tar member; it is empty if it is not known.
    """

    name: str
    reason: str
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardIndex:
    """The members of a shard's samples, in the order of the tar: M members of S samples, as arrays.

    `keys_S` holds bytes strings. The members of sample s are `first_member[s]:first_member[s + 1]` of the arrays with
    suffix M; member m is the field `fields[member_fields_M[m]]` (`jpg`, `seg.png`, ...: lower case, as webdataset names
    it). `facts` are the shard's sha256, bytes, fingerprint, recipe, backend and failures. `optional` holds arrays that
    only some kinds of samples have; readers ignore those that they do not know.
    """

    keys_S: np.ndarray
    fields: tuple[str, ...]
    first_member: np.ndarray
    member_fields_M: np.ndarray
    offsets_M: np.ndarray
    sizes_M: np.ndarray
    crc32s_M: np.ndarray
    facts: dict[str, Any]
    optional: dict[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        samples: Sequence[tuple[str, Mapping[str, Member]]],
        facts: dict[str, Any],
        optional: Mapping[str, np.ndarray] | None = None,
    ) -> "ShardIndex":
        """The index of samples in the order of the tar, each a key and its members by field.

        Raises TooManyFieldsError for more than MAX_FIELDS different fields.
        """
        names = [key.encode(errors="surrogateescape") for key, _ in samples]
        fields = sorted({name for _, members in samples for name in members})
        if len(fields) > MAX_FIELDS:
            raise TooManyFieldsError(f"{len(fields):,} different fields, such as {fields[0]}")
        number_of = {name: number for number, name in enumerate(fields)}
        table = [(number_of[name], m.offset, m.size, m.crc32) for _, found in samples for name, m in found.items()]
        table_4M = np.array(table, dtype=np.int64).reshape(len(table), 4).T
        return cls(
            keys_S=np.array(names, dtype=f"S{max(map(len, names), default=1)}"),
            fields=tuple(fields),
            first_member=np.cumsum([0, *(len(members) for _, members in samples)], dtype=np.int64),
            member_fields_M=table_4M[0].astype(np.uint16),
            offsets_M=table_4M[1].copy(),
            sizes_M=table_4M[2].copy(),
            crc32s_M=table_4M[3].astype(np.uint32),
            facts=facts,
            optional=dict(optional or {}),
        )

    def __len__(self) -> int:
        return len(self.keys_S)

    def key(self, index: int) -> str:
        """A sample's key as printable text; bytes that are not UTF-8 become `\\xNN`."""
        return self.keys_S[index].decode(errors="backslashreplace")

    def members(self, index: int) -> dict[str, Member]:
        """A sample's members by field, in the tar's order."""
        span = slice(*self.first_member[index : index + 2].tolist())
        numbers, *columns = (
            array_M[span].tolist() for array_M in (self.member_fields_M, self.offsets_M, self.sizes_M, self.crc32s_M)
        )
        return {self.fields[number]: Member(*row) for number, *row in zip(numbers, *columns, strict=True)}

    @property
    def failures(self) -> list[Failure]:
        """The inputs of the shard that could not be used."""
        return [Failure(**failure) for failure in self.facts["failures"]]

    @property
    def num_not_kept(self) -> int:
        """How many samples of the tar `keep` left out."""
        return self.facts.get("not_kept", 0)

    def to_bytes(self) -> bytes:
        """The index file: arrays in the safetensors format, and in its header a checksum with the rest as JSON.

        The checksum is that of the content (`content_sha256`), so it holds for any safetensors file of equal content.
        """
        arrays = {
            **self.optional,
            "keys": self.keys_S.view(np.uint8).reshape(len(self), self.keys_S.itemsize),
            "first_member": self.first_member,
            "member_fields": self.member_fields_M,
            "offsets": self.offsets_M,
            "sizes": self.sizes_M,
            "crc32s": self.crc32s_M,
        }
        facts = json.dumps({"format_version": FORMAT_VERSION, "fields": self.fields, **self.facts}, sort_keys=True)
        # One entry only: safetensors writes several in any order, and equal indexes must have equal bytes.
        return save_arrays(arrays, metadata={"facts": content_sha256(facts, arrays) + facts})

    @classmethod
    def from_bytes(cls, data: bytes, *, origin: str) -> "ShardIndex":
        """The index in the bytes of `to_bytes`. Raises UserError, with the file name `origin`, if it cannot be used."""
        try:
            arrays = load_arrays(data)
            header = data[8 : 8 + int.from_bytes(data[:8], "little")].decode("ascii")
            checksum, brace, rest = json.loads(header)["__metadata__"]["facts"].partition("{")
            facts = json.loads(brace + rest)
            check_format(facts.pop("format_version", None), origin=origin)
            if checksum != content_sha256(brace + rest, arrays) or not header.isprintable():
                raise UserError(f"{origin} is damaged (its checksum differs): {PACK_AGAIN}")
            keys = arrays.pop("keys")
            return cls(
                keys_S=np.ascontiguousarray(keys).view(f"S{keys.shape[1]}").reshape(len(keys)),
                fields=tuple(facts.pop("fields")),
                first_member=arrays.pop("first_member"),
                member_fields_M=arrays.pop("member_fields"),
                offsets_M=arrays.pop("offsets"),
                sizes_M=arrays.pop("sizes"),
                crc32s_M=arrays.pop("crc32s"),
                facts=facts,
                optional=arrays,
            )
        except (safetensors.SafetensorError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise UserError(f"{origin} is not a readable shard index ({error}): {PACK_AGAIN}") from error


class TooManyFieldsError(Exception):
    """More different fields than an index can number."""


class FormatError(UserError):
    """A file of another version of the shards' format."""


def check_format(found: object, *, origin: str) -> None:
    """Raise FormatError unless `found` is the version of shards, indexes and manifests that this code reads."""
    if found != FORMAT_VERSION:
        raise FormatError(f"{origin} has format {found}, this version reads {FORMAT_VERSION}: {PACK_AGAIN}")


# ---- manifest ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardEntry:
    """One shard as its manifest lists it; `name` has no extension.

    `failures` is the number of samples that were left out, `fingerprint` a hash of all that the shard was made from.
    Only captioned images have `captions`.
    """

    name: str
    samples: int
    failures: int
    bytes: int
    sha256: str
    fingerprint: str
    captions: int = 0

    @classmethod
    def of(cls, name: str, index: ShardIndex) -> "ShardEntry":
        """The entry of a shard with this index."""
        return cls(
            name=name,
            samples=len(index),
            failures=len(index.facts["failures"]) + index.num_not_kept,
            bytes=index.facts["bytes"],
            sha256=index.facts["sha256"],
            fingerprint=index.facts["fingerprint"],
            captions=len(index.optional.get("caption_lengths", ())),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """A complete split. `settings` and `source` say how it was made; `failures` counts failures by reason."""

    split: str
    shards: tuple[ShardEntry, ...]
    settings: dict[str, Any]
    source: dict[str, Any]
    failures: dict[str, int]
    fingerprint: str

    @property
    def num_samples(self) -> int:
        """Samples of all shards."""
        return sum(shard.samples for shard in self.shards)

    def to_json(self) -> str:
        """The text of `SPLIT.manifest.json`."""
        totals = {name: sum(getattr(s, name) for s in self.shards) for name in ("samples", "captions", "bytes")}
        return json.dumps({"format_version": FORMAT_VERSION, **asdict(self), "totals": totals}, indent=1)


def manifest_location(folder: str, split: str) -> str:
    """The path or URL of a split's manifest."""
    return storage.join(folder, f"{split}.manifest.json")


def complete_splits(folder: str) -> list[str]:
    """The splits of which the folder has a manifest."""
    return [split for split in SPLITS if storage.exists(manifest_location(folder, split))]


def read_manifest(folder: str, split: str, *, remedy: str) -> Manifest:
    """The manifest of a complete split. Raises UserError, with `remedy`, if there is none."""
    origin = manifest_location(folder, split)
    try:
        content = storage.read_json(origin, remedy=remedy)
    except UserError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        there = ", ".join(complete_splits(folder)) or "none"
        raise UserError(f"there is no {origin} (splits there: {there}): {remedy}") from error
    try:
        check_format(content.pop("format_version"), origin=origin)
        del content["totals"]
        shards = tuple(ShardEntry(**entry) for entry in content.pop("shards"))
        return Manifest(shards=shards, **content)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{origin} is not a manifest ({error!r}): {PACK_AGAIN}") from error
