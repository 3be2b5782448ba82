"""Scores of captions, printed and written as JSON. Imports no torch."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from captioner import cli
from captioner.files import storage
from captioner.fluency import fluency
from captioner.metrics import ImageScores, References, corpus_scores, sum_counts
from captioner.samples import ImageId
from train.evaluation.bootstrap import RESAMPLES, Interval, bounds, intervals, paired_intervals, with_intervals
from train.evaluation.coco_results import by_compared_id, by_reference_id, read_references, read_results, with_ids
from train.evaluation.java_metrics import java_scores
from train.evaluation.settings import EvaluateSettings

INTERVAL = "95 % interval"


def score_results(settings: EvaluateSettings) -> None:
    """Score the images of a results file; like the official program, leave out images that have no result.

    Raises UserError for files that cannot be scored.
    """
    results, references = str(settings.results), str(settings.references)
    found, (all_captions, ids_by_name) = read_results(results), read_references(references)
    found = with_ids(found, ids_by_name, results=results)
    captions = by_reference_id(found, all_captions, results=results, location=references)
    num_left = len(all_captions) - len(captions)
    if num_left:
        cli.console.print(f"{num_left:,} of {len(all_captions):,} images in {references} have no result: not scored")
    facts = {"num_images": len(captions), "num_without_result": num_left, "results": results, "references": references}
    own_references = {image_id: texts for image_id, texts in all_captions.items() if image_id in captions}
    report_scores(settings, captions, own_references, facts, ids_by_name=ids_by_name)


def caption_metrics(images: Mapping[Any, ImageScores], captions: Mapping[Any, str]) -> dict[str, float]:
    """Corpus scores, the bounds of their intervals over images (`cider_low`, `cider_high`), and `fluency`, by name."""
    return {**corpus_scores(images.values()), **bounds(intervals(images.values())), **fluency(captions.values())}


def report_scores(
    settings: EvaluateSettings,
    captions: Mapping[ImageId, str],
    references: Mapping[ImageId, Sequence[str]],
    facts: Mapping[str, Any],
    losses: Mapping[str, float] | None = None,
    *,
    ids_by_name: Mapping[str, ImageId] | None = None,
) -> None:
    """Print losses and metrics, and write them with the `facts` of what was scored. Raises UserError.

    `ids_by_name` has the images' ids by file name, which another results file may have as ids.

    The JSON has `metrics` by name, `bleu_counts` and the facts; with --against also `against`: the other file's
    `results` and `metrics`, and of each of the `differences` its `value`, `low`, `high` and `excludes_zero`.
    """
    corpus = References(references)
    images = corpus.image_scores(captions)
    java = java_scores(captions, references, metrics=settings.java_metrics)
    metrics = {**(losses or {}), **caption_metrics(images, captions), **java}
    counts = sum_counts(image.bleu_counts for image in images.values())
    content: dict[str, Any] = {"metrics": metrics, "bleu_counts": counts._asdict(), **facts}
    if settings.against is not None:
        against = str(settings.against)
        others = with_ids(read_results(against), ids_by_name or {}, results=against)
        others = by_compared_id(others, captions, against=against, results=facts["results"])
        content["against"] = {"results": against, **_compare(images, corpus.image_scores(others), others)}
    _print(content)
    if settings.json is not None:
        storage.write_atomic(str(settings.json), json.dumps(content, indent=1, allow_nan=False))


def _compare(
    images: Mapping[ImageId, ImageScores], other_images: Mapping[ImageId, ImageScores], others: Mapping[ImageId, str]
) -> dict[str, Any]:
    """The `metrics` of the other captions, and the `differences` from them."""
    scores, metrics = corpus_scores(images.values()), caption_metrics(other_images, others)
    paired = paired_intervals(images.values(), other_images.values())
    differences = {
        name: {"value": scores[name] - metrics[name], **own._asdict(), "excludes_zero": own.excludes_zero}
        for name, own in paired.items()
    }
    return {"metrics": metrics, "differences": differences}


def _print(content: Mapping[str, Any]) -> None:
    """Print a table of the metrics, beside those of the file that they are compared with."""
    title = f"{content['num_images']:,} images; {INTERVAL}s over images, {RESAMPLES:,} bootstrap resamples"
    header = ("metric", "value", INTERVAL)
    rows = [(name, value, _range(own)) for name, (value, own) in with_intervals(content["metrics"]).items()]
    if "against" in content:
        against = content["against"]
        title += f"; compared with {against['results']}"
        header += ("other", "difference", INTERVAL, "excludes 0")
        rows = [(*row, against["metrics"].get(row[0], ""), *_difference(against, row[0])) for row in rows]
    cli.print_table(title, header, rows)


def _difference(against: Mapping[str, Any], name: str) -> tuple[str, str, str]:
    """The cells of a metric's difference: its value, its interval, whether that excludes 0."""
    if name not in against["differences"]:
        return "", "", ""
    value, low, high, excludes_zero = against["differences"][name].values()
    return f"{value:+.4f}", _range(Interval(low, high), "+.4f"), "yes" if excludes_zero else "no"


def _range(interval: Interval | None, form: str = ".3f") -> str:
    return f"{interval.low:{form}} to {interval.high:{form}}" if interval else ""
