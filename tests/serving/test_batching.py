"""Closing the batcher: nothing that was submitted waits forever."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from helpers import until

from ifa_torchrec.serving.batching import Batcher, ClosedError
from ifa_torchrec.serving.errors import StoreError, UnreachableError


def same(items: list[int]) -> list[int]:
    return items


def test_after_close_waiting_items_finish_and_new_ones_are_refused():
    begun, free = threading.Event(), threading.Event()

    def wait(items: list[int]) -> list[int]:
        begun.set()
        assert free.wait(60)
        return items

    batcher = Batcher(capacity=10)
    futures = batcher.submit(wait, [0], [1.0])
    assert begun.wait(60)
    futures += batcher.submit(same, [1, 2], [1.0, 1.0])
    closing = threading.Thread(target=batcher.close)
    closing.start()
    until(lambda: batcher._closed)
    with pytest.raises(ClosedError, match="closed and accepts no more"):
        batcher.submit(same, [3], [1.0])
    free.set()
    closing.join(10)
    assert [future.result(0) for future in futures] == [0, 1, 2]
    batcher.close()  # again


def end(_: list[int]) -> list[int]:
    raise SystemExit("enough")


@contextmanager
def busy(batcher: Batcher) -> Iterator[None]:
    """Keep the batcher busy meanwhile, so that what is submitted forms one batch."""
    begun, free = threading.Event(), threading.Event()

    def wait(items: list[int]) -> list[int]:
        begun.set()
        assert free.wait(60)
        return items

    batcher.submit(wait, [0], [1.0])
    assert begun.wait(60)
    yield
    free.set()


def one_too_few(items: list[int]) -> list[int]:
    return items[1:]


@pytest.mark.parametrize(
    "work, message",
    [(end, "the work ended with SystemExit: enough"), (one_too_few, "1 results for 2 items")],
)
def test_work_that_raises_system_exit_or_loses_a_result_fails_and_the_next_runs(work, message):
    with Batcher(capacity=10) as batcher:
        with busy(batcher):
            futures = batcher.submit(work, [1, 2], [0.1, 0.1])
            after = batcher.submit(same, [3], [0.1])
        for future in futures:
            with pytest.raises(RuntimeError, match=message):
                future.result(10)
        assert after[0].result(10) == 3


@pytest.mark.parametrize("error, calls", [(UnreachableError, 1), (StoreError, 7)])
def test_an_unreachable_store_is_waited_for_once_per_batch(error, calls):
    """Each half would wait just as long. A damaged record, in contrast, concerns only one item."""
    called: list[int] = []

    def work(items: list[int]) -> list[int]:
        called.append(len(items))
        raise error("no luck")

    with Batcher(capacity=10) as batcher:
        with busy(batcher):
            futures = batcher.submit(work, [1, 2, 3, 4], [0.1] * 4)
        for future in futures:
            with pytest.raises(error, match="no luck"):
                future.result(60)
        assert len(called) == calls
