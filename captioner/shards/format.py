"""The dataset folder's contract: keys, samples, tar members, index and manifest. Imports no torch.

A sample is one image with all its captions: adjacent members `KEY.jpg` and `KEY.json` of a plain USTAR file. Beside
`train-000000.tar` stands `train-000000.index`, and beside all shards `train.manifest.json`, which is written last.
"""

import json
import tarfile
import zlib
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from captioner.errors import UserError
from captioner.files import storage
from captioner.shards.content import content_sha256

FORMAT_VERSION = 3
BLOCK_BYTES = 512
TAR_NAME_BYTES = 100
TAR_HEADER = (  # of an empty name and size, with blanks for the checksum, which counts them so
    bytes(100) + b"0000644\0" + 2 * b"0000000\0" + bytes(12) + b"00000000000\0" + 8 * b" " + b"0" + bytes(100)
    + b"ustar\x0000" + bytes(247)
)  # fmt: skip
SPLITS = ("train", "val", "test")
PACK_AGAIN = "pack the split again with sharding/make_shards.py"


def sample_key(split: str, position: int) -> str:
    """The key of a split's sample: `[0-9a-z_-]+`, zero-padded, unique in the dataset."""
    return f"{split}-{position:09d}"


def shard_name(split: str, number: int) -> str:
    """A shard's file name without its ending."""
    return f"{split}-{number:06d}"


# ---- tar --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Member:
    """Where one tar member's content lies, and its checksum."""

    offset: int
    size: int
    crc32: int


def _tar_header(name: bytes, size: int) -> bytes:
    """What `tarfile` writes for a plain file of mode 644 and time 0, ten times as fast. Raises ValueError."""
    if len(name) > TAR_NAME_BYTES or size >= 8**11:
        raise ValueError(f"{name!r} with {size} bytes does not fit a USTAR header")
    header = bytearray(TAR_HEADER)
    header[: len(name)] = name
    header[124:135] = b"%011o" % size
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


class TarBuilder:
    """Collects members of a plain USTAR file whose bytes depend on names and contents alone."""

    def __init__(self) -> None:
        self._chunks: list[bytes] = []
        self._size = 0

    def add(self, name: str, content: bytes) -> Member:
        """Append a member and say where its content lies."""
        padding = bytes(-len(content) % BLOCK_BYTES)
        self._chunks += (_tar_header(name.encode(), len(content)), content, padding)
        offset = self._size + BLOCK_BYTES
        self._size = offset + len(content) + len(padding)
        return Member(offset, len(content), zlib.crc32(content))

    def to_bytes(self) -> bytes:
        """The whole file: members, two empty blocks, and padding to tar's record size."""
        end = 2 * BLOCK_BYTES
        return b"".join((*self._chunks, bytes(end + -(self._size + end) % tarfile.RECORDSIZE)))


