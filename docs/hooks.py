"""What mkdocs does not find in docs/: generated pages, files of the repository that pages link to, the rest of `nav`.

Hooks of mkdocs.yml. In the site `docs/x.md` is `x.md`, and another file of the repository has its own path
(`benchmarks/RESULTS.md`). Warnings fail the build, which is strict.
"""

import logging
import posixpath
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "docs")]

import reference  # noqa: E402 - of this folder

log = logging.getLogger("mkdocs.hooks.site")
LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)#\s]+)")
LOADED = re.compile(  # by the browser, from another host
    r"""<(?!a\b)\w+\b[^>]*?\b(?:src|srcset|href|data|poster)=["']?(?:https?:)?//[^>]*>"""
    r"""|@import[^;]*//[^;]*;|url\(["']?(?:https?:)?//[^)]*\)"""
)


def on_config(config: MkDocsConfig) -> None:
    """Complete `nav`: commands, decisions, and under How-to the pages directly in docs/ that it does not name."""
    docs, nav = Path(config.docs_dir), config.nav or []
    named = set(_pages(nav))
    sections: dict[str, list[Any]] = {}
    for entry in nav:
        sections |= entry if isinstance(entry, dict) else {}
    sections["How-to"] += sorted({page.name for page in docs.glob("*.md")} - named)
    sections["Reference"][0]["Commands"] += map(_command_page, reference.commands())
    sections["Decisions"] += sorted(f"decisions/{page.name}" for page in (docs / "decisions").glob("*.md"))


def _pages(nav: list[Any]) -> Iterator[str]:
    for entry in nav:
        if isinstance(entry, str):
            yield entry
        else:
            for pages in entry.values():
                yield from _pages(pages)


def _command_page(script: str) -> str:
    return f"reference/{script.removesuffix('.py').replace('/', '-')}.md"


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the generated pages, and the files of the repository that `nav` names or that pages link to."""
    files.append(File.generated(config, "reference/python.md", content=reference.python_api()))
    for script in reference.commands():
        files.append(File.generated(config, _command_page(script), content=reference.command(script)))
    in_nav = set(_pages(config.nav or []))
    todo = [f"docs/{page.relative_to(config.docs_dir).as_posix()}" for page in Path(config.docs_dir).rglob("*.md")]
    todo += [page for page in in_nav if (REPOSITORY / page).is_file()]
    seen: set[str] = set()
    while todo:
        path = todo.pop()
        if path in seen or not (REPOSITORY / path).is_file():
            continue
        seen.add(path)
        if not path.startswith("docs/") and path != "README.md":
            inclusion = InclusionLevel.INCLUDED if path in in_nav else InclusionLevel.NOT_IN_NAV
            files.append(File.generated(config, path, abs_src_path=str(REPOSITORY / path), inclusion=inclusion))
        if path.endswith(".md"):
            text = (REPOSITORY / path).read_text(encoding="utf-8")
            todo += [_target(path, link) for link in LINK.findall(text)]


def _target(path: str, link: str) -> str:
    """The repository path that a link of the file at `path` leads to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), link))


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page, with links between docs/ and the rest of the repository as they are in the site."""
    at = page.file.src_uri
    path = at if (REPOSITORY / at).is_file() else f"docs/{at}"

    def in_site(match: re.Match[str]) -> str:
        target = _target(path, match[0])
        site_path = "index.md" if target == "README.md" else target.removeprefix("docs/")
        return posixpath.relpath(site_path, posixpath.dirname(at) or ".")

    return LINK.sub(in_site, markdown)


def on_post_build(config: MkDocsConfig) -> None:
    """Warn of all that a page or style sheet would load from another host."""
    for path in sorted(Path(config.site_dir).rglob("*")):
        if path.suffix in (".html", ".css", ".svg"):
            for match in LOADED.finditer(path.read_text(encoding="utf-8")):
                log.warning(f"{path.relative_to(config.site_dir)} loads from another host: {match[0]}")
