"""DLRM_IFA: results that can be computed by hand, and properties of every interaction."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from itertools import chain, pairwise
from typing import Any

import pytest
import torch
from helpers import randomised
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig
from torchrec.distributed.train_pipeline import TrainPipelineBase
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from ifa_torchrec import DLRM_IFA, DLRM_IFAConfig, DLRM_IFATrain, IFAConfig, RankingBatch
from ifa_torchrec.distributed import OptimizerConfig, init_process_group, shard
from ifa_torchrec.errors import ConfigError
from ifa_torchrec.models.archs import CandidateArch, Lookups
from ifa_torchrec.models.parts import SCALE_RATE, InterestArch
from ifa_torchrec.models.sparse import SequenceArch
from ifa_torchrec.models.taken import set_worth
from ifa_torchrec.modules import (
    INTERACTIONS,
    CandidateSetConfig,
    CandidateSetLoss,
    CandidateSetLossConfig,
    DINAttention,
    InteractionConfig,
    InteractionFidelityAttention,
    MeanPooling,
)
from ifa_torchrec.modules.candidate_set import TakenSample
from ifa_torchrec.modules.history import counted
from ifa_torchrec.modules.pair_numbers import PairNumbers
from ifa_torchrec.modules.projections import ZeroLinear, reset_all

DIM = 8
ITEM_FEATURES = {"item": 50, "category": 6}
CONTEXT_FEATURES = {"store": 4, "weekday": 7}
HISTORIES, CANDIDATES = [5, 0, 9, 1], [3, 4, 2, 6]

every_interaction = pytest.mark.parametrize("interaction", INTERACTIONS)


def make_ifa(**changes) -> IFAConfig:
    return IFAConfig(**{"embedding_dim": DIM, "num_heads": 2, "identity_features": ("item",), **changes})


def make_tables(dim: int = DIM, keys: Sequence[str] = ("history_", "candidate_")) -> EmbeddingCollection:
    return EmbeddingCollection(
        tables=[
            EmbeddingConfig(
                name=f, embedding_dim=dim, num_embeddings=rows, feature_names=[k + f for k in keys]
            )
            for f, rows in ITEM_FEATURES.items()
        ]
    )


def make_bags(dim: int = DIM) -> EmbeddingBagCollection:
    return EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(name=f, embedding_dim=dim, num_embeddings=rows, feature_names=[f])
            for f, rows in CONTEXT_FEATURES.items()
        ]
    )


def make_config(interaction: str = "ifa", **changes) -> DLRM_IFAConfig:
    return DLRM_IFAConfig(
        item_features=tuple(ITEM_FEATURES),
        **{
            "dense_in_features": 2,
            "candidate_dense_in_features": 1,
            "interaction": interaction,
            "ifa": make_ifa(half_lives=(math.inf, 3.0)),
            "recent_length": 3,
            "num_tasks": 2,
            **changes,
        },
    )


def make_model(interaction: str = "ifa", **changes) -> DLRM_IFA:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return DLRM_IFA(make_bags(), make_tables(), make_config(interaction, **changes))


def make_batch(
    histories: Sequence[int] = HISTORIES, candidates: Sequence[int] = CANDIDATES, seed: int = 0
) -> RankingBatch:
    g = torch.Generator().manual_seed(seed)
    b, n, m = len(histories), sum(histories), sum(candidates)

    def ids(rows: int, count: int) -> Tensor:
        return torch.randint(rows, (count,), generator=g)

    values = [ids(rows, count) for count in (n, m) for rows in ITEM_FEATURES.values()]
    lengths = [torch.tensor(side) for side in (histories, candidates) for _ in ITEM_FEATURES]
    return RankingBatch(
        dense_features=torch.randn(b, 2, generator=g),
        context_features=KeyedJaggedTensor.from_lengths_sync(
            keys=list(CONTEXT_FEATURES),
            values=torch.cat([ids(rows, b) for rows in CONTEXT_FEATURES.values()]),
            lengths=torch.ones(2 * b, dtype=torch.int64),
        ),
        sequence_features=KeyedJaggedTensor.from_lengths_sync(
            keys=[side + f for side in ("history_", "candidate_") for f in ITEM_FEATURES],
            values=torch.cat(values),
            lengths=torch.cat(lengths),
        ),
        candidate_dense=torch.randn(m, 1, generator=g),
        history_age=10 * torch.rand(n, generator=g),
        labels=torch.randint(2, (m, 2), generator=g).float(),
        exposed=torch.randint(2, (m,), generator=g).bool(),
    )


def with_gaps(batch: RankingBatch) -> RankingBatch:
    """The batch with a missing number in each column."""
    batch.dense_features[1] = batch.candidate_dense[1] = math.nan
    return batch


def flat(rows: Sequence[Sequence[int]]) -> list[int]:
    return list(chain.from_iterable(rows))


def take(batch: RankingBatch, events: list[list[int]], candidates: list[list[int]], requests: list[int]):
    """A batch of these requests, each with the listed rows of events and candidates."""
    event_rows, candidate_rows = (
        torch.tensor(flat(rows), dtype=torch.int64) for rows in (events, candidates)
    )
    sequence, context = batch.sequence_features, batch.context_features
    values, lengths = [], []
    for key in sequence.keys():  # noqa: SIM118 a KJT is no dict
        of_history = key.startswith("history_")
        rows = events if of_history else candidates
        values.append(sequence[key].values()[event_rows if of_history else candidate_rows])
        lengths += [len(r) for r in rows]
    return RankingBatch(
        dense_features=batch.dense_features[requests],
        context_features=KeyedJaggedTensor.from_lengths_sync(
            keys=context.keys(),
            values=torch.cat([context[k].values()[requests] for k in context.keys()]),  # noqa: SIM118
            lengths=torch.ones(len(context.keys()) * len(requests), dtype=torch.int64),
        ),
        sequence_features=KeyedJaggedTensor.from_lengths_sync(
            keys=sequence.keys(), values=torch.cat(values), lengths=torch.tensor(lengths)
        ),
        candidate_dense=batch.candidate_dense[candidate_rows],
        history_age=batch.history_age[event_rows],
        labels=batch.labels[candidate_rows],
        exposed=batch.exposed[candidate_rows],
    )


def rows_of(lengths: Sequence[int]) -> list[list[int]]:
    return [list(range(sum(lengths[:i]), sum(lengths[: i + 1]))) for i in range(len(lengths))]


EVENT_ROWS, CANDIDATE_ROWS = rows_of(HISTORIES), rows_of(CANDIDATES)


class TestSequenceArch:
    def test_correctness(self) -> None:
        tables = make_tables(dim=2)
        with torch.no_grad():
            # row i of items is (i, 10 i), row i of categories is (100 i, 1000 i)
            for name, scale in (("item", (1, 10)), ("category", (100, 1000))):
                weight = tables.embeddings[name].weight
                weight.copy_(torch.arange(len(weight))[:, None] * torch.tensor(scale))
        features = KeyedJaggedTensor.from_lengths_sync(
            keys=["history_item", "history_category", "candidate_item", "candidate_category"],
            values=torch.tensor([*(1, 2, 3), *(1, 0, 2), *(3, 9), *(2, 1)]),
            lengths=torch.tensor([2, 0, 1] * 2 + [0, 1, 1] * 2),
        )
        history, candidates = SequenceArch(tables, make_config(ifa=make_ifa(embedding_dim=2)))(features)
        assert history.values().tolist() == [[101, 1010], [2, 20], [203, 2030]]
        assert history.lengths().tolist() == [2, 0, 1]
        assert history.offsets().tolist() == [0, 2, 2, 3]
        assert candidates.values().tolist() == [[203, 2030], [109, 1090]]
        assert candidates.lengths().tolist() == [0, 1, 1]

    def test_without_history_tables_only_the_candidates_are_looked_up(self) -> None:
        arch = SequenceArch(make_tables(keys=("candidate_",)), make_config("none"))
        history, candidates = arch(make_batch().sequence_features)
        assert history is None
        assert candidates.values().shape == (sum(CANDIDATES), DIM)


class TestComposition:
    def test_a_candidate_alone_is_its_normed_token_and_the_over_arch(self) -> None:
        """No interaction and no other features: the whole model computed by hand."""
        config = DLRM_IFAConfig(
            ("item",), interaction="none", ifa=make_ifa(), over_arch_layer_sizes=(4,), num_tasks=1
        )
        model = DLRM_IFA(None, make_tables(), config)
        with torch.no_grad():
            for number, parameter in enumerate(model.set_arch.over_arch.parameters()):
                parameter.copy_(torch.arange(parameter.numel()).view_as(parameter).sin() + 0.1 * number)
        batch = make_batch()
        batch.dense_features, batch.candidate_dense = torch.zeros(4, 0), torch.zeros(sum(CANDIDATES), 0)
        hidden, hidden_bias, last, last_bias = model.set_arch.over_arch.parameters()
        table = model.sequence_arch.embedding_collection.embeddings["item"].weight
        expected = []
        for item in batch.sequence_features["candidate_item"].values().tolist():
            token = table[item].tolist()
            mean = sum(token) / DIM
            deviation = math.sqrt(sum((x - mean) ** 2 for x in token) / DIM + 1e-5)
            token = torch.tensor([(x - mean) / deviation for x in token])
            expected.append(last @ (hidden @ token + hidden_bias).clamp(min=0) + last_bias)
        torch.testing.assert_close(model(batch), torch.stack(expected), rtol=1e-4, atol=1e-5)

    @every_interaction
    @pytest.mark.parametrize("what", ["dense", "store", "weekday", "candidate_dense"])
    def test_a_feature_reaches_its_own_candidates_alone(self, interaction: str, what: str) -> None:
        model, batch = make_model(interaction), make_batch()
        before = model(batch)
        request = [b for b, count in enumerate(CANDIDATES) for _ in range(count)]
        if what == "dense":
            batch.dense_features[2] += 1
            reached = [b == 2 for b in request]
        elif what == "candidate_dense":
            batch.candidate_dense[5] += 1
            reached = [c == 5 for c in range(len(request))]
        else:
            ids = batch.context_features[what].values()
            ids[2] = (ids[2] + 1) % CONTEXT_FEATURES[what]
            reached = [b == 2 for b in request]
        moved = (model(batch) - before).abs().amax(dim=1) > 1e-6
        assert moved.tolist() == reached

    def test_the_over_arch_sees_token_products_and_count(self) -> None:
        model, batch = make_model("ifa"), make_batch()
        caught = {}
        arch = model.set_arch
        arch.interaction_arch.register_forward_pre_hook(lambda _, given: caught.update(crossed=given))
        arch.over_arch.register_forward_pre_hook(lambda _, given: caught.update(all=given[0]))
        logits = model(batch)
        token, vectors = caught["crossed"]
        everything = caught["all"]
        torch.testing.assert_close(everything[:, :DIM], token)
        # the products of all pairs, each once
        stacked = torch.cat([token[:, None], vectors], dim=1)
        pairs = [(i, j) for i in range(stacked.shape[1]) for j in range(i + 1, stacked.shape[1])]
        products = torch.stack([(stacked[:, i] * stacked[:, j]).sum(1) for i, j in pairs], dim=1)
        torch.testing.assert_close(everything[:, DIM : DIM + len(pairs)], products)
        # and log(1 + n) is a feature
        count = torch.tensor(HISTORIES).log1p().repeat_interleave(torch.tensor(CANDIDATES))
        assert (everything - count[:, None]).abs().amax(dim=0).min() < 1e-5
        torch.testing.assert_close(arch.over_arch(everything), logits)

    @every_interaction
    def test_context_features_alone_reach_the_candidates(self, interaction: str) -> None:
        """Without numbers of requests or candidates."""
        batch = make_batch()
        model = make_model(interaction, dense_in_features=0, candidate_dense_in_features=0)
        batch.dense_features, batch.candidate_dense = torch.zeros(4, 0), torch.zeros(sum(CANDIDATES), 0)
        before = model(batch)
        ids = batch.context_features["store"].values()
        ids[2] = (ids[2] + 1) % CONTEXT_FEATURES["store"]
        moved = (model(batch) - before).abs().amax(dim=1) > 1e-6
        assert moved.tolist() == [b == 2 for b, count in enumerate(CANDIDATES) for _ in range(count)]

    @every_interaction
    def test_context_features_meet_each_other_the_request_and_the_token(self, interaction: str) -> None:
        """By dot products, in some order of columns, for each candidate."""
        model, batch = make_model(interaction), make_batch()
        caught = {}
        arch = model.candidate_arch
        arch.request_arch.dense_arch.register_forward_hook(
            lambda *given: caught.update(request=given[-1])
        )
        model.set_arch.over_arch.register_forward_pre_hook(lambda _, given: caught.update(all=given[0]))
        model(batch)
        context = model.sparse_arch(batch.context_features)
        candidate = 0
        for b, count in enumerate(CANDIDATES):
            for _ in range(count):
                seen = caught["all"][candidate]
                token, store, weekday = seen[:DIM] * DIM**0.25, *context[b]  # the input is scaled
                request = caught["request"][b]
                pairs = [(store, weekday), (store, token), (weekday, token)]
                for one, other in [*pairs, (store, request), (weekday, request)]:
                    assert (seen - one @ other).abs().min() < 1e-5
                candidate += 1

    def test_the_sequence_interaction_gets_tokens_ages_and_ids(self) -> None:
        model, batch = make_model("ifa"), make_batch()
        caught = []
        arch = model.candidate_arch
        arch.sequence_interaction.register_forward_pre_hook(lambda _, given: caught.append(given))
        model(batch)
        ((candidates, history, age, history_ids, candidate_ids),) = caught
        assert history.lengths().tolist() == HISTORIES
        assert candidates.lengths().tolist() == CANDIDATES
        assert torch.equal(age, batch.history_age)
        for given, key in ((history_ids, "history_item"), (candidate_ids, "candidate_item")):
            assert torch.equal(given, batch.sequence_features[key].values()[:, None])


@every_interaction
class TestEveryInteraction:
    def test_shape_and_finite_gradients_everywhere(self, interaction: str) -> None:
        model = make_model(interaction)
        for module in model.modules():
            if isinstance(module, ZeroLinear):  # it outputs 0 before the first step
                torch.nn.init.normal_(module.weight)
        logits = model(with_gaps(make_batch()))
        assert logits.shape == (sum(CANDIDATES), 2) and logits.isfinite().all()
        logits.square().sum().backward()
        without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        assert without == [], "no gradient reaches them"
        assert all(p.grad.isfinite().all() for p in model.parameters())

    def test_permuting_candidates_permutes_logits(self, interaction: str) -> None:
        model, batch = make_model(interaction), make_batch()
        shuffled = [rows[1::2] + rows[::2][::-1] for rows in CANDIDATE_ROWS]
        permuted = model(take(batch, EVENT_ROWS, shuffled, [0, 1, 2, 3]))
        torch.testing.assert_close(permuted, model(batch)[flat(shuffled)])

    @pytest.mark.parametrize("kept", [[0], [1], [2, 0], [3, 2, 1, 0]], ids=str)
    def test_a_request_is_scored_the_same_in_any_batch(self, interaction: str, kept: list[int]) -> None:
        model, batch = make_model(interaction), make_batch()
        rows = [CANDIDATE_ROWS[b] for b in kept]
        alone = model(take(batch, [EVENT_ROWS[b] for b in kept], rows, kept))
        torch.testing.assert_close(alone, model(batch)[flat(rows)])

    def test_candidates_are_scored_the_same_in_any_set(self, interaction: str) -> None:
        """Without a candidate set attention, no relation between candidates is modelled."""
        model, batch = make_model(interaction), make_batch()
        fewer = [rows[1:] for rows in CANDIDATE_ROWS]
        logits = model(take(batch, EVENT_ROWS, fewer, [0, 1, 2, 3]))
        torch.testing.assert_close(logits, model(batch)[flat(fewer)])

    def test_histories_matter_but_for_none(self, interaction: str) -> None:
        """And they do not if they are empty."""
        model, batch = make_model(interaction), make_batch()
        without = model(take(batch, [[], [], [], []], CANDIDATE_ROWS, [0, 1, 2, 3]))
        moved = (without - model(batch)).abs().amax(dim=1) > 1e-6
        had_events = [interaction != "none" and HISTORIES[b] > 0 for b in range(4)]
        assert moved.tolist() == [had_events[b] for b, rows in enumerate(CANDIDATE_ROWS) for _ in rows]

    def test_without_events_the_interaction_has_no_part_in_the_logits(self, interaction: str) -> None:
        """Whatever it has learnt, including its bias and the norm's."""
        model, batch = make_model(interaction), make_batch()
        before = model(batch)
        arch = model.candidate_arch
        for part in (arch.sequence_interaction, arch.interest_arch):
            if part is not None:
                randomised(part)
        moved = (model(batch) - before).abs().amax(dim=1) > 1e-6
        had_events = [interaction != "none" and HISTORIES[b] > 0 for b in range(4)]
        assert moved.tolist() == [had_events[b] for b, rows in enumerate(CANDIDATE_ROWS) for _ in rows]

    def test_an_empty_candidate_set_changes_nothing_for_the_others(self, interaction: str) -> None:
        model, batch = make_model(interaction), make_batch()
        rows = [[], CANDIDATE_ROWS[1], [], CANDIDATE_ROWS[3]]
        logits = model(take(batch, EVENT_ROWS, rows, [0, 1, 2, 3]))
        torch.testing.assert_close(logits, model(batch)[flat(rows)])

    @pytest.mark.parametrize("requests", [1, 3])
    def test_no_candidates_at_all_have_loss_0(self, interaction: str, requests: int) -> None:
        train = DLRM_IFATrain(make_model(interaction))
        loss, (_, logits, labels) = train(make_batch([2] * requests, [0] * requests))
        assert loss.item() == 0 and logits.shape == labels.shape == (0, 2)
        loss.backward()
        # zeros instead of None: DistributedDataParallel waits for the gradient of every parameter
        dense = train.model.candidate_arch.parameters()
        assert all(p.grad is not None and not p.grad.any() for p in dense)

    @pytest.mark.parametrize("set_size", [1, 300])
    def test_an_event_is_looked_up_once_however_many_candidates(
        self, interaction: str, set_size: int
    ) -> None:
        keys = ("candidate_",) if interaction == "none" else ("history_", "candidate_")
        config = DLRM_IFAConfig(
            tuple(ITEM_FEATURES),
            dense_in_features=2,
            candidate_dense_in_features=1,
            interaction=interaction,
            ifa=make_ifa(),
        )
        model = DLRM_IFA(None, make_tables(keys=keys), config)
        looked_up = []
        for table in model.sequence_arch.embedding_collection.embeddings.values():
            table.register_forward_hook(lambda _, inputs, rows: looked_up.append(len(rows)))
        model(make_batch(candidates=[set_size] * 4))
        events = 0 if interaction == "none" else sum(HISTORIES)
        assert sum(looked_up) == len(ITEM_FEATURES) * (events + 4 * set_size)

    def test_loss_is_the_mean_binary_cross_entropy_of_the_exposed(self, interaction: str) -> None:
        model, batch = make_model(interaction), make_batch()
        train = DLRM_IFATrain(model, CandidateSetLossConfig(listwise=0.0))
        loss, (detached, logits, labels) = train(batch)
        assert torch.equal(logits, model(batch)) and torch.equal(labels, batch.labels)
        shown, label = batch.exposed, batch.labels[batch.exposed]
        torch.testing.assert_close(loss, torch.nn.BCEWithLogitsLoss()(logits[shown], label))
        probability = logits[shown].double().sigmoid()
        by_hand = -torch.where(label > 0, probability.log(), (1 - probability).log()).mean()
        torch.testing.assert_close(loss.double(), by_hand)
        assert torch.equal(detached, loss) and loss.requires_grad
        assert not (detached.requires_grad or logits.requires_grad)

    def test_torchrecs_train_pipeline_trains_it(self, interaction: str) -> None:
        model = DLRM_IFATrain(make_model(interaction))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        pipeline = TrainPipelineBase(model, optimizer, torch.device("cpu"))
        batches = iter([make_batch()] * 30)
        losses = []
        while True:
            try:
                loss, *_ = pipeline.progress(batches)
            except StopIteration:
                break
            losses.append(loss.item())
        assert len(losses) == 30
        # a repeated batch can be memorised
        assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("scale", [1.0, 0.1])
