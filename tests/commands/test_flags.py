"""Every command's flags: numbers have a range that --help shows and that is checked, paths may begin with ~."""

import importlib
import os
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from captioner import cli
from captioner.flags import Number, flag_name

RANGE = re.compile(r"(?:(\d+) <= |finite )?(INT|FLOAT)(?: (>=?|<=?) (\d+))?")
ROOT = Path(__file__).resolve().parents[2]
MODULES = {  # the folder's name is a package's, or it is on the path
    "sharding": "sharding.{}",
    "train": "train.{}",
    "infer": "infer.{}",
    "examples": "{}",
    "benchmarks": "{}",
}


def commands() -> list[tuple[str, str]]:
    """Each command's module, and the name of its class of settings."""
    found = []
    for folder, module in MODULES.items():
        for path in sorted((ROOT / folder).glob("*.py")):
            for name in re.findall(r"cli\.run\([^)]*?, (\w+), description", path.read_text(encoding="utf-8")):
                found.append((module.format(path.stem), name))
    assert len(found) > 12
    return found


def leaves(settings_class: type) -> list[type]:
    """The dataclasses that hold the flags themselves: subcommands have one each."""
    nested = [
        leaf
        for hint in get_type_hints(settings_class).values()
        for each in (hint, *get_args(hint))
        if is_dataclass(each)
        for leaf in leaves(each)  # type: ignore[arg-type]
    ]
    return nested or [settings_class]


def settings_classes() -> list[Any]:
    return [
        pytest.param(leaf, id=f"{module}-{leaf.__name__}")
        for module, name in commands()
        for leaf in leaves(getattr(importlib.import_module(module), name))
    ]


def numbers(settings_class: type) -> dict[str, list[Number]]:
    """The numeric flags, with the ranges that their annotations name."""

    def notes(hint: Any) -> list[Number]:
        own = [note for note in getattr(hint, "__metadata__", ()) if isinstance(note, Number)]
        return own + [note for inner in get_args(hint) for note in notes(inner)]

    def is_number(hint: Any) -> bool:
        return hint in (int, float) or any(is_number(inner) for inner in get_args(hint))

    hints = get_type_hints(settings_class, include_extras=True)
    plain = get_type_hints(settings_class)
    return {field.name: notes(hints[field.name]) for field in fields(settings_class) if is_number(plain[field.name])}


def required(settings_class: type) -> list[str]:
    """Words for the flags that must be given."""
    words = []
    for name, hint in get_type_hints(settings_class, include_extras=True).items():
        if not hasattr(settings_class, name) and "Positional" in str(hint):
            words.append("somewhere")
        elif not hasattr(settings_class, name):
            words += [flag_name(name), "train" if name == "split" else "somewhere"]
    return words


