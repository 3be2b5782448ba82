"""Ranks with unequal work: a slow one is waited for, a lost one is noticed, an error is raised on all."""

import signal
import time
from pathlib import Path

import pytest
import torch
from consumer import start_side_by_side
from tiny import write_shards
from trainer import start, start_training

from captioner.model.encoders import Encoder

pytestmark = pytest.mark.slow

PEER_SECONDS = 3.0


@pytest.mark.parametrize(
    ("actions", "wanted"),
    [
        (("sleep 0", "sleep 6"), [0, 0]),
        (("sleep 6", "sleep 0"), [0, 0]),
        (("sleep 0", "fail"), [2, 2]),
        (("sleep 0", "kill"), [75, -signal.SIGKILL]),
        (("kill", "sleep 2"), [-signal.SIGKILL, 75]),
        (("sleep 0", "stop"), [75, None]),
        (("leave", "sleep 2"), [75, 75]),
    ],
    ids=lambda given: ", ".join(given) if isinstance(given, tuple) else "",
)
def test_a_slow_rank_is_waited_for_and_a_lost_one_is_noticed(
    actions: tuple[str, ...], wanted: list[int | None]
) -> None:
    ranks = start_side_by_side(2, peer_seconds=PEER_SECONDS, actions=actions)
    deadline = time.monotonic() + 30
    while [rank.exitcode for rank in ranks] != wanted and time.monotonic() < deadline:
        time.sleep(0.02)
    found = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
    assert found == wanted


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("barriers") / "shards"
    write_shards(folder, (4,), split="val")
    return write_shards(folder, (5, 4))


def test_whatever_one_rank_does_alone_in_training_may_take_long(shards: str, tmp_path: Path) -> None:
    """Everything takes it longer than the timeout for a lost rank; then a split is scored so, and with a lost rank."""
    weights = tmp_path / "weights.pt"
    torch.save(Encoder("small_cnn", trainable=False).backbone.state_dict(), weights)
    slow = [
        "train.step.starting_model:load_encoder_weights:0",  # a download
        "train.run.encode:_write_shards:1",
        "accelerate:Accelerator.save_state:1",
        "captioner.metrics:References.image_scores:0",
        "train.run.folder:save_bundle:0",
    ]
    run = tmp_path / "run"
    flags = ["--shards", shards, "--encoder", "small_cnn", "--crop", 28, "--batch-size", 4, "--epochs", 1]
    flags += ["--workers", 0]
    more = ["--weights", weights, "--cache-features", "--embedding-size", 8, "--hidden-size", 8, "--output", run]
    running = start_training([*flags, *more], log=tmp_path / "log", world_size=2, peer_seconds=PEER_SECONDS, slow=slow)
    done = running.wait()
    assert [rank.exitcode for rank in running.ranks] == [0, 0], done.output
    assert done.output.count("was slow") == len(slow)

    scoring = ["--model", run / "model", "--shards", shards, "--output", tmp_path / "results.json", "--workers", 0]
    running = start("train/evaluate.py", scoring, log=tmp_path / "scoring", world_size=2, peer_seconds=PEER_SECONDS,
                    slow=["train.evaluation.model_scores:report_scores:0"])  # fmt: skip
    done = running.wait()
    assert [rank.exitcode for rank in running.ranks] == [0, 0], done.output
    assert "was slow" in done.output

    results = tmp_path / "again.json"
    again = [results if value == tmp_path / "results.json" else value for value in scoring]
    running = start("train/evaluate.py", again, log=tmp_path / "lost", world_size=2, peer_seconds=PEER_SECONDS,
                    slow=["train.evaluation.model_scores:report_scores:0"])  # fmt: skip
    while not results.exists():
        time.sleep(0.02)
    running.ranks[1].kill()
    lines = running.wait().output.splitlines()
    assert running.ranks[0].exitcode == 75
    (line,) = [line for line in lines if "lost contact with another process of this job" in line]
    assert line.endswith("run the same command again")
    assert not any("Traceback" in line for line in lines)
