"""A bounded queue whose waiting items one thread processes in batches."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ifa_torchrec.serving.errors import UnreachableError

Item = TypeVar("Item")
Result = TypeVar("Result")


class QueueFullError(RuntimeError):
    """The queue is full; try again later."""


class ClosedError(RuntimeError):
    """The batcher is closed and accepts no more work."""


@dataclass
class _Job:
    work: Callable[[list[Any]], Sequence[Any]]
    item: Any
    share: float
    since: float
    future: Future[Any] = field(default_factory=Future)


class Batcher:
    """Calls functions on batches of items, one batch at a time, in its own thread.

    It never waits for a batch to fill: the items that arrived while it was busy form the next batch.
    A batch always contains the item that has waited longest, and other items that wait for the same
    function.

    Args:
        capacity: most items that may wait.
        on_length: called with the number of waiting items whenever it changes.
        on_wait: called with the seconds that an item waited, when its batch starts.

    Example:
        >>> from ifa_torchrec.serving.batching import Batcher
        >>> with Batcher(capacity=10) as batcher:
        ...     def inverses(numbers):
        ...         return [1 / number for number in numbers]
        ...     good, bad = batcher.submit(inverses, [4, 0], shares=[0.1, 0.1])
        >>> good.result()
        0.25
        >>> bad.exception()
        ZeroDivisionError('division by zero')
    """

    def __init__(
        self,
        capacity: int,
        on_length: Callable[[int], object] = lambda _: None,
        on_wait: Callable[[float], object] = lambda _: None,
    ) -> None:
        self._capacity, self._on_length, self._on_wait = capacity, on_length, on_wait
        self._waiting: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    def __enter__(self) -> Batcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(
        self,
        work: Callable[[list[Item]], Sequence[Result]],
        items: Sequence[Item],
        shares: Sequence[float],
    ) -> list[Future[Result]]:
        """Queue items for ``work``, which may run on them together with other items queued for it.

        Args:
            work: takes a list of items and returns one result per item. If it fails, it is called again
                with each half of the list, so it must be safe to repeat (an event added twice counts as
                a duplicate). If it raises UnreachableError, all items of the batch fail at once.
            items: the items.
            shares: for each item, the share of a batch that it fills; a batch is full at 1.

        Returns:
            One future per item. An item whose future is cancelled before its batch starts is skipped.

        Raises:
            QueueFullError: there is no room for all of the items; none is queued.
            ClosedError: the batcher is closed.
        """
        now = time.perf_counter()
        jobs = [_Job(work, item, share, now) for item, share in zip(items, shares, strict=True)]
        with self._changed:
            if self._closed:
                raise ClosedError("the batcher is closed and accepts no more work")
            if len(self._waiting) + len(jobs) > self._capacity:
                raise QueueFullError(f"{len(self._waiting)} of {self._capacity} places are taken")
            self._waiting.extend(jobs)
            self._on_length(len(self._waiting))
            self._changed.notify()
        return [job.future for job in jobs]

    def close(self) -> None:
        """Finish the waiting items and stop the thread; later submits raise ClosedError."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while jobs := self._take():
            jobs = [job for job in jobs if job.future.set_running_or_notify_cancel()]
            now = time.perf_counter()
            for job in jobs:
                self._on_wait(now - job.since)
            try:
                if jobs:
                    _do(jobs)
            except UnreachableError as error:
                _fail(jobs, error)
            except BaseException as error:  # SystemExit, say: the thread must continue for other items
                _fail(jobs, RuntimeError(f"the work ended with {type(error).__name__}: {error}"))

    def _take(self) -> list[_Job]:
        """The next batch; empty once the batcher is closed and nothing waits."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            taken: list[_Job] = []
            left: deque[_Job] = deque()
            full = 0.0
            for job in self._waiting:
                fits = not taken or (job.work == taken[0].work and full + job.share <= 1)
                (taken if fits else left).append(job)
                full += job.share * fits
            self._waiting = left
            self._on_length(len(left))
            return taken


def _fail(jobs: list[_Job], error: Exception) -> None:
    """Fail the jobs that are not done."""
    for job in jobs:
        if not job.future.done():
            job.future.set_exception(error)


def _do(jobs: list[_Job]) -> None:
    """Run a batch. If it fails, run each half separately, so that only the items at fault fail.

    Raises:
        UnreachableError: the work raised it; each half would wait for the store just as long again.
    """
    try:
        results = jobs[0].work([job.item for job in jobs])
    except UnreachableError:
        raise
    except Exception as error:
        if len(jobs) == 1:
            jobs[0].future.set_exception(error)
            return
        middle = len(jobs) // 2
        _do(jobs[:middle])
        _do(jobs[middle:])
    else:
        if len(results) != len(jobs):  # results cannot be matched to items
            raise RuntimeError(f"{len(results)} results for {len(jobs)} items")
        for job, result in zip(jobs, results, strict=True):
            job.future.set_result(result)
