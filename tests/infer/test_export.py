"""ONNX files caption as PyTorch does, with the very code that their README shows."""

import copy
import json
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import picture
from tiny_model import FORMS, VIEW, VOCABULARY, Form, caption_views, make_model, make_views, set_statistics

from captioner import load_captioner
from captioner.calibration import Calibration, ConfidenceCurve
from captioner.describe import Captioner
from captioner.errors import UserError
from captioner.images.views import ViewSpec, normalise, read_eval_view
from captioner.model.bundle import Bundle, DecodingDefaults, save_bundle
from captioner.model.encoders import load_encoder_weights
from captioner.model.network import ModelConfig, build_model
from captioner.vocabulary import Vocabulary
from infer import export, onnx_files
from infer.onnx_files import readme

pytestmark = pytest.mark.slow

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
WEIGHTS = DATA / "weights" / "squeezenet1_1.pth"
DECODING = DecodingDefaults(beam_size=1, max_tokens=16)
for package in ("onnx", "onnxruntime", "onnxscript"):
    pytest.importorskip(package, reason="exporting needs pip install -e '.[onnx]'")


def tiny_bundle(form: Form) -> Bundle:
    return Bundle(model=make_model(form), view=VIEW, vocabulary=VOCABULARY, decoding=DECODING, name="")


@pytest.fixture(scope="module", params=FORMS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Path]:
    """A model and its ONNX folder, in which the README's code was saved as it says."""
    bundle, folder = tiny_bundle(request.param), tmp_path_factory.mktemp("exported") / "onnx"
    onnx_files.export(bundle, folder)
    return bundle, save_readme_code(folder)


