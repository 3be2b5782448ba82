"""A frozen encoder's CUDA graphs against direct calls: `python -m acceptance.measure_graph OPTIONS`, JSON.

Prints one line of JSON: the largest difference of features, relative to the largest feature, over precisions, batch
sizes, other weights, moved weights, inference mode and other architectures; and the speed of graphs relative to direct
calls, in bfloat16, alternating. While graphs are captured a thread pins memory and queries events, as in training.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captioner.model.encoders import Encoder, preprocessing
from contenders.training import time_all
from measuring.figures import Cost, take_turns, times_as_fast

ARCHITECTURE_BATCH = 4


class Comparison:
    """An encoder's features against those of direct calls, and the differences so far."""

    def __init__(self, name: str, *, device: str, autocast: bool) -> None:
        torch.manual_seed(0)
        self.encoder = Encoder(name, trainable=False).to(device)
        self.crop = preprocessing(name).crop
        self.device, self.autocast = device, autocast
        self.differences: list[float] = []

    def images(self, batch: int) -> Tensor:
        """Noise with a different colour and contrast in each image, in the memory layout of `normalise`."""
        colours_B311, contrast_B111 = (torch.randn(batch, size, 1, 1, device=self.device) for size in (3, 1))
        noise_B3HW = torch.randn(batch, 3, self.crop, self.crop, device=self.device)
        return (contrast_B111 * noise_B3HW + colours_B311).to(memory_format=torch.channels_last)

    def encode(self, images_B3HW: Tensor, *, direct: bool) -> Tensor:
        """Features (B, F), by a graph if there is one, or directly."""
        with torch.autocast(self.device, torch.bfloat16, enabled=self.autocast):
            if not direct:
                return self.encoder(images_B3HW)
            with torch.no_grad():
                return self.encoder.backbone(images_B3HW).flatten(1)

    def compare(self, *batches: int) -> None:
        """Compare on new images, once for each batch size."""
        for batch in batches:
            images_B3HW = self.images(batch)
            found_BF, wanted_BF = (self.encode(images_B3HW, direct=direct).float() for direct in (False, True))
            self.differences.append(float((found_BF - wanted_BF).abs().max() / wanted_BF.abs().max()))

    def check_graphs(self, number: int) -> None:
        """Raises RuntimeError unless the encoder has this number of graphs on a GPU."""
        graphs = self.encoder._graphs
        if self.device == "cuda" and (graphs is None or len(graphs) != number):
            raise RuntimeError(f"{len(graphs or ())} graphs, not {number}")


def compare_states(name: str, batches: Sequence[int], *, device: str, autocast: bool) -> float:
    """The largest difference while weights change, weights move, and inference mode is switched on and off."""
    torch.manual_seed(1)
    other_weights = Encoder(name, trainable=False).state_dict()
    comparison = Comparison(name, device=device, autocast=autocast)
    comparison.compare(*batches, *batches, *batches)
    comparison.check_graphs(len(batches))
    comparison.encoder.load_state_dict(other_weights)
    comparison.compare(*batches)
    with torch.inference_mode():
        comparison.compare(*batches)
    comparison.check_graphs(len(batches))
    comparison.encoder.cpu().to(device)
    with torch.inference_mode():
        comparison.compare(*batches, *batches)
    comparison.compare(*batches)
    comparison.check_graphs(len(batches))
    return largest(comparison.differences)


def largest(differences: Sequence[float]) -> float:
    """The largest difference; NaN if one is NaN."""
    return float(np.max(differences, initial=0.0))


def compare_architectures(names: Sequence[str], *, device: str) -> float:
    """The largest difference over these architectures; shows that all can be captured."""
    differences: list[float] = []
    for name in names:
        comparison = Comparison(name, device=device, autocast=True)
        comparison.compare(*[ARCHITECTURE_BATCH] * 3)
        comparison.check_graphs(1)
        differences += comparison.differences
    return largest(differences)


def measure_speed(name: str, batch: int, *, device: str, rounds: int, times: int) -> dict[str, float | None]:
    """Images/s of both in bfloat16, and the median of their ratios."""
    comparison = Comparison(name, device=device, autocast=device == "cuda")
    images_B3HW = comparison.images(batch)

    def encode(*, direct: bool) -> int:
        for _ in range(times):
            comparison.encode(images_B3HW, direct=direct)
        return times * batch

    contenders = {
        "direct": lambda _number: time_all(lambda: encode(direct=True)),
        "graph": lambda _number: time_all(lambda: encode(direct=False)),
    }
    take_turns(contenders, rounds=1)  # captures; not counted
    comparison.check_graphs(1)
    costs: dict[str, list[Cost | None]] = take_turns(contenders, rounds=rounds)
    fastest = {name: min(cost.wall_ms for cost in turns if cost) for name, turns in costs.items()}
    return {
        "ratio": times_as_fast(costs["graph"], costs["direct"], clock="wall_ms"),
        "direct_images_a_second": 1000 / fastest["direct"],
        "graph_images_a_second": 1000 / fastest["graph"],
    }


@contextmanager
def pinning(device: str) -> Iterator[None]:
    """A context in which, on a GPU, a thread pins memory and records and queries events."""
    end = Event()

    def pin() -> None:
        stream, event = torch.cuda.Stream(), torch.cuda.Event()
        while not end.wait(0.001):
            torch.empty(1 << 20).pin_memory()
            event.record(stream)
            event.query()

    thread = Thread(target=pin, daemon=True)
    if device == "cuda":
        thread.start()
    try:
        yield
        if device == "cuda" and not thread.is_alive():
            raise RuntimeError("the thread that pins memory has died")
    finally:
        end.set()
        if device == "cuda":
            thread.join()


def main(options: Mapping[str, Any]) -> dict[str, float | None]:
    """Measure differences and speeds."""
    torch.set_float32_matmul_precision("high")  # as in the training command
    name, batch, device = options["encoder"], options["batch"], options["device"]
    batches = (batch, batch // 2 + 1)
    with pinning(device):
        found = {
            "bf16": compare_states(name, batches, device=device, autocast=True),
            "fp32": compare_states(name, batches, device=device, autocast=False),
            "architectures": compare_architectures(options["architectures"], device=device),
        }
    return found | measure_speed(name, batch, device=device, rounds=options["rounds"], times=options["times"])


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
