"""The requests of an event log as RankingBatches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from ifa_torchrec.batch import RankingBatch
from ifa_torchrec.data.event_log import EventLog
from ifa_torchrec.data.sampler import EMPTY_REQUEST
from ifa_torchrec.data.schema import CANDIDATES, EXPOSED, OFFSETS, TIME, USER, Columns
from ifa_torchrec.errors import ConfigError

HISTORY, CANDIDATE = "history_", "candidate_"
MICROSECONDS_PER_DAY = 86_400_000_000


class RankingDataset(Dataset[RankingBatch]):
    """The requests of one split; indexed by a list of request numbers, it gives a RankingBatch.

    Each item feature ``f`` of the log becomes the keys ``history_f`` and ``candidate_f``.
    Events at or after the request's time are never in its history. Ages are in days.

    Args:
        log: the event log.
        split: name of the request split.
        history_length: give only the latest so many events of each history; None for all.

    Raises:
        LogError: there is no such split.
        ValueError: history_length is less than 1.

    Attributes:
        history_lengths: [R] int64, events in each request's history.

    Example:
        >>> import pandas as pd, tempfile
        >>> from ifa_torchrec.data import EventLog, LogSchema, RankingDataset
        >>> day = lambda d: pd.Timestamp(2024, 1, d)
        >>> log = EventLog.from_pandas(
        ...     tempfile.mkdtemp() + "/log",
        ...     events=pd.DataFrame({"user": [1, 1, 1], "item": [0, 1, 2],
        ...                          "time": [day(1), day(2), day(3)]}),
        ...     requests={"train": pd.DataFrame({"user": [1], "time": [day(3)],
        ...         "candidates": [[2, 0]], "exposed": [[True, False]], "label": [[1, 0]]})},
        ...     schema=LogSchema(item_features={"item": 3}))
        >>> batch = RankingDataset(log, "train")[[0]]
        >>> batch.sequence_features["history_item"].values().tolist(), batch.history_age.tolist()
        ([0, 1], [2.0, 1.0])
    """

    def __init__(self, log: EventLog, split: str, history_length: int | None = None) -> None:
        if history_length is not None and history_length < 1:
            raise ConfigError(f"history_length must be at least 1, got {history_length}")
        self._open(log, log.requests(split), history_length)

    @classmethod
    def of_users(
        cls, log: EventLog, users: np.ndarray, times: np.ndarray, since: np.ndarray | None = None
    ) -> RankingDataset:
        """Requests without candidates, for their histories alone.

        Args:
            log: the event log.
            users: [R] int64; times: [R] int64, microseconds.
            since: [R] int64, microseconds: only events from this time on; None for all.

        Example:
            >>> import numpy as np, pandas as pd, tempfile
            >>> from ifa_torchrec.data import EventLog, LogSchema, RankingDataset
            >>> day = pd.Timestamp(2024, 1, 1)
            >>> log = EventLog.from_pandas(
            ...     tempfile.mkdtemp() + "/log",
            ...     events=pd.DataFrame({"user": [7, 7], "item": [0, 1], "time": day}),
            ...     schema=LogSchema(item_features={"item": 2}))
            >>> histories = RankingDataset.of_users(log, log.users, log.events["time"][-1:] + 1)
            >>> histories[[0]].sequence_features["history_item"].values().tolist()
            [0, 1]
        """
        schema = log.schema
        none: dict[str, np.ndarray] = {name: np.empty(0, np.float32) for name in schema.candidate_lists}
        none |= {CANDIDATES: np.empty(0, np.int64), EXPOSED: np.empty(0, bool)}
        none |= {name: np.zeros(len(users), np.int64) for name in schema.context_features}
        none |= {name: np.zeros(len(users), np.float32) for name in schema.dense_features}
        none[OFFSETS] = np.zeros(len(users) + 1, np.int64)
        dataset = cls.__new__(cls)
        dataset._open(log, {USER: users, TIME: times, **none}, None)
        if since is not None:
            dataset._start = log.history_range(users, since)[1]
            dataset.history_lengths = dataset._end - dataset._start
        return dataset

    def _open(self, log: EventLog, requests: Columns, history_length: int | None) -> None:
        self.log, self.requests = log, requests
        self._start, self._end = log.history_range(requests[USER], requests[TIME])
        if history_length is not None:
            self._start = np.maximum(self._start, self._end - history_length)
        self.history_lengths = self._end - self._start

    def __len__(self) -> int:
        return len(self.history_lengths)

    def __getitem__(self, indices: Sequence[int] | np.ndarray) -> RankingBatch:
        requests, schema = self.requests, self.log.schema
        index = np.asarray(indices, dtype=np.int64)
        if index.ndim != 1 or len(index) == 0 or index.min() < EMPTY_REQUEST or index.max() >= len(self):
            raise IndexError(
                f"index with a list of request numbers 0 to {len(self) - 1} (or {EMPTY_REQUEST} for an "
                f"empty request), got {indices}"
            )
        real = index != EMPTY_REQUEST
        rows, index = len(index), index[real]
        history, history_lengths = _ranges(self._start[index], self._end[index])
        candidates, candidate_lengths = self.candidate_rows(index)
        event_items = self.log.events[schema.item][history]
        age = np.repeat(requests[TIME][index], history_lengths) - self.log.events[TIME][history]

        def spread(values: np.ndarray) -> np.ndarray:
            """[rows, ...]: the real requests' values, and 0 for the empty ones."""
            result = np.zeros((rows, *values.shape[1:]), values.dtype)
            result[real] = values
            return result

        return RankingBatch(
            dense_features=_stack([spread(requests[f][index]) for f in schema.dense_features], rows),
            context_features=self._context_features(index, real),
            sequence_features=self._sequence_features(
                {HISTORY: event_items, CANDIDATE: requests[CANDIDATES][candidates]},
                {HISTORY: spread(history_lengths), CANDIDATE: spread(candidate_lengths)},
            ),
            candidate_dense=_stack(
                [requests[f][candidates] for f in schema.candidate_dense], len(candidates)
            ),
            history_age=_tensor((age / MICROSECONDS_PER_DAY).astype(np.float32)),
            labels=_stack([requests[task][candidates] for task in schema.tasks], len(candidates)),
            exposed=_tensor(requests[EXPOSED][candidates]),
        )

    def _sequence_features(
        self, items: Mapping[str, np.ndarray], lengths: Mapping[str, np.ndarray]
    ) -> KeyedJaggedTensor:
        """The features of histories and candidates, given for each prefix the items of all requests, one
        after the other, and how many each request has."""
        features = self.log.schema.item_features
        ids = [self.log.items[f][of_prefix] for of_prefix in items.values() for f in features]
        return KeyedJaggedTensor.from_lengths_sync(
            keys=[prefix + f for prefix in items for f in features],
            values=_tensor(np.concatenate(ids)),
            lengths=_tensor(np.concatenate([lengths[prefix] for prefix in items for _ in features])),
        )

    def _context_features(self, index: np.ndarray, real: np.ndarray) -> KeyedJaggedTensor:
        """One id a feature of the requests of ``index``, which stand where ``real`` is true."""
        names = list(self.log.schema.context_features)
        ids = [self.requests[name][index] for name in names]
        return KeyedJaggedTensor.from_lengths_sync(
            keys=names,
            values=_tensor(np.concatenate(ids) if ids else np.empty(0, np.int64)),
            lengths=_tensor(np.tile(real.astype(np.int64), len(ids))),
        )

    def candidate_rows(self, indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the requests' candidates in the split's flat candidate columns, and how many
        each request has."""
        offsets = self.requests[OFFSETS]
        index = np.asarray(indices, dtype=np.int64)
        return _ranges(offsets[index], offsets[index + 1])


def _ranges(start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All integers of the ranges start[i]:end[i], one after the other, and each range's length."""
    lengths = end - start
    first = np.cumsum(lengths) - lengths
    return np.repeat(start - first, lengths) + np.arange(lengths.sum()), lengths


def _tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))


def _stack(columns: list[np.ndarray], rows: int) -> torch.Tensor:
    return _tensor(np.stack(columns, axis=1) if columns else np.empty((rows, 0), np.float32))
