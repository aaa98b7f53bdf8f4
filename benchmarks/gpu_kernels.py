"""Compiles the Triton kernels ahead of time, for GPUs that are not present.

    python benchmarks/gpu_kernels.py 0,1 80,90   one line of JSON per kernel, for two cases
    python benchmarks/gpu_kernels.py estimate    for the first case on an H200: the kernels' resources,
                                                 and a lower bound of their time

``launches`` calls the backend as training would, without running anything, and records the launches;
``compiled`` compiles one to a cubin. tests/ops/test_triton.py checks the results.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ifa_torchrec.ops.arguments import (
    AttendArguments,
    AttendSoftmaxArguments,
    EncodeArguments,
    JoinedArguments,
    MatchArguments,
)
from ifa_torchrec.ops.kernels import triton as kernels

CAPABILITIES = (80, 90, 100)
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Maximum bytes of shared memory per program, by compute capability."""
_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}


class Launch(NamedTuple):
    """The arguments of a call of ``common.launch``."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    warps: int
    stages: int

    @property
    def name(self) -> str:
        return self.kernel.__name__.strip("_")


class Case(NamedTuple):
    """A model's D, H and d, its feature map, the kind of its event weights, and its tokens' dtype."""

    dim: int
    heads: int
    width: int
    feature_map: str
    weighted: int
    dtype: torch.dtype


def launches(case: Case, capability: int, events: int = 5000, candidates: int = 500) -> list[Launch]:
    """All launches of the operators' forward and backward passes on a GPU."""
    noted: list[Launch] = []

    def note(kernel, grid, arguments, constants, warps=4, stages=1):
        noted.append(Launch(kernel, grid, arguments, constants, warps, stages))

    names = ("common", "encode", "attend", "attend_softmax", "match", "wide")
    modules = [sys.modules[f"{kernels.__name__}.{name}"] for name in names]
    with ExitStack() as patches:
        for module in modules:
            patches.enter_context(mock.patch.object(module, "launch", note))
        in_registers = mock.Mock(return_value=capability < 90)
        for module in modules:
            if hasattr(module, "multiplies_in_registers"):
                patches.enter_context(mock.patch.object(module, "multiplies_in_registers", in_registers))
        _call(case, events, candidates)
    return noted


def _call(case: Case, events: int, candidates: int) -> None:
    dim, heads, width, feature_map, weighted, dtype = case
    features = width * (2 if feature_map == "hedgehog" else 1)
    weight, rates = torch.zeros(heads, width, dim), torch.zeros(heads)
    history, asking = torch.zeros(events, dim, dtype=dtype), torch.zeros(candidates, dim, dtype=dtype)
    ends, ends_of_candidates = torch.tensor([0, events]), torch.tensor([0, candidates])
    weights = [None, torch.ones(events), torch.ones(events, heads)][weighted]
    of_events = (weights, None if weights is None else torch.ones(events), rates)
    given = EncodeArguments(history, ends, weight, weight, *of_events, feature_map)
    state = torch.zeros(1, heads, features, width), torch.zeros(1, heads, features)
    kernels.encode(given)
    kernels.encode_backward(*state, given)
    asked = AttendArguments(asking, ends_of_candidates, weight, *state, feature_map, 1e-6)
    kernels.attend(asked)
    answers = torch.zeros(candidates, heads, width), torch.zeros(candidates, heads)
    kernels.attend_backward(*answers, asked)
    asked = AttendSoftmaxArguments(asking, ends_of_candidates, weight, *state)
    kernels.attend_softmax(asked)
    kernels.attend_softmax_backward(*answers, asked)
    buckets, numbers = torch.zeros(events, dtype=torch.int64), torch.arange(candidates)
    matching = MatchArguments(numbers, ends_of_candidates, history, buckets, ends, *of_events)
    kernels.match(matching)
    sums = torch.zeros(candidates, heads, dim), torch.zeros(candidates, heads)
    kernels.match_backward(*sums, JoinedArguments(numbers, buckets, history, *of_events))


