"""The examples of training a model of one's own, run as a user would, in a folder with names like ours."""

import importlib.util
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import warm
from PIL import Image
from safetensors.torch import load_file
from streaming_data import write_tar

from captioner.streaming import index_shards

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "white": (250,) * 3, "black": (0,) * 3}
SECONDS = 240
DIES = """
import builtins, os, runpy, signal, sys

def print_and_die(*words, plain=print, lines=[], **options):
    plain(*words, **options)
    lines.append(words)
    if len(lines) == 5:
        os.kill(os.getpid(), signal.SIGKILL)

builtins.print = print_and_die
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """125 pictures of three stripes, each with two captions that say their colours."""
    folder = tmp_path_factory.mktemp("stripes")
    samples = []
    for number, names in enumerate(itertools.product(COLOURS, repeat=3)):
        picture = Image.new("RGB", (48, 48))
        for stripe, name in enumerate(names):
            picture.paste(COLOURS[name], (0, 16 * stripe, 48, 16 * stripe + 16))
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=95)
        words = [f"{name}{stripe}" for stripe, name in enumerate(names)]
        captions = [" ".join(words), " over ".join(words)]
        content = {"captions": captions, "tokens": [caption.split() for caption in captions]}
        samples.append((f"{number:04d}", {"jpg": file.getvalue(), "json": json.dumps(content).encode()}))
    for shard in range(5):
        write_tar(folder / f"train-{shard}.tar", samples[shard::5])
    index_shards(str(folder), split="train")
    return folder


@pytest.fixture
def their_folder(tmp_path: Path) -> Path:
    """A project that has modules of its own named as some of ours are; nothing may import them, nor they hide ours."""
    for name in ("train.py", "infer/__init__.py", "sharding/__init__.py"):
        path = tmp_path / "project" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("raise RuntimeError('imported by accident')\n")
    for example in ("train_your_own.py", "fine_tune_transformers.py"):
        (tmp_path / "project" / example).write_text((EXAMPLES / example).read_text())
    return tmp_path / "project"


def start(folder: Path, *command: object) -> warm.Popen:
    """An example, as a process in that folder."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "ACCELERATE_USE_CPU": "true"}
    words = [sys.executable, *map(str, command)]
    return warm.Popen(
        words, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        nested=words[1] == "-m",
    )  # fmt: skip


def run(folder: Path, *command: object) -> str:
    """What an example prints."""
    process = start(folder, *command)
    printed, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, printed
    return printed


def losses(printed: str) -> list[float]:
    """The losses that were printed."""
    return [float(number) for number in re.findall(r"loss (\d+\.\d+)", printed)]


needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)


def test_two_towers_learn_and_resume_to_the_same_weights(shards: Path, their_folder: Path) -> None:
    assert len((EXAMPLES / "train_your_own.py").read_text().splitlines()) < 80
    found = losses(run(their_folder, "train_your_own.py", shards, "whole.pt", 12))
    assert found[-1] < found[0] / 2
    killed = start(their_folder, "-c", DIES, "train_your_own.py", shards, "killed.pt", 12)
    printed, _ = killed.communicate(timeout=SECONDS)
    assert killed.returncode == -signal.SIGKILL
    assert len(losses(printed)) == 5  # in the middle of the third epoch
    assert losses(run(their_folder, "train_your_own.py", shards, "killed.pt", 12))[-1] == found[-1]
    whole, resumed = (torch.load(their_folder / name, weights_only=True) for name in ("whole.pt", "killed.pt"))
    assert whole["data"] == resumed["data"]
    assert all(torch.equal(whole["model"][name], resumed["model"][name]) for name in whole["model"])


@needs_transformers
def test_a_model_of_hugging_face_is_fine_tuned_and_resumes_to_the_same_weights(
    shards: Path, their_folder: Path
) -> None:
    found = losses(run(their_folder, "fine_tune_transformers.py", shards, "whole", 2))
    assert found == sorted(found, reverse=True)
    first = losses(run(their_folder, "fine_tune_transformers.py", shards, "twice", 1))
    assert first + losses(run(their_folder, "fine_tune_transformers.py", shards, "twice", 2)) == found
    whole, resumed = (load_file(their_folder / name / "epoch-2" / "model.safetensors") for name in ("whole", "twice"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize(
    "example", ["train_your_own.py", pytest.param("fine_tune_transformers.py", marks=needs_transformers)]
)
def test_two_processes_train_and_one_goes_on(shards: Path, their_folder: Path, example: str) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    first = losses(run(their_folder, *launcher, example, shards, "kept", 2))
    rest = losses(run(their_folder, example, shards, "kept", 3))
    assert len(rest) == len(first) / 2
    assert rest[-1] < first[-1] < first[0]


@needs_transformers
def test_each_process_learns_the_same_tokenizer(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fine_tune_transformers import learn_tokenizer

    whole = learn_tokenizer(str(shards)).get_vocab()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert learn_tokenizer(str(shards)).get_vocab() == whole
