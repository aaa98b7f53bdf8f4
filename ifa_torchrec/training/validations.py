"""A run's metrics on the split `valid`, and its best step; RUN/validations.json."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ifa_torchrec.data import RankingDataset
from ifa_torchrec.distributed import CheckpointError, checkpoint
from ifa_torchrec.errors import ConfigError
from ifa_torchrec.modules import Task
from ifa_torchrec.training.options import from_json, write_whole
from ifa_torchrec.training.scoring import measure

LAST = "last"
"""In place of a metric's name: use the last checkpoint, whatever its metrics."""
VALIDATIONS_FILE = "validations.json"
Fitted = Mapping[str, Sequence[float]]
"""Scale and shift of the logits, by task name."""
_SMALLER_IS_BETTER = ("ne", "mae", "rmse")
_PREFERRED = (
    *("ranked_gauc_exposed", "ranked_gauc", "ranked_correlation"),
    *("gauc_exposed", "gauc", "correlation", "ne", "mae"),
)


@dataclass(frozen=True)
class Validation:
    """One validation in the file: its step, metrics and fitted calibration. JSON has no NaN: a metric
    that cannot be measured is None."""

    step: int
    metrics: dict[str, float | None]
    calibration: dict[str, tuple[float, ...]]

    def __post_init__(self) -> None:
        for task, pair in self.calibration.items():
            if len(pair) != 2 or not (0 < pair[0] < math.inf and math.isfinite(pair[1])):
                raise ConfigError(f"calibration of {task!r} must be a scale > 0 and a shift, got {pair}")


@dataclass(frozen=True)
class ValidationsFile:
    """The content of RUN/validations.json."""

    metric: str = LAST
    best: int | None = None
    validations: tuple[Validation, ...] = ()

    def __post_init__(self) -> None:
        steps = [validation.step for validation in self.validations]
        if self.best is not None and self.best not in steps:
            raise ConfigError(f"best must be one of the validated steps {steps}, got {self.best}")


def read_validations(folder: Path) -> ValidationsFile:
    """Read a run's file; without one the content is empty, so that the last step is used.

    Args:
        folder: the run's folder.

    Raises:
        CheckpointError: the file is damaged; the message says how.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from ifa_torchrec.training.validations import read_validations
        >>> read_validations(Path(tempfile.mkdtemp()))
        ValidationsFile(metric='last', best=None, validations=())
    """
    file = folder / VALIDATIONS_FILE
    try:
        return from_json(ValidationsFile, json.loads(file.read_text()), "")
    except FileNotFoundError:
        return ValidationsFile()
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file}: not what a training writes ({error}); delete it to use the last step, uncalibrated"
        ) from error


@dataclass
class Validations:
    """The metrics of each validation of a run, by step, and the best of them by one metric.

    Args:
        folder: the run's folder, in which they are stored.
        metric: name of the deciding metric, as in ``flat``; LAST to use the last step.
        by_step: the metrics by step.
        fitted: the fitted calibrations by step, see ``fit_tasks``.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from ifa_torchrec.distributed import init_process_group
        >>> from ifa_torchrec.training.validations import Validations
        >>> _ = init_process_group()
        >>> measured = {10: {"ne": 0.9}, 20: {"ne": 0.7}, 30: {"ne": 0.8}}
        >>> validations = Validations(Path(tempfile.mkdtemp()), "ne", measured)
        >>> validations.best, validations.without_gain
        (20, 1)
        >>> validations.write()
        >>> Validations.read(validations.folder, "ne", last=10).by_step
        {10: {'ne': 0.9}}
    """

    folder: Path
    metric: str
    by_step: dict[int, dict[str, float]] = field(default_factory=dict[int, dict[str, float]])
    fitted: dict[int, Fitted] = field(default_factory=dict[int, Fitted])

    @classmethod
    def read(cls, folder: Path, metric: str, last: int) -> Validations:
        """Read the stored validations up to step ``last``: a resumed run makes the later ones again.
        Called by all ranks.

        Raises:
            CheckpointError: the file is damaged.
        """
        content = checkpoint.on_rank_0(lambda: read_validations(folder))
        kept = [v for v in content.validations if v.step <= last]
        metrics = {
            v.step: {name: math.nan if of is None else of for name, of in v.metrics.items()}
            for v in kept
        }
        return cls(folder, metric, metrics, {v.step: v.calibration for v in kept})

    def write(self) -> None:
        """Store them atomically; called by one rank.

        Raises:
            WriteError: the folder cannot be written.
        """
        kept = [
            Validation(
                step,
                {name: None if math.isnan(of) else float(of) for name, of in metrics.items()},
                {task: tuple(of) for task, of in self.fitted.get(step, {}).items()},
            )
            for step, metrics in self.by_step.items()
        ]
        content = asdict(ValidationsFile(self.metric, self.best, tuple(kept)))
        write_whole(self.folder / VALIDATIONS_FILE, json.dumps(content, indent=2, allow_nan=False))

    @property
    def best(self) -> int | None:
        """The step to use: of those with the best value the last, which was trained longest; None to use
        the last step, also if nothing was measured."""
        if self.metric == LAST or not self.by_step:
            return None
        return max(self.by_step, key=lambda step: (self._gain(step), step))

    @property
    def without_gain(self) -> int:
        """Number of validations since the first with the best value."""
        if self.metric == LAST or not self.by_step:
            return 0
        first = max(self.by_step, key=lambda step: (self._gain(step), -step))
        return sum(step > first for step in self.by_step)

    def _gain(self, step: int) -> float:
        return gain(self.metric, self.by_step[step].get(self.metric, math.nan))


