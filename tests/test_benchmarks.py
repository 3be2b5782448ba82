"""Benchmarks run, and write the form that the design promises; what they measure is no matter of tests."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import picture

REPOSITORY = Path(__file__).resolve().parent.parent


def packing(*flags: str | Path) -> subprocess.CompletedProcess[str]:
    return benchmark("packing", *flags)


def benchmark(name: str, *flags: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, REPOSITORY / f"benchmarks/{name}.py", *flags]
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


def test_streaming_quickly_measured_gives_rows_and_bars(tmp_path: Path) -> None:
    """Peers are there or not: a bar that needs a missing one is listed as not measured."""
    for seed in range(3):
        picture(seed, width=640, height=480).save(tmp_path / f"{seed}.jpg", quality=96)
    file = tmp_path / "streaming.json"
    done = benchmark("streaming", "--quick", "--images", tmp_path, "--rounds", "1", "--batches", "1", "--json", file)
    assert done.returncode == 0, done.stderr
    content = json.loads(file.read_text())
    for workers in (0, 2):
        rows = {row["contender"]: row for row in content["rows"] if row["workers"] == workers}
        assert {"ours", "webdataset", "the book's loader"} <= set(rows)
        assert all(row["wall_ms_a_sample"] > 0 for row in rows.values())
    assert "ceiling: decode as ours" in {row["contender"] for row in content["rows"]}
    bars = content["bars"]
    assert len(bars) == len({bar["name"] for bar in bars}) == 8
    for bar in bars:
        assert set(bar) == {"name", "value", "bar", "holds"}
        assert (bar["value"] is None) == (bar["holds"] is None)
    assert bars[0]["value"] > 0
    assert bars[4]["value"] > 0


@pytest.mark.parametrize("name", ["packing", "streaming"])
def test_a_folder_without_photos_is_a_user_error(name: str, tmp_path: Path) -> None:
    done = benchmark(name, "--quick", "--images", tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
