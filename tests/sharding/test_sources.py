"""Caption files of every kind: what comes back from them, what is refused and how it is named, and which are found."""

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioner.errors import UserError
from captioner.files import storage
from sharding.packing.sources import Failure, Record, Source, find_sources, read_records

CASES = Path(__file__).resolve().parents[3] / "shared" / "data" / "cases"
REASONS = {
    "no caption",
    "empty caption",
    "duplicate id",
    "bad encoding",
    "bad row",
    "unsafe name",
    "no image",
}
UNSAFE_NAMES = [
    *("", "/etc/passwd", "~/a.jpg", "~root", "C:/a.jpg", "c:a.jpg", "a\\b.jpg", "..", "../a.jpg", "a/../b.jpg", "a/.."),
    *("nul\0.jpg", "line\n.jpg", "tab\t.jpg", "delete\x7f.jpg", "next\x85.jpg"),
    *("http://host/a.jpg", "a/s3://b.jpg", "zip::a.jpg"),
]
ODD_NAMES = [
    *(" a.jpg ", "a b.jpg", "Zoë/猫 🐈.jpg", "don't.jpg", '"quoted".jpg', "a,b;c.jpg", "a~.jpg"),
    *("..a.jpg", "a..b.jpg", "a../b.jpg", ".../a.jpg", "12:30.jpg", "no ending", "a?b#c%2e.jpg", "a//b.jpg"),
]


@pytest.fixture(autouse=True)
def _clean_memory() -> Iterator[None]:
    yield
    filesystem = fsspec.filesystem("memory")
    if filesystem.exists("/sources"):
        filesystem.rm("/sources", recursive=True)


def read(
    content: bytes | str | dict[str, Any], ending: str, split: str = "train"
) -> tuple[list[Record], list[Failure]]:
    """The records and failures of a file with this content."""
    location = f"memory://sources/captions{ending}"
    data = json.dumps(content) if isinstance(content, dict) else content
    storage.write_atomic(location, data)
    return read_records(Source(split=split, captions=location, images="pictures"))


def counted(failures: list[Failure]) -> list[tuple[str, str]]:
    return [(failure.name, failure.reason) for failure in failures]


def captions_of(records: list[Record]) -> dict[str, list[str]]:
    return {record.file_name: list(record.captions) for record in records}


# ---- the same rows as each kind of file -------------------------------------------------------------------

Rows = list[tuple[str, str]]
"""Picture names and captions."""


def as_table(rows: Rows, *, delimiter: str, end: str = "\r\n", quoting: Any = csv.QUOTE_MINIMAL) -> str:
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, lineterminator=end, quoting=quoting)
    writer.writerow(("image", "caption"))
    writer.writerows(rows)
    return text.getvalue()


def as_jsonl(rows: Rows, *, ascii_only: bool = True) -> str:
    lines = [{"path": name, "caption": caption} for name, caption in rows]
    return "".join(json.dumps(line, ensure_ascii=ascii_only) + "\n" for line in lines)


def as_coco(rows: Rows) -> dict[str, Any]:
    names = dict.fromkeys(name for name, _ in rows)
    return {
        "images": [{"id": name, "file_name": name} for name in names],
        "annotations": [{"image_id": name, "caption": caption} for name, caption in rows],
    }


def as_karpathy(rows: Rows) -> dict[str, Any]:
    names = dict.fromkeys(name for name, _ in rows)
    return {
        "images": [
            {"filename": name, "split": "train", "sentences": [{"raw": text} for other, text in rows if other == name]}
            for name in names
        ]
    }


def all_kinds(rows: Rows) -> dict[str, tuple[str | dict[str, Any], str]]:
    """Content and ending of every kind of file with these rows."""
    return {
        "COCO": (as_coco(rows), ".json"),
        "Karpathy": (as_karpathy(rows), ".json"),
        "CSV": (as_table(rows, delimiter=","), ".csv"),
        "TSV": (as_table(rows, delimiter="\t"), ".tsv"),
        "JSONL": (as_jsonl(rows), ".jsonl"),
    }


LETTERS = st.characters(exclude_categories=["Cs"])
NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\\:~"), min_size=1).filter(
    lambda name: not name.startswith("/") and ".." not in name.split("/")
)
CAPTIONS = st.text(LETTERS | st.sampled_from("\",\t\r\n'\u2028 \0")).filter(str.strip)


