"""Every file is listed once, wherever it is named, and comes before a large folder has been read to its end."""

import os
import resource
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from threading import Event
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import write_shards

from captioner.errors import UserError
from captioner.files import storage
from captioner.images.loading import ImageError, decode_rgb
from infer import listing
from infer.listing import Ahead, ImageFile, Listing, locate

MANY = 1 << 20  # bytes


def make(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode(errors="surrogateescape"))
    return folder


def listed(*images: str | Path, **options: Any) -> list[tuple[str, str]]:
    """Root and path of all that can be read, sorted, with those listed twice twice."""
    found = Listing([str(source) for source in images], **options)
    return sorted((file.root, file.path) for file in found if file.error is None)


def paths(*images: str | Path, **options: Any) -> list[str]:
    return [path for _, path in listed(*images, **options)]


def refused(*images: str | Path, **options: Any) -> dict[str, str]:
    """The reason for each path that cannot be listed."""
    found = Listing([str(source) for source in images], **options)
    return {file.path: file.error.reason for file in found if file.error}


def unreadable(*images: str | Path) -> dict[str, str]:
    """The reason for each listed file that cannot be read."""
    reasons: dict[str, str] = {}
    for file in Listing([str(source) for source in images]):
        try:
            file.read(max_bytes=MANY)
        except ImageError as error:
            reasons[file.path] = error.reason
    return reasons


def counted(files: Listing) -> Listing:
    for _ in files:
        pass
    return files


# ---- folders ----------------------------------------------------------------------------------------------------


def test_files_of_all_depths_and_endings_are_listed_once(tmp_path: Path) -> None:
    deep = "/".join(["d"] * 300) + "/x.jpg"
    wide = [f"d/{number}/{other}" for number in range(9) for other in ("y", "z/y")]
    short = ["b.JPG", "a.jpg", "A.txt", "no ending", "a/b/c.png", "a/b.jpg", ".hidden", "new\nline"]
    expected = sorted([*short, *wide, deep])
    make(tmp_path, *expected)
    (tmp_path / "empty").mkdir()
    assert listed(tmp_path) == [(str(tmp_path), path) for path in expected]


def test_a_file_keeps_its_root_as_given_and_lies_below_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "one/x.jpg", "two/sub/x.jpg")
    monkeypatch.chdir(tmp_path)
    assert listed("two/", "one") == [("one", "x.jpg"), ("two", "sub/x.jpg")]
    assert listed(".") == [(".", "one/x.jpg"), (".", "two/sub/x.jpg")]
    for root, path in listed("two/", "one", tmp_path):
        assert locate(root, path).read(max_bytes=MANY).decode().endswith(path.removeprefix("one/").removeprefix("two/"))
        assert Path(locate(root, path).location).samefile(Path(root, path))


def test_a_file_that_several_sources_name_is_listed_once_where_it_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, "a.jpg", "sub/b.jpg")
    (tmp_path / "link").symlink_to(tmp_path)
    assert paths(tmp_path, tmp_path, f"{tmp_path}/", tmp_path / "sub" / "..", tmp_path / "link") == [
        "a.jpg",
        "sub/b.jpg",
    ]
    assert paths(tmp_path, tmp_path / "sub") == ["a.jpg", "sub/b.jpg"]
    monkeypatch.chdir(tmp_path)
    Path("list").write_text("sub/b.jpg\n./a.jpg\n")
    images, lists = ["sub", str(tmp_path / "sub"), "sub/b.jpg", "*/*.jpg"], ["list", f"{tmp_path}/list"]
    assert listed(*images, lists=lists) == [(".", "a.jpg"), ("sub", "b.jpg")]
    assert counted(Listing(images, lists=lists)).left_out["files were named again"] == 6
    shares = [listed(*images, lists=lists, rank=rank, world_size=3) for rank in range(3)]
    assert sorted(chain.from_iterable(shares)) == listed(*images, lists=lists)


