"""The demo's scenes and their judge: what the drawn data promises, and that the judge cannot be fooled."""

import json
import os
import random
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import warm

import demo
from awkward import ODD_NAME, write_folder
from captioner.errors import UserError
from captioner.images.loading import ImageError, decode_rgb
from scenes import (
    COLOURS,
    SHAPES,
    UNSEEN_PAIRS,
    SceneSettings,
    describe,
    draw,
    invent_split,
    main,
    named_pairs,
    named_shapes,
    share_right,
)


def test_training_never_shows_a_held_out_pair_and_validation_does() -> None:
    assert not any(scene.pairs & UNSEEN_PAIRS for scene in invent_split(1, "train", 800))
    validation = invent_split(1, "val", 100)
    assert sum(bool(scene.pairs & UNSEEN_PAIRS) for scene in validation) == 20
    train_pairs = {pair for scene in invent_split(1, "train", 800) for pair in scene.pairs}
    assert {c for c, _ in UNSEEN_PAIRS} <= {c for c, _ in train_pairs}
    assert {s for _, s in UNSEEN_PAIRS} <= {s for _, s in train_pairs}


def test_captions_are_five_differ_and_are_true() -> None:
    for scene in invent_split(2, "val", 200):
        captions = describe(scene)
        assert len(set(captions)) == 5
        for caption in captions:
            assert named_pairs(caption), caption
            assert named_pairs(caption) <= scene.pairs, caption
            assert named_shapes(caption) <= {shape for _, shape in scene.pairs}


def test_relations_in_captions_hold_in_the_picture() -> None:
    checked = 0
    for scene in invent_split(3, "train", 300):
        if scene.relation == "left":
            first, second = scene.shapes
            assert first.x < second.x
            checked += 1
            assert any("left" in caption or "right" in caption for caption in describe(scene))
        elif scene.relation == "above":
            assert scene.shapes[0].y < scene.shapes[1].y
            checked += 1
    assert checked > 50


def test_a_shape_is_drawn_in_its_colour_where_it_is_said_to_be() -> None:
    for scene in invent_split(4, "train", 60):
        pixels = np.asarray(draw(scene)).astype(int)
        for shape in scene.shapes:
            side = 0.78 * shape.radius if shape.name == "ring" else 0.0
            found = pixels[round(shape.y), round(shape.x + side)]
            nearest = min(COLOURS, key=lambda colour: np.abs(found - COLOURS[colour]).sum())
            assert nearest == shape.colour


def test_equal_seeds_draw_equal_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        main(SceneSettings(output=tmp_path / name, train=6, val=4, seed=5))
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) == 6 + 4 + 5
    for path in files:
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes(), path


@pytest.mark.parametrize(
    ("caption", "shapes", "pairs"),
    [
        ("a red circle above a blue square.", {"circle", "square"}, {("red", "circle"), ("blue", "square")}),
        ("Two yellow discs and a box", {"circle", "square"}, {("yellow", "circle")}),
        ("red blue green", set(), set()),
        ("a starring role", set(), set()),
        ("", set(), set()),
    ],
)
def test_the_judge_reads_captions(caption: str, shapes: set[str], pairs: set[tuple[str, str]]) -> None:
    assert named_shapes(caption) == shapes
    assert named_pairs(caption) == pairs


def test_naming_everything_or_nothing_is_not_right() -> None:
    scenes = invent_split(6, "val", 200)
    everything = set(SHAPES)
    shown = [{shape for _, shape in scene.pairs} for scene in scenes]
    assert share_right((everything, shapes) for shapes in shown) == 0.0
    assert share_right((set(), shapes) for shapes in shown) == 0.0
    assert share_right((shapes, shapes) for shapes in shown) == 1.0
    shuffled = random.Random(0).sample(shown, len(shown))
    assert share_right(zip(shuffled, shown, strict=True)) < 0.3


def test_the_folder_holds_what_people_have(tmp_path: Path) -> None:
    shown = write_folder(tmp_path, seed=1)
    assert ODD_NAME in shown
    for name in shown:
        decode_rgb((tmp_path / name).read_bytes())
    assert decode_rgb((tmp_path / "formats/twelve_megapixels.jpg").read_bytes())[1] == (4000, 3000)
    upright, _ = decode_rgb((tmp_path / "formats/rotated.jpg").read_bytes())
    expected = np.asarray(draw(shown["formats/rotated.jpg"])).astype(int)
    assert np.abs(np.asarray(upright).astype(int) - expected).mean() < 8
    broken = [path for path in tmp_path.rglob("*") if path.is_file() and str(path.relative_to(tmp_path)) not in shown]
    assert len(broken) == 4
    for path in broken:
        with pytest.raises(ImageError):
            decode_rgb(path.read_bytes())


@pytest.mark.slow
def test_the_demos_launcher_has_nothing_to_warn_of(tmp_path: Path) -> None:
    """A terminal shows the training's own lines only."""
    script = tmp_path / "hello.py"
    script.write_text("print('hello')")
    launcher, *flags = shlex.split(demo.TRAIN.partition("train/main.py")[0])
    command = [Path(sys.executable).with_name(launcher), *flags, script]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    done = warm.run(command, nested=True, env=clean, capture_output=True, text=True, check=True, timeout=120)
    assert (done.stdout, done.stderr) == ("hello\n", "")


def test_a_stage_shows_its_command_and_only_of_a_failure_what_it_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(demo, "LOG", tmp_path / "demo.log")
    finished, polls = tmp_path / "result", []
    fine = f"python -c \"open('{finished}', 'w'); print('noise')\""
    assert demo.run_stage(fine, finished=finished, watch=lambda: polls.append(1))[1] is False
    assert demo.run_stage(fine, finished=finished)[1] is True
    shown = capfd.readouterr()
    assert (shown.out.count("print('noise')"), shown.err) == (2, "")
    assert "noise\n" not in shown.out
    assert polls
    with pytest.raises(UserError, match="exit code 3"):
        demo.run_stage("python -c \"print('the reason'); exit(3)\"", finished=finished)
    assert "the reason\n" in capfd.readouterr().err
    demo.run_stage('python -c "exit(3)"', finished=finished, fine=(0, 3))


def test_each_epoch_is_printed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(demo, "RUN", tmp_path)
    printer = demo.EpochPrinter()
    printer()
    for epoch in (1, 2):
        with (tmp_path / "history.jsonl").open("a") as file:
            print(json.dumps({"step": epoch, "epoch": epoch, "validation/cider": epoch / 10}), file=file)
        printer()
        printer()
    assert capsys.readouterr().out.split("\n") == ["  epoch 1: CIDEr 0.10", "  epoch 2: CIDEr 0.20", ""]
