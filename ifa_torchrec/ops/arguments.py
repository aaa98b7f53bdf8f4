"""What the operators hand to the kernels, and what of it the operators' autograd and fakes need.

The functions of ``ifa_torchrec.ops`` document each argument.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the sums over tokens of this dtype: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_autocast(tokens: Tensor) -> Tensor:
    """Tokens in the dtype that autocast multiplies in, where it is on: the operators' rule of it.

    Of an operator's arguments it is the tokens alone, which are many and what is multiplied.
    Projections, event weights and states stay as they are, and sums are float32 whatever tokens are.
    float64 stays float64, as everywhere under autocast.

    Example:
        >>> import torch
        >>> from ifa_torchrec.ops.arguments import as_autocast
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     as_autocast(torch.zeros(2, 8)).dtype
        torch.bfloat16
    """
    device = tokens.device.type
    if tokens.dtype == torch.float64 or not torch.amp.is_autocast_available(device):
        return tokens
    return tokens.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else tokens


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Within it autocast is off on the tensor's device.

    Not torch.library's register_autocast for the operators: that casts all arguments to one dtype, while
    here it is the tokens alone (``as_autocast``), and sums are float32 whatever they are.

    Example:
        >>> import torch
        >>> from ifa_torchrec.ops.arguments import without_autocast
        >>> x = torch.zeros(2, 2)
        >>> with torch.autocast("cpu", torch.bfloat16), without_autocast(x):
        ...     (x @ x).dtype
        torch.float32
    """
    device = tensor.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def like(*tensors: Tensor) -> tuple[Tensor, ...]:
    """For an operator's fake: outputs of the tensors' shapes and dtypes, contiguous."""
    return tuple(x.new_empty(x.shape) for x in tensors)


def grad_like(weights: Tensor | None, history: Tensor) -> Tensor:
    """The memory of the gradient of weights; empty without, since an operator cannot return None."""
    if weights is None:
        return history.new_empty(0, dtype=sum_dtype(history.dtype))
    return weights.new_empty(weights.shape)


def save_arguments(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Autograd's setup_context: all tensors, and the rest, by which the backward is called."""
    ctx.save_for_backward(*(x for x in inputs if x is None or isinstance(x, Tensor)))
    ctx.options = tuple(x for x in inputs if not (x is None or isinstance(x, Tensor)))


class EncodeArguments(NamedTuple):
    """Of ``encode``."""

    history: Tensor
    offsets: Tensor
    key_weight: Tensor
    value_weight: Tensor
    weights: Tensor | None
    ages: Tensor | None
    decay: Tensor
    feature_map: str


class AttendArguments(NamedTuple):
    """Of ``attend``."""

    candidates: Tensor
    offsets: Tensor
    query_weight: Tensor
    key_value: Tensor
    key_sum: Tensor
    feature_map: str
    eps: float


class AttendSoftmaxArguments(NamedTuple):
    """Of ``attend_softmax``."""

    candidates: Tensor
    offsets: Tensor
    query_weight: Tensor
    summaries: Tensor
    log_weight: Tensor


class MatchArguments(NamedTuple):
    """Of ``match``."""

    candidate_buckets: Tensor
    candidate_offsets: Tensor
    history: Tensor
    history_buckets: Tensor
    history_offsets: Tensor
    weights: Tensor | None
    ages: Tensor | None
    decay: Tensor


class JoinedArguments(NamedTuple):
    """Of ``match``'s backward: the join that the forward found, and the events."""

    candidate_first: Tensor
    event_candidate: Tensor
    history: Tensor
    weights: Tensor | None
    ages: Tensor | None
    decay: Tensor
