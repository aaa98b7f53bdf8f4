"""The op: a jagged history into a user state, and candidates against a user state.

Letters, here and everywhere: B requests, M candidates and N events in all of them, D the width of
a token, H dense heads of width d, d_phi features a head, L half-lives of an identity feature.

Three functions, each with the backends "reference" (plain, the truth), "torch" (tiled, with its
own backward), "native" (C++, on CPU) and "auto" (the fastest that serves). ``python -m
ifa_torchrec.ops`` prints which there are.
"""

from __future__ import annotations

import warnings
from functools import cache
from types import ModuleType
from typing import Literal, get_args

from torch import Tensor

from ifa_torchrec.ops import native, reference, torch_backend
from ifa_torchrec.ops.feature_maps import FEATURE_MAPS

Backend = Literal["auto", "native", "reference", "torch"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
_MODULES = {"native": native, "reference": reference, "torch": torch_backend}

__all__ = ["BACKENDS", "FEATURE_MAPS", "Backend", "attend", "encode", "match"]


def _backend(name: str, tokens: Tensor) -> ModuleType:
    if name != "auto":
        if name == "native" and not native.serves(tokens):
            raise ValueError(
                f'backend "native" does not serve {tokens.dtype} on {tokens.device.type}: it is for '
                f"float32 and bfloat16 on CPU; the kernels: {native.STATUS}"
            )
        return _MODULES[name]
    if tokens.device.type == "cpu" and native.LIBRARY is None:
        _say_once(f"ifa_torchrec.ops: the native kernels are {native.STATUS}; torch serves, slower")
    return native if native.serves(tokens) else torch_backend


@cache
def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)


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

        w_hi = a_i exp(-lambda_h t_i)
        S_h  = sum_i w_hi phi(x_i Wk_h) (x_i Wv_h)^T        z_h = sum_i w_hi phi(x_i Wk_h)

    Args:
        history: [N, D] floating point, the event tokens of all requests.
        offsets: [B + 1] int64, request b's events are rows offsets[b]:offsets[b + 1].
        key_weight: [H, d, D], and value_weight: [H, d, D], the projections.
        weights: [N] or None, a_i >= 0; None means 1.
        ages: [N] or None, t_i >= 0; None means 0. No gradient flows to the ages.
        decay: [H], lambda_h >= 0 per unit of age.
        feature_map: a key of FEATURE_MAPS.
        backend: one of BACKENDS.

    Returns:
        S [B, H, d_phi, d] and z [B, H, d_phi], float32 (float64 for float64 input).

    Example:
        >>> import torch
        >>> from ifa_torchrec import ops
        >>> x, w = torch.randn(5, 8), torch.randn(2, 4, 8)
        >>> s, z = ops.encode(x, torch.tensor([0, 5, 5]), w, w, None, None, torch.zeros(2), "elu")
        >>> s.shape, z[1].abs().sum().item()
        (torch.Size([2, 2, 4, 4]), 0.0)
    """
    return _backend(backend, history).encode(
        history, offsets, key_weight, value_weight, weights, ages, decay, feature_map
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
    """Read each candidate's answer from its request's dense user state (IFA, idea 2).

        matched_hc = phi(c Wq_h)^T z_h        out_hc = phi(c Wq_h)^T S_h / (matched_hc + eps)

    Args:
        candidates: [M, D] floating point, the candidate tokens of all requests.
        offsets: [B + 1] int64, request b's candidates are rows offsets[b]:offsets[b + 1].
        query_weight: [H, d, D], the projection.
        key_value: S [B, H, d_phi, d], and key_sum: z [B, H, d_phi], from ``encode``.
        feature_map: a key of FEATURE_MAPS.
        eps: keeps the division defined where nothing matched.
        backend: one of BACKENDS.

    Returns:
        out [M, H, d] and matched [M, H], in the state's dtype.

    Example:
        >>> import torch
        >>> from ifa_torchrec import ops
        >>> w = torch.randn(2, 4, 8)
        >>> out, matched = ops.attend(torch.randn(3, 8), torch.tensor([0, 3]), w,
        ...                           torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4), "elu", 1e-6)
        >>> out.shape, matched.sum().item()
        (torch.Size([3, 2, 4]), 0.0)
    """
    return _backend(backend, candidates).attend(
        candidates, offsets, query_weight, key_value, key_sum, feature_map, eps
    )


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

    Linear attention whose phi is the one-hot of the bucket, without a table of buckets: the
    request's candidates are joined with its events. One head for each decay rate. Our own
    addition to the paper's algebra.

    Args:
        candidate_buckets: [M] int64; candidate_offsets: [B + 1] int64.
        history: [N, D] floating point; history_buckets: [N] int64; history_offsets: [B + 1].
        weights: [N] or None, a_i; ages: [N] or None, t_i; decay: [L], rates per unit of age.
        backend: one of BACKENDS.

    Returns:
        token_sum [M, L, D] = sum of w_li x_i, and weight_sum [M, L] = sum of w_li, over the
        matching events; float32 (float64 for float64 input).

    Example:
        >>> import torch
        >>> from ifa_torchrec import ops
        >>> _, count = ops.match(torch.tensor([7, 8]), torch.tensor([0, 2]), torch.zeros(3, 4),
        ...     torch.tensor([7, 7, 9]), torch.tensor([0, 3]), None, None, torch.zeros(1))
        >>> count.flatten().tolist()
        [2.0, 0.0]
    """
    return _backend(backend, history).match(
        candidate_buckets,
        candidate_offsets,
        history,
        history_buckets,
        history_offsets,
        weights,
        ages,
        decay,
    )
