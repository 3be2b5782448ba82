"""Every CUDA path, run on one GPU by the real commands, in at most 10 minutes, with one table of what holds.

    python benchmarks/gpu.py --wheels wheels --json gpu.json      # one GPU, 16 cores, no network
    python benchmarks/gpu.py --device cpu                         # all that a CPU can, small: a few minutes
    python benchmarks/gpu.py --only bf16 "captions in float32"    # these rows, and what they need

It draws its data and makes its models itself. The checkout need not be installed, and torch and torchvision stay what
they are. Other packages that are missing come from a folder of wheels, which this fills where there is a network:

    pip download --dest wheels --only-binary=:all: --implementation cp --python-version 3.12 \\
        --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \\
        webdataset tyro nltk pycocotools tenacity filelock

A row passes where its figure reaches its bar; it fails too when a command fails or takes too long, with the end of what
that printed, and the other rows go on. Rows appear as they end. On the CPU nothing is asked of speed.

Exit codes: 0 nothing failed; 1 a row failed; 2 nothing was run, for what one line tells.
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
    from gpu_jobs import Bench
    from gpu_rows import Row

REPOSITORY = Path(__file__).resolve().parent.parent
MINUTES = 9.5  # some seconds are left for the last rows to be told
PARALLEL_ON_GPU = 4
PATIENCE_ON_CPU = 5.0  # which others may be using


def main() -> int:
    """Look for packages, run the rows, and return the exit code."""
    settings = parse_flags()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpu-") as temporary:
        folder = Path(temporary)
        packages = prepare_packages(settings.wheels, folder / "packages")
        sys.path += [str(REPOSITORY), *([str(packages)] if packages else [])]
        num_gpus = count_gpus() if settings.device == "cuda" else 0
        import gpu_rows
        from captioner.workers import count_processors
        from gpu_jobs import Bench
        from gpu_table import Table, run_rows

        rows = choose_rows(gpu_rows.ROWS, settings.only)
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
    """The command line; tyro may be among what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="what is tried (default: cuda)")
    parser.add_argument("--wheels", type=Path, help="folder with wheels of packages that are missing here")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="rows to run; without it all")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"end after this time (default: {MINUTES})")
    parser.add_argument("--json", type=Path, help="write run, rows and bars to this file")
    settings = parser.parse_args()
    if not 0 < settings.minutes < 10_000:
        refuse(f"--minutes {settings.minutes}: give a number above 0")
    if settings.wheels and not settings.wheels.is_dir():
        refuse(f"there is no folder --wheels {settings.wheels}: fill one as --help says")
    if settings.json and not settings.json.absolute().parent.is_dir():
        refuse(f"there is no folder for --json {settings.json}: make it, or name another file")
    return settings


def prepare_packages(wheels: Path | None, folder: Path) -> Path | None:
    """The folder with what was missing here, unpacked; None where nothing was. Prints what is missing and brought."""
    if importlib.util.find_spec("packaging") is None:
        refuse("the package packaging is missing, with which versions are compared: pip install packaging")
    from gpu_packages import find_needs, install, required_packages

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
    """How many GPUs torch sees; refuses to go on where there is none."""
    code = "import torch; print(torch.cuda.device_count(), torch.cuda.get_device_name())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        refuse("torch sees no GPU here: go to a machine with one, or give --device cpu")
    print(f"GPUs: {done.stdout.strip()}")
    return int(done.stdout.split()[0])


def choose_rows(rows: "tuple[Row, ...]", names: list[str] | None) -> "list[Row]":
    """The rows with these names."""
    known = [row.name for row in rows]
    for name in names or ():
        if name not in known:
            refuse(f"--only {name!r}: there is no such row; there are {json.dumps(known, ensure_ascii=False)}")
    return [row for row in rows if names is None or row.name in names]


def end(bench: "Bench") -> None:
    """Have all commands killed and the table closed."""
    bench.ends = time.monotonic()


def refuse(message: str) -> None:
    """End with one line."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    sys.exit(main())
