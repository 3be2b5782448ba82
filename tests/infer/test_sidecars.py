"""Sidecars stand beside their pictures, and nothing of the user's is touched."""

import errno
import multiprocessing
import os
import random
import shutil
import signal
import stat
import subprocess
import time
from collections import Counter
from contextlib import closing, suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from rows import captioned, failed

from captioner.errors import UserError
from infer import sidecars
from infer.listing import Listing
from infer.metadata import xmp
from infer.metadata.outcomes import CHANGED, DECORATIVE, EMPTY, GONE, SHOWN_NAMES, UNREADABLE_XMP, Outcomes
from infer.metadata.xmp import read_texts
from infer.results import Row
from infer.sidecars import NO_TEXT, SHARED, check_suffix, write_sidecars
from infer.written import Written


def rows_of(folder: Path, *paths: str, caption: str = "a cat") -> list[Row]:
    return [captioned(path, root=str(folder), caption=caption) for path in paths]


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_sidecar_has_the_caption_and_the_name_of_its_picture(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    sidecars = write_sidecars(rows_of(tmp_path, "a/b.c.jpeg", "plain"), suffix=".txt")
    assert sidecars.counts == Counter(written=2)
    assert contents(tmp_path) == {"a/b.c.txt": "a cat\n", "plain.txt": "a cat\n"}


def test_a_sidecar_has_the_text_that_is_made_for_it_and_none_without_text(tmp_path: Path) -> None:
    texts = {"a.jpg": "A cat. 2024", "b.jpg": ""}
    rows = rows_of(tmp_path, *texts)
    sidecars = write_sidecars(rows, suffix=".txt", text=lambda row: texts[row["path"]])
    assert sidecars.counts == {"written": 1, EMPTY: 1}
    assert sidecars.names == {EMPTY: [f"{tmp_path}/b.jpg"]}
    assert contents(tmp_path) == {"a.txt": "A cat. 2024\n"}


@pytest.mark.parametrize(
    "name", [os.fsdecode(b"bad\xff.jpg"), "new\nline.jpg", "-rf.jpg", ".jpg.jpg", "é" * 120 + ".jpg"]
)
def test_any_name_gets_its_sidecar(tmp_path: Path, name: str) -> None:
    write_sidecars(rows_of(tmp_path, name), suffix=".caption")
    assert contents(tmp_path) == {name[:-4] + ".caption": "a cat\n"}


def test_a_file_that_is_there_is_kept(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("mine")
    (tmp_path / "b.txt").mkdir()
    os.mkfifo(tmp_path / "d.txt")
    sidecars = write_sidecars(rows_of(tmp_path, "a.jpg", "b.jpg", "c.jpg", "d.jpg"), suffix=".txt")
    assert sidecars == Outcomes(counts=Counter(kept=3, written=1))
    assert contents(tmp_path) == {"a.txt": "mine", "c.txt": "a cat\n"}


def test_a_file_that_appears_meanwhile_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("mine")
    monkeypatch.setattr(os.path, "lexists", lambda _: False)
    assert write_sidecars(rows_of(tmp_path, "a.jpg"), suffix=".txt").counts == Counter(kept=1)
    assert contents(tmp_path) == {"a.txt": "mine"}


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("mine")
    (tmp_path / "a.txt").symlink_to("there")
    (tmp_path / "b.txt").symlink_to("not there")
    assert write_sidecars(rows_of(tmp_path, "a.jpg", "b.jpg"), suffix=".txt").counts == Counter(kept=2)
    assert (tmp_path / "there").read_text() == "mine"
    assert not (tmp_path / "not there").exists()


def test_what_has_no_place_for_a_sidecar_is_counted(tmp_path: Path) -> None:
    (tmp_path / "train.tar").write_bytes(b"")
    rows = [
        *rows_of(tmp_path, "gone/a.jpg", "train.tar/b.jpg"),
        captioned("c.jpg", root="s3://bucket"),
        captioned("d.jpg", root=str(tmp_path), alt="", review="low confidence"),
        captioned("e.jpg", root=str(tmp_path), review="unlike training data"),
        failed("f.jpg", root=str(tmp_path)),
    ]
    expected = Counter(
        {"could not be written (No such file or directory)": 1, "not local": 2, "abstained": 1, "written": 1}
    )
    assert write_sidecars(iter(rows), suffix=".txt").counts == expected
    assert contents(tmp_path) == {"train.tar": "", "e.txt": "a cat\n"}


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.EROFS, "Read-only file system"),
        (errno.EACCES, "Permission denied"),
        (errno.ENOSPC, "No space left on device"),
    ],
)
def test_sidecars_that_cannot_be_written_are_counted_by_reason_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, reason: str
) -> None:
    def refuse(path: Path, _data: bytes) -> int:
        raise OSError(number, os.strerror(number), str(path))

    (tmp_path / "0.txt").write_text("mine")
    monkeypatch.setattr(Path, "write_bytes", refuse)
    sidecars = write_sidecars(rows_of(tmp_path, *(f"{number}.jpg" for number in range(17))), suffix=".txt")
    assert sidecars.counts == {f"could not be written ({reason})": 16, "kept": 1}
    assert sidecars.num_failed == 16
    named, kept = sidecars.lines()
    assert (
        named
        == f"sidecars: 16 could not be written ({reason}): "
        + "".join(f"'{tmp_path}/{number}.jpg', " for number in range(1, SHOWN_NAMES + 1))
        + "..."
    )
    assert kept == "sidecars: 1 kept"
    assert contents(tmp_path) == {"0.txt": "mine"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_takes_no_file_is_counted(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert write_sidecars(rows_of(tmp_path, "a.jpg"), suffix=".txt").num_failed == 1


@pytest.mark.parametrize("again", [False, True])
def test_of_pictures_with_the_same_sidecar_the_first_has_it_and_the_others_are_named(
    tmp_path: Path, again: bool
) -> None:
    """Whichever other names come between them, and also when the sidecar is there from an earlier run."""
    names = ("a.jpg", "a.k.jpg", "a.png", "a.webp", "b.png")
    rows = [captioned(name, root=str(tmp_path), caption=f"caption of {name}") for name in names]
    if again:
        write_sidecars(rows, suffix=".txt")
    sidecars = write_sidecars(rows, suffix=".txt")
    assert sidecars.counts == {SHARED: 2, "kept" if again else "written": 3}
    assert f"sidecars: 2 {SHARED}: '{tmp_path}/a.png', '{tmp_path}/a.webp'" in list(sidecars.lines())
    assert sidecars.num_failed == 0
    expected = {"a.txt": "caption of a.jpg\n", "a.k.txt": "caption of a.k.jpg\n", "b.txt": "caption of b.png\n"}
    assert contents(tmp_path) == expected


def test_a_picture_that_two_roots_name_shares_its_sidecar_with_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path)
    rows = [captioned("sub/a.jpg", root="."), captioned("a.jpg", root=str(tmp_path / "sub"))]
    assert write_sidecars(rows, suffix=".txt").counts == {"written": 1, "kept": 1}


@pytest.mark.parametrize("suffix", ["", "txt", ".", "./x", "/x", ".a/b"])
def test_an_impossible_suffix_is_refused(suffix: str) -> None:
    with pytest.raises(UserError, match="give one such as"):
        check_suffix(suffix)


def test_a_disk_without_hard_links_gets_its_sidecars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_link(*_: Any) -> None:
        raise OSError(errno.EPERM, "operation not permitted")

    monkeypatch.setattr(os, "link", no_link)
    (tmp_path / "b.txt").write_text("mine")
    assert write_sidecars(rows_of(tmp_path, "a.jpg", "b.jpg"), suffix=".txt").counts == Counter(written=1, kept=1)
    assert contents(tmp_path) == {"a.txt": "a cat\n", "b.txt": "mine"}


def test_a_killed_process_leaves_no_half_sidecar(tmp_path: Path) -> None:
    caption = "a very long caption " * 5_000
    rng = random.Random(6)
    num_sidecars = 0
    for kill in range(5):
        rows = (rows_of(tmp_path, f"{kill}-{number}.jpg", caption=caption)[0] for number in count())
        context = multiprocessing.get_context("fork")
        process = context.Process(target=write_sidecars, args=(rows,), kwargs={"suffix": ".txt"})
        process.start()
        time.sleep(rng.uniform(0.02, 0.08))
        process.kill()
        process.join()
        for path in tmp_path.glob("*.txt"):
            assert path.read_text() == caption + "\n"
            path.unlink()
            num_sidecars += 1
    assert num_sidecars > 5


# ---- what is there ----------------------------------------------------------------------------------------

WITH_POLICY = {"keep": "mine\n", "append": "mine\na cat\n", "prepend": "a cat\nmine\n", "overwrite": "a cat\n"}


@pytest.mark.parametrize("existing", WITH_POLICY)
def test_a_persons_text_file_becomes_what_was_asked_for_and_stays_so(tmp_path: Path, existing: Any) -> None:
    sidecar = tmp_path / "a.txt"
    sidecar.write_text("mine\n")
    sidecar.chmod(0o640)
    for outcome in ("kept" if existing == "keep" else "written", "kept"):
        assert write_sidecars(rows_of(tmp_path, "a.jpg"), suffix=".txt", existing=existing).counts == {outcome: 1}
        assert contents(tmp_path) == {"a.txt": WITH_POLICY[existing]}
        assert stat.S_IMODE(sidecar.stat().st_mode) == 0o640


@pytest.mark.parametrize("suffix", [".txt", ".xmp"])
def test_only_regular_files_are_changed(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "there").write_text("mine")
    (tmp_path / f"a.jpg{suffix}").symlink_to("there")
    (tmp_path / f"b.jpg{suffix}").mkdir()
    os.mkfifo(tmp_path / f"c.jpg{suffix}")
    rows = rows_of(tmp_path, *(f"{name}.jpg{'.jpg' if suffix == '.txt' else ''}" for name in "abc"))
    assert write_sidecars(rows, suffix=suffix, existing="overwrite").counts == {"kept": 3}
    assert contents(tmp_path) == {f"a.jpg{suffix}": "mine", "there": "mine"}


def test_a_text_file_in_capitals_is_the_one_that_is_kept_or_changed(tmp_path: Path) -> None:
    (tmp_path / "a.TXT").write_text("mine\n")
    assert write_sidecars(rows_of(tmp_path, "a.jpg", "a.png"), suffix=".txt").counts == {"kept": 1, SHARED: 1}
    write_sidecars(rows_of(tmp_path, "a.jpg"), suffix=".txt", existing="append")
    assert [path.name for path in tmp_path.iterdir()] == ["a.TXT"]
    assert (tmp_path / "a.TXT").read_text().startswith("mine\n")
    assert len((tmp_path / "a.TXT").read_text().splitlines()) == 2


def test_a_text_file_that_is_no_utf8_is_left_alone(tmp_path: Path) -> None:
    content = "größer".encode("utf-16")
    (tmp_path / "a.txt").write_bytes(content)
    outcomes = write_sidecars(rows_of(tmp_path, "a.jpg"), suffix=".txt", existing="append")
    assert outcomes.names == {NO_TEXT: [f"{tmp_path}/a.jpg"]}
    assert (tmp_path / "a.txt").read_bytes() == content


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_sidecar_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("mine\n")
    (tmp_path / "a.txt").chmod(0o400)
    assert write_sidecars(rows_of(tmp_path, "a.jpg"), suffix=".txt", existing="overwrite").num_failed == 1


def test_what_is_written_is_a_function_of_the_row(tmp_path: Path) -> None:
    def shout(row: Row) -> str:
        return row["alt"].upper() if row["path"] == "a.jpg" else ""

    for suffix in (".txt", ".xmp"):
        outcomes = write_sidecars(rows_of(tmp_path, "a.jpg", "b.jpg"), suffix=suffix, text=shout)
        assert outcomes.counts == {"written": 1, EMPTY: 1}
    assert (tmp_path / "a.txt").read_text() == "A CAT.\n"
    assert texts(tmp_path / "a.jpg.xmp") == ["A CAT."] * 2


# ---- what this program wrote ------------------------------------------------------------------------------


def test_a_text_file_follows_newer_captions_until_somebody_changes_it(tmp_path: Path) -> None:
    """Of a person's words too: corrected, corrected again, and not taken for the model's without the corrections."""
    written = Written()

    def write(caption: str, corrected: str = "") -> tuple[dict[str, int], str]:
        correct = (lambda row: row | {"caption": corrected, "alt": corrected}) if corrected else None
        rows = rows_of(tmp_path, "a.jpg", caption=caption)
        outcomes = write_sidecars(rows, suffix=".txt", correct=correct, written=written)
        return dict(outcomes.counts), (tmp_path / "a.txt").read_text()

    assert write("a cat") == ({"written": 1}, "a cat\n")
    assert write("a cat") == ({"kept": 1}, "a cat\n")
    assert write("a dog") == ({"written": 1}, "a dog\n")
    assert write("a dog", "Our dgo") == ({"written": 1}, "Our dgo\n")
    assert write("a dog", "Our dog") == ({"written": 1}, "Our dog\n")
    assert write("a small dog") == ({"kept": 1}, "Our dog\n")
    assert write("a small dog", "Our old dog") == ({"written": 1}, "Our old dog\n")
    (tmp_path / "a.txt").write_text("Mine\n")
    for caption, corrected in (("a bird", ""), ("a bird", "Our bird")):
        assert write(caption, corrected) == ({"kept": 1}, "Mine\n")


@pytest.mark.parametrize("existing", ["append", "prepend"])
@pytest.mark.parametrize("is_kept_first", [False, True])
@pytest.mark.parametrize("text", ["a cat", "a cat\n#tag", "two\r\nlines\n"])
def test_lines_are_added_once_and_follow_newer_captions(
    tmp_path: Path, existing: Any, is_kept_first: bool, text: str
) -> None:
    written = Written()
    (tmp_path / "a.txt").write_bytes(b"Mine\r\n")
    options: dict[str, Any] = {"suffix": ".txt", "written": written}
    if is_kept_first:
        assert write_sidecars(rows_of(tmp_path, "a.jpg"), text=lambda _: text, **options).counts == {"kept": 1}
    for newer in (text, f"newer {text}"):
        for outcome in ("written", "kept"):
            rows = rows_of(tmp_path, "a.jpg")
            outcomes = write_sidecars(rows, existing=existing, text=lambda _, newer=newer: newer, **options)
            assert outcomes.counts == {outcome: 1}
        lines = ["Mine", *newer.splitlines()] if existing == "append" else [*newer.splitlines(), "Mine"]
        assert (tmp_path / "a.txt").read_text().splitlines() == lines


@pytest.mark.parametrize("existing", WITH_POLICY)
def test_the_text_file_of_another_image_of_the_same_name_is_left_alone(tmp_path: Path, existing: Any) -> None:
    """Whichever comes first by name, until the other image is gone."""
    written = Written()
    options: dict[str, Any] = {"suffix": ".txt", "existing": existing, "written": written}
    (tmp_path / "a.png").touch()
    write_sidecars(rows_of(tmp_path, "a.png", caption="of the png"), **options)
    rows = [captioned(f"a.{kind}", root=str(tmp_path), caption=f"of the {kind}") for kind in ("jpg", "png", "webp")]
    outcomes = write_sidecars(rows, **options)
    assert outcomes.counts == {SHARED: 2, "kept": 1}
    assert outcomes.names == {SHARED: [f"{tmp_path}/a.jpg", f"{tmp_path}/a.webp"]}
    assert (tmp_path / "a.txt").read_text() == "of the png\n"
    (tmp_path / "a.png").unlink()
    assert write_sidecars(rows[:1], **options).counts == {"written": 1}
    assert (tmp_path / "a.txt").read_text() == "of the jpg\n"


def test_an_xmp_sidecar_that_is_another_images_is_left_alone(tmp_path: Path) -> None:
    written = Written()
    (tmp_path / "a.xmp").write_bytes(empty_packet())
    (tmp_path / "a.png").touch()
    for names in (["a.png"], ["a.jpg", "a.png"], ["a.jpg"]):
        rows = [captioned(name, root=str(tmp_path), alt=name) for name in names]
        write_sidecars(rows, suffix=".xmp", written=written)
    assert texts(tmp_path / "a.xmp") == ["a.png"] * 2
    assert texts(tmp_path / "a.jpg.xmp") == ["a.jpg"] * 2


def test_an_image_that_is_gone_gives_up_its_text_file_and_is_no_failure(tmp_path: Path) -> None:
    written = Written()
    rows = [captioned(f"a.{kind}", root=str(tmp_path), caption=f"of the {kind}") for kind in ("jpg", "png")]
    options: dict[str, Any] = {"suffix": ".txt", "written": written, "since": time.time() + 10}
    for name in ("a.jpg", "a.png"):
        (tmp_path / name).touch()
    assert write_sidecars(rows, **options).counts == {"written": 1, SHARED: 1}
    (tmp_path / "a.jpg").unlink()
    outcomes = write_sidecars(rows, **options)
    assert outcomes.counts == {"written": 1, GONE: 1}
    assert (outcomes.num_failed, outcomes.names) == (0, {})
    assert (tmp_path / "a.txt").read_text() == "of the png\n"


@pytest.mark.parametrize("is_written", [False, True])
@pytest.mark.parametrize("there", ["", "mine\n", "a cat\n", "mine\na cat\n"])
@pytest.mark.parametrize("existing", ["keep", "append"])
def test_a_text_file_is_ours_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: Any, there: str, is_written: bool
) -> None:
    """Just before and just after it was written: in the end it is as if there was no kill."""

    def write(folder: Path, caption: str) -> None:
        with closing(Written(folder / "captions.jsonl")) as written:
            rows = rows_of(folder, "a.jpg", caption=caption)
            write_sidecars(rows, suffix=".txt", existing=existing, written=written)

    killed, whole = tmp_path / "killed", tmp_path / "whole"
    for folder in (killed, whole):
        folder.mkdir()
        if there.startswith("mine"):
            (folder / "a.txt").write_text("mine\n")
        if "a cat" in there:
            write(folder, "a cat")
    for caption in ("a dog", "a bird"):
        write(whole, caption)
    with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
        for module, name in ((sidecars, "replace_content"), (sidecars.storage, "write_new")):
            real = getattr(module, name)

            def die(*args: Any, real: Any = real) -> None:
                if is_written:
                    real(*args)
                raise KeyboardInterrupt

            patch.setattr(module, name, die)
        write(killed, "a dog")
    write(killed, "a bird")
    assert (killed / "a.txt").read_text() == (whole / "a.txt").read_text()