def compiled(launch: Launch, capability: int) -> Any:
    """The kernel, compiled for GPUs of this compute capability (90 is 9.0)."""
    signature, attributes, constants = {}, {}, dict(launch.constants)
    for i, name in enumerate(launch.kernel.arg_names):
        if name in launch.constants:
            signature[name] = "constexpr"
            continue
        value = launch.arguments[name]
        if isinstance(value, Tensor):
            signature[name] = _TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif value == 1:  # the number 1 is compiled in, as when a kernel is run
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
    source = ASTSource(launch.kernel, signature, constants, attributes)
    target = GPUTarget("cuda", capability, 32)
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}
    return triton.compile(source, target=target, options=options)


CASES = [
    Case(64, 4, 16, "elu", 1, torch.bfloat16),
    Case(64, 4, 16, "hedgehog", 2, torch.float32),
    Case(64, 4, 16, "elu", 2, torch.float16),
    Case(48, 3, 12, "relu", 0, torch.bfloat16),
    Case(128, 8, 16, "elu", 2, torch.float32),
    Case(256, 4, 64, "hedgehog", 1, torch.bfloat16),
    Case(256, 8, 32, "elu", 1, torch.bfloat16),
    Case(256, 1, 256, "elu", 1, torch.bfloat16),
    Case(128, 2, 128, "hedgehog", 2, torch.float32),
]
"""The first is the benchmarks' case. Together they cover every feature map, weighting and dtype; the
last two have heads above 64."""


def resources(kernel: Any) -> tuple[int, int]:
    """A thread's bytes outside its registers (0 without spills), and its number of registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = dict(re.findall(r"(\w+):(\d+)", output))
    return int(used["STACK"]) + int(used["LOCAL"]), int(used["REG"])


def report(launch: Launch, capability: int) -> dict[str, Any]:
    """The resources of a kernel's program, and its number of tensor-core instructions."""
    kernel = compiled(launch, capability)
    ptx, (local, registers) = kernel.asm["ptx"], resources(kernel)
    return {
        "kernel": launch.name,
        "capability": f"{capability // 10}.{capability % 10}",
        "warps": launch.warps,
        "tensor_cores": sum(ptx.count(x) for x in ("mma.sync", "wgmma.mma", "tcgen05.mma")),
        "shared": kernel.metadata.shared,
        "registers": registers,
        "local": local,
    }


def different(case: Case, capability: int) -> list[Launch]:
    """The launches of a case, one per compiled kernel."""
    kernels: dict[str, Launch] = {}
    for launch in launches(case, capability):
        kernels.setdefault(f"{launch.name} {launch.constants}", launch)
    return list(kernels.values())


# ------------------------------------------------------------------------------------ the estimate

# From an H200's data sheet: bytes and bfloat16 operations per second; a multiprocessor's resources.
_BYTES, _OPERATIONS = 4.8e12, 989e12
_REGISTERS, _SHARED = 65536, 228 * 1024


