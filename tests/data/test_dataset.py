"""The loader: histories that never see the present, batches aligned with their requests, budgets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from toy import NEW_USER, ONE_EVENT_USER, SCHEMA, Toy

from ifa_torchrec.batch import RankingBatch
from ifa_torchrec.data import EventBudgetSampler, EventLog, LogSchema, RankingDataset, make_loader

DAY = pd.Timedelta(days=1)


@pytest.fixture(scope="module")
def dataset(log: EventLog) -> RankingDataset:
    return RankingDataset(log, "train")


def histories(batch: RankingBatch, key: str = "history_item") -> Iterator[tuple[list, list]]:
    """Ids and ages of each request's history."""
    jagged = batch.sequence_features[key]
    bounds = jagged.offsets().tolist()
    for start, end in pairwise(bounds):
        yield jagged.values()[start:end].tolist(), batch.history_age[start:end].tolist()


class TestHistoryIsStrictlyBefore:
    def test_equals_a_naive_filter(self, toy: Toy, dataset: RankingDataset) -> None:
        batch = dataset[list(range(len(dataset)))]
        at_an_event = 0
        for (ids, ages), request in zip(
            histories(batch), toy.requests["train"].itertuples(), strict=True
        ):
            own = toy.events[toy.events["user"] == request.user]
            at_an_event += (own["time"] == request.time).any()
            past = own[own["time"] < request.time].sort_values("time", kind="stable")
            assert ids == past["item"].tolist()
            assert ages == pytest.approx(((request.time - past["time"]) / DAY).tolist(), rel=1e-6)
        assert at_an_event >= 10, "the toy must have requests at the very time of an event"

    def test_every_item_feature_is_of_the_same_events(self, toy: Toy, dataset: RankingDataset) -> None:
        batch = dataset[list(range(len(dataset)))]
        category = toy.items["category"].to_numpy()
        for side in ("history", "candidate"):
            items = batch.sequence_features[f"{side}_item"]
            categories = batch.sequence_features[f"{side}_category"]
            assert categories.values().tolist() == category[items.values()].tolist()
            assert categories.lengths().tolist() == items.lengths().tolist()

    @pytest.mark.parametrize("resolution", ["us", "ns"])
    def test_events_planted_at_the_request_and_after_are_never_seen(
        self, toy: Toy, tmp_path: Path, resolution: str
    ) -> None:
        """Each request gets three events of items that are its own, for the same user."""
        requests = toy.requests["train"]
        late = [pd.Timedelta(0), pd.Timedelta(1, unit="us"), 30 * DAY]
        rows = range(len(requests))
        planted = [[40 + 4 * row + k for k in range(3)] for row in rows]
        witness = [40 + 4 * row + 3 for row in rows]  # just before: this one must be seen
        plants = [
            {"user": request.user, "time": request.time + lag, "item": item}
            for row, request in enumerate(requests.itertuples())
            for lag, item in zip(
                [*late, pd.Timedelta(-1, unit="us")], [*planted[row], witness[row]], strict=True
            )
        ]
        events = pd.concat([toy.events, pd.DataFrame(plants)], ignore_index=True)
        events["time"] = events["time"].astype(f"datetime64[{resolution}]")
        items = 40 + 4 * len(requests)
        log = EventLog.from_pandas(
            tmp_path / "log",
            events.sample(frac=1, random_state=1),
            schema=LogSchema(item_features={"item": items}),
            requests={"train": requests[["user", "time", "candidates", "exposed", "label"]]},
        )
        dataset = RankingDataset(log, "train")
        batch = dataset[list(rows)]
        for row, (ids, ages) in enumerate(histories(batch)):
            assert not set(planted[row]) & set(ids), f"request {row} sees its own present or future"
            assert witness[row] in ids
            assert min(ages) > 0
        # the plants are there: later requests of the same user see them
        everything = set(batch.sequence_features["history_item"].values().tolist())
        assert len(everything & {item for items in planted for item in items}) > 20

    def test_ages_are_in_days(self, tmp_path: Path) -> None:
        at = pd.Timestamp(2024, 3, 1, 12)
        ago = [10 * 365 * DAY, 1.5 * DAY, pd.Timedelta(minutes=6), pd.Timedelta(1, unit="us")]
        log = EventLog.from_pandas(
            tmp_path / "log",
            pd.DataFrame({"user": 1, "time": [at - a for a in ago], "item": range(4)}),
            LogSchema(item_features={"item": 4}),
            requests={
                "train": pd.DataFrame(
                    {"user": [1], "time": [at], "candidates": [[0]], "exposed": [[True]], "label": [[1]]}
                )
            },
        )
        age = RankingDataset(log, "train")[[0]].history_age
        assert age.dtype == torch.float32
        assert age.tolist() == pytest.approx([3650, 1.5, 6 / 1440, 1 / 86_400_000_000], rel=1e-6)

    def test_users_without_a_past(self, toy: Toy, dataset: RankingDataset) -> None:
        users = toy.requests["train"]["user"].to_numpy()
        assert (dataset.history_lengths[users == NEW_USER] == 0).all()
        # before, at and after its only event
        assert set(dataset.history_lengths[users == ONE_EVENT_USER]) == {0, 1}

    def test_requests_hold_no_copy_of_a_history(self, toy: Toy, log: EventLog) -> None:
        stored = pq.read_schema(log.path / "requests" / "train.parquet").names
        assert sorted(stored) == sorted(toy.requests["train"].columns)


