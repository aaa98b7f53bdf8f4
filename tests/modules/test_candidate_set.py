"""The candidate set encoder, the loss over whole sets, and generated sets."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from helpers import jagged, randomised
from torch import nn
from torchrec.sparse.jagged_tensor import JaggedTensor

from ifa_torchrec import CandidateSetEncoder, CandidateSetLoss, generate_set
from ifa_torchrec.errors import ConfigError
from ifa_torchrec.modules import (
    CandidateSetConfig,
    CandidateSetLossConfig,
    InteractionConfig,
    SoftmaxAttention,
    TakenRelation,
)
from ifa_torchrec.modules.candidate_set import TakenSample
from ifa_torchrec.modules.pair_numbers import BUCKETS

DIM = 8
SIZES = [4, 0, 1, 7]
every_attention = pytest.mark.parametrize("attention", ["softmax", "linear"])


def make_encoder(attention: str) -> CandidateSetEncoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomised(CandidateSetEncoder(DIM, CandidateSetConfig(attention)).double())


def make_tokens(sizes=SIZES, seed: int = 0):
    values = torch.randn(sum(sizes), DIM, generator=torch.Generator().manual_seed(seed))
    return jagged(values.double(), sizes)


@every_attention
class TestEncoder:
    def test_permuting_candidates_permutes_the_answers(self, attention: str) -> None:
        encoder, tokens = make_encoder(attention), make_tokens()
        order = [2, 0, 3, 1, 4, 11, 6, 8, 10, 5, 7, 9]
        out = encoder(tokens).values()
        permuted = encoder(jagged(tokens.values()[order], SIZES)).values()
        torch.testing.assert_close(permuted, out[order])

    def test_requests_do_not_touch_each_other(self, attention: str) -> None:
        encoder, tokens = make_encoder(attention), make_tokens()
        out = encoder(tokens).values()
        alone = encoder(jagged(tokens.values()[5:], [7])).values()
        torch.testing.assert_close(alone, out[5:])
        changed = tokens.values().clone()
        changed[:4] += 1
        torch.testing.assert_close(encoder(jagged(changed, SIZES)).values()[4:], out[4:])

    def test_every_candidate_reaches_every_other_of_its_request(self, attention: str) -> None:
        encoder, tokens = make_encoder(attention), make_tokens()
        values = tokens.values().requires_grad_()
        for row, first, last in ((0, 0, 4), (4, 4, 5), (8, 5, 12)):
            answer = encoder(jagged(values, SIZES)).values()[row].square().sum()
            (gradient,) = torch.autograd.grad(answer, values)
            reached = gradient.abs().sum(1) > 0
            assert reached.nonzero().flatten().tolist() == list(range(first, last))

    @pytest.mark.parametrize("sizes", [[], [0, 0], [1], [0, 1, 0]], ids=str)
    def test_sets_of_none_and_of_one(self, attention: str, sizes: list[int]) -> None:
        encoder, tokens = make_encoder(attention), make_tokens(sizes)
        out = encoder(tokens)
        assert out.values().shape == (sum(sizes), DIM) and out.values().isfinite().all()
        assert out.lengths().tolist() == sizes
        out.values().sum().backward()
        assert all(p.grad is not None for p in encoder.parameters())

    def test_ten_thousand_candidates(self, attention: str) -> None:
        encoder = make_encoder(attention).float()
        tokens = jagged(torch.randn(10_003, DIM), [10_000, 3])
        out = encoder(tokens).values()
        assert out.isfinite().all()
        few = encoder(jagged(tokens.values()[10_000:], [3])).values()
        torch.testing.assert_close(out[10_000:], few, rtol=1e-4, atol=1e-4)

    def test_context_is_what_is_seen(self, attention: str) -> None:
        encoder, tokens = make_encoder(attention), make_tokens()
        itself = encoder(tokens, context=tokens).values()
        assert torch.equal(itself, encoder(tokens).values())
        nothing = encoder(tokens, context=make_tokens([0] * 4)).values()
        torch.testing.assert_close(nothing, nothing[:1].expand_as(nothing))


@pytest.mark.parametrize("masses", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(
    "sizes",
    [
        ([4, 0, 1, 7, 4, 4], [3, 2, 0, 9, 3, 40]),
        ([0, 0], [2, 0]),
        ([], []),
        ([5], [0]),
        ([0, 3], [1, 9]),
        ([3, 3], [10, 5]),  # one group, sorted by number of events
    ],
    ids=str,
)
def test_softmax_of_many_requests_is_that_of_each(sizes, weighted: bool, masses: bool) -> None:
    """For outputs and gradients and any padding, with and without masses."""
    asked, found = sizes
    config = InteractionConfig(DIM, num_heads=2, interest_mass=masses)
    attention = randomised(SoftmaxAttention(config).double())
    queries, events = make_tokens(asked, 1).values(), make_tokens(found, 2).values()
    weight = torch.rand(len(events), generator=torch.Generator().manual_seed(3)).double()
    inputs = [queries, events, weight] if weighted else [queries, events]
    for tensor in inputs:
        tensor.requires_grad_()

    def attend(rows: slice, of: slice, m: list[int], n: list[int]) -> torch.Tensor:
        history = JaggedTensor(
            events[of], lengths=torch.tensor(n).long(), weights=weight[of] if weighted else None
        )
        return attention(jagged(queries[rows], m), history).values()

    together = attend(slice(None), slice(None), asked, found)
    first, each = [0, 0], [queries[:0] @ torch.eye(DIM).double()]
    for m, n in zip(asked, found, strict=True):
        spans = slice(first[0], first[0] + m), slice(first[1], first[1] + n)
        each.append(attend(*spans, [m], [n]))
        first = [first[0] + m, first[1] + n]
    apart = torch.cat(each)
    torch.testing.assert_close(together, apart)
    wish = torch.randn(apart.shape, generator=torch.Generator().manual_seed(4)).double()
    wanted = [*inputs, *attention.parameters()]
    both = [
        torch.autograd.grad((out * wish).sum(), wanted, allow_unused=True, materialize_grads=True)
        for out in (together, apart)
    ]
    torch.testing.assert_close(*both)


def test_no_attention_needs_no_encoder() -> None:
    with pytest.raises(ValueError, match="needs no encoder"):
        CandidateSetEncoder(DIM, CandidateSetConfig("none"))
    with pytest.raises(ValueError, match="must be one of"):
        CandidateSetConfig("cubic")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="num_heads must be at least 1, got 0"):
        CandidateSetConfig("softmax", num_heads=0)
    with pytest.raises(ConfigError, match="embedding_dim 8 is not a multiple of num_heads 3"):
        CandidateSetEncoder(8, CandidateSetConfig("linear", num_heads=3))


class TestTakenRelation:
    @staticmethod
    def make() -> TakenRelation:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return randomised(TakenRelation(DIM, num_outputs=3, num_ids=2).double())

    @pytest.mark.parametrize("sizes", [SIZES, [], [0, 0], [1], [0, 1, 0]], ids=str)
    def test_is_the_sum_over_the_other_taken(self, sizes: list[int]) -> None:
        relation, tokens = self.make(), make_tokens(sizes)
        taken = torch.arange(sum(sizes)) % 3 != 1
        x, offsets = tokens.values(), tokens.offsets().tolist()
        ids = torch.randint(3, (sum(sizes), 2), generator=torch.Generator().manual_seed(1))
        ids *= torch.tensor([1, 65])  # the second feature's are in buckets 0, unknown, 1 and 2
        assert relation.pair_queries is not None
        pairs = relation.pair_queries.weight.view(BUCKETS, 3, BUCKETS)
        expected = torch.zeros(sum(sizes), 3).double()
        for first, last in itertools.pairwise(offsets):
            for i, j in itertools.product(range(first, last), repeat=2):
                if i != j and taken[j]:
                    query = relation.query_proj(x[i]).view(3, DIM)
                    expected[i] += query @ relation.key_proj(x[j])
                    same = (ids[i] == ids[j]) & (ids[i] != 0)
                    expected[i] += relation.same_proj.weight @ same.double()
                    if ids[i, 1] and ids[j, 1]:
                        expected[i] += 3.0 * pairs[ids[i, 1] % BUCKETS, :, ids[j, 1] % BUCKETS]
        torch.testing.assert_close(relation(tokens, taken, ids), expected)

    def test_starts_at_nothing(self) -> None:
        assert not TakenRelation(DIM, 1)(jagged(torch.randn(3, DIM), [3]), torch.ones(3).bool()).any()

    def test_bad_input_is_named(self) -> None:
        for taken in (torch.ones(3).bool(), torch.ones(12)):
            with pytest.raises(ValueError, match=r"taken must be \[12\] bool"):
                TakenRelation(DIM, 1).double()(make_tokens(), taken)
        with pytest.raises(ValueError, match="ids must have 2 features, got 0"):
            self.make()(make_tokens(), torch.ones(12).bool())


def test_what_is_taken_in_training_is_all_of_the_exposed_or_any_number_of_them() -> None:
    torch.manual_seed(0)
    exposed = torch.tensor([1, 1, 0, 1, 0, 1, 0, 0, 1, 1, 1, 1]).bool()  # 3 of 4, 0, 0 of 1, 5 of 7
    offsets = torch.tensor([0, 4, 4, 5, 12])
    draws = torch.stack([TakenSample()(exposed, offsets) for _ in range(3000)])
    assert not draws[:, ~exposed].any()
    for first, last, shown in ((0, 4, 3), (5, 12, 5)):
        share = torch.bincount(draws[:, first:last].sum(1), minlength=shown + 1) / len(draws)
        np.testing.assert_allclose(share, [0.25 / shown] * shown + [0.75], atol=0.03)
        each = draws[:, first:last][:, exposed[first:last]].float().mean(0)
        np.testing.assert_allclose(each, 0.75 + (shown - 1) / 8 / shown, atol=0.03)
    nothing = TakenSample()(torch.zeros(0).bool(), torch.tensor([0, 0]))
    assert nothing.shape == (0,)


# two tasks; a usual request, none exposed, no positive, all positive, one candidate, no candidate
REQUESTS = [5, 3, 4, 3, 1, 0]
LABELS = [1, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1]
EXPOSED = [1, 1, 1, 0, 0, 0, 0, 0, 1, 1, 0, 1, 1, 1, 0, 1]


def loss_inputs():
    g = torch.Generator().manual_seed(3)
    m = sum(REQUESTS)
    logits = 2 * torch.randn(m, 2, generator=g, dtype=torch.float64)
    labels = torch.tensor(LABELS, dtype=torch.float64)
    labels = torch.stack([labels, labels.flip(0)], dim=1)
    offsets = torch.tensor([0, *itertools.accumulate(REQUESTS)])
    exposed = torch.tensor(EXPOSED).bool()
    alone = 2 * torch.randn(int(exposed.sum()), 2, generator=g, dtype=torch.float64)
    return logits, labels, exposed, offsets, alone


def naive_loss(config: CandidateSetLossConfig, logits, labels, exposed, offsets, alone) -> float:
    """The docstring's formulae in loops."""
    u = [1.0 if e else config.unexposed for e in exposed.tolist()]
    pointwise, weights, listwise, divergences = 0.0, 0.0, [], []
    of_exposed = {row: number for number, row in enumerate(exposed.nonzero().flatten().tolist())}
    for t in range(logits.shape[1]):
        s, y = logits[:, t].tolist(), labels[:, t].tolist()
        for b in range(len(offsets) - 1):
            rows = range(offsets[b], offsets[b + 1])
            for c in rows:
                weight = u[c] if config.pointwise_unexposed else float(exposed[c])
                p = 1 / (1 + math.exp(-s[c]))
                pointwise -= weight * math.log(p if y[c] else 1 - p)
                weights += weight
            positive = [c for c in rows if y[c] and u[c]]
            negative = sum(u[c] * math.exp(s[c]) for c in rows if not y[c])
            if positive and negative > 0:
                each = [-math.log(math.exp(s[c]) / (math.exp(s[c]) + negative)) for c in positive]
                listwise.append(sum(each) / len(each))
            shown = [c for c in rows if exposed[c]]
            if len(shown) > 1:
                p = torch.tensor([s[c] for c in shown]).softmax(0)
                q = torch.stack([alone[of_exposed[c], t] for c in shown]).softmax(0)
                divergences.append(float(((p - q) * (p / q).log()).sum() / 2))
    mean = lambda values: sum(values) / len(values) if values else 0.0  # noqa: E731
    return (
        config.pointwise * pointwise / max(weights, 1e-9)
        + config.listwise_weight * mean(listwise)
        + config.consistency * mean(divergences)
    )


