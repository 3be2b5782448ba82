"""--missing-only captions the files without a description, and a dry run says beforehand which these are."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny import picture
from trainer import Done, start

from infer.metadata import xmp

pytestmark = pytest.mark.slow

PACKET = xmp.extend(None, "Mine", model="m", date="2026-11-28") or b""
DESCRIBED = ("002.png", "003.png", "sub/004.png", "sub/005.jpg")
BROKEN = ("empty.jpg", "sub/text.jpg")
ALL_PLAIN = [f"{'sub/' if number % 2 == 0 else ''}{number:03d}.png" for number in range(10, 40)]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Files without a description, four that have one (each of another kind), and two that are broken."""
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for number, name in enumerate(ALL_PLAIN):
        picture(number).save(folder / name)
    for number, name in enumerate(DESCRIBED, start=100):
        picture(number).save(folder / name)
    (folder / "002.txt").write_text("mine")
    (folder / "003.png.xmp").write_bytes(PACKET)
    (folder / "sub" / "004.xmp").write_bytes(PACKET)
    picture(103).save(folder / "sub" / "005.jpg", xmp=PACKET)
    (folder / "empty.jpg").touch()
    (folder / "sub" / "text.jpg").write_text("no picture")
    return folder


def caption(model: Path, photos: Path, *more: object, world_size: int = 1) -> Done:
    output = photos.parent / "c.jsonl"
    flags = ["--model", model, "--images", photos, "--output", output, "--batch-size", 4, "--workers", 2, *more]
    return start("infer/main.py", flags, log=photos.parent / "log", world_size=world_size).wait()


def rows(photos: Path) -> dict[str, dict[str, Any]]:
    lines = (photos.parent / "c.jsonl").read_text().splitlines()
    return {row["path"]: row for row in map(json.loads, lines)}


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "log")
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.mark.parametrize("world_size", [1, 2])
def test_only_files_without_a_description_get_rows(model: Path, photos: Path, world_size: int) -> None:
    done = caption(model, photos, "--missing-only", "--sidecar", ".xmp", world_size=world_size)
    assert done.code in (1, 3), done.output
    found = rows(photos)
    assert set(found) == {*ALL_PLAIN, *BROKEN}
    assert {path for path, row in found.items() if "error" in row} == set(BROKEN)
    assert "4 have a description already, so they have no row" in done.output
    assert "1 .txt files are no images" in done.output
    assert "2 .xmp files are no images" in done.output
    for path in ALL_PLAIN:
        assert xmp.read_texts((photos / f"{path}.xmp").read_bytes()) == [found[path]["alt"]] * 2
    before = snapshot(photos.parent)
    caption(model, photos, "--missing-only", "--sidecar", ".xmp", "--existing", "append", world_size=world_size)
    after = snapshot(photos.parent)
    assert {name: content for name, (content, _) in after.items()} == {name: data for name, (data, _) in before.items()}
    assert all(after[name] == before[name] for name in before if str(photos) in name)


def test_a_file_that_lost_its_description_is_captioned_by_the_next_run(model: Path, photos: Path) -> None:
    caption(model, photos, "--missing-only")
    (photos / "002.txt").unlink()
    done = caption(model, photos, "--missing-only")
    assert set(rows(photos)) == {*ALL_PLAIN, *BROKEN, "002.png"}
    assert "3 have a description already" in done.output


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_dry_run_says_what_would_be_captioned_and_writes_nothing(model: Path, photos: Path, world_size: int) -> None:
    before = snapshot(photos.parent)
    done = caption(model, photos, "--missing-only", "--dry-run", "--sidecar", ".txt", world_size=world_size)
    assert done.code == 0, done.output
    assert cells(done.output) == [len(ALL_PLAIN) + 6, 0, 4, 2, len(ALL_PLAIN)]
    assert "have a description: 2 in a .xmp sidecar, 1 in a .txt sidecar, 1 in the image" in done.output
    (broken,) = (line for line in done.output.splitlines() if line.startswith("are broken: 1 empty, 1 undecodable: "))
    assert all(repr(str(photos / name)) in broken for name in BROKEN)
    assert snapshot(photos.parent) == before


