"""Mean pooling."""

from __future__ import annotations

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor

from ifa_torchrec.modules.base import SequenceInteraction
from ifa_torchrec.modules.history import History, normalised
from ifa_torchrec.ops.jagged import request_of_row


class MeanPooling(SequenceInteraction):
    """The weighted mean of the events' values, the same for all candidates of a request.

    Heads with different half-lives are means over different time spans.

    Args:
        config: InteractionConfig.
        device: of the parameters.

    Example:
        >>> import torch
        >>> from torchrec.sparse.jagged_tensor import JaggedTensor
        >>> from ifa_torchrec.modules import InteractionConfig, MeanPooling
        >>> mean = MeanPooling(InteractionConfig(8, num_heads=2))
        >>> tokens = JaggedTensor(torch.randn(5, 8), lengths=torch.tensor([5, 0]))
        >>> mean(tokens, tokens).values().shape
        torch.Size([5, 8])
    """

    def dense_heads(
        self, candidates: JaggedTensor, history: History, candidate_ids: Tensor | None, /
    ) -> tuple[Tensor, Tensor]:
        """Outputs [M, H, d], equal within a request, and masses [M, H]."""
        history = history.widened()
        tokens, requests = history.tokens, len(history)
        owner = request_of_row(history.offsets, tokens.shape[0])
        weight = history.event_weights(self.half_lives)
        total = tokens.new_zeros(requests, weight.shape[1]).index_add(0, owner, weight)
        if self.config.half_lives is None:  # all heads have the same weights
            sums = tokens.new_zeros(requests, 1, tokens.shape[1])
            sums = sums.index_add(0, owner, (tokens * weight[:, :1])[:, None])
        else:
            sums = tokens.new_zeros(requests, weight.shape[1], tokens.shape[1])
            sums = sums.index_add(0, owner, tokens[:, None] * weight[..., None])
        mean = normalised(sums, total[:, : sums.shape[1]])
        mean = mean.expand(-1, self.config.num_heads, -1)
        heads = torch.einsum("bhD,hdD->bhd", mean, self.heads(self.value_proj).to(mean.dtype))
        asking = request_of_row(candidates.offsets(), candidates.values().shape[0])
        return heads[asking], self._mass(total[asking])
