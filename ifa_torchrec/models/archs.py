""""""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.models.dlrm import DenseArch, InteractionArch, OverArch
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from ifa_torchrec.batch import RankingBatch
from ifa_torchrec.errors import ConfigError
from ifa_torchrec.models.config import DLRM_IFAConfig
from ifa_torchrec.modules import (
    INTERACTIONS,
    CandidateSetEncoder,
    InteractionFidelityAttention,
    UserState,
)
from ifa_torchrec.modules.history import counted
from ifa_torchrec.ops.jagged import request_of_row


def tables_of(
    collection: EmbeddingCollection | ManagedCollisionEmbeddingCollection,
) -> list[EmbeddingConfig]:
    """The tables' configs, also where collisions are managed around them.

    Example:
        >>> from torchrec import EmbeddingCollection, EmbeddingConfig
        >>> from ifa_torchrec.models.archs import tables_of
        >>> tables = EmbeddingCollection(tables=[EmbeddingConfig(
        ...     name="item", embedding_dim=4, num_embeddings=10, feature_names=["candidate_item"])])
        >>> [table.name for table in tables_of(tables)]
        ['item']
    """
    if isinstance(collection, ManagedCollisionEmbeddingCollection):
        collection = next(m for m in collection.modules() if isinstance(m, EmbeddingCollection))
    return collection.embedding_configs()


class SequenceArch(nn.Module):
    """Looks up events and candidates in shared tables and sums each one's features to a token.

    Each event is looked up once a request, whatever the number of candidates.

    Args:
        embedding_collection: holds ``history_f`` and ``candidate_f`` for each f; all of width D.
            Where there is no ``history_f`` the history is not looked up. TorchRec's
            ManagedCollisionEmbeddingCollection gives ids rows of their own while they are frequent.
        item_features: the names f.

    Example:
        >>> import torch
        >>> from torchrec import EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
        >>> from ifa_torchrec.models.archs import SequenceArch
        >>> arch = SequenceArch(EmbeddingCollection(tables=[EmbeddingConfig(
        ...     name="item", embedding_dim=4, num_embeddings=10,
        ...     feature_names=["history_item", "candidate_item"])]), ("item",))
        >>> history, candidates = arch(KeyedJaggedTensor.from_lengths_sync(
        ...     keys=["history_item", "candidate_item"],
        ...     values=torch.tensor([5, 6, 7]), lengths=torch.tensor([2, 1])))
        >>> history.values().shape, candidates.values().shape
        (torch.Size([2, 4]), torch.Size([1, 4]))
    """

    def __init__(
        self,
        embedding_collection: EmbeddingCollection | ManagedCollisionEmbeddingCollection,
        item_features: tuple[str, ...],
    ) -> None:
        super().__init__()
        self.embedding_collection = embedding_collection
        self.item_features = item_features
        self.managed = isinstance(embedding_collection, ManagedCollisionEmbeddingCollection)
        named = {n for table in tables_of(embedding_collection) for n in table.feature_names}
        self.has_history = f"history_{item_features[0]}" in named

    def forward(self, features: KeyedJaggedTensor) -> tuple[JaggedTensor | None, JaggedTensor]:
        """
        Args:
            features: KJT of stride B.

        Returns:
            History tokens [N, D] (None where no history is looked up) and candidate tokens
            [M, D], each as a JaggedTensor of B requests.
        """
        embeddings = self.embedding_collection(features)
        if self.managed:  # beside the rows it returns the ids that it made
            embeddings = embeddings[0]
        candidates = self._tokens(embeddings, "candidate_")
        history = self._tokens(embeddings, "history_") if self.has_history else None
        return history, candidates

    def _tokens(self, embeddings: dict[str, JaggedTensor], prefix: str) -> JaggedTensor:
        parts = [embeddings[prefix + feature] for feature in self.item_features]
        values = parts[0].values()
        for part in parts[1:]:
            values = values + part.values()
        return JaggedTensor(values, lengths=parts[0].lengths(), offsets=parts[0].offsets())


class _InteractionArch(InteractionArch):
    """TorchRec's, with its table of pairs made anew where the meta device or ``to_empty`` lose it: of
    zeros, as DistributedModelParallel makes it, each product would be that of the first vector with
    itself."""

    def __init__(self, num_sparse_features: int) -> None:
        with torch.device("cpu"):
            super().__init__(num_sparse_features)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> _InteractionArch:
        super()._apply(fn, recurse)
        size, device = self.F + 1, self.triu_indices.device
        self.triu_indices = torch.triu_indices(size, size, offset=1, device=device)
        return self


