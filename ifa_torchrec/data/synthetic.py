"""A synthetic event log with a known ground truth: a user's interests show in rare events far back.

The recipe; all random draws come from one seed:

- Rare items belong to topics, which are not a feature: a model has to learn which items go together.
  A category consists of ten topics and a proportional share of the everyday items.
- A user has some interests: topics, drawn uniformly. Each interest left `evidence` events on its items,
  drawn uniformly, all of them before the latest `distance` events of the history. All other events are
  everyday items, with a popularity of 1 / rank shared by all users; and, at any place, Poisson(`noise`)
  chance events of every topic.
- A request comes at the end of the history. A quarter of its candidates are of the user's
  interests, the rest of any topic; a label is 1 with the probability sigmoid(bias + strength *
  [of an interest]). Which items of a topic the user had does not matter.
- Every candidate is exposed with the probability `exposure`. In the split `train` the label of an
  unexposed candidate is 0, as in a real log; in `test` all labels are true.
- With `promotion` or `policy` exposure is biased: its probability is sigmoid(logit of `exposure` +
  promotion * z + policy * [of an interest]), where z is standard normal per item, the same for all
  users. The label of an exposed candidate depends on neither. The item feature `topic` gives the topic
  of every rare item.
- With `kinds`, each event has an `action` (bought, clicked or skipped) and an `amount`. A user has
  interests, whose events were bought, and as many topics whose events were skipped; everyday events have
  any action, and chance events were clicked or skipped. Amounts vary around a mean per topic. The
  label's probability is sigmoid(bias + strength * pull); the pull of a topic is the sum of the amounts
  of its bought events over `evidence`. A quarter of the candidates are of interests, a quarter of
  skipped topics.
- With `new_items`, that share of the candidates of `valid` and `test` are items without any event or
  request in `train`. There are as many new items as rare items, with the same topics; and the item
  feature `topic` gives the topic of every rare item.
- With `relations` the user picks from the set that is shown (``synthetic_sets``); `topic` is a feature.

So `strength`, `distance` and `noise` determine the value of a long history, and only the history
distinguishes the candidates. ``best_scores`` is the best ranking possible given this recipe but not the
users' interests.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ifa_torchrec.data import synthetic_sets
from ifa_torchrec.data.dataset import RankingDataset
from ifa_torchrec.data.event_log import EventLog
from ifa_torchrec.data.schema import LogSchema
from ifa_torchrec.data.synthetic_sets import SHOWN
from ifa_torchrec.data.writing import check_recorded, recording
from ifa_torchrec.errors import ConfigError

_TOPICS_PER_CATEGORY = 10
_START = pd.Timestamp("2024-01-01")
CONFIG_FILE = "synthetic.json"
"""The file in the log's folder with its SyntheticConfig."""
ACTIONS = ("unknown", "bought", "clicked", "skipped")
"""The names of the values of the event feature `action`."""
_BOUGHT, _CLICKED, _SKIPPED = 1, 2, 3


