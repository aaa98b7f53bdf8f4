"""The KuaiRand example on its synthetic files, with few users."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from ifa_torchrec.data.public import kuairand

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "kuairand"))
import compare_tasks
import made_up

pytest.importorskip("duckdb", reason="the extra `data` is not installed")


@pytest.mark.slow
def test_every_task_of_every_model_is_measured(tmp_path, monkeypatch, capsys) -> None:
    command = ["compare_tasks.py", "--out", str(tmp_path / "out"), "--users", "12", "--epochs", "1"]
    monkeypatch.setattr("sys.argv", command)
    compare_tasks.main()
    printed = capsys.readouterr().out
    rows = re.findall(r"^(\w*) +(no history|softmax|IFA.*?) +(0\.\d+) ", printed, re.M)
    models = ["no history", "softmax", "IFA", "IFA, identity heads"]
    assert [model for _, model, _ in rows] == models * 3
    assert [task for task, *_ in rows if task] == ["is_click", "long_view", "is_like"]
    assert printed.endswith("These files are synthetic: the figures say nothing about KuaiRand.\n")


def test_what_is_made_up(tmp_path: Path) -> None:
    """One sitting per day; users click authors again that they clicked before; no row is refused."""
    log = kuairand.prepare(made_up.make(tmp_path / "data", users=30), tmp_path / "log")
    assert sorted(path.name for path in (tmp_path / "data").iterdir())[:3] == [
        "log_random_4_22_to_5_08_pure.csv",
        "log_standard_4_08_to_4_21_pure.csv",
        "log_standard_4_22_to_5_08_pure.csv",
    ]
    assert [len(log.requests(split)["user"]) // 30 for split in log.splits] == [26, 2, 3]
    refused = json.loads((log.path / "report.json").read_text())["refused"]
    assert {section["refused"] for section in refused.values()} == {0}

    requests = log.requests("test")
    author, offsets = log.items["author_id"], requests["candidate_offsets"]
    starts, ends = log.history_range(requests["user"], requests["time"])
    often, clicked = [], []
    for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
        mine = slice(*offsets[row : row + 2])
        was_clicked = log.vocabulary["was_click"].rows_of([1])[0] == log.events["was_click"][start:end]
        items = log.events["item"][start:end][was_clicked]
        counts = np.bincount(author[items], minlength=made_up.AUTHORS + 1)
        often += list(counts[author[requests["candidates"][mine]]] > 5)
        clicked += list(requests["is_click"][mine])
    often, clicked = np.array(often), np.array(clicked)
    assert clicked[often].mean() > 0.6 > 0.3 > clicked[~often].mean()
