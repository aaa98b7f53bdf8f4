"""The order in which an epoch takes the requests: shuffled, a window at a time."""

from __future__ import annotations

from collections.abc import Iterator
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
