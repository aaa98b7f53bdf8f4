"""Check the tables of a log against its schema while converting them from Arrow to numpy.

Every error names the table, the row, the column and the fix.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from ifa_torchrec.data.columns import Column
from ifa_torchrec.data.schema import (
    CANDIDATES,
    EXPOSED,
    LIST_OFFSETS,
    OFFSETS,
    TIME,
    USER,
    USER_OFFSETS,
    Columns,
    LogError,
    LogSchema,
)


def check_items(table: pa.Table, schema: LogSchema) -> Columns:
    """The columns of items.parquet.

    Returns:
        For each item feature, [I] int64; for each list, its flat ids, int64, and its offsets [I + 1]
        int64; for each number, [I] float32, NaN where missing; for each vector, [I, width] float32.

    Raises:
        LogError: a column is missing, null, of the wrong type or outside its table; row i is not item i;
            a vector has the wrong length; or row 0, "unknown", is not empty.

    Example:
        >>> import pyarrow as pa
        >>> from ifa_torchrec.data import LogSchema
        >>> from ifa_torchrec.data.checks import check_items
        >>> check_items(pa.table({"item": [0, 1]}), LogSchema(item_features={"item": 2}))
        {'item': array([0, 1])}
    """
    columns: Columns = {}
    for feature, rows in schema.item_features.items():
        column = Column.of(table, feature, "items")
        columns[feature] = column.ids(None if feature == schema.item else rows)
    if not len(table) or not np.array_equal(columns[schema.item], np.arange(len(table))):
        raise LogError(f"items: column {schema.item!r} must be 0, 1, 2, ...: row i describes item i")
    columns |= _lists(table, schema.item_lists, "items")
    for name in schema.item_dense:
        columns[name] = _numbers(table, name, "items", schema)
    for name, width in schema.item_vectors.items():
        vectors = Column.of(table, name, "items").flat()
        lengths = np.diff(_offsets(vectors))
        Column.of(table, name, "items").refuse(
            lengths != width,
            lambda i, of=lengths, w=width: (
                f"a vector of {of[i]} numbers, expected {w} (schema); all vectors must have that length"
            ),
        )
        columns[name] = vectors.numbers().reshape(len(table), width)
    _check_unknown(columns, schema)
    return columns


def _check_unknown(columns: Columns, schema: LogSchema) -> None:
    """Raise if row 0 describes an item: then the log's items are numbered from 0."""
    wanted: dict[str, tuple[bool, str]] = {
        name: (columns[name][0] == 0, "0") for name in schema.item_features
    }
    wanted |= {
        name: (columns[f"{name}{LIST_OFFSETS}"][1] == 0, "an empty list") for name in schema.item_lists
    }
    wanted |= {name: (bool(np.isnan(columns[name][0])), "null") for name in schema.item_dense}
    wanted |= {name: (not columns[name][0].any(), "all 0") for name in schema.item_vectors}
    for name, (fits, value) in wanted.items():
        if not fits:
            raise LogError(
                f'items: row 0, column {name!r} must be {value}: item 0 is "unknown"; number the items '
                "from 1"
            )


def check_events(table: pa.Table, schema: LogSchema, num_items: int) -> Columns:
    """The columns of events.parquet.

    Returns:
        user [U] int64, the users that have events, ascending, and user_offsets [U + 1] int64, where the
        events of each begin; time (microseconds), the item and each event feature, [E] int64; each
        number, [E] float32, NaN where missing; and the weight, [E] float32.

    Raises:
        LogError: a column is missing, null, of the wrong type or outside its table; a weight is
            negative; or the rows are not sorted by user and time.

    Example:
        >>> import pandas as pd, pyarrow as pa
        >>> from ifa_torchrec.data import LogSchema
        >>> from ifa_torchrec.data.checks import check_events
        >>> events = pa.table({"user": [1], "time": [pd.Timestamp(10**9)], "item": [1]})
        >>> check_events(events, LogSchema(item_features={"item": 2}), 2)["time"].tolist()
        [1000000]
    """
    user = Column.of(table, USER, "events").ids()
    time = Column.of(table, TIME, "events").times()
    columns = {
        TIME: time,
        schema.item: Column.of(table, schema.item, "events").ids(num_items),
    }
    for feature, rows in schema.event_features.items():
        columns[feature] = Column.of(table, feature, "events").ids(rows)
    for name in schema.event_dense:
        columns[name] = _numbers(table, name, "events", schema)
    if schema.event_weight is not None:
        column = Column.of(table, schema.event_weight, "events")
        weight = columns[schema.event_weight] = column.numbers()
        column.refuse(weight < 0, lambda i: f"the weight {weight[i]} is negative; it must be at least 0")
    # compared, not subtracted: a difference of ids may overflow an int64
    earlier, later = user[:-1], user[1:]
    late = np.flatnonzero((later < earlier) | ((later == earlier) & (time[1:] < time[:-1])))
    if len(late):
        raise LogError(
            f"events: column 'time' is out of order at row {late[0] + 1} (user "
            f"{user[late[0] + 1]}); sort by user, then time, or use EventLog.from_pandas"
        )
    changes = np.flatnonzero(earlier != later) + 1
    first = np.concatenate([np.zeros(min(len(user), 1), np.int64), changes])
    return {USER: user[first], USER_OFFSETS: np.append(first, len(user)), **columns}


