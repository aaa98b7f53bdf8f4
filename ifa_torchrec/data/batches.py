"""Convert numpy columns to the tensors of a batch; shared by the loader and by serving."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import pandas as pd
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from ifa_torchrec.data.schema import LIST_OFFSETS, Columns, LogSchema

_LONG = 256
"""Mean rows per range from which copying whole ranges is faster than gathering their rows."""


def item_fields(
    items: Columns, schema: LogSchema, history: np.ndarray, candidates: np.ndarray
) -> dict[str, Any]:
    """The fields of RankingFeatures that describe the distinct items of a batch beyond their ids.

    Empty if the schema has no item lists, numbers or vectors.

    Args:
        items: the log's item columns.
        schema: the log's schema.
        history: [N] int64, the item number of each history event.
        candidates: [M] int64, the item number of each candidate.

    Example:
        >>> import numpy as np
        >>> from ifa_torchrec.data import LogSchema
        >>> from ifa_torchrec.data.batches import item_fields
        >>> schema = LogSchema(item_features={"item": 3}, item_dense=("price",))
        >>> price = np.array([np.nan, 5.0, 7.0], np.float32)
        >>> fields = item_fields({"price": price}, schema, np.array([2, 1, 2]), np.array([2]))
        >>> fields["item_dense"].tolist(), fields["history_items"].tolist()
        ([[7.0], [5.0]], [0, 1, 0])
    """
    if not (schema.item_lists or schema.item_dense or schema.item_vectors):
        return {}
    places, distinct = pd.factorize(np.concatenate([history, candidates]))
    distinct = np.asarray(distinct) if len(distinct) else np.zeros(1, np.int64)  # a KJT needs a row
    fields: dict[str, Any] = {
        "history_items": tensor(places[: len(history)]),
        "candidate_items": tensor(places[len(history) :]),
    }
    if schema.item_lists:
        lists = {name: lists_of(items, name, distinct) for name in schema.item_lists}
        ids = {name: values for name, (values, _) in lists.items()}
        fields["item_lists"] = jagged(ids, [lengths for _, lengths in lists.values()])
    if schema.item_dense:
        fields["item_dense"] = stacked([items[name].take(distinct) for name in schema.item_dense], 0)
    if schema.item_vectors:
        vectors = [items[name].take(distinct, axis=0) for name in schema.item_vectors]
        fields["item_vectors"] = tensor(np.concatenate(vectors, axis=1))
    return fields


class Ranges:
    """The rows start[i]:end[i] of columns, one range after the other.

    Args:
        start, end: [R] int64.

    Attributes:
        lengths: [R] int64, the number of rows in each range.
        total: the number of rows in all ranges.

    Example:
        >>> import numpy as np
        >>> from ifa_torchrec.data.batches import Ranges
        >>> ranges = Ranges(np.array([5, 0]), np.array([7, 1]))
        >>> ranges.lengths.tolist(), ranges.of(np.arange(10) * 10).tolist()
        ([2, 1], [50, 60, 0])
    """

    def __init__(self, start: np.ndarray, end: np.ndarray) -> None:
        self.lengths = end - start
        self._start, self._end, self._until = start, end, self.lengths.cumsum()
        self.total = int(self._until[-1]) if len(start) else 0

    def of(self, column: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Take the rows of the ranges from a column.

        Args:
            column: [n].
            out: [total], of the column's dtype, to write to; None allocates it.
        """
        if self.total < _LONG * len(self.lengths):
            return column.take(self.rows, out=out, mode="clip")  # "raise" would write to a buffer first
        return np.concatenate([column[:0], *map(column.__getitem__, self._slices)], out=out)

    @cached_property
    def _slices(self) -> list[slice]:
        return list(map(slice, self._start.tolist(), self._end.tolist()))

    @cached_property
    def rows(self) -> np.ndarray:
        """[total] int64, the row numbers."""
        rows = (self._end - self._until).repeat(self.lengths)
        rows += np.arange(self.total)
        return rows


