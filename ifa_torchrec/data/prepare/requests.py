"""The requests: rows of candidates grouped, numbered by time, coded and written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ifa_torchrec.data.prepare.ids import with_codes, with_lists
from ifa_torchrec.data.prepare.schema import PrepareSchema
from ifa_torchrec.data.prepare.sql import (
    Parts,
    interval,
    more,
    quoted,
    write_parts,
)
from ifa_torchrec.data.schema import CANDIDATES, EXPOSED

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

REQUESTS_AT_ONCE = 200_000
"""The number of requests whose lists are built in memory at a time."""


def group_requests(sql: DuckDBPyConnection, schema: PrepareSchema) -> None:
    """Make the table `requests`, numbered by time, and `sessions`, the rows of the requests, with
    external ids.

    Each row of `sessions` has the number of its request (_number).
    """
    requests = schema.requests
    gap = requests.gap_seconds
    if gap is None and not (requests.request or requests.each):
        gap = 0
    begins = "false" if gap is None else f"time - lag(time) OVER earlier > {interval(gap)}"
    own = [*requests.context, *requests.context_lists, *requests.dense]
    users = schema.described_users
    of_user = [*users.features, *users.lists, *users.dense]
    described = f"""LEFT JOIN (SELECT c.code AS "user" {more(of_user, "max(u.{})")} FROM users_rows u
        JOIN codes_user c ON c.id = u."user" GROUP BY c.code) USING ("user")"""
    sql.execute(
        f"""CREATE TABLE grouped AS
        SELECT *, sum(_begins) OVER (PARTITION BY "user", _request ORDER BY time)::BIGINT AS _session
        FROM (SELECT *, CAST(coalesce({begins}, false) AS INTEGER) AS _begins FROM (
                SELECT coalesce(u.code, 0) AS "user", r.* EXCLUDE ("user", _given, _refused)
                FROM requests_rows r LEFT JOIN codes_user u ON u.id = r."user")
              WINDOW earlier AS (PARTITION BY "user", _request ORDER BY time));

        CREATE TABLE requests AS SELECT row_number() OVER () - 1 AS _number, * FROM (
            FROM (SELECT "user", _request, _session, min(time) AS time {more(own, "min({})")}
                  FROM grouped GROUP BY "user", _request, _session)
            {described if schema.users else ""}
            ORDER BY time, "user", _request, _session);

        CREATE TABLE sessions AS
        SELECT g.*, q._number FROM grouped g JOIN requests q USING ("user", _request, _session);
        DROP TABLE grouped"""
    )


def code_candidates(sql: DuckDBPyConnection, schema: PrepareSchema) -> None:
    """Make the table `candidates` from `sessions` and the codes.

    Each candidate has the number of its request (_number), its own columns (_row) and whether one of its
    labels is 1 or, if all labels are regressions, above 0 (_positive).
    """
    requests = schema.requests
    # the label of an unexposed candidate may be unknown, and is stored as 0
    labels = "".join(f", {n} := coalesce(s.{n}, 0)::FLOAT" for n in map(quoted, requests.labels))
    numbers = "".join(f", {n} := s.{n}" for n in map(quoted, requests.candidate_dense))
    coded = enumerate(map(quoted, requests.candidate_features))
    features = "".join(f", {name} := coalesce(c{n}.code, 0)" for n, name in coded)
    positive = [f"s.{quoted(task)} = 1" for task in requests.binary]
    positive = positive or [f"s.{quoted(task)} > 0" for task in requests.labels]
    sql.execute(
        f"""CREATE TABLE candidates AS
        SELECT s._number, coalesce({" OR ".join(positive)}, false) AS _positive,
            struct_pack(item := i.code, {EXPOSED} := s.exposed {labels} {numbers} {features}) AS _row
        FROM sessions s JOIN codes_item i ON i.id = s.item
        {with_codes(requests.candidate_features, "s")[1]} ORDER BY s._number"""
    )


def write_requests(
    sql: DuckDBPyConnection,
    schema: PrepareSchema,
    splits: Mapping[str, range],
    folder: Path,
    parts: Parts,
) -> None:
    """Write FOLDER/SPLIT.parquet for each split, or its parts; candidates are sorted by item."""
    own = schema.requests
    values = [EXPOSED, *own.labels, *own.candidate_dense, *own.candidate_features]
    lists = more(values, "[_one.{} for _one in _rows]")
    select, joins = with_codes(schema.context, "requests")
    select_lists, join_lists = with_lists(sql, schema.context_lists, "requests", "_number")
    columns = f"{select} {select_lists} {more(schema.dense, 'requests.{}')}"
    for split, numbers in splits.items():
        for start in numbers[::REQUESTS_AT_ONCE] or [numbers.start]:
            last = min(start + REQUESTS_AT_ONCE, numbers.stop) - 1
            mine = f"_number BETWEEN {start} AND {last}"
            sql.execute(
                f"""{"CREATE TABLE written AS" if start == numbers.start else "INSERT INTO written"}
                SELECT {parts.of('requests."user"')} AS _part, requests."user", requests.time {columns},
                    [_one.item for _one in _rows] AS {CANDIDATES} {lists}
                FROM requests JOIN (
                    SELECT _number, list_sort(list(_row)) AS _rows FROM candidates
                    WHERE {mine} GROUP BY _number) r ON r._number = requests._number {joins} {join_lists}
                WHERE requests.{mine} ORDER BY requests._number"""
            )
        if parts.count > 1:
            sql.execute(
                """CREATE TABLE by_part AS FROM written ORDER BY _part, rowid; DROP TABLE written;
                ALTER TABLE by_part RENAME TO written"""
            )
        write_parts(sql, "written", folder / split, parts)
        sql.execute("DROP TABLE written")
