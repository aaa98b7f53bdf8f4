"""InteractionFidelityAttention: its algebra, as properties over configurations and batches."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from helpers import (
    LN2,
    Inputs,
    assert_near,
    head_of,
    identity_values,
    jagged,
    naive_forward,
    randomised,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torchrec.sparse.jagged_tensor import JaggedTensor

from ifa_torchrec import IFAConfig, InteractionFidelityAttention, UserState, ops
from ifa_torchrec.modules.gates import EventGates
from ifa_torchrec.ops.jagged import request_of_row

EXACT = 1e-11  # in float64
HALF_LIVES = st.sampled_from([math.inf, LN2 / 2, 4 * LN2])
few_examples = settings(max_examples=25, deadline=None)


@st.composite
def configs(draw) -> IFAConfig:
    heads = draw(st.integers(1, 3))
    features = draw(st.sampled_from([(), ("item",), ("item", "brand")]))
    half_lives = st.lists(HALF_LIVES, min_size=heads, max_size=heads).map(tuple)
    mass = draw(st.booleans())
    return IFAConfig(
        embedding_dim=6,
        num_heads=heads,
        head_dim=draw(st.sampled_from([None, 4])),
        feature_map=draw(st.sampled_from(["elu", "relu", "hedgehog"])),
        half_lives=draw(st.none() | half_lives),
        interest_mass=mass,
        mass_scale=draw(st.sampled_from([1.0, 0.3])),
        identity_features=features,
        # ids are -3..8: all collide, some do, none do
        identity_buckets=draw(st.sampled_from([1, 4, 12])),
        identity_half_lives=draw(st.lists(HALF_LIVES, min_size=1, max_size=2).map(tuple)),
        identity_head_dim=draw(st.sampled_from([None, 3, 0] if mass else [None, 3])),
        gates=draw(st.sampled_from([{}, {"action": 3}, {"action": 1, "device": 4}])),
        # a relu head may match almost nothing: its output is then as large as 1 / eps
        eps=1e-3,
        readout=draw(st.sampled_from(["linear", "softmax"])),
    )


@st.composite
def problems(draw) -> tuple[InteractionFidelityAttention, Inputs]:
    config, seed = draw(configs()), draw(st.integers(0, 2**16))
    requests = draw(st.integers(1, 4))
    lengths = [
        draw(st.lists(st.integers(0, longest), min_size=requests, max_size=requests))
        for longest in (7, 4)
    ]
    inputs = Inputs.random(
        config, *lengths, seed=seed, weighted=draw(st.booleans()), aged=draw(st.booleans())
    )
    return new_ifa(config, seed), inputs


def new_ifa(config: IFAConfig, seed: int = 0) -> InteractionFidelityAttention:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return randomised(InteractionFidelityAttention(config).double())


def naive_ifa(ifa: InteractionFidelityAttention, inputs: Inputs) -> Tensor:
    """IFA for each pair of candidate and event; the softmax read-out by its own formula."""
    config = ifa.config
    phi = {
        "elu": lambda x: F.elu(x) + 1,
        "relu": F.relu,
        "hedgehog": lambda x: torch.cat([torch.softmax(x, 1), torch.softmax(-x, 1)], dim=1),
    }[config.feature_map]

    def head(candidates, events, weights, h):
        q = head_of(candidates, ifa.query_proj, h, config)
        k = phi(head_of(events, ifa.key_proj, h, config))
        value = head_of(events, ifa.value_proj, h, config)
        if config.readout == "softmax":
            each = k.T * weights  # what an event adds to a summary
            there = each.sum(1) > 0
            share = each[there] / each[there].sum(1, keepdim=True)
            likeness = (q @ (share @ value).T / config.head_width**0.5).exp() * each[there].sum(1)
            matched = likeness.sum(1)
            return (likeness / matched[:, None].clamp(min=1e-300)) @ (share @ value), matched
        score = phi(q) @ k.T * weights
        matched, everything = score.sum(1), (k * weights[:, None]).sum()
        added = config.eps * torch.where(everything > 0, everything, 1.0)
        return score @ value / (matched[:, None] + added), matched

    return naive_forward(ifa, inputs, head)


def naive_matched(ifa: InteractionFidelityAttention, inputs: Inputs, gates: Tensor) -> Tensor:
    """[M, H], phi(q)^T z of the dense heads without decay, with gates [N, H]."""
    phi = ops.FEATURE_MAPS[ifa.config.feature_map].forward
    query, key = (
        torch.einsum("nD,hdD->nhd", tokens.values(), ifa.heads(projection))
        for tokens, projection in (
            (inputs.candidates, ifa.query_proj),
            (inputs.history, ifa.key_proj),
        )
    )
    score = torch.einsum("mhf,nhf->mnh", phi(query, -1), phi(key, -1))
    request = [request_of_row(tokens.offsets()) for tokens in (inputs.candidates, inputs.history)]
    same = (request[0][:, None] == request[1])[..., None]
    return (score * same * (inputs.history.weights()[:, None] * gates)).sum(1)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=EXACT, atol=EXACT)


def assert_same_state(actual: UserState, expected: UserState) -> None:
    actual, expected = actual.state_dict(), expected.state_dict()
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            actual[name], expected[name], rtol=EXACT, atol=EXACT, msg=lambda text, n=name: f"{n}: {text}"
        )


# ------------------------------------------------------------------------------------- properties


@given(problems())
@few_examples
def test_forward_is_the_quadratic_form(problem):
    ifa, inputs = problem
    assert_same(ifa(*inputs.forward).values(), naive_ifa(ifa, inputs))


@given(problems())
@few_examples
def test_gradients_are_those_of_the_quadratic_form(problem):
    ifa, inputs = problem
    leaves = [*ifa.parameters(), inputs.history.values(), inputs.candidates.values()]
    if inputs.history.weights_or_none() is not None:
        leaves.append(inputs.history.weights())
    for leaf in leaves:
        leaf.requires_grad_()

    def gradients(output):
        upstream = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view_as(output)
        return torch.autograd.grad((output * upstream).sum(), leaves, materialize_grads=True)

    actual = gradients(ifa(*inputs.forward).values())
    for mine, true in zip(actual, gradients(naive_ifa(ifa, inputs)), strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-9, atol=1e-9)


@given(problems())
@few_examples
def test_forward_is_attend_of_encode(problem):
    ifa, inputs = problem
    out = ifa(*inputs.forward)
    read = ifa.attend(inputs.candidates, ifa.encode(*inputs.encode), inputs.candidate_ids)
    assert_same(read.values(), out.values())
    assert out.lengths().tolist() == inputs.candidates.lengths().tolist()
    assert out.offsets().tolist() == inputs.candidates.offsets().tolist()


@given(problems())
@few_examples
def test_reference_backend_is_the_torch_backend(problem):
    ifa, inputs = problem
    plain = InteractionFidelityAttention(dataclasses.replace(ifa.config, backend="reference")).double()
    plain.load_state_dict(ifa.state_dict())
    tiled = InteractionFidelityAttention(dataclasses.replace(ifa.config, backend="torch")).double()
    tiled.load_state_dict(ifa.state_dict())
    assert_same(tiled(*inputs.forward).values(), plain(*inputs.forward).values())
    assert_same_state(tiled.encode(*inputs.encode), plain.encode(*inputs.encode))


@given(problems(), st.data())
@few_examples
def test_update_of_the_old_by_the_new_is_encode_of_all(problem, data):
    ifa, inputs = problem
    rows = [inputs.event_rows(b) for b in range(len(inputs))]
    splits = [data.draw(st.integers(0, len(r)), label="old events") for r in rows]
    old = inputs.with_events([r[:split] for r, split in zip(rows, splits, strict=True)])
    new = inputs.with_events([r[split:] for r, split in zip(rows, splits, strict=True)])
    elapsed = None
    if inputs.history_age is not None:
        # the old state's time lies between its latest event and now
        share = data.draw(st.floats(0, 1), label="share of the youngest age")
        youngest = [old.history_age[old.event_rows(b)].tolist() for b in range(len(inputs))]
        elapsed = torch.tensor(
            [share * min(ages, default=1.0) for ages in youngest], dtype=torch.float64
        )
        owner = torch.repeat_interleave(torch.arange(len(inputs)), old.history.lengths())
        old.history_age = (old.history_age - elapsed[owner]).clamp(min=0)
    state = ifa.update(ifa.encode(*old.encode), new.history, elapsed, *new.encode[1:])
    assert_same_state(state, ifa.encode(*inputs.encode))


@given(problems(), st.data())
@few_examples
def test_encode_of_parts_is_encode_of_the_whole(problem, data):
    ifa, inputs = problem
    rows = [inputs.event_rows(b) for b in range(len(inputs))]
    size = data.draw(st.integers(1, 3), label="events of a request in a part")
    longest = max(len(r) for r in rows)
    # generators, since parts are for histories that do not fit into memory; parts may be empty
    cuts = [inputs.with_events([r[i : i + size] for r in rows]) for i in range(0, longest + 1, size)]
    state = ifa.encode(
        (part.history for part in cuts),
        None if inputs.history_age is None else (part.history_age for part in cuts),
        None if inputs.history_ids is None else (part.history_ids for part in cuts),
        None if inputs.history_gates is None else (part.history_gates for part in cuts),
    )
    assert_same_state(state, ifa.encode(*inputs.encode))


@given(problems(), st.randoms(use_true_random=False))
@few_examples
def test_order_of_events_does_not_matter_beside_their_ages(problem, random):
    ifa, inputs = problem
    rows = [inputs.event_rows(b) for b in range(len(inputs))]
    shuffled = inputs.with_events([random.sample(r, len(r)) for r in rows])
    assert_same(ifa(*shuffled.forward).values(), ifa(*inputs.forward).values())


@given(problems(), st.randoms(use_true_random=False))
@few_examples
def test_permuted_candidates_give_permuted_answers(problem, random):
    ifa, inputs = problem
    rows = [inputs.candidate_rows(b) for b in range(len(inputs))]
    rows = [random.sample(r, len(r)) for r in rows]
    flat = [row for request in rows for row in request]
    permuted = inputs.with_candidates(rows)
    assert_same(ifa(*permuted.forward).values(), ifa(*inputs.forward).values()[flat])


@given(problems(), st.data())
@few_examples
def test_a_request_is_answered_alone_as_among_others(problem, data):
    ifa, inputs = problem
    numbers = data.draw(st.permutations(range(len(inputs))), label="requests")
    numbers = numbers[: data.draw(st.integers(1, len(inputs)), label="how many")]
    flat = [row for b in numbers for row in inputs.candidate_rows(b)]
    alone = inputs.requests(numbers)
    assert_same(ifa(*alone.forward).values(), ifa(*inputs.forward).values()[flat])
    assert_same_state(ifa.encode(*alone.encode), ifa.encode(*inputs.encode)[numbers])


@given(configs(), st.booleans())
@few_examples
def test_an_empty_history_is_exactly_zeros_before_the_output(config, weighted):
    ifa = new_ifa(config)
    inputs = Inputs.random(config, [0, 5, 0], [2, 1, 3], weighted=weighted)
    if config.identity_features:  # something matches even if nothing does in the dense heads
        inputs.history_ids[1], inputs.candidate_ids[2] = 7, 7
    read = ifa.attend(inputs.candidates, ifa.encode(*inputs.encode), inputs.candidate_ids)
    for out in (ifa(*inputs.forward).values(), read.values()):
        assert torch.equal(out[[0, 1, 3, 4, 5]], ifa.output_proj.bias.expand(5, -1))
        assert not torch.equal(out[2], ifa.output_proj.bias)


@given(problems())
@few_examples
def test_attention_weights_reproduce_the_heads(problem):
    ifa, inputs = problem
    config = ifa.config
    heads, mass = ifa.dense_heads(inputs.candidates, inputs.events, inputs.candidate_ids)
    matched = torch.expm1(mass) * config.mass_scale
    values = [
        head_of(inputs.history.values(), ifa.value_proj, h, config) for h in range(config.num_heads)
    ]
    if config.identity_features:
        more = ifa.identity(inputs.candidates, inputs.events, inputs.candidate_ids)
        matched = torch.cat([matched, more[1]], dim=1)
        for k in range(len(config.identity_features)):
            value = identity_values(ifa.identity, inputs.history.values(), k)
            values += [value] * len(config.identity_head_half_lives)
    attention = ifa.attention_weights(*inputs.forward)
    assert len(attention) == len(inputs)
    for b, weights in enumerate(attention):
        events, candidates = inputs.event_rows(b), inputs.candidate_rows(b)
        assert weights.shape == (len(candidates), len(events), len(values))
        assert (weights >= 0).all()
        # 1 (less a linear head's eps) if anything matched, and 0 if nothing did
        total, added = matched[candidates], torch.zeros_like(matched[candidates])
        if config.readout == "linear":
            added[:, : config.num_heads] = config.eps * ifa.encode(*inputs.encode).key_sum[b].sum(1)
        assert_same(weights.sum(1), total / torch.where(total > 0, total + added, 1.0))
        found = [*heads.unbind(1), *(more[0].unbind(1) if config.identity_features else ())]
        for h, value in enumerate(values):
            assert_same(weights[..., h] @ value[events], found[h][candidates])


# ------------------------------------------------------------------------------------- examples

CONFIG = IFAConfig(
    embedding_dim=8,
    num_heads=2,
    half_lives=(math.inf, 4 * LN2),
    identity_features=("item", "brand"),
    identity_buckets=5,
    identity_half_lives=(math.inf, LN2),
    gates={"action": 3, "device": 4},
)


@pytest.mark.parametrize("readout", ["linear", "softmax"])
def test_attention_weights_sum_to_one_where_matched(readout):
    ifa = new_ifa(dataclasses.replace(CONFIG, readout=readout))
    inputs = Inputs.random(CONFIG, [30, 0], [4, 2], weighted=False)
    full, empty = ifa.attention_weights(*inputs.forward)
    dense = full[..., : CONFIG.num_heads].sum(1)
    torch.testing.assert_close(dense, torch.ones_like(dense), rtol=0, atol=1e-5)
    assert empty.shape == (2, 0, 6)


@pytest.mark.parametrize("readout", ["linear", "softmax"])
def test_float32_is_near_the_float64_quadratic_form(readout):
    ifa = new_ifa(dataclasses.replace(CONFIG, readout=readout))
    inputs = Inputs.random(CONFIG, [500, 0, 33], [4, 2, 7], dtype=torch.float32)
    actual = ifa.float()(*inputs.forward).values()
    assert actual.dtype == torch.float32
    exact = Inputs.random(CONFIG, [500, 0, 33], [4, 2, 7])
    exact.candidates = jagged(inputs.candidates.values().double(), [4, 2, 7])
    exact.history = jagged(
        inputs.history.values().double(), [500, 0, 33], inputs.history.weights().double()
    )
    exact.history_age = inputs.history_age.double()
    exact.history_ids, exact.candidate_ids = inputs.history_ids, inputs.candidate_ids
    exact.history_gates = inputs.history_gates
    assert_near(actual, naive_ifa(ifa.double(), exact), 1e-5)


def test_bfloat16_tokens_are_summed_in_float32():
    ifa = new_ifa(CONFIG).bfloat16()
    inputs = Inputs.random(CONFIG, [2000, 3], [2, 2], dtype=torch.bfloat16)
    state = ifa.encode(*inputs.encode)
    tensors = [value for value in state.state_dict().values() if isinstance(value, torch.Tensor)]
    assert {x.dtype for x in tensors} == {torch.float32, torch.int64}
    # unit weights: counts up to 2000, which bfloat16 cannot represent
    plain = new_ifa(dataclasses.replace(CONFIG, gates={})).bfloat16()
    ones = plain.encode(jagged(inputs.history.values(), [2000, 3]), None, inputs.history_ids)
    of_item = ones.identity_key < 5  # the first feature's buckets
    totals = torch.zeros(2, 2).index_add(
        0, request_of_row(ones.identity_offsets)[of_item], ones.identity_sum[of_item]
    )
    known = [float((ids[:, 0] != 0).sum()) for ids in inputs.history_ids.split([2000, 3])]
    assert known[0] > 1800 and totals.tolist() == [[count] * 2 for count in known]
    assert ifa(*inputs.forward).values().dtype == torch.bfloat16


def test_state_counts_the_events():
    ifa, inputs = new_ifa(CONFIG), Inputs.random(CONFIG, [3, 0, 5], [1, 1, 1])
    state = ifa.encode(*inputs.encode)
    assert state.count.tolist() == [3, 0, 5]
    assert state.count.dtype == torch.int64
    updated = ifa.update(state, *inputs.encode[:1], None, *inputs.encode[1:])
    assert updated.count.tolist() == [6, 0, 10]


def test_elapsed_time_halves_only_heads_with_a_half_life():
    ifa, inputs = new_ifa(CONFIG), Inputs.random(CONFIG, [6, 6], [1, 1])
    state = ifa.encode(*inputs.encode)
    nothing = Inputs.random(CONFIG, [0, 0], [1, 1])
    elapsed = torch.tensor([4 * LN2, 0.0], dtype=torch.float64)  # the second dense head's half-life
    later = ifa.update(state, nothing.history, elapsed, None, *nothing.encode[2:])
    ratio = (later.key_sum / state.key_sum).mean(2)
    torch.testing.assert_close(ratio, torch.tensor([[1.0, 0.5], [1.0, 1.0]]).double())
    factor = torch.tensor([[1.0, 1 / 16], [1.0, 1.0]]).double()[request_of_row(state.identity_offsets)]
    torch.testing.assert_close(later.identity_sum, state.identity_sum * factor)
    torch.testing.assert_close(later.identity_value, state.identity_value * factor[..., None])
    assert torch.equal(later.identity_key, state.identity_key)
    assert torch.equal(later.count, state.count)


@torch.no_grad()
def test_update_leaves_the_old_state_alone():
    ifa, inputs = new_ifa(CONFIG), Inputs.random(CONFIG, [6, 2], [1, 1])
    state = ifa.encode(*inputs.encode)
    before = copy.deepcopy(state.state_dict())
    ifa.update(state, inputs.history, torch.ones(2), *inputs.encode[1:])
    torch.testing.assert_close(state.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("identity_features", [(), ("item", "brand")], ids=["dense", "identity"])
def test_no_request_at_all(identity_features):
    config = dataclasses.replace(CONFIG, identity_features=identity_features)
    ifa, inputs = new_ifa(config), Inputs.random(config, [], [])
    assert ifa(*inputs.forward).values().shape == (0, 8)
    state = ifa.encode(*inputs.encode)
    assert len(state) == 0
    assert ifa.attend(inputs.candidates, state, inputs.candidate_ids).values().shape == (0, 8)


def test_state_dict_round_trips():
    ifa, inputs = new_ifa(CONFIG), Inputs.random(CONFIG, [6, 0], [2, 3])
    other = new_ifa(CONFIG, seed=1)
    assert not torch.equal(other(*inputs.forward).values(), ifa(*inputs.forward).values())
    other.load_state_dict(ifa.state_dict())
    assert torch.equal(other(*inputs.forward).values(), ifa(*inputs.forward).values())
    assert set(ifa.state_dict()) == {  # public names, which are in checkpoints
        "query_proj.weight",
        "key_proj.weight",
        "value_proj.weight",
        "gates.log_gate_0",
        "gates.log_gate_1",
        "identity.value_proj.weight",
        "identity.gates.log_gate_0",
        "identity.gates.log_gate_1",
        "output_proj.weight",
        "output_proj.bias",
        "_extra_state",
    }


class OfTensors(torch.nn.Module):
    """The module for torch.compile and torch.export: tensors in, a tensor out."""

    def __init__(self, ifa: InteractionFidelityAttention, by_state: bool) -> None:
        super().__init__()
        self.ifa, self.by_state = ifa, by_state

    @staticmethod
    def arguments(inputs: Inputs) -> tuple:
        history, candidates = inputs.history, inputs.candidates
        jagged_tensors = (candidates.values(), candidates.offsets(), history.values(), history.offsets())
        return *jagged_tensors, history.weights(), *inputs.forward[2:]

    def forward(self, candidates, offsets, events, event_offsets, weights, age, ids, asked, gates):
        candidates = JaggedTensor(candidates, offsets=offsets)
        history = JaggedTensor(events, weights=weights, offsets=event_offsets)
        if self.by_state:
            state = self.ifa.encode(history, age, ids, gates)
            return self.ifa.attend(candidates, state, asked).values()
        return self.ifa(candidates, history, age, ids, asked, gates).values()


by_state_or_not = pytest.mark.parametrize("by_state", [False, True], ids=["forward", "attend(encode)"])
either_readout = pytest.mark.parametrize("readout", ["linear", "softmax"])


@pytest.mark.slow
@by_state_or_not
@either_readout
def test_compiles_into_one_graph_for_any_size(by_state, readout):
    module = OfTensors(new_ifa(dataclasses.replace(CONFIG, readout=readout)), by_state)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for lengths in ([6, 0, 3], [2, 1, 4]), ([9, 5], [3, 3]), ([4, 0, 50, 8], [2, 2, 0, 7]):
        arguments = module.arguments(Inputs.random(CONFIG, *lengths))
        assert_same(compiled(*arguments), module(*arguments))


@by_state_or_not
@pytest.mark.parametrize(  # with the backends torch and native
    ("readout", "dtype"), [("linear", torch.float64), ("softmax", torch.float32)], ids=str
)
def test_exports_for_any_number_of_events_and_candidates(by_state, readout, dtype):
    def arguments(*lengths, **seed):
        given = module.arguments(Inputs.random(CONFIG, *lengths, **seed))
        return tuple(x.to(dtype) if x.is_floating_point() else x for x in given)

    config = dataclasses.replace(CONFIG, readout=readout)
    module = OfTensors(new_ifa(config), by_state).to(dtype)
    m, n = {0: torch.export.Dim("M")}, {0: torch.export.Dim("N")}
    shapes = (m, None, n, None, n, n, n, m, n)
    program = torch.export.export(module, arguments([6, 0, 3], [2, 1, 4]), dynamic_shapes=shapes)
    exported = program.module()
    for lengths in ([1, 6, 2], [4, 2, 1]), ([0, 20, 2], [3, 0, 1]):
        given = arguments(*lengths, seed=1)
        torch.testing.assert_close(exported(*given), module(*given))


# ------------------------------------------------------------------------------------------- gates


def test_gates_multiply_the_event_weights_head_by_head():
    """An event of a kind with weight 0 in a head is absent for it; one with weight 2 counts twice."""
    config = dataclasses.replace(CONFIG, gates={"action": 3}, half_lives=None)
    ifa, inputs = new_ifa(config), Inputs.random(config, [12, 0, 5], [3, 1, 2])
    gates = torch.tensor([[1.0, 1.0], [0.0, 2.0], [1.0, 0.0]]).double()
    ifa.gates.log_gates[0].data.copy_(gates.log())
    state = ifa.encode(*inputs.encode)
    kinds = inputs.history_gates[:, 0].tolist()
    for h in range(2):
        times = [[i] * int(gates[kinds[i], h]) for i in range(17)]
        rows = [[i for row in inputs.event_rows(b) for i in times[row]] for b in range(3)]
        counted = inputs.with_events(rows)
        counted.history_gates = torch.zeros_like(counted.history_gates)  # with gate 1
        expected = ifa.encode(*counted.encode)
        assert_same(state.key_sum[:, h], expected.key_sum[:, h])
        assert_same(state.key_value[:, h], expected.key_value[:, h])
    heads, mass = ifa.dense_heads(inputs.candidates, inputs.events, inputs.candidate_ids)
    assert_same(
        torch.expm1(mass),
        naive_matched(ifa, inputs, gates[inputs.history_gates[:, 0]]),
    )
    assert heads.isfinite().all()


def test_each_identity_head_has_a_gate_of_its_own():
    config = dataclasses.replace(CONFIG, gates={"action": 3}, identity_half_lives=(math.inf, math.inf))
    ifa, inputs = new_ifa(config), Inputs.random(config, [3], [1], weighted=False)
    gates = torch.tensor([[1.0, 2, 3, 4], [10, 20, 30, 40], [100, 200, 300, 400]]).double()
    ifa.identity.gates.log_gates[0].data.copy_(gates.log().view(3, 2, 2))
    inputs.history_ids = torch.tensor([[1, 1], [2, 1], [1, 2]])
    inputs.candidate_ids, inputs.history_gates = torch.tensor([[1, 1]]), torch.tensor([[0], [1], [2]])
    _, matched = ifa.identity(inputs.candidates, inputs.events, inputs.candidate_ids)
    expected = torch.tensor([[1.0 + 100, 2 + 200, 3 + 30, 4 + 40]]).double()
    torch.testing.assert_close(matched, expected)
    read = ifa.identity.attend(inputs.candidates, ifa.encode(*inputs.encode), inputs.candidate_ids)
    torch.testing.assert_close(read[1], expected)


@given(problems())
@few_examples
def test_an_event_of_weight_0_is_not_there(problem):
    ifa, inputs = problem
    weights = inputs.history.weights_or_none()
    if weights is None:
        return
    rows = [[row for row in inputs.event_rows(b) if weights[row] > 0] for b in range(len(inputs))]
    assert_same(ifa(*inputs.with_events(rows).forward).values(), ifa(*inputs.forward).values())


@pytest.mark.parametrize(
    ("values", "heads", "own"),
    [
        (4, (2,), [[1, 0], [0, 1], [1, 0], [0, 1]]),
        (2, (4,), [[1, 0, 1, 0], [0, 1, 0, 1]]),
        (3, (2, 3), [[[1, 0, 0]] * 2, [[0, 1, 0]] * 2, [[0, 0, 1]] * 2]),
        (3, (2, 1), None),  # a single head prefers none
        (1, (3,), None),
    ],
    ids=str,
)
def test_gates_start_near_1_with_values_dealt_out_to_the_heads(values, heads, own):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        (table,) = EventGates({"action": values}, heads).log_gates
    start = 0.0 if own is None else torch.tensor(own) - 0.5
    assert table.shape == (values, *heads)
    noise = (table - start).flatten().tolist()
    assert max(map(abs, noise)) < 0.7 and len(set(noise)) == len(noise)  # no two are alike


def test_gates_that_the_configuration_has_not_are_refused():
    config = dataclasses.replace(CONFIG, gates={})
    inputs = Inputs.random(config, [2, 1], [1, 2])
    inputs.history_gates = torch.zeros(3, 1, dtype=torch.int64)
    for method, arguments in (("forward", inputs.forward), ("encode", inputs.encode)):
        with pytest.raises(ValueError, match="the configuration has no gates; add gates to it"):
            getattr(new_ifa(config), method)(*arguments)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32], ids=str)
def test_narrow_gates_are_read_as_what_they_are(dtype):
    ifa, inputs = new_ifa(CONFIG), Inputs.random(CONFIG, [6, 0], [2, 3])
    expected = ifa(*inputs.forward).values()
    inputs.history_gates = inputs.history_gates.to(dtype)
    assert torch.equal(ifa(*inputs.forward).values(), expected)


# --------------------------------------------------------------------------------------- bad input


def bad(**changes) -> Inputs:
    return dataclasses.replace(Inputs.random(CONFIG, [2, 1], [1, 2]), **changes)


TOKENS = torch.zeros(3, 8, dtype=torch.float64)
IDS = torch.zeros(3, 2, dtype=torch.int64)
BAD_INPUTS = {
    "negative age": ("history_age", {"history_age": torch.tensor([1.0, -0.1, 0.0])}),
    "an age too few": ("history_age", {"history_age": torch.zeros(2)}),
    "ages in a column": ("history_age", {"history_age": torch.zeros(3, 1)}),
    "negative event weight": (
        "history.*weight",
        {"history": jagged(TOKENS, [2, 1], torch.tensor([1.0, 1.0, -1.0]))},
    ),
    "history lengths": ("history", {"history": jagged(TOKENS, [2, 2])}),
    "candidate lengths": ("candidates", {"candidates": jagged(TOKENS, [1, 1])}),
    "history width": ("history", {"history": jagged(TOKENS[:, :7], [2, 1])}),
    "candidate width": ("candidates", {"candidates": jagged(TOKENS[:, :7], [1, 2])}),
    "history of one dimension": ("history", {"history": jagged(TOKENS[:, 0], [2, 1])}),
    "no history_ids": ("history_ids", {"history_ids": None}),
    "no candidate_ids": ("candidate_ids", {"candidate_ids": None}),
    "history_ids a column short": ("history_ids", {"history_ids": IDS[:, :1]}),
    "candidate_ids a column short": ("candidate_ids", {"candidate_ids": IDS[:, :1]}),
    "history_ids a row short": ("history_ids", {"history_ids": IDS[:2]}),
    "candidate_ids a row short": ("candidate_ids", {"candidate_ids": IDS[:2]}),
    "no history_gates": (r"history_gates must be \[3, 2\], one for each", {"history_gates": None}),
    "history_gates a column short": ("history_gates must be", {"history_gates": IDS[:, :1]}),
    "history_gates a row short": ("history_gates must be", {"history_gates": IDS[:2]}),
    "history_gates of floats": ("history_gates must be integers", {"history_gates": TOKENS[:, :2]}),
    "history_gates elsewhere": ("history_gates is on meta", {"history_gates": IDS.to("meta")}),
    "a gate's value beyond its table": (
        "history_gates: event 1 has action 3; the gate 'action' has values 0 to 2",
        {"history_gates": torch.tensor([[2, 3], [3, 4], [0, 0]])},
    ),
    "a gate's value below 0": (
        "history_gates: event 2 has device -1; the gate 'device' has values 0 to 3",
        {"history_gates": torch.tensor([[2, 3], [0, 0], [0, -1]], dtype=torch.int8)},
    ),
    "requests mismatch": ("candidates have 3 requests", {"candidates": jagged(TOKENS, [1, 1, 1])}),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
@pytest.mark.parametrize("method", ["forward", "attention_weights"])
def test_bad_input_is_named(method, case):
    message, changes = BAD_INPUTS[case]
    with pytest.raises(ValueError, match=message):
        getattr(new_ifa(CONFIG), method)(*bad(**changes).forward)


@pytest.mark.parametrize(
    "case", [case for case, (_, changes) in BAD_INPUTS.items() if "history" in next(iter(changes))]
)
def test_bad_history_is_named_by_encode(case):
    message, changes = BAD_INPUTS[case]
    with pytest.raises(ValueError, match=message):
        new_ifa(CONFIG).encode(*bad(**changes).encode)


@pytest.mark.parametrize(
    "case", [case for case, (_, changes) in BAD_INPUTS.items() if "candidate" in next(iter(changes))]
)
def test_bad_candidates_are_named_by_attend(case):
    message, changes = BAD_INPUTS[case]
    ifa, inputs = new_ifa(CONFIG), bad(**changes)
    with pytest.raises(ValueError, match=message):
        ifa.attend(inputs.candidates, ifa.encode(*inputs.encode), inputs.candidate_ids)


other_configurations = pytest.mark.parametrize(
    "changes",
    [
        {"num_heads": 4, "half_lives": None},
        {"head_dim": 3},
        {"feature_map": "hedgehog"},
        {"identity_features": ("item",)},
        {"identity_features": ()},
        {"identity_buckets": 6},
        {"identity_half_lives": (1.0,)},
    ],
    ids=str,
)


def state_of_another(changes: dict) -> UserState:
    other = dataclasses.replace(CONFIG, **changes)
    return new_ifa(other).encode(*Inputs.random(other, [2, 1], [1, 2]).encode)


@other_configurations
def test_attend_refuses_a_state_of_another_configuration(changes):
    inputs = Inputs.random(CONFIG, [2, 1], [1, 2])
    with pytest.raises(ValueError, match="state"):
        new_ifa(CONFIG).attend(inputs.candidates, state_of_another(changes), inputs.candidate_ids)


@other_configurations
@pytest.mark.parametrize("elapsed", [None, torch.ones(2)], ids=["now", "later"])
def test_update_refuses_a_state_of_another_configuration(changes, elapsed):
    inputs = Inputs.random(CONFIG, [2, 1], [1, 2])
    with pytest.raises(ValueError, match="state"):
        new_ifa(CONFIG).update(state_of_another(changes), inputs.history, elapsed, *inputs.encode[1:])


@pytest.mark.parametrize(
    "elapsed", [torch.tensor([1.0, -1.0]), torch.ones(3), torch.ones(2, 1), torch.tensor(1.0)], ids=str
)
def test_bad_elapsed_is_named(elapsed):
    ifa, inputs = new_ifa(CONFIG), Inputs.random(CONFIG, [2, 1], [1, 2])
    state = ifa.encode(*inputs.encode)
    with pytest.raises(ValueError, match="elapsed"):
        ifa.update(state, inputs.history, elapsed, *inputs.encode[1:])


def test_update_of_another_number_of_requests_is_refused():
    ifa, inputs = new_ifa(CONFIG), Inputs.random(CONFIG, [2, 1], [1, 2])
    state = ifa.encode(*inputs.encode)
    with pytest.raises(ValueError, match="new_history has 2 requests, the state has 1"):
        ifa.update(state[[0]], inputs.history, None, *inputs.encode[1:])


def test_encode_of_no_part_is_refused():
    with pytest.raises(ValueError, match="history"):
        new_ifa(CONFIG).encode(iter([]))


@pytest.mark.parametrize("name", ["history_age", "history_ids", "history_gates"])
@pytest.mark.parametrize("parts", [1, 3], ids=["too few", "too many"])
def test_encode_of_parts_needs_ages_ids_and_gates_for_each_part(name, parts):
    ifa, inputs = new_ifa(CONFIG), Inputs.random(CONFIG, [2, 1], [1, 2])
    names = ("history_age", "history_ids", "history_gates")
    arguments = {argument: [getattr(inputs, argument)] * 2 for argument in names}
    arguments[name] = arguments[name][:1] * parts
    with pytest.raises(ValueError, match=name):
        ifa.encode([inputs.history] * 2, **arguments)


def test_encode_of_parts_of_different_requests_is_refused():
    config = dataclasses.replace(CONFIG, identity_features=())
    parts = [Inputs.random(config, lengths, []).history for lengths in ([2], [2, 1])]
    with pytest.raises(ValueError, match=r"histor|state"):
        new_ifa(config).encode(parts)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("embedding_dim", {"embedding_dim": 0}),
        ("num_heads", {"num_heads": 0}),
        ("num_heads", {"num_heads": 3}),  # 8 is not a multiple of it
        ("head_dim", {"head_dim": 0}),
        ("feature_map", {"feature_map": "softmax"}),
        ("readout", {"readout": "quadratic"}),
        ("half_lives", {"half_lives": (1.0,)}),
        ("half_lives", {"half_lives": (1.0, 0.0)}),
        ("half_lives", {"half_lives": (1.0, math.nan)}),
        ("identity_half_lives", {"identity_half_lives": (-1.0,)}),
        ("identity_half_lives", {"identity_features": ("item",), "identity_half_lives": ()}),
        ("identity_buckets", {"identity_buckets": 0}),
        ("identity_head_dim must be 0 or more", {"identity_head_dim": -1}),
        (
            "identity_head_dim 0 have only masses",
            {"identity_features": ("item",), "identity_head_dim": 0, "interest_mass": False},
        ),
        ("mass_scale", {"mass_scale": 0.0}),
        ("eps", {"eps": 0.0}),
        ("gates: the number of values of 'action' must", {"gates": {"action": 0}}),
        ("gates: the number of values of 'action' must", {"gates": {"action": 2.0}}),
        ("gates: the number of values of 'action' must", {"gates": {"action": True}}),
        ("gates: a name must be a non-empty string, got ''", {"gates": {"": 3}}),
        ("gates: a name must be a non-empty string, got 7", {"gates": {7: 3}}),
        ("backend", {"backend": "cuda"}),
    ],
    ids=str,
)
def test_bad_config_is_named(name, changes):
    with pytest.raises(ValueError, match=name):
        IFAConfig(**({"embedding_dim": 8, "num_heads": 2} | changes))


# -------------------------------------------------------------------------------- the softmax read-out


def test_a_softmax_reads_the_summary_that_is_like_the_candidate():
    """Events of two kinds, one feature each: a candidate gets the value of its own kind, although the
    other is a hundred times as frequent, and its mass is its own kind's frequency."""
    config = IFAConfig(2, num_heads=1, feature_map="relu", readout="softmax")
    ifa = InteractionFidelityAttention(config).double()
    for projection, factor in ((ifa.query_proj, 20.0), (ifa.key_proj, 1.0), (ifa.value_proj, 1.0)):
        projection.weight.data.copy_(factor * torch.eye(2))
    kinds = torch.tensor([0] * 100 + [1])
    history = jagged(torch.eye(2).double()[kinds], [101])
    candidates = jagged(torch.eye(2).double(), [2])
    heads, mass = ifa.dense_heads(candidates, Inputs(candidates, history, None, None, None).events, None)
    torch.testing.assert_close(heads[:, 0], torch.eye(2).double(), rtol=0, atol=1e-3)
    alike = math.exp(20 / math.sqrt(2))  # E for a candidate's own kind; 1 for the other
    expected = torch.tensor([100 * alike + 1, alike + 100]).double().log1p()
    torch.testing.assert_close(mass[:, 0], expected)


