"""The vocabulary: maps external ids to rows.

    FOLDER/vocabulary.json       for each name its kind, its rows and a digest; written last
    FOLDER/vocabulary/NAME.parquet   for a listed name, column `id`: the id of row 1, of row 2, ...

External ids are the ids used by a shop, a stream or a client: strings or 64-bit integers. Rows are their
positions in embedding tables. Row 0 is "unknown": any id that is not in the vocabulary.
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
"""The id of a user, an item or a value outside this library."""

_UNLISTED = ("hashed", "withheld")
HASH_DIGITS = 15  # hexadecimal digits of the MD5 that fit an int64
_LEAST, _MOST = -(2**63), 2**63 - 1
_AT_ONCE = 10_000
"""The number of ids converted to Python objects in one call, which blocks all other threads."""


def hash_row(identifier: ExternalId, rows: int) -> int:
    """The row of an id that is hashed to a table, 1 to rows - 1.

    Args:
        identifier: the id; an integer and its decimal digits have the same row.
        rows: the number of rows of the table, at least 2.

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
            is its own row; "withheld": listed elsewhere, and not known here.
        rows: the number of rows of the table, including row 0.
        ids: the listed ids, strings or int64.
        withheld: for withheld ids, their digest and whether they are integers.

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
    withheld: tuple[str, bool] | None = None

    @cached_property
    def digest(self) -> str:
        """A digest of the kind, the ids and their rows; for hashed and numbered ids, only of the kind
        and the number of rows."""
        if self.withheld is not None:
            return self.withheld[0]
        text = f"{self.kind} {self.rows}"
        if self.ids is not None:
            column = cast(Any, hash_pandas_object)(pd.Series(self.ids.to_pandas()), index=False)
            kind = "integers" if self.integers else "strings"
            text = f"{text} {kind} {hashlib.sha256(column.to_numpy()).hexdigest()}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def integers(self) -> bool:
        """Whether the listed ids are integers, not strings."""
        if self.withheld is not None:
            return self.withheld[1]
        return self.ids is not None and pa.types.is_integer(self.ids.type)

    @cached_property
    def _rows(self) -> dict[ExternalId | None, int]:
        # string lookups are several times as fast as in pandas and Arrow
        rows: dict[ExternalId | None, int] = {}
        ids = pa.array([]) if self.ids is None else self.ids
        for first in range(0, len(ids), _AT_ONCE):
            some = ids.slice(first, _AT_ONCE).to_pylist()
            rows.update(zip(some, range(first + 1, self.rows), strict=False))
        return rows

    def rows_of(self, ids: Sequence[ExternalId] | np.ndarray) -> np.ndarray:
        """The row of each id, [n] int64; 0 for unknown ids.

        A listed string matches only that string; a listed integer matches the integer and its decimal
        digits.
        """
        if self.kind == "hashed":
            return np.array([hash_row(i, self.rows) for i in ids], np.int64)
        if self.kind == "numbered":
            given = np.asarray(ids)
            if given.dtype.kind != "i":  # some are strings, or it is empty
                numbers = (integer_of(i) for i in ids)
                given = np.array([0 if i is None else i for i in numbers], np.int64)
            return np.where((given >= 0) & (given < self.rows), given, 0).astype(np.int64)
        row_of = self._rows.get
        if self.integers:
            return np.array([row_of(integer_of(i), 0) for i in ids], np.int64)
        return np.array([row_of(i, 0) for i in ids], np.int64)

    def at(self, rows: Iterable[int]) -> list[ExternalId | None]:
        """The id of each row; None for row 0, and if ids are hashed or withheld."""
        if self.kind == "numbered":
            return [int(row) or None for row in rows]
        if self.kind == "hashed" or self.ids is None:
            return [None for _ in rows]
        return [self.ids[int(row) - 1].as_py() if row else None for row in rows]

    def extended(self, ids: Iterable[ExternalId]) -> Ids:
        """These ids with new ones appended; existing rows do not change. Ids that are present already
        are ignored, and so are all ids unless this name is listed.

        Raises:
            LogError: a new id has another type than the existing ids, is null or an empty string.
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
    """Maps external ids to rows, for users, items and every id feature.

    Args:
        ids: the Ids of each name. The name of users is "user".

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
        """A vocabulary of listed ids, in the order of their rows.

        Raises:
            LogError: the ids of one name have several types, or one is null, beyond an int64 or an empty
                string.
        """
        return Vocabulary({}).extended(ids)

    @staticmethod
    def numbered(schema: LogSchema, items: int | None = None) -> Vocabulary:
        """The vocabulary of a log whose ids are rows already. It has no users: they have no table, and
        their numbers in the log are their external ids.

        Args:
            schema: the log's schema.
            items: the number of items; None for the number of rows of the item table.
        """
        rows = schema.tables | ({} if items is None else {schema.item: items})
        return Vocabulary({name: Ids("numbered", number) for name, number in rows.items()})

    def completed(self, schema: LogSchema, items: int) -> Vocabulary:
        """This vocabulary, with numbered ids for each name of the schema that it lacks.

        Args:
            schema, items: as for ``numbered``.
        """
        return Vocabulary({**Vocabulary.numbered(schema, items)._ids, **self._ids})

    def check(self, schema: LogSchema, items: int) -> None:
        """Refuse a log to which this vocabulary cannot belong.

        Args:
            schema: the log's schema.
            items: the number of items in the log.

        Raises:
            LogError: a name of the schema is missing, an id has no row in its table, or the number of
                items differs.
        """
        for name, rows in schema.tables.items():
            mine = self[name].rows
            if name == schema.item and mine != items:
                raise LogError(
                    f"vocabulary: {name!r} has {mine} rows, but the log has {items} items; use the "
                    "vocabulary that the items were numbered with"
                )
            if name != schema.item and mine > rows:
                raise LogError(
                    f"vocabulary: {name!r} has {mine} rows, but its table in the schema has {rows}; "
                    f"enlarge the table to {mine}"
                )

    @property
    def names(self) -> list[str]:
        """The names that have ids."""
        return list(self._ids)

    def __getitem__(self, name: str) -> Ids:
        if name not in self._ids:
            raise LogError(f"vocabulary: no ids of {name!r}; it has ids of {self.names}")
        return self._ids[name]

    def digests(self) -> dict[str, str]:
        """The digest of each name's ids."""
        return {name: ids.digest for name, ids in sorted(self._ids.items())}

    @property
    def digest(self) -> str:
        """A digest of the whole vocabulary."""
        return hashlib.sha256(json.dumps(self.digests()).encode()).hexdigest()[:16]

    def extended(self, ids: Mapping[str, Iterable[ExternalId]]) -> Vocabulary:
        """This vocabulary with new ids appended; existing rows do not change. Missing names are added.

        Raises:
            LogError: the ids of one name have several types, or one is null, beyond an int64 or an empty
                string.
        """
        new = dict(self._ids)
        for name, values in ids.items():
            try:
                new[name] = new[name].extended(values) if name in new else _listed(values)
            except LogError as error:
                raise LogError(f"vocabulary: ids of {name!r}: {error}") from error
        return Vocabulary(new)

    def withholding(self, name: str) -> Vocabulary:
        """This vocabulary without the listed ids of a name: it keeps only their digest, so its own
        digest does not change.

        Example:
            >>> from ifa_torchrec.data.vocabulary import Vocabulary
            >>> vocabulary = Vocabulary.of({"item": ["tea", "cup"], "user": ["anna"]})
            >>> public = vocabulary.withholding("user")
            >>> public.digest == vocabulary.digest, public["user"].rows_of(["anna"]).tolist()
            (True, [0])
        """
        ids = self._ids.get(name)
        if ids is None or ids.kind != "listed":
            return self
        withheld = Ids("withheld", ids.rows, withheld=(ids.digest, ids.integers))
        return Vocabulary({**self._ids, name: withheld})

    def begins_with(self, other: Vocabulary) -> bool:
        """Whether this is ``other`` or an extension of it: then its tables also fit rows of
        ``other``."""
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
        """Write the vocabulary into a folder.

        Raises:
            FileExistsError: the folder contains one already.
        """
        (folder / "vocabulary").mkdir()
        for name, ids in self._ids.items():
            if ids.ids is not None:
                pq.write_table(pa.table({"id": ids.ids}), folder / "vocabulary" / f"{name}.parquet")
        described = {
            name: {"kind": ids.kind, "rows": ids.rows, "digest": ids.digest}
            | ({} if ids.withheld is None else {"integers": ids.integers})
            for name, ids in self._ids.items()
        }
        text = json.dumps({"format": FORMAT, "ids": described}, indent=2)
        (folder / "vocabulary.json").write_text(text)

    @staticmethod
    def load(folder: Path) -> Vocabulary:
        """Read a vocabulary from a folder.

        Raises:
            LogError: there is none, it has another format, is damaged, or is not what ``save`` writes.
        """
        file = folder / "vocabulary.json"
        try:
            saved = json.loads(file.read_text())
            if saved["format"] != FORMAT:
                raise LogError(f"{file}: format {saved['format']!r}, expected {FORMAT!r}")
            ids: dict[str, Ids] = {}
            for name, described in saved["ids"].items():
                kind, rows = described["kind"], described["rows"]
                least = 2 if kind == "hashed" else 1
                if not isinstance(rows, int) or rows < least or not str(name).isidentifier():
                    raise ValueError(f"{name!r} is described as {described!r}")
                listed = withheld = None
                if kind == "withheld":
                    withheld = str(described["digest"]), bool(described["integers"])
                elif kind == "listed":
                    table = pq.read_table(folder / "vocabulary" / f"{name}.parquet", columns=["id"])
                    listed = table["id"].combine_chunks()
                elif kind not in ("hashed", "numbered"):
                    raise ValueError(f"{name!r} has the unknown kind {kind!r}")
                ids[name] = Ids(kind, rows, listed, withheld)
                if ids[name].digest != described["digest"]:
                    raise ValueError(f"the ids of {name!r} have changed since they were written")
        except LogError:
            raise
        except FileNotFoundError as error:
            raise LogError(
                f"{folder}: no vocabulary ({error.filename} is missing); restore it, or write it again"
            ) from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException) as error:
            raise LogError(f"{file}: not a valid vocabulary ({error}); write it again") from error
        return Vocabulary(ids)


def integer_of(identifier: Any) -> int | None:
    """Convert an id to an int64 if it is one, or its decimal digits; else None.

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
    """Convert ids to an array of one type.

    Raises:
        LogError: an id has another type, is null or an empty string.
    """
    for value in ids:
        if isinstance(value, bool) or not isinstance(value, (str, int, np.integer)) or value == "":
            raise LogError(
                f"{value!r} is not an id; expected a non-empty string or an integer. Leave it out: row "
                "0 is for what has no id"
            )
    try:
        return pa.array(ids, kind)
    except (pa.ArrowException, OverflowError, TypeError) as error:
        raise LogError(f"they must all be strings, or all 64-bit integers ({error})") from error
