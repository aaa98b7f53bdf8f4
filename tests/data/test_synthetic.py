"""The synthetic log follows its recipe, and its best scores are the best."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from ifa_torchrec.data import RankingDataset
from ifa_torchrec.data.synthetic import (
    SyntheticConfig,
    best_scores,
    exposure_probability,
    prepare,
    topic_of,
)
from ifa_torchrec.errors import ConfigError
from ifa_torchrec.training.metrics import gauc

CONFIG = SyntheticConfig(train=400, test=400, mean_events=500, distance=200, topics=40)


def quality(tmp_path, config: SyntheticConfig, score=None) -> float:
    dataset = RankingDataset(prepare(tmp_path / "log", config), "test")
    score = best_scores(dataset, config) if score is None else score(dataset)
    request = np.repeat(np.arange(len(dataset)), np.diff(dataset.requests["candidate_offsets"]))
    return gauc(request, score, np.asarray(dataset.requests["label"]))


def topic_counts(dataset: RankingDataset, config: SyntheticConfig, distance: int) -> np.ndarray:
    """[M]: the number of events on the candidate's topic, of all or those before the latest
    ``distance``."""
    log = dataset.log
    counts = []
    starts, ends = log.history_range(dataset.requests["user"], dataset.requests["time"])
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        topic = topic_of(config, np.asarray(log.events["item"][start : end - distance]))
        rows, _ = dataset.candidate_rows([number])
        asked = topic_of(config, np.asarray(dataset.requests["candidates"][rows]))
        counts += [(topic == t).sum() for t in asked]
    return np.array(counts)


def test_evidence_is_before_the_distance_and_labels_follow_it(tmp_path) -> None:
    config = replace(CONFIG, noise=0.0)
    dataset = RankingDataset(prepare(tmp_path / "log", config), "test")
    everywhere = topic_counts(dataset, config, 0)
    assert set(np.unique(everywhere)) == {0, config.evidence}
    assert np.array_equal(everywhere, topic_counts(dataset, config, config.distance))
    label = np.asarray(dataset.requests["label"])
    for count, logit in ((0, config.bias), (config.evidence, config.bias + config.strength)):
        rate = label[everywhere == count].mean()
        assert rate == pytest.approx(1 / (1 + np.exp(-logit)), abs=0.03)
    # without noise the truth is visible
    best = best_scores(dataset, config)
    assert np.unique(best.round(6)).tolist() == pytest.approx([0.119203, 0.880797])
    lengths = dataset.history_lengths
    assert lengths.min() >= config.distance + config.interests * config.evidence
    assert lengths.mean() == pytest.approx(config.mean_events, rel=0.1)


def test_strength_and_noise_set_the_best_possible_score(tmp_path) -> None:
    reached = {
        name: quality(tmp_path / name, replace(CONFIG, **change))
        for name, change in {
            "as it is": {},
            "weak": {"strength": 1.0},
            "none": {"strength": 0.0},
            "noisy": {"noise": 20.0},
        }.items()
    }
    assert reached["none"] == pytest.approx(0.5, abs=0.02)
    assert reached["none"] + 0.05 < reached["weak"] < reached["as it is"] - 0.05
    assert reached["noisy"] < reached["as it is"] - 0.02


def test_no_counting_ranks_better_than_the_best_scores(tmp_path) -> None:
    config = replace(CONFIG, noise=3.0)
    best = quality(tmp_path, config)
    for distance in (0, config.distance):
        counted = quality(tmp_path, config, lambda d, n=distance: topic_counts(d, config, n))
        assert counted <= best + 0.003


def test_only_in_training_unexposed_candidates_have_no_label(tmp_path) -> None:
    log = prepare(tmp_path / "log", replace(CONFIG, exposure=0.5))
    train, test = log.requests("train"), log.requests("test")
    hidden = ~np.asarray(train["exposed"])
    assert hidden.mean() == pytest.approx(0.5, abs=0.02)
    assert not np.asarray(train["label"])[hidden].any()
    assert np.asarray(train["label"])[~hidden].any()
    assert np.asarray(test["label"])[~np.asarray(test["exposed"])].any()


def test_exposure_may_depend_on_the_item_and_the_interest_but_not_on_the_label(tmp_path) -> None:
    config = replace(CONFIG, noise=0.0, exposure=0.2, promotion=1.5, policy=2.0)
    dataset = RankingDataset(prepare(tmp_path / "log", config), "test")
    requests = {name: np.asarray(values) for name, values in dataset.requests.items()}
    pull = (best_scores(dataset, config) > 0.5).astype(float)
    expected = exposure_probability(config, requests["candidates"], pull)
    exposed, label = requests["exposed"], requests["label"]
    edges = np.quantile(expected, [0, 0.3, 0.6, 0.8, 1])
    for low, high in pairwise(edges):
        some = (expected >= low) & (expected <= high)
        assert exposed[some].mean() == pytest.approx(expected[some].mean(), abs=0.04)
    for interest, rate in ((0.0, 0.119), (1.0, 0.881)):
        for shown in (True, False):
            assert label[(pull == interest) & (exposed == shown)].mean() == pytest.approx(rate, abs=0.04)
    with pytest.raises(ValueError, match="with exposure=1, promotion and policy must be 0"):
        replace(config, exposure=1.0)


def pulls(dataset: RankingDataset, config: SyntheticConfig, actions: tuple[int, ...]) -> np.ndarray:
    """[M]: the sum of the amounts of the events on the candidate's topic with these actions."""
    events = {name: np.asarray(values) for name, values in dataset.log.events.items()}
    starts, ends = dataset.log.history_range(dataset.requests["user"], dataset.requests["time"])
    result = []
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        mine = np.isin(events["action"][start:end], actions)
        topic = topic_of(config, events["item"][start:end])[mine]
        rows, _ = dataset.candidate_rows([number])
        asked = topic_of(config, np.asarray(dataset.requests["candidates"][rows]))
        result.append((topic[None] == asked[:, None]) @ events["amount"][start:end][mine])
    return np.concatenate(result)


