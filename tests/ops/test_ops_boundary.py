"""No backend may silently give wrong numbers, access foreign memory, or hang."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import assert_near
from interpreter import INTERPRETED
from kernels import EVERY_KERNEL, NATIVE, backend_of
from test_ops import (
    DIFFERENTIABLE,
    EPS,
    FEATURE_MAPS,
    H,
    attend_inputs,
    attend_softmax_inputs,
    called,
    encode_inputs,
    match_inputs,
    to_float64,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ifa_torchrec import ops

LENGTHS, SETS = [70, 0, 5, 3], [3, 2, 0, 9]
EXTRA = {"encode": ("hedgehog",), "attend": ("hedgehog", EPS)}
EXTRA |= {"attend_softmax": (), "match": ()}
RULING = {"attend": "key_value", "attend_softmax": "summaries"}
"""The argument that determines the dtype of sums, where it is not the history."""


def inputs_of(op: str, weighted: bool | str = True, feature_map: str = "hedgehog") -> dict:
    """float32 inputs; ``weighted`` as for ``weights_of``."""
    if op == "attend":
        return attend_inputs(SETS, feature_map, torch.float32)
    if op == "attend_softmax":
        return attend_softmax_inputs(SETS, torch.float32)
    if op == "encode":
        return encode_inputs(LENGTHS, torch.float32, weighted)
    return match_inputs(LENGTHS, SETS, torch.float32, weighted)


def results(op: str, inputs: dict, backend: str, extra: tuple | None = None) -> list[Tensor]:
    """The outputs, and the gradients of a weighted sum of them."""
    leaves = [name for name in DIFFERENTIABLE[op] if inputs[name] is not None]
    inputs = {
        name: x.detach().requires_grad_() if name in leaves and x.is_floating_point() else x
        for name, x in inputs.items()
    }
    outputs = called(op, inputs, *(EXTRA[op] if extra is None else extra), backend=backend)
    leaves = [x for x in inputs.values() if x is not None and x.requires_grad]
    # outputs without rows may depend on no input: the gradients are zeros
    loss = sum(0 * x.sum() for x in leaves)
    for x in outputs:
        upstream = torch.arange(x.numel(), dtype=x.dtype, device=x.device).cos().view(x.shape)
        loss = loss + (x * upstream).sum()
    gradients = torch.autograd.grad(loss, leaves)
    return [*(out.detach() for out in outputs), *gradients]


@pytest.fixture(params=EVERY_KERNEL)
def backend(request):
    with backend_of(request.param) as name:
        yield name


every_op = pytest.mark.parametrize("op", DIFFERENTIABLE)
every_op_and_weighting = pytest.mark.parametrize(
    ("op", "weighted"),
    [*((op, True) for op in DIFFERENTIABLE), ("encode", "by head"), ("match", "by head")],
)


# ------------------------------------------------------------------------------------- refusals


def resized(x: Tensor, dim: int) -> Tensor:
    """The tensor with one entry less along ``dim``."""
    return x.narrow(dim, 0, x.shape[dim] - 1)


# an error for offsets names their values if these are wrong, else B
SIZES = [
    *[("encode", name, 0) for name in ("offsets", "key_weight", "weights", "ages", "decay")],
    *[("encode", "history", 1), ("encode", "value_weight", 0), ("encode", "value_weight", 1)],
    *[("encode", "key_weight", 2), ("encode", "history", 0)],
    *[("attend", name, 0) for name in ("offsets", "query_weight", "key_value", "key_sum")],
    *[("attend", "key_value", 2), ("attend", "key_value", 3), ("attend", "key_sum", 2)],
    *[("attend", "candidates", 1), ("attend", "candidates", 0), ("attend", "query_weight", 1)],
    *[("attend_softmax", name, 0) for name in ("offsets", "query_weight", "summaries", "log_weight")],
    *[("attend_softmax", "summaries", 2), ("attend_softmax", "summaries", 3)],
    *[("attend_softmax", "candidates", 1), ("attend_softmax", "candidates", 0)],
    *[("match", name, 0) for name in ("candidate_buckets", "candidate_offsets", "history_buckets")],
    *[("match", name, 0) for name in ("history", "history_offsets", "weights", "ages")],
]


@pytest.mark.parametrize(("op", "name", "dim"), SIZES)
def test_sizes_that_do_not_agree_are_refused(op, name, dim):
    inputs = inputs_of(op)
    inputs[name] = resized(inputs[name], dim)
    for backend in ops.BACKENDS:
        with pytest.raises(ValueError, match=r"must (be|rise)"):
            getattr(ops, op)(*inputs.values(), *EXTRA[op], backend)


@pytest.mark.parametrize("shape", [(78, 1), (78, 2), (77, 3), (3, 78), (78, 3, 1), (77,), ()], ids=str)
@pytest.mark.parametrize(("op", "letter"), [("encode", "H"), ("match", "L")])
def test_weights_of_another_shape_are_refused_with_both_that_will_do(op, letter, shape):
    """For 78 events and 3 heads."""
    inputs = inputs_of(op) | {"weights": torch.ones(shape)}
    named = "decay" if op == "match" and shape in ((78, 1), (78, 2)) else "weights"
    wanted = rf"\[{letter}\] with" if named == "decay" else rf"\[N\] or \[N, {letter}\]"
    for backend in ops.BACKENDS:
        with pytest.raises(ValueError, match=f"^{named} must be {wanted}"):
            getattr(ops, op)(*inputs.values(), *EXTRA[op], backend)


@every_op_and_weighting
def test_every_argument_of_another_rank_dtype_device_or_kind_is_refused_by_its_name(op, weighted):
    for name, x in inputs_of(op, weighted).items():
        integer = not x.is_floating_point()
        for wrong in (
            *(x[None], x.flatten()[:1].squeeze(), x.to("meta")),
            *(x.bool(), x.to(torch.complex64), x.float() if integer else x.long()),
            *(x.to(torch.float8_e4m3fn), x.to_sparse()),
        ):
            inputs = inputs_of(op, weighted) | {name: wrong}
            first = next(iter(inputs)) == name
            named = next(iter([*inputs][1:])) if first and wrong.is_meta else name
            for backend in ops.BACKENDS:
                with pytest.raises(ValueError, match=f"^{named} must be "):
                    getattr(ops, op)(*inputs.values(), *EXTRA[op], backend)
        for wrong in ([1.0], None) if name not in ("weights", "ages") else ([1.0],):
            with pytest.raises(TypeError, match=f"^{name} must be a tensor, got"):
                getattr(ops, op)(*(inputs_of(op, weighted) | {name: wrong}).values(), *EXTRA[op])


@pytest.mark.parametrize(
    "offsets", [[], [0], [1, 70, 75, 75, 78], [0, 70, 75, 75, 77], [0, 70, 60, 75, 78]]
)
def test_offsets_that_do_not_rise_from_0_to_the_rows_are_refused(offsets):
    offsets = torch.tensor(offsets, dtype=torch.int64)
    for op, name in (("encode", "offsets"), ("match", "history_offsets")):
        inputs = inputs_of(op) | {name: offsets}
        for backend in ops.BACKENDS:
            with pytest.raises(ValueError, match=f"^{name} must (rise from 0 to 78|be)"):
                getattr(ops, op)(*inputs.values(), *EXTRA[op], backend)


@pytest.mark.parametrize("eps", [0.0, -1.0, 1e-45, torch.inf, torch.nan])
def test_an_eps_that_float32_cannot_divide_by_is_refused(eps):
    with pytest.raises(ValueError, match="eps must be"):
        ops.attend(*inputs_of("attend").values(), "hedgehog", eps)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"feature_map must be one of \['elu', .*, got 'gelu'"):
        ops.encode(*inputs_of("encode").values(), "gelu")
    with pytest.raises(ValueError, match=r"backend must be one of \['auto', .*, got 'cuda'"):
        ops.encode(*inputs_of("encode").values(), "elu", "cuda")


@pytest.mark.skipif(not NATIVE, reason="no kernels")
@pytest.mark.parametrize("weighted", [True, "by head"], ids=["weighted", "by head"])
def test_the_native_operators_themselves_read_no_foreign_memory(weighted):
    """Called without ops.encode and the other functions, as in an exported graph."""
    ifa = torch.ops.ifa
    calls = []
    for op, operator, backward in (
        ("encode", ifa.encode, ifa.encode_backward),
        ("attend", ifa.attend, ifa.attend_backward),
        ("attend_softmax", ifa.attend_softmax, ifa.attend_softmax_backward),
    ):
        inputs, extra = inputs_of(op, weighted), (*EXTRA[op], "native")
        upstream = dict(enumerate(operator(*inputs.values(), *extra)))
        calls += [(operator, inputs, extra), (backward, upstream | inputs, extra)]
    inputs = inputs_of("match", weighted)
    calls.append((ifa.match, inputs, ("native",)))
    upstream = dict(enumerate(ifa.match(*inputs.values(), "native")))
    rest = {name: inputs[name] for name in ("history", "weights", "ages", "decay")}
    calls.append((ifa.match_backward, upstream | rest, ("native",)))
    for operator, inputs, extra in calls:
        operator(*inputs.values(), *extra)
        for name, x in inputs.items():
            wrong = [resized(x, dim) for dim in range(x.ndim)]
            if name == "weights":
                wrong += [x[:, None, None], x.flatten()[0]]
            if name in ("history", "candidates"):
                wrong += [x.double(), x.half()]
            if x.dtype == torch.int64:  # the join and offsets; buckets may be any number
                wrong += [] if str(name).endswith("buckets") else [x + 1000, x - 1000]
            if operator == ifa.match and name in ("history", "decay"):
                del wrong[x.ndim - 1]  # only this argument defines D or L
            for spoilt in wrong:
                with pytest.raises(ValueError, match=r"must|does not support"):
                    operator(*(inputs | {name: spoilt}).values(), *extra)


# -------------------------------------------------------- dtypes, layouts, defaults, autocast, meta


@every_op
def test_integers_of_any_width(op, backend):
    inputs = inputs_of(op)
    expected = results(op, inputs, backend)
    integers = [name for name, x in inputs.items() if not x.is_floating_point()]
    for dtype in ["int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64"]:
        narrow = inputs | {name: inputs[name].to(getattr(torch, dtype)) for name in integers}
        for actual, wanted in zip(results(op, narrow, backend), expected, strict=True):
            assert torch.equal(actual, wanted), dtype


@every_op
def test_no_default_changes_a_result(op, backend):
    inputs = inputs_of(op)
    expected = results(op, inputs, backend)
    for default in (torch.float64, torch.bfloat16, "meta"):
        try:
            if default == "meta":
                torch.set_default_device("meta")
            else:
                torch.set_default_dtype(default)
            actual = results(op, inputs, backend)
        finally:
            torch.set_default_device(None)
            torch.set_default_dtype(torch.float32)
        for one, other in zip(actual, expected, strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, other), default


@every_op_and_weighting
def test_autocast_changes_the_tokens_and_no_sum(op, weighted, backend):
    inputs = inputs_of(op, weighted)
    tokens = "candidates" if op.startswith("attend") else "history"
    expected = results(op, inputs | {tokens: inputs[tokens].bfloat16()}, backend)
    with torch.autocast("cpu", torch.bfloat16):
        actual = results(op, inputs, backend)
        double = called(op, inputs | {tokens: inputs[tokens].double()}, *EXTRA[op], backend="torch")
    assert double[0].dtype == (torch.float32 if op.startswith("attend") else torch.float64)
    for i, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert one.dtype == torch.float32
        other = other.float()
        # autocast affects the products in PyTorch's own backward
        own = i > 1 and backend == "reference"
        assert_near(one, other, 2e-2 if own else 0)


def layouts(x: Tensor) -> list[Tensor]:
    """The same values with other strides."""
    wide = torch.stack([x, x], dim=-1)
    result = [wide[..., 0]]
    if x.ndim > 1:
        result.append(x.transpose(0, -1).contiguous().transpose(0, -1))
    return result


@every_op_and_weighting
def test_inputs_of_any_layout(op, weighted, backend):
    inputs = inputs_of(op, weighted)
    expected = results(op, inputs, backend)
    for name, x in inputs.items():
        for laid in layouts(x):
            for actual, wanted in zip(
                results(op, inputs | {name: laid}, backend), expected, strict=True
            ):
                assert_near(actual, wanted, 2e-6, name)


@every_op_and_weighting
def test_expanded_inputs_and_gradients(op, weighted, backend):
    """With stride 0, like a sum's gradient; also if only one output is used."""
    inputs, extra = inputs_of(op, weighted, feature_map="elu"), EXTRA[op] and ("elu", *EXTRA[op][1:])
    token, *_ = (name for name in ("history", "candidates") if name in inputs)
    inputs[token] = inputs[token][:1].expand_as(inputs[token])
    if "weights" in inputs:
        inputs["weights"] = torch.ones(1).expand_as(inputs["weights"])
    for which in (slice(0, 1), slice(1, 2), slice(0, 2)):
        found = []
        for name, given in ((backend, inputs), ("reference", to_float64(inputs))):
            leaves = {leaf: given[leaf].detach().requires_grad_() for leaf in DIFFERENTIABLE[op]}
            outputs = called(op, given | leaves, *extra, backend=name)[which]
            loss = sum(x.sum() for x in outputs)
            found.append(torch.autograd.grad(loss, [*leaves.values()], materialize_grads=True))
        for actual, wanted in zip(*found, strict=True):
            assert_near(actual, wanted, 2e-5)


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@every_op_and_weighting
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_dtypes(op, weighted, dtype, backend):
    """Sums have the dtype of one argument, but at least float32; gradients that of their input."""
    ruling = RULING.get(op, "history")
    tokens = "candidates" if op in RULING else "history"
    for name in [name for name, x in inputs_of(op, weighted).items() if x.is_floating_point()]:
        inputs = inputs_of(op, weighted)
        inputs[name] = inputs[name].to(dtype)
        wide = name in (tokens, ruling) and dtype == torch.float64
        half = name == tokens and dtype == torch.float16
        if (backend == "native" and (wide or half)) or (backend == "triton" and wide):
            with pytest.raises(ValueError, match=f'"{backend}" does not support'):
                results(op, inputs, backend)
            continue
        actual = results(op, inputs, backend)
        assert {x.dtype for x in actual[:2]} == {
            torch.promote_types(inputs[ruling].dtype, torch.float32)
        }
        leaves = [x for leaf, x in inputs.items() if leaf in DIFFERENTIABLE[op]]
        assert [x.dtype for x in actual[2:]] == [x.dtype for x in leaves]
        truth = results(op, to_float64(inputs), "reference")
        rounded = dtype in (torch.bfloat16, torch.float16)
        for one, other in zip(actual, truth, strict=True):
            assert_near(one, other, 2e-2 if rounded else 2e-5, name)


