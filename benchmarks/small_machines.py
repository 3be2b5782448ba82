"""Captioning on 1 and 2 cores: PyTorch, ONNX Runtime and int8, in files/s and memory of all processes.

    python benchmarks/small_machines.py --images PHOTOS           # about 10 minutes

Each row is a run of infer/main.py on the same files, with its processes pinned to the cores. files/s is what the
command prints: without the start of Python and loading the model. Memory is the peak of the sum of all processes' PSS
(pages that several share count once), sampled ten times a second. Run nothing else with the same libraries beside it,
or these pages are shared with it. Without --models weights are random, which does not change the speed; captions do not
end by themselves then, and have 12 words: about COCO's mean. int8 is measured on the same photos.

Exit codes: 0 measured; 2 an error that you can fix, in one line.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from captioner import cli
from captioner.errors import UserError
from captioner.flags import Count, File
from captioning import write_different
from measuring.commands import REPOSITORY, code_environment
from measuring.figures import describe_run, finish, print_rows, print_run
from measuring.photos import find_or_draw

ENCODERS = ("squeezenet1_1", "timm/tf_efficientnet_lite0", "mobilenet_v3_small", "mobilenet_v3_large", "resnet50")
KINDS = ("PyTorch", "ONNX Runtime", "int8")
NUM_WORDS, CAPTION_STEPS = 9956, 12


@dataclass(frozen=True, kw_only=True)
class SmallSettings:
    """What is measured, and on which images."""

    images: File | None = None
    """Folder of photos; without it, images in COCO's sizes are drawn."""
    encoders: tuple[str, ...] = ENCODERS
    """Encoders of the random models."""
    models: tuple[File, ...] = ()
    """Model folders to measure instead."""
    pictures: Count = 128
    """Files of a run."""
    cores: tuple[Count, ...] = (1, 2)
    """Numbers of cores."""
    json: File | None = None
    """Write run and rows to this file."""


def main(settings: SmallSettings) -> None:
    """Make the models, export them, and measure each."""
    available = sorted(os.sched_getaffinity(0))
    if max(settings.cores) > len(available):
        raise UserError(f"--cores {max(settings.cores)}, and this process may use {len(available)}: give fewer")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="small-") as temporary:
        scratch = Path(temporary)
        originals = find_or_draw(settings.images, scratch)
        photos = write_different(scratch / "photos", originals, count=settings.pictures)[0].parent
        run = describe_run(("torch", "onnxruntime", "pillow", "numpy"), pictures=f"{settings.pictures}")
        print_run("small machines", run)
        models = {str(path): path for path in settings.models} or make_models(settings.encoders, scratch)
        for name, model in models.items():
            for kind, folder in export(model, photos, scratch / f"exported {len(rows)}").items():
                for cores in settings.cores:
                    found = measure(folder, photos, scratch, cores=available[:cores])
                    rows.append({"model": name, "kind": kind, "cores": cores, **found})
                    cli.console.print(str(rows[-1]), markup=False)
    print_rows("small machines", rows)
    finish([], json=settings.json, run=run, rows=rows)


def make_models(encoders: Sequence[str], scratch: Path) -> dict[str, Path]:
    """Model folders with random weights, by encoder.

    Another process makes them: this one must not import torch, whose pages would then count less in the measured ones.
    """
    folders = [scratch / str(number) for number in range(len(encoders))]
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as maker:
        return dict(zip(encoders, maker.map(make_model, encoders, folders), strict=True))


def make_model(encoder: str, folder: Path) -> Path:
    """A model folder with random weights, which is returned."""
    import torch

    from captioner.images.views import ViewSpec
    from captioner.model.bundle import save_bundle
    from captioner.model.generated import DecodingDefaults
    from captioner.model.network import ModelConfig, build_model
    from captioner.vocabulary import SPECIAL_WORDS, Vocabulary

    words = tuple(f"word-{number}" for number in range(NUM_WORDS - len(SPECIAL_WORDS)))
    vocabulary = Vocabulary(words=(*SPECIAL_WORDS, *words), counts=(1,) * NUM_WORDS, threshold=1)
    torch.manual_seed(0)
    save_bundle(
        folder,
        model=build_model(ModelConfig(encoder=encoder, vocabulary_size=NUM_WORDS)),
        view=ViewSpec(),
        vocabulary=vocabulary,
        decoding=DecodingDefaults(max_tokens=CAPTION_STEPS),
        metrics={},
    )
    return folder


def export(model: Path, photos: Path, folder: Path) -> dict[str, Path]:
    """The folders of all kinds of a model. Raises UserError if it cannot be exported."""
    folders = dict(zip(KINDS, (model, folder / "onnx", folder / "int8"), strict=True))
    for kind, more in (("ONNX Runtime", []), ("int8", ["--int8", photos])):
        command = [sys.executable, "infer/export.py", "--model", model.absolute(), "--output", folders[kind], *more]
        run(command)
    return folders


def run(command: list[Any]) -> str:
    """What a command of ours prints. Raises UserError if it fails."""
    done = subprocess.run(
        command, cwd=REPOSITORY, env=code_environment(REPOSITORY), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise UserError(f"{command[1]} failed ({done.returncode}): {done.stderr[-600:]}")
    return done.stdout


def measure(model: Path, photos: Path, scratch: Path, *, cores: list[int]) -> dict[str, float]:
    """The files/s and the peak PSS in MB of captioning the photos on these cores."""
    output, log = scratch / "captions.jsonl", scratch / "log"
    for path in scratch.glob("captions.jsonl*"):
        path.unlink()
    command = [sys.executable, "infer/main.py", "--model", model.absolute(), "--images", photos, "--output", output]
    with log.open("w") as printed:
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=code_environment(REPOSITORY),
            stdout=printed,
            stderr=subprocess.STDOUT,
        )
        os.sched_setaffinity(process.pid, cores)  # before it starts any other
        peak = 0.0
        while process.poll() is None:
            peak = max(peak, sum(map(pss_megabytes, family(process.pid))))
            time.sleep(0.1)
    text = log.read_text()
    table = re.findall(r"│\s*([\d,.]+) │ (?:none|\d)[^│]*│", text)
    if process.returncode or not table:
        raise UserError(f"infer/main.py failed ({process.returncode}): {text[-600:]}")
    return {"files_per_second": float(table[-1].replace(",", "")), "megabytes": peak}


def family(pid: int) -> list[int]:
    """A process and all its descendants."""
    found = [pid]
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += family(int(child))
    return found


def pss_megabytes(pid: int) -> float:
    """The proportional set size of a process; 0 if it has ended."""
    with suppress(OSError):
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        return int(rollup.split("\nPss:")[1].split()[0]) / 1000
    return 0.0


if __name__ == "__main__":
    cli.run(main, SmallSettings, description=__doc__ or "")
