"""What a log looks like, as it was found: the schema of ``ifa_torchrec.data.prepare``."""

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
"""Units of a time that is a number, each with its microseconds."""

_RESERVED = (USER, TIME, ITEM, EXPOSED, CANDIDATES, OFFSETS)
_MOST_SECONDS = 10_000_000_000  # 300 years; what DuckDB can add to a time ends not far above


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
class Rows(Table):
    """Rows with a user, an item and a time.

    Args:
        user, item, time: columns. Only a history that is a list without times has none; see Events.
        unit: "s", "ms" or "us" since 1970; by default times are timestamps, like 2024-05-01 10:00:00.
        where: take only the rows of which this is true.
        each: lists that become rows, one an element: names of the columns that the elements stand in,
            and the list columns. Several lists of a row are of one length. All other columns, and
            `where`, may name them, and hold for each element.

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
    """Who had to do with which item, and when: the histories.

    A history that is a list a user (`each`) may have no `time`. Its events are then one second apart,
    the last one second before the first request of the user: their order is known, their age is not. Of
    several such lists of a user the shortest is taken; LOG/report.json counts them.

    Args:
        features: id features of an event.
        dense: numbers of an event.
        weight: its weight, 0 or more.

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
        within_seconds: greatest time from the candidate's row to the label's.
        mark_all: label every such candidate; by default the latest alone.

    Example:
        >>> from ifa_torchrec.data.prepare.schema import JoinedLabel
        >>> JoinedLabel(files="buys.csv", user="u", item="i", time="t", within_seconds=600).unit is None
        True
    """

    within_seconds: float
    mark_all: bool = False


@dataclass(frozen=True, kw_only=True)
class Requests(Rows):
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
        labels: for each task, a column of 0 and 1, a Regression, a JoinedLabel, or, as a Listed, the
            items of the row whose label is 1 (those clicked among those shown).
        exposed: column of who was shown; all, by default. The label of the others may be empty.
        context: id features of the request.
        context_lists: several ids of the request a feature.
        dense, candidate_dense: numbers of the request, and of the candidate.
        candidate_features: id features of the candidate in this request.
        request: column that tells a user's requests apart; by default each row is one, where `each` is
            given. A request that is known so may have no user, and has no history then.
        gap_seconds: rows of one user (and of one `request`, if given) at most so far apart are one
            request. By default rows of one time are, or of one `request` at any time.
        negatives: items to draw for each candidate with a label of 1.

    Raises:
        LogError: `negatives` is no number from 0, or is given beside what an item that is drawn has no
            value of: `candidate_dense`, `candidate_features`, or a regression.

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
            raise LogError(f"requests: negatives must be a whole number from 0, got {self.negatives!r}")
        needed = {
            "candidate_dense": list(self.candidate_dense),
            "candidate_features": list(self.candidate_features),
            "regression": [n for n, label in _items(self.labels) if isinstance(label, Regression)],
        }
        for kind, names in needed.items():
            if self.negatives and names:
                raise LogError(
                    f"requests: an item drawn by negatives={self.negatives} has no value of {kind} "
                    f"{names}; leave one of the two out"
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
    """Of what may be no mapping, which is found later."""
    return list(labels.items()) if isinstance(labels, Mapping) else []


@dataclass(frozen=True, kw_only=True)
class Items(Table):
    """What is known of the items. One that is not described here is kept; all of it is unknown.

    Where several rows describe an item, the greatest value of each column is taken.

    Args:
        item: column of the id.
        features: id features.
        lists: several ids of an item a feature.
        dense: numbers.
        vectors: frozen vectors, all of one length: list columns, or an Npy.
        name: column of what to call the item; its id, by default.

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
    """What is known of the users: context of each of their requests.

    Args:
        user: column of the id.
        features: id features.
        lists: several ids of a user a feature.
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
    """A log, as it was found.

    Args:
        events: the histories.
        requests: what was to be ranked.
        splits: when each split starts, in order: a timestamp, or the share of all requests that come
            before it. What is before the first is "train".
        items, users: what is known of them.
        log_scaled: dense columns and regressions of which the model takes log(1 + x); none is negative.
        min_count: an item that training has less often, in events and candidates together, gets no row
            of the item table.

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
    log_scaled: Sequence[str] = ()
    min_count: int = 1

    def __post_init__(self) -> None:
        formats = {f.name for f in dataclasses.fields(Table)} - {"files"}  # `quote` may be empty
        for split, start in self.splits.items() if isinstance(self.splits, Mapping) else ():
            if not isinstance(start, (str, float, int)) or isinstance(start, bool):
                raise LogError(
                    f"splits.{split} must be a timestamp, or a share of the requests, got {start!r}; "
                    "splits are by time alone: of users of a split of their own the training would know "
                    "what others did later"
                )
        for name, hint in typing.get_type_hints(PrepareSchema).items():
            check_value(name, hint, getattr(self, name), formats)
        self._check_sections()
        self._check_splits()
        self._check_names()

    @property
    def described_items(self) -> Items:
        """`items`, or, where there are none, a description of nothing."""
        return self.items or Items(files=(), item=ITEM)

    @property
    def described_users(self) -> Users:
        """`users`, or, where there are none, a description of nothing."""
        return self.users or Users(files=(), user=USER)

    @property
    def context(self) -> dict[str, IdColumn]:
        """Id features of a request: its own, and its user's."""
        return {**self.requests.context, **self.described_users.features}

    @property
    def context_lists(self) -> dict[str, ListColumn]:
        """Features of several ids of a request: its own, and its user's."""
        return {**self.requests.context_lists, **self.described_users.lists}

    @property
    def dense(self) -> dict[str, str]:
        """Numbers of a request: its own, and its user's."""
        return {**self.requests.dense, **self.described_users.dense}

    def _check_sections(self) -> None:
        joined = {f"requests.labels.{task}": rows for task, rows in self.requests.joined_labels.items()}
        for where, rows in {"events": self.events, "requests": self.requests, **joined}.items():
            if rows.time is None and not (where == "events" and rows.each):
                raise LogError(
                    f"{where}.time is missing: a history is what came before a request. Name it; "
                    "events alone may have none, where each user's are one list, in order (`each`)"
                )
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
            for name, column in rows.each.items():
                if rows_of(column) is not None:
                    raise LogError(f"{where}.each.{name} must have no hash: its elements become rows")
        seconds = {f"{where}.within_seconds": label.within_seconds for where, label in joined.items()}
        if self.requests.gap_seconds is not None:
            seconds["requests.gap_seconds"] = self.requests.gap_seconds
        for where, value in seconds.items():
            if not 0 <= value <= _MOST_SECONDS:
                raise LogError(f"{where} must be from 0 to {_MOST_SECONDS}, got {value!r}")
        if self.min_count < 1:
            raise LogError(f"min_count must be a whole number from 1, got {self.min_count!r}")
        if self.min_count > 1 and rows_of(self.events.item) is not None:
            raise LogError(
                f"min_count is {self.min_count}, and events.item has a hash, by which every item has a "
                "row; leave out one of the two"
            )

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
                raise LogError(f"the name {name!r} needs another beginning: those with _ are ours")
        refuse_same_names("the schema", [*_RESERVED, *names])
        for name in of_items:
            if name.lower() == NAME:
                raise LogError(
                    f"items: the feature {name!r} needs another name: it is what to call the item"
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
