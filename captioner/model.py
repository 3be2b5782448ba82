"""The captioning model: a torchvision CNN encoder and an LSTM decoder over packed captions.

Shapes: B images, N captions (all captions of all B images), M target tokens of the N captions together,
T tokens of the longest caption, F pooled features, E embedding width, H hidden width, V vocabulary.
A suffix says a tensor's shape: `logits_MV`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
import torchvision.models
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torchvision.models import get_model, get_model_weights, list_models

from captioner.cli import UserError
from captioner.vocabulary import END, START

ImageInput = Literal["first", "every-step"]
LSTMState = tuple[Tensor, Tensor]
HEADS = ("fc", "classifier", "heads", "head")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """What must be known to build the model that a `model.safetensors` fits."""

    encoder: str
    vocabulary_size: int
    embedding_size: int = 256
    hidden_size: int = 512
    image_input: ImageInput = "first"


@dataclass(frozen=True, slots=True)
class PackedCaptions:
    """N captions, the longest first, packed time-major: all first tokens, then all second ones, and so on.

    `inputs_M` starts with `<start>` and ends before `<end>`; `targets_M` is one token ahead, so `<start>` is no
    target. `batch_sizes_T` (on the CPU, as PyTorch wants it) counts the captions that reach each step, and
    `image_of_caption_N` names each caption's row among the B images.
    """

    inputs_M: Tensor
    targets_M: Tensor
    batch_sizes_T: Tensor
    image_of_caption_N: Tensor

    @classmethod
    def pack(cls, captions_of_images: Sequence[Sequence[Sequence[int]]], *, max_tokens: int) -> "PackedCaptions":
        """Pack the captions (token ids without `<start>` and `<end>`) of B images; there is at least one caption.

        A caption of more than `max_tokens` is cut there, and has no `<end>` among its targets: it does not end.
        """
        captions = list(chain.from_iterable(captions_of_images))
        tokens = list(chain.from_iterable(captions))
        return cls.pack_flat(
            tokens, list(map(len, captions)), list(map(len, captions_of_images)), max_tokens=max_tokens
        )

    @classmethod
    def pack_flat(
        cls, tokens: Sequence[int], lengths: Sequence[int], num_captions: Sequence[int], *, max_tokens: int
    ) -> "PackedCaptions":
        """`pack` of all captions' tokens in a row, with each caption's length and each image's number of captions."""
        full_N = np.array(lengths)
        tokens_NW = np.full((len(lengths), full_N.max() + 1), END)
        tokens_NW[np.arange(full_N.max() + 1) < full_N[:, None]] = tokens
        lengths_N = np.where(full_N <= max_tokens, full_N + 1, max_tokens)
        longest_first_N = np.argsort(-lengths_N, kind="stable")
        targets_TN = tokens_NW[longest_first_N, : lengths_N.max()].T
        alive_TN = np.arange(len(targets_TN))[:, None] < lengths_N[longest_first_N]
        inputs_TN = np.concatenate((np.full_like(targets_TN[:1], START), targets_TN[:-1]))
        image_of_caption_N = np.repeat(np.arange(len(num_captions)), num_captions)
        return cls(
            inputs_M=torch.from_numpy(inputs_TN[alive_TN]),
            targets_M=torch.from_numpy(targets_TN[alive_TN]),
            batch_sizes_T=torch.from_numpy(alive_TN.sum(axis=1)),
            image_of_caption_N=torch.from_numpy(image_of_caption_N[longest_first_N]),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """To another process as plain arrays: of so few bytes that is faster than tensors' shared memory."""
        tensors = (self.inputs_M, self.targets_M, self.batch_sizes_T, self.image_of_caption_N)
        return _from_arrays, tuple(tensor.numpy() for tensor in tensors)

    def map(self, change: Callable[[Tensor], Tensor]) -> "PackedCaptions":
        """The same captions with `change` applied to all but `batch_sizes_T`."""
        return PackedCaptions(
            change(self.inputs_M), change(self.targets_M), self.batch_sizes_T, change(self.image_of_caption_N)
        )


def _from_arrays(*arrays: np.ndarray) -> PackedCaptions:
    return PackedCaptions(*map(torch.from_numpy, arrays))


class Encoder(nn.Module):
    """A torchvision classifier without its last layer: images (B, 3, height, width) to features (B, F).

    Trainable or not is decided once. A frozen encoder stays in eval mode whatever `train()` says, computes no
    gradient, and its batch-norm statistics never drift.
    """

    def __init__(self, name: str, *, trainable: bool) -> None:
        super().__init__()
        self.trainable = trainable
        self.backbone = _build_backbone(name)
        self.num_features = _remove_classifier(self.backbone, name=name)
        self.backbone.requires_grad_(trainable)
        self.to(memory_format=torch.channels_last)
        self.train(self.training)

    def train(self, mode: bool = True) -> "Encoder":
        """As `nn.Module.train`, but a frozen backbone stays in eval mode."""
        super().train(mode)
        if not self.trainable:
            self.backbone.eval()
        return self

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Pooled features (B, F)."""
        with torch.set_grad_enabled(self.trainable and torch.is_grad_enabled()):
            return self.backbone(images_B3HW).flatten(1)


class CaptionModel(nn.Module):
    """Encoder, Linear and BatchNorm to an image embedding, and an LSTM over it and the words.

    With `image_input="first"` the image embedding is the LSTM's first input; its output there is no prediction.
    With `"every-step"` it stands beside each word's embedding instead.
    """

    def __init__(self, config: ModelConfig, *, encoder_trainable: bool = False) -> None:
        super().__init__()
        every_step = config.image_input == "every-step"
        self.config = config
        self.encoder = Encoder(config.encoder, trainable=encoder_trainable)
        self.project = nn.Linear(self.encoder.num_features, config.embedding_size)
        self.norm = nn.BatchNorm1d(config.embedding_size, momentum=0.01)
        self.embed = nn.Embedding(config.vocabulary_size, config.embedding_size)
        self.lstm = nn.LSTM(config.embedding_size * (1 + every_step), config.hidden_size)
        self.predict = nn.Linear(config.hidden_size, config.vocabulary_size)
        remember(self.lstm)

    def encode(self, images_B3HW: Tensor) -> Tensor:
        """Image embeddings (B, E) of normalised images. One image alone is normalised by running statistics."""
        with frozen_statistics(self, when=self.training and len(images_B3HW) < 2):
            image_BE = self.norm(self.project(self.encoder(images_B3HW)))
        return image_BE.to(self.embed.weight.dtype)

    def forward(self, images_B3HW: Tensor, captions: PackedCaptions) -> Tensor:
        """Logits (M, V) for `captions.targets_M`; each image is encoded once for all its captions."""
        image_BE = self.encode(images_B3HW)
        state = self.start(image_BE, rows_N=captions.image_of_caption_N)
        words_ME = self.embed(captions.inputs_M)
        if state is None:
            words_ME = torch.cat((words_ME, image_BE[captions.image_of_caption_N][_caption_of_token(captions)]), dim=1)
        hidden_MH, _ = self._recur(PackedSequence(words_ME, captions.batch_sizes_T), state)
        return self.predict(hidden_MH.data)

    def start(self, image_BE: Tensor, *, rows_N: Tensor) -> LSTMState | None:
        """The LSTM state (1, N, H) after it has seen the images; None when it sees them at every step.

        The LSTM runs over the B images once, and each of the N captions takes its image's row.
        """
        if self.config.image_input == "every-step":
            return None
        _, (hidden_1BH, cell_1BH) = self._recur(image_BE[None], None)
        return hidden_1BH[:, rows_N], cell_1BH[:, rows_N]

    def advance(self, tokens_N: Tensor, state: LSTMState | None, image_NE: Tensor) -> tuple[Tensor, LSTMState]:
        """One decoding step: logits (N, V) of the next token, and the new state."""
        words_NE = self.embed(tokens_N)
        if self.config.image_input == "every-step":
            words_NE = torch.cat((words_NE, image_NE), dim=1)
        hidden_1NH, state = self._recur(words_NE[None], state)
        return self.predict(hidden_1NH[0]), state

    def _recur(self, inputs: Any, state: LSTMState | None) -> tuple[Any, LSTMState]:
        """The LSTM, in float32 under any autocast: on the CPU autocast mixes types that the LSTM refuses."""
        with torch.autocast(self.embed.weight.device.type, enabled=False):
            return self.lstm(inputs, state)


def remember(lstm: nn.LSTM) -> None:
    """Start with open forget gates (their bias at 1), so that what the first input said lasts to the last word."""
    with torch.no_grad():
        gate_size = lstm.hidden_size
        for name in ("bias_ih_l0", "bias_hh_l0"):
            lstm.get_parameter(name)[gate_size : 2 * gate_size].fill_(0.5)


def _caption_of_token(captions: PackedCaptions) -> Tensor:
    """For each of the M packed tokens the index of its caption among the N."""
    steps = [torch.arange(size) for size in captions.batch_sizes_T.tolist()]
    return torch.cat(steps).to(captions.inputs_M.device)


@contextmanager
def frozen_statistics(module: nn.Module, *, when: bool = True) -> Iterator[None]:
    """Batch norm inside uses its running statistics and leaves them alone, while `when` holds."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    if when:
        for norm in norms:
            norm.eval()
    try:
        yield
    finally:
        for norm in norms:
            norm.train()


def small_cnn() -> nn.Module:
    """Five 3x3 convolutions, pooled by their maximum: learns small pictures from scratch in minutes on a CPU.

    It has no pretrained weights. torchvision's own models are far slower learners there: see docs/decisions.
    """
    widths_and_strides = ((32, 2), (64, 2), (64, 1), (128, 2), (256, 2))
    layers: list[nn.Module] = []
    width_before = 3  # red, green, blue
    for width, stride in widths_and_strides:
        convolution = nn.Conv2d(width_before, width, kernel_size=3, stride=stride, padding=1, bias=False)
        layers += (convolution, nn.BatchNorm2d(width), nn.ReLU())
        width_before = width
    return nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(width_before, 1000))


