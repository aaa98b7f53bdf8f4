"""What a training's options leave open, decided from the log."""

from __future__ import annotations

import dataclasses
import json
from contextlib import suppress
from typing import Any, get_type_hints

from ifa_torchrec.data import EventLog, RankingDataset
from ifa_torchrec.distributed import checkpoint
from ifa_torchrec.errors import ConfigError
from ifa_torchrec.training.build import tasks_of
from ifa_torchrec.training.options import TrainConfig, from_json
from ifa_torchrec.training.validations import LAST, check_metric

_DECIDED = ("keep_best",)
"""Options that a run must not change once it has begun."""


def decided(config: TrainConfig, log: EventLog) -> TrainConfig:
    """The options with a value for each that was None and means "as the log has it". Called by all
    ranks.

    A run that goes on takes what was decided when it began.

    Args:
        config: TrainConfig.
        log: the event log that it trains on.

    Raises:
        ConfigError: an option asks for what the log has not.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from ifa_torchrec.data.synthetic import SyntheticConfig, prepare
        >>> from ifa_torchrec.distributed import init_process_group
        >>> from ifa_torchrec.training.decide import decided
        >>> from ifa_torchrec.training.options import TrainConfig
        >>> _, folder = init_process_group(), Path(tempfile.mkdtemp())
        >>> log = prepare(folder / "log", SyntheticConfig(train=20, test=5, mean_events=20))
        >>> decided(TrainConfig(folder / "log", folder / "run"), log).keep_best
        'last'
    """
    begun = _begun(config) if config.resume else {}
    begun = {name: value for name, value in begun.items() if getattr(config, name) is None}
    config = dataclasses.replace(config, **begun)
    if "keep_best" not in begun:
        config = dataclasses.replace(config, keep_best=_keep_best(config, log))
    return config


def _begun(config: TrainConfig) -> dict[str, Any]:
    """What was decided for the run that is to go on; empty if no checkpoint says it."""
    hints = get_type_hints(TrainConfig)
    for path in reversed(checkpoint.checkpoints_of_rank_0(config.out / "checkpoints")):
        with suppress(OSError, ValueError, LookupError, TypeError):  # of one that is damaged
            options = json.loads((path / "progress.json").read_text())["config"]
            return {name: from_json(hints[name], options[name], name) for name in _DECIDED}
    return {}


def _keep_best(config: TrainConfig, log: EventLog) -> str:
    if not config.validate or "valid" not in log.splits:
        why = f"{log.path} has no split `valid`" if config.validate else "--no-validate measures nothing"
        for option in ("keep_best", "patience"):
            value = getattr(config, option)
            if value not in (None, LAST):
                raise ConfigError(f"--{option.replace('_', '-')} {value}: {why}")
        return LAST
    if config.keep_best == LAST:
        if config.patience is not None:
            raise ConfigError(
                f"--patience {config.patience} goes by the metric of --keep-best; name one, not {LAST}"
            )
        return LAST
    dataset = RankingDataset(log, "valid", config.history_length)
    return check_metric(config.keep_best, dataset, tasks_of(log.schema, config, log.scales))
