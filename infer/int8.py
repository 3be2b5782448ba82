"""An exported model with 8-bit integers for weights, and for the encoder's activations: smaller, and faster on CPUs.

The range of each activation of the encoder is measured on photos. The decoder's activations stay float32.
"""

import contextlib
import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from captioner.errors import UserError
from captioner.images.loading import ImageError
from captioner.images.views import ViewSpec, read_eval_view
from captioner.model.onnx import DECODER, ENCODED_AT_ONCE, ENCODER

NUM_PHOTOS, MIN_PHOTOS = 100, 20
QUANTIZED = ["Conv", "Add", "Relu", "Clip", "Mul", "MaxPool", "Concat", "GlobalAveragePool"]  # of the encoder


def read_photos(folder: Path, view: ViewSpec) -> np.ndarray:
    """The views (B, P, P, 3) of NUM_PHOTOS photos, or fewer, spread over a folder. Raises UserError if they are few."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    spread = files[:: max(1, len(files) // (2 * NUM_PHOTOS))]  # twice as many, as some may be no images
    views = list(islice(_views(spread, view), NUM_PHOTOS))
    if len(views) < MIN_PHOTOS:
        raise UserError(f"--int8 {folder} has {len(views)} usable photos: give a folder of at least {MIN_PHOTOS}")
    return np.stack(views)


def _views(files: list[Path], view: ViewSpec) -> Iterator[np.ndarray]:
    for path in files:
        with contextlib.suppress(ImageError):
            yield read_eval_view(path.read_bytes(), view)[0]


def quantize(folder: Path, views_BPP3: np.ndarray) -> None:
    """Replace both ONNX files in a folder; the views are photos like those to caption."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Views(CalibrationDataReader):
        """The views in batches; None after the last one."""

        def __init__(self) -> None:
            self._starts = iter(range(0, len(views_BPP3), ENCODED_AT_ONCE))

        def get_next(self) -> Any:
            start = next(self._starts, None)
            return None if start is None else {"views": views_BPP3[start : start + ENCODED_AT_ONCE]}

    logging.disable(logging.WARNING)  # advice on how to quantize
    try:
        with TemporaryDirectory(dir=folder) as scratch:
            new = Path(scratch, DECODER)
            quantize_dynamic(
                folder / DECODER,
                new,
                weight_type=QuantType.QInt8,
                per_channel=True,
                nodes_to_exclude=_stacked_products(folder / DECODER),
            )
            new.replace(folder / DECODER)
            quant_pre_process(folder / ENCODER, Path(scratch, ENCODER), skip_symbolic_shape=True)
            quantize_static(
                Path(scratch, ENCODER),
                folder / ENCODER,
                Views(),
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                op_types_to_quantize=QUANTIZED,
            )
    finally:
        logging.disable(logging.NOTSET)


def _stacked_products(path: Path) -> list[str]:
    """The names of a model's products with stacks of matrices, of which onnxruntime has no int8 for each column."""
    import onnx

    graph = onnx.load(path).graph
    stacks = {tensor.name for tensor in graph.initializer if len(tensor.dims) != 2}
    return [node.name for node in graph.node if node.op_type == "MatMul" and node.input[1] in stacks]
