"""Write docs/streaming/reference.md from the docstrings of captioner.streaming.

python docs/reference.py
"""

import inspect
import re
import sys
from pathlib import Path
from typing import Any

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


def _section(value: Any) -> str:
    """The section of a class with its public members, or of a function."""
    parts = [_entry(f"## {value.__name__}", value.__name__, value)]
    if inspect.isclass(value):
        parts += [_member(name, member) for name, member in vars(value).items() if _is_public(name, member)]
    return "\n".join(parts)


def _is_public(name: str, member: Any) -> bool:
    documented = inspect.isfunction(member) or isinstance(member, property | classmethod)
    return documented and (not name.startswith("_") or name in ("__iter__", "__len__"))


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
