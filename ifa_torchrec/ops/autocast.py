"""What torch.autocast does to the operators: tokens are cast, and nothing else."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def as_autocast(tokens: Tensor) -> Tensor:
    """Tokens in the dtype that autocast multiplies in, where it is on: the operators' rule of it.

    Of an operator's arguments it is the tokens alone, which are many and what is multiplied.
    Projections, event weights and states stay as they are, and sums are float32 whatever tokens are.
    float64 stays float64, as everywhere under autocast.

    Example:
        >>> import torch
        >>> from ifa_torchrec.ops.autocast import as_autocast
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
        >>> from ifa_torchrec.ops.autocast import without_autocast
        >>> x = torch.zeros(2, 2)
        >>> with torch.autocast("cpu", torch.bfloat16), without_autocast(x):
        ...     (x @ x).dtype
        torch.float32
    """
    device = tensor.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)
