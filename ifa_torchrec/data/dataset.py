"""From an event log to RankingBatches, under a budget of events."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from ifa_torchrec.batch import RankingBatch
from ifa_torchrec.data.event_log import CANDIDATES, EXPOSED, TIME, USER, EventLog

HISTORY, CANDIDATE = "history_", "candidate_"
_MICROSECONDS_PER_DAY = 86_400_000_000


class RankingDataset(Dataset):
    """The requests of one split; indexed by a list of request numbers, it gives a RankingBatch.

    Each item feature ``f`` of the log becomes the keys ``history_f`` and ``candidate_f``.
    Events at or after the request's time are never in its history. Ages are in days.

    Args:
        log: the event log.
        split: name of the request split.

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

    def __init__(self, log: EventLog, split: str) -> None:
        self.log = log
        self.requests = log.requests(split)
        self._start, self._end = log.history_range(self.requests[USER], self.requests[TIME])
        self.history_lengths = self._end - self._start

    def __len__(self) -> int:
        return len(self.history_lengths)

    def __getitem__(self, indices: Sequence[int]) -> RankingBatch:
        requests, schema = self.requests, self.log.schema
        index = np.asarray(indices, dtype=np.int64)
        if index.ndim != 1 or len(index) == 0 or index.min() < 0 or index.max() >= len(self):
            raise IndexError(f"index with a list of request numbers 0 to {len(self) - 1}, got {indices}")
        history, history_lengths = _ranges(self._start[index], self._end[index])
        candidates, candidate_lengths = self.candidate_rows(index)

        event_items = self.log.events[schema.item][history]
        candidate_items = requests[CANDIDATES][candidates]
        columns = [self.log.items[feature] for feature in schema.item_features]
        sequence_features = KeyedJaggedTensor.from_lengths_sync(
            keys=[prefix + f for prefix in (HISTORY, CANDIDATE) for f in schema.item_features],
            values=_tensor(
                np.concatenate([ids[rows] for rows in (event_items, candidate_items) for ids in columns])
            ),
            lengths=_tensor(
                np.concatenate([n for n in (history_lengths, candidate_lengths) for _ in columns])
            ),
        )
        context = [requests[f][index] for f in schema.context_features]
        context_features = KeyedJaggedTensor.from_lengths_sync(
            keys=list(schema.context_features),
            values=_tensor(np.concatenate(context) if context else np.empty(0, np.int64)),
            lengths=torch.ones(len(context) * len(index), dtype=torch.int64),
        )
        age = np.repeat(requests[TIME][index], history_lengths) - self.log.events[TIME][history]
        return RankingBatch(
            dense_features=_stack([requests[f][index] for f in schema.dense_features], len(index)),
            context_features=context_features,
            sequence_features=sequence_features,
            candidate_dense=_stack(
                [requests[f][candidates] for f in schema.candidate_dense], len(candidates)
            ),
            history_age=_tensor((age / _MICROSECONDS_PER_DAY).astype(np.float32)),
            labels=_stack([requests[task][candidates] for task in schema.tasks], len(candidates)),
            exposed=_tensor(requests[EXPOSED][candidates]),
        )

    def candidate_rows(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the requests' candidates in the split's flat candidate columns, and how many
        each request has."""
        offsets = self.requests["candidate_offsets"]
        index = np.asarray(indices, dtype=np.int64)
        return _ranges(offsets[index], offsets[index + 1])


class EventBudgetSampler(Sampler[list[int]]):
    """Lists of requests whose histories hold at most ``max_events`` events together.

    Requests are taken in order (shuffled anew each epoch if asked) and a list is closed when the
    next request would break a limit; a single history above the budget is a list of its own, so
    nothing is dropped or cut. Ranks take turns; where the lists do not divide evenly, the last
    ranks see the first lists again, so that all ranks take the same number of steps.

    Args:
        history_lengths: [R], events in each request's history.
        max_events: budget of events a batch.
        max_requests: most requests a batch.
        seed: shuffles with this seed; None keeps the order.
        shard: (rank, world size).

    Example:
        >>> from ifa_torchrec.data import EventBudgetSampler
        >>> list(EventBudgetSampler([5, 4, 30, 1, 1, 1], max_events=10, max_requests=2))
        [[0, 1], [2], [3, 4], [5]]
    """

    def __init__(
        self,
        history_lengths: Sequence[int],
        max_events: int,
        max_requests: int,
        seed: int | None = None,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        if max_events < 1 or max_requests < 1:
            raise ValueError(
                f"max_events and max_requests must be at least 1, got {max_events}, {max_requests}"
            )
        self.history_lengths = np.asarray(history_lengths)
        self.max_events, self.max_requests = max_events, max_requests
        self.seed, self.shard = seed, shard
        self._start = (0, 0)

    def start_at(self, epoch: int, batch: int = 0) -> None:
        """Begin the next pass at this epoch's order, ``batch`` batches in (to resume a run)."""
        self._start = (epoch, batch)

    def num_batches(self, epoch: int) -> int:
        """Batches of one whole pass in this epoch's order."""
        return len(self._batches(epoch))

    def __iter__(self) -> Iterator[list[int]]:
        epoch, skip = self._start
        yield from self._batches(epoch)[skip:]

    def __len__(self) -> int:
        epoch, skip = self._start
        return max(len(self._batches(epoch)) - skip, 0)

    def _batches(self, epoch: int) -> list[list[int]]:
        order = np.arange(len(self.history_lengths))
        if self.seed is not None:
            np.random.default_rng([self.seed, epoch]).shuffle(order)
        batches: list[list[int]] = []
        events = 0
        for request in order.tolist():
            length = int(self.history_lengths[request])
            full = not batches or len(batches[-1]) == self.max_requests
            if full or events + length > self.max_events:
                batches.append([])
                events = 0
            batches[-1].append(request)
            events += length
        rank, world = self.shard
        steps = -(-len(batches) // world)
        return [batches[(step * world + rank) % len(batches)] for step in range(steps)]


def make_loader(dataset: RankingDataset, sampler: EventBudgetSampler) -> DataLoader:
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
