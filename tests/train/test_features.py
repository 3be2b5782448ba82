"""Cached features: the same losses as without them, made once by all ranks, refused when they are of anything else."""

import errno
import os
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.numpy import save_file
from torch.optim.lr_scheduler import LambdaLR
from trainer import run_training

from captioner.errors import UserError
from captioner.files.locks import open_locked
from captioner.images.views import ViewSpec
from captioner.model.network import DecoderKind, ModelConfig, build_model
from captioner.streaming import StreamingLoader
from captioner.streaming.dataset import Split, read_split
from captioner.streaming.reader import SampleError
from captioner.vocabulary import Vocabulary
from train.data.batches import CaptionBatch, caption_loader
from train.data.features import FeatureFile, FeatureFiles
from train.data.folders import read_merged_vocabulary
from train.run.encode import encoder_fingerprint, prepare_features
from train.step.schedule import make_optimizer
from train.step.step import CaptionLoss, TrainStep

SIZES = [5, 0, 7, 3]
VIEW = ViewSpec(size=32, crop=28)
FOLDERS: dict[DecoderKind, str] = {"vector": "features-small_cnn", "attention": "features-small_cnn-grid"}
ROWS: dict[DecoderKind, tuple[tuple[int, ...], torch.dtype]] = {
    "vector": ((256,), torch.float32),
    "attention": ((16, 256), torch.float16),
}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    tiny.write_shards(folder, SIZES)
    tiny.write_shards(folder, [4], split="val", first=30)
    return folder


@pytest.fixture(params=FOLDERS)
def decoder(request: pytest.FixtureRequest) -> DecoderKind:
    """Pooled features, and grids."""
    return request.param


@pytest.fixture
def shards(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "shards"))


class Setting:
    """A split and a model in this process, and what makes and reads their features."""

    def __init__(
        self,
        shards: Path,
        decoder: DecoderKind = "vector",
        *,
        seed: int = 0,
        workers: int = 0,
        tolerate: int = 0,
        view: ViewSpec = VIEW,
    ) -> None:
        self.accelerator = Accelerator(cpu=True)
        self.split: Split = read_split([str(shards)], "train", remedy="")
        self.vocabulary: Vocabulary = read_merged_vocabulary([str(shards)])
        torch.manual_seed(seed)
        words = len(self.vocabulary)
        config = ModelConfig(
            encoder="small_cnn", vocabulary_size=words, decoder=decoder, embedding_size=8, hidden_size=8
        )
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

    def prepare(self, *, mirrored: bool = False) -> FeatureFiles:
        found = prepare_features(
            [self.split],
            loss_model=self.loss_model,
            open_loader=self.open_loader,
            cache=self.cache,
            accelerator=self.accelerator,
            mirrored=mirrored,
        )
        return found["train"]

    def loader(self, files: FeatureFiles | None) -> StreamingLoader:
        """Of epochs in order, without crops and flips."""
        return self.open_loader(self.split, features=files)

    def batches(self, files: FeatureFiles | None) -> list[CaptionBatch]:
        return [batch for (batch,) in self.loader(files)]


@pytest.mark.parametrize("workers", [0, 2])
def test_losses_are_those_without_them(shards: Path, workers: int, decoder: DecoderKind) -> None:
    """Of each step of an epoch; the steps themselves change the weights. Grids are rounded to float16."""
    losses = []
    for cached in (False, True):
        setting = Setting(shards, decoder, workers=workers)
        files = setting.prepare() if cached else None
        optimizer = make_optimizer(setting.loss_model.model, 1e-2, encoder_learning_rate=0.0)
        schedule = LambdaLR(optimizer, lambda _step: 1.0)
        step = TrainStep(setting.loss_model.train(), optimizer, schedule, setting.accelerator)
        batches = setting.batches(files)
        inputs = {(tuple(batch.inputs.shape[1:]), batch.inputs.dtype) for batch in batches}
        assert inputs == {ROWS[decoder] if cached else ((28, 28, 3), torch.uint8)}
        losses.append([float(record[0] / record[1]) for record in (step([batch]) for batch in batches)])
    assert losses[1] == pytest.approx(losses[0], abs=1e-4 if decoder == "vector" else 1e-3)
    assert len(set(losses[0])) == 4


