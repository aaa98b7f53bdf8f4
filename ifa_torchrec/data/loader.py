"""A loader that prepares batches ahead of the training step."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from threading import Condition

import torch

from ifa_torchrec.batch import RankingBatch
from ifa_torchrec.data.dataset import RankingDataset

AHEAD = 4
"""The number of batches that are prepared before they are requested."""
THREADS = 2
"""The number of threads that prepare batches, one batch each. Numpy and torch release the GIL while
they copy."""


def make_loader(dataset: RankingDataset, sampler: Iterable[list[int]]) -> BatchLoader:
    """The batches of ``dataset`` for the sampler's lists of requests, prepared ahead.

    Args:
        dataset: returns the batch of a list of requests.
        sampler: an EventBudgetSampler, or lists from one.

    Example:
        >>> from ifa_torchrec.data import EventBudgetSampler, make_loader
        >>> class Dataset:  # stands for a RankingDataset
        ...     def __getitem__(self, indices):
        ...         return len(indices)
        >>> list(make_loader(Dataset(), EventBudgetSampler([5, 5, 9], max_events=10, max_requests=8)))
        [2, 1]
    """
    return BatchLoader(dataset, sampler)


class BatchLoader:
    """The batches of a dataset, in the order of a sampler's lists, prepared ahead by threads.

    An error in a batch is raised when that batch is taken. Up to AHEAD batches are prepared beyond those
    taken, so a position in the data must count taken batches: ``EventBudgetSampler.state_dict(step)``.
    The threads end when the iterator is exhausted, closed or deleted. If there is a GPU, batches are in
    page-locked memory.

    The loader does not fork, and preparing a batch runs no parallel region of OpenMP. So a program may
    fork before and after, and may use the dataset in the workers of a torch DataLoader.

    Args:
        dataset: returns the batch of a list of requests.
        sampler: lists of requests; a new iteration each time, in the threads.

    Attributes:
        waited: seconds spent waiting for batches, over all iterations.

    Example:
        >>> from ifa_torchrec.data.loader import BatchLoader
        >>> class Dataset:  # stands for a RankingDataset
        ...     def __getitem__(self, indices):
        ...         return len(indices)
        >>> list(BatchLoader(Dataset(), [[0, 1], [2]]))
        [2, 1]
    """

    def __init__(self, dataset: RankingDataset, sampler: Iterable[list[int]]) -> None:
        self._dataset, self._sampler = dataset, sampler
        self.waited = 0.0

    def __iter__(self) -> Generator[RankingBatch]:
        device = torch.cuda.current_device() if torch.cuda.is_available() else None
        makers = ThreadPoolExecutor(THREADS, "batches", _set_device, (device,))
        lists, numbers = _InTurn(self._sampler), count()

        def begin() -> Future[RankingBatch | None]:
            return makers.submit(self._make, lists, next(numbers))

        try:
            ahead = deque(begin() for _ in range(AHEAD))
            while (batch := self._taken(ahead.popleft())) is not None:
                ahead.append(begin())
                yield batch
        finally:
            makers.shutdown(cancel_futures=True)

    def _make(self, lists: _InTurn, number: int) -> RankingBatch | None:
        """The batch with this number; None after the last."""
        requests = lists.take(number)
        if requests is None:
            return None
        batch = self._dataset[requests]
        return batch.pin_memory() if torch.cuda.is_available() else batch

    def _taken(self, made: Future[RankingBatch | None]) -> RankingBatch | None:
        start = time.perf_counter()
        try:
            return made.result()
        finally:
            self.waited += time.perf_counter() - start


class _InTurn:
    """The lists of a sampler, which the threads take in turn. A separate sampler thread would cost two
    thread switches per batch."""

    def __init__(self, sampler: Iterable[list[int]]) -> None:
        self._lists, self._taken, self._turn = iter(sampler), 0, Condition()

    def take(self, number: int) -> list[int] | None:
        """Wait until all lists before this number are taken, then take it; None after the last."""
        with self._turn:
            self._turn.wait_for(lambda: self._taken == number)
            self._taken += 1
            self._turn.notify_all()
            return next(self._lists, None)


def _set_device(device: int | None) -> None:
    """Make a new thread page-lock memory for this process's GPU; by default it uses the first."""
    if device is not None:
        torch.cuda.set_device(device)
