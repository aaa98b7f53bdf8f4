"""Choose the requests of each batch: as many as fit a budget of events, on each rank."""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Iterator, Sequence
from itertools import islice, zip_longest
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from ifa_torchrec.data.histories import Histories
from ifa_torchrec.data.order import InTime, Order, PartByPart
from ifa_torchrec.data.parts import own_parts
from ifa_torchrec.errors import ConfigError

EMPTY_REQUEST = -1
"""In a list of requests, a request without events and candidates. It pads the batch of a rank that has
fewer requests than another, since some of TorchRec's collectives need equal batch sizes."""


_IMBALANCE_STEPS = 1000


class EventBudgetSampler(Sampler[list[int]]):
    """Lists of requests whose histories contain at most ``max_events`` events in total.

    Requests are taken in order (reshuffled each epoch if there is a seed; see ``Order``). A step takes
    as many as fit the budgets of all ranks and distributes them so that each rank has about the same
    number of events: longest history first, each to the rank with the fewest events so far. A single
    history above the budget gets a list of its own, shared only with requests without events. So nothing
    is dropped, cut or seen twice, and all ranks take the same number of steps; a rank with fewer
    requests in a step is padded with EMPTY_REQUEST.

    Steps are formed as they are taken, from one window of requests at a time. So the first comes at once
    and memory does not grow with the number of requests. The number of steps is known after the last.

    If each rank has the requests of its own parts of a log (``PartByPart.gather``), it fills its budget
    from these, and all ranks take as many steps as the rank that needs the most. At the start of a pass
    the ranks exchange the number of requests in each of their steps; for this they form the steps of the
    pass once in advance.

    Args:
        history_lengths: [R], the number of events in each request's history; or
            ``RankingDataset.histories``, which finds them one window at a time. Only for the requests
            that the rank has.
        max_events: budget of events per rank and batch.
        max_requests: maximum number of requests per rank and batch.
        seed: shuffles with this seed; None keeps the order; or the order itself, InTime or PartByPart.
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
        history_lengths: Sequence[int] | np.ndarray | Histories,
        max_events: int,
        max_requests: int,
        seed: int | InTime | PartByPart | None = None,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        if max_events < 1 or max_requests < 1:
            raise ConfigError(
                f"max_events and max_requests must be at least 1, got {max_events}, {max_requests}"
            )
        if isinstance(history_lengths, (Sequence, np.ndarray)):
            self._lengths = np.asarray(history_lengths, dtype=np.int64).__getitem__
        else:
            self._lengths = history_lengths.lengths
        self.max_events, self.max_requests = max_events, max_requests
        if isinstance(seed, (InTime, PartByPart)):
            self.order = seed
        else:
            self.order = Order(len(history_lengths), seed)
        self.shard = shard
        self._gather = seed.gather if isinstance(seed, PartByPart) else None
        self._sharing = 1 if self._gather else shard[1]  # ranks that share the requests of a step
        self.start_at(0)

    def start_at(self, epoch: int, request: int = 0) -> None:
        """Begin the next pass in this epoch's order, after ``request`` requests (to resume a run).

        That is the number of requests that all ranks together have taken, for any number of ranks. A log
        in parts needs more than a number for a position; see ``load_state_dict``.
        """
        if isinstance(self.order, PartByPart):
            if request:
                raise ConfigError(
                    f"request {request} is not a position in a log in parts; pass the result of "
                    "state_dict to load_state_dict"
                )
            self._of_parts = np.zeros(len(self.order.of_parts), np.int64)
        self._begin(epoch, request)

    def _begin(self, epoch: int, request: int) -> None:
        self._start = (epoch, request)
        # of ranks that share requests together, or else of each rank: those taken after each step
        self._taken: list[Sequence[int]] = [[0]] * (self.shard[1] // self._sharing)

    def __iter__(self) -> Iterator[list[int]]:
        if self._gather is None:
            taken = array("q", [0])
            self._taken = [taken]
            return self._lists(taken)
        taken = self._gather(np.array([0, *(last for last, _ in self._steps())], np.int64))
        steps = max(len(of_rank) for of_rank in taken)
        taken = [np.pad(mine, (0, steps - len(mine)), mode="edge") for mine in taken]
        self._taken = [mine.tolist() for mine in taken]
        return self._own_lists(np.diff(np.stack(taken)).max(axis=0).tolist())

    def _lists(self, taken: array[int]) -> Iterator[list[int]]:
        rank, _ = self.shard
        for last, shares in self._steps():
            taken.append(last)
            yield _padded(shares[rank], max(len(share) for share in shares))

    def _own_lists(self, widths: list[int]) -> Iterator[list[int]]:
        """Lists of this rank's own requests, each padded to the longest of any rank in that step."""
        steps, none = self._steps(), np.empty(0, np.int64)
        for width in widths:
            _, (mine,) = next(steps, (0, [none]))
            yield _padded(mine, width)

    def requests_taken(self, step: int) -> int:
        """The number of requests of the epoch taken by all ranks after ``step`` steps of this pass.

        Args:
            step: at most the number of lists that the pass has yielded.
        """
        return self._start[1] + sum(taken[step] for taken in self._taken)

    def state_dict(self, step: int) -> dict[str, Any]:
        """The position after ``step`` steps of this pass, as JSON; the same on all ranks. Count the
        steps that were trained, not the lists that were taken ahead.

        Example:
            >>> from ifa_torchrec.data import EventBudgetSampler
            >>> sampler = EventBudgetSampler([5, 5, 5, 5], max_events=10, max_requests=2)
            >>> lists = list(sampler)
            >>> state = sampler.state_dict(step=1)
            >>> state["epoch"], state["request"]
            (0, 2)
            >>> others = [EventBudgetSampler([5] * 4, 10, 1, shard=(rank, 2)) for rank in (0, 1)]
            >>> for other in others:
            ...     other.load_state_dict(state)
            >>> [list(other) for other in others]
            [[[2]], [[3]]]
        """
        epoch, request = self._start[0], self.requests_taken(step)
        state: dict[str, Any] = {"epoch": epoch, "request": request, "order": self.order.state_dict()}
        if isinstance(self.order, PartByPart):
            taken = [taken[step] for taken in self._taken]
            after = self.order.after(epoch, self._of_parts, self._owns(self.order), taken)
            state["of_parts"] = after.tolist()
        if request == self.order.requests:
            state |= {"epoch": epoch + 1, "request": 0}
            state |= {"of_parts": [0] * len(state["of_parts"])} if "of_parts" in state else {}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Begin the next pass at a position from ``state_dict``: every request not taken by then is
        taken once. The number of ranks and the budgets may differ.

        Args:
            state: from ``state_dict``.

        Raises:
            ConfigError: the position belongs to another order of the requests.
        """
        now = self.order.state_dict()
        if state["order"] != now:
            raise ConfigError(
                f"the checkpoint's position (request {state['request']}) belongs to request order "
                f"{state['order']}, this run uses {now}; resume with the same split, seed and "
                "ifa_torchrec version, or start a new run"
            )
        if isinstance(self.order, PartByPart):
            self._of_parts = np.array(state["of_parts"], np.int64)
        self._begin(state["epoch"], state["request"])

    def imbalance(self) -> float:
        """The maximum number of events of a rank over the mean of the ranks, averaged over the steps:
        the factor by which a step takes longer than with equal ranks. Uses at most the first 1,000
        steps of a pass. A collective if each rank has requests of its own.

        Example:
            >>> from ifa_torchrec.data import EventBudgetSampler
            >>> EventBudgetSampler([30, 10], max_events=50, max_requests=1, shard=(0, 2)).imbalance()
            1.5
        """
        steps = (shares for _, shares in islice(self._steps(), _IMBALANCE_STEPS))
        events = [[int(self._lengths(share).sum()) for share in shares] for shares in steps]
        if self._gather:
            of_ranks = self._gather(np.array(events, np.int64).reshape(-1))
            events = list(zip_longest(*(of_rank.tolist() for of_rank in of_ranks), fillvalue=0))
        ratios = [max(of_ranks) / np.mean(of_ranks) for of_ranks in events if sum(of_ranks)]
        return float(np.mean(ratios)) if ratios else 1.0

    def _steps(self) -> Iterator[tuple[int, list[np.ndarray]]]:
        """For each step of the pass, the number of requests taken after it, and the requests of each
        rank that shares them."""
        (epoch, first), most, taken = self._start, self._sharing * self.max_requests, 0
        if isinstance(self.order, PartByPart):
            own = self._owns(self.order)[self.shard[0] if self._gather else 0]
            windows = self.order.windows(epoch, self._of_parts, own)
        else:
            windows = self.order.windows(epoch, first)
        order = lengths = np.empty(0, np.int64)
        while True:
            window = next(windows, None)
            if window is not None:
                order, lengths = (
                    np.concatenate(pair) for pair in ((order, window), (lengths, self._lengths(window)))
                )
            # a history above the budget takes one rank's whole budget
            total = np.concatenate([[0], np.cumsum(np.minimum(lengths, self.max_events))])
            first, end = 0, len(order) - (0 if window is None else most)
            while first < end:
                last, shares = self._cut(lengths, total, first)
                yield taken + last, [order[first:last][share] for share in shares]
                first = last
            order, lengths, taken = order[first:], lengths[first:], taken + first
            if window is None:
                return

    def _owns(self, order: PartByPart) -> list[range]:
        """The parts of each rank, or all parts together if the ranks share the requests."""
        parts, world = len(order.of_parts), self.shard[1]
        if self._gather is None:
            return [range(parts)]
        return [own_parts(parts, (rank, world)) for rank in range(world)]

    def _cut(self, lengths: np.ndarray, total: np.ndarray, first: int) -> tuple[int, list[np.ndarray]]:
        """The end of the step that begins at ``first``, and the requests of each rank relative to it."""
        world = self._sharing
        last = np.searchsorted(total, total[first] + world * self.max_events, side="right") - 1
        last = min(int(last), first + world * self.max_requests)
        if world == 1:
            return last, [np.arange(last - first)]
        while (shares := self._share(lengths[first:last])) is None:
            last -= max((last - first) // 16, 1)
        return last, shares

    def _share(self, lengths: np.ndarray) -> list[np.ndarray] | None:
        """The requests of each rank; None if they do not fit the ranks' budgets."""
        shares: list[list[int]] = [[] for _ in range(self._sharing)]
        open_ranks = [(0, 0, rank) for rank in range(self._sharing)]  # events, requests, rank
        for request in np.argsort(-lengths, kind="stable").tolist():
            events, count, rank = heapq.heappop(open_ranks)
            events += min(int(lengths[request]), self.max_events)
            if events > self.max_events:
                return None
            shares[rank].append(request)
            if count + 1 < self.max_requests:
                heapq.heappush(open_ranks, (events, count + 1, rank))
        return [np.array(sorted(share), dtype=np.int64) for share in shares]


def _padded(requests: np.ndarray, width: int) -> list[int]:
    return requests.tolist() + [EMPTY_REQUEST] * (width - len(requests))
