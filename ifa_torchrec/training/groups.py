"""What of a split the training never saw: new items, unknown values, users without a history."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ifa_torchrec.data import RankingDataset
from ifa_torchrec.data.schema import CANDIDATES, OFFSETS, TIME, USER

_BLOCK = 1 << 22  # events looked at at once
_GROUPS = 10


def new_items(dataset: RankingDataset) -> np.ndarray:
    """Whether each candidate of a split is an item without a row of its own: [M] bool."""
    return _is_new(dataset, np.asarray(dataset.requests[CANDIDATES]))


def shares(dataset: RankingDataset) -> dict[str, Any]:
    """How much of a split the model's tables do not know.

    Events are those of the requests' histories, each as often as it stands in one.

    Returns:
        "new_items": the share of candidates and of events whose item has no row of its own;
        "requests_without_history": the share of requests; "unknown_values": of each other id feature
        the share of row 0, "unknown", among what it describes: requests, candidates or events. NaN of
        none.
    """
    schema, requests, log = dataset.log.schema, dataset.requests, dataset.log
    item, items = schema.item, log.items
    candidates = np.asarray(requests[CANDIDATES])

    def of_item(feature: str) -> dict[str, float]:
        unknown = np.asarray(items[feature]) == 0
        return {
            "candidates": _mean(unknown[candidates]),
            "events": _share_of_events(dataset, item, lambda numbers: unknown[numbers]),
        }

    def zero(values: np.ndarray) -> np.ndarray:
        return values == 0

    unknown = {f: of_item(f) for f in schema.item_features if f != item}
    unknown |= {f: {"events": _share_of_events(dataset, f, zero)} for f in schema.event_features}
    unknown |= {f: {"candidates": _mean(requests[f] == 0)} for f in schema.candidate_features}
    unknown |= {f: {"requests": _mean(requests[f] == 0)} for f in schema.context_features}
    return {
        "new_items": {
            "candidates": _mean(new_items(dataset)),
            "events": _share_of_events(dataset, item, lambda numbers: _is_new(dataset, numbers)),
        },
        "requests_without_history": _mean(dataset.history_lengths == 0),
        "unknown_values": unknown,
    }


def by_history(dataset: RankingDataset, logit: np.ndarray, label: np.ndarray) -> dict[str, Any]:
    """The calibration of a binary task, by the deciles of the requests' histories' lengths.

    Args:
        dataset: the split.
        logit: [M]; label: [M] 0 or 1.

    Returns:
        For each group, named "FEWEST-MOST" by its histories' events, or by their one number,
        "requests", "candidates" and "calibration", mean prediction over mean label; NaN without a
        label 1. Lengths that are equal are in one group, so there may be fewer than ten.
    """
    lengths, counts = dataset.history_lengths, np.diff(dataset.requests[OFFSETS])
    if not len(lengths):
        return {}
    cuts = np.unique(np.quantile(lengths, np.arange(1, _GROUPS) / _GROUPS, method="higher"))
    group = np.searchsorted(cuts, lengths)
    of_candidate = np.repeat(group, counts)
    result: dict[str, Any] = {}
    for number in np.unique(group):
        mine, rows = lengths[group == number], of_candidate == number
        positives = float(label[rows].sum())
        predicted = float(torch.from_numpy(logit[rows].astype(np.float64)).sigmoid().sum())
        least, most = mine.min(), mine.max()
        result[f"{least}-{most}" if least < most else f"{least}"] = {
            "requests": len(mine),
            "candidates": int(rows.sum()),
            "calibration": predicted / positives if positives else np.nan,
        }
    return result


def _is_new(dataset: RankingDataset, items: np.ndarray) -> np.ndarray:
    schema = dataset.log.schema
    return (items == 0) | (items >= schema.item_features[schema.item])


def _share_of_events(
    dataset: RankingDataset, column: str, told: Callable[[np.ndarray], np.ndarray]
) -> float:
    """Of the events of all histories, the share of which ``told`` is true of the column's value."""
    requests, log = dataset.requests, dataset.log
    end = log.history_range(requests[USER], requests[TIME])[1]
    start, values = end - dataset.history_lengths, log.events[column]
    total = 0
    for first in range(0, len(values), _BLOCK):
        true = told(np.asarray(values[first : first + _BLOCK]))
        before = np.concatenate([[0], np.cumsum(true)])
        total += int((before[_within(end - first, true)] - before[_within(start - first, true)]).sum())
    events = int(dataset.history_lengths.sum())
    return total / events if events else np.nan


def _within(rows: np.ndarray, block: np.ndarray) -> np.ndarray:
    return np.clip(rows, 0, len(block))


def _mean(true: np.ndarray) -> float:
    return float(true.mean()) if len(true) else np.nan
