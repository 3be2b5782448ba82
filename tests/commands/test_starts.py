"""How training starts: what is refused leaves nothing, and the same data by another name is the same."""

import json
import re
import shutil
import signal
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import save_file
from tiny_model import write_model
from trainer import start

from captioner import cli
from captioner.errors import UserError
from captioner.model.bundle import load_bundle
from captioner.model.encoders import Encoder
from captioner.vocabulary import Vocabulary
from train.main import main
from train.run import folder
from train.settings import TrainSettings
from train.step.starting_model import complete

GOOD = TrainSettings(
    encoder="small_cnn", weights="none", finetune_encoder_from_step=0, crop=32, embedding_size=8, hidden_size=9,
    epochs=1, batch_size=4, workers=0,
)  # fmt: skip
FROZEN = replace(GOOD, weights="weights.safetensors", finetune_encoder_from_step=None)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, a trained model, encoder weights, and spoilt ones of each; all names in the tests are relative to it."""
    folder = tmp_path_factory.mktemp("starts")
    tiny.write_shards(folder / "shards", [5, 4], size=40)
    tiny.write_shards(folder / "shards", [3], size=40, split="val", first=50)
    tiny.write_shards(folder / "other", [5], size=40, first=20)
    tiny.write_shards(folder / "empty", [0], size=40)
    shutil.copy(folder / "shards" / "vocabulary.json", folder / "empty")
    shutil.copytree(folder / "shards", folder / "wordless")
    (folder / "wordless" / "vocabulary.json").unlink()
    shutil.copytree(folder / "shards", folder / "encoded")
    (folder / "encoded" / "features-small_cnn-grid").touch()  # no folder can be made there
    write_model(folder / "model")
    shutil.copytree(folder / "model", folder / "cut")
    (folder / "cut" / "model.safetensors").write_bytes(b"cut")
    (folder / "text.pth").write_text("no weights")
    for name, encoder in (("weights", "small_cnn"), ("squeezenet", "squeezenet1_1")):
        state = Encoder(encoder, trainable=False).backbone.state_dict()
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / f"{name}.safetensors")
    (folder / "file").touch()
    return folder


@pytest.fixture(autouse=True)
def at_home(data: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The folder with all of it is the current one; the signal handler of a run goes with the test."""
    monkeypatch.chdir(data)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def moved(data: Path, tmp_path: Path) -> Callable[[str], str]:
    """Copies something elsewhere, under another name."""

    def copy(name: str) -> str:
        target = tmp_path / f"moved-{name}"
        (shutil.copytree if (data / name).is_dir() else shutil.copy)(data / name, target)
        return str(target)

    return copy


def listing(folder: Path) -> dict[str, bytes]:
    """All files and folders, with what is in them."""
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in sorted(folder.rglob("*"))}


def refusal(settings: TrainSettings) -> str:
    """The line of a start that is refused and leaves everything as it was."""
    before = listing(Path.cwd())
    with pytest.raises(UserError) as error:
        main(settings)
    assert listing(Path.cwd()) == before
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- refused --------------------------------------------------------------------------------------------------

