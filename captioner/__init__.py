"""Captioner: photos with captions to a trained captioning model, and folders of photos to captions.

from captioner import load_captioner
captioner = load_captioner("runs/coco/model")
(found,) = captioner(["photo.jpg"])
print(found.alt, found.score)
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from captioner.describe import Captioner, Precision

__version__ = "0.2.0"


def load_captioner(
    folder: str | Path,
    *,
    device: str = "cpu",
    beam_size: int | None = None,
    length_penalty: float | None = None,
    captions_per_image: int = 1,
    abstain_below: float | None = None,
    precision: "Precision" = "float32",
    with_attention: bool = False,
) -> "Captioner":
    """The model in a model folder or an ONNX folder, or behind its URL, ready to caption.

    The options are those of `Captioner`; an ONNX folder's model is always on the CPU. Imports torch only when it is
    called, and the model needs it. Raises UserError for a folder that cannot be used.
    """
    from captioner.describe import Captioner
    from captioner.model.onnx import is_onnx_folder, load_onnx

    if is_onnx_folder(str(folder)):
        bundle = load_onnx(str(folder))
    else:
        from captioner.model.bundle import load_bundle

        bundle = load_bundle(folder, device=device)
    return Captioner(
        bundle,
        beam_size=beam_size,
        length_penalty=length_penalty,
        captions_per_image=captions_per_image,
        abstain_below=abstain_below,
        precision=precision,
        with_attention=with_attention,
    )
