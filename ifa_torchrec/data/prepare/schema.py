"""The description of a log as it was found: the schema of ``ifa_torchrec.data.prepare``."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ifa_torchrec.data.prepare.columns import (
    Hashed,
    IdColumn,
    ListColumn,
    Listed,
    Npy,
    Regression,
    VectorColumn,
    rows_of,
)
from ifa_torchrec.data.prepare.values import check_value, refuse_same_names
from ifa_torchrec.data.schema import CANDIDATES, EXPOSED, OFFSETS, TIME, USER, LogError

ITEM, NAME = "item", "name"
UNITS = {"s": 1_000_000, "ms": 1_000, "us": 1}
"""Units of times that are numbers, and their microseconds."""

_RESERVED = (USER, TIME, ITEM, EXPOSED, CANDIDATES, OFFSETS)
_MOST_SECONDS = 10_000_000_000  # 300 years; DuckDB cannot add much more to a time


@dataclass(frozen=True, kw_only=True)
class Table:
    """Files with the same columns. Any column may also be given as an SQL expression.

    Args:
        files: one or several paths or globs of Parquet, Feather or CSV files; CSV may be compressed with
            gzip or Zstandard. `**` matches folders of any depth; folder names NAME=VALUE are not read as
            columns.
        delimiter, encoding: for CSV; any encoding that Python knows. All CSV columns are text, so write
            `rating::float >= 4`.
        quote: the quote character of CSV values; "" if quotes are part of the values.
        columns: names of the CSV columns, if the files have no header.
        nulls: CSV values that mean null, such as "NULL" or "\\N", quoted or not; "" always does.

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
class Rows(Table):
    """Rows with a user, an item and a time.

    Args:
        user, item, time: columns. `time` may be missing only for a history given as a list; see Events.
        unit: "s", "ms" or "us" since 1970; by default times are timestamps, like 2024-05-01 10:00:00.
        where: an SQL condition; only rows for which it is true are used.
        each: lists that become rows, one per element: maps the name of each element's column to a list
            column. Several lists of a row must have equal length. All other columns, and `where`, may
            use these names, and are evaluated for each element.

    Example:
        >>> from ifa_torchrec.data.prepare import Listed
        >>> from ifa_torchrec.data.prepare.schema import Rows
        >>> shown = Listed("impressions", delimiter=" ")  # N1-0 N2-1
        >>> Rows(files="behaviors.tsv", user="uid", item="split_part(shown, '-', 1)", time="at",
        ...      each={"shown": shown}).where is None
        True
    """

    user: str
    item: IdColumn
    time: str | None = None
    unit: str | None = None
    where: str | None = None
    each: Mapping[str, ListColumn] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Events(Rows):
    """Which user interacted with which item, and when: the histories.

    Histories given as one list per user (`each`) may have no `time`. Their events are then one second
    apart, the last one second before the user's first request: their order is known, but not their age.
    If a user has several such lists, the shortest is used; LOG/report.json counts them.

    Args:
        features: id features of an event.
        dense: numbers of an event.
        weight: the weight of an event, 0 or more.

    Example:
        >>> from ifa_torchrec.data.prepare.schema import Events
        >>> Events(files="clicks.csv", user="uid", item="iid", time="ts", unit="s",
        ...        features={"action": "kind"}).weight is None
        True
    """

    features: Mapping[str, IdColumn] = field(default_factory=dict)
    dense: Mapping[str, str] = field(default_factory=dict)
    weight: str | None = None


@dataclass(frozen=True, kw_only=True)
class JoinedLabel(Rows):
    """Rows that label a candidate 1: same user and item, at most `within_seconds` after it.

    Args:
        within_seconds: maximum time from the candidate's row to the label's.
        mark_all: label every such candidate; by default only the latest.

    Example:
        >>> from ifa_torchrec.data.prepare.schema import JoinedLabel
        >>> JoinedLabel(files="buys.csv", user="u", item="i", time="t", within_seconds=600).unit is None
        True
    """

    within_seconds: float
    mark_all: bool = False


