"""The model folder: what is saved is what is loaded, and anything else is refused in one line."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import captioner
from captioner.bundle import Bundle, DecodingDefaults, load_bundle, save_bundle
from captioner.cli import UserError
from captioner.images import ImageError
from captioner.model import CaptionModel, ImageInput, ModelConfig
from captioner.views import ViewSpec, normalise
from captioner.vocabulary import Vocabulary

VIEW = ViewSpec(size=40, crop=32)
DECODING = DecodingDefaults(beam_size=2, max_tokens=7)
WORDS = ["a", "man", "dog", "cat", "rides", "sits", "on", "red", "bicycle", "table", "near", "sea"]
VOCABULARY = Vocabulary.from_counts(dict.fromkeys(WORDS, 9), threshold=1)


def make_model(image_input: ImageInput = "first") -> CaptionModel:
    """A random model whose captions depend on the picture: large weights, statistics of pictures like these."""
    torch.manual_seed(3)
    config = ModelConfig(
        encoder="small_cnn", vocabulary_size=len(VOCABULARY), embedding_size=8, hidden_size=9, image_input=image_input
    )
    model = CaptionModel(config)
    with torch.no_grad():
        for parameter in (model.norm.weight, model.predict.weight):
            parameter.mul_(8)
        model.norm.momentum = 1.0
        model.encode(normalise(torch.from_numpy(make_views(8)), VIEW))
    return model.eval()


def make_views(num_views: int) -> np.ndarray:
    """Views (B, P, P, 3), uint8."""
    return np.stack(
        [
            np.asarray(make_picture(seed).resize((40, 40), Image.Resampling.LANCZOS).crop((4, 4, 36, 36)))
            for seed in range(num_views)
        ]
    )


def make_picture(seed: int) -> Image.Image:
    patches = np.random.default_rng(seed).integers(0, 256, size=(3, 4, 3), dtype=np.uint8)
    return Image.fromarray(patches).resize((50, 44))


def picture_bytes(seed: int) -> bytes:
    buffer = io.BytesIO()
    make_picture(seed).save(buffer, "PNG")
    return buffer.getvalue()


def save(folder: Path, model: CaptionModel | None = None, *, vocabulary: Vocabulary = VOCABULARY) -> Path:
    save_bundle(
        folder,
        model=model or make_model(),
        view=VIEW,
        vocabulary=vocabulary,
        decoding=DECODING,
        metrics={"CIDEr": 0.25, "images": 12},
    )
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder that no test may change."""
    return save(tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of a model folder, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def refusal(folder: Path) -> str:
    """The one line with which `folder` is refused."""
    with pytest.raises(UserError) as error:
        load_bundle(folder)
    message = str(error.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("image_input", ["first", "every-step"])
def test_a_saved_model_captions_as_before(tmp_path: Path, image_input: ImageInput) -> None:
    model, views = make_model(image_input), make_views(8)
    before = Bundle(model=model, view=VIEW, vocabulary=VOCABULARY, decoding=DECODING, name="")
    loaded = load_bundle(save(tmp_path / "model", model))
    assert (loaded.view, loaded.decoding, loaded.vocabulary) == (VIEW, DECODING, VOCABULARY)
    assert not loaded.model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.model.state_dict()[name]), name
    wanted = before.caption_views(views)
    assert loaded.caption_views(views) == wanted
    assert len({tuple(caption.tokens) for caption in wanted}) > 1
    assert loaded.caption_views(views, beam_size=1) == before.caption_views(views, beam_size=1)


def test_beams_are_the_folders_unless_others_are_asked_for(saved: Path) -> None:
    loaded, views = load_bundle(saved), make_views(8)
    assert loaded.caption_views(views) == loaded.caption_views(views, beam_size=2)
    assert loaded.caption_views(views) != loaded.caption_views(views, beam_size=1)


def test_captioner_loads_it_and_captions_bytes(saved: Path) -> None:
    loaded = captioner.load_captioner(str(saved))
    captions = [loaded.caption(picture_bytes(seed)) for seed in range(8)]
    assert len(set(captions)) > 1
    assert captions == [VOCABULARY.decode(caption.tokens) for caption in loaded.caption_views(make_views(8))]
    assert all(set(caption.split()) <= set(WORDS) for caption in captions)
    assert all(captions)
    with pytest.raises(ImageError):
        loaded.caption(b"no picture")


def test_the_folder_is_self_contained(tmp_path: Path) -> None:
    first = save(tmp_path / "here" / "model")
    wanted = load_bundle(first).caption_views(make_views(8))
    moved = Path(shutil.copytree(first, tmp_path / "elsewhere" / "other name"))
    shutil.rmtree(tmp_path / "here")
    assert load_bundle(moved).caption_views(make_views(8)) == wanted


def test_the_name_follows_the_weights(saved: Path, tmp_path: Path) -> None:
    assert load_bundle(save(tmp_path / "same")).name == load_bundle(saved).name
    assert load_bundle(save(tmp_path / "other", make_model("every-step"))).name != load_bundle(saved).name


def test_the_card_and_the_metrics_say_how_good_it_was(saved: Path) -> None:
    assert json.loads((saved / "metrics.json").read_text()) == {"CIDEr": 0.25, "images": 12}
    assert "| CIDEr | 0.2500 |" in (saved / "README.md").read_text()


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
    write = Path.write_text

    def write_or_die(self: Path, *args: Any, **options: Any) -> int:
        if self.name == file:
            raise KeyboardInterrupt
        return write(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", write_or_die)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_saving_again_replaces_the_model(tmp_path: Path) -> None:
    folder = save(tmp_path / "model")
    (folder / "left-over.txt").touch()
    save(folder, make_model("every-step"))
    assert load_bundle(folder).model.config.image_input == "every-step"
    assert not (folder / "left-over.txt").exists()
