"""Which candidates to show together: the k best ones, or a set generated greedily."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor

from ifa_torchrec.ops.jagged import request_of_row

ScoreFn = Callable[[Tensor], Tensor]
"""Maps which candidates are taken, [M] bool, to the logits [M] of all candidates."""


def generate_set(
    logits: Tensor | ScoreFn,
    candidates: JaggedTensor,
    k: int,
    strategy: Literal["topk", "greedy"] = "topk",
) -> JaggedTensor:
    """The k candidates of each request that are best together, best first.

    Args:
        logits: [M], or a function that maps which candidates are taken, [M] bool, to [M] logits. With
            several tasks, pass their ``ranking_score``.
        candidates: candidates of B requests; its lengths say which rows belong together.
        k: how many to take; all candidates of a request with fewer.
        strategy: "topk" takes the k highest logits, computed with nothing taken. "greedy" takes one
            candidate, scores the others given those already taken, takes the next, and so on, with k
            calls of the function. With fixed logits both are the same.

    Returns:
        JaggedTensor of B requests whose values are row numbers of the candidates, int64. Among
        equal logits the lower row comes first.

    Raises:
        ValueError: k is negative, the strategy unknown, or the logits are not [M] numbers.

    Example:
        >>> import torch
        >>> from torchrec.sparse.jagged_tensor import JaggedTensor
        >>> from ifa_torchrec import generate_set
        >>> candidates = JaggedTensor(torch.zeros(4, 8), lengths=torch.tensor([3, 1]))
        >>> generate_set(torch.tensor([0.1, 0.9, 0.5, 0.3]), candidates, k=2).values().tolist()
        [1, 2, 3]
        >>> def twins(taken):  # rows 1 and 2 are worth little together
        ...     return torch.tensor([0.1, 0.9, 0.5, 0.3]) - taken[[0, 2, 1, 3]].float()
        >>> generate_set(twins, candidates, k=2, strategy="greedy").values().tolist()
        [1, 0, 3]
    """
    if k < 0:
        raise ValueError(f"k must be at least 0, got {k}")
    if strategy not in ("topk", "greedy"):
        raise ValueError(f"strategy must be 'topk' or 'greedy', got {strategy!r}")
    offsets = candidates.offsets()
    rows = len(candidates.values())
    taken = torch.zeros(rows, dtype=torch.bool, device=offsets.device)

    def score() -> Tensor:
        values = logits(taken) if callable(logits) else logits
        if values.shape != (rows,):
            raise ValueError(f"logits must be [{rows}], got {list(values.shape)}")
        if (nan := values.isnan()).any():
            raise ValueError(f"logits[{int(nan.nonzero()[0])}] is NaN; a ranking needs numbers")
        return values

    lengths = offsets.diff().clamp(max=k)
    if strategy == "topk" or not callable(logits):
        chosen = _ranked(score(), offsets)
        place = torch.arange(rows, device=offsets.device) - torch.repeat_interleave(
            offsets[:-1], offsets.diff()
        )
        return JaggedTensor(chosen[place < k], lengths=lengths)
    request = request_of_row(offsets, rows)
    picks = []
    for _ in range(int(lengths.max()) if len(lengths) else 0):
        pick = first_rows(_best(score(), taken, request, len(lengths)), request, len(lengths))
        taken = taken.index_fill(0, pick[pick < rows], True)  # a copy: the function may have kept it
        picks.append(pick)
    chosen = torch.stack(picks, dim=1).flatten() if picks else offsets.new_empty(0)
    return JaggedTensor(chosen[chosen < rows], lengths=lengths)


def _best(values: Tensor, taken: Tensor, request: Tensor, requests: int) -> Tensor:
    """Which candidates have the highest value among those of their request not yet taken, [M] bool."""
    left = values.masked_fill(taken, -torch.inf)
    if requests == 1:  # a tenth of the cost of scatter_reduce
        return (left == left.amax()) & ~taken
    top = left.new_full((requests,), -torch.inf).scatter_reduce(0, request, left, "amax")
    return (left == top[request]) & ~taken


def first_rows(wanted: Tensor, request: Tensor, requests: int) -> Tensor:
    """The first wanted row of each request.

    Args:
        wanted: [M] bool.
        request: [M] int64, the request of each row.
        requests: B.

    Returns:
        [B] int64; M for a request without a wanted row.

    Example:
        >>> import torch
        >>> from ifa_torchrec.modules.generation import first_rows
        >>> first_rows(torch.tensor([False, True, True, False]), torch.tensor([0, 0, 0, 1]), 2).tolist()
        [1, 4]
    """
    rows = wanted.shape[0]
    row = torch.where(wanted, torch.arange(rows, device=wanted.device), rows)
    if requests == 1 and rows:
        return row.amin(0, keepdim=True)
    return row.new_full((requests,), rows).scatter_reduce(0, request, row, "amin")


def _ranked(values: Tensor, offsets: Tensor) -> Tensor:
    """Row numbers by request, then by descending value, then by row."""
    order = torch.sort(values, descending=True, stable=True).indices
    request = request_of_row(offsets, values.shape[0])
    return order[torch.sort(request[order], stable=True).indices]
