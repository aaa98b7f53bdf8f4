"""The order of requests, one window at a time: each comes once, and resuming is exact."""

from __future__ import annotations

import json
import math
import threading
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from ifa_torchrec.data import EventBudgetSampler, EventLog, LogSchema, RankingDataset, make_loader
from ifa_torchrec.data import order as order_module
from ifa_torchrec.data.order import BLOCK, WINDOW, Order, PartByPart
from ifa_torchrec.data.parts import own_parts
from ifa_torchrec.data.sampler import EMPTY_REQUEST
from ifa_torchrec.errors import ConfigError


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of four blocks of eight requests."""
    monkeypatch.setattr(order_module, "WINDOW", 32)
    monkeypatch.setattr(order_module, "BLOCK", 8)


def whole(order: Order, epoch: int = 0, first: int = 0) -> np.ndarray:
    return np.concatenate([np.empty(0, np.int64), *order.windows(epoch, first)])


@pytest.mark.usefixtures("small")
class TestWindows:
    @pytest.mark.parametrize("requests", [33, 64, 100, 257])
    def test_every_request_comes_once_and_a_window_has_few_blocks(self, requests: int) -> None:
        order = Order(requests, seed=5)
        windows = list(order.windows(epoch=1))
        assert sorted(np.concatenate(windows)) == list(range(requests))
        for window in windows:
            assert len(window) <= 32 and len(np.unique(window // 8)) <= 4
        assert len(windows) == math.ceil(requests / 32)

    @pytest.mark.parametrize("requests", [20, 32, 33, 100])
    @pytest.mark.parametrize("seed", [None, 5])
    def test_the_beginning_is_skipped(self, requests: int, seed: int | None) -> None:
        order = Order(requests, seed)
        wanted = whole(order, epoch=2)
        for first in range(requests + 1):
            np.testing.assert_array_equal(whole(order, 2, first), wanted[first:])

    def test_blocks_and_requests_of_a_window_are_reshuffled_each_epoch(self) -> None:
        order = Order(100, seed=5)
        first, second = next(order.windows(0)), next(order.windows(1))
        assert set(first // 8) != set(second // 8)
        assert (np.diff(first) != 1).mean() > 0.8
        assert whole(Order(100, seed=6)).tolist() != whole(order).tolist() == whole(order).tolist()

    def test_without_a_seed_requests_keep_their_order(self) -> None:
        assert whole(Order(100, None)).tolist() == list(range(100))

    @pytest.mark.parametrize("world", [1, 3])
    @pytest.mark.parametrize("other", [1, 2, 5])
    def test_other_ranks_resume_where_these_stopped(self, world: int, other: int) -> None:
        lengths = np.random.default_rng(0).integers(0, 30, 150)

        def samplers(world: int) -> list[EventBudgetSampler]:
            return [EventBudgetSampler(lengths, 60, 4, 5, (rank, world)) for rank in range(world)]

        before, after = samplers(world), samplers(other)
        lists = [list(sampler) for sampler in before]
        for step in (0, 1, len(lists[0]) // 2, len(lists[0]) - 1):
            rest = []
            for sampler in after:
                sampler.load_state_dict(before[-1].state_dict(step))
                rest.append(list(sampler))
            if world == other:
                assert rest == [of_rank[step:] for of_rank in lists]
            assert {len(of_rank) for of_rank in rest} == {len(rest[0])}
            made = [lists_of[:step] for lists_of in lists] + rest
            requests = [r for of_rank in made for one in of_rank for r in one if r != EMPTY_REQUEST]
            assert sorted(requests) == list(range(150))
        end = before[0].state_dict(len(lists[0]))
        assert (end["epoch"], end["request"]) == (1, 0)

    def test_no_step_ends_with_a_window(self) -> None:
        """Steps continue in the next window, so only the last step is short."""
        lists = list(EventBudgetSampler(np.ones(100, np.int64), 1000, 7, seed=5))
        assert [len(one) for one in lists] == [7] * 14 + [2]
        wide = list(EventBudgetSampler(np.ones(100, np.int64), 1000, 70, seed=5))
        assert [len(one) for one in wide] == [70, 30]

    def test_a_position_in_another_order_is_refused(self) -> None:
        sampler = EventBudgetSampler(np.ones(100, np.int64), 10, 4, seed=5)
        state = next(iter(sampler)) and sampler.state_dict(1)
        for changed in ({"seed": 6}, {"requests": 99}, {"cut": [64, 8]}):
            other = {**state, "order": {**state["order"], **changed}}
            with pytest.raises(ConfigError, match=r"position \(request 4\) belongs to request order"):
                sampler.load_state_dict(other)


@pytest.mark.usefixtures("small")
class TestPartByPart:
    SIZES = (40, 0, 33, 7, 70)

    def lists(
        self, world: int, state: dict | None = None, seed: int | None = 5
    ) -> tuple[list[list[list[int]]], list[EventBudgetSampler]]:
        """The lists of each rank, as request numbers in the whole split, and the samplers."""
        lengths = np.random.default_rng(0).integers(0, 30, sum(self.SIZES))
        begin = np.append(0, np.cumsum(self.SIZES))
        barrier, given = threading.Barrier(world), dict[int, np.ndarray]()

        def of_rank(rank: int) -> tuple[list[list[int]], EventBudgetSampler]:
            def gather(values: np.ndarray) -> list[np.ndarray]:
                given[rank] = values
                barrier.wait()
                found = [given[r] for r in range(world)]
                barrier.wait()
                return found

            own = own_parts(len(self.SIZES), (rank, world))
            whole = len(own) == len(self.SIZES)
            first, end = begin[own.start], begin[own.stop]
            order = PartByPart(self.SIZES, seed, None if whole else gather)
            sampler = EventBudgetSampler(lengths[first:end], 60, 4, order, (rank, world))
            if state is not None:
                sampler.load_state_dict(json.loads(json.dumps(state)))
            lists = list(sampler)
            for one in lists:
                assert 1 <= len(one) <= 4
                assert lengths[first:end][[r for r in one if r >= 0]].sum() <= 60
            assert sampler.imbalance() >= 1
            return [[r if r < 0 else r + first for r in one] for one in lists], sampler

        with ThreadPoolExecutor(world) as pool:
            found = list(pool.map(of_rank, range(world)))
        lists, samplers = [lists for lists, _ in found], [sampler for _, sampler in found]
        for step in zip(*lists, strict=True):  # all ranks take the same steps, with the same width
            assert len({len(one) for one in step}) == 1
            assert any(r != EMPTY_REQUEST for one in step for r in one)
        return lists, samplers

    @pytest.mark.parametrize("world", [1, 2, 3, 5, 7])
    @pytest.mark.parametrize("other", [1, 2, 4, 7])
    def test_other_ranks_resume_where_these_stopped(self, world: int, other: int) -> None:
        lists, samplers = self.lists(world)
        for step in (0, 1, len(lists[0]) // 2, len(lists[0]) - 1):
            states = [sampler.state_dict(step) for sampler in samplers]
            assert all(state == states[0] for state in states)
            rest, _ = self.lists(other, states[0])
            if world == other:
                assert rest == [of_rank[step:] for of_rank in lists]
            made = [of_rank[:step] for of_rank in lists] + rest
            requests = [r for of_rank in made for one in of_rank for r in one if r != EMPTY_REQUEST]
            assert sorted(requests) == list(range(150))
        end = samplers[0].state_dict(len(lists[0]))
        assert (end["epoch"], end["request"], end["of_parts"]) == (1, 0, [0] * 5)

    def test_without_a_seed_requests_keep_their_order(self) -> None:
        lists, _ = self.lists(1, seed=None)
        assert [r for one in lists[0] for r in one] == list(range(150))

    def test_epochs_differ_and_parts_too(self) -> None:
        order, none = PartByPart((50, 50), 0), np.zeros(2, np.int64)
        epochs = [np.concatenate(list(order.windows(epoch, none, range(2)))) for epoch in range(8)]
        assert all(sorted(epoch.tolist()) == list(range(100)) for epoch in epochs)
        assert {int(epoch[0]) // 50 for epoch in epochs} == {0, 1}  # which part is first
        assert len({tuple((epoch[epoch < 50]).tolist()) for epoch in epochs}) == 8
        assert not np.array_equal(epochs[0][epochs[0] < 50], epochs[0][epochs[0] >= 50] - 50)

    def test_a_position_of_a_log_without_parts_is_refused(self) -> None:
        (_, (sampler,)) = self.lists(1)
        with pytest.raises(ConfigError, match="belongs to request order"):
            sampler.load_state_dict(EventBudgetSampler([1] * 150, 60, 4, 5).state_dict(0))
        with pytest.raises(ConfigError, match="request 3 is not a position"):
            sampler.start_at(0, 3)


def test_a_split_of_at_most_a_window_is_shuffled_whole() -> None:
    wanted = np.arange(1000)
    np.random.default_rng([3, 2]).shuffle(wanted)
    np.testing.assert_array_equal(whole(Order(1000, seed=3), epoch=2), wanted)
    sampler = EventBudgetSampler(np.ones(1000, np.int64), 10, 4, seed=3)
    sampler.start_at(2, 4)
    assert next(iter(sampler)) == wanted[4:8].tolist()


class Computed:
    """A column of any length, with values computed from the row numbers."""

    def __init__(self, length: int, value: Callable[[np.ndarray], np.ndarray]) -> None:
        self.length, self.value = length, value

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        return self.value(rows)

    def take(self, rows: np.ndarray, out: np.ndarray | None = None, mode: str = "clip") -> np.ndarray:
        values = self.value(rows)
        if out is not None:
            out[:] = values
        return values


class ComputedLog:
    """10^9 events of 10^7 users, 100 each, a day apart; 10^8 requests of ten candidates."""

    USERS, REQUESTS, DAY = 10**7, 10**8, 86_400_000_000

    item_rows = EventLog.item_rows
    own = range(1)

    def __init__(self) -> None:
        self.schema = LogSchema(item_features={"item": 1000})
        self.num_items = 1000
        item = Computed(100 * self.USERS, lambda rows: rows * 7919 % 1000)
        self.events: dict[str, Any] = {
            "item": item,
            "time": Computed(len(item), lambda rows: rows % 100 * self.DAY),
        }
        self.items = {"item": np.arange(1000)}

    def history_range(self, user: np.ndarray, time: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return 100 * user, 100 * user + time // self.DAY

    def requests_of_parts(self, split: str) -> list[int]:
        return [self.REQUESTS]

    def requests(self, split: str) -> dict[str, Computed]:
        assert split == "train"
        count, candidates = self.REQUESTS, 10 * self.REQUESTS
        return {
            "user": Computed(count, lambda rows: rows % self.USERS),
            "time": Computed(count, lambda rows: rows * 2654435761 % 21 * self.DAY),
            "candidate_offsets": Computed(count + 1, lambda rows: 10 * rows),
            "candidates": Computed(candidates, lambda rows: rows % 1000),
            "exposed": Computed(candidates, lambda rows: rows % 2 == 0),
            "label": Computed(candidates, lambda rows: (rows % 10 == 0).astype(np.float32)),
        }


@pytest.mark.parametrize("world", [1, 512])
def test_the_first_batch_of_a_hundred_million_requests_comes_immediately(world: int) -> None:
    """Time and memory do not grow with requests or events; computed columns replace mapped ones."""
    tracemalloc.start()
    try:
        start = time.perf_counter()
        dataset = RankingDataset(ComputedLog(), "train")  # pyright: ignore[reportArgumentType]
        sampler = EventBudgetSampler(dataset.histories, 32768, 64, seed=1, shard=(world - 1, world))
        sampler.load_state_dict({**sampler.state_dict(0), "epoch": 3, "request": 77_777_777})
        batches = iter(make_loader(dataset, sampler))
        batch = next(batches)
        seconds = time.perf_counter() - start
        batches.close()
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert batch.num_requests == 64
    assert 64 * 5 < len(batch.history_age) < 64 * 15 and len(batch.exposed) == 640
    assert seconds < 5 and most < 2**30, (seconds, most)
    print(f"world {world}: {seconds:.2f} s, {most / 2**20:.0f} MiB")  # with -s


def test_windows_consist_of_whole_blocks() -> None:
    assert WINDOW % BLOCK == 0
