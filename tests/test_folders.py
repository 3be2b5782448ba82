"""Every file below the folders is listed once, in order, and nothing of ours among them."""

import os
from pathlib import Path
from random import Random

import pytest

from captioner.cli import UserError
from infer.folders import ImageFile, list_files


def make(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


def names(*folders: Path, excluded: tuple[Path, ...] = ()) -> list[str]:
    return [file.path for file in list_files(folders, excluded=excluded)]


def test_files_of_all_depths_and_endings_come_sorted_by_path(tmp_path: Path) -> None:
    expected = sorted(
        ["b.JPG", "a.jpg", "A.txt", "no ending", "a/b/c.png", "a/b.jpg", ".hidden", "z/1.webp", "a-b.jpg"]
    )
    shuffled = expected.copy()
    Random(3).shuffle(shuffled)
    assert names(make(tmp_path, *shuffled)) == expected


def test_a_file_knows_its_root_and_lies_where_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "one/x.jpg", "two/sub/x.jpg")
    monkeypatch.chdir(tmp_path)
    files = list_files([Path("two"), Path("one")])
    assert files == [ImageFile("one", "x.jpg"), ImageFile("two", "sub/x.jpg")]
    assert all(file.location.read_bytes() == b"x" for file in files)
    assert list_files([Path()]) == [ImageFile(".", "one/x.jpg"), ImageFile(".", "two/sub/x.jpg")]


def test_a_folder_given_twice_is_listed_once(tmp_path: Path) -> None:
    make(tmp_path, "a.jpg")
    assert names(tmp_path, tmp_path) == ["a.jpg"]


def test_an_empty_folder_has_no_files(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert names(tmp_path) == []


def test_undecodable_names_can_be_opened_again(tmp_path: Path) -> None:
    raw = b"bad\xff\xfe.jpg"
    (tmp_path / os.fsdecode(raw)).write_bytes(b"x")
    (file,) = list_files([tmp_path])
    assert os.fsencode(file.path) == raw
    assert file.location.read_bytes() == b"x"


def test_the_gallery_and_the_output_are_left_out_however_they_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, "a.jpg", "gallery/index.html", "gallery/thumbnails/t.jpg", "captions.jsonl", "sub/gallery/b.jpg")
    monkeypatch.chdir(tmp_path / "sub")
    excluded = (Path("../gallery"), Path("..") / "sub" / ".." / "captions.jsonl", tmp_path / "not there")
    assert names(tmp_path, excluded=excluded) == ["a.jpg", "sub/gallery/b.jpg"]


def test_links_to_files_count_and_links_to_folders_are_not_followed(tmp_path: Path) -> None:
    make(tmp_path / "photos", "a.jpg", "sub/b.jpg")
    make(tmp_path / "elsewhere", "c.jpg")
    (tmp_path / "photos" / "link.jpg").symlink_to(tmp_path / "elsewhere" / "c.jpg")
    (tmp_path / "photos" / "folder link").symlink_to(tmp_path / "elsewhere")
    assert names(tmp_path / "photos") == ["a.jpg", "link.jpg", "sub/b.jpg"]


def test_links_that_lead_round_or_nowhere_do_no_harm(tmp_path: Path) -> None:
    make(tmp_path, "sub/a.jpg")
    (tmp_path / "sub" / "up").symlink_to(tmp_path)
    (tmp_path / "itself").symlink_to(tmp_path / "itself")
    (tmp_path / "there").symlink_to(tmp_path / "back")
    (tmp_path / "back").symlink_to(tmp_path / "there")
    (tmp_path / "dead.jpg").symlink_to(tmp_path / "gone")
    assert names(tmp_path, excluded=(tmp_path / "gallery",)) == ["sub/a.jpg"]


def test_a_root_that_is_a_link_is_followed(tmp_path: Path) -> None:
    make(tmp_path / "real", "a.jpg")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert names(tmp_path / "link") == ["a.jpg"]


def test_what_is_no_regular_file_is_left_out(tmp_path: Path) -> None:
    """Opening a pipe to read it would wait for ever."""
    make(tmp_path, "a.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    assert names(tmp_path) == ["a.jpg"]


@pytest.mark.parametrize("name", ["not there", "a.jpg"])
def test_a_folder_that_is_none_is_refused_by_name(tmp_path: Path, name: str) -> None:
    make(tmp_path, "a.jpg")
    with pytest.raises(UserError, match=f"there is no picture folder .*{name}") as caught:
        list_files([tmp_path, tmp_path / name])
    assert "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_listed_is_refused_by_name(tmp_path: Path) -> None:
    make(tmp_path, "a.jpg", "closed/b.jpg")
    (tmp_path / "closed").chmod(0)
    try:
        if os.access(tmp_path / "closed", os.R_OK):
            pytest.skip("this user may read everything")
        with pytest.raises(UserError, match=r"cannot list .*closed"):
            list_files([tmp_path])
    finally:
        (tmp_path / "closed").chmod(0o755)