INIT = replace(
    GOOD, init="model", encoder=None, weights=None, embedding_size=None, hidden_size=None, crop=None,
    finetune_encoder_from_step=None,
)  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (replace(GOOD, encoder="resnet1000"), "no classification model 'resnet1000'"),
        (replace(GOOD, weights="absent.pth"), "weights absent.pth for encoder small_cnn: there is no such file"),
        (replace(GOOD, weights="text.pth"), "text.pth for encoder small_cnn: it is not a readable state dict"),
        (replace(GOOD, weights="squeezenet.safetensors"), "have another shape, such as"),
        (replace(GOOD, weights=None), "small_cnn: it has no pretrained ones"),
        (replace(GOOD, finetune_encoder_from_step=None), "--finetune-encoder-from-step 0"),
        (replace(GOOD, finetune_encoder_from_step=99), "beyond the run's 3 steps"),
        (replace(GOOD, crop=60), "takes crops of 60"),
        (replace(GOOD, encoder="squeezenet1_1", crop=4), "squeezenet1_1 cannot take images of 4 pixels"),
        (replace(GOOD, init="absent"), "absent/config.json"),
        (replace(GOOD, init="cut"), "is cut or changed"),
        (replace(INIT, encoder="resnet152"), "--encoder is resnet152, but the model of --init has small_cnn"),
        (replace(INIT, embedding_size=256), "--embedding-size is 256, but the model of --init has 8"),
        (replace(INIT, hidden_size=512), "--hidden-size is 512, but the model of --init has 9"),
        (replace(INIT, image_input="every-step"), "--image-input is every-step, but the model of --init has first"),
        (replace(INIT, weights="none"), "--weights none is a random encoder"),
        (replace(INIT, weights="default"), "small_cnn: it has no pretrained ones"),
        (replace(INIT, crop=60), "takes crops of 60"),
        (replace(GOOD, shards=("absent",)), "make_shards.py"),
        (replace(GOOD, shards=("empty",)), "holds no samples"),
        (replace(GOOD, shards=("wordless",)), "wordless/vocabulary.json"),
        (replace(GOOD, shards=("shards", "shards/")), "the same shards are given twice (shards/train-000000"),
        (replace(GOOD, epochs=0, self_critical_epochs=1), "--epochs 0 needs --init and --self-critical-epochs"),
        (replace(GOOD, mirrored_features=True), "--mirrored-features needs --cache-features"),
        (replace(INIT, epochs=0), "--epochs 0 needs --init and --self-critical-epochs"),
        (replace(GOOD, batch_size=5, accumulation_steps=2), "--batch-size 5 is the global batch"),
        (replace(GOOD, shards=("other",), patience_epochs=2), "--patience-epochs looks at the val split"),
        (replace(GOOD, output="file"), "file is a file"),
        (replace(GOOD, output="file/run"), "file"),
        (replace(GOOD, wandb="captions"), "pip install wandb"),
        (replace(FROZEN, shards=("encoded",), cache_features=True), "cannot keep features"),
    ],
)  # fmt: skip
def test_a_refused_start_leaves_nothing(settings: TrainSettings, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    output = settings.output if "file" in settings.output else "runs/mine/run"
    shards = settings.shards if settings.shards != TrainSettings.shards else ("shards",)
    assert said in refusal(replace(settings, output=output, shards=shards))


def test_a_precision_that_does_not_exist_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    assert "--mixed_precision fp8 is not supported" in refusal(replace(GOOD, shards=("shards",), output="runs/run"))


def test_what_is_refused_after_the_folder_was_made_takes_it_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights & Biases wants the run folder before it starts."""
    wandb: Any = types.ModuleType("wandb")
    wandb.Error = RuntimeError

    def refuse(**_: Any) -> None:
        assert Path("runs/mine/run").is_dir()
        raise wandb.Error("no API key")

    wandb.init = refuse
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    settings = replace(GOOD, shards=("shards",), output="runs/mine/run", wandb="captions")
    assert "no API key" in refusal(settings)
    Path("runs/mine").mkdir(parents=True)
    Path("runs/mine/notes.txt").touch()
    assert "no API key" in refusal(settings)
    shutil.rmtree("runs")


@pytest.mark.slow
def test_the_corrected_command_runs_where_the_refused_one_was_to(tmp_path: Path) -> None:
    settings = replace(GOOD, shards=("shards",), output=str(tmp_path / "run"))
    for wrong in (
        replace(settings, encoder="resnet1000"), replace(settings, weights="absent.pth"), replace(settings, crop=60),
        replace(settings, init="absent"),
    ):  # fmt: skip
        refusal(wrong)
        assert not (tmp_path / "run").exists()
    main(settings)
    assert load_bundle(tmp_path / "run" / "model").model.config.encoder == "small_cnn"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("own", "said"),
    [
        (["--weights", "absent.pth"], "there is no such file: give other --weights"),
        (["--init", "cut"], "is cut or changed"),
        (["--shards", "wordless"], "wordless/vocabulary.json"),
        (["--shards", "other"], "give all machines the same shards"),
        (["--accumulation-steps", "3"], "--accumulation-steps 3"),
    ],
)
def test_what_one_rank_refuses_ends_all_with_the_same_line(tmp_path: Path, own: list[str], said: str) -> None:
    flags = ["--shards", "shards", "--output", tmp_path / "runs" / "run", "--encoder", "small_cnn", "--weights",
             "weights.safetensors", "--crop", 32, "--batch-size", 4, "--epochs", 1, "--workers", 0]  # fmt: skip
    assert said in line_of_both("train/main.py", flags, own, log=tmp_path / "log")
    assert not (tmp_path / "runs").exists()


def line_of_both(script: str, flags: list[Any], own: list[str], *, log: Path) -> str:
    """What two ranks, the second with flags of its own, say at their end."""
    running = start(script, flags, log=log, world_size=2, rank_flags=[[], own])
    output = running.wait().output
    assert [rank.exitcode for rank in running.ranks] == [2, 2], output
    lines = output.replace("\n", "").split("error: ")[1:]  # both may write at once
    assert len(lines) == 2
    assert len(set(lines)) == 1
    assert "Traceback" not in output
    return lines[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("own", "said"),
    [
        (["--model", "cut"], "is cut or changed"),
        (["--shards", "absent"], "make_shards.py"),
        ([], "has image 50 2 times"),  # which rank 0 finds, at the end
    ],
)
def test_an_evaluation_that_one_rank_refuses_ends_both(tmp_path: Path, own: list[str], said: str) -> None:
    flags = ["--model", "model", "--shards", "shards", "--output", tmp_path / "results.json", "--workers", 0]
    if not own:
        flags[3:4] = ["shards", tiny.write_shards(tmp_path / "again", [2], size=40, split="val", first=50)]
    assert said in line_of_both("train/evaluate.py", flags, own, log=tmp_path / "log")
    assert not (tmp_path / "results.json").exists()


# ---- nothing done -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("split", "said"),
    [
        ("train", "none of the 9 train samples of epoch 1 could be used (shards/train-00000"),
        ("val", "none of the 3 val samples can be used: planned 3, read 0, decoded 0, skipped 3 (3 checksum)"),
    ],
)
def test_a_run_that_can_use_no_sample_makes_no_model(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str, said: str
) -> None:
    shutil.copytree(data / "shards", tmp_path / "shards")
    monkeypatch.chdir(tmp_path)
    for tar in Path("shards").glob(f"{split}-*.tar"):
        tar.write_bytes(tar.read_bytes().replace(b"\xff\xd8\xff", b"\xff\xd8\xfe"))
    with pytest.raises(UserError, match=re.escape(said)):
        main(replace(GOOD, shards=("shards",), output="run", tolerate_bad_samples=99))
    assert not Path("run/model").exists()


@pytest.mark.slow
def test_a_finished_run_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """There is nothing to do, and that is what was asked for: exit code 0."""
    settings = replace(GOOD, shards=("shards",), output=str(tmp_path / "run"))
    main(settings)
    before = listing(tmp_path)
    main(settings)
    assert "is finished already" in capsys.readouterr().out
    assert listing(tmp_path) == before


# ---- the same by another name -----------------------------------------------------------------------------------


def train_unfinished(settings: TrainSettings) -> None:
    """A run that is stopped when all that is left is to write the model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder, "write_model", lambda *_, **__: cli.fail("stopped"))
        with pytest.raises(SystemExit):
            main(settings)


