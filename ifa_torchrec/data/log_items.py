"""What a log says of its items and its ids: all that serving needs of one."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np

from ifa_torchrec.data.schema import Columns, LogSchema
from ifa_torchrec.data.vocabulary import Vocabulary


class LogItems:
    """The schema, items and vocabulary of a log, whose events and requests may be elsewhere.

    Args:
        place: what the log goes by.
        path: a folder that has its vocabulary.
        schema: the log's.
        items: the columns of its items; see EventLog.

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
        """Which external id has which row.

        Raises:
            LogError: it is missing or damaged.
        """
        return Vocabulary.load(self.path)

    def item_rows(self, items: np.ndarray) -> np.ndarray:
        """The row of each item in the item's table: its number, and 0 where it is new.

        Args:
            items: numbers of items, of any shape.
        """
        rows = self.schema.item_features[self.schema.item]
        return items if self.num_items <= rows else items * (items < rows)  # faster than np.where