@dataclass(frozen=True)
class SyntheticConfig:
    """The size and difficulty of a synthetic log.

    Args:
        train, test: the number of requests of each split, each by a different user; with new items a
            quarter of `test` is `valid`.
        mean_events: mean length of a history; log-normal, at least `distance` and all evidence.
        topics, items_per_topic, everyday_items: sizes of the item table: after row 0, unknown, come the
            rare items topic by topic, then the everyday items.
        interests: the number of a user's interests.
        evidence: the number of events per interest.
        distance: the number of latest events without evidence.
        strength: what an interest adds to the logit of a label.
        noise: mean number of chance events per topic.
        bias: logit of a label without an interest.
        candidates: the number of candidates per request.
        exposure: probability that a candidate is exposed.
        seed: the seed of all random draws.
        kinds: whether events have actions and amounts, on which the labels depend.
        new_items: share of the candidates of `valid` and `test` that are new items.
        relations: whether the user picks from the set that is shown; then noise, kinds and new_items
            must be 0, and `exposure` is not used.
        promotion: standard deviation of what an item adds to the logit of its exposure.
        policy: what an interest adds to the logit of exposure.

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
    kinds: bool = False
    new_items: float = 0.0
    relations: bool = False
    promotion: float = 0.0
    policy: float = 0.0

    def __post_init__(self) -> None:
        if (
            self.topics % _TOPICS_PER_CATEGORY
            or not 0 < self.interests <= self.user_topics <= self.topics
        ):
            raise ConfigError(
                f"SyntheticConfig: topics must be a multiple of {_TOPICS_PER_CATEGORY}, interests 1 to "
                f"topics, or to half of them with kinds; got {self.topics}, {self.interests}"
            )
        if not 0 < self.exposure <= 1 or self.noise < 0 or self.distance < 0:
            raise ConfigError(
                "SyntheticConfig: exposure must be above 0 and at most 1, noise and distance at least "
                f"0; got exposure={self.exposure}, noise={self.noise}, distance={self.distance}"
            )
        if self.biased and self.exposure == 1:
            raise ConfigError("SyntheticConfig: with exposure=1, promotion and policy must be 0")
        if not 0 <= self.new_items <= 1:
            raise ConfigError(f"SyntheticConfig: new_items must be 0 to 1, got {self.new_items}")
        if self.relations and (self.noise or self.kinds or self.new_items or self.candidates < SHOWN):
            raise ConfigError(
                "SyntheticConfig: relations needs noise=0, no kinds, new_items=0 and at least "
                f"{SHOWN} candidates"
            )

    @property
    def names_topics(self) -> bool:
        """Whether `topic` is an item feature: in logs that test something other than learning topics."""
        return self.kinds or self.new_items > 0 or self.biased or self.relations

    @property
    def biased(self) -> bool:
        """Whether exposure depends on the candidate."""
        return self.promotion != 0 or self.policy != 0

    @property
    def num_items(self) -> int:
        """The rows of the item table: unknown, rare and everyday items. New items follow."""
        return 1 + self.topics * self.items_per_topic + self.everyday_items

    @property
    def user_topics(self) -> int:
        """The number of a user's topics: interests and, with kinds, as many skipped topics."""
        return self.interests * (2 if self.kinds else 1)

    @property
    def categories(self) -> int:
        """The number of item categories."""
        return self.topics // _TOPICS_PER_CATEGORY


def prepare(path: str | Path, config: SyntheticConfig | None = None) -> EventLog:
    """Write the log at ``path``, or open it if it is there.

    Raises:
        LogError: the folder at ``path`` is not a complete log.
        ConfigError: it is a log with another config.

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
        check_recorded(path, CONFIG_FILE, asdict(config) if config else {})
        return EventLog(path)
    config = config or SyntheticConfig()
    rng = np.random.default_rng(config.seed)
    histories = [_history(rng, config, length) for length in _lengths(rng, config)]
    lengths = [len(history.columns["item"]) for history in histories]
    # a history ends on day 365, the request comes an hour later
    day = np.concatenate([np.sort(rng.random(length)) * 365 for length in lengths])
    columns = {n: np.concatenate([h.columns[n] for h in histories]) for n in histories[0].columns}
    requests = _requests(rng, config, histories)
    rows = {"item": config.num_items, "category": config.categories + 1}
    with recording(path, CONFIG_FILE, asdict(config)) as draft:
        EventLog.from_pandas(
            draft,
            events=pd.DataFrame(
                {
                    "user": np.repeat(np.arange(len(histories)), lengths),
                    "time": _START + pd.to_timedelta(day, unit="D"),
                    **columns,
                }
            ),
            schema=LogSchema(
                item_features=rows | ({"topic": config.topics + 1} if config.names_topics else {}),
                event_features={"action": len(ACTIONS)} if config.kinds else {},
                event_dense=("amount",) if config.kinds else (),
            ),
            items=_item_table(config),
            requests={name: requests.iloc[rows] for name, rows in _splits(config).items()},
        )
    return EventLog(path)


def topic_of(config: SyntheticConfig, item: np.ndarray) -> np.ndarray:
    """The topic of each item; -1 for everyday items and for the unknown item.

    Example:
        >>> import numpy as np
        >>> from ifa_torchrec.data.synthetic import SyntheticConfig, topic_of
        >>> topic_of(SyntheticConfig(), np.array([1, 10, 11, 5000, 0])).tolist()
        [0, 0, 1, -1, -1]
    """
    first = np.where(item < config.num_items, 1, config.num_items)  # new items follow
    topic = (item - first) // config.items_per_topic
    return np.where(topic < config.topics, topic, -1)


def best_scores(dataset: RankingDataset, config: SyntheticConfig) -> np.ndarray:
    """The probability of each label given all that is observed: the best possible ranking.

    The evidence for an interest is the number of events on its topic before the latest `distance`: with
    an interest it is `evidence` + Poisson, without it only Poisson. With kinds the history determines
    the interests: the scores are the probabilities by which the labels were drawn.

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
    events, result = dataset.log.events, []
    starts, ends = dataset.log.history_range(dataset.requests["user"], dataset.requests["time"])
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        rows, _ = dataset.candidate_rows([number])
        asked = topic_of(config, np.asarray(dataset.requests["candidates"][rows]))
        topic = topic_of(config, np.asarray(events["item"][start:end]))
        if config.kinds:
            bought = (topic >= 0) & (events["action"][start:end] == _BOUGHT)
            pull = np.bincount(
                topic[bought], events["amount"][start:end][bought], minlength=config.topics
            )
            result.append(_probability(config, pull[asked] / config.evidence))
            continue
        old = topic[: len(topic) - config.distance]
        seen = np.bincount(old[old >= 0], minlength=config.topics)[asked]
        interest = _interest(config, seen, config.noise * len(old) / len(topic))
        yes, no = _probability(config, np.array([1.0, 0.0]))
        result.append(interest * yes + (1 - interest) * no)
    return np.concatenate(result)


