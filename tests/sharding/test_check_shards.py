"""Looking after a dataset folder: every fault is found and mended to the same bytes; others' tars become trainable."""

import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from shutil import copytree, move
from typing import Any

import fsspec
import numpy as np
import pytest
import warm
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import captions_of, picture, write_coco

from captioner.errors import UserError
from captioner.files import storage
from captioner.images import views
from captioner.samples import read_content, split_pair
from captioner.shards.format import Manifest, ShardIndex, TarBuilder, manifest_location, read_manifest
from captioner.shards.writing import claim, manifest_fingerprint
from captioner.streaming.dataset import read_split
from captioner.vocabulary import Vocabulary, read_vocabulary, tokenize
from sharding import check_shards, make_shards
from sharding.checking.verify import check_folder, find_problems
from sharding.checking.verify_shard import Problem
from sharding.settings import IndexSettings, RepairSettings, ShardSettings, ShowSettings, VerifySettings
from train.data.batches import CaptionBatch, caption_loader
from train.data.folders import read_view

ROOT = Path(__file__).resolve().parents[2]
IN_PLACE = [HealthCheck.function_scoped_fixture]


def pack(data: Path, output: Path, **changed: Any) -> None:
    plain: dict[str, Any] = {"size": 680, "quality": 100, "shard_megabytes": 1, "threshold": 1, "workers": 1}
    paths: dict[str, Any] = {"images": str(data), "captions": str(data / "annotations"), "output": str(output)}
    make_shards.main(ShardSettings(**(paths | plain | changed)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of 8 training pictures, of which one cannot be packed, in 3 shards, and 3 for validation in one."""
    root = tmp_path_factory.mktemp("whole")
    data = write_coco(root / "coco", num_train=8, num_val=3)
    (data / "train2014" / "COCO_train2014_000000000004.jpg").write_bytes(b"no picture")
    pack(data, root / "shards")
    return root / "shards"


@pytest.fixture
def shards(whole: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged; its source lies where it was."""
    return Path(copytree(whole, tmp_path / "shards"))


def problems(folder: Path | str, split: str | None = None) -> list[Problem]:
    return find_problems(str(folder), check_folder(str(folder), split, doing="testing"))


def named(folder: Path | str) -> set[tuple[str, str]]:
    return {(problem.part, problem.file) for problem in problems(folder)}


def digests(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def marks(folder: Path) -> dict[str, tuple[int, int]]:
    """What tells a file left alone from one written again."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}


def flip_bit(path: Path, place: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 1 << bit]))


def repair(folder: Path | str, **flags: Any) -> None:
    check_shards.repair(RepairSettings(folder=str(folder), **flags))


def swap(first: Path, second: Path) -> None:
    contents = first.read_bytes(), second.read_bytes()
    second.write_bytes(contents[0])
    first.write_bytes(contents[1])


# ---- verify -------------------------------------------------------------------------------------------------


def test_a_whole_folder_is_called_whole(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_shards.verify(VerifySettings(folder=str(whole)))
    assert "all 10 samples in 4 shards are whole (train, val)" in capsys.readouterr().out
    check_shards.verify(VerifySettings(folder=str(whole), split="val"))
    assert "all 3 samples in 1 shards are whole (val)" in capsys.readouterr().out


def is_free_text(path: Path, place: int) -> bool:
    """Whether a byte says where the source lay, or which NLTK counted: nothing else in the folder knows that."""
    text = path.read_text()
    free = {".manifest.json": ('"captions": "', '"images": "'), "vocabulary.json": ('"tokenizer_version": "',)}
    starts = [text.index(s) + len(s) for end, found in free.items() if path.name.endswith(end) for s in found]
    return any(start <= place < text.index('"', start) for start in starts)


DAMAGEABLE = ("train-000001.tar", "train-000000.index", "train-000002.index", "train.manifest.json", "vocabulary.json")


@pytest.mark.slow
@pytest.mark.parametrize("name", [*DAMAGEABLE, "train.failures.jsonl"])
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(deadline=None, max_examples=12, suppress_health_check=IN_PLACE)
def test_a_flipped_bit_is_found_wherever_it_is(shards: Path, name: str, where: float, bit: int) -> None:
    path = shards / name
    place = int(where * path.stat().st_size)
    if name.endswith(".json") and is_free_text(path, place):
        return
    flip_bit(path, place, bit)
    try:
        found = {file for _, file in named(shards)}
        assert name in found
        assert found <= {name, "vocabulary.json"}  # nothing else is suspected; a lost index leaves words unknown
    finally:
        flip_bit(path, place, bit)
    assert named(shards) == set()


@pytest.mark.parametrize("name", ["train-000001.tar", "train-000001.index", "train.manifest.json", "vocabulary.json"])
@pytest.mark.parametrize("kept", [0, 0.3, 0.999])
def test_a_cut_file_is_found(shards: Path, name: str, kept: float) -> None:
    path = shards / name
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    assert {file for _, file in named(shards)} == {name}


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("train-000001.tar", "tar"),
        ("train-000001.index", "index"),
        ("train.failures.jsonl", "failures"),
        ("vocabulary.json", "vocabulary"),
    ],
)
def test_a_missing_file_is_found(shards: Path, name: str, part: str) -> None:
    (shards / name).unlink()
    (found,) = problems(shards)
    assert (found.part, found.file) == (part, name)
    assert "missing" in found.what or "there is no" in found.what
    assert found.remedy


def test_swapped_files_are_found(shards: Path) -> None:
    for endings in (["tar"], ["index"], ["tar", "index"]):
        for ending in endings:
            swap(shards / f"train-000000.{ending}", shards / f"train-000001.{ending}")
        found = {file for part, file in named(shards) if part in ("tar", "index")}
        assert {f"train-00000{n}.{ending}" for n in (0, 1) for ending in endings} <= found
        for ending in endings:
            swap(shards / f"train-000000.{ending}", shards / f"train-000001.{ending}")
    assert named(shards) == set()


def test_files_that_say_the_same_in_another_form_are_whole(shards: Path) -> None:
    """As another version of safetensors or of Python's json may write them; repair does not touch them."""
    path = shards / "train-000001.index"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    path.write_bytes((size + 16).to_bytes(8, "little") + data[8 : 8 + size] + b" " * 16 + data[8 + size :])
    for name in ("train.manifest.json", "vocabulary.json"):
        (shards / name).write_text(json.dumps(json.loads((shards / name).read_text()), separators=(" ,", ": ")))
    assert named(shards) == set()
    before = marks(shards)
    repair(shards)
    assert marks(shards) == before


def test_a_split_without_samples_is_no_whole_one(shards: Path) -> None:
    manifest = replace(read_manifest(str(shards), "val", remedy=""), shards=(), failures={})
    manifest = replace(manifest, fingerprint=manifest_fingerprint(()), source=manifest.source | {"records": 0})
    (shards / "val.manifest.json").write_text(manifest.to_json())
    assert "lists no sample" in " ".join(problem.what for problem in problems(shards, "val"))


def test_a_split_without_manifest_is_unfinished_and_unlisted_shards_are_named(shards: Path) -> None:
    copy = (shards / "train-000000.index").read_bytes()
    (shards / "val.manifest.json").unlink()
    (shards / "train-000007.index").write_bytes(copy)
    found = {problem.part: problem for problem in problems(shards)}
    assert found.keys() == {"unfinished", "stray"}
    assert "make_shards.py" in found["unfinished"].remedy
    assert found["stray"].file == "train-000007.index"


def test_a_folder_without_shards_is_refused_in_one_line(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder, split, said in [
        (tmp_path / "empty", None, "holds no shards"),
        (tmp_path / "nowhere", None, "there is no dataset folder"),
        (shards, "test", r"no shards of split test \(splits there: train, val\)"),
    ]:
        with pytest.raises(UserError, match=said):
            problems(folder, split)


Members = list[tuple[str, bytes]]


def swap_pictures(members: Members) -> Members:
    contents = [content for _, content in members]
    contents[0], contents[2] = contents[2], contents[0]
    return [(name, content) for (name, _), content in zip(members, contents, strict=True)]


def lose_a_field(members: Members) -> Members:
    content = json.loads(members[1][1])
    del content["image_id"]
    return [members[0], (members[1][0], json.dumps(content).encode()), *members[2:]]


def lose_a_token(members: Members) -> Members:
    content = json.loads(members[1][1])
    content["tokens"][0].pop()
    return [members[0], (members[1][0], json.dumps(content).encode()), *members[2:]]


FORGERIES: list[tuple[Callable[[Members], Members], str]] = [
    (swap_pictures, "crc32s_M"),
    (lambda members: [*members[2:], *members[:2]], "keys_S"),
    (lambda members: [members[0], members[2], members[1], *members[3:]], "no caption"),
    (lambda members: members[:-1], "no caption"),
    (lambda members: [*members, *members[:2]], "duplicate key"),
    (lambda members: [(members[0][0], members[0][1][:200]), *members[1:]], "truncated"),
    (lambda members: [("a.jpg", members[0][1]), ("a.json", members[1][1]), *members[2:]], "keys_S"),
    (lose_a_field, "has not the fields"),
    (lose_a_token, "caption_lengths"),
]


@pytest.mark.parametrize(("forge", "said"), FORGERIES)
def test_contents_are_checked_even_where_all_checksums_fit(
    shards: Path, forge: Callable[[Members], Members], said: str
) -> None:
    """As a packer with a mistake would write them: the sha256 is right everywhere."""
    path = shards / "train-000001.tar"
    with tarfile.open(path) as opened:
        members = [(info.name, opened.extractfile(info).read()) for info in opened]  # type: ignore[union-attr]
    tar = TarBuilder()
    for name, content in forge(members):
        tar.add(name, content)
    data = tar.to_bytes()
    path.write_bytes(data)
    digest = sha256(data).hexdigest()
    index = ShardIndex.from_bytes((shards / "train-000001.index").read_bytes(), origin="")
    new = replace(index, facts=index.facts | {"sha256": digest, "bytes": len(data)})
    (shards / "train-000001.index").write_bytes(new.to_bytes())
    manifest = read_manifest(str(shards), "train", remedy="")
    entries = [replace(e, sha256=digest, bytes=len(data)) if e.name == path.stem else e for e in manifest.shards]
    Path(manifest_location(str(shards), "train")).write_text(replace(manifest, shards=tuple(entries)).to_json())
    assert said in " ".join(problem.what for problem in problems(shards))


@pytest.mark.parametrize("change", [{"failures": {}}, {"settings": {"size": 681}}, {"split": "val"}])
def test_an_edited_manifest_is_found(shards: Path, change: dict[str, Any]) -> None:
    manifest = read_manifest(str(shards), "train", remedy="")
    change = {name: getattr(manifest, name) | v if isinstance(v, dict) and v else v for name, v in change.items()}
    Path(manifest_location(str(shards), "train")).write_text(replace(manifest, **change).to_json())
    assert problems(shards)


def test_a_vocabulary_that_was_given_to_packing_is_no_problem(whole: Path, tmp_path: Path) -> None:
    given = tmp_path / "words.json"
    given.write_text(Vocabulary.from_counts({"zebra": 7, "cat": 9}, threshold=5).to_json())
    pack(whole.parent / "coco", tmp_path / "shards", size=32, vocabulary=str(given))
    assert problems(tmp_path / "shards") == []


# ---- repair -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "broken",
    [
        ["train-000001.index"],
        ["train-000001.tar"],
        ["train-000000.tar", "train-000000.index"],
        ["train-000000.index", "train-000001.index", "train-000002.index"],
        ["train-000002.tar", "train-000001.index", "val-000000.index", "val-000000.tar"],
    ],
)
@pytest.mark.parametrize("how", ["missing", "cut", "flipped"])
def test_repair_gives_the_same_bytes_and_touches_no_whole_shard(
    whole: Path, shards: Path, broken: list[str], how: str
) -> None:
    before = marks(shards)
    for name in broken:
        path = shards / name
        if how == "missing":
            path.unlink()
        elif how == "cut":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        else:
            flip_bit(path, path.stat().st_size // 2, 5)
    repair(shards)
    assert digests(shards) == digests(whole)
    after = marks(shards)
    touched = {name for name in after if after[name] != before[name]}
    packed_again = {name.replace(".tar", ".index") for name in broken if name.endswith(".tar")}
    assert touched == {*broken, *packed_again}


@pytest.mark.parametrize("endings", [["tar"], ["index"], ["tar", "index"]])
def test_repair_restores_swapped_shards(whole: Path, shards: Path, endings: list[str]) -> None:
    for ending in endings:
        swap(shards / f"train-000000.{ending}", shards / f"train-000001.{ending}")
    repair(shards)
    assert digests(shards) == digests(whole)


@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(deadline=None, max_examples=8, suppress_health_check=IN_PLACE)
def test_any_flip_in_an_index_is_repaired_from_its_tar_alone(whole: Path, shards: Path, where: float, bit: int) -> None:
    manifest = json.loads((whole / "train.manifest.json").read_text())
    manifest["source"] |= {"images": "/nowhere", "captions": "/nowhere"}
    (shards / "train.manifest.json").write_text(json.dumps(manifest, indent=1))
    path = shards / "train-000000.index"
    flip_bit(path, int(where * path.stat().st_size), bit)
    repair(shards)
    assert path.read_bytes() == (whole / path.name).read_bytes()


@pytest.mark.parametrize(
    "name", ["train.manifest.json", "val.manifest.json", "train.failures.jsonl", "vocabulary.json"]
)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(deadline=None, max_examples=8, suppress_health_check=IN_PLACE)
def test_repair_changes_no_shard_where_only_another_file_is_damaged(
    shards: Path, name: str, where: float, bit: int
) -> None:
    path, before = shards / name, marks(shards)
    place = int(where * path.stat().st_size)
    flip_bit(path, place, bit)
    try:
        with suppress(SystemExit):
            repair(shards)
        assert {n: mark for n, mark in marks(shards).items() if n != name} == {
            n: mark for n, mark in before.items() if n != name
        }
    finally:
        flip_bit(path, place, bit)


def test_repair_says_what_it_needs_and_takes_a_source_that_moved(whole: Path, tmp_path: Path) -> None:
    data = Path(copytree(whole.parent / "coco", tmp_path / "coco"))
    pack(data, tmp_path / "again")
    assert digests(tmp_path / "again").keys() == digests(whole).keys()
    moved = Path(move(data, tmp_path / "moved"))
    (tmp_path / "again" / "train-000001.tar").unlink()
    with pytest.raises(UserError, match=r"train-000001 cannot be packed again: .*captions_train2014.json.*--captions"):
        repair(tmp_path / "again", images=str(moved))
    with pytest.raises(UserError, match=r"train-000001 cannot be packed again: .*coco/train2014.*--images"):
        repair(tmp_path / "again", captions=str(moved / "annotations"))
    repair(tmp_path / "again", images=str(moved), captions=str(moved / "annotations"))
    assert digests(tmp_path / "again")["train-000001.tar"] == digests(whole)["train-000001.tar"]


def test_repair_refuses_a_source_that_has_changed(whole: Path, shards: Path, tmp_path: Path) -> None:
    data = Path(copytree(whole.parent / "coco", tmp_path / "coco"))
    captions = data / "annotations" / "captions_train2014.json"
    text = captions.read_text()
    captions.write_text(text.replace("cat", "rat").replace("dogs", "hogs").replace("man", "fan").replace("bus", "van"))
    (shards / "train-000001.tar").unlink()
    before = digests(shards)
    with pytest.raises(UserError, match="have changed since it was packed"):
        repair(shards, captions=str(captions))
    captions.write_text(text)
    for path in (data / "train2014").iterdir():  # as many bytes, other pixels
        content = path.read_bytes()
        path.write_bytes(content[:-30] + bytes(28) + b"\xff\xd9" if len(content) > 100 else content)
    with pytest.raises(UserError, match=r"train-000001 no longer packs to the same bytes"):
        repair(shards, images=str(data / "train2014"))
    assert digests(shards) == before


def test_repair_leaves_a_shard_whose_images_cannot_be_decoded_any_more(whole: Path, shards: Path) -> None:
    """The only shard of its split: packing it again would give an empty one, and no index would be left."""
    data = Path(copytree(whole.parent / "coco", shards.parent / "coco"))
    for path in (data / "val2014").iterdir():
        path.write_bytes(bytes(path.stat().st_size))
    flip_bit(shards / "val-000000.tar", 5000, 1)
    before = marks(shards)
    with pytest.raises(UserError, match="val-000000 no longer packs to the same bytes"):
        repair(shards, images=str(data / "val2014"), split="val")
    assert marks(shards) == before
    repair(shards, split="val")
    assert digests(shards) == digests(whole)


def test_a_killed_repair_can_be_run_again(whole: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends where a tar is packed and its index is not."""
    for name in ("train-000000.tar", "train-000001.tar", "train-000002.index"):
        (shards / name).unlink()
    write_file = storage.write_atomic

    def write_or_die(location: str, content: bytes | str) -> None:
        if location.endswith("1.index"):
            raise KeyboardInterrupt
        write_file(location, content)

    with monkeypatch.context() as patched:
        patched.setattr(storage, "write_atomic", write_or_die)
        patched.setattr("sharding.checking.repair.count_processors", lambda: 1)
        with pytest.raises(KeyboardInterrupt):
            repair(shards)
    assert named(shards) == {("index", "train-000001.index")}
    repair(shards)
    assert digests(shards) == digests(whole)


def test_repair_waits_for_no_packer(shards: Path) -> None:
    (shards / "train-000001.index").unlink()
    with claim(str(shards), "train"), pytest.raises(UserError, match="is packing this split"):
        repair(shards)


def test_repair_names_what_it_cannot_repair(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (shards / "train-000001.index").unlink()
    flip_bit(shards / "val.manifest.json", 20, 4)
    (shards / "vocabulary.json").unlink()
    with pytest.raises(SystemExit) as left:
        repair(shards)
    assert left.value.code == 1
    shown = capsys.readouterr().out
    assert "train-000001.index" in shown
    assert shown.count("make_shards.py again") == 2
    assert named(shards) == {("manifest", "val.manifest.json"), ("vocabulary", "vocabulary.json")}


def test_nothing_is_rebuilt_by_a_damaged_manifest(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = shards / "train.manifest.json"
    path.write_text(path.read_text().replace('"records"', '"recorded"'))
    (shards / "train-000001.index").unlink()
    before = digests(shards)
    with pytest.raises(SystemExit):
        repair(shards)
    assert digests(shards) == before
    assert "make_shards.py again" in capsys.readouterr().out


# ---- show ---------------------------------------------------------------------------------------------------


def test_show_tells_of_the_splits_the_words_and_a_sample(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_shards.main(check_shards.Command(settings=ShowSettings(folder=str(whole), key="val-000000001")))
    shown = capsys.readouterr().out
    for text in ("1 undecodable", "resize squash", "val-000000001", "1002", "COCO_val2014_000000001002.jpg", "680x680"):
        assert text in shown
    assert all(caption in shown for caption in captions_of(1002))
    with pytest.raises(UserError, match="no sample with key nobody"):
        check_shards.main(check_shards.Command(settings=ShowSettings(folder=str(whole), key="nobody")))


@pytest.mark.slow
def test_the_command_teaches_and_has_three_exit_codes(shards: Path) -> None:
    def run(*flags: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, str(ROOT / "sharding" / "check_shards.py"), *flags]
        return warm.run(line, nested=True, capture_output=True, text=True, cwd=shards.parent)

    (shards / "train-000001.index").unlink()
    done = run("verify", "shards")
    assert (done.returncode, "train-000001.index" in done.stdout) == (1, True)
    assert run("repair", "shards").returncode == 0
    missing = run("verify", "nowhere")
    assert (missing.returncode, missing.stderr.count("\n")) == (2, 1)
    assert "--threshold" in run("index", "--help").stdout


def test_a_folder_behind_a_url_is_verified_repaired_and_indexed(whole: Path, foreign: Path) -> None:
    filesystem = fsspec.filesystem("memory")
    for folder in (whole, foreign):
        filesystem.put(f"{folder}/", f"/checking/{folder.name}/", recursive=True)
    there = "memory://checking/shards"
    assert problems(there) == []
    filesystem.rm("/checking/shards/train-000001.tar")
    filesystem.rm("/checking/shards/val-000000.index")
    assert {file for _, file in named(there)} == {"train-000001.tar", "val-000000.index"}
    repair(there)
    for path in whole.iterdir():
        assert filesystem.cat_file(f"/checking/shards/{path.name}") == path.read_bytes()
    manifest = index_folder("memory://checking/foreign", pattern="train-*.tar")
    assert manifest == index_folder(foreign, pattern="train-*.tar")
    assert problems("memory://checking/foreign", "train") == []
    filesystem.rm("/checking", recursive=True)


# ---- others' tars -------------------------------------------------------------------------------------------


def jpeg(seed: int, **kwargs: Any) -> bytes:
    return encoded(seed, "JPEG", **kwargs)


def encoded(seed: int, kind: str, *, mode: str = "RGB", **sides: int) -> bytes:
    buffer = io.BytesIO()
    picture(seed, **sides).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def write_tar(path: Path, members: Any, *, form: int = tarfile.PAX_FORMAT) -> None:
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size, info.mtime = len(content), 1234567890.25  # type: ignore[assignment]
                tar.addfile(info, io.BytesIO(content))
            else:
                info.type, info.linkname = {"folder": tarfile.DIRTYPE, "link": tarfile.SYMTYPE}[content], "target.jpg"
                tar.addfile(info)


def index_folder(folder: Path | str, split: str = "train", **flags: Any) -> Manifest:
    check_shards.main(
        check_shards.Command(settings=IndexSettings(folder=str(folder), split=split, **{"threshold": 1} | flags))  # type: ignore[arg-type]
    )
    return read_manifest(str(folder), split, remedy="")


def entries(folder: Path, manifest: Manifest) -> Iterator[tuple[str, bytes, bytes]]:
    """The key in its tar and both members' bytes of each indexed sample."""
    for shard in manifest.shards:
        index = ShardIndex.from_bytes((folder / f"{shard.name}.index").read_bytes(), origin="")
        data = (folder / f"{shard.name}.tar").read_bytes()
        for place, key in enumerate(index.keys_S):
            members = split_pair(index.members(place))
            first, second = (data[m.offset : m.offset + m.size] for m in members)
            name, in_tar = key.decode(errors="surrogateescape").split("/", 1)
            assert name == shard.name
            yield in_tar, first, second


def samples_of(number: int) -> dict[str, Any]:
    """One of four kinds of samples that programs write."""
    captions = captions_of(number)
    return [
        {"jpg": jpeg(number), "txt": captions[0]},
        {"png": encoded(number, "PNG", mode="LA"), "json": {"captions": captions, "url": "x"}},
        {"jpg": jpeg(number, width=31, height=77), "json": {"caption": captions[0]}, "txt": "unused"},
        {"webp": encoded(number, "WEBP"), "caption": "\n".join([*captions, "", " "]), "json": {"sha": 1}, "cls": 3},
    ][number % 4]


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """What webdataset's own writer makes, with its float mtimes, in shards of 5."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    for split, first, num in (("train", 0, 13), ("val", 100, 6)):
        with webdataset.ShardWriter(str(folder / f"{split}-%04d.tar"), maxcount=5, verbose=0) as writer:
            for number in range(first, first + num):
                writer.write({"__key__": f"{number:06d}"} | samples_of(number))
    return folder


def test_shard_writers_tars_are_indexed_as_webdataset_reads_them(foreign: Path) -> None:
    tars = digests(foreign)
    manifest = index_folder(foreign)
    assert [shard.name for shard in manifest.shards] == ["train-0000", "train-0001", "train-0002"]
    assert {name: digest for name, digest in digests(foreign).items() if name in tars} == tars
    urls = [str(foreign / f"{shard.name}.tar") for shard in manifest.shards]
    wanted = {s["__key__"]: s for s in webdataset.WebDataset(urls, shardshuffle=False)}  # type: ignore[attr-defined]
    found = list(entries(foreign, manifest))
    assert [key for key, _, _ in found] == list(wanted)
    for key, image, captions in found:
        assert {image, captions} <= {value for value in wanted[key].values() if isinstance(value, bytes)}
        content = read_content(captions, key=key)
        number = int(key)
        assert content["image_id"] == key
        assert content["captions"] == (captions_of(number) if number % 4 in (1, 3) else captions_of(number)[:1])
        assert content["tokens"] == [tokenize(caption) for caption in content["captions"]]
    assert manifest.failures == {}
    assert problems(foreign, "train") == []


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_any_tar_and_any_key_that_webdataset_reads_is_indexed(tmp_path: Path, form: int) -> None:
    keys = ["a", "./dot/b", "folder.v2/c", "d" * 90, "UPPER lower", "grüße/höhe", "x/y/z/" + "long" * 12]
    if form != tarfile.USTAR_FORMAT:
        keys += ["e" * 300, "f/" * 100 + "g", "odd\udcff"]
    members: list[Any] = [("folder", "folder")]
    for number, key in enumerate(keys):
        members += [(f"{key}.JPG", jpeg(number)), (f"{key}.txt", f"caption {number}".encode())]
    write_tar(tmp_path / "some.tar", members, form=form)
    manifest = index_folder(tmp_path)
    assert manifest.failures == {}
    assert list(entries(tmp_path, manifest)) == [
        (key, jpeg(number), f"caption {number}".encode()) for number, key in enumerate(keys)
    ]
    samples = webdataset.WebDataset(str(tmp_path / "some.tar"), shardshuffle=False)
    assert [sample["__key__"] for sample in samples] == keys  # type: ignore[attr-defined]
    assert problems(tmp_path) == []


BAD_SAMPLES = {
    "no caption": [("a.jpg", jpeg(1)), ("a.json", b'{"url": "x"}')],
    "no image": [("b.txt", b"a cat"), ("b.cls", b"3")],
    "undecodable": [("c.jpg", b"no picture"), ("c.txt", b"a cat")],
    "truncated": [("d.jpg", jpeg(1)[:-300]), ("d.txt", b"a cat")],
    "bad encoding": [("e.jpg", jpeg(1)), ("e.txt", b"a \xff cat")],
    "duplicate key": [("good.jpg", jpeg(2)), ("good.txt", b"another")],
    "duplicate member": [("f.jpg", jpeg(1)), ("f.txt", b"a cat"), ("f.JPG", jpeg(1))],
    "several images": [("g.left.jpg", jpeg(1)), ("g.right.jpg", jpeg(2)), ("g.txt", b"a cat")],
    "not a file": [("h.jpg", "link")],
    "no key": [("README", b"hello")],
    "empty": [("i.jpg", b""), ("i.txt", b"a cat")],
}


def test_what_cannot_be_used_is_counted_by_reason_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [("good.jpg", jpeg(0)), ("good.txt", b"a dog"), ("__meta__/x.txt", b"")]
    write_tar(tmp_path / "some.tar", [*good, *(member for bad in BAD_SAMPLES.values() for member in bad)])
    write_tar(tmp_path / "twice.tar", good)
    manifest = index_folder(tmp_path)
    assert manifest.num_samples == 2  # the same key in two tars is two samples
    assert manifest.failures == dict.fromkeys(BAD_SAMPLES, 1)
    assert f"listed in {tmp_path}/train.failures.jsonl" in "".join(capsys.readouterr().out.splitlines())
    lines = (tmp_path / "train.failures.jsonl").read_text().splitlines()
    assert len(lines) == len(BAD_SAMPLES)
    assert {"name": "good", "reason": "duplicate key", "message": "some.tar holds it twice"} in map(json.loads, lines)
    assert problems(tmp_path) == []


@pytest.mark.parametrize(
    "content",
    [
        b'{"captions": 3}',
        b'{"captions": [["a"]]}',
        b"[1]",
        b"{",
        b'{"caption": " "}',
        b'{"text": "\\ud83d"}',
        b"[" * 9999,
    ],
)
def test_captions_json_that_is_none_is_counted(tmp_path: Path, content: bytes) -> None:
    members = [("a.jpg", jpeg(0)), ("a.json", content), ("b.jpg", jpeg(0)), ("b.json", b'{"caption": "a cat"}')]
    write_tar(tmp_path / "some.tar", members)
    manifest = index_folder(tmp_path)
    assert [key for key, _, _ in entries(tmp_path, manifest)] == ["b"]
    assert sum(manifest.failures.values()) == 1


@given(kept=st.floats(0.2, 1, exclude_max=True))
@settings(deadline=None, max_examples=15, suppress_health_check=IN_PLACE)
def test_a_cut_tar_gives_its_whole_samples_and_a_failure(tmp_path: Path, kept: float) -> None:
    path = tmp_path / "some.tar"
    members = [(f"{n}.{ending}", content) for n in range(6) for ending, content in (("jpg", jpeg(n)), ("txt", b"cat"))]
    write_tar(path, members, form=tarfile.GNU_FORMAT)
    with tarfile.open(path) as opened:
        ends = [info.offset_data + info.size for info in opened]
    path.write_bytes(path.read_bytes()[: int(kept * ends[-1])])
    num_whole = sum(end <= path.stat().st_size for end in ends[1::2])
    manifest = index_folder(tmp_path)
    assert manifest.num_samples == num_whole
    assert sum(manifest.failures.values()) >= 1
    assert problems(tmp_path) == []


def test_compressed_tars_are_refused_with_a_remedy(tmp_path: Path) -> None:
    write_tar(tmp_path / "some.tar", [("a.jpg", jpeg(0)), ("a.txt", b"a cat")])
    packed = gzip.compress((tmp_path / "some.tar").read_bytes())
    (tmp_path / "some.tar").write_bytes(packed)
    with pytest.raises(UserError, match=r"some\.tar is compressed \(gzip\).*gunzip"):
        index_folder(tmp_path)
    (tmp_path / "some.tar").rename(tmp_path / "some.tar.gz")
    with pytest.raises(UserError, match=r"some\.tar\.gz matches .* but is not an uncompressed \.tar"):
        index_folder(tmp_path, pattern="*.tar.gz")
    assert [path.name for path in tmp_path.iterdir()] == ["some.tar.gz"]


def test_a_folder_without_one_usable_sample_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "some.tar", [("a.jpg", jpeg(0)), ("b.txt", b"a cat")])
    with pytest.raises(UserError, match=r"matches \*\.zip: give --pattern"):
        index_folder(tmp_path, pattern="*.zip")
    with pytest.raises(UserError, match=r"1 no caption, 1 no image.*KEY\.jpg"):
        index_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["some.tar"]


def test_a_tar_belongs_to_one_split(foreign: Path) -> None:
    index_folder(foreign, pattern="*.tar")
    with pytest.raises(UserError, match=r"val-0000\.tar belongs to split train already"):
        index_folder(foreign, "val")


def test_our_own_shards_are_not_indexed_and_others_not_packed_over(whole: Path, shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs no indexing"):
        index_folder(shards)
    (shards / "train.manifest.json").unlink()
    with pytest.raises(UserError, match=r"made by sharding/make_shards\.py"):
        index_folder(shards)
    write_tar(tmp_path / "train-000000.tar", [("a.jpg", jpeg(0)), ("a.txt", b"a cat")])
    index_folder(tmp_path)
    before = (tmp_path / "train-000000.tar").read_bytes()
    with pytest.raises(UserError, match="tars of another program"):
        pack(whole.parent / "coco", tmp_path)
    assert (tmp_path / "train-000000.tar").read_bytes() == before


def test_a_foreign_folder_of_another_version_says_what_to_delete(
    foreign: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as context:
        context.setattr("captioner.shards.format.FORMAT_VERSION", 99)
        index_folder(foreign)
    with pytest.raises(UserError, match=r"another version .* delete its manifest and \.index files"):
        index_folder(foreign)
    for path in [*foreign.glob("*.index"), foreign / "train.manifest.json"]:
        path.unlink()
    index_folder(foreign)
    assert problems(foreign, "train") == []


def test_faults_in_a_foreign_folder_are_found_and_its_indexes_repaired(foreign: Path) -> None:
    with webdataset.ShardWriter(str(foreign / "train-9%03d.tar"), maxcount=5, verbose=0) as writer:
        for number in (3, 4, 70):  # two of them are keys of other tars too
            writer.write({"__key__": f"{number:06d}"} | samples_of(number))
    index_folder(foreign)
    assert read_manifest(str(foreign), "train", remedy="").failures == {}
    before = digests(foreign)
    for name in ("train-0000.index", "train-9000.index"):
        flip_bit(foreign / name, (foreign / name).stat().st_size - 5, 2)
    (foreign / "train-0001.index").unlink()
    assert {file for part, file in named(foreign) if part == "index"} == {
        "train-0000.index",
        "train-0001.index",
        "train-9000.index",
    }
    repair(foreign, split="train")
    assert digests(foreign) == before
    flip_bit(foreign / "train-0001.tar", 3000, 2)
    with pytest.raises(SystemExit):
        repair(foreign, split="train")
    (found,) = problems(foreign, "train")
    assert (found.part, found.remedy) == ("tar", "restore the file from where it came")


def test_indexing_twice_gives_the_same_files(foreign: Path) -> None:
    index_folder(foreign)
    before = digests(foreign)
    index_folder(foreign)
    assert digests(foreign) == before


# ---- training on them ---------------------------------------------------------------------------------------


def batches(folder: Path, split: str, *, crop: int, training: bool) -> list[CaptionBatch]:
    shards = read_split([str(folder)], split, remedy="")
    loader = caption_loader(
        shards, batch_size=4, crop=crop, max_tokens=9, training=training,
        vocabulary=read_vocabulary(str(folder / "vocabulary.json"), remedy=""),
    )  # fmt: skip
    return [batch for (batch,) in loader]


def test_foreign_pictures_of_any_size_and_mode_are_squashed_on_reading(foreign: Path) -> None:
    manifest = index_folder(foreign, "train", size=40)
    spec = read_view([read_split([str(foreign)], "train", remedy="")], crop=32)
    assert (spec.size, spec.resize) == (40, "squash")
    pictures = {key: image for key, image, _ in entries(foreign, manifest)}
    for batch in batches(foreign, "train", crop=32, training=False):
        for key, view in zip(batch.keys, batch.inputs.numpy(), strict=True):
            np.testing.assert_array_equal(view, views.read_eval_view(pictures[key.partition("/")[2]], spec)[0])
    assert len([key for batch in batches(foreign, "train", crop=40, training=True) for key in batch.keys]) == 13


@pytest.mark.parametrize("resize", ["squash", "keep-ratio", "center-crop", "none"])
def test_pictures_of_every_way_of_resizing_train_and_validate(tmp_path: Path, resize: str) -> None:
    """A picture's middle comes through shards as inference would cut it, whatever its sides."""
    data = write_coco(tmp_path / "coco", num_train=6, num_val=3)
    pack(data, tmp_path / "shards", size=36, resize=resize)
    assert problems(tmp_path / "shards") == []
    spec = read_view([read_split([str(tmp_path / "shards")], "val", remedy="")], crop=32)
    assert spec.resize == ("squash" if resize == "none" else resize)
    views_BPP3 = [view for b in batches(tmp_path / "shards", "val", crop=32, training=False) for view in b.inputs]
    for view, path in zip(views_BPP3, sorted((data / "val2014").iterdir()), strict=True):
        wanted, _ = views.read_eval_view(path.read_bytes(), spec)
        assert abs(view.numpy().astype(int) - wanted).mean() < 4
    for batch in batches(tmp_path / "shards", "train", crop=32, training=True):
        assert batch.inputs.shape[1:] == (32, 32, 3)


def test_splits_of_different_sizes_are_refused(foreign: Path) -> None:
    index_folder(foreign, "train", size=40)
    index_folder(foreign, "val", size=36)
    splits = [read_split([str(foreign)], name, remedy="") for name in ("train", "val")]
    with pytest.raises(UserError, match=r"have size 40 \(squash\), the val images in .* 36 \(squash\)"):
        read_view(splits, crop=32)


@pytest.mark.slow
def test_a_foreign_folder_trains_and_is_evaluated(foreign: Path, tmp_path: Path) -> None:
    index_folder(foreign, "train", size=36)
    words = (foreign / "vocabulary.json").read_bytes()
    index_folder(foreign, "val", size=36)
    assert (foreign / "vocabulary.json").read_bytes() == words
    flags = ["--shards", str(foreign), "--output", str(tmp_path / "run"), "--encoder", "small_cnn", "--weights", "none"]
    flags += [
        "--finetune-encoder-from-step",
        "0",
        "--crop",
        "32",
        "--batch-size",
        "8",
        "--epochs",
        "1",
        "--workers",
        "0",
    ]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    done = warm.run(
        [sys.executable, str(ROOT / "train" / "main.py"), *flags], env=clean, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "validation.jsonl").read_text().splitlines()]
    assert [row["image_id"].rpartition("/")[2] for row in rows] == [f"{number:06d}" for number in range(100, 106)]
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert (config["view"]["size"], config["view"]["resize"]) == (36, "squash")
