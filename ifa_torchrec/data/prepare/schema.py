"""What a log looks like, as it was found: the schema of ``ifa_torchrec.data.prepare``."""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from ifa_torchrec.data.schema import CANDIDATES, EXPOSED, OFFSETS, TIME, USER, LogError

ITEM, NAME = "item", "name"
UNITS = {"s": 1_000_000, "ms": 1_000, "us": 1}
"""Units of a time that is a number, each with its microseconds."""

_RESERVED = (USER, TIME, ITEM, EXPOSED, CANDIDATES, OFFSETS)
_MOST_SECONDS = 10_000_000_000  # 300 years; what DuckDB can add to a time ends not far above
_HASH_BITS = 60  # of the digest that `hash_row` takes


@dataclass(frozen=True)
class Hashed:
    """A column whose ids are hashed to a fixed number of rows; row 0 of a feature is "unknown".

    Raises:
        LogError: `hash` is no whole number of at least 2.

    Example:
        >>> from ifa_torchrec.data.prepare.schema import Hashed
        >>> Hashed("author_id", hash=100_000).hash
        100000
    """

    column: str
    hash: int

    def __post_init__(self) -> None:
        if not _is(self.hash, int) or not 2 <= self.hash <= 2**_HASH_BITS:
            raise LogError(
                f"the column {self.column!r}: hash must be the number of rows, a whole number from 2 to "
                f"2^{_HASH_BITS}, got {self.hash!r}"
            )


def column_of(column: str | Hashed) -> str:
    """The column, hashed or not.

    Example:
        >>> from ifa_torchrec.data.prepare.schema import Hashed, column_of
        >>> column_of("author"), column_of(Hashed("author", hash=100))
        ('author', 'author')
    """
    return column.column if isinstance(column, Hashed) else column


def rows_of(column: str | Hashed) -> int | None:
    """The rows that a column is hashed to, or None where it is not.

    Example:
        >>> from ifa_torchrec.data.prepare.schema import Hashed, rows_of
        >>> rows_of("author"), rows_of(Hashed("author", hash=100))
        (None, 100)
    """
    return column.hash if isinstance(column, Hashed) else None


@dataclass(frozen=True, kw_only=True)
class Table:
    """Files with the same columns. Wherever a column is asked for, an SQL expression will do as well.

    Args:
        files: path or glob, or several, of Parquet, Feather or CSV; CSV may be compressed by gzip or
            Zstandard. `**` stands for folders of any depth; a folder NAME=VALUE gives no column.
        delimiter, encoding: of CSV, in any of Python's spellings; its columns are all text, so
            `rating::float >= 4`.
        quote: what values of CSV may stand in; "" where quotes are part of the values.
        columns: names of the CSV columns, where the files have no header.
        nulls: values of CSV that stand for none, as "NULL" or "\\N", quoted or not; "" always does.

    Example:
        >>> from ifa_torchrec.data.prepare.schema import Table
        >>> Table(files="log-*.csv", delimiter="::").quote
        '"'
    """

    files: str | Sequence[str]
    delimiter: str = ","
    quote: str = '"'
    encoding: str = "utf-8"
    columns: Sequence[str] = ()
    nulls: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Events(Table):
    """Who had to do with which item, and when.

    Args:
        user, item, time: columns.
        unit: "s", "ms" or "us" since 1970; by default times are timestamps, like 2024-05-01 10:00:00.
        where: take only the rows of which this is true.

    Example:
        >>> from ifa_torchrec.data.prepare.schema import Events
        >>> Events(files="clicks.csv", user="uid", item="iid", time="ts", unit="s").where is None
        True
    """

    user: str
    item: str | Hashed
    time: str
    unit: str | None = None
    where: str | None = None


@dataclass(frozen=True, kw_only=True)
class JoinedLabel(Events):
    """Rows that label a candidate 1: same user and item, at most `within_seconds` after it.

    Example:
        >>> from ifa_torchrec.data.prepare.schema import JoinedLabel
        >>> JoinedLabel(files="buys.csv", user="u", item="i", time="t", within_seconds=600).unit is None
        True
    """

    within_seconds: float