def test_they_are_made_once(shards: Path, decoder: DecoderKind) -> None:
    files = Setting(shards, decoder).prepare()
    assert [path.name for path in files.paths] == [f"train-00000{number}.features" for number in range(4)]
    before = [path.stat().st_mtime_ns for path in files.paths]
    again = Setting(shards, decoder).prepare()
    assert [path.stat().st_mtime_ns for path in again.paths] == before
    files.paths[2].unlink()  # as if it had been killed before
    assert Setting(shards, decoder).prepare().missing() == []
    assert [path.stat().st_mtime_ns == time for path, time in zip(files.paths, before, strict=True)] == [
        True, True, False, True,
    ]  # fmt: skip


def test_behind_urls_they_are_known_by_the_shard_and_not_by_its_address(shards: Path, tmp_path: Path) -> None:
    split = read_split([str(shards)], "train", remedy="")
    facts: dict[str, Any] = {"encoder": "small_cnn", "row_shape": (256,), "fingerprint": "f", "cache": tmp_path}
    addresses = ("s3://bucket/shards", "s3://bucket/shards/", "http://host/shards")
    found = {FeatureFiles.of(replace(split, folders=(address,)), **facts).paths for address in addresses}
    assert len(found) == 1
    assert len(set(*found)) == len(SIZES)


def test_each_kind_of_features_has_a_folder_of_its_own(shards: Path, tmp_path: Path) -> None:
    split = read_split([str(shards)], "train", remedy="")
    facts: dict[str, Any] = {"fingerprint": "f", "cache": tmp_path}
    names = [
        FeatureFiles.of(split, encoder=encoder, row_shape=shape, mirrored=mirrored, **facts)
        .paths[0]
        .parent.relative_to(shards)
        for encoder, mirrored in (("small_cnn", False), ("timm/resnet18.a1_in1k", False), ("small_cnn", True))
        for shape in ((256,), (4, 256))
    ]
    assert [str(name) for name in names] == [
        "features-small_cnn",
        "features-small_cnn-grid",
        "features-timm-resnet18.a1_in1k",
        "features-timm-resnet18.a1_in1k-grid",
        "features-small_cnn-mirrored",
        "features-small_cnn-grid-mirrored",
    ]


def test_mirrored_ones_are_those_of_flipped_views(shards: Path, decoder: DecoderKind) -> None:
    """In training a sample has one of both by chance, as its view would be flipped, or none that names a side."""
    setting = Setting(shards, decoder)
    files = {"features": setting.prepare(), "mirrored_features": setting.prepare(mirrored=True)}
    views = {p: view for batch in setting.batches(None) for p, view in zip(batch.positions, batch.inputs, strict=True)}
    with torch.no_grad():
        wanted = {
            (int(position), flipped): setting.loss_model.features(view.flip(1)[None] if flipped else view[None])[0]
            for position, view in views.items()
            for flipped in (False, True)
        }
    found = []
    for workers in (0, 2):
        loader = setting.open_loader(setting.split, training=True, seed=5, num_workers=workers, **files)
        number_of = {f"train-{n:09}": n for n in views}
        taken = {}
        for epoch in range(6):
            for (batch,) in loader:
                for key, captions, row in zip(batch.keys, batch.references, batch.inputs.float(), strict=True):
                    errors = [float((wanted[number_of[key], flipped] - row).abs().max()) for flipped in (False, True)]
                    assert min(errors) < 1e-2 < max(errors)
                    assert errors[0] < errors[1] or not re.search(r"\b(left|right)", " ".join(captions).lower())
                    taken[epoch, key] = errors[1] < errors[0]
        found.append(taken)
    assert found[0] == found[1]
    assert 0.3 < np.mean(list(found[0].values())) < 0.7


