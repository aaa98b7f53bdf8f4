"""The best possible scores and sets on a synthetic log whose users pick from sets."""

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
"""The number of orders and of requests drawn per request to compute the best scores as means."""


@dataclass(frozen=True)
class SetTruth:
    """The ground truth of the M candidates of B requests.

    Args:
        topic: [M] int64, the topic of each candidate.
        pull: [M], the pull of the candidate's topic on its user.
        offsets: [B + 1], where the candidates of each request begin.
        interests: [B, topics], the pull of every topic on each user.
        config: the config of the log.

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
        """The logit of each candidate on its own, [M]."""
        return self.config.bias + self.config.strength * self.pull

    def reward(self, rows: np.ndarray) -> float:
        """The expected number of items picked from a set, given as [k] rows, best first."""
        return float(set_reward(self.logit[rows], self.topic[rows]))

    def best_sets(self, k: int) -> list[np.ndarray]:
        """``best_set`` of each request, as rows of all M candidates."""
        spans = zip(self.offsets[:-1], self.offsets[1:], strict=True)
        logit = self.logit
        return [first + best_set(logit[first:last], self.topic[first:last], k) for first, last in spans]

    def scores_given(self, exposed: np.ndarray) -> np.ndarray:
        """The best scores given which items are shown, but not their order: the probability that each
        exposed item is picked, [M]; 0 for the others.

        Args:
            exposed: [M] bool.
        """
        rng, result = np.random.default_rng(0), np.zeros(len(self.topic))
        for first, last in zip(self.offsets[:-1], self.offsets[1:], strict=True):
            rows = first + np.flatnonzero(exposed[first:last])
            topic, pull = self.topic[rows], self.pull[rows]
            policy = policy_logit(pull, topic)
            order = np.argsort(-(policy + rng.gumbel(size=(_ORDERS, len(rows)))), axis=1)
            place = np.argsort(order, axis=1)
            looked = attention(len(rows))[place].mean(0)
            result[rows] = looked * sigmoid(set_logits(self.logit[rows], topic))
        return result

    def scores_alone(self) -> np.ndarray:
        """The best scores given only the user and the candidate, not the other items: the probability
        that each candidate is picked when it is shown, [M]."""
        rng, result = np.random.default_rng(0), np.zeros(len(self.topic))
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
    """The ground truth of a split of a log that ``prepare`` wrote with the option `relations`; None for
    any other log.

    Args:
        log: the event log.
        split: the name of a request split.

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
