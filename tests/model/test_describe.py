"""Descriptions from Python: of paths, bytes and images alike, in any company, and what a person should look at."""

import io
import os
import pickle
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import picture
from tiny_model import DECODING, VIEW, advance, caption_views, make_model, make_views, write_model

from captioner import load_captioner
from captioner.calibration import Calibration, ConfidenceCurve, fit_space
from captioner.describe import Captioner, Description
from captioner.errors import NoAttentionError, NotCalibratedError, UserError
from captioner.images.loading import ImageError
from captioner.images.views import normalise
from captioner.model.bundle import load_bundle

NUM_VIEWS = 130


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("plain") / "model")


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder whose confidence is 0 at a mean log-probability of -2 and 1 at 0."""
    with torch.inference_mode():
        features_BF = make_model().encoder(normalise(torch.from_numpy(make_views(NUM_VIEWS)), VIEW))
    calibration = Calibration(
        decoding=asdict(DECODING),
        curve=ConfidenceCurve(scores=(-2.0, 0.0), chances=(0.0, 1.0)),
        space=fit_space(features_BF),
    )
    return write_model(tmp_path_factory.mktemp("calibrated") / "model", calibration=calibration)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def check_alike(found: list[Description], wanted: list[Description], *, tolerance: float = 1e-4) -> None:
    assert [one.captions for one in found] == [other.captions for other in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert one.token_scores == pytest.approx(other.token_scores, abs=tolerance)
        assert one.score == pytest.approx(sum(one.token_scores) / len(one.token_scores), abs=1e-6)


def test_paths_bytes_and_images_are_described_alike(model: Path, tmp_path: Path) -> None:
    captioner = load_captioner(model)
    images = [picture(number) for number in range(4)]
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
    paths = [tmp_path / f"{number}.png" for number in range(4)]
    wanted = captioner(paths)
    assert len({found.caption for found in wanted}) > 1
    check_alike(captioner(map(str, paths)), wanted)
    check_alike(captioner([path.read_bytes() for path in paths]), wanted)
    check_alike(captioner(images), wanted)
    check_alike(captioner([paths[0], images[1], png(images[2]), str(paths[3])]), wanted)
    assert captioner([]) == []


def test_images_of_any_mode_are_described(model: Path) -> None:
    captioner = load_captioner(model)
    for mode in (
        "RGB",
        "L",
        "LA",
        "La",
        "P",
        "PA",
        "RGBA",
        "RGBa",
        "RGBX",
        "CMYK",
        "YCbCr",
        "HSV",
        "1",
        "I;16",
        "I",
        "F",
    ):
        (found,) = captioner([picture(3).convert("L").convert(mode) if mode in "I;16F" else picture(3).convert(mode)])
        assert found.caption


def test_an_image_that_lies_on_its_side_is_turned(model: Path) -> None:
    captioner = load_captioner(model)
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    lying = picture(5).transpose(Image.Transpose.ROTATE_90)
    lying.save(buffer, "PNG", exif=exif)
    upright, turned, as_stored = captioner([picture(5), Image.open(buffer), lying])
    assert turned.caption == upright.caption != as_stored.caption


def test_pictures_that_cannot_be_used_are_errors(model: Path, tmp_path: Path) -> None:
    captioner = load_captioner(model)
    with pytest.raises(ImageError, match="missing"):
        captioner([tmp_path / "nowhere.png"])
    with pytest.raises(ImageError, match="undecodable"):
        captioner([b"no picture"])


def test_arrays_are_described_as_images_are(model: Path) -> None:
    captioner = load_captioner(model)
    arrays = [np.asarray(picture(number)) for number in range(3)]
    wanted = captioner([picture(number) for number in range(3)])
    check_alike(captioner(arrays), wanted)
    check_alike(captioner([np.asfortranarray(array) for array in arrays]), wanted)
    check_alike(captioner([array[::-1, ::-1][::-1, ::-1] for array in arrays]), wanted)
    check_alike(captioner(np.stack(arrays)), wanted)


NO_PICTURES: dict[str, object] = {
    "nothing": None,
    "a number": 7,
    "a float": 0.5,
    "a list": [[0]],
    "a tuple": (3, 4, 3),
    "a dictionary": {"path": "a.jpg"},
    "a set": {"a.jpg"},
    "an open file": io.BytesIO(b""),
    "a bytearray": bytearray(b"a"),
    "a scalar": np.uint8(3),
    "a tensor": torch.zeros((8, 8, 3), dtype=torch.uint8),
    "a float array": np.zeros((8, 8, 3), np.float32),
    "an int64 array": np.zeros((8, 8, 3), np.int64),
    "an array of booleans": np.zeros((8, 8, 3), bool),
    "an array of objects": np.array([None]),
    "an array of names": np.array(["a.jpg"]),
    "a grey array": np.zeros((8, 8), np.uint8),
    "channels first": np.zeros((3, 8, 8), np.uint8),
    "four channels": np.zeros((8, 8, 4), np.uint8),
    "one channel": np.zeros((8, 8, 1), np.uint8),
    "a batch": np.zeros((2, 8, 8, 3), np.uint8),
    "an array without dimensions": np.array(3, np.uint8),
    "no rows": np.zeros((0, 8, 3), np.uint8),
    "no columns": np.zeros((8, 0, 3), np.uint8),
    "an empty array": np.zeros(0, np.uint8),
    "an empty image": Image.new("RGB", (0, 9)),
    "no bytes": b"",
    "an empty name": "",
    "a name with a null byte": "a\0.jpg",
    "a name that is too long": "a" * 5000,
    "a name below a file": f"{__file__}/a.jpg",
}


@pytest.mark.parametrize("name", NO_PICTURES)
def test_what_is_no_picture_is_refused(model: Path, name: str) -> None:
    captioner = load_captioner(model)
    wrong: list = [picture(1), NO_PICTURES[name]]
    with pytest.raises((ImageError, TypeError)) as caught:
        captioner(wrong)
    assert str(caught.value)


def test_files_that_are_no_regular_ones_are_refused_and_none_is_waited_for(model: Path, tmp_path: Path) -> None:
    captioner = load_captioner(model)
    os.mkfifo(tmp_path / "pipe.jpg")
    for path in (tmp_path, tmp_path / "pipe.jpg", Path("/dev/null")):
        for name in (path, str(path)):
            with pytest.raises(ImageError, match="special file"):
                captioner([name])


def test_a_picture_that_stands_alone_is_no_list_of_pictures(model: Path) -> None:
    captioner = load_captioner(model)
    for alone in ("a.jpg", b"a", Path("a.jpg"), picture(1)):
        with pytest.raises(TypeError, match="give a list"):
            captioner(alone)  # type: ignore[bad-argument-type]
    with pytest.raises(TypeError, match=r"uint8 of shape \(48, 3\)"):
        captioner(np.asarray(picture(1)))


def test_an_image_with_damaged_exif_is_described(model: Path) -> None:
    image = picture(3)
    image.info["exif"] = b"Exif\0\0II*\0\xf0\xff\xff\x7f"
    captioner = load_captioner(model)
    check_alike(captioner([image]), captioner([picture(3)]))


def test_a_closed_image_is_an_error(model: Path, tmp_path: Path) -> None:
    picture(3).save(tmp_path / "a.png")
    image = Image.open(tmp_path / "a.png")
    image.close()
    with pytest.raises(ImageError):
        load_captioner(model)([image])


@pytest.mark.parametrize("options", [{"beam_size": 1}, {}, {"captions_per_image": 3}, {"length_penalty": 0.5}])
@settings(deadline=None, max_examples=6)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4))
def test_company_changes_nothing(model: Path, options: dict, sizes: list[int]) -> None:
    captioner = load_captioner(model, **options)
    views_BPP3 = make_views(sum(sizes))
    parts = np.split(views_BPP3, np.cumsum(sizes)[:-1])
    check_alike([one for part in parts for one in captioner.describe_views(part)], captioner.describe_views(views_BPP3))


def test_bfloat16_says_nearly_always_the_same_in_any_company(model: Path) -> None:
    captioner = load_captioner(model, precision="bfloat16")
    views_BPP3 = make_views(200)
    together = captioner.describe_views(views_BPP3)
    alone = [one for view in views_BPP3 for one in captioner.describe_views(view[None])]
    same = [(one, other) for one, other in zip(together, alone, strict=True) if one.caption == other.caption]
    assert len(same) >= 198
    assert all(abs(one.score - other.score) < 0.02 for one, other in same)


def test_several_captions_differ_and_the_best_is_the_one_alone(model: Path) -> None:
    views_BPP3 = make_views(6)
    alone = load_captioner(model).describe_views(views_BPP3)
    several = load_captioner(model, captions_per_image=4).describe_views(views_BPP3)
    assert [found.caption for found in several] == [found.caption for found in alone]
    for found in several:
        assert found.captions[0] == found.caption
        assert len(set(found.captions)) == 4


def test_alt_text_is_a_sentence(model: Path) -> None:
    for found in load_captioner(model).describe_views(make_views(8)):
        assert found.alt[0].isupper()
        assert found.alt.endswith(".")
        assert (found.confidence, found.review) == (None, None)


def test_confidence_follows_the_score_and_low_ones_abstain(calibrated: Path) -> None:
    views_BPP3 = make_views(NUM_VIEWS)
    limit = float(np.median([1 + one.score / 2 for one in load_captioner(calibrated).describe_views(views_BPP3)]))
    assert 0.05 < limit < 0.95
    found = load_captioner(calibrated, abstain_below=limit).describe_views(views_BPP3)
    for one in found:
        assert one.confidence is not None
        assert one.confidence == pytest.approx(max(0.0, 1 + one.score / 2))
        unsure = one.confidence < limit
        assert (one.alt == "") == unsure
        assert ("low confidence" in (one.review or "")) == unsure
        assert one.caption
    assert {one.alt == "" for one in found} == {True, False}


def test_pictures_unlike_the_training_data_are_flagged(calibrated: Path) -> None:
    captioner = load_captioner(calibrated)
    assert sum(one.review is not None for one in captioner.describe_views(make_views(NUM_VIEWS))) < 0.1 * NUM_VIEWS
    checks = (np.indices((4, 32, 32)).sum(axis=0) % 2 * 255).astype(np.uint8)
    found = captioner.describe_views(np.repeat(checks[..., None], 3, axis=3))
    assert {one.review for one in found} == {"unlike training data"}


def test_confidence_is_given_only_for_the_decoding_that_it_was_measured_with(calibrated: Path) -> None:
    (found,) = load_captioner(calibrated, beam_size=1).describe_views(make_views(1))
    assert found.confidence is None
    with pytest.raises(NotCalibratedError, match="beam_size=1") as caught:
        load_captioner(calibrated, beam_size=1, abstain_below=0.5)
    assert pickle.loads(pickle.dumps(caught.value)).decoding == caught.value.decoding


@pytest.mark.parametrize("beam_size", [1, 3])
@pytest.mark.parametrize("num_captions", [1, 2])
def test_attention_is_that_of_the_caption_s_own_steps(tmp_path: Path, beam_size: int, num_captions: int) -> None:
    """That of `decode`, and of a model that is led through the same words."""
    folder, views = write_model(tmp_path / "model", "attention"), make_views(6)
    options = {"beam_size": beam_size, "captions_per_image": num_captions}
    captioner = load_captioner(folder, with_attention=True, **options)
    found = captioner.describe_views(views)
    bundle = load_bundle(folder)
    decoded = caption_views(bundle, views, beam_size=beam_size)
    stepped = advance(bundle, views, [caption.tokens for caption in decoded])
    for one, weights_TR in zip(found, stepped, strict=True):
        assert one.attention is not None
        assert "".join(one.attention.words) == one.caption
        assert one.attention.weights_TR == pytest.approx(weights_TR, abs=1e-5)
        assert one.attention.weights_TR.sum(axis=1) == pytest.approx(1, abs=1e-5)
        assert weights_TR.shape[1] == np.prod(one.attention.grid)
    assert max(weights_TR.std(axis=0).max() for weights_TR in stepped) > 0.01  # words look at different positions
    plain = load_captioner(folder, **options).describe_views(views)
    assert [replace(one, attention=None) for one in found] == plain


def test_a_model_without_attention_is_refused(model: Path) -> None:
    with pytest.raises(NoAttentionError):
        load_captioner(model, with_attention=True)


def test_impossible_wishes_are_refused(model: Path) -> None:
    bundle = load_bundle(model)
    wishes: list[dict] = [{"beam_size": 0}, {"captions_per_image": 0}, {"abstain_below": 0.5}, {"abstain_below": 30}]
    wishes += [{"length_penalty": penalty} for penalty in (float("nan"), float("inf"), 300.0)]
    for wish in wishes:
        with pytest.raises(UserError):
            Captioner(bundle, **wish)
