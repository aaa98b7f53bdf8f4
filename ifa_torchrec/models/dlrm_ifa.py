"""DLRM_IFA: a DLRM that ranks a candidate set against a whole history.

Data flow, for B requests, M candidates and N events in all:

    context_features -> PooledArch [B, Fs, D] ----+-> InteractionArch -> [M, products] -----+
    dense_features [B, F] -> request_arch [B, D] -+--------------------------> [M, D] --+   |
    candidate_dense [M, Fc] -> candidate_dense_arch -------------------------> [M, D] --+
    sequence_features -> SequenceArch -+- candidate tokens ------------------> [M, D] --+
                         items, events +- history tokens [N, D] -> interaction [M, D] --+
                                                   InteractionArch -> OverArch [M, T] <-+---+
        the sum of these four -> CandidateSetEncoder -> RelationArch [M, T], added to it
        and, given the candidates already taken into a set -> TakenArch [M, T], also added

Item features other than ids (item_lists -> PooledArch, item_dense, item_vectors: ItemArch) are computed
once for each of the U distinct items of the batch, [U, D], and added to the tokens of its events and
candidates; an event's numbers are added to its own token.

As in a DLRM, every pair of features interacts by a dot product: the request's features with each other,
once per request, and with the candidate's token.

Everything left of a [B, D] or [N, D] is computed once per request, not once per candidate. Only the
RelationArch and the TakenArch let candidates of a request influence each other, and both start at 0.
SparseArch (the base of PooledArch), DenseArch, InteractionArch and OverArch are TorchRec's. Everything
above the last InteractionArch is CandidateArch; that InteractionArch, OverArch and RelationArch are
SetArch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingCollection

from ifa_torchrec.batch import RankingBatch, RankingFeatures
from ifa_torchrec.errors import ConfigError
from ifa_torchrec.models.archs import CandidateArch, Candidates, Lookups, SetArch
from ifa_torchrec.models.config import DLRM_IFAConfig
from ifa_torchrec.models.sparse import PooledArch, SequenceArch, tables_of
from ifa_torchrec.models.taken import SetGain, TakenArch
from ifa_torchrec.modules import (
    CandidateSetLoss,
    CandidateSetLossConfig,
    SequenceInteraction,
    UserState,
)
from ifa_torchrec.modules.candidate_set import TakenSample
from ifa_torchrec.modules.projections import reset_all


class DLRM_IFA(nn.Module):
    """A DLRM whose candidates attend to the user's whole history.

    Args:
        embedding_bag_collection: tables of the context features; None if there are none; or a pair of
            this and a second collection, with tables of the items' lists. These need their own
            collection because TorchRec pools all features of a collection for the same number of rows,
            and lists are pooled per item.
        embedding_collection: tables of the sequence features, each item feature's shared by history
            and candidates; or a ManagedCollisionEmbeddingCollection. In all collections, rows of tables
            with another width than D are projected.
        config: DLRM_IFAConfig.
        interaction: a SequenceInteraction to use instead of the one that the configuration names.
        dense_device: of the dense part; None for torch's default.

    Raises:
        ConfigError: a sequence feature has no table, or the interaction does not fit.

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
        embedding_bag_collection: EmbeddingBagCollection
        | tuple[EmbeddingBagCollection | None, EmbeddingBagCollection]
        | None,
        embedding_collection: EmbeddingCollection | ManagedCollisionEmbeddingCollection,
        config: DLRM_IFAConfig,
        interaction: SequenceInteraction | None = None,
        dense_device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        bags, item_bags = (
            embedding_bag_collection
            if isinstance(embedding_bag_collection, tuple)
            else (embedding_bag_collection, None)
        )
        _check_tables(tables_of(embedding_collection), config)
        dim = config.ifa.embedding_dim
        with nullcontext() if dense_device is None else torch.device(dense_device):
            self.sparse_arch = PooledArch(bags, dim) if bags else None
            self.item_sparse_arch = PooledArch(item_bags, dim) if item_bags else None
            self.sequence_arch = SequenceArch(embedding_collection, config)
            features = self.sparse_arch.F if self.sparse_arch else 0
            self.candidate_arch = CandidateArch(config, features, interaction)
            widths = self.candidate_arch.num_vectors, self.candidate_arch.out_features
            self.set_arch = SetArch(config, *widths)
            with torch.random.fork_rng(devices=[]):  # so that later random draws do not depend on it
                self.taken_arch = TakenArch(config) if config.candidate_set.generate else None
        pooled = {"context_features": self.sparse_arch, "item_lists": self.item_sparse_arch}
        self.candidate_arch.weighted = tuple(n for n, arch in pooled.items() if arch and arch.weighted)

    def reset_parameters(self) -> None:
        """(Re)initialise all parameters, including tables; call after ``to_empty``."""
        reset_all(self)

    def forward(self, features: RankingFeatures) -> Tensor:
        """
        Args:
            features: RankingFeatures (or a RankingBatch) of B requests, M candidates and N events.

        Returns:
            Logits [M, T].

        Raises:
            ValueError: the features do not fit each other or the model.
        """
        return self.set_arch(self.describe(features))

    def describe(self, features: RankingFeatures, state: UserState | None = None) -> Candidates:
        """Describe each candidate independently; ``set_arch`` then scores all or some of them.

        Args:
            features: as for ``forward``; with a state, as for ``attend``.
            state: the result of ``encode`` for the B histories, used instead of them; None to read the
                histories.

        Raises:
            ValueError: as ``forward``; or a state is given and the interaction is not "ifa".
        """
        lookups = self.look_up(features)
        if state is None:
            return self.candidate_arch(lookups, features)
        return self.candidate_arch.attend(lookups, features, state)

    def scored(self, candidates: Candidates) -> Candidates:
        """The candidates with their logits (with nothing taken), which ``logits_given`` and ``set_gain``
        then need not compute again."""
        return dataclasses.replace(candidates, logits=self.set_arch(candidates))

    def logits_given(self, candidates: Candidates, taken: Tensor | None = None) -> Tensor:
        """The logits of every candidate in its request's set, given the candidates already taken into
        the set that will be shown.

        Args:
            candidates: the result of ``describe``, or of ``scored`` to reuse its logits.
            taken: [M] bool; None for nothing taken. A taken candidate is scored given the other ones.

        Returns:
            Logits [M, T]; with nothing taken, those of ``forward``.

        Raises:
            ConfigError: ``taken`` is given, but the model was not trained to generate sets.
            ValueError: ``taken`` is not one bool per candidate.
        """
        logits = self.set_arch(candidates) if candidates.logits is None else candidates.logits
        if taken is None:
            return logits
        return logits + self._taken_arch()(candidates, taken)

    def set_gain(self, candidates: Candidates) -> SetGain:
        """A function that computes how much each candidate would add to the worth of the set that will
        be shown, given the candidates already taken; used to generate the set greedily.

        The worth of a set is the sum of its candidates' ranking predictions (``set_worth``; for one
        binary task, the expected number of positives). A candidate adds its own prediction, given those
        already taken, and changes theirs: the second of two near-duplicates lowers the first's. With
        nothing taken the order is that of ``ranking_score``.

        Args:
            candidates: the result of ``describe`` or ``scored``.

        Returns:
            A function of ``taken``, [M] bool, for ``generate_set``. A step only computes what the newly
            taken candidate changes, without running the model.

        Raises:
            ConfigError: the model was not trained to generate sets.

        Example:
            >>> import torch
            >>> from torchrec import EmbeddingCollection, EmbeddingConfig
            >>> from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor
            >>> from ifa_torchrec import DLRM_IFA, DLRM_IFAConfig, IFAConfig, generate_set
            >>> from ifa_torchrec.batch import RankingFeatures
            >>> from ifa_torchrec.modules import CandidateSetConfig
            >>> tables = EmbeddingCollection(tables=[EmbeddingConfig(
            ...     name="item", embedding_dim=8, num_embeddings=100,
            ...     feature_names=["history_item", "candidate_item"])])
            >>> model = DLRM_IFA(None, tables, DLRM_IFAConfig(("item",), ifa=IFAConfig(8, num_heads=2),
            ...     candidate_set=CandidateSetConfig(generate=True)))
            >>> sequence = KeyedJaggedTensor.from_lengths_sync(
            ...     keys=["history_item", "candidate_item"],
            ...     values=torch.arange(9), lengths=torch.tensor([4, 0, 3, 2]))
            >>> features = RankingFeatures(torch.zeros(2, 0), KeyedJaggedTensor.empty(), sequence,
            ...     torch.zeros(5, 0), history_age=torch.rand(4))
            >>> candidates = model.scored(model.describe(features))
            >>> rows = JaggedTensor(candidates.tokens, offsets=candidates.offsets)
            >>> chosen = generate_set(model.set_gain(candidates), rows, 2, "greedy")
            >>> chosen.lengths().tolist()
            [2, 2]
        """
        arch = self._taken_arch()
        scored = self.scored(candidates) if candidates.logits is None else candidates
        return SetGain(arch, scored, self.config.tasks)

    def _taken_arch(self) -> TakenArch:
        if self.taken_arch is None:
            raise ConfigError(
                "DLRM_IFA: the model was not trained to generate sets; train it with "
                "CandidateSetConfig(generate=True), or --candidate-set.generate on the command line"
            )
        return self.taken_arch

    def look_up(self, features: RankingFeatures) -> Lookups:
        """The embeddings of the features' ids."""
        context = self.sparse_arch(features.context_features) if self.sparse_arch else None
        lists = self.item_sparse_arch(features.item_lists) if self.item_sparse_arch else None
        history, candidates = self.sequence_arch(features.sequence_features)
        return Lookups(context, lists, history, candidates)

    def attend(self, features: RankingFeatures, state: UserState) -> Tensor:
        """What ``forward`` returns, computed from the histories' state at the time of the requests.

        Args:
            features: as for ``forward``; their histories are not used and may be empty.
            state: the result of ``encode`` for the B histories.

        Returns:
            Logits [M, T].

        Raises:
            ValueError: as ``forward``; or the interaction is not "ifa".
        """
        return self.set_arch(self.describe(features, state))

    def encode(self, features: RankingFeatures) -> UserState:
        """Sum B histories into a user state, which ``attend`` takes instead of the histories.

        Args:
            features: of B requests; their candidates and context are not used and may be empty.

        Returns:
            UserState of B requests.

        Raises:
            ValueError: the interaction is not "ifa", or as ``forward``.

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
            >>> histories = KeyedJaggedTensor.from_lengths_sync(
            ...     keys=["history_item", "candidate_item"],
            ...     values=torch.arange(4), lengths=torch.tensor([4, 0, 0, 0]))
            >>> features = RankingFeatures(torch.zeros(2, 0), KeyedJaggedTensor.empty(), histories,
            ...     torch.zeros(0, 0), history_age=torch.rand(4))
            >>> model.encode(features).count.tolist()
            [4, 0]
        """
        lists = self.item_sparse_arch(features.item_lists) if self.item_sparse_arch else None
        history, candidates = self.sequence_arch(features.sequence_features)
        return self.candidate_arch.encode(Lookups(None, lists, history, candidates), features)


