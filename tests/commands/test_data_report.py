"""The HTML report of an event log."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from ifa_torchrec.commands.data import Report
from ifa_torchrec.data import EventLog, LogError, RankingDataset


def test_the_page_has_the_numbers_of_the_log(log: EventLog, tmp_path: Path) -> None:
    copy = tmp_path / "a <log>"
    shutil.copytree(log.path, copy)
    report = {"warnings": ["2 > 1"], "refused": {"events": {"rows": 12345}}}
    (copy / "report.json").write_text(json.dumps(report))
    page = Report(copy).write()
    assert page == tmp_path / "a <log>.html"
    text = page.read_text()
    assert "<h1>a &lt;log&gt;</h1>" in text
    assert "<li>2 &gt; 1<" in text
    assert "<th>refused<td><table><tr><th>events<td><table><tr><th>rows<td>12,345" in text
    for split in log.splits:
        dataset = RankingDataset(log, split)
        part = text.split(f"<h2>{split}</h2>")[1].split("<h2>")[0]
        lengths, requests = dataset.history_lengths, dataset.requests
        assert f"<th>requests<td>{len(dataset):,}<" in part
        assert f"{lengths.mean():,.1f}, {np.median(lengths):,.0f}, {lengths.max():,}<" in part
        shown = np.asarray(requests["exposed"])
        assert f"<td>{np.asarray(requests['label'])[shown].mean():.4g}<" in part
        assert part.count("<svg") == 1


def test_a_missing_log_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LogError, match="nothing"):
        Report(tmp_path / "nothing").write()
