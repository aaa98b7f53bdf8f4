"""A synthetic event log whose truth is known: what a user will want shows in rare events far back.

The recipe, with everything random drawn from one seed:

- Rare items belong to topics, which no feature names: a model has to learn which items go together.
  A category gathers ten topics and as large a share of the everyday items.
- A user has some interests, topics drawn evenly. Each left `evidence` events on its items, drawn
  evenly, all of them behind the latest `distance` events of the history. All other events are
  everyday items, by a popularity that falls like 1 / rank and is everyone's; and of every topic,
  at any place, Poisson(`noise`) events that mean nothing.
- A request comes at the end of the history. A quarter of its candidates are of the user's
  interests, the rest of any topic; a label is 1 with the probability sigmoid(bias + strength *
  [of an interest]). Which items of a topic the user had does not matter.
- A candidate is exposed with the probability `exposure`, whatever it is. In the split `train` the
  label of an unexposed one is 0, as a real log would have it; in `test` all labels are true.

So a long history is worth as much as `strength`, `distance` and `noise` let it, and nothing but the
history tells candidates apart. ``best_scores`` ranks as well as anyone can who knows this page but not
the users' interests.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ifa_torchrec.data.dataset import RankingDataset
from ifa_torchrec.data.event_log import EventLog
from ifa_torchrec.data.schema import LogSchema
from ifa_torchrec.errors import ConfigError

_TOPICS_PER_CATEGORY = 10
_START = pd.Timestamp("2024-01-01")


@dataclass(frozen=True)
class SyntheticConfig:
    """Size and difficulty.

    Args:
        train, test: requests of each split, each of another user.
        mean_events: of a history; log-normal, at least `distance` + `interests` * `evidence`.
        topics, items_per_topic, everyday_items: of the item table, in this order behind row 0, unknown:
            the rare items topic by topic, then the everyday items.
        interests: topics of a user.
        evidence: events that an interest left.
        distance: latest events among which there is no evidence.
        strength: what an interest adds to the logit of a label.
        noise: mean number of events of each topic that mean nothing.
        bias: logit of a label without an interest.
        candidates: of a request.
        exposure: probability that a candidate is exposed.
        seed: of everything.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> from ifa_torchrec.data.synthetic import SyntheticConfig
        >>> SyntheticConfig(topics=20).num_items
        1201
    """

    train: int = 10000
    test: int = 2000
    mean_events: int = 1000
    topics: int = 100
    items_per_topic: int = 10
    everyday_items: int = 1000
    interests: int = 5
    evidence: int = 6
    distance: int = 400
    strength: float = 4.0
    noise: float = 0.2
    bias: float = -2.0
    candidates: int = 32
    exposure: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.topics % _TOPICS_PER_CATEGORY or not 0 < self.interests <= self.topics:
            raise ConfigError(
                f"SyntheticConfig: topics must be a multiple of {_TOPICS_PER_CATEGORY}, interests 1 to "
                f"topics; got {self.topics}, {self.interests}"
            )
        if not 0 < self.exposure <= 1 or self.noise < 0 or self.distance < 0:
            raise ConfigError("SyntheticConfig: exposure is in (0, 1], noise and distance at least 0")

    @property
    def num_items(self) -> int:
        """Rare and everyday items, and the unknown one."""
        return 1 + self.topics * self.items_per_topic + self.everyday_items

    @property
    def categories(self) -> int:
        """Of items of both kinds."""
        return self.topics // _TOPICS_PER_CATEGORY


def prepare(path: str | Path, config: SyntheticConfig | None = None) -> EventLog:
    """Write the log at ``path``, or open it if it is there.

    Raises:
        LogError: the folder at ``path`` is not a whole log.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from ifa_torchrec.data.synthetic import SyntheticConfig, prepare
        >>> small = SyntheticConfig(train=20, test=10, mean_events=500)
        >>> log = prepare(Path(tempfile.mkdtemp()) / "log", small)
        >>> log.splits, len(log.requests("test")["user"])
        (['train', 'test'], 10)
    """
    path = Path(path)
    if path.exists():
        return EventLog(path)
    config = config or SyntheticConfig()
    rng = np.random.default_rng(config.seed)
    everyday_from = 1 + config.topics * config.items_per_topic
    item = np.arange(config.num_items)
    category = 1 + np.where(
        item < everyday_from,
        topic_of(config, item) // _TOPICS_PER_CATEGORY,
        (item - everyday_from) % config.categories,
    )
    category[0] = 0
    items = pd.DataFrame({"item": item, "category": category})
    popularity = 1.0 / np.arange(1, config.everyday_items + 1)
    everyday = np.cumsum(popularity / popularity.sum())

    users = config.train + config.test
    evidence = config.interests * config.evidence
    lengths = rng.lognormal(0.0, 0.5, users) * config.mean_events / np.exp(0.125)
    lengths = np.maximum(lengths.astype(np.int64), config.distance + evidence)
    history, interests = [], []
    for length in lengths:
        mine = rng.choice(config.topics, config.interests, replace=False)
        # capped: chance events never crowd out the evidence
        chance = min(int(rng.poisson(config.noise * config.topics)), int(length) - evidence)
        events = everyday_from + np.searchsorted(everyday, rng.random(length), side="right")
        events = np.minimum(events, config.num_items - 1)
        old = rng.permutation(length - config.distance)[:evidence]
        others = np.delete(np.arange(length), old)
        events[old] = _items(rng, config, np.repeat(mine, config.evidence))
        by_chance = rng.choice(others, chance, replace=False)
        events[by_chance] = _items(rng, config, rng.integers(config.topics, size=chance))
        history.append(events)
        interests.append(mine)
    # a history ends on day 365, the request comes an hour later
    day = np.concatenate([np.sort(rng.random(length)) * 365 for length in lengths])
    events = pd.DataFrame(
        {
            "user": np.repeat(np.arange(users), lengths),
            "item": np.concatenate(history),
            "time": _START + pd.to_timedelta(day, unit="D"),
        }
    )
    requests = _requests(rng, config, np.stack(interests))
    return EventLog.from_pandas(
        path,
        events=events,
        schema=LogSchema(
            item_features={"item": config.num_items, "category": config.categories + 1},
            tasks={"label": "binary"},
        ),
        items=items,
        requests={"train": requests.iloc[: config.train], "test": requests.iloc[config.train :]},
    )


def topic_of(config: SyntheticConfig, item: np.ndarray) -> np.ndarray:
    """The topic of each item, -1 of an everyday item and of the unknown one.

    Example:
        >>> import numpy as np
        >>> from ifa_torchrec.data.synthetic import SyntheticConfig, topic_of
        >>> topic_of(SyntheticConfig(), np.array([1, 10, 11, 5000, 0])).tolist()
        [0, 0, 1, -1, -1]
    """
    topic = (item - 1) // config.items_per_topic
    return np.where(topic < config.topics, topic, -1)


def best_scores(dataset: RankingDataset, config: SyntheticConfig) -> np.ndarray:
    """Probability of each label given all that can be seen: nobody can rank better.

    The evidence for an interest is the number of events on its topic behind the latest
    `distance`: with an interest it is `evidence` + Poisson, without it Poisson alone.

    Returns:
        [M] float64.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from ifa_torchrec.data import RankingDataset
        >>> from ifa_torchrec.data.synthetic import SyntheticConfig, best_scores, prepare
        >>> small = SyntheticConfig(train=20, test=10, mean_events=500)
        >>> log = prepare(Path(tempfile.mkdtemp()) / "log", small)
        >>> best_scores(RankingDataset(log, "test"), small).shape
        (320,)
    """
    log, result = dataset.log, []
    starts, ends = log.history_range(dataset.requests["user"], dataset.requests["time"])
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        old = log.events["item"][start : end - config.distance]
        topic = topic_of(config, np.asarray(old))
        count = np.bincount(topic[topic >= 0], minlength=config.topics)
        rows, _ = dataset.candidate_rows([number])
        asked = topic_of(config, np.asarray(dataset.requests["candidates"][rows]))
        seen = count[asked]
        mean = config.noise * len(old) / (end - start)
        # Poisson(count - evidence) / Poisson(count), in logarithms
        counts = np.arange(config.evidence)
        odds = np.full(len(seen), -np.inf)
        enough = seen >= config.evidence
        falling = np.log(np.maximum(seen[:, None] - counts, 1)).sum(1)
        if mean > 0:
            odds[enough] = falling[enough] - config.evidence * np.log(mean)
        else:
            odds[enough] = np.inf
        # a candidate's topic is an interest: a quarter are drawn to be, the others by chance
        share = config.interests / config.topics
        prior = 0.25 + 0.75 * share
        interest = 1 / (1 + np.exp(-(odds + np.log(prior / (1 - prior)))))
        yes, no = (1 / (1 + np.exp(-z)) for z in (config.bias + config.strength, config.bias))
        result.append(interest * yes + (1 - interest) * no)
    return np.concatenate(result)


def set_reward(probability: np.ndarray, topic: np.ndarray, rows: np.ndarray, fade: float) -> float:
    """What a set is worth to a user whose wish for a topic fades with each item of it.

    The simulator of set generation, with an interaction between items that is known: the item in
    place i is taken with its probability times fade to the power of how many items of its topic
    stand before it.

    Args:
        probability, topic: [M], of the candidates when they stand alone.
        rows: the set, rows of the candidates, best first.
        fade: 1 for items that do not touch each other, 0 for a user who wants one of each topic.

    Returns:
        The expected number of items taken.

    Example:
        >>> import numpy as np
        >>> from ifa_torchrec.data.synthetic import set_reward
        >>> p, topic = np.array([0.8, 0.6, 0.4]), np.array([1, 1, 2])
        >>> [round(set_reward(p, topic, np.array(rows), fade=0.5), 2) for rows in ([0, 1], [0, 2])]
        [1.1, 1.2]
    """
    before = np.array([(topic[rows[:i]] == topic[row]).sum() for i, row in enumerate(rows)])
    return float((probability[rows] * fade**before).sum())


def _items(rng: np.random.Generator, config: SyntheticConfig, topics: np.ndarray) -> np.ndarray:
    return 1 + topics * config.items_per_topic + rng.integers(config.items_per_topic, size=topics.shape)


def _requests(rng: np.random.Generator, config: SyntheticConfig, interests: np.ndarray) -> pd.DataFrame:
    shape = (len(interests), config.candidates)
    topics = rng.integers(config.topics, size=shape)
    wanted = rng.random(shape) < 0.25
    which = rng.integers(config.interests, size=shape)
    topics = np.where(wanted, np.take_along_axis(interests, which, axis=1), topics)
    items = _items(rng, config, topics)
    matches = (topics[:, :, None] == interests[:, None, :]).any(2)
    probability = 1 / (1 + np.exp(-(config.bias + config.strength * matches)))
    label = (rng.random(shape) < probability).astype(np.float32)
    exposed = rng.random(shape) < config.exposure
    label[: config.train] *= exposed[: config.train]
    return pd.DataFrame(
        {
            "user": np.arange(len(interests)),
            "time": _START + pd.Timedelta(days=365, hours=1),
            "candidates": list(items),
            "exposed": list(exposed),
            "label": list(label),
        }
    )