def programs_at_once(found: dict[str, Any]) -> int:
    """How many programs of a kernel fit on a multiprocessor at a time."""
    by_registers = _REGISTERS // (max(found["registers"], 32) * found["warps"] * 32)
    return min(by_registers, _SHARED // (found["shared"] + 1024), 64 // found["warps"])


def work(launch: Launch) -> tuple[float, float]:
    """The bytes that a launch must move (each tensor once), and the operations of its products."""
    moved = sum(x.nbytes for x in launch.arguments.values() if isinstance(x, Tensor))
    if "PRECISION" not in launch.constants:
        return moved, 0.0
    if "R" in launch.constants:
        of_row = _of_softmax_row(launch)
    elif launch.name.startswith("wide"):
        of_row = _of_wide_row(launch)
    else:
        of_row = _of_row(launch)
    return moved, 2.0 * launch.arguments["rows"] * of_row


def _of_row(launch: Launch) -> int:
    """Multiplications per row in encode and attend."""
    sizes = launch.constants
    columns, dim = sizes["HEADS"] * sizes["PADDED"], sizes["D"]
    maps = 2 if sizes["MAP"] == 2 else 1
    groups, parts = -(-sizes["H"] // sizes["HEADS"]), -(-dim // sizes["TILE"])
    project, square = columns * dim, columns * columns
    once = columns * min(sizes["TILE"], dim)
    looks = sizes.get("OF_ROWS", 0) + sizes.get("OF_SUMS", 0)
    states = 2 + sizes.get("OF_SUMS", 0)
    return {
        "encode_kernel": groups * parts * (project + maps * once),
        "encode_backward_kernel": groups * parts * (2 * project + 2 * maps * square + 2 * looks * once),
        "attend_kernel": groups * (project + maps * square),
        "attend_backward_kernel": groups * parts * (project + states * maps * square + looks * once),
    }[launch.name]


def _of_wide_row(launch: Launch) -> int:
    """Multiplications per row in encode and attend, for heads above 64."""
    sizes = launch.constants
    dim, tile = sizes["D"], sizes["TILE"]
    beside = sizes.get("E", sizes["WIDTH"])  # entries of the rows y
    maps = 2 if sizes.get("MAP") == 2 else 1
    columns = sizes["H"] * -(-sizes["WIDTH"] // sizes["COLUMNS"]) * sizes["COLUMNS"]
    looks = sizes.get("OF_SUMS", 0) + sizes.get("OF_ROWS", 0) * (1 + sizes.get("ENCODES", 0) * maps)
    of_feature = {
        "wide_log_sums_kernel": dim,
        "wide_sums_kernel": -(-beside // tile) * (dim + maps * min(tile, beside)),
        "wide_attend_kernel": -(-beside // tile) * (dim + maps * min(tile, beside)),
        "wide_totals_kernel": dim + maps * beside,
        "wide_backward_kernel": -(-dim // tile) * (dim + maps * beside + looks * min(tile, dim)),
    }
    return columns * of_feature[launch.name]


def _of_softmax_row(launch: Launch) -> int:
    """Multiplications per row in attend_softmax: one head at a time, its summaries in whole ranges."""
    sizes = launch.constants
    width, dim = sizes["PADDED"], sizes["D"]
    parts, ranges = -(-dim // sizes["TILE"]), -(-sizes["R"] // sizes["RANGE"])
    project, summaries = width * dim, ranges * sizes["RANGE"] * width
    once = width * min(sizes["TILE"], dim)
    looks = sizes.get("OF_ROWS", 0) + sizes.get("OF_SUMS", 0)
    return (
        sizes["H"]
        * {
            "attend_softmax_kernel": project + 2 * summaries,
            "attend_softmax_backward_kernel": parts * (project + 5 * summaries + looks * once),
            "attend_softmax_summaries_kernel": ranges * project + 4 * summaries,
        }[launch.name]
    )


def estimate(events: int, candidates: int) -> None:
    """Print one row per kernel, for the first case on capability 9.0."""
    print("| kernel | programs | registers | shared KB | at once | MB | GFLOP | at least, us |")
    print("|---|---|---|---|---|---|---|---|")
    for launch in launches(CASES[0], 90, events, candidates):
        found = report(launch, 90)
        moved, operations = work(launch)
        least = max(moved / _BYTES, operations / _OPERATIONS) * 1e6
        programs = 1
        for size in launch.grid:
            programs *= size
        print(
            f"| {launch.name} | {programs:,} | {found['registers']} | {found['shared'] / 1024:.0f} "
            f"| {programs_at_once(found)} | {moved / 1e6:.1f} | {operations / 1e9:.2f} | {least:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["estimate"]:
        estimate(1_000_000, 1000)
    else:
        numbers, capabilities = ([int(x) for x in sys.argv[i].split(",")] for i in (1, 2))
        for number, capability in itertools.product(numbers, capabilities):
            for launch in different(CASES[number], capability):
                print(json.dumps(report(launch, capability)), flush=True)
