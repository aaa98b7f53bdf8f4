"""The `torch` backend: jagged, tiled, absorbed, any device and dtype.

Absorbed: S_h = (sum_i w_hi phi(k_hi) x_i^T) Wv_h, so the values are never projected per event,
and the sums of all heads are one matrix product. Tiled: at most TILE rows are in work at a time;
the backward projects the tile's keys again instead of keeping phi(k) of all N events.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ifa_torchrec.ops.arguments import (
    AttendArguments,
    AttendSoftmaxArguments,
    EncodeArguments,
    JoinedArguments,
    MatchArguments,
    grad_like,
    sum_dtype,
)
from ifa_torchrec.ops.checks import check_offsets
from ifa_torchrec.ops.feature_maps import FEATURE_MAPS
from ifa_torchrec.ops.jagged import request_of_row
from ifa_torchrec.ops.kernels.reference import event_weights

TILE = 4096
"""Rows in work at a time: with D = 64 and 4 heads of 16 a tile's temporaries are some 4 MB."""
GPU_TILE = 1 << 18
"""The same on a GPU, which is done with 4096 rows before it hears of the next: 10^6 events, forward,
took an H200 86 ms with those and 5.6 ms with these."""
LONGEST_CHUNK = 1024
"""The most rows of one request in a row of a tile."""


