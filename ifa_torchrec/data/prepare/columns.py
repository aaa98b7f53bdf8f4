"""Columns that need more than a name or an SQL expression: hashed, lists, .npy files, regressions."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import Any

from ifa_torchrec.data.schema import LogError

_HASH_BITS = 60  # the bits of the digest that `hash_row` uses


@dataclass(frozen=True)
class Hashed:
    """A column whose ids are hashed to a fixed number of rows; row 0 is "unknown".

    Raises:
        LogError: `hash` is not an integer of at least 2.

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
    """A column with several ids per row.

    Args:
        column: a text of ids separated by a delimiter; or, without `delimiter`, a list, or a text like
            "[1, 2]".
        delimiter: the separator of ids. Spaces around ids, and empty ids, are dropped.
        hash: the number of rows that the ids are hashed to; by default each id has its own row.

    Raises:
        LogError: `delimiter` is empty, or `hash` is not an integer of at least 2.

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
                f"the column {self.column!r}: delimiter is empty; leave it out if the column is a list"
            )
        if self.hash is not None:
            _check_hash(self.column, self.hash)


@dataclass(frozen=True)
class Npy:
    """Vectors of the items in a separate .npy file.

    Args:
        npy: path of the file, an array [R, V] of floats.
        row: column of the items' table with the item's row in the array, from 0; by default the array
            has one row for each row of the table, in the same order.

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
        regression: the column of the label.

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
    """The name or SQL expression of a column.

    Example:
        >>> from ifa_torchrec.data.prepare.columns import Hashed, column_of
        >>> column_of("author"), column_of(Hashed("author", hash=100))
        ('author', 'author')
    """
    return column if isinstance(column, str) else column.column


def rows_of(column: str | Hashed | Listed) -> int | None:
    """The number of rows that a column is hashed to; None if it is not hashed.

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
            f"the column {column!r}: hash must be the number of rows, an integer from 2 to "
            f"2^{_HASH_BITS}, got {rows!r}"
        )
