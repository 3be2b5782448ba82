"""METEOR and SPICE, which exist only as Java programs; the optional package pycocoevalcap contains and runs them."""

import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeVar

from captioner.errors import UserError
from captioner.metrics import ptb_tokenize

JavaMetric = Literal["meteor", "spice"]
K = TypeVar("K")
Texts = dict[int, list[str]]


def java_scores(
    candidates: Mapping[K, str], references: Mapping[K, Sequence[str]], *, metrics: Sequence[JavaMetric]
) -> dict[str, float]:
    """The corpus scores in 0..1 of the `metrics`, by name. Raises UserError where Java or the package is missing."""
    check_java(metrics)
    hypotheses = {number: [_tokenized(candidates[key])] for number, key in enumerate(candidates)}
    originals = {number: [_tokenized(text) for text in references[key]] for number, key in enumerate(candidates)}
    programs: dict[str, Callable[[Texts, Texts], float]] = {"meteor": _meteor, "spice": _spice}
    return {metric: programs[metric](originals, hypotheses) for metric in metrics}


def check_java(metrics: Sequence[JavaMetric]) -> None:
    """Raise UserError where Java or the package is missing, unless `metrics` is empty."""
    if not metrics:
        return
    needed = f"{' and '.join(metrics)} cannot be computed"
    try:
        import pycocoevalcap  # type: ignore[missing-import]  # noqa: F401
    except ImportError as error:
        raise UserError(f"{needed} without pycocoevalcap: pip install -e '.[java]'") from error
    if shutil.which("java") is None:
        raise UserError(f"{needed} without Java: install a Java runtime that the command `java` starts")


def _tokenized(caption: str) -> str:
    return " ".join(ptb_tokenize(caption))


def _meteor(references: Texts, candidates: Texts) -> float:
    from pycocoevalcap.meteor.meteor import Meteor  # type: ignore[missing-import]

    try:
        return float(Meteor().compute_score(references, candidates)[0])
    except (OSError, ValueError) as error:  # which the package raises where the Java program ended early
        raise UserError(
            f"METEOR's Java program failed ({error}): try `java -Xmx2G -version`, or leave meteor out"
        ) from error


def _spice(references: Texts, candidates: Texts) -> float:
    from pycocoevalcap.spice.spice import Spice  # type: ignore[missing-import]

    try:
        spice = Spice()  # downloads the parser when it is first used
    except OSError as error:
        raise UserError(
            f"SPICE cannot download its parser, Stanford CoreNLP 3.6.0 ({error}): run it once with access to "
            "nlp.stanford.edu, or leave spice out"
        ) from error
    try:
        return float(spice.compute_score(references, candidates)[0])
    except subprocess.CalledProcessError as error:
        raise UserError(
            f"SPICE's Java program ended with code {error.returncode}, see its output above: it needs 8 GB of memory "
            "and Java 8; or leave spice out"
        ) from error
