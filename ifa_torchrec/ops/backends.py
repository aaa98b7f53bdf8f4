"""Which kernels run: by the name of a backend, or for "auto" the fastest that serve."""

from __future__ import annotations

import warnings
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from types import ModuleType
from typing import Literal, get_args

import torch
from torch import Tensor

from ifa_torchrec.ops.kernels import native, reference
from ifa_torchrec.ops.kernels import torch as torch_kernels

Backend = Literal["auto", "native", "reference", "torch"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)


def check_backend(backend: str, tokens: Tensor, state: Tensor | None = None) -> None:
    """Refuse a backend that there is not, or that does not serve these tokens.

    Args:
        backend: its name.
        tokens: the history or the candidates.
        state: the key_value of attend.

    Raises:
        ValueError: it says why, and what would serve.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {list(BACKENDS)}, got {backend!r}")
    if backend == "reference" and tokens.is_meta:
        raise ValueError('backend "reference" reads values, which meta tensors lack: take "torch"')
    if backend == "native" and not native.serves(tokens, state):
        dtypes = tokens.dtype if state is None else f"{tokens.dtype} and a state of {state.dtype}"
        raise ValueError(
            f'backend "native" does not serve {dtypes} on {tokens.device.type}: it is for '
            f"float32 and bfloat16 on CPU; the kernels: {native.STATUS}"
        )


@contextmanager
def kernels_for(backend: str, tokens: Tensor, state: Tensor | None = None) -> Generator[ModuleType]:
    """The file of ``ops/kernels`` that runs here and now, with autocast off while it does.

    The operators' bodies ask it when they run, so that an exported graph, which holds the name alone,
    takes the kernels of the machine that runs it.

    Args:
        backend: its name.
        tokens: the history or the candidates.
        state: the key_value of attend.

    Raises:
        ValueError: as ``check_backend``.
    """
    check_backend(backend, tokens, state)
    if backend == "auto":
        if tokens.device.type == "cpu" and native.LIBRARY is None:
            warn_once(f"ifa_torchrec.ops: the native kernels are {native.STATUS}; torch serves, slower")
        backend = "native" if native.serves(tokens, state) else "torch"
    modules = {"native": native, "reference": reference, "torch": torch_kernels}
    with _without_autocast(tokens):
        yield modules[backend]


def _without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    # Not torch.library's register_autocast: that casts the arguments to one dtype, while here any are
    # served, and sums are float32 whatever they are.
    device = tensor.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


@cache
def warn_once(message: str) -> None:
    """A UserWarning, the first time that it is said in a process."""
    warnings.warn(message, stacklevel=2)
