"""What torch.autocast does to the operators: it casts the tokens and nothing else."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def as_autocast(tokens: Tensor) -> Tensor:
    """Cast tokens to autocast's dtype if autocast is on for their device.

    Of an operator's arguments only the tokens are cast: they are many, and they are what is multiplied.
    Projections, event weights and states keep their dtype, and sums are float32 whatever the tokens
    are. float64 stays float64, as everywhere under autocast.

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
    """A context in which autocast is off for the tensor's device.

    torch.library's register_autocast would cast all arguments of an operator to one dtype; the
    operators only cast the tokens (``as_autocast``) and always sum in float32.

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
