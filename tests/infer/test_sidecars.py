"""Sidecars stand beside their pictures, and nothing of the user's is touched."""

import errno
import multiprocessing
import os
import random
import time
from collections import Counter
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from rows import captioned, failed

from captioner.errors import UserError
from infer.metadata.outcomes import SHOWN_NAMES, Outcomes
from infer.results import Row
from infer.sidecars import SHARED, check_suffix, write_sidecars


def rows_of(folder: Path, *paths: str, caption: str = "a cat") -> list[Row]:
    return [captioned(path, root=str(folder), caption=caption) for path in paths]


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_sidecar_has_the_caption_and_the_name_of_its_picture(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    sidecars = write_sidecars(rows_of(tmp_path, "a/b.c.jpeg", "plain"), suffix=".txt")
    assert sidecars.counts == Counter(written=2)
    assert contents(tmp_path) == {"a/b.c.txt": "a cat\n", "plain.txt": "a cat\n"}


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