def test_the_state_is_the_same_for_either_readout():
    ifa, inputs = new_ifa(CONFIG), Inputs.random(CONFIG, [5, 0, 3], [2, 1, 3])
    other = new_ifa(dataclasses.replace(CONFIG, readout="softmax"))
    other.load_state_dict(
        {k: v for k, v in ifa.state_dict().items() if k != "_extra_state"}, strict=False
    )
    assert_same_state(other.encode(*inputs.encode), ifa.encode(*inputs.encode))


def test_the_softmax_readout_starts_with_soft_keys():
    config = IFAConfig(4, num_heads=2, head_dim=4, feature_map="hedgehog", readout="softmax")
    ifa = InteractionFidelityAttention(config)
    torch.testing.assert_close(ifa.key_proj.weight, 1.2 * torch.eye(4).repeat(2, 1))
    assert torch.equal(ifa.query_proj.weight, 3 * torch.eye(4).repeat(2, 1))


@pytest.mark.parametrize("readout", ["linear", "softmax"])
def test_whole_ages_are_ages(readout: str):
    config = IFAConfig(8, num_heads=2, half_lives=(7.0, 30.0), readout=readout)
    ifa, inputs = InteractionFidelityAttention(config), Inputs.random(config, [3], [2])
    history, candidates = (
        jagged(x.values().float(), [len(x.values())]) for x in (inputs.history, inputs.candidates)
    )
    days = torch.tensor([30, 2, 0])
    out = ifa(candidates, history, history_age=days).values()
    assert torch.equal(out, ifa(candidates, history, history_age=days.float()).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("readout", ["linear", "softmax"])
def test_attention_weights_take_the_dtypes_that_forward_takes(readout: str, dtype: torch.dtype):
    config = IFAConfig(8, num_heads=2, readout=readout)
    ifa, inputs = InteractionFidelityAttention(config), Inputs.random(config, [3], [2])
    history, candidates = (
        jagged(x.values().to(dtype), [len(x.values())]) for x in (inputs.history, inputs.candidates)
    )
    (weights,) = ifa.attention_weights(candidates, history)
    assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(weights.sum(1), torch.ones_like(weights.sum(1)), rtol=0, atol=1e-4)


@pytest.mark.parametrize("elapsed", [1.0, 0, [1.0], None])
def test_wrong_types_are_named(elapsed: object):
    ifa, tokens = InteractionFidelityAttention(IFAConfig(8, num_heads=2)), jagged(torch.ones(1, 8), [1])
    state = ifa.encode(tokens)
    if elapsed is not None:
        with pytest.raises(ValueError, match=r"elapsed must be a tensor \[1\], got"):
            ifa.update(state, tokens, elapsed)
    with pytest.raises(ValueError, match="new_history must be a JaggedTensor, got Tensor"):
        ifa.update(state, tokens.values())
    for wrong in (tokens, None):
        with pytest.raises(ValueError, match="state must be a UserState, got"):
            ifa.attend(tokens, wrong)
        with pytest.raises(ValueError, match="state must be a UserState, got"):
            ifa.update(wrong, tokens)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_no_requests_give_gradients_of_zeros(backend: str):
    """As other ranks wait for them."""
    ifa = InteractionFidelityAttention(IFAConfig(8, num_heads=2, backend=backend))
    none = jagged(torch.zeros(0, 8), [])
    ifa(none, none).values().sum().backward()
    for name, parameter in ifa.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name
