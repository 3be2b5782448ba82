"""The model against a plain reference, what freezing promises, and the encoder's weights from every source."""

import hashlib
import io
import pickle
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchvision.models import get_model_weights

from captioner.cli import UserError
from captioner.model import CaptionModel, Encoder, ImageInput, ModelConfig, PackedCaptions, load_encoder_weights
from captioner.vocabulary import END, START

SQUEEZENET = Path(__file__).parents[2] / "shared/data/weights/squeezenet1_1.pth"
FORMS: tuple[ImageInput, ...] = ("first", "every-step")
CAPTIONS = [[[4, 5, 6], [7], [9, 8, 7, 6, 5, 4]], [[5, 5]], [[6, 4, 9, 8], [8, 4, 9, 6, 7]]]
"""Of three images; with at most 4 tokens two are cut, and one is exactly as long as allowed."""
MAX_TOKENS = 4
FAMILIES = (
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "googlenet",
    "inception_v3",
    "maxvit_t",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "resnet18",
    "resnet152",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "swin_t",
    "vgg11",
    "vit_b_16",
    "small_cnn",
)


def make_model(image_input: ImageInput = "first", *, trainable: bool = False, seed: int = 0) -> CaptionModel:
    torch.manual_seed(seed)
    config = ModelConfig(
        encoder="small_cnn", vocabulary_size=10, embedding_size=6, hidden_size=7, image_input=image_input
    )
    return CaptionModel(config, encoder_trainable=trainable)


def make_images(num_images: int, *, seed: int = 0, sides: int = 32) -> Tensor:
    return torch.randn(num_images, 3, sides, sides, generator=torch.Generator().manual_seed(seed))


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


# ---- loss and gradients -------------------------------------------------------------------------------------


def reference_loss(model: CaptionModel, images: Tensor, captions_of_images: list[list[list[int]]]) -> Tensor:
    """Summed cross-entropy, one caption and one token at a time, with the LSTM and batch norm written out."""
    projected_BE = model.encoder(images) @ model.project.weight.T + model.project.bias
    mean_E, variance_E = projected_BE.mean(dim=0), projected_BE.var(dim=0, unbiased=False)
    normal_BE = (projected_BE - mean_E) / (variance_E + model.norm.eps).sqrt()
    image_BE = normal_BE * model.norm.weight + model.norm.bias
    weights = {name: cast(Tensor, parameter) for name, parameter in model.lstm.named_parameters()}

    def cell(input_E: Tensor, hidden_H: Tensor, cell_H: Tensor) -> tuple[Tensor, Tensor]:
        gates = weights["weight_ih_l0"] @ input_E + weights["bias_ih_l0"]
        gates = gates + weights["weight_hh_l0"] @ hidden_H + weights["bias_hh_l0"]
        entry, forget, candidate, out = gates.chunk(4)
        cell_H = forget.sigmoid() * cell_H + entry.sigmoid() * candidate.tanh()
        return out.sigmoid() * cell_H.tanh(), cell_H

    loss = torch.zeros((), dtype=images.dtype)
    for image_E, captions in zip(image_BE, captions_of_images, strict=True):
        for words in captions:
            targets = [*words, END][: max(MAX_TOKENS, len(words) + 1 if len(words) <= MAX_TOKENS else 0)]
            hidden_H = cell_H = torch.zeros(model.lstm.hidden_size, dtype=images.dtype)
            if model.config.image_input == "first":
                hidden_H, cell_H = cell(image_E, hidden_H, cell_H)
            for token, target in zip([START, *words], targets, strict=False):
                word_E = model.embed.weight[token]
                inputs = word_E if model.config.image_input == "first" else torch.cat((word_E, image_E))
                hidden_H, cell_H = cell(inputs, hidden_H, cell_H)
                logits_V = model.predict.weight @ hidden_H + model.predict.bias
                loss = loss - (logits_V[target] - logits_V.exp().sum().log())
    return loss


@pytest.mark.parametrize("image_input", FORMS)
@pytest.mark.parametrize("trainable", [False, True])
def test_loss_and_every_gradient_equal_the_unpacked_reference(image_input: ImageInput, trainable: bool) -> None:
    model = make_model(image_input, trainable=trainable).double().train()
    images = make_images(3).double()
    packed = PackedCaptions.pack(CAPTIONS, max_tokens=MAX_TOKENS)
    loss = cross_entropy(model(images, packed), packed.targets_M, reduction="sum")
    wanted_loss = reference_loss(model, images, CAPTIONS)
    assert loss.item() == pytest.approx(wanted_loss.item(), abs=1e-5)
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert any(name.startswith("encoder") for name, _ in named) == trainable
    parameters = [parameter for _, parameter in named]
    found = torch.autograd.grad(loss, parameters)
    wanted = torch.autograd.grad(wanted_loss, parameters)
    for (name, _), gradient, reference in zip(named, found, wanted, strict=True):
        torch.testing.assert_close(gradient, reference, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: name + text)
        # a bias before batch norm has no effect, all others have
        assert name == "project.bias" or gradient.abs().max() > 1e-6, name


# ---- packed captions ----------------------------------------------------------------------------------------


def test_packing_is_time_major_and_start_is_no_target() -> None:
    packed = PackedCaptions.pack([[[4]], [[5, 6, 7], [8, 9]]], max_tokens=10)
    assert packed.image_of_caption_N.tolist() == [1, 1, 0]
    assert packed.batch_sizes_T.tolist() == [3, 3, 2, 1]
    assert packed.inputs_M.tolist() == [START, START, START, 5, 8, 4, 6, 9, 7]
    assert packed.targets_M.tolist() == [5, 8, 4, 6, 9, END, 7, END, END]


