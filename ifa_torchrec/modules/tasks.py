"""Task: what a model predicts of a candidate, and what its logits say in the units of the labels."""

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
        name: of the labels.
        kind: "binary", of a label 0 or 1, whose logit is the log odds; "regression", of a number, whose
            logit is the standardised number.
        weight: >= 0, of the task in the loss; 0 to predict it untrained, and so to leave it out.
        rank: weight of the task in the score that ranks, of either sign (see ``ranking_score``). Where
            no task has one, the first alone ranks.
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
            raise ConfigError(f"task {self.name!r}: kind {self.kind!r} is not 'binary' or 'regression'")
        if not 0 <= self.weight < math.inf:
            raise ConfigError(
                f"task {self.name!r}: its weight in the loss must be a number of at least 0, got "
                f"{self.weight}"
            )
        if not math.isfinite(self.rank):
            raise ConfigError(
                f"task {self.name!r}: its weight in the ranking must be finite, got {self.rank}"
            )

    def standardised(self, labels: Tensor) -> Tensor:
        """What a regression's logit should be, of labels in the log's unit; any shape, floating point.

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
    """Tasks of a model that was given their number alone: binary ones, the first of which ranks.

    Example:
        >>> from ifa_torchrec.modules.tasks import binary_tasks
        >>> [task.name for task in binary_tasks(1) + binary_tasks(2)]
        ['label', 'label_0', 'label_1']
    """
    return (Task("label"),) if count == 1 else tuple(Task(f"label_{t}") for t in range(count))


def check_tasks(tasks: Sequence[Task]) -> None:
    """Refuse tasks that a model cannot be trained on.

    Raises:
        ConfigError: there is none, two have one name, or all weigh 0 in the loss.

    Example:
        >>> from ifa_torchrec.modules import Task
        >>> from ifa_torchrec.modules.tasks import check_tasks
        >>> check_tasks([Task("click"), Task("buy", weight=0.0)])
    """
    names = [task.name for task in tasks]
    if not names:
        raise ConfigError("tasks: there is none; give at least one")
    if len(set(names)) < len(names):
        raise ConfigError(f"tasks: two of {names} have one name; rename one")
    if not any(task.weight for task in tasks):
        raise ConfigError(f"tasks: all of {names} have weight 0 in the loss; give one of them more")


def predictions(logits: Tensor, tasks: Sequence[Task]) -> Tensor:
    """What logits say in the labels' own units.

    Of a regression whose scale takes logarithms it is the mean logarithm brought back, which lies below
    the mean of numbers that scatter, and can come out below 0 by less than 1.

    Args:
        logits: [M, T] floating point.
        tasks: T of them.

    Returns:
        [M, T], float32 at least: of a binary task the probability of a 1, of a regression the number in
        the unit of the log.

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
    """What candidates are ranked by, higher is better; also what ``generate_set`` takes.

    With one task that ranks it is that task's logit times its weight. With several it is the sum of
    rank times the probability of a binary task, and rank times the standardised prediction of a
    regression, so that a regression's weight does not depend on its unit.

    Args:
        logits: [M, T] floating point.
        tasks: T of them.

    Returns:
        [M], float32 at least.

    Raises:
        ValueError: there are not T tasks.

    Example:
        >>> import torch
        >>> from ifa_torchrec.modules import Task, ranking_score
        >>> logits = torch.tensor([[2.0, 0.0], [-2.0, 3.0]])
        >>> ranking_score(logits, (Task("click"), Task("buy"))).tolist()  # the first alone
        [2.0, -2.0]
        >>> ranking_score(logits, (Task("click", rank=1.0), Task("buy", rank=5.0))).argmax().item()
        1
    """
    ranking = ranking_weights(tasks)
    columns = [(task, logit) for task, logit in _columns(logits, tasks) if task.name in ranking]
    alone = len(ranking) == 1  # then no sigmoid, in which large logits are all alike
    parts = [
        ranking[task.name] * (logit if alone or task.kind == "regression" else logit.sigmoid())
        for task, logit in columns
    ]
    return reduce(torch.add, parts)


def ranking_weights(tasks: Sequence[Task]) -> dict[str, float]:
    """The tasks that rank, by name, each with its weight: those that have one, or the first.

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
    """Each task with its logits [M], float32 at least."""
    if logits.dim() != 2 or logits.shape[1] != len(tasks) or not tasks:
        names = [task.name for task in tasks]
        raise ValueError(
            f"logits must be [M, {len(tasks)}] for the tasks {names}, got {list(logits.shape)}"
        )
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return list(zip(tasks, logits.unbind(1), strict=True))
