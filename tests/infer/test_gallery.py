"""The gallery folder: what its files hold, that no name breaks them, and what it leaves on disk."""

import hashlib
import json
import math
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import pytest
from html_page import HtmlPage
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rows import failure, success
from tiny import write_shards

from captioner.errors import UserError
from infer.corrections import name_roots
from infer.gallery import THUMBNAIL_SIDE_PIXELS, check_folder, write_gallery
from infer.listing import locate

ODD_NAMES = [
    "<b>\"'&.jpg",
    "über straße.jpg",
    "a%20b#c?d.jpg",
    os.fsdecode(b"bad\xff.jpg"),
    "sub folder/1:2.jpg",
    "javascript:alert(1).jpg",
    "line\u2028end\n</script>.jpg",
]


class Gallery:
    """A gallery's page and data."""

    def __init__(self, index: Path) -> None:
        self.folder = index.parent
        self.page = HtmlPage(index)
        found = re.fullmatch(
            r"const ROWS = (\[.*\]);\nconst ROOTS = (\[.*\]);\n",
            (self.folder / "data.js").read_text("ascii"),
            re.DOTALL,
        )
        assert found
        self.rows: list[dict[str, Any]] = json.loads(found[1])
        self.roots: list[dict[str, str]] = json.loads(found[2])

    def linked_file(self, row: dict[str, Any]) -> Path:
        """The file that a browser would open for a row's link."""
        assert re.fullmatch(r"[\w./%~-]+", row["link"], re.ASCII)
        return self.folder / os.fsdecode(unquote_to_bytes(row["link"]))

    def thumbnail(self) -> Image.Image:
        (file,) = (self.folder / "thumbnails").iterdir()
        return Image.open(file)


