"""Specific to the native backend: instruction sets, widths, threads, bfloat16, errors, memory."""

from __future__ import annotations

import ctypes
import io
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_near
from kernels import NATIVE, run, wide_inputs
from test_ops import (
    EPS,
    FEATURE_MAPS,
    SHAPES,
    attend_inputs,
    attend_softmax_inputs,
    encode_inputs,
    match_inputs,
    outputs_and_gradients,
    to_float64,
)

from ifa_torchrec import ops
from ifa_torchrec.errors import UserError
from ifa_torchrec.ops import backends
from ifa_torchrec.ops.kernels import native

if native.LIBRARY is None:
    pytest.skip(native.STATUS, allow_module_level=True)


@pytest.fixture(params=NATIVE)
def instruction_set(request, monkeypatch):
    monkeypatch.setattr(native, "STATUS", request.param)
    return request.param


def softmax_inputs(candidates, sizes, summaries: int, dtype=torch.float32) -> dict:
    """Inputs of attend_softmax, with some absent summaries."""
    _, asking = wide_inputs([1] * len(candidates), candidates, sizes, dtype)
    _, heads, width = sizes
    generator = torch.Generator().manual_seed(1)
    shape = (len(candidates), heads, summaries)
    log_weight = torch.randn(shape, generator=generator)
    log_weight[..., 1:] = log_weight[..., 1:].masked_fill(log_weight[..., 1:] > 1, -torch.inf)
    return asking | {
        "summaries": torch.randn(*shape, width, generator=generator),
        "log_weight": log_weight,
    }


weighted_by_event_or_head = pytest.mark.parametrize(
    "weighted", [True, "by head"], ids=["weighted", "by head"]
)
HISTORY, CANDIDATES = [300, 0, 1, 37], [3, 2, 70, 0]


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize(
    "sizes", [(64, 4, 16), (64, 1, 64), (48, 2, 24), (7, 3, 5), (33, 1, 129), (16, 8, 2)], ids=str
)
@weighted_by_event_or_head
def test_every_instruction_set_and_width_gives_the_references_results(
    instruction_set, feature_map, sizes, weighted
):
    inputs, asking = wide_inputs(HISTORY, CANDIDATES, sizes, weighted=weighted)
    truth = run(to_float64(inputs), to_float64(asking), feature_map, "reference")
    for name, value in run(inputs, asking, feature_map, "native").items():
        assert_near(value, truth[name], 2e-5, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("sizes", "summaries"),
    [((64, 4, 16), 32), ((64, 1, 64), 128), ((7, 3, 5), 11), ((33, 1, 129), 1), ((16, 8, 2), 17)],
    ids=str,
)
def test_every_instruction_set_attends_to_summaries(instruction_set, sizes, summaries, dtype):
    inputs = softmax_inputs(CANDIDATES, sizes, summaries, dtype)
    truth = outputs_and_gradients("attend_softmax", to_float64(inputs), backend="reference")
    for name, value in outputs_and_gradients("attend_softmax", inputs, backend="native").items():
        half = value.dtype == torch.bfloat16
        assert_near(value, truth[name], 2e-2 if half else 2e-5, name)


@weighted_by_event_or_head
def test_every_instruction_set_matches(instruction_set, weighted):
    inputs = match_inputs([300, 0, 20_000], [30, 4, 7], torch.float32, weighted)
    truth = outputs_and_gradients("match", to_float64(inputs), backend="reference")
    for name, value in outputs_and_gradients("match", inputs, backend="native").items():
        assert_near(value, truth[name], 2e-5, name)


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("size", [1e-3, 30.0, 1000.0])
def test_small_and_large_projections(instruction_set, feature_map, size):
    inputs, asking = wide_inputs([50], [9], (32, 2, 16))
    inputs["key_weight"] *= size
    asking["query_weight"] *= size
    state = ops.encode(*inputs.values(), feature_map, "native")
    truth = ops.encode(*to_float64(inputs).values(), feature_map, "reference")
    for actual, expected in zip(state, truth, strict=True):
        # the arguments of exp are themselves only exact to float32's relative precision
        assert_near(actual, expected, 2e-5 * max(size / 10, 1))
    assert ops.attend(*asking.values(), *state, feature_map, EPS, "native")[0].isfinite().all()


def test_nan_and_infinity_are_not_hidden(instruction_set):
    for feature_map in FEATURE_MAPS:
        for value in (torch.nan, torch.inf):
            inputs = encode_inputs([5, 3], torch.float32)
            inputs["history"][6, 2] = value
            key_value, _ = ops.encode(*inputs.values(), feature_map, "native")
            assert key_value[0].isfinite().all() and not key_value[1].isfinite().all(), feature_map


