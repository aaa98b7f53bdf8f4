"""The peers, compared with plain loops."""

from __future__ import annotations

import dataclasses
import math
from itertools import count

import pytest
import torch
from helpers import LN2, Inputs, head_of, naive_event_weights, naive_forward, randomised
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor

from ifa_torchrec import IFAConfig
from ifa_torchrec.modules import (
    DINAttention,
    ETAAttention,
    HSTUAttention,
    LowRankAttention,
    MeanPooling,
    SDIMAttention,
    SIMAttention,
    SoftmaxAttention,
    SOLARAttention,
    TWINAttention,
)
from ifa_torchrec.modules.peers import din

PLAIN = IFAConfig(embedding_dim=6, num_heads=2, interest_mass=False)
CONFIGS = {
    "plain": PLAIN,
    "masses": dataclasses.replace(PLAIN, interest_mass=True, mass_scale=0.3),
    "half-lives": dataclasses.replace(PLAIN, half_lives=(math.inf, 2 * LN2), head_dim=4),
    "all": IFAConfig(
        embedding_dim=6,
        num_heads=3,
        half_lives=(LN2, math.inf, 4 * LN2),
        identity_features=("item", "brand"),
        identity_buckets=4,
        identity_half_lives=(math.inf, LN2),
        gates={"action": 3, "device": 2},  # in the identity heads
    ),
}
PEERS = {
    "mean": MeanPooling,
    "softmax": SoftmaxAttention,
    "softmax of the latest 3": lambda config: SoftmaxAttention(config, recent_length=3),
    "din of the latest 3": lambda config: DINAttention(config, recent_length=3),
    "twin of 3": lambda config: TWINAttention(config, search_length=3),
    "eta of 3": lambda config: ETAAttention(config, search_length=3, num_hashes=8),
    "sim of 2": lambda config: SIMAttention(config, "brand", search_length=2),
    "sdim": lambda config: SDIMAttention(config, num_groups=5, group_bits=2),
    "low rank": lambda config: LowRankAttention(config, rank=4),
    "solar": lambda config: SOLARAttention(config, rank=4),
    "hstu of the latest 4": lambda config: HSTUAttention(config, recent_length=4),
}
HISTORIES, CANDIDATES = [7, 0, 1, 5, 0, 3], [2, 3, 1, 0, 0, 4]

every_peer = pytest.mark.parametrize("peer", PEERS)
every_config = pytest.mark.parametrize("config", CONFIGS)


def new_peer(peer: str, config: IFAConfig) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomised(PEERS[peer](config).double())


def inputs_of(module: torch.nn.Module, *lengths, **kwargs) -> Inputs:
    return Inputs.random(module.config, *lengths, id_features=len(module.id_features), **kwargs)


def naive_mean(module: MeanPooling, inputs: Inputs) -> Tensor:
    def head(candidates, events, weights, h):
        total = weights.sum()
        mean = (weights[:, None] * events).sum(0) / total.clamp(min=1e-300)
        output = head_of(mean[None], module.value_proj, h, module.config)
        return output.expand(len(candidates), -1), total.expand(len(candidates))

    return naive_forward(module, inputs, head)


def naive_share(module: torch.nn.Module, candidates, events, weights, h: int) -> Tensor:
    """[m, n] w exp(q k / sqrt(d))."""
    q = head_of(candidates, module.query_proj, h, module.config)
    k = head_of(events, module.key_proj, h, module.config)
    return weights * torch.exp(q @ k.T / math.sqrt(q.shape[1]))


def averaged(module: torch.nn.Module, share: Tensor, events: Tensor, h: int) -> tuple[Tensor, Tensor]:
    total = share.sum(1)
    v = head_of(events, module.value_proj, h, module.config)
    return share @ v / total[:, None].clamp(min=1e-300), total


def naive_softmax(module: SoftmaxAttention, inputs: Inputs) -> Tensor:
    """softmax of q k / sqrt(d) + log w, computed as w exp(q k / sqrt(d)) / sum."""
    latest = module.recent_length

    def head(candidates, events, weights, h):
        if latest is not None:
            events, weights = events[-latest:], weights[-latest:]
        return averaged(module, naive_share(module, candidates, events, weights, h), events, h)

    return naive_forward(module, inputs, head)


