"""The modules of a DLRM_IFA, in the order in which a request passes through them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor, nn
from torchrec.models.dlrm import DenseArch, OverArch
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from ifa_torchrec.batch import RankingFeatures
from ifa_torchrec.errors import ConfigError
from ifa_torchrec.models.checks import CANDIDATES, HISTORY, check_features
from ifa_torchrec.models.config import DLRM_IFAConfig
from ifa_torchrec.models.parts import (
    SMALL_START,
    InterestArch,
    ItemArch,
    PairInteractionArch,
    RequestArch,
    token_numbers,
    vector_numbers,
)
from ifa_torchrec.modules import (
    INTERACTIONS,
    CandidateSetEncoder,
    InteractionFidelityAttention,
    SequenceInteraction,
    UserState,
)
from ifa_torchrec.modules.history import counted
from ifa_torchrec.modules.projections import ZeroLinear
from ifa_torchrec.ops.autocast import without_autocast
from ifa_torchrec.ops.jagged import request_of_row


@dataclass(frozen=True)
class Lookups:
    """The embeddings of a batch of B requests, M candidates, N events and U distinct items.

    Args:
        context: [B, Fs, D], of the context features; None if there are none.
        lists: [U, Fl, D], of the items' lists; None if there are none.
        history: values [N, D], of the B requests' events; None if no history is looked up.
        candidates: values [M, D], of the B requests' candidates.

    Example:
        >>> import torch
        >>> from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor
        >>> from ifa_torchrec.models.archs import Lookups
        >>> candidates = JaggedTensor(torch.zeros(3, 8), lengths=torch.tensor([3]))
        >>> Lookups(None, None, None, candidates).candidates.values().shape
        torch.Size([3, 8])
    """

    context: Tensor | None
    lists: Tensor | None
    history: JaggedTensor | None
    candidates: JaggedTensor


@dataclass(frozen=True)
class Candidates:
    """M candidates of B requests, each described independently of the others.

    Args:
        tokens: [M, D].
        offsets: [B + 1]; request b has the candidates offsets[b]:offsets[b + 1].
        interaction_vectors, concat_features: as in Part.
        ids: [M, item features] int64, of their items; None if no module compares them.
        logits: [M, T], the output of SetArch; None if not computed yet.

    Example:
        >>> import torch
        >>> from ifa_torchrec.models.archs import Candidates
        >>> candidates = Candidates(torch.zeros(3, 8), torch.tensor([0, 2, 3]), (), ())
        >>> candidates.only(torch.tensor([False, True, True])).offsets.tolist()
        [0, 1, 2]
    """

    tokens: Tensor
    offsets: Tensor
    interaction_vectors: tuple[Tensor, ...]
    concat_features: tuple[Tensor, ...]
    ids: Tensor | None = None
    logits: Tensor | None = None

    def members(self, norm: nn.LayerNorm) -> JaggedTensor:
        """The candidates as members of a set, [M, D]: tokens plus interaction vectors."""
        return JaggedTensor(norm(sum(self.interaction_vectors, self.tokens)), offsets=self.offsets)

    def detach(self) -> Candidates:
        """A copy without gradients."""
        vectors, concat = (
            tuple(rows.detach() for rows in part)
            for part in (self.interaction_vectors, self.concat_features)
        )
        return Candidates(self.tokens.detach(), self.offsets, vectors, concat, self.ids)

    def only(self, kept: Tensor, rows: Tensor | None = None) -> Candidates:
        """A subset of the candidates, as if there were no others.

        Args:
            kept: [M] bool, which to keep.
            rows: [E] int64, their row numbers; None to compute them, which on a GPU waits for it.
        """
        rows = kept.nonzero()[:, 0] if rows is None else rows
        return Candidates(
            self.tokens[rows],
            counted(kept, self.offsets),
            tuple(columns[rows] for columns in self.interaction_vectors),
            tuple(columns[rows] for columns in self.concat_features),
            None if self.ids is None else self.ids[rows],
        )


class CandidateArch(nn.Module):
    """Describes each candidate independently: its token, its request, and what it finds in the history.

    A token is the normed sum of the parts that describe an event or candidate: its ids, its item, and an
    event's numbers. Like SetArch it is a module of its own, so that tracing the model for a pipeline
    treats it as a leaf.

    Args:
        config: DLRM_IFAConfig.
        num_context_features: Fs, context features of the Lookups.
        interaction: as for DLRM_IFA.

    Attributes:
        num_vectors, out_features: as for RequestArch.
        weighted: the fields of a batch whose ids may have weights, because their tables use them.

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
        self.weighted: tuple[str, ...] = ()
        dim = config.ifa.embedding_dim
        self.interaction_name = type(interaction).__name__ if interaction else config.interaction
        if interaction is None:
            found, feature = config.recent_length, config.search_feature or config.item_names[-1]
            interaction = INTERACTIONS[config.interaction](config.ifa, found, feature)
        else:
            _check_interaction(interaction, config)
        self.sequence_interaction = interaction
        self.request_arch = RequestArch(config, num_context_features)
        self.candidate_dense_arch = vector_numbers(config, "candidate_dense")
        self.item_arch = ItemArch(config)
        self.event_dense_arch = None
        self.interest_arch = None
        if interaction is not None:
            self.event_dense_arch = token_numbers(config, "history_dense")
            start = SMALL_START if interaction.config.identity_features else 1.0
            self.interest_arch = InterestArch(dim, start)
        self.token_norm = nn.LayerNorm(dim)
        parts = [arch for arch in (self.request_arch, self.interest_arch) if arch is not None]
        dense = self.candidate_dense_arch is not None
        self.num_vectors = sum(arch.num_vectors for arch in parts) + dense
        self.out_features = sum(arch.out_features for arch in parts)

    def forward(self, lookups: Lookups, features: RankingFeatures) -> Candidates:
        """
        Args:
            lookups: the embeddings of the features' ids.
            features: provides numbers, vectors, ages and ids.

        Raises:
            ValueError: the features do not fit each other or the model.
        """
        items = self._items(lookups, features, HISTORY, CANDIDATES)
        candidates = self._candidate_tokens(lookups, items, features)
        interaction, found = self.sequence_interaction, None
        if interaction is not None:
            history = self._event_tokens(lookups, items, features)
            interest = interaction(
                candidates,
                history,
                features.history_age,
                self.history_ids(features),
                self.candidate_ids(features),
                **self._gates(features),
            )
            found = interest.values(), history.offsets().diff()
        return self._described(lookups.context, candidates, features, found)

    def attend(self, lookups: Lookups, features: RankingFeatures, state: UserState) -> Candidates:
        """What ``forward`` returns, from a state instead of the histories, which may be empty."""
        items = self._items(lookups, features, CANDIDATES)
        candidates = self._candidate_tokens(lookups, items, features)
        interest = self.ifa.attend(candidates, state, self.candidate_ids(features))
        return self._described(lookups.context, candidates, features, (interest.values(), state.count))

    def encode(self, lookups: Lookups, features: RankingFeatures) -> UserState:
        """The state that ``attend`` takes instead of the history; see DLRM_IFA.encode."""
        ifa = self.ifa
        items = self._items(lookups, features, HISTORY)
        history = self._event_tokens(lookups, items, features)
        ids = self.history_ids(features)
        return ifa.encode(history, features.history_age, ids, **self._gates(features))

    @property
    def ifa(self) -> InteractionFidelityAttention:
        """The interaction if it is "ifa", the only one with a user state.

        Raises:
            ConfigError: the interaction is another one.
        """
        if not isinstance(self.sequence_interaction, InteractionFidelityAttention):
            raise ConfigError(
                f"interaction {self.interaction_name!r} has no user state; train with 'ifa'"
            )
        return self.sequence_interaction

    def history_ids(self, features: RankingFeatures) -> Tensor | None:
        """The events' ids [N, K] int64 that the interaction compares; None if it compares none.

        The item's own are ``history_item_ids``, if given. Id 0 is "unknown" and matches nothing.
        """
        return self._ids(features, self.config.history_keys, features.history_item_ids)

    def candidate_ids(self, features: RankingFeatures) -> Tensor | None:
        """The candidates' ids [M, K] int64 that the interaction compares; see ``history_ids``."""
        return self._ids(features, self.config.candidate_keys, features.candidate_item_ids)

    def _ids(
        self, features: RankingFeatures, keys: dict[str, str], items: Tensor | None
    ) -> Tensor | None:
        interaction = self.sequence_interaction
        if interaction is None or not interaction.id_features:
            return None
        return self._columns(features, keys, items, interaction.id_features)

    def _columns(
        self,
        features: RankingFeatures,
        keys: dict[str, str],
        items: Tensor | None,
        names: Sequence[str],
    ) -> Tensor:
        """The ids of some item features, [rows, names] int64."""
        columns: list[Tensor] = []
        for name in names:
            if items is not None and name == self.config.item_names[0]:
                columns.append(items)
            else:
                columns.append(features.sequence_features[keys[name]].values())
        return torch.stack([ids.to(torch.int64) for ids in columns], dim=1)

    def _gates(self, features: RankingFeatures) -> dict[str, Tensor]:
        """The interaction's argument history_gates [N, G], if there are gates."""
        keys, sequences = self.config.history_keys, features.sequence_features
        gates = () if self.sequence_interaction is None else self.sequence_interaction.config.gates
        columns = [sequences[keys[name]].values().to(torch.int64) for name in gates]
        return {"history_gates": torch.stack(columns, dim=1)} if columns else {}

    def _items(self, lookups: Lookups, features: RankingFeatures, *sides: str) -> Tensor | None:
        """Check the features and return the description of each item [U, D], if there is one."""
        lists = lookups.lists
        check_features(features, self.config, None if lists is None else lists.shape[0], sides)
        for name in ("sequence_features", "context_features", "item_lists"):
            ids: KeyedJaggedTensor | None = getattr(features, name)
            if ids is not None and name not in self.weighted and ids.weights_or_none() is not None:
                raise ValueError(
                    f"batch: {name} has weights, but this model ignores them; pass a KeyedJaggedTensor "
                    "without weights"
                )
        return self.item_arch(lists, features)

    def _event_tokens(
        self, lookups: Lookups, items: Tensor | None, features: RankingFeatures
    ) -> JaggedTensor:
        if lookups.history is None:
            raise ValueError("CandidateArch: lookups.history is None; the interaction needs histories")
        parts = [lookups.history.values()]
        if items is not None and features.history_items is not None:
            parts.append(items.index_select(0, features.history_items))
        if self.event_dense_arch is not None and features.history_dense is not None:
            parts.append(self.event_dense_arch(features.history_dense))
        return self._token(lookups.history, parts, features.history_weight)

    def _candidate_tokens(
        self, lookups: Lookups, items: Tensor | None, features: RankingFeatures
    ) -> JaggedTensor:
        parts = [lookups.candidates.values()]
        if items is not None and features.candidate_items is not None:
            parts.append(items.index_select(0, features.candidate_items))
        return self._token(lookups.candidates, parts, None)

    def _token(self, rows: JaggedTensor, parts: list[Tensor], weights: Tensor | None) -> JaggedTensor:
        values = self.token_norm(reduce(torch.add, parts))
        return JaggedTensor(values, weights=weights, lengths=rows.lengths(), offsets=rows.offsets())

    def _described(
        self,
        context: Tensor | None,
        candidates: JaggedTensor,
        features: RankingFeatures,
        found: tuple[Tensor, Tensor] | None,
    ) -> Candidates:
        """``found``: what the candidates found in the histories, [M, D], and the event counts [B]."""
        tokens, offsets = candidates.values(), candidates.offsets()
        request = request_of_row(offsets, tokens.shape[0])
        with without_autocast(tokens):  # candidates, not events: see SetArch
            vectors, concat = self.request_arch(features.dense_features, context, tokens, request)
            if self.candidate_dense_arch is not None:
                vectors += (self.candidate_dense_arch(features.candidate_dense),)
            if self.interest_arch is not None and found is not None:
                interest, events = found
                part = self.interest_arch(tokens, interest, events.to(tokens.dtype), request)
                vectors += part.interaction_vectors
                concat += part.concat_features
        ids = None
        if self.config.candidate_set.generate:
            keys, items = self.config.candidate_keys, features.candidate_item_ids
            ids = self._columns(features, keys, items, self.config.item_names)
        return Candidates(tokens, offsets, vectors, concat, ids)


