"""One image, one answer: on a terminal, in a pipe, in the browser; and the lines of docs/captions-your-way.md."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from base64 import standard_b64decode
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import warm
from PIL import Image
from rows import captioned, failed
from tiny import picture

from captioner.errors import UserError
from infer.answers import OPENED_GALLERY, answer_lines, open_outputs
from infer.results import Row
from infer.settings import CaptionSettings, check_flags
from infer.terminal import CHUNK_BYTES, draw, find_protocol

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = "docs/captions-your-way.md"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    for number, name in enumerate(("a.jpg", "dog.jpg", "same.jpg")):
        picture(number % 2).save(tmp_path / "photos" / name)
    return tmp_path / "photos"


def caption(*arguments: object, folder: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command, run in this folder."""
    command = [sys.executable, REPOSITORY / "infer/main.py", *arguments]
    return warm.run(list(map(str, command)), nested=True, cwd=folder, capture_output=True, text=True, **options)


def files_of(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# ---- on the terminal --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_one_image_is_answered_and_leaves_no_file(model: Path, photos: Path, tmp_path: Path) -> None:
    """With other settings too, which would be refused beside an output; an error is an answer."""
    before = files_of(tmp_path)
    for more in ((), ("--beam-size", 1), ("--prefix", "photo: ")):
        done = caption("--model", model, "--images", "photos/dog.jpg", *more, folder=tmp_path)
        assert done.returncode == 0, done.stderr
        name, said, *rest = done.stdout.splitlines()
        assert name == "dog.jpg"
        assert said.startswith("  ")
        assert rest[-1].startswith("the rows are not kept: --output")
        assert (f"  text: photo: {said.strip()}" in rest) == ("--prefix" in more)
    (photos / "bad.jpg").write_text("no image")
    done = caption("--model", model, "--images", "photos/bad.jpg", "photos/a.jpg", folder=tmp_path)
    assert done.returncode == 3
    assert done.stdout.splitlines()[:3] == [
        "bad.jpg",
        next(line for line in done.stdout.splitlines() if line.startswith("  no caption: undecodable: ")),
        "a.jpg",
    ]
    assert files_of(tmp_path) == sorted([*before, "photos/bad.jpg"])


@pytest.mark.slow
def test_a_folder_keeps_its_rows_and_an_answer_is_of_the_named_file(model: Path, photos: Path, tmp_path: Path) -> None:
    """Also when its row is there already, under another name of its folder."""
    done = caption("--model", model, "--images", "photos", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    done = caption("--model", model, "--images", photos / "dog.jpg", "--output", "captions.jsonl", folder=tmp_path)
    name, said = done.stdout.splitlines()[:2]
    assert (name, said.strip()) == ("dog.jpg", rows[1]["caption"])
    assert "same.jpg" not in done.stdout
    assert "captions.jsonl" in done.stdout


@pytest.mark.slow
def test_answers_of_a_folder_are_sorted_and_named_files_keep_their_order(
    model: Path, photos: Path, tmp_path: Path
) -> None:
    """Whatever order the file system has."""
    names = ["b.jpg", "a.jpg", *(f"{number}.jpg" for number in (7, 3, 5, 1))]
    for name in (*names, "dog.jpg"):
        shutil.copy(photos / "same.jpg", photos / name)
    done = caption("--model", model, "--images", photos, folder=tmp_path)
    assert [line for line in done.stdout.splitlines() if line.endswith(".jpg")] == sorted(
        [*names, "dog.jpg", "same.jpg"]
    )
    done = caption("--model", model, "--images", *(photos / name for name in names), folder=tmp_path)
    assert [line for line in done.stdout.splitlines() if line.endswith(".jpg")] == names


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (captioned("x/a.jpg"), ["x/a.jpg", "  a cat"]),
        (captioned("a.jpg", confidence=0.7123), ["a.jpg", "  a cat", "  confidence: 0.71"]),
        (captioned("a.jpg", caption="do n't"), ["a.jpg", "  do n't", "  alt: A cat."]),
        (
            captioned("a.jpg", alt="", confidence=0.1, review="low confidence"),
            [
                "a.jpg",
                "  a cat",
                "  no alt text: the confidence is below --abstain-below",
                "  confidence: 0.10",
                "  please look at it: low confidence",
            ],
        ),
        (
            failed(os.fsdecode(b"\xff\x1b[2J.jpg")),
            ["\N{REPLACEMENT CHARACTER} [2J.jpg", "  no caption: truncated: what was found"],
        ),
    ],
)
def test_an_answer_says_what_the_row_says(row: Row, expected: list[str]) -> None:
    assert list(answer_lines(row)) == expected


