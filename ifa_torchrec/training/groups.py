"""How much of a split the training never saw: new items, unknown values, users without a history."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ifa_torchrec.data import RankingDataset
from ifa_torchrec.data.schema import CANDIDATES, EXPOSED, LIST_OFFSETS, TIME, USER
from ifa_torchrec.training.metrics import decile_cuts
from ifa_torchrec.training.own import OwnRequests, counted, own_requests, sum_over_parts

Count = Callable[[np.ndarray], np.ndarray]
Shares = dict[str, float]

_BLOCK = 1 << 22  # events per block


def shares(dataset: RankingDataset) -> dict[str, Any]:
    """The shares of a split that the model's tables do not know. Called by all ranks.

    Events are those in the requests' histories; an event counts once per history that contains it.

    Returns:
        "new_items": the shares of candidates and of events whose item has no row of its own;
        "requests_without_history": the share of requests; "unknown_values": for each other id feature,
        the share of row 0 (unknown) among the requests, candidates or events that it describes; for a
        list, among all its entries. A share of nothing is NaN.
    """
    schema, requests, log = dataset.log.schema, dataset.requests, dataset.log
    total = sum_over_parts(log)

    def share(part: int, whole: int) -> float:
        of_part, of_whole = total(np.array([part, whole])).tolist()
        return of_part / of_whole if of_whole else np.nan

    def of_items(unknown: Count, counted: Count = np.ones_like) -> Shares:
        numbers = np.asarray(requests[CANDIDATES])
        events = [_sum_of_events(dataset, schema.item, each) for each in (unknown, counted)]
        return {
            "candidates": share(unknown(numbers).sum(), counted(numbers).sum()),
            "events": share(*events),
        }

    def of_rows(column: np.ndarray) -> float:
        return share((column == 0).sum(), len(column))

    def of_event(feature: str) -> float:
        return share(
            _sum_of_events(dataset, feature, lambda ids: ids == 0), dataset.history_lengths.sum()
        )

    unknown: dict[str, Shares] = {}
    for name in schema.item_features:
        if name != schema.item:
            rows = np.asarray(log.items[name])
            unknown[name] = of_items(lambda items, rows=rows: rows[items] == 0)
    for name in schema.item_lists:
        offsets = log.items[f"{name}{LIST_OFFSETS}"]
        before = np.concatenate([[0], np.cumsum(np.asarray(log.items[name]) == 0)])
        zeros, lengths = np.diff(before[offsets]), np.diff(offsets)
        unknown[name] = of_items(
            lambda items, zeros=zeros: zeros[items], lambda items, lengths=lengths: lengths[items]
        )
    unknown |= {name: {"events": of_event(name)} for name in schema.event_features}
    unknown |= {name: {"candidates": of_rows(requests[name])} for name in schema.candidate_features}
    in_context = (*schema.context_features, *schema.context_lists)
    unknown |= {name: {"requests": of_rows(requests[name])} for name in in_context}
    return {
        "new_items": of_items(lambda items: log.item_rows(items) == 0),
        "requests_without_history": of_rows(dataset.history_lengths),
        "unknown_values": unknown,
    }


def by_history(
    split: RankingDataset | OwnRequests, logit: np.ndarray, label: np.ndarray
) -> dict[str, Any]:
    """The calibration of a binary task on exposed candidates, by decile of the history length.

    Args:
        split: the split; or this rank's requests of it, whose figures are summed over the ranks.
        logit: [m], of the candidates; label: [m] 0 or 1.

    Returns:
        For each group, named "FEWEST-MOST" by the lengths of its histories (or by a single length):
        "requests"; "candidates", the number of exposed ones; and "calibration", mean prediction over
        mean label, NaN without a label 1. Equal lengths share a group, so there may be fewer than ten.
    """
    own = own_requests(split)
    lengths = own.dataset.history_lengths
    values, counts = counted(own.dataset.log, lengths)  # of all ranks' requests
    if not len(values):
        return {}
    cuts = values[decile_cuts(np.cumsum(counts))]
    of_candidate, shown = np.searchsorted(cuts, lengths)[own.request], own.column(EXPOSED)
    group = np.searchsorted(cuts, values)
    result: dict[str, Any] = {}
    for number in np.unique(group):
        mine, rows = values[group == number], (of_candidate == number) & shown
        predicted_sum = torch.from_numpy(logit[rows].astype(np.float64)).sigmoid().sum()
        figures = (rows.sum(), label[rows].sum(), float(predicted_sum))
        candidates, positives, predicted = own.total(np.array(figures, np.float64)).tolist()
        least, most = mine[0], mine[-1]
        result[f"{least}-{most}" if least < most else f"{least}"] = {
            "requests": int(counts[group == number].sum()),
            "candidates": int(candidates),
            "calibration": predicted / positives if positives else np.nan,
        }
    return result


def _sum_of_events(dataset: RankingDataset, column: str, count: Count) -> int:
    """The sum of ``count`` of the column's values over the events of all histories."""
    requests, log = dataset.requests, dataset.log
    end = log.history_range(requests[USER], requests[TIME])[1]
    start, values, total = end - dataset.history_lengths, log.events[column], 0
    for first in range(0, len(values), _BLOCK):
        numbers = count(np.asarray(values[first : first + _BLOCK]))
        before = np.concatenate([[0], np.cumsum(numbers)])
        last, begin = (before[np.clip(rows - first, 0, len(numbers))] for rows in (end, start))
        total += int((last - begin).sum())
    return total
