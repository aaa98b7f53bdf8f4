# Device code is written in Triton's language, whose types pyright does not know.
# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportMissingImports=false, reportOperatorIssue=false
"""match: each event searches for its bucket among its request's sorted candidates, then hits are summed.

The candidates are sorted once by request and bucket, the hits once by candidate. Each candidate's hits
are then a segment, cut into chunks like any jagged rows; sums are float32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ifa_torchrec.ops.arguments import JoinedArguments, MatchArguments, grad_like
from ifa_torchrec.ops.checks import check_offsets
from ifa_torchrec.ops.kernels.triton.common import (
    Chunks,
    chunk_rows,
    event_weights,
    launch,
    sum_segments,
    tokens,
    weighting,
)


@triton.jit
def _join_kernel(
    buckets, sorted_buckets, order, candidate_offsets, joined, offsets, firsts, requests, rows,
    candidates, steps, CHUNK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """For each event of a chunk, the first candidate of its request with its bucket, or -1."""
    chunk = tl.program_id(0).to(tl.int64)
    request, start, end = chunk_rows(offsets, firsts, chunk, requests, rows, CHUNK)
    first = tl.maximum(tl.load(candidate_offsets + request), 0)
    last = tl.minimum(tl.load(candidate_offsets + request + 1), candidates)
    for begin in range(start, end, ROWS):
        row = begin + tl.arange(0, ROWS)
        valid = row < end
        bucket = tl.load(buckets + row, mask=valid, other=0)
        low = tl.zeros([ROWS], dtype=tl.int64) + first
        high = tl.zeros([ROWS], dtype=tl.int64) + last
        for _step in range(steps):
            middle = (low + high) // 2
            here = tl.load(sorted_buckets + middle, mask=low < high, other=0)
            high, low = (
                tl.where((low < high) & (here >= bucket), middle, high),
                tl.where((low < high) & (here < bucket), middle + 1, low),
            )
        hit = valid & (low < last)
        hit = hit & (tl.load(sorted_buckets + low, mask=hit, other=0) == bucket)
        candidate = tl.load(order + low, mask=hit, other=0)
        tl.store(joined + row, tl.where(hit, candidate, -1), mask=valid)


@triton.jit
def _match_kernel(
    history, order, sums, offsets, firsts, requests, rows, weights, ages, decay,
    D: tl.constexpr, L: tl.constexpr, WEIGHTS: tl.constexpr, AGES: tl.constexpr, CHUNK: tl.constexpr,
    TILE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A chunk's sums of w x, followed by those of w, for one rate."""
    chunk, rate = tl.program_id(0).to(tl.int64), tl.program_id(1)
    _request, first, end = chunk_rows(offsets, firsts, chunk, requests, rows, CHUNK)
    dim = tl.program_id(2) * TILE + tl.arange(0, TILE)
    token = tl.zeros([TILE], dtype=tl.float32)
    total = tl.zeros([1], dtype=tl.float32)
    for start in range(first, end, ROWS):
        place = start + tl.arange(0, ROWS)
        valid = place < end
        row = tl.load(order + place, mask=valid, other=0)
        rates = rate + tl.arange(0, 1)
        _decayed, weight = event_weights(weights, ages, decay, 0, row, valid, rates, L, WEIGHTS, AGES)
        mask = valid[:, None] & (dim < D)[None, :]
        x = tl.load(history + row[:, None] * D + dim[None, :], mask=mask, other=0.0).to(tl.float32)
        token += tl.sum(x * weight, 0)
        total += tl.sum(weight, 0)
    out = sums + (chunk * L + rate) * (D + 1)
    tl.store(out + dim, token, mask=dim < D)
    if tl.program_id(2) == 0:
        tl.store(out + D + tl.arange(0, 1), total)