class TestKinds:
    CONFIG = replace(CONFIG, kinds=True)

    def test_what_was_bought_is_wanted_by_its_amounts(self, tmp_path) -> None:
        config = self.CONFIG
        dataset = RankingDataset(prepare(tmp_path / "log", config), "test")
        label, best = np.asarray(dataset.requests["label"]), best_scores(dataset, config)
        bought = pulls(dataset, config, (1,))
        logit = config.bias + config.strength * bought / config.evidence
        np.testing.assert_allclose(best, 1 / (1 + np.exp(-logit)), rtol=1e-4)
        edges = np.quantile(best, [0, 0.5, 0.7, 0.8, 0.9, 1])
        for low, high in pairwise(edges):
            some = (best >= low) & (best <= high)
            assert label[some].mean() == pytest.approx(best[some].mean(), abs=0.04)
        assert dataset.log.scales["amount"].deviation > 0.2
        # as many topics have skipped events, which are worth nothing
        skipped = (pulls(dataset, config, (3,)) > config.evidence / 2) & (bought == 0)
        assert skipped.mean() > 0.1
        assert label[skipped].mean() == pytest.approx(label[bought == 0].mean(), abs=0.03)

    def test_events_without_their_kinds_or_numbers_say_less(self, tmp_path) -> None:
        config = self.CONFIG
        log = prepare(tmp_path / "log", config)
        dataset = RankingDataset(log, "test")
        request = np.repeat(np.arange(len(dataset)), np.diff(dataset.requests["candidate_offsets"]))
        label = np.asarray(dataset.requests["label"])

        def reached(score: np.ndarray) -> float:
            return gauc(request, score, label)

        best = reached(best_scores(dataset, config))
        assert best > 0.8
        assert reached(pulls(dataset, config, (1, 2, 3))) < best - 0.1
        log.events["amount"] = np.ones(len(log.events["item"]))
        assert best - 0.1 < reached(pulls(dataset, config, (1,))) < best - 0.01

    def test_evidence_lies_behind_the_distance(self, tmp_path) -> None:
        log = prepare(tmp_path / "log", self.CONFIG)
        rare = topic_of(self.CONFIG, np.asarray(log.events["item"])) >= 0
        bought = rare & (np.asarray(log.events["action"]) == 1)
        for end in log.user_offsets[1:]:
            assert not bought[end - self.CONFIG.distance : end].any()
        per_user = np.add.reduceat(bought, log.user_offsets[:-1])
        assert set(per_user) == {self.CONFIG.interests * self.CONFIG.evidence}


