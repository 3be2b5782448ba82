"""COCO's two files of captions: results, one caption for each image, and references, any number. Imports no torch."""

import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

from captioner import storage
from captioner.cli import UserError

ImageId = int | str

RESULTS_FORM = 'give a COCO results file, [{"image_id": 1, "caption": "a dog"}, ...]'
REFERENCES_FORM = (
    'give a COCO caption file, {"images": [...], "annotations": [{"image_id": 1, "caption": "a dog"}, ...]}'
)


def read_results(location: str) -> dict[ImageId, str]:
    """The caption of each image. Raises UserError for another layout, an image with two captions, or none at all."""
    rows = _rows(storage.read_json(location, remedy=RESULTS_FORM), location, remedy=RESULTS_FORM)
    if not rows:
        raise UserError(f"{location} holds no captions: {RESULTS_FORM}")
    _check_once((image_id for image_id, _ in rows), where=location, remedy="give one caption for each image")
    return dict(rows)


def read_references(location: str) -> dict[ImageId, list[str]]:
    """The captions of each image that has any. Raises UserError for another layout."""
    content = storage.read_json(location, remedy=REFERENCES_FORM)
    if not isinstance(content, dict) or "annotations" not in content:
        raise UserError(f"{location} has no annotations: {REFERENCES_FORM}")
    references: dict[ImageId, list[str]] = {}
    for image_id, caption in _rows(content["annotations"], location, remedy=REFERENCES_FORM):
        references.setdefault(image_id, []).append(caption)
    return references


def write_results(location: str, captions: Iterable[tuple[ImageId, str]]) -> None:
    """Write a COCO results file. Raises UserError where an image comes twice."""
    rows = [{"image_id": image_id, "caption": caption} for image_id, caption in captions]
    _check_once((row["image_id"] for row in rows), where="the split", remedy="evaluate the folders one by one")
    storage.write_atomic(location, json.dumps(rows, ensure_ascii=False, indent=0))


def _rows(content: Any, location: str, *, remedy: str) -> list[tuple[ImageId, str]]:
    if not isinstance(content, list):
        raise UserError(f"{location} holds no list of captions: {remedy}")
    for number, row in enumerate(content):
        fits = isinstance(row, dict) and isinstance(row.get("image_id"), int | str)
        if not fits or not isinstance(row.get("caption"), str):
            raise UserError(f"{location} has no image_id with a caption in row {number}, {str(row)[:80]}: {remedy}")
    return [(row["image_id"], row["caption"]) for row in content]


def _check_once(image_ids: Iterable[ImageId], *, where: str, remedy: str) -> None:
    image_id, times = Counter(image_ids).most_common(1)[0]
    if times > 1:
        raise UserError(f"{where} has image {image_id!r} {times} times: {remedy}")
