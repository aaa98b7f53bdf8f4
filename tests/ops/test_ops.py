"""The backends compared with the reference, and the reference with the quadratic form."""

from __future__ import annotations

import json
import math

import pytest
import torch
from helpers import assert_near, offsets_of
from interpreter import DEVICE, INTERPRETED, TRITON
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ifa_torchrec import ops
from ifa_torchrec.ops.kernels import native, reference
from ifa_torchrec.ops.kernels.tiling import LONGEST_CHUNK, TILE

D, H, WIDTH = 6, 3, 4
DECAY = [0.0, 0.5, 3.0]
# Without a match, outputs and gradients are as large as 1 / eps: use an eps for which float32 suffices.
EPS = 0.01
FEATURE_MAPS = sorted(ops.FEATURE_MAPS)

# name: (events of each request, candidates of each request)
SHAPES = {
    "no request": ([], []),
    "nothing in any request": ([0, 0], [0, 0]),
    "one event": ([1], [1]),
    "empty histories": ([0, 5, 0], [2, 1, 3]),
    "empty candidate sets": ([4, 2, 5], [0, 3, 0]),
    "odd lengths": ([7, 0, 13, 1, 29], [3, 5, 0, 11, 1]),
    "around a chunk and a tile": (
        [LONGEST_CHUNK, TILE + 1, 3, LONGEST_CHUNK + 1],
        [LONGEST_CHUNK - 1, 2, TILE + 1, 0],
    ),
}


