"""Files on disk and behind URLs: sizes, atomic writes, servers that fail."""

import errno
import gzip
import itertools
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from servers import Bucket, Proxy, free_port, use_s3

from captioner.errors import UserError
from captioner.files import retries, storage
from captioner.files.storage import RefusedError, StorageError

ODD_NAMES = ["a b.txt", 'it\'s "q".txt', "50%.txt", "%20.txt", "a#b?c=d&e;f.txt", "кот é 猫.txt", "x+y~[z]{*}.txt"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "FIRST_PAUSE_SECONDS", 0.001)


# ---- names ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "names", "expected"),
    [
        ("data/coco", ["a.jpg"], "data/coco/a.jpg"),
        ("data/coco/", ["b", "a #1.jpg"], "data/coco/b/a #1.jpg"),
        ("/", ["a"], "/a"),
        ("s3://bucket/x/", ["a %20?#.jpg"], "s3://bucket/x/a %20?#.jpg"),
        ("http://host/x/", ["a b/%#?é.jpg"], "http://host/x/a%20b/%25%23%3F%C3%A9.jpg"),
        ("https://host", ["half \ud83d"], "https://host/half%20%ED%A0%BD"),
    ],
)
def test_names_are_joined_and_percent_encoded_for_the_web_only(folder: str, names: list[str], expected: str) -> None:
    assert storage.join(folder, *names) == expected


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1))
def test_a_web_server_reads_back_any_quoted_name(name: str) -> None:
    import yarl

    url = yarl.URL(storage.join("http://host/x", name.replace("/", "_").replace(".", "_")))
    assert (url.parent.path, url.name) == ("/x", name.replace("/", "_").replace(".", "_"))


@pytest.mark.parametrize("location", ["file:///tmp/x", "local:///tmp/x"])
def test_a_url_of_this_machine_is_refused_and_the_path_named(location: str) -> None:
    for action in (storage.read_bytes, storage.exists, storage.delete, storage.list_files):
        with pytest.raises(UserError, match=r"give its path alone, /tmp/x"):
            action(location)
    with pytest.raises(UserError, match="give its path alone"):
        storage.sizes_bytes(location, ["a"])


def test_an_unknown_protocol_is_refused_in_one_line() -> None:
    with pytest.raises(StorageError, match="cannot open floppy://a") as caught:
        storage.read_bytes("floppy://a")
    assert "\n" not in str(caught.value)


def test_a_url_that_cannot_be_opened_has_one_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def lack(*_: object, **_options: object) -> None:
        raise ImportError("No module named 'aiohttp'")

    monkeypatch.setattr(storage, "url_to_fs", lack)
    with pytest.raises(StorageError) as caught:
        storage.read_json("http://host/a.json", remedy="make it")
    assert str(caught.value).endswith(": s3:// and http:// need pip install -e '.[s3]'")
    assert "make it" not in str(caught.value)


# ---- on disk ----------------------------------------------------------------------------------------------


def test_sizes_on_disk_are_of_regular_files_only(tmp_path: Path) -> None:
    (tmp_path / "a b.txt").write_bytes(b"12345")
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("a b.txt")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    names = [
        "a b.txt",
        "empty",
        "folder",
        "link",
        "loop",
        "pipe",
        "nul\0",
        "half \ud83d",
        "a b.txt/x",
        "none",
        "x" * 999,
    ]
    found = storage.sizes_bytes(str(tmp_path), names)
    assert found == [5, 0, None, 5, None, None, None, None, None, None, None]


def test_sizes_come_in_order_for_many_files(tmp_path: Path) -> None:
    for size in range(200):
        (tmp_path / str(size)).write_bytes(bytes(size))
    assert storage.sizes_bytes(str(tmp_path), [str(size) for size in range(199, -2, -1)]) == [*range(199, -1, -1), None]


