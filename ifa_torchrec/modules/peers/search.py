"""Softmax attention over the few events that a search finds for each candidate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchrec.sparse.jagged_tensor import JaggedTensor

from ifa_torchrec.modules.base import SequenceInteraction
from ifa_torchrec.modules.config import InteractionConfig, at_least_one
from ifa_torchrec.modules.history import History
from ifa_torchrec.modules.projections import hyperplanes
from ifa_torchrec.modules.softmax import SoftmaxAttention, softmax_gain
from ifa_torchrec.ops.jagged import request_of_row


class TWINAttention(SoftmaxAttention):
    """Search by the attention's own scores (TWIN, Chang et al. 2023, arXiv 2302.02352).

    Each head of each candidate attends to the events with its highest scores. TWIN's cheaper keys,
    projected once per item and cached, are not implemented.

    Args:
        config: InteractionConfig.
        search_length: events that the search keeps.
        device: of the parameters.

    Example:
        >>> import torch
        >>> from torchrec.sparse.jagged_tensor import JaggedTensor
        >>> from ifa_torchrec.modules import InteractionConfig, TWINAttention
        >>> peer = TWINAttention(InteractionConfig(8, num_heads=2), search_length=2)
        >>> tokens = JaggedTensor(torch.randn(5, 8), lengths=torch.tensor([5, 0]))
        >>> peer(tokens, tokens).values().shape
        torch.Size([5, 8])
    """

    _together = False

    def __init__(
        self,
        config: InteractionConfig,
        search_length: int = 50,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(config, device=device)
        self.search_length = at_least_one("search_length", search_length)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, log_weight: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        score = self._scores(q, k, log_weight)
        score, event = score.topk(min(self.search_length, k.shape[1]), dim=-1)
        return _over(score, _taken(v, event))


class ETAAttention(SoftmaxAttention):
    """Search by locality-sensitive hashing (ETA, Chen et al. 2021, arXiv 2108.04468).

    The search compares SimHash signatures of queries and keys, and keeps the events with the smallest
    Hamming distance, the later ones in a tie. The hash is random and frozen in a buffer of the
    checkpoint. Distances are matrix products of signs, since torch cannot count bits.

    Args:
        config: InteractionConfig.
        search_length: events that the search keeps.
        num_hashes: bits of a signature.
        device: of the parameters.

    Example:
        >>> import torch
        >>> from torchrec.sparse.jagged_tensor import JaggedTensor
        >>> from ifa_torchrec.modules import InteractionConfig, ETAAttention
        >>> peer = ETAAttention(InteractionConfig(8, num_heads=2), search_length=2)
        >>> tokens = JaggedTensor(torch.randn(5, 8), lengths=torch.tensor([5, 0]))
        >>> peer(tokens, tokens).values().shape
        torch.Size([5, 8])
    """

    _together = False

    hyperplanes: Tensor

    def __init__(
        self,
        config: InteractionConfig,
        search_length: int = 50,
        num_hashes: int = 64,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(config, device=device)
        self.search_length = at_least_one("search_length", search_length)
        self.register_buffer("hyperplanes", hyperplanes(config.head_width, num_hashes, device))

    def reset_parameters(self) -> None:
        """(Re)initialise all parameters and the hash; call after ``to_empty``."""
        super().reset_parameters()
        self.hyperplanes.normal_()

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, log_weight: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        n = k.shape[1]
        with torch.no_grad():
            same = self._signature(q) @ self._signature(k).mT  # bits that agree minus bits that differ
            later = torch.arange(n, device=k.device, dtype=same.dtype) / n  # less than one bit
            event = (same + later).topk(min(self.search_length, n), dim=-1).indices
        score = torch.einsum("hmd,hmld->hml", q, _taken(k, event)) / self.config.head_width**0.5
        if log_weight is not None:
            score = score + _taken(log_weight, event)
        return _over(score, _taken(v, event))

    def _signature(self, x: Tensor) -> Tensor:
        # bfloat16 cannot represent all counts of agreeing bits
        dtype = torch.promote_types(x.dtype, torch.float32)
        return torch.where(x @ self.hyperplanes > 0, 1.0, -1.0).to(dtype)


class SIMAttention(SequenceInteraction):
    """Hard search: the latest events of the candidate's own category (SIM, Pi et al. 2020,
    arXiv 2006.05639). Id 0, "unknown", finds nothing.

    Args:
        config: InteractionConfig.
        search_feature: the id feature that events and candidates must share; None for the last
            of config.identity_features.
        search_length: events that the search keeps.
        device: of the parameters.

    Raises:
        ValueError: there is no feature to search by.

    Example:
        >>> import torch
        >>> from torchrec.sparse.jagged_tensor import JaggedTensor
        >>> from ifa_torchrec.modules import InteractionConfig, SIMAttention
        >>> sim = SIMAttention(InteractionConfig(8, num_heads=2), "category")
        >>> tokens = JaggedTensor(torch.randn(5, 8), lengths=torch.tensor([5, 0]))
        >>> category = torch.tensor([[1], [2], [2], [1], [3]])
        >>> sim(tokens, tokens, history_ids=category, candidate_ids=category).values().shape
        torch.Size([5, 8])
    """

    def __init__(
        self,
        config: InteractionConfig,
        search_feature: str | None = None,
        search_length: int = 50,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(config, device)
        if search_feature is None and not config.identity_features:
            raise ValueError("SIMAttention: set search_feature, the id feature to search by")
        self.search_feature = search_feature or config.identity_features[-1]
        self.search_length = at_least_one("search_length", search_length)
        gain = softmax_gain(config)
        self.query_proj = self._projection(gain, device)
        self.key_proj = self._projection(gain, device)

    @property
    def id_features(self) -> tuple[str, ...]:
        """The identity features and, if it is not one of them, the feature to search by."""
        identity = self.config.identity_features
        return identity if self.search_feature in identity else (*identity, self.search_feature)

    def dense_heads(
        self,
        candidates: JaggedTensor,
        history: History,
        candidate_ids: Any,  # a Tensor: there is always an id feature, and `forward` asks for its ids
        /,
    ) -> tuple[Tensor, Tensor]:
        """Outputs [M, H, d] and masses [M, H]."""
        history = history.present()
        ids: Any = history.ids
        column = self.id_features.index(self.search_feature)
        rows = same_id_rows(
            request_of_row(candidates.offsets(), candidates.values().shape[0]),
            candidate_ids[:, column],
            request_of_row(history.offsets, history.tokens.shape[0]),
            ids[:, column],
            self.search_length,
        )
        tokens = history.tokens
        found = rows >= 0
        # missing events refer to a row of zeros after the last event
        rows = torch.where(found, rows, len(tokens))
        padded = torch.cat([tokens, tokens.new_zeros(1, tokens.shape[1])])
        # faster than padded[rows], whose gradient takes five times as long
        events = F.embedding(rows, padded, padding_idx=len(tokens))  # [M, L, D]
        query = self.query_proj(candidates.values()).unflatten(1, (self.config.num_heads, -1))
        query = torch.einsum("mhd,hdD->mhD", query, self.heads(self.key_proj))
        score = torch.einsum("mhD,mlD->mhl", query, events) / self.config.head_width**0.5
        log_weight = self._log_weights(history)
        if log_weight is not None:
            weights = torch.cat([log_weight, log_weight.new_zeros(len(log_weight), 1)], dim=1)
            score = score + weights[:, rows].transpose(0, 1)
        score = score.masked_fill(~found[:, None], torch.finfo(score.dtype).min / 2)
        log_sum = score.logsumexp(-1)
        share = (score - log_sum[..., None]).exp() * found[:, None]
        heads = torch.einsum("mhl,mlD->mhD", share, events)
        heads = torch.einsum("mhD,hdD->mhd", heads, self.heads(self.value_proj))
        return heads, self._mass_of_log(log_sum.masked_fill(~found.any(1)[:, None], -torch.inf))


def same_id_rows(
    request: Tensor, ids: Tensor, event_request: Tensor, event_ids: Tensor, length: int
) -> Tensor:
    """For each candidate the events of its request that have its id, latest first.

    Args:
        request, ids: [M] integers, of the candidates; id 0 has no events.
        event_request, event_ids: [N] integers, of the events, oldest first in each request.
        length: L, most events per candidate.

    Returns:
        [M, L] int64, rows of events; -1 where there are no more.

    Example:
        >>> import torch
        >>> from ifa_torchrec.modules.peers.search import same_id_rows
        >>> same_id_rows(torch.tensor([0, 1]), torch.tensor([7, 7]), torch.tensor([0, 0, 0, 1]),
        ...     torch.tensor([7, 8, 7, 9]), length=3).tolist()
        [[2, 0, -1], [-1, -1, -1]]
    """
    both = torch.cat([event_ids.to(torch.int64), ids.to(torch.int64)])
    # ranks of the ids; torch.unique would wait for a GPU to know its size
    ranked, order = torch.sort(both)
    number = torch.zeros_like(both)
    number[order[1:]] = (ranked[1:] != ranked[:-1]).cumsum(0)
    event_key = event_request * both.shape[0] + number[: event_ids.shape[0]]
    key = request * both.shape[0] + number[event_ids.shape[0] :]
    event_key, order = torch.sort(event_key, stable=True)
    first = torch.searchsorted(event_key, key)
    last = torch.searchsorted(event_key, key, right=True) - 1
    place = last[:, None] - torch.arange(length, device=ids.device)
    order = torch.cat([order, order.new_tensor([-1])])
    found = (place >= first[:, None]) & (ids != 0)[:, None]
    return torch.where(found, order[place.clamp(min=0)], -1)


def _taken(x: Tensor, event: Tensor) -> Tensor:
    """x [H, n, ...] at event [H, m, l]: [H, m, l, ...]."""
    first = torch.arange(0, x.shape[0] * x.shape[1], x.shape[1], device=x.device)
    rows = (first[:, None, None] + event).flatten()
    # faster than x[head, event], whose gradient takes twice as long
    return x.flatten(0, 1).index_select(0, rows).unflatten(0, event.shape)


def _over(score: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax of score [H, m, l] over v [H, m, l, d]; outputs and log sums."""
    log_sum = score.logsumexp(-1)
    return torch.einsum("hml,hmld->hmd", (score - log_sum[..., None]).exp(), v), log_sum
