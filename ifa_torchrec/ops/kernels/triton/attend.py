# Device code is written in Triton's language, whose types pyright does not know.
# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportMissingImports=false, reportOperatorIssue=false
"""attend: a block of candidates against its request's state, all heads of a group in one product.

S of a group of heads is one block-diagonal matrix: products of single heads of width 16 are too small
for tensor cores. The backward reads the state as the forward does and recomputes phi.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ifa_torchrec.ops.arguments import AttendArguments
from ifa_torchrec.ops.feature_maps import FEATURE_MAPS
from ifa_torchrec.ops.kernels.triton import wide
from ifa_torchrec.ops.kernels.triton.common import (
    MAPS,
    WIDEST_HEAD,
    Chunks,
    Products,
    Tile,
    backward_programs,
    chunk_rows,
    columns,
    features,
    features_backward,
    floats,
    head_sums,
    is_light,
    launch,
    launch_backward,
    load_rows,
    load_state,
    multiplies_in_registers,
    project,
    split_state,
    store_rows,
    store_state,
    sum_segments,
    to_columns,
    tokens,
)

_HEDGEHOG = tl.constexpr(MAPS["hedgehog"])


@triton.jit
def _finite(phi):
    """phi with zeros in place of non-finite values; and a fault mask: 0 where finite, NaN elsewhere."""
    fault = phi - phi
    return tl.where(fault == 0, phi, 0.0), fault


@triton.jit
def _read(
    candidates, row, valid, query_weight, key_value, key_sum, group,
    D: tl.constexpr, H: tl.constexpr, WIDTH: tl.constexpr, MAP: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, STATE: tl.constexpr, HEADS: tl.constexpr, PADDED: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Projections, both halves of phi, the numerator [R, COLUMNS], the normalizer [R, HEADS], and the
    last tile of tokens.

    A head whose phi is not finite must not spoil another head's numerator by infinity times zero.
    """
    head, nth, real, inside = columns(group, H, WIDTH, HEADS, PADDED)
    MAP_COUNT: tl.constexpr = 2 if MAP == _HEDGEHOG else 1
    query, x = project(
        candidates, row, valid, query_weight, head * WIDTH + nth, real, D, TILE, DOT, PRECISION
    )
    phi, other = features(query, inside, MAP, HEADS, PADDED)
    feature = head * MAP_COUNT * WIDTH + nth
    state, total = load_state(key_value, key_sum, head, nth, real, feature, WIDTH)
    clean, fault = _finite(phi)
    numerator = tl.dot(clean, state, input_precision=STATE)
    normalizer = head_sums(phi * total[None, :], HEADS, PADDED)
    if MAP == _HEDGEHOG:
        state, total = load_state(key_value, key_sum, head, nth, real, feature + WIDTH, WIDTH)
        clean, other_fault = _finite(other)
        numerator = tl.dot(clean, state, numerator, input_precision=STATE)
        normalizer += head_sums(other * total[None, :], HEADS, PADDED)
        fault += other_fault
    numerator += to_columns(head_sums(fault, HEADS, PADDED), HEADS, PADDED)
    return query, phi, other, numerator, normalizer, x


