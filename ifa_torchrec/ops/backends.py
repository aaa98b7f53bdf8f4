"""Which kernels run: those of the named backend, or for "auto" the fastest available."""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Literal, get_args

import torch
from torch import Tensor

from ifa_torchrec.ops.autocast import without_autocast
from ifa_torchrec.ops.kernels import native, reference
from ifa_torchrec.ops.kernels import torch as torch_kernels

Backend = Literal["auto", "native", "reference", "torch", "triton"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def triton_serves(tokens: Tensor, state: Tensor | None = None) -> bool:
    """Whether Triton is installed and has kernels for tokens and a state of this device and dtype.

    On CPU its interpreter serves, for tests. Triton itself is imported when the first kernel is called.
    """
    device = tokens.device.type
    if not TRITON_IS_INSTALLED or (state is not None and state.dtype == torch.float64):
        return False
    if (
        device == "cuda"
        and not torch.version.hip
        and torch.cuda.get_device_capability(tokens.device) < (8, 0)
    ):
        return False  # no tensor cores for TF32 and bfloat16
    interpreted = device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    return tokens.dtype in _TRITON_DTYPES and (device == "cuda" or interpreted)


def check_backend(backend: str, tokens: Tensor, state: Tensor | None = None) -> None:
    """Raise a ValueError if the backend is unknown or does not support these tokens.

    Args:
        backend: its name.
        tokens: the history or the candidates.
        state: attend's key_value or attend_softmax's summaries.

    Raises:
        ValueError: the backend cannot be used; the message says why and what would work.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {list(BACKENDS)}, got {backend!r}")
    if backend == "reference" and tokens.is_meta:
        raise ValueError('backend "reference" reads values, which meta tensors lack: use "torch"')
    if backend == "native" and not native.serves(tokens, state):
        dtypes = tokens.dtype if state is None else f"{tokens.dtype} and a state of {state.dtype}"
        raise ValueError(
            f'backend "native" does not support {dtypes} on {tokens.device.type}: it is for '
            f"float32 and bfloat16 on CPU; the kernels: {native.STATUS}"
        )
    if backend == "triton" and not triton_serves(tokens, state):
        dtypes = tokens.dtype if state is None else f"{tokens.dtype} and a state of {state.dtype}"
        installed = "installed" if TRITON_IS_INSTALLED else "not installed"
        raise ValueError(
            f'backend "triton" does not support {dtypes} on {tokens.device.type}: it is for float32, '
            f"bfloat16 and float16 on CUDA, on CPU with TRITON_INTERPRET=1; Triton is {installed}"
        )


@contextmanager
def kernels_for(backend: str, tokens: Tensor, state: Tensor | None = None) -> Generator[ModuleType]:
    """The module of ``ops/kernels`` to call, with autocast off inside the context.

    The operators resolve it each time they run, so that an exported graph, which stores only the
    backend's name, uses the kernels of the machine that runs it.

    Args:
        backend: its name.
        tokens: the history or the candidates.
        state: attend's key_value or attend_softmax's summaries.

    Raises:
        ValueError: as ``check_backend``.
    """
    check_backend(backend, tokens, state)
    if backend == "auto":
        backend = fastest(tokens, state)
    with without_autocast(tokens):
        if backend == "triton":
            yield importlib.import_module("ifa_torchrec.ops.kernels.triton")
        else:
            yield {"native": native, "reference": reference, "torch": torch_kernels}[backend]


def fastest(tokens: Tensor, state: Tensor | None = None) -> str:
    """The backend that "auto" stands for, for tokens and a state of this device and dtype."""
    if tokens.device.type == "cpu":
        if native.LIBRARY is None:
            warn_once(
                f"ifa_torchrec.ops: the native kernels are {native.STATUS}; "
                "using the slower torch backend"
            )
        return "native" if native.serves(tokens, state) else "torch"
    if tokens.device.type == "cuda" and not TRITON_IS_INSTALLED:
        warn_once("ifa_torchrec.ops: Triton is not installed; using the slower torch backend")
    return "triton" if triton_serves(tokens, state) else "torch"


@cache
def warn_once(message: str) -> None:
    """Issue a UserWarning, once per process and message."""
    warnings.warn(message, stacklevel=2)