class TestBatch:
    ORDER = (17, 3, 40, 4, 0, 47, 12)  # users with and without events, in no order

    @pytest.fixture(scope="class")
    def batch(self, dataset: RankingDataset) -> RankingBatch:
        return dataset[list(self.ORDER)]

    @pytest.fixture(scope="class")
    def frame(self, toy: Toy) -> pd.DataFrame:
        return toy.requests["train"].iloc[list(self.ORDER)]

    def test_shapes(self, batch: RankingBatch, frame: pd.DataFrame, dataset: RankingDataset) -> None:
        b, m = len(self.ORDER), sum(map(len, frame["candidates"]))
        n = int(dataset.history_lengths[list(self.ORDER)].sum())
        assert batch.num_requests == b
        assert batch.dense_features.shape == (b, 2)
        assert batch.candidate_dense.shape == (m, 1)
        assert batch.labels.shape == (m, 1)
        assert batch.exposed.shape == (m,) and batch.exposed.dtype == torch.bool
        assert batch.history_age.shape == (n,)
        floats = (batch.dense_features, batch.candidate_dense, batch.labels, batch.history_age)
        assert {f.dtype for f in floats} == {torch.float32}

    def test_keys_and_lengths(
        self, batch: RankingBatch, frame: pd.DataFrame, dataset: RankingDataset
    ) -> None:
        features = batch.sequence_features
        assert features.stride() == len(self.ORDER)
        assert set(features.keys()) == {
            "history_item",
            "history_category",
            "candidate_item",
            "candidate_category",
        }
        lengths = dataset.history_lengths[list(self.ORDER)].tolist()
        assert 0 in lengths and max(lengths) > 10
        assert features["history_item"].lengths().tolist() == lengths
        assert features["candidate_item"].lengths().tolist() == [len(c) for c in frame["candidates"]]

    def test_everything_is_aligned_with_its_request(
        self, batch: RankingBatch, frame: pd.DataFrame
    ) -> None:
        assert batch.context_features.keys() == ["store", "weekday"]
        for name in ("store", "weekday"):
            context = batch.context_features[name]
            assert context.values().tolist() == frame[name].tolist()
            assert context.lengths().tolist() == [1] * len(frame)
        dense = torch.tensor(frame[["hour", "season"]].to_numpy(np.float32))
        torch.testing.assert_close(batch.dense_features, dense, rtol=0, atol=0)

        def flat(column: str) -> np.ndarray:
            return np.concatenate(list(frame[column]))

        items = batch.sequence_features["candidate_item"].values()
        assert items.tolist() == flat("candidates").tolist()
        assert batch.labels[:, 0].tolist() == flat("label").tolist()
        assert batch.exposed.tolist() == flat("exposed").tolist()
        assert batch.candidate_dense[:, 0].tolist() == flat("price").astype(np.float32).tolist()

    def test_a_request_is_the_same_in_any_batch(
        self, batch: RankingBatch, dataset: RankingDataset
    ) -> None:
        together = list(histories(batch))
        for place, request in enumerate(self.ORDER):
            alone = dataset[[request]]
            assert next(histories(alone)) == together[place]
            torch.testing.assert_close(alone.dense_features[0], batch.dense_features[place])

    def test_candidate_rows_find_the_candidates(
        self, batch: RankingBatch, dataset: RankingDataset
    ) -> None:
        rows, lengths = dataset.candidate_rows(self.ORDER)
        assert dataset.requests["label"][rows].tolist() == batch.labels[:, 0].tolist()
        assert lengths.tolist() == batch.sequence_features["candidate_item"].lengths().tolist()

    def test_tasks_are_columns_in_the_schemas_order(self, toy: Toy, tmp_path: Path) -> None:
        requests = toy.requests["train"].copy()
        requests["bought"] = requests["label"].map(lambda v: 1.0 - v)
        schema = replace(SCHEMA, tasks=("bought", "label"))
        log = Toy(toy.events, toy.items, {"train": requests}, schema).write(tmp_path / "log")
        batch = RankingDataset(log, "train")[[2, 1]]
        label = np.concatenate([requests["label"][2], requests["label"][1]])
        assert label.any()
        np.testing.assert_array_equal(batch.labels, np.stack([1 - label, label], axis=1))

    def test_a_log_with_nothing_but_items(self, toy: Toy, tmp_path: Path) -> None:
        requests = toy.requests["train"][["user", "time", "candidates", "exposed", "label"]]
        log = EventLog.from_pandas(
            tmp_path / "log",
            toy.events,
            LogSchema(item_features={"item": 40}),
            requests={"train": requests},
        )
        batch = RankingDataset(log, "train")[[0, 5]]
        assert batch.dense_features.shape == (2, 0)
        assert batch.candidate_dense.shape == (len(batch.labels), 0)
        assert batch.context_features.keys() == []
        assert batch.num_requests == 2

    def test_dataset_has_one_entry_a_request(self, toy: Toy, dataset: RankingDataset) -> None:
        assert len(dataset) == len(toy.requests["train"]) == len(dataset.history_lengths)