def test_a_file_is_created_with_its_folders_or_replaced(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "file"
    for content in (b"one", "two é"):
        storage.write_atomic(str(path), content)
        assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("target", ["there", "dangling"])
def test_a_symbolic_link_stays_and_its_target_is_written(target: str, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    real, middle, link = tmp_path / "disk" / "real.json", tmp_path / "middle", tmp_path / "link.json"
    if target == "there":
        real.write_text("old")
    middle.symlink_to("disk/real.json")
    link.symlink_to(middle)
    storage.write_atomic(str(link), "new")
    assert link.is_symlink()
    assert middle.is_symlink()
    assert real.read_text() == "new"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["disk", "link.json", "middle", "real.json"]


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as reader:
        read = reader.submit(pipe.read_bytes)
        storage.write_atomic(str(pipe), "through")
        assert read.result(timeout=10) == b"through"
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make devices")
def test_devices_stay_devices(tmp_path: Path) -> None:
    null, disk = tmp_path / "null", tmp_path / "disk"
    os.mknod(null, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    storage.write_atomic(str(null), "gone")
    assert null.is_char_device()
    os.mknod(disk, stat.S_IFBLK | 0o666, os.makedev(240, 77))
    with pytest.raises(OSError, match="neither a file nor a pipe"):
        storage.write_atomic(str(disk), "harm")
    assert disk.is_block_device()
    assert sorted(tmp_path.iterdir()) == [disk, null]


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        storage.write_atomic(str(tmp_path), "x")
    assert list(tmp_path.iterdir()) == []


WRITE = """
import sys
from captioner.files import storage
print("before", flush=True)
storage.write_atomic(sys.argv[1], "text\\n")
print("after")
"""


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "out.txt"])
@pytest.mark.parametrize("kind", ["file", "pipe"])
def test_writing_to_stdout_keeps_what_was_printed(name: str, kind: str, tmp_path: Path) -> None:
    words = [sys.executable, "-c", WRITE, name]
    if kind == "file":
        with (tmp_path / "out.txt").open("w") as out:
            subprocess.run(words, stdout=out, check=True, cwd=tmp_path)
        printed = (tmp_path / "out.txt").read_text()
    elif name.startswith("/"):
        printed = subprocess.run(words, stdout=subprocess.PIPE, check=True, cwd=tmp_path, text=True).stdout
    else:
        pytest.skip("a file is no pipe")
    assert printed == "before\ntext\nafter\n"


def test_content_is_synced_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (order.append("fsync"), fsync(handle)))
    monkeypatch.setattr(Path, "replace", lambda *paths: (order.append("rename"), replace(*paths)))
    storage.write_atomic(str(tmp_path / "file"), b"x")
    assert order == ["fsync", "rename", "fsync"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a small file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_leaves_what_was_there_and_nothing_else(small_disk: Path) -> None:
    target = small_disk / "file"
    storage.write_atomic(str(target), b"old")
    with pytest.raises(OSError, match="No space left") as caught:
        storage.write_atomic(str(target), bytes(100_000))
    assert caught.value.errno == errno.ENOSPC
    assert list(small_disk.iterdir()) == [target]
    assert target.read_bytes() == b"old"


def test_deleting_a_missing_file_is_no_error(tmp_path: Path) -> None:
    location = str(tmp_path / "file")
    storage.write_atomic(location, b"x")
    for _ in range(2):
        storage.delete(location)
        assert not storage.exists(location)


# ---- in memory --------------------------------------------------------------------------------------------


def test_memory_is_a_store_like_others() -> None:
    for root in ("memory://", "memory://storage/x"):
        storage.write_atomic(storage.join(root, "a.txt"), b"123")
        storage.write_atomic(storage.join(root, "in", "b.txt"), "4")
        assert storage.sizes_bytes(root, ["in/b.txt", "none", "a.txt", "in"]) == [1, None, 3, None]
        assert storage.list_files(root) == ["a.txt"]
        assert storage.exists(storage.join(root, "in"))
        for name in ("a.txt", "a.txt", "in/b.txt"):
            storage.delete(storage.join(root, name))
        assert not storage.exists(storage.join(root, "a.txt"))
    fsspec.filesystem("memory").store.clear()


def test_servers_that_show_incomplete_files_get_a_rename(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "OBJECT_STORES", frozenset())
    storage.write_atomic("memory://early/deep/file", b"one")
    storage.write_atomic("memory://early/deep/file", b"two")
    assert storage.read_bytes("memory://early/deep/file") == b"two"
    assert storage.list_files("memory://early/deep") == ["file"]


# ---- parts of files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", ["disk", "memory", "web", "s3"])
def test_a_range_of_a_file_is_read(store: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    data = os.urandom(1000)
    if store == "web":
        address, root = request.getfixturevalue("nginx")
        (root / "part").write_bytes(data)
        place = storage.join(address, "part")
    else:
        roots = {"disk": str(tmp_path), "memory": "memory://parts"}
        root = roots[store] if store in roots else f"s3://{request.getfixturevalue('bucket').name}"
        place = storage.join(root, "part")
        storage.write_atomic(place, data)
    for start, end in ((0, 1000), (0, 1), (999, 1000), (10, 20)):
        assert storage.read_range(place, start=start, end=end, patience_seconds=5.0) == data[start:end]
    with pytest.raises(FileNotFoundError):
        storage.read_range(f"{place}-none", start=0, end=1, patience_seconds=5.0)
    with pytest.raises(OSError, match=r"received|416"):
        storage.read_range(place, start=990, end=1001, patience_seconds=0.0)


@pytest.mark.usefixtures("quick")
def test_a_short_range_is_retried_and_a_whole_file_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    place = "memory://parts/short"
    storage.write_atomic(place, data := os.urandom(100))
    filesystem = fsspec.filesystem("memory")
    answers = [data[10:19], b"", data[10:20]]
    monkeypatch.setattr(filesystem, "cat_file", lambda path, **_: answers.pop(0), raising=False)
    assert storage.read_range(place, start=10, end=20) == data[10:20]
    assert not answers
    answers.append(data)
    assert storage.read_range(place, start=10, end=20) == data[10:]


# ---- S3 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "/deep/er"])
def test_s3_keeps_any_name(bucket: Bucket, prefix: str) -> None:
    root = f"s3://{bucket.name}{prefix}"
    for size, name in enumerate(ODD_NAMES):
        storage.write_atomic(storage.join(root, name), bytes(size))
        storage.write_atomic(storage.join(root, "a folder", name), bytes(size + 100))
    names = [*ODD_NAMES, *(f"a folder/{name}" for name in ODD_NAMES), "none", "a folder", "nul\0", "half \ud83d"]
    sizes = [*range(len(ODD_NAMES)), *range(100, 100 + len(ODD_NAMES)), None, None, None, None]
    assert storage.sizes_bytes(root, names) == sizes
    assert storage.list_files(root) == sorted(ODD_NAMES)
    for name, size in zip(names[:-4], sizes[:-4], strict=True):
        location = storage.join(root, name)
        assert (len(storage.read_bytes(location)), storage.size_bytes(location)) == (size, size)
    assert storage.exists(root)
    assert storage.exists(storage.join(root, "a folder"))
    assert not storage.exists(storage.join(root, "none"))
    location = storage.join(root, ODD_NAMES[4])
    for _ in range(2):
        storage.delete(location)
    assert not storage.exists(location)
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(location)


def test_s3_listings_are_not_cached(bucket: Bucket) -> None:
    """fsspec caches listings, and would not see what others write."""
    root = f"s3://{bucket.name}/x"
    bucket.put("x/a", b"1")
    assert storage.sizes_bytes(root, ["a", "b"]) == [1, None]
    assert storage.list_files(root) == ["a"]
    bucket.put("x/a", b"22")
    bucket.put("x/b", b"333")
    assert storage.size_bytes(f"{root}/b") == 3
    assert storage.list_files(root) == ["a", "b"]
    assert storage.sizes_bytes(root, ["a", "b"]) == [2, 3]
    assert storage.read_bytes(f"{root}/b") == b"333"


def test_s3_is_scanned_page_by_page(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "2")
    for key in ("p/", "p/a.jpg", "p/b?.jpg", "p/c/d.jpg", "p/e.jpg", "p//f.jpg", "q.jpg"):
        bucket.put(key, b"x")
    asked = []
    retry = storage.retry
    monkeypatch.setattr(storage, "retry", lambda *args: asked.append(args[1]) or retry(*args))
    root = f"s3://{bucket.name}/p"
    names = storage.scan_folder(root)
    first = next(names)
    assert len(asked) == 1
    expected = [("", True), ("a.jpg", False), ("b?.jpg", False), ("c", True), ("e.jpg", False)]
    assert sorted([first, *names]) == expected
    assert len(asked) == 3
    assert list(storage.scan_folder(f"{root}//")) == [("f.jpg", False)]
    assert storage.read_bytes(f"{root}//f.jpg") == b"x"
    assert sorted(storage.scan_folder(f"s3://{bucket.name}")) == [("p", True), ("q.jpg", False)]
    assert [storage.is_folder(place) for place in (root, f"{root}/c", f"{root}/a.jpg", f"{root}/none")] == [
        True,
        True,
        False,
        False,
    ]


def test_a_failed_listing_resumes_at_its_page(bucket: Bucket, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of three answers are failures: no listing of seven pages could be had in one go."""
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "1")
    monkeypatch.setattr(retries, "FIRST_PAUSE_SECONDS", 0.001)
    names = [f"{number}.jpg" for number in range(6)]
    for name in (*names, "deep/er.jpg"):
        bucket.put(f"p/{name}", b"123")
    with Proxy(s3) as proxy, use_s3(proxy.address):
        answers = itertools.cycle(["503", "drop", "ok"])
        proxy.choose = lambda method, path: next(answers)
        assert storage.sizes_bytes(f"s3://{bucket.name}/p", [*names, "deep", "none"]) == [3] * 6 + [None, None]
        assert storage.find_files(f"s3://{bucket.name}/p", "*.jpg") == names
    assert storage.find_files(f"s3://{bucket.name}/p/", "*/*.jpg") == ["deep/er.jpg"]
    assert proxy.treated.count("ok") == 14


class Listed:
    """A filesystem that gives certain answers."""

    def __init__(self, entries: list[dict[str, str]]) -> None:
        self.entries = entries
        self.req_kw = {"RequestPayer": "requester"}
        self.asked: dict[str, str] = {}

    def ls(self, path: str, *, detail: bool) -> list[dict[str, str]]:
        return self.entries

    def split_path(self, path: str) -> tuple[str, str, None]:
        bucket, _, key = path.removeprefix("s3://").partition("/")
        return bucket, key, None

    def call_s3(self, method: str, **options: str) -> dict[str, bool]:
        self.asked = options
        return {"IsTruncated": False}


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_folder_marker_is_not_a_file(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [
        {"name": "b/p/", "type": kind},
        {"name": "b/p/p", "type": "file"},
        {"name": "b/p/s/", "type": "directory"},
    ]
    monkeypatch.setattr(storage, "_filesystem", lambda location: (Listed(entries), location.partition("://")[2]))
    for folder in ("gs://b/p", "gs://b/p/"):
        assert list(storage.scan_folder(folder)) == [("p", False), ("s", True)]


def test_who_pays_for_reading_pays_for_listing(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Listed([])
    monkeypatch.setattr(storage, "_filesystem", lambda location: (store, "b/p"))
    assert list(storage.scan_folder("s3://b/p")) == []
    assert store.asked == {"Bucket": "b", "Prefix": "p/", "Delimiter": "/", "RequestPayer": "requester"}


def test_an_empty_object_is_read_without_a_retry(bucket: Bucket) -> None:
    bucket.put("empty", b"")
    started = time.monotonic()
    assert storage.read_bytes(f"s3://{bucket.name}/empty", end=10) == b""
    assert time.monotonic() - started < 3.0  # without retries


@pytest.mark.slow
def test_a_large_object_goes_up_in_parts_and_comes_back(bucket: Bucket) -> None:
    data = os.urandom(1 << 20) * 110
    storage.write_atomic(f"s3://{bucket.name}/large", data)
    assert storage.read_bytes(f"s3://{bucket.name}/large") == data


def test_a_missing_bucket_is_an_error_of_one_line(bucket: Bucket) -> None:
    assert not storage.exists(f"s3://{bucket.name}-none")
    with pytest.raises(OSError, match="bucket"):
        storage.write_atomic(f"s3://{bucket.name}-none/x", b"x")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("mood", ["500", "503", "drop", "cut request", "cut answer"])
def test_requests_to_a_failing_s3_server_are_retried(bucket: Bucket, s3: str, mood: str) -> None:
    with Proxy(s3) as proxy, use_s3(proxy.address):
        answers = iter([mood, "ok", mood, mood, "ok", mood, *["ok"] * 99])
        proxy.choose = lambda method, path: next(answers)
        data = os.urandom(300_000)
        storage.write_atomic(f"s3://{bucket.name}/x/a", data)
        assert bucket.read_all("x") == {"a": data}
        assert storage.read_bytes(f"s3://{bucket.name}/x/a") == data
        assert storage.size_bytes(f"s3://{bucket.name}/x/a") == len(data)
        assert storage.sizes_bytes(f"s3://{bucket.name}/x", ["a"]) == [len(data)]
    assert proxy.treated.count(mood) >= 4


def test_an_upload_cut_in_the_middle_leaves_what_was_there(bucket: Bucket, s3: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(retries, "PATIENCE_SECONDS", 0.0)
    bucket.put("x/a", b"old")
    with Proxy(s3) as proxy, use_s3(proxy.address):
        proxy.choose = lambda method, path: "cut request"
        with pytest.raises(StorageError):
            storage.write_atomic(f"s3://{bucket.name}/x/a", bytes(300_000))
        with pytest.raises(StorageError):
            storage.write_atomic(f"s3://{bucket.name}/x/b", bytes(300_000))
    assert bucket.read_all("x") == {"a": b"old"}


def test_requests_to_a_stalling_s3_server_are_retried(bucket: Bucket, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "STALL_SECONDS", 0.5)
    with Proxy(s3) as proxy, use_s3(proxy.address):
        answers = iter(["stall", "ok", "stall"])
        proxy.choose = lambda method, path: next(answers, "ok")
        storage.write_atomic(f"s3://{bucket.name}/x/a", b"123")
        assert storage.read_bytes(f"s3://{bucket.name}/x/a") == b"123"


def test_a_server_that_is_gone_is_an_error_of_one_line_soon(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "PATIENCE_SECONDS", 1.0)
    started = time.monotonic()
    with (
        use_s3(f"http://127.0.0.1:{free_port()}"),
        pytest.raises(StorageError, match=f"s3://{bucket.name}/x") as caught,
    ):
        storage.read_bytes(f"s3://{bucket.name}/x")
    assert "\n" not in str(caught.value)
    assert time.monotonic() - started < 15


def test_missing_credentials_are_not_retried(s3: str, tmp_path: Path) -> None:
    code = "from captioner.files import storage; storage.read_bytes('s3://bucket/x')"
    variables = {name: value for name, value in os.environ.items() if not name.startswith("AWS")}
    variables |= {"AWS_ENDPOINT_URL": s3, "AWS_EC2_METADATA_DISABLED": "true", "HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=False)
    assert "StorageError: s3://bucket/x: NoCredentialsError" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("store", ["disk", "memory", "s3"])
def test_a_new_file_replaces_none(store: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    roots = {"disk": str(tmp_path), "memory": "memory://new"}
    root = roots[store] if store in roots else f"s3://{request.getfixturevalue('bucket').name}"
    location = storage.join(root, "file")
    storage.write_new(location, "first")
    with pytest.raises(FileExistsError):
        storage.write_new(location, "second")
    assert storage.read_bytes(location) == b"first"
    assert storage.list_files(root) == ["file"]


def test_an_s3_object_is_replaced_only_if_it_has_not_changed(bucket: Bucket) -> None:
    location = f"s3://{bucket.name}/x"
    assert storage.etag(location) is None
    storage.write_new(location, "first")
    etag = storage.etag(location)
    storage.write_new(location, "second", etag=etag)
    with pytest.raises(FileExistsError):
        storage.write_new(location, "third", etag=etag)
    assert bucket.client.get_object(Bucket=bucket.name, Key="x")["Body"].read() == b"second"


# ---- the web ----------------------------------------------------------------------------------------------


def test_the_web_is_read_under_any_name(nginx: tuple[str, Path]) -> None:
    address, root = nginx
    for folder in (root / "plain", root / "a folder é"):
        folder.mkdir()
        for size, name in enumerate(ODD_NAMES):
            (folder / name).write_bytes(bytes(size))
        names = [*ODD_NAMES, "none", "nul\0", "half \ud83d"]
        place = storage.join(address, folder.name)
        assert storage.sizes_bytes(place, names) == [*range(len(ODD_NAMES)), None, storage.UNKNOWN, None]
        for size, name in enumerate(ODD_NAMES):
            assert storage.read_bytes(storage.join(place, name)) == bytes(size)
        assert storage.exists(place)  # though the server does not show it
    assert not storage.exists(storage.join(address, "none"))
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(storage.join(address, "none"))
    with pytest.raises(RefusedError, match="403"):
        storage.read_bytes(storage.join(address, "plain", ""))


@pytest.fixture
def rude_server() -> Iterator[tuple[str, list[int]]]:
    """A web server that sends 200 MB whatever part is asked for, packed where that is accepted; and what it sent."""
    num_sent = [0]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            packed = "gzip" in self.headers.get("Accept-Encoding", "")
            piece = gzip.compress(bytes(200_000_000), 1) if packed else bytes(1_000_000)
            self.send_response(200)
            self.send_header("Content-Length", str(len(piece) if packed else 200_000_000))
            if packed:
                self.send_header("Content-Encoding", "gzip")
            self.end_headers()
            with suppress(OSError):
                for _ in range(1 if packed else 200):
                    num_sent[0] += self.wfile.write(piece)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", num_sent
        server.shutdown()


def test_the_beginning_of_a_web_file_is_all_that_is_read(
    rude_server: tuple[str, list[int]], nginx: tuple[str, Path]
) -> None:
    address, num_sent = rude_server
    assert storage.read_bytes(f"{address}/x", end=1_000_001) == bytes(1_000_001)
    assert 1_000_000 <= num_sent[0] < 50_000_000  # unpacked, and no more than what systems and sockets hold
    address, root = nginx
    (root / "start").write_bytes(b"12345")
    assert [storage.read_bytes(f"{address}/start", end=end) for end in (1, 5, 9)] == [b"1", b"12345", b"12345"]
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(f"{address}/none", end=9)


def test_the_web_is_listed_where_its_server_shows_it(nginx: tuple[str, Path]) -> None:
    address, root = nginx
    (root / "listed" / "inner").mkdir(parents=True)
    for name in ("captions_train.json", "captions_val é 1.csv"):
        (root / "listed" / name).touch()
    assert storage.list_files(f"{address}/listed/") == ["captions_train.json", "captions_val é 1.csv"]


def test_a_web_page_links_to_more_than_its_files(monkeypatch: pytest.MonkeyPatch) -> None:
    class Web:
        """As fsspec reads a page: every link that leads below the folder."""

        def ls(self, path: str, *, detail: bool) -> list[dict[str, str]]:
            names = ["a&amp;b.jpg", "./c.jpg", "%20.jpg", "?C=N;O=D", "sub/", "../", "other/page/x.jpg", "#top"]
            return [{"name": path + name, "type": "directory" if name[-1] == "/" else "file"} for name in names]

    monkeypatch.setattr(storage, "_filesystem", lambda location: (Web(), location))
    found = list(storage.scan_folder("http://host/p"))
    assert found == [("a&b.jpg", False), ("c.jpg", False), ("%20.jpg", False), ("sub", True)]


def test_the_web_cannot_be_written(nginx: tuple[str, Path]) -> None:
    with pytest.raises(StorageError, match=f"{nginx[0]}/x"):
        storage.write_atomic(f"{nginx[0]}/x", b"x")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("mood", ["500", "503", "drop", "cut answer"])
def test_requests_to_a_failing_web_server_are_retried_and_no_file_counts_as_missing(
    nginx: tuple[str, Path], mood: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, root = nginx
    (root / "faulty").mkdir(exist_ok=True)
    (root / "faulty" / "a").write_bytes(data := os.urandom(50_000))
    with Proxy(address) as proxy:
        place, answers = f"{proxy.address}/faulty", iter([mood, mood, "ok"] * 9)
        proxy.choose = lambda method, path: next(answers)
        assert storage.sizes_bytes(place, ["a", "b"]) == [len(data), None]
        assert storage.read_bytes(f"{place}/a") == data
        assert storage.exists(f"{place}/a")
        assert not storage.exists(f"{place}/b")
        monkeypatch.setattr(retries, "PATIENCE_SECONDS", 0.0)
        proxy.choose = lambda method, path: mood
        for ask in (storage.exists, storage.read_bytes, storage.size_bytes):
            if mood != "cut answer" or ask is storage.read_bytes:
                with pytest.raises(StorageError):
                    ask(f"{place}/a")


def test_requests_to_a_stalling_web_server_are_retried(
    nginx: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "STALL_SECONDS", 0.5)
    address, root = nginx
    (root / "slow").write_bytes(b"123")
    with Proxy(address) as proxy:
        answers = iter(["stall", "ok", "stall"])
        proxy.choose = lambda method, path: next(answers, "ok")
        assert storage.size_bytes(f"{proxy.address}/slow") == 3
        assert storage.read_bytes(f"{proxy.address}/slow") == b"123"
