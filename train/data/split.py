"""The splits of captioned pictures in one or several dataset folders, and their words. Imports no torch."""

from collections import Counter
from collections.abc import Sequence

from captioner.errors import UserError
from captioner.files import storage
from captioner.images.views import ViewSpec
from captioner.shards.format import manifest_location
from captioner.streaming.dataset import Split, read_split
from captioner.vocabulary import Vocabulary, read_vocabulary


def read_data(folders: Sequence[str], *, remedy: str) -> tuple[Split, Split | None, Vocabulary]:
    """The train and val splits of all folders, and their vocabulary. Raises UserError."""
    train, val = read_split(folders, "train", remedy=remedy), read_validation(folders, remedy=remedy)
    return train, val, read_merged_vocabulary(folders, remedy=remedy)


def read_validation(folders: Sequence[str], *, remedy: str) -> Split | None:
    """The val split of those folders that hold one; None where none does, or where it is empty."""
    found = [folder for folder in folders if storage.exists(manifest_location(folder, "val"))]
    split = read_split(found, "val", remedy=remedy) if found else None
    return split if split and split.num_samples else None


def read_merged_vocabulary(folders: Sequence[str], *, remedy: str) -> Vocabulary:
    """The folders' vocabulary; of several, the words of all, their counts added up."""
    found = [read_vocabulary(storage.join(folder, "vocabulary.json"), remedy=remedy) for folder in folders]
    if all(vocabulary.fingerprint == found[0].fingerprint for vocabulary in found):
        return found[0]
    counts: Counter[str] = Counter()
    for vocabulary in found:
        counts.update(dict(zip(vocabulary.words, vocabulary.counts, strict=True)))
    return Vocabulary.from_counts(counts, threshold=min(vocabulary.threshold for vocabulary in found))


def read_view(splits: Sequence[Split], *, crop: int) -> ViewSpec:
    """How the pictures came to their size, and a crop; those stored as they are are squashed on reading.

    Raises UserError where pictures came to their size in different ways.
    """
    first = None
    for split in splits:
        for folder, manifest in zip(split.folders, split.manifests, strict=True):
            if "size" not in manifest.settings:
                raise UserError(
                    f"the {split.name} split in {folder} was indexed as samples of any kind: index it as captioned "
                    "pictures with sharding/check_shards.py index"
                )
            size, resize = manifest.settings["size"], manifest.settings["resize"]
            view = ViewSpec(size=size, resize="squash" if resize == "none" else resize, crop=crop)
            first = first or (view, folder, split.name)
            if view != first[0]:
                raise UserError(
                    f"the {first[2]} pictures in {first[1]} have size {first[0].size} ({first[0].resize}), the "
                    f"{split.name} pictures in {folder} {size} ({view.resize}): pack all with the same --size and "
                    "--resize"
                )
    assert first is not None
    return first[0]


def check_fits(model_view: ViewSpec, shards_view: ViewSpec) -> None:
    """Raise UserError where the shards' pictures were not resized as a trained model is used to."""
    if (shards_view.size, shards_view.resize) != (model_view.size, model_view.resize):
        raise UserError(
            f"the shards hold pictures of size {shards_view.size} ({shards_view.resize}), and the trained model sees "
            f"size {model_view.size} ({model_view.resize}): pack them with sharding/make_shards.py --size "
            f"{model_view.size} --resize {model_view.resize}"
        )
