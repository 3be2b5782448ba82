"""The cache of remote shards: whole shards within the limit, whatever servers, disks and processes do."""

import hashlib
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from servers import Bucket, Proxy, _Handler, use_s3
from streaming_data import make_loader, run_epochs, write_split

from captioner.errors import UserError
from captioner.files import retries, storage
from captioner.samples import build_index
from captioner.shards import format as shards
from captioner.shards.format import ShardEntry, TarBuilder
from captioner.streaming import cache as cache_module
from captioner.streaming.cache import (
    CacheFolderError,
    CacheTooSmallError,
    DamagedShardError,
    MissingShardError,
    Prefetcher,
    ShardCache,
)

CHUNK = 16_384
ROOT = Path(__file__).resolve().parents[2]


def make_shard(folder: Path, number: int, *, kilobytes: int = 100, seed: int | None = None) -> ShardEntry:
    """Write `train-NUMBER.tar` of one sample, random bytes, and its index into a folder."""
    picture = random.Random(number if seed is None else seed).randbytes(1024 * kilobytes - 10_240)
    tar = TarBuilder()
    members = {"jpg": tar.add("train-0.jpg", picture), "json": tar.add("train-0.json", b"{}")}
    data = tar.to_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    facts = {"sha256": sha256, "bytes": len(data), "fingerprint": f"{number}"}
    index = build_index(["train-0"], [members], [[["a", "cat"]]], facts)
    name = f"train-{number:06d}"
    folder.mkdir(exist_ok=True, parents=True)
    (folder / f"{name}.tar").write_bytes(data)
    (folder / f"{name}.index").write_bytes(index.to_bytes())
    return ShardEntry(
        name=name, samples=1, captions=1, failures=0, bytes=len(data), sha256=sha256, fingerprint=f"{number}"
    )


def num_bytes(folder: Path, *entries: ShardEntry) -> int:
    """What shards take, with their indexes."""
    return sum(entry.bytes + (folder / f"{entry.name}.index").stat().st_size for entry in entries)


class Watcher(Proxy):
    """A proxy that also keeps what was asked, and knows "flip" (one bit of the answer) and "whole" (no ranges)."""

    def __init__(self, upstream: str) -> None:
        super().__init__(upstream)
        self.asked: list[tuple[str, str, str | None]] = []
        self._server.RequestHandlerClass = type("Handler", (_NotingHandler,), {"proxy": self, "watcher": self})

    def parts(self, entry: ShardEntry) -> list[str | None]:
        """The ranges asked of a shard's tar."""
        return [span for method, name, span in self.asked if (method, name) == ("GET", f"{entry.name}.tar")]


