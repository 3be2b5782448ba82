"""The lines of docs/descriptions.md run, in their order, on photos without descriptions."""

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import warm
from tiny import picture
from tiny_model import write_model

from infer.metadata import xmp
from infer.metadata.described import read_metadata, xmp_sidecars
from infer.metadata.xmp import read_texts

pytestmark = [pytest.mark.slow, pytest.mark.external]

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = REPOSITORY / "docs" / "descriptions.md"


@pytest.mark.skipif(shutil.which("exiftool") is None, reason="exiftool is not installed")
def test_the_lines_of_the_page_run(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(3):
        picture(number).save(tmp_path / "photos" / f"{number}.jpg")
    write_model(tmp_path / "runs" / "mine" / "model")
    (tmp_path / "photos" / "0.txt").write_text("mine\n")
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    printed = []
    for line in "".join(blocks).splitlines():
        program, script, *words = shlex.split(line)
        assert program == "python"
        command = [sys.executable, REPOSITORY / script, *words]
        done = warm.run(command, nested=True, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)
    assert len(printed) == 4
    assert "nothing was written" in printed[0]
    assert "sidecars: 2 written" in printed[1]
    assert "embedded: 2 written" in printed[2]
    assert "sidecars: 3 written" in printed[3]
    for number in range(3):
        image = tmp_path / "photos" / f"{number}.jpg"
        found = read_metadata(image.read_bytes())
        assert found is not None
        assert len(read_texts(found.packet or xmp.EMPTY)) == (2 if number else 0)
        assert xmp_sidecars(image)[0].exists() == bool(number)
        lines = image.with_suffix(".txt").read_text().splitlines()
        assert len(lines) == (1 if number else 2)
    assert (tmp_path / "photos" / "0.txt").read_text().startswith("mine\n")
