"""Int8 tables for serving."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torchrec import EmbeddingCollection
from torchrec.inference.modules import quantize_embeddings
from torchrec.quant.embedding_modules import EmbeddingCollection as QuantEmbeddingCollection

from ifa_torchrec.errors import ConfigError
from ifa_torchrec.models import DLRM_IFA


def quantize_tables(model: DLRM_IFA) -> DLRM_IFA:
    """Quantise a model's tables to int8 with TorchRec; each row has its own scale and bias.

    The dense part is shared with the given model, not copied. The state layout does not change: states
    built with float tables can be read and added to.

    Args:
        model: DLRM_IFA whose tables are unsharded, as ``load_run(..., sharded=False)`` returns it; its
            own tables stay float.

    Returns:
        DLRM_IFA for inference: its tables have no gradients.

    Raises:
        ConfigError: the model has managed-collision tables.

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
        raise ConfigError("quantize_tables: managed-collision tables cannot be quantised")
    pooled = {"context": model.sparse_arch, "lists": model.item_sparse_arch}
    floats: dict[str, nn.Module] = {"sequences": model.sequence_arch.embedding_collection}
    floats |= {name: arch.embedding_bag_collection for name, arch in pooled.items() if arch is not None}
    quantised: Any = nn.ModuleDict(floats)  # Any: DLRM_IFA's argument is typed as a float collection
    quantize_embeddings(
        quantised,
        torch.qint8,
        inplace=True,  # in the dict; the model's own tables are neither replaced nor copied
        additional_qconfig_spec_keys=[EmbeddingCollection],
        additional_mapping={EmbeddingCollection: QuantEmbeddingCollection},
    )
    for collection in floats.values():
        del collection.qconfig  # PyTorch leaves it behind and would use it the next time
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
