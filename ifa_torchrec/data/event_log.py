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

import dataclasses
import hashlib
import json
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from ifa_torchrec.data.columns import _flatten, _floats, _ids, _require, _times, _values
from ifa_torchrec.data.files import _codes_digest, _draft, _lock, _see, _seen, drafting
from ifa_torchrec.data.schema import (
    CANDIDATES,
    EXPOSED,
    FORMAT,
    TIME,
    USER,
    Columns,
    LogError,
    LogSchema,
    _read_header,
    check_splits,
)


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
        self.schema, self._rows = _read_header(self.path / "schema.json")
        self._digests: dict[str, str] = {}  # of the columns of each table
        self._clear_drafts()
        self.items = self._open("items", self._check_items)
        self.events = self._open("events", self._check_events)
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
                _require(events.columns, column, "events")
            events = events.sort_values([USER, TIME], kind="stable")
            tables = {"events": events, "items": items}
            tables |= {f"requests/{split}": frame for split, frame in (requests or {}).items()}
            for name, frame in tables.items():
                try:
                    table = pa.Table.from_pandas(frame, preserve_index=False)
                except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
                    raise LogError(f"{name}: a column holds values of several types: {error}") from error
                except OverflowError as error:
                    raise LogError(
                        f"{name}: a column holds a number beyond an int64: {error}"
                    ) from error
                pq.write_table(table, draft / f"{name}.parquet", write_page_checksum=True)
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
            >>> from ifa_torchrec.data.files import drafting
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
        header = {
            "format": FORMAT,
            "schema": dataclasses.asdict(schema),
            "rows": {name: pq.read_metadata(file).num_rows for name, file in files.items()},
        }
        (draft / "schema.json").write_text(json.dumps(header, indent=2))
        log = cls(draft)  # every check runs before the log is published
        for split in splits:
            log.requests(split)
        draft.rename(path)
        return cls(path)

    def fingerprint(self) -> str:
        """A digest of the schema, of all columns of all tables and of the codes, to tell logs apart."""
        for split in self.splits:
            self.requests(split)
        content = (self.schema, sorted(self._digests.items()), sorted(self.codes().items()))
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
        return {feature: _codes_digest(file) for feature, file in files.items() if file.exists()}

    @property
    def splits(self) -> list[str]:
        """Names of the request splits."""
        return [n.removeprefix("requests/") for n in self._rows if n.startswith("requests/")]

    def item_names(self) -> list[str]:
        """What to call each item: the items' column `name`, or else the item's number."""
        file = pq.ParquetFile(self.path / "items.parquet")
        if "name" in file.schema_arrow.names:
            return file.read(["name"])["name"].to_pylist()
        return [f"{self.schema.item} {i}" for i in range(len(self.items[self.schema.item]))]

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
        return self._open(f"requests/{split}", self._check_requests)

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

    # ---------------------------------------------------------------- reading and checking

    def _open(self, name: str, read: Callable[[str, pa.Table], Columns]) -> Columns:
        """Columns of one Parquet file, from .columns/; made there first where they are not of it."""
        parquet = self.path / f"{name}.parquet"
        if not parquet.exists():
            raise LogError(f"{parquet}: missing; the log is incomplete, write it again")
        columns = self._load(name)
        if columns is not None:
            return columns
        root = self.path / ".columns"
        try:
            root.mkdir(exist_ok=True)
            with _lock(root):
                columns = self._load(name)  # another process may have made them meanwhile
                if columns is None:
                    self._make(name, read)
                    columns = self._load(name)
        except OSError as error:
            raise LogError(
                f"{root}: the columns of {parquet} must be made there, which failed ({error}); make "
                "room, open the log once where it can be written, or copy it to such a place"
            ) from error
        if columns is None:
            raise LogError(f"{parquet}: it changed while it was read; open the log again")
        return columns

    def _load(self, name: str) -> Columns | None:
        """The columns that were made of a Parquet file as it is now; None if there are none, or if
        they are not what was made."""
        for folder in (self.path / ".columns").glob(f"{name}-{'?' * 16}"):
            try:
                made = json.loads((folder / "made.json").read_text())
                if made["schema"] != self._stamp():
                    continue
                parquet = _seen(self.path / f"{name}.parquet", made["parquet"])
                files = {column: folder / f"{column}.npy" for column in made["columns"]}
                seen = {c: _seen(file, made["columns"][c]) for c, file in files.items()}
                columns: Columns = {
                    # refuses what np.load would unpickle
                    c: np.lib.format.open_memmap(file, mode="r")
                    for c, file in files.items()
                }
            except Exception:  # whatever a damaged folder leads to: the columns are made anew
                continue
            now = {**made, "parquet": parquet, "columns": seen}
            if now != made:  # copied, say: lest all is read again at each opening
                with suppress(OSError):
                    draft = folder / f".made-{secrets.token_hex(6)}"
                    draft.write_text(json.dumps(now))
                    draft.replace(folder / "made.json")
            digests = [(column, sha256) for column, (_, _, sha256) in sorted(seen.items())]
            self._digests[name] = hashlib.sha256(repr(digests).encode()).hexdigest()
            return columns
        return None

    def _make(self, name: str, read: Callable[[str, pa.Table], Columns]) -> None:
        """Make the columns of a Parquet file, in place of those that were made before."""
        parquet, root = self.path / f"{name}.parquet", self.path / ".columns"
        source = _see(parquet)
        try:
            table = pq.read_table(parquet, page_checksum_verification=True)
        except (pa.ArrowException, OSError) as error:
            raise LogError(
                f"{parquet}: not readable as Parquet ({error}); write the log again"
            ) from error
        if table.num_rows != self._rows[name]:
            raise LogError(
                f"{parquet}: {table.num_rows} rows, schema.json says {self._rows[name]}; "
                "write the log again"
            )
        columns = read(name, table)
        draft = _draft(root, ".draft-")
        try:
            for column, values in columns.items():
                np.save(draft / f"{column}.npy", values)
            seen = {column: _see(draft / f"{column}.npy") for column in columns}
            made = {"schema": self._stamp(), "parquet": source, "columns": seen}
            (draft / "made.json").write_text(json.dumps(made))
            content = hashlib.sha256(f"{self._stamp()} {source[-1]}".encode()).hexdigest()[:16]
            folder = root / f"{name}-{content}"
            folder.parent.mkdir(exist_ok=True)
            # Who has opened the old columns keeps them: files that are mapped outlive their names.
            for old in folder.parent.glob(f"{folder.name[:-16]}{'?' * 16}"):
                shutil.rmtree(old)
            draft.rename(folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def _stamp(self) -> str:
        """The schema, by which columns are read and checked."""
        return hashlib.sha256(repr(self.schema).encode()).hexdigest()[:16]

    def _clear_drafts(self) -> None:
        """Delete what killed openings left, unless it is another process at work."""
        root = self.path / ".columns"
        if drafts := list(root.glob(".draft-*")):
            with suppress(OSError), _lock(root, wait=False):
                for draft in drafts:
                    shutil.rmtree(draft, ignore_errors=True)

    def _check_items(self, name: str, table: pa.Table) -> Columns:
        columns = {f: _ids(table, f, name, rows) for f, rows in self.schema.item_features.items()}
        if not np.array_equal(columns[self.schema.item], np.arange(table.num_rows)):
            raise LogError(
                f"items: column {self.schema.item!r} must be 0, 1, 2, ...: row i describes item i"
            )
        return columns

    def _check_events(self, name: str, table: pa.Table) -> Columns:
        item = self.schema.item
        columns = {
            USER: _ids(table, USER, name),
            TIME: _times(table, TIME, name),
            item: _ids(table, item, name, len(self.items[item])),
        }
        user, time = columns[USER], columns[TIME]
        # compared, not subtracted: ids may lie further apart than an int64 counts
        earlier, later = user[:-1], user[1:]
        late = np.flatnonzero((later < earlier) | ((later == earlier) & (time[1:] < time[:-1])))
        if len(late):
            raise LogError(
                f"events: column 'time' is out of order at row {late[0] + 1} (user "
                f"{user[late[0] + 1]}); sort by user, then time, or use EventLog.from_pandas"
            )
        return columns

    def _check_requests(self, name: str, table: pa.Table) -> Columns:
        schema = self.schema
        if not len(table):
            raise LogError(f"{name}: there are no requests; leave the split out")
        columns = {USER: _ids(table, USER, name), TIME: _times(table, TIME, name)}
        for feature, rows in schema.context_features.items():
            columns[feature] = _ids(table, feature, name, rows)
        for feature in schema.dense_features:
            columns[feature] = _floats(table, feature, name)
        offsets = None
        for feature in schema.candidate_lists:
            lengths, flat = _flatten(table, feature, name)
            mine = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
            if offsets is None:
                offsets = columns["candidate_offsets"] = mine
                empty = np.flatnonzero(lengths == 0)
                if len(empty):
                    raise LogError(
                        f"{name}: row {empty[0]} has an empty candidate set; leave such requests out"
                    )
            elif not np.array_equal(mine, offsets):
                row = int(np.flatnonzero(mine != offsets)[0]) - 1
                raise LogError(
                    f"{name}: row {row} has {lengths[row]} values in {feature!r} for "
                    f"{offsets[row + 1] - offsets[row]} candidates; the lists must be as long"
                )
            if feature == CANDIDATES:
                columns[feature] = _ids(flat, feature, name, len(self.items[schema.item]))
            elif feature == EXPOSED:
                if not pa.types.is_boolean(flat.schema.field(feature).type):
                    raise LogError(f"{name}: column {feature!r} must hold lists of bool")
                columns[feature] = _values(flat, feature, name).astype(bool)
            elif feature in schema.candidate_tags:
                columns[feature] = _ids(flat, feature, name, len(schema.candidate_tags[feature]))
            else:
                columns[feature] = _floats(flat, feature, name)
        for task in schema.tasks:
            bad = np.flatnonzero((columns[task] != 0) & (columns[task] != 1))
            if len(bad):
                row = int(np.searchsorted(columns["candidate_offsets"], bad[0], side="right")) - 1
                raise LogError(
                    f"{name}: row {row}, column {task!r}: label {columns[task][bad[0]]} must be 0 or 1"
                )
        return columns