@st.composite
def rows_of_few_pictures(draw: st.DrawFn) -> Rows:
    names = draw(st.lists(NAMES, min_size=1, max_size=4))
    return draw(st.lists(st.tuples(st.sampled_from(names), CAPTIONS), max_size=8))


@given(rows_of_few_pictures())
def test_every_kind_of_file_gives_the_same_records(rows: Rows) -> None:
    grouped: dict[str, list[str]] = {}
    for name, caption in rows:
        grouped.setdefault(name, []).append(caption.strip())
    expected = [
        Record(
            image_id=name,
            file_name=name,
            captions=tuple(captions),
            annotation_ids=(None,) * len(captions),
        )
        for name, captions in grouped.items()
    ]
    for kind, (content, ending) in all_kinds(rows).items():
        if kind == "Karpathy" and not rows:
            continue  # without a picture there is nothing to know it by
        records, failures = read(content, ending)
        assert (kind, records, failures) == (kind, expected, [])


@given(
    rows_of_few_pictures(),
    st.sampled_from([(",", ".csv"), ("\t", ".TSV")]),
    st.sampled_from(
        [("\r\n", csv.QUOTE_MINIMAL), ("\r\n", csv.QUOTE_ALL), ("\n", csv.QUOTE_ALL), ("\r", csv.QUOTE_ALL)]
    ),
    st.booleans(),
    st.booleans(),
)
def test_how_a_table_is_written_does_not_matter(
    rows: Rows, kind: tuple[str, str], style: tuple[str, Any], with_mark: bool, ends_with_line_end: bool
) -> None:
    text = as_table(rows, delimiter=kind[0], end=style[0], quoting=style[1])
    data = (text if ends_with_line_end else text.removesuffix(style[0])).encode()
    assert read(b"\xef\xbb\xbf" * with_mark + data, kind[1]) == read(as_jsonl(rows, ascii_only=False), ".JSONL")


def test_columns_may_stand_in_any_order_among_others() -> None:
    text = "licence, caption ,width,image\nfree,a cat,3,1.jpg\n,a dog,,2.jpg\n,two cats,,1.jpg\n"
    records, failures = read(text, ".csv")
    assert captions_of(records) == {"1.jpg": ["a cat", "two cats"], "2.jpg": ["a dog"]}
    assert failures == []


def test_blank_lines_are_no_rows() -> None:
    assert len(read("image,caption\n\n1.jpg,a cat\n\r\n\n2.jpg,a dog\n\n", ".csv")[0]) == 2
    assert read("image,caption\n\n1.jpg,a cat\n", ".csv")[1] == []
    assert read(' \n{"path": "1.jpg", "caption": "a cat"}\r\n\n', ".jsonl")[1] == []


def test_jsonl_takes_path_or_image_and_a_caption_or_a_list_of_them() -> None:
    lines = [
        {"path": "1.jpg", "caption": "a cat"},
        {"image": "2.jpg", "captions": ["a dog", " two dogs\n"], "caption": None},
        {"image": "1.jpg", "captions": ["one cat"], "path": None},
        {"path": "1.jpg", "image": "other.jpg", "caption": "a cat"},
    ]
    records, failures = read("\n".join(map(json.dumps, lines)), ".jsonl")
    assert captions_of(records) == {"1.jpg": ["a cat", "one cat", "a cat"], "2.jpg": ["a dog", "two dogs"]}
    assert failures == []


def test_rows_of_the_captioning_stage_are_read_with_its_errors_as_pictures_without_caption() -> None:
    common = {"root": "photos", "format_version": 1, "model": "abc"}
    lines = [
        common | {"path": "a/1.jpg", "caption": "a cat", "score": -0.5, "token_scores": [-0.5], "width": 3},
        common | {"path": "2.jpg", "error": "truncated", "message": "ends early"},
        {"path": "a/1.jpg", "caption": "a black cat", "was": "a cat"},
    ]
    records, failures = read("".join(json.dumps(line) + "\n" for line in lines), ".jsonl")
    assert captions_of(records) == {"a/1.jpg": ["a cat", "a black cat"]}
    assert failures == [Failure(name="2.jpg", reason="no caption", message="line 2: truncated")]


