"""Real training runs, as a user starts them: one process, two processes, stopped and resumed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from captioner.bundle import load_bundle
from scenes import SceneSettings
from scenes import main as draw_scenes
from sharding.make_shards import main as make_shards
from sharding.settings import ShardSettings

REPOSITORY = Path(__file__).resolve().parent.parent
TORCHRUN = ("torchrun", "--nproc_per_node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0")
MODEL = ("--encoder", "small_cnn", "--weights", "none", "--train-encoder", "--crop", "32")
NUM_TRAIN, NUM_VAL, BATCH = 33, 10, 8  # the last batch holds one image: the second rank has none


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


def train(shards: Path, output: Path, *flags: str, launcher: tuple[str, ...] = ("python",), **environment: str):
    """Start a training command; returns the finished process."""
    command = [str(Path(sys.executable).parent / launcher[0]), *launcher[1:], str(REPOSITORY / "train/main.py")]
    arguments = ["--shards", str(shards), "--output", str(output), *MODEL, "--batch-size", str(BATCH), *flags]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    return subprocess.run(
        command + arguments, env=clean | environment, capture_output=True, text=True, check=False, timeout=300
    )


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_bundle(output / "model").model.state_dict()


def validation_rows(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "validation.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    done = train(shards, output, "--epochs", "2", "--workers", "0")
    assert done.returncode == 0, done.stderr
    return output


def test_one_process_trains_evaluates_and_writes_a_model(undisturbed: Path) -> None:
    assert len(validation_rows(undisturbed)) == NUM_VAL
    metrics = json.loads((undisturbed / "model" / "metrics.json").read_text())
    assert {"bleu4", "cider", "validation_loss"} <= metrics.keys()
    assert not (undisturbed / "checkpoints").exists()


def test_two_processes_reach_the_same_weights_and_evaluate_each_image_once(shards: Path, tmp_path: Path) -> None:
    """The run itself compares all ranks' weights after each epoch (`check_same_weights`) and fails on a difference."""
    done = train(shards, tmp_path / "run", "--epochs", "2", launcher=TORCHRUN, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    assert "2 x cpu" in done.stdout
    for epoch in (1, 2):
        assert f"epoch {epoch}: planned 33, read 33, decoded 33, skipped 0, repeated 0" in done.stdout
    ids = [row["image_id"] for row in validation_rows(tmp_path / "run")]
    assert sorted(ids) == list(range(1, NUM_VAL + 1))


def test_a_damaged_sample_stops_training_unless_it_is_tolerated(shards: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "shards"
    shutil.copytree(shards, damaged)
    tar = damaged / "train-000000.tar"
    data = bytearray(tar.read_bytes())
    data[1000] ^= 1  # in the first picture
    tar.write_bytes(data)
    refused = train(damaged, tmp_path / "refused", "--epochs", "1")
    assert refused.returncode == 2
    assert f"{tar} is damaged at sample train-000000000 (checksum differs)" in refused.stderr
    done = train(damaged, tmp_path / "run", "--epochs", "1", "--tolerate-bad-samples", "1")
    assert done.returncode == 0, done.stderr
    assert "epoch 1: planned 33, read 32, decoded 32, skipped 1 (1 checksum), repeated 0" in done.stdout
    (row,) = map(json.loads, (tmp_path / "run/skipped.jsonl").read_text().splitlines())
    assert (row["split"], row["epoch"], row["reason"]) == ("train", 1, "checksum")
    assert str(tar) in row["message"]


@pytest.mark.parametrize("image_input", ["first", "every-step"])
def test_bfloat16_trains_and_evaluates(shards: Path, tmp_path: Path, image_input: str) -> None:
    launcher = ("accelerate", "launch", "--mixed_precision", "bf16")
    done = train(shards, tmp_path / "run", "--epochs", "1", "--image-input", image_input, launcher=launcher)
    assert done.returncode == 0, done.stderr
    assert len(validation_rows(tmp_path / "run")) == NUM_VAL
    assert {tensor.dtype for tensor in weights(tmp_path / "run").values()} == {torch.float32, torch.int64}


RANKS_DIFFER = """
import torch
from accelerate import Accelerator
from train.step import check_same_weights
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
    done = subprocess.run(
        [program, *TORCHRUN[1:], str(script)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "the ranks hold different weights" in done.stderr


LONELY_LAUNCH = ("accelerate", "launch", "--cpu", "--num_processes", "2")


@pytest.mark.parametrize(("launcher", "announced"), [(TORCHRUN, "2"), (LONELY_LAUNCH, "several")])
def test_a_launch_that_gives_fewer_processes_than_announced_is_refused(
    shards: Path, tmp_path: Path, launcher: tuple[str, ...], announced: str
) -> None:
    """Without GPUs both processes of a plain torchrun would believe to be alone, and accelerate starts only one."""
    if torch.cuda.is_available():
        pytest.skip("on a machine with GPUs these launches give what they announce")
    done = train(shards, tmp_path / "run", launcher=launcher)
    assert done.returncode != 0
    assert f"error: the environment announces {announced} processes" in done.stderr
    assert not (tmp_path / "run").exists()


def test_killed_and_resumed_with_other_workers_gives_the_undisturbed_weights(
    shards: Path, tmp_path: Path, undisturbed: Path
) -> None:
    output = tmp_path / "run"
    command = [sys.executable, str(REPOSITORY / "train/main.py"), "--shards", str(shards), "--output", str(output)]
    flags = [*MODEL, "--batch-size", str(BATCH), "--epochs", "2", "--checkpoint-steps", "1", "--workers", "1"]
    process = subprocess.Popen(command + flags, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(output.glob("checkpoints/*/complete.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (output / "model").exists(), "it ended before it was killed"
    done = train(shards, output, "--epochs", "2", "--workers", "0")
    assert done.returncode == 0, done.stderr
    assert "resuming at" in done.stdout
    expected = weights(undisturbed)
    for name, tensor in weights(output).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_a_finished_run_stays_and_other_settings_are_refused(shards: Path, undisturbed: Path) -> None:
    before = (undisturbed / "model" / "model.safetensors").stat().st_mtime_ns
    again = train(shards, undisturbed, "--epochs", "2", "--workers", "0")
    assert again.returncode == 0
    assert "finished already" in again.stdout
    assert (undisturbed / "model" / "model.safetensors").stat().st_mtime_ns == before
    other = train(shards, undisturbed, "--epochs", "3")
    assert other.returncode == 2
    assert "epochs was 2, is 3" in other.stderr
    assert len(other.stderr.strip().splitlines()) == 1


def test_missing_shards_name_the_command_that_makes_them(tmp_path: Path) -> None:
    done = train(tmp_path / "nowhere", tmp_path / "run")
    assert done.returncode == 2
    assert "make_shards.py" in done.stderr.strip().splitlines()[-1]


def test_a_random_frozen_encoder_is_refused(shards: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(REPOSITORY / "train/main.py"),
        "--shards",
        str(shards),
        "--output",
        str(tmp_path / "r"),
    ]
    done = subprocess.run(
        [*command, "--encoder", "small_cnn", "--weights", "none"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "--train-encoder" in done.stderr
