"""Task: what a model predicts for a candidate, and how its logits map to the units of the labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Literal

import torch
from torch import Tensor

from ifa_torchrec.batch import Scale
from ifa_torchrec.errors import ConfigError


@dataclass(frozen=True)
class Task:
    """One label of a candidate.

    Args:
        name: of the label.
        kind: "binary" for a label 0 or 1, whose logit is the log odds; "regression" for a number, whose
            logit is the standardised number.
        weight: weight of the task in the loss, >= 0; with 0 the task is not trained.
        rank: weight of the task in the ranking score, of either sign (see ``ranking_score``). If no task
            has one, only the first task ranks.
        scale: how a regression's labels are standardised.

    Raises:
        ConfigError: the kind is unknown, or a weight is negative or not finite.

    Example:
        >>> from ifa_torchrec.batch import Scale
        >>> from ifa_torchrec.modules import Task
        >>> Task("watch", "regression", weight=0.5, scale=Scale(3.0, 1.5, log=True)).rank
        0.0
    """

    name: str
    kind: Literal["binary", "regression"] = "binary"
    weight: float = 1.0
    rank: float = 0.0
    scale: Scale = field(default_factory=Scale)

    def __post_init__(self) -> None:
        if self.kind not in ("binary", "regression"):
            raise ConfigError(
                f"task {self.name!r}: kind must be 'binary' or 'regression', got {self.kind!r}"
            )
        if not 0 <= self.weight < math.inf:
            raise ConfigError(
                f"task {self.name!r}: its weight in the loss must be finite and at least 0, got "
                f"{self.weight}"
            )
        if not math.isfinite(self.rank):
            raise ConfigError(
                f"task {self.name!r}: its weight in the ranking must be finite, got {self.rank}"
            )

    def standardised(self, labels: Tensor) -> Tensor:
        """The logits that a regression should predict for labels in the log's unit; floating point, any
        shape.

        Example:
            >>> import torch
            >>> from ifa_torchrec.batch import Scale
            >>> from ifa_torchrec.modules import Task
            >>> Task("stars", "regression", scale=Scale(3.0, 2.0)).standardised(torch.tensor([5.0]))
            tensor([1.])
        """
        numbers = labels.log1p() if self.scale.log else labels
        return (numbers - self.scale.mean) / self.scale.deviation


def binary_tasks(count: int) -> tuple[Task, ...]:
    """The tasks of a model for which only their number is configured: binary, and the first one ranks.

    Example:
        >>> from ifa_torchrec.modules.tasks import binary_tasks
        >>> [task.name for task in binary_tasks(1) + binary_tasks(2)]
        ['label', 'label_0', 'label_1']
    """
    return (Task("label"),) if count == 1 else tuple(Task(f"label_{t}") for t in range(count))


def check_tasks(tasks: Sequence[Task]) -> None:
    """Raise a ConfigError for tasks that a model cannot be trained on.

    Raises:
        ConfigError: there are none, two have the same name, or all have weight 0 in the loss.

    Example:
        >>> from ifa_torchrec.modules import Task
        >>> from ifa_torchrec.modules.tasks import check_tasks
        >>> check_tasks([Task("click"), Task("buy", weight=0.0)])
    """
    names = [task.name for task in tasks]
    if not names:
        raise ConfigError("tasks: there must be at least one")
    if len(set(names)) < len(names):
        raise ConfigError(f"tasks: two of {names} have the same name; rename one")
    if not any(task.weight for task in tasks):
        raise ConfigError(f"tasks: all of {names} have weight 0 in the loss; set one above 0")


def predictions(logits: Tensor, tasks: Sequence[Task]) -> Tensor:
    """Convert logits to the labels' own units.

    For a regression whose scale takes logarithms, the result is exp of the mean logarithm minus 1. It is
    below the mean of scattered numbers, and may be negative, but above -1.

    Args:
        logits: [M, T] floating point.
        tasks: T of them.

    Returns:
        [M, T], at least float32: for a binary task the probability of a 1, for a regression the number
        in the unit of the log.

    Raises:
        ValueError: there are not T tasks.

    Example:
        >>> import torch
        >>> from ifa_torchrec.batch import Scale
        >>> from ifa_torchrec.modules import Task, predictions
        >>> tasks = (Task("click"), Task("watch", "regression", scale=Scale(2.0, 0.5, log=True)))
        >>> predictions(torch.zeros(1, 2), tasks).round(decimals=2)
        tensor([[0.5000, 6.3900]])
    """
    columns: list[Tensor] = []
    for task, logit in _columns(logits, tasks):
        if task.kind == "binary":
            columns.append(logit.sigmoid())
        else:
            number = task.scale.mean + task.scale.deviation * logit
            columns.append(number.expm1() if task.scale.log else number)
    return torch.stack(columns, dim=1)


def ranking_score(logits: Tensor, tasks: Sequence[Task]) -> Tensor:
    """The score by which candidates are ranked, higher is better; also the input of ``generate_set``.

    If one task ranks, it is that task's logit times its weight. If several rank, it is the sum of
    rank times the probability for binary tasks, and rank times the standardised prediction for
    regressions, so that a regression's weight does not depend on its unit.

    Args:
        logits: [M, T] floating point.
        tasks: T of them.

    Returns:
        [M], at least float32.

    Raises:
        ValueError: there are not T tasks.

    Example:
        >>> import torch
        >>> from ifa_torchrec.modules import Task, ranking_score
        >>> logits = torch.tensor([[2.0, 0.0], [-2.0, 3.0]])
        >>> ranking_score(logits, (Task("click"), Task("buy"))).tolist()  # only the first
        [2.0, -2.0]
        >>> ranking_score(logits, (Task("click", rank=1.0), Task("buy", rank=5.0))).argmax().item()
        1
    """
    ranking = ranking_weights(tasks)
    columns = [(task, logit) for task, logit in _columns(logits, tasks) if task.name in ranking]
    alone = len(ranking) == 1  # then no sigmoid, which saturates for large logits
    parts = [
        ranking[task.name] * (logit if alone or task.kind == "regression" else logit.sigmoid())
        for task, logit in columns
    ]
    return reduce(torch.add, parts)


def ranking_weights(tasks: Sequence[Task]) -> dict[str, float]:
    """The tasks that rank and their weights, by name: those with a rank, or else the first task.

    Example:
        >>> from ifa_torchrec.modules import Task
        >>> from ifa_torchrec.modules.tasks import ranking_weights
        >>> ranking_weights([Task("click"), Task("buy")])
        {'click': 1.0}
        >>> ranking_weights([Task("click"), Task("buy", rank=2.0)])
        {'buy': 2.0}
    """
    return {task.name: task.rank for task in tasks if task.rank} or {tasks[0].name: 1.0}


def _columns(logits: Tensor, tasks: Sequence[Task]) -> list[tuple[Task, Tensor]]:
    """Each task with its logits [M], at least float32."""
    if logits.dim() != 2 or logits.shape[1] != len(tasks) or not tasks:
        names = [task.name for task in tasks]
        raise ValueError(
            f"logits must be [M, {len(tasks)}] for the tasks {names}, got {list(logits.shape)}"
        )
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return list(zip(tasks, logits.unbind(1), strict=True))
