"""Figures that can be added: the figures of a log are the sum of those of its parts.

Figures are nested dicts of values that have a sum: numbers, and the classes of this module.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ifa_torchrec.data.prepare.sql import first_row

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection


def added(one: Any, other: Any) -> Any:
    """The sum of two figures, or of two dicts with the same keys.

    Example:
        >>> from ifa_torchrec.data.prepare.tallies import Share, added
        >>> added({"rows": 2, "seen": Share(1, 2)}, {"rows": 3, "seen": Share(0, 2)})
        {'rows': 5, 'seen': Share(total=1, of=4)}
    """
    if isinstance(one, Mapping):
        return {name: added(value, other[name]) for name, value in one.items()}
    return one + other


def to_report(figures: Any) -> Any:
    """Convert figures to numbers, texts, lists and dicts for the report.

    Example:
        >>> from ifa_torchrec.data.prepare.tallies import Share, to_report
        >>> to_report({"rows": 5, "seen": Share(1, 4)})
        {'rows': 5, 'seen': 0.25}
    """
    if isinstance(figures, Mapping):
        return {name: to_report(value) for name, value in figures.items()}
    return figures.to_report() if hasattr(figures, "to_report") else figures


@dataclass(frozen=True)
class Share:
    """A mean, stored as the sum and the count.

    Example:
        >>> from ifa_torchrec.data.prepare.tallies import Share
        >>> (Share(1, 2) + Share(0, 2)).to_report()
        0.25
    """

    total: float
    of: int

    def __add__(self, other: Share) -> Share:
        return Share(self.total + other.total, self.of + other.of)

    def to_report(self) -> float | None:
        """The mean; None if the count is 0."""
        return self.total / self.of if self.of else None


@dataclass(frozen=True)
class Histogram:
    """The number of occurrences of each integer.

    Example:
        >>> from ifa_torchrec.data.prepare.tallies import Histogram
        >>> (Histogram({1: 9}) + Histogram({7: 1})).to_report()
        {'p50': 1, 'p90': 1, 'p99': 7, 'max': 7}
    """

    counts: Mapping[int, int]

    def __add__(self, other: Histogram) -> Histogram:
        return Histogram(Counter(self.counts) + Counter(other.counts))

    def to_report(self) -> dict[str, int | None]:
        """The 50th, 90th and 99th percentile, and the maximum."""
        rows = sum(self.counts.values())
        found: dict[str, int | None] = {}
        for percent in (50, 90, 99):
            rank, seen = -(-rows * percent // 100), 0
            found[f"p{percent}"] = None
            for number in sorted(self.counts):
                seen += self.counts[number]
                if seen >= rank:
                    found[f"p{percent}"] = number
                    break
        return {**found, "max": max(self.counts, default=None)}


@dataclass(frozen=True)
class Span:
    """The first and the last of some times; None if there are none.

    Example:
        >>> from ifa_torchrec.data.prepare.tallies import Span
        >>> (Span(2, 3) + Span(None, None) + Span(1, 2)).to_report()
        ['1', '3']
    """

    first: Any
    last: Any

    def __add__(self, other: Span) -> Span:
        firsts = [time for time in (self.first, other.first) if time is not None]
        lasts = [time for time in (self.last, other.last) if time is not None]
        return Span(min(firsts, default=None), max(lasts, default=None))

    def to_report(self) -> list[str]:
        """Both as text."""
        return [str(self.first), str(self.last)]


@dataclass(frozen=True)
class Least:
    """The smallest of some texts, as an example; None if there are none.

    Example:
        >>> from ifa_torchrec.data.prepare.tallies import Least
        >>> (Least("b") + Least(None) + Least("a")).to_report()
        "'a'"
    """

    text: str | None

    def __add__(self, other: Least) -> Least:
        texts = [text for text in (self.text, other.text) if text is not None]
        return Least(min(texts, default=None))

    def to_report(self) -> str:
        """The text in quotes."""
        return "nothing, since there are no rows" if self.text is None else repr(self.text)


@dataclass(frozen=True)
class NumberStats:
    """Statistics of a column of numbers.

    Args:
        rows: the number of rows.
        known: the number of rows that have a number.
        mean, variance: of the numbers.
        least, greatest: the minimum and maximum of the numbers.

    Example:
        >>> from ifa_torchrec.data.prepare.tallies import NumberStats
        >>> stats = NumberStats(2, 1, 1.0, 0.0, 1.0, 1.0) + NumberStats(1, 1, 3.0, 0.0, 3.0, 3.0)
        >>> stats.to_report()["mean"]
        2.0
    """

    rows: int
    known: int
    mean: float | None
    variance: float | None
    least: float | None
    greatest: float | None

    def __add__(self, other: NumberStats) -> NumberStats:
        rows = self.rows + other.rows
        halves = [half for half in (self, other) if half.known]
        if len(halves) < 2:
            half = halves[0] if halves else self
            return NumberStats(rows, half.known, half.mean, half.variance, half.least, half.greatest)
        known = self.known + other.known
        assert self.mean is not None and other.mean is not None
        mean = self.mean + (other.mean - self.mean) * other.known / known
        squares = sum(h.known * ((h.variance or 0) + ((h.mean or 0) - mean) ** 2) for h in halves)
        least = min(h.least for h in halves if h.least is not None)
        greatest = max(h.greatest for h in halves if h.greatest is not None)
        return NumberStats(rows, known, mean, squares / known, least, greatest)

    def to_report(self) -> dict[str, float | None]:
        """Mean, standard deviation, minimum, maximum, and the share of missing numbers."""
        std = None if self.variance is None else math.sqrt(self.variance)
        missing = (self.rows - self.known) / self.rows if self.rows else None
        report = {"mean": self.mean, "std": std, "min": self.least, "max": self.greatest}
        return {**report, "missing": missing}


@dataclass(frozen=True)
class Refused:
    """Counts of the rows of a section, and of the refused ones.

    Args:
        rows: the number of all rows.
        lines: for each reason for which lines of files were refused, `rows` and `examples`.
        reasons: for each reason for which rows were refused, `rows` and the smallest `examples`.
        empty: the number of rows whose lists are empty; None unless rows are elements of lists.

    Example:
        >>> from ifa_torchrec.data.prepare.tallies import Refused
        >>> bad = Refused(4, {}, {"time is empty": {"rows": 1, "examples": ["ann"]}}, None)
        >>> (bad + bad).to_report()["refused"]
        2
    """

    rows: int
    lines: Mapping[str, Mapping[str, Any]]
    reasons: Mapping[str, Mapping[str, Any]]
    empty: int | None

    EXAMPLES: ClassVar[int] = 3
    """The maximum number of examples per reason."""

    def __add__(self, other: Refused) -> Refused:
        lines, reasons = (
            {
                why: {name: one.get(why, none)[name] + two.get(why, none)[name] for name in none}
                for why in {**one, **two}
            }
            for one, two in ((self.lines, other.lines), (self.reasons, other.reasons))
            for none in [{"rows": 0, "examples": list[str]()}]
        )
        for reason in reasons.values():
            reason["examples"].sort()
        for reason in (*lines.values(), *reasons.values()):
            del reason["examples"][self.EXAMPLES :]
        empty = None if self.empty is None else self.empty + (other.empty or 0)
        return Refused(self.rows + other.rows, lines, reasons, empty)

    def to_report(self) -> dict[str, Any]:
        """The counts for the report, most frequent reason first."""
        reasons = {**self.lines, **dict(sorted(self.reasons.items()))}
        reasons = dict(sorted(reasons.items(), key=lambda reason: -reason[1]["rows"]))
        refused = sum(reason["rows"] for reason in reasons.values())
        report = {"rows": self.rows, "refused": refused, "reasons": reasons}
        return report if self.empty is None else {**report, "rows_of_empty_lists": self.empty}


def share(condition: str) -> str:
    """SQL for the number of rows for which a condition is true, and the number of all rows.

    Example:
        >>> from ifa_torchrec.data.prepare.tallies import share
        >>> share("x > 1")
        'count(*) FILTER (WHERE x > 1), count(*)'
    """
    return f"count(*) FILTER (WHERE {condition}), count(*)"


def shares(sql: DuckDBPyConnection, query: str) -> list[Share]:
    """The means of a query that returns pairs of sum and count.

    Example:
        >>> import duckdb
        >>> from ifa_torchrec.data.prepare.tallies import share, shares
        >>> shares(duckdb.connect(), f"SELECT {share('r > 0')}, sum(r), count(r) FROM range(3) t(r)")
        [Share(total=2, of=3), Share(total=3, of=3)]
    """
    row = first_row(sql, query)
    pairs = zip(row[::2], row[1::2], strict=True)
    return [Share(total or 0, of) for total, of in pairs]


def histogram(sql: DuckDBPyConnection, counts: str) -> Histogram:
    """The histogram of the numbers `n` of a query.

    Example:
        >>> import duckdb
        >>> from ifa_torchrec.data.prepare.tallies import histogram
        >>> histogram(duckdb.connect(), "SELECT r % 2 AS n FROM range(3) t(r)")
        Histogram(counts={0: 2, 1: 1})
    """
    rows = sql.execute(f"SELECT n, count(*) FROM ({counts}) GROUP BY n ORDER BY n").fetchall()
    return Histogram(dict(rows))


def least(sql: DuckDBPyConnection, column: str, table: str) -> Least:
    """An example of the ids in a table, for a message.

    Example:
        >>> import duckdb
        >>> from ifa_torchrec.data.prepare.tallies import least
        >>> sql = duckdb.connect()
        >>> _ = sql.execute("CREATE TABLE events_rows AS SELECT 'ann' AS user")
        >>> least(sql, "user", "events")
        Least(text='ann')
    """
    return Least(first_row(sql, f'SELECT min("{column}") FROM {table}_rows')[0])
