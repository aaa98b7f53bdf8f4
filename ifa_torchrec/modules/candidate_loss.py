"""CandidateSetLoss: training on exposed candidates, consistent with ranking all of them.

The paper's formula was not available (only its abstract and introduction), so the terms are our own
construction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from ifa_torchrec.errors import ConfigError
from ifa_torchrec.modules.tasks import Task, binary_tasks, check_tasks
from ifa_torchrec.ops.checks import check_offsets
from ifa_torchrec.ops.jagged import request_of_row

LISTWISE = 0.5
"""Default ratio of the listwise term's weight to the pointwise term's."""


@dataclass(frozen=True)
class CandidateSetLossConfig:
    """Weights of the terms of CandidateSetLoss.

    Args:
        pointwise: weight of the binary cross entropy, and of the error of regression tasks.
        listwise: weight of the softmax within a request, for binary tasks; None for half of
            ``pointwise``.
        consistency: weight of the divergence between the scores with and without the unexposed
            candidates.
        unexposed: how much an unexposed candidate counts, 0 to 1, with its missing label taken as 0: in
            the softmax's denominator and, with ``pointwise_unexposed``, in the cross entropy. With 0
            only labels of exposed candidates count, so the model does not learn what was shown
            (docs/exposure.md). Use 1 for a log whose unexposed candidates have true labels. It has no
            effect on a log of exposed candidates only.
        pointwise_unexposed: whether the cross entropy includes unexposed candidates at all.
        regression: error of a regression task for a standardised residual d: "huber", d^2 / 2 up to
            |d| = 1 and |d| - 1 / 2 beyond, which limits the influence of outliers; "squared", d^2 / 2.

    Raises:
        ConfigError: a weight is negative, all weights are 0, or the error is unknown.

    Example:
        >>> from ifa_torchrec.modules import CandidateSetLossConfig
        >>> CandidateSetLossConfig().listwise_weight, CandidateSetLossConfig(listwise=0.2).pointwise
        (0.5, 1.0)
    """

    pointwise: float = 1.0
    listwise: float | None = None
    consistency: float = 0.0
    unexposed: float = 0.0
    pointwise_unexposed: bool = True
    regression: Literal["huber", "squared"] = "huber"

    def __post_init__(self) -> None:
        if self.regression not in ("huber", "squared"):
            raise ConfigError(
                f"CandidateSetLossConfig: regression must be 'huber' or 'squared', got "
                f"{self.regression!r}"
            )
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "regression" and value is not None and not value >= 0:
                raise ConfigError(
                    f"CandidateSetLossConfig: {field.name} must be at least 0, got {value}"
                )
        if self.unexposed > 1:
            raise ConfigError(
                f"CandidateSetLossConfig: unexposed must be at most 1, got {self.unexposed}"
            )
        if self.pointwise == self.listwise_weight == self.consistency == 0:
            raise ConfigError("CandidateSetLossConfig: pointwise, listwise and consistency are all 0")

    @property
    def listwise_weight(self) -> float:
        """``listwise``, or its default. The term is 0 if no request has both a 0 and a 1 of a binary
        task."""
        return LISTWISE * self.pointwise if self.listwise is None else self.listwise


class CandidateSetLoss(nn.Module):
    """A loss over whole candidate sets, for calibration, ranking and consistency with inference.

    Let s be the logits of a request and task, u_c = 1 for an exposed candidate and ``unexposed`` for any
    other, and P the request's positives and N its negatives with u_c > 0:

    - pointwise, for calibration: binary cross entropy, the mean over candidates weighted by u_c
      (only over the exposed by default, and with pointwise_unexposed=False).
    - listwise, for the order: the mean over p in P of -log(e^s_p / (e^s_p + sum_{c in N} u_c e^s_c)).
      Labels of unexposed candidates are missing, not 0: by default these are not in the denominator.
      Positives do not compete with each other. Mean over the requests that have both positives and
      negatives; the others have no order to learn and are left out.
    - consistency, against a train-inference gap: let p and p' be the softmax over the logits of a
      request's exposed candidates, scored with and without the unexposed candidates in the set; the
      term is the symmetric divergence sum (p - p') (log p - log p') / 2. Training has labels of the
      exposed, inference ranks all candidates: if candidates influence each other, what ranks well in
      one set must rank well in the other. Mean over the requests with at least two exposed candidates.

    A regression task has another pointwise error (``CandidateSetLossConfig.regression``, only over
    exposed candidates: an unobserved number is not 0) and no listwise term. Its divergence is half the
    squared difference of the two standardised predictions, averaged over a request's exposed candidates
    and over the requests that have any.

    A term to which nothing in the batch contributes is 0. Each term is also averaged over tasks,
    weighted by ``Task.weight``; a task of weight 0 is ignored.
    Computed in at least float32, whatever the logits' dtype: float16 cannot count 65,520 candidates.

    Args:
        config: CandidateSetLossConfig.
        across_ranks: while training, average over the candidates and requests of all ranks of the
            default process group: the ranks' mean loss, and so their mean gradient, is then that of one
            large batch, however unevenly it is divided. All ranks must call.
        tasks: the Tasks of the logits' columns; () for binary tasks of weight 1, one per column.

    Raises:
        ConfigError: two tasks have the same name, all weights are 0, or no task has a term in the loss.

    Example:
        >>> import torch
        >>> from ifa_torchrec import CandidateSetLoss
        >>> from ifa_torchrec.modules import CandidateSetLossConfig
        >>> loss = CandidateSetLoss(CandidateSetLossConfig(pointwise=0.0, listwise=1.0))
        >>> value = loss(torch.zeros(3, 1), torch.tensor([[1.0], [0.0], [0.0]]),
        ...              exposed=torch.ones(3).bool(), offsets=torch.tensor([0, 3]))
        >>> round(value.item(), 4)  # log 3
        1.0986
    """

    def __init__(
        self,
        config: CandidateSetLossConfig | None = None,
        across_ranks: bool = False,
        tasks: Sequence[Task] = (),
    ) -> None:
        super().__init__()
        self.config = config or CandidateSetLossConfig()
        self.across_ranks = across_ranks
        self.tasks = tuple(tasks)
        if self.tasks:
            check_tasks(self.tasks)
        listed = not self.tasks or any(t.weight and t.kind == "binary" for t in self.tasks)
        if self.config.pointwise == self.config.consistency == 0 and not listed:
            raise ConfigError(
                "CandidateSetLoss: listwise is the only term, and no binary task has a weight; set "
                "pointwise above 0, or give a binary task a weight"
            )

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        exposed: Tensor,
        offsets: Tensor,
        exposed_logits: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            logits: [M, T] floating point, of the whole sets.
            labels: [M, T], 0 or 1, or for a regression task numbers in the log's unit.
            exposed: [M] bool.
            offsets: [B + 1], request b has the candidates offsets[b]:offsets[b + 1].
            exposed_logits: [E, T], logits of the E exposed candidates, scored without the unexposed;
                required for the consistency term.

        Returns:
            A scalar, float32; float64 for float64 logits.

        Raises:
            ValueError: shapes do not fit each other or the tasks, exposed is not bool, or
                exposed_logits is missing for the consistency term.
        """
        if logits.dim() != 2:
            raise ValueError(f"logits must be [M, T], got {list(logits.shape)}")
        for name, value, wanted in (
            ("labels", labels, logits.shape),
            ("exposed", exposed, logits.shape[:1]),
        ):
            if value.shape != wanted:
                raise ValueError(f"{name} must be {list(wanted)}, got {list(value.shape)}")
        if exposed.dtype != torch.bool:
            raise ValueError(f"exposed must be bool, got {exposed.dtype}")
        dtype = torch.promote_types(logits.dtype, torch.float32)
        logits, labels = logits.to(dtype), labels.to(dtype)
        check_offsets("offsets", offsets, len(logits))
        request = request_of_row(offsets, len(logits))
        config, requests = self.config, len(offsets) - 1
        tasks = self.tasks or binary_tasks(logits.shape[1])
        if len(tasks) != logits.shape[1]:
            names = [task.name for task in tasks]
            raise ValueError(
                f"logits must be [M, {len(tasks)}] for the tasks {names}, got {list(logits.shape)}"
            )
        total = logits.sum() * 0.0
        if config.pointwise:
            total = total + config.pointwise * self._pointwise(logits, labels, exposed, tasks)
        if config.listwise_weight:
            counts = torch.where(exposed, 1.0, config.unexposed).to(dtype)[:, None]
            each, weight = _listwise(logits, labels, counts, request, requests)
            listed = [task.weight if task.kind == "binary" else 0.0 for task in tasks]
            total = total + config.listwise_weight * self._mean(each, _times(weight, listed))
        if config.consistency:
            alone = _exposed_logits(exposed_logits, exposed, len(tasks)).to(dtype)
            # the number is known from exposed_logits: counting the exposed on a GPU would wait for it
            rows = exposed.nonzero_static(size=len(alone))[:, 0]
            each, weight = _consistency(logits[rows], alone, request[rows], requests, tasks)
            weight = _times(weight, [task.weight for task in tasks])
            total = total + config.consistency * self._mean(each, weight)
        return total

    def _pointwise(
        self, logits: Tensor, labels: Tensor, exposed: Tensor, tasks: Sequence[Task]
    ) -> Tensor:
        config, shown = self.config, exposed.to(logits.dtype)
        unexposed = config.unexposed if config.pointwise_unexposed else 0.0
        counts = torch.where(exposed, 1.0, unexposed).to(logits.dtype)
        each, weight = [], []
        for task, logit, label in zip(tasks, logits.unbind(1), labels.unbind(1), strict=True):
            if not task.weight:
                continue
            # a label that does not count, or was not observed, may be anything
            if task.kind == "binary":
                label = torch.where(counts > 0, label, 0.0)
                each.append(F.binary_cross_entropy_with_logits(logit, label, reduction="none"))
                weight.append(task.weight * counts)
                continue
            missed = torch.where(exposed, logit - task.standardised(label), 0.0)
            huber = F.huber_loss(missed, torch.zeros_like(missed), reduction="none")
            each.append(huber if config.regression == "huber" else missed.square() / 2)
            weight.append(task.weight * shown)
        return self._mean(torch.stack(each, dim=1), torch.stack(weight, dim=1))

    def _mean(self, values: Tensor, weight: Tensor) -> Tensor:
        """The weighted mean, over all ranks if ``across_ranks``; 0 if all weights are 0."""
        total = weight.sum()
        if self.across_ranks and self.training:
            dist.all_reduce(total)
            total = total / dist.get_world_size()
        return (values * weight).sum() / torch.where(total > 0, total, 1.0)