# ---- index ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardIndex:
    """Where each of a shard's S samples lies, in order; loads without parsing anything sample by sample.

    `keys_S` holds bytes strings. The members' arrays (S, 2) have the image in column 0 and the JSON in column 1.
    Caption lengths, in tokens, of sample s are `caption_lengths[first_caption[s]:first_caption[s + 1]]`.
    `facts` are the shard's sha256, bytes, fingerprint, backend and failures; `words_json` counts its captions' words
    (a JSON object, not parsed here, since only the making of a vocabulary reads it).
    """

    keys_S: np.ndarray
    offsets_S2: np.ndarray
    sizes_S2: np.ndarray
    crc32s_S2: np.ndarray
    first_caption: np.ndarray
    caption_lengths: np.ndarray
    facts: dict[str, Any]
    words_json: str = "{}"

    def __len__(self) -> int:
        return len(self.keys_S)

    def key(self, place: int) -> str:
        """A sample's key as text that can be shown; bytes of other people's keys that are no UTF-8 become `\\xNN`."""
        return self.keys_S[place].decode(errors="backslashreplace")

    def count_words(self) -> Counter[str]:
        """How often each token occurs in the shard's captions."""
        return Counter(json.loads(self.words_json))

    def to_bytes(self) -> bytes:
        """The index file: arrays in the safetensors format, and in its header a checksum with `facts` as JSON.

        The checksum is of the content (`content_sha256`), so that any safetensors file that says the same is whole.
        """
        arrays = {
            "keys": self.keys_S.view(np.uint8).reshape(len(self), self.keys_S.itemsize),
            "offsets": self.offsets_S2,
            "sizes": self.sizes_S2,
            "crc32s": self.crc32s_S2,
            "first_caption": self.first_caption,
            "caption_lengths": self.caption_lengths,
            "words": np.frombuffer(self.words_json.encode(), dtype=np.uint8),
        }
        facts = json.dumps({"format_version": FORMAT_VERSION, **self.facts}, sort_keys=True)
        # One entry only: safetensors writes several in any order, and equal indexes shall be equal bytes.
        return save_arrays(arrays, metadata={"facts": content_sha256(facts, arrays) + facts})

    @classmethod
    def from_bytes(cls, data: bytes, *, origin: str) -> "ShardIndex":
        """Read `to_bytes`; `origin` names the file in errors. Raises UserError where it cannot be used."""
        try:
            arrays = load_arrays(data)
            header = data[8 : 8 + int.from_bytes(data[:8], "little")].decode("ascii")
            checksum, brace, rest = json.loads(header)["__metadata__"]["facts"].partition("{")
            facts = json.loads(brace + rest)
            check_format(facts.pop("format_version", None), origin=origin)
            if checksum != content_sha256(brace + rest, arrays) or not header.isprintable():
                raise UserError(f"{origin} is damaged (its checksum differs): {PACK_AGAIN}")
            keys = arrays["keys"]
            index = cls(
                keys_S=np.ascontiguousarray(keys).view(f"S{keys.shape[1]}").reshape(len(keys)),
                offsets_S2=arrays["offsets"],
                sizes_S2=arrays["sizes"],
                crc32s_S2=arrays["crc32s"],
                first_caption=arrays["first_caption"],
                caption_lengths=arrays["caption_lengths"],
                facts=facts,
                words_json=arrays["words"].tobytes().decode(),
            )
            index._check_shapes()
        except (safetensors.SafetensorError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise UserError(f"{origin} is not a readable shard index ({error}): {PACK_AGAIN}") from error
        return index

    def _check_shapes(self) -> None:
        """Raise ValueError for arrays that do not belong together."""
        pairs = (len(self), 2)
        if not (self.offsets_S2.shape == self.sizes_S2.shape == self.crc32s_S2.shape == pairs):
            raise ValueError("its arrays have different lengths")
        if self.first_caption.shape != (len(self) + 1,) or self.first_caption[-1] != len(self.caption_lengths):
            raise ValueError("its captions do not belong to its samples")


class FormatError(UserError):
    """A file of another version of the shards' format."""


def check_format(found: object, *, origin: str) -> None:
    """Raise FormatError unless `found` is the version of shards, indexes and manifests that this code reads."""
    if found != FORMAT_VERSION:
        raise FormatError(
            f"{origin} has format {found}, this version reads {FORMAT_VERSION}: {PACK_AGAIN}; tars of another program "
            "want sharding/check_shards.py index again"
        )


# ---- manifest ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardEntry:
    """One shard as its manifest lists it; `name` has no ending.

    `failures` is how many pictures could not be packed, `fingerprint` of all that the shard is made from.
    """

    name: str
    samples: int
    captions: int
    failures: int
    bytes: int
    sha256: str
    fingerprint: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a complete split holds. `settings` and `source` say how it was made; `failures` counts by reason."""

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
    """Where a split's manifest lies."""
    return storage.join(folder, f"{split}.manifest.json")


def read_manifest(folder: str, split: str, *, remedy: str) -> Manifest:
    """The manifest of a complete split. Raises UserError, with `remedy`, when the split is not there."""
    origin = manifest_location(folder, split)
    content = storage.read_json(origin, remedy=remedy)
    try:
        check_format(content.pop("format_version"), origin=origin)
        del content["totals"]
        shards = tuple(ShardEntry(**entry) for entry in content.pop("shards"))
        return Manifest(shards=shards, **content)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{origin} is not a manifest ({error!r}): {PACK_AGAIN}") from error