def test_undecodable_names_can_be_opened_again(tmp_path: Path) -> None:
    raw = b"bad\xff\xfe.jpg"
    make(tmp_path, os.fsdecode(raw))
    (file,) = Listing([str(tmp_path)], world_size=1)
    assert os.fsencode(file.path) == raw
    assert file.read(max_bytes=MANY) == raw
    assert sum(len(paths(tmp_path, rank=rank, world_size=2)) for rank in range(2)) == 1


def test_our_own_output_is_left_out_however_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(
        tmp_path,
        "a.jpg",
        "gallery/index.html",
        "gallery/t/t.jpg",
        "captions.jsonl",
        "sub/gallery/b.jpg",
        "sub/captions.jsonl",
    )
    (tmp_path / "link.jsonl").symlink_to("captions.jsonl")
    monkeypatch.chdir(tmp_path / "sub")
    excluded = (Path("../gallery"), Path("..") / "sub" / ".." / "captions.jsonl", tmp_path / "not there")
    assert paths(tmp_path, excluded=excluded) == ["a.jpg", "sub/captions.jsonl", "sub/gallery/b.jpg"]
    assert paths("../captions.jsonl", "../a.jpg", excluded=excluded) == ["a.jpg"]
    (tmp_path / "list").write_text(f"{tmp_path}/captions.jsonl\n../a.jpg\n")
    assert paths(lists=[str(tmp_path / "list")], excluded=excluded) == ["../a.jpg"]


def test_endings_that_are_left_out_are_counted(tmp_path: Path) -> None:
    make(tmp_path, "a.jpg", "a.txt", "b/c.txt", "txt")
    assert paths(tmp_path, skip_suffixes=[".txt"]) == ["a.jpg", "txt"]
    assert counted(Listing([str(tmp_path)], skip_suffixes=[".txt"], world_size=3)).left_out == {
        ".txt files are no images": 2
    }
    make(tmp_path, "a.TXT", "a.Txt")
    assert paths(tmp_path, skip_suffixes=[".txt"]) == ["a.Txt", "a.jpg", "txt"]
    assert counted(Listing([str(tmp_path)], skip_suffixes=[".txt"])).left_out == {".txt files are no images": 3}


def test_sorted_files_are_in_the_order_of_their_sources_and_of_paths_in_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, "b.jpg", "a.jpg", "y.png", "x.png", "sub/c.jpg", "sub/B.jpg", "sub/in/a.jpg")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list").write_text("y.png\nx.png\nsub/in/a.jpg\n")

    def sorted_paths(*images: str, **more: Any) -> list[str]:
        listing = Listing(images, **more)
        files = list(listing)
        turned = files if more else files[::-1]
        return [file.location.removeprefix("./") for file in listing.sort(turned)]

    assert sorted_paths("b.jpg", "a.jpg", "x.png") == ["b.jpg", "a.jpg", "x.png"]
    assert sorted_paths("sub") == ["sub/B.jpg", "sub/c.jpg", "sub/in/a.jpg"]
    assert sorted_paths("*.png", "sub/", "b.jpg") == [
        "x.png",
        "y.png",
        "sub/B.jpg",
        "sub/c.jpg",
        "sub/in/a.jpg",
        "b.jpg",
    ]
    assert sorted_paths("b.jpg", "sub", "sub/c.jpg") == ["b.jpg", "sub/B.jpg", "sub/c.jpg", "sub/in/a.jpg"]
    assert sorted_paths(lists=["list"]) == ["y.png", "x.png", "sub/in/a.jpg"]


# ---- links and what is no file ----------------------------------------------------------------------------------


def test_links_to_files_count_and_links_to_folders_are_counted(tmp_path: Path) -> None:
    make(tmp_path / "photos", "a.jpg", "sub/b.jpg")
    make(tmp_path / "elsewhere", "c.jpg")
    (tmp_path / "photos" / "link.jpg").symlink_to(tmp_path / "elsewhere" / "c.jpg")
    (tmp_path / "photos" / "folder link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos" / "sub" / "up").symlink_to(tmp_path / "photos")
    assert paths(tmp_path / "photos") == ["a.jpg", "link.jpg", "sub/b.jpg"]
    (line,) = counted(Listing([str(tmp_path / "photos")])).lines_of_left_out()
    assert line.startswith("2 links to folders were not followed")


