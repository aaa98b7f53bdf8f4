"""Replace the external ids in DataFrames by rows of their tables."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd

from ifa_torchrec.data.columns import require_column
from ifa_torchrec.data.schema import CANDIDATES, NAME, TIME, USER, LogError, LogSchema
from ifa_torchrec.data.vocabulary import Ids, Vocabulary


def check_columns(frame: pd.DataFrame, named: Iterable[str], where: str) -> None:
    """Refuse columns that the schema does not name: they would be ignored silently.

    Raises:
        LogError: the frame has such a column.

    Example:
        >>> import pandas as pd
        >>> from ifa_torchrec.data.external import check_columns
        >>> check_columns(pd.DataFrame({"user": [1]}), ["user", "time"], "events")
    """
    known = list(named)
    if unknown := [column for column in frame.columns if column not in known]:
        raise LogError(
            f"{where}: the schema does not name the columns {unknown}; add them to it, or drop them. "
            f"The schema names {known}"
        )


def columns_of(schema: LogSchema) -> dict[str, list[str]]:
    """The columns that each table may have according to the schema.

    Example:
        >>> from ifa_torchrec.data import LogSchema
        >>> from ifa_torchrec.data.external import columns_of
        >>> columns_of(LogSchema(item_features={"item": 3}))["events"]
        ['user', 'time', 'item']
    """
    weight = [] if schema.event_weight is None else [schema.event_weight]
    return {
        "events": [USER, TIME, schema.item, *schema.event_features, *schema.event_dense, *weight],
        "items": [
            *(*schema.item_features, *schema.item_lists, *schema.item_dense, *schema.item_vectors),
            NAME,
        ],
        "requests": [
            *(USER, TIME, *schema.context_features, *schema.context_lists, *schema.dense_features),
            *schema.candidate_lists,
        ],
    }


class ExternalIds:
    """Maps the ids in DataFrames to rows by a vocabulary; ids of names that it lacks are rows already.

    Args:
        vocabulary: the external ids.
        schema: the log's schema.

    Raises:
        LogError: the vocabulary has a name that is not in the schema.

    Example:
        >>> import pandas as pd
        >>> from ifa_torchrec.data import LogSchema
        >>> from ifa_torchrec.data.external import ExternalIds
        >>> from ifa_torchrec.data.vocabulary import Vocabulary
        >>> vocabulary = Vocabulary.of({"item": ["tea", "cup"]})
        >>> ids = ExternalIds(vocabulary, LogSchema(item_features={"item": 3}))
        >>> ids.items(pd.DataFrame({"item": ["cup", "tea"], "name": ["a cup", "tea"]}))["name"].tolist()
        ['unknown', 'tea', 'a cup']
    """

    def __init__(self, vocabulary: Vocabulary, schema: LogSchema) -> None:
        self._vocabulary, self._schema = vocabulary, schema
        if unknown := {*vocabulary.names} - {USER, *schema.tables}:
            raise LogError(
                f"vocabulary: it has ids of {sorted(unknown)}, which the schema does not name; expected "
                f"some of {[USER, *schema.tables]}"
            )

    def events(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Replace the ids of events by rows.

        Raises:
            LogError: a user is not in the vocabulary; all such users would share one history.
        """
        frame = self._mapped(frame, [USER, self._schema.item, *self._schema.event_features], "events")
        if self._ids(USER) is not None:
            unknown = np.flatnonzero(frame[USER].to_numpy() == 0)
            if len(unknown):
                raise LogError(
                    f"events: row {unknown[0]}, column {USER!r}: the user is not in the vocabulary; "
                    "add it with Vocabulary.extended, or drop the row"
                )
        return frame

    def items(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Replace the ids of items by rows, row i for item i; items not in the frame get empty values.

        Raises:
            LogError: an item is not in the vocabulary, or two rows describe the same item.
        """
        schema = self._schema
        frame = self._mapped(frame, schema.item_features, "items")
        frame = self._lists_mapped(frame, schema.item_lists, "items")
        ids = self._ids(schema.item)
        if ids is None:
            return frame
        number = frame[schema.item]
        for wrong, problem in (
            (number == 0, "the item is not in the vocabulary; add it with Vocabulary.extended"),
            (number.duplicated(), "an earlier row describes the same item; drop one of them"),
        ):
            if wrong.any():
                raise LogError(
                    f"items: row {wrong.to_numpy().argmax()}, column {schema.item!r}: {problem}"
                )
        missing = np.setdiff1d(np.arange(ids.rows), number)
        nothing = pd.DataFrame({schema.item: missing})
        for name in frame.columns.drop(schema.item):
            if name in schema.item_features:
                nothing[name] = 0
            elif name in schema.item_lists:
                nothing[name] = [[] for _ in missing]
            elif name in schema.item_vectors:
                nothing[name] = [[0.0] * schema.item_vectors[name] for _ in missing]
            elif name == NAME:
                nothing[name] = "unknown"
        return pd.concat([frame, nothing]).sort_values(schema.item, ignore_index=True)

    def requests(self, frame: pd.DataFrame, where: str) -> pd.DataFrame:
        """Replace the ids of requests by rows."""
        schema = self._schema
        frame = self._mapped(frame, [USER, *schema.context_features], where)
        return self._lists_mapped(
            frame, [CANDIDATES, *schema.candidate_features, *schema.context_lists], where
        )

    def _ids(self, column: str) -> Ids | None:
        """The vocabulary's ids for a column; None if its values are rows already."""
        name = self._schema.item if column == CANDIDATES else column
        ids = self._vocabulary[name] if name in self._vocabulary.names else None
        return None if ids is None or ids.kind == "numbered" else ids

    def _mapped(self, frame: pd.DataFrame, columns: Iterable[str], where: str) -> pd.DataFrame:
        new: dict[str, np.ndarray] = {}
        for column in columns:
            require_column(frame.columns, column, where)
            if (ids := self._ids(column)) is not None:
                new[column] = _rows(frame[column], ids, column, where)
        return frame.assign(**new)

    def _lists_mapped(self, frame: pd.DataFrame, columns: Iterable[str], where: str) -> pd.DataFrame:
        new: dict[str, pd.Series] = {}
        for column in columns:
            require_column(frame.columns, column, where)
            if (ids := self._ids(column)) is None:
                continue
            for row, values in enumerate(frame[column]):
                if not isinstance(values, (list, tuple, np.ndarray)):
                    raise LogError(
                        f"{where}: row {row}, column {column!r} is {values!r}, expected a list"
                    )
            lengths = [len(values) for values in frame[column]]
            flat = [value for values in frame[column] for value in values]
            rows = _rows(pd.Series(flat, dtype=None if flat else "int64"), ids, column, where)
            parts = np.split(rows, np.cumsum(lengths)[:-1])
            new[column] = pd.Series(parts if lengths else [], frame.index, dtype=object)
        return frame.assign(**new)


def _rows(values: pd.Series, ids: Ids, column: str, where: str) -> np.ndarray:
    """The row of each external id; 0 if it is missing."""
    places, distinct = pd.factorize(values)  # looks up each id once
    for place, identifier in enumerate(distinct):
        if isinstance(identifier, bool) or not isinstance(identifier, (str, int, np.integer)):
            row = int(np.flatnonzero(places == place)[0])
            raise LogError(
                f"{where}: row {row}, column {column!r}: the id {identifier!r} is neither a string nor "
                "an integer; if some integers are missing, use the pandas type 'Int64'"
            )
    return np.append(ids.rows_of(list(distinct)), 0)[places]
