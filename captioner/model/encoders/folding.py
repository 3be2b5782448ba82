"""Batch norms in eval mode, folded into the convolutions before them: the same function in less time."""

import copy
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

TOLERANCE = 1e-4  # of the largest output: more than rounding does to a CNN


@torch.inference_mode(mode=False)
@torch.no_grad()
def fold_batch_norms(network: nn.Module, *, crop: int) -> nn.Module:
    """A copy of a network in eval mode whose convolutions include the batch norms that follow them.

    Which norm follows which convolution is seen in a run on one image of noise, of `crop` pixels. Returns the network
    itself if it has no batch norm, or if the copy differs by more than rounding: a convolution is read elsewhere too.
    """
    norm = next((module for module in network.modules() if isinstance(module, nn.BatchNorm2d)), None)
    if norm is None or norm.running_mean is None or norm.running_mean.is_meta:
        return network
    noise = torch.randn(1, 3, crop, crop, generator=torch.Generator().manual_seed(0)).to(norm.running_mean)
    folded = copy.deepcopy(network)
    with torch.autocast(noise.device.type, enabled=False):
        wanted, pairs = _run(folded, noise)
        for convolution, name in pairs:
            _fold(folded, convolution, name)
        difference = (folded(noise) - wanted).abs().max()
    return folded if difference <= TOLERANCE * wanted.abs().max() else network


def _run(network: nn.Module, inputs: Tensor) -> tuple[Tensor, list[tuple[nn.Conv2d, str]]]:
    """The output, and the convolutions, each with the name of the batch norm that reads its output; both run once."""
    made: dict[int, tuple[nn.Conv2d, Tensor]] = {}  # by address; the tensor is kept, so that the address stays its own
    runs: Counter[nn.Module] = Counter()
    found: list[tuple[nn.Conv2d, str]] = []

    def look(name: str, module: nn.Module) -> Any:
        def after(_module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            runs[module] += 1
            if isinstance(module, nn.Conv2d):
                made[id(output)] = module, output
            elif id(arguments[0]) in made:
                found.append((made[id(arguments[0])][0], name))

        return module.register_forward_hook(after)

    hooks = [
        look(name, module) for name, module in network.named_modules() if isinstance(module, nn.Conv2d | nn.BatchNorm2d)
    ]
    output = network(inputs)
    for hook in hooks:
        hook.remove()
    return output, [pair for pair in found if runs[pair[0]] == runs[network.get_submodule(pair[1])] == 1]


def _fold(network: nn.Module, convolution: nn.Conv2d, name: str) -> None:
    """Fold the batch norm `name` into a convolution; what it does after normalising stays (timm's activate)."""
    norm: Any = network.get_submodule(name)
    convolution.weight, convolution.bias = fuse_conv_bn_weights(
        convolution.weight, convolution.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    rest = [module for module in (getattr(norm, "drop", None), getattr(norm, "act", None)) if module is not None]
    above, _, child = name.rpartition(".")
    setattr(network.get_submodule(above), child, nn.Sequential(*rest))