def test_links_that_lead_round_or_nowhere_are_missing(tmp_path: Path) -> None:
    make(tmp_path, "sub/a.jpg")
    (tmp_path / "itself").symlink_to(tmp_path / "itself")
    (tmp_path / "there").symlink_to(tmp_path / "back")
    (tmp_path / "back").symlink_to(tmp_path / "there")
    (tmp_path / "dead.jpg").symlink_to(tmp_path / "gone")
    (tmp_path / "through.jpg").symlink_to(tmp_path / "sub" / "a.jpg" / "x")
    assert unreadable(tmp_path) == dict.fromkeys(["itself", "there", "back", "dead.jpg", "through.jpg"], "missing")


def test_pipes_sockets_and_devices_are_refused_and_never_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(make(tmp_path, "a.jpg"))  # a socket's path is short
    os.mkfifo("pipe.jpg")
    Path("link.jpg").symlink_to("pipe.jpg")
    Path("null.jpg").symlink_to("/dev/null")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        assert unreadable(".") == dict.fromkeys(["pipe.jpg", "link.jpg", "null.jpg", "socket"], "special file")
        for name in ("pipe.jpg", "socket", "null.jpg", "."):
            with pytest.raises(ImageError, match="special file"):
                ImageFile(".", name).read(max_bytes=MANY)


def failing_scandir(monkeypatch: pytest.MonkeyPatch, errors: dict[str, OSError]) -> None:
    """Root may read everything; so the system's refusal is played."""
    real = os.scandir

    def scandir(folder: str) -> Any:
        if error := errors.get(Path(folder).name):
            raise error
        return real(folder)

    monkeypatch.setattr(listing.os, "scandir", scandir)


def test_folders_that_cannot_be_listed_or_vanish_are_refused_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, "a.jpg", "x/closed/b.jpg", "gone/c.jpg", "open/d.jpg")
    failing_scandir(monkeypatch, {"closed": PermissionError(13, "no"), "gone": FileNotFoundError(2, "no")})
    assert paths(tmp_path) == ["a.jpg", "open/d.jpg"]
    assert refused(tmp_path) == {"x/closed": "unreadable", "gone": "missing"}
    both = [refused(tmp_path, rank=rank, world_size=2) for rank in range(2)]
    assert both[0] | both[1] == refused(tmp_path)
    assert not both[0].keys() & both[1].keys()


def test_a_folder_that_fails_in_the_middle_keeps_what_came(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "a.jpg", "bad/b.jpg", "bad/c.jpg")
    real = listing._scan

    def scan(folder: str) -> Iterator[Any]:
        for number, item in enumerate(real(folder)):
            if number and folder.endswith("bad/"):
                raise OSError(5, "Input/output error")
            yield item

    monkeypatch.setattr(listing, "_scan", scan)
    assert len(paths(tmp_path)) == 2
    assert refused(tmp_path) == {"bad": "unreadable"}


def test_a_folder_that_this_user_may_not_read_is_refused(tmp_path: Path) -> None:
    make(tmp_path, "a.jpg", "closed/b.jpg")
    (tmp_path / "closed").chmod(0)
    try:
        if os.access(tmp_path / "closed", os.R_OK):
            pytest.skip("this user may read everything")
        assert refused(tmp_path) == {"closed": "unreadable"}
    finally:
        (tmp_path / "closed").chmod(0o755)


# ---- what is named ----------------------------------------------------------------------------------------------


def test_a_single_file_lies_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "p/a.jpg", "p/b.jpg", "c.jpg")
    monkeypatch.chdir(tmp_path)
    assert listed("p/a.jpg", "c.jpg", "p/a.jpg") == [(".", "c.jpg"), ("p", "a.jpg")]
    assert listed(tmp_path / "c.jpg") == [(str(tmp_path), "c.jpg")]
    assert listed("p/a.jpg", "p", "p/*.jpg") == [("p", "a.jpg"), ("p", "b.jpg")]
    assert listed("p/a.jpg", "p/*.jpg", "p/b*") == [("p", "a.jpg"), ("p", "b.jpg")]


