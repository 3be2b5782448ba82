"""The reference from the code: docs/streaming/reference.md, which this writes, and pages that only the site has.

python docs/reference.py
"""

import contextlib
import importlib
import inspect
import io
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

REPOSITORY = Path(__file__).resolve().parent.parent
PAGE = REPOSITORY / "docs" / "streaming" / "reference.md"
HEAD = """# Reference

Made from the docstrings by `python docs/reference.py`: change those, not this page.
"""


def reference() -> str:
    """The text of the page: the public API of captioner.streaming, and its errors."""
    from captioner import errors, streaming
    from captioner.streaming import ledger

    named = [getattr(streaming, name) for name in sorted(streaming.__all__, key=str.lower)]
    documented = [*named, ledger.Skip]
    documented += [errors.StreamingError, errors.TooManyBadSamplesError, errors.TransformError, errors.UserError]
    return "\n".join([HEAD, *map(_section, documented)])


def python_api() -> str:
    """The text of the page on captioning, metrics and errors from Python."""
    from captioner import describe, errors, load_captioner, metrics
    from captioner.attention import Attention
    from captioner.images.loading import ImageError

    documented = [load_captioner, describe.Captioner, describe.Description, Attention, metrics.References]
    raised = [errors.UserError, errors.NotCalibratedError, errors.NoAttentionError, ImageError]
    streaming = "Streaming has [a page of its own](../streaming/reference.md).\n"
    return "\n".join(["# Python\n", streaming, *map(_section, [*documented, *raised])])


# ---- commands ---------------------------------------------------------------------------------------------


def commands() -> list[str]:
    """The scripts of all commands, such as `train/main.py`."""
    scripts = [path for stage in ("sharding", "train", "infer") for path in sorted((REPOSITORY / stage).glob("*.py"))]
    return [f"{path.parent.name}/{path.name}" for path in scripts if "    cli.run(" in path.read_text(encoding="utf-8")]


def command(script: str) -> str:
    """The text of a command's page: what its module says, and the flags that `--help` prints, each under a heading."""
    with mock.patch("captioner.cli.run") as run:
        importlib.import_module(script.removesuffix(".py").replace("/", ".")).run()
    settings = run.call_args.args[1]
    parts = [f"# {script}\n\n{_module_text(run.call_args.kwargs['description'])}\n"]
    subcommands = re.search(r"{([a-z,]+)}$", _help(settings).split("\n", 1)[0])
    if not subcommands:
        return "\n".join([*parts, *_flags(_help(settings), heading="##")])
    for name in subcommands[1].split(","):
        text = _help(settings, name)
        parts += [f"## {name}\n\n{text.splitlines()[2]}\n", *_flags(text, heading="###")]
    return "\n".join(parts)


def _help(settings: type, *words: str) -> str:
    """What `--help` prints on a very wide terminal."""
    from captioner import cli

    wide = mock.patch.dict(os.environ, COLUMNS="2000", NO_COLOR="1")
    with wide, contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        cli.parse(settings, description="", args=[*words, "--help"])
    return printed.getvalue().strip()


def _flags(help_text: str, *, heading: str) -> Iterator[str]:
    """A section for each flag: it is indented by two blanks, and its help more, or follows after two blanks."""
    entries = re.findall(r"^  (?=\S)(.*(?:\n {3,}\S.*)*)", help_text, flags=re.MULTILINE)
    for entry in entries:
        flag, *text = re.split(r"\s{2,}", entry.strip())
        if not flag.startswith("-h"):
            yield f"{heading} {flag.split()[0].rstrip(',')}\n\n`{flag}`\n\n{_escaped(' '.join(text))}\n"


def _module_text(docstring: str) -> str:
    """A module's docstring in Markdown."""
    return re.sub(r"((?:^    .*\n|^\n(?=    ))+)", r"\n\1\n", docstring, flags=re.MULTILINE)


def _escaped(text: str) -> str:
    """Plain text in Markdown; what is between backquotes stays."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"([*_<\[])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)


# ---- docstrings -------------------------------------------------------------------------------------------


def _section(value: Any) -> str:
    """The section of a class with its public members, or of a function."""
    parts = [_entry(f"## {value.__name__}", value.__name__, value)]
    if inspect.isclass(value):
        parts += [_member(name, member) for name, member in vars(value).items() if _is_public(name, member)]
    return "\n".join(parts)


def _is_public(name: str, member: Any) -> bool:
    documented = inspect.isfunction(member) or isinstance(member, property | classmethod)
    return documented and (not name.startswith("_") or name in ("__call__", "__iter__", "__len__"))


def _member(name: str, member: Any) -> str:
    if isinstance(member, property):
        return f"### {name}\n\n{markdown(_docstring(member))}\n"
    function = member.__func__ if isinstance(member, classmethod) else member
    return _entry(f"### {name}", name, function)


def _entry(heading: str, name: str, value: Any) -> str:
    called = f"```text\n{_signature(name, value)}\n```\n\n" if _has_signature(value) else ""
    return f"{heading}\n\n{called}{markdown(_docstring(value))}\n"


def _has_signature(value: Any) -> bool:
    return not inspect.isclass(value) or not issubclass(value, Exception) or "__init__" in vars(value)


def _docstring(value: Any) -> str:
    text = inspect.getdoc(value)
    if not text:
        raise ValueError(f"{value} has no docstring")
    return text


def _signature(name: str, value: Any) -> str:
    """The signature; one parameter a line if it is too long; types without their modules."""
    signature = inspect.signature(value)
    parameters = [each for each in signature.parameters.values() if each.name not in ("self", "cls")]
    shown = list(map(str, parameters))
    keyword_only = [each.kind == each.KEYWORD_ONLY for each in parameters]
    if any(keyword_only):
        shown.insert(keyword_only.index(True), "*")
    result = "" if inspect.isclass(value) else f" -> {inspect.formatannotation(signature.return_annotation)}"
    line = f"{name}({', '.join(shown)}){result}"
    if len(line) > 100:
        line = f"{name}(\n" + "".join(f"    {each},\n" for each in shown) + f"){result}"
    line = re.sub(r"\b(?:[a-z_]+[.])+(?=[A-Z])", "", line)
    return re.sub(r"'([A-Z]\w*)'", r"\1", line).replace("'", '"')


def markdown(docstring: str) -> str:
    """A docstring in Markdown: a line with indented lines right below it becomes a paragraph with a bold title."""
    return re.sub(r"^(\S[^\n]*)\n((?:    \S[^\n]*\n?)+)", _titled, docstring, flags=re.MULTILINE)


def _titled(match: re.Match[str]) -> str:
    text = re.sub(r"^    ", "", match[2], flags=re.MULTILINE)
    return f"**{match[1]}**\n\n{text}\n"


if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))
    PAGE.write_text(reference(), encoding="utf-8")
