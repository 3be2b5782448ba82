"""Packing from pictures and caption files to a dataset folder, end to end."""

import csv
import io
import json
import re
import subprocess
import sys
from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import Any

import fsspec
import pytest
import warm
import webdataset
from PIL import Image
from tiny import picture, write_captions, write_coco

from captioner.errors import UserError
from captioner.shards.format import Manifest, ShardIndex, read_manifest
from captioner.vocabulary import Vocabulary
from sharding import make_shards
from sharding.settings import ShardSettings

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    return write_coco(tmp_path / "coco", num_train=6, num_val=3)


def flags(coco: Path, output: Path | str, **changed: Any) -> ShardSettings:
    """Settings for one process and shards of 3 pictures each, as far as not `changed`."""
    plain: dict[str, Any] = {"size": 680, "quality": 100, "shard_megabytes": 1, "threshold": 1, "workers": 1}
    paths: dict[str, Any] = {"images": str(coco), "captions": str(coco / "annotations"), "output": str(output)}
    return ShardSettings(**(paths | plain | changed))


def pack(coco: Path, output: Path | str, **changed: Any) -> None:
    make_shards.main(flags(coco, output, **changed))


def files(folder: Path, *patterns: str) -> dict[str, str]:
    """Digests of the folder's files by name."""
    found = {path for pattern in patterns or ("*",) for path in folder.glob(pattern)}
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in sorted(found)}


def marks(folder: Path) -> dict[str, tuple[int, int]]:
    """What tells a file left alone from one written again."""
    found = {path.name: path.stat() for path in [*folder.glob("*.tar"), *folder.glob("*.index")]}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in found.items()}


def manifest(folder: Path, split: str) -> Manifest:
    return read_manifest(str(folder), split, remedy="")


def image_ids(folder: Path, split: str) -> list[int | str]:
    found = []
    for entry in manifest(folder, split).shards:
        index = ShardIndex.from_bytes((folder / f"{entry.name}.index").read_bytes(), origin=entry.name)
        data = (folder / f"{entry.name}.tar").read_bytes()
        texts = [index.members(place)["json"] for place in range(len(index))]
        found += [json.loads(data[text.offset : text.offset + text.size])["image_id"] for text in texts]
    return found


def words(folder: Path) -> Vocabulary:
    return Vocabulary.from_json((folder / "vocabulary.json").read_text(), origin="vocabulary.json")


