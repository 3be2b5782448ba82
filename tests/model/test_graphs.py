"""Which calls of a frozen encoder are captured, replayed and dropped, on a CPU with a fake capture.

`benchmarks/gpu.py` compares real graphs with direct calls on a GPU.
"""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import captioner.model.encoders.encoder
from captioner.model.encoders import Encoder
from captioner.model.graphs import MAX_GRAPHS, GraphCache, Network, can_replay

captured: list[tuple[int, ...]] = []
replayed: list[tuple[int, ...]] = []


class FakeGraph:
    """A network that notes what it is captured with and called with; it fails for batches of 13."""

    def __init__(self, network: Network, inputs: Tensor, _neighbour: Any) -> None:
        if len(inputs) == 13:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        self.network = network
        captured.append(tuple(inputs.shape))

    def __call__(self, inputs: Tensor, /) -> Tensor:
        replayed.append(tuple(inputs.shape))
        return self.network(inputs)


@pytest.fixture(autouse=True)
def _notes() -> None:
    captured.clear()
    replayed.clear()


@pytest.fixture
def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).eval().requires_grad_(False)


@pytest.fixture
def cache() -> GraphCache:
    return GraphCache(FakeGraph)


def call(cache: GraphCache, network: nn.Module, *batch_sizes: int) -> None:
    for size in batch_sizes:
        inputs = torch.randn(size, 3)
        assert torch.equal(cache(network, inputs), network(inputs))


def sizes(shapes: list[tuple[int, ...]]) -> list[int]:
    return [shape[0] for shape in shapes]


def test_a_kind_of_input_is_captured_when_it_comes_the_second_time(cache: GraphCache, network: nn.Module) -> None:
    call(cache, network, 8, 5)
    assert (captured, replayed) == ([], [])
    call(cache, network, 8, 8, 5)
    assert sizes(captured) == [8, 5]
    assert sizes(replayed) == [8, 8, 5]


def test_type_strides_and_autocast_are_of_the_kind(cache: GraphCache) -> None:
    network, inputs = nn.Identity(), torch.randn(3, 3)
    for kind in (inputs, inputs.T, inputs.double()):
        cache(network, kind)
    with torch.autocast("cpu", torch.bfloat16):
        cache(network, inputs)
        assert captured == []
        cache(network, inputs)
    assert len(captured) == 1


def test_there_are_never_more_graphs_than_the_first(cache: GraphCache, network: nn.Module) -> None:
    for _ in range(6):
        call(cache, network, *range(1, MAX_GRAPHS + 2))
    assert sizes(captured) == list(range(1, MAX_GRAPHS + 1))
    assert len(cache) == MAX_GRAPHS


@pytest.mark.parametrize("change", ["to", "data", "buffer", "assign", "network"])
def test_weights_in_other_memory_drop_all_graphs(change: str, cache: GraphCache, network: nn.Module) -> None:
    call(cache, network, 8, 8, 5, 5)
    other = copy.deepcopy(network)
    layers: Any = network
    linear, norm = layers
    if change == "to":
        network.double().float()
    elif change == "data":
        linear.weight.data = linear.weight.data + 1
    elif change == "buffer":
        norm.running_mean = norm.running_mean + 1
    elif change == "assign":
        network.load_state_dict(other.state_dict(), assign=True)
    else:
        network = other
    replayed.clear()
    call(cache, network, 8)
    assert (len(cache), replayed) == (0, [])
    call(cache, network, 8)
    assert sizes(captured) == [8, 5, 8]


def test_weights_that_change_in_place_keep_the_graphs(cache: GraphCache, network: nn.Module) -> None:
    call(cache, network, 8, 8)
    network.load_state_dict({name: tensor + 1 for name, tensor in network.state_dict().items()})
    call(cache, network, 8)
    assert (sizes(captured), sizes(replayed)) == ([8], [8, 8])


def test_where_a_capture_fails_a_warning_says_so_once(cache: GraphCache, network: nn.Module) -> None:
    call(cache, network, 8, 8, 13)
    with pytest.warns(UserWarning, match="operation not permitted when stream is capturing$") as warned:
        call(cache, network, 13, 13, 5, 5, 8)
    assert len(warned) == 1
    assert (sizes(captured), sizes(replayed)) == ([8], [8, 8])


def test_no_graph_for_a_cpu() -> None:
    assert not can_replay(torch.zeros(1))


# ---- the encoder ------------------------------------------------------------------------------------------


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoders take CPU inputs for CUDA ones, and capture with a FakeGraph."""
    monkeypatch.setattr(captioner.model.encoders.encoder, "can_replay", lambda _inputs: True)
    monkeypatch.setattr(captioner.model.encoders.encoder, "GraphCache", lambda: GraphCache(FakeGraph))


def encode(encoder: Encoder, *, times: int = 3) -> Tensor:
    torch.manual_seed(0)
    return [encoder(torch.randn(2, 3, 32, 32)) for _ in range(times)][-1]


@pytest.mark.usefixtures("on_cuda")
@pytest.mark.parametrize("grid", [False, True])
def test_a_frozen_encoder_replays_to_the_same_features(grid: bool) -> None:
    encoder = Encoder("small_cnn", trainable=False, grid=grid)
    found = encode(encoder)
    assert (len(captured), len(replayed)) == (1, 2)
    torch.manual_seed(0)
    images_B3HW = [torch.randn(2, 3, 32, 32) for _ in range(3)][-1]
    features = encoder._folded[0](images_B3HW)
    assert torch.equal(found, features.flatten(2).transpose(1, 2) if grid else features.flatten(1))
    assert found.shape == ((2, 16, encoder.num_features) if grid else (2, encoder.num_features))


@pytest.mark.usefixtures("on_cuda")
def test_no_graph_of_an_encoder_that_learns_later_is_compiled_or_is_put_in_training_mode() -> None:
    learning = Encoder("small_cnn", trainable=True)
    learning.trainable = False  # as before --finetune-encoder-from-step
    compiled = Encoder("small_cnn", trainable=False)
    compiled.backbone.compile(backend="eager")
    training = Encoder("small_cnn", trainable=False)
    training.backbone.train()
    for encoder in (learning.eval(), compiled, training):
        encode(encoder)
    assert captured == []


@pytest.mark.usefixtures("on_cuda")
def test_graphs_are_no_part_of_an_encoders_state() -> None:
    encoder = Encoder("small_cnn", trainable=False)
    names, wanted_BF = list(encoder.state_dict()), encode(encoder)
    assert list(encoder.state_dict()) == names
    for other in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        captured.clear()
        replayed.clear()
        assert torch.equal(encode(other, times=3), wanted_BF)
        assert (len(captured), len(replayed)) == (1, 2)


def test_an_encoder_compiles_as_one_graph() -> None:
    encoder = Encoder("small_cnn", trainable=False)
    compiled: Any = torch.compile(encoder, backend="eager", fullgraph=True)
    torch.testing.assert_close(encode(compiled), encode(encoder))
