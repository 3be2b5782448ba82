"""Parses caption files: COCO's and Karpathy's JSON, CSV, TSV, JSONL.

A row that cannot be used is a Failure; a file that is not a caption file raises UserError.
"""

import codecs
import contextlib
import io
import json
import re
import reprlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pycocotools.coco import COCO

from captioner.errors import UserError
from captioner.files.tables import DELIMITERS, read_table
from captioner.samples import ImageId, ImageIds, as_image_id
from captioner.shards.format import Failure

SUFFIXES = (".json", ".csv", ".tsv", ".jsonl")
KARPATHY_SPLITS = {"train": "train", "restval": "train", "val": "val", "test": "test"}

_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceImage:
    """An image of a caption file. Captions are (annotation id, text) pairs; texts are stripped and not empty.

    `where` is its line or id in the file, for messages.
    """

    image_id: ImageId
    file_name: str
    where: str
    captions: list[tuple[ImageId | None, str]]


def parse_images(data: bytes, *, kind: str, split: str, location: str) -> Iterator[SourceImage | Failure]:
    """The images of `split` in the file's order, and its failures.

    `kind` is one of SUFFIXES, `location` is for messages. Rows of CSV, TSV and JSONL with the same image become one
    image. Raises UserError if `data` is not a caption file of this kind.
    """
    if kind == ".json":
        content = parse_json(data, location=location)
        if is_karpathy(content):
            return _karpathy_images(content, split=split, location=location)
        return _coco_images(content, location=location)
    if kind == ".jsonl":
        return _merge(_jsonl_rows(data, location=location))
    return _merge(_table_rows(data, delimiter=DELIMITERS[kind], location=location))


def parse_json(data: bytes, *, location: str) -> Any:
    """The content of a JSON file. Raises UserError."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        problem = " ".join(str(error).split())
        raise UserError(f"{location} is not valid JSON ({problem}): name another file with --captions") from error


# ---- entries of any kind ----------------------------------------------------------------------------------


def _failure(reason: str, entry: object, *, where: str, name: str = "") -> Failure:
    """A failure with the entry, shortened, as its message."""
    return Failure(name=name, reason=reason, message=f"{where}: {reprlib.repr(entry)}")


def _image(
    name: str,
    entries: Iterable[Any],
    *,
    where: str,
    image_id: ImageId | None = None,
    keys: tuple[str, str] = ("id", "caption"),
) -> Iterator[SourceImage | Failure]:
    """A failure for each unusable caption, then the image with the usable ones. `image_id` is its name if not given."""
    captions = []
    for entry in entries:
        caption = _caption(entry, image=name, where=where, keys=keys)
        if isinstance(caption, Failure):
            yield caption
        else:
            captions.append(caption)
    yield SourceImage(image_id=name if image_id is None else image_id, file_name=name, where=where, captions=captions)


def _caption(
    entry: Any, *, image: str, where: str, keys: tuple[str, str] = ("id", "caption")
) -> tuple[ImageId | None, str] | Failure:
    """The id and the stripped text that the entry has under `keys`, or its failure."""
    stored_id, text = (_first(entry, key) for key in keys)
    caption_id = as_image_id(stored_id)
    if not isinstance(text, str) or (stored_id is not None and caption_id is None):
        reason = "bad row"
    elif _has_surrogates(text):
        reason = "bad encoding"
    elif not text.strip():
        reason = "empty caption"
    else:
        return caption_id, text.strip()
    return _failure(reason, entry, where=where, name=image)


def _has_surrogates(text: str) -> bool:
    return not text.isascii() and _SURROGATE.search(text) is not None


def _has(entry: Any, *keys: str) -> bool:
    return isinstance(entry, dict) and set(keys) <= entry.keys()


def _first(entry: Any, *keys: str) -> Any:
    """The entry's first value under `keys` that is not None; None if there is none, or the entry is not an object."""
    if isinstance(entry, dict):
        for key in keys:
            if entry.get(key) is not None:
                return entry[key]
    return None


def _text(entry: Any, *keys: str) -> str:
    """The result of `_first` if it is a string, else an empty string."""
    value = _first(entry, *keys)
    return value if isinstance(value, str) else ""


# ---- COCO -------------------------------------------------------------------------------------------------


def _coco_images(content: Any, *, location: str) -> Iterator[SourceImage | Failure]:
    images: list[dict[str, Any]] = []
    for position, entry in enumerate(_coco_list(content, "images", "id", "file_name", location=location)):
        image_id, name = as_image_id(_first(entry, "id")), _first(entry, "file_name")
        if image_id is not None and isinstance(name, str):
            images.append({"id": image_id, "file_name": name})
        else:
            yield _failure("bad row", entry, where=f"images[{position}]", name=_text(entry, "file_name"))
    names = {image["id"]: image["file_name"] for image in reversed(images)}  # the first of equal ids wins
    ids = ImageIds(names)
    annotations = []
    for position, entry in enumerate(_coco_list(content, "annotations", "image_id", "caption", location=location)):
        where, stored_id = f"annotations[{position}]", as_image_id(_first(entry, "image_id"))
        image_id = None if stored_id is None else ids.find(stored_id)
        if image_id is None:
            yield _failure("bad row" if stored_id is None else "no image", entry, where=where)
            continue
        caption = _caption(entry, image=names[image_id], where=where)
        if isinstance(caption, Failure):
            yield caption
        else:
            annotations.append({"id": caption[0], "image_id": image_id, "caption": caption[1]})
    coco: Any = COCO()  # its type hints describe boxes only, not captions
    coco.dataset = {"images": images, "annotations": annotations}
    with contextlib.redirect_stdout(io.StringIO()):  # createIndex prints its progress
        coco.createIndex()
    for image in images:
        captions = [(each["id"], each["caption"]) for each in coco.imgToAnns.get(image["id"], [])]
        where = f"image id {image['id']}"
        yield SourceImage(image_id=image["id"], file_name=image["file_name"], where=where, captions=captions)