def command(*arguments: str, cwd: Path, **options: Any) -> warm.Popen:
    line = [sys.executable, str(ROOT / "sharding" / "make_shards.py"), *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return warm.Popen(line, nested=True, cwd=cwd, **pipes, **options)


def test_all_splits_are_packed_training_first(coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pack(coco, tmp_path / "shards")
    assert set(files(tmp_path / "shards")) == {
        "vocabulary.json",
        *(f"train-00000{number}.{ending}" for number in (0, 1) for ending in ("tar", "index")),
        *("val-000000.tar", "val-000000.index"),
        *(f"{split}.{name}" for split in ("train", "val") for name in ("manifest.json", "failures.jsonl")),
    }
    assert sorted(image_ids(tmp_path / "shards", "train")) == [1, 2, 3, 4, 5, 6]
    assert image_ids(tmp_path / "shards", "val") == [1001, 1002, 1003]
    shown = capsys.readouterr().out
    assert shown.index("train") < shown.index("val")


def test_the_manifest_tells_the_truth_about_every_shard(coco: Path, tmp_path: Path) -> None:
    pack(coco, tmp_path / "shards")
    for split in ("train", "val"):
        found = manifest(tmp_path / "shards", split)
        assert found.settings["size"] == 680
        assert found.failures == {}
        assert {shard.name: shard.sha256 for shard in found.shards} == {
            name.removesuffix(".tar"): digest for name, digest in files(tmp_path / "shards", f"{split}-*.tar").items()
        }
        for shard in found.shards:
            assert shard.bytes == (tmp_path / "shards" / f"{shard.name}.tar").stat().st_size


def test_the_order_of_training_samples_is_this_one(tmp_path: Path) -> None:
    """Shards' bytes and fingerprints follow from it, so no version of Python or of a library may change it."""
    pack(write_coco(tmp_path / "coco", num_train=12, num_val=0), tmp_path / "shards", size=32)
    assert image_ids(tmp_path / "shards", "train") == [7, 9, 1, 10, 4, 12, 11, 2, 5, 3, 8, 6]


def test_training_samples_are_shuffled_and_held_out_ones_are_not(tmp_path: Path) -> None:
    """Of 12 pictures in random order, all in place is a matter of 1 in 12! = 479,001,600."""
    pack(write_coco(tmp_path / "coco", num_train=12, num_val=12), tmp_path / "shards", size=32)
    assert image_ids(tmp_path / "shards", "train") != list(range(1, 13))
    assert image_ids(tmp_path / "shards", "val") == list(range(1001, 1013))


def test_packing_again_reuses_every_shard(coco: Path, tmp_path: Path) -> None:
    pack(coco, tmp_path / "shards")
    before, digests = marks(tmp_path / "shards"), files(tmp_path / "shards")
    pack(coco, tmp_path / "shards")
    assert marks(tmp_path / "shards") == before
    assert files(tmp_path / "shards") == digests


@pytest.mark.parametrize("damage", ["tar gone", "index gone", "tar cut", "index cut"])
def test_packing_again_mends_what_is_damaged_and_only_that(coco: Path, tmp_path: Path, damage: str) -> None:
    pack(coco, tmp_path / "shards")
    before, digests = marks(tmp_path / "shards"), files(tmp_path / "shards")
    kind, how = damage.split()
    broken = tmp_path / "shards" / f"train-000001.{kind}"
    if how == "gone":
        broken.unlink()
    else:
        broken.write_bytes(broken.read_bytes()[:-100])
    pack(coco, tmp_path / "shards")
    assert files(tmp_path / "shards") == digests
    changed = {name for name, mark in marks(tmp_path / "shards").items() if mark != before[name]}
    assert changed == {"train-000001.tar", "train-000001.index"}


def test_the_bytes_do_not_depend_on_the_number_of_workers(coco: Path, tmp_path: Path) -> None:
    for workers in (1, 2):
        pack(coco, tmp_path / f"shards{workers}", workers=workers)
    assert files(tmp_path / "shards1") == files(tmp_path / "shards2")


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"quality": 80}, "quality was 100, is 80"), ({"size": 700}, "size was 680, is 700")],
)
def test_a_folder_made_with_other_settings_is_refused_and_left_alone(
    coco: Path, tmp_path: Path, changed: dict[str, int], said: str
) -> None:
    pack(coco, tmp_path / "shards")
    before = files(tmp_path / "shards")
    with pytest.raises(UserError, match=said) as caught:
        pack(coco, tmp_path / "shards", **changed)
    assert "--output" in str(caught.value)
    assert files(tmp_path / "shards") == before


def test_a_folder_made_from_other_captions_is_refused(coco: Path, tmp_path: Path) -> None:
    pack(coco, tmp_path / "shards")
    path = coco / "annotations" / "captions_train2014.json"
    path.write_text(path.read_text().replace("A cat", "One cat").replace("Two dogs", "Some dogs"))
    with pytest.raises(UserError, match=r"the captions of COCO_train2014_\d+.jpg have changed"):
        pack(coco, tmp_path / "shards")


@pytest.mark.slow
def test_tars_of_another_program_are_not_overwritten(coco: Path, tmp_path: Path) -> None:
    tars = tmp_path / "tars"
    tars.mkdir()
    with webdataset.TarWriter(str(tars / "mine-0.tar")) as writer:
        writer.write({"__key__": "a", "jpg": (coco / "train2014" / "COCO_train2014_000000000001.jpg").read_bytes()}
                     | {"txt": "a cat"})  # fmt: skip
    command = [sys.executable, str(ROOT / "sharding/check_shards.py"), "index", str(tars), "--split", "train"]
    warm.run(command, check=True, capture_output=True)
    before = files(tars)
    with pytest.raises(UserError, match="tars of another program"):
        pack(coco, tars, split="train")
    assert files(tars) == before


def test_a_held_out_split_needs_the_training_vocabulary(coco: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="pack --split train first"):
        pack(coco, tmp_path / "shards", split="val")
    assert not (tmp_path / "shards").exists()
    pack(coco, tmp_path / "shards", split="train")
    pack(coco, tmp_path / "shards", split="val")
    assert image_ids(tmp_path / "shards", "val") == [1001, 1002, 1003]


