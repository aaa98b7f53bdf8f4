"""Labels from another table, and labels given as lists: mark their candidates, and report on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ifa_torchrec.data.prepare.schema import ITEM, USER, JoinedLabel
from ifa_torchrec.data.prepare.sql import interval, number, quoted
from ifa_torchrec.data.prepare.tallies import least
from ifa_torchrec.data.schema import LogError

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection


def join_label(sql: DuckDBPyConnection, task: str, section: str, label: JoinedLabel) -> None:
    """Add the column of a task to ``requests_read``.

    Args:
        sql: contains requests_read, requests_rows and SECTION_rows.
        task: the label's name.
        section: the section of the label's rows.
        label: defines which candidates a row marks.

    Example:
        >>> import duckdb
        >>> from ifa_torchrec.data.prepare import JoinedLabel
        >>> from ifa_torchrec.data.prepare.labels import join_label
        >>> sql = duckdb.connect()
        >>> _ = sql.execute("CREATE TABLE requests_read AS SELECT 'ann' AS user, 'tea' AS item,"
        ...                 "make_timestamp(unnest([0, 5000000])) AS time, NULL AS _refused;"
        ...                 "CREATE VIEW requests_rows AS FROM requests_read;"
        ...                 "CREATE TABLE label_0_rows AS SELECT 'ann' AS user, 'tea' AS item,"
        ...                 "make_timestamp(9000000) AS time")
        >>> buy = dict(files="b.csv", user="u", item="i", time="t", within_seconds=60)
        >>> join_label(sql, "buy", "label_0", JoinedLabel(**buy))
        >>> join_label(sql, "all", "label_0", JoinedLabel(**buy, mark_all=True))
        >>> sql.execute('SELECT buy, "all" FROM requests_read').fetchall()
        [(0.0, 1.0), (1.0, 1.0)]
    """
    rows = f"{section}_rows"
    if not label.mark_all:
        # a row marks the candidates at the time of the latest candidate before it
        rows = f"""(SELECT l."user", l.item, r.time
            FROM {rows} l ASOF JOIN (SELECT DISTINCT "user", item, time FROM requests_rows) r
            ON l."user" = r."user" AND l.item = r.item AND l.time >= r.time
            WHERE {_labels(label)})"""
    same = "l.time = r.time" if not label.mark_all else "true"
    sql.execute(
        f"""ALTER TABLE requests_read ADD COLUMN {quoted(task)} FLOAT DEFAULT 0;
        UPDATE requests_read r SET {quoted(task)} = 1 FROM {rows} l WHERE {_labels(label)} AND {same}"""
    )


def _labels(label: JoinedLabel) -> str:
    """SQL condition: a row `l` of a joined label matches a row `r` of the requests, and is in time."""
    return f"""l."user" = r."user" AND l.item = r.item
        AND l.time BETWEEN r.time AND r.time + {interval(label.within_seconds)}"""


def joined_figures(sql: DuckDBPyConnection, section: str, label: JoinedLabel) -> dict[str, Any]:
    """Counts of the rows of a joined label by their match, which can be added; see ``joined_report``."""
    rows, users, items, in_time = (
        number(sql, f"SELECT count(*) FROM {section}_rows l {which}")
        for which in (
            "",
            'SEMI JOIN (SELECT DISTINCT "user" FROM requests_rows) USING ("user")',
            'SEMI JOIN (SELECT DISTINCT "user", item FROM requests_rows) USING ("user", item)',
            f"SEMI JOIN requests_rows r ON {_labels(label)}",
        )
    )
    ambiguous = number(
        sql,
        f"""SELECT count(*) FROM (
            SELECT l._row FROM (SELECT *, row_number() OVER () AS _row FROM {section}_rows) l
            JOIN (SELECT DISTINCT "user", item, time FROM requests_rows) r ON {_labels(label)}
            GROUP BY l._row HAVING count(*) > 1)""",
    )
    return {
        "rows": rows,
        "of_a_user_of_the_requests": users,
        "of_a_candidate": items,
        "in_time": in_time,
        "of_several_candidates": ambiguous,
        "like": {
            table: {column: least(sql, column, table) for column in (USER, ITEM)}
            for table in (section, "requests")
        },
    }


def joined_report(
    figures: Mapping[str, Any], task: str, section: str, label: JoinedLabel
) -> dict[str, int]:
    """Counts of the rows of a joined label by their match, for the report.

    Raises:
        LogError: no row labels a candidate.
    """
    counts = {name: count for name, count in figures.items() if name != "like"}
    if not counts["in_time"]:
        its, theirs = (figures["like"][table] for table in (section, "requests"))
        raise LogError(
            f"requests.labels.{task}: none of its {counts['rows']} rows labels a candidate; "
            f"{counts['of_a_user_of_the_requests']} have a user of the requests, "
            f"{counts['of_a_candidate']} an item that is this user's candidate, and none is within "
            f"{label.within_seconds} seconds after it. Its users look like {its[USER].to_report()} and "
            f"its items like {its[ITEM].to_report()}; those of the requests look like "
            f"{theirs[USER].to_report()} and {theirs[ITEM].to_report()}. Write the ids in the same way, "
            "and check the time zones"
        )
    return counts


def listed_figures(sql: DuckDBPyConnection, task: str, each: bool) -> dict[str, Any]:
    """The numbers of items that a label lists and finds, which can be added; see ``listed_report``."""
    listed = quoted(f"_listed_{task}")
    of_rows = f"SELECT any_value({listed}) AS n FROM requests_rows GROUP BY _at"
    of = number(
        sql,
        f"SELECT coalesce(sum(n), 0)::BIGINT FROM ({of_rows})"
        if each
        else f"SELECT coalesce(sum({listed}), 0)::BIGINT FROM requests_rows",
    )
    found = number(sql, f"SELECT count(*) FROM requests_rows WHERE {quoted(task)} = 1")
    return {"listed": of, "found": found, "like": least(sql, ITEM, "requests")}


def listed_report(figures: Mapping[str, Any], task: str) -> dict[str, int]:
    """The numbers of items that a label lists, and finds among the candidates of their row.

    Raises:
        LogError: no listed item is a candidate.
    """
    of, found = figures["listed"], figures["found"]
    if of and not found:
        raise LogError(
            f"requests.labels.{task}: none of the {of} items that it lists is a candidate of its row; "
            f"candidates look like {figures['like'].to_report()}; write the ids in the same way"
        )
    return {"listed": of, "found": found}
