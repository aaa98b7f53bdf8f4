"""The reference: IFA written out as its formulae, in at least float32.

The outputs and gradients of every backend are tested against it. Nothing here is fast.
"""

from __future__ import annotations

from typing import Any

import torch

from ifa_torchrec.ops.arguments import (
    AttendArguments,
    AttendSoftmaxArguments,
    EncodeArguments,
    MatchArguments,
)
from ifa_torchrec.ops.feature_maps import FEATURE_MAPS
from ifa_torchrec.ops.jagged import request_of_row, rows_of_requests


def features(tokens: torch.Tensor, weight: torch.Tensor, feature_map: str) -> torch.Tensor:
    """phi for every head: tokens [n, D], weight [H, d, D] -> [n, H, d_phi]."""
    return FEATURE_MAPS[feature_map].forward(torch.einsum("nD,hdD->nhd", tokens, weight), -1)


def event_weights(
    weights: torch.Tensor | None, ages: torch.Tensor | None, decay: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """w_hi = a_hi exp(-lambda_h t_i), [n, H]; ``weights`` is a_hi, [n, H] or [n], None for 1, and
    ``ages`` is t_i, None for 0."""
    result = tokens.new_ones(tokens.shape[0], len(decay))
    if ages is not None:
        # a rate of 0 means no decay at any age, even an infinite one
        exponent = torch.where(decay > 0, decay * ages[:, None], 0.0)
        result = result * torch.exp(-exponent).to(result.dtype)
    if weights is None:
        return result
    return result * (weights if weights.ndim == 2 else weights[:, None])


def quadratic(
    candidates: torch.Tensor,
    history: torch.Tensor,
    query_weight: torch.Tensor,
    key_weight: torch.Tensor,
    value_weight: torch.Tensor,
    event_weight: torch.Tensor,
    feature_map: str,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """IFA for one request in its quadratic form, O(n m d).

    Args:
        candidates: [m, D]; history: [n, D]; query_weight, key_weight, value_weight: [H, d, D].
        event_weight: [n, H], w_hi.

    Returns:
        out [m, H, d]; the normalizer phi(q)^T z [m, H]; and the weights A [m, n, H] with
        out_hc = sum_i A_ci,h v_hi.

    Example:
        >>> import torch
        >>> from ifa_torchrec.ops import reference
        >>> c, x, w = torch.randn(3, 8), torch.randn(5, 8), torch.randn(2, 4, 8)
        >>> ones = torch.ones(5, 2)
        >>> out, total, attention = reference.quadratic(c, x, w, w, w, ones, "elu", 1e-6)
        >>> out.shape, attention.shape
        (torch.Size([3, 2, 4]), torch.Size([3, 5, 2]))
    """
    query = features(candidates, query_weight, feature_map)
    key = features(history, key_weight, feature_map)
    value = torch.einsum("nD,hdD->nhd", history, value_weight)
    score = torch.einsum("mhf,nhf->mnh", query, key) * event_weight
    normalizer = score.sum(1)
    attention = score / (normalizer[:, None] + eps)
    return torch.einsum("mnh,nhd->mhd", attention, value), normalizer, attention


def _of_rows(states: torch.Tensor, offsets: torch.Tensor, rows: int) -> torch.Tensor:
    """The state of each row's request, [rows, *]; for a single request the state itself, [1, *], which
    broadcasts over the rows without a copy."""
    return states if offsets.shape[0] == 2 else states[request_of_row(offsets, rows)]


def _floats(dtype: torch.dtype, *tensors: torch.Tensor | None) -> list[Any]:
    """The tensors cast to ``dtype``, but at least float32."""
    dtype = torch.promote_types(dtype, torch.float32)
    return [None if x is None else x.to(dtype) for x in tensors]


def encode(given: EncodeArguments) -> tuple[torch.Tensor, torch.Tensor]:
    """The linear form's user state: key_value [B, H, d_phi, d] and key_sum [B, H, d_phi]."""
    history, offsets, *others, feature_map = given
    history, key_weight, value_weight, weights, ages, decay = _floats(history.dtype, history, *others)
    key = features(history, key_weight, feature_map)
    key = key * event_weights(weights, ages, decay, history)[..., None]
    value = torch.einsum("nD,hdD->nhd", history, value_weight)
    rows = rows_of_requests(offsets, key.shape[0])
    if not rows:  # no requests, so no events; the parameters get gradients of zeros
        return torch.einsum("nhf,nhd->nhfd", key, value), key
    keys = key.split(rows)
    pairs = zip(keys, value.split(rows), strict=True)
    key_value = [torch.einsum("nhf,nhd->hfd", mine, values) for mine, values in pairs]
    return torch.stack(key_value), torch.stack([mine.sum(0) for mine in keys])


def attend(given: AttendArguments) -> tuple[torch.Tensor, torch.Tensor]:
    """The linear form's read-out: out [M, H, d] and the normalizer phi(q)^T z [M, H]."""
    candidates, offsets, *others, feature_map, eps = given
    candidates, query_weight, key_value, key_sum = _floats(given.key_value.dtype, candidates, *others)
    query = features(candidates, query_weight, feature_map)
    key_sum, key_value = (_of_rows(x, offsets, candidates.shape[0]) for x in (key_sum, key_value))
    normalizer = torch.einsum("mhf,mhf->mh", query, key_sum)
    numerator = torch.einsum("mhf,mhfd->mhd", query, key_value)
    return numerator / (normalizer[..., None] + eps), normalizer


def shares(
    query: torch.Tensor, mean: torch.Tensor, log_weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The softmax weight of each summary for each query.

    Args:
        query: [m, H, d]; mean: [m or 1, H, R, d], the summaries; log_weight: [m or 1, H, R].

    Returns:
        [m, H, R], zeros where there are no summaries; and the logarithm [m, H] of the sum of the
        exponentials.
    """
    score = torch.einsum("mhd,mhrd->mhr", query, mean)
    # logsumexp has no gradient where there are no summaries
    nothing = (log_weight == -torch.inf).all(-1, keepdim=True)
    score = (score / query.shape[-1] ** 0.5 + log_weight).masked_fill(nothing, 0.0)
    log_sum = score.logsumexp(-1, keepdim=True).masked_fill(nothing, -torch.inf)
    return score.softmax(-1).masked_fill(nothing, 0.0), log_sum[..., 0]


def attend_softmax(given: AttendSoftmaxArguments) -> tuple[torch.Tensor, torch.Tensor]:
    """The softmax read-out: out [M, H, d] and log_sum [M, H]."""
    candidates, offsets, *others = given
    candidates, query_weight, mean, log_weight = _floats(given.summaries.dtype, candidates, *others)
    query = torch.einsum("mD,hdD->mhd", candidates, query_weight)
    mean, log_weight = (_of_rows(x, offsets, candidates.shape[0]) for x in (mean, log_weight))
    share, log_sum = shares(query, mean, log_weight)
    return torch.einsum("mhr,mhrd->mhd", share, mean), log_sum


def match(given: MatchArguments) -> tuple[torch.Tensor, torch.Tensor]:
    """The heads of an identity feature, one per decay rate, computed candidate by candidate.

    Returns:
        token_sum [M, L, D] and weight_sum [M, L], the sums of w_li x_i and of w_li over the
        events of the candidate's request that are in the candidate's bucket.
    """
    candidate_buckets, candidate_offsets, history, history_buckets, history_offsets, *others = given
    history, weights, ages, decay = _floats(history.dtype, history, *others)
    weight = event_weights(weights, ages, decay, history)
    lengths = history_offsets.diff().tolist()
    events = (x.split(lengths) for x in (history, weight, history_buckets))
    asked = candidate_buckets.split(candidate_offsets.diff().tolist())
    token_sum = [history.new_zeros(0, len(decay), history.shape[1])]
    weight_sum = [weight.new_zeros(0, len(decay))]
    for tokens, event_weight, buckets, candidates in zip(*events, asked, strict=True):
        for candidate in candidates:
            # selected, not multiplied by zero: a NaN must only reach the candidates that it matches
            same = buckets == candidate
            weight_sum.append(event_weight[same].sum(0, keepdim=True))
            token_sum.append((event_weight[same].T @ tokens[same])[None])
    return torch.cat(token_sum), torch.cat(weight_sum)