def test_cocos_ids_and_order_are_kept_and_two_ids_may_share_a_file() -> None:
    images = [{"id": number, "file_name": "same.jpg"} for number in (9, 3)]
    annotations = [{"id": 5, "image_id": 3, "caption": "c"}, {"id": 4, "image_id": 9, "caption": "a"}]
    annotations += [{"id": 5, "image_id": 3, "caption": "d"}, {"id": "x", "image_id": 3, "caption": "e"}]
    records, failures = read({"images": images, "annotations": annotations, "categories": 3}, ".json")
    assert [record.image_id for record in records] == [9, 3]
    assert [record.annotation_ids for record in records] == [(4,), (5, 5, "x")]
    assert [record.captions for record in records] == [("a",), ("c", "d", "e")]
    assert failures == []


# ---- failures ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["COCO", "Karpathy", "CSV", "TSV", "JSONL"])
@pytest.mark.parametrize("name", UNSAFE_NAMES)
def test_a_name_that_may_lead_elsewhere_is_unsafe(kind: str, name: str) -> None:
    content, ending = all_kinds([(name, "a cat"), ("good.jpg", "a dog"), (name, "two cats")])[kind]
    records, failures = read(content, ending)
    assert captions_of(records) == {"good.jpg": ["a dog"]}
    assert counted(failures) == [(name, "unsafe name")]


@pytest.mark.parametrize("kind", ["COCO", "Karpathy", "CSV", "TSV", "JSONL"])
@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_name_that_is_only_odd_stays_as_it_is(kind: str, name: str) -> None:
    content, ending = all_kinds([(name, "a cat")])[kind]
    records, failures = read(content, ending)
    assert captions_of(records) == {name: ["a cat"]}
    assert failures == []


@pytest.mark.parametrize("kind", ["COCO", "Karpathy", "JSONL"])
def test_a_name_whose_bytes_are_no_utf8_stays_as_json_has_it(kind: str) -> None:
    """The captioning stage writes such names, and the file system finds them."""
    content, ending = all_kinds([("caf\udce9.jpg", "a cat")])[kind]
    assert captions_of(read(content, ending)[0]) == {"caf\udce9.jpg": ["a cat"]}


@pytest.mark.parametrize("kind", ["COCO", "Karpathy", "CSV", "TSV", "JSONL"])
def test_an_empty_caption_is_counted_and_so_is_a_picture_that_has_no_other(kind: str) -> None:
    content, ending = all_kinds([("1.jpg", " \n"), ("2.jpg", ""), ("1.jpg", "a cat")])[kind]
    records, failures = read(content, ending)
    assert captions_of(records) == {"1.jpg": ["a cat"]}
    assert Counter(counted(failures)) == Counter(
        [("1.jpg", "empty caption"), ("2.jpg", "empty caption"), ("2.jpg", "no caption")]
    )


@pytest.mark.parametrize("kind", ["COCO", "Karpathy", "JSONL"])
def test_half_a_surrogate_pair_in_a_caption_is_bad_encoding(kind: str) -> None:
    content, ending = all_kinds([("1.jpg", "half \ud83d"), ("1.jpg", "whole \U0001f408")])[kind]
    records, failures = read(content, ending)
    assert captions_of(records) == {"1.jpg": ["whole \U0001f408"]}
    assert counted(failures) == [("1.jpg", "bad encoding")]


@pytest.mark.parametrize("ending", [".csv", ".jsonl"])
def test_bytes_that_are_not_utf8_cost_their_row_only(ending: str) -> None:
    rows = [("1.jpg", "a caf\xe9"), ("2.jpg", "a cat"), ("3\xe9.jpg", "a dog")]
    text = as_table(rows, delimiter=",") if ending == ".csv" else as_jsonl(rows, ascii_only=False)
    records, failures = read(text.encode("latin-1"), ending)
    assert captions_of(records) == {"2.jpg": ["a cat"]}
    assert counted(failures) == [("1.jpg", "bad encoding"), ("3\udce9.jpg", "bad encoding")]
    assert ["line 2" in failures[0].message, "line 4" in failures[1].message] == [ending == ".csv"] * 2


