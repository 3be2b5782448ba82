"""Features of a frozen encoder, kept beside the shards: each picture is encoded once, and never decoded again.

For each shard one file `features-ENCODER/train-000000.features` in its dataset folder (in the shard cache, under the
shard's sha256, for folders behind URLs): a safetensors file of `features` (S, F) float32, `crc32s` (S) of the rows, and
`usable` (S), 0 where a picture could not be read. It names the shard's sha256 and the fingerprint of encoder and view;
others are refused.

Shapes: S samples of a shard, F features of a picture, B images of a batch.
"""

import json
import os
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from captioner.errors import UserError
from captioner.files import storage
from captioner.shards.format import ShardEntry
from captioner.streaming.dataset import Split
from captioner.streaming.reader import SampleError

FORMAT_VERSION = 1
ROW_DTYPE = np.dtype(np.float32)
MAX_OPEN = 400  # files of a process, beside as many shards; systems allow 1,024


@dataclass(frozen=True, slots=True)
class FeatureFiles:
    """The feature files of a split, one for each shard, in order; `fingerprint` is of what they must be made with."""

    paths: tuple[Path, ...]
    shards: tuple[ShardEntry, ...]
    fingerprint: str
    num_features: int

    @classmethod
    def of(cls, split: Split, *, encoder: str, num_features: int, fingerprint: str, cache: Path) -> "FeatureFiles":
        """Where a split's features belong."""
        name = f"features-{encoder}"
        paths = tuple(
            cache / "features" / name / f"{entry.sha256}.features"  # one shard may have several addresses
            if storage.is_remote(folder)
            else Path(folder) / name / f"{entry.name}.features"
            for folder, entry in split.shards
        )
        return cls(paths, tuple(entry for _, entry in split.shards), fingerprint, num_features)

    def missing(self) -> list[int]:
        """The numbers of shards without a file. Raises UserError for a file that is of something else."""
        numbers = [number for number, path in enumerate(self.paths) if not path.exists()]
        for number in set(range(len(self.paths))).difference(numbers):
            os.close(self.open(number).file)
        return numbers

    def open(self, number: int) -> "OpenFeatures":
        """A shard's file, open for reading. Raises UserError."""
        path, entry = self.paths[number], self.shards[number]
        remedy = f"delete {path.parent} to have them made again, or leave out --cache-features"
        try:
            file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"cannot read {path} ({error.strerror}): {remedy}") from error
        try:
            found = OpenFeatures.read(file, num_samples=entry.samples, num_features=self.num_features)
            wanted = {"fingerprint": self.fingerprint, "shard": entry.sha256, "format_version": str(FORMAT_VERSION)}
            differing = [name for name in wanted if found.facts.get(name) != wanted[name]]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            os.close(file)
            raise UserError(f"{path} is not a whole feature file ({error!r}): {remedy}") from error
        if differing:
            os.close(file)
            what = {"fingerprint": "another encoder, its weights, crop or precision", "shard": "another shard"}
            raise UserError(f"{path} holds features of {what.get(differing[0], 'another version')}: {remedy}")
        return found


@dataclass(frozen=True, slots=True)
class OpenFeatures:
    """A feature file that is open for reading; `start` is the byte where the rows begin."""

    file: int
    start: int
    crc32s: np.ndarray
    usable: np.ndarray
    facts: dict[str, str]

    @classmethod
    def read(cls, file: int, *, num_samples: int, num_features: int) -> "OpenFeatures":
        """Read the head of a safetensors file and its two small arrays. Raises ValueError, KeyError or TypeError."""
        head_bytes = int.from_bytes(os.pread(file, 8, 0), "little")
        head = json.loads(os.pread(file, min(head_bytes, 1 << 20), 8))
        shape, rows = [num_samples, num_features], head["features"]
        if rows["shape"] != shape or rows["dtype"] != "F32":
            raise ValueError(f"{rows['dtype']} {rows['shape']} instead of F32 {shape}")
        start = 8 + head_bytes
        arrays = []
        for name, dtype in (("crc32s", np.uint32), ("usable", np.uint8)):
            begin, end = head[name]["data_offsets"]
            arrays.append(np.frombuffer(os.pread(file, end - begin, start + begin), dtype=dtype))
        if any(len(array) != num_samples for array in arrays) or os.fstat(file).st_size != start + max(
            head[name]["data_offsets"][1] for name in ("features", "crc32s", "usable")
        ):
            raise ValueError("it is cut")
        return cls(file, start + rows["data_offsets"][0], arrays[0], arrays[1], head["__metadata__"])


class FeatureReader:
    """Reads single rows out of a split's feature files, each checked; the last `max_open` files are kept open."""

    def __init__(self, files: FeatureFiles, *, max_open: int = MAX_OPEN) -> None:
        self._files = files
        self._max_open = max_open
        self._open: OrderedDict[int, OpenFeatures] = OrderedDict()

    def close(self) -> None:
        """Close all files."""
        while self._open:
            os.close(self._open.popitem()[1].file)

    def read_into(self, row_F: np.ndarray, shard: int, place: int) -> None:
        """A sample's features (F), float32, into `row_F`. Raises SampleError where they are damaged or unusable."""
        found = self._open.get(shard)
        if found is None:
            while len(self._open) >= self._max_open:
                os.close(self._open.popitem(last=False)[1].file)
            found = self._open[shard] = self._files.open(shard)
        self._open.move_to_end(shard)
        path = self._files.paths[shard]
        if not found.usable[place]:
            raise SampleError("no features", f"sample {place} of {path} was not readable when it was encoded")
        try:
            num_bytes = os.preadv(found.file, [row_F.data], found.start + place * row_F.nbytes)
        except OSError as error:
            raise UserError(f"cannot read {path} ({error.strerror or error}): fix that") from error
        if num_bytes != row_F.nbytes or zlib.crc32(row_F.data) != found.crc32s[place]:
            message = f"{path} is damaged at sample {place} (checksum differs): delete it to have it made again"
            raise SampleError("checksum", message)
