"""Columns of numpy as the tensors of a batch: what the loader and a server have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from ifa_torchrec.data.schema import LIST_OFFSETS, Columns, LogSchema


def item_fields(
    items: Columns, schema: LogSchema, history: np.ndarray, candidates: np.ndarray
) -> dict[str, Any]:
    """The fields of RankingFeatures that describe the distinct items of a batch beyond their ids; none
    where nothing does.

    Args:
        items: the columns of the log's items.
        schema: which of them there are.
        history: [N] int64, numbers of the events' items.
        candidates: [M] int64, of the candidates' items.

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
    distinct = np.asarray(distinct) if len(distinct) else np.zeros(1, np.int64)  # a KJT has a row
    fields: dict[str, Any] = {
        "history_items": tensor(places[: len(history)]),
        "candidate_items": tensor(places[len(history) :]),
    }
    if schema.item_lists:
        lists = {name: lists_of(items, name, distinct) for name in schema.item_lists}
        ids = {name: values for name, (values, _) in lists.items()}
        fields["item_lists"] = jagged(ids, [lengths for _, lengths in lists.values()])
    if schema.item_dense:
        fields["item_dense"] = stacked([items[name][distinct] for name in schema.item_dense], 0)
    if schema.item_vectors:
        vectors = [items[name][distinct] for name in schema.item_vectors]
        fields["item_vectors"] = tensor(np.concatenate(vectors, axis=1))
    return fields


def ranges(start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All integers of the ranges start[i]:end[i], one after the other, and each range's length.

    Example:
        >>> import numpy as np
        >>> from ifa_torchrec.data.batches import ranges
        >>> [values.tolist() for values in ranges(np.array([5, 0]), np.array([7, 1]))]
        [[5, 6, 0], [2, 1]]
    """
    lengths = end - start
    first = np.cumsum(lengths) - lengths
    return np.repeat(start - first, lengths) + np.arange(lengths.sum()), lengths


def lists_of(columns: Columns, name: str, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ids of the rows' lists, one after the other, and how many each has.

    Example:
        >>> import numpy as np
        >>> from ifa_torchrec.data.batches import lists_of
        >>> columns = {"genre": np.array([4, 5, 6]), "genre_offsets": np.array([0, 0, 2, 3])}
        >>> [values.tolist() for values in lists_of(columns, "genre", np.array([2, 1]))]
        [[6, 4, 5], [1, 2]]
    """
    offsets = columns[f"{name}{LIST_OFFSETS}"]
    places, lengths = ranges(offsets[rows], offsets[rows + 1])
    return columns[name][places], lengths


def jagged(ids: Mapping[str, np.ndarray], lengths: Sequence[np.ndarray]) -> KeyedJaggedTensor:
    """Of the ids of each key, and of the lengths of each.

    Example:
        >>> import numpy as np
        >>> from ifa_torchrec.data.batches import jagged
        >>> jagged({"store": np.array([4, 7])}, [np.array([1, 1])]).stride()
        2
    """
    return KeyedJaggedTensor.from_lengths_sync(
        keys=list(ids),
        values=tensor(np.concatenate([np.empty(0, np.int64), *ids.values()])),
        lengths=tensor(np.concatenate([np.empty(0, np.int64), *lengths])),
    )


def stacked(columns: Sequence[np.ndarray], rows: int) -> torch.Tensor:
    """Columns side by side, [rows, columns]; float32 where there are none.

    Example:
        >>> import numpy as np
        >>> from ifa_torchrec.data.batches import stacked
        >>> stacked([], 3).shape
        torch.Size([3, 0])
    """
    return tensor(np.stack(columns, axis=1) if columns else np.empty((rows, 0), np.float32))


def tensor(values: np.ndarray) -> torch.Tensor:
    """An array as a tensor.

    Example:
        >>> import numpy as np
        >>> from ifa_torchrec.data.batches import tensor
        >>> tensor(np.arange(4)[::2]).tolist()
        [0, 2]
    """
    return torch.from_numpy(np.ascontiguousarray(values))
