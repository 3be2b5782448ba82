"""What every command shares: flags from a dataclass, one-line errors, progress bars, tables."""

import errno
import io
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import is_dataclass
from glob import iglob
from typing import Any, NoReturn, TypeVar, get_args, get_type_hints

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from captioner.errors import UserError
from captioner.flags import OPTIONAL_FLAGS, Local, Number, flag_name
from captioner.images import silence_pillow

EXIT_USER_ERROR = 2
REMEDY_OF_ERRNO = {
    errno.ENOENT: "check the path",
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EROFS: "give a folder on a disk that can be written to",
    errno.EACCES: "give a path that this user may use",
    errno.EPERM: "give a path that this user may use",
    errno.EEXIST: "give another path, or remove it",
    errno.EPIPE: "the program that read it has ended",
}
CLOSED_OUTPUT = (errno.EPIPE, errno.EIO)  # of a pipe, of a terminal
EXIT_INTERRUPTED = 130
LOG_SECONDS = 60.0  # between lines of progress in a log file

Settings = TypeVar("Settings")
Remedies = Mapping[type[UserError], str]  # what to do, with a command's flags; `{error.x}` is the error's attribute

console = Console(
    highlight=False, emoji=False, soft_wrap=True, width=None if sys.stdout and sys.stdout.isatty() else 140
)


def run(
    main: Callable[[Settings], None],
    settings_class: type[Settings],
    *,
    description: str,
    remedies: Remedies | None = None,
) -> None:
    """Parse the command line into `settings_class`, call `main`, and turn failures into exit codes.

    A `UserError` becomes one line on stderr, with the command's remedy for its class, and exit code 2 (as a wrong flag
    does); Ctrl-C becomes 130. Output to a closed pipe (`| head -1`) is dropped: the work and the exit code are the
    same. Output to a full disk is dropped too, and reported at the end.
    """
    stdout = ignore_closed_output()
    silence_pillow()
    try:
        main(parse(settings_class, description=description))
    except UserError as error:
        fail(with_remedy(error, remedies or {}))
    except OSError as error:
        if error.errno not in REMEDY_OF_ERRNO and error.filename is None:  # the program's own fault
            raise
        fail(describe_os_error(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    sys.stdout.flush()
    if stdout.error:
        fail(f"the work is done, but its output was not fully written ({stdout.error.strerror}): make room for it")


def ignore_closed_output() -> "Stream":
    """Replace stdout, which is returned, and stderr by streams that drop what they cannot write."""
    while (opened := os.open(os.devnull, os.O_RDWR)) <= 2:  # or a file opened later would get a closed one's number
        pass
    os.close(opened)
    streams = []
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        old = getattr(sys, name)  # None where it was closed
        raw = Stream(descriptor if old is None else old.fileno(), "w", closefd=False)
        raw.replaced = old
        by_line = old is None or old.line_buffering or old.write_through
        format_of = {} if old is None else {"encoding": old.encoding, "errors": old.errors}
        setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(raw), line_buffering=by_line, **format_of))
        streams.append(raw)
    return streams[0]


class Stream(io.FileIO):
    """A standard stream that drops output to a closed pipe or terminal; `error` is the first other failure."""

    error: OSError | None = None
    replaced: object = None  # kept alive: it would close the descriptor

    def write(self, data: Any, /) -> int:
        """Write as much as possible; returns the size of all."""
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in CLOSED_OUTPUT:
                self.error = self.error or error
            return memoryview(data).nbytes


def parse(settings_class: type[Settings], *, description: str, args: Sequence[str] | None = None) -> Settings:
    """The settings in the command line (or `args`). Raises UserError for values that a flag does not accept."""
    words = sys.argv[1:] if args is None else args
    options: dict[str, Any] = {"description": description, "args": args, "registry": OPTIONAL_FLAGS}
    _check_dashes(settings_class, words, options)
    settings, unknown = tyro.cli(settings_class, return_unknown_args=True, **options)
    if any(word.startswith("-") for word in unknown):
        tyro.cli(settings_class, **options)  # ends with the flags that were probably meant
    if unknown:
        raise UserError(f"no flag takes {unknown[0]!r}: write its flag before it, and quote spaces (see --help)")
    check_values(settings)
    return settings


def _check_dashes(settings_class: type, words: Sequence[str], options: dict[str, Any]) -> None:
    """Raise UserError if the words can only be read once the names of files that begin with a dash are `./-name`."""
    dashed = [word for word in words if word.startswith("-") and _is_file(word)]
    if not dashed or _is_readable(settings_class, options):
        return
    for changed in (*([word] for word in dashed), dashed):  # a file may be named like a flag
        args = [f"./{word}" if word in changed else word for word in words]
        if _is_readable(settings_class, options | {"args": args}):
            raise UserError(f"{changed[0]} begins with a dash, so it is taken for a flag: write ./{changed[0]}")


