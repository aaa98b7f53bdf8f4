"""One column on its way from Arrow to numpy: of which type it must be, and which values cannot be right.

Every error names the table, the row, the column and the remedy.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ifa_torchrec.data.schema import LogError

_MOST = float(np.finfo(np.float32).max)


def require_column(names: Collection[str], column: str, where: str) -> None:
    """Raise LogError unless a table has a column.

    Example:
        >>> from ifa_torchrec.data.columns import require_column
        >>> require_column(["user", "time"], "user", "events")
    """
    if column not in names:
        raise LogError(f"{where}: column {column!r} is missing; there are {list(names)}")


@dataclass(frozen=True)
class Column:
    """A column of a table, or all that a column of lists holds.

    Args:
        values: of the column.
        name, where: of the column, and of its table, for errors.
        offsets: of lists, where each row's values begin.

    Example:
        >>> import pyarrow as pa
        >>> from ifa_torchrec.data.columns import Column
        >>> lists = Column.of(pa.table({"genre": [[1, 2], [], [3]]}), "genre", "items").flat()
        >>> lists.ids(rows=4).tolist(), lists.offsets.tolist()
        ([1, 2, 3], [0, 2, 2, 3])
    """

    values: pa.ChunkedArray
    name: str
    where: str
    offsets: np.ndarray | None = None

    @staticmethod
    def of(table: pa.Table, name: str, where: str) -> Column:
        """A column of a table.

        Raises:
            LogError: there is none of the name.
        """
        require_column(table.column_names, name, where)
        return Column(table[name], name, where)

    def flat(self) -> Column:
        """What the lists of a column hold, one row's after another's.

        Raises:
            LogError: the column is not of lists, or one is null.
        """
        kind = self.values.type
        if not (
            pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        ):
            raise self._of_another_type("a list a row")
        self._no_nulls("give it a list, an empty one where there is nothing")
        # pyarrow-stubs has no functions for them
        lengths = pc.call_function("list_value_length", [self.values]).to_numpy()
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        flat = pc.call_function("list_flatten", [self.values])
        return Column(flat, self.name, self.where, offsets)

    def ids(self, rows: int | None = None) -> np.ndarray:
        """Ids, [n] int64.

        Args:
            rows: of their table; None for any int64.

        Raises:
            LogError: they are not integers, or one is null or outside the table.
        """
        if pa.types.is_null(self.values.type) and not len(self.values):
            return np.empty(0, np.int64)  # of lists that are all empty
        self._no_nulls('put 0, which is "unknown", or drop those rows')
        if not pa.types.is_integer(self.values.type):
            raise self._of_another_type("an integer")
        values = self.values.to_numpy()
        if values.dtype == np.uint64:
            self.refuse(
                values > np.iinfo(np.int64).max,
                lambda i: (
                    f"{values[i]} is beyond an int64; number the ids anew, as pandas.factorize does"
                ),
            )
        values = values.astype(np.int64)
        if rows is not None:
            self.refuse(
                (values < 0) | (values >= rows),
                lambda i: (
                    f"id {values[i]} is outside its table of {rows} rows; map ids to "
                    f"0..{rows - 1} or enlarge the table in the schema"
                ),
            )
        return values

    def times(self) -> np.ndarray:
        """Times, [n] int64 microseconds.

        Raises:
            LogError: they are no timestamps or of another zone than UTC, or one is null or does not fit.
        """
        kind = self.values.type
        if not pa.types.is_timestamp(kind):
            raise self._of_another_type("a timestamp; convert it with pandas.to_datetime")
        if kind.tz not in (None, "UTC"):
            # a request's local noon would see events of another zone's evening
            raise LogError(
                f"{self.where}: column {self.name!r} is in the time zone {kind.tz}; make all times of "
                "the log UTC with .dt.tz_convert('UTC')"
            )
        self._no_nulls("fill or drop those rows")
        values = self.values.to_numpy()
        coarse = {"s": 10**6, "ms": 10**3}.get(kind.unit)
        if coarse:  # numpy wraps what an int64 does not hold, or raises for all, by its version
            furthest = np.iinfo(np.int64).max // coarse
            self.refuse(
                np.abs(values.astype(np.int64)) > furthest,
                lambda i: "the time lies beyond the year 290,000; drop the row",
            )
        return values.astype("datetime64[us]").astype(np.int64)

    def numbers(self, missing: bool = False, log_scaled: bool = False) -> np.ndarray:
        """Numbers, [n] float32.

        Args:
            missing: whether a null is allowed; it becomes NaN.
            log_scaled: whether log(1 + x) will be taken, so that none may be negative.

        Raises:
            LogError: they are no numbers, or one is not allowed, not finite or beyond a float32.
        """
        kind = self.values.type
        numeric = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_null)
        if not any(of_kind(kind) for of_kind in numeric):
            raise self._of_another_type("a number")
        if not missing:
            self._no_nulls("fill or drop those rows, it may not be missing")
        narrow = pa.types.is_float16(kind) or pa.types.is_float32(kind)
        absent = self.values.is_null().to_numpy()
        filled = self.values.cast(pa.float32() if narrow else pa.float64(), safe=False).fill_null(0.0)
        values = filled.to_numpy()
        remedy = "make it null where it is missing" if missing else "mend or drop the row"
        self.refuse(
            ~(np.abs(values) <= _MOST), lambda i: f"{values[i]} is not finite in a float32; {remedy}"
        )
        if log_scaled:
            self.refuse(
                values < 0,
                lambda i: f"{values[i]} is negative; take the column out of log_scaled, or mend it",
            )
        numbers = values.astype(np.float32)
        numbers[absent] = np.nan
        return numbers

    def bools(self) -> np.ndarray:
        """Booleans, [n] bool.

        Raises:
            LogError: they are no booleans, or one is null.
        """
        if not pa.types.is_boolean(self.values.type):
            raise self._of_another_type("bool")
        self._no_nulls("fill or drop those rows")
        return self.values.to_numpy().astype(bool)

    def refuse(self, wrong: np.ndarray, told: Callable[[int], str]) -> None:
        """Raise LogError of the first value that is wrong, if one is.

        Args:
            wrong: [n] bool.
            told: what is wrong with the value at an index, and the remedy.
        """
        if wrong.any():
            first = int(wrong.argmax())
            raise LogError(f"{self.where}: {self._place(first)}, column {self.name!r}: {told(first)}")

    def _place(self, index: int) -> str:
        if self.offsets is None:
            return f"row {index}"
        row = int(np.searchsorted(self.offsets, index, side="right")) - 1
        return f"row {row}, value {index - self.offsets[row]} of the list"

    def _no_nulls(self, remedy: str) -> None:
        if self.values.null_count:
            first = pc.index(self.values.is_null(), True).as_py()
            raise LogError(
                f"{self.where}: {self._place(first)}, column {self.name!r} is null, as are "
                f"{self.values.null_count} of its values in all; {remedy}"
            )

    def _of_another_type(self, wanted: str) -> LogError:
        within = "" if self.offsets is None else "lists of "
        return LogError(
            f"{self.where}: column {self.name!r} has type {within}{self.values.type}, it must be "
            f"{within}{wanted}"
        )