FILES = ("a.jpg", "b.png", "x/a.jpg", "x/y/a.jpg", "x/y/b.png", "x/.h.jpg", "z1/a.jpg", "z2/b.png", "[w]/a.jpg")
GLOBS = (
    ("*.jpg", ".", ["a.jpg"]),
    ("?.png", ".", ["b.png"]),
    ("x/*", "x", [".h.jpg", "a.jpg", "y/a.jpg", "y/b.png"]),
    ("x/*.jpg", "x", [".h.jpg", "a.jpg"]),
    ("**/*.png", ".", ["b.png", "x/y/b.png", "z2/b.png"]),
    ("x/**/a.jpg", "x", ["a.jpg", "y/a.jpg"]),
    ("x//**", "x", [".h.jpg", "a.jpg", "y/a.jpg", "y/b.png"]),
    ("z[12]", ".", ["z1/a.jpg", "z2/b.png"]),
    ("z[!1]/*", ".", ["z2/b.png"]),
    ("**/y/**/*.png", ".", ["x/y/b.png"]),
    ("[[]w]/a.jpg", ".", ["[w]/a.jpg"]),
    ("[w]", "[w]", ["a.jpg"]),
    ("[w]/a.jpg", "[w]", ["a.jpg"]),
)


@pytest.mark.parametrize(("pattern", "root", "expected"), GLOBS)
def test_a_glob_gives_what_fits_below_the_folder_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, root: str, expected: list[str]
) -> None:
    monkeypatch.chdir(make(tmp_path, *FILES))
    assert listed(pattern) == [(root, path) for path in expected]
    absolute = str(tmp_path / root) if root != "." else str(tmp_path)
    if not root.startswith("["):
        assert listed(f"{tmp_path}/{pattern}") == [(absolute, path) for path in expected]


def test_a_glob_looks_into_no_folder_that_cannot_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "a.jpg", "closed/b.jpg")
    (tmp_path / "closed" / "up").symlink_to(tmp_path)
    failing_scandir(monkeypatch, {"closed": PermissionError(13, "no")})
    assert refused(f"{tmp_path}/*.jpg") == {}
    assert refused(f"{tmp_path}/*/*.jpg", tmp_path / "a.jpg") == {"closed": "unreadable"}


@pytest.mark.parametrize(
    "place", ["not there", "not there/*.jpg", "*.gif", "a.jpg/", "a.jpg/*", "dead", "memory://no/"]
)
def test_what_is_not_there_is_refused_at_once_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.chdir(make(tmp_path, "a.jpg"))
    (tmp_path / "dead").symlink_to("nowhere")
    with pytest.raises(UserError) as caught:
        Listing(["a.jpg", place])
    assert place in str(caught.value)
    assert "\n" not in str(caught.value)
    assert ": " in str(caught.value)


def test_a_root_that_cannot_be_listed_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "closed/b.jpg")
    failing_scandir(monkeypatch, {"closed": PermissionError(13, "Permission denied")})
    with pytest.raises(PermissionError):
        Listing([str(tmp_path / "closed")])


@pytest.mark.parametrize("sources", [{"images": [""]}, {"images": [], "lists": [""]}, {"images": [], "shards": [""]}])
def test_an_empty_name_is_refused_and_not_taken_for_the_disk(sources: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="an empty name"):
        Listing(**sources)


def test_the_check_before_the_work_looks_at_no_more_than_a_first_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, *(f"{number}/{number}/x.jpg" for number in range(9)))
    real, taken = listing._scan, []
    monkeypatch.setattr(listing, "_scan", lambda folder: (taken.append(item) or item for item in real(folder)))
    Listing([str(tmp_path)])
    assert len(taken) == 1


def test_an_empty_folder_is_no_mistake(tmp_path: Path) -> None:
    assert paths(tmp_path) == []


# ---- lists ------------------------------------------------------------------------------------------------------