def test_a_given_vocabulary_is_used_and_a_bad_one_refused_before_packing(coco: Path, tmp_path: Path) -> None:
    given = tmp_path / "given.json"
    given.write_text(Vocabulary.from_counts({"zebra": 5}, threshold=2).to_json())
    pack(coco, tmp_path / "shards", split="val", vocabulary=str(given))
    assert words(tmp_path / "shards").words[4:] == ("zebra",)
    for bad in (tmp_path / "not there.json", coco / "annotations" / "captions_val2014.json", coco):
        with pytest.raises(UserError, match=re.escape(str(bad))):
            pack(coco, tmp_path / "other", vocabulary=str(bad))
    assert not (tmp_path / "other").exists()


def test_another_threshold_rewrites_the_vocabulary_and_touches_no_shard(coco: Path, tmp_path: Path) -> None:
    pack(coco, tmp_path / "shards", threshold=1)
    before, all_words = marks(tmp_path / "shards"), words(tmp_path / "shards")
    pack(coco, tmp_path / "shards", threshold=5)
    fewer = words(tmp_path / "shards")
    assert marks(tmp_path / "shards") == before
    assert fewer.threshold == 5
    expected = [word for word, count in zip(all_words.words, all_words.counts, strict=True) if count >= 5]
    assert list(fewer.words[4:]) == expected
    assert 4 < len(fewer) < len(all_words)


def write_bad_split(folder: Path) -> tuple[Path, dict[str, str]]:
    """A split with every kind of bad picture and one good one; returns the reason expected for each name."""
    (folder / "annotations").mkdir(parents=True)
    (folder / "a folder.jpg").mkdir()
    picture(1).save(folder / "good.jpg")
    good = (folder / "good.jpg").read_bytes()
    (folder.parent / "outside.jpg").write_bytes(good)
    for name, content in {"cut.jpg": good[:-40], "text.jpg": b"hello", "empty.jpg": b""}.items():
        (folder / name).write_bytes(content)
    reasons = {
        "missing.jpg": "missing",
        "cut.jpg": "truncated",
        "text.jpg": "undecodable",
        "empty.jpg": "empty",
        "a folder.jpg": "missing",
        "zero\0byte.jpg": "unsafe name",
        "half \ud83d.jpg": "missing",
        "silent.jpg": "no caption",
        "blank.jpg": "empty caption",
        "../outside.jpg": "unsafe name",
        str(folder / "good.jpg"): "unsafe name",
        "again.jpg": "duplicate id",
    }
    images = [{"id": 1, "file_name": "good.jpg"}]
    images += [{"id": number, "file_name": name} for number, name in enumerate(reasons, start=2)]
    images[-1]["id"] = 1
    texts = {image["id"]: "a cat" for image in images if image["file_name"] != "silent.jpg"}
    annotations = [{"id": 10 * number, "image_id": number, "caption": text} for number, text in texts.items()]
    for annotation in annotations:
        if images[annotation["image_id"] - 1]["file_name"] == "blank.jpg":
            annotation["caption"] = " \n"
    annotations.append({"id": 7, "image_id": 1, "caption": "half a pair \ud83d and a \u2028 line"})
    write_captions(folder / "annotations" / "captions_train.json", images=images, annotations=annotations)
    return folder, reasons


def test_bad_pictures_are_counted_by_reason_and_listed_and_never_stop_the_packing(tmp_path: Path) -> None:
    folder, reasons = write_bad_split(tmp_path / "coco")
    pack(folder, tmp_path / "shards", size=32)
    found = manifest(tmp_path / "shards", "train")
    # A picture whose only caption is blank counts twice: for the caption, and for itself.
    twice = [("blank.jpg", "no caption"), ("good.jpg", "bad encoding")]
    assert found.failures == Counter([*reasons.values(), *(reason for _, reason in twice)])
    assert found.num_samples == 1
    assert image_ids(tmp_path / "shards", "train") == [1]
    lines = (tmp_path / "shards" / "train.failures.jsonl").read_text().splitlines()
    listed = [(failure["name"], failure["reason"]) for failure in map(json.loads, lines)]
    assert Counter(listed) == Counter([*reasons.items(), *twice])
    assert "half" not in words(tmp_path / "shards").words