@pytest.mark.parametrize(
    "row",
    ["1.jpg", "1.jpg,a cat, on a mat", '1.jpg,"a" cat', '1.jpg,"a cat', '"1.jpg,a cat', " ", f"1.jpg,{'a' * 200_000}"],
)
def test_a_row_whose_cells_do_not_fit_costs_itself_only(row: str) -> None:
    text = f'image,caption\n0.jpg,"zero\nlines"\n{row}\n2.jpg,"two, too"\n3.jpg,"three"\n'
    records, failures = read(text, ".csv")
    assert captions_of(records) == {"0.jpg": ["zero\nlines"], "2.jpg": ["two, too"], "3.jpg": ["three"]}
    assert [failure.reason for failure in failures] == ["bad row"]
    assert failures[0].message.startswith("line 4: ")


def test_many_quotes_that_do_not_close_cost_their_rows_only() -> None:
    rows = [f'{number}.jpg,"a cat' for number in range(500)] + [f"{number}.jpg,a dog" for number in range(500, 600)]
    records, failures = read("image,caption\n" + "\n".join(rows), ".csv")
    assert len(records) == 100
    assert Counter(failure.reason for failure in failures) == {"bad row": 500}


@pytest.mark.parametrize(
    ("line", "image"),
    [
        ("no JSON", ""),
        ('{"path": "1.jpg", "caption": "cut', ""),
        ("[1]", ""),
        ("null", ""),
        ("[" * 100_000, ""),
        ("9" * 10_000, ""),
        ('{"caption": "a cat"}', ""),
        ('{"path": null, "caption": "a cat"}', ""),
        ('{"path": ["1.jpg"], "caption": "a cat"}', ""),
        ('{"path": "1.jpg", "caption": "a", "captions": ["b"]}', "1.jpg"),
        ('{"path": "1.jpg", "captions": "a cat"}', "1.jpg"),
        ('{"path": "1.jpg", "captions": {"a": "cat"}}', "1.jpg"),
    ],
)
def test_a_line_that_is_no_row_costs_itself_only(line: str, image: str) -> None:
    records, failures = read(f'{{"path": "0.jpg", "caption": "zero"}}\n{line}\n', ".jsonl")
    assert captions_of(records) == {"0.jpg": ["zero"]}
    assert counted(failures) == [(image, "bad row")]
    assert failures[0].message.startswith("line 2: ")


@pytest.mark.parametrize(
    "line", ['{"path": "1.jpg"}', '{"path": "1.jpg", "captions": []}', '{"image": "1.jpg", "caption": null}']
)
def test_a_line_without_caption_is_counted(line: str) -> None:
    assert counted(read(line, ".jsonl")[1]) == [("1.jpg", "no caption")]


def test_captions_that_are_no_text_are_bad_rows_and_the_others_stay() -> None:
    records, failures = read('{"path": "1.jpg", "captions": [3, "a cat", null, ["a"]]}\n', ".jsonl")
    assert captions_of(records) == {"1.jpg": ["a cat"]}
    assert counted(failures) == [("1.jpg", "bad row")] * 3
    images = [{"id": 1, "file_name": "1.jpg"}, {"id": 2, "file_name": "2.jpg"}]
    annotations = [{"id": 7, "image_id": 1, "caption": text} for text in (3, None, [], "a cat")]
    records, failures = read({"images": images, "annotations": annotations}, ".json")
    assert captions_of(records) == {"1.jpg": ["a cat"]}
    assert counted(failures) == [("1.jpg", "bad row")] * 3 + [("2.jpg", "no caption")]
    assert "'id': 7" in failures[0].message


def test_single_bad_images_of_coco_are_failures() -> None:
    good = {"id": 1, "file_name": "1.jpg"}
    bad = [{"id": 2}, {"file_name": "3.jpg"}, {"id": None, "file_name": "4.jpg"}, {"id": 5, "file_name": 5}, None]
    bad += [{"id": [6], "file_name": "6.jpg"}, {"id": True, "file_name": "7.jpg"}, {"id": 8.5, "file_name": "8.jpg"}]
    annotations = [{"id": 1, "image_id": 1, "caption": "a cat"}]
    records, failures = read({"images": [*bad, good], "annotations": annotations}, ".json")
    assert captions_of(records) == {"1.jpg": ["a cat"]}
    names = ["", "3.jpg", "4.jpg", "", "", "6.jpg", "7.jpg", "8.jpg"]
    assert counted(failures) == [(name, "bad row") for name in names]
    assert "images[0]" in failures[0].message