# ---- the encoder's construction and weights -----------------------------------------------------------------


def _build_backbone(name: str) -> nn.Module:
    """A torchvision classifier with fresh weights; auxiliary heads are left out."""
    if name == small_cnn.__name__:
        return small_cnn()
    if name not in list_models(module=torchvision.models):
        raise UserError(f"torchvision has no classification model {name!r}: take one such as resnet152 or resnet18")
    extra = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    return get_model(name, weights=None, **extra)


def _remove_classifier(backbone: nn.Module, *, name: str) -> int:
    """Replace the layer that makes class scores by one that passes features on; returns their number F."""
    if isinstance(backbone, nn.Sequential):
        return cast(nn.Linear, backbone.pop(-1)).in_features
    head_name = next((head for head in HEADS if isinstance(getattr(backbone, head, None), nn.Module)), None)
    if head_name is None:
        raise UserError(f"encoder {name!r} has no classifier that could be taken off: take one such as resnet152")
    head = getattr(backbone, head_name)
    if isinstance(head, nn.Linear):
        setattr(backbone, head_name, nn.Identity())
        return head.in_features
    scoring = [key for key, layer in head.named_children() if isinstance(layer, nn.Linear | nn.Conv2d)][-1]
    layer = head.get_submodule(scoring)
    setattr(head, scoring, nn.Identity())
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


