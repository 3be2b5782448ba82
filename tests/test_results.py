"""Rows survive kills, odd names and several processes."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from captioner.cli import UserError
from infer.results import FORMAT_VERSION, Row, RowWriter, find_parts, merge, part_path, read_rows, to_line


def row(path: str, *, root: str = "photos", caption: str = "a cat") -> Row:
    return {"root": root, "path": path, "format_version": FORMAT_VERSION, "model": "m", "caption": caption}


def append(output: Path, rank: int, rows: list[Row]) -> None:
    writer = RowWriter(part_path(output, rank))
    writer.write(rows)
    writer.close()


def test_there_are_no_rows_before_the_first_run(tmp_path: Path) -> None:
    assert read_rows(tmp_path / "none" / "captions.jsonl") == []


def test_rows_can_be_read_as_soon_as_they_are_written(tmp_path: Path) -> None:
    """Without closing: a kill takes nothing that `write` returned from."""
    output = tmp_path / "new folder" / "captions.jsonl"
    writer = RowWriter(part_path(output, 0))
    writer.write([row("a.jpg"), row("b.jpg")])
    assert read_rows(output) == [row("a.jpg"), row("b.jpg")]
    writer.close()


@given(
    paths=st.lists(st.text(min_size=1), unique=True, min_size=1, max_size=8),
    lost=st.integers(1, 60),
)
@settings(deadline=None, max_examples=60)
def test_a_torn_last_row_is_cut_and_done_again(
    tmp_path_factory: pytest.TempPathFactory, paths: list[str], lost: int
) -> None:
    output = tmp_path_factory.mktemp("torn") / "captions.jsonl"
    rows = [row(path) for path in paths]
    append(output, 0, rows)
    part = part_path(output, 0)
    part.write_bytes(part.read_bytes()[:-lost])
    assert read_rows(output) == rows[:-1]
    append(output, 0, rows[-1:])
    assert read_rows(output) == rows
    merge(output)
    assert sorted(map(to_line, read_rows(output))) == sorted(map(to_line, rows))


def test_a_row_that_lacks_only_its_line_end_is_neither_lost_nor_doubled(tmp_path: Path) -> None:
    output = tmp_path / "captions.jsonl"
    part_path(output, 0).write_text(to_line(row("a.jpg")).rstrip("\n"))
    left = [path for path in ("a.jpg", "b.jpg") if path not in {done["path"] for done in read_rows(output)}]
    append(output, 0, [row(path) for path in left])
    assert merge(output) == [row("a.jpg"), row("b.jpg")]


def test_parts_are_merged_sorted_by_place_and_removed(tmp_path: Path) -> None:
    output = tmp_path / "captions.jsonl"
    append(output, 0, [row("b.jpg"), row("a.jpg", root="z")])
    append(output, 11, [row("a/c.jpg"), row("B.jpg")])
    merged = merge(output)
    assert [(r["root"], r["path"]) for r in merged] == [
        ("photos", "B.jpg"),
        ("photos", "a/c.jpg"),
        ("photos", "b.jpg"),
        ("z", "a.jpg"),
    ]
    assert read_rows(output) == merged
    assert list(tmp_path.iterdir()) == [output]


def test_a_kill_between_merging_and_removing_the_parts_doubles_nothing(tmp_path: Path) -> None:
    output = tmp_path / "captions.jsonl"
    append(output, 0, [row("a.jpg")])
    part = part_path(output, 0)
    content = part.read_bytes()
    merge(output)
    part.write_bytes(content)
    assert merge(output) == [row("a.jpg")]


def test_merging_again_changes_no_byte(tmp_path: Path) -> None:
    output = tmp_path / "captions.jsonl"
    append(output, 0, [row(f"{number}.jpg") for number in range(20)])
    merge(output)
    content = output.read_bytes()
    merge(output)
    assert output.read_bytes() == content


def test_an_output_with_glob_signs_in_its_name_keeps_its_parts(tmp_path: Path) -> None:
    output = tmp_path / "run[1]*?.jsonl"
    append(output, 0, [row("a.jpg")])
    append(tmp_path / "run1.jsonl", 0, [row("of another run")])
    assert find_parts(output) == [part_path(output, 0)]
    assert merge(output) == [row("a.jpg")]
    assert part_path(tmp_path / "run1.jsonl", 0).exists()


@pytest.mark.parametrize(
    "path", [os.fsdecode(b"bad\xff\xfe.jpg"), "new\nline.jpg", "\u2028.jpg", "\x85\x1c.jpg", 'über "straße"\\.jpg']
)
def test_any_file_name_survives(tmp_path: Path, path: str) -> None:
    output = tmp_path / "captions.jsonl"
    append(output, 0, [row(path, caption=path), row("other.jpg")])
    merge(output)
    assert row(path, caption=path) in read_rows(output)
    assert output.read_bytes().isascii()
    assert output.read_bytes().count(b"\n") == 2
    assert os.fsencode(json.loads(to_line(row(path)))["path"]) == os.fsencode(path)


@pytest.mark.parametrize(
    "content",
    [
        b"a shopping list\n",
        b"a shopping list",
        b"\xff\xd8\xff\xe0 a picture \x1c",
        b'{"a": 1}\n',
        b'{"a": 1}',
        b"[]\n",
        b"\n",
        to_line(row("a.jpg")).replace('"format_version": 1', '"format_version": 2').encode(),
    ],
)
def test_a_foreign_output_is_refused_and_left_as_it_is(tmp_path: Path, content: bytes) -> None:
    output = tmp_path / "captions.jsonl"
    output.write_bytes(content)
    for reader in (read_rows, merge):
        with pytest.raises(UserError, match=r"line 1 of .*captions\.jsonl is no row") as caught:
            reader(output)
        assert "\n" not in str(caught.value)
    assert output.read_bytes() == content


def test_the_line_of_a_bad_row_is_named(tmp_path: Path) -> None:
    output = tmp_path / "captions.jsonl"
    output.write_text(to_line(row("a.jpg")) + "oops\n" + to_line(row("b.jpg")))
    with pytest.raises(UserError, match="line 2"):
        read_rows(output)
