"""Types of command-line flags: numbers with a range, and paths. `--help` shows the range, `captioner.cli` checks it."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args

from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    UnsupportedTypeAnnotationError,
)

MAX_INT = (1 << 31) - 1  # NumPy, torch and file formats all hold it

OPTIONAL_FLAGS = ConstructorRegistry()


@OPTIONAL_FLAGS.primitive_rule
def _optional(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | UnsupportedTypeAnnotationError | None:
    """A flag of type `X | None` takes what X takes: leaving it out is the way to give None."""
    kinds = get_args(info.type)
    if len(kinds) != 2 or NoneType not in kinds:
        return None
    kind = next(kind for kind in kinds if kind is not NoneType)
    spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(kind, set(info.markers)))
    if isinstance(spec, UnsupportedTypeAnnotationError):
        return spec
    return replace(
        spec,
        is_instance=lambda value: value is None or spec.is_instance(value),
        str_from_instance=lambda value: ["None"] if value is None else spec.str_from_instance(value),
    )


def flag_name(field_name: str) -> str:
    """The command line's name of a settings field."""
    return f"--{field_name.replace('_', '-')}"


@dataclass(frozen=True, kw_only=True)
class Number(PrimitiveConstructorSpec[Any]):
    """How tyro parses a number and shows its range, `metavar`; `captioner.cli` refuses numbers that are not in it."""

    is_in_range: Callable[[float], bool]


def int_flag(*, at_least: int, at_most: int = MAX_INT) -> Number:
    """The metadata of `Annotated` for an int in this range."""
    shown = f"INT >= {at_least}" if at_most == MAX_INT else f"{at_least} <= INT <= {at_most}"
    return _number(int, shown, lambda number: at_least <= number <= at_most)


def _number(kind: type[int] | type[float], shown: str, is_in_range: Callable[[float], bool]) -> Number:
    return Number(
        nargs=1,
        metavar=shown,
        instance_from_str=lambda words: kind(words[0]),
        is_instance=lambda value: isinstance(value, kind) or (kind is float and isinstance(value, int)),
        str_from_instance=lambda value: [str(value)],
        is_in_range=is_in_range,
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
Positive = Annotated[float, _number(float, "FLOAT > 0", lambda number: 0 < number < math.inf)]
NotNegative = Annotated[float, _number(float, "FLOAT >= 0", lambda number: 0 <= number < math.inf)]
Fraction = Annotated[float, _number(float, "0 <= FLOAT <= 1", lambda number: 0 <= number <= 1)]
FractionBelow1 = Annotated[float, _number(float, "0 <= FLOAT < 1", lambda number: 0 <= number < 1)]
AnyNumber = Annotated[float, _number(float, "finite FLOAT", math.isfinite)]

Location = Annotated[str, _path(str, "PATH|URL")]  # a path, or the URL of one
LocalPath = Annotated[str, _path(str, "PATH", Local)]
File = Annotated[Path, _path(Path, "PATH", Local)]
