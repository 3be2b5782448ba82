"""Running commands with a limit: jobs of a bench that has one end for all, results that several rows need made once.

A row's check gets a `Job`, starts commands with it and returns an `Outcome`; `CheckError` and `SkipError` say why
there is none. A command that has not ended in time is killed with all that it started.
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
SHARED_SECONDS = 150.0  # for what several rows need
SHOWN_LINES = 12
KILLED = "killed when its time was over"
OF_A_JOB = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

Device = Literal["cuda", "cpu"]
Made = TypeVar("Made")


class CheckError(Exception):
    """A check that does not hold, or a command that failed: what, and the end of what it printed."""

    def __init__(self, reason: str, output: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.output = output


class SkipError(Exception):
    """A check that cannot be made here; the message says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """A figure, the bar that it must reach (or, with `at_most`, keep under), and more in words."""

    figure: float
    bar: float
    at_most: bool = False
    note: str = ""

    @property
    def holds(self) -> bool:
        """Not for what is no number."""
        return self.figure <= self.bar if self.at_most else self.figure >= self.bar


@dataclass(kw_only=True)
class Bench:
    """What all jobs of a run have in common; `ends` is the time (monotonic) at which every command is killed.

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
        """An empty folder."""
        path = self.folder / f"{next(self._numbers):03d}-{name}"
        path.mkdir(parents=True)
        return path

    def environment(self, device: Device) -> dict[str, str]:
        """For a command on a device: the checkout and the unpacked wheels come first, launchers' variables are gone."""
        found = {name: value for name, value in os.environ.items()
                 if name not in OF_A_JOB and not name.startswith("ACCELERATE_")}  # fmt: skip
        folders = [REPOSITORY, REPOSITORY / "benchmarks", self.packages, os.environ.get("PYTHONPATH")]
        found["PYTHONPATH"] = os.pathsep.join(str(folder) for folder in folders if folder)
        found |= {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
        if device == "cpu":
            found |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
            found |= {"OMP_WAIT_POLICY": "passive"}  # beside others' threads, spinning ones cost most of the time
        return found


class Job:
    """A row at work, until `seconds` after its start; what it waits for others, or makes for them, does not count."""

    def __init__(self, bench: Bench, *, seconds: float) -> None:
        self.bench = bench
        self.small = bench.small
        self.device = bench.device
        self.others_seconds = 0.0
        self._ends = time.monotonic() + seconds * bench.patience

    @property
    def ends(self) -> float:
        """When its commands are killed."""
        return min(self._ends, self.bench.ends)

    def run(
        self,
        command: Sequence[object],
        *,
        device: Device | None = None,
        variables: Mapping[str, str] | None = None,
        codes: Sequence[int] = (0,),
    ) -> str:
        """Run a command to its end and return what it printed. Raises CheckError for another exit code than these."""
        return self.start(command, device=device, variables=variables).wait(codes)

    def start(
        self, command: Sequence[object], *, device: Device | None = None, variables: Mapping[str, str] | None = None
    ) -> "Command":
        """Start a command on a device, the bench's unless told otherwise, with more variables in its environment."""
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
        """What `make` returns, made once for all rows.

        Raises CheckError where that fails, SkipError in the rows that come later.
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
            raise SkipError(f"it needs what failed before: {name}")
        return results[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """A command under way."""

    job: Job
    words: Sequence[str]
    process: subprocess.Popen[bytes]
    log: Path

    def wait(self, codes: Sequence[int] = (0,)) -> str:
        """What it printed, when it has ended. Raises CheckError for other exit codes, and when time is over."""
        self.wait_until(lambda: self.process.poll() is not None)
        self.kill()
        if self.process.returncode not in codes:
            raise CheckError(f"exit code {self.process.returncode}: {self.text}", self.tail())
        return self.log.read_text(errors="replace")

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Return when the condition holds. Raises CheckError when time is over before."""
        while not condition():
            if time.monotonic() > self.job.ends:
                self.kill()
                raise CheckError(f"{KILLED}: {self.text}", self.tail())
            time.sleep(0.02)

    def terminate(self) -> None:
        """SIGTERM for the command itself, not for what it started."""
        self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kill the command and all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    @property
    def text(self) -> str:
        """The command, with the names of programs in place of their paths."""
        words = [word.removeprefix(f"{REPOSITORY}/") for word in self.words]
        return " ".join(["python", *words[1:]] if words[0] == sys.executable else words)

    def tail(self) -> str:
        """The last lines that it printed."""
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(line for line in lines[-SHOWN_LINES:] if line.strip())


def codes(commands: Sequence[Command]) -> list[int | None]:
    """Their exit codes so far."""
    return [command.process.poll() for command in commands]


def wait_for_all(ranks: Sequence[Command]) -> str:
    """What the first of several commands printed, when all have ended; none outlives the first that fails.

    Raises CheckError for that one, and when time is over.
    """
    try:
        ranks[0].wait_until(lambda: all(code is not None for code in codes(ranks)) or any(codes(ranks)))
        for rank in sorted(ranks, key=lambda rank: not rank.process.returncode):
            rank.wait()
    finally:
        for rank in ranks:
            rank.kill()
    return ranks[0].log.read_text(errors="replace")
