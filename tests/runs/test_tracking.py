"""The tracker: what it writes while a run goes, what a resumed run forgets, and what it asks of Weights & Biases."""

import io
import json
import math
import sys
import types
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from captioner.attention import Attention
from captioner.errors import UserError
from train.run.tracking import Tracker, check_wandb, read_rows

NO_PROJECT: Any = {"wandb_project": None, "settings": {}}


def track(run: Path, steps: range, *, first_step: int = 0, value: float = 1.0) -> None:
    tracker = Tracker(run, first_step=first_step, **NO_PROJECT)
    for step in steps:
        tracker.log(step, {"train/loss": value})
    tracker.close()
    # TensorBoard reads its files by name, which orders sessions by seconds: these tests are faster
    files = sorted((run / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    files[-1].rename(files[-1].with_name(f"events.out.tfevents.{len(files):010d}"))


def events(run: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(run / "tensorboard"))
    accumulator.Reload()
    return accumulator


def picture(*, side: int = 48, colour: int = 0) -> np.ndarray:
    return np.full((side, side, 3), colour, np.uint8)


def test_history_and_tensorboard_hold_the_same_values(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, first_step=0, **NO_PROJECT)
    tracker.log(10, {"train/loss": 2.5, "epoch": 1})
    tracker.log(20, {"train/loss": cast(float, np.float32(1.5)), "validation/cider": 0.75})
    tracker.close()
    assert read_rows(tmp_path / "history.jsonl") == [
        {"step": 10, "train/loss": 2.5, "epoch": 1},
        {"step": 20, "train/loss": 1.5, "validation/cider": 0.75},
    ]
    board = events(tmp_path)
    assert [(event.step, event.value) for event in board.Scalars("train/loss")] == [(10, 2.5), (20, 1.5)]
    assert [(event.step, event.value) for event in board.Scalars("validation/cider")] == [(20, 0.75)]


def test_a_killed_run_has_told_everywhere_what_it_logged(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, first_step=0, **NO_PROJECT)
    tracker.log(10, {"train/loss": 2.5})
    assert [row["step"] for row in read_rows(tmp_path / "history.jsonl")] == [10]
    assert [event.step for event in events(tmp_path).Scalars("train/loss")] == [10]
    tracker.close()


def test_numbers_that_are_not_finite_keep_the_history_valid_json(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, first_step=0, **NO_PROJECT)
    tracker.log(1, {"a": math.nan, "b": math.inf, "c": 1.0})
    tracker.close()

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    (line,) = (tmp_path / "history.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=refuse) == {"step": 1, "a": None, "b": None, "c": 1.0}
    assert math.isnan(events(tmp_path).Scalars("a")[0].value)


@pytest.mark.parametrize("torn", [b"", b'{"step": 31, "train/lo', b'{"step": 7, "train/loss": 1.0}', b"\xff\x00"])
def test_a_resumed_run_forgets_later_rows_and_a_torn_one(tmp_path: Path, torn: bytes) -> None:
    track(tmp_path, range(10, 31, 10))
    with (tmp_path / "history.jsonl").open("ab") as file:
        file.write(torn)
    track(tmp_path, range(30, 51, 10), first_step=20, value=2.0)
    curve = [(10, 1.0), (20, 1.0), (30, 2.0), (40, 2.0), (50, 2.0)]
    assert [(row["step"], row["train/loss"]) for row in read_rows(tmp_path / "history.jsonl")] == curve
    assert [(event.step, event.value) for event in events(tmp_path).Scalars("train/loss")] == curve
    assert not list(tmp_path.glob("*.partial"))


@settings(deadline=None, max_examples=50)  # it writes files
@given(content=st.lists(st.integers(0, 99)), cut=st.integers(0, 10_000))
def test_of_a_history_cut_anywhere_its_whole_rows_are_read(
    tmp_path_factory: pytest.TempPathFactory, content: list[int], cut: int
) -> None:
    lines = [json.dumps({"step": step}) + "\n" for step in content]
    kept = "".join(lines)[:cut]
    path = tmp_path_factory.mktemp("cut") / "history.jsonl"
    path.write_text(kept)
    assert [row["step"] for row in read_rows(path)] == content[: kept.count("\n")]


def test_damage_inside_the_history_is_the_users_to_mend(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    path.write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"line 2 of .*history\.jsonl is damaged .*delete that line"):
        Tracker(tmp_path, first_step=3, **NO_PROJECT)


def test_sample_captions_are_kept_with_their_pictures(tmp_path: Path) -> None:
    pictures = [picture(colour=0), picture(colour=200)]
    tracker = Tracker(tmp_path, first_step=0, **NO_PROJECT)
    tracker.show(5, pictures, ["a dog", "a cat"])
    tracker.show(10, pictures, ["a brown dog", "a cat"])
    tracker.close()
    assert read_rows(tmp_path / "samples.jsonl") == [
        {"step": 5, "captions": ["a dog", "a cat"]},
        {"step": 10, "captions": ["a brown dog", "a cat"]},
    ]
    assert [path.name for path in sorted((tmp_path / "samples").iterdir())] == ["00.jpg", "01.jpg"]
    with Image.open(tmp_path / "samples" / "01.jpg") as image:
        assert np.abs(np.asarray(image).astype(int) - pictures[1]).max() < 3


def test_attention_of_sample_captions_is_kept(tmp_path: Path) -> None:
    seen = Attention(words=("a", " dog"), grid=(1, 2), weights_TR=np.array([[0.25, 0.75], [1.0, 0.0]]))
    tracker = Tracker(tmp_path, first_step=0, **NO_PROJECT)
    tracker.show(5, [picture(), picture()], ["a dog", ""], [seen, None])
    tracker.show(6, [picture()], ["a dog"], [None])
    tracker.close()
    first, second = read_rows(tmp_path / "samples.jsonl")
    assert first["attention"] == [seen.to_json(), None]
    assert "attention" not in second


def test_a_resumed_run_forgets_later_sample_captions(tmp_path: Path) -> None:
    for first_step, steps in ((0, (5, 10)), (5, (10,))):
        tracker = Tracker(tmp_path, first_step=first_step, **NO_PROJECT)
        for step in steps:
            tracker.show(step, [picture()], [f"from {first_step}"])
        tracker.close()
    rows = read_rows(tmp_path / "samples.jsonl")
    assert [(row["step"], row["captions"]) for row in rows] == [(5, ["from 0"]), (10, ["from 5"])]


def test_tensorboard_has_the_pictures_once_and_their_captions_each_time(tmp_path: Path) -> None:
    pictures = [picture(colour=colour) for colour in (10, 60)]
    tracker = Tracker(tmp_path, first_step=0, **NO_PROJECT)
    tracker.show(1, pictures, ["a dog", ""])
    tracker.show(2, pictures, ["a cat", "two"])
    tracker.close()
    (event,) = events(tmp_path).Images("validation/samples")
    grid = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)).convert("RGB"))
    assert np.array_equal(grid, np.concatenate(pictures, axis=1))
    shown = events(tmp_path).Tensors("validation/captions/text_summary")
    assert [event.tensor_proto.string_val[0].decode() for event in shown] == ["1. a dog\n2. \n", "1. a cat\n2. two\n"]


