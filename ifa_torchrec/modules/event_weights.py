""""""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor

from ifa_torchrec import ops
from ifa_torchrec.modules.config import FORGOTTEN


def decay_rates(half_lives: tuple[float, ...], tokens: Tensor | None = None) -> Tensor:
    """lambda = ln 2 / half-life; 0 for an infinite half-life.

    They are made where they are used, and are no buffer: casting a module would round them, and a
    module built on the meta device would lose them.

    Args:
        half_lives: positive.
        tokens: what they are used with; None for float32 on the CPU.

    Returns:
        [len(half_lives)] float32 (float64 for float64 tokens), on the tokens' device.

    Example:
        >>> import math
        >>> from ifa_torchrec.modules.event_weights import decay_rates
        >>> decay_rates((math.inf, math.log(2))).tolist()
        [0.0, 1.0]
    """
    double = tokens is not None and tokens.dtype == torch.float64
    device = torch.device("cpu") if tokens is None else tokens.device
    dtype = torch.float64 if double else torch.float32
    # filled in on the device: to copy them from the host would make it wait for a GPU
    return torch.stack(
        [torch.full((), math.log(2.0) / h, dtype=dtype, device=device) for h in half_lives]
    )


def event_weights(
    history: JaggedTensor, age: Tensor | None, half_lives: tuple[float, ...], tokens: Tensor
) -> Tensor:
    """w_hi = a_i exp(-lambda_h t_i) of a history's events, [n, len(half_lives)].

    Args:
        history: for its weights.
        age: [n] or None.
        half_lives: positive.
        tokens: [n, D], of the dtype that the weights shall have.

    Example:
        >>> import math, torch
        >>> from torchrec.sparse.jagged_tensor import JaggedTensor
        >>> from ifa_torchrec.modules.event_weights import event_weights
        >>> history = JaggedTensor(torch.zeros(2, 4), lengths=torch.tensor([2]))
        >>> event_weights(history, torch.tensor([7.0, 0.0]), (math.inf, 7.0), history.values()).tolist()
        [[1.0, 0.5], [1.0, 1.0]]
    """
    rates = decay_rates(half_lives, tokens)
    weight = ops.reference.event_weights(history.weights_or_none(), age, rates, tokens)
    return weight.to(tokens.dtype)


def normalised(sums: Tensor, weight: Tensor) -> Tensor:
    """Means [..., d] of sums [..., d] of weighted rows, 0 where the weight [...] is none.

    Example:
        >>> import torch
        >>> from ifa_torchrec.modules.event_weights import normalised
        >>> normalised(torch.tensor([[3.0], [0.0]]), torch.tensor([1.5, 0.0])).tolist()
        [[2.0], [0.0]]
    """
    return sums / torch.where(weight > FORGOTTEN, weight, 1.0)[..., None]


def _check_weights(weights: Tensor, values: Tensor, name: str) -> None:
    if not weights.is_floating_point():
        raise ValueError(
            f"{name}: its weights are {weights.dtype}, ids it seems, as of an EmbeddingCollection with "
            "need_indices=True; weights must be floating point, or none"
        )
    if name != "history":
        raise ValueError(f"{name}: candidates have no weights; make a JaggedTensor without them")
    if weights.shape != values.shape[:1]:
        raise ValueError(
            f"{name}: weights must be [{len(values)}], one an event, got {list(weights.shape)}"
        )
    if weights.device != values.device:
        raise ValueError(f"{name}: weights are on {weights.device}, the values on {values.device}")


def present(
    history: JaggedTensor, *columns: Tensor | None
) -> tuple[JaggedTensor, tuple[Tensor | None, ...]]:
    """The history, and columns beside it, without the events of weight 0, which softmax has no logarithm
    for.

    Args:
        history: N events of B requests.
        columns: [N, ...] each, or None.

    Example:
        >>> import torch
        >>> from torchrec.sparse.jagged_tensor import JaggedTensor
        >>> from ifa_torchrec.modules.event_weights import present
        >>> history = JaggedTensor(torch.zeros(3, 4), lengths=torch.tensor([1, 2]),
        ...     weights=torch.tensor([1.0, 0.0, 0.5]))
        >>> there, (age,) = present(history, torch.tensor([3.0, 2.0, 1.0]))
        >>> there.lengths().tolist(), age.tolist()
        ([1, 1], [3.0, 1.0])
    """
    weights = history.weights_or_none()
    if weights is None:
        return history, columns
    there = weights > 0
    rows, offsets = there.nonzero()[:, 0], counted(there, history.offsets())
    kept = JaggedTensor(history.values()[rows], weights=weights[rows], offsets=offsets)
    return kept, tuple(None if column is None else column[rows] for column in columns)


def counted(kept: Tensor, offsets: Tensor) -> Tensor:
    """The offsets [B + 1] of the rows that are kept, [rows] bool.

    Example:
        >>> import torch
        >>> from ifa_torchrec.modules.event_weights import counted
        >>> counted(torch.tensor([True, False, True]), torch.tensor([0, 2, 3])).tolist()
        [0, 1, 2]
    """
    return torch.cat([offsets.new_zeros(1), kept.cumsum(0).to(offsets.dtype)])[offsets]
