"""Pack images and captions into tar shards, with a vocabulary and a manifest.

    python sharding/make_shards.py                                   # COCO in data/coco, into data/shards
    python sharding/make_shards.py --images photos --captions captions.csv --split train --output shards
    python sharding/make_shards.py --dry-run                         # what it would do
    python sharding/make_shards.py --images s3://bucket/photos --captions captions.jsonl --split train \\
        --output s3://bucket/shards --engine ray                     # on a Ray cluster

Images are turned upright, made RGB, resized to --size and stored as JPEG with all their captions, one sample an
image. The shards' bytes depend on input and settings alone, not on workers or engine. Running it again completes what
is missing and reuses what is there; what was made differently is refused, never mixed. What cannot be packed is
counted by reason and listed in SPLIT.failures.jsonl. sharding/check_shards.py verifies and repairs the result.
Next: accelerate launch train/main.py

Exit codes: 0 done; 2 an error that you can fix, in one line; 3 packed, but with more failures than --max-failures.
"""

import sys
from collections.abc import Sequence

from captioner import cli
from captioner.files.ownership import AlreadyOwnedError, NotWritableError
from captioner.vocabulary import read_vocabulary
from sharding.packing.engine import prepare
from sharding.packing.pack_split import PackedSplit, make_recipe, pack_split
from sharding.packing.planning import plan_split
from sharding.packing.sources import find_sources
from sharding.packing.tables import failure_files, show_packed, show_plan
from sharding.settings import ShardSettings

EXIT_TOO_MANY_FAILURES = 3
GIVE_VOCABULARY = "give --vocabulary a vocabulary.json that the packing of a training split made"
REMEDIES: cli.Remedies = {
    AlreadyOwnedError: "wait for it, stop it, or give another --output",
    NotWritableError: "give another --output",
}


def main(settings: ShardSettings) -> None:
    """Pack every wanted split, training first, since the others need its vocabulary."""
    vocabulary = read_vocabulary(settings.vocabulary, remedy=GIVE_VOCABULARY) if settings.vocabulary else None
    sources = find_sources(images=settings.images, captions=settings.captions, split=settings.split)
    if settings.dry_run:
        recipe = make_recipe(settings)
        show_plan([(source.split, *plan_split(source, recipe)) for source in sources], settings.output)
        return
    if settings.engine == "local" and settings.workers != 1:
        prepare()
    packed = [pack_split(source, settings, vocabulary=vocabulary) for source in sources]
    show_packed(packed, settings.output)
    leave_if_too_many_failed(packed, settings)


def leave_if_too_many_failed(packed: Sequence[PackedSplit], settings: ShardSettings) -> None:
    """Leave with an exit code when more failed than the user allows."""
    num_failures = sum(sum(split.manifest.failures.values()) for split in packed)
    total = num_failures + sum(split.manifest.num_samples for split in packed)
    limit = settings.max_failures
    if limit is not None and num_failures > (limit * total if limit < 1 else limit):
        print(
            f"error: {num_failures:,} of {total:,} could not be packed, more than --max-failures {limit:g}: see "
            f"{failure_files(packed, settings.output)}",
            file=sys.stderr,
        )
        sys.exit(EXIT_TOO_MANY_FAILURES)


def run() -> None:
    """The console entry."""
    cli.run(main, ShardSettings, description=__doc__ or "", remedies=REMEDIES)


if __name__ == "__main__":
    run()