def test_what_a_history_says_counts_by_its_events(scale: float) -> None:
    """Half with 10 events, in all outputs, and almost fully with many more; times the scale."""
    arch, rows = InterestArch(DIM, scale), torch.randn(4, DIM)
    request, events = torch.tensor([0, 1, 2, 2]), torch.tensor([0.0, 10.0, 990.0])
    (crossed,), (beside, product, count) = arch(rows, rows.flip(0), events, request)
    share = torch.tensor([[0.0], [0.5], [0.99], [0.99]])
    expected = share * scale * torch.nn.functional.layer_norm(rows.flip(0), (DIM,))
    for found in (crossed, beside):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(product, rows * expected)
    torch.testing.assert_close(count, events[request, None].log1p())


@pytest.mark.parametrize("identity, scale", [((), 1.0), (("item",), 0.3)])
@pytest.mark.parametrize("interaction", ["ifa", "softmax"])
def test_a_history_starts_small_where_identity_heads_are(
    interaction: str, identity: tuple[str, ...], scale: float
) -> None:
    """Also after the meta device."""
    ifa = IFAConfig(DIM, num_heads=2, identity_features=identity)
    config = DLRM_IFAConfig(("item",), ifa=ifa, interaction=interaction)
    arch = CandidateArch(config, num_context_features=1).to("meta").to_empty(device="cpu")
    reset_all(arch)
    assert arch.interest_arch is not None
    starts = arch.interest_arch.log_scale.mul(SCALE_RATE).exp()
    torch.testing.assert_close(starts, torch.tensor([scale]))


