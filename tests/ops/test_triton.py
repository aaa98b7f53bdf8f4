"""What is specific to the Triton backend, on a GPU if there is one, else in Triton's interpreter.

The interpreter is slow: these tests are a selection that covers the kernels. The tests of all backends
include this one; those that take long in the interpreter are among the slow tests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers import Inputs, assert_near, offsets_of
from interpreter import DEVICE
from kernels import run, wide_inputs
from test_ops import (
    EPS,
    FEATURE_MAPS,
    assert_backend_is_true,
    attend_inputs,
    attend_softmax_inputs,
    encode_inputs,
    match_inputs,
    to_float64,
)
from waits import Waits

pytest.importorskip("triton")
from benchmarks import gpu_kernels
from ifa_torchrec import IFAConfig, InteractionFidelityAttention, ops
from ifa_torchrec.ops import backends
from ifa_torchrec.ops.kernels.triton import wide

triton_attend = sys.modules["ifa_torchrec.ops.kernels.triton.attend"]
WIDE_CASES = [i for i, case in enumerate(gpu_kernels.CASES) if case.width > 64]
MOST_SPILLED = 128  # bytes per thread
needs_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
MAP_AND_WEIGHTS = pytest.mark.parametrize(
    ("feature_map", "weighted"),
    [("elu", True), ("elu", "by head"), ("relu", False), ("hedgehog", True), ("hedgehog", "by head")],
)
TRUE = dict(tolerance=2e-5, backend="triton")


def on_device(inputs: dict) -> dict:
    return {name: x if x is None else x.to(DEVICE) for name, x in inputs.items()}


def softmax_inputs(lengths, summaries: int, dim: int, heads: int, width: int) -> dict:
    """Inputs of attend_softmax."""
    generator = torch.Generator().manual_seed(0)
    random = partial(torch.randn, generator=generator)
    return {
        "candidates": random(sum(lengths), dim),
        "offsets": offsets_of(lengths),
        "query_weight": random(heads, width, dim) / dim**0.5,
        "summaries": random(len(lengths), heads, summaries, width),
        "log_weight": random(len(lengths), heads, summaries),
    }


# ------------------------------------------------------------------------------ against the reference


@MAP_AND_WEIGHTS
def test_encode_is_the_references(feature_map, weighted):
    inputs = encode_inputs([0, 1, 317, 0, 65], torch.float32, weighted)
    assert_backend_is_true("encode", inputs, feature_map, **TRUE)


def test_encode_of_some_thousand_events_among_users_with_none():
    inputs = encode_inputs([0, 2011, 0, 0], torch.float32)
    assert_backend_is_true("encode", inputs, "elu", **TRUE)


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_attend_is_the_references(feature_map):
    inputs = attend_inputs([0, 1, 150, 0, 9], feature_map, torch.float32)
    assert_backend_is_true("attend", inputs, feature_map, EPS, **TRUE)


def test_attend_softmax_is_the_references():
    inputs = attend_softmax_inputs([1, 70, 0, 9], torch.float32)
    assert_backend_is_true("attend_softmax", inputs, **TRUE)


@pytest.mark.parametrize(
    ("summaries", "dims"),
    [(128, (40, 1, 64)), (7, (80, 3, 5)), (90, (20, 1, 200))],
    ids=["several ranges", "several heads and tiles of D", "a wide head"],
)
def test_attend_softmax_of_any_width(summaries, dims):
    inputs = softmax_inputs([20, 0, 3], summaries, *dims)
    assert_backend_is_true("attend_softmax", inputs, **TRUE)


def test_attend_softmax_where_no_summary_is_there():
    inputs = on_device(softmax_inputs([3, 2], 5, 8, 2, 4))
    inputs["log_weight"][0] = -torch.inf
    out, log_sum = ops.attend_softmax(*inputs.values(), "triton")
    assert not out[:3].any() and (log_sum[:3] == -torch.inf).all() and log_sum[3:].isfinite().all()


@pytest.mark.parametrize("weighted", [True, "by head", False])
def test_match_is_the_references(weighted):
    inputs = match_inputs([0, 1, 317, 0, 65], [3, 1, 20, 0, 2], torch.float32, weighted)
    assert_backend_is_true("match", inputs, **TRUE)


@pytest.mark.parametrize("lengths", [[], [0, 0], [1]], ids=str)
def test_nothing_and_one(lengths):
    assert_backend_is_true("encode", encode_inputs(lengths, torch.float32), "elu", **TRUE)
    assert_backend_is_true("attend", attend_inputs(lengths, "elu", torch.float32), "elu", EPS, **TRUE)
    assert_backend_is_true("match", match_inputs(lengths, lengths, torch.float32), **TRUE)


@pytest.mark.parametrize("bucket", [-1, 2**62, -(2**63)], ids=str)
def test_match_tells_requests_and_buckets_apart(bucket):
    inputs = match_inputs([5, 3], [4, 4], torch.float32)
    inputs["candidate_buckets"] = torch.tensor([bucket, 3, bucket, 2**63 - 1] * 2)
    inputs["history_buckets"] = torch.tensor([bucket, 3, 7, 2**63 - 1, bucket, 4, 4, bucket])
    assert_backend_is_true("match", inputs, **TRUE)


SIZES = [
    pytest.param((80, 2, 40), "hedgehog", id="several groups of heads"),
    pytest.param((300, 3, 20), "elu", id="several tiles of D, and groups", marks=pytest.mark.slow),
    pytest.param((7, 3, 5), "hedgehog", id="nothing a power of two"),
    pytest.param((16, 1, 64), "relu", id="the widest head"),
]


@pytest.mark.parametrize(("sizes", "feature_map"), SIZES)
def test_any_width(sizes, feature_map):
    inputs, asking = wide_inputs([70, 0, 1], [3, 2, 0], sizes, weighted="by head")
    truth = run(to_float64(inputs), to_float64(asking), feature_map, "reference")
    for name, value in run(on_device(inputs), on_device(asking), feature_map, "triton").items():
        assert_near(value.cpu(), truth[name], 2e-5, name)


WIDE = [
    pytest.param((8, 1, 65), "hedgehog", "by head", id="one feature beyond"),
    pytest.param((33, 2, 65), "elu", True, id="several heads and tiles of D"),
    pytest.param((5, 1, 129), "relu", False, id="none weighted"),
]


@pytest.mark.parametrize(("sizes", "feature_map", "weighted"), WIDE)
def test_wide_heads(sizes, feature_map, weighted):
    """Widths above 64, for which a program has a tile of a head's features."""
    inputs, asking = wide_inputs([5, 0], [2, 0], sizes, weighted=weighted)
    if not weighted:
        inputs |= {"weights": None, "ages": None}
    truth = run(to_float64(inputs), to_float64(asking), feature_map, "reference")
    for name, value in run(on_device(inputs), on_device(asking), feature_map, "triton").items():
        assert_near(value.cpu(), truth[name], 2e-5, name)


