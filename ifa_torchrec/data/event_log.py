"""The event log: a folder of Parquet, opened as memory-mapped columns.

    LOG/
      schema.json            the columns and their scales; written last, so a folder without it is
                             incomplete
      events.parquet         user, time, item, event features; sorted by user, then time
      items.parquet          item features; row i describes item i, row 0 is "unknown"
      requests/SPLIT.parquet user, time, context features, and lists with one value per candidate
      vocabulary.json, vocabulary/   maps external ids to rows; see data/vocabulary.py
      .columns/              each column as a .npy file, created when the log is first opened

A log in parts has events/part-*.parquet and requests/SPLIT/part-*.parquet instead; see data/parts.py.

New items are those for which the item table has no row: training did not see them. They come after all
other items and use row 0 of the item table; their other features are used like those of any item.

Histories are never copied into requests: a request has a user and a time, and its history is the slice
of that user's events strictly before that time.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from ifa_torchrec.batch import Scale
from ifa_torchrec.data.checks import check_events, check_items, check_requests
from ifa_torchrec.data.columns import require_column
from ifa_torchrec.data.external import ExternalIds, check_columns, columns_of
from ifa_torchrec.data.header import Header, read_header, write_header
from ifa_torchrec.data.histories import AT_ONCE
from ifa_torchrec.data.log_items import LogItems
from ifa_torchrec.data.mapped_columns import MappedColumns
from ifa_torchrec.data.parts import (
    check_open,
    check_parts,
    check_users,
    found_parts,
    own_parts,
    part_of,
)
from ifa_torchrec.data.remote import RemoteLog, is_uri
from ifa_torchrec.data.scales import scales_of
from ifa_torchrec.data.schema import (
    CANDIDATES,
    LIST_OFFSETS,
    NAME,
    OFFSETS,
    TIME,
    USER,
    USER_OFFSETS,
    Columns,
    LogError,
    LogSchema,
    check_splits,
)
from ifa_torchrec.data.vocabulary import Vocabulary
from ifa_torchrec.data.writing import drafting, publish_folder, write_tables

_USERS_OF_PART = "users-of-part"  # not a valid column name in a schema


class EventLog(LogItems):
    """Events sorted by user and time, items, and requests, as memory-mapped columns.

    Args:
        path: the log's folder, or a URI of it (s3://, gs://, hdfs://, file://); see data/remote.py.
        shard: (rank, world size): the rank opens only its own parts if there are enough; see
            ``own_parts``. Events, requests and users are then those of these parts.

    Attributes:
        place: the path or URI, as given.
        path: the log's folder; for a URI, the local folder with copies of its small files.
        schema: the log's LogSchema.
        users: [U] int64, the users that have events, ascending; in a log in parts, part by part and
            ascending within each.
        user_offsets: [U + 1] int64, user u's events are rows user_offsets[u]:user_offsets[u + 1].
        scales: the scale that standardises each of ``schema.scaled``, computed on the split `train`.
        events: columns time [E] int64 (microseconds), the item number and the event features [E]
            int64; numbers and the weight [E] float32, NaN where a number is missing.
        items: the item features [I] int64; the numbers [I] float32, NaN where missing; the vectors
            [I, width] float32; for each list, its flat ids, int64, and NAME_offsets [I + 1] int64.
        num_items: I.
        parts: the number of parts in the log.
        own: the parts that are open.

    Raises:
        LogError: the folder is missing or incomplete; or a column is missing, null, of the wrong type,
            out of order or outside its table.

    Example:
        >>> import pandas as pd, tempfile
        >>> from ifa_torchrec.data import EventLog, LogSchema
        >>> days = pd.to_datetime(["2024-01-03", "2024-01-02", "2024-01-01"])
        >>> log = EventLog.from_pandas(
        ...     tempfile.mkdtemp() + "/log",
        ...     events=pd.DataFrame({"user": [2, 1, 1], "item": [1, 2, 3], "time": days}),
        ...     schema=LogSchema(item_features={"item": 4}))
        >>> log.users.tolist(), log.user_offsets.tolist(), log.events["item"].tolist()
        ([1, 2], [0, 2, 3], [3, 2, 1])
    """

    def __init__(self, path: str | Path, shard: tuple[int, int] = (0, 1)) -> None:
        place = str(path)
        remote = RemoteLog(place) if is_uri(path) else None
        path = Path(path) if remote is None else remote.folder
        if not path.is_dir():
            raise LogError(f"{path}: no such event log; write one with EventLog.from_pandas")
        self._header = header = read_header(path / "schema.json")
        schema, self.scales = header.schema, header.scales
        self.parts = len(header.parts.get("events", [None]))
        self.own, self._shard = own_parts(self.parts, shard), shard
        own = {name: {n: parts[n] for n in self.own} for name, parts in header.parts.items()}
        self._columns = MappedColumns(path, schema, header.rows, own, remote)
        items = self._columns.open("items", lambda table, _: check_items(table, schema))
        super().__init__(place, path, schema, items)
        self.events = self._columns.open("events", self._check_events, [USER_OFFSETS])
        # the index of the first user of each part
        self._bounds = np.append(0, np.cumsum(self.events.pop(_USERS_OF_PART, [len(self.events[USER])])))
        self.users = self.events.pop(USER)
        self.user_offsets = self.events.pop(USER_OFFSETS)

    @classmethod
    def from_pandas(
        cls,
        path: str | Path,
        events: pd.DataFrame,
        schema: LogSchema,
        items: pd.DataFrame | None = None,
        requests: Mapping[str, pd.DataFrame] | None = None,
        vocabulary: Vocabulary | None = None,
        parts: int = 1,
    ) -> EventLog:
        """Write a log from DataFrames (events in any order) and open it.

        The log appears at ``path`` only when it is complete. Each frame must have exactly the columns
        that the schema names; a missing number is NaN or null.

        Args:
            path: a folder that does not exist yet.
            events: columns user (int), time (datetime64, no zone or UTC), the item id (int), and the
                event features, numbers and weight.
            schema: names and table sizes.
            items: one row per item, row i for item i and row 0 for "unknown", with all item features
                and, optionally, the items' display names in a string column `name`; may be omitted if
                the item id is the only item feature.
            requests: for each split, a DataFrame with user, time, the context and dense columns,
                and one list per row in each candidate column and context list.
            vocabulary: the external ids. With it, the users, items and ids in the frames are external
                and are mapped to rows, 0 if not in the vocabulary; ids of names that it lacks, and all
                ids without it, are rows already. Items then come in any order, without row 0.
            parts: the number of parts that the events and the requests are split into, by a hash of
                the user; see data/parts.py.

        Raises:
            LogError: a column is missing, unknown, null, of the wrong type or outside its table; a split
                is empty, or its name is not a file name; the vocabulary lacks an item of ``items``, or
                the user of an event; or there is no space or no permission to write there.
            FileExistsError: ``path`` exists.
        """
        check_splits(requests or {})
        check_parts(parts)
        vocabulary = vocabulary or Vocabulary({})
        ids = ExternalIds(vocabulary, schema)
        named = columns_of(schema)
        with drafting(path) as draft:
            check_columns(events, named["events"], "events")
            for column in (USER, TIME):
                require_column(events.columns, column, "events")
            given = ids.events(events)
            events = given.sort_values([USER, TIME], kind="stable")
            if items is None:
                whole = vocabulary.completed(schema, schema.item_features[schema.item])
                items = pd.DataFrame({schema.item: np.arange(whole[schema.item].rows)})
            else:
                check_columns(items, named["items"], "items")
                items = ids.items(items)
            tables = {"events": events, "items": items}
            for split, frame in (requests or {}).items():
                check_columns(frame, named["requests"], f"requests/{split}")
                tables[f"requests/{split}"] = ids.requests(frame, f"requests/{split}")
            write_tables(draft, tables, parts)
            vocabulary.completed(schema, len(items)).save(draft)
            try:
                return cls.publish(draft, path, schema, list(requests or {}))
            except LogError as error:
                if not str(error).startswith("events") or events.index.equals(given.index):
                    raise
                raise LogError(f"{error} (rows as sorted by {USER} and {TIME})") from error

    @classmethod
    def publish(
        cls, draft: str | Path, path: str | Path, schema: LogSchema, splits: Sequence[str]
    ) -> EventLog:
        """Make a folder of Parquet files a log: write its schema.json, run every check, rename it.

        For programs that write the Parquet files themselves, in a folder of ``drafting``.

        Args:
            draft: a folder with events.parquet, items.parquet, requests/SPLIT.parquet for each split
                and, unless all ids are rows, a vocabulary (``Vocabulary.save``), as the module
                docstring describes; or with the files of data/parts.py. It must be on the same file
                system as ``path``.
            path: the final path of the log.
            schema: names and table sizes.
            splits: the splits, in the order in which to list them.

        Raises:
            LogError: a file is missing, a split's name is not a file name, a column does not match the
                schema, or the vocabulary belongs to another log.

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
        tables = ("events", *(f"requests/{split}" for split in splits))
        parts = found_parts(draft, tables)
        rows = {name: sum(part.rows for part in of_table) for name, of_table in parts.items()}
        for name in ("events", "items", *tables[1:]):
            file = draft / f"{name}.parquet"
            if name not in rows and not file.exists():
                raise LogError(f"{file}: the file is missing; write it before publishing the log")
            if name not in rows:
                rows[name] = pq.read_metadata(file).num_rows
        if not (draft / "vocabulary.json").exists():
            Vocabulary.numbered(schema, rows["items"]).save(draft)
        unscaled = {name: Scale() for name in schema.scaled}
        header = Header(schema, rows, unscaled, Vocabulary.load(draft).digest, parts)
        write_header(draft / "schema.json", header)
        log = cls(draft)  # every check runs before the log is published
        log.vocabulary.check(schema, log.num_items)
        for split in splits:
            log.requests(split)
        header = dataclasses.replace(header, scales=scales_of(log))
        write_header(draft / "schema.json", header)
        publish_folder(draft, path)
        return cls(path)

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the log itself: memory-mapped columns are not pickled."""
        return _opened, (self.place, self.schema, self._shard)

    @property
    def whole(self) -> bool:
        """Whether all parts are open."""
        return len(self.own) == self.parts

    def fingerprint(self) -> str:
        """A digest of the schema, all columns of all tables (or the files of their parts) and the
        vocabulary; identifies the log, and is the same on all ranks."""
        if self._header.parts:
            digests = [self._columns.digests["items"], sorted(self._header.parts.items())]
        else:
            for split in self.splits:
                self.requests(split)
            digests = sorted(self._columns.digests.items())
        content = (self.schema, digests, self.vocabulary.digest)
        return hashlib.sha256(repr(content).encode()).hexdigest()[:16]

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The mapping of external ids to rows.

        Raises:
            LogError: it is missing, damaged, or not the one that the log was written with.
        """
        vocabulary = Vocabulary.load(self.path)
        if vocabulary.digest != self._header.vocabulary:
            raise LogError(
                f"{self.place}: vocabulary.json is not the one that the log was written with; restore "
                "that one, or write the log again"
            )
        return vocabulary

    def new_items(self, split: str) -> dict[str, float]:
        """The share of items for which the item table has no row, including row 0, "unknown".

        Args:
            split: name of the request split.

        Returns:
            The share in the split's `candidates`, and in the `events` of its histories; 0 if empty.

        Example:
            >>> import pandas as pd, tempfile
            >>> from ifa_torchrec.data import EventLog, LogSchema
            >>> day = lambda d: pd.Timestamp(2024, 1, d)
            >>> log = EventLog.from_pandas(tempfile.mkdtemp() + "/log",
            ...     events=pd.DataFrame({"user": [7], "item": [1], "time": [day(1)]}),
            ...     items=pd.DataFrame({"item": [0, 1, 2, 3]}), schema=LogSchema({"item": 3}),
            ...     requests={"test": pd.DataFrame({"user": [7], "time": [day(2)],
            ...         "candidates": [[2, 3]], "exposed": [[True, True]], "label": [[1, 0]]})})
            >>> log.new_items("test")
            {'candidates': 0.5, 'events': 0.0}
        """
        requests = self.requests(split)
        start, end = self.history_range(requests[USER], requests[TIME])
        before = np.append(0, np.cumsum(self.item_rows(self.events[self.schema.item]) == 0))
        of_events = (before[end] - before[start]).sum() / max((end - start).sum(), 1)
        of_candidates = (self.item_rows(requests[CANDIDATES]) == 0).mean()
        return {"candidates": float(of_candidates), "events": float(of_events)}

    @property
    def splits(self) -> list[str]:
        """Names of the request splits."""
        return [n.removeprefix("requests/") for n in self._header.rows if n.startswith("requests/")]

    def requests_of_parts(self, split: str) -> list[int]:
        """The number of requests of a split in each part of the log, open or not.

        Raises:
            LogError: the log has no such split.
        """
        self._check_split(split)
        parts = self._header.parts.get(f"requests/{split}")
        return [part.rows for part in parts] if parts else [self._header.rows[f"requests/{split}"]]

    def item_names(self) -> list[str]:
        """The display name of each item: the column `name` of the items, else its external id, else its
        number."""
        file = pq.ParquetFile(self.path / "items.parquet")
        if NAME in file.schema_arrow.names:
            return file.read([NAME])[NAME].to_pylist()
        ids = self.vocabulary[self.schema.item].at(range(self.num_items))
        names = (number if known is None else known for number, known in enumerate(ids))
        return [f"{self.schema.item} {name}" for name in names]

    def requests(self, split: str) -> Columns:
        """The request columns of a split.

        Returns:
            user and time [R] int64, the context features [R] int64, the dense features [R] float32, for
            each context list its flat ids and NAME_offsets [R + 1] int64, candidate_offsets [R + 1]
            int64, and the candidate lists flat, [M]. A missing number is NaN.

        Raises:
            LogError: the log has no such split, or a column does not match the schema.
        """
        self._check_split(split)
        name = f"requests/{split}"
        if not self._header.rows[name]:
            raise LogError(f"{name}: there are no requests; leave out the split")
        offsets = [OFFSETS, *(f"{n}{LIST_OFFSETS}" for n in self.schema.context_lists)]

        def check(table: pa.Table, part: int) -> Columns:
            in_parts = self.parts > 1
            columns = check_requests(table, self.schema, self.num_items, name, may_be_empty=in_parts)
            if in_parts:
                check_users(columns[USER], part, self.parts)
            return columns

        return self._columns.open(name, check, offsets)

    def _check_split(self, split: str) -> None:
        if split not in self.splits:
            raise LogError(f"{self.place}: no split {split!r}; it has {self.splits}")

    def _check_events(self, table: pa.Table, part: int) -> Columns:
        columns = check_events(table, self.schema, self.num_items)
        if self.parts > 1:
            check_users(columns[USER], part, self.parts)
            columns[_USERS_OF_PART] = np.array([len(columns[USER])])
        return columns

    def history_range(self, user: np.ndarray, time: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the events of each user strictly before each time.

        Args:
            user: [R] int64; a user without events has an empty history.
            time: [R] int64, microseconds.

        Returns:
            start and end [R] int64: the history is ``events[...][start:end]``.

        Raises:
            LogError: a user's part is not open.

        Example:
            >>> import numpy as np, pandas as pd, tempfile
            >>> from ifa_torchrec.data import EventLog, LogSchema
            >>> days = pd.to_datetime(["2024-01-01", "2024-01-02"])
            >>> log = EventLog.from_pandas(
            ...     tempfile.mkdtemp() + "/log",
            ...     events=pd.DataFrame({"user": [7, 7], "item": [1, 2], "time": days}),
            ...     schema=LogSchema(item_features={"item": 3}))
            >>> second = days[1].value // 1000
            >>> start, end = log.history_range(np.array([7, 8]), np.array([second, second]))
            >>> (end - start).tolist()
            [1, 0]
        """
        start = np.zeros(len(user), dtype=np.int64)
        end = np.zeros(len(user), dtype=np.int64)
        if not self.whole:
            check_open(user, self.own, self.parts)
        if not len(self.users):
            return start, end
        for first in range(0, len(user), AT_ONCE):
            rows = slice(first, first + AT_ONCE)
            found = np.minimum(self._places(user[rows]), len(self.users) - 1)
            known = self.users[found] == user[rows]
            start[rows] = np.where(known, self.user_offsets[found], 0)
            end[rows] = np.where(known, self.user_offsets[found + 1], 0)
            end[rows] = _first_at(np.asarray(self.events[TIME]), start[rows], end[rows], time[rows])
        return start, end

    def _places(self, user: np.ndarray) -> np.ndarray:
        """The index of each user in ``users``, or where it would be inserted within its part."""
        if self.parts == 1:
            return np.searchsorted(self.users, user)
        part = part_of(user, self.parts) - self.own.start
        return _first_at(np.asarray(self.users), self._bounds[part], self._bounds[part + 1], user)


def _opened(place: str, schema: LogSchema, shard: tuple[int, int]) -> EventLog:
    log = EventLog(place, shard)
    log.schema = schema
    return log


def _first_at(values: np.ndarray, start: np.ndarray, end: np.ndarray, value: np.ndarray) -> np.ndarray:
    """The first row of each range whose value is at least ``value``, else its end; values ascend."""
    low, high = start.copy(), end.copy()
    while len(open_ := np.flatnonzero(low < high)):
        middle = (low[open_] + high[open_]) // 2
        before = values[middle] < value[open_]
        low[open_[before]] = middle[before] + 1
        high[open_[~before]] = middle[~before]
    return low
