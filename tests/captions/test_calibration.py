"""Confidence and out-of-distribution images: laws of the fits, files that are whole or refused, real runs."""

import io
import json
import shutil
from dataclasses import asdict, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from safetensors.numpy import save as save_arrays
from tiny import write_shards
from tiny_model import DECODING, FORMS, VIEW, VOCABULARY, Form, make_model, pack, write_model
from trainer import run_training

from captioner.calibration import (
    Calibration,
    FeatureSpace,
    Reliability,
    fit_confidence,
    fit_space,
    from_files,
    isotonic,
    measure_reliability,
    to_files,
)
from captioner.describe import Captioner, Encoded
from captioner.errors import UserError
from captioner.images.views import ViewSpec, normalise, read_eval_view
from captioner.model.bundle import Bundle, DecodingDefaults, load_bundle
from captioner.model.encoders import Encoder, load_encoder_weights
from captioner.streaming.dataset import read_split
from train.data.batches import CaptionBatch, caption_loader
from train.evaluate import main as evaluate
from train.evaluation.calibrate import are_good, sample_features
from train.evaluation.predictions import ValidationCaption
from train.evaluation.settings import EvaluateSettings
from train.evaluation.validation import Evaluator
from train.run.launch import start_accelerator
from train.step.step import CaptionLoss

VALUES = st.lists(st.tuples(st.integers(-8, 8), st.integers(1, 4)), min_size=1, max_size=7)


