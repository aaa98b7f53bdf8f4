"""The Triton kernels compiled ahead of time, for GPUs that are not there.

``launches`` calls the backend as training would, with nothing run: what it would start is noted, and
``compiled`` makes a cubin of it. Run as a program, it prints a line of JSON for each kernel.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ifa_torchrec.ops.arguments import AttendArguments, EncodeArguments, JoinedArguments, MatchArguments
from ifa_torchrec.ops.kernels import triton as kernels

CAPABILITIES = (80, 90, 100)
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""The most bytes of shared memory that a program can have, by compute capability."""
_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}


class Launch(NamedTuple):
    """What ``common.launch`` was given, and the name of the kernel."""

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
    """A model's D, H and d, its feature map, how its events are weighed, and its tokens' dtype."""

    dim: int
    heads: int
    width: int
    feature_map: str
    weighted: int
    dtype: torch.dtype


def launches(case: Case, events: int = 5000, candidates: int = 500) -> list[Launch]:
    """All that forward and backward of the three operators would start."""
    noted: list[Launch] = []

    def note(kernel, grid, arguments, constants, warps=4, stages=1):
        noted.append(Launch(kernel, grid, arguments, constants, warps, stages))

    names = ("common", "encode", "attend", "match")
    modules = [sys.modules[f"{kernels.__name__}.{name}"] for name in names]
    with ExitStack() as patches:
        for module in modules:
            patches.enter_context(mock.patch.object(module, "launch", note))
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
    kernels.attend_backward(torch.zeros(candidates, heads, width), torch.zeros(candidates, heads), asked)
    buckets, numbers = torch.zeros(events, dtype=torch.int64), torch.arange(candidates)
    matching = MatchArguments(numbers, ends_of_candidates, history, buckets, ends, *of_events)
    kernels.match(matching)
    sums = torch.zeros(candidates, heads, dim), torch.zeros(candidates, heads)
    kernels.match_backward(*sums, JoinedArguments(numbers, buckets, history, *of_events))


def compiled(launch: Launch, capability: int) -> Any:
    """The kernel for GPUs of this compute capability (90 is 9.0)."""
    signature, attributes, constants = {}, {}, dict(launch.constants)
    for i, name in enumerate(launch.kernel.arg_names):
        if name in launch.constants:
            signature[name] = "constexpr"
            continue
        value = launch.arguments[name]
        if isinstance(value, Tensor):
            signature[name] = _TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif value == 1:  # the number one is compiled in, as it is where a kernel is run
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
    source = ASTSource(launch.kernel, signature, constants, attributes)
    target = GPUTarget("cuda", capability, 32)
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}
    return triton.compile(source, target=target, options=options)


CASES = [
    Case(dim, heads, width, feature_map, weighted, dtype)
    for (dim, heads, width), (feature_map, weighted), dtype in itertools.product(
        [(64, 4, 16), (128, 8, 16), (256, 8, 32), (256, 4, 64), (48, 3, 12)],
        [("elu", 1), ("relu", 0), ("hedgehog", 2)],
        [torch.bfloat16, torch.float32, torch.float16],
    )
]


def reports(cases: list[Case], capabilities: tuple[int, ...] = CAPABILITIES) -> Iterator[dict[str, Any]]:
    """Of each different kernel of the cases: what its cubin needs, and its tensor core instructions."""
    seen = set()
    for case, capability in itertools.product(cases, capabilities):
        for launch in launches(case):
            types = tuple(x.dtype if isinstance(x, Tensor) else None for x in launch.arguments.values())
            key = (
                launch.name,
                *map(str, launch.constants.items()),
                types,
                launch.warps,
                launch.stages,
                capability,
            )
            if key in seen:
                continue
            seen.add(key)
            kernel = compiled(launch, capability)
            ptx = kernel.asm["ptx"]
            yield {
                "kernel": launch.name,
                "case": "{} {}x{} {} weighted={} {}".format(*case),
                "capability": capability,
                "tensor_cores": sum(ptx.count(x) for x in ("mma.sync", "wgmma.mma", "tcgen05.mma")),
                "shared": kernel.metadata.shared,
                "spills": local_memory(kernel),
            }


def local_memory(kernel: Any) -> int:
    """Bytes a thread keeps outside its registers: none, where none are spilled; and registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = dict(re.findall(r"(\w+):(\d+)", told))
    return int(used["STACK"]) + int(used["LOCAL"]), int(used["REG"])


if __name__ == "__main__":
    for report in reports(CASES[slice(*map(int, sys.argv[1:3]))] if len(sys.argv) > 1 else CASES):
        print(json.dumps(report), flush=True)
