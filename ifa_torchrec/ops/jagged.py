"""Helpers for jagged rows."""

from __future__ import annotations

import torch
from torch import Tensor


def on_cpu(x: Tensor) -> bool:
    """Whether values can be read without waiting for a device.

    Example:
        >>> import torch
        >>> from ifa_torchrec.ops.jagged import on_cpu
        >>> on_cpu(torch.zeros(1)), on_cpu(torch.zeros(1, device="meta"))
        (True, False)
    """
    return x.device.type == "cpu"


def checkable(x: Tensor) -> bool:
    """Whether values can be read to check them; not on a GPU, where that waits for the device, nor in a
    compiled graph.

    Example:
        >>> import torch
        >>> from ifa_torchrec.ops.jagged import checkable
        >>> checkable(torch.zeros(1)), checkable(torch.zeros(1, device="meta"))
        (True, False)
    """
    return on_cpu(x) and not torch.compiler.is_compiling()


def request_of_row(offsets: Tensor, rows: int | None = None) -> Tensor:
    """The request that each row belongs to.

    Args:
        offsets: [B + 1] int64, request b's rows are offsets[b]:offsets[b + 1].
        rows: offsets[-1], if known; without it the tensor is read, which on a GPU waits for the device
            and in an exported graph creates a new dynamic size.

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


def rows_of_requests(offsets: Tensor, rows: int) -> list[int]:
    """How many rows each request has.

    For a single request that is ``rows``, and no tensor is read, so that an exported graph of one
    request gets no new dynamic size.

    Args:
        offsets: [B + 1] int64, request b's rows are offsets[b]:offsets[b + 1].
        rows: offsets[-1].

    Returns:
        B numbers.

    Example:
        >>> import torch
        >>> from ifa_torchrec.ops.jagged import rows_of_requests
        >>> rows_of_requests(torch.tensor([0, 2, 2, 3]), 3)
        [2, 0, 1]
    """
    return [rows] if offsets.shape[0] == 2 else offsets.diff().tolist()
