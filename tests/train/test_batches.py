"""Batches of captioned images: the same views and micro-batches on any ranks and workers; damage is never silent."""

import io
import json
import random
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from captioner.errors import UserError
from captioner.files import storage
from captioner.images import loading, views
from captioner.samples import CaptionTokens, build_index
from captioner.shards.format import Manifest, ShardIndex, sample_key, shard_name
from captioner.streaming import Ledger, StreamingLoader
from captioner.streaming.dataset import Split
from captioner.streaming.order import ShardOrder
from captioner.vocabulary import END, START, Vocabulary, tokenize
from sharding.packing.pack import pack_shard
from sharding.packing.planning import Recipe, ShardPlan
from sharding.packing.sources import Record
from train.data.batches import CaptionBatch, CaptionPipeline, caption_loader

COCO = Path(__file__).parents[3] / "shared/data/coco/images"
SHARD_SIZES = (5, 1, 7, 4, 6)
NUM_SAMPLES = sum(SHARD_SIZES)
GLOBAL_BATCH = 6  # 23 samples: three whole batches and one of 5
SIZE, CROP = 40, 32
SEED = 3
PLAIN = ("a dog runs", "one brown animal on the bright grass outside")
SIDED = ("a dog", "a cat sits at the left")


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A packed split, with what should be found in it."""

    folder: Path
    manifest: Manifest
    keys: tuple[tuple[str, ...], ...]
    vocabulary: Vocabulary

    @property
    def split(self) -> Split:
        return Split("train", (str(self.folder),), (self.manifest,))

    def planned_keys(self, *, epoch: int = 0, positions: Sequence[int] = range(NUM_SAMPLES)) -> list[str]:
        """The keys in the order of an epoch, looked up without any shard being read."""
        sizes = [shard.samples for shard in self.manifest.shards]
        order = ShardOrder(sizes, seed=SEED, batch_size=GLOBAL_BATCH)
        return [self.keys[ref.shard][ref.index_in_shard] for ref in order.refs(epoch, positions)]

    def loader(self, *, epoch: int = 0, workers: int = 0, tolerate: int = 0, **changed: Any) -> StreamingLoader:
        options: dict[str, Any] = {"batch_size": GLOBAL_BATCH, "crop": CROP, "max_tokens": 6, "training": True}
        options |= {"seed": SEED, "vocabulary": self.vocabulary, "num_workers": workers}
        loader = caption_loader(self.split, **(options | {"tolerate_bad_samples": tolerate} | changed))
        loader.set_epoch(epoch)
        return loader

    def read(self, **options: Any) -> list[CaptionBatch]:
        """An epoch's batches, of one micro-batch each."""
        return [batch for (batch,) in self.loader(**options)]


def brightening(seed: int) -> Image.Image:
    """A picture that is darker on its left, so that mirroring shows; the height of its grey differs by seed."""
    ramp = np.linspace(10, 180, SIZE)[None, :, None] + 3 * (seed % 20)
    return Image.fromarray(np.broadcast_to(ramp, (SIZE, SIZE, 3)).astype(np.uint8))


def captions_of(number: int) -> tuple[str, ...]:
    """From one to three captions; those of every fourth sample speak of sides."""
    return SIDED if number % 4 == 0 else (f"picture {number}", *PLAIN)[: 1 + number % 3]


