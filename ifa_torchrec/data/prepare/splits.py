"""Split a log's requests by time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from ifa_torchrec.data.prepare.sql import first_row, literal, number, timestamp
from ifa_torchrec.data.schema import LogError

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection


@dataclass(frozen=True)
class Splits:
    """The start and the end of each split, and its requests.

    Args:
        starts: the start time of each split but "train", as SQL.
        lasts: the time of the last request of each split, as SQL.
        numbers: the request numbers of each split.

    Example:
        >>> from ifa_torchrec.data.prepare.splits import Splits
        >>> list(Splits({}, {"train": "make_timestamp(0)"}, {"train": range(1)}).numbers)
        ['train']
    """

    starts: Mapping[str, str]
    lasts: Mapping[str, str]
    numbers: Mapping[str, range]

    def of_part(self, sql: DuckDBPyConnection) -> Splits:
        """The same times, with the request numbers of a table `requests` of some users."""
        return replace(self, numbers=_numbers(sql, self.starts))


def cut_splits(sql: DuckDBPyConnection, starts: Mapping[str, str | float]) -> Splits:
    """Split the table `requests`.

    Raises:
        LogError: a start is not a timestamp, a split is empty, or one is named "train".

    Example:
        >>> import duckdb
        >>> from ifa_torchrec.data.prepare.splits import cut_splits
        >>> sql = duckdb.connect()
        >>> _ = sql.execute("CREATE TABLE requests AS SELECT r AS _number, "
        ...                 "make_timestamp(r * 1000000) AS time FROM range(10) t(r)")
        >>> cut_splits(sql, {"valid": 0.8, "test": "1970-01-01 00:00:09"}).numbers
        {'train': range(0, 8), 'valid': range(8, 9), 'test': range(9, 10)}
    """
    count = number(sql, "SELECT count(*) FROM requests")
    cuts: dict[str, str] = {}
    for split, start in starts.items():
        if split == "train":
            raise LogError("splits: 'train' is always what comes before the first split; leave it out")
        if isinstance(start, str):
            cuts[split] = timestamp(literal(start), None)
            if first_row(sql, f"SELECT {cuts[split]}") == (None,):
                raise LogError(
                    f"splits: {split!r} starts at {start!r}, which is not a timestamp like '2024-05-01'"
                )
        else:
            cuts[split] = _time(sql, "min(time)", f"_number = {int(start * count)}")
    numbers = _numbers(sql, cuts)
    for split, mine in numbers.items():
        if not mine:
            first, last = first_row(sql, "SELECT min(time), max(time) FROM requests")
            raise LogError(
                f"splits: {split!r} has no requests. The requests are from {first} to {last}, and the "
                f"splits start at {dict(starts)}; the starts must be in order, with requests in each"
            )
    lasts = {split: _time(sql, "max(time)", f"_number < {mine.stop}") for split, mine in numbers.items()}
    return Splits(cuts, lasts, numbers)


def _numbers(sql: DuckDBPyConnection, cuts: Mapping[str, str]) -> dict[str, range]:
    """The request numbers of each split; requests are numbered by time."""
    bounds = [0]
    bounds += [number(sql, f"SELECT count(*) FROM requests WHERE time < {cut}") for cut in cuts.values()]
    bounds.append(number(sql, "SELECT count(*) FROM requests"))
    numbers = [range(*ends) for ends in pairwise(bounds)]
    return dict(zip(["train", *cuts], numbers, strict=True))


def _time(sql: DuckDBPyConnection, time: str, which: str) -> str:
    """A time of the requests for which a condition is true, as SQL."""
    microseconds = first_row(sql, f"SELECT epoch_us({time}) FROM requests WHERE {which}")[0]
    return f"make_timestamp({'NULL::BIGINT' if microseconds is None else microseconds})"
