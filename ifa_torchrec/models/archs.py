"""The parts of a DLRM_IFA, in the order in which a request passes them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchrec.models.dlrm import DenseArch, OverArch
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from ifa_torchrec.batch import RankingFeatures
from ifa_torchrec.errors import ConfigError
from ifa_torchrec.models.config import DLRM_IFAConfig
from ifa_torchrec.models.parts import InterestArch, PairInteractionArch, RequestArch
from ifa_torchrec.modules import (
    INTERACTIONS,
    CandidateSetEncoder,
    InteractionFidelityAttention,
    SequenceInteraction,
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


@dataclass(frozen=True)
class Candidates:
    """M candidates of B requests, each described by itself.

    Args:
        tokens: [M, D].
        offsets: [B + 1]; request b has the candidates offsets[b] up to offsets[b + 1].
        vectors, beside: as a Part's.

    Example:
        >>> import torch
        >>> from ifa_torchrec.models.archs import Candidates
        >>> candidates = Candidates(torch.zeros(3, 8), torch.tensor([0, 2, 3]), (), ())
        >>> candidates.only(torch.tensor([False, True, True])).offsets.tolist()
        [0, 1, 2]
    """

    tokens: Tensor
    offsets: Tensor
    vectors: tuple[Tensor, ...]
    beside: tuple[Tensor, ...]

    def only(self, kept: Tensor) -> Candidates:
        """Those that are kept, [M] bool, as if there were no others."""
        return Candidates(
            self.tokens[kept],
            counted(kept, self.offsets),
            tuple(rows[kept] for rows in self.vectors),
            tuple(rows[kept] for rows in self.beside),
        )


class CandidateArch(nn.Module):
    """Describes each candidate by itself: the token, the request and what the history answered.

    A module of its own, as SetArch is, so that tracing the model for a pipeline meets it as a leaf.

    Args:
        config: DLRM_IFAConfig.
        num_context_features: Fs, context features of the SparseArch.
        interaction: as DLRM_IFA's.

    Attributes:
        num_vectors, out_features: as RequestArch's.

    Raises:
        ConfigError: the interaction does not fit the configuration.

    Example:
        >>> from ifa_torchrec import DLRM_IFAConfig, IFAConfig
        >>> from ifa_torchrec.models.archs import CandidateArch
        >>> config = DLRM_IFAConfig(("item",), dense_in_features=3, ifa=IFAConfig(8, num_heads=2))
        >>> CandidateArch(config, num_context_features=2).num_vectors  # the request's and the interest
        2
    """

    def __init__(
        self,
        config: DLRM_IFAConfig,
        num_context_features: int,
        interaction: SequenceInteraction | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.weighted_context = False
        """Whether the tables of the context features are of a weighted EmbeddingBagCollection."""
        dim = config.ifa.embedding_dim
        self.interaction_name = type(interaction).__name__ if interaction else config.interaction
        if interaction is None:
            found, feature = config.recent_length, config.search_feature or config.item_features[-1]
            interaction = INTERACTIONS[config.interaction](config.ifa, found, feature)
        else:
            _check_interaction(interaction, config)
        self.sequence_interaction = interaction
        layers = [*config.dense_arch_layer_sizes, dim]
        self.request_arch = RequestArch(config.dense_in_features, num_context_features, layers)
        columns = config.candidate_dense_in_features
        self.candidate_dense_arch = DenseArch(columns, layers) if columns else None
        self.token_norm = nn.LayerNorm(dim)
        self.interest_arch = InterestArch(dim) if interaction is not None else None
        parts = [arch for arch in (self.request_arch, self.interest_arch) if arch is not None]
        self.num_vectors = sum(arch.num_vectors for arch in parts) + bool(columns)
        self.out_features = sum(arch.out_features for arch in parts)

    def forward(
        self,
        context: Tensor | None,
        history: JaggedTensor | None,
        candidates: JaggedTensor,
        features: RankingFeatures,
    ) -> Candidates:
        """
        Args:
            context: [B, Fs, D] or None.
            history: tokens [N, D] of B requests; None where no history is looked up.
            candidates: tokens [M, D] of B requests.
            features: for its numbers, ages and ids.

        Raises:
            ValueError: the features do not fit each other or the model.
        """
        self._check(features)
        candidates = self._normed(candidates)
        interaction, answer = self.sequence_interaction, None
        if interaction is not None:
            if history is None:
                raise ValueError("CandidateArch: give the tokens of the histories")
            interest = interaction(
                candidates,
                self._normed(history),
                features.history_age,
                self.ids(features.sequence_features, "history_"),
                self.ids(features.sequence_features, "candidate_"),
            )
            answer = interest.values(), history.offsets().diff()
        return self._described(context, candidates, features, answer)

    def attend(
        self,
        context: Tensor | None,
        state: UserState,
        candidates: JaggedTensor,
        features: RankingFeatures,
    ) -> Candidates:
        """What ``forward`` gives, from the state of B requests in place of their histories."""
        self._check(features)
        candidates = self._normed(candidates)
        ids = self.ids(features.sequence_features, "candidate_")
        interest = self.ifa.attend(candidates, state, ids)
        return self._described(context, candidates, features, (interest.values(), state.count))

    def encode(
        self, history: JaggedTensor, features: KeyedJaggedTensor, history_age: Tensor
    ) -> UserState:
        """The state that ``attend`` takes in place of the history; see DLRM_IFA.encode.

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
            ConfigError: it is another.
        """
        if not isinstance(self.sequence_interaction, InteractionFidelityAttention):
            raise ConfigError(
                f"interaction {self.interaction_name!r} has no user state; train with 'ifa'"
            )
        return self.sequence_interaction

    def _described(
        self,
        context: Tensor | None,
        candidates: JaggedTensor,
        features: RankingFeatures,
        answer: tuple[Tensor, Tensor] | None,
    ) -> Candidates:
        """``answer`` is what the histories answered, [M, D], and how many events they have, [B]."""
        tokens, offsets = candidates.values(), candidates.offsets()
        request = request_of_row(offsets, tokens.shape[0])
        vectors, beside = self.request_arch(features.dense_features, context, tokens, request)
        if self.candidate_dense_arch is not None:
            vectors += (self.candidate_dense_arch(features.candidate_dense),)
        if self.interest_arch is not None and answer is not None:
            interest, events = answer
            part = self.interest_arch(tokens, interest, events.to(tokens.dtype), request)
            vectors, beside = vectors + part.vectors, beside + part.beside
        return Candidates(tokens, offsets, vectors, beside)

    def _check(self, features: RankingFeatures) -> None:
        for name, wanted in (
            ("dense_features", self.config.dense_in_features),
            ("candidate_dense", self.config.candidate_dense_in_features),
        ):
            columns = getattr(features, name).shape[1]
            if columns != wanted:
                raise ValueError(f"batch: {name} has {columns} columns, the model takes {wanted}")
        sequences = features.sequence_features
        _refuse_weights(sequences, "batch: sequence_features")
        if not self.weighted_context:
            _refuse_weights(features.context_features, "batch: context_features")
        if sequences.stride() != features.num_requests:
            raise ValueError(
                f"batch: sequence_features are of {sequences.stride()} requests, dense_features of "
                f"{features.num_requests}"
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
            ids[item] = torch.where(ids[item] == 0, -interaction.config.identity_buckets, ids[item])
        return torch.stack(list(ids.values()), dim=1)

    def _normed(self, tokens: JaggedTensor) -> JaggedTensor:
        return JaggedTensor(
            self.token_norm(tokens.values()), lengths=tokens.lengths(), offsets=tokens.offsets()
        )


class SetArch(nn.Module):
    """From candidates, each described by itself, to logits; they see each other here, if at all.

    Args:
        config: DLRM_IFAConfig.
        num_vectors, in_features: what CandidateArch reports of its output.

    Example:
        >>> import torch
        >>> from ifa_torchrec import DLRM_IFAConfig, IFAConfig
        >>> from ifa_torchrec.models.archs import Candidates, SetArch
        >>> arch = SetArch(DLRM_IFAConfig(("item",), ifa=IFAConfig(8)), num_vectors=1, in_features=3)
        >>> rows = torch.randn(5, 8)
        >>> arch(Candidates(rows, torch.tensor([0, 2, 5]), (rows,), (rows[:, :3],))).shape
        torch.Size([5, 1])
    """

    def __init__(self, config: DLRM_IFAConfig, num_vectors: int, in_features: int) -> None:
        super().__init__()
        dim = config.ifa.embedding_dim
        related = config.candidate_set.attention != "none"
        self.candidate_set_encoder = (
            CandidateSetEncoder(dim, config.candidate_set, config.ifa.backend) if related else None
        )
        self.member_norm = nn.LayerNorm(dim) if related else nn.Identity()
        self.set_norm = nn.LayerNorm(dim) if related else nn.Identity()
        if related:  # the relation is a vector; it and its product with the member stand beside
            num_vectors, in_features = num_vectors + 1, in_features + 2 * dim
        self.interaction_arch = PairInteractionArch(num_vectors) if num_vectors else None
        products = self.interaction_arch.num_products if self.interaction_arch else 0
        layers = [*config.over_arch_layer_sizes, config.num_tasks]
        self.over_arch = OverArch(dim + products + in_features, layers)

    def forward(self, candidates: Candidates) -> Tensor:
        """Logits [M, T]."""
        tokens, offsets = candidates.tokens, candidates.offsets
        vectors, beside = candidates.vectors, candidates.beside
        if self.candidate_set_encoder is not None:
            member = self.member_norm(torch.stack([tokens, *vectors]).sum(0))
            found = self.candidate_set_encoder(
                JaggedTensor(member, lengths=offsets.diff(), offsets=offsets)
            )
            relation = self.set_norm(found.values())
            vectors, beside = (*vectors, relation), (*beside, relation, member * relation)
        if self.interaction_arch is None:
            return self.over_arch(torch.cat([tokens, *beside], dim=1))
        # scaled so that the dot product of two normed vectors is of the size of their entries
        scale = tokens.shape[1] ** -0.25
        crossed = self.interaction_arch(tokens * scale, torch.stack(vectors, dim=1) * scale)
        return self.over_arch(torch.cat([crossed, *beside], dim=1))


def _check_interaction(interaction: SequenceInteraction, config: DLRM_IFAConfig) -> None:
    dim, wanted = interaction.config.embedding_dim, config.ifa.embedding_dim
    unknown = set(interaction.id_features) - set(config.item_features)
    if dim != wanted or unknown or config.interaction == "none":
        raise ConfigError(
            f"{type(interaction).__name__}: it is of width {dim} and compares "
            f"{interaction.id_features}; the configuration's width is {wanted}, its item_features "
            f"{config.item_features}, and its interaction {config.interaction!r} must not be 'none'"
        )


def _refuse_weights(features: KeyedJaggedTensor, name: str) -> None:
    if features.weights_or_none() is not None:
        raise ValueError(
            f"{name} has weights, which this model would not heed; give a KeyedJaggedTensor without them"
        )