def test_wide_heads_of_a_history_of_several_chunks():
    inputs, asking = wide_inputs([0, 150, 2], [1, 2, 1], (8, 1, 65))
    truth = run(to_float64(inputs), to_float64(asking), "elu", "reference")
    for name, value in run(on_device(inputs), on_device(asking), "elu", "triton").items():
        assert_near(value.cpu(), truth[name], 2e-5, name)


@pytest.mark.parametrize("lengths", [[], [0, 0]], ids=str)
def test_wide_heads_of_nothing(lengths):
    inputs, asking = wide_inputs(lengths, lengths, (8, 1, 65))
    for name, value in run(on_device(inputs), on_device(asking), "hedgehog", "triton").items():
        assert not value.nan_to_num().any(), name


def test_wide_heads_of_bfloat16():
    inputs, asking = wide_inputs([35, 0, 3], [3, 2, 1], (32, 1, 65), torch.bfloat16)
    truth = run(to_float64(inputs), to_float64(asking), "elu", "reference")
    for name, value in run(on_device(inputs), on_device(asking), "elu", "triton").items():
        given = name in ("history", "candidates")
        assert value.dtype == (torch.bfloat16 if given else torch.float32)
        assert_near(value.cpu(), truth[name], 3e-2, name)


def test_a_spoilt_row_of_wide_heads_spoils_its_own_request_alone():
    inputs, _ = wide_inputs([3, 2, 0], [], (8, 1, 65))
    clean = on_device(inputs)
    spoilt = clean | {"history": clean["history"].clone()}
    spoilt["history"][1, 1] = -torch.inf
    for actual, expected in zip(
        ops.encode(*spoilt.values(), "hedgehog", "triton"),
        ops.encode(*clean.values(), "hedgehog", "triton"),
        strict=True,
    ):
        assert torch.equal(actual[1:], expected[1:])
        assert not actual[0].isfinite().any()


