"""The MovieLens example, one epoch on the real ml-100k."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "movielens"))
import compare


@pytest.mark.slow
def test_every_model_is_trained_and_measured(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["compare.py", "--out", str(tmp_path / "out"), "--epochs", "1"])
    compare.main()
    rows = re.findall(r"^(no history|softmax|IFA.*?) +0\.\d+ (0\.\d+)", capsys.readouterr().out, re.M)
    assert [name for name, _ in rows] == ["no history", "softmax", "IFA", "IFA, identity heads of class"]
    assert all(0.55 < float(gauc) < 0.7 for _, gauc in rows)
