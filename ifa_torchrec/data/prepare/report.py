"""Compute LOG/report.json: joins, leaks, times, duplicate rows and scales, besides plain counts.

Everything is queried from the intermediate tables of ``ifa_torchrec.data.prepare``, as figures that can
be added (``tallies``): the figures of the log are the sum of those of disjoint groups of users.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ifa_torchrec.data.prepare.histories import lists_figures
from ifa_torchrec.data.prepare.labels import joined_figures, joined_report, listed_figures, listed_report
from ifa_torchrec.data.prepare.new_ids import NewIds
from ifa_torchrec.data.prepare.schema import ITEM, Listed, PrepareSchema, Requests
from ifa_torchrec.data.prepare.splits import Splits
from ifa_torchrec.data.prepare.sql import first_row, number, quoted
from ifa_torchrec.data.prepare.tallies import (
    NumberStats,
    Refused,
    Share,
    Span,
    histogram,
    least,
    share,
    shares,
    to_report,
)
from ifa_torchrec.data.schema import TIME, USER, LogError

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

_SPANS = {"second": 1, "minute": 60, "hour": 3600, "day": 86_400}
# Above these shares the report has a sentence in `warnings`.
_LEAKED, _DOUBLED, _AT_MIDNIGHT, _NEW, _UNDESCRIBED, _AMBIGUOUS = 0.1, 0.01, 0.5, 0.2, 0.05, 0.01


def figures_of_rows(sql: DuckDBPyConnection, schema: PrepareSchema) -> dict[str, Any]:
    """Figures of the rows of some users before they are grouped, which can be added.

    Args:
        sql: contains the sections.
        schema: the schema of the log.
    """
    joins: dict[str, Any] = {"users_with_events": _found(sql, USER, "events")}
    if schema.users:
        joins["users_described"] = _found(sql, USER, "users")
    for n, (task, label) in enumerate(schema.requests.joined_labels.items()):
        joins[f"label_{task}"] = joined_figures(sql, f"label_{n}", label)
    for task, label in schema.requests.labels.items():
        if isinstance(label, Listed):
            joins[f"label_{task}"] = listed_figures(sql, task, bool(schema.requests.each))
    figures = {"joins": joins, "doubled_rows": _doubled_rows(sql, schema.requests)}
    return figures if schema.events.time else {**figures, "histories": lists_figures(sql)}


def figures_of_log(
    sql: DuckDBPyConnection, schema: PrepareSchema, splits: Splits, known: int
) -> dict[str, Any]:
    """Figures of the log of some users, which can be added.

    Args:
        sql: contains the tables of the other steps.
        schema: the schema of the log.
        splits: the splits of its requests.
        known: the number of rows of the item table; items from this number on are new.
    """
    users, events, *ends = first_row(
        sql, 'SELECT count(DISTINCT "user"), count(*), min(time), max(time) FROM events'
    )
    new = NewIds(sql, schema, splits, known)
    return {
        "users": users,
        "events": events,
        "events_per_user": histogram(sql, 'SELECT count(*) AS n FROM events GROUP BY "user"'),
        "time_range": Span(*ends),
        "times_at_midnight": _at_midnight(sql),
        "requests": {
            split: _figures_of_split(sql, schema, mine) | {"new": new.figures(split)}
            for split, mine in splits.numbers.items()
        },
    }


def report_of(
    figures: Mapping[str, Any],
    rows: Mapping[str, Any],
    joins: Mapping[str, Any],
    codes: Mapping[str, Mapping[str, Any]],
    refused: Mapping[str, Refused],
) -> dict[str, Any]:
    """The complete report.

    Args:
        figures: from ``figures_of_log``.
        rows: from ``figures_of_rows``.
        joins: from ``joins_of``.
        codes: ``Numbering.report``.
        refused: the refused rows of each section.
    """
    of_log = to_report(figures)
    report = {
        "users": of_log["users"],
        "items": codes[ITEM]["ids"],
        **{name: of_log[name] for name in ("events", "events_per_user", "time_range")},
        "times_at_midnight": of_log["times_at_midnight"],
        "joins": joins,
        "requests": of_log["requests"],
        "vocabulary": codes,
        "doubled_rows": rows["doubled_rows"],
        "refused": to_report(refused),
    }
    if "histories" in rows:
        report["histories_without_times"] = rows["histories"]
    return {"warnings": _warnings(report), **report}


# ---------------------------------------------------------------- joins


def joins_of(
    sql: DuckDBPyConnection, schema: PrepareSchema, figures: Mapping[str, Any]
) -> dict[str, Any]:
    """The numbers of ids of the requests found in the other tables, and of labels found in the requests.

    Args:
        sql: contains events_rows and requests_rows, or only their items, and, if items are described,
            items_rows.
        schema: the schema of the log.
        figures: `joins` of ``figures_of_rows``.

    Raises:
        LogError: a join has no match.
    """
    joins: dict[str, Any] = {
        "users_with_events": _found_report(
            figures["users_with_events"], "events", "requests: none of their users has an event."
        ),
    }
    if not schema.items:
        missing = (
            "requests: none of their candidates is the item of an event (if that is right, add `items`)."
        )
        joins["items_with_events"] = _found_report(_found(sql, ITEM, "events"), "events", missing)
    else:
        missing = "items: none of them is a candidate of the requests."
        joins["items_described"] = _found_report(_found(sql, ITEM, "items"), "items", missing)
    if schema.users:
        missing = "users: none of them is a user of the requests."
        joins["users_described"] = _found_report(figures["users_described"], "users", missing)
    for n, (task, label) in enumerate(schema.requests.joined_labels.items()):
        joins[f"label_{task}"] = joined_report(figures[f"label_{task}"], task, f"label_{n}", label)
    for task, label in schema.requests.labels.items():
        if isinstance(label, Listed):
            joins[f"label_{task}"] = listed_report(figures[f"label_{task}"], task)
    return joins


def _found(sql: DuckDBPyConnection, column: str, table: str) -> dict[str, Any]:
    of, there = first_row(
        sql,
        f"""SELECT count(*),
            count(*) FILTER (WHERE id IN (SELECT DISTINCT "{column}" FROM {table}_rows))
        FROM (SELECT DISTINCT "{column}" AS id FROM requests_rows WHERE "{column}" IS NOT NULL)""",
    )
    like = {where: least(sql, column, where) for where in ("requests", table)}
    return {"of": of, "found": there, "like": like}


def _found_report(figures: Mapping[str, Any], table: str, missing: str) -> dict[str, int]:
    if figures["of"] and not figures["found"]:
        theirs, its = (figures["like"][where].to_report() for where in ("requests", table))
        raise LogError(
            f"{missing} Ids of the requests look like {theirs}, those of {table} like {its}; write them "
            "in the same way in all files"
        )
    return {"of": figures["of"], "found": figures["found"]}


# ---------------------------------------------------------------- a split


def _figures_of_split(sql: DuckDBPyConnection, schema: PrepareSchema, mine: range) -> dict[str, Any]:
    """The figures of a split, queried from views of its requests and candidates."""
    requests = schema.requests
    for table in ("requests", "candidates"):
        sql.execute(
            f"""CREATE OR REPLACE VIEW {table}_of_split AS FROM {table}
            WHERE _number BETWEEN {mine.start} AND {mine.stop - 1}"""
        )
    labels = [f"_row.{quoted(task)}" for task in requests.labels]
    rates = [f", {form} FILTER (_row.exposed)" for n in labels for form in (f"sum({n})", f"count({n})")]
    exposed, *rates = shares(
        sql, f"SELECT {share('_row.exposed')} {''.join(rates)} FROM candidates_of_split"
    )
    first, last, *alone = first_row(
        sql,
        f"""SELECT min(time), max(time), {share("_first IS NULL OR _first >= time")}
        FROM requests_of_split
        LEFT JOIN (SELECT "user", min(time) AS _first FROM events GROUP BY "user") USING ("user")""",
    )
    figures: dict[str, Any] = {
        "requests": len(mine),
        "time_range": Span(first, last),
        "candidates": histogram(sql, "SELECT count(*) AS n FROM candidates_of_split GROUP BY _number"),
        "exposed": exposed,
        "label_rates_of_exposed": dict(zip(requests.labels, rates, strict=True)),
        "requests_without_history": Share(*alone),
        "requests_without_user": number(sql, 'SELECT count(*) FROM requests_of_split WHERE "user" = 0'),
        **_leaks(sql),
        **_same_times(sql),
        "candidates_given_again": number(
            sql,
            """SELECT coalesce(sum(n - 1), 0)::BIGINT FROM (
            SELECT count(*) AS n FROM candidates_of_split GROUP BY _number, _row.item)""",
        ),
        "dense": _scales(sql, schema.dense, requests.candidate_dense),
    }
    if schema.items:
        figures["candidates_not_described"] = shares(
            sql,
            f"""SELECT {share("NOT coalesce(_described, false)")}
            FROM candidates_of_split c JOIN items i ON i.item = c._row.item""",
        )[0]
    if requests.negatives:
        positives = number(sql, "SELECT count(*) FROM candidates_of_split WHERE _positive")
        drawn = number(
            sql, f"SELECT count(*) FROM drawn WHERE _number BETWEEN {mine.start} AND {mine.stop - 1}"
        )
        figures["negatives"] = {"asked_for": requests.negatives * positives, "added": drawn}
    return figures


def _leaks(sql: DuckDBPyConnection) -> dict[str, Share]:
    """Shares of a split's positives whose item is in the user's events around the request's time."""

    def nearest(event: str, select: str) -> list[Share]:
        return shares(
            sql,
            f"""SELECT {select}
            FROM (SELECT "user", time, _row.item AS item
                  FROM candidates_of_split JOIN requests USING (_number) WHERE _positive) p
            ASOF LEFT JOIN events e ON e."user" = p."user" AND e.item = p.item AND {event}""",
        )

    spans = {span: f"to_seconds({seconds})" for span, seconds in _SPANS.items()}
    before = ["e.time IS NOT NULL", *(f"e.time >= p.time - {length}" for length in spans.values())]
    seen = nearest("p.time > e.time", ", ".join(share(condition) for condition in before))
    after = nearest("p.time <= e.time", share(f"e.time < p.time + {spans['day']}"))
    names = ["positives_seen_before", *(f"positives_in_last_{span}" for span in spans)]
    return dict(zip([*names, "positives_in_next_day"], [*seen, *after], strict=True))


