"""A network's run on the meta device, where shapes are computed and numbers are not."""

import copy
from typing import Any

import torch
from torch import Tensor, nn


def run_on_meta(network: nn.Module, *, crop: int) -> tuple[Any, dict[str, Tensor]]:
    """The output of a copy of the network, in eval mode, for one image of `crop` pixels, and the copy's parameters.

    The copy takes no memory: its tensors are on the meta device. Raises what the network raises.
    """
    copies = {id(each): nn.Parameter(torch.empty_like(each, device="meta")) for each in network.parameters()}
    buffers = {id(each): torch.empty_like(each, device="meta") for each in network.buffers()}
    shadow = copy.deepcopy(network, copies | buffers).eval()
    return shadow(torch.empty(1, 3, crop, crop, device="meta")), dict(shadow.named_parameters())
