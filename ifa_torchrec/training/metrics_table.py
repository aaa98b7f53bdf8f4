"""The metrics of a split as a readable table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from ifa_torchrec.modules import Task

_NAMES = {
    "candidates": "candidates",
    "requests_ranked": "requests with an order",
    "auc": "AUC",
    "gauc": "GAUC",
    "ndcg@10": "NDCG@10",
    "recall@10": "recall@10",
    "ne": "log loss / log loss of the mean label",
    "calibration": "mean prediction / mean label",
    "mae": "mean absolute error, in the label's unit",
    "rmse": "root mean squared error, in the label's unit",
    "correlation": "correlation within a request",
    "gap": "mean change of the prediction",
}
_RANKED, _AGAINST = "ranked_", "gauc_"
_VIEWS = {"_exposed": "exposed", "_exposed_alone": "exposed, without the others"}
"""Suffixes of metrics of exposed candidates, and the columns' names."""

_STRATEGIES = {"topk": "sets by top-k", "greedy": "chosen one by one"}


def as_table(metrics: Mapping[str, Any], tasks: Sequence[Task]) -> str:
    """Each task's metrics by readable names, then the sets and the unknown shares.

    Args:
        metrics: what ``evaluate`` returns.
        tasks: the model's tasks.

    Example:
        >>> from ifa_torchrec.modules import Task
        >>> from ifa_torchrec.training.metrics_table import as_table
        >>> reason = "each request has only one candidate, so there is no order within it"
        >>> metrics = {"auc": 0.75, "gauc": float("nan"), "notes": {"like": reason}}
        >>> print(as_table(metrics, [Task("like")]))
        like (0 or 1)
                 all
        AUC   0.7500
        GAUC    none
        No order to measure: each request has only one candidate, so there is no order within it.
    """
    parts: list[str] = []
    for task in tasks:
        of_task = metrics if len(tasks) == 1 else metrics[task.name]
        columns = {"all": of_task} | {
            name: {k.removesuffix(end): v for k, v in of_task.items() if k.endswith(end)}
            for end, name in _VIEWS.items()
            if any(k.endswith(end) for k in of_task)
        }
        columns |= {f"{k} items": v for k, v in of_task.get("items", {}).items()}
        lines = [f"{task.name} ({'0 or 1' if task.kind == 'binary' else 'a number'})"]
        lines.append(_text({name: _of_task(values) for name, values in columns.items()}))
        if task.name in metrics.get("notes", {}):
            lines.append(f"No order to measure: {metrics['notes'][task.name]}.")
        if of_task.get("by_history"):
            groups = {
                f"{events} events in the history": {
                    _NAMES.get(k) or k: _number(v) for k, v in row.items()
                }
                for events, row in of_task["by_history"].items()
            }
            lines.append(_text(groups, transposed=True))
        parts.append("\n".join(lines))
    if "sets" in metrics:
        parts.append(_text({_STRATEGIES[k]: _of_sets(v) for k, v in metrics["sets"].items()}))
    if "shares" in metrics:
        parts.append(_text(_shares(metrics["shares"]), transposed=True))
    return "\n\n".join(parts)


def _of_task(values: Mapping[str, Any]) -> dict[str, str]:
    """A task's metrics by readable names, without those of groups."""
    named = {key: name for key, name in _NAMES.items() if key in values}
    named |= {
        key: f"GAUC against {key.removeprefix(_AGAINST)}"
        for key in values
        if key.startswith(_AGAINST) and not key.endswith(tuple(_VIEWS))
    }
    named |= {
        _RANKED + key: f"{name}, by the ranking score"
        for key, name in _NAMES.items()
        if _RANKED + key in values
    }
    return {name: _number(values[key]) for key, name in named.items()}


def _of_sets(values: Mapping[str, Any]) -> dict[str, str]:
    """The metrics of sets; one row per item feature for those by item feature."""
    rows: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            rows |= {f"{name} of {feature}": _number(of) for feature, of in value.items()}
        else:
            rows[_NAMES.get(name, name)] = _number(value)
    return rows


def _shares(shared: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    rows = {
        "new items": shared["new_items"],
        "without history": {"requests": shared["requests_without_history"]},
        **{f"unknown {name}": of for name, of in shared["unknown_values"].items()},
    }
    return {
        name: {f"of {what}": "none" if np.isnan(share) else f"{share:.1%}" for what, share in of.items()}
        for name, of in rows.items()
    }


def _number(value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return "none" if np.isnan(value) else f"{value:.4f}"


def _text(columns: Mapping[str, Mapping[str, str]], transposed: bool = False) -> str:
    # reversed, since only the columns of parts have the row with the number of candidates, the first one
    backwards = dict(reversed(list(columns.items())))
    frame = pd.DataFrame(backwards, dtype=object)[list(columns)].fillna("")
    return (frame.T if transposed else frame).to_string()
