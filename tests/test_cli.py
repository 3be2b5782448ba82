"""What every command shares: errors as one line with an exit code."""

import errno
import os
from dataclasses import dataclass

import pytest

from captioner import cli


@dataclass(frozen=True, kw_only=True)
class NoSettings:
    """No flags."""


@pytest.mark.parametrize("number", sorted(cli.REMEDIES))
def test_what_the_system_refuses_is_one_line_with_the_path_and_a_remedy(
    number: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it was read or written is not known here, so the line must fit both."""
    monkeypatch.setattr("sys.argv", ["command"])

    def main(_: NoSettings) -> None:
        raise OSError(number, os.strerror(number), "photos/a.jpg")

    with pytest.raises(SystemExit) as left:
        cli.run(main, NoSettings, description="")
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"error: photos/a.jpg: {os.strerror(number)}: {cli.REMEDIES[number]}"
    assert "cannot write" not in line


def test_a_failure_of_the_disk_is_no_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["command"])

    def main(_: NoSettings) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), "photos/a.jpg")

    with pytest.raises(OSError, match="photos"):
        cli.run(main, NoSettings, description="")
