"""Prints what a dataset folder holds, and one of its samples. Nothing is checked here."""

import io
from collections import Counter

from PIL import Image
from rich.markup import escape

from captioner import cli
from captioner.errors import UserError
from captioner.files import storage
from captioner.samples import read_content, split_pair
from captioner.shards.format import PACK_FIRST, Manifest, ShardIndex, complete_splits, read_manifest
from captioner.shards.indexing import is_any, is_foreign
from captioner.vocabulary import read_vocabulary
from sharding.packing.sources import failure_text

NUM_WORDS = 20
SHOWN_BYTES = 500


def show_dataset(folder: str, *, split: str | None, key: str | None) -> None:
    """Print the splits, the vocabulary and the sample with this key, or the first. Raises UserError."""
    there = [split] if split else complete_splits(folder)
    if not there:
        raise UserError(f"there is no manifest of a whole split in {folder}: {PACK_FIRST}")
    manifests = [read_manifest(folder, name, remedy=PACK_FIRST) for name in there]
    _show_splits(folder, manifests)
    if not all(map(is_any, manifests)):
        _show_vocabulary(folder)
    _show_sample(folder, manifests, key)


def plain(text: object) -> str:
    """Text of any origin for printing: without markup, and with control characters escaped."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    return escape(shown.encode(errors="backslashreplace").decode())


def _show_splits(folder: str, manifests: list[Manifest]) -> None:
    rows = []
    for manifest in manifests:
        made = ", ".join(f"{plain(name)} {plain(value)}" for name, value in manifest.settings.items())
        rows.append(
            (
                manifest.split,
                len(manifest.shards),
                manifest.num_samples,
                sum(shard.captions for shard in manifest.shards),
                sum(shard.bytes for shard in manifest.shards) / 1e6,
                "squashed on reading: " + made if is_foreign(manifest) and not is_any(manifest) else made,
                ", ".join(
                    f"{plain(name)} {plain(value)}" for name, value in manifest.source.items() if name != "split"
                ),
                plain(failure_text(manifest.failures)),
            )
        )
    header = ("split", "shards", "samples", "captions", "MB", "how", "from", "left out")
    cli.print_table(plain(folder), header, rows)


def _show_vocabulary(folder: str) -> None:
    vocabulary = read_vocabulary(storage.join(folder, "vocabulary.json"), remedy=PACK_FIRST)
    counts = Counter(dict(zip(vocabulary.words[4:], vocabulary.counts[4:], strict=False)))
    frequent = ", ".join(f"{plain(word)} {count:,}" for word, count in counts.most_common(NUM_WORDS))
    cli.console.print(f"{len(vocabulary):,} words seen at least {vocabulary.threshold:,} times, 4 of them special")
    cli.console.print(f"the most frequent: {frequent}\n")


def _show_sample(folder: str, manifests: list[Manifest], key: str | None) -> None:
    manifest, shard, index, position = _find_sample(folder, manifests, key)
    location, data = _read(folder, f"{shard}.tar")
    fields = {name: data[m.offset : m.offset + m.size] for name, m in index.members(position).items()}
    rows: list[tuple[str, object]] = [("key", index.key(position)), ("shard", f"{shard}, sample {position:,}")]
    try:
        rows += _fields(fields) if is_any(manifest) else _captioned(fields, key=index.key(position))
    except (ValueError, OSError) as error:
        raise UserError(
            f"sample {index.key(position)} in {location} cannot be read ({error}): check_shards.py verify says more"
        ) from error
    cli.print_table("one sample", ("field", "value"), [(plain(name), plain(value)) for name, value in rows])


def _fields(fields: dict[str, bytes]) -> list[tuple[str, object]]:
    """A row for each field: short text as it is, the size of everything else."""
    rows: list[tuple[str, object]] = []
    for name, content in fields.items():
        text = content.decode(errors="replace") if len(content) <= SHOWN_BYTES else ""
        shown = text if text.isprintable() and "\ufffd" not in text else ""
        rows.append((f".{name}", shown or f"{len(content):,} bytes"))
    return rows


def _captioned(fields: dict[str, bytes], *, key: str) -> list[tuple[str, object]]:
    """The rows of a captioned image. Raises ValueError and OSError."""
    encoded, captions = split_pair(fields)
    content = read_content(captions, key=key)
    with Image.open(io.BytesIO(encoded)) as image:
        stored = f"{image.width}x{image.height} pixels, {image.format}, {len(encoded):,} bytes"
    rows = [("stored", stored), *((name, value) for name, value in content.items() if not isinstance(value, list))]
    for caption, tokens in zip(content["captions"], content["tokens"], strict=True):
        rows += [("caption", caption), ("tokens", " | ".join(tokens))]
    return rows


def _find_sample(folder: str, manifests: list[Manifest], key: str | None) -> tuple[Manifest, str, ShardIndex, int]:
    """The manifest, the shard's name and index, and the sample's position in the shard. Raises UserError."""
    for manifest in manifests:
        for entry in manifest.shards:
            location, data = _read(folder, f"{entry.name}.index")
            index = ShardIndex.from_bytes(data, origin=location)
            for position in range(len(index)):
                if key in (None, index.key(position)):
                    return manifest, entry.name, index, position
    raise UserError(f"{folder} holds no sample {f'with key {key}' if key else 'at all'}: see the table above")


def _read(folder: str, name: str) -> tuple[str, bytes]:
    """A file's location and content. Raises UserError."""
    location = storage.join(folder, name)
    try:
        return location, storage.read_bytes(location)
    except OSError as error:
        raise UserError(f"cannot read {location} ({error}): run check_shards.py repair") from error
