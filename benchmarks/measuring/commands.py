"""The commands that benchmarks run and time, and the Pythons of the peers."""

import json
import math
import os
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from captioner import cli
from captioner.errors import UserError
from captioner.images import loading
from measuring.figures import Cost
from measuring.photos import repeat_photos, store_photos

REPOSITORY = Path(__file__).resolve().parents[2]
SAMPLE_BYTES = 25_400  # of a stored image and its captions; sets the number of shards


def run_timed(command: Sequence[str | Path], scratch: Path, items: int, *, code: Path = REPOSITORY) -> Cost:
    """The cost of a command of the checkout `code`, and of all its processes. Raises UserError if it fails."""
    result, log = scratch / "timed.json", scratch / "timed.log"
    quiet = {"NO_ALBUMENTATIONS_UPDATE": "1"}  # img2dataset's library would look for its newest version online
    with log.open("w") as output:
        done = subprocess.run(
            [sys.executable, Path(__file__).with_name("timed.py"), result, *command],
            env=code_environment(code) | quiet,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode:
        raise UserError(f"{Path(command[0]).name} {command[1]} failed ({done.returncode}): {log.read_text()[-600:]}")
    return Cost(items=items, **json.loads(result.read_text()))


# ---- packing ----------------------------------------------------------------------------------------------


def packing_command(
    photos: Path, captions: Path, output: str | Path, *, code: Path = REPOSITORY, **flags: object
) -> list[str]:
    """`make_shards.py` of the checkout `code` for a train split, with more flags."""
    given = {"images": photos, "captions": captions, "split": "train", "output": output, **flags}
    words = [str(word) for flag, value in given.items() for word in (f"--{flag.replace('_', '-')}", value)]
    return [sys.executable, str(code / "sharding/make_shards.py"), *words]


def pack_samples(photos: Path, captions: Path, output: Path, *, code: Path = REPOSITORY, **flags: object) -> None:
    """Pack a train split with the packing command. Raises UserError."""
    command = packing_command(photos, captions, output, code=code, **flags)
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=code_environment(code))
    if done.returncode:
        raise UserError(f"packing the samples failed ({done.returncode}): {done.stderr[-600:]}")


def code_environment(code: Path) -> dict[str, str]:
    """The environment in which Python imports our code from the checkout `code`."""
    folders = [str(code), os.environ.get("PYTHONPATH")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, folders))}


def shard_megabytes(num_pictures: int, *, shards: int, sample_bytes: int = SAMPLE_BYTES) -> int:
    """The --shard-megabytes that gives about this number of shards; 64, the default, for 6,000 images in 4."""
    return math.ceil(num_pictures * sample_bytes / shards / 1e6)


def stored_photos(originals: Sequence[Path], folder: Path, *, count: int, **options: Any) -> list[Path]:
    """`count` JPEGs of `store_photos`, in `folder`/repeated: packing keeps their bytes."""
    return repeat_photos(folder / "repeated", store_photos(originals[:count], folder / "small", **options), count=count)


def check_out(commit: str, folder: Path) -> Path | None:
    """The code of a commit in this repository's history, in `folder`; prints why and returns None if it is missing."""
    try:
        archive = subprocess.run(["git", "-C", REPOSITORY, "archive", commit], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", b"").decode(errors="replace").strip() or str(error)
        cli.console.print(f"commit {commit} is not in this repository's history and is left out ({reason})")
        return None
    with tarfile.open(fileobj=BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")
    return folder


# ---- peers and servers ------------------------------------------------------------------------------------


def find_peers(wanted: Path | None) -> Path | None:
    """The Python with the peers, or None before `make bench-peers`. Raises UserError for a wrong --peers."""
    python = wanted or REPOSITORY / ".venv-peers/bin/python"
    if python.with_name("img2dataset").is_file():
        return python.absolute()
    if wanted:
        raise UserError(f"--peers {wanted} has no img2dataset beside it: run make bench-peers, and name its bin/python")
    return None


def plain_pillow(peers: Path | None) -> Path:
    """The Python with the book's own Pillow. Raises UserError if only pillow-simd is installed."""
    if not loading.HAS_SIMD:
        return Path(sys.executable)
    if peers is None:
        raise UserError("the book's loop needs plain Pillow, and pillow-simd replaces it here: run make bench-peers")
    return peers


def import_servers() -> Any:
    """The tests' servers. Raises UserError if a package or nginx is missing."""
    sys.path.insert(0, str(REPOSITORY / "tests/support"))
    try:
        import servers
    except ModuleNotFoundError as error:
        raise UserError(f"the package {error.name} is missing: make check installs it") from error
    if servers.NGINX is None:
        raise UserError("nginx is not on the PATH: install it (apt-get install nginx-light)")
    return servers
