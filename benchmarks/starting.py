"""How long commands take to start: to the first batch of training, and to the first row of captions, part by part.

    python benchmarks/starting.py --images ../shared/data/coco/images    # about 5 minutes
    python benchmarks/starting.py --quick                                # a minute, drawn images

Each turn is a whole command: `accelerate launch train/main.py` (SqueezeNet, batches of 32, packed shards and weights on
disk) until its first batch is handed to the training step, `python infer/main.py` until its first row is written (with
a model folder, and with an ONNX folder, for which it imports no torch), and programs that import torch and accelerate
and end, started in the same two ways. Peers' loaders are imported and opened on the same images, until their first
batch. Contenders take turns; figures are medians of the rounds, by the clock. All files are in the page cache.

Exit codes: 0 measured, whether or not the bars hold; 2 an error that you can fix, in one line.
"""

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from captioner import cli
from captioner.errors import UserError
from captioner.flags import Count, File
from contenders import LIGHT, pictures
from measuring.commands import REPOSITORY, code_environment, find_peers, pack_samples, shard_megabytes, stored_photos
from measuring.figures import at_most, describe_run, finish, median, print_rows, print_run
from measuring.photos import find_or_draw, write_captions
from measuring.settings import ImageBenchmarkSettings

BATCH = 32
LAUNCHED_IMPORTS, LAUNCHED = "accelerate launch, imports alone", "accelerate launch train/main.py"
IMPORTS = "python, imports alone"
CAPTION, CAPTION_ONNX = "python infer/main.py", "python infer/main.py, ONNX folder"
PACKAGES = ("torch", "torchvision", "accelerate", "simplejpeg", "webdataset")
SCRIPT = Path(__file__).with_name("contenders") / "starting.py"


@dataclass(frozen=True, kw_only=True)
class StartingSettings(ImageBenchmarkSettings):
    """What is measured, on which images, and how often."""

    rounds: Count | None = None
    """Turns of each contender: 5, with --quick 1."""
    peers: File | None = None
    """The Python that has litdata and mosaicml-streaming: .venv-peers/bin/python, as make bench-peers makes it."""


def main(settings: StartingSettings) -> None:
    """Make dataset, weights and model, start everything in turn, and print."""
    rounds = settings.rounds or (1 if settings.quick else 5)
    peers = find_peers(settings.peers)
    with tempfile.TemporaryDirectory(prefix="starting-") as temporary:
        scratch = Path(temporary)
        prepare(settings, scratch)
        run = describe_run(PACKAGES, mode="quick: rough figures" if settings.quick else f"{rounds} rounds")
        print_run("starting", run)
        contenders = make_contenders(scratch, peers=peers)
        turns: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
        for number in range(rounds):
            for name, turn in contenders.items():
                turns[name].append(turn())
            cli.console.print(f"round {number + 1} of {rounds} done", style="dim")
    medians = {name: median([sum(parts.values()) for parts in found]) for name, found in turns.items()}
    print_rows("in all", [{"started": name, "seconds": seconds} for name, seconds in medians.items()])
    rows = [
        {"started": name, "part": part, "seconds": median([parts[part] for parts in found])}
        for name, found in turns.items()
        for part in found[0]
    ]
    print_rows("part by part", rows)
    bars = [
        at_most(f"{name} / {alone}", (medians[name] or 0) / (medians[alone] or 1), 1.5)
        for name, alone in ((LAUNCHED, LAUNCHED_IMPORTS), (CAPTION, IMPORTS), (CAPTION_ONNX, IMPORTS))
    ]
    finish(bars, json=settings.json, run=run, rows=rows)


def prepare(settings: StartingSettings, scratch: Path) -> None:
    """Write the dataset folder, the weights of the encoder, and a model folder."""
    import torch
    from torchvision.models import get_model

    from captioner.model.bundle import load_bundle, save_bundle
    from contenders.captioning import make_captioner
    from infer.onnx_files import export

    count = 256 if settings.quick else 2048
    originals = find_or_draw(settings.images, scratch)
    folder = scratch / "photos"
    folder.mkdir()
    paths = stored_photos(originals, folder, count=count)
    captions = write_captions(paths, folder / "captions.jsonl")
    megabytes = shard_megabytes(count, shards=4)
    pack_samples(paths[0].parent, captions, scratch / pictures.SHARDS, workers=1, shard_megabytes=megabytes)
    bundle = make_captioner(LIGHT, torch.device("cpu")).bundle
    torch.save(get_model(LIGHT, weights=None).state_dict(), scratch / "weights.pth")
    parts = {name: getattr(bundle, name) for name in ("model", "view", "vocabulary", "decoding")}
    save_bundle(scratch / "model", **parts, metrics={})
    export(load_bundle(scratch / "model"), scratch / "onnx")


def make_contenders(scratch: Path, *, peers: Path | None) -> dict[str, Callable[[], dict[str, float]]]:
    """The turn of each contender."""
    launch = [
        str(Path(sys.executable).with_name("accelerate")),
        "launch",
        "--num_processes",
        "1",
        "--num_machines",
        "1",
    ]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    train = ["--shards", scratch / pictures.SHARDS, "--encoder", LIGHT, "--weights", scratch / "weights.pth"]
    train += ["--batch-size", str(BATCH)]
    caption = [sys.executable, SCRIPT, "caption", "--images", scratch / "photos/repeated", "--model"]
    contenders = {
        LAUNCHED_IMPORTS: partial(start, [*launch, SCRIPT, "imports"], scratch),
        LAUNCHED: partial(start, [*launch, SCRIPT, "train", *train], scratch, output="run"),
        IMPORTS: partial(start, [sys.executable, SCRIPT, "imports"], scratch),
        CAPTION: partial(start, [*caption, scratch / "model"], scratch, output="captions.jsonl"),
        CAPTION_ONNX: partial(start, [*caption, scratch / "onnx"], scratch, output="captions.jsonl"),
    }
    for name in (pictures.OURS, *pictures.PEERS):
        python = peers if name in ("litdata", "mosaicml-streaming") else Path(sys.executable)
        if python:
            paths = os.pathsep.join(map(str, (python.parents[1] / "streaming", sysconfig.get_path("purelib"))))
            command = [python, "-P", SCRIPT, "loader", name, scratch, str(BATCH), paths]
            subprocess.run([*command, "write"], check=True, capture_output=True, env=code_environment(REPOSITORY))
            contenders[f"loader: {name}"] = partial(start, command, scratch)
    return contenders


def start(command: Sequence[Any], scratch: Path, *, output: str | None = None) -> dict[str, float]:
    """The seconds of each part of a command's start. `output`, a new folder or file, is added. Raises UserError."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        stamps = Path(folder, "stamps.json")
        extra = [] if output is None else ["--output", Path(folder, output)]
        environment = code_environment(REPOSITORY) | {"STAMPS": str(stamps), "OMP_NUM_THREADS": "2"}
        started = time.time()
        done = subprocess.run([*command, *extra], capture_output=True, text=True, check=False, env=environment)
        if not stamps.exists():
            raise UserError(f"{command[0]} failed ({done.returncode}): {done.stderr[-600:]}")
        found: dict[str, float] = json.loads(stamps.read_text())
    times = [started, *found.values()]
    return {name: times[number + 1] - times[number] for number, name in enumerate(found)}


if __name__ == "__main__":
    cli.run(main, StartingSettings, description=__doc__ or "")
