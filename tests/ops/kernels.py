"""Every backend, the native one with each instruction set that this machine has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ifa_torchrec.ops.kernels import native

SETS = native.INSTRUCTION_SETS
NATIVE = [] if native.LIBRARY is None else list(SETS[: SETS.index(native.STATUS) + 1])
KERNELS = ["reference", "torch", *NATIVE]


@contextmanager
def backend_of(kernels: str) -> Iterator[str]:
    """The backend that a name of KERNELS stands for, its instruction set chosen."""
    if kernels not in NATIVE:
        yield kernels
        return
    before, native.STATUS = native.STATUS, kernels
    try:
        yield "native"
    finally:
        native.STATUS = before
