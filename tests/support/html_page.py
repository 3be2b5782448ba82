"""An HTML page as tests look at it."""

from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "link", "img", "input"}


class HtmlPage(HTMLParser):
    """The elements of a page as (tag, attributes) in order, and the text of each; unbalanced tags fail."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file
        self.source = file.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self._open: list[int] = []
        self.feed(self.source)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        self.texts.append("")
        if tag not in VOID:
            self._open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        self.texts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.elements[self._open.pop()][0] == tag

    def handle_data(self, data: str) -> None:
        for index in self._open:
            self.texts[index] += data

    def attributes(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def text(self, tag: str) -> list[str]:
        return [
            " ".join(text.split()) for (name, _), text in zip(self.elements, self.texts, strict=True) if name == tag
        ]
