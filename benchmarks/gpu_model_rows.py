"""The rows of a trained model: what it learned, its evaluation, its captions and its ONNX files on the device."""

import json
import statistics
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from gpu_commands import PYTHON, captions, data, launch, trained_run
from gpu_jobs import REPOSITORY, CheckError, Job, Outcome, SkipError

LEAST_CIDER = 1.0  # on the CPU 2.4


def learned(job: Job) -> Outcome:
    """The longer run captions what it has not seen."""
    metrics = trained_run(job).metrics()
    return Outcome(figure=metrics["cider"], bar=0.0 if job.small else LEAST_CIDER, note="CIDEr on the val split")


def evaluation(job: Job) -> Outcome:
    """Evaluation of the model folder gives the loss that training gave."""
    run, shards = trained_run(job), data(job).shards
    scores = job.bench.new_folder("scores") / "scores.json"
    flags = ["--model", run.model, "--shards", shards, "--json", scores, "--output", scores.with_name("results.json")]
    job.run([*launch(), REPOSITORY / "train/evaluate.py", *flags])
    found, wanted = json.loads(scores.read_text())["metrics"], run.metrics()
    difference = abs(found["validation_loss"] / wanted["validation_loss"] - 1)
    note = f"CIDEr {found['cider']:.3f}, in training {wanted['cider']:.3f}"
    return Outcome(figure=difference, bar=0.005, at_most=True, note=note)


def same_captions(job: Job, *, precision: str, least: float) -> Outcome:
    """The share of pictures of which the device says what the CPU says in float32."""
    wanted = job.shared("captions on the CPU", partial(captions, device="cpu", precision="float32"))
    found = captions(job, precision=precision)
    if found.keys() != wanted.keys():
        raise CheckError(f"other pictures: {sorted(found.keys() ^ wanted.keys())[:3]}")
    share = statistics.fmean(found[path] == wanted[path] for path in wanted)
    return Outcome(figure=share, bar=least, note=f"{len(wanted)} pictures, {len(set(wanted.values()))} captions")


def exported(job: Job) -> Path:
    """The model as ONNX files."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise SkipError(f"{', '.join(missing)} not installed")
    folder = job.bench.new_folder("onnx") / "onnx"
    job.run([*PYTHON, REPOSITORY / "infer/export.py", "--model", trained_run(job).model, "--output", folder])
    return folder


def onnx(job: Job) -> Outcome:
    """ONNX files on the device give what they give on the CPU."""
    folder = job.shared("ONNX files", exported)
    answer = json.loads(job.run([*PYTHON, REPOSITORY / "benchmarks/gpu_onnx.py", folder, job.device]).splitlines()[-1])
    if answer["difference"] is None:
        raise SkipError(f"exported, but onnxruntime has no CUDA here: {', '.join(answer['providers'])}")
    return Outcome(figure=answer["difference"], bar=1e-2, at_most=True, note=answer["provider"])
