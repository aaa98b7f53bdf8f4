"""Padding of jagged rows, for attention by dense matrix products."""

from __future__ import annotations

import torch
from torch import Tensor


def padded(rows: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Pad each request's rows to the length of the longest.

    Args:
        rows: [N, ...].
        offsets: [B + 1] int64, request b's rows are offsets[b]:offsets[b + 1].

    Returns:
        [B, longest, ...], padded with repeated rows, and [B, longest] bool, False for padding; indexing
        the former with the latter gives ``rows`` again.

    Example:
        >>> import torch
        >>> from ifa_torchrec.modules.peers.padding import padded
        >>> dense, there = padded(torch.arange(3), torch.tensor([0, 2, 2, 3]))
        >>> dense[there].tolist(), there.tolist()
        ([0, 1, 2], [[True, True], [False, False], [True, False]])
    """
    lengths = offsets.diff()
    longest = int(lengths.max()) if len(lengths) else 0
    place = torch.arange(longest, device=rows.device)
    there = place < lengths[:, None]
    row = (offsets[:-1, None] + place).clamp(max=max(len(rows) - 1, 0))
    # faster than rows[row], whose gradient is slow
    return rows.index_select(0, row.flatten()).unflatten(0, row.shape), there
