"""Ids become rows of tables: tables codes_NAME of DuckDB, and LOG/codes/NAME.parquet."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ifa_torchrec.data.codes import HASHED
from ifa_torchrec.data.prepare.schema import ITEM, PrepareSchema, rows_of
from ifa_torchrec.data.prepare.sql import number, quoted, write_parquet
from ifa_torchrec.data.schema import USER

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

_HASH_DIGITS = 15  # of MD5's hexadecimals: an int64 holds them


def hash_row(identifier: str, rows: int) -> int:
    """Row of a hashed item, 0 to rows - 1; that of a hashed feature is 1 + hash_row(id, rows - 1).

    Args:
        identifier: the id, as text.
        rows: number of rows.

    Raises:
        ValueError: rows is less than 1.

    Example:
        >>> from ifa_torchrec.data.prepare import hash_row
        >>> hash_row("a", 1000)
        362
    """
    if rows < 1:
        raise ValueError(f"rows must be at least 1, got {rows}")
    return int(hashlib.md5(identifier.encode()).hexdigest()[:_HASH_DIGITS], 16) % rows


def hash_in_sql(text: str, rows: int) -> str:
    """``hash_row`` of a text, in SQL.

    Example:
        >>> import duckdb
        >>> from ifa_torchrec.data.prepare.ids import hash_in_sql
        >>> duckdb.sql(f"SELECT {hash_in_sql('x', 1000)} FROM (SELECT 'a' AS x)").fetchall()
        [(362,)]
    """
    return f"CAST('0x' || md5({text})[:{_HASH_DIGITS}] AS BIGINT) % {rows}"


def write_codes(
    sql: DuckDBPyConnection, schema: PrepareSchema, folder: Path
) -> dict[str, dict[str, Any]]:
    """Number the ids of users, items and features, and write each one's list to ``folder``.

    Returns:
        For each name its ids, its table's rows and, if it is hashed, the share of ids that share a row.
    """
    folder.mkdir()
    both = "SELECT {0} AS id FROM events_rows UNION SELECT {0} FROM requests_rows"
    items = "SELECT item AS id FROM items_rows" if schema.items else both.format(ITEM)
    codes = {
        USER: _write(sql, folder, USER, both.format(quoted(USER)), None, first=0),
        ITEM: _write(sql, folder, ITEM, items, rows_of(schema.events.item), first=0),
    }
    sections = {
        "items": schema.item_features,
        "users": schema.user_features,
        "requests": schema.requests.context,
    }
    for section, features in sections.items():
        for feature, column in features.items():
            ids = f"SELECT {quoted(feature)} AS id FROM {section}_rows"
            codes[feature] = _write(sql, folder, feature, ids, rows_of(column), first=1)
    return codes


def _write(
    sql: DuckDBPyConnection, folder: Path, name: str, ids: str, hashed: int | None, first: int
) -> dict[str, Any]:
    """Make the table of a name's ids and their rows; rows below ``first`` are for the unknown."""
    row = hash_in_sql("id", hashed - first) if hashed else "row_number() OVER () - 1"
    table = quoted(f"codes_{name}")
    sql.execute(
        f"""CREATE TABLE {table} AS SELECT id, {first} + {row} AS code FROM (
            SELECT DISTINCT id FROM ({ids}) WHERE id IS NOT NULL
            ORDER BY TRY_CAST(id AS BIGINT), id)"""
    )
    # of a hash there is no list: other logs have other ids of the same meaning
    kind = f", KV_METADATA {{{HASHED}: '{hashed}'}}" if hashed else ""
    write_parquet(sql, f"SELECT id, code FROM {table}", folder / f"{name}.parquet", kind)
    count = number(sql, f"SELECT count(*) FROM {table}")
    told: dict[str, Any] = {"ids": count, "rows": hashed or first + count}
    if hashed:
        shared = number(
            sql,
            f"""SELECT count(*) FROM {table}
            WHERE code IN (SELECT code FROM {table} GROUP BY code HAVING count(*) > 1)""",
        )
        told["ids_that_share_a_row"] = shared / max(count, 1)
    return told


def with_codes(features: Iterable[str], table: str) -> tuple[str, str]:
    """What to select, and the joins, to have the rows of a table's features in place of ids.

    Example:
        >>> from ifa_torchrec.data.prepare.ids import with_codes
        >>> with_codes(["age"], "users")
        (', coalesce(c0.code, 0) AS "age"', 'LEFT JOIN "codes_age" c0 ON c0.id = users."age"')
    """
    named = list(enumerate(features))
    select = "".join(f", coalesce(c{n}.code, 0) AS {quoted(f)}" for n, f in named)
    joins = " ".join(
        f"LEFT JOIN {quoted(f'codes_{f}')} c{n} ON c{n}.id = {table}.{quoted(f)}" for n, f in named
    )
    return select, joins
