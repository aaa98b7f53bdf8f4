"""DuckDB helpers shared by the steps of ``prepare``: quoting, times, counts, Parquet files."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ifa_torchrec.data.parts import file_of, part_in_sql
from ifa_torchrec.data.prepare.schema import UNITS

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection


def quoted(name: str) -> str:
    """A quoted name in SQL.

    Example:
        >>> from ifa_torchrec.data.prepare.sql import quoted
        >>> quoted("user")
        '"user"'
    """
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """A string literal in SQL.

    Example:
        >>> from ifa_torchrec.data.prepare.sql import literal
        >>> literal("it's")
        "'it''s'"
    """
    return "'" + text.replace("'", "''") + "'"


def more(names: Iterable[str], form: str = "{}") -> str:
    """Further columns of a SELECT, each computed from the column with the same name.

    Args:
        names: the names of the columns.
        form: SQL, with {} for the column.

    Example:
        >>> from ifa_torchrec.data.prepare.sql import more
        >>> more(["age", "sex"], "max({})")
        ', max("age") AS "age", max("sex") AS "sex"'
    """
    return "".join(f", {form.format(quoted(name))} AS {quoted(name)}" for name in names)


def timestamp(sql: str, unit: str | None) -> str:
    """A time in UTC, as SQL; null if it cannot be read.

    Args:
        sql: a number, if there is a unit; else a timestamp, or the text of one.
        unit: one of UNITS, or None. With a unit, a 32-bit float gives null.

    Example:
        >>> from ifa_torchrec.data.prepare.sql import timestamp
        >>> timestamp("t", None)
        "TRY(CAST(t AS TIMESTAMPTZ) AT TIME ZONE 'UTC')"
    """
    if unit is None:
        return f"TRY(CAST({sql} AS TIMESTAMPTZ) AT TIME ZONE 'UTC')"
    time = f"TRY(make_timestamp(CAST(CAST({sql} AS DECIMAL(24, 6)) * {UNITS[unit]} AS BIGINT)))"
    # a FLOAT has 24 bits: for seconds of today it is only exact to two minutes
    return f"CASE WHEN typeof({sql}) <> 'FLOAT' THEN {time} END"


def interval(seconds: float) -> str:
    """An interval of time, as SQL.

    Example:
        >>> from ifa_torchrec.data.prepare.sql import interval
        >>> interval(1.5)
        'to_microseconds(1500000)'
    """
    return f"to_microseconds({round(seconds * 1e6)})"


def first_row(sql: DuckDBPyConnection, query: str) -> tuple[Any, ...]:
    """The first row of a query.

    Example:
        >>> import duckdb
        >>> from ifa_torchrec.data.prepare.sql import first_row
        >>> first_row(duckdb.connect(), "SELECT 1, 'a'")
        (1, 'a')
    """
    return sql.execute(query).fetchall()[0]


def number(sql: DuckDBPyConnection, query: str) -> int:
    """The single value of a query.

    Example:
        >>> import duckdb
        >>> from ifa_torchrec.data.prepare.sql import number
        >>> number(duckdb.connect(), "SELECT count(*) FROM range(3)")
        3
    """
    return first_row(sql, query)[0]


def write_parquet(sql: DuckDBPyConnection, query: str, file: Path) -> None:
    """Write the result of a query; the file appears atomically.

    Args:
        sql: the connection.
        query: returns the rows, in order.
        file: the file to write.

    Example:
        >>> import duckdb, tempfile
        >>> from ifa_torchrec.data.prepare.sql import number, write_parquet
        >>> sql, file = duckdb.connect(), Path(tempfile.mkdtemp()) / "rows.parquet"
        >>> write_parquet(sql, "FROM range(3)", file)
        >>> number(sql, f"SELECT count(*) FROM '{file}'")
        3
    """
    draft = file.with_name(f".{file.name}-{secrets.token_hex(6)}")
    sql.execute(f"COPY ({query}) TO {literal(str(draft))} (FORMAT parquet)")
    draft.rename(file)


@dataclass(frozen=True)
class Parts:
    """The parts of a log that are written.

    Args:
        count: the number of parts in the log.
        mine: the part to write; all by default.

    Example:
        >>> from ifa_torchrec.data.prepare.sql import Parts
        >>> list(Parts(3).numbers), list(Parts(3, mine=1).numbers)
        ([0, 1, 2], [1])
        >>> Parts(1).of("code")
        '0'
    """

    count: int
    mine: int | None = None

    def of(self, user: str) -> str:
        """The part of a user, as SQL.

        Args:
            user: the user as SQL, not negative.
        """
        return "0" if self.count == 1 else part_in_sql(user, self.count)

    @property
    def numbers(self) -> Sequence[int]:
        """The numbers of the parts to write."""
        return range(self.count) if self.mine is None else [self.mine]


def write_parts(sql: DuckDBPyConnection, table: str, path: Path, parts: Parts) -> None:
    """Write a DuckDB table to PATH.parquet, or to PATH/part-*.parquet; rows keep their order.

    Args:
        sql: the connection.
        table: the table. Its rows are sorted by a column `_part`, which is not written; so a part is a
            contiguous run of rows, and all others are skipped without reading them.
        path: the path of the table's file in the log's folder, without suffix.
        parts: the parts to write.

    Example:
        >>> import duckdb, tempfile
        >>> from ifa_torchrec.data.prepare.sql import Parts, write_parts
        >>> sql, folder, parts = duckdb.connect(), Path(tempfile.mkdtemp()), Parts(4)
        >>> _ = sql.execute(f'CREATE TABLE events AS SELECT {parts.of("r")} AS _part, r AS "user" '
        ...                 "FROM range(1, 9) r(r) ORDER BY ALL")
        >>> write_parts(sql, "events", folder / "events", parts)
        >>> sql.execute(f"FROM '{folder}/events/part-00002.parquet'").fetchall()
        [(2,), (7,)]
    """
    select = f"SELECT * EXCLUDE (_part) FROM {table}"
    if parts.count == 1:
        write_parquet(sql, select, path.with_name(f"{path.name}.parquet"))
        return
    path.mkdir(exist_ok=True)
    for number in parts.numbers:
        write_parquet(sql, f"{select} WHERE _part = {number}", path.parent / file_of(path.name, number))
