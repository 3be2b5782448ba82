"""Captioner: photos with captions to a trained captioning model, and folders of photos to captions.

from captioner import load_captioner
captioner = load_captioner("runs/coco/model")
print(captioner.caption(open("photo.jpg", "rb").read()))
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from captioner.bundle import Bundle

__version__ = "0.1.0"


def load_captioner(folder: str | Path, *, device: str = "cpu") -> "Bundle":
    """The model in a model folder, ready to caption. Imports torch only when it is called."""
    from captioner.bundle import load_bundle

    return load_bundle(folder, device=device)