def pack(
    folder: Path, pictures: list[Image.Image | Path], *, sizes: tuple[int, ...], stored_size: int = SIZE
) -> Dataset:
    """Pack pictures (files are taken as they are) into shards of the given sizes."""
    folder.mkdir()
    records = []
    for number, picture in enumerate(pictures):
        path = folder / (f"{number}{picture.suffix}" if isinstance(picture, Path) else f"{number}.png")
        if isinstance(picture, Image.Image):
            picture.save(path)
        else:
            shutil.copy(picture, path)
        texts = captions_of(number)
        records.append(
            Record(
                image_id=number,
                file_name=path.name,
                captions=texts,
                annotation_ids=(None,) * len(texts),
            )
        )
    keys = iter([sample_key("train", position) for position in range(len(records))])
    waiting: Iterator[Record] = iter(records)
    plans = [
        ShardPlan(
            name=shard_name("train", shard),
            keys=tuple(next(keys) for _ in range(size)),
            records=tuple(next(waiting) for _ in range(size)),
            images=str(folder),
            file_bytes=(storage.UNKNOWN,) * size,
            recipe=Recipe(size=stored_size, resize="squash", quality=95, shard_megabytes=64),
            estimated_bytes=0,
        )
        for shard, size in enumerate(sizes)
    ]
    packed = [pack_shard(plan, str(folder / "shards")) for plan in plans]
    manifest = Manifest(
        split="train",
        shards=tuple(p.entry for p in packed),
        settings={"size": stored_size, "resize": "squash"},
        source={},
        failures={},
        fingerprint="",
    )
    words = {word: 1 for record in records for caption in record.captions for word in tokenize(caption)}
    del words["animal"]  # one unknown word
    return Dataset(
        folder=folder / "shards",
        manifest=manifest,
        keys=tuple(plan.keys for plan in plans),
        vocabulary=Vocabulary.from_counts(words, threshold=1),
    )


@pytest.fixture(scope="module")
def shared_dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A dataset that no test may change."""
    pictures: list[Image.Image | Path] = [brightening(number) for number in range(sum(SHARD_SIZES))]
    return pack(tmp_path_factory.mktemp("stream") / "data", pictures, sizes=SHARD_SIZES)


@pytest.fixture
def dataset(shared_dataset: Dataset, tmp_path: Path) -> Dataset:
    """A copy, to be damaged."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for path in shared_dataset.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return replace(shared_dataset, folder=folder)


def keys_of(batches: list[CaptionBatch]) -> list[str]:
    return [key for batch in batches for key in batch.keys]


# ---- micro-batches -------------------------------------------------------------------------------------------


def test_a_rank_that_the_last_batch_does_not_reach_gets_a_filler(shared_dataset: Dataset) -> None:
    full, filler = shared_dataset.read(rank=0, world_size=6)[2:]
    assert (full.num_samples, filler.num_samples) == (1, 0)
    assert filler.keys == filler.image_ids == filler.references == []
    assert filler.inputs.shape == full.inputs.shape == (1, CROP, CROP, 3)
    assert not filler.inputs.any()
    assert filler.captions.inputs_M.tolist() == [START]
    assert filler.captions.targets_M.tolist() == [END]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("world_size", "num_micro_batches"), [(1, 1), (1, 2), (1, 6), (2, 3), (3, 2), (6, 1)])