def arrays_of(pairs: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    values_N, weights_N = np.array(pairs, dtype=float).T
    return values_N, weights_N


# ---- isotonic regression --------------------------------------------------------------------------------------


@given(VALUES)
def test_isotonic_values_rise_and_stay_when_fitted_again(pairs: list[tuple[int, int]]) -> None:
    values_N, weights_N = arrays_of(pairs)
    fitted_N = isotonic(values_N, weights_N)
    assert all(before <= after for before, after in pairwise(fitted_N))
    assert isotonic(fitted_N, weights_N) == pytest.approx(fitted_N, rel=1e-12)


@given(VALUES)
def test_isotonic_values_are_those_of_the_largest_of_smallest_means(pairs: list[tuple[int, int]]) -> None:
    """The closed form: for each index the largest, over all starts, of the smallest mean up to any end."""
    values_N, weights_N = arrays_of(pairs)
    indices = range(len(pairs))
    mean = {
        (start, end): np.average(values_N[start : end + 1], weights=weights_N[start : end + 1])
        for end in indices
        for start in range(end + 1)
    }
    wanted = [
        max(min(mean[start, end] for end in indices if end >= index) for start in range(index + 1)) for index in indices
    ]
    assert isotonic(values_N, weights_N) == pytest.approx(wanted)


# ---- confidence -----------------------------------------------------------------------------------------------


def draw_captions(num_captions: int, *, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores, whether good, and the true chance of that."""
    rng = np.random.default_rng(seed)
    scores_N = rng.uniform(-3, 0, num_captions)
    chances_N = 1 / (1 + np.exp(-3 * (scores_N + 1)))
    return scores_N, rng.random(num_captions) < chances_N, chances_N


def test_confidence_is_the_chance_that_a_caption_is_good() -> None:
    scores_N, good_N, _ = draw_captions(4000, seed=0)
    found = fit_confidence(scores_N.tolist(), good_N.tolist())
    assert found is not None
    curve, reliability = found
    other_scores_N, other_good_N, chances_N = draw_captions(4000, seed=1)
    confidences_N = curve(other_scores_N)
    assert np.abs(confidences_N - chances_N).mean() < 0.03
    fresh = measure_reliability(confidences_N, other_good_N.astype(float))
    for name in ("calibration_error", "brier_score", "auroc"):  # what was told is what comes true
        assert getattr(reliability, name) == pytest.approx(getattr(fresh, name), abs=0.02), name
    assert fresh.calibration_error < 0.03
    assert curve([-3.0, -2.0, -0.5, 0.0, 5.0]).tolist() == sorted(curve([-3.0, -2.0, -0.5, 0.0, 5.0]))


def test_a_confidence_is_never_certain_and_rises_with_the_score() -> None:
    scores = [float(number) for number in range(200)]
    found = fit_confidence(scores, [score >= 100 for score in scores])
    assert found is not None
    confidences = found[0](scores)
    assert 0 < confidences[0] < 0.02
    assert 0.98 < confidences[-1] < 1
    assert all(before <= after for before, after in pairwise(confidences))


def test_scores_that_say_nothing_give_everyone_the_same_confidence() -> None:
    found = fit_confidence([-1.0] * 400, [True, False, False, False] * 100)
    assert found is not None
    assert found[0]([-5.0, -1.0, 0.0]) == pytest.approx([0.25] * 3, abs=0.01)
    assert found[1].auroc == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("good", [[True, False] * 49 + [True], [True] * 500, [False] * 500])
def test_too_few_captions_or_one_outcome_give_no_confidence(good: list[bool]) -> None:
    assert fit_confidence(np.linspace(-2, 0, len(good)).tolist(), good) is None


def test_reliability_is_the_textbooks() -> None:
    confidences_N, good_N = np.repeat([0.25, 0.75], 10), np.repeat([0.0, 1.0, 0.0, 1.0], [8, 2, 4, 6])
    found = measure_reliability(confidences_N, good_N)
    assert found.brier_score == pytest.approx((8 * 0.25**2 + 2 * 0.75**2 + 4 * 0.75**2 + 6 * 0.25**2) / 20)
    assert found.auroc == pytest.approx((6 * 8 + 0.5 * (6 * 4 + 2 * 8)) / (8 * 12))
    assert found.bins[0] == {"confidence": 0.25, "good": 0.0, "num_captions": 2}
    assert found.calibration_error == pytest.approx((8 * 0.25 + 2 * 0.75 + 4 * 0.75 + 6 * 0.25) / 20)
    assert sum(each["num_captions"] for each in found.bins) == found.num_captions == 20


def test_captions_are_good_where_they_are_as_near_as_half_of_what_people_write() -> None:
    """Three of four people say the same, so the bar is high; half of the captions say it too."""
    words = [f"thing{number}" for number in range(6)]
    rows = [
        ValidationCaption(
            position=number,
            image_id=number,
            caption=f"a {words[number]} on a red table" if number < 3 else "two men in a boat",
            score=-1.0,
            references=[*[f"a {words[number]} on a red table"] * 3, "nobody knows what it is"],
        )
        for number in range(6)
    ]
    assert are_good(rows) == [True] * 3 + [False] * 3


# ---- out-of-distribution images ------------------------------------------------------------------------

NUM_FEATURES = 24


def draw_features(num_pictures: int, *, seed: int) -> torch.Tensor:
    """Features of one kind of picture: a few directions matter, and none is below zero."""
    generator = torch.Generator().manual_seed(seed)
    along = torch.randn(num_pictures, 4, generator=generator)
    directions = torch.randn(4, NUM_FEATURES, generator=torch.Generator().manual_seed(0))
    return (2 + 0.3 * along @ directions + 0.05 * torch.randn(num_pictures, NUM_FEATURES, generator=generator)).relu()


def with_space(features_BF: torch.Tensor) -> Calibration:
    return Calibration(decoding={}, space=fit_space(features_BF))


def test_known_pictures_pass_and_others_are_noticed() -> None:
    calibration = with_space(draw_features(1000, seed=1))
    known = calibration.is_out_of_distribution(draw_features(1000, seed=2))
    assert known is not None
    assert 0 < sum(known) < 30
    elsewhere_BF = draw_features(50, seed=3)
    elsewhere_BF[:, ::2] *= 0.1
    assert calibration.is_out_of_distribution(elsewhere_BF) == [True] * 50
    assert calibration.is_out_of_distribution(0.2 * elsewhere_BF) == [True] * 50  # however weak


def test_a_calibration_never_depends_on_chance_or_moves_it() -> None:
    features_BF = draw_features(200, seed=1)
    torch.manual_seed(5)
    first, after = fit_space(features_BF), torch.rand(1)
    torch.manual_seed(6)
    second = fit_space(features_BF)
    assert first is not None
    assert second is not None
    assert torch.equal(first.directions_KF, second.directions_KF)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), after)


def test_too_few_pictures_tell_nothing_and_dead_features_do_no_harm() -> None:
    assert with_space(draw_features(99, seed=1)).is_out_of_distribution(draw_features(3, seed=1)) is None
    dead = with_space(torch.zeros(100, NUM_FEATURES))
    assert dead.is_out_of_distribution(torch.zeros(2, NUM_FEATURES)) == [False] * 2
    assert dead.is_out_of_distribution(torch.ones(2, NUM_FEATURES)) == [True] * 2


def test_distances_are_measured_where_the_space_is() -> None:
    """Everything on the device `meta`: it refuses a tensor that had to be brought there first."""
    space = fit_space(draw_features(200, seed=1))
    assert space is not None
    features_BF = draw_features(3, seed=2)
    on_meta = FeatureSpace(**{name: getattr(space, name).to("meta") for name in FeatureSpace.__slots__})
    assert on_meta.distances(features_BF.to("meta")).device.type == "meta"
    with pytest.raises(RuntimeError):
        space.distances(features_BF.to("meta"))


def test_a_model_folders_calibration_is_loaded_to_the_models_device(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", calibration=with_space(draw_features(200, seed=1)))
    assert load_space(folder).mean_F.device.type == "cpu"
    found = load_bundle(folder, device="meta")
    assert found.device.type == "meta"
    assert found.calibration is not None
    assert found.calibration.space is not None
    assert {getattr(found.calibration.space, name).device for name in FeatureSpace.__slots__} == {found.device}


# ---- files ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    scores_N, good_N, _ = draw_captions(300, seed=0)
    found = fit_confidence(scores_N.tolist(), good_N.tolist())
    assert found is not None
    space = fit_space(draw_features(300, seed=1))
    return Calibration(decoding=asdict(DecodingDefaults()), curve=found[0], reliability=found[1], space=space)


def test_what_is_written_is_what_is_read(calibration: Calibration) -> None:
    text, arrays = to_files(calibration, model="abc")
    again = from_files(text, arrays, model="abc")
    assert (again.decoding, again.curve, again.reliability) == (
        calibration.decoding,
        calibration.curve,
        calibration.reliability,
    )
    features_BF = draw_features(500, seed=2)
    assert again.is_out_of_distribution(features_BF) == calibration.is_out_of_distribution(features_BF)
    assert again.confidence([-2.0, -1.0]) == calibration.confidence([-2.0, -1.0])
    nothing = from_files(*to_files(Calibration(decoding={}), model="abc"), model="abc")
    assert nothing.confidence([-1.0]) is None
    assert nothing.is_out_of_distribution(features_BF) is None


def test_the_fingerprint_is_of_what_is_measured_and_not_of_how_a_library_writes_it(
    calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = to_files(calibration, model="abc")
    monkeypatch.setattr("captioner.calibration.save_arrays", lambda arrays: save_arrays(arrays, {"version": "next"}))
    other_files = to_files(calibration, model="abc")
    assert other_files[1] != files[1]
    again = from_files(*other_files, model="abc")
    assert again.fingerprint == from_files(*files, model="abc").fingerprint == calibration.fingerprint
    space = calibration.space
    assert space is not None
    others = [
        replace(calibration, space=None),
        replace(calibration, space=replace(space, threshold=space.threshold + 1)),
        replace(calibration, curve=None),
        replace(calibration, decoding={}),
    ]
    assert len({calibration.fingerprint, *(other.fingerprint for other in others)}) == 5


def test_files_of_another_model_are_refused(calibration: Calibration) -> None:
    with pytest.raises(ValueError, match="its model is abc, not xyz"):
        from_files(*to_files(calibration, model="abc"), model="xyz")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.999])
@pytest.mark.parametrize("cut", [0, 1])
def test_cut_files_are_refused(calibration: Calibration, cut: int, share: float) -> None:
    files = list(to_files(calibration, model="abc"))
    files[cut] = files[cut][: int(share * len(files[cut]))]
    with pytest.raises(ValueError, match=r".+"):
        from_files(files[0], files[1], model="abc")


def test_a_content_of_another_layout_is_refused(calibration: Calibration) -> None:
    text, arrays = to_files(calibration, model="abc")
    for changed in ({"curve": [1, 2]}, {"curve": {"scores": [-1.0]}}, {"reliability": {"auroc": 0.5}}):
        with pytest.raises(ValueError, match=r".+"):
            from_files(json.dumps(json.loads(text) | changed).encode(), arrays, model="abc")


# ---- real runs ------------------------------------------------------------------------------------------------

NUM_VAL = 130
NUM_IMAGES = 12


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, [96], size=36)
    return write_shards(folder, [70, NUM_VAL - 70], split="val", size=36, first=100)


@pytest.fixture(scope="module")
def trained(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model folder that two processes wrote."""
    output = tmp_path_factory.mktemp("trained") / "run"
    flags = (
        "--shards", shards, "--output", output, "--encoder", "small_cnn", "--weights", "none", "--crop", 32,
        "--finetune-encoder-from-step", 0, "--batch-size", 8, "--embedding-size", 16, "--hidden-size", 24,
        "--workers", 0, "--epochs", 2, "--beam-size", 1, "--learning-rate", 0.02,
    )  # fmt: skip
    done = run_training(flags, log=output.with_suffix(".log"), world_size=2)
    assert done.code == 0, done.output
    assert f"AUROC {load_reliability(output / 'model').auroc:.3f} on {NUM_VAL} captions" in done.output
    return output / "model"


def load_calibration(model: Path) -> Calibration:
    found = load_bundle(model).calibration
    assert found is not None
    return found


def load_reliability(model: Path) -> Reliability:
    found = load_calibration(model).reliability
    assert found is not None
    return found


def load_space(model: Path) -> FeatureSpace:
    found = load_calibration(model).space
    assert found is not None
    return found


@pytest.mark.slow
def test_training_writes_a_calibrated_model_folder(trained: Path) -> None:
    found = load_calibration(trained)
    assert found.decoding == asdict(DecodingDefaults(beam_size=1))
    assert found.confidence([-1.0]) is not None
    assert load_reliability(trained).num_captions == NUM_VAL
    card = (trained / "README.md").read_text()
    assert f"AUROC {load_reliability(trained).auroc:.3f}" in card
    assert card.count("| 13 |") == 10


@pytest.mark.slow
def test_evaluation_calibrates_as_training_did(trained: Path, shards: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(trained, tmp_path / "model"))
    wanted_curve, wanted_space = load_calibration(folder).curve, load_space(folder)
    (folder / "calibration.json").unlink()
    assert load_bundle(folder).calibration is None
    settings = EvaluateSettings(
        model=folder, shards=(shards,), output=tmp_path / "results.json", workers=0, calibrate=True
    )
    evaluate(settings)
    curve, space = load_calibration(folder).curve, load_space(folder)
    assert curve is not None
    assert wanted_curve is not None
    assert curve.scores == pytest.approx(wanted_curve.scores, abs=1e-4)
    assert curve.chances == wanted_curve.chances
    assert space.threshold.item() == pytest.approx(wanted_space.threshold.item(), rel=1e-3)
    assert torch.allclose(space.mean_F, wanted_space.mean_F, atol=1e-5)
    evaluate(replace(settings, beam_size=2))
    assert load_calibration(folder).decoding["beam_size"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["pictures", "references", "variety", "everything"])
def test_a_poorer_calibration_does_not_replace_a_good_one(
    trained: Path, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    """Too few pictures, too few with two references, none that is bad; the last may also become an empty first one."""
    folder = Path(shutil.copytree(trained, tmp_path / "model"))
    settings = EvaluateSettings(model=folder, shards=(shards,), output=tmp_path / "r.json", workers=0, calibrate=True)
    if lost == "pictures":
        few = write_shards(tmp_path / "few", [9], split="val", size=36, first=100)
        settings = replace(settings, shards=(few,))
        said = "--calibrate needs 100 images, and the val split"
    elif lost == "references":
        monkeypatch.setattr("train.evaluation.calibrate.fit_confidence", lambda *_: None)
        said = r"is kept, the new one has no confidence \(fewer than 100 captions"
    elif lost == "variety":
        monkeypatch.setattr("train.evaluation.calibrate.fit_space", lambda _: None)
        said = "is kept, the new one has confidence"
    else:
        monkeypatch.setattr("train.evaluation.calibrate.fit_confidence", lambda *_: None)
        monkeypatch.setattr("train.evaluation.calibrate.fit_space", lambda _: None)
        for name in ("calibration.json", "calibration.safetensors"):
            (folder / name).unlink()
        said = "there is nothing to keep"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match=said):
        evaluate(settings)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert (tmp_path / "r.json").exists() == (lost != "pictures")  # the scores were asked for too


@pytest.mark.slow
def test_features_of_large_splits_are_those_of_pictures_at_equal_distances(
    trained: Path, shards: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, accelerator = load_bundle(trained), start_accelerator(seed=0)
    split = read_split([shards], "val", remedy="")
    open_loader = partial(caption_loader, crop=32, max_tokens=20, vocabulary=bundle.vocabulary)
    evaluator = Evaluator(
        split=split, loss_model=CaptionLoss(bundle.model, view=bundle.view), open_loader=open_loader,
        decoding=bundle.decoding, vocabulary=bundle.vocabulary, accelerator=accelerator,
    )  # fmt: skip
    all_BF = sample_features(evaluator)
    assert len(all_BF) == NUM_VAL
    monkeypatch.setattr("train.evaluation.calibrate.MAX_IMAGES", 50)
    assert torch.allclose(sample_features(evaluator), all_BF[::3], atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_validation_scores_captions_in_the_precision_of_captioning(form: Form) -> None:
    """Training in bfloat16; cached features, which no encoder rounds once more, are the inputs."""
    bundle = Bundle(model=make_model(form), view=VIEW, vocabulary=VOCABULARY, decoding=DECODING, name="abc")
    positions = (4,) if form == "attention" else ()
    features = torch.rand(NUM_IMAGES, *positions, bundle.model.encoder.num_features)
    captions = pack([[[4, 5]]] * NUM_IMAGES, max_tokens=7)
    names = [str(number) for number in range(NUM_IMAGES)]
    batch = CaptionBatch(features, captions, list(range(NUM_IMAGES)), names, list(names), [["a dog"]] * NUM_IMAGES, 0)
    in_bfloat16: Any = SimpleNamespace(
        device=torch.device("cpu"),
        autocast=lambda: torch.autocast("cpu", torch.bfloat16),
    )

    class Batches(list):
        ledger = None

    loader: Any = Batches([[batch]])
    no_split: Any = None
    evaluator = Evaluator(
        split=no_split, loss_model=CaptionLoss(bundle.model, view=VIEW).eval(), open_loader=lambda _split: loader,
        decoding=DECODING, vocabulary=VOCABULARY, accelerator=in_bfloat16,
    )  # fmt: skip
    _, rows, _ = evaluator.caption_split()
    with torch.inference_mode():
        encoded = Encoded(bundle.model.encode(features), out_of_distribution=[False] * NUM_IMAGES)
    wanted = Captioner(bundle).describe([encoded])
    assert [row.caption for row in rows] == [one.caption for one in wanted]
    assert [row.score for row in rows] == pytest.approx([one.score for one in wanted], abs=1e-5)


# ---- real pictures --------------------------------------------------------------------------------------------

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
PHOTOS, WEIGHTS = DATA / "coco" / "images", DATA / "weights" / "squeezenet1_1.pth"


def draw_page(seed: int) -> Image.Image:
    """A white page with dark lines of words."""
    rng = np.random.default_rng(seed)
    page = Image.new("RGB", (600, 800), "white")
    draw = ImageDraw.Draw(page)
    for top in range(40, 760, 24):
        draw.text((40, top), " ".join("word" * n for n in rng.integers(1, 4, size=8)), fill="black", font_size=15)
    return page


def draw_chart(seed: int) -> Image.Image:
    """Axes and bars."""
    rng = np.random.default_rng(seed)
    chart = Image.new("RGB", (640, 480), "white")
    draw = ImageDraw.Draw(chart)
    draw.line((60, 40, 60, 420, 600, 420), fill="black", width=2)
    color = tuple(rng.integers(20, 230, size=3).tolist())
    for left in range(80, 580, 50):
        draw.rectangle((left, 420 - int(rng.integers(20, 360)), left + 30, 419), fill=color)
        draw.text((left, 430), "label", fill="black", font_size=12)
    return chart


@pytest.mark.slow
@pytest.mark.skipif(not (PHOTOS.exists() and WEIGHTS.exists()), reason=f"there is no {PHOTOS} or no {WEIGHTS}")
def test_charts_and_text_are_unlike_photos() -> None:
    encoder = Encoder("squeezenet1_1", trainable=False).eval()
    load_encoder_weights(encoder, name="squeezenet1_1", weights=str(WEIGHTS))
    view = ViewSpec(size=128, crop=112)

    def features(pictures: list[bytes]) -> torch.Tensor:
        views_BPP3 = np.stack([read_eval_view(data, view)[0] for data in pictures])
        return encoder(normalise(torch.from_numpy(views_BPP3), view))

    calibration = with_space(features([path.read_bytes() for path in sorted(PHOTOS.iterdir())]))
    drawn = []
    for picture in [*map(draw_page, range(5)), *map(draw_chart, range(5))]:
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        drawn.append(buffer.getvalue())
    unlike = calibration.is_out_of_distribution(features(drawn))
    assert unlike is not None
    assert sum(unlike) >= 8


def test_too_few_images_are_named_as_the_reason() -> None:
    said = str(Calibration(decoding={}))
    assert said.endswith("images unlike the val split's will not be flagged: it has fewer than 100")