# ---- images that have changed -----------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".txt", ".xmp"])
@pytest.mark.parametrize("there", ["nothing", "ours", "another's"])
def test_an_image_that_has_changed_gets_no_text_of_the_old_one(tmp_path: Path, suffix: str, there: str) -> None:
    """Replaced by a younger or an older file, or by what is no file; an image that was only copied gets its text."""
    started = time.time() - 10
    names = ("younger.jpg", "older.jpg", "pipe.jpg", "copied.jpg")
    for name in names:
        (tmp_path / name).write_text(name)
    rows = [captioned(name, root=str(tmp_path), caption="old", alt="old") for name in names]
    written = Written()
    options: dict[str, Any] = {"suffix": suffix, "written": written, "existing": "append"}
    if there == "ours":
        write_sidecars(rows, **options)
    elif there == "another's":
        for name in names:
            path = tmp_path / name
            path.with_suffix(suffix).write_bytes(b"Mine" if suffix == ".txt" else empty_packet())
    for name in names[:2]:
        (tmp_path / name).write_text("another image")
    os.utime(tmp_path / "older.jpg", (0, 0))
    (tmp_path / "pipe.jpg").unlink()
    os.mkfifo(tmp_path / "pipe.jpg")
    before = {path.name: path.read_bytes() for path in tmp_path.glob(f"*{suffix}")}
    better: list[Any] = [row | {"caption": "new", "alt": "new"} for row in rows]
    outcomes = write_sidecars(better, since=started, **options)
    assert outcomes.counts == {CHANGED: 3, "written": 1}
    assert outcomes.names[CHANGED] == [f"{tmp_path}/{name}" for name in names[:3]]
    after = {path.name: path.read_bytes() for path in tmp_path.glob(f"*{suffix}")}
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert len(changed) == 1
    assert changed.pop().startswith("copied")


