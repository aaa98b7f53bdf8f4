# Device code is written in Triton's language, whose types pyright does not know.
# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportMissingImports=false, reportOperatorIssue=false
"""attend_softmax: a block of candidates against its request's summaries, one head at a time.

The R summaries of a head are processed RANGE at a time with a running maximum, like the keys in flash
attention; a summary is both key and value, and is read once for both. The backward makes two passes over
them for the candidates' gradients. Another kernel computes the summaries' gradients: each of its
programs has RANGE summaries and loops over the candidates.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ifa_torchrec.ops.arguments import AttendSoftmaxArguments
from ifa_torchrec.ops.kernels import torch as torch_kernels
from ifa_torchrec.ops.kernels.triton.common import (
    Chunks,
    Products,
    backward_programs,
    chunk_rows,
    floats,
    launch,
    launch_backward,
    load_rows,
    project,
    split_state,
    store_rows,
    sum_segments,
    tokens,
)

WIDEST_HEAD = 256
"""All entries of a head are in one program's registers at once, unlike its summaries."""


@triton.jit
def _summaries(
    means, log_weights, first, R: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    RANGE: tl.constexpr,
):  # fmt: skip
    """A range of a head's summaries [RANGE, PADDED], zero outside, and its log weights, -inf outside."""
    nth, r = tl.arange(0, PADDED), first + tl.arange(0, RANGE)
    mask = (r < R)[:, None] & (nth < WIDTH)[None, :]
    mean = tl.load(means + r[:, None] * WIDTH + nth[None, :], mask=mask, other=0.0)
    return mean, tl.load(log_weights + r, mask=r < R, other=float("-inf"))


