"""Compare runs: losses per step or at the end, relative to the expected ones, and weights."""

import statistics
from collections.abc import Sequence

import numpy as np

from acceptance.commands import Run
from acceptance.jobs import CheckError, Outcome


def greatest_difference(found: Sequence[float], wanted: Sequence[float]) -> float:
    """The largest relative difference from the expected loss at any step. Raises CheckError for other steps."""
    if len(found) != len(wanted):
        raise CheckError(f"{len(found)} steps, not {len(wanted)}")
    return float(np.max(np.abs(np.array(found) - np.array(wanted)) / np.array(wanted)))


def end_difference(found: Sequence[float], wanted: Sequence[float]) -> float:
    """The relative difference of the mean loss of the last quarter from the expected one."""
    if len(found) != len(wanted):
        raise CheckError(f"{len(found)} steps, not {len(wanted)}")
    return abs(last_quarter(found) / last_quarter(wanted) - 1)


def last_quarter(losses: Sequence[float]) -> float:
    """The mean loss of the last quarter."""
    return statistics.fmean(losses[-max(1, len(losses) // 4) :])


def check_learns(losses: Sequence[float]) -> None:
    """Raise CheckError unless the loss goes down."""
    first = statistics.fmean(losses[: max(1, len(losses) // 4)])
    if not last_quarter(losses) < first:
        raise CheckError(
            f"the loss does not go down: {first:.3f} in the first quarter, {last_quarter(losses):.3f} at last"
        )


def weight_difference(found: Run, wanted: Run) -> float:
    """The largest difference of any weight. Raises CheckError for other tensors."""
    one, two = found.weights(), wanted.weights()
    if one.keys() != two.keys():
        raise CheckError(f"the models have other tensors: {sorted(one.keys() ^ two.keys())[:3]}")
    return max(float(np.abs(one[name].astype(np.float64) - two[name]).max()) for name in one)


def compare_steps(found: Run, wanted: Run, *, tolerance: float, note: str = "") -> Outcome:
    """The largest relative difference of any step's loss; the loss must go down too."""
    losses = found.losses()
    check_learns(losses)
    words = f"{len(losses)} steps, loss {losses[0]:.3f} to {losses[-1]:.3f}{note}"
    return Outcome(figure=greatest_difference(losses, wanted.losses()), bar=tolerance, at_most=True, note=words)