@every_op_and_weighting
def test_meta_tensors_have_the_results_shapes(op, weighted):
    inputs = {name: x.to("meta") for name, x in inputs_of(op, weighted).items()}
    expected = results(op, inputs_of(op, weighted), "reference")
    for backend in ("torch", "auto"):
        actual = results(op, inputs, backend)
        assert all(x.is_meta for x in actual)
        assert [(x.shape, x.dtype) for x in actual] == [(x.shape, x.dtype) for x in expected]
    for backend in ("reference", "native", "triton"):
        with pytest.raises(ValueError, match=f'backend "{backend}" '):
            results(op, inputs, backend)


@every_op_and_weighting
def test_no_gradient_flows_to_ages_and_decay(op, weighted, backend):
    if op in RULING:
        return
    inputs = inputs_of(op, weighted)
    leaves = [inputs[name].requires_grad_() for name in ("ages", "decay")]
    outputs = called(op, inputs, *EXTRA[op], backend=backend)
    assert not any(x.requires_grad for x in outputs)
    assert [x.grad for x in leaves] == [None, None]


# ------------------------------------------------------------------------------ NaN and infinity


def assert_equal_where(rows: Tensor, actual: Tensor, expected: Tensor) -> None:
    # not bitwise: the kernels compute hedgehog's softmax differently if a tile has large values
    assert_near(actual[rows], expected[rows], 1e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_a_spoilt_event_spoils_its_own_request_alone(value, feature_map, backend):
    inputs = encode_inputs(LENGTHS, torch.float32)
    clean = results("encode", inputs, backend, (feature_map,))
    for row, request in ((0, 0), (69, 0), (72, 2), (77, 3)):
        spoilt = inputs | {"history": inputs["history"].clone()}
        spoilt["history"][row, 1] = value
        found = results("encode", spoilt, backend, (feature_map,))
        truth = results("encode", to_float64(spoilt), "reference", (feature_map,))
        for i in (0, 1):  # S, z
            assert_equal_where(torch.arange(4) != request, found[i], clean[i])
            assert torch.equal(found[i].isfinite(), truth[i].isfinite())
            assert not found[i][request].isfinite().all()
        of_row = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))
        for i in (2, 5):  # gradients of the history and of the weights
            assert_equal_where(of_row != request, found[i], clean[i])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_a_spoilt_candidate_spoils_its_own_answer_alone(value, feature_map, backend):
    inputs, extra = attend_inputs(SETS, feature_map, torch.float32), (feature_map, EPS)
    clean = results("attend", inputs, backend, extra)
    for row in (0, 4, 13):
        spoilt = inputs | {"candidates": inputs["candidates"].clone()}
        spoilt["candidates"][row, 1] = value
        found = results("attend", spoilt, backend, extra)
        truth = results("attend", to_float64(spoilt), "reference", extra)
        for i in (0, 1, 2):  # out, matched, gradient of the candidates
            assert_equal_where(torch.arange(14) != row, found[i], clean[i])
        for i in (0, 1):
            assert torch.equal(found[i][row].isfinite(), truth[i][row].isfinite())
        if value != value:
            assert all(x[row].isnan().all() for x in found[:3])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_a_spoilt_candidate_spoils_its_own_softmax_alone(value, backend):
    inputs = inputs_of("attend_softmax")
    clean = results("attend_softmax", inputs, backend)
    for row in (0, 4, 13):
        spoilt = inputs | {"candidates": inputs["candidates"].clone()}
        spoilt["candidates"][row, 1] = value
        found = results("attend_softmax", spoilt, backend)
        for i in (0, 1, 2):  # out, log_sum, gradient of the candidates
            assert_equal_where(torch.arange(14) != row, found[i], clean[i])
        assert found[0][row].isnan().all() and not found[1][row].isfinite().any()


