"""Benchmarks run, and write the form that the design promises; what they measure is no matter of tests."""

import json
import subprocess
import sys
from pathlib import Path

from tiny import picture

REPOSITORY = Path(__file__).resolve().parent.parent


def packing(*flags: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, REPOSITORY / "benchmarks/packing.py", *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_packing_quickly_measured_gives_rows_and_bars(tmp_path: Path) -> None:
    """On so few small pictures that some bars have nothing to stand on; they are listed all the same."""
    for seed in range(3):
        picture(seed, width=640, height=480).save(tmp_path / f"{seed}.jpg", quality=96)
    file = tmp_path / "packing.json"
    done = packing("--quick", "--images", tmp_path, "--pictures", "8", "--json", file)
    assert done.returncode == 0, done.stderr
    content = json.loads(file.read_text())
    assert {"rows", "bars"} <= set(content)
    assert {row["contender"] for row in content["rows"]} >= {"the book's loop", "ours, one worker"}
    bars = content["bars"]
    assert len(bars) == len({bar["name"] for bar in bars}) == 7
    for bar in bars:
        assert set(bar) == {"name", "value", "bar", "holds"}
        assert (bar["value"] is None) == (bar["holds"] is None)
    assert bars[0]["value"] > 0
    assert bars[0]["name"] in " ".join(done.stdout.split())


def test_a_folder_without_photos_is_a_user_error(tmp_path: Path) -> None:
    done = packing("--quick", "--images", tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
