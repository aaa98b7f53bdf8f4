"""Counts operations that would wait for a GPU, without needing one."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = {
    *("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "item"),
    *("unique_consecutive", "is_nonzero", "equal", "bincount"),
}
"""Operators whose result sizes or Python numbers depend on values: on a GPU they wait for it."""


class Waits(TorchDispatchMode):
    """Records the operators that would wait; indexing by a boolean tensor is a nonzero."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        indices = args[1] if name.startswith("index") and len(args) > 1 else ()
        by_mask = any(
            isinstance(x, torch.Tensor) and x.dtype == torch.bool
            for x in (indices if isinstance(indices, (list, tuple)) else ())
        )
        unsized = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in WAITS or by_mask or unsized:
            self.seen.append(name)
        return function(*args, **(kwargs or {}))
