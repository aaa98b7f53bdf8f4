"""Convert one column from Arrow to numpy, and check its type and values.

Every error names the table, the row, the column and the fix.
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
    """A column of a table, or the flat values of a column of lists.

    Args:
        values: the values.
        name, where: the name of the column and of its table, for errors.
        offsets: for lists, where the values of each row begin.

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
            LogError: the table has no column of that name.
        """
        require_column(table.column_names, name, where)
        return Column(table[name], name, where)

    def flat(self) -> Column:
        """The values of a column of lists, row by row.

        Raises:
            LogError: the column does not contain lists, or one is null.
        """
        kind = self.values.type
        if not (
            pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        ):
            raise self._of_another_type("one list per row")
        self._no_nulls("put a list there, empty if there are no values")
        # pyarrow-stubs lacks these functions
        lengths = pc.call_function("list_value_length", [self.values]).to_numpy()
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        flat = pc.call_function("list_flatten", [self.values])
        return Column(flat, self.name, self.where, offsets)

    def ids(self, rows: int | None = None) -> np.ndarray:
        """Ids, [n] int64.

        Args:
            rows: the number of rows of their table; None allows any int64.

        Raises:
            LogError: they are not integers, or one is null or outside the table.
        """
        if pa.types.is_null(self.values.type) and not len(self.values):
            return np.empty(0, np.int64)  # lists that are all empty
        self._no_nulls('put 0, which is "unknown", or drop those rows')
        if not pa.types.is_integer(self.values.type):
            raise self._of_another_type("an integer")
        values = self.values.to_numpy()
        if values.dtype == np.uint64:
            self.refuse(
                values > np.iinfo(np.int64).max,
                lambda i: (
                    f"{values[i]} does not fit an int64; renumber the ids, e.g. with pandas.factorize"
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
            LogError: they are not timestamps, their time zone is not UTC, or one is null or out of
                range.
        """
        kind = self.values.type
        if not pa.types.is_timestamp(kind):
            raise self._of_another_type("a timestamp; convert it with pandas.to_datetime")
        if kind.tz not in (None, "UTC"):
            # a request at local noon would see events of another zone's evening
            raise LogError(
                f"{self.where}: column {self.name!r} has the time zone {kind.tz}, expected UTC; convert "
                "all times of the log with .dt.tz_convert('UTC')"
            )
        self._no_nulls("fill or drop those rows")
        values = self.values.to_numpy()
        coarse = {"s": 10**6, "ms": 10**3}.get(kind.unit)
        if coarse:  # on overflow numpy wraps, or raises without the row, depending on its version
            furthest = np.iinfo(np.int64).max // coarse
            self.refuse(
                np.abs(values.astype(np.int64)) > furthest,
                lambda i: "the time is beyond the year 290,000; drop the row",
            )
        return values.astype("datetime64[us]").astype(np.int64)

    def numbers(self, missing: bool = False, log_scaled: bool = False) -> np.ndarray:
        """Numbers, [n] float32.

        Args:
            missing: whether a null is allowed; it becomes NaN.
            log_scaled: whether log(1 + x) will be taken; then no number may be negative.

        Raises:
            LogError: they are not numbers, or one is null, negative, not finite or beyond a float32
                where that is not allowed.
        """
        kind = self.values.type
        numeric = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_null)
        if not any(of_kind(kind) for of_kind in numeric):
            raise self._of_another_type("a number")
        if not missing:
            self._no_nulls("this column may not be null; fill or drop those rows")
        narrow = pa.types.is_float16(kind) or pa.types.is_float32(kind)
        absent = self.values.is_null().to_numpy()
        filled = self.values.cast(pa.float32() if narrow else pa.float64(), safe=False).fill_null(0.0)
        values = filled.to_numpy()
        remedy = "use null for a missing value" if missing else "fix or drop the row"
        self.refuse(
            ~(np.abs(values) <= _MOST), lambda i: f"{values[i]} is not a finite float32; {remedy}"
        )
        if log_scaled:
            self.refuse(
                values < 0,
                lambda i: f"{values[i]} is negative; fix it, or remove the column from log_scaled",
            )
        numbers = values.astype(np.float32)
        numbers[absent] = np.nan
        return numbers

    def bools(self) -> np.ndarray:
        """Booleans, [n] bool.

        Raises:
            LogError: they are not booleans, or one is null.
        """
        if not pa.types.is_boolean(self.values.type):
            raise self._of_another_type("bool")
        self._no_nulls("fill or drop those rows")
        return self.values.to_numpy().astype(bool)

    def refuse(self, wrong: np.ndarray, describe: Callable[[int], str]) -> None:
        """Raise a LogError for the first wrong value, if there is one.

        Args:
            wrong: [n] bool.
            describe: given an index, says what is wrong with that value and how to fix it.
        """
        if wrong.any():
            first = int(wrong.argmax())
            raise LogError(
                f"{self.where}: {self._place(first)}, column {self.name!r}: {describe(first)}"
            )

    def _place(self, index: int) -> str:
        if self.offsets is None:
            return f"row {index}"
        row = int(np.searchsorted(self.offsets, index, side="right")) - 1
        return f"row {row}, value {index - self.offsets[row]} of the list"

    def _no_nulls(self, remedy: str) -> None:
        if self.values.null_count:
            first = pc.index(self.values.is_null(), True).as_py()
            raise LogError(
                f"{self.where}: {self._place(first)}, column {self.name!r} is null (null values in the "
                f"column: {self.values.null_count}); {remedy}"
            )

    def _of_another_type(self, wanted: str) -> LogError:
        within = "" if self.offsets is None else "lists of "
        return LogError(
            f"{self.where}: column {self.name!r} has type {within}{self.values.type}, expected "
            f"{within}{wanted}"
        )
