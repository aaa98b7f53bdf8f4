"""An event log in the layout that FuxiCTR's LongCTR models read (github.com/reczoo/FuxiCTR).

    python benchmarks/peers/to_fuxictr.py LOG FOLDER

    FOLDER/
      item_info.parquet   a row an item: item_index, and its features; row 0 is the padding, so an item
                          of the log is one row further down
      user_info.parquet   a row a user: full_item_seq, the item_index of all events, in the order of
                          time; the last row is that of the users without events
      SPLIT.parquet       a row a candidate: user_index, item_index, seq_len (so many events of the user
                          lie before the request), the request's and the candidate's features, the label;
                          and request_index, which FuxiCTR does not read. Of `train` the exposed ones
                          alone, of the others all, in the log's order
      feature_map.json    what the columns are; written last

A feature is called x_NAME, since FuxiCTR makes a module of each name, and some, like `type`, are taken
there; the label is called label. Numbers are standardised as the log says, and 0 where they are missing.
A sequence of that layout is of items alone, and its items have no lists: what else events and requests
have is left out, and told.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro

from ifa_torchrec.batch import Scale
from ifa_torchrec.data import EventLog, LogSchema
from ifa_torchrec.data.schema import CANDIDATES, EXPOSED, OFFSETS, TIME, USER, Columns, LogError
from ifa_torchrec.errors import ExistsError

USER_INDEX, ITEM_INDEX, SEQ_LEN = "user_index", "item_index", "seq_len"
REQUEST, LABEL = "request_index", "label"


def to_fuxictr(log: EventLog, folder: str | Path, training: str = "train") -> list[str]:
    """Write a log in FuxiCTR's layout.

    Args:
        log: with a binary task, of which the first is the label.
        folder: one that does not exist yet.
        training: the split of which only the exposed candidates, which have labels, are written.

    Returns:
        What the log has and the layout has not: the columns' names.

    Raises:
        LogError: the log has no binary task or no requests, or nothing was exposed in the split that
            trains.
        ExistsError: ``folder`` exists.

    Example:
        >>> import pandas as pd, tempfile
        >>> from benchmarks.peers.to_fuxictr import to_fuxictr
        >>> from ifa_torchrec.data import EventLog, LogSchema
        >>> day = lambda d: pd.Timestamp(2024, 1, d)
        >>> folder = tempfile.mkdtemp()
        >>> log = EventLog.from_pandas(
        ...     folder + "/log",
        ...     events=pd.DataFrame({"user": [7, 7], "item": [3, 1], "time": [day(1), day(4)]}),
        ...     requests={"test": pd.DataFrame({"user": [7], "time": [day(2)], "candidates": [[1, 2]],
        ...         "exposed": [[True, True]], "label": [[0, 1]]})},
        ...     schema=LogSchema(item_features={"item": 4}))
        >>> to_fuxictr(log, folder + "/fuxictr")
        []
        >>> pd.read_parquet(folder + "/fuxictr/test.parquet")[["item_index", "seq_len"]].values.tolist()
        [[2, 1], [3, 1]]
    """
    folder = Path(folder)
    label = label_of(log.schema)
    if not log.splits:
        raise LogError(f"{log.place}: it has no requests, so there is nothing to train on")
    if folder.exists():
        raise ExistsError(f"{folder} exists; delete it or choose another folder")
    folder.mkdir(parents=True)
    pq.write_table(_items(log), folder / "item_info.parquet")
    pq.write_table(_users(log), folder / "user_info.parquet")
    for split in log.splits:
        rows = _candidates(log, split, label, shown=split == training)
        pq.write_table(pa.table(rows), folder / f"{split}.parquet")
    features = _features(log.schema)
    feature_map = {
        "dataset_id": folder.name,
        "num_fields": sum(spec["type"] != "meta" for spec in features.values()),
        "total_features": sum(spec.get("vocab_size", 1) for spec in features.values()),
        "input_length": len(features),
        "labels": [LABEL],
        "features": [{name: spec} for name, spec in features.items()],
    }
    (folder / "feature_map.json").write_text(json.dumps(feature_map, indent=1))
    return left_out(log.schema, label)


def label_of(schema: LogSchema) -> str:
    """The task that FuxiCTR's models are trained for, the first binary one.

    Raises:
        LogError: there is none.
    """
    for name, kind in schema.tasks.items():
        if kind == "binary":
            return name
    raise LogError(f"FuxiCTR's models need a binary task; the log has {dict(schema.tasks)}")


def named(feature: str) -> str:
    """A feature's column."""
    return f"x_{feature}"


