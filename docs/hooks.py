"""Build steps that mkdocs.yml cannot express.

Pages link to files by their paths in the repository, so that the links work there too. On the site the
examples' READMEs, CONTRIBUTING.md, CHANGELOG.md and SECURITY.md are pages; a link to any other file
outside docs/ is replaced by its text.

The notebooks of examples/ are pages too, with the outputs they were committed with; tests/examples runs
them. Formulae become MathML, which browsers render without a script, but need a mathematical font for;
many systems have none, so the site includes the one from ziamath.

Every page ends with the version from git describe: to build the site of an older version, check out its
tag.
"""

from __future__ import annotations

import json
import posixpath
import re
import subprocess
from html import unescape
from importlib.resources import files as files_of
from pathlib import Path
from typing import Any

import griffe
import latex2mathml.converter
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(
    str(file.relative_to(ROOT))
    for file in ROOT.glob("examples/*/README.md")
    if file.parent.name != "notebooks"  # the site has the notebooks themselves
)
NOTEBOOKS = {
    f"examples/notebooks/{name}.md": ROOT / "examples" / "notebooks" / f"{name}.ipynb"
    for name in ("ranking", "state")
}
OUTSIDE = [*EXAMPLES, *NOTEBOOKS, "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"]
"""Files outside docs/ that are pages of the site, by their paths in the repository."""

FONT = "STIXTwoMath-Regular.ttf"

FOUND_FIRST = ("concepts.md", "words.md", "howto/")
"""Pages that explain terms: the search ranks them above pages that only use the terms often."""

_FORMULA = re.compile(r'class="arithmatex">\\([(\[])(.*?)\\[)\]]<', re.S)
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def git(*command: str) -> str:
    """The output of a git command in this clone."""
    done = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def on_config(config: MkDocsConfig) -> None:
    """Add the files of OUTSIDE to the navigation; set the version, and links to the source if its URL is
    known."""
    commit, version = git("rev-parse", "--short", "HEAD"), git("describe", "--tags", "--always")
    config.copyright = f"Version {version}"
    config.edit_uri = ""
    if config.repo_url:
        config.edit_uri = f"blob/{commit}/docs/"
        config.copyright = f'<a href="{config.repo_url}/tree/{commit}">{config.copyright}</a>'
    assert config.nav is not None
    place = next(i for i, entry in enumerate(config.nav) if "When not to use it" in entry)
    config.nav[place:place] = [{"Notebooks": [*NOTEBOOKS]}, {"Examples": EXAMPLES}]
    config.nav += ["CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"]


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the files of OUTSIDE, and the font, to the site."""
    font = str(files_of("ziamath") / "fonts" / FONT)
    files.append(File.generated(config, FONT, abs_src_path=font))
    for name in OUTSIDE:
        if name in NOTEBOOKS:
            files.append(File.generated(config, name, content=as_markdown(NOTEBOOKS[name])))
        else:
            files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))


def as_markdown(notebook: Path) -> str:
    """A notebook's text, code and outputs as Markdown."""
    parts: list[str] = []
    for cell in json.loads(notebook.read_text())["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            data: dict[str, Any] = output.get("data", {"text/plain": output.get("text")})
            shown = {kind: "".join(text) for kind, text in data.items()}
            if "image/png" in shown:
                parts.append(f'<img alt="" src="data:image/png;base64,{shown["image/png"].strip()}">')
            elif "text/html" in shown:  # a DataFrame, styled by the site
                table = re.sub(r"<style.*?</style>|<p>.*?</p>", "", shown["text/html"], flags=re.S)
                table = table.replace(' border="1" class="dataframe"', "")
                parts.append(re.sub(r"\n\s*", "", table))
            else:
                parts.append(f"```text\n{shown['text/plain'].rstrip()}\n```")
    return "\n\n".join(parts)


def on_page_markdown(markdown: str, page: Page, files: Files, **_: Any) -> str:
    """Turn links between files of the repository into links between pages; set the search boost."""
    if page.file.src_uri.startswith(FOUND_FIRST):
        page.meta["search"] = {"boost": 4}
    here = page.file.src_uri if page.file.src_uri in OUTSIDE else f"docs/{page.file.src_uri}"

    def turned(link: re.Match[str]) -> str:
        text, target, anchor = link[1], link[2], link[3] or ""
        if ":" in target:
            return link[0]
        there = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
        if not (ROOT / there).exists():
            return link[0]  # the strict build reports it
        uri = re.sub(r"\.ipynb$", ".md", there.removeprefix("docs/"))
        if files.get_file_from_path(uri) is None:
            return text
        return f"[{text}]({posixpath.relpath(uri, posixpath.dirname(page.file.src_uri))}{anchor})"

    return _LINK.sub(turned, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Turn formulae, which arithmatex has marked, into MathML."""

    def turned(formula: re.Match[str]) -> str:
        display = "inline" if formula[1] == "(" else "block"
        set_as = latex2mathml.converter.convert(unescape(formula[2]).strip(), display=display)
        return f'class="arithmatex">{set_as}<'

    return _FORMULA.sub(turned, html)


class ExampleSections(griffe.Extension):
    """Renames "Example:" sections to "Examples:", which griffe recognises as doctests."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each object that griffe has read."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"(?m)^Example:$", "Examples:", obj.docstring.value)
