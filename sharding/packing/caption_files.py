"""Parses caption files: COCO's and Karpathy's JSON, CSV, TSV, JSONL.

A row that cannot be used is a Failure; a file that is no caption file is a UserError.
"""

import codecs
import contextlib
import csv
import io
import json
import re
import reprlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pycocotools.coco import COCO

from captioner.errors import UserError
from captioner.samples import ImageId, ImageIds, as_image_id
from captioner.shards.format import Failure

DELIMITERS = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (".json", ".csv", ".tsv", ".jsonl")
KARPATHY_SPLITS = {"train": "train", "restval": "train", "val": "val", "test": "test"}

_NUMBER_OR_TEXT = "a whole number or text"
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceImage:
    """An image of a caption file; captions are (annotation id, text) pairs, stripped and not empty.

    `where` is its line or id in the file, for messages.
    """

    image_id: ImageId
    file_name: str
    where: str
    captions: list[tuple[ImageId | None, str]]


def parse_images(data: bytes, *, kind: str, split: str, location: str) -> Iterator[SourceImage | Failure]:
    """The images of `split` in a file's order, and its failures; `kind` is one of SUFFIXES, `location` for messages.

    Rows of CSV, TSV and JSONL with the same image become one. Raises UserError for what is no such file.
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
        raise UserError(f"{location} is no JSON ({problem}): name another file with --captions") from error


# ---- entries of any kind ----------------------------------------------------------------------------------


def _check_caption(value: object, *, image: str, where: str) -> str | Failure:
    """The caption without white space around it, or its failure."""
    if not isinstance(value, str):
        return Failure(name=image, reason="bad row", message=f"{where}: the caption is no text: {reprlib.repr(value)}")
    if _has_surrogates(value):
        return Failure(name=image, reason="bad encoding", message=f"{where}: half a surrogate pair in the caption")
    return value.strip() or Failure(name=image, reason="empty caption", message=where)


def _has_surrogates(text: str) -> bool:
    return not text.isascii() and _SURROGATE.search(text) is not None


def _first(entry: Any, *keys: str) -> Any:
    """An entry's value of the first of `keys` that it has; None where it has none or is no object."""
    if isinstance(entry, dict):
        for key in keys:
            if entry.get(key) is not None:
                return entry[key]
    return None


def _text(entry: Any, *keys: str) -> str:
    """The value that `_first` gives where it is text, else empty."""
    value = _first(entry, *keys)
    return value if isinstance(value, str) else ""


# ---- COCO -------------------------------------------------------------------------------------------------


def _coco_images(content: Any, *, location: str) -> Iterator[SourceImage | Failure]:
    images: list[dict[str, Any]] = []
    for position, image in enumerate(_coco_list(content, "images", "id", "file_name", location=location)):
        image_id, name = as_image_id(_first(image, "id")), _first(image, "file_name")
        if image_id is not None and isinstance(name, str):
            images.append({"id": image_id, "file_name": name})
        else:
            message = f"images[{position}] lacks {_NUMBER_OR_TEXT} as id, or a file_name: {reprlib.repr(image)}"
            yield Failure(name=_text(image, "file_name"), reason="bad row", message=message)
    names = {image["id"]: image["file_name"] for image in reversed(images)}  # of equal ids the first counts
    ids = ImageIds(names)
    annotations = []
    for position, entry in enumerate(_coco_list(content, "annotations", "image_id", "caption", location=location)):
        annotation = _check_annotation(entry, position, names, ids)
        if isinstance(annotation, Failure):
            yield annotation
        else:
            annotations.append(annotation)
    coco: Any = COCO()  # its type hints know boxes only, not captions
    coco.dataset = {"images": images, "annotations": annotations}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools announces its index
        coco.createIndex()
    for image in images:
        captions = [(found["id"], found["caption"]) for found in coco.imgToAnns.get(image["id"], [])]
        where = f"image id {image['id']}"
        yield SourceImage(image_id=image["id"], file_name=image["file_name"], where=where, captions=captions)


def _coco_list(content: Any, name: str, *keys: str, location: str) -> list[Any]:
    """A list of COCO's file. Raises UserError unless it is empty or has an entry with all `keys`."""
    entries = content.get(name) if isinstance(content, dict) else None
    if not isinstance(entries, list) or not (entries == [] or any(_has(entry, *keys) for entry in entries)):
        raise UserError(
            f"{location} is neither COCO captions nor Karpathy's file (it has no list `{name}` whose entries have "
            f"{' and '.join(keys)}): name another file with --captions"
        )
    return entries


