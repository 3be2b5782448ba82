"""timm's models: up to their pooled features, or up to the last feature map; timm itself is an optional package.

The modules that are kept have timm's names in the state dict.
"""

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from captioner.errors import UserError
from captioner.model.encoders.meta import run_on_meta
from captioner.model.encoders.preprocessing import Preprocessing

if TYPE_CHECKING:
    from types import ModuleType

PREFIX = "timm/"


def preprocessing(name: str) -> Preprocessing:
    """The preprocessing of the pretrained weights. Raises UserError for an unknown name or without timm."""
    config = _pretrained_config(name)
    wanted = import_timm(name).data.resolve_data_config(pretrained_cfg=config)
    return Preprocessing(
        crop=wanted["input_size"][-1],
        mean=tuple(wanted["mean"]),
        std=tuple(wanted["std"]),
        fixed_crop=config.get("fixed_input_size", False),
    )


def build(name: str, *, grid: bool) -> nn.Module:
    """A network with random weights: images to pooled features, or with `grid` to the last map or all tokens.

    Modules behind the grid are removed: data-parallel training refuses parameters without a gradient. Raises UserError
    for an unknown name, without timm, and for a model without a grid.
    """
    _check_name(name)
    network: Any = import_timm(name).create_model(_timm_name(name), pretrained=False, num_classes=0)
    if grid:
        network.forward = network.forward_features
        _remove_unused(network, _used_parameters(name, network))
    return network


def classifier_shapes(name: str) -> dict[str, torch.Size]:
    """The shapes of the whole classifier's state dict, in timm's order."""
    with torch.device("meta"):
        network = import_timm(name).create_model(_timm_name(name), pretrained=False)
    return {key: tensor.shape for key, tensor in network.state_dict().items()}


def pretrained_state(name: str, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """timm's pretrained weights, from the Hugging Face Hub or its cache, with the names of timm's modules.

    With `state`, those weights instead, translated from the names of the file on the Hub (CLIP's, for example).
    Raises what timm, huggingface_hub and torch raise.
    """
    overlay = None if state is None else {"state_dict": dict(state)}
    network = import_timm(name).create_model(_timm_name(name), pretrained=True, pretrained_cfg_overlay=overlay)
    return network.state_dict()


def default_source(name: str) -> str | None:
    """Where the pretrained weights are, as a name on the Hugging Face Hub or a URL; None if there are none."""
    config = _pretrained_config(name)
    hub_name = config.get("hf_hub_id")
    return f"{hub_name} of the Hugging Face Hub" if hub_name else config.get("url")


def cache_folder() -> str:
    """Where huggingface_hub keeps downloads."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return HF_HUB_CACHE


def import_timm(name: str) -> "ModuleType":
    """The package timm. Raises UserError if it is missing; `name` is the encoder that needs it."""
    try:
        import timm
        import timm.data
    except ImportError as error:
        raise UserError(f"encoder {name} needs timm ({error}): pip install 'captioner[timm]'") from error
    return timm


def _timm_name(name: str) -> str:
    return name.removeprefix(PREFIX)


def _check_name(name: str) -> None:
    """Raise UserError for an unknown model, or for unknown weights of a known one, with names that are near."""
    timm = import_timm(name)
    known, (model, _, tag) = timm.models, _timm_name(name).partition(".")
    of_model = timm.list_models(f"{model}.*", pretrained=True) if known.is_model(model) else []
    if known.is_model(model) and (not tag or _timm_name(name) in of_model):
        return
    near = difflib.get_close_matches(_timm_name(name), of_model or timm.list_models(), n=4, cutoff=0)
    names = ", ".join(PREFIX + each for each in near)
    raise UserError(f"timm has no model {_timm_name(name)!r}: take one such as {names}")


def _pretrained_config(name: str) -> dict[str, Any]:
    _check_name(name)
    config = import_timm(name).models.get_pretrained_cfg(_timm_name(name))
    return config.to_dict() if config else {}


def _used_parameters(name: str, network: nn.Module) -> set[str]:
    """The names of the parameters that the grid depends on. Raises UserError where the output is no grid."""
    with torch.inference_mode(mode=False), torch.enable_grad():
        output, parameters = run_on_meta(network, crop=preprocessing(name).crop)
        if not isinstance(output, Tensor) or output.shape[1] == 1:  # maps of several sizes; a class token alone
            raise UserError(f"encoder {name} has no grid of features: take another")
        gradients = torch.autograd.grad(output.sum(), list(parameters.values()), allow_unused=True)
    return {key for key, gradient in zip(parameters, gradients, strict=True) if gradient is not None}


def _remove_unused(module: nn.Module, used: set[str], prefix: str = "") -> None:
    """Replace submodules whose parameters are all unused by identities."""
    for name, child in module.named_children():
        path = f"{prefix}{name}."
        parameters = {path + each for each, _ in child.named_parameters()}
        if parameters and used.isdisjoint(parameters):
            setattr(module, name, nn.Identity())
        else:
            _remove_unused(child, used, path)
