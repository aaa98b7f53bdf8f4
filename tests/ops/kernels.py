"""All backends, the native one with each instruction set of this machine; encode, then attend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from helpers import offsets_of
from test_ops import EPS, triton_is_there

from ifa_torchrec import ops
from ifa_torchrec.ops.kernels import native

SETS = native.INSTRUCTION_SETS
NATIVE = [] if native.LIBRARY is None else list(SETS[: SETS.index(native.built()[1]) + 1])
KERNELS = ["reference", "torch", *NATIVE]
EVERY_KERNEL = [*KERNELS, pytest.param("triton", marks=triton_is_there)]


@contextmanager
def backend_of(kernels: str) -> Iterator[str]:
    """The backend that an entry of KERNELS names, with its instruction set selected."""
    if kernels not in NATIVE:
        yield kernels
        return
    before, native.STATUS = native.STATUS, kernels
    try:
        yield "native"
    finally:
        native.STATUS = before


def wide_inputs(history, candidates, sizes, dtype=torch.float32, weighted: bool | str = True):
    """Inputs of encode and attend, with D, H and d from ``sizes``."""
    dim, heads, width = sizes
    generator = torch.Generator().manual_seed(0)
    random = partial(torch.randn, generator=generator)
    n, m = sum(history), sum(candidates)
    inputs = {
        "history": random(n, dim).to(dtype),
        "offsets": offsets_of(history),
        "key_weight": random(heads, width, dim) / dim**0.5,
        "value_weight": random(heads, width, dim) / dim**0.5,
        "weights": random(*((n, heads) if weighted == "by head" else (n,))).abs(),
        "ages": random(n).abs(),
        "decay": torch.arange(heads) / 2.0,
    }
    asking = {
        "candidates": random(m, dim).to(dtype),
        "offsets": offsets_of(candidates),
        "query_weight": random(heads, width, dim) / dim**0.5,
    }
    return inputs, asking


def run(inputs, asking, feature_map, backend):
    """State and outputs, and the gradients of the sum of squared outputs, by name."""
    inputs = {name: x if x is None else x.clone() for name, x in inputs.items()}
    asking = {name: x.clone() for name, x in asking.items()}
    leaves = {
        **{name: inputs[name] for name in ("history", "key_weight", "value_weight", "weights")},
        **{name: asking[name] for name in ("candidates", "query_weight")},
    }
    leaves = {name: x.requires_grad_() for name, x in leaves.items() if x is not None}
    state = ops.encode(*inputs.values(), feature_map, backend)
    out, matched = ops.attend(*asking.values(), *state, feature_map, EPS, backend)
    loss = out.square().mean() + (1 + matched).log().mean()
    gradients = torch.autograd.grad(loss, [*leaves.values()])
    values = {"key_value": state[0], "key_sum": state[1], "out": out, "matched": matched}
    return {name: x.detach() for name, x in values.items()} | dict(zip(leaves, gradients, strict=True))
