"""The model on this process's device, and the settings that its captions depend on. Imports torch when it is called."""

import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from captioner.files.storage import is_remote
from infer.results import WORKING_FOLDER
from infer.settings import CaptionSettings

if TYPE_CHECKING:
    import torch

    from captioner.describe import Captioner


def load_captioner(settings: CaptionSettings) -> "Captioner":
    """Import torch and load the model on this process's device."""
    import torch

    from captioner.describe import Captioner
    from captioner.model.bundle import load_bundle

    device = find_device()
    torch.set_num_threads(1)  # whole batches are captioned in parallel instead
    bfloat16 = settings.precision == "bfloat16" or (
        settings.precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()
    )
    return Captioner(
        load_bundle(settings.model, device=device),
        beam_size=settings.beam_size,
        length_penalty=settings.length_penalty,
        captions_per_image=settings.captions_per_image,
        abstain_below=settings.abstain_below,
        precision="bfloat16" if bfloat16 else "float32",
    )


def find_device() -> "torch.device":
    """The accelerator with this process's local rank, or the CPU."""
    import torch

    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is None or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true":
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", "0")) % torch.accelerator.device_count()
    torch.accelerator.set_device_index(index)
    return torch.device(kind.type, index)


def row_settings(captioner: "Captioner", settings: CaptionSettings) -> dict[str, Any]:
    """The settings that a row's content depends on, and the folder of its relative names."""
    calibration = captioner.bundle.calibration
    local = [location for location in (*settings.images, *settings.shards) if not is_remote(location)]
    is_relative = bool(settings.list) or not all(map(os.path.isabs, local))
    return {
        "model": captioner.bundle.name,
        "calibration": None if calibration is None else calibration.fingerprint,
        **asdict(captioner.decoding),
        "captions_per_image": captioner.captions_per_image,
        "abstain_below": captioner.abstain_below,
        "precision": captioner.precision,
        WORKING_FOLDER: os.getcwd() if is_relative else None,  # noqa: PTH109
    }
