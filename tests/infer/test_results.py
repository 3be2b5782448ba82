"""Rows survive kills, odd names and several processes, and the merged file does not tell who made which."""

import errno
import fcntl
import json
import multiprocessing
import os
import random
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from rows import ROOT, captioned, failed

from captioner.errors import UserError
from infer.results import (
    Row,
    RowWriter,
    check_settings,
    duplicate_row,
    embedding_folder,
    find_parts,
    merging_path,
    own_files,
    part_path,
    process_path,
    read_rows,
    settings_path,
    to_line,
    write_settings,
    written_path,
)
from infer.row_index import RowIndex, Summary, merge

NUM_KILLS = 20
NUM_MANY = 50_000


def append(output: Path, rank: int, rows: list[Row]) -> None:
    writer = RowWriter(part_path(output, rank))
    writer.write(rows)
    writer.close()


def merged(output: Path) -> list[Row]:
    merge(output)
    return list(read_rows(output))


def done(output: Path, rows: list[Row], *, retry_errors: bool = False) -> list[bool]:
    index = RowIndex(output, retry_errors=retry_errors)
    found = [index.is_done(row["root"], row["path"]) for row in rows]
    index.close()
    return found


# ---- appending --------------------------------------------------------------------------------------------


def test_rows_count_as_done_as_soon_as_they_are_written(tmp_path: Path) -> None:
    """Without closing: a kill takes nothing that `write` returned from."""
    output = tmp_path / "new folder" / "captions.jsonl"
    rows = [captioned("a.jpg"), failed("b.jpg")]
    assert done(output, rows) == [False, False]
    writer = RowWriter(part_path(output, 0))
    writer.write(rows)
    assert done(output, rows) == [True, True]
    writer.close()


@given(paths=st.lists(st.text(min_size=1), unique=True, min_size=1, max_size=8), lost=st.integers(1, 60))
@hypothesis_settings(deadline=None, max_examples=40)
def test_a_torn_last_row_is_cut_and_done_again(
    tmp_path_factory: pytest.TempPathFactory, paths: list[str], lost: int
) -> None:
    output = tmp_path_factory.mktemp("torn") / "captions.jsonl"
    rows = [captioned(path) for path in paths]
    append(output, 0, rows)
    part = part_path(output, 0)
    part.write_bytes(part.read_bytes()[:-lost])
    assert done(output, rows) == [True] * (len(rows) - 1) + [False]
    append(output, 0, rows[-1:])
    assert merged(output) == sorted(rows, key=lambda row: row["path"])


@pytest.mark.parametrize("num_rows", [0, 1])
@pytest.mark.parametrize("torn_bytes", [1, 100_000])
def test_a_torn_row_of_any_length_is_cut(tmp_path: Path, num_rows: int, torn_bytes: int) -> None:
    part = part_path(tmp_path / "captions.jsonl", 0)
    whole = to_line(captioned("a.jpg")).encode() * num_rows
    part.write_bytes(whole + b"x" * torn_bytes)
    RowWriter(part).write([captioned("b.jpg")])
    assert part.read_bytes() == whole + to_line(captioned("b.jpg")).encode()


def write_until_killed(part: Path, written: Connection) -> None:
    writer = RowWriter(part)
    for start in count(0, 50):
        writer.write([captioned(f"{number}.jpg") for number in range(start, start + 50)])
        written.send(start + 50)


@pytest.mark.slow
def test_a_killed_process_loses_no_written_row_and_leaves_no_half_one(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    rng = random.Random(6)
    num_rows = 0
    for kill in range(NUM_KILLS):
        output = tmp_path / f"captions-{kill}.jsonl"
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=write_until_killed, args=(part_path(output, 0), theirs))
        process.start()
        theirs.close()
        time.sleep(rng.uniform(0.005, 0.05))
        process.kill()
        process.join()
        num_written = 0
        with suppress(EOFError):
            while True:
                num_written = ours.recv()
        assert all(done(output, [captioned(f"{number}.jpg") for number in range(num_written)]))
        append(output, 0, [captioned("after.jpg")])  # cuts what is torn
        assert all(map(json.loads, part_path(output, 0).read_bytes().splitlines()))
        num_rows += num_written
    assert num_rows > NUM_KILLS


