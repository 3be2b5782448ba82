"""A listing that runs ahead gives each file once, in order and at once, and holds none of them in memory."""

import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from threading import Event

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from captioner.errors import UserError
from captioner.images.loading import ImageError
from infer.ahead import Ahead
from infer.listing import ImageFile

names = st.text(st.characters() | st.integers(0xDC80, 0xDCFF).map(chr), min_size=1, max_size=9)
files = st.builds(ImageFile, names, names, st.integers(0, 1 << 40), st.none() | st.integers(0, 1 << 40))


@given(listed=st.lists(files, max_size=30), has_error=st.booleans())
@hypothesis_settings(deadline=None, max_examples=50)
def test_the_files_come_as_they_were_listed_and_the_total_at_the_end(listed: list[ImageFile], has_error: bool) -> None:
    totals: list[int] = []
    entries = [*listed, ImageFile("a", "b", error=ImageError("missing", "gone"))] if has_error else listed
    ahead = Ahead(iter(entries), on_end=totals.append)
    found = list(ahead)
    assert list(map(repr, found)) == list(map(repr, entries))
    assert totals == [len(entries)]
    assert list(ahead) == []


def test_a_file_is_there_as_soon_as_it_is_listed_and_the_total_before_the_first_is_taken() -> None:
    go_on, ended = Event(), Event()

    def listing() -> Iterator[ImageFile]:
        yield ImageFile("a", "first")
        assert go_on.wait(10)
        yield ImageFile("a", "second")

    ahead = Ahead(listing(), on_end=lambda _: ended.set())
    assert next(ahead) == ImageFile("a", "first")
    assert not ended.is_set()
    go_on.set()
    assert ended.wait(10)
    assert list(ahead) == [ImageFile("a", "second")]


def test_what_the_listing_raises_comes_after_its_files() -> None:
    def listing() -> Iterator[ImageFile]:
        yield ImageFile("a", "b")
        raise OSError(5, "the list's disk is gone")

    ahead = Ahead(listing(), on_end=lambda _: pytest.fail("there is no total"))
    assert next(ahead) == ImageFile("a", "b")
    with pytest.raises(OSError, match="disk is gone"):
        next(ahead)


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, limits[1]))
    try:
        ahead = Ahead((ImageFile("a", str(number)) for number in range(1_000)), on_end=lambda _: None)
        with pytest.raises(UserError, match="set TMPDIR to"):
            list(ahead)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == []  # noqa: PTH208


@pytest.mark.slow
def test_memory_does_not_grow_with_what_is_listed() -> None:
    code = """
from pathlib import Path
from threading import Event
from infer.ahead import Ahead
from infer.listing import ImageFile
largest = lambda: int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
before, ended = largest(), Event()
ahead = Ahead((ImageFile("photos", f"{number:09d}.jpg") for number in range(100_000)), on_end=lambda _: ended.set())
ended.wait()
print(sum(1 for _ in ahead), largest() - before)
"""
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    num_files, growth_kb = map(int, found.split())
    assert num_files == 100_000
    assert growth_kb < 4_000
