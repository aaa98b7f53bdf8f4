"""What is best, on a synthetic log whose users pick from sets: scores, and sets."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np

from ifa_torchrec.data.event_log import EventLog
from ifa_torchrec.data.schema import OFFSETS
from ifa_torchrec.data.synthetic import CONFIG_FILE, SyntheticConfig, candidate_topics, topic_of
from ifa_torchrec.data.synthetic_sets import (
    SHOWN,
    attention,
    best_set,
    policy_logit,
    set_logits,
    set_reward,
    show,
    sigmoid,
)

_ORDERS, _REQUESTS = 200, 1000
"""Drawn of each request, for the means that the best scores are."""


@dataclass(frozen=True)
class SetTruth:
    """The truth of M candidates of B requests.

    Args:
        topic: [M] int64.
        pull: [M], of the candidate's topic on its user.
        offsets: [B + 1].
        interests: [B, topics], the pulls of all topics on each user.
        config: the log's.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from ifa_torchrec.data.synthetic import SyntheticConfig, prepare
        >>> from ifa_torchrec.data.synthetic_truth import truth_of
        >>> small = SyntheticConfig(train=20, test=10, mean_events=60, topics=20, relations=True,
        ...     interests=4, noise=0.0, distance=0)
        >>> truth = truth_of(prepare(Path(tempfile.mkdtemp()) / "log", small), "test")
        >>> best = truth.best_sets(10)
        >>> len(best), bool(truth.reward(best[0]) >= truth.reward(best[0][::-1]))
        (10, True)
    """

    topic: np.ndarray
    pull: np.ndarray
    offsets: np.ndarray
    interests: np.ndarray
    config: SyntheticConfig

    @property
    def logit(self) -> np.ndarray:
        """Of each candidate alone, [M]."""
        return self.config.bias + self.config.strength * self.pull

    def reward(self, rows: np.ndarray) -> float:
        """The expected number of items that are picked of a set, [k] rows, best first."""
        return float(set_reward(self.logit[rows], self.topic[rows]))

    def best_sets(self, k: int) -> list[np.ndarray]:
        """``best_set`` of each request, as rows among all M."""
        spans = zip(self.offsets[:-1], self.offsets[1:], strict=True)
        logit = self.logit
        return [first + best_set(logit[first:last], self.topic[first:last], k) for first, last in spans]

    def scores_given(self, exposed: np.ndarray, seed: int = 0) -> np.ndarray:
        """The best that a scorer can say who knows what is shown, though not in which order: the
        probability that each of the exposed is picked, [M]; 0 of the others.

        Args:
            exposed: [M] bool.
            seed: of the orders, over which the mean is taken.
        """
        rng, result = np.random.default_rng(seed), np.zeros(len(self.topic))
        for first, last in zip(self.offsets[:-1], self.offsets[1:], strict=True):
            rows = first + np.flatnonzero(exposed[first:last])
            topic, pull = self.topic[rows], self.pull[rows]
            policy = policy_logit(pull, topic)
            order = np.argsort(-(policy + rng.gumbel(size=(_ORDERS, len(rows)))), axis=1)
            place = np.argsort(order, axis=1)
            looked = attention(len(rows))[place].mean(0)
            result[rows] = looked * sigmoid(set_logits(self.logit[rows], topic))
        return result

    def scores_alone(self, seed: int = 0) -> np.ndarray:
        """The best that a scorer can say who knows the user and the candidate and none of the others: of
        each candidate the probability that it is picked where it is shown, [M].

        Args:
            seed: of the requests of the same users, over which the mean is taken.
        """
        rng, result = np.random.default_rng(seed), np.zeros(len(self.topic))
        topics = self.interests.shape[1]
        for b, (first, last) in enumerate(zip(self.offsets[:-1], self.offsets[1:], strict=True)):
            interests = self.interests[b]
            mine = np.flatnonzero(interests)
            topic = candidate_topics(rng, self.config, np.tile(mine, (_REQUESTS, 1)))
            rows = show(rng, interests[topic], topic, SHOWN)
            topic = np.take_along_axis(topic, rows, axis=1)
            logit = self.config.bias + self.config.strength * interests[topic]
            probability = sigmoid(set_logits(logit, topic)) * attention(SHOWN)
            times = np.bincount(topic.ravel(), minlength=topics)
            total = np.bincount(topic.ravel(), probability.ravel(), minlength=topics)
            result[first:last] = (total / np.maximum(times, 1))[self.topic[first:last]]
        return result


def truth_of(log: EventLog, split: str) -> SetTruth | None:
    """The truth of a split of a log that ``prepare`` wrote with the option `relations`; None of any
    other log.

    Args:
        log: the event log.
        split: of its requests.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from ifa_torchrec.data.synthetic import SyntheticConfig, prepare
        >>> from ifa_torchrec.data.synthetic_truth import truth_of
        >>> small = SyntheticConfig(train=20, test=10, mean_events=500)
        >>> truth_of(prepare(Path(tempfile.mkdtemp()) / "log", small), "test") is None
        True
    """
    file = log.path / CONFIG_FILE
    if not file.exists():
        return None
    config = SyntheticConfig(**json.loads(file.read_text()))
    if not config.relations:
        return None
    requests = log.requests(split)
    starts, ends = log.history_range(requests["user"], requests["time"])
    interests = np.zeros((len(starts), config.topics))
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        topic = topic_of(config, np.asarray(log.events["item"][start:end]))
        interests[number, topic[topic >= 0]] = 1.0
    offsets = np.asarray(requests[OFFSETS])
    topic = topic_of(config, np.asarray(requests["candidates"]))
    pull = interests[np.repeat(np.arange(len(starts)), np.diff(offsets)), topic]
    return SetTruth(topic, pull, offsets, interests, config)
