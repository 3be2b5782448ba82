"""Types of command-line flags: numbers with a range, and paths. `--help` shows the range, `captioner.cli` checks it."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.constructors import PrimitiveConstructorSpec

MAX_INT = (1 << 31) - 1  # NumPy, torch and file formats all hold it


def flag_name(field_name: str) -> str:
    """The command line's name of a settings field."""
    return f"--{field_name.replace('_', '-')}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Range:
    """A range of finite numbers."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def __contains__(self, number: float) -> bool:
        return (
            math.isfinite(number)
            and (self.at_least is None or number >= self.at_least)
            and (self.above is None or number > self.above)
            and (self.at_most is None or number <= self.at_most)
            and (self.below is None or number < self.below)
        )

    def __str__(self) -> str:
        bounds = {
            "at least": self.at_least,
            "more than": self.above,
            "at most": self.at_most,
            "less than": self.below,
        }
        return " and ".join(f"{words} {bound:,}" for words, bound in bounds.items() if bound is not None)

    def metavar(self, name: str) -> str:
        """The range around a number's name: `INT >= 1`, `0 <= FLOAT < 1`."""
        low = {">=": self.at_least, ">": self.above}
        high = {"<=": None if self.at_most == MAX_INT else self.at_most, "<": self.below}
        lows = [(sign, bound) for sign, bound in low.items() if bound is not None]
        highs = [f" {sign} {bound}" for sign, bound in high.items() if bound is not None]
        if not highs:
            return name + "".join(f" {sign} {bound}" for sign, bound in lows)
        return "".join(f"{bound} {sign.replace('>', '<')} " for sign, bound in lows) + name + "".join(highs)


@dataclass(frozen=True, kw_only=True)
class Number(PrimitiveConstructorSpec[Any]):
    """How tyro parses a number and shows its range, which `captioner.cli` checks."""

    numbers: Range


def int_flag(*, at_least: int, at_most: int = MAX_INT) -> Number:
    """The metadata of `Annotated` for an int in this range."""
    return _number(int, Range(at_least=at_least, at_most=at_most))


def _number(kind: type[int] | type[float], numbers: Range) -> Number:
    return Number(
        nargs=1,
        metavar=numbers.metavar(kind.__name__.upper()),
        instance_from_str=lambda words: kind(words[0]),
        is_instance=lambda value: isinstance(value, kind) or (kind is float and isinstance(value, int)),
        str_from_instance=lambda value: [str(value)],
        numbers=numbers,
    )


@dataclass(frozen=True, kw_only=True)
class Local(PrimitiveConstructorSpec[Any]):
    """A local path; `captioner.cli` refuses URLs."""


def _path(
    kind: type[str] | type[Path], metavar: str, spec: type[PrimitiveConstructorSpec[Any]] = PrimitiveConstructorSpec
) -> PrimitiveConstructorSpec[Any]:
    """Shells expand `~` in `--flag ~/x` and not in `--flag=~/x`."""
    return spec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: kind(os.path.expanduser(words[0])),  # noqa: PTH111 - Path would join s3://
        is_instance=lambda value: isinstance(value, kind),
        str_from_instance=lambda value: [str(value)],
    )


Count = Annotated[int, int_flag(at_least=1)]
CountOrZero = Annotated[int, int_flag(at_least=0)]
Workers = Annotated[int, int_flag(at_least=1, at_most=10_000)]
WorkersOrZero = Annotated[int, int_flag(at_least=0, at_most=1_000)]
Pixels = Annotated[int, int_flag(at_least=1, at_most=10_000)]
Quality = Annotated[int, int_flag(at_least=1, at_most=100)]
Seed = Annotated[int, int_flag(at_least=0)]
Positive = Annotated[float, _number(float, Range(above=0))]
NotNegative = Annotated[float, _number(float, Range(at_least=0))]
Fraction = Annotated[float, _number(float, Range(at_least=0, at_most=1))]
FractionBelow1 = Annotated[float, _number(float, Range(at_least=0, below=1))]
AnyNumber = Annotated[float, _number(float, Range())]

Location = Annotated[str, _path(str, "PATH|URL")]  # a path, or the URL of one
LocalPath = Annotated[str, _path(str, "PATH", Local)]
File = Annotated[Path, _path(Path, "PATH", Local)]
