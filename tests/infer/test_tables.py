"""Tables of rows: what spreadsheets and packing read, what no name can break, COCO results that evaluation reads."""

import csv
import io
import json
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import captioned, failed

from captioner.errors import UserError
from captioner.files import storage
from infer import gallery
from infer.corrections import DECORATIVE, Correction, Corrections, correct_row, roots_of
from infer.extras import write_again, write_extras
from infer.results import Row, to_line
from infer.settings import CaptionSettings, check_flags
from infer.tables import COLUMNS, check_table, coco_id, write_coco_results, write_csv
from infer.templates import Template
from sharding.packing.sources import Source, read_records
from train.evaluate import main as evaluate
from train.evaluation.settings import EvaluateSettings

FORMULAS = ("=cmd|' /C calc'!A0", "+1", "-rf", "@SUM(A1)", "\t=1", "\r=1")


def write_rows(folder: Path, rows: Iterable[Row]) -> Path:
    output = folder / "rows.jsonl"
    output.write_text("".join(map(to_line, rows)))
    return output


def table_of(folder: Path, rows: Iterable[Row], **options: Any) -> list[dict[str, str]]:
    """The table's rows, as a CSV reader gives them."""
    write_csv(write_rows(folder, rows), folder / "t.csv", **options)
    return list(csv.DictReader(io.StringIO((folder / "t.csv").read_bytes().decode(), newline="")))


def packed(table: Path) -> dict[str, tuple[str, ...]]:
    """The captions of each image in a table, as make_shards.py reads them."""
    records, _ = read_records(Source(split="train", captions=str(table), images="photos"))
    return {record.file_name: record.captions for record in records}


# ---- CSV --------------------------------------------------------------------------------------------------


def test_a_table_has_all_rows_and_the_text_of_a_template(tmp_path: Path) -> None:
    rows = [captioned("a.jpg", confidence=0.25, caption='a "cat", black'), failed("b.jpg")]
    first, second = table_of(tmp_path, rows, text=Template("{alt} {name}").text)
    assert first | {"width": "640", "height": "480"} == first
    assert (first["image"], first["caption"], first["text"]) == ("a.jpg", 'a "cat", black', "A cat. a.jpg")
    assert (first["confidence"], first["score"], first["duplicate_of"]) == ("0.25", "-0.5", "")
    assert (second["caption"], second["text"], second["error"]) == ("", "", "truncated")
    assert (tmp_path / "t.csv").read_bytes().count(b"\r\n") == 3
    assert list(table_of(tmp_path, rows)[0]) == ["image", "caption", *COLUMNS]


def test_a_table_has_what_a_person_wrote_instead_of_what_the_model_says(tmp_path: Path) -> None:
    """Text or decorative, found by name or by bytes, from the folder that all roots have in common."""
    rows = [
        captioned("a.jpg", root="site/img", confidence=0.25, review="unlike training data"),
        captioned("b.gif", root="site/img", confidence=0.25),
        captioned("c.jpg", root="site/shop", content="moved", confidence=0.25),
        captioned("d.jpg", root="site/shop", confidence=0.25),
        failed("e.jpg", root="site/shop"),
    ]
    common = str(Path("site").absolute())
    written = Corrections(
        [
            Correction(path="img/a.jpg", caption="Our logo", images=common),
            Correction(path="img/b.gif", caption=DECORATIVE, images=common),
            Correction(path="old.jpg", caption="Our shop", images="elsewhere", sha256=rows[2].get("sha256")),
            Correction(path="shop/e.jpg", caption="unseen", images=common),
        ]
    )
    roots = roots_of(write_rows(tmp_path, rows))
    correct = partial(correct_row, written=written, roots=roots)
    table = table_of(tmp_path, rows, correct=correct, text=Template("{alt}").text)
    keys = ("image", "caption", "alt", "text", "correction", "confidence", "review")
    assert [tuple(row[key] for key in keys) for row in table] == [
        ("img/a.jpg", "Our logo", "Our logo", "Our logo", "text", "", ""),
        ("img/b.gif", "", "", "", "decorative", "", ""),
        ("shop/c.jpg", "Our shop", "Our shop", "Our shop", "text", "", ""),
        ("shop/d.jpg", "a cat", "A cat.", "A cat.", "", "0.25", ""),
        ("shop/e.jpg", "", "", "", "", "", ""),
    ]


