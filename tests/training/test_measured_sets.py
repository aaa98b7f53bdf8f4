"""Metrics of sets chosen from a split, compared with plain loops."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from every_field import make_rich
from torchrec.sparse.jagged_tensor import JaggedTensor

from ifa_torchrec.data import RankingDataset
from ifa_torchrec.data.synthetic import SyntheticConfig, prepare
from ifa_torchrec.data.synthetic_truth import truth_of
from ifa_torchrec.modules import Task
from ifa_torchrec.training.sets import (
    best_by_score,
    measure_sets,
    places,
    rewards,
    set_metrics,
    variety,
)


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> RankingDataset:
    """A split with a binary task and a regression."""
    return RankingDataset(make_rich().write(tmp_path_factory.mktemp("log") / "log"), "train")


def random_sets(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Request, position in the set and label of each candidate; some requests have no set."""
    rng = np.random.default_rng(seed)
    request = np.repeat(np.arange(30), rng.integers(0, 9, 30))
    place = np.zeros(len(request), np.int64)
    for r in np.unique(request):
        rows = rng.permutation(np.flatnonzero(request == r))[: rng.integers(0, 5)]
        place[rows] = np.arange(1, len(rows) + 1)
    return request, place, (rng.random(len(request)) < 0.4).astype(np.float32)


@pytest.mark.parametrize("seed", range(5))
def test_how_well_sets_gather_the_positives(seed: int) -> None:
    request, place, label = random_sets(seed)
    gains, recalls = [], []
    for r in np.unique(request):
        mine = request == r
        size, positives = int((place[mine] > 0).sum()), int(label[mine].sum())
        if not size or not 0 < positives < mine.sum():
            continue
        discount = [1 / np.log2(p + 1) for p in range(1, size + 1)]
        gain = sum(discount[p - 1] * y for p, y in zip(place[mine], label[mine], strict=True) if p)
        gains.append(gain / sum(discount[:positives]))
        recalls.append(label[mine][place[mine] > 0].sum() / min(size, positives))
    found = set_metrics(request, place, label)
    assert found == pytest.approx({"ndcg": np.mean(gains), "recall": np.mean(recalls)})


@pytest.mark.parametrize("seed", range(5))
def test_how_varied_sets_are(seed: int) -> None:
    request, place, _ = random_sets(seed)
    group = np.random.default_rng(seed).integers(0, 4, len(request))  # 0 is unknown
    diversity, duplicates = [], []
    for r in np.unique(request[place > 0]):
        members = group[(request == r) & (place > 0)]
        pairs = [a != b or a == 0 for a, b in combinations(members, 2)]
        if pairs:
            diversity.append(np.mean(pairs))
        duplicates.append(sum(g > 0 and g in members[:n] for n, g in enumerate(members)))
    found = variety(request, place, group)
    assert found["diversity"] == pytest.approx(np.mean(diversity))
    assert found["duplicates"] == pytest.approx(np.mean(duplicates))
    shown = set(group[place > 0]) - {0}
    assert found["coverage"] == len(shown) / len(set(group) - {0})


def test_of_nothing() -> None:
    none = np.zeros(0, np.int64)
    found = set_metrics(none, none, none) | variety(none, none, none)
    assert len(found) == 5 and all(np.isnan(value) for value in found.values())
    sets = variety(np.zeros(3, int), np.zeros(3, int), np.ones(3, int))  # a request without a set
    assert np.isnan([sets["diversity"], sets["duplicates"]]).all() and sets["coverage"] == 0


def test_places() -> None:
    chosen = JaggedTensor(torch.tensor([4, 2, 7, 5, 6]), lengths=torch.tensor([2, 0, 3]))
    assert places(chosen, 9).tolist() == [0, 0, 2, 0, 1, 2, 3, 1, 0]
    assert places(JaggedTensor(torch.zeros(0).long(), lengths=torch.tensor([0])), 2).tolist() == [0, 0]


def test_the_best_by_their_own_scores(split: RankingDataset) -> None:
    requests, tasks = split.requests, (Task("label"), Task("watch", "regression"))
    logits = np.random.default_rng(0).normal(size=(len(requests["candidates"]), 2)).astype(np.float32)
    place = best_by_score(split, logits, tasks, 3)
    for number in range(len(split)):
        rows, _ = split.candidate_rows([number])
        order = np.argsort(-logits[rows, 0])
        assert place[rows][order].tolist() == [1, 2, 3, *[0] * len(rows)][: len(rows)]
    found = measure_sets(split, place, 3)
    assert {"label_ndcg@3", "label_recall@3", "diversity", "duplicates", "coverage"} == found.keys()
    features = set(split.log.schema.item_features)
    assert set(found["coverage"]) == features and set(found["diversity"]) == features - {"item"}
    category = np.asarray(split.log.items["category"])[requests["candidates"]]
    request = np.repeat(np.arange(len(split)), np.diff(requests["candidate_offsets"]))
    assert found["duplicates"]["category"] == variety(request, place, category)["duplicates"]
    shown = np.unique(requests["candidates"][place > 0])
    every = np.unique(requests["candidates"])
    assert found["coverage"]["item"] == pytest.approx((shown > 0).sum() / (every > 0).sum())


def test_what_is_picked_of_sets_whose_truth_is_known(tmp_path) -> None:
    config = SyntheticConfig(
        train=20, test=30, mean_events=60, topics=20, relations=True, interests=4, noise=0.0, distance=0
    )
    log = prepare(tmp_path / "log", config)
    dataset, truth = RankingDataset(log, "test"), truth_of(log, "test")
    assert truth is not None
    rows = len(dataset.requests["candidates"])
    best = np.zeros(rows, np.int64)
    for members in truth.best_sets(4):
        best[members] = np.arange(1, 5)
    alone = best_by_score(dataset, truth.logit[:, None].astype(np.float32), (Task("label"),), 4)
    found = rewards(dataset, {"best": best, "topk": alone}, 4, truth)
    assert found["best"]["reward_share"] == pytest.approx(1.0)
    by_hand = [
        truth.reward(mine[np.argsort(alone[mine])])
        for n in range(len(dataset))
        for mine in [dataset.candidate_rows([n])[0]]
        for mine in [mine[alone[mine] > 0]]
    ]
    assert found["topk"]["reward"] == pytest.approx(np.mean(by_hand))
    share = found["topk"]["reward"] / found["best"]["reward"]
    assert found["topk"]["reward_share"] == pytest.approx(share) and 0.3 < share < 1
