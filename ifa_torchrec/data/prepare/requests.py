"""The requests: rows of candidates grouped, numbered by time, cut into splits and written."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from ifa_torchrec.data.prepare.ids import with_codes
from ifa_torchrec.data.prepare.schema import PrepareSchema
from ifa_torchrec.data.prepare.sql import (
    first_row,
    interval,
    literal,
    more,
    number,
    quoted,
    timestamp,
    write_parquet,
)
from ifa_torchrec.data.schema import CANDIDATES, EXPOSED, LogError

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

REQUESTS_AT_ONCE = 200_000
"""Lists are built in memory, for so many requests at a time."""


def group_candidates(sql: DuckDBPyConnection, schema: PrepareSchema) -> None:
    """Make the tables `requests`, numbered by time, and `candidates`.

    A candidate is the number of its request (_number), what is its own (_row) and whether a label of it
    is 1 (_positive).
    """
    requests = schema.requests
    each = _columns_of_candidates(schema)
    # the label of who was not shown may be unknown, and stands as 0
    numbers = more([*each[1:], *requests.dense], "coalesce(r.{}, 0)")
    select, joins = with_codes(schema.context, "r")
    sql.execute(
        f"""CREATE TABLE coded AS
        SELECT u.code AS "user", r._request, r.time, i.code AS item, r.exposed {select} {numbers}
        FROM {_with_users(schema)} r JOIN codes_user u ON u.id = r."user"
        JOIN codes_item i ON i.id = r.item {joins}"""
    )
    gap = requests.gap_seconds
    if gap is None and not requests.request:
        gap = 0
    begins = "false" if gap is None else f"time - lag(time) OVER earlier > {interval(gap)}"
    shared = more([*schema.context, *requests.dense], "min({})")
    row = "".join(f", {name} := {name}" for name in map(quoted, each))
    positive = " OR ".join(f"{quoted(task)} = 1" for task in requests.labels)
    sql.execute(
        f"""CREATE TABLE sessions AS
        SELECT *, sum(_begins) OVER (PARTITION BY "user", _request ORDER BY time) AS _session
        FROM (SELECT *, CAST(coalesce({begins}, false) AS INTEGER) AS _begins FROM coded
              WINDOW earlier AS (PARTITION BY "user", _request ORDER BY time));

        CREATE TABLE requests AS SELECT row_number() OVER () - 1 AS _number, * FROM (
            SELECT "user", _request, _session, min(time) AS time {shared} FROM sessions
            GROUP BY "user", _request, _session ORDER BY time, "user", _request, _session);

        CREATE TABLE candidates AS
        SELECT _number, struct_pack(item := item {row}) AS _row, ({positive}) AS _positive
        FROM sessions JOIN requests USING ("user", _request, _session) ORDER BY _number"""
    )


def _columns_of_candidates(schema: PrepareSchema) -> list[str]:
    """What stands in _row, beside the item."""
    return [EXPOSED, *schema.requests.labels, *schema.requests.candidate_dense]


def _with_users(schema: PrepareSchema) -> str:
    """What to select the requests from, with the users' features."""
    if not schema.users:
        return "requests_rows"
    greatest = more(schema.user_features, "max({})")
    return f"""(FROM requests_rows LEFT JOIN (
        SELECT "user" {greatest} FROM users_rows GROUP BY "user") USING ("user"))"""


def cut_splits(
    sql: DuckDBPyConnection, starts: Mapping[str, str | float]
) -> tuple[dict[str, range], str | None]:
    """The numbers of each split's requests, and when the first split after "train" starts, in SQL.

    Raises:
        LogError: a start is no timestamp, a split is empty, or one is called "train".

    Example:
        >>> import duckdb
        >>> from ifa_torchrec.data.prepare.requests import cut_splits
        >>> sql = duckdb.connect()
        >>> _ = sql.execute("CREATE TABLE requests AS SELECT r AS _number, "
        ...                 "make_timestamp(r * 1000000) AS time FROM range(10) t(r)")
        >>> cut_splits(sql, {"valid": 0.8, "test": "1970-01-01 00:00:09"})[0]
        {'train': range(0, 8), 'valid': range(8, 9), 'test': range(9, 10)}
    """
    count = number(sql, "SELECT count(*) FROM requests")
    bounds, first_cut = [0], None
    for split, start in starts.items():
        if split == "train":
            raise LogError("splits: 'train' is what comes before the first split; leave it out")
        if isinstance(start, str):
            cut = timestamp(literal(start), None)
            if first_row(sql, f"SELECT {cut}") == (None,):
                raise LogError(f"splits: {split!r} starts at {start!r}, which is no timestamp")
        else:
            cut = f"(SELECT time FROM requests WHERE _number = {int(start * count)})"
        bounds.append(number(sql, f"SELECT count(*) FROM requests WHERE time < {cut}"))
        first_cut = first_cut or cut
    numbers = [range(*ends) for ends in pairwise([*bounds, count])]
    splits = dict(zip(["train", *starts], numbers, strict=True))
    for split, mine in splits.items():
        if not mine:
            first, last = first_row(sql, "SELECT min(time), max(time) FROM requests")
            raise LogError(
                f"splits: {split!r} has no requests; they are of {first} to {last}, and the "
                f"splits start at {dict(starts)}, which must be in order"
            )
    return splits, first_cut


def write_requests(
    sql: DuckDBPyConnection, schema: PrepareSchema, splits: Mapping[str, range], folder: Path
) -> None:
    """Write FOLDER/SPLIT.parquet of each split; candidates stand in the order of their items."""
    columns = more([*schema.context, *schema.requests.dense])
    lists = more(_columns_of_candidates(schema), "[_one.{} for _one in _rows]")
    for split, numbers in splits.items():
        for start in numbers[::REQUESTS_AT_ONCE]:
            last = min(start + REQUESTS_AT_ONCE, numbers.stop) - 1
            mine = f"_number BETWEEN {start} AND {last}"
            sql.execute(
                f"""{"CREATE TABLE written AS" if start == numbers.start else "INSERT INTO written"}
                SELECT "user", time {columns}, [_one.item for _one in _rows] AS {CANDIDATES} {lists}
                FROM (FROM requests WHERE {mine}) JOIN (
                    SELECT _number, list_sort(list(_row)) AS _rows FROM candidates
                    WHERE {mine} GROUP BY _number) USING (_number)
                ORDER BY _number"""
            )
        write_parquet(sql, "FROM written", folder / f"{split}.parquet")
        sql.execute("DROP TABLE written")
