"""CandidateSetLoss: training on what was exposed, consistent with ranking everything.

The paper's formula was not at hand (only its abstract and introduction): the terms are our own
construction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from ifa_torchrec.errors import ConfigError
from ifa_torchrec.ops.jagged import request_of_row


@dataclass(frozen=True)
class CandidateSetLossConfig:
    """Weights of the terms of CandidateSetLoss.

    Args:
        pointwise: of the binary cross entropy.
        listwise: of the softmax within a request.
        consistency: of the divergence between the scores with and without the unexposed.
        unexposed: how much an unexposed candidate counts, 0 to 1, where its missing label is taken
            for a 0: in the softmax's denominator and, with ``pointwise_unexposed``, in the cross
            entropy.
        pointwise_unexposed: whether the cross entropy takes in the unexposed at all.

    Raises:
        ValueError: a weight is negative, or all terms are 0.

    Example:
        >>> from ifa_torchrec.modules import CandidateSetLossConfig
        >>> CandidateSetLossConfig(listwise=0.5).pointwise
        1.0
    """

    pointwise: float = 1.0
    listwise: float = 0.0
    consistency: float = 0.0
    unexposed: float = 1.0
    pointwise_unexposed: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value >= 0:
                raise ConfigError(
                    f"CandidateSetLossConfig: {field.name} must be at least 0, got {value}"
                )
        if self.unexposed > 1:
            raise ConfigError(
                f"CandidateSetLossConfig: unexposed must be at most 1, got {self.unexposed}"
            )
        if self.pointwise == self.listwise == self.consistency == 0:
            raise ConfigError("CandidateSetLossConfig: pointwise, listwise and consistency are all 0")


class CandidateSetLoss(nn.Module):
    """A loss over whole candidate sets: calibrated, ranking, and the same as at inference.

    With s the logits of a request and task, P its positives, N its negatives, u_c = 1 for an
    exposed candidate and ``unexposed`` for another:

    - pointwise, for calibration: binary cross entropy, the mean over candidates weighted by u_c
      (over the exposed alone with pointwise_unexposed=False).
    - listwise, for the order: the mean over p in P of -log(e^s_p / (e^s_p + sum_{c in N} u_c e^s_c)).
      At inference every candidate competes, so the unexposed stand in the denominator; as their
      labels are missing, not 0, they may count less. One positive does not compete with
      another. Mean over the requests that have both; a request without a positive, or of
      positives alone, has no order to learn and is left out.
    - consistency, against a train-inference gap: with p and p' the softmax over a request's exposed
      candidates of their logits with and without the unexposed beside them, the symmetric
      divergence sum (p - p') (log p - log p') / 2. Training sees labels of the exposed, inference
      ranks all: where candidates influence each other, what ranks well in the one set must in
      the other. Mean over the requests with two exposed candidates or more.

    A term that nothing in the batch takes part in is 0. Every term is the mean over the tasks too.
    Computed in float32 at least, whatever the logits' dtype: float16 cannot count 65,520 candidates.

    Args:
        config: CandidateSetLossConfig.
        across_ranks: while training, take the means over the candidates and requests of all ranks
            of the default process group: the ranks' mean loss, and so their mean gradient, is then
            that of one large batch, however unevenly they share it. All ranks must call.

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

    def __init__(self, config: CandidateSetLossConfig | None = None, across_ranks: bool = False) -> None:
        super().__init__()
        self.config = config or CandidateSetLossConfig()
        self.across_ranks = across_ranks

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
            labels: [M, T], 0 or 1.
            exposed: [M] bool.
            offsets: [B + 1], the requests' candidates.
            exposed_logits: [E, T], logits of the E exposed candidates where the unexposed were
                not there; needed for the consistency term.

        Returns:
            A scalar, float32; float64 of float64 logits.

        Raises:
            ValueError: shapes do not fit, or the consistency term lacks exposed_logits.
        """
        for name, value, wanted in (
            ("labels", labels, logits.shape),
            ("exposed", exposed, logits.shape[:1]),
        ):
            if value.shape != wanted:
                raise ValueError(f"{name} must be {list(wanted)}, got {list(value.shape)}")
        dtype = torch.promote_types(logits.dtype, torch.float32)
        logits, labels = logits.to(dtype), labels.to(dtype)
        config, request, requests = self.config, request_of_row(offsets), len(offsets) - 1
        if len(request) != len(logits):
            raise ValueError(f"offsets end at {len(request)}, but there are {len(logits)} candidates")
        total = logits.sum() * 0.0
        counts = torch.where(exposed, 1.0, config.unexposed).to(logits.dtype)[:, None]
        if config.pointwise:
            weight = counts if config.pointwise_unexposed else exposed.to(logits.dtype)[:, None]
            each = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
            total = total + config.pointwise * self._mean(each, weight.expand_as(each))
        if config.listwise:
            total = total + config.listwise * self._listwise(logits, labels, counts, request, requests)
        if config.consistency:
            if exposed_logits is None or exposed_logits.shape != (int(exposed.sum()), logits.shape[1]):
                got = None if exposed_logits is None else list(exposed_logits.shape)
                wanted = [int(exposed.sum()), logits.shape[1]]
                raise ValueError(f"exposed_logits must be {wanted} for the consistency term, got {got}")
            alone, beside, segment = exposed_logits.to(dtype), logits[exposed], request[exposed]
            each = _divergence(beside, alone, segment, requests)
            comparable = torch.bincount(segment, minlength=requests)[:, None] > 1
            weight = comparable.to(logits.dtype).expand_as(each)
            total = total + config.consistency * self._mean(each, weight)
        return total

    def _listwise(
        self, logits: Tensor, labels: Tensor, counts: Tensor, request: Tensor, requests: int
    ) -> Tensor:
        positive = labels > 0
        negative = ~positive & (counts > 0)
        # a request without negatives has no finite sum: its rows are left out below
        shifted = torch.where(negative, logits + counts.clamp(min=1e-30).log(), -math.inf)
        against = segment_logsumexp(shifted, request, requests)
        both = (against > -math.inf)[request] & positive
        each = F.softplus(torch.where(both, against[request] - logits, 0.0))
        positives = _sum(both.to(logits.dtype), request, requests)
        # the mean over a request's positives, then over the requests
        weight = both / positives.clamp(min=1)[request]
        return self._mean(each, weight)

    def _mean(self, values: Tensor, weight: Tensor) -> Tensor:
        """The weighted mean, over all ranks where asked; 0 where all weights are."""
        total = weight.sum()
        if self.across_ranks and self.training:
            dist.all_reduce(total)
            total = total / dist.get_world_size()
        return (values * weight).sum() / torch.where(total > 0, total, 1.0)


def segment_logsumexp(values: Tensor, segment: Tensor, segments: int) -> Tensor:
    """log of the sum of exp(values) by segment.

    Args:
        values: [rows, T]; -inf counts nothing.
        segment: [rows] int64.
        segments: S.

    Returns:
        [S, T]; -inf where a segment has nothing.

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
    # log(0) would be right forward, and spoil the gradient
    return torch.where(there, torch.where(there, total, 1.0).log() + top, -math.inf)


def _divergence(one: Tensor, other: Tensor, segment: Tensor, segments: int) -> Tensor:
    """The symmetric divergence between two softmaxes, by segment; [segments, T]."""
    log_p = one - segment_logsumexp(one, segment, segments)[segment]
    log_q = other - segment_logsumexp(other, segment, segments)[segment]
    return _sum((log_p.exp() - log_q.exp()) * (log_p - log_q) / 2, segment, segments)


def _sum(values: Tensor, segment: Tensor, segments: int) -> Tensor:
    return values.new_zeros(segments, values.shape[1]).index_add(0, segment, values)