@dataclass(frozen=True, kw_only=True)
class Requests(Rows):
    """One row per candidate.

    A log of what users did, without what they were shown, has only candidates with label 1. With
    `negatives` other candidates are drawn for them. These are our construction: it is not known whether
    they were shown. Their labels are 0, and they count as exposed, since the loss uses only the labels
    of exposed candidates. An item is drawn in proportion to its events before the first split, so
    training does not know what becomes popular later. An item without such events is never drawn, so an
    item that is new in the test split is always a positive. The draws are the same in every run. A draw
    that hits an item of the request, or one drawn for it already, is not replaced: LOG/report.json has
    the numbers asked for and added for each split; its other figures count drawn candidates like all
    others.

    Args:
        labels: for each task, a column of 0 and 1, a Regression, a JoinedLabel, or, as a Listed, the
            row's items with label 1 (such as the clicked among the shown items).
        exposed: column that says which candidates were shown; by default all were. The label of the
            others may be empty.
        context: id features of the request.
        context_lists: features of the request with several ids each.
        dense, candidate_dense: numbers of the request, and of the candidate.
        candidate_features: id features of the candidate in this request.
        request: column that identifies a user's requests; by default, with `each`, each row is one. A
            request that is identified this way may have no user; then it has no history.
        gap_seconds: rows of one user (and of one `request`, if given) at most this far apart form one
            request. By default rows with the same time do, or rows of one `request` at any time.
        negatives: the number of items to draw for each candidate with label 1.

    Raises:
        LogError: `negatives` is not an integer from 0, or is combined with columns for which a drawn
            item has no value: `candidate_dense`, `candidate_features`, or a regression.

    Example:
        >>> from ifa_torchrec.data.prepare.schema import Requests
        >>> shown = Requests(files="shown.csv", user="u", item="i", time="t", labels={"click": "c"})
        >>> shown.gap_seconds is None
        True
    """

    labels: Mapping[str, str | Regression | Listed | JoinedLabel]
    exposed: str | None = None
    context: Mapping[str, IdColumn] = field(default_factory=dict)
    context_lists: Mapping[str, ListColumn] = field(default_factory=dict)
    dense: Mapping[str, str] = field(default_factory=dict)
    candidate_features: Mapping[str, IdColumn] = field(default_factory=dict)
    candidate_dense: Mapping[str, str] = field(default_factory=dict)
    request: str | None = None
    gap_seconds: float | None = None
    negatives: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.negatives, int) or self.negatives < 0:
            raise LogError(f"requests: negatives must be an integer from 0, got {self.negatives!r}")
        needed = {
            "candidate_dense": list(self.candidate_dense),
            "candidate_features": list(self.candidate_features),
            "regression": [n for n, label in _items(self.labels) if isinstance(label, Regression)],
        }
        for kind, names in needed.items():
            if self.negatives and names:
                raise LogError(
                    f"requests: an item drawn by negatives={self.negatives} has no value for {kind} "
                    f"{names}; leave out one of the two"
                )

    @property
    def joined_labels(self) -> dict[str, JoinedLabel]:
        """The labels that are joined from another table, by task."""
        return {task: label for task, label in self.labels.items() if isinstance(label, JoinedLabel)}

    @property
    def binary(self) -> list[str]:
        """The tasks whose labels are 0 and 1."""
        return [task for task, label in self.labels.items() if not isinstance(label, Regression)]


def _items(labels: object) -> list[tuple[object, object]]:
    """The items of a mapping; none if it is not a mapping, which is checked later."""
    return list(labels.items()) if isinstance(labels, Mapping) else []


@dataclass(frozen=True, kw_only=True)
class Items(Table):
    """The features of the items. An item that is not described here is kept; its features are unknown.

    If several rows describe an item, the largest value of each column is taken.

    Args:
        item: column of the id.
        features: id features.
        lists: features with several ids each.
        dense: numbers.
        vectors: frozen vectors of equal length: list columns, or an Npy.
        name: column of the item's display name; by default its id.

    Example:
        >>> from ifa_torchrec.data.prepare import Listed
        >>> from ifa_torchrec.data.prepare.schema import Items
        >>> Items(files="items.csv", item="id", lists={"genre": Listed("genres", delimiter="|")}).name
    """

    item: str
    features: Mapping[str, IdColumn] = field(default_factory=dict)
    lists: Mapping[str, ListColumn] = field(default_factory=dict)
    dense: Mapping[str, str] = field(default_factory=dict)
    vectors: Mapping[str, VectorColumn] = field(default_factory=dict)
    name: str | None = None


