"""Chooses the options that a training leaves open, from the log."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, get_type_hints

import numpy as np
import torch.distributed as dist

from ifa_torchrec.data import EventLog, RankingDataset
from ifa_torchrec.data.schema import CANDIDATES
from ifa_torchrec.distributed import checkpoint
from ifa_torchrec.distributed.sharding import DENSE_LR
from ifa_torchrec.errors import ConfigError
from ifa_torchrec.modules import IFAConfig
from ifa_torchrec.modules.config import MOST_IDENTITY_KEYS
from ifa_torchrec.training.build import tasks_of
from ifa_torchrec.training.options import MOST_REQUESTS, TrainConfig, from_json, to_json
from ifa_torchrec.training.own import sum_over_parts
from ifa_torchrec.training.validations import LAST, check_metric

STEPS_A_PASS = 500
"""Steps that an epoch should have; batches are made smaller to reach it."""
FEWEST_REQUESTS = 4
"""Minimum number of requests per step, over all ranks, however small the log is."""
WARM_UP = 0.08
"""Share of the steps during which the dense learning rate rises."""
IDENTITY_HALF_LIVES = (math.inf, 30.0, 7.0)
"""Default half-lives of identity heads, in days."""
TOO_FEW_STEPS = 200
"""A run with fewer steps prints a warning."""
MOST_UNKNOWN = 0.95
"""Largest share of the items that are made unknown: the rows of items learn from the others."""
_DECIDED = ("keep_best", "warmup_steps", "optimizers")
"""Options that must not change once a run has begun."""


def decided(config: TrainConfig, dataset: RankingDataset, found: tuple[int, int]) -> TrainConfig:
    """The options, with those that are None chosen from the log. Called by all ranks.

    A run that is resumed keeps the values that were chosen when it began.

    Args:
        config: TrainConfig.
        dataset: the requests to train on.
        found: numbers of requests and events, from ``amounts``.

    Raises:
        ConfigError: an option asks for something that is not in the log.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from ifa_torchrec.data import RankingDataset
        >>> from ifa_torchrec.data.synthetic import SyntheticConfig, prepare
        >>> from ifa_torchrec.distributed import init_process_group
        >>> from ifa_torchrec.training.decide import amounts, decided
        >>> from ifa_torchrec.training.options import TrainConfig
        >>> _, folder = init_process_group(), Path(tempfile.mkdtemp())
        >>> log = prepare(folder / "log", SyntheticConfig(train=20, test=5, mean_events=20))
        >>> config = TrainConfig(folder / "log", folder / "run", epochs=5)
        >>> dataset = RankingDataset(log, "train")
        >>> config = decided(config, dataset, amounts(config, dataset))
        >>> config.max_requests, config.warmup_steps, config.keep_best
        (4, 2, 'last')
        >>> config.optimizers.dense_lr
        0.0011
    """
    begun = _begun(config) if config.resume else {}
    rate = begun.pop("optimizers", config.optimizers).dense_lr
    keep_best = keep_best_of(config, dataset.log, begun.pop("keep_best", None))
    begun = {name: value for name, value in begun.items() if getattr(config, name) is None}
    config = dataclasses.replace(config, **begun, keep_best=keep_best)
    config = dataclasses.replace(config, ifa=_with_identity(config, dataset.log))
    if config.max_requests is None:
        config = dataclasses.replace(config, max_requests=_max_requests(found[0]))
    if config.warmup_steps is None:
        warm = round(WARM_UP * steps(config, *found))
        config = dataclasses.replace(config, warmup_steps=warm)
    if config.optimizers.dense_lr is None:
        rate = _dense_lr(config, *found) if rate is None else rate
        config = dataclasses.replace(
            config, optimizers=dataclasses.replace(config.optimizers, dense_lr=rate)
        )
    return config


def as_options(given: TrainConfig, config: TrainConfig) -> str:
    """The values that ``decided`` chose, as command-line options.

    Args:
        given: the options that the user gave.
        config: from ``decided``.

    Example:
        >>> from dataclasses import replace
        >>> from pathlib import Path
        >>> from ifa_torchrec.training.decide import as_options
        >>> from ifa_torchrec.training.options import TrainConfig
        >>> given = TrainConfig(Path("log"), Path("run"), max_requests=8)
        >>> as_options(given, replace(given, warmup_steps=40, keep_best="gauc"))
        '--warmup-steps 40 --keep-best gauc'
    """
    return " ".join(_differing(to_json(dataclasses.asdict(given)), to_json(dataclasses.asdict(config))))


def _differing(given: dict[str, Any], config: dict[str, Any], prefix: str = "--") -> list[str]:
    result: list[str] = []
    for name, value in config.items():
        option = f"{prefix}{name.replace('_', '-')}"
        if isinstance(value, dict) and isinstance(given[name], dict):
            result += _differing(given[name], value, f"{option}.")
        elif value != given[name]:
            values = value if isinstance(value, list) else [value]
            result.append(" ".join([option, *map(str, values)]))
    return result


def amounts(config: TrainConfig, dataset: RankingDataset) -> tuple[int, int]:
    """The numbers of requests and of events of a training, each history cut to a batch's budget. Called
    by all ranks.

    Args:
        config: TrainConfig.
        dataset: the requests to train on.
    """
    lengths = np.minimum(dataset.history_lengths, config.max_events)
    requests, events = sum_over_parts(dataset.log)(np.array([len(lengths), lengths.sum()]))
    return int(requests), int(events)


def steps(config: TrainConfig, requests: int, events: int) -> int:
    """The approximate number of steps of a training, on the current number of ranks.

    Args:
        config: TrainConfig, with max_requests.
        requests, events: from ``amounts``.

    Example:
        >>> from pathlib import Path
        >>> from ifa_torchrec.training.decide import steps
        >>> from ifa_torchrec.training.options import TrainConfig
        >>> config = TrainConfig(Path("log"), Path("run"), max_requests=8, max_events=100, epochs=2)
        >>> steps(config, requests=80, events=400), steps(config, requests=80, events=4000)
        (20, 80)
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    by_requests = requests / (config.max_requests or MOST_REQUESTS)
    return config.epochs * math.ceil(max(by_requests, events / config.max_events) / world)


