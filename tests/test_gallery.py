"""The gallery page: what it shows, that no name or caption breaks it, and what it leaves on disk."""

import math
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import pytest
from html_page import HtmlPage
from PIL import Image

from captioner.cli import UserError
from infer.gallery import THUMBNAIL_SIDE_PIXELS, write_gallery
from infer.results import Row

ODD_NAMES = [
    "<b>\"'&.jpg",
    "über straße.jpg",
    "a%20b#c?d.jpg",
    os.fsdecode(b"bad\xff.jpg"),
    "sub folder/1:2.jpg",
]


class Page(HtmlPage):
    """A page of a gallery."""

    def linked_file(self, url: str) -> Path:
        """The file a browser would open for `url` on this page."""
        assert re.fullmatch(r"[\w./%~-]+", url, re.ASCII)
        return self.file.parent / os.fsdecode(unquote_to_bytes(url))


def success(root: Path, path: str, **more: Any) -> Any:
    row = {"root": str(root), "path": path, "caption": f"a picture named {path}", "score": math.log(0.5)}
    return row | {"width": 64, "height": 48} | more


def failure(root: Path, path: str, error: str = "BadImage", message: str = "it is cut off") -> Any:
    return {"root": str(root), "path": path, "error": error, "message": message}


def save(file: Path, image: Image.Image | None = None, **options: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    (image or Image.new("RGB", (64, 48), "teal")).save(file, **options)


def gallery(rows: list[Row], tmp_path: Path, **options: Any) -> Page:
    index = write_gallery(rows, tmp_path / "gallery", title="My pictures", model="the model", **options)
    assert index == tmp_path / "gallery" / "index.html"
    return Page(index)


def only_thumbnail(tmp_path: Path) -> Image.Image:
    (file,) = (tmp_path / "gallery" / "thumbnails").iterdir()
    return Image.open(file)


def shown_names(page: Page) -> list[str]:
    return [Path(page.linked_file(link["href"])).name for link in page.attributes("a") if "frame" in link.values()]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_an_odd_name_is_shown_and_linked_and_breaks_nothing(tmp_path: Path, name: str) -> None:
    save(tmp_path / "pictures" / name)
    page = gallery([success(tmp_path / "pictures", name)], tmp_path)
    shown = re.sub("[\ud800-\udfff]", "\ufffd", name)
    assert f"a picture named {shown}" in page.text("p")
    assert shown in page.text("p")
    (image,) = page.attributes("img")
    assert image["alt"] == f"a picture named {shown}"
    assert page.linked_file(image["src"]).is_file()
    (link,) = (link for link in page.attributes("a") if link.get("class") == "frame")
    assert page.linked_file(link["href"]).samefile(tmp_path / "pictures" / name)
    assert not page.attributes("b")


def test_markup_in_captions_titles_and_messages_stays_text(tmp_path: Path) -> None:
    bad = "<script>alert('\"&</script>\udcff"
    rows = [success(tmp_path, "a.jpg", caption=bad), failure(tmp_path, "b.jpg", error=bad, message=bad)]
    index = write_gallery(rows, tmp_path / "gallery", title=bad, model=bad)
    page, shown = Page(index), bad.replace("\udcff", "\ufffd")
    assert len(page.attributes("script")) == 1
    assert page.text("h1") == [shown]
    assert [cell for cell in page.text("td") if cell == shown] == [shown, shown]
    assert shown in page.text("p")
    assert shown in page.text("dd")


def test_the_summary_counts_captions_and_failures_by_error(tmp_path: Path) -> None:
    rows = [success(tmp_path, f"{number}.jpg") for number in range(3)]
    rows += [
        failure(tmp_path, "x", "BadImage"),
        failure(tmp_path, "y", "BadImage"),
        failure(tmp_path, "z", "TooBig"),
    ]
    page = gallery(rows, tmp_path)
    summary = dict(zip(page.text("dt"), page.text("dd"), strict=True))
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d", summary.pop("Date"))
    assert summary == {
        "Captioned": "3",
        "Failed": "3: 2 BadImage, 1 TooBig",
        "Model": "the model",
        "Folder": str(tmp_path),
    }


def test_failures_are_in_a_table_on_the_first_page_only(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"not a picture")
    rows = [success(tmp_path, "c.jpg"), success(tmp_path, "d.jpg")]
    rows += [failure(tmp_path, "b.jpg"), failure(tmp_path, "a.jpg", "Odd", "<why>")]
    page = gallery(rows, tmp_path, page_size=1)
    assert page.text("td") == [
        "a.jpg",
        "Odd",
        "<why>",
        "b.jpg (not readable now)",
        "BadImage",
        "it is cut off",
    ]
    assert [link for link in page.attributes("a") if link["href"] == "../a.jpg"]
    assert not Page(tmp_path / "gallery" / "page-002.html").attributes("table")


def test_with_several_roots_paths_say_which(tmp_path: Path) -> None:
    for root in ("one", "two"):
        save(tmp_path / root / "a.jpg")
    page = gallery([success(tmp_path / root, "a.jpg") for root in ("one", "two")], tmp_path)
    assert {str(tmp_path / "one/a.jpg"), str(tmp_path / "two/a.jpg")} <= set(page.text("p"))
    assert len({image["src"] for image in page.attributes("img")}) == 2


def test_the_least_certain_come_first_over_all_pages(tmp_path: Path) -> None:
    scores = {"a.jpg": -0.1, "b.jpg": -3.0, "c.jpg": -1.0, "d.jpg": -2.0}
    for name in scores:
        save(tmp_path / name)
    first = gallery([success(tmp_path, name, score=score) for name, score in scores.items()], tmp_path, page_size=3)
    assert shown_names(first) == ["b.jpg", "d.jpg", "c.jpg"]
    assert shown_names(Page(tmp_path / "gallery" / "page-002.html")) == ["a.jpg"]


def test_scores_are_shown_as_probabilities(tmp_path: Path) -> None:
    row = success(tmp_path, "a.jpg", score=math.log(0.82), token_scores=[math.log(0.9), math.log(0.25)])
    assert "confidence per word 0.82, lowest 0.25" in gallery([row], tmp_path).text("p")
    assert "confidence per word 0.50" in gallery([success(tmp_path, "a.jpg")], tmp_path).text("p")


def test_a_row_without_a_score_comes_last_and_claims_no_confidence(tmp_path: Path) -> None:
    rows = [success(tmp_path, "a.jpg"), success(tmp_path, "b.jpg")]
    del rows[0]["score"]
    page = gallery(rows, tmp_path)
    assert [text for text in page.text("p") if text in ("a.jpg", "b.jpg")] == ["b.jpg", "a.jpg"]
    assert len([text for text in page.text("p") if text.startswith("confidence")]) == 1


def test_pages_split_at_the_page_size_and_link_to_each_other(tmp_path: Path) -> None:
    rows = [success(tmp_path, f"{number:02d}.jpg") for number in range(25)]
    gallery(rows, tmp_path, page_size=2)
    files = sorted((tmp_path / "gallery").glob("*.html"))
    assert [file.name for file in files] == ["index.html"] + [f"page-{n:03d}.html" for n in range(2, 14)]
    pages = [Page(file) for file in files]
    assert [len(page.attributes("figure")) for page in pages] == [2] * 12 + [1]
    for page, current in zip(pages, range(1, 14), strict=True):
        links = [link for link in page.attributes("a") if link["href"].endswith(".html")]
        assert all(page.linked_file(link["href"]).is_file() for link in links)
        assert [link["aria-label"] for link in links if "aria-current" in link] == [f"Page {current}"] * 2
        assert len([link for link in links if link.get("rel") == "next"]) == (2 if current < 13 else 0)
    assert "13 to 14 of 25 by rising confidence" in pages[6].text("p")
    assert pages[6].text("nav")[0] == "Previous 1 … 5 6 7 8 9 … 13 Next"


def test_a_smaller_gallery_removes_what_the_larger_one_left_and_nothing_else(tmp_path: Path) -> None:
    rows = [success(tmp_path, f"{number}.jpg") for number in range(3)]
    for row in rows:
        save(tmp_path / row["path"])
    gallery(rows, tmp_path, page_size=1)
    (tmp_path / "gallery" / "notes.html").write_text("mine")
    (tmp_path / "gallery" / "thumbnails" / "mine.jpg").write_text("mine")
    page = gallery(rows[:1], tmp_path, page_size=1)
    ours = page.attributes("img")[0]["src"].removeprefix("thumbnails/")
    assert {file.name for file in (tmp_path / "gallery").iterdir()} == {
        "index.html",
        "notes.html",
        "thumbnails",
    }
    assert {file.name for file in (tmp_path / "gallery" / "thumbnails").iterdir()} == {ours, "mine.jpg"}


def test_no_rows_give_a_page_that_says_so(tmp_path: Path) -> None:
    page = gallery([], tmp_path)
    assert "No files were found, so there is nothing to show." in page.text("p")
    assert not page.attributes("figure")
    assert "No file could be captioned." in gallery([failure(tmp_path, "a")], tmp_path).text("p")


def test_a_vanished_or_broken_picture_has_a_placeholder(tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 and no more")
    page = gallery([success(tmp_path, "broken.jpg"), success(tmp_path, "gone.jpg")], tmp_path)
    assert page.text("span") == ["No preview", "No preview"]
    assert not page.attributes("img")
    assert shown_names(page) == ["broken.jpg"]
    assert "a picture named gone.jpg" in page.text("p")


def test_thumbnails_are_small_and_keep_their_shape(tmp_path: Path) -> None:
    save(tmp_path / "a.jpg", Image.new("RGB", (4000, 1000)))
    page = gallery([success(tmp_path, "a.jpg")], tmp_path)
    assert only_thumbnail(tmp_path).size == (THUMBNAIL_SIDE_PIXELS, THUMBNAIL_SIDE_PIXELS // 4)
    (image,) = page.attributes("img")
    assert (image["width"], image["height"], image["loading"]) == ("320", "80", "lazy")


def test_thumbnails_stand_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side: turn a quarter clockwise
    stored = Image.new("RGB", (1200, 800), "red")
    stored.paste("blue", (0, 0, 600, 800))
    save(tmp_path / "a.jpg", stored, exif=exif)
    gallery([success(tmp_path, "a.jpg")], tmp_path)
    thumbnail = only_thumbnail(tmp_path)
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
    gallery([success(tmp_path, name)], tmp_path)
    thumbnail = only_thumbnail(tmp_path)
    assert (thumbnail.format, thumbnail.mode) == ("JPEG", "RGB")
    assert thumbnail.getpixel((25, 25)) == pytest.approx(expected, abs=6)


def test_a_thumbnail_is_reused_until_its_picture_changes(tmp_path: Path) -> None:
    rows = [success(tmp_path, "a.jpg")]
    save(tmp_path / "a.jpg")
    gallery(rows, tmp_path)
    (file,) = (tmp_path / "gallery" / "thumbnails").iterdir()
    made = file.stat().st_mtime_ns
    gallery(rows, tmp_path)
    assert file.stat().st_mtime_ns == made
    save(tmp_path / "other.jpg", Image.new("RGB", (64, 48), "red"))
    os.utime(tmp_path / "other.jpg", (0, 0))
    (tmp_path / "other.jpg").replace(tmp_path / "a.jpg")  # an old picture, moved to the place of the first
    gallery(rows, tmp_path)
    assert only_thumbnail(tmp_path).getpixel((30, 20)) == pytest.approx((254, 0, 0), abs=6)


def test_the_same_picture_twice_has_one_thumbnail(tmp_path: Path) -> None:
    save(tmp_path / "sub" / "a.jpg")
    rows = [success(tmp_path, "sub/a.jpg"), success(tmp_path / "sub", "a.jpg")]
    assert len({image["src"] for image in gallery(rows, tmp_path).attributes("img")}) == 1


def test_relative_folders_are_taken_from_the_current_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(Path("pictures/a.jpg"))
    page = Page(write_gallery([success(Path("pictures"), "a.jpg")], Path("out"), title="t", model="m"))
    assert shown_names(page) == ["a.jpg"]
    assert page.linked_file(page.attributes("img")[0]["src"]).is_file()


def test_the_page_needs_no_network_and_names_its_parts(tmp_path: Path) -> None:
    page = gallery([success(tmp_path, "a.jpg"), failure(tmp_path, "b.jpg")], tmp_path)
    assert "://" not in page.file.read_text(encoding="utf-8")
    assert page.attributes("html") == [{"lang": "en"}]
    assert len(page.attributes("main")) == len(page.attributes("header")) == len(page.attributes("h1")) == 1
    identifiers = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    labelled = {label["for"] for label in page.attributes("label")}
    assert {field["id"] for field in page.attributes("select") + page.attributes("input")} == labelled
    targets = {link["href"][1:] for link in page.attributes("a") if link["href"].startswith("#")}
    assert targets == {"pictures", "failures"}
    assert targets <= set(identifiers)
    assert "hidden" in page.attributes("form")[0]  # JavaScript shows it; without, nothing on the page is dead


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "gallery").write_text("a file")
    with pytest.raises(UserError, match=r"cannot write the gallery file .*index\.html: .+; choose a folder"):
        gallery([], tmp_path)
