"""Find the events of each request's history in a log."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ifa_torchrec.data.event_log import EventLog

AT_ONCE = 1 << 20
"""The number of requests whose histories are looked up together, which bounds the memory. A split with
no more requests is looked up once."""


class Histories:
    """The rows of each request's history, in memory that does not grow with the number of requests.

    Args:
        log: the event log.
        users: [R] int64.
        times: [R] int64, microseconds.
        most: keep only this many of the latest events of a history; None for all.
        since: [R] int64, microseconds: only events from this time on; None for all.

    Example:
        >>> import numpy as np, pandas as pd, tempfile
        >>> from ifa_torchrec.data import EventLog, LogSchema
        >>> from ifa_torchrec.data.histories import Histories
        >>> log = EventLog.from_pandas(
        ...     tempfile.mkdtemp() + "/log",
        ...     events=pd.DataFrame({"user": [7, 7], "item": [1, 2], "time": pd.Timestamp(2024, 1, 1)}),
        ...     schema=LogSchema(item_features={"item": 3}))
        >>> histories = Histories(log, np.array([7, 8]), log.events["time"] + 1, most=1)
        >>> len(histories), histories.lengths(np.array([0, 1])).tolist()
        (2, [1, 0])
    """

    def __init__(
        self,
        log: EventLog,
        users: np.ndarray,
        times: np.ndarray,
        most: int | None = None,
        since: np.ndarray | None = None,
    ) -> None:
        self._log, self._users, self._times, self._most, self._since = log, users, times, most, since
        self._found = self._find(np.arange(len(users))) if len(users) <= AT_ONCE else None

    def __len__(self) -> int:
        return len(self._users)

    def ranges(self, requests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The event rows start:end of each request's history.

        Args:
            requests: [n] int64, request numbers.

        Returns:
            start and end, [n] int64.
        """
        if self._found is None:
            return self._find(requests)
        start, end = self._found
        return start[requests], end[requests]

    def lengths(self, requests: np.ndarray) -> np.ndarray:
        """[n] int64, the number of events in each request's history.

        Args:
            requests: [n] int64, request numbers.
        """
        start, end = self.ranges(requests)
        return end - start

    def _find(self, requests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        users = self._users[requests]
        start, end = self._log.history_range(users, self._times[requests])
        if self._most is not None:
            start = np.maximum(start, end - self._most)
        if self._since is not None:
            start = self._log.history_range(users, self._since[requests])[1]
        return start, end
