"""The shards' format: what others read, what the index says, and what is refused."""

import io
import json
import re
import shutil
import subprocess
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save as save_file
from tiny import captions_of, write_coco

from captioner.errors import UserError
from captioner.images import loading
from captioner.samples import CaptionContent, build_index, image_spans, split_pair, words_of
from captioner.shards.format import (
    Manifest,
    Member,
    ShardEntry,
    ShardIndex,
    TarBuilder,
    _tar_header,
    manifest_location,
    read_manifest,
    sample_key,
    shard_name,
)
from captioner.vocabulary import tokenize
from sharding import make_shards
from sharding.settings import ShardSettings

ARRAYS = ("keys_S", "first_member", "member_fields_M", "offsets_M", "sizes_M", "crc32s_M")

contents = st.binary(max_size=2_000)
captions = st.lists(st.lists(st.sampled_from(["a", "cat", "ü", "\ud83d", '"']), max_size=9), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset folder of 7 training pictures in 4 shards and 3 validation pictures in 2."""
    folder = tmp_path_factory.mktemp("packed")
    data = write_coco(folder / "coco", num_train=7, num_val=3)
    output = folder / "shards"
    make_shards.main(
        ShardSettings(
            images=str(data),
            captions=str(data / "annotations"),
            output=str(output),
            size=766,
            quality=100,
            shard_megabytes=1,
            threshold=1,
            workers=1,
        )
    )
    return output


def indexes(folder: Path) -> dict[Path, ShardIndex]:
    return {
        path.with_suffix(".tar"): ShardIndex.from_bytes(path.read_bytes(), origin=path.name)
        for path in sorted(folder.glob("*.index"))
    }


def read_with_webdataset(urls: list[str]) -> Any:
    """Samples as the stock reader gives them; its types do not say that a pipeline can be iterated."""
    return webdataset.WebDataset(urls, shardshuffle=False).decode("pil")


def test_a_caption_of_any_length_is_indexed() -> None:
    index = build_index(["train-0"], [{"jpg": Member(0, 1, 2), "json": Member(3, 4, 5)}], [[["a"] * 70_000]], {})
    assert index.optional["caption_lengths"].tolist() == [65_535]


def small_index() -> ShardIndex:
    members = [
        {"jpg": Member(512, 10, 1), "json": Member(1536, 20, 2)},
        {"jpg": Member(2560, 30, 3), "json": Member(3584, 40, 4)},
    ]
    return build_index(
        ["train-0", "train-10"], members, [[["a"] * 5, ["b"] * 6], [["a"] * 7]], {"bytes": 1, "fingerprint": "f"}
    )


def test_stock_webdataset_reads_every_sample_with_its_picture_and_captions(packed: Path) -> None:
    for split, num_shards, ids in (("train", 4, range(1, 8)), ("val", 2, range(1001, 1004))):
        urls = [str(path) for path in sorted(packed.glob(f"{split}-*.tar"))]
        assert len(urls) == num_shards
        samples = list(read_with_webdataset(urls))
        assert sorted(sample["json"]["image_id"] for sample in samples) == list(ids)
        for sample in samples:
            content = sample["json"]
            assert content["captions"] == captions_of(content["image_id"])
            assert content["tokens"] == [tokenize(caption) for caption in content["captions"]]
            assert content["annotation_ids"] == [content["image_id"] * 10 + n for n in range(len(content["captions"]))]
            assert (content["width"], content["height"]) == (
                40 + content["image_id"] % 17,
                32 + content["image_id"] % 5,
            )
            assert (sample["jpg"].size, sample["jpg"].mode) == ((766, 766), "RGB")


def test_hugging_face_datasets_streams_every_sample(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(packed / "cache"))
    datasets = pytest.importorskip("datasets", reason="Hugging Face datasets is not installed")
    for split, num_samples in (("train", 7), ("val", 3)):
        shards = {split: str(packed / f"{split}-*.tar")}
        samples = list(datasets.load_dataset("webdataset", data_files=shards, split=split, streaming=True))
        assert [sample["__key__"] for sample in samples] == [sample_key(split, n) for n in range(num_samples)]
        for sample in samples:
            assert sample["jpg"].size == (766, 766)
            assert len(sample["json"]["captions"]) == len(sample["json"]["tokens"]) >= 2


def test_tarfile_and_gnu_tar_list_the_pairs_in_order(packed: Path) -> None:
    tar = shutil.which("tar")
    for path, index in indexes(packed).items():
        expected = [f"{key.decode()}.{ending}" for key in index.keys_S for ending in ("jpg", "json")]
        with tarfile.open(path) as opened:
            assert opened.getnames() == expected
        if tar is not None:
            listed = subprocess.run([tar, "-tf", path], capture_output=True, text=True, check=True)
            assert (listed.stdout.split(), listed.stderr) == (expected, "")


def test_every_index_entry_is_what_the_tar_holds(packed: Path) -> None:
    for path, index in indexes(packed).items():
        data = path.read_bytes()
        with tarfile.open(path) as opened:
            members = opened.getmembers()
        assert index.offsets_M.tolist() == [member.offset_data for member in members]
        assert index.sizes_M.tolist() == [member.size for member in members]
        pieces = [data[member.offset_data : member.offset_data + member.size] for member in members]
        assert index.crc32s_M.tolist() == [zlib.crc32(piece) for piece in pieces]
        lengths = [[len(tokens) for tokens in json.loads(piece)["tokens"]] for piece in pieces[1::2]]
        caption_lengths, first_caption = (index.optional[name] for name in ("caption_lengths", "first_caption"))
        found = [caption_lengths[start:end].tolist() for start, end in pairwise(first_caption.tolist())]
        assert found == lengths


def test_tars_are_plain_ustar_with_fixed_metadata(packed: Path) -> None:
    """A PAX header before each member would make reading nearly twice as slow, and a date no two packs equal."""
    for path in packed.glob("*.tar"):
        data = path.read_bytes()
        assert len(data) % tarfile.RECORDSIZE == 0
        assert data[257:265] == b"ustar\x0000"
        with tarfile.open(path) as opened:
            members = opened.getmembers()
            assert opened.pax_headers == {}
        assert all(member.type == tarfile.REGTYPE and not member.pax_headers for member in members)
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}
        assert [member.offset for member in members] == [member.offset_data - 512 for member in members]


def test_keys_are_safe_for_webdataset_and_unique_over_splits(packed: Path) -> None:
    keys = [key.decode() for index in indexes(packed).values() for key in index.keys_S]
    assert len(keys) == len(set(keys)) == 10
    assert all(re.fullmatch(r"[0-9a-z_-]+", key) for key in keys)
    assert {key.split("-")[0] for key in keys} == {"train", "val"}


@given(first=st.integers(0, 10**9 - 1), second=st.integers(0, 10**9 - 1))
@settings(deadline=None)
def test_keys_and_shard_names_sort_as_their_numbers(first: int, second: int) -> None:
    assert (sample_key("val", first) < sample_key("val", second)) == (first < second)
    few, many = first % 10**6, second % 10**6
    assert (shard_name("val", few) < shard_name("val", many)) == (few < many)


@given(name=st.text("abcz09_-./", min_size=1, max_size=100), size=st.integers(0, 8**11 - 1))
def test_a_header_is_the_one_that_tarfile_writes(name: str, size: int) -> None:
    info = tarfile.TarInfo(name.rstrip("/") or "a")
    info.size, info.mode = size, 0o644
    assert _tar_header(info.name.encode(), size) == info.tobuf(tarfile.USTAR_FORMAT)


def test_a_name_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        TarBuilder().add("a" * 101, b"")


@given(members=st.lists(contents, max_size=6))
@settings(deadline=None)
def test_a_tar_gives_back_what_was_put_in(members: list[bytes]) -> None:
    builder = TarBuilder()
    placed = [builder.add(f"{number}.jpg", content) for number, content in enumerate(members)]
    data = builder.to_bytes()
    assert [data[m.offset : m.offset + m.size] for m in placed] == members
    with tarfile.open(fileobj=io.BytesIO(data)) as opened:
        assert [opened.extractfile(m).read() for m in opened] == members  # type: ignore[union-attr]
    assert len(data) % tarfile.RECORDSIZE == 0


@given(tokens=st.lists(captions, max_size=8), start=st.integers(0, 10**12), crc=st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_an_index_survives_its_file(tokens: list[list[list[str]]], start: int, crc: int) -> None:
    keys = [sample_key("train", number * 7) for number in range(len(tokens))]
    members = [
        {"jpg": Member(start + n, n, crc), "json": Member(start + 2 * n, 3 * n, crc ^ n)} for n in range(len(tokens))
    ]
    facts = {"bytes": 5, "sha256": "ab", "failures": [{"image": "ü\udcff"}]}
    index = build_index(keys, members, tokens, facts)
    read = ShardIndex.from_bytes(index.to_bytes(), origin="x.index")
    assert len(read) == len(tokens)
    assert read.facts == facts
    assert read.optional["caption_lengths"].tolist() == [len(caption) for sample in tokens for caption in sample]
    assert words_of(read) == Counter(token for sample in tokens for caption in sample for token in caption)
    assert [key.decode() for key in read.keys_S] == keys
    for name in ARRAYS:
        assert getattr(read, name).dtype == getattr(index, name).dtype
        np.testing.assert_array_equal(getattr(read, name), getattr(index, name))
    assert read.to_bytes() == index.to_bytes()
    assert [read.members(place) for place in range(len(read))] == members


def test_the_images_of_pairs_are_found_in_any_order_of_members() -> None:
    first, second = (
        {"json": Member(0, 1, 2), "large.png": Member(3, 4, 5)},
        {"jpg": Member(6, 7, 8), "txt": Member(9, 10, 11)},
    )
    offsets_S, sizes_S = image_spans(ShardIndex.of([("a", first), ("b", second)], {}))
    assert (offsets_S.tolist(), sizes_S.tolist()) == ([3, 6], [4, 7])
    assert [split_pair(members)[0] for members in (first, second)] == [Member(3, 4, 5), Member(6, 7, 8)]
    assert image_spans(ShardIndex.of([], {}))[0].tolist() == []
    for other in ({"jpg": Member(0, 1, 2)}, {"json": Member(0, 1, 2), "txt": Member(0, 1, 2)}, first | second):
        with pytest.raises(ValueError, match="not an image with captions"):
            image_spans(ShardIndex.of([("a", first), ("b", other)], {}))


def test_keys_of_unequal_length_survive() -> None:
    read = ShardIndex.from_bytes(small_index().to_bytes(), origin="x")
    assert read.keys_S.tolist() == [b"train-0", b"train-10"]


@given(kept=st.floats(0, 1, exclude_max=True))
@settings(deadline=None)
def test_a_cut_index_is_refused_in_one_line(kept: float) -> None:
    data = small_index().to_bytes()
    with pytest.raises(UserError, match=r"t\.index is not a readable shard index .*make_shards") as caught:
        ShardIndex.from_bytes(data[: int(kept * len(data))], origin="t.index")
    assert "\n" not in str(caught.value)


def test_an_index_of_another_format_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("captioner.shards.format.FORMAT_VERSION", 99)
    data = small_index().to_bytes()
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"t\.index has format 99, this version reads 5: .*make_shards"):
        ShardIndex.from_bytes(data, origin="t.index")


@pytest.mark.parametrize(("version", "checksum"), [(2, ""), (3, "0" * 64)])
def test_an_index_of_a_format_before_is_refused_in_one_line(version: int, checksum: str) -> None:
    """Format 2 had its checksum among the facts; format 3 had two members for each sample."""
    facts = checksum + json.dumps({"format_version": version, "bytes": 1})
    data = save_file({"keys": np.zeros((0, 1), np.uint8)}, metadata={"facts": facts})
    said = rf"t\.index has format {version}, this version reads 5: .*make_shards.* or index .*check_shards\.py index"
    with pytest.raises(UserError, match=said):
        ShardIndex.from_bytes(data, origin="t.index")


def rewritten(data: bytes, *, order: Callable[[list[str]], list[str]], padding: int) -> bytes:
    """The same safetensors file as another version of the library may write it."""
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    metadata = header.pop("__metadata__")
    new, parts = {}, []
    for name in order(list(header)):
        start, end = header[name]["data_offsets"]
        offset = sum(map(len, parts))
        parts.append(body[start:end])
        new[name] = header[name] | {"data_offsets": [offset, offset + end - start]}
    text = json.dumps(new | {"__metadata__": metadata}, separators=(",", ":")).encode() + b" " * padding
    return len(text).to_bytes(8, "little") + text + b"".join(parts)


@pytest.mark.parametrize("order", [list, sorted, lambda names: sorted(names, reverse=True)])
@pytest.mark.parametrize("padding", [0, 8, 13])
def test_an_index_that_another_version_of_safetensors_writes_is_the_same(
    order: Callable[[list[str]], list[str]], padding: int
) -> None:
    index = small_index()
    data = rewritten(index.to_bytes(), order=order, padding=padding)
    read = ShardIndex.from_bytes(data, origin="t.index")
    assert data != index.to_bytes()
    assert (read.facts, words_of(read)) == (index.facts, words_of(index))
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(read, name), getattr(index, name))


@pytest.mark.parametrize("padding", [0, 8])
def test_any_changed_byte_of_an_index_is_found(padding: int) -> None:
    data = rewritten(small_index().to_bytes(), order=sorted, padding=padding)
    rng = np.random.default_rng(0)
    for place, byte in enumerate(data):
        others = {byte ^ 1 << bit for bit in range(8)} | {*b" \t\n\r0Ee", *rng.integers(0, 256, 4).tolist()}
        for other in others - {byte}:
            with pytest.raises(UserError, match=r"t\.index"):
                ShardIndex.from_bytes(data[:place] + bytes([other]) + data[place + 1 :], origin="t.index")


def test_a_sample_survives_its_json_whatever_its_text() -> None:
    odd = "a \ud83d \u2028 ü \x00 'cat'"
    sample = CaptionContent(
        image_id="x",
        file_name="bad\udcff.jpg",
        width=3,
        height=2,
        captions=[odd],
        tokens=[[odd]],
        annotation_ids=[None],
    )
    assert CaptionContent(**json.loads(sample.to_json())) == sample
    assert sample.to_json().isascii()


def make_manifest() -> Manifest:
    entries = [
        ShardEntry(
            name=shard_name("val", n), samples=n, captions=5 * n, failures=0, bytes=9, sha256="s", fingerprint="f"
        )
        for n in (1, 2)
    ]
    return Manifest(
        split="val", shards=tuple(entries), settings={"size": 8}, source={}, failures={"empty": 1}, fingerprint="f"
    )


def test_a_manifest_survives_its_file_and_sums_its_shards(tmp_path: Path) -> None:
    Path(manifest_location(str(tmp_path), "val")).write_text(make_manifest().to_json())
    assert read_manifest(str(tmp_path), "val", remedy="r") == make_manifest()
    assert make_manifest().num_samples == 3
    assert json.loads(make_manifest().to_json())["totals"] == {"samples": 3, "captions": 15, "bytes": 18}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, r"there is no .*val.manifest.json \(splits there: none\): do this"),
        ("not JSON", "cannot read .*val.manifest.json"),
        ("{}", "is not a manifest"),
        ("[]", "is not a manifest"),
        (make_manifest().to_json().replace('"format_version": 5', '"format_version": 3'), "has format 3"),
        (make_manifest().to_json().replace('"source"', '"sauce"'), "is not a manifest"),
    ],
)
def test_a_manifest_that_cannot_be_used_is_refused_in_one_line(tmp_path: Path, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / "val.manifest.json").write_text(text)
    with pytest.raises(UserError, match=said) as caught:
        read_manifest(str(tmp_path), "val", remedy="do this")
    assert "\n" not in str(caught.value)


def test_stored_pictures_are_the_originals_squashed(packed: Path) -> None:
    data = packed.parent / "coco" / "train2014"
    for sample in webdataset.WebDataset(str(packed / "train-000000.tar"), shardshuffle=False):
        original = data / json.loads(sample["json"])["file_name"]
        expected, _ = loading.load_resized(original.read_bytes(), size=766, resize="squash")
        assert sample["jpg"] == loading.encode_jpeg(expected, quality=100)
