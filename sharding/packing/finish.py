"""Writes the files beside a split's shards: the vocabulary, the list of failures and, last, the manifest."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from captioner import cli
from captioner.errors import UserError
from captioner.files import storage
from captioner.shards import writing
from captioner.shards.format import Failure, Manifest
from captioner.vocabulary import MIN_COVERAGE, SPECIAL_WORDS, THRESHOLD, Vocabulary, choose_threshold
from sharding.packing.pack import PackedShard


def write_vocabulary(
    folder: str, shards: Sequence[PackedShard], *, threshold: int | None, given: Vocabulary | None = None
) -> None:
    """Write vocabulary.json, the given one or that of the shards' captions, and print what it covers.

    Without a threshold `choose_threshold` decides. Raises UserError where no word reaches the threshold.
    """
    counts: Counter[str] = Counter()
    for shard in shards:
        counts.update(shard.words)
    vocabulary = given or Vocabulary.from_counts(counts, threshold=threshold or choose_threshold(counts))
    num_words = len(vocabulary) - len(SPECIAL_WORDS)
    if not num_words:
        most = max(counts.values(), default=0)
        raise UserError(
            f"no word occurs {vocabulary.threshold} times in the captions, the most frequent one {most} times: give a "
            "smaller --threshold, or leave it out"
        )
    writing.write(storage.join(folder, "vocabulary.json"), vocabulary.to_json())
    origin = "as given" if given else f"seen at least {vocabulary.threshold} times"
    cli.console.print(
        f"vocabulary: {num_words:,} words ({origin}) and {len(SPECIAL_WORDS)} special ones; they cover "
        f"{vocabulary.coverage(counts):.1%} of the captions' {sum(counts.values()):,} running words"
    )
    if given is None and threshold is None and vocabulary.threshold < THRESHOLD:
        cli.console.print(
            f"the data is small: words seen at least {THRESHOLD} times, as usual, would cover less than "
            f"{MIN_COVERAGE:.0%}; --threshold {THRESHOLD} takes these only"
        )


def write_manifest(
    folder: str,
    split: str,
    shards: Sequence[PackedShard],
    *,
    refused: Sequence[Failure] = (),
    recipe: dict[str, Any],
    source: dict[str, Any],
) -> Manifest:
    """Write the list of failures (those `refused` before packing first) and, last, the manifest. Raises UserError."""
    return writing.write_manifest(
        folder,
        split,
        [shard.entry for shard in shards],
        failures=[*refused, *(failure for shard in shards for failure in shard.failures)],
        settings=recipe | {"backend": " and ".join(sorted({shard.backend for shard in shards}))},
        source=source,
    )
