"""Every encoder's features and preprocessing, and its weights from every source."""

import hashlib
import io
import pickle
import re
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torchvision.models
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights, list_models, regnet

from captioner.errors import UserError
from captioner.images.views import IMAGENET_MEAN, IMAGENET_STD, ViewSpec, eval_view, normalise
from captioner.model.encoders import (
    Encoder,
    FixedCropError,
    Preprocessing,
    SmallImagesError,
    WeightsError,
    check_crop,
    load_encoder_weights,
    preprocessing,
)
from captioner.model.network import ModelConfig, build_model

SQUEEZENET = Path(__file__).parents[3] / "shared/data/weights/squeezenet1_1.pth"
SMALL = (
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "googlenet",
    "inception_v3",
    "maxvit_t",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "regnet_y_400mf",
    "resnet18",
    "shufflenet_v2_x0_5",
    "small_cnn",
    "squeezenet1_1",
    "swin_t",
    "swin_v2_t",
    "vgg11",
    "vit_b_32",
)
"""The cheapest of each family, run for real."""
LARGE = (
    "convnext_large",
    "densenet161",
    "efficientnet_b7",
    "efficientnet_v2_l",
    "mnasnet1_3",
    "mobilenet_v3_large",
    "regnet_y_128gf",
    "resnet152",
    "resnext101_64x4d",
    "shufflenet_v2_x2_0",
    "squeezenet1_0",
    "swin_b",
    "swin_v2_b",
    "vgg19_bn",
    "vit_h_14",
    "wide_resnet101_2",
)
"""The largest, of which only shapes are computed."""


def make_images(num_images: int, *, seed: int = 0, sides: int = 32) -> Tensor:
    return torch.randn(num_images, 3, sides, sides, generator=torch.Generator().manual_seed(seed))


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_features_tell_pictures_apart_at_the_native_size(name: str) -> None:
    torch.manual_seed(0)
    encoder = Encoder(name, trainable=False)
    features_BF = encoder(make_images(2, sides=preprocessing(name).crop))
    assert features_BF.shape == (2, encoder.num_features)
    assert encoder.num_features != 1000
    assert features_BF.isfinite().all()
    assert (features_BF[0] - features_BF[1]).norm() > 1e-3 * features_BF[0].norm() > 0


@pytest.mark.slow
def test_large_encoders_give_features_at_the_native_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, where shapes are computed and numbers are not; RegNet counts its layers with tensors."""
    count_layers = regnet.BlockParams.from_init_params

    def count_on_cpu(*args: Any, **options: Any) -> regnet.BlockParams:
        with torch.device("cpu"):
            return count_layers(*args, **options)

    monkeypatch.setattr(regnet.BlockParams, "from_init_params", count_on_cpu)
    wrong = {}
    for name in LARGE:
        crop = preprocessing(name).crop
        with torch.device("meta"):
            encoder = Encoder(name, trainable=False)
        shape = encoder(torch.empty(2, 3, crop, crop, device="meta")).shape
        if shape != (2, encoder.num_features) or encoder.num_features == 1000:
            wrong[name] = shape
    assert not wrong


CROPS = {"vit_b_32": 224, "maxvit_t": 224, "alexnet": 128, "inception_v3": 160}
QUICK = ("resnet18", "small_cnn", "squeezenet1_1")


def vector_of_map(name: str, network: Any, map_BFHW: Tensor) -> Tensor:
    """What the network's own pooling and the rest of its classifier make of its last feature map."""
    if name == "small_cnn":
        return map_BFHW[:, :, ::2, ::2].amax(dim=(2, 3))  # its last convolution has stride 2 for the vector
    if name == "maxvit_t":
        return network.classifier(map_BFHW)
    if name == "convnext_tiny":
        return network.classifier(network.avgpool(map_BFHW))
    if name in ("alexnet", "vgg11", "mobilenet_v3_small"):
        return network.classifier(network.avgpool(map_BFHW).flatten(1))
    return map_BFHW.mean(dim=(2, 3))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in SMALL]
)
def test_the_grid_is_what_the_network_pools(name: str) -> None:
    """With torchvision's own names in the state dict, and no parameter that is not needed."""
    torch.manual_seed(0)
    vector, grid = Encoder(name, trainable=False), Encoder(name, trainable=True, grid=True).eval()
    grid.load_state_dict({key: vector.state_dict()[key] for key in grid.state_dict()})
    crop = CROPS.get(name, 64)
    images_B3HW = make_images(2, sides=crop)
    grid_BRF = grid(images_B3HW)
    rows, columns = grid.grid_shape(crop)
    assert grid_BRF.shape == (2, rows * columns, grid.num_features)
    assert grid_BRF[0].std(dim=0).any()
    if name.startswith("vit_"):
        tokens: list[Tensor] = []
        cast(Any, vector.backbone).encoder.register_forward_hook(lambda _module, _inputs, output: tokens.append(output))
        vector(images_B3HW)
        torch.testing.assert_close(grid_BRF, tokens[0][:, 1:])
    else:
        map_BFHW = grid_BRF.transpose(1, 2).unflatten(2, (rows, columns))
        wanted_BF = vector_of_map(name, vector.backbone, map_BFHW).flatten(1)
        torch.testing.assert_close(vector(images_B3HW), wanted_BF, rtol=1e-4, atol=1e-5 * wanted_BF.abs().max().item())
    grid_BRF.square().sum().backward()
    assert all(parameter.grad is not None for parameter in grid.parameters())


