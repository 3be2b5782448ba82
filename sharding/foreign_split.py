"""Index files, vocabulary and manifest for a folder of tars that somebody else wrote."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from captioner import cli
from captioner.errors import UserError
from captioner.files import storage
from captioner.shards.format import SPLITS, FormatError, Manifest, ShardIndex, manifest_location, read_manifest
from captioner.shards.tar_walk import open_tar
from captioner.workers import count_processors
from sharding.claim import claim
from sharding.finish import failure_text, write_manifest, write_vocabulary
from sharding.foreign import BACKEND, foreign_recipe, index_scan, is_foreign, scan_tar
from sharding.pack import packed_shard, write
from sharding.verify import MAX_THREADS, list_names

COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
COMPRESSED_ENDINGS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
UNPACK = "samples are read out of the middle of a tar, so unpack it to a plain one first (gunzip, unxz, unzstd)"


def index_split(folder: str, *, split: str, pattern: str | None, threshold: int | None, size: int) -> Manifest:
    """Index the split's tars and write, last of all, its manifest. Raises UserError."""
    names, pattern = _find_tars(folder, split, pattern)
    with claim(folder, split):
        _refuse_others(folder, split, names)
        indexes = _index_tars(folder, split, names, size=size)
        if not any(len(index) for index in indexes.values()):
            reasons = Counter(failure["reason"] for index in indexes.values() for failure in index.facts["failures"])
            raise UserError(
                f"no sample in the {len(names):,} tars that fit {pattern} in {folder} can be used "
                f"({failure_text(reasons)}): a sample is a picture KEY.jpg beside its captions KEY.json or KEY.txt"
            )
        for name, index in indexes.items():
            write(storage.join(folder, f"{name}.index"), index.to_bytes())
        shards = [packed_shard(name, index, reused=False) for name, index in indexes.items()]
        if split == "train" or not storage.exists(storage.join(folder, "vocabulary.json")):
            write_vocabulary(folder, shards, threshold=threshold)
        source = {"split": split, "pattern": pattern}
        manifest = write_manifest(folder, split, shards, recipe=foreign_recipe(size), source=source)
    _tell(folder, manifest)
    return manifest


# ---- which tars -------------------------------------------------------------------------------------------


def _find_tars(folder: str, split: str, pattern: str | None) -> tuple[list[str], str]:
    """Names, without ending, of the tars to index, and the pattern that they fit. Raises UserError."""
    for tried in [pattern] if pattern else [f"{split}*.tar", "*.tar"]:
        names = list_names(folder, tried)
        if names:
            break
    else:
        packed = [name for ending in COMPRESSED_ENDINGS for name in list_names(folder, f"*{ending}")]
        if packed:
            raise UserError(f"{folder} holds compressed tars such as {packed[0]}: {UNPACK}")
        raise UserError(f"no file in {folder} fits {tried}: give --pattern, such as 'cc3m-train-*.tar'")
    for name in names:
        if name.endswith(COMPRESSED_ENDINGS):
            raise UserError(f"{storage.join(folder, name)} is compressed: {UNPACK}")
        if not name.endswith(".tar"):
            raise UserError(f"{storage.join(folder, name)} fits {tried} and is no .tar: give --pattern '*.tar'")
    return [name.removesuffix(".tar") for name in names], tried


def _refuse_others(folder: str, split: str, names: Sequence[str]) -> None:
    """Raise UserError for tars of another split, and for shards that make_shards.py made."""
    for other in SPLITS:
        if not storage.exists(manifest_location(folder, other)):
            continue
        try:
            manifest = read_manifest(folder, other, remedy="")
        except FormatError as error:
            raise UserError(
                f"split {other} in {folder} is of another version of this program: delete its manifest and .index "
                "files, and run the same command again"
            ) from error
        if other == split and not is_foreign(manifest):
            raise UserError(f"{folder} holds a {split} split of sharding/make_shards.py: it needs no indexing")
        both = {entry.name for entry in manifest.shards}.intersection(names)
        if other != split and both:
            raise UserError(
                f"{min(both)}.tar belongs to split {other} already: say with --pattern which are for {split}"
            )
    for name in names:
        location = storage.join(folder, f"{name}.index")
        backend = BACKEND
        with suppress(FileNotFoundError, UserError):
            backend = ShardIndex.from_bytes(storage.read_bytes(location), origin=location).facts.get("backend")
        if backend != BACKEND:
            raise UserError(f"{name}.tar was made by sharding/make_shards.py: run that again to complete the split")


# ---- what is in them --------------------------------------------------------------------------------------


def _index_tars(folder: str, split: str, names: Sequence[str], *, size: int) -> dict[str, ShardIndex]:
    """Each tar's index by name."""
    indexes: dict[str, ShardIndex] = {}
    num_samples = num_failures = 0
    threads = ThreadPoolExecutor(min(MAX_THREADS, count_processors()))
    with cli.progress_bar(f"indexing {split}", total=len(names), unit="tars") as bar:
        try:
            for name, index in threads.map(lambda name: (name, _index_tar(folder, name, size=size)), names):
                indexes[name] = index
                num_samples += len(index)
                num_failures += len(index.facts["failures"])
                bar.advance(note=f"{num_samples:,} samples, {num_failures:,} left out")
        finally:
            threads.shutdown(cancel_futures=True)
    return indexes


def _index_tar(folder: str, name: str, *, size: int) -> ShardIndex:
    location = storage.join(folder, f"{name}.tar")
    try:
        with open_tar(location) as data:
            for magic, kind in COMPRESSED.items():
                if data[: len(magic)] == magic:
                    raise UserError(f"{location} is compressed ({kind}): {UNPACK}")
            scan = scan_tar(data, name=name)
            digest = hashlib.sha256(data).hexdigest()
            return index_scan(scan, num_bytes=len(data), sha256=digest, recipe=foreign_recipe(size))
    except OSError as error:
        raise UserError(f"cannot read {location} ({error.strerror or error}): mend that and run again") from error


def _tell(folder: str, manifest: Manifest) -> None:
    num_captions, num_bytes = (sum(getattr(s, name) for s in manifest.shards) for name in ("captions", "bytes"))
    row = (
        manifest.split,
        manifest.num_samples,
        num_captions,
        len(manifest.shards),
        num_bytes / 1e6,
        failure_text(manifest.failures),
    )
    cli.print_table(folder, ("split", "samples", "captions", "shards", "MB", "left out"), [row])
    if manifest.failures:
        cli.console.print(f"what was left out is listed in {storage.join(folder, manifest.split)}.failures.jsonl")
