"""TorchRec's sharders, and in what their ranks send each other rows and gradients."""

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
    """float16 of gradients that are 4,096 times as large: it ends at 6e-8, and a row's may be less.

    fbgemm's own scale is taken back in float16, where they are then lost after all. What is above
    65,504 is clamped.
    """

    def encode(self, input_tensor: Tensor, ctx: QuantizationContext | None = None) -> Tensor:
        return super().encode(input_tensor * _HALF_GRADIENTS_TIMES, ctx)

    def decode(self, input_tensor: Tensor, ctx: QuantizationContext | None = None) -> Tensor:
        return super().decode(input_tensor, ctx) / _HALF_GRADIENTS_TIMES


class _BagSharder(EmbeddingBagCollectionSharder):
    """TorchRec leaves row_wise out for bags on a CPU, where it works."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        types = super().sharding_types(compute_device_type)
        return [*types, *({ShardingType.ROW_WISE.value} - set(types))]


def sharders(exchange: Exchange = "fp32", device: str = "cpu") -> list[ModuleSharder[Any]]:
    """TorchRec's sharders of the kinds of collections.

    Args:
        exchange: ShardingConfig's.
        device: "cpu" or "cuda".

    Raises:
        ShardingError: ranks of this device cannot exchange that.

    Example:
        >>> from ifa_torchrec.distributed.sharders import sharders
        >>> [sharder.module_type.__name__ for sharder in sharders()]
        ['EmbeddingBagCollection', 'EmbeddingCollection', 'ManagedCollisionEmbeddingCollection']
    """
    if exchange == "bf16" and device == "cpu":
        # TorchRec would take fp16 in its place, and say so in a log
        raise ShardingError(
            'sharding: exchange "bf16" is for GPUs: gloo, between ranks of a CPU, has none; use "fp16" '
            'or "fp32"'
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