def lists_of(columns: Columns, name: str, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ids of the lists in the given rows, concatenated, and the length of each list.

    Example:
        >>> import numpy as np
        >>> from ifa_torchrec.data.batches import lists_of
        >>> columns = {"genre": np.array([4, 5, 6]), "genre_offsets": np.array([0, 0, 2, 3])}
        >>> [values.tolist() for values in lists_of(columns, "genre", np.array([2, 1]))]
        [[6, 4, 5], [1, 2]]
    """
    offsets = columns[f"{name}{LIST_OFFSETS}"]
    lists = Ranges(offsets.take(rows), offsets[1:].take(rows))
    return lists.of(columns[name]), lists.lengths


def jagged(ids: Mapping[str, np.ndarray], lengths: Sequence[np.ndarray]) -> KeyedJaggedTensor:
    """A KeyedJaggedTensor from the ids and the lengths of each key.

    Example:
        >>> import numpy as np
        >>> from ifa_torchrec.data.batches import jagged
        >>> jagged({"store": np.array([4, 7])}, [np.array([1, 1])]).stride()
        2
    """
    if not ids:
        return _no_ids()
    sizes = {name: len(of_key) for name, of_key in ids.items()}
    return jagged_of(sizes, np.concatenate(list(ids.values())), lengths)


@cache
def _no_ids() -> KeyedJaggedTensor:
    """A KeyedJaggedTensor without keys; one for all batches, because creating it is slow."""
    return jagged_of({}, np.empty(0, np.int64), [])


def jagged_of(
    sizes: Mapping[str, int], values: np.ndarray, lengths: Sequence[np.ndarray]
) -> KeyedJaggedTensor:
    """A KeyedJaggedTensor from the concatenated ids of all keys, and the lengths of each key.

    Args:
        sizes: the number of ids of each key.
        values: int64, the ids, key by key.
        lengths: [B] int64 for each key.

    Example:
        >>> import numpy as np
        >>> from ifa_torchrec.data.batches import jagged_of
        >>> sizes, lengths = {"a": 1, "b": 2}, [np.array([1]), np.array([2])]
        >>> jagged_of(sizes, np.array([4, 7, 9]), lengths)["b"].values()
        tensor([7, 9])
    """
    ids = list(sizes.values())
    return KeyedJaggedTensor(
        keys=list(sizes),
        values=tensor(values),
        lengths=tensor(np.concatenate([np.empty(0, np.int64), *lengths])),
        stride=len(lengths[0]) if lengths else 0,
        length_per_key=ids,  # otherwise TorchRec computes them on first use
        offset_per_key=[0, *accumulate(ids)],
    )


def parts_of(sizes: Mapping[str, int]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Allocate memory for the ids of all keys, and a view of it for each key.

    Ids written to the views need no copy to concatenate them.

    Args:
        sizes: the number of ids of each key.

    Returns:
        The whole memory, int64, not initialised, and the view of each key.

    Example:
        >>> from ifa_torchrec.data.batches import parts_of
        >>> values, parts = parts_of({"a": 1, "b": 2})
        >>> parts["a"][:], parts["b"][:] = 4, (7, 9)
        >>> values.tolist()
        [4, 7, 9]
    """
    bounds = list(accumulate(sizes.values(), initial=0))
    values = np.empty(bounds[-1], np.int64)
    places = zip(sizes, pairwise(bounds), strict=True)
    return values, {name: values[start:end] for name, (start, end) in places}


def stacked(columns: Sequence[np.ndarray], rows: int) -> torch.Tensor:
    """Stack columns side by side, [rows, columns]; float32 if there are no columns.

    Example:
        >>> import numpy as np
        >>> from ifa_torchrec.data.batches import stacked
        >>> stacked([], 3).shape
        torch.Size([3, 0])
    """
    if len(columns) == 1:
        return tensor(columns[0].reshape(-1, 1))
    return tensor(np.stack(columns, axis=1) if columns else np.empty((rows, 0), np.float32))


def tensor(values: np.ndarray) -> torch.Tensor:
    """Convert an array to a tensor; contiguous memory is shared, not copied.

    Example:
        >>> import numpy as np
        >>> from ifa_torchrec.data.batches import tensor
        >>> tensor(np.arange(4)[::2]).tolist()
        [0, 2]
    """
    return torch.from_numpy(np.ascontiguousarray(values))
