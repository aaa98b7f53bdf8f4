"""SOLAR: the strongest directions of a history, to which all candidates attend."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor

from ifa_torchrec.modules.base import SequenceInteraction
from ifa_torchrec.modules.config import InteractionConfig, at_least_one
from ifa_torchrec.modules.history import History, normalised
from ifa_torchrec.modules.peers.padding import padded
from ifa_torchrec.modules.softmax import softmax_gain
from ifa_torchrec.ops.autocast import without_autocast
from ifa_torchrec.ops.jagged import request_of_row

_NOTHING = 1e-6
"""Share of the strongest direction's energy below which a direction is only rounding error."""


class SOLARAttention(SequenceInteraction):
    """Softmax attention of the candidates to the r directions of a truncated SVD of the user's events
    (SOLAR, Zhang et al. 2026, arXiv 2603.02561, in part by the authors of IFA). O(n D^2 + m r d), with a
    cacheable state of r rows.

    Only the paper's abstract was available: an SVD of the events, softmax kept, no event dropped. The
    form is ours. For events x_i with weights w_i and their sum W, the rows sqrt(w_i / W) x_i form
    U S V^T. The directions are the r strongest rows of S V^T, and are used like event tokens: keys and
    values are projected from them. Through the factor 1 / sqrt(W) they do not grow with the history. The
    sign, which an SVD leaves open, is that of the events' mean along the direction. Directions within
    rounding error are dropped.

    U and the signs are treated as constants in the gradient, so that a direction is a fixed sum of
    events. The gradient is therefore finite even for equal singular values or fewer events than r, where
    the SVD has no derivative.

    Args:
        config: InteractionConfig.
        rank: r.
        device: of the parameters.

    Example:
        >>> import torch
        >>> from torchrec.sparse.jagged_tensor import JaggedTensor
        >>> from ifa_torchrec.modules import InteractionConfig, SOLARAttention
        >>> peer = SOLARAttention(InteractionConfig(8, num_heads=2), rank=4)
        >>> tokens = JaggedTensor(torch.randn(5, 8), lengths=torch.tensor([5, 0]))
        >>> peer(tokens, tokens).values().shape
        torch.Size([5, 8])
    """

    reads_sizes = True

    def __init__(
        self, config: InteractionConfig, rank: int = 32, device: torch.device | str | None = None
    ) -> None:
        super().__init__(config, device)
        self.rank = at_least_one("rank", rank)
        gain = softmax_gain(config)
        self.query_proj = self._projection(gain, device)
        self.key_proj = self._projection(gain, device)

    def dense_heads(
        self, candidates: JaggedTensor, history: History, candidate_ids: Tensor | None, /
    ) -> tuple[Tensor, Tensor]:
        """Outputs [M, H, d] and masses [M, H]."""
        directions, there, total = self.directions(history)
        directions = directions.expand(-1, self.config.num_heads, -1, -1)  # [B, H, r, D]
        there, total = there[:, None], total[:, None]
        keys, values = (
            torch.einsum("bhrD,hdD->bhrd", directions, self.heads(p).to(directions.dtype))
            for p in (self.key_proj, self.value_proj)
        )
        query = self.query_proj(candidates.values()).unflatten(1, (self.config.num_heads, -1))
        query, asked = padded(query.to(keys.dtype), candidates.offsets())
        score = torch.einsum("bmhd,bhrd->bmhr", query, keys) / self.config.head_width**0.5
        score = score.masked_fill(~there, torch.finfo(score.dtype).min / 2)
        log_sum = score.logsumexp(-1)
        share = (score - log_sum[..., None]).exp() * there
        outputs = torch.einsum("bmhr,bhrd->bmhd", share, values)
        # each direction represents an equal part of the events' total weight
        found = there.sum(-1, dtype=total.dtype)
        each = total.clamp(min=torch.finfo(total.dtype).tiny).log() - found.clamp(min=1).log()
        log_matched = (log_sum + each).masked_fill(found == 0, -torch.inf)
        return outputs[asked], self._mass_of_log(log_matched)[asked]

    def directions(self, history: History) -> tuple[Tensor, Tensor, Tensor]:
        """The rows of S V^T, [B, H, r, D] (H is 1 if no head has a half-life; at most D rows); which of
        them exist, [B, H, r] bool; and the total weight of the events, [B, H]."""
        history = history.present().widened()
        tokens, owner = history.tokens, request_of_row(history.offsets)
        weight = history.event_weights(self.half_lives if self.config.half_lives else (math.inf,))
        total = weight.new_zeros(len(history), weight.shape[1]).index_add(0, owner, weight)
        share = normalised(weight[..., None], total[owner])[..., 0]
        lengths = history.lengths.tolist()
        split = zip(tokens.split(lengths), share.split(lengths), strict=True)
        parts = [(x, p.T[..., None]) for x, p in split]
        with without_autocast(tokens):
            basis, there = self._basis(parts, tokens.new_zeros(0, weight.shape[1], *tokens.shape[1:]))
            sums = [tokens.new_zeros(0, *there.shape[1:], tokens.shape[1])]
            for (x, p), b in zip(parts, basis, strict=True):
                sums.append((((x @ b).detach() * p).mT @ x)[None])
        return torch.cat(sums), there, total

    @torch.no_grad()
    def _basis(self, parts: list[tuple[Tensor, Tensor]], none: Tensor) -> tuple[Tensor, Tensor]:
        """V S^-1 of the strongest r directions, [B, H, D, r], 0 for missing ones, and which exist;
        from pairs of tokens [n, D] and shares [H, n, 1]."""
        dim = none.shape[-1]
        gram, mean = [none.new_zeros(0, none.shape[1], dim, dim)], [none]
        for x, p in parts:
            gram.append(((p * x).mT @ x)[None])
            mean.append((p * x).sum(1)[None])
        # the sums are in the tokens' dtype, their decomposition in float64
        energy, basis = torch.linalg.eigh(torch.cat(gram).double())
        energy, basis = energy.flip(-1)[..., : self.rank], basis.flip(-1)[..., : self.rank]
        there = energy > _NOTHING * energy[..., :1].clamp(min=torch.finfo(none.dtype).tiny)
        along = (torch.cat(mean).double()[..., None, :] @ basis)[..., 0, :]
        scale = torch.where(along < 0, -1.0, 1.0) * there / energy.clamp(min=1e-300).sqrt()
        return (basis * scale[..., None, :]).to(none.dtype), there
