"""COCO's downloader against a real HTTP server that cuts, stalls, lies and counts every byte it serves."""

import errno
import io
import json
import os
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import pytest
import warm
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from captioner.errors import UserError
from sharding.download import download, unzip
from sharding.download_coco import DownloadSettings, main

REPO = Path(__file__).parents[2]
PIECE_BYTES = 16_384


@dataclass(kw_only=True)
class Mood:
    """How the server treats one request; the default is a well-behaved server."""

    status: int | None = None
    cut_after: int | None = None
    how: Literal["close", "reset", "stall"] = "close"
    knows_range: bool = True
    length: bool = True
    content_type: str = "application/zip"
    piece_seconds: float = 0.0


@dataclass(kw_only=True)
class Seen:
    """One GET as the server saw it, and the body bytes it sent."""

    path: str
    range: str | None
    status: int = 0
    num_bytes: int = 0


@dataclass
class Site:
    """What the server serves (`files`), how (`moods`, one a request, then `mood`) and what it saw."""

    files: dict[str, bytes] = field(default_factory=dict)
    moods: list[Mood] = field(default_factory=list)
    mood: Mood = field(default_factory=Mood)
    seen: list[Seen] = field(default_factory=list)
    closing: threading.Event = field(default_factory=threading.Event)
    url: str = ""


class Handler(BaseHTTPRequestHandler):
    """HTTP/1.0: the connection ends with the answer, so an early end looks like a short file."""

    site: Site

    def do_GET(self) -> None:
        """Answer with the file, or the rest that the range asks for."""
        site, path = self.site, urlsplit(self.path).path.lstrip("/")
        mood = site.moods.pop(0) if site.moods else site.mood
        seen = Seen(path=path, range=self.headers["Range"])
        site.seen.append(seen)
        if mood.status or path not in site.files:
            seen.status = mood.status or 404
            return self.send_error(seen.status)
        content = site.files[path]
        first = int(seen.range.removeprefix("bytes=").rstrip("-")) if seen.range and mood.knows_range else 0
        if first >= len(content):
            seen.status = 416
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            return self.end_headers()
        seen.status = 206 if first else 200
        self._head(mood, seen.status, content, first)
        return self._body(mood, seen, content[first:])

    def _head(self, mood: Mood, status: int, content: bytes, first: int) -> None:
        self.send_response(status)
        self.send_header("Content-Type", mood.content_type)
        if mood.length:
            self.send_header("Content-Length", str(len(content) - first))
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.end_headers()

    def _body(self, mood: Mood, seen: Seen, body: bytes) -> None:
        body = body[: mood.cut_after]
        for start in range(0, len(body), PIECE_BYTES):
            piece = body[start : start + PIECE_BYTES]
            seen.num_bytes += len(piece)  # before it is sent: the client may end the test as soon as it has it
            try:
                self.connection.sendall(piece)
            except OSError:
                return
            self.site.closing.wait(mood.piece_seconds)
        if mood.cut_after is not None and mood.how == "stall":
            self.site.closing.wait(30)
        elif mood.cut_after is not None and mood.how == "reset":
            time.sleep(0.05)  # a reset throws away what the other side has not read yet
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            socket.close(self.connection.detach())

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the name is http.server's)
        """Keep quiet."""


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A running server, reached directly whatever proxy the machine has."""
    monkeypatch.setenv("no_proxy", "*")
    site = Site()
    handler = type("SiteHandler", (Handler,), {"site": site})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    site.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=partial(server.serve_forever, poll_interval=0.02))
    thread.start()
    yield site
    site.closing.set()
    server.shutdown()
    server.server_close()
    thread.join()


def zip_of(members: dict[str, bytes], *, compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as opened:
        for name, content in members.items():
            opened.writestr(name, content)
    return buffer.getvalue()


def photos(split: str, num_photos: int = 3, num_bytes: int = 30_000) -> dict[str, bytes]:
    """Incompressible stand-ins for JPEG files, each different."""
    return {f"{split}/COCO_{split}_{number:012}.jpg": os.urandom(num_bytes) for number in range(1, num_photos + 1)}


def captions(year: int) -> dict[str, bytes]:
    return {
        f"annotations/captions_{split}{year}.json": json.dumps({"of": f"{split}{year}"}).encode()
        for split in ("train", "val")
    }


def fill(site: Site, year: int = 2014) -> dict[str, bytes]:
    """Put a tiny COCO on the site; returns the files that have to be there in the end."""
    wanted = captions(year)
    unwanted = {"annotations/": b"", f"annotations/instances_train{year}.json": b"{}"}
    site.files[f"annotations/annotations_trainval{year}.zip"] = zip_of(
        {**unwanted, **wanted}, compression=zipfile.ZIP_DEFLATED
    )
    for split in ("train", "val"):
        members = photos(f"{split}{year}")
        site.files[f"zips/{split}{year}.zip"] = zip_of({f"{split}{year}/": b"", **members})
        wanted |= members
    return wanted


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` by its relative name, except completion markers."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith(".done.json")
    }


def settings_for(site: Site, output: Path, **changes: Any) -> DownloadSettings:
    return replace(DownloadSettings(output=output, base_url=site.url), **changes)


def fetch_fast(
    site: Site,
    path: Path,
    *,
    timeout_seconds: float = 5.0,
    num_tries: int = 3,
    backoff_seconds: float = 0.01,
) -> bytes:
    """`download` of the site's only file with waits of a hundredth of a second; returns what arrived."""
    download(
        f"{site.url}/{next(iter(site.files))}",
        path,
        timeout_seconds=timeout_seconds,
        num_tries=num_tries,
        backoff_seconds=backoff_seconds,
    )
    return path.read_bytes()