def _check_tables(tables: Sequence[EmbeddingConfig], config: DLRM_IFAConfig) -> None:
    rows = {name: table.num_embeddings for table in tables for name in table.feature_names}
    for name in (*config.history_keys.values(), *config.candidate_keys.values()):
        if name not in rows:
            raise ConfigError(
                f"DLRM_IFA: the embedding collection has no feature {name!r}; there are {sorted(rows)}"
            )


class DLRM_IFATrain(nn.Module):
    """DLRM_IFA with its loss, CandidateSetLoss, for TorchRec's train pipelines.

    A model that generates sets also learns, in the same pass, how taken candidates change the others.
    For each request a new random subset of the exposed candidates is taken (TakenSample). The logits of
    the exposed given these get a pointwise term or, if the loss has none, a listwise term, with the same
    weight as without taken candidates. Re-ranking models are trained in this way on what was shown
    together (DLCM, arXiv 1804.05936; PRM, arXiv 1904.06813), and Seq2Slate (arXiv 1810.02019) on what
    was already placed; the sampling is our own. Unexposed candidates are left out: their labels, if any,
    say nothing about what they were shown with.

    Args:
        dlrm_module: DLRM_IFA.
        loss: CandidateSetLossConfig; None for its default: the mean binary cross entropy of the exposed
            candidates plus half a listwise term among them, and the Huber error of regression tasks.
        across_ranks: see CandidateSetLoss.

    Raises:
        ConfigError: the loss has a consistency term but candidates do not attend to each other; or the
            loss has only that term and the model generates sets.

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
                "DLRM_IFATrain: the consistency term needs a candidate_set attention; configure one, or "
                "set the term's weight to 0"
            )
        self.alone_loss = self.taken_sample = self.taken_loss = None
        config, tasks = self.loss.config, dlrm_module.config.tasks
        if dlrm_module.set_arch.relation_arch is not None and (
            config.pointwise or config.listwise_weight
        ):
            alone = dataclasses.replace(config, consistency=0.0)
            self.alone_loss = CandidateSetLoss(alone, across_ranks, tasks)
        if dlrm_module.taken_arch is not None:
            given = dataclasses.replace(config, consistency=0.0, unexposed=0.0)
            if (
                given.pointwise
            ):  # a set's worth is a sum of probabilities, which a listwise term distorts
                given = dataclasses.replace(given, listwise=0.0)
            self.taken_sample = TakenSample()
            self.taken_loss = CandidateSetLoss(given, across_ranks, tasks)

    def forward(self, batch: RankingBatch) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """
        Returns:
            The loss, a scalar, and (loss, logits [M, T], labels [M, T]), detached. The loss of a batch
            without candidates is 0.
        """
        candidates, set_arch = self.model.describe(batch), self.model.set_arch
        labels, shown, offsets = batch.labels, batch.exposed, candidates.offsets
        logits = set_arch(candidates, with_relation=False)
        if set_arch.relation_arch is None:
            loss = self.loss(logits, labels, shown, offsets)
        else:
            loss, logits = self._with_relation(logits, candidates, batch)
        taken_arch = self.model.taken_arch
        if taken_arch and self.taken_sample and self.taken_loss and self.training:
            taken = self.taken_sample(shown, offsets)
            # detached, so that a model that can generate sets ranks like one that cannot
            given = logits.detach() + taken_arch(candidates.detach(), taken)
            loss = loss + self.taken_loss(given, labels, shown, offsets)
        return loss, (loss.detach(), logits.detach(), labels.detach())

    def _with_relation(
        self, learnt: Tensor, candidates: Candidates, batch: RankingBatch
    ) -> tuple[Tensor, Tensor]:
        """The loss of the logits [M, T] without the other candidates' term (``learnt``) and with it; and
        the logits with it."""
        # the relation learns the residual of these logits, and does not change them
        set_arch, base = self.model.set_arch, learnt.detach()
        labels, shown, offsets = batch.labels, batch.exposed, candidates.offsets
        logits = set_arch(candidates, base_logits=base)
        alone_loss = self.alone_loss if self.training else None
        exposed_logits = None
        if self.loss.config.consistency:  # the exposed candidates, scored without the others
            rows = batch.exposed_rows
            exposed_logits = set_arch(
                candidates.only(shown, rows), base_logits=base[shown if rows is None else rows]
            )
        elif alone_loss:  # both have the same loss, in one pass: twice the mean over twice the requests
            ends = torch.cat([offsets, offsets[1:] + logits.shape[0]])
            both = torch.cat([learnt, logits])
            return 2 * self.loss(both, labels.repeat(2, 1), shown.repeat(2), ends), logits
        loss = self.loss(logits, labels, shown, offsets, exposed_logits)
        if alone_loss:
            loss = loss + alone_loss(learnt, labels, shown, offsets)
        return loss, logits
