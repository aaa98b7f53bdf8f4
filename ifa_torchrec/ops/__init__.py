"""The op: a jagged history into a user state, and candidates against a user state.

Letters, here and everywhere: B requests, M candidates and N events in all of them, D the width of
a token, H dense heads of width d, d_phi features a head, L half-lives of an identity feature.

Three functions, each with the backends "reference" (plain, the truth), "torch" (tiled, with its
own backward), "native" (C++, on CPU) and "auto" (the fastest that serves). ``python -m
ifa_torchrec.ops`` prints which there are.

What all of them take and give, whichever the backend:

- Tensors of one device, in any layout, of float32, bfloat16, float16 or float64, which may be mixed;
  offsets and buckets are integers of any width. Sizes that do not agree are a ValueError that names
  the argument, and so are offsets that do not rise from 0 to the number of rows. ``encode`` and
  ``match`` look at offsets on the CPU alone; on a GPU, where a look would wait for the device, the
  torch backend looks when it needs them.
- Sums are float32 (float64 where the first argument of ``encode``, ``match``'s history or ``attend``'s
  key_value is), under autocast and any default dtype or device, too.
- No gradient flows to ages and decay.
- A token that is NaN or infinite spoils the results of its own request (a candidate's: its own row)
  and no other's.
- Several threads may call at once. In a process forked from this one PyTorch is set to one thread:
  OpenMP's others did not survive the fork, and a call that waited for them would hang.
"""

from __future__ import annotations

import os
import warnings
from functools import cache, partial
from types import ModuleType
from typing import Literal, get_args

import torch
from torch import Tensor

from ifa_torchrec.ops import native, reference, torch_backend
from ifa_torchrec.ops.checks import check_eps, check_offsets, checked
from ifa_torchrec.ops.feature_maps import FEATURE_MAPS
from ifa_torchrec.ops.torch_backend import without_autocast

Backend = Literal["auto", "native", "reference", "torch"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
_MODULES = {"native": native, "reference": reference, "torch": torch_backend}

__all__ = ["BACKENDS", "FEATURE_MAPS", "Backend", "attend", "encode", "match"]


# After a fork a parallel region, PyTorch's own ones as well, waits for threads that are no more.
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=partial(torch.set_num_threads, 1))


def _backend(name: str, tokens: Tensor, state: Tensor | None = None) -> ModuleType:
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {list(BACKENDS)}, got {name!r}")
    if name == "reference" and tokens.is_meta:
        raise ValueError('backend "reference" reads values, which meta tensors lack: take "torch"')
    if name != "auto":
        if name == "native" and not native.serves(tokens, state):
            dtypes = tokens.dtype if state is None else f"{tokens.dtype} and a state of {state.dtype}"
            raise ValueError(
                f'backend "native" does not serve {dtypes} on {tokens.device.type}: it is for '
                f"float32 and bfloat16 on CPU; the kernels: {native.STATUS}"
            )
        return _MODULES[name]
    if tokens.device.type == "cpu" and native.LIBRARY is None:
        _say_once(f"ifa_torchrec.ops: the native kernels are {native.STATUS}; torch serves, slower")
    return native if native.serves(tokens, state) else torch_backend


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
        offsets: [B + 1] integers, request b's events are rows offsets[b]:offsets[b + 1].
        key_weight: [H, d, D], and value_weight: [H, d, D], the projections.
        weights: [N] or None, a_i >= 0; None means 1.
        ages: [N] or None, t_i >= 0; None means 0.
        decay: [H], lambda_h >= 0 per unit of age.
        feature_map: a key of FEATURE_MAPS.
        backend: one of BACKENDS.

    Returns:
        S [B, H, d_phi, d] and z [B, H, d_phi], float32 (float64 for a float64 history).

    Raises:
        ValueError: a size, dtype or device does not fit, or the backend does not serve it.
        TypeError: an argument is no tensor.

    Example:
        >>> import torch
        >>> from ifa_torchrec import ops
        >>> x, w = torch.randn(5, 8), torch.randn(2, 4, 8)
        >>> s, z = ops.encode(x, torch.tensor([0, 5, 5]), w, w, None, None, torch.zeros(2), "elu")
        >>> s.shape, z[1].abs().sum().item()
        (torch.Size([2, 2, 4, 4]), 0.0)
    """
    given = checked(
        "encode", (history, offsets, key_weight, value_weight, weights, ages, decay), feature_map
    )
    check_offsets("offsets", given[1], history.shape[0])
    with without_autocast(history):
        return _backend(backend, history).encode(*given, feature_map)


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
        offsets: [B + 1] integers, request b's candidates are rows offsets[b]:offsets[b + 1].
        query_weight: [H, d, D], the projection.
        key_value: S [B, H, d_phi, d], and key_sum: z [B, H, d_phi], from ``encode``.
        feature_map: a key of FEATURE_MAPS.
        eps: keeps the division defined where nothing matched; at least 1.2e-38.
        backend: one of BACKENDS.

    Returns:
        out [M, H, d] and matched [M, H], float32 (float64 for a float64 key_value).

    Raises:
        ValueError: a size, dtype or device does not fit, or the backend does not serve it.
        TypeError: an argument is no tensor.

    Example:
        >>> import torch
        >>> from ifa_torchrec import ops
        >>> w = torch.randn(2, 4, 8)
        >>> out, matched = ops.attend(torch.randn(3, 8), torch.tensor([0, 3]), w,
        ...                           torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4), "elu", 1e-6)
        >>> out.shape, matched.sum().item()
        (torch.Size([3, 2, 4]), 0.0)
    """
    given = checked("attend", (candidates, offsets, query_weight, key_value, key_sum), feature_map)
    check_offsets("offsets", given[1], candidates.shape[0])
    check_eps(eps)
    with without_autocast(candidates):
        return _backend(backend, candidates, key_value).attend(*given, feature_map, eps)


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
        candidate_buckets: [M] integers; candidate_offsets: [B + 1] integers.
        history: [N, D] floating point; history_buckets: [N] integers; history_offsets: [B + 1].
        weights: [N] or None, a_i; ages: [N] or None, t_i; decay: [L], rates per unit of age.
        backend: one of BACKENDS.

    Returns:
        token_sum [M, L, D] = sum of w_li x_i, and weight_sum [M, L] = sum of w_li, over the
        matching events; float32 (float64 for a float64 history).

    Raises:
        ValueError: a size, dtype or device does not fit, or the backend does not serve it.
        TypeError: an argument is no tensor.

    Example:
        >>> import torch
        >>> from ifa_torchrec import ops
        >>> _, count = ops.match(torch.tensor([7, 8]), torch.tensor([0, 2]), torch.zeros(3, 4),
        ...     torch.tensor([7, 7, 9]), torch.tensor([0, 3]), None, None, torch.zeros(1))
        >>> count.flatten().tolist()
        [2.0, 0.0]
    """
    given = checked(
        "match",
        (
            candidate_buckets,
            candidate_offsets,
            history,
            history_buckets,
            history_offsets,
            weights,
            ages,
            decay,
        ),
    )
    check_offsets("candidate_offsets", given[1], candidate_buckets.shape[0])
    check_offsets("history_offsets", given[4], history.shape[0])
    with without_autocast(history):
        return _backend(backend, history).match(*given)
