"""The scorers without a neural net, compared with plain loops."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from toy import Toy

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from baselines import counts, days_since, features, measured, popularity

from ifa_torchrec.data import EventLog, RankingDataset
from ifa_torchrec.data.synthetic import SyntheticConfig, prepare


@pytest.fixture(scope="module")
def test_split(log: EventLog) -> RankingDataset:
    return RankingDataset(log, "test")


def rows(toy: Toy) -> list[tuple[int, pd.DataFrame]]:
    """Each candidate of the test requests, with the user's earlier events and their ages in days."""
    found = []
    for request in toy.requests["test"].itertuples():
        mine = toy.events[(toy.events["user"] == request.user) & (toy.events["time"] < request.time)]
        mine = mine.assign(age=(request.time - mine["time"]).dt.total_seconds() / 86400)
        found += [(item, mine) for item in request.candidates]
    return found


def test_counts_and_days_are_the_plain_loops(toy: Toy, test_split: RankingDataset) -> None:
    category = toy.items.set_index("item")["category"]
    found = counts(test_split, "category", (math.inf, 7.0))
    days = days_since(test_split, "item")
    assert len(found) == len(days) == len(rows(toy))
    for number, (item, mine) in enumerate(rows(toy)):
        ages = mine["age"][category[mine["item"]].to_numpy() == category[item]]
        assert found[number] == pytest.approx([len(ages), (0.5 ** (ages / 7)).sum()], rel=1e-4)
        same = mine["age"][mine["item"] == item]
        assert np.isnan(days[number]) == same.empty
        if len(same):  # within the precision of the sum over several events
            assert same.min() - np.log(len(same)) / 2 - 1e-3 <= days[number] <= same.min() + 1e-3


def test_popularity_and_features_are_of_each_candidate(toy: Toy, test_split: RankingDataset) -> None:
    wanted = []
    for request in toy.requests["test"].itertuples():
        items = toy.events["item"][toy.events["time"] < request.time]
        wanted += [((items == item).sum() + 1) / (len(items) + 1) for item in request.candidates]
    assert popularity(test_split) == pytest.approx(wanted)
    values, names = features(test_split)
    assert values.shape == (len(rows(toy)), len(names))
    assert {"item, half-life 7", "category, days since", "popularity", "price", "store"} <= {*names}
    assert values[:, names.index("events of the user")].tolist() == [len(m) for _, m in rows(toy)]


@pytest.mark.parametrize("name", ["popularity", "purchase_count", "recency_count"])
def test_they_are_measured(log: EventLog, name: str) -> None:
    metrics = measured(log, name)
    assert 0 < metrics["gauc"] < 1 and "ne" not in metrics


def test_lightgbm_learns(log: EventLog) -> None:
    pytest.importorskip("lightgbm")
    metrics = measured(log, "lightgbm")
    assert metrics["gauc"] > 0.8 and metrics["train_seconds"] > 0


def test_lightgbm_learns_where_all_requests_are_of_one_time(tmp_path: Path) -> None:
    """And there is no split `valid` for early stopping."""
    pytest.importorskip("lightgbm")
    config = SyntheticConfig(train=60, test=20, mean_events=30)
    log = prepare(tmp_path / "log", config)
    assert len(np.unique(log.requests("train")["time"])) == 1
    assert 0 <= measured(log, "lightgbm")["gauc"] <= 1
