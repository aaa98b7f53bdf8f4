"""The notebooks run and print the outputs with which they were committed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "notebooks"


def said(notebook: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """Each cell's printed text without numbers, which depend on the processor's rounding, and the kinds
    of its other outputs."""
    found = []
    for cell in notebook["cells"]:
        outputs = cell.get("outputs", [])
        # the kernel may split a stream arbitrarily
        streams = [output for output in outputs if output["output_type"] == "stream"]
        streams.sort(key=lambda output: output["name"])
        text = "".join("".join(output["text"]) for output in streams)
        kinds = ["/".join(sorted(output["data"])) for output in outputs if "data" in output]
        found.append((re.sub(r"-?[\d.,]+(e-\d+)?", "#", text), kinds))
    return found


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
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    assert said(notebook) == said(committed)


def test_are_committed_as_they_were_run_from_top_to_bottom() -> None:
    for file in sorted(FOLDER.glob("*.ipynb")):
        cells = json.loads(file.read_text())["cells"]
        counts = [cell["execution_count"] for cell in cells if cell["cell_type"] == "code"]
        assert counts == list(range(1, len(counts) + 1)), file.name
