"""A tiny event log: six users, forty items in four categories, requests in three splits."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from ifa_torchrec.data import EventLog, LogSchema

NEW_USER, ONE_EVENT_USER, BUSY_USER = 5, 8, 40
USERS = (NEW_USER, ONE_EVENT_USER, 11, 20, 21, BUSY_USER)
NUM_EVENTS = {ONE_EVENT_USER: 1, 11: 7, 20: 12, 21: 25, BUSY_USER: 150}
NUM_ITEMS, NUM_CATEGORIES = 40, 4
START = pd.Timestamp(2024, 1, 1)
SPLITS = {"train": 48, "valid": 12, "test": 12}

SCHEMA = LogSchema(
    item_features={"item": NUM_ITEMS, "category": NUM_CATEGORIES + 1},
    context_features={"store": 3, "weekday": 7},
    dense_features=("hour", "season"),
    candidate_dense=("price",),
    candidate_tags={"source": ("popular", "promoted")},
)


@dataclass
class Toy:
    """The DataFrames of a log, to be written as they are, or damaged by a test."""

    events: pd.DataFrame
    items: pd.DataFrame
    requests: dict[str, pd.DataFrame]
    schema: LogSchema = field(default_factory=lambda: SCHEMA)

    def write(self, path: Path) -> EventLog:
        return EventLog.from_pandas(path, self.events, self.schema, self.items, self.requests)


def make_toy(seed: int = 0) -> Toy:
    """Items of category 1 are clicked, so every model can learn something.

    Events are in no order. About half of the requests are made at exactly the time of an event of
    the same user; every user makes some.
    """
    rng = np.random.default_rng(seed)
    items = pd.DataFrame({"item": np.arange(NUM_ITEMS)})
    items["category"] = items["item"] % NUM_CATEGORIES + 1
    items.loc[0, "category"] = 0  # the unknown item
    items["name"] = [f"thing number {i}" for i in range(NUM_ITEMS)]

    user = np.repeat(list(NUM_EVENTS), list(NUM_EVENTS.values()))
    events = pd.DataFrame(
        {
            "user": user,
            "time": START + pd.to_timedelta(rng.integers(0, 90 * 86400, len(user)), unit="s"),
            "item": rng.integers(0, NUM_ITEMS, len(user)),
        }
    )
    # in the middle, so that requests are before, at and after it
    events.loc[events["user"] == ONE_EVENT_USER, "time"] = START + pd.Timedelta(days=45)
    events = events.sample(frac=1, random_state=seed, ignore_index=True)

    requests = {name: _requests(rng, events, items, rows) for name, rows in SPLITS.items()}
    return Toy(events, items, requests)


def _requests(
    rng: np.random.Generator, events: pd.DataFrame, items: pd.DataFrame, count: int
) -> pd.DataFrame:
    rows = []
    for number in range(count):
        user = USERS[number % len(USERS)]
        own = events.loc[events["user"] == user, "time"]
        if len(own) and number // len(USERS) % 2:
            time = own.iloc[rng.integers(len(own))]
        else:
            time = START + pd.Timedelta(seconds=int(rng.integers(0, 90 * 86400)))
        candidates = rng.permutation(NUM_ITEMS)[: rng.integers(4, 10)]
        rows.append(
            {
                "user": user,
                "time": time,
                "store": rng.integers(3),
                "weekday": time.weekday(),
                "hour": time.hour / 24,
                "season": rng.normal(),
                "candidates": candidates,
                "exposed": rng.random(len(candidates)) < 0.5,
                "label": (items["category"].to_numpy()[candidates] == 1).astype(np.float32),
                "price": rng.normal(size=len(candidates)),
                "source": rng.integers(2, size=len(candidates)),
            }
        )
    return pd.DataFrame(rows)