def test_annotations_that_belong_to_no_picture_are_named_one_by_one() -> None:
    images = [{"id": 1, "file_name": "1.jpg"}]
    ids = [1, 2, "01", None, [1], {}, True, 1.5]
    annotations = [{"id": 10 + number, "image_id": image_id, "caption": "a"} for number, image_id in enumerate(ids)]
    records, failures = read({"images": images, "annotations": [*annotations, 3]}, ".json")
    assert captions_of(records) == {"1.jpg": ["a"]}
    assert [failure.reason for failure in failures] == ["no image"] * 2 + ["bad row"] * 6
    assert all(f"'id': {10 + number}" in failures[number - 1].message for number in range(1, 8))
    assert "annotations[8]" in failures[-1].message


@pytest.mark.parametrize(
    ("image_ids", "caption_ids"),
    [((1, 2), ("1", "2")), (("1", "2"), (1, 2)), ((1.0, 2.0), (1, "2")), ((1, 2), (1.0, 2))],
)
def test_cocos_ids_may_be_text_in_one_list_and_numbers_in_the_other(image_ids: tuple, caption_ids: tuple) -> None:
    images = [{"id": image_id, "file_name": f"{n}.jpg"} for n, image_id in enumerate(image_ids)]
    annotations = [{"id": float(n), "image_id": own, "caption": f"a {n}"} for n, own in enumerate(caption_ids)]
    records, failures = read({"images": images, "annotations": annotations}, ".json")
    assert captions_of(records) == {"0.jpg": ["a 0"], "1.jpg": ["a 1"]}
    assert failures == []
    assert [str(record.image_id) for record in records] == ["1", "2"]
    assert [record.annotation_ids for record in records] == [(0,), (1,)]


def test_a_number_and_a_text_that_read_the_same_are_two_images_where_both_are_listed() -> None:
    images = [{"id": 1, "file_name": "number.jpg"}, {"id": "1", "file_name": "text.jpg"}]
    annotations = [{"id": n, "image_id": own, "caption": f"a {own!r}"} for n, own in enumerate((1, "1", 1.0))]
    records, failures = read({"images": images, "annotations": annotations}, ".json")
    assert captions_of(records) == {"number.jpg": ["a 1", "a 1.0"], "text.jpg": ["a '1'"]}
    assert failures == []


def test_an_id_without_image_is_shown_as_it_is_written() -> None:
    content = {
        "images": [{"id": 1, "file_name": "1.jpg"}],
        "annotations": [{"id": 5, "image_id": "x1", "caption": "a"}],
    }
    assert "'image_id': 'x1'" in read(content, ".json")[1][0].message


@pytest.mark.skipif(not CASES.exists(), reason=f"there is no {CASES}")
def test_the_case_of_text_and_number_ids_loses_no_caption() -> None:
    records, failures = read((CASES / "text_and_number_ids.json").read_bytes(), ".json")
    assert captions_of(records) == {"a.jpg": ["string id one"], "x.PNG": ["two"]}
    assert failures == []


@pytest.mark.parametrize("kind", ["COCO", "Karpathy"])
def test_of_pictures_with_the_same_id_the_first_is_kept(kind: str) -> None:
    if kind == "COCO":
        images = [{"id": 1, "file_name": name} for name in ("1.jpg", "again.jpg")]
        content = {"images": images, "annotations": [{"id": 1, "image_id": 1, "caption": "a cat"}]}
    else:
        common = {"cocoid": 1, "split": "train", "sentences": [{"raw": "a cat"}]}
        content = {"images": [common | {"filename": name} for name in ("1.jpg", "again.jpg")]}
    records, failures = read(content, ".json")
    assert captions_of(records) == {"1.jpg": ["a cat"]}
    assert failures == [Failure(name="again.jpg", reason="duplicate id", message="image id 1")]


def test_single_bad_pictures_of_karpathys_file_are_failures() -> None:
    good = {"filepath": "a", "filename": "1.jpg", "cocoid": 1, "split": "val", "sentences": [{"raw": "b", "sentid": 3}]}
    bad = [None, {"sentences": []}, good | {"split": None}, good | {"split": ["val"]}, good | {"filename": 3}]
    bad += [good | {"filepath": 3}, good | {"sentences": "text"}, good | {"cocoid": [1]}, good | {"cocoid": 1.5}]
    records, failures = read({"images": [good, *bad, good | {"split": "train"}]}, ".json", split="val")
    assert captions_of(records) == {"a/1.jpg": ["b"]}
    assert records[0].annotation_ids == (3,)
    assert [failure.reason for failure in failures] == ["bad row"] * len(bad)
    of_no_split = read({"images": [good, *bad, good | {"split": "train"}]}, ".json", split="train")[1]
    assert [failure.reason for failure in of_no_split] == ["bad row"] * 4