def test_a_list_names_files_by_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(make(tmp_path, "a.jpg", "p/b c.jpg", os.fsdecode(b"\xff.jpg")))
    lines = [
        b"a.jpg\r",
        b"",
        b"  ",
        b"./p//b c.jpg",
        b"/x/y.jpg",
        b"http://h/p/a%20b.jpg?u=x/y",
        b"s3://b/k?.jpg",
        b"\xff.jpg",
    ]
    Path("list").write_bytes(b"\n".join(lines))
    files = list(Listing([], lists=["list", "list"]))
    assert [(file.root, file.path) for file in files] == [
        (".", "a.jpg"),
        (".", "p/b c.jpg"),
        ("/", "x/y.jpg"),
        ("http://h/p", "a%20b.jpg?u=x/y"),
        ("s3://b", "k?.jpg"),
        (".", "\udcff.jpg"),
    ]
    assert files[5].read(max_bytes=MANY) == b"\xff.jpg"
    assert [file.location for file in files[2:5]] == [
        "/x/y.jpg",
        "http://h/p/a%20b.jpg?u=x/y",
        "s3://b/k?.jpg",
    ]


def test_a_line_that_names_a_file_again_is_dropped_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{number}.jpg" for number in range(50)]
    monkeypatch.chdir(make(tmp_path, *names))
    make(tmp_path, "elsewhere/x.jpg")
    Path("elsewhere/list").write_text("\n".join([*names, "elsewhere/x.jpg", *names, "./7.jpg"]))
    files = Listing([], lists=["elsewhere/list"])
    assert len(list(files)) == 51
    assert files.left_out["files were named again"] == 51
    assert len(listed(".", lists=["elsewhere/list"])) == 52  # with the list itself
    assert counted(Listing(["."], lists=["elsewhere/list"])).left_out["files were named again"] == 102


def test_a_byte_order_mark_belongs_to_no_name(tmp_path: Path) -> None:
    (tmp_path / "list").write_text("a.jpg\n\ufeffb.jpg", encoding="utf-8-sig")
    assert paths(lists=[str(tmp_path / "list")]) == ["a.jpg", "\ufeffb.jpg"]


def test_a_line_that_no_file_can_have_is_missing(tmp_path: Path) -> None:
    (tmp_path / "list").write_text("x\0/captions.jsonl\n")
    (file,) = Listing([], lists=[str(tmp_path / "list")], excluded=[tmp_path / "captions.jsonl"])
    with pytest.raises(ImageError, match="missing"):
        file.read(max_bytes=MANY)


def test_the_standard_input_is_a_list_for_one_process() -> None:
    command = [sys.executable, "-c", "from infer.listing import Listing; print(*Listing([], lists=['-']), sep='')"]
    done = subprocess.run(command, input="a.jpg\nb.jpg\n", capture_output=True, text=True, check=True)
    assert done.stdout == f"{ImageFile('.', 'a.jpg')}{ImageFile('.', 'b.jpg')}\n"
    with pytest.raises(UserError, match="write it to a file"):
        Listing([], lists=["-"], world_size=2)


def test_a_list_that_is_a_pipe_is_for_one_process() -> None:
    source, sink = os.pipe()
    try:
        os.write(sink, b"a.jpg\n")
        with pytest.raises(UserError, match=f"cannot read the list /dev/fd/{source}: write it to a file"):
            Listing([], lists=[f"/dev/fd/{source}"], world_size=2)
        files = Listing([], lists=[f"/dev/fd/{source}"])
    finally:
        os.close(sink)
        os.close(source)
    assert [file.path for file in files] == ["a.jpg"]


@pytest.mark.parametrize("name", ["none", "folder", "x" * 300])
def test_a_list_that_cannot_be_read_is_refused_at_once(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match=name):
        Listing([], lists=[str(tmp_path / name)])


# ---- shards -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shards(tmp_path_factory.mktemp("dataset"), (3, 2))