def _has(entry: Any, *keys: str) -> bool:
    return isinstance(entry, dict) and set(keys) <= entry.keys()


def _check_annotation(entry: Any, position: int, names: dict[ImageId, str], ids: ImageIds) -> dict[str, Any] | Failure:
    """The fields of an annotation that COCO's index needs, or its failure."""
    number, wanted = as_image_id(_first(entry, "id")), as_image_id(_first(entry, "image_id"))
    where = f"annotations[{position}]" if number is None else f"annotation {number}"
    if wanted is None or (number is None and _first(entry, "id") is not None):
        message = f"{where} lacks {_NUMBER_OR_TEXT} as image_id, or has an id of another kind: {reprlib.repr(entry)}"
        return Failure(name="", reason="bad row", message=message)
    image_id = ids.find(wanted)
    if image_id is None:
        return Failure(name="", reason="no picture", message=f"{where}: there is no image of id {wanted!r}")
    caption = _check_caption(entry.get("caption"), image=names[image_id], where=where)
    return caption if isinstance(caption, Failure) else {"id": number, "image_id": image_id, "caption": caption}


# ---- Karpathy ---------------------------------------------------------------------------------------------


def is_karpathy(content: Any) -> bool:
    """Whether a JSON file's content is of Karpathy's kind: images that hold their sentences."""
    images = content.get("images") if isinstance(content, dict) else None
    return isinstance(images, list) and any(_has(image, "sentences") for image in images)


def karpathy_splits(content: Any, *, location: str) -> set[str]:
    """The splits in Karpathy's file, at least one. Raises UserError for a split that is not his."""
    names = {_text(image, "split") for image in content["images"]} - {""}
    known = ", ".join(KARPATHY_SPLITS)
    if unknown := sorted(names - KARPATHY_SPLITS.keys()):
        shown = unknown[0].encode("unicode_escape").decode()
        raise UserError(f"{location} has images of split {shown}: give each one of {known}")
    if not names:
        raise UserError(f"no image in {location} says its `split`: give each one of {known}")
    return {KARPATHY_SPLITS[name] for name in names}


def _karpathy_images(content: Any, *, split: str, location: str) -> Iterator[SourceImage | Failure]:
    """The images of a split; one that does not say its split fails in every split, since it may be of any."""
    found = karpathy_splits(content, location=location)
    if split not in found:
        raise UserError(f"{location} holds no captions of split {split}: it has {', '.join(sorted(found))}")
    for position, image in enumerate(content["images"]):
        if KARPATHY_SPLITS.get(_text(image, "split"), split) != split:
            continue
        if _is_karpathy_image(image):
            yield from _karpathy_image(image)
        else:
            message = f"images[{position}] lacks split, filename, id or sentences: {reprlib.repr(image)}"
            yield Failure(name=_text(image, "filename"), reason="bad row", message=message)


def _is_karpathy_image(image: Any) -> bool:
    return (
        bool(_text(image, "split"))
        and isinstance(image.get("filename"), str)
        and isinstance(image.get("filepath"), str | None)
        and isinstance(image.get("sentences"), list | None)
        and as_image_id(_first(image, "cocoid", "imgid", "filename")) is not None
    )


def _karpathy_image(image: dict[str, Any]) -> Iterator[SourceImage | Failure]:
    name = "/".join(part for part in (image.get("filepath"), image["filename"]) if part)
    image_id = as_image_id(_first(image, "cocoid", "imgid"))
    image_id = name if image_id is None else image_id
    captions: list[tuple[ImageId | None, str]] = []
    for position, sentence in enumerate(image.get("sentences") or []):
        number = as_image_id(_first(sentence, "sentid"))
        where = f"image id {image_id}, sentences[{position}]" if number is None else f"sentence {number}"
        caption = _check_caption(_first(sentence, "raw"), image=name, where=where)
        if isinstance(caption, Failure):
            yield caption
        elif number is not None or _first(sentence, "sentid") is None:
            captions.append((number, caption))
        else:
            message = f"{where}: the sentid is not {_NUMBER_OR_TEXT}: {reprlib.repr(sentence['sentid'])}"
            yield Failure(name=name, reason="bad row", message=message)
    yield SourceImage(image_id=image_id, file_name=name, where=f"image id {image_id}", captions=captions)


# ---- CSV, TSV, JSONL: one row for a caption ---------------------------------------------------------------