def _exposed_logits(given: Tensor | None, exposed: Tensor, tasks: int) -> Tensor:
    """Raise a ValueError unless there are logits for each exposed candidate; only counted on a CPU."""
    shown = int(exposed.sum()) if exposed.device.type == "cpu" else None
    if given is None or given.shape[1:] != (tasks,) or shown not in (None, len(given)):
        rows, found = "E" if shown is None else shown, None if given is None else list(given.shape)
        raise ValueError(
            f"exposed_logits must be [{rows}, {tasks}] for the consistency term, got {found}"
        )
    return given


def _listwise(
    logits: Tensor, labels: Tensor, counts: Tensor, request: Tensor, requests: int
) -> tuple[Tensor, Tensor]:
    """The listwise term of each candidate and its weight; both [M, T]."""
    counted = counts > 0
    positive, negative = counted & (labels > 0), counted & (labels <= 0)
    # without negatives the logarithm is -inf: such requests are left out below
    shifted = torch.where(negative, logits + counts.clamp(min=1e-30).log(), -math.inf)
    against = segment_logsumexp(shifted, request, requests)
    both = (against > -math.inf)[request] & positive
    each = F.softplus(torch.where(both, against[request] - logits, 0.0))
    positives = _sum(both.to(logits.dtype), request, requests)
    # the mean over a request's positives, then over the requests
    return each, both / positives.clamp(min=1)[request]


