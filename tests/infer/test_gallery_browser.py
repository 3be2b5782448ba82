"""The gallery in a real headless Chromium, opened from disk and used by keyboard and mouse."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import CONTRASTS, CONTROL, Browser
from PIL import Image
from rows import failure, success

from captioner.attention import Attention
from infer.gallery import Source, write_gallery
from infer.listing import ImageFile
from sharding.packing.caption_files import SourceImage, parse_images

HOSTILE = [
    '"><script>alert(1)</script>.jpg',
    "</script><img src=x onerror=alert(2)>.jpg",
    "line\u2028and\u2029end.jpg",
    "javascript:alert(3).jpg",
    os.fsdecode(b"bad\xff.jpg"),
    "a%22 onload=alert(4)#?.jpg",
    "__proto__",
]


def show(browser: Browser, rows: list[Any], folder: Path) -> None:
    browser.open(write_gallery(rows, folder / "gallery", title="My pictures", model="the model"))


def mixed_rows(root: Path | str) -> list[Any]:
    """One of each kind; the confidence and the score order the captioned ones differently."""
    return [
        success(root, "a.jpg", caption="a red bus", score=-0.9, confidence=0.9),
        success(root, "b.jpg", caption="a dog", score=-0.5, confidence=0.2, review="low confidence", alt=""),
        success(root, "c.jpg", caption="a dog", score=-0.5, confidence=0.5, duplicate_of="x/b.jpg", alt="A dog."),
        success(root, "d.jpg", caption="a chart", score=-0.2, confidence=0.6, review="unlike training data"),
        failure(root, "e.jpg", "truncated", "it ends too early"),
        success(root, "f.jpg", caption="a Cat", score=-0.1, confidence=0.1, captions=["a Cat", "two kittens"],
                review="low confidence, unlike training data"),
    ]  # fmt: skip


def looking_row(root: Path, name: str, words: tuple[str, ...], **more: Any) -> Any:
    """An image of 200 x 100 pixels; word n looks at cell n of 3 x 3 in its middle half."""
    root.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (200, 100), "white").save(root / name)
    weights_TR = np.eye(9, dtype=np.float32)[np.arange(len(words)) % 9]
    seen = Attention(words=words, grid=(3, 3), weights_TR=weights_TR).to_json()
    return success(
        root, name, caption="".join(words), attention={"area": [0.25, 0.25, 0.75, 0.75], **seen}, score=-1.0, **more
    )


def heat(browser: Browser, card: int = 1) -> list[list[int]] | None:
    """Red and opacity of the heat map in the middles of the 3 x 3 cells, and in a corner that the model did not see."""
    points = [(50 + 100 * (2 * column + 1) / 6, 25 + 50 * (2 * row + 1) / 6) for row in range(3) for column in range(3)]
    script = f"""(canvas => {{
        if (!canvas) return null;
        const copy = Object.assign(document.createElement("canvas"), {{width: 200, height: 100}});
        const context = copy.getContext("2d", {{willReadFrequently: true}});
        context.drawImage(canvas, 0, 0, 200, 100);
        return {json.dumps([*points, (5, 5)])}.map(([x, y]) => {{
            const pixel = context.getImageData(x, y, 1, 1).data;
            return [pixel[0], pixel[3]];
        }});
    }})(document.querySelector("#grid li:nth-child({card}) canvas"))"""
    return browser.run(script)


def looked_at(browser: Browser, card: int = 1) -> int | None:
    """The number of the cell that is clear in the heat map, all others being dark."""
    found = heat(browser, card)
    if found is None:
        return None
    *cells, outside = found
    opacities = [opacity for _, opacity in cells]
    clear = min(range(9), key=opacities.__getitem__)
    assert cells[clear][0] > 200
    assert opacities[clear] < 150
    dark = [cells[number] for number in range(9) if number != clear]
    assert all(opacity > 170 and red < 30 for red, opacity in [*dark, outside])
    return clear


def paths(browser: Browser) -> str:
    """The first letters of the paths of the cards, in order."""
    return "".join(path[0] for path in browser.texts("#grid .path"))


def test_ten_thousand_rows_open_and_are_searched_at_once(browser: Browser, tmp_path: Path) -> None:
    rows = [success("photos", f"{n:05}.jpg", caption=f"number {n}", score=-n / 10_000) for n in range(10_000)]
    show(browser, rows, tmp_path)
    assert browser.texts("#shown") == ["1 to 100 of 10,000"]
    assert browser.texts("#grid .path")[:2] == ["09999.jpg", "09998.jpg"]
    assert len(browser.texts("#grid li")) == 100
    assert browser.run("performance.getEntriesByType('navigation')[0].domComplete") < 10_000
    browser.choose("#sort", "score-falling")
    browser.click("#next")
    assert browser.texts("#grid .path")[0] == "00100.jpg"
    assert browser.texts("#shown") == ["101 to 200 of 10,000"]
    assert browser.texts("#page") == ["Page 2 of 100"]
    assert browser.run("document.activeElement.id") == "images"
    browser.write("#search", "NUMBER 999")
    assert browser.texts("#shown") == ["1 to 19 of 19 found (10,000 in all)"]
    assert browser.texts("#pages") == []
    seconds = "(() => { const start = performance.now(); show(); return performance.now() - start; })() / 1000"
    assert browser.run(seconds) < 2


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("all", "fbcdae"), ("review", "fbd"), ("uncertain", "fb"), ("unlike", "fd"), ("duplicate", "c"), ("error", "e"),
        ("corrected", ""), ("decorative", ""),
    ],
)  # fmt: skip
def test_the_filter_shows_the_rows_of_a_kind(browser: Browser, tmp_path: Path, kind: str, expected: str) -> None:
    show(browser, mixed_rows("photos"), tmp_path)
    browser.choose("#filter", kind)
    assert paths(browser) == expected
    if kind not in ("corrected", "decorative"):
        label = browser.run(f"document.querySelector('#filter option[value={kind}]').textContent")
        assert label.endswith(f" ({len(expected)})")


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("confidence", "fbcdae"), ("confidence-falling", "adcbfe"), ("score", "abcdfe"), ("score-falling", "fdbcae"),
        ("path", "abcdef"),
    ],
)  # fmt: skip
def test_errors_come_last_in_every_order_but_that_of_paths(
    browser: Browser, tmp_path: Path, order: str, expected: str
) -> None:
    show(browser, mixed_rows("photos"), tmp_path)
    assert paths(browser) == "fbcdae"
    browser.choose("#sort", order)
    assert paths(browser) == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [("dog", "bc"), ("  DOG   c.jpg ", "c"), ("kittens", "f"), ("too early", "e"), ("truncated", "e"), ("zebra", "")],
)
def test_the_search_looks_for_all_words_everywhere(browser: Browser, tmp_path: Path, words: str, expected: str) -> None:
    show(browser, mixed_rows("photos"), tmp_path)
    browser.write("#search", words)
    assert paths(browser) == expected
    assert browser.texts("#shown") == [
        f"1 to {len(expected)} of {len(expected)} found (6 in all)" if expected else "None of 6 files"
    ]


def test_a_card_tells_all_about_its_picture(browser: Browser, tmp_path: Path) -> None:
    show(browser, mixed_rows("photos"), tmp_path)
    cards = [browser.texts(f"#grid li:nth-child({n}) figcaption > :is(p, textarea)") for n in range(1, 7)]
    assert cards[0] == [
        "a Cat",
        "or: two kittens",
        "alt: A picture.",
        "low confidence, unlike training data",
        "confidence 0.10, score -0.10",
        "f.jpg",
    ]
    assert cards[1][1] == "no alt text"
    assert cards[2][3] == "same bytes as x/b.jpg"
    assert cards[5] == ["truncated", "it ends too early", "e.jpg"]


def test_pictures_are_loaded_when_they_come_near_and_have_their_alt_text(browser: Browser, tmp_path: Path) -> None:
    for number in range(90):
        Image.new("RGB", (16, 12), (2 * number, 0, 0)).save(tmp_path / f"{number:02}.jpg")
    rows = [success(tmp_path, f"{n:02}.jpg", alt=f"Picture {n}." if n else "", score=-1.0) for n in range(90)]
    show(browser, rows, tmp_path)
    loaded = "[...document.images].map(image => image.complete && image.naturalWidth > 0)"
    browser.wait(lambda: browser.run(loaded)[0])
    assert not browser.run(loaded)[-1]
    browser.run("document.images[89].scrollIntoView()")
    browser.wait(lambda: browser.run(loaded)[-1])
    alts = browser.run("[...document.images].map(image => image.alt)")
    assert alts == ["a picture of 00.jpg", *(f"Picture {number}." for number in range(1, 90))]
    assert browser.run("decodeURI(document.querySelector('a.frame').href)") == (tmp_path / "00.jpg").as_uri()


def test_hostile_names_and_captions_are_only_text(browser: Browser, tmp_path: Path) -> None:
    root = tmp_path / '"><script>alert(0)<'
    rows = []
    for name in HOSTILE:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
        texts = {"caption": name, "alt": name, "review": name, "duplicate_of": name, "captions": [name, name]}
        rows.append(success(root, name, score=-1.0, **texts))
    rows += [failure(f"{root}2", name, error=name, message=name) for name in HOSTILE]
    show(browser, rows, tmp_path)
    assert browser.run("[...document.scripts].map(script => script.getAttribute('src'))") == ["data.js", "gallery.js"]
    assert browser.run("document.querySelectorAll('main img').length") == 0
    assert browser.texts("#grid textarea") == HOSTILE
    assert browser.run("[...document.links].map(link => link.protocol)") == ["file:"] * (1 + len(HOSTILE))
    for number in range(len(HOSTILE)):
        browser.write(f"#grid li:nth-child({number + 1}) textarea", f"number {number}")
    browser.click("#corrections button")
    corrected = {json.loads(line)["path"] for line in browser.downloaded().splitlines()}
    assert corrected == {f"{root.name}/{name}" for name in HOSTILE}


# ---- where the model looked -----------------------------------------------------------------------------------

WORDS = ("a", " dog", " sleeps", ".")


def show_looking(browser: Browser, tmp_path: Path, num_cards: int = 1) -> None:
    rows = [looking_row(tmp_path / "photos", f"{number}.png", WORDS) for number in range(num_cards)]
    show(browser, rows, tmp_path)
    browser.wait(lambda: browser.run("[...document.images].every(image => image.naturalWidth > 0)"))


def test_pointing_at_a_word_shows_where_it_looked(browser: Browser, tmp_path: Path) -> None:
    show_looking(browser, tmp_path, num_cards=2)
    assert browser.texts("#grid li:first-child .words") == ["a dog sleeps."]
    assert heat(browser) is None
    for number, text in enumerate(("a: looks at the upper left", "dog: looks at the top")):
        browser.point(f"#grid li:first-child .words button:nth-of-type({number + 1})")
        browser.wait(lambda number=number: looked_at(browser) == number)
        assert browser.texts("#grid li:first-child .seen") == [f"{text}, 100 % of its attention"]
    assert heat(browser, card=2) is None
    browser.point("h1")
    browser.wait(lambda: heat(browser) is None)
    assert browser.texts("#grid li:first-child .seen") == [""]


def test_the_words_are_one_tab_stop_and_arrow_keys_move_between_them(browser: Browser, tmp_path: Path) -> None:
    show_looking(browser, tmp_path, num_cards=2)
    browser.run("document.querySelector('#grid textarea').focus()")
    browser.press("Tab")
    focused = "document.activeElement.ariaLabel"
    assert browser.run(focused) == "a: looks at the upper left, 100 % of its attention"
    assert looked_at(browser) == 0
    for key, wanted in [
        ("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", 3), ("ArrowRight", 3), ("Home", 0),
        ("ArrowLeft", 0), ("ArrowRight", 1),
    ]:  # fmt: skip
        browser.press(key)
        assert looked_at(browser) == wanted
        assert browser.run("document.activeElement.textContent") == WORDS[wanted].strip()
    assert browser.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    browser.press("Escape")
    assert heat(browser) is None
    browser.press("Tab")  # to the next card
    browser.run("document.querySelector('#grid textarea').focus()")
    browser.press("Tab")
    assert looked_at(browser) == 1


def test_words_have_roles_and_names(browser: Browser, tmp_path: Path) -> None:
    show_looking(browser, tmp_path)
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    found = [(node["role"]["value"], node["name"]["value"]) for node in nodes if not node["ignored"] and "name" in node]
    assert ("toolbar", "Where the model looked in 0.png") in found
    assert [name for role, name in found if role == "button" and "looks at" in name] == [
        "a: looks at the upper left, 100 % of its attention",
        "dog: looks at the top, 100 % of its attention",
        "sleeps: looks at the upper right, 100 % of its attention",
        ".: looks at the left, 100 % of its attention",
    ]


def test_hostile_words_are_only_text(browser: Browser, tmp_path: Path) -> None:
    words = tuple(name.strip() for name in HOSTILE)
    show(browser, [looking_row(tmp_path / "photos", "a.png", words)], tmp_path)
    assert browser.run("[...document.querySelectorAll('.words button')].map(one => one.textContent)") == list(words)
    assert browser.run("document.scripts.length") == 2
    for number in range(len(words)):
        browser.run(f"document.querySelectorAll('.words button')[{number}].focus()")
        assert browser.texts(".seen")[0].startswith(f"{words[number]}: looks at the ")


def test_words_without_a_thumbnail_still_have_their_text(browser: Browser, tmp_path: Path) -> None:
    row = looking_row(tmp_path / "photos", "a.png", WORDS)
    (tmp_path / "photos" / "a.png").unlink()
    show(browser, [row], tmp_path)
    browser.run("document.querySelector('.words button').focus()")
    assert browser.texts(".seen") == ["a: looks at the upper left, 100 % of its attention"]
    assert heat(browser) is None


# ---- corrections ----------------------------------------------------------------------------------------------


def test_corrections_are_downloaded_as_captions_for_make_shards(browser: Browser, tmp_path: Path) -> None:
    rows = [*mixed_rows(tmp_path / "one"), *mixed_rows(tmp_path / "two" / "ü")]
    show(browser, rows, tmp_path)
    browser.choose("#sort", "path")
    assert browser.texts("#corrections") == []
    for label, text in (("one/a.jpg", "  a “red” tram\n at night "), ("two/ü/b.jpg", "a wolf 🐺")):
        browser.write(f"textarea[aria-label$='{label}']", text)
    assert browser.texts("#corrected") == ["2 corrected"]
    assert browser.texts("#corrections p") == [f"for make_shards.py --images {tmp_path}"]
    browser.click("#corrections button")
    pictures = parse_images(browser.downloaded(), kind=".jsonl", split="train", location="corrections.jsonl")
    assert [(picture.file_name, picture.captions) for picture in pictures if isinstance(picture, SourceImage)] == [
        ("one/a.jpg", [(None, "a “red” tram at night")]),
        ("two/ü/b.jpg", [(None, "a wolf 🐺")]),
    ]
    browser.choose("#filter", "corrected")
    assert browser.texts("#grid textarea") == ["a “red” tram at night", "a wolf 🐺"]
    browser.write("#search", "wolf")
    assert browser.texts("#grid textarea") == ["a wolf 🐺"]


def test_a_picture_inside_a_shard_cannot_be_corrected(
    browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infer.gallery.locate", lambda root, path: ImageFile(root, path, 0, 1))
    show(browser, [success("shards", "train-000000.tar/a.jpg", caption="a dog")], tmp_path)
    assert browser.texts("textarea") == []
    assert browser.texts("#grid figcaption p")[0] == "a dog"


def test_corrections_outlive_a_reload_and_can_be_reset(browser: Browser, tmp_path: Path) -> None:
    show(browser, mixed_rows("photos"), tmp_path)
    browser.write("#grid textarea", "a kitten")
    assert browser.texts("#saved") == ["kept in this browser"]
    show(browser, mixed_rows("photos"), tmp_path)
    assert browser.texts("#grid textarea")[0] == "a kitten"
    assert browser.texts("#grid figcaption .quiet")[0].startswith("was: a Cat")
    browser.click("#grid button")
    assert browser.texts("#grid textarea")[0] == "a Cat"
    assert browser.texts("#corrected") == ["0 corrected"]
    browser.write("#grid textarea", "")
    browser.press("Tab")
    assert browser.texts("#grid textarea")[0] == "a Cat"
    show(browser, mixed_rows("photos"), tmp_path)
    assert browser.texts("#corrections") == []


BOX = "#grid li:nth-child(2) input"


def test_decorative_images_need_no_caption_and_outlive_a_reload(browser: Browser, tmp_path: Path) -> None:
    show(browser, mixed_rows("photos"), tmp_path)
    browser.run(f"document.querySelector('{BOX}').focus()")
    browser.press("Space")
    for _ in range(2):
        assert browser.run(f"document.querySelector('{BOX}').checked")
        assert browser.run("document.querySelectorAll('#grid textarea')[1].disabled")
        assert browser.texts("#corrected") == ["0 corrected, 1 decorative"]
        assert "empty alt text" in browser.texts("#grid li:nth-child(2) figcaption p")
        show(browser, mixed_rows("photos"), tmp_path)
    browser.click("#corrections button")
    sha256 = success("photos", "b.jpg")["sha256"]
    wanted = {"path": "b.jpg", "decorative": True, "images": "photos", "sha256": sha256}
    assert json.loads(browser.downloaded()) == wanted
    browser.choose("#filter", "decorative")
    assert paths(browser) == "b"
    browser.click("#grid input")
    assert browser.texts("#grid textarea:enabled") == ["a dog"]


def test_many_steps_are_undone_one_after_the_other(browser: Browser, tmp_path: Path) -> None:
    """A step is a word, a deletion, a box or a reset, wherever it was."""
    show(browser, mixed_rows("photos"), tmp_path)
    state = "JSON.stringify([[...document.querySelectorAll('#grid textarea')].map(f => f.value), \
[...document.querySelectorAll('#grid input')].map(f => f.checked)])"
    assert not browser.texts("#undo")
    seen = [browser.run(state)]
    browser.run("document.querySelector('#grid textarea').focus()")
    browser.run("document.activeElement.setSelectionRange(99, 99)")
    for word in (" asleep", " here"):
        browser.call("Input.insertText", text=word)
        seen.append(browser.run(state))
    for letter in "by":
        browser.call("Input.insertText", text=letter)
    seen[-1] = browser.run(state)
    browser.write("#grid li:nth-child(3) textarea", "a wolf")
    seen.append(browser.run(state))
    browser.click(BOX)
    seen.append(browser.run(state))
    browser.click("#grid li:nth-child(3) button")
    seen.append(browser.run(state))
    assert len(set(seen)) == len(seen) == 6
    for wanted in reversed(seen[2:-1]):
        browser.press("z", modifiers=CONTROL)
        assert browser.run(state) == wanted
    assert browser.texts("#saved") == ["Undone: c.jpg"]
    for wanted in reversed(seen[:2]):
        browser.click("#undo")
        assert browser.run(state) == wanted
    assert browser.run("document.activeElement.ariaLabel") == "Caption of f.jpg"
    assert browser.texts("#corrected") == ["0 corrected"]
    browser.press("z", modifiers=CONTROL)
    assert browser.run(state) == seen[0]


def test_a_step_on_another_page_is_undone_and_named(browser: Browser, tmp_path: Path) -> None:
    show(browser, [success("photos", f"{n:03}.jpg", score=-1.0) for n in range(150)], tmp_path)
    browser.write("#grid textarea", "a kitten")
    browser.click("#next")
    browser.click("#undo")
    assert browser.texts("#saved") == ["Undone: 000.jpg"]
    browser.click("#previous")
    assert browser.texts("#grid textarea")[0] == "a picture of 000.jpg"


def test_the_search_field_keeps_its_own_undo(browser: Browser, tmp_path: Path) -> None:
    show(browser, mixed_rows("photos"), tmp_path)
    browser.write("#grid textarea", "a kitten")
    browser.write("#search", "kitten")
    browser.press("z", modifiers=CONTROL)
    assert browser.texts("#grid textarea")[0] == "a kitten"


def test_what_a_person_wrote_is_theirs_after_captioning_again(browser: Browser, tmp_path: Path) -> None:
    show(browser, mixed_rows("photos"), tmp_path)
    browser.write("#grid textarea", "a kitten")
    browser.click(BOX)
    browser.click("#corrections button")
    (tmp_path / "downloaded.jsonl").write_bytes(browser.downloaded())
    browser.run("localStorage.clear()")  # another browser
    better = [row | {"caption": "a better caption", "model": "better"} if "caption" in row else row
              for row in mixed_rows("photos")]  # fmt: skip
    corrections = tmp_path / "downloaded.jsonl"
    folder = tmp_path / "gallery"
    browser.open(write_gallery(better, folder, title="t", model="better", sources=[Source(corrections)]))
    assert browser.texts("#grid textarea")[:3] == ["a kitten", "a better caption", "a better caption"]
    assert browser.texts("#grid figcaption .quiet")[0].startswith("was: a better caption")
    assert browser.run(f"document.querySelector('{BOX}').checked")
    browser.click("#grid button")
    browser.open(folder / "index.html")
    assert browser.texts("#grid textarea")[0] == "a better caption"  # as this browser has it, whatever data.js says


@pytest.mark.parametrize("is_kept", [False, True])
def test_leaving_is_questioned_where_corrections_would_be_lost(browser: Browser, tmp_path: Path, is_kept: bool) -> None:
    show(browser, mixed_rows("photos"), tmp_path)
    if not is_kept:
        browser.run("Storage.prototype.setItem = () => { throw new Error('forbidden'); }")
    leave = "dispatchEvent(new Event('beforeunload', {cancelable: true}))"
    assert browser.run(leave)
    browser.write("#grid textarea", "a kitten")
    assert browser.run(leave) == is_kept
    browser.click("#corrections button")
    browser.downloaded()
    assert browser.run(leave)


def test_all_is_reached_and_used_by_keyboard(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "f.jpg").write_bytes(b"")
    show(browser, mixed_rows(tmp_path), tmp_path)
    focused = "document.activeElement.ariaLabel || document.activeElement.id || document.activeElement.className"
    reached = []
    for _ in range(8):
        browser.press("Tab")
        reached.append(browser.run(focused))
        assert browser.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert reached[:4] == ["skip", "search", "filter", "sort"]
    assert reached[4:] == ["No preview of f.jpg", "Caption of f.jpg", "Decorative: f.jpg", "Caption of b.jpg"]
    browser.call("Input.insertText", text=" here")
    browser.press("Enter")
    assert browser.run(focused) == "Caption of c.jpg"
    assert browser.texts("#grid textarea")[1] == "a dog here"
    for _ in range(6):  # over a box, and two more captions with theirs
        browser.press("Tab")
    browser.press("Enter")
    line = json.loads(browser.downloaded())
    assert (line["path"], line["captions"]) == ("b.jpg", ["a dog here"])


def test_assistive_technology_finds_names_roles_and_what_changes(browser: Browser, tmp_path: Path) -> None:
    show(browser, mixed_rows("photos"), tmp_path)
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    found = {
        (node.get("role", {}).get("value"), node.get("name", {}).get("value")) for node in nodes if not node["ignored"]
    }
    assert {
        ("heading", "My pictures"), ("search", ""), ("searchbox", "Search words and paths"), ("combobox", "Show"),
        ("combobox", "Sort by"), ("list", "Images"), ("textbox", "Caption of a.jpg"), ("status", ""),
        ("checkbox", "Decorative: a.jpg"),
    } <= found  # fmt: skip
    unnamed = {
        role
        for role, name in found
        if role in ("textbox", "button", "link", "combobox", "checkbox", "image") and not name
    }
    assert unnamed == set()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_the_contrast_of_wcag_aa(browser: Browser, tmp_path: Path, scheme: str) -> None:
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    show(browser, [*mixed_rows("photos"), looking_row(tmp_path / "photos", "a.png", WORDS)], tmp_path)
    browser.run("document.querySelector('.words button').focus()")
    browser.write("#grid textarea", "a kitten")
    browser.click(BOX)
    contrasts = browser.run(CONTRASTS)
    tags = {name.partition(".")[0] for name, _ in contrasts}
    assert tags >= {"H1", "P", "TEXTAREA", "BUTTON", "INPUT", "LABEL", "DD"}
    assert [(name, ratio) for name, ratio in contrasts if ratio < 4.5] == []


def test_nothing_is_cut_off_in_a_narrow_window(browser: Browser, tmp_path: Path) -> None:
    browser.call("Emulation.setDeviceMetricsOverride", width=400, height=800, deviceScaleFactor=1, mobile=False)
    rows = [*mixed_rows("photos"), failure("photos", "long" * 100, message="x" * 300)]
    show(browser, rows, tmp_path)
    browser.write("#grid textarea", "a kitten")
    width = browser.run("document.documentElement.clientWidth")
    rights = "[...document.querySelectorAll('main *')].map(element => element.getBoundingClientRect().right)"
    assert 0 < max(browser.run(rights)) <= width == browser.run("document.documentElement.scrollWidth")


@pytest.mark.parametrize("rows", [[], [failure("photos", "a")]])
def test_a_gallery_without_captions_says_so(browser: Browser, tmp_path: Path, rows: list[Any]) -> None:
    show(browser, rows, tmp_path)
    expected = "1 to 1 of 1" if rows else "No files were found, so there is nothing to show."
    assert browser.texts("#shown") == [expected]


def test_a_page_without_its_data_says_so(browser: Browser, tmp_path: Path) -> None:
    index = write_gallery([], tmp_path / "gallery", title="t", model="m")
    (tmp_path / "gallery" / "data.js").unlink()
    browser.open(index)
    assert browser.texts("#shown") == ["There is no data.js beside this page: copy the whole folder."]
    browser.problems.clear()  # that the file is not there