def _interest(config: SyntheticConfig, seen: np.ndarray, mean: float) -> np.ndarray:
    """The probability that a candidate's topic is an interest, given the number of old events on it and
    the mean number of chance events."""
    # Poisson(count - evidence) / Poisson(count), in logarithms
    counts = np.arange(config.evidence)
    odds = np.full(len(seen), -np.inf)
    enough = seen >= config.evidence
    falling = np.log(np.maximum(seen[:, None] - counts, 1)).sum(1)
    odds[enough] = falling[enough] - config.evidence * np.log(mean) if mean > 0 else np.inf
    # a quarter of the candidates are drawn to be of an interest, the others are by chance
    prior = 0.25 + 0.75 * config.interests / config.topics
    return 1 / (1 + np.exp(-(odds + np.log(prior / (1 - prior)))))


def _probability(config: SyntheticConfig, pull: np.ndarray) -> np.ndarray:
    """The probability of a positive label, given the pull of the candidate's topic."""
    return 1 / (1 + np.exp(-(config.bias + config.strength * pull)))


def exposure_probability(
    config: SyntheticConfig, item: np.ndarray, pull: np.ndarray
) -> np.ndarray | float:
    """The probability with which each candidate was exposed.

    Args:
        config: the config of the log.
        item: rows of the item table, below ``config.num_items``; any shape.
        pull: the pull of the candidates' topics, same shape.

    Returns:
        The probabilities, same shape; ``config.exposure`` if it does not depend on the candidate.

    Example:
        >>> import numpy as np
        >>> from ifa_torchrec.data.synthetic import SyntheticConfig, exposure_probability
        >>> config = SyntheticConfig(exposure=0.2, policy=2.0)
        >>> exposure_probability(config, np.array([1, 2]), np.array([0.0, 1.0])).round(2).tolist()
        [0.2, 0.65]
    """
    if not config.biased:
        return config.exposure
    # a separate generator: a log without bias does not change
    promoted = np.random.default_rng([config.seed, 1]).normal(size=config.num_items)
    odds = config.exposure / (1 - config.exposure)
    logit = np.log(odds) + config.promotion * promoted[item] + config.policy * pull
    return 1 / (1 + np.exp(-logit))


@dataclass(frozen=True)
class _History:
    """The events of a user, their topics, and the pull of every topic."""

    columns: dict[str, np.ndarray]
    topics: np.ndarray
    pull: np.ndarray


