"""The SQL for the columns of each section of a schema, and the conditions that refuse its rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ifa_torchrec.data.prepare.columns import IdColumn, ListColumn, Listed, Npy, Regression, column_of
from ifa_torchrec.data.prepare.schema import (
    ITEM,
    NAME,
    Events,
    Items,
    JoinedLabel,
    PrepareSchema,
    Rows,
    Table,
    Users,
)
from ifa_torchrec.data.prepare.sql import literal, quoted, timestamp
from ifa_torchrec.data.schema import EXPOSED, TIME, USER

# SQL with {0} for the value in the file.
# An id as text. A float becomes its integer, since integers with nulls are often floats in Parquet; an
# empty text becomes null, as in CSV.
_WHOLE = r"regexp_replace({}, '\.0$', '')"
_TEXT = f"""nullif(CASE WHEN typeof({{0}}) IN ('DOUBLE', 'FLOAT')
    THEN {_WHOLE.format("CAST({0} AS VARCHAR)")} ELSE CAST({{0}} AS VARCHAR) END, '')"""
_TEXTS = f"""[nullif(CASE WHEN regexp_matches(typeof({{0}}), '^(DOUBLE|FLOAT)')
    THEN {_WHOLE.format("_e")} ELSE _e END, '') for _e in TRY(CAST({{0}} AS VARCHAR[]))]"""
_NUMBER = "TRY(CAST({0} AS FLOAT))"
_VECTOR = "TRY(CAST({0} AS FLOAT[]))"
# DuckDB would round a row number such as 1.6
_ROW = """CASE WHEN TRY(CAST({0} AS DOUBLE)) = trunc(TRY(CAST({0} AS DOUBLE)))
    THEN TRY(CAST({0} AS BIGINT)) END"""
# 0 and 1, or another form of false and true
_LABEL = "coalesce(TRY(CAST({0} AS FLOAT)), TRY(CAST(CAST({0} AS BOOLEAN) AS FLOAT)))"
_BOOLEAN = f"CASE {_LABEL} WHEN 0 THEN false WHEN 1 THEN true END"  # null for any other number
# The id of a user or an item. A float that is NaN, or so large that it cannot hold all integers, would
# merge many users or items into one.
_ID = f"""CASE WHEN abs(CASE typeof({{0}}) WHEN 'DOUBLE' THEN TRY_CAST({{0}} AS DOUBLE)
    WHEN 'FLOAT' THEN TRY_CAST({{0}} AS DOUBLE) * 536870912 END) >= 9007199254740992 THEN NULL
    ELSE {_TEXT} END"""
_INEXACT = "is a float in which ids are not exact; write ids as integers or text"

AT, POSITION, LENGTH = "_at", "_position", "_length"
"""For a row made from a list element: the list's row, the element's position, the list's length."""


@dataclass(frozen=True)
class Section:
    """A table to read.

    Args:
        name: the name of the section and of its tables.
        files: the files of its rows.
        columns: for each output column, the schema's column and the SQL that converts it.
        checks: SQL conditions under which a row is refused, and the reasons.
        derived: further output columns, as SQL on the others.
        scratch: the output columns that are only needed for derived ones.

    Example:
        >>> from ifa_torchrec.data.prepare.schema import Items
        >>> from ifa_torchrec.data.prepare.sections import Section
        >>> items = Items(files="items.csv", item="id")
        >>> Section("items", items, {"item": ("id", "{0}")}, {}).where is None
        True
    """

    name: str
    files: Table
    columns: Mapping[str, tuple[str, str]]
    checks: Mapping[str, str]
    derived: Mapping[str, str] = field(default_factory=dict)
    scratch: tuple[str, ...] = ()

    @property
    def where(self) -> str | None:
        """The schema's condition for the rows to use; None for all."""
        return self.files.where if isinstance(self.files, Rows) else None

    @property
    def each(self) -> Mapping[str, ListColumn]:
        """The lists whose elements become rows."""
        return self.files.each if isinstance(self.files, Rows) else {}


def list_in_sql(column: ListColumn) -> str:
    """SQL that converts the value in the file, {0}, to a list of texts.

    Example:
        >>> import duckdb
        >>> from ifa_torchrec.data.prepare.columns import Listed
        >>> from ifa_torchrec.data.prepare.sections import list_in_sql
        >>> text = list_in_sql(Listed("genres", delimiter="|")).format("'a| b|'")
        >>> duckdb.sql(f"SELECT {text}").fetchall()
        [(['a', 'b'],)]
    """
    delimiter = column.delimiter if isinstance(column, Listed) else None
    if delimiter is None:
        return _TEXTS
    cut = literal(delimiter).replace("{", "{{").replace("}", "}}")
    return f"[trim(_e) for _e in string_split(CAST({{0}} AS VARCHAR), {cut}) if trim(_e) <> '']"


