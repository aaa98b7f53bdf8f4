"""Softmax target attention over all or only the latest events."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torchrec.sparse.jagged_tensor import JaggedTensor

from ifa_torchrec.modules.base import SequenceInteraction
from ifa_torchrec.modules.config import InteractionConfig, at_least_one
from ifa_torchrec.modules.history import History
from ifa_torchrec.ops.jagged import rows_of_requests

_MOST_SCORES = 1 << 16
"""Most scores per head in a group of several requests."""


def softmax_gain(config: InteractionConfig) -> float:
    """The initial gain of queries and keys over the (normed) tokens. The score of a token with itself is
    then 12, enough to stand out among 10^4 events.

    Example:
        >>> from ifa_torchrec.modules import InteractionConfig
        >>> from ifa_torchrec.modules.softmax import softmax_gain
        >>> round(softmax_gain(InteractionConfig(embedding_dim=16, num_heads=1)) ** 2 * 16 / 4, 6)
        12.0
    """
    return (12 / config.head_width**0.5) ** 0.5


class SoftmaxAttention(SequenceInteraction):
    """Multi-head softmax target attention over the history (Vaswani et al. 2017), O(n m d).

    Requests of similar size are processed together, padded to the largest of them, in groups of bounded
    size; one with 10^4 candidates and events is a group of its own. Half-lives and event weights are
    added to the scores as log w_i, the softmax form of the same weighting; an event of weight 0 is
    treated as absent. Without interest masses no matrix of scores is kept.

    Args:
        config: InteractionConfig.
        recent_length: the number of latest events to attend to; None for all. Identity heads, if
            the config has any, still see the whole history.
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

    reads_sizes = True
    _together = True
    """Whether ``_attend`` may treat several requests as further heads; False if its heads differ."""

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
        """Outputs [M, H, d], and masses [M, H] if the config has interest_mass."""
        history = history.present()
        if self.recent_length is not None:
            history = history.latest(self.recent_length)
        tokens = history.tokens
        query, keys, values = self._projected(candidates.values(), tokens)
        bias = self._log_weights(history)
        asked = rows_of_requests(candidates.offsets(), query.shape[0])
        found = rows_of_requests(history.offsets, tokens.shape[0])
        if self._together and not self.config.interest_mass:
            return self._fused(query, keys, values, bias, asked, found), None
        shape = (-1, self.config.num_heads, self.config.head_width)
        query, keys, values = (rows.view(shape).transpose(0, 1) for rows in (query, keys, values))
        if len(asked) == 1 and asked[0] > 0 and found[0] > 0:
            output, log_sum = self._attend(query, keys, values, bias)  # for exported graphs
            return self._with_masses(output, log_sum)
        places, outputs, log_sums = [], [], []
        for group in _groups(asked, found, self._together):
            rows, row_there = _padded(asked, group, query.device)
            events, event_there = _padded(found, group, query.device)
            weight = None if bias is None else bias[:, events]
            if not event_there.all():
                weight = torch.zeros_like(keys[..., 0][:, events]) if weight is None else weight
                weight = weight.masked_fill(~event_there, -torch.inf)
            # requests become further heads, which are independent of each other
            output, log_sum = self._attend(
                _of_group(query, rows),
                _of_group(keys, events),
                _of_group(values, events),
                None if weight is None else weight.flatten(0, 1),
            )
            places.append(rows[row_there])
            outputs.append(output.unflatten(0, (len(query), -1))[:, row_there])
            log_sums.append(log_sum.unflatten(0, (len(query), -1))[:, row_there])
        output, log_sum = torch.zeros_like(query), torch.full_like(query[..., 0], -torch.inf)
        if places:  # candidates without events keep zeros and -inf
            place = torch.cat(places)
            output = output.index_copy(1, place, torch.cat(outputs, 1).to(output.dtype))
            log_sum = log_sum.index_copy(1, place, torch.cat(log_sums, 1).to(log_sum.dtype))
        return self._with_masses(output, log_sum)

    def _projected(self, candidates: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        """Queries [M, H d], keys and values [N, H d]."""
        if candidates is tokens:  # self-attention: one matrix product
            maps = (self.query_proj, self.key_proj, self.value_proj)
            return F.linear(tokens, torch.cat([p.weight for p in maps])).chunk(3, dim=1)
        return self.query_proj(candidates), self.key_proj(tokens), self.value_proj(tokens)

    def _fused(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        bias: Tensor | None,
        asked: list[int],
        found: list[int],
    ) -> Tensor:
        """Outputs [M, H, d] for query [M, H d], keys and values [N, H d] and bias [H, N], without
        masses: a group's requests in one batch, without a matrix of scores."""
        heads = (self.config.num_heads, self.config.head_width)
        parts: list[Tensor] = []
        places: list[Tensor] = []
        for group in _groups(asked, found, True):
            rows = _Block.of(asked, group, query.device)
            events = rows if asked == found else _Block.of(found, group, query.device)
            q = rows.take(query).unflatten(-1, heads).transpose(1, 2)
            k, v = (events.take(x).unflatten(-1, heads).transpose(1, 2) for x in (keys, values))
            mask = None if bias is None else events.take(bias.T).transpose(1, 2)
            if events.there is not None:
                mask = k.new_zeros(()) if mask is None else mask
                mask = torch.where(events.there[:, None], mask, -torch.inf)
            if mask is not None:
                mask = mask[:, :, None].expand(-1, -1, q.shape[2], -1)
            part = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(0, 1)
            if part.shape[0] == query.shape[0] and rows.rows is None:
                return part  # all rows, already in order
            place, kept = rows.places(query.device)
            places.append(place)
            parts.append(part if kept is None else part.index_select(0, kept))
        output = query.new_zeros(query.shape[0], *heads)
        if not parts:  # no candidate has events
            return output
        return output.index_copy(0, torch.cat(places), torch.cat(parts).to(output.dtype))

    def _with_masses(self, outputs: Tensor, log_sums: Tensor) -> tuple[Tensor, Tensor | None]:
        """From [H, M, d] and [H, M] to the result of ``dense_heads``."""
        masses = self._mass_of_log(log_sums.T) if self.config.interest_mass else None
        return outputs.transpose(0, 1), masses

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, log_weight: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Attention for one request, or for several as further heads, with q [H, m, d], k and v
        [H, n, d] and log_weight [H, n], -inf for padding.

        Returns:
            Outputs [H, m, d], and the logarithms of the sums of the weights [H, m] (unused if the config
            has interest_mass=False).
        """
        # the fused kernel does not return the sum of the exponentials, which the mass needs
        score = self._scores(q, k, log_weight)
        log_sum = score.logsumexp(-1)
        return (score - log_sum[..., None]).exp() @ v, log_sum

    def _scores(self, q: Tensor, k: Tensor, log_weight: Tensor | None) -> Tensor:
        """[H, m, n]"""
        score = q @ k.mT / self.config.head_width**0.5
        return score if log_weight is None else score + log_weight[:, None]


@dataclass(frozen=True)
class _Block:
    """The rows of a group's requests as one padded batch.

    Args:
        first: the first row, if all requests have the same size and are consecutive.
        size: number of requests, and rows of the largest.
        rows: [requests * largest], the rows to gather otherwise; padding repeats a row.
        there: [requests, largest] bool, False for padding; None without padding.
    """

    first: int
    size: tuple[int, int]
    rows: Tensor | None = None
    there: Tensor | None = None

    @staticmethod
    def of(sizes: list[int], group: list[int], device: torch.device) -> _Block:
        largest = sizes[group[0]]
        if len(group) == 1 or (
            group == list(range(group[0], group[0] + len(group)))
            and all(sizes[b] == largest for b in group)
        ):
            # the sum of an empty list is a constant: it fixes no size when one request is exported
            return _Block(sum(sizes[: group[0]]), (len(group), largest))
        rows, there = _padded(sizes, group, device)
        padded = any(sizes[b] != rows.shape[1] for b in group)
        size = (len(group), rows.shape[1])
        return _Block(0, size, rows.flatten(), there if padded else None)

    def take(self, x: Tensor) -> Tensor:
        """The block of x [rows, W]: [requests, largest, W]."""
        if self.rows is not None:
            return x.index_select(0, self.rows).unflatten(0, self.size)
        number = self.size[0] * self.size[1]
        mine = x if x.shape[0] == number else x[self.first : self.first + number]
        return mine.unflatten(0, self.size)

    def places(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """The rows that the block's entries come from, and the indices of entries that are not padding;
        None for all entries."""
        if self.rows is None:
            number = self.size[0] * self.size[1]
            return torch.arange(self.first, self.first + number, device=device), None
        if self.there is None:
            return self.rows, None
        kept = self.there.flatten().nonzero()[:, 0]
        return self.rows[kept], kept


def _of_group(tokens: Tensor, rows: Tensor) -> Tensor:
    """The rows [g, longest] of heads [H, n, d], as [H g, longest, d]; a view for one request, whose rows
    are consecutive."""
    if len(rows) == 1:
        first = int(rows[0, 0])
        return tokens[:, first : first + rows.shape[1]]
    return tokens[:, rows].flatten(0, 1)


def _groups(asked: list[int], found: list[int], together: bool) -> Iterator[list[int]]:
    """Numbers of the requests to process together. Only requests with both candidates and events are
    included; those in a group have similar sizes, so that padding adds at most half as many scores."""
    order = [b for b in range(len(asked)) if asked[b] and found[b]]
    order.sort(key=lambda b: (asked[b], found[b]))
    group: list[int] = []
    scores = longest = 0
    for b in order:
        longest = max(longest, found[b])
        padded = (len(group) + 1) * asked[b] * longest  # the last has the most candidates
        scores += asked[b] * found[b]
        if group and (not together or padded > min(1.5 * scores, _MOST_SCORES)):
            yield group
            group, scores, longest = [], asked[b] * found[b], found[b]
        group.append(b)
    if group:
        yield group


def _padded(sizes: list[int], group: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """The rows of a group's requests, [g, longest], and which of them exist; padding repeats a request's
    last row."""
    ends = torch.tensor(sizes, device=device).cumsum(0)
    mine = torch.tensor(group, device=device)
    size = torch.tensor([sizes[b] for b in group], device=device)
    place = torch.arange(max(sizes[b] for b in group), device=device)
    first = ends[mine] - size
    return first[:, None] + torch.minimum(place, size[:, None] - 1), place < size[:, None]