CONFIGS = [
    CandidateSetLossConfig(),
    CandidateSetLossConfig(unexposed=1.0),
    CandidateSetLossConfig(unexposed=0.3),
    CandidateSetLossConfig(pointwise_unexposed=False),
    CandidateSetLossConfig(pointwise=0.0, listwise=1.0),
    CandidateSetLossConfig(pointwise=0.0, listwise=2.0, unexposed=0.25),
    CandidateSetLossConfig(pointwise=0.0, listwise=1.0, unexposed=0.0),
    CandidateSetLossConfig(pointwise=0.0, consistency=1.0),
    CandidateSetLossConfig(listwise=0.5, consistency=0.1, unexposed=0.5),
]


class TestLoss:
    @pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
    def test_is_the_plain_loop(self, config: CandidateSetLossConfig) -> None:
        inputs = loss_inputs()
        value = CandidateSetLoss(config)(*inputs)
        assert value.item() == pytest.approx(naive_loss(config, *inputs), rel=1e-6)

    @pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
    def test_gradient(self, config: CandidateSetLossConfig) -> None:
        logits, *rest, alone = loss_inputs()
        logits.requires_grad_()
        alone.requires_grad_()
        assert torch.autograd.gradcheck(
            lambda x, a: CandidateSetLoss(config)(x, *rest, a), (logits, alone)
        )

    @pytest.mark.parametrize("kind", ["no positive", "none exposed", "all positive", "nothing"])
    def test_degenerate_batches_are_finite(self, kind: str) -> None:
        logits, labels, exposed, offsets, alone = loss_inputs()
        if kind == "no positive":
            labels = torch.zeros_like(labels)
        elif kind == "all positive":
            labels = torch.ones_like(labels)
        elif kind == "none exposed":
            exposed, alone = torch.zeros_like(exposed), alone[:0]
        else:
            logits, labels, exposed, alone = logits[:0], labels[:0], exposed[:0], alone[:0]
            offsets = torch.zeros_like(offsets)
        logits.requires_grad_()
        terms = {
            "pointwise": CandidateSetLossConfig(listwise=0.0, pointwise_unexposed=False),
            "listwise": CandidateSetLossConfig(pointwise=0.0, listwise=1.0, unexposed=1.0),
            "consistency": CandidateSetLossConfig(pointwise=0.0, consistency=1.0),
        }
        values = {}
        for name, config in terms.items():
            loss = CandidateSetLoss(config)(logits, labels, exposed, offsets, alone)
            (gradient,) = torch.autograd.grad(loss, logits)
            assert gradient.isfinite().all()
            values[name] = loss.item()
        zero = {
            "no positive": {"listwise"},
            "all positive": {"listwise"},
            "none exposed": {"pointwise", "consistency"},
            "nothing": set(terms),
        }[kind]
        assert {name for name, value in values.items() if value == 0} == zero

    def test_large_logits_stay_finite(self) -> None:
        logits, *rest, alone = loss_inputs()
        logits = (1000 * logits).float().requires_grad_()
        loss = CandidateSetLoss(CandidateSetLossConfig(listwise=1.0, consistency=1.0))(
            logits, *(x.float() if x.is_floating_point() else x for x in rest), alone.float()
        )
        loss.backward()
        assert loss.isfinite() and logits.grad.isfinite().all()

    def test_scores_that_do_not_depend_on_the_unexposed_have_no_gap(self) -> None:
        logits, labels, exposed, offsets, _ = loss_inputs()
        loss = CandidateSetLoss(CandidateSetLossConfig(pointwise=0.0, consistency=1.0))
        assert loss(logits, labels, exposed, offsets, logits[exposed]).item() == 0
        # nor does shifting all scores of a request, which does not change the ranking
        assert loss(logits, labels, exposed, offsets, logits[exposed] + 5).item() < 1e-12

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
    def test_is_computed_in_float32(self, config: CandidateSetLossConfig, dtype: torch.dtype) -> None:
        logits, labels, exposed, offsets, alone = loss_inputs()
        logits, alone = logits.to(dtype).requires_grad_(), alone.to(dtype)
        value = CandidateSetLoss(config)(logits, labels.to(dtype), exposed, offsets, alone)
        assert value.dtype == torch.float32
        exact = naive_loss(config, logits.double(), labels, exposed, offsets, alone.double())
        assert value.item() == pytest.approx(exact, rel=1e-5)
        assert torch.autograd.grad(value, logits)[0].dtype == dtype

    def test_float16_counts_more_candidates_than_it_has_numbers(self) -> None:
        logits = torch.zeros(70_000, 1, dtype=torch.float16)
        loss = CandidateSetLoss()(
            logits, torch.zeros_like(logits), torch.ones(70_000).bool(), torch.tensor([0, 70_000])
        )
        assert loss.item() == pytest.approx(math.log(2), rel=1e-5)

    def test_bad_input_is_named(self) -> None:
        logits, labels, exposed, offsets, alone = loss_inputs()
        loss = CandidateSetLoss(CandidateSetLossConfig(consistency=1.0))
        with pytest.raises(ValueError, match="labels must be"):
            loss(logits, labels[:, :1], exposed, offsets, alone)
        with pytest.raises(ValueError, match="exposed must be"):
            loss(logits, labels, exposed[1:], offsets, alone)
        with pytest.raises(ValueError, match="offsets must rise from 0 to"):
            loss(logits, labels, exposed, offsets[:-3], alone)
        with pytest.raises(ValueError, match=r"exposed_logits must be .* got None"):
            loss(logits, labels, exposed, offsets)
        with pytest.raises(ValueError, match="listwise must be at least 0"):
            CandidateSetLossConfig(listwise=-1.0)
        with pytest.raises(ValueError, match="unexposed must be at most 1"):
            CandidateSetLossConfig(unexposed=1.5)
        with pytest.raises(ValueError, match="are all 0"):
            CandidateSetLossConfig(pointwise=0.0)


