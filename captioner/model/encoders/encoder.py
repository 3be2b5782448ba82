"""An encoder: a network of torchvision or timm, by name, up to its features.

Shapes: B images, F features, R positions of the last feature map, row by row. A suffix says a tensor's shape:
`images_B3HW`.
"""

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from captioner.model.encoders import timm_models, torchvision_models
from captioner.model.encoders.folding import fold_batch_norms
from captioner.model.encoders.meta import run_on_meta
from captioner.model.encoders.preprocessing import FixedCropError, Preprocessing, SmallImagesError
from captioner.model.graphs import GraphCache, can_replay


class Encoder(nn.Module):
    """A classifier up to its features: images (B, 3, height, width) to pooled features (B, F), or a grid (B, R, F).

    `name` is a classification model of torchvision, `small_cnn`, or `timm/` and a model of timm. The grid is the last
    feature map, or a ViT's patch tokens. Unless the encoder is trainable, it stays in eval mode after `train()` and
    computes no gradient. Then it runs with its batch norms folded into its convolutions (`folding.py`), and as a graph
    on CUDA (`graphs.py`), unless it is compiled. Other weights come by `load_state_dict`; changes in place go unseen.

    Raises UserError for an unknown name, and for a model that gives no grid.
    """

    def __init__(self, name: str, *, trainable: bool, grid: bool = False) -> None:
        super().__init__()
        self.name, self.trainable, self.grid = name, trainable, grid
        self.backbone = _library(name).build(name, grid=grid)
        self._num_prefix_tokens = 0  # a ViT's class token and registers
        self.num_features = self._count_features(crop=preprocessing(name).crop)
        self.backbone.requires_grad_(trainable)
        self._graphs = None if trainable else GraphCache()
        self._folded: list[nn.Module] = []  # a list, so that its weights are not this module's
        self.register_load_state_dict_post_hook(_forget_folded)
        self.to(memory_format=torch.channels_last)
        self.train(self.training)

    def train(self, mode: bool = True) -> "Encoder":
        """Set training mode, except for a frozen backbone."""
        super().train(mode)
        if not self.trainable:
            self.backbone.eval()
        return self

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Pooled features (B, F), or the grid (B, R, F)."""
        with torch.set_grad_enabled(self.trainable and torch.is_grad_enabled()):
            graphs = self._graphs if self._is_plain() else None  # None too if it was made to be trained, now or later
            network = self.backbone if graphs is None else self._fold(crop=images_B3HW.shape[2])
            if graphs is not None and can_replay(images_B3HW):
                return self._features(graphs(network, images_B3HW))
            return self._features(network(images_B3HW))

    def grid_shape(self, crop: int) -> tuple[int, int]:
        """Rows and columns of the grid of a crop of `crop` pixels, computed without running the network."""
        output, _ = run_on_meta(self.backbone, crop=crop)
        if output.dim() == 4:
            rows, columns = output.shape[1:3] if self._has_channels_last() else output.shape[2:]
            return rows, columns
        side = math.isqrt(self._features(output).shape[1])
        return side, side

    def _features(self, output: Tensor) -> Tensor:
        """The features (B, F) or (B, R, F) in what the backbone returns."""
        if not self.grid:
            return output.flatten(1)
        if output.dim() == 3:
            return output[:, self._num_prefix_tokens :]
        return output.flatten(1, 2) if self._has_channels_last() else output.flatten(2).transpose(1, 2)

    def _has_channels_last(self) -> bool:
        """Whether the backbone's maps are (B, H, W, F), as timm's attribute says, rather than (B, F, H, W)."""
        return getattr(self.backbone, "output_fmt", "NCHW") == "NHWC"

    def _count_features(self, *, crop: int) -> int:
        """F, from shapes alone; also sets the number of tokens before the patches, which are a square's."""
        output, _ = run_on_meta(self.backbone, crop=crop)
        if self.grid and output.dim() == 3:
            self._num_prefix_tokens = output.shape[1] - math.isqrt(output.shape[1]) ** 2
        return self._features(output).shape[-1]

    def _is_plain(self) -> bool:
        """Whether the backbone is frozen, in eval mode and not compiled."""
        is_compiled = self.backbone._compiled_call_impl is not None or torch.compiler.is_compiling()
        return not (self.trainable or self.backbone.training or is_compiled)

    def _fold(self, *, crop: int) -> nn.Module:
        """The backbone with folded batch norms, made by the first call."""
        if not self._folded:
            self._folded.append(fold_batch_norms(self.backbone, crop=crop))
        return self._folded[0]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "Encoder":
        """Move or cast the weights, as `nn.Module.to` does."""
        self._folded.clear()
        return super()._apply(fn, recurse)


def _forget_folded(encoder: Encoder, _keys: object) -> None:
    encoder._folded.clear()


def preprocessing(name: str) -> Preprocessing:
    """The preprocessing of an encoder's default weights. Raises UserError for an unknown name."""
    return _library(name).preprocessing(name)


def check_crop(name: str, *, crop: int, size: int) -> None:
    """Raise SmallImagesError or FixedCropError if encoder `name` cannot take crops of `crop` from `size` pixels."""
    wanted = preprocessing(name)
    needed = wanted.crop if wanted.fixed_crop else crop
    if needed > size:
        raise SmallImagesError(name, needed, size)
    if needed != crop:
        raise FixedCropError(name, crop, needed)


def _library(name: str) -> ModuleType:
    return timm_models if name.startswith(timm_models.PREFIX) else torchvision_models
