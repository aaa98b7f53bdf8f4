"""Scales are computed from the training split, block by block."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from ifa_torchrec.data import EventLog, LogSchema, scales


def test_events_count_until_the_last_training_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scales, "_BLOCK", 3)
    days = pd.Timestamp(2024, 1, 1) + pd.to_timedelta(np.tile(np.arange(5), 2), unit="D")
    amount = np.array([1, 2, np.nan, 50, 60, 4, 5, 9, 70, 80], np.float32)
    request = {"candidates": [[1]], "exposed": [[True]], "label": [[1.0]], "user": [1]}
    log = EventLog.from_pandas(
        tmp_path / "log",
        events=pd.DataFrame({"user": np.repeat([1, 2], 5), "item": 1, "time": days, "amount": amount}),
        schema=LogSchema(item_features={"item": 2}, event_dense=("amount",)),
        requests={
            split: pd.DataFrame({**request, "time": [pd.Timestamp(2024, 1, day)]})
            for split, day in (("train", 4), ("test", 9))
        },
    )
    scale, seen = scales.scales_of(log)["amount"], [1, 2, 4, 5, 9]
    assert (scale.mean, scale.deviation) == pytest.approx((np.mean(seen), np.std(seen)))


def test_nothing_is_read_if_nothing_is_scaled() -> None:
    log: Any = SimpleNamespace(schema=LogSchema(item_features={"item": 2}))
    assert scales.scales_of(log) == {}
