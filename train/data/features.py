"""Features of a frozen encoder, kept beside the shards: each image is encoded once, and never decoded again.

For each shard one file `features-ENCODER/train-000000.features` in its dataset folder (in the shard cache, under the
shard's sha256, for folders behind URLs): a safetensors file of `features` (S, F) float32, `crc32s` (S) of the rows, and
`usable` (S), 0 where an image could not be read. It names the shard's sha256 and the fingerprint of encoder and view;
others are refused.

Shapes: S samples of a shard, F features of an image.
"""

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from captioner.errors import UserError
from captioner.files import storage
from captioner.shards.format import ShardEntry
from captioner.streaming.dataset import Split
from captioner.streaming.reader import SampleError

FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class FeatureFiles:
    """The feature files of a split, one for each shard, in order; `fingerprint` is that of encoder and view."""

    paths: tuple[Path, ...]
    shards: tuple[ShardEntry, ...]
    fingerprint: str
    num_features: int

    @classmethod
    def of(cls, split: Split, *, encoder: str, num_features: int, fingerprint: str, cache: Path) -> "FeatureFiles":
        """The feature files of a split, whether they exist or not."""
        name = f"features-{encoder}"
        paths = tuple(
            cache / "features" / name / f"{entry.sha256}.features"  # one shard may have several addresses
            if storage.is_remote(folder)
            else Path(folder) / name / f"{entry.name}.features"
            for folder, entry in split.shards
        )
        return cls(paths, tuple(entry for _, entry in split.shards), fingerprint, num_features)

    def missing(self) -> list[int]:
        """The numbers of shards without a file. Raises UserError for a file of another encoder, view or shard."""
        numbers = [number for number, path in enumerate(self.paths) if not path.exists()]
        for number in set(range(len(self.paths))).difference(numbers):
            self.open(number)
        return numbers

    def metadata(self, number: int) -> dict[str, str]:
        """What a shard's file says about itself."""
        sha256 = self.shards[number].sha256
        return {"fingerprint": self.fingerprint, "shard": sha256, "format_version": str(FORMAT_VERSION)}

    def open(self, number: int) -> "FeatureFile":
        """A shard's file, mapped into memory. Raises UserError."""
        path = self.paths[number]
        remedy = f"delete {path.parent} to encode the images again, or leave out --cache-features"
        try:
            file = safe_open(path, "numpy")
            rows, metadata = file.get_slice("features"), file.metadata()
            opened = FeatureFile(path, rows, crc32s=file.get_tensor("crc32s"), usable=file.get_tensor("usable"))
        except OSError as error:
            raise UserError(f"cannot read {path} ({error}): {remedy}") from error
        except SafetensorError as error:
            raise UserError(f"{path} is not a whole feature file ({error}): {remedy}") from error
        if metadata != self.metadata(number):
            raise UserError(
                f"{path} holds features of another shard, or of another encoder, its weights, crop or precision: "
                f"{remedy}"
            )
        return opened


@dataclass(frozen=True, slots=True)
class FeatureFile:
    """An open feature file; its `rows` are read when they are indexed."""

    path: Path
    rows: Any
    crc32s: np.ndarray
    usable: np.ndarray

    def read_into(self, row_F: np.ndarray, index: int) -> None:
        """Read the features (F), float32, of the sample at `index` in the shard into `row_F`.

        Raises SampleError where they are damaged or unusable.
        """
        if not self.usable[index]:
            raise SampleError("no features", f"sample {index} of {self.path} was not readable when it was encoded")
        row_F[:] = self.rows[index]
        if zlib.crc32(row_F.data) != self.crc32s[index]:
            message = f"{self.path} is damaged at sample {index} (checksum differs): delete it, and it is made again"
            raise SampleError("checksum", message)
