"""The synthetic log is what its page says, and its best scores are the best."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ifa_torchrec.data import RankingDataset
from ifa_torchrec.data.synthetic import SyntheticConfig, best_scores, prepare, topic_of
from ifa_torchrec.training.metrics import gauc

CONFIG = SyntheticConfig(train=400, test=400, mean_events=500, distance=200, topics=40)


def quality(tmp_path, config: SyntheticConfig, score=None) -> float:
    dataset = RankingDataset(prepare(tmp_path / "log", config), "test")
    score = best_scores(dataset, config) if score is None else score(dataset)
    request = np.repeat(np.arange(len(dataset)), np.diff(dataset.requests["candidate_offsets"]))
    return gauc(request, score, np.asarray(dataset.requests["label"]))


def topic_counts(dataset: RankingDataset, config: SyntheticConfig, distance: int) -> np.ndarray:
    """[M]: events of the candidate's topic, all or those behind the latest ``distance``."""
    log = dataset.log
    counts = []
    starts, ends = log.history_range(dataset.requests["user"], dataset.requests["time"])
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        topic = topic_of(config, np.asarray(log.events["item"][start : end - distance]))
        rows, _ = dataset.candidate_rows([number])
        asked = topic_of(config, np.asarray(dataset.requests["candidates"][rows]))
        counts += [(topic == t).sum() for t in asked]
    return np.array(counts)


def test_evidence_lies_behind_the_distance_and_is_what_labels_follow(tmp_path) -> None:
    config = replace(CONFIG, noise=0.0)
    dataset = RankingDataset(prepare(tmp_path / "log", config), "test")
    everywhere = topic_counts(dataset, config, 0)
    assert set(np.unique(everywhere)) == {0, config.evidence}
    assert np.array_equal(everywhere, topic_counts(dataset, config, config.distance))
    label = np.asarray(dataset.requests["label"])
    for count, logit in ((0, config.bias), (config.evidence, config.bias + config.strength)):
        rate = label[everywhere == count].mean()
        assert rate == pytest.approx(1 / (1 + np.exp(-logit)), abs=0.03)
    # without noise the truth can be seen
    best = best_scores(dataset, config)
    assert np.unique(best.round(6)).tolist() == pytest.approx([0.119203, 0.880797])
    lengths = dataset.history_lengths
    assert lengths.min() >= config.distance + config.interests * config.evidence
    assert lengths.mean() == pytest.approx(config.mean_events, rel=0.1)


def test_strength_and_noise_dial_what_can_be_reached(tmp_path) -> None:
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


def test_unexposed_candidates_have_no_label_in_training_alone(tmp_path) -> None:
    log = prepare(tmp_path / "log", replace(CONFIG, exposure=0.5))
    train, test = log.requests("train"), log.requests("test")
    hidden = ~np.asarray(train["exposed"])
    assert hidden.mean() == pytest.approx(0.5, abs=0.02)
    assert not np.asarray(train["label"])[hidden].any()
    assert np.asarray(train["label"])[~hidden].any()
    assert np.asarray(test["label"])[~np.asarray(test["exposed"])].any()


def test_the_same_seed_gives_the_same_log(tmp_path) -> None:
    logs = [
        prepare(tmp_path / name, replace(CONFIG, seed=s)) for name, s in (("a", 1), ("b", 1), ("c", 2))
    ]
    items = [np.asarray(log.events["item"]) for log in logs]
    assert np.array_equal(items[0], items[1]) and not np.array_equal(items[0], items[2])


@pytest.mark.parametrize(
    "change", [{"topics": 15}, {"interests": 0}, {"exposure": 0.0}, {"noise": -1.0}]
)
def test_bad_options_are_named(change: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        replace(CONFIG, **change)