def test_micro_batches_are_the_same_images_for_any_number_of_ranks(
    shared_dataset: Dataset, world_size: int, num_micro_batches: int, workers: int
) -> None:
    """Number m has the samples whose offset in the global batch is m modulo their number; none is empty."""
    options = {"world_size": world_size, "accumulation_steps": num_micro_batches, "workers": workers}
    ranks = [list(shared_dataset.loader(rank=rank, **options)) for rank in range(world_size)]
    wanted, whole = shared_dataset.planned_keys(), rows_by_key(shared_dataset.read())
    for step in range(4):
        batch = wanted[step * GLOBAL_BATCH : (step + 1) * GLOBAL_BATCH]
        assert {len(rank[step]) for rank in ranks} == {num_micro_batches}
        stride = min(num_micro_batches, len(batch))
        for number in range(num_micro_batches):
            batches = [rank[step][number] for rank in ranks]
            assert [key for found in batches for key in found.keys] == (
                batch[number::stride] if number < stride else []
            )
            assert all(len(found.inputs) <= GLOBAL_BATCH // world_size // num_micro_batches for found in batches)
            assert all(whole[key] == row for found in batches for key, row in rows_by_key([found]).items())


def rows_by_key(batches: list[CaptionBatch]) -> dict[str, bytes]:
    return {k: v.numpy().tobytes() for b in batches for k, v in zip(b.keys, b.inputs, strict=False)}


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_a_batch_that_was_broken_off_leaves_nothing_behind(shared_dataset: Dataset, accumulation_steps: int) -> None:
    """An error, or the end of an iteration, may come in the middle of one; the same samples may come next."""
    batches = CaptionPipeline(
        split=shared_dataset.split, vocabulary=shared_dataset.vocabulary, crop=CROP, max_tokens=6,
        batch_size=GLOBAL_BATCH, accumulation_steps=accumulation_steps,
    )  # fmt: skip
    fields = batches.stages(references=True)["fields"]
    raw = StreamingLoader(shared_dataset.split, batch_size=GLOBAL_BATCH, collate=list, shuffle=False, fields=fields)
    samples: list[dict[str, Any]] = next(iter(raw))
    wanted = batches.collate([batches.transform(batches.parse(sample)) for sample in samples])
    for num_before in (1, GLOBAL_BATCH - 1, GLOBAL_BATCH):
        for sample in samples[:num_before]:
            batches.transform(batches.parse(sample))
        found = batches.collate([batches.transform(batches.parse(sample)) for sample in samples])
        for one, other in zip(found, wanted, strict=True):
            assert one.keys == other.keys
            assert torch.equal(one.inputs, other.inputs)


# ---- content ------------------------------------------------------------------------------------------------


def test_a_batch_holds_its_pictures_captions(shared_dataset: Dataset) -> None:
    vocabulary = shared_dataset.vocabulary
    num_cut = 0
    for batch in shared_dataset.read():
        numbers = [int(key.split("-")[1]) for key in batch.keys]
        assert batch.image_ids == numbers
        assert batch.references == [list(captions_of(number)) for number in numbers]
        wanted, found = [], []
        for image, number in enumerate(numbers):
            for caption in captions_of(number):
                ids = vocabulary.encode(tokenize(caption))
                wanted.append((image, ids[:6] if len(ids) > 6 else [*ids, END]))
                num_cut += len(ids) > 6
        for row, image in enumerate(batch.captions.image_of_caption_N.tolist()):
            starts = [0, *batch.captions.batch_sizes_T.cumsum(0).tolist()]
            sizes = batch.captions.batch_sizes_T.tolist()
            places = [start + row for start, size in zip(starts, sizes, strict=False) if row < size]
            found.append((image, batch.captions.targets_M[places].tolist()))
        assert sorted(found) == sorted(wanted)
        num_cut -= batch.num_cut
    assert num_cut == 0


def ramps(batches: list[CaptionBatch]) -> dict[str, float]:
    """By key: how much brighter a view is on its right than on its left."""
    return {
        key: float(view[:, -1].float().mean() - view[:, 0].float().mean())
        for batch in batches
        for key, view in zip(batch.keys, batch.inputs, strict=True)
    }


def test_pictures_whose_captions_speak_of_sides_are_never_mirrored(shared_dataset: Dataset) -> None:
    sided = {key for keys in shared_dataset.keys for key in keys if int(key.split("-")[1]) % 4 == 0}
    mirrored, num_plain = 0, 0
    for epoch in range(8):
        for key, ramp in ramps(shared_dataset.read(epoch=epoch)).items():
            assert abs(ramp) > 50
            assert ramp > 0 or key not in sided
            mirrored += ramp < 0
            num_plain += key not in sided
    assert 0.3 < mirrored / num_plain < 0.7


@pytest.mark.parametrize(
    ("caption", "sided"),
    [
        ("A dog on the left", True),
        ("He turns right. Then he stops", True),
        ("The left-hand lane", True),
        ("A sign in the upper-right corner", True),
        ("The LEFTMOST of three", True),
        ("A bright cleft in the rock", False),
        ("Two dogs upright", False),
    ],
)
def test_words_of_sides(caption: str, sided: bool) -> None:
    captions = [["a dog"], ["a dog", caption, "a cat"], ["two dogs"]]
    index = build_index(["a", "b", "c"], [{}, {}, {}], [[tokenize(text) for text in texts] for texts in captions], {})
    found = CaptionTokens(index.optional, Vocabulary.from_counts({"dog": 9}, threshold=1))
    assert [found.mentions_sides(number) for number in range(3)] == [False, sided, False]


@given(
    samples=st.lists(st.lists(st.lists(st.sampled_from(["a", "dog", "left", "ü"]), max_size=4), max_size=3), max_size=5)
)
def test_the_index_holds_the_ids_of_all_captions(samples: list[list[list[str]]]) -> None:
    vocabulary = Vocabulary.from_counts({"dog": 9, "ü": 3}, threshold=1)
    index = build_index([str(n) for n in range(len(samples))], [{} for _ in samples], samples, {})
    found = CaptionTokens(index.optional, vocabulary)
    for number, captions in enumerate(samples):
        tokens, lengths = found.of(number)
        assert lengths == list(map(len, captions))
        assert tokens.tolist() == [token for caption in captions for token in vocabulary.encode(caption)]


@pytest.mark.parametrize("crop", [30, 32])
def test_reversed_rows_of_bgr_are_the_mirror_image_in_rgb(crop: int) -> None:
    pixels_HW3 = np.random.default_rng(crop).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    found = np.zeros((2, crop, crop, 3), dtype=np.uint8)
    views.copy_reversed(pixels_HW3[3 : 3 + crop, 7 : 7 + crop], found[1])
    assert (found[1] == pixels_HW3[3 : 3 + crop, 7 : 7 + crop, ::-1][:, ::-1]).all()
    assert not found[0].any()


@pytest.mark.parametrize(
    ("workers", "start_method"), [(1, "fork"), (2, "fork"), pytest.param(1, "spawn", marks=pytest.mark.slow)]
)
def test_crops_do_not_depend_on_workers_or_ranks(shared_dataset: Dataset, workers: int, start_method: str) -> None:
    wanted = rows_by_key(shared_dataset.read())
    assert rows_by_key(shared_dataset.read(workers=workers, start_method=start_method)) == wanted
    split = [shared_dataset.read(rank=rank, world_size=3) for rank in range(3)]
    assert rows_by_key([batch for batches in split for batch in batches]) == wanted
    next_epoch = rows_by_key(shared_dataset.read(epoch=1))
    assert sum(next_epoch[key] != wanted[key] for key in wanted) > len(wanted) / 2


def test_evaluation_takes_the_middle_in_the_manifests_order(shared_dataset: Dataset) -> None:
    batches = shared_dataset.read(training=False)
    assert keys_of(batches) == [key for keys in shared_dataset.keys for key in keys]
    for number, view in enumerate(torch.cat([batch.inputs for batch in batches]).float()):
        wanted = np.asarray(brightening(number)).astype(float)[4:36, 4:36]
        assert abs(view.numpy() - wanted).mean() < 2


def test_images_of_the_crops_size_are_decoded_into_the_batch(
    shared_dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, shared = loading.decode_stored, []

    def spy(data: bytes, *, buffer: np.ndarray, **channels: Any) -> np.ndarray:
        pixels_HW3 = decode(data, buffer=buffer, **channels)
        shared.append(buffer.shape == pixels_HW3.shape and np.shares_memory(pixels_HW3, buffer))
        return pixels_HW3

    monkeypatch.setattr(loading, "decode_stored", spy)
    stored = shared_dataset.read(crop=SIZE, training=False)
    wanted = dict(zip(keys_of(stored), torch.cat([batch.inputs for batch in stored]), strict=True))
    for number, view in enumerate(wanted.values()):
        assert abs(view.float().numpy() - np.asarray(brightening(number))).mean() < 2
    num_mirrored = 0
    for batch in shared_dataset.read(crop=SIZE):
        for key, view in zip(batch.keys, batch.inputs, strict=True):
            is_mirrored = not torch.equal(view, wanted[key])
            assert not is_mirrored or torch.equal(view, wanted[key].flip(1))
            num_mirrored += is_mirrored
    assert 0 < num_mirrored < NUM_SAMPLES
    assert shared.count(True) == 2 * NUM_SAMPLES - num_mirrored


def test_a_crop_beyond_the_stored_pictures_is_refused(shared_dataset: Dataset) -> None:
    with pytest.raises(UserError, match="40x40: give a smaller --crop"):
        shared_dataset.read(crop=41)


def differences(folder: Path, photos: list[Path]) -> list[float]:
    """For each photo the mean difference, in 255ths, of its view through shards and through inference."""
    spec = views.ViewSpec()
    dataset = pack(folder, list(photos), sizes=(len(photos) - 1, 1), stored_size=spec.size)
    batches = dataset.read(crop=spec.crop, training=False)
    found = torch.cat([batch.inputs for batch in batches]).numpy().astype(int)
    wanted = [views.read_eval_view(photo.read_bytes(), spec)[0].astype(int) for photo in photos]
    for view, other in zip(found, wanted[1:], strict=False):
        assert abs(view - other).mean() > 10  # other photos are far away
    return [float(abs(view - reference).mean()) for view, reference in zip(found, wanted, strict=True)]


def test_a_picture_looks_the_same_through_shards_as_through_inference(tmp_path: Path) -> None:
    """Patches of which a shift by one pixel would make a difference above 3, in several sizes and formats."""
    paths = []
    for seed, (width, height) in enumerate([(640, 480), (480, 640), (256, 256), (1500, 1100), (300, 200)]):
        patches = np.random.default_rng(seed).integers(0, 256, size=(12, 16, 3), dtype=np.uint8)
        paths.append(tmp_path / f"{seed}.{'png' if seed % 2 else 'jpg'}")
        Image.fromarray(patches).resize((width, height), Image.Resampling.BICUBIC).save(paths[-1])
    assert max(differences(tmp_path / "packed", paths)) <= 2


def test_photos_look_the_same_through_shards_as_through_inference(tmp_path: Path) -> None:
    if not COCO.is_dir():
        pytest.skip(f"there is no {COCO}")
    assert np.mean(differences(tmp_path / "packed", sorted(COCO.iterdir())[:30])) <= 3  # 2.5 at quality 95


# ---- damage -------------------------------------------------------------------------------------------------

BROKEN = "train-000002"


def flip_bit(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def flip_in_member(folder: Path, field: str) -> None:
    origin = folder / f"{BROKEN}.index"
    index = ShardIndex.from_bytes(origin.read_bytes(), origin=str(origin))
    member = index.members(3)[field]
    flip_bit(folder / f"{BROKEN}.tar", member.offset + member.size // 2)


def cut(path: Path, num_bytes: int) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:num_bytes])


def shorten_index(path: Path) -> None:
    """An index that is right as far as it goes."""
    index = ShardIndex.from_bytes(path.read_bytes(), origin=str(path))
    last = len(index) - 1
    samples = [(index.key(place), index.members(place)) for place in range(last)]
    path.write_bytes(ShardIndex.of(samples, index.facts).to_bytes())


def swap(folder: Path, first: str, second: str, *, endings: tuple[str, ...] = ("tar", "index")) -> None:
    for ending in endings:
        one, other = folder / f"{first}.{ending}", folder / f"{second}.{ending}"
        contents = one.read_bytes(), other.read_bytes()
        other.write_bytes(contents[0])
        one.write_bytes(contents[1])


def drop_member(path: Path) -> None:
    """Write a tar anew without its fourth file, as a tool for tars would."""
    with tarfile.open(path) as tar:
        members = [(member, tar.extractfile(member)) for member in tar.getmembers()]
        contents = [(member, file.read() if file else b"") for member, file in members]
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for member, content in contents[:3] + contents[4:]:
            tar.addfile(member, io.BytesIO(content))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "bit in a picture": lambda folder: flip_in_member(folder, "jpg"),
    "bit in a text": lambda folder: flip_in_member(folder, "json"),
    "shard cut": lambda folder: cut(folder / f"{BROKEN}.tar", 5_000),
    "shard cut by its end": lambda folder: cut(folder / f"{BROKEN}.tar", -512),
    "shard emptied": lambda folder: cut(folder / f"{BROKEN}.tar", 0),
    "shard missing": lambda folder: (folder / f"{BROKEN}.tar").unlink(),
    "index missing": lambda folder: (folder / f"{BROKEN}.index").unlink(),
    "index cut": lambda folder: cut(folder / f"{BROKEN}.index", 100),
    "index emptied": lambda folder: cut(folder / f"{BROKEN}.index", 0),
    "index of fewer samples": lambda folder: shorten_index(folder / f"{BROKEN}.index"),
    "shards swapped": lambda folder: swap(folder, "train-000000", BROKEN),
    "indexes swapped": lambda folder: swap(folder, "train-000000", BROKEN, endings=("index",)),
    "tars swapped": lambda folder: swap(folder, "train-000000", BROKEN, endings=("tar",)),
    "shard longer": lambda folder: (folder / f"{BROKEN}.tar").open("ab").write(bytes(512)),
    "a member missing": lambda folder: drop_member(folder / f"{BROKEN}.tar"),
    "another shard of this size": lambda folder: (folder / f"{BROKEN}.tar").write_bytes(
        bytes((folder / f"{BROKEN}.tar").stat().st_size)
    ),
}


@pytest.mark.parametrize(
    ("damage", "workers"),
    [(damage, 0) for damage in DAMAGES]
    + [(damage, 2) for damage in ("bit in a picture", "shard cut", "shard missing", "index missing")],
)
def test_damage_is_told_in_one_line_that_names_the_shard(dataset: Dataset, damage: str, workers: int) -> None:
    assert len(dataset.read()) == 4  # it was whole
    DAMAGES[damage](dataset.folder)
    with pytest.raises(UserError) as error:
        dataset.read(workers=workers)
    message = str(error.value)
    assert "\n" not in message
    assert str(dataset.folder / BROKEN) in message or str(dataset.folder / "train-000000") in message
    assert "make_shards" in message


@pytest.mark.parametrize("damage", DAMAGES)
def test_tolerated_damage_costs_only_its_samples_and_is_counted(dataset: Dataset, damage: str) -> None:
    """Ranks stay in step, whole samples come as ever, and nothing comes that was not planned."""
    wanted = dataset.read()
    DAMAGES[damage](dataset.folder)
    ranks = [dataset.loader(rank=r, world_size=2, tolerate=23, workers=r) for r in (0, 1)]
    batches = [[batch for (batch,) in rank] for rank in ranks]
    assert [len(each) for each in batches] == [4, 4]
    whole = {k: v.numpy().tobytes() for b in wanted for k, v in zip(b.keys, b.inputs, strict=True)}
    both = batches[0] + batches[1]
    found = {k: v.numpy().tobytes() for b in both for k, v in zip(b.keys, b.inputs, strict=False)}
    assert found.items() <= whole.items()
    total = Ledger.of_all([rank.ledger for rank in ranks], planned=23)
    lost = {skip.position for skip in total.skipped}
    assert set(dataset.planned_keys(positions=sorted(lost))) == whole.keys() - found.keys()
    assert (total.planned, total.decoded) == (23, 23 - len(lost))
    few = {"bit in a picture": 1, "bit in a text": 1, "a member missing": 6}
    assert len(lost) == few.get(damage, 12 if "swapped" in damage else 7)
    assert f"skipped {len(lost)} (" in str(total)
    assert all("\n" not in skip.message and str(dataset.folder) in skip.message for skip in total.skipped)


def test_one_damaged_sample_more_than_tolerated_is_an_error(dataset: Dataset) -> None:
    cut(dataset.folder / f"{BROKEN}.tar", 5_000)
    assert len(dataset.read(tolerate=7)) == 4
    with pytest.raises(UserError, match=r"7 samples cannot be used, and 6 are tolerated; .*tar"):
        dataset.read(tolerate=6)


def test_a_tar_cut_anywhere_is_noticed(dataset: Dataset) -> None:
    path = dataset.folder / f"{BROKEN}.tar"
    data = path.read_bytes()
    for place in random.Random(3).sample(range(len(data)), 50):
        path.write_bytes(data[:place])
        with pytest.raises(UserError, match=f"{BROKEN}.tar has {place:,} bytes, its manifest says {len(data):,}"):
            dataset.read()


def test_a_shard_that_is_cut_while_it_is_read_is_noticed(dataset: Dataset) -> None:
    batches = iter(dataset.loader())
    next(batches)
    for path in dataset.folder.glob("*.tar"):
        cut(path, 1_000)
    with pytest.raises(UserError, match=r"damaged at sample|has 1,000 bytes"):
        list(batches)


def test_bits_flipped_anywhere_are_told_or_do_no_harm(dataset: Dataset) -> None:
    """Between the members lie headers and padding that nobody reads."""
    path = dataset.folder / f"{BROKEN}.tar"
    data, wanted = path.read_bytes(), [b.inputs for b in dataset.read()]
    told = 0
    for place in random.Random(4).sample(range(len(data)), 40):
        flip_bit(path, place)
        try:
            assert all(map(torch.equal, [b.inputs for b in dataset.read()], wanted))
        except UserError:
            told += 1
        path.write_bytes(data)
    assert told > 10


def test_batches_before_the_damage_are_still_whole(dataset: Dataset) -> None:
    wanted = dataset.read()
    flip_in_member(dataset.folder, "jpg")
    broken_key = dataset.keys[2][3]
    (broken_step,) = (step for step, batch in enumerate(wanted) if broken_key in batch.keys)
    found: list[str] = []
    batches = dataset.loader()
    with pytest.raises(UserError, match=re.escape(broken_key)):
        found.extend(key for (batch,) in batches for key in batch.keys)
    assert found == keys_of(wanted[:broken_step])


def test_a_stored_file_that_is_no_picture_is_named(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checksum is right: it was packed by someone else."""

    def refuse(_: bytes, **__: object) -> None:
        raise loading.ImageError("undecodable", "no known image format")

    monkeypatch.setattr(loading, "decode_stored", refuse)
    with pytest.raises(UserError, match=r"train-00000\d\.tar is not an image") as error:
        dataset.read()
    assert "\n" not in str(error.value)


def test_shards_hold_token_strings_so_another_vocabulary_needs_no_packing(shared_dataset: Dataset) -> None:
    words = json.loads(shared_dataset.vocabulary.to_json())["words"]
    reversed_words = Vocabulary.from_counts({word: i + 1 for i, word in enumerate(words[4:])}, threshold=1)
    first = shared_dataset.read()[0].captions.targets_M
    second = replace(shared_dataset, vocabulary=reversed_words).read()[0].captions.targets_M
    assert [shared_dataset.vocabulary.words[i] for i in first] == [reversed_words.words[i] for i in second]
    assert not torch.equal(first, second)


# ---- devices ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "mps", "cuda", "xpu"])
@pytest.mark.parametrize("pinned", [False, True])
def test_only_pinned_memory_is_left_before_its_copy_is_made(
    shared_dataset: Dataset, monkeypatch: pytest.MonkeyPatch, device: str, pinned: bool
) -> None:
    left = []
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda _tensor: pinned)
    monkeypatch.setattr(
        torch.Tensor, "to", lambda tensor, _device, *, non_blocking: left.append(non_blocking) or tensor
    )
    shared_dataset.read()[0].to(torch.device(device))
    assert left == [pinned and device in ("cuda", "xpu")] * 5