def items_section(items: Items, log_scaled: Iterable[str]) -> Section:
    """The section of the items. The column of an Npy has the row in its array, or null if the array is
    in the order of the table.

    Example:
        >>> from ifa_torchrec.data.prepare.schema import Items
        >>> from ifa_torchrec.data.prepare.sections import items_section
        >>> list(items_section(Items(files="items.csv", item="id", dense={"price": "eur"}), ()).columns)
        ['item', 'name', 'price']
    """
    wanted = _Wanted(log_scaled)
    wanted.ids(items.features)
    wanted.lists(items.lists)
    wanted.numbers(items.dense)
    for name, column in items.vectors.items():
        n = quoted(name)
        if isinstance(column, Npy):
            wanted.columns[name] = (column.row or "NULL", _ROW)
            if column.row is not None:
                wanted.checks[f"_given.{n} IS NOT NULL AND {n} IS NULL"] = f"{name} is not a row number"
        else:
            wanted.columns[name] = (column, _VECTOR)
            wanted.checks[f"_given.{n} IS NOT NULL AND {n} IS NULL"] = f"{name} is not a list of numbers"
            bad = f"len([_e for _e in {n} if NOT coalesce(isfinite(_e), false)]) > 0"
            wanted.checks[bad] = f"{name} has a missing, NaN or infinite number"
    columns = {ITEM: (items.item, _ID), NAME: (items.name or items.item, _TEXT), **wanted.columns}
    return Section("items", items, columns, _checks_of_id(ITEM) | wanted.checks)


def users_section(users: Users, log_scaled: Iterable[str]) -> Section:
    """The section of the users.

    Example:
        >>> from ifa_torchrec.data.prepare.schema import Users
        >>> from ifa_torchrec.data.prepare.sections import users_section
        >>> list(users_section(Users(files="u.csv", user="id", dense={"age": "age"}), ()).columns)
        ['user', 'age']
    """
    wanted = _Wanted(log_scaled)
    wanted.ids(users.features)
    wanted.lists(users.lists)
    wanted.numbers(users.dense)
    columns = {USER: (users.user, _ID), **wanted.columns}
    return Section("users", users, columns, _checks_of_id(USER) | wanted.checks)


def events_section(events: Events, log_scaled: Iterable[str]) -> Section:
    """The section of the events; events of histories without times have none yet.

    Example:
        >>> from ifa_torchrec.data.prepare.schema import Events
        >>> from ifa_torchrec.data.prepare.sections import events_section
        >>> events = Events(files="e.csv", user="u", item="i", time="t", features={"action": "kind"})
        >>> list(events_section(events, ()).columns)
        ['user', 'item', 'time', 'action']
    """
    wanted = _Wanted(log_scaled)
    wanted.ids(events.features)
    wanted.numbers(events.dense)
    if events.weight is not None:
        wanted.columns["weight"] = (events.weight, _NUMBER)
        wrong = "NOT coalesce(isfinite(weight) AND weight >= 0, false)"
        wanted.checks[wrong] = "weight is not a finite number of at least 0"
    if events.time is None:
        wanted.columns |= {name: (name, _ROW) for name in (AT, POSITION, LENGTH)}
    return _rows("events", events, wanted, _checks_of_id(USER, ITEM))


def label_section(number: int, label: JoinedLabel) -> Section:
    """The section of a joined label, named by its number.

    Example:
        >>> from ifa_torchrec.data.prepare import JoinedLabel
        >>> from ifa_torchrec.data.prepare.sections import label_section
        >>> label_section(0, JoinedLabel(files="b.csv", user="u", item="i", time="t",
        ...                              within_seconds=60)).name
        'label_0'
    """
    return _rows(f"label_{number}", label, _Wanted(()), _checks_of_id(USER, ITEM))


