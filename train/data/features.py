"""Features of a frozen encoder, stored beside the shards: each image is decoded and encoded once.

Each shard has one file in its dataset folder (in the shard cache, named by the shard's sha256, for folders behind
URLs): `features-ENCODER/train-000000.features` with pooled features in float32, or `features-ENCODER-grid/...` with
grids in float16; `-mirrored` ends the folder's name for those of mirror images. A file is a safetensors file of
`features` (S, F) or (S, R, F), `crc32s` (S) of the rows, and `usable` (S), 0 where an image could not be read. Its
metadata name the shard's sha256 and the fingerprint of encoder and view; files of others are refused.

Shapes: S samples of a shard, F features of an image or of a position, R positions of a grid. A row is the features of
one image, (F) or (R, F).
"""

import json
import math
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import numpy as np
from filelock import lock_descriptor
from safetensors import SafetensorError, safe_open
from zlib_ng.zlib_ng import crc32

from captioner.errors import UserError
from captioner.files import storage
from captioner.files.locks import open_locked
from captioner.shards.format import ShardEntry
from captioner.streaming.dataset import Split
from captioner.streaming.reader import SampleError

FORMAT_VERSION = 1
FLOAT16_MAX = float(np.finfo(np.float16).max)


@dataclass(frozen=True, slots=True)
class FeatureFiles:
    """The feature files of a split, one for each shard, in order; `fingerprint` is that of encoder and view."""

    paths: tuple[Path, ...]
    shards: tuple[ShardEntry, ...]
    fingerprint: str
    row_shape: tuple[int, ...]

    @classmethod
    def of(
        cls,
        split: Split,
        *,
        encoder: str,
        row_shape: tuple[int, ...],
        fingerprint: str,
        cache: Path,
        mirrored: bool = False,
    ) -> "FeatureFiles":
        """The feature files of a split, whether they exist or not."""
        kind = ("-grid" if len(row_shape) == 2 else "") + ("-mirrored" if mirrored else "")
        name = f"features-{encoder.replace('/', '-')}{kind}"
        paths = tuple(
            cache / "features" / name / f"{entry.sha256}.features"  # one shard may have several addresses
            if storage.is_remote(folder)
            else Path(folder) / name / f"{entry.name}.features"
            for folder, entry in split.shards
        )
        return cls(paths, tuple(entry for _, entry in split.shards), fingerprint, row_shape)

    @property
    def dtype(self) -> np.dtype:
        """The type of the stored features: float16 for grids, float32 for pooled features."""
        return np.dtype(np.float16 if len(self.row_shape) == 2 else np.float32)

    def missing(self) -> list[int]:
        """The numbers of shards without a file. Raises UserError for a file of another encoder, view or shard."""
        numbers = [number for number, path in enumerate(self.paths) if not path.exists()]
        for number in set(range(len(self.paths))).difference(numbers):
            self.open(number).file.close()
        return numbers

    def describe(self, numbers: Sequence[int]) -> str:
        """Images, shape, type and size of the files of these shards, and their folders."""
        num_images = sum(self.shards[number].samples for number in numbers)
        num_bytes = num_images * math.prod(self.row_shape) * self.dtype.itemsize
        size = f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.1f} MB"
        shape = " x ".join(f"{length:,}" for length in self.row_shape)
        folders = ", ".join(sorted({str(self.paths[number].parent) for number in numbers}))
        return f"{num_images:,} images, features of {shape} in {self.dtype.name}: {size} in {folders}"

    def delete_partials(self) -> None:
        """Delete the partial files of killed runs; those that a process is writing are locked, and stay."""
        for folder in {path.parent for path in self.paths}:
            for partial in folder.glob("*.features.*.partial"):
                with suppress(OSError), open_locked(partial):
                    partial.unlink()

    def write(self, number: int, rows: Iterable[np.ndarray | None]) -> None:
        """Write a shard's file, row by row: the features (float32) of its samples in order, None for unusable ones.

        The file appears once it is whole. Raises UserError for features that are too large, and OSError.
        """
        path, entry = self.paths[number], self.shards[number]
        path.parent.mkdir(parents=True, exist_ok=True)
        unusable = np.zeros(self.row_shape, dtype=self.dtype)
        crc32s_S, usable_S = np.zeros(entry.samples, dtype=np.uint32), np.zeros(entry.samples, dtype=np.uint8)
        with storage.replacing(path) as file:
            with suppress(OSError):  # a file system without locks
                lock_descriptor(file.fileno(), blocking=False)
            file.write(self._header(number))
            for index, features in enumerate(rows):
                row = unusable if features is None else self._stored(features, where=f"sample {index} of {entry.name}")
                usable_S[index], crc32s_S[index] = features is not None, crc32(row.data)
                file.write(row.data)
            file.write(crc32s_S.tobytes() + usable_S.tobytes())

    def open(self, number: int) -> "FeatureFile":
        """A shard's file, open for reading. Raises UserError."""
        path = self.paths[number]
        remedy = f"delete {path.parent} to encode the images again, or leave out --cache-features"
        try:
            with safe_open(path, "numpy") as whole:  # checks that the header is whole and fits the file's size
                metadata, crc32s, usable = whole.metadata(), whole.get_tensor("crc32s"), whole.get_tensor("usable")
            file = FileIO(path)
            header_bytes = int.from_bytes(file.read(8), "little")
            features = json.loads(file.read(header_bytes))["features"]
        except OSError as error:
            raise UserError(f"cannot read {path} ({error}): {remedy}") from error
        except (SafetensorError, KeyError) as error:
            raise UserError(f"{path} is not a whole feature file ({error}): {remedy}") from error
        start, _ = features.pop("data_offsets")
        if metadata != self._metadata(number) or features != self._tensor(number):
            raise UserError(
                f"{path} holds features of another shard, or of another encoder, its weights, crop or precision: "
                f"{remedy}"
            )
        return FeatureFile(path, file, 8 + header_bytes + start, crc32s=crc32s, usable=usable)

    def _metadata(self, number: int) -> dict[str, str]:
        sha256 = self.shards[number].sha256
        return {"fingerprint": self.fingerprint, "shard": sha256, "format_version": str(FORMAT_VERSION)}

    def _tensor(self, number: int) -> dict[str, object]:
        """What a file's header says about `features`, without their offsets."""
        return {"dtype": f"F{8 * self.dtype.itemsize}", "shape": [self.shards[number].samples, *self.row_shape]}

    def _header(self, number: int) -> bytes:
        """The start of a safetensors file, before `features`, `crc32s` and `usable` in this order."""
        samples = self.shards[number].samples
        ends = np.cumsum([samples * math.prod(self.row_shape) * self.dtype.itemsize, 4 * samples, samples]).tolist()
        header = {
            "__metadata__": self._metadata(number),
            "features": {**self._tensor(number), "data_offsets": [0, ends[0]]},
            "crc32s": {"dtype": "U32", "shape": [samples], "data_offsets": ends[0:2]},
            "usable": {"dtype": "U8", "shape": [samples], "data_offsets": ends[1:3]},
        }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def _stored(self, features: np.ndarray, *, where: str) -> np.ndarray:
        """Features in the type of the files. Raises UserError if float16 cannot hold them."""
        if self.dtype == np.float16 and not (largest := np.abs(features).max()) <= FLOAT16_MAX:  # or NaN
            raise UserError(
                f"the features of {where} reach {largest:,.0f}, and their files hold at most {FLOAT16_MAX:,.0f} "
                "(float16): leave out --cache-features"
            )
        return features.astype(self.dtype, order="C", copy=False)


@dataclass(frozen=True, slots=True)
class FeatureFile:
    """An open feature file, whose rows begin at byte `start`."""

    path: Path
    file: FileIO
    start: int
    crc32s: np.ndarray
    usable: np.ndarray

    def read_into(self, row: np.ndarray, index: int) -> None:
        """Read the features of the sample at `index` in the shard into `row`, which has their shape and type.

        Raises SampleError where they are damaged or unusable, and UserError if the disk fails.
        """
        if not self.usable[index]:
            raise SampleError("no features", f"sample {index} of {self.path} was not readable when it was encoded")
        try:
            num_bytes = os.preadv(self.file.fileno(), [row.data], self.start + index * row.nbytes)
        except OSError as error:
            raise UserError(f"cannot read {self.path} ({error.strerror}): fix this and run again") from error
        if num_bytes != row.nbytes or crc32(row.data) != self.crc32s[index]:
            message = (
                f"{self.path} is damaged at sample {index} (checksum differs): delete it to encode its images again"
            )
            raise SampleError("checksum", message)