def save(file: Path, image: Image.Image | None = None, **options: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    (image or Image.new("RGB", (64, 48), "teal")).save(file, **options)


def gallery(rows: list[Any], tmp_path: Path) -> Gallery:
    index = write_gallery(iter(rows), tmp_path / "gallery", title="My pictures", model="the model")
    assert index == tmp_path / "gallery" / "index.html"
    return Gallery(index)


@pytest.mark.parametrize("name", ODD_NAMES)
def test_an_odd_name_is_listed_and_linked(tmp_path: Path, name: str) -> None:
    save(tmp_path / "pictures" / name)
    made = gallery([success(tmp_path / "pictures", name)], tmp_path)
    (row,) = made.rows
    assert row["path"] == name
    assert made.linked_file(row).samefile(tmp_path / "pictures" / name)
    assert (made.folder / "thumbnails" / row["thumbnail"]).is_file()


def test_the_data_tell_all_that_the_page_shows_and_no_more(tmp_path: Path) -> None:
    more = {"confidence": 0.25, "review": "low confidence", "duplicate_of": "x/y.jpg", "captions": ["one", "two"]}
    sha256 = success(tmp_path, "a.jpg")["sha256"]
    made = gallery([success(tmp_path, "a.jpg", **more), failure(tmp_path, "b.jpg")], tmp_path)
    common = {"root": 0, "link": None, "thumbnail": None}
    success_row = {"path": "a.jpg", "caption": "a picture of a.jpg", "alt": "A picture.", "score": math.log(0.5)}
    assert made.rows == [
        common | success_row | more | {"sha256": sha256},
        common | {"path": "b.jpg", "error": "truncated", "message": "it is cut off"},
    ]


def test_markup_in_titles_models_roots_and_errors_stays_text(tmp_path: Path) -> None:
    bad = "<script>alert('\"&</script>\udcff"
    rows = [success(tmp_path / bad, "a.jpg", caption=bad), failure(tmp_path / bad, "b.jpg", error=bad)]
    made = Gallery(write_gallery(rows, tmp_path / "gallery", title=bad, model=bad))
    shown = bad.replace("\udcff", "\ufffd")
    assert [script["src"] for script in made.page.attributes("script")] == ["data.js", "gallery.js"]
    assert made.page.text("h1") == [shown]
    assert {f"1: 1 {shown}", shown, f"{tmp_path}/{shown}"} <= set(made.page.text("dd"))
    assert made.rows[0]["caption"] == bad


def test_the_summary_counts_captions_and_failures_by_error(tmp_path: Path) -> None:
    rows = [success(tmp_path, f"{number}.jpg") for number in range(3)]
    rows += [failure(tmp_path, name, error) for name, error in (("x", "truncated"), ("y", "truncated"), ("z", "empty"))]
    page = gallery(rows, tmp_path).page
    summary = dict(zip(page.text("dt"), page.text("dd"), strict=True))
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d", summary.pop("Date"))
    assert summary == {
        "Captioned": "3",
        "Failed": "3: 2 truncated, 1 empty",
        "Model": "the model",
        "Folder": str(tmp_path),
    }


def test_sorting_by_confidence_is_offered_where_there_is_one(tmp_path: Path) -> None:
    def options(**more: Any) -> list[str]:
        page = gallery([success(tmp_path, "a.jpg", **more)], tmp_path).page
        return [option["value"] for option in page.attributes("option")][8:]

    assert options() == ["score", "score-falling", "path"]
    assert options(confidence=0.0) == ["confidence", "confidence-falling", *options()]


# ---- corrections ----------------------------------------------------------------------------------------------


def test_one_folder_is_named_as_it_was_given(tmp_path: Path) -> None:
    made = gallery([success("photos/./x", "a.jpg")], tmp_path)
    assert made.roots == [{"root": "photos/./x", "images": "photos/./x", "prefix": ""}]


def test_several_folders_are_named_from_the_one_they_lie_in_and_urls_from_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    roots = ["../one", "s3://bucket/three", str(tmp_path / "two" / "deep")]
    made = gallery([success(root, "a.jpg") for root in roots], tmp_path)
    assert [(root["root"], root["images"], root["prefix"]) for root in made.roots] == [
        ("../one", str(tmp_path), "one/"),
        ("s3://bucket/three", "s3://bucket/three", ""),
        (str(tmp_path / "two" / "deep"), str(tmp_path), "two/deep/"),
    ]


@given(roots=st.lists(st.text("ab./", min_size=1).map(lambda path: f"/{path.strip('/')}"), min_size=1, unique=True))
def test_a_picture_s_corrected_name_finds_the_picture(roots: list[str]) -> None:
    named = name_roots(roots)
    for root, place in zip(roots, named, strict=True):
        name = f"{place['prefix']}x.jpg"
        assert not name.startswith(("/", "./", "../"))
        assert os.path.normpath(Path(place["images"], name)) == os.path.normpath(Path(root, "x.jpg"))
    assert len({place["images"] for place in named}) == 1


def test_a_web_address_is_unquoted_for_make_shards_which_quotes_it_again(tmp_path: Path) -> None:
    made = gallery([failure("https://example.org/x", "a%20b/c%23.jpg")], tmp_path)
    assert [(row["path"], row["name"], row["link"]) for row in made.rows] == [("a%20b/c%23.jpg", "a b/c#.jpg", None)]


def test_a_picture_inside_a_shard_has_a_thumbnail_but_no_name_to_correct(tmp_path: Path) -> None:
    folder, name = write_shards(tmp_path, (1,)), "train-000000.tar/train-000000000.jpg"
    sha256 = hashlib.sha256(locate(folder, name).read(max_bytes=1 << 20)).hexdigest()
    made = gallery([success(folder, name, sha256=sha256)], tmp_path)
    assert made.thumbnail().size == (32, 32)
    assert (made.rows[0]["in_shard"], made.rows[0]["link"]) == (True, None)


# ---- pictures -------------------------------------------------------------------------------------------------


def test_a_vanished_broken_or_changed_picture_has_no_thumbnail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 and no more")
    save(tmp_path / "changed.jpg")
    rows = [success(tmp_path, name) for name in ("broken.jpg", "changed.jpg", "gone.jpg")]
    save(tmp_path / "changed.jpg", Image.new("RGB", (64, 48), "red"))
    made = gallery(rows, tmp_path)
    assert [row["thumbnail"] for row in made.rows] == [None, None, None]
    assert [row["link"] for row in made.rows] == ["../broken.jpg", "../changed.jpg", None]
    printed = capsys.readouterr().out
    assert f"gallery: 1 without a thumbnail, undecodable: '{tmp_path}/broken.jpg'" in printed
    assert f"gallery: 1 without a thumbnail, changed since it was captioned: '{tmp_path}/changed.jpg'" in printed
    assert f"gallery: 1 without a thumbnail, missing: '{tmp_path}/gone.jpg'" in printed


def test_thumbnails_are_small_and_keep_their_shape(tmp_path: Path) -> None:
    save(tmp_path / "a.jpg", Image.new("RGB", (4000, 1000)))
    thumbnail = gallery([success(tmp_path, "a.jpg")], tmp_path).thumbnail()
    assert thumbnail.size == (THUMBNAIL_SIDE_PIXELS, THUMBNAIL_SIDE_PIXELS // 4)


def test_thumbnails_stand_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side: turn a quarter clockwise
    stored = Image.new("RGB", (1200, 800), "red")
    stored.paste("blue", (0, 0, 600, 800))
    save(tmp_path / "a.jpg", stored, exif=exif)
    thumbnail = gallery([success(tmp_path, "a.jpg")], tmp_path).thumbnail()
    assert thumbnail.size == (213, 320)
    assert thumbnail.getpixel((100, 40)) == pytest.approx((0, 0, 254), abs=6)
    assert thumbnail.getpixel((100, 280)) == pytest.approx((254, 0, 0), abs=6)


@pytest.mark.parametrize(
    ("name", "image", "expected"),
    [
        ("clear.png", Image.new("RGBA", (50, 50), (255, 0, 0, 0)), (255, 255, 255)),
        ("half.png", Image.new("RGBA", (50, 50), (255, 0, 0, 128)), (255, 127, 127)),
        ("ink.jpg", Image.new("RGB", (50, 50), (0, 128, 128)).convert("CMYK"), (0, 128, 128)),
        ("grey.png", Image.new("LA", (50, 50), (0, 128)), (127, 127, 127)),
        ("palette.gif", Image.new("RGB", (50, 50), (255, 0, 0)).convert("P"), (255, 0, 0)),
        ("palette.png", Image.new("P", (50, 50), 1), (0, 0, 0)),
    ],
)
def test_any_mode_becomes_rgb_on_white(tmp_path: Path, name: str, image: Image.Image, expected: tuple) -> None:
    save(tmp_path / name, image)
    thumbnail = gallery([success(tmp_path, name)], tmp_path).thumbnail()
    assert (thumbnail.format, thumbnail.mode) == ("JPEG", "RGB")
    assert thumbnail.getpixel((25, 25)) == pytest.approx(expected, abs=6)


def test_a_thumbnail_is_reused_until_its_picture_is_captioned_anew(tmp_path: Path) -> None:
    save(tmp_path / "a.jpg")
    rows = [success(tmp_path, "a.jpg")]
    gallery(rows, tmp_path)
    (file,) = (tmp_path / "gallery" / "thumbnails").iterdir()
    made = file.stat().st_mtime_ns
    (tmp_path / "a.jpg").unlink()
    assert gallery(rows, tmp_path).rows[0]["thumbnail"] == file.name
    assert file.stat().st_mtime_ns == made
    save(tmp_path / "a.jpg", Image.new("RGB", (64, 48), "red"))
    thumbnail = gallery([success(tmp_path, "a.jpg")], tmp_path).thumbnail()
    assert thumbnail.getpixel((30, 20)) == pytest.approx((254, 0, 0), abs=6)


def test_pictures_with_the_same_bytes_share_a_thumbnail(tmp_path: Path) -> None:
    for name in ("a.jpg", "sub/b.jpg"):
        save(tmp_path / name)
    made = gallery([success(tmp_path, "a.jpg"), success(tmp_path, "sub/b.jpg")], tmp_path)
    made.thumbnail()
    assert made.rows[0]["thumbnail"] == made.rows[1]["thumbnail"] is not None


def test_a_smaller_gallery_removes_what_the_larger_one_left_and_nothing_else(tmp_path: Path) -> None:
    for number in range(3):
        save(tmp_path / f"{number}.jpg", Image.new("RGB", (10, 10 + number)))
    rows = [success(tmp_path, f"{number}.jpg") for number in range(3)]
    gallery(rows, tmp_path)
    for mine in ("notes.html", "thumbnails/mine.jpg"):
        (tmp_path / "gallery" / mine).write_text("mine")
    made = gallery(rows[:1], tmp_path)
    assert {file.name for file in made.folder.iterdir()} == {
        "data.js", "gallery.css", "gallery.js", "index.html", "notes.html", "thumbnails",
    }  # fmt: skip
    assert {file.name for file in (made.folder / "thumbnails").iterdir()} == {made.rows[0]["thumbnail"], "mine.jpg"}


def test_relative_folders_are_taken_from_the_current_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(Path("pictures/a.jpg"))
    made = Gallery(write_gallery([success("pictures", "a.jpg")], Path("out"), title="t", model="m"))
    assert made.linked_file(made.rows[0]).samefile("pictures/a.jpg")
    assert (Path("out/thumbnails") / made.rows[0]["thumbnail"]).is_file()


# ---- the page -------------------------------------------------------------------------------------------------


def test_the_page_needs_no_network_and_names_its_parts(tmp_path: Path) -> None:
    made = gallery([success(tmp_path, "a.jpg"), failure(tmp_path, "b.jpg")], tmp_path)
    page = made.page
    for name in ("index.html", "gallery.css", "gallery.js", "data.js"):
        assert "://" not in (made.folder / name).read_text(encoding="utf-8")
    assert page.attributes("html") == [{"lang": "en"}]
    assert len(page.attributes("main")) == len(page.attributes("header")) == len(page.attributes("h1")) == 1
    identifiers = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    labelled = {label["for"] for label in page.attributes("label")}
    assert {field["id"] for field in page.attributes("select") + page.attributes("input")} == labelled
    assert {link["href"][1:] for link in page.attributes("a")} <= set(identifiers)


def test_without_javascript_the_page_says_where_the_captions_are(tmp_path: Path) -> None:
    page = gallery([success(tmp_path, "a.jpg")], tmp_path).page
    (note,) = page.text("noscript")
    assert "captions.jsonl" in note
    assert "hidden" in page.attributes("form")[0]  # JavaScript shows it; without, nothing on the page is dead


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_captioned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_folder(tmp_path / "new" / "gallery", images=[])
    monkeypatch.setattr(os, "access", lambda path, mode: not (path == tmp_path and mode == os.W_OK))
    with pytest.raises(UserError, match="cannot be written"):
        check_folder(tmp_path / "new" / "gallery", images=[])


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "gallery").write_text("a file")
    with pytest.raises(OSError, match="gallery"):
        gallery([], tmp_path)