def test_before_capability_9_hedgehogs_heads_above_32_take_the_wide_backward(monkeypatch):
    monkeypatch.setattr(triton_attend, "multiplies_in_registers", lambda device: True)
    _, asking = wide_inputs([], [3, 2], (8, 1, 33))
    state = torch.rand(2, 1, 66, 33), torch.rand(2, 1, 66)
    inputs = asking | dict(zip(("key_value", "key_sum"), state, strict=True))
    taken = mock.Mock(side_effect=wide.attend_backward)
    monkeypatch.setattr(wide, "attend_backward", taken)
    assert_backend_is_true("attend", inputs, "hedgehog", EPS, **TRUE)
    taken.assert_called_once()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("feature_map", ["elu", "hedgehog"])
def test_tokens_of_16_bits(dtype, feature_map):
    """float32 states and outputs; factors of bfloat16 products are rounded to it."""
    inputs, asking = wide_inputs([130, 0, 3], [3, 2, 1], (32, 2, 16), dtype)
    truth = run(to_float64(inputs), to_float64(asking), feature_map, "reference")
    for name, value in run(on_device(inputs), on_device(asking), feature_map, "triton").items():
        given = name in ("history", "candidates")
        assert value.dtype == (dtype if given else torch.float32)
        rounded = dtype == torch.bfloat16 or given
        assert_near(value.cpu(), truth[name], 3e-2 if rounded else 2e-5, name)


def test_float16_does_not_overflow_where_float32_does_not():
    inputs = on_device(encode_inputs([100], torch.float16))
    inputs["weights"] = torch.full((100,), 1e6, device=DEVICE)
    assert all(x.isfinite().all() for x in ops.encode(*inputs.values(), "elu", "triton"))


def test_a_spoilt_row_spoils_its_own_request_alone():
    clean = on_device(encode_inputs([70, 0, 5, 3], torch.float32))
    for value in (torch.nan, -torch.inf):
        spoilt = clean | {"history": clean["history"].clone()}
        spoilt["history"][72, 1] = value
        for actual, expected in zip(
            ops.encode(*spoilt.values(), "hedgehog", "triton"),
            ops.encode(*clean.values(), "hedgehog", "triton"),
            strict=True,
        ):
            assert torch.equal(actual[[0, 1, 3]], expected[[0, 1, 3]])
            assert not actual[2].isfinite().any()


# ------------------------------------------------------------------------------------ the operators


@pytest.mark.parametrize("op", ["encode", "attend", "attend_softmax", "match"])
def test_opcheck(op):
    inputs, extra = {
        "encode": (encode_inputs([5, 0, 3], torch.float32, "by head"), ("hedgehog",)),
        "attend": (attend_inputs([2, 3, 0], "elu", torch.float32), ("elu", EPS)),
        "attend_softmax": (attend_softmax_inputs([2, 3, 0], torch.float32), ()),
        "match": (match_inputs([4, 0, 6], [3, 1, 5], torch.float32), ()),
    }[op]
    fixed = ("ages", "decay")
    inputs = {
        name: x.requires_grad_() if x.is_floating_point() and name not in fixed else x
        for name, x in on_device(inputs).items()
    }
    torch.library.opcheck(getattr(torch.ops.ifa, op).default, (*inputs.values(), *extra, "triton"))


