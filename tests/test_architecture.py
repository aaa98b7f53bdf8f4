"""The table of docs/architecture.md matches the code: each part imports what its row lists, no more.

And no file or function is too long to read.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "ifa_torchrec"
OURS = {PACKAGE, "torchx_components", "examples", "benchmarks", "tests"}
MOST_LINES_OF_A_FILE = 450
MOST_LINES_OF_A_FUNCTION = 60  # without its docstring and its signature


def table() -> dict[str, set[str]]:
    """The parts of the package and their imports according to the page, in its order."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|.*\| ([^|]+) \|$", page, re.M)
    return {part: set(re.findall(r"`(\w+)`", imported)) for part, imported in rows}


TABLE = table()


def part_of(module: str) -> str:
    """The part that a module belongs to.

    Names that the package itself exports belong to it: its own modules import them from where they are
    defined.
    """
    names = module.split(".")
    if names[0] != PACKAGE:
        return names[0]
    return names[1] if len(names) > 1 and names[1] in TABLE else PACKAGE


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that a file imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def parts_imported(module: str, source: str) -> dict[str, str]:
    """Other parts, and other code of this repository, that a module imports, each with a location."""
    part = part_of(module)
    return {
        part_of(name): f"{module}, line {line}, imports {name}"
        for line, name in imports(ast.parse(source))
        if name.split(".")[0] in OURS and part_of(name) != part
    }


def modules() -> dict[str, str]:
    """The sources of the package's modules and of the TorchX components, by full name."""
    result = {}
    for top in (PACKAGE, "torchx_components"):
        for file in sorted((ROOT / top).rglob("*.py")):
            name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
            result[name.removesuffix(".__init__")] = file.read_text()
    return result


def test_the_table_goes_from_the_lowest_to_the_highest() -> None:
    below: set[str] = set()
    for part, imported in TABLE.items():
        assert imported <= below, f"{part} may import what stands below it in the table"
        below.add(part)


def test_every_part_is_in_the_table() -> None:
    found = {entry.stem for entry in (ROOT / PACKAGE).iterdir() if entry.suffix == ".py"}
    found |= {file.parent.name for file in (ROOT / PACKAGE).glob("*/__init__.py")}
    assert (found - {"__init__"}) | {PACKAGE, "torchx_components"} == TABLE.keys()


@pytest.mark.parametrize("part", TABLE)
def test_a_part_imports_what_the_table_says(part: str) -> None:
    found: dict[str, str] = {}
    for module, source in modules().items():
        if part_of(module) == part:
            found |= parts_imported(module, source)
    assert {p: place for p, place in found.items() if p not in TABLE[part]} == {}
    assert TABLE[part] - found.keys() == set(), "the table says more than is imported"


@pytest.mark.parametrize(
    ("module", "line", "part"),
    [
        ("ifa_torchrec.ops.jagged", "from ifa_torchrec.modules import UserState", "modules"),
        ("ifa_torchrec.modules.ifa", "from ifa_torchrec import DLRM_IFA", "ifa_torchrec"),
        ("ifa_torchrec.modules.ifa", "from ifa_torchrec import models", "models"),
        ("ifa_torchrec.data.dataset", "def f():\n    import ifa_torchrec.models.archs", "models"),
        ("ifa_torchrec.training.run", "from benchmarks.report import markdown", "benchmarks"),
        ("torchx_components.train", "import ifa_torchrec.commands.train", "commands"),
    ],
)
def test_an_import_is_found(module: str, line: str, part: str) -> None:
    assert parts_imported(module, line).keys() == {part}


def test_what_is_of_the_same_part_or_not_ours_is_no_arrow() -> None:
    assert parts_imported("ifa_torchrec.modules.ifa", "import torch, ifa_torchrec.modules.base") == {}


@pytest.mark.parametrize("module", modules())
def test_what_is_read_at_once_is_short(module: str) -> None:
    source = modules()[module]
    assert len(source.splitlines()) <= MOST_LINES_OF_A_FILE
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[1:2] if ast.get_docstring(node) else node.body[:1]
            if first:
                lines = (node.end_lineno or 0) - first[0].lineno + 1
                assert lines <= MOST_LINES_OF_A_FUNCTION, f"{node.name} has {lines} lines"
