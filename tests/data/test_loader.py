"""Batches prepared ahead: their order, errors, the end of the threads, and no forks or deadlocks."""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import pytest
from helpers import until

from ifa_torchrec.data import EventBudgetSampler, EventLog, RankingDataset, make_loader
from ifa_torchrec.data.loader import AHEAD, THREADS, BatchLoader, _InTurn


class Dataset:
    """A fake RankingDataset; the first batch of each pair takes longer, and one request fails."""

    def __init__(self, bad: int = -1) -> None:
        self.made: list[int] = []
        self.bad = bad

    def __getitem__(self, requests: Sequence[int]) -> int:
        [number] = requests
        if number % 2 == 0:
            time.sleep(0.01)
        if number == self.bad:
            raise ValueError(f"request {number} is bad")
        self.made.append(number)
        return number


def loader(dataset: Dataset, requests: int) -> BatchLoader:
    return make_loader(dataset, [[request] for request in range(requests)])  # pyright: ignore[reportArgumentType]


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith(("batches", "lists"))]


def test_batches_come_in_order_and_again() -> None:
    batches = loader(Dataset(), 25)
    assert list(batches) == list(range(25)) == list(batches)
    assert not threads() and batches.waited > 0
    assert list(loader(Dataset(), 0)) == []


def test_the_number_of_batches_prepared_ahead_is_bounded() -> None:
    dataset = Dataset()
    batches = iter(loader(dataset, 100))
    assert list(islice(batches, 3)) == [0, 1, 2]
    until(lambda: len(dataset.made) == 3 + AHEAD)
    time.sleep(0.2)  # time for one more, if it were prepared
    assert sorted(dataset.made) == list(range(3 + AHEAD)) and len(threads()) <= 1 + THREADS
    batches.close()
    assert not threads() and len(dataset.made) <= 3 + AHEAD


def test_an_error_is_raised_when_its_batch_is_taken() -> None:
    batches = iter(loader(Dataset(bad=5), 25))
    assert list(islice(batches, 5)) == list(range(5))
    with pytest.raises(ValueError, match="request 5 is bad"):
        next(batches)
    assert not threads() and list(batches) == []


def test_an_error_of_the_sampler_is_raised_too() -> None:
    def lists():
        yield [1]
        raise RuntimeError("no more lists")

    batches = iter(make_loader(Dataset(), lists()))  # pyright: ignore[reportArgumentType]
    assert next(batches) == 1
    with pytest.raises(RuntimeError, match="no more lists"):
        next(batches)


def test_a_late_thread_still_gets_its_list() -> None:
    lists = _InTurn([[0], [1], [2]])
    with ThreadPoolExecutor(3) as threads:
        taken = [threads.submit(lists.take, number) for number in (2, 1)]
        time.sleep(0.05)
        assert not any(future.done() for future in taken)
        assert lists.take(0) == [0]
        assert [future.result(20) for future in taken] == [[2], [1]]
    assert lists.take(3) is None


def test_threads_end_when_the_iterator_is_deleted() -> None:
    batches = iter(loader(Dataset(), 100))
    next(batches)
    assert threads()
    del batches
    gc.collect()
    assert not threads()


def test_the_position_counts_taken_batches_only(log: EventLog) -> None:
    dataset = RankingDataset(log, "train")

    def sampler() -> EventBudgetSampler:
        return EventBudgetSampler(dataset.histories, max_events=100, max_requests=4, seed=3)

    first = sampler()
    first.start_at(2)
    wanted = list(first)
    batches = iter(make_loader(dataset, first))
    for step in range(1, 4):
        next(batches)
        rest = sampler()
        rest.load_state_dict(first.state_dict(step))
        assert list(rest) == wanted[step:]
    batches.close()


_WORKERS = """
    import multiprocessing, sys
    import torch
    from torch.utils.data import DataLoader
    from ifa_torchrec.data import EventBudgetSampler, EventLog, RankingDataset, make_loader

    if __name__ == "__main__":
        torch.set_num_threads(2)
        torch.ones(1 << 20).sin().sum()  # from here on OpenMP has threads
        dataset = RankingDataset(EventLog(sys.argv[1]), "train")
        sampler = EventBudgetSampler(dataset.histories, max_events=200, max_requests=8)
        wanted = [batch.history_age.tolist() for batch in make_loader(dataset, sampler)]
        for start in sys.argv[2:]:
            batches = DataLoader(
                dataset, sampler=sampler, batch_size=None, num_workers=1, multiprocessing_context=start
            )
            assert [batch.history_age.tolist() for batch in batches] == wanted, start
        print(len(wanted), "batches")
"""


@pytest.mark.slow
def test_workers_that_are_forked_or_spawned_after_openmp_make_the_same(
    log: EventLog, tmp_path: Path
) -> None:
    script = tmp_path / "workers.py"
    script.write_text(textwrap.dedent(_WORKERS))
    done = subprocess.run(
        [sys.executable, script, log.path, "fork", "spawn"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and done.stdout.endswith("batches\n"), done.stderr
