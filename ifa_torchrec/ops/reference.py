"""The plain truth: IFA written as its formulae, one request at a time, in any dtype.

Every backend is tested against this file, outputs and gradients. Nothing here is fast.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from ifa_torchrec.ops.feature_maps import FEATURE_MAPS
from ifa_torchrec.ops.jagged import request_of_row


def features(tokens: torch.Tensor, weight: torch.Tensor, feature_map: str) -> torch.Tensor:
    """phi of every head: tokens [n, D], weight [H, d, D] -> [n, H, d_phi]."""
    return FEATURE_MAPS[feature_map].forward(torch.einsum("nD,hdD->nhd", tokens, weight), -1)


def event_weights(
    weights: torch.Tensor | None, ages: torch.Tensor | None, decay: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """w_hi = a_i exp(-lambda_h t_i), [n, H]; a_i is 1 and t_i is 0 where None is given."""
    result = tokens.new_ones(tokens.shape[0], len(decay))
    if ages is not None:
        # no decay is no decay at any age, an infinite one included
        exponent = torch.where(decay > 0, decay * ages[:, None], 0.0)
        result = result * torch.exp(-exponent).to(result.dtype)
    return result if weights is None else result * weights[:, None]


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
    """IFA of one request in its quadratic form, O(n m d).

    Args:
        candidates: [m, D]; history: [n, D]; query_weight, key_weight, value_weight: [H, d, D].
        event_weight: [n, H], w_hi.

    Returns:
        out [m, H, d]; the normaliser phi(q)^T z [m, H]; and the weights A [m, n, H] with
        out_hc = sum_i A_ci,h v_hi.

    Example:
        >>> import torch
        >>> from ifa_torchrec.ops import reference
        >>> c, x, w = torch.randn(3, 8), torch.randn(5, 8), torch.randn(2, 4, 8)
        >>> out, matched, attention = reference.quadratic(c, x, w, w, w, torch.ones(5, 2), "elu", 1e-6)
        >>> out.shape, attention.shape
        (torch.Size([3, 2, 4]), torch.Size([3, 5, 2]))
    """
    query = features(candidates, query_weight, feature_map)
    key = features(history, key_weight, feature_map)
    value = torch.einsum("nD,hdD->nhd", history, value_weight)
    score = torch.einsum("mhf,nhf->mnh", query, key) * event_weight
    matched = score.sum(1)
    attention = score / (matched[:, None] + eps)
    return torch.einsum("mnh,nhd->mhd", attention, value), matched, attention


def encode(
    history: torch.Tensor,
    offsets: torch.Tensor,
    key_weight: torch.Tensor,
    value_weight: torch.Tensor,
    weights: torch.Tensor | None,
    ages: torch.Tensor | None,
    decay: torch.Tensor,
    feature_map: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The linear form's user state: key_value [B, H, d_phi, d] and key_sum [B, H, d_phi]."""
    key = features(history, key_weight, feature_map)
    key = key * event_weights(weights, ages, decay, history)[..., None]
    value = torch.einsum("nD,hdD->nhd", history, value_weight)
    bounds = offsets.tolist()
    spans = [slice(a, b) for a, b in pairwise(bounds)]
    key_value = [torch.einsum("nhf,nhd->hfd", key[s], value[s]) for s in spans]
    shape = (0, *key.shape[1:])
    if not spans:
        return value.new_zeros(*shape, value.shape[-1]), key.new_zeros(shape)
    return torch.stack(key_value), torch.stack([key[s].sum(0) for s in spans])


def attend(
    candidates: torch.Tensor,
    offsets: torch.Tensor,
    query_weight: torch.Tensor,
    key_value: torch.Tensor,
    key_sum: torch.Tensor,
    feature_map: str,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The linear form's read-out: out [M, H, d] and the normaliser phi(q)^T z [M, H]."""
    query = features(candidates, query_weight, feature_map)
    request = request_of_row(offsets, candidates.shape[0])
    matched = torch.einsum("mhf,mhf->mh", query, key_sum[request])
    numerator = torch.einsum("mhf,mhfd->mhd", query, key_value[request])
    return numerator / (matched[..., None] + eps), matched


def match(
    candidate_buckets: torch.Tensor,
    candidate_offsets: torch.Tensor,
    history: torch.Tensor,
    history_buckets: torch.Tensor,
    history_offsets: torch.Tensor,
    weights: torch.Tensor | None,
    ages: torch.Tensor | None,
    decay: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """An identity feature's heads, one for each decay rate, by comparing all pairs of a request.

    Returns:
        token_sum [M, L, D] and weight_sum [M, L], the sums of w_li x_i and of w_li over the
        events of the candidate's request whose bucket is the candidate's.
    """
    weight = event_weights(weights, ages, decay, history)
    token_sum, weight_sum = [], []
    for b in range(len(history_offsets) - 1):
        c = slice(int(candidate_offsets[b]), int(candidate_offsets[b + 1]))
        e = slice(int(history_offsets[b]), int(history_offsets[b + 1]))
        same = (candidate_buckets[c, None] == history_buckets[None, e]).to(weight.dtype)
        weight_sum.append(same @ weight[e])
        token_sum.append(torch.einsum("mn,nl,nD->mlD", same, weight[e], history[e]))
    if not token_sum:
        return history.new_zeros(0, len(decay), history.shape[1]), weight.new_zeros(0, len(decay))
    return torch.cat(token_sum), torch.cat(weight_sum)
