"""Reads tables as spreadsheets save them: CSV and TSV, with the separator of the computer's region."""

import codecs
import csv
import io
import reprlib
from collections.abc import Iterator, Sequence

from captioner.errors import UserError

DELIMITERS = {".csv": ",", ".tsv": "\t"}
DELIMITERS_OF_SPREADSHEETS = (",", ";", "\t")  # by region and program, whatever the file's suffix


def read_table(
    data: bytes, *, delimiter: str, required: Sequence[str], location: str
) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    """The names of the columns, and the rows: the number of each one's first line, and its cells.

    The columns may also be separated as spreadsheets do where the comma is the decimal sign. A row may have more or
    fewer cells than there are columns; one that cannot be parsed is one cell. Bytes that are not UTF-8 are surrogates.
    Raises UserError, with `location`, unless each of the `required` columns exists once.
    """
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{location} is UTF-16: save it as CSV UTF-8")
    text = data.decode("utf-8-sig", "surrogateescape")
    headers: list[list[str]] = []
    for each in (delimiter, *DELIMITERS_OF_SPREADSHEETS):
        rows = _split(text, each)
        columns = [cell.strip() for cell in next(rows, (1, []))[1]]
        if all(columns.count(name) == 1 for name in required):
            return columns, rows
        headers.append(columns)
    found = ", ".join(map(reprlib.repr, headers[0][:20])) or "none"
    wanted = " and ".join((", ".join(map(repr, required[:-1])), repr(required[-1])))
    raise UserError(
        f"the first line of {location} names the columns {found}: give it the columns {wanted}, "
        f"each once, with {delimiter!r} between them, in UTF-8"
    )


def _split(text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The number of each row's first line, and its cells. A line that cannot be parsed is one cell. Skips blank lines.

    After such a line parsing continues with the next one, so that a quote that is never closed costs one row only.
    """
    lines = io.StringIO(text, newline="").readlines()
    del text
    position = 0
    while position < len(lines):
        rows = csv.reader(map(lines.__getitem__, range(position, len(lines))), delimiter=delimiter, strict=True)
        try:
            cells, num_lines = next(rows), rows.line_num
        except csv.Error:
            cells, num_lines = [lines[position]], 1
        if lines[position].strip("\r\n"):
            yield position + 1, cells
        position += num_lines
