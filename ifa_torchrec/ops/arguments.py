"""The kernels' arguments, and helpers that the operators' autograd and fakes share.

The functions of ``ifa_torchrec.ops`` document each argument.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over tokens of this dtype: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def like(*tensors: Tensor) -> tuple[Tensor, ...]:
    """For an operator's fake: contiguous outputs with the tensors' shapes and dtypes."""
    return tuple(x.new_empty(x.shape) for x in tensors)


def grad_like(weights: Tensor | None, history: Tensor) -> Tensor:
    """Memory for the gradient of weights; an empty tensor without weights, since an operator cannot
    return None."""
    if weights is None:
        return history.new_empty(0, dtype=sum_dtype(history.dtype))
    return weights.new_empty(weights.shape)


def save_arguments(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Autograd's setup_context: saves the tensors, and the other arguments as ``ctx.options``."""
    ctx.save_for_backward(*(x for x in inputs if x is None or isinstance(x, Tensor)))
    ctx.options = tuple(x for x in inputs if not (x is None or isinstance(x, Tensor)))


class EncodeArguments(NamedTuple):
    """The arguments of ``encode``."""

    history: Tensor
    offsets: Tensor
    key_weight: Tensor
    value_weight: Tensor
    weights: Tensor | None
    ages: Tensor | None
    decay: Tensor
    feature_map: str


class AttendArguments(NamedTuple):
    """The arguments of ``attend``."""

    candidates: Tensor
    offsets: Tensor
    query_weight: Tensor
    key_value: Tensor
    key_sum: Tensor
    feature_map: str
    eps: float


class AttendSoftmaxArguments(NamedTuple):
    """The arguments of ``attend_softmax``."""

    candidates: Tensor
    offsets: Tensor
    query_weight: Tensor
    summaries: Tensor
    log_weight: Tensor


class MatchArguments(NamedTuple):
    """The arguments of ``match``."""

    candidate_buckets: Tensor
    candidate_offsets: Tensor
    history: Tensor
    history_buckets: Tensor
    history_offsets: Tensor
    weights: Tensor | None
    ages: Tensor | None
    decay: Tensor


class JoinedArguments(NamedTuple):
    """The arguments of ``match``'s backward: the join that the forward found, and the events."""

    candidate_first: Tensor
    event_candidate: Tensor
    history: Tensor
    weights: Tensor | None
    ages: Tensor | None
    decay: Tensor
