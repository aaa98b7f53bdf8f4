"""The order in which an epoch takes the requests: shuffled, a window at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

WINDOW = 1 << 18
"""Requests that are shuffled together. A split of no more is shuffled whole."""
BLOCK = 1 << 10
"""Requests that lie side by side in a longer split and come into a window together."""


@dataclass(frozen=True)
class Order:
    """The order of each epoch's requests, in memory and time of a window, however many there are.

    A split that has more requests than a window is cut into blocks of requests that lie side by side.
    Each epoch shuffles the blocks, takes a window of them after the other, and shuffles the requests of
    a window. So reading stays near to where it was, and every request comes once an epoch.

    Args:
        requests: of the split.
        seed: shuffles with this seed; None keeps the requests' own order.

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
        """The requests' numbers, int64, a window at a time.

        Args:
            epoch: its number, which decides the order together with the seed.
            first: requests at the beginning of the order that are left out.
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
        """What a position in the order depends on beside the epoch; as JSON."""
        cut = [WINDOW, BLOCK] if self.requests > WINDOW and self.seed is not None else None
        return {**asdict(self), "cut": cut}


@dataclass(frozen=True)
class PartByPart:
    """The order of the requests of a log in parts: each epoch shuffles the parts, takes one after the
    other, and the requests of each in an ``Order`` of their own.

    So how many requests of each part were taken is a position for any number of ranks.

    Args:
        of_parts: requests of each part of the log.
        seed: shuffles with this seed; None keeps parts and requests in order.
        gather: where a rank has the requests of its ``own_parts`` alone: gives the arrays of all ranks
            for this rank's; called by all ranks.

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
        """Of the split."""
        return sum(self.of_parts)

    def windows(self, epoch: int, first: np.ndarray, own: range) -> Iterator[np.ndarray]:
        """The numbers of the requests of some parts among those of these parts, int64, a window at a
        time.

        Args:
            epoch: its number, which decides the order together with the seed.
            first: [parts], requests at the beginning of each part's order that are left out.
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
        """[parts], how many requests of each part were taken.

        Args:
            epoch, first: as in ``windows``.
            owns: the parts of each rank, or of all together, from the first part to the last.
            taken: of the windows of each, the requests that were taken.
        """
        first, left = first.copy(), list(taken)
        owner = [rank for rank, own in enumerate(owns) for _ in own]
        for part in self._sequence(epoch, range(len(self.of_parts))):
            of_part = min(left[owner[part]], self.of_parts[part] - int(first[part]))
            first[part] += of_part
            left[owner[part]] -= of_part
        return first

    def state_dict(self) -> dict[str, Any]:
        """What a position in the order depends on beside the epoch; as JSON."""
        cut = [WINDOW, BLOCK] if max(self.of_parts) > WINDOW and self.seed is not None else None
        return {"of_parts": list(self.of_parts), "seed": self.seed, "cut": cut}

    def _sequence(self, epoch: int, own: range) -> list[int]:
        if self.seed is None:
            return list(own)
        parts = np.random.default_rng([self.seed, epoch]).permutation(len(self.of_parts))
        return [part for part in parts.tolist() if part in own]


class InTime:
    """Each request after those of earlier times, in every epoch: as they come to a service.

    Takes memory for all requests.

    Args:
        times: [R] int64, the requests'.

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
        """Of the split."""
        return len(self._order)

    def windows(self, epoch: int, first: int = 0) -> Iterator[np.ndarray]:
        """The requests' numbers, as ``Order.windows``.

        Args:
            epoch: all are in one order.
            first: requests at the beginning of the order that are left out.
        """
        del epoch
        for start in range(first, self.requests, WINDOW):
            yield self._order[start : start + WINDOW]

    def state_dict(self) -> dict[str, Any]:
        """What a position in the order depends on; as JSON."""
        return {"requests": self.requests, "by": "time"}