def test_a_shard_without_one_good_picture_is_an_empty_shard(tmp_path: Path) -> None:
    data = write_coco(tmp_path / "coco", num_train=1, num_val=6)
    for path in sorted((data / "val2014").iterdir())[:3]:
        path.write_bytes(b"no picture")
    pack(data, tmp_path / "shards")
    found = manifest(tmp_path / "shards", "val")
    assert [shard.samples for shard in found.shards] == [0, 3]
    assert found.failures == {"undecodable": 3}
    pack(data, tmp_path / "shards")


# ---- nothing to pack --------------------------------------------------------------------------------------

NOTHING = {  # rows of a table, and what the error says of them
    "no row": ("", "no image of split train to pack: name another file"),
    "absolute names": ("{data}/train2014/a.jpg,a cat\n", "1 unsafe name.*train2014/a.jpg' as a path below --images"),
    "names of another system": ("C:\\a.jpg,a cat\n", "1 unsafe name.*below --images"),
    "no captions": ("a.jpg,\nb.jpg, \n", "2 empty caption, 2 no caption.*line 2"),
    "bad rows": ("a.jpg\nb.jpg\n", r"2 bad row.*line 2: \['a\.jpg'\]"),
    "bad encoding": ("a.jpg,\udce9\n", r"1 bad encoding.*udce9"),
    "missing pictures": ("a.jpg,a cat\n", "none of the 1 images .* give --images"),
    "undecodable pictures": ("bad.jpg,a cat\nempty.jpg,a dog\n", "could be packed .*1 empty, 1 undecodable.*bad.jpg"),
}


@pytest.mark.parametrize("case", NOTHING)
@pytest.mark.parametrize("limit", [None, 10.0])
def test_packing_nothing_is_an_error_that_says_why_and_leaves_no_dataset(
    tmp_path: Path, case: str, limit: float | None
) -> None:
    rows, said = NOTHING[case]
    photos, output = tmp_path / "coco" / "train2014", tmp_path / "shards"
    photos.mkdir(parents=True)
    (photos / "bad.jpg").write_bytes(b"no picture")
    (photos / "empty.jpg").touch()
    table = tmp_path / "rows.csv"
    table.write_bytes(f"image,caption\n{rows.format(data=tmp_path / 'coco')}".encode(errors="surrogateescape"))
    chosen = {"images": str(photos), "captions": str(table), "split": "train", "max_failures": limit}
    with pytest.raises(UserError, match=said) as caught:
        pack(tmp_path, output, **chosen)
    assert "\n" not in str(caught.value)
    assert not [name for name in files(output) if not name.endswith(".packing")]
    picture(1).save(photos / "a.jpg")
    table.write_text("image,caption\na.jpg,a cat\n")
    pack(tmp_path, output, **chosen)
    assert manifest(output, "train").num_samples == 1


def test_two_images_of_one_id_are_one_and_a_duplicate(coco: Path, tmp_path: Path) -> None:
    names = sorted(path.name for path in (coco / "train2014").iterdir())
    rows = "".join(f"{name},a cat\n" for name in [names[0], names[0]])
    (tmp_path / "rows.csv").write_text(f"image,caption\n{rows}")
    pack(coco, tmp_path / "shards", images=str(coco / "train2014"), captions=str(tmp_path / "rows.csv"), split="train")
    assert manifest(tmp_path / "shards", "train").shards[0].captions == 2


# ---- small data -------------------------------------------------------------------------------------------


