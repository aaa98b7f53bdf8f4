"""Histories given as lists without times: choose one list per user, and set the times of its events."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ifa_torchrec.data.prepare.sections import AT, LENGTH, POSITION
from ifa_torchrec.data.prepare.sql import first_row

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection


def date_histories(sql: DuckDBPyConnection) -> None:
    """Set the times of the events in ``events_read``, and keep one list per user: the shortest.

    A longer list may contain what came after the requests for which the shorter one was written. The
    table `lists_of_users` has the number of lists, and of different lengths, of each user.

    Args:
        sql: contains events_read, with the position of each event in its list; requests_rows; and
            `first_request`, the earliest time of all requests.

    Example:
        >>> import duckdb
        >>> from ifa_torchrec.data.prepare.histories import date_histories
        >>> sql = duckdb.connect()
        >>> _ = sql.execute("CREATE TABLE requests_rows AS SELECT 'ann' AS user,"
        ...                 "TIMESTAMP '2024-05-01 10:00:00' AS time; CREATE TABLE events_read AS "
        ...                 "SELECT 'ann' AS user, 1 AS _at, unnest([0, 1]) AS _position, 2 AS _length,"
        ...                 "unnest(['tea', 'cup']) AS item, NULL AS _refused;"
        ...                 "CREATE VIEW events_rows AS FROM events_read;"
        ...                 "CREATE VIEW first_request AS SELECT min(time) AS time FROM requests_rows")
        >>> date_histories(sql)
        >>> sql.execute("SELECT item, CAST(time AS VARCHAR) FROM events_rows").fetchall()
        [('tea', '2024-05-01 09:59:58'), ('cup', '2024-05-01 09:59:59')]
    """
    sql.execute(
        f"""CREATE TABLE lists_of_users AS
        SELECT "user", arg_min({AT}, ({LENGTH}, {AT})) AS _taken, count(DISTINCT {AT}) AS _lists,
            count(DISTINCT {LENGTH}) AS _lengths
        FROM events_rows GROUP BY "user";

        DELETE FROM events_read e USING lists_of_users l
        WHERE e."user" = l."user" AND e.{AT} <> l._taken AND e._refused IS NULL;

        ALTER TABLE events_read ADD COLUMN time TIMESTAMP;
        UPDATE events_read SET time = (SELECT time FROM first_request)
            - to_seconds({LENGTH} - {POSITION});
        UPDATE events_read e SET time = r.time - to_seconds(e.{LENGTH} - e.{POSITION})
        FROM (SELECT "user", min(time) AS time FROM requests_rows GROUP BY "user") r
        WHERE e."user" = r."user";

        DROP VIEW events_rows;
        CREATE VIEW events_rows AS SELECT * EXCLUDE ({AT}, {LENGTH}, {POSITION})
        FROM events_read WHERE _refused IS NULL"""
    )


def lists_figures(sql: DuckDBPyConnection) -> dict[str, Any]:
    """The number of users and of their lists, as figures that can be added.

    Example:
        >>> import duckdb
        >>> from ifa_torchrec.data.prepare.histories import lists_figures
        >>> sql = duckdb.connect()
        >>> _ = sql.execute("CREATE TABLE lists_of_users AS SELECT 1 AS _lists, 1 AS _lengths")
        >>> lists_figures(sql)
        {'users': 1, 'lists': 1, 'users_with_lists_of_several_lengths': 0}
    """
    users, lists, several = first_row(
        sql,
        """SELECT count(*), coalesce(sum(_lists), 0)::BIGINT, count(*) FILTER (_lengths > 1)
        FROM lists_of_users""",
    )
    return {"users": users, "lists": lists, "users_with_lists_of_several_lengths": several}