def test_the_grid_goes_row_by_row() -> None:
    encoder = Encoder("small_cnn", trainable=False, grid=True)
    images_B3HW = torch.zeros(2, 3, 64, 64)
    images_B3HW[1, :, :8, -8:] = 5  # the corner at the upper right
    assert encoder.grid_shape(64) == (8, 8)
    before_RF, after_RF = encoder(images_B3HW)
    assert (after_RF - before_RF).norm(dim=1).argmax() in (6, 7, 14, 15)


def test_no_family_is_left_out() -> None:
    def family(name: str) -> str:
        return re.split(r"[^a-z]", name)[0]

    assert {family(name) for name in list_models(module=torchvision.models)} <= {family(name) for name in SMALL + LARGE}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_features_are_those_of_torchvisions_pretrained_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights stand for the downloaded ones, and torchvision's own builder gets to load them."""
    torch.manual_seed(0)
    weights = cast(Any, get_model_weights(name)).DEFAULT
    state = get_model(name, weights=None, init_weights=False, aux_logits=True).state_dict()
    monkeypatch.setattr(type(weights), "get_state_dict", lambda _weights, **_options: state)
    theirs = cast(Any, get_model(name, weights=weights)).eval()
    theirs.fc = nn.Identity()
    wanted = preprocessing(name)
    size = wanted.crop + 32  # an even difference: both then cut the same middle
    picture_HW3 = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    view = ViewSpec(size=size, crop=wanted.crop, mean=wanted.mean, std=wanted.std)
    ours = Encoder(name, trainable=False)
    ours.backbone.load_state_dict(theirs.state_dict(), strict=False)
    found_1F = ours(normalise(torch.from_numpy(eval_view(picture_HW3, crop=view.crop))[None], view))
    transform = weights.transforms(resize_size=size)
    wanted_1F = theirs(transform(torch.from_numpy(picture_HW3).permute(2, 0, 1))[None])
    assert wanted_1F.std() > 0
    torch.testing.assert_close(found_1F, wanted_1F, atol=1e-4 * wanted_1F.abs().max().item(), rtol=1e-4)