def test_a_module_takes_it():
    config = IFAConfig(16, num_heads=2, head_dim=8, identity_features=("item",))
    modules = [
        InteractionFidelityAttention(config.__class__(**(vars(config) | {"backend": name}))).to(DEVICE)
        for name in ("triton", "torch")
    ]
    modules[1].load_state_dict(modules[0].state_dict())
    inputs = Inputs.random(config, [9, 0, 4], [3, 2, 1], dtype=torch.float32)
    given = [x if x is None else x.to(DEVICE) for x in inputs.forward]
    found = [module(*given).values() for module in modules]
    assert_near(found[0], found[1], 1e-5)
    gradients = [
        torch.autograd.grad(out.square().sum(), [*module.parameters()])
        for out, module in zip(found, modules, strict=True)
    ]
    for actual, expected in zip(*gradients, strict=True):
        assert_near(actual, expected, 1e-4)


def test_what_it_does_not_serve_is_refused(monkeypatch):
    inputs = on_device(encode_inputs([5, 3]))
    with pytest.raises(ValueError, match=r'"triton" does not support torch\.float64 on'):
        ops.encode(*inputs.values(), "elu", "triton")
    asking = on_device(attend_inputs([5, 3], "elu", torch.float32, torch.float64))
    with pytest.raises(ValueError, match=r"torch\.float32 and a state of torch\.float64"):
        ops.attend(*asking.values(), "elu", EPS, "triton")
    monkeypatch.setattr(backends, "TRITON_IS_INSTALLED", False)
    with pytest.raises(ValueError, match="Triton is not installed"):
        ops.encode(*on_device(encode_inputs([5, 3], torch.float32)).values(), "elu", "triton")


def test_auto_takes_it_on_gpus_alone():
    inputs = on_device(encode_inputs([5, 3], torch.float32))
    chosen = backends.fastest(inputs["history"])
    assert chosen == "triton" if DEVICE == "cuda" else chosen in ("native", "torch")


def test_the_operators_themselves_refuse_sizes_that_do_not_agree():
    """Called without ops.encode and the other functions, as in an exported graph."""
    for operator, inputs, extra in (
        (torch.ops.ifa.encode, encode_inputs([5, 3], torch.float32, "by head"), ("elu", "triton")),
        (torch.ops.ifa.attend, attend_inputs([5, 3], "elu", torch.float32), ("elu", EPS, "triton")),
        (torch.ops.ifa.attend_softmax, attend_softmax_inputs([5, 3], torch.float32), ("triton",)),
        (torch.ops.ifa.match, match_inputs([5, 3], [2, 1], torch.float32), ("triton",)),
    ):
        for name, x in on_device(inputs).items():
            if DEVICE == "cuda" and name.endswith("offsets"):
                continue  # reading them would wait for the device
            if (operator, name) == (torch.ops.ifa.match, "candidate_buckets") and DEVICE == "cuda":
                continue
            wrong = inputs | {name: x.narrow(0, 0, x.shape[0] - 1)}
            if operator == torch.ops.ifa.match and name == "decay":
                continue  # only this argument defines L
            with pytest.raises(ValueError, match=r"must"):
                operator(*wrong.values(), *extra)


# ----------------------------------------------------------------- no wait for the device, and graphs


def test_nothing_on_the_host_looks_at_a_value():
    for case in (gpu_kernels.CASES[0], *gpu_kernels.CASES[-3:]):
        with Waits() as waits:
            gpu_kernels.launches(case, 90)
        assert waits.seen == []
        with waits:
            torch.ones(3)[torch.ones(3) > 0]
        assert waits.seen != []  # the measurement works


