"""Precision of the dense part during training (float32, TF32 or bfloat16), and its compilation."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Literal

import torch

from ifa_torchrec.errors import ConfigError
from ifa_torchrec.models import DLRM_IFA
from ifa_torchrec.modules import IFAConfig, SequenceInteraction
from ifa_torchrec.modules.interactions import INTERACTIONS

Precision = Literal["fp32", "tf32", "bf16"]


def check_precision(precision: Precision, device: torch.device) -> None:
    """Refuse a precision that the device does not support.

    Args:
        precision: the training's precision.
        device: this rank's device.

    Raises:
        ConfigError: the precision is TF32, and the device is not a GPU.

    Example:
        >>> import torch
        >>> from ifa_torchrec.training.precision import check_precision
        >>> check_precision("bf16", torch.device("cpu"))
    """
    if precision == "tf32" and device.type != "cuda":
        raise ConfigError(
            f"--precision tf32 needs an NVIDIA GPU, got device {device.type}; give fp32 or bf16"
        )


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """The context for a forward pass and its loss. For "bf16" it is autocast: the operators' tokens and
    the products for every event are bfloat16; weights, sums, layers that see only candidates (SetArch)
    and the loss stay float32. For other precisions it does nothing.

    Args:
        precision: checked by ``check_precision``.
        device: the model's device.

    Example:
        >>> import torch
        >>> from ifa_torchrec.training.precision import autocast
        >>> with autocast("bf16", torch.device("cpu")):
        ...     torch.nn.Linear(8, 1)(torch.zeros(2, 8)).dtype
        torch.bfloat16
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


@contextmanager
def tf32_where_asked(precision: Precision) -> Generator[None]:
    """The context for a whole step, including the backward pass. For "tf32", GPUs multiply float32 in
    TF32, also in the operators' kernels; for other precisions torch's setting is unchanged.

    Args:
        precision: the training's precision.

    Example:
        >>> import torch
        >>> from ifa_torchrec.training.precision import tf32_where_asked
        >>> with tf32_where_asked("tf32"):
        ...     torch.backends.cuda.matmul.fp32_precision
        'tf32'
    """
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    if precision == "tf32":
        matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def compile_dense(model: torch.nn.Module, backend: str = "inductor") -> None:
    """Compile the dense part of every DLRM_IFA in a model with torch.compile, for batches of any size:
    one graph without breaks that describes candidates and one that scores them. Tables and loss are not
    compiled.

    Args:
        model: a DLRM_IFA, or a module that contains some.
        backend: torch.compile's backend.

    Raises:
        ConfigError: the interaction, or the candidate set's attention, reads sizes from the batch.

    Example:
        >>> from torchrec import EmbeddingCollection, EmbeddingConfig
        >>> from ifa_torchrec import DLRM_IFA, DLRM_IFAConfig, IFAConfig
        >>> from ifa_torchrec.training.precision import compile_dense
        >>> tables = EmbeddingCollection(tables=[EmbeddingConfig(
        ...     name="item", embedding_dim=8, num_embeddings=100,
        ...     feature_names=["history_item", "candidate_item"])])
        >>> compile_dense(DLRM_IFA(None, tables, DLRM_IFAConfig(("item",), ifa=IFAConfig(8))))
    """
    for module in model.modules():
        if isinstance(module, DLRM_IFA):
            config = module.config
            if _reads_sizes(module):
                attention = config.candidate_set.attention
                raise ConfigError(
                    f"--compile: interaction {config.interaction!r} or candidate_set attention "
                    f"{attention!r} reads sizes from the batch, which breaks a graph; train without "
                    f"--compile, or with one of {_compilable()} and attention 'none' or 'linear'"
                )
            for dense in (module.candidate_arch, module.set_arch):
                dense.compile(fullgraph=True, dynamic=True, backend=backend)


def _reads_sizes(module: torch.nn.Module) -> bool:
    """Whether an interaction in the module reads sizes from the batch."""
    return any(isinstance(m, SequenceInteraction) and m.reads_sizes for m in module.modules())


def _compilable() -> list[str]:
    """The names of the interactions that can be compiled."""
    built = {name: build(IFAConfig(8), 1, "item") for name, build in INTERACTIONS.items()}
    return [name for name, module in built.items() if module is None or not _reads_sizes(module)]