def test_a_part_that_another_run_is_writing_is_refused(tmp_path: Path) -> None:
    output = tmp_path / "captions.jsonl"
    writer = RowWriter(part_path(output, 0))
    writer.write([captioned("a.jpg")])
    with pytest.raises(UserError, match=r"another run is writing to .*captions\.jsonl\.part-0: wait"):
        RowWriter(part_path(output, 0))
    with pytest.raises(UserError, match="another run is writing"):
        merge(output)
    append(output, 1, [captioned("b.jpg")])  # another process of the same run
    writer.write([captioned("c.jpg")])
    writer.close()
    assert [row["path"] for row in merged(output)] == ["a.jpg", "b.jpg", "c.jpg"]


def test_a_closed_part_is_free_while_a_forked_worker_still_has_it_open(tmp_path: Path) -> None:
    part = part_path(tmp_path / "captions.jsonl", 0)
    writer = RowWriter(part)
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    worker.start()
    writer.close()
    RowWriter(part).close()
    worker.kill()
    worker.join()


def test_file_systems_without_locks_are_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_lock(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", no_lock)
    append(tmp_path / "captions.jsonl", 0, [captioned("a.jpg")])
    assert merged(tmp_path / "captions.jsonl") == [captioned("a.jpg")]


# ---- what is done already ---------------------------------------------------------------------------------


def test_rows_of_the_output_and_of_all_parts_count_as_done(tmp_path: Path) -> None:
    output = tmp_path / "captions.jsonl"
    append(output, 0, [captioned("a.jpg")])
    merge(output)
    append(output, 0, [captioned("b.jpg")])
    append(output, 12, [failed("c.jpg"), captioned("a.jpg", root="other")])
    asked = [captioned(path) for path in ("a.jpg", "b.jpg", "c.jpg", "d.jpg")] + [captioned("b.jpg", root="other")]
    assert done(output, asked) == [True, True, True, False, False]


def test_failures_are_tried_again_on_request(tmp_path: Path) -> None:
    output = tmp_path / "captions.jsonl"
    append(output, 0, [failed("a.jpg"), captioned("b.jpg"), failed("c.jpg")])
    append(output, 1, [captioned("c.jpg")])
    asked = [captioned(path) for path in ("a.jpg", "b.jpg", "c.jpg")]
    assert done(output, asked, retry_errors=True) == [False, True, True]


def test_a_caption_is_found_by_content_in_earlier_rows_and_in_new_ones(tmp_path: Path) -> None:
    output = tmp_path / "captions.jsonl"
    old, new, bad = captioned("a.jpg", caption="old"), captioned("b.jpg", caption="new"), failed("c.jpg")
    append(output, 0, [captioned("before.jpg"), old])
    merge(output)
    index = RowIndex(output)
    writer = RowWriter(part_path(output, 0))
    for row, line in zip((new, bad), writer.write([new, bad]), strict=True):
        index.add(row, line)
    assert index.find_caption(old["sha256"]) == old
    assert index.find_caption(new["sha256"]) == new
    assert index.find_caption("00" * 32) is None
    assert index.is_done(ROOT, "b.jpg")
    assert index.is_done(ROOT, "c.jpg")
    index.close()
    writer.close()


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """As on a disk that is nearly full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_of_temporary_files_is_named(tmp_path: Path) -> None:
    write_many(tmp_path / "captions.jsonl", 30_000)
    with files_of_at_most(100_000), pytest.raises(UserError, match="set SQLITE_TMPDIR to"):
        RowIndex(tmp_path / "captions.jsonl")


def test_a_full_disk_of_rows_is_named_and_loses_none(tmp_path: Path) -> None:
    output = tmp_path / "captions.jsonl"
    rows = [captioned(f"{number}.jpg") for number in range(9)]
    writer = RowWriter(part_path(output, 0))
    writer.write(rows[:2])
    with files_of_at_most(1_000), pytest.raises(UserError, match=r"cannot write .*captions\.jsonl\.part-0 \(File too"):
        writer.write(rows[2:])
    writer.close()
    with files_of_at_most(500), pytest.raises(UserError, match=r"cannot write .*captions\.jsonl\.partial \(File too"):
        merge(output)
    append(output, 0, rows[2:])
    assert merged(output) == rows


# ---- merging ----------------------------------------------------------------------------------------------

names = st.text(st.characters() | st.integers(0xDC80, 0xDCFF).map(chr), min_size=1, max_size=4)
places = st.tuples(st.sampled_from(["a", "a/b", "s3://bucket/a", "\udcff"]), names)


@st.composite
def many_rows(draw: st.DrawFn) -> list[Row]:
    """Rows of different places, several with the same bytes, for which processes may have found different captions."""
    rows = []
    for root, path in draw(st.lists(places, unique=True, max_size=12)):
        if draw(st.integers(0, 3)) == 0:
            rows.append(failed(path, root=root, error=draw(st.sampled_from(["missing", "empty"]))))
        else:
            more = {
                "duplicate_of": draw(st.sampled_from([None, "elsewhere"])),
                "review": draw(st.none() | st.just("x")),
            }
            content, caption = draw(st.sampled_from("0123")), draw(st.sampled_from(["a cat", "a dog"]))
            rows.append(captioned(path, root=root, content=content, caption=caption, **more))
    return rows


def merged_by_hand(rows: list[Row]) -> list[Row]:
    first: dict[str, Row] = {}
    found = []
    for row in sorted(rows, key=lambda row: (row["root"], row["path"])):
        if "error" in row:
            found.append(row)
        elif row["sha256"] in first:
            found.append(duplicate_row(first[row["sha256"]], root=row["root"], path=row["path"]))
        else:
            first[row["sha256"]] = {**row, "duplicate_of": None}
            found.append(first[row["sha256"]])
    return found


@given(rows=many_rows(), data=st.data())
@hypothesis_settings(deadline=None, max_examples=60)
def test_the_merged_file_does_not_tell_who_made_which_row_and_when(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Row], data: st.DataObject
) -> None:
    """In two runs, in any order, with failures of other tries, ends torn by kills, and parts that a kill left over."""
    output = tmp_path_factory.mktemp("law") / "captions.jsonl"
    other_tries = [
        failed(row["path"], root=row["root"]) for row in rows if "sha256" in row and data.draw(st.booleans())
    ]
    shares: dict[tuple[int, int], list[Row]] = {}
    for row in data.draw(st.permutations(rows + other_tries)):
        shares.setdefault((data.draw(st.integers(0, 1)), data.draw(st.integers(0, 3))), []).append(row)
    for run in (0, 1):
        for rank in {rank for share_run, rank in shares if share_run == run}:
            append(output, rank, shares[run, rank])
            with part_path(output, rank).open("ab") as file:
                file.write(data.draw(st.sampled_from([b"", b"{", to_line(shares[run, rank][0]).encode()[:-1]])))
        left_over = {part: part.read_bytes() for part in find_parts(output) if data.draw(st.booleans())}
        merge(output)
        for part, content in left_over.items():
            part.write_bytes(content)
    summary = merge(output)
    expected = merged_by_hand(rows)
    assert output.read_text() == "".join(map(to_line, expected))
    assert summary == Summary(
        num_rows=len(rows),
        failures=Counter(row["error"] for row in expected if "error" in row),
        num_duplicates=sum(row.get("duplicate_of") is not None for row in expected),
        num_review=sum(row.get("review") is not None for row in expected),
    )
    assert list(output.parent.iterdir()) == [output]


def test_files_with_the_same_bytes_share_the_caption_of_the_first(tmp_path: Path) -> None:
    output = tmp_path / "captions.jsonl"
    append(output, 0, [captioned("b.jpg", content="same", caption="by one process", confidence=0.75, width=7)])
    append(output, 1, [captioned("c d.jpg", content="same", caption="by another", confidence=0.5)])
    append(output, 2, [captioned("a.jpg", content="same", root="https://host/z", duplicate_of="z")])
    first, second, third = merged(output)
    assert first == captioned("a.jpg", content="same", root="https://host/z") | {"duplicate_of": None}
    assert (second["path"], second["duplicate_of"]) == ("b.jpg", "https://host/z/a.jpg")
    assert third == {**first, "root": ROOT, "path": "c d.jpg", "duplicate_of": "https://host/z/a.jpg"}


def test_of_several_failures_the_latest_stays_and_a_success_is_never_lost(tmp_path: Path) -> None:
    output = tmp_path / "captions.jsonl"
    append(output, 0, [failed("a.jpg", error="missing"), captioned("b.jpg", caption="old"), captioned("c.jpg")])
    merge(output)
    append(output, 0, [failed("a.jpg", error="empty"), captioned("b.jpg", caption="new"), failed("c.jpg")])
    assert merged(output) == [failed("a.jpg", error="empty"), captioned("b.jpg", caption="new"), captioned("c.jpg")]


def test_the_order_is_that_of_strings(tmp_path: Path) -> None:
    """Bytes that are no UTF-8 come after most letters and before the emoji."""
    output = tmp_path / "captions.jsonl"
    paths = ["B", "a", "a/b", "a0", "\u00e9", "\ud7ff", "\udc80", "\udcff", "\uffff", "\U0001f600"]
    append(output, 0, [captioned(path) for path in reversed(paths)])
    append(output, 1, [captioned("z", root="a")])
    assert [row["path"] for row in merged(output)] == ["z", *paths]
    assert paths == sorted(paths)
    assert list(tmp_path.iterdir()) == [output]


def test_merging_again_changes_no_byte(tmp_path: Path) -> None:
    output = tmp_path / "captions.jsonl"
    append(output, 0, [captioned(f"{number}.jpg", content=str(number // 2)) for number in range(20)])
    summary = merge(output)
    content = output.read_bytes()
    assert merge(output) == summary
    assert output.read_bytes() == content


def test_a_last_row_without_its_line_end_does_not_run_into_the_next(tmp_path: Path) -> None:
    output = tmp_path / "captions.jsonl"
    output.write_text(to_line(captioned("a.jpg")).rstrip("\n"))
    append(output, 0, [captioned("b.jpg")])
    assert merged(output) == [captioned("a.jpg"), captioned("b.jpg")]


def test_nothing_captioned_gives_an_empty_file(tmp_path: Path) -> None:
    append(tmp_path / "captions.jsonl", 0, [])
    assert merged(tmp_path / "captions.jsonl") == []


def test_an_output_with_glob_signs_in_its_name_keeps_its_parts(tmp_path: Path) -> None:
    output = tmp_path / "run[1]*?.jsonl"
    append(output, 0, [captioned("a.jpg")])
    append(tmp_path / "run1.jsonl", 0, [captioned("of another run")])
    assert find_parts(output) == [part_path(output, 0)]
    assert merged(output) == [captioned("a.jpg")]
    assert part_path(tmp_path / "run1.jsonl", 0).exists()


def test_own_files_are_those_of_this_run_and_of_earlier_ones(tmp_path: Path) -> None:
    output = tmp_path / "captions.jsonl"
    append(output, 7, [captioned("a.jpg")])
    process_path(output, 7).touch()
    of_ranks = {path(output, rank) for path in (part_path, process_path) for rank in (0, 1, 7)}
    fixed = {output, settings_path(output), merging_path(output), embedding_folder(output), written_path(output)}
    assert set(own_files(output, num_processes=2)) == fixed | of_ranks


@pytest.mark.parametrize(
    "path", [os.fsdecode(b"bad\xff\xfe.jpg"), "new\nline.jpg", "\u2028.jpg", "\x85\x1c.jpg", 'über "straße"\\.jpg']
)
def test_any_file_name_survives(tmp_path: Path, path: str) -> None:
    output = tmp_path / "captions.jsonl"
    append(output, 0, [captioned(path, caption=path), captioned("other.jpg")])
    assert captioned(path, caption=path) in merged(output)
    assert done(output, [captioned(path)]) == [True]
    assert output.read_bytes().isascii()
    assert output.read_bytes().count(b"\n") == 2
    assert os.fsencode(json.loads(to_line(captioned(path)))["path"]) == os.fsencode(path)


@pytest.mark.parametrize(
    "content",
    [
        b"a shopping list\n",
        b"a shopping list",
        b"\xff\xd8\xff\xe0 a picture \x1c",
        b'{"a": 1}\n',
        b'{"a": 1}',
        b"[]\n",
        b"\n",
        to_line({**captioned("a.jpg"), "format_version": 1}).encode(),
        to_line({**captioned("a.jpg"), "sha256": "none"}).encode(),
    ],
)
def test_a_foreign_output_is_refused_and_left_as_it_is(tmp_path: Path, content: bytes) -> None:
    output = tmp_path / "captions.jsonl"
    output.write_bytes(content)
    for reader in (RowIndex, merge):
        with pytest.raises(
            UserError, match=r"line 1 of .*captions\.jsonl is not a row.*give another --output"
        ) as caught:
            reader(output)
        assert "\n" not in str(caught.value)
    assert output.read_bytes() == content


def test_the_line_of_a_bad_row_is_named(tmp_path: Path) -> None:
    output = tmp_path / "captions.jsonl"
    output.write_text(to_line(captioned("a.jpg")) + "oops\n" + to_line(captioned("b.jpg")))
    with pytest.raises(UserError, match="line 2"):
        RowIndex(output)


def write_many(output: Path, num_rows: int) -> None:
    """Rows in no order, one in ten a duplicate, in two parts."""
    marked = to_line({**captioned("PATH.jpg"), "sha256": "DIGEST"})
    numbers = random.Random(1).sample(range(num_rows), num_rows)
    for rank in (0, 1):
        with part_path(output, rank).open("w") as file:
            for number in numbers[rank::2]:
                digest = f"{number * 2654435761 % (num_rows * 9 // 10):064x}"
                file.write(marked.replace("PATH", str(number)).replace("DIGEST", digest))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """A dictionary with one entry for each row would take more."""
    write_many(tmp_path / "captions.jsonl", NUM_MANY)
    code = """
import sys
from pathlib import Path
from infer.row_index import RowIndex, merge
largest = lambda: int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
output, before = Path(sys.argv[1]), largest()
assert RowIndex(output).is_done("photos", "77.jpg")
print(merge(output).num_rows, largest() - before)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "captions.jsonl")]
    num_rows, growth_kb = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert int(num_rows) == NUM_MANY
    assert int(growth_kb) < 10_000