def random(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def weights_of(rows: int, heads: int, weighted: bool | str, seed: int, dtype: torch.dtype):
    """[rows], or [rows, heads] for weighted "by head", or None for False."""
    shape = (rows, heads) if weighted == "by head" else (rows,)
    return random(*shape, seed=seed, dtype=dtype).abs() if weighted else None


def encode_inputs(lengths, dtype=torch.float64, weighted: bool | str = True) -> dict:
    n = sum(lengths)
    return {
        "history": random(n, D, seed=1, dtype=dtype),
        "offsets": offsets_of(lengths),
        "key_weight": random(H, WIDTH, D, seed=2, dtype=dtype),
        "value_weight": random(H, WIDTH, D, seed=3, dtype=dtype),
        "weights": weights_of(n, H, weighted, 4, dtype),
        "ages": random(n, seed=5, dtype=dtype).abs() if weighted else None,
        "decay": torch.tensor(DECAY, dtype=dtype),
    }


def attend_inputs(lengths, feature_map, dtype=torch.float64, state_dtype=None) -> dict:
    features = WIDTH * ops.FEATURE_MAPS[feature_map].expansion
    state_dtype = state_dtype or dtype
    return {
        "candidates": random(sum(lengths), D, seed=6, dtype=dtype),
        "offsets": offsets_of(lengths),
        "query_weight": random(H, WIDTH, D, seed=7, dtype=dtype),
        "key_value": random(len(lengths), H, features, WIDTH, seed=8, dtype=state_dtype),
        # a sum of features >= 0
        "key_sum": random(len(lengths), H, features, seed=9, dtype=state_dtype).abs(),
    }


def attend_softmax_inputs(lengths, dtype=torch.float64, summaries: int = 7) -> dict:
    return {
        "candidates": random(sum(lengths), D, seed=6, dtype=dtype),
        "offsets": offsets_of(lengths),
        "query_weight": random(H, WIDTH, D, seed=7, dtype=dtype),
        "summaries": random(len(lengths), H, summaries, WIDTH, seed=8, dtype=dtype),
        "log_weight": random(len(lengths), H, summaries, seed=9, dtype=dtype),
    }


def match_inputs(
    history_lengths, candidate_lengths, dtype=torch.float64, weighted: bool | str = True
) -> dict:
    n, m = sum(history_lengths), sum(candidate_lengths)
    generator = torch.Generator().manual_seed(10)
    return {
        # 5 buckets: most candidates match, and large sets have duplicates
        "candidate_buckets": torch.randint(0, 5, (m,), generator=generator),
        "candidate_offsets": offsets_of(candidate_lengths),
        "history": random(n, D, seed=11, dtype=dtype),
        "history_buckets": torch.randint(0, 6, (n,), generator=generator),
        "history_offsets": offsets_of(history_lengths),
        "weights": weights_of(n, H, weighted, 12, dtype),
        "ages": random(n, seed=13, dtype=dtype).abs() if weighted else None,
        "decay": torch.tensor(DECAY, dtype=dtype),
    }


DIFFERENTIABLE = {
    "encode": ["history", "key_weight", "value_weight", "weights"],
    "attend": ["candidates", "query_weight", "key_value", "key_sum"],
    "attend_softmax": ["candidates", "query_weight", "summaries", "log_weight"],
    "match": ["history", "weights"],
}


def to_float64(inputs: dict) -> dict:
    return {
        name: x.double() if x is not None and x.is_floating_point() else x for name, x in inputs.items()
    }


def called(op: str, inputs: dict, *extra, backend: str) -> list[Tensor]:
    """The operator's outputs; the Triton backend runs on the GPU if there is one."""
    on_cpu = all(x is None or x.device.type == "cpu" for x in inputs.values())
    if backend != "triton" or not on_cpu or DEVICE == "cpu":
        return [*getattr(ops, op)(*inputs.values(), *extra, backend=backend)]
    given = [x if x is None else x.to(DEVICE) for x in inputs.values()]
    return [x.cpu() for x in getattr(ops, op)(*given, *extra, backend=backend)]


def outputs_and_gradients(op: str, inputs: dict, *extra, backend: str) -> dict[str, Tensor]:
    """The operator's two outputs, and the gradients of a randomly weighted sum of both."""
    inputs = {name: None if x is None else x.clone() for name, x in inputs.items()}
    leaves = [name for name in DIFFERENTIABLE[op] if inputs[name] is not None]
    for name in leaves:
        inputs[name].requires_grad_()
    outputs = called(op, inputs, *extra, backend=backend)
    upstream = [random(*out.shape, seed=20 + i, dtype=out.dtype) for i, out in enumerate(outputs)]
    loss = sum((out * up).sum() for out, up in zip(outputs, upstream, strict=True))
    # without requests the reference's outputs depend on no input: the gradients are zeros
    loss = loss + sum(0 * inputs[name].sum() for name in leaves)
    gradients = torch.autograd.grad(loss, [inputs[name] for name in leaves])
    result = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    result |= {f"gradient of {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return result


def assert_backend_is_true(op: str, inputs: dict, *extra, tolerance: float, backend: str) -> None:
    """Compare the backend in the inputs' dtype with the reference in float64."""
    truth = outputs_and_gradients(op, to_float64(inputs), *extra, backend="reference")
    actual = outputs_and_gradients(op, inputs, *extra, backend=backend)
    assert actual.keys() == truth.keys()
    for name in truth:
        assert_near(actual[name], truth[name], tolerance, name)


native_is_built = pytest.mark.skipif(native.LIBRARY is None, reason=native.STATUS)
# Triton's interpreter takes minutes for all of them: tests/ops/test_triton.py has a selection
triton_is_there = [pytest.mark.skipif(not TRITON, reason="Triton is not installed")]
triton_is_there += [pytest.mark.slow] if INTERPRETED else []
FLOAT32 = [
    pytest.param("torch", torch.float32, 2e-5, id="torch-float32"),
    pytest.param("native", torch.float32, 2e-5, id="native-float32", marks=native_is_built),
    pytest.param("triton", torch.float32, 2e-5, id="triton-float32", marks=triton_is_there),
]


def many(rows: int, backend: str) -> int:
    """``rows``, or a thirtieth of them if Triton's interpreter would take minutes."""
    return rows // 30 if backend == "triton" and INTERPRETED else rows


BACKENDS = pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [pytest.param("torch", torch.float64, 1e-12, id="torch-float64"), *FLOAT32],
)
WEIGHTED = pytest.mark.parametrize(
    "weighted", [True, "by head", False], ids=["weighted", "by head", "unweighted"]
)
EVERY_BACKEND = pytest.mark.parametrize(
    "backend", ["reference", "torch", pytest.param("native", marks=native_is_built)]
)


# --------------------------------------------------------------------- torch against reference


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("shape", SHAPES)
@WEIGHTED
@BACKENDS
def test_encode_is_the_references(feature_map, shape, weighted, backend, dtype, tolerance):
    inputs = encode_inputs(SHAPES[shape][0], dtype, weighted)
    assert_backend_is_true("encode", inputs, feature_map, tolerance=tolerance, backend=backend)


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("shape", SHAPES)
@BACKENDS
def test_attend_is_the_references(feature_map, shape, backend, dtype, tolerance):
    inputs = attend_inputs(SHAPES[shape][1], feature_map, dtype)
    assert_backend_is_true("attend", inputs, feature_map, EPS, tolerance=tolerance, backend=backend)


@pytest.mark.parametrize("shape", SHAPES)
@BACKENDS
def test_attend_softmax_is_the_references(shape, backend, dtype, tolerance):
    inputs = attend_softmax_inputs(SHAPES[shape][1], dtype)
    assert_backend_is_true("attend_softmax", inputs, tolerance=tolerance, backend=backend)


@pytest.mark.parametrize("shape", [s for s in SHAPES if s != "around a chunk and a tile"])
@WEIGHTED
@BACKENDS
def test_match_is_the_references(shape, weighted, backend, dtype, tolerance):
    inputs = match_inputs(*SHAPES[shape], dtype, weighted)
    assert_backend_is_true("match", inputs, tolerance=tolerance, backend=backend)


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize(("backend", "dtype", "tolerance"), FLOAT32)
def test_one_user_with_a_hundred_thousand_events_among_users_with_none(
    feature_map, backend, dtype, tolerance
):
    inputs = encode_inputs([0, many(100_000, backend), 0, 0], dtype)
    assert_backend_is_true("encode", inputs, feature_map, tolerance=tolerance, backend=backend)


@pytest.mark.parametrize(("backend", "dtype", "tolerance"), FLOAT32)
def test_match_of_one_user_with_a_hundred_thousand_events(backend, dtype, tolerance):
    inputs = match_inputs([0, many(100_000, backend), 0, 5], [1, 40, 0, 3], dtype)
    assert_backend_is_true("match", inputs, tolerance=tolerance, backend=backend)


@BACKENDS
def test_many_requests_of_a_few_rows(backend, dtype, tolerance):
    """More rows than a tile or a partition has."""
    requests = many(2000, backend)
    lengths = torch.randint(0, 6, (requests,), generator=torch.Generator().manual_seed(0)).tolist()
    given = dict(tolerance=tolerance, backend=backend)
    assert_backend_is_true("encode", encode_inputs(lengths, dtype), "hedgehog", **given)
    assert_backend_is_true("attend", attend_inputs(lengths, "hedgehog", dtype), "hedgehog", EPS, **given)
    assert_backend_is_true("attend_softmax", attend_softmax_inputs(lengths, dtype), **given)


@BACKENDS
def test_match_of_many_requests_of_a_few_rows(backend, dtype, tolerance):
    requests = many(3000, backend)
    lengths = torch.randint(0, 6, (2, requests), generator=torch.Generator().manual_seed(0)).tolist()
    assert_backend_is_true("match", match_inputs(*lengths, dtype), tolerance=tolerance, backend=backend)


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("weighted", [True, "by head"], ids=["weighted", "by head"])
def test_gradients_of_encode_are_the_finite_differences(feature_map, weighted):
    inputs = encode_inputs([3, 0, 2], weighted=weighted)
    for name in DIFFERENTIABLE["encode"]:
        inputs[name].requires_grad_()
    assert torch.autograd.gradcheck(lambda *x: ops.encode(*x, feature_map, "torch"), (*inputs.values(),))


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_gradients_of_attend_are_the_finite_differences(feature_map):
    inputs = attend_inputs([2, 0, 3], feature_map)
    for name in DIFFERENTIABLE["attend"]:
        inputs[name].requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *x: ops.attend(*x, feature_map, EPS, "torch"), (*inputs.values(),)
    )


