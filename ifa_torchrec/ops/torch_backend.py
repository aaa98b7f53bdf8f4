"""The `torch` backend: jagged, tiled, absorbed, as custom operators with their own backward.

Absorbed: S_h = (sum_i w_hi phi(k_hi) x_i^T) Wv_h, so the values are never projected per event,
and the sums of all heads are one matrix product. Tiled: at most TILE rows are in work at a time;
the backward projects the tile's keys again instead of keeping phi(k) of all N events.

Operators (all shapes static given the inputs', so that torch.compile sees no surprise):

    ifa::encode  history, offsets, Wk, ... -> key_token [B, H, d_phi, D], key_sum [B, H, d_phi]
    ifa::attend  candidates, offsets, Wq, S, z -> out [M, H, d], matched [M, H]
    ifa::match   candidates' and events' buckets, ... -> token_sum [M, L, D], weight_sum [M, L]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ifa_torchrec.ops.checks import check_offsets
from ifa_torchrec.ops.feature_maps import FEATURE_MAPS
from ifa_torchrec.ops.jagged import request_of_row
from ifa_torchrec.ops.reference import event_weights

TILE = 4096
"""Rows in work at a time: with D = 64 and 4 heads of 16 a tile's temporaries are some 4 MB."""
GPU_TILE = 1 << 18
"""The same on a GPU, which is done with 4096 rows before it hears of the next: 10^6 events, forward,
took an H200 86 ms with those and 5.6 ms with these."""
_LONGEST_CHUNK = 1024


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Where matrix products keep their dtype; under autocast they would give bfloat16."""
    device = tensor.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def like(*tensors: Tensor) -> tuple[Tensor, ...]:
    """For an operator's fake: outputs of the tensors' shapes and dtypes, contiguous."""
    return tuple(x.new_empty(x.shape) for x in tensors)


def _accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


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
    chunks = (lengths + _LONGEST_CHUNK - 1) // _LONGEST_CHUNK
    request = torch.repeat_interleave(torch.arange(len(lengths), device="cpu"), chunks)
    before = torch.repeat_interleave(chunks.cumsum(0) - chunks, chunks)
    nth = torch.arange(len(request), device="cpu") - before
    start = starts[request] + nth * _LONGEST_CHUNK
    length = (lengths[request] - nth * _LONGEST_CHUNK).clamp(max=_LONGEST_CHUNK)
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


@torch.library.custom_op("ifa::encode", mutates_args=())
def encode_op(
    history: Tensor,
    offsets: Tensor,
    key_weight: Tensor,
    weights: Tensor | None,
    ages: Tensor | None,
    decay: Tensor,
    feature_map: str,
) -> tuple[Tensor, Tensor]:
    dtype = _accumulator_dtype(history.dtype)
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
    return key_token.view(*shape, dim), key_sum.view(shape)


@encode_op.register_fake
def _(
    history: Tensor,
    offsets: Tensor,
    key_weight: Tensor,
    weights: Tensor | None,
    ages: Tensor | None,
    decay: Tensor,
    feature_map: str,
) -> tuple[Tensor, Tensor]:
    dtype = _accumulator_dtype(history.dtype)
    heads, width, dim = key_weight.shape
    shape = (offsets.shape[0] - 1, heads, width * FEATURE_MAPS[feature_map].expansion)
    return history.new_empty(*shape, dim, dtype=dtype), history.new_empty(shape, dtype=dtype)


@torch.library.custom_op("ifa::encode_backward", mutates_args=())
def encode_backward_op(
    grad_token: Tensor,
    grad_sum: Tensor,
    history: Tensor,
    offsets: Tensor,
    key_weight: Tensor,
    weights: Tensor | None,
    ages: Tensor | None,
    decay: Tensor,
    feature_map: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = _accumulator_dtype(history.dtype)
    backward = FEATURE_MAPS[feature_map].backward
    key_weight_ = key_weight.to(dtype)
    flat_weight = key_weight_.flatten(0, 1)
    grad_token, grad_sum = grad_token.flatten(1, 2), grad_sum.flatten(1, 2)
    grad_history = history.new_zeros(history.shape)
    grad_key_weight = flat_weight.new_zeros(flat_weight.shape)
    grad_weights = history.new_zeros(len(history) if weights is not None else 0, dtype=dtype)
    for request, row, valid in _tiles(offsets, len(history)):
        tokens = history[row].to(dtype)
        projected, phi = _tile_features(tokens, key_weight_, feature_map)
        weight = _tile_weights(weights, ages, decay, tokens, row, valid)
        grad_weighted = torch.bmm(grad_token[request], tokens.mT) + grad_sum[request][..., None]
        grad_weighted = grad_weighted.view_as(phi)
        grad_projected = backward(grad_weighted * weight, projected, phi, -2).flatten(1, 2)
        grad_tokens = torch.bmm((phi * weight).flatten(1, 2).mT, grad_token[request])
        grad_tokens += torch.matmul(grad_projected.mT, flat_weight)
        grad_key_weight += torch.bmm(grad_projected, tokens).sum(0)
        grad_history[row[valid]] = grad_tokens[valid].to(history.dtype)
        if weights is not None:
            decayed = _tile_weights(None, ages, decay, tokens, row, valid)
            grad_weight = ((grad_weighted * phi).sum(2) * decayed[:, :, 0]).sum(1)
            grad_weights[row[valid]] = grad_weight[valid]
    return (
        grad_history,
        grad_key_weight.view_as(key_weight_).to(key_weight.dtype),
        grad_weights if weights is None else grad_weights.to(weights.dtype),
    )


@encode_backward_op.register_fake
def _(
    grad_token: Tensor,
    grad_sum: Tensor,
    history: Tensor,
    offsets: Tensor,
    key_weight: Tensor,
    weights: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    dtype = _accumulator_dtype(history.dtype)
    grad_weights = history.new_empty(0, dtype=dtype) if weights is None else weights
    return like(history, key_weight, grad_weights)


def encode_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.feature_map = inputs
    ctx.save_for_backward(*tensors)


def _encode_autograd(ctx: Any, grad_token: Tensor, grad_sum: Tensor) -> tuple[Tensor | None, ...]:
    with without_autocast(grad_token):
        grad_history, grad_key_weight, grad_weights = torch.ops.ifa.encode_backward(
            grad_token, grad_sum, *ctx.saved_tensors, ctx.feature_map
        )
    if ctx.saved_tensors[3] is None:
        grad_weights = None
    return grad_history, None, grad_key_weight, grad_weights, None, None, None


encode_op.register_autograd(_encode_autograd, setup_context=encode_setup)


def encode(
    history: Tensor,
    offsets: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    weights: Tensor | None,
    ages: Tensor | None,
    decay: Tensor,
    feature_map: str,
) -> tuple[Tensor, Tensor]:
    """See ``ifa_torchrec.ops.encode``."""
    key_token, key_sum = torch.ops.ifa.encode(
        history, offsets, key_weight, weights, ages, decay, feature_map
    )
    key_value = torch.einsum("bhfD,hdD->bhfd", key_token, value_weight.to(key_token.dtype))
    return key_value, key_sum


# ------------------------------------------------------------------------------------- attend


def _heads_last(tile: Tensor, heads: int) -> Tensor:
    """[b * H, L, x] -> [b, L, H, x]."""
    return tile.unflatten(0, (-1, heads)).transpose(1, 2)


def _heads_first(tile: Tensor) -> Tensor:
    """[b, L, H, x] -> [b * H, L, x], for one bmm over requests and heads."""
    return tile.transpose(1, 2).flatten(0, 1)


@torch.library.custom_op("ifa::attend", mutates_args=())
def attend_op(
    candidates: Tensor,
    offsets: Tensor,
    query_weight: Tensor,
    key_value: Tensor,
    key_sum: Tensor,
    feature_map: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    heads, width = query_weight.shape[0], key_value.shape[-1]
    dtype = _accumulator_dtype(key_value.dtype)
    query_weight, key_value, key_sum = (x.to(dtype) for x in (query_weight, key_value, key_sum))
    out = key_value.new_zeros(len(candidates), heads, width)
    matched = key_value.new_zeros(len(candidates), heads)
    for request, row, valid in _tiles(offsets, len(candidates)):
        tokens = candidates[row].to(dtype)
        phi = _tile_features(tokens, query_weight, feature_map)[1].flatten(0, 1).mT
        numerator = torch.bmm(phi, key_value[request].flatten(0, 1))
        normaliser = torch.bmm(phi, key_sum[request].flatten(0, 1)[..., None])
        out[row[valid]] = _heads_last(numerator / (normaliser + eps), heads)[valid]
        matched[row[valid]] = _heads_last(normaliser, heads)[valid][..., 0]
    return out, matched


@attend_op.register_fake
def attend_fake(
    candidates: Tensor, offsets: Tensor, query_weight: Tensor, key_value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    dtype = _accumulator_dtype(key_value.dtype)
    shape = (candidates.shape[0], query_weight.shape[0])
    out = key_value.new_empty(*shape, key_value.shape[-1], dtype=dtype)
    return out, key_value.new_empty(shape, dtype=dtype)


@torch.library.custom_op("ifa::attend_backward", mutates_args=())
def attend_backward_op(
    grad_out: Tensor,
    grad_matched: Tensor,
    candidates: Tensor,
    offsets: Tensor,
    query_weight: Tensor,
    key_value: Tensor,
    key_sum: Tensor,
    feature_map: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    heads = query_weight.shape[0]
    backward = FEATURE_MAPS[feature_map].backward
    dtypes = [x.dtype for x in (query_weight, key_value, key_sum)]
    dtype = _accumulator_dtype(key_value.dtype)
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
        normaliser = torch.bmm(phi, total[..., None]) + eps
        out = torch.bmm(phi, state) / normaliser
        # a padded row repeats another, so its gradient is taken out here
        upstream = _heads_first(grad_out[row] * valid[..., None, None])
        upstream_matched = _heads_first((grad_matched[row] * valid[..., None])[..., None])
        grad_numerator = upstream / normaliser
        grad_normaliser = upstream_matched - (grad_numerator * out).sum(-1, keepdim=True)
        grad_key_value.index_add_(
            0, request, torch.bmm(phi.mT, grad_numerator).unflatten(0, (-1, heads))
        )
        grad_key_sum.index_add_(
            0, request, torch.bmm(phi.mT, grad_normaliser)[..., 0].unflatten(0, (-1, heads))
        )
        grad_phi = torch.bmm(state, grad_numerator.mT) + total[..., None] * grad_normaliser.mT
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


@attend_backward_op.register_fake
def attend_backward_fake(
    grad_out: Tensor,
    grad_matched: Tensor,
    candidates: Tensor,
    offsets: Tensor,
    query_weight: Tensor,
    key_value: Tensor,
    key_sum: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    return like(candidates, query_weight, key_value, key_sum)


def attend_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.feature_map, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def attend_autograd(
    backward_op: Callable[..., Any], ctx: Any, grad_out: Tensor, grad_matched: Tensor
) -> tuple[Tensor | None, ...]:
    with without_autocast(grad_out):
        grads = backward_op(grad_out, grad_matched, *ctx.saved_tensors, ctx.feature_map, ctx.eps)
    grad_candidates, grad_query_weight, grad_key_value, grad_key_sum = grads
    return grad_candidates, None, grad_query_weight, grad_key_value, grad_key_sum, None, None


attend_op.register_autograd(
    partial(attend_autograd, torch.ops.ifa.attend_backward), setup_context=attend_setup
)
attend = torch.ops.ifa.attend
"""See ``ifa_torchrec.ops.attend``."""


# -------------------------------------------------------------------------------------- match


def _join(
    candidate_buckets: Tensor, candidate_offsets: Tensor, buckets: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Join each request's events with its candidates, O(N + M log M).

    Candidates of one request with the same bucket share a slot.

    Returns:
        candidate_slot [M]; and, for the events that match some candidate, event [E] (their
        rows) and event_slot [E].
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
    slots, candidate_slot = candidate_key.unique(return_inverse=True)
    if len(slots) == 0:
        return candidate_slot, candidate_slot, candidate_slot
    # Few events match anything: a hashed set of the candidates' keys lets most of the others go
    # before the search, which settles the rest exactly.
    bits = 3 + len(slots).bit_length()
    wanted = torch.zeros(1 << bits, dtype=torch.bool, device=key.device)
    wanted[_hash(slots, bits)] = True
    event = wanted[_hash(key, bits)].nonzero()[:, 0]
    slot = torch.searchsorted(slots, key[event]).clamp(max=len(slots) - 1)
    matching = slots[slot] == key[event]
    return candidate_slot, event[matching], slot[matching]


def _hash(key: Tensor, bits: int) -> Tensor:
    """Fibonacci hashing to 0..2^bits - 1; the product wraps, as it should."""
    return (key * -7046029254386353131 >> (64 - bits)) & ((1 << bits) - 1)


@torch.library.custom_op("ifa::match", mutates_args=())
def match_op(
    candidate_buckets: Tensor,
    candidate_offsets: Tensor,
    history: Tensor,
    history_buckets: Tensor,
    history_offsets: Tensor,
    weights: Tensor | None,
    ages: Tensor | None,
    decay: Tensor,
) -> tuple[Tensor, Tensor]:
    dtype = _accumulator_dtype(history.dtype)
    slot, event, event_slot = _join(
        candidate_buckets, candidate_offsets, history_buckets, history_offsets
    )
    tokens = history[event].to(dtype)
    weight = _row_weights(weights, ages, decay, tokens, event)
    weight_sum = tokens.new_zeros(len(slot), len(decay)).index_add_(0, event_slot, weight)
    token_sum = tokens.new_zeros(len(slot), len(decay), history.shape[1])
    for rate in range(len(decay)):
        token_sum[:, rate].index_add_(0, event_slot, tokens * weight[:, rate, None])
    return token_sum[slot], weight_sum[slot]


@match_op.register_fake
def match_fake(
    candidate_buckets: Tensor,
    candidate_offsets: Tensor,
    history: Tensor,
    history_buckets: Tensor,
    history_offsets: Tensor,
    weights: Tensor | None,
    ages: Tensor | None,
    decay: Tensor,
) -> tuple[Tensor, Tensor]:
    dtype = _accumulator_dtype(history.dtype)
    shape = (candidate_buckets.shape[0], decay.shape[0])
    return history.new_empty(*shape, history.shape[1], dtype=dtype), history.new_empty(
        shape, dtype=dtype
    )


@torch.library.custom_op("ifa::match_backward", mutates_args=())
def match_backward_op(
    grad_token: Tensor,
    grad_weight: Tensor,
    candidate_buckets: Tensor,
    candidate_offsets: Tensor,
    history: Tensor,
    history_buckets: Tensor,
    history_offsets: Tensor,
    weights: Tensor | None,
    ages: Tensor | None,
    decay: Tensor,
) -> tuple[Tensor, Tensor]:
    dtype = _accumulator_dtype(history.dtype)
    slot, event, event_slot = _join(
        candidate_buckets, candidate_offsets, history_buckets, history_offsets
    )
    # the gradient of a slot is the sum over the candidates that read it
    grad_token = torch.zeros_like(grad_token).index_add_(0, slot, grad_token)
    grad_weight = torch.zeros_like(grad_weight).index_add_(0, slot, grad_weight)
    tokens = history[event].to(dtype)
    weight = _row_weights(weights, ages, decay, tokens, event)
    grad_tokens = torch.zeros_like(tokens)
    for rate in range(len(decay)):
        grad_tokens += weight[:, rate, None] * grad_token[event_slot, rate]
    grad_history = history.new_zeros(history.shape)
    grad_history[event] = grad_tokens.to(history.dtype)
    if weights is None:
        return grad_history, history.new_zeros(0)
    decayed = _row_weights(None, ages, decay, tokens, event)
    grad_event = grad_weight[event_slot]
    for rate in range(len(decay)):
        grad_event[:, rate] += (tokens * grad_token[event_slot, rate]).sum(-1)
    grad_weights = weights.new_zeros(weights.shape)
    grad_weights[event] = (grad_event * decayed).sum(-1).to(weights.dtype)
    return grad_history, grad_weights


@match_backward_op.register_fake
def _(
    grad_token: Tensor,
    grad_weight: Tensor,
    candidate_buckets: Tensor,
    candidate_offsets: Tensor,
    history: Tensor,
    history_buckets: Tensor,
    history_offsets: Tensor,
    weights: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    return like(history, history.new_empty(0) if weights is None else weights)


def _match_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _match_autograd(ctx: Any, grad_token: Tensor, grad_weight: Tensor) -> tuple[Tensor | None, ...]:
    grad_history, grad_weights = torch.ops.ifa.match_backward(
        grad_token, grad_weight, *ctx.saved_tensors
    )
    if ctx.saved_tensors[5] is None:
        grad_weights = None
    return None, None, grad_history, None, None, grad_weights, None, None


match_op.register_autograd(_match_autograd, setup_context=_match_setup)


match = torch.ops.ifa.match
"""See ``ifa_torchrec.ops.match``."""
