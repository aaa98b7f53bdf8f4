"""Softmax target attention, over everything or over the latest events."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F
from torchrec.sparse.jagged_tensor import JaggedTensor

from ifa_torchrec.modules.base import SequenceInteraction
from ifa_torchrec.modules.config import InteractionConfig, at_least_one
from ifa_torchrec.modules.history import History
from ifa_torchrec.ops.jagged import rows_of_requests

_MOST_SCORES = 1 << 16
"""Scores of a head that a group of several requests may have."""


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

    Requests of about the same sizes are attended together, padded to the largest of them, in groups of a
    bounded size; one of 10^4 candidates and events is a group of its own. Half-lives and event weights
    enter as log w_i beside the scores, the softmax form of the same weighting; an event of weight 0 is
    not there. Without interest masses no matrix of scores is kept.

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

    _together = True
    """Whether ``_attend`` takes several requests as heads of one; not where heads differ from it."""

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
        shape = (-1, self.config.num_heads, self.config.head_width)
        keys = self.key_proj(tokens).view(shape).transpose(0, 1)
        values = self.value_proj(tokens).view(shape).transpose(0, 1)
        query = self.query_proj(candidates.values()).view(shape).transpose(0, 1)
        bias = self._log_weights(history)
        asked = rows_of_requests(candidates.offsets(), query.shape[1])
        found = rows_of_requests(history.offsets, tokens.shape[0])
        if len(asked) == 1 and asked[0] > 0 and found[0] > 0:
            output, log_sum = self._attend(query, keys, values, bias)  # as in an exported graph
            return self._with_masses(output, log_sum)
        places, outputs, log_sums = [], [], []
        for group in _groups(asked, found, self._together):
            rows, row_there = _padded(asked, group, query.device)
            events, event_there = _padded(found, group, query.device)
            weight = None if bias is None else bias[:, events]
            if not event_there.all():
                weight = torch.zeros_like(keys[..., 0][:, events]) if weight is None else weight
                weight = weight.masked_fill(~event_there, -torch.inf)
            # requests beside heads: what each of them does, it does by itself
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
        if places:  # those that found nothing stay as they are
            place = torch.cat(places)
            output = output.index_copy(1, place, torch.cat(outputs, 1).to(output.dtype))
            log_sum = log_sum.index_copy(1, place, torch.cat(log_sums, 1).to(log_sum.dtype))
        return self._with_masses(output, log_sum)

    def _with_masses(self, outputs: Tensor, log_sums: Tensor) -> tuple[Tensor, Tensor | None]:
        """From [H, M, d] and [H, M] to what ``dense_heads`` gives."""
        masses = self._mass_of_log(log_sums.T) if self.config.interest_mass else None
        return outputs.transpose(0, 1), masses

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, log_weight: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """One request, or several beside each other as further heads, from q [H, m, d], k and v
        [H, n, d] and log_weight [H, n], -inf where padding is.

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


def _of_group(tokens: Tensor, rows: Tensor) -> Tensor:
    """The rows [g, longest] of heads [H, n, d], as [H g, longest, d]; of one request, whose rows follow
    each other, no copy."""
    if len(rows) == 1:
        first = int(rows[0, 0])
        return tokens[:, first : first + rows.shape[1]]
    return tokens[:, rows].flatten(0, 1)


def _groups(asked: list[int], found: list[int], together: bool) -> Iterator[list[int]]:
    """Numbers of the requests to attend together: of those that have both candidates and events, alike
    in size, so that at most half as many scores again are padding."""
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
    """The rows of a group's requests, [g, longest], and which of them are there; the others repeat a
    request's last."""
    ends = torch.tensor(sizes, device=device).cumsum(0)
    mine = torch.tensor(group, device=device)
    size = torch.tensor([sizes[b] for b in group], device=device)
    place = torch.arange(max(sizes[b] for b in group), device=device)
    first = ends[mine] - size
    return first[:, None] + torch.minimum(place, size[:, None] - 1), place < size[:, None]
