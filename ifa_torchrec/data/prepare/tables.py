"""Write items.parquet and events.parquet from the rows read and the codes of their ids."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ifa_torchrec.data.prepare.columns import Npy, rows_of
from ifa_torchrec.data.prepare.ids import with_codes, with_lists
from ifa_torchrec.data.prepare.schema import PrepareSchema
from ifa_torchrec.data.prepare.sql import Parts, first_row, more, quoted, write_parquet, write_parts

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection


def write_items(sql: DuckDBPyConnection, schema: PrepareSchema, file: Path) -> dict[str, int]:
    """Make the table `items`, with external ids, and write it with rows 0, 1, ... of the items.

    If several rows describe an item, the largest value of each column is taken. Row 0 is "unknown".

    Args:
        sql: contains items_rows, if the schema has items, and the codes.
        schema: the schema of the log.
        file: the file to write.

    Returns:
        The width of each vector feature.
    """
    items = schema.described_items
    columns = [*items.features, *items.lists, *items.dense, *items.vectors]
    described = "items_rows" if schema.items else "(SELECT id AS item, id AS name FROM codes_item)"
    rows = (
        rows_of(schema.events.item)
        or first_row(sql, "SELECT 1 + coalesce(max(code), 0) FROM codes_item")[0]
    )
    sql.execute(
        f"""CREATE TABLE items AS
        SELECT _item AS item {more(columns, "max({})")},
            coalesce(max(name), max(_id), 'unknown') AS name, bool_or(_described) AS _described
        FROM range({rows}) r(_item) LEFT JOIN (
            SELECT c.code AS _code, c.id AS _id, d.item IS NOT NULL AS _described, d.* EXCLUDE (item)
            FROM codes_item c LEFT JOIN {described} d ON d.item = c.id) ON _code = _item
        GROUP BY _item"""
    )
    select, joins = with_codes(items.features, "items")
    lists, more_joins = with_lists(sql, items.lists, "items", "item")
    vectors, widths = "", dict[str, int]()
    for n, (name, column) in enumerate(items.vectors.items()):
        vector, table = f"items.{quoted(name)}", "items"
        if isinstance(column, Npy):
            table = quoted(f"npy_{name}")
            vector = f"v{n}.vector"
            more_joins += f" LEFT JOIN {table} v{n} ON v{n}._row = items.{quoted(name)}"
        source = quoted(name) if table == "items" else "vector"
        widths[name] = first_row(sql, f"SELECT coalesce(max(len({source})), 1) FROM {table}")[0]
        zeros = f"[0::FLOAT for _ in range({widths[name]})]"
        vectors += f", coalesce({vector}, {zeros}) AS {quoted(name)}"
    write_parquet(
        sql,
        f"""SELECT item {select} {lists} {more(items.dense, "items.{}")} {vectors}, items.name
        FROM items {joins} {more_joins} ORDER BY item""",
        file,
    )
    return widths


def write_events(sql: DuckDBPyConnection, schema: PrepareSchema, folder: Path, parts: Parts) -> None:
    """Make the table `events`, sorted by part, user and time, and write events.parquet or its parts;
    events with the same time are sorted by item, then by their other columns.

    Args:
        sql: contains events_rows and the codes.
        schema: the schema of the log.
        folder: the folder of the log.
        parts: the parts to write.

    Example:
        >>> import duckdb, tempfile
        >>> from ifa_torchrec.data.prepare.schema import Events, PrepareSchema, Requests
        >>> from ifa_torchrec.data.prepare.sql import Parts
        >>> from ifa_torchrec.data.prepare.tables import write_events
        >>> rows = dict(files="log.csv", user="u", item="i", time="t")
        >>> schema = PrepareSchema(events=Events(**rows, dense={"dwell": "seconds"}), splits={},
        ...                        requests=Requests(**rows, labels={"click": "clicked"}))
        >>> sql, folder = duckdb.connect(), Path(tempfile.mkdtemp())
        >>> _ = sql.execute("CREATE TABLE codes_user AS SELECT 'ann' AS id, 1 AS code;"
        ...                 "CREATE TABLE codes_item AS SELECT 'tea' AS id, 3 AS code;"
        ...                 "CREATE TABLE events_rows AS "
        ...                 "SELECT 'ann' AS user, 'tea' AS item, 5 AS time, 2.5 AS dwell")
        >>> write_events(sql, schema, folder, Parts(1))
        >>> sql.execute(f"SELECT CAST(COLUMNS(*) AS VARCHAR) FROM '{folder}/events.parquet'").fetchall()
        [('1', '5', '3', '2.5')]
    """
    events = schema.events
    select, joins = with_codes(events.features, "e")
    numbers = more([*events.dense, *([] if events.weight is None else ["weight"])], "e.{}")
    sql.execute(
        f"""CREATE TABLE events AS
        SELECT {parts.of("u.code")} AS _part, u.code AS "user", e.time, i.code AS item {select} {numbers}
        FROM events_rows e
        JOIN codes_user u ON u.id = e."user" JOIN codes_item i ON i.id = e.item {joins} ORDER BY ALL"""
    )
    write_parts(sql, "events", folder / "events", parts)
