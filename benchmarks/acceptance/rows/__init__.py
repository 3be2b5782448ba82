"""All rows of the table, in order. A new row is a function that runs commands with a `Job` and returns an `Outcome`.

For example, if `two_beams` is such a function in model.py: `Row(name="two beams", check=model.two_beams)`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from acceptance.jobs import Job, Outcome
from acceptance.rows import model, speed, training


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A row of the table, the seconds that its own commands may take, and whether it must run alone."""

    name: str
    check: Callable[[Job], Outcome]
    seconds: float = 90.0
    alone: bool = False


ROWS = (
    Row(name="pack", check=training.pack, alone=True),
    Row(name="fp32 against the CPU", check=training.fp32),
    Row(name="fp32 without TF32", check=training.fp32_exact),
    Row(name="fp32 again", check=training.fp32_again),
    Row(name="bf16", check=partial(training.half_precision, precision="bf16", tolerance=training.BF16_END)),
    Row(name="fp16", check=partial(training.half_precision, precision="fp16", tolerance=training.FP16_END)),
    Row(name="SIGTERM and --resume", check=training.resumed),
    Row(name="accumulation against the CPU", check=training.accumulation),
    Row(name="accumulation against none", check=training.accumulation_end),
    Row(name="compiled encoder", check=training.compiled, seconds=150),
    Row(name="thawed encoder", check=training.thawed),
    Row(name="ResNet-18 thawed", check=training.residual),
    Row(name="cached features", check=training.cached_features),
    Row(name="two processes, gloo", check=training.two_with_gloo),
    Row(name="two processes, NCCL", check=training.two_with_nccl),
    Row(name="a longer run", check=model.learned),
    Row(name="evaluation", check=model.evaluation),
    Row(name="captions in float32", check=partial(model.same_captions, precision="float32", least=0.95)),
    Row(name="captions in bfloat16", check=partial(model.same_captions, precision="bfloat16", least=0.9)),
    Row(name="ONNX", check=model.onnx, seconds=120),
    Row(name="frozen encoder as a graph", check=model.same_features, alone=True),
    Row(name="frozen encoder as a graph, speed", check=model.faster_features, alone=True),
    *(Row(name=name, check=check, seconds=120, alone=True) for name, check in speed.CHECKS.items()),
)