def test_an_infinite_age_counts_nothing_where_there_is_decay(instruction_set):
    inputs = encode_inputs([4], torch.float32)
    inputs["ages"] = torch.full((4,), torch.inf)
    _, key_sum = ops.encode(*inputs.values(), "elu", "native")
    assert key_sum[0, 0].all() and not key_sum[0, 1:].any()  # head 0 does not decay


# ------------------------------------------------------------------------------------- bfloat16


@pytest.mark.parametrize("sizes", [(64, 4, 16), (64, 1, 64), (34, 2, 24), (7, 3, 5)], ids=str)
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@weighted_by_event_or_head
def test_bfloat16_tokens(instruction_set, feature_map, sizes, weighted):
    """float32 states and outputs; if the processor multiplies bfloat16, phi is rounded to it."""
    inputs, asking = wide_inputs(HISTORY, CANDIDATES, sizes, torch.bfloat16, weighted)
    truth = run(to_float64(inputs), to_float64(asking), feature_map, "reference")
    paired = instruction_set.endswith("bf16") and sizes[0] % 2 == 0
    for name, value in run(inputs, asking, feature_map, "native").items():
        half = name in ("history", "candidates")
        assert value.dtype == (torch.bfloat16 if half else torch.float32)
        assert_near(value, truth[name], 2e-2 if half or paired else 2e-5, name)


# --------------------------------------------------------------------------- threads, long histories


def results(threads: int) -> list[torch.Tensor]:
    lengths, sets = [50_000, 0, 3, 4000, 1] + [10] * 500, [700, 5, 0, 40, 300] + [1] * 500
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        inputs = wide_inputs(lengths, sets, (32, 2, 16), weighted="by head")
        values = run(*inputs, "hedgehog", "native")
        asked = softmax_inputs(sets, (32, 2, 16), 32)
        attended = outputs_and_gradients("attend_softmax", asked, backend="native")
        matches = ops.match(*match_inputs(lengths, sets, torch.float32).values(), backend="native")
    finally:
        torch.set_num_threads(before)
    return [*values.values(), *attended.values(), *matches]


def test_results_are_the_same_to_the_bit_with_any_number_of_threads_and_at_every_run():
    first = results(1)
    for threads in (1, 2, 4, 4):
        for actual, expected in zip(results(threads), first, strict=True):
            assert torch.equal(actual, expected)


def test_float32_error_of_a_million_events():
    """As kernels/native.py states: 1e-6 of the largest sum."""
    generator = torch.Generator().manual_seed(0)
    history = torch.randn(1_000_000, 16, generator=generator)
    key = torch.randn(1, 16, 16, generator=generator) / 4
    given = (torch.tensor([0, 1_000_000]), key, key, None, None, torch.zeros(1))
    double = [x.double() if x is not None and x.is_floating_point() else x for x in (history, *given)]
    truth = ops.encode(*double, "elu", "torch")
    for actual, expected in zip(ops.encode(history, *given, "elu", "native"), truth, strict=True):
        error = (actual - expected).abs().max() / expected.abs().max()
        assert error < 1e-6


# ------------------------------------------------------------------------------------ the operators


@weighted_by_event_or_head
def test_opcheck(weighted):
    inputs, asking = (
        encode_inputs([5, 0, 3], torch.float32, weighted),
        attend_inputs([2, 3, 0], "elu", torch.float32),
    )
    for op, given, extra, fixed in [
        (torch.ops.ifa.encode, inputs, ("hedgehog", "native"), ("ages", "decay")),
        (torch.ops.ifa.encode, inputs | {"weights": None, "ages": None}, ("elu", "native"), ("decay",)),
        (torch.ops.ifa.attend, asking, ("elu", EPS, "native"), ()),
        (torch.ops.ifa.attend_softmax, attend_softmax_inputs([2, 0, 3], torch.float32), ("native",), ()),
        (
            torch.ops.ifa.match,
            match_inputs([4, 0, 6], [3, 1, 5], torch.float32, weighted),
            ("native",),
            ("ages", "decay"),
        ),
    ]:
        arguments = [
            x.clone().requires_grad_()
            if x is not None and x.is_floating_point() and name not in fixed
            else x
            for name, x in given.items()
        ]
        torch.library.opcheck(op.default, (*arguments, *extra))