def with_relations(model: DLRM_IFA) -> DLRM_IFA:
    """The model with random relations, as if trained; they start at 0."""
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, (PairNumbers, ZeroLinear)):
            with torch.no_grad():
                module.weight.copy_(torch.randn(module.weight.shape, generator=generator))
    return model


def test_relations_start_at_nothing() -> None:
    """So that a model with them starts like one without."""
    batch, plain = make_batch(), make_model()
    for attention in ("none", "softmax", "linear"):
        model = make_model(candidate_set=CandidateSetConfig(attention, generate=True))
        assert torch.equal(model(batch), plain(batch))
        taken = torch.ones(sum(CANDIDATES)).bool()
        assert torch.equal(model.logits_given(model.describe(batch), taken), plain(batch))


@pytest.mark.parametrize("attention", ["none", "softmax", "linear"])
class TestWhatIsTaken:
    @staticmethod
    def make(attention: str) -> DLRM_IFA:
        config = CandidateSetConfig(attention, generate=True)
        return with_relations(make_model(candidate_set=config))

    def test_with_nothing_taken_the_logits_are_those_of_forward(self, attention: str) -> None:
        model, batch = self.make(attention), make_batch()
        candidates = model.describe(batch)
        nothing = torch.zeros(sum(CANDIDATES)).bool()
        for given in (candidates, model.scored(candidates)):
            assert torch.equal(model.logits_given(given), model(batch))
            assert torch.equal(model.logits_given(given, nothing), model(batch))

    def test_what_is_taken_moves_the_others_of_its_request(self, attention: str) -> None:
        model, batch = self.make(attention), make_batch()
        candidates = model.scored(model.describe(batch))
        taken = torch.zeros(sum(CANDIDATES)).bool()
        taken[4] = True  # in the second request, rows 3 to 6
        moved = (model.logits_given(candidates, taken) - model(batch)).abs().amax(dim=1) > 1e-6
        assert moved.nonzero().flatten().tolist() == [3, 5, 6]

    def test_the_terms_of_the_taken_add_up(self, attention: str) -> None:
        model, batch = self.make(attention), make_batch()
        candidates = model.scored(model.describe(batch))
        rows = torch.eye(sum(CANDIDATES)).bool()
        each = [model.logits_given(candidates, rows[r]) - model(batch) for r in (3, 4, 8)]
        both = model.logits_given(candidates, rows[3] | rows[4] | rows[8])
        torch.testing.assert_close(both - model(batch), sum(each), rtol=1e-4, atol=1e-5)

    def test_from_the_states_they_are_the_same(self, attention: str) -> None:
        model, batch = self.make(attention), make_batch()
        taken = torch.arange(sum(CANDIDATES)) % 3 == 0
        from_histories = model.logits_given(model.describe(batch), taken)
        from_states = model.logits_given(model.describe(batch, model.encode(batch)), taken)
        torch.testing.assert_close(from_states, from_histories, rtol=0, atol=1e-5)

    def test_what_a_candidate_is_worth_is_what_the_set_is_worth_with_it(self, attention: str) -> None:
        model, batch = self.make(attention), make_batch()
        candidates, tasks = model.scored(model.describe(batch)), model.config.tasks

        def worth(taken: Tensor) -> Tensor:
            return set_worth(model.logits_given(candidates, taken), tasks)[taken].sum()

        for taken in (torch.arange(sum(CANDIDATES)) % 3 == 1, torch.zeros(sum(CANDIDATES)).bool()):
            gain = model.set_gain(candidates)(taken)
            torch.testing.assert_close(model.set_gain(model.describe(batch))(taken), gain)
            for row in (~taken).nonzero().flatten():
                more = taken.clone()
                more[row] = True
                torch.testing.assert_close(gain[row], worth(more) - worth(taken), rtol=1e-4, atol=1e-5)

    def test_both_losses_are_trained_in_one_pass_and_one_is_measured(self, attention: str) -> None:
        model, batch = (
            make_model(candidate_set=CandidateSetConfig(attention, generate=True)),
            make_batch(),
        )
        train = DLRM_IFATrain(model, CandidateSetLossConfig(listwise=0.5))
        torch.manual_seed(0)  # for the draw of taken candidates
        loss, _ = train(batch)
        loss.backward()
        assert model.taken_arch.relation.query_proj.weight.grad.any()
        first, second = (train.eval()(batch)[0].item() for _ in range(2))
        assert first == second < loss.item()

    def test_nothing_else_is_trained_otherwise(self, attention: str) -> None:
        """A model that can generate sets ranks bitwise like one that cannot."""
        weights, drawn = [], []
        for generate in (True, False):
            config = make_config("ifa", candidate_set=CandidateSetConfig(attention, generate=generate))
            torch.manual_seed(0)
            model = DLRM_IFA(make_bags(), make_tables(), config)
            # like the initialisation of later modules, such as a run's tables
            drawn.append(torch.rand(1))
            train = DLRM_IFATrain(model)
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
            for _ in range(3):
                optimizer.zero_grad()
                train(make_batch())[0].backward()
                optimizer.step()
            weights.append({n: w for n, w in model.named_parameters() if "taken_arch" not in n})
        one, other = weights
        assert one.keys() == other.keys() and drawn[0] == drawn[1]
        for name, weight in one.items():
            assert torch.equal(weight, other[name]), name