def _coco_list(content: Any, name: str, *keys: str, location: str) -> list[Any]:
    """The list `name` of a COCO file. Raises UserError unless it is empty or has an entry with all `keys`."""
    entries = content.get(name) if isinstance(content, dict) else None
    if not isinstance(entries, list) or not (entries == [] or any(_has(entry, *keys) for entry in entries)):
        raise UserError(
            f"{location} is neither COCO captions nor Karpathy's file (it has no list `{name}` whose entries have "
            f"{' and '.join(keys)}): name another file with --captions"
        )
    return entries


# ---- Karpathy ---------------------------------------------------------------------------------------------


def is_karpathy(content: Any) -> bool:
    """Whether the content of a JSON file is in Karpathy's format: images that contain their sentences."""
    images = content.get("images") if isinstance(content, dict) else None
    return isinstance(images, list) and any(_has(image, "sentences") for image in images)


def karpathy_splits(content: Any, *, location: str) -> set[str]:
    """The splits in Karpathy's file, at least one. Raises UserError if there is none, or an unknown one."""
    names = {_text(image, "split") for image in content["images"]} - {""}
    if not names or not names <= KARPATHY_SPLITS.keys():
        found = ", ".join(map(ascii, sorted(names - KARPATHY_SPLITS.keys()))) or "none"
        raise UserError(f"{location} has images of split {found}: give each one of {', '.join(KARPATHY_SPLITS)}")
    return {KARPATHY_SPLITS[name] for name in names}


def _karpathy_images(content: Any, *, split: str, location: str) -> Iterator[SourceImage | Failure]:
    """The images of a split. An image without a split is a failure in every split, because it may belong to any."""
    splits = karpathy_splits(content, location=location)
    if split not in splits:
        raise UserError(f"{location} holds no captions of split {split}: it has {', '.join(sorted(splits))}")
    for position, image in enumerate(content["images"]):
        if KARPATHY_SPLITS.get(_text(image, "split"), split) != split:
            continue
        folder, file_name, sentences = (_first(image, key) for key in ("filepath", "filename", "sentences"))
        image_id = as_image_id(_first(image, "cocoid", "imgid", "filename"))
        types_fit = isinstance(file_name, str) and isinstance(folder, str | None) and isinstance(sentences, list | None)
        if not types_fit or image_id is None or not _text(image, "split"):
            yield _failure("bad row", image, where=f"images[{position}]", name=_text(image, "filename"))
            continue
        name = f"{folder}/{file_name}" if folder else file_name
        image_id = name if _first(image, "cocoid", "imgid") is None else image_id
        where = f"image id {image_id}"
        yield from _image(name, sentences or [], where=where, image_id=image_id, keys=("sentid", "raw"))


# ---- CSV, TSV, JSONL: one row per caption -----------------------------------------------------------------


def _merge(rows: Iterable[SourceImage | Failure]) -> Iterator[SourceImage | Failure]:
    """All failures, then the images in the order of their first rows, each with the captions of all its rows."""
    images: dict[str, SourceImage] = {}
    for row in rows:
        if isinstance(row, Failure):
            yield row
        elif (first := images.setdefault(row.file_name, row)) is not row:
            first.captions.extend(row.captions)
    yield from images.values()


def _table_rows(data: bytes, *, delimiter: str, location: str) -> Iterator[SourceImage | Failure]:
    """The rows of a table, CSV or TSV."""
    columns, rows = read_table(data, delimiter=delimiter, required=("image", "caption"), location=location)
    for number, cells in rows:
        row = dict(zip(columns, cells, strict=False))
        name, where = row.get("image", ""), f"line {number}"
        if any(map(_has_surrogates, cells)):
            yield _failure("bad encoding", cells, where=where, name=name)
        elif len(cells) != len(columns):
            yield _failure("bad row", cells, where=where, name=name)
        else:
            yield from _image(name, [{"caption": row["caption"]}], where=where)


def _jsonl_rows(data: bytes, *, location: str) -> Iterator[SourceImage | Failure]:
    num_rows = num_known = 0
    for number, line in enumerate(data.removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1):
        if line.strip():
            text = line.decode(errors="surrogateescape")  # bad bytes become surrogates
            row = None
            with contextlib.suppress(ValueError, RecursionError):
                row = json.loads(text)
            num_rows += 1
            num_known += _has(row, "path") or _has(row, "image")
            yield from _jsonl_row(text, row, where=f"line {number}")
    if num_rows and not num_known:
        raise UserError(
            f'{location} holds no line like {{"path": "photo.jpg", "caption": "A cat."}}: '
            "name another file with --captions"
        )


def _jsonl_row(text: str, row: Any, *, where: str) -> Iterator[SourceImage | Failure]:
    name, caption, captions = _text(row, "path", "image"), _first(row, "caption"), _first(row, "captions")
    is_named = isinstance(_first(row, "path", "image"), str)
    if _has_surrogates(text):
        yield _failure("bad encoding", text, where=where, name=name)
    elif not is_named or not isinstance(captions, list | None) or (caption is not None and captions):
        yield _failure("bad row", text, where=where, name=name)
    elif caption is None and not captions:
        yield Failure(name=name, reason="no caption", message=f"{where}: {_text(row, 'error') or 'it has no caption'}")
    else:
        yield from _image(name, [{"caption": value} for value in (captions or [caption])], where=where)