@triton.jit
def _attend_kernel(
    candidates, query_weight, key_value, key_sum, out, normalizers, offsets, firsts, requests, rows, eps,
    D: tl.constexpr, H: tl.constexpr, WIDTH: tl.constexpr, MAP: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, STATE: tl.constexpr, CHUNK: tl.constexpr, HEADS: tl.constexpr,
    PADDED: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The outputs and normalizers of a chunk of candidates for a group of heads."""
    chunk, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    request, first, end = chunk_rows(offsets, firsts, chunk, requests, rows, CHUNK)
    head, nth, real, _ = columns(group, H, WIDTH, HEADS, PADDED)
    heads = group * HEADS + tl.arange(0, HEADS)
    FEATURES: tl.constexpr = H * (2 if MAP == _HEDGEHOG else 1) * WIDTH
    for start in tl.range(first, end, ROWS, disable_licm=True):
        row = tl.arange(0, ROWS)
        valid = row < end - start
        _query, _phi, _other, numerator, normalizer, _x = _read(
            candidates + start * D, row, valid, query_weight, key_value + request * (FEATURES * WIDTH),
            key_sum + request * FEATURES, group,
            D, H, WIDTH, MAP, DOT, PRECISION, STATE, HEADS, PADDED, TILE,
        )  # fmt: skip
        value = numerator / to_columns(normalizer + eps, HEADS, PADDED)
        column = row[:, None] * (H * WIDTH) + (head * WIDTH + nth)[None, :]
        tl.store(out + start * (H * WIDTH) + column, value, mask=valid[:, None] & real[None, :])
        mask = valid[:, None] & (heads < H)[None, :]
        to = normalizers + start * H + row[:, None] * H + heads[None, :]
        tl.store(to, normalizer, mask=mask)


@triton.jit
def _grad_query(
    grad_out, grad_normalizer, row, valid, eps, query, phi, other, numerator, normalizer,
    key_value, key_sum, group, H: tl.constexpr, WIDTH: tl.constexpr, MAP: tl.constexpr,
    STATE: tl.constexpr, HEADS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """The gradients of the projections, the numerator and the normalizer, all [R, COLUMNS]."""
    head, nth, real, _ = columns(group, H, WIDTH, HEADS, PADDED)
    heads = group * HEADS + tl.arange(0, HEADS)
    MAP_COUNT: tl.constexpr = 2 if MAP == _HEDGEHOG else 1
    divisor = to_columns(normalizer + eps, HEADS, PADDED)
    at = row[:, None] * (H * WIDTH) + (head * WIDTH + nth)[None, :]
    grad = tl.load(grad_out + at, mask=valid[:, None] & real[None, :], other=0.0) / divisor
    mask = valid[:, None] & (heads < H)[None, :]
    upstream = tl.load(grad_normalizer + row[:, None] * H + heads[None, :], mask=mask, other=0.0)
    grad_divisor = upstream - head_sums(grad * (numerator / divisor), HEADS, PADDED)
    grad_divisor = to_columns(grad_divisor, HEADS, PADDED)
    feature = head * MAP_COUNT * WIDTH + nth
    state, total = load_state(key_value, key_sum, head, nth, real, feature, WIDTH)
    grad_phi = tl.dot(grad, tl.trans(state), input_precision=STATE) + total[None, :] * grad_divisor
    other_grad = grad_phi
    if MAP == _HEDGEHOG:
        state, total = load_state(key_value, key_sum, head, nth, real, feature + WIDTH, WIDTH)
        other_grad = tl.dot(grad, tl.trans(state), input_precision=STATE) + total[None, :] * grad_divisor
    grad_query = features_backward(grad_phi, other_grad, query, phi, other, MAP, HEADS, PADDED)
    return grad_query, grad, grad_divisor


@triton.jit
def _attend_backward_kernel(
    grad_out, grad_normalizer, candidates, query_weight, key_value, key_sum, grad_candidates, sums,
    states, offsets, firsts, requests, rows, eps, count, each, groups,
    D: tl.constexpr, H: tl.constexpr, WIDTH: tl.constexpr, MAP: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, STATE: tl.constexpr, CHUNK: tl.constexpr, HEADS: tl.constexpr,
    PADDED: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, OF_ROWS: tl.constexpr,
    OF_SUMS: tl.constexpr,
):  # fmt: skip
    """For ``each`` chunks: with OF_ROWS the gradients of their candidates, with OF_SUMS those of the
    projection and, per chunk, of the state; like encode's backward."""
    program, part = tl.program_id(0).to(tl.int64), tl.program_id(2)
    dim = part * TILE + tl.arange(0, TILE)
    MAP_COUNT: tl.constexpr = 2 if MAP == _HEDGEHOG else 1
    FEATURES: tl.constexpr = H * MAP_COUNT * WIDTH
    COLUMNS: tl.constexpr = HEADS * PADDED
    if OF_SUMS:
        queries = tl.zeros([COLUMNS, TILE], dtype=tl.float32)
    for chunk in range(program * each, tl.minimum(program * each + each, count)):
        request, first, end = chunk_rows(offsets, firsts, chunk, requests, rows, CHUNK)
        if OF_SUMS:
            state = tl.zeros([COLUMNS, COLUMNS], dtype=tl.float32)
            total = tl.zeros([COLUMNS], dtype=tl.float32)
            if MAP == _HEDGEHOG:
                other_state, other_total = state, total
        for start in tl.range(first, end, ROWS, disable_licm=True):
            row, at = tl.arange(0, ROWS), candidates + start * D
            valid = row < end - start
            of_state, of_sum = key_value + request * (FEATURES * WIDTH), key_sum + request * FEATURES
            of_out, of_normalizer = grad_out + start * (H * WIDTH), grad_normalizer + start * H
            if OF_ROWS:
                grad_x = tl.zeros([ROWS, TILE], dtype=tl.float32)
            for nth_group in range(groups):
                group = tl.program_id(1) + nth_group
                query, phi, other, numerator, normalizer, x = _read(
                    at, row, valid, query_weight, of_state, of_sum, group,
                    D, H, WIDTH, MAP, DOT, PRECISION, STATE, HEADS, PADDED, TILE,
                )  # fmt: skip
                grad_query, grad, grad_divisor = _grad_query(
                    of_out, of_normalizer, row, valid, eps, query, phi, other, numerator, normalizer,
                    of_state, of_sum, group, H, WIDTH, MAP, STATE, HEADS, PADDED,
                )  # fmt: skip
                grad_query = grad_query.to(DOT)
                if OF_ROWS:
                    head, nth, real, _ = columns(group, H, WIDTH, HEADS, PADDED)
                    w = load_rows(query_weight, head * WIDTH + nth, real, dim, D, DOT)
                    grad_x = tl.dot(grad_query, w, grad_x, input_precision=PRECISION)
                if OF_SUMS:
                    if TILE < D:
                        x = load_rows(at, row, valid, dim, D, DOT)
                    queries = tl.dot(tl.trans(grad_query), x, queries, input_precision=PRECISION)
                    state = tl.dot(tl.trans(phi), grad, state, input_precision=STATE)
                    total += tl.sum(phi * grad_divisor, 0)
                    if MAP == _HEDGEHOG:
                        other_state = tl.dot(tl.trans(other), grad, other_state, input_precision=STATE)
                        other_total += tl.sum(other * grad_divisor, 0)
            if OF_ROWS:
                store_rows(grad_candidates + start * D, grad_x, row, valid, dim, D)
        if OF_SUMS and part == 0:
            head, nth, real, _ = columns(tl.program_id(1), H, WIDTH, HEADS, PADDED)
            to = states + chunk * (FEATURES * (WIDTH + 1))
            feature = head * MAP_COUNT * WIDTH + nth
            store_state(to, state, total, head, nth, real, feature, True, FEATURES, WIDTH)
            if MAP == _HEDGEHOG:
                feature += WIDTH
                store_state(
                    to, other_state, other_total, head, nth, real, feature, True, FEATURES, WIDTH
                )
    if OF_SUMS:
        head, nth, real, _ = columns(tl.program_id(1), H, WIDTH, HEADS, PADDED)
        store_rows(sums + program * (H * WIDTH * D), queries, head * WIDTH + nth, real, dim, D)


# ------------------------------------------------------------------------------------ on the host


def _prepared(given: AttendArguments, tile: Tile) -> tuple[dict[str, Any], dict[str, Any], Chunks]:
    """Both kernels' arguments and constants, and the chunks of candidates."""
    heads, width, dim = given.query_weight.shape
    features = width * FEATURE_MAPS[given.feature_map].expansion
    chunks = Chunks.of(given.offsets, len(given.candidates))
    products = Products.of(given.candidates.dtype)
    arguments = chunks.arguments | {
        "candidates": tokens(given.candidates, dim),
        "query_weight": floats(given.query_weight, heads, width, dim, dtype=products.dtype),
        "key_value": floats(given.key_value, chunks.requests, heads, features, width),
        "key_sum": floats(given.key_sum, chunks.requests, heads, features),
        "eps": given.eps,
    }
    sizes = {"D": dim, "H": heads, "WIDTH": width, "MAP": MAPS[given.feature_map]}
    constants = sizes | products._asdict() | tile._asdict()
    return arguments, constants | {"STATE": products.of_sums, "CHUNK": chunks.size}, chunks


def attend(given: AttendArguments) -> tuple[Tensor, Tensor]:
    """See ``ifa_torchrec.ops.attend``."""
    if given.query_weight.shape[1] > WIDEST_HEAD:
        return wide.attend(given)
    heads, width, dim = given.query_weight.shape
    light = is_light(given.feature_map, given.candidates.dtype)
    tile = Tile.of((heads, width, dim), 64, 64, light, given.candidates.device)
    arguments, constants, chunks = _prepared(given, tile)
    out = given.key_value.new_empty(chunks.rows, heads, width, dtype=torch.float32)
    normalizer = given.key_value.new_empty(chunks.rows, heads, dtype=torch.float32)
    launch(
        _attend_kernel,
        (chunks.count, tile.groups(heads)),
        arguments | {"out": out, "normalizers": normalizer},
        constants,
        warps=4 if light else 8,
    )
    return out, normalizer


def attend_backward(
    grad_out: Tensor, grad_normalizer: Tensor, given: AttendArguments
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of candidates, query_weight, key_value and key_sum."""
    candidates, key_value = given.candidates, given.key_value
    heads, width, dim = given.query_weight.shape
    features = heads * width * FEATURE_MAPS[given.feature_map].expansion
    # before compute capability 9.0, two states of more than 32 columns take too many registers
    crowded = features > 64 * heads and multiplies_in_registers(candidates.device)
    if width > WIDEST_HEAD or crowded:
        return wide.attend_backward(grad_out, grad_normalizer, given)
    # a state with more columns takes too many registers
    light = is_light(given.feature_map, given.candidates.dtype)
    tile = Tile.of((heads, width, dim), 32 if light else 16, 32, light, candidates.device)
    arguments, constants, chunks = _prepared(given, tile)
    groups, parts = tile.groups(heads), triton.cdiv(dim, tile.TILE)
    programs, _ = backward_programs(chunks.count)
    grad_candidates = candidates.new_empty(candidates.shape)
    sums = candidates.new_empty(programs, heads, width, dim, dtype=torch.float32)
    states = candidates.new_empty(chunks.count, features * (width + 1), dtype=torch.float32)
    arguments |= {
        "grad_out": floats(grad_out, chunks.rows, heads, width),
        "grad_normalizer": floats(grad_normalizer, chunks.rows, heads),
        **{"grad_candidates": grad_candidates, "sums": sums, "states": states},
    }
    launch_backward(_attend_backward_kernel, arguments, constants, (chunks.count, groups, parts))
    grad_key_value, grad_key_sum = split_state(sum_segments(states, chunks.firsts), heads, width)
    return (
        grad_candidates,
        sums.sum(0).to(given.query_weight.dtype),
        grad_key_value.to(key_value.dtype),
        grad_key_sum.to(given.key_sum.dtype),
    )
