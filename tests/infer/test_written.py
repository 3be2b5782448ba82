"""What was written last is known in the next run, wherever the folder is then, and after a kill."""

import json
from contextlib import closing
from pathlib import Path

import pytest

from captioner.errors import UserError
from infer import written
from infer.results import written_path
from infer.written import Entry, Written


def note(output: Path, **texts: str) -> None:
    with closing(Written(output)) as entries:
        for name, text in texts.items():
            entries.set(output.parent / f"{name}.txt", Entry(text=text, image=f"{name}.jpg", model="m"))


def noted(output: Path, *names: str) -> list[str | None]:
    with closing(Written(output)) as entries:
        found = [entries.get(output.parent / f"{name}.txt") for name in names]
        for entry, name in zip(found, names, strict=True):
            assert entry is None or entry.image == f"{name}.jpg"
        return [entry.text if entry else None for entry in found]


def test_the_last_text_of_each_file_is_known_after_a_move(tmp_path: Path) -> None:
    output = tmp_path / "one" / "captions.jsonl"
    note(output, a="a cat", b="two\nlines \udcff")
    note(output, a="a dog")
    assert noted(output, "a", "b", "c") == ["a dog", "two\nlines \udcff", None]
    (tmp_path / "one").rename(tmp_path / "two")
    assert noted(tmp_path / "two" / "captions.jsonl", "a", "b") == ["a dog", "two\nlines \udcff"]


def test_without_an_output_nothing_is_kept(tmp_path: Path) -> None:
    entries = Written()
    entries.set(tmp_path / "a.txt", Entry(text="a cat"))
    assert entries.get(tmp_path / "a.txt") == Entry(text="a cat")
    entries.close()
    assert list(tmp_path.iterdir()) == []


def test_a_line_that_a_kill_cut_is_forgotten_and_a_damaged_one_refused(tmp_path: Path) -> None:
    output = tmp_path / "captions.jsonl"
    note(output, a="a cat", b="a dog")
    path = written_path(output)
    content = path.read_bytes()
    path.write_bytes(content[:-5])
    assert noted(output, "a", "b") == ["a cat", None]
    note(output, c="a bird")
    assert noted(output, "a", "b", "c") == ["a cat", None, "a bird"]
    for damaged in (
        b"[]\n",
        b"{}\n",
        b"no JSON\n",
        b'{"path": 1, "text": null, "image": "", "model": ""}\n',
        b"[" * 200_000 + b"\n",
    ):
        path.write_bytes(content + damaged)
        with pytest.raises(UserError, match=r"line 3 of .*captions\.jsonl\.written is damaged: delete that line"):
            Written(output)


def test_the_file_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(written, "MAX_STALE_LINES", 10)
    output = tmp_path / "captions.jsonl"
    for number in range(100):
        note(output, a=str(number), b="a dog", c="a bird")
        note(output, a=str(number), b="a dog", c="a bird")  # unchanged, so not written again
    assert noted(output, "a", "b", "c") == ["99", "a dog", "a bird"]
    lines = [json.loads(line) for line in written_path(output).read_bytes().splitlines()]
    assert len(lines) <= 2 * 3 + 10 + 3