def test_their_size_is_printed_before_the_first_image_is_encoded(
    shards: Path, decoder: DecoderKind, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = []

    def encode_nothing(*_: Any, **__: Any) -> Iterator[tuple[int, np.ndarray]]:
        printed.append(capsys.readouterr().out)
        yield from ()

    monkeypatch.setattr("train.run.encode.encode_split", encode_nothing)
    files = Setting(shards, decoder).prepare()
    shape = {"vector": "256 in float32: 0.0 MB", "attention": "16 x 256 in float16: 0.1 MB"}[decoder]
    assert printed == [f"encoding train: 15 images, features of {shape} in {shards / FOLDERS[decoder]}\n"]
    Setting(shards, decoder).prepare()
    assert "features of" not in capsys.readouterr().out
    grids = replace(files, shards=(replace(files.shards[0], samples=118_287),), row_shape=(49, 2048))
    assert "features of 49 x 2,048 in float16: 23.7 GB in" in grids.describe([0])


def test_files_written_by_safetensors_are_read(shards: Path) -> None:
    """As those of pooled features were before grids."""
    files = Setting(shards).prepare()
    expected = [batch.inputs for batch in Setting(shards).batches(files)]
    for path in files.paths:
        with safe_open(path, "numpy") as file:
            arrays, metadata = (
                {name: file.get_tensor(name) for name in ("features", "crc32s", "usable")},
                file.metadata(),
            )
        save_file(arrays, path, metadata=metadata)
    assert files.missing() == []
    found = [batch.inputs for batch in Setting(shards).batches(files)]
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_shards_are_closed_when_too_many_are_open(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = Setting(shards).prepare()
    opened, open_file = [], FeatureFiles.open

    def open_and_note(self: FeatureFiles, number: int) -> FeatureFile:
        opened.append(open_file(self, number))
        return opened[-1]

    monkeypatch.setattr("train.data.batches.MAX_OPEN_FILES", 1)
    monkeypatch.setattr(FeatureFiles, "open", open_and_note)
    assert sum(batch.num_samples for batch in Setting(shards).batches(files)) == 15
    assert [feature_file.file.closed for feature_file in opened] == [True, True, False]


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


def test_those_of_another_encoder_or_crop_are_refused(shards: Path, decoder: DecoderKind) -> None:
    Setting(shards, decoder).prepare()
    for other in (
        Setting(shards, decoder, seed=1),
        Setting(shards, decoder, view=ViewSpec(size=32, crop=24)),  # for which the grid has the same shape
    ):
        with pytest.raises(
            UserError, match=f"another encoder, its weights, crop or precision: delete .*{FOLDERS[decoder]} "
        ):
            other.prepare()


def test_grids_are_not_read_as_vectors(shards: Path) -> None:
    """Although a backbone has the same weights, and so the same fingerprint, for both."""
    vectors, grids = Setting(shards).prepare(), Setting(shards, "attention").prepare()
    assert vectors.fingerprint == grids.fingerprint
    shutil.copy(grids.paths[0], vectors.paths[0])
    with pytest.raises(UserError, match="of another encoder"):
        Setting(shards).prepare()


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
def test_a_cut_file_is_refused(shards: Path, decoder: DecoderKind, share: float) -> None:
    files = Setting(shards, decoder).prepare()
    os.truncate(files.paths[0], int(share * files.paths[0].stat().st_size))
    with pytest.raises(
        UserError, match=r"train-000000.features is not a whole feature file .* delete .*features-small"
    ):
        Setting(shards, decoder).prepare()


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip_bit(opened: FeatureFile, start: int) -> None:
    """In the byte at `start`."""
    data = bytearray(opened.path.read_bytes())
    data[start] ^= 1
    opened.path.write_bytes(data)


def cut(opened: FeatureFile, start: int) -> None:
    """Before the byte at `start`."""
    os.truncate(opened.path, start)


@pytest.mark.parametrize(("damage", "is_read"), [(flip_bit, [1, 1, 1, 0, 1, 1, 1]), (cut, [1, 1, 1, 0, 0, 0, 0])])
def test_damage_is_found_when_its_row_is_read(
    shards: Path, decoder: DecoderKind, damage: Callable[[FeatureFile, int], None], is_read: list[int]
) -> None:
    """Also when a file is cut after it was opened."""
    files = Setting(shards, decoder).prepare()
    opened = files.open(2)
    row = np.empty(files.row_shape, files.dtype)
    damage(opened, opened.start + 3 * row.nbytes + 17)
    for index, is_good in enumerate(is_read):
        if is_good:
            opened.read_into(row, index)
        else:
            with pytest.raises(SampleError, match=rf"train-000002.features is damaged at sample {index}"):
                opened.read_into(row, index)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_failing_disk_is_one_line(shards: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    setting = Setting(shards, "attention", workers=workers)
    files = setting.prepare()
    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(UserError, match=r"cannot read .*\.features \(Input/output error\): fix this and run again"):
        setting.batches(files)


@pytest.mark.parametrize("value", [65_505.0, -1e6, float("inf"), float("nan")])
def test_what_float16_cannot_hold_is_refused(shards: Path, value: float) -> None:
    files = Setting(shards, "attention").prepare()
    files.paths[3].unlink()
    good, bad = np.full(files.row_shape, -65_504, np.float32), np.zeros(files.row_shape, np.float32)
    bad[2, 5] = value
    with pytest.raises(UserError, match=r"sample 1 of train-000003 reach .* at most 65,504 \(float16\): leave out"):
        files.write(3, [good, bad, good])
    assert files.missing() == [3]
    files.write(3, [good, None, good])
    row = np.empty(files.row_shape, files.dtype)
    files.open(3).read_into(row, 2)
    assert np.array_equal(row, good)


def test_a_full_disk_is_one_line_and_leaves_whole_files_only(shards: Path, decoder: DecoderKind) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    setting = Setting(shards, decoder)
    row_bytes = int(np.prod(ROWS[decoder][0])) * ROWS[decoder][1].itemsize
    resource.setrlimit(resource.RLIMIT_FSIZE, (6 * row_bytes, limits[1]))  # the third shard has 7 rows
    try:
        with pytest.raises(UserError, match=r"cannot keep features beside the shards .*File too large"):
            setting.prepare()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names_in(shards / FOLDERS[decoder]) == ["train-000000.features", "train-000001.features"]
    assert setting.prepare().missing() == []


def test_partial_files_of_killed_runs_are_deleted(shards: Path, decoder: DecoderKind) -> None:
    """Not those of a run that is writing: they are locked."""
    files = Setting(shards, decoder).prepare()
    left, locked = (files.paths[0].with_name(f"train-000000.features.{name}.partial") for name in "ab")
    left.write_bytes(b"a part")
    with open_locked(locked):
        Setting(shards, decoder).prepare()
        assert (left.exists(), locked.exists()) == (False, True)
    partials: list[Path] = []

    def rows() -> Iterator[None]:
        partials.extend(files.paths[0].parent.glob("*.partial"))
        files.delete_partials()
        partials.extend(files.paths[0].parent.glob("*.partial"))
        yield from [None] * SIZES[0]

    locked.unlink()
    files.write(0, rows())
    assert len(partials) == 2
    assert partials[0] == partials[1]
    assert not partials[0].exists()


def test_a_picture_that_could_not_be_read_stays_out(
    shards: Path, decoder: DecoderKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.step.step.ENCODE_BATCH_SIZE", SIZES[0])
    tar = shards / "train-000002.tar"
    data = bytearray(tar.read_bytes())
    data[1000] ^= 1
    tar.write_bytes(data)
    with pytest.raises(UserError, match="checksum differs"):
        Setting(shards, decoder).prepare()
    assert names_in(shards / FOLDERS[decoder]) == ["train-000000.features", "train-000001.features"]
    setting = Setting(shards, decoder, tolerate=1)
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
def test_two_ranks_make_them_together_and_train(shards: Path, tmp_path: Path, decoder: DecoderKind) -> None:
    weights = tmp_path / "encoder.pth"
    _save_encoder(weights)
    flags = ["--shards", shards, "--output", tmp_path / "run", "--encoder", "small_cnn", "--weights", weights]
    flags += ["--crop", 28, "--batch-size", 4, "--epochs", 2, "--cache-features", "--workers", 0]
    flags += ["--decoder", decoder]
    flags += ["--embedding-size", 8, "--hidden-size", 9]
    done = run_training(flags, log=tmp_path / "log", world_size=2)
    assert done.code == 0, done.output
    assert len(list((shards / FOLDERS[decoder]).glob("*.features"))) == 5
    assert "planned 15, read 15, decoded 15, skipped 0" in done.output
    refused = run_training([*flags, "--finetune-encoder-from-step", 0], log=tmp_path / "log2")
    assert refused.code == 2
    assert "leave out one of them" in refused.output


def _save_encoder(path: Path) -> None:
    model = build_model(ModelConfig(encoder="small_cnn", vocabulary_size=5))
    torch.save(model.encoder.backbone.state_dict(), path)
