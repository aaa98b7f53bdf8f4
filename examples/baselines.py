"""Scorers without a neural net for any event log: popularity, recency, and LightGBM on the features that
a practitioner would try first.

The features of a candidate and its user's history are counts by ``ops.match`` (how often the user had
the item before, or an item of the same category and so on, with half-lives), and the days since the last
such event. The request's and the candidate's own numbers and ids are added.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ifa_torchrec import ops
from ifa_torchrec.data import EventBudgetSampler, EventLog, RankingDataset, make_loader
from ifa_torchrec.data.schema import CANDIDATES, OFFSETS, TIME
from ifa_torchrec.errors import require
from ifa_torchrec.modules import Task
from ifa_torchrec.training.metrics import gauc
from ifa_torchrec.training.scoring import measure

HALF_LIVES = (7.0, 15.0, 30.0, 60.0, 90.0, 180.0, 365.0)
"""In days; recency uses the one that ranks the requests of `valid` best."""
COUNTED = (math.inf, 90.0, 30.0, 7.0)
"""Half-lives of LightGBM's counts, in days."""
_LAST = 2.0  # per day; the latest event dominates the sum of exp(-_LAST age)
_ROUNDS, _PATIENCE = 1000, 30
_MOST_CATEGORIES = 1000
_HELD_OUT = 0.1  # share of the training requests, the latest, held out if a log has no split `valid`


def counts(dataset: RankingDataset, feature: str, half_lives: tuple[float, ...]) -> np.ndarray:
    """How often the user had each candidate's value of an item feature before, with half-lives.

    Args:
        dataset: the split.
        feature: an id feature of the item. Its row 0, "unknown", counts like any other.
        half_lives: L half-lives, in days.

    Returns:
        [M, L] float32.
    """
    decay = [math.log(2) / half_life for half_life in half_lives]
    return _matched(dataset, feature, torch.tensor(decay))


def days_since(dataset: RankingDataset, feature: str) -> np.ndarray:
    """Days since the user's last event with the candidate's value of an item feature, [M] float64; NaN
    if there is none, or it was more than a year ago."""
    # float64 can represent the sum for events of this age
    matched = _matched(dataset, feature, torch.tensor([_LAST], dtype=torch.float64))[:, 0]
    with np.errstate(divide="ignore"):
        return np.where(matched > 0, np.maximum(-np.log(matched) / _LAST, 0), np.nan)


def _matched(dataset: RankingDataset, feature: str, decay: torch.Tensor) -> np.ndarray:
    """The sums of exp(-decay age) over the events with a candidate's value, [M, L] in decay's dtype."""
    sums = []
    sampler = EventBudgetSampler(dataset.history_lengths, max_events=65536, max_requests=64)
    for batch in make_loader(dataset, sampler):
        candidates = batch.sequence_features[f"candidate_{feature}"]
        history = batch.sequence_features[f"history_{feature}"]
        _, weight = ops.match(
            candidates.values(),
            candidates.offsets(),
            torch.zeros(len(history.values()), 1, dtype=decay.dtype),
            history.values(),
            history.offsets(),
            None,
            batch.history_age.to(decay.dtype),
            decay,
        )
        sums.append(weight)
    return torch.cat(sums).numpy()


def popularity(dataset: RankingDataset) -> np.ndarray:
    """The candidate's share of all events before each request, [M] float64. One event is added to the
    item's and to all events, so that no share is 0."""
    log, requests = dataset.log, dataset.requests
    start = min(np.min(log.events[TIME]), np.min(requests[TIME]))
    seconds = (np.asarray(log.events[TIME]) - start) // 1_000_000
    asked = (np.asarray(requests[TIME]) - start) // 1_000_000
    span = int(max(seconds.max(), asked.max())) + 1
    keys = np.sort(np.asarray(log.events[log.schema.item]) * span + seconds)  # by item, then time
    item = np.asarray(requests[CANDIDATES])
    when = np.repeat(asked, np.diff(requests[OFFSETS]))
    before = np.searchsorted(keys, item * span + when) - np.searchsorted(keys, item * span)
    every = np.searchsorted(np.sort(seconds), when)
    return (before + 1) / (every + 1)


def features(dataset: RankingDataset) -> tuple[np.ndarray, list[str]]:
    """LightGBM's features of each candidate: [M, F] float64, and the features' names."""
    schema, requests = dataset.log.schema, dataset.requests
    columns: dict[str, np.ndarray] = {}
    for name in schema.item_features:
        found = counts(dataset, name, COUNTED)
        columns |= {f"{name}, half-life {h:g}": found[:, i] for i, h in enumerate(COUNTED)}
        columns[f"{name}, days since"] = days_since(dataset, name)
    sizes = np.diff(requests[OFFSETS])
    columns["popularity"] = np.log(popularity(dataset))
    columns["events of the user"] = np.repeat(dataset.history_lengths, sizes)
    columns["candidates"] = np.repeat(sizes, sizes)
    columns |= {name: np.asarray(requests[name]) for name in schema.candidate_dense}
    own = (*schema.dense_features, *schema.context_features)
    columns |= {name: np.repeat(np.asarray(requests[name]), sizes) for name in own}
    numbers = np.asarray(requests[CANDIDATES])
    columns |= {name: np.asarray(dataset.log.items[name])[numbers] for name in _categories(dataset.log)}
    return np.column_stack([c.astype(np.float64) for c in columns.values()]), list(columns)


