"""From a handful of captioned pictures to captions by the documented commands, with no number that JSON cannot hold."""

import csv
import json
from pathlib import Path

import pytest
from tiny import picture
from trainer import run_training, start

from sharding import make_shards
from sharding.settings import ShardSettings

pytestmark = pytest.mark.slow

CAPTIONS = ["A brown dog runs on grass.", "Two cats sleep on a sofa.", "A red car in the rain.", "A dog sleeps."]
TINY = ["--encoder", "small_cnn", "--weights", "none", "--finetune-encoder-from-step", 0, "--crop", 32]


def pack(folder: Path, split: str, num_pictures: int) -> None:
    """Pictures with one caption each, packed with the defaults that decide the vocabulary."""
    photos = folder / split
    photos.mkdir()
    rows = [(f"{number}.png", CAPTIONS[number % len(CAPTIONS)]) for number in range(num_pictures)]
    for number, (name, _) in enumerate(rows):
        picture(number).save(photos / name)
    with (folder / f"{split}.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *rows])
    paths = {"images": str(photos), "captions": str(folder / f"{split}.csv"), "output": str(folder / "shards")}
    make_shards.main(ShardSettings(**paths, split=split, size=36, workers=1))  # type: ignore[arg-type]


def read_strictly(path: Path) -> list[dict]:
    """The values of a JSON or JSONL file, in which no number is infinite or none."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{path} holds {constant}")

    text = path.read_text()
    parts = text.splitlines() if path.suffix == ".jsonl" else [text]
    return [json.loads(part, parse_constant=refuse) for part in parts]


@pytest.mark.parametrize(("num_train", "num_val"), [(1, 0), (3, 1), (30, 3)])
def test_few_pictures_give_a_model_that_captions_with_any_beam(tmp_path: Path, num_train: int, num_val: int) -> None:
    pack(tmp_path, "train", num_train)
    if num_val:
        pack(tmp_path, "val", num_val)
    run, photos = tmp_path / "run", tmp_path / "train"
    done = run_training(["--shards", tmp_path / "shards", "--output", run, *TINY, "--epochs", 1], log=tmp_path / "log")
    assert done.code == 0, done.output
    for beam_size in (1, 3, 50):
        output = tmp_path / f"captions-{beam_size}.jsonl"
        line = ["--model", run / "model", "--images", photos, "--output", output, "--beam-size", beam_size]
        done = start("infer/main.py", [*line, "--workers", 1, "--captions-per-image", 5], log=tmp_path / "log").wait()
        assert done.code == 0, done.output
        rows = read_strictly(output)
        assert len(rows) == num_train
        assert all(row["caption"] and len(row["captions"]) == 5 for row in rows)
    for path in [*run.glob("*.json*"), *run.glob("model/*.json")]:
        read_strictly(path)
