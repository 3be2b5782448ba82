"""Pack to and train from servers behind a faulty network connection, and compare with runs without faults.

    python benchmarks/wire.py                                    # about 12 minutes, drawn images
    python benchmarks/wire.py --quick                            # a minute
    python benchmarks/wire.py --images ../shared/data/coco/images --json wire.json

The real commands run with their real timeouts: make_shards.py from S3 (moto) to S3, and train/main.py with the encoder
small_cnn on two gloo ranks on this machine's CPU, from S3 and from nginx. Each runs once undisturbed and then a few
times through a TCP proxy (tests/support/faulty_wire.py), which delays every chunk, holds some back as a lost packet
would, resets connections, leaves them half-open, and answers with 5xx, all at random and counted. A run survives if it
succeeds with the same result: all bytes of the packed folder; or the losses of all steps and each epoch's ledger, which
the command compares with its plan. Needs the packages of pip install -e '.[dev]', and nginx.

Exit codes: 0 measured, whether or not the bars hold; 2 an error that you can fix, in one line.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "tests/support"))

import pytest  # noqa: E402
from faulty_wire import RETRANSMISSION_SECONDS, Weather, Wire, told_in  # noqa: E402
from servers import Bucket, run_nginx, run_s3, use_s3  # noqa: E402

from captioner import cli  # noqa: E402
from captioner.errors import UserError  # noqa: E402
from captioner.files import retries, storage  # noqa: E402
from captioner.flags import Count, File  # noqa: E402
from measuring.figures import Bar, at_least, at_most, describe_run, finish, print_rows, print_run  # noqa: E402
from measuring.photos import find_or_draw, write_data  # noqa: E402

PACKAGES = ("torch", "aiohttp", "s3fs", "aiobotocore", "fsspec", "moto", "numpy")
STORM = Weather(latency_seconds=0.03, loss=0.03, reset=0.04, half_open=0.02, status=0.06)
KINDS = ("latency", "loss", "reset", "half-open", "5xx")
LONGEST_RUN_SECONDS = 900
PAUSE_SECONDS = retries.FIRST_PAUSE_SECONDS * 2**3  # the longest before a fifth attempt, which few requests need
LEDGER = re.compile(r"^epoch \d+: training .*?; (.*)$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class WireSettings:
    """What is packed and trained on, and how often."""

    images: File | None = None
    """Folder of photos such as COCO's; without it, images in COCO's sizes are drawn that compress like photos."""
    rounds: Count | None = None
    """Disturbed runs of each command, each with other faults: 3, with --quick 1."""
    quick: bool = False
    """A few images, and training from nginx only, to see that it runs."""
    json: File | None = None
    """Write run, rows and bars to this file, and a plot of the bars beside it (.svg)."""


@dataclass(frozen=True)
class Outcome:
    """How a command ended: its result, or None if it failed; its seconds, and its output on stderr."""

    result: Any
    seconds: float
    log: str


Command = Callable[[str, str], Outcome]
"""Runs under a unique name against the server at an address."""


def main(settings: WireSettings) -> None:
    """Start the servers, run everything without and with faults, and report."""
    rounds = settings.rounds or (1 if settings.quick else 3)
    if settings.json and not settings.json.absolute().parent.is_dir():
        raise UserError(f"the folder of --json {settings.json} does not exist: create it, or name another file")
    run = describe_run(PACKAGES, weather=STORM, rounds=rounds, mode="quick" if settings.quick else "full")
    print_run("faults on the wire", run)
    try:
        rows = measure_all(settings, rounds)
    except pytest.skip.Exception as error:  # the tests' servers skip if a program is not installed
        raise UserError(f"cannot start a server: {error}") from error
    print_rows("without and with faults", rows)
    bars = make_bars(rows)
    finish(bars, json=settings.json, run=run, rows=rows)


def measure_all(settings: WireSettings, rounds: int) -> list[dict[str, Any]]:
    """A row for each command and server."""
    num_pictures, epochs = (24, 1) if settings.quick else (480, 2)
    with tempfile.TemporaryDirectory(prefix="wire-") as temporary, run_s3() as s3:
        scratch = Path(temporary)
        originals = find_or_draw(settings.images, scratch)
        bucket = Bucket(s3, "wire")
        bucket.put_folder(write_data(originals, scratch / "data", count=num_pictures), "data")

        def pack(name: str, address: str) -> Outcome:
            with use_s3(address):
                packed = run_packing(f"s3://wire/{name}")
            return Outcome(bucket.read_all(name) if packed.result else None, packed.seconds, packed.log)

        def train_from_s3(name: str, address: str) -> Outcome:
            with use_s3(address):
                return run_training("s3://wire/undisturbed", scratch / f"s3-{name}", epochs=epochs)

        def train_from_web(name: str, address: str) -> Outcome:
            return run_training(f"{address}/shards", scratch / f"web-{name}", epochs=epochs)

        rows = [compare("pack from S3 to S3", pack, s3, rounds)]
        if not settings.quick:
            rows.append(compare("train from S3", train_from_s3, s3, rounds))
        shards = scratch / "web" / "shards"
        shards.mkdir(parents=True)
        for name, content in bucket.read_all("undisturbed").items():
            (shards / name).write_bytes(content)
        with run_nginx(scratch / "web", scratch / "nginx") as web:
            rows.append(compare("train from nginx", train_from_web, web, rounds))
    return rows


# ---- commands ---------------------------------------------------------------------------------------------


def run_packing(output: str) -> Outcome:
    """make_shards.py with two workers, from the bucket to a folder of it."""
    flags = ["--images", "s3://wire/data/photos", "--captions", "s3://wire/data/captions.jsonl", "--split", "train"]
    flags += ["--output", output, "--shard-megabytes", "1", "--threshold", "1", "--workers", "2"]
    return execute([sys.executable, str(REPOSITORY / "sharding/make_shards.py"), *flags])


def run_training(shards: str, folder: Path, *, epochs: int) -> Outcome:
    """train/main.py on two gloo ranks with one worker each and an empty cache."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    flags = ["--shards", shards, "--output", str(folder / "run"), "--cache", str(folder / "cache")]
    flags += ["--encoder", "small_cnn", "--weights", "none", "--finetune-encoder-from-step", "0", "--crop", "64"]
    flags += ["--epochs", str(epochs), "--batch-size", "16", "--workers", "1"]
    folder.mkdir()
    done = execute([*launch, str(REPOSITORY / "train/main.py"), *flags], ACCELERATE_USE_CPU="true")
    if not done.result:
        return done
    history = [json.loads(line) for line in (folder / "run" / "history.jsonl").read_text().splitlines()]
    losses = [(row["step"], row["train/loss"]) for row in history if "train/loss" in row]
    ledgers = LEDGER.findall(done.result)
    if not losses or len(ledgers) != epochs:
        raise UserError(f"training printed no losses or ledgers: {done.result[-600:]}")
    return Outcome((losses, ledgers), done.seconds, done.log)


