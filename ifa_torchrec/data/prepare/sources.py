"""The sections of a schema become tables of DuckDB; rows that cannot be used are refused, and counted.

Of a section there are then a table SECTION_read of all its rows, with _refused (why, or null) and _given
(what stood there, as text), and a view SECTION_rows of those that can be used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ifa_torchrec.data.prepare.files import Source
from ifa_torchrec.data.prepare.schema import (
    ITEM,
    NAME,
    Events,
    Items,
    PrepareSchema,
    Requests,
    Table,
    Users,
    column_of,
)
from ifa_torchrec.data.prepare.sql import interval, literal, number, quoted, timestamp
from ifa_torchrec.data.schema import EXPOSED, TIME, USER, LogError

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

_EXAMPLES = 3  # of the rows that are refused for one reason

# SQL with {0} where what stands in the file does
_TEXT = "CAST({0} AS VARCHAR)"
_NUMBER = "TRY(CAST({0} AS FLOAT))"
_BOOLEAN = "TRY(CAST({0} AS BOOLEAN))"
# 0 and 1, or what else stands for false and true
_LABEL = "coalesce(TRY(CAST({0} AS FLOAT)), TRY(CAST(CAST({0} AS BOOLEAN) AS FLOAT)))"
# An id as text. A float that is not a number, or so large that integers beside it are the same float,
# would be many users or items in one.
_ID = """CASE WHEN abs(CASE typeof({0}) WHEN 'DOUBLE' THEN TRY_CAST({0} AS DOUBLE)
    WHEN 'FLOAT' THEN TRY_CAST({0} AS DOUBLE) * 536870912 END) >= 9007199254740992 THEN NULL
    ELSE CAST({0} AS VARCHAR) END"""
_INEXACT = "is a float in which ids are not exact; write them as integers or text"

# where the items are the log itself, a join with all its rows takes far more memory
_UNKNOWN_ITEM = "item NOT IN (SELECT DISTINCT item FROM items_rows)"


@dataclass(frozen=True)
class _Section:
    """A table to be read.

    Args:
        name: of the section, and of its tables.
        files: where its rows are.
        columns: for each column of ours, the schema's column and the SQL that makes ours of it.
        checks: SQL conditions under which a row is refused, and why.
        where: the schema's condition for the rows that are wanted; all, by default.
    """

    name: str
    files: Table
    columns: Mapping[str, tuple[str, str]]
    checks: Mapping[str, str]
    where: str | None = None


def read_sections(
    sql: DuckDBPyConnection, schema: PrepareSchema, max_refused: float
) -> dict[str, dict[str, Any]]:
    r"""Read all sections of a schema: items, events, requests, label_0, label_1, ... and users.

    Returns:
        For each section its rows, how many are refused, and the reasons, with examples.

    Raises:
        LogError: files or columns are missing, or more than the share ``max_refused`` of a section's
            rows is refused.

    Example:
        >>> import duckdb, tempfile
        >>> from pathlib import Path
        >>> from ifa_torchrec.data.prepare import Events, PrepareSchema, Requests
        >>> from ifa_torchrec.data.prepare.sources import read_sections
        >>> file, sql = Path(tempfile.mkdtemp()) / "log.csv", duckdb.connect()
        >>> _ = file.write_text("u,i,t,c\nann,tea,2024-05-01,1\nann,cup,yesterday,0\n")
        >>> rows = dict(files=str(file), user="u", item="i", time="t")
        >>> schema = PrepareSchema(events=Events(**rows), splits={},
        ...                        requests=Requests(**rows, labels={"click": "c"}))
        >>> list(read_sections(sql, schema, max_refused=0.5)["events"]["reasons"])
        ['time cannot be read as a timestamp; give numbers a unit']
        >>> sql.execute("SELECT item, click FROM requests_rows").fetchall()
        [('tea', 1.0)]
    """
    refused: dict[str, dict[str, Any]] = {}

    def read(section: _Section) -> None:
        lines = _read(sql, section)
        refused[section.name] = _count_refused(sql, section.name, lines, max_refused)

    known = {_UNKNOWN_ITEM: "item is not among the items"} if schema.items else {}
    if schema.items:
        read(_items(schema.items))
    read(_rows("events", schema.events, known))
    read(_requests(schema.requests, known))
    for number_of, (task, label) in enumerate(schema.requests.joined_labels.items()):
        read(_rows(f"label_{number_of}", label, known))
        _join_label(sql, task, f"label_{number_of}", label.within_seconds)
    if schema.users:
        read(_users(schema.users))
    return refused


# ---------------------------------------------------------------- what is wanted of a section


def _items(items: Items) -> _Section:
    columns = {ITEM: (items.item, _ID), NAME: (items.name or items.item, _TEXT)}
    columns |= {f: (column_of(column), _TEXT) for f, column in items.features.items()}
    return _Section("items", items, columns, _checks_of_id(ITEM))


def _users(users: Users) -> _Section:
    columns = {USER: (users.user, _ID)}
    columns |= {f: (column_of(column), _TEXT) for f, column in users.features.items()}
    return _Section("users", users, columns, _checks_of_id(USER))


def _rows(
    name: str,
    rows: Events,
    known: Mapping[str, str],
    columns: Mapping[str, tuple[str, str]] | None = None,
    checks: Mapping[str, str] | None = None,
) -> _Section:
    """A section of rows with a user, an item and a time, and what others have beside."""
    unit = f"a number in {rows.unit}" if rows.unit else "a timestamp; give numbers a unit"
    return _Section(
        name,
        rows,
        {
            USER: (rows.user, _ID),
            ITEM: (column_of(rows.item), _ID),
            TIME: (rows.time, timestamp("{0}", rows.unit)),
            **(columns or {}),
        },
        {
            **_checks_of_id(USER, ITEM),
            "_given.time IS NULL": "time is empty",
            "time IS NULL": f"time cannot be read as {unit}",
            # An epoch number in the wrong unit ends in 1970 or in the year 54000.
            "year(time) NOT BETWEEN 1971 AND 2200": "time is not of 1971 to 2200: is the unit right?",
            **known,
            **(checks or {}),
        },
        rows.where,
    )


def _requests(requests: Requests, known: Mapping[str, str]) -> _Section:
    columns = {
        "_request": (requests.request or "''", _TEXT),
        EXPOSED: (requests.exposed or "true", _BOOLEAN),
    }
    checks = {"_request IS NULL": "request is empty", "exposed IS NULL": "exposed is not 0 or 1"}
    for task, label in requests.labels.items():
        if isinstance(label, str):
            columns[task] = (label, _LABEL)
            unknown = f"_given.{quoted(task)} IS NULL AND NOT exposed"
            known_label = f"coalesce({quoted(task)} IN (0, 1), false)"
            checks[f"NOT ({unknown} OR {known_label})"] = f"label {task} is not 0 or 1"
    for feature, column in requests.context.items():
        columns[feature] = (column_of(column), _TEXT)
    for feature, column in {**requests.dense, **requests.candidate_dense}.items():
        columns[feature] = (column, _NUMBER)
        checks[f"NOT coalesce(isfinite({quoted(feature)}), false)"] = f"{feature} is not a number"
    return _rows("requests", requests, known, columns, checks)


def _checks_of_id(*names: str) -> dict[str, str]:
    empty = {f"_given.{quoted(name)} IS NULL": f"{name} is empty" for name in names}
    return empty | {f"{quoted(name)} IS NULL": f"{name} {_INEXACT}" for name in names}


# ---------------------------------------------------------------- reading


def _read(sql: DuckDBPyConnection, section: _Section) -> dict[str, dict[str, Any]]:
    """Make the table and the view of a section.

    Returns:
        Why lines of its files were refused before they were rows.
    """
    source = Source(section.name, section.files, sql)

    def given(column: str) -> str:
        there = source.columns.get(column)
        return f"TRY({f'({column})' if there is None else quoted(there)})"

    columns = section.columns.items()
    ours = ", ".join(f"{form.format(given(column))} AS {quoted(c)}" for c, (column, form) in columns)
    texts = ", ".join(f"{quoted(c)} := {_TEXT.format(given(column))}" for c, (column, _) in columns)
    wanted = f"TRY(CAST({given(section.where)} AS BOOLEAN))" if section.where else "true"
    checks = {"NOT _wanted IS TRUE": "`where` cannot be told", **section.checks}
    reasons = " ".join(f"WHEN {check} THEN {literal(why)}" for check, why in checks.items())
    with source.reading():
        sql.execute(
            f"""CREATE TABLE {section.name}_read AS
            SELECT * EXCLUDE (_given, _wanted), CASE WHEN _refused IS NOT NULL THEN _given END AS _given
            FROM (SELECT *, CASE {reasons} END AS _refused
                  FROM (SELECT {ours}, struct_pack({texts}) AS _given, {wanted} AS _wanted
                        FROM {source.relation})
                  WHERE _wanted IS DISTINCT FROM false)"""
        )
    sql.execute(f"CREATE VIEW {section.name}_rows AS FROM {section.name}_read WHERE _refused IS NULL")
    return source.refused


def _count_refused(
    sql: DuckDBPyConnection, section: str, lines: Mapping[str, dict[str, Any]], max_refused: float
) -> dict[str, Any]:
    """A section's rows, and those refused; raises LogError if they are too many."""
    reasons = dict(lines)
    for why, count, examples in sql.execute(
        f"""SELECT why, count(*), min(row, {_EXAMPLES})
        FROM (SELECT _refused AS why, CAST(_given AS VARCHAR) AS row FROM {section}_read)
        WHERE why IS NOT NULL GROUP BY why ORDER BY why"""
    ).fetchall():
        reasons[why] = {"rows": count, "examples": examples}
    reasons = dict(sorted(reasons.items(), key=lambda reason: -reason[1]["rows"]))
    rows = number(sql, f"SELECT count(*) FROM {section}_read")
    rows += sum(reason["rows"] for reason in lines.values())
    count = sum(reason["rows"] for reason in reasons.values())
    if count > max_refused * rows:
        told = "; ".join(
            f"{why} ({reason['rows']} rows, as {reason['examples'][0]})"
            for why, reason in reasons.items()
        )
        raise LogError(
            f"{section}: {count} of {rows} rows are refused, above the share of {max_refused}: "
            f"{told}; repair them or the schema, or allow more with max_refused"
        )
    return {"rows": rows, "refused": count, "reasons": reasons}


def _join_label(sql: DuckDBPyConnection, task: str, section: str, within_seconds: float) -> None:
    sql.execute(
        f"""ALTER TABLE requests_read ADD COLUMN {quoted(task)} FLOAT DEFAULT 0;
        UPDATE requests_read r SET {quoted(task)} = 1 FROM {section}_rows l
        WHERE {labels_of(within_seconds)}"""
    )


def labels_of(within_seconds: float) -> str:
    """Whether a row `l` of a joined label labels a row `r` of the requests, in SQL.

    Example:
        >>> from ifa_torchrec.data.prepare.sources import labels_of
        >>> print(labels_of(60))
        l."user" = r."user" AND l.item = r.item
        AND l.time BETWEEN r.time AND r.time + to_microseconds(60000000)
    """
    return f"""l."user" = r."user" AND l.item = r.item
AND l.time BETWEEN r.time AND r.time + {interval(within_seconds)}"""
