"""Search for the training options with the best metric on the split `valid`.

    ifa tune --train.data LOG --train.out runs/tuned --trials 30
    ifa tune --train.data LOG --train.out runs/tuned --search ifa.num-heads=1,2,4 dropout=0..0.3

Each trial is a run in OUT/trial-NUMBER. OUT/study.log is Optuna's journal, so the same command continues
a stopped search. OUT/best.json has the best trial and its options. Options that are not searched are
those of ``--train``.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sys
import typing
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch.distributed as dist
import tyro

from ifa_torchrec.commands.command_line import result_as_json
from ifa_torchrec.data import EventLog
from ifa_torchrec.data.remote import full_name
from ifa_torchrec.distributed import checkpoint, init_process_group
from ifa_torchrec.errors import ConfigError, DivergedError, UserError, require, writing
from ifa_torchrec.training.decide import keep_best_of
from ifa_torchrec.training.options import TrainConfig, from_json, to_json
from ifa_torchrec.training.trainer import train
from ifa_torchrec.training.validations import LAST, gain


@dataclass(frozen=True)
class TuneConfig:
    """Options of ``ifa tune``."""

    train: TrainConfig
    """Options of the trainings; searched options are replaced."""
    trials: int = 20
    """Number of trials, including those before the search was stopped."""
    search: tuple[str, ...] = (
        "optimizers.dense-lr=0.001..0.01",
        "optimizers.table-lr=0.01..0.1",
        "optimizers.weight-decay=0.001..0.1",
        "dropout=0,0.1,0.2",
    )
    """Training options, by their names on the command line, with what to try: NAME=LOW..HIGH (on a
    logarithmic scale if both are positive), or NAME=A,B,C."""

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise ConfigError(f"--trials must be at least 1, got {self.trials}")
        if not self.search:
            raise ConfigError("--search: name an option to search, e.g. dropout=0,0.1")
        if self.train.keep_best == LAST:
            raise ConfigError(
                "--train.keep-best last: trials are compared by a metric; name one, e.g. gauc"
            )
        for text in self.search:
            space_of(text)


def space_of(text: str) -> tuple[str, list[str] | tuple[float, float]]:
    """An option's name and the values to try: a list, or the bounds of a range.

    Raises:
        ConfigError: it is not NAME=LOW..HIGH or NAME=A,B,C, or there is no such option.

    Example:
        >>> from ifa_torchrec.commands.tune import space_of
        >>> space_of("optimizers.dense-lr=0.001..0.01"), space_of("ifa.num-heads=1,2")
        (('optimizers.dense_lr', (0.001, 0.01)), ('ifa.num_heads', ['1', '2']))
    """
    name, _, values = text.partition("=")
    name = name.strip().removeprefix("--").replace("-", "_")
    whole = kind_of(name) in (int, int | None)
    low, dots, high = values.partition("..")
    if not dots and all(values.split(",")):
        return name, values.split(",")
    bounds = math.nan, math.nan
    with suppress(ValueError):
        bounds = float(low), float(high)
    if not -math.inf < bounds[0] < bounds[1] < math.inf:
        raise ConfigError(f"--search {text}: give NAME=LOW..HIGH, with LOW below HIGH, or NAME=A,B,C")
    if whole and not all(bound.is_integer() for bound in bounds):
        raise ConfigError(f"--search {text}: the option is an integer; give integer bounds")
    return name, (round(bounds[0]), round(bounds[1])) if whole else bounds


def kind_of(name: str) -> Any:
    """The type of a training option, e.g. of "ifa.num_heads".

    Raises:
        ConfigError: there is no such option.
    """
    kind: Any = TrainConfig
    for part in name.split("."):
        hints = typing.get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
        if part not in hints:
            raise ConfigError(f"--search {name.replace('_', '-')}: no such option of ifa train")
        kind = hints[part]
    return kind


def with_option(config: Any, name: str, value: Any) -> Any:
    """A configuration with one option changed.

    Example:
        >>> from pathlib import Path
        >>> from ifa_torchrec.commands.tune import with_option
        >>> from ifa_torchrec.training.options import TrainConfig
        >>> config = with_option(TrainConfig(Path("log"), Path("run")), "ifa.num_heads", "4")
        >>> config.ifa.num_heads
        4
    """
    first, _, rest = name.partition(".")
    if rest:
        return dataclasses.replace(config, **{first: with_option(getattr(config, first), rest, value)})
    kind = typing.get_type_hints(type(config))[first]
    if isinstance(value, str):
        with suppress(ValueError):  # text that is not JSON stays text
            value = json.loads(value)
    return dataclasses.replace(config, **{first: from_json(kind, value, first)})


def tune(config: TuneConfig) -> dict[str, Any]:
    """Start or continue a search until it has the given number of trials. On one rank.

    Returns:
        "trial", the number of the best trial; "out", its run; "metric" and "value", the metric and its
        value; "options", the searched options. Also written to OUT/best.json.

    Raises:
        ConfigError: there are several ranks, the metric cannot be measured on the log, or OUT has a
            search with other options.
        CheckpointError: another search or training writes to OUT.
        DivergedError: no trial was completed.
        WriteError: OUT cannot be written.

    Example:
        >>> from pathlib import Path
        >>> from ifa_torchrec.commands.tune import TuneConfig, tune
        >>> from ifa_torchrec.training.options import TrainConfig
        >>> base = TrainConfig(Path("runs/data/mine"), Path("runs/tuned"))
        >>> tune(TuneConfig(base, trials=30))["options"]  # doctest: +SKIP
        {'optimizers.dense_lr': 0.0041, 'dropout': '0.1'}
    """
    require("tune", "optuna")
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from optuna.trial import TrialState

    init_process_group()
    if dist.get_world_size() > 1:
        raise ConfigError("ifa tune runs on one rank: start it without torchrun")
    out, metric = config.train.out, _metric(config.train)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with checkpoint.locked(out):
        study = optuna.create_study(
            study_name="ifa",
            storage=JournalStorage(JournalFileBackend(str(out / "study.log"))),
            direction="maximize",  # the value is `gain`
            load_if_exists=True,
        )
        _check_same(study, config, metric)
        # a continued search must not draw the same values as at its start
        study.sampler = optuna.samplers.TPESampler(seed=config.train.seed + len(study.trials))
        for trial in study.get_trials(states=(TrialState.RUNNING,)):  # was stopped: run it again
            study.tell(trial.number, state=TrialState.FAIL)
            study.enqueue_trial(trial.params)
        while len(study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED))) < config.trials:
            trial = study.ask()
            value = _reached(config, trial, metric)
            if isinstance(value, UserError):
                study.tell(trial, state=TrialState.PRUNED)
                text = "diverged" if isinstance(value, DivergedError) else f"cannot be trained: {value}"
            else:
                trial.set_user_attr("value", value)
                study.tell(trial, gain(metric, value))
                text = f"{metric} {value:.4f}"
            print(f"trial {trial.number}: {text}, {trial.params}", file=sys.stderr)
        if not study.get_trials(states=(TrialState.COMPLETE,)):
            raise DivergedError(
                f"{out}: no trial was completed; the lines above say why. If they diverged, search "
                "lower learning rates"
            )
        best = study.best_trial
        result = {"trial": best.number, "out": str(_folder(config, best.number)), "metric": metric}
        result |= {"value": best.user_attrs["value"], "options": best.params}
        with writing(out):
            (out / "best.json").write_text(result_as_json(result))
    return result


def _metric(config: TrainConfig) -> str:
    """The metric of --train.keep-best, or the one that a training would choose."""
    metric = keep_best_of(config, EventLog(config.data))
    if metric == LAST:
        raise ConfigError(f"{config.data} has no split `valid` that can be ranked: nothing to search by")
    return metric


def _check_same(study: Any, config: TuneConfig, metric: str) -> None:
    """Refuse a study with other options, whose trials are not comparable; store those of a new one."""
    options = {**dataclasses.asdict(config.train), "data": full_name(config.train.data)}
    options = {k: v for k, v in options.items() if k not in ("out", "resume")}
    now = to_json({**options, "keep_best": metric, "search": config.search})
    before = study.user_attrs.get("options", {})
    if before == now:
        return
    if study.trials:
        other = next(name for name in now if before.get(name) != now[name])
        raise ConfigError(
            f"{config.train.out} has a search with another {other}: {before.get(other)}, now "
            f"{now[other]}; give another --train.out"
        )
    study.set_user_attr("options", now)


def _reached(config: TuneConfig, trial: Any, metric: str) -> float | UserError:
    """The metric of a trial's best step; or the error that ended it: its options are not compatible, or
    its loss was not finite."""
    folder = _folder(config, trial.number)
    shutil.rmtree(folder, ignore_errors=True)
    base = dataclasses.replace(config.train, out=folder, keep_best=metric, resume=False)
    chosen: dict[str, Any] = {}
    for name, values in map(space_of, config.search):
        if isinstance(values, list):
            chosen[name] = trial.suggest_categorical(name, values)
        elif isinstance(values[0], int):
            chosen[name] = trial.suggest_int(name, *values, log=values[0] > 0)
        else:
            chosen[name] = trial.suggest_float(name, *values, log=values[0] > 0)
    try:
        for name, value in chosen.items():
            base = with_option(base, name, value)
        return train(base)[f"valid_{metric}"]
    except (ConfigError, DivergedError) as error:
        return error


def _folder(config: TuneConfig, number: int) -> Path:
    return config.train.out / f"trial-{number}"


def main(config: Annotated[TuneConfig, tyro.conf.arg(name="")]) -> None:
    """The command; its help is the top of this file."""
    print(result_as_json(tune(config)))
    dist.destroy_process_group()


main.__doc__ = __doc__
