"""Folders to rows: every file once, nothing twice, whatever is killed and however many processes go on."""

import json
import os
import shutil
import signal
import stat
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from odd_pictures import write_odd_pictures
from tiny import picture, write_shards
from tiny_model import advance, write_model
from trainer import Done, Running, StopAtRow, start

from captioner.attention import Attention
from captioner.describe import Captioner
from captioner.images.views import read_eval_view
from captioner.model.bundle import load_bundle
from infer.captioning import Captioning, find_device
from infer.listing import Listing
from infer.reading import Reader
from infer.results import RowWriter, part_path
from infer.row_index import RowIndex, merge

pytestmark = pytest.mark.slow

TOLERANCE = 1.5e-4  # of scores, which are rounded to 1e-4
NUMBERS = ("score", "confidence")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures in folders, some with the same bytes, and files that are none."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(70):
        place = folder / f"{number % 3}" / f"{number:03d}.png"
        place.parent.mkdir(exist_ok=True)
        picture(number).save(place)
    for number in range(0, 70, 7):
        shutil.copy(
            folder / f"{number % 3}" / f"{number:03d}.png", folder / f"{(number + 1) % 3}" / f"twin-{number}.png"
        )
    (folder / "0" / "text.jpg").write_text("no picture")
    (folder / "1" / "empty.jpg").touch()
    os.mkfifo(folder / "2" / "pipe.jpg")
    return folder


NUM_FILES, NUM_PICTURES, NUM_TWINS = 83, 80, 10
NUM_MANY = 60


@pytest.fixture(scope="module")
def many_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    for number in range(NUM_MANY):
        picture(number, width=24, height=20).save(folder / f"{number:03d}.png")
    return folder


def flags(model: Path, photos: Path, output: Path, *more: object) -> list[object]:
    return ["--model", model, "--images", photos, "--output", output, "--batch-size", 2, "--workers", 2, *more]


def start_captioning(arguments: Sequence[object], *, log: Path, world_size: int = 1, **more: Any) -> Running:
    return start("infer/main.py", arguments, log=log, world_size=world_size, **more)


def run_captioning(arguments: Sequence[object], *, log: Path, world_size: int = 1) -> Done:
    return start_captioning(arguments, log=log, world_size=world_size).wait()


def read(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.read_text().splitlines()]