def load_encoder_weights(encoder: Encoder, *, name: str, weights: str) -> None:
    """Put pretrained weights into `encoder`: `default` (torchvision's best), `none`, or a state dict's path.

    A path holds a torchvision state dict (`.pth`, read without unpickling objects, or `.safetensors`); weights
    of the classifier that was taken off are ignored. Raises UserError for anything missing or misshapen.
    """
    if weights == "none":
        return
    state = _download_weights(name) if weights == "default" else _read_state(Path(weights))
    wanted = encoder.backbone.state_dict()
    missing = [key for key in wanted if key not in state and not key.endswith("num_batches_tracked")]
    misshapen = [key for key in wanted if key in state and state[key].shape != wanted[key].shape]
    if missing or misshapen:
        raise UserError(
            f"the weights {weights} do not fit encoder {name}: {len(missing)} tensors are missing and {len(misshapen)} "
            f"have another shape, such as {(missing + misshapen)[0]}: give the encoder's own weights with --weights"
        )
    encoder.backbone.load_state_dict({key: state[key] for key in wanted if key in state}, strict=False)


def _download_weights(name: str) -> dict[str, Tensor]:
    """torchvision's default weights, from its cache or downloaded, checked against the hash in their name."""
    if name not in list_models(module=torchvision.models):
        raise UserError(f"there are no pretrained weights of {name}: add --weights none --train-encoder")
    url = cast(Any, get_model_weights(name)).DEFAULT.url
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
    except Exception as error:  # the network, the check of the hash and, on a damaged cache, the unpickler
        raise UserError(
            f"cannot get the pretrained weights of {name} from {url} ({_first_line(error)}): download that file "
            f"elsewhere and give its path with --weights (a damaged one in {torch.hub.get_dir()} must be deleted), "
            "or train from scratch with --weights none --train-encoder"
        ) from error


def _read_state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"there is no weights file {path}: --weights takes default, none, or the path of a state dict")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else _unpickle_tensors(path)
    except Exception as error:  # the unpickler raises nearly anything on bytes that are no pickle
        raise UserError(f"{path} is not a readable state dict ({_first_line(error)}): download it again") from error
    if not isinstance(state, dict):
        raise UserError(f"{path} is not a state dict but holds a {type(state).__name__}: give another with --weights")
    return {key: tensor for key, tensor in state.items() if isinstance(tensor, Tensor)}


def _unpickle_tensors(path: Path) -> object:
    return torch.load(path, map_location="cpu", weights_only=True)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
