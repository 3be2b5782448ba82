"""Real training runs, as a user starts them: one process, two processes, stopped and resumed."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from random import Random
from typing import Any

import pytest
import tiny
import torch
import warm
from consumer import context, wait
from safetensors.torch import load_file, save_file
from servers import free_port
from tiny_model import FORMS, Form, caption_views, form_options
from trainer import Done, Running, run_training, start_training

from captioner.flags import flag_name
from captioner.images.views import ViewSpec
from captioner.model.bundle import load_bundle
from captioner.model.encoders import Encoder
from captioner.model.network import ModelConfig, build_model
from captioner.streaming.dataset import read_split
from scenes import SceneSettings
from scenes import main as draw_scenes
from sharding.make_shards import main as make_shards
from sharding.settings import ShardSettings
from train.data.batches import caption_loader
from train.run.job import how_to_continue
from train.run.launch import start_accelerator
from train.settings import TrainSettings
from train.step.schedule import make_optimizer
from train.step.step import CaptionLoss, distribute

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]
TORCHRUN = ("torchrun", "--nproc_per_node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0")
NUM_TRAIN, NUM_VAL, BATCH = 33, 10, 8  # the last batch holds one image: the second rank has none
STEPS = 5  # of an epoch
SMALL = ("--batch-size", BATCH, "--embedding-size", 16, "--hidden-size", 24)
FRESH = ("--encoder", "small_cnn", "--weights", "none", "--finetune-encoder-from-step", 0, "--crop", 32)
MODEL = (*map(str, (*SMALL, *FRESH)),)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    draw_scenes(SceneSettings(output=folder, train=NUM_TRAIN, val=NUM_VAL))
    make_shards(
        ShardSettings(
            images=str(folder), captions=str(folder / "annotations"), output=str(folder / "shards"), size=36, workers=1
        )
    )
    return folder / "shards"


EPOCHS = ("--epochs", 2, "--self-critical-epochs", 1)


def train(shards: Path, output: Path, *flags: str, launcher: tuple[str, ...] = ("python",), **environment: str):
    """Start a training command; returns the finished process."""
    command = [str(Path(sys.executable).parent / launcher[0]), *launcher[1:], str(REPOSITORY / "train/main.py")]
    arguments = ["--shards", str(shards), "--output", str(output), *MODEL, *flags]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    return warm.run(
        command + arguments, env=clean | environment, capture_output=True, text=True, timeout=300, nested=True
    )


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_bundle(output / "model").model.state_dict()


def validation_rows(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "validation.jsonl").read_text().splitlines()]


def flags(shards: Path, output: Path, *more: object) -> list[object]:
    return ["--shards", shards, "--output", output, *SMALL, *FRESH, "--workers", 0, *more]


def run(shards: Path, output: Path, *more: object, world_size: int = 1) -> Done:
    """A run that comes to its end."""
    return run_training(flags(shards, output, *more), log=output.with_suffix(".log"), world_size=world_size)


def finished(shards: Path, output: Path, *more: object, world_size: int = 1) -> str:
    """What a run that ends well prints."""
    done = run(shards, output, *more, world_size=world_size)
    assert done.code == 0, done.output
    return done.output


def history(output: Path) -> dict[int, dict]:
    """The curves' values, by step."""
    rows: dict[int, dict] = {}
    for line in (output / "history.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows[row["step"]] = rows.get(row["step"], {}) | row
    return rows


def checkpoints(output: Path) -> list[Path]:
    return sorted(path.parent for path in output.glob("checkpoints/*/complete.json"))


def wait_for(condition: Callable[[], object], running: Running, *, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, running.log.read_text()
        assert running.ranks[0].exitcode is None, running.log.read_text()
        time.sleep(0.01)


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    finished(shards, output, *EPOCHS)
    return output


def test_a_run_leaves_a_model_curves_and_a_page(undisturbed: Path) -> None:
    assert len(validation_rows(undisturbed)) == NUM_VAL
    metrics = json.loads((undisturbed / "model" / "metrics.json").read_text())
    assert {"bleu4", "cider", "validation_loss"} <= metrics.keys()
    rows = history(undisturbed)
    best = max(rows[step]["validation/cider"] for step in (STEPS, 2 * STEPS, 3 * STEPS))
    assert metrics["cider"] == best  # the best epoch's model, not the last one's
    assert metrics["cider_low"] <= best <= metrics["cider_high"]
    assert {"validation/mean_tokens", "validation/different_captions"} <= rows[STEPS].keys()
    assert "validation/cider_low" not in rows[STEPS]
    assert {"train/loss", "train/learning_rate", "train/images_per_second", "train/waiting_share"} <= rows[10].keys()
    assert rows[3 * STEPS]["epoch"] == 3
    assert not (undisturbed / "checkpoints").exists()
    assert "<svg" in (undisturbed / "report.html").read_text()
    assert list((undisturbed / "tensorboard").iterdir())
    assert len((undisturbed / "samples.jsonl").read_text().splitlines()) == 3


def test_the_model_folder_scores_what_training_said(undisturbed: Path, shards: Path) -> None:
    bundle = load_bundle(undisturbed / "model")
    split = read_split([str(shards)], "val", remedy="")
    loader = caption_loader(split, batch_size=4, vocabulary=bundle.vocabulary, crop=32, max_tokens=20)
    captions = [c for (batch,) in loader for c in caption_views(bundle, batch.inputs.numpy())]
    wanted = [row["caption"] for row in validation_rows(undisturbed)]
    assert [bundle.vocabulary.decode(caption.tokens) for caption in captions] == wanted


# ---- the same on any number of processes ----------------------------------------------------------------------


def test_two_processes_train_as_one_does(shards: Path, tmp_path: Path) -> None:
    """10 steps in float32, the encoder's batch norm among them, over an epoch's last batch of one image."""
    for world_size in (1, 2):
        output = tmp_path / str(world_size)
        printed = finished(shards, output, "--input-dropout", 0, "--dropout", 0, "--epochs", 2, world_size=world_size)
        assert f"{world_size} x cpu" in printed
        for epoch in (1, 2):
            assert f"epoch {epoch}: training loss" in printed
            assert f"planned {NUM_TRAIN}, read {NUM_TRAIN}, decoded {NUM_TRAIN}, skipped 0, repeated 0" in printed
    one, two = (history(tmp_path / name) for name in ("1", "2"))
    assert one.keys() == two.keys() == {5, 10}
    for step, row in one.items():
        for name in ("train/loss", "validation/loss"):
            assert two[step][name] == pytest.approx(row[name], abs=1e-4), (step, name)
    rows = validation_rows(tmp_path / "2")
    assert [row["image_id"] for row in rows] == list(range(1, NUM_VAL + 1))


def test_two_processes_learn_from_the_same_samples_as_one(shards: Path, tmp_path: Path) -> None:
    """An epoch of self-critical training in float32, over a last batch of one image."""
    phases = ("--epochs", 1, "--self-critical-epochs", 1, "--self-critical-learning-rate", 1e-3)
    for world_size in (1, 2):
        output = tmp_path / str(world_size)
        printed = finished(shards, output, "--input-dropout", 0, "--dropout", 0, *phases, world_size=world_size)
        assert "epoch 1: training loss" in printed
        assert "epoch 2: training reward" in printed
    one, two = (history(tmp_path / name) for name in ("1", "2"))
    assert two[10]["train/reward"] == pytest.approx(one[10]["train/reward"], abs=1e-3)
    assert two[10]["validation/loss"] == pytest.approx(one[10]["validation/loss"], abs=1e-3)
    assert one[10]["validation/loss"] != pytest.approx(one[5]["validation/loss"], abs=1e-3)


def _draw(rank: int, world_size: int, port: int, folder: Path) -> None:
    """One rank: its initial weights, and what it draws at first, after a checkpoint, and after going back to that."""
    os.environ |= {"ACCELERATE_USE_CPU": "true"}
    if world_size > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
        os.environ |= {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in names.items()}
    accelerator = start_accelerator(seed=3)
    config = ModelConfig(encoder="small_cnn", vocabulary_size=10, embedding_size=6, hidden_size=7, dropout=0.5)
    model = build_model(config, encoder_trainable=True)
    optimizer = make_optimizer(model, 1e-3, encoder_learning_rate=1e-3)
    wrapped, _ = distribute(CaptionLoss(model, view=ViewSpec(size=32, crop=32)), optimizer, accelerator)
    assert not wrapped.broadcast_buffers

    def mask() -> torch.Tensor:
        return model.drop(torch.ones(64))

    def saved_by(num_ranks: int) -> str:
        return str(folder / f"checkpoint-{num_ranks}")

    found: dict[str, Any] = {"weights": model.state_dict(), "first": mask()}
    accelerator.save_state(saved_by(world_size))
    accelerator.wait_for_everyone()  # rank 0 writes the weights
    found["after the checkpoint"] = mask()
    for num_ranks in (1, world_size):
        accelerator.load_state(saved_by(num_ranks))
        found[f"resumed after {num_ranks}"] = mask()
    torch.save(found, folder / f"{world_size}-{rank}.pt")
    accelerator.end_training()


def test_ranks_draw_their_own_noise_and_start_with_the_same_weights(tmp_path: Path) -> None:
    """On a resume too, of a run that had fewer ranks."""
    found = {}
    for world_size in (1, 2):
        port = free_port()
        ranks = [context.Process(target=_draw, args=(rank, world_size, port, tmp_path)) for rank in range(world_size)]
        for rank in ranks:
            rank.start()
        wait(ranks)
        found |= {(world_size, rank): torch.load(tmp_path / f"{world_size}-{rank}.pt") for rank in range(world_size)}
    one, first, second = found[1, 0], found[2, 0], found[2, 1]
    assert one["first"].unique().tolist() == [0, 2]
    for rank in (first, second):
        torch.testing.assert_close(rank["weights"], one["weights"], rtol=0, atol=0)
        assert torch.equal(rank["resumed after 2"], rank["after the checkpoint"])
    assert torch.equal(first["first"], one["first"])
    for name in ("first", "after the checkpoint", "resumed after 1"):
        assert not torch.equal(first[name], second[name]), name


def test_micro_batches_add_up_on_two_processes(shards: Path, tmp_path: Path) -> None:
    """The encoder is trained from the middle on, and micro-batches differ from the batch by their batch norm alone."""
    more = ("--epochs", 2, "--finetune-encoder-from-step", 6, "--scheduled-sampling", 0.3, "--label-smoothing", 0.1)
    printed = finished(shards, tmp_path / "run", *more, "--accumulation-steps", 2, world_size=2)
    assert "2 epochs of 5 steps on 2 x cpu" in printed
    assert {step for step, row in history(tmp_path / "run").items() if "train/loss" in row} == {5, 10}


def test_a_batch_that_cannot_be_divided_is_refused(shards: Path, tmp_path: Path) -> None:
    done = run(shards, tmp_path / "run", "--accumulation-steps", 3)
    assert done.code == 2
    assert "error: --batch-size 8 is the global batch and must be a multiple" in done.output


# ---- stopped and resumed ------------------------------------------------------------------------------------


def test_killed_three_times_and_resumed_gives_the_undisturbed_weights_bit_for_bit(
    shards: Path, tmp_path: Path, undisturbed: Path
) -> None:
    output, log, random = tmp_path / "run", tmp_path / "run.log", Random(7)
    again = (*EPOCHS, "--checkpoint-steps", 1, "--resume")
    for workers in (0, 1, 2):
        running = start_training(flags(shards, output, *again, "--workers", workers), log=log)
        before = set(checkpoints(output))
        wanted = random.randint(1, 4)
        wait_for(lambda w=wanted, b=before: len(set(checkpoints(output)) - b) and _newest(output) >= w, running)
        time.sleep(0.05 * random.random())
        running.kill()
        assert not (output / "model").exists(), "it ended before it was killed"
    printed = finished(shards, output, *again)
    done_before = [int(number) for number in re.findall(r"(\d+) of them done", printed)]
    assert len(done_before) == 4
    assert done_before == sorted(done_before)
    assert done_before[-1] > 0
    expected = weights(undisturbed)
    for name, tensor in weights(output).items():
        assert torch.equal(tensor, expected[name]), name
    found, wanted_rows = history(output), history(undisturbed)
    for step in (5, 10, 15):
        assert found[step]["validation/cider"] == wanted_rows[step]["validation/cider"]


def _newest(output: Path) -> int:
    """The step of the newest checkpoint in its epoch."""
    return int(checkpoints(output)[-1].name.split("-")[-1])


@pytest.mark.parametrize("world_size", [1, 2])
def test_sigterm_saves_and_says_so(shards: Path, tmp_path: Path, undisturbed: Path, world_size: int) -> None:
    output, log = tmp_path / "run", tmp_path / "run.log"
    running = start_training(flags(shards, output, *EPOCHS), log=log, world_size=world_size)
    wait_for((output / "history.jsonl").exists, running)
    for rank in running.ranks:
        os.kill(rank.pid, signal.SIGTERM)
    done = running.wait()
    assert done.code == 75, done.output
    assert "stopped by SIGTERM" in done.output
    assert not (output / "model").exists()
    assert checkpoints(output)
    finished(shards, output, *EPOCHS, "--resume")
    if world_size == 1:
        for name, tensor in weights(output).items():
            assert torch.equal(tensor, weights(undisturbed)[name]), name


def test_ctrl_c_says_how_to_continue(shards: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    running = start_training(flags(shards, output, *EPOCHS, "--checkpoint-steps", 1), log=tmp_path / "run.log")
    wait_for(lambda: checkpoints(output), running)
    os.kill(running.ranks[0].pid, signal.SIGINT)
    assert "with --resume continues from the newest checkpoint" in running.wait().output


def test_without_a_checkpoint_only_feature_files_are_reused(tmp_path: Path) -> None:
    settings = TrainSettings(output=str(tmp_path / "run"))
    assert how_to_continue(settings).endswith("--resume begins at the first step")
    assert "reuses the feature files that are complete" in how_to_continue(replace(settings, cache_features=True))


def test_an_unfinished_run_is_resumed_only_when_asked(shards: Path, tmp_path: Path) -> None:
    output, log = tmp_path / "run", tmp_path / "run.log"
    running = start_training(flags(shards, output, *EPOCHS, "--checkpoint-steps", 1), log=log)
    wait_for(lambda: checkpoints(output), running)
    running.kill()
    done = run(shards, output, *EPOCHS)
    assert done.code == 2
    assert "continue with --resume" in done.output.splitlines()[-1]


def test_checkpoints_hold_no_frozen_weights_and_are_few(shards: Path, tmp_path: Path, pretrained: Path) -> None:
    output, log = tmp_path / "run", tmp_path / "run.log"
    encoder = ("--encoder", "small_cnn", "--weights", pretrained, "--crop", 32)
    data = ("--shards", shards, "--output", output, "--workers", 0)
    flags = [*data, *SMALL, *encoder, "--epochs", 40, "--keep-checkpoints", 1]
    running = start_training(flags, log=log)
    wait_for(lambda: any(path.name.startswith("epoch-0003") for path in checkpoints(output)), running)
    running.kill()
    kept = checkpoints(output)
    assert 1 <= len(kept) <= 3  # the newest, the best, and one that was being replaced
    names = set(load_file(kept[-1] / "model.safetensors"))
    assert "model.embed.weight" in names
    assert not {name for name in names if "encoder" in name}
    assert set(load_file(output / "encoder.safetensors")) == set(load_file(pretrained))
    pretrained.unlink()  # a resumed run does not need it
    running = start_training([*flags, "--resume"], log=log)
    wait_for(lambda: any(path.name.startswith("epoch-0004") for path in checkpoints(output)), running)
    running.kill()


@pytest.fixture
def pretrained(tmp_path: Path) -> Path:
    """Weights of a small encoder, as a user would bring them."""
    path = tmp_path / "encoder.safetensors"
    save_file(
        {
            name: tensor.contiguous()
            for name, tensor in Encoder("small_cnn", trainable=False).backbone.state_dict().items()
        },
        path,
    )
    return path


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_full_disk_leaves_the_checkpoint_before_usable(shards: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], check=True)
    try:
        output, log = disk / "run", tmp_path / "run.log"
        more = (*EPOCHS, "--checkpoint-steps", 1, "--keep-checkpoints", 50)
        done = run_training(flags(shards, output, *more), log=log)
        assert done.code == 2, done.output
        (last,) = [line for line in done.output.splitlines() if line.startswith("error:")]
        assert "cannot write" in last
        assert "is complete: make room, then continue with --resume" in last
        assert str(checkpoints(output)[-1]) in last
        subprocess.run(["mount", "-o", "remount,size=400m", str(disk)], check=True)
        assert run_training(flags(shards, output, *more, "--resume"), log=log).code == 0
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_loss_that_is_not_finite_ends_the_run(shards: Path, tmp_path: Path) -> None:
    done = run(shards, tmp_path / "run", "--epochs", 2, "--learning-rate", "1e38", "--schedule", "constant")
    assert done.code == 2
    last = done.output.splitlines()[-1]
    assert re.search(r"error: the (loss|gradient) of step \d is (nan|inf): lower --learning-rate", last)
    assert not checkpoints(tmp_path / "run")


def test_it_stops_when_cider_does_not_improve(shards: Path, tmp_path: Path) -> None:
    more = ("--epochs", 30, "--learning-rate", "1e-9", "--encoder-learning-rate", "1e-9", "--patience-epochs", 2)
    finished(shards, tmp_path / "run", *more)
    rows = history(tmp_path / "run")
    ciders = [row["validation/cider"] for row in rows.values() if "validation/cider" in row]
    assert len(ciders) == ciders.index(max(ciders)) + 3


# ---- from a trained model -----------------------------------------------------------------------------------


def test_a_trained_model_continues_with_new_words(shards: Path, undisturbed: Path, tmp_path: Path) -> None:
    mine = Path(tiny.write_shards(tmp_path / "mine", [6], size=36))
    tiny.write_shards(tmp_path / "mine", [3], size=36, split="val", first=50)
    start = ["--shards", mine, "--output", tmp_path / "run", "--init", undisturbed / "model", "--epochs", 1]
    done = run_training([*start, "--batch-size", 4, "--workers", 0], log=tmp_path / "log")
    assert done.code == 0, done.output
    before, after = load_bundle(undisturbed / "model"), load_bundle(tmp_path / "run/model")
    known = len(before.vocabulary)
    assert after.vocabulary.words[:known] == before.vocabulary.words
    assert "bicycle" in after.vocabulary.words[known:]
    for name, tensor in before.model.encoder.state_dict().items():  # frozen
        assert torch.equal(after.model.encoder.state_dict()[name], tensor), name
    assert after.model.config.embedding_size == 16
    refused = run_training(
        [*start[:2], "--output", tmp_path / "other", *start[4:], "--hidden-size", 64], log=tmp_path / "l"
    )
    assert refused.code == 2
    assert "--hidden-size is 64, but the model of --init has 24" in refused.output


def test_a_trained_model_continues_with_self_critical_steps_alone(
    shards: Path, undisturbed: Path, tmp_path: Path
) -> None:
    steps = ["--epochs", 0, "--self-critical-epochs", 1, "--batch-size", 8, "--workers", 0]
    start = ["--shards", shards, "--output", tmp_path / "run", "--init", undisturbed / "model"]
    done = run_training([*start, *steps], log=tmp_path / "log")
    assert done.code == 0, done.output
    assert "epoch 1: training reward" in done.output
    before, after = (load_bundle(folder / "model").model.state_dict() for folder in (undisturbed, tmp_path / "run"))
    changed = [name for name, tensor in before.items() if not torch.equal(after[name], tensor)]
    assert "predict.weight" in changed
    assert not any(name.startswith("encoder") for name in changed)


# ---- as a user starts it ------------------------------------------------------------------------------------


def test_torchrun_starts_two_processes(shards: Path, tmp_path: Path) -> None:
    done = train(shards, tmp_path / "run", "--epochs", "1", launcher=TORCHRUN, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    assert "2 x cpu" in done.stdout
    assert [row["image_id"] for row in validation_rows(tmp_path / "run")] == list(range(1, NUM_VAL + 1))


RANKS_DIFFER = """
import torch
from accelerate import Accelerator
from train.step.step import check_same_weights
accelerator = Accelerator()
model = torch.nn.Linear(2, 2)
torch.nn.init.constant_(model.weight, 1.0)
torch.nn.init.constant_(model.bias, 1e-7 * accelerator.process_index)
check_same_weights(model, accelerator)
"""


def test_ranks_with_other_weights_are_noticed(tmp_path: Path) -> None:
    script = tmp_path / "differ.py"
    script.write_text(RANKS_DIFFER)
    program = str(Path(sys.executable).parent / TORCHRUN[0])
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    command = [program, *TORCHRUN[1:], str(script)]
    done = warm.run(command, env=environment, capture_output=True, text=True, nested=True)
    assert done.returncode != 0
    assert "the ranks hold different weights" in done.stderr


LONELY_LAUNCH = ("accelerate", "launch", "--cpu", "--num_processes", "2")


@pytest.mark.parametrize(("launcher", "announced"), [(TORCHRUN, "2"), (LONELY_LAUNCH, "several")])
def test_a_launch_that_gives_fewer_processes_than_announced_is_refused(
    shards: Path, tmp_path: Path, launcher: tuple[str, ...], announced: str
) -> None:
    """Without GPUs each process of a plain torchrun trains alone, and accelerate starts only one."""
    if torch.cuda.is_available():
        pytest.skip("on a machine with GPUs these launches give what they announce")
    done = train(shards, tmp_path / "run", launcher=launcher)
    assert done.returncode != 0
    assert f"error: the environment announces {announced} processes" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_damaged_sample_stops_training_unless_it_is_tolerated(shards: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "shards"
    shutil.copytree(shards, damaged)
    tar = damaged / "train-000000.tar"
    data = bytearray(tar.read_bytes())
    data[1000] ^= 1  # in the first picture
    tar.write_bytes(data)
    refused = run(damaged, tmp_path / "refused", "--epochs", 1)
    assert refused.code == 2
    assert f"{tar} is damaged at sample train-000000000, field jpg (checksum differs)" in refused.output
    printed = finished(damaged, tmp_path / "run", "--epochs", 1, "--tolerate-bad-samples", 1)
    assert "planned 33, read 32, decoded 32, skipped 1 (1 checksum), repeated 0" in printed
    (row,) = map(json.loads, (tmp_path / "run/skipped.jsonl").read_text().splitlines())
    assert (row["split"], row["epoch"], row["reason"]) == ("train", 1, "checksum")
    assert str(tar) in row["message"]


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_trains_and_evaluates(shards: Path, tmp_path: Path, form: Form) -> None:
    options = [(flag_name(name), value) for name, value in form_options(form).items()]
    more = ("--epochs", 1, "--self-critical-epochs", 1, *chain.from_iterable(options))
    launched = {"ACCELERATE_MIXED_PRECISION": "bf16"}  # as `accelerate launch --mixed_precision bf16` does
    running = start_training(flags(shards, tmp_path / "run", *more), log=tmp_path / "run.log", environment=launched)
    done = running.wait()
    assert done.code == 0, done.output
    assert len(validation_rows(tmp_path / "run")) == NUM_VAL
    assert {tensor.dtype for tensor in weights(tmp_path / "run").values()} == {torch.float32, torch.int64}


def test_a_finished_run_stays_and_other_settings_are_refused(shards: Path, undisturbed: Path) -> None:
    before = (undisturbed / "model" / "model.safetensors").stat().st_mtime_ns
    assert "finished already" in finished(shards, undisturbed, *EPOCHS)
    assert (undisturbed / "model" / "model.safetensors").stat().st_mtime_ns == before
    other = run(shards, undisturbed, "--epochs", 4, *EPOCHS[2:])
    assert other.code == 2
    assert "epochs was 2, is 4" in other.output.splitlines()[-1]


def test_missing_shards_name_the_command_that_makes_them(tmp_path: Path) -> None:
    done = run(tmp_path / "nowhere", tmp_path / "run")
    assert done.code == 2
    assert "make_shards.py" in done.output.splitlines()[-1]


def test_a_random_frozen_encoder_is_refused(shards: Path, tmp_path: Path) -> None:
    model = ("--encoder", "small_cnn", "--weights", "none", "--crop", 32)
    done = run_training(["--shards", shards, "--output", tmp_path / "r", *model], log=tmp_path / "log")
    assert done.code == 2
    assert "--finetune-encoder-from-step 0" in done.output