def check_alike(rows: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """The same rows in the same order; scores may differ as float32 does when batches differ."""
    assert len(rows) == len(expected)
    for row, other in zip(rows, expected, strict=True):
        assert list(row) == list(other)
        assert row.get("token_scores") == pytest.approx(other.get("token_scores"), abs=TOLERANCE)
        for name in NUMBERS:
            assert row.get(name) == pytest.approx(other.get(name), abs=TOLERANCE)
        rest = {name for name in row if name not in NUMBERS and name != "token_scores"}
        assert {name: row[name] for name in rest} == {name: other[name] for name in rest}


@pytest.fixture(scope="module")
def undisturbed(model: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    done = run_captioning(flags(model, photos, folder / "c.jsonl", "--batch-size", 16), log=folder / "log")
    assert done.code == 3, done.output
    return read(folder / "c.jsonl")


def test_every_file_has_a_row_and_the_same_bytes_the_same_caption(undisturbed: list[dict[str, Any]]) -> None:
    assert len(undisturbed) == NUM_FILES
    paths = [row["path"] for row in undisturbed]
    assert paths == sorted(set(paths))
    errors = {row["path"]: row["error"] for row in undisturbed if "error" in row}
    assert errors == {"0/text.jpg": "undecodable", "1/empty.jpg": "empty", "2/pipe.jpg": "special file"}
    twins = [row for row in undisturbed if row.get("duplicate_of")]
    assert len(twins) == NUM_TWINS
    by_location = {f"{row['root']}/{row['path']}": row for row in undisturbed}
    for twin in twins:
        first = by_location[twin["duplicate_of"]]
        assert first["duplicate_of"] is None
        assert {**first, "path": "", "duplicate_of": ""} == {**twin, "path": "", "duplicate_of": ""}
    assert len({row.get("caption") for row in undisturbed}) > 20


def test_rows_say_what_the_model_says(undisturbed: list[dict[str, Any]], model: Path) -> None:
    rows = [row for row in undisturbed if "error" not in row][:9]
    locations = [f"{row['root']}/{row['path']}" for row in rows]
    for row, description in zip(rows, Captioner(load_bundle(model))(locations), strict=True):
        assert row["caption"] == description.caption
        assert row["alt"] == description.alt
        assert row["score"] == pytest.approx(description.score, abs=TOLERANCE)
        assert row["score"] == pytest.approx(sum(row["token_scores"]) / len(row["token_scores"]), abs=TOLERANCE)
        assert (row["width"], row["height"]) == (48, 36)


@pytest.mark.parametrize("world_size", [2, 3])
def test_several_processes_write_what_one_writes(
    model: Path, photos: Path, undisturbed: list[dict[str, Any]], tmp_path: Path, world_size: int
) -> None:
    done = run_captioning(flags(model, photos, tmp_path / "c.jsonl"), log=tmp_path / "log", world_size=world_size)
    assert done.code == 3, done.output
    check_alike(read(tmp_path / "c.jsonl"), undisturbed)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.jsonl", "c.jsonl.settings.json", "log"]


def test_kills_lose_and_repeat_nothing(model: Path, many_photos: Path, tmp_path: Path) -> None:
    """Each run is killed after some new rows, and the next one has another number of processes."""
    output = tmp_path / "c.jsonl"
    for number, num_rows in enumerate((0, 1, 5, 2)):
        running = start_captioning(
            flags(model, many_photos, output), log=tmp_path / "log", world_size=1 + number % 2, stop=StopAtRow(num_rows)
        )
        running.ranks[0].join(60)
        running.kill()
        assert running.ranks[0].exitcode == -signal.SIGKILL
    assert 8 <= count_rows(tmp_path) < NUM_MANY
    done = run_captioning(flags(model, many_photos, output), log=tmp_path / "last log", world_size=3)
    assert done.code == 0, done.output
    run_captioning(flags(model, many_photos, tmp_path / "undisturbed.jsonl"), log=tmp_path / "last log")
    check_alike(read(output), read(tmp_path / "undisturbed.jsonl"))
    assert len(read(output)) == NUM_MANY


def count_rows(folder: Path) -> int:
    """Whole rows in all parts."""
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("c.jsonl.part-*"))


# ---- processes that are lost, and slow ones ---------------------------------------------------------------


def start_two(model: Path, photos: Path, folder: Path, *, peer_seconds: float) -> Running:
    """Two processes, of which both have written a row and wait for the file `go`."""
    running = start_captioning(
        flags(model, photos, folder / "c.jsonl", "--batch-size", 1),
        log=folder / "log",
        world_size=2,
        peer_seconds=peer_seconds,
        stop=StopAtRow(1, folder / "go"),
    )
    parts = [part_path(folder / "c.jsonl", rank) for rank in (0, 1)]
    wait_for(lambda: all(part.exists() and part.stat().st_size for part in parts), running)
    return running


def wait_for(condition: Callable[[], bool], running: Running) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, running.log.read_text()
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("lost", "number"),
    [(1, signal.SIGKILL), (0, signal.SIGSTOP), (1, signal.SIGTERM)],
    ids=["killed", "machine gone", "terminated"],
)
def test_a_lost_process_ends_the_others_resumably(
    model: Path, many_photos: Path, tmp_path: Path, lost: int, number: signal.Signals
) -> None:
    running = start_two(model, many_photos, tmp_path, peer_seconds=3.0)
    os.kill(running.ranks[lost].pid, number)
    (tmp_path / "go").touch()
    running.ranks[1 - lost].join(30)
    assert running.ranks[1 - lost].exitcode == 75
    if number == signal.SIGTERM:
        running.ranks[lost].join(10)
        assert running.ranks[lost].exitcode == 75
    running.kill()
    output = running.log.read_text()
    seen = (
        "has failed: see the end of its output"
        if number == signal.SIGTERM
        else "was silent for 3 s, so it or its machine is gone"
    )
    assert f"process {lost} of this job {seen}" in output
    assert "all rows are kept: run the same command again to resume" in output
    assert "Traceback" not in output
    num_kept = count_rows(tmp_path)
    assert 2 <= num_kept < NUM_MANY
    done = run_captioning(flags(model, many_photos, tmp_path / "c.jsonl"), log=tmp_path / "log 2")
    assert done.code == 0, done.output
    assert len(read(tmp_path / "c.jsonl")) == NUM_MANY
    names = ["c.jsonl", "c.jsonl.settings.json", "go", "log", "log 2"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_a_slow_process_is_waited_for(model: Path, many_photos: Path, tmp_path: Path) -> None:
    """Its readers stand still for several times as long as a lost process is given."""
    running = start_two(model, many_photos, tmp_path, peer_seconds=4.0)
    pid = running.ranks[1].pid
    readers = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    assert readers
    for reader in readers:
        os.kill(reader, signal.SIGSTOP)
    (tmp_path / "go").touch()
    process_0 = tmp_path / "c.jsonl.process-0"
    wait_for(lambda: b"finished" in process_0.read_bytes(), running)
    time.sleep(9)
    assert all(rank.is_alive() for rank in running.ranks), running.log.read_text()
    for reader in readers:
        os.kill(reader, signal.SIGCONT)
    done = running.wait()
    assert done.code == 0, done.output
    assert running.ranks[1].exitcode == 0
    assert len(read(tmp_path / "c.jsonl")) == NUM_MANY


# ---- again ------------------------------------------------------------------------------------------------


def test_what_has_a_row_is_not_done_again(model: Path, photos: Path, tmp_path: Path) -> None:
    images, output = tmp_path / "images", tmp_path / "c.jsonl"
    shutil.copytree(photos / "1", images)
    arguments = ["--model", model, "--images", images, "--output", output]
    run_captioning(arguments, log=tmp_path / "log")
    before = read(output)
    (images / "empty.jpg").write_bytes((images / "001.png").read_bytes())
    (images / "new.png").write_bytes((images / "001.png").read_bytes())
    (images / "004.png").unlink()
    assert run_captioning(arguments, log=tmp_path / "log").code == 3
    rows = read(output)
    assert [row for row in rows if row["path"] != "new.png"] == before
    (new,) = (row for row in rows if row["path"] == "new.png")
    assert new["duplicate_of"] == f"{images}/001.png"
    assert run_captioning([*arguments, "--retry-errors"], log=tmp_path / "log").code == 0
    (mended,) = (row for row in read(output) if row["path"] == "empty.jpg")
    assert mended["duplicate_of"] == f"{images}/001.png"


def test_shards_are_captioned_by_a_model_behind_a_url(model: Path, nginx: tuple[str, Path], tmp_path: Path) -> None:
    address, served = nginx
    shutil.copytree(model, served / "model")
    shards = write_shards(tmp_path / "shards", [5, 4], size=40)
    arguments = ["--model", f"{address}/model", "--shards", shards, "--output", tmp_path / "c.jsonl"]
    done = run_captioning([*arguments, "--gallery", tmp_path / "gallery"], log=tmp_path / "log", world_size=2)
    assert done.code == 0, done.output
    rows = read(tmp_path / "c.jsonl")
    assert [row["path"] for row in rows] == [
        f"train-{number // 5:06d}.tar/train-{number:09d}.jpg" for number in range(9)
    ]
    assert {(row["width"], row["height"]) for row in rows} == {(40, 40)}
    assert len(list((tmp_path / "gallery" / "thumbnails").iterdir())) == 9


def test_a_single_file_and_a_list_are_captioned(model: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(f"{photos}/1/001.png\n{photos}/1/nowhere.png\n{photos}/1/001.png\n")
    arguments = [
        "--images",
        photos / "0" / "000.png",
        "--list",
        tmp_path / "list.txt",
        "--output",
        tmp_path / "c.jsonl",
    ]
    done = run_captioning(["--model", model, *arguments], log=tmp_path / "log")
    assert done.code == 3, done.output
    found = {f"{row['root'].rstrip('/')}/{row['path']}": row.get("error") for row in read(tmp_path / "c.jsonl")}
    assert found == {
        f"{photos}/0/000.png": None,
        f"{photos}/1/001.png": None,
        f"{photos}/1/nowhere.png": "missing",
    }
    assert "1 files were named again" in done.output


class AtOnce(Executor):
    """Work is done when it is given: how fast threads are decides nothing."""

    def submit(self, work: Any, /, *arguments: Any) -> Future[Any]:  # type: ignore[override]
        future: Future[Any] = Future()
        future.set_result(work(*arguments))
        return future


def test_a_folder_of_copies_gets_its_rows_all_along(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However few different pictures there are, rows do not wait for the end, nor files in memory."""
    monkeypatch.setattr("infer.captioning.DESCRIBED_AT_ONCE", 8)
    monkeypatch.setattr("infer.captioning.ThreadPoolExecutor", lambda _num_threads: AtOnce())
    photos = tmp_path / "photos"
    photos.mkdir()
    picture(0).save(photos / "000.png")
    for number in range(1, 100):
        os.link(photos / "000.png", photos / f"{number:03d}.png")
    captioner, output = Captioner(load_bundle(model)), tmp_path / "c.jsonl"
    writer = RowWriter(part_path(output, 0))
    captioning = Captioning(captioner, RowIndex(output), writer)
    files = Listing([str(photos)])
    with Reader(files, captioner.bundle.view, batch_size=4, num_workers=1, num_held=2) as reader:
        sizes = [len(rows) for rows in captioning.rows(reader, num_threads=1)]
    writer.close()
    assert sum(sizes) == 100
    assert max(sizes) <= 8
    assert merge(output).num_duplicates == 99


def test_relative_names_are_refused_from_another_folder(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--images .` of two folders are different pictures with the same names."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        picture(1).save(tmp_path / name / "x.png")
    codes = []
    for name in ("a", "a", "b"):
        monkeypatch.chdir(tmp_path / name)
        arguments = ["--model", model, "--images", ".", "--output", tmp_path / "c.jsonl"]
        command = [sys.executable, "-c", "from infer.main import run; run()", *map(str, arguments)]
        codes.append(warm.run(command, nested=True, capture_output=True, text=True))
    assert [done.returncode for done in codes] == [0, 0, 2]
    assert "working_folder was" in codes[2].stderr


def test_a_gallery_takes_no_folder_of_others(model: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.html").write_text("mine")
    page = tmp_path / "site" / "index.html"
    for gallery in (tmp_path / "site", photos, page, page / "new"):
        done = run_captioning(flags(model, photos, tmp_path / "c.jsonl", "--gallery", gallery), log=tmp_path / "log")
        assert done.code == 2
        assert "--gallery" in done.output
    assert (tmp_path / "site" / "index.html").read_text() == "mine"


def test_odd_and_hostile_files_have_the_row_that_they_should(model: Path, tmp_path: Path) -> None:
    expected = write_odd_pictures(tmp_path / "odd")
    done = run_captioning(flags(model, tmp_path / "odd", tmp_path / "c.jsonl", "--batch-size", 8), log=tmp_path / "log")
    assert done.code == 3, done.output
    rows = {row["path"]: row for row in read(tmp_path / "c.jsonl")}
    assert {path: row.get("error") for path, row in rows.items()} == expected
    assert "1 links to folders were not followed" in done.output
    assert all(row["caption"] and row["alt"] for row in rows.values() if "error" not in row)


@pytest.mark.parametrize(
    ("more", "named"),
    [(("--beam-size", 1), "beam_size was 2 and is 1"), (("--precision", "bfloat16"), "precision was")],
)
def test_other_settings_are_refused_and_nothing_is_touched(
    model: Path, photos: Path, tmp_path: Path, more: tuple[object, ...], named: str
) -> None:
    output = tmp_path / "c.jsonl"
    run_captioning(flags(model, photos / "0", output), log=tmp_path / "log")
    content = output.read_bytes()
    done = run_captioning(flags(model, photos, output, *more), log=tmp_path / "log 2")
    assert done.code == 2
    assert named in done.output
    assert "--output" in done.output
    assert output.read_bytes() == content


def test_rows_tell_where_each_word_looked(photos: Path, tmp_path: Path) -> None:
    """As a model tells that is led through the row's words; copies have the same. Other runs refuse these rows."""
    model, output, gallery = write_model(tmp_path / "model", "attention"), tmp_path / "c.jsonl", tmp_path / "gallery"
    images = tmp_path / "images"
    shutil.copytree(photos / "1", images)
    shutil.copy(images / "001.png", images / "copy.png")
    arguments = flags(model, images, output, "--gallery", gallery)
    done = run_captioning([*arguments, "--attention"], log=tmp_path / "log")
    assert done.code == 3, done.output
    bundle = load_bundle(model)
    rows = [row for row in read(output) if "error" not in row]
    assert sum(row["duplicate_of"] is not None for row in rows) == 1
    for row in rows:
        seen = Attention.from_json(row["attention"])
        assert "".join(seen.words) == row["caption"]
        assert row["attention"]["area"] == [0.1, 0.1, 0.9, 0.9]
        view = read_eval_view(Path(row["root"], row["path"]).read_bytes(), bundle.view)[0]
        (weights_TR,) = advance(
            bundle, view[None].copy(), [bundle.vocabulary.encode(word.strip() for word in seen.words)]
        )
        largest_T1 = weights_TR.max(axis=1, keepdims=True)
        scaled_TR = seen.weights_TR / seen.weights_TR.max(axis=1, keepdims=True)
        assert scaled_TR == pytest.approx(weights_TR / largest_T1, abs=1 / 255)
    assert rows[0]["attention"]["weights"] in (gallery / "data.js").read_text()
    refused = run_captioning(arguments, log=tmp_path / "log 2")
    assert refused.code == 2
    assert "attention was true and is null" in refused.output


def test_sidecars_gallery_and_several_captions(model: Path, photos: Path, tmp_path: Path) -> None:
    images, output = tmp_path / "images", tmp_path / "c.jsonl"
    shutil.copytree(photos / "1", images)
    (images / "001.txt").write_text("mine")
    more = ("--sidecar", ".txt", "--gallery", tmp_path / "gallery", "--captions-per-image", 3)
    done = run_captioning(flags(model, images, output, *more), log=tmp_path / "log")
    assert done.code == 3, done.output
    rows = {row["path"]: row for row in read(output)}
    assert "001.txt" not in rows
    assert (images / "001.txt").read_text() == "mine"
    assert (images / "004.txt").read_text() == rows["004.png"]["caption"] + "\n"
    for row in rows.values():
        assert "error" in row or (len(set(row["captions"])) == 3 and row["captions"][0] == row["caption"])
    assert (tmp_path / "gallery" / "index.html").exists()
    again = run_captioning(flags(model, images, output, *more), log=tmp_path / "log")
    assert again.code == 3, again.output
    assert {row["path"]: row for row in read(output)} == rows


def test_all_that_was_asked_for_is_there_when_nobody_reads_what_is_printed(
    model: Path, photos: Path, tmp_path: Path
) -> None:
    """As with `| head -1`: the pipe's reader ends before anything is printed."""
    images, output, pipe = tmp_path / "images", tmp_path / "c.jsonl", tmp_path / "pipe"
    shutil.copytree(photos / "1", images)
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    more = ("--sidecar", ".txt", "--gallery", tmp_path / "gallery")
    running = start_captioning(flags(model, images, output, *more), log=pipe)
    with suppress(BlockingIOError):  # when the command has opened it
        while not os.read(reader, 1):
            time.sleep(0.001)
    os.close(reader)
    running.ranks[0].join(60)
    assert running.ranks[0].exitcode == 3
    captioned = [row["path"] for row in read(output) if "error" not in row]
    assert sorted(path.name for path in images.glob("*.txt")) == [f"{Path(path).stem}.txt" for path in captioned]
    assert (tmp_path / "gallery" / "index.html").exists()


def test_sidecars_that_cannot_be_written_are_named_with_the_reason_and_cost_the_exit_code(
    model: Path, tmp_path: Path
) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(3):
        picture(number).save(tmp_path / "photos" / f"{'x' * 60}{number}.png")
    arguments = flags(model, tmp_path / "photos", tmp_path / "c.jsonl", "--gallery", tmp_path / "gallery", "--sidecar")
    done = run_captioning([*arguments, "." + "y" * 200], log=tmp_path / "log")
    assert done.code == 3, done.output
    assert f"sidecars: 3 could not be written (File name too long): '{tmp_path}/photos/xxx" in done.output
    assert (tmp_path / "gallery" / "index.html").exists()
    assert run_captioning([*arguments, ".txt"], log=tmp_path / "log").code == 0


def test_a_command_without_a_file_to_caption_fails_and_touches_nothing(model: Path, tmp_path: Path) -> None:
    """Nothing is there, all is left out, or all is this command's own; with and without rows of an earlier run."""
    empty, texts, linked = (tmp_path / name for name in ("empty", "texts", "linked"))
    for folder in (empty, texts, linked):
        folder.mkdir()
    (texts / "a.txt").write_text("a sidecar")
    (linked / "folder").symlink_to(texts)
    (tmp_path / "list").write_text("\n\n")
    shards = write_shards(tmp_path / "shards", [])
    picture(1).save(tmp_path / "a.png")
    earlier, new = tmp_path / "earlier.jsonl", tmp_path / "new.jsonl"
    run_captioning(["--model", model, "--images", tmp_path / "a.png", "--output", earlier], log=tmp_path / "log")
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    for number, (arguments, output, named) in enumerate(
        [
            (["--images", empty], new, f"no file in {empty} but"),
            (["--images", empty], earlier, f"no file in {empty} but"),
            (["--list", tmp_path / "list"], new, f"no file in {tmp_path / 'list'} but"),
            (["--shards", shards], earlier, f"no file in {shards} but"),
            (["--images", texts, "--sidecar", ".txt"], new, "1 .txt files are no images"),
            (["--images", linked, empty], new, "1 links to folders were not followed"),
            (["--images", earlier], earlier, f"no file in {earlier} but"),
            (["--images", tmp_path / "*.jsonl*"], earlier, "no file in"),
        ]
    ):
        command = ["--model", model, *arguments, "--output", output]
        done = run_captioning(command, log=tmp_path / "said", world_size=1 + number % 2)
        assert done.code == 2, done.output
        assert done.output.startswith("error: nothing to caption: ")
        assert named in done.output
        (tmp_path / "said").unlink()
        assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_an_output_that_is_a_link_is_followed(model: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    output = tmp_path / "c.jsonl"
    output.symlink_to("disk/rows.jsonl")  # which is not there yet
    for _ in range(2):
        done = run_captioning(flags(model, photos / "0", output), log=tmp_path / "log")
        assert done.code == 3, done.output
    assert output.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.jsonl", "disk", "log"]
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["rows.jsonl", "rows.jsonl.settings.json"]
    assert len(read(output)) == len(list((photos / "0").iterdir()))


def test_an_output_that_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    """Before the model is looked at, which is not there, and without waiting for a reader."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "file").touch()
    outputs = [tmp_path / "pipe", tmp_path / "circle", tmp_path / "file" / "x.jsonl", tmp_path, "/dev/stdout"]
    if os.geteuid() == 0:
        os.mknod(tmp_path / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        outputs.append(tmp_path / "null")
    names = sorted(tmp_path.iterdir())
    for output in outputs:
        done = run_captioning(["--model", "nowhere", "--images", ".", "--output", output], log=tmp_path / "log")
        assert done.code == 2
        (line,) = done.output.splitlines()
        assert str(output) in line
        assert ": give " in line or ": check " in line
        (tmp_path / "log").unlink()
        assert sorted(tmp_path.iterdir()) == names
    if os.geteuid() == 0:
        assert stat.S_ISCHR((tmp_path / "null").stat().st_mode)


@pytest.mark.parametrize(("local_rank", "expected"), [(None, "cuda:0"), ("1", "cuda:1"), ("2", "cuda:0")])
def test_each_process_has_an_accelerator_of_its_own(
    monkeypatch: pytest.MonkeyPatch, local_rank: str | None, expected: str
) -> None:
    """Of two that a machine has; three processes share them."""
    taken: list[int] = []
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "set_device_index", taken.append)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert str(find_device()) == expected
    assert taken == [int(expected[-1])]
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert str(find_device()) == "cpu"


def test_one_command_at_a_time_writes_an_output(model: Path, photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "c.jsonl"
    stop = StopAtRow(1, tmp_path / "go")
    running = start_captioning(flags(model, photos, output), log=tmp_path / "log", stop=stop)
    wait_for(lambda: count_rows(tmp_path) > 0, running)
    made_with = (tmp_path / "c.jsonl.settings.json").read_text()
    for more in ((), ("--beam-size", 1)):
        second = run_captioning(flags(model, photos, output, *more), log=tmp_path / "log 2")
        assert second.code == 2
        assert "another run is writing" in second.output
    assert (tmp_path / "c.jsonl.settings.json").read_text() == made_with
    (tmp_path / "go").touch()
    assert running.wait().code == 3
    assert len(read(output)) == NUM_FILES


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "--images"),
        (["--images", "nowhere"], "nowhere"),
        (["--images", ".", "--beam-size", "0"], "INT >= 1"),
        (["--images", ".", "--batch-size", "0"], "INT >= 1"),
        (["--images", ".", "--sidecar", "txt"], "txt"),
        (["--images", ".", "--abstain-below", "0.5"], "--calibrate"),
        (["--images", ".", "--attention"], "leave out --attention, or train a model with train/main.py --decoder"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(
    model: Path, tmp_path: Path, arguments: list[str], named: str
) -> None:
    done = run_captioning(["--model", model, "--output", tmp_path / "c.jsonl", *arguments], log=tmp_path / "log")
    assert done.code == 2
    (line,) = done.output.splitlines()
    assert named in line
    assert not (tmp_path / "c.jsonl").exists()
