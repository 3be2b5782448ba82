"""Pictures that crash or hang their decoder cost themselves alone, and nobody's views are mixed up."""

import os
import signal
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import crash
import numpy as np
import pytest
from tiny import picture

from captioner import workers
from captioner.errors import UserError
from captioner.images.loading import ImageError
from captioner.images.views import ViewSpec, read_eval_view
from infer import reading
from infer.listing import ImageFile
from infer.reading import Batch, DecodedImage, Reader

VIEW = ViewSpec(size=20, crop=16)


def make_files(folder: Path, count: int) -> list[ImageFile]:
    for number in range(count):
        picture(number).save(folder / f"{number:03d}.png")
    return [ImageFile(str(folder), f"{number:03d}.png") for number in range(count)]


def spoil(file: ImageFile, words: bytes) -> None:
    """Make a picture one that the decoder of tests/support/crash.py dies of."""
    path = Path(file.location)
    path.write_bytes(path.read_bytes() + words)


def read_all(
    files: list[ImageFile], *, num_workers: int = 2, batch_size: int = 4, num_held: int = 1
) -> tuple[dict[str, DecodedImage], dict[str, np.ndarray]]:
    """All pictures and the views of the usable ones, by path; as many batches are held as may be."""
    pictures: dict[str, DecodedImage] = {}
    views: dict[str, np.ndarray] = {}

    def take(batch: Batch) -> None:
        usable = [picture for picture in batch.images if picture.error is None]
        assert len(usable) == len(batch.views_BPP3)
        for own in batch.images:
            assert own.file.path not in pictures
            pictures[own.file.path] = own
        views.update({own.file.path: view.copy() for own, view in zip(usable, batch.views_BPP3, strict=True)})

    with Reader(iter(files), VIEW, batch_size=batch_size, num_workers=num_workers, num_held=num_held) as reader:
        held: list[Batch] = []
        for batch in reader:
            held.append(batch)
            if len(held) == num_held:
                take(held[0])
                reader.release(held.pop(0))
        for batch in held:
            take(batch)
    return pictures, views


def check_views(files: list[ImageFile], views: dict[str, np.ndarray]) -> None:
    for file in files:
        expected, _ = read_eval_view(Path(file.location).read_bytes(), VIEW)
        assert (views[file.path] == expected).all()


@pytest.mark.parametrize(("num_workers", "batch_size", "num_held"), [(1, 1, 1), (3, 4, 3), (2, 64, 2)])
def test_every_file_comes_once_with_its_own_view(
    tmp_path: Path, num_workers: int, batch_size: int, num_held: int
) -> None:
    files = make_files(tmp_path, 23)
    pictures, views = read_all(files, num_workers=num_workers, batch_size=batch_size, num_held=num_held)
    assert sorted(pictures) == [file.path for file in files]
    assert {(picture.size, picture.error) for picture in pictures.values()} == {((48, 36), None)}
    assert len({picture.sha256 for picture in pictures.values()}) == 23
    check_views(files, views)


def test_files_that_cannot_be_used_say_why_and_the_others_of_their_batch_come(tmp_path: Path) -> None:
    files = make_files(tmp_path, 9)
    Path(files[0].location).unlink()
    Path(files[4].location).write_bytes(b"no picture")
    Path(files[5].location).write_bytes(b"")
    closed = [ImageFile(str(tmp_path), f"{n}", error=ImageError("unreadable", "no permission")) for n in range(6)]
    pictures, views = read_all([*files[:3], *closed, *files[3:]])
    errors = {path: picture.error.reason for path, picture in pictures.items() if picture.error}
    assert errors == {
        "000.png": "missing",
        "004.png": "undecodable",
        "005.png": "empty",
        **{f"{n}": "unreadable" for n in range(6)},
    }
    check_views([files[number] for number in (1, 2, 3, 6, 7, 8)], views)


def test_no_files_give_no_batches() -> None:
    assert read_all([]) == ({}, {})


def test_files_are_taken_as_they_are_needed(tmp_path: Path) -> None:
    """The first batch comes long before the listing is through."""
    files, taken = make_files(tmp_path, 3), 0

    def endless() -> Iterator[ImageFile]:
        nonlocal taken
        while True:
            taken += 1
            yield files[taken % 3]

    with Reader(endless(), VIEW, batch_size=2, num_workers=2, num_held=1) as reader:
        for batch in islice(reader, 20):
            reader.release(batch)
    assert taken < 2 * (20 + 10)


def test_pictures_at_which_the_decoder_crashes_are_left_out_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infer.reading._decode", crash.decoding_deadly_pictures)
    files = make_files(tmp_path, 14)
    for number in (0, 5, 6, 13):
        spoil(files[number], crash.DEADLY)
    pictures, views = read_all(files)
    errors = {path: str(picture.error) for path, picture in pictures.items() if picture.error}
    assert errors == dict.fromkeys(
        ("000.png", "005.png", "006.png", "013.png"), "crashed the decoder: its process ended with exit code 9"
    )
    check_views([file for file in files if file.path not in errors], views)


@pytest.mark.slow
def test_a_picture_at_which_the_decoder_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infer.reading._decode", crash.decoding_deadly_pictures)
    monkeypatch.setattr(reading, "MAX_SECONDS", 4.0)
    monkeypatch.setattr(workers, "POLL_SECONDS", 0.1)
    files = make_files(tmp_path, 6)
    spoil(files[2], crash.ENDLESS)
    pictures, views = read_all(files)
    assert {path: picture.error.reason for path, picture in pictures.items() if picture.error} == {
        "002.png": "timed out"
    }
    check_views([file for file in files if file.path != "002.png"], views)


@pytest.mark.slow
def test_a_pause_of_everything_costs_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of Ctrl-Z or a frozen machine: nobody speaks, and nobody has looked."""
    monkeypatch.setattr(reading, "MAX_SECONDS", 1.0)
    monkeypatch.setattr(workers, "POLL_SECONDS", 0.1)
    pictures: list[DecodedImage] = []
    with Reader(iter(make_files(tmp_path, 40)), VIEW, batch_size=2, num_workers=2, num_held=1) as reader:
        for batch in reader:
            pictures += batch.images
            reader.release(batch)
            if len(pictures) == 4:
                pids = [worker.process.pid or 0 for worker in reader._pool._workers]
                for pid in pids:
                    os.kill(pid, signal.SIGSTOP)
                time.sleep(2.0)
                for pid in pids:
                    os.kill(pid, signal.SIGCONT)
    assert len(pictures) == 40
    assert not [picture for picture in pictures if picture.error]


def test_workers_that_always_die_end_the_run_with_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infer.reading._decode", crash.always)
    monkeypatch.setattr(reading, "MAX_DEATHS", 4)
    with pytest.raises(UserError, match=r"worker processes died 4 times at .*00\d\.png.* \(exit code 9\)"):
        read_all(make_files(tmp_path, 30))