def keep(share: Tensor, order: Tensor, count: int) -> Tensor:
    """The weights of the first ``count`` events in each candidate's order; 0 for the others."""
    kept = torch.zeros_like(share)
    for c in range(len(share)):
        for event in order[c, :count].tolist():
            kept[c, event] = share[c, event]
    return kept


def naive_twin(module: TWINAttention, inputs: Inputs) -> Tensor:
    def head(candidates, events, weights, h):
        share = naive_share(module, candidates, events, weights, h)
        share = keep(share, share.argsort(dim=1, descending=True), module.search_length)
        return averaged(module, share, events, h)

    return naive_forward(module, inputs, head)


def naive_eta(module: ETAAttention, inputs: Inputs) -> Tensor:
    """By Hamming distance of the signatures; the later event in a tie."""

    def head(candidates, events, weights, h):
        bits = [
            head_of(x, projection, h, module.config) @ module.hyperplanes > 0
            for x, projection in ((candidates, module.query_proj), (events, module.key_proj))
        ]
        distance = (bits[0][:, None] != bits[1][None]).sum(2)
        order = [sorted(range(len(events)), key=lambda i, d=d: (d[i], -i)) for d in distance.tolist()]
        order = torch.tensor(order, dtype=torch.int64).view(len(candidates), len(events))
        share = naive_share(module, candidates, events, weights, h)
        return averaged(module, keep(share, order, module.search_length), events, h)

    return naive_forward(module, inputs, head)


def naive_sim(module: SIMAttention, inputs: Inputs) -> Tensor:
    """The latest events that have the candidate's id in the last column."""
    calls = count()

    def head(candidates, events, weights, h):
        b = next(calls) // module.config.num_heads
        had = inputs.history_ids[inputs.event_rows(b), -1].tolist()
        share = naive_share(module, candidates, events, weights, h)
        kept = torch.zeros_like(share)
        for c, asked in enumerate(inputs.candidate_ids[inputs.candidate_rows(b), -1].tolist()):
            same = [i for i, id_ in enumerate(had) if id_ == asked != 0][-module.search_length :]
            kept[c, same] = share[c, same]
        return averaged(module, kept, events, h)

    return naive_forward(module, inputs, head)


def naive_sdim(module: SDIMAttention, inputs: Inputs) -> Tensor:
    """A pair's weight is the number of groups in which all bits agree."""

    def head(candidates, events, weights, h):
        bits = [(x @ module.hyperplanes > 0).view(len(x), 5, 2) for x in (candidates, events)]
        collisions = (bits[0][:, None] == bits[1][None]).all(3).sum(2)
        share = collisions * weights
        total = share.sum(1)
        mean = share @ events / total[:, None].clamp(min=1e-300)
        return head_of(mean, module.value_proj, h, module.config), total / 5

    return naive_forward(module, inputs, head)


def naive_din(module: DINAttention, inputs: Inputs) -> Tensor:
    def head(candidates, events, weights, h):
        events, weights = events[-module.recent_length :], weights[-module.recent_length :]
        share = events.new_zeros(len(candidates), len(events))
        for c, candidate in enumerate(candidates):
            for e, event in enumerate(events):
                pair = torch.cat([event, candidate, event - candidate, event * candidate])
                share[c, e] = weights[e] * module.activation_unit(pair[None])[0, h].sigmoid()
        return share @ head_of(events, module.value_proj, h, module.config), share.sum(1)

    return naive_forward(module, inputs, head)


def naive_low_rank(module: LowRankAttention, inputs: Inputs) -> Tensor:
    def head(candidates, events, weights, h):
        q, k, v = (
            head_of(x, projection, h, module.config)
            for x, projection in (
                (candidates, module.query_proj),
                (events, module.key_proj),
                (events, module.value_proj),
            )
        )
        scale = math.sqrt(q.shape[1])
        share = weights * torch.exp(module.latents[h] @ k.T / scale)
        share = share / share.sum(1, keepdim=True).clamp(min=1e-300)
        weight = torch.exp(q @ (share @ k).T / scale)
        outputs = weight @ (share @ v) / weight.sum(1, keepdim=True)
        return outputs, weight.mean(1) * weights.sum()

    return naive_forward(module, inputs, head)