def test_a_spoilt_summary_spoils_its_own_requests_answers_alone(backend):
    inputs = inputs_of("attend_softmax")
    clean = results("attend_softmax", inputs, backend)
    inputs["summaries"][1, :, 2], inputs["log_weight"][3] = torch.nan, torch.nan
    found = results("attend_softmax", inputs, backend)
    others = torch.repeat_interleave(torch.tensor([True, False, True, False]), torch.tensor(SETS))
    for i in (0, 1, 2):
        assert_equal_where(others, found[i], clean[i])
    assert found[0][~others].isnan().all() and found[1][~others].isnan().all()


def test_a_spoilt_state_spoils_its_own_requests_answers_alone(backend):
    inputs = inputs_of("attend")
    clean = results("attend", inputs, backend)
    inputs["key_value"][1], inputs["key_sum"][1] = torch.nan, torch.nan
    found = results("attend", inputs, backend)
    others = torch.repeat_interleave(torch.arange(4), torch.tensor(SETS)) != 1
    for i in (0, 1, 2):
        assert_equal_where(others, found[i], clean[i])
    assert found[0][~others].isnan().all() and found[1][~others].isnan().all()


def test_a_spoilt_event_spoils_the_candidates_that_match_it_alone(backend):
    inputs = inputs_of("match")
    clean = results("match", inputs, backend)
    for value in (torch.nan, torch.inf):
        spoilt = inputs | {"history": inputs["history"].clone()}
        spoilt["history"][0] = value
        found, truth = (
            results("match", spoilt, backend),
            results("match", to_float64(spoilt), "reference"),
        )
        matching = inputs["candidate_buckets"] == inputs["history_buckets"][0]
        matching[SETS[0] :] = False
        assert 0 < matching.sum() < SETS[0]
        assert_equal_where(~matching, found[0], clean[0])
        assert torch.equal(found[0].isfinite(), truth[0].isfinite())
        assert torch.equal(found[1], clean[1])  # sums of weights do not depend on tokens
        assert_equal_where(torch.arange(78) > 0, found[2], clean[2])


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_a_spoilt_weight_spoils_its_own_head_of_its_own_request_alone(value, backend):
    inputs = encode_inputs(LENGTHS, torch.float32, "by head")
    clean = results("encode", inputs, backend)
    inputs["weights"][72, 1] = value
    found = results("encode", inputs, backend)
    of_row = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))
    for i in (0, 1):  # S, z
        spoilt = torch.zeros(4, H, dtype=torch.bool)
        spoilt[2, 1] = True
        assert_equal_where(~spoilt, found[i], clean[i])
        assert not found[i][spoilt].isfinite().any()
    for i in (2, 5):  # gradients of the history and of the weights
        assert_equal_where(of_row != 2, found[i], clean[i])
    inputs = match_inputs(LENGTHS, SETS, torch.float32, "by head")
    clean = results("match", inputs, backend)
    inputs["weights"][0, 1] = value
    found = results("match", inputs, backend)
    matching = inputs["candidate_buckets"] == inputs["history_buckets"][0]
    matching[SETS[0] :] = False
    spoilt = torch.zeros(14, H, dtype=torch.bool)
    spoilt[matching, 1] = True
    assert spoilt.any()
    for i in (0, 1):
        assert_equal_where(~spoilt, found[i], clean[i])
        assert not found[i][spoilt].isfinite().any()


