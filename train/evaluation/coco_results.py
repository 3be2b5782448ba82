"""COCO's two files of captions: results, one caption for each image, and references, any number. Imports no torch."""

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
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


def with_ids(
    captions: Mapping[ImageId, str], ids_by_name: Mapping[str, ImageId], *, results: str
) -> dict[ImageId, str]:
    """The captions of a results file, in which ids may be file names. Raises UserError for an image with two."""
    rows = [(ids_by_name.get(str(image_id), image_id), caption) for image_id, caption in captions.items()]
    _check_once((image_id for image_id, _ in rows), where=results, remedy="give one caption for each image")
    return dict(rows)


def read_references(location: str) -> tuple[dict[ImageId, list[str]], dict[str, ImageId]]:
    """The captions of each image that has any, by the id in its `images`; and the ids of `images` by file name.

    Raises UserError for another layout.
    """
    content = storage.read_json(location, remedy=REFERENCES_FORM)
    if not isinstance(content, dict) or "annotations" not in content:
        raise UserError(f"{location} has no annotations: {REFERENCES_FORM}")
    images = [image for image in content.get("images") or () if isinstance(image, dict)]
    named = [(image.get("file_name"), as_image_id(image.get("id"))) for image in images]
    listed = [image_id for _, image_id in named if image_id is not None]
    ids = ImageIds(listed)
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
    return references, {name: image_id for name, image_id in named if isinstance(name, str) and image_id is not None}


def by_reference_id(
    captions: Mapping[ImageId, str], references: Mapping[ImageId, Sequence[str]], *, results: str, location: str
) -> dict[ImageId, str]:
    """The captions by the ids that the references have, where one of the two may have text for numbers.

    `results` and `location` are the two files, for messages. Raises UserError for an image without references, and for
    one with two captions.
    """
    found, unknown = _by_known_id(captions, references, where=results)
    if unknown:
        raise UserError(
            f"{location} has no captions of {len(unknown):,} of the images in {results}, such as {unknown[0]!r}: "
            "give the file with the references of these images"
        )
    return found


def by_compared_id(
    others: Mapping[ImageId, str], captions: Mapping[ImageId, str], *, against: str, results: str
) -> dict[ImageId, str]:
    """The captions of another results file, by the ids that `captions` have.

    `against` and `results` are the two files, for messages. Raises UserError for an image that only one of them has,
    and for one with two captions.
    """
    found, only_other = _by_known_id(others, captions, where=against)
    only_own = [image_id for image_id in captions if image_id not in found]
    only_one = [
        f"{len(image_ids):,} only in {location} ({', '.join(map(repr, image_ids[:3]))}{', ...' * (len(image_ids) > 3)})"
        for location, image_ids in ((results, only_own), (against, only_other))
        if image_ids
    ]
    if only_one:
        raise UserError(
            f"the results are not of the same images, {' and '.join(only_one)}: compare those of the same ones"
        )
    return found


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


def _by_known_id(
    captions: Mapping[ImageId, str], known: Collection[ImageId], *, where: str
) -> tuple[dict[ImageId, str], list[ImageId]]:
    """The captions by known ids, and their own ids that are not known. Raises UserError for two captions of an id."""
    ids = ImageIds(known)
    own_ids = {image_id: ids.find(image_id) for image_id in captions}
    pairs = [(own_id, captions[image_id]) for image_id, own_id in own_ids.items() if own_id is not None]
    _check_once((own_id for own_id, _ in pairs), where=where, remedy="give one caption for each image")
    return dict(pairs), [image_id for image_id, own_id in own_ids.items() if own_id is None]


def _check_once(image_ids: Iterable[ImageId], *, where: str, remedy: str) -> None:
    for image_id, times in Counter(image_ids).most_common(1):
        if times > 1:
            raise UserError(f"{where} has image {image_id!r} {times} times: {remedy}")
