"""Cached features: the same losses as without them, made once by all ranks, refused when they are of anything else."""

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from accelerate import Accelerator
from torch.optim.lr_scheduler import LambdaLR
from trainer import run_training

from captioner.errors import UserError
from captioner.images.views import ViewSpec
from captioner.model.network import ModelConfig, build_model
from captioner.streaming import StreamingLoader
from captioner.streaming.dataset import Split, read_split
from captioner.streaming.reader import SampleError
from captioner.vocabulary import Vocabulary
from train.data.batches import CaptionBatch, caption_loader
from train.data.features import FeatureFiles
from train.data.folders import read_merged_vocabulary
from train.run.encode import encoder_fingerprint, prepare_features
from train.step.schedule import make_optimizer
from train.step.step import CaptionLoss, TrainStep

SIZES = [5, 0, 7, 3]
VIEW = ViewSpec(size=32, crop=28)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    tiny.write_shards(folder, SIZES)
    tiny.write_shards(folder, [4], split="val", first=30)
    return folder


@pytest.fixture
def shards(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "shards"))


class Setting:
    """A split and a model in this process, and what makes and reads their features."""

    def __init__(
        self, shards: Path, *, seed: int = 0, workers: int = 0, tolerate: int = 0, view: ViewSpec = VIEW
    ) -> None:
        self.accelerator = Accelerator(cpu=True)
        self.split: Split = read_split([str(shards)], "train", remedy="")
        self.vocabulary: Vocabulary = read_merged_vocabulary([str(shards)])
        torch.manual_seed(seed)
        config = ModelConfig(encoder="small_cnn", vocabulary_size=len(self.vocabulary), embedding_size=8, hidden_size=9)
        self.loss_model = CaptionLoss(build_model(config), view=view)
        self.cache = str(shards / "cache")
        self.open_loader = partial(
            caption_loader,
            batch_size=4,
            crop=view.crop,
            max_tokens=9,
            vocabulary=self.vocabulary,
            num_workers=workers,
            cache=self.cache,
            tolerate_bad_samples=tolerate,
        )

    def prepare(self) -> FeatureFiles:
        found = prepare_features(
            [self.split],
            loss_model=self.loss_model,
            open_loader=self.open_loader,
            cache=self.cache,
            accelerator=self.accelerator,
        )
        return found["train"]

    def loader(self, files: FeatureFiles | None) -> StreamingLoader:
        """Of epochs in order, without crops and flips."""
        return self.open_loader(self.split, features=files)

    def batches(self, files: FeatureFiles | None) -> list[CaptionBatch]:
        return [batch for (batch,) in self.loader(files)]


@pytest.mark.parametrize("workers", [0, 2])
def test_losses_are_those_without_them(shards: Path, workers: int) -> None:
    """Of each step of an epoch, in float32; the steps themselves change the weights."""
    losses = []
    for cached in (False, True):
        setting = Setting(shards, workers=workers)
        files = setting.prepare() if cached else None
        optimizer = make_optimizer(setting.loss_model.model, 1e-2, encoder_learning_rate=0.0)
        schedule = LambdaLR(optimizer, lambda _step: 1.0)
        step = TrainStep(setting.loss_model.train(), optimizer, schedule, setting.accelerator)
        batches = setting.batches(files)
        assert [batch.inputs.dim() for batch in batches] == [2 if cached else 4] * 4
        losses.append([float(record[0] / record[1]) for record in (step([batch]) for batch in batches)])
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    assert len(set(losses[0])) == 4


def test_they_are_made_once(shards: Path) -> None:
    files = Setting(shards).prepare()
    assert [path.name for path in files.paths] == [f"train-00000{number}.features" for number in range(4)]
    before = [path.stat().st_mtime_ns for path in files.paths]
    again = Setting(shards).prepare()
    assert [path.stat().st_mtime_ns for path in again.paths] == before
    files.paths[2].unlink()  # as if it had been killed before
    assert Setting(shards).prepare().missing() == []
    assert [path.stat().st_mtime_ns == time for path, time in zip(files.paths, before, strict=True)] == [
        True, True, False, True,
    ]  # fmt: skip


def test_behind_urls_they_are_known_by_the_shard_and_not_by_its_address(shards: Path, tmp_path: Path) -> None:
    split = read_split([str(shards)], "train", remedy="")
    facts: dict[str, Any] = {"encoder": "small_cnn", "num_features": 256, "fingerprint": "f", "cache": tmp_path}
    addresses = ("s3://bucket/shards", "s3://bucket/shards/", "http://host/shards")
    found = {FeatureFiles.of(replace(split, folders=(address,)), **facts).paths for address in addresses}
    assert len(found) == 1
    assert len(set(*found)) == len(SIZES)