@dataclass(frozen=True, kw_only=True)
class Users(Table):
    """The features of the users, which become context of each of their requests.

    Args:
        user: column of the id.
        features: id features.
        lists: features with several ids each.
        dense: numbers.

    Example:
        >>> from ifa_torchrec.data.prepare.schema import Users
        >>> Users(files="users.csv", user="id", features={"country": "country"}).user
        'id'
    """

    user: str
    features: Mapping[str, IdColumn] = field(default_factory=dict)
    lists: Mapping[str, ListColumn] = field(default_factory=dict)
    dense: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PrepareSchema:
    """The description of a log as it was found.

    Args:
        events: the histories.
        requests: the requests and their candidates.
        splits: the start of each split, in order: a timestamp, or the share of all requests that come
            before it. The requests before the first start are "train".
        items, users: features of the items and users.
        log_scaled: dense columns and regressions of which the model takes log(1 + x); they must not be
            negative.
        min_count: an item that occurs less often in training, in events and candidates together, gets no
            row in the item table.

    Raises:
        LogError: a value, at any depth, has the wrong type or is out of range, or two names differ only
            in case; the message says where, as in `requests.context.page`.

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
    log_scaled: Sequence[str] = ()
    min_count: int = 1

    def __post_init__(self) -> None:
        formats = {f.name for f in dataclasses.fields(Table)} - {"files"}  # `quote` may be empty
        for split, start in self.splits.items() if isinstance(self.splits, Mapping) else ():
            if not isinstance(start, (str, float, int)) or isinstance(start, bool):
                raise LogError(
                    f"splits.{split} must be a timestamp, or a share of the requests, got {start!r}; "
                    "splits are only by time: with a split by users, training would know what other "
                    "users did later"
                )
        for name, hint in typing.get_type_hints(PrepareSchema).items():
            check_value(name, hint, getattr(self, name), formats)
        self._check_sections()
        self._check_splits()
        self._check_names()

    @property
    def described_items(self) -> Items:
        """`items`, or an empty description without them."""
        return self.items or Items(files=(), item=ITEM)

    @property
    def described_users(self) -> Users:
        """`users`, or an empty description without them."""
        return self.users or Users(files=(), user=USER)

    @property
    def context(self) -> dict[str, IdColumn]:
        """Id features of a request: its own and its user's."""
        return {**self.requests.context, **self.described_users.features}

    @property
    def context_lists(self) -> dict[str, ListColumn]:
        """List features of a request: its own and its user's."""
        return {**self.requests.context_lists, **self.described_users.lists}

    @property
    def dense(self) -> dict[str, str]:
        """Numbers of a request: its own and its user's."""
        return {**self.requests.dense, **self.described_users.dense}

    def _check_sections(self) -> None:
        joined = {f"requests.labels.{task}": rows for task, rows in self.requests.joined_labels.items()}
        for where, rows in {"events": self.events, "requests": self.requests, **joined}.items():
            if rows.time is None and not (where == "events" and rows.each):
                raise LogError(
                    f"{where}.time is missing, but a history is what came before a request; name the "
                    "column. Only events may have none, if each user's are one list in order (`each`)"
                )
            if rows.unit not in (None, *UNITS):
                raise LogError(
                    f"{where}.unit must be one of {list(UNITS)}, or be left out for timestamps, got "
                    f"{rows.unit!r}"
                )
            if isinstance(rows.item, Hashed) and rows.item.hash != rows_of(self.events.item):
                raise LogError(
                    f"{where}.item has hash {rows.item.hash}, but events.item has "
                    f"{rows_of(self.events.item)}; set the same hash for both"
                )
            for name, column in rows.each.items():
                if rows_of(column) is not None:
                    raise LogError(f"{where}.each.{name} must not have a hash: its elements become rows")
        seconds = {f"{where}.within_seconds": label.within_seconds for where, label in joined.items()}
        if self.requests.gap_seconds is not None:
            seconds["requests.gap_seconds"] = self.requests.gap_seconds
        for where, value in seconds.items():
            if not 0 <= value <= _MOST_SECONDS:
                raise LogError(f"{where} must be from 0 to {_MOST_SECONDS}, got {value!r}")
        if self.min_count < 1:
            raise LogError(f"min_count must be an integer from 1, got {self.min_count!r}")
        if self.min_count > 1 and rows_of(self.events.item) is not None:
            raise LogError(
                f"min_count is {self.min_count}, but events.item has a hash, so every item has a row; "
                "leave out one of the two"
            )

    def _check_splits(self) -> None:
        for split, start in self.splits.items():
            if not re.fullmatch(r"\w[\w.-]*", split):
                raise LogError(
                    f"splits: {split!r} must be a file name; use letters, digits, underscores and dashes"
                )
            if not isinstance(start, str) and not 0 <= start <= 1:
                raise LogError(
                    f"splits.{split} must be a timestamp, or a share of the requests from 0 to 1, got "
                    f"{start!r}"
                )
        refuse_same_names("splits", ["train", *(split for split in self.splits if split != "train")])

    def _check_names(self) -> None:
        events, requests = self.events, self.requests
        items, users = self.described_items, self.described_users
        of_items = [*items.features, *items.lists, *items.dense, *items.vectors]
        names = [*of_items, *events.features, *events.dense, *requests.labels]
        names += [] if events.weight is None else ["weight"]
        names += [*users.features, *users.lists, *users.dense]
        names += [*requests.context, *requests.context_lists, *requests.dense]
        names += [*requests.candidate_features, *requests.candidate_dense]
        for name in names:
            if name.startswith("_"):
                raise LogError(f"the name {name!r} must not begin with _, which is reserved; rename it")
        refuse_same_names("the schema", [*_RESERVED, *names])
        for name in of_items:
            if name.lower() == NAME:
                raise LogError(
                    f"items: the feature name {name!r} is reserved for the item's display name; rename "
                    "it"
                )


__all__ = [
    "ITEM",
    "NAME",
    "UNITS",
    "Events",
    "Hashed",
    "Items",
    "JoinedLabel",
    "Listed",
    "Npy",
    "PrepareSchema",
    "Regression",
    "Requests",
    "Rows",
    "Table",
    "Users",
]
