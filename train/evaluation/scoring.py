"""Scores of captions, printed and written as JSON. Imports no torch."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from captioner import cli
from captioner.files import storage
from captioner.metrics import References
from captioner.samples import ImageId
from train.evaluation.coco_results import by_reference_id, read_references, read_results
from train.evaluation.java_metrics import java_scores
from train.evaluation.settings import EvaluateSettings


def score_results(settings: EvaluateSettings) -> None:
    """Score the images of a results file; like the official program, leave out images that have no result.

    Raises UserError for files that cannot be scored.
    """
    results, references = str(settings.results), str(settings.references)
    found, all_captions = read_results(results), read_references(references)
    captions = by_reference_id(found, all_captions, results=results, location=references)
    num_left = len(all_captions) - len(captions)
    if num_left:
        cli.console.print(f"{num_left:,} of {len(all_captions):,} images in {references} have no result: not scored")
    facts = {"num_images": len(captions), "num_without_result": num_left, "results": results, "references": references}
    own_references = {image_id: all_captions[image_id] for image_id in captions}
    report_scores(settings, captions, own_references, facts)


def report_scores(
    settings: EvaluateSettings,
    captions: Mapping[ImageId, str],
    references: Mapping[ImageId, Sequence[str]],
    facts: Mapping[str, Any],
    losses: Mapping[str, float] | None = None,
) -> None:
    """Print losses and scores, and write them with the `facts` of what was scored."""
    corpus = References(references)
    java = java_scores(captions, references, metrics=settings.java_metrics)
    metrics = {**(losses or {}), **corpus.scores(captions), **java}
    cli.print_table(f"{len(captions):,} images", ("metric", "value"), list(metrics.items()))
    if settings.json is not None:
        content = {"metrics": metrics, "bleu_counts": corpus.bleu_counts(captions)._asdict(), **facts}
        storage.write_atomic(str(settings.json), json.dumps(content, indent=1, allow_nan=False))
