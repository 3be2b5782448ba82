"""The rows of models: training results, evaluation, captions and ONNX files on the device, encoders as graphs."""

import json
import math
import statistics
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from acceptance.commands import PYTHON, captions, data, launch, trained_run
from acceptance.jobs import REPOSITORY, CheckError, Job, Outcome, SkipError

LEAST_CIDER = 1.0  # 2.4 on the CPU
GRAPH_BATCH = 128
MOST_NOISE, LEAST_GRAPH_RATIO = 5e-3, 1.2
ARCHITECTURES = ("convnext_tiny", "densenet121", "efficientnet_b0", "inception_v3", "maxvit_t", "mobilenet_v3_small",
                 "regnet_y_400mf", "shufflenet_v2_x0_5", "squeezenet1_1", "swin_v2_t", "vit_b_32")  # fmt: skip


def learned(job: Job) -> Outcome:
    """The longer run captions images that it was not trained on."""
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
    """The share of images with the same caption on the device as on the CPU in float32."""
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
    """ONNX files give the same outputs on the device as on the CPU."""
    folder = job.shared("ONNX files", exported)
    answer = json.loads(job.run([*PYTHON, "-m", "acceptance.check_onnx", folder, job.device]).splitlines()[-1])
    if answer["difference"] is None:
        raise SkipError(f"exported, but onnxruntime has no CUDA here: {', '.join(answer['providers'])}")
    return Outcome(figure=answer["difference"], bar=1e-2, at_most=True, note=answer["provider"])


def _graphs(job: Job) -> dict[str, float]:
    options = {
        "encoder": "squeezenet1_1" if job.small else "resnet152",
        "batch": 2 if job.small else GRAPH_BATCH,
        "device": job.device,
        "architectures": () if job.small else ARCHITECTURES,
        "rounds": 1 if job.small else 5,
        "times": 1 if job.small else 20,
    }
    return json.loads(job.run([*PYTHON, "-m", "acceptance.measure_graph", json.dumps(options)]).splitlines()[-1])


def same_features(job: Job) -> Outcome:
    """A frozen encoder's graphs give the features of direct calls, relative to the largest feature."""
    found = job.shared("graphs", _graphs)
    differences = {name: found[name] for name in ("bf16", "fp32", "architectures")}
    worst = max(differences.values(), key=lambda value: (math.isnan(value), value))  # a NaN must fail
    note = ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
    return Outcome(figure=worst, bar=MOST_NOISE, at_most=True, note=note)


def faster_features(job: Job) -> Outcome:
    """The speed of a frozen encoder's graph relative to direct calls."""
    found = job.shared("graphs", _graphs)
    note = f"{found['direct_images_a_second']:,.0f} images/s directly, {found['graph_images_a_second']:,.0f} as a graph"
    return Outcome(figure=found["ratio"], bar=0.0 if job.small else LEAST_GRAPH_RATIO, note=note)
