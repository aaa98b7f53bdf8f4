"""The vocabulary: which external id has which row.

    FOLDER/vocabulary.json       of each name its kind, its rows and a digest; written last
    FOLDER/vocabulary/NAME.parquet   column `id` of a listed name: the id of row 1, of row 2, ...

External ids are what a shop, a stream or a client calls things: strings or integers of 64 bits. Rows are
where they stand in tables. Row 0 is "unknown": what the vocabulary does not have.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pandas.util import hash_pandas_object

from ifa_torchrec.data.schema import LogError, LogSchema

FORMAT = "ifa-vocabulary/1"
ExternalId = str | int
"""What the world calls a user, an item or a value."""

_UNLISTED = ("hashed", "withheld")
HASH_DIGITS = 15  # of MD5's hexadecimals: an int64 holds them
_LEAST, _MOST = -(2**63), 2**63 - 1
_AT_ONCE = 10_000
"""Ids that are made Python objects in one call, which stops all other threads."""


def hash_row(identifier: ExternalId, rows: int) -> int:
    """Row of an id that is hashed to a table, 1 to rows - 1.

    Args:
        identifier: the id; an integer and its decimal digits have the same row.
        rows: of the table, at least 2.

    Raises:
        ValueError: rows is less than 2.

    Example:
        >>> from ifa_torchrec.data.vocabulary import hash_row
        >>> hash_row("a", 1001)
        363
    """
    if rows < 2:
        raise ValueError(f"rows must be at least 2, got {rows}")
    digest = hashlib.md5(str(identifier).encode()).hexdigest()
    return 1 + int(digest[:HASH_DIGITS], 16) % (rows - 1)


@dataclass(frozen=True)
class Ids:
    """The ids of one name: of users, of items or of an id feature.

    Args:
        kind: "listed": row r has the id ids[r - 1]; "hashed": rows are hashes of ids; "numbered": an id
            is its own row; "withheld": listed elsewhere, and none is known here.
        rows: of the table, row 0 included.
        ids: the listed ones, strings or int64.
        told: of withheld ones, their digest and whether they are integers.

    Example:
        >>> import pyarrow as pa
        >>> from ifa_torchrec.data.vocabulary import Ids
        >>> ids = Ids("listed", 3, pa.array(["tea", "cup"]))
        >>> ids.rows_of(["cup", "new"]).tolist(), ids.at([1, 0])
        ([2, 0], ['tea', None])
    """

    kind: Literal["listed", "hashed", "numbered", "withheld"]
    rows: int
    ids: pa.Array | None = None
    told: tuple[str, bool] | None = None

    @cached_property
    def digest(self) -> str:
        """Of kind, ids and their rows; of a table that is hashed to, or numbered, only of the kind and
        the rows."""
        if self.told is not None:
            return self.told[0]
        text = f"{self.kind} {self.rows}"
        if self.ids is not None:
            column = cast(Any, hash_pandas_object)(pd.Series(self.ids.to_pandas()), index=False)
            kind = "integers" if self.integers else "strings"
            text = f"{text} {kind} {hashlib.sha256(column.to_numpy()).hexdigest()}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def integers(self) -> bool:
        """Whether listed ids are integers, not strings."""
        if self.told is not None:
            return self.told[1]
        return self.ids is not None and pa.types.is_integer(self.ids.type)

    @cached_property
    def _rows(self) -> dict[ExternalId | None, int]:
        # looks strings up several times as fast as pandas and Arrow do
        rows: dict[ExternalId | None, int] = {}
        ids = pa.array([]) if self.ids is None else self.ids
        for first in range(0, len(ids), _AT_ONCE):
            some = ids.slice(first, _AT_ONCE).to_pylist()
            rows.update(zip(some, range(first + 1, self.rows), strict=False))
        return rows

    def rows_of(self, ids: Sequence[ExternalId] | np.ndarray) -> np.ndarray:
        """Row of each id, [n] int64; 0 for those that are not known.

        A listed string is found by the string alone, a listed integer by the integer or its decimal
        digits.
        """
        if self.kind == "hashed":
            return np.array([hash_row(i, self.rows) for i in ids], np.int64)
        if self.kind == "numbered":
            given = np.asarray(ids)
            if given.dtype.kind != "i":  # some are strings, or none is there
                numbers = (integer_of(i) for i in ids)
                given = np.array([0 if i is None else i for i in numbers], np.int64)
            return np.where((given >= 0) & (given < self.rows), given, 0).astype(np.int64)
        row_of = self._rows.get
        if self.integers:
            return np.array([row_of(integer_of(i), 0) for i in ids], np.int64)
        return np.array([row_of(i, 0) for i in ids], np.int64)

    def at(self, rows: Iterable[int]) -> list[ExternalId | None]:
        """The id of each row; None for row 0, and where ids are hashed or withheld."""
        if self.kind == "numbered":
            return [int(row) or None for row in rows]
        if self.kind == "hashed" or self.ids is None:
            return [None for _ in rows]
        return [self.ids[int(row) - 1].as_py() if row else None for row in rows]

    def extended(self, ids: Iterable[ExternalId]) -> Ids:
        """With further ids behind those that there are, whose rows stay; what is there already, and all
        where ids are not listed, changes nothing.

        Raises:
            LogError: a new id is of another type than those that there are, null or an empty string.
        """
        if self.kind != "listed" or self.ids is None:
            return self
        ids = list(dict.fromkeys(ids))
        new = [i for i, row in zip(ids, self.rows_of(ids), strict=True) if not row]
        if not new:
            return self
        joined = pa.concat_arrays([self.ids, _array(new, self.ids.type)])
        return Ids("listed", len(joined) + 1, joined)


class Vocabulary:
    """Which external id has which row: of users, of items and of every id feature.

    Args:
        ids: the Ids of each name. Users go by the name "user".

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from ifa_torchrec.data.vocabulary import Vocabulary
        >>> vocabulary = Vocabulary.of({"item": ["tea", "cup"], "user": [7, 9]})
        >>> longer = vocabulary.extended({"item": ["jug", "tea"]})
        >>> longer["item"].rows_of(["jug", "cup"]).tolist(), longer.digest == vocabulary.digest
        ([3, 2], False)
        >>> longer.save(Path(tempfile.mkdtemp()))
    """

    def __init__(self, ids: Mapping[str, Ids]) -> None:
        self._ids = dict(ids)

    @staticmethod
    def of(ids: Mapping[str, Iterable[ExternalId]]) -> Vocabulary:
        """Of lists of ids, in the order of their rows.

        Raises:
            LogError: ids of one name are of several types, null, not an int64 or empty strings.
        """
        return Vocabulary({}).extended(ids)

    @staticmethod
    def numbered(schema: LogSchema, items: int | None = None) -> Vocabulary:
        """Of a log whose ids are rows already. Users are left out: they have no table, and the log's
        number of one is what the world calls it.

        Args:
            schema: of the log.
            items: how many items it has; None for as many as the item's table has rows.
        """
        rows = schema.tables | ({} if items is None else {schema.item: items})
        return Vocabulary({name: Ids("numbered", number) for name, number in rows.items()})

    def completed(self, schema: LogSchema, items: int) -> Vocabulary:
        """With ids that are rows already where it has none of a name of the schema.

        Args:
            schema, items: as of ``numbered``.
        """
        return Vocabulary({**Vocabulary.numbered(schema, items)._ids, **self._ids})

    def check(self, schema: LogSchema, items: int) -> None:
        """Refuse a log that it cannot be of.

        Args:
            schema: of the log.
            items: how many it has.

        Raises:
            LogError: a name of the schema is missing, an id has no row in its table, or there are other
                items.
        """
        for name, rows in schema.tables.items():
            mine = self[name].rows
            if name == schema.item and mine != items:
                raise LogError(f"vocabulary: {name!r} has {mine} rows, but the log has {items} items")
            if name != schema.item and mine > rows:
                raise LogError(
                    f"vocabulary: {name!r} has {mine} rows, its table in the schema {rows}; enlarge "
                    f"the table to {mine}"
                )

    @property
    def names(self) -> list[str]:
        """Of what it has ids."""
        return list(self._ids)

    def __getitem__(self, name: str) -> Ids:
        if name not in self._ids:
            raise LogError(f"vocabulary: there are no ids of {name!r}; there are {self.names}")
        return self._ids[name]

    def digests(self) -> dict[str, str]:
        """Of each name, its ids' digest."""
        return {name: ids.digest for name, ids in sorted(self._ids.items())}

    @property
    def digest(self) -> str:
        """Of all names."""
        return hashlib.sha256(json.dumps(self.digests()).encode()).hexdigest()[:16]

    def extended(self, ids: Mapping[str, Iterable[ExternalId]]) -> Vocabulary:
        """With further ids; rows stay. Names that it has not are added.

        Raises:
            LogError: ids of one name are of several types, null, not an int64 or empty strings.
        """
        new = dict(self._ids)
        for name, values in ids.items():
            try:
                new[name] = new[name].extended(values) if name in new else _listed(values)
            except LogError as error:
                raise LogError(f"vocabulary: ids of {name!r}: {error}") from error
        return Vocabulary(new)

    def withholding(self, name: str) -> Vocabulary:
        """Without the listed ids of a name, of which it then knows the digest alone; its own digest is
        that of the whole.

        Example:
            >>> from ifa_torchrec.data.vocabulary import Vocabulary
            >>> vocabulary = Vocabulary.of({"item": ["tea", "cup"], "user": ["anna"]})
            >>> told = vocabulary.withholding("user")
            >>> told.digest == vocabulary.digest, told["user"].rows_of(["anna"]).tolist()
            (True, [0])
        """
        ids = self._ids.get(name)
        if ids is None or ids.kind != "listed":
            return self
        withheld = Ids("withheld", ids.rows, told=(ids.digest, ids.integers))
        return Vocabulary({**self._ids, name: withheld})

    def begins_with(self, other: Vocabulary) -> bool:
        """Whether it is ``other``, or an extension of it: tables of the one serve the other's rows."""
        for name in other.names:
            if name not in self._ids:
                return False
            mine, theirs = self._ids[name], other[name]
            if mine.digest == theirs.digest:
                continue
            if mine.kind != theirs.kind or mine.rows < theirs.rows or mine.kind in _UNLISTED:
                return False
            if mine.ids is not None and mine.ids[: theirs.rows - 1] != theirs.ids:
                return False
        return True

    def save(self, folder: Path) -> None:
        """Write it into a folder.

        Raises:
            FileExistsError: the folder holds one.
        """
        (folder / "vocabulary").mkdir()
        for name, ids in self._ids.items():
            if ids.ids is not None:
                pq.write_table(pa.table({"id": ids.ids}), folder / "vocabulary" / f"{name}.parquet")
        described = {
            name: {"kind": ids.kind, "rows": ids.rows, "digest": ids.digest}
            | ({} if ids.told is None else {"integers": ids.integers})
            for name, ids in self._ids.items()
        }
        text = json.dumps({"format": FORMAT, "ids": described}, indent=2)
        (folder / "vocabulary.json").write_text(text)

    @staticmethod
    def load(folder: Path) -> Vocabulary:
        """Read it from a folder.

        Raises:
            LogError: there is none, it is of another format, damaged, or not what ``save`` writes.
        """
        file = folder / "vocabulary.json"
        try:
            saved = json.loads(file.read_text())
            if saved["format"] != FORMAT:
                raise LogError(f"{file}: format {saved['format']!r}, this version reads {FORMAT!r}")
            ids: dict[str, Ids] = {}
            for name, described in saved["ids"].items():
                kind, rows = described["kind"], described["rows"]
                least = 2 if kind == "hashed" else 1
                if not isinstance(rows, int) or rows < least or not str(name).isidentifier():
                    raise ValueError(f"{name!r} is described as {described!r}")
                listed = told = None
                if kind == "withheld":
                    told = str(described["digest"]), bool(described["integers"])
                elif kind == "listed":
                    table = pq.read_table(folder / "vocabulary" / f"{name}.parquet", columns=["id"])
                    listed = table["id"].combine_chunks()
                elif kind not in ("hashed", "numbered"):
                    raise ValueError(f"{name!r} is of the kind {kind!r}")
                ids[name] = Ids(kind, rows, listed, told)
                if ids[name].digest != described["digest"]:
                    raise ValueError(f"the ids of {name!r} are not those that were written")
        except LogError:
            raise
        except FileNotFoundError as error:
            raise LogError(f"{folder}: no vocabulary ({error.filename} is missing)") from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException) as error:
            raise LogError(f"{file}: not readable as a vocabulary ({error}); write it again") from error
        return Vocabulary(ids)


