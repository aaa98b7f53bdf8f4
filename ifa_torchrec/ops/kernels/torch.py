"""The `torch` backend: jagged, tiled, absorbed, any device and dtype.

Absorbed: S_h = (sum_i w_hi phi(k_hi) x_i^T) Wv_h, so values are never projected per event, and the
sums of all heads are one matrix product. Tiled: at most TILE rows are processed at a time; the
backward projects a tile's keys again instead of keeping phi(k) of all N events.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ifa_torchrec.ops.arguments import (
    AttendArguments,
    AttendSoftmaxArguments,
    EncodeArguments,
    grad_like,
    sum_dtype,
)
from ifa_torchrec.ops.feature_maps import FEATURE_MAPS
from ifa_torchrec.ops.kernels.joining import as_given, match, match_backward, row_weights
from ifa_torchrec.ops.kernels.tiling import put_rows, room_for_rows, tile_rows, tiles

__all__ = [
    "attend",
    "attend_backward",
    "attend_softmax",
    "attend_softmax_backward",
    "encode",
    "encode_backward",
    "match",
    "match_backward",
]


def _tile_features(tokens: Tensor, weight: Tensor, feature_map: str) -> tuple[Tensor, Tensor]:
    """Projections [b, H, d, L] of a tile's tokens [b, L, D], and their phi [b, H, d_phi, L].

    Rows are the innermost dimension, so that sums over a head's few features use whole vectors.
    """
    projected = torch.matmul(weight.flatten(0, 1), tokens.mT).unflatten(1, weight.shape[:2])
    return projected, FEATURE_MAPS[feature_map].forward(projected, -2)


def _tile_weights(
    weights: Tensor | None,
    ages: Tensor | None,
    decay: Tensor,
    tokens: Tensor,
    row: Tensor,
    valid: Tensor,
) -> Tensor:
    """w_hi for a tile, [b, H, 1, L], zero where padded."""
    weight = row_weights(weights, ages, decay, tokens.flatten(0, 1), row.flatten())
    return weight.unflatten(0, row.shape).masked_fill(~valid[..., None], 0).mT[:, :, None]


# ------------------------------------------------------------------------------------- encode


def encode(given: EncodeArguments) -> tuple[Tensor, Tensor]:
    """See ``ifa_torchrec.ops.encode``."""
    history, offsets, key_weight, value_weight, weights, ages, decay, feature_map = given
    dtype = sum_dtype(history.dtype)
    requests, (heads, width, dim) = len(offsets) - 1, key_weight.shape
    features = heads * width * FEATURE_MAPS[feature_map].expansion
    key_weight = key_weight.to(dtype)
    key_token = history.new_zeros(requests, features, dim, dtype=dtype)
    key_sum = history.new_zeros(requests, features, dtype=dtype)
    for request, row, valid in tiles(offsets, len(history)):
        tokens = tile_rows(history, row, valid).to(dtype)
        _, phi = _tile_features(tokens, key_weight, feature_map)
        phi = (phi * _tile_weights(weights, ages, decay, tokens, row, valid)).flatten(1, 2)
        key_token.index_add_(0, request, torch.bmm(phi, tokens))
        key_sum.index_add_(0, request, phi.sum(-1))
    shape = (requests, heads, features // heads)
    key_value = torch.einsum("bhfD,hdD->bhfd", key_token.view(*shape, dim), value_weight.to(dtype))
    return key_value.contiguous(), key_sum.view(shape)


def encode_backward(
    grad_key_value: Tensor, grad_key_sum: Tensor, given: EncodeArguments
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of history, key_weight, value_weight and weights."""
    history, offsets, key_weight, value_weight, weights, ages, decay, feature_map = given
    dtype = sum_dtype(history.dtype)
    backward = FEATURE_MAPS[feature_map].backward
    flat_weight = torch.cat([key_weight.flatten(0, 1), value_weight.flatten(0, 1)]).to(dtype)
    grad_token = torch.einsum("bhfd,hdD->bhfD", grad_key_value, value_weight.to(dtype)).flatten(1, 2)
    grad_sum = grad_key_sum.flatten(1, 2)
    grad_history = room_for_rows(history, len(history), history.shape[1])
    grad_projections = torch.zeros_like(flat_weight)
    grad_weights = grad_like(weights, history)
    if weights is not None:
        grad_weights = room_for_rows(weights, *weights.shape)
    for request, row, valid in tiles(offsets, len(history)):
        tokens = tile_rows(history, row, valid).to(dtype)
        projected, phi = _tile_features(tokens, key_weight.to(dtype), feature_map)
        weight = _tile_weights(weights, ages, decay, tokens, row, valid)
        grad_values = torch.matmul(grad_key_value[request].mT, phi * weight).flatten(1, 2)
        grad_weighted = torch.bmm(grad_token[request], tokens.mT) + grad_sum[request][..., None]
        grad_weighted = grad_weighted.view_as(phi)
        grad_keys = backward(grad_weighted * weight, projected, phi, -2).flatten(1, 2)
        # one product for keys and values and all rows of the tile: a product per request, of few rows
        # each, would mostly be writing
        grad_rows = torch.cat([x.transpose(0, 1) for x in (grad_keys, grad_values)]).flatten(1)
        grad_projections += grad_rows @ tokens.flatten(0, 1)
        grad_tokens = (grad_rows.T @ flat_weight).view_as(tokens)
        put_rows(grad_history, row, valid, grad_tokens)
        if weights is not None:
            decayed = _tile_weights(None, ages, decay, tokens, row, valid)
            grad_weight = ((grad_weighted * phi).sum(2) * decayed[:, :, 0]).mT
            put_rows(grad_weights, row, valid, as_given(grad_weight, weights))
    grad_key_weight, grad_value_weight = grad_projections.view(2, *key_weight.shape)
    return (
        grad_history[: len(history)],
        grad_key_weight.to(key_weight.dtype, copy=True),
        grad_value_weight.to(value_weight.dtype, copy=True),
        grad_weights if weights is None else grad_weights[: len(weights)],
    )


