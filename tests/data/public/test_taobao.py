"""Taobao's UserBehavior, in a file of its published layout."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ifa_torchrec.data import LogError
from ifa_torchrec.data.public import taobao

pytest.importorskip("duckdb", reason="the extra `data` is not installed")

SECONDS, MINUTE, HOUR = 1_000_000, 60, 3600


def start(day: str) -> int:
    return int(pd.Timestamp(f"{day} 00:00", tz="Asia/Shanghai").timestamp())


def write(folder: Path, strays: list[int]) -> Path:
    """Forty users: every day each views three of 200 items in the morning and one in the evening, and
    does something else with the first. Also one row per stray time. Each category has ten items."""
    rng = np.random.default_rng(0)
    rows = []
    for user in range(40):
        for day in pd.date_range("2017-11-25", "2017-12-03").strftime("%Y-%m-%d"):
            items = rng.choice(200, size=4, replace=False)
            morning = start(day) + 8 * HOUR + user
            for place, item in enumerate(items[:3]):
                rows.append((user, item, "pv", morning + 29 * MINUTE * place))
            rows.append((user, items[0], rng.choice(["buy", "cart", "fav"]), morning + 5))
            rows.append((user, items[3], "pv", morning + 12 * HOUR))
    rows += [(0, 0, "pv", stray) for stray in strays]
    lines = [f"{user + 1},{item + 1000},{item // 10},{kind},{time}" for user, item, kind, time in rows]
    (folder / "UserBehavior.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_taobao(tmp_path: Path) -> None:
    strays = [-2134949234, 1479721354, start("2017-11-25") - 1, start("2017-12-04"), 2122867355]
    log = taobao.prepare(write(tmp_path, strays), tmp_path / "log")
    assert tuple(log.schema.tasks) == taobao.TASKS
    assert len(log.events["item"]) == 40 * 9 * 5
    assert log.events["time"].min() >= start("2017-11-25") * SECONDS
    category = log.vocabulary["category"].at(log.items["category"])
    assert category[1:] == [(int(name) - 1000) // 10 for name in log.item_names()[1:]]
    action = log.vocabulary["action"].at(log.events["action"])
    assert action.count("pv") == 40 * 9 * 4 and set(action) == {"pv", "buy", "cart", "fav"}

    file = pd.read_csv(
        tmp_path / "UserBehavior.csv", names=["user", "item", "category", "kind", "time"]
    ).astype({"item": str})
    days = {"train": "2017-12-01", "valid": "2017-12-02", "test": "2017-12-03"}
    assert log.splits == list(days)
    for split, day in days.items():
        requests, names = log.requests(split), np.array(log.item_names())
        assert len(requests["user"]) == 40 * 2  # a morning and an evening
        assert (requests["time"] >= start(day) * SECONDS).all()
        assert (requests["time"] < (start(day) + 24 * HOUR) * SECONDS).all()
        assert requests["exposed"].all()
        added = 0
        for row in range(len(requests["user"])):
            mine = slice(*requests["candidate_offsets"][row : row + 2])
            items, viewed = names[requests["candidates"][mine]], requests["viewed"][mine] == 1
            seen = file[(file["user"] == requests["user"][row]) & (file["kind"] == "pv")]
            late = seen["time"] - requests["time"][row] // SECONDS
            assert sorted(items[viewed]) == sorted(seen["item"][(late >= 0) & (late <= HOUR)])
            assert len(set(items)) == len(items)
            added += (~viewed).sum()
        figures = json.loads((log.path / "report.json").read_text())["requests"][split]
        assert figures["negatives"] == {"asked_for": 4 * 40 * 4, "added": added}
        assert added > 0.85 * 4 * 40 * 4
        assert figures["positives_in_last_second"] == 0

    refused = json.loads((log.path / "report.json").read_text())["refused"]
    assert refused["items"] == {"rows": 1805, "refused": 0, "reasons": {}}
    assert refused["requests"]["refused"] == 2  # only those from December on
    assert refused["events"]["refused"] == 5
    ((why, figures),) = refused["events"]["reasons"].items()
    assert why == "time cannot be read as a number in s (a 32-bit float is minutes off)"
    assert "'time': -2134949234 is not from 25 November to 3 December 2017" in figures["examples"][0]


def test_many_strays(tmp_path: Path) -> None:
    with pytest.raises(LogError, match=r"events: 20 of 1820 rows.*0 is not from 25 November"):
        taobao.prepare(write(tmp_path, list(range(20))), tmp_path / "log")


def test_another_folder(tmp_path: Path) -> None:
    with pytest.raises(LogError, match=r"no file matches .*UserBehavior\.csv"):
        taobao.prepare(tmp_path, tmp_path / "log")
