"""The order of the requests in an epoch: shuffled, one window at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

WINDOW = 1 << 18
"""The number of requests shuffled together. A split with no more requests is shuffled as a whole."""
BLOCK = 1 << 10
"""The number of adjacent requests of a longer split that enter a window together."""


@dataclass(frozen=True)
class Order:
    """The order of each epoch's requests; memory is bounded by one window, for any number of requests.

    A split with more requests than a window is cut into blocks of adjacent requests. Each epoch shuffles
    the blocks, takes one window of them after another, and shuffles the requests of each window. So
    reads stay mostly local, and every request comes once per epoch.

    Args:
        requests: the number of requests of the split.
        seed: shuffles with this seed; None keeps the order of the split.

    Example:
        >>> from ifa_torchrec.data.order import Order
        >>> [window.tolist() for window in Order(5, seed=None).windows(epoch=0, first=2)]
        [[2, 3, 4]]
        >>> order = Order(5, seed=1)
        >>> [window.tolist() for window in order.windows(epoch=0)]
        [[4, 0, 1, 2, 3]]
    """

    requests: int
    seed: int | None

    def windows(self, epoch: int, first: int = 0) -> Iterator[np.ndarray]:
        """The request numbers, int64, one window at a time.

        Args:
            epoch: the epoch; it determines the order together with the seed.
            first: the number of requests to skip at the start of the order.
        """
        if self.seed is None:
            for start in range(first, self.requests, WINDOW):
                yield np.arange(start, min(start + WINDOW, self.requests))
        elif self.requests <= WINDOW:
            order = np.arange(self.requests)
            np.random.default_rng([self.seed, epoch]).shuffle(order)
            yield order[first:]
        else:
            yield from self._shuffled(self.seed, epoch, first)

    def _shuffled(self, seed: int, epoch: int, first: int) -> Iterator[np.ndarray]:
        blocks = np.random.default_rng([seed, epoch]).permutation(-(-self.requests // BLOCK))
        for number, begin in enumerate(range(0, len(blocks), WINDOW // BLOCK)):
            starts = BLOCK * blocks[begin : begin + WINDOW // BLOCK]
            size = int(np.minimum(BLOCK, self.requests - starts).sum())
            if first < size:
                window = (starts[:, None] + np.arange(BLOCK)).ravel()
                window = window[window < self.requests]
                np.random.default_rng([seed, epoch, number]).shuffle(window)
                yield window[first:]
            first = max(first - size, 0)

    def state_dict(self) -> dict[str, Any]:
        """What a position in the order depends on besides the epoch; as JSON."""
        cut = [WINDOW, BLOCK] if self.requests > WINDOW and self.seed is not None else None
        return {**asdict(self), "cut": cut}


@dataclass(frozen=True)
class PartByPart:
    """The order of the requests of a log in parts: each epoch shuffles the parts and takes them one
    after another, the requests of each in an ``Order`` of its own.

    A position is the number of requests taken from each part; it is valid for any number of ranks.

    Args:
        of_parts: the number of requests in each part of the log.
        seed: shuffles with this seed; None keeps parts and requests in order.
        gather: if a rank has only the requests of its ``own_parts``: a collective that takes this rank's
            array and returns those of all ranks.

    Example:
        >>> import numpy as np
        >>> from ifa_torchrec.data.order import PartByPart
        >>> order = PartByPart([3, 2], seed=1)
        >>> [window.tolist() for window in order.windows(0, np.array([1, 0]), range(2))]
        [[1, 2], [3, 4]]
        >>> order.after(0, np.array([1, 0]), [range(2)], [3]).tolist()
        [3, 1]
    """

    of_parts: Sequence[int]
    seed: int | None
    gather: Callable[[np.ndarray], Sequence[np.ndarray]] | None = None

    @property
    def requests(self) -> int:
        """The number of requests of the split."""
        return sum(self.of_parts)

    def windows(self, epoch: int, first: np.ndarray, own: range) -> Iterator[np.ndarray]:
        """The request numbers of some parts, int64, one window at a time; numbers count from the first
        request of these parts.

        Args:
            epoch: the epoch; it determines the order together with the seed.
            first: [parts], the number of requests to skip at the start of each part's order.
            own: the parts.
        """
        begin = np.append(0, np.cumsum(self.of_parts))
        for part in self._sequence(epoch, own):
            seed = None if self.seed is None else self.seed + part
            for window in Order(self.of_parts[part], seed).windows(epoch, int(first[part])):
                yield window + (begin[part] - begin[own.start])

    def after(
        self, epoch: int, first: np.ndarray, owns: Sequence[range], taken: Sequence[int]
    ) -> np.ndarray:
        """[parts], the number of requests taken from each part.

        Args:
            epoch, first: as in ``windows``.
            owns: the parts of each rank, or of all ranks together, from the first part to the last.
            taken: for each of ``owns``, the number of requests taken from its windows.
        """
        first, left = first.copy(), list(taken)
        owner = [rank for rank, own in enumerate(owns) for _ in own]
        for part in self._sequence(epoch, range(len(self.of_parts))):
            of_part = min(left[owner[part]], self.of_parts[part] - int(first[part]))
            first[part] += of_part
            left[owner[part]] -= of_part
        return first

    def state_dict(self) -> dict[str, Any]:
        """What a position in the order depends on besides the epoch; as JSON."""
        cut = [WINDOW, BLOCK] if max(self.of_parts) > WINDOW and self.seed is not None else None
        return {"of_parts": list(self.of_parts), "seed": self.seed, "cut": cut}

    def _sequence(self, epoch: int, own: range) -> list[int]:
        if self.seed is None:
            return list(own)
        parts = np.random.default_rng([self.seed, epoch]).permutation(len(self.of_parts))
        return [part for part in parts.tolist() if part in own]


class InTime:
    """The requests sorted by time, in every epoch: the order in which a service receives them.

    Memory grows with the number of requests.

    Args:
        times: [R] int64, the times of the requests.

    Example:
        >>> import numpy as np
        >>> from ifa_torchrec.data.order import InTime
        >>> [window.tolist() for window in InTime(np.array([30, 10, 20])).windows(epoch=0, first=1)]
        [[2, 0]]
    """

    def __init__(self, times: np.ndarray) -> None:
        self._order = np.argsort(times, kind="stable")

    @property
    def requests(self) -> int:
        """The number of requests of the split."""
        return len(self._order)

    def windows(self, epoch: int, first: int = 0) -> Iterator[np.ndarray]:
        """The request numbers, as in ``Order.windows``.

        Args:
            epoch: ignored; all epochs have the same order.
            first: the number of requests to skip at the start of the order.
        """
        del epoch
        for start in range(first, self.requests, WINDOW):
            yield self._order[start : start + WINDOW]

    def state_dict(self) -> dict[str, Any]:
        """What a position in the order depends on; as JSON."""
        return {"requests": self.requests, "by": "time"}