@dataclass(frozen=True, kw_only=True)
class Requests(Events):
    """One row for each candidate.

    A log of what users did, without what they were shown, has candidates with a label of 1 alone. With
    `negatives` others are drawn for them. These candidates are our construction: nobody knows whether
    they were shown. Their labels are 0, and they stand as exposed, since the loss takes the labels of
    the exposed alone. An item is drawn in proportion to its events before the first split, so that
    nothing of what is popular later is known to the training; one without such events is never drawn,
    so an item that is new in the test is always a positive. Draws are the same at every run. One that
    hits an item of the request, or one drawn for it before, is not made up for: LOG/report.json has for
    each split how many were asked for and how many were added; its other figures count them as any
    candidate.

    Args:
        labels: for each task, a column of 0 and 1, or a JoinedLabel.
        exposed: column of who was shown; all, by default. The label of the others may be empty.
        context: id features of the request.
        dense, candidate_dense: numbers of the request, and of the candidate.
        request: column that tells a user's requests apart.
        gap_seconds: rows of one user (and of one `request`, if given) at most so far apart are one
            request. By default rows of one time are, or of one `request` at any time.
        negatives: items to draw for each candidate with a label of 1.

    Raises:
        LogError: `negatives` is no number from 0, or is given beside `candidate_dense`, of which an
            item that is drawn has no value.

    Example:
        >>> from ifa_torchrec.data.prepare.schema import Requests
        >>> shown = Requests(files="shown.csv", user="u", item="i", time="t", labels={"click": "c"})
        >>> shown.gap_seconds is None
        True
    """

    labels: Mapping[str, str | JoinedLabel]
    exposed: str | None = None
    context: Mapping[str, str | Hashed] = field(default_factory=dict)
    dense: Mapping[str, str] = field(default_factory=dict)
    candidate_dense: Mapping[str, str] = field(default_factory=dict)
    request: str | None = None
    gap_seconds: float | None = None
    negatives: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.negatives, int) or self.negatives < 0:
            raise LogError(f"requests: negatives must be a whole number from 0, got {self.negatives!r}")
        if self.negatives and self.candidate_dense:
            raise LogError(
                f"requests: an item drawn by negatives={self.negatives} has no value of candidate_dense "
                f"{list(self.candidate_dense)}; leave one of the two out"
            )

    @property
    def joined_labels(self) -> dict[str, JoinedLabel]:
        """The labels that are joined from another table, by task."""
        return {task: label for task, label in self.labels.items() if isinstance(label, JoinedLabel)}


@dataclass(frozen=True, kw_only=True)
class Items(Table):
    """What is known of the items; events and candidates of other items are refused.

    Where several rows describe an item, the greatest value of each column is taken.

    Args:
        item: column of the id.
        features: id features.
        name: column of what to call the item; its id, by default.

    Example:
        >>> from ifa_torchrec.data.prepare.schema import Items
        >>> Items(files="items.csv", item="id", features={"genre": "split_part(genres, '|', 1)"}).name
    """

    item: str
    features: Mapping[str, str | Hashed] = field(default_factory=dict)
    name: str | None = None


@dataclass(frozen=True, kw_only=True)
class Users(Table):
    """What is known of the users: context features of each of their requests.

    Args:
        user: column of the id.
        features: id features.

    Example:
        >>> from ifa_torchrec.data.prepare.schema import Users
        >>> Users(files="users.csv", user="id", features={"country": "country"}).user
        'id'
    """

    user: str
    features: Mapping[str, str | Hashed]


@dataclass(frozen=True, kw_only=True)
class PrepareSchema:
    """A log, as it was found.

    Args:
        events: the histories.
        requests: what was to be ranked.
        splits: when each split starts, in order: a timestamp, or the share of all requests that come
            before it. What is before the first is "train".
        items, users: what is known of them.

    Raises:
        LogError: a value, at any depth, is not of its type or range, or two names differ in case alone;
            the message says where, as in `requests.context.page`.

    Example:
        >>> from ifa_torchrec.data.prepare.schema import Events, PrepareSchema, Requests
        >>> rows = dict(files="log.csv", user="u", item="i", time="t")
        >>> schema = PrepareSchema(events=Events(**rows), splits={"valid": 0.8, "test": 0.9},
        ...                        requests=Requests(**rows, labels={"click": "clicked"}))
        >>> schema.items is None
        True
    """

    events: Events
    requests: Requests
    splits: Mapping[str, str | float]
    items: Items | None = None
    users: Users | None = None

    def __post_init__(self) -> None:
        for name, hint in typing.get_type_hints(PrepareSchema).items():
            _check(name, hint, getattr(self, name))
        self._check_sections()
        self._check_splits()
        self._check_names()

    @property
    def item_features(self) -> Mapping[str, str | Hashed]:
        """Id features of the items, beside the item."""
        return self.items.features if self.items else {}

    @property
    def user_features(self) -> Mapping[str, str | Hashed]:
        """Id features of the users."""
        return self.users.features if self.users else {}

    @property
    def context(self) -> dict[str, str | Hashed]:
        """Id features of a request: its own, and its user's."""
        return {**self.requests.context, **self.user_features}

    def _check_sections(self) -> None:
        joined = {f"requests.labels.{task}": rows for task, rows in self.requests.joined_labels.items()}
        for where, rows in {"events": self.events, "requests": self.requests, **joined}.items():
            if rows.unit not in (None, *UNITS):
                raise LogError(
                    f"{where}.unit must be one of {list(UNITS)}, or left out for timestamps; got "
                    f"{rows.unit!r}"
                )
            if isinstance(rows.item, Hashed) and rows.item.hash != rows_of(self.events.item):
                raise LogError(
                    f"{where}.item has the hash {rows.item.hash}, and that of events.item counts; give "
                    "both the same"
                )
        seconds = {f"{where}.within_seconds": label.within_seconds for where, label in joined.items()}
        if self.requests.gap_seconds is not None:
            seconds["requests.gap_seconds"] = self.requests.gap_seconds
        for where, value in seconds.items():
            if not 0 <= value <= _MOST_SECONDS:
                raise LogError(f"{where} must be from 0 to {_MOST_SECONDS}, got {value!r}")

    def _check_splits(self) -> None:
        for split, start in self.splits.items():
            if not re.fullmatch(r"\w[\w.-]*", split):
                raise LogError(
                    f"splits: {split!r} names a file; take letters, digits, underscores and dashes"
                )
            if not isinstance(start, str) and not 0 <= start <= 1:
                raise LogError(
                    f"splits.{split} must be a timestamp, or a share of the requests from 0 to 1, got "
                    f"{start!r}"
                )
        refuse_same_names("splits", ["train", *(split for split in self.splits if split != "train")])

    def _check_names(self) -> None:
        requests = self.requests
        names = [*self.item_features, *self.user_features, *requests.labels]
        names += [*requests.context, *requests.dense, *requests.candidate_dense]
        for name in names:
            if name.startswith("_"):
                raise LogError(f"the name {name!r} needs another beginning: those with _ are ours")
        refuse_same_names("the schema", [*_RESERVED, *names])
        for name in self.item_features:
            if name.lower() == NAME:
                raise LogError(
                    f"items: the feature {name!r} needs another name: it is what to call the item"
                )


