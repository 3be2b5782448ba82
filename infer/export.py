"""Export a model folder to ONNX, to caption images without PyTorch: in a browser, on a phone, from another language.

    pip install -e '.[onnx]'
    python infer/export.py --model runs/coco/model --output runs/coco/onnx

The new folder holds encoder.onnx (uint8 images to the decoder's first state), decoder.onnx (one step: the last words
and the state to the next words' logits and the next state), config.json, vocabulary.json, the calibration if there is
one, and a README.md with the decoding loop in numpy. Both take any batch size. Both are compared with PyTorch, in
float32, before the folder appears. infer/main.py --model ONNX_FOLDER captions with it and imports no torch.
"""

import os
from dataclasses import dataclass

from captioner import cli
from captioner.errors import UserError
from captioner.flags import File, Location


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """The model to export, and where its ONNX files go."""

    model: Location
    """Model folder that train/main.py wrote, or its URL."""
    output: File
    """Folder to create, for encoder.onnx, decoder.onnx, config.json, vocabulary.json and README.md."""


def main(settings: ExportSettings) -> None:
    """Export, compare with PyTorch, and print what was written."""
    check_packages()
    if os.path.lexists(settings.output):
        raise UserError(f"--output {settings.output} exists already: give a new folder, or delete this one")
    from captioner.model.bundle import load_bundle
    from infer.onnx_files import export

    rows = export(load_bundle(settings.model), settings.output)
    cli.print_table(str(settings.output), ("file", "MB", "largest difference from PyTorch"), rows)
    cli.console.print(f"how to use them: {settings.output / 'README.md'}")


def check_packages() -> None:
    """Raise UserError if a package is missing that only this command needs."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"cannot export to ONNX ({error}): pip install -e '.[onnx]'") from error


def run() -> None:
    """The console entry."""
    cli.run(main, ExportSettings, description=__doc__ or "")


if __name__ == "__main__":
    run()
