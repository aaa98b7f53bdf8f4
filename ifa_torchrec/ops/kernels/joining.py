"""match of the `torch` backend: joins candidates and events of a request that have the same bucket.

Few events match anything. On a CPU only those are processed. Elsewhere their number is not known without
waiting for the device, so all events are, and those that match nothing are added to unused rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ifa_torchrec.ops.arguments import JoinedArguments, MatchArguments, grad_like, sum_dtype
from ifa_torchrec.ops.jagged import on_cpu, request_of_row
from ifa_torchrec.ops.kernels.reference import event_weights

_UNUSED = 1024
"""Unused rows for events without a match: many, since additions to one row are serialised on a GPU."""


def row_weights(
    weights: Tensor | None, ages: Tensor | None, decay: Tensor, tokens: Tensor, row: Tensor
) -> Tensor:
    """w of the events in rows [r], in the dtype of their tokens [r, D]; [r, rates].

    Example:
        >>> import torch
        >>> from ifa_torchrec.ops.kernels.joining import row_weights
        >>> weights, rate, row = torch.tensor([1.0, 2.0]), torch.zeros(1), torch.tensor([1])
        >>> row_weights(weights, None, rate, torch.zeros(1, 4), row)
        tensor([[2.]])
    """
    return event_weights(
        None if weights is None else weights[row].to(tokens.dtype),
        None if ages is None else ages[row].to(tokens.dtype),
        decay.to(tokens.dtype),
        tokens,
    )


def as_given(grad: Tensor, weights: Tensor) -> Tensor:
    """Reduce a gradient per row and head [r, H] to the layout and dtype of weights [N, H] or [N].

    Example:
        >>> import torch
        >>> from ifa_torchrec.ops.kernels.joining import as_given
        >>> as_given(torch.ones(1, 3), torch.zeros(1)).tolist()
        [3.0]
    """
    return (grad if weights.ndim == 2 else grad.sum(-1)).to(weights.dtype)


def _join_few(
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
        # the keys below would overflow: number the buckets instead
        distinct, both = both.unique(return_inverse=True)
        candidate_buckets, buckets = both.split([len(candidate_buckets), len(buckets)])
        high = len(distinct)
    stride = high + 1
    candidate_key = candidate_buckets + stride * request_of_row(
        candidate_offsets, len(candidate_buckets)
    )
    key = buckets + stride * request_of_row(offsets, len(buckets))
    keys, key_of_candidate = candidate_key.unique(return_inverse=True)
    if len(keys) == 0:
        return key_of_candidate, key_of_candidate, key_of_candidate
    # Few events match anything: a hashed set of the candidates' keys discards most of the others before
    # the search, which decides the rest exactly.
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
    """Fibonacci hashing to 0..2^bits - 1; the product is meant to overflow."""
    return (key * -7046029254386353131 >> (64 - bits)) & ((1 << bits) - 1)


def _join_all(
    candidate_buckets: Tensor, candidate_offsets: Tensor, buckets: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Like ``_join_few``, but without reading values, O((N + M) log (N + M)): event is all of [N], and
    candidate is between M and M + _UNUSED - 1 for events without a match."""
    candidates, events = len(candidate_buckets), len(buckets)
    event = torch.arange(events, device=buckets.device)
    candidate = candidates + event % _UNUSED
    if not candidates:
        return candidate_buckets.clone(), event, candidate
    # buckets are numbered in order, so that request and bucket fit into one int64 for any buckets
    ordered, order = torch.cat([candidate_buckets, buckets]).sort(stable=True)
    number = torch.zeros_like(order)
    number[1:] = (ordered[1:] != ordered[:-1]).cumsum(0)
    number = torch.empty_like(number).index_copy_(0, order, number)
    key_of_candidate = number[:candidates] + len(order) * _request(candidate_offsets, candidates)
    key = number[candidates:] + len(order) * _request(offsets, events)
    keys, row = key_of_candidate.sort(stable=True)  # the first row of a key comes first
    found = torch.searchsorted(keys, key).clamp(max=candidates - 1)
    first = row[torch.searchsorted(keys, key_of_candidate)]
    return first, event, torch.where(keys[found] == key, row[found], candidate)


def _request(offsets: Tensor, rows: int) -> Tensor:
    """The request of each row; for wrong offsets some request, but always a valid number."""
    row = torch.arange(rows, device=offsets.device)
    return (torch.searchsorted(offsets, row, right=True) - 1).clamp(0, max(len(offsets) - 2, 0))


def match(given: MatchArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``ops.match``; also returns the join: candidate_first [M] and event_candidate [N]."""
    candidate_buckets, candidate_offsets, history, history_buckets, history_offsets = given[:5]
    weights, ages, decay = given[5:]
    dtype = sum_dtype(history.dtype)
    join, unused = (_join_few, 0) if on_cpu(history) else (_join_all, _UNUSED)
    first, event, candidate = join(
        candidate_buckets, candidate_offsets, history_buckets, history_offsets
    )
    tokens = history[event].to(dtype)
    weight = row_weights(weights, ages, decay, tokens, event)
    room = len(first) + unused
    weight_sum = tokens.new_zeros(room, len(decay)).index_add_(0, candidate, weight)
    token_sum = tokens.new_zeros(room, len(decay), history.shape[1])
    for rate in range(len(decay)):
        token_sum[:, rate].index_add_(0, candidate, tokens * weight[:, rate, None])
    event_candidate = torch.full_like(history_buckets, -1)
    event_candidate[event] = torch.where(candidate < len(first), candidate, -1)
    return token_sum[first], weight_sum[first], first, event_candidate


def match_backward(
    grad_token: Tensor, grad_weight: Tensor, given: JoinedArguments
) -> tuple[Tensor, Tensor]:
    """The gradients of history and weights."""
    first, event_candidate, history, weights, ages, decay = given
    if on_cpu(history):
        event = (event_candidate >= 0).nonzero()[:, 0]
        candidate = event_candidate[event]
    else:  # events without a match read the gradient of one extra candidate, which is zero
        event = torch.arange(len(history), device=history.device)
        candidate = torch.where(event_candidate < 0, len(first), event_candidate)
    # the gradient of a sum is the sum over all candidates that read it
    grad_token, grad_weight = (
        x.new_zeros(len(x) + 1, *x.shape[1:]).index_add_(0, first, x) for x in (grad_token, grad_weight)
    )
    tokens = history[event].to(sum_dtype(history.dtype))
    weight = row_weights(weights, ages, decay, tokens, event)
    grad_tokens = torch.zeros_like(tokens)
    for rate in range(len(decay)):
        grad_tokens += weight[:, rate, None] * grad_token[candidate, rate]
    grad_history = history.new_zeros(history.shape)
    grad_history[event] = grad_tokens.to(history.dtype)
    grad_weights = grad_like(weights, history).zero_()
    if weights is not None:
        decayed = row_weights(None, ages, decay, tokens, event)
        grad_event = grad_weight[candidate]
        for rate in range(len(decay)):
            grad_event[:, rate] += (tokens * grad_token[candidate, rate]).sum(-1)
        grad_weights[event] = as_given(grad_event * decayed, weights)
    return grad_history, grad_weights