@pytest.mark.parametrize("unexposed", [0.0, 0.3])
def test_the_loss_is_the_sum_of_each_alone_of_all_beside_each_other_and_of_something_taken(
    unexposed,
) -> None:
    config = CandidateSetConfig("softmax", generate=True)
    model, batch = with_relations(make_model(candidate_set=config)), make_batch()
    batch = dataclasses.replace(batch, exposed=torch.arange(sum(CANDIDATES)) % 3 != 1)
    config = CandidateSetLossConfig(unexposed=unexposed)
    train = DLRM_IFATrain(model, config)
    torch.manual_seed(3)
    loss, _ = train(batch)
    torch.manual_seed(3)
    candidates, shown = model.describe(batch), batch.exposed
    taken = TakenSample()(shown, candidates.offsets)
    assert taken.any()
    logits, given = model.logits_given(candidates), model.logits_given(candidates, taken)
    plain = CandidateSetLoss(config)
    offsets = counted(shown, candidates.offsets)
    wanted = plain(logits, batch.labels, shown, candidates.offsets)
    alone = model.set_arch(candidates, with_relation=False)
    wanted = wanted + plain(alone, batch.labels, shown, candidates.offsets)
    no_order = CandidateSetLoss(dataclasses.replace(config, listwise=0.0))
    wanted = wanted + no_order(given[shown], batch.labels[shown], shown[shown], offsets)
    torch.testing.assert_close(loss, wanted)