def naive_solar(module: SOLARAttention, inputs: Inputs) -> Tensor:
    """By the SVD itself, with all its directions."""

    def head(candidates, events, weights, h):
        total = weights.sum()
        if total == 0:
            return candidates.new_zeros(len(candidates), module.config.head_width), total.expand(
                len(candidates)
            )
        rows = (weights / total).sqrt()[:, None] * events
        _, singular, right = torch.linalg.svd(rows, full_matrices=False)
        directions = (singular[:, None] * right)[: module.rank]
        mean = (weights[:, None] * events).sum(0)
        directions = torch.where(directions @ mean < 0, -1.0, 1.0)[:, None] * directions
        share = naive_share(module, candidates, directions, torch.ones(len(directions)), h)
        output, matched = averaged(module, share, directions, h)
        return output, matched / len(directions) * total

    return naive_forward(module, inputs, head)


def normed(x: Tensor) -> Tensor:
    centred = x - x.mean()
    return centred / (centred.square().mean() + 1e-6).sqrt()


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def naive_hstu(module: HSTUAttention, inputs: Inputs) -> Tensor:
    """Pair by pair: of two events, and of a candidate and an event."""
    calls, latest, config = count(), module.recent_length, module.config

    def bias(table, h: int, back: int, days: Tensor) -> Tensor:
        return table.place[h, back] + table.time[h, min(int(torch.log2(1 + days.clamp(min=0))), 15)]

    def met(events: Tensor, age: Tensor, b: int) -> Tensor:
        """The latest events after attending to those before them."""
        half_lives = config.half_lives or (math.inf,) * config.num_heads
        weight = naive_event_weights(inputs, half_lives, inputs.event_rows(b), None)[-latest:]
        parts = [
            silu(module.event_proj.weight @ normed(x)).view(4, config.num_heads, -1) for x in events
        ]
        result = []
        for i, (gate, _, query, _) in enumerate(parts):
            heads = []
            for h in range(config.num_heads):
                total = torch.zeros_like(gate[h])
                for j in range(i + 1):
                    score = query[h] @ parts[j][3][h] / math.sqrt(len(query[h]))
                    score = score + bias(module.event_bias, h, i - j, age[j] - age[i])
                    total = total + silu(score) * weight[j, h] * parts[j][1][h]
                heads.append(normed(total / latest) * gate[h])
            result.append(events[i] + module.event_output.weight @ torch.cat(heads))
        return torch.stack(result)

    def head(candidates, events, weights, h):
        b = next(calls) // config.num_heads
        events, weights = events[-latest:], weights[-latest:]
        outputs = candidates.new_zeros(len(candidates), config.head_width)
        matched = candidates.new_zeros(len(candidates))
        if len(events) == 0:
            return outputs, matched
        age = torch.zeros_like(weights)
        if inputs.history_age is not None:
            age = inputs.history_age[inputs.event_rows(b)][-latest:]
        events = torch.stack([normed(x) for x in met(events, age, b)])
        rows = [normed(c) for c in candidates]
        for c, row in enumerate(rows):
            query = silu(head_of(row[None], module.query_proj, h, config)[0])
            total = torch.zeros_like(query)
            for i in range(len(events)):
                key, value = (
                    silu(head_of(events[i][None], p, h, config)[0])
                    for p in (module.key_proj, module.value_proj)
                )
                score = query @ key / math.sqrt(len(query))
                score = score + bias(module.candidate_bias, h, len(events) - 1 - i, age[i])
                total = total + silu(score) * weights[i] * value
                matched[c] += weights[i] * score.sigmoid()
            gate = silu(head_of(row[None], module.gate_proj, h, config)[0])
            outputs[c] = normed(total / latest) * gate
        return outputs, matched

    return naive_forward(module, inputs, head)


