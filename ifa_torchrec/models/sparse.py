"""The modules of a DLRM_IFA that look up ids: in pooled tables and in tables of the sequences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torchrec.models.dlrm import SparseArch
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from ifa_torchrec.models.config import DLRM_IFAConfig


def tables_of(
    collection: EmbeddingCollection | ManagedCollisionEmbeddingCollection,
) -> list[EmbeddingConfig]:
    """The tables' configs, also within a ManagedCollisionEmbeddingCollection.

    Example:
        >>> from torchrec import EmbeddingCollection, EmbeddingConfig
        >>> from ifa_torchrec.models.sparse import tables_of
        >>> tables = EmbeddingCollection(tables=[EmbeddingConfig(
        ...     name="item", embedding_dim=4, num_embeddings=10, feature_names=["candidate_item"])])
        >>> [table.name for table in tables_of(tables)]
        ['item']
    """
    if isinstance(collection, ManagedCollisionEmbeddingCollection):
        collection = next(m for m in collection.modules() if isinstance(m, EmbeddingCollection))
    return collection.embedding_configs()


class TableProjections(nn.Module):
    """Projects the rows of tables with another width to width D, by one matrix per table.

    Args:
        tables: the tables' configs; rows of width D are not projected.
        dim: D.

    Example:
        >>> import torch
        >>> from torchrec import EmbeddingConfig
        >>> from ifa_torchrec.models.sparse import TableProjections
        >>> projections = TableProjections([EmbeddingConfig(
        ...     name="item", embedding_dim=4, num_embeddings=10, feature_names=["candidate_item"])], 8)
        >>> projections(torch.zeros(3, 4), "candidate_item").shape
        torch.Size([3, 8])
    """

    def __init__(self, tables: Sequence[BaseEmbeddingConfig], dim: int) -> None:
        super().__init__()
        self.table_of = {feature: table.name for table in tables for feature in table.feature_names}
        self.linears = nn.ModuleDict(
            {
                t.name: nn.Linear(t.embedding_dim, dim, bias=False)
                for t in tables
                if t.embedding_dim != dim
            }
        )

    def forward(self, rows: Tensor, feature: str) -> Tensor:
        """
        Args:
            rows: [n, width of the feature's table].
            feature: name of the feature.

        Returns:
            [n, D].
        """
        table = self.table_of[feature]
        return self.linears[table](rows) if table in self.linears else rows


class PooledArch(SparseArch):
    """TorchRec's SparseArch, for tables of any width.

    Args:
        embedding_bag_collection: the tables.
        dim: D.

    Example:
        >>> import torch
        >>> from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
        >>> from ifa_torchrec.models.sparse import PooledArch
        >>> arch = PooledArch(EmbeddingBagCollection(tables=[EmbeddingBagConfig(
        ...     name="genre", embedding_dim=4, num_embeddings=10, feature_names=["genre"])]), dim=8)
        >>> arch(KeyedJaggedTensor(["genre"], torch.tensor([1, 2]), lengths=torch.tensor([2, 0]))).shape
        torch.Size([2, 1, 8])
    """

    def __init__(self, embedding_bag_collection: EmbeddingBagCollection, dim: int) -> None:
        super().__init__(embedding_bag_collection)
        self.weighted = embedding_bag_collection.is_weighted()
        self.projections = TableProjections(embedding_bag_collection.embedding_bag_configs(), dim)

    def forward(self, features: KeyedJaggedTensor | None) -> Tensor:
        """
        Args:
            features: KJT of stride S, any number of ids per feature.

        Returns:
            [S, features, D].

        Raises:
            ValueError: ``features`` is None.
        """
        if features is None:
            raise ValueError(
                f"batch: the model has tables for {self.sparse_feature_names}; pass these features"
            )
        pooled = self.embedding_bag_collection(features)
        names = self.sparse_feature_names
        return torch.stack([self.projections(pooled[name], name) for name in names], dim=1)


class SequenceArch(nn.Module):
    """Looks up events and candidates in shared tables and sums each one's features.

    Each event is looked up once per request, whatever the number of candidates.

    Args:
        embedding_collection: tables with the configuration's history and candidate keys. TorchRec's
            ManagedCollisionEmbeddingCollection gives frequent ids their own rows.
        config: DLRM_IFAConfig; with interaction "none" the histories are not looked up.

    Example:
        >>> import torch
        >>> from torchrec import EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
        >>> from ifa_torchrec import DLRM_IFAConfig, IFAConfig
        >>> from ifa_torchrec.models.sparse import SequenceArch
        >>> arch = SequenceArch(EmbeddingCollection(tables=[EmbeddingConfig(
        ...     name="item", embedding_dim=4, num_embeddings=10,
        ...     feature_names=["history_item", "candidate_item"])]),
        ...     DLRM_IFAConfig(("item",), ifa=IFAConfig(8)))
        >>> history, candidates = arch(KeyedJaggedTensor.from_lengths_sync(
        ...     keys=["history_item", "candidate_item"],
        ...     values=torch.tensor([5, 6, 7]), lengths=torch.tensor([2, 1])))
        >>> history.values().shape, candidates.values().shape
        (torch.Size([2, 8]), torch.Size([1, 8]))
    """

    def __init__(
        self,
        embedding_collection: EmbeddingCollection | ManagedCollisionEmbeddingCollection,
        config: DLRM_IFAConfig,
    ) -> None:
        super().__init__()
        self.embedding_collection = embedding_collection
        self.config = config
        self.managed = isinstance(embedding_collection, ManagedCollisionEmbeddingCollection)
        tables = tables_of(embedding_collection)
        self.projections = TableProjections(tables, config.ifa.embedding_dim)

    def forward(self, features: KeyedJaggedTensor) -> tuple[JaggedTensor | None, JaggedTensor]:
        """
        Args:
            features: KJT of stride B.

        Returns:
            The embeddings of the events [N, D] (None if no history is looked up) and of the candidates
            [M, D], each as a JaggedTensor of B requests.
        """
        embeddings = self.embedding_collection(features)
        if self.managed:  # it returns a pair: the rows and the remapped ids
            embeddings = embeddings[0]
        keys = self.config.history_keys.values()
        history = self._summed(embeddings, keys) if keys else None
        return history, self._summed(embeddings, self.config.candidate_keys.values())

    def _summed(self, embeddings: dict[str, JaggedTensor], keys: Iterable[str]) -> JaggedTensor:
        first, *others = keys
        whole = embeddings[first]
        values = self.projections(whole.values(), first)
        for key in others:
            values = values + self.projections(embeddings[key].values(), key)
        return JaggedTensor(values, lengths=whole.lengths(), offsets=whole.offsets())
