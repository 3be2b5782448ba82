"""What a person wrote of an image is found again, whatever the model, the name or the bytes are now."""

import errno
import json
from multiprocessing import get_context
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rows import failure, success

from captioner.errors import UserError
from captioner.files import locks
from infer.corrections import DECORATIVE, Correction, CorrectionFile, Corrections, parse_line, read_lines, to_line
from infer.gallery import Source, check_corrections, write_gallery
from infer.settings import CaptionSettings, check_flags
from sharding.packing.caption_files import SourceImage, parse_images

CORRECTIONS = st.builds(
    Correction,
    path=st.text(),
    caption=st.one_of(st.just(DECORATIVE), st.text().filter(str.strip)),
    images=st.none() | st.text(),
    sha256=st.none() | st.text(alphabet="0123456789abcdef", min_size=64, max_size=64),
)


def save(folder: Path, name: str, colour: str) -> None:
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (16, 12), colour).save(folder / name)


def write_lines(file: Path, *lines: dict[str, Any]) -> Path:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def show(tmp_path: Path, rows: list[Any], **options: Any) -> dict[str, str]:
    """The corrections that the gallery of these rows shows, by path."""
    write_gallery(rows, tmp_path / "gallery", title="t", model="m", **options)
    data = (tmp_path / "gallery" / "data.js").read_text("ascii").partition(" = ")[2].partition(";\nconst ROOTS")[0]
    return {row["path"]: row["correction"] for row in json.loads(data) if "correction" in row}


def kept(tmp_path: Path) -> dict[str, str | None]:
    """What the gallery's corrections.jsonl has, by path."""
    return {each.path: each.caption for each in read_lines(tmp_path / "gallery" / "corrections.jsonl")}


