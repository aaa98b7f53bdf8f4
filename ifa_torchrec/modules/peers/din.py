"""DIN: an MLP weighs each of the latest events for each candidate."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchrec.modules.mlp import MLP
from torchrec.sparse.jagged_tensor import JaggedTensor

from ifa_torchrec.modules.base import SequenceInteraction
from ifa_torchrec.modules.config import InteractionConfig, at_least_one
from ifa_torchrec.modules.history import History
from ifa_torchrec.ops.jagged import on_cpu, request_of_row


class DINAttention(SequenceInteraction):
    """Target attention by an MLP over the latest events (DIN, Zhou et al. 2018, arXiv 1706.06978).

    The input of the MLP is event, candidate, their difference and their product; its output is a weight
    between 0 and 1 for each head. A head is the weighted sum of the events' values, not normalised, as
    in the paper.

    Args:
        config: InteractionConfig.
        recent_length: the number of latest events that a candidate attends to.
        device: of the parameters.

    Raises:
        ValueError: recent_length is less than 1.

    Example:
        >>> import torch
        >>> from torchrec.sparse.jagged_tensor import JaggedTensor
        >>> from ifa_torchrec.modules import InteractionConfig, DINAttention
        >>> peer = DINAttention(InteractionConfig(8, num_heads=2), recent_length=2)
        >>> tokens = JaggedTensor(torch.randn(5, 8), lengths=torch.tensor([5, 0]))
        >>> peer(tokens, tokens).values().shape
        torch.Size([5, 8])
    """

    def __init__(
        self,
        config: InteractionConfig,
        recent_length: int = 50,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(config, device)
        self.recent_length = at_least_one("recent_length", recent_length)
        self.activation_unit = nn.Sequential(
            MLP(
                4 * config.embedding_dim,
                [64, 32],
                dtype=torch.get_default_dtype(),
                device=None if device is None else torch.device(device),
            ),
            nn.Linear(32, config.num_heads, device=device),
        )

    def dense_heads(
        self, candidates: JaggedTensor, history: History, candidate_ids: Tensor | None, /
    ) -> tuple[Tensor, Tensor]:
        """Outputs [M, H, d] and masses [M, H]."""
        history = history.present()
        tokens = history.tokens
        request = request_of_row(candidates.offsets(), candidates.values().shape[0])
        # one row per pair: [P] candidates and their events, latest first
        back = torch.arange(self.recent_length, device=tokens.device)
        there = back < history.lengths[request][:, None]
        # padding refers to a row of zeros after the last event
        event = torch.where(there, history.offsets[1:][request][:, None] - 1 - back, tokens.shape[0])
        candidate = torch.arange(request.shape[0], device=tokens.device)[:, None].expand_as(event)
        # drop the padding, but not on a GPU, where counting the rest would wait for the device
        event, candidate = (
            rows[there] if on_cpu(rows) else rows.flatten() for rows in (event, candidate)
        )
        weight = F.pad(history.widened().event_weights(self.half_lives), (0, 0, 0, 1))
        x = F.pad(tokens, (0, 0, 0, 1)).index_select(0, event)
        c = candidates.values().index_select(0, candidate)
        unit = self.activation_unit(torch.cat([x, c, x - c, x * c], dim=1)).sigmoid()
        unit = unit * weight[event]  # [P, H]
        sums = unit.new_zeros(request.shape[0], unit.shape[1], tokens.shape[1])
        sums = sums.index_add(0, candidate, unit[..., None] * x[:, None])
        matched = unit.new_zeros(request.shape[0], unit.shape[1]).index_add(0, candidate, unit)
        values = self.heads(self.value_proj).to(sums.dtype)
        return torch.einsum("mhD,hdD->mhd", sums, values), self._mass(matched)
