"""The tables of a log, checked against its schema on their way from Arrow to numpy.

What cannot be right is refused with the table, the column, the row and the remedy.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ifa_torchrec.data.schema import (
    CANDIDATES,
    EXPOSED,
    OFFSETS,
    TIME,
    USER,
    Columns,
    LogError,
    LogSchema,
)


def require_column(names: Collection[str], column: str, where: str) -> None:
    """Raise LogError unless a table has a column.

    Example:
        >>> from ifa_torchrec.data.checks import require_column
        >>> require_column(["user", "time"], "user", "events")
    """
    if column not in names:
        raise LogError(f"{where}: column {column!r} is missing; there are {list(names)}")


def _values(table: pa.Table, column: str, where: str) -> np.ndarray:
    require_column(table.column_names, column, where)
    values = table[column]
    if values.null_count:
        row = pc.index(values.is_null(), True).as_py()
        raise LogError(
            f"{where}: column {column!r} has {values.null_count} nulls, the first at row {row}; "
            "fill or drop those rows"
        )
    return values.to_numpy()


def _ids(table: pa.Table, column: str, where: str, rows: int | None = None) -> np.ndarray:
    values = _values(table, column, where)
    if not pa.types.is_integer(table.schema.field(column).type):
        raise LogError(
            f"{where}: column {column!r} has type {table.schema.field(column).type}, "
            "it must be an integer"
        )
    if values.dtype == np.uint64 and len(values) and values.max() > np.iinfo(np.int64).max:
        row = int(values.argmax())
        raise LogError(
            f"{where}: column {column!r}, value {row}: {values[row]} is beyond an int64; number the ids "
            "anew, as pandas.factorize does"
        )
    values = values.astype(np.int64)
    if rows is not None and len(values) and (values.min() < 0 or values.max() >= rows):
        row = int(np.flatnonzero((values < 0) | (values >= rows))[0])
        raise LogError(
            f"{where}: column {column!r}, value {row}: id {values[row]} is outside its table of "
            f"{rows} rows; map ids to 0..{rows - 1} or enlarge the table in the schema"
        )
    return values


def _times(table: pa.Table, column: str, where: str) -> np.ndarray:
    values = _values(table, column, where)
    if not pa.types.is_timestamp(table.schema.field(column).type):
        raise LogError(
            f"{where}: column {column!r} has type {table.schema.field(column).type}, "
            "it must be a timestamp; convert it with pandas.to_datetime"
        )
    zone = table.schema.field(column).type.tz
    if zone not in (None, "UTC"):
        # a request's local noon would see events of another zone's evening
        raise LogError(
            f"{where}: column {column!r} is in the time zone {zone}; make all times of the log UTC "
            "with .dt.tz_convert('UTC')"
        )
    beyond = LogError(f"{where}: column {column!r} has times that lie beyond the year 290,000")
    try:
        micros = values.astype("datetime64[us]")
    except OverflowError:
        raise beyond from None
    coarse = values.dtype != np.dtype("datetime64[ns]")
    # before 2.5 numpy wraps what an int64 does not hold
    if coarse and not np.array_equal(micros.astype(values.dtype), values):
        raise beyond
    return micros.astype(np.int64)


def _floats(table: pa.Table, column: str, where: str) -> np.ndarray:
    values = _values(table, column, where)
    if not np.issubdtype(values.dtype, np.number) and values.dtype != bool:
        raise LogError(
            f"{where}: column {column!r} has type {table.schema.field(column).type}, it must be a number"
        )
    values = values.astype(np.float32)
    if not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values))[0])
        raise LogError(f"{where}: column {column!r}, value {row}: {values[row]} is not finite")
    return values


def _flatten(table: pa.Table, column: str, where: str) -> tuple[np.ndarray, pa.Table]:
    """Lengths of a list column, and a table that holds its values flat."""
    require_column(table.column_names, column, where)
    kind = table.schema.field(column).type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        raise LogError(f"{where}: column {column!r} has type {kind}, it must be a list a row")
    if table[column].null_count:
        row = pc.index(table[column].is_null(), True).as_py()
        raise LogError(f"{where}: column {column!r} is null at row {row}; give it a list")
    lengths = pc.call_function("list_value_length", [table[column]]).to_numpy().astype(np.int64)
    return lengths, pa.table({column: pc.call_function("list_flatten", [table[column]])})


def check_items(table: pa.Table, schema: LogSchema) -> Columns:
    """The columns of items.parquet, each [I] int64.

    Raises:
        LogError: a column is missing, null, of another type or outside its table; or row i is not
            item i.

    Example:
        >>> import pyarrow as pa
        >>> from ifa_torchrec.data import LogSchema
        >>> from ifa_torchrec.data.checks import check_items
        >>> check_items(pa.table({"item": [0, 1]}), LogSchema(item_features={"item": 2}))
        {'item': array([0, 1])}
    """
    columns = {f: _ids(table, f, "items", rows) for f, rows in schema.item_features.items()}
    if not np.array_equal(columns[schema.item], np.arange(table.num_rows)):
        raise LogError(f"items: column {schema.item!r} must be 0, 1, 2, ...: row i describes item i")
    return columns


def check_events(table: pa.Table, schema: LogSchema, num_items: int) -> Columns:
    """The columns of events.parquet: user, time (microseconds) and the item, each [E] int64.

    Raises:
        LogError: a column is missing, null, of another type or outside its table; or the rows are not
            in the order of user and time.

    Example:
        >>> import pandas as pd, pyarrow as pa
        >>> from ifa_torchrec.data import LogSchema
        >>> from ifa_torchrec.data.checks import check_events
        >>> events = pa.table({"user": [1], "time": [pd.Timestamp(10**9)], "item": [0]})
        >>> check_events(events, LogSchema(item_features={"item": 2}), 2)["time"].tolist()
        [1000000]
    """
    columns = {
        USER: _ids(table, USER, "events"),
        TIME: _times(table, TIME, "events"),
        schema.item: _ids(table, schema.item, "events", num_items),
    }
    user, time = columns[USER], columns[TIME]
    # compared, not subtracted: ids may lie further apart than an int64 counts
    earlier, later = user[:-1], user[1:]
    late = np.flatnonzero((later < earlier) | ((later == earlier) & (time[1:] < time[:-1])))
    if len(late):
        raise LogError(
            f"events: column 'time' is out of order at row {late[0] + 1} (user "
            f"{user[late[0] + 1]}); sort by user, then time, or use EventLog.from_pandas"
        )
    return columns


def check_requests(table: pa.Table, schema: LogSchema, num_items: int, where: str) -> Columns:
    """The columns of a split's requests, as ``EventLog.requests`` gives them.

    Raises:
        LogError: there are none; a column is missing, null, of another type or outside its table; a
            candidate set is empty; the lists of a request differ in length; or a label is not 0 or 1.

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
    if not len(table):
        raise LogError(f"{where}: there are no requests; leave the split out")
    columns = {USER: _ids(table, USER, where), TIME: _times(table, TIME, where)}
    for feature, rows in schema.context_features.items():
        columns[feature] = _ids(table, feature, where, rows)
    for feature in schema.dense_features:
        columns[feature] = _floats(table, feature, where)
    for feature in schema.candidate_lists:  # the candidates themselves come first
        lengths, flat = _flatten(table, feature, where)
        _check_lengths(columns, feature, lengths, where)
        if feature == CANDIDATES:
            columns[feature] = _ids(flat, feature, where, num_items)
        elif feature == EXPOSED:
            if not pa.types.is_boolean(flat.schema.field(feature).type):
                raise LogError(f"{where}: column {feature!r} must hold lists of bool")
            columns[feature] = _values(flat, feature, where).astype(bool)
        elif feature in schema.candidate_tags:
            columns[feature] = _ids(flat, feature, where, len(schema.candidate_tags[feature]))
        else:
            columns[feature] = _floats(flat, feature, where)
    for task in schema.tasks:
        bad = np.flatnonzero((columns[task] != 0) & (columns[task] != 1))
        if len(bad):
            row = int(np.searchsorted(columns[OFFSETS], bad[0], side="right")) - 1
            raise LogError(
                f"{where}: row {row}, column {task!r}: label {columns[task][bad[0]]} must be 0 or 1"
            )
    return columns


def _check_lengths(columns: Columns, feature: str, lengths: np.ndarray, where: str) -> None:
    """Raise unless the lists are as long as the candidate sets; the first column gives the offsets."""
    mine = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    if OFFSETS not in columns:
        columns[OFFSETS] = mine
        empty = np.flatnonzero(lengths == 0)
        if len(empty):
            raise LogError(
                f"{where}: row {empty[0]} has an empty candidate set; leave such requests out"
            )
    offsets = columns[OFFSETS]
    if not np.array_equal(mine, offsets):
        row = int(np.flatnonzero(mine != offsets)[0]) - 1
        raise LogError(
            f"{where}: row {row} has {lengths[row]} values in {feature!r} for "
            f"{offsets[row + 1] - offsets[row]} candidates; the lists must be as long"
        )
