"""From an event log to RankingBatches, under a budget of events."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from ifa_torchrec.batch import RankingBatch
from ifa_torchrec.data.event_log import CANDIDATES, EXPOSED, TIME, USER, Columns, EventLog
from ifa_torchrec.errors import ConfigError

HISTORY, CANDIDATE = "history_", "candidate_"
EMPTY_REQUEST = -1
"""Stands in a list of requests for one without events and candidates: it pads the batch of a rank that
has fewer requests than another, since some of TorchRec's collectives want equal batches."""
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
        none["candidate_offsets"] = np.zeros(len(users) + 1, np.int64)
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

        def spread(values: np.ndarray) -> np.ndarray:
            """[rows, ...]: the real requests' values, and 0 for the empty ones."""
            result = np.zeros((rows, *values.shape[1:]), values.dtype)
            result[real] = values
            return result

        event_items = self.log.events[schema.item][history]
        candidate_items = requests[CANDIDATES][candidates]
        columns = [self.log.items[feature] for feature in schema.item_features]
        ids = [column[items] for items in (event_items, candidate_items) for column in columns]
        lengths = [spread(n) for n in (history_lengths, candidate_lengths) for _ in columns]
        sequence_features = KeyedJaggedTensor.from_lengths_sync(
            keys=[prefix + f for prefix in (HISTORY, CANDIDATE) for f in schema.item_features],
            values=_tensor(np.concatenate(ids)),
            lengths=_tensor(np.concatenate(lengths)),
        )
        context = [requests[f][index] for f in schema.context_features]
        context_features = KeyedJaggedTensor.from_lengths_sync(
            keys=list(schema.context_features),
            values=_tensor(np.concatenate(context) if context else np.empty(0, np.int64)),
            lengths=_tensor(np.tile(real.astype(np.int64), len(context))),
        )
        age = np.repeat(requests[TIME][index], history_lengths) - self.log.events[TIME][history]
        return RankingBatch(
            dense_features=_stack([spread(requests[f][index]) for f in schema.dense_features], rows),
            context_features=context_features,
            sequence_features=sequence_features,
            candidate_dense=_stack(
                [requests[f][candidates] for f in schema.candidate_dense], len(candidates)
            ),
            history_age=_tensor((age / MICROSECONDS_PER_DAY).astype(np.float32)),
            labels=_stack([requests[task][candidates] for task in schema.tasks], len(candidates)),
            exposed=_tensor(requests[EXPOSED][candidates]),
        )

    def candidate_rows(self, indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the requests' candidates in the split's flat candidate columns, and how many
        each request has."""
        offsets = self.requests["candidate_offsets"]
        index = np.asarray(indices, dtype=np.int64)
        return _ranges(offsets[index], offsets[index + 1])


class EventBudgetSampler(Sampler[list[int]]):
    """Lists of requests whose histories hold at most ``max_events`` events together.

    Requests are taken in order (shuffled anew each epoch if asked). A step takes as many as fit all
    ranks' budgets and shares them so that each rank has about the same number of events: the
    longest history first, each to the rank that has the fewest events so far. A single history
    above the budget is a list of its own, but for requests without any event. So nothing is
    dropped, cut or seen twice, and all ranks take the same number of steps; a rank that has fewer
    requests in a step than another has EMPTY_REQUEST in their place.

    Args:
        history_lengths: [R], events in each request's history.
        max_events: budget of events a rank's batch.
        max_requests: most requests a rank's batch.
        seed: shuffles with this seed; None keeps the order.
        shard: (rank, world size).

    Example:
        >>> from ifa_torchrec.data import EventBudgetSampler
        >>> lengths = [5, 4, 30, 1, 1, 1]
        >>> list(EventBudgetSampler(lengths, max_events=10, max_requests=2))
        [[0, 1], [2], [3, 4], [5]]
        >>> [list(EventBudgetSampler(lengths, 10, 2, shard=(rank, 2))) for rank in (0, 1)]
        [[[2, -1], [3, 5]], [[0, 1], [4, -1]]]
    """

    def __init__(
        self,
        history_lengths: Sequence[int] | np.ndarray,
        max_events: int,
        max_requests: int,
        seed: int | None = None,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        if max_events < 1 or max_requests < 1:
            raise ConfigError(
                f"max_events and max_requests must be at least 1, got {max_events}, {max_requests}"
            )
        self.history_lengths = np.asarray(history_lengths, dtype=np.int64)
        self.max_events, self.max_requests = max_events, max_requests
        self.seed, self.shard = seed, shard
        self.start_at(0)

    def start_at(self, epoch: int, request: int = 0) -> None:
        """Begin the next pass at this epoch's order, ``request`` requests in (to resume a run).

        The ranks together have taken that many, whatever their number was.
        """
        self._start = (epoch, request)
        self._cut: list[list[np.ndarray]] | None = None
        self._taken: list[int] = [request]

    def __iter__(self) -> Iterator[list[int]]:
        rank, _ = self.shard
        for shares in self._steps():
            width = max(len(share) for share in shares)
            mine = shares[rank].tolist()
            yield mine + [EMPTY_REQUEST] * (width - len(mine))

    def __len__(self) -> int:
        return len(self._steps())

    def requests_taken(self, step: int) -> int:
        """Requests of the epoch that all ranks have taken after ``step`` steps of this pass."""
        self._steps()
        return self._taken[step]

    def imbalance(self) -> float:
        """The most events of a rank over the mean of the ranks, averaged over the steps: how much
        longer the ranks work than they would if their events were equal.

        Example:
            >>> from ifa_torchrec.data import EventBudgetSampler
            >>> EventBudgetSampler([30, 10], max_events=50, max_requests=1, shard=(0, 2)).imbalance()
            1.5
        """
        steps = [[self.history_lengths[share].sum() for share in shares] for shares in self._steps()]
        ratios = [max(events) / np.mean(events) for events in steps if sum(events)]
        return float(np.mean(ratios)) if ratios else 1.0

    def _steps(self) -> list[list[np.ndarray]]:
        """For each step of the pass, the requests of each rank."""
        if self._cut is None:
            epoch, first = self._start
            order = np.arange(len(self.history_lengths))
            if self.seed is not None:
                np.random.default_rng([self.seed, epoch]).shuffle(order)
            lengths = self.history_lengths[order]
            _, world = self.shard
            # a history above the budget takes one rank's whole budget
            total = np.concatenate([[0], np.cumsum(np.minimum(lengths, self.max_events))])
            self._cut = []
            while first < len(order):
                last = np.searchsorted(total, total[first] + world * self.max_events, side="right") - 1
                last = min(int(last), first + world * self.max_requests)
                while (shares := self._share(lengths[first:last])) is None:
                    last -= max((last - first) // 16, 1)
                self._cut.append([order[first:last][share] for share in shares])
                self._taken.append(last)
                first = last
        return self._cut

    def _share(self, lengths: np.ndarray) -> list[np.ndarray] | None:
        """Which of these requests each rank gets; None if they do not fit the ranks' budgets."""
        shares: list[list[int]] = [[] for _ in range(self.shard[1])]
        open_ranks = [(0, 0, rank) for rank in range(self.shard[1])]  # events, requests, rank
        for request in np.argsort(-lengths, kind="stable").tolist():
            events, count, rank = heapq.heappop(open_ranks)
            events += min(int(lengths[request]), self.max_events)
            if events > self.max_events:
                return None
            shares[rank].append(request)
            if count + 1 < self.max_requests:
                heapq.heappush(open_ranks, (events, count + 1, rank))
        return [np.array(sorted(share), dtype=np.int64) for share in shares]


def make_loader(dataset: RankingDataset, sampler: EventBudgetSampler) -> DataLoader[RankingBatch]:
    """A DataLoader over ``dataset`` in the sampler's batches.

    Batches are made by slicing memory-mapped columns, which is cheap enough to need no worker
    processes.

    Example:
        >>> from ifa_torchrec.data import EventBudgetSampler, make_loader
        >>> class Dataset:  # stands for a RankingDataset
        ...     def __getitem__(self, indices):
        ...         return len(indices)
        >>> list(make_loader(Dataset(), EventBudgetSampler([5, 5, 9], max_events=10, max_requests=8)))
        [2, 1]
    """
    return DataLoader(dataset, sampler=sampler, batch_size=None, pin_memory=torch.cuda.is_available())


def _ranges(start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All integers of the ranges start[i]:end[i], one after the other, and each range's length."""
    lengths = end - start
    first = np.cumsum(lengths) - lengths
    return np.repeat(start - first, lengths) + np.arange(lengths.sum()), lengths


def _tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))


def _stack(columns: list[np.ndarray], rows: int) -> torch.Tensor:
    return _tensor(np.stack(columns, axis=1) if columns else np.empty((rows, 0), np.float32))