@pytest.mark.parametrize(
    ("words", "targets"), [([4, 5], [4, 5, END]), ([4, 5, 6], [4, 5, 6, END]), ([4, 5, 6, 7], [4, 5, 6]), ([], [END])]
)
def test_a_longer_caption_is_cut_and_does_not_end(words: list[int], targets: list[int]) -> None:
    packed = PackedCaptions.pack([[words]], max_tokens=3)
    assert packed.targets_M.tolist() == targets
    assert packed.inputs_M.tolist() == [START, *words][: len(targets)]


# ---- the encoder --------------------------------------------------------------------------------------------


def train_two_steps(model: CaptionModel) -> None:
    model.train()
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    packed = PackedCaptions.pack(CAPTIONS, max_tokens=MAX_TOKENS)
    for seed in range(2):
        loss = cross_entropy(model(make_images(3, seed=seed), packed), packed.targets_M)
        loss.backward()
        optimizer.step()


NEVER_MOVED = "project.bias"  # the batch norm behind it takes any constant away, so its gradient is rounding noise


def test_a_frozen_encoder_stays_bit_for_bit_while_the_rest_learns() -> None:
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train_two_steps(model)
    assert model.norm.training
    assert not any(module.training for module in model.encoder.backbone.modules())
    assert all(parameter.grad is None for parameter in model.encoder.parameters())
    for name, tensor in model.state_dict().items():
        if name != NEVER_MOVED:
            assert torch.equal(tensor, before[name]) == name.startswith("encoder."), name


def test_a_trainable_encoder_learns_and_its_statistics_move() -> None:
    model = make_model(trainable=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train_two_steps(model)
    for name, tensor in model.state_dict().items():
        assert name == NEVER_MOVED or not torch.equal(tensor, before[name]), name
    model.eval()
    assert not any(module.training for module in model.modules())


def test_each_image_is_encoded_once_however_many_captions_it_has() -> None:
    model = make_model()
    shapes: list[torch.Size] = []
    model.encoder.backbone.register_forward_hook(lambda _module, inputs, _output: shapes.append(inputs[0].shape))
    packed = PackedCaptions.pack([[[4, 5], [6], [7], [8], [9, 4]]] * 3, max_tokens=9)
    logits_MV = model(make_images(3), packed)
    assert shapes == [(3, 3, 32, 32)]
    assert logits_MV.shape == (3 * 12, 10)


@pytest.mark.parametrize("trainable", [False, True])
def test_one_image_alone_trains_and_leaves_statistics_alone(trainable: bool) -> None:
    model = make_model(trainable=trainable)
    train_two_steps(model)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.zero_grad()
    packed = PackedCaptions.pack([[[4, 5]]], max_tokens=9)
    logits_MV = model(make_images(1), packed)
    cross_entropy(logits_MV, packed.targets_M).backward()
    assert cast(Tensor, model.project.weight.grad).abs().max() > 0
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    assert model.norm.training
    torch.testing.assert_close(logits_MV, model.eval()(make_images(1), packed))
    model.train()
    model(make_images(2), PackedCaptions.pack([[[4]], [[5]]], max_tokens=9))
    assert not torch.equal(cast(Tensor, model.norm.running_mean), buffers["norm.running_mean"])


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_gives_pooled_features(name: str) -> None:
    """On the meta device: shapes are computed, numbers are not."""
    with torch.device("meta"):
        encoder = Encoder(name, trainable=False).eval()
        features_BF = encoder(torch.empty(2, 3, 224, 224))
    assert features_BF.shape == (2, encoder.num_features)
    assert encoder.num_features not in (1, 1000)


@pytest.mark.parametrize("name", ["squeezenet1_1", "resnet18", "shufflenet_v2_x0_5", "regnet_y_400mf", "small_cnn"])
def test_features_tell_pictures_apart(name: str) -> None:
    torch.manual_seed(0)
    encoder = Encoder(name, trainable=False)
    features_BF = encoder(make_images(3, sides=64) * torch.tensor([0.1, 1.0, 3.0]).view(3, 1, 1, 1))
    assert features_BF.shape == (3, encoder.num_features)
    assert features_BF.isfinite().all()
    assert (features_BF[0] - features_BF[1]).abs().max() > 1e-5
    assert (features_BF[1] - features_BF[2]).abs().max() > 1e-5


@pytest.mark.parametrize("name", ["resnet19", "", "fasterrcnn_resnet50_fpn"])
def test_an_unknown_encoder_is_named(name: str) -> None:
    with pytest.raises(UserError, match="resnet152") as error:
        Encoder(name, trainable=False)
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
        with pytest.raises(UserError, match="--weights") as error:
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
    with pytest.raises(UserError, match="--weights") as error:
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
        with pytest.raises(UserError, match="--weights none") as error:
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
        with pytest.raises(UserError, match="--weights") as error:
            load("default", NAME)
        one_line(error)


def test_an_encoder_without_default_weights_says_so() -> None:
    with pytest.raises(UserError, match="--weights none") as error:
        load("default", "small_cnn")
    assert "small_cnn" in one_line(error)


def test_nothing_else_of_the_model_is_touched_by_weights(tmp_path: Path) -> None:
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path = tmp_path / "weights.pth"
    torch.save(full_state(), path)
    load_encoder_weights(model.encoder, name="small_cnn", weights=str(path))
    assert isinstance(model.encoder.backbone, nn.Sequential)
    for name, tensor in model.state_dict().items():
        if not name.startswith("encoder."):
            assert torch.equal(tensor, before[name]), name
    assert not torch.equal(model.state_dict()["encoder.backbone.0.weight"], before["encoder.backbone.0.weight"])