def _merge(rows: Iterable[SourceImage | Failure]) -> Iterator[SourceImage | Failure]:
    """All failures, then the images, each with the captions of all its rows, in the order of their first rows."""
    images: dict[str, SourceImage] = {}
    for row in rows:
        if isinstance(row, Failure):
            yield row
        elif (first := images.setdefault(row.file_name, row)) is not row:
            first.captions.extend(row.captions)
    yield from images.values()


def _row(name: str, captions: Iterable[object], *, where: str) -> Iterator[SourceImage | Failure]:
    """The failures of a row's captions, then its image with the others."""
    texts: list[tuple[ImageId | None, str]] = []
    for value in captions:
        caption = _check_caption(value, image=name, where=where)
        if isinstance(caption, Failure):
            yield caption
        else:
            texts.append((None, caption))
    yield SourceImage(image_id=name, file_name=name, where=where, captions=texts)


def _table_rows(data: bytes, *, delimiter: str, location: str) -> Iterator[SourceImage | Failure]:
    lines = _split_table(data.decode("utf-8-sig", "surrogateescape"), delimiter)  # bad bytes become surrogates
    columns = [cell.strip() for cell in next(lines, (1, []))[1]]
    if columns.count("image") != 1 or columns.count("caption") != 1:
        found = ", ".join(map(reprlib.repr, columns[:20])) or "none"
        raise UserError(
            f"the first line of {location} names the columns {found}: give it the columns 'image' and 'caption', "
            f"each once, with {delimiter!r} between them, in UTF-8"
        )
    image, caption = columns.index("image"), columns.index("caption")
    for number, cells in lines:
        where = f"line {number}"
        name = cells[image] if len(cells) > image else ""
        if any(map(_has_surrogates, cells)):
            yield Failure(name=name, reason="bad encoding", message=f"{where}: bytes that are not UTF-8")
        elif not cells:
            yield Failure(name="", reason="bad row", message=f"{where}: its cells cannot be parsed, check its quotes")
        elif len(cells) != len(columns):
            message = (
                f"{where}: {len(cells)} cells under {len(columns)} columns (a cell with {delimiter!r} needs quotes)"
            )
            yield Failure(name=name, reason="bad row", message=message)
        else:
            yield from _row(name, [cells[caption]], where=where)


def _split_table(text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The number of each row's first line, and its cells: none for a line that cannot be parsed. Skips blank lines.

    After such a line parsing continues with the next one, so that a quote which does not close costs one row only.
    """
    lines = io.StringIO(text, newline="").readlines()
    position = 0
    while position < len(lines):
        rows = csv.reader(map(lines.__getitem__, range(position, len(lines))), delimiter=delimiter, strict=True)
        try:
            cells, num_lines = next(rows), rows.line_num
        except csv.Error:
            cells, num_lines = [], 1
        if lines[position].strip("\r\n"):
            yield position + 1, cells
        position += num_lines


def _jsonl_rows(data: bytes, *, location: str) -> Iterator[SourceImage | Failure]:
    num_rows = num_known = 0
    for number, line in enumerate(data.removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1):
        if line.strip():
            text = line.decode(errors="surrogateescape")  # bad bytes become surrogates
            row = _parse_row(text)
            num_rows += 1
            num_known += _has(row, "path") or _has(row, "image")
            yield from _jsonl_row(row, is_utf8=not _has_surrogates(text), where=f"line {number}")
    if num_rows and not num_known:
        raise UserError(
            f'{location} holds no line like {{"path": "photo.jpg", "caption": "A cat."}}: '
            "name another file with --captions"
        )


def _parse_row(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _jsonl_row(row: Any, *, is_utf8: bool, where: str) -> Iterator[SourceImage | Failure]:
    problem = _jsonl_problem(row, is_utf8=is_utf8)
    if problem is not None:
        reason, message = problem
        yield Failure(name=_text(row, "path", "image"), reason=reason, message=f"{where}: {message}")
        return
    one, several = row.get("caption"), row.get("captions")
    yield from _row(_text(row, "path", "image"), several if one is None else [one], where=where)


def _jsonl_problem(row: Any, *, is_utf8: bool) -> tuple[str, str] | None:
    """Why a line cannot be used, as reason and message; the captions themselves are checked later."""
    if not is_utf8:
        return "bad encoding", "bytes that are not UTF-8"
    if not isinstance(_first(row, "path", "image"), str):
        return "bad row", "no JSON object with a path or image that is text"
    one, several = row.get("caption"), row.get("captions")
    if not isinstance(several, list | None) or (one is not None and several):
        return "bad row", "its captions are no list, or stand beside a caption"
    if one is None and not several:
        return "no caption", _text(row, "error") or "neither caption nor captions"
    return None
