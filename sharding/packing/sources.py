"""What to pack: the caption files of the splits, their records, and the failures: what cannot be packed.

A caption file is COCO's or Karpathy's JSON, CSV, TSV or JSONL, as its suffix says, on disk or behind a URL.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote

from captioner.errors import UserError
from captioner.files import storage
from captioner.shards.format import SPLITS, Failure
from sharding.packing.caption_files import (
    SUFFIXES,
    SourceImage,
    is_karpathy,
    karpathy_splits,
    parse_images,
    parse_json,
)

CHECK_PATHS = "check --images and --captions (for COCO run python sharding/download_coco.py first)"

_UNSAFE = re.compile(r"^\Z|^[/~]|^[A-Za-z]:|\\|(?<![^/])\.\.(?![^/])|://|::|[\x00-\x1f\x7f-\x9f]")

Answer = TypeVar("Answer")


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One image to pack: its id and its name (relative to the image folder), and its captions with their ids."""

    image_id: int | str
    file_name: str
    captions: tuple[str, ...]
    annotation_ids: tuple[int | str | None, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A split's caption file and the folder that its image names start from."""

    split: str
    captions: str
    images: str


# ---- which files ------------------------------------------------------------------------------------------


def find_sources(*, images: str, captions: str, split: str | None) -> list[Source]:
    """The splits to pack, training first. Raises UserError when there is none or it is not clear which is meant."""
    if not _attempt(storage.exists, captions):
        raise UserError(f"there is no caption file or folder {captions}: {CHECK_PATHS}")
    if not images.startswith(storage.WEB) and not _attempt(storage.exists, images):  # web servers seldom list folders
        raise UserError(f"there is no image folder {images}: {CHECK_PATHS}")
    found = _find_in_folder(captions) if _is_folder(captions) else _find_in_file(captions, split=split)
    if split is not None and split not in found:
        raise UserError(f"{captions} holds no captions of split {split} (it has: {', '.join(found)})")
    return [
        Source(split=name, captions=found[name], images=_image_folder(images, captions=found[name]))
        for name in SPLITS
        if name in found and split in (None, name)
    ]


def _attempt(action: Callable[[str], Answer], location: str) -> Answer:
    """`action(location)`; raises UserError for whatever goes wrong."""
    try:
        return action(location)
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"there is no {location}: {CHECK_PATHS}") from error
    except Exception as error:  # fsspec's file systems raise their libraries' own errors
        problem = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"cannot read {location} ({problem}): {CHECK_PATHS}") from error


def _is_folder(location: str) -> bool:
    """Whether a location has no suffix of a caption file, if it is a URL: listing it may download the whole file."""
    return _suffix(location) is None if storage.is_remote(location) else Path(location).is_dir()


def _suffix(location: str) -> str | None:
    return next((suffix for suffix in SUFFIXES if _last_part(location).lower().endswith(suffix)), None)


def _kind(location: str) -> str:
    suffix = _suffix(location)
    if suffix is None:
        raise UserError(f"{location} is no caption file: name one with suffix {', '.join(SUFFIXES)} with --captions")
    return suffix


def _last_part(location: str) -> str:
    """The name of a file or folder, without the quoting and the query of a web address."""
    if location.startswith(storage.WEB):
        location = unquote(location.partition("?")[0])
    return location.rstrip("/").rpartition("/")[2]


def _find_in_folder(folder: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in _attempt(storage.list_files, folder):
        split = _split_in_name(name)
        if split is None or _suffix(name) is None:
            continue
        location = storage.join(folder, name)
        if split in found:
            raise UserError(
                f"{folder} holds two caption files of split {split}, {_last_part(found[split])} and {name}: "
                f"name one with --captions {location}"
            )
        found[split] = location
    if not found:
        raise UserError(
            f"{folder} holds no captions_train*, captions_val* or captions_test* that ends in {', '.join(SUFFIXES)}: "
            f"{CHECK_PATHS}"
        )
    return found


def _find_in_file(path: str, *, split: str | None) -> dict[str, str]:
    kind = _kind(path)
    named = split or _split_in_name(_last_part(path))
    if named is not None:
        return {named: path}
    content = parse_json(_attempt(storage.read_bytes, path), location=path) if kind == ".json" else None
    if not is_karpathy(content):
        raise UserError(f"the name of {path} does not say which split it is: add --split train, val or test")
    return dict.fromkeys(sorted(karpathy_splits(content, location=path)), path)


def _split_in_name(name: str) -> str | None:
    match = re.match(r"captions_(train|val|test)", name)
    return match[1] if match else None


def _image_folder(images: str, *, captions: str) -> str:
    """COCO's layout: `captions_train2014.json` belongs to `train2014/`, where there is such a folder."""
    name = _last_part(captions)
    if _split_in_name(name) is None:
        return images
    inner = storage.join(images, Path(name).stem.removeprefix("captions_"))
    return inner if _attempt(storage.exists, inner) else images


# ---- what is in them --------------------------------------------------------------------------------------


def read_records(source: Source) -> tuple[list[Record], list[Failure]]:
    """The records of a split in the source's order, and a failure for all that cannot be packed.

    An image fails for "no caption", "unsafe name" or "duplicate id" (the first one counts); a caption for "empty
    caption" or "no image"; either for "bad row" or "bad encoding". An image whose captions all fail has none.
    Captions lose the white space around them; names stay as they are. Raises UserError when the file is no caption
    file or holds nothing of the split.
    """
    kind, data = _kind(source.captions), _attempt(storage.read_bytes, source.captions)
    records: list[Record] = []
    failures: list[Failure] = []
    seen: set[int | str] = set()
    for found in parse_images(data, kind=kind, split=source.split, location=source.captions):
        if isinstance(found, Failure):
            failures.append(found)
            continue
        if failure := _refuse(found, seen=seen):
            failures.append(failure)
            continue
        seen.add(found.image_id)
        numbers, captions = zip(*found.captions, strict=True)
        records.append(
            Record(image_id=found.image_id, file_name=found.file_name, captions=captions, annotation_ids=numbers)
        )
    return records, failures


def _refuse(image: SourceImage, *, seen: set[int | str]) -> Failure | None:
    """Why an image cannot be a record, if so; `seen` are the ids of those that are."""
    name, where = image.file_name, image.where
    if _UNSAFE.search(name):
        message = f"{where}: write {name!a} as a path below --images, with / between folders"
        return Failure(name=name, reason="unsafe name", message=message)
    if image.image_id in seen:
        return Failure(name=name, reason="duplicate id", message=where)
    return None if image.captions else Failure(name=name, reason="no caption", message=where)


# ---- what could not be packed -----------------------------------------------------------------------------


def failure_text(reasons: Mapping[str, int]) -> str:
    """Failures by reason in one cell of a table."""
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(reasons.items()) if count) or "none"


def describe_failures(failures: Sequence[Failure]) -> str:
    """The failures by reason, and the first of the commonest one: the end of an error that nothing could be packed."""
    if not failures:
        return ": name another file with --captions, or another --split"
    reasons = Counter(failure.reason for failure in failures)
    commonest = reasons.most_common(1)[0][0]
    first = next(failure for failure in failures if failure.reason == commonest)
    return f" ({failure_text(reasons)}), such as {first.name or 'a row'}: {commonest}, {first.message}"
