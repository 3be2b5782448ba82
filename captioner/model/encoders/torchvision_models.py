"""torchvision's classification models, and `small_cnn`: without the classifier, or up to the last feature map.

The modules that are kept have torchvision's names in the state dict.
"""

from collections import OrderedDict
from typing import Any, cast

import torch
import torchvision.models
from torch import Tensor, nn
from torchvision.models import VisionTransformer, get_model, get_model_weights, list_models

from captioner.errors import UserError
from captioner.images.views import IMAGENET_MEAN, IMAGENET_STD
from captioner.model.encoders.preprocessing import Preprocessing
from captioner.model.encoders.small_cnn import NAME as SMALL_CNN
from captioner.model.encoders.small_cnn import MaxPool, small_cnn

INCEPTIONS = ("googlenet", "inception_v3")
ONE_SIZE = ("vit_", "maxvit_")
AFTER_THE_MAP = ("avgpool", "classifier", "fc")


def preprocessing(name: str) -> Preprocessing:
    """The preprocessing of the default weights. Raises UserError for an unknown name."""
    if name == SMALL_CNN:
        return Preprocessing(crop=224, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    _check_name(name)
    wanted = cast(Any, get_model_weights(name)).DEFAULT.transforms()
    return Preprocessing(
        crop=wanted.crop_size[0],
        mean=tuple(wanted.mean),
        std=tuple(wanted.std),
        fixed_crop=name.startswith(ONE_SIZE),
    )


def build(name: str, *, grid: bool) -> nn.Module:
    """A network with random weights: images to pooled features, or with `grid` to the last map or all tokens."""
    network = small_cnn(grid=grid) if name == SMALL_CNN else _build_classifier(name)
    return _until_the_map(name, network) if grid else _without_classifier(network)


def default_url(name: str) -> str | None:
    """Where the default weights are, under a name that holds the beginning of their sha256; None if there are none."""
    return None if name == SMALL_CNN else cast(Any, get_model_weights(name)).DEFAULT.url


def _check_name(name: str) -> None:
    if name not in list_models(module=torchvision.models):
        raise UserError(f"torchvision has no classification model {name!r}: take one such as resnet152 or resnet18")


def _build_classifier(name: str) -> nn.Module:
    """A classifier built as for its default weights, without auxiliary heads."""
    _check_name(name)
    options: dict[str, Any] = {}
    if name in INCEPTIONS:  # their weights expect another normalisation, done inside
        options = {"transform_input": True, "aux_logits": False, "init_weights": True}
    elif name.startswith("vit_"):
        options = {"image_size": preprocessing(name).crop}
    return get_model(name, weights=None, **options)


def _without_classifier(network: nn.Module) -> nn.Module:
    """The network with its last linear layer or convolution, whose outputs are class scores, replaced by identity."""
    names = [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    network.set_submodule(names[-1], nn.Identity())
    return network


def _until_the_map(name: str, network: nn.Module) -> nn.Module:
    """The modules before pooling and classifier, which run one after the other in all families but ViT."""
    if isinstance(network, VisionTransformer):
        return Tokens(network)
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    if name in INCEPTIONS:
        modules["normalise"] = InceptionNormalisation()
    for child_name, child in network.named_children():
        if child_name in AFTER_THE_MAP or isinstance(child, MaxPool):
            break
        modules[child_name] = nn.Sequential(*child) if isinstance(child, nn.ModuleList) else child
    if name.startswith("densenet"):
        modules["relu"] = nn.ReLU()
    return nn.Sequential(modules)


class InceptionNormalisation(nn.Module):
    """ImageNet's mean and std to 0.5 and 0.5, which Inception's weights expect."""

    def __init__(self) -> None:
        super().__init__()
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        self.register_buffer("scale", std / 0.5, persistent=False)
        self.register_buffer("shift", (mean - 0.5) / 0.5, persistent=False)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """The images in Inception's normalisation."""
        return images_B3HW * self.get_buffer("scale") + self.get_buffer("shift")


class Tokens(nn.Module):
    """A ViT without its heads: images to all tokens (B, 1 + patches, F), the class token first."""

    num_prefix_tokens = 1

    def __init__(self, network: VisionTransformer) -> None:
        super().__init__()
        self.class_token, self.conv_proj, self.encoder = network.class_token, network.conv_proj, network.encoder

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """The tokens after the last layer norm."""
        patches_BRF = self.conv_proj(images_B3HW).flatten(2).transpose(1, 2)
        return self.encoder(torch.cat((self.class_token.expand(len(patches_BRF), -1, -1), patches_BRF), dim=1))
