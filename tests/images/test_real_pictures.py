"""Real COCO pictures and a real pretrained encoder, where they are at hand: packed, trained on, captioned."""

import json
import re
import sys
from pathlib import Path

import pytest
import warm

REPOSITORY = Path(__file__).resolve().parents[2]
DATA = REPOSITORY.parent / "shared" / "data"
WEIGHTS = DATA / "weights" / "squeezenet1_1.pth"


@pytest.mark.slow
@pytest.mark.skipif(not WEIGHTS.exists(), reason=f"there is no {WEIGHTS}")
def test_real_pictures_go_the_whole_way(tmp_path: Path) -> None:
    def command(script: str, *flags: str) -> str:
        line = [sys.executable, str(REPOSITORY / script), *flags]
        return warm.run(line, nested=True, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    pictures, captions = str(DATA / "coco" / "images"), str(DATA / "coco" / "captions.json")
    source = ("--images", pictures, "--captions", captions, "--split", "train")
    command("sharding/make_shards.py", *source, "--output", "s", "--size", "128")
    printed = command(
        "train/main.py", "--shards", "s", "--output", "run", "--encoder", "squeezenet1_1", "--weights", str(WEIGHTS),
        "--epochs", "4", "--batch-size", "10", "--crop", "112", "--learning-rate", "5e-3", "--hidden-size", "128",
    )  # fmt: skip
    losses = [float(loss) for loss in re.findall(r"training loss ([\d.]+)", printed)]
    assert len(losses) == 4
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.8
    command("infer/main.py", "--model", "run/model", "--images", pictures, "--output", "captions.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text().splitlines()]
    assert len(rows) == 110
    assert not [row for row in rows if "error" in row]
    assert len({row["caption"] for row in rows}) > 1
