"""What describes the items of a batch beyond their ids, once for each distinct one."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from ifa_torchrec.data.schema import Columns, LogSchema


def item_fields(
    items: Columns, schema: LogSchema, history: np.ndarray, candidates: np.ndarray
) -> dict[str, Any]:
    """The fields of RankingFeatures that say what items are like beyond their ids: none, if nothing does.

    Args:
        items: the columns of the log's items.
        schema: which of them there are.
        history: [N] int64, numbers of the events' items, all of which are described.
        candidates: [M] int64, of the candidates' items.

    Example:
        >>> import numpy as np
        >>> from ifa_torchrec.data import LogSchema
        >>> from ifa_torchrec.data.item_fields import item_fields
        >>> schema = LogSchema(item_features={"item": 3}, item_dense=("price",))
        >>> price = np.array([np.nan, 5.0, 7.0], np.float32)
        >>> fields = item_fields({"price": price}, schema, np.array([2, 1, 2]), np.array([2]))
        >>> fields["item_dense"].tolist(), fields["history_items"].tolist()
        ([[5.0], [7.0]], [1, 0, 1])
    """
    if not (schema.item_lists or schema.item_dense or schema.item_vectors):
        return {}
    distinct, place = np.unique(np.concatenate([history, candidates]), return_inverse=True)
    fields: dict[str, Any] = {
        "history_items": torch.from_numpy(place[: len(history)]),
        "candidate_items": torch.from_numpy(place[len(history) :]),
    }
    if schema.item_lists:
        values, lengths = [], []
        for name in schema.item_lists:
            start, end = (items[f"{name}_offsets"][distinct + k] for k in (0, 1))
            lengths.append(end - start)
            first = np.cumsum(lengths[-1]) - lengths[-1]
            values.append(items[name][np.repeat(start - first, lengths[-1]) + np.arange(lengths[-1].sum())])
        fields["item_lists"] = KeyedJaggedTensor(
            list(schema.item_lists),
            torch.from_numpy(np.concatenate(values)),
            lengths=torch.from_numpy(np.concatenate(lengths)),
            stride=len(distinct),
        ).sync()
    if schema.item_dense:
        fields["item_dense"] = torch.from_numpy(np.stack([items[n][distinct] for n in schema.item_dense], 1))
    if schema.item_vectors:
        vectors = [items[name][distinct] for name in schema.item_vectors]
        fields["item_vectors"] = torch.from_numpy(np.concatenate(vectors, 1))
    return fields
