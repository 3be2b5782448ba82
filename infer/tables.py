"""Tables of all rows for other programs: CSV for spreadsheets and for packing, and COCO results for evaluation.

Both are made from the merged rows, in constant memory, and replace their file at once.
"""

import csv
import io
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Literal

from captioner.errors import UserError
from captioner.files import storage
from captioner.files.tables import DELIMITERS, read_table
from infer.corrections import DECORATIVE, Correction, name_in_images, roots_of
from infer.metadata.outcomes import Correct, Text
from infer.results import NOT_UTF8, as_utf8, read_rows, writing
from infer.row_index import LocationSet
from infer.templates import clean
from infer.written import Entry, Written

Excel = Literal["comma", "semicolon"]
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
    "sha256",
    "caption_before",
    "alt_before",
)
KINDS = ("", "text", "decorative")  # of corrections
REQUIRED = ("image", "caption", "caption_before", "correction")

_FORMULA = re.compile(r"[=+\-@\t\r]")
_COCO_NAME = re.compile(r"(?:COCO_[a-z]+\d{4}_)?(\d{12})")  # of 2014, of 2017


def check_table(path: Path, flag: str, suffixes: Iterable[str]) -> None:
    """Raise UserError if `path`, the value of `flag`, has none of the suffixes, or no file can be written there."""
    if path.suffix.lower() not in suffixes:
        raise UserError(f"{flag} {path} has another suffix: give a name that ends in {' or '.join(suffixes)}")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if path.is_dir() or not (above.is_dir() and os.access(above, os.W_OK)):
        raise UserError(f"{flag} {path} cannot be written: give a file in a folder that this user may write to")


class TableChangedError(UserError):
    """A table is not what this program wrote there last."""


def is_changed(table: Path, written: Written) -> bool:
    """Whether an existing file is not what this program wrote there last. Raises OSError."""
    path = Path(os.path.realpath(table))
    entry = written.get(path)
    return path.exists() and (entry is None or storage.file_sha256(path) not in entry.text.split())


def is_own(table: Path, written: Written) -> bool:
    """Whether this program has written a table, which somebody may have changed since."""
    return written.get(Path(os.path.realpath(table))) is not None


def check_unedited(table: Path, written: Written, *, taken: str = "") -> None:
    """Raise TableChangedError for an existing file that is not what this program wrote there last.

    So neither what somebody changed in a table is lost, nor a file of another program. `taken` is the checksum of a
    table whose corrections are taken, which may be replaced.
    """
    if not is_changed(table, written) or storage.file_sha256(table) == taken:
        return
    is_csv = table.suffix.lower() in DELIMITERS
    if not is_own(table, written):
        use = f"--corrections {table} takes what was corrected in it; or " if is_csv else ""
        raise TableChangedError(f"{table} is there, and not of this --output: {use}give another name, or delete it")
    remedy = "the same command takes what was corrected in it" if is_csv else "give another name, or delete it"
    raise TableChangedError(f"{table} has been changed since this command read or wrote it: {remedy}")


def edited_path(table: Path) -> Path:
    """Where a table is kept that somebody changed, and whose corrections were taken."""
    return table.with_name(f"{table.name}.edited")


@contextmanager
def _replacing(table: Path, written: Written | None, taken: str) -> Iterator[BinaryIO]:
    """The new content of a table; without `written` it replaces any file. Raises TableChangedError."""
    path = Path(os.path.realpath(table))
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path), storage.replacing(path) as file:
        yield file
        if written is not None:
            file.flush()
            check_unedited(table, written, taken=taken)  # again: it may have been changed meanwhile
            _note(path, Path(file.name), written)


def _note(path: Path, new: Path, written: Written) -> None:
    """Note the checksum of the new table before it replaces the old one, beside the old one's: a kill may come between.

    An old one that somebody changed is kept beside it, as only its corrections were taken.
    """
    checksums = [storage.file_sha256(new)]
    if is_changed(path, written):
        shutil.copy2(path, edited_path(path))
    elif path.exists():
        checksums.append(storage.file_sha256(path))
    written.set(path, Entry(text=" ".join(checksums)))


# ---- CSV --------------------------------------------------------------------------------------------------