def left_out(schema: LogSchema, label: str) -> list[str]:
    """Names of the columns that the layout has no place for."""
    weight = [] if schema.event_weight is None else [schema.event_weight]
    lists = (schema.event_features, schema.event_dense, weight, schema.item_lists, schema.context_lists)
    others = [task for task in schema.tasks if task != label]
    return [name for names in lists for name in names] + others


def _features(schema: LogSchema) -> dict[str, dict[str, Any]]:
    """What FuxiCTR is told of each column that it reads."""
    result: dict[str, dict[str, Any]] = {n: {"type": "meta"} for n in (USER_INDEX, ITEM_INDEX, SEQ_LEN)}

    def add(names: Any, source: str, kind: str, size: str | None = None) -> None:
        for name in names:
            result[named(name)] = {"source": source, "type": kind} | (
                {size: names[name]} if size else {}
            )

    add(schema.item_features, "item", "categorical", "vocab_size")
    add(schema.item_dense, "item", "numeric")
    add(schema.item_vectors, "item", "embedding", "pretrain_dim")
    add(schema.context_features, "context", "categorical", "vocab_size")
    add(schema.dense_features, "context", "numeric")
    add(schema.candidate_features, "candidate", "categorical", "vocab_size")
    add(schema.candidate_dense, "candidate", "numeric")
    return result


def _items(log: EventLog) -> pa.Table:
    schema, padding = log.schema, 1
    columns: dict[str, Any] = {ITEM_INDEX: np.arange(log.num_items + padding)}
    for name in schema.item_features:
        ids = np.asarray(log.items[name])
        columns[named(name)] = np.append(0, log.item_rows(ids) if name == schema.item else ids)
    for name in schema.item_dense:
        columns[named(name)] = np.append(np.float32(0), standardised(log.items[name], log.scales[name]))
    for name, width in schema.item_vectors.items():
        vectors = np.append(np.zeros((1, width), np.float32), log.items[name], axis=0)
        columns[named(name)] = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), width)
    return pa.table(columns)


def _users(log: EventLog) -> pa.Table:
    offsets = np.append(log.user_offsets, log.user_offsets[-1])
    items = pa.array(np.asarray(log.events[log.schema.item]) + 1)
    return pa.table({"full_item_seq": pa.LargeListArray.from_arrays(pa.array(offsets), items)})


def _candidates(log: EventLog, split: str, label: str, shown: bool) -> dict[str, np.ndarray]:
    schema, requests = log.schema, log.requests(split)
    kept = np.asarray(requests[EXPOSED]) if shown else np.ones(len(requests[CANDIDATES]), bool)
    if not kept.any():
        raise LogError(f"requests/{split}: nothing was exposed, so there is nothing to train on")
    start, end = log.history_range(requests[USER], requests[TIME])
    row_of = np.repeat(np.arange(len(start)), np.diff(requests[OFFSETS]))[kept]
    result = {
        REQUEST: row_of,
        USER_INDEX: user_index(log, requests)[row_of],
        ITEM_INDEX: np.asarray(requests[CANDIDATES])[kept] + 1,
        SEQ_LEN: (end - start)[row_of],
    }
    result |= {named(name): np.asarray(requests[name])[row_of] for name in schema.context_features}
    result |= {named(name): np.asarray(requests[name])[kept] for name in schema.candidate_features}
    for name in schema.dense_features:
        result[named(name)] = standardised(requests[name], log.scales[name])[row_of]
    for name in schema.candidate_dense:
        result[named(name)] = standardised(requests[name], log.scales[name])[kept]
    return result | {LABEL: np.asarray(requests[label])[kept].astype(np.float32)}


def user_index(log: EventLog, requests: Columns) -> np.ndarray:
    """[R] int64, the row of user_info of each request's user."""
    order = np.argsort(log.users)  # of a log in parts they are not in order
    place = np.searchsorted(log.users, requests[USER], sorter=order)
    found = order[np.minimum(place, len(order) - 1)] if len(order) else place
    known = log.users[found] == requests[USER] if len(order) else np.zeros(len(place), bool)
    return np.where(known, found, len(log.users))


def standardised(values: np.ndarray, scale: Scale) -> np.ndarray:
    """Numbers as the model sees them, 0 where one is missing."""
    numbers = np.log1p(values) if scale.log else np.asarray(values)
    return np.nan_to_num((numbers - scale.mean) / scale.deviation, nan=0.0).astype(np.float32)


def main(log: tyro.conf.Positional[Path], folder: tyro.conf.Positional[Path], /) -> None:
    """Write the event log LOG into FOLDER in FuxiCTR's layout."""
    lost = to_fuxictr(EventLog(log), folder)
    print(f"{folder} is written" + (f"; left out: {', '.join(lost)}" if lost else ""))


if __name__ == "__main__":
    tyro.cli(main)
