"""An ONNX folder captions as its model folder does, and no process imports torch meanwhile."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from caption_server import run_server
from tiny import picture
from tiny_model import DECODING, FORMS, VIEW, VOCABULARY, Form, make_model, make_views, write_model

from captioner import load_captioner
from captioner.calibration import Calibration, ConfidenceCurve, fit_space
from captioner.describe import Description
from captioner.errors import NoAttentionError, UserError
from captioner.images.views import normalise
from captioner.model.bundle import Bundle, load_bundle
from captioner.model.generated import DecodingDefaults
from infer import onnx_files
from infer.captioning import load_captioner as load_for
from infer.settings import CaptionSettings

for package in ("onnx", "onnxruntime", "onnxscript"):
    pytest.importorskip(package, reason="exporting needs pip install -e '.[onnx]'")
pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]
TOLERANCE = 1e-4
WATCH_TORCH = """
import atexit, os, sys
def report():
    with open(os.environ["TORCH_LOG"], "a") as log:
        log.write(f"{os.getpid()} {'torch' in sys.modules}\\n")
atexit.register(report)
class Watch:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "torch":
            with open(os.environ["TORCH_LOG"], "a") as log:
                log.write(f"{os.getpid()} True\\n")
sys.meta_path.insert(0, Watch())
"""


@pytest.fixture(scope="module", params=FORMS)
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A calibrated model folder, and its ONNX folder."""
    model, folder = make_model(request.param), tmp_path_factory.mktemp("models")
    with torch.inference_mode():
        images = normalise(torch.from_numpy(make_views(128)), VIEW)
        features = model.features(images)
    space = fit_space(features.mean(dim=1) if features.dim() == 3 else features)
    calibration = Calibration(
        decoding=asdict(DECODING), curve=ConfidenceCurve(scores=(-2.0, 0.0), chances=(0.0, 1.0)), space=space
    )
    write_model(folder / "model", request.param, calibration=calibration)
    onnx_files.export(load_bundle(folder / "model"), folder / "onnx")
    return folder / "model", folder / "onnx"


def odd_views() -> np.ndarray:
    """Views like those of the calibration, noise, and black."""
    noise = np.random.default_rng(0).integers(0, 256, (3, VIEW.crop, VIEW.crop, 3), dtype=np.uint8)
    return np.concatenate((make_views(33), noise, np.zeros_like(noise[:1])))


def check_alike(found: list[Description], wanted: list[Description]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert (one.captions, one.alt, one.review) == (other.captions, other.alt, other.review)
        assert one.token_scores == pytest.approx(other.token_scores, abs=TOLERANCE)
        assert one.confidence == pytest.approx(other.confidence, abs=TOLERANCE)
        assert (one.attention is None) == (other.attention is None)
        if one.attention is not None and other.attention is not None:
            assert one.attention.words == other.attention.words
            assert one.attention.grid == other.attention.grid
            np.testing.assert_allclose(one.attention.weights_TR, other.attention.weights_TR, atol=TOLERANCE)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"abstain_below": 0.5},
        {"beam_size": 1},
        {"beam_size": 5, "length_penalty": 0.3},
        {"beam_size": 40},  # more than there are words
        {"captions_per_image": 4},
        {"beam_size": 1, "captions_per_image": 3},
    ],
    ids=str,
)
def test_descriptions_are_pytorchs(folders: tuple[Path, Path], options: dict[str, Any]) -> None:
    model, onnx = folders
    views = odd_views()
    wanted = load_captioner(model, **options).describe_views(views)
    check_alike(load_captioner(onnx, **options).describe_views(views), wanted)
    assert len({one.caption for one in wanted}) > 5
    assert {one.review for one in wanted} != {None}


@pytest.mark.parametrize("decoding", [{"no_repeat_trigram": False, "max_tokens": 16}, {"max_tokens": 1}], ids=str)
def test_the_folder_s_own_decoding_is_followed(
    folders: tuple[Path, Path], tmp_path: Path, decoding: dict[str, Any]
) -> None:
    model, onnx = folders
    bundle = load_bundle(model)
    shutil.copytree(onnx, tmp_path / "onnx")
    config = json.loads((onnx / "config.json").read_text())
    config["decoding"] |= decoding
    (tmp_path / "onnx" / "config.json").write_text(json.dumps(config))
    changed: Bundle = replace(bundle, decoding=DecodingDefaults(**config["decoding"]))
    encoded, _ = changed.encode(make_views(20), precision="float32")
    wanted = changed.search([encoded], num_captions=1, **asdict(changed.decoding))
    found = load_captioner(tmp_path / "onnx").describe_views(make_views(20))
    assert [one.caption for one in found] == [VOCABULARY.decode(captions[0].tokens) for captions in wanted]


def test_attention_is_pytorchs_or_refused(folders: tuple[Path, Path]) -> None:
    model, onnx = folders
    if load_bundle(model).grid is None:
        with pytest.raises(NoAttentionError):
            load_captioner(onnx, with_attention=True)
        return
    options: dict[str, Any]
    for options in ({"beam_size": 1}, {}, {"captions_per_image": 2}):
        wanted = load_captioner(model, with_attention=True, **options).describe_views(make_views(6))
        assert wanted[0].attention is not None
        check_alike(load_captioner(onnx, with_attention=True, **options).describe_views(make_views(6)), wanted)


# ---- the command ------------------------------------------------------------------------------------------