def test_gradients_of_attend_softmax_are_the_finite_differences():
    inputs = attend_softmax_inputs([2, 0, 3])
    for name in DIFFERENTIABLE["attend_softmax"]:
        inputs[name].requires_grad_()
    assert torch.autograd.gradcheck(lambda *x: ops.attend_softmax(*x, "torch"), (*inputs.values(),))


@pytest.mark.parametrize("weighted", [True, "by head"], ids=["weighted", "by head"])
def test_gradients_of_match_are_the_finite_differences(weighted):
    inputs = match_inputs([4, 0, 6], [3, 1, 5], weighted=weighted)
    for name in DIFFERENTIABLE["match"]:
        inputs[name].requires_grad_()
    assert torch.autograd.gradcheck(lambda *x: ops.match(*x, "torch"), (*inputs.values(),))


# ---------------------------------------------------------------------- reference against algebra


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_linear_form_is_the_quadratic_form_of_each_request(feature_map):
    history_lengths, candidate_lengths = SHAPES["odd lengths"]
    inputs = encode_inputs(history_lengths)
    asking = attend_inputs(candidate_lengths, feature_map)
    state = ops.encode(*inputs.values(), feature_map, backend="reference")
    out, matched = ops.attend(
        asking["candidates"],
        asking["offsets"],
        asking["query_weight"],
        *state,
        feature_map,
        EPS,
        backend="reference",
    )
    weight = reference.event_weights(
        inputs["weights"], inputs["ages"], inputs["decay"], inputs["history"]
    )
    for b in range(len(history_lengths)):
        e = slice(*inputs["offsets"][b : b + 2].tolist())
        c = slice(*asking["offsets"][b : b + 2].tolist())
        expected_out, expected_matched, attention = reference.quadratic(
            asking["candidates"][c],
            inputs["history"][e],
            asking["query_weight"],
            inputs["key_weight"],
            inputs["value_weight"],
            weight[e],
            feature_map,
            EPS,
        )
        torch.testing.assert_close(out[c], expected_out, rtol=0, atol=1e-12)
        torch.testing.assert_close(matched[c], expected_matched, rtol=0, atol=1e-12)
        total = attention.sum(1)
        torch.testing.assert_close(total, matched[c] / (matched[c] + EPS), rtol=0, atol=1e-12)