def test_a_nan_does_not_hide_large_values_of_other_requests(backend):
    """Hedgehog's kernels subtract the maximum if |x| is large anywhere in a tile."""
    inputs = encode_inputs([1, 1, 1], torch.float32)
    inputs["history"][0] *= 1000
    expected = ops.encode(*to_float64(inputs).values(), "hedgehog", "reference")
    inputs["history"][1] = torch.nan
    found = called("encode", inputs, "hedgehog", backend=backend)
    for actual, wanted in zip(found, expected, strict=True):
        assert_near(actual[[0, 2]], wanted[[0, 2]], 2e-4)


# --------------------------------------------------------------------------- tracing and exporting


class Encode(torch.nn.Module):
    def __init__(self, backend: str):
        super().__init__()
        self.backend = backend

    def forward(self, *given):
        return ops.encode(*given, "elu", self.backend)


@pytest.mark.parametrize(
    "backend", ["torch", pytest.param("native", marks=pytest.mark.skipif(not NATIVE, reason=""))]
)
def test_tracing_looks_at_no_value_and_what_was_traced_does(backend):
    inputs, others = encode_inputs([5, 3], torch.float32), encode_inputs([9, 2], torch.float32)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in inputs.values()]
        assert ops.encode(*fakes, "elu", backend)[0].shape == (2, H, 4, 4)
    rows = {0: torch.export.Dim("N")}
    given = tuple(inputs.values())
    dynamic = ((rows, None, None, None, rows, rows, None),)
    program = torch.export.export(Encode(backend), given, dynamic_shapes=dynamic, strict=False)
    for function in (program.module(), torch.compile(Encode(backend), backend="eager", dynamic=True)):
        for actual, expected in zip(
            function(*others.values()), ops.encode(*others.values(), "elu", backend), strict=True
        ):
            assert torch.equal(actual, expected)
        with pytest.raises(ValueError, match="offsets must rise from 0 to 11"):
            function(*(others | {"offsets": torch.tensor([0, 5, 99])}).values())


