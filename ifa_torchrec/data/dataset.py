"""The requests of an event log as RankingBatches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from ifa_torchrec.batch import RankingBatch
from ifa_torchrec.data.batches import (
    Ranges,
    item_fields,
    jagged,
    jagged_of,
    lists_of,
    parts_of,
    stacked,
    tensor,
)
from ifa_torchrec.data.event_log import EventLog
from ifa_torchrec.data.histories import Histories
from ifa_torchrec.data.parts import ODD
from ifa_torchrec.data.sampler import EMPTY_REQUEST
from ifa_torchrec.data.schema import (
    CANDIDATES,
    EXPOSED,
    LIST_OFFSETS,
    OFFSETS,
    TIME,
    USER,
    Columns,
)
from ifa_torchrec.errors import ConfigError

HISTORY, CANDIDATE = "history_", "candidate_"
MICROSECONDS_PER_DAY = 86_400_000_000


class RankingDataset(Dataset[RankingBatch]):
    """The requests of one split; indexing it with a list of request numbers returns a RankingBatch.

    Each item feature ``f`` of the log becomes the keys ``history_f`` and ``candidate_f``, each event
    feature ``history_f``, each candidate feature ``candidate_f``. Events at or after the request's
    time are never in its history. Ages are in days.

    New items, for which the item table has no row, use its row 0. To train that row, a random share of
    all items can be made unknown too (``unknown_items``); they keep all other features.

    Args:
        log: the event log.
        split: name of the request split.
        history_length: keep only this many of the latest events of each history; None for all.
        unknown_items: probability that an item is unknown to a request: it then has row 0 in all of the
            request's events and as a candidate.
        seed: seeds their draw, together with the epoch.

    Raises:
        LogError: the log has no such split.
        ValueError: history_length is less than 1, or unknown_items is not in [0, 1).

    Attributes:
        histories: the event rows of each request's history.
        of_parts: the number of requests in each part of the log, open or not.

    Example:
        >>> import pandas as pd, tempfile
        >>> from ifa_torchrec.data import EventLog, LogSchema, RankingDataset
        >>> day = lambda d: pd.Timestamp(2024, 1, d)
        >>> log = EventLog.from_pandas(
        ...     tempfile.mkdtemp() + "/log",
        ...     events=pd.DataFrame({"user": [1, 1, 1], "item": [1, 2, 3],
        ...                          "time": [day(1), day(2), day(3)]}),
        ...     requests={"train": pd.DataFrame({"user": [1], "time": [day(3)],
        ...         "candidates": [[3, 1]], "exposed": [[True, False]], "label": [[1, 0]]})},
        ...     schema=LogSchema(item_features={"item": 4}))
        >>> batch = RankingDataset(log, "train")[[0]]
        >>> batch.sequence_features["history_item"].values().tolist(), batch.history_age.tolist()
        ([1, 2], [2.0, 1.0])
    """

    def __init__(
        self,
        log: EventLog,
        split: str,
        history_length: int | None = None,
        unknown_items: float = 0.0,
        seed: int = 0,
    ) -> None:
        if history_length is not None and history_length < 1:
            raise ConfigError(f"history_length must be at least 1, got {history_length}")
        if not 0 <= unknown_items < 1:
            raise ConfigError(f"unknown_items must be at least 0 and less than 1, got {unknown_items}")
        self._open(log, log.requests(split), history_length)
        self._unknown_items, self._seed = unknown_items, seed
        self.of_parts = log.requests_of_parts(split)
        self._before = sum(self.of_parts[: log.own.start])

    def set_epoch(self, epoch: int) -> None:
        """Draw the unknown items for this epoch."""
        self._epoch = epoch

    @classmethod
    def of_users(
        cls, log: EventLog, users: np.ndarray, times: np.ndarray, since: np.ndarray | None = None
    ) -> RankingDataset:
        """Requests without candidates, used only for their histories.

        Args:
            log: the event log.
            users: [R] int64.
            times: [R] int64, microseconds.
            since: [R] int64, microseconds: only events from this time on; None for all.

        Example:
            >>> import numpy as np, pandas as pd, tempfile
            >>> from ifa_torchrec.data import EventLog, LogSchema, RankingDataset
            >>> day = pd.Timestamp(2024, 1, 1)
            >>> log = EventLog.from_pandas(
            ...     tempfile.mkdtemp() + "/log",
            ...     events=pd.DataFrame({"user": [7, 7], "item": [1, 2], "time": day}),
            ...     schema=LogSchema(item_features={"item": 3}))
            >>> histories = RankingDataset.of_users(log, log.users, log.events["time"][-1:] + 1)
            >>> histories[[0]].sequence_features["history_item"].values().tolist()
            [1, 2]
        """
        schema = log.schema
        none: dict[str, np.ndarray] = {name: np.empty(0, np.float32) for name in schema.candidate_lists}
        none |= {CANDIDATES: np.empty(0, np.int64), EXPOSED: np.empty(0, bool)}
        none |= {name: np.empty(0, np.int64) for name in schema.candidate_features}
        none |= {name: np.zeros(len(users), np.int64) for name in schema.context_features}
        none |= {name: np.zeros(len(users), np.float32) for name in schema.dense_features}
        none |= {name: np.empty(0, np.int64) for name in schema.context_lists}
        lists = [OFFSETS, *(f"{name}{LIST_OFFSETS}" for name in schema.context_lists)]
        none |= {name: np.zeros(len(users) + 1, np.int64) for name in lists}
        dataset = cls.__new__(cls)
        dataset._open(log, {USER: users, TIME: times, **none}, since=since)
        return dataset

    def _open(
        self,
        log: EventLog,
        requests: Columns,
        history_length: int | None = None,
        since: np.ndarray | None = None,
    ) -> None:
        self.log, self.requests = log, requests
        self.histories = Histories(log, requests[USER], requests[TIME], history_length, since)
        self._unknown_items, self._seed, self._epoch = 0.0, 0, 0
        self.of_parts, self._before = [len(self.histories)], 0

    @cached_property
    def history_lengths(self) -> np.ndarray:
        """[R] int64, the number of events in each history; time and memory grow with the requests."""
        return self.histories.lengths(np.arange(len(self)))

    def __len__(self) -> int:
        return len(self.histories)

    def __getitem__(self, indices: Sequence[int] | np.ndarray) -> RankingBatch:
        requests, schema = self.requests, self.log.schema
        index = np.asarray(indices, dtype=np.int64)
        if index.ndim != 1 or len(index) == 0 or index.min() < EMPTY_REQUEST or index.max() >= len(self):
            raise IndexError(
                f"index with a list of request numbers from 0 to {len(self) - 1} (or {EMPTY_REQUEST} "
                f"for an empty request), got {indices}"
            )
        real = index != EMPTY_REQUEST
        rows, index = len(index), index[real]
        events = Ranges(*self.histories.ranges(index))
        candidates = self._candidates(index)
        logged, of = self.log.events, {HISTORY: events, CANDIDATE: candidates}
        items = {HISTORY: events.of(logged[schema.item]), CANDIDATE: candidates.of(requests[CANDIDATES])}
        age = requests[TIME][index].repeat(events.lengths)
        age -= events.of(logged[TIME])
        days = age.astype(np.float32)
        days /= MICROSECONDS_PER_DAY
        dense = [_spread(requests[f][index], real) for f in schema.dense_features]
        exposed = candidates.of(requests[EXPOSED])
        return RankingBatch(
            dense_features=stacked(dense, rows),
            context_features=self._context_features(index, real),
            sequence_features=self._sequence_features(index, real, of, items),
            candidate_dense=stacked(
                [candidates.of(requests[f]) for f in schema.candidate_dense], candidates.total
            ),
            history_age=tensor(days),
            labels=stacked([candidates.of(requests[task]) for task in schema.tasks], candidates.total),
            exposed=tensor(exposed),
            exposed_rows=tensor(exposed.nonzero()[0]),
            history_weight=tensor(events.of(logged[schema.event_weight]))
            if schema.event_weight
            else None,
            history_dense=stacked([events.of(logged[f]) for f in schema.event_dense], events.total)
            if schema.event_dense
            else None,
            **self._items(items[HISTORY], items[CANDIDATE]),
        )

    def _sequence_features(
        self,
        index: np.ndarray,
        real: np.ndarray,
        of: dict[str, Ranges],
        items: dict[str, np.ndarray],
    ) -> KeyedJaggedTensor:
        """The ids of the requests' events and candidates, written once, to their final place."""
        schema = self.log.schema
        own = {HISTORY: schema.event_features, CANDIDATE: schema.candidate_features}
        columns = {HISTORY: self.log.events, CANDIDATE: self.requests}
        sizes = {
            prefix + f: of[prefix].total for prefix in of for f in (*schema.item_features, *own[prefix])
        }
        values, parts = parts_of(sizes)
        for prefix, ranges in of.items():
            item, *others = schema.item_features
            self._item_rows(index, items[prefix], ranges.lengths, parts[prefix + item])
            for f in others:
                self.log.items[f].take(items[prefix], out=parts[prefix + f], mode="clip")
            for f in own[prefix]:
                ranges.of(columns[prefix][f], out=parts[prefix + f])
        lengths = {prefix: _spread(ranges.lengths, real) for prefix, ranges in of.items()}
        per_key = [lengths[HISTORY if key.startswith(HISTORY) else CANDIDATE] for key in sizes]
        return jagged_of(sizes, values, per_key)

    def _item_rows(
        self, index: np.ndarray, items: np.ndarray, lengths: np.ndarray, out: np.ndarray
    ) -> None:
        """Write the item-table row of each item of the requests, request by request."""
        out[:] = self.log.item_rows(items)
        if self._unknown_items:
            key = np.random.SeedSequence([self._seed, self._epoch]).generate_state(1, np.uint64)[0]
            # by the request's number in the whole split: the draw does not depend on the number of ranks
            number = (index + self._before).astype(np.uint64)
            request = np.repeat(_mixed(number + key), lengths)
            drawn = _mixed(request + items.astype(np.uint64) * np.uint64(ODD))
            out[drawn < int(self._unknown_items * 2**64)] = 0

    def _items(self, history: np.ndarray, candidates: np.ndarray) -> dict[str, Any]:
        """The fields that describe the distinct items of the batch, and the item numbers if needed."""
        schema, items = self.log.schema, self.log.items
        fields: dict[str, Any] = {}
        if self._unknown_items or self.log.num_items > schema.item_features[schema.item]:
            fields |= {"history_item_ids": tensor(history), "candidate_item_ids": tensor(candidates)}
        return fields | item_fields(items, schema, history, candidates)

    def _context_features(self, index: np.ndarray, real: np.ndarray) -> KeyedJaggedTensor:
        """The context ids of the requests ``index``, at the places where ``real`` is true."""
        schema = self.log.schema
        ids = {name: self.requests[name][index] for name in schema.context_features}
        lengths = [real.astype(np.int64) for _ in ids]
        for name in schema.context_lists:
            ids[name], mine = lists_of(self.requests, name, index)
            lengths.append(_spread(mine, real))
        return jagged(ids, lengths)

    def candidate_rows(self, indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The requests' candidates as rows of the split's flat candidate columns, and the number of
        candidates of each request."""
        candidates = self._candidates(np.asarray(indices, dtype=np.int64))
        return candidates.rows, candidates.lengths

    def _candidates(self, index: np.ndarray) -> Ranges:
        offsets = self.requests[OFFSETS]
        return Ranges(offsets[index], offsets[index + 1])


def _spread(values: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Put the values where ``real`` is true, and 0 elsewhere."""
    if len(values) == len(real):
        return values
    result = np.zeros(len(real), values.dtype)
    result[real] = values
    return result


def _mixed(values: np.ndarray) -> np.ndarray:
    """Mix the bits of uint64 numbers so that they look random (the last step of SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
