"""The rows: each a small function that runs commands and returns an `Outcome`. A new one is added to `ROWS`.

Losses are compared step by step, as shares of the wanted ones; without dropout they depend on the device's rounding
alone. Tolerances of single steps are for TensorFloat-32, which the training command asks for, unless a row says
otherwise.
"""

import json
import os
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

import gpu_speed_rows
from gpu_commands import (
    ACCELERATE,
    PYTHON,
    TRAIN,
    Run,
    captions,
    cpu_run,
    data,
    encoder_of,
    encoder_weights,
    fp32_run,
    launch,
    new_run,
    sizes,
    start_ranks,
    train,
    train_flags,
    trained_run,
)
from gpu_jobs import REPOSITORY, CheckError, Job, Outcome, SkipError

SAVED_AND_STOPPED = 75
DUPLICATE_GPU = "Duplicate GPU"
STEP, EXACT_STEP, END = 0.02, 0.002, 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A row of the table, the seconds that its own commands may take, and whether nothing else may run meanwhile."""

    name: str
    check: Callable[[Job], Outcome]
    seconds: float = 90.0
    alone: bool = False


# ---- comparing --------------------------------------------------------------------------------------------


def greatest_difference(found: Sequence[float], wanted: Sequence[float]) -> float:
    """The largest difference at any step, as a share of the wanted loss. Raises CheckError for other steps."""
    if len(found) != len(wanted):
        raise CheckError(f"{len(found)} steps, not {len(wanted)}")
    return float(np.max(np.abs(np.array(found) - np.array(wanted)) / np.array(wanted)))


def end_difference(found: Sequence[float], wanted: Sequence[float]) -> float:
    """The difference of the mean losses of the last quarter, as a share of the wanted one."""
    if len(found) != len(wanted):
        raise CheckError(f"{len(found)} steps, not {len(wanted)}")
    return abs(last_quarter(found) / last_quarter(wanted) - 1)


def last_quarter(losses: Sequence[float]) -> float:
    """Their mean over the last quarter."""
    return statistics.fmean(losses[-max(1, len(losses) // 4) :])


def check_learns(losses: Sequence[float]) -> None:
    """Raise CheckError unless the loss goes down."""
    first = statistics.fmean(losses[: max(1, len(losses) // 4)])
    if not last_quarter(losses) < first:
        raise CheckError(
            f"the loss does not go down: {first:.3f} in the first quarter, {last_quarter(losses):.3f} at last"
        )


def weight_difference(found: Run, wanted: Run) -> float:
    """The largest difference of any weight. Raises CheckError for other tensors."""
    one, two = found.weights(), wanted.weights()
    if one.keys() != two.keys():
        raise CheckError(f"the models have other tensors: {sorted(one.keys() ^ two.keys())[:3]}")
    return max(float(np.abs(one[name].astype(np.float64) - two[name]).max()) for name in one)


def compare_steps(found: Run, wanted: Run, *, tolerance: float, note: str = "") -> Outcome:
    """Of every step's loss, which must go down too."""
    losses = found.losses()
    check_learns(losses)
    words = f"{len(losses)} steps, loss {losses[0]:.3f} to {losses[-1]:.3f}{note}"
    return Outcome(figure=greatest_difference(losses, wanted.losses()), bar=tolerance, at_most=True, note=words)


# ---- data and training ------------------------------------------------------------------------------------


def pack(job: Job) -> Outcome:
    """Scenes are drawn and packed."""
    found, wanted = data(job), sizes(job)
    num_samples = found.num_samples("train") + found.num_samples("val")
    return Outcome(figure=num_samples, bar=wanted.train + wanted.val, note="samples")


def fp32(job: Job) -> Outcome:
    """The losses are the CPU's."""
    return compare_steps(fp32_run(job), cpu_run(job), tolerance=STEP)


def fp32_exact(job: Job) -> Outcome:
    """Nearer to them without TensorFloat-32."""
    if job.device == "cpu":
        raise SkipError("TensorFloat-32 is a GPU's")
    found = train(job, "exact", variables={"NVIDIA_TF32_OVERRIDE": "0"})
    return compare_steps(found, cpu_run(job), tolerance=EXACT_STEP)