@pytest.mark.parametrize("kinds", [False, True])
def test_new_items_are_not_candidates_in_training(tmp_path, kinds: bool) -> None:
    config = replace(CONFIG, new_items=0.5, kinds=kinds)
    log = prepare(tmp_path / "log", config)
    assert log.num_items > log.schema.item_features["item"] == config.num_items
    assert log.new_items("train") == {"candidates": 0.0, "events": 0.0}
    assert log.splits == ["train", "valid", "test"]
    assert len(log.requests("valid")["user"]) == config.test // 4
    for split in ("valid", "test"):
        share = log.new_items(split)
        assert share["candidates"] == pytest.approx(0.5, abs=0.03) and share["events"] == 0
    items = np.arange(log.num_items)
    assert np.array_equal(log.items["topic"], topic_of(config, items) + 1)
    rare = log.items["topic"] > 0
    assert np.bincount(log.items["topic"][rare])[1:].tolist() == [2 * config.items_per_topic] * 40
    category = np.asarray(log.items["category"])[rare]
    assert np.array_equal(category, 1 + (np.asarray(log.items["topic"])[rare] - 1) // 10)
    # labels depend on the topic, for new and old items
    dataset = RankingDataset(log, "test")
    best, label = best_scores(dataset, config), np.asarray(dataset.requests["label"])
    new = log.item_rows(np.asarray(dataset.requests["candidates"])) == 0
    for some in (new, ~new):
        assert label[some].mean() == pytest.approx(best[some].mean(), abs=0.02)


def test_the_same_seed_writes_the_same_log(tmp_path) -> None:
    logs = [
        prepare(tmp_path / name, replace(CONFIG, seed=s)) for name, s in (("a", 1), ("b", 1), ("c", 2))
    ]
    items = [np.asarray(log.events["item"]) for log in logs]
    assert np.array_equal(items[0], items[1]) and not np.array_equal(items[0], items[2])


@pytest.mark.parametrize(
    "change",
    [
        *({"topics": 15}, {"interests": 0}, {"exposure": 0.0}, {"noise": -1.0}),
        *({"new_items": 1.5}, {"interests": 21, "kinds": True}),
    ],
)
def test_bad_options_are_named(change: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        replace(CONFIG, **change)


def test_a_log_with_another_config_is_refused(tmp_path: Path) -> None:
    small = replace(CONFIG, train=20, test=10)
    prepare(tmp_path / "log", small)
    assert prepare(tmp_path / "log", small).splits == prepare(tmp_path / "log").splits
    with pytest.raises(ConfigError, match=r"log was written with train 20, not 30, seed .*; delete it"):
        prepare(tmp_path / "log", replace(small, train=30, seed=small.seed + 1))
    assert [path.name for path in tmp_path.iterdir()] == ["log"]
    (tmp_path / "log" / "synthetic.json").unlink()  # like older logs, which have no record
    assert len(prepare(tmp_path / "log", replace(small, train=30)).requests("train")["user"]) == 20


def test_a_kill_leaves_no_log_without_its_config(tmp_path: Path, monkeypatch) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ifa_torchrec.data.writing.publish_folder", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "log", replace(CONFIG, train=20, test=10))
    assert not (tmp_path / "log").exists()
