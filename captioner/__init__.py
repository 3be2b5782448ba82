"""Captioner: photos with captions to a trained captioning model, and folders of photos to captions.

from captioner import load_captioner
captioner = load_captioner("runs/coco/model")
(found,) = captioner(["photo.jpg"])
print(found.alt, found.score)
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from captioner.describe import Captioner

__version__ = "0.1.0"


def load_captioner(folder: str | Path, *, device: str = "cpu", **options: Any) -> "Captioner":
    """The model in a model folder or behind its URL, ready to caption; `options` are those of `Captioner`.

    Imports torch only when it is called. Raises UserError for a folder that cannot be used.
    """
    from captioner.bundle import load_bundle
    from captioner.describe import Captioner

    return Captioner(load_bundle(folder, device=device), **options)
