"""Which rows of the tables a training uses."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist

from ifa_torchrec.data import RankingDataset
from ifa_torchrec.data.schema import CANDIDATES, LIST_OFFSETS, TIME, USER, Columns


def touched_rows(
    dataset: RankingDataset, histories: bool, unknown_items: bool
) -> dict[str, torch.Tensor]:
    """The rows that the requests of a split use: their own ids, their candidates' ids and the ids of the
    events in their histories. Called by all ranks if each has its own parts of the log.

    Args:
        dataset: the split, with histories cut to the length that the model gets.
        histories: whether the model uses histories.
        unknown_items: whether items are made unknown during training, so that row 0 is used.

    Returns:
        By id feature, [rows] bool: whether each row of its table is used.

    Example:
        >>> import pandas as pd, tempfile
        >>> from ifa_torchrec.data import EventLog, LogSchema, RankingDataset
        >>> from ifa_torchrec.training.touched import touched_rows
        >>> day = lambda d: pd.Timestamp(2024, 1, d)
        >>> log = EventLog.from_pandas(
        ...     tempfile.mkdtemp() + "/log",
        ...     events=pd.DataFrame({"user": [1, 1], "item": [1, 2], "time": [day(1), day(3)]}),
        ...     requests={"train": pd.DataFrame({"user": [1], "time": [day(2)],
        ...         "candidates": [[3]], "exposed": [[True]], "label": [[1]]})},
        ...     schema=LogSchema(item_features={"item": 5}))
        >>> rows = touched_rows(RankingDataset(log, "train"), histories=True, unknown_items=False)
        >>> rows["item"].tolist()
        [False, True, False, True, False]
    """
    log, schema, requests = dataset.log, dataset.log.schema, dataset.requests
    events = np.zeros(len(log.events[TIME]), bool)
    if histories:
        end = log.history_range(requests[USER], requests[TIME])[1]
        edges = np.bincount(end - dataset.history_lengths, minlength=len(events) + 1)
        edges -= np.bincount(end, minlength=len(events) + 1)
        events = np.cumsum(edges)[:-1] > 0
    items = np.zeros(log.num_items, bool)
    items[log.events[schema.item][events]] = True
    items[requests[CANDIDATES]] = True

    ids = {f: log.items[f][items] for f in schema.item_features}
    ids[schema.item] = log.item_rows(np.flatnonzero(items))
    if unknown_items:
        ids[schema.item] = np.append(ids[schema.item], 0)
    ids |= {f: _of_lists(log.items, f, items) for f in schema.item_lists}
    ids |= {f: log.events[f][events] for f in schema.event_features}
    own = (*schema.context_features, *schema.context_lists, *schema.candidate_features)
    ids |= {f: requests[f] for f in own}
    result: dict[str, torch.Tensor] = {}
    for name, rows in schema.tables.items():
        used = np.zeros(rows, bool)
        used[ids[name]] = True
        result[name] = torch.from_numpy(used) if log.whole else _used_by_any(used)
    return result


def _used_by_any(used: np.ndarray) -> torch.Tensor:
    """The rows used on any rank."""
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    rows = torch.from_numpy(used.astype(np.uint8)).to(device)
    dist.all_reduce(rows, dist.ReduceOp.MAX)
    return rows.bool().cpu()


def _of_lists(items: Columns, name: str, kept: np.ndarray) -> np.ndarray:
    """The ids in the lists of the items that are kept, [I] bool."""
    return items[name][np.repeat(kept, np.diff(items[f"{name}{LIST_OFFSETS}"]))]
