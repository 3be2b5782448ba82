"""COCO's two files of captions: results, one caption for each image, and references, any number. Imports no torch."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from captioner.errors import UserError
from captioner.files import storage
from captioner.samples import ImageId, ImageIds, as_image_id

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
    """The captions of each image that has any, by the id in its `images`. Raises UserError for another layout."""
    content = storage.read_json(location, remedy=REFERENCES_FORM)
    if not isinstance(content, dict) or "annotations" not in content:
        raise UserError(f"{location} has no annotations: {REFERENCES_FORM}")
    images = content.get("images")
    listed = [as_image_id(image.get("id")) for image in images if isinstance(image, dict)] if images else []
    ids = ImageIds([image_id for image_id in listed if image_id is not None])
    references: dict[ImageId, list[str]] = {}
    for image_id, caption in _rows(content["annotations"], location, remedy=REFERENCES_FORM):
        own_id = ids.find(image_id)
        references.setdefault(image_id if own_id is None else own_id, []).append(caption)
    twice = [image_id for image_id in references if isinstance(image_id, int) and str(image_id) in references]
    if twice and not listed:
        raise UserError(
            f"{location} has captions of image {twice[0]} and of image '{twice[0]}', and no `images` that tell whether "
            "they are two: write all ids as numbers, or all as text"
        )
    return references


def by_reference_id(
    captions: Mapping[ImageId, str], references: Mapping[ImageId, Sequence[str]], *, results: str, location: str
) -> dict[ImageId, str]:
    """The captions by the ids that the references have, where one of the two may have text for numbers.

    `results` and `location` are the two files, for messages. Raises UserError for an image without references, and for
    one with two captions.
    """
    ids = ImageIds(references)
    found = [(image_id, ids.find(image_id)) for image_id in captions]
    unknown = [image_id for image_id, own_id in found if own_id is None]
    if unknown:
        raise UserError(
            f"{location} has no captions of {len(unknown):,} of the images in {results}, such as {unknown[0]!r}: "
            "give the file with the references of these images"
        )
    pairs = [(own_id, captions[image_id]) for image_id, own_id in found if own_id is not None]
    _check_once((own_id for own_id, _ in pairs), where=results, remedy="give one caption for each image")
    return dict(pairs)


def write_results(location: str, captions: Iterable[tuple[ImageId, str]]) -> None:
    """Write a COCO results file. Raises UserError where an image comes twice."""
    rows = [{"image_id": image_id, "caption": caption} for image_id, caption in captions]
    _check_once((row["image_id"] for row in rows), where="the split", remedy="evaluate the folders one by one")
    storage.write_atomic(location, json.dumps(rows, ensure_ascii=False, indent=0))


def _rows(content: Any, location: str, *, remedy: str) -> list[tuple[ImageId, str]]:
    if not isinstance(content, list):
        raise UserError(f"{location} holds no list of captions: {remedy}")
    rows = []
    for number, row in enumerate(content):
        image_id = as_image_id(row.get("image_id")) if isinstance(row, dict) else None
        if image_id is None or not isinstance(row.get("caption"), str):
            raise UserError(
                f"{location} has no image_id (a whole number or text) with a caption in row {number}, {str(row)[:80]}: "
                f"{remedy}"
            )
        rows.append((image_id, row["caption"]))
    return rows


def _check_once(image_ids: Iterable[ImageId], *, where: str, remedy: str) -> None:
    image_id, times = Counter(image_ids).most_common(1)[0]
    if times > 1:
        raise UserError(f"{where} has image {image_id!r} {times} times: {remedy}")
