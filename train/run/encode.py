"""Encoding all images of a split once, by all ranks together, into its feature files."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice, repeat
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from torch import nn

from captioner import cli
from captioner.errors import UserError
from captioner.images.views import ViewSpec
from captioner.model.encoders import Encoder
from captioner.streaming import StreamingLoader
from captioner.streaming.dataset import Split
from train.barriers import barrier_for_slow_ranks, raising_on_all_ranks
from train.data.features import FeatureFiles
from train.step.step import CaptionLoss, encode_split, hash_weights


def encoder_fingerprint(encoder: nn.Module, view: ViewSpec, *, precision: str = "no", mirrored: bool = False) -> str:
    """Hex sha256 of the encoder's weights, its view of images (mirrored or not), and Accelerate's mixed precision."""
    return hash_weights(encoder, json.dumps([asdict(view), precision, *(["mirrored"] if mirrored else [])]).encode())


def row_shape(encoder: Encoder, *, crop: int) -> tuple[int, ...]:
    """The shape of an image's features: (F), or (R, F) of a grid."""
    return (math.prod(encoder.grid_shape(crop)), encoder.num_features) if encoder.grid else (encoder.num_features,)


def prepare_features(
    splits: Sequence[Split],
    *,
    loss_model: CaptionLoss,
    open_loader: Callable[..., StreamingLoader],
    cache: str,
    accelerator: Accelerator,
    mirrored: bool = False,
) -> dict[str, FeatureFiles]:
    """The feature files of splits, by the splits' names; the ranks together make those that are missing.

    With `mirrored` they are those of the mirror images. `open_loader` opens a loader of a split's samples with centre
    crops; features of folders behind URLs go to `cache`. Each file is written whole or not at all, so that a killed run
    continues. Raises UserError for files of another encoder, view or shard, and where they cannot be written.
    """
    if not splits:
        return {}
    encoder = loss_model.model.encoder
    with raising_on_all_ranks():  # all have looked before the first writes
        fingerprint = encoder_fingerprint(
            encoder, loss_model.view, precision=accelerator.mixed_precision, mirrored=mirrored
        )
        found = {
            split.name: FeatureFiles.of(
                split,
                encoder=loss_model.model.config.encoder,
                row_shape=row_shape(encoder, crop=loss_model.view.crop),
                fingerprint=fingerprint,
                cache=Path(cache).expanduser(),
                mirrored=mirrored,
            )
            for split in splits
        }
        missing = {name: files.missing() for name, files in found.items()}
        if accelerator.is_main_process:
            for files in found.values():
                files.delete_partials()
    for name, numbers in missing.items():
        if numbers:
            accelerator.print(f"encoding {name}{', mirrored' if mirrored else ''}: {found[name].describe(numbers)}")
    for split in splits:
        files, numbers = found[split.name], missing[split.name]
        own = numbers[accelerator.process_index :: accelerator.num_processes]
        # One rank may be hours faster than another; where one fails, the others keep their files.
        with barrier_for_slow_ranks():
            try:
                if own:
                    own_split = split.only(own)
                    rows = encode_split(
                        own_split,
                        loss_model=loss_model,
                        open_loader=open_loader,
                        accelerator=accelerator,
                        rank=0,
                        world_size=1,
                        mirrored=mirrored,
                    )
                    _write_shards(files, own_split, own, rows, quiet=not accelerator.is_main_process)
            except OSError as error:
                raise UserError(
                    f"cannot keep features beside the shards ({error}): fix this and rerun, or leave out "
                    "--cache-features"
                ) from error
        absent = [str(files.paths[number]) for number in numbers if not files.paths[number].exists()]
        if absent:
            raise UserError(f"{absent[0]} was written by another machine: keep the shards where all machines see them")
    return found


def _write_shards(
    files: FeatureFiles, split: Split, numbers: Sequence[int], rows: Iterable[tuple[int, np.ndarray]], *, quiet: bool
) -> None:
    """Write the feature files of a split whose shards have these numbers, from (position, row) of usable samples."""
    with cli.progress_bar(f"encoding {split.name}", total=split.num_samples, unit="images", quiet=quiet) as bar:
        all_rows = _rows_of_all(rows, split.num_samples, bar)
        for number in numbers:
            files.write(number, islice(all_rows, files.shards[number].samples))


def _rows_of_all(rows: Iterable[tuple[int, np.ndarray]], num_samples: int, bar: cli.Bar) -> Iterator[np.ndarray | None]:
    """Yield the rows of all positions in order, from (position, row) of those that there are; None for the others."""
    position = 0
    for found, row in rows:
        yield from repeat(None, found - position)
        yield row
        bar.advance()
        position = found + 1
    yield from repeat(None, num_samples - position)