def test_the_command_takes_corrections_from_the_gallery_and_the_downloaded_file(tmp_path: Path) -> None:
    output = write_rows(tmp_path, [captioned("a.jpg"), captioned("b.jpg")])
    gallery, downloaded, table = tmp_path / "gallery", tmp_path / "corrections.jsonl", tmp_path / "t.csv"
    gallery.mkdir()
    (gallery / "corrections.jsonl").write_text('{"path": "a.jpg", "captions": ["kept"], "images": "photos"}\n')
    downloaded.write_text('{"path": "b.jpg", "decorative": true, "images": "photos"}\n')
    choices = CaptionSettings(images=("photos",), output=output, csv=table, gallery=gallery, corrections=downloaded)
    write_extras(choices)
    rows = csv.DictReader(io.StringIO(table.read_text(), newline=""))
    assert [(row["alt"], row["correction"]) for row in rows] == [("kept", "text"), ("", "decorative")]


NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\\:~/"), min_size=1).filter(
    lambda name: name.strip(".") != ""
)


@settings(deadline=None)  # files are flushed to disk
@given(
    st.dictionaries(NAMES, st.text(st.characters(exclude_categories=["Cs", "Cc", "Zs", "Zl", "Zp"]) | st.just(" "))),
    st.sampled_from([None, "comma", "semicolon"]),
    st.sampled_from([".csv", ".tsv"]),
)
def test_packing_reads_the_captions_that_were_written(
    tmp_path_factory: pytest.TempPathFactory, captions: dict[str, str], excel: Any, suffix: str
) -> None:
    """But for a caption that begins like a formula, which has an apostrophe before it."""
    folder = tmp_path_factory.mktemp("tables")
    table = folder / f"t{suffix}"
    output = write_rows(folder, [captioned(name, caption=caption) for name, caption in captions.items()])
    assert write_csv(output, table, excel=excel) == 0
    expected = {}
    for name, caption in captions.items():
        text = " ".join(caption.split())
        if text:
            shown = f"'{text}" if text[0] in "=+-@" else text
            expected[f"./{name}" if name[0] in "=+-@" else name] = (shown,)
    assert packed(table) == expected


@pytest.mark.parametrize("name", FORMULAS)
def test_nothing_in_a_table_is_a_formula(tmp_path: Path, name: str) -> None:
    """Of names, captions, texts and messages; numbers stay numbers, and packing finds the file."""
    row = captioned(f"{name}.jpg", caption=name, root=name, alt=name, review=name, duplicate_of=name)
    (cells,) = table_of(tmp_path, [row], text=Template("{caption}").text)
    assert [cell for cell in cells.values() if cell[:1] in ("=", "+", "-", "@", "\t", "\r")] == ["-0.5"]
    assert os.path.normpath(cells["image"]) == f"{name}.jpg"


def test_names_that_are_not_utf8_are_shown_and_counted(tmp_path: Path) -> None:
    output = write_rows(tmp_path, [captioned(os.fsdecode(b"a\xff.jpg")), captioned("b.jpg")])
    assert write_csv(output, tmp_path / "t.csv") == 1
    assert packed(tmp_path / "t.csv") == {"a\N{REPLACEMENT CHARACTER}.jpg": ("a cat",), "b.jpg": ("a cat",)}


