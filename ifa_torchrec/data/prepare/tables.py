"""items.parquet and events.parquet, of the rows that were read and the codes of their ids."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ifa_torchrec.data.prepare.ids import with_codes
from ifa_torchrec.data.prepare.schema import PrepareSchema
from ifa_torchrec.data.prepare.sql import more, write_parquet

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

_EVENTS = """CREATE TABLE events AS SELECT u.code AS "user", time, i.code AS item FROM events_rows e
    JOIN codes_user u ON u.id = e."user" JOIN codes_item i ON i.id = e.item"""


def write_items(sql: DuckDBPyConnection, schema: PrepareSchema, rows: int, file: Path) -> None:
    """Write row 0, 1, ... of the items; of several descriptions, the greatest value of each column.

    Args:
        sql: holds items_rows, if the schema has items, and the codes.
        schema: of the log.
        rows: of the table of items.
        file: to be written.
    """
    known = "items_rows" if schema.items else "(SELECT id AS item, id AS name FROM codes_item)"
    select, joins = with_codes(schema.item_features, "known")
    greatest = more(schema.item_features, "coalesce(max({}), 0)")
    write_parquet(
        sql,
        f"""WITH described AS (SELECT i.code AS item, known.name {select}
            FROM {known} known JOIN codes_item i ON i.id = known.item {joins})
        SELECT _item AS item {greatest}, coalesce(max(name), '') AS name
        FROM range({rows}) r(_item) LEFT JOIN described ON item = _item
        GROUP BY _item ORDER BY _item""",
        file,
    )


def write_events(sql: DuckDBPyConnection, file: Path) -> None:
    """Make the table `events`, and write it in the order of user and time.

    Example:
        >>> import duckdb, tempfile
        >>> from ifa_torchrec.data.prepare.tables import write_events
        >>> sql, file = duckdb.connect(), Path(tempfile.mkdtemp()) / "events.parquet"
        >>> _ = sql.execute("CREATE TABLE codes_user AS SELECT 'ann' AS id, 0 AS code;"
        ...                 "CREATE TABLE codes_item AS SELECT 'tea' AS id, 3 AS code;"
        ...                 "CREATE TABLE events_rows AS SELECT 'ann' AS user, 'tea' AS item, 5 AS time")
        >>> write_events(sql, file)
        >>> sql.execute(f"FROM '{file}'").fetchall()
        [(0, 5, 3)]
    """
    sql.execute(_EVENTS)
    write_parquet(sql, 'FROM events ORDER BY "user", time, item', file)
