"""Low-rank attention: r summaries of the history, to which all candidates attend."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ifa_torchrec.modules.config import InteractionConfig, at_least_one
from ifa_torchrec.modules.softmax import SoftmaxAttention


class LowRankAttention(SoftmaxAttention):
    """r learned latents summarise the history, and candidates attend to the summaries.

    O((n + m) r d), with a cacheable state of r keys and values per head: a low-rank factorisation of
    attention over long histories in the manner of LREA (Low-Rank Efficient Attention, 2025), with
    the latents of the Set Transformer (Lee et al. 2019) as the factor.

    Args:
        config: InteractionConfig.
        rank: r.
        device: of the parameters.

    Example:
        >>> import torch
        >>> from torchrec.sparse.jagged_tensor import JaggedTensor
        >>> from ifa_torchrec.modules import InteractionConfig, LowRankAttention
        >>> peer = LowRankAttention(InteractionConfig(8, num_heads=2), rank=4)
        >>> tokens = JaggedTensor(torch.randn(5, 8), lengths=torch.tensor([5, 0]))
        >>> peer(tokens, tokens).values().shape
        torch.Size([5, 8])
    """

    _together = False

    def __init__(
        self, config: InteractionConfig, rank: int = 32, device: torch.device | str | None = None
    ) -> None:
        super().__init__(config, device=device)
        at_least_one("rank", rank)
        self.latents = nn.Parameter(
            torch.randn(config.num_heads, rank, config.head_width, device=device)
        )

    def reset_parameters(self) -> None:
        """(Re)initialise all parameters; call after ``to_empty``."""
        super().reset_parameters()
        nn.init.normal_(self.latents)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, log_weight: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        share = self._scores(self.latents, k, log_weight).softmax(-1)
        score = self._scores(q, share @ k, None)
        log_sum = score.logsumexp(-1)
        outputs = (score - log_sum[..., None]).exp() @ (share @ v)
        # each summary represents an equal part of the events' total weight
        each = math.log(k.shape[1]) if log_weight is None else log_weight.logsumexp(-1)[:, None]
        return outputs, log_sum - math.log(self.latents.shape[1]) + each
