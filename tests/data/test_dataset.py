"""Dataset and sampler: histories end before the request, batches are aligned, budgets are kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from toy import NEW_USER, ONE_EVENT_USER, SCHEMA, Toy

from ifa_torchrec.batch import RankingBatch
from ifa_torchrec.data import EventBudgetSampler, EventLog, LogSchema, RankingDataset, make_loader
from ifa_torchrec.data.sampler import EMPTY_REQUEST

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
        """Each request gets three events of the same user, with items that occur nowhere else."""
        requests = toy.requests["train"]
        late = [pd.Timedelta(0), pd.Timedelta(1, unit="us"), 30 * DAY]
        rows = range(len(requests))
        planted = [[40 + 4 * row + k for k in range(3)] for row in rows]
        witness = [40 + 4 * row + 3 for row in rows]  # just before: must be seen
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
        # the planted events exist: later requests of the same user see them
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

    @pytest.mark.parametrize("length", [1, 5, 10_000])
    def test_history_length_keeps_the_latest(
        self, log: EventLog, dataset: RankingDataset, length: int
    ) -> None:
        short = RankingDataset(log, "train", history_length=length)
        assert short.history_lengths.tolist() == np.minimum(dataset.history_lengths, length).tolist()
        everything = list(range(len(dataset)))
        for whole, latest in zip(
            histories(dataset[everything]), histories(short[everything]), strict=True
        ):
            assert latest == tuple(column[-length:] for column in whole)

    def test_history_length_below_one_is_refused(self, log: EventLog) -> None:
        with pytest.raises(ValueError, match="history_length must be at least 1, got 0"):
            RankingDataset(log, "train", history_length=0)

    def test_users_without_a_past(self, toy: Toy, dataset: RankingDataset) -> None:
        users = toy.requests["train"]["user"].to_numpy()
        assert (dataset.history_lengths[users == NEW_USER] == 0).all()
        # before, at and after the user's only event
        assert set(dataset.history_lengths[users == ONE_EVENT_USER]) == {0, 1}

    def test_requests_have_no_copy_of_a_history(self, toy: Toy, log: EventLog) -> None:
        stored = pq.read_schema(log.path / "requests" / "train.parquet").names
        assert sorted(stored) == sorted(toy.requests["train"].columns)


class TestBatch:
    ORDER = (17, 3, 40, 4, 0, 47, 12)  # users with and without events, unordered

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

    def test_a_log_with_only_items(self, toy: Toy, tmp_path: Path) -> None:
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

    def test_dataset_has_one_entry_per_request(self, toy: Toy, dataset: RankingDataset) -> None:
        assert len(dataset) == len(toy.requests["train"]) == len(dataset.history_lengths)


class TestEmptyRequests:
    """EMPTY_REQUEST pads a rank's batch: a request without events, candidates and features."""

    @pytest.mark.parametrize("padded", [(17, 3, -1), (-1, 17, 3), (17, -1, -1, 3)], ids=str)
    def test_are_where_they_are_requested_and_change_no_other(
        self, dataset: RankingDataset, padded: tuple[int, ...]
    ) -> None:
        batch, real = dataset[list(padded)], dataset[[17, 3]]
        places = [place for place, request in enumerate(padded) if request != EMPTY_REQUEST]
        assert batch.num_requests == len(padded) and min(dataset.history_lengths[[17, 3]]) > 0
        for mine, wanted in (
            (batch.sequence_features, real.sequence_features),
            (batch.context_features, real.context_features),
        ):
            assert mine.stride() == len(padded) and mine.keys() == wanted.keys()
            for key, feature in wanted.to_dict().items():
                lengths = np.zeros(len(padded), np.int64)
                lengths[places] = feature.lengths()
                assert mine[key].lengths().tolist() == lengths.tolist()
                assert mine[key].values().tolist() == feature.values().tolist()
        dense = torch.zeros(len(padded), 2)
        dense[places] = real.dense_features
        assert batch.dense_features.tolist() == dense.tolist()
        for name in ("candidate_dense", "history_age", "labels", "exposed"):
            assert torch.equal(getattr(batch, name), getattr(real, name)), name

    def test_only_empty_requests(self, dataset: RankingDataset) -> None:
        """What a rank trains on when there are fewer requests than ranks."""
        batch, usual = dataset[[EMPTY_REQUEST] * 3], dataset[[17]]
        assert batch.num_requests == 3
        assert batch.dense_features.tolist() == [[0.0, 0.0]] * 3
        for features, other in (
            (batch.sequence_features, usual.sequence_features),
            (batch.context_features, usual.context_features),
        ):
            assert features.stride() == 3 and features.keys() == other.keys()
            assert features.lengths().tolist() == [0] * 3 * len(features.keys())
            assert len(features.values()) == 0 and features.values().dtype == other.values().dtype
        for name in ("candidate_dense", "history_age", "labels", "exposed"):
            mine, other = getattr(batch, name), getattr(usual, name)
            assert len(mine) == 0
            assert mine.shape[1:] == other.shape[1:] and mine.dtype == other.dtype, name

    @pytest.mark.parametrize("bad", [[], [-2], [3, -2, 4], [48], [-1, 48], [[1]]], ids=str)
    def test_anything_else_is_not_a_request(self, dataset: RankingDataset, bad: list) -> None:
        with pytest.raises(IndexError, match=r"0 to 47 \(or -1 for an empty request\), got"):
            dataset[bad]