NAIVE = {
    MeanPooling: naive_mean,
    SoftmaxAttention: naive_softmax,
    TWINAttention: naive_twin,
    ETAAttention: naive_eta,
    SIMAttention: naive_sim,
    SDIMAttention: naive_sdim,
    DINAttention: naive_din,
    LowRankAttention: naive_low_rank,
    SOLARAttention: naive_solar,
    HSTUAttention: naive_hstu,
}


@every_peer
@every_config
@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "unweighted"])
@pytest.mark.parametrize("aged", [True, False], ids=["aged", "ageless"])
def test_peer_is_the_plain_loop(peer, config, weighted, aged):
    module = new_peer(peer, CONFIGS[config])
    inputs = inputs_of(module, HISTORIES, CANDIDATES, weighted=weighted, aged=aged, seed=2)
    out = module(*inputs.forward)
    expected = NAIVE[type(module)](module, those_of_weight(inputs))
    torch.testing.assert_close(out.values(), expected, rtol=1e-10, atol=1e-10)
    assert out.offsets().tolist() == inputs.candidates.offsets().tolist()


@every_config
def test_din_as_on_a_gpu_is_the_plain_loop(config, monkeypatch):
    """On a GPU every possible pair is computed, with rows of zeros for pairs that do not exist."""
    monkeypatch.setattr(din, "on_cpu", lambda x: False)
    test_peer_is_the_plain_loop("din of the latest 3", config, True, True)
    test_an_empty_history_is_exactly_zeros_before_the_output("din of the latest 3", config)


def those_of_weight(inputs: Inputs) -> Inputs:
    """Without the events of weight 0, which are treated as absent."""
    weights = inputs.history.weights_or_none()
    if weights is None:
        return inputs
    rows = [inputs.event_rows(b) for b in range(len(inputs))]
    return inputs.with_events([[r for r in of_request if weights[r] > 0] for of_request in rows])


@every_peer
@every_config
def test_a_history_of_weight_0_is_an_empty_one(peer, config):
    module = new_peer(peer, CONFIGS[config])
    inputs = inputs_of(module, [40], [10])
    nothing = module(*inputs.with_events([[]]).forward).values()
    inputs.history.weights().zero_()
    assert torch.equal(module(*inputs.forward).values(), nothing)


@every_peer
@every_config
def test_requests_do_not_touch_each_other(peer, config):
    module = new_peer(peer, CONFIGS[config])
    inputs = inputs_of(module, HISTORIES, CANDIDATES)
    whole = module(*inputs.forward).values()
    for numbers in ([0], [5, 2], [3], [1, 4, 0]):
        alone = module(*inputs.requests(numbers).forward).values()
        flat = [row for b in numbers for row in inputs.candidate_rows(b)]
        torch.testing.assert_close(alone, whole[flat], rtol=1e-11, atol=1e-11)


@every_peer
@every_config
def test_an_empty_history_is_exactly_zeros_before_the_output(peer, config):
    module = new_peer(peer, CONFIGS[config])
    inputs = inputs_of(module, [0, 40], [2, 10], weighted=False)
    out = module(*inputs.forward).values()
    assert torch.equal(out[:2], module.output_proj.bias.expand(2, -1))
    assert not torch.equal(out[2:], module.output_proj.bias.expand(10, -1))


@every_peer
@pytest.mark.parametrize("lengths", [[], [0, 0]], ids=["no request", "no candidate and no event"])
def test_nothing_in_gives_nothing_out(peer, lengths):
    module = new_peer(peer, CONFIGS["all"])
    inputs = inputs_of(module, lengths, lengths)
    assert module(*inputs.forward).values().shape == (0, 6)


@every_peer
@every_config
@pytest.mark.parametrize("scale", [1.0, 100.0], ids=["small tokens", "large tokens"])
def test_gradients_are_finite(peer, config, scale):
    """In float32, even if exp(q k) overflows or events have weight 0."""
    module = new_peer(peer, CONFIGS[config]).float()
    inputs = inputs_of(module, HISTORIES, CANDIDATES, dtype=torch.float32, seed=2)
    inputs.history.values().mul_(scale)
    inputs.candidates.values().mul_(scale)
    leaves = {name: p for name, p in module.named_parameters()}
    leaves["history"] = inputs.history.values().requires_grad_()
    leaves["weights"] = inputs.history.weights().requires_grad_()
    output = module(*inputs.forward).values()
    assert output.isfinite().all()
    gradients = torch.autograd.grad(output.square().mean(), [*leaves.values()], materialize_grads=True)
    for name, gradient in zip(leaves, gradients, strict=True):
        assert gradient.isfinite().all(), name
    moved = dict(zip(leaves, gradients, strict=True))
    assert moved["value_proj.weight"].any() and moved["history"].any()


