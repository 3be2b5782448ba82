"""A watched folder: each file once, none while it grows, and a clean end."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import picture
from trainer import Running, start

from captioner.errors import UserError
from infer import watching
from infer.listing import ImageFile
from infer.results import to_line
from infer.row_index import RowIndex
from infer.settings import CaptionSettings
from infer.watching import STILL_SECONDS, Arrivals, check_watch, is_unfinished, not_growing

OLD = time.time() - 3600


class Disk:
    """Files with sizes, a clock, and what `Arrivals` asks of them."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, *, done: tuple[str, ...] = ()) -> None:
        self.sizes: dict[str, int] = {}
        self.now = 1000.0
        self.is_there = True
        rows: list[Any] = [{"root": "photos", "path": path, "format_version": 2, "error": "empty"} for path in done]
        (folder / "c.jsonl").write_text("".join(map(to_line, rows)))
        patch.setattr(watching, "_stamp", lambda file: (self.sizes[file.path], 0) if file.path in self.sizes else None)
        self.index = RowIndex(folder / "c.jsonl")
        self.arrivals = Arrivals(self.files, self.index, clock=lambda: self.now)

    def files(self) -> list[ImageFile]:
        if not self.is_there:
            raise UserError("the disk is gone")
        return [ImageFile("photos", path) for path in self.sizes]

    def poll(self, *, after: float = 0.0) -> list[str]:
        self.now += after
        return [file.path for file in self.arrivals.poll()]


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(tmp_path, monkeypatch, done=("old.jpg",))


def test_a_file_is_found_once_when_it_has_stopped_growing(disk: Disk) -> None:
    disk.sizes = {"old.jpg": 5, "a.jpg": 1}
    assert disk.poll() == []
    disk.sizes["a.jpg"] = 2
    assert disk.poll(after=STILL_SECONDS) == []
    assert disk.poll(after=STILL_SECONDS - 0.1) == []
    assert disk.poll(after=0.1) == ["a.jpg"]
    assert disk.poll(after=99) == []
    disk.sizes |= {"a.jpg": 3, "old.jpg": 6}  # replaced
    assert disk.poll() == []
    assert disk.poll(after=STILL_SECONDS) == ["old.jpg", "a.jpg"]
    del disk.sizes["a.jpg"]
    assert disk.poll(after=99) == []
    disk.sizes["a.jpg"] = 3  # as it was
    assert [disk.poll(after=99) for _ in range(2)] == [[], []]


def test_a_disk_that_is_gone_for_a_while_is_waited_for(disk: Disk) -> None:
    disk.sizes = {"a.jpg": 1}
    disk.poll()
    disk.is_there = False
    assert disk.poll(after=STILL_SECONDS) == []
    assert disk.arrivals.error == "the disk is gone"
    disk.is_there = True
    assert disk.poll() == ["a.jpg"]
    assert disk.arrivals.error == ""


def test_many_arrivals_come_in_parts(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "MAX_ARRIVALS", 3)
    disk.sizes = {f"{number}.jpg": 1 for number in range(8)}
    disk.poll()
    assert [len(disk.poll(after=STILL_SECONDS))] + [len(disk.poll()) for _ in range(3)] == [3, 3, 2, 0]


STEPS = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(1, 4), st.sampled_from([0.0, 1.0, STILL_SECONDS, 60.0])), max_size=40
)


@given(steps=STEPS)
@settings(deadline=None)
def test_each_state_of_a_file_is_found_once_and_only_if_still(tmp_path_factory: Any, steps: list[Any]) -> None:
    """A state that lasts is found; one that does not last STILL_SECONDS is not."""
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(tmp_path_factory.mktemp("disk"), patch)
        with closing(disk.index):
            changed: dict[str, float] = {}
            captioned: dict[str, int] = {}
            for name, size, pause in steps:
                if disk.sizes.get(name) != size:
                    disk.sizes[name] = size
                    changed[name] = disk.now
                for found in disk.poll(after=pause) + disk.poll():
                    assert disk.now - changed[found] >= STILL_SECONDS
                    assert captioned.get(found) != disk.sizes[found]
                    captioned[found] = disk.sizes[found]
            disk.poll()
            for found in disk.poll(after=STILL_SECONDS):
                captioned[found] = disk.sizes[found]
            assert captioned == disk.sizes
            assert disk.poll(after=99) == []