@pytest.fixture
def watched(tmp_path: Path) -> dict[str, str]:
    """An environment in which each Python process logs whether it imported torch."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(WATCH_TORCH)
    path = os.pathsep.join((str(tmp_path / "site"), str(REPOSITORY)))
    return os.environ | {"PYTHONPATH": path, "TORCH_LOG": str(tmp_path / "torch.log")}


def caption(model: Path, output: Path, photos: Path, environment: dict[str, str], *more: str) -> list[dict[str, Any]]:
    command = [sys.executable, "infer/main.py", "--model", model, "--images", photos, "--output", output, *more]
    subprocess.run(command, cwd=REPOSITORY, env=environment, check=True, capture_output=True)
    return [json.loads(line) for line in output.read_text().splitlines()]


@pytest.mark.parametrize("folders", ["attention"], indirect=True)
def test_no_process_imports_torch_and_rows_are_the_same(
    folders: tuple[Path, Path], tmp_path: Path, watched: dict[str, str]
) -> None:
    """The pictures have the size of the views, so that nothing is resized; the log also notices PyTorch's command."""
    model, onnx = folders
    photos, log = tmp_path / "photos", tmp_path / "torch.log"
    photos.mkdir()
    for number in range(20):
        picture(number).resize((VIEW.size, VIEW.size)).save(photos / f"{number:02d}.png")
    sidecar = ["--sidecar", ".txt"]
    gallery = ["--gallery", str(tmp_path / "gallery"), "--workers", "2"]
    found = caption(onnx, tmp_path / "onnx.jsonl", photos, watched, *gallery, *sidecar)
    processes = dict(line.split() for line in log.read_text().splitlines())
    assert set(processes.values()) == {"False"}, processes
    wanted = caption(model, tmp_path / "torch.jsonl", photos, watched, *sidecar)
    assert "True" in log.read_text()
    for row, other in zip(found, wanted, strict=True):
        for name in ("score", "token_scores", "confidence"):
            assert row.pop(name) == pytest.approx(other.pop(name), abs=1.5e-4)
    assert found == wanted


@pytest.mark.parametrize("folders", ["first"], indirect=True)
def test_rows_of_either_kind_continue_each_other(
    folders: tuple[Path, Path], tmp_path: Path, watched: dict[str, str]
) -> None:
    model, onnx = folders
    (tmp_path / "photos").mkdir()
    picture(1).save(tmp_path / "photos" / "1.png")
    caption(model, tmp_path / "c.jsonl", tmp_path / "photos", watched)
    picture(2).save(tmp_path / "photos" / "2.png")
    rows = caption(onnx, tmp_path / "c.jsonl", tmp_path / "photos", watched)
    assert [row["path"] for row in rows] == ["1.png", "2.png"]
    assert len({row["model"] for row in rows}) == 1


@pytest.mark.parametrize("folders", ["attention"], indirect=True)
def test_a_server_gives_the_rows_of_batch_captioning(
    folders: tuple[Path, Path], tmp_path: Path, watched: dict[str, str]
) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(6):
        picture(number).save(tmp_path / "photos" / f"{number}.png")
    wanted = caption(folders[1], tmp_path / "c.jsonl", tmp_path / "photos", watched)
    files = [("image", (row["path"], (tmp_path / "photos" / row["path"]).read_bytes())) for row in wanted]
    with run_server("--model", folders[1]) as served:
        found = httpx.post(f"{served.url}/caption", files=files, timeout=60).raise_for_status().json()
    for row, other in zip(found, wanted, strict=True):
        for name in ("score", "token_scores", "confidence"):
            assert row.pop(name) == pytest.approx(other.pop(name), abs=TOLERANCE)
        assert row == other | {"root": ""}


# ---- refused ----------------------------------------------------------------------------------------------


@pytest.fixture
def copied(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    form: Form = "first"
    onnx_files.export(load_bundle(write_model(tmp_path / "model", form)), tmp_path / "onnx")
    return tmp_path / "onnx"


def test_what_does_not_belong_together_is_refused_in_one_line(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {path.name: path.read_bytes() for path in copied.iterdir()}

    def refusal(name: str, content: bytes | None) -> str:
        for file, data in files.items():
            (copied / file).write_bytes(data)
        (copied / name).unlink() if content is None else (copied / name).write_bytes(content)
        with pytest.raises(UserError) as caught:
            load_captioner(copied)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    config = json.loads(files["config.json"])
    assert "no config.json: an earlier version exported it, export" in refusal("config.json", None)
    for changed in ({"format_version": 9}, {"view": {}}, {"sha256": {}}, {"decoding": {"beam_size": 0}}):
        refusal("config.json", json.dumps(config | changed).encode())
    refusal("config.json", b"cut")
    refusal("vocabulary.json", None)
    assert "cut or changed" in refusal("decoder.onnx", files["decoder.onnx"][:-1])
    assert "encoder.onnx" in refusal("encoder.onnx", None)
    words = VOCABULARY.from_counts({"other": 9}, threshold=1).to_json()
    assert "is not the one that was exported" in refusal("vocabulary.json", words.encode())
    for file, data in files.items():
        (copied / file).write_bytes(data)
    load_captioner(copied)
    with pytest.raises(UserError, match="float32 only: leave out --precision"):
        load_for(CaptionSettings(model=str(copied), precision="bfloat16"))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match="pip install onnxruntime"):
        load_captioner(copied)
