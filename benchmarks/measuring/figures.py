"""What every benchmark shares: costs, contenders that take turns, bars, a description of the run, tables and JSON."""

import gc
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from captioner import cli
from captioner.files import storage
from captioner.plots import Plot, short_number
from captioner.plots import bars as draw_bars
from captioner.workers import count_processors


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """The cost of one turn; `cpu_seconds` is None if the CPU time of all processes is not known."""

    items: int
    wall_seconds: float
    cpu_seconds: float | None = None

    @property
    def wall_ms(self) -> float:
        """Milliseconds of wall time an item."""
        return 1000 * self.wall_seconds / self.items

    @property
    def cpu_ms(self) -> float | None:
        """Milliseconds of CPU time an item."""
        return None if self.cpu_seconds is None else 1000 * self.cpu_seconds / self.items


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """A requirement: `value` at least `bar` (or at most, as the name says); `value` is None if it was not measured."""

    name: str
    value: float | None
    bar: float
    holds: bool | None


Contender = Callable[[int], Cost | None]


def time_here(items: int, action: Callable[[], object]) -> Cost:
    """The cost of `action` in this process, including all its threads."""
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    return Cost(items=items, cpu_seconds=time.process_time() - cpu, wall_seconds=time.perf_counter() - wall)


def take_turns(contenders: Mapping[str, Contender], *, rounds: int) -> dict[str, list[Cost | None]]:
    """Each contender's cost in each round. All take a turn in every round, and each round starts with the next one."""
    names = list(contenders)
    costs: dict[str, list[Cost | None]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            costs[name].append(contenders[name](number))
        cli.console.print(f"round {number + 1} of {rounds} done", style="dim")
    return costs


# ---- figures ----------------------------------------------------------------------------------------------


def median_of(costs: Sequence[Cost | None], *, figure: str) -> float | None:
    """The median of a figure of Cost, by its name, over the rounds."""
    return median([None if cost is None else getattr(cost, figure) for cost in costs])


def median(values: Sequence[float | None]) -> float | None:
    """The median of the known values; None if there is none."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def times_as_fast(costs: Sequence[Cost | None], other: Sequence[Cost | None], *, clock: str) -> float | None:
    """How many times as fast as `other`: the median of the rounds' ratios, by `clock` "cpu_ms" or "wall_ms"."""
    ratios = []
    for one, two in zip(costs, other, strict=True):
        ours, theirs = (None if cost is None else getattr(cost, clock) for cost in (one, two))
        ratios.append(theirs / ours if ours and theirs else None)
    return median(ratios)


def at_least(name: str, value: float | None, bar: float) -> Bar:
    """A bar that holds from `bar` upwards."""
    return Bar(name=f"{name}: at least", value=value, bar=bar, holds=None if value is None else value >= bar)


def at_most(name: str, value: float | None, bar: float) -> Bar:
    """A bar that holds up to `bar`."""
    return Bar(name=f"{name}: at most", value=value, bar=bar, holds=None if value is None else value <= bar)


# ---- output -----------------------------------------------------------------------------------------------


def describe_run(packages: Sequence[str], **facts: object) -> dict[str, str]:
    """Machine, versions and date of this run, and more `facts`."""
    versions = [f"{name} {found}" for name in packages if (found := version(name))]
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{_processor()}, {count_processors()} cores, load {os.getloadavg()[0]:.1f} at the start",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "versions": ", ".join(versions),
        **{name: str(fact) for name, fact in facts.items()},
    }


def version(package: str) -> str | None:
    """An installed package's version."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """The processor's name; on Linux only /proc/cpuinfo has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def print_rows(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows with equal keys as a table; a dash is a value that was not measured."""
    if rows:
        cells = [["-" if value is None else value for value in row.values()] for row in rows]
        cli.print_table(title, [name.replace("_", " ") for name in rows[0]], cells)


def print_run(title: str, run: Mapping[str, str]) -> None:
    """Print what `describe_run` found."""
    print_rows(title, [{"": name, "of this run": text} for name, text in run.items()])


def print_bars(bars: Sequence[Bar]) -> None:
    """Print the bars, and whether each holds."""
    words = {True: "holds", False: "DOES NOT HOLD", None: "not measured"}
    rows = [("-" if bar.value is None else f"{bar.value:.2f}", bar.bar, words[bar.holds]) for bar in bars]
    cells = [(bar.name, *row) for bar, row in zip(bars, rows, strict=True)]
    cli.print_table("bars", ("what", "value", "bar", ""), cells)


def finish(
    bars: Sequence[Bar], *, json: Path | None, run: Mapping[str, str], rows: Sequence[Mapping[str, Any]]
) -> None:
    """Print the bars, and write everything to `json` if given. Raises UserError."""
    print_bars(bars)
    if json:
        write_json(json, run=run, rows=rows, bars=bars)


def write_json(path: Path, *, run: Mapping[str, str], rows: Sequence[Mapping[str, Any]], bars: Sequence[Bar]) -> None:
    """Write `{"run": {...}, "rows": [...], "bars": [{"name", "value", "bar", "holds"}]}`, and the bars' plot beside it.

    Raises UserError.
    """
    content = {"run": dict(run), "rows": [dict(row) for row in rows], "bars": [asdict(bar) for bar in bars]}
    try:
        storage.write_atomic(str(path), json.dumps(content, indent=1) + "\n")
        if bars and path.suffix != ".svg":
            storage.write_atomic(str(path.with_suffix(".svg")), plot(bars, run, title=path.stem).svg)
    except OSError as error:
        remedy = "name a file in a folder that can be written"
        raise cli.UserError(f"cannot write --json {path} ({error.strerror}): {remedy}") from error


def plot(bars: Sequence[Bar], run: Mapping[str, str], *, title: str) -> Plot:
    """Each value as a multiple of its bar, which is the mark, labelled with the value; as it is where the bar is 0."""
    known = {bar.name: bar for bar in bars if bar.value is not None and math.isfinite(bar.value)}
    return draw_bars(
        f"{title}: measured, in multiples of the bar",
        {bar.name: bar.value / (bar.bar or 1.0) if bar.value and bar.name in known else None for bar in bars},
        labels={name: f"{short_number(bar.value or 0.0)} ({bar.bar:g})" for name, bar in known.items()},
        limits={bar.name: float(bar.bar != 0) for bar in bars},
        note="; ".join(run[name] for name in ("machine", "date", "mode") if name in run),
    )