def test_images_that_have_not_changed_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jpg").write_text("any")
    monkeypatch.setattr("infer.metadata.outcomes.had_checksum", lambda *_: pytest.fail("it was read"))
    outcomes = write_sidecars(rows_of(tmp_path, "a.jpg"), suffix=".txt", since=time.time() + 10)
    assert outcomes.counts == {"written": 1}


# ---- XMP --------------------------------------------------------------------------------------------------


def texts(path: Path) -> list[str]:
    return read_texts(path.read_bytes())


def empty_packet() -> bytes:
    return xmp.EMPTY.replace(b"</rdf:RDF>", b"<!-- of darktable --></rdf:RDF>")


def write_xmp(folder: Path, *paths: str, **options: Any) -> dict[str, int]:
    return dict(write_sidecars(rows_of(folder, *paths), suffix=".xmp", **options).counts)


def test_a_new_xmp_sidecar_is_named_after_the_whole_name_of_its_image(tmp_path: Path) -> None:
    assert write_xmp(tmp_path, "a.jpg", "a.png", os.fsdecode(b"-\xff\n.jpg")) == {"written": 3}
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"a.jpg.xmp", "a.png.xmp", os.fsdecode(b"-\xff\n.jpg.xmp")}
    assert all(texts(path) == ["A cat."] * 2 for path in tmp_path.iterdir())
    assert write_xmp(tmp_path, "a.jpg", "a.png") == {"kept": 2}


