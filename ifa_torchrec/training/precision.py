"""In what the dense part of a training multiplies: float32, TF32 or bfloat16; and what is compiled."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Literal

import torch

from ifa_torchrec.errors import ConfigError
from ifa_torchrec.models import DLRM_IFA
from ifa_torchrec.modules import SequenceInteraction

Precision = Literal["fp32", "tf32", "bf16"]


def check_precision(precision: Precision, device: torch.device) -> None:
    """Refuse a precision that the device has not.

    Args:
        precision: of the training.
        device: this rank's.

    Raises:
        ConfigError: it is TF32, and the device no GPU.

    Example:
        >>> import torch
        >>> from ifa_torchrec.training.precision import check_precision
        >>> check_precision("bf16", torch.device("cpu"))
    """
    if precision == "tf32" and device.type != "cuda":
        raise ConfigError(
            f"--precision tf32: TF32 is NVIDIA GPUs', and the device is {device.type}; give fp32 or bf16"
        )


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """What a forward pass and its loss run in: of "bf16" autocast, in which the tokens of the operators,
    and products that are made for every event, are bfloat16; weights, sums, what is made of candidates
    alone (SetArch) and the loss stay float32. Of the others it does nothing.

    Args:
        precision: as ``check_precision`` lets it pass.
        device: where the model is.

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
    """What a whole step, the backward too, runs in: of "tf32" float32 is multiplied in TF32 on GPUs, the
    operators' kernels included; the others leave torch's setting as it is.

    Args:
        precision: of the training.

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
    """Let torch.compile make of the dense part of every DLRM_IFA in a model graphs without a break, for
    batches of any size: what describes a candidate, and what scores it. Tables and loss stay as they
    are.

    Args:
        model: a DLRM_IFA, or what holds some.
        backend: torch.compile's.

    Raises:
        ConfigError: its interaction, or the candidate set's attention, reads sizes from the batch.

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
            if any(isinstance(m, SequenceInteraction) and m.reads_sizes for m in module.modules()):
                raise ConfigError(
                    f"--compile: interaction {config.interaction!r}, candidate_set attention "
                    f"{config.candidate_set.attention!r}: softmax, low_rank, eta, twin, sdim, solar "
                    "and hstu read sizes from the batch, which breaks a graph; train without --compile, "
                    "or with another"
                )
            for dense in (module.candidate_arch, module.set_arch):
                dense.compile(fullgraph=True, dynamic=True, backend=backend)
