"""Run every CUDA path on one GPU with the real commands, in at most 10 minutes, and print which checks pass.

    python benchmarks/gpu.py --wheels wheels --json gpu.json      # one GPU, 16 cores, no network
    python benchmarks/gpu.py --device cpu                         # what a CPU can run, small: a few minutes
    python benchmarks/gpu.py --only bf16 "captions in float32"    # these rows, and what they depend on

It draws its data and trains its models itself. The checkout need not be installed; torch and torchvision are the
machine's own. Other missing packages come from a folder of wheels, which this command fills on a machine with a
network:

    pip download --dest wheels --only-binary=:all: --implementation cp --python-version 3.12 \\
        --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \\
        webdataset tyro nltk pycocotools tenacity filelock simplejpeg

A row passes if its figure reaches its bar. It fails if not, or if a command fails or takes too long, and shows the end
of that command's output; other rows continue. Rows are printed as they end. On the CPU, speed has no bar.

Exit codes: 0 nothing failed; 1 a row failed; 2 nothing was run, and one line says why.
"""

import argparse
import importlib.util
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from acceptance.jobs import Bench
    from acceptance.rows import Row

REPOSITORY = Path(__file__).resolve().parent.parent
MINUTES = 9.5  # leaves some seconds to print the last rows
PARALLEL_ON_GPU = 4
PATIENCE_ON_CPU = 5.0  # other programs may use the cores too


def main() -> int:
    """Look for packages, run the rows, and return the exit code."""
    settings = parse_flags()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpu-") as temporary:
        folder = Path(temporary)
        packages = prepare_packages(settings.wheels, folder / "packages")
        sys.path += [str(REPOSITORY), *([str(packages)] if packages else [])]
        num_gpus = count_gpus() if settings.device == "cuda" else 0
        from acceptance.jobs import Bench
        from acceptance.rows import ROWS
        from acceptance.table import Table, run_rows
        from captioner.workers import count_processors

        rows = choose_rows(ROWS, settings.only)
        small = settings.device == "cpu"
        bench = Bench(
            device=settings.device, folder=folder, ends=started + 60 * settings.minutes, packages=packages, small=small,
            num_gpus=num_gpus, patience=PATIENCE_ON_CPU if small else 1.0,
        )  # fmt: skip
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: end(bench))
        table = Table(json=settings.json, width=max(len(row.name) for row in rows))
        run_rows(rows, bench, table, parallel=1 if small else max(1, min(PARALLEL_ON_GPU, count_processors() // 4)))
        return table.close()


def parse_flags() -> argparse.Namespace:
    """The command line; argparse, because tyro may be missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="what to run on (default: cuda)")
    parser.add_argument("--wheels", type=Path, help="folder with wheels of missing packages")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="rows to run (default: all)")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"end after this time (default: {MINUTES})")
    parser.add_argument("--json", type=Path, help="write run, rows and bars to this file, and a plot beside it (.svg)")
    settings = parser.parse_args()
    if not 0 < settings.minutes < 10_000:
        refuse(f"--minutes {settings.minutes}: give a number above 0")
    if settings.wheels and not settings.wheels.is_dir():
        refuse(f"the folder --wheels {settings.wheels} does not exist: fill one as --help says")
    if settings.json and not settings.json.absolute().parent.is_dir():
        refuse(f"the folder of --json {settings.json} does not exist: create it, or name another file")
    return settings


def prepare_packages(wheels: Path | None, folder: Path) -> Path | None:
    """Unpack missing packages and return their folder; None if nothing was missing. Prints what was missing."""
    if importlib.util.find_spec("packaging") is None:
        refuse("the package packaging is missing, which compares versions: pip install packaging")
    from acceptance.packages import find_needs, install, required_packages

    needs = find_needs(required_packages(), sorted(wheels.glob("*.whl")) if wheels else [])
    for wheel, requirement in zip(needs.wheels, needs.brought, strict=True):
        print(f"missing: {requirement}; taken from {wheel.name}")
    if needs.missing:
        names = ", ".join(map(str, needs.missing))
        refuse(f"missing, and not in --wheels {wheels or '(not given)'}: {names}; fill the folder as --help says")
    if not needs.wheels:
        return None
    try:
        install(needs.wheels, folder)
    except subprocess.CalledProcessError as error:
        refuse(f"pip could not unpack the wheels (exit code {error.returncode}): see above")
    return folder


def count_gpus() -> int:
    """The number of GPUs that torch sees; exits if there is none."""
    code = "import torch; print(torch.cuda.device_count(), torch.cuda.get_device_name())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        refuse("torch sees no GPU: run on a machine with one, or give --device cpu")
    print(f"GPUs: {done.stdout.strip()}")
    return int(done.stdout.split()[0])


def choose_rows(rows: "tuple[Row, ...]", names: list[str] | None) -> "list[Row]":
    """The rows with these names."""
    known = [row.name for row in rows]
    for name in names or ():
        if name not in known:
            refuse(f"--only {name!r} is no row; the rows are {json.dumps(known, ensure_ascii=False)}")
    return [row for row in rows if names is None or row.name in names]


def end(bench: "Bench") -> None:
    """End all commands and close the table."""
    bench.ends = time.monotonic()


def refuse(message: str) -> None:
    """Exit with one line."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    sys.exit(main())