# ------------------------------------------------------------------------------------- attend


def _heads_last(tile: Tensor, heads: int) -> Tensor:
    """[b * H, L, x] -> [b, L, H, x]."""
    return tile.unflatten(0, (-1, heads)).transpose(1, 2)


def _heads_first(tile: Tensor) -> Tensor:
    """[b, L, H, x] -> [b * H, L, x], for one bmm over requests and heads."""
    return tile.transpose(1, 2).flatten(0, 1)


def attend(given: AttendArguments) -> tuple[Tensor, Tensor]:
    """See ``ifa_torchrec.ops.attend``."""
    candidates, offsets, query_weight, key_value, key_sum, feature_map, eps = given
    heads, width = query_weight.shape[0], key_value.shape[-1]
    dtype = sum_dtype(key_value.dtype)
    query_weight, key_value, key_sum = (x.to(dtype) for x in (query_weight, key_value, key_sum))
    out = room_for_rows(key_value, len(candidates), heads, width)
    normalizer = room_for_rows(key_value, len(candidates), heads)
    for request, row, valid in tiles(offsets, len(candidates)):
        tokens = tile_rows(candidates, row, valid).to(dtype)
        phi = _tile_features(tokens, query_weight, feature_map)[1].flatten(0, 1).mT
        numerator = torch.bmm(phi, key_value[request].flatten(0, 1))
        total = torch.bmm(phi, key_sum[request].flatten(0, 1)[..., None])
        put_rows(out, row, valid, _heads_last(numerator / (total + eps), heads))
        put_rows(normalizer, row, valid, _heads_last(total, heads)[..., 0])
    return out[:-1], normalizer[:-1]