def test_image_names_start_from_the_folder_that_all_roots_have_in_common(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [
        captioned("a.jpg", root="photos/x"),
        captioned("b.jpg", root="photos/y/z"),
        captioned("c.jpg", root="s3://b"),
    ]
    assert [row["image"] for row in table_of(tmp_path, rows)] == ["x/a.jpg", "y/z/b.jpg", "c.jpg"]


def test_excel_has_a_mark_its_separator_and_its_decimal_sign(tmp_path: Path) -> None:
    output = write_rows(tmp_path, [captioned("a.jpg", confidence=0.25, caption="a; b, c")])
    write_csv(output, tmp_path / "t.csv", excel="semicolon")
    header, line = (tmp_path / "t.csv").read_bytes().decode("utf-8").splitlines()
    assert header.startswith("\ufeffimage;caption;alt;confidence")
    assert line.startswith('a.jpg;"a; b, c";A cat.;0,25;-0,5;')
    write_csv(output, tmp_path / "t.csv", excel="comma")
    assert (tmp_path / "t.csv").read_bytes().startswith(b"\xef\xbb\xbfimage,caption,alt")


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_table_comes_back_from_any_spreadsheet(tmp_path: Path, separator: str, encoding: str) -> None:
    """Corrected, with every cell in quotes, and columns moved, as spreadsheets save it."""
    rows = [captioned("-a.jpg"), captioned("b.jpg"), failed("c.jpg")]
    cells = table_of(tmp_path, rows)
    cells[1]["caption"] = 'a "dog"; brown,\tnot a cat'
    with (tmp_path / "saved.csv").open("w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, [*reversed(cells[0])], delimiter=separator, quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(cells)
    assert packed(tmp_path / "saved.csv") == {"./-a.jpg": ("a cat",), "b.jpg": ('a "dog"; brown,\tnot a cat',)}


@pytest.mark.external
@pytest.mark.skipif(shutil.which("ssconvert") is None, reason="needs Gnumeric's ssconvert")
@pytest.mark.parametrize("excel", [None, "comma"])
def test_a_real_spreadsheet_reads_the_table_and_packing_reads_what_it_saves(tmp_path: Path, excel: Any) -> None:
    rows = [
        captioned("=1+1.jpg", review="=2+3"),
        captioned("été.jpg", caption='a "cat"; black, small'),
        failed("c.jpg"),
    ]
    write_csv(write_rows(tmp_path, rows), tmp_path / "t.csv", excel=excel)
    for options, source, target in (
        ([], "t.csv", "t.xlsx"),
        (["-O", "separator=; format=preserve"], "t.xlsx", "saved.txt"),
    ):
        subprocess.run(["ssconvert", *options, source, target], cwd=tmp_path, check=True, capture_output=True)
    (tmp_path / "saved.txt").rename(tmp_path / "saved.csv")
    assert re.search(r";'?=2\+3;", (tmp_path / "saved.csv").read_text())  # not 5
    assert packed(tmp_path / "saved.csv") == {"./=1+1.jpg": ("a cat",), "été.jpg": ('a "cat"; black, small',)}


def test_a_full_disk_leaves_the_earlier_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*_: object) -> Any:
        raise OSError(28, os.strerror(28))

    (tmp_path / "t.csv").write_text("earlier")
    output = write_rows(tmp_path, [captioned("a.jpg")])
    monkeypatch.setattr("captioner.files.storage.os.fsync", fill)
    for write in (write_csv, write_coco_results):
        with pytest.raises(UserError, match=r"t\.csv.*make room"):
            write(output, tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_text() == "earlier"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl", "t.csv"]


def test_tables_that_cannot_be_written_are_refused_before(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.csv").mkdir()
    for name in ("a.txt", "a", "file/a.csv", "folder.csv"):
        with pytest.raises(UserError, match="--csv"):
            check_table(tmp_path / name, "--csv", [".csv", ".tsv"])
    check_table(tmp_path / "new" / "folder" / "a.CSV", "--csv", [".csv", ".tsv"])


# ---- corrections in a table -------------------------------------------------------------------------------

EDITS = st.sampled_from(["none", "caption", "alt", "decorative", "cleared"])
WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(
    lambda text: " ".join(text.split()) == text != ""
)


def edit_table(table: Path, edits: dict[str, dict[str, str]], *, suffix: str = ".csv", delimiter: str = ",") -> Path:
    """The table as a person saves it: cells changed by image, and rows in another order."""
    rows = list(csv.DictReader(io.StringIO(table.read_bytes().decode("utf-8-sig"), newline="")))
    for row in rows:
        row.update(edits.get(row["image"], {}))
    edited = table.with_name(f"edited{suffix}")
    with edited.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(reversed(rows))
    return edited


@settings(deadline=None)
@given(
    st.dictionaries(NAMES, st.tuples(WORDS, EDITS, WORDS), min_size=1),
    st.sampled_from([(".csv", ","), (".csv", ";"), (".tsv", "\t")]),
)
def test_what_somebody_changed_in_a_table_is_theirs(
    tmp_path_factory: pytest.TempPathFactory, edits: dict[str, tuple[str, str, str]], form: tuple[str, str]
) -> None:
    """A text that begins like a formula as well; nothing else is, and a second table says the same."""
    folder = tmp_path_factory.mktemp("tables")
    rows = [captioned(name, caption=caption, alt=f"{caption}.") for name, (caption, _, _) in edits.items()]
    output = write_rows(folder, rows)
    write_csv(output, folder / "t.csv")
    cells, expected = {}, {}
    for name, (caption, kind, text) in edits.items():
        shown = f"./{name}" if name[0] in "=+-@" else name
        changed = {"caption": {"caption": text}, "alt": {"alt": text}, "decorative": {"correction": "Decorative"}}
        cells[shown] = changed.get(kind, {"caption": ""} if kind == "cleared" else {})
        if kind == "decorative":
            expected[name] = DECORATIVE
        elif (kind == "caption" and text != caption) or (kind == "alt" and text != f"{caption}."):
            expected[name] = text.removeprefix("'") if re.match("'[=+@-]", text) else text
    edited = edit_table(folder / "t.csv", cells, suffix=form[0], delimiter=form[1])
    for _ in range(2):
        corrections = gallery.read_corrections(None, [gallery.Source(edited)])
        correct = partial(correct_row, written=corrections, roots=roots_of(output))
        found = {row["path"]: said for row in rows if (said := correct(row)) is not row}
        assert {name: said["alt"] for name, said in found.items()} == expected
        write_csv(output, folder / "t.csv", correct=correct)
        edited = edit_table(folder / "t.csv", {}, suffix=form[0], delimiter=form[1])


def test_a_newer_correction_in_the_gallery_counts_more_than_what_a_table_was_written_with(tmp_path: Path) -> None:
    rows = [captioned(name) for name in ("a.jpg", "b.jpg", "c.jpg")]
    output = write_rows(tmp_path, rows)

    def say(word: str) -> Corrections:
        names = ("a.jpg", "b.jpg")
        return Corrections(Correction(path=name, caption=f"{word} {name}", images="photos") for name in names)

    first, newer = say("first"), say("newer")
    write_csv(output, tmp_path / "t.csv", correct=partial(correct_row, written=first, roots=roots_of(output)))
    (tmp_path / "gallery").mkdir()
    (tmp_path / "gallery" / "corrections.jsonl").write_text(newer.to_jsonl())
    edited = edit_table(tmp_path / "t.csv", {"b.jpg": {"caption": "of the table"}})
    said = gallery.read_corrections(tmp_path / "gallery", [gallery.Source(edited)])
    found = [said.find(images="photos", path=row["path"], sha256=row["sha256"]) for row in rows]
    assert found == ["newer a.jpg", "of the table", None]


def test_names_that_a_table_cannot_show_are_found_by_their_bytes(tmp_path: Path) -> None:
    names = [os.fsdecode(b"a\xff.jpg"), "two\nlines.jpg", "-x.jpg"]
    rows = [captioned(name) for name in names]
    output = write_rows(tmp_path, rows)
    write_csv(output, tmp_path / "t.csv")
    cells = list(csv.DictReader(io.StringIO((tmp_path / "t.csv").read_bytes().decode(), newline="")))
    edited = edit_table(tmp_path / "t.csv", {row["image"]: {"caption": f"text {row['sha256']}"} for row in cells})
    said = gallery.read_corrections(None, [gallery.Source(edited)])
    for row in rows:
        assert correct_row(row, said, roots=roots_of(output)).get("caption") == f"text {row.get('sha256')}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("image,caption\na.jpg,mine\n", "'caption', 'caption_before' and 'correction', each once"),
        ("", "names the columns none"),
        ("image,caption,caption_before,correction\na.jpg,mine\n", "line 2 of .* has 2 cells, not 4: repair it"),
        (
            "image,caption,caption_before,correction\na.jpg,a,a,decor\n",
            "has the correction 'decor': write",
        ),
        ("image,caption,caption_before,correction,alt\na,a,a,,b\n", "has a column alt, but no alt_before"),
        ("image,caption,caption_before,correction\na,é,b,\n", "line 2 of .* is not UTF-8: save the table as CSV UTF-8"),
    ],
)
def test_a_table_without_what_was_written_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "t.csv").write_bytes(content.encode("latin-1"))
    choices = CaptionSettings(images=("photos",), corrections=tmp_path / "t.csv", csv=tmp_path / "new.csv")
    with pytest.raises(UserError, match=message):
        check_flags(choices)


