"""Encoding all images of a split once, by all ranks together, into its feature files.

Shapes: S samples of a shard, F features of an image.
"""

import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from safetensors.numpy import save as save_arrays
from torch import nn

from captioner import cli
from captioner.errors import UserError
from captioner.files import storage
from captioner.images.views import ViewSpec
from captioner.streaming import StreamingLoader
from captioner.streaming.dataset import Split
from train.barriers import barrier_for_slow_ranks, raising_on_all_ranks
from train.data.features import FeatureFiles
from train.step.step import CaptionLoss, encode_split, hash_weights


def encoder_fingerprint(encoder: nn.Module, view: ViewSpec, *, precision: str = "no") -> str:
    """Hex sha256 of the encoder's weights, its view of images, and Accelerate's mixed precision."""
    return hash_weights(encoder, json.dumps([asdict(view), precision]).encode())


def prepare_features(
    splits: Sequence[Split],
    *,
    loss_model: CaptionLoss,
    open_loader: Callable[..., StreamingLoader],
    cache: str,
    accelerator: Accelerator,
) -> dict[str, FeatureFiles]:
    """The feature files of splits, by the splits' names; the ranks together make those that are missing.

    `open_loader` opens a loader of a split's samples with centre crops; features of folders behind URLs go to `cache`.
    Each file is written whole or not at all, so that a killed run continues. Raises UserError for files of another
    encoder, view or shard, and where they cannot be written.
    """
    if not splits:
        return {}
    encoder = loss_model.model.encoder
    with raising_on_all_ranks():  # all have looked before the first writes
        fingerprint = encoder_fingerprint(encoder, loss_model.view, precision=accelerator.mixed_precision)
        found = {
            split.name: FeatureFiles.of(
                split,
                encoder=loss_model.model.config.encoder,
                num_features=encoder.num_features,
                fingerprint=fingerprint,
                cache=Path(cache).expanduser(),
            )
            for split in splits
        }
        missing = {name: files.missing() for name, files in found.items()}
    for split in splits:
        files, numbers = found[split.name], missing[split.name]
        own = numbers[accelerator.process_index :: accelerator.num_processes]
        # One rank may be hours faster than another; where one fails, the others keep their files.
        with barrier_for_slow_ranks():
            try:
                if own:
                    _encode_shards(
                        files, split, own, loss_model=loss_model, open_loader=open_loader, accelerator=accelerator
                    )
            except OSError as error:
                raise UserError(
                    f"cannot keep features beside the shards ({error}): fix this and rerun, or leave out "
                    "--cache-features"
                ) from error
        absent = [str(files.paths[number]) for number in numbers if not files.paths[number].exists()]
        if absent:
            raise UserError(f"{absent[0]} was written by another machine: keep the shards where all machines see them")
    return found


def _encode_shards(
    files: FeatureFiles,
    split: Split,
    own: Sequence[int],
    *,
    loss_model: CaptionLoss,
    open_loader: Callable[..., StreamingLoader],
    accelerator: Accelerator,
) -> None:
    """Make the files of `own` shards, in this process alone."""
    own_split = split.only(own)
    rows = encode_split(
        own_split, loss_model=loss_model, open_loader=open_loader, accelerator=accelerator, rank=0, world_size=1
    )
    total, quiet = own_split.num_samples, not accelerator.is_main_process
    with cli.progress_bar(f"encoding {split.name}", total=total, unit="images", quiet=quiet) as bar:
        _write_files(files, own, rows, bar)


def _write_files(files: FeatureFiles, own: Sequence[int], rows: Iterator[tuple[int, np.ndarray]], bar: cli.Bar) -> None:
    """Write one file after the other from rows (position in `own`'s samples, features); absent samples are unusable."""
    position, first = next(rows, (-1, np.empty(0)))
    start = 0
    for number in own:
        entry = files.shards[number]
        features_SF = np.zeros((entry.samples, files.num_features), dtype=np.float32)
        usable_S = np.zeros(entry.samples, dtype=np.uint8)
        while start <= position < start + entry.samples:
            features_SF[position - start], usable_S[position - start] = first, 1
            bar.advance()
            position, first = next(rows, (-1, first))
        start += entry.samples
        crc32s_S = np.array([zlib.crc32(row.data) for row in features_SF], dtype=np.uint32)
        arrays = {"features": features_SF, "crc32s": crc32s_S, "usable": usable_S}
        files.paths[number].parent.mkdir(parents=True, exist_ok=True)
        storage.write_atomic(str(files.paths[number]), save_arrays(arrays, metadata=files.metadata(number)))