def test_single_bad_sentences_of_karpathys_file_are_failures() -> None:
    sentences = [3, None, {"raw": None}, {"raw": ["a"]}, {"raw": "a", "sentid": [1]}, {"raw": "good", "sentid": 1}]
    image = {"filename": "1.jpg", "split": "train", "sentences": sentences}
    records, failures = read({"images": [image, {"filename": "2.jpg", "split": "train"}]}, ".json")
    assert captions_of(records) == {"1.jpg": ["good"]}
    assert counted(failures) == [("1.jpg", "bad row")] * 5 + [("2.jpg", "no caption")]


# ---- files that are something else ------------------------------------------------------------------------

GOOD_IMAGES = [{"id": 1, "file_name": "1.jpg"}]


@pytest.mark.parametrize(
    ("ending", "content"),
    [
        (".json", ""),
        (".json", "\xff"),
        (".json", "[" * 100_000),
        (".json", "9" * 10_000),
        (".json", "[]"),
        (".json", '{"images": [{}], "annotations": []}'),
        (".json", '{"images": 3, "annotations": []}'),
        (".json", json.dumps({"images": GOOD_IMAGES})),
        (".json", json.dumps({"images": GOOD_IMAGES, "annotations": [{"id": 1, "image_id": 1, "bbox": [1, 2]}]})),
        (".json", json.dumps({"images": [{"filename": "1.jpg", "sentences": []}]})),
        (".jsonl", json.dumps({"images": GOOD_IMAGES, "annotations": []})),
        (".jsonl", "image,caption\n1.jpg,a cat\n"),
        (".csv", ""),
        (".csv", "1.jpg,a cat\n"),
        (".csv", "image|caption\n1.jpg|a cat\n"),
        (".csv", "image,caption,caption\n1.jpg,a cat,a cat\n"),
        (".csv", '"image,caption\n'),
        (".tsv", "image|caption\n1.jpg|a cat\n"),
        (".tsv", "image\tcaption\n".encode("utf-16")),
    ],
)
def test_a_file_that_is_something_else_is_refused_in_one_line(ending: str, content: str | bytes) -> None:
    with pytest.raises(UserError, match=f"memory://sources/captions{ending}") as caught:
        read(content, ending)
    assert "\n" not in str(caught.value)


def test_a_wrong_header_is_shown_beside_what_is_needed() -> None:
    with pytest.raises(UserError, match=r"columns 'file', 'text'.*'image' and 'caption'.*','"):
        read("file,text\n1.jpg,a cat\n", ".csv")


def test_karpathys_file_is_refused_for_a_split_that_it_has_not() -> None:
    with pytest.raises(UserError, match=r"no captions of split test: it has train"):
        read(as_karpathy([("1.jpg", "a cat")]), ".json", split="test")


# ---- anything at all --------------------------------------------------------------------------------------

COCO_KEYS = ["images", "id", "file_name", "annotations", "image_id", "caption"]
KARPATHY_KEYS = ["split", "filename", "filepath", "cocoid", "imgid", "sentences", "raw", "sentid"]
KEYS = st.sampled_from([*COCO_KEYS, *KARPATHY_KEYS, "path", "image", "captions", "error"])
TEXTS = st.sampled_from(["train", "val", "1.jpg", "../2.jpg", "a cat", " ", "half \ud83d"]) | st.text(max_size=5)
NUMBERS = st.integers(-1, 3) | st.floats() | st.sampled_from([10**30, 1.0, 2.0])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=8,
)
IDS = st.integers(0, 3) | VALUES
WORDS = TEXTS | VALUES
NAMES_OR_NOT = st.sampled_from(["1.jpg", "2.jpg"]) | VALUES
SENTENCES = st.lists(st.fixed_dictionaries({"raw": WORDS}, optional={"sentid": IDS}) | VALUES, max_size=3)


