"""Reads single samples from shards and checks their checksums. Imports no torch."""

import os
from collections import OrderedDict
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from zlib_ng.zlib_ng import crc32

from captioner.errors import StreamingError, UserError
from captioner.files import storage
from captioner.shards.format import RESTORE, ShardEntry, ShardIndex
from captioner.streaming.cache import (
    DamagedShardError,
    MissingShardError,
    Prefetcher,
    ShardCache,
    tar_location,
)

NEAR_BYTES = 4096  # between members that are read with one system call
TOGETHER_BYTES = 1 << 14  # read with one call at most: copying members out of more costs more than several calls


class SampleError(StreamingError):
    """A sample that cannot be used: the reason to count it by, and one line that says where it is and what to do."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)
        self.reason = reason
        self.message = message

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True, slots=True)
class OpenShard:
    """A shard's open tar and its index, as memory views: single numbers are read faster from these than from arrays.

    `fields` has None for fields that are not read.
    """

    file: int
    keys: bytes
    key_bytes: int
    fields: tuple[str | None, ...]
    first_member: memoryview
    member_fields_M: memoryview
    offsets_M: memoryview
    sizes_M: memoryview
    crc32s_M: memoryview
    optional: dict[str, np.ndarray]

    @classmethod
    def of(cls, index: ShardIndex, file: int, *, wanted: Container[str] | None) -> "OpenShard":
        """From a shard's index and its open tar. Without `wanted` all fields are read."""
        return cls(
            file,
            index.keys_S.tobytes(),
            index.keys_S.itemsize,
            tuple(name if wanted is None or name in wanted else None for name in index.fields),
            index.first_member.data,
            index.member_fields_M.data,
            index.offsets_M.data,
            index.sizes_M.data,
            index.crc32s_M.data,
            index.optional,
        )

    def key(self, index: int) -> str:
        """The same as `ShardIndex.key`."""
        start = index * self.key_bytes
        key = self.keys[start : start + self.key_bytes]
        return (key.rstrip(b"\0") if key[-1:] == b"\0" else key).decode("utf-8", "backslashreplace")


class ShardReader:
    """Reads samples of a split's shards, and keeps the `max_open` shards that were used last open.

    Shards behind URLs are read through `cache`; `prefetcher.opened` is called for each shard that is opened. With
    `fields` only these are read. Close it after use.
    """

    def __init__(
        self,
        shards: Sequence[tuple[str, ShardEntry]],
        *,
        max_open: int,
        cache: ShardCache | None = None,
        prefetcher: Prefetcher | None = None,
        fields: Container[str] | None = None,
    ) -> None:
        self._shards = shards
        self._fields = fields
        self._max_open = max_open
        self._cache = cache
        self._prefetcher = prefetcher
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._failed: dict[int, SampleError] = {}
        self._locations: dict[int, str] = {}

    def close(self) -> None:
        """Close all shards."""
        while self._open:
            os.close(self._open.popitem()[1].file)

    def location(self, shard: int) -> str:
        """The path or URL of a shard's tar."""
        found = self._locations.get(shard)
        if found is None:
            found = self._locations[shard] = tar_location(*self._shards[shard])
        return found

    def index_of(self, shard: int) -> dict[str, np.ndarray]:
        """The arrays in the index of the shard that was read last which only some kinds of samples have."""
        return self._open[shard].optional

    def read(self, shard: int, index: int) -> tuple[str, dict[str, bytes]]:
        """A sample's key, and the content of its fields in the tar's order.

        Raises SampleError for a missing or damaged shard or member, and UserError if a server or disk fails.
        """
        found = self._open.get(shard)
        if found is None:
            found = self._open_shard(shard)
        else:
            self._open.move_to_end(shard)
        try:
            return found.key(index), _read_fields(found, index)
        except OSError as error:
            raise UserError(
                f"cannot read {self.location(shard)} ({error.strerror or error}): fix this and run again"
            ) from error
        except _ChecksumError as error:
            where = f"{self.location(shard)} is damaged at sample {found.key(index)}, field {error}"
            raise SampleError("checksum", f"{where} (checksum differs): {RESTORE}") from error

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
        shard = OpenShard.of(*found, wanted=self._fields)
        if self._prefetcher is not None:
            self._prefetcher.opened(entry)
        self._open[number] = shard
        return shard


class _ChecksumError(Exception):
    """A field's checksum differs."""


def _read_fields(shard: OpenShard, index: int) -> dict[str, bytes]:
    """A sample's content by field; adjacent members are read with one system call.

    Raises OSError and _ChecksumError.
    """
    member, end = shard.first_member[index], shard.first_member[index + 1]
    if end - member == 1 and (field := shard.fields[shard.member_fields_M[member]]) is not None:
        content = os.pread(shard.file, shard.sizes_M[member], shard.offsets_M[member])
        if crc32(content) != shard.crc32s_M[member]:
            raise _ChecksumError(field)
        return {field: content}
    sample = {}
    data, data_start, data_end = b"", 0, -1
    while member < end:
        field = shard.fields[shard.member_fields_M[member]]
        if field is not None:
            start = shard.offsets_M[member]
            stop = start + shard.sizes_M[member]
            if stop > data_end:
                data_start, data_end = start, stop if member + 1 == end else _end_of_run(shard, member, end)
                data = os.pread(shard.file, data_end - start, start)
            content = data[start - data_start : stop - data_start]
            if crc32(content) != shard.crc32s_M[member]:
                raise _ChecksumError(field)
            sample[field] = content
        member += 1
    return sample


def _end_of_run(shard: OpenShard, member: int, end: int) -> int:
    """Where the last of the members ends that are read with this one; `end` is the first member of the next sample."""
    run_start = shard.offsets_M[member]
    run_end = run_start + shard.sizes_M[member]
    for other in range(member + 1, end):
        if shard.fields[shard.member_fields_M[other]] is not None:
            start = shard.offsets_M[other]
            stop = start + shard.sizes_M[other]
            if start - run_end > NEAR_BYTES or stop - run_start > TOGETHER_BYTES:
                break
            run_end = stop
    return run_end


def open_cached(cache: ShardCache, folder: str, entry: ShardEntry) -> tuple[ShardIndex, int]:
    """As `open_local`, but through the cache if the folder is behind a URL. Raises what the cache does too."""
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
    """A shard's index, and its tar open for reading, both as the manifest says. Raises SampleError."""
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
    """The index and the open tar, if both are what the manifest lists. Else closes the tar and raises SampleError."""
    num_bytes = os.fstat(file).st_size
    if num_bytes != entry.bytes:
        problem = f"{location} has {num_bytes:,} bytes, its manifest says {entry.bytes:,}"
    elif len(index) != entry.samples:
        problem = f"the index of {location} lists {len(index):,} samples, its manifest {entry.samples:,}"
    elif (index.facts["sha256"], index.facts["fingerprint"]) != (entry.sha256, entry.fingerprint):
        problem = f"the index of {location} is of another shard than its manifest says"
    else:
        return index, file
    os.close(file)
    raise SampleError("shard damaged", f"{problem}: {RESTORE}")
