"""Single samples out of shards, each byte of them checked. Imports no torch."""

import os
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from captioner.errors import StreamingError, UserError
from captioner.files import storage
from captioner.shards.format import ShardEntry, ShardIndex
from captioner.streaming.cache import (
    RESTORE,
    DamagedShardError,
    MissingShardError,
    Prefetcher,
    ShardCache,
    tar_location,
)
from captioner.streaming.order import SampleRef

NEAR_BYTES = 4096
Reason = Literal["shard missing", "shard damaged", "checksum", "undecodable", "no captions", "no features"]


class SampleError(StreamingError):
    """A sample that cannot be used: a reason to count by, and one line with the place and the remedy."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(reason, message)
        self.reason: Reason = reason
        self.message = message

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True, slots=True)
class OpenShard:
    """A shard's index, and its tar open for reading."""

    index: ShardIndex
    file: int
    offsets: list[list[int]]
    sizes: list[list[int]]
    crc32s: list[list[int]]

    @classmethod
    def of(cls, index: ShardIndex, file: int) -> "OpenShard":
        """With the index's arrays as lists, which are faster to take single numbers from."""
        return cls(index, file, index.offsets_S2.tolist(), index.sizes_S2.tolist(), index.crc32s_S2.tolist())


class ShardReader:
    """Reads samples of a split's shards; at most `max_open` of these, the last used, are kept open.

    Shards behind URLs come through `cache`, and those that `prefetcher` brings are told to it when they are opened.
    Without `pictures` only captions are read, and the pictures' bytes are empty. Close it after use.
    """

    def __init__(
        self,
        shards: Sequence[tuple[str, ShardEntry]],
        *,
        max_open: int,
        cache: ShardCache | None = None,
        prefetcher: Prefetcher | None = None,
        pictures: bool = True,
        fields=None,
    ) -> None:
        self._shards = shards
        self._pictures = pictures
        self._max_open = max_open
        self._cache = cache
        self._prefetcher = prefetcher
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._failed: dict[int, SampleError] = {}

    def close(self) -> None:
        """Close all shards."""
        while self._open:
            os.close(self._open.popitem()[1].file)

    def location(self, shard: int) -> str:
        """Where a shard's tar lies."""
        return tar_location(*self._shards[shard])

    def read(self, shard, place):
        key, p, t = self.read2(SampleRef(0, shard, place))
        return key, {"jpg": bytes(p), "json": bytes(t)}

    def read2(self, ref: SampleRef) -> tuple[str, bytearray, bytearray]:
        """A sample's key, and the content of its picture and of its captions, which torch takes without a copy.

        Raises SampleError for a missing or damaged shard or member, and UserError when a server or disk fails.
        """
        shard = self._open.get(ref.shard)
        if shard is None:
            shard = self._open_shard(ref.shard)
        else:
            self._open.move_to_end(ref.shard)
        return shard.index.key(ref.place), *self._read_members(shard, ref)

    def _read_members(self, shard: OpenShard, ref: SampleRef) -> tuple[bytearray, bytearray]:
        """A sample's two members, checked; neighbours, as packing makes them, with one question to the system."""
        (start, second), sizes = shard.offsets[ref.place], shard.sizes[ref.place]
        picture, text = (bytearray(size) for size in sizes)
        between = second - start - sizes[0]
        try:
            if not self._pictures:
                picture = bytearray()
                os.preadv(shard.file, [text], second)
            elif 0 <= between <= NEAR_BYTES:
                os.preadv(shard.file, [picture, bytearray(between), text], start)
            else:
                os.preadv(shard.file, [picture], start)
                os.preadv(shard.file, [text], second)
        except OSError as error:
            raise UserError(f"cannot read {self.location(ref.shard)} ({error.strerror or error}): mend that") from error
        wanted = shard.crc32s[ref.place]
        if zlib.crc32(text) != wanted[1] or (self._pictures and zlib.crc32(picture) != wanted[0]):
            raise SampleError(
                "checksum",
                f"{self.location(ref.shard)} is damaged at sample {shard.index.key(ref.place)} (checksum differs): "
                f"{RESTORE}",
            )
        return picture, text

    def _open_shard(self, number: int) -> OpenShard:
        if number in self._failed:
            raise self._failed[number]
        folder, entry = self._shards[number]
        try:
            while len(self._open) >= self._max_open:
                os.close(self._open.popitem(last=False)[1].file)
            found = open_cached(self._cache, folder, entry) if self._cache is not None else open_local(folder, entry)
        except SampleError as error:
            self._failed[number] = error
            raise
        shard = OpenShard.of(*found)
        if self._prefetcher is not None:
            self._prefetcher.opened(entry)
        self._open[number] = shard
        return shard


def open_cached(cache: ShardCache, folder: str, entry: ShardEntry) -> tuple[ShardIndex, int]:
    """As `open_local` for a folder behind a URL, through the cache. Raises SampleError, and UserError as it does."""
    if not storage.is_remote(folder):
        return open_local(folder, entry)
    try:
        index, file = cache.open(folder, entry)
    except MissingShardError as error:
        raise SampleError("shard missing", str(error)) from error
    except DamagedShardError as error:
        raise SampleError("shard damaged", str(error)) from error
    return check_shard(index, file, entry, location=tar_location(folder, entry))


def open_local(folder: str, entry: ShardEntry) -> tuple[ShardIndex, int]:
    """A shard's index, and its tar open for reading, both seen to be what the manifest says. Raises SampleError."""
    location, origin = tar_location(folder, entry), storage.join(folder, f"{entry.name}.index")
    try:
        index = ShardIndex.from_bytes(Path(origin).read_bytes(), origin=origin)
        file = os.open(location, os.O_RDONLY)
    except FileNotFoundError as error:
        raise SampleError("shard missing", f"there is no {error.filename}: {RESTORE}") from error
    except UserError as error:
        raise SampleError("shard damaged", str(error)) from error
    except OSError as error:
        raise SampleError("shard damaged", f"cannot read shard {location} ({error}): {RESTORE}") from error
    return check_shard(index, file, entry, location=location)


def check_shard(index: ShardIndex, file: int, entry: ShardEntry, *, location: str) -> tuple[ShardIndex, int]:
    """The index and the open tar, if both are what the manifest lists; else closes it and raises SampleError."""
    num_bytes = os.fstat(file).st_size
    if num_bytes != entry.bytes:
        problem = f"{location} has {num_bytes:,} bytes, its manifest says {entry.bytes:,}"
    elif len(index) != entry.samples:
        problem = f"the index of {location} lists {len(index):,} samples, its manifest {entry.samples:,}"
    elif index.facts["sha256"] != entry.sha256:
        problem = f"the index of {location} is of another shard than its manifest says"
    else:
        return index, file
    os.close(file)
    raise SampleError("shard damaged", f"{problem}: {RESTORE}")