def _categories(log: EventLog) -> list[str]:
    """The item's id features with few values, which LightGBM takes as categories."""
    schema = log.schema
    return [f for f, n in schema.item_features.items() if f != schema.item and n <= _MOST_CATEGORIES]


@dataclass
class Boosted:
    """LightGBM, trained on a log's first task, which must be binary; see ``boosted``.

    Attributes:
        booster: lightgbm's Booster.
        task: the task.
        seconds: time of the training, features included.
    """

    booster: Any
    task: Task
    seconds: float

    def scores(self, dataset: RankingDataset) -> np.ndarray:
        """The logits of the candidates, [M, 1] float32."""
        raw = self.booster.predict(features(dataset)[0], raw_score=True)
        return np.asarray(raw, np.float32)[:, None]


def boosted(log: EventLog, seed: int = 0) -> Boosted:
    """Train LightGBM on the log's training requests, with early stopping on `valid`, or without that
    split on the latest tenth of the training requests.

    Args:
        log: the event log, whose first task is binary.
        seed: LightGBM's seed.

    Raises:
        ModuleNotFoundError: the package lightgbm is not installed (extra `demo`).
    """
    require("demo", "lightgbm")
    import lightgbm

    start = time.perf_counter()
    task = next(Task(name, kind) for name, kind in log.schema.tasks.items())
    train = RankingDataset(log, "train")
    x, names = features(train)
    y = np.asarray(train.requests[task.name])
    if "valid" in log.splits:
        valid = RankingDataset(log, "valid")
        held_out = features(valid)[0], np.asarray(valid.requests[task.name])
    else:
        # by rank, not by time: all requests may have the same time
        place = np.argsort(np.argsort(np.asarray(train.requests[TIME]), kind="stable"))
        is_late = place >= (1 - _HELD_OUT) * len(train)
        late = np.repeat(is_late, np.diff(train.requests[OFFSETS]))
        held_out = x[late], y[late]
        x, y = x[~late], y[~late]
    categories = [*_categories(log), *log.schema.context_features]
    given = {"categorical_feature": [names.index(name) for name in categories]}
    data = lightgbm.Dataset(x, y, feature_name=[name.replace(",", "") for name in names], **given)
    booster = lightgbm.train(
        {
            "objective": "binary",
            "learning_rate": 0.05,
            "num_leaves": 63,
            "min_data_in_leaf": 50,
            "num_threads": torch.get_num_threads(),
            "seed": seed,
            "verbose": -1,
        },
        data,
        _ROUNDS,
        valid_sets=[lightgbm.Dataset(*held_out, reference=data)],
        callbacks=[lightgbm.early_stopping(_PATIENCE, verbose=False)],
    )
    return Boosted(booster, task, time.perf_counter() - start)


def best_half_life(log: EventLog) -> float:
    """The half-life in days with which the user's own counts of an item rank the requests of `valid`
    (without that split, of `train`) best."""
    dataset = RankingDataset(log, "valid" if "valid" in log.splits else "train")
    request = np.repeat(np.arange(len(dataset)), np.diff(dataset.requests[OFFSETS]))
    label = np.asarray(dataset.requests[next(iter(log.schema.tasks))])
    found = counts(dataset, log.schema.item, HALF_LIVES)
    measured = [gauc(request, found[:, i], label) for i in range(len(HALF_LIVES))]
    return HALF_LIVES[int(np.argmax(measured))]


def measured(log: EventLog, name: str, seed: int = 0, by: tuple[str, ...] = ()) -> dict[str, Any]:
    """The metrics of one of these scorers on the split `test`.

    Args:
        log: the event log.
        name: "popularity", "purchase_count" (the user's own, without decay), "recency_count" (with
            half-life ``best_half_life``) or "lightgbm".
        seed: LightGBM's seed.
        by: context features, as for ``measure``.

    Returns:
        As from ``measure``, with "ms_per_request", the time of features and scorer; for LightGBM also
        "train_seconds".
    """
    test, item = RankingDataset(log, "test"), log.schema.item
    half_life = best_half_life(log) if name == "recency_count" else math.inf
    model = boosted(log, seed) if name == "lightgbm" else None
    start = time.perf_counter()
    if model is not None:
        scores = model.scores(test)
    elif name == "popularity":
        scores = popularity(test)[:, None]
    else:
        scores = counts(test, item, (half_life,))
    milliseconds = 1000 * (time.perf_counter() - start) / len(test)
    if len(log.schema.tasks) > 1:
        raise ValueError(f"{log.path} has the tasks {list(log.schema.tasks)}; give a log with one task")
    result = measure(test, scores, (model.task,) if model else None, by=by)
    result |= {"ms_per_request": milliseconds}
    if model is not None:
        result |= {
            "train_seconds": model.seconds,
            "train_events_per_second": _events(log) / model.seconds,
        }
    return result


def _events(log: EventLog) -> int:
    """Events in the histories of the training requests."""
    return int(RankingDataset(log, "train").history_lengths.sum())
