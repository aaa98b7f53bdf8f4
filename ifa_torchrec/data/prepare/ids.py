"""Number the ids: the DuckDB tables codes_NAME (id, code), and the log's vocabulary.

Row 0 is reserved for unknown ids. The ids of the training split are numbered in sorted order; then come
the items that are not in it, so that they can be distinguished. When a vocabulary is extended, its ids
keep their numbers and new ids come after them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ifa_torchrec.data.header import read_header
from ifa_torchrec.data.prepare.columns import rows_of
from ifa_torchrec.data.prepare.schema import ITEM, PrepareSchema
from ifa_torchrec.data.prepare.splits import Splits
from ifa_torchrec.data.prepare.sql import first_row, number, quoted
from ifa_torchrec.data.remote import RemoteLog, is_uri
from ifa_torchrec.data.schema import USER, LogError
from ifa_torchrec.data.vocabulary import HASH_DIGITS, Ids, Vocabulary

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection


def hash_in_sql(text: str, rows: int) -> str:
    """``hash_row`` of a text, as SQL.

    Example:
        >>> import duckdb
        >>> from ifa_torchrec.data.prepare.ids import hash_in_sql
        >>> duckdb.sql(f"SELECT {hash_in_sql('x', 1001)} FROM (SELECT 'a' AS x)").fetchall()
        [(363,)]
    """
    return f"1 + CAST('0x' || md5({text})[:{HASH_DIGITS}] AS BIGINT) % {rows - 1}"


def with_codes(features: Iterable[str], table: str) -> tuple[str, str]:
    """SQL to replace the ids in a table's features by rows: the columns to select, and the joins.

    Example:
        >>> from ifa_torchrec.data.prepare.ids import with_codes
        >>> with_codes(["age"], "users")
        (', coalesce(c0.code, 0) AS "age"', 'LEFT JOIN "codes_age" c0 ON c0.id = users."age"')
    """
    named = list(enumerate(features))
    select = "".join(f", coalesce(c{n}.code, 0) AS {quoted(f)}" for n, f in named)
    joins = " ".join(
        f"LEFT JOIN {quoted(f'codes_{f}')} c{n} ON c{n}.id = {table}.{quoted(f)}" for n, f in named
    )
    return select, joins


def with_lists(
    sql: DuckDBPyConnection, features: Iterable[str], table: str, key: str
) -> tuple[str, str]:
    """SQL to replace the ids in a table's lists by rows: the columns to select, and the joins.

    Args:
        sql: contains the table and the codes; gets a table rows_NAME for each feature.
        features: the list columns of the table.
        table: the table with the lists.
        key: its key column.

    Example:
        >>> import duckdb
        >>> from ifa_torchrec.data.prepare.ids import with_lists
        >>> sql = duckdb.connect()
        >>> _ = sql.execute("CREATE TABLE items AS SELECT 7 AS item, ['b', 'x', 'a'] AS genre;"
        ...                 "CREATE TABLE codes_genre AS SELECT unnest(['a', 'b']) AS id,"
        ...                 "unnest([1, 2]) AS code")
        >>> select, joins = with_lists(sql, ["genre"], "items", "item")
        >>> sql.execute(f"SELECT item {select} FROM items {joins}").fetchall()
        [(7, [2, 0, 1])]
    """
    named = list(enumerate(features))
    for _, name in named:
        n, rows, codes = (quoted(text) for text in (name, f"rows_{name}", f"codes_{name}"))
        sql.execute(
            f"""CREATE TABLE {rows} AS SELECT _key, list(coalesce(code, 0) ORDER BY _place) AS _codes
            FROM (SELECT {key} AS _key, unnest({n}) AS id, generate_subscripts({n}, 1) AS _place
                  FROM {table}) LEFT JOIN {codes} USING (id) GROUP BY _key"""
        )
    select = "".join(f", coalesce(l{n}._codes, []::BIGINT[]) AS {quoted(f)}" for n, f in named)
    joins = " ".join(
        f"LEFT JOIN {quoted(f'rows_{f}')} l{n} ON l{n}._key = {table}.{key}" for n, f in named
    )
    return select, joins


@dataclass(frozen=True)
class OldVocabulary:
    """A vocabulary that is to be extended.

    Args:
        vocabulary: the rows of its ids.
        known: the number of rows of its log's item table; its items from this number on were new.

    Example:
        >>> from ifa_torchrec.data.prepare.ids import OldVocabulary
        >>> from ifa_torchrec.data.vocabulary import Vocabulary
        >>> OldVocabulary(Vocabulary.of({"item": ["tea", "cup"]}), known=2).known
        2
    """

    vocabulary: Vocabulary
    known: int

    @staticmethod
    def load(place: str | Path) -> OldVocabulary:
        """Load the vocabulary of a log (a folder or URI), or of a run, whose log must still exist.

        Raises:
            LogError: the place has no vocabulary, or its log has no schema.json.
        """
        log, config = str(place), Path(place) / "config.json"
        if not is_uri(place) and not (Path(place) / "schema.json").exists() and config.exists():
            try:
                log = str(json.loads(config.read_text())["data"])
            except (OSError, ValueError, LookupError, TypeError) as error:
                raise LogError(
                    f"{config}: not the options of a run ({error}); name its log instead"
                ) from error
        remote = RemoteLog(log) if is_uri(log) else None  # keeps its copies while it exists
        copied = Path(log) if remote is None else remote.folder
        schema = read_header(copied / "schema.json").schema
        vocabulary = Vocabulary.load(copied if is_uri(place) else Path(place))
        return OldVocabulary(vocabulary, schema.item_features[schema.item])


USERS = """SELECT "user" AS id, true AS known FROM events_rows
    UNION ALL SELECT "user", true FROM requests_rows"""
"""The users of events and requests, as SQL."""


def ids_of(schema: PrepareSchema, splits: Splits) -> dict[str, str]:
    """Queries for the ids of items, and of the features of events, requests and candidates.

    Args:
        schema: the schema of the log.
        splits: the splits of its requests.

    Returns:
        For each name, a query on the tables `events_rows`, `requests` and `sessions`: for items, `id`
        and its number of occurrences in the training split, `n`; for features, `id` and `known`.
    """
    requests, hashed = schema.requests, hashes_of(schema)
    train = f"_number < {splits.numbers['train'].stop}"
    events = f"time < {splits.lasts['train']}"
    queries = {
        ITEM: f"""SELECT item AS id, sum(_n)::BIGINT AS n FROM (
            SELECT item, count(*) FILTER (WHERE {events}) AS _n FROM events_rows GROUP BY item
            UNION ALL SELECT item, count(*) FILTER (WHERE {train}) FROM sessions GROUP BY item
        ) GROUP BY item"""
    }
    for form, features, table, training in (
        ("{0}", schema.events.features, "events_rows", events),
        ("{0}", schema.context, "requests", train),
        ("unnest({0})", schema.context_lists, "requests", train),
        ("{0}", requests.candidate_features, "sessions", train),
    ):
        for name in features:
            which = "" if hashed[name] else f"WHERE {training}"
            queries[name] = (
                f"SELECT {form.format(quoted(name))} AS id, true AS known FROM {table} {which}"
            )
    return queries


def hashes_of(schema: PrepareSchema) -> dict[str, int | None]:
    """For users, items and each feature, the number of rows that its ids are hashed to, or None."""
    items, requests = schema.described_items, schema.requests
    hashed = {USER: None, ITEM: rows_of(schema.events.item)}
    for columns in (items.features, items.lists, schema.events.features, schema.context):
        hashed |= {name: rows_of(column) for name, column in columns.items()}
    for columns in (schema.context_lists, requests.candidate_features):
        hashed |= {name: rows_of(column) for name, column in columns.items()}
    return hashed


class Numbering:
    """Numbers the ids of a log.

    Args:
        sql: contains the described items, and the views of ids.
        schema: the schema of the log.
        old: the vocabulary to extend.

    Raises:
        LogError: ``old`` has a name that the schema lacks, or a name is hashed differently.
    """

    def __init__(
        self, sql: DuckDBPyConnection, schema: PrepareSchema, old: OldVocabulary | None
    ) -> None:
        self.sql, self.schema = sql, schema
        self.old = old.vocabulary if old else Vocabulary({})
        self.known = old.known if old else 1
        self.ids: dict[str, Ids] = {}
        self.report: dict[str, dict[str, Any]] = {}
        self.hashed = hashes_of(schema)
        for name in self.old.names:
            self._check_old(name)

    def users(self) -> None:
        """Number all users, from `ids_user`."""
        self._number(USER, "FROM ids_user")

    def others(self) -> None:
        """Number items and features, from `ids_item` (id, n) and `ids_NAME` (id, known)."""
        schema, items = self.schema, self.schema.described_items
        self.sql.execute(
            """CREATE TABLE occurrences AS SELECT id AS item, sum(n)::BIGINT AS n FROM ids_item
            GROUP BY id HAVING sum(n) > 0"""
        )
        everything = "SELECT id FROM ids_item"
        everything += " UNION SELECT item AS id FROM items_rows" if schema.items else ""
        self._number(
            ITEM,
            f"""SELECT id, coalesce(n, 0) >= {schema.min_count} AS known
            FROM ({everything}) LEFT JOIN occurrences ON item = id""",
        )
        for form, features in (("{0}", items.features), ("unnest({0})", items.lists)):
            for name in features:
                which = "" if self.hashed[name] else "SEMI JOIN occurrences USING (item)"
                self._number(
                    name,
                    f"SELECT {form.format(quoted(name))} AS id, true AS known FROM items_rows {which}",
                )
        for name in self.hashed:
            if name not in (USER, ITEM, *items.features, *items.lists):
                self._number(name, f"FROM {quoted(f'ids_{name}')}")

    def vocabulary(self) -> Vocabulary:
        """The vocabulary of all numbered ids."""
        return Vocabulary(self.ids)

    def _check_old(self, name: str) -> None:
        if name not in self.hashed:
            raise LogError(
                f"the vocabulary to extend has ids of {name!r}, which the schema does not name; it "
                f"names {list(self.hashed)}"
            )
        old, rows = self.old[name], self.hashed[name]
        kind = f"hashed to {rows} rows" if rows else "listed"
        was = f"hashed to {old.rows} rows" if old.kind == "hashed" else old.kind
        if kind != was:
            raise LogError(
                f"ids of {name!r} are {kind} by the schema, but {was} in the vocabulary to extend; "
                "set the same hash for the column"
            )

    def _number(self, name: str, ids: str) -> None:
        """Make the table codes_NAME.

        Args:
            name: users, items or a feature.
            ids: a query for the ids, and whether each is in the training split.
        """
        sql, rows = self.sql, self.hashed[name]
        table = quoted(f"codes_{name}")
        distinct = f"SELECT id, bool_or(known) AS known FROM ({ids}) WHERE id IS NOT NULL GROUP BY id"
        if rows:
            sql.execute(
                f"CREATE TABLE {table} AS SELECT id, {hash_in_sql('id', rows)} AS code FROM ({distinct})"
            )
            self.ids[name] = Ids("hashed", rows)
            self.report[name] = {"ids": self._count(table), "rows": rows, **self._shared(table)}
            return
        old = self.old[name].ids if name in self.old.names else None
        before = pa.array([], pa.string()) if old is None else old
        rows_before = pa.array(np.arange(1, len(before) + 1))
        sql.register("_before", pa.table({"id": before.cast(pa.large_string()), "code": rows_before}))
        sql.execute(
            f"""CREATE TABLE {table} AS SELECT CAST(id AS VARCHAR) AS id, code FROM _before;
            INSERT INTO {table} SELECT id, {len(before)} + row_number() OVER () FROM (
                SELECT id FROM ({distinct}) ANTI JOIN {table} USING (id)
                ORDER BY NOT known, TRY_CAST(id AS BIGINT), id)"""
        )
        sql.unregister("_before")
        count = self._count(table)
        self.ids[name] = Ids("listed", count + 1, self._listed(name, table, old))
        rows = count + 1
        if name == ITEM:  # the item table ends with the last id that any training split has
            last = f"SELECT max(code) FROM {table} SEMI JOIN (FROM ({distinct}) WHERE known) USING (id)"
            rows = max(self.known, 1 + (number(sql, last) or 0))
        self.report[name] = {"ids": count, "rows": rows}

    def _listed(self, name: str, table: str, old: pa.Array | None) -> pa.Array:
        """The ids in the order of their rows; integers if all of them are."""
        other, count = first_row(
            self.sql,
            f"""SELECT min(id), count(*) FROM {table}
            WHERE CAST(TRY_CAST(id AS BIGINT) AS VARCHAR) IS DISTINCT FROM id""",
        )
        kind = pa.large_string() if count else pa.int64()
        if old is not None and len(old):
            if count and pa.types.is_integer(old.type):
                raise LogError(
                    f"ids of {name!r} are integers in the vocabulary to extend, but {other!r} is not; "
                    "use the same kind of ids, or start a new vocabulary"
                )
            kind = old.type
        rows = self.sql.sql(f"SELECT id FROM {table} ORDER BY code").to_arrow_table()
        return rows["id"].cast(kind).combine_chunks()

    def _count(self, table: str) -> int:
        return number(self.sql, f"SELECT count(*) FROM {table}")

    def _shared(self, table: str) -> Mapping[str, float]:
        shared = number(
            self.sql,
            f"""SELECT count(*) FROM {table}
            WHERE code IN (SELECT code FROM {table} GROUP BY code HAVING count(*) > 1)""",
        )
        return {"ids_that_share_a_row": shared / max(self._count(table), 1)}