def test_a_model_that_was_not_trained_for_it_refuses_what_is_taken() -> None:
    model = make_model(candidate_set=CandidateSetConfig("softmax"))
    candidates = model.describe(make_batch())
    assert torch.equal(model.logits_given(candidates), model(make_batch()))
    for scored in (model.logits_given, lambda candidates, _: model.set_gain(candidates)):
        with pytest.raises(ConfigError, match=r"not trained to generate sets; .*generate"):
            scored(candidates, torch.zeros(sum(CANDIDATES)).bool())
    given = make_model(candidate_set=CandidateSetConfig(generate=True))
    with pytest.raises(ValueError, match=r"taken must be \[15\] bool"):
        given.logits_given(given.describe(make_batch()), torch.zeros(3).bool())
    with pytest.raises(ConfigError, match="are all 0"):
        DLRM_IFATrain(self_seeing(), CandidateSetLossConfig(pointwise=0.0, consistency=1.0))


def self_seeing() -> DLRM_IFA:
    return make_model(candidate_set=CandidateSetConfig("softmax", generate=True))


@pytest.mark.parametrize("attention", ["softmax", "linear"])
class TestCandidateSet:
    """Models whose candidates attend to each other."""

    @staticmethod
    def make(attention: str, interaction: str = "ifa") -> DLRM_IFA:
        """As if trained: what starts at 0 has an effect."""
        model = make_model(interaction, candidate_set=CandidateSetConfig(attention, generate=True))
        return with_relations(model)

    @pytest.mark.parametrize("interaction", ["ifa", "none"])
    def test_every_parameter_has_a_gradient(self, attention: str, interaction: str) -> None:
        model = self.make(attention, interaction)
        candidates = model.describe(with_gaps(make_batch()))
        logits = model.logits_given(candidates, torch.arange(sum(CANDIDATES)) % 2 == 0)
        assert logits.shape == (sum(CANDIDATES), 2)
        logits.square().sum().backward()
        without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        assert without == []

    def test_permuting_candidates_permutes_logits(self, attention: str) -> None:
        model, batch = self.make(attention), make_batch()
        shuffled = [rows[1::2] + rows[::2][::-1] for rows in CANDIDATE_ROWS]
        permuted = model(take(batch, EVENT_ROWS, shuffled, [0, 1, 2, 3]))
        torch.testing.assert_close(permuted, model(batch)[flat(shuffled)])

    def test_a_request_is_scored_the_same_in_any_batch(self, attention: str) -> None:
        model, batch = self.make(attention), make_batch()
        rows = [CANDIDATE_ROWS[b] for b in (2, 0)]
        alone = model(take(batch, [EVENT_ROWS[b] for b in (2, 0)], rows, [2, 0]))
        torch.testing.assert_close(alone, model(batch)[flat(rows)])

    def test_a_candidate_less_changes_its_own_request_alone(self, attention: str) -> None:
        model, batch = self.make(attention), make_batch()
        fewer = [CANDIDATE_ROWS[0][1:], *CANDIDATE_ROWS[1:]]
        logits = model(take(batch, EVENT_ROWS, fewer, [0, 1, 2, 3]))
        moved = (logits - model(batch)[flat(fewer)]).abs().amax(dim=1) > 1e-6
        assert moved.tolist() == [True] * 2 + [False] * 12

    def test_the_history_enters_the_relations(self, attention: str) -> None:
        """User-aware: the encoder's input depends on the history."""
        model, batch = self.make(attention), make_batch()
        caught = []
        encoder = model.set_arch.relation_arch.candidate_set_encoder
        encoder.register_forward_pre_hook(lambda _, given: caught.append(given[0].values()))
        model(batch)
        model(take(batch, [[], EVENT_ROWS[1], [], []], CANDIDATE_ROWS, [0, 1, 2, 3]))
        moved = (caught[0] - caught[1]).abs().amax(dim=1) > 1e-6
        assert moved.tolist() == [b != 1 for b, rows in enumerate(CANDIDATE_ROWS) for _ in rows]

    def test_exposed_alone_is_the_model_on_the_exposed(self, attention: str) -> None:
        model, batch = self.make(attention), make_batch()
        kept = [[row for row in rows if batch.exposed[row]] for rows in CANDIDATE_ROWS]
        described = model.describe(batch)
        logits, alone = model.set_arch(described), model.set_arch(described.only(batch.exposed))
        torch.testing.assert_close(logits, model(batch))
        torch.testing.assert_close(alone, model(take(batch, EVENT_ROWS, kept, [0, 1, 2, 3])))
        assert not torch.allclose(alone, logits[batch.exposed])

    @pytest.mark.slow
    def test_training_by_consistency_closes_the_gap(self, attention: str) -> None:
        """Labels depend on the rest of the set, so that unexposed candidates change the scores."""

        def relative(seed: int) -> RankingBatch:
            batch = make_batch(candidates=[8] * 4, seed=seed)
            order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
            level = torch.linspace(-2, 2, 4)[order, None]
            price = batch.candidate_dense.view(4, 8) + level
            batch.candidate_dense = price.view(-1, 1)
            dearer = (price > price.mean(1, keepdim=True)).float().view(-1, 1)
            batch.labels = dearer.expand(-1, 2).contiguous()
            return batch

        gap_of = CandidateSetLoss(CandidateSetLossConfig(pointwise=0.0, consistency=1.0))
        gaps = {0.0: 0.0, 10.0: 0.0}
        # three trainings with 20 batches each: a single one varies by more than the term gains
        for weight, trial in itertools.product(gaps, range(3)):
            train_on, measure_on = (
                [relative(1000 * trial + n) for n in numbers]
                for numbers in (range(200), range(500, 520))
            )
            config = CandidateSetLossConfig(consistency=weight)
            train = DLRM_IFATrain(self.make(attention), config)
            optimizer = torch.optim.Adam(train.parameters(), lr=0.01)
            for batch in train_on:
                loss, _ = train(batch)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            for batch in measure_on:
                with torch.no_grad():
                    described, score = train.model.describe(batch), train.model.set_arch
                    logits, alone = score(described), score(described.only(batch.exposed))
                offsets = batch.sequence_features["candidate_item"].offsets()
                gaps[weight] += gap_of(logits, batch.labels, batch.exposed, offsets, alone).item() / 60
        assert gaps[0.0] > 0.003 and gaps[10.0] < 0.6 * gaps[0.0], gaps


