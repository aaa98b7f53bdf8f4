"""``ifa::match``: match candidates with the events of the same id."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ifa_torchrec.ops.arguments import JoinedArguments, MatchArguments, grad_like, like, sum_dtype
from ifa_torchrec.ops.backends import check_backend, kernels_for
from ifa_torchrec.ops.checks import check_offsets, checked

_SHAPES = {
    "candidate_buckets": "M",
    "candidate_offsets": "B+1",
    "history": "N D",
    "history_buckets": "N",
    "history_offsets": "B+1",
    "weights": "N | N L",
    "ages": "N",
    "decay": "L",
}


def match(
    candidate_buckets: Tensor,
    candidate_offsets: Tensor,
    history: Tensor,
    history_buckets: Tensor,
    history_offsets: Tensor,
    weights: Tensor | None,
    ages: Tensor | None,
    decay: Tensor,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Sum, for each candidate, the events of its request that fall into its bucket.

    Linear attention whose phi is the one-hot encoding of the bucket, without a table of buckets: the
    request's candidates are joined with its events. There is one head per decay rate. Our own
    addition to the paper's algebra.

    Args:
        candidate_buckets: [M] integers; candidate_offsets: [B + 1] integers.
        history: [N, D] floating point; history_buckets: [N] integers; history_offsets: [B + 1].
        weights: a_li, [N, L], or [N] if an event weighs the same in every head, or None for 1.
        ages: [N] or None, t_i; decay: [L], rates per unit of age. w_li is a_li exp(-lambda_l t_i).
        backend: one of BACKENDS.

    Returns:
        token_sum [M, L, D] = sum of w_li x_i, and weight_sum [M, L] = sum of w_li, over the
        matching events; float32 (float64 for a float64 history).

    Raises:
        ValueError: a size, dtype or device does not fit, or the backend does not support it.
        TypeError: an argument is not a tensor.

    Example:
        >>> import torch
        >>> from ifa_torchrec import ops
        >>> _, count = ops.match(torch.tensor([7, 8]), torch.tensor([0, 2]), torch.zeros(3, 4),
        ...     torch.tensor([7, 7, 9]), torch.tensor([0, 3]), None, None, torch.zeros(1))
        >>> count.flatten().tolist()
        [2.0, 0.0]
    """
    given = checked(
        _SHAPES,
        (
            *(candidate_buckets, candidate_offsets),
            *(history, history_buckets, history_offsets, weights, ages, decay),
        ),
    )
    check_offsets("candidate_offsets", given[1], candidate_buckets.shape[0])
    check_offsets("history_offsets", given[4], history.shape[0])
    check_backend(backend, given[2])
    if backend == "reference":  # plain autograd, no operator
        with kernels_for(backend, given[2]) as kernels:
            return kernels.match(MatchArguments(*given))
    return torch.ops.ifa.match(*given, backend)[:2]


# The join is returned with the sums, since the backward needs it: for each candidate the first candidate
# of its request with the same bucket, and for each event the first candidate with its bucket, or -1.
@torch.library.custom_op(
    "ifa::match",
    mutates_args=(),
    schema="(Tensor candidate_buckets, Tensor candidate_offsets, Tensor history, "
    "Tensor history_buckets, Tensor history_offsets, Tensor? weights, Tensor? ages, Tensor decay, "
    "str backend) -> "
    "(Tensor token_sum, Tensor weight_sum, Tensor candidate_first, Tensor event_candidate)",
)
def _match(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given, backend = MatchArguments(*arguments[:-1]), arguments[-1]
    with kernels_for(backend, given.history) as kernels:
        return kernels.match(given)


@_match.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    given = MatchArguments(*arguments[:-1])
    dtype = sum_dtype(given.history.dtype)
    shape = (given.candidate_buckets.shape[0], given.decay.shape[0])
    token_sum = given.history.new_empty(*shape, given.history.shape[1], dtype=dtype)
    weight_sum = given.history.new_empty(shape, dtype=dtype)
    return token_sum, weight_sum, *like(given.candidate_buckets, given.history_buckets)


@torch.library.custom_op(
    "ifa::match_backward",
    mutates_args=(),
    schema="(Tensor grad_token, Tensor grad_weight, Tensor candidate_first, Tensor event_candidate, "
    "Tensor history, Tensor? weights, Tensor? ages, Tensor decay, str backend) -> "
    "(Tensor grad_history, Tensor grad_weights)",
)
def _match_backward(grad_token: Tensor, grad_weight: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    given, backend = JoinedArguments(*arguments[:-1]), arguments[-1]
    with kernels_for(backend, given.history) as kernels:
        return kernels.match_backward(grad_token, grad_weight, given)


@_match_backward.register_fake
def _(grad_token: Tensor, grad_weight: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    given = JoinedArguments(*arguments[:-1])
    return *like(given.history), grad_like(given.weights, given.history)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    given, ctx.backend = MatchArguments(*inputs[:-1]), inputs[-1]
    ctx.save_for_backward(*output[2:], given.history, given.weights, given.ages, given.decay)


def _autograd(ctx: Any, grad_token: Tensor, grad_weight: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    given = JoinedArguments(*ctx.saved_tensors)
    grad_history, grad_weights = torch.ops.ifa.match_backward(
        grad_token, grad_weight, *given, ctx.backend
    )
    if given.weights is None:
        grad_weights = None
    return None, None, grad_history, None, None, grad_weights, None, None, None


_match.register_autograd(_autograd, setup_context=_setup)
