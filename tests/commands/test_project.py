"""Rules of the repository itself: what may be imported where, what modules may be called, that documents are true."""

import ast
import importlib
import importlib.metadata
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import warm

from captioner.cli import parse

REPOSITORY = Path(__file__).resolve().parents[2]
STAGES = ("sharding", "train", "infer")
LIGHT_MODULES = (
    "captioner",
    "captioner.alt_text",
    "captioner.cli",
    "captioner.images.loading",
    "captioner.metrics",
    "captioner.shards.format",
    "captioner.files.storage",
    "captioner.files.retries",
    "captioner.images.views",
    "captioner.vocabulary",
    "sharding.make_shards",
    "sharding.check_shards",
    "sharding.packing.engine",
    "sharding.download_coco",
    "captioner.streaming.cache",
    "train.plan",
    "captioner.streaming.reader",
    "train.data.folders",
    "infer.export",
    "infer.corrections",
    "infer.listing",
    "infer.main",
    "infer.reading",
    "infer.gallery",
    "infer.results",
    "infer.row_index",
    "infer.serve",
    "infer.serving.decoding",
    "infer.settings",
    "infer.sidecars",
)


IMPORT_UNTIL_TORCH = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    if "torch" in sys.modules:
        sys.exit(f"{name} loads torch")
"""


def test_light_modules_do_not_load_torch() -> None:
    command = [sys.executable, "-c", IMPORT_UNTIL_TORCH, *LIGHT_MODULES]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_stage_module_hides_a_standard_or_third_party_one() -> None:
    """The script's folder comes first on sys.path, so `train/queue.py` would break every `import queue`."""
    others = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions())
    others -= {*STAGES, "captioner"}
    names = {path.stem for stage in STAGES for path in (REPOSITORY / stage).glob("*.py")} - {"__init__", "main"}
    assert names, "no modules found"
    assert not names & (others | set(STAGES))


@pytest.mark.parametrize("path", sorted((REPOSITORY / "captioner").rglob("*.py")), ids=lambda path: path.stem)
def test_the_library_names_no_flag(path: Path) -> None:
    """Only commands know which flags there are; pip's are its own."""
    if path.name in ("cli.py", "flags.py"):
        return
    strings = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
    named = [text for text in strings if isinstance(text, str) and re.search("--[a-z]", text)]
    assert not [text for text in named if not text.startswith("pip install ")]


def test_constraints_are_bare_names_and_versions() -> None:
    lines = (REPOSITORY / "constraints.txt").read_text().split()
    assert len(lines) > 30
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!+_-]+", line) for line in lines)


def shell_blocks(document: str) -> list[str]:
    text = (REPOSITORY / document).read_text(encoding="utf-8")
    return re.findall(r"^```sh\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


DOCUMENTS = (
    "README.md",
    "docs/captions-your-way.md",
    "docs/coco.md",
    "docs/gallery.md",
    "docs/performance.md",
    "docs/scaling.md",
    "docs/server.md",
    "docs/small-machines.md",
    "docs/watch.md",
    "benchmarks/RESULTS.md",
)
COMMAND = re.compile(r"\b(sharding|train|infer)/(\w+)\.py\b(.*)")


def documented_commands() -> list[tuple[str, list[str]]]:
    """The module and the arguments of each command of ours in a code block; those with "..." are left out."""
    found = []
    for document in DOCUMENTS:
        for block in re.findall(
            r"^```\w*\n(.*?)^```", (REPOSITORY / document).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
        ):
            for line in block.replace("\\\n", " ").splitlines():
                if (match := COMMAND.search(line)) and "..." not in line and not line.startswith("#"):
                    package, script, rest = match.groups()
                    found.append((f"{package}.{script}", shlex.split(re.split(r"[|>&]", rest)[0], comments=True)))
    return found


@pytest.mark.parametrize(("module", "arguments"), documented_commands())
def test_documented_commands_have_the_flags_of_today(
    module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed = []
    monkeypatch.setattr(
        "captioner.cli.run", lambda _, settings, **__: parsed.append(parse(settings, description="", args=arguments))
    )
    importlib.import_module(module).run()
    assert parsed


@pytest.mark.timeout(900)
@pytest.mark.slow
def test_shell_blocks_of_the_readme_run(tmp_path: Path) -> None:
    """Line by line, in a folder of its own, that looks like the repository."""
    for path in REPOSITORY.iterdir():
        if path.name not in ("data", "runs", ".venv", ".git"):
            (tmp_path / path.name).symlink_to(path)
    blocks = shell_blocks("README.md")
    assert blocks
    for line in "".join(blocks).splitlines():
        program, *words = shlex.split(line)
        command = [Path(sys.executable).with_name(program), *words]
        done = warm.run(command, nested=True, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    rows = (tmp_path / "runs/small/captions.jsonl").read_text().splitlines()
    assert len(rows) == 16
    assert (tmp_path / "runs/small/gallery/index.html").stat().st_size > 1000
