"""What every command shares: errors as one line."""

import errno
import os

import pytest

from captioner import cli


@pytest.mark.parametrize("number", sorted(cli.REMEDY_OF_ERRNO.keys() | {errno.EBUSY, errno.EIO, errno.ESTALE}))
def test_what_the_system_refuses_is_one_line_with_the_path_and_a_remedy(number: int) -> None:
    """Whether it was read or written is not known here, so the line fits both."""
    line = cli.describe_os_error(OSError(number, os.strerror(number), "photos/a.jpg"))
    remedy = cli.REMEDY_OF_ERRNO.get(number, "check that file and its disk")
    assert line == f"photos/a.jpg: {os.strerror(number)}: {remedy}"
    assert "write" not in line.removesuffix("on a disk that can be written to")
