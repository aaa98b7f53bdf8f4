"""Metrics of a split by task, also for items that the model does not know."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from every_field import KNOWN_ITEMS, RICH_SCHEMA, make_rich
from toy import NEW_USER

from ifa_torchrec.batch import RankingBatch, Scale
from ifa_torchrec.data import EventLog, RankingDataset
from ifa_torchrec.modules import Task
from ifa_torchrec.training import groups
from ifa_torchrec.training.groups import by_history, shares
from ifa_torchrec.training.metrics import (
    correlation,
    gauc,
    ndcg,
    ranking_metrics,
    recall,
    regression_metrics,
)
from ifa_torchrec.training.metrics_table import as_table
from ifa_torchrec.training.scoring import TaskScores, measure, time_per_request

WATCH = Task("watch", "regression", scale=Scale(2.0, 1.0, log=True))
LABEL = Task("label")


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> EventLog:
    """A log whose lists contain unknown ids."""
    toy = make_rich()
    toy.items["tag"] = [
        ids if item % 3 else [0] * bool(item) for item, ids in enumerate(toy.items["tag"])
    ]
    for frame in toy.requests.values():
        frame["interest"] = [[0, *ids] for ids in frame["interest"]]
    return toy.write(tmp_path_factory.mktemp("log") / "log")


@pytest.fixture
def split(log: EventLog) -> RankingDataset:
    """A split with two tasks, one of them a regression without labels for unexposed candidates."""
    dataset = RankingDataset(log, "train")
    requests = dataset.requests
    watch = np.where(requests["exposed"], requests["watch"], np.float32(1e30))
    dataset.requests = {**requests, "watch": watch}
    return dataset


def logits(dataset: RankingDataset, tasks: int = 2) -> np.ndarray:
    rows = len(dataset.requests["candidates"])
    return np.random.default_rng(1).normal(size=(rows, tasks)).astype(np.float32)


def requests_of(dataset: RankingDataset) -> np.ndarray:
    return np.repeat(np.arange(len(dataset)), np.diff(dataset.requests["candidate_offsets"]))


class TestTasks:
    def test_each_by_its_kind(self, split: RankingDataset) -> None:
        scores, request = logits(split), requests_of(split)
        metrics = measure(split, scores, (LABEL, WATCH))
        binary = ranking_metrics(request, scores[:, 0], split.requests["label"])
        assert binary.items() <= metrics["label"].items()
        shown = split.requests["exposed"]
        said = np.expm1(2 + scores[shown, 1].astype(float))
        wanted = regression_metrics(request[shown], said, split.requests["watch"][shown])
        assert {k: metrics["watch"][k] for k in wanted} == pytest.approx(wanted, rel=1e-5)
        assert not [name for name in metrics["watch"] if "gauc" in name or name == "ne"]

    def test_how_the_score_that_ranks_orders_each_task(self, split: RankingDataset) -> None:
        scores, request = logits(split), requests_of(split)
        tasks = (dataclasses.replace(LABEL, rank=1.0), dataclasses.replace(WATCH, rank=0.5))
        metrics = measure(split, scores, tasks)
        score = (torch.from_numpy(scores[:, 0]).sigmoid() + 0.5 * torch.from_numpy(scores[:, 1])).numpy()
        label, shown = split.requests["label"], split.requests["exposed"]
        for name, function in (("gauc", gauc), ("ndcg@10", ndcg), ("recall@10", recall)):
            assert metrics["label"][f"ranked_{name}"] == function(request, score, label)
        wanted = correlation(request[shown], score[shown], split.requests["watch"][shown])
        assert metrics["watch"]["ranked_correlation"] == pytest.approx(wanted)

    def test_the_first_task_ranks_by_default(self, split: RankingDataset) -> None:
        scores = logits(split)
        metrics = measure(split, scores, (LABEL, WATCH))
        assert not [name for name in metrics["label"] if "ranked_" in name]
        shown = split.requests["exposed"]
        wanted = correlation(requests_of(split)[shown], scores[shown, 0], split.requests["watch"][shown])
        assert metrics["watch"]["ranked_correlation"] == pytest.approx(wanted)

    def test_scores_of_no_model_have_an_order_alone(self, split: RankingDataset) -> None:
        metrics = measure(split, logits(split))
        assert metrics["watch"].keys() == {"correlation"}
        assert not {"ne", "calibration"} & metrics["label"].keys()

    def test_by_context_of_a_regression(self, split: RankingDataset) -> None:
        metrics = measure(split, logits(split), (LABEL, WATCH), by=("store",))["watch"]
        parts = metrics["by"]["store"].values()
        store = np.asarray(split.requests["store"])[requests_of(split)][split.requests["exposed"]]
        sizes = [int((store == value).sum()) for value in metrics["by"]["store"]]
        mean = sum(part["mae"] * n for part, n in zip(parts, sizes, strict=True)) / sum(sizes)
        assert mean == pytest.approx(metrics["mae"])


class TestExposed:
    def test_the_exposed_are_measured_apart(self, split: RankingDataset) -> None:
        scores, request, shown = logits(split), requests_of(split), split.requests["exposed"]
        metrics = measure(split, scores, (LABEL, WATCH))
        assert 0 < shown.sum() < len(shown)
        wanted = ranking_metrics(request[shown], scores[shown, 0], split.requests["label"][shown])
        for name in ("gauc", "ne", "calibration"):
            assert metrics["label"][f"{name}_exposed"] == wanted[name] != metrics["label"][name]
        assert not [name for name in metrics["watch"] if "exposed" in name]
        assert "gauc_exposed" in measure(split, scores)["label"]  # only the order counts
        assert "ne_exposed" not in measure(split, scores)["label"]

    def test_where_all_are_exposed_there_is_one_view(self, split: RankingDataset) -> None:
        split.requests["exposed"] = np.ones_like(split.requests["exposed"])
        metrics = measure(split, logits(split), (LABEL, WATCH))
        assert not [name for name in metrics["label"] if "exposed" in name]

    def test_what_the_others_beside_them_change(self, split: RankingDataset) -> None:
        scores, request, shown = logits(split), requests_of(split), split.requests["exposed"]
        alone = scores + shown[:, None] * np.float32(0.5)
        metrics = measure(split, scores, (LABEL, WATCH), alone=alone)
        label = ranking_metrics(request[shown], alone[shown, 0], split.requests["label"][shown])
        watch = np.expm1(2 + alone[shown, 1].astype(float))
        number = regression_metrics(request[shown], watch, split.requests["watch"][shown])
        assert metrics["label"]["ne_exposed_alone"] == label["ne"]
        assert metrics["watch"]["mae_exposed_alone"] == pytest.approx(number["mae"], rel=1e-5)

        def chance(logit: np.ndarray) -> np.ndarray:
            return 1 / (1 + np.exp(-logit.astype(float)))

        gap = chance(alone[shown, 0]) - chance(scores[shown, 0])
        assert metrics["label"]["gap_exposed_alone"] == pytest.approx(gap.mean(), rel=1e-5)
        lines = as_table(metrics, (LABEL, WATCH)).splitlines()
        assert lines[1].split()[:2] == ["all", "exposed"]
        assert lines[1].endswith("exposed, without the others")
        assert f"{gap.mean():.4f}" in next(line for line in lines if line.startswith("mean change"))


class TestNewItems:
    def test_are_measured_apart(self, split: RankingDataset) -> None:
        scores, request = logits(split), requests_of(split)
        candidates = split.requests["candidates"]
        new = (candidates == 0) | (candidates >= KNOWN_ITEMS)
        assert 0 < new.sum() < len(new)
        parts = measure(split, scores, (LABEL, WATCH), apart=True)
        for name, kept in (("new", new), ("known", ~new)):
            found = parts["label"]["items"][name]
            wanted = ranking_metrics(request[kept], scores[kept, 0], split.requests["label"][kept])
            assert found == pytest.approx({"candidates": kept.sum(), **wanted}, nan_ok=True)
            assert parts["watch"]["items"][name]["mae"] > 0

    def test_there_may_be_none(self, split: RankingDataset) -> None:
        split.requests["candidates"] = np.ones_like(split.requests["candidates"])
        parts = measure(split, logits(split), (LABEL, WATCH), apart=True)
        assert parts["label"]["items"]["new"]["candidates"] == 0
        assert np.isnan(parts["label"]["items"]["new"]["gauc"])
        assert np.isnan(parts["watch"]["items"]["new"]["mae"])
        as_table({**parts, "shares": shares(split)}, (LABEL, WATCH))


class TestShares:
    @pytest.mark.parametrize("block", [1, 7, 1 << 22])
    @pytest.mark.parametrize("history_length", [None, 5])
    def test_are_those_of_what_the_requests_see(
        self, log: EventLog, block: int, history_length: int | None, monkeypatch
    ) -> None:
        monkeypatch.setattr(groups, "_BLOCK", block)
        dataset = RankingDataset(log, "test", history_length)
        batch: RankingBatch = dataset[np.arange(len(dataset))]
        told = shares(dataset)
        unknown = told["unknown_values"]

        def zeros(key: str) -> float:
            return float((batch.sequence_features[key].values() == 0).float().mean())

        wanted: dict[str, dict[str, float]] = {}
        for name in ("item", *RICH_SCHEMA.event_features, "category"):
            wanted[name] = {"events": zeros(f"history_{name}")}
        for name in ("item", "category", *RICH_SCHEMA.candidate_features):
            wanted.setdefault(name, {})["candidates"] = zeros(f"candidate_{name}")
        for name in (*RICH_SCHEMA.context_features, *RICH_SCHEMA.context_lists):
            ids = batch.context_features[name].values()
            wanted[name] = {"requests": float((ids == 0).float().mean())}
        for name in RICH_SCHEMA.item_lists:
            lists = batch.item_lists[name].to_dense()
            for of, items in (("events", batch.history_items), ("candidates", batch.candidate_items)):
                ids = torch.cat([lists[item] for item in items.tolist()])
                wanted.setdefault(name, {})[of] = float((ids == 0).float().mean())
        assert told["new_items"] == pytest.approx(wanted.pop("item"))
        assert unknown == {name: pytest.approx(values) for name, values in wanted.items()}
        assert min(told["new_items"].values()) > 0 and unknown["action"]["events"] > 0
        assert min(unknown["tag"].values()) > 0 and unknown["interest"]["requests"] > 0
        lengths = batch.sequence_features["history_item"].lengths()
        assert 0 < told["requests_without_history"] == pytest.approx((lengths == 0).float().mean())

    def test_of_no_events(self, log: EventLog) -> None:
        users, times = np.array([NEW_USER]), np.array([0])
        told = shares(RankingDataset.of_users(log, users, times))
        assert told["requests_without_history"] == 1
        assert np.isnan([told["new_items"]["events"], told["new_items"]["candidates"]]).all()


class TestByHistory:
    def test_calibration_of_each_group(self, split: RankingDataset) -> None:
        logit = logits(split)[:, 0]
        label = np.arange(len(logit)) % 2
        parts = by_history(split, logit, label)
        lengths = split.history_lengths
        assert 3 < len(parts) <= 10
        assert sum(part["requests"] for part in parts.values()) == len(split)
        for name, part in parts.items():
            least, most = int(name.split("-")[0]), int(name.split("-")[-1])
            mine = (lengths >= least) & (lengths <= most)
            rows = mine[requests_of(split)] & split.requests["exposed"]
            assert (part["requests"], part["candidates"]) == (mine.sum(), rows.sum())
            wanted = (1 / (1 + np.exp(-logit[rows].astype(float)))).sum() / label[rows].sum()
            assert part["calibration"] == pytest.approx(wanted)

    def test_histories_of_one_length_are_one_group(self, log: EventLog) -> None:
        dataset = RankingDataset(log, "train", 1)
        dataset.history_lengths = np.full(len(dataset), 7)
        parts = by_history(dataset, logits(dataset, 1)[:, 0], dataset.requests["label"])
        assert list(parts) == ["7"]

    def test_a_group_without_a_positive_has_no_calibration(self, log: EventLog) -> None:
        dataset = RankingDataset(log, "train")
        label = np.zeros_like(dataset.requests["label"])
        parts = by_history(dataset, logits(dataset, 1)[:, 0], label)
        assert np.isnan([part["calibration"] for part in parts.values()]).all()


class Noted(torch.nn.Module):
    """A model that records its mode in each call."""

    def __init__(self) -> None:
        super().__init__()
        self.modes: list[bool] = []

    def forward(self, batch: RankingBatch) -> tuple[torch.Tensor, None]:
        self.modes.append(self.training)
        return torch.zeros(()), None


def test_time_per_request(split: RankingDataset) -> None:
    """Models are timed in evaluation mode, on the same batches, and keep their mode."""
    models: dict[str, torch.nn.Module] = {"training": Noted(), "evaluating": Noted().eval()}
    times = time_per_request(models, split, torch.device("cpu"))
    assert times.keys() == models.keys() and min(times.values()) > 0
    assert [model.training for model in models.values()] == [True, False]
    assert models["training"].modes == models["evaluating"].modes
    assert not any(models["training"].modes)


class TestTable:
    def test_says_what_each_number_is(self, split: RankingDataset) -> None:
        tasks = (dataclasses.replace(LABEL, rank=1.0), dataclasses.replace(WATCH, rank=1.0))
        metrics = measure(split, logits(split), tasks, apart=True)
        metrics["shares"] = shares(split)
        lines = as_table(metrics, tasks).splitlines()

        def numbers(start: str, within: list[str]) -> list[str]:
            (line,) = (line for line in within if line.startswith(start))
            return line.removeprefix(start).split()

        watch = lines[lines.index("watch (a number)") :]
        assert lines[0] == "label (0 or 1)"
        mae = [metrics["watch"]["mae"], *(metrics["watch"]["items"][k]["mae"] for k in ("new", "known"))]
        assert numbers("mean absolute error, in the label's unit", watch) == [f"{v:.4f}" for v in mae]
        wanted = metrics["label"]["ranked_gauc"]
        assert numbers("GAUC, by the ranking score", lines)[0] == f"{wanted:.4f}"
        assert numbers("new items", lines)[0] == f"{metrics['shares']['new_items']['candidates']:.1%}"
        assert len([line for line in lines if "events in the history" in line]) > 3

    def test_why_there_is_no_gauc(self, split: RankingDataset) -> None:
        """Requests of one candidate each."""
        rows = len(split.requests["candidates"])
        split.requests["candidate_offsets"] = np.minimum(np.arange(len(split) + 1), rows)
        for name in ("candidates", "exposed", "label", "watch", "source"):
            split.requests[name] = split.requests[name][: len(split)]
        scores = logits(split)
        metrics = measure(split, scores, (LABEL, WATCH))
        assert np.isnan(metrics["label"]["gauc"]) and metrics["label"]["auc"] > 0
        reason = TaskScores(split, LABEL, scores[:, 0], logits=True).why_unranked()
        table = as_table({**metrics, "notes": {"label": reason}}, (LABEL, WATCH))
        assert "No order to measure: each request has only one candidate" in table