@pytest.mark.parametrize("store", ["disk", "memory"])
def test_every_sample_of_shards_is_listed_and_found_again(dataset: str, store: str) -> None:
    folder = dataset if store == "disk" else f"memory://{uuid4()}"
    if store == "memory":
        for path in Path(dataset).glob("*.*"):
            storage.write_atomic(storage.join(folder, path.name), path.read_bytes())
    found = listed(shards=[folder, folder])
    names = [f"train-{shard:06d}.tar/train-{key:09d}.jpg" for shard, key in ((0, 0), (0, 1), (0, 2), (1, 3), (1, 4))]
    assert found == [(folder, name) for name in names]
    for file in Listing([], shards=[folder]):
        assert locate(file.root, file.path) == file
        data = file.read(max_bytes=MANY)
        assert decode_rgb(data)[0].size == (32, 32)
        with pytest.raises(ImageError, match="too large"):
            file.read(max_bytes=len(data) - 1)
    with pytest.raises(ImageError, match="missing"):
        locate(folder, "train-000000.tar/none.jpg").read(max_bytes=MANY)


def test_shards_that_are_damaged_or_gone_are_refused_one_by_one(tmp_path: Path) -> None:
    folder = Path(write_shards(tmp_path / "d", (1, 1, 1, 1)))
    (folder / "train-000000.index").unlink()
    (folder / "train-000001.index").write_bytes((folder / "train-000002.index").read_bytes())
    (folder / "train-000003.tar").unlink()
    found = list(Listing([], shards=[str(folder)]))
    reasons = {file.path: file.error.reason for file in found if file.error}
    assert reasons == {"train-000000.tar": "missing", "train-000001.tar": "unreadable"}
    files = [file for file in found if file.error is None]
    assert len(files) == 2
    with pytest.raises(ImageError, match="missing"):
        files[1].read(max_bytes=MANY)


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no manifest"):
        Listing([], shards=[str(make(tmp_path, "a.jpg"))])


def test_a_folder_that_is_called_like_a_tar_is_a_folder(tmp_path: Path) -> None:
    make(tmp_path, "x.tar/a.jpg")
    (file,) = Listing([str(tmp_path)])
    assert file == ImageFile(str(tmp_path), "x.tar/a.jpg") == locate(str(tmp_path), "x.tar/a.jpg")


# ---- behind URLs ------------------------------------------------------------------------------------------------


def fill(folder: str) -> dict[str, bytes]:
    files = {name: name.encode() for name in ("a b.jpg", "sub/é?#%20.jpg", "sub/deep/c.png")} | {"empty": b""}
    for name, data in files.items():
        storage.write_atomic(storage.join(folder, name), data)
    return files


@pytest.mark.parametrize("store", ["memory", "s3"])
def test_urls_of_folders_files_and_globs(store: str, request: pytest.FixtureRequest) -> None:
    folder = f"s3://{request.getfixturevalue('bucket').name}/p" if store == "s3" else f"memory://{uuid4()}"
    files = fill(folder)
    assert listed(folder) == sorted((folder, name) for name in files)
    assert paths(folder, f"{folder}/", f"{folder}/**/*.jpg") == sorted(files)
    assert {file.path: file.read(max_bytes=100) for file in Listing([folder])} == files
    with pytest.raises(ImageError, match="too large"):
        ImageFile(folder, "a b.jpg").read(max_bytes=3)
    with pytest.raises(ImageError, match="missing"):
        ImageFile(folder, "none").read(max_bytes=3)
    assert listed(f"{folder}/a b.jpg") == [(folder, "a b.jpg")]
    assert listed(f"{folder}/*/*.jpg") == [(folder, "sub/é?#%20.jpg")]
    assert listed(f"{folder}/sub/**/*.png") == [(f"{folder}/sub", "deep/c.png")]
    for place in (f"{folder}/none", f"{folder}/none/", f"{folder}/*.gif"):
        with pytest.raises(UserError, match=place.replace("*", r"\*")):
            Listing([place])