def save_readme_code(folder: Path) -> Path:
    code = re.findall(r"^```python\n(.*?)^```", (folder / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    (folder / "caption.py").write_text(code[0])
    return folder


def readme_function(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setattr(sys, "argv", ["caption.py"])
    return runpy.run_path(str(folder / "caption.py"))[name]


def pytorch_tokens(bundle: Bundle, views: np.ndarray) -> list[list[int]]:
    return [caption.tokens for caption in caption_views(bundle, views, beam_size=1)]


@pytest.mark.parametrize("num_pictures", [1, 3, 64])
def test_greedy_captions_are_pytorchs(
    exported: tuple[Bundle, Path], num_pictures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, folder = exported
    views = make_views(num_pictures)
    wanted = pytorch_tokens(bundle, views)
    assert readme_function(folder, "greedy", monkeypatch)(views) == wanted
    assert num_pictures == 1 or len(set(map(tuple, wanted))) > 1


def test_the_folder_says_what_the_model_would(exported: tuple[Bundle, Path], tmp_path: Path) -> None:
    """From the picture file to the text, without our code; the picture has the view's size, so all pixels are ours."""
    bundle, folder = exported
    picture(1).resize((VIEW.size, VIEW.size)).save(tmp_path / "photo.png")
    command = [sys.executable, str(folder / "caption.py"), str(tmp_path / "photo.png")]
    printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    (wanted,) = Captioner(bundle)([tmp_path / "photo.png"])
    assert printed == f"{tmp_path / 'photo.png'} {wanted.caption}\n"


def test_the_folder_is_whole(exported: tuple[Bundle, Path]) -> None:
    _, folder = exported
    names = {path.name for path in folder.iterdir()} - {"caption.py"}
    assert names == {"encoder.onnx", "decoder.onnx", "config.json", "vocabulary.json", "README.md"}
    assert [path.name for path in folder.parent.iterdir()] == ["onnx"]
    assert json.loads((folder / "vocabulary.json").read_text())["words"] == list(VOCABULARY.words)


def test_trigrams_come_twice_only_where_the_model_folder_lets_them(
    exported: tuple[Bundle, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, folder = exported
    free = replace(bundle, decoding=replace(DECODING, no_repeat_trigram=False))
    shutil.copytree(folder, tmp_path / "free")
    (tmp_path / "free" / "README.md").write_text(readme(free))
    greedy = readme_function(save_readme_code(tmp_path / "free"), "greedy", monkeypatch)
    views = make_views(64)
    assert greedy(views) == pytorch_tokens(free, views)
    assert pytorch_tokens(free, views) != pytorch_tokens(bundle, views)


def test_the_command_prints_what_it_wrote(
    exported: tuple[Bundle, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All but the exporter's own half minute, which the folder took already."""
    bundle, folder = exported
    save_bundle(tmp_path / "model", model=bundle.model, view=VIEW, vocabulary=VOCABULARY, decoding=DECODING, metrics={})
    monkeypatch.setattr(onnx_files, "_write", lambda _, path, **options: shutil.copy(folder / path.name, path))
    settings = export.ExportSettings(model=str(tmp_path / "model"), output=tmp_path / "onnx")
    export.main(settings)
    printed = capsys.readouterr().out
    differences = re.findall(r"(?:en|de)coder\.onnx\W+[\d.]+\W+(\de-\d\d|[\d.]+e-\d\d)", printed)
    assert len(differences) == 2, printed
    assert max(map(float, differences)) < 1e-4
    before = sorted(path.stat().st_mtime_ns for path in settings.output.iterdir())
    with pytest.raises(UserError, match="exists already"):
        export.main(settings)
    assert sorted(path.stat().st_mtime_ns for path in settings.output.iterdir()) == before


def test_numbers_that_differ_are_refused(
    exported: tuple[Bundle, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from a wrong exporter: the files are those of another model."""
    bundle, folder = exported
    other = replace(bundle, model=copy.deepcopy(bundle.model))
    with torch.no_grad():
        other.model.norm.bias.add_(0.01)
    monkeypatch.setattr(onnx_files, "_write", lambda _, path, **options: shutil.copy(folder / path.name, path))
    with pytest.raises(UserError, match=r"encoder\.onnx differs from PyTorch by .*, so nothing was exported"):
        onnx_files.export(other, tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_one_line(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    settings = export.ExportSettings(model=str(tmp_path), output=tmp_path / "onnx")
    with pytest.raises(UserError, match=rf"{package}.*pip install -e '\.\[onnx\]'") as caught:
        export.main(settings)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not WEIGHTS.exists(), reason=f"there is no {WEIGHTS}")
def test_captions_of_real_pictures_are_pytorchs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SqueezeNet's own weights; the decoder is random, and says something else of most pictures."""
    torch.manual_seed(0)
    view = ViewSpec(size=128, crop=112)
    pictures = [path.read_bytes() for path in sorted((DATA / "coco" / "images").iterdir())]
    views = np.stack([read_eval_view(data, view)[0] for data in pictures])
    vocabulary = Vocabulary.from_counts({f"w{number}": 1 for number in range(500)}, threshold=1)
    config = ModelConfig(encoder="squeezenet1_1", vocabulary_size=len(vocabulary), hidden_size=64, embedding_size=64)
    model = build_model(config)
    load_encoder_weights(model.encoder, name="squeezenet1_1", weights=str(WEIGHTS))
    with torch.no_grad():
        model.predict.weight.mul_(8)
    set_statistics(model, normalise(torch.from_numpy(views), view))
    bundle = Bundle(model=model.eval(), view=view, vocabulary=vocabulary, decoding=DECODING, name="")
    onnx_files.export(bundle, tmp_path / "onnx")
    wanted = pytorch_tokens(bundle, views)
    assert len(wanted) == 110
    assert len(set(map(tuple, wanted))) > 80
    assert readme_function(save_readme_code(tmp_path / "onnx"), "greedy", monkeypatch)(views) == wanted


def test_int8_is_smaller_and_says_nearly_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its rows name another model, and its confidence is the model folder's."""
    (tmp_path / "photos").mkdir()
    for number in range(24):
        picture(number).save(tmp_path / "photos" / f"{number}.png")
    (tmp_path / "photos" / "text.jpg").write_text("no picture")
    calibration = Calibration(decoding=asdict(DECODING), curve=ConfidenceCurve(scores=(-2.0, 0.0), chances=(0.0, 1.0)))
    bundle = replace(tiny_bundle("attention"), calibration=calibration, name="123456789abc")
    save_bundle(
        tmp_path / "model",
        model=bundle.model,
        view=VIEW,
        vocabulary=VOCABULARY,
        decoding=DECODING,
        metrics={},
        calibration=calibration,
    )
    few = export.ExportSettings(model=str(tmp_path / "model"), output=tmp_path / "onnx", int8=tmp_path / "model")
    with pytest.raises(UserError, match="has 0 usable photos"):
        export.main(few)
    assert not (tmp_path / "onnx").exists()
    export.main(replace(few, int8=tmp_path / "photos"))
    (num_same,) = map(int, re.findall(r"int8: (\d+) of 24 photos", capsys.readouterr().out))
    assert num_same >= 12
    views = make_views(24)
    whole, int8 = load_captioner(tmp_path / "model"), load_captioner(tmp_path / "onnx")
    assert int8.bundle.name == f"{whole.bundle.name}-int8"
    scores = [[one.score for one in captioner.describe_views(views)] for captioner in (whole, int8)]
    assert scores[0] != scores[1]
    assert float(np.median(np.abs(np.subtract(scores[0], scores[1])))) < 0.1
    assert all(one.confidence is not None for one in int8.describe_views(views))
    operators = {
        node.op_type for name in ("encoder", "decoder") for node in load_graph(tmp_path / "onnx" / f"{name}.onnx")
    }
    assert {"QuantizeLinear", "MatMulInteger"} <= operators


def load_graph(path: Path) -> list[Any]:
    import onnx

    return list(onnx.load(path).graph.node)