def _same_times(sql: DuckDBPyConnection) -> dict[str, int]:
    """The numbers of events with exactly the time, and with the day, of a request of the same user."""

    def events(time: str) -> int:
        return number(
            sql,
            f"""SELECT count(*) FROM (SELECT "user", {time} AS _time FROM events)
            SEMI JOIN (SELECT DISTINCT "user", {time} AS _time FROM requests_of_split)
            USING ("user", _time)""",
        )

    return {
        "events_at_the_time_of_a_request": events("time"),
        "events_on_the_day_of_a_request": events("CAST(time AS DATE)"),
    }


def _scales(
    sql: DuckDBPyConnection, dense: Iterable[str], candidate_dense: Iterable[str]
) -> dict[str, NumberStats]:
    """Statistics of the dense columns of a split, with the share of missing numbers."""
    columns = [(name, quoted(name), "requests_of_split") for name in dense]
    columns += [(name, f"_row.{quoted(name)}", "candidates_of_split") for name in candidate_dense]
    return {
        name: NumberStats(
            *first_row(
                sql,
                f"""SELECT count(*), count(x), avg(x), var_pop(x), min(x), max(x)
                FROM (SELECT CAST({column} AS DOUBLE) AS x FROM {table})""",
            )
        )
        for name, column, table in columns
    }