@given(CORRECTIONS)
def test_a_line_has_all_of_a_correction(correction: Correction) -> None:
    assert parse_line(json.loads(json.dumps(to_line(correction)))) == correction


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[]", "no object"), ('{"caption": "a cat"}', "needs a path"), ('{"path": "a.jpg"}', "neither captions nor"),
        ('{"path": "a.jpg", "captions": [" "]}', "its caption is empty"), ("{", "delimiter|property name"),
        ('{"path": "a.jpg", "captions": []}', "needs a path, and captions"),
        ('{"path": "a.jpg", "caption": "a cat", "model": "m"}', "a row of captions.jsonl"),
        (r'{"path": "a.jpg", "caption": "a \ud800"}', "not valid Unicode"),
        pytest.param("[" * 200_000, "recursion|nested", id="deep"),
    ],
)  # fmt: skip
def test_a_line_that_is_none_is_refused_with_its_number(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "corrections.jsonl"
    file.write_text('{"path": "a.jpg", "captions": ["a cat"]}\n\n' + line + "\n")
    with pytest.raises(UserError, match=rf"line 3 of .*{message}"):
        list(read_lines(file))


def test_make_shards_reads_captions_and_trains_on_nothing_decorative(tmp_path: Path) -> None:
    corrections = Corrections(
        [Correction(path="a.jpg", caption="a cat", sha256="1"), Correction(path="b.jpg", caption=DECORATIVE)]
    )
    content = corrections.to_jsonl().encode()
    first, second = parse_images(content, kind=".jsonl", split="train", location="corrections.jsonl")
    failed, image = sorted((first, second), key=lambda found: isinstance(found, SourceImage))
    assert isinstance(image, SourceImage)
    assert (image.file_name, image.captions) == ("a.jpg", [(None, "a cat")])
    assert not isinstance(failed, SourceImage)
    assert (failed.name, failed.reason) == ("b.jpg", "no caption")


def test_captioning_again_with_another_model_keeps_what_a_person_wrote(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    for name, colour in (("a.png", "red"), ("b.png", "green"), ("c.png", "blue")):
        save(photos, name, colour)
    rows = [success(photos, name, caption="a dog") for name in ("a.png", "b.png", "c.png")]
    assert show(tmp_path, rows) == {}
    assert not (tmp_path / "gallery" / "corrections.jsonl").exists()
    sha256 = {row["path"]: row["sha256"] for row in rows}
    write_lines(
        tmp_path / "gallery" / "corrections.jsonl",
        {"path": "a.png", "captions": ["a cat"], "images": str(photos), "sha256": sha256["a.png"]},
        {"path": "b.png", "decorative": True, "images": str(photos), "sha256": sha256["b.png"]},
    )
    better = [success(photos, name, caption="a red cat", model="better") for name in ("a.png", "b.png", "c.png")]
    assert show(tmp_path, better) == {"a.png": "a cat", "b.png": DECORATIVE}
    assert "gallery: captions corrected by hand: 2\n" in capsys.readouterr().out
    (photos / "a.png").rename(photos / "renamed.png")  # the same bytes, another name
    save(photos, "b.png", "black")  # other bytes, the same name: such as with metadata embedded
    moved = [success(photos, name, model="better") for name in ("b.png", "c.png", "renamed.png")]
    assert show(tmp_path, moved) == {"b.png": DECORATIVE, "renamed.png": "a cat"}
    assert "gallery: captions corrected by hand: 2; corrections of other files: 1\n" in capsys.readouterr().out
    assert kept(tmp_path) == {"a.png": "a cat", "b.png": DECORATIVE, "renamed.png": "a cat"}
    assert show(tmp_path, moved) == {"b.png": DECORATIVE, "renamed.png": "a cat"}


def test_a_name_in_another_folder_is_another_image(tmp_path: Path) -> None:
    line = {"path": "a.png", "captions": ["a cat"], "images": "s3://one", "sha256": "1" * 64}
    corrections = Corrections([parse_line(line)])
    assert corrections.find(images="s3://two", path="a.png", sha256="2" * 64) is None
    assert corrections.find(images="s3://one", path="a.png", sha256="2" * 64) == "a cat"
    assert corrections.find(images="s3://two", path="b.png", sha256="1" * 64) == "a cat"


def test_an_image_with_its_own_correction_gets_no_other_of_the_same_bytes() -> None:
    lines = [Correction(path=path, caption=path, images="photos", sha256="1") for path in ("a", "b")]
    corrections = Corrections(lines)
    for path in ("a", "b", "a"):
        assert corrections.find(images="photos", path=path, sha256="1") == path


def test_a_downloaded_file_counts_more_and_joins_the_gallerys_own(tmp_path: Path) -> None:
    rows = [success("photos", name) for name in ("a.jpg", "b.jpg", "c.jpg")]
    (tmp_path / "gallery").mkdir()
    own = [{"path": path, "captions": ["old"], "images": "photos"} for path in ("a.jpg", "b.jpg", "elsewhere.jpg")]
    write_lines(tmp_path / "gallery" / "corrections.jsonl", *own)
    downloaded = write_lines(
        tmp_path / "down.jsonl",
        {"path": "b.jpg", "captions": ["new"], "images": "photos"},
        {"path": "c.jpg", "caption": "by hand"},  # as make_shards.py reads it too
    )
    assert show(tmp_path, rows, sources=[Source(downloaded)]) == {"a.jpg": "old", "b.jpg": "new", "c.jpg": "by hand"}
    assert kept(tmp_path) == {"a.jpg": "old", "b.jpg": "new", "c.jpg": "by hand", "elsewhere.jpg": "old"}


def test_failures_and_images_in_shards_get_none_and_lose_none(tmp_path: Path) -> None:
    (tmp_path / "gallery").mkdir()
    write_lines(tmp_path / "gallery" / "corrections.jsonl", {"path": "a.jpg", "captions": ["a cat"]})
    assert show(tmp_path, [failure("photos", "a.jpg")]) == {}
    assert kept(tmp_path) == {"a.jpg": "a cat"}


def test_a_wrong_file_is_refused_before_anything_is_captioned(tmp_path: Path) -> None:
    bad = write_lines(tmp_path / "bad.jsonl", {"no": "path"})
    with pytest.raises(UserError, match=r"line 1 of .*bad\.jsonl"):
        check_flags(CaptionSettings(images=("photos",), gallery=tmp_path / "gallery", corrections=bad))
    with pytest.raises(UserError, match=r"no file .*missing\.jsonl"):
        check_corrections(tmp_path / "missing.jsonl")
    (tmp_path / "table.xlsx").touch()
    with pytest.raises(UserError, match=r"neither a table nor JSONL: save it as CSV UTF-8"):
        check_corrections(tmp_path / "table.xlsx")
    with pytest.raises(UserError, match="give --gallery, --csv, --sidecar or --embed too"):
        check_flags(CaptionSettings(images=("photos",), corrections=bad))


def test_copies_of_an_image_keep_their_own_words_where_no_bytes_are_known() -> None:
    written = Corrections([Correction(path="a.jpg", caption="ours"), Correction(path="b.jpg", caption=DECORATIVE)])
    assert [written.find(images="p", path=name, sha256="same") for name in ("a.jpg", "b.jpg")] == ["ours", DECORATIVE]
    assert [line.get("captions") for line in written.lines()] == [["ours"], None]


# ---- several writers --------------------------------------------------------------------------------------


def test_nothing_is_lost_while_a_gallery_is_written_and_others_save(tmp_path: Path) -> None:
    """Two processes and two threads of this one save corrections while the gallery merges its own again and again."""
    rows = [success("photos", f"{number}.jpg") for number in range(20)]
    write_gallery(rows, tmp_path / "gallery", title="t", model="m")
    file = CorrectionFile(tmp_path / "gallery" / "corrections.jsonl")

    def save_all(name: str) -> None:
        for number in range(25):
            file.change([Correction(path=f"{name}-{number}.jpg", caption=name, images="photos")])

    processes = [get_context("fork").Process(target=save_all, args=(f"process {number}",)) for number in range(2)]
    threads = [Thread(target=save_all, args=(f"thread {number}",)) for number in range(2)]
    for worker in (*processes, *threads):
        worker.start()
    while any(worker.is_alive() for worker in (*processes, *threads)):
        correction = Correction(path=f"{len(rows)}.jpg", caption="of the gallery", images="photos")
        with file.changing() as corrections:
            corrections.add(correction)
        write_gallery(rows, tmp_path / "gallery", title="t", model="m")
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(kept(tmp_path)) == 101
    assert not (tmp_path / "gallery" / "corrections.jsonl.lock").exists()


def test_a_disk_without_locks_takes_corrections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> bool:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(locks, "lock_descriptor", refuse)
    file = CorrectionFile(tmp_path / "corrections.jsonl")

    def save_all(name: str) -> None:
        for number in range(10):
            file.change([Correction(path=f"{name}-{number}.jpg", caption=name)])

    threads = [Thread(target=save_all, args=(str(number),)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(file.read()) == 40
    assert [path.name for path in tmp_path.iterdir()] == ["corrections.jsonl"]


def test_a_correction_of_this_machine_is_not_taken_for_an_image_behind_a_url() -> None:
    lines = [Correction(path="a.jpg", caption="ours", sha256="1")]
    assert Corrections(lines).find(images="http://host/photos", path="a.jpg", sha256="2") is None
    assert Corrections(lines).find(images="http://host/photos", path="a.jpg", sha256="1") == "ours"
    assert Corrections(lines).find(images="photos", path="a.jpg", sha256="2") == "ours"


def test_corrections_without_an_image_are_known() -> None:
    written = Corrections([Correction(path=name, caption=name) for name in ("a.jpg", "b.jpg")])
    written.find(images="photos", path="a.jpg", sha256="1")
    assert [correction.path for correction in written.not_found()] == ["b.jpg"]
