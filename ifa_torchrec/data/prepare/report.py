"""What LOG/report.json says of joins, leaks, times, doubled rows and scales, beside plain counts.

All of it is asked of the tables that ``ifa_torchrec.data.prepare`` makes on its way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ifa_torchrec.data.prepare.schema import ITEM, JoinedLabel, PrepareSchema
from ifa_torchrec.data.scales import unscaled
from ifa_torchrec.data.schema import TIME, USER, LogError

if TYPE_CHECKING:
    import duckdb

_SPANS = {"second": 1, "minute": 60, "hour": 3600, "day": 86_400}
# Above these shares a sentence among the report's `warnings` says so.
_LEAKED, _DOUBLED, _AT_MIDNIGHT = 0.1, 0.01, 0.5


def joins(sql: duckdb.DuckDBPyConnection, schema: PrepareSchema) -> dict[str, Any]:
    """How many ids of the requests are found in the other tables, and labels among the requests.

    Raises:
        LogError: a join finds nothing at all.
    """

    def found(column: str, table: str, missing: str) -> dict[str, int]:
        of, there = _row(
            sql,
            f"""SELECT count(*),
                count(*) FILTER (WHERE id IN (SELECT DISTINCT "{column}" FROM {table}_rows))
            FROM (SELECT DISTINCT "{column}" AS id FROM requests_rows)""",
        )
        if of and not there:
            theirs, its = (_example(sql, column, where) for where in ("requests", table))
            raise LogError(
                f"{missing} Those of the requests are like {theirs}, those of {table} like {its}; write "
                "them alike in all files"
            )
        return {"of": of, "found": there}

    told: dict[str, Any] = {
        "users_with_events": found(USER, "events", "requests: no user of theirs has an event."),
    }
    if not schema.items:
        missing = (
            "requests: no candidate of theirs is the item of an event (if that is so, describe `items`)."
        )
        told["items_with_events"] = found(ITEM, "events", missing)
    if schema.users:
        told["users_described"] = found(USER, "users", "users: no user of the requests is among them.")
    labels = schema.requests.labels.items()
    joined = {task: label for task, label in labels if isinstance(label, JoinedLabel)}
    for number, (task, label) in enumerate(joined.items()):
        table = f"label_{number}"
        within = f"to_microseconds({round(label.within_seconds * 1e6)})"
        rows, users, items, in_time = (
            _row(sql, f"SELECT count(*) FROM {table}_rows l {which}")[0]
            for which in (
                "",
                'SEMI JOIN (SELECT DISTINCT "user" FROM requests_rows) USING ("user")',
                'SEMI JOIN (SELECT DISTINCT "user", item FROM requests_rows) USING ("user", item)',
                """SEMI JOIN requests_rows r ON r."user" = l."user" AND r.item = l.item
                AND l.time BETWEEN r.time AND r.time + """
                + within,
            )
        )
        if not in_time:
            user, item = (_example(sql, column, table) for column in (USER, ITEM))
            theirs, shown = (_example(sql, column, "requests") for column in (USER, ITEM))
            raise LogError(
                f"requests.labels.{task}: none of its {rows} rows labels a candidate; {users} have a "
                f"user of the requests, {items} that user's candidate, none within "
                f"{label.within_seconds} seconds after it. Its users are like {user}, its items like "
                f"{item}; those of the requests like {theirs} and {shown}; are ids written alike, and "
                "times of one time zone?"
            )
        told[f"label_{task}"] = {
            "rows": rows,
            "of_a_user_of_the_requests": users,
            "of_a_candidate": items,
            "in_time": in_time,
        }
    return told


def leaks(sql: duckdb.DuckDBPyConnection, mine: str, positive: str) -> dict[str, float | None]:
    """Shares of a split's positives whose item the user's events hold near the request.

    Args:
        mine: which requests are the split's, in SQL.
        positive: whether a row of `numbered` is a positive, in SQL.
    """

    def nearest(after: bool, select: str) -> tuple[Any, ...]:
        return _row(
            sql,
            f"""SELECT {select}
            FROM (SELECT "user", time, _row.item AS item FROM numbered JOIN requests USING (_number)
                  WHERE {mine} AND {positive}) p
            ASOF LEFT JOIN events e
            ON e."user" = p."user" AND e.item = p.item AND p.time {"<=" if after else ">"} e.time""",
        )

    spans = {span: f"to_seconds({seconds})" for span, seconds in _SPANS.items()}
    before = ["e.time IS NOT NULL", *(f"e.time >= p.time - {length}" for length in spans.values())]
    shares = nearest(False, ", ".join(_share(condition) for condition in before))
    after = nearest(True, _share(f"e.time < p.time + {spans['day']}"))
    names = ["positives_seen_before", *(f"positives_in_last_{span}" for span in spans)]
    return dict(zip([*names, "positives_in_next_day"], [*shares, *after], strict=True))


def same_times(sql: duckdb.DuckDBPyConnection, mine: str) -> dict[str, int]:
    """Events of the very time, and of the day, of a request of a split by the same user."""

    def events(time: str) -> int:
        return _row(
            sql,
            f"""SELECT count(*) FROM (SELECT "user", {time} AS _time FROM events)
            SEMI JOIN (SELECT DISTINCT "user", {time} AS _time FROM requests WHERE {mine})
            USING ("user", _time)""",
        )[0]

    return {
        "events_at_the_time_of_a_request": events("time"),
        "events_on_the_day_of_a_request": events("CAST(time AS DATE)"),
    }


def at_midnight(sql: duckdb.DuckDBPyConnection) -> dict[str, float | None]:
    """Share of times that are midnight UTC, as a date alone is."""
    share = _share(f"{TIME} = date_trunc('day', {TIME})")
    return {table: _row(sql, f"SELECT {share} FROM {table}")[0] for table in ("events", "requests")}


def doubled_rows(sql: duckdb.DuckDBPyConnection, schema: PrepareSchema) -> dict[str, Any]:
    """Of each table's rows, those that equal one before them in every column of the schema."""
    labels = schema.requests.labels.items()
    tables = {"events": "events", "requests": "requests"}
    joined = [task for task, label in labels if isinstance(label, JoinedLabel)]
    tables |= {f"label_{task}": f"label_{number}" for number, task in enumerate(joined)}
    told: dict[str, Any] = {}
    for section, table in tables.items():
        rows, doubled = _row(
            sql,
            f"""SELECT sum(_n)::BIGINT, sum(_n - 1)::BIGINT FROM (
            SELECT * EXCLUDE (_given, _refused), count(*) AS _n FROM {table}_rows GROUP BY ALL)""",
        )
        told[section] = {"rows": rows or 0, "doubled": doubled or 0}
    return told