class TestGenerateSet:
    @pytest.mark.parametrize("strategy", ["topk", "greedy"])
    @pytest.mark.parametrize("k", [0, 1, 3, 100])
    def test_fixed_logits_are_sorted(self, strategy: str, k: int) -> None:
        logits = torch.randint(3, (12,), generator=torch.Generator().manual_seed(0)).double()
        chosen = generate_set(logits, make_tokens(), k, strategy)
        offsets = [0, 4, 4, 5, 12]
        expected = [
            sorted(range(a, b), key=lambda row: (-logits[row], row))[:k]
            for a, b in itertools.pairwise(offsets)
        ]
        assert chosen.lengths().tolist() == [len(rows) for rows in expected]
        assert chosen.values().tolist() == [row for rows in expected for row in rows]

    def test_a_function_is_asked_again_after_each_choice(self) -> None:
        topic = torch.tensor([0, 0, 1, 1, 0, 0, 1, 2, 2, 0, 1, 2])
        base = torch.linspace(1, 0, 12)

        def scorer(taken):
            same = (topic[:, None] == topic[None]) & taken
            request = torch.tensor([0] * 4 + [2] + [3] * 7)
            return base - 10 * (same & (request[:, None] == request[None])).sum(1)

        assert generate_set(scorer, make_tokens(), 3, "topk").values().tolist() == [0, 1, 2, 4, 5, 6, 7]
        assert generate_set(scorer, make_tokens(), 3, "greedy").values().tolist() == [
            0,
            2,
            1,
            4,
            5,
            6,
            7,
        ]

    def test_bad_input_is_named(self) -> None:
        with pytest.raises(ValueError, match="k must be"):
            generate_set(torch.zeros(12), make_tokens(), -1)
        with pytest.raises(ValueError, match="strategy must be"):
            generate_set(torch.zeros(12), make_tokens(), 1, "best")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"logits must be \[12\], got \[11\]"):
            generate_set(torch.zeros(11), make_tokens(), 1)
        with pytest.raises(ValueError, match=r"logits\[\d+\] is NaN"):
            generate_set(torch.full((12,), math.nan), make_tokens(), 1)


