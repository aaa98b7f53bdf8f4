"""The sections of a schema become tables of DuckDB; rows that cannot be used are refused, and counted.

Of a section there are then a table SECTION_read of all its rows, with _refused (why, or null) and _given
(what stood there, as text), and a view SECTION_rows of those that can be used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ifa_torchrec.data.prepare.columns import column_of
from ifa_torchrec.data.prepare.files import Source
from ifa_torchrec.data.prepare.histories import date_histories
from ifa_torchrec.data.prepare.labels import join_label
from ifa_torchrec.data.prepare.schema import PrepareSchema
from ifa_torchrec.data.prepare.sections import (
    AT,
    LENGTH,
    POSITION,
    Section,
    events_section,
    items_section,
    label_section,
    list_in_sql,
    requests_section,
    users_section,
)
from ifa_torchrec.data.prepare.sql import literal, number, quoted
from ifa_torchrec.data.prepare.vectors import check_vectors
from ifa_torchrec.data.schema import LogError

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

_EXAMPLES = 3  # of the rows that are refused for one reason
_SHOWN = 200  # characters of a value in an example
_NOTHING = ""  # stands in _refused, until it is counted, for a row whose lists are empty


def read_sections(
    sql: DuckDBPyConnection, schema: PrepareSchema, max_refused: float
) -> dict[str, dict[str, Any]]:
    r"""Read all sections of a schema: items, events, requests, label_0, label_1, ... and users.

    Returns:
        For each section its rows, how many are refused, and the reasons, with examples; and how many
        rows' lists are empty, where `each` names lists.

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

    def read(section: Section) -> None:
        lines = _read(sql, section)
        empty = number(sql, f"SELECT count(*) FROM {section.name}_read WHERE _refused = '{_NOTHING}'")
        sql.execute(f"DELETE FROM {section.name}_read WHERE _refused = '{_NOTHING}'")
        if section.name == "items" and schema.items:
            check_vectors(sql, schema.items)
        told = _count_refused(sql, section.name, lines, max_refused)
        refused[section.name] = told | ({"rows_of_empty_lists": empty} if section.each else {})

    if schema.items:
        read(items_section(schema.items, schema.log_scaled))
    read(events_section(schema.events, schema.log_scaled))
    read(requests_section(schema))
    if schema.events.time is None:
        date_histories(sql)
    for n, (task, label) in enumerate(schema.requests.joined_labels.items()):
        read(label_section(n, label))
        join_label(sql, task, f"label_{n}", label)
    if schema.users:
        read(users_section(schema.users, schema.log_scaled))
    return refused


def _read(sql: DuckDBPyConnection, section: Section) -> dict[str, dict[str, Any]]:
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
    texts = {c: column for c, (column, _) in columns}
    texts |= {f"_each_{name}": column_of(column) for name, column in section.each.items()}
    shown = [f"{name} := CAST({name} AS VARCHAR)" for name in source.places]
    shown += [
        f"{quoted(c)} := left(CAST({given(column)} AS VARCHAR), {_SHOWN})" for c, column in texts.items()
    ]
    places = "".join(f", {place} AS {name}" for name, place in source.places.items())
    rows = f"(SELECT * {places} FROM {source.relation})"
    wanted = f"TRY(CAST({given(section.where)} AS BOOLEAN))" if section.where else "true"
    checks = {"NOT _wanted IS TRUE": "`where` cannot be told", **section.checks}
    unpacked = "false AS _nothing"
    if section.each:
        rows = _each(sql, section, source, rows, given)
        checks = {
            "_ragged": "lists of `each` differ in length",
            "_unlisted": "a column of `each` is not a list; name the `delimiter` of its text",
            **checks,
        }
        unpacked = f"_ragged, _unlisted, {LENGTH} = 0 AS _nothing"
    reasons = " ".join(f"WHEN {check} THEN {literal(why)}" for check, why in checks.items())
    derived = "".join(f", {form} AS {quoted(name)}" for name, form in section.derived.items())
    scratch = ["_given", "_nothing", "_wanted", *section.scratch]
    scratch += ["_ragged", "_unlisted"] if section.each else []
    with source.reading():
        sql.execute(
            f"""CREATE TABLE {section.name}_read AS
            SELECT * EXCLUDE ({", ".join(map(quoted, scratch))}),
                CASE WHEN _refused IS NOT NULL THEN CAST(_given AS VARCHAR) END AS _given
            FROM (SELECT * {derived}, CASE WHEN _nothing THEN '{_NOTHING}' {reasons} END AS _refused
                  FROM (SELECT {ours}, struct_pack({", ".join(shown)}) AS _given,
                        {wanted} AS _wanted, {unpacked} FROM {rows})
                  WHERE _wanted IS DISTINCT FROM false OR _nothing)"""
        )
    sql.execute(f"CREATE VIEW {section.name}_rows AS FROM {section.name}_read WHERE _refused IS NULL")
    return source.refused


def _each(
    sql: DuckDBPyConnection, section: Section, source: Source, rows: str, given: Callable[[str], str]
) -> str:
    """A relation with a row for each element of a row's lists.

    Where the lists are not what they should be, and where they are empty, one row stands for theirs.
    """
    lists: list[str] = []
    unlisted: list[str] = []
    for name, column in section.each.items():
        if name.lower() in {there.lower() for there in source.columns}:
            raise LogError(f"{section.name}.each: there is a column {name!r} already; take another name")
        text = given(column_of(column))
        kind = sql.execute(f"DESCRIBE SELECT {text} FROM {rows}").fetchall()[0][1]
        # elements of a list keep their type
        lists.append(text if kind.endswith("]") else list_in_sql(column).format(text))
        unlisted.append(f"({text} IS NOT NULL AND {lists[-1]} IS NULL)")
    lengths = [f"coalesce(len({_list}), 0)" for _list in lists]
    ragged = " OR ".join(["false", *(f"{length} <> {lengths[0]}" for length in lengths[1:])])
    bad = "_unlisted OR _ragged"
    found = "".join(f", {_list} AS _list{n}" for n, _list in enumerate(lists))
    elements = "".join(
        f", unnest(CASE WHEN {bad} OR {LENGTH} = 0 THEN [NULL] ELSE _list{n} END) AS {quoted(name)}"
        for n, name in enumerate(section.each)
    )
    return f"""(SELECT *, unnest(range(greatest({LENGTH}, 1))) AS {POSITION} {elements}
        FROM (SELECT *, CASE WHEN {bad} THEN 1 ELSE {lengths[0]} END AS {LENGTH}
              FROM (SELECT *, row_number() OVER () AS {AT}, {" OR ".join(unlisted)} AS _unlisted,
                    {ragged} AS _ragged {found} FROM {rows})))"""


def _count_refused(
    sql: DuckDBPyConnection, section: str, lines: Mapping[str, dict[str, Any]], max_refused: float
) -> dict[str, Any]:
    """A section's rows, and those refused; raises LogError if they are too many."""
    reasons = dict(lines)
    for why, count, examples in sql.execute(
        f"""SELECT why, count(*), min(row, {_EXAMPLES})
        FROM (SELECT _refused AS why, _given AS row FROM {section}_read)
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
