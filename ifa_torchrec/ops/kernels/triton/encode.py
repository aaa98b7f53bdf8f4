# Device code is written in Triton's language, whose types pyright does not know.
# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportMissingImports=false, reportOperatorIssue=false
"""encode: one pass over the history, with its sums in registers.

As in the torch backend, the forward does not project values: S_h = (sum_i w_hi phi(k_hi) x_i^T) Wv_h. A
program sums a chunk of one request's rows, and the chunks of a request are added up afterwards. The
backward projects keys and values again; each of its programs sums the gradients of the projections over
several chunks.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ifa_torchrec.ops.arguments import EncodeArguments, grad_like
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
    event_weights,
    features,
    features_backward,
    floats,
    head_sums,
    is_light,
    launch,
    launch_backward,
    load_rows,
    load_state,
    project,
    split_state,
    store_rows,
    store_state,
    sum_segments,
    to_columns,
    tokens,
    weighting,
)

_HEDGEHOG = tl.constexpr(MAPS["hedgehog"])


@triton.jit
def _encode_kernel(
    history, key_weight, value_weight, sums, offsets, firsts, requests, rows, weights, ages, decay,
    D: tl.constexpr, H: tl.constexpr, WIDTH: tl.constexpr, MAP: tl.constexpr, WEIGHTS: tl.constexpr,
    AGES: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, STATE: tl.constexpr,
    CHUNK: tl.constexpr, HEADS: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """S and z of a chunk for a group of heads; if D has several tiles, each stores its part of S."""
    chunk, group, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    _request, first, end = chunk_rows(offsets, firsts, chunk, requests, rows, CHUNK)
    head, nth, real, inside = columns(group, H, WIDTH, HEADS, PADDED)
    dim = part * TILE + tl.arange(0, TILE)
    tokens = tl.zeros([HEADS * PADDED, TILE], dtype=tl.float32)
    total = tl.zeros([HEADS * PADDED], dtype=tl.float32)
    if MAP == _HEDGEHOG:
        other_tokens = tl.zeros([HEADS * PADDED, TILE], dtype=tl.float32)
        other_total = tl.zeros([HEADS * PADDED], dtype=tl.float32)
    for start in tl.range(first, end, ROWS, disable_licm=MAP == _HEDGEHOG or tl.float32 == DOT):
        row = tl.arange(0, ROWS)
        valid = row < end - start
        at = history + start * D
        key, x = project(at, row, valid, key_weight, head * WIDTH + nth, real, D, TILE, DOT, PRECISION)
        if TILE < D:
            x = load_rows(at, row, valid, dim, D, DOT)
        phi, other = features(key, inside, MAP, HEADS, PADDED)
        heads = group * HEADS + tl.arange(0, HEADS)
        _decayed, weight = event_weights(
            weights, ages, decay, start, row, valid, heads, H, WEIGHTS, AGES
        )
        weight = to_columns(weight, HEADS, PADDED)
        phi = phi * weight
        tokens = tl.dot(tl.trans(phi.to(DOT)), x, tokens, input_precision=PRECISION)
        total += tl.sum(phi, 0)
        if MAP == _HEDGEHOG:
            other = other * weight
            other_tokens = tl.dot(tl.trans(other.to(DOT)), x, other_tokens, input_precision=PRECISION)
            other_total += tl.sum(other, 0)
    value = tl.trans(load_rows(value_weight, head * WIDTH + nth, real, dim, D, tl.float32))
    MAP_COUNT: tl.constexpr = 2 if MAP == _HEDGEHOG else 1
    FEATURES: tl.constexpr = H * MAP_COUNT * WIDTH
    out = sums + (chunk * tl.num_programs(2) + part) * (FEATURES * (WIDTH + 1))
    feature = head * MAP_COUNT * WIDTH + nth
    state = tl.dot(tokens, value, input_precision=STATE)
    store_state(out, state, total, head, nth, real, feature, part == 0, FEATURES, WIDTH)
    if MAP == _HEDGEHOG:
        state = tl.dot(other_tokens, value, input_precision=STATE)
        feature += WIDTH
        store_state(out, state, other_total, head, nth, real, feature, part == 0, FEATURES, WIDTH)


@triton.jit
def _encode_backward_kernel(
    history, key_weight, value_weight, grad_key_value, grad_key_sum, grad_history, grad_weights, sums,
    offsets, firsts, requests, rows, weights, ages, decay, count, each, groups,
    D: tl.constexpr, H: tl.constexpr, WIDTH: tl.constexpr, MAP: tl.constexpr, WEIGHTS: tl.constexpr,
    AGES: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr,
    HEADS: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
    OF_ROWS: tl.constexpr, OF_SUMS: tl.constexpr,
):  # fmt: skip
    """For ``each`` chunks: with OF_ROWS the gradients of their events, with OF_SUMS those of both
    projections.

    Loops over ``groups`` groups of heads; the gradients of projections are for one group.
    """
    program, part = tl.program_id(0).to(tl.int64), tl.program_id(2)
    FEATURES: tl.constexpr = H * (2 if MAP == _HEDGEHOG else 1) * WIDTH
    dim = part * TILE + tl.arange(0, TILE)
    if OF_SUMS:
        keys = tl.zeros([HEADS * PADDED, TILE], dtype=tl.float32)
        values = tl.zeros([HEADS * PADDED, TILE], dtype=tl.float32)
    for chunk in range(program * each, tl.minimum(program * each + each, count)):
        request, first, end = chunk_rows(offsets, firsts, chunk, requests, rows, CHUNK)
        # hoisting loads out of the loop would take too many registers
        for start in tl.range(first, end, ROWS, disable_licm=True):
            row = tl.arange(0, ROWS)
            valid = row < end - start
            at = history + start * D
            of_state = grad_key_value + request * (FEATURES * WIDTH)
            of_sum = grad_key_sum + request * FEATURES
            if OF_ROWS:
                grad_x = tl.zeros([ROWS, TILE], dtype=tl.float32)
                grad_event = tl.zeros([ROWS], dtype=tl.float32)
            for nth_group in range(groups):
                group = tl.program_id(1) + nth_group
                head, nth, real, _ = columns(group, H, WIDTH, HEADS, PADDED)
                weight_row = head * WIDTH + nth
                grad_key, grad_value, grad_weight, x = _grad_projections(
                    at, start, row, valid, key_weight, value_weight, of_state, of_sum, group,
                    weights, ages, decay, D, H, WIDTH, MAP, WEIGHTS, AGES, DOT, PRECISION,
                    HEADS, PADDED, TILE,
                )  # fmt: skip
                if OF_ROWS:
                    w = load_rows(key_weight, weight_row, real, dim, D, DOT)
                    grad_x = tl.dot(grad_key, w, grad_x, input_precision=PRECISION)
                    w = load_rows(value_weight, weight_row, real, dim, D, DOT)
                    grad_x = tl.dot(grad_value, w, grad_x, input_precision=PRECISION)
                    grad_event += tl.sum(grad_weight, 1)
                    if WEIGHTS == 2 and part == 0:
                        heads = group * HEADS + tl.arange(0, HEADS)
                        mask = valid[:, None] & (heads < H)[None, :]
                        to = grad_weights + start * H + row[:, None] * H + heads[None, :]
                        tl.store(to, grad_weight, mask=mask)
                if OF_SUMS:
                    if TILE < D:
                        x = load_rows(at, row, valid, dim, D, DOT)
                    keys = tl.dot(tl.trans(grad_key), x, keys, input_precision=PRECISION)
                    values = tl.dot(tl.trans(grad_value), x, values, input_precision=PRECISION)
            if OF_ROWS:
                store_rows(grad_history + start * D, grad_x, row, valid, dim, D)
                if WEIGHTS == 1 and part == 0:
                    tl.store(grad_weights + start + row, grad_event, mask=valid)
    if OF_SUMS:
        head, nth, real, _ = columns(tl.program_id(1), H, WIDTH, HEADS, PADDED)
        to, weight_row = sums + program * (2 * H * WIDTH * D), head * WIDTH + nth
        store_rows(to, keys, weight_row, real, dim, D)
        store_rows(to + H * WIDTH * D, values, weight_row, real, dim, D)


@triton.jit
def _grad_projections(
    history, start, row, valid, key_weight, value_weight, grad_key_value, grad_key_sum,
    group, weights, ages, decay, D: tl.constexpr, H: tl.constexpr, WIDTH: tl.constexpr,
    MAP: tl.constexpr, WEIGHTS: tl.constexpr, AGES: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, HEADS: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """For a group of heads, the gradients of keys and values [R, COLUMNS] and of w [R, HEADS]; and x.

    ``history`` points to its row ``start``, the gradients of S and z to those of the request.
    """
    head, nth, real, inside = columns(group, H, WIDTH, HEADS, PADDED)
    weight_row = head * WIDTH + nth
    key, x = project(history, row, valid, key_weight, weight_row, real, D, TILE, DOT, PRECISION)
    value, x = project(history, row, valid, value_weight, weight_row, real, D, TILE, DOT, PRECISION)
    value = value.to(DOT)
    phi, other = features(key, inside, MAP, HEADS, PADDED)
    heads = group * HEADS + tl.arange(0, HEADS)
    decayed, weight = event_weights(weights, ages, decay, start, row, valid, heads, H, WEIGHTS, AGES)
    weight = to_columns(weight, HEADS, PADDED)
    MAP_COUNT: tl.constexpr = 2 if MAP == _HEDGEHOG else 1
    feature = head * MAP_COUNT * WIDTH + nth
    state, total = load_state(grad_key_value, grad_key_sum, head, nth, real, feature, WIDTH)
    state = state.to(DOT)
    grad = tl.dot(value, tl.trans(state), input_precision=PRECISION) + total[None, :]
    grad_value = tl.dot((phi * weight).to(DOT), state, input_precision=PRECISION)
    grad_weight = head_sums(grad * phi, HEADS, PADDED)
    other_grad = grad
    if MAP == _HEDGEHOG:
        state, total = load_state(grad_key_value, grad_key_sum, head, nth, real, feature + WIDTH, WIDTH)
        state = state.to(DOT)
        other_grad = tl.dot(value, tl.trans(state), input_precision=PRECISION) + total[None, :]
        grad_value = tl.dot((other * weight).to(DOT), state, grad_value, input_precision=PRECISION)
        grad_weight += head_sums(other_grad * other, HEADS, PADDED)
    grad_key = features_backward(grad * weight, other_grad * weight, key, phi, other, MAP, HEADS, PADDED)
    return grad_key.to(DOT), grad_value.to(DOT), grad_weight * decayed, x


# ------------------------------------------------------------------------------------ on the host


def _constants(given: EncodeArguments, tile: Tile, chunks: Chunks) -> dict[str, Any]:
    """The constants of both kernels."""
    heads, width, dim = given.key_weight.shape
    sizes = {"D": dim, "H": heads, "WIDTH": width, "MAP": MAPS[given.feature_map]}
    products = Products.of(given.history.dtype)
    return sizes | products._asdict() | tile._asdict() | {"CHUNK": chunks.size}


def _arguments(
    given: EncodeArguments, value_dtype: torch.dtype | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of both kernels, and the constants that describe them."""
    heads, width, dim = given.key_weight.shape
    arguments, constants = weighting(given.weights, given.ages, given.decay, len(given.history))
    arguments["history"] = tokens(given.history, dim)
    dtype = Products.of(given.history.dtype).dtype
    arguments["key_weight"] = floats(given.key_weight, heads, width, dim, dtype=dtype)
    arguments["value_weight"] = floats(given.value_weight, heads, width, dim, dtype=value_dtype or dtype)
    return arguments, constants