def fp32_again(job: Job) -> Outcome:
    """A second run of the same command: how far from bit for bit."""
    found, wanted = train(job, "again"), fp32_run(job)
    difference = weight_difference(found, wanted)
    return compare_steps(found, wanted, tolerance=STEP, note=f"; weights differ by {difference:.1e} at most")


def half_precision(job: Job, *, precision: str, tolerance: float) -> Outcome:
    """The loss goes down, to nearly that in fp32."""
    if precision == "fp16" and job.device == "cpu":
        raise SkipError("Accelerate has fp16 on GPUs only")
    losses = train(job, precision, precision=precision).losses()
    check_learns(losses)
    difference = end_difference(losses, fp32_run(job).losses())
    return Outcome(figure=difference, bar=tolerance, at_most=True, note=f"loss {losses[0]:.3f} to {losses[-1]:.3f}")


def in_two_parts(job: Job) -> Run:
    """The fp32 run with each step's batch in two parts."""
    return job.shared("accumulation", partial(train, name="parts", more=("--accumulation-steps", 2)))


def accumulation(job: Job) -> Outcome:
    """Two parts a step: the CPU's losses."""
    flags = ("--accumulation-steps", 2)
    wanted = job.shared("accumulation on the CPU", partial(train, name="cpu-parts", more=flags, device="cpu"))
    return compare_steps(in_two_parts(job), wanted, tolerance=STEP)


def accumulation_end(job: Job) -> Outcome:
    """At the end the loss is near that of whole batches, of which batch norm sees twice as many pictures at once."""
    difference = end_difference(in_two_parts(job).losses(), fp32_run(job).losses())
    return Outcome(figure=difference, bar=0.1, at_most=True)


def compiled(job: Job) -> Outcome:
    """The losses of the encoder that is not compiled."""
    return compare_steps(train(job, "compiled", ("--compile-encoder",)), fp32_run(job), tolerance=STEP)


def thawed(job: Job) -> Outcome:
    """The encoder learns from the middle of the run on: the CPU's losses, other weights than before."""
    weights, half = encoder_weights(job), sizes(job).steps // 2
    flags = ("--weights", weights, "--finetune-encoder-from-step", half)
    wanted = job.shared("thawed on the CPU", partial(train, name="cpu-thawed", more=flags, device="cpu"))
    found = train(job, "thawed", flags)
    before, after = load_file(weights), encoder_of(found)
    moved = max(float(np.abs(after[name] - before[name]).max()) for name in before)
    if not moved > 0:
        raise CheckError("the encoder did not learn")
    return compare_steps(found, wanted, tolerance=STEP, note=f"; encoder moved by {moved:.1e}")


def residual(job: Job) -> Outcome:
    """ResNet-18, trained from its first step on: the CPU's losses."""
    flags = ("--encoder", "resnet18", "--encoder-learning-rate", 1e-4)
    wanted = job.shared("ResNet-18 on the CPU", partial(train, name="cpu-resnet", more=flags, device="cpu"))
    return compare_steps(train(job, "resnet", flags), wanted, tolerance=END)


def cached_features(job: Job) -> Outcome:
    """The CPU's losses on its own features of the same pictures."""
    flags = ("--weights", encoder_weights(job), "--finetune-encoder-from-step", None, "--cache-features")
    runs = []
    for name, device in (("cached", job.device), ("cpu-cached", "cpu")):
        shards = job.bench.new_folder("shards") / "shards"
        shutil.copytree(data(job).shards, shards)
        runs.append(train(job, name, flags, device=device, shards=shards))
        if not list(shards.glob("features-*/train-*")):
            raise CheckError(f"{shards} holds no features")
    return compare_steps(*runs, tolerance=STEP)