@pytest.mark.slow
def test_a_name_that_the_terminal_has_no_letters_for_is_answered(model: Path, photos: Path, tmp_path: Path) -> None:
    (photos / "dog.jpg").rename(photos / "犬.jpg")
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = [sys.executable, REPOSITORY / "infer/main.py", "--model", model, "--images", photos / "犬.jpg"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "?.jpg"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "iterm2"),
        ({"TERM": "xterm-256color", "LC_TERMINAL": "iTerm2"}, "iterm2"),
        ({"TERM": "screen-256color", "LC_TERMINAL": "iTerm2"}, None),
        ({"TERM": "xterm-kitty", "TMUX": "/tmp/tmux"}, None),
        ({"TERM": "xterm-256color"}, None),
        ({}, None),
    ],
)
def test_only_a_terminal_that_says_so_draws(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: str | None
) -> None:
    for is_terminal in (True, False):
        monkeypatch.setattr("sys.stdout.isatty", lambda answer=is_terminal: answer, raising=False)
        assert find_protocol(environment) == (expected if is_terminal else None)


def test_drawn_images_have_their_pixels() -> None:
    """As a terminal reads them: kitty's chunks joined, iTerm2's data in one; nothing else is printed."""
    image = picture(1, width=320, height=240)
    shown = draw(image, "kitty")
    chunks = re.findall(r"\033_G([^;]*);([^\033]*)\033\\", shown)
    assert "".join(f"\033_G{options};{data}\033\\" for options, data in chunks) + "\n" == shown
    assert chunks[0][0].startswith("a=T,f=100,")
    assert [options.rpartition("m=")[2] for options, _ in chunks] == ["1"] * (len(chunks) - 1) + ["0"]
    assert all(len(data) == CHUNK_BYTES for _, data in chunks[:-1])
    found = re.fullmatch(
        r"\033\]1337;File=inline=1;size=(\d+);height=\d+;preserveAspectRatio=1:(.*)\a\n", draw(image, "iterm2")
    )
    assert found
    for data in ("".join(data for _, data in chunks), found[2]):
        content = standard_b64decode(data)
        assert len(content) == int(found[1])
        assert Image.open(BytesIO(content)).tobytes() == image.tobytes()