class CandidateArch(nn.Module):
    """Everything dense behind the lookups: from tokens and request vectors to logits.

    One module of its own, so that tracing the model for a pipeline meets it as a leaf.

    Args:
        config: DLRM_IFAConfig.
        num_context_features: Fs, context features of the SparseArch.

    Example:
        >>> from ifa_torchrec import DLRM_IFAConfig, IFAConfig
        >>> from ifa_torchrec.models.archs import CandidateArch
        >>> config = DLRM_IFAConfig(("item",), dense_in_features=3, ifa=IFAConfig(8, num_heads=2))
        >>> arch = CandidateArch(config, num_context_features=2)
        >>> arch.interaction_arch.F  # vectors crossed with the token: the request's and the interest
        2
    """

    def __init__(self, config: DLRM_IFAConfig, num_context_features: int) -> None:
        super().__init__()
        self.config = config
        self.weighted_context = False
        """Whether the tables of the context features are of a weighted EmbeddingBagCollection."""
        dim = config.ifa.embedding_dim
        self.sequence_interaction = INTERACTIONS[config.interaction](
            config.ifa, config.recent_length, config.search_feature or config.item_features[-1]
        )
        sequence = self.sequence_interaction is not None
        layers = [*config.dense_arch_layer_sizes, dim]
        request_features = config.dense_in_features
        candidate_features = config.candidate_dense_in_features
        self.request_arch = DenseArch(request_features, layers) if request_features else None
        self.candidate_dense_arch = DenseArch(candidate_features, layers) if candidate_features else None
        self.token_norm = nn.LayerNorm(dim)
        self.interest_norm = nn.LayerNorm(dim) if sequence else nn.Identity()
        related = config.candidate_set.attention != "none"
        self.candidate_set_encoder = (
            CandidateSetEncoder(dim, config.candidate_set, config.ifa.backend) if related else None
        )
        self.member_norm = nn.LayerNorm(dim) if related else nn.Identity()
        self.set_norm = nn.LayerNorm(dim) if related else nn.Identity()
        known = num_context_features + bool(request_features)  # vectors of the request
        self.request_interaction_arch = _InteractionArch(known - 1)
        vectors = sum((bool(request_features), bool(candidate_features), sequence, related))
        self.interaction_arch = _InteractionArch(vectors) if vectors else None
        width = dim + vectors * (vectors + 1) // 2
        width += dim * bool(request_features) + (2 * dim + 1) * sequence + 2 * dim * related
        width += known * (known - 1) // 2 + num_context_features
        self.over_arch = OverArch(width, [*config.over_arch_layer_sizes, config.num_tasks])

    def forward(
        self,
        context: Tensor | None,
        history: JaggedTensor | None,
        candidates: JaggedTensor,
        batch: RankingBatch,
        exposed_alone: bool = False,
        state: UserState | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """
        Args:
            context: [B, Fs, D] or None.
            history: tokens [N, D] of B requests, or None.
            state: of B requests, in place of the history; see DLRM_IFA.
            candidates: tokens [M, D] of B requests.
            batch: for its dense features, ages and ids.
            exposed_alone: see DLRM_IFA.

        Returns:
            Logits [M, T]; with exposed_alone a pair.

        Raises:
            ValueError: the parts of the batch do not fit each other or the model.
        """
        self._check(batch)
        offsets = candidates.offsets()
        candidates = self._normed(candidates)
        tokens = candidates.values()
        request = request_of_row(offsets, tokens.shape[0])
        vectors, beside = [], []
        dense = None if self.request_arch is None else self.request_arch(batch.dense_features)
        if dense is not None:
            vectors.append(dense[request])
            beside.append(vectors[-1])
        if context is not None:
            first, others = (context[:, 0], context[:, 1:]) if dense is None else (dense, context)
            crossed = self.request_interaction_arch(first, others)
            beside.append(crossed[:, tokens.shape[1] :][request])  # behind `first` itself
            beside.append(torch.einsum("mfd,md->mf", context[request], tokens))
        if self.candidate_dense_arch is not None:
            vectors.append(self.candidate_dense_arch(batch.candidate_dense))
        interaction = self.sequence_interaction if state is None else self.ifa
        if interaction is not None:
            candidate_ids = self.ids(batch.sequence_features, "candidate_")
            if state is not None:
                interest = self.ifa.attend(candidates, state, candidate_ids)
                events = state.count.to(tokens.dtype)
            elif history is not None:
                interest = interaction(
                    candidates,
                    self._normed(history),
                    batch.history_age,
                    self.ids(batch.sequence_features, "history_"),
                    candidate_ids,
                )
                events = history.offsets().diff().to(tokens.dtype)
            else:
                raise ValueError("CandidateArch: give the tokens of the histories, or their state")
            vectors.append(self.interest_norm(interest.values()))
            beside += [vectors[-1], tokens * vectors[-1], torch.log1p(events)[request, None]]
        logits = self._score(tokens, vectors, beside, offsets)
        if not exposed_alone:
            return logits
        kept = batch.exposed
        alone = self._score(
            tokens[kept], [v[kept] for v in vectors], [v[kept] for v in beside], counted(kept, offsets)
        )
        return logits, alone

    def encode(
        self, history: JaggedTensor, features: KeyedJaggedTensor, history_age: Tensor
    ) -> UserState:
        """The state that ``forward`` takes in place of the history; see DLRM_IFA.encode.

        Args:
            history: tokens [N, D] of B requests.
            features: the sequence features, for their ids.
            history_age: [N].
        """
        _refuse_weights(features, "sequence_features")
        return self.ifa.encode(self._normed(history), history_age, self.ids(features, "history_"))

    @property
    def ifa(self) -> InteractionFidelityAttention:
        """The interaction, where it is "ifa": the only one with a user state.

        Raises:
            ValueError: it is another.
        """
        if not isinstance(self.sequence_interaction, InteractionFidelityAttention):
            raise ConfigError(
                f"interaction {self.config.interaction!r} has no user state; train with 'ifa'"
            )
        return self.sequence_interaction

    def _score(
        self, tokens: Tensor, vectors: list[Tensor], beside: list[Tensor], offsets: Tensor
    ) -> Tensor:
        """Logits of candidate sets whose members are described, each by itself, by these [rows, *]."""
        if self.candidate_set_encoder is not None:
            member = self.member_norm(torch.stack([tokens, *vectors]).sum(0))
            found = self.candidate_set_encoder(
                JaggedTensor(member, lengths=offsets.diff(), offsets=offsets)
            )
            relation = self.set_norm(found.values())
            vectors = [*vectors, relation]
            beside = [*beside, relation, member * relation]
        if self.interaction_arch is None:
            return self.over_arch(torch.cat([tokens, *beside], dim=1))
        # scaled so that the dot product of two normed vectors is of the size of their entries
        scale = tokens.shape[1] ** -0.25
        crossed = self.interaction_arch(tokens * scale, torch.stack(vectors, dim=1) * scale)
        return self.over_arch(torch.cat([crossed, *beside], dim=1))

    def _check(self, batch: RankingBatch) -> None:
        for name, wanted in (
            ("dense_features", self.config.dense_in_features),
            ("candidate_dense", self.config.candidate_dense_in_features),
        ):
            columns = getattr(batch, name).shape[1]
            if columns != wanted:
                raise ValueError(f"batch: {name} has {columns} columns, the model takes {wanted}")
        sequences = batch.sequence_features
        _refuse_weights(sequences, "batch: sequence_features")
        if not self.weighted_context:
            _refuse_weights(batch.context_features, "batch: context_features")
        if sequences.stride() != batch.num_requests:
            raise ValueError(
                f"batch: sequence_features are of {sequences.stride()} requests, dense_features of "
                f"{batch.num_requests}"
            )
        # On a GPU, and in a compiled graph, looking at values would wait for the device.
        if sequences.device().type != "cpu" or torch.compiler.is_compiling():
            return
        for prefix in self.config.prefixes:
            first = prefix + self.config.item_features[0]
            for name in (prefix + f for f in self.config.item_features):
                if not torch.equal(sequences[name].lengths(), sequences[first].lengths()):
                    raise ValueError(f"batch: {name} and {first} have different lengths")

    def ids(self, features: KeyedJaggedTensor, prefix: str) -> Tensor | None:
        """The ids [rows, K] int64 that the interaction compares; None if it compares none.

        Of an item's features row 0 is "unknown", and matches nothing. The item itself, the first of
        item_features, has no such row: its row 0 is an item. As -R it falls into the same bucket, and
        is known.

        Args:
            features: the sequence features.
            prefix: "history_" or "candidate_".
        """
        interaction = self.sequence_interaction
        if interaction is None or not interaction.id_features:
            return None
        ids = {f: features[prefix + f].values().to(torch.int64) for f in interaction.id_features}
        item = self.config.item_features[0]
        if item in ids:
            ids[item] = torch.where(ids[item] == 0, -self.config.ifa.identity_buckets, ids[item])
        return torch.stack(list(ids.values()), dim=1)

    def _normed(self, tokens: JaggedTensor) -> JaggedTensor:
        return JaggedTensor(
            self.token_norm(tokens.values()), lengths=tokens.lengths(), offsets=tokens.offsets()
        )


def _refuse_weights(features: KeyedJaggedTensor, name: str) -> None:
    if features.weights_or_none() is not None:
        raise ValueError(
            f"{name} has weights, which this model would not heed; give a KeyedJaggedTensor without them"
        )
