"""Tables of fewer bits, for machines that serve."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torchrec import EmbeddingCollection
from torchrec.inference.modules import quantize_embeddings
from torchrec.quant.embedding_modules import EmbeddingCollection as QuantEmbeddingCollection

from ifa_torchrec.errors import ConfigError
from ifa_torchrec.models import DLRM_IFA


def quantize_tables(model: DLRM_IFA, dtype: torch.dtype = torch.qint8) -> DLRM_IFA:
    """The model with TorchRec's quantised tables, each row with a scale and a bias of its own.

    The dense part stays as it is and is the given model's own, not a copy. States keep their layout:
    those that float tables made can be read and added to.

    Args:
        model: DLRM_IFA whose tables are whole on this process, as ``load_run(..., sharded=False)``
            gives it; its tables stay float.
        dtype: torch.qint8, torch.quint4x2 or torch.float16.

    Returns:
        DLRM_IFA for inference: it has no gradients of its tables.

    Raises:
        ValueError: collisions are managed around its tables.

    Example:
        >>> import torch
        >>> from torchrec import EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
        >>> from ifa_torchrec import DLRM_IFA, DLRM_IFAConfig, IFAConfig
        >>> from ifa_torchrec.batch import RankingFeatures
        >>> from ifa_torchrec.serving import quantize_tables
        >>> tables = EmbeddingCollection(tables=[EmbeddingConfig(
        ...     name="item", embedding_dim=8, num_embeddings=100,
        ...     feature_names=["history_item", "candidate_item"])])
        >>> model = DLRM_IFA(None, tables, DLRM_IFAConfig(("item",), ifa=IFAConfig(8, num_heads=2)))
        >>> events = KeyedJaggedTensor(["history_item", "candidate_item"], torch.arange(4),
        ...     lengths=torch.tensor([4, 0]))
        >>> history = RankingFeatures(torch.zeros(1, 0), KeyedJaggedTensor.empty(), events,
        ...     torch.zeros(0, 0), history_age=torch.zeros(4))
        >>> quantize_tables(model).encode(history).count.tolist()
        [4]
    """
    if model.sequence_arch.managed:
        raise ConfigError("quantize_tables: tables of managed collisions cannot be quantised")
    pooled = {"context": model.sparse_arch, "lists": model.item_sparse_arch}
    floats: dict[str, nn.Module] = {"sequences": model.sequence_arch.embedding_collection}
    floats |= {name: arch.embedding_bag_collection for name, arch in pooled.items() if arch is not None}
    quantised: Any = nn.ModuleDict(floats)  # Any: DLRM_IFA's argument is typed as a float collection
    quantize_embeddings(
        quantised,
        dtype,
        inplace=True,  # in the dict, that is; the model's own are neither replaced nor copied
        additional_qconfig_spec_keys=[EmbeddingCollection],
        additional_mapping={EmbeddingCollection: QuantEmbeddingCollection},
    )
    for collection in floats.values():
        del collection.qconfig  # left behind by PyTorch, which would heed it the next time
    context, lists = (quantised[name] if name in floats else None for name in pooled)
    bags = context if lists is None else (context, lists)
    result = DLRM_IFA(bags, quantised["sequences"], model.config)
    for name in ("candidate_arch", "set_arch", "taken_arch"):
        setattr(result, name, getattr(model, name))
    result.sequence_arch.projections = model.sequence_arch.projections
    for mine, theirs in zip((result.sparse_arch, result.item_sparse_arch), pooled.values(), strict=True):
        if mine is not None and theirs is not None:
            mine.projections = theirs.projections
    return result