# ---- tables that are there already ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["csv", "coco"])
def test_a_file_of_another_program_is_never_replaced(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither before the job, nor where a table is written, as that may be hours later."""
    output = write_rows(tmp_path, [captioned("a.jpg")])
    table = tmp_path / ("t.csv" if kind == "csv" else "r.json")
    flag: Any = {"csv": table} if kind == "csv" else {"coco_results": table}
    choices = CaptionSettings(images=("photos",), output=output, **flag)
    table.write_text("of another program")
    with pytest.raises(UserError, match="is there, and not of this --output"):
        check_flags(choices)
    assert write_extras(choices) == 1
    assert table.read_text() == "of another program"
    assert "not written: " in capsys.readouterr().out
    table.unlink()
    for caption in ("a cat", "a dog", "a dog"):  # written by this command, so replaced
        write_rows(tmp_path, [captioned("a.jpg", caption=caption)])
        check_flags(choices)
        assert write_extras(choices) == 0
        assert caption in table.read_text()
    assert not (tmp_path / "t.csv.edited").exists()
    if kind == "coco":
        table.write_text(table.read_text() + "\n")
        with pytest.raises(UserError, match=r"has been changed since .*: give another name, or delete it"):
            check_flags(choices)


def test_the_texts_in_a_table_stay_in_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Once typed, in each later run of the same command; the table as it was changed is kept beside it."""
    output = write_rows(tmp_path, [captioned("a.jpg"), captioned("b.jpg"), failed("c.jpg")])
    table = tmp_path / "t.csv"
    choices = CaptionSettings(images=("photos",), output=output, csv=table, sidecar=".txt")
    write_extras(choices)
    edit_table(table, {"b.jpg": {"caption": "Our\nship"}, "c.jpg": {"caption": "broken"}}).replace(table)
    edited = table.read_bytes()
    for number in range(3):
        check_flags(choices)
        write_extras(choices)
        rows = list(csv.DictReader(io.StringIO(table.read_bytes().decode(), newline="")))
        assert [(row["caption"], row["correction"]) for row in rows] == [
            ("a cat", ""),
            ("Our\nship", "text"),
            ("", ""),
        ]
        said = capsys.readouterr().out
        assert ("since their images have no caption here: 1: 'c.jpg'" in said) is (number == 0)
        assert ("t.csv.edited is the table as it was changed" in said) is (number == 0)
    assert (tmp_path / "t.csv.edited").read_bytes() == edited


@pytest.mark.parametrize("is_given", [False, True])
def test_a_table_of_another_output_is_replaced_if_its_corrections_are_taken(tmp_path: Path, is_given: bool) -> None:
    output = write_rows(tmp_path, [captioned("a.jpg"), captioned("b.jpg")])
    table = tmp_path / "t.csv"
    write_csv(output, table)
    edit_table(table, {"b.jpg": {"caption": "Our ship"}}).replace(table)
    choices = CaptionSettings(images=("photos",), output=output, csv=table, corrections=table if is_given else None)
    if not is_given:
        with pytest.raises(UserError, match=r"--corrections .*t\.csv takes what was corrected in it"):
            check_flags(choices)
        return
    check_flags(choices)
    assert write_extras(choices) == 0
    rows = csv.DictReader(io.StringIO(table.read_text(), newline=""))
    assert [row["caption"] for row in rows] == ["a cat", "Our ship"]


def test_what_is_saved_while_the_job_runs_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After the corrections were read, just before the table is replaced."""
    output = write_rows(tmp_path, [captioned("a.jpg")])
    table = tmp_path / "t.csv"
    choices = CaptionSettings(images=("photos",), output=output, csv=table, corrections=table)
    write_csv(output, table)
    edited = edit_table(table, {"a.jpg": {"caption": "saved late"}}).read_bytes()
    real = gallery.read_corrections

    def read_then_save(*args: Any) -> Corrections:
        said = real(*args)
        table.write_bytes(edited)
        return said

    with monkeypatch.context() as patch:
        patch.setattr("infer.extras.read_corrections", read_then_save)
        assert write_extras(choices) == 1
    assert table.read_bytes() == edited
    assert "not written: " in capsys.readouterr().out
    assert write_extras(choices) == 0
    assert "saved late" in table.read_text()


def test_a_file_of_corrections_is_newer_than_the_gallery_only_once(tmp_path: Path) -> None:
    """What is written in the gallery afterwards counts more, in each merge of a watch."""
    output = write_rows(tmp_path, [captioned("a.jpg")])
    file, folder = tmp_path / "mine.jsonl", tmp_path / "gallery"
    file.write_text('{"path": "a.jpg", "captions": ["of the file"], "images": "photos"}\n')
    choices = CaptionSettings(images=("photos",), output=output, gallery=folder, corrections=file)
    write_extras(choices)
    assert "of the file" in (folder / "corrections.jsonl").read_text()
    newer = (folder / "corrections.jsonl").read_text().replace("of the file", "newer")
    (folder / "corrections.jsonl").write_text(newer)
    write_extras(choices)
    assert (folder / "corrections.jsonl").read_text() == newer
    file.write_text(file.read_text().replace("of the file", "changed"))
    write_extras(choices)
    assert "changed" in (folder / "corrections.jsonl").read_text()


def test_names_behind_a_url_come_back(tmp_path: Path) -> None:
    """Without the columns that are not needed, too."""
    output = write_rows(tmp_path, [captioned("a%20b.jpg", root="http://host/photos")])
    write_csv(output, tmp_path / "t.csv")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "t.csv").read_text(), newline="")))
    assert rows[0]["image"] == "a b.jpg"  # as make_shards.py reads it
    edited = edit_table(tmp_path / "t.csv", {"a b.jpg": {"caption": "Our ship", "sha256": ""}})
    said = gallery.read_corrections(None, [gallery.Source(edited)])
    assert said.find(images="http://host/photos", path="a b.jpg", sha256="1") == "Our ship"


def test_relative_roots_start_from_the_folder_of_the_first_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if the current folder has images with the same names."""
    for folder in ("one", "two"):
        (tmp_path / folder / "photos").mkdir(parents=True)
        (tmp_path / folder / "photos" / "a.jpg").touch()
    output = write_rows(tmp_path / "one", [captioned("a.jpg")])
    monkeypatch.chdir(tmp_path / "two")
    choices = CaptionSettings(images=("photos",), output=output, csv=Path("t.csv"), sidecar=".txt", gallery=Path("g"))
    assert write_extras(choices, base=str(tmp_path / "one")) == 0
    assert (tmp_path / "one" / "photos" / "a.txt").read_text() == "a cat\n"
    assert [path.name for path in (tmp_path / "two" / "photos").iterdir()] == ["a.jpg"]
    assert {path.name for path in (tmp_path / "two").iterdir()} == {"photos", "t.csv", "g"}


def test_a_watch_survives_a_table_that_is_saved_wrongly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = write_rows(tmp_path, [captioned("a.jpg")])
    table = tmp_path / "t.csv"
    choices = CaptionSettings(images=("photos",), output=output, csv=table, corrections=table)
    table.write_text("half of")
    write_again(choices, since=0.0)
    assert "not written: the first line of" in capsys.readouterr().out
    assert table.read_text() == "half of"


def test_a_kill_while_a_table_is_written_leaves_one_that_is_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Just before its rename, and just after."""
    output = write_rows(tmp_path, [captioned("a.jpg")])
    choices = CaptionSettings(images=("photos",), output=output, csv=tmp_path / "t.csv")
    write_extras(choices)
    real = Path.replace
    for is_renamed in (False, True):
        write_rows(tmp_path, [captioned("a.jpg", caption=f"a dog {is_renamed}")])

        def die(path: Path, target: Path, is_renamed: bool = is_renamed) -> None:
            if is_renamed:
                real(path, target)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", die)
            with pytest.raises(KeyboardInterrupt):
                write_extras(choices)
        assert ("a dog" in (tmp_path / "t.csv").read_text()) is is_renamed
        check_flags(choices)
    assert write_extras(choices) == 0


# ---- COCO results -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("COCO_val2014_000000391895.jpg", 391895),
        ("val2017/000000391895.jpg", 391895),
        ("1000268201_693b08cb0e.jpg", "1000268201_693b08cb0e.jpg"),
        ("17.jpg", "17.jpg"),
        ("a/b.jpg", "a/b.jpg"),
    ],
)
def test_ids_are_cocos_numbers_or_paths(path: str, expected: int | str) -> None:
    assert coco_id(path) == expected


def test_images_without_caption_and_with_an_id_again_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [
        captioned("a/000000000007.jpg", caption="first"),
        captioned("b/COCO_val2014_000000000007.jpg", caption="second"),
        captioned("c.jpg", alt="", caption="unsure"),
        failed("d.jpg"),
    ]
    left_out = write_coco_results(write_rows(tmp_path, rows), tmp_path / "r.json")
    assert left_out == Counter({"images that have the id of an earlier one": 1, "files that have no caption": 1})
    assert json.loads((tmp_path / "r.json").read_text()) == [
        {"image_id": 7, "caption": "first"},
        {"image_id": "c.jpg", "caption": "unsure"},
    ]


@pytest.mark.parametrize("rows", [[], [failed("a.jpg")]])
def test_results_of_nothing_are_json(tmp_path: Path, rows: list[Row]) -> None:
    write_coco_results(write_rows(tmp_path, rows), tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text()) == []


@pytest.mark.parametrize("names", [["000000000011.jpg", "000000000012.jpg"], ["sea/x.jpg", "y.jpg"]])
def test_evaluation_scores_what_was_written(tmp_path: Path, names: list[str]) -> None:
    """By COCO's number, or by the file names of the references; beside another file of results too."""
    captions = {11: "a man rides a wave", 12: "two dogs on a sofa"}
    pairs = list(zip(names, captions.items(), strict=True))
    references = {
        "images": [{"id": image_id, "file_name": name} for name, (image_id, _) in pairs],
        "annotations": [{"image_id": image_id, "id": image_id, "caption": text} for image_id, text in captions.items()],
    }
    storage.write_atomic(str(tmp_path / "references.json"), json.dumps(references))
    write_coco_results(
        write_rows(tmp_path, [captioned(name, caption=text) for name, (_, text) in pairs]), tmp_path / "r.json"
    )
    own, scores = tmp_path / "r.json", tmp_path / "scores.json"
    evaluate(EvaluateSettings(results=own, references=tmp_path / "references.json", against=own, json=scores))
    found = json.loads(scores.read_text())
    assert found["num_images"] == 2
    assert found["metrics"]["bleu4"] == pytest.approx(1.0)


def test_an_image_with_two_ids_is_refused(tmp_path: Path) -> None:
    images = [{"id": 1, "file_name": "a.jpg"}]
    references = {"images": images, "annotations": [{"image_id": 1, "id": 1, "caption": "a cat"}]}
    (tmp_path / "references.json").write_text(json.dumps(references))
    results = [{"image_id": 1, "caption": "a cat"}, {"image_id": "a.jpg", "caption": "a dog"}]
    (tmp_path / "r.json").write_text(json.dumps(results))
    with pytest.raises(UserError, match="image 1 2 times"):
        evaluate(EvaluateSettings(results=tmp_path / "r.json", references=tmp_path / "references.json"))