@triton.jit
def _match_backward_kernel(
    history, joined, grads, grad_history, grad_weights, weights, ages, decay, rows, candidates,
    D: tl.constexpr, L: tl.constexpr, WEIGHTS: tl.constexpr, AGES: tl.constexpr, TILE: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """The gradients of a block of events, from the gradients [M, L, D + 1] of their sums."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    candidate = tl.load(joined + row, mask=valid, other=-1)
    hit = valid & (candidate >= 0) & (candidate < candidates)
    grad_event = tl.zeros([ROWS], dtype=tl.float32)
    for rate in range(L):
        rates = rate + tl.arange(0, 1)
        decayed, _ = event_weights(weights, ages, decay, 0, row, hit, rates, L, WEIGHTS, AGES)
        at = grads + (candidate * L + rate) * (D + 1)
        grad = tl.load(at + D, mask=hit, other=0.0)
        for part in range((D + TILE - 1) // TILE):
            dim = part * TILE + tl.arange(0, TILE)
            mask = hit[:, None] & (dim < D)[None, :]
            x = tl.load(history + row[:, None] * D + dim[None, :], mask=mask, other=0.0).to(tl.float32)
            grad += tl.sum(x * tl.load(at[:, None] + dim[None, :], mask=mask, other=0.0), 1)
        grad *= tl.sum(decayed, 1)
        if WEIGHTS == 2:
            tl.store(grad_weights + row * L + rate, grad, mask=valid)
        grad_event += grad
    if WEIGHTS == 1:
        tl.store(grad_weights + row, grad_event, mask=valid)
    for part in range((D + TILE - 1) // TILE):
        dim = part * TILE + tl.arange(0, TILE)
        mask = hit[:, None] & (dim < D)[None, :]
        grad_x = tl.zeros([ROWS, TILE], dtype=tl.float32)
        for rate in range(L):
            rates = rate + tl.arange(0, 1)
            _, weight = event_weights(weights, ages, decay, 0, row, hit, rates, L, WEIGHTS, AGES)
            at = grads + (candidate * L + rate) * (D + 1)
            grad_x += weight * tl.load(at[:, None] + dim[None, :], mask=mask, other=0.0)
        to = grad_history + row[:, None] * D + dim[None, :]
        tl.store(to, grad_x, mask=valid[:, None] & (dim < D)[None, :])


# ------------------------------------------------------------------------------------ on the host


def _sorted_candidates(buckets: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sort the candidates by request, bucket and row: their buckets and their rows in that order; and,
    for each row, the first candidate of its request with its bucket. All [M]."""
    place = torch.arange(len(buckets), device=buckets.device, dtype=torch.int64)
    request = torch.searchsorted(offsets, place, right=True)
    order = buckets.sort(stable=True).indices
    order = order[request[order].sort(stable=True).indices]
    ordered, of_request = buckets[order], request[order]
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[1:] = (ordered[1:] != ordered[:-1]) | (of_request[1:] != of_request[:-1])
    begins = torch.where(new, place, 0).cummax(0).values
    first = torch.empty_like(order)
    first[order] = order[begins]
    return ordered.contiguous(), order, first


def _segments(key: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """For keys [n] from 0 to ``count``, the stable order [n] by key, and the bounds [count + 1] in it of
    each key below ``count``."""
    ordered = key.sort(stable=True)
    numbers = torch.arange(count + 1, device=key.device, dtype=key.dtype)
    return ordered.indices, torch.searchsorted(ordered.values, numbers)


def _tile(dim: int) -> dict[str, int]:
    return {"TILE": min(triton.next_power_of_2(dim), 128), "ROWS": 32}


def match(given: MatchArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``ops.match``; also returns the join: candidate_first [M] and event_candidate [N]."""
    candidate_buckets, candidate_offsets, history, buckets, offsets, weights, ages, decay = given
    count, rates, (rows, dim) = len(candidate_buckets), len(decay), history.shape
    check_offsets("candidate_offsets", candidate_offsets, count)
    if len(buckets) != rows or len(candidate_offsets) != len(offsets):
        raise ValueError(f"history_buckets must be [{rows}], and candidate_offsets [{len(offsets)}]")
    ordered, order, first = _sorted_candidates(candidate_buckets, candidate_offsets)
    if not count:  # without candidates there is nothing for a program to read
        token_sum, weight_sum = (
            history.new_empty(0, rates, *of, dtype=torch.float32) for of in ([dim], [])
        )
        return token_sum, weight_sum, first, torch.full_like(buckets, -1)
    chunks = Chunks.of(offsets, rows)
    event_candidate = torch.empty_like(buckets)
    arguments: dict[str, Any] = {
        **{"buckets": buckets.contiguous(), "sorted_buckets": ordered, "order": order},
        **{"candidate_offsets": candidate_offsets.contiguous(), "joined": event_candidate},
        **{"candidates": count, "steps": count.bit_length()},
    }
    constants = {"CHUNK": chunks.size, "ROWS": min(chunks.size, 256)}
    launch(_join_kernel, (chunks.count,), arguments | chunks.arguments, constants)

    # 32-bit keys are sorted in half the passes; events without a match are sorted behind all candidates
    key = torch.where(event_candidate < 0, count, event_candidate).to(torch.int32)
    hits, bounds = _segments(key, count)
    chunks = Chunks.of_some(bounds, rows)
    sums = history.new_empty(chunks.count, rates * (dim + 1), dtype=torch.float32)
    arguments, constants = weighting(weights, ages, decay, rows)
    tile = _tile(dim)
    launch(
        _match_kernel,
        (chunks.count, rates, triton.cdiv(dim, tile["TILE"])),
        arguments | chunks.arguments | {"history": tokens(history, dim), "order": hits, "sums": sums},
        constants | tile | {"D": dim, "L": rates, "CHUNK": chunks.size},
    )
    sums = sum_segments(sums, chunks.firsts)[first].view(count, rates, dim + 1)
    dense = torch.contiguous_format
    token_sum, weight_sum = (x.clone(memory_format=dense) for x in (sums[..., :dim], sums[..., dim]))
    return token_sum, weight_sum, first, event_candidate


def match_backward(
    grad_token: Tensor, grad_weight: Tensor, given: JoinedArguments
) -> tuple[Tensor, Tensor]:
    """The gradients of history and weights."""
    first, event_candidate, history, weights, ages, decay = given
    count, rates, (rows, dim) = len(first), len(decay), history.shape
    for name, x, shape in (
        ("grad_token", grad_token, (count, rates, dim)),
        ("grad_weight", grad_weight, (count, rates)),
        ("event_candidate", event_candidate, (rows,)),
    ):
        if x.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(x.shape)}")
    # the gradient of a sum is the sum over all candidates that read it
    grads = torch.cat([grad_token, grad_weight[..., None]], -1).to(torch.float32).flatten(1)
    order, bounds = _segments(first.to(torch.int32), count)
    grads = sum_segments(grads.contiguous(), bounds, order)
    grad_history = history.new_empty(history.shape)
    grad_weights = grad_like(weights, history).float()
    arguments, constants = weighting(weights, ages, decay, rows)
    tile = _tile(dim)
    launch(
        _match_backward_kernel,
        (triton.cdiv(rows, tile["ROWS"]),),
        {"history": tokens(history, dim), "joined": event_candidate.contiguous(), "grads": grads}
        | {"grad_history": grad_history, "grad_weights": grad_weights, "rows": rows, "candidates": count}
        | arguments,
        constants | tile | {"D": dim, "L": rates},
    )
    return grad_history, grad_weights if weights is None else grad_weights.to(weights.dtype)