def test_preprocessing_is_that_of_the_weights() -> None:
    assert preprocessing("resnet152") == preprocessing("small_cnn")
    assert preprocessing("resnet152") == Preprocessing(crop=224, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    assert preprocessing("inception_v3").crop == 299
    assert preprocessing("efficientnet_v2_l") == Preprocessing(crop=480, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


@pytest.mark.parametrize("name", ["vit_b_32", "maxvit_t"])
def test_an_encoder_of_one_size_names_it(name: str) -> None:
    check_crop(name, crop=224, size=256)
    with pytest.raises(FixedCropError, match="224 pixels only, not of 192") as error:
        check_crop(name, crop=192, size=256)
    assert name in one_line(error)
    assert (error.value.encoder, error.value.crop, error.value.needed) == (name, 192, 224)


def test_shards_of_too_small_pictures_are_named_with_what_to_pack() -> None:
    check_crop("resnet18", crop=256, size=256)
    with pytest.raises(SmallImagesError, match=r"256 pixels, .* inception_v3 takes crops of 299$") as error:
        check_crop("inception_v3", crop=299, size=256)
    one_line(error)
    assert (error.value.crop, error.value.size, error.value.packed_size) == (299, 256, 342)
    for crop in (518, 224):
        with pytest.raises(SmallImagesError, match=r"crops of 518$") as error:
            check_crop("vit_h_14", crop=crop, size=256)
        assert error.value.packed_size == 592


@pytest.mark.parametrize("name", ["resnet19", "", "fasterrcnn_resnet50_fpn"])
@pytest.mark.parametrize("ask", [partial(Encoder, trainable=False), preprocessing])
def test_an_unknown_encoder_is_named(name: str, ask: Callable[[str], object]) -> None:
    with pytest.raises(UserError, match="resnet152") as error:
        ask(name)
    assert repr(name) in one_line(error)


# ---- the encoder's weights ----------------------------------------------------------------------------------


def load(weights: str | Path, name: str = "small_cnn") -> Encoder:
    encoder = Encoder(name, trainable=False)
    load_encoder_weights(encoder, name=name, weights=str(weights))
    return encoder


def full_state(name: str = "small_cnn", *, seed: int = 5) -> dict[str, Tensor]:
    """A state dict as torchvision saves it, with the classifier that captioning takes off."""
    torch.manual_seed(seed)
    state = Encoder(name, trainable=False).backbone.state_dict() | {"classifier.1.weight": torch.randn(10, 4)}
    return {key: tensor.contiguous() for key, tensor in state.items()}


def assert_holds(encoder: Encoder, state: dict[str, Tensor]) -> None:
    held = encoder.backbone.state_dict()
    assert len(held) > 10
    for name, tensor in held.items():
        assert torch.equal(tensor, state[name]), name


def test_a_real_state_dict_is_loaded_by_path() -> None:
    if not SQUEEZENET.exists():
        pytest.skip(f"there is no {SQUEEZENET}")
    state = torch.load(SQUEEZENET, weights_only=True)
    assert_holds(load(SQUEEZENET, "squeezenet1_1"), state)


@pytest.mark.parametrize("ending", [".pth", ".pt", ".safetensors"])
def test_saved_weights_come_back(tmp_path: Path, ending: str) -> None:
    path, state = tmp_path / f"weights{ending}", full_state()
    if ending == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    assert_holds(load(path), state)


OLD_KEYS = {
    "densenet121": (r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2"),
    "vit_b_32": (r"mlp\.([03])\.", lambda match: f"mlp.linear_{1 + int(match[1]) // 3}."),
    "mnasnet0_5": ("$^", ""),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OLD_KEYS)
def test_files_that_torchvision_translates_are_loaded(name: str, tmp_path: Path) -> None:
    """Its files of DenseNet and ViT have the names of older modules; those of MNASNet are told by a version."""
    shapes, path = Encoder(name, trainable=False).backbone.state_dict(), tmp_path / "weights.pth"
    state = {key: torch.tensor(n, dtype=like.dtype).expand_as(like) for n, (key, like) in enumerate(shapes.items())}
    old, new = OLD_KEYS[name]
    torch.save({re.sub(old, new, key): tensor for key, tensor in state.items()}, path)
    assert_holds(load(path, name), state)


def test_no_weights_leave_the_encoder_as_it_was() -> None:
    encoder = Encoder("small_cnn", trainable=False)
    before = {name: tensor.clone() for name, tensor in encoder.backbone.state_dict().items()}
    load_encoder_weights(encoder, name="small_cnn", weights="none")
    assert_holds(encoder, before)


def test_weights_of_another_architecture_are_refused_and_change_nothing(tmp_path: Path) -> None:
    encoder = Encoder("small_cnn", trainable=False)
    before = {name: tensor.clone() for name, tensor in encoder.backbone.state_dict().items()}
    state = full_state()
    first = next(iter(state))
    for number, wrong in enumerate((full_state("squeezenet1_1"), state | {first: torch.zeros(1)}, {"epoch": 3}, {})):
        path = tmp_path / f"{number}.pth"
        torch.save(wrong, path)
        with pytest.raises(WeightsError) as error:
            load_encoder_weights(encoder, name="small_cnn", weights=str(path))
        assert "small_cnn" in one_line(error)
        assert str(path) in str(error.value)
    assert_holds(encoder, before)


@pytest.mark.parametrize("content", [torch.zeros(3), [1, 2], "text", 7, {"features.0.weight": 3}])
def test_what_is_no_state_dict_is_refused(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    with pytest.raises(UserError, match=r"weights\.pth") as error:
        load(path)
    one_line(error)


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "content", [b"", b"\n", b"<html>\nnot found\n</html>\n", b"a\nb\nc\n", b"\x80\x02garbage", b"ccc"]
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, ending: str, content: bytes) -> None:
    path = tmp_path / f"weights{ending}"
    path.write_bytes(content)
    with pytest.raises(UserError, match="not a readable state dict") as error:
        load(path)
    assert str(path) in one_line(error)


@pytest.mark.parametrize("name", ["absent.pth", "absent.safetensors", ""])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(WeightsError) as error:
        load(tmp_path / name)
    assert str(tmp_path / name) in one_line(error)


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.99, 0.9999])
def test_truncated_weights_are_refused(tmp_path: Path, ending: str, share: float) -> None:
    path, state = tmp_path / f"weights{ending}", full_state()
    if ending == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(UserError, match="not a readable state dict") as error:
        load(path)
    one_line(error)


class Intruder:
    """Touches a file when it is unpickled."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.victim,)


@pytest.mark.parametrize("old_format", [False, True])
def test_objects_in_a_pickle_are_refused_and_never_run(tmp_path: Path, old_format: bool) -> None:
    victim, path = tmp_path / "touched", tmp_path / "weights.pth"
    pickle.loads(pickle.dumps(Intruder(victim)))
    assert victim.exists()  # it would do harm
    victim.unlink()
    torch.save(full_state() | {"x": Intruder(victim)}, path, _use_new_zipfile_serialization=not old_format)
    with pytest.raises(UserError, match="not a readable state dict") as error:
        load(path)
    one_line(error)
    path.write_bytes(pickle.dumps(Intruder(victim), protocol=2))
    with pytest.raises(UserError, match="not a readable state dict"):
        load(path)
    assert not victim.exists()


# ---- the default weights ------------------------------------------------------------------------------------

NAME = "squeezenet1_1"


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class's name)
        """Say nothing."""


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, str]]:
    """An empty folder, and the address that serves it; torch.hub caches in a folder of this test's own."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder = tmp_path / "served"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def publish(folder: Path, state: dict[str, Tensor], *, damaged: bool = False) -> str:
    """Write weights under a name that holds the beginning of their sha256, as torchvision's do."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    name = f"{NAME}-{hashlib.sha256(data).hexdigest()[:8]}.pth"
    (folder / name).write_bytes(data[:-1] if damaged else data)
    return name


def set_url(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setattr(cast(Any, get_model_weights(NAME)).DEFAULT.value, "url", url)


def test_default_weights_are_downloaded_once(served: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, address = served
    state = full_state(NAME)
    name = publish(folder, state)
    set_url(monkeypatch, f"{address}/{name}")
    assert_holds(load("default", NAME), state)
    (folder / name).unlink()
    assert_holds(load("default", NAME), state)


def test_a_failed_download_says_what_else_to_do(served: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, address = served
    damaged = publish(folder, full_state(NAME), damaged=True)
    for url in (f"{address}/absent-01234567.pth", f"{address}/{damaged}", "http://127.0.0.1:1/away-01234567.pth"):
        set_url(monkeypatch, url)
        with pytest.raises(WeightsError) as error:
            load("default", NAME)
        assert url in one_line(error)


def test_a_damaged_file_in_the_cache_is_named(served: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.hub checks hashes when it downloads, and trusts its cache after that."""
    folder, address = served
    name = publish(folder, full_state(NAME))
    set_url(monkeypatch, f"{address}/{name}")
    load("default", NAME)
    cached = Path(torch.hub.get_dir()) / "checkpoints" / name
    for content in (b"", b"text\n", cached.read_bytes()[:5000]):
        cached.write_bytes(content)
        with pytest.raises(WeightsError) as error:
            load("default", NAME)
        one_line(error)


def test_an_encoder_without_default_weights_says_so() -> None:
    with pytest.raises(WeightsError) as error:
        load("default", "small_cnn")
    assert "small_cnn" in one_line(error)


def test_nothing_else_of_the_model_is_touched_by_weights(tmp_path: Path) -> None:
    model = build_model(ModelConfig(encoder="small_cnn", vocabulary_size=10, embedding_size=6, hidden_size=7))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path = tmp_path / "weights.pth"
    torch.save(full_state(), path)
    load_encoder_weights(model.encoder, name="small_cnn", weights=str(path))
    assert isinstance(model.encoder.backbone, nn.Sequential)
    for name, tensor in model.state_dict().items():
        if not name.startswith("encoder."):
            assert torch.equal(tensor, before[name]), name
    assert not torch.equal(model.state_dict()["encoder.backbone.0.weight"], before["encoder.backbone.0.weight"])
