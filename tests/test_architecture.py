"""The import rule of docs/architecture.md: no part of the package imports one above it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "ifa_torchrec"

LEARNING = {"errors", "ops", "modules", "batch", "models"}
LIBRARY = LEARNING | {"data", "distributed", "serving", "metrics", "scoring", "command_line"}
MAY_IMPORT: dict[str, set[str]] = {
    # from the lowest to the highest; a part may always import itself
    "errors": set(),
    "ops": {"errors"},
    "modules": {"errors", "ops"},
    "batch": {"errors"},
    "models": {"errors", "ops", "modules", "batch"},
    "ifa_torchrec": LEARNING,
    "metrics": set(),
    "data": {"errors", "batch"},
    "distributed": LEARNING,
    "serving": LEARNING | {"data"},
    "scoring": {"errors", "data", "metrics"},
    "command_line": {"errors"},
    "train": LIBRARY,
    "evaluate": LIBRARY | {"train"},
    "explain": LIBRARY | {"train"},
    "build_states": LIBRARY | {"train"},
    "states": LIBRARY | {"train"},
    "serve": LIBRARY | {"train"},
    "export": LIBRARY | {"train"},
    "__main__": LIBRARY,
    "torchx_components": set(),
}
"""Parts of the package, and what each may import. "ifa_torchrec" is the package's own __init__.py,
"__main__" that of any part."""


def part_of(module: str) -> str:
    """The part that a module belongs to.

    Names that the package itself exports belong to it: inside it they are imported from where they are.
    """
    names = module.split(".")
    if names[0] != PACKAGE:
        return names[0]
    if names[-1] == "__main__":
        return "__main__"
    return names[1] if len(names) > 1 and names[1] in MAY_IMPORT else PACKAGE


def imports(source: str) -> Iterator[tuple[int, str]]:
    """Line and full name of all that a file imports, wherever in it the import stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def violations(module: str, source: str) -> list[str]:
    """What a module imports and may not."""
    part = part_of(module)
    ours = {PACKAGE, "torchx_components", "examples", "benchmarks", "tests"}
    found = []
    for line, name in imports(source):
        if name.split(".")[0] in ours and part_of(name) not in {part, *MAY_IMPORT[part]}:
            found.append(f"{module}, line {line}: {part} may not import {name}")
    return found


def modules() -> dict[str, str]:
    """The source of each module of the package and of the TorchX components, by full name."""
    result = {}
    for top in (PACKAGE, "torchx_components"):
        for file in sorted((ROOT / top).rglob("*.py")):
            name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
            result[name.removesuffix(".__init__")] = file.read_text()
    return result


def test_no_part_imports_one_above_it():
    assert [line for name, source in modules().items() for line in violations(name, source)] == []


def test_every_part_is_in_the_table():
    found = {entry.stem for entry in (ROOT / PACKAGE).iterdir() if entry.suffix == ".py"}
    found |= {file.parent.name for file in (ROOT / PACKAGE).glob("*/__init__.py")}
    assert found - {"__init__"} <= MAY_IMPORT.keys()


def test_the_table_goes_from_the_lowest_to_the_highest():
    below: set[str] = set()
    for part, allowed in MAY_IMPORT.items():
        assert allowed <= below, f"{part} may import what stands below it in the table"
        below.add(part)


def test_the_page_has_the_same_table():
    page = (ROOT / "docs" / "architecture.md").read_text()
    for part in MAY_IMPORT:
        assert f"`{part}`" in page, f"docs/architecture.md does not name {part}"


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("ifa_torchrec.ops.jagged", "from ifa_torchrec.modules import UserState"),
        ("ifa_torchrec.modules.ifa", "from ifa_torchrec import DLRM_IFA"),
        ("ifa_torchrec.modules.ifa", "from ifa_torchrec import models"),
        ("ifa_torchrec.data.dataset", "def late():\n    import ifa_torchrec.models.dlrm_ifa"),
        ("ifa_torchrec.serving.live", "from ifa_torchrec.train import load_run"),
        ("ifa_torchrec.scoring", "from benchmarks.report import markdown"),
        ("torchx_components.train", "import ifa_torchrec.train"),
    ],
)
def test_a_violation_is_found(module, line):
    assert len(violations(module, line)) == 1


def test_what_is_allowed_is_no_violation():
    assert violations("ifa_torchrec.modules.ifa", "from ifa_torchrec import ops\nimport torch") == []
