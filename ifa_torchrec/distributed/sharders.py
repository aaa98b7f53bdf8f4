"""TorchRec's sharders, and the number formats in which ranks exchange rows and gradients."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from fbgemm_gpu.quantize_comm import QuantizationContext, QuantizedCommCodec
from fbgemm_gpu.split_embedding_configs import SparseType
from torch import Tensor
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.fbgemm_qcomm_codec import (
    CommType,
    QCommsConfig,
    get_qcomm_codecs_registry,
)
from torchrec.distributed.mc_embedding import ManagedCollisionEmbeddingCollectionSharder
from torchrec.distributed.types import ModuleSharder, ShardingType

from ifa_torchrec.distributed.errors import ShardingError

Exchange = Literal["fp32", "fp16", "bf16"]
_HALF_GRADIENTS_TIMES = 4096.0


class _ScaledCodec(QuantizedCommCodec):
    """float16 for gradients scaled by 4,096: float16 ends at 6e-8, and a row's gradient may be smaller.

    fbgemm undoes its own scale in float16, which loses small gradients after all. Scaled values above
    65,504 are clamped.
    """

    def encode(self, input_tensor: Tensor, ctx: QuantizationContext | None = None) -> Tensor:
        return super().encode(input_tensor * _HALF_GRADIENTS_TIMES, ctx)

    def decode(self, input_tensor: Tensor, ctx: QuantizationContext | None = None) -> Tensor:
        return super().decode(input_tensor, ctx) / _HALF_GRADIENTS_TIMES


class _BagSharder(EmbeddingBagCollectionSharder):
    """Adds row_wise for bags on a CPU, which TorchRec leaves out although it works."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        types = super().sharding_types(compute_device_type)
        return [*types, *({ShardingType.ROW_WISE.value} - set(types))]


def sharders(exchange: Exchange = "fp32", device: str = "cpu") -> list[ModuleSharder[Any]]:
    """TorchRec's sharders, one for each type of collection.

    Args:
        exchange: as in ShardingConfig.
        device: "cpu" or "cuda".

    Raises:
        ShardingError: this device's ranks cannot exchange that format.

    Example:
        >>> from ifa_torchrec.distributed.sharders import sharders
        >>> [sharder.module_type.__name__ for sharder in sharders()]
        ['EmbeddingBagCollection', 'EmbeddingCollection', 'ManagedCollisionEmbeddingCollection']
    """
    if exchange == "bf16" and device == "cpu":
        # TorchRec would fall back to fp16 and only log it
        raise ShardingError(
            'sharding: exchange "bf16" needs GPUs: gloo, which connects CPU ranks, cannot send it; use '
            '"fp16" or "fp32"'
        )
    kind = CommType(exchange)
    codecs = get_qcomm_codecs_registry(QCommsConfig(kind, kind), device=torch.device(device))
    if codecs is not None and exchange == "fp16":
        for codec in codecs.values():
            codec.backward = cast(Any, _ScaledCodec(SparseType.FP16, is_fwd=False))
    return [
        _BagSharder(qcomm_codecs_registry=codecs),
        EmbeddingCollectionSharder(qcomm_codecs_registry=codecs),
        ManagedCollisionEmbeddingCollectionSharder(qcomm_codecs_registry=codecs),
    ]
