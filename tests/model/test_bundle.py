"""The model folder: what is saved is what is loaded, and anything else is refused in one line."""

import errno
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from servers import Bucket
from tiny_model import DECODING, FORMS, VIEW, VOCABULARY, WORDS, Form, caption_views, make_model, make_views

from captioner.calibration import Calibration, fit_confidence, fit_space
from captioner.errors import UserError
from captioner.files import storage
from captioner.model.bundle import Bundle, load_bundle, save_bundle, save_calibration
from captioner.model.network import CaptionModel
from captioner.vocabulary import Vocabulary


def save(
    folder: Path,
    model: CaptionModel | None = None,
    *,
    vocabulary: Vocabulary = VOCABULARY,
    calibration: Calibration | None = None,
) -> Path:
    save_bundle(
        folder,
        model=model or make_model(),
        view=VIEW,
        vocabulary=vocabulary,
        decoding=DECODING,
        metrics={"CIDEr": 0.25, "images": 12},
        calibration=calibration,
    )
    return folder


@cache
def make_calibration(*, num_captions: int = 200) -> Calibration:
    """Half of the captions are good, those with the better scores; pictures are of one kind."""
    scores = [float(number) for number in range(num_captions)]
    found = fit_confidence(scores, [score >= num_captions / 2 for score in scores])
    assert found is not None
    features_BF = torch.rand(num_captions, 8, generator=torch.Generator().manual_seed(0))
    return Calibration(decoding=asdict(DECODING), curve=found[0], reliability=found[1], space=fit_space(features_BF))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder that no test may change."""
    return save(tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of a model folder, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def refusal(folder: Path | str) -> str:
    """The one line with which `folder` is refused."""
    with pytest.raises(UserError) as error:
        load_bundle(folder)
    message = str(error.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


def test_a_file_of_the_model_folder_is_refused_with_the_folder_to_give(folder: Path) -> None:
    assert "is a file: give the model folder" in refusal(folder / "model.safetensors")


def test_a_mistyped_folder_and_the_folder_of_a_run_are_refused_with_what_to_give(folder: Path) -> None:
    assert "check the path" in refusal(folder.with_name("modle"))
    assert f"give the model folder {folder}" in refusal(folder.parent)


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("form", FORMS)
def test_a_saved_model_captions_as_before(tmp_path: Path, form: Form) -> None:
    model, views = make_model(form), make_views(8)
    before = Bundle(model=model, view=VIEW, vocabulary=VOCABULARY, decoding=DECODING, name="")
    loaded = load_bundle(save(tmp_path / "model", model))
    assert (loaded.view, loaded.decoding, loaded.vocabulary) == (VIEW, DECODING, VOCABULARY)
    assert not loaded.model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.model.state_dict()[name]), name
    wanted = caption_views(before, views)
    assert caption_views(loaded, views) == wanted
    assert len({tuple(caption.tokens) for caption in wanted}) > 1
    assert caption_views(loaded, views, beam_size=1) == caption_views(before, views, beam_size=1)


def test_beams_are_the_folders_unless_others_are_asked_for(saved: Path) -> None:
    loaded, views = load_bundle(saved), make_views(8)
    assert caption_views(loaded, views) == caption_views(loaded, views, beam_size=2)
    assert caption_views(loaded, views) != caption_views(loaded, views, beam_size=1)


def test_the_folder_is_self_contained(tmp_path: Path) -> None:
    first = save(tmp_path / "here" / "model")
    wanted = caption_views(load_bundle(first), make_views(8))
    moved = Path(shutil.copytree(first, tmp_path / "elsewhere" / "other name"))
    shutil.rmtree(tmp_path / "here")
    assert caption_views(load_bundle(moved), make_views(8)) == wanted


def test_the_name_follows_the_weights(saved: Path, tmp_path: Path) -> None:
    assert load_bundle(save(tmp_path / "same")).name == load_bundle(saved).name
    assert load_bundle(save(tmp_path / "other", make_model("every-step"))).name != load_bundle(saved).name


def test_the_card_and_the_metrics_say_how_good_it_was(saved: Path) -> None:
    assert json.loads((saved / "metrics.json").read_text()) == {"CIDEr": 0.25, "images": 12}
    assert "| CIDEr | 0.2500 |" in (saved / "README.md").read_text()


# ---- a calibration --------------------------------------------------------------------------------------------


@pytest.fixture
def calibrated(folder: Path) -> Path:
    """A model folder that got a calibration later."""
    save_calibration(folder, make_calibration(), model=load_bundle(folder).name)
    return folder


def test_a_calibration_comes_with_the_model_or_later(tmp_path: Path, saved: Path, calibrated: Path) -> None:
    assert load_bundle(saved).calibration is None
    wanted = make_calibration()
    at_once = save(tmp_path / "at once", calibration=wanted)
    for folder in (at_once, calibrated):
        found = load_bundle(folder).calibration
        assert found is not None
        assert (found.curve, found.reliability, found.decoding) == (wanted.curve, wanted.reliability, asdict(DECODING))
        assert found.is_out_of_distribution(torch.eye(8)) == [True] * 8
        assert "200 validation images, cross-validated" in (folder / "README.md").read_text()
    assert {path.name: path.read_bytes() for path in at_once.iterdir()} == {
        path.name: path.read_bytes() for path in calibrated.iterdir()
    }


@pytest.mark.parametrize("name", ["calibration.json", "calibration.safetensors", "README.md"])
def test_a_kill_while_calibrating_anew_leaves_a_model_that_loads(
    calibrated: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    replace_file = Path.replace

    def replace_or_die(self: Path, target: Path) -> Path:
        if Path(target) == calibrated / name:
            raise KeyboardInterrupt
        return replace_file(self, target)

    model = load_bundle(calibrated).name
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace_or_die)
        with pytest.raises(KeyboardInterrupt):
            save_calibration(calibrated, make_calibration(num_captions=300), model=model)
    assert load_bundle(calibrated).calibration is None
    save_calibration(calibrated, make_calibration(num_captions=300), model=model)
    assert load_bundle(calibrated).calibration is not None


@pytest.mark.parametrize("name", ["calibration.json", "calibration.safetensors", "README.md"])
def test_a_full_disk_while_calibrating_anew_leaves_the_old_calibration(
    calibrated: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    write = storage.write_atomic

    def write_or_fail(location: str, content: bytes | str) -> None:
        if location.endswith(name):
            raise OSError(errno.ENOSPC, "No space left on device", location)
        write(location, content)

    before = {path.name: path.read_bytes() for path in calibrated.iterdir()}
    monkeypatch.setattr(storage, "write_atomic", write_or_fail)
    with pytest.raises(OSError, match="No space left"):
        save_calibration(calibrated, make_calibration(num_captions=300), model=load_bundle(calibrated).name)
    assert {path.name: path.read_bytes() for path in calibrated.iterdir()} == before


@pytest.mark.parametrize("name", ["calibration.json", "calibration.safetensors"])
def test_a_damaged_calibration_is_refused(calibrated: Path, name: str) -> None:
    data = (calibrated / name).read_bytes()
    for damaged in (b"", data[: len(data) // 2], data[:-3] + b"xyz"):
        (calibrated / name).write_bytes(damaged)
        assert "calibrate with train/evaluate.py" in refusal(calibrated)


def test_a_calibration_without_its_arrays_is_refused(calibrated: Path) -> None:
    (calibrated / "calibration.safetensors").unlink()
    message = refusal(calibrated)
    assert "there is no" in message
    assert "calibrate with train/evaluate.py" in message


def test_the_calibration_of_another_model_is_refused(calibrated: Path, tmp_path: Path) -> None:
    other = save(tmp_path / "other", make_model("every-step"))
    for name in ("calibration.json", "calibration.safetensors"):
        shutil.copy(calibrated / name, other / name)
    assert "its model is" in refusal(other)


# ---- behind a URL ---------------------------------------------------------------------------------------------


def check_remote(url: str, folder: Path, *, put: Callable[[str, bytes], object]) -> None:
    """The model behind a URL is that of the folder, with and without a calibration; then it is damaged."""
    found, wanted = load_bundle(url), load_bundle(folder)
    assert found.name == wanted.name
    assert found.calibration is None
    assert caption_views(found, make_views(4)) == caption_views(wanted, make_views(4))
    save_calibration(folder, make_calibration(), model=wanted.name)
    for name in ("calibration.json", "calibration.safetensors"):
        put(name, (folder / name).read_bytes())
    calibration = load_bundle(url).calibration
    assert calibration is not None
    assert calibration.confidence([150.0]) == make_calibration().confidence([150.0])
    put("calibration.safetensors", b"")
    assert "calibration.json does not fit" in refusal(url)
    put("model.safetensors", b"")
    assert "model.safetensors is cut" in refusal(url)
    assert "there is no" in refusal(f"{url}/absent")


def test_a_model_is_read_from_a_web_server(folder: Path, nginx: tuple[str, Path]) -> None:
    address, root = nginx
    served = Path(shutil.copytree(folder, root / "my model"))
    check_remote(f"{address}/my%20model", folder, put=lambda name, data: (served / name).write_bytes(data))


def test_a_model_is_read_from_a_bucket(folder: Path, bucket: Bucket) -> None:
    bucket.put_folder(folder, "models/best")
    url = f"s3://{bucket.name}/models/best"
    check_remote(url, folder, put=lambda name, data: bucket.put(f"models/best/{name}", data))


# ---- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "vocabulary.json", "model.safetensors"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert name in refusal(folder)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    refusal(tmp_path)
    refusal(tmp_path / "absent")
    (tmp_path / "config.json").write_text("[]")
    refusal(tmp_path)
    refusal(tmp_path / "config.json")


def test_another_vocabulary_is_refused(folder: Path) -> None:
    """As many words, whole in itself, but not the one of the training: captions would be nonsense."""
    swapped = Vocabulary.from_counts(dict.fromkeys([*WORDS[1:], "zebra"], 9), threshold=1)
    assert len(swapped) == len(VOCABULARY)
    (folder / "vocabulary.json").write_text(swapped.to_json())
    assert "vocabulary.json is not the vocabulary" in refusal(folder)


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff\xfe\x00", b"{\n"])
def test_a_damaged_vocabulary_is_refused(folder: Path, content: bytes) -> None:
    (folder / "vocabulary.json").write_bytes(content)
    assert "vocabulary.json" in refusal(folder)


@pytest.mark.parametrize("version", [0, 2, None, "1"])
def test_another_format_version_is_refused(folder: Path, version: object) -> None:
    edit_config(folder, lambda config: config.update(format_version=version))
    assert f"format {version}" in refusal(folder)


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    """As they would be after a training that diverged; their captions would have scores that JSON cannot hold."""
    model = make_model()
    with torch.no_grad():
        model.predict.weight[5, 0] = torch.nan
    assert "model.safetensors holds weights that are no finite numbers: train" in refusal(save(tmp_path / "m", model))


@pytest.mark.parametrize("share", [0.0, 0.00001, 0.001, 0.3, 0.999999])
def test_cut_weights_are_refused(folder: Path, share: float) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    assert "model.safetensors" in refusal(folder)


def test_a_flipped_bit_in_the_weights_is_found(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    assert "model.safetensors" in refusal(folder)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_cut_config_is_refused(folder: Path, share: float) -> None:
    path = folder / "config.json"
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    assert "config.json" in refusal(folder)


EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "no model": lambda config: config.pop("model"),
    "no view": lambda config: config.pop("view"),
    "no decoding": lambda config: config.pop("decoding"),
    "no checksum": lambda config: config.pop("weights_sha256"),
    "no fingerprint": lambda config: config.pop("vocabulary_fingerprint"),
    "model is a list": lambda config: config.update(model=[]),
    "view is a number": lambda config: config.update(view=3),
    "unknown field": lambda config: config["model"].update(depth=3),
    "another encoder": lambda config: config["model"].update(encoder="squeezenet1_1"),
    "unknown encoder": lambda config: config["model"].update(encoder="resnet19"),
    "another width": lambda config: config["model"].update(hidden_size=10),
    "a negative width": lambda config: config["model"].update(hidden_size=-1),
    "a width of text": lambda config: config["model"].update(hidden_size="9"),
    "another vocabulary size": lambda config: config["model"].update(vocabulary_size=5),
    "another image input": lambda config: config["model"].update(image_input="every-step"),
    "crop beyond size": lambda config: config["view"].update(crop=50),
    "crop of text": lambda config: config["view"].update(crop="32"),
    "no beams": lambda config: config["decoding"].update(beam_size=0),
    "no tokens": lambda config: config["decoding"].update(max_tokens=0),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_config_is_refused(saved: Path, tmp_path: Path, edit: str) -> None:
    """Only the small files are copied; the weights are linked."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in saved.iterdir():
        (folder / path.name).symlink_to(path)
    assert load_bundle(folder).name == load_bundle(saved).name
    config = (folder / "config.json").read_bytes()
    (folder / "config.json").unlink()
    (folder / "config.json").write_bytes(config)
    edit_config(folder, EDITS[edit])
    with pytest.raises(UserError) as error:
        load_bundle(folder)
    assert "\n" not in str(error.value)


# ---- writing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fatal", [KeyboardInterrupt, OSError])
def test_a_kill_before_the_renaming_leaves_no_half_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fatal: type[BaseException]
) -> None:
    def die(*_: object) -> None:
        raise fatal

    folder = tmp_path / "model"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", die)
        with pytest.raises(fatal):
            save(folder)
    assert not folder.exists()
    save(folder)
    assert load_bundle(folder).view == VIEW
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("file", ["config.json", "vocabulary.json", "metrics.json", "README.md"])
def test_a_kill_while_writing_leaves_no_half_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    write = storage.write_atomic

    def write_or_die(location: str, content: bytes | str) -> None:
        if Path(location).name == file:
            raise KeyboardInterrupt
        write(location, content)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_atomic", write_or_die)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_saving_again_replaces_the_model(tmp_path: Path) -> None:
    folder = save(tmp_path / "model")
    (folder / "left-over.txt").touch()
    save(folder, make_model("every-step"))
    assert load_bundle(folder).model.config.image_input == "every-step"
    assert not (folder / "left-over.txt").exists()
