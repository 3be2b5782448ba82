"""From RGB images to the model's input: crops in uint8 on the CPU, normalisation on the device.

Shapes: B images, S sides of a stored image, P sides of a crop, in pixels.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from captioner.images import loading

if TYPE_CHECKING:
    import torch
    from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewSpec:
    """How an image becomes the model's input: resized to `size`, cropped to `crop`, normalised per channel."""

    size: int = 256
    resize: loading.Resize = "squash"
    crop: int = 224
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD


def eval_view(pixels_SS3: np.ndarray, *, crop: int) -> np.ndarray:
    """The center crop (P, P, 3), for validation and inference."""
    top, left = ((side - crop) // 2 for side in pixels_SS3.shape[:2])
    return pixels_SS3[top : top + crop, left : left + crop]


def seen_area(spec: ViewSpec, original_size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The evaluation view's left, top, right and bottom edges in an upright original, as fractions of its sides."""
    width, height = original_size
    if spec.resize == "squash":
        width = height = spec.size
    elif spec.resize != "none":
        scale = spec.size / min(width, height)
        width, height = scale * width, scale * height
    left, top = (max(0.0, (1 - spec.crop / side) / 2) for side in (width, height))
    return left, top, 1 - left, 1 - top


def train_view(pixels_HW3: np.ndarray, *, crop: int, random_bits: int) -> np.ndarray:
    """A random crop (P, P, 3); `random_bits` holds 64 random bits."""
    height, width = pixels_HW3.shape[:2]
    top = (random_bits & 0xFFFFFF) * (height - crop + 1) >> 24
    left = (random_bits >> 24 & 0xFFFFFF) * (width - crop + 1) >> 24
    return pixels_HW3[top : top + crop, left : left + crop]


def copy_reversed(source_PP3: np.ndarray, out_PP3: np.ndarray) -> None:
    """Write the bytes of each row in reverse order: the mirror image in RGB of a view in BGR.

    NumPy reverses words of 8 bytes, and the bytes in each, as fast as it copies; pixels of 3 bytes take far longer.
    """
    size = 8 if out_PP3[0].nbytes % 8 == 0 else 1
    words, reversed_words = (
        view.reshape(len(view), -1).view(f"{order}u{size}") for view, order in ((source_PP3, ">"), (out_PP3, "<"))
    )
    reversed_words[:, ::-1] = words


def read_eval_view(
    source: bytes | Image.Image, spec: ViewSpec, *, with_torch: bool = True
) -> tuple[np.ndarray, tuple[int, int]]:
    """The evaluation view (P, P, 3), uint8, of a file's bytes or an image, and the original (width, height).

    Pillow resizes it if it may not be resized `with_torch`. Raises ImageError.
    """
    image, original_size = loading.load_resized(source, size=spec.size, resize=spec.resize, with_torch=with_torch)
    return eval_view(np.asarray(image), crop=spec.crop), original_size


def normalise(views_BPP3: "Tensor", spec: ViewSpec) -> "Tensor":
    """uint8 views to the model's float input (B, 3, P, P), channels-last in memory, on the views' device."""
    mean, std = _mean_and_std(spec, views_BPP3.device)
    return views_BPP3.permute(0, 3, 1, 2).float().sub_(mean).div_(std)  # in place: new memory costs more than the sums


@lru_cache(maxsize=8)
def _mean_and_std(spec: ViewSpec, device: "torch.device") -> "tuple[Tensor, Tensor]":
    """Of values 0 to 255, each (1, 3, 1, 1). Cached, since a copy to the device waits for it."""
    import torch

    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) * 255 for values in (spec.mean, spec.std))
    return mean, std