@needs_gpu
def test_a_step_waits_for_nothing_and_a_graph_holds_it():
    inputs, asking = wide_inputs([300, 0, 37], [3, 2, 9], (64, 4, 16))
    inputs, asking = on_device(inputs), on_device(asking)
    expected = run(inputs, asking, "elu", "triton")
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(inputs, asking, "elu", "triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(inputs, asking, "elu", "triton")
    for _ in range(3):
        graph.replay()
        for name, value in found.items():
            assert torch.equal(value, expected[name]), name


@needs_gpu
def test_results_are_the_same_to_the_bit_at_every_run():
    inputs, asking = wide_inputs([100_000, 0, 37], [3000, 2, 9], (64, 4, 16))
    expected = run(on_device(inputs), on_device(asking), "elu", "triton")
    for _ in range(5):
        for name, value in run(on_device(inputs), on_device(asking), "elu", "triton").items():
            assert torch.equal(value, expected[name]), name


# --------------------------------------------------------------------------------- ahead of time


def test_operations_of_an_estimate_are_those_of_the_products():
    """A product of [a, b] and [b, c] has 2 a b c; the numbers here come from the formulas."""
    case, rows = gpu_kernels.CASES[0], 500
    dim, heads, width, summaries = case.dim, case.heads, case.width, case.width
    features = heads * width  # one group of heads, in one tile of D
    found: dict[str, float] = {}
    for launch in gpu_kernels.launches(case, 90, candidates=rows):
        moved, operations = gpu_kernels.work(launch)
        assert moved > 0
        found[launch.name] = found.get(launch.name, 0.0) + operations
    assert found["attend_kernel"] == 2 * rows * (features * dim + features**2)
    read = heads * width * (dim + 2 * summaries)
    assert found["attend_softmax_kernel"] == 2 * rows * read
    # the gradients of candidates and projection, each with its own pass over the summaries
    backward = 2 * (read + heads * width * 3 * summaries) + 2 * features * dim
    assert found["attend_softmax_backward_kernel"] == 2 * rows * backward
    assert found["attend_softmax_summaries_kernel"] == 2 * rows * (
        features * dim + 4 * features * summaries
    )
    assert found["match_kernel"] == found["sum_segments_kernel"] == 0


def test_operations_of_wide_heads():
    """One head of width 256, D = 256, in tiles of 64."""
    events, rows = 5000, 500
    found: dict[str, float] = {}
    for launch in gpu_kernels.launches(gpu_kernels.CASES[WIDE_CASES[0]], 90, events, rows):
        found[launch.name] = found.get(launch.name, 0.0) + gpu_kernels.work(launch)[1]
    product = 2 * 256 * 256
    assert found["wide_attend_kernel"] == 2 * rows * product * (4 + 1)  # the backward's first pass, too
    # encode, its backward, and attend's backward
    assert found["wide_sums_kernel"] == (2 * events + rows) * product * (4 + 1)
    assert found["wide_totals_kernel"] == events * product * 2
    of_events = 4 * 2 * 2 + 2 + 1  # two passes over both products; the gradients of rows and of sums
    assert found["wide_backward_kernel"] == product * (events * of_events + rows * (of_events - 1))


def compiled(cases: str, capabilities: str, cache: Path) -> list[dict]:
    """The output of benchmarks/gpu_kernels.py, in a process without the interpreter."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_CACHE_DIR": str(cache)}
    done = subprocess.run(
        [sys.executable, gpu_kernels.__file__, cases, capabilities],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("capability", gpu_kernels.CAPABILITIES)
@pytest.mark.parametrize("wide", [None, *WIDE_CASES])
def test_every_kernel_compiles_and_fits_a_gpu(capability, wide, tmp_path):
    """Products use tensor cores, shared memory suffices, and little or nothing is spilled."""
    cases = range(WIDE_CASES[0]) if wide is None else [wide]
    kernels = compiled(",".join(map(str, cases)), str(capability), tmp_path)
    of = {"encode"} if wide is None else {"wide"}
    found = {x["kernel"].split("_")[0] for x in kernels}
    assert found - {"wide"} == (of | {"attend", "join", "match", "sum"}) - {"wide"}
    assert of <= found
    for kernel in kernels:
        if kernel["kernel"].startswith(("encode", "attend", "wide")):
            assert kernel["tensor_cores"] > 0, kernel
        assert kernel["shared"] <= gpu_kernels.SHARED_MEMORY[capability], kernel
    # attend_softmax does not tile a head's features: it spills for heads above 64 (docs/howto/gpus.md)
    spilled = [x for x in kernels if x["local"] > MOST_SPILLED]
    if wide is None:
        assert not spilled
    assert all(x["kernel"].startswith("attend_softmax") and x["local"] <= 1200 for x in spilled)