@pytest.mark.slow
def test_a_run_resumes_on_the_same_data_wherever_they_lie(
    data: Path, tmp_path: Path, moved: Callable[[str], str]
) -> None:
    run = tmp_path / "run"
    settings = replace(
        INIT, shards=("shards", "other"), output=str(run), weights="weights.safetensors",
        finetune_encoder_from_step=None,
    )  # fmt: skip
    train_unfinished(settings)
    before = listing(run)
    others: list[tuple[dict[str, Any], str]] = [
        ({"shards": ("other", "shards")}, "or shards in another order (train shards was "),
        ({"shards": ("shards",)}, "train shards was "),
        (
            {"init": None, "encoder": "small_cnn", "embedding_size": 8, "hidden_size": 9, "crop": 32},
            "model of --init was ",
        ),
        ({"weights": "squeezenet.safetensors"}, "encoder weights was "),
        ({"epochs": 2}, "epochs was 1, is 2"),
    ]
    for changed, said in others:
        assert said in refusal(replace(settings, resume=True, **changed))
        assert listing(run) == before
    shards = (f"{data}/shards/", moved("other"))
    again: dict[str, Any] = {"shards": shards, "init": moved("model"), "weights": moved("weights.safetensors")}
    elsewhere = tmp_path / "elsewhere"
    run.rename(elsewhere)
    main(replace(settings, resume=True, output=f"{elsewhere}/", **again))
    assert (elsewhere / "model" / "config.json").exists()
    assert json.loads((elsewhere / "settings.json").read_text())["shards"] == list(shards)