def test_files_with_names_of_unfinished_ones_wait_for_their_own(disk: Disk) -> None:
    assert all(map(is_unfinished, ("a/.b.jpg.Xy12", "b.jpg.part", "c.JPG.crdownload", "a/d.tmp")))
    assert not any(map(is_unfinished, ("a/b.jpg", ".hidden/c.jpg", "part.jpg")))
    disk.sizes = {".a.jpg.Xy12": 1}
    assert [disk.poll(after=99), disk.poll(after=99)] == [[], []]
    disk.sizes = {"a.jpg": 1}
    assert [disk.poll(after=99), disk.poll(after=99)] == [[], ["a.jpg"]]


def test_the_first_pass_leaves_young_files_to_the_watch(tmp_path: Path) -> None:
    for name, age in (("old.png", 3600), ("young.png", 3), ("of the future.png", -3600), (".old.png", 3600)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age, time.time() - age))
    names = [*sorted(os.listdir(tmp_path)), "absent.png"]  # noqa: PTH208
    assert [file.path for file in not_growing(ImageFile(str(tmp_path), name) for name in names)] == [
        "old.png",
        "absent.png",
    ]


@pytest.mark.parametrize(
    "changed",
    [{"images": ("http://x/a",)}, {"list": ("a.txt",)}, {"shards": ("s",)}],
    ids=lambda each: next(iter(each)),
)
def test_what_cannot_be_watched_is_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="give --images only"):
        check_watch(replace(CaptionSettings(images=("photos",)), **changed))
    check_watch(CaptionSettings(images=("photos", "photos/*.jpg")))


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one process: start it without accelerate launch"):
        check_watch(CaptionSettings(images=("photos",)))


# ---- the command ------------------------------------------------------------------------------------------


class Hurry:
    """A watch that looks often; `install` changes its process so."""

    def install(self) -> None:
        watching.STILL_SECONDS, watching.MIN_POLL_SECONDS, watching.SLEEP_SECONDS = 0.3, 0.05, 0.01


def start_watching(folder: Path, model: Path, *more: object) -> Running:
    hurry: Any = Hurry()
    flags = ["--model", model, "--images", folder / "photos", "--output", folder / "c.jsonl", "--workers", 1, "--watch"]
    (folder / "log").touch()
    return start("infer/main.py", [*flags, *more], log=folder / "log", stop=hurry)


def draw(path: Path, seed: int) -> bytes:
    """Write a picture whole and at once, of an old time, and return its content."""
    picture(seed).save(path.with_suffix(".tmp"), "PNG")
    os.utime(path.with_suffix(".tmp"), (OLD + seed, OLD + seed))
    path.with_suffix(".tmp").rename(path)
    return path.read_bytes()


def rows_of(folder: Path) -> dict[str, Any]:
    """The merged rows by path; none before the first merge."""
    path = folder / "c.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return {row["path"]: row for row in map(json.loads, lines)}


def has_rows(folder: Path, count: int) -> bool:
    return len(rows_of(folder)) == count


def wait_for(condition: Callable[[], bool], running: Running) -> None:
    deadline = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < deadline, running.log.read_text()
        assert running.ranks[0].is_alive(), running.log.read_text()
        time.sleep(0.02)