def _tiles(offsets: Tensor, rows: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Cut the requests' rows into chunks, and the chunks, longest first, into tiles.

    Chunks of a tile are of about the same length, so little is padded, whatever the lengths.

    Yields:
        request [b]: whose rows each chunk holds; row [b, L]: the rows, where padded the
        chunk's last again; valid [b, L] bool.
    """
    device = offsets.device
    offsets = offsets.to("cpu", torch.int64)
    check_offsets("offsets", offsets, rows)
    starts, lengths = offsets[:-1], offsets.diff()
    chunks = (lengths + LONGEST_CHUNK - 1) // LONGEST_CHUNK
    request = torch.repeat_interleave(torch.arange(len(lengths), device="cpu"), chunks)
    before = torch.repeat_interleave(chunks.cumsum(0) - chunks, chunks)
    nth = torch.arange(len(request), device="cpu") - before
    start = starts[request] + nth * LONGEST_CHUNK
    length = (lengths[request] - nth * LONGEST_CHUNK).clamp(max=LONGEST_CHUNK)
    length, order = length.sort(descending=True, stable=True)
    request, start = request[order].to(device), start[order].to(device)
    longest = length.tolist()
    length = length.to(device)
    tile = TILE if device.type == "cpu" else GPU_TILE
    first = 0
    while first < len(longest):
        last = first + max(tile // longest[first], 1)
        step = torch.arange(longest[first], device=device)
        valid = step < length[first:last, None]
        # padded with a row of the chunk's own: a NaN in it is no other request's
        row = start[first:last, None] + torch.minimum(step, length[first:last, None] - 1)
        yield request[first:last], row, valid
        first = last


def _tile_features(tokens: Tensor, weight: Tensor, feature_map: str) -> tuple[Tensor, Tensor]:
    """Projections [b, H, d, L] and phi of them [b, H, d_phi, L] of a tile's tokens [b, L, D].

    The rows lie innermost, so that sums over a head's few features run along whole vectors.
    """
    projected = torch.matmul(weight.flatten(0, 1), tokens.mT).unflatten(1, weight.shape[:2])
    return projected, FEATURE_MAPS[feature_map].forward(projected, -2)


def _row_weights(
    weights: Tensor | None, ages: Tensor | None, decay: Tensor, tokens: Tensor, row: Tensor
) -> Tensor:
    """w of the events in rows [r], whose tokens [r, D] have the dtype to work in; [r, rates]."""
    return event_weights(
        None if weights is None else weights[row].to(tokens.dtype),
        None if ages is None else ages[row].to(tokens.dtype),
        decay.to(tokens.dtype),
        tokens,
    )


def _as_given(grad: Tensor, weights: Tensor) -> Tensor:
    """The gradient of rows of weights [N, H] or [N], from that of each row and head [r, H]."""
    return (grad if weights.ndim == 2 else grad.sum(-1)).to(weights.dtype)


def _tile_weights(
    weights: Tensor | None,
    ages: Tensor | None,
    decay: Tensor,
    tokens: Tensor,
    row: Tensor,
    valid: Tensor,
) -> Tensor:
    """w_hi of a tile, [b, H, 1, L], zero where padded."""
    weight = _row_weights(weights, ages, decay, tokens.flatten(0, 1), row.flatten())
    return (weight.unflatten(0, row.shape) * valid[..., None]).mT[:, :, None]


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
    for request, row, valid in _tiles(offsets, len(history)):
        tokens = history[row].to(dtype)
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
    grad_history = history.new_zeros(history.shape)
    grad_projections = torch.zeros_like(flat_weight)
    grad_weights = grad_like(weights, history)
    for request, row, valid in _tiles(offsets, len(history)):
        tokens = history[row].to(dtype)
        projected, phi = _tile_features(tokens, key_weight.to(dtype), feature_map)
        weight = _tile_weights(weights, ages, decay, tokens, row, valid)
        grad_values = torch.matmul(grad_key_value[request].mT, phi * weight).flatten(1, 2)
        grad_weighted = torch.bmm(grad_token[request], tokens.mT) + grad_sum[request][..., None]
        grad_weighted = grad_weighted.view_as(phi)
        grad_keys = backward(grad_weighted * weight, projected, phi, -2).flatten(1, 2)
        # of keys and values at once, and of all the tile's rows: a product of many requests' few rows
        # each is mostly writing
        grad_rows = torch.cat([x.transpose(0, 1) for x in (grad_keys, grad_values)]).flatten(1)
        grad_projections += grad_rows @ tokens.flatten(0, 1)
        grad_tokens = (grad_rows.T @ flat_weight).view_as(tokens)
        grad_history[row[valid]] = grad_tokens[valid].to(history.dtype)
        if weights is not None:
            decayed = _tile_weights(None, ages, decay, tokens, row, valid)
            grad_weight = ((grad_weighted * phi).sum(2) * decayed[:, :, 0]).mT[valid]
            grad_weights[row[valid]] = _as_given(grad_weight, weights)
    grad_key_weight, grad_value_weight = grad_projections.view(2, *key_weight.shape)
    return (
        grad_history,
        grad_key_weight.to(key_weight.dtype, copy=True),
        grad_value_weight.to(value_weight.dtype, copy=True),
        grad_weights,
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
    out = key_value.new_zeros(len(candidates), heads, width)
    normalizer = key_value.new_zeros(len(candidates), heads)
    for request, row, valid in _tiles(offsets, len(candidates)):
        tokens = candidates[row].to(dtype)
        phi = _tile_features(tokens, query_weight, feature_map)[1].flatten(0, 1).mT
        numerator = torch.bmm(phi, key_value[request].flatten(0, 1))
        total = torch.bmm(phi, key_sum[request].flatten(0, 1)[..., None])
        out[row[valid]] = _heads_last(numerator / (total + eps), heads)[valid]
        normalizer[row[valid]] = _heads_last(total, heads)[valid][..., 0]
    return out, normalizer


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
    grad_candidates, grad_query_weight, grad_key_value, grad_key_sum = (
        x.new_zeros(x.shape) for x in (candidates, flat_weight, key_value, key_sum)
    )
    for request, row, valid in _tiles(offsets, len(candidates)):
        tokens = candidates[row].to(dtype)
        projected, phi_tile = _tile_features(tokens, weight, feature_map)
        phi = phi_tile.flatten(0, 1).mT
        state, total = key_value[request].flatten(0, 1), key_sum[request].flatten(0, 1)
        divisor = torch.bmm(phi, total[..., None]) + eps
        out = torch.bmm(phi, state) / divisor
        # a padded row repeats another, so its gradient is taken out here
        upstream = _heads_first(grad_out[row] * valid[..., None, None])
        upstream_normalizer = _heads_first((grad_normalizer[row] * valid[..., None])[..., None])
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
        grad_candidates[row[valid]] = grad_tokens[valid].to(candidates.dtype)
    return (
        grad_candidates,
        grad_query_weight.view_as(weight).to(dtypes[0]),
        grad_key_value.to(dtypes[1]),
        grad_key_sum.to(dtypes[2]),
    )


# ----------------------------------------------------------------------------- attend_softmax


def _shares(query: Tensor, mean: Tensor, log_weight: Tensor) -> tuple[Tensor, Tensor]:
    """What each query [n, L, d] takes of each summary [n, R, d], [n, L, R]; and log_sum [n, L, 1]."""
    score = torch.baddbmm(log_weight[:, None], query, mean.mT, alpha=query.shape[-1] ** -0.5)
    log_sum = score.logsumexp(-1, keepdim=True)
    return (score - log_sum.masked_fill(log_sum == -torch.inf, 0.0)).exp(), log_sum


def _tile_queries(tokens: Tensor, weight: Tensor) -> Tensor:
    """Projections of a tile's tokens [b, L, D], [b * H, L, d]."""
    return torch.matmul(weight.flatten(0, 1), tokens.mT).unflatten(1, weight.shape[:2]).flatten(0, 1).mT


def attend_softmax(given: AttendSoftmaxArguments) -> tuple[Tensor, Tensor]:
    """See ``ifa_torchrec.ops.attend_softmax``."""
    candidates, offsets, query_weight, mean, log_weight = given
    heads, width = query_weight.shape[0], mean.shape[-1]
    dtype = sum_dtype(mean.dtype)
    query_weight, mean, log_weight = (x.to(dtype) for x in (query_weight, mean, log_weight))
    out = mean.new_zeros(len(candidates), heads, width)
    log_sum = mean.new_zeros(len(candidates), heads)
    for request, row, valid in _tiles(offsets, len(candidates)):
        query = _tile_queries(candidates[row].to(dtype), query_weight)
        summaries = mean[request].flatten(0, 1)
        share, total = _shares(query, summaries, log_weight[request].flatten(0, 1))
        out[row[valid]] = _heads_last(torch.bmm(share, summaries), heads)[valid]
        log_sum[row[valid]] = _heads_last(total, heads)[valid][..., 0]
    return out, log_sum


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
    grad_candidates, grad_query_weight, grad_mean, grad_log_weight = (
        x.new_zeros(x.shape) for x in (candidates, flat_weight, mean, log_weight)
    )
    for request, row, valid in _tiles(offsets, len(candidates)):
        tokens = candidates[row].to(dtype)
        query, summaries = _tile_queries(tokens, weight), mean[request].flatten(0, 1)
        share, _ = _shares(query, summaries, log_weight[request].flatten(0, 1))
        # a padded row repeats another, so its gradient is taken out here
        upstream = _heads_first(grad_out[row] * valid[..., None, None])
        upstream_log_sum = _heads_first((grad_log_sum[row] * valid[..., None])[..., None])
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
        grad_candidates[row[valid]] = (grad_rows @ flat_weight)[valid].to(candidates.dtype)
    return (
        grad_candidates,
        grad_query_weight.view_as(weight).to(dtypes[0]),
        grad_mean.to(dtypes[1]),
        grad_log_weight.to(dtypes[2]),
    )


# -------------------------------------------------------------------------------------- match


def _join(
    candidate_buckets: Tensor, candidate_offsets: Tensor, buckets: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Join each request's events with its candidates, O(N + M log M).

    Returns:
        candidate_first [M], the first row of each candidate's request that has its bucket; and, for
        the events that match some candidate, event [E] (their rows) and candidate [E] (the first row
        that has their bucket).
    """
    both = torch.cat([candidate_buckets, buckets])
    low, high = (int(x) for x in both.aminmax()) if len(both) else (0, 0)
    if low < 0 or high >= 2**62 // max(len(offsets) - 1, 1):
        # the keys below would wrap round: number the buckets instead
        distinct, both = both.unique(return_inverse=True)
        candidate_buckets, buckets = both.split([len(candidate_buckets), len(buckets)])
        high = len(distinct)
    stride = high + 1
    candidate_key = candidate_buckets + stride * request_of_row(candidate_offsets)
    key = buckets + stride * request_of_row(offsets)
    keys, key_of_candidate = candidate_key.unique(return_inverse=True)
    if len(keys) == 0:
        return key_of_candidate, key_of_candidate, key_of_candidate
    # Few events match anything: a hashed set of the candidates' keys lets most of the others go
    # before the search, which settles the rest exactly.
    bits = 3 + len(keys).bit_length()
    wanted = torch.zeros(1 << bits, dtype=torch.bool, device=key.device)
    wanted[_hash(keys, bits)] = True
    event = wanted[_hash(key, bits)].nonzero()[:, 0]
    found = torch.searchsorted(keys, key[event]).clamp(max=len(keys) - 1)
    matching = keys[found] == key[event]
    row = torch.arange(len(candidate_key), device=key.device)
    first = torch.full_like(keys, len(row)).scatter_reduce_(0, key_of_candidate, row, "amin")
    return first[key_of_candidate], event[matching], first[found[matching]]


def _hash(key: Tensor, bits: int) -> Tensor:
    """Fibonacci hashing to 0..2^bits - 1; the product wraps, as it should."""
    return (key * -7046029254386353131 >> (64 - bits)) & ((1 << bits) - 1)


def match(given: MatchArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``ifa_torchrec.ops.match``; and the join, candidate_first [M] and event_candidate [N]."""
    candidate_buckets, candidate_offsets, history, history_buckets, history_offsets = given[:5]
    weights, ages, decay = given[5:]
    dtype = sum_dtype(history.dtype)
    first, event, candidate = _join(
        candidate_buckets, candidate_offsets, history_buckets, history_offsets
    )
    tokens = history[event].to(dtype)
    weight = _row_weights(weights, ages, decay, tokens, event)
    weight_sum = tokens.new_zeros(len(first), len(decay)).index_add_(0, candidate, weight)
    token_sum = tokens.new_zeros(len(first), len(decay), history.shape[1])
    for rate in range(len(decay)):
        token_sum[:, rate].index_add_(0, candidate, tokens * weight[:, rate, None])
    event_candidate = torch.full_like(history_buckets, -1)
    event_candidate[event] = candidate
    return token_sum[first], weight_sum[first], first, event_candidate


def match_backward(
    grad_token: Tensor, grad_weight: Tensor, given: JoinedArguments
) -> tuple[Tensor, Tensor]:
    """The gradients of history and weights."""
    first, event_candidate, history, weights, ages, decay = given
    event = (event_candidate >= 0).nonzero()[:, 0]
    candidate = event_candidate[event]
    # the gradient of a sum is that of all candidates that read it
    grad_token = torch.zeros_like(grad_token).index_add_(0, first, grad_token)
    grad_weight = torch.zeros_like(grad_weight).index_add_(0, first, grad_weight)
    tokens = history[event].to(sum_dtype(history.dtype))
    weight = _row_weights(weights, ages, decay, tokens, event)
    grad_tokens = torch.zeros_like(tokens)
    for rate in range(len(decay)):
        grad_tokens += weight[:, rate, None] * grad_token[candidate, rate]
    grad_history = history.new_zeros(history.shape)
    grad_history[event] = grad_tokens.to(history.dtype)
    grad_weights = grad_like(weights, history).zero_()
    if weights is not None:
        decayed = _row_weights(None, ages, decay, tokens, event)
        grad_event = grad_weight[candidate]
        for rate in range(len(decay)):
            grad_event[:, rate] += (tokens * grad_token[candidate, rate]).sum(-1)
        grad_weights[event] = _as_given(grad_event * decayed, weights)
    return grad_history, grad_weights