def execute(command: Sequence[str], **variables: str) -> Outcome:
    """Run a command; its result is its stdout, or None if it failed or took too long."""
    started = time.monotonic()
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=LONGEST_RUN_SECONDS
        )
    except subprocess.TimeoutExpired:
        return Outcome(None, time.monotonic() - started, f"still running after {LONGEST_RUN_SECONDS} s")
    return Outcome(None if done.returncode else done.stdout, time.monotonic() - started, done.stderr)


# ---- figures ----------------------------------------------------------------------------------------------


def compare(job: str, command: Command, server: str, rounds: int) -> dict[str, Any]:
    """A command's row: one undisturbed run, then `rounds` runs through a faulty wire."""
    calm = command("undisturbed", server)
    if calm.result is None or told_in(calm.log):
        raise UserError(f"{job} without faults failed: {calm.log[-600:]}")
    faults: Counter[str] = Counter()
    told: Counter[str] = Counter()
    num_requests = survived = 0
    seconds, bounds = [], []
    for number in range(rounds):
        with Wire(server, STORM, seed=number) as wire:
            found = command(f"disturbed-{number}", wire.address)
        faults.update(wire.faults)
        told.update(told_in(found.log))
        num_requests += wire.num_requests
        survived += found.result == calm.result
        seconds.append(found.seconds)
        bounds.append(bound_seconds(calm.seconds, wire.faults))
        if found.result != calm.result:
            cli.console.print(f"{job}, round {number + 1}: NOT SURVIVED. {found.log[-600:]}", markup=False)
        cli.console.print(f"{job}, round {number + 1} of {rounds}: {dict(wire.faults)}", style="dim")
        for line in found.log.splitlines():
            if line.startswith("process "):
                cli.console.print(f"    {line}", markup=False, style="dim")
    return {
        "job": job,
        "runs": rounds,
        "same_result": survived,
        "requests": num_requests,
        **{kind: faults[kind] for kind in KINDS},
        "told": told.total(),
        "seconds_undisturbed": calm.seconds,
        "seconds_each": " ".join(f"{value:.0f}" for value in seconds),
        "of_the_bound": max(value / bound for value, bound in zip(seconds, bounds, strict=True)),
    }


def bound_seconds(undisturbed: float, faults: Counter[str]) -> float:
    """The longest time that a run with these faults may take: all waits in sequence, each at its maximum."""
    stalled = faults["half-open"] * (storage.STALL_SECONDS + PAUSE_SECONDS)
    failed = (faults["reset"] + faults["5xx"]) * PAUSE_SECONDS
    late = faults["latency"] * 2 * STORM.latency_seconds + faults["loss"] * 2 * RETRANSMISSION_SECONDS
    return 1.5 * undisturbed + stalled + failed + late


def make_bars(rows: Sequence[dict[str, Any]]) -> list[Bar]:
    """The bars of each job."""
    bars = []
    for row in rows:
        bars.append(at_least(f"{row['job']}, runs with the same result", row["same_result"], row["runs"]))
        bars.append(at_most(f"{row['job']}, seconds / their bound", row["of_the_bound"], 1.0))
    return bars


if __name__ == "__main__":
    cli.run(main, WireSettings, description=__doc__ or "")
