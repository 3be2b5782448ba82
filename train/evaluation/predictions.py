"""The captions that a model generated for the validation images, and their file. Imports no torch."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from captioner.attention import Attention
from captioner.errors import UserError
from captioner.files.storage import read_bytes, write_atomic

FIELDS = ("image_id", "caption", "score", "references")


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationCaption:
    """One validation image: its caption, mean log-probability a token, and the references.

    `attention` is where the caption's words looked, of the images that are shown and with a decoder that has it.
    """

    position: int
    image_id: int | str
    caption: str
    score: float
    references: list[str]
    attention: Attention | None = None


def read_captions(path: Path) -> list[ValidationCaption]:
    """The captions that `write_captions` wrote, with positions counted from 0. Raises UserError."""
    try:
        rows = read_bytes(str(path)).splitlines()
        return [ValidationCaption(position=number, **json.loads(row)) for number, row in enumerate(rows)]
    except (OSError, TypeError, ValueError) as error:
        raise UserError(
            f"cannot read {path} ({error}): restore it, or write an empty one for a model without confidence, and "
            "continue with --resume"
        ) from error


def write_captions(path: Path, rows: Sequence[ValidationCaption]) -> None:
    """Write the captions as JSONL, with these `FIELDS`."""
    fields = [{name: getattr(row, name) for name in FIELDS} for row in rows]
    write_atomic(str(path), "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in fields))
