"""An event log as RecBole's atomic files (recbole.io): tab-separated text whose header names each column
and its type.

    python benchmarks/peers/to_recbole.py LOG FOLDER/NAME

    FOLDER/NAME/
      NAME.item          a row an item: item_id, and all that describes it
      NAME.inter         a row an event: user_id, item_id, timestamp (seconds), and what an event has;
                         for models that learn from interactions and split them themselves
      NAME.SPLIT.inter   a row a candidate: user_id, item_id, timestamp, the labels, the request's and
                         the candidate's features, request_id; and item_id_list, the latest items of the
                         user before the request. Of `train` the exposed ones alone, of the others all

RecBole reads the first two as they are (data_path FOLDER, dataset NAME), and the splits with
benchmark_filename: [train, valid, test] and alias_of_item_id: [item_id_list]. Ids are the log's rows,
numbers are as they are in the log, and empty where one is missing. Item 0 is "unknown".
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tyro

from ifa_torchrec.data import EventLog
from ifa_torchrec.data.schema import (
    CANDIDATES,
    EXPOSED,
    LIST_OFFSETS,
    OFFSETS,
    TIME,
    USER,
    Columns,
    LogError,
    LogSchema,
)
from ifa_torchrec.errors import ExistsError

USER_ID, ITEM_ID, TIMESTAMP, REQUEST_ID = "user_id", "item_id", "timestamp", "request_id"
ITEM_LIST = "item_id_list"
TOKEN, FLOAT, TOKENS, FLOATS = "token", "float", "token_seq", "float_seq"
_OWN = (USER_ID, ITEM_ID, TIMESTAMP, REQUEST_ID, ITEM_LIST)


class _Table:
    """Columns of an atomic file."""

    def __init__(self) -> None:
        self.columns: dict[str, Any] = {}

    def add(self, kind: str, columns: dict[str, Any]) -> None:
        self.columns |= {f"{name}:{kind}": values for name, values in columns.items()}

    def write(self, file: Path) -> None:
        pd.DataFrame(self.columns).to_csv(file, sep="\t", index=False)


def to_recbole(
    log: EventLog, folder: str | Path, history_length: int = 50, training: str = "train"
) -> None:
    """Write a log as RecBole's atomic files.

    Args:
        log: the log.
        folder: one that does not exist yet; its name is the data set's.
        history_length: items of ``item_id_list`` at most, the latest.
        training: the split of which only the exposed candidates, which have labels, are written.

    Raises:
        LogError: a column of the log is called as one of these files', nothing was exposed in the split
            that trains, or history_length is below 1.
        ExistsError: ``folder`` exists.

    Example:
        >>> import pandas as pd, tempfile
        >>> from pathlib import Path
        >>> from benchmarks.peers.to_recbole import to_recbole
        >>> from ifa_torchrec.data import EventLog, LogSchema
        >>> day = lambda d: pd.Timestamp(2024, 1, d)
        >>> folder = Path(tempfile.mkdtemp())
        >>> log = EventLog.from_pandas(
        ...     folder / "log",
        ...     events=pd.DataFrame({"user": [7, 7], "item": [3, 1], "time": [day(1), day(2)]}),
        ...     schema=LogSchema(item_features={"item": 4}))
        >>> to_recbole(log, folder / "shop")
        >>> print((folder / "shop" / "shop.inter").read_text().replace("\\t", " "))
        user_id:token item_id:token timestamp:float
        7 3 1704067200.0
        7 1 1704153600.0
        <BLANKLINE>
    """
    folder, schema = Path(folder), log.schema
    if history_length < 1:
        raise LogError(f"history_length must be at least 1, got {history_length}")
    check_names(schema)
    if folder.exists():
        raise ExistsError(f"{folder} exists; delete it or choose another folder")
    folder.mkdir(parents=True)
    _items(log).write(folder / f"{folder.name}.item")
    _events(log).write(folder / f"{folder.name}.inter")
    for split in log.splits:
        table = _candidates(log, split, history_length, shown=split == training)
        table.write(folder / f"{folder.name}.{split}.inter")


def check_names(schema: LogSchema) -> None:
    """Refuse a log with a column that is called as one of these files'.

    Raises:
        LogError: it is.
    """
    for name in (*schema.tables, *schema.item_vectors, *schema.dense, *schema.tasks):
        if name in _OWN:
            raise LogError(f"column {name!r}: RecBole's files have one of this name; rename it")


def _items(log: EventLog) -> _Table:
    table, schema, items = _Table(), log.schema, log.items
    table.add(TOKEN, {ITEM_ID: np.arange(log.num_items)})
    table.add(TOKEN, {name: items[name] for name in schema.item_features if name != schema.item})
    table.add(FLOAT, {name: items[name] for name in schema.item_dense})
    table.add(TOKENS, {name: _lists(items, name) for name in schema.item_lists})
    table.add(
        FLOATS, {n: [" ".join(map(str, v)) for v in items[n].tolist()] for n in schema.item_vectors}
    )
    return table


def _events(log: EventLog) -> _Table:
    table, schema, events = _Table(), log.schema, log.events
    numbers = [*schema.event_dense, *([] if schema.event_weight is None else [schema.event_weight])]
    table.add(TOKEN, {USER_ID: np.repeat(log.users, np.diff(log.user_offsets))})
    table.add(TOKEN, {ITEM_ID: events[schema.item]})
    table.add(FLOAT, {TIMESTAMP: np.asarray(events[TIME]) / 1e6})
    table.add(TOKEN, {name: events[name] for name in schema.event_features})
    table.add(FLOAT, {name: events[name] for name in numbers})
    return table


def _candidates(log: EventLog, split: str, history_length: int, shown: bool) -> _Table:
    table, schema, requests = _Table(), log.schema, log.requests(split)
    kept = np.asarray(requests[EXPOSED]) if shown else np.ones(len(requests[CANDIDATES]), bool)
    if not kept.any():
        raise LogError(f"requests/{split}: nothing was exposed, so there is nothing to train on")
    row_of = np.repeat(np.arange(len(requests[USER])), np.diff(requests[OFFSETS]))[kept]
    table.add(TOKEN, {USER_ID: requests[USER][row_of], ITEM_ID: requests[CANDIDATES][kept]})
    table.add(FLOAT, {TIMESTAMP: requests[TIME][row_of] / 1e6})
    table.add(FLOAT, {name: requests[name][kept] for name in (*schema.tasks, *schema.candidate_dense)})
    table.add(FLOAT, {name: requests[name][row_of] for name in schema.dense_features})
    table.add(TOKEN, {name: requests[name][row_of] for name in schema.context_features})
    table.add(TOKEN, {name: requests[name][kept] for name in schema.candidate_features})
    lists = {name: _lists(requests, name)[row_of] for name in schema.context_lists}
    table.add(TOKENS, lists | {ITEM_LIST: _histories(log, requests, history_length)[row_of]})
    table.add(TOKEN, {REQUEST_ID: row_of})
    return table


def _lists(columns: Columns, name: str) -> np.ndarray:
    """[n] strings, a row's ids with blanks between them."""
    offsets = columns[f"{name}{LIST_OFFSETS}"]
    return _joined(columns[name], offsets[:-1], offsets[1:])


def _histories(log: EventLog, requests: Columns, length: int) -> np.ndarray:
    start, end = log.history_range(requests[USER], requests[TIME])
    return _joined(log.events[log.schema.item], np.maximum(start, end - length), end)


def _joined(values: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    texts = [" ".join(map(str, values[a:b].tolist())) for a, b in zip(start, end, strict=True)]
    return np.array(texts, object)


def main(
    log: tyro.conf.Positional[Path], folder: tyro.conf.Positional[Path], /, history_length: int = 50
) -> None:
    """Write the event log LOG into FOLDER as RecBole's atomic files; FOLDER's name is the data set's."""
    to_recbole(EventLog(log), folder, history_length)
    print(f"{folder} is written")


if __name__ == "__main__":
    tyro.cli(main)