@triton.jit
def _read(
    query, means, log_weights, scale, R: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    RANGE: tl.constexpr, STATE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """out [ROWS, PADDED] and log_sum [ROWS]: zeros and -inf where there are no summaries."""
    top = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    out = tl.zeros([ROWS, PADDED], dtype=tl.float32)
    base = total
    for first in tl.range(0, R, RANGE, disable_licm=True):
        mean, log_weight = _summaries(means, log_weights, first, R, WIDTH, PADDED, RANGE)
        score = tl.dot(query, tl.trans(mean), input_precision=STATE) * scale + log_weight[None, :]
        higher = tl.maximum(top, tl.max(score, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp(score - base[:, None])
        before = tl.exp(top - base)
        total = total * before + tl.sum(weight, 1)
        out = tl.dot(weight, mean, out * before[:, None], input_precision=STATE)
        top = higher
    none = total == 0
    out = out / tl.where(none, 1.0, total)[:, None]
    return out, tl.where(none, float("-inf"), base + tl.log(tl.where(none, 1.0, total)))


@triton.jit
def _grad_scores(
    query, grad, shift, log_sum, valid, mean, log_weight, scale, STATE: tl.constexpr,
):  # fmt: skip
    """Softmax weights and the gradients of scores, both [ROWS, RANGE]; zeros in rows that are not valid.

    ``shift`` is the same for all weights of a row: grad_log_sum minus the dot product grad_out^T out.
    """
    score = tl.dot(query, tl.trans(mean), input_precision=STATE) * scale + log_weight[None, :]
    base = tl.where(log_sum == float("-inf"), 0.0, log_sum)
    share = tl.where(valid[:, None], tl.exp(score - base[:, None]), 0.0)
    grad_share = tl.dot(grad, tl.trans(mean), input_precision=STATE)
    return share, share * (grad_share + shift[:, None])


@triton.jit
def _attend_softmax_kernel(
    candidates, query_weight, means, log_weights, out, log_sums, offsets, firsts, requests, rows, scale,
    D: tl.constexpr, H: tl.constexpr, WIDTH: tl.constexpr, R: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, STATE: tl.constexpr, CHUNK: tl.constexpr, PADDED: tl.constexpr,
    RANGE: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The outputs and log_sums of a chunk of candidates for one head."""
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    request, first, end = chunk_rows(offsets, firsts, chunk, requests, rows, CHUNK)
    nth, of_head = tl.arange(0, PADDED), request * H + head
    for start in tl.range(first, end, ROWS, disable_licm=True):
        row = tl.arange(0, ROWS)
        valid = row < end - start
        query, _x = project(
            candidates + start * D, row, valid, query_weight, head * WIDTH + nth, nth < WIDTH,
            D, TILE, DOT, PRECISION,
        )  # fmt: skip
        value, log_sum = _read(
            query, means + of_head * (R * WIDTH), log_weights + of_head * R, scale,
            R, WIDTH, PADDED, RANGE, STATE, ROWS,
        )  # fmt: skip
        column = row[:, None] * (H * WIDTH) + (head * WIDTH + nth)[None, :]
        mask = valid[:, None] & (nth < WIDTH)[None, :]
        tl.store(out + start * (H * WIDTH) + column, value, mask=mask)
        tl.store(log_sums + start * H + row * H + head, log_sum, mask=valid)


@triton.jit
def _grad_query(
    candidates, row, valid, query_weight, head, grad_out, grad_log_sum, means, log_weights, scale,
    D: tl.constexpr, H: tl.constexpr, WIDTH: tl.constexpr, R: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, STATE: tl.constexpr, PADDED: tl.constexpr, RANGE: tl.constexpr,
    TILE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A head's gradient of projections [ROWS, PADDED], log_sum, shift, and the last tile of tokens."""
    nth = tl.arange(0, PADDED)
    query, x = project(
        candidates, row, valid, query_weight, head * WIDTH + nth, nth < WIDTH, D, TILE, DOT, PRECISION
    )
    out, log_sum = _read(
        query, means, log_weights, scale, R, WIDTH, PADDED, RANGE, STATE, ROWS
    )  # fmt: skip
    at = row[:, None] * (H * WIDTH) + (head * WIDTH + nth)[None, :]
    grad = tl.load(grad_out + at, mask=valid[:, None] & (nth < WIDTH)[None, :], other=0.0)
    shift = tl.load(grad_log_sum + row * H + head, mask=valid, other=0.0) - tl.sum(grad * out, 1)
    grad_query = tl.zeros([ROWS, PADDED], dtype=tl.float32)
    for first in tl.range(0, R, RANGE, disable_licm=True):
        mean, log_weight = _summaries(means, log_weights, first, R, WIDTH, PADDED, RANGE)
        _share, grad_score = _grad_scores(
            query, grad, shift, log_sum, valid, mean, log_weight, scale, STATE
        )
        grad_query = tl.dot(grad_score * scale, mean, grad_query, input_precision=STATE)
    return grad_query, log_sum, shift, x


@triton.jit
def _attend_softmax_backward_kernel(
    grad_out, grad_log_sum, candidates, query_weight, means, log_weights, grad_candidates, sums,
    log_sums, shifts, offsets, firsts, requests, rows, scale, count, each, groups,
    D: tl.constexpr, H: tl.constexpr, WIDTH: tl.constexpr, R: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, STATE: tl.constexpr, CHUNK: tl.constexpr, PADDED: tl.constexpr,
    RANGE: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, OF_ROWS: tl.constexpr,
    OF_SUMS: tl.constexpr,
):  # fmt: skip
    """For ``each`` chunks: with OF_ROWS the gradients of their candidates, with OF_SUMS those of a
    head's projection and each row's log_sum and shift for the summaries' kernel; ``groups`` as in
    encode."""
    program, part = tl.program_id(0).to(tl.int64), tl.program_id(2)
    dim, nth = part * TILE + tl.arange(0, TILE), tl.arange(0, PADDED)
    if OF_SUMS:
        queries = tl.zeros([PADDED, TILE], dtype=tl.float32)
    for chunk in range(program * each, tl.minimum(program * each + each, count)):
        request, first, end = chunk_rows(offsets, firsts, chunk, requests, rows, CHUNK)
        for start in tl.range(first, end, ROWS, disable_licm=True):
            row, at = tl.arange(0, ROWS), candidates + start * D
            valid = row < end - start
            if OF_ROWS:
                grad_x = tl.zeros([ROWS, TILE], dtype=tl.float32)
            for nth_group in range(groups):
                head = tl.program_id(1) + nth_group
                of_head = request * H + head
                grad_query, log_sum, shift, x = _grad_query(
                    at, row, valid, query_weight, head, grad_out + start * (H * WIDTH),
                    grad_log_sum + start * H, means + of_head * (R * WIDTH), log_weights + of_head * R,
                    scale, D, H, WIDTH, R, DOT, PRECISION, STATE, PADDED, RANGE, TILE, ROWS,
                )  # fmt: skip
                grad_query = grad_query.to(DOT)
                if OF_ROWS:
                    w = load_rows(query_weight, head * WIDTH + nth, nth < WIDTH, dim, D, DOT)
                    grad_x = tl.dot(grad_query, w, grad_x, input_precision=PRECISION)
                if OF_SUMS:
                    if TILE < D:
                        x = load_rows(at, row, valid, dim, D, DOT)
                    queries = tl.dot(tl.trans(grad_query), x, queries, input_precision=PRECISION)
                    if part == 0:
                        tl.store(log_sums + start * H + row * H + head, log_sum, mask=valid)
                        tl.store(shifts + start * H + row * H + head, shift, mask=valid)
            if OF_ROWS:
                store_rows(grad_candidates + start * D, grad_x, row, valid, dim, D)
    if OF_SUMS:
        to = sums + program * (H * WIDTH * D)
        store_rows(to, queries, tl.program_id(1) * WIDTH + nth, nth < WIDTH, dim, D)


@triton.jit
def _attend_softmax_summaries_kernel(
    grad_out, candidates, query_weight, means, log_weights, log_sums, shifts, states, offsets, firsts,
    requests, rows, scale,
    D: tl.constexpr, H: tl.constexpr, WIDTH: tl.constexpr, R: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, STATE: tl.constexpr, CHUNK: tl.constexpr, PADDED: tl.constexpr,
    RANGE: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The gradients of a range of a head's summaries and log weights from a chunk of candidates."""
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    request, first, end = chunk_rows(offsets, firsts, chunk, requests, rows, CHUNK)
    nth, of_head = tl.arange(0, PADDED), request * H + head
    begin = tl.program_id(2) * RANGE
    mean, log_weight = _summaries(
        means + of_head * (R * WIDTH), log_weights + of_head * R, begin, R, WIDTH, PADDED, RANGE
    )
    grad_mean = tl.zeros([RANGE, PADDED], dtype=tl.float32)
    grad_weight = tl.zeros([RANGE], dtype=tl.float32)
    for start in tl.range(first, end, ROWS, disable_licm=True):
        row = tl.arange(0, ROWS)
        valid = row < end - start
        query, _x = project(
            candidates + start * D, row, valid, query_weight, head * WIDTH + nth, nth < WIDTH,
            D, TILE, DOT, PRECISION,
        )  # fmt: skip
        column = row[:, None] * (H * WIDTH) + (head * WIDTH + nth)[None, :]
        mask = valid[:, None] & (nth < WIDTH)[None, :]
        grad = tl.load(grad_out + start * (H * WIDTH) + column, mask=mask, other=0.0)
        log_sum = tl.load(log_sums + start * H + row * H + head, mask=valid, other=0.0)
        shift = tl.load(shifts + start * H + row * H + head, mask=valid, other=0.0)
        share, grad_score = _grad_scores(
            query, grad, shift, log_sum, valid, mean, log_weight, scale, STATE
        )
        grad_mean = tl.dot(tl.trans(share), grad, grad_mean, input_precision=STATE)
        grad_mean = tl.dot(tl.trans(grad_score * scale), query, grad_mean, input_precision=STATE)
        grad_weight += tl.sum(grad_score, 0)
    r = begin + tl.arange(0, RANGE)
    to, summary = states + chunk * (H * R * (WIDTH + 1)), head * R + r
    mask = (r < R)[:, None] & (nth < WIDTH)[None, :]
    tl.store(to + summary[:, None] * WIDTH + nth[None, :], grad_mean, mask=mask)
    tl.store(to + H * R * WIDTH + summary, grad_weight, mask=r < R)


# ------------------------------------------------------------------------------------ on the host


class _Tile(NamedTuple):
    """The shape of a program's work: PADDED entries of a head, RANGE summaries, TILE of D, ROWS rows."""

    PADDED: int
    RANGE: int
    TILE: int
    ROWS: int

    @staticmethod
    def of(given: AttendSoftmaxArguments) -> _Tile:
        width, dim = given.query_weight.shape[1:]
        padded = max(triton.next_power_of_2(width), 16)
        wide, light = padded > 64, given.candidates.dtype == torch.bfloat16
        # every warp holds the operand that rows are multiplied with: in float32, half as much at once
        summaries = min(max(triton.next_power_of_2(given.summaries.shape[2]), 16), 16 if wide else 32)
        tile = min(max(triton.next_power_of_2(dim), 16), 64 if light and not wide else 32)
        return _Tile(padded, summaries, tile, 32 if light and not wide else 16)


def _prepared(
    given: AttendSoftmaxArguments, tile: _Tile
) -> tuple[dict[str, Any], dict[str, Any], Chunks]:
    """All kernels' arguments and constants, and the chunks of candidates."""
    heads, width, dim = given.query_weight.shape
    summaries = given.summaries.shape[2]
    chunks = Chunks.of(given.offsets, len(given.candidates))
    products = Products.of(given.candidates.dtype)
    arguments = chunks.arguments | {
        "candidates": tokens(given.candidates, dim),
        "query_weight": floats(given.query_weight, heads, width, dim, dtype=products.dtype),
        "means": floats(given.summaries, chunks.requests, heads, summaries, width),
        "log_weights": floats(given.log_weight, chunks.requests, heads, summaries),
        "scale": width**-0.5,
    }
    sizes = {"D": dim, "H": heads, "WIDTH": width, "R": summaries, "CHUNK": chunks.size}
    constants = sizes | products._asdict() | tile._asdict() | {"STATE": products.of_sums}
    return arguments, constants, chunks


def attend_softmax(given: AttendSoftmaxArguments) -> tuple[Tensor, Tensor]:
    """See ``ifa_torchrec.ops.attend_softmax``."""
    heads, width, _ = given.query_weight.shape
    if width > WIDEST_HEAD:
        return torch_kernels.attend_softmax(given)
    arguments, constants, chunks = _prepared(given, _Tile.of(given))
    out = given.summaries.new_empty(chunks.rows, heads, width, dtype=torch.float32)
    log_sum = given.summaries.new_empty(chunks.rows, heads, dtype=torch.float32)
    launch(
        _attend_softmax_kernel,
        (chunks.count, heads),
        arguments | {"out": out, "log_sums": log_sum},
        constants,
        warps=8 if constants["PADDED"] > 64 else 4,
    )
    return out, log_sum


def attend_softmax_backward(
    grad_out: Tensor, grad_log_sum: Tensor, given: AttendSoftmaxArguments
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of candidates, query_weight, summaries and log_weight."""
    heads, width, dim = given.query_weight.shape
    if width > WIDEST_HEAD:
        return torch_kernels.attend_softmax_backward(grad_out, grad_log_sum, given)
    candidates, summaries = given.candidates, given.summaries.shape[2]
    tile = _Tile.of(given)
    arguments, constants, chunks = _prepared(given, tile)
    programs, _ = backward_programs(chunks.count)
    grad_candidates = candidates.new_empty(candidates.shape)
    sums = candidates.new_empty(programs, heads, width, dim, dtype=torch.float32)
    log_sums, shifts = (candidates.new_empty(chunks.rows, heads, dtype=torch.float32) for _ in range(2))
    arguments |= {
        "grad_out": floats(grad_out, chunks.rows, heads, width),
        **{"log_sums": log_sums, "shifts": shifts},
    }
    launch_backward(
        _attend_softmax_backward_kernel,
        arguments
        | {"grad_log_sum": floats(grad_log_sum, chunks.rows, heads)}
        | {"grad_candidates": grad_candidates, "sums": sums},
        constants,
        (chunks.count, heads, triton.cdiv(dim, tile.TILE)),
    )
    states = candidates.new_empty(chunks.count, heads * summaries * (width + 1), dtype=torch.float32)
    launch(
        _attend_softmax_summaries_kernel,
        (chunks.count, heads, triton.cdiv(summaries, tile.RANGE)),
        arguments | {"states": states},
        constants,
        warps=8 if tile.PADDED > 64 else 4,
    )
    grad_means, grad_log_weight = split_state(sum_segments(states, chunks.firsts), heads, width)
    return (
        grad_candidates,
        sums.sum(0).to(given.query_weight.dtype),
        grad_means.to(given.summaries.dtype),
        grad_log_weight.to(given.log_weight.dtype),
    )