@pytest.mark.parametrize("settings_class", settings_classes())
def test_every_number_has_a_range_that_is_shown_and_checked(
    settings_class: type, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.parse(settings_class, description="", args=["--help"])
    shown = " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    for name, notes in numbers(settings_class).items():
        assert notes, f"--{name} is a number without a range: give it a type of captioner.flags"
        (number,) = notes
        assert number.metavar in shown, name
        flag = flag_name(name)
        for wrong in outside(number):
            with pytest.raises(cli.UserError) as caught:
                cli.parse(settings_class, description="", args=[*required(settings_class), flag, wrong])
            message = str(caught.value)
            assert message.startswith(f"{flag} is "), message
            assert "give " in message
            assert "\n" not in message
        with pytest.raises(SystemExit) as left:
            cli.parse(settings_class, description="", args=[*required(settings_class), flag, "many"])
        assert left.value.code == 2
        capsys.readouterr()


def outside(number: Number) -> list[str]:
    """Values just out of the range that is shown, and far out."""
    low, name, sign, bound = RANGE.fullmatch(number.metavar).groups()  # type: ignore[missing-attribute]
    step, kind = (1, int) if name == "INT" else (1e-6, float)
    wrong = [str(10**30)] if name == "INT" else ["nan", "inf", "-inf"]
    if low:
        wrong.append(str(kind(low) - step))
    if bound:
        wrong.append(str(kind(bound) + {">": 0, "<": 0, ">=": -step, "<=": step}[sign]))
    return wrong


@pytest.mark.parametrize("settings_class", settings_classes())
def test_defaults_are_in_their_range(settings_class: type) -> None:
    words = required(settings_class)
    assert cli.parse(settings_class, description="", args=words)


@pytest.mark.parametrize("settings_class", settings_classes())
def test_paths_begin_at_home_where_the_shell_leaves_the_tilde(settings_class: type, monkeypatch: Any) -> None:
    monkeypatch.setenv("HOME", "/home/of/somebody")
    plain, hints = get_type_hints(settings_class), get_type_hints(settings_class, include_extras=True)
    for name, hint in plain.items():
        kinds = {hint, *get_args(hint)}
        if Path in kinds or "PATH" in str(hints[name]):
            flag = flag_name(name)
            if "Positional" in str(hints[name]):
                args = [word.replace("somewhere", "~/x") for word in required(settings_class)]
            else:
                args = [*required(settings_class), flag, "~/x"]
            found = getattr(cli.parse(settings_class, description="", args=args), name)
            assert os.fspath(found[0] if isinstance(found, tuple) else found) == "/home/of/somebody/x", name


@pytest.mark.parametrize("settings_class", settings_classes())
def test_a_file_whose_name_begins_with_a_dash_is_one_line_with_the_remedy(
    settings_class: type, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a shell gives it for `*.jpg`. What begins with a dash and can be read stays what it is."""
    monkeypatch.chdir(tmp_path)
    for name in ("-dash.jpg", "-1", "-", *map(flag_name, get_type_hints(settings_class))):
        (tmp_path / name).touch()
    for name, hint in get_type_hints(settings_class, include_extras=True).items():
        if "PATH" not in str(hint) or "Positional" in str(hint):
            continue
        for word in ("-dash.jpg", "-d*.jpg"):
            with pytest.raises(cli.UserError) as caught:
                cli.parse(settings_class, description="", args=[*required(settings_class), flag_name(name), word])
            line = f"{word} begins with a dash, so it is taken for a flag: write ./{word}"
            assert str(caught.value) == line
            args = [*required(settings_class), flag_name(name), f"./{word}"]
            assert cli.parse(settings_class, description="", args=args)
    assert cli.parse(settings_class, description="", args=required(settings_class))
    with pytest.raises(SystemExit) as left:
        cli.parse(settings_class, description="", args=[*required(settings_class), "--no-such-flag", "-dash.jpg"])
    assert left.value.code == 2
    assert "--no-such-flag" in capsys.readouterr().err


@pytest.mark.parametrize("settings_class", settings_classes())
def test_a_path_on_this_machine_is_no_url(settings_class: type) -> None:
    """`pathlib` would make a folder named `s3:` of it."""
    for name, hint in get_type_hints(settings_class, include_extras=True).items():
        if "Local(" in str(hint):
            flag = flag_name(name)
            with pytest.raises(cli.UserError, match=f"{flag} s3:/.* is a URL"):
                cli.parse(settings_class, description="", args=[*required(settings_class), flag, "s3://bucket/x"])


@pytest.mark.parametrize("settings_class", settings_classes())
def test_none_is_no_value_of_a_flag(settings_class: type, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.parse(settings_class, description="", args=["--help"])
    assert "{None" not in capsys.readouterr().out


@pytest.mark.parametrize("settings_class", settings_classes())
def test_a_word_without_a_flag_is_one_line(settings_class: type) -> None:
    if not any("Positional" in str(hint) for hint in get_type_hints(settings_class, include_extras=True).values()):
        with pytest.raises(cli.UserError, match=r"no flag takes 'my photos': write its flag before it") as caught:
            cli.parse(settings_class, description="", args=["my photos", *required(settings_class)])
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("settings_class", settings_classes())
def test_a_flag_that_does_not_exist_ends_with_code_2(settings_class: type, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.parse(settings_class, description="", args=[*required(settings_class), "--no-such-flag", "word"])
    assert left.value.code == 2
    assert "--no-such-flag" in capsys.readouterr().err