# ---- settings ---------------------------------------------------------------------------------------------


def test_rows_are_continued_with_the_same_settings(tmp_path: Path) -> None:
    output = tmp_path / "new folder" / "captions.jsonl"
    chosen = {"model": "m", "beam_size": 3, "roots": ("a", "b"), "abstain_below": None}
    check_settings(output, chosen)
    write_settings(output, chosen)
    append(output, 0, [captioned("a.jpg")])
    check_settings(output, dict(reversed(chosen.items())))
    merge(output)
    check_settings(output, chosen)


@pytest.mark.parametrize("merged_already", [False, True])
def test_rows_made_with_other_settings_are_refused_by_name_and_value(tmp_path: Path, merged_already: bool) -> None:
    output = tmp_path / "captions.jsonl"
    write_settings(output, {"model": "m", "beam_size": 3, "precision": "fp32"})
    append(output, 3, [captioned("a.jpg")])
    if merged_already:
        merge(output)
    with pytest.raises(UserError) as caught:
        check_settings(output, {"model": "n", "beam_size": 3, "abstain_below": 0.5})
    message = str(caught.value)
    assert 'abstain_below was null and is 0.5; model was "m" and is "n"; precision was "fp32" and is null' in message
    assert f"give another --output, or delete {output} and its parts" in message
    assert "beam_size" not in message