@pytest.mark.parametrize("content", ["[]", '{"epochs": 1}', "cut"])
def test_settings_that_cannot_be_compared_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "settings.json").write_text(content)
    assert str(tmp_path / "settings.json") in refusal(replace(GOOD, shards=("shards",), output=str(tmp_path)))


@pytest.mark.slow
def test_other_words_make_another_run(data: Path, tmp_path: Path, moved: Callable[[str], str]) -> None:
    """The same number of words, so that the checkpoint would load."""
    settings = replace(GOOD, shards=(moved("shards"),), output=str(tmp_path / "run"))
    train_unfinished(settings)
    path = Path(settings.shards[0], "vocabulary.json")
    content = json.loads(path.read_text())
    words = [f"{word}s" if word == content["words"][-1] else word for word in content["words"]]
    counts = dict(zip(words[4:], content["counts"][4:], strict=True))
    path.write_text(Vocabulary.from_counts(counts, threshold=content["threshold"]).to_json())
    assert "vocabulary was " in refusal(replace(settings, resume=True))


# ---- the report names the model that was trained ------------------------------------------------------------


@pytest.mark.slow
def test_settings_and_report_tell_the_model_that_was_trained(tmp_path: Path) -> None:
    run = tmp_path / "run"
    main(replace(INIT, shards=("shards",), output=str(run)))
    told = json.loads((run / "settings.json").read_text())
    wanted = {"encoder": "small_cnn", "embedding_size": 8, "hidden_size": 9, "image_input": "first", "crop": 32}
    assert {name: told[name] for name in wanted} == wanted
    page = (run / "report.html").read_text()
    assert "resnet152" not in page
    assert "small_cnn" in page
    main(replace(INIT, shards=("shards",), output=str(run), encoder="small_cnn", hidden_size=9))  # the same, said


def test_without_init_the_defaults_are_told() -> None:
    told = complete(TrainSettings(), None)
    assert (told.encoder, told.weights, told.image_input) == ("resnet152", "default", "first")
    assert (told.embedding_size, told.hidden_size) == (256, 512)


# ---- resumed --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_epoch_that_was_trained_before_a_kill_is_only_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = replace(GOOD, shards=("shards",), output=str(tmp_path / "run"), epochs=2)

    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("train.evaluation.validation.Evaluator.evaluate", interrupt)
        with pytest.raises(KeyboardInterrupt):
            main(settings)
    capsys.readouterr()
    main(replace(settings, resume=True))
    printed = capsys.readouterr().out
    assert "2 epochs of 3 steps on 1 x cpu, 3 of them done" in printed
    lines = re.findall(r"^epoch (\d: \w+)", printed, flags=re.MULTILINE)
    assert lines == ["1: validation", "2: training", "2: validation"]
    main(replace(settings, output=str(tmp_path / "undisturbed")))
    for name in ("model/model.safetensors", "validation.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()