def _item_table(config: SyntheticConfig) -> pd.DataFrame:
    new = config.topics * config.items_per_topic if config.new_items else 0
    item = np.arange(config.num_items + new)
    topic = topic_of(config, item)
    # the everyday items are spread evenly over the categories
    everyday = (item - 1 - config.topics * config.items_per_topic) % config.categories
    category = 1 + np.where(topic >= 0, topic // _TOPICS_PER_CATEGORY, everyday)
    category[0] = 0
    names = {"topic": topic + 1} if config.names_topics else {}
    return pd.DataFrame({"item": item, "category": category, **names})


def _splits(config: SyntheticConfig) -> dict[str, slice]:
    """The requests of each split; with new items the first quarter of `test` is `valid`, which shows
    what share of new items to expect."""
    first = config.train + (config.test // 4 if config.new_items else 0)
    valid = {"valid": slice(config.train, first)} if config.new_items else {}
    return {"train": slice(config.train), **valid, "test": slice(first, None)}


def _lengths(rng: np.random.Generator, config: SyntheticConfig) -> np.ndarray:
    lengths = rng.lognormal(0.0, 0.5, config.train + config.test) * config.mean_events / np.exp(0.125)
    return np.maximum(lengths.astype(np.int64), config.distance + config.user_topics * config.evidence)


def _history(rng: np.random.Generator, config: SyntheticConfig, length: int) -> _History:
    mine = rng.choice(config.topics, config.user_topics, replace=False)
    evidence = len(mine) * config.evidence
    # capped: chance events never crowd out the evidence
    chance = min(int(rng.poisson(config.noise * config.topics)), int(length) - evidence)
    popularity = np.cumsum(1.0 / np.arange(1, config.everyday_items + 1))
    events = np.searchsorted(popularity, rng.random(length) * popularity[-1], side="right")
    events = config.num_items - config.everyday_items + np.minimum(events, config.everyday_items - 1)
    old = rng.permutation(length - config.distance)[:evidence]
    others = np.delete(np.arange(length), old)
    of_old = np.repeat(mine, config.evidence)
    events[old] = _items(rng, config, of_old)
    by_chance = rng.choice(others, chance, replace=False)
    events[by_chance] = _items(rng, config, rng.integers(config.topics, size=chance))
    pull = np.zeros(config.topics)
    if not config.kinds:
        pull[mine] = 1.0
        return _History({"item": events}, mine, pull)
    action = rng.choice([_BOUGHT, _CLICKED, _SKIPPED], length, p=[0.1, 0.6, 0.3])
    action[by_chance] = rng.choice([_CLICKED, _SKIPPED], chance)
    action[old] = np.where(np.arange(evidence) < evidence // 2, _BOUGHT, _SKIPPED)
    amount = rng.uniform(0.5, 1.5, length)
    amount[old] *= np.repeat(rng.uniform(0.1, 1.9, len(mine)), config.evidence)
    bought = old[action[old] == _BOUGHT]
    np.add.at(pull, of_old[: len(bought)], amount[bought] / config.evidence)
    return _History({"item": events, "action": action, "amount": amount}, mine, pull)


def _items(rng: np.random.Generator, config: SyntheticConfig, topics: np.ndarray) -> np.ndarray:
    return 1 + topics * config.items_per_topic + rng.integers(config.items_per_topic, size=topics.shape)


def candidate_topics(rng: np.random.Generator, config: SyntheticConfig, own: np.ndarray) -> np.ndarray:
    """The topics of the candidates of n requests.

    Args:
        rng: the random generator.
        config: the config of the log.
        own: [n, topics of a user], the topics of each request's user.

    Returns:
        [n, candidates].

    Example:
        >>> import numpy as np
        >>> from ifa_torchrec.data.synthetic import SyntheticConfig, candidate_topics
        >>> own = np.tile(np.arange(5), (3, 1))
        >>> candidate_topics(np.random.default_rng(0), SyntheticConfig(), own).shape
        (3, 32)
    """
    shape = (len(own), config.candidates)
    topics = rng.integers(config.topics, size=shape)
    share = 0.5 if config.kinds else 0.35 if config.relations else 0.25
    wanted = rng.random(shape) < share
    which = rng.integers(config.user_topics, size=shape)
    return np.where(wanted, np.take_along_axis(own, which, axis=1), topics)


def _picked(
    rng: np.random.Generator, config: SyntheticConfig, pull: np.ndarray, topics: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Which candidates were picked and which were shown, both [n, candidates]."""
    rows = synthetic_sets.show(rng, pull, topics, SHOWN)
    logit = config.bias + config.strength * np.take_along_axis(pull, rows, axis=1)
    picks = synthetic_sets.picked(rng, logit, np.take_along_axis(topics, rows, axis=1))
    label, exposed = np.zeros(pull.shape, np.float32), np.zeros(pull.shape, bool)
    np.put_along_axis(label, rows, picks.astype(np.float32), axis=1)
    np.put_along_axis(exposed, rows, True, axis=1)
    return label, exposed


def _requests(
    rng: np.random.Generator, config: SyntheticConfig, histories: list[_History]
) -> pd.DataFrame:
    shape = (len(histories), config.candidates)
    topics = candidate_topics(rng, config, np.stack([history.topics for history in histories]))
    items = _items(rng, config, topics)
    pull = np.stack([history.pull for history in histories])
    pull = np.take_along_axis(pull, topics, axis=1)
    if config.relations:
        label, exposed = _picked(rng, config, pull, topics)
    else:
        label = (rng.random(shape) < _probability(config, pull)).astype(np.float32)
        exposed = rng.random(shape) < exposure_probability(config, items, pull)
        label[: config.train] *= exposed[: config.train]
    new = rng.random(shape) < config.new_items
    new[: config.train] = False
    items = np.where(new, items + config.num_items - 1, items)
    return pd.DataFrame(
        {
            "user": np.arange(len(histories)),
            "time": _START + pd.Timedelta(days=365, hours=1),
            "candidates": list(items),
            "exposed": list(exposed),
            "label": list(label),
        }
    )