class _NotingHandler(_Handler):
    watcher: Watcher
    mood = ""

    def _note(self) -> None:
        self.watcher.asked.append((self.command, self.path.rpartition("/")[2], self.headers.get("Range")))
        self._treat()

    def _forward(self, mood: str, body: bytes) -> None:
        self.mood = mood
        if mood == "whole":
            del self.headers["Range"]
        super()._forward(mood, body)

    def _send(self, status: int, headers: dict[str, str], content: bytes) -> None:
        if content and self.mood == "flip":
            content = content[:-1] + bytes([content[-1] ^ 1])
        super()._send(status, headers, content)

    do_GET = do_HEAD = _note


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "CHUNK_BYTES", CHUNK)
    monkeypatch.setattr(cache_module, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(cache_module, "RETRY_SECONDS", 0.02)
    monkeypatch.setattr(retries, "FIRST_PAUSE_SECONDS", 0.001)


@pytest.fixture
def web(nginx: tuple[str, Path], request: pytest.FixtureRequest) -> Iterator[tuple[Watcher, str, Path]]:
    """A proxy before nginx, the address of an empty folder through it, and that folder."""
    address, root = nginx
    name = hashlib.sha256(request.node.name.encode()).hexdigest()[:16]
    (root / name).mkdir()
    watcher = Watcher(address)
    with watcher:
        yield watcher, f"{watcher.address}/{name}", root / name


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def read(cache: ShardCache, folder: str, entry: ShardEntry) -> bytes:
    """A shard's tar, opened and closed again."""
    index, file = cache.open(folder, entry)
    try:
        assert [index.key(place) for place in range(len(index))] == ["train-0"]
        return os.pread(file, entry.bytes + 1, 0)
    finally:
        os.close(file)


def is_right(cache: ShardCache, folder: str, entry: ShardEntry) -> bool:
    return hashlib.sha256(read(cache, folder, entry)).hexdigest() == entry.sha256


def kept(home: Path, *entries: ShardEntry) -> list[bool]:
    """Whether each shard is whole in the cache."""
    return [(home / f"{entry.sha256}.tar").exists() for entry in entries]


def wait_until(condition: Callable[[], bool], *, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


class Forked:
    """A process that runs `action` as a worker of a data loader would, forked from this one."""

    def __init__(self, action: Callable[..., Any], *args: Any) -> None:
        context = multiprocessing.get_context("fork")
        self._receiver, sender = context.Pipe(duplex=False)
        self.process = context.Process(target=self._run, args=(sender, action, *args), daemon=True)
        self.process.start()
        sender.close()

    @staticmethod
    def _run(sender: Connection, action: Callable[..., Any], *args: Any) -> None:
        try:
            sender.send(action(*args))
        except BaseException as error:
            sender.send(f"{type(error).__name__}: {error}")

    def result(self, *, seconds: float = 20.0) -> Any:
        """What `action` gave, or its error as text."""
        assert self._receiver.poll(seconds), "the process hangs"
        found = self._receiver.recv()
        self.process.join(seconds)
        return found

    def kill(self) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.join(10)


# ---- hits and misses --------------------------------------------------------------------------------------


def test_a_shard_is_fetched_once_and_then_read_from_the_disk(web: tuple[Watcher, str, Path], home: Path) -> None:
    watcher, folder, root = web
    entry = make_shard(root, 1)
    cache = pickle.loads(pickle.dumps(ShardCache(str(home), max_bytes=10**6)))
    assert not kept(home, entry)[0]
    assert is_right(cache, folder, entry)
    asked = list(watcher.asked)
    assert is_right(cache, folder, entry)
    assert cache.fetch(folder, entry)
    assert watcher.asked == asked
    assert len(watcher.parts(entry)) == -(-entry.bytes // CHUNK)
    assert sorted(path.name for path in home.iterdir()) == [f"{entry.sha256}.index", f"{entry.sha256}.tar", "lock"]


def test_shards_come_from_s3(bucket: Bucket, s3: str, home: Path, tmp_path: Path) -> None:
    """Through a server that fails, stays silent, and cuts and changes its answers."""
    entries = [make_shard(tmp_path / "shards", number) for number in range(3)]
    bucket.put_folder(tmp_path / "shards", "shards")
    with Watcher(s3) as watcher, use_s3(watcher.address):
        moods = iter(["ok", "503", "drop", "cut answer", "ok", "flip", "500", "ok", "ok", "drop", "flip"])
        watcher.choose = lambda method, path: next(moods, "ok")
        cache = ShardCache(str(home), max_bytes=10**6)
        for entry in entries:
            assert is_right(cache, f"s3://{bucket.name}/shards", entry)
        assert next(moods, None) is None
        with pytest.raises(MissingShardError, match="there is no s3://"):
            cache.open(f"s3://{bucket.name}/none", make_shard(tmp_path / "other", 9))


def test_shards_of_one_name_in_two_folders_are_two(web: tuple[Watcher, str, Path], home: Path) -> None:
    _, folder, root = web
    entries = [make_shard(root / name, 1, seed=seed) for seed, name in enumerate(("a", "b"))]
    cache = ShardCache(str(home), max_bytes=10**6)
    for _ in range(2):
        for name, entry in zip(("a", "b"), entries, strict=True):
            assert is_right(cache, f"{folder}/{name}", entry)
    assert kept(home, *entries) == [True, True]


def test_two_indexes_of_one_tar_can_be_read_at_once(web: tuple[Watcher, str, Path], home: Path) -> None:
    """As of two people who have indexed the same tars in different ways."""
    watcher, folder, root = web
    entries = [make_shard(root / f"{number}", number, seed=1) for number in range(2)]
    assert entries[0].sha256 == entries[1].sha256
    cache = ShardCache(str(home), max_bytes=10**6)
    files = []
    for number in (0, 1, 0, 1):
        index, file = cache.open(f"{folder}/{number}", entries[number])
        assert index.facts["fingerprint"] == f"{number}"
        files.append(file)
    assert len(watcher.parts(entries[0])) == -(-entries[0].bytes // CHUNK)
    assert watcher.parts(entries[1]) == []
    for file in files:
        os.close(file)


# ---- many processes ---------------------------------------------------------------------------------------


def test_processes_download_a_shard_once_together(web: tuple[Watcher, str, Path], home: Path) -> None:
    watcher, folder, root = web
    entries = [make_shard(root, number) for number in range(4)]
    cache = ShardCache(str(home), max_bytes=10**6)
    barrier = multiprocessing.get_context("fork").Barrier(4)

    def work(seed: int) -> bool:
        barrier.wait(10)
        return all(is_right(cache, folder, entry) for entry in random.Random(seed // 2).sample(entries, 4))

    workers = [Forked(work, seed) for seed in range(4)]
    assert [worker.result() for worker in workers] == [True] * 4
    assert max(Counter(watcher.asked).values()) == 1
    assert sum(len(watcher.parts(entry)) for entry in entries) == sum(-(-entry.bytes // CHUNK) for entry in entries)


def test_the_limit_holds_at_every_moment(web: tuple[Watcher, str, Path], home: Path) -> None:
    """While processes read at random, with prefetchers, and are killed and replaced."""
    _, folder, root = web
    entries = [make_shard(root, number, kilobytes=60 + 20 * (number % 5)) for number in range(10)]
    limit = num_bytes(root, *entries) // 2
    cache = ShardCache(str(home), max_bytes=limit)
    home.mkdir()
    seen, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            sizes: dict[tuple[str, bool], int] = {}
            for name in os.listdir(home):  # noqa: PTH208
                sha256, _, suffix = name.partition(".")
                with suppress(FileNotFoundError):
                    size = (home / name).stat().st_size if suffix else 0
                    key = (sha256, suffix == "index")  # a partial file becomes a tar while they are listed
                    sizes[key] = max(size, sizes.get(key, 0))
            seen.append(sum(sizes.values()))

    def work(seed: int) -> bool:
        order = random.Random(seed).choices(entries, k=30)
        prefetcher = Prefetcher(cache, [(folder, entry) for entry in order], ahead=2)
        right = []
        for entry in order:
            right.append(is_right(cache, folder, entry))
            prefetcher.opened(entry)
        prefetcher.close()
        return all(right)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        workers = [Forked(work, seed) for seed in range(4)]
        for victim in workers[:2]:
            time.sleep(0.2)
            victim.kill()
        workers += [Forked(work, seed) for seed in (4, 5)]
        assert [worker.result(seconds=40) for worker in workers[2:]] == [True] * 4
    finally:
        done.set()
        watcher.join()
    assert limit * 0.7 < max(seen) <= limit


def test_the_folder_is_looked_through_only_when_it_may_be_full(
    web: tuple[Watcher, str, Path], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then room is made for some more shards at once, the least recently used going first."""
    _, folder, root = web
    entries = [make_shard(root, number, kilobytes=20) for number in range(60)]
    cache = ShardCache(str(home), max_bytes=num_bytes(root, *entries[:40]))
    scans, scan = [], ShardCache._scan
    monkeypatch.setattr(ShardCache, "_scan", lambda cache: scans.append(1) or scan(cache))
    for entry in entries[:40]:
        assert is_right(cache, folder, entry)
    assert len(scans) == 1  # of an empty folder
    for entry in entries[40:]:
        assert is_right(cache, folder, entry)
        found = sum(path.stat().st_size for path in home.glob("*.*"))
        assert cache.max_bytes * 0.9 < found <= cache.max_bytes
    assert len(scans) <= 15  # of 20 shards, and 20 indexes
    assert kept(home, *entries) == sorted(kept(home, *entries))


@pytest.mark.parametrize("left", [b"", b"12 apples", b"999999999999"])
def test_whatever_the_lock_file_says_the_limit_holds(web: tuple[Watcher, str, Path], home: Path, left: bytes) -> None:
    """As after files were deleted by hand."""
    _, folder, root = web
    entries = [make_shard(root, number) for number in range(4)]
    cache = ShardCache(str(home), max_bytes=num_bytes(root, *entries[:3]))
    for entry in entries[:3]:
        assert is_right(cache, folder, entry)
    (home / "lock").write_bytes(left)
    assert is_right(cache, folder, entries[3])
    assert kept(home, *entries) == [False, True, True, True]


def test_a_killed_download_leaves_nothing_and_a_process_that_waits_for_it_downloads_the_shard(
    web: tuple[Watcher, str, Path], home: Path
) -> None:
    watcher, folder, root = web
    entry = make_shard(root, 1)
    cache = ShardCache(str(home), max_bytes=num_bytes(root, entry))
    stalled = threading.Event()

    def choose(method: str, path: str) -> str:
        if len(watcher.parts(entry)) == 4 and not stalled.is_set():
            stalled.set()
            return "stall"
        return "ok"

    watcher.choose = choose
    first = Forked(is_right, cache, folder, entry)
    assert stalled.wait(10)
    second = Forked(is_right, cache, folder, entry)
    time.sleep(0.2)
    assert len(watcher.parts(entry)) == 4
    assert not kept(home, entry)[0]
    first.kill()
    assert second.result() is True
    assert len(watcher.parts(entry)) == 4 + -(-entry.bytes // CHUNK)
    assert not list(home.glob("*.partial"))


def test_a_lock_does_not_stay_with_a_process_forked_meanwhile(home: Path) -> None:
    cache = ShardCache(str(home), max_bytes=1)
    with cache._locked():
        child = Forked(time.sleep, 30)
    taken = threading.Event()

    def take() -> None:
        with cache._locked():
            taken.set()

    threading.Thread(target=take, daemon=True).start()
    assert taken.wait(5)
    child.kill()


# ---- room -------------------------------------------------------------------------------------------------


def test_the_least_recently_used_makes_room(web: tuple[Watcher, str, Path], home: Path) -> None:
    _, folder, root = web
    a, b, c, d, e = entries = [make_shard(root, number) for number in range(5)]
    cache = ShardCache(str(home), max_bytes=num_bytes(root, a, b, c))
    for entry in (a, b, c, a, d):
        assert is_right(cache, folder, entry)
    assert kept(home, *entries) == [True, False, True, True, False]
    assert not (home / f"{b.sha256}.index").exists()
    assert cache.fetch(folder, e)
    assert kept(home, *entries) == [True, False, False, True, True]


def test_open_shards_stay(web: tuple[Watcher, str, Path], home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "MINUTE_POLLS", 10)
    _, folder, root = web
    a, b, c, d = entries = [make_shard(root, number) for number in range(4)]
    cache = ShardCache(str(home), max_bytes=num_bytes(root, a, b) + 100)
    _, file = cache.open(folder, a)
    for entry in (b, c, d):
        assert is_right(cache, folder, entry)
    assert kept(home, *entries) == [True, False, False, True]
    _, other = cache.open(folder, d)
    assert not cache.fetch(folder, b)
    with pytest.raises(CacheTooSmallError, match="too small for the shards that are read at once"):
        cache.open(folder, b)
    assert kept(home, *entries) == [True, False, False, True]
    os.close(file)
    assert is_right(cache, folder, b)
    assert hashlib.sha256(os.pread(other, d.bytes, 0)).hexdigest() == d.sha256
    os.close(other)


def test_a_reader_waits_for_another_to_close(web: tuple[Watcher, str, Path], home: Path) -> None:
    _, folder, root = web
    a, b = make_shard(root, 0), make_shard(root, 1)
    cache = ShardCache(str(home), max_bytes=num_bytes(root, a) + 100)
    _, file = cache.open(folder, a)
    threading.Timer(0.3, os.close, [file]).start()
    assert is_right(cache, folder, b)


def test_readers_that_wait_for_each_other_end_in_one_line(
    web: tuple[Watcher, str, Path], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "MINUTE_POLLS", 30)
    _, folder, root = web
    entries = [make_shard(root, number) for number in range(4)]
    cache = ShardCache(str(home), max_bytes=num_bytes(root, *entries[:2]) + 100)
    barrier = multiprocessing.get_context("fork").Barrier(2)

    def work(mine: ShardEntry, then: ShardEntry) -> None:
        cache.open(folder, mine)
        barrier.wait(10)
        cache.open(folder, then)

    workers = [Forked(work, *entries[:2][::step]) for step in (1, -1)]
    assert [worker.result() for worker in workers] == [None, None]  # each has what the other wants
    workers = [Forked(work, entries[place], entries[place + 2]) for place in (0, 1)]
    found = [text for worker in workers if (text := worker.result()) is not None]
    assert found
    assert all("too small" in text for text in found)


def test_an_index_without_room_is_read_from_the_server(web: tuple[Watcher, str, Path], home: Path) -> None:
    watcher, folder, root = web
    entry = make_shard(root, 1)
    cache = ShardCache(str(home), max_bytes=entry.bytes + 100)
    for _ in range(2):
        assert is_right(cache, folder, entry)
    assert len(watcher.parts(entry)) == -(-entry.bytes // CHUNK)
    assert sum(path.stat().st_size for path in home.glob("*.*")) == entry.bytes


def test_a_shard_larger_than_the_cache_is_refused_at_once(web: tuple[Watcher, str, Path], home: Path) -> None:
    watcher, folder, root = web
    entry = make_shard(root, 1)
    started = time.monotonic()
    with pytest.raises(CacheTooSmallError) as caught:
        ShardCache(str(home), max_bytes=entry.bytes - 1).open(folder, entry)
    assert (caught.value.folder, caught.value.max_bytes) == (str(home), entry.bytes - 1)
    assert time.monotonic() - started < 2
    assert watcher.asked == []
    assert [path.name for path in home.iterdir()] == ["lock"]


def test_what_killed_processes_left_is_evicted_and_other_files_are_not(
    web: tuple[Watcher, str, Path], home: Path
) -> None:
    _, folder, root = web
    entry = make_shard(root, 1)
    home.mkdir()
    (home / f"{'a' * 64}.partial").write_bytes(bytes(10**6))
    (home / f"{'b' * 64}.index").write_bytes(bytes(10_000))
    (home / "photo.tar").write_bytes(bytes(10**6))
    cache = ShardCache(str(home), max_bytes=num_bytes(root, entry) + 100)
    assert is_right(cache, folder, entry)
    assert {path.name for path in home.iterdir()} == {
        *(f"{entry.sha256}.{suffix}" for suffix in ("tar", "index")),
        *("lock", "photo.tar"),
    }


# ---- servers that fail ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mood", ["500", "503", "429", "drop", "cut answer", "stall", "flip"])
def test_a_server_that_fails_every_third_time(
    web: tuple[Watcher, str, Path], home: Path, monkeypatch: pytest.MonkeyPatch, mood: str
) -> None:
    """A flipped bit costs a whole download, and a stall its time, so there are few of them."""
    monkeypatch.setattr(storage, "STALL_SECONDS", 0.2)
    watcher, folder, root = web
    entry = make_shard(root, 1)
    count = iter(range(10**6))
    times = {"flip": 9, "stall": 9}.get(mood, 10**6)
    watcher.choose = lambda method, path: mood if (number := next(count)) % 3 == 1 and number < times else "ok"
    assert is_right(ShardCache(str(home), max_bytes=10**6), folder, entry)
    assert watcher.treated.count(mood) >= 2


def test_a_server_that_knows_no_ranges_sends_a_shard_once(web: tuple[Watcher, str, Path], home: Path) -> None:
    watcher, folder, root = web
    entry = make_shard(root, 1)
    watcher.choose = lambda method, path: "whole"
    assert is_right(ShardCache(str(home), max_bytes=10**6), folder, entry)
    assert len(watcher.parts(entry)) == 1


def test_a_server_that_is_gone_for_good_ends_in_one_line(
    web: tuple[Watcher, str, Path], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "PATIENCE_SECONDS", 0.5)
    watcher, folder, root = web
    entry = make_shard(root, 1)
    watcher.choose = lambda method, path: "503" if len(watcher.parts(entry)) > 3 else "ok"
    cache = ShardCache(str(home), max_bytes=10**6)
    with pytest.raises(UserError, match=f"{folder}/{entry.name}.tar.*503.*run again") as caught:
        cache.open(folder, entry)
    assert "\n" not in str(caught.value)
    assert len(watcher.asked) > 8
    assert not list(home.glob("*.partial"))
    watcher.choose = lambda method, path: "ok"
    assert is_right(cache, folder, entry)


@pytest.mark.parametrize("suffix", ["tar", "index"])
@pytest.mark.parametrize(("status", "kind"), [("404", MissingShardError), ("403", UserError)])
def test_a_refusal_ends_at_once(
    web: tuple[Watcher, str, Path], home: Path, status: str, kind: type[Exception], suffix: str
) -> None:
    watcher, folder, root = web
    entry = make_shard(root, 1)
    watcher.choose = lambda method, path: status if path.endswith(suffix) else "ok"
    with pytest.raises(kind, match=rf"{folder}/{entry.name}\.{suffix}") as caught:
        ShardCache(str(home), max_bytes=10**6).open(folder, entry)
    assert type(caught.value) is kind
    assert len(watcher.asked) <= 3
    assert not list(home.glob("*.partial"))


# ---- stores that are not what their manifest says ---------------------------------------------------------


def test_a_shard_that_differs_from_its_manifest_is_fetched_three_times_and_refused(
    web: tuple[Watcher, str, Path], home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    watcher, folder, root = web
    entry = make_shard(root, 1)
    path = root / f"{entry.name}.tar"
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    cache = ShardCache(str(home), max_bytes=10**6)
    with pytest.raises(
        DamagedShardError, match=rf"{entry.name}\.tar has another sha256 than its manifest says: restore the file"
    ):
        cache.open(folder, entry)
    assert watcher.parts(entry).count("bytes=0-16383") == 3
    assert caplog.text.count(f"{entry.name}.tar has another sha256") == 3
    path.write_bytes(data[:-1])
    with pytest.raises(DamagedShardError, match="bytes, its manifest says"):
        cache.open(folder, entry)
    assert not list(home.glob("*.tar"))
    assert not list(home.glob("*.partial"))
    make_shard(root, 1)
    assert is_right(cache, folder, entry)


def test_an_index_of_another_shard_or_damaged_is_refused(web: tuple[Watcher, str, Path], home: Path) -> None:
    watcher, folder, root = web
    entry, other = make_shard(root, 1), make_shard(root, 2)
    path = root / f"{entry.name}.index"
    whole = path.read_bytes()
    for content, reason in (
        ((root / f"{other.name}.index").read_bytes(), "another shard"),
        (whole[:-1] + b"x", "damaged"),
        (whole[:100], "not a readable shard index"),
    ):
        path.write_bytes(content)
        with pytest.raises(DamagedShardError, match=rf"{folder}/{entry.name}\.index is .*{reason}"):
            ShardCache(str(home), max_bytes=10**6).open(folder, entry)
    assert watcher.parts(entry) == []
    assert [path.name for path in home.iterdir()] == ["lock"]


def test_a_manifest_without_a_checksum_names_no_file(home: Path, tmp_path: Path) -> None:
    entry = ShardEntry(
        name="x", samples=1, captions=1, failures=0, bytes=1, sha256=f"../{tmp_path.name}", fingerprint=""
    )
    with pytest.raises(UserError, match="no sha256"):
        ShardCache(str(home), max_bytes=10).open("memory://x", entry)


# ---- disks that fail --------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["tar", "index"])
@pytest.mark.parametrize("harm", ["cut", "changed", "deleted"])
def test_what_was_harmed_in_the_cache_is_fetched_again(
    web: tuple[Watcher, str, Path], home: Path, suffix: str, harm: str
) -> None:
    """A changed tar is found by the checksum of the sample that is read."""
    _, folder, root = web
    entry = make_shard(root, 1)
    cache = ShardCache(str(home), max_bytes=num_bytes(root, entry))
    assert is_right(cache, folder, entry)
    path = home / f"{entry.sha256}.{suffix}"
    if harm == "deleted":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] + (b"" if harm == "cut" else b"x"))
    assert is_right(cache, folder, entry) is ((suffix, harm) != ("tar", "changed"))


def test_an_index_that_an_older_version_left_is_fetched_again(
    web: tuple[Watcher, str, Path], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder, root = web
    entry = make_shard(root, 1)
    cache = ShardCache(str(home), max_bytes=10**6)
    assert is_right(cache, folder, entry)
    monkeypatch.setattr(shards, "FORMAT_VERSION", shards.FORMAT_VERSION + 1)
    assert make_shard(root, 1) == entry
    assert is_right(cache, folder, entry)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", folder], check=False).returncode
    ):
        pytest.skip("needs the right to mount a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk_leaves_no_half_file(web: tuple[Watcher, str, Path], disk: Path) -> None:
    _, folder, root = web
    a, b, c = (make_shard(root, number) for number in range(3))
    home = disk / "cache"
    cache = ShardCache(str(home), max_bytes=10**7)
    for entry in (a, b):
        assert is_right(cache, folder, entry)
    with pytest.raises(CacheFolderError, match=rf"cannot keep shards in {home} \(No space left") as caught:
        cache.open(folder, c)
    assert "\n" not in str(caught.value)
    assert kept(home, a, b, c) == [True, True, False]
    assert not list(home.glob("*.partial"))
    assert is_right(cache, folder, a)
    subprocess.run(["mount", "-o", "remount,size=9m", disk], check=True)
    assert is_right(cache, folder, c)


def test_a_read_only_disk_and_a_folder_that_is_a_file(web: tuple[Watcher, str, Path], disk: Path) -> None:
    _, folder, root = web
    entry = make_shard(root, 1)
    (disk / "file").touch()
    with pytest.raises(CacheFolderError, match=f"cannot keep shards in {disk}/file"):
        ShardCache(f"{disk}/file", max_bytes=10**6).open(folder, entry)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with pytest.raises(CacheFolderError, match=rf"cannot keep shards in {disk}/cache \(Read-only"):
        ShardCache(f"{disk}/cache", max_bytes=10**6).open(folder, entry)


# ---- ahead of the reader ----------------------------------------------------------------------------------


@contextmanager
def prefetching(cache: ShardCache, shards: Any, *, ahead: int) -> Iterator[Prefetcher]:
    prefetcher = Prefetcher(cache, shards, ahead=ahead)
    try:
        yield prefetcher
    finally:
        prefetcher.close()
        for thread in prefetcher.threads:
            thread.join(10)
            assert not thread.is_alive()


def test_next_shards_come_while_the_reader_sleeps_and_no_more_than_wanted(
    web: tuple[Watcher, str, Path], home: Path
) -> None:
    watcher, folder, root = web
    entries = [make_shard(root, number) for number in range(6)]
    cache = ShardCache(str(home), max_bytes=10**7)
    taken = []

    def planned() -> Iterator[tuple[str, ShardEntry]]:
        for entry in entries:
            taken.append(entry)
            yield folder, entry

    with prefetching(cache, planned(), ahead=2) as prefetcher:
        for number, entry in enumerate(entries):
            expected = [place < number + 2 for place in range(6)]
            wait_until(lambda expected=expected: kept(home, *entries) == expected)
            time.sleep(0.05)
            assert kept(home, *entries) == expected
            assert taken == entries[: number + 2]
            asked = len(watcher.asked)
            assert is_right(cache, folder, entry)
            assert len(watcher.asked) == asked
            prefetcher.opened(entry)
    assert max(Counter(watcher.asked).values()) == 1


def test_a_prefetcher_evicts_nothing_that_its_reader_has_not_opened(web: tuple[Watcher, str, Path], home: Path) -> None:
    """The reader does: what it opens now comes first."""
    watcher, folder, root = web
    entries = [make_shard(root, number) for number in range(6)]
    cache = ShardCache(str(home), max_bytes=num_bytes(root, *entries[:2]) + 100)
    with prefetching(cache, ((folder, entry) for entry in entries), ahead=5) as prefetcher:
        wait_until(lambda: sum(kept(home, *entries)) == 2)
        time.sleep(0.2)
        assert sum(bool(watcher.parts(entry)) for entry in entries) == 2
        for entry in reversed(entries):
            assert is_right(cache, folder, entry)
            prefetcher.opened(entry)


def test_what_goes_wrong_ahead_is_met_by_the_reader(web: tuple[Watcher, str, Path], home: Path) -> None:
    _, folder, root = web
    entries = [make_shard(root, number) for number in range(4)]
    (root / f"{entries[1].name}.tar").unlink()
    cache = ShardCache(str(home), max_bytes=10**7)
    with prefetching(cache, ((folder, entry) for entry in entries), ahead=3):
        wait_until(lambda: kept(home, *entries) == [True, False, True, True])
        with pytest.raises(MissingShardError, match=f"there is no {folder}/{entries[1].name}.tar"):
            cache.open(folder, entries[1])


def test_a_closed_prefetcher_stops_in_the_middle_of_a_shard(web: tuple[Watcher, str, Path], home: Path) -> None:
    watcher, folder, root = web
    entry = make_shard(root, 1)
    going = threading.Event()

    def choose(method: str, path: str) -> str:
        if len(watcher.parts(entry)) == 3:
            going.set()
            time.sleep(0.1)
        return "ok"

    watcher.choose = choose
    cache = ShardCache(str(home), max_bytes=10**7)
    with prefetching(cache, [(folder, entry)], ahead=1):
        assert going.wait(10)
    assert len(watcher.parts(entry)) == 3
    assert [path.suffix for path in home.glob("*.*")] == [".index"]


def test_a_prefetcher_skips_what_the_reader_has_opened(web: tuple[Watcher, str, Path], home: Path) -> None:
    watcher, folder, root = web
    entries = [make_shard(root, number) for number in range(3)]
    opened = threading.Event()

    def planned() -> Iterator[tuple[str, ShardEntry]]:
        opened.wait(10)
        yield from ((folder, entry) for entry in entries)

    with prefetching(ShardCache(str(home), max_bytes=10**7), planned(), ahead=2) as prefetcher:
        prefetcher._opened.add(entries[0].sha256)
        opened.set()
        wait_until(lambda: kept(home, *entries) == [False, True, True])
    assert watcher.parts(entries[0]) == []


def test_shards_on_a_disk_are_not_copied_into_the_cache(web: tuple[Watcher, str, Path], home: Path) -> None:
    _, folder, root = web
    local = write_split(home.parent / "local", [5, 4])
    write_split(root, [3, 6])
    loader = make_loader([folder, local], cache=home, batch_size=6)
    assert sum(map(len, run_epochs(loader, 1))) == 18
    loader.close()
    wait_until(lambda: not list(home.glob("*.partial")))
    assert kept(home, *(entry for _, entry in loader.split.shards)) == [True, True, False, False]