# ---------------------------------------------------------------- the whole log


def _at_midnight(sql: DuckDBPyConnection) -> dict[str, Share]:
    """The share of times at midnight UTC, which is what a date without a time becomes."""
    midnight = share(f"{TIME} = date_trunc('day', {TIME})")
    return {table: shares(sql, f"SELECT {midnight} FROM {table}")[0] for table in ("events", "requests")}


def _doubled_rows(sql: DuckDBPyConnection, requests: Requests) -> dict[str, Any]:
    """For each table, the number of rows that equal an earlier row in every column of the schema."""
    tables = {"events": "events", "requests": "requests"}
    tables |= {f"label_{task}": f"label_{n}" for n, task in enumerate(requests.joined_labels)}
    figures: dict[str, Any] = {}
    for section, table in tables.items():
        rows, doubled = first_row(
            sql,
            f"""SELECT sum(_n)::BIGINT, sum(_n - 1)::BIGINT FROM (
            SELECT * EXCLUDE (_given, _refused), count(*) AS _n FROM {table}_rows GROUP BY ALL)""",
        )
        figures[section] = {"rows": rows or 0, "doubled": doubled or 0}
    return figures


def _warnings(report: Mapping[str, Any]) -> list[str]:
    """Sentences about figures of the report that need attention."""
    warnings: list[str] = []
    for split, figures in report["requests"].items():
        if (new := figures["new"]["items"]["candidates"] or 0) > _NEW:
            warnings.append(
                f"{split}: {new:.1%} of the candidates are items that are not in the training split: "
                "the model knows only their features, so describe them in `items`"
            )
        if (unknown := figures.get("candidates_not_described") or 0) > _UNDESCRIBED:
            warnings.append(
                f"{split}: {unknown:.1%} of the candidates are not described in `items`: their features "
                "are unknown"
            )
        second, before, after = (
            figures[f"positives_in_{span}"] or 0 for span in ("last_second", "last_day", "next_day")
        )
        if second > _DOUBLED or before - after > _LEAKED:
            warnings.append(
                f"{split}: {before:.1%} of the positives have an event of their item within the day "
                f"before the request, {second:.1%} within the second before, {after:.1%} within the day "
                "after it. If these events are the positives themselves (the events' clock is behind, "
                "in another time zone, or they have only dates), the histories contain the labels"
            )
    days = sum(figures["events_on_the_day_of_a_request"] for figures in report["requests"].values())
    for table, midnight in report["times_at_midnight"].items():
        if (midnight or 0) > _AT_MIDNIGHT:
            warnings.append(
                f"{table}: {midnight:.1%} of the times are midnight, as if they were only dates; then "
                f"the order within a day is unknown, and {days} events are on the day of a request"
            )
    for section, figures in report["doubled_rows"].items():
        if figures["doubled"] > _DOUBLED * figures["rows"]:
            warnings.append(
                f"{section}: {figures['doubled']} of {figures['rows']} rows equal an earlier row; all "
                "of them are used"
            )
    for name, figures in report["joins"].items():
        ambiguous = figures.get("of_several_candidates", 0)
        if ambiguous > _AMBIGUOUS * figures.get("in_time", 0):
            warnings.append(
                f"{name}: {ambiguous} of {figures['in_time']} rows may belong to several candidates, "
                "since the item was shown more than once within `within_seconds` before; the latest is "
                "labelled 1, or all of them with `mark_all`"
            )
    lists = report.get("histories_without_times", {})
    if several := lists.get("users_with_lists_of_several_lengths"):
        warnings.append(
            f"events: {several} of {lists['users']} users have lists of several lengths; the shortest "
            "is used as the history, since a longer one may contain events after a request"
        )
    return warnings
