"""``ifa::encode``: encode a jagged history into a user state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ifa_torchrec.ops.arguments import EncodeArguments, grad_like, like, save_arguments, sum_dtype
from ifa_torchrec.ops.backends import check_backend, kernels_for
from ifa_torchrec.ops.checks import check_offsets, checked
from ifa_torchrec.ops.feature_maps import FEATURE_MAPS

_SHAPES = {
    "history": "N D",
    "offsets": "B+1",
    "key_weight": "H d D",
    "value_weight": "H d D",
    "weights": "N | N H",
    "ages": "N",
    "decay": "H",
}
_SCHEMA = (
    "Tensor history, Tensor offsets, Tensor key_weight, Tensor value_weight, Tensor? weights, "
    "Tensor? ages, Tensor decay, str feature_map, str backend"
)


def encode(
    history: Tensor,
    offsets: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    weights: Tensor | None,
    ages: Tensor | None,
    decay: Tensor,
    feature_map: str,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Sum each request's history into its dense user state (IFA, idea 2).

        w_hi = a_hi exp(-lambda_h t_i)
        S_h  = sum_i w_hi phi(x_i Wk_h) (x_i Wv_h)^T        z_h = sum_i w_hi phi(x_i Wk_h)

    Args:
        history: [N, D] floating point, the event tokens of all requests.
        offsets: [B + 1] integers, request b's events are rows offsets[b]:offsets[b + 1].
        key_weight: [H, d, D], and value_weight: [H, d, D], the projections.
        weights: a_hi >= 0, [N, H], or [N] if an event weighs the same in every head, or None for 1.
        ages: [N] or None, t_i >= 0; None means 0.
        decay: [H], lambda_h >= 0 per unit of age.
        feature_map: a key of FEATURE_MAPS.
        backend: one of BACKENDS.

    Returns:
        S [B, H, d_phi, d] and z [B, H, d_phi], float32 (float64 for a float64 history).

    Raises:
        ValueError: a size, dtype or device does not fit, or the backend does not support it.
        TypeError: an argument is not a tensor.

    Example:
        >>> import torch
        >>> from ifa_torchrec import ops
        >>> x, w = torch.randn(5, 8), torch.randn(2, 4, 8)
        >>> s, z = ops.encode(x, torch.tensor([0, 5, 5]), w, w, None, None, torch.zeros(2), "elu")
        >>> s.shape, z[1].abs().sum().item()
        (torch.Size([2, 2, 4, 4]), 0.0)
    """
    given = checked(
        _SHAPES, (history, offsets, key_weight, value_weight, weights, ages, decay), feature_map
    )
    check_offsets("offsets", given[1], history.shape[0])
    check_backend(backend, given[0])
    if backend == "reference":  # plain autograd, no operator
        with kernels_for(backend, given[0]) as kernels:
            return kernels.encode(EncodeArguments(*given, feature_map=feature_map))
    return torch.ops.ifa.encode(*given, feature_map, backend)


@torch.library.custom_op(
    "ifa::encode", mutates_args=(), schema=f"({_SCHEMA}) -> (Tensor key_value, Tensor key_sum)"
)
def _encode(*arguments: Any) -> tuple[Tensor, Tensor]:
    given, backend = EncodeArguments(*arguments[:-1]), arguments[-1]
    with kernels_for(backend, given.history) as kernels:
        return kernels.encode(given)


@_encode.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    given = EncodeArguments(*arguments[:-1])
    heads, width, _ = given.key_weight.shape
    features = width * FEATURE_MAPS[given.feature_map].expansion
    shape = (given.offsets.shape[0] - 1, heads, features)
    dtype = sum_dtype(given.history.dtype)
    key_value = given.history.new_empty(*shape, width, dtype=dtype)
    return key_value, given.history.new_empty(shape, dtype=dtype)


@torch.library.custom_op(
    "ifa::encode_backward",
    mutates_args=(),
    schema=f"(Tensor grad_key_value, Tensor grad_key_sum, {_SCHEMA}) -> "
    "(Tensor grad_history, Tensor grad_key_weight, Tensor grad_value_weight, Tensor grad_weights)",
)
def _encode_backward(
    grad_key_value: Tensor, grad_key_sum: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given, backend = EncodeArguments(*arguments[:-1]), arguments[-1]
    with kernels_for(backend, given.history) as kernels:
        return kernels.encode_backward(grad_key_value, grad_key_sum, given)


@_encode_backward.register_fake
def _(grad_key_value: Tensor, grad_key_sum: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    given = EncodeArguments(*arguments[:-1])
    grads = like(given.history, given.key_weight, given.value_weight)
    return *grads, grad_like(given.weights, given.history)


def _autograd(ctx: Any, grad_key_value: Tensor, grad_key_sum: Tensor) -> tuple[Tensor | None, ...]:
    grad_history, grad_key, grad_value, grad_weights = torch.ops.ifa.encode_backward(
        grad_key_value, grad_key_sum, *ctx.saved_tensors, *ctx.options
    )
    if ctx.saved_tensors[4] is None:
        grad_weights = None
    return grad_history, None, grad_key, grad_value, grad_weights, None, None, None, None


_encode.register_autograd(_autograd, setup_context=save_arguments)
