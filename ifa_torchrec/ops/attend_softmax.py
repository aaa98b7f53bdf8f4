"""``ifa::attend_softmax``: attend from candidates to the summaries of a user state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ifa_torchrec.ops.arguments import AttendSoftmaxArguments, like, save_arguments, sum_dtype
from ifa_torchrec.ops.backends import check_backend, kernels_for
from ifa_torchrec.ops.checks import check_offsets, checked

_SHAPES = {
    "candidates": "M D",
    "offsets": "B+1",
    "query_weight": "H d D",
    "summaries": "B H R d",
    "log_weight": "B H R",
}
_SCHEMA = (
    "Tensor candidates, Tensor offsets, Tensor query_weight, Tensor summaries, Tensor log_weight, "
    "str backend"
)


def attend_softmax(
    candidates: Tensor,
    offsets: Tensor,
    query_weight: Tensor,
    summaries: Tensor,
    log_weight: Tensor,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Let each candidate attend by softmax to its request's R summaries of a history.

        score_hcr = (c Wq_h)^T mu_hr / sqrt(d) + log_weight_hr
        log_sum_hc = log sum_r exp(score_hcr)
        out_hc = sum_r exp(score_hcr - log_sum_hc) mu_hr

    A summary is both key and value. The summaries of a user state are the means mu_hr = S_hr / z_hr of
    its features, with weights z_hr: our own read-out of the paper's state.

    Args:
        candidates: [M, D] floating point, the candidate tokens of all requests.
        offsets: [B + 1] integers, request b's candidates are rows offsets[b]:offsets[b + 1].
        query_weight: [H, d, D], the projection.
        summaries: mu [B, H, R, d].
        log_weight: [B, H, R], -inf for an absent summary.
        backend: one of BACKENDS.

    Returns:
        out [M, H, d] and log_sum [M, H], float32 (float64 for float64 summaries); zeros and -inf where
        a request has no summaries.

    Raises:
        ValueError: a size, dtype or device does not fit, or the backend does not support it.
        TypeError: an argument is not a tensor.

    Example:
        >>> import torch
        >>> from ifa_torchrec import ops
        >>> summaries = torch.tensor([[1.0, 0.0], [0.0, 1.0]])[None, None]
        >>> out, log_sum = ops.attend_softmax(torch.zeros(3, 8), torch.tensor([0, 3]),
        ...                               torch.randn(1, 2, 8), summaries, torch.zeros(1, 1, 2))
        >>> out[0].tolist(), log_sum.exp().flatten().tolist()
        ([[0.5, 0.5]], [2.0, 2.0, 2.0])
    """
    given = checked(_SHAPES, (candidates, offsets, query_weight, summaries, log_weight))
    check_offsets("offsets", given[1], candidates.shape[0])
    check_backend(backend, given[0], summaries)
    if backend == "reference":  # plain autograd, no operator
        with kernels_for(backend, given[0]) as kernels:
            return kernels.attend_softmax(AttendSoftmaxArguments(*given))
    return torch.ops.ifa.attend_softmax(*given, backend)


@torch.library.custom_op(
    "ifa::attend_softmax", mutates_args=(), schema=f"({_SCHEMA}) -> (Tensor out, Tensor log_sum)"
)
def _attend_softmax(*arguments: Any) -> tuple[Tensor, Tensor]:
    given, backend = AttendSoftmaxArguments(*arguments[:-1]), arguments[-1]
    with kernels_for(backend, given.candidates, given.summaries) as kernels:
        return kernels.attend_softmax(given)


@_attend_softmax.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    given = AttendSoftmaxArguments(*arguments[:-1])
    dtype = sum_dtype(given.summaries.dtype)
    shape = (given.candidates.shape[0], given.query_weight.shape[0])
    out = given.summaries.new_empty(*shape, given.summaries.shape[-1], dtype=dtype)
    return out, given.summaries.new_empty(shape, dtype=dtype)


@torch.library.custom_op(
    "ifa::attend_softmax_backward",
    mutates_args=(),
    schema=f"(Tensor grad_out, Tensor grad_log_sum, {_SCHEMA}) -> "
    "(Tensor grad_candidates, Tensor grad_query_weight, Tensor grad_summaries, Tensor grad_log_weight)",
)
def _attend_softmax_backward(
    grad_out: Tensor, grad_log_sum: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given, backend = AttendSoftmaxArguments(*arguments[:-1]), arguments[-1]
    with kernels_for(backend, given.candidates, given.summaries) as kernels:
        return kernels.attend_softmax_backward(grad_out, grad_log_sum, given)


@_attend_softmax_backward.register_fake
def _(grad_out: Tensor, grad_log_sum: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    given = AttendSoftmaxArguments(*arguments[:-1])
    return like(given.candidates, given.query_weight, given.summaries, given.log_weight)


def _autograd(ctx: Any, grad_out: Tensor, grad_log_sum: Tensor) -> tuple[Tensor | None, ...]:
    grad_candidates, grad_query, grad_summaries, grad_weight = torch.ops.ifa.attend_softmax_backward(
        grad_out, grad_log_sum, *ctx.saved_tensors, *ctx.options
    )
    return grad_candidates, None, grad_query, grad_summaries, grad_weight, None


_attend_softmax.register_autograd(_autograd, setup_context=save_arguments)