def refuse_same_names(where: str, names: Iterable[str]) -> None:
    """Raise where two names are one to SQL, which knows no case: it would take one for the other.

    Raises:
        LogError: two of them differ in case at most.

    Example:
        >>> from ifa_torchrec.data.prepare.schema import refuse_same_names
        >>> refuse_same_names("log.parquet", ["user", "Time", "time"])
        Traceback (most recent call last):
        ifa_torchrec.data.schema.LogError: log.parquet: the names 'Time' and 'time' are the same but \
for case, and SQL cannot tell them apart; rename one
    """
    seen: dict[str, str] = {}
    for name in names:
        if (other := seen.get(name.lower())) is not None:
            raise LogError(
                f"{where}: the names {other!r} and {name!r} are the same but for case, and SQL cannot "
                "tell them apart; rename one"
                if name != other
                else f"{where}: the name {name!r} is given twice or is reserved; rename it"
            )
        seen[name.lower()] = name


_WORDS = {
    str: "a string",
    int: "a whole number",
    float: "a number",
    Hashed: "a column with its hash",
    Mapping: "an object",
    Sequence: "a list",
}


def _is(value: Any, kind: Any) -> bool:
    """Whether a value is of a kind, whatever it holds."""
    if kind in (int, float):
        number = isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
        return number and -math.inf < typing.cast(Any, value) < math.inf
    kind = typing.get_origin(kind) or kind
    return isinstance(value, (list, tuple) if kind is Sequence else kind)


def _check(where: str, hint: Any, value: Any, may_be_empty: bool = False) -> None:
    """Raise unless a value, and all it holds, is what its annotation says.

    Args:
        may_be_empty: whether a string may be.
    """
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kind = next((kind for kind in kinds if _is(value, kind)), None)
    if kind is types.NoneType:
        return
    if kind is None:
        words = [
            _WORDS.get(typing.get_origin(k) or k, str(k.__name__))
            for k in kinds
            if k is not types.NoneType
        ]
        raise LogError(f"{where} must be {' or '.join(words)}, got {value!r}")
    if isinstance(value, str) and not value.strip() and not may_be_empty:
        raise LogError(f"{where} is empty; name a column, or leave it out where it may be")
    if dataclasses.is_dataclass(value):
        formats = {f.name for f in dataclasses.fields(Table)} - {"files"}  # `quote` may be empty
        for name, inner in typing.get_type_hints(type(value)).items():
            _check(f"{where}.{name}", inner, getattr(value, name), name in formats)
    elif isinstance(value, Mapping):
        of_keys, of_values = typing.get_args(kind)
        for key, item in typing.cast(Mapping[Any, Any], value).items():
            _check(f"a name in {where}", of_keys, key)
            _check(f"{where}.{key}", of_values, item)
    elif isinstance(value, (list, tuple)):
        for item in typing.cast(Sequence[Any], value):
            _check(f"a value of {where}", typing.get_args(kind)[0], item, may_be_empty)