@pytest.mark.slow
def test_a_kitty_gets_the_image_and_a_pipe_gets_none(model: Path, photos: Path, tmp_path: Path) -> None:
    environment = os.environ | {"TERM": "xterm-kitty"}
    arguments = ["--model", model, "--images", photos / "dog.jpg"]
    assert "\033_G" not in caption(*arguments, folder=tmp_path, env=environment).stdout
    ours, theirs = os.openpty()
    command = [sys.executable, str(REPOSITORY / "infer/main.py"), *map(str, arguments)]
    process = warm.Popen(command, nested=True, cwd=tmp_path, env=environment, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while data := os.read(ours, 1 << 16):
            shown += data
    except OSError:  # how a terminal's end is read
        pass
    os.close(ours)
    assert process.wait() == 0
    assert shown.index(b"\033_Ga=T") < shown.index(b"dog.jpg\r\n")


# ---- in a pipe --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_rows_on_the_standard_output_are_those_of_a_file(model: Path, photos: Path, tmp_path: Path) -> None:
    (photos / "bad.jpg").write_text("no image")
    done = caption("--model", model, "--images", photos, "--output", "c.jsonl", "--batch-size", 1, folder=tmp_path)
    assert done.returncode == 3
    before = files_of(tmp_path)
    done = caption("--model", model, "--images", photos, "--output", "-", "--batch-size", 1, folder=tmp_path)
    assert done.returncode == 3
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    rest = ("duplicate_of", "score", "token_scores")
    expected = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    for row, other in zip(sorted(rows, key=lambda row: row["path"]), expected, strict=True):
        assert {key: row[key] for key in row if key not in rest} == {
            key: other[key] for key in other if key not in rest
        }
    assert "rows" in done.stderr
    assert files_of(tmp_path) == before


def start_printing(model: Path, photos: Path, folder: Path) -> Any:
    """The command with --output -, and many images to caption one by one."""
    for number in range(300):
        shutil.copy(photos / "a.jpg", photos / f"{number}.jpg")
    command = [sys.executable, REPOSITORY / "infer/main.py", "--model", model, "--images", photos, "--output", "-"]
    arguments = [*map(str, command), "--workers", "1", "--batch-size", "1"]
    return warm.Popen(arguments, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.slow
def test_a_reader_that_ends_early_ends_the_job_quietly(model: Path, photos: Path, tmp_path: Path) -> None:
    process = start_printing(model, photos, tmp_path)
    assert json.loads(process.stdout.readline())["path"]
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0


@pytest.mark.slow
def test_a_stopped_job_says_that_its_rows_are_gone(model: Path, photos: Path, tmp_path: Path) -> None:
    process = start_printing(model, photos, tmp_path)
    assert json.loads(process.stdout.readline())["path"]
    process.terminate()
    rows, errors = process.communicate(timeout=60)
    assert process.returncode == 75
    assert b"the rows were not kept" in errors
    assert rows.count(b"\n") < 302


def test_several_processes_have_no_one_standard_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with (
        pytest.raises(UserError, match=r"2 processes cannot write.*give --output"),
        open_outputs(CaptionSettings(images=("photos",), output=Path("-"))),
    ):
        raise AssertionError


def test_rows_are_kept_but_for_a_few_single_files(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def is_kept(*images: Path, **more: Any) -> bool:
        with open_outputs(CaptionSettings(images=tuple(map(str, images)), **more)) as outputs:
            return outputs.is_kept

    dog = photos / "dog.jpg"
    assert not is_kept(dog)
    assert not is_kept(*[dog] * 10)
    assert is_kept(*[dog] * 11)
    assert is_kept(photos)
    assert is_kept(photos / "*.jpg")
    assert is_kept(dog, list=("-",))
    assert is_kept(dog, output=Path("captions.jsonl"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert is_kept(dog)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"template": "{alt} {dates}"}, r"no field \{dates\}"),
        ({"max_length": 3, "prefix": "long"}, "--max-length 3"),
        ({"csv": Path("table.xlsx")}, "--csv table.xlsx"),
        ({"csv_excel": "comma"}, "give --csv"),
        ({"coco_results": Path("r.csv")}, "--coco-results r.csv"),
        ({"coco_results": Path("r.json"), "output": Path("./r.json")}, "r.json is a file of the rows"),
    ],
)
def test_flags_that_cannot_be_used_are_refused_before_anything_else(flags: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        check_flags(CaptionSettings(images=("photos",), **flags))


# ---- in the browser ---------------------------------------------------------------------------------------


def browser(folder: Path) -> dict[str, str]:
    """An environment with a browser that appends the addresses it is given to the file `opened`."""
    script = folder / "browser"
    script.write_text(f'#!/bin/sh\necho "$1" >> {shlex.quote(str(folder / "opened"))}\n')
    script.chmod(0o755)
    return os.environ | {"BROWSER": f"{script} %s", "HOME": str(folder)}


@pytest.mark.slow
def test_the_gallery_is_opened_wherever_it_is(model: Path, photos: Path, tmp_path: Path) -> None:
    environment = browser(tmp_path)
    for images, more, expected in (
        (photos / "dog.jpg", (), tmp_path / OPENED_GALLERY.removeprefix("~/")),
        (photos, (), tmp_path / "captions.gallery"),
        (photos, ("--gallery", "mine"), tmp_path / "mine"),
    ):
        done = caption("--model", model, "--images", images, "--open", *more, folder=tmp_path, env=environment)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "opened").read_text().splitlines()[-1] == (expected / "index.html").as_uri()
        assert (expected / "index.html").exists()


# ---- the page ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_lines_of_the_page_run(model: Path, photos: Path, tmp_path: Path) -> None:
    """One after the other, in a folder that looks like the repository's, with a model and photos."""
    for stage in ("infer", "sharding", "train", "captioner"):
        (tmp_path / stage).symlink_to(REPOSITORY / stage)
    (tmp_path / "runs/mine").mkdir(parents=True)
    (tmp_path / "runs/mine/model").symlink_to(model)
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9003] = "2024:05:17 14:03:22"
    picture(1).save(photos / "dog.jpg", exif=exif)
    names = sorted(path.name for path in photos.iterdir())
    references = {
        "images": [{"id": number, "file_name": name} for number, name in enumerate(names)],
        "annotations": [{"id": number, "image_id": number, "caption": "a dog"} for number in range(len(names))],
    }
    (tmp_path / "references.json").write_text(json.dumps(references))
    environment = browser(tmp_path)
    page = (REPOSITORY / PAGE).read_text(encoding="utf-8")
    lines = "".join(re.findall(r"^```sh\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)).splitlines()
    assert len(lines) == 12
    printed = []
    for line in lines:
        command, _, reader = line.partition(" | ")
        _, *words = shlex.split(command)
        done = warm.run(
            [sys.executable, *words], nested=True, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        printed.append(done.stdout)
        if reader:
            read = subprocess.run(shlex.split(reader), input=done.stdout, capture_output=True, text=True, check=True)
            assert read.stdout.strip() == "3"
    shown = re.findall(r"^```text\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)[0].splitlines()
    answer = printed[0].splitlines()
    assert (answer[0], answer[-1]) == (shown[0], shown[-1])
    assert re.fullmatch(r"\S.*\. photos, 2024-05-17\n", (photos / "dog.txt").read_text())
    assert (photos / "dog.caption").read_text().startswith("photo of ")
    assert len(json.loads((tmp_path / "results.json").read_text())) == 3
    assert (tmp_path / "corrected" / "train.manifest.json").exists()
    assert (tmp_path / "for-excel.csv").read_bytes().startswith(b"\xef\xbb\xbfimage;caption")
