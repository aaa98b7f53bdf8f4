"""Frozen vectors of the items: lists that must be of one length, and .npy files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from ifa_torchrec.data.prepare.columns import Npy
from ifa_torchrec.data.prepare.schema import Items
from ifa_torchrec.data.prepare.sql import first_row, literal, number, quoted
from ifa_torchrec.data.schema import LogError

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

_NUMBERS_AT_ONCE = 1 << 22


def check_vectors(sql: DuckDBPyConnection, items: Items) -> None:
    """Refuse items whose vector is of another length than most, and read the .npy files.

    Args:
        sql: holds items_read; of an Npy there is then a table npy_NAME with _row and a vector.
        items: of the schema.

    Raises:
        LogError: a .npy file is missing, is no array [R, V] of finite floats, or has not as many rows as
            the items' table.
    """
    for name, column in items.vectors.items():
        n = quoted(name)
        if isinstance(column, Npy):
            rows = _read_npy(sql, name, Path(column.npy))
            if column.row is None:
                there = number(sql, "SELECT count(*) FROM items_read")
                if rows != there:
                    raise LogError(
                        f"items.vectors.{name}: {column.npy} has {rows} rows, the items' table {there}; "
                        "say which `row` of it is an item's, by a column of the table"
                    )
                sql.execute(f"UPDATE items_read SET {n} = rowid")
            wrong = f"{n} NOT BETWEEN 0 AND {rows - 1}"
            why = f"{name} is no row of its .npy, which has {rows}"
        else:
            most = first_row(sql, f"SELECT mode(len({n})) FROM items_rows")[0]
            wrong = f"len({n}) <> {most or 0}"
            why = f"{name} is a vector of another length than {most}"
        found = n if isinstance(column, Npy) else f"len({n}) || ' numbers'"
        given = f"concat('item: ', item, ', ', {literal(name)}, ': ', {found})"
        sql.execute(
            f"""UPDATE items_read SET _refused = {literal(why)}, _given = {given}
            WHERE _refused IS NULL AND {wrong}"""
        )


def _read_npy(sql: DuckDBPyConnection, name: str, file: Path) -> int:
    """Make the table npy_NAME; returns its rows."""
    where = f"items.vectors.{name}: {file}"
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise LogError(f"{where} cannot be read as a .npy ({error})") from error
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.floating) or not array.shape[1]:
        raise LogError(
            f"{where} holds {array.dtype} of the shape {array.shape}; it must be floats [rows, width]"
        )
    width = array.shape[1]
    schema = pa.schema([("_row", pa.int64()), ("vector", pa.list_(pa.float32(), width))])

    def batches() -> Iterator[pa.RecordBatch]:
        step = max(1, _NUMBERS_AT_ONCE // width)
        for start in range(0, len(array), step):
            with np.errstate(over="ignore"):  # what a float32 does not hold is infinite, and refused
                block = np.asarray(array[start : start + step]).astype(np.float32)
            if not np.isfinite(block).all():
                row, column = np.argwhere(~np.isfinite(block))[0]
                raise LogError(
                    f"{where}: row {start + row}, column {column} is {array[start + row, column]}: not "
                    "finite in a float32; mend the vector"
                )
            vectors = pa.FixedSizeListArray.from_arrays(pa.array(block.ravel()), width)
            yield pa.record_batch([pa.array(np.arange(start, start + len(block))), vectors], schema)

    failure: list[LogError] = []

    def guarded() -> Iterator[pa.RecordBatch]:
        try:
            yield from batches()
        except LogError as error:  # DuckDB would wrap it
            failure.append(error)
            raise

    reader = f"_npy_{name}"
    sql.register(reader, pa.RecordBatchReader.from_batches(schema, guarded()))
    try:
        sql.execute(
            f"CREATE TABLE {quoted(f'npy_{name}')} AS "
            f"SELECT _row, CAST(vector AS FLOAT[]) AS vector FROM {quoted(reader)}"
        )
    except Exception:
        if failure:
            raise failure[0] from None
        raise
    sql.unregister(reader)
    return len(array)