@pytest.mark.parametrize(
    ("there", "extended"),
    [
        (["a.jpg.xmp"], {"a.jpg.xmp", "a.png.xmp"}),
        (["a.xmp"], {"a.xmp", "a.png.xmp"}),
        (["a.jpg.xmp", "a.xmp"], {"a.jpg.xmp", "a.xmp"}),
        (["a.jpg.xmp", "a.png.xmp", "a.xmp"], {"a.jpg.xmp", "a.png.xmp"}),
        (["a.jpg.XMP"], {"a.jpg.XMP", "a.png.xmp"}),
        (["a.XMP"], {"a.XMP", "a.png.xmp"}),
        (["a.jpg.XMP", "a.XMP"], {"a.jpg.XMP", "a.XMP"}),
        (["a.xmp", "a.XMP"], {"a.xmp", "a.png.xmp"}),
    ],
)
def test_the_xmp_sidecar_that_is_there_is_extended(tmp_path: Path, there: list[str], extended: set[str]) -> None:
    """By either name; one without the image's suffix belongs to the first image, so that each image has one."""
    for name in there:
        (tmp_path / name).write_bytes(empty_packet())
    for outcome in ("written", "kept"):
        assert write_xmp(tmp_path, "a.jpg", "a.png") == {outcome: 2}
        assert {path.name for path in tmp_path.iterdir() if texts(path)} == extended
    assert all(b"<!-- of darktable -->" in (tmp_path / name).read_bytes() for name in there)


