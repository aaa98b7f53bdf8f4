"""Ranks that sum figures of their own requests measure the same as one rank with all requests."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from every_field import make_rich
from helpers import flattened

from ifa_torchrec.batch import Scale
from ifa_torchrec.data import EventLog, RankingDataset
from ifa_torchrec.modules import CandidateSetLossConfig, Task
from ifa_torchrec.training.calibrate import fit_tasks
from ifa_torchrec.training.metrics import Total, auc
from ifa_torchrec.training.own import OwnRequests, own_requests
from ifa_torchrec.training.reliability import reliability
from ifa_torchrec.training.scoring import TaskScores, measure
from ifa_torchrec.training.sets import best_by_score, measure_sets

Found = TypeVar("Found")
TASKS = (Task("label"), Task("watch", "regression", scale=Scale(2.0, 1.0, log=True), rank=0.5))


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> RankingDataset:
    log: EventLog = make_rich().write(tmp_path_factory.mktemp("log") / "log")
    return RankingDataset(log, "train")


@pytest.fixture(scope="module")
def scores(split: RankingDataset) -> np.ndarray:
    rows = len(split.requests["candidates"])
    return np.random.default_rng(1).normal(size=(rows, 2)).astype(np.float32)


def on_ranks(
    split: RankingDataset, shares: list[list[int]], work: Callable[[OwnRequests, np.ndarray], Found]
) -> list[Found]:
    """The result on each rank (one thread each), by its requests and their candidates' rows."""
    given: list[np.ndarray] = [np.empty(0)] * len(shares)
    meeting = threading.Barrier(len(shares), timeout=20)

    def total_of(rank: int) -> Total:
        def total(figures: np.ndarray) -> np.ndarray:
            given[rank] = figures
            meeting.wait()
            result = np.sum(given, axis=0)
            meeting.wait()
            return result

        return total

    def on(rank: int) -> Found:
        requests = np.array(shares[rank], np.int64)
        return work(OwnRequests(split, requests, total_of(rank)), split.candidate_rows(requests)[0])

    with ThreadPoolExecutor(len(shares)) as ranks:
        return list(ranks.map(on, range(len(shares))))


SHARES = [
    pytest.param(lambda order: [order[::3], order[1::3], order[2::3]], id="three ranks"),
    pytest.param(lambda order: [order, []], id="one has none"),
    pytest.param(lambda order: [order[:1], order[1:]], id="one has one"),
]


@pytest.mark.parametrize("shares", SHARES)
def test_metrics_are_those_of_the_whole(split: RankingDataset, scores: np.ndarray, shares) -> None:
    order = np.random.default_rng(2).permutation(len(split)).tolist()
    wanted = measure(split, scores, TASKS)
    found = on_ranks(split, shares(order), lambda own, rows: measure(own, scores[rows], TASKS))
    assert all(of_rank == found[0] for of_rank in found)
    for task, metrics in wanted.items():
        assert found[0][task].keys() == metrics.keys() and len(metrics) >= 4
        for name, value in metrics.items():
            near = 2e-4 if name == "auc" else 1e-9  # nearly equal scores tie, see auc
            assert found[0][task][name] == pytest.approx(value, abs=near, nan_ok=True), name


@pytest.mark.parametrize("shares", SHARES)
def test_calibration_is_that_of_the_whole(split: RankingDataset, scores: np.ndarray, shares) -> None:
    order = list(range(len(split)))
    loss = CandidateSetLossConfig()
    wanted = fit_tasks(split, scores, TASKS, loss)
    found = on_ranks(split, shares(order), lambda own, rows: fit_tasks(own, scores[rows], TASKS, loss))
    assert all(of_rank == found[0] for of_rank in found)
    assert found[0]["label"] == pytest.approx(wanted["label"], abs=1e-6) and wanted["label"] != (1, 0)


@pytest.mark.parametrize("shares", SHARES)
def test_what_evaluate_measures_is_that_of_the_whole(
    split: RankingDataset, scores: np.ndarray, shares
) -> None:
    order = np.random.default_rng(2).permutation(len(split)).tolist()
    other = scores[::-1].copy()
    place = best_by_score(split, scores, TASKS, 2)

    def work(own: OwnRequests, rows: np.ndarray) -> dict[str, Any]:
        mine = scores[rows]
        return {
            "metrics": measure(own, mine, TASKS, ("store",), apart=True, alone=other[rows]),
            "notes": [TaskScores(own, TASKS[0], mine[:, 0], logits=True).why_unranked()],
            "sets": measure_sets(own, best_by_score(own, mine, TASKS, 2), 2),
            "sets as given": measure_sets(own, place[rows], 2),
        }

    wanted = work(own_requests(split), np.arange(len(scores)))
    found = on_ranks(split, shares(order), work)
    assert all(of_rank == found[0] for of_rank in found)
    figures, others = flattened(wanted), flattened(found[0])
    assert figures.keys() == others.keys()
    for name, value in figures.items():
        near = 2e-4 if name.endswith(".auc") else 1e-9
        assert others[name] == pytest.approx(value, abs=near, nan_ok=True), name
    assert {"gap_exposed_alone", "by", "items", "by_history"} <= wanted["metrics"]["label"].keys()


def test_reliability_of_ranks_is_near_that_of_the_whole(split: RankingDataset) -> None:
    rng = np.random.default_rng(0)
    rows = len(split.requests["candidates"])
    logit = rng.normal(size=rows).astype(np.float32)
    label = (rng.random(rows) < 0.3).astype(np.float32)
    wanted = reliability(logit, label)
    cuts = np.quantile(logit, np.arange(1, 10) / 10, method="higher")
    sizes = np.bincount(np.searchsorted(cuts, logit, side="right"), minlength=10)
    assert [group["candidates"] for group in wanted] == sizes.tolist()
    shares = [list(range(0, len(split), 2)), list(range(1, len(split), 2)), []]
    found = on_ranks(split, shares, lambda own, mine: reliability(logit[mine], label[mine], own.total))
    assert found[0] == found[1] == found[2]
    for one, other in zip(found[0], wanted, strict=True):
        assert one == pytest.approx(other, abs=1e-6)  # no two of these scores have the same leading bits


def test_a_score_that_is_not_finite_is_told_by_all_ranks(
    split: RankingDataset, scores: np.ndarray
) -> None:
    scores = scores.copy()
    scores[0, 0] = np.nan  # of request 0

    def told(own: OwnRequests, rows: np.ndarray) -> str:
        with pytest.raises(ValueError, match="not a finite number") as caught:
            measure(own, scores[rows], TASKS)
        return str(caught.value)

    first, second = on_ranks(split, [[0, 1], [2, 3]], told)
    assert first == "request 0: a score is nan, not a finite number"
    assert second == "a score on another rank is not a finite number"


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
def test_auc_by_counts_is_near_the_exact_one(scale: float) -> None:
    rng = np.random.default_rng(0)
    label = (rng.random(20_000) < 0.2).astype(np.int64)
    score = (scale * (rng.normal(size=20_000) + label)).astype(np.float32)
    assert auc(score, label, lambda figures: figures) == pytest.approx(auc(score, label), abs=1e-5)
    signs = np.array([-0.0, 0.0, -1.0, 1.0], np.float32)
    assert auc(signs, np.array([0, 1, 0, 1]), lambda figures: figures) == 0.875
    assert torch.isnan(torch.tensor(auc(signs, np.ones(4))))
