# Triton is not typed: pyright does not know its types.
# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportMissingImports=false, reportOperatorIssue=false
"""encode and attend for wide heads, of any width.

Both sum over rows x [D] that are projected to features, each paired with a row y [E]: in encode y is x
again, in attend's backward it is the gradient of a head's numerator. So they share their kernels:

- The sums phi(x) y^T are encode's S before Wv, and the gradient of S in attend.
- The gradient of phi is P y + p. In encode, P is (the gradient of S) Wv and p the gradient of z; in
  attend they are S and z themselves. Values are never projected: the gradient of Wv follows from those
  sums.

Multiplying by Wv is one product of dense matrices per request, not per event, and is left to torch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ifa_torchrec.ops.arguments import AttendArguments, EncodeArguments, grad_like
from ifa_torchrec.ops.feature_maps import FEATURE_MAPS
from ifa_torchrec.ops.kernels.reference import event_weights
from ifa_torchrec.ops.kernels.triton import wide_kernels as kernels
from ifa_torchrec.ops.kernels.triton.common import (
    MAPS,
    Chunks,
    Products,
    backward_programs,
    floats,
    is_light,
    launch,
    launch_backward,
    multiplies_in_registers,
    split_state,
    sum_segments,
    tokens,
)

_PROGRAMS = 8
"""About how many programs share a chunk: chunks can be larger by this factor, and so there are fewer
sums of chunks."""


class _Work(NamedTuple):
    """The kernels' arguments and constants, and the chunks of rows."""

    arguments: dict[str, Any]
    constants: dict[str, Any]
    chunks: Chunks

    @staticmethod
    def of(given: EncodeArguments | AttendArguments, scales: Tensor) -> _Work:
        """``scales`` [N, H] float32 multiplies phi in encode, and p in attend."""
        encodes = isinstance(given, EncodeArguments)
        rows, weight = given[0], given.key_weight if encodes else given.query_weight
        heads, width, dim = weight.shape
        chunks = Chunks.of(given.offsets, rows.shape[0], _PROGRAMS if encodes else 1)
        products = Products.of(rows.dtype)
        light = is_light(given.feature_map, rows.dtype)
        size = 64 if light and not multiplies_in_registers(rows.device) else 32
        arguments = chunks.arguments | {
            "inputs": tokens(rows, dim),
            "weight": floats(weight, heads, width, dim, dtype=products.dtype),
            "scales": scales,
        }
        constants = {"D": dim, "H": heads, "WIDTH": width, "MAP": MAPS[given.feature_map]}
        constants |= products._asdict() | {"CHUNK": chunks.size, "ENCODES": encodes}
        constants |= {"COLUMNS": size, "TILE": size, "ROWS": 32}
        if encodes:
            of_y = {"E": dim, "OTHER": products.DOT, "OTHER_PRECISION": products.PRECISION}
        else:
            of_y = {"E": width, "OTHER": tl.float32, "OTHER_PRECISION": products.of_sums}
        work = _Work(arguments, constants | of_y, chunks)
        return work.with_arguments(log_sums=work._log_sums())

    def with_arguments(self, **more: Any) -> _Work:
        return self._replace(arguments=self.arguments | more)

    @property
    def heads(self) -> int:
        return self.constants["H"]

    @property
    def hedgehog(self) -> bool:
        return self.constants["MAP"] == MAPS["hedgehog"]

    def tiles(self, of: str) -> int:
        """Number of tiles along WIDTH, D or E."""
        return triton.cdiv(self.constants[of], self.constants["TILE"])

    def launch(self, kernel: Any, grid: tuple[int, ...]) -> None:
        """Launch a kernel with those of the arguments and constants that it takes."""
        has = set(kernel.arg_names)
        arguments, constants = (
            {name: x for name, x in given.items() if name in has}
            for given in (self.arguments, self.constants)
        )
        launch(kernel, grid, arguments, constants, warps=8)

    def _log_sums(self) -> Tensor:
        """[N, H, 2] for hedgehog; a placeholder for the other maps."""
        rows = self.chunks.rows
        if not self.hedgehog:
            return self.arguments["scales"].new_empty(1)
        log_sums = self.arguments["scales"].new_empty(rows, self.heads, 2)
        grid = (triton.cdiv(rows, self.constants["ROWS"]), self.heads)
        self.with_arguments(log_sums=log_sums).launch(kernels.wide_log_sums_kernel, grid)
        return log_sums

    def sums(self, others: Tensor) -> tuple[Tensor, Tensor]:
        """The sums of phi y^T [B, H, d_phi, E] and of phi [B, H, d_phi]."""
        entries = self.constants["E"]
        features = self.heads * self.constants["WIDTH"] * (2 if self.hedgehog else 1)
        sums = self.arguments["scales"].new_empty(self.chunks.count, features * (entries + 1))
        grid = (self.chunks.count, self.heads * self.tiles("WIDTH"), self.tiles("E"))
        self.with_arguments(others=others, sums=sums).launch(kernels.wide_sums_kernel, grid)
        return split_state(sum_segments(sums, self.chunks.firsts), self.heads, entries)

    def totals(self) -> Tensor:
        """[N, H, 2], the sums of the gradient of phi times phi; the second is only used by hedgehog."""
        totals = self.arguments["scales"].new_empty(self.chunks.rows, self.heads, 2)
        grid = (self.chunks.count, self.heads)
        self.with_arguments(totals=totals).launch(kernels.wide_totals_kernel, grid)
        return totals

    def backward(self, totals: Tensor | None) -> tuple[Tensor, Tensor]:
        """The gradients of the rows, in their dtype, and of the projection, float32."""
        inputs, scales = self.arguments["inputs"], self.arguments["scales"]
        programs, _ = backward_programs(self.chunks.count)
        grad_inputs = inputs.new_empty(inputs.shape)
        shape = (self.heads, self.constants["WIDTH"], self.constants["D"])
        sums = scales.new_empty(programs, *shape)
        more = {"grad_inputs": grad_inputs, "sums": sums}
        more["totals"] = scales if totals is None else totals
        work = (self.chunks.count, self.heads * self.tiles("WIDTH"), self.tiles("D"))
        launch_backward(kernels.wide_backward_kernel, self.arguments | more, self.constants, work)
        return grad_inputs, sums.sum(0)