def end(running: Running, number: int) -> None:
    os.kill(running.ranks[0].pid, number)
    done = running.wait()
    assert done.code == 0, done.output


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_files_are_captioned_as_they_arrive(model: Path, tmp_path: Path, number: int) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    flags = ["--sidecar", ".txt", "--template", "{alt} {width}"]
    running = start_watching(tmp_path, model, *flags, "--gallery", tmp_path / "gallery")
    wait_for(lambda: "watching" in running.log.read_text(), running)
    draw(photos / "a.png", 1)
    wait_for(lambda: set(rows_of(tmp_path)) == {"a.png"}, running)
    wait_for((photos / "a.txt").exists, running)
    content = draw(tmp_path / "b.png", 2)
    with (photos / "b.png").open("wb", buffering=0) as growing:  # half of it, then the rest
        for start_byte in range(0, len(content), len(content) // 20 + 1):
            growing.write(content[start_byte : start_byte + len(content) // 20 + 1])
            time.sleep(0.05)
    (photos / "c.png").write_text("no picture")
    wait_for(lambda: set(rows_of(tmp_path)) == {"a.png", "b.png", "c.png"}, running)
    rows = rows_of(tmp_path)
    assert rows["b.png"]["caption"]
    assert rows["c.png"]["error"] == "undecodable"
    draw(photos / "c.png", 3)  # replaced
    wait_for(lambda: "caption" in rows_of(tmp_path)["c.png"], running)
    wait_for((photos / "c.txt").exists, running)
    picture(4).resize((40, 30)).save(tmp_path / "other.png")
    (tmp_path / "other.png").replace(photos / "c.png")  # and again: its text file is still ours
    wait_for(lambda: (photos / "c.txt").read_text().endswith(" 40\n"), running)
    shutil.copy(photos / "a.png", photos / "d.png")
    wait_for(lambda: "d.png" in rows_of(tmp_path), running)
    assert rows_of(tmp_path)["d.png"]["duplicate_of"] == f"{photos}/a.png"
    end(running, number)
    assert list(rows_of(tmp_path)) == ["a.png", "b.png", "c.png", "d.png"]
    names = {"photos", "c.jsonl", "c.jsonl.settings.json", "c.jsonl.written", "log", "gallery", "b.png"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert sorted(path.name for path in photos.glob("*.txt")) == ["a.txt", "b.txt", "c.txt", "d.txt"]
    before = rows_of(tmp_path)
    running = start_watching(tmp_path, model, *flags)
    wait_for(lambda: running.log.read_text().count("watching") == 2, running)
    time.sleep(0.5)
    end(running, number)
    assert rows_of(tmp_path) == before


@pytest.mark.slow
def test_a_kill_loses_only_what_was_unfinished(model: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(10):
        draw(tmp_path / "photos" / f"{number}.png", number)
    running = start_watching(tmp_path, model, "--batch-size", 1)
    part = tmp_path / "c.jsonl.part-0"
    wait_for(lambda: (part.exists() and part.stat().st_size > 0) or bool(rows_of(tmp_path)), running)
    draw(tmp_path / "photos" / "late.png", 11)
    running.kill()
    running = start_watching(tmp_path, model)
    wait_for(lambda: len(rows_of(tmp_path)) == 11, running)
    end(running, signal.SIGTERM)
    assert all(row["caption"] for row in rows_of(tmp_path).values())


@pytest.mark.slow
def test_a_stop_in_the_first_pass_merges_what_is_there(model: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(400):
        shutil.copy(os.devnull, tmp_path / "photos" / f"{number:03d}.png")
        os.utime(tmp_path / "photos" / f"{number:03d}.png", (OLD, OLD))
    running = start_watching(tmp_path, model, "--batch-size", 1)
    part = tmp_path / "c.jsonl.part-0"
    wait_for(lambda: part.exists() and part.stat().st_size > 0, running)
    end(running, signal.SIGTERM)
    assert not part.exists()
    assert rows_of(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="memory is read from /proc")
def test_memory_stays_flat(model: Path, tmp_path: Path) -> None:
    """Rounds of arrivals, each with new workers and a merge: after the first few they take no more memory."""
    (tmp_path / "photos").mkdir()
    running = start_watching(tmp_path, model)
    wait_for(lambda: "watching" in running.log.read_text(), running)
    megabytes = []
    for number in range(16):
        for image in range(20):
            draw(tmp_path / "photos" / f"{number:02d}-{image:02d}.png", 20 * number + image)
        wait_for(partial(has_rows, tmp_path, 20 * (number + 1)), running)
        rollup = Path(f"/proc/{running.ranks[0].pid}/smaps_rollup").read_text()
        megabytes.append(int(rollup.split("\nPss_Anon:")[1].split()[0]) / 1000)
    end(running, signal.SIGTERM)
    assert max(megabytes[12:]) - max(megabytes[4:8]) < 4, megabytes