def test_the_web_is_listed_where_its_server_shows_it(nginx: tuple[str, Path]) -> None:
    address, root = nginx
    make(root / "listed", "a b&c.jpg", "sub/50%.jpg", "sub/deep/d;é.png")
    make(root / "hidden", "x.jpg")
    (root / "listed" / "empty").touch()
    folder = f"{address}/listed"
    expected = ["a%20b%26c.jpg", "empty", "sub/50%25.jpg", "sub/deep/d%3B%C3%A9.png"]
    assert [path.lower() for path in paths(folder)] == [path.lower() for path in expected]
    for file in Listing([f"{folder}/"]):
        data = file.read(max_bytes=100)
        assert data == b"" if file.path == "empty" else file.path.rpartition("/")[2][-4:].encode() in data
    assert paths(f"{folder}/sub/**/*.jpg") == ["50%25.jpg"]
    assert listed(f"{address}/hidden/x.jpg?size=3/4") == [(f"{address}/hidden", "x.jpg?size=3/4")]
    (file,) = Listing([f"{address}/hidden/x.jpg?size=3/4"])
    assert file.read(max_bytes=100) == b"x.jpg"
    for place in (f"{address}/hidden/", f"{address}/hidden", f"{address}/none.jpg", f"{address}/listed/none/"):
        with pytest.raises(UserError, match=place):
            Listing([place])


def test_a_server_that_leads_in_circles_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "scan_folder", lambda folder: iter([("up", True), ("a.jpg", False)]))
    *files, last = Listing(["http://host/p"])
    assert len(files) == 33
    assert last.path == "/".join(["up"] * 33)
    assert str(last.error) == "unreadable: more than 32 folders deep: it may be a loop"


# ---- shares and size --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("tree"), *(f"{number % 7}/{number:05d}.jpg" for number in range(200)))