@weighted_by_event_or_head
def test_opcheck_of_the_backward_operators(weighted):
    inputs = encode_inputs([5, 0, 3], torch.float32, weighted)
    upstream = ops.encode(*inputs.values(), "elu", "native")
    torch.library.opcheck(
        torch.ops.ifa.encode_backward.default, (*upstream, *inputs.values(), "elu", "native")
    )
    asking = attend_inputs([2, 3, 0], "elu", torch.float32)
    upstream = ops.attend(*asking.values(), "elu", EPS, "native")
    torch.library.opcheck(
        torch.ops.ifa.attend_backward.default, (*upstream, *asking.values(), "elu", EPS, "native")
    )
    asking = attend_softmax_inputs([2, 3, 0], torch.float32)
    upstream = ops.attend_softmax(*asking.values(), "native")
    torch.library.opcheck(
        torch.ops.ifa.attend_softmax_backward.default, (*upstream, *asking.values(), "native")
    )
    inputs = match_inputs([4, 0, 6], [3, 1, 5], torch.float32, weighted)
    upstream = torch.ops.ifa.match(*inputs.values(), "native")
    arguments = (*upstream, *(inputs[name] for name in ("history", "weights", "ages", "decay")))
    torch.library.opcheck(torch.ops.ifa.match_backward.default, (*arguments, "native"))


def test_inputs_of_any_layout():
    inputs, asking = wide_inputs(HISTORY, CANDIDATES, (16, 2, 8))
    expected = run(inputs, asking, "elu", "native")
    inputs["history"] = inputs["history"].T.contiguous().T
    inputs["key_weight"] = inputs["key_weight"].transpose(1, 2).contiguous().transpose(1, 2)
    inputs["offsets"], asking["offsets"] = inputs["offsets"].int(), asking["offsets"].int()
    inputs["weights"] = torch.stack([inputs["weights"]] * 2, dim=1)[:, 0]
    for name, value in run(inputs, asking, "elu", "native").items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("offsets", [[0, 3, 9], [1, 3, 8], [0, 9, 8], [0, 5, 3, 8]], ids=str)
def test_offsets_that_do_not_fit_are_refused(offsets):
    inputs = encode_inputs([5, 3], torch.float32) | {"offsets": torch.tensor(offsets)}
    for given in (inputs["offsets"], torch.nn.Parameter(inputs["offsets"], requires_grad=False)):
        with pytest.raises(ValueError, match="offsets must rise from 0 to 8"):
            ops.encode(*(inputs | {"offsets": given}).values(), "elu", "native")


def test_a_state_whose_entries_an_int_does_not_count_is_refused():
    wide = torch.zeros(3, 20_000, 8)
    inputs = encode_inputs([1], torch.float32) | {"key_weight": wide, "value_weight": wide}
    inputs |= {"history": torch.zeros(1, 8)}
    with pytest.raises(ValueError, match=r"got \[3, 20000, 8\]"):
        ops.encode(*inputs.values(), "hedgehog", "native")


def test_auto_takes_native_where_it_serves_and_torch_elsewhere():
    inputs = encode_inputs([5, 3])
    with pytest.raises(ValueError, match=r'"native" does not support torch\.float64 on cpu'):
        ops.encode(*inputs.values(), "elu", "native")
    assert ops.encode(*inputs.values(), "elu")[0].dtype == torch.float64
    inputs = encode_inputs([500, 3], torch.float32)
    auto, taken = (ops.encode(*inputs.values(), "elu", backend) for backend in ("auto", "native"))
    assert torch.equal(auto[0], taken[0])


def test_without_kernels_torch_serves_and_it_is_said_once(monkeypatch, capsys):
    from ifa_torchrec.commands import backends as command

    monkeypatch.setattr(native, "LIBRARY", None)
    monkeypatch.setattr(native, "STATUS", "not built: a reason")
    backends.warn_once.cache_clear()
    inputs = encode_inputs([5, 3], torch.float32)
    with pytest.warns(UserWarning, match="not built: a reason") as warned:
        for _ in range(2):
            actual = ops.encode(*inputs.values(), "elu")
    assert len(warned) == 1
    torch.testing.assert_close(actual, ops.encode(*inputs.values(), "elu", "torch"))
    command.main()
    assert "not available: not built: a reason" in capsys.readouterr().out


def test_the_command_says_what_there_is(capsys):
    from ifa_torchrec.commands import backends as command

    command.main()
    assert f"available: {native.STATUS}" in capsys.readouterr().out


class All(torch.nn.Module):
    """Every operator, with backend "auto"."""

    def forward(self, history, asking, matching):
        key_value, key_sum = ops.encode(*history, "elu")
        out, _ = ops.attend(*asking, key_value, key_sum, "elu", EPS)
        return key_value, key_sum, out, *ops.match(*matching)


