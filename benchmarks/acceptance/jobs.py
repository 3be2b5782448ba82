"""Run commands with time limits: jobs of a bench with a common deadline, and results that several rows share.

A row's check gets a `Job`, starts commands with it and returns an `Outcome`, or raises `CheckError` or `SkipError`. A
command that misses its deadline is killed with all processes that it started.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from threading import Lock
from typing import Any, Literal, TypeVar

REPOSITORY = Path(__file__).resolve().parents[2]
SHARED_SECONDS = 150.0  # for results that several rows share
SHOWN_LINES = 12
KILLED = "killed when its time was over"
OF_A_JOB = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

Device = Literal["cuda", "cpu"]
Made = TypeVar("Made")


class CheckError(Exception):
    """A check that failed, or a command that failed: the reason, and the end of its output."""

    def __init__(self, reason: str, output: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.output = output


class SkipError(Exception):
    """A check that cannot run here; the message says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """A figure, the bar that it must reach (with `at_most`: must not exceed), and a note."""

    figure: float
    bar: float
    at_most: bool = False
    note: str = ""

    @property
    def holds(self) -> bool:
        """Whether the figure meets the bar; NaN does not."""
        return self.figure <= self.bar if self.at_most else self.figure >= self.bar


@dataclass(kw_only=True)
class Bench:
    """What all jobs of a run share; `ends` is the time (monotonic) at which every command is killed.

    A row may take `patience` times its seconds.
    """

    device: Device
    folder: Path
    ends: float
    packages: Path | None = None
    small: bool = False
    num_gpus: int = 0
    patience: float = 1.0
    _numbers: Any = field(default_factory=count)
    _lock: Any = field(default_factory=Lock)
    _results: dict[str, tuple[Any, list[Any]]] = field(default_factory=dict)

    def new_folder(self, name: str) -> Path:
        """Create an empty folder."""
        path = self.folder / f"{next(self._numbers):03d}-{name}"
        path.mkdir(parents=True)
        return path

    def environment(self, device: Device) -> dict[str, str]:
        """The environment of a command on a device: checkout and unpacked wheels first, no launcher's variables."""
        found = {name: value for name, value in os.environ.items()
                 if name not in OF_A_JOB and not name.startswith("ACCELERATE_")}  # fmt: skip
        folders = [REPOSITORY, REPOSITORY / "benchmarks", self.packages, os.environ.get("PYTHONPATH")]
        found["PYTHONPATH"] = os.pathsep.join(str(folder) for folder in folders if folder)
        found |= {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
        if device == "cpu":
            found |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
            found |= {"OMP_WAIT_POLICY": "passive"}  # spinning threads slow down commands that run at the same time
        return found


class Job:
    """Runs one row's commands for `seconds` from its start; time spent on shared results does not count."""

    def __init__(self, bench: Bench, *, seconds: float) -> None:
        self.bench = bench
        self.small = bench.small
        self.device = bench.device
        self.others_seconds = 0.0
        self._ends = time.monotonic() + seconds * bench.patience

    @property
    def ends(self) -> float:
        """The time at which its commands are killed."""
        return min(self._ends, self.bench.ends)

    def run(
        self,
        command: Sequence[object],
        *,
        device: Device | None = None,
        variables: Mapping[str, str] | None = None,
        codes: Sequence[int] = (0,),
    ) -> str:
        """Run a command and return its output. Raises CheckError for an exit code that is not in `codes`."""
        return self.start(command, device=device, variables=variables).wait(codes)

    def start(
        self, command: Sequence[object], *, device: Device | None = None, variables: Mapping[str, str] | None = None
    ) -> "Command":
        """Start a command on a device (default: the bench's), with more variables in its environment."""
        words = list(map(str, command))
        folder = self.bench.new_folder("command")
        environment = self.bench.environment(device or self.device) | dict(variables or {})
        with (folder / "log").open("wb") as file:
            process = subprocess.Popen(
                words, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        return Command(job=self, words=words, process=process, log=folder / "log")

    def shared(self, name: str, make: Callable[["Job"], Made]) -> Made:
        """The result of `make`, computed once for all rows.

        Raises CheckError if it fails, SkipError in later rows.
        """
        started = time.monotonic()
        with self.bench._lock:
            lock, results = self.bench._results.setdefault(name, (Lock(), []))
        with lock:
            made_here = not results
            if made_here:
                try:
                    results.append(make(Job(self.bench, seconds=SHARED_SECONDS)))
                except (CheckError, SkipError) as error:
                    results.append(error)
        waited = time.monotonic() - started
        self.others_seconds += waited
        self._ends += waited
        if isinstance(results[0], SkipError) or (isinstance(results[0], CheckError) and made_here):
            raise results[0]
        if isinstance(results[0], CheckError):
            raise SkipError(f"depends on a failed step: {name}")
        return results[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """A running command."""

    job: Job
    words: Sequence[str]
    process: subprocess.Popen[bytes]
    log: Path

    def wait(self, codes: Sequence[int] = (0,)) -> str:
        """Its output, once it has ended. Raises CheckError for other exit codes, and at the deadline."""
        self.wait_until(lambda: self.process.poll() is not None)
        self.kill()
        if self.process.returncode not in codes:
            raise CheckError(f"exit code {self.process.returncode}: {self.text}", self.tail())
        return self.log.read_text(errors="replace")

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Return when the condition holds. Raises CheckError at the deadline."""
        while not condition():
            if time.monotonic() > self.job.ends:
                self.kill()
                raise CheckError(f"{KILLED}: {self.text}", self.tail())
            time.sleep(0.02)

    def terminate(self) -> None:
        """Send SIGTERM to the command itself, not to processes that it started."""
        self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kill the command and all processes that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    @property
    def text(self) -> str:
        """The command line, with program names instead of paths."""
        words = [word.removeprefix(f"{REPOSITORY}/") for word in self.words]
        return " ".join(["python", *words[1:]] if words[0] == sys.executable else words)

    def tail(self) -> str:
        """The last lines of its output."""
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(line for line in lines[-SHOWN_LINES:] if line.strip())


def codes(commands: Sequence[Command]) -> list[int | None]:
    """Their exit codes so far."""
    return [command.process.poll() for command in commands]


def wait_for_all(ranks: Sequence[Command]) -> str:
    """The output of the first of several commands, once all have ended; if one fails, the others are killed.

    Raises CheckError for the one that failed, and at the deadline.
    """
    try:
        ranks[0].wait_until(lambda: all(code is not None for code in codes(ranks)) or any(codes(ranks)))
        for rank in sorted(ranks, key=lambda rank: not rank.process.returncode):
            rank.wait()
    finally:
        for rank in ranks:
            rank.kill()
    return ranks[0].log.read_text(errors="replace")
