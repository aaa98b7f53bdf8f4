"""Frozen vectors of the items: lists of equal length, and .npy files."""

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
    """Refuse items whose vector has another length than most, and read the .npy files.

    Args:
        sql: contains items_read; gets a table npy_NAME with _row and vector for each Npy.
        items: the items of the schema.

    Raises:
        LogError: a .npy file is missing, is not an array [R, V] of finite floats, or has another number
            of rows than the items' table.
    """
    for name, column in items.vectors.items():
        n = quoted(name)
        if isinstance(column, Npy):
            rows = _read_npy(sql, name, Path(column.npy))
            if column.row is None:
                there = number(sql, "SELECT count(*) FROM items_read")
                if rows != there:
                    raise LogError(
                        f"items.vectors.{name}: {column.npy} has {rows} rows, but the items' table has "
                        f"{there}; set `row` to the column with each item's row in the file"
                    )
                sql.execute(f"UPDATE items_read SET {n} = rowid")
            wrong = f"{n} NOT BETWEEN 0 AND {rows - 1}"
            why = f"{name} is not a row of its .npy file, which has {rows}"
        else:
            most = first_row(sql, f"SELECT mode(len({n})) FROM items_rows")[0]
            wrong = f"len({n}) <> {most or 0}"
            why = f"{name} is a vector whose length is not {most}, that of most items"
        found = n if isinstance(column, Npy) else f"len({n}) || ' numbers'"
        given = f"concat('item: ', item, ', ', {literal(name)}, ': ', {found})"
        sql.execute(
            f"""UPDATE items_read SET _refused = {literal(why)}, _given = {given}
            WHERE _refused IS NULL AND {wrong}"""
        )


def _read_npy(sql: DuckDBPyConnection, name: str, file: Path) -> int:
    """Make the table npy_NAME; returns its number of rows."""
    where = f"items.vectors.{name}: {file}"
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise LogError(f"{where} cannot be read as a .npy file ({error})") from error
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.floating) or not array.shape[1]:
        raise LogError(
            f"{where} has type {array.dtype} and shape {array.shape}, expected floats [rows, width]"
        )
    width = array.shape[1]
    schema = pa.schema([("_row", pa.int64()), ("vector", pa.list_(pa.float32(), width))])

    def batches() -> Iterator[pa.RecordBatch]:
        step = max(1, _NUMBERS_AT_ONCE // width)
        for start in range(0, len(array), step):
            with np.errstate(
                over="ignore"
            ):  # what does not fit a float32 becomes infinite, and is refused
                block = np.asarray(array[start : start + step]).astype(np.float32)
            if not np.isfinite(block).all():
                row, column = np.argwhere(~np.isfinite(block))[0]
                raise LogError(
                    f"{where}: row {start + row}, column {column} is {array[start + row, column]}, not "
                    "a finite float32; fix the vector"
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