@pytest.mark.parametrize("here", [True, False], ids=["with kernels", "without"])
def test_an_exported_graph_takes_the_kernels_of_where_it_runs(here, monkeypatch):
    inputs = encode_inputs([50, 0, 3], torch.float32)
    asking = attend_inputs([2, 5, 1], "elu", torch.float32)
    asking = tuple(asking[name] for name in ("candidates", "offsets", "query_weight"))
    matching = tuple(match_inputs([50, 0, 3], [2, 5, 1], torch.float32).values())
    given = (tuple(inputs.values()), asking, matching)
    library = native.LIBRARY
    with monkeypatch.context() as patch:
        patch.setattr(native, "LIBRARY", library if here else None)
        saved = io.BytesIO()
        torch.export.save(torch.export.export(All(), given, strict=False), saved)
        saved.seek(0)
    monkeypatch.setattr(native, "LIBRARY", None if here else library)
    found = torch.export.load(saved).module()(*given)
    taken = "torch" if here else "native"
    state = ops.encode(*inputs.values(), "elu", taken)
    out, _ = ops.attend(*asking, *state, "elu", EPS, taken)
    expected = [*state, out, *ops.match(*matching, taken)]
    for actual, wanted in zip(found, expected, strict=True):
        assert torch.equal(actual, wanted)


def test_kernels_built_of_other_sources_are_not_called(monkeypatch):
    monkeypatch.setattr(native, "_VERSION", native._VERSION + 1)
    assert native.built() == (None, "not loaded: built from other sources; install the package again")


@pytest.mark.skipif(NATIVE[-1] != "avx512_bf16", reason="the processor does not multiply bfloat16")
def test_bfloat16_is_not_multiplied_as_such_on_intel(monkeypatch):
    monkeypatch.delenv("IFA_KERNELS", raising=False)
    intel = "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    assert native.load()[1] == ("avx512" if intel else "avx512_bf16")


def test_ifa_kernels_takes_a_set_or_none_and_says_what_cannot_be(monkeypatch):
    for name in NATIVE:
        monkeypatch.setenv("IFA_KERNELS", name)
        library, status = native.load()
        assert library is not None and status == name
    monkeypatch.setenv("IFA_KERNELS", "none")
    assert native.load() == (None, "turned off by IFA_KERNELS=none")
    monkeypatch.setenv("IFA_KERNELS", "sse")
    with pytest.raises(UserError, match=r"must be one of plain, avx2, .* or none, got 'sse'"):
        native.load()
    monkeypatch.setenv("IFA_KERNELS", "avx512")
    monkeypatch.setattr(native, "built", lambda: (native.LIBRARY, "avx2"))
    with pytest.raises(UserError, match="this processor has plain, avx2; use one of these or none"):
        native.load()
    monkeypatch.setattr(native, "built", lambda: (None, "not built: a reason"))
    with pytest.raises(UserError, match="IFA_KERNELS=avx512: the kernels are not built: a reason"):
        native.load()
    monkeypatch.delenv("IFA_KERNELS")
    assert native.load() == (None, "not built: a reason")


# --------------------------------------------------------------------------------------- sanitizers


def under_sanitizers(path: str) -> None:
    """Every kernel of every instruction set with every shape; the process exits at the first error."""
    native.LIBRARY = ctypes.CDLL(path)
    for native.STATUS in NATIVE:
        for (history, candidates), dtype, weighted in itertools.product(
            SHAPES.values(), (torch.float32, torch.bfloat16), (True, "by head")
        ):
            for feature_map, sizes in itertools.product(FEATURE_MAPS, [(32, 2, 16), (7, 3, 5)]):
                run(*wide_inputs(history, candidates, sizes, dtype, weighted), feature_map, "native")
                asked = softmax_inputs(candidates, sizes, 11, dtype)
                outputs_and_gradients("attend_softmax", asked, backend="native")
            inputs = match_inputs(history, candidates, dtype, weighted)
            leaves = [inputs[name].requires_grad_() for name in ("history", "weights")]
            outputs = ops.match(*inputs.values(), backend="native")
            torch.autograd.grad(sum(x.sum() for x in outputs), leaves)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_no_address_or_undefined_behaviour_errors(tmp_path):
    sources = sorted((Path(native.__file__).parent / "csrc").glob("*.cpp"))
    library = tmp_path / "kernels.so"
    flags = "-std=c++17 -O1 -g -fopenmp -fPIC -shared -Wno-psabi -fsanitize=address,undefined"
    subprocess.run(
        ["g++", *flags.split(), "-fno-sanitize-recover=all", *map(str, sources), "-o", str(library)],
        check=True,
    )
    runtime = subprocess.run(
        ["g++", "-print-file-name=libasan.so"], capture_output=True, text=True
    ).stdout
    environment = os.environ | {"LD_PRELOAD": runtime.strip(), "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, test_native as t; t.under_sanitizers(sys.argv[1])",
            str(library),
        ],
        env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
