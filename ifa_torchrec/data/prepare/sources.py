"""Read the sections of a schema into DuckDB tables; refuse and count rows that cannot be used.

Each section becomes a table SECTION_read of all its rows, with _refused (the reason, or null) and _given
(the original values, as text), and a view SECTION_rows of the rows that can be used.
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
from ifa_torchrec.data.prepare.tallies import Refused
from ifa_torchrec.data.prepare.vectors import check_vectors
from ifa_torchrec.data.schema import LogError

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

_SHOWN = 200  # characters of a value in an example
_NOTHING = ""  # the value of _refused for a row whose lists are empty, until it is counted


def sections_of(schema: PrepareSchema) -> list[Section]:
    """The sections of a schema: items, events, requests, label_0, label_1, ... and users.

    Example:
        >>> from ifa_torchrec.data.prepare import Events, PrepareSchema, Requests
        >>> from ifa_torchrec.data.prepare.sources import sections_of
        >>> rows = dict(files="log.csv", user="u", item="i", time="t")
        >>> schema = PrepareSchema(events=Events(**rows), splits={},
        ...                        requests=Requests(**rows, labels={"click": "c"}))
        >>> [section.name for section in sections_of(schema)]
        ['events', 'requests']
    """
    scaled = schema.log_scaled
    labels = enumerate(schema.requests.joined_labels.values())
    return [
        *([items_section(schema.items, scaled)] if schema.items else []),
        events_section(schema.events, scaled),
        requests_section(schema),
        *(label_section(n, label) for n, label in labels),
        *([users_section(schema.users, scaled)] if schema.users else []),
    ]


def read_section(
    sql: DuckDBPyConnection, schema: PrepareSchema, section: Section, before: int = 0
) -> Refused:
    r"""Read a section of a schema.

    Args:
        sql: gets the table SECTION_read and the view SECTION_rows.
        schema: the schema of the log.
        section: one of its sections, or one file of a section.
        before: the number of rows in the section's files before this one, if lists are numbered by row.

    Raises:
        LogError: files or columns are missing.

    Example:
        >>> import duckdb, tempfile
        >>> from pathlib import Path
        >>> from ifa_torchrec.data.prepare import Events, PrepareSchema, Requests
        >>> from ifa_torchrec.data.prepare.sources import read_section, sections_of
        >>> file, sql = Path(tempfile.mkdtemp()) / "log.csv", duckdb.connect()
        >>> _ = file.write_text("u,i,t,c\nann,tea,2024-05-01,1\nann,cup,yesterday,0\n")
        >>> rows = dict(files=str(file), user="u", item="i", time="t")
        >>> schema = PrepareSchema(events=Events(**rows), splits={},
        ...                        requests=Requests(**rows, labels={"click": "c"}))
        >>> list(read_section(sql, schema, sections_of(schema)[1]).reasons)
        ['time cannot be read as a timestamp; set `unit` if it is a number']
        >>> sql.execute("SELECT item, click FROM requests_rows").fetchall()
        [('tea', 1.0)]
    """
    import duckdb

    try:
        lines = _read(sql, section, before)
    except duckdb.OutOfMemoryException:
        raise
    except duckdb.Error as error:
        raise LogError(
            f"{section.name}: the schema does not match its files, {section.files.files}: {error}"
        ) from error
    empty = number(sql, f"SELECT count(*) FROM {section.name}_read WHERE _refused = '{_NOTHING}'")
    sql.execute(f"DELETE FROM {section.name}_read WHERE _refused = '{_NOTHING}'")
    if section.name == "items" and schema.items:
        check_vectors(sql, schema.items)
    return _count_refused(sql, section, lines, empty)


def complete_rows(sql: DuckDBPyConnection, schema: PrepareSchema) -> None:
    """Set the times of histories given as lists without times, and join labels from other tables.

    Args:
        sql: contains the sections, and `first_request`, the earliest time of all requests.
        schema: the schema of the log.
    """
    if schema.events.time is None:
        date_histories(sql)
    for n, (task, label) in enumerate(schema.requests.joined_labels.items()):
        join_label(sql, task, f"label_{n}", label)


def _read(sql: DuckDBPyConnection, section: Section, before: int) -> dict[str, dict[str, Any]]:
    """Make the table and the view of a section.

    Returns:
        The refused lines of its CSV files by reason, as in ``Source.refused``.
    """
    source = Source(section.name, section.files, sql)

    def given(column: str) -> str:
        there = source.columns.get(column)
        return f"TRY({f'({column})' if there is None else quoted(there)})"

    columns = section.columns.items()
    # Temporary names: otherwise a column missing in the files would be resolved to an output column.
    ours = ", ".join(
        f"{form.format(given(column))} AS _{n}" for n, (_, (column, form)) in enumerate(columns)
    )
    named = ", ".join(f"_{n} AS {quoted(c)}" for n, c in enumerate(section.columns))
    texts = {c: column for c, (column, _) in columns}
    texts |= {f"_each_{name}": column_of(column) for name, column in section.each.items()}
    originals = [f"{name} := CAST({name} AS VARCHAR)" for name in source.places]
    originals += [
        f"{quoted(c)} := nullif(left(CAST({given(column)} AS VARCHAR), {_SHOWN}), '')"
        for c, column in texts.items()
    ]
    places = "".join(f", {place} AS {name}" for name, place in source.places.items())
    rows = f"(SELECT * {places} FROM {source.relation})"
    wanted = f"TRY(CAST({given(section.where)} AS BOOLEAN))" if section.where else "true"
    checks = {"NOT _wanted IS TRUE": "`where` is neither true nor false", **section.checks}
    unpacked, kept = "false AS _nothing", "_given, _wanted, _nothing"
    if section.each:
        rows = _each(sql, section, source, rows, given, before)
        checks = {
            "_ragged": "lists of `each` differ in length",
            "_unlisted": "a column of `each` is not a list; if it is text, set its `delimiter`",
            **checks,
        }
        unpacked, kept = f"_ragged, _unlisted, {LENGTH} = 0 AS _nothing", f"{kept}, _ragged, _unlisted"
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
                  FROM (SELECT {named}, {kept}
                        FROM (SELECT {ours}, struct_pack({", ".join(originals)}) AS _given,
                              {wanted} AS _wanted, {unpacked} FROM {rows}))
                  WHERE _wanted IS DISTINCT FROM false OR _nothing)"""
        )
    sql.execute(f"CREATE VIEW {section.name}_rows AS FROM {section.name}_read WHERE _refused IS NULL")
    return source.refused