class SetArch(nn.Module):
    """Computes logits from independently described candidates; only here may they attend to each other.

    What a candidate finds among the others is a term added to its own logits. It starts at 0 and learns
    the residual, see ``DLRM_IFATrain``. Autocast is off here and in everything else computed only from
    candidates: they are few, so bfloat16 would save little and make gradients less accurate.

    Args:
        config: DLRM_IFAConfig.
        num_vectors, in_features: CandidateArch's num_vectors and out_features.

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
        self.interaction_arch = PairInteractionArch(num_vectors) if num_vectors else None
        products = self.interaction_arch.num_products if self.interaction_arch else 0
        layers = [*config.over_arch_layer_sizes, config.num_tasks]
        self.dropout = nn.Dropout(config.dropout)
        self.over_arch = OverArch(dim + products + in_features, layers)
        related = config.candidate_set.attention != "none"
        with torch.random.fork_rng(devices=[]):  # so that later random draws do not depend on it
            self.relation_arch = RelationArch(config) if related else None

    def forward(
        self, candidates: Candidates, with_relation: bool = True, base_logits: Tensor | None = None
    ) -> Tensor:
        """
        Args:
            candidates: M candidates of B requests.
            with_relation: whether to add the term of the other candidates.
            base_logits: [M, T], the logits without that term, if already computed.

        Returns:
            Logits [M, T].
        """
        with without_autocast(candidates.tokens):
            logits = self._base_logits(candidates) if base_logits is None else base_logits
            if self.relation_arch is None or not with_relation:
                return logits
            return logits + self.relation_arch(candidates)

    def _base_logits(self, candidates: Candidates) -> Tensor:
        tokens, concat = candidates.tokens, candidates.concat_features
        if self.interaction_arch is None:
            inputs = torch.cat([tokens, *concat], dim=1)
        else:
            # scaled so that the dot product of two normed vectors is about as large as their entries
            scale = tokens.shape[1] ** -0.25
            vectors = torch.stack(candidates.interaction_vectors, dim=1)
            crossed = self.interaction_arch(tokens * scale, vectors * scale)
            inputs = torch.cat([crossed, *concat], dim=1)
        return self.over_arch(self.dropout(inputs))


class RelationArch(nn.Module):
    """How the candidates of a request change each other's logits, by a CandidateSetEncoder.

    Args:
        config: DLRM_IFAConfig, with a candidate_set attention.

    Example:
        >>> import torch
        >>> from ifa_torchrec import DLRM_IFAConfig, IFAConfig
        >>> from ifa_torchrec.models.archs import Candidates, RelationArch
        >>> from ifa_torchrec.modules import CandidateSetConfig
        >>> config = DLRM_IFAConfig(("item",), ifa=IFAConfig(8),
        ...     candidate_set=CandidateSetConfig("linear"))
        >>> RelationArch(config)(Candidates(torch.randn(3, 8), torch.tensor([0, 2, 3]), (), ())).tolist()
        [[0.0], [0.0], [0.0]]
    """

    def __init__(self, config: DLRM_IFAConfig) -> None:
        super().__init__()
        dim, heads = config.ifa.embedding_dim, config.candidate_set.num_heads
        # half the tokens' width: as good, at a third of the cost
        width = max(dim // (2 * heads), 1) * heads
        self.member_norm = nn.LayerNorm(dim)
        self.member_proj = nn.Linear(dim, width)
        self.candidate_set_encoder = CandidateSetEncoder(width, config.candidate_set, config.ifa.backend)
        self.relation_norm = nn.LayerNorm(width)
        self.hidden_arch = DenseArch(3 * width, [width])
        self.output_proj = ZeroLinear(width, config.num_tasks)

    def forward(self, candidates: Candidates) -> Tensor:
        """The term to add to the logits, [M, T]."""
        member = self.member_proj(candidates.members(self.member_norm).values())
        found = self.candidate_set_encoder(JaggedTensor(member, offsets=candidates.offsets))
        relation = self.relation_norm(found.values())
        return self.output_proj(
            self.hidden_arch(torch.cat([member, relation, member * relation], dim=1))
        )


def _check_interaction(interaction: SequenceInteraction, config: DLRM_IFAConfig) -> None:
    dim, wanted = interaction.config.embedding_dim, config.ifa.embedding_dim
    unknown = set(interaction.id_features) - set(config.item_names)
    gates, events = interaction.config.gates, config.event_features
    if dim != wanted or unknown or set(gates) - set(events) or config.interaction == "none":
        raise ConfigError(
            f"{type(interaction).__name__}: it has width {dim}, compares {interaction.id_features}, "
            f"and has gates {list(gates)}; the configuration has width {wanted}, item_features "
            f"{config.item_names} and event_features {list(events)}, and its interaction "
            f"{config.interaction!r} must not be 'none'"
        )
