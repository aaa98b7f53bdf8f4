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
    rows = re.findall(r"^(none|softmax|IFA)(, .*?) +0\.\d+ (0\.\d+)", capsys.readouterr().out, re.M)
    assert [kind for kind, *_ in rows] == ["IFA"] * 5 + ["softmax", "none"]
    assert [name for _, name, _ in rows][-3:] == [", + genres as a list", ", all of it", ", all of it"]
    assert all(0.55 < float(gauc) < 0.75 for *_, gauc in rows)
