"""The content of an event log: LogSchema, and the names of the fixed columns."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, Literal

import numpy as np

from ifa_torchrec.errors import UserError

USER, TIME, CANDIDATES, EXPOSED = "user", "time", "candidates", "exposed"
OFFSETS = "candidate_offsets"
"""The offsets of each request's candidates in the candidate columns of a split."""
LIST_OFFSETS = "_offsets"
"""Suffix of a list column's name: the offsets of each row's ids in it."""
USER_OFFSETS = f"{USER}{LIST_OFFSETS}"
"""The offsets of each user's events in the event columns."""
NAME = "name"
"""The items' column of display names, which the model never sees."""

Columns = dict[str, np.ndarray]
"""The columns of a table, by name."""

_METRICS = ("auc", "gauc", "ne", "calibration", "mae", "rmse", "correlation", "exposed", "exposed_alone")
"""No value of a candidate tag may have these names: metrics are named gauc_VALUE and gauc_exposed."""
BESIDE_TASKS = ("shares", "reliability", "notes", "sets", "ms_per_request", "step")
"""Keys that `ifa evaluate` reports next to the names of the tasks."""
_LONGEST_NAME = 50  # names of columns and splits become file names


class LogError(UserError, ValueError):
    """An event log does not match its schema; the message names the column and the fix."""


TaskKind = Literal["binary", "regression"]


