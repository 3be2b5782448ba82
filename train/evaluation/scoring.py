"""Scores of captions, printed and written as JSON. Imports no torch."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from captioner import cli
from captioner.files import storage
from captioner.metrics import References
from captioner.samples import ImageId
from train.evaluation.coco_results import by_reference_id, read_references, read_results
from train.evaluation.java_metrics import JavaMetric, java_scores


def score_results(
    results: Path | None, references: Path | None, *, java_metrics: Sequence[JavaMetric], json_file: Path | None
) -> None:
    """Score the images of a results file; like the official program, leave out images that have no result.

    Raises UserError for files that cannot be scored.
    """
    found, all_captions = read_results(str(results)), read_references(str(references))
    captions = by_reference_id(found, all_captions, results=str(results), location=str(references))
    num_left = len(all_captions) - len(captions)
    if num_left:
        cli.console.print(f"{num_left:,} of {len(all_captions):,} images in {references} have no result: not scored")
    facts = {
        "num_images": len(captions),
        "num_without_result": num_left,
        "results": str(results),
        "references": str(references),
    }
    own_references = {image_id: all_captions[image_id] for image_id in captions}
    report_scores({}, captions, own_references, facts, java_metrics=java_metrics, json_file=json_file)


def report_scores(
    losses: Mapping[str, float],
    captions: Mapping[ImageId, str],
    references: Mapping[ImageId, Sequence[str]],
    facts: Mapping[str, Any],
    *,
    java_metrics: Sequence[JavaMetric],
    json_file: Path | None,
) -> None:
    """Print losses and scores, and write them with the `facts` of what was scored."""
    corpus = References(references)
    metrics = {**losses, **corpus.scores(captions), **java_scores(captions, references, metrics=java_metrics)}
    cli.print_table(f"{len(captions):,} images", ("metric", "value"), list(metrics.items()))
    if json_file is not None:
        content = {"metrics": metrics, "bleu_counts": corpus.bleu_counts(captions)._asdict(), **facts}
        storage.write_atomic(str(json_file), json.dumps(content, indent=1, allow_nan=False))
