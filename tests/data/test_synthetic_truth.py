"""The ground truth of users who pick from sets: draws follow the formula, and no set beats the best."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from ifa_torchrec.data import RankingDataset
from ifa_torchrec.data.event_log import EventLog
from ifa_torchrec.data.synthetic import SyntheticConfig, prepare
from ifa_torchrec.data.synthetic_sets import (
    SHOWN,
    attention,
    best_set,
    picked,
    policy_logit,
    set_logits,
    set_reward,
    show,
    sigmoid,
)
from ifa_torchrec.data.synthetic_truth import SetTruth, truth_of
from ifa_torchrec.training.metrics import gauc

CONFIG = SyntheticConfig(
    train=300,
    test=200,
    mean_events=40,
    topics=20,
    interests=4,
    everyday_items=50,
    noise=0.0,
    distance=0,
    bias=-1.5,
    strength=3.0,
    relations=True,
)


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> EventLog:
    return prepare(tmp_path_factory.mktemp("sets") / "log", CONFIG)


@pytest.fixture(scope="module")
def truth(log) -> SetTruth:
    found = truth_of(log, "test")
    assert found is not None
    return found


def candidates(seed: int, m: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(-0.5, 1.5, m), rng.integers(6, size=m)


def test_rewards_are_what_users_pick_on_average() -> None:
    logit, topic = candidates(0, 7)
    draws = picked(np.random.default_rng(1), np.tile(logit, (40000, 1)), np.tile(topic, (40000, 1)))
    expected = sigmoid(set_logits(logit, topic)) * attention(7)
    np.testing.assert_allclose(draws.mean(0), expected, atol=0.01)
    assert draws.sum(1).mean() == pytest.approx(float(set_reward(logit, topic)), abs=0.02)


def test_the_policy_shows_by_its_logits() -> None:
    pull, topic = np.array([0.0, 1.0, 0.0, 1.0]), np.array([0, 1, 2, 3])
    rows = show(np.random.default_rng(0), np.tile(pull, (40000, 1)), np.tile(topic, (40000, 1)), 1)
    share = np.exp(policy_logit(pull, topic))
    np.testing.assert_allclose(np.bincount(rows[:, 0]) / len(rows), share / share.sum(), atol=0.01)


@pytest.mark.parametrize("seed", range(8))
def test_the_best_set_is_the_best_of_all(seed: int) -> None:
    logit, topic = candidates(seed, 9)
    rows = best_set(logit, topic, 4)
    best = 0.0
    for chosen in map(list, itertools.combinations(range(9), 4)):
        order = np.argsort(-set_logits(logit[chosen], topic[chosen]))
        chosen = np.array(chosen)[order]
        best = max(best, float(set_reward(logit[chosen], topic[chosen])))
    assert float(set_reward(logit[rows], topic[rows])) == pytest.approx(best)


def test_with_few_candidates_the_best_set_is_all() -> None:
    logit, topic = candidates(0, 3)
    assert sorted(best_set(logit, topic, 10)) == [0, 1, 2]
    assert len(best_set(logit[:0], topic[:0], 10)) == 0


def test_no_choice_beats_the_best_sets(truth: SetTruth) -> None:
    best = truth.best_sets(SHOWN)
    score, rng = truth.logit, np.random.default_rng(0)
    for number, (first, last) in enumerate(itertools.pairwise(truth.offsets)):
        rows = np.arange(first, last)
        reward = truth.reward(best[number])
        assert reward >= truth.reward(rows[np.argsort(-score[rows], kind="stable")[:SHOWN]])
        assert reward >= truth.reward(rng.permutation(rows)[:SHOWN])


def test_only_shown_candidates_have_labels(log: EventLog) -> None:
    for split in ("train", "test"):
        requests = RankingDataset(log, split).requests
        exposed = np.asarray(requests["exposed"]).reshape(-1, CONFIG.candidates)
        assert set(exposed.sum(1)) == {SHOWN}
        assert not np.asarray(requests["label"])[~exposed.ravel()].any()


def test_knowing_what_is_shown_scores_better(log: EventLog, truth: SetTruth) -> None:
    requests = RankingDataset(log, "test").requests
    exposed, label = np.asarray(requests["exposed"]), np.asarray(requests["label"])
    request = np.repeat(np.arange(CONFIG.test), CONFIG.candidates)[exposed]
    alone, given = truth.scores_alone(), truth.scores_given(exposed)
    reached = {
        name: gauc(request, score[exposed], label[exposed])
        for name, score in (("alone", alone), ("given", given), ("pull", truth.logit))
    }
    assert reached["given"] > reached["alone"] + 0.02 > reached["pull"]
    # both are probabilities
    for score in (alone, given):
        assert score[exposed].mean() == pytest.approx(label[exposed].mean(), abs=0.03)


def test_another_log_has_no_ground_truth(tmp_path) -> None:
    plain = replace(CONFIG, train=5, test=5, relations=False)
    assert truth_of(prepare(tmp_path / "log", plain), "test") is None
    for change in ({"noise": 0.1}, {"kinds": True}, {"candidates": 5}):
        with pytest.raises(ValueError, match="relations needs noise=0, no kinds"):
            replace(CONFIG, **change)
