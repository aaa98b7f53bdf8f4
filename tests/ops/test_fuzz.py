"""Every operator with arbitrary inputs: all backends raise an error, or all give the same result.

``FUZZ_EXAMPLES=1500 python -m pytest tests/ops/test_fuzz.py`` takes about ten minutes.
"""

from __future__ import annotations

import os
from functools import partial

import pytest
import torch
from helpers import offsets_of
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import KERNELS, NATIVE, backend_of
from test_ops import DIFFERENTIABLE, EPS, FEATURE_MAPS, to_float64
from test_ops_boundary import RULING, layouts, results
from torch import Tensor

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "25"))

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint32]
SIZES = st.integers(0, 3) | st.integers(1, 20)


@st.composite
def arguments(draw, op: str) -> tuple[dict, tuple]:
    """The tensors of a valid call, and the arguments after them."""
    requests = draw(st.integers(0, 4))
    rows = st.lists(st.integers(0, 5) | st.sampled_from([70, 300]), min_size=requests, max_size=requests)
    history, candidates = draw(rows), draw(rows)
    n, m, dim, heads, width = sum(history), sum(candidates), *(draw(SIZES) for _ in range(3))
    feature_map = draw(st.sampled_from(FEATURE_MAPS))
    features = width * (2 if feature_map == "hedgehog" else 1)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    random = partial(torch.randn, generator=generator)
    buckets = partial(torch.randint, 0, draw(st.integers(1, 9)), generator=generator)
    if op == "attend":
        inputs = {
            "candidates": random(m, dim),
            "offsets": offsets_of(candidates),
            "query_weight": random(heads, width, dim) / max(dim, 1) ** 0.5,
            "key_value": random(requests, heads, features, width),
            "key_sum": random(requests, heads, features).abs(),
        }
        return inputs, (feature_map, EPS)
    if op == "attend_softmax":
        summaries = draw(SIZES)
        inputs = {
            "candidates": random(m, dim),
            "offsets": offsets_of(candidates),
            "query_weight": random(heads, width, dim) / max(dim, 1) ** 0.5,
            "summaries": random(requests, heads, summaries, width),
            "log_weight": random(requests, heads, summaries),
        }
        return inputs, ()
    events = {
        "weights": draw(st.sampled_from([None, random(n).abs(), random(n, heads).abs()])),
        "ages": random(n).abs() if draw(st.booleans()) else None,
        "decay": torch.arange(heads) / 2.0,
    }
    if op == "match":
        inputs = {
            "candidate_buckets": buckets((m,)),
            "candidate_offsets": offsets_of(candidates),
            "history": random(n, dim),
            "history_buckets": buckets((n,)),
            "history_offsets": offsets_of(history),
        }
        return inputs | events, ()
    inputs = {
        "history": random(n, dim),
        "offsets": offsets_of(history),
        "key_weight": random(heads, width, dim) / max(dim, 1) ** 0.5,
        "value_weight": random(heads, width, dim) / max(dim, 1) ** 0.5,
    }
    return inputs | events, (feature_map,)


@st.composite
def faults(draw, x: Tensor) -> Tensor:
    """The tensor with a change that may not fit the others."""
    kind = draw(st.sampled_from(["size", "rank", "dtype", "device", "values"]))
    if kind == "size":
        dim = draw(st.integers(0, x.ndim - 1))
        few = x.narrow(dim, 0, max(x.shape[dim] - 1, 0))
        return few if draw(st.booleans()) else torch.cat([x, x], dim)
    if kind == "rank":
        return x[None] if draw(st.booleans()) else x.flatten()
    if kind == "dtype":
        return x.to(draw(st.sampled_from([*FLOATS, *INTEGERS, torch.bool, torch.complex64])))
    if kind == "device":
        return x.to("meta")
    if x.is_floating_point() or not x.numel():
        return x
    spoilt = x.to(torch.int64, copy=True)  # uint32 has no addition
    spoilt[draw(st.integers(0, x.numel() - 1))] += draw(st.sampled_from([-1000, -1, 1, 1000, 2**40]))
    return spoilt


@st.composite
def calls(draw, op: str) -> tuple[dict, tuple]:
    """Calls with any dtypes and strides, some with a fault or a NaN."""
    inputs, extra = draw(arguments(op))
    dtype, mixed = draw(st.sampled_from(FLOATS)), draw(st.booleans())
    for name, x in inputs.items():
        if x is None:
            continue
        types = FLOATS if x.is_floating_point() else INTEGERS
        if not x.is_floating_point():
            # more rows than a byte can count
            types = types[: 3 if x.numel() and x.max() > 100 else None]
        plain = dtype if x.is_floating_point() else torch.int64
        x = x.to(draw(st.sampled_from(types)) if mixed else plain)
        inputs[name] = draw(st.sampled_from([x, *layouts(x)]))
    token = inputs["candidates" if op in RULING else "history"]
    if token.numel() and draw(st.integers(0, 4)) == 0:
        token[draw(st.integers(0, len(token) - 1)), 0] = torch.nan
    if draw(st.booleans()):
        name = draw(st.sampled_from([name for name, x in inputs.items() if x is not None]))
        inputs[name] = draw(faults(inputs[name]))
    return inputs, extra


def answer(op: str, inputs: dict, extra: tuple, backend: str) -> list[Tensor] | ValueError:
    try:
        return results(op, inputs, backend, extra)
    except ValueError as error:
        return error


def assert_same(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    actual, expected = actual.double(), expected.double()
    assert torch.equal(actual.isnan(), expected.isnan())
    scale = max(expected.nan_to_num().abs().max().item(), 1.0) if expected.numel() else 1.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale, equal_nan=True)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
@settings(max_examples=EXAMPLES, deadline=None, derandomize="FUZZ_EXAMPLES" not in os.environ)
@given(data=st.data())
def test_backends_agree_or_refuse(op, data):
    inputs, extra = data.draw(calls(op))
    truth = answer(op, to_float64(inputs), extra, "reference")
    default = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    device, threads = data.draw(st.sampled_from([None, "meta"])), data.draw(st.sampled_from([1, 2]))
    rounded = any(x is not None and x.dtype in FLOATS[1:3] for x in inputs.values())
    ruling = inputs[RULING.get(op, "history")].dtype
    before = torch.get_num_threads()
    for kernels in KERNELS:
        with backend_of(kernels) as backend:
            try:
                torch.set_default_dtype(default)
                torch.set_default_device(device)
                torch.set_num_threads(threads)
                found = answer(op, inputs, extra, backend)
            finally:
                torch.set_default_dtype(torch.float32)
                torch.set_default_device(None)
                torch.set_num_threads(before)
        if isinstance(truth, ValueError):
            assert isinstance(found, ValueError), f"{kernels} takes what is refused: {truth}"
            continue
        if isinstance(found, ValueError):
            assert kernels in NATIVE and '"native" does not support' in str(found)
            continue
        assert {x.dtype for x in found[:2]} == {torch.promote_types(ruling, torch.float32)}
        for actual, expected in zip(found, truth, strict=True):
            assert_same(actual, expected, 3e-2 if rounded else 1e-4)
    if not isinstance(truth, ValueError):
        empty = {name: x if x is None else x.to("meta") for name, x in inputs.items()}
        assert [x.shape for x in results(op, empty, "torch", extra)] == [x.shape for x in truth]
