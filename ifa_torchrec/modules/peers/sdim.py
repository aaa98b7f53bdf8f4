"""SDIM: candidates average the events in their hash buckets."""

from __future__ import annotations

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor

from ifa_torchrec.modules.base import SequenceInteraction
from ifa_torchrec.modules.config import InteractionConfig
from ifa_torchrec.modules.history import History, normalised
from ifa_torchrec.modules.projections import hyperplanes


class SDIMAttention(SequenceInteraction):
    """Sampling by hash collision (SDIM, Cao et al. 2022, arXiv 2205.10249).

    Tokens are hashed by G groups of random bits, frozen in a buffer of the checkpoint. A candidate
    averages the events that share its bucket, over all groups: attention whose weight is the share of
    groups in which two tokens collide. Buckets are additive over events, like IFA's state.

    Args:
        config: InteractionConfig.
        num_groups: G.
        group_bits: bits per group, for 2^bits buckets.
        device: of the parameters.

    Example:
        >>> import torch
        >>> from torchrec.sparse.jagged_tensor import JaggedTensor
        >>> from ifa_torchrec.modules import InteractionConfig, SDIMAttention
        >>> peer = SDIMAttention(InteractionConfig(8, num_heads=2))
        >>> tokens = JaggedTensor(torch.randn(5, 8), lengths=torch.tensor([5, 0]))
        >>> peer(tokens, tokens).values().shape
        torch.Size([5, 8])
    """

    hyperplanes: Tensor
    reads_sizes = True

    def __init__(
        self,
        config: InteractionConfig,
        num_groups: int = 16,
        group_bits: int = 3,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(config, device)
        bits = num_groups * group_bits
        self.register_buffer("hyperplanes", hyperplanes(config.embedding_dim, bits, device))
        self.num_groups, self.group_bits = num_groups, group_bits

    def reset_parameters(self) -> None:
        """(Re)initialise all parameters and the hash; call after ``to_empty``."""
        super().reset_parameters()
        self.hyperplanes.normal_()

    def dense_heads(
        self, candidates: JaggedTensor, history: History, candidate_ids: Tensor | None, /
    ) -> tuple[Tensor, Tensor]:
        """Outputs [M, H, d] and masses [M, H]."""
        had = self._buckets(history.tokens)
        history = history.widened()
        tokens, events = history.tokens, history.lengths.tolist()
        weight = history.event_weights(self.half_lives)
        sets = candidates.offsets().diff().tolist()
        outputs = [tokens.new_zeros(0, weight.shape[1], tokens.shape[1])]
        matched = [weight[:0]]
        asked = self._buckets(candidates.values()).split(sets)
        parts = (asked, had.split(events), tokens.split(events), weight.split(events))
        for ask, bucket, x, w in zip(*parts, strict=True):
            # [n, G 2^bits]: dense products are faster than scattering
            member = x.new_zeros(len(x), self.num_groups << self.group_bits).scatter(1, bucket, 1.0)
            weighted = torch.cat([(w[..., None] * x[:, None]).flatten(1), w], dim=1)
            table = member.T @ weighted  # one row per bucket: H sums of tokens, H sums of weights
            found = table[ask].sum(1)
            total = found[:, -w.shape[1] :]
            sums = found[:, : -w.shape[1]].unflatten(1, (w.shape[1], -1))
            outputs.append(normalised(sums, total))
            matched.append(total / self.num_groups)
        values = self.heads(self.value_proj).to(tokens.dtype)
        heads = torch.einsum("mhD,hdD->mhd", torch.cat(outputs), values)
        return heads, self._mass(torch.cat(matched))

    def _buckets(self, tokens: Tensor) -> Tensor:
        """[rows, G] int64, each group's bucket, numbered across all groups."""
        bits = (tokens.detach() @ self.hyperplanes > 0).unflatten(1, (self.num_groups, -1))
        powers = 2 ** torch.arange(self.group_bits, device=tokens.device)
        first = torch.arange(self.num_groups, device=tokens.device) << self.group_bits
        return (bits * powers).sum(2) + first