def with_gaps(lengths, dtype=torch.float64) -> dict:
    """The first request has no summaries, the second lacks some in head 1."""
    inputs = attend_softmax_inputs(lengths, dtype)
    inputs["log_weight"][0], inputs["log_weight"][1, 1, ::2] = -torch.inf, -torch.inf
    return inputs


@EVERY_BACKEND
def test_attend_softmax_is_softmax_attention_over_the_summaries_that_are_there(backend):
    inputs = with_gaps([2, 5, 3], torch.float32)
    out, log_sum = ops.attend_softmax(*inputs.values(), backend)
    assert not out[:2].any() and (log_sum[:2] == -torch.inf).all()
    query = torch.einsum("mD,hdD->hmd", inputs["candidates"], inputs["query_weight"])
    for request, rows in ((1, slice(2, 7)), (2, slice(7, 10))):
        for h in range(H):
            log_weight = inputs["log_weight"][request, h]
            there = log_weight > -torch.inf
            summaries, mask = inputs["summaries"][request, h, there][None], log_weight[None, there]
            asked = query[h, rows][None]
            expected = torch.nn.functional.scaled_dot_product_attention(
                asked, summaries, summaries, mask.expand(1, asked.shape[1], -1)
            )
            assert_near(out[rows, h], expected[0], 1e-5)
            score = asked[0] @ summaries[0].T / WIDTH**0.5 + mask
            assert_near(log_sum[rows, h], score.logsumexp(1), 1e-5)


@EVERY_BACKEND
def test_summaries_that_are_not_there_have_no_gradient_and_give_none(backend):
    inputs = with_gaps([2, 5, 3], torch.float32)
    leaves = [inputs[name].requires_grad_() for name in DIFFERENTIABLE["attend_softmax"]]
    out, log_sum = ops.attend_softmax(*inputs.values(), backend)
    loss = out.square().sum() + torch.logaddexp(log_sum, torch.zeros_like(log_sum)).sum()
    candidates, _, summaries, log_weight = torch.autograd.grad(loss, leaves)
    assert all(x.isfinite().all() for x in (candidates, summaries, log_weight))
    assert not candidates[:2].any() and candidates[2:].all()
    absent = inputs["log_weight"].isinf()
    assert not summaries[absent].any() and not log_weight[absent].any()
    assert summaries[~absent].any(1).all() and log_weight[~absent].all()


@EVERY_BACKEND
@pytest.mark.parametrize("size", [1e3, 1e5])
def test_attend_softmax_of_large_scores_takes_the_best_summary(backend, size):
    inputs = attend_softmax_inputs([4, 2], torch.float32)
    inputs["query_weight"] *= size
    out, log_sum = ops.attend_softmax(*inputs.values(), backend)
    truth = ops.attend_softmax(*to_float64(inputs).values(), "reference")
    assert_near(out, truth[0], 1e-2)
    assert_near(log_sum, truth[1], 1e-5)