def of_candidates(
    sql: duckdb.DuckDBPyConnection, mine: str, dense: Sequence[str], candidate_dense: Sequence[str]
) -> dict[str, Any]:
    """Candidates that stand in their request already, and how the dense columns are scaled."""
    told: dict[str, Any] = {
        "candidates_given_again": _row(
            sql,
            f"""SELECT coalesce(sum(n - 1), 0)::BIGINT FROM (SELECT count(*) AS n FROM numbered
            WHERE {mine} GROUP BY _number, _row.item)""",
        )[0]
    }
    columns = [(name, f'"{name}"', "requests") for name in dense]
    columns += [(name, f'_row."{name}"', "numbered") for name in candidate_dense]
    told["dense"] = {
        name: dict(
            zip(
                ("mean", "std", "min", "max"),
                _row(
                    sql,
                    f"""SELECT avg(x), stddev_pop(x), min(x), max(x)
                    FROM (SELECT CAST({column} AS DOUBLE) AS x FROM {table} WHERE {mine})""",
                ),
                strict=True,
            )
        )
        for name, column, table in columns
    }
    return told


def warnings_of(report: Mapping[str, Any]) -> list[str]:
    """What a report's figures say that somebody should look at, in words."""
    told: list[str] = []
    for split, figures in report["requests"].items():
        told += [
            f"{split}: {sentence}"
            for name, numbers in figures["dense"].items()
            if (sentence := unscaled(name, numbers["mean"], numbers["std"]))
        ]
        second, before, after = (
            figures[f"positives_in_{span}"] or 0 for span in ("last_second", "last_day", "next_day")
        )
        if second > _DOUBLED or before - after > _LEAKED:
            told.append(
                f"{split}: {before:.1%} of the positives have an event of their item within the day "
                f"before the request, {second:.1%} within the second before, {after:.1%} within the day "
                "from it on. Are these events the positives themselves, by a clock that is behind, in "
                "another time zone, or with dates alone? Then the histories hold the labels"
            )
    days = sum(figures["events_on_the_day_of_a_request"] for figures in report["requests"].values())
    for table, share in report["times_at_midnight"].items():
        if (share or 0) > _AT_MIDNIGHT:
            told.append(
                f"{table}: {share:.1%} of the times are midnight, as of dates alone; what came first on "
                f"a day cannot be told then, and {days} events are of the day of a request"
            )
    for section, figures in report["doubled_rows"].items():
        if figures["doubled"] > _DOUBLED * figures["rows"]:
            told.append(
                f"{section}: {figures['doubled']} of {figures['rows']} rows equal one before them; each "
                "counts"
            )
    return told


def _row(sql: duckdb.DuckDBPyConnection, query: str) -> tuple[Any, ...]:
    return sql.execute(query).fetchall()[0]


def _share(condition: str) -> str:
    return f"avg(CAST(coalesce({condition}, false) AS INTEGER))"


def _example(sql: duckdb.DuckDBPyConnection, column: str, table: str) -> str:
    """An id of a table, for a message."""
    least = _row(sql, f'SELECT min("{column}") FROM {table}_rows')[0]
    return "none, since it has no rows" if least is None else repr(least)
