"""Caption files to records: COCO's captions (read with pycocotools) and Karpathy's split file."""

import contextlib
import io
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pycocotools.coco import COCO

from captioner import storage
from captioner.cli import UserError
from captioner.shards import SPLITS

KARPATHY_SPLITS = {"train": "train", "restval": "train", "val": "val", "test": "test"}
DOWNLOAD_FIRST = "python sharding/download_coco.py brings COCO; name other data with --images and --captions"


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One picture to pack: where it lies, its id and name in the source, and its captions with their ids."""

    image_id: int | str
    file_name: str
    location: str
    captions: tuple[str, ...]
    annotation_ids: tuple[int | str | None, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A split's caption file and the folder that its picture names start from."""

    split: str
    captions: str
    images: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """A picture that is not packed, and why: `reason` is what failures are counted by."""

    image: str
    reason: str
    message: str


def find_sources(*, images: str, captions: str, split: str | None) -> list[Source]:
    """The splits to pack, training first. Raises UserError when there is none or it is not clear which is meant."""
    if not storage.exists(captions):
        raise UserError(f"there is no caption file or folder {captions}: {DOWNLOAD_FIRST}")
    if not storage.exists(images):
        raise UserError(f"there is no picture folder {images}: {DOWNLOAD_FIRST}")
    found = _find_in_folder(captions) if Path(captions).is_dir() else _find_in_file(captions, split=split)
    if split is not None and split not in found:
        raise UserError(f"{captions} holds no captions of split {split} (it has: {', '.join(found) or 'none'})")
    return [
        Source(split=name, captions=found[name], images=_image_folder(images, captions=found[name]))
        for name in SPLITS
        if name in found and split in (None, name)
    ]


def _find_in_folder(folder: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for path in sorted(Path(folder).glob("captions_*.json")):
        split = _split_in_name(path.name)
        if split in found:
            raise UserError(
                f"{folder} holds two caption files of split {split}, {Path(found[split]).name} and {path.name}: "
                f"name one with --captions {path}"
            )
        if split is not None:
            found[split] = str(path)
    if not found:
        raise UserError(
            f"{folder} holds no captions_train*.json, captions_val*.json or captions_test*.json: {DOWNLOAD_FIRST}"
        )
    return found


def _find_in_file(path: str, *, split: str | None) -> dict[str, str]:
    named = split or _split_in_name(Path(path).name)
    if named is not None:
        return {named: path}
    content = storage.read_json(path, remedy=DOWNLOAD_FIRST)
    if not _is_karpathy(content):
        raise UserError(f"the name of {path} does not say which split it is: add --split train, val or test")
    found = {image.get("split") for image in content["images"]}
    if unknown := found - KARPATHY_SPLITS.keys():
        raise UserError(f"{path} has pictures of split {unknown.pop()}: Karpathy's are {', '.join(KARPATHY_SPLITS)}")
    return dict.fromkeys(sorted({KARPATHY_SPLITS[split] for split in found}), path)


def _split_in_name(name: str) -> str | None:
    match = re.match(r"captions_(train|val|test)", name)
    return match[1] if match else None


def _image_folder(images: str, *, captions: str) -> str:
    """COCO's layout: `captions_train2014.json` belongs to `train2014/`, where there is such a folder."""
    inner = storage.join(images, Path(captions).stem.removeprefix("captions_"))
    return inner if storage.exists(inner) else images


def read_records(source: Source) -> tuple[list[Record], list[Failure]]:
    """The records of a split in the source's order, and those that cannot be packed: no caption, or a bad name.

    Empty captions are left out of their record and counted, as is a picture id that came before.
    """
    content = storage.read_json(source.captions, remedy=DOWNLOAD_FIRST)
    try:
        rows = _karpathy_rows(content, source.split) if _is_karpathy(content) else _coco_rows(content)
        return _to_records(rows, images=source.images)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{source.captions} is neither COCO captions nor Karpathy's file ({error!r} in it)") from error


Row = tuple[int | str, str, list[tuple[int | str | None, str]]]
"""Image id, file name, and the (annotation id, caption) pairs."""


def _is_karpathy(content: Any) -> bool:
    images = content.get("images") if isinstance(content, dict) else None
    return bool(images) and "sentences" in images[0]


def _karpathy_rows(content: dict[str, Any], split: str) -> Iterable[Row]:
    for image in content["images"]:
        if KARPATHY_SPLITS[image["split"]] == split:
            name = "/".join(part for part in (image.get("filepath", ""), image["filename"]) if part)
            sentences = [(sentence.get("sentid"), sentence["raw"]) for sentence in image["sentences"]]
            yield image.get("cocoid", image.get("imgid", name)), name, sentences


def _coco_rows(content: dict[str, Any]) -> Iterable[Row]:
    coco: Any = COCO()  # its own types know of boxes only, not of captions
    coco.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools announces its index
        coco.createIndex()
    for image in content["images"]:
        yield (
            image["id"],
            image["file_name"],
            [(a["id"], a["caption"]) for a in coco.imgToAnns.get(image["id"], [])],
        )


def _to_records(rows: Iterable[Row], *, images: str) -> tuple[list[Record], list[Failure]]:
    records: list[Record] = []
    failures: list[Failure] = []
    seen: set[int | str] = set()
    for image_id, name, captions in rows:
        kept = [(number, text.strip()) for number, text in captions if text.strip()]
        failures += [
            Failure(image=name, reason="empty caption", message=f"caption {n}") for n, t in captions if not t.strip()
        ]
        reason = _refusal(image_id, name, has_caption=bool(kept), seen=seen)
        if reason is not None:
            failures.append(Failure(image=name, reason=reason, message=f"image id {image_id}"))
            continue
        seen.add(image_id)
        numbers, texts = zip(*kept, strict=True)
        location = storage.join(images, name)
        records.append(
            Record(image_id=image_id, file_name=name, location=location, captions=texts, annotation_ids=numbers)
        )
    return records, failures


def _refusal(image_id: int | str, name: str, *, has_caption: bool, seen: set[int | str]) -> str | None:
    """Why a picture cannot be a record, if so."""
    if name.startswith("/") or "\\" in name or ".." in name.split("/"):
        return "unsafe name"
    if image_id in seen:
        return "duplicate id"
    return None if has_caption else "no caption"