@EVERY_BACKEND
def test_an_event_one_half_life_old_counts_half(backend):
    half_life = 5.0
    inputs = encode_inputs([9, 3], torch.float32)
    inputs["weights"] = None
    inputs["ages"] = torch.full((12,), half_life)
    inputs["decay"] = torch.full((H,), math.log(2) / half_life)
    aged = ops.encode(*inputs.values(), "elu", backend)
    inputs["ages"] = None
    fresh = ops.encode(*inputs.values(), "elu", backend)
    for old, new in zip(aged, fresh, strict=True):
        torch.testing.assert_close(old, new / 2, rtol=1e-5, atol=1e-6)


@EVERY_BACKEND
def test_only_the_head_without_decay_ignores_ages(backend):
    inputs = encode_inputs([9, 3], torch.float32)
    aged = ops.encode(*inputs.values(), "elu", backend)[1]
    fresh = ops.encode(*(inputs | {"ages": None}).values(), "elu", backend)[1]
    same = torch.isclose(aged, fresh).flatten(2).all(2).all(0)
    assert same.tolist() == [rate == 0 for rate in DECAY]


@EVERY_BACKEND
def test_weights_by_head_are_those_of_the_head_alone(backend):
    """Head h with weights [N, H] equals head h with the weights [N] of column h."""
    inputs = encode_inputs([9, 0, 3], torch.float32, "by head")
    together = ops.encode(*inputs.values(), "elu", backend)
    matching = match_inputs([9, 0, 3], [4, 1, 2], torch.float32, "by head")
    matched = ops.match(*matching.values(), backend)
    for h in range(H):
        column = {"weights": inputs["weights"][:, h]}
        for whole, alone in zip(
            together, ops.encode(*(inputs | column).values(), "elu", backend), strict=True
        ):
            torch.testing.assert_close(whole[:, h], alone[:, h])
        column = {"weights": matching["weights"][:, h]}
        for whole, alone in zip(matched, ops.match(*(matching | column).values(), backend), strict=True):
            torch.testing.assert_close(whole[:, h], alone[:, h])


# ----------------------------------------------------------------------------------------- match


@EVERY_BACKEND
def test_match_joins_within_a_request_only(backend):
    tokens = torch.tensor([[1.0], [10.0], [100.0], [1000.0]])
    token_sum, weight_sum = ops.match(
        torch.tensor([7, 7, 8, 9, 7]),  # 7 is twice in the first request's set
        torch.tensor([0, 4, 4, 5]),
        tokens,
        torch.tensor([7, 8, 7, 8]),
        torch.tensor([0, 3, 4, 4]),
        torch.tensor([1.0, 2.0, 3.0, 4.0]),
        None,
        torch.zeros(1),
        backend,
    )
    assert token_sum.flatten().tolist() == [301.0, 301.0, 20.0, 0.0, 0.0]
    assert weight_sum.flatten().tolist() == [4.0, 4.0, 2.0, 0.0, 0.0]


@pytest.mark.parametrize(("candidate_bucket", "history_bucket"), [(5, 9), (9, 5), (-4, 2**40)], ids=str)
@EVERY_BACKEND
def test_match_without_any_match_is_zero_and_has_zero_gradients(
    candidate_bucket, history_bucket, backend
):
    inputs = match_inputs([5, 3], [2, 2], torch.float32)
    inputs["candidate_buckets"].fill_(candidate_bucket)
    inputs["history_buckets"].fill_(history_bucket)
    for name, value in outputs_and_gradients("match", inputs, backend=backend).items():
        assert value.numel() > 0 and not value.any(), name


@BACKENDS
def test_match_among_many_other_buckets(backend, dtype, tolerance):
    events = many(20_000, backend)
    inputs = match_inputs([events, 0, 3000], [5, 1, 9], dtype)
    generator = torch.Generator().manual_seed(14)
    inputs["history_buckets"] = torch.randint(0, 5000, (events + 3000,), generator=generator)
    inputs["candidate_buckets"] = torch.randint(0, 5000, (15,), generator=generator)
    assert_backend_is_true("match", inputs, tolerance=tolerance, backend=backend)


