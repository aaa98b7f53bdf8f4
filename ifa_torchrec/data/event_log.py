"""The event log: a folder of Parquet, opened as memory-mapped columns.

    LOG/
      schema.json            what the columns are; written last, so a folder without it is half written
      events.parquet         user, time, item; sorted by user, then time
      items.parquet          the id features of each item; row i describes item i
      requests/SPLIT.parquet user, time, context, and per candidate lists
      codes/FEATURE.parquet  of a prepared log: each id (as text) and the row that stands for it
      .columns/              each column as a .npy file, made at the first opening

A history is never copied into a request: a request names a user and a time, and its history is
the slice of that user's events that lie strictly before that time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from ifa_torchrec.data.checks import check_events, check_items, check_requests, require_column
from ifa_torchrec.data.codes import codes_digest
from ifa_torchrec.data.mapped_columns import MappedColumns
from ifa_torchrec.data.schema import (
    TIME,
    USER,
    Columns,
    LogError,
    LogSchema,
    check_splits,
    read_header,
    write_header,
)
from ifa_torchrec.data.writing import drafting, write_tables


class EventLog:
    """Events sorted by user and time, items, and requests, as memory-mapped columns.

    Args:
        path: the log's folder.

    Attributes:
        schema: the log's LogSchema.
        users: [U] int64, the users that have events, ascending.
        user_offsets: [U + 1] int64, user u's events are rows user_offsets[u]:user_offsets[u + 1].
        events: columns time [E] int64 (microseconds) and the item id [E] int64.
        items: one column [I] int64 for each item feature.
        num_items: I.

    Raises:
        LogError: the folder is missing, half written, or a column is missing, of the wrong
            type, null, out of order or outside its table.

    Example:
        >>> import pandas as pd, tempfile
        >>> from ifa_torchrec.data import EventLog, LogSchema
        >>> days = pd.to_datetime(["2024-01-03", "2024-01-02", "2024-01-01"])
        >>> log = EventLog.from_pandas(
        ...     tempfile.mkdtemp() + "/log",
        ...     events=pd.DataFrame({"user": [2, 1, 1], "item": [0, 1, 2], "time": days}),
        ...     schema=LogSchema(item_features={"item": 3}))
        >>> log.users.tolist(), log.user_offsets.tolist(), log.events["item"].tolist()
        ([1, 2], [0, 2, 3], [2, 1, 0])
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise LogError(f"{self.path}: no such event log; write one with EventLog.from_pandas")
        self.schema, self._rows = read_header(self.path / "schema.json")
        self._columns = MappedColumns(self.path, self.schema, self._rows)
        self.items = self._columns.open("items", lambda table: check_items(table, self.schema))
        self.num_items = len(self.items[self.schema.item])
        self.events = self._columns.open(
            "events", lambda table: check_events(table, self.schema, self.num_items)
        )
        user = self.events.pop(USER)
        self.users, starts = np.unique(user, return_index=True)
        self.user_offsets = np.append(starts, len(user)).astype(np.int64)

    @classmethod
    def from_pandas(
        cls,
        path: str | Path,
        events: pd.DataFrame,
        schema: LogSchema,
        items: pd.DataFrame | None = None,
        requests: Mapping[str, pd.DataFrame] | None = None,
    ) -> EventLog:
        """Write a log from DataFrames (events in any order) and open it.

        The log appears under ``path`` only when it is complete.

        Args:
            path: a folder that does not exist yet.
            events: columns user (int), time (datetime64, no zone or UTC) and the item id (int).
            schema: names and table sizes.
            items: one row an item, row i for item i, with the item features and, where there are
                any, what to call the items in a string column `name`; may be left out when the
                item id is the only item feature.
            requests: for each split, a DataFrame with user, time, the context and dense columns,
                and a list a row in each of the candidate columns.

        Raises:
            LogError: a column is missing, null, of the wrong type or outside its table; a split is
                empty, or its name is no file name; or there is no room, or no right, to write there.
            FileExistsError: ``path`` exists.
        """
        path = Path(path)
        check_splits(requests or {})
        if items is None:
            items = pd.DataFrame({schema.item: np.arange(schema.item_features[schema.item])})
        with drafting(path) as draft:
            for column in (USER, TIME):
                require_column(events.columns, column, "events")
            tables = {"events": events.sort_values([USER, TIME], kind="stable"), "items": items}
            tables |= {f"requests/{split}": frame for split, frame in (requests or {}).items()}
            write_tables(draft, tables)
            return cls.publish(draft, path, schema, list(requests or {}))

    @classmethod
    def publish(
        cls, draft: str | Path, path: str | Path, schema: LogSchema, splits: Sequence[str]
    ) -> EventLog:
        """Make a log of a folder of Parquet files: write its schema.json, run every check, rename it.

        For programs that write the Parquet files themselves, in a folder of ``drafting``.

        Args:
            draft: a folder with events.parquet, items.parquet and requests/SPLIT.parquet for each
                split, as the module describes them; on the file system of ``path``.
            path: what the folder will be called.
            schema: names and table sizes.
            splits: the splits, in the order in which they are to be listed.

        Raises:
            LogError: a file is missing, a split's name is no file name, or a column is not what the
                schema says.

        Example:
            >>> import pandas as pd, tempfile
            >>> from pathlib import Path
            >>> from ifa_torchrec.data import EventLog, LogSchema
            >>> from ifa_torchrec.data.writing import drafting
            >>> path = Path(tempfile.mkdtemp()) / "log"
            >>> day = pd.Timestamp(2024, 1, 1)
            >>> with drafting(path) as draft:
            ...     pd.DataFrame({"item": [0, 1]}).to_parquet(draft / "items.parquet")
            ...     events = pd.DataFrame({"user": [7], "time": [day], "item": [1]})
            ...     events.to_parquet(draft / "events.parquet")
            ...     log = EventLog.publish(draft, path, LogSchema(item_features={"item": 2}), splits=[])
            >>> log.events["item"].tolist()
            [1]
        """
        check_splits(splits)
        draft = Path(draft)
        files = {
            name: draft / f"{name}.parquet"
            for name in ("events", "items", *(f"requests/{s}" for s in splits))
        }
        for file in files.values():
            if not file.exists():
                raise LogError(f"{file}: missing; write it before the log is published")
        rows = {name: pq.read_metadata(file).num_rows for name, file in files.items()}
        write_header(draft / "schema.json", schema, rows)
        log = cls(draft)  # every check runs before the log is published
        for split in splits:
            log.requests(split)
        draft.rename(path)
        return cls(path)

    def fingerprint(self) -> str:
        """A digest of the schema, of all columns of all tables and of the codes, to tell logs apart."""
        for split in self.splits:
            self.requests(split)
        content = (self.schema, sorted(self._columns.digests.items()), sorted(self.codes().items()))
        return hashlib.sha256(repr(content).encode()).hexdigest()[:16]

    def codes(self) -> dict[str, str]:
        """For each feature, a digest of which id has which row of its table.

        A model's tables mean something for logs of the same codes only. Features that have no
        LOG/codes/FEATURE.parquet (in logs of ``from_pandas`` none has) are left out: their numbers are
        their ids. What is hashed has no list of ids, the same id has the same row everywhere.

        Raises:
            LogError: a file of codes is not readable.
        """
        features = [*self.schema.item_features, *self.schema.context_features]
        files = {feature: self.path / "codes" / f"{feature}.parquet" for feature in features}
        return {feature: codes_digest(file) for feature, file in files.items() if file.exists()}

    @property
    def splits(self) -> list[str]:
        """Names of the request splits."""
        return [n.removeprefix("requests/") for n in self._rows if n.startswith("requests/")]

    def item_names(self) -> list[str]:
        """What to call each item: the items' column `name`, or else the item's number."""
        file = pq.ParquetFile(self.path / "items.parquet")
        if "name" in file.schema_arrow.names:
            return file.read(["name"])["name"].to_pylist()
        return [f"{self.schema.item} {i}" for i in range(self.num_items)]

    def requests(self, split: str) -> Columns:
        """The request columns of a split.

        Returns:
            user and time [R] int64, the context features [R] int64, the dense features [R]
            float32, candidate_offsets [R + 1] int64 and the candidate lists flat, [M].

        Raises:
            LogError: no such split, or a column is not what the schema says.
        """
        if split not in self.splits:
            raise LogError(f"{self.path}: no split {split!r}, there are {self.splits}")
        name = f"requests/{split}"
        return self._columns.open(
            name, lambda table: check_requests(table, self.schema, self.num_items, name)
        )

    def history_range(self, user: np.ndarray, time: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the events of each user strictly before each time.

        Args:
            user: [R] int64; a user without events has an empty history.
            time: [R] int64, microseconds.

        Returns:
            start and end [R] int64: the history is ``events[...][start:end]``.

        Example:
            >>> import numpy as np, pandas as pd, tempfile
            >>> from ifa_torchrec.data import EventLog, LogSchema
            >>> days = pd.to_datetime(["2024-01-01", "2024-01-02"])
            >>> log = EventLog.from_pandas(
            ...     tempfile.mkdtemp() + "/log",
            ...     events=pd.DataFrame({"user": [7, 7], "item": [0, 1], "time": days}),
            ...     schema=LogSchema(item_features={"item": 2}))
            >>> second = days[1].value // 1000
            >>> start, end = log.history_range(np.array([7, 8]), np.array([second, second]))
            >>> (end - start).tolist()
            [1, 0]
        """
        start = np.zeros(len(user), dtype=np.int64)
        end = np.zeros(len(user), dtype=np.int64)
        order = np.argsort(user, kind="stable")
        distinct, first = np.unique(user[order], return_index=True)
        # the part before the first user is empty; where there are no users, it is the only one
        for who, rows in zip(distinct, np.split(order, first)[1:], strict=True):
            u = np.searchsorted(self.users, who)
            if u == len(self.users) or self.users[u] != who:
                continue
            lo, hi = self.user_offsets[u], self.user_offsets[u + 1]
            start[rows] = lo
            end[rows] = lo + np.searchsorted(self.events[TIME][lo:hi], time[rows], side="left")
        return start, end
