"""Calibration: a temperature and a bias for each binary task, fitted on the split `valid`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ifa_torchrec.data import RankingDataset
from ifa_torchrec.data.schema import EXPOSED
from ifa_torchrec.models import DLRM_IFA
from ifa_torchrec.models.calibration import calibrate
from ifa_torchrec.modules import CandidateSetLossConfig, Task
from ifa_torchrec.training.metrics import Total, local_sum
from ifa_torchrec.training.own import OwnRequests, own_requests

_STEPS = 100  # limit for LBFGS, which needs about ten


def fit(
    logits: Tensor, labels: Tensor, weights: Tensor, total: Total = local_sum
) -> tuple[float, float]:
    """The scale and the shift with which logits predict best: Platt scaling.

    Minimises the log loss, with a prior on the log scale that weighs as much as one candidate, so that
    separable labels do not give an infinite scale. The shift has no prior, so the mean prediction equals
    the mean label.

    Args:
        logits: [M].
        labels: [M] 0 or 1.
        weights: [M], the weight of each candidate.
        total: sums over ranks, if each has candidates of its own.

    Returns:
        The scale, which is positive, and the shift; 1 and 0 if all labels are equal.

    Example:
        >>> import torch
        >>> from ifa_torchrec.training.calibrate import fit
        >>> logits = torch.linspace(-2, 2, 1000)
        >>> labels = (torch.rand(1000, generator=torch.manual_seed(0)) < (logits / 2).sigmoid()).float()
        >>> scale, shift = fit(logits, labels, torch.ones(1000))
        >>> round(scale, 1), abs(shift) < 0.2
        (0.5, True)
    """
    kept = weights > 0
    z, y, w = (values[kept].double() for values in (logits, labels, weights))
    figures = np.array([float(y.sum()), len(y), float(w.sum())])
    positives, count, weight = total(figures).tolist()
    if not 0 < positives < count:
        return 1.0, 0.0
    moved = torch.zeros(2, dtype=torch.float64, requires_grad=True)  # the scale's logarithm, the shift
    optimizer = torch.optim.LBFGS([moved], max_iter=_STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        each = F.binary_cross_entropy_with_logits(moved[0].exp() * z + moved[1], y, reduction="none")
        mine = (w * each).sum()
        (slope,) = torch.autograd.grad(mine, moved)
        value, *slopes = torch.from_numpy(total(np.array([float(mine.detach()), *slope.tolist()])))
        log_scale = moved.detach()[0]
        moved.grad = (torch.stack(slopes) + torch.stack([2 * log_scale, log_scale * 0])) / weight
        return (value + log_scale.square()) / weight

    optimizer.step(loss)
    log_scale, shift = moved.tolist()
    return float(np.exp(log_scale)), shift


def fit_tasks(
    split: RankingDataset | OwnRequests,
    scores: np.ndarray,
    tasks: Sequence[Task],
    loss: CandidateSetLossConfig,
) -> dict[str, tuple[float, float]]:
    """``fit`` for each binary task on a split; candidates weigh as in the pointwise term of the loss.

    Args:
        split: the split, or this rank's requests of it.
        scores: [M, T], the logits of ``tasks``.
        tasks: the model's tasks.
        loss: the loss of the training, which sets the weight of unexposed candidates.
    """
    own = own_requests(split)
    exposed = torch.from_numpy(own.column(EXPOSED))
    weights = torch.where(exposed, 1.0, loss.unexposed if loss.pointwise_unexposed else 0.0)
    return {
        task.name: fit(
            torch.from_numpy(logits.copy()),
            torch.from_numpy(own.column(task.name)),
            weights,
            own.total,
        )
        for task, logits in zip(tasks, scores.T, strict=True)
        if task.kind == "binary"
    }


def apply(model: DLRM_IFA, fitted: Mapping[str, Sequence[float]]) -> None:
    """Calibrate a model with the result of ``fit_tasks``; tasks that are not in it stay unchanged.

    Args:
        model: not calibrated yet.
        fitted: scale and shift by task name.
    """
    pairs = torch.tensor([list(fitted.get(task.name, (1.0, 0.0))) for task in model.config.tasks])
    calibrate(model, pairs[:, 0], pairs[:, 1])


def calibrated(
    scores: np.ndarray, tasks: Sequence[Task], fitted: Mapping[str, Sequence[float]]
) -> np.ndarray:
    """The logits of a model after calibration with the result of ``fit_tasks``.

    Args:
        scores: [M, T], the model's logits before calibration.
        tasks: the model's tasks.
        fitted: scale and shift by task name.

    Example:
        >>> import numpy as np
        >>> from ifa_torchrec.modules import Task
        >>> from ifa_torchrec.training.calibrate import calibrated
        >>> calibrated(np.array([[3.0]], np.float32), [Task("click")], {"click": (2.0, -1.0)}).tolist()
        [[5.0]]
    """
    pairs = np.array([fitted.get(task.name, (1.0, 0.0)) for task in tasks], scores.dtype)
    return scores * pairs[:, 0] + pairs[:, 1]