@every_config
@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "unweighted"])
def test_a_recent_length_beyond_the_longest_history_is_all_of_it(config, weighted):
    inputs = Inputs.random(CONFIGS[config], HISTORIES, CANDIDATES, weighted=weighted)
    whole = new_peer("softmax", CONFIGS[config])
    answers = {}
    for length in (max(HISTORIES), 1000, 2):
        recent = SoftmaxAttention(CONFIGS[config], recent_length=length).double()
        recent.load_state_dict(whole.state_dict())
        answers[length] = recent(*inputs.forward).values()
    expected = whole(*inputs.forward).values()
    torch.testing.assert_close(answers[max(HISTORIES)], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(answers[1000], expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(answers[2], expected)


@pytest.mark.parametrize("length", [0, -1])
def test_recent_length_below_one_is_refused(length):
    with pytest.raises(ValueError, match="recent_length"):
        SoftmaxAttention(PLAIN, recent_length=length)


def test_a_peer_that_gives_no_masses_is_refused_where_they_are_wanted():
    class Massless(MeanPooling):
        def dense_heads(self, *inputs):
            return super().dense_heads(*inputs)[0], None

    inputs = Inputs.random(PLAIN, [4], [2])
    assert Massless(PLAIN).double()(*inputs.forward).values().shape == (2, 6)
    with pytest.raises(ValueError, match=r"Massless\.dense_heads returned no masses"):
        Massless(CONFIGS["masses"]).double()(*inputs.forward)


def test_mean_pooling_answers_all_candidates_of_a_request_alike():
    inputs = Inputs.random(PLAIN, [4, 3], [3, 2])
    out = new_peer("mean", PLAIN)(*inputs.forward).values()
    assert torch.equal(out[0], out[1]) and torch.equal(out[0], out[2])
    assert not torch.allclose(out[0], out[3])


def test_solar_of_full_rank_and_like_events_is_finite_and_learns():
    """Equal singular values, one repeated event, and no event: an SVD has no derivative there."""
    module = randomised(SOLARAttention(CONFIGS["masses"], rank=32)).double()
    tokens = torch.cat([torch.eye(6), torch.ones(9, 6), torch.zeros(2, 6)]).double().requires_grad_()
    history = JaggedTensor(tokens, lengths=torch.tensor([6, 9, 2, 0]))
    candidates = JaggedTensor(torch.randn(8, 6).double(), lengths=torch.full((4,), 2))
    values = module(candidates, history).values()
    (gradient,) = torch.autograd.grad(values.square().sum(), tokens)
    assert values.isfinite().all() and gradient.isfinite().all() and gradient[:15].any(1).all()


def test_solar_has_one_event_exactly():
    """Its only direction is the event: this is softmax attention to it."""
    module = new_peer("solar", CONFIGS["masses"])
    tokens = torch.randn(3, 6, generator=torch.Generator().manual_seed(0)).double()
    history = JaggedTensor(tokens[:1].expand(4, -1), lengths=torch.tensor([4]))
    softmax = SoftmaxAttention(CONFIGS["masses"]).double()
    softmax.load_state_dict(module.state_dict())
    candidates = JaggedTensor(tokens[1:], lengths=torch.tensor([2]))
    answers = (m(candidates, history).values() for m in (module, softmax))
    torch.testing.assert_close(*answers, rtol=1e-9, atol=1e-9)


def test_hstu_reads_the_order_of_events():
    module = new_peer("hstu of the latest 4", PLAIN)
    inputs = Inputs.random(PLAIN, [4], [2], weighted=False, aged=False)
    before = module(*inputs.forward).values()
    inputs.history._values = inputs.history.values().flip(0)
    assert not torch.allclose(module(*inputs.forward).values(), before)
