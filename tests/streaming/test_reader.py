"""The reader of single samples: any fields, each checked, with as few system calls as there are gaps."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from captioner.errors import UserError
from captioner.shards.format import ShardEntry, ShardIndex, TarBuilder
from captioner.streaming.reader import NEAR_BYTES, TOGETHER_BYTES, SampleError, ShardReader

Samples = Sequence[tuple[str, dict[str, bytes]]]

names = st.sampled_from(["jpg", "json", "seg.png", "wav", "", "ü"])
contents = st.binary(max_size=40) | st.integers(0, TOGETHER_BYTES).map(bytes)
samples_of_any_kind = st.lists(st.dictionaries(names, contents, max_size=4), min_size=1, max_size=4)


def write_shard(folder: Path, samples: Samples, *, optional: dict[str, np.ndarray] | None = None) -> ShardEntry:
    """A shard of these samples, and its index."""
    tar = TarBuilder()
    members = [(key, {name: tar.add(f"{key}.{name}", data) for name, data in found.items()}) for key, found in samples]
    data = tar.to_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    index = ShardIndex.of(members, {"sha256": sha256, "bytes": len(data), "fingerprint": sha256, "new": 1}, optional)
    (folder / "x.tar").write_bytes(data)
    (folder / "x.index").write_bytes(index.to_bytes())
    return ShardEntry(name="x", samples=len(samples), failures=0, bytes=len(data), sha256=sha256, fingerprint=sha256)


def read_all(folder: Path, entry: ShardEntry, fields: set[str] | None = None) -> Samples:
    reader = ShardReader([(str(folder), entry)], max_open=1, fields=fields)
    found = [reader.read(0, place) for place in range(entry.samples)]
    reader.close()
    return found


@given(fields=samples_of_any_kind, wanted=st.none() | st.sets(names))
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_sample_has_the_fields_that_are_wanted_in_the_tars_order(
    tmp_path: Path, fields: list[dict[str, bytes]], wanted: set[str] | None
) -> None:
    samples = [(f"key-{number * 7}", found) for number, found in enumerate(fields)]
    entry = write_shard(tmp_path, samples)
    found = read_all(tmp_path, entry, wanted)
    expected = [
        (key, {name: data for name, data in members.items() if wanted is None or name in wanted})
        for key, members in samples
    ]
    assert found == expected
    assert [list(members) for _, members in found] == [list(members) for _, members in expected]


def test_neighbours_are_read_with_one_system_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = write_shard(
        tmp_path,
        [
            ("near", {"a": b"1" * 600, "b": b"22", "c": b""}),
            ("far", {"a": b"1", "b": bytes(NEAR_BYTES + 1), "c": b"3"}),
            ("large", {"a": bytes(TOGETHER_BYTES), "b": b"2", "c": b"3"}),
        ],
    )
    calls: list[int] = []
    plain = os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, start: (calls.append(size), plain(file, size, start))[1])
    read_all(tmp_path, entry)
    assert len(calls) == 1 + 1 + 2
    calls.clear()
    read_all(tmp_path, entry, {"a", "c"})
    assert calls[1:3] == [1, 1]
    calls.clear()
    read_all(tmp_path, entry, set())
    assert not calls


def test_a_changed_byte_of_a_member_is_told_with_its_field(tmp_path: Path) -> None:
    entry = write_shard(tmp_path, [("k", {"wav": b"sound", "txt": b"words"})])
    path = tmp_path / "x.tar"
    path.write_bytes(path.read_bytes().replace(b"words", b"swords"[:5]))
    with pytest.raises(SampleError, match=r"x\.tar is damaged at sample k, field txt \(checksum differs\)") as caught:
        read_all(tmp_path, entry)
    assert caught.value.reason == "checksum"
    assert read_all(tmp_path, entry, {"wav"}) == [("k", {"wav": b"sound"})]


def test_unknown_arrays_and_facts_are_ignored_but_checked(tmp_path: Path) -> None:
    samples = [("k", {"txt": b"words"})]
    entry = write_shard(tmp_path, samples, optional={"token_ids": np.arange(7, dtype=np.int32)})
    assert read_all(tmp_path, entry) == samples
    data = (tmp_path / "x.index").read_bytes()
    place = data.index(np.arange(7, dtype=np.int32).tobytes())
    for broken in (data[:place] + b"\1" + data[place + 1 :], data.replace(b'\\"new\\": 1', b'\\"new\\": 2')):
        assert broken != data
        with pytest.raises(UserError, match="checksum differs"):
            ShardIndex.from_bytes(broken, origin="x.index")


def test_only_so_many_shards_are_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = []
    for number in range(4):
        folder = tmp_path / str(number)
        folder.mkdir()
        shards.append((str(folder), write_shard(folder, [(f"k{number}", {"txt": b"%d" % number})])))
    reader = ShardReader(shards, max_open=2)
    opened: set[int] = set()
    plain_open, plain_close = os.open, os.close
    monkeypatch.setattr(os, "open", lambda *where: (opened.add(file := plain_open(*where)), file)[1])
    monkeypatch.setattr(os, "close", lambda file: (opened.discard(file), plain_close(file))[1])
    for number in (0, 1, 2, 3, 2, 0):
        assert reader.read(number, 0) == (f"k{number}", {"txt": b"%d" % number})
        assert len(opened) <= 2
    reader.close()
    assert not opened
