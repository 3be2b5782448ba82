"""Image encoders: torchvision's classification models by name, without their classifier, and their weights.

Shapes: B images, F pooled features. A suffix says a tensor's shape: `images_B3HW`.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torchvision.models
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights, list_models

from captioner.errors import UserError
from captioner.images.views import IMAGENET_MEAN, IMAGENET_STD
from captioner.model.graphs import GraphCache, can_replay

INCEPTIONS = ("googlenet", "inception_v3")
ONE_SIZE = ("vit_", "maxvit_")
OLD_NAMES = {  # torchvision's own files have names from before its models changed, and its builders translate them
    r"(\.denselayer\d+\.(?:norm|conv))\.(?=[12]\.)": r"\1",
    r"\.mlp\.linear_1\.": ".mlp.0.",
    r"\.mlp\.linear_2\.": ".mlp.3.",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocessing:
    """What an encoder's weights were trained with: the crop's side in pixels, and mean and std of RGB in 0..1."""

    crop: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class FixedCropError(UserError):
    """The encoder takes crops of `needed` pixels only, not of `crop`."""

    def __init__(self, encoder: str, crop: int, needed: int) -> None:
        super().__init__(encoder, crop, needed)
        self.encoder, self.crop, self.needed = encoder, crop, needed

    def __str__(self) -> str:
        return f"encoder {self.encoder} takes crops of {self.needed} pixels only, not of {self.crop}"


class SmallImagesError(UserError):
    """Stored images of `size` pixels are smaller than the encoder's crops of `crop` pixels.

    `packed_size` has room for crops at random positions: 256 for 224.
    """

    def __init__(self, encoder: str, crop: int, size: int) -> None:
        super().__init__(encoder, crop, size)
        self.encoder, self.crop, self.size = encoder, crop, size
        self.packed_size = -(-crop * 8 // 7)

    def __str__(self) -> str:
        return f"the shards hold images of {self.size} pixels, and encoder {self.encoder} takes crops of {self.crop}"


class WeightsError(UserError):
    """`weights` ("default" or a path) cannot be loaded into the encoder; `reason` says why."""

    def __init__(self, encoder: str, weights: str, reason: str) -> None:
        super().__init__(encoder, weights, reason)
        self.encoder, self.weights, self.reason = encoder, weights, reason

    def __str__(self) -> str:
        return f"cannot use weights {self.weights} for encoder {self.encoder}: {self.reason}"


class Encoder(nn.Module):
    """A torchvision classifier without its last layer: images (B, 3, height, width) to features (B, F).

    Unless it is trainable, it stays in eval mode after `train()` and computes no gradient, and on CUDA it runs as a
    graph (`graphs.py`) unless it is compiled.
    """

    def __init__(self, name: str, *, trainable: bool) -> None:
        super().__init__()
        self.trainable = trainable
        self.backbone = _build_backbone(name)
        self.num_features = _remove_classifier(self.backbone)
        self.backbone.requires_grad_(trainable)
        self._graphs = None if trainable else GraphCache()
        self.to(memory_format=torch.channels_last)
        self.train(self.training)

    def train(self, mode: bool = True) -> "Encoder":
        """Set training mode, except for a frozen backbone."""
        super().train(mode)
        if not self.trainable:
            self.backbone.eval()
        return self

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Pooled features (B, F)."""
        with torch.set_grad_enabled(self.trainable and torch.is_grad_enabled()):
            if self._graphs is not None and can_replay(images_B3HW) and self._is_plain():
                return self._graphs(self.backbone, images_B3HW).flatten(1)
            return self.backbone(images_B3HW).flatten(1)

    def _is_plain(self) -> bool:
        """Whether the backbone is frozen, in eval mode and not compiled by `backbone.compile()`."""
        return not self.trainable and not self.backbone.training and self.backbone._compiled_call_impl is None


def small_cnn() -> nn.Module:
    """Five 3x3 convolutions and max pooling: learns small images from scratch in minutes on a CPU.

    It has no pretrained weights. torchvision's models learn far more slowly there: see docs/decisions.
    """
    widths_and_strides = ((32, 2), (64, 2), (64, 1), (128, 2), (256, 2))
    layers: list[nn.Module] = []
    width_before = 3  # red, green, blue
    for width, stride in widths_and_strides:
        convolution = nn.Conv2d(width_before, width, kernel_size=3, stride=stride, padding=1, bias=False)
        layers += (convolution, nn.BatchNorm2d(width), nn.ReLU())
        width_before = width
    return nn.Sequential(*layers, MaxPool(), nn.Flatten(), nn.Linear(width_before, 1000))