def write_table(folder: Path, captions: list[str]) -> dict[str, str]:
    """Pictures with a caption each; the flags that name them."""
    folder.mkdir()
    for number in range(len(captions)):
        picture(number).save(folder / f"{number}.png")
    with (folder / "captions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *((f"{n}.png", text) for n, text in enumerate(captions))])
    return {"images": str(folder), "captions": str(folder / "captions.csv"), "split": "train"}


def test_small_data_lowers_the_threshold_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    three = ["A brown dog runs on grass.", "Two cats sleep on a sofa.", "A red car in the rain."]
    pack(tmp_path, tmp_path / "shards", **write_table(tmp_path / "three", three), size=32, threshold=None)
    shown = capsys.readouterr().out
    assert words(tmp_path / "shards").threshold == 1
    assert {"dog", "cats", "rain"} < set(words(tmp_path / "shards").words)
    assert "16 words (seen at least 1 times)" in shown
    assert "100.0% of the captions' 21 running words" in shown
    assert "--threshold 4" in shown


def test_a_threshold_is_kept_as_given_and_refused_where_it_leaves_no_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = write_table(tmp_path / "two", ["A dog and a cat", "A bird"])
    pack(tmp_path, tmp_path / "shards", **chosen, size=32, threshold=2)
    assert words(tmp_path / "shards").words[4:] == ("a",)
    assert "the data is small" not in capsys.readouterr().out
    with pytest.raises(UserError, match=r"occurs 4 times .* most frequent one 3 times: give a smaller --threshold"):
        pack(tmp_path, tmp_path / "other", **chosen, size=32, threshold=4)
    assert not (tmp_path / "other" / "train.manifest.json").exists()


def test_larger_data_keeps_the_books_threshold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = write_table(tmp_path / "many", ["A dog runs"] * 9 + ["A cat runs"])
    pack(tmp_path, tmp_path / "shards", **chosen, size=32, threshold=None)
    assert words(tmp_path / "shards").threshold == 4
    assert words(tmp_path / "shards").words[4:] == ("a", "runs", "dog")
    assert "the data is small" not in capsys.readouterr().out


def write_karpathy(folder: Path, splits: list[str]) -> Path:
    folder.mkdir()
    (folder / "photos").mkdir()
    images = []
    for number, split in enumerate(splits):
        picture(number).save(folder / "photos" / f"{number}.jpg")
        sentences = [{"raw": f"Picture number {number}", "sentid": 10 * number}]
        images.append(
            {"filepath": "photos", "filename": f"{number}.jpg", "cocoid": 100 + number, "split": split}
            | {"sentences": sentences}
        )
    (folder / "dataset_coco.json").write_text(json.dumps({"images": images}))
    return folder


def test_karpathys_file_gives_all_three_splits_with_restval_in_training(tmp_path: Path) -> None:
    data = write_karpathy(tmp_path / "data", ["test", "train", "restval", "val", "restval"])
    pack(data, tmp_path / "shards", captions=str(data / "dataset_coco.json"), size=32)
    found = {split: sorted(image_ids(tmp_path / "shards", split)) for split in ("train", "val", "test")}
    assert found == {"train": [101, 102, 104], "val": [103], "test": [100]}


def test_karpathys_file_with_an_unknown_split_is_refused(tmp_path: Path) -> None:
    data = write_karpathy(tmp_path / "data", ["train", "holdout"])
    with pytest.raises(UserError, match="split 'holdout'"):
        pack(data, tmp_path / "shards", captions=str(data / "dataset_coco.json"))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"images": [{}], "annotations": []}', '{"images": 3}'])
def test_a_caption_file_that_is_none_is_refused_in_one_line(coco: Path, tmp_path: Path, content: str) -> None:
    path = coco / "annotations" / "captions_train2014.json"
    path.write_text(content)
    with pytest.raises(UserError, match=re.escape(str(path))) as caught:
        pack(coco, tmp_path / "shards")
    assert "\n" not in str(caught.value)


