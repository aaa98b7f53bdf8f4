"""What mkdocs.yml cannot say by itself.

Pages link to files of the repository as they lie in it, so that the links work there too. On the site
the examples' READMEs, CONTRIBUTING.md and CHANGELOG.md are pages; a link to any other file outside docs/
becomes its text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(str(file.relative_to(ROOT)) for file in ROOT.glob("examples/*/README.md"))
OUTSIDE = [*EXAMPLES, "CONTRIBUTING.md", "CHANGELOG.md"]
"""Files outside docs/ that are pages of the site, under the paths they have in the repository."""

_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_config(config: MkDocsConfig) -> None:
    """Put them into the navigation."""
    assert config.nav is not None
    place = next(i for i, entry in enumerate(config.nav) if "When not to use it" in entry)
    config.nav.insert(place, {"Examples": EXAMPLES})
    config.nav += ["CONTRIBUTING.md", "CHANGELOG.md"]


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add them to the site."""
    for name in OUTSIDE:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))


def on_page_markdown(markdown: str, page: Page, files: Files, **_: Any) -> str:
    """Turn links between files of the repository into links between pages."""
    here = page.file.src_uri if page.file.src_uri in OUTSIDE else f"docs/{page.file.src_uri}"

    def turned(link: re.Match[str]) -> str:
        text, target, anchor = link[1], link[2], link[3] or ""
        if ":" in target:
            return link[0]
        there = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
        if not (ROOT / there).exists():
            return link[0]  # the strict build complains of it
        uri = there.removeprefix("docs/")
        if files.get_file_from_path(uri) is None:
            return text
        return f"[{text}]({posixpath.relpath(uri, posixpath.dirname(page.file.src_uri))}{anchor})"

    return _LINK.sub(turned, markdown)


class ExampleSections(griffe.Extension):
    """Makes "Example:" the section of doctests that griffe knows as "Examples:"."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each object that has been read."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"(?m)^Example:$", "Examples:", obj.docstring.value)
