"""Tars of any writer and any kind of sample: the index says what webdataset reads, and damage is noticed."""

import gzip
import io
import json
import tarfile
import wave
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from captioner.errors import UserError
from captioner.shards.format import read_manifest
from captioner.shards.indexing import index_shards
from captioner.streaming.dataset import read_split
from captioner.streaming.reader import SampleError, ShardReader
from sharding import check_shards
from sharding.settings import IndexSettings, RepairSettings, ShowSettings, VerifySettings

FORMATS = {"USTAR": tarfile.USTAR_FORMAT, "GNU": tarfile.GNU_FORMAT, "PAX": tarfile.PAX_FORMAT}
IN_PLACE = [HealthCheck.function_scoped_fixture]

Members = Sequence[tuple[str, bytes]]
Samples = list[tuple[str, dict[str, bytes]]]


def write_tar(path: Path, members: Members, *, form: str = "PAX") -> None:
    with tarfile.open(path, "w", format=FORMATS[form]) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), 1234567890.25  # type: ignore[assignment]
            tar.addfile(info, io.BytesIO(content))


def read_all(folder: Path | str, split: str = "train") -> Samples:
    shards = read_split([str(folder)], split, remedy="").shards
    reader = ShardReader(shards, max_open=2)
    found = [reader.read(n, place) for n, (_, entry) in enumerate(shards) for place in range(entry.samples)]
    reader.close()
    return found


def read_with_webdataset(folder: Path, pattern: str = "*.tar") -> Samples:
    urls = [str(path) for path in sorted(folder.glob(pattern))]
    samples: Any = webdataset.WebDataset(urls, shardshuffle=False)
    return [(s["__key__"], {name: value for name, value in s.items() if name[:2] != "__"}) for s in samples]


def command(settings: Any) -> None:
    check_shards.main(check_shards.Command(settings=settings))


def is_whole(folder: Path) -> bool:
    try:
        command(VerifySettings(folder=str(folder)))
    except SystemExit:
        return False
    return True


# ---- kinds of samples ---------------------------------------------------------------------------------------


def wav(number: int) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(np.arange(50 * (number + 1), dtype=np.int16).tobytes())
    return buffer.getvalue()


def encoded(number: int, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 9, 3), number, np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def audio(number: int) -> dict[str, bytes]:
    return {"wav": wav(number), "cls": b"%d" % number}


def text(number: int) -> dict[str, bytes]:
    return {"txt": f"the {number}th text, ü".encode()}


def segmentation(number: int) -> dict[str, bytes]:
    facts = json.dumps({"number": number}).encode()
    return {"jpg": encoded(number, "JPEG"), "seg.png": encoded(number, "PNG"), "json": facts}


KINDS = {"audio": audio, "text": text, "segmentation": segmentation}


@pytest.mark.parametrize("writer", [*FORMATS, "webdataset"])
@pytest.mark.parametrize("kind", KINDS)
def test_samples_of_any_kind_and_writer_are_streamed(tmp_path: Path, kind: str, writer: str) -> None:
    samples = [(f"folder.v1/{number:04d}", KINDS[kind](number)) for number in range(7)]
    for name, part in (("train-0", samples[:4]), ("train-1", samples[4:])):
        path = tmp_path / f"{name}.tar"
        if writer == "webdataset":
            with webdataset.TarWriter(str(path), encoder=False) as tar:
                for key, fields in part:
                    tar.write({"__key__": key} | fields)
        else:
            write_tar(
                path, [(f"{key}.{name}", data) for key, fields in part for name, data in fields.items()], form=writer
            )
    manifest = index_shards(str(tmp_path), split="train")
    assert manifest == read_manifest(str(tmp_path), "train", remedy="")
    assert (manifest.num_samples, manifest.failures) == (7, {})
    assert read_all(tmp_path) == read_with_webdataset(tmp_path)
    assert dict(read_all(tmp_path)) == dict(samples)
    assert is_whole(tmp_path)