def test_a_consistency_term_needs_candidates_that_see_each_other() -> None:
    with pytest.raises(ValueError, match="consistency term needs a candidate_set attention"):
        DLRM_IFATrain(make_model(), CandidateSetLossConfig(consistency=0.1))


def test_unexposed_candidates_count_as_the_loss_says() -> None:
    batch = make_batch()
    model = make_model()

    def loss(**options: Any) -> torch.Tensor:
        config = CandidateSetLossConfig(listwise=0.0, **options)
        return DLRM_IFATrain(model, config)(batch)[0]

    whole = torch.nn.BCEWithLogitsLoss()(model(batch), batch.labels)
    torch.testing.assert_close(loss(unexposed=1.0), whole)
    torch.testing.assert_close(loss(unexposed=1.0, pointwise_unexposed=False), loss())


def test_sim_searches_by_the_feature_it_is_told() -> None:
    model = make_model("sim", search_feature="category")
    assert model.candidate_arch.sequence_interaction.id_features == ("item", "category")
    with pytest.raises(ValueError, match=r"search_feature \['brand'\] must be among the item_features"):
        make_model("sim", search_feature="brand")


def test_an_interaction_is_given_in_place_of_a_name() -> None:
    config = make_model("din").config
    own = MeanPooling(InteractionConfig(DIM, num_heads=2, identity_features=("category",)))
    model = DLRM_IFA(make_bags(), make_tables(), config, own)
    assert model.candidate_arch.sequence_interaction is own
    assert model(make_batch()).shape == (sum(CANDIDATES), 2)
    with pytest.raises(ValueError, match="'MeanPooling' has no user state"):
        _ = model.candidate_arch.ifa


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (InteractionConfig(2 * DIM, num_heads=2), "mean"),
        (InteractionConfig(DIM, num_heads=2, identity_features=("brand",)), "mean"),
        (InteractionConfig(DIM, num_heads=2), "none"),
    ],
)
def test_an_interaction_that_does_not_fit_is_refused(given: InteractionConfig, name: str) -> None:
    with pytest.raises(ConfigError, match=r"MeanPooling: it has width .* compares"):
        DLRM_IFA(make_bags(), make_tables(), make_model(name).config, MeanPooling(given))


def test_an_interaction_added_to_the_registry_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(INTERACTIONS, "latest", lambda config, *_: DINAttention(config, 1))
    assert make_model("latest")(make_batch()).shape == (sum(CANDIDATES), 2)