def some(required: dict[str, Any], **optional: Any) -> Any:
    """Lists of entries of nearly the right kind, among values of any kind."""
    entry = st.fixed_dictionaries(required, optional=optional)
    lacking = st.fixed_dictionaries({}, optional=required | optional)
    return st.lists(entry | lacking | VALUES, max_size=6)


COCO_FILES = st.fixed_dictionaries(
    {
        "images": some({"id": IDS, "file_name": NAMES_OR_NOT}),
        "annotations": some({"image_id": IDS, "caption": WORDS}, id=IDS),
    },
    optional={"categories": VALUES, "info": VALUES},
)
SPLIT_NAMES = st.sampled_from(["train", "restval", "val"]) | VALUES
KARPATHY_FILES = st.fixed_dictionaries(
    {
        "images": some(
            {"filename": NAMES_OR_NOT, "split": SPLIT_NAMES, "sentences": SENTENCES | VALUES},
            filepath=TEXTS | VALUES,
            cocoid=IDS,
            imgid=IDS,
        )
    }
)
JSONL_FILES = some({}, path=NAMES_OR_NOT, image=NAMES_OR_NOT, caption=WORDS, captions=st.lists(WORDS) | VALUES)


def check_anything(content: Any, ending: str) -> tuple[list[Record], list[Failure]] | None:
    """Read it: all that comes back can be packed and listed; None where the file is refused, in one line."""
    try:
        records, failures = read(content, ending)
    except UserError as error:
        refused = str(error)
    else:
        check_all(records, failures)
        return records, failures
    assert "\n" not in refused
    return None


def check_all(records: list[Record], failures: list[Failure]) -> None:
    ids = [record.image_id for record in records]
    assert all(type(number) in (int, str) for number in ids)
    assert len(set(ids)) == len(ids)
    for record in records:
        assert len(record.captions) == len(record.annotation_ids) > 0
        assert all(type(number) in (int, str, type(None)) for number in record.annotation_ids)
        assert all(caption.encode().strip() for caption in record.captions)
    for failure in failures:
        assert failure.reason in REASONS
        assert failure.message
        assert isinstance(failure.name, str)


@given(COCO_FILES | KARPATHY_FILES | VALUES)
def test_any_json_gives_records_and_failures_or_one_line(content: Any) -> None:
    check_anything(json.dumps(content), ".json")


@given(JSONL_FILES)
def test_any_lines_of_json_give_records_and_failures_or_one_line(lines: list[Any]) -> None:
    check_anything("\n".join(map(json.dumps, lines)), ".jsonl")


@given(
    st.lists(
        st.binary(max_size=5) | st.sampled_from([b"image", b"caption", b",", b"\t", b'"', b"\r", b"\n", b"{", b"["])
    ),
    st.sampled_from([b"", b"image,caption\n", b"caption\timage\n", b'{"path": "1.jpg", "caption": "a"}\n']),
    st.sampled_from([".json", ".jsonl", ".csv", ".tsv"]),
)
def test_any_bytes_give_records_and_failures_or_one_line(parts: list[bytes], start: bytes, ending: str) -> None:
    check_anything(start + b"".join(parts), ending)


@given(st.lists(st.sampled_from(["1.jpg,a cat", '2.jpg,"a', '"3.jpg",b"', "4.jpg", '5.jpg,""', ",", "6.jpg,\xe9"])))
def test_no_row_of_a_table_vanishes(rows: list[str]) -> None:
    """Every row starts a line; a quote may draw following lines into its cell, where they can be seen."""
    found = check_anything(("image,caption\n" + "\n".join(rows)).encode("latin-1"), ".csv")
    assert found is not None
    records, failures = found
    captions = [caption for record in records for caption in record.captions]
    num_inside = sum(caption.count("\n") for caption in captions)
    assert len(captions) + num_inside + len(failures) >= len(rows)


@given(COCO_FILES)
def test_no_entry_of_a_coco_file_vanishes(content: dict[str, Any]) -> None:
    found = check_anything(content, ".json")
    if found is None or any("sentences" in image for image in content["images"] if isinstance(image, dict)):
        return
    records, failures = found
    num_pictures = sum(f.message.startswith(("images[", "image id")) for f in failures)
    assert len(records) + num_pictures == len(content["images"])
    refused = {failure.message.partition(":")[0] for failure in failures if failure.message.startswith("image id")}
    num_captions = sum(len(record.captions) for record in records)
    if not refused:
        assert num_captions + len(failures) - num_pictures == len(content["annotations"])


