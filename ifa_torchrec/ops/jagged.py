"""What jagged rows need everywhere."""

from __future__ import annotations

import torch
from torch import Tensor


def request_of_row(offsets: Tensor, rows: int | None = None) -> Tensor:
    """The request that each row belongs to.

    Args:
        offsets: [B + 1] int64, request b's rows are offsets[b]:offsets[b + 1].
        rows: offsets[-1], where that is known without a look at the tensor, which on a GPU waits for
            the device and in an exported graph makes a size of its own.

    Returns:
        [rows] int64.

    Example:
        >>> import torch
        >>> from ifa_torchrec.ops.jagged import request_of_row
        >>> request_of_row(torch.tensor([0, 2, 2, 3])).tolist()
        [0, 0, 2]
    """
    requests = torch.arange(offsets.shape[0] - 1, device=offsets.device)
    return torch.repeat_interleave(requests, offsets.diff(), output_size=rows)