@every_op_and_weighting
def test_gradients_have_the_strides_that_a_trace_expects(op, weighted):
    inputs = inputs_of(op, weighted)
    for name in DIFFERENTIABLE[op]:
        if inputs[name].ndim > 1:
            inputs[name] = inputs[name].transpose(0, -1).contiguous().transpose(0, -1).requires_grad_()
    for backend in ("torch", *["native"][: len(NATIVE)]):
        operator = getattr(torch.ops.ifa, op)
        torch.library.opcheck(operator.default, (*inputs.values(), *EXTRA[op], backend))


# --------------------------------------------------------------------------------- fork and threads


def several(backend: str) -> list[Tensor]:
    """Results for enough rows to use several threads."""
    return [
        *results("encode", encode_inputs([3000, 5], torch.float32), backend),
        *results("attend", attend_inputs([900, 5], "hedgehog", torch.float32), backend),
        *results("attend_softmax", attend_softmax_inputs([900, 5], torch.float32), backend),
        *results("match", match_inputs([3000, 5], [20, 5], torch.float32), backend),
    ]


class Several(torch.utils.data.Dataset):
    def __init__(self, backend: str):
        self.backend = backend

    def __len__(self) -> int:
        return 1

    def __getitem__(self, _: int) -> list[Tensor]:
        return several(self.backend)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def put_several(queue, backend: str) -> None:
    queue.put([x.numpy() for x in several(backend)])


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
@pytest.mark.parametrize("backend", ["reference", "torch", *["native"][: len(NATIVE)]])
def test_a_forked_process_does_not_wait_for_threads_that_the_fork_lost(backend, two_threads):
    expected = several(backend)  # OpenMP's threads exist now
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=put_several, args=(queue, backend))
    process.start()
    try:
        found = queue.get(timeout=120)
    finally:
        process.kill()
    for actual, wanted in zip(found, expected, strict=True):
        assert_near(torch.from_numpy(actual), wanted, 1e-5)
    workers = {"num_workers": 1, "multiprocessing_context": "fork", "timeout": 120}
    batch = next(iter(torch.utils.data.DataLoader(Several(backend), **workers)))
    for (actual, *_), wanted in zip(batch, expected, strict=True):
        assert_near(actual, wanted, 1e-5)


def test_several_python_threads_at_once(backend, two_threads):
    if backend == "triton" and INTERPRETED:
        pytest.skip("the interpreter has one program at a time")
    expected = several(backend)
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(several, backend) for _ in range(8)]
        for call in calls:
            for actual, wanted in zip(call.result(timeout=120), expected, strict=True):
                assert_near(actual, wanted, 1e-5)
