"""The interactions that IFA is compared with, under the same call and configuration."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F
from torchrec.sparse.jagged_tensor import JaggedTensor

from ifa_torchrec import ops
from ifa_torchrec.modules.interaction import IFAConfig, SequenceInteraction
from ifa_torchrec.ops.jagged import request_of_row


class MeanPooling(SequenceInteraction):
    """The weighted mean of the events' values, the same for all candidates of a request.

    Heads of different half-lives are means over different stretches of time.

    Args:
        config: IFAConfig.

    Example:
        >>> import torch
        >>> from torchrec.sparse.jagged_tensor import JaggedTensor
        >>> from ifa_torchrec import IFAConfig
        >>> from ifa_torchrec.modules import MeanPooling
        >>> mean = MeanPooling(IFAConfig(embedding_dim=8, num_heads=2))
        >>> tokens = JaggedTensor(torch.randn(5, 8), lengths=torch.tensor([5, 0]))
        >>> mean(tokens, tokens).values().shape
        torch.Size([5, 8])
    """

    def dense_heads(
        self, candidates: JaggedTensor, history: JaggedTensor, history_age: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Outputs [M, H, d], equal within a request, and masses [M, H]."""
        tokens = history.values()
        requests = len(history.offsets()) - 1
        owner = request_of_row(history.offsets())
        weight = ops.reference.event_weights(history.weights_or_none(), history_age, self.decay, tokens)
        total = tokens.new_zeros(requests, weight.shape[1]).index_add(0, owner, weight)
        if self.config.half_lives is None:  # every head's mean is over the same weights
            sums = tokens.new_zeros(requests, 1, tokens.shape[1])
            sums = sums.index_add(0, owner, (tokens * weight[:, :1])[:, None])
        else:
            sums = tokens.new_zeros(requests, weight.shape[1], tokens.shape[1])
            sums = sums.index_add(0, owner, tokens[:, None] * weight[..., None])
        mean = sums / (total[:, : sums.shape[1], None] + self.config.eps)
        mean = mean.expand(-1, self.config.num_heads, -1)
        heads = torch.einsum("bhD,hdD->bhd", mean, self.heads(self.value_proj))
        asking = request_of_row(candidates.offsets())
        return heads[asking], self._mass(total[asking])


class SoftmaxAttention(SequenceInteraction):
    """Multi-head softmax target attention over the history (Vaswani et al. 2017), O(n m d).

    Each request is attended by itself, so that nothing is padded. Half-lives and event weights
    enter as log w_i beside the scores, the softmax form of the same weighting.

    Args:
        config: IFAConfig.
        recent_length: attend only to the latest so many events; None for all. Identity heads, if
            the config has any, see the whole history all the same.

    Example:
        >>> import torch
        >>> from torchrec.sparse.jagged_tensor import JaggedTensor
        >>> from ifa_torchrec import IFAConfig
        >>> from ifa_torchrec.modules import SoftmaxAttention
        >>> softmax = SoftmaxAttention(IFAConfig(embedding_dim=8, num_heads=2), recent_length=2)
        >>> tokens = JaggedTensor(torch.randn(5, 8), lengths=torch.tensor([5, 0]))
        >>> softmax(tokens, tokens).values().shape
        torch.Size([5, 8])
    """

    def __init__(self, config: IFAConfig, recent_length: int | None = None) -> None:
        super().__init__(config)
        if recent_length is not None and recent_length < 1:
            raise ValueError(f"recent_length must be at least 1, got {recent_length}")
        self.recent_length = recent_length
        # the score of a normed token with itself starts at 12, enough to stand out among 10^4
        gain = (12 / config.head_width**0.5) ** 0.5
        self.query_proj = self._projection(gain)
        self.key_proj = self._projection(gain)

    def dense_heads(
        self, candidates: JaggedTensor, history: JaggedTensor, history_age: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Outputs [M, H, d], and masses [M, H] if the config asks for them."""
        tokens, weights = history.values(), history.weights_or_none()
        ends = history.offsets()[1:].tolist()
        starts = history.offsets()[:-1].tolist()
        if self.recent_length is not None:
            starts = [max(a, b - self.recent_length) for a, b in zip(starts, ends, strict=True)]
            rows = torch.cat(
                [torch.arange(0), *(torch.arange(a, b) for a, b in zip(starts, ends, strict=True))]
            )
            rows = rows.to(tokens.device)
            tokens = tokens[rows]
            weights = None if weights is None else weights[rows]
            history_age = None if history_age is None else history_age[rows]
        lengths = [b - a for a, b in zip(starts, ends, strict=True)]
        shape = (-1, self.config.num_heads, self.config.head_width)
        keys = self.key_proj(tokens).view(shape).transpose(0, 1)
        values = self.value_proj(tokens).view(shape).transpose(0, 1)
        query = self.query_proj(candidates.values()).view(shape).transpose(0, 1)
        bias = self._log_weights(weights, history_age, tokens)
        biases = [None] * len(lengths) if bias is None else bias.split(lengths, dim=1)
        # A batch without events still gives every parameter a gradient: DDP waits for all of them.
        nothing = keys[:, :0].sum() + values[:, :0].sum()
        outputs, log_sums = [query[:, :0] + nothing], [query[:, :0, 0]]
        sets = query.split(candidates.offsets().diff().tolist(), dim=1)
        parts = (keys.split(lengths, dim=1), values.split(lengths, dim=1), biases)
        for q, k, v, log_weight in zip(sets, *parts, strict=True):
            if k.shape[1] == 0 or q.shape[1] == 0:
                outputs.append(torch.zeros_like(q))
                log_sums.append(torch.full_like(q[..., 0], -torch.inf))
                continue
            mask = None if log_weight is None else log_weight[:, None].expand(-1, q.shape[1], -1)
            if not self.config.interest_mass:
                mask = None if mask is None else mask[None]
                outputs.append(F.scaled_dot_product_attention(q[None], k[None], v[None], mask)[0])
                continue
            # the fused kernel does not give the sum of the exponentials, which the mass needs
            score = q @ k.mT / self.config.head_width**0.5
            score = score if mask is None else score + mask
            log_sums.append(score.logsumexp(-1))
            outputs.append((score - log_sums[-1][..., None]).exp() @ v)
        heads = torch.cat(outputs, dim=1).transpose(0, 1)
        if not self.config.interest_mass:
            return heads, None
        log_sum = torch.cat(log_sums, dim=1).T - math.log(self.config.mass_scale)
        return heads, torch.logaddexp(log_sum, torch.zeros_like(log_sum))

    def _log_weights(self, weights: Tensor | None, age: Tensor | None, tokens: Tensor) -> Tensor | None:
        """log w_hi, [H, n]; None where every weight is 1. A weight of 0 becomes 1e-30."""
        if weights is None and (age is None or self.config.half_lives is None):
            return None
        bias = tokens.new_zeros(self.config.num_heads, len(tokens))
        if age is not None:
            bias = bias - self.decay[:, None].to(tokens.dtype) * age.to(tokens.dtype)
        return bias if weights is None else bias + weights.to(tokens.dtype).clamp(min=1e-30).log()