def _weighed(weights: Tensor | None, given: EncodeArguments) -> Tensor:
    """Event weights [N, H] float32."""
    like = given.history.new_empty(given.history.shape[0], 0, dtype=torch.float32)
    ages = None if given.ages is None else given.ages.float()
    weights = None if weights is None else weights.float()
    return event_weights(weights, ages, given.decay.float(), like).contiguous()


def encode(given: EncodeArguments) -> tuple[Tensor, Tensor]:
    """See ``ifa_torchrec.ops.encode``."""
    work = _Work.of(given, _weighed(given.weights, given))
    state, key_sum = work.sums(work.arguments["inputs"])
    key_value = torch.einsum("bhfD,hdD->bhfd", state, given.value_weight.float())
    return key_value.contiguous(), key_sum


def encode_backward(
    grad_key_value: Tensor, grad_key_sum: Tensor, given: EncodeArguments
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of history, key_weight, value_weight and weights."""
    heads, width, _ = given.key_weight.shape
    weights = given.weights
    work = _Work.of(given, _weighed(weights, given))
    features = width * FEATURE_MAPS[given.feature_map].expansion
    requests = work.chunks.requests
    grad_state = floats(grad_key_value, requests, heads, features, width)
    state, _ = work.sums(work.arguments["inputs"])
    grad_value = torch.einsum("bhfd,bhfD->hdD", grad_state, state)
    of_phi = torch.einsum("bhfd,hdD->bhfD", grad_state, given.value_weight.float())
    work = work.with_arguments(
        others=work.arguments["inputs"],
        state=of_phi.to(Products.of(given.history.dtype).dtype).contiguous(),
        total=floats(grad_key_sum, requests, heads, features),
    )
    totals = work.totals() if work.hedgehog or weights is not None else None
    grad_history, grad_key = work.backward(totals)
    grad_weights = grad_like(weights, given.history)
    if weights is not None and totals is not None:
        of_map = totals.sum(2) if work.hedgehog else totals[..., 0]
        of_head = of_map * _weighed(None, given)
        grad_weights = (of_head if weights.ndim == 2 else of_head.sum(1)).to(weights.dtype)
    return (
        grad_history,
        grad_key.to(given.key_weight.dtype),
        grad_value.to(given.value_weight.dtype, memory_format=torch.contiguous_format),
        grad_weights,
    )


def attend(given: AttendArguments) -> tuple[Tensor, Tensor]:
    """See ``ifa_torchrec.ops.attend``."""
    rows, heads = given.candidates.shape[0], given.query_weight.shape[0]
    return _answers(_Work.of(given, given.key_value.new_empty(rows, heads, dtype=torch.float32)), given)


def _answers(work: _Work, given: AttendArguments) -> tuple[Tensor, Tensor]:
    """Outputs and normalizers."""
    heads, width, _ = given.query_weight.shape
    features = width * FEATURE_MAPS[given.feature_map].expansion
    out = work.arguments["scales"].new_empty(work.chunks.rows, heads, width)
    normalizers = work.arguments["scales"].new_empty(work.chunks.rows, heads)
    work.with_arguments(
        key_value=floats(given.key_value, work.chunks.requests, heads, features, width),
        key_sum=floats(given.key_sum, work.chunks.requests, heads, features),
        out=out,
        normalizers=normalizers,
        eps=given.eps,
    ).launch(kernels.wide_attend_kernel, (work.chunks.count, heads, work.tiles("WIDTH")))
    return out, normalizers


def attend_backward(
    grad_out: Tensor, grad_normalizer: Tensor, given: AttendArguments
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of candidates, query_weight, key_value and key_sum."""
    heads, width, _ = given.query_weight.shape
    features = width * FEATURE_MAPS[given.feature_map].expansion
    rows = given.candidates.shape[0]
    grad_out = floats(grad_out, rows, heads, width)
    scales = floats(grad_normalizer, rows, heads)
    work = _Work.of(given, scales)
    out, normalizers = _answers(work, given)
    others = grad_out / (normalizers + given.eps)[..., None]
    work = work.with_arguments(
        scales=scales - (others * out).sum(2),
        others=others,
        state=floats(given.key_value, work.chunks.requests, heads, features, width),
        total=floats(given.key_sum, work.chunks.requests, heads, features),
    )
    grad_key_value, grad_key_sum = work.sums(others)
    grad_candidates, grad_query = work.backward(work.totals() if work.hedgehog else None)
    return (
        grad_candidates,
        grad_query.to(given.query_weight.dtype),
        grad_key_value.to(given.key_value.dtype),
        grad_key_sum.to(given.key_sum.dtype),
    )
