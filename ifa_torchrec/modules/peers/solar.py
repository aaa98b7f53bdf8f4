"""SOLAR: a history becomes its strongest directions, which all candidates attend to."""

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
"""Share of the strongest direction's energy below which a direction is rounding."""


class SOLARAttention(SequenceInteraction):
    """A truncated SVD of the user's events to rank r, softmax of the candidates over the r directions
    (SOLAR, Zhang et al. 2026, arXiv 2603.02561, in part by the authors of IFA). O(n D^2 + m r d), and a
    cached state of r rows.

    Only the paper's abstract was at hand: the SVD of the events, the softmax that stays, no event
    dropped. The form is ours. Of events x_i with weights w_i, W their sum, sqrt(w_i / W) x_i are the
    rows of U S V^T; a direction is a row of S V^T, of the strongest r, as an event is a token: keys and
    values are projected from it. Scaled by 1 / sqrt(W) it does not grow with the history; its sign,
    which an SVD leaves open, is the one that the events' mean has along it. A direction that does not
    stand out from rounding is not there.

    U and the signs are constants of the gradient, so that a direction is a fixed sum of events: finite
    also of equal singular values and of fewer events than r, where the SVD has no derivative.

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
        # the directions stand for the events' weight in equal parts
        found = there.sum(-1, dtype=total.dtype)
        each = total.clamp(min=torch.finfo(total.dtype).tiny).log() - found.clamp(min=1).log()
        log_matched = (log_sum + each).masked_fill(found == 0, -torch.inf)
        return outputs[asked], self._mass_of_log(log_matched)[asked]

    def directions(self, history: History) -> tuple[Tensor, Tensor, Tensor]:
        """The rows of S V^T, [B, H, r, D] (one head's for all where none has a half-life; at most D of
        them), which of them are there, [B, H, r] bool, and the weight of the events in all, [B, H]."""
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
        """V S^-1 of the strongest r directions, [B, H, D, r], 0 where they are not there, of pairs of
        tokens [n, D] and shares [H, n, 1]."""
        dim = none.shape[-1]
        gram, mean = [none.new_zeros(0, none.shape[1], dim, dim)], [none]
        for x, p in parts:
            gram.append(((p * x).mT @ x)[None])
            mean.append((p * x).sum(1)[None])
        # of sums in the tokens' dtype the solution is exact in float64
        energy, basis = torch.linalg.eigh(torch.cat(gram).double())
        energy, basis = energy.flip(-1)[..., : self.rank], basis.flip(-1)[..., : self.rank]
        there = energy > _NOTHING * energy[..., :1].clamp(min=torch.finfo(none.dtype).tiny)
        along = (torch.cat(mean).double()[..., None, :] @ basis)[..., 0, :]
        scale = torch.where(along < 0, -1.0, 1.0) * there / energy.clamp(min=1e-300).sqrt()
        return (basis * scale[..., None, :]).to(none.dtype), there
