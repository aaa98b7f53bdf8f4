"""What a run measured on the split `valid`, and which of its steps was best; RUN/validations.json."""

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
"""In place of a metric's name: the last checkpoint counts, whatever was measured."""
VALIDATIONS_FILE = "validations.json"
Fitted = Mapping[str, Sequence[float]]
"""Scale and shift of the logits, by the name of the task."""
_SMALLER_IS_BETTER = ("ne", "mae", "rmse")
_PREFERRED = ("ranked_gauc", "ranked_correlation", "gauc_exposed", "gauc", "correlation", "ne", "mae")


@dataclass(frozen=True)
class Validation:
    """One of a file's: the step, what was measured and what was fitted; JSON has no NaN, so the GAUC of
    no request that has one is None."""

    step: int
    metrics: dict[str, float | None]
    calibration: dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class ValidationsFile:
    """What RUN/validations.json holds."""

    metric: str = LAST
    best: int | None = None
    validations: tuple[Validation, ...] = ()


def read_validations(folder: Path) -> ValidationsFile:
    """The file of a run; with nothing in it where there is none, so that the last step counts.

    Args:
        folder: the run's.

    Raises:
        CheckpointError: it is damaged; the message says in what.

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
            f"{file}: not what a training writes ({error}); without that file the last step counts, "
            "uncalibrated"
        ) from error


@dataclass
class Validations:
    """The numbers of each validation of a run, by step, and the best of them by one metric.

    Args:
        folder: the run's, in which they are kept.
        metric: name of the metric that decides, as in ``flat``; LAST if the last step counts.
        by_step: what was measured.
        fitted: the calibration that was fitted, see ``fit_tasks``, where one was.

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
        """Those that were kept, up to the step ``last``: a run that goes on makes the others again.
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
        """Keep them, whole also where this is killed; of one rank.

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
        """The step that counts: the last of those with the best value, which was trained longest; None
        if nothing was measured or the last step counts."""
        if self.metric == LAST or not self.by_step:
            return None
        return max(self.by_step, key=lambda step: (self._gain(step), step))

    @property
    def without_gain(self) -> int:
        """Validations since the first with the best value."""
        if self.metric == LAST or not self.by_step:
            return 0
        first = max(self.by_step, key=lambda step: (self._gain(step), -step))
        return sum(step > first for step in self.by_step)

    def _gain(self, step: int) -> float:
        return gain(self.metric, self.by_step[step].get(self.metric, math.nan))


def in_use(folder: Path) -> tuple[int | None, dict[int, Fitted]]:
    """The step of a run that counts, None if it is the last, and the calibrations by step. Called by all
    ranks.

    Args:
        folder: the run's.

    Raises:
        CheckpointError: what was kept of them is damaged.

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
    """That of a step: where it was not measured, the one that was fitted before the first step, which a
    run has that goes on from another.

    Args:
        fitted: by step, as ``in_use`` gives them.
        step: of a checkpoint.

    Example:
        >>> from ifa_torchrec.training.validations import calibration_of
        >>> calibration_of({0: {"click": (1.0, 0.1)}}, step=500)
        {'click': (1.0, 0.1)}
    """
    return fitted.get(step, fitted.get(0, {}))


def flat(metrics: dict[str, Any], tasks: int) -> dict[str, float]:
    """``measure``'s numbers by one name each: of several tasks, with the task's before the metric's.

    Args:
        metrics: from ``measure``, of all candidates together.
        tasks: how many tasks the log has.

    Example:
        >>> from ifa_torchrec.training.validations import flat
        >>> flat({"click": {"gauc": 0.7}, "watch": {"mae": 3.0}}, tasks=2)
        {'click_gauc': 0.7, 'watch_mae': 3.0}
    """
    if tasks == 1:
        return metrics
    return {f"{task}_{name}": v for task, of_task in metrics.items() for name, v in of_task.items()}


def gain(name: str, value: float) -> float:
    """A metric's value, so that more is better; what cannot be measured is worst.

    Example:
        >>> from ifa_torchrec.training.validations import gain
        >>> gain("gauc", 0.7), gain("click_ne", 0.9), gain("ne", float("nan"))
        (0.7, -0.9, -inf)
        >>> gain("calibration", 0.5) == gain("calibration", 2.0) < gain("calibration", 1.1)
        True
    """
    if base_name(name) == "calibration":  # 1 is best, and half is as bad as twice
        value = -abs(math.log(value)) if value > 0 else math.nan
    elif base_name(name) in _SMALLER_IS_BETTER:
        value = -value
    return -math.inf if math.isnan(value) else value


def base_name(name: str) -> str:
    """The metric of a name: without a task's before it and a tag's behind it.

    Example:
        >>> from ifa_torchrec.training.validations import base_name
        >>> [base_name(name) for name in ("gauc", "watch_mae", "gauc_popular", "click_ne")]
        ['gauc', 'mae', 'gauc', 'ne']
    """
    known = ("gauc", "auc", "ndcg@10", "recall@10", "correlation", "calibration", *_SMALLER_IS_BETTER)
    return next((part for part in reversed(name.split("_")) if part in known), name)


def check_metric(name: str | None, dataset: RankingDataset, tasks: tuple[Task, ...]) -> str:
    """A metric that the split can be judged by.

    Args:
        name: the one that is wanted; None for the order within the requests by the score that ranks, of
            the exposed where some are not, or where no request can be ranked for the error of the first
            task that ranks.
        dataset: the split.
        tasks: the model's.

    Returns:
        The metric's name, as in ``flat``.

    Raises:
        ConfigError: there is no such metric, or the split has not what it is measured by.
    """
    candidates = len(dataset.requests["candidates"])
    # of a model that says 0 of everything: NaN where the labels leave nothing to measure
    metrics = flat(measure(dataset, np.zeros((candidates, len(tasks)), np.float32), tasks), len(tasks))
    there = [n for n, v in metrics.items() if n != "requests_ranked" and not math.isnan(v)]
    there = [n for n in there if not n.endswith("_requests_ranked")]
    if name is None:
        first = next((task.name for task in tasks if task.rank), tasks[0].name)
        prefix = f"{first}_" if len(tasks) > 1 else ""
        wanted = [f"{prefix}{metric}" for metric in _PREFERRED]
        return next((metric for metric in wanted if metric in there), LAST)
    if name not in there:
        raise ConfigError(f"--keep-best {name}: not measured on the split `valid`; there are {there}")
    return name