def encode(given: EncodeArguments) -> tuple[Tensor, Tensor]:
    """See ``ifa_torchrec.ops.encode``."""
    if given.key_weight.shape[1] > WIDEST_HEAD:
        return wide.encode(given)
    heads, width, dim = given.key_weight.shape
    maps = FEATURE_MAPS[given.feature_map].expansion
    chunks = Chunks.of(given.offsets, len(given.history))
    light = is_light(given.feature_map, given.history.dtype)
    tile = Tile.of((heads, width, dim), 64, 64, light, given.history.device)
    parts, features = triton.cdiv(dim, tile.TILE), heads * width * maps
    sums = given.history.new_empty(chunks.count * parts, features * (width + 1), dtype=torch.float32)
    arguments, constants = _arguments(given, torch.float32)
    launch(
        _encode_kernel,
        (chunks.count, tile.groups(heads), parts),
        arguments | chunks.arguments | {"sums": sums},
        constants
        | _constants(given, tile, chunks)
        | {"STATE": Products.of(given.history.dtype).of_sums},
        warps=4 if light else 8,
        stages=2,
    )
    return split_state(sum_segments(sums, chunks.firsts * parts), heads, width)


def encode_backward(
    grad_key_value: Tensor, grad_key_sum: Tensor, given: EncodeArguments
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of history, key_weight, value_weight and weights."""
    if given.key_weight.shape[1] > WIDEST_HEAD:
        return wide.encode_backward(grad_key_value, grad_key_sum, given)
    history, weights = given.history, given.weights
    heads, width, dim = given.key_weight.shape
    features = width * FEATURE_MAPS[given.feature_map].expansion
    chunks = Chunks.of(given.offsets, len(history))
    light = is_light(given.feature_map, history.dtype)
    tile = Tile.of((heads, width, dim), 64, 32, light, history.device)
    groups, parts = tile.groups(heads), triton.cdiv(dim, tile.TILE)
    programs, _ = backward_programs(chunks.count)
    grad_history = history.new_empty(history.shape)
    grad_weights = grad_like(weights, history).float()
    sums = history.new_empty(programs, 2, heads, width, dim, dtype=torch.float32)
    arguments, constants = _arguments(given)
    arguments |= chunks.arguments | {
        "grad_key_value": floats(grad_key_value, chunks.requests, heads, features, width),
        "grad_key_sum": floats(grad_key_sum, chunks.requests, heads, features),
        **{"grad_history": grad_history, "grad_weights": grad_weights, "sums": sums},
    }
    constants |= _constants(given, tile, chunks)
    launch_backward(_encode_backward_kernel, arguments, constants, (chunks.count, groups, parts))
    grad_key, grad_value = sums.sum(0)
    return (
        grad_history,
        grad_key.to(given.key_weight.dtype, copy=True),
        grad_value.to(given.value_weight.dtype, copy=True),
        grad_weights if weights is None else grad_weights.to(weights.dtype),
    )