PARTS = st.text("ab.Ü \udcff-", min_size=1, max_size=4)
NAMES = st.one_of(
    st.builds(lambda *parts: "".join(parts), st.sampled_from(["", "f/", "f.v2/", "./", "../"]), PARTS),
    st.sampled_from(
        ["a.jpg", "a.seg.png", "a.JSON", "b.txt", "b/a.jpg", "__meta__", "__m__/a.jpg", "x" * 120 + ".txt"]
    ),
)


@pytest.mark.slow
@given(members=st.lists(st.tuples(NAMES, st.binary(max_size=600)), max_size=12), form=st.sampled_from(["GNU", "PAX"]))
@settings(deadline=None, max_examples=150, suppress_health_check=IN_PLACE)
def test_the_index_has_what_webdataset_reads(tmp_path: Path, members: Members, form: str) -> None:
    """Key by key and field by field, in order; a sample whose field comes twice ends webdataset with an error."""
    members = [*members, ("last.txt", b"so that one sample can be used")]
    write_tar(tmp_path / "some.tar", members, form=form)
    manifest = index_shards(str(tmp_path), split="train")
    try:
        wanted = read_with_webdataset(tmp_path)
    except ValueError as error:
        if "duplicate file name" not in str(error):
            raise
        assert manifest.failures["duplicate member"] >= 1
        return
    found = [(key.encode(errors="surrogateescape").decode(errors="backslashreplace"), fields) for key, fields in wanted]
    assert read_all(tmp_path) == found
    assert "duplicate member" not in manifest.failures
    assert is_whole(tmp_path)


def test_a_key_that_comes_again_is_another_sample(tmp_path: Path) -> None:
    write_tar(tmp_path / "some.tar", [("a.txt", b"1"), ("b.txt", b"2"), ("a.cls", b"3")])
    index_shards(str(tmp_path), split="val")
    assert read_all(tmp_path, "val") == [("a", {"txt": b"1"}), ("b", {"txt": b"2"}), ("a", {"cls": b"3"})]


def test_what_cannot_be_used_is_counted(tmp_path: Path) -> None:
    bad = [("README", b"x"), ("d.txt", b"1"), ("d.TXT", b"2"), ("r.__key__", b"3")]
    write_tar(tmp_path / "some.tar", [("a.txt", b"1"), *bad])
    write_tar(tmp_path / "none.tar", bad[:1])
    manifest = index_shards(str(tmp_path), split="train")
    assert manifest.failures == {"duplicate member": 1, "no key": 2, "reserved name": 1}
    assert [(entry.name, entry.samples, entry.failures) for entry in manifest.shards] == [
        ("none", 0, 1),
        ("some", 1, 3),
    ]
    assert manifest.source["records"] == 5
    assert is_whole(tmp_path)


# ---- how they are indexed -----------------------------------------------------------------------------------


def write_texts(folder: Path, *, num_tars: int = 3) -> None:
    for tar in range(num_tars):
        write_tar(folder / f"train-{tar}.tar", [(f"{tar}{n}.txt", b"%d" % n) for n in range(5)])


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def is_even(key: str, fields: dict[str, bytes]) -> bool:
    return int(fields["txt"]) % 2 == 0 and int(key) % 2 == 0


