"""Export a model folder to ONNX, to caption images without PyTorch: in a browser, on a phone, from another language.

    pip install -e '.[onnx]'
    python infer/export.py --model runs/coco/model --output runs/coco/onnx
    python infer/export.py --model runs/coco/model --output runs/coco/int8 --int8 photos     # smaller and faster

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
    int8: File | None = None
    """Folder of 20 or more photos like those to caption, to turn weights and the encoder's activations into int8."""


def main(settings: ExportSettings) -> None:
    """Export, compare with PyTorch, and print what was written."""
    check_packages()
    if os.path.lexists(settings.output):
        raise UserError(f"--output {settings.output} exists already: give a new folder, or delete this one")
    from captioner.describe import Captioner
    from captioner.model.bundle import load_bundle
    from captioner.model.onnx import load_onnx
    from infer.int8 import read_photos
    from infer.onnx_files import export

    bundle = load_bundle(settings.model)
    photos_BPP3 = None if settings.int8 is None else read_photos(settings.int8, bundle.view)
    rows = export(bundle, settings.output, photos_BPP3=photos_BPP3)
    header = ("file", "MB", "largest difference from PyTorch" + (", before int8" if settings.int8 else ""))
    cli.print_table(str(settings.output), header, rows)
    if photos_BPP3 is not None:
        wanted, found = (
            Captioner(each).describe_views(photos_BPP3) for each in (bundle, load_onnx(str(settings.output)))
        )
        num_same = sum(one.caption == other.caption for one, other in zip(found, wanted, strict=True))
        cli.console.print(
            f"int8: {num_same} of {len(found)} photos keep their caption; score some with train/evaluate.py"
        )
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
