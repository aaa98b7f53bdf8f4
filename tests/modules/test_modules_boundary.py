"""A module's inputs and their meaning: weights, ids, unknown ids, very old events."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from helpers import Inputs, jagged, randomised
from torchrec import EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor

from ifa_torchrec import CandidateSetEncoder, IFAConfig, InteractionFidelityAttention, ops
from ifa_torchrec.errors import ConfigError
from ifa_torchrec.modules import CandidateSetConfig, MeanPooling, SDIMAttention, SIMAttention

CONFIG = IFAConfig(
    embedding_dim=8,
    num_heads=2,
    half_lives=(7.0, 7.0),
    identity_features=("item", "category"),
    identity_half_lives=(7.0, math.inf),
)
BACKENDS = ["reference", "torch", *(["native"] if ops.native.LIBRARY is not None else [])]  # on the CPU
NATIVE_SETS = ops.native.INSTRUCTION_SETS  # those available here
if ops.native.LIBRARY is None:
    NATIVE_SETS = ()
else:
    NATIVE_SETS = NATIVE_SETS[: NATIVE_SETS.index(ops.native.STATUS) + 1]
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def new(config: IFAConfig = CONFIG, kind: type = InteractionFidelityAttention, **changes):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomised(kind(dataclasses.replace(config, **changes)))


def some(**changes) -> Inputs:
    inputs = Inputs.random(CONFIG, [5, 0, 3], [2, 1, 3], dtype=torch.float32)
    return dataclasses.replace(inputs, **changes)


# ----------------------------------------------------------------------------------- weights and ids


def tokens_of(need_indices: bool):
    torch.manual_seed(1)
    features = KeyedJaggedTensor.from_lengths_sync(
        keys=["history_item", "candidate_item"],
        values=torch.arange(15),
        lengths=torch.tensor([5, 3, 3, 4]),
    )
    table = EmbeddingConfig(
        name="item",
        embedding_dim=8,
        num_embeddings=100,
        feature_names=["history_item", "candidate_item"],
    )
    tokens = EmbeddingCollection(need_indices=need_indices, tables=[table])(features)
    return tokens["candidate_item"], tokens["history_item"]


def test_ids_as_weights_are_refused():
    ifa = new(identity_features=())
    candidates, history = tokens_of(need_indices=True)
    assert history.weights().dtype == torch.int64
    plain_candidates, plain = tokens_of(need_indices=False)
    for call in (
        lambda: ifa(plain_candidates, history),
        lambda: ifa(candidates, plain),
        lambda: ifa.encode(history),
        lambda: ifa.attend(candidates, ifa.encode(plain)),
        lambda: CandidateSetEncoder(8, CandidateSetConfig("softmax"))(candidates),
    ):
        with pytest.raises(ValueError, match="need_indices=True"):
            call()


def test_weights_of_candidates_are_refused():
    inputs = some(candidates=jagged(torch.zeros(6, 8), [2, 1, 3], torch.ones(6)))
    with pytest.raises(ValueError, match="candidates have no weights"):
        new()(*inputs.forward)


HISTORY = some().history.values()
BAD = {
    "weights too few": ("weights must be", {"history": jagged(HISTORY, [5, 0, 3], torch.ones(3))}),
    "weights in a column": (
        "weights must be",
        {"history": jagged(HISTORY, [5, 0, 3], torch.ones(8, 1))},
    ),
    "infinite weight": ("infinite", {"history": jagged(HISTORY, [5, 0, 3], torch.full((8,), math.inf))}),
    "bool weights": (
        "weights must be floating point or None, got torch.bool",
        {"history": jagged(HISTORY, [5, 0, 3], torch.ones(8).bool())},
    ),
    "integer tokens": (
        "values must be floating",
        {"history": jagged(torch.ones(8, 8).long(), [5, 0, 3])},
    ),
    "ids of floats": ("history_ids must be integers", {"history_ids": torch.ones(8, 2)}),
    "ids of bool": ("candidate_ids must be integers", {"candidate_ids": torch.ones(6, 2).bool()}),
    "ages of bool": ("history_age must be numbers", {"history_age": torch.ones(8).bool()}),
    "ids elsewhere": ("history_ids is on meta", {"history_ids": torch.ones(8, 2, device="meta").long()}),
    "ages elsewhere": ("history_age is on meta", {"history_age": torch.ones(8, device="meta")}),
    "weights elsewhere": (
        "weights are on meta",
        {"history": jagged(HISTORY, [5, 0, 3], torch.ones(8, device="meta"))},
    ),
    "other requests": ("candidates have 2", {"candidates": jagged(torch.zeros(6, 8), [2, 4])}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    message, changes = BAD[case]
    with pytest.raises(ValueError, match=message):
        new()(*some(**changes).forward)


@every_backend
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
def test_narrow_ids_are_read_as_what_they_are(backend, dtype):
    inputs = some()
    ids = inputs.history_ids.abs(), inputs.candidate_ids.abs()
    inputs.history_ids, inputs.candidate_ids = ids
    ifa, sim = new(backend=backend), new(kind=SIMAttention, backend=backend)
    narrow = dataclasses.replace(inputs, history_ids=ids[0].to(dtype), candidate_ids=ids[1].to(dtype))
    for module in (ifa, sim):
        expected = module(*inputs.forward).values()
        assert torch.equal(module(*narrow.forward).values(), expected)
        mixed = dataclasses.replace(inputs, history_ids=ids[0].to(dtype))
        assert torch.equal(module(*mixed.forward).values(), expected)
    state = ifa.encode(*narrow.encode)
    assert state.identity_key.dtype == torch.int64
    assert torch.equal(state.identity_key, ifa.encode(*inputs.encode).identity_key)


# ------------------------------------------------------------------------------------------- unknown


@pytest.mark.parametrize("kernels", [*(b for b in BACKENDS if b != "native"), *NATIVE_SETS])
def test_unknown_matches_nothing(kernels, monkeypatch):
    """Id 0 in all four uses: join, state, reading the state, and attention weights."""
    backend = "native" if kernels in NATIVE_SETS else kernels
    if backend == "native":
        monkeypatch.setattr(ops.native, "STATUS", kernels)
    ifa, inputs = new(backend=backend, identity_buckets=5), some()
    inputs.history_ids = torch.tensor([[0, 5], [0, 0], [7, 5], [0, 0], [5, 0], [0, 0], [0, 0], [0, 5]])
    inputs.candidate_ids = torch.tensor([[0, 5], [5, 0], [0, 0], [0, 0], [5, 5], [7, 10]])
    inputs.history = jagged(inputs.history.values(), [5, 0, 3])
    _, matched = ifa.identity(inputs.candidates, inputs.events, inputs.candidate_ids)
    # without decay, for item and category; bucket 0 has ids 5 and 10, never the unknown id
    assert matched[:, [1, 3]].tolist() == [[0, 2], [1, 0], [0, 0], [0, 0], [0, 1], [0, 1]]
    state = ifa.encode(*inputs.encode)
    assert state.identity_offsets.tolist() == [0, 3, 3, 4]
    assert state.identity_key.tolist() == [0, 2, 5, 5]
    read = ifa.identity.attend(inputs.candidates, state, inputs.candidate_ids)
    torch.testing.assert_close(read[1], matched)
    torch.testing.assert_close(
        ifa.attend(inputs.candidates, state, inputs.candidate_ids).values(),
        ifa(*inputs.forward).values(),
    )
    weights = torch.cat([w.sum(1) for w in ifa.attention_weights(*inputs.forward)])
    assert torch.equal(weights[:, 2:] > 0, matched > 0)
    assert ifa.identity.keys(inputs.candidate_ids).tolist()[:2] == [[-1, 5], [0, -1]]


@pytest.mark.parametrize("column", [0, 1], ids=CONFIG.identity_features)
def test_unknown_finds_nothing_in_sim_by_any_column(column):
    """Even if the other column has the same known id."""
    sim = new(kind=lambda c: SIMAttention(c, CONFIG.identity_features[column]))
    ids = {
        known: torch.tensor([[1 if other != column else known for other in (0, 1)]]) for known in (0, 1)
    }
    for had, asked in ((0, 0), (0, 1), (1, 0), (1, 1)):
        inputs = some(history_ids=ids[had].expand(8, -1), candidate_ids=ids[asked].expand(6, -1))
        heads, mass = sim.dense_heads(inputs.candidates, inputs.events, inputs.candidate_ids)
        found = had == asked == 1
        assert bool(heads.any()) == bool(mass.any()) == found
        _, matched = sim.identity(inputs.candidates, inputs.events, inputs.candidate_ids)
        by_column = matched.unflatten(1, (2, -1)).any(2).any(0)
        assert by_column.tolist() == [found if c == column else True for c in (0, 1)]


def test_unknown_finds_nothing_in_sim():
    config = dataclasses.replace(CONFIG, identity_features=())
    sim, inputs = new(config, lambda c: SIMAttention(c, "category")), some()
    inputs.history_ids, inputs.candidate_ids = torch.zeros(8, 1).long(), torch.zeros(6, 1).long()
    nothing = sim(*some(history_ids=torch.ones(8, 1).long(), candidate_ids=inputs.candidate_ids).forward)
    assert torch.equal(sim(*inputs.forward).values(), nothing.values())
    assert torch.equal(nothing.values(), sim.output_proj.bias.expand(6, -1))
    found = sim(
        *some(history_ids=inputs.history_ids + 1, candidate_ids=inputs.candidate_ids + 1).forward
    )
    assert not torch.equal(found.values()[0], sim.output_proj.bias)


# -------------------------------------------------------------------------------------- very old events


def aged(days: float, weighted: bool = True) -> Inputs:
    inputs = Inputs.random(CONFIG, [30, 4], [3, 2], dtype=torch.float32, weighted=weighted)
    inputs.history_age += days
    inputs.history_ids, inputs.candidate_ids = torch.ones(34, 2).long(), torch.ones(5, 2).long()
    return inputs


@every_backend
@pytest.mark.parametrize("feature_map", ["elu", "relu", "hedgehog"])
@pytest.mark.parametrize("readout", ["linear", "softmax"])
@pytest.mark.parametrize("days", [365.0, 500.0])
def test_an_old_history_answers_as_a_young_one(backend, feature_map, readout, days):
    """Except for masses: all weights change by the same factor, 2e-16 after a year."""
    given = dict(feature_map=feature_map, readout=readout, interest_mass=False, eps=1e-3)
    ifa = new(backend=backend, **given)
    young, old = aged(0.0), aged(days)
    expected = ifa(*young.forward).values()
    leaves = [
        *ifa.parameters(),
        old.history.values().requires_grad_(),
        old.history.weights().requires_grad_(),
    ]
    answer = ifa(*old.forward).values()
    torch.testing.assert_close(answer, expected, rtol=1e-3, atol=1e-4)
    gradients = torch.autograd.grad(answer.square().sum(), leaves)
    assert all(g.isfinite().all() for g in gradients) and gradients[-2].any()
    # from its state; from an earlier state after time has passed; in a batch with recent events
    state = ifa.encode(*old.encode)
    read = ifa.attend(old.candidates, state, old.candidate_ids).values()
    torch.testing.assert_close(read, expected, rtol=1e-3, atol=1e-4)
    none = old.with_events([[], []])
    elapsed = torch.full((2,), days)
    later = ifa.update(
        ifa.encode(*young.encode), none.history, elapsed, none.history_age, none.history_ids
    )
    read = ifa.attend(old.candidates, later, old.candidate_ids).values()
    torch.testing.assert_close(read, expected, rtol=1e-3, atol=1e-4)
    updated = ifa.update(state, young.history, None, *young.encode[1:])
    read = ifa.attend(old.candidates, updated, old.candidate_ids).values()
    torch.testing.assert_close(read, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", [MeanPooling, SDIMAttention])
def test_so_do_the_peers_that_average(kind):
    peer = new(kind=kind, interest_mass=False)
    torch.testing.assert_close(
        peer(*aged(365.0).forward).values(), peer(*aged(0.0).forward).values(), rtol=1e-3, atol=1e-4
    )


@every_backend
def test_long_beyond_80_half_lives_a_head_that_decays_has_no_history(backend):
    ifa = new(backend=backend, identity_half_lives=(7.0,))
    old = aged(800.0)
    bias = ifa.output_proj.bias.expand(5, -1)
    torch.testing.assert_close(ifa(*old.forward).values(), bias, rtol=0, atol=1e-5)
    read = ifa.attend(old.candidates, ifa.encode(*old.encode), old.candidate_ids).values()
    torch.testing.assert_close(read, bias, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------ configurations


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"half_lives": (1e-39, 1.0)}, "half_lives"),
        ({"identity_half_lives": (1e-39,)}, "identity_half_lives"),
        ({"eps": 1e-45}, "eps"),
        ({"eps": math.inf}, "eps"),
        ({"mass_scale": 1e-45}, "mass_scale"),
        ({"mass_scale": math.nan}, "mass_scale"),
        ({"identity_buckets": 2**62}, "identity_buckets"),
        ({"identity_buckets": 2**36}, "identity_buckets"),  # for two features
    ],
    ids=str,
)
def test_numbers_that_float32_or_int64_cannot_hold_are_refused(changes, name):
    with pytest.raises(ConfigError, match=name):
        dataclasses.replace(CONFIG, **changes)


@every_backend
def test_numbers_at_the_limits_work(backend):
    limits = {
        "half_lives": (1e-30, 1e300),
        "identity_half_lives": (1e-30, math.inf),
        "mass_scale": 1e-12,
        "identity_buckets": 2**35,
    }
    for eps in (1e-12, 1e12):
        ifa, inputs = new(backend=backend, eps=eps, **limits), some()
        inputs.history_ids[0], inputs.candidate_ids[0] = -(2**63), -(2**63)
        answer = ifa(*inputs.forward).values()
        assert answer.isfinite().all()
        assert all(g.isfinite().all() for g in torch.autograd.grad(answer.sum(), [*ifa.parameters()]))
        read = ifa.attend(inputs.candidates, ifa.encode(*inputs.encode), inputs.candidate_ids).values()
        torch.testing.assert_close(read, answer.detach(), rtol=1e-4, atol=1e-4)
