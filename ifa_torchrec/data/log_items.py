"""The items and the vocabulary of a log: the part of it that serving needs."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np

from ifa_torchrec.data.schema import Columns, LogSchema
from ifa_torchrec.data.vocabulary import Vocabulary


class LogItems:
    """The schema, items and vocabulary of a log; its events and requests need not be present.

    Args:
        place: the path or URI of the log.
        path: a folder that contains its vocabulary.
        schema: the log's schema.
        items: the log's item columns; see EventLog.

    Example:
        >>> import numpy as np
        >>> from pathlib import Path
        >>> from ifa_torchrec.data import LogSchema
        >>> from ifa_torchrec.data.log_items import LogItems
        >>> items = LogItems("mine", Path("mine"), LogSchema({"item": 3}), {"item": np.arange(4)})
        >>> items.num_items, items.item_rows(np.array([2, 3])).tolist()
        (4, [2, 0])
    """

    def __init__(self, place: str, path: Path, schema: LogSchema, items: Columns) -> None:
        self.place, self.path, self.schema, self.items = place, path, schema, items
        self.num_items = len(items[schema.item])

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The mapping of external ids to rows.

        Raises:
            LogError: it is missing or damaged.
        """
        return Vocabulary.load(self.path)

    def item_rows(self, items: np.ndarray) -> np.ndarray:
        """The row of each item in the item table: the item's number, or 0 for a new item.

        Args:
            items: item numbers, of any shape.
        """
        rows = self.schema.item_features[self.schema.item]
        return items if self.num_items <= rows else items * (items < rows)  # faster than np.where
