"""The page to drop images on, and the gallery on the server, in a real headless Chromium."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import CONTRASTS, CONTROL, Browser
from caption_server import Served, run_server
from rows import success
from servers import free_port
from tiny import picture

from infer.gallery import write_gallery

pytestmark = pytest.mark.slow

MAX_BYTES = 100_000
HOSTILE = "<img src=x onerror=alert(1)>.png"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number, name in enumerate(("a.png", "b.png", HOSTILE)):
        picture(number).save(folder / name)
    (folder / "text.jpg").write_text("no image")
    (folder / "large.png").write_bytes(bytes(MAX_BYTES + 1))
    return folder


def gallery_rows(photos: Path) -> list[Any]:
    return [success(photos, name, caption="a dog", score=-1.0) for name in ("a.png", "b.png")]


@pytest.fixture(scope="module")
def gallery(photos: Path) -> Path:
    return write_gallery(gallery_rows(photos), photos.parent / "gallery", title="t", model="m").parent


@pytest.fixture(scope="module")
def server(model: Path, gallery: Path) -> Iterator[Served]:
    with run_server("--model", model, "--gallery", gallery, "--max-bytes", MAX_BYTES) as served:
        yield served


def wait_for(browser: Browser, num_done: int) -> None:
    browser.wait(lambda: browser.texts("#status") == [f"{num_done} of {num_done} done"])


# ---- the page to drop images on -------------------------------------------------------------------------------


def test_chosen_images_get_captions_that_a_screen_reader_says(browser: Browser, server: Served, photos: Path) -> None:
    browser.open(f"{server.url}/")
    browser.choose_files("#files", *(photos / name for name in ("a.png", "text.jpg", HOSTILE, "large.png")))
    wait_for(browser, 4)
    cards = [browser.texts(f"#grid li:nth-child({n}) p") for n in range(1, 5)]
    assert [card[-1] for card in cards] == ["a.png", "text.jpg", HOSTILE, "large.png"]
    assert cards[1][0] == "undecodable"
    assert cards[3][:2] == ["too large", "more than 100,000 bytes: shrink it"]
    alts = browser.run("[...document.images].map(image => image.alt)")
    assert alts == [cards[0][0], cards[2][0]]
    assert all(alts)
    said = browser.run("[...document.querySelectorAll('[role=log] p')].map(line => line.textContent)")
    assert {f"a.png: {alts[0]}", f"{HOSTILE}: {alts[1]}"} <= set(said)
    assert any(line.startswith("text.jpg: no caption, undecodable: ") for line in said)
    assert len(said) == 4
    assert browser.run("document.scripts.length") == 1


def test_dropped_and_pasted_images_get_captions(browser: Browser, server: Served, photos: Path) -> None:
    browser.open(f"{server.url}/")
    content = list((photos / "a.png").read_bytes())
    for number, event in enumerate(("DragEvent('drop', {dataTransfer", "ClipboardEvent('paste', {clipboardData"), 1):
        browser.run(
            f"""(() => {{
                const files = new DataTransfer();
                files.items.add(new File([new Uint8Array({content})], "a.png", {{type: "image/png"}}));
                dispatchEvent(new {event}: files, cancelable: true, bubbles: true}}));
            }})()"""
        )
        wait_for(browser, number)
    first, second = (browser.texts(f"#grid li:nth-child({n}) p")[0] for n in (1, 2))
    assert first == second != "waiting"


def test_the_page_is_used_by_keyboard(browser: Browser, server: Served, photos: Path) -> None:
    browser.open(f"{server.url}/")
    reached = []
    for _ in range(2):
        browser.press("Tab")
        reached.append(browser.run("document.activeElement.id || document.activeElement.textContent"))
        assert browser.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert reached == ["Look over the gallery and correct its captions", "files"]
    browser.choose_files("#files", photos / "a.png")  # a dialog of the system does not open without a screen
    wait_for(browser, 1)
    browser.press("Tab")
    assert browser.run("document.activeElement.ariaLabel") == "Copy the caption of a.png"
    browser.call("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    browser.press("Enter")
    caption = browser.texts("#grid p")[0]
    browser.wait(lambda: browser.texts("#status") == [f"Copied: {caption}"])
    assert browser.run("navigator.clipboard.readText()") == caption


def test_the_page_has_names_roles_and_contrast(browser: Browser, server: Served, photos: Path) -> None:
    browser.open(f"{server.url}/")
    browser.choose_files("#files", photos / "a.png", photos / "text.jpg")
    wait_for(browser, 2)
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    found = {
        (node.get("role", {}).get("value"), node.get("name", {}).get("value")) for node in nodes if not node["ignored"]
    }
    assert {
        ("heading", "Caption images"), ("list", "Captions"), ("status", ""), ("log", "Captions as they arrive"),
    } <= found  # fmt: skip
    assert any(name and name.startswith("Choose images, drop them on this page") for _, name in found)
    for scheme in ("light", "dark"):
        browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        assert [(name, ratio) for name, ratio in browser.run(CONTRASTS) if ratio < 4.5] == []


# ---- the gallery ----------------------------------------------------------------------------------------------


def lines(gallery: Path) -> list[dict[str, Any]]:
    file = gallery / "corrections.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def wait_until_saved(browser: Browser) -> None:
    browser.wait(lambda: browser.texts("#saved") == ["saved in corrections.jsonl"])


def open_gallery(browser: Browser, url: str) -> None:
    """Open it, and wait until it has asked the server for corrections and has all thumbnails."""
    browser.open(url)
    browser.wait(lambda: browser.texts("#grid textarea"))
    browser.wait(lambda: browser.run("[...document.images].every(image => image.naturalWidth > 0)"))


def test_corrections_are_saved_as_one_goes_and_survive_another_model(
    browser: Browser, server: Served, photos: Path, gallery: Path
) -> None:
    open_gallery(browser, f"{server.url}/gallery/")
    assert browser.run("document.querySelectorAll('a.frame').length") == 0  # the originals are not served
    browser.write("#grid textarea", "a kitten")
    browser.click("#grid li:nth-child(2) input")
    wait_until_saved(browser)
    sha256 = [row["sha256"] for row in gallery_rows(photos)]
    assert sorted(lines(gallery), key=lambda line: line["path"]) == [
        {"path": "a.png", "captions": ["a kitten"], "images": str(photos), "sha256": sha256[0]},
        {"path": "b.png", "decorative": True, "images": str(photos), "sha256": sha256[1]},
    ]
    assert browser.run("localStorage.length") == 0
    better = [row | {"caption": "a cat", "model": "better"} for row in gallery_rows(photos)]
    write_gallery(better, gallery, title="t", model="better")
    open_gallery(browser, f"{server.url}/gallery/")
    assert browser.texts("#grid textarea") == ["a kitten", "a cat"]
    assert browser.texts("#corrected") == ["1 corrected, 1 decorative"]
    for _ in range(2):
        browser.click("#grid li:nth-child(2) input")
    browser.press("z", modifiers=CONTROL)
    browser.click("#grid button")
    wait_until_saved(browser)
    assert lines(gallery) == []
    open_gallery(browser, f"{server.url}/gallery/")
    assert browser.texts("#grid textarea:enabled") == ["a cat", "a cat"]


def test_what_the_server_did_not_save_is_kept_and_saved_later(
    browser: Browser, model: Path, photos: Path, tmp_path: Path
) -> None:
    gallery = write_gallery(gallery_rows(photos), tmp_path / "gallery", title="t", model="m").parent
    port = free_port()
    with run_server("--model", model, "--gallery", gallery, port=port) as first:
        open_gallery(browser, f"{first.url}/gallery/")
    browser.write("#grid textarea", "a kitten")
    message = "not saved, as the server does not answer: kept in this browser"
    browser.wait(lambda: browser.texts("#saved") == [message])
    assert lines(gallery) == []
    with run_server("--model", model, "--gallery", gallery, port=port) as second:
        open_gallery(browser, f"{second.url}/gallery/")
        assert browser.texts("#grid textarea")[0] == "a kitten"
        wait_until_saved(browser)
        assert [line["captions"] for line in lines(gallery)] == [["a kitten"]]
    browser.problems.clear()  # that a server did not answer


def test_a_gallery_on_a_server_of_files_keeps_corrections_in_the_browser(
    browser: Browser, nginx: tuple[str, Path], photos: Path
) -> None:
    address, root = nginx
    write_gallery(gallery_rows(photos), root / "gallery", title="t", model="m")
    for _ in range(2):
        open_gallery(browser, f"{address}/gallery/index.html")
        browser.write("#grid textarea", "a kitten")
        assert browser.texts("#saved") == ["kept in this browser"]
    browser.problems.clear()  # that there is no file of corrections