def integer_of(identifier: Any) -> int | None:
    """An id as an int64, where it is one or its decimal digits; None elsewhere.

    Example:
        >>> from ifa_torchrec.data.vocabulary import integer_of
        >>> integer_of("-7"), integer_of("07"), integer_of(2**63)
        (-7, None, None)
    """
    if isinstance(identifier, str):
        try:
            number = int(identifier)
        except ValueError:
            return None
        return number if str(number) == identifier and _LEAST <= number <= _MOST else None
    whole = isinstance(identifier, (int, np.integer)) and not isinstance(identifier, bool)
    return int(identifier) if whole and _LEAST <= identifier <= _MOST else None


def _listed(ids: Iterable[ExternalId]) -> Ids:
    values = list(dict.fromkeys(ids))
    kind = pa.large_string() if any(isinstance(value, str) for value in values) else pa.int64()
    return Ids("listed", len(values) + 1, _array(values, kind))


def _array(ids: list[Any], kind: pa.DataType) -> pa.Array:
    """Ids of one type.

    Raises:
        LogError: one is of another type, null or an empty string.
    """
    for value in ids:
        if isinstance(value, bool) or not isinstance(value, (str, int, np.integer)) or value == "":
            raise LogError(f"{value!r} is none; leave it out, row 0 stands for what has no id")
    try:
        return pa.array(ids, kind)
    except (pa.ArrowException, OverflowError, TypeError) as error:
        raise LogError(f"they must all be strings or all integers of 64 bits ({error})") from error
