"""Indexes, manifest and, of captioned images, a vocabulary for a folder of tars that another program wrote."""

import multiprocessing
import time
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial

from captioner import cli
from captioner.files import storage
from captioner.shards.format import Manifest
from captioner.shards.indexing import ANY, NO_SAMPLE, find_tars, index_any, index_tars, refuse_others
from captioner.shards.writing import claim
from captioner.workers import count_processors
from sharding.checking.foreign import foreign_recipe, index_captioned
from sharding.checking.verify import MAX_THREADS
from sharding.packing.finish import write_manifest, write_vocabulary
from sharding.packing.pack import PackedShard, packed_shard
from sharding.packing.pack_split import PackedSplit
from sharding.packing.tables import show_packed
from sharding.settings import Samples

PATTERN = "give --pattern, such as 'cc3m-train-*.tar'"
PAIR = (
    "a sample is an image KEY.jpg beside its captions KEY.json or KEY.txt; give --samples any if these are "
    "not images with captions"
)


def index_split(
    folder: str, *, split: str, samples: Samples, pattern: str | None, threshold: int | None, size: int
) -> Manifest:
    """Index the split's tars and write, last of all, its manifest. Raises UserError."""
    names, pattern = find_tars(folder, split, pattern, remedy=PATTERN)
    captioned = samples == "captioned-images"
    recipe = foreign_recipe(size) if captioned else {"samples": ANY}
    work = partial(index_captioned if captioned else index_any, recipe=recipe)
    shards: list[PackedShard] = []
    num_samples = num_failures = 0
    started = time.monotonic()
    with claim(folder, split), cli.progress_bar(f"indexing {split}", total=len(names), unit="tars") as bar:
        refuse_others(folder, split, names)
        with _executor(captioned=captioned, num_tars=len(names)) as executor:
            remedy = PAIR if captioned else NO_SAMPLE
            for name, index in index_tars(folder, split, names, work, executor=executor, remedy=remedy):
                shards.append(packed_shard(name, index, reused=False))
                num_samples += len(index)
                num_failures += len(index.failures)
                bar.advance(note=f"{num_samples:,} samples, {num_failures:,} left out")
        if captioned and (split == "train" or not storage.exists(storage.join(folder, "vocabulary.json"))):
            write_vocabulary(folder, shards, threshold=threshold)
        source = {"split": split, "pattern": pattern}
        manifest = write_manifest(folder, split, shards, recipe=recipe, source=source)
    show_packed([PackedSplit(manifest=manifest, shards=shards, seconds=time.monotonic() - started)], folder)
    return manifest


def _executor(*, captioned: bool, num_tars: int) -> Executor:
    """Threads where images are decoded, outside Python; processes where Python reads small members."""
    workers = min(MAX_THREADS, count_processors(), num_tars)
    if captioned or workers == 1:
        return ThreadPoolExecutor(workers)
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
