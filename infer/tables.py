"""Tables of all rows for other programs: CSV for spreadsheets and for packing, and COCO results for evaluation.

Both are made from the merged rows, in constant memory, and replace their file at once.
"""

import csv
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Literal

from captioner.errors import UserError
from captioner.files import storage
from infer.corrections import roots_of
from infer.metadata.outcomes import Correct, Text
from infer.results import NOT_UTF8, as_utf8, read_rows, writing
from infer.row_index import LocationSet
from infer.templates import clean

Excel = Literal["comma", "semicolon"]
CSV_SUFFIXES = {".csv": ",", ".tsv": "\t"}
COLUMNS = (
    "alt",
    "confidence",
    "score",
    "review",
    "correction",
    "duplicate_of",
    "width",
    "height",
    "error",
    "message",
    "root",
)

_FORMULA = re.compile(r"[=+\-@\t\r]")
_COCO_NAME = re.compile(r"(?:COCO_[a-z]+\d{4}_)?(\d{12})")  # of 2014, of 2017


def check_table(path: Path, flag: str, suffixes: Iterable[str]) -> None:
    """Raise UserError if `path`, the value of `flag`, has none of the suffixes, or no file can be written there."""
    if path.suffix.lower() not in suffixes:
        raise UserError(f"{flag} {path} has another suffix: give a name that ends in {' or '.join(suffixes)}")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if path.is_dir() or not (above.is_dir() and os.access(above, os.W_OK)):
        raise UserError(f"{flag} {path} cannot be written: give a file in a folder that this user may write to")


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path), storage.replacing(path) as file:
        yield file


# ---- CSV --------------------------------------------------------------------------------------------------


def write_csv(
    output: Path,
    table: Path,
    *,
    text: Text | None = None,
    excel: Excel | None = None,
    correct: Correct | None = None,
) -> int:
    """Write the rows of `output` as a table; returns the number of names that are not UTF-8, so shown with U+FFFD.

    `image` and `caption` are the columns that sharding/make_shards.py reads; a failure has an empty caption. `image`
    starts from the folder that all local roots have in common. The column `text` exists if `text` makes it. `correct`
    gives a row a person's words; the column `correction` says "text" or "decorative". Lines end and cells are quoted as
    RFC 4180 says; a name with the suffix .tsv has tabs. With `excel` there is a byte order mark, and this separator;
    beside semicolons numbers have a decimal comma. Text that a spreadsheet would take for a formula has an apostrophe
    before it, in `image` instead ./, so that it is a name of the same file. Raises UserError if the disk is full, and
    OSError.
    """
    roots = roots_of(output)
    separator = {"comma": ",", "semicolon": ";"}[excel] if excel else CSV_SUFFIXES[table.suffix.lower()]
    num_shown = 0
    with _replacing(table) as file:
        lines = io.TextIOWrapper(file, "utf-8-sig" if excel else "utf-8", errors="strict", newline="")
        writer = csv.writer(lines, delimiter=separator)
        writer.writerow(["image", "caption", *(["text"] if text else []), *COLUMNS])
        for model_row in read_rows(output):
            row = correct(model_row) if correct else model_row
            name = roots[row["root"]]["prefix"] + row["path"]
            num_shown += NOT_UTF8.search(name) is not None
            cells = [row.get("caption"), *([text(row)] if text else []), *map(row.get, COLUMNS)]
            shown = (_cell(cell, decimal="," if separator == ";" else ".") for cell in cells)
            writer.writerow([_name_cell(name), *shown])
        lines.detach()
    return num_shown


def _cell(value: object, *, decimal: str) -> str:
    if isinstance(value, str):
        text = clean(value)
        return f"'{text}" if _FORMULA.match(text) else text
    return "" if value is None else str(value).replace(".", decimal)


def _name_cell(name: str) -> str:
    """The name, unchanged where it is valid: white space belongs to it."""
    shown = as_utf8(name)
    return f"./{shown}" if _FORMULA.match(shown) else shown


# ---- COCO results -----------------------------------------------------------------------------------------


def write_coco_results(output: Path, results: Path) -> Counter[str]:
    """Write the captions in `output` as COCO results, `[{"image_id": 391895, "caption": "a man"}]`.

    An image with COCO's name (COCO_val2014_000000391895.jpg, 000000391895.jpg) has its number as id, any other its
    path, which train/evaluate.py finds among the file names of the references. Files without a caption, and images with
    the same id as an earlier one, are left out; returns their counts by reason. Raises UserError if the disk is full,
    and OSError.
    """
    left_out: Counter[str] = Counter()
    seen = LocationSet()
    separator = b"\n"
    with _replacing(results) as file:
        file.write(b"[")
        for row in read_rows(output):
            if "error" in row:
                left_out["files that have no caption"] += 1
                continue
            image_id = coco_id(row["path"])
            if not seen.add(str(image_id)):
                left_out["images that have the id of an earlier one"] += 1
                continue
            file.write(separator + json.dumps({"image_id": image_id, "caption": row["caption"]}).encode())
            separator = b",\n"
        file.write(b"\n]\n")
    return left_out


def coco_id(path: str) -> int | str:
    """The number in COCO's name of an image, or else the path."""
    found = _COCO_NAME.fullmatch(PurePosixPath(path).stem)
    return int(found[1]) if found else path
