"""Pretrained weights of an encoder: the default ones, downloaded once, or those of a file."""

import logging
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from captioner.errors import UserError
from captioner.model.encoders import timm_models, torchvision_models
from captioner.model.encoders.encoder import Encoder

OLD_NAMES = {  # torchvision's own files have names from before its models changed, and its builders translate them
    r"(\.denselayer\d+\.(?:norm|conv))\.(?=[12]\.)": r"\1",
    r"\.mlp\.linear_1\.": ".mlp.0.",
    r"\.mlp\.linear_2\.": ".mlp.3.",
}
NOT_NEEDED = "num_batches_tracked"  # a count of batch norm, which many files lack

log = logging.getLogger(__name__)
State = dict[str, Tensor]


class WeightsError(UserError):
    """`weights` ("default" or a path) cannot be loaded into the encoder; `reason` says why."""

    def __init__(self, encoder: str, weights: str, reason: str) -> None:
        super().__init__(encoder, weights, reason)
        self.encoder, self.weights, self.reason = encoder, weights, reason

    def __str__(self) -> str:
        return f"cannot use weights {self.weights} for encoder {self.encoder}: {self.reason}"


def load_encoder_weights(encoder: Encoder, *, name: str, weights: str) -> None:
    """Load pretrained weights into `encoder`: `default` (those of torchvision or timm), `none`, or a file's path.

    The file is a state dict (`.pth`, read without unpickling objects, or `.safetensors`) with the names of torchvision
    or timm; weights that the encoder does not have, such as the classifier's, are ignored. For a model of timm it may
    also have other names: those of timm's file on the Hugging Face Hub, or any if all tensors have the shapes of timm's
    in timm's order, which is logged. Raises WeightsError, and then changes nothing.
    """
    if weights == "none":
        return
    wanted = encoder.backbone.state_dict()
    state = _download(name) if weights == "default" else _read_state(name, Path(weights))
    if name.startswith(timm_models.PREFIX):
        state = _with_timm_names(name, state, wanted, weights)
    else:
        state = {_new_name(key): tensor for key, tensor in state.items()}
    missing = _missing(wanted, state)
    misshapen = [key for key in wanted if key in state and state[key].shape != wanted[key].shape]
    if missing or misshapen:
        numbers = f"{len(missing)} tensors are missing and {len(misshapen)} have another shape"
        raise WeightsError(name, weights, f"{numbers}, such as {(missing + misshapen)[0]}")
    for key in wanted.keys() & state.keys():
        wanted[key].copy_(state[key])


def _missing(wanted: State, state: State) -> list[str]:
    return [key for key in wanted if key not in state and not key.endswith(NOT_NEEDED)]


def _new_name(key: str) -> str:
    for old, new in OLD_NAMES.items():
        key = re.sub(old, new, key)
    return key


def _with_timm_names(name: str, state: State, wanted: State, weights: str) -> State:
    """The state dict with timm's names, where it has others that can be translated."""
    if not _missing(wanted, state):
        return state
    shapes = {key: shape for key, shape in timm_models.classifier_shapes(name).items() if not key.endswith(NOT_NEEDED)}
    tensors = {key: tensor for key, tensor in state.items() if not key.endswith(NOT_NEEDED)}
    in_order = [tensor.shape for tensor in tensors.values()] == list(shapes.values())
    if in_order and shapes.keys().isdisjoint(tensors):
        log.warning(
            "%s has none of timm's names, but the shapes of %s in the same order: its %d tensors are loaded by order",
            weights,
            name,
            len(tensors),
        )
        return dict(zip(shapes, tensors.values(), strict=True))
    try:
        return timm_models.pretrained_state(name, state)
    except Exception:  # timm's translation of a file that is not of this model raises almost any type
        return state


def _download(name: str) -> State:
    """The default weights, from a cache or downloaded; torchvision's are checked against the hash in their name."""
    of_timm = name.startswith(timm_models.PREFIX)
    source = timm_models.default_source(name) if of_timm else torchvision_models.default_url(name)
    if source is None:
        raise WeightsError(name, "default", "it has no pretrained ones")
    try:
        if of_timm:
            return timm_models.pretrained_state(name)
        return torch.hub.load_state_dict_from_url(source, map_location="cpu", check_hash=True, weights_only=True)
    except Exception as error:  # the network, the check of the hash and, on a damaged cache, the unpickler
        cache = timm_models.cache_folder() if of_timm else torch.hub.get_dir()
        raise WeightsError(
            name,
            "default",
            f"cannot get {source} ({_first_line(error)}); download it elsewhere and give its path, "
            f"and delete a damaged one in {cache}",
        ) from error


def _read_state(name: str, path: Path) -> State:
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
