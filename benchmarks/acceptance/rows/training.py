"""The rows of training: each a function that runs commands and returns an `Outcome`.

Without dropout, losses differ only by the device's rounding. Tolerances of single steps are for TensorFloat-32, which
the training command uses, unless a row says otherwise.
"""

import shutil
from collections.abc import Sequence
from functools import partial

import numpy as np
from safetensors.numpy import load_file

from acceptance.commands import (
    ACCELERATE,
    PYTHON,
    TRAIN,
    Run,
    check_trained_on,
    cpu_run,
    data,
    encoder_of,
    encoder_weights,
    fp32_run,
    new_run,
    sizes,
    start_ranks,
    train,
    train_flags,
)
from acceptance.jobs import KILLED, CheckError, Job, Outcome, SkipError, wait_for_all
from acceptance.rows.compare import check_learns, compare_steps, end_difference, weight_difference

SAVED_AND_STOPPED = 75
NCCL_REFUSALS = ("Duplicate GPU", "ncclInvalidUsage", "ncclInternalError", "ncclSystemError", "ncclUnhandledCudaError")
STEP, EXACT_STEP = 0.005, 0.001
BF16_END, FP16_END, RESIDUAL_STEP, PARTS_END = 0.02, 0.1, 0.05, 0.1


def pack(job: Job) -> Outcome:
    """Scenes are drawn and packed."""
    found, wanted = data(job), sizes(job)
    num_samples = found.num_samples("train") + found.num_samples("val")
    return Outcome(figure=num_samples, bar=wanted.train + wanted.val, note="samples")


def fp32(job: Job) -> Outcome:
    """The losses are the CPU's."""
    return compare_steps(fp32_run(job), cpu_run(job), tolerance=STEP)


def fp32_exact(job: Job) -> Outcome:
    """Without TensorFloat-32 the losses are closer to the CPU's."""
    if job.device == "cpu":
        raise SkipError("TensorFloat-32 is a GPU's")
    found = train(job, "exact", variables={"NVIDIA_TF32_OVERRIDE": "0"})
    return compare_steps(found, cpu_run(job), tolerance=EXACT_STEP)


def fp32_again(job: Job) -> Outcome:
    """A second run of the same command: how far from bit-for-bit equal."""
    found, wanted = train(job, "again"), fp32_run(job)
    difference = weight_difference(found, wanted)
    return compare_steps(found, wanted, tolerance=STEP, note=f"; weights differ by {difference:.1e} at most")


def half_precision(job: Job, *, precision: str, tolerance: float) -> Outcome:
    """The loss goes down, to nearly the fp32 loss."""
    if precision == "fp16" and job.device == "cpu":
        raise SkipError("Accelerate has fp16 on GPUs only")
    losses = train(job, precision, precision=precision).losses()
    check_learns(losses)
    difference = end_difference(losses, fp32_run(job).losses())
    return Outcome(figure=difference, bar=tolerance, at_most=True, note=f"loss {losses[0]:.3f} to {losses[-1]:.3f}")


def in_two_parts(job: Job) -> Run:
    """The fp32 run with each step's batch in two micro-batches."""
    return job.shared("accumulation", partial(train, name="parts", more=("--accumulation-steps", 2)))


def accumulation(job: Job) -> Outcome:
    """With two micro-batches per step the losses are the CPU's."""
    flags = ("--accumulation-steps", 2)
    wanted = job.shared("accumulation on the CPU", partial(train, name="cpu-parts", more=flags, device="cpu"))
    return compare_steps(in_two_parts(job), wanted, tolerance=STEP)


def accumulation_end(job: Job) -> Outcome:
    """The final loss is near that of undivided batches, where batch norm sees twice as many images at once."""
    difference = end_difference(in_two_parts(job).losses(), fp32_run(job).losses())
    return Outcome(figure=difference, bar=PARTS_END, at_most=True)


