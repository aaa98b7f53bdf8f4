"""Columns of which more is said than a name or an SQL expression: hashed, lists, a .npy, regressions."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import Any

from ifa_torchrec.data.schema import LogError

_HASH_BITS = 60  # of the digest that `hash_row` takes


@dataclass(frozen=True)
class Hashed:
    """A column whose ids are hashed to a fixed number of rows; row 0 is "unknown".

    Raises:
        LogError: `hash` is no whole number of at least 2.

    Example:
        >>> from ifa_torchrec.data.prepare.columns import Hashed
        >>> Hashed("author_id", hash=100_000).hash
        100000
    """

    column: str
    hash: int

    def __post_init__(self) -> None:
        _check_hash(self.column, self.hash)


@dataclass(frozen=True)
class Listed:
    """A column with several ids a row.

    Args:
        column: a text of ids with a delimiter between them; or, without `delimiter`, a list, or a text
            like "[1, 2]".
        delimiter: what stands between two ids. Spaces around an id are left out, and so are empty ids.
        hash: rows that the ids are hashed to; by default each has its own.

    Raises:
        LogError: `delimiter` is empty, or `hash` is no whole number of at least 2.

    Example:
        >>> from ifa_torchrec.data.prepare.columns import Listed
        >>> Listed("genres", delimiter="|").hash is None
        True
    """

    column: str
    delimiter: str | None = None
    hash: int | None = None

    def __post_init__(self) -> None:
        if self.delimiter == "":
            raise LogError(
                f"the column {self.column!r}: delimiter is empty; leave it out where a list is"
            )
        if self.hash is not None:
            _check_hash(self.column, self.hash)


@dataclass(frozen=True)
class Npy:
    """Vectors in a .npy file of numpy beside the items.

    Args:
        npy: path of the file, an array [R, V] of floats.
        row: column of the items' table with the row of the array, from 0, that is the item's; by default
            the array has as many rows as the table, in its order.

    Example:
        >>> from ifa_torchrec.data.prepare.columns import Npy
        >>> Npy("titles.npy").row is None
        True
    """

    npy: str
    row: str | None = None


@dataclass(frozen=True)
class Regression:
    """A label that is a number.

    Args:
        regression: its column.

    Example:
        >>> from ifa_torchrec.data.prepare.columns import Regression
        >>> Regression("play_time_ms::float / 1000").regression
        'play_time_ms::float / 1000'
    """

    regression: str


IdColumn = str | Hashed
ListColumn = str | Listed
VectorColumn = str | Npy


def column_of(column: str | Hashed | Listed) -> str:
    """The column, whatever is said of it.

    Example:
        >>> from ifa_torchrec.data.prepare.columns import Hashed, column_of
        >>> column_of("author"), column_of(Hashed("author", hash=100))
        ('author', 'author')
    """
    return column if isinstance(column, str) else column.column


def rows_of(column: str | Hashed | Listed) -> int | None:
    """The rows that a column is hashed to, or None where it is not.

    Example:
        >>> from ifa_torchrec.data.prepare.columns import Hashed, rows_of
        >>> rows_of("author"), rows_of(Hashed("author", hash=100))
        (None, 100)
    """
    return None if isinstance(column, str) else column.hash


def _check_hash(column: str, rows: Any) -> None:
    number = isinstance(rows, Integral) and not isinstance(rows, bool)
    if not number or not 2 <= int(rows) <= 2**_HASH_BITS:
        raise LogError(
            f"the column {column!r}: hash must be the number of rows, a whole number from 2 to "
            f"2^{_HASH_BITS}, got {rows!r}"
        )