def check_requests(
    table: pa.Table, schema: LogSchema, num_items: int, where: str, may_be_empty: bool = False
) -> Columns:
    """The columns of a split's requests, as returned by ``EventLog.requests``.

    Args:
        table: the requests of the split, or of one part of it.
        schema: the log's schema.
        num_items: the number of items in the log.
        where: the name of the table in errors.
        may_be_empty: whether the table may have no rows, as one part may.

    Raises:
        LogError: there are no requests; a column is missing, null, of the wrong type or outside its
            table; a candidate set is empty; the lists of a request differ in length; or a label is not 0
            or 1, or not a number for a regression task.

    Example:
        >>> import pandas as pd, pyarrow as pa
        >>> from ifa_torchrec.data import LogSchema
        >>> from ifa_torchrec.data.checks import check_requests
        >>> table = pa.table({"user": [1, 2], "time": [pd.Timestamp(0)] * 2, "candidates": [[0, 1], [1]],
        ...                   "exposed": [[True, True], [True]], "label": [[0, 1], [1]]})
        >>> columns = check_requests(table, LogSchema(item_features={"item": 2}), 2, "requests/train")
        >>> columns["candidates"].tolist(), columns["candidate_offsets"].tolist()
        ([0, 1, 1], [0, 2, 3])
    """
    if not len(table) and not may_be_empty:
        raise LogError(f"{where}: there are no requests; leave out the split")
    columns = {
        USER: Column.of(table, USER, where).ids(),
        TIME: Column.of(table, TIME, where).times(),
        **_lists(table, schema.context_lists, where),
    }
    for feature, rows in schema.context_features.items():
        columns[feature] = Column.of(table, feature, where).ids(rows)
    for name in schema.dense_features:
        columns[name] = _numbers(table, name, where, schema)
    for name in schema.candidate_lists:  # the candidates themselves come first
        column = Column.of(table, name, where).flat()
        _check_lengths(columns, column)
        columns[name] = _candidate_column(column, schema, num_items)
    return columns


def _candidate_column(column: Column, schema: LogSchema, num_items: int) -> np.ndarray:
    """A column with one value per candidate."""
    name, log_scaled = column.name, column.name in schema.log_scaled
    if name == CANDIDATES:
        return column.ids(num_items)
    if name == EXPOSED:
        return column.bools()
    if name in schema.candidate_tags:
        return column.ids(len(schema.candidate_tags[name]))
    if name in schema.candidate_features:
        return column.ids(schema.candidate_features[name])
    if name in schema.candidate_dense:
        return column.numbers(missing=True, log_scaled=log_scaled)
    labels = column.numbers(log_scaled=log_scaled)
    if schema.tasks[name] == "binary":
        column.refuse(
            (labels != 0) & (labels != 1),
            lambda i: f'the label {labels[i]} is not 0 or 1; fix it, or make the task a "regression"',
        )
    return labels


def _lists(table: pa.Table, features: Mapping[str, int], where: str) -> Columns:
    """List columns of ids: for each, the flat ids and the offsets of the rows."""
    columns: Columns = {}
    for name, rows in features.items():
        column = Column.of(table, name, where).flat()
        columns[name] = column.ids(rows)
        columns[f"{name}{LIST_OFFSETS}"] = _offsets(column)
    return columns


def _numbers(table: pa.Table, name: str, where: str, schema: LogSchema) -> np.ndarray:
    column = Column.of(table, name, where)
    return column.numbers(missing=True, log_scaled=name in schema.log_scaled)


def _offsets(column: Column) -> np.ndarray:
    assert column.offsets is not None, "not a column of lists"
    return column.offsets


def _check_lengths(columns: Columns, column: Column) -> None:
    """Raise unless each list is as long as its candidate set; the first column sets the offsets."""
    mine, where = _offsets(column), column.where
    if OFFSETS not in columns:
        columns[OFFSETS] = mine
        empty = np.flatnonzero(np.diff(mine) == 0)
        if len(empty):
            raise LogError(f"{where}: row {empty[0]} has an empty candidate set; drop such requests")
    offsets = columns[OFFSETS]
    if not np.array_equal(mine, offsets):
        row = int(np.flatnonzero(mine != offsets)[0]) - 1
        raise LogError(
            f"{where}: row {row} has {mine[row + 1] - mine[row]} values in {column.name!r} for "
            f"{offsets[row + 1] - offsets[row]} candidates; the lists must have equal length"
        )