@dataclass
class Case:
    """A sampler's arguments, and the samplers of all ranks."""

    lengths: np.ndarray
    max_events: int
    max_requests: int
    seed: int | None
    world: int

    def samplers(self, world: int | None = None) -> list[EventBudgetSampler]:
        world = world or self.world
        budget = (self.max_events, self.max_requests, self.seed)
        return [EventBudgetSampler(self.lengths, *budget, shard=(r, world)) for r in range(world)]

    def order(self, epoch: int) -> list[int]:
        """The requests in the order in which a single rank takes them one at a time."""
        sampler = EventBudgetSampler(self.lengths, self.max_events, 1, self.seed)
        sampler.start_at(epoch)
        return [request for [request] in sampler]


def lists_of(samplers: Sequence[EventBudgetSampler], epoch: int = 0, request: int = 0) -> list:
    """The lists of each rank, one per step."""
    for sampler in samplers:
        sampler.start_at(epoch, request)
    return [list(sampler) for sampler in samplers]


def taken(ranks: list[list[list[int]]]) -> list[list[int]]:
    """For each step, the requests that all ranks take together, ascending."""
    steps = zip(*ranks, strict=True)
    return [sorted(r for batch in step for r in batch if r != EMPTY_REQUEST) for step in steps]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Histories of all kinds: none, equal length, heavy tail, one far longer than all others."""
    kind = draw(st.sampled_from(["any", "zeros", "equal", "heavy tail", "one huge", "many"]))
    count = draw(st.integers(0, 60 if kind != "many" else 400))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    if kind == "any":
        lengths = np.array(draw(st.lists(st.integers(0, 60), max_size=60)), np.int64)
    elif kind in ("zeros", "equal"):
        lengths = np.full(count, 0 if kind == "zeros" else draw(st.integers(1, 60)))
    else:
        lengths = rng.lognormal(2.5, 1.5, count).astype(np.int64)
        if kind == "one huge" and count:
            lengths[rng.integers(count)] = 10**9
    return Case(
        lengths,
        max_events=draw(st.integers(1, 200)),
        max_requests=draw(st.integers(1, 9)) if kind != "many" else 64,
        seed=draw(st.sampled_from([None, 0, 7])),
        world=draw(st.integers(1, 8)),
    )


property_test = settings(deadline=None, max_examples=80)


class TestEventBudgetSamplerOnAnyLengths:
    @property_test
    @given(cases())
    @example(Case(np.zeros(9, np.int64), 1, 1, None, 8))
    @example(Case(np.array([10**9]), 1, 3, 0, 8))
    def test_all_ranks_make_the_same_steps_within_their_budgets(self, case: Case) -> None:
        samplers = case.samplers()
        ranks = lists_of(samplers)
        assert set(map(len, ranks)) == {len(ranks[0])}
        for step in zip(*ranks, strict=True):
            assert len(set(map(len, step))) == 1  # padded to the same width
            assert 1 <= len(step[0]) <= case.max_requests
            # no wider than the widest, and no step without any request
            assert any(EMPTY_REQUEST not in batch for batch in step)
            for batch in step:
                requests = [r for r in batch if r != EMPTY_REQUEST]
                lengths = case.lengths[requests]
                alone = np.count_nonzero(lengths) == 1
                assert lengths.sum() <= case.max_events or alone, lengths

    @property_test
    @given(cases(), st.integers(0, 3))
    def test_everything_is_taken_once_in_the_epochs_order(self, case: Case, epoch: int) -> None:
        """A position in the data is a number of requests, so steps must take them in order."""
        samplers = case.samplers()
        steps, order = taken(lists_of(samplers, epoch)), case.order(epoch)
        assert sorted(order) == list(range(len(case.lengths)))
        assert (order == sorted(order)) or case.seed is not None
        bounds = [samplers[0].requests_taken(step) for step in range(len(steps) + 1)]
        assert bounds[0] == 0 and bounds[-1] == len(case.lengths)
        assert steps == [sorted(order[a:b]) for a, b in pairwise(bounds)]
        for sampler in samplers:
            assert [sampler.requests_taken(step) for step in range(len(steps) + 1)] == bounds

    @property_test
    @given(cases(), st.data())
    def test_the_same_ranks_resume_exactly_there(self, case: Case, data: st.DataObject) -> None:
        samplers = case.samplers()
        ranks = lists_of(samplers, 2)
        bounds = [samplers[0].requests_taken(step) for step in range(len(ranks[0]) + 1)]
        step = data.draw(st.integers(0, len(ranks[0])))
        assert lists_of(samplers, 2, bounds[step]) == [batches[step:] for batches in ranks]
        rest = range(len(ranks[0]) - step + 1)
        assert [samplers[0].requests_taken(later) for later in rest] == bounds[step:]

    @property_test
    @given(cases(), st.integers(1, 8), st.data())
    def test_other_ranks_and_budgets_take_the_rest(
        self, case: Case, world: int, data: st.DataObject
    ) -> None:
        request = data.draw(st.integers(0, len(case.lengths)))
        other = replace(case, max_events=case.max_events + 3, max_requests=case.max_requests + 1)
        rest = taken(lists_of(other.samplers(world), 1, request))
        assert sorted(r for step in rest for r in step) == sorted(case.order(1)[request:])

    @property_test
    @given(cases())
    def test_imbalance_is_the_busiest_rank_over_the_mean(self, case: Case) -> None:
        samplers = case.samplers()
        ratios = []
        for step in zip(*lists_of(samplers), strict=True):
            events = [case.lengths[[r for r in batch if r >= 0]].sum() for batch in step]
            if sum(events):
                ratios.append(max(events) * len(events) / sum(events))
        wanted = sum(ratios) / len(ratios) if ratios else 1.0
        assert [s.imbalance() for s in samplers] == [pytest.approx(wanted)] * case.world

    @property_test
    @given(cases())
    def test_one_rank_is_never_padded(self, case: Case) -> None:
        [batches] = lists_of(case.samplers(world=1))
        assert EMPTY_REQUEST not in {request for batch in batches for request in batch}


class TestEventBudgetSampler:
    LENGTHS = np.random.default_rng(0).integers(0, 30, 101)
    LENGTHS[[7, 60]] = 500  # more than the budget

    def sampler(self, **options) -> EventBudgetSampler:
        return EventBudgetSampler(self.LENGTHS, **{"max_events": 64, "max_requests": 5, **options})

    def ranks(self, world: int, **options) -> list[EventBudgetSampler]:
        return [self.sampler(shard=(rank, world), **options) for rank in range(world)]

    @pytest.mark.parametrize(
        ("lengths", "max_requests", "wanted"),
        [
            # longest first to the rank with the fewest events: 9 | 8, 5 | 4, 3 | 1
            ([1, 3, 4, 5, 8, 9], 9, [[1, 2, 5], [0, 3, 4]]),
            # 9 and then, since a rank takes at most three, 1 and 1; 2, 2, 2
            ([2, 9, 2, 1, 2, 1], 3, [[1, 3, 5], [0, 2, 4]]),
            # one is far longer than the others, which fill the other rank
            ([5, 90, 5, 5], 9, [[1, -1, -1], [0, 2, 3]]),
            # requests without events go where there are the fewest requests
            ([0, 0, 0, 0, 7], 4, [[4, -1, -1, -1], [0, 1, 2, 3]]),
            ([6], 9, [[0], [-1]]),
        ],
        ids=str,
    )
    def test_a_step_is_shared_longest_first(
        self, lengths: list[int], max_requests: int, wanted: list[list[int]]
    ) -> None:
        samplers = [EventBudgetSampler(lengths, 100, max_requests, shard=(rank, 2)) for rank in (0, 1)]
        assert [list(sampler) for sampler in samplers] == [[batch] for batch in wanted]

    @pytest.mark.parametrize("seed", [None, 0])
    def test_a_history_over_budget_has_its_own_list(self, seed: int | None) -> None:
        """Except for requests without events."""
        for world in (1, 3):
            batches = [batch for batches in lists_of(self.ranks(world, seed=seed)) for batch in batches]
            for long in (7, 60):
                [batch] = [batch for batch in batches if long in batch]
                assert not self.LENGTHS[[r for r in batch if r not in (long, EMPTY_REQUEST)]].any()

    def test_one_rank_uses_its_budget(self) -> None:
        """A batch is closed only when the next request would break a limit."""
        batches = list(self.sampler())
        for batch, following in pairwise(batches):
            events = self.LENGTHS[batch].sum() + self.LENGTHS[following[0]]
            assert len(batch) == 5 or events > 64

    @pytest.mark.parametrize("world", [1, 2, 4, 8])
    def test_ranks_use_their_budgets(self, world: int) -> None:
        """They share what fits in total, and a step that does not fit is only cut a little."""
        lengths = log_normal(sigma=0.8)
        ranks = [EventBudgetSampler(lengths, 8000, 1000, seed=0, shard=(r, world)) for r in range(world)]
        steps = taken(lists_of(ranks))[:-1]  # the last step takes the rest
        used = [lengths[step].sum() / (8000 * world) for step in steps]
        assert len(steps) > 8 and np.mean(used) > 0.9

    @pytest.mark.parametrize("world", [2, 4, 8])
    @pytest.mark.parametrize("max_events", [10**9, 20_000])
    def test_ranks_are_far_closer_than_in_a_naive_split(self, world: int, max_events: int) -> None:
        """Naive split: each rank makes its own batches of every world-th request."""
        lengths = log_normal(sigma=1.0)
        ranks = [
            EventBudgetSampler(lengths, max_events, 32, seed=0, shard=(rank, world))
            for rank in range(world)
        ]
        order = np.concatenate(taken(lists_of([EventBudgetSampler(lengths, max_events, 1, seed=0)])))
        events = []
        for rank in range(world):
            own = order[rank::world]
            alone = EventBudgetSampler(lengths[own], max_events, 32)
            events.append([lengths[own[batch]].sum() for batch in alone])
        steps = list(zip(*events, strict=False))
        naive = np.mean([max(step) / np.mean(step) for step in steps])
        assert naive > 1.05
        assert ranks[0].imbalance() - 1 < 0.15 * (naive - 1)

    def test_seed_and_epoch_decide_the_order(self) -> None:
        def order(seed: int, epoch: int) -> list:
            sampler = self.sampler(seed=seed)
            sampler.start_at(epoch)
            return list(sampler)

        assert order(1, 0) == list(self.sampler(seed=1)) == order(1, 0)
        assert order(1, 2) == order(1, 2)
        orders = [order(1, 0), order(1, 1), order(2, 0), order(2, 1)]
        assert all(a != b for i, a in enumerate(orders) for b in orders[:i])

    def test_no_requests(self) -> None:
        sampler = EventBudgetSampler([], max_events=1, max_requests=1, shard=(1, 2))
        assert list(sampler) == []
        assert sampler.requests_taken(0) == 0 and sampler.imbalance() == 1

    @pytest.mark.parametrize("bad", [{"max_events": 0}, {"max_requests": 0}, {"max_events": -1}])
    def test_bad_budgets(self, bad: dict) -> None:
        with pytest.raises(ValueError, match=f"{next(iter(bad))}.*{next(iter(bad.values()))}"):
            self.sampler(**bad)


def log_normal(sigma: float) -> np.ndarray:
    """Realistic histories: most short, some long."""
    return np.random.default_rng(0).lognormal(5, sigma, 4000).astype(np.int64)


@pytest.mark.parametrize("shard", [(0, 1), (1, 3)], ids=["alone", "one of three"])
def test_loader_end_to_end(toy: Toy, dataset: RankingDataset, shard: tuple[int, int]) -> None:
    sampler = EventBudgetSampler(
        dataset.history_lengths, max_events=100, max_requests=8, seed=0, shard=shard
    )
    loader = make_loader(dataset, sampler)
    wanted = list(sampler)
    assert len(wanted) >= 3
    for batch, requests in zip(loader, wanted, strict=True):
        assert isinstance(batch, RankingBatch)
        assert batch.num_requests == len(requests)
        lengths = batch.sequence_features["history_item"].lengths()
        assert lengths.sum() <= 100 or lengths.count_nonzero() == 1
        assert lengths.sum() == len(batch.history_age)
        seasons = toy.requests["train"]["season"].reindex(requests, fill_value=0)
        np.testing.assert_array_equal(batch.dense_features[:, 1], seasons.to_numpy(np.float32))