def _consistency(
    in_whole_set: Tensor, alone: Tensor, segment: Tensor, segments: int, tasks: Sequence[Task]
) -> tuple[Tensor, Tensor]:
    """The divergence between the two scores of each request's candidates, and its weight; both
    [segments, T]."""
    shown = _sum(torch.ones_like(in_whole_set[:, :1]), segment, segments)
    divergence = _divergence(in_whole_set, alone, segment, segments)
    squared = _sum((in_whole_set - alone).square() / 2, segment, segments) / shown.clamp(min=1)
    regression = [task.kind == "regression" for task in tasks]
    each = torch.stack([(squared if r else divergence)[:, t] for t, r in enumerate(regression)], dim=1)
    # the softmax over a single candidate is 1, whatever its logit
    weight = torch.cat(
        [(shown > 0 if r else shown > 1).to(in_whole_set.dtype) for r in regression], dim=1
    )
    return each, weight


def _times(weight: Tensor, factors: Sequence[float]) -> Tensor:
    """[rows, T], each column times its factor; Python numbers, which need no copy to the device."""
    return torch.stack([f * column for f, column in zip(factors, weight.unbind(1), strict=True)], dim=1)


def segment_logsumexp(values: Tensor, segment: Tensor, segments: int) -> Tensor:
    """The logarithm of the sum of exp(values) for each segment.

    Args:
        values: [rows, T]; -inf adds nothing.
        segment: [rows] int64.
        segments: S.

    Returns:
        [S, T]; -inf for an empty segment.

    Example:
        >>> import torch
        >>> from ifa_torchrec.modules.candidate_loss import segment_logsumexp
        >>> segment_logsumexp(torch.zeros(2, 1), torch.tensor([1, 1]), 2).exp().flatten().tolist()
        [0.0, 2.0]
    """
    index = segment[:, None].expand_as(values)
    start = values.new_full((segments, values.shape[1]), -math.inf)
    top = start.scatter_reduce(0, index, values.detach(), "amax")
    there = top > -math.inf
    top = torch.where(there, top, 0.0)
    total = _sum((values - top[segment]).exp(), segment, segments)
    # log(0) would be right in the forward, but spoil the gradient
    return torch.where(there, torch.where(there, total, 1.0).log() + top, -math.inf)


def _divergence(one: Tensor, other: Tensor, segment: Tensor, segments: int) -> Tensor:
    """The symmetric divergence between two softmaxes for each segment; [segments, T]."""
    log_p = one - segment_logsumexp(one, segment, segments)[segment]
    log_q = other - segment_logsumexp(other, segment, segments)[segment]
    return _sum((log_p.exp() - log_q.exp()) * (log_p - log_q) / 2, segment, segments)


def _sum(values: Tensor, segment: Tensor, segments: int) -> Tensor:
    return values.new_zeros(segments, values.shape[1]).index_add(0, segment, values)