@pytest.mark.parametrize(
    "caption",
    ["日本語のキャプション" * 9, "ünï 😀 مرحبا", "half a pair \ud83d", "nul \0 and\nnewline", "w" * 400, "<script>"],
)
def test_any_caption_can_be_shown(tmp_path: Path, caption: str) -> None:
    tracker = Tracker(tmp_path, first_step=0, **NO_PROJECT)
    tracker.show(1, [picture()], [caption])
    tracker.close()
    assert read_rows(tmp_path / "samples.jsonl")[0]["captions"] == [caption]
    assert len(events(tmp_path).Tensors("validation/captions/text_summary")) == 1


def test_without_pictures_nothing_is_shown(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, first_step=0, **NO_PROJECT)
    tracker.show(1, [], [])
    tracker.close()
    assert not (tmp_path / "samples.jsonl").exists()
    assert events(tmp_path).Tags()["images"] == []


class FakeWandb(types.ModuleType):
    """Weights & Biases as far as the tracker asks for it: like the real one, a run refuses to go back in steps.

    A run that is resumed goes on from the steps that the module remembers under its id.
    """

    class Error(Exception):
        """As wandb.Error."""

    class Image:
        """As wandb.Image."""

        def __init__(self, data: np.ndarray, *, caption: str) -> None:
            self.shape, self.caption = data.shape, caption

    def __init__(self) -> None:
        super().__init__("wandb")
        self.started: list[dict[str, Any]] = []
        self.logged: dict[str, list[tuple[int, dict[str, Any]]]] = {}
        self.num_finished = 0

    def init(self, **options: Any) -> "FakeRun":
        self.started.append(options)
        return FakeRun(self, self.logged.setdefault(options["id"], []))


