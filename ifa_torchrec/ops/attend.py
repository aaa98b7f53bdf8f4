"""``ifa::attend``: attend from candidates to a user state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ifa_torchrec.ops.arguments import AttendArguments, like, save_arguments, sum_dtype
from ifa_torchrec.ops.backends import check_backend, kernels_for
from ifa_torchrec.ops.checks import check_eps, check_offsets, checked

_SHAPES = {
    "candidates": "M D",
    "offsets": "B+1",
    "query_weight": "H d D",
    "key_value": "B H d_phi d",
    "key_sum": "B H d_phi",
}
_SCHEMA = (
    "Tensor candidates, Tensor offsets, Tensor query_weight, Tensor key_value, Tensor key_sum, "
    "str feature_map, float eps, str backend"
)


def attend(
    candidates: Tensor,
    offsets: Tensor,
    query_weight: Tensor,
    key_value: Tensor,
    key_sum: Tensor,
    feature_map: str,
    eps: float,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Read each candidate's output from its request's dense user state (IFA, idea 2).

        normalizer_hc = phi(c Wq_h)^T z_h        out_hc = phi(c Wq_h)^T S_h / (normalizer_hc + eps)

    Args:
        candidates: [M, D] floating point, the candidate tokens of all requests.
        offsets: [B + 1] integers, request b's candidates are rows offsets[b]:offsets[b + 1].
        query_weight: [H, d, D], the projection.
        key_value: S [B, H, d_phi, d], and key_sum: z [B, H, d_phi], from ``encode``.
        feature_map: a key of FEATURE_MAPS.
        eps: keeps the division defined where no event matches; at least 1.2e-38.
        backend: one of BACKENDS.

    Returns:
        out [M, H, d] and normalizer [M, H], float32 (float64 for a float64 key_value).

    Raises:
        ValueError: a size, dtype or device does not fit, or the backend does not support it.
        TypeError: an argument is not a tensor.

    Example:
        >>> import torch
        >>> from ifa_torchrec import ops
        >>> w = torch.randn(2, 4, 8)
        >>> out, normalizer = ops.attend(torch.randn(3, 8), torch.tensor([0, 3]), w,
        ...                           torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4), "elu", 1e-6)
        >>> out.shape, normalizer.sum().item()
        (torch.Size([3, 2, 4]), 0.0)
    """
    given = checked(_SHAPES, (candidates, offsets, query_weight, key_value, key_sum), feature_map)
    check_offsets("offsets", given[1], candidates.shape[0])
    check_eps(eps)
    check_backend(backend, given[0], key_value)
    if backend == "reference":  # plain autograd, no operator
        with kernels_for(backend, given[0]) as kernels:
            return kernels.attend(AttendArguments(*given, feature_map=feature_map, eps=eps))
    return torch.ops.ifa.attend(*given, feature_map, eps, backend)


@torch.library.custom_op(
    "ifa::attend", mutates_args=(), schema=f"({_SCHEMA}) -> (Tensor out, Tensor normalizer)"
)
def _attend(*arguments: Any) -> tuple[Tensor, Tensor]:
    given, backend = AttendArguments(*arguments[:-1]), arguments[-1]
    with kernels_for(backend, given.candidates, given.key_value) as kernels:
        return kernels.attend(given)


@_attend.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    given = AttendArguments(*arguments[:-1])
    dtype = sum_dtype(given.key_value.dtype)
    shape = (given.candidates.shape[0], given.query_weight.shape[0])
    out = given.key_value.new_empty(*shape, given.key_value.shape[-1], dtype=dtype)
    return out, given.key_value.new_empty(shape, dtype=dtype)


@torch.library.custom_op(
    "ifa::attend_backward",
    mutates_args=(),
    schema=f"(Tensor grad_out, Tensor grad_normalizer, {_SCHEMA}) -> "
    "(Tensor grad_candidates, Tensor grad_query_weight, Tensor grad_key_value, Tensor grad_key_sum)",
)
def _attend_backward(
    grad_out: Tensor, grad_normalizer: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given, backend = AttendArguments(*arguments[:-1]), arguments[-1]
    with kernels_for(backend, given.candidates, given.key_value) as kernels:
        return kernels.attend_backward(grad_out, grad_normalizer, given)


@_attend_backward.register_fake
def _(grad_out: Tensor, grad_normalizer: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    given = AttendArguments(*arguments[:-1])
    return like(given.candidates, given.query_weight, given.key_value, given.key_sum)


def _autograd(ctx: Any, grad_out: Tensor, grad_normalizer: Tensor) -> tuple[Tensor | None, ...]:
    grad_candidates, grad_query, grad_key_value, grad_key_sum = torch.ops.ifa.attend_backward(
        grad_out, grad_normalizer, *ctx.saved_tensors, *ctx.options
    )
    return grad_candidates, None, grad_query, grad_key_value, grad_key_sum, None, None, None


_attend.register_autograd(_autograd, setup_context=save_arguments)