def _is_file(name: str) -> bool:
    return os.path.lexists(name) or any(iglob(name))  # noqa: PTH207 - as the shell finds it


def _is_readable(settings_class: type, options: dict[str, Any]) -> bool:
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), suppress(SystemExit):
        _, unknown = tyro.cli(settings_class, return_unknown_args=True, **options)
        return not any(word.startswith("-") for word in unknown)
    return False


def check_values(settings: object) -> None:
    """Raise UserError for a number out of its range, or a URL instead of a local path: see `captioner.flags`."""
    for name, hint in get_type_hints(type(settings), include_extras=True).items():
        value = getattr(settings, name)
        if is_dataclass(value):
            check_values(value)
        for each in value if isinstance(value, tuple) else (value,):
            for annotation in _annotations(hint) if each is not None else ():
                _check(flag_name(name), each, annotation)


def _check(flag: str, value: Any, annotation: object) -> None:
    if isinstance(annotation, Number) and not annotation.is_in_range(value):
        raise UserError(f"{flag} is {value}: give a number: {annotation.metavar}")
    if isinstance(annotation, Local) and re.match(r"[\w+.-]{2,}:/", str(value)):  # Path makes one slash of two
        raise UserError(f"{flag} {value} is a URL: give a path on this machine")


def _annotations(hint: Any) -> Iterator[object]:
    """The metadata of `Annotated` types anywhere in a type hint."""
    yield from getattr(hint, "__metadata__", ())
    for inner in get_args(hint):
        yield from _annotations(inner)


def with_remedy(error: UserError, remedies: Remedies) -> str:
    """The error's line with the remedy for its class or the nearest base class."""
    remedy = next((remedies[kind] for kind in type(error).__mro__ if kind in remedies), None)
    return f"{error}: {remedy.format(error=error)}" if remedy else str(error)


def describe_os_error(error: OSError) -> str:
    """The line for a file that cannot be read or written."""
    remedy = REMEDY_OF_ERRNO.get(error.errno or 0, "check that file and its disk")
    return f"{error.filename or 'a file'}: {error.strerror}: {remedy}"


def fail(message: str) -> NoReturn:
    """Print `message` as one line on stderr and exit with code 2."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(EXIT_USER_ERROR)


class Bar:
    """A progress bar: items done, rate, and a note at its end; with `logs`, a line every LOG_SECONDS instead."""

    def __init__(
        self, progress: Progress, *, description: str, total: int | None, unit: str, done: int, logs: bool
    ) -> None:
        self._progress = progress
        self._logs = logs
        self._unit = unit
        self._task = progress.add_task(description, total=total, completed=done, note="")
        self._done_before = done
        self._logged_at = time.monotonic()

    def advance(self, num_items: int = 1, *, note: str = "") -> None:
        """Count `num_items` more as done and show `note` behind the rate."""
        self.set(int(self._progress.tasks[self._task].completed) + num_items, note=note)

    def set(self, num_items: int, *, note: str = "") -> None:
        """Set the number of items done and show `note` behind the rate."""
        self._progress.update(self._task, completed=num_items)
        task = self._progress.tasks[self._task]
        rate = (task.completed - self._done_before) / task.elapsed if task.elapsed else 0.0
        self._progress.update(self._task, note=f"{rate:,.1f} {self._unit}/s {note}".rstrip())
        if self._logs and time.monotonic() - self._logged_at > LOG_SECONDS:
            self._logged_at = time.monotonic()
            total = "" if task.total is None else f" of {task.total:,.0f}"
            console.print(f"{task.description}: {num_items:,}{total}, {task.fields['note']}")

    def skip(self, num_items: int = 1) -> None:
        """Count `num_items` more as done by an earlier run, so not for the rate."""
        self._done_before += num_items
        self.advance(num_items)

    def set_total(self, total: int) -> None:
        """Set the number of items, once it is known."""
        self._progress.update(self._task, total=total)


@contextmanager
def progress_bar(
    description: str, *, total: int | None, unit: str, quiet: bool = False, done: int = 0
) -> Iterator[Bar]:
    """A progress bar with count, percentage, rate and time left, or a line a minute in a log file; none if `quiet`.

    `done` items of an earlier run count as completed, but not for the rate.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as progress:
        logs = not (quiet or console.is_terminal)
        yield Bar(progress, description=description, total=total, unit=unit, done=done, logs=logs)


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print `rows` under `header`; numbers are right-aligned, and nothing is cut off."""
    table = Table(title=Text(title), title_justify="left", title_style="bold")
    for column, name in enumerate(header):
        numeric = bool(rows) and all(isinstance(row[column], int | float) for row in rows)
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(_cell(value)) for value in row))
    console.print(table)


def print_damaged(num_damaged: int) -> None:
    """Print how many damaged images could be decoded, if any."""
    if num_damaged:
        console.print(f"{num_damaged:,} images are damaged, but could be decoded: parts of them may look wrong")


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.3f}" if abs(value) < 10 else f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