class MaxPool(nn.Module):
    """Each channel's largest value: (B, C, H, W) to (B, C, 1, 1).

    `nn.AdaptiveMaxPool2d(1)` is the same, but torch 2.11 cannot export it to ONNX, and on CUDA its gradient is not the
    same in each run.
    """

    def forward(self, values_BCHW: Tensor) -> Tensor:
        """The values (B, C, 1, 1)."""
        return values_BCHW.amax(dim=(2, 3), keepdim=True)


def preprocessing(name: str) -> Preprocessing:
    """The preprocessing of torchvision's default weights of an encoder. Raises UserError for an unknown name."""
    if name == small_cnn.__name__:
        return Preprocessing(crop=224, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    _check_name(name)
    wanted = cast(Any, get_model_weights(name)).DEFAULT.transforms()
    return Preprocessing(crop=wanted.crop_size[0], mean=tuple(wanted.mean), std=tuple(wanted.std))


def check_crop(name: str, *, crop: int, size: int) -> None:
    """Raise SmallImagesError or FixedCropError if encoder `name` cannot take crops of `crop` from `size` pixels."""
    needed = preprocessing(name).crop if name.startswith(ONE_SIZE) else crop
    if needed > size:
        raise SmallImagesError(name, needed, size)
    if needed != crop:
        raise FixedCropError(name, crop, needed)


def _check_name(name: str) -> None:
    if name not in list_models(module=torchvision.models):
        raise UserError(f"torchvision has no classification model {name!r}: take one such as resnet152 or resnet18")


def _build_backbone(name: str) -> nn.Module:
    """A torchvision classifier with random weights, built as for its default weights, without auxiliary heads."""
    if name == small_cnn.__name__:
        return small_cnn()
    _check_name(name)
    options: dict[str, Any] = {}
    if name in INCEPTIONS:  # their weights expect another normalisation, done inside
        options = {"transform_input": True, "aux_logits": False, "init_weights": True}
    elif name.startswith("vit_"):
        options = {"image_size": preprocessing(name).crop}
    return get_model(name, weights=None, **options)


def _remove_classifier(backbone: nn.Module) -> int:
    """Replace the last linear layer or convolution, whose outputs are class scores, by the identity; returns F."""
    layers = [(name, layer) for name, layer in backbone.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    name, layer = layers[-1]
    backbone.set_submodule(name, nn.Identity())
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


# ---- pretrained weights ---------------------------------------------------------------------------------------


def load_encoder_weights(encoder: Encoder, *, name: str, weights: str) -> None:
    """Load pretrained weights into `encoder`: `default` (torchvision's), `none`, or a state dict's path.

    The file is a torchvision state dict (`.pth`, read without unpickling objects, or `.safetensors`); weights of the
    removed classifier are ignored. Raises WeightsError, and then changes nothing.
    """
    if weights == "none":
        return
    state = _download_weights(name) if weights == "default" else _read_state(name, Path(weights))
    state = {_new_name(key): tensor for key, tensor in state.items()}
    wanted = encoder.backbone.state_dict()
    missing = [key for key in wanted if key not in state and not key.endswith("num_batches_tracked")]
    misshapen = [key for key in wanted if key in state and state[key].shape != wanted[key].shape]
    if missing or misshapen:
        numbers = f"{len(missing)} tensors are missing and {len(misshapen)} have another shape"
        raise WeightsError(name, weights, f"{numbers}, such as {(missing + misshapen)[0]}")
    for key in wanted.keys() & state.keys():
        wanted[key].copy_(state[key])


def _new_name(key: str) -> str:
    for old, new in OLD_NAMES.items():
        key = re.sub(old, new, key)
    return key


def _download_weights(name: str) -> dict[str, Tensor]:
    """torchvision's default weights, from its cache or downloaded, checked against the hash in their file name."""
    if name == small_cnn.__name__:
        raise WeightsError(name, "default", "it has no pretrained ones")
    url = cast(Any, get_model_weights(name)).DEFAULT.url
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
    except Exception as error:  # the network, the check of the hash and, on a damaged cache, the unpickler
        raise WeightsError(
            name,
            "default",
            f"cannot get {url} ({_first_line(error)}); download it elsewhere and give its path, and delete a damaged "
            f"one in {torch.hub.get_dir()}",
        ) from error


def _read_state(name: str, path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise WeightsError(name, str(path), "there is no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises almost any type
        raise WeightsError(name, str(path), f"it is not a readable state dict ({_first_line(error)})") from error
    if not isinstance(state, dict):
        raise WeightsError(name, str(path), f"it is not a state dict but holds a {type(state).__name__}")
    return {key: tensor for key, tensor in state.items() if isinstance(tensor, Tensor)}


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