def test_a_better_model_replaces_what_this_program_wrote_and_no_more(tmp_path: Path) -> None:
    write_xmp(tmp_path, "a.jpg", "b.jpg")
    mine = (tmp_path / "b.jpg.xmp").read_bytes().replace(b"A cat.</rdf:li>", b"My cat.</rdf:li>")
    (tmp_path / "b.jpg.xmp").write_bytes(mine)
    better = [captioned(name, root=str(tmp_path), alt="A small cat.", model="better") for name in ("a.jpg", "b.jpg")]
    assert write_sidecars(better, suffix=".xmp").counts == {"written": 1, "kept": 1}
    assert texts(tmp_path / "a.jpg.xmp") == ["A small cat."] * 2
    assert b"better</captioner:Model>" in (tmp_path / "a.jpg.xmp").read_bytes()
    assert (tmp_path / "b.jpg.xmp").read_bytes() == mine


def test_a_sidecar_that_is_no_xmp_is_left_alone_and_named(tmp_path: Path) -> None:
    broken = {"a.jpg.xmp": b"<x:xmpmeta", "b.xmp": b"", "c.jpg.xmp": b"<!DOCTYPE x>" + xmp.EMPTY}
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
    outcomes = write_sidecars(rows_of(tmp_path, "a.jpg", "b.jpg", "c.jpg"), suffix=".xmp", existing="overwrite")
    assert outcomes.counts == {UNREADABLE_XMP: 3}
    assert next(outcomes.lines()).endswith(f"'{tmp_path}/a.jpg', '{tmp_path}/b.jpg', '{tmp_path}/c.jpg'")
    assert outcomes.num_failed == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == broken