def attend_backward(
    grad_out: Tensor, grad_normalizer: Tensor, given: AttendArguments
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of candidates, query_weight, key_value and key_sum."""
    candidates, offsets, query_weight, key_value, key_sum, feature_map, eps = given
    heads = query_weight.shape[0]
    backward = FEATURE_MAPS[feature_map].backward
    dtypes = [x.dtype for x in (query_weight, key_value, key_sum)]
    dtype = sum_dtype(key_value.dtype)
    weight, key_value, key_sum = (x.to(dtype) for x in (query_weight, key_value, key_sum))
    flat_weight = weight.flatten(0, 1)
    grad_candidates = room_for_rows(candidates, *candidates.shape)
    grad_query_weight, grad_key_value, grad_key_sum = (
        x.new_zeros(x.shape) for x in (flat_weight, key_value, key_sum)
    )
    for request, row, valid in tiles(offsets, len(candidates)):
        tokens = tile_rows(candidates, row, valid).to(dtype)
        projected, phi_tile = _tile_features(tokens, weight, feature_map)
        phi = phi_tile.flatten(0, 1).mT
        state, total = key_value[request].flatten(0, 1), key_sum[request].flatten(0, 1)
        divisor = torch.bmm(phi, total[..., None]) + eps
        out = torch.bmm(phi, state) / divisor
        # a padded row repeats another row, so its gradient is masked out
        upstream = _heads_first(grad_out[row].masked_fill(~valid[..., None, None], 0))
        upstream_normalizer = _heads_first(
            grad_normalizer[row].masked_fill(~valid[..., None], 0)[..., None]
        )
        grad_numerator = upstream / divisor
        grad_divisor = upstream_normalizer - (grad_numerator * out).sum(-1, keepdim=True)
        grad_key_value.index_add_(
            0, request, torch.bmm(phi.mT, grad_numerator).unflatten(0, (-1, heads))
        )
        grad_key_sum.index_add_(
            0, request, torch.bmm(phi.mT, grad_divisor)[..., 0].unflatten(0, (-1, heads))
        )
        grad_phi = torch.bmm(state, grad_numerator.mT) + total[..., None] * grad_divisor.mT
        grad_phi = grad_phi.unflatten(0, (-1, heads))
        grad_projected = backward(grad_phi, projected, phi_tile, -2).flatten(1, 2)
        grad_query_weight += torch.bmm(grad_projected, tokens).sum(0)
        grad_tokens = torch.matmul(grad_projected.mT, flat_weight)
        put_rows(grad_candidates, row, valid, grad_tokens)
    return (
        grad_candidates[:-1],
        grad_query_weight.view_as(weight).to(dtypes[0]),
        grad_key_value.to(dtypes[1]),
        grad_key_sum.to(dtypes[2]),
    )


# ----------------------------------------------------------------------------- attend_softmax


def _shares(query: Tensor, mean: Tensor, log_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax weights [n, L, R] of summaries [n, R, d] for queries [n, L, d], and log_sum [n, L, 1]."""
    score = torch.baddbmm(log_weight[:, None], query, mean.mT, alpha=query.shape[-1] ** -0.5)
    log_sum = score.logsumexp(-1, keepdim=True)
    return (score - log_sum.masked_fill(log_sum == -torch.inf, 0.0)).exp(), log_sum


def _tile_queries(tokens: Tensor, weight: Tensor) -> Tensor:
    """Projections [b * H, L, d] of a tile's tokens [b, L, D]."""
    return torch.matmul(weight.flatten(0, 1), tokens.mT).unflatten(1, weight.shape[:2]).flatten(0, 1).mT


def attend_softmax(given: AttendSoftmaxArguments) -> tuple[Tensor, Tensor]:
    """See ``ifa_torchrec.ops.attend_softmax``."""
    candidates, offsets, query_weight, mean, log_weight = given
    heads, width = query_weight.shape[0], mean.shape[-1]
    dtype = sum_dtype(mean.dtype)
    query_weight, mean, log_weight = (x.to(dtype) for x in (query_weight, mean, log_weight))
    out = room_for_rows(mean, len(candidates), heads, width)
    log_sum = room_for_rows(mean, len(candidates), heads)
    for request, row, valid in tiles(offsets, len(candidates)):
        query = _tile_queries(tile_rows(candidates, row, valid).to(dtype), query_weight)
        summaries = mean[request].flatten(0, 1)
        share, total = _shares(query, summaries, log_weight[request].flatten(0, 1))
        put_rows(out, row, valid, _heads_last(torch.bmm(share, summaries), heads))
        put_rows(log_sum, row, valid, _heads_last(total, heads)[..., 0])
    return out[:-1], log_sum[:-1]


def attend_softmax_backward(
    grad_out: Tensor, grad_log_sum: Tensor, given: AttendSoftmaxArguments
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of candidates, query_weight, summaries and log_weight."""
    candidates, offsets, query_weight, mean, log_weight = given
    heads, width = query_weight.shape[:2]
    dtypes = [x.dtype for x in (query_weight, mean, log_weight)]
    dtype = sum_dtype(mean.dtype)
    weight, mean, log_weight = (x.to(dtype) for x in (query_weight, mean, log_weight))
    flat_weight = weight.flatten(0, 1)
    grad_candidates = room_for_rows(candidates, *candidates.shape)
    grad_query_weight, grad_mean, grad_log_weight = (
        x.new_zeros(x.shape) for x in (flat_weight, mean, log_weight)
    )
    for request, row, valid in tiles(offsets, len(candidates)):
        tokens = tile_rows(candidates, row, valid).to(dtype)
        query, summaries = _tile_queries(tokens, weight), mean[request].flatten(0, 1)
        share, _ = _shares(query, summaries, log_weight[request].flatten(0, 1))
        # a padded row repeats another row, so its gradient is masked out
        upstream = _heads_first(grad_out[row].masked_fill(~valid[..., None, None], 0))
        upstream_log_sum = _heads_first(grad_log_sum[row].masked_fill(~valid[..., None], 0)[..., None])
        grad_share = torch.bmm(upstream, summaries.mT)
        grad_share += upstream_log_sum - (share * grad_share).sum(-1, keepdim=True)
        grad_score = share * grad_share
        grad_product = grad_score * width**-0.5
        grad_summaries = torch.bmm(share.mT, upstream) + torch.bmm(grad_product.mT, query)
        grad_mean.index_add_(0, request, grad_summaries.unflatten(0, (-1, heads)))
        grad_log_weight.index_add_(0, request, grad_score.sum(1).unflatten(0, (-1, heads)))
        grad_query = torch.bmm(grad_product, summaries)
        grad_rows = _heads_last(grad_query, heads).flatten(2)  # [b, L, H * d]
        grad_query_weight += grad_rows.flatten(0, 1).T @ tokens.flatten(0, 1)
        put_rows(grad_candidates, row, valid, grad_rows @ flat_weight)
    return (
        grad_candidates[:-1],
        grad_query_weight.view_as(weight).to(dtypes[0]),
        grad_mean.to(dtypes[1]),
        grad_log_weight.to(dtypes[2]),
    )