@pytest.mark.parametrize("bucket", [-1, 2**40, 2**62, 2**63 - 1], ids=str)
@EVERY_BACKEND
def test_match_tells_requests_apart_whatever_the_buckets(backend, bucket):
    """Each request has one event in ``bucket`` and one in 5, and candidates in buckets 0 to 9."""
    requests = 6
    asked = [*range(10), bucket]
    _, weight_sum = ops.match(
        torch.tensor(asked * requests),
        offsets_of([len(asked)] * requests),
        torch.zeros(2 * requests, 1),
        torch.tensor([bucket, 5] * requests),
        offsets_of([2] * requests),
        None,
        None,
        torch.zeros(1),
        backend,
    )
    assert weight_sum.view(requests, -1).tolist() == [[0.0] * 5 + [1.0] + [0.0] * 4 + [1.0]] * requests


# ------------------------------------------------------------------------------ dtypes and memory


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_bfloat16_inputs_give_a_float32_state(feature_map):
    # 3000 events: a bfloat16 sum would stop growing after about 256 of them
    inputs = encode_inputs([3000, 0, 7], torch.bfloat16)
    truth = ops.encode(*to_float64(inputs).values(), feature_map, backend="reference")
    state = ops.encode(*inputs.values(), feature_map, backend="torch")
    for actual, expected in zip(state, truth, strict=True):
        assert actual.dtype == torch.float32
        assert_near(actual, expected, 2e-5)

    asking = attend_inputs([5, 1, 0], feature_map, torch.bfloat16, state_dtype=torch.float32)
    truth = ops.attend(*to_float64(asking).values(), feature_map, EPS, backend="reference")
    answers = ops.attend(*asking.values(), feature_map, EPS, backend="torch")
    for actual, expected in zip(answers, truth, strict=True):
        assert actual.dtype == torch.float32
        assert_near(actual, expected, 2e-5)


@pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=native_is_built)])
def test_bfloat16_inputs_give_float32_matches(backend):
    inputs = match_inputs([3000, 0, 7], [5, 1, 4], torch.bfloat16)
    truth = ops.match(*to_float64(inputs).values(), backend="reference")
    for actual, expected in zip(ops.match(*inputs.values(), backend=backend), truth, strict=True):
        assert actual.dtype == torch.float32
        assert_near(actual, expected, 2e-5)


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_bfloat16_inputs_get_bfloat16_gradients(feature_map):
    asking = attend_inputs([40, 3], feature_map, torch.bfloat16, state_dtype=torch.float32)
    for op, inputs, extra in [
        ("encode", encode_inputs([300, 7], torch.bfloat16), (feature_map,)),
        ("attend", asking, (feature_map, EPS)),
    ]:
        truth = outputs_and_gradients(op, to_float64(inputs), *extra, backend="reference")
        actual = outputs_and_gradients(op, inputs, *extra, backend="torch")
        for name in DIFFERENTIABLE[op]:
            assert actual[f"gradient of {name}"].dtype == inputs[name].dtype
            assert_near(actual[f"gradient of {name}"], truth[f"gradient of {name}"], 0.01, name)


