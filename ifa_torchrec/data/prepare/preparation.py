"""Any log as an event log: CSV, Parquet or Feather files, described by a short schema.

DuckDB (extra `data`) reads, sorts and writes, on disk where memory runs out. The rules:

- Ids of any type become rows of a table, 0, 1, 2, ... in the order of the ids; of a feature, row 0 is
  left for "unknown". LOG/codes/NAME.parquet has each id (as text) and its row, for who serves.
  An id space that grows may be hashed instead, to a fixed number of rows: ``hash_row``.
- Rows of the requests' file are candidates. Those of one user with the same `request` are one
  request; or, without such a column, those that follow each other within `gap_seconds`. It is dated at
  its first row, so nothing of the request is in its own history. Where rows disagree on a context or
  dense column, the least value is taken.
- A row that cannot be used is refused: counted and shown in LOG/report.json, with the reason.
- A time without a zone is UTC.

- A join that finds nothing is an error: requests of which no user has an event, a label that no
  candidate gets, descriptions of users of whom there is none.

The report's `positives_in_last_second` is the share of positives whose item the user's history holds
within the second before the request. It should be next to nothing: more says that events are the
positives themselves, written a moment before the request, and that the log leaks its labels. Where the
events' clock is behind or in another zone, or they have dates alone, `positives_in_last_day` tells.
Repeated purchases are no leak; they are as frequent in `positives_in_next_day`, from the request on.
`warnings` has in words what somebody should look at.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ifa_torchrec.data.event_log import EventLog
from ifa_torchrec.data.files import drafting
from ifa_torchrec.data.prepare import report as prepare_report
from ifa_torchrec.data.prepare.files import Source
from ifa_torchrec.data.prepare.schema import (
    ITEM,
    NAME,
    UNITS,
    Events,
    Hashed,
    JoinedLabel,
    PrepareSchema,
    Table,
)
from ifa_torchrec.data.schema import (
    CANDIDATES,
    EXPOSED,
    HASHED,
    TIME,
    USER,
    LogError,
    LogSchema,
    check_splits,
)

if TYPE_CHECKING:
    import duckdb

_REQUESTS_AT_ONCE = 200_000  # lists are built in memory, for so many requests at a time
_EXAMPLES = 3
# An id as text. A float that is not a number, or so large that integers beside it are the same float,
# would be many users or items in one.
_ID = """CASE WHEN abs(CASE typeof({0}) WHEN 'DOUBLE' THEN TRY_CAST({0} AS DOUBLE)
    WHEN 'FLOAT' THEN TRY_CAST({0} AS DOUBLE) * 536870912 END) >= 9007199254740992 THEN NULL
    ELSE CAST({0} AS VARCHAR) END"""
_INEXACT = "is a float in which ids are not exact; write them as integers or text"


def hash_row(identifier: str, rows: int) -> int:
    """Row of a hashed item, 0 to rows - 1; that of a hashed feature is 1 + hash_row(id, rows - 1).

    Args:
        identifier: the id, as text.
        rows: number of rows.

    Raises:
        ValueError: rows is less than 1.

    Example:
        >>> from ifa_torchrec.data.prepare.preparation import hash_row
        >>> hash_row("a", 1000)
        362
    """
    if rows < 1:
        raise ValueError(f"rows must be at least 1, got {rows}")
    return int(hashlib.md5(identifier.encode()).hexdigest()[:15], 16) % rows


def prepare(
    schema: PrepareSchema, out: str | Path, memory: str = "4GB", max_refused: float = 0.01
) -> EventLog:
    r"""Write the event log of a schema, with its report (report.json) and its ids (codes/).

    Args:
        schema: where the rows are and what they mean.
        out: folder of the log; it does not exist yet.
        memory: what DuckDB may take before it goes on on disk, beside ``out``. Opening the log takes
            8 bytes for each number of a table at a time, once.
        max_refused: greatest share of a table's rows that may be refused.

    Raises:
        LogError: a file or column is missing, too many rows are refused, a join finds nothing, a split
            is empty, or ``memory`` is too little.
        FileExistsError: ``out`` exists.
        ImportError: DuckDB is not installed.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from ifa_torchrec.data.prepare.preparation import prepare
        >>> from ifa_torchrec.data.prepare.schema import Events, PrepareSchema, Requests
        >>> folder = Path(tempfile.mkdtemp())
        >>> lines = ["who,what,when,clicked", "ann,tea,2024-05-01 10:00:00,1",
        ...          "ann,cup,2024-05-01 10:00:00,0", "ann,cup,2024-05-02 10:00:00,1"]
        >>> _ = (folder / "log.csv").write_text("\n".join(lines))
        >>> rows = dict(files=str(folder / "log.csv"), user="who", item="what", time="when")
        >>> log = prepare(PrepareSchema(events=Events(**rows, where="clicked = 1"),
        ...                             requests=Requests(**rows, labels={"click": "clicked"}),
        ...                             splits={"test": "2024-05-02"}), folder / "log")
        >>> log.item_names(), log.requests("train")["candidates"].tolist()
        (['cup', 'tea'], [0, 1])
    """
    try:
        import duckdb
    except ImportError as error:
        raise ImportError("preparing a log needs DuckDB: install the extra `data`") from error
    if not 0 <= max_refused <= 1:
        raise LogError(f"max_refused must be a share from 0 to 1, got {max_refused!r}")
    with drafting(out) as draft:
        # beside the log, where there must be room for it anyway
        work = draft / "work"
        work.mkdir()
        with duckdb.connect(work / "tables.duckdb") as connection:
            connection.execute("SET TimeZone = 'UTC'")
            try:
                connection.execute(f"SET memory_limit = {_text(memory)}")
            except duckdb.Error as error:
                raise LogError(f"memory={memory!r} is no size, such as '4GB': {error}") from error
            try:
                log_schema, splits, report = _Preparation(schema, connection, draft, max_refused).run()
            except duckdb.OutOfMemoryException as error:
                raise LogError(f"memory={memory!r} is too little for this log: {error}") from error
            except duckdb.Error as error:
                raise LogError(f"the schema does not fit its files: {error}") from error
        shutil.rmtree(work)
        (draft / "report.json").write_text(json.dumps(report, indent=2))
        return EventLog.publish(draft, out, log_schema, splits)


def _name(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


def _column(column: str | Hashed) -> str:
    return column.column if isinstance(column, Hashed) else column


def _hash(column: str | Hashed) -> int | None:
    return column.hash if isinstance(column, Hashed) else None


def _time(sql: str, unit: str | None) -> str:
    if unit is None:
        return f"TRY(CAST({sql} AS TIMESTAMPTZ) AT TIME ZONE 'UTC')"
    return f"TRY(make_timestamp(CAST(CAST({sql} AS DECIMAL(24, 6)) * {UNITS[unit]} AS BIGINT)))"


def _interval(seconds: float) -> str:
    return f"to_microseconds({round(seconds * 1e6)})"


class _Preparation:
    """Tables of DuckDB, one step after the other; columns of ours that are no features start with _."""

    def __init__(
        self,
        schema: PrepareSchema,
        connection: duckdb.DuckDBPyConnection,
        draft: Path,
        max_refused: float,
    ) -> None:
        self.schema, self.sql, self.draft, self.max_refused = schema, connection, draft, max_refused
        self.item_features = schema.items.features if schema.items else {}
        self.user_features = schema.users.features if schema.users else {}
        self.context = {**schema.requests.context, **self.user_features}
        self.refused: dict[str, Any] = {}
        self.codes: dict[str, dict[str, Any]] = {}
        (draft / "codes").mkdir()

    def run(self) -> tuple[LogSchema, list[str], dict[str, Any]]:
        self.log_schema(lambda feature: 1)  # names that cannot work are refused before the long part
        check_splits(self.schema.splits)
        self.read_items()
        self.read_rows("events", self.schema.events, {}, {})
        self.read_requests()
        self.read_users()
        self.joins = prepare_report.joins(self.sql, self.schema)
        self.make_codes()
        self.write_items()
        self.write_events()
        splits = self.write_requests()
        schema = self.log_schema(lambda feature: self.codes[feature]["rows"])
        return schema, list(splits), self.report(splits)

    def log_schema(self, rows: Callable[[str], int]) -> LogSchema:
        requests = self.schema.requests
        return LogSchema(
            item_features={feature: rows(feature) for feature in (ITEM, *self.item_features)},
            context_features={feature: rows(feature) for feature in self.context},
            dense_features=tuple(requests.dense),
            candidate_dense=tuple(requests.candidate_dense),
            tasks=tuple(requests.labels),
        )

    # ---------------------------------------------------------------- reading

    def read(
        self,
        section: str,
        table: Table,
        columns: Mapping[str, tuple[str, str]],
        checks: Mapping[str, str],
        where: str | None = None,
    ) -> None:
        """Make a table of a section's rows, those refused apart.

        Args:
            columns: for each column of the table, the schema's column and, with {} in its place, the SQL
                that makes ours of it.
            checks: SQL conditions under which a row is refused, and why (SQL as well).
        """
        source = Source(section, table, self.sql)
        there = source.columns

        def given(column: str) -> str:
            return f"TRY({_name(there[column]) if column in there else f'({column})'})"

        ours = [f"{sql.format(given(column))} AS {_name(c)}" for c, (column, sql) in columns.items()]
        texts = [f"{_name(c)} := CAST({given(column)} AS VARCHAR)" for c, (column, _) in columns.items()]
        wanted = f"TRY(CAST({given(where)} AS BOOLEAN))" if where else "true"
        checks = {"NOT _wanted IS TRUE": "'`where` cannot be told'", **checks}
        reasons = " ".join(f"WHEN {condition} THEN {reason}" for condition, reason in checks.items())
        with source.reading():
            self.sql.execute(
                f"""CREATE TABLE {section}_read AS
                SELECT * EXCLUDE (_given, _wanted),
                       CASE WHEN _refused IS NOT NULL THEN _given END AS _given
                FROM (SELECT *, CASE {reasons} END AS _refused
                      FROM (SELECT {", ".join(ours)}, struct_pack({", ".join(texts)}) AS _given,
                                   {wanted} AS _wanted FROM {source.relation})
                      WHERE _wanted IS DISTINCT FROM false)"""
            )
        self.sql.execute(f"CREATE VIEW {section}_rows AS FROM {section}_read WHERE _refused IS NULL")
        self.refuse(section, source.refused)

    def refuse(self, section: str, lines: dict[str, dict[str, Any]]) -> None:
        """Count a section's refused rows, and fail if they are too many."""
        rows = self.number(f"SELECT count(*) FROM {section}_read")
        rows += sum(reason["rows"] for reason in lines.values())
        reasons = dict(lines)
        refused = f"SELECT _refused AS why, CAST(_given AS VARCHAR) AS row FROM {section}_read"
        for why, count, examples in self.sql.execute(
            f"SELECT why, count(*), min(row, {_EXAMPLES}) FROM ({refused}) "
            "WHERE why IS NOT NULL GROUP BY why ORDER BY why"
        ).fetchall():
            reasons[why] = {"rows": count, "examples": examples}
        reasons = dict(sorted(reasons.items(), key=lambda reason: -reason[1]["rows"]))
        count = sum(reason["rows"] for reason in reasons.values())
        self.refused[section] = {"rows": rows, "refused": count, "reasons": reasons}
        if count > self.max_refused * rows:
            told = "; ".join(
                f"{why} ({reason['rows']} rows, as {reason['examples'][0]})"
                for why, reason in reasons.items()
            )
            raise LogError(
                f"{section}: {count} of {rows} rows are refused, above the share of {self.max_refused}: "
                f"{told}; repair them or the schema, or allow more with max_refused"
            )

    def read_rows(
        self,
        section: str,
        table: Events,
        columns: Mapping[str, tuple[str, str]],
        checks: Mapping[str, str],
    ) -> None:
        whole = {USER: (table.user, _ID), ITEM: (_column(table.item), _ID)}
        whole[TIME] = (table.time, _time("{}", table.unit))
        wanted = f"a number in {table.unit}" if table.unit else "a timestamp; give numbers a unit"
        empty = {f"_given.{_name(c)} IS NULL": f"'{c} is empty'" for c in (USER, ITEM)}
        empty |= {f"{_name(c)} IS NULL": f"'{c} {_INEXACT}'" for c in (USER, ITEM)}
        empty |= {"_given.time IS NULL": "'time is empty'"}
        empty |= {"time IS NULL": f"'time cannot be read as {wanted}'"}
        # An epoch number in the wrong unit ends in 1970 or in the year 54000.
        wrong = "'time is not of 1971 to 2200: is the unit right?'"
        empty |= {"year(time) NOT BETWEEN 1971 AND 2200": wrong}
        if self.schema.items:
            # where the items are the log itself, a join with all its rows takes far more memory
            known = "SELECT DISTINCT item FROM items_rows"
            empty |= {f"item NOT IN ({known})": "'item is not among the items'"}
        self.read(section, table, {**whole, **columns}, {**empty, **checks}, table.where)

    def read_items(self) -> None:
        if self.schema.items:
            items, text = self.schema.items, "CAST({} AS VARCHAR)"
            columns = {ITEM: (items.item, _ID), NAME: (items.name or items.item, text)}
            columns |= {f: (_column(column), text) for f, column in items.features.items()}
            checks = {"_given.item IS NULL": "'item is empty'", "item IS NULL": f"'item {_INEXACT}'"}
            self.read("items", items, columns, checks)

    def read_users(self) -> None:
        if self.schema.users:
            users, text = self.schema.users, "CAST({} AS VARCHAR)"
            columns = {USER: (users.user, _ID)}
            columns |= {f: (_column(column), text) for f, column in users.features.items()}
            user = _name(USER)
            checks = {
                f"_given.{user} IS NULL": "'user is empty'",
                f"{user} IS NULL": f"'user {_INEXACT}'",
            }
            self.read("users", users, columns, checks)

    def read_requests(self) -> None:
        requests = self.schema.requests
        columns = {"_request": (requests.request or "''", "CAST({} AS VARCHAR)")}
        columns[EXPOSED] = (requests.exposed or "true", "TRY(CAST({} AS BOOLEAN))")
        checks = {"_request IS NULL": "'request is empty'", "exposed IS NULL": "'exposed is not 0 or 1'"}
        joined = {}
        for task, label in requests.labels.items():
            if isinstance(label, JoinedLabel):
                joined[task] = label
                continue
            # 0 and 1, or what else stands for false and true
            columns[task] = (
                label,
                "coalesce(TRY(CAST({0} AS FLOAT)), TRY(CAST(CAST({0} AS BOOLEAN) AS FLOAT)))",
            )
            unknown = f"_given.{_name(task)} IS NULL AND NOT exposed"
            checks[f"NOT ({unknown} OR coalesce({_name(task)} IN (0, 1), false))"] = _text(
                f"label {task} is not 0 or 1"
            )
        for feature, column in requests.context.items():
            columns[feature] = (_column(column), "CAST({} AS VARCHAR)")
        for feature, column in {**requests.dense, **requests.candidate_dense}.items():
            columns[feature] = (column, "TRY(CAST({} AS FLOAT))")
            reason = _text(f"{feature} is not a number")
            checks[f"NOT coalesce(isfinite({_name(feature)}), false)"] = reason
        self.read_rows("requests", requests, columns, checks)
        for number, (task, label) in enumerate(joined.items()):
            section = f"label_{number}"
            self.read_rows(section, label, {}, {})
            self.sql.execute(
                f"""ALTER TABLE requests_read ADD COLUMN {_name(task)} FLOAT DEFAULT 0;
                UPDATE requests_read r SET {_name(task)} = 1 FROM {section}_rows l
                WHERE l."user" = r."user" AND l.item = r.item
                AND l.time BETWEEN r.time AND r.time + {_interval(label.within_seconds)}"""
            )

    # ---------------------------------------------------------------- ids

    def make_codes(self) -> None:
        both = "SELECT {0} AS id FROM events_rows UNION SELECT {0} FROM requests_rows"
        self.code(USER, both.format(_name(USER)), None, first=0)
        items = "SELECT item AS id FROM items_rows" if self.schema.items else both.format(ITEM)
        self.code(ITEM, items, _hash(self.schema.events.item), first=0)
        sections = {"items": self.item_features, "users": self.user_features}
        sections["requests"] = self.schema.requests.context
        for section, features in sections.items():
            for feature, column in features.items():
                ids = f"SELECT {_name(feature)} AS id FROM {section}_rows"
                self.code(feature, ids, _hash(column), first=1)

    def code(self, name: str, ids: str, hashed: int | None, first: int) -> None:
        """Make the table of a name's ids and their rows; rows below ``first`` are for the unknown."""
        row = f"{first} + row_number() OVER () - 1"
        if hashed:
            row = f"{first} + CAST('0x' || md5(id)[:15] AS BIGINT) % {hashed - first}"
        table = _name(f"codes_{name}")
        self.sql.execute(
            f"""CREATE TABLE {table} AS SELECT id, {row} AS code FROM (
                SELECT DISTINCT id FROM ({ids}) WHERE id IS NOT NULL
                ORDER BY TRY_CAST(id AS BIGINT), id)"""
        )
        # of a hash there is no list: other logs have other ids of the same meaning
        kind = f", KV_METADATA {{{HASHED}: '{hashed}'}}" if hashed else ""
        self.copy(f"SELECT id, code FROM {table}", f"codes/{name}.parquet", kind)
        count = self.number(f"SELECT count(*) FROM {table}")
        shared = self.number(
            f"SELECT count(*) FROM {table} WHERE code IN "
            f"(SELECT code FROM {table} GROUP BY code HAVING count(*) > 1)"
        )
        self.codes[name] = {"ids": count, "rows": hashed or first + count}
        if hashed:
            self.codes[name]["ids_that_share_a_row"] = shared / max(count, 1)

    def coded(self, features: Sequence[str], table: str) -> tuple[str, str]:
        """What to select, and the joins, to have the rows of a table's features in place of ids."""
        select = "".join(f", coalesce(c{n}.code, 0) AS {_name(f)}" for n, f in enumerate(features))
        joins = " ".join(
            f"LEFT JOIN {_name(f'codes_{f}')} c{n} ON c{n}.id = {table}.{_name(f)}"
            for n, f in enumerate(features)
        )
        return select, joins

    # ---------------------------------------------------------------- writing

    def write_items(self) -> None:
        known = "items_rows" if self.schema.items else "(SELECT id AS item, id AS name FROM codes_item)"
        select, joins = self.coded(list(self.item_features), "known")
        greatest = "".join(f", coalesce(max({_name(f)}), 0) AS {_name(f)}" for f in self.item_features)
        self.copy(
            f"""WITH described AS (SELECT i.code AS item, known.name {select}
                FROM {known} known JOIN codes_item i ON i.id = known.item {joins})
            SELECT _item AS item {greatest}, coalesce(max(name), '') AS name
            FROM range({self.codes[ITEM]["rows"]}) r(_item) LEFT JOIN described ON item = _item
            GROUP BY _item ORDER BY _item""",
            "items.parquet",
        )

    def write_events(self) -> None:
        self.sql.execute(
            """CREATE TABLE events AS SELECT u.code AS "user", time, i.code AS item FROM events_rows e
            JOIN codes_user u ON u.id = e."user" JOIN codes_item i ON i.id = e.item"""
        )
        self.copy('FROM events ORDER BY "user", time, item', "events.parquet")

    def write_requests(self) -> dict[str, tuple[int, int]]:
        """Group the candidates to requests, numbered by time, and write each split.

        Returns:
            The numbers of each split's requests, as the first and the one behind the last.
        """
        requests = self.schema.requests
        each = [EXPOSED, *requests.labels, *requests.candidate_dense]
        # the label of who was not shown may be unknown, and stands as 0
        numbers = "".join(
            f", coalesce(r.{_name(c)}, 0) AS {_name(c)}" for c in [*each[1:], *requests.dense]
        )
        select, joins = self.coded(list(self.context), "r")
        self.sql.execute(
            f"""CREATE TABLE candidates AS
            SELECT u.code AS "user", r._request, r.time, i.code AS item, r.exposed {select} {numbers}
            FROM {self.with_users()} r JOIN codes_user u ON u.id = r."user"
            JOIN codes_item i ON i.id = r.item {joins}"""
        )
        gap = requests.gap_seconds
        if gap is None and not requests.request:
            gap = 0
        late = "false" if gap is None else f"time - lag(time) OVER earlier > {_interval(gap)}"
        shared = "".join(f", min({_name(c)}) AS {_name(c)}" for c in [*self.context, *requests.dense])
        row = "".join(f", {_name(c)} := {_name(c)}" for c in each)
        self.sql.execute(
            f"""CREATE TABLE sittings AS
            SELECT *, sum(_late) OVER (PARTITION BY "user", _request ORDER BY time) AS _sitting
            FROM (SELECT *, CAST(coalesce({late}, false) AS INTEGER) AS _late FROM candidates
                  WINDOW earlier AS (PARTITION BY "user", _request ORDER BY time));

            CREATE TABLE requests AS SELECT row_number() OVER () - 1 AS _number, * FROM (
                SELECT "user", _request, _sitting, min(time) AS time {shared} FROM sittings
                GROUP BY "user", _request, _sitting ORDER BY time, "user", _request, _sitting);

            CREATE TABLE numbered AS
            SELECT _number, struct_pack(item := item {row}) AS _row
            FROM sittings JOIN requests USING ("user", _request, _sitting) ORDER BY _number"""
        )
        splits, first_cut = self.splits()
        if requests.negatives:
            self.draw_negatives(first_cut)
        columns = "".join(f", {_name(c)}" for c in [*self.context, *requests.dense])
        lists = "".join(f", [_one.{_name(c)} for _one in _rows] AS {_name(c)}" for c in each)
        for split, (first, behind) in splits.items():
            for start in range(first, behind, _REQUESTS_AT_ONCE):
                mine = f"_number BETWEEN {start} AND {min(start + _REQUESTS_AT_ONCE, behind) - 1}"
                self.sql.execute(
                    f"""{"CREATE TABLE written AS" if start == first else "INSERT INTO written"}
                    SELECT "user", time {columns}, [_one.item for _one in _rows] AS {CANDIDATES} {lists}
                    FROM (FROM requests WHERE {mine}) JOIN (
                        SELECT _number, list_sort(list(_row)) AS _rows FROM numbered
                        WHERE {mine} GROUP BY _number) USING (_number)
                    ORDER BY _number"""
                )
            self.copy("FROM written", f"requests/{split}.parquet")
            self.sql.execute("DROP TABLE written")
        return splits

    def with_users(self) -> str:
        """What to select the requests from, with the users' features."""
        if not self.schema.users:
            return "requests_rows"
        greatest = "".join(f", max({_name(f)}) AS {_name(f)}" for f in self.user_features)
        return f"""(FROM requests_rows LEFT JOIN (
            SELECT "user" {greatest} FROM users_rows GROUP BY "user") USING ("user"))"""

    def draw_negatives(self, first_cut: str | None) -> None:
        """Draw candidates from the events before ``first_cut`` (SQL; None for all events)."""
        requests = self.schema.requests
        before = f"time < {first_cut}" if first_cut else "true"
        self.sql.execute(
            f"""CREATE TABLE drawable AS
            SELECT item, CAST(sum(events) OVER (ORDER BY item) AS BIGINT) AS _behind
            FROM (SELECT item, count(*) AS events FROM events WHERE {before} GROUP BY item)"""
        )
        events = self.number("SELECT max(_behind) FROM drawable")
        if not events:
            raise LogError(
                "requests: negatives are drawn from the events before the first split, and there are "
                "none; let it start later, or leave negatives out"
            )
        # a draw is the number of an event, counted item by item
        draw = f"CAST('0x' || md5(_number || ' ' || _draw)[:15] AS BIGINT) % {events}"
        zeros = "".join(f", {_name(task)} := 0::FLOAT" for task in requests.labels)
        self.sql.execute(
            f"""CREATE TABLE drawn AS SELECT DISTINCT d._number, item
            FROM (SELECT _number, {draw} AS _event
                  FROM (SELECT _number, unnest(range(count(*) * {requests.negatives})) AS _draw
                        FROM numbered WHERE {self.positive} GROUP BY _number)) d
            ASOF JOIN drawable ON _event < _behind
            ANTI JOIN numbered n ON n._number = d._number AND n._row.item = item;

            INSERT INTO numbered SELECT _number, struct_pack(item := item, {EXPOSED} := true {zeros})
            FROM drawn ORDER BY _number"""
        )

    @property
    def positive(self) -> str:
        """Whether a row of `numbered` has a label of 1, in SQL."""
        return "(" + " OR ".join(f"_row.{_name(task)} = 1" for task in self.schema.requests.labels) + ")"

    def splits(self) -> tuple[dict[str, tuple[int, int]], str | None]:
        """The numbers of each split's requests, and when the first split starts, in SQL."""
        count = self.number("SELECT count(*) FROM requests")
        bounds, first_cut = [0], None
        for split, start in self.schema.splits.items():
            if split == "train":
                raise LogError("splits: 'train' is what comes before the first split; leave it out")
            if isinstance(start, str):
                cut = _time(_text(start), None)
                if self.sql.execute(f"SELECT {cut}").fetchall() == [(None,)]:
                    raise LogError(f"splits: {split!r} starts at {start!r}, which is no timestamp")
            else:
                cut = f"(SELECT time FROM requests WHERE _number = {int(start * count)})"
            bounds.append(self.number(f"SELECT count(*) FROM requests WHERE time < {cut}"))
            first_cut = first_cut or cut
        splits = dict(zip(["train", *self.schema.splits], pairwise([*bounds, count]), strict=True))
        for split, (first, behind) in splits.items():
            if first >= behind:
                times = self.row("SELECT min(time), max(time) FROM requests")
                raise LogError(
                    f"splits: {split!r} has no requests; they are of {times[0]} to {times[1]}, and the "
                    f"splits start at {dict(self.schema.splits)}, which must be in order"
                )
        return splits, first_cut

    # ---------------------------------------------------------------- the report

    def report(self, splits: dict[str, tuple[int, int]]) -> dict[str, Any]:
        users, events, first, last = self.row(
            'SELECT count(DISTINCT "user"), count(*), min(time), max(time) FROM events'
        )
        told = {
            "users": users,
            "items": self.codes[ITEM]["ids"],
            "events": events,
            "events_per_user": self.percentiles('SELECT count(*) AS n FROM events GROUP BY "user"'),
            "time_range": [str(first), str(last)],
            "times_at_midnight": prepare_report.at_midnight(self.sql),
            "joins": self.joins,
            "requests": {split: self.report_split(*numbers) for split, numbers in splits.items()},
            "codes": self.codes,
            "doubled_rows": prepare_report.doubled_rows(self.sql, self.schema),
            "refused": self.refused,
        }
        return {"warnings": prepare_report.warnings_of(told), **told}

    def report_split(self, first: int, behind: int) -> dict[str, Any]:
        mine = f"_number >= {first} AND _number < {behind}"
        tasks = self.schema.requests.labels
        dense, candidate_dense = (
            list(names) for names in (self.schema.requests.dense, self.schema.requests.candidate_dense)
        )
        rates = ", ".join(f"avg(_row.{_name(task)}) FILTER (_row.exposed)" for task in tasks)
        exposed, *rates = self.row(
            f"SELECT avg(CAST(_row.exposed AS INTEGER)), {rates} FROM numbered WHERE {mine}"
        )
        start, end, alone = self.row(
            f"""SELECT min(time), max(time), avg(CAST(_first IS NULL OR _first >= time AS INTEGER))
            FROM requests LEFT JOIN (SELECT "user", min(time) AS _first FROM events GROUP BY "user")
            USING ("user") WHERE {mine}"""
        )
        told = {
            "requests": behind - first,
            "time_range": [str(start), str(end)],
            "candidates": self.percentiles(
                f"SELECT count(*) AS n FROM numbered WHERE {mine} GROUP BY _number"
            ),
            "exposed": exposed,
            "label_rates_of_exposed": dict(zip(tasks, rates, strict=True)),
            "requests_without_history": alone,
            **prepare_report.leaks(self.sql, mine, self.positive),
            **prepare_report.same_times(self.sql, mine),
            **prepare_report.of_candidates(self.sql, mine, dense, candidate_dense),
        }
        if negatives := self.schema.requests.negatives:
            asked = negatives * self.number(
                f"SELECT count(*) FROM numbered WHERE {mine} AND {self.positive}"
            )
            added = self.number(f"SELECT count(*) FROM drawn WHERE {mine}")
            told["negatives"] = {"asked_for": asked, "added": added}
        return told

    def percentiles(self, counts: str) -> dict[str, int]:
        found, most = self.row(f"SELECT quantile_disc(n, [0.5, 0.9, 0.99]), max(n) FROM ({counts})")
        return dict(zip(("p50", "p90", "p99", "max"), [*found, most], strict=True))

    def row(self, sql: str) -> tuple[Any, ...]:
        return self.sql.execute(sql).fetchall()[0]

    def number(self, sql: str) -> int:
        return self.row(sql)[0]

    def copy(self, sql: str, file: str, options: str = "") -> None:
        self.sql.execute(f"COPY ({sql}) TO {_text(str(self.draft / file))} (FORMAT parquet{options})")
