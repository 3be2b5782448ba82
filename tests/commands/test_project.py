"""Rules of the repository itself: what may be imported where, what modules may be called, that documents are true."""

import ast
import importlib
import importlib.metadata
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import warm
from PIL import Image

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


def read(document: str) -> str:
    return (REPOSITORY / document).read_text(encoding="utf-8")


def code_blocks(document: str, language: str = r"\w*") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", read(document), flags=re.MULTILINE | re.DOTALL)


ROOT_DOCUMENTS = [path.name for path in REPOSITORY.glob("*.md")]
PAGES = [str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "docs").rglob("*.md")]
LINKED = [*ROOT_DOCUMENTS, *PAGES, "benchmarks/RESULTS.md", "tests/README.md"]
DOCUMENTS = sorted({"README.md", "benchmarks/RESULTS.md", *(page for page in PAGES if "/decisions/" not in page)})
COMMAND = re.compile(r"\b(sharding|train|infer)/(\w+)\.py\b(.*)")


def documented_commands() -> list[tuple[str, list[str]]]:
    """The module and the arguments of each command of ours in a code block; those with "..." are left out."""
    found = []
    for document in DOCUMENTS:
        for block in code_blocks(document):
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


def test_the_readme_is_short_and_names_tests_that_exist() -> None:
    readme = read("README.md")
    assert len(readme.split()) <= 1000
    _, promises = readme.split("| promise | test |\n|---|---|\n")
    rows = promises.split("\n\n")[0].splitlines()
    assert len(rows) > 5
    tests = [re.search(r"\((tests/\S+/test_\w+\.py)\) \|$", row) for row in rows]
    assert all(test and (REPOSITORY / test[1]).is_file() for test in tests)


@pytest.mark.parametrize("document", LINKED)
def test_links_and_images_lead_to_files(document: str) -> None:
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", read(document), flags=re.MULTILINE | re.DOTALL)
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match("https?:|#", link)]
    assert [link for link in links if not (REPOSITORY / document).parent.joinpath(link).exists()] == []


def message_templates() -> str:
    """All strings of the code, one a line, with "…" for each value in them."""
    found = []
    for path in (path for folder in (*STAGES, "captioner") for path in (REPOSITORY / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            values = node.values if isinstance(node, ast.JoinedStr) else [node]
            found.append("".join(str(value.value) if isinstance(value, ast.Constant) else "…" for value in values))
    return "\n".join(found)


def test_the_messages_in_troubleshooting_are_those_of_the_code() -> None:
    quoted = re.findall(r"\*\*`([^`]*…[^`]*)`", read("docs/troubleshooting.md"))
    assert len(quoted) > 20
    templates = message_templates()
    parts = [part for message in quoted for part in message.split("…") if part.strip(" ()/")]
    assert [part for part in parts if part.strip() not in templates] == []


SMALL = {  # what makes a command quick on drawn scenes
    "sharding/make_shards.py": "--size 40",
    "train/main.py": "--epochs 1 --batch-size 16",
    "train/main.py, no --init": "--encoder small_cnn --weights none --finetune-encoder-from-step 0 --crop 36",
}


@pytest.mark.timeout(900)
@pytest.mark.slow
def test_shell_blocks_of_the_readme_run(tmp_path: Path) -> None:
    """Line by line, in a folder that looks like the repository, with drawn scenes as COCO and as one's own photos."""
    for name in (*STAGES, "captioner", "examples", "accelerate_config.yaml"):
        (tmp_path / name).symlink_to(REPOSITORY / name)

    def run(line: str) -> None:
        program, *words = shlex.split(line)
        command = [Path(sys.executable).with_name(program), *words]
        done = warm.run(command, nested=True, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    run("python examples/scenes.py --output data/coco --train 48 --val 16")
    (tmp_path / "photos").mkdir()
    for number, scene in enumerate(sorted((tmp_path / "data/coco/val2026").glob("*.jpg"))):
        shutil.copy(scene, tmp_path / "photos" / (f"{number}.jpg" if number else "dog.jpg"))
    captions = [f"{photo.name},a drawing number {photo.stem}" for photo in (tmp_path / "photos").iterdir()]
    (tmp_path / "train.csv").write_text("\n".join(["image,caption", *captions]))

    lines = "".join(code_blocks("README.md", "sh")).splitlines()
    assert len(lines) >= 5
    for line in lines:
        command = shlex.join(shlex.split(line, comments=True))
        script = shlex.split(line)[1]
        is_new = script == "train/main.py" and "--init" not in line
        run(" ".join([command, SMALL.get(script, ""), SMALL["train/main.py, no --init"] if is_new else ""]))
    rows = (tmp_path / "captions.jsonl").read_text().splitlines()
    assert len(rows) == 16
    assert (tmp_path / "gallery/index.html").stat().st_size > 1000
    assert (tmp_path / "runs/mine/model/config.json").exists()
    assert len((tmp_path / "alt.csv").read_text().splitlines()) == 17
    assert len(list((tmp_path / "photos").glob("*.txt"))) == 16

    (tmp_path / "from_python.py").write_text(code_blocks("docs/captioning.md", "python")[0])
    shutil.copy(tmp_path / "photos/dog.jpg", tmp_path / "photo.jpg")
    Image.open(tmp_path / "photo.jpg").save(tmp_path / "other.png")
    run("python from_python.py")