def peak_bytes(function, path) -> int:
    """The peak number of bytes that ``function`` allocated, according to the profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    profiler.export_chrome_trace(str(path))
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e["name"] == "[memory]"]
    events.sort(key=lambda e: e["ts"])
    live = peak = 0
    for event in events:
        live += event["args"]["Bytes"]
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_encode_needs_no_memory_that_grows_with_the_history(feature_map, tmp_path):
    def peak_beyond_the_gradient(events: int, backend: str) -> int:
        inputs = encode_inputs([events], torch.float32, weighted=False)
        leaves = [inputs[name].requires_grad_() for name in ("history", "key_weight", "value_weight")]

        def forward_and_backward():
            key_value, key_sum = ops.encode(*inputs.values(), feature_map, backend)
            torch.autograd.grad(key_value.sum() + key_sum.sum(), leaves)

        history_bytes = inputs["history"].nbytes
        peak = peak_bytes(forward_and_backward, tmp_path / "trace.json")
        assert peak >= history_bytes  # the measurement includes the gradient itself
        return peak - history_bytes

    few, many = 10 * TILE, 40 * TILE
    growth = peak_beyond_the_gradient(many, "torch") - peak_beyond_the_gradient(few, "torch")
    assert growth < (many - few)  # less than one byte per event
    # the same measurement for a backend that does keep phi(k) of all events
    growth = peak_beyond_the_gradient(many, "reference") - peak_beyond_the_gradient(few, "reference")
    assert growth > (many - few) * H * WIDTH * 4


# ---------------------------------------------------------------------------- custom operators


def opcheck(op, inputs: dict, *extra) -> None:
    arguments = tuple(
        x.clone().requires_grad_() if x is not None and x.is_floating_point() and grad else x
        for x, grad in ((x, name not in ("ages", "decay")) for name, x in inputs.items())
    )
    torch.library.opcheck(op, (*arguments, *extra))


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_opcheck_attend(feature_map):
    asking = attend_inputs([2, 3, 0], feature_map)
    opcheck(torch.ops.ifa.attend.default, asking, feature_map, EPS, "torch")


def test_opcheck_attend_softmax():
    inputs = attend_softmax_inputs([2, 3, 0])
    opcheck(torch.ops.ifa.attend_softmax.default, inputs, "torch")
    upstream = [torch.randn_like(x) for x in torch.ops.ifa.attend_softmax(*inputs.values(), "torch")]
    torch.library.opcheck(
        torch.ops.ifa.attend_softmax_backward.default, (*upstream, *inputs.values(), "torch")
    )


@WEIGHTED
def test_opcheck_encode(weighted):
    inputs = encode_inputs([5, 0, 3], weighted=weighted)
    opcheck(torch.ops.ifa.encode.default, inputs, "elu", "torch")


@WEIGHTED
def test_opcheck_match(weighted):
    inputs = match_inputs([4, 0, 6], [3, 1, 5], weighted=weighted)
    opcheck(torch.ops.ifa.match.default, inputs, "torch")


@WEIGHTED
def test_opcheck_backward_operators(weighted):
    # these have no gradient of their own, so none of their inputs requires one
    inputs = encode_inputs([5, 0, 3], weighted=weighted)
    upstream = [torch.randn_like(x) for x in torch.ops.ifa.encode(*inputs.values(), "hedgehog", "torch")]
    torch.library.opcheck(
        torch.ops.ifa.encode_backward.default, (*upstream, *inputs.values(), "hedgehog", "torch")
    )
    inputs = match_inputs([4, 0, 6], [3, 1, 5], weighted=weighted)
    *sums, first, candidate = torch.ops.ifa.match(*inputs.values(), "torch")
    events = [inputs[name] for name in ("history", "weights", "ages", "decay")]
    arguments = (*(torch.randn_like(x) for x in sums), first, candidate, *events, "torch")
    torch.library.opcheck(torch.ops.ifa.match_backward.default, arguments)


def test_opcheck_attend_backward():
    inputs = attend_inputs([2, 3, 0], "hedgehog")
    upstream = [
        torch.randn_like(x) for x in torch.ops.ifa.attend(*inputs.values(), "hedgehog", EPS, "torch")
    ]
    torch.library.opcheck(
        torch.ops.ifa.attend_backward.default, (*upstream, *inputs.values(), "hedgehog", EPS, "torch")
    )


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [("torch", torch.float64, 1e-12), pytest.param("native", torch.float32, 0, marks=native_is_built)],
    ids=["torch", "native"],
)
def test_compiles_into_one_graph(feature_map, backend, dtype, tolerance):
    def ifa(history, offsets, key, value, weights, ages, decay, candidates, candidate_offsets, query):
        state = ops.encode(history, offsets, key, value, weights, ages, decay, feature_map, backend)
        return ops.attend(candidates, candidate_offsets, query, *state, feature_map, EPS, backend)

    asking = attend_inputs([2, 3, 1], feature_map, dtype)
    inputs = [*encode_inputs([5, 0, 3], dtype).values()]
    inputs += [asking[name] for name in ("candidates", "offsets", "query_weight")]
    leaves = [inputs[i].requires_grad_() for i in (0, 2, 3, 4, 7, 9)]

    def result(function):
        out, matched = function(*inputs)
        return out, matched, *torch.autograd.grad(out.square().sum() + matched.sum(), leaves)

    torch._dynamo.reset()
    compiled = torch.compile(ifa, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(result(compiled), result(ifa), strict=True):
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