# ---- which files ------------------------------------------------------------------------------------------


def write_files(folder: str, *names: str) -> None:
    for name in names:
        storage.write_atomic(f"{folder}/{name}", "image,caption\n")


def splits(captions: str, *, images: str, split: str | None = None) -> dict[str, tuple[str, str]]:
    found = find_sources(images=images, captions=captions, split=split)
    return {source.split: (source.captions, source.images) for source in found}


@pytest.mark.parametrize("remote", [False, True])
def test_a_folder_gives_every_split_whatever_its_kind(tmp_path: Path, remote: bool) -> None:
    root = "memory://sources/data" if remote else str(tmp_path)
    names = ["captions_train2014.CSV", "captions_val.jsonl", "captions_test.tsv"]
    write_files(f"{root}/annotations", *names, "captions_train.txt", "captions.csv", "captions_train.csv.123.partial")
    write_files(root, "train2014/1.jpg", "annotations/captions_val.json/no file.jpg")
    at = f"{root}/annotations"
    expected = {
        "train": (f"{at}/{names[0]}", f"{root}/train2014"),
        "val": (f"{at}/{names[1]}", root),
        "test": (f"{at}/{names[2]}", root),
    }
    assert splits(at, images=root) == expected
    assert list(splits(at, images=root)) == ["train", "val", "test"]
    assert splits(at, images=root, split="val") == {"val": expected["val"]}


@pytest.mark.parametrize("remote", [False, True])
def test_two_files_of_a_split_are_refused_whatever_their_kinds(tmp_path: Path, remote: bool) -> None:
    folder = "memory://sources/twice" if remote else str(tmp_path)
    write_files(folder, "captions_train.csv", "captions_train2014.json")
    with pytest.raises(
        UserError, match=r"two caption files of split train, captions_train\.csv and captions_train2014"
    ):
        splits(folder, images=folder)


def test_a_folder_without_caption_files_is_refused(tmp_path: Path) -> None:
    write_files(str(tmp_path), "captions.csv", "captions_train.txt")
    with pytest.raises(UserError, match=r"captions_train\*.*\.jsonl.*download_coco"):
        splits(str(tmp_path), images=str(tmp_path))


@pytest.mark.parametrize("ending", ["csv", "TSV", "jsonl"])
def test_a_file_says_its_split_by_its_name_or_is_told(tmp_path: Path, ending: str) -> None:
    write_files(str(tmp_path), f"captions_val.{ending}", f"mine.{ending}", "mine/1.jpg")
    root = str(tmp_path)
    assert splits(f"{root}/captions_val.{ending}", images=root) == {"val": (f"{root}/captions_val.{ending}", root)}
    assert splits(f"{root}/mine.{ending}", images=root, split="train") == {"train": (f"{root}/mine.{ending}", root)}
    with pytest.raises(UserError, match="add --split"):
        splits(f"{root}/mine.{ending}", images=root)


def test_a_file_of_another_ending_is_refused(tmp_path: Path) -> None:
    write_files(str(tmp_path), "captions_train.txt")
    with pytest.raises(UserError, match=r"captions_train\.txt is no caption file.*\.csv"):
        splits(f"{tmp_path}/captions_train.txt", images=str(tmp_path))


def test_a_query_is_no_part_of_a_web_files_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "exists", lambda _: True)
    location = "https://host/a/captions_val%20of%202014.csv?token=a/b.json"
    assert splits(location, images="photos") == {"val": (location, "photos/val of 2014")}


def test_what_cannot_be_reached_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(location: str) -> Any:
        raise RuntimeError(f"{location} does not answer:\ntry again later")

    monkeypatch.setattr(storage, "exists", fail)
    monkeypatch.setattr(storage, "read_bytes", fail)
    location = "s3://bucket/captions_val.csv"
    for action in (
        lambda: find_sources(images=str(tmp_path), captions=location, split=None),
        lambda: read_records(Source(split="val", captions=location, images="")),
    ):
        with pytest.raises(UserError, match=rf"cannot read {location} .*try again later") as caught:
            action()
        assert "\n" not in str(caught.value)


def test_a_caption_file_that_went_away_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no .*gone\.csv"):
        read_records(Source(split="val", captions=str(tmp_path / "gone.csv"), images=""))
