""""""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ifa_torchrec.data.schema import LogError


def _require(names: Collection[str], column: str, where: str) -> None:
    if column not in names:
        raise LogError(f"{where}: column {column!r} is missing; there are {list(names)}")


def _values(table: pa.Table, column: str, where: str) -> np.ndarray:
    _require(table.column_names, column, where)
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
    micros = values.astype("datetime64[us]")
    coarse = values.dtype != np.dtype("datetime64[ns]")  # numpy wraps what an int64 does not hold
    if coarse and not np.array_equal(micros.astype(values.dtype), values):
        raise LogError(f"{where}: column {column!r} has times that lie beyond the year 290,000")
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
    _require(table.column_names, column, where)
    kind = table.schema.field(column).type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        raise LogError(f"{where}: column {column!r} has type {kind}, it must be a list a row")
    if table[column].null_count:
        row = pc.index(table[column].is_null(), True).as_py()
        raise LogError(f"{where}: column {column!r} is null at row {row}; give it a list")
    lengths = pc.call_function("list_value_length", [table[column]]).to_numpy().astype(np.int64)
    return lengths, pa.table({column: pc.call_function("list_flatten", [table[column]])})