def test_the_dense_part_is_made_where_it_is_asked_for() -> None:
    model = DLRM_IFA(make_bags(), make_tables(), make_model().config, dense_device="meta")
    dense = (model.candidate_arch, model.set_arch)
    assert all(p.is_meta for arch in dense for p in arch.parameters())
    assert not any(p.is_meta for p in model.sequence_arch.parameters())


@pytest.mark.parametrize("interaction", [i for i in INTERACTIONS if i != "none"])
@pytest.mark.parametrize(
    "change",
    [{"identity_features": ()}, {"interest_mass": False}, {"identity_features": ("category", "item")}],
    ids=str,
)
def test_identity_and_mass_are_given_to_every_peer_alike(interaction: str, change: dict) -> None:
    """They only change the width of output_proj's input, not the dense heads or the rest."""
    plain = make_model(interaction, ifa=make_ifa())
    changed = make_model(interaction, ifa=dataclasses.replace(make_ifa(), **change))
    shapes = [
        {
            name: p.shape
            for name, p in model.named_parameters()
            if "sequence_interaction.identity." not in name
        }
        for model in (plain, changed)
    ]
    differing = {
        name
        for name in shapes[0].keys() | shapes[1].keys()
        if shapes[0].get(name) != shapes[1].get(name)
    }
    assert differing == {"candidate_arch.sequence_interaction.output_proj.weight"}

    # with the same weights the dense heads return the same numbers
    changed.load_state_dict(
        {
            name: value
            for name, value in plain.state_dict().items()
            if "output_proj" not in name and "interaction.identity." not in name
        },
        strict=False,
    )
    inputs = []
    for model in (plain, changed):
        model.candidate_arch.sequence_interaction.output_proj.register_forward_pre_hook(
            lambda _, given: inputs.append(given[0])
        )
        model(make_batch())
    torch.testing.assert_close(inputs[0][:, :DIM], inputs[1][:, :DIM])
    assert inputs[0].shape[1] != inputs[1].shape[1]


def test_events_of_the_candidates_own_item_are_counted_by_identity_heads() -> None:
    """The ids reach the identity heads in the order of the config, for events and for candidates."""
    model = make_model("mean", ifa=make_ifa(identity_features=("category", "item")))
    batch = make_batch()
    for feature in ("category", "item"):  # row 0 is "unknown" and matches nothing
        for key in (f"history_{feature}", f"candidate_{feature}"):
            batch.sequence_features[key].values()[:2] = 0
    caught = []
    model.candidate_arch.sequence_interaction.output_proj.register_forward_pre_hook(
        lambda _, given: caught.append(given[0])
    )
    model(batch)
    masses = caught[0][:, -2:].exp() - 1
    for k, feature in enumerate(("category", "item")):
        history = batch.sequence_features[f"history_{feature}"].to_dense()
        wanted = [
            (history[b] == candidate).sum().item() * bool(candidate != 0)
            for b, candidates in enumerate(batch.sequence_features[f"candidate_{feature}"].to_dense())
            for candidate in candidates
        ]
        assert any(wanted)
        assert masses[:, k].tolist() == pytest.approx(wanted, abs=1e-5)


class TestErrors:
    def test_unknown_interaction(self) -> None:
        with pytest.raises(ValueError, match=r"ifa.*softmax.*got 'telepathy'"):
            DLRM_IFAConfig(("item",), interaction="telepathy")

    def test_unknown_identity_feature(self) -> None:
        with pytest.raises(ValueError, match=r"\['brand'\].*\['item', 'category'\]"):
            DLRM_IFAConfig(tuple(ITEM_FEATURES), ifa=make_ifa(identity_features=("item", "brand")))

    def test_feature_without_a_table(self) -> None:
        config = DLRM_IFAConfig(("item", "brand"), ifa=make_ifa())
        with pytest.raises(ValueError, match=r"'history_brand'.*candidate_item"):
            DLRM_IFA(None, make_tables(), config)

    def test_history_feature_without_a_table(self) -> None:
        tables = make_tables(keys=("candidate_",))
        with pytest.raises(ValueError, match="'history_item'"):
            DLRM_IFA(None, tables, DLRM_IFAConfig(("item",), ifa=make_ifa()))
        # as for "none"
        DLRM_IFA(None, tables, DLRM_IFAConfig(("item",), ifa=make_ifa(), interaction="none"))

    def test_an_own_interaction_that_the_configuration_does_not_feed(self) -> None:
        config = DLRM_IFAConfig(tuple(ITEM_FEATURES), ifa=make_ifa())
        for known in ({"gates": {"act": 3}}, {"identity_features": ("brand",)}):
            own = InteractionFidelityAttention(IFAConfig(DIM, num_heads=2, **known))
            with pytest.raises(ConfigError, match=r"InteractionFidelityAttention: .*'(act|brand)'"):
                DLRM_IFA(None, make_tables(), config, own)


class TestBadBatch:
    """Batches that would silently give wrong numbers."""

    def test_features_of_one_event_in_different_requests(self) -> None:
        batch = make_batch(histories=[4, 0, 2, 1])
        lengths = batch.sequence_features.lengths().clone()
        lengths[4:8] = torch.tensor([3, 1, 2, 1])  # of the second history feature, with the same sum
        batch.sequence_features = KeyedJaggedTensor.from_lengths_sync(
            keys=batch.sequence_features.keys(),
            values=batch.sequence_features.values(),
            lengths=lengths,
        )
        with pytest.raises(ValueError, match=r"history_.* and history_.* have different lengths"):
            make_model("ifa")(batch)

    def test_columns_that_the_model_does_not_take(self) -> None:
        batch = make_batch()
        batch.candidate_dense = torch.zeros(sum(CANDIDATES), 3)
        with pytest.raises(ValueError, match="candidate_dense has 3 columns, but the model takes 1"):
            make_model("ifa")(batch)

    def test_dense_features_of_more_requests(self) -> None:
        batch = make_batch()
        batch.dense_features = torch.zeros(5, 2)
        with pytest.raises(ValueError, match=r"sequence_features have 4 requests.*5"):
            make_model("ifa")(batch)

    @pytest.mark.parametrize("interaction", ["none", "softmax"])
    def test_a_state_where_there_can_be_none(self, interaction: str) -> None:
        batch = make_batch()
        state = make_model("ifa").encode(batch)
        with pytest.raises(ValueError, match=f"'{interaction}' has no user state"):
            make_model(interaction).attend(batch, state)

    def test_no_histories(self) -> None:
        model, batch = make_model("ifa"), make_batch()
        context = model.sparse_arch(batch.context_features)
        _, candidates = model.sequence_arch(batch.sequence_features)
        with pytest.raises(ValueError, match="the interaction needs histories"):
            model.candidate_arch(Lookups(context, None, None, candidates), batch)


