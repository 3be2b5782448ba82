"""A command whose output nobody reads, or that cannot be written, does its work all the same."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from captioner.cli import console, print_table

REPOSITORY = Path(__file__).resolve().parents[2]
COMMAND = """
import sys
from dataclasses import dataclass
from pathlib import Path
from captioner import cli

@dataclass
class Settings:
    output: Path
    code: int = 0

def main(settings):
    for _ in range(3_000):
        print("by print")
        cli.console.print("by the console")
        print("to stderr", file=sys.stderr)
    cli.print_table("a table", ("a", "b"), [("x", 1)] * 50)
    with cli.progress_bar("bar", total=2, unit="things") as bar:
        bar.advance(2)
    settings.output.write_text("done")
    if settings.code == 2:
        raise cli.UserError("of the user")
    if settings.code:
        raise SystemExit(settings.code)

cli.run(main, Settings, description="")
"""


def run_command(output: Path, *arguments: object, stdout: Any, stderr: Any = subprocess.PIPE) -> tuple[int, str]:
    """The exit code, and what came on stderr."""
    command = [sys.executable, "-c", COMMAND, "--output", str(output), *map(str, arguments)]
    done = subprocess.run(command, cwd=REPOSITORY, stdout=stdout, stderr=stderr, text=True, check=False)
    return done.returncode, done.stderr or ""


def pipe_without_reader() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize("code", [0, 2, 3])
@pytest.mark.parametrize("both", [False, True])
def test_work_ends_as_if_it_were_read(tmp_path: Path, code: int, both: bool) -> None:
    """As with `| head -1` and `2>&1 | head -1`."""
    pipe = pipe_without_reader()
    found, errors = run_command(
        tmp_path / "x", "--code", code, stdout=pipe, stderr=subprocess.STDOUT if both else subprocess.PIPE
    )
    os.close(pipe)
    assert found == code
    assert (tmp_path / "x").read_text() == "done"
    expected = "" if both else "to stderr\n" * 3_000 + ("error: of the user\n" if code == 2 else "")
    assert errors == expected


def test_a_reader_that_leaves_after_the_first_line(tmp_path: Path) -> None:
    script = f'"$0" -c "$1" --output {tmp_path / "x"} 2>/dev/null | head -1; echo "${{PIPESTATUS[0]}}"'
    done = subprocess.run(
        ["bash", "-c", script, sys.executable, COMMAND], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout == "by print\n0\n"
    assert (tmp_path / "x").read_text() == "done"


def test_names_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    console.print("photos/a:smile:[bold].jpg", markup=False)
    print_table("photos/b:smile:", ("name",), [("c:smile:",)])
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("photos/a:smile:[bold].jpg", "photos/b:smile:", "c:smile:"))


def test_help_for_nobody(tmp_path: Path) -> None:
    pipe = pipe_without_reader()
    assert run_command(tmp_path / "x", "--help", stdout=pipe) == (0, "")
    os.close(pipe)


def test_output_that_was_closed_takes_no_file(tmp_path: Path) -> None:
    """Else the first file that the command opens would get all that it prints."""
    script = f'"$0" -c "$1" --output {tmp_path / "x"} >&- 2>&-'
    done = subprocess.run(["bash", "-c", script, sys.executable, COMMAND], cwd=REPOSITORY, check=False)
    assert done.returncode == 0
    assert (tmp_path / "x").read_text() == "done"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_for_what_is_printed_is_said_at_the_end(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:  # noqa: PTH123
        code, errors = run_command(tmp_path / "x", stdout=full)
        assert run_command(tmp_path / "x", "--code", 3, stdout=full)[0] == 3
    assert code == 2
    (line,) = [line for line in errors.splitlines() if line != "to stderr"]
    assert line.startswith("error: the work is done, but its output was not fully written (No space left on device)")
    assert (tmp_path / "x").read_text() == "done"
