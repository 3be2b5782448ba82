"""Compare ONNX files on a device with the CPU: `python -m acceptance.check_onnx FOLDER cuda|cpu` prints JSON with the
largest difference.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

PROVIDERS = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}
NUM_IMAGES = 8
TYPES = {"tensor(uint8)": np.uint8, "tensor(int64)": np.int64, "tensor(float)": np.float32}


def main(folder: str, device: str) -> None:
    """Run both files on device and CPU; the decoder gets the encoder's output."""
    provider, available = PROVIDERS[device], onnxruntime.get_available_providers()
    answer: dict[str, Any] = {"provider": provider, "providers": available, "difference": None}
    if provider in available:
        if device == "cuda":
            onnxruntime.preload_dlls()  # those that come with torch
        answer["difference"] = max(compare(Path(folder, name), provider) for name in ("encoder.onnx", "decoder.onnx"))
    print(json.dumps(answer))


def compare(path: Path, provider: str) -> float:
    """The largest difference of any output between the provider and the CPU, on random input."""
    found, wanted = (run(path, [name]) for name in (provider, PROVIDERS["cpu"]))
    return float(max(np.abs(one - two).max() for one, two in zip(found, wanted, strict=True)))


def run(path: Path, providers: Sequence[str]) -> list[np.ndarray]:
    """The outputs for random input, which is the same in each call."""
    session = onnxruntime.InferenceSession(path, providers=list(providers))
    if session.get_providers()[0] != providers[0]:
        raise RuntimeError(f"onnxruntime does not start {providers[0]}, though it lists it")
    generator = np.random.default_rng(0)
    inputs = {}
    for wanted in session.get_inputs():
        shape = [size if isinstance(size, int) else NUM_IMAGES for size in wanted.shape]
        highest = 256 if wanted.type == "tensor(uint8)" else 4
        values = generator.integers(0, highest, shape) if "int" in wanted.type else generator.normal(size=shape)
        inputs[wanted.name] = values.astype(TYPES[wanted.type])
    return [np.asarray(output) for output in session.run(None, inputs)]


if __name__ == "__main__":
    main(*sys.argv[1:])
