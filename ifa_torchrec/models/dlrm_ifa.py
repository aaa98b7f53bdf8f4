"""DLRM_IFA: a DLRM that ranks a candidate set against a whole history.

Data flow, for B requests, M candidates and N events in all:

    context_features -> SparseArch [B, Fs, D] ----+-> InteractionArch -> [M, products] -----+
    dense_features [B, F] -> request_arch [B, D] -+--------------------------> [M, D] --+   |
    candidate_dense [M, Fc] -> candidate_dense_arch -------------------------> [M, D] --+
    sequence_features -> SequenceArch -+- candidate tokens ------------------> [M, D] --+
                                       +- history tokens [N, D] -> interaction [M, D] --+
                           the sum of these four -> CandidateSetEncoder -> [M, D] ------+
                                                   InteractionArch -> OverArch [M, T] <-+---+

As in a DLRM every two features meet by a dot product: those of the request with each other, once a
request; and with the candidate's token.

Everything on the left of a [B, D] or [N, D] happens once a request, not once a candidate. Only the
CandidateSetEncoder lets candidates of a request see each other. SparseArch,
DenseArch, InteractionArch and OverArch are TorchRec's. What stands above the CandidateSetEncoder is
CandidateArch; it and what follows are SetArch.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torchrec.models.dlrm import SparseArch
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from ifa_torchrec.batch import RankingBatch, RankingFeatures
from ifa_torchrec.errors import ConfigError
from ifa_torchrec.models.archs import CandidateArch, Candidates, SequenceArch, SetArch, tables_of
from ifa_torchrec.models.config import DLRM_IFAConfig
from ifa_torchrec.modules import (
    CandidateSetLoss,
    CandidateSetLossConfig,
    SequenceInteraction,
    UserState,
)
from ifa_torchrec.modules.projections import reset_all


class DLRM_IFA(nn.Module):
    """A DLRM whose candidates meet the user's whole history.

    Args:
        embedding_bag_collection: tables of the context features, all of width D; None where the
            batch has no context features.
        embedding_collection: tables of the sequence features, all of width D, each shared by a
            history feature and its candidate feature; or a ManagedCollisionEmbeddingCollection.
        config: DLRM_IFAConfig.
        interaction: a SequenceInteraction, in place of the one that the configuration names.
        dense_device: of the dense part; None for torch's default.

    Raises:
        ValueError: a table's width is not D, or a sequence feature has no table.

    Example:
        >>> import torch
        >>> from torchrec import EmbeddingCollection, EmbeddingConfig
        >>> from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
        >>> from ifa_torchrec import DLRM_IFA, DLRM_IFAConfig, IFAConfig
        >>> from ifa_torchrec.batch import RankingFeatures
        >>> tables = EmbeddingCollection(tables=[EmbeddingConfig(
        ...     name="item", embedding_dim=8, num_embeddings=100,
        ...     feature_names=["history_item", "candidate_item"])])
        >>> model = DLRM_IFA(None, tables, DLRM_IFAConfig(("item",), ifa=IFAConfig(8, num_heads=2)))
        >>> sequence = KeyedJaggedTensor.from_lengths_sync(
        ...     keys=["history_item", "candidate_item"],
        ...     values=torch.arange(9), lengths=torch.tensor([4, 0, 3, 2]))
        >>> none = KeyedJaggedTensor.from_lengths_sync([], torch.empty(0), torch.empty(0).long())
        >>> features = RankingFeatures(
        ...     torch.zeros(2, 0), none, sequence, torch.zeros(5, 0), history_age=torch.rand(4))
        >>> model(features).shape
        torch.Size([5, 1])
    """

    def __init__(
        self,
        embedding_bag_collection: EmbeddingBagCollection | None,
        embedding_collection: EmbeddingCollection | ManagedCollisionEmbeddingCollection,
        config: DLRM_IFAConfig,
        interaction: SequenceInteraction | None = None,
        dense_device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        bags = embedding_bag_collection.embedding_bag_configs() if embedding_bag_collection else []
        tables = tables_of(embedding_collection)
        for table in (*bags, *tables):
            if table.embedding_dim != config.ifa.embedding_dim:
                raise ValueError(
                    f"DLRM_IFA: table {table.name!r} has embedding_dim {table.embedding_dim}, the "
                    f"configuration's is {config.ifa.embedding_dim}"
                )
        named = {name for table in tables for name in table.feature_names}
        for name in (prefix + f for prefix in config.prefixes for f in config.item_features):
            if name not in named:
                raise ValueError(
                    f"DLRM_IFA: the embedding collection has no feature {name!r}; "
                    f"there are {sorted(named)}"
                )
        self.sparse_arch = SparseArch(embedding_bag_collection) if embedding_bag_collection else None
        self.sequence_arch = SequenceArch(embedding_collection, config.item_features)
        with nullcontext() if dense_device is None else torch.device(dense_device):
            features = sum(len(bag.feature_names) for bag in bags)
            self.candidate_arch = CandidateArch(config, features, interaction)
            widths = self.candidate_arch.num_vectors, self.candidate_arch.out_features
            self.set_arch = SetArch(config, *widths)
        if embedding_bag_collection is not None:
            self.candidate_arch.weighted_context = embedding_bag_collection.is_weighted()

    def reset_parameters(self) -> None:
        """Give all parameters their start again, tables as well; also after ``to_empty``."""
        reset_all(self)

    def forward(self, features: RankingFeatures) -> Tensor:
        """
        Args:
            features: of B requests, M candidates and N events; a RankingBatch is some, too.

        Returns:
            Logits [M, T].

        Raises:
            ValueError: the features do not fit each other or the model.
        """
        return self.set_arch(self.describe(features))

    def describe(self, features: RankingFeatures) -> Candidates:
        """Each candidate by itself; ``set_arch`` scores them, or some of them as if there were no
        others."""
        context = self.sparse_arch(features.context_features) if self.sparse_arch else None
        history, candidates = self.sequence_arch(features.sequence_features)
        return self.candidate_arch(context, history, candidates, features)

    def attend(self, features: RankingFeatures, state: UserState) -> Tensor:
        """What ``forward`` gives, from the state of the histories when the requests were made.

        Args:
            features: their own histories, which may be empty, are not used.
            state: what ``encode`` gave for the B histories.

        Returns:
            Logits [M, T].

        Raises:
            ValueError: as ``forward``; or the interaction is not "ifa".
        """
        context = self.sparse_arch(features.context_features) if self.sparse_arch else None
        _, candidates = self.sequence_arch(features.sequence_features)
        return self.set_arch(self.candidate_arch.attend(context, state, candidates, features))

    def encode(self, sequence_features: KeyedJaggedTensor, history_age: Tensor) -> UserState:
        """Sum B histories into what ``attend`` takes in their place.

        Args:
            sequence_features: as a RankingBatch's; its candidates, which may be none, are not used.
            history_age: [N] float >= 0.

        Returns:
            UserState of B requests.

        Raises:
            ValueError: the interaction is not "ifa", or what ``forward`` raises.

        Example:
            >>> import torch
            >>> from torchrec import EmbeddingCollection, EmbeddingConfig
            >>> from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
            >>> from ifa_torchrec import DLRM_IFA, DLRM_IFAConfig, IFAConfig
            >>> tables = EmbeddingCollection(tables=[EmbeddingConfig(
            ...     name="item", embedding_dim=8, num_embeddings=100,
            ...     feature_names=["history_item", "candidate_item"])])
            >>> model = DLRM_IFA(None, tables, DLRM_IFAConfig(("item",), ifa=IFAConfig(8, num_heads=2)))
            >>> histories = KeyedJaggedTensor.from_lengths_sync(
            ...     keys=["history_item", "candidate_item"],
            ...     values=torch.arange(4), lengths=torch.tensor([4, 0, 0, 0]))
            >>> model.encode(histories, torch.rand(4)).count.tolist()
            [4, 0]
        """
        history, _ = self.sequence_arch(sequence_features)
        return self.candidate_arch.encode(history, sequence_features, history_age)


class DLRM_IFATrain(nn.Module):
    """DLRM_IFA with its loss, CandidateSetLoss, for TorchRec's train pipelines.

    Args:
        dlrm_module: DLRM_IFA.
        loss: CandidateSetLossConfig; None for its default, the mean binary cross entropy of all
            candidates, and of regression tasks the Huber error of the exposed.
        across_ranks: see CandidateSetLoss.

    Raises:
        ValueError: the loss has a consistency term but candidates do not see each other.

    Example:
        >>> import torch
        >>> from torchrec import EmbeddingCollection, EmbeddingConfig
        >>> from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
        >>> from ifa_torchrec import DLRM_IFA, DLRM_IFAConfig, DLRM_IFATrain, IFAConfig, RankingBatch
        >>> from ifa_torchrec.modules import CandidateSetConfig, CandidateSetLossConfig
        >>> tables = EmbeddingCollection(tables=[EmbeddingConfig(
        ...     name="item", embedding_dim=8, num_embeddings=100,
        ...     feature_names=["history_item", "candidate_item"])])
        >>> model = DLRM_IFA(None, tables, DLRM_IFAConfig(("item",), ifa=IFAConfig(8, num_heads=2),
        ...     candidate_set=CandidateSetConfig("softmax")))
        >>> sequence = KeyedJaggedTensor.from_lengths_sync(
        ...     keys=["history_item", "candidate_item"],
        ...     values=torch.arange(9), lengths=torch.tensor([4, 0, 3, 2]))
        >>> none = KeyedJaggedTensor.from_lengths_sync([], torch.empty(0), torch.empty(0).long())
        >>> batch = RankingBatch(torch.zeros(2, 0), none, sequence, torch.zeros(5, 0),
        ...     torch.rand(4), torch.tensor([[1.0], [0.0], [0.0], [0.0], [1.0]]),
        ...     torch.tensor([True, True, False, True, True]))
        >>> train = DLRM_IFATrain(model, CandidateSetLossConfig(listwise=0.5, consistency=0.1))
        >>> loss, (_, logits, labels) = train(batch)
        >>> loss.shape, logits.shape
        (torch.Size([]), torch.Size([5, 1]))
    """

    def __init__(
        self,
        dlrm_module: DLRM_IFA,
        loss: CandidateSetLossConfig | None = None,
        across_ranks: bool = False,
    ) -> None:
        super().__init__()
        self.model = dlrm_module
        self.loss = CandidateSetLoss(loss, across_ranks, dlrm_module.config.tasks)
        if self.loss.config.consistency and dlrm_module.config.candidate_set.attention == "none":
            raise ConfigError(
                "DLRM_IFATrain: without a candidate_set attention no candidate sees another, and a "
                "consistency term has nothing to do; give the model one, or the term the weight 0"
            )

    def forward(self, batch: RankingBatch) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """
        Returns:
            The loss, a scalar, and (loss, logits [M, T], labels [M, T]) detached. A batch without
            candidates has loss 0.
        """
        candidates = self.model.describe(batch)
        logits, alone = self.model.set_arch(candidates), None
        if self.loss.config.consistency:  # the exposed, scored where the others do not stand beside them
            alone = self.model.set_arch(candidates.only(batch.exposed))
        loss = self.loss(logits, batch.labels, batch.exposed, candidates.offsets, alone)
        return loss, (loss.detach(), logits.detach(), batch.labels.detach())
