"""The example on synthetic households: a day is measured, trained and served; no purchase is lost."""

from __future__ import annotations

import re
import sys
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from torchrec.test_utils import get_free_port

from ifa_torchrec.data import EventLog

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "daily"))
import daily

FIRST = date(2024, 3, 1)


def purchases(households: int = 30, baskets: int = 400) -> pd.DataFrame:
    """Purchases of twenty days before the first day and of two days after; some products come late."""
    rng = np.random.default_rng(0)
    begin = pd.Timestamp(FIRST) - pd.Timedelta(days=10)
    times = begin + pd.to_timedelta(np.sort(rng.integers(0, 22 * 86400, baskets)), unit="s")
    rows = []
    for basket, time in enumerate(times):
        products = np.unique(rng.integers(1, 60 + basket // 20, 4))
        household = int(rng.integers(1, households + basket // 100))
        rows += [(household, product, time, 1 + household % 3, basket) for product in products]
    return pd.DataFrame(rows, columns=["household", "product", "time", "store", "basket"])


@pytest.mark.slow
def test_a_day(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(daily, "SHOWN", 8)
    bought = purchases()
    products = pd.DataFrame({"product": np.arange(1, 100), "category": np.arange(1, 100) % 7})
    config = daily.ExampleConfig(
        tmp_path / "daily", FIRST, days=1, requests=150, unchanged=True, port=get_free_port()
    )
    daily.daily(config, bought, products)
    printed = capsys.readouterr().out
    assert re.search(r"[\d,]+ households, [\d,]+ purchases; 0 states lack some", printed)
    again = re.search(r"once more:\n(.*)", printed)
    assert again is not None and "'taken'" not in again[1] and "'duplicate'" in again[1]
    assert len(re.findall(r" serves; [1-9]\d* purchases came meanwhile", printed)) == 1
    kept = re.findall(r"of which ([\d,]+) are unchanged", printed)
    assert kept[0] == "0" and int(kept[1]) > 0
    parts = pd.read_csv(config.out / "runs" / "parts.csv", index_col="part")
    assert list(parts.index) == ["2024-02-29", "2024-03-01"]
    assert parts["new_items"][1:].between(0, 1).all() and parts["ne"][1:].notna().all()
    logs = (EventLog(config.out / "logs" / day) for day in parts.index)
    rows = [log.schema.item_features["item"] for log in logs]
    assert rows == sorted(rows)