def write_csv(
    output: Path,
    table: Path,
    *,
    text: Text | None = None,
    excel: Excel | None = None,
    correct: Correct | None = None,
    written: Written | None = None,
    taken: str = "",
) -> int:
    """Write the rows of `output` as a table; returns the number of names that are not UTF-8, so shown with U+FFFD.

    `image` and `caption` are the columns that sharding/make_shards.py reads; a failure has an empty caption. `image`
    starts from the folder that all local roots have in common. The column `text` exists if `text` makes it. `correct`
    gives a row a person's words; the column `correction` says "text" or "decorative", and `caption_before` and
    `alt_before` repeat the texts, so that `read_edited` finds what somebody changed in the table. Lines end and
    cells are quoted as RFC 4180 says; a name with the suffix .tsv has tabs. With `excel` there is a byte order mark,
    and this separator; beside semicolons numbers have a decimal comma. Text that a spreadsheet would take for a formula
    has an apostrophe before it, in `image` instead ./, so that it is a name of the same file. `written` notes what is
    written; without it any file is replaced. Raises TableChangedError as `check_unedited`, with the checksum `taken`,
    UserError if the disk is full, and OSError.
    """
    roots = roots_of(output)
    separator = {"comma": ",", "semicolon": ";"}[excel] if excel else DELIMITERS[table.suffix.lower()]
    num_shown = 0
    with _replacing(table, written, taken) as file:
        lines = io.TextIOWrapper(file, "utf-8-sig" if excel else "utf-8", errors="strict", newline="")
        writer = csv.writer(lines, delimiter=separator)
        writer.writerow(["image", "caption", *(["text"] if text else []), *COLUMNS])
        for model_row in read_rows(output):
            row = correct(model_row) if correct else model_row
            name = name_in_images(row, roots[row["root"]])
            num_shown += NOT_UTF8.search(name) is not None
            values = row | {f"{name}_before": row.get(name) for name in ("caption", "alt")}
            cells = [row.get("caption"), *([text(row)] if text else []), *map(values.get, COLUMNS)]
            shown = (_cell(cell, decimal="," if separator == ";" else ".") for cell in cells)
            writer.writerow([_name_cell(name), *shown])
        lines.detach()
    return num_shown


def _cell(value: object, *, decimal: str) -> str:
    if isinstance(value, str):
        text = "\n".join(map(clean, value.splitlines())).strip()
        return f"'{text}" if _FORMULA.match(text) else text
    return "" if value is None else str(value).replace(".", decimal)


def _name_cell(name: str) -> str:
    """The name, unchanged where it is valid: white space belongs to it."""
    shown = as_utf8(name)
    return f"./{shown}" if _FORMULA.match(shown) else shown


def read_edited(table: Path) -> tuple[list[Correction], list[Correction]]:
    """The corrections with which `write_csv` wrote a table, and those that somebody made in it since.

    A caption or an alternative text that is not as it was written is a correction, and so is "decorative" in the column
    `correction` where the caption is unchanged or empty; a caption that was deleted is none. The table may have been
    sorted, and lack lines, and columns that are not REQUIRED. Raises UserError for another table, and OSError.
    """
    delimiter = DELIMITERS[table.suffix.lower()]
    columns, rows = read_table(table.read_bytes(), delimiter=delimiter, required=REQUIRED, location=str(table))
    if "alt" in columns and "alt_before" not in columns:
        raise UserError(f"{table} has a column alt, but no alt_before: delete alt, or take the table as it was written")
    written, made = [], []
    for number, cells in rows:
        problem = ""
        if len(cells) != len(columns):
            problem = f"has {len(cells)} cells, not {len(columns)}: repair it"
        elif any(map(NOT_UTF8.search, cells)):
            problem = "is not UTF-8: save the table as CSV UTF-8"
        if problem:
            raise UserError(f"line {number} of {table} {problem}")
        row = dict(zip(columns, cells, strict=True))
        texts = {name: _value(cell) for name, cell in row.items()}
        if texts["correction"].lower() not in KINDS:
            raise UserError(
                f"line {number} of {table} has the correction {texts['correction']!r}: write decorative, or type the "
                "text into the column caption"
            )
        caption, is_made = _correction_in(texts)
        if caption is not None:
            root, sha256 = texts.get("root", ""), texts.get("sha256") or None
            images = root if storage.is_remote(root) else None
            found = Correction(path=_name(row["image"]), caption=caption, images=images, sha256=sha256)
            (made if is_made else written).append(found)
    return written, made


def _correction_in(row: Mapping[str, str]) -> tuple[str | None, bool]:
    """What a row of a table says instead of the model, None for nothing, and whether it was not written so."""
    caption, before, alt = row["caption"], row["caption_before"], row.get("alt", "")
    kind = row["correction"].lower()
    if kind == "decorative" and caption in ("", before):
        return DECORATIVE, bool(before)
    if caption not in ("", before):
        return caption, True
    if alt not in ("", row.get("alt_before", alt)):
        return alt, True
    return (caption or None) if kind == "text" else None, False


def _value(cell: str) -> str:
    """The text in a cell, without the apostrophe that `_cell` added."""
    text = cell.strip()
    return text[1:] if text.startswith("'") and _FORMULA.match(text[1:]) else text


def _name(cell: str) -> str:
    """The name in a cell, without what `_name_cell` added."""
    return cell[2:] if cell.startswith("./") and _FORMULA.match(cell[2:]) else cell


# ---- COCO results -----------------------------------------------------------------------------------------


def write_coco_results(output: Path, results: Path, *, written: Written | None = None) -> Counter[str]:
    """Write the captions in `output` as COCO results, `[{"image_id": 391895, "caption": "a man"}]`.

    An image with COCO's name (COCO_val2014_000000391895.jpg, 000000391895.jpg) has its number as id, any other its
    path, which train/evaluate.py finds among the file names of the references. Files without a caption, and images with
    the same id as an earlier one, are left out; returns their counts by reason. Raises UserError as `check_unedited`
    does, and if the disk is full; and OSError.
    """
    left_out: Counter[str] = Counter()
    seen = LocationSet()
    separator = b"\n"
    with _replacing(results, written, "") as file:
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
