"""Real COCO pictures and a real pretrained encoder, where they are at hand: packed, trained on, captioned."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import warm
from torch.nn.functional import normalize

from captioner.images import loading
from captioner.images.views import ViewSpec, eval_view, normalise
from captioner.model.encoders import Encoder, load_encoder_weights
from sharding.settings import ShardSettings

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
    command("train/evaluate.py", "--model", "run/model", "--shards", "s", "--split", "train")
    from_shards = {row["image_id"]: row["caption"] for row in json.loads((tmp_path / "results.json").read_text())}
    assert len(rows) == 110
    assert not [row for row in rows if "error" in row]
    assert len({row["caption"] for row in rows}) > 1
    same = [row["caption"] == from_shards[int(Path(row["path"]).stem)] for row in rows]
    assert sum(same) >= 0.9 * len(rows)


@pytest.mark.skipif(not WEIGHTS.exists(), reason=f"there is no {WEIGHTS}")
def test_features_through_shards_are_those_through_captioning(tmp_path: Path) -> None:
    """Stored images are JPEGs of quality 90 with 4:2:0; captioning sees the resized image itself."""
    files = [photo.read_bytes() for photo in sorted((DATA / "coco" / "images").iterdir())[:30]]
    stored = loading.to_stored_jpegs(files, size=256, resize="squash", quality=ShardSettings.quality)
    through_shards = [loading.decode_stored(found.data) for found in stored if isinstance(found, loading.StoredJpeg)]
    resized = [np.asarray(loading.load_resized(data, size=256, resize="squash").image) for data in files]
    encoder = Encoder("squeezenet1_1", trainable=False)
    load_encoder_weights(encoder, name="squeezenet1_1", weights=str(WEIGHTS))
    spec = ViewSpec()
    found, wanted = (
        normalize(encoder(normalise(torch.from_numpy(np.stack([eval_view(i, crop=spec.crop) for i in images])), spec)))
        for images in (through_shards, resized)
    )
    assert (found * wanted).sum(1).mean() > 0.985
    assert (found[1:] * wanted[:-1]).sum(1).mean() < 0.9  # those of other images