def too_few_steps(config: TrainConfig, count: int) -> str:
    """A warning for a training of fewer than 200 steps; "" for a longer one.

    Args:
        config: from ``decided``.
        count: its number of ``steps``.

    Example:
        >>> from pathlib import Path
        >>> from ifa_torchrec.training.decide import too_few_steps
        >>> from ifa_torchrec.training.options import TrainConfig
        >>> config = TrainConfig(Path("log"), Path("run"), keep_best="gauc")
        >>> too_few_steps(config, 75)
        'only 75 steps in all, too few to learn much: give --epochs 3'
        >>> too_few_steps(config, 200)
        ''
    """
    if count >= TOO_FEW_STEPS:
        return ""
    epochs = math.ceil(TOO_FEW_STEPS * config.epochs / count)
    advice = f"only {count} steps in all, too few to learn much: give --epochs {epochs}"
    if config.keep_best != LAST:
        return advice
    return f"{advice}, and validate on a split `valid`: an epoch can rank better but predict worse"


def _with_identity(config: TrainConfig, log: EventLog) -> IFAConfig:
    """The interaction's configuration, with the open options of its identity heads chosen."""
    ifa, of_items = config.ifa, log.schema.item_features
    features = ifa.identity_features or (tuple(of_items) if config.identity else ())
    if not features or config.interaction == "none":
        return ifa
    # items beyond the rows of the item's table are new items; their own ids still count
    ids = max(log.num_items, *of_items.values())
    buckets = min(1 << (ids - 1).bit_length(), MOST_IDENTITY_KEYS // len(features))
    lives = ifa.identity_half_lives
    return dataclasses.replace(
        ifa,
        identity_features=features,
        identity_buckets=buckets if ifa.identity_buckets is None else ifa.identity_buckets,
        identity_half_lives=IDENTITY_HALF_LIVES if lives is None else lives,
    )


def _max_requests(requests: int) -> int:
    world = dist.get_world_size()
    fewest = math.ceil(FEWEST_REQUESTS / world)
    return min(max(requests // (STEPS_A_PASS * world), fewest), MOST_REQUESTS)


def _dense_lr(config: TrainConfig, requests: int, events: int) -> float:
    """The dense learning rate; below MOST_REQUESTS requests per step it falls with the square root of
    their number, since steps get noisier."""
    of_step = config.epochs * requests / max(steps(config, requests, events), 1)
    return float(f"{DENSE_LR * min(math.sqrt(of_step / MOST_REQUESTS), 1):.2g}")


def _begun(config: TrainConfig) -> dict[str, Any]:
    """What was decided when the run to resume began; empty if it has no readable checkpoint."""
    hints = get_type_hints(TrainConfig)
    progress = checkpoint.latest_progress(config.out / "checkpoints")
    if progress is None:
        return {}
    return {name: from_json(hints[name], progress["config"][name], name) for name in _DECIDED}


def keep_best_of(config: TrainConfig, log: EventLog, begun: str | None = None) -> str:
    """The metric that decides which checkpoint is best.

    Args:
        config: TrainConfig.
        log: the event log.
        begun: the metric with which a run that is resumed began.

    Raises:
        ConfigError: an option needs a validation, and there is none; or the metric cannot be measured.
    """
    if not config.validate or "valid" not in log.splits:
        why = f"{log.place} has no split `valid`" if config.validate else "--no-validate turns it off"
        for option in ("keep_best", "patience", "validate_every"):
            value = getattr(config, option)
            if value not in (None, LAST):
                raise ConfigError(f"--{option.replace('_', '-')} {value} needs validation: {why}")
        return begun or LAST
    keep_best = config.keep_best or begun
    if keep_best == LAST:
        if config.patience is not None:
            raise ConfigError(
                f"--patience {config.patience} uses the metric of --keep-best; name one, not {LAST}"
            )
        return LAST
    dataset = RankingDataset(log, "valid", config.history_length)
    return check_metric(keep_best, dataset, tasks_of(log.schema, config, log.scales))


def unknown_items(log: EventLog, config: TrainConfig) -> float:
    """The share of items that are made unknown during training; see TrainConfig.unknown_items. Called by
    all ranks.

    Args:
        log: the event log.
        config: TrainConfig.
    """
    if config.unknown_items is not None:
        return config.unknown_items
    if "valid" not in log.splits:
        return 0.0
    candidates = log.requests("valid")[CANDIDATES]
    found = np.array([(log.item_rows(candidates) == 0).sum(), len(candidates)])
    new, of = sum_over_parts(log)(found).tolist()
    return min(new / max(of, 1), MOST_UNKNOWN)
