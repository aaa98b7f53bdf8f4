"""Tables and lookups in plain PyTorch operators, for graphs without TorchRec or fbgemm."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec.modules.embedding_configs import DataType, PoolingType

from ifa_torchrec.models.sparse import PooledArch
from ifa_torchrec.serving.errors import StateError


def plain_tables(collection: Any, features: Iterable[str]) -> nn.ModuleList:
    """The table of each feature, as a module that maps ids [...] to rows [..., D] float32.

    Args:
        collection: TorchRec's collection of float32, float16 or int8 tables, pooled or not. The tables
            are shared, not copied.
        features: names of the features to look up.

    Raises:
        StateError: a table has another type.

    Example:
        >>> import torch
        >>> from torchrec import EmbeddingCollection, EmbeddingConfig
        >>> from ifa_torchrec.serving.plain_tables import plain_tables
        >>> tables = EmbeddingCollection(tables=[EmbeddingConfig(
        ...     name="item", embedding_dim=4, num_embeddings=10, feature_names=["candidate_item"])])
        >>> (table,) = plain_tables(tables, ["candidate_item"])
        >>> table(torch.tensor([[1], [2]])).shape
        torch.Size([2, 1, 4])
    """
    if hasattr(collection, "embedding_bags"):
        configs, tables = collection.embedding_bag_configs(), collection.embedding_bags
    else:
        configs, tables = collection.embedding_configs(), collection.embeddings
    result = {}
    for config in configs:
        weight = tables[config.name].weight
        if config.data_type == DataType.FP32:
            table = nn.Embedding.from_pretrained(weight)
        elif config.data_type == DataType.FP16 and weight.dtype == torch.float16:
            table = HalfTable(weight)  # not TorchRec's quantised FP16, whose rows are packed
        elif config.data_type == DataType.INT8:
            table = Int8Table(weight, config.embedding_dim)
        else:
            raise StateError(
                f"table {config.name!r} has type {config.data_type.value}, which cannot be exported; "
                "use float32, int8, or float16 from training"
            )
        result |= dict.fromkeys(config.feature_names, table)
    return nn.ModuleList(result[feature] for feature in features)


class HalfTable(nn.Embedding):
    """A table trained in float16.

    Args:
        weight: [rows, D] float16, shared.

    Example:
        >>> import torch
        >>> from ifa_torchrec.serving.plain_tables import HalfTable
        >>> HalfTable(torch.tensor([[0.5, 1.0]], dtype=torch.float16))(torch.tensor([0])).dtype
        torch.float32
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight.shape[0], weight.shape[1], _weight=weight, _freeze=True)

    def forward(self, input: Tensor) -> Tensor:
        """Rows [*input.shape, D] float32."""
        return super().forward(input).float()


class Int8Table(nn.Module):
    """An int8 quantised table, read without fbgemm.

    Args:
        packed: [rows, 4 + D or more] uint8. Each row is 4 bytes (scale and bias in float16), then the D
            values, then alignment padding.
        dim: D.

    Example:
        >>> import torch
        >>> from ifa_torchrec.serving.plain_tables import Int8Table
        >>> scale_bias = torch.tensor([[0.5, 1.0]], dtype=torch.float16).view(torch.uint8)
        >>> packed = torch.cat([scale_bias, torch.tensor([[0, 2, 8]], dtype=torch.uint8)], dim=1)
        >>> Int8Table(packed, dim=3)(torch.tensor([0])).tolist()
        [[1.0, 2.0, 5.0]]
    """

    values: Tensor
    scale_bias: Tensor

    def __init__(self, packed: Tensor, dim: int) -> None:
        super().__init__()
        # copied: contiguous() would return a one-row slice as it is, with an odd stride
        scale_bias = packed[:, :4].clone(memory_format=torch.contiguous_format)
        self.register_buffer("values", packed[:, 4 : 4 + dim].contiguous())
        self.register_buffer("scale_bias", scale_bias.view(torch.float16))

    def forward(self, ids: Tensor) -> Tensor:
        """Rows [*ids.shape, D] float32."""
        scale, bias = F.embedding(ids, self.scale_bias).float().split(1, dim=-1)
        return F.embedding(ids, self.values).float() * scale + bias


class PlainPooledArch(nn.Module):
    """A PooledArch without TorchRec's lookups.

    Args:
        arch: PooledArch with float32, float16 or int8 tables, which are shared.

    Raises:
        StateError: a table has another type.

    Example:
        >>> import torch
        >>> from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
        >>> from ifa_torchrec.models.sparse import PooledArch
        >>> from ifa_torchrec.serving.plain_tables import PlainPooledArch
        >>> arch = PooledArch(EmbeddingBagCollection(tables=[EmbeddingBagConfig(
        ...     name="genre", embedding_dim=4, num_embeddings=10, feature_names=["genre"])]), dim=8)
        >>> PlainPooledArch(arch)({"genre": torch.tensor([1, 2])}).shape
        torch.Size([1, 1, 8])
    """

    def __init__(self, arch: PooledArch) -> None:
        super().__init__()
        collection: Any = arch.embedding_bag_collection
        self.names = list(arch.sparse_feature_names)
        self.tables = plain_tables(collection, self.names)
        self.projections = arch.projections
        self.means = {
            name
            for config in collection.embedding_bag_configs()
            for name in config.feature_names
            if config.pooling == PoolingType.MEAN
        }

    @staticmethod
    def of(arch: PooledArch | None) -> PlainPooledArch | None:
        """The plain version of a model's PooledArch; None if the model has none."""
        return None if arch is None else PlainPooledArch(arch)

    def forward(
        self, ids: dict[str, Tensor], row: dict[str, Tensor] | None = None, rows: int = 1
    ) -> Tensor:
        """
        Args:
            ids: the ids of each feature, [L].
            row: for each feature, the output row that each id is pooled into, [L]; None if there is
                only one.
            rows: number of output rows.

        Returns:
            [rows, features, D].
        """
        pooled: list[Tensor] = []
        for name, table in zip(self.names, self.tables, strict=True):
            found = table(ids[name])
            ones = found.new_ones(found.shape[0], 1)
            if row is None:
                whole, count = found.sum(0, keepdim=True), ones.sum(0, keepdim=True)
            else:
                whole = found.new_zeros(rows, found.shape[1]).index_add(0, row[name], found)
                count = found.new_zeros(rows, 1).index_add(0, row[name], ones)
            if name in self.means:
                whole = whole / count.clamp(min=1)
            pooled.append(self.projections(whole, name))
        return torch.stack(pooled, dim=1)
