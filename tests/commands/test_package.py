"""The wheel holds all that is run when it is installed."""

import shutil
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from zipfile import ZipFile

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("captioner", "sharding", "train", "infer")
BUILT_FROM = (*PACKAGES, "pyproject.toml", "README.md", "LICENSE")


@pytest.mark.slow
def test_a_wheel_holds_every_file_of_every_package(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77", reason="the wheel is built without a network")
    no_cache = shutil.ignore_patterns("__pycache__")
    for name in BUILT_FROM:
        source, copy = REPOSITORY / name, tmp_path / "source" / name
        copy.parent.mkdir(exist_ok=True)
        shutil.copytree(source, copy, ignore=no_cache) if source.is_dir() else shutil.copy(source, copy)
    wanted = {
        str(path.relative_to(tmp_path / "source")) for name in PACKAGES for path in files(tmp_path / "source" / name)
    }
    assert {"captioner/py.typed", "infer/gallery.js", "infer/gallery.css", "train/run/report.html.j2"} <= wanted
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-deps")
    subprocess.run([*pip, "--no-build-isolation", "--wheel-dir", tmp_path, tmp_path / "source"], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with ZipFile(wheel) as archive:
        found = set(archive.namelist())
    assert {name for name in found if ".dist-info/" not in name} == wanted


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_console_scripts_are_functions() -> None:
    scripts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts
    for entry in scripts.values():
        module, function = entry.split(":")
        assert callable(getattr(import_module(module), function))