def test_without_arguments_and_data_one_line_says_how_to_get_them(tmp_path: Path) -> None:
    process = command(cwd=tmp_path)
    shown, error = process.communicate(timeout=120)
    assert process.returncode == 2
    assert shown == ""
    assert error.startswith("error: there is no caption file or folder data/coco/annotations")
    assert "check --images and --captions (for COCO run python sharding/download_coco.py first)" in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_shows_the_plan_and_writes_nothing(
    coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (coco / "train2014" / "COCO_train2014_000000000004.jpg").unlink()
    pack(coco, tmp_path / "shards", dry_run=True)
    assert not (tmp_path / "shards").exists()
    shown = capsys.readouterr().out
    assert "missing: COCO_train2014_000000000004.jpg" in shown
    rows = [line.split("│")[1:-1] for line in shown.splitlines() if line.startswith("│")]
    header = ["split", "pictures", "shards", "about MB", "MB to read", "shards to reuse", "cannot be packed"]
    table = [dict(zip(header, map(str.strip, row), strict=True)) for row in rows]
    assert [(row["split"], row["pictures"], row["shards"], row["shards to reuse"]) for row in table] == [
        ("train", "6", "2", "0"),
        ("val", "3", "1", "0"),
    ]
    assert [row["cannot be packed"] for row in table] == ["1 missing", "none"]
    pack(coco, tmp_path / "shards", split="train")
    capsys.readouterr()
    pack(coco, tmp_path / "shards", dry_run=True)
    assert [line.split("│")[6].strip() for line in capsys.readouterr().out.splitlines() if line[0] == "│"] == ["2", "0"]


@pytest.mark.parametrize(("limit", "code"), [(None, 0), (2, 0), (1, 3), (0, 3), (0.34, 0), (0.33, 3)])
def test_the_exit_code_says_whether_more_failed_than_allowed(
    coco: Path, tmp_path: Path, limit: float | None, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """2 of 6 pictures fail; whatever the limit, what can be packed is packed and counted."""
    for name in ("COCO_train2014_000000000004.jpg", "COCO_train2014_000000000005.jpg"):
        (coco / "train2014" / name).write_bytes(b"no picture")
    try:
        pack(coco, tmp_path / "shards", split="train", max_failures=limit)
        found = 0
    except SystemExit as ended:
        found = ended.code
    shown = capsys.readouterr()
    listed = str(tmp_path / "shards" / "train.failures.jsonl")
    assert listed in shown.out.replace("\n", "")
    if code:
        assert "2 of 6 could not be packed" in shown.err
        assert listed in shown.err
    assert found == code
    assert manifest(tmp_path / "shards", "train").num_samples == 4


def test_pictures_that_are_all_missing_are_a_wrong_folder(coco: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none of the 6 images .*: give --images the folder"):
        pack(coco, tmp_path / "shards", images=str(coco / "annotations"))


@pytest.mark.parametrize("resize", ["center-crop", "keep-ratio", "none"])
def test_pictures_are_stored_as_the_wanted_resize_has_them(coco: Path, tmp_path: Path, resize: Any) -> None:
    pack(coco, tmp_path / "shards", split="train", size=30, resize=resize)
    found = manifest(tmp_path / "shards", "train")
    assert (found.settings["resize"], found.settings["size"]) == (resize, 30)
    for sample in webdataset.WebDataset(str(tmp_path / "shards" / "train-000000.tar"), shardshuffle=False):
        content, stored = json.loads(sample["json"]), Image.open(io.BytesIO(sample["jpg"])).size
        original = (content["width"], content["height"])
        wide = round(original[0] * 30 / original[1])
        assert stored == {"center-crop": (30, 30), "keep-ratio": (wide, 30), "none": original}[resize]
        if resize == "none":
            assert sample["jpg"] == (coco / "train2014" / content["file_name"]).read_bytes()


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl"])
def test_other_caption_files_give_the_same_samples(coco: Path, tmp_path: Path, ending: str) -> None:
    pack(coco, tmp_path / "coco", split="train", size=32)
    content = json.loads((coco / "annotations" / "captions_train2014.json").read_text())
    names = {image["id"]: image["file_name"] for image in content["images"]}
    rows = [(names[annotation["image_id"]], annotation["caption"]) for annotation in content["annotations"]]
    path = tmp_path / f"mine.{ending}"
    with path.open("w", newline="") as file:
        if ending == "jsonl":
            file.writelines(json.dumps({"path": name, "caption": caption}) + "\n" for name, caption in rows)
        else:
            csv.writer(file, delimiter="\t" if ending == "tsv" else ",").writerows([("image", "caption"), *rows])
    pack(coco, tmp_path / "mine", images=str(coco / "train2014"), captions=str(path), split="train", size=32)
    samples = {
        folder: sorted(
            (json.loads(sample["json"])["captions"], sample["jpg"])
            for sample in webdataset.WebDataset(str(tmp_path / folder / "train-000000.tar"), shardshuffle=False)
        )
        for folder in ("coco", "mine")
    }
    assert len(samples["mine"]) == 6
    assert samples["mine"] == samples["coco"]


def test_the_output_can_be_a_url(coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("captioner.files.ownership.BEAT_SECONDS", 0.2)
    pack(coco, "memory://packing/shards", size=64)
    pack(coco, tmp_path / "shards", size=64)
    filesystem = fsspec.filesystem("memory")
    remote = {
        Path(name).name: sha256(filesystem.cat_file(name)).hexdigest()
        for name in filesystem.ls("/packing/shards", detail=False)
    }
    assert remote == files(tmp_path / "shards")
    pack(coco, "memory://packing/shards", size=64)
    with pytest.raises(UserError, match="quality was 100, is 80"):
        pack(coco, "memory://packing/shards", size=64, quality=80)
    filesystem.rm("/packing", recursive=True)
