"""The toy with all that a schema can name: lists, numbers, vectors, event features, and new items."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from toy import NUM_ITEMS, SCHEMA, Toy, make_toy

KNOWN_ITEMS = 30
"""Rows of the item's table: the items behind them are new."""

RICH_SCHEMA = replace(
    SCHEMA,
    item_features=SCHEMA.item_features | {"item": KNOWN_ITEMS},
    item_lists={"genre": 6, "tag": 4},
    item_dense=("weight", "year"),
    item_vectors={"text": 3, "image": 2},
    event_features={"action": 4, "device": 3},
    event_dense=("dwell", "rating"),
    event_weight="importance",
    context_lists={"interest": 8},
    candidate_features={"place": 5},
    tasks={"label": "binary", "watch": "regression"},
    log_scaled=("dwell", "watch"),
)


def make_rich(seed: int = 0) -> Toy:
    """Each list column has empty lists, and each column of numbers misses some."""
    toy, rng = make_toy(seed), np.random.default_rng(seed)

    def lists(rows: int, table: int) -> list[list[int]]:
        return [rng.integers(1, table, rng.integers(4)).tolist() for _ in range(rows)]

    def numbers(rows: int) -> np.ndarray:
        return np.where(rng.random(rows) < 0.2, np.nan, rng.gamma(2.0, 3.0, rows))

    items, events = toy.items, toy.events
    for name, rows in RICH_SCHEMA.item_lists.items():
        items[name] = [[], *lists(NUM_ITEMS - 1, rows)]
    for name in RICH_SCHEMA.item_dense:
        items[name] = [np.nan, *numbers(NUM_ITEMS - 1)]
    for name, width in RICH_SCHEMA.item_vectors.items():
        items[name] = [np.zeros(width), *rng.normal(size=(NUM_ITEMS - 1, width))]
    for name, rows in RICH_SCHEMA.event_features.items():
        events[name] = rng.integers(rows, size=len(events))
    for name in RICH_SCHEMA.event_dense:
        events[name] = numbers(len(events))
    events["importance"] = rng.integers(3, size=len(events)) / 2
    for frame in toy.requests.values():
        frame["interest"] = lists(len(frame), 8)
        lengths = frame["candidates"].map(len)
        frame["place"] = [rng.integers(5, size=n) for n in lengths]
        frame["price"] = [numbers(n) for n in lengths]
        frame["watch"] = [rng.gamma(2.0, 30.0, n) for n in lengths]
    return replace(toy, schema=RICH_SCHEMA)