def requests_section(schema: PrepareSchema) -> Section:
    """The section of the candidates; joined labels are added later.

    Example:
        >>> from ifa_torchrec.data.prepare.schema import Events, PrepareSchema, Requests
        >>> from ifa_torchrec.data.prepare.sections import requests_section
        >>> rows = dict(files="log.csv", user="u", item="i", time="t")
        >>> schema = PrepareSchema(events=Events(**rows), splits={},
        ...                        requests=Requests(**rows, labels={"click": "clicked"}))
        >>> list(requests_section(schema).columns)
        ['user', 'item', 'time', '_request', 'exposed', 'click']
    """
    requests = schema.requests
    wanted = _Wanted(schema.log_scaled)
    column = requests.request or (AT if requests.each else None)
    wanted.columns["_request"] = ("''", "{0}") if column is None else (column, _TEXT)
    wanted.columns[EXPOSED] = (requests.exposed or "true", _BOOLEAN)
    if requests.each:
        wanted.columns[AT] = (AT, _ROW)
    wanted.checks |= {"_request IS NULL": "request is empty", "exposed IS NULL": "exposed is not 0 or 1"}
    derived: dict[str, str] = {}
    scratch: list[str] = []
    for task, label in requests.labels.items():
        t = quoted(task)
        if isinstance(label, Listed):
            scratch.append(f"_clicked_{task}")
            wanted.columns[scratch[-1]] = (label.column, list_in_sql(label))
            wanted.check_list(scratch[-1], f"label {task}")
            clicked = quoted(scratch[-1])
            derived[task] = f"CAST(coalesce(list_contains({clicked}, item), false) AS FLOAT)"
            derived[f"_listed_{task}"] = f"coalesce(len({clicked}), 0)"
        elif not isinstance(label, JoinedLabel):
            number = isinstance(label, Regression)
            wanted.columns[task] = (label.regression, _NUMBER) if number else (label, _LABEL)
            unknown = f"_given.{t} IS NULL AND NOT exposed"
            known = f"isfinite({t})" if number else f"{t} IN (0, 1)"
            why = "a number" if number else "0 or 1"
            wanted.checks[f"NOT ({unknown} OR coalesce({known}, false))"] = f"label {task} is not {why}"
            wanted.check_log(task)
    for ids in (requests.context, requests.candidate_features):
        wanted.ids(ids)
    wanted.lists(requests.context_lists)
    for numbers in (requests.dense, requests.candidate_dense):
        wanted.numbers(numbers)
    # a row without a user has no history, and only `request` says which rows belong together
    checks = _checks_of_id(ITEM)
    checks[f"_given.user IS NOT NULL AND {quoted(USER)} IS NULL"] = f"user {_INEXACT}"
    if not (requests.request or requests.each):
        checks["_given.user IS NULL"] = "user is empty; set `request` if a request may have no user"
    return _rows("requests", requests, wanted, checks, derived, tuple(scratch))


class _Wanted:
    """Collects the columns and checks of a section."""

    def __init__(self, log_scaled: Iterable[str]) -> None:
        self.log_scaled = set(log_scaled)
        self.columns: dict[str, tuple[str, str]] = {}
        self.checks: dict[str, str] = {}

    def ids(self, features: Mapping[str, IdColumn]) -> None:
        self.columns |= {name: (column_of(column), _TEXT) for name, column in features.items()}

    def lists(self, features: Mapping[str, ListColumn]) -> None:
        for name, column in features.items():
            self.columns[name] = (column_of(column), list_in_sql(column))
            self.check_list(name, name)

    def check_list(self, name: str, label: str) -> None:
        n = quoted(name)
        remedy = f"{label} is not a list; if it is text, set its `delimiter`"
        self.checks[f"_given.{n} IS NOT NULL AND {n} IS NULL"] = remedy
        self.checks[f"len([_e for _e in {n} if _e IS NULL]) > 0"] = f"{label} has an empty id"

    def numbers(self, columns: Mapping[str, str]) -> None:
        for name, column in columns.items():
            self.columns[name] = (column, _NUMBER)
            bad = f"_given.{quoted(name)} IS NOT NULL AND NOT coalesce(isfinite({quoted(name)}), false)"
            self.checks[bad] = f"{name} is not a finite number; leave it empty if it is missing"
            self.check_log(name)

    def check_log(self, name: str) -> None:
        if name in self.log_scaled:
            self.checks[f"coalesce({quoted(name)} < 0, false)"] = (
                f"{name} is negative, but in log_scaled"
            )


def _rows(
    name: str,
    rows: Rows,
    wanted: _Wanted,
    checks: Mapping[str, str],
    derived: Mapping[str, str] | None = None,
    scratch: tuple[str, ...] = (),
) -> Section:
    """A section of rows with a user, an item and a time, and further columns and checks."""
    columns = {USER: (rows.user, _ID), ITEM: (column_of(rows.item), _ID)}
    if rows.time is not None:
        unit = f"a number in {rows.unit}" if rows.unit else "a timestamp; set `unit` if it is a number"
        unit += " (a 32-bit float is minutes off)" if rows.unit else ""
        columns[TIME] = (rows.time, timestamp("{0}", rows.unit))
        checks = {
            **checks,
            "_given.time IS NULL": "time is empty",
            "time IS NULL": f"time cannot be read as {unit}",
            # An epoch number in the wrong unit becomes a date in 1970 or in the year 54000.
            "year(time) NOT BETWEEN 1971 AND 2200": "time is not in 1971 to 2200; check `unit`",
        }
    columns |= wanted.columns
    return Section(name, rows, columns, {**checks, **wanted.checks}, derived or {}, scratch)


def _checks_of_id(*names: str) -> dict[str, str]:
    empty = {f"_given.{quoted(name)} IS NULL": f"{name} is empty" for name in names}
    return empty | {f"{quoted(name)} IS NULL": f"{name} {_INEXACT}" for name in names}