def _each(
    sql: DuckDBPyConnection,
    section: Section,
    source: Source,
    rows: str,
    given: Callable[[str], str],
    before: int,
) -> str:
    """A relation with one row for each element of a row's lists.

    If the lists are not valid, or empty, it has one row in their place.
    """
    lists: list[str] = []
    unlisted: list[str] = []
    for name, column in section.each.items():
        if name.lower() in {there.lower() for there in source.columns}:
            raise LogError(
                f"{section.name}.each: the files already have a column {name!r}; choose another name"
            )
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
              FROM (SELECT *, {before} + row_number() OVER () AS {AT},
                    {" OR ".join(unlisted)} AS _unlisted, {ragged} AS _ragged {found} FROM {rows})))"""


def _count_refused(
    sql: DuckDBPyConnection, section: Section, lines: Mapping[str, dict[str, Any]], empty: int
) -> Refused:
    """Count the rows of a section and its refused rows."""
    reasons = {
        why: {"rows": count, "examples": examples}
        for why, count, examples in sql.execute(
            f"""SELECT why, count(*), min(row, {Refused.EXAMPLES})
            FROM (SELECT _refused AS why, _given AS row FROM {section.name}_read)
            WHERE why IS NOT NULL GROUP BY why ORDER BY why"""
        ).fetchall()
    }
    rows = number(sql, f"SELECT count(*) FROM {section.name}_read")
    rows += sum(reason["rows"] for reason in lines.values())
    return Refused(rows, lines, reasons, empty if section.each else None)


def check_refused(section: str, refused: Refused, max_refused: float) -> None:
    """Raise if too many rows of a section are refused.

    Raises:
        LogError: the share of refused rows is above ``max_refused``.

    Example:
        >>> from ifa_torchrec.data.prepare.sources import check_refused
        >>> from ifa_torchrec.data.prepare.tallies import Refused
        >>> check_refused("events", Refused(4, {}, {}, None), max_refused=0)
    """
    report = refused.to_report()
    if report["refused"] > max_refused * report["rows"]:
        why = "; ".join(
            f"{why} ({reason['rows']} rows, such as {reason['examples'][0]})"
            for why, reason in report["reasons"].items()
        )
        raise LogError(
            f"{section}: {report['refused']} of {report['rows']} rows are refused, more than the "
            f"share of {max_refused}: {why}; fix them or the schema, or raise max_refused"
        )