def test_a_dry_run_counts_rows_that_are_there_and_all_files_without_missing_only(model: Path, photos: Path) -> None:
    caption(model, photos, "--missing-only")
    before = snapshot(photos.parent)
    done = caption(model, photos, "--dry-run")  # the three sidecars are files too
    assert cells(done.output) == [len(ALL_PLAIN) + 9, len(ALL_PLAIN) + 2, 4, 3, 4]
    done = caption(model, photos, "--dry-run", "--missing-only", "--retry-errors")
    assert cells(done.output) == [len(ALL_PLAIN) + 6, len(ALL_PLAIN), 4, 2, 0]
    assert "0 seconds" in done.output
    assert snapshot(photos.parent) == before


@pytest.mark.external
@pytest.mark.skipif(shutil.which("exiftool") is None, reason="exiftool is not installed")
def test_a_dry_run_says_which_rows_are_still_to_be_written(model: Path, photos: Path) -> None:
    caption(model, photos, "--missing-only")
    flags = ("--missing-only", "--sidecar", ".txt", "--embed")
    done = caption(model, photos, *flags, "--dry-run")
    num = len(ALL_PLAIN)
    line = f"of the files that have a row, {num} have no .txt sidecar, {num} have no embedded description: the job"
    assert line in done.output
    caption(model, photos, *flags)
    done = caption(model, photos, *flags, "--dry-run")
    assert done.output.count("of the files that have a row") == 1  # the log has the earlier runs too


def test_a_dry_run_is_refused_as_captioning_would_be(model: Path, photos: Path) -> None:
    caption(model, photos)
    done = caption(model, photos, "--dry-run", "--beam-size", 1)
    assert done.code == 2
    assert "were made with other settings" in done.output


def cells(output: str) -> list[int]:
    """The numbers in the table of a dry run: files, with a row, described, broken, to caption."""
    line = [line for line in output.splitlines() if line.startswith("│")][-1]  # the log has earlier runs too
    return [int(cell.replace(",", "")) for cell in line.strip("│").split("│")[:5]]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--existing", "append"), "give --sidecar or --embed too"),
        (("--sidecar", ".jpg"), "is no suffix of sidecar files"),
        (("--sidecar", ".XMP"), "in small letters"),
        (("--sidecar", ".."), "is no suffix of sidecar files"),
        (("--coco-results", "{}/c.jsonl.settings.json"), "is a file of the rows already"),
    ],
)
def test_flags_that_do_nothing_are_refused(model: Path, photos: Path, flags: tuple[str, ...], message: str) -> None:
    done = caption(model, photos, *(flag.format(photos.parent) for flag in flags))
    assert done.code == 2
    assert message in done.output
    assert not (photos.parent / "c.jsonl").exists()


@pytest.mark.external
def test_captions_are_embedded_and_found_again(model: Path, photos: Path) -> None:
    if shutil.which("exiftool") is None:
        pytest.skip("exiftool is not installed")
    done = caption(model, photos, "--missing-only", "--embed")
    assert f"embedded: {len(ALL_PLAIN)} written" in done.output
    (photos.parent / "c.jsonl").unlink()
    done = caption(model, photos, "--missing-only")
    assert set(rows(photos)) == set(BROKEN)
    assert f"{len(ALL_PLAIN) + 4} have a description already" in done.output


@pytest.mark.external
def test_a_gallery_beside_embedding_has_the_images(model: Path, photos: Path) -> None:
    if shutil.which("exiftool") is None:
        pytest.skip("exiftool is not installed")
    gallery = photos.parent / "gallery"
    for _ in range(2):
        done = caption(model, photos, "--embed", "--gallery", gallery)
        assert "changed since it was captioned" not in done.output
        assert len(list((gallery / "thumbnails").iterdir())) >= len(ALL_PLAIN)