def command(site: Site, output: Path, *flags: str) -> list[str]:
    script = str(REPO / "sharding" / "download_coco.py")
    return [sys.executable, script, "--output", str(output), "--base-url", site.url, *flags]


def run_command(site: Site, output: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return warm.run(command(site, output, *flags), capture_output=True, text=True, timeout=60)


# The whole command


@pytest.mark.parametrize("year", [2014, 2017])
def test_leaves_the_photos_and_captions_and_no_zip(site: Site, tmp_path: Path, year: int) -> None:
    wanted = fill(site, year)
    main(settings_for(site, tmp_path / "coco", year=year))
    assert tree(tmp_path / "coco") == wanted


def test_a_complete_download_asks_the_server_for_nothing(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = fill(site)
    main(settings_for(site, tmp_path))
    first = len(site.seen)
    capsys.readouterr()
    main(settings_for(site, tmp_path))
    lines = capsys.readouterr().out.splitlines()
    assert len(site.seen) == first == 3
    assert [line for line in lines if "complete, skipped" in line] == lines[:-1]
    assert len(lines) == 4
    assert tree(tmp_path) == wanted


def test_a_deleted_photo_is_noticed_and_fetched_again(site: Site, tmp_path: Path) -> None:
    wanted = fill(site)
    main(settings_for(site, tmp_path))
    next((tmp_path / "val2014").glob("*.jpg")).unlink()
    main(settings_for(site, tmp_path))
    assert [seen.path for seen in site.seen[3:]] == ["zips/val2014.zip"]
    assert tree(tmp_path) == wanted


def test_keep_zips_keeps_them(site: Site, tmp_path: Path) -> None:
    wanted = fill(site)
    main(settings_for(site, tmp_path, keep_zips=True))
    zips = {path.rpartition("/")[2]: content for path, content in site.files.items()}
    assert tree(tmp_path) == wanted | zips


def test_prints_one_line_a_file_when_not_on_a_terminal(site: Site, tmp_path: Path) -> None:
    fill(site)
    done = run_command(site, tmp_path / "coco")
    assert done.returncode == 0
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert len([line for line in lines if "downloaded" in line]) == 3
    assert len([line for line in lines if "unpacked" in line]) == 3
    assert lines[-1] == "next: python sharding/make_shards.py"
    assert len(lines) == 7


def test_kill_in_mid_download_continues_by_range(site: Site, tmp_path: Path) -> None:
    wanted = fill(site)
    members = photos("train2014", num_bytes=400_000)
    wanted = {name: content for name, content in wanted.items() if name[:5] != "train"} | members
    content = site.files["zips/train2014.zip"] = zip_of(members)
    site.moods = [Mood(), Mood(piece_seconds=0.02)]
    part = tmp_path / "train2014.zip.part"
    with subprocess.Popen(command(site, tmp_path), stdout=subprocess.DEVNULL) as process:
        wait_until(lambda: part.exists() and part.stat().st_size > 150_000)
        process.send_signal(signal.SIGKILL)
    have = part.stat().st_size
    assert have < len(content)
    assert run_command(site, tmp_path).returncode == 0
    continued = site.seen[2]
    assert (continued.path, continued.range) == ("zips/train2014.zip", f"bytes={have}-")
    assert (continued.status, continued.num_bytes) == (206, len(content) - have)
    assert tree(tmp_path) == wanted


def wait_until(condition: Any, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("status", [404, 403])
def test_a_wrong_address_is_one_line(site: Site, tmp_path: Path, status: int) -> None:
    fill(site)
    site.mood = Mood(status=status)
    done = run_command(site, tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"{site.url}/annotations/annotations_trainval2014.zip: the server answered {status}" in done.stderr
    assert len(site.seen) == 1


def test_a_damaged_member_is_one_line_and_a_rerun_downloads_again(site: Site, tmp_path: Path) -> None:
    wanted = fill(site)
    good = site.files["zips/val2014.zip"]
    photo = wanted["val2014/COCO_val2014_000000000002.jpg"]
    site.files["zips/val2014.zip"] = good.replace(photo, photo[:-1] + bytes([photo[-1] ^ 1]))
    done = run_command(site, tmp_path, "--splits", "val")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert str(tmp_path / "val2014.zip") in done.stderr
    assert "val2014/COCO_val2014_000000000002.jpg" in done.stderr
    assert not (tmp_path / "val2014.zip").exists()
    assert not (tmp_path / "val2014" / "COCO_val2014_000000000002.jpg").exists()
    site.files["zips/val2014.zip"] = good
    main(settings_for(site, tmp_path))
    assert tree(tmp_path) == wanted


def test_a_file_that_changed_at_the_server_is_noticed_and_a_rerun_downloads_again(site: Site, tmp_path: Path) -> None:
    """Same size, other bytes: the CRCs of its members say that two versions were joined."""
    site.moods = [Mood(), Mood(cut_after=40_000), *[Mood(status=404)]]
    fill(site)
    with pytest.raises(UserError, match="404"):
        main(settings_for(site, tmp_path))
    wanted = fill(site)
    main(settings_for(site, tmp_path, splits=("val",)))
    with pytest.raises(UserError, match=r"train2014\.zip is damaged .*run the same command again"):
        main(settings_for(site, tmp_path))
    main(settings_for(site, tmp_path))
    assert tree(tmp_path) == wanted


def test_help_names_sizes_and_the_next_command() -> None:
    done = subprocess.run(
        [sys.executable, "sharding/download_coco.py", "--help"],
        capture_output=True,
        text=True,
        check=False,
        cwd=REPO,
    )
    assert done.returncode == 0
    for word in ("20 GB", "27 GB", "half an hour", "python sharding/make_shards.py", "--keep-zips"):
        assert word in done.stdout


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_url": "ftp://host"}, "not an http"),
        ({"base_url": "http://bad host"}, "check the address"),
        ({"base_url": "http://a..b"}, "check the address"),
        ({"splits": ()}, "--splits is empty"),
    ],
)
def test_wrong_flags_say_so(site: Site, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(settings_for(site, tmp_path, **changes))


def test_an_output_that_is_a_file_is_a_user_error(site: Site, tmp_path: Path) -> None:
    (tmp_path / "coco").write_text("a file")
    with pytest.raises(UserError, match="cannot read or write"):
        main(settings_for(site, tmp_path / "coco"))


def test_the_proxy_variables_are_honoured(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = fill(site)
    monkeypatch.delenv("no_proxy")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv("http_proxy", site.url)
    main(settings_for(site, tmp_path, base_url="http://coco.invalid"))
    assert tree(tmp_path) == wanted


# One file over HTTP


@pytest.fixture
def content(site: Site) -> bytes:
    """The one file of a site, large enough to come in many pieces."""
    return site.files.setdefault("a.zip", os.urandom(300_000))


@pytest.mark.parametrize(
    ("how", "reason"), [("close", "closed early"), ("reset", "reset by peer"), ("stall", "timed out")]
)
def test_a_lost_connection_continues_by_range(
    site: Site, content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str], *, how: Any, reason: str
) -> None:
    site.moods = [Mood(cut_after=100_000, how=how), Mood(cut_after=50_000, how=how)]
    assert fetch_fast(site, tmp_path / "a.zip", timeout_seconds=0.3) == content
    assert [seen.range for seen in site.seen] == [None, "bytes=100000-", "bytes=150000-"]
    assert sum(seen.num_bytes for seen in site.seen) == len(content)
    assert capsys.readouterr().out.count(reason) == 2


def test_tries_are_bounded_without_progress_only(site: Site, content: bytes, tmp_path: Path) -> None:
    """Ten drops with progress are fine for 3 tries; three answers without a new byte are not."""
    site.moods = [Mood(cut_after=10_000) for _ in range(10)] + [Mood(status=503)] * 3
    with pytest.raises(UserError, match=r"a\.zip: the server answered 503 .*3 times in a row"):
        fetch_fast(site, tmp_path / "a.zip")
    assert len(site.seen) == 13
    assert fetch_fast(site, tmp_path / "a.zip") == content
    assert site.seen[-1].range == "bytes=100000-"


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_busy_server_is_asked_again(site: Site, content: bytes, tmp_path: Path, status: int) -> None:
    site.moods = [Mood(status=status), Mood(status=status)]
    assert fetch_fast(site, tmp_path / "a.zip") == content
    assert len(site.seen) == 3


def test_a_dead_server_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
    with pytest.raises(UserError, match="Connection refused"):
        download(f"http://127.0.0.1:{port}/a.zip", tmp_path / "a.zip", num_tries=2, backoff_seconds=0.01)


def test_a_server_without_ranges_is_started_over(site: Site, content: bytes, tmp_path: Path) -> None:
    site.moods = [Mood(cut_after=100_000)]
    site.mood = Mood(knows_range=False)
    assert fetch_fast(site, tmp_path / "a.zip") == content
    assert [seen.status for seen in site.seen] == [200, 200]


def test_a_file_that_became_shorter_answers_416_and_is_started_over(site: Site, content: bytes, tmp_path: Path) -> None:
    site.moods = [Mood(cut_after=100_000), *[Mood(status=503)] * 3]
    shorter, path = content[:5_000], tmp_path / "a.zip"
    with pytest.raises(UserError):
        fetch_fast(site, path)
    site.files["a.zip"] = shorter
    assert fetch_fast(site, path) == shorter
    assert [seen.status for seen in site.seen[4:]] == [416, 200]


def test_a_full_part_is_asked_for_and_kept(site: Site, content: bytes, tmp_path: Path) -> None:
    """As after a kill between the last byte and the rename."""
    fetch_fast(site, tmp_path / "a.zip")
    (tmp_path / "a.zip").rename(tmp_path / "a.zip.part")
    assert fetch_fast(site, tmp_path / "a.zip") == content
    assert [(seen.status, seen.num_bytes) for seen in site.seen] == [(200, len(content)), (416, 0)]


@pytest.mark.parametrize("mood", [Mood(content_type="text/html"), Mood(length=False)])
def test_a_useless_answer_costs_no_byte_we_have(site: Site, content: bytes, tmp_path: Path, mood: Mood) -> None:
    """A hotel's login page answers 200 to everything."""
    mood.knows_range = False
    site.moods = [Mood(cut_after=100_000), mood]
    with pytest.raises(UserError, match="a web page, or does not say how long"):
        fetch_fast(site, tmp_path / "a.zip")
    assert fetch_fast(site, tmp_path / "a.zip") == content
    assert site.seen[-1].range == "bytes=100000-"


def test_a_disk_that_fills_up_is_a_user_error_and_continues(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = fill(site)

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copyfileobj", fail)
        with pytest.raises(UserError, match="No space left"):
            main(settings_for(site, tmp_path))
    main(settings_for(site, tmp_path))
    assert tree(tmp_path) == wanted
    assert len(site.seen) == 3


# Unpacking


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Where the zip of an unpacking test lies; `output` beside it is made too."""
    (tmp_path / "output").mkdir()
    return tmp_path / "a.zip"


def unpack(archive: Path) -> int:
    return unzip(archive, archive.parent / "output", pattern="train2014/*.jpg")


def test_names_that_leave_the_folder_are_not_unpacked(archive: Path) -> None:
    good = {"train2014/good.jpg": b"good"}
    names = ("/tmp/x.jpg", "../x.jpg", "train2014/../x.jpg", "train2014/../../x.jpg", "..\\x.jpg", "C:x.jpg")
    archive.write_bytes(zip_of(good | dict.fromkeys(names, b"bad")))
    unpack(archive)
    assert tree(archive.parent) == {"a.zip": archive.read_bytes(), "output/train2014/good.jpg": b"good"}


def test_a_link_is_refused(archive: Path) -> None:
    link = zipfile.ZipInfo("train2014/link.jpg")
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr(link, b"/etc/passwd")
    with pytest.raises(UserError, match=r"link\.jpg is a link"):
        unpack(archive)
    assert tree(archive.parent) == {}


def test_unpacking_goes_on_where_it_was_killed(archive: Path) -> None:
    """Two files whole, one cut short, one half under its temporary name, one empty."""
    members = photos("train2014", num_photos=5) | {"train2014/empty.jpg": b""}
    archive.write_bytes(zip_of(members))
    paths = [archive.parent / "output" / name for name in members]
    paths[0].parent.mkdir()
    for path, content in zip(paths[:2], members.values(), strict=False):
        path.write_bytes(content)
    paths[2].write_bytes(members["train2014/COCO_train2014_000000000003.jpg"][:-100])
    paths[4].with_name(f"{paths[4].name}.part").write_bytes(b"half a photo")
    inodes = [path.stat().st_ino for path in paths[:2]]
    assert unpack(archive) == 6
    assert tree(archive.parent / "output") == members
    assert [path.stat().st_ino for path in paths[:2]] == inodes


def test_a_zip_of_something_else_is_refused(archive: Path) -> None:
    archive.write_bytes(zip_of(photos("val2014")))
    with pytest.raises(UserError, match=r"it holds no train2014/\*\.jpg"):
        unpack(archive)


ZIP_TO_DAMAGE = zip_of(
    {"train2014/1.jpg": b"one" * 30, "train2014/2.jpg": b"two" * 30}, compression=zipfile.ZIP_DEFLATED
)


@hypothesis_settings(max_examples=150, deadline=None)
@given(
    position=st.integers(0, len(ZIP_TO_DAMAGE) - 1),
    mask=st.integers(1, 255),
    length=st.integers(0, len(ZIP_TO_DAMAGE)) | st.just(len(ZIP_TO_DAMAGE)),
)
@example(position=len(ZIP_TO_DAMAGE) - 5, mask=1, length=len(ZIP_TO_DAMAGE))  # a seek to before the start
def test_damage_never_leaves_wrong_bytes_under_a_right_name(
    tmp_path_factory: pytest.TempPathFactory, position: int, mask: int, length: int
) -> None:
    """Any changed byte and any lost end: a `UserError` or the right files, never another exception."""
    folder = tmp_path_factory.mktemp("damage")
    damaged = bytearray(ZIP_TO_DAMAGE[:length])
    if position < length:
        damaged[position] ^= mask
    (folder / "a.zip").write_bytes(damaged)
    (folder / "output").mkdir()
    try:
        unpack(folder / "a.zip")
    except UserError:
        assert not (folder / "a.zip").exists()
    right = {"train2014/1.jpg": b"one" * 30, "train2014/2.jpg": b"two" * 30}
    for name, content in tree(folder / "output").items():
        assert name.endswith(".part") or right[name] == content
    shutil.rmtree(folder)