TOPICS, FADE, SET_SIZE, REQUESTS_SIMULATED = 5, 0.3, 12, 40


def set_reward(probability: np.ndarray, topic: np.ndarray, rows: np.ndarray, fade: float) -> float:
    """The expected number of items that the user takes: the item in place i with its probability times
    fade to the power of the number of earlier items of its topic."""
    before = np.array([(topic[rows[:i]] == topic[row]).sum() for i, row in enumerate(rows)])
    return float((probability[rows] * fade**before).sum())


class Simulated:
    """Simulated requests: each candidate's own probability and its topic."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        rows = REQUESTS_SIMULATED * SET_SIZE
        self.topic = rng.integers(TOPICS, size=rows)
        self.probability = rng.uniform(0.1, 0.9, rows)
        self.request = np.repeat(np.arange(REQUESTS_SIMULATED), SET_SIZE)
        token = torch.zeros(rows, DIM)
        token[torch.arange(rows), torch.from_numpy(self.topic)] = 2.0
        token[:, TOPICS] = torch.from_numpy(np.log(self.probability))
        self.tokens = jagged(token, [SET_SIZE] * REQUESTS_SIMULATED)

    def same_topic(self, taken: torch.Tensor) -> torch.Tensor:
        """[M]: how many candidates of the same topic are taken in its request."""
        key = torch.from_numpy(self.request * TOPICS + self.topic)
        counts = torch.zeros(REQUESTS_SIMULATED * TOPICS).index_add(0, key[taken], taken[taken].float())
        return counts[key]

    def log_wish(self, taken: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.log(self.probability)) + math.log(FADE) * self.same_topic(taken)

    def reward(self, chosen) -> float:
        sets = [chosen.values()[a:b].numpy() for a, b in itertools.pairwise(chosen.offsets().tolist())]
        return float(np.mean([set_reward(self.probability, self.topic, s, FADE) for s in sets]))


def test_greedy_beats_topk_where_items_touch_each_other() -> None:
    """By the true probabilities; and no set of the same size is worth more than the greedy one."""
    simulated = Simulated(0)
    rewards = {
        strategy: simulated.reward(generate_set(simulated.log_wish, simulated.tokens, 4, strategy))
        for strategy in ("topk", "greedy")
    }
    assert rewards["greedy"] > 1.05 * rewards["topk"]
    best = [
        max(
            set_reward(simulated.probability, simulated.topic, np.array(rows), FADE)
            for rows in itertools.combinations(
                sorted(range(first, first + SET_SIZE), key=lambda r: -simulated.probability[r]), 4
            )
        )
        for first in range(0, REQUESTS_SIMULATED * SET_SIZE, SET_SIZE)
    ]
    assert rewards["greedy"] == pytest.approx(np.mean(best))


@every_attention
def test_an_encoder_that_learnt_from_accepted_items_generates_better_sets(attention: str) -> None:
    """The encoder does not know the fading: it only sees which items were accepted with which others."""
    torch.manual_seed(0)
    encoder = CandidateSetEncoder(DIM, CandidateSetConfig(attention))
    head = nn.Sequential(nn.Linear(2 * DIM, 32), nn.ReLU(), nn.Linear(32, 1))

    def score(simulated: Simulated, taken: torch.Tensor) -> torch.Tensor:
        tokens = simulated.tokens
        sizes = taken.view(-1, SET_SIZE).sum(1).tolist()
        found = encoder(tokens, context=jagged(tokens.values()[taken], sizes)).values()
        return head(torch.cat([tokens.values(), found], dim=1))[:, 0]

    optimizer = torch.optim.Adam([*encoder.parameters(), *head.parameters()], lr=0.01)
    for step in range(200):
        simulated = Simulated(step + 1)
        taken = torch.rand(REQUESTS_SIMULATED * SET_SIZE) < 0.4 * torch.rand(())
        wish = simulated.log_wish(taken).exp().float()
        accepted = (torch.rand(len(wish)) < wish).float()
        loss = nn.functional.binary_cross_entropy_with_logits(
            score(simulated, taken)[~taken], accepted[~taken]
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    simulated = Simulated(0)
    with torch.no_grad():
        rewards = {
            strategy: simulated.reward(
                generate_set(lambda taken: score(simulated, taken), simulated.tokens, 4, strategy)
            )
            for strategy in ("topk", "greedy")
        }
    best = simulated.reward(generate_set(simulated.log_wish, simulated.tokens, 4, "greedy"))
    assert rewards["greedy"] > rewards["topk"] + 0.5 * (best - rewards["topk"])