@pytest.mark.external
@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (("exiv2", "-K", "Xmp.dc.description", "-Pt"), 'lang="x-default" A cat.'),
        (("exiv2", "-K", "Xmp.iptc.AltTextAccessibility", "-Pt"), 'lang="x-default" A cat.'),
        (("exiftool", "-s3", "-XMP-dc:Description"), "A cat."),
        (("exiftool", "-s3", "-XMP-iptcCore:AltTextAccessibility"), "A cat."),
    ],
)
def test_other_programs_read_the_sidecar(tmp_path: Path, command: tuple[str, ...], expected: str) -> None:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    write_xmp(tmp_path, "a.jpg")
    done = subprocess.run([*command, tmp_path / "a.jpg.xmp"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected


def test_a_killed_process_leaves_old_or_new_sidecars(tmp_path: Path) -> None:
    """Killed while the new content is written, just before its rename."""

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def job() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "replace", die)
            write_xmp(tmp_path, "a.jpg")

    (tmp_path / "a.jpg.xmp").write_bytes(empty_packet())
    process = multiprocessing.get_context("fork").Process(target=job)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / "a.jpg.xmp").read_bytes() == empty_packet()
    leftover = {path.name for path in tmp_path.iterdir()} - {"a.jpg.xmp"}
    assert len(leftover) == 1
    assert list(Listing([str(tmp_path)], skip_suffixes=[".xmp"])) == []