@torch.no_grad()
def test_from_a_state_the_scores_are_those_of_the_histories() -> None:
    model, batch = make_model(candidate_set=CandidateSetConfig("softmax")), make_batch()
    state = model.encode(batch)
    assert state.count.tolist() == HISTORIES
    nothing, offsets = [[]] * 4, [0, *torch.tensor(CANDIDATES).cumsum(0).tolist()]
    rows = [list(range(a, b)) for a, b in pairwise(offsets)]
    without = take(batch, nothing, rows, list(range(4)))
    torch.testing.assert_close(model.attend(without, state), model(batch), rtol=0, atol=1e-6)


@pytest.mark.parametrize("interaction", ["none", "softmax"])
def test_only_ifa_has_states(interaction: str) -> None:
    batch = make_batch()
    with pytest.raises(ValueError, match=f"'{interaction}' has no user state"):
        make_model(interaction).encode(batch)


# ------------------------------------------------------------------------------- what comes in, and how


def with_weights(features: KeyedJaggedTensor) -> KeyedJaggedTensor:
    return KeyedJaggedTensor(
        features.keys(), features.values(), torch.rand(len(features.values())), features.lengths()
    )


@every_interaction
def test_weights_that_would_have_no_effect_are_refused(interaction: str) -> None:
    model = make_model(interaction)
    for name in ("sequence_features", "context_features"):
        batch = make_batch()
        setattr(batch, name, with_weights(getattr(batch, name)))
        with pytest.raises(ValueError, match=f"{name} has weights"):
            model(batch)
    if interaction == "ifa":
        batch = make_batch()
        batch.sequence_features = with_weights(batch.sequence_features)
        with pytest.raises(ValueError, match="sequence_features has weights"):
            model.encode(batch)


def test_weights_of_context_features_are_heeded_by_weighted_tables() -> None:
    tables = EmbeddingBagCollection(is_weighted=True, tables=make_bags().embedding_bag_configs())
    model = make_model()
    weighted = DLRM_IFA(tables, make_tables(), model.config)
    batch = make_batch()
    batch.context_features = with_weights(batch.context_features)
    one = weighted(batch)
    batch.context_features.weights().zero_()
    assert not torch.allclose(weighted(batch), one)


@every_interaction
def test_int32_ids_give_what_int64_ids_give(interaction: str) -> None:
    model, batch, narrow = make_model(interaction), make_batch(), make_batch()
    for name in ("sequence_features", "context_features"):
        given = getattr(narrow, name)
        lengths = given.lengths().int()
        setattr(narrow, name, KeyedJaggedTensor(given.keys(), given.values().int(), lengths=lengths))
    assert torch.equal(model(narrow), model(batch))
    if interaction == "ifa":
        states = [model.encode(b) for b in (narrow, batch)]
        assert torch.equal(states[0].identity_key, states[1].identity_key)
        assert torch.equal(states[0].key_value, states[1].key_value)


def lost(model: torch.nn.Module) -> torch.nn.Module:
    """The model as after ``to_empty``, with arbitrary memory contents."""
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data.fill_(math.nan)
    return model


def make_model_on_meta(interaction: str) -> DLRM_IFA:
    with torch.device("meta"):
        model = make_model(interaction, candidate_set=CandidateSetConfig("linear"))
    assert any(p.is_meta for p in model.candidate_arch.parameters())
    return model


@every_interaction
def test_from_the_meta_device_by_reset_parameters(interaction: str) -> None:
    model = lost(make_model_on_meta(interaction))
    model.reset_parameters()
    assert all(tensor.isfinite().all() for tensor in (*model.parameters(), *model.buffers()))
    sequence = model.candidate_arch.sequence_interaction
    if sequence is not None:
        assert torch.equal(sequence.value_proj.weight, torch.eye(DIM))
    assert model(make_batch()).isfinite().all()


@every_interaction
def test_from_the_meta_device_by_load_state_dict(interaction: str) -> None:
    trained = make_model(interaction, candidate_set=CandidateSetConfig("linear"))
    model = lost(make_model_on_meta(interaction))
    model.load_state_dict(trained.state_dict())
    assert torch.equal(model(make_batch()), trained(make_batch()))


@pytest.mark.parametrize("interaction", ["ifa", "sdim"])
def test_from_the_meta_device_by_distributed_model_parallel(interaction: str) -> None:
    device, meta = init_process_group(), torch.device("meta")
    bags, tables = make_bags().embedding_bag_configs(), make_tables().embedding_configs()
    with meta:  # torchrec's collections need it explicitly
        model = DLRM_IFA(
            EmbeddingBagCollection(tables=bags, device=meta),
            EmbeddingCollection(tables=tables, device=meta),
            make_model_on_meta(interaction).config,
        )
    sharded, _ = shard(model, device, OptimizerConfig())
    plain = make_model(interaction, candidate_set=CandidateSetConfig("linear"))
    with torch.no_grad():
        saved = plain.state_dict()
        for name, tensor in sharded.state_dict().items():
            if isinstance(tensor, ShardedTensor):  # the tables, entirely on this one rank
                saved[name].copy_(tensor.local_shards()[0].tensor)
            else:
                saved[name].copy_(tensor)
    torch.testing.assert_close(sharded(make_batch()), plain(make_batch()))
    interaction_arch = plain.candidate_arch.sequence_interaction
    assert interaction_arch is not None
    assert torch.equal(interaction_arch.value_proj.weight, torch.eye(DIM))


def test_a_state_dict_of_other_half_lives_is_refused() -> None:
    model, other = make_model(), make_model(ifa=make_ifa(half_lives=(math.inf, 4.0)))
    with pytest.raises(ConfigError, match=r"half_lives was \[inf, 3.0\], is \[inf, 4.0\]"):
        other.load_state_dict(model.state_dict())