def in_use(folder: Path) -> tuple[int | None, dict[int, Fitted]]:
    """The step of a run to use, None for the last, and the calibrations by step. Called by all ranks.

    Args:
        folder: the run's folder.

    Raises:
        CheckpointError: validations.json is damaged.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from ifa_torchrec.distributed import init_process_group
        >>> from ifa_torchrec.training.validations import in_use
        >>> _ = init_process_group()
        >>> in_use(Path(tempfile.mkdtemp()))
        (None, {})
    """
    kept = checkpoint.on_rank_0(lambda: read_validations(folder))
    return kept.best, {v.step: v.calibration for v in kept.validations}


def calibration_of(fitted: Mapping[int, Fitted], step: int) -> Fitted:
    """The calibration of a step. A step that was not validated has the one fitted before the first step,
    which a run has if it continues another.

    Args:
        fitted: calibrations by step, from ``in_use``.
        step: a checkpoint's step.

    Example:
        >>> from ifa_torchrec.training.validations import calibration_of
        >>> calibration_of({0: {"click": (1.0, 0.1)}}, step=500)
        {'click': (1.0, 0.1)}
    """
    return fitted.get(step, fitted.get(0, {}))


def flat(metrics: dict[str, Any], tasks: int) -> dict[str, float]:
    """``measure``'s metrics in one dict; with several tasks, their names are TASK_METRIC.

    Args:
        metrics: from ``measure``, of all candidates together.
        tasks: the log's number of tasks.

    Example:
        >>> from ifa_torchrec.training.validations import flat
        >>> flat({"click": {"gauc": 0.7}, "watch": {"mae": 3.0}}, tasks=2)
        {'click_gauc': 0.7, 'watch_mae': 3.0}
    """
    if tasks == 1:
        return metrics
    return {f"{task}_{name}": v for task, of_task in metrics.items() for name, v in of_task.items()}


def gain(name: str, value: float) -> float:
    """A metric's value, turned so that more is better; NaN is worst.

    Example:
        >>> from ifa_torchrec.training.validations import gain
        >>> gain("gauc", 0.7), gain("click_ne", 0.9), gain("ne", float("nan"))
        (0.7, -0.9, -inf)
        >>> gain("calibration", 0.5) == gain("calibration", 2.0) < gain("calibration", 1.1)
        True
    """
    if base_name(name) == "calibration":  # 1 is best; 0.5 is as bad as 2
        value = -abs(math.log(value)) if value > 0 else math.nan
    elif base_name(name) in _SMALLER_IS_BETTER:
        value = -value
    return -math.inf if math.isnan(value) else value


def base_name(name: str) -> str:
    """The metric in a name, without the task's name before it and the tag's after it.

    Example:
        >>> from ifa_torchrec.training.validations import base_name
        >>> [base_name(name) for name in ("gauc", "watch_mae", "gauc_popular", "click_ne")]
        ['gauc', 'mae', 'gauc', 'ne']
    """
    known = ("gauc", "auc", "ndcg@10", "recall@10", "correlation", "calibration", *_SMALLER_IS_BETTER)
    return next((part for part in reversed(name.split("_")) if part in known), name)


def check_metric(name: str | None, dataset: RankingDataset, tasks: tuple[Task, ...]) -> str:
    """Check or choose the metric that a split is judged by.

    Args:
        name: the metric; None for the order within requests by the ranking score (over exposed
            candidates, if some are not), or if no request can be ranked, the error of the first task
            that ranks.
        dataset: the split.
        tasks: the model's tasks.

    Returns:
        The metric's name, as in ``flat``.

    Raises:
        ConfigError: there is no such metric, or it cannot be measured on the split.
    """
    candidates = len(dataset.requests["candidates"])
    # with all logits 0: metrics that the labels do not allow are NaN
    metrics = flat(measure(dataset, np.zeros((candidates, len(tasks)), np.float32), tasks), len(tasks))
    there = [n for n, v in metrics.items() if n != "requests_ranked" and not math.isnan(v)]
    there = [n for n in there if not n.endswith("_requests_ranked")]
    if name is None:
        first = next((task.name for task in tasks if task.rank), tasks[0].name)
        prefix = f"{first}_" if len(tasks) > 1 else ""
        wanted = [f"{prefix}{metric}" for metric in _PREFERRED]
        return next((metric for metric in wanted if metric in there), LAST)
    if name not in there:
        raise ConfigError(
            f"--keep-best {name}: not measured on the split `valid`; the metrics are {there}"
        )
    return name