def resumed(job: Job) -> Outcome:
    """SIGTERM in the middle, then --resume: the losses and weights of the undisturbed run."""
    wanted, run = fp32_run(job), new_run(job, "resumed")
    command = [*PYTHON, TRAIN, *train_flags(job, run)]
    first = job.start(command)
    first.wait_until(lambda: len(run.rows()) >= sizes(job).steps // 4 or first.process.poll() is not None)
    if first.process.poll() is None:
        first.terminate()
    first.wait([SAVED_AND_STOPPED])
    stopped_after = len(run.rows())
    job.run([*command, "--resume"])
    difference = weight_difference(run, wanted)
    note = f"; stopped after {stopped_after}; weights differ by {difference:.1e} at most"
    return compare_steps(run, wanted, tolerance=STEP, note=note)


def two_with_gloo(job: Job) -> Outcome:
    """Two processes, on one GPU where there is one, have the losses of one process."""
    run = new_run(job, "gloo")
    flags = train_flags(job, run)
    ranks = start_ranks(job, [REPOSITORY / "benchmarks/gpu_rank.py", TRAIN], flags, variables=[{}, {}])
    for rank in ranks:
        rank.wait()
    return compare_steps(run, fp32_run(job), tolerance=STEP)


def two_with_nccl(job: Job) -> Outcome:
    """The same with NCCL: on two GPUs, or on one as two machines would have them, if NCCL allows that."""
    if job.device == "cpu":
        raise SkipError("NCCL is for GPUs")
    run = new_run(job, "nccl")
    flags = train_flags(job, run)
    if count_gpus() > 1:
        job.run([*ACCELERATE, "launch", "--multi_gpu", "--num_processes", 2, "--mixed_precision", "no", TRAIN, *flags])
        return compare_steps(run, fp32_run(job), tolerance=STEP, note="; two GPUs")
    variables = [
        {"NCCL_HOSTID": f"machine-{rank}", "NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"} for rank in (0, 1)
    ]
    ranks = start_ranks(job, [TRAIN], flags, variables=variables)
    try:
        for rank in ranks:
            rank.wait()
    except CheckError:
        if any(DUPLICATE_GPU in rank.log.read_text(errors="replace") for rank in ranks):
            raise SkipError("one GPU, and NCCL refuses two processes on it") from None
        raise
    finally:
        for rank in ranks:
            rank.kill()
    return compare_steps(run, fp32_run(job), tolerance=STEP, note="; one GPU, as if two machines had one each")


def count_gpus() -> int:
    """Those that this process may use, as nvidia-smi counts them."""
    if os.environ.get("CUDA_VISIBLE_DEVICES"):
        return len(os.environ["CUDA_VISIBLE_DEVICES"].split(","))
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*"))) or 1


# ---- a model at work --------------------------------------------------------------------------------------


def learned(job: Job) -> Outcome:
    """The longer run captions what it has not seen."""
    metrics = trained_run(job).metrics()
    return Outcome(figure=metrics["cider"], bar=0.0 if job.small else 0.3, note="CIDEr on the val split")


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


ROWS = (
    Row(name="pack", check=pack, alone=True),
    Row(name="fp32, CPU's losses", check=fp32),
    Row(name="fp32 without TF32", check=fp32_exact),
    Row(name="fp32 twice", check=fp32_again),
    Row(name="bf16", check=partial(half_precision, precision="bf16", tolerance=END)),
    Row(name="fp16", check=partial(half_precision, precision="fp16", tolerance=0.1)),
    Row(name="SIGTERM and --resume", check=resumed),
    Row(name="accumulation, CPU's losses", check=accumulation),
    Row(name="accumulation, end", check=accumulation_end),
    Row(name="compiled encoder", check=compiled, seconds=150),
    Row(name="thawed encoder", check=thawed),
    Row(name="ResNet-18 thawed", check=residual),
    Row(name="cached features", check=cached_features),
    Row(name="two processes, gloo", check=two_with_gloo),
    Row(name="two processes, NCCL", check=two_with_nccl),
    Row(name="a longer run", check=learned),
    Row(name="evaluation", check=evaluation),
    Row(name="captions in float32", check=partial(same_captions, precision="float32", least=0.95)),
    Row(name="captions in bfloat16", check=partial(same_captions, precision="bfloat16", least=0.8)),
    Row(name="ONNX", check=onnx, seconds=120),
    *(Row(name=name, check=check, seconds=120, alone=True) for name, check in gpu_speed_rows.CHECKS.items()),
)
