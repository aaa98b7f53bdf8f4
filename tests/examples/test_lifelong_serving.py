"""The example on the parity test's purchases: it ends at the trained model's GAUC."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "lifelong_serving"))
import serve_and_watch
from torchrec.test_utils import get_free_port


@pytest.mark.slow
def test_events_bring_the_service_to_the_trained_models_ranking(
    real_log, tmp_path, monkeypatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "log").symlink_to(real_log.path)
    command = ["serve_and_watch.py", "--out", str(tmp_path), "--split", "valid"]
    monkeypatch.setattr("sys.argv", [*command, "--port", str(get_free_port())])
    serve_and_watch.main()
    printed = capsys.readouterr().out
    before, after, whole = re.findall(r"GAUC .*: +(0\.\d{4})$", printed, re.MULTILINE)
    assert before != after == whole
    assert re.search(r"\n0 taken, [1-9]\d* duplicates", printed)
    assert "ended with status 0" in printed
