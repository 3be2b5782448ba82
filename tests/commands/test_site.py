"""The site of the documents: `make docs` builds it, and what would mislead a reader fails the build."""

import dataclasses
import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import diagrams
import pytest
import reference
from safetensors.numpy import load as load_arrays

from captioner.shards.format import Manifest, ShardEntry, ShardIndex
from infer.results import Row

REPOSITORY = Path(__file__).resolve().parents[2]


def build(config: Path, site: Path) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("material", reason="mkdocs-material is not installed: pip install -e '.[docs]'")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--config-file",
        str(config),
        "--site-dir",
        str(site),
    ]
    environment = {"PATH": "", "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    done = build(REPOSITORY / "mkdocs.yml", tmp_path)
    assert done.returncode == 0, done.stderr
    assert {"index.html", "ARCHITECTURE.html", "streaming/reference.html", "reference/train-main.html"} <= {
        path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.html")
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "link", ["[x](gone.md)", "[x](#nowhere)", "[x](index.md#nowhere)", "![x](gone.svg)", "[x](/a.md)"]
)
def test_a_dead_link_fails_the_build(tmp_path: Path, link: str) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(f"# Title\n\n{link}\n")
    config = f"INHERIT: {REPOSITORY / 'mkdocs.yml'}\ndocs_dir: docs\nhooks: []\nplugins: []\nnav: [index.md]\n"
    (tmp_path / "mkdocs.yml").write_text(config + "theme: {name: mkdocs}\n")
    done = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert done.returncode != 0
    assert done.stderr.count("WARNING") == 1


@pytest.mark.parametrize(
    ("text", "loads"),
    [
        ('<script src="https://a.org/x.js"></script>', True),
        ("<img alt=x src=//a.org/x.png>", True),
        ('<link rel="stylesheet" href="http://a.org/x.css">', True),
        ('@import "https://a.org/x.css";', True),
        ("div { background: url(https://a.org/x.png) }", True),
        ('<a href="https://a.org/">a.org</a> <img src="x.png">', False),
        ('<svg xmlns="http://www.w3.org/2000/svg"><use href="#a"/></svg>', False),
    ],
)
def test_what_a_page_would_load_from_another_host_is_found(text: str, loads: bool) -> None:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install -e '.[docs]'")
    assert bool(importlib.import_module("hooks").LOADED.search(text)) == loads


@pytest.mark.parametrize("script", reference.commands())
def test_a_command_has_a_heading_for_each_flag(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = []
    monkeypatch.setattr("captioner.cli.run", lambda _, settings, **__: parsed.append(settings))
    importlib.import_module(script.removesuffix(".py").replace("/", ".")).run()
    headings = {line.lstrip("# ") for line in reference.command(script).splitlines() if line.startswith("##")}
    assert {name for settings in parsed for name in flags(settings)} <= headings


def flags(settings: type) -> set[str]:
    """The flags of a command's settings, and of those of its subcommands."""
    found: set[str] = set()
    for name, hint in get_type_hints(settings).items():
        inner = [each for each in get_args(hint) if dataclasses.is_dataclass(each)]
        found |= {flag for each in inner for flag in flags(each)} or {f"--{name.replace('_', '-')}"}
    return found - {"--folder"}  # of check_shards.py: DIR


@pytest.mark.parametrize("name", diagrams.diagrams())
def test_diagrams_are_those_of_their_source(name: str) -> None:
    drawn = (diagrams.FOLDER / name).read_text(encoding="utf-8")
    assert drawn == diagrams.diagrams()[name], "run python docs/diagrams.py"


@pytest.mark.parametrize("page", ["reference/formats.md", "captioning.md"])
def test_the_pages_on_formats_name_every_key(page: str) -> None:
    named = set(re.findall(r"`([\w.]+)`", (REPOSITORY / "docs" / page).read_text(encoding="utf-8")))
    manifest = {field.name for kind in (Manifest, ShardEntry) for field in dataclasses.fields(kind)}
    arrays = load_arrays(ShardIndex.of([], {}).to_bytes())
    assert (set(Row.__annotations__) if page == "captioning.md" else manifest | set(arrays)) <= named