@settings(max_examples=20, deadline=None)
@given(world_size=st.integers(1, 20))
def test_the_shares_of_any_number_of_processes_are_a_partition(tree: Path, world_size: int) -> None:
    shares = [listed(tree, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert sorted(chain.from_iterable(shares)) == listed(tree)
    assert max(map(len, shares)) < 3 * 200 / world_size + 12


def test_a_file_belongs_to_the_same_process_whatever_else_there_is(tmp_path: Path) -> None:
    make(tmp_path, *(f"{number}.jpg" for number in range(40)))
    before = [set(paths(tmp_path, rank=rank, world_size=3)) for rank in range(3)]
    make(tmp_path, *(f"new/{number}.jpg" for number in range(40)))
    after = [set(paths(tmp_path, f"{tmp_path}/../*/0.jpg", rank=rank, world_size=3)) for rank in range(3)]
    assert all(early <= late for early, late in zip(before, after, strict=True))
    assert listing.hash_location("photos/a/\udcff.jpg").hex() == "3a62eeaca618bbfd65d5b060c26d1100"  # in every process


def test_the_first_file_comes_before_a_folder_has_been_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, *(f"{number}.jpg" for number in range(500)))
    real, taken = listing._scan, []
    monkeypatch.setattr(listing, "_scan", lambda folder: (taken.append(item) or item for item in real(folder)))
    files = Listing([str(tmp_path)])
    next(files)
    assert len(taken) <= 2
    assert len(list(files)) == 499


LIST_LARGE = """
import os, resource, sys, tempfile
from pathlib import Path
from infer.listing import Listing
kind, num_files, memory = sys.argv[1], int(sys.argv[2]), Path("/dev/shm")
with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
    if kind == "list":
        Path(folder, "list").write_text("".join(f"photos/{number}.jpg\\n" for number in range(num_files)))
    else:
        handle = os.open(folder, os.O_RDONLY)
        for number in range(num_files):
            os.close(os.open(str(number), os.O_CREAT | os.O_WRONLY, dir_fd=handle))
    sources = {"lists": [f"{folder}/list"]} if kind == "list" else {"images": [folder]}
    files = Listing(**{"images": [], **sources}, excluded=[Path("captions.jsonl")], world_size=1)
    next(files)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert sum(1 for _ in files) == num_files - 1
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / num_files)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "num_files"), [("folder", 200_000), ("list", 100_000)])
def test_memory_stays_under_32_bytes_a_file(kind: str, num_files: int) -> None:
    line = [sys.executable, "-c", LIST_LARGE, kind, str(num_files)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 32


# ---- reading ----------------------------------------------------------------------------------------------------


def test_a_file_that_cannot_be_read_tells_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "a.jpg")

    def reason(name: str, max_bytes: int = MANY) -> str:
        with pytest.raises(ImageError) as caught:
            ImageFile(str(tmp_path), name).read(max_bytes=max_bytes)
        assert "\n" not in caught.value.message
        return caught.value.reason

    (tmp_path / "empty").touch()
    assert ImageFile(str(tmp_path), "empty").read(max_bytes=0) == b""
    assert ImageFile(str(tmp_path), "a.jpg").read(max_bytes=5) == b"a.jpg"
    assert reason("a.jpg", 4) == "too large"
    assert {reason(name) for name in ("none", "a.jpg/x", "nul\0", "half \ud83d")} == {"missing"}
    assert reason("x" * 300) == "unreadable"
    refusal = PermissionError(13, "Permission denied")
    monkeypatch.setattr(storage, "read_bytes", lambda *_, **__: (_ for _ in ()).throw(refusal))
    assert reason("a.jpg") == "unreadable"


def test_a_huge_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ImageError, match=r"1,099,511,627,776 bytes.* 1,048,576 are allowed: "):
        ImageFile(str(tmp_path), "huge").read(max_bytes=MANY)


# ---- ahead of captioning ----------------------------------------------------------------------------------------

odd_names = st.text(st.characters() | st.integers(0xDC80, 0xDCFF).map(chr), min_size=1, max_size=9)
files = st.builds(ImageFile, odd_names, odd_names, st.integers(0, 1 << 40), st.none() | st.integers(0, 1 << 40))


@given(listed=st.lists(files, max_size=30), has_error=st.booleans())
@settings(deadline=None, max_examples=50)
def test_the_files_come_as_they_were_listed_and_the_total_at_the_end(listed: list[ImageFile], has_error: bool) -> None:
    totals: list[int] = []
    entries = [*listed, ImageFile("a", "b", error=ImageError("missing", "gone"))] if has_error else listed
    ahead = Ahead(iter(entries), on_end=totals.append)
    found = list(ahead)
    assert list(map(repr, found)) == list(map(repr, entries))
    assert totals == [len(entries)]
    assert list(ahead) == []


def test_a_file_is_there_as_soon_as_it_is_listed_and_the_total_before_the_first_is_taken() -> None:
    go_on, ended = Event(), Event()

    def listing() -> Iterator[ImageFile]:
        yield ImageFile("a", "first")
        assert go_on.wait(10)
        yield ImageFile("a", "second")

    ahead = Ahead(listing(), on_end=lambda _: ended.set())
    assert next(ahead) == ImageFile("a", "first")
    assert not ended.is_set()
    go_on.set()
    assert ended.wait(10)
    assert list(ahead) == [ImageFile("a", "second")]


def test_what_the_listing_raises_comes_after_its_files() -> None:
    def listing() -> Iterator[ImageFile]:
        yield ImageFile("a", "b")
        raise OSError(5, "the list's disk is gone")

    ahead = Ahead(listing(), on_end=lambda _: pytest.fail("there is no total"))
    assert next(ahead) == ImageFile("a", "b")
    with pytest.raises(OSError, match="disk is gone"):
        next(ahead)


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, limits[1]))
    try:
        ahead = Ahead((ImageFile("a", str(number)) for number in range(1_000)), on_end=lambda _: None)
        with pytest.raises(UserError, match="set TMPDIR to"):
            list(ahead)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == []  # noqa: PTH208


@pytest.mark.slow
def test_memory_does_not_grow_with_what_is_listed() -> None:
    code = """
from pathlib import Path
from threading import Event
from infer.listing import Ahead, ImageFile

largest = lambda: int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
before, ended = largest(), Event()
ahead = Ahead((ImageFile("photos", f"{number:09d}.jpg") for number in range(100_000)), on_end=lambda _: ended.set())
ended.wait()
print(sum(1 for _ in ahead), largest() - before)
"""
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    num_files, growth_kb = map(int, found.split())
    assert num_files == 100_000
    assert growth_kb < 4_000
