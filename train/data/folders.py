"""Captioned images in one or several dataset folders: their splits, vocabulary and size. Imports no torch."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from captioner.errors import UserError
from captioner.files import storage
from captioner.images.views import ViewSpec
from captioner.shards.format import PACK_FIRST, manifest_location
from captioner.streaming.dataset import Split, check_filled, read_split
from captioner.vocabulary import Vocabulary, read_vocabulary


@dataclass(frozen=True, kw_only=True)
class CaptionData:
    """The splits and the vocabulary of dataset folders; `val` is None where no folder has one, or where it is empty."""

    train: Split
    val: Split | None
    vocabulary: Vocabulary

    @property
    def splits(self) -> list[Split]:
        """The splits that are there."""
        return [self.train, self.val] if self.val else [self.train]


def read_data(folders: Sequence[str]) -> CaptionData:
    """The train and val splits of all folders, and their vocabulary. Raises UserError."""
    return CaptionData(
        train=read_split(folders, "train", remedy=PACK_FIRST),
        val=read_validation(folders),
        vocabulary=read_merged_vocabulary(folders),
    )


def read_filled_split(folders: Sequence[str], name: str) -> Split:
    """A split of all folders. Raises UserError where one does not hold it, and where it has no samples."""
    split = read_split(folders, name, remedy=PACK_FIRST)
    check_filled(split)
    return split


def read_validation(folders: Sequence[str]) -> Split | None:
    """The val split of those folders that hold one; None where none does, or where it is empty."""
    found = [folder for folder in folders if storage.exists(manifest_location(folder, "val"))]
    split = read_split(found, "val", remedy=PACK_FIRST) if found else None
    return split if split and split.num_samples else None


def read_merged_vocabulary(folders: Sequence[str]) -> Vocabulary:
    """The folders' vocabulary; of several, the words of all, their counts added up."""
    found = [read_vocabulary(storage.join(folder, "vocabulary.json"), remedy=PACK_FIRST) for folder in folders]
    if all(vocabulary.fingerprint == found[0].fingerprint for vocabulary in found):
        return found[0]
    counts: Counter[str] = Counter()
    for vocabulary in found:
        counts.update(dict(zip(vocabulary.words, vocabulary.counts, strict=True)))
    return Vocabulary.from_counts(counts, threshold=min(vocabulary.threshold for vocabulary in found))


def read_view(splits: Sequence[Split], *, crop: int) -> ViewSpec:
    """How the splits' images were resized, with a crop; those stored in their own size are squashed when they are read.

    Raises UserError where images were resized in different ways.
    """
    views = []
    for split in splits:
        for folder, manifest in zip(split.folders, split.manifests, strict=True):
            if "size" not in manifest.settings:
                raise UserError(
                    f"the {split.name} split in {folder} was indexed as samples of any kind: index it as captioned "
                    "images with sharding/check_shards.py index"
                )
            size, resize = manifest.settings["size"], manifest.settings["resize"]
            view = ViewSpec(size=size, resize="squash" if resize == "none" else resize, crop=crop)
            views.append((view, f"the {split.name} images in {folder}"))
    first, where = views[0]
    for view, other in views:
        if view != first:
            raise UserError(
                f"{where} have size {first.size} ({first.resize}), {other} {view.size} ({view.resize}): pack all with "
                "the same --size and --resize"
            )
    return first


def check_batch_size(batch_size: int, *, world_size: int, accumulation_steps: int = 1) -> None:
    """Raise UserError for a global batch that cannot be divided evenly."""
    if batch_size % (world_size * accumulation_steps):
        micro_batches = f" times --accumulation-steps {accumulation_steps}" if accumulation_steps > 1 else ""
        raise UserError(
            f"--batch-size {batch_size} is the global batch and must be a multiple of the {world_size} "
            f"processes{micro_batches}"
        )


def check_fits(model_view: ViewSpec, shards_view: ViewSpec) -> None:
    """Raise UserError where the shards' images were not resized as those that a trained model has seen."""
    if (shards_view.size, shards_view.resize) != (model_view.size, model_view.resize):
        raise UserError(
            f"the shards hold images of size {shards_view.size} ({shards_view.resize}), and the trained model sees "
            f"size {model_view.size} ({model_view.resize}): pack them with sharding/make_shards.py --size "
            f"{model_view.size} --resize {model_view.resize}"
        )