# ---- corrections ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".txt", ".xmp"])
def test_a_persons_words_replace_the_models_and_no_others(tmp_path: Path, suffix: str) -> None:
    """Of four images one is corrected, one decorative, one has a sidecar of a person, and one is decorative without."""
    rows = rows_of(tmp_path, "corrected", "decorative", "changed", "bare")
    sidecars = {row["path"]: tmp_path / f"{row['path']}{suffix}" for row in rows}
    said = {"corrected": "Our ship", "decorative": "", "changed": "Ours too", "bare": ""}

    def write(*, better: bool = False, corrected: bool = True) -> dict[str, int]:
        model = {"caption": "a dog", "alt": "A dog."} if better else {}
        chosen = [captioned(row["path"], root=str(tmp_path), **model) for row in (rows[:3] if better else rows)]
        correct = (lambda row: row | {"caption": said[row["path"]], "alt": said[row["path"]]}) if corrected else None
        return dict(write_sidecars(chosen, suffix=suffix, correct=correct).counts)

    def read() -> list[list[str]]:
        return [texts(path) if suffix == ".xmp" else path.read_text().split("\n")[:1] for path in sidecars.values()]

    write_sidecars(rows[:3], suffix=suffix)
    changed = sidecars["changed"].read_bytes()
    sidecars["changed"].write_bytes(changed.replace(b"A cat.</rdf:li>", b"Mine</rdf:li>").replace(b"a cat", b"Mine"))
    assert write() == {"written": 2, "kept": 1, DECORATIVE: 1}
    assert not sidecars.pop("bare").exists()
    copies = 2 if suffix == ".xmp" else 1
    wanted = [["Our ship"] * copies, [] if suffix == ".xmp" else [""], ["Mine"] * copies]
    assert read() == wanted
    assert write() == {"kept": 3, DECORATIVE: 1}
    assert write(better=True, corrected=False) == {"kept": 3}
    assert read() == wanted


def test_a_second_correction_replaces_the_first_in_xmp(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "a.jpg")
    for text in ("Our ship", "Our red ship"):
        write_sidecars(rows, suffix=".xmp", correct=lambda row, text=text: row | {"alt": text})
        assert texts(tmp_path / "a.jpg.xmp") == [text] * 2
