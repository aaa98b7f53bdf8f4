# Device code is written in Triton's language, whose types pyright does not know.
# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportMissingImports=false, reportOperatorIssue=false
"""Kernels for wide heads: COLUMNS of a head's features at a time, for the rows of encode and attend.

A row x [D] is projected to features and paired with a row y [E]: in encode x itself (ENCODES), in the
backward of attend the gradient of a head's numerator, one y per head. See ``wide`` for how both map to
these kernels. x is multiplied with DOT and PRECISION, y and sums with OTHER and OTHER_PRECISION.

hedgehog's softmax over a head is exp(x - log_sum). Once the log sums are known, and for the backward the
sums of gradient times phi, its features are as independent of each other as elu's.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ifa_torchrec.ops.kernels.triton.common import (
    MAPS,
    chunk_rows,
    features,
    features_backward,
    load_rows,
    store_rows,
)

_HEDGEHOG = tl.constexpr(MAPS["hedgehog"])


@triton.jit
def _project(
    inputs, row, valid, weight, weight_row, real,
    D: tl.constexpr, TILE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Like ``common.project``, but not unrolled: D above 64 would take too many registers."""
    product = tl.zeros([row.shape[0], real.shape[0]], dtype=tl.float32)
    for first in tl.range(0, D, TILE, disable_licm=True):
        dim = first + tl.arange(0, TILE)
        x = load_rows(inputs, row, valid, dim, D, DOT)
        w = load_rows(weight, weight_row, real, dim, D, DOT)
        product = tl.dot(x, tl.trans(w), product, input_precision=PRECISION)
    return product


@triton.jit
def _add_exp(top, total, x):
    """Add x [R, COLUMNS] to the running maximum and the sum of exp(x - maximum), both [R]."""
    higher = tl.maximum(top, tl.max(x, 1))
    return higher, total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher[:, None]), 1)


