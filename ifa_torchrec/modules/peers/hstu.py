"""HSTU: the latest events attend to each other, and the candidates to the result."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import JaggedTensor

from ifa_torchrec.modules.base import SequenceInteraction
from ifa_torchrec.modules.config import InteractionConfig, at_least_one
from ifa_torchrec.modules.history import History
from ifa_torchrec.modules.peers.padding import padded
from ifa_torchrec.modules.projections import ZeroLinear

_TIMES = 16
"""Buckets of the time between two events, by its base-2 logarithm in days."""


class HSTUAttention(SequenceInteraction):
    """HSTU's pointwise self-attention over the latest events, to whose result the candidates attend
    (Zhai et al. 2024, arXiv 2402.17152). It is the one peer that uses the order of events.
    O(l^2 d + m l d).

    From the paper: queries, keys, values and gates come from one projection and silu; attention is
    silu(q k + bias) / l without a softmax, with position and time biases; the normed output is
    multiplied by the gate.
    Ours: one causal layer among the events and one for the candidates, which do not attend to each
    other; norms per head; scores divided by sqrt(d); the attention multiplied by event weights and
    half-life decay; the mass from the sum of w_i sigmoid(q k_i + bias), the sigmoid within silu. The
    first layer starts as the identity.

    Args:
        config: InteractionConfig.
        recent_length: l, the number of latest events.
        device: of the parameters.

    Example:
        >>> import torch
        >>> from torchrec.sparse.jagged_tensor import JaggedTensor
        >>> from ifa_torchrec.modules import HSTUAttention, InteractionConfig
        >>> peer = HSTUAttention(InteractionConfig(8, num_heads=2), recent_length=4)
        >>> tokens = JaggedTensor(torch.randn(5, 8), lengths=torch.tensor([5, 0]))
        >>> peer(tokens, tokens).values().shape
        torch.Size([5, 8])
    """

    reads_sizes = True

    def __init__(
        self,
        config: InteractionConfig,
        recent_length: int = 200,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(config, device)
        self.recent_length = at_least_one("recent_length", recent_length)
        width = config.num_heads * config.head_width
        self.event_proj = nn.Linear(config.embedding_dim, 4 * width, bias=False, device=device)
        self.event_output = ZeroLinear(width, config.embedding_dim, device)
        self.event_bias = _Bias(config.num_heads, recent_length, device)
        self.query_proj = self._projection(device=device)
        self.gate_proj = self._projection(device=device)
        self.key_proj = self._projection(device=device)
        self.candidate_bias = _Bias(config.num_heads, recent_length, device)

    def dense_heads(
        self, candidates: JaggedTensor, history: History, candidate_ids: Tensor | None, /
    ) -> tuple[Tensor, Tensor]:
        """Outputs [M, H, d] and masses [M, H]."""
        history = history.present().latest(self.recent_length)
        events, there = padded(history.tokens, history.offsets)
        weight = padded(history.event_weights(self.half_lives), history.offsets)[0]
        weight = (weight * there[..., None]).transpose(1, 2)[:, :, None]  # [B, H, 1, n]
        ages = history.ages
        time = weight[:, 0, 0] * 0 if ages is None else padded(ages, history.offsets)[0]
        events = self._among_events(events, weight, time)
        normed = _normed(events)
        keys, values = (F.silu(self._heads(p(normed))) for p in (self.key_proj, self.value_proj))
        rows, asked = padded(candidates.values(), candidates.offsets())
        rows = _normed(rows)
        query, gate = (F.silu(self._heads(p(rows))) for p in (self.query_proj, self.gate_proj))
        back = there.sum(1, keepdim=True) - 1 - torch.arange(there.shape[1], device=there.device)
        score = query @ keys.mT / self.config.head_width**0.5
        score = score + self.candidate_bias(back.clamp(min=0), time)[:, :, None]
        outputs = self._gated(score * score.sigmoid() * weight @ values, gate)
        mass = self._mass((score.sigmoid() * weight).sum(-1))
        return outputs.transpose(1, 2)[asked], mass.transpose(1, 2)[asked]

    def _among_events(self, events: Tensor, weight: Tensor, time: Tensor) -> Tensor:
        """Events [B, n, D] after causal self-attention, with weights [B, H, 1, n] and ages [B, n]."""
        gate, values, query, keys = (
            self._heads(part) for part in F.silu(self.event_proj(_normed(events))).chunk(4, -1)
        )
        place = torch.arange(events.shape[1], device=events.device)
        back = place[:, None] - place
        score = query @ keys.mT / self.config.head_width**0.5
        bias = self.event_bias(back.clamp(min=0)[None], (time[:, None] - time[..., None]).clamp(min=0))
        share = F.silu(score + bias) * weight * (back >= 0)
        outputs = self._gated(share @ values, gate)
        return events + self.event_output(outputs.transpose(1, 2).flatten(2))

    def _gated(self, outputs: Tensor, gate: Tensor) -> Tensor:
        return _normed(outputs / self.recent_length) * gate

    def _heads(self, rows: Tensor) -> Tensor:
        """[B, n, H d] as [B, H, n, d]"""
        return rows.unflatten(-1, (self.config.num_heads, -1)).transpose(1, 2)


class _Bias(nn.Module):
    """The bias of an event's score by its distance in places and in days; starts at 0."""

    def __init__(self, heads: int, length: int, device: torch.device | str | None) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.zeros(heads, length, device=device))
        self.time = nn.Parameter(torch.zeros(heads, _TIMES, device=device))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.place)
        nn.init.zeros_(self.time)

    def forward(self, place: Tensor, time: Tensor) -> Tensor:
        """[B, H, ...] for places [B, ...] or [1, ...] and times [B, ...]"""
        bucket = time.log1p().div(torch.log(time.new_tensor(2.0))).long().clamp(max=_TIMES - 1)
        bias = self.place[:, place] + self.time[:, bucket]
        return bias.transpose(0, 1)


def _normed(rows: Tensor) -> Tensor:
    return F.layer_norm(rows, rows.shape[-1:], eps=1e-6)
