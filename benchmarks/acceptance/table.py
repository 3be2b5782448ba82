"""Run the rows and report their results: a table that grows as rows end, and the same as JSON."""

import time
import traceback
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal

from acceptance.jobs import Bench, CheckError, Job, Outcome, SkipError
from measuring.figures import Bar, at_least, at_most, describe_run, write_json

if TYPE_CHECKING:
    from acceptance.rows import Row

PACKAGES = ("torch", "torchvision", "accelerate", "webdataset", "tyro", "nltk", "pycocotools", "simplejpeg", "pillow",
            "numpy", "safetensors", "onnxruntime")  # fmt: skip
Result = Literal["pass", "FAIL", "skipped"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """A row's result: its outcome, or the reason why there is none, and the end of a command's output."""

    name: str
    result: Result
    seconds: float
    outcome: Outcome | None = None
    reason: str = ""
    output: str = ""

    @property
    def bar(self) -> str:
        """The bar as the table shows it."""
        return f"{'<=' if self.outcome.at_most else '>='} {self.outcome.bar:g}" if self.outcome else ""

    def as_bar(self) -> Bar | None:
        """The bar as other benchmarks write it; None if nothing was measured."""
        if self.outcome is None:
            return None
        make = at_most if self.outcome.at_most else at_least
        return make(self.name, self.outcome.figure, self.outcome.bar)

    def as_row(self) -> dict[str, Any]:
        """The row as JSON contains it."""
        outcome = self.outcome
        return {
            "name": self.name,
            "result": self.result.lower(),
            "reason": self.reason,
            "figure": outcome.figure if outcome else None,
            "bar": self.bar,
            "note": outcome.note if outcome else "",
            "seconds": round(self.seconds, 1),
            "output": self.output,
        }


@dataclass(kw_only=True)
class Table:
    """Prints each finding as it comes, and writes all to a JSON file if one is wanted."""

    json: Path | None
    width: int
    findings: list[Finding] = field(default_factory=list)
    _lock: Any = field(default_factory=Lock)

    def __post_init__(self) -> None:
        self._run = describe_run(PACKAGES)
        print(", ".join(self._run.values()), flush=True)
        self._print("", "check", "figure", "bar", "seconds")

    def add(self, finding: Finding) -> None:
        """Print a row, and below it the output of a failed command."""
        with self._lock:
            self.findings.append(finding)
            figure = f"{finding.outcome.figure:.4g}" if finding.outcome else ""
            words = "; ".join(filter(None, (finding.reason, finding.outcome.note if finding.outcome else "")))
            self._print(finding.result, finding.name, figure, finding.bar, f"{finding.seconds:.0f}", words)
            for line in finding.output.splitlines():
                print(f"        | {line}", flush=True)
            self._write()

    def close(self) -> int:
        """Print the counts and return the exit code."""
        counts = Counter(finding.result for finding in self.findings)
        print(f"{counts['pass']} passed, {counts['FAIL']} failed, {counts['skipped']} skipped", flush=True)
        return 1 if counts["FAIL"] else 0

    def _print(self, *cells: str) -> None:
        result, name, figure, bar, seconds, *words = cells
        print(
            f"{result:8}{name:{self.width}}  {figure:>9}  {bar:>9}  {seconds:>7}  {' '.join(words)}".rstrip(),
            flush=True,
        )

    def _write(self) -> None:
        if self.json:
            bars = [bar for finding in self.findings if (bar := finding.as_bar())]
            write_json(self.json, run=self._run, rows=[finding.as_row() for finding in self.findings], bars=bars)


def run_rows(rows: "Sequence[Row]", bench: Bench, table: Table, *, parallel: int) -> None:
    """Run rows in order, several at a time; a row with `alone` runs by itself, after those before it."""
    while rows:
        alone = rows[0].alone
        count = 1 if alone else next((n for n, row in enumerate(rows) if row.alone), len(rows))
        with ThreadPoolExecutor(1 if alone else parallel) as threads:
            for row in rows[:count]:
                threads.submit(lambda row: table.add(run_row(row, bench)), row)
        rows = rows[count:]


def run_row(row: "Row", bench: Bench) -> Finding:
    """Run one row and return its result."""
    if time.monotonic() >= bench.ends:
        return Finding(name=row.name, result="skipped", seconds=0.0, reason="the time for all rows was over before")
    started, job = time.monotonic(), Job(bench, seconds=row.seconds)
    outcome, reason, output = None, "", ""
    result: Result = "FAIL"
    try:
        outcome = row.check(job)
        result = "pass" if outcome.holds else "FAIL"
    except SkipError as skipped:
        result, reason = "skipped", str(skipped)
    except CheckError as failed:
        reason, output = failed.reason, failed.output
    except Exception as error:  # a bug in a row must not stop the others
        reason, output = f"the row itself failed: {error!r}", traceback.format_exc(limit=-3)
    seconds = time.monotonic() - started
    return Finding(name=row.name, result=result, seconds=seconds, outcome=outcome, reason=reason, output=output)