@triton.jit
def wide_log_sums_kernel(
    inputs, weight, log_sums, rows,
    D: tl.constexpr, H: tl.constexpr, WIDTH: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    COLUMNS: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """[rows, H, 2] for ROWS rows and a head: the logarithms of the sums of exp(x) and of exp(-x)."""
    start, head = tl.program_id(0).to(tl.int64) * ROWS, tl.program_id(1)
    row = tl.arange(0, ROWS)
    valid = row < rows - start
    top = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    other_top, other_total = top, total
    for first in tl.range(0, WIDTH, COLUMNS):
        nth = first + tl.arange(0, COLUMNS)
        real = nth < WIDTH
        x = _project(
            inputs + start * D, row, valid, weight, head * WIDTH + nth, real, D, TILE, DOT, PRECISION
        )
        top, total = _add_exp(top, total, tl.where(real[None, :], x, float("-inf")))
        x = tl.where(real[None, :], -x, float("-inf"))
        other_top, other_total = _add_exp(other_top, other_total, x)
    at = log_sums + start * (2 * H) + row * (2 * H) + 2 * head
    tl.store(at, top + tl.log(total), mask=valid)
    tl.store(at + 1, other_top + tl.log(other_total), mask=valid)


@triton.jit
def _wide_features(
    x, log_sums, row, valid, head, real, H: tl.constexpr, MAP: tl.constexpr, COLUMNS: tl.constexpr
):
    """Both halves of phi [R, COLUMNS], as ``features`` returns; ``log_sums`` points to the first row."""
    if MAP == _HEDGEHOG:
        at = log_sums + row * (2 * H) + 2 * head
        log_sum = tl.load(at, mask=valid, other=0.0)[:, None]
        phi = tl.where(real[None, :], tl.exp(x - log_sum), 0.0)
        log_sum = tl.load(at + 1, mask=valid, other=0.0)[:, None]
        return phi, tl.where(real[None, :], tl.exp(-x - log_sum), 0.0)
    return features(x, real[None, :], MAP, 1, COLUMNS)


@triton.jit
def _scales_of(scales, row, valid, head, H: tl.constexpr, ENCODES: tl.constexpr):
    """The factors of phi and of p for a head, both [R]: w and 1 in encode, 1 and the gradient of the
    normalizer in attend."""
    scale = tl.load(scales + row * H + head, mask=valid, other=0.0)
    one = tl.where(valid, 1.0, 0.0)
    if ENCODES:
        return scale, one
    return one, scale


@triton.jit
def wide_sums_kernel(
    inputs, weight, log_sums, scales, others, sums, offsets, firsts, requests, rows,
    D: tl.constexpr, H: tl.constexpr, WIDTH: tl.constexpr, MAP: tl.constexpr, E: tl.constexpr,
    ENCODES: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, OTHER: tl.constexpr,
    OTHER_PRECISION: tl.constexpr, CHUNK: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """For a chunk, some features and a tile of y: the sums of phi y^T, and after all these, of phi."""
    chunk, part = tl.program_id(0).to(tl.int64), tl.program_id(2)
    _request, first, end = chunk_rows(offsets, firsts, chunk, requests, rows, CHUNK)
    TILES: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    head = tl.program_id(1) // TILES
    nth = tl.program_id(1) % TILES * COLUMNS + tl.arange(0, COLUMNS)
    real, entry = nth < WIDTH, part * TILE + tl.arange(0, TILE)
    GROUPS: tl.constexpr = 1 if ENCODES else H  # rows y per row x
    state = tl.zeros([COLUMNS, TILE], dtype=tl.float32)
    total = tl.zeros([COLUMNS], dtype=tl.float32)
    other_state, other_total = state, total
    for start in tl.range(first, end, ROWS, disable_licm=True):
        row = tl.arange(0, ROWS)
        valid = row < end - start
        x = _project(
            inputs + start * D, row, valid, weight, head * WIDTH + nth, real, D, TILE, DOT, PRECISION
        )
        phi, other = _wide_features(
            x, log_sums + start * (2 * H), row, valid, head, real, H, MAP, COLUMNS
        )
        scale, of_total = _scales_of(scales + start * H, row, valid, head, H, ENCODES)
        at = others + start * (GROUPS * E)
        y = load_rows(at, row * GROUPS + head % GROUPS, valid, entry, E, OTHER)
        phi = phi * scale[:, None]
        state = tl.dot(tl.trans(phi.to(OTHER)), y, state, input_precision=OTHER_PRECISION)
        total += tl.sum(phi * of_total[:, None], 0)
        if MAP == _HEDGEHOG:
            other = other * scale[:, None]
            other_state = tl.dot(
                tl.trans(other.to(OTHER)), y, other_state, input_precision=OTHER_PRECISION
            )
            other_total += tl.sum(other * of_total[:, None], 0)
    MAP_COUNT: tl.constexpr = 2 if MAP == _HEDGEHOG else 1
    FEATURES: tl.constexpr = H * MAP_COUNT * WIDTH
    out, feature = sums + chunk * (FEATURES * (E + 1)), head * MAP_COUNT * WIDTH + nth
    store_rows(out, state, feature, real, entry, E)
    if part == 0:
        tl.store(out + FEATURES * E + feature, total, mask=real)
    if MAP == _HEDGEHOG:
        store_rows(out, other_state, feature + WIDTH, real, entry, E)
        if part == 0:
            tl.store(out + FEATURES * E + feature + WIDTH, other_total, mask=real)


@triton.jit
def wide_attend_kernel(
    inputs, weight, log_sums, key_value, key_sum, out, normalizers, offsets, firsts, requests, rows, eps,
    D: tl.constexpr, H: tl.constexpr, WIDTH: tl.constexpr, MAP: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, OTHER_PRECISION: tl.constexpr, CHUNK: tl.constexpr, COLUMNS: tl.constexpr,
    TILE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The normalizers and a tile of the outputs for a chunk of candidates and a head."""
    chunk, head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    request, first, end = chunk_rows(offsets, firsts, chunk, requests, rows, CHUNK)
    MAP_COUNT: tl.constexpr = 2 if MAP == _HEDGEHOG else 1
    of_state = key_value + (request * H + head) * (MAP_COUNT * WIDTH * WIDTH)
    of_sum = key_sum + (request * H + head) * (MAP_COUNT * WIDTH)
    entry = part * TILE + tl.arange(0, TILE)
    for start in tl.range(first, end, ROWS, disable_licm=True):
        row = tl.arange(0, ROWS)
        valid = row < end - start
        numerator = tl.zeros([ROWS, TILE], dtype=tl.float32)
        normalizer = tl.zeros([ROWS], dtype=tl.float32)
        for first_feature in tl.range(0, WIDTH, COLUMNS, disable_licm=True):
            nth = first_feature + tl.arange(0, COLUMNS)
            real = nth < WIDTH
            x = _project(
                inputs + start * D, row, valid, weight, head * WIDTH + nth, real, D, TILE, DOT, PRECISION
            )
            phi, other = _wide_features(
                x, log_sums + start * (2 * H), row, valid, head, real, H, MAP, COLUMNS
            )
            state = load_rows(of_state, nth, real, entry, WIDTH, tl.float32)
            numerator = tl.dot(phi, state, numerator, input_precision=OTHER_PRECISION)
            normalizer += tl.sum(phi * tl.load(of_sum + nth, mask=real, other=0.0)[None, :], 1)
            if MAP == _HEDGEHOG:
                nth += WIDTH
                state = load_rows(of_state, nth, real, entry, WIDTH, tl.float32)
                numerator = tl.dot(other, state, numerator, input_precision=OTHER_PRECISION)
                normalizer += tl.sum(other * tl.load(of_sum + nth, mask=real, other=0.0)[None, :], 1)
        value = numerator / (normalizer + eps)[:, None]
        store_rows(out + start * (H * WIDTH), value, row * H + head, valid, entry, WIDTH)
        if part == 0:
            tl.store(normalizers + start * H + row * H + head, normalizer, mask=valid)


@triton.jit
def _grad_of_features(
    others, row, valid, head, state, total, of_total, feature, real,
    H: tl.constexpr, E: tl.constexpr, ENCODES: tl.constexpr, OTHER: tl.constexpr,
    OTHER_PRECISION: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """P y + p, [R, COLUMNS]; ``others`` points to the first row, P and p are the request's."""
    GROUPS: tl.constexpr = 1 if ENCODES else H
    y_row = row * GROUPS + head % GROUPS
    grad = _project(others, y_row, valid, state, feature, real, E, TILE, OTHER, OTHER_PRECISION)
    return grad + of_total[:, None] * tl.load(total + feature, mask=real, other=0.0)[None, :]


@triton.jit
def wide_totals_kernel(
    inputs, weight, log_sums, scales, others, state, total, totals, offsets, firsts, requests, rows,
    D: tl.constexpr, H: tl.constexpr, WIDTH: tl.constexpr, MAP: tl.constexpr, E: tl.constexpr,
    ENCODES: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, OTHER: tl.constexpr,
    OTHER_PRECISION: tl.constexpr, CHUNK: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """[rows, H, 2] for a chunk and a head: the sums of the gradient of phi times phi, by half of phi."""
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    request, first, end = chunk_rows(offsets, firsts, chunk, requests, rows, CHUNK)
    MAP_COUNT: tl.constexpr = 2 if MAP == _HEDGEHOG else 1
    FEATURES: tl.constexpr = H * MAP_COUNT * WIDTH
    GROUPS: tl.constexpr = 1 if ENCODES else H
    of_state, of_total = state + request * (FEATURES * E), total + request * FEATURES
    for start in tl.range(first, end, ROWS, disable_licm=True):
        row = tl.arange(0, ROWS)
        valid = row < end - start
        sums = tl.zeros([ROWS], dtype=tl.float32)
        other_sums = sums
        _scale, scale = _scales_of(scales + start * H, row, valid, head, H, ENCODES)
        for first_feature in tl.range(0, WIDTH, COLUMNS, disable_licm=True):
            nth = first_feature + tl.arange(0, COLUMNS)
            real, feature = nth < WIDTH, head * MAP_COUNT * WIDTH + nth
            x = _project(
                inputs + start * D, row, valid, weight, head * WIDTH + nth, real, D, TILE, DOT, PRECISION
            )
            phi, other = _wide_features(
                x, log_sums + start * (2 * H), row, valid, head, real, H, MAP, COLUMNS
            )
            y = others + start * (GROUPS * E)
            grad = _grad_of_features(
                y, row, valid, head, of_state, of_total, scale, feature, real,
                H, E, ENCODES, OTHER, OTHER_PRECISION, TILE,
            )  # fmt: skip
            sums += tl.sum(grad * phi, 1)
            if MAP == _HEDGEHOG:
                grad = _grad_of_features(
                    y, row, valid, head, of_state, of_total, scale, feature + WIDTH, real,
                    H, E, ENCODES, OTHER, OTHER_PRECISION, TILE,
                )  # fmt: skip
                other_sums += tl.sum(grad * other, 1)
        at = totals + start * (2 * H) + row * (2 * H) + 2 * head
        tl.store(at, sums, mask=valid)
        tl.store(at + 1, other_sums, mask=valid)


@triton.jit
def wide_backward_kernel(
    inputs, weight, log_sums, scales, others, state, total, totals, grad_inputs, sums,
    offsets, firsts, requests, rows, count, each, groups,
    D: tl.constexpr, H: tl.constexpr, WIDTH: tl.constexpr, MAP: tl.constexpr, E: tl.constexpr,
    ENCODES: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, OTHER: tl.constexpr,
    OTHER_PRECISION: tl.constexpr, CHUNK: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr,
    ROWS: tl.constexpr, OF_ROWS: tl.constexpr, OF_SUMS: tl.constexpr,
):  # fmt: skip
    """For ``each`` chunks: with OF_ROWS the gradients of their rows x, with OF_SUMS that of the
    projection to some features; loops over ``groups`` groups of features, as in encode."""
    program, part = tl.program_id(0).to(tl.int64), tl.program_id(2)
    dim = part * TILE + tl.arange(0, TILE)
    MAP_COUNT: tl.constexpr = 2 if MAP == _HEDGEHOG else 1
    FEATURES: tl.constexpr = H * MAP_COUNT * WIDTH
    TILES: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    GROUPS: tl.constexpr = 1 if ENCODES else H
    if OF_SUMS:
        queries = tl.zeros([COLUMNS, TILE], dtype=tl.float32)
    for chunk in range(program * each, tl.minimum(program * each + each, count)):
        request, first, end = chunk_rows(offsets, firsts, chunk, requests, rows, CHUNK)
        of_state, of_total = state + request * (FEATURES * E), total + request * FEATURES
        for start in tl.range(first, end, ROWS, disable_licm=True):
            row, at = tl.arange(0, ROWS), inputs + start * D
            valid = row < end - start
            if OF_ROWS:
                grad_x = tl.zeros([ROWS, TILE], dtype=tl.float32)
            for nth_group in tl.range(groups, disable_licm=True):
                group = tl.program_id(1) + nth_group
                head = group // TILES
                nth = group % TILES * COLUMNS + tl.arange(0, COLUMNS)
                real, feature = nth < WIDTH, head * MAP_COUNT * WIDTH + nth
                grad, phi, other = _grad_projections(
                    at, row, valid, weight, log_sums + start * (2 * H), scales + start * H,
                    others + start * (GROUPS * E), of_state, of_total, totals + start * (2 * H),
                    head, nth, real, D, H, WIDTH, MAP, E, ENCODES, DOT, PRECISION, OTHER,
                    OTHER_PRECISION, COLUMNS, TILE,
                )  # fmt: skip
                if OF_ROWS:
                    w = load_rows(weight, head * WIDTH + nth, real, dim, D, DOT)
                    grad_x = tl.dot(grad, w, grad_x, input_precision=PRECISION)
                    if ENCODES:  # y is x
                        w = load_rows(of_state, feature, real, dim, E, DOT)
                        grad_x = tl.dot(phi.to(DOT), w, grad_x, input_precision=PRECISION)
                        if MAP == _HEDGEHOG:
                            w = load_rows(of_state, feature + WIDTH, real, dim, E, DOT)
                            grad_x = tl.dot(other.to(DOT), w, grad_x, input_precision=PRECISION)
                if OF_SUMS:
                    x = load_rows(at, row, valid, dim, D, DOT)
                    queries = tl.dot(tl.trans(grad), x, queries, input_precision=PRECISION)
            if OF_ROWS:
                store_rows(grad_inputs + start * D, grad_x, row, valid, dim, D)
    if OF_SUMS:
        group = tl.program_id(1)
        nth = group % TILES * COLUMNS + tl.arange(0, COLUMNS)
        to = sums + program * (H * WIDTH * D)
        store_rows(to, queries, group // TILES * WIDTH + nth, nth < WIDTH, dim, D)


@triton.jit
def _grad_projections(
    inputs, row, valid, weight, log_sums, scales, others, state, total, totals, head, nth, real,
    D: tl.constexpr, H: tl.constexpr, WIDTH: tl.constexpr, MAP: tl.constexpr, E: tl.constexpr,
    ENCODES: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, OTHER: tl.constexpr,
    OTHER_PRECISION: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The gradient of some projections, and both halves of their scaled phi, all [R, COLUMNS].

    Arguments per row point to the first row, arguments per request to those of the request.
    """
    x = _project(inputs, row, valid, weight, head * WIDTH + nth, real, D, TILE, DOT, PRECISION)
    phi, other = _wide_features(x, log_sums, row, valid, head, real, H, MAP, COLUMNS)
    scale, of_total = _scales_of(scales, row, valid, head, H, ENCODES)
    feature = head * (2 if MAP == _HEDGEHOG else 1) * WIDTH + nth
    grad = _grad_of_features(
        others, row, valid, head, state, total, of_total, feature, real,
        H, E, ENCODES, OTHER, OTHER_PRECISION, TILE,
    )  # fmt: skip
    if MAP == _HEDGEHOG:
        other_grad = _grad_of_features(
            others, row, valid, head, state, total, of_total, feature + WIDTH, real,
            H, E, ENCODES, OTHER, OTHER_PRECISION, TILE,
        )  # fmt: skip
        at = totals + row * (2 * H) + 2 * head
        grad = phi * (grad - tl.load(at, mask=valid, other=0.0)[:, None])
        grad -= other * (other_grad - tl.load(at + 1, mask=valid, other=0.0)[:, None])
    else:
        grad = features_backward(grad, grad, x, phi, other, MAP, 1, COLUMNS)
    scale = scale[:, None]
    return (grad * scale).to(DOT), phi * scale, other * scale