def test_pictures_are_not_read_for_them(shards: Path) -> None:
    setting = Setting(shards)
    files = setting.prepare()
    tar = shards / "train-000002.tar"
    data = bytearray(tar.read_bytes())
    data[1000] ^= 1  # in the first picture
    tar.write_bytes(data)
    assert sum(batch.num_samples for batch in setting.batches(files)) == 15
    with pytest.raises(UserError, match="checksum differs"):
        setting.batches(None)


# ---- refused ------------------------------------------------------------------------------------------------


def test_those_of_another_encoder_or_crop_are_refused(shards: Path) -> None:
    Setting(shards).prepare()
    for other in (Setting(shards, seed=1), Setting(shards, view=ViewSpec(size=32, crop=24))):
        with pytest.raises(
            UserError, match=r"another encoder, its weights, crop or precision: delete .*features-small_cnn"
        ):
            other.prepare()


def test_those_of_another_shard_are_refused(shards: Path) -> None:
    files = Setting(shards).prepare()
    shutil.copy(files.paths[0], files.paths[3])
    with pytest.raises(UserError, match="holds features of another shard"):
        Setting(shards).prepare()
    files.paths[3].unlink()
    other = tiny.write_shards(shards / "other", [5], first=60)
    Setting(Path(other)).prepare()
    shutil.copy(Path(other) / "features-small_cnn" / "train-000000.features", files.paths[0])
    with pytest.raises(UserError, match="holds features of another shard"):
        Setting(shards).prepare()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.5, 0.99, 0.9999])
def test_a_cut_file_is_refused(shards: Path, share: float) -> None:
    files = Setting(shards).prepare()
    data = files.paths[0].read_bytes()
    files.paths[0].write_bytes(data[: int(share * len(data))])
    with pytest.raises(
        UserError, match=r"train-000000.features is not a whole feature file .* delete .*features-small"
    ):
        Setting(shards).prepare()


def test_a_flipped_bit_is_found_when_its_row_is_read(shards: Path) -> None:
    files = Setting(shards).prepare()
    data = bytearray(files.paths[2].read_bytes())
    row = np.array(files.open(2).rows[3])
    data[data.index(row.tobytes()) + 17] ^= 1
    files.paths[2].unlink()
    files.paths[2].write_bytes(data)
    damaged = files.open(2)
    for place in range(SIZES[2]):
        if place == 3:
            with pytest.raises(SampleError, match=r"train-000002.features is damaged at sample 3"):
                damaged.read_into(row, place)
        else:
            damaged.read_into(row, place)


def test_a_picture_that_could_not_be_read_stays_out(shards: Path) -> None:
    tar = shards / "train-000000.tar"
    data = bytearray(tar.read_bytes())
    data[1000] ^= 1
    tar.write_bytes(data)
    with pytest.raises(UserError, match="checksum differs"):
        Setting(shards).prepare()
    setting = Setting(shards, tolerate=1)
    loader = setting.loader(setting.prepare())
    assert sum(batch.num_samples for (batch,) in loader) == 14
    (skip,) = loader.ledger.skipped
    assert skip.reason == "no features"


def test_another_encoder_has_another_fingerprint() -> None:
    def fingerprint(seed: int, view: ViewSpec = VIEW) -> str:
        torch.manual_seed(seed)
        return encoder_fingerprint(build_model(ModelConfig(encoder="small_cnn", vocabulary_size=5)).encoder, view)

    assert fingerprint(0) == fingerprint(0)
    assert len({fingerprint(0), fingerprint(1), fingerprint(0, ViewSpec(size=32, crop=20))}) == 3


# ---- whole runs ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_ranks_make_them_together_and_train(shards: Path, tmp_path: Path) -> None:
    weights = tmp_path / "encoder.safetensors"
    _save_encoder(weights)
    flags = ["--shards", shards, "--output", tmp_path / "run", "--encoder", "small_cnn", "--weights", weights]
    flags += ["--crop", 28, "--batch-size", 4, "--epochs", 2, "--cache-features", "--workers", 0]
    flags += ["--embedding-size", 8, "--hidden-size", 9]
    done = run_training(flags, log=tmp_path / "log", world_size=2)
    assert done.code == 0, done.output
    assert len(list((shards / "features-small_cnn").glob("*.features"))) == 5
    assert "planned 15, read 15, decoded 15, skipped 0" in done.output
    refused = run_training([*flags, "--finetune-encoder-from-step", 0], log=tmp_path / "log2")
    assert refused.code == 2
    assert "leave out one of them" in refused.output


def _save_encoder(path: Path) -> None:
    from safetensors.torch import save_file

    model = build_model(ModelConfig(encoder="small_cnn", vocabulary_size=5))
    save_file({name: tensor.contiguous() for name, tensor in model.encoder.backbone.state_dict().items()}, path)