def compiled(job: Job) -> Outcome:
    """A compiled encoder gives the losses of one that is not compiled."""
    return compare_steps(train(job, "compiled", ("--compile-encoder",)), fp32_run(job), tolerance=STEP)


def thawed(job: Job) -> Outcome:
    """With the encoder trained from the middle of the run on, the losses are the CPU's, and its weights change."""
    weights, half = encoder_weights(job), sizes(job).steps // 2
    flags = ("--weights", weights, "--finetune-encoder-from-step", half)
    wanted = job.shared("thawed on the CPU", partial(train, name="cpu-thawed", more=flags, device="cpu"))
    found = train(job, "thawed", flags)
    before, after = load_file(weights), encoder_of(found)
    moved = max(float(np.abs(after[name] - before[name]).max()) for name in before if name.endswith("weight"))
    if not moved > 0:
        raise CheckError("the encoder did not learn")
    return compare_steps(found, wanted, tolerance=STEP, note=f"; encoder moved by {moved:.1e}")


def residual(job: Job) -> Outcome:
    """ResNet-18, trained from the first step on, has the CPU's losses."""
    flags = ("--encoder", "resnet18", "--encoder-learning-rate", 1e-4)
    wanted = job.shared("ResNet-18 on the CPU", partial(train, name="cpu-resnet", more=flags, device="cpu"))
    return compare_steps(train(job, "resnet", flags), wanted, tolerance=RESIDUAL_STEP)


def cached_features(job: Job) -> Outcome:
    """Training on features has the losses of the CPU, which computes its own features of the same images."""
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
    check_trained_on(job.device, first.wait([SAVED_AND_STOPPED]))
    stopped_after = len(run.rows())
    job.run([*command, "--resume"])
    difference = weight_difference(run, wanted)
    note = f"; stopped after {stopped_after}; weights differ by {difference:.1e} at most"
    return compare_steps(run, wanted, tolerance=STEP, note=note)


def two_with_gloo(job: Job) -> Outcome:
    """Two processes, on one GPU if there is one, have the losses of one process."""
    run = new_run(job, "gloo")
    flags = train_flags(job, run)
    ranks = start_ranks(job, ["-m", "acceptance.gloo_rank", TRAIN], flags, variables=[{}, {}])
    check_trained_on(job.device, wait_for_all(ranks), processes=2)
    return compare_steps(run, fp32_run(job), tolerance=STEP)


def two_with_nccl(job: Job) -> Outcome:
    """The same with NCCL: on two GPUs, or on one that poses as two machines, if NCCL allows that."""
    if job.device == "cpu":
        raise SkipError("NCCL is for GPUs")
    run = new_run(job, "nccl")
    flags = train_flags(job, run)
    if job.bench.num_gpus > 1:
        launch = [*ACCELERATE, "launch", "--multi_gpu", "--num_processes", 2, "--mixed_precision", "no"]
        check_trained_on("cuda", job.run([*launch, TRAIN, *flags]), processes=2)
        return compare_steps(run, fp32_run(job), tolerance=STEP, note="; two GPUs")
    run_as_two_machines(job, flags)
    return compare_steps(run, fp32_run(job), tolerance=STEP, note="; one GPU, as two machines")


def run_as_two_machines(job: Job, flags: Sequence[object]) -> None:
    """Train with two processes on one GPU that poses as two machines. Raises SkipError if NCCL notices."""
    own = [{"NCCL_HOSTID": f"machine-{rank}", "NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"} for rank in (0, 1)]
    ranks = start_ranks(job, [TRAIN], flags, variables=own)
    try:
        check_trained_on("cuda", wait_for_all(ranks), processes=2)
    except CheckError as error:
        logs = "".join(rank.log.read_text(errors="replace") for rank in ranks)
        found = [name for name in (KILLED, *NCCL_REFUSALS) if name in error.reason or name in logs]
        if found:
            raise SkipError(f"one GPU, and NCCL does not run two processes on it ({found[0]})") from error
        raise
