"""Softmax target attention, over everything or over the latest events."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torchrec.sparse.jagged_tensor import JaggedTensor

from ifa_torchrec.modules.base import SequenceInteraction
from ifa_torchrec.modules.config import InteractionConfig, at_least_one
from ifa_torchrec.modules.history import History
from ifa_torchrec.ops.jagged import rows_of_requests


def softmax_gain(config: InteractionConfig) -> float:
    """What queries and keys start as, times the (normed) tokens: the score of a token with itself is
    then 12, enough to stand out among 10^4.

    Example:
        >>> from ifa_torchrec.modules import InteractionConfig
        >>> from ifa_torchrec.modules.softmax import softmax_gain
        >>> round(softmax_gain(InteractionConfig(embedding_dim=16, num_heads=1)) ** 2 * 16 / 4, 6)
        12.0
    """
    return (12 / config.head_width**0.5) ** 0.5


class SoftmaxAttention(SequenceInteraction):
    """Multi-head softmax target attention over the history (Vaswani et al. 2017), O(n m d).

    Each request is attended by itself, so that nothing is padded. Half-lives and event weights
    enter as log w_i beside the scores, the softmax form of the same weighting; an event of weight 0 is
    not there.

    Args:
        config: InteractionConfig.
        recent_length: attend only to the latest so many events; None for all. Identity heads, if
            the config has any, see the whole history all the same.
        device: of the parameters.

    Example:
        >>> import torch
        >>> from torchrec.sparse.jagged_tensor import JaggedTensor
        >>> from ifa_torchrec.modules import InteractionConfig, SoftmaxAttention
        >>> softmax = SoftmaxAttention(InteractionConfig(8, num_heads=2), recent_length=2)
        >>> tokens = JaggedTensor(torch.randn(5, 8), lengths=torch.tensor([5, 0]))
        >>> softmax(tokens, tokens).values().shape
        torch.Size([5, 8])
    """

    def __init__(
        self,
        config: InteractionConfig,
        recent_length: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(config, device)
        if recent_length is not None:
            at_least_one("recent_length", recent_length)
        self.recent_length = recent_length
        gain = softmax_gain(config)
        self.query_proj = self._projection(gain, device)
        self.key_proj = self._projection(gain, device)

    def dense_heads(
        self, candidates: JaggedTensor, history: History, candidate_ids: Tensor | None, /
    ) -> tuple[Tensor, Tensor | None]:
        """Outputs [M, H, d], and masses [M, H] if the config asks for them."""
        history = history.present()
        if self.recent_length is not None:
            history = history.latest(self.recent_length)
        tokens = history.tokens
        lengths = rows_of_requests(history.offsets, tokens.shape[0])
        shape = (-1, self.config.num_heads, self.config.head_width)
        keys = self.key_proj(tokens).view(shape).transpose(0, 1)
        values = self.value_proj(tokens).view(shape).transpose(0, 1)
        query = self.query_proj(candidates.values()).view(shape).transpose(0, 1)
        bias = self._log_weights(history)
        biases = [None] * len(lengths) if bias is None else bias.split(lengths, dim=1)
        outputs, log_sums = [query[:, :0]], [query[:, :0, 0]]
        sets = query.split(rows_of_requests(candidates.offsets(), query.shape[1]), dim=1)
        parts = (keys.split(lengths, dim=1), values.split(lengths, dim=1), biases)
        for q, k, v, log_weight in zip(sets, *parts, strict=True):
            if k.shape[1] == 0 or q.shape[1] == 0:
                outputs.append(torch.zeros_like(q))
                log_sums.append(torch.full_like(q[..., 0], -torch.inf))
                continue
            output, log_sum = self._attend(q, k, v, log_weight)
            outputs.append(output)
            log_sums.append(log_sum)
        heads = torch.cat(outputs, dim=1).transpose(0, 1)
        if not self.config.interest_mass:
            return heads, None
        return heads, self._mass_of_log(torch.cat(log_sums, dim=1).T)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, log_weight: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """One request, from q [H, m, d], k and v [H, n, d] and log_weight [H, n].

        Returns:
            Outputs [H, m, d], and the logarithms of the sums of the weights [H, m] (not to be read
            where the config asks for no masses).
        """
        if not self.config.interest_mass:
            mask = (
                None if log_weight is None else log_weight[None, :, None].expand(-1, -1, len(q[0]), -1)
            )
            return F.scaled_dot_product_attention(q[None], k[None], v[None], mask)[0], q[..., 0]
        # the fused kernel does not give the sum of the exponentials, which the mass needs
        score = self._scores(q, k, log_weight)
        log_sum = score.logsumexp(-1)
        return (score - log_sum[..., None]).exp() @ v, log_sum

    def _scores(self, q: Tensor, k: Tensor, log_weight: Tensor | None) -> Tensor:
        """[H, m, n]"""
        score = q @ k.mT / self.config.head_width**0.5
        return score if log_weight is None else score + log_weight[:, None]
