"""The pages of docs/streaming are true: their Python runs, the reference is of today."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from webdataset import ShardWriter

from captioner.streaming import index_shards

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = REPOSITORY / "docs" / "streaming"
NEEDS = {"lightning.md": "lightning", "hugging-face-trainer.md": "transformers"}
RUN_PAGES = sorted(page.name for page in PAGES.glob("*.md") if "```python" in page.read_text(encoding="utf-8"))
RUN_PAGES.remove("examples.md")  # its blocks are the example files


def blocks(page: str, language: str) -> list[str]:
    """The page's blocks of a language."""
    text = (PAGES / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def python_blocks(page: str) -> list[str]:
    """The page's Python, each block after as many empty lines as are above it: errors name the page's own lines."""
    text = (PAGES / page).read_text(encoding="utf-8")
    return ["\n" * text.count("\n", 0, text.index(block)) + block for block in blocks(page, "python")]


def run_block(code: str, page: str, names: dict[str, Any]) -> None:
    exec(compile(code, str(PAGES / page), "exec"), names)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a reader of the how-to pages has: `data` of the tutorial, with a val split, and `photos` and `web`."""
    folder = tmp_path_factory.mktemp("docs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for block in python_blocks("tutorial.md")[:2]:
            run_block(block, "tutorial.md", {})
        for name, split, count in (("data", "val", 100), ("photos", "train", 120), ("web", "train", 300)):
            Path(name).mkdir(exist_ok=True)
            with ShardWriter(f"{name}/{split}-%06d.tar", maxcount=50, verbose=0) as tars:
                for number in range(count):
                    text = f"{name} {number}" if number % 3 else "a long text " * 4
                    pixels = torch.full((16, 16, 3), 10 * (number % 20), dtype=torch.uint8).numpy()
                    tars.write({"__key__": f"{name}{number}", "png": pixels, "cls": number % 2, "txt": text})
            index_shards(name, split=split)
    return folder


@pytest.mark.parametrize("page", RUN_PAGES)
def test_the_python_of_the_page_runs_and_prints_what_it_says(
    page: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if page in NEEDS:
        pytest.importorskip(NEEDS[page])
    monkeypatch.chdir(shutil.copytree(folder, tmp_path / "reader"))
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in python_blocks(page):
        run_block(block, page, names)
    printed = capsys.readouterr().out
    assert [output for output in blocks(page, "text") if output not in printed] == []


def test_the_readmes_lines_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    streaming = [block for block in python_blocks("../../README.md") if "captioner.streaming" in block]
    assert len(streaming) == 1
    run_block(streaming[0], "../../README.md", {})


def test_the_tutorials_training_resumes_exactly_after_a_kill(folder: Path, tmp_path: Path) -> None:
    """Killed without warning after its first checkpoint, and once more, it prints what the undisturbed run prints."""
    script = tmp_path / "train.py"
    script.write_text(python_blocks("tutorial.md")[-1])

    def start(name: str) -> warm.Popen:
        work = tmp_path / name
        work.mkdir(exist_ok=True)
        if not (work / "data").exists():
            (work / "data").symlink_to(folder / "data")
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
        command = [sys.executable, script]
        return warm.Popen(command, nested=True, cwd=work, env=environment, stdout=subprocess.PIPE, text=True)

    whole = start("whole").communicate()[0].splitlines()
    assert len(whole) == 5
    for _ in range(2):
        killed, saved = start("killed"), tmp_path / "killed" / "checkpoint.pt"
        before = saved.stat().st_mtime_ns if saved.exists() else 0
        while killed.poll() is None and not (saved.exists() and saved.stat().st_mtime_ns > before):
            time.sleep(0.001)
        killed.kill()
        killed.communicate()
    last = start("killed").communicate()[0].splitlines()
    assert 0 < len(last) <= 5
    assert last[1:] == whole[-len(last) :][1:]  # the first epoch after a resume counts the samples that were left
    assert last[0].split(", ")[:2] == whole[-len(last)].split(", ")[:2]
    final = [torch.load(tmp_path / name / "checkpoint.pt") for name in ("whole", "killed")]
    assert final[0]["data"] == final[1]["data"]
    assert all(torch.equal(value, final[1]["model"][name]) for name, value in final[0]["model"].items())


def test_the_examples_page_shows_the_whole_examples() -> None:
    sections = (PAGES / "examples.md").read_text(encoding="utf-8").split("\n## ")[1:]
    for section in sections:
        shown = re.findall(r"^```python\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)
        example = (REPOSITORY / section.split("\n", 1)[0]).read_text(encoding="utf-8")
        assert _lines("".join(shown)) == _lines(example)


def _lines(code: str) -> list[str]:
    return [line for line in code.splitlines() if line.strip()]


def test_the_reference_is_what_the_docstrings_say() -> None:
    made = subprocess.run(
        [sys.executable, "-c", "import reference; print(reference.reference(), end='')"],
        env={"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'docs'}"}, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert made == (PAGES / "reference.md").read_text(encoding="utf-8"), "run python docs/reference.py"