def test_rows_of_unknown_settings_are_refused(tmp_path: Path) -> None:
    output = tmp_path / "captions.jsonl"
    append(output, 0, [captioned("a.jpg")])
    with pytest.raises(UserError, match=r"captions\.jsonl\.settings\.json.*: give another --output$"):
        check_settings(output, {"model": "m"})


def test_settings_without_a_row_bind_nobody(tmp_path: Path) -> None:
    output = tmp_path / "captions.jsonl"
    write_settings(output, {"model": "m"})
    append(output, 0, [])
    check_settings(output, {"model": "n"})


NAMES = ["photos", "photos/", "./photos", "photos/../photos", "link", "{here}/photos", "{here}/link/"]


@pytest.mark.parametrize("earlier", NAMES)
def test_a_file_has_one_row_under_all_names_of_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earlier: str
) -> None:
    (tmp_path / "photos" / "summer").mkdir(parents=True)
    (tmp_path / "link").symlink_to("photos")
    monkeypatch.chdir(tmp_path / "photos")  # relative names start at the base instead
    output, base = tmp_path / "c.jsonl", str(tmp_path)
    names = [name.format(here=tmp_path) for name in (earlier, *NAMES)]
    append(output, 0, [captioned("summer/a.jpg", root=names[0])])
    index = RowIndex(output, base=base)
    for name in names:
        assert index.is_done(name, "summer/a.jpg")
        assert index.is_done(f"{name}/summer", "a.jpg")
        assert not index.is_done(name, "a.jpg")
        append(output, 1, [captioned("summer/a.jpg", root=name)])
    index.close()
    assert merge(output, base=base).num_rows == 1


def test_an_earlier_working_folder_is_kept_where_all_names_are_absolute_now(tmp_path: Path) -> None:
    output = tmp_path / "captions.jsonl"
    append(output, 0, [captioned("a.jpg")])
    for earlier, now, kept in (("/home", None, "/home"), (None, "/home", "/home"), (None, None, None)):
        write_settings(output, {"working_folder": earlier})
        assert check_settings(output, {"working_folder": now}) == {"working_folder": kept}
    write_settings(output, {"working_folder": "/home"})
    with pytest.raises(UserError, match='working_folder was "/home" and is "/tmp"'):
        check_settings(output, {"working_folder": "/tmp"})
