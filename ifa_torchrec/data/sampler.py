"""Which requests make a batch: as many as fit a budget of events, on each rank."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from ifa_torchrec.errors import ConfigError

EMPTY_REQUEST = -1
"""Stands in a list of requests for one without events and candidates: it pads the batch of a rank that
has fewer requests than another, since some of TorchRec's collectives want equal batches."""


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