@dataclass(frozen=True)
class LogSchema:
    """The columns of an event log, besides the fixed columns user, time, candidates and exposed.

    In every id feature row 0 is "unknown"; two unknown ids are not treated as the same (see IFAConfig,
    identity_features). A missing number is null.

    Args:
        item_features: id features of an item, each with the number of rows of its table. The
            first is the item itself: it is the item column of the events, and `candidates` contain it.
        context_features: id features of a request (int64 columns), each with its table's rows.
        dense_features: float columns of a request.
        candidate_dense: float list columns of a request, one number per candidate.
        tasks: label list columns of a request, one label per candidate, and the kind of each:
            "binary" (0 or 1) or "regression" (any number). A tuple of names means binary tasks.
        candidate_tags: further int list columns, for analysis only (the model never sees them),
            each with the names of its values 0, 1, 2, ...: evaluation reports the positives
            against the negatives of each value. No two values may have one name.
        item_lists: int list columns of an item, any number of ids each; with their table's rows.
        item_dense: float columns of an item.
        item_vectors: float list columns of an item, frozen vectors; with their width.
        event_features: id features of an event, each with its table's rows.
        event_dense: float columns of an event.
        event_weight: float column of an event, its weight a_i >= 0; None if all weights are 1.
        context_lists: int list columns of a request, any number of ids each; with their table's rows.
        candidate_features: int list columns of a request, one id per candidate; with their table's rows.
        log_scaled: the dense columns and regression tasks of which log(1 + x) is taken before they are
            standardised; their numbers must not be negative.

    Raises:
        LogError: a name is not valid or is used twice, a number of rows is below 1, or there is no item
            or no task.

    Example:
        >>> from ifa_torchrec.data import LogSchema
        >>> schema = LogSchema(item_features={"item": 1000, "category": 20},
        ...                    event_features={"action": 5}, tasks={"watch": "regression"})
        >>> schema.item, schema.dense
        ('item', ())
    """

    item_features: dict[str, int]
    context_features: dict[str, int] = field(default_factory=dict)
    dense_features: tuple[str, ...] = ()
    candidate_dense: tuple[str, ...] = ()
    tasks: dict[str, TaskKind] = field(default_factory=lambda: {"label": "binary"})
    candidate_tags: dict[str, tuple[str, ...]] = field(default_factory=dict)
    item_lists: dict[str, int] = field(default_factory=dict, kw_only=True)
    item_dense: tuple[str, ...] = field(default=(), kw_only=True)
    item_vectors: dict[str, int] = field(default_factory=dict, kw_only=True)
    event_features: dict[str, int] = field(default_factory=dict, kw_only=True)
    event_dense: tuple[str, ...] = field(default=(), kw_only=True)
    event_weight: str | None = field(default=None, kw_only=True)
    context_lists: dict[str, int] = field(default_factory=dict, kw_only=True)
    candidate_features: dict[str, int] = field(default_factory=dict, kw_only=True)
    log_scaled: tuple[str, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        for name in (*_DENSE, "log_scaled"):  # lists, when read from JSON
            object.__setattr__(self, name, _names(getattr(self, name), name))
        for name in _TABLES:
            object.__setattr__(self, name, _table_rows(getattr(self, name), name))
        object.__setattr__(self, "tasks", _kinds(self.tasks))
        object.__setattr__(self, "candidate_tags", _tags(self.candidate_tags))
        if not self.item_features:
            raise LogError("schema: item_features is empty; name at least the item's own id")
        if not self.tasks:
            raise LogError("schema: tasks is empty; name at least one column of labels")
        for name in BESIDE_TASKS:
            if name in self.tasks:
                raise LogError(
                    f"schema: the task name {name!r} is reserved for a metric; rename the task"
                )
        names = [name for fields in _TABLES for name in getattr(self, fields)]
        names += [*self.dense, *self.tasks, *self.candidate_tags]
        names += [USER, USER_OFFSETS, TIME, OFFSETS, CANDIDATES, EXPOSED]
        names += [] if self.event_weight is None else [self.event_weight]
        taken = [
            *names,
            NAME,
            *(f"{name}{LIST_OFFSETS}" for name in (*self.item_lists, *self.context_lists)),
        ]
        for name in names:
            if not isinstance(name, str) or not name.isidentifier() or len(name) > _LONGEST_NAME:
                raise LogError(
                    f"schema: the name {name!r} must be at most {_LONGEST_NAME} letters, digits and "
                    "underscores, and not begin with a digit"
                )
            if taken.count(name) > 1:
                raise LogError(f"schema: the name {name!r} is used twice or is reserved; rename it")
        for name in self.log_scaled:
            if name not in self.scaled:
                raise LogError(
                    f"schema: log_scaled: {name!r} is neither a dense column nor a regression task; "
                    f"expected some of {list(self.scaled)}"
                )

    @property
    def item(self) -> str:
        """Name of the item id, the first item feature."""
        return next(iter(self.item_features))

    @property
    def tables(self) -> dict[str, int]:
        """All id features, each with its table's rows."""
        fields = (field for field in _TABLES if field != "item_vectors")
        return {name: rows for field in fields for name, rows in getattr(self, field).items()}

    @property
    def dense(self) -> tuple[str, ...]:
        """All number columns that the model standardises."""
        return tuple(name for fields in _DENSE for name in getattr(self, fields))

    @property
    def scaled(self) -> tuple[str, ...]:
        """All columns that have a Scale in the log: the dense columns and the regression tasks."""
        return (*self.dense, *(task for task, kind in self.tasks.items() if kind == "regression"))

    @property
    def candidate_lists(self) -> tuple[str, ...]:
        """The request columns with one value per candidate."""
        lists = (self.tasks, self.candidate_dense, self.candidate_tags, self.candidate_features)
        return (CANDIDATES, EXPOSED, *(name for names in lists for name in names))


_DENSE = ("dense_features", "candidate_dense", "item_dense", "event_dense")
"""The fields that name number columns."""
_TABLES = (
    *("item_features", "context_features", "item_lists", "item_vectors"),
    *("event_features", "context_lists", "candidate_features"),
)
"""The fields that map names to a number of rows or columns."""


def _tags(candidate_tags: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    if not isinstance(candidate_tags, dict):
        raise LogError("schema: candidate_tags must map names to the names of their values")
    tags = {name: _names(values, f"{name!r}") for name, values in candidate_tags.items()}
    values = [value for of_tag in tags.values() for value in of_tag]
    for value in values:
        if value in _METRICS or values.count(value) > 1:
            raise LogError(
                f"schema: candidate_tags: {value!r} is given twice or is reserved, since metrics are "
                "named after the values (gauc_VALUE); rename it"
            )
    return tags


def _names(values: Any, where: str) -> tuple[str, ...]:
    if not isinstance(values, (tuple, list)):
        raise LogError(f"schema: {where} must be a tuple of names, got {values!r}")
    return tuple(values)


def _kinds(tasks: Any) -> dict[str, TaskKind]:
    if isinstance(tasks, (tuple, list)):
        tasks = dict.fromkeys(tasks, "binary")
    kinds = typing.get_args(TaskKind)
    if not isinstance(tasks, dict) or not all(kind in kinds for kind in tasks.values()):
        raise LogError(f"schema: tasks must map each name to one of {list(kinds)}, got {tasks!r}")
    return tasks


def _table_rows(features: Any, where: str) -> dict[str, int]:
    if not isinstance(features, dict):
        raise LogError(
            f"schema: {where} must map names to numbers, like {{'item': 1000}}, got {features!r}"
        )
    counted = "columns" if where == "item_vectors" else "table rows"
    for name, rows in features.items():
        if not isinstance(rows, Integral) or isinstance(rows, bool) or rows < 1:
            raise LogError(
                f"schema: {where}: {name!r} has {rows!r} {counted}; expected an integer, 1 or more"
            )
    return {name: int(rows) for name, rows in features.items()}


def check_splits(names: Iterable[Any]) -> None:
    """Refuse split names that are not safe as file names in the log's folder.

    Raises:
        LogError: a name has a character other than letters, digits and ``_ - .``, begins with one of the
            last two, or is too long.

    Example:
        >>> from ifa_torchrec.data.schema import check_splits
        >>> check_splits(["train", "2024-05"])
    """
    for name in names:
        fits = isinstance(name, str) and re.fullmatch(r"\w[\w.-]*", name)
        if not fits or len(name) > _LONGEST_NAME:
            raise LogError(
                f"split {name!r}: a split's name must be at most {_LONGEST_NAME} letters, digits, _, - "
                "and ., and begin with a letter, a digit or _, like 'week-21'"
            )
