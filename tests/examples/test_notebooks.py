"""The notebooks run, and say what they said when they were committed with their outputs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "notebooks"


def said(notebook: dict[str, Any]) -> list[list[str]]:
    """Of each cell the kinds of its outputs, and their text without its numbers, which a processor may
    round otherwise, and without what a table or a picture has in it."""
    cells = [cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return [
        [
            re.sub(r"-?[\d.,]+(e-\d+)?", "#", "".join(output["text"]))
            if output["output_type"] == "stream"
            else "/".join(sorted(output["data"]))
            for output in outputs
        ]
        for outputs in cells
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ranking", "state"])
def test_runs_and_says_what_is_committed(name: str, monkeypatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("TQDM_DISABLE", "1")
    file = FOLDER / f"{name}.ipynb"
    committed = json.loads(file.read_text())
    notebook = nbformat.read(file, as_version=4)
    resources = {"metadata": {"path": str(FOLDER)}}
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources=resources).execute()
    assert said(notebook) == said(committed)


def test_are_committed_as_they_were_run_from_top_to_bottom() -> None:
    for file in sorted(FOLDER.glob("*.ipynb")):
        cells = json.loads(file.read_text())["cells"]
        counts = [cell["execution_count"] for cell in cells if cell["cell_type"] == "code"]
        assert counts == list(range(1, len(counts) + 1)), file.name
