"""Every way of building a module must give the same results."""

from __future__ import annotations

import copy
import dataclasses
import io
import math
import pickle

import pytest
import torch
from helpers import Inputs, assert_near, randomised
from torch import nn

from ifa_torchrec import CandidateSetEncoder, IFAConfig, InteractionFidelityAttention
from ifa_torchrec.distributed import OptimizerConfig, init_process_group, shard
from ifa_torchrec.errors import ConfigError
from ifa_torchrec.modules import (
    CandidateSetConfig,
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

CONFIG = IFAConfig(
    embedding_dim=8,
    num_heads=2,
    half_lives=(math.inf, 300.0),
    identity_features=("item",),
    identity_half_lives=(90.0, 7.0),
    gates={"action": 6, "device": 4},
)
KINDS = [
    InteractionFidelityAttention,
    MeanPooling,
    SoftmaxAttention,
    DINAttention,
    TWINAttention,
    ETAAttention,
    SIMAttention,
    SDIMAttention,
    LowRankAttention,
    SOLARAttention,
    HSTUAttention,
]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def new(kind: type, seed: int = 0, **arguments) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind(CONFIG, **arguments)


def some(dtype: torch.dtype = torch.float32) -> Inputs:
    inputs = Inputs.random(CONFIG, [9, 0, 30], [2, 1, 3], dtype=torch.float64)
    inputs.history_age *= 200
    inputs.candidates._values, inputs.history._values = (
        jagged.values().to(dtype) for jagged in (inputs.candidates, inputs.history)
    )
    return inputs


def assert_same_start(module: nn.Module, other: nn.Module, random: tuple[str, ...]) -> None:
    """Compare everything that does not start at random, and the scale of everything that does."""
    expected = other.state_dict()
    assert module.state_dict().keys() == expected.keys()
    for name, value in module.state_dict().items():
        if any(part in name for part in random):
            assert value.isfinite().all() and value.std() > 0.01, name
        else:
            torch.testing.assert_close(value, expected[name], msg=lambda text, n=name: f"{n}: {text}")


RANDOM = ("identity.value_proj", "log_gate", "hyperplanes", "latents", "activation_unit", "event_proj")
"""Parameters that start at random; so do the mass and identity columns of output_proj."""


def without_masses(module: nn.Module) -> nn.Module:
    width = CONFIG.num_heads * CONFIG.head_width
    with torch.no_grad():
        module.output_proj.weight[:, width:] = 0
    return module


@every_kind
@pytest.mark.parametrize("how", ["device=", "under torch.device"])
def test_from_the_meta_device_by_reset_parameters(kind, how):
    if how == "device=":
        module = new(kind, device="meta")
    else:
        with torch.device("meta"):
            module = new(kind)
    assert {p.device.type for p in module.parameters()} == {"meta"}
    module = module.to_empty(device="cpu")
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data.fill_(math.nan)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        module.reset_parameters()
    assert_same_start(without_masses(module), without_masses(new(kind)), RANDOM)
    assert module(*some().forward).values().isfinite().all()


@every_kind
def test_from_the_meta_device_by_load_state_dict(kind):
    trained = randomised(new(kind))
    with torch.device("meta"):
        module = new(kind)
    module = module.to_empty(device="cpu")
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data.fill_(math.nan)
    module.load_state_dict(trained.state_dict())
    assert torch.equal(module(*some().forward).values(), trained(*some().forward).values())
    with torch.device("meta"):
        assigned = new(kind)
    assigned.load_state_dict(trained.state_dict(), assign=True)
    assert torch.equal(assigned(*some().forward).values(), trained(*some().forward).values())


@pytest.mark.parametrize("kind", [InteractionFidelityAttention, SDIMAttention, ETAAttention])
def test_from_the_meta_device_by_distributed_model_parallel(kind):
    device = init_process_group()
    with torch.device("meta"):
        module = new(kind)
    sharded, _ = shard(nn.ModuleDict({"peer": module}), device, OptimizerConfig())
    made = sharded.module.module["peer"] if hasattr(sharded.module, "module") else sharded.module["peer"]
    assert_same_start(without_masses(made), without_masses(new(kind)), RANDOM)
    # and a state_dict can be loaded again, with its configuration
    saved = {name: value.clone() for name, value in sharded.state_dict().items()}
    sharded.load_state_dict(saved)
    assert torch.equal(sharded.state_dict()["peer._extra_state"], module.get_extra_state())
    saved["peer._extra_state"] = another(mass_scale=3.0).get_extra_state()
    with pytest.raises(ConfigError, match=r"mass_scale was 3\.0, is 1\.0"):
        sharded.load_state_dict(saved)


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_cast_does_not_touch_the_half_lives(kind, dtype):
    module = randomised(new(kind))
    if dtype != torch.float64:  # weights that the cast does not round, so that only the cast differs
        module.to(dtype).float()
    plain = copy.deepcopy(module)
    cast, back = module.to(dtype), copy.deepcopy(module).float()
    for name in ("decay", "identity.decay"):
        rates = cast.get_submodule(name.rpartition(".")[0]).decay
        assert rates.dtype == torch.float32
        assert torch.equal(rates, plain.get_submodule(name.rpartition(".")[0]).decay)
    assert torch.equal(back(*some().forward).values(), plain(*some().forward).values())
    answers = cast(*some(dtype).forward).values()
    assert answers.dtype == dtype
    if kind not in (ETAAttention, SDIMAttention, TWINAttention):  # these make discrete choices
        assert_near(answers, plain(*some().forward).values(), 0.1 if dtype == torch.bfloat16 else 0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_an_old_event_weighs_the_same_after_a_cast(dtype):
    """1,000 days at a half-life of 300: a rate rounded to bfloat16 would be off by 3.4%."""
    inputs = Inputs.random(CONFIG, [1], [1], weighted=False)
    inputs.history._values = inputs.history.values().to(dtype)
    inputs.history_age = torch.tensor([1000.0])
    ifa = new(InteractionFidelityAttention).to(dtype)
    state = ifa.encode(*inputs.encode)
    ratio = state.key_sum / ifa.encode(inputs.history, None, *inputs.encode[2:]).key_sum
    expected = torch.tensor([[[1.0], [0.5 ** (1000 / 300)]]]).expand_as(ratio)
    torch.testing.assert_close(ratio, expected, rtol=1e-5, atol=0)


def test_states_of_the_same_weights_before_and_after_a_cast_are_of_one_kind():
    inputs, ifa = some(), new(InteractionFidelityAttention)
    state, candidates = ifa.encode(*inputs.encode), some(torch.bfloat16).candidates
    cast = copy.deepcopy(ifa).bfloat16()
    later = cast.update(state, some(torch.bfloat16).history, torch.ones(3), *inputs.encode[1:])
    assert later.key_sum.dtype == torch.float32
    from_before = cast.attend(candidates, state, inputs.candidate_ids).values()
    from_after = cast.attend(candidates, cast.encode(*some(torch.bfloat16).encode), inputs.candidate_ids)
    assert_near(from_before, from_after.values(), 0.05)


@every_kind
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
def test_copies_answer_the_same(kind, copied):
    module = randomised(new(kind))
    before = module(*some().forward).values()
    assert torch.equal(copied(module)(*some().forward).values(), before)


@every_kind
def test_the_default_dtype_is_that_of_the_parameters_alone(kind):
    config = dataclasses.replace(CONFIG, backend="torch")
    single = randomised(kind(config))
    expected = single(*some().forward).values()
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(single(*some().forward).values(), expected)
        double = kind(config)
        assert {p.dtype for p in double.parameters()} == {torch.float64}
        double.load_state_dict(single.state_dict())
        assert_near(double(*some(torch.float64).forward).values(), expected, 1e-4)
    finally:
        torch.set_default_dtype(torch.float32)


@every_kind
def test_the_default_device_is_not_that_of_the_work(kind):
    module = randomised(new(kind))
    expected = module(*some().forward).values()
    inputs = some()
    with torch.device("meta"):
        assert torch.equal(module(*inputs.forward).values(), expected)


def test_the_candidate_set_encoder_is_built_so_too():
    for attention in ("softmax", "linear"):
        encoder = CandidateSetEncoder(8, CandidateSetConfig(attention), device="meta")
        encoder.to_empty(device="cpu").reset_parameters()
        assert torch.equal(encoder.attention.value_proj.weight, torch.eye(8))


# --------------------------------------------------------------------- the configuration in a state_dict


def another(**changes) -> InteractionFidelityAttention:
    return InteractionFidelityAttention(dataclasses.replace(CONFIG, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"half_lives": (math.inf, 30.0)}, r"half_lives was \[inf, 300.0\], is \[inf, 30.0\]"),
        ({"half_lives": None}, r"half_lives was \[inf, 300.0\], is \[inf, inf\]"),
        ({"feature_map": "relu"}, "feature_map was elu, is relu"),
        ({"identity_buckets": 100}, "identity_buckets was 4096, is 100"),
        ({"identity_half_lives": (90.0, 30.0)}, "identity_half_lives was"),
        ({"identity_head_dim": 0}, "identity_head_dim was 4, is 0"),
        ({"identity_features": ("category",)}, "identity_features was"),
        ({"mass_scale": 0.5}, "mass_scale was 1.0, is 0.5"),
        ({"num_heads": 4, "head_dim": 2, "half_lives": None}, "num_heads was 2, is 4"),
        ({"eps": 1e-3}, "eps was 1e-06, is 0.001"),
        ({"readout": "softmax"}, "readout was linear, is softmax"),
        ({"gates": {"device": 4, "action": 6}}, "gates was .*action.*, is .*device.*action"),
        ({"gates": {"action": 6, "device": 5}}, r"gates was .*4\]\], is .*5\]\]"),
        ({"gates": {}}, r"gates was .*, is \[\]"),
    ],
    ids=str,
)
def test_a_state_dict_of_another_configuration_is_refused(changes, message):
    other = another(**changes)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ConfigError, match=message):
        other.load_state_dict(another().state_dict(), strict=False)
    for name, value in other.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_backend_and_two_ways_to_say_the_same_do_not_matter():
    plain = dataclasses.replace(CONFIG, half_lives=None)
    module = InteractionFidelityAttention(
        dataclasses.replace(plain, backend="reference", head_dim=4, half_lives=(math.inf, math.inf))
    )
    module.load_state_dict(InteractionFidelityAttention(plain).state_dict())


def test_a_state_dict_is_tensors_that_torch_loads_as_weights_only():
    module, file = randomised(new(InteractionFidelityAttention)), io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert loaded["_extra_state"].dtype == torch.uint8
    new(InteractionFidelityAttention).load_state_dict(loaded)
    del loaded["_extra_state"]  # as in a state_dict without a configuration
    with pytest.raises(RuntimeError, match="_extra_state"):
        new(InteractionFidelityAttention).load_state_dict(loaded)
    new(InteractionFidelityAttention).load_state_dict(loaded, strict=False)