class FakeRun:
    """As wandb.Run."""

    def __init__(self, module: FakeWandb, rows: list[tuple[int, dict[str, Any]]]) -> None:
        self._module, self._rows = module, rows

    @property
    def step(self) -> int:
        return self._rows[-1][0] if self._rows else 0

    def log(self, values: dict[str, Any], *, step: int) -> None:
        assert step >= self.step
        self._rows.append((step, dict(values)))

    def finish(self) -> None:
        self._module.num_finished += 1


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    module = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_weights_and_biases_gets_the_same_and_resumes_the_same_run(tmp_path: Path, wandb: FakeWandb) -> None:
    for first_step, steps in ((0, (10, 20)), (10, (20, 30))):
        tracker = Tracker(tmp_path, first_step=first_step, wandb_project="captions", settings={"encoder": "resnet18"})
        for step in steps:
            tracker.log(step, {"train/loss": first_step + 1.0})
        tracker.show(steps[-1], [picture()], ["a dog"])
        tracker.close()
    assert len(wandb.logged) == 1
    assert {(run["project"], run["resume"], run["dir"]) for run in wandb.started} == {
        ("captions", "allow", str(tmp_path))
    }
    assert all(run["config"] == {"encoder": "resnet18"} for run in wandb.started)
    assert wandb.num_finished == 2
    (rows,) = wandb.logged.values()
    losses = [(step, values["train/loss"]) for step, values in rows if "train/loss" in values]
    assert losses == [(10, 1.0), (20, 1.0), (20, 11.0), (30, 11.0)]
    images = [(step, values["validation/samples"][0]) for step, values in rows if "validation/samples" in values]
    assert [(step, image.caption, image.shape) for step, image in images] == [
        (20, "a dog", (48, 48, 3)),
        (30, "a dog", (48, 48, 3)),
    ]


def test_steps_that_weights_and_biases_is_past_are_not_told_again(tmp_path: Path, wandb: FakeWandb) -> None:
    for steps in ((10, 30), (20, 40)):
        tracker = Tracker(tmp_path, first_step=0, wandb_project="captions", settings={})
        for step in steps:
            tracker.log(step, {"train/loss": 1.0})
        tracker.close()
    (rows,) = wandb.logged.values()
    assert [step for step, _ in rows] == [10, 30, 40]
    assert [row["step"] for row in read_rows(tmp_path / "history.jsonl")] == [20, 40]


def test_without_a_project_weights_and_biases_is_not_touched(tmp_path: Path, wandb: FakeWandb) -> None:
    track(tmp_path, range(3))
    assert not wandb.started
    assert not (tmp_path / "wandb.txt").exists()


def test_a_missing_wandb_names_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    check_wandb(None)
    with pytest.raises(UserError, match="pip install wandb"):
        check_wandb("captions")


def test_a_wandb_that_does_not_start_says_what_to_do(
    tmp_path: Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: Any) -> None:
        raise FakeWandb.Error("no API key")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UserError, match=r"no API key.*wandb login.*WANDB_MODE=offline"):
        Tracker(tmp_path, first_step=0, wandb_project="captions", settings={})