def test_processes_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They import the module of `keep`; this one would take them seconds."""
    (tmp_path / "keeping.py").write_text("def is_even(key, fields):\n    return int(fields['txt']) % 2 == 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    keep = import_module("keeping").is_even
    folder = tmp_path / "shards"
    folder.mkdir()
    write_texts(folder)
    index_shards(str(folder), split="train", keep=keep)
    alone = files(folder)
    assert read_all(folder)
    index_shards(str(folder), split="train", keep=keep, num_workers=2)
    assert files(folder) == alone


def test_a_remote_folder_is_indexed_as_a_local_one(tmp_path: Path) -> None:
    write_texts(tmp_path)
    filesystem = fsspec.filesystem("memory")
    filesystem.put(f"{tmp_path}/", "/indexing/", recursive=True)
    assert index_shards("memory://indexing", split="train") == index_shards(str(tmp_path), split="train")
    for name, data in files(tmp_path).items():
        assert filesystem.cat_file(f"/indexing/{name}") == data
    filesystem.rm("/indexing", recursive=True)


def test_a_subset_is_chosen_by_key_and_content(tmp_path: Path) -> None:
    write_texts(tmp_path, num_tars=2)
    manifest = index_shards(str(tmp_path), split="train", keep=is_even)
    assert [key for key, _ in read_all(tmp_path)] == ["00", "02", "04", "10", "12", "14"]
    assert (manifest.failures, manifest.source["records"]) == ({"not kept": 4}, 10)
    assert not (tmp_path / "train.failures.jsonl").read_bytes()
    assert is_whole(tmp_path)
    whole = index_shards(str(tmp_path), split="train")
    assert whole.shards[0].sha256 == manifest.shards[0].sha256
    assert whole.shards[0].fingerprint != manifest.shards[0].fingerprint


def test_an_index_of_the_same_tar_that_lists_other_samples_is_refused(tmp_path: Path) -> None:
    write_texts(tmp_path, num_tars=1)
    index_shards(str(tmp_path), split="train", keep=lambda key, _: key != "00")
    other = (tmp_path / "train-0.index").read_bytes()
    index_shards(str(tmp_path), split="train", keep=lambda key, _: key != "01")
    (tmp_path / "train-0.index").write_bytes(other)
    with pytest.raises(SampleError, match=r"is of another shard than its manifest says"):
        read_all(tmp_path)


def test_errors_are_one_line_and_name_no_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(said: str, source: Path = tmp_path, split: str = "train", **options: Any) -> None:
        with pytest.raises(UserError, match=said) as caught:
            index_shards(str(source), split=split, **options)
        assert "\n" not in str(caught.value)
        assert "--" not in str(caught.value)

    refused(r"there is no split 'all': give one of train, val, test", split="all")
    refused(r"no file in .* matches \*\.tar: give a pattern")
    refused(r"there is no folder .*nowhere", source=tmp_path / "nowhere")
    write_texts(tmp_path, num_tars=1)
    refused(r"train-0\.tar is a file: give the folder that it is in", source=tmp_path / "train-0.tar")
    refused(r"no sample in 1 tars .* can be used \(5 not kept\)", keep=lambda *_: False)
    refused(r"matches \*\.zip", pattern="*.zip")
    (tmp_path / "other.tar").write_bytes(gzip.compress(b"x"))
    refused(r"other\.tar is compressed \(gzip\)", pattern="other.tar")
    write_tar(tmp_path / "fields.tar", [(f"image.{number}.txt", b"") for number in range(5)])
    monkeypatch.setattr("captioner.shards.format.MAX_FIELDS", 4)
    refused(
        r"fields\.tar has 5 different fields, such as 0\.txt: a sample is adjacent files KEY\.FIELD",
        pattern="fields.tar",
    )
    assert not list(tmp_path.glob("*.index"))
    index_shards(str(tmp_path), split="train", pattern="train*.tar")
    refused(r"train-0\.tar belongs to split train already: give a pattern", split="val", pattern="*-0.tar")


def test_what_cannot_be_used_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_texts(tmp_path)
    index_shards(tmp_path, split="train", keep=is_even)
    assert not caplog.messages
    cut = tmp_path / "train-1.tar"
    cut.write_bytes(cut.read_bytes()[:2000])
    index_shards(tmp_path, split="train")
    assert caplog.messages == [f"not used: 1 damaged tar; {tmp_path}/train.failures.jsonl lists them"]


def test_indexing_that_stops_leaves_no_manifest(tmp_path: Path) -> None:
    """What it says would not be what the new indexes say."""
    write_texts(tmp_path)
    index_shards(str(tmp_path), split="train")

    def stop(key: str, fields: dict[str, bytes]) -> bool:
        if key == "20":
            raise KeyboardInterrupt
        return True

    with pytest.raises(KeyboardInterrupt):
        index_shards(str(tmp_path), split="train", keep=stop)
    assert not (tmp_path / "train.manifest.json").exists()
    index_shards(str(tmp_path), split="train")
    assert is_whole(tmp_path)


# ---- damage -------------------------------------------------------------------------------------------------


def regions(folder: Path) -> Iterator[tuple[str, int, str]]:
    """A byte of each kind: (file, its place, what is there)."""
    with tarfile.open(folder / "train-0.tar") as tar:
        for info in tar:
            yield "train-0.tar", info.offset + 3, "header"
            yield "train-0.tar", info.offset_data, "content"
            yield "train-0.tar", info.offset_data + info.size + 5, "padding"
    yield "train-0.tar", (folder / "train-0.tar").stat().st_size - 1, "end"
    size = (folder / "train-0.index").stat().st_size
    for place in (0, 9, *range(20, size, 37), size - 1):
        yield "train-0.index", place, "index"


def test_damage_in_every_region_is_noticed(tmp_path: Path) -> None:
    """By reading where it concerns a sample, by verify in any case, and by indexing where the tar says it."""
    samples = [(f"{number:04d}", segmentation(number)) for number in range(3)]
    write_tar(
        tmp_path / "train-0.tar",
        [(f"{key}.{name}", data) for key, fields in samples for name, data in fields.items()],
        form="USTAR",
    )
    index_shards(str(tmp_path), split="train")
    for number, (name, place, what) in enumerate(regions(tmp_path)):
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        if what in ("content", "index"):
            with pytest.raises(SampleError):
                read_all(tmp_path)
        else:
            assert read_all(tmp_path) == samples
        if what != "index" or number % 5 == 0:
            assert not is_whole(tmp_path)
        (tmp_path / name).write_bytes(data)
    assert is_whole(tmp_path)


@given(place=st.integers(0, 10**6), bit=st.integers(0, 7))
@settings(deadline=None, max_examples=60, suppress_health_check=IN_PLACE)
def test_a_damaged_header_is_a_failure_of_indexing(tmp_path: Path, place: int, bit: int) -> None:
    write_tar(tmp_path / "a.tar", [(f"{number}.txt", b"text") for number in range(4)], form="USTAR")
    write_tar(tmp_path / "whole.tar", [("w.txt", b"text")])
    data = bytearray((tmp_path / "a.tar").read_bytes())
    member, byte = divmod(place % (4 * 512), 512)
    data[member * 1024 + byte] ^= 1 << bit
    (tmp_path / "a.tar").write_bytes(data)
    manifest = index_shards(str(tmp_path), split="train")
    is_blank = (byte, bit) in ((148, 4), (154, 5)) or byte == 155  # around the checksum, where tars differ
    assert manifest.failures == ({} if is_blank else {"damaged tar": 1})
    assert manifest.shards[0].samples == (4 if is_blank else member)


# ---- the command --------------------------------------------------------------------------------------------


def test_the_command_looks_after_samples_of_any_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "train-0.tar", [(f"{n}.{name}", data) for n in range(4) for name, data in audio(n).items()])
    write_tar(tmp_path / "train-1.tar", [("x.txt", b"some words"), ("y.txt", b"[bold]others")])
    with pytest.raises(UserError, match=r"6 no image.*--samples any"):
        command(IndexSettings(folder=str(tmp_path), split="train"))
    command(IndexSettings(folder=str(tmp_path), split="train", samples="any"))
    by_command = files(tmp_path)
    assert "vocabulary.json" not in by_command
    index_shards(str(tmp_path), split="train")
    assert files(tmp_path) == by_command
    capsys.readouterr()
    command(ShowSettings(folder=str(tmp_path)))
    command(ShowSettings(folder=str(tmp_path), key="y"))
    shown = capsys.readouterr().out
    assert all(text in shown for text in (f"{len(wav(0)):,} bytes", ".wav", ".cls", "[bold]others", "samples any"))
    (tmp_path / "train-0.index").write_bytes(b"")
    (tmp_path / "train-1.index").unlink()
    assert not is_whole(tmp_path)
    command(RepairSettings(folder=str(tmp_path)))
    assert files(tmp_path) == by_command


def test_an_index_of_chosen_samples_cannot_be_repaired_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_texts(tmp_path)
    index_shards(str(tmp_path), split="train", keep=is_even)
    (tmp_path / "train-1.index").unlink()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        command(RepairSettings(folder=str(tmp_path)))
    assert "index_shards again with the same `keep`" in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "train-1.index").exists()