class TestEventBudgetSampler:
    LENGTHS = np.random.default_rng(0).integers(0, 30, 101)
    LENGTHS[[7, 60]] = 500  # more than the budget

    def sampler(self, **options) -> EventBudgetSampler:
        return EventBudgetSampler(self.LENGTHS, **{"max_events": 64, "max_requests": 5, **options})

    @pytest.mark.parametrize("seed", [None, 0, 1])
    def test_budgets_are_kept(self, seed: int | None) -> None:
        for batch in self.sampler(seed=seed):
            assert 1 <= len(batch) <= 5
            assert self.LENGTHS[batch].sum() <= 64 or len(batch) == 1

    @pytest.mark.parametrize("seed", [None, 0])
    def test_a_history_over_budget_stands_alone(self, seed: int | None) -> None:
        batches = list(self.sampler(seed=seed))
        assert [7] in batches and [60] in batches

    def test_the_budget_is_used(self) -> None:
        """A batch is closed only when the next request would break a limit."""
        batches = list(self.sampler())
        for batch, following in pairwise(batches):
            events = self.LENGTHS[batch].sum() + self.LENGTHS[following[0]]
            assert len(batch) == 5 or events > 64

    @pytest.mark.parametrize("seed", [None, 0, 1])
    def test_one_rank_sees_everything_once(self, seed: int | None) -> None:
        seen = [request for batch in self.sampler(seed=seed) for request in batch]
        assert sorted(seen) == list(range(101))
        assert (seen == sorted(seen)) == (seed is None)

    @pytest.mark.parametrize("world", [2, 3, 7, 50])
    def test_ranks_take_equal_steps_and_cover_everything(self, world: int) -> None:
        alone = list(self.sampler(seed=3))
        ranks = [list(self.sampler(seed=3, shard=(rank, world))) for rank in range(world)]
        steps = -(-len(alone) // world)
        assert [len(batches) for batches in ranks] == [steps] * world
        assert [len(self.sampler(seed=3, shard=(rank, world))) for rank in range(world)] == [
            steps
        ] * world
        together = [batch for batches in ranks for batch in batches]
        # nothing is missing, and only as much is seen twice as evens out the steps
        assert {tuple(b) for b in together} == {tuple(b) for b in alone}
        assert len(together) - len(alone) < world

    def test_seed_and_epoch_decide_the_order(self) -> None:
        def order(seed: int, epoch: int) -> list:
            sampler = self.sampler(seed=seed)
            sampler.start_at(epoch)
            return list(sampler)

        assert order(1, 0) == list(self.sampler(seed=1)) == order(1, 0)
        assert order(1, 2) == order(1, 2)
        orders = [order(1, 0), order(1, 1), order(2, 0), order(2, 1)]
        assert all(a != b for i, a in enumerate(orders) for b in orders[:i])

    @pytest.mark.parametrize("shard", [(0, 1), (1, 3)])
    def test_start_at_goes_on_exactly_there(self, shard: tuple[int, int]) -> None:
        sampler = self.sampler(seed=4, shard=shard)
        sampler.start_at(2)
        whole = list(sampler)
        for batch in (0, 1, len(whole) - 1, len(whole)):
            sampler.start_at(2, batch)
            assert list(sampler) == whole[batch:]
            assert len(sampler) == len(whole) - batch

    def test_no_requests(self) -> None:
        sampler = EventBudgetSampler([], max_events=1, max_requests=1, shard=(1, 2))
        assert list(sampler) == [] and len(sampler) == 0

    @pytest.mark.parametrize("bad", [{"max_events": 0}, {"max_requests": 0}, {"max_events": -1}])
    def test_bad_budgets(self, bad: dict) -> None:
        with pytest.raises(ValueError, match=f"{next(iter(bad))}.*{next(iter(bad.values()))}"):
            self.sampler(**bad)


def test_loader_end_to_end(toy: Toy, dataset: RankingDataset) -> None:
    sampler = EventBudgetSampler(dataset.history_lengths, max_events=100, max_requests=8, seed=0)
    loader = make_loader(dataset, sampler)
    wanted = list(sampler)
    assert len(loader) == len(wanted) > 5
    for batch, requests in zip(loader, wanted, strict=True):
        assert isinstance(batch, RankingBatch)
        assert batch.num_requests == len(requests)
        assert len(batch.history_age) <= 100 or len(requests) == 1
        seasons = toy.requests["train"]["season"][requests].to_numpy(np.float32)
        np.testing.assert_array_equal(batch.dense_features[:, 1], seasons)
